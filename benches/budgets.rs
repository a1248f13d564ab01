//! Rate budgets against a simulated exchange with KuCoin's limits for VIP level 0.
//!
//! Run `cargo bench --bench budgets`, optionally with names of rows: `shares` (three bots with weights 1, 2 and 4 use up the futures
//! pool for 60 s), `foreign` (the same, while another user of the account takes half of it), `races` (10,000 orders and their
//! cancels), `block` (the edge blocks the address for 30 s). About 4 minutes in all. Fails if a bound is missed.
#![expect(
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::too_many_lines,
    clippy::unwrap_used,
    reason = "a benchmark panics if it cannot continue"
)]

#[path = "../tests/it/harness.rs"]
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
mod harness;

use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use credbroker::proto::{Method, Scope, SignAndSendRequest};
use credbroker_sim::installation::{MAIN_UID, Settings};
use credbroker_sim::kucoin::{
    Fault, FaultAction, KucoinSettings, Limits, Matching, Order, ReceivedRequest, When,
};
use harness::{Bot, Lab, Patient, futures_order, request, spot_order};
use tokio::time::sleep;
use tonic_types::StatusExt;

const FUTURES: &str = "/api/v1/orders";
/// The same for idle and busy, since a broker that is idle for longer is slower. 50 cancels fit into the reserve of a window.
const CANCEL_EVERY: Duration = Duration::from_millis(200);
/// Two windows, and no third one.
const RUN: Duration = Duration::from_secs(59);
/// Weight of the futures pool in a window, without the reserve for cancels.
const POOL: f64 = 2000.0;
const WINDOW: Duration = Duration::from_secs(30);

/// Rules for the bots `one`, `two` and `four`, named after their weights, and `waiting`, which waits up to 5 s.
fn rules() -> String {
    let mut rules =
        "[account.main]\nkey = { spot-margin = \"main\", futures = \"main\" }\n".to_owned();
    for bot in ["one", "two", "four", "waiting"] {
        for scope in ["spot-margin", "futures"] {
            let wait = if bot == "waiting" { 5000 } else { 200 };
            let _ = write!(
                rules,
                "[[grant]]\nbot = \"spiffe://demo.test/bot/{bot}\"\naccount = \"main\"\nscope = \"{scope}\"\nallow = [\"read\", \"trade\"]\n\
                 max_wait_ms = {wait}\n"
            );
        }
    }
    for (bot, weight) in [("two", 2), ("four", 4)] {
        let _ = write!(
            rules,
            "[bot.\"spiffe://demo.test/bot/{bot}\"]\nweight = {weight}\n"
        );
    }
    rules
}

fn settings(limits: Limits) -> Settings {
    Settings {
        rules: rules(),
        config: "[log]\nfilter = \"warn,credbroker::server=info\"\n".to_owned(),
        kucoin: KucoinSettings {
            limits,
            keep_requests: usize::MAX,
            ..KucoinSettings::default()
        },
        process: true,
        ..Settings::default()
    }
}

fn main() -> ExitCode {
    let words = std::env::args().skip(1).filter(|word| word != "--bench");
    let wanted: Vec<String> = words.collect();
    let runs = |name: &str| wanted.is_empty() || wanted.iter().any(|word| word == name);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let is_ok = runtime.block_on(async {
        let mut is_ok = true;
        println!("| Row | Measured | Bound | |\n|---|---|---|---|");
        if runs("shares") {
            is_ok &= shares(false).await;
        }
        if runs("foreign") {
            is_ok &= shares(true).await;
        }
        if runs("races") {
            is_ok &= races().await;
        }
        if runs("block") {
            is_ok &= block().await;
        }
        is_ok
    });
    ExitCode::from(u8::from(!is_ok))
}

fn row(name: &str, measured: &str, bound: &str, is_ok: bool) -> bool {
    let result = if is_ok { "ok" } else { "**missed**" };
    println!("| {name} | {measured} | {bound} | {result} |");
    is_ok
}

/// Sends orders without a pause until the end; after a refusal, waits as long as it says, but at most 50 ms.
async fn saturate(
    mut bot: Bot<Patient>,
    name: &'static str,
    end: Instant,
    accepted: Arc<AtomicU64>,
) {
    let mut number = 0;
    while Instant::now() < end {
        number += 1;
        match bot.send(futures_order(&format!("{name}-{number}"))).await {
            Ok(answer) if answer.code == "200000" => {
                accepted.fetch_add(1, Ordering::Relaxed);
            }
            Ok(_) => {}
            Err(status) => {
                let retry = status.get_details_retry_info();
                let delay = retry.and_then(|info| info.retry_delay).unwrap_or_default();
                sleep(delay.min(Duration::from_millis(50))).await;
            }
        }
    }
}

/// Three bots use up the futures pool. With `foreign`, another broker with the same key takes half of it.
async fn shares(foreign: bool) -> bool {
    let limits = Limits {
        edge_requests: None,
        ..Limits::default()
    };
    let mut lab = Lab::with(settings(limits)).await;
    let name = if foreign { "foreign" } else { "shares" };
    let mut others = Vec::new();
    let other = if foreign {
        let urls = (lab.kucoin.spot_url(), lab.kucoin.futures_url());
        let mut other = Lab::with(Settings {
            spot_url: Some(urls.0),
            futures_url: Some(urls.1),
            ..settings(Limits::none())
        })
        .await;
        // The exchange gets orders of two brokers, and each has only its own audit log.
        other.is_audit_checked = false;
        lab.is_audit_checked = false;
        Some(other)
    } else {
        None
    };
    // What is left of idle cancels, for comparison.
    let mut hasty = lab.patient_bot("waiting").await;
    let idle = cancels(&mut hasty, 50, CANCEL_EVERY).await;
    // The window of these cancels ends.
    sleep(WINDOW + Duration::from_secs(1)).await;
    let end = Instant::now() + RUN;
    let from = lab.kucoin.received().len();
    let counts: Vec<Arc<AtomicU64>> = (0..3).map(|_| Arc::default()).collect();
    let mut tasks = Vec::new();
    for (bot, accepted) in ["one", "two", "four"].into_iter().zip(&counts) {
        for (worker, name) in [("a", bot), ("b", bot)] {
            let connection = lab.patient_bot(bot).await;
            let accepted = Arc::clone(accepted);
            let label: &'static str = Box::leak(format!("{name}-{worker}").into_boxed_str());
            tasks.push(tokio::spawn(saturate(connection, label, end, accepted)));
        }
    }
    if let Some(other) = &other {
        for worker in 0..6 {
            let bot = other.patient_bot("four").await;
            let label: &'static str = Box::leak(format!("foreign-{worker}").into_boxed_str());
            others.push(tokio::spawn(saturate(bot, label, end, Arc::default())));
        }
    }
    sleep(Duration::from_secs(2)).await;
    let busy = cancels(&mut hasty, 50, CANCEL_EVERY).await;
    for task in tasks.into_iter().chain(others) {
        task.await.unwrap();
    }
    let received = lab.kucoin.received().split_off(from);
    let is_foreign =
        |request: &ReceivedRequest| String::from_utf8_lossy(&request.body).contains("\"foreign-");
    let (mut rejected, mut used, mut by_others) = (0, 0.0, 0.0);
    for request in received.iter().filter(|request| request.uid.is_some()) {
        let weight = if request.method == "POST" { 2.0 } else { 1.0 };
        match (request.code(), is_foreign(request)) {
            (Some("429000"), false) => rejected += 1,
            (Some("429000"), true) => {}
            (_, false) => used += weight,
            (_, true) => by_others += weight,
        }
    }
    let windows = 2.0;
    let use_percent = used / (POOL * windows - by_others) * 100.0;
    let total: f64 = counts
        .iter()
        .map(|count| count.load(Ordering::Relaxed) as f64)
        .sum();
    let shares: Vec<f64> = counts
        .iter()
        .zip([1.0, 2.0, 4.0])
        .map(|(count, weight)| count.load(Ordering::Relaxed) as f64 / total / (weight / 7.0))
        .collect();
    let worst = shares
        .iter()
        .map(|share| (share - 1.0).abs())
        .fold(0.0, f64::max);
    let mut is_ok = true;
    if !foreign {
        is_ok &= row(
            "shares: error",
            &format!("{:.1} %", worst * 100.0),
            "10 %",
            worst <= 0.1,
        );
    }
    let most = if foreign { windows } else { 0.0 };
    let bound = if foreign { 90.0 } else { 95.0 };
    is_ok &= row(
        &format!("{name}: 429 from the exchange"),
        &rejected.to_string(),
        &format!("{most}"),
        f64::from(rejected) <= most,
    );
    is_ok &= row(
        &format!("{name}: use of the pool in two windows"),
        &format!("{use_percent:.1} % (weight {used}, others {by_others})"),
        &format!("{bound} %"),
        use_percent >= bound,
    );
    let ratio = busy.as_secs_f64() / idle.as_secs_f64();
    is_ok &= row(
        &format!("{name}: p50 of cancels, compared with idle"),
        &format!("x{ratio:.2}"),
        "x1.5",
        ratio <= 1.5,
    );
    is_ok
}

/// The median time of cancels of orders that do not exist.
async fn cancels(bot: &mut Bot<Patient>, count: usize, every: Duration) -> Duration {
    let mut times = Vec::new();
    for number in 0..count {
        let started = Instant::now();
        let target = format!("/api/v1/orders/client-order/none-{number}?symbol=XBTUSDTM");
        bot.send(request(Scope::Futures, Method::Delete, &target, ""))
            .await
            .unwrap();
        times.push(started.elapsed());
        sleep(every).await;
    }
    times.sort();
    times[times.len() / 2]
}

fn cancel(client_oid: &str) -> SignAndSendRequest {
    let target = format!("/api/v1/hf/orders/client-order/{client_oid}?symbol=BTC-USDT");
    request(Scope::SpotMargin, Method::Delete, &target, "")
}

/// Orders and their cancels at the same time, in windows of half a second, so that many orders wait.
async fn races() -> bool {
    let mut limits = Limits {
        edge_requests: None,
        window_ms: 500,
        ..Limits::default()
    };
    limits.pools.insert("Spot".to_owned(), 300);
    let lab = Lab::with(settings(limits)).await;
    let counts: [Arc<AtomicU64>; 3] = Default::default();
    let mut tasks = Vec::new();
    for worker in 0..20 {
        let (mut placer, mut hasty) = (
            lab.patient_bot("waiting").await,
            lab.patient_bot("waiting").await,
        );
        let [waited, ended, refused] = counts.clone();
        tasks.push(tokio::spawn(async move {
            let mut done = Vec::new();
            for number in 0..500_u64 {
                let oid = format!("race-{worker}-{number}");
                let order = placer.send(spot_order(&oid));
                // The order reaches the broker first.
                let pause = Duration::from_micros(5000 + number % 50 * 200);
                let (first, cancelled) = tokio::join!(order, async {
                    sleep(pause).await;
                    hasty.send(cancel(&oid)).await
                });
                match first {
                    Ok(_) => ended.fetch_add(1, Ordering::Relaxed),
                    Err(status) => {
                        let info = status.get_details_error_info();
                        let is_cancelled =
                            info.is_some_and(|info| info.reason == "CANCELLED_WHILE_WAITING");
                        let count = if is_cancelled { &waited } else { &refused };
                        count.fetch_add(1, Ordering::Relaxed)
                    }
                };
                let is_over = cancelled.is_ok_and(|answer| answer.code != "429000");
                done.push((oid, is_over));
            }
            done
        }));
    }
    let mut over = Vec::new();
    for task in tasks {
        over.extend(task.await.unwrap());
    }
    let open: Vec<_> = lab
        .kucoin
        .orders(MAIN_UID)
        .into_iter()
        .filter(Order::is_open)
        .collect();
    let alive = over.iter().filter(|(oid, is_over)| {
        *is_over
            && open
                .iter()
                .any(|order| order.client_oid.as_ref() == Some(oid))
    });
    let alive: Vec<_> = alive.map(|(oid, _)| oid.clone()).collect();
    let [waited, ended, refused] = counts.map(|count| count.load(Ordering::Relaxed));
    let measured = format!(
        "{} {alive:?} of {} (orders: {ended} answered, {waited} ended while they waited, {refused} refused)",
        alive.len(),
        over.len()
    );
    row(
        "races: orders open after their cancel",
        &measured,
        "0",
        alive.is_empty(),
    )
}

/// The edge blocks the address: what leaves in the next 30 s, and what leaves first afterwards.
async fn block() -> bool {
    let limits = Limits {
        edge_requests: None,
        ..Limits::default()
    };
    let lab = Lab::with(settings(limits)).await;
    let mut bot = lab.patient_bot("one").await;
    bot.send(futures_order("first")).await.unwrap();
    lab.kucoin.fault(Fault {
        matching: Matching::Exact,
        ..Fault::once(
            FUTURES,
            FaultAction::Html {
                status: 429,
                when: When::BeforeProcessing,
            },
        )
    });
    bot.send(futures_order("blocked")).await.unwrap();
    let from = lab.kucoin.received().len();
    let (blocked_at, stop) = (Instant::now(), Arc::new(AtomicBool::new(false)));
    let mut tasks = Vec::new();
    for which in ["orders", "cancels"] {
        let (mut bot, stop) = (lab.patient_bot("two").await, Arc::clone(&stop));
        tasks.push(tokio::spawn(async move {
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                let target = format!("/api/v1/orders/client-order/none-{number}?symbol=XBTUSDTM");
                let message = match which {
                    "orders" => futures_order(&format!("order-{number}")),
                    _ => request(Scope::Futures, Method::Delete, &target, ""),
                };
                if bot.send(message).await.is_err() {
                    sleep(Duration::from_millis(20)).await;
                }
            }
        }));
    }
    sleep((blocked_at + WINDOW + Duration::from_secs(1)).saturating_duration_since(Instant::now()))
        .await;
    stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    let received = lab.kucoin.received().split_off(from);
    let start_ms = received[0].at_ms;
    let during: Vec<_> = received
        .iter()
        .take_while(|request| request.at_ms < start_ms + 28_000)
        .collect();
    let others = during
        .iter()
        .filter(|request| request.method != "DELETE")
        .count();
    let first_order = received
        .iter()
        .position(|request| request.method != "DELETE");
    let before = first_order.map_or(received.len(), |first| first);
    let mut is_ok = row(
        "block: cancels in 28 s",
        &during.len().to_string(),
        "27 to 29",
        (27..=29).contains(&during.len()),
    );
    is_ok &= row(
        "block: other requests",
        &others.to_string(),
        "0",
        others == 0,
    );
    let measured = format!("{before} cancels before the first order");
    is_ok &= row(
        "block: first afterwards",
        &measured,
        "a cancel",
        before > during.len(),
    );
    is_ok
}
