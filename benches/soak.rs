//! A million calls and a thousand reloads must not increase memory, descriptors and tasks of the broker.
//!
//! Run `cargo bench --bench soak`; set `CREDBROKER_SOAK_CALLS` and `CREDBROKER_SOAK_RELOADS` for fewer. Broker and
//! simulators are separate processes. Each change of the rules names another key, so that keys are loaded and removed, too.
//! Every fourth reload changes the server certificate instead, and one bot reconnects. The audit log is written to
//! `/dev/null`, because it grows by design.
#![expect(
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark panics if it cannot continue"
)]

#[path = "../tests/it/drive.rs"]
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
mod drive;
#[path = "../tests/it/harness.rs"]
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
mod harness;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use credbroker::proto::{Method, Scope, SignAndSendRequest};
use tokio::sync::RwLock;
use tonic_types::StatusExt;

use drive::{Site, TRADER};
use harness::{Bot, Patient, accounts, patient, request, spot_order, until};

const BOTS: usize = 8;
const IN_FLIGHT: usize = 8;

/// Samples per run; every fifth is printed.
const SAMPLES: u64 = 100;

/// Growth that is not a leak: allocators and caches can grow by this factor, and the number of descriptors and tasks varies
/// with the current connections.
const RSS_MAY_GROW_BY: f64 = 1.10;
const COUNTS_MAY_GROW_BY: f64 = 2.0;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        if !drive::simulate().await {
            soak().await;
        }
    });
}

/// A measurement of the broker's process.
#[derive(Clone, Copy)]
struct Sample {
    rss_mb: f64,
    descriptors: f64,
    tasks: f64,
}

async fn soak() {
    let calls = number("CREDBROKER_SOAK_CALLS", 1_000_000);
    let reloads = number("CREDBROKER_SOAK_RELOADS", 1_000);
    let mut site = Site::start(&[], rules(0), |config| {
        let config = config.replace("every_ms = 50", "every_ms = 20");
        format!("{config}\n[audit]\nfile = \"/dev/null\"\n")
    })
    .await;
    site.driver.stop_new_calls();
    let mut connections = Vec::new();
    for bot in 0..BOTS {
        connections.push(Arc::new(Mutex::new(connect(&site, bot).await)));
    }
    let ended = Arc::new(AtomicU64::new(0));
    let endings = Arc::new(Mutex::new(BTreeMap::new()));
    let next_step = Arc::new(AtomicU64::new(0));
    // Samples are taken while no call is in flight, because calls in flight use resources of their own.
    let gate = Arc::new(RwLock::new(()));
    let mut bots = Vec::new();
    for connection in &connections {
        for _ in 0..IN_FLIGHT {
            let (connection, gate, next_step, ended, endings) = (
                Arc::clone(connection),
                Arc::clone(&gate),
                Arc::clone(&next_step),
                Arc::clone(&ended),
                Arc::clone(&endings),
            );
            bots.push(tokio::spawn(async move {
                loop {
                    let _permission = gate.read().await;
                    let step = next_step.fetch_add(1, Ordering::Relaxed);
                    if step >= calls {
                        return;
                    }
                    let connection = connection.lock().unwrap().clone();
                    let ending = call(connection, step).await;
                    *endings.lock().unwrap().entry(ending).or_insert(0_u64) += 1;
                    ended.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
    }

    let started = Instant::now();
    let (mut samples, mut done) = (Vec::new(), 0);
    println!(
        "| Calls | Reloads | RSS, MB | Descriptors | Threads | Tasks | Connections | Calls/s |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let (mut last, mut last_calls) = (started, 0);
    while samples.len() < usize::try_from(SAMPLES).unwrap() {
        let now = ended.load(Ordering::Relaxed);
        if done < reloads && now >= calls / reloads.max(1) * done {
            done += 1;
            reload(&site, done, &connections).await;
            continue;
        }
        if now < calls * (samples.len() as u64 + 1) / SAMPLES {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        }
        let paused = gate.write().await;
        until("no call is in flight", async || {
            site.metric("calls_in_flight").await < 0.5
        })
        .await;
        let process = Process::read(&site).await;
        drop(paused);
        samples.push(process.sample);
        if samples.len().is_multiple_of(5) {
            let per_second = (now - last_calls) as f64 / last.elapsed().as_secs_f64();
            (last, last_calls) = (Instant::now(), now);
            let Sample {
                rss_mb,
                descriptors,
                tasks,
            } = process.sample;
            println!(
                "| {now} | {done} | {rss_mb:.1} | {descriptors} | {} | {tasks} | {} | {per_second:.0} |",
                process.threads, process.connections
            );
        }
    }
    for bot in bots {
        bot.await.unwrap();
    }
    let endings = endings.lock().unwrap().clone();
    println!("\noutcomes of the calls: {endings:#?}");
    assert!(
        endings
            .keys()
            .all(|ending| !ending.contains("INTERNAL") && !ending.starts_with("no ErrorInfo")),
        "calls failed unexpectedly"
    );
    compare(&samples);
    site.lab.process().terminate();
    assert_eq!(site.lab.process().exit_code().await, Some(0));
}

/// Panics if the last quarter of the samples has significantly more than the second one.
fn compare(samples: &[Sample]) {
    let quarter = samples.len() / 4;
    let median = |of: &[Sample], value: fn(&Sample) -> f64| {
        let mut values: Vec<_> = of.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (second, last) = (&samples[quarter..2 * quarter], &samples[3 * quarter..]);
    for name in ["RSS, MB", "descriptors", "tasks"] {
        let value: fn(&Sample) -> f64 = match name {
            "descriptors" => |sample| sample.descriptors,
            "tasks" => |sample| sample.tasks,
            _ => |sample| sample.rss_mb,
        };
        let (before, after) = (median(second, value), median(last, value));
        if after < 0.5 {
            println!("{name}: not measured; the broker is not dumpable, so only root can read it");
            continue;
        }
        println!(
            "{name}: median of the second quarter {before:.1}, of the last quarter {after:.1}"
        );
        let bound = if name == "RSS, MB" {
            before * RSS_MAY_GROW_BY
        } else {
            before + COUNTS_MAY_GROW_BY
        };
        assert!(after <= bound, "{name} grew from {before:.1} to {after:.1}");
    }
}

/// The broker's process, measured by /proc and by its own metrics.
struct Process {
    sample: Sample,
    threads: String,
    connections: f64,
}

impl Process {
    async fn read(site: &Site) -> Self {
        let id = site.lab.process.as_ref().unwrap().id();
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let field = |name: &str| {
            let mut lines = status.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)).unwrap();
            value.split_whitespace().next().unwrap().to_owned()
        };
        let rss_kb: f64 = field("VmRSS:").parse().unwrap();
        // Not readable if the broker is not dumpable and this process is not root.
        let descriptors =
            std::fs::read_dir(format!("/proc/{id}/fd")).map_or(0, std::iter::Iterator::count);
        Self {
            sample: Sample {
                rss_mb: rss_kb / 1024.0,
                descriptors: descriptors as f64,
                tasks: site.metric("tasks").await,
            },
            threads: field("Threads:"),
            connections: site.metric("connections").await,
        }
    }
}

fn number(variable: &str, default: u64) -> u64 {
    let set = std::env::var_os(variable);
    set.map_or(default, |set| set.to_str().unwrap().parse().unwrap())
}

/// Rules for each `number`: with a different key, and a different extra bot that does not exist.
fn rules(number: u64) -> String {
    let key = if number.is_multiple_of(2) {
        "main"
    } else {
        "second"
    };
    let keys = format!("\"{key}\", futures = \"{key}\"");
    let mut rules = TRADER.replace("\"main\", futures = \"main\"", &keys);
    let bots = (0..BOTS).map(|bot| format!("bot-{bot}"));
    // The reader of the drive, and the extra bot.
    for bot in bots.chain(["reader".to_owned(), format!("spare-{number}")]) {
        let _ = write!(
            rules,
            "\n[[grant]]\nbot = \"spiffe://demo.test/bot/{bot}\"\naccount = \"main\"\nscope = \"spot-margin\"\nallow = [\"read\", \"trade\"]\n"
        );
    }
    rules
}

async fn connect(site: &Site, bot: usize) -> Patient {
    let roots = [site.lab.ca.certificate_pem().to_owned()];
    let identity = site.lab.ca.bot(&format!("bot-{bot}")).unwrap();
    patient(site.lab.grpc, &roots, &identity).await.unwrap()
}

/// Changes a file and waits until the broker has loaded it.
async fn reload(site: &Site, number: u64, connections: &[Arc<Mutex<Patient>>]) {
    let file = if number.is_multiple_of(4) {
        "tls"
    } else {
        "rules"
    };
    let reloaded = format!("reloads_total{{file=\"{file}\",outcome=\"reloaded\"}}");
    let before = site.metric(&reloaded).await;
    if file == "tls" {
        let server = site.lab.ca.server().unwrap();
        site.lab.replace("server.key", &server.key_pem).unwrap();
        site.lab
            .replace("server.pem", &server.certificate_pem)
            .unwrap();
    } else {
        site.lab.replace("rules.toml", &rules(number)).unwrap();
    }
    until("a changed file is loaded", async || {
        site.metric(&reloaded).await > before
    })
    .await;
    if file == "tls" {
        let bot = usize::try_from(number / 4).unwrap() % BOTS;
        let connection = connect(site, bot).await;
        *connections[bot].lock().unwrap() = connection;
    }
}

/// Sends one call of the mix; returns how it ended.
async fn call(connection: Patient, step: u64) -> String {
    let mut bot = Bot::over(connection);
    let id = format!("soak-{step}");
    let mut ended = send(&mut bot, nth_call(step, &id)).await;
    if step % 20 == 10 {
        // Cancels the order that was placed, so that few orders stay open.
        let target = format!("/api/v1/hf/orders/client-order/{id}?symbol=BTC-USDT");
        let cancel = request(Scope::SpotMargin, Method::Delete, &target, "");
        ended = format!("{ended}, then {}", send(&mut bot, cancel).await);
    }
    ended
}

async fn send(bot: &mut Bot<Patient>, call: SignAndSendRequest) -> String {
    match bot.send(call).await {
        Ok(answer) => format!("{:?} ({})", answer.outcome(), answer.code),
        Err(status) => match status.get_details_error_info() {
            Some(info) => info.reason,
            None => format!("no ErrorInfo: {status:?}"),
        },
    }
}

fn nth_call(step: u64, id: &str) -> SignAndSendRequest {
    let spot = Scope::SpotMargin;
    let mut call = match step % 20 {
        10 => spot_order(id),
        1..=6 => SignAndSendRequest {
            path: "/api/v1/hf/orders/test".to_owned(),
            ..spot_order(id)
        },
        7 => request(spot, Method::Post, "/api/v3/withdrawals", "{}"),
        8 => request(spot, Method::Get, "/api/v1/../accounts", ""),
        _ => accounts(),
    };
    id.clone_into(&mut call.request_id);
    call
}
