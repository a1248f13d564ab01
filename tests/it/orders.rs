//! One order per clientOid: a repeated order is refused with what is known about the first one, also after a restart.

use std::io::Write;

use credbroker::proto::{CallState, GetOutcomeRequest, Method, Outcome, Scope, SignAndSendRequest};
use credbroker_sim::installation::{MAIN_UID, RULES, Settings};
use credbroker_sim::kucoin::{Fault, FaultAction, When};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::harness::{Bot, Lab, Patient, Time, failure, refusal, request, spot_order, until};

const ORDERS: &str = "/api/v1/hf/orders";

/// Reason, state of the earlier order, and message of the refusal of a repeated order.
fn repeated(result: Result<impl std::fmt::Debug, Status>) -> (String, String, String) {
    let status = result.expect_err("this order must be refused");
    assert_eq!(status.code(), Code::AlreadyExists, "{status:?}");
    assert!(status.get_details_retry_info().is_none());
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.metadata["retry"], "never");
    assert!(!info.metadata.contains_key("outcome"), "{info:?}");
    let state = info.metadata["order_outcome"].clone();
    (info.reason, state, status.message().to_owned())
}

fn order_repeated(result: Result<impl std::fmt::Debug, Status>) -> String {
    let (reason, state, message) = repeated(result);
    assert_eq!(reason, "ORDER_REPEATED", "{message}");
    state
}

fn orders_received(lab: &Lab) -> usize {
    let received = lab.kucoin.received();
    let is_order = |path: &str| path.starts_with(ORDERS);
    let orders = received.iter().filter(|request| request.method == "POST");
    orders.filter(|request| is_order(request.path())).count()
}

fn batch(oids: &[&str]) -> SignAndSendRequest {
    let order = |oid: &&str| json!({"clientOid": oid, "side": "buy", "symbol": "BTC-USDT", "type": "limit", "price": "10000", "size": "0.001"});
    let body = json!({"orderList": oids.iter().map(order).collect::<Vec<_>>()});
    request(
        Scope::SpotMargin,
        Method::Post,
        "/api/v1/hf/orders/multi",
        &body.to_string(),
    )
}

#[tokio::test]
async fn repeated_order_is_refused_with_what_is_known_about_the_first() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(spot_order("first")).await.unwrap();
    let mut again = spot_order("first");
    again.request_id = "again".to_owned();
    assert_eq!(order_repeated(bot.send(again).await), "accepted");
    // The same clientOid for another order.
    let mut other = spot_order("first");
    other.body = String::from_utf8(other.body.to_vec())
        .unwrap()
        .replace("0.001", "0.002")
        .into();
    let (reason, state, message) = repeated(bot.send(other).await);
    assert_eq!(
        (reason.as_str(), state.as_str()),
        ("CLIENT_OID_REUSED", "accepted")
    );
    assert_eq!(
        message,
        "clientOid first was used for a different request; use a new clientOid for each new order"
    );
    // On another connection, too; the other scope has its own clientOids.
    let mut another = lab.patient_bot("maker").await;
    assert_eq!(
        order_repeated(another.send(spot_order("first")).await),
        "accepted"
    );
    another
        .send(crate::harness::futures_order("first"))
        .await
        .unwrap();
    assert_eq!(orders_received(&lab), 1);
    let lines = lab.audit_of("again");
    let [line] = &lines[..] else {
        panic!("{lines:?}")
    };
    assert_eq!(
        (&line["event"], &line["outcome"]),
        (&json!("denied"), &Value::Null)
    );
    assert_eq!(line["reason"], "ORDER_REPEATED");
    let name = "requests_total{scope=\"spot-margin\",outcome=\"\",reason=\"ORDER_REPEATED\"}";
    assert_eq!(lab.metric(name).await, Some(2.0));
    lab.stop().await;
}

#[tokio::test]
async fn order_in_flight_or_with_a_lost_answer_is_not_sent_again() {
    let mut lab = Lab::start().await;
    let bot = lab.patient_bot("maker").await;
    lab.kucoin
        .fault(Fault::once(ORDERS, FaultAction::Delay { ms: 800 }));
    let slow = tokio::spawn({
        let mut bot = bot.clone();
        async move { bot.send(spot_order("slow")).await }
    });
    until("the order is sent", async || orders_received(&lab) == 1).await;
    let mut other = bot.clone();
    assert_eq!(
        order_repeated(other.send(spot_order("slow")).await),
        "in_flight"
    );
    slow.await.unwrap().unwrap();
    assert_eq!(
        order_repeated(other.send(spot_order("slow")).await),
        "accepted"
    );
    for (oid, when) in [
        ("placed", When::AfterProcessing),
        ("lost", When::BeforeProcessing),
    ] {
        lab.kucoin
            .fault(Fault::once(ORDERS, FaultAction::Close { when }));
        assert_eq!(
            failure(&other.send(spot_order(oid)).await.unwrap_err()).1,
            "ANSWER_LOST"
        );
        assert_eq!(
            order_repeated(other.send(spot_order(oid)).await),
            "maybe_sent"
        );
    }
    assert_eq!(orders_received(&lab), 3);
    lab.stop().await;
}

#[tokio::test]
async fn clientoid_is_free_again_if_the_order_was_rejected_or_not_sent() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let body = json!({"code": "200004", "msg": "Balance insufficient"});
    lab.kucoin.fault(Fault::once(
        ORDERS,
        FaultAction::Answer {
            status: 200,
            body,
            when: When::BeforeProcessing,
        },
    ));
    let rejected = bot.send(spot_order("again")).await.unwrap();
    assert_eq!(rejected.outcome(), Outcome::Rejected);
    lab.admin_cli("anna", &["halt", "main"]).await;
    assert_eq!(
        refusal(bot.send(spot_order("again")).await).1,
        "ACCOUNT_FROZEN"
    );
    lab.admin_cli("anna", &["resume", "main", "--yes"]).await;
    assert_eq!(
        bot.send(spot_order("again")).await.unwrap().outcome(),
        Outcome::Accepted
    );
    assert_eq!(
        order_repeated(bot.send(spot_order("again")).await),
        "accepted"
    );
    lab.stop().await;
}

#[tokio::test]
async fn batch_is_claimed_whole_or_refused_with_the_item() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(spot_order("known")).await.unwrap();
    let (reason, state, message) = repeated(bot.send(batch(&["a", "b", "known"])).await);
    assert_eq!(
        (reason.as_str(), state.as_str()),
        ("CLIENT_OID_REUSED", "accepted")
    );
    assert!(
        message.starts_with("clientOid known (order 3 of the batch) was used"),
        "{message}"
    );
    let twice = refusal(bot.send(batch(&["a", "b", "a"])).await);
    assert_eq!(twice.1, "REQUEST_MALFORMED");
    assert_eq!(orders_received(&lab), 1);
    // Nothing was claimed by the refused ones.
    bot.send(batch(&["a", "b"])).await.unwrap();
    assert_eq!(
        order_repeated(bot.send(batch(&["a", "b"])).await),
        "accepted"
    );
    assert_eq!(
        repeated(bot.send(spot_order("b")).await).0,
        "CLIENT_OID_REUSED"
    );
    lab.stop().await;
}

#[tokio::test]
async fn repeated_order_is_refused_as_such_whatever_else_would_refuse_it() {
    let mut lab = Lab::with(Settings {
        process: true,
        config: "[limits]\ncalls_in_flight_per_bot = 2\ndrain_timeout_ms = 600000\ndefault_deadline_ms = 600000".to_owned(),
        ..Settings::default()
    })
    .await;
    lab.until_keys_tested().await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(spot_order("first")).await.unwrap();

    lab.admin_cli("anna", &["halt", "--all"]).await;
    assert_eq!(
        refusal(bot.send(spot_order("new")).await).1,
        "ACCOUNT_FROZEN"
    );
    assert_eq!(
        order_repeated(bot.send(spot_order("first")).await),
        "accepted"
    );
    lab.admin_cli("anna", &["resume", "--all", "--yes"]).await;

    // All slots are used, and an order is in flight while the broker stops.
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once(
            ORDERS,
            FaultAction::Stall {
                when: When::AfterProcessing,
            },
        )
    });
    for oid in ["stalls-1", "stalls-2"] {
        let mut bot = bot.clone();
        tokio::spawn(async move { bot.send(spot_order(oid)).await });
    }
    until("the orders are sent", async || orders_received(&lab) == 3).await;
    assert_eq!(refusal(bot.send(spot_order("new")).await).1, "OVERLOADED");
    assert_eq!(
        order_repeated(bot.send(spot_order("first")).await),
        "accepted"
    );
    assert_eq!(
        order_repeated(bot.send(spot_order("stalls-1")).await),
        "in_flight"
    );
    lab.process().terminate();
    until("the broker stops", async || {
        lab.get("/readyz").await.1.contains("shutting down")
    })
    .await;
    assert_eq!(
        order_repeated(bot.send(spot_order("first")).await),
        "accepted"
    );
    assert_eq!(orders_received(&lab), 3);
}

#[tokio::test]
async fn known_clientoid_is_refused_as_such_while_the_exchange_clock_is_two_days_ahead() {
    const TWO_DAYS_MS: i64 = 2 * 24 * 3_600_000;
    let (mut lab, time) = (Lab::install(Settings::default()).await, Time::new(0));
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    lab.until_keys_tested().await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(spot_order("known")).await.unwrap();
    let state = async |bot: &mut Bot<Patient>, client_oid: &str| {
        let question = GetOutcomeRequest {
            account: "main".to_owned(),
            scope: Scope::SpotMargin.into(),
            client_oid: client_oid.to_owned(),
            ..GetOutcomeRequest::default()
        };
        let answer = bot.client.get_outcome(question).await.unwrap();
        answer.into_inner().state()
    };
    assert_eq!(state(&mut bot, "new").await, CallState::NotPlaced);
    time.jump(&lab, TWO_DAYS_MS);
    // Rejected for its timestamp, which makes the broker measure the time.
    bot.send(spot_order("jump")).await.unwrap();
    assert_eq!(
        refusal(bot.send(spot_order("new")).await).1,
        "CLOCK_UNCERTAIN"
    );
    assert_eq!(
        order_repeated(bot.send(spot_order("known")).await),
        "accepted"
    );
    assert_eq!(state(&mut bot, "known").await, CallState::Accepted);
    assert_eq!(state(&mut bot, "new").await, CallState::Unknown);
    lab.stop().await;
}

#[tokio::test]
async fn order_without_client_oid_is_refused_unless_its_grant_says_optional() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let order = json!({"side": "buy", "symbol": "BTC-USDT", "type": "limit", "price": "10000", "size": "0.001"});
    let single = || {
        let mut request = spot_order("x");
        request.body = order.to_string().into();
        request
    };
    let mut two = batch(&["a", "b"]);
    let mut orders: Value = serde_json::from_slice(&two.body).unwrap();
    orders["orderList"][1] = order.clone();
    two.body = orders.to_string().into();
    for (request, part) in [(single(), ""), (two.clone(), " in order 2 of the batch")] {
        let status = bot.send(request).await.unwrap_err();
        assert_eq!(failure(&status).1, "REQUEST_MALFORMED");
        let problem = format!(
            "expected a clientOid{part}, new for each order; add \"clientOid\": \"<up to 40 characters of A-Z a-z 0-9 _ ->\""
        );
        let details = status.get_details_bad_request().unwrap();
        let [violation] = &details.field_violations[..] else {
            panic!("{details:?}")
        };
        assert_eq!(
            (violation.field.as_str(), &violation.description),
            ("body", &problem)
        );
        assert_eq!(
            status.message(),
            format!("malformed request: body: {problem}")
        );
    }
    assert_eq!(orders_received(&lab), 0);
    // The other orders of the batch were not claimed, and an order test places nothing.
    bot.send(spot_order("a")).await.unwrap();
    let mut test = single();
    test.path = "/api/v1/hf/orders/test".to_owned();
    bot.send(test).await.unwrap();
    lab.stop().await;

    let optional = "scope = \"spot-margin\"\nclient_oid = \"optional\"\n";
    let mut lab = Lab::with(Settings {
        rules: RULES.replace("scope = \"spot-margin\"\n", optional),
        ..Settings::default()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    for request in [single(), single(), two] {
        assert_eq!(
            bot.send(request).await.unwrap().outcome(),
            Outcome::Accepted
        );
    }
    assert_eq!(orders_received(&lab), 3);
    lab.stop().await;
}

#[tokio::test]
async fn bot_without_a_grant_learns_nothing_about_the_orders_of_others() {
    let grant = "\n[[grant]]\nbot = \"spiffe://demo.test/bot/reader\"\naccount = \"other\"\n\
                 scope = \"spot-margin\"\nallow = [\"trade\"]\n";
    let rules = format!("{RULES}{grant}");
    let mut lab = Lab::with(Settings {
        rules,
        ..Settings::default()
    })
    .await;
    let mut maker = lab.patient_bot("maker").await;
    maker.send(spot_order("secret")).await.unwrap();
    let mut reader = lab.patient_bot("reader").await;
    assert_eq!(
        refusal(reader.send(spot_order("secret")).await).1,
        "POLICY_DENIED"
    );
    lab.stop().await;
}

#[tokio::test]
async fn claims_survive_kills_and_rotations_of_the_audit_log() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    lab.until_keys_tested().await;
    let mut bot = lab.patient_bot("maker").await;
    let log = lab.path("state/audit.jsonl");
    for (index, oid) in ["compressed", "rotated", "current"].into_iter().enumerate() {
        bot.send(spot_order(oid)).await.unwrap();
        let body = json!({"code": "200004", "msg": "Balance insufficient"});
        lab.kucoin.fault(Fault::once(
            ORDERS,
            FaultAction::Answer {
                status: 200,
                body,
                when: When::BeforeProcessing,
            },
        ));
        bot.send(spot_order(&format!("rejected-{index}")))
            .await
            .unwrap();
        let rotated = match index {
            0 => "state/audit.jsonl.2",
            1 => "state/audit.jsonl.1",
            _ => continue,
        };
        std::fs::rename(&log, lab.path(rotated)).unwrap();
        until("the broker uses a new file", async || log.exists()).await;
    }
    let old = lab.path("state/audit.jsonl.2");
    let mut compressed = GzEncoder::new(Vec::new(), Compression::default());
    compressed.write_all(&std::fs::read(&old).unwrap()).unwrap();
    std::fs::write(
        lab.path("state/audit.jsonl.2.gz"),
        compressed.finish().unwrap(),
    )
    .unwrap();
    std::fs::remove_file(old).unwrap();
    lab.kucoin.fault(Fault::once(
        ORDERS,
        FaultAction::Stall {
            when: When::AfterProcessing,
        },
    ));
    let sent = orders_received(&lab);
    let mut other = bot.clone();
    let mut stalls = spot_order("stalls");
    stalls.request_id = "stalls".to_owned();
    tokio::spawn(async move { other.send(stalls).await });
    until("the order is sent", async || orders_received(&lab) > sent).await;
    lab.process().signal("KILL");
    lab.process().exit_code().await;

    lab.spawn_broker().await;
    lab.until_ready().await;
    let mut bot = lab.patient_bot("maker").await;
    // The exchange would recognize these clientOids, too.
    let sent = orders_received(&lab);
    for oid in ["compressed", "rotated", "current"] {
        assert_eq!(
            order_repeated(bot.send(spot_order(oid)).await),
            "accepted",
            "{oid}"
        );
    }
    let mut changed = spot_order("rotated");
    changed.body = String::from_utf8(changed.body.to_vec())
        .unwrap()
        .replace("10000", "10001")
        .into();
    assert_eq!(repeated(bot.send(changed).await).0, "CLIENT_OID_REUSED");
    // The call without a result has one now, and its order was looked up.
    until("the order is resolved", async || {
        lab.audit_of("stalls").len() > 2
    })
    .await;
    assert_eq!(
        order_repeated(bot.send(spot_order("stalls")).await),
        "accepted"
    );
    assert_eq!(orders_received(&lab), sent);
    for index in 0..3 {
        bot.send(spot_order(&format!("rejected-{index}")))
            .await
            .unwrap();
    }
    let outcomes: Vec<_> = lab
        .audit_of("stalls")
        .iter()
        .map(|line| (line["event"].clone(), line["outcome"].clone()))
        .collect();
    assert_eq!(
        outcomes,
        [
            (json!("intent"), Value::Null),
            (json!("outcome"), json!("maybe_sent")),
            (json!("resolved"), Value::Null)
        ]
    );
    assert_eq!(lab.audit_of("stalls")[2]["state"], "placed");
    lab.process()
        .log_line_with("an earlier run ended before it had the results")
        .await;
    assert_eq!(lab.metric("requests_unresolved_total").await, Some(1.0));
    // The harness does not read compressed files.
    lab.is_audit_checked = false;
    let oids: std::collections::BTreeSet<_> = lab
        .kucoin
        .orders(MAIN_UID)
        .iter()
        .map(|order| order.client_oid.clone())
        .collect();
    assert_eq!(oids.len(), lab.kucoin.orders(MAIN_UID).len());
}

#[tokio::test]
async fn missing_audit_lines_are_noticed_and_only_an_admin_opens_the_gap() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    lab.until_keys_tested().await;
    lab.process().terminate();
    lab.process().exit_code().await;
    // As if the broker had run for a day, and the log of the first hours was lost.
    std::fs::write(lab.path("state/orders.json"), "{\"since_ms\": 1000}\n").unwrap();
    lab.is_audit_checked = false;
    lab.spawn_broker().await;
    until("the gap is reported", async || {
        lab.get("/readyz").await.1.contains("orders accept-gap")
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    let refused = bot.send(spot_order("gap")).await.unwrap_err();
    assert_eq!(failure(&refused).1, "AUDIT_UNAVAILABLE");
    assert!(
        refused.message().contains("orders accept-gap"),
        "{refused:?}"
    );
    bot.send(crate::harness::spot_cancel_all()).await.unwrap();
    let accepted = lab.admin_cli("anna", &["orders", "accept-gap"]).await;
    assert_eq!(accepted.code, Some(0), "{accepted:?}");
    assert!(accepted.stdout.starts_with("accepted: "), "{accepted:?}");
    bot.send(spot_order("gap")).await.unwrap();
    let again = lab.admin_cli("anna", &["orders", "accept-gap"]).await;
    assert!(again.stdout.starts_with("unchanged: "), "{again:?}");
    let acts = lab.acts();
    let acts: Vec<_> = acts
        .iter()
        .filter(|act| act["action"] == "gap-accept")
        .collect();
    assert_eq!(acts.len(), 2);
    lab.process().terminate();
    lab.process().exit_code().await;
    lab.spawn_broker().await;
    lab.until_ready().await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(
        order_repeated(bot.send(spot_order("gap")).await),
        "accepted"
    );
}
