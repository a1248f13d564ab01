//! Rate budgets: bots share the quotas of their account, cancels go first, and the exchange rejects nothing for its rate limits.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use credbroker::proto::{GetBudgetRequest, Method, Outcome, Scope, SignAndSendRequest};
use credbroker_sim::installation::{RULES, Settings};
use credbroker_sim::kucoin::{Fault, FaultAction, KucoinSettings, Limits, SimKey, When};
use serde_json::Value;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::harness::{Bot, Lab, accounts, failure, request, spot_cancel_all, spot_order, until};

const ORDERS: &str = "/api/v1/hf/orders";

/// Rules for bots with different weights, of which `slow` waits for two seconds.
fn rules() -> String {
    let mut rules = String::new();
    for (bot, more) in [
        ("one", ""),
        ("two", ""),
        ("four", ""),
        ("slow", "max_wait_ms = 2000\n"),
    ] {
        let _ = write!(
            rules,
            "[[grant]]\nbot = \"spiffe://demo.test/bot/{bot}\"\naccount = \"main\"\nscope = \"spot-margin\"\n\
             allow = [\"read\", \"trade\"]\n{more}"
        );
    }
    let mut rules = RULES.to_owned() + &rules;
    rules += "[bot.\"spiffe://demo.test/bot/slow\"]\ncalls_in_flight = 1\n";
    rules += "[bot.\"spiffe://demo.test/bot/two\"]\nweight = 2\n[bot.\"spiffe://demo.test/bot/four\"]\nweight = 4\n";
    rules
}

#[tokio::test]
async fn bots_have_limits_of_their_own_in_the_rules() {
    let rules = RULES.to_owned()
        + "[bot.\"spiffe://demo.test/bot/maker\"]\nrequests_per_s = 5\n[bot.\"spiffe://demo.test/bot/reader\"]\ncalls_in_flight = 2\n";
    let mut lab = Lab::with(Settings {
        rules,
        ..Settings::default()
    })
    .await;
    let mut maker = lab.patient_bot("maker").await;
    let mut refused = None;
    for round in 0..20 {
        match maker.send(spot_order(&format!("order-{round}"))).await {
            Ok(_) => {}
            Err(status) => {
                refused = Some(status);
                break;
            }
        }
    }
    // 200 ms between two requests: an order waits for the next one, and another call finds none then.
    if let Some(status) = refused {
        assert!(status.message().contains("requests_per_s in the rules"));
        assert!(limited(&status) <= Duration::from_millis(400));
    }
    let received = lab.kucoin.received();
    let last_ms = received.iter().map(|request| request.at_ms).max().unwrap();
    let first_ms = received.iter().map(|request| request.at_ms).min().unwrap();
    let allowed = 5 + (last_ms - first_ms) / 200 + 1;
    assert!(
        i64::try_from(received.len()).unwrap() <= allowed,
        "{allowed}"
    );
    let mut reader = lab.patient_bot("reader").await;
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once("/api/v1/accounts", FaultAction::Hold {})
    });
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut bot = lab.patient_bot("reader").await;
        held.push(tokio::spawn(
            async move { bot.send(accounts()).await.map(drop) },
        ));
    }
    until("two calls are in flight", async || {
        lab.kucoin.in_progress() == 2
    })
    .await;
    let status = reader.send(accounts()).await.unwrap_err();
    assert_eq!(failure(&status).1, "OVERLOADED");
    assert!(
        status.message().contains("its limit of 2 in-flight calls"),
        "{status}"
    );
    lab.kucoin.clear_faults();
    for call in held {
        call.await.unwrap().unwrap();
    }
    lab.stop().await;
}

/// A lab whose exchange allows this weight of the spot pool in a window.
async fn lab(spot: u64, window_ms: u64) -> Lab {
    let mut limits = Limits::none();
    limits.pools.insert("Spot".to_owned(), spot);
    limits.window_ms = window_ms;
    Lab::with(Settings {
        rules: rules(),
        kucoin: KucoinSettings {
            limits,
            ..KucoinSettings::default()
        },
        ..Settings::default()
    })
    .await
}

fn cancel(client_oid: &str) -> SignAndSendRequest {
    let target = format!("/api/v1/hf/orders/client-order/{client_oid}?symbol=BTC-USDT");
    request(Scope::SpotMargin, Method::Delete, &target, "")
}

/// The delay of a call that was refused for the rate limit.
fn limited(status: &Status) -> Duration {
    let (code, reason, outcome, _) = failure(status);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (Code::ResourceExhausted, "RATE_LIMITED", "not_sent")
    );
    let retry = status.get_details_retry_info();
    retry.and_then(|info| info.retry_delay).unwrap()
}

/// The answers with code 429000 that the exchange has sent.
fn rejected(lab: &Lab) -> usize {
    let received = lab.kucoin.received();
    let codes = received.iter().filter_map(|request| request.code());
    codes.filter(|code| *code == "429000").count()
}

#[tokio::test]
async fn bots_get_shares_by_weight_and_the_exchange_rejects_nothing() {
    let mut lab = lab(200, 30_000).await;
    let names = ["one", "two", "four"];
    let (mut bots, mut accepted) = (Vec::new(), [0; 3]);
    for name in names {
        bots.push(lab.bot(name).await);
    }
    for round in 0..200 {
        for (which, bot) in bots.iter_mut().enumerate() {
            match bot.send(spot_order(&format!("{which}-{round}"))).await {
                Ok(answer) => {
                    assert_eq!(answer.outcome(), Outcome::Accepted);
                    accepted[which] += 1;
                }
                Err(status) => assert!(limited(&status) <= Duration::from_secs(30)),
            }
        }
    }
    assert_eq!(rejected(&lab), 0);
    let all: u32 = accepted.iter().sum();
    // All but the 3 % for cancels.
    assert!((190..=194).contains(&all), "{accepted:?}");
    for (count, expected) in accepted.into_iter().zip([27.7, 55.4, 110.9]) {
        let error = (f64::from(count) / expected - 1.0).abs();
        assert!(error < 0.1, "{accepted:?}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn cancels_leave_first_and_once_per_second_from_an_empty_pool() {
    let mut lab = lab(100, 30_000).await;
    let mut bot = lab.bot("one").await;
    let mut last = Ok(());
    for round in 0..120 {
        let sent = bot.send(spot_order(&format!("order-{round}"))).await;
        last = sent.map(drop);
    }
    limited(&last.unwrap_err());
    // A known clientOid gets no "not sent", after which its bot would place the order again.
    let repeated = bot.send(spot_order("order-0")).await.unwrap_err();
    let info = repeated.get_details_error_info().unwrap();
    assert_eq!(info.reason, "ORDER_REPEATED");
    // The reserve.
    for round in 0..3 {
        let answer = bot.send(cancel(&format!("order-{round}"))).await.unwrap();
        assert_eq!(answer.outcome(), Outcome::Accepted);
    }
    assert_eq!(rejected(&lab), 0);
    let started = Instant::now();
    for round in 3..6 {
        let answer = bot.send(cancel(&format!("order-{round}"))).await.unwrap();
        assert_eq!(answer.code, "429000");
    }
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(1900), "{took:?}");
    lab.stop().await;
}

#[tokio::test]
async fn orders_wait_for_a_window_that_is_near_and_are_refused_at_once_if_it_is_not() {
    let mut lab = lab(20, 1500).await;
    let (mut one, mut slow) = (lab.bot("one").await, lab.bot("slow").await);
    let mut last = Ok(());
    for round in 0..40 {
        let sent = one.send(spot_order(&format!("order-{round}"))).await;
        last = sent.map(drop);
        if last.is_err() {
            break;
        }
    }
    let wait = limited(&last.unwrap_err());
    assert!((200..=1500).contains(&wait.as_millis()), "{wait:?}");
    let answer = slow.send(spot_order("waited")).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted);
    assert_eq!(rejected(&lab), 0);
    assert_eq!(
        lab.metric("budget_waiting{account=\"main\",pool=\"spot\"}")
            .await,
        Some(0.0)
    );
    lab.stop().await;
}

/// Uses up the spot pool, at least 200 ms before its reset; returns the last exchange time.
async fn exhaust(bot: &mut Bot, prefix: &str) -> i64 {
    let mut time_ms = 0;
    for round in 0..1000 {
        match bot.send(spot_order(&format!("{prefix}-{round}"))).await {
            Ok(answer) => time_ms = answer.broker_time_ms,
            Err(status) => {
                limited(&status);
                return time_ms;
            }
        }
    }
    panic!("the pool is never used up")
}

async fn until_one_waits(lab: &Lab) {
    until("a request waits", async || {
        let waiting = "budget_waiting{account=\"main\",pool=\"spot\"}";
        lab.metric(waiting).await >= Some(1.0)
    })
    .await;
}

#[tokio::test]
async fn cancel_ends_the_wait_of_an_order_that_it_covers() {
    let mut lab = lab(20, 1900).await;
    let (mut one, mut slow) = (lab.patient_bot("one").await, lab.patient_bot("slow").await);
    let mut other = lab.bot("one").await;
    let all = spot_cancel_all();
    for (oid, cancel, is_covered) in [
        ("by-oid", cancel("by-oid"), true),
        ("by-all", all, true),
        ("another", cancel("by-oid"), false),
    ] {
        exhaust(&mut other, oid).await;
        let order = slow.send(spot_order(oid));
        let (ordered, cancelled) = tokio::join!(order, async {
            until_one_waits(&lab).await;
            one.send(cancel).await
        });
        cancelled.unwrap();
        if is_covered {
            let status = ordered.unwrap_err();
            let (code, reason, outcome, _) = failure(&status);
            assert_eq!(
                (code, reason.as_str(), outcome.as_str()),
                (
                    Code::FailedPrecondition,
                    "CANCELLED_WHILE_WAITING",
                    "not_sent"
                )
            );
            assert!(status.get_details_retry_info().is_none());
        } else {
            assert_eq!(ordered.unwrap().outcome(), Outcome::Accepted);
        }
    }
    lab.stop().await;
}

#[tokio::test]
async fn order_that_another_call_waits_with_is_repeated() {
    let mut lab = lab(20, 1900).await;
    let mut other = lab.bot("one").await;
    // `one` would not wait for so long, and `slow` may have only one call in flight.
    for name in ["one", "slow"] {
        let (mut first, mut second) = (lab.patient_bot("slow").await, lab.patient_bot(name).await);
        exhaust(&mut other, name).await;
        let oid = format!("same-{name}");
        let (ordered, repeated) = tokio::join!(first.send(spot_order(&oid)), async {
            until_one_waits(&lab).await;
            second.send(spot_order(&oid)).await
        });
        assert_eq!(ordered.unwrap().outcome(), Outcome::Accepted);
        let info = repeated.unwrap_err().get_details_error_info().unwrap();
        assert_eq!(info.reason, "ORDER_REPEATED");
        assert_eq!(info.metadata["order_outcome"], "in_flight");
    }
    lab.stop().await;
}

#[tokio::test]
async fn stop_waits_for_cancels_that_wait() {
    let mut lab = lab(100, 30_000).await;
    let mut one = lab.bot("one").await;
    exhaust(&mut one, "order").await;
    let mut cancels = Vec::new();
    for number in 0..6 {
        let mut bot = lab.patient_bot("one").await;
        cancels.push(tokio::spawn(async move {
            bot.send(cancel(&format!("order-{number}"))).await
        }));
    }
    until_one_waits(&lab).await;
    lab.stop().await;
    for cancel in cancels {
        // The exchange has answered it, with 429 once the pool was empty.
        cancel.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn cancel_waits_for_the_answer_to_its_order() {
    let mut lab = lab(1000, 30_000).await;
    let (mut one, mut two) = (lab.patient_bot("one").await, lab.patient_bot("two").await);
    lab.kucoin
        .fault(Fault::once(ORDERS, FaultAction::Delay { ms: 100 }));
    let (ordered, cancelled) = tokio::join!(one.send(spot_order("mine")), async {
        until("the order is at the exchange", async || {
            lab.kucoin.in_progress() > 0
        })
        .await;
        two.send(cancel("mine")).await
    });
    assert_eq!(ordered.unwrap().outcome(), Outcome::Accepted);
    assert_eq!(cancelled.unwrap().outcome(), Outcome::Accepted);
    let received = lab.kucoin.received();
    let methods: Vec<_> = received
        .iter()
        .map(|request| request.method.as_str())
        .collect();
    assert_eq!(methods, ["POST", "DELETE"]);
    lab.stop().await;
}

#[tokio::test]
async fn order_never_waits_past_its_not_after() {
    let mut lab = lab(20, 3000).await;
    let (mut one, mut slow) = (lab.bot("one").await, lab.bot("slow").await);
    let time_ms = exhaust(&mut one, "order").await;
    let mut order = spot_order("short");
    order.not_after_ms = time_ms + 700;
    let started = Instant::now();
    limited(&slow.send(order).await.unwrap_err());
    assert!(started.elapsed() < Duration::from_millis(700));
    assert_eq!(rejected(&lab), 0);
    lab.stop().await;
}

#[tokio::test]
async fn bots_and_admins_see_what_is_left() {
    let mut lab = lab(1000, 30_000).await;
    let mut one = lab.bot("one").await;
    for round in 0..5 {
        one.send(spot_order(&format!("order-{round}")))
            .await
            .unwrap();
    }
    let question = |account: &str| GetBudgetRequest {
        account: account.to_owned(),
    };
    let answer = one.client.get_budget(question("main")).await.unwrap();
    let answer = answer.into_inner();
    let spot = answer.pools.iter().find(|pool| pool.pool == "spot");
    let spot = spot.unwrap();
    assert_eq!((spot.limit, spot.remaining), (1000, 995));
    assert!((20_000..=30_000).contains(&spot.reset_ms), "{spot:?}");
    assert_eq!(answer.edge_blocked_ms, 0);
    for (account, code, reason) in [
        ("other", Code::PermissionDenied, "POLICY_DENIED"),
        ("", Code::InvalidArgument, "REQUEST_MALFORMED"),
    ] {
        let status = one.client.get_budget(question(account)).await.unwrap_err();
        let info = status.get_details_error_info().unwrap();
        assert_eq!((status.code(), info.reason.as_str()), (code, reason));
        assert!(!info.metadata.contains_key("outcome"));
    }
    let shown = lab.admin_cli("anna", &["budgets", "main"]).await;
    assert_eq!(shown.code, Some(0), "{shown:?}");
    let line = shown.stdout.lines().find(|line| line.contains(" spot "));
    let words: Vec<_> = line.unwrap().split_whitespace().collect();
    assert_eq!(words[..7], ["main", "spot", "1000", "5", "0", "995", "0"]);
    let shown = lab.admin_cli("anna", &["budgets", "--json"]).await;
    let lines = shown.stdout.lines();
    let mut lines = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    assert!(lines.any(|line| line["pool"] == "spot" && line["remaining"] == 995));
    let unknown = lab.admin_cli("anna", &["budgets", "nobody"]).await;
    assert_eq!(unknown.code, Some(1));
    lab.stop().await;
}

#[tokio::test]
async fn during_an_edge_block_one_cancel_per_second_leaves_and_nothing_else() {
    let mut lab = lab(1000, 30_000).await;
    let (mut one, mut two) = (lab.bot("one").await, lab.bot("two").await);
    one.send(spot_order("open")).await.unwrap();
    let when = When::BeforeProcessing;
    lab.kucoin
        .fault(Fault::once(ORDERS, FaultAction::Html { status: 429, when }));
    let blocked = one.send(spot_order("blocked")).await.unwrap();
    assert_eq!(blocked.outcome(), Outcome::Rejected);
    let before = lab.kucoin.received().len();
    for request in [spot_order("refused"), accounts()] {
        let wait = limited(&two.send(request).await.unwrap_err());
        assert!((25..=30).contains(&wait.as_secs()), "{wait:?}");
    }
    assert_eq!(lab.kucoin.received().len(), before);
    assert_eq!(lab.metric("edge_blocked").await, Some(1.0));
    let (_, ready) = lab.get("/readyz?verbose").await;
    assert!(
        ready.contains("rate limit: the exchange blocks the egress address"),
        "{ready}"
    );
    let started = Instant::now();
    for _ in 0..2 {
        two.send(cancel("open")).await.unwrap();
    }
    assert_eq!(lab.kucoin.received().len(), before + 2);
    assert!(started.elapsed() >= Duration::from_millis(950));
    lab.stop().await;
}

#[tokio::test]
async fn edge_block_of_a_check_of_the_broker_stops_bots_too() {
    let mut lab = Lab::with(Settings {
        egress: "proof_every_s = 1".to_owned(),
        ..Settings::default()
    })
    .await;
    let when = When::BeforeProcessing;
    let page = FaultAction::Html { status: 429, when };
    lab.kucoin.fault(Fault::once("/api/v1/my-ip", page));
    until("the check is rejected", async || {
        lab.metric("edge_blocked").await == Some(1.0)
    })
    .await;
    let wait = limited(&lab.bot("maker").await.send(accounts()).await.unwrap_err());
    assert!((20..=30).contains(&wait.as_secs()), "{wait:?}");
    lab.stop().await;
}

#[tokio::test]
async fn overload_without_headers_stops_nothing() {
    let mut lab = lab(1000, 30_000).await;
    let mut one = lab.bot("one").await;
    let overload = FaultAction::RateLimited { reset_ms: None };
    lab.kucoin.fault(Fault::once(ORDERS, overload));
    let rejected = one.send(spot_order("rejected")).await.unwrap();
    assert_eq!(rejected.code, "429000");
    let next = one.send(spot_order("next")).await.unwrap();
    assert_eq!(next.outcome(), Outcome::Accepted);
    lab.stop().await;
}

#[tokio::test]
async fn rejection_with_headers_stops_the_pool_until_its_reset() {
    let mut lab = lab(1000, 30_000).await;
    let (mut one, mut slow) = (lab.bot("one").await, lab.bot("slow").await);
    let used_up = FaultAction::RateLimited {
        reset_ms: Some(1000),
    };
    lab.kucoin.fault(Fault::once(ORDERS, used_up));
    one.send(spot_order("rejected")).await.unwrap();
    let wait = limited(&one.send(spot_order("refused")).await.unwrap_err());
    assert!((500..=1000).contains(&wait.as_millis()), "{wait:?}");
    // Other pools are not affected.
    one.send(accounts()).await.unwrap();
    let next = slow.send(spot_order("next")).await.unwrap();
    assert_eq!(next.outcome(), Outcome::Accepted);
    lab.stop().await;
}

#[tokio::test]
async fn sub_accounts_of_a_unified_account_share_its_limit() {
    let mut limits = Limits::none();
    limits.pools.insert("Unified".to_owned(), 200);
    let mut rules = String::new();
    for account in ["main", "other"] {
        let _ = write!(
            rules,
            "[account.{account}]\nkey.unified = \"main\"\nparent_uid = \"1\"\n\
             [[grant]]\nbot = \"spiffe://demo.test/bot/maker\"\naccount = \"{account}\"\nscope = \"unified\"\n\
             allow = [\"read\"]\n"
        );
    }
    let mut lab = Lab::with(Settings {
        rules,
        keys: Vec::new(),
        wait_ready: false,
        kucoin: KucoinSettings {
            limits,
            ..KucoinSettings::default()
        },
        ..Settings::default()
    })
    .await;
    for (account, uid) in [("main", 1001), ("other", 1002)] {
        let key = SimKey {
            parent_uid: Some(1),
            ..SimKey::fake(uid)
        };
        lab.add_key(account, "main", &key);
    }
    lab.until_ready().await;
    let mut maker = lab.bot("maker").await;
    let read = |account: &str| SignAndSendRequest {
        account: account.to_owned(),
        ..request(
            Scope::Unified,
            Method::Get,
            "/api/ua/v1/unified/order/history?tradeType=SPOT",
            "",
        )
    };
    let mut last = Ok(());
    for _ in 0..400 {
        last = maker.send(read("main")).await.map(drop);
        if last.is_err() {
            break;
        }
    }
    limited(&last.unwrap_err());
    limited(&maker.send(read("other")).await.unwrap_err());
    assert_eq!(rejected(&lab), 0);
    lab.stop().await;
}
