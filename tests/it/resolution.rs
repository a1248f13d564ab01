//! Orders that may have been placed are looked up: found only if the order is the one that was sent, absent only once the
//! exchange rejects it, otherwise unknown.

use std::time::Duration;

use credbroker::proto::resolution::State;
use credbroker::proto::{Item, Method, Outcome, Scope, SignAndSendRequest, SignAndSendResponse};
use credbroker_sim::installation::{MAIN_UID, Settings};
use credbroker_sim::kucoin::{Fault, FaultAction, Matching, When};
use serde_json::{Value, json};
use tonic::Status;
use tonic_types::StatusExt;

use crate::harness::{
    Lab, Time, failure, futures_order, json_of, refusal, request, spot_order, until,
};

const ORDERS: &str = "/api/v1/hf/orders";
const MULTI: &str = "/api/v1/hf/orders/multi";
const LOOKUPS: &str = "/api/v1/hf/orders/client-order/";

/// A spot order whose request id is its clientOid.
fn order(id: &str) -> SignAndSendRequest {
    let mut order = spot_order(id);
    id.clone_into(&mut order.request_id);
    order
}

/// The same, with a bot that waits this long for the resolution.
fn waiting(id: &str, resolve_ms: u32) -> SignAndSendRequest {
    let mut order = order(id);
    order.resolve_ms = resolve_ms;
    order
}

fn batch(oids_and_sizes: &[(&str, &str)]) -> SignAndSendRequest {
    let order = |(oid, size): &(&str, &str)| json!({"clientOid": oid, "side": "buy", "symbol": "BTC-USDT", "type": "limit", "price": "10000", "size": size});
    let orders: Vec<_> = oids_and_sizes.iter().map(order).collect();
    let body = json!({ "orderList": orders }).to_string();
    request(Scope::SpotMargin, Method::Post, MULTI, &body)
}

fn lose_answer(lab: &Lab, path: &str, when: When) {
    lab.kucoin
        .fault(Fault::once(path, FaultAction::Close { when }));
}

fn fail_lookups(lab: &Lab, action: FaultAction) {
    lab.kucoin.fault(Fault {
        matching: Matching::Prefix,
        times: None,
        ..Fault::once(LOOKUPS, action)
    });
}

/// A running broker whose time a test can advance, with tested keys.
async fn lab_with_time(settings: Settings) -> (Lab, Time) {
    let (mut lab, time) = (Lab::install(settings).await, Time::new(0));
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    lab.until_keys_tested().await;
    (lab, time)
}

/// The `resolved` line of a call with one order.
fn resolved(lab: &Lab, id: &str) -> Option<Value> {
    let mut lines = lab.audit_of(id);
    lines.retain(|line| line["event"] == "resolved");
    assert!(lines.len() < 2, "{lines:?}");
    lines.pop()
}

/// Lets time pass, a quarter of a second at a time, until a call with one order is resolved; returns its line.
async fn pass_until_resolved(lab: &Lab, time: &Time, id: &str) -> Value {
    pass_in_steps(lab, time, id, Duration::from_millis(250)).await
}

async fn pass_in_steps(lab: &Lab, time: &Time, id: &str, step: Duration) -> Value {
    for _ in 0..300 {
        if let Some(line) = resolved(lab, id) {
            return line;
        }
        time.pass(lab, step).await;
    }
    panic!("{id} is not resolved: {:?}", lab.audit_of(id));
}

async fn until_resolved(lab: &Lab, id: &str) -> Value {
    until("the order is resolved", async || {
        resolved(lab, id).is_some()
    })
    .await;
    resolved(lab, id).unwrap()
}

/// State and order id of the earlier order, from the refusal of a repeated one.
fn repeated(result: Result<SignAndSendResponse, Status>) -> (String, Option<String>) {
    let status = result.expect_err("this order must be refused");
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.reason, "ORDER_REPEATED", "{status:?}");
    let order_id = info.metadata.get("order_id").cloned();
    (info.metadata["order_outcome"].clone(), order_id)
}

fn state(name: &str) -> (String, Option<String>) {
    (name.to_owned(), None)
}

/// The order ids that the exchange has for a clientOid.
fn ids_at_exchange(lab: &Lab, client_oid: &str) -> Vec<String> {
    let orders = lab.kucoin.orders(MAIN_UID).into_iter();
    orders
        .filter(|order| order.client_oid.as_deref() == Some(client_oid))
        .map(|order| order.id)
        .collect()
}

fn lookups(lab: &Lab) -> usize {
    let received = lab.kucoin.everything_received();
    let is_lookup = |path: &str| path.starts_with(LOOKUPS);
    let lookups = received.iter().filter(|request| is_lookup(request.path()));
    lookups.count()
}

async fn resolved_total(lab: &Lab, state: &str) -> Option<f64> {
    let name = format!("orders_resolved_total{{state=\"{state}\"}}");
    lab.metric(&name).await
}

/// Restarts the broker without its state, as if another one had used the clientOids before.
async fn forget(lab: &mut Lab, time: &Time) {
    lab.stop().await;
    lab.is_audit_checked = false;
    for file in ["audit.jsonl", "orders.json"] {
        std::fs::remove_file(lab.path("state").join(file)).unwrap();
    }
    time.sleep(lab, Duration::from_secs(60));
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    lab.until_keys_tested().await;
}

#[tokio::test]
async fn placed_order_whose_answer_was_lost_is_found_with_its_order_id() {
    let mut lab = Lab::with(Settings {
        egress: "answer_timeout_ms = 300".to_owned(),
        ..Settings::default()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    let when = When::AfterProcessing;
    for (id, action) in [
        ("closed", FaultAction::Close { when }),
        ("stalled", FaultAction::Stall { when }),
        ("cut", FaultAction::CutShort { bytes: 10 }),
        ("gateway", FaultAction::Html { status: 502, when }),
    ] {
        lab.kucoin.fault(Fault::once(ORDERS, action));
        match bot.send(order(id)).await {
            Ok(answer) => assert_eq!(answer.outcome(), Outcome::MaybeSent),
            Err(lost) => assert_eq!(failure(&lost).1, "ANSWER_LOST"),
        }
        let line = until_resolved(&lab, id).await;
        let ids = ids_at_exchange(&lab, id);
        assert_eq!(ids.len(), 1);
        assert_eq!(line["state"], "placed", "{line}");
        assert_eq!(line["order_id"], ids[0]);
        assert_eq!(line["client_oid"], id);
        assert_eq!(line["endpoint"], "spot.post.v1-hf-orders");
        assert_eq!(line["call"], lab.audit_of(id)[0]["call"]);
        let known = ("accepted".to_owned(), Some(ids[0].clone()));
        assert_eq!(repeated(bot.send(order(id)).await), known);
    }
    assert_eq!(resolved_total(&lab, "placed").await, Some(4.0));
    // Futures, too.
    lab.kucoin.fault(Fault::once(
        "/api/v1/orders",
        FaultAction::Close {
            when: When::AfterProcessing,
        },
    ));
    let mut future = futures_order("future");
    future.request_id = "future".to_owned();
    assert_eq!(refusal(bot.send(future).await).1, "ANSWER_LOST");
    assert_eq!(until_resolved(&lab, "future").await["state"], "placed");
    lab.stop().await;
}

#[tokio::test]
async fn lost_order_is_absent_once_the_exchange_rejects_it_and_can_be_placed_then() {
    let (mut lab, time) = lab_with_time(Settings::default()).await;
    let mut bot = lab.patient_bot("maker").await;
    lose_answer(&lab, ORDERS, When::BeforeProcessing);
    let sent = time.passed();
    assert_eq!(refusal(bot.send(order("lost")).await).1, "ANSWER_LOST");
    // Lookups do not find it from the start, but it could still be placed.
    while time.passed().saturating_sub(sent) < Duration::from_secs(5) {
        time.pass(&lab, Duration::from_millis(500)).await;
        assert_eq!(repeated(bot.send(order("lost")).await), state("maybe_sent"));
    }
    assert!(lookups(&lab) >= 2);
    let line = pass_until_resolved(&lab, &time, "lost").await;
    assert_eq!(line["state"], "absent", "{line}");
    let intent = &lab.audit_of("lost")[0];
    let after_ms = line["time_ms"].as_i64().unwrap() - intent["time_ms"].as_i64().unwrap();
    // 7 s, and another lookup 1 s later; the intent is a little older than the signature.
    assert!((8000..20_000).contains(&after_ms), "{after_ms}");
    assert_eq!(resolved_total(&lab, "absent").await, Some(1.0));
    let placed = bot.send(order("lost")).await.unwrap();
    assert_eq!(placed.outcome(), Outcome::Accepted);
    assert_eq!(ids_at_exchange(&lab, "lost").len(), 1);
    let id = json_of(&placed)["data"]["orderId"]
        .as_str()
        .map(str::to_owned);
    let known = ("accepted".to_owned(), id);
    assert_eq!(repeated(bot.send(order("lost")).await), known);
    lab.stop().await;
}

#[tokio::test]
async fn order_that_lookups_show_only_after_three_seconds_is_found() {
    let (mut lab, time) = lab_with_time(Settings::default()).await;
    let mut bot = lab.patient_bot("maker").await;
    lab.kucoin.set_lookup_lag(Duration::from_secs(3));
    lose_answer(&lab, ORDERS, When::AfterProcessing);
    assert_eq!(refusal(bot.send(order("late")).await).1, "ANSWER_LOST");
    let line = pass_until_resolved(&lab, &time, "late").await;
    assert_eq!(line["state"], "placed", "{line}");
    assert!(lookups(&lab) >= 2, "the first ones did not find it");
    // Even if they show it right before the order could be absent.
    lab.kucoin.set_lookup_lag(Duration::from_millis(7900));
    lose_answer(&lab, ORDERS, When::AfterProcessing);
    assert_eq!(refusal(bot.send(order("later")).await).1, "ANSWER_LOST");
    let line = pass_until_resolved(&lab, &time, "later").await;
    assert_eq!(line["state"], "placed", "{line}");
    lab.stop().await;
}

#[tokio::test]
async fn older_or_different_order_with_the_clientoid_is_not_the_one_that_was_sent() {
    let (mut lab, time) = lab_with_time(Settings::default()).await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(order("used")).await.unwrap();
    forget(&mut lab, &time).await;
    let mut bot = lab.patient_bot("maker").await;
    lose_answer(&lab, ORDERS, When::BeforeProcessing);
    assert_eq!(refusal(bot.send(order("used")).await).1, "ANSWER_LOST");
    let line = pass_until_resolved(&lab, &time, "used").await;
    assert_eq!(line["state"], "unknown", "{line}");
    let detail = line["detail"].as_str().unwrap();
    assert!(detail.ends_with("the order is older"), "{detail}");
    assert_eq!(line.get("order_id"), None);
    assert_eq!(repeated(bot.send(order("used")).await), state("unknown"));
    assert_eq!(resolved_total(&lab, "unknown").await, Some(1.0));
    lab.stop().await;
}

#[tokio::test]
async fn order_is_unknown_after_ten_minutes_if_lookups_fail_and_keeps_its_claim() {
    let (mut lab, time) = lab_with_time(Settings::default()).await;
    let mut bot = lab.patient_bot("maker").await;
    let when = When::BeforeProcessing;
    let (status, body) = (
        200,
        json!({"code": "400100", "msg": "Parameter error: symbol"}),
    );
    for (id, action) in [
        ("gateway", FaultAction::Html { status: 502, when }),
        ("limited", FaultAction::RateLimited { reset_ms: None }),
        ("other", FaultAction::Answer { status, body, when }),
    ] {
        lose_answer(&lab, ORDERS, when);
        fail_lookups(&lab, action);
        assert_eq!(refusal(bot.send(order(id)).await).1, "ANSWER_LOST");
        let before = lookups(&lab);
        let line = pass_in_steps(&lab, &time, id, Duration::from_millis(2500)).await;
        assert_eq!(line["state"], "unknown", "{line}");
        let asked = lookups(&lab) - before;
        assert!((40..=70).contains(&asked), "{asked} lookups");
        lab.kucoin.clear_faults();
        time.pass(&lab, Duration::from_secs(10)).await;
        assert_eq!(repeated(bot.send(order(id)).await), state("unknown"));
        assert!(ids_at_exchange(&lab, id).is_empty());
    }
    lab.stop().await;
}

#[tokio::test]
async fn clientoid_that_the_exchange_knows_is_repeated_and_not_rejected() {
    let (mut lab, time) = lab_with_time(Settings::default()).await;
    let mut bot = lab.patient_bot("maker").await;
    for id in ["same", "other", "hidden", "in-batch"] {
        bot.send(order(id)).await.unwrap();
    }
    forget(&mut lab, &time).await;
    let mut bot = lab.patient_bot("maker").await;
    let id = ids_at_exchange(&lab, "same").pop();
    let known = ("accepted".to_owned(), id);
    assert_eq!(repeated(bot.send(order("same")).await), known);
    let lines = lab.audit_of("same");
    assert_eq!(lines[1]["event"], "outcome");
    assert_eq!(
        (&lines[1]["outcome"], &lines[1]["reason"]),
        (&Value::Null, &json!("ORDER_REPEATED"))
    );
    // The claim stays, and answers without the exchange.
    let sent = lab.kucoin.received().len();
    assert_eq!(repeated(bot.send(order("same")).await), known);
    assert_eq!(lab.kucoin.received().len(), sent);
    // Another order has the clientOid.
    let mut other = order("other");
    let body = String::from_utf8(other.body.to_vec()).unwrap();
    other.body = body.replace("0.001", "0.002").into();
    assert_eq!(repeated(bot.send(other.clone()).await), state("unknown"));
    assert_eq!(repeated(bot.send(other).await), state("unknown"));
    // A lookup does not find it.
    fail_lookups(
        &lab,
        FaultAction::Html {
            status: 502,
            when: When::BeforeProcessing,
        },
    );
    assert_eq!(repeated(bot.send(order("hidden")).await), state("unknown"));
    lab.kucoin.clear_faults();
    // In a batch, it is looked up like an order whose result is missing; an older order is not the one that was sent.
    let mut orders = batch(&[("new", "0.001"), ("in-batch", "0.001")]);
    orders.request_id = "batch".to_owned();
    let answer = bot.send(orders).await.unwrap();
    let outcomes: Vec<_> = answer.items.iter().map(Item::outcome).collect();
    assert_eq!(outcomes, [Outcome::Accepted, Outcome::MaybeSent]);
    let line = until_resolved(&lab, "batch").await;
    assert_eq!(
        (&line["client_oid"], &line["state"]),
        (&json!("in-batch"), &json!("unknown"))
    );
    assert_eq!(ids_at_exchange(&lab, "in-batch").len(), 1);
    lab.stop().await;
}

#[tokio::test]
async fn each_order_of_a_batch_is_settled_by_its_own_result() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let too_large = "100000000";
    let mixed = batch(&[("placed", "0.001"), ("refused", too_large)]);
    assert_eq!(bot.send(mixed).await.unwrap().outcome(), Outcome::Accepted);
    let used = bot.send(order("placed")).await.unwrap_err();
    let info = used.get_details_error_info().unwrap();
    assert_eq!(info.reason, "CLIENT_OID_REUSED");
    assert_eq!(
        info.metadata.get("order_id"),
        ids_at_exchange(&lab, "placed").first()
    );
    let free = bot.send(order("refused")).await.unwrap();
    assert_eq!(free.outcome(), Outcome::Accepted);
    // The same after a restart.
    let mixed = batch(&[("placed-2", "0.001"), ("refused-2", too_large)]);
    bot.send(mixed).await.unwrap();
    lab.stop().await;
    lab.start_broker().await;
    lab.until_ready().await;
    let mut bot = lab.patient_bot("maker").await;
    let used = bot.send(order("placed-2")).await.unwrap_err();
    let info = used.get_details_error_info().unwrap();
    assert_eq!(info.reason, "CLIENT_OID_REUSED");
    assert_eq!(info.metadata["order_outcome"], "accepted");
    let free = bot.send(order("refused-2")).await.unwrap();
    assert_eq!(free.outcome(), Outcome::Accepted);
    lab.stop().await;
}

#[tokio::test]
async fn resolutions_survive_a_restart_and_a_stop_leaves_the_others_to_the_next_start() {
    let (mut lab, time) = lab_with_time(Settings::default()).await;
    let mut bot = lab.patient_bot("maker").await;
    for (id, when) in [
        ("placed", When::AfterProcessing),
        ("absent", When::BeforeProcessing),
    ] {
        lose_answer(&lab, ORDERS, when);
        assert_eq!(refusal(bot.send(order(id)).await).1, "ANSWER_LOST");
        pass_until_resolved(&lab, &time, id).await;
    }
    lose_answer(&lab, ORDERS, When::BeforeProcessing);
    fail_lookups(
        &lab,
        FaultAction::Stall {
            when: When::BeforeProcessing,
        },
    );
    assert_eq!(refusal(bot.send(order("open")).await).1, "ANSWER_LOST");
    let known = lookups(&lab);
    time.pass(&lab, Duration::from_secs(1)).await;
    assert!(lookups(&lab) > known, "a lookup hangs");
    let begun = time.passed();
    lab.stop().await;
    let stopped = time.passed().saturating_sub(begun);
    assert!(stopped < Duration::from_secs(3), "{stopped:?}");
    lab.kucoin.clear_faults();
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(repeated(bot.send(order("placed")).await), state("accepted"));
    assert_eq!(repeated(bot.send(order("open")).await), state("maybe_sent"));
    let free = bot.send(order("absent")).await.unwrap();
    assert_eq!(free.outcome(), Outcome::Accepted);
    let line = pass_until_resolved(&lab, &time, "open").await;
    assert_eq!(line["state"], "absent");
    assert_eq!(line["run"], lab.audit_of("open")[0]["run"]);
    assert_ne!(line["by_run"], line["run"]);
    let free = bot.send(order("open")).await.unwrap();
    assert_eq!(free.outcome(), Outcome::Accepted);
    lab.stop().await;
}

#[tokio::test]
async fn admin_settles_an_order_that_was_not_placed_and_its_clientoid_is_free_also_after_a_restart()
{
    let (mut lab, time) = lab_with_time(Settings::default()).await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(order("accepted")).await.unwrap();
    let when = When::BeforeProcessing;
    fail_lookups(&lab, FaultAction::Html { status: 502, when });
    for id in ["unknown", "free"] {
        lose_answer(&lab, ORDERS, when);
        assert_eq!(refusal(bot.send(order(id)).await).1, "ANSWER_LOST");
        pass_in_steps(&lab, &time, id, Duration::from_millis(2500)).await;
    }
    lose_answer(&lab, ORDERS, when);
    assert_eq!(refusal(bot.send(order("open")).await).1, "ANSWER_LOST");
    let settle = async |lab: &Lab, id: &str| {
        let command = ["orders", "settle", "main", id, "--absent"];
        lab.admin_cli("anna", &command).await
    };
    for id in ["unknown", "free"] {
        let settled = settle(&lab, id).await;
        assert_eq!(settled.code, Some(0), "{settled:?}");
        let text =
            format!("settled: clientOid {id} is free: the broker sends a new order with it.\n");
        assert_eq!(settled.stdout, text);
    }
    let answer = bot.send(order("unknown")).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted);
    for (id, why) in [
        ("accepted", "the exchange accepted it"),
        ("unknown", "the exchange accepted it"),
        ("open", "looks it up"),
        ("free", "has sent no order"),
        ("never-sent", "has sent no order"),
    ] {
        let refused = settle(&lab, id).await;
        assert_eq!(refused.code, Some(1), "{refused:?}");
        let text = refused.stderr_line();
        assert!(text.contains(why), "{text}");
    }
    let acts = lab.acts();
    let mut acts = acts.iter().filter(|act| act["action"] == "settle-order");
    let act = acts.next().unwrap();
    assert_eq!(
        (&act["account"], &act["scope"], &act["client_oid"]),
        (&json!("main"), &json!("spot-margin"), &json!("unknown"))
    );
    assert_eq!(acts.count(), 1);
    lab.stop().await;
    lab.kucoin.clear_faults();
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(
        repeated(bot.send(order("unknown")).await),
        state("accepted")
    );
    let answer = bot.send(order("free")).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted);
    lab.stop().await;
}

fn resolution(answer: &SignAndSendResponse) -> (State, &str) {
    let resolution = answer.resolution.as_ref().unwrap();
    (resolution.state(), &resolution.order_id)
}

#[tokio::test]
async fn bot_that_waits_for_the_resolution_gets_it_as_the_outcome() {
    let (mut lab, time) = lab_with_time(Settings {
        config: "[limits]\ndefault_deadline_ms = 60000".to_owned(),
        ..Settings::default()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;

    // Not needed.
    let answer = bot.send(waiting("answered", 30_000)).await.unwrap();
    assert_eq!((answer.http_status, answer.resolution), (200, None));

    lose_answer(&lab, ORDERS, When::AfterProcessing);
    let placed = bot.send(waiting("placed", 30_000)).await.unwrap();
    let id = ids_at_exchange(&lab, "placed").pop().unwrap();
    assert_eq!(resolution(&placed), (State::Placed, id.as_str()));
    assert_eq!(
        (placed.http_status, placed.outcome()),
        (0, Outcome::Accepted)
    );
    assert!(placed.timestamp_ms > 0 && placed.body.is_empty());

    lab.kucoin.fault(Fault::once(
        ORDERS,
        FaultAction::Html {
            status: 502,
            when: When::AfterProcessing,
        },
    ));
    let unclear = bot.send(waiting("unclear", 30_000)).await.unwrap();
    assert_eq!(resolution(&unclear).0, State::Placed);
    assert_eq!(
        (unclear.http_status, unclear.outcome()),
        (502, Outcome::Accepted)
    );

    lose_answer(&lab, ORDERS, When::BeforeProcessing);
    let call = tokio::spawn({
        let mut bot = bot.clone();
        async move { bot.send(waiting("absent", 30_000)).await }
    });
    until("the answer is lost", async || {
        lab.audit_of("absent").len() == 2
    })
    .await;
    pass_until_resolved(&lab, &time, "absent").await;
    let absent = call.await.unwrap().unwrap();
    assert_eq!(resolution(&absent), (State::Absent, ""));
    assert_eq!(
        (absent.http_status, absent.outcome()),
        (0, Outcome::Rejected)
    );
    assert!(
        absent.advice.contains("clientOid is free"),
        "{}",
        absent.advice
    );
    let again = bot.send(waiting("absent", 30_000)).await.unwrap();
    assert_eq!(again.outcome(), Outcome::Accepted);

    lose_answer(&lab, MULTI, When::AfterProcessing);
    let mut orders = batch(&[("b-1", "0.001"), ("b-2", "0.001")]);
    orders.resolve_ms = 30_000;
    let batch = bot.send(orders).await.unwrap();
    assert_eq!(resolution(&batch), (State::Placed, ""));
    let items: Vec<_> = batch
        .items
        .iter()
        .map(|item| (item.client_oid.as_str(), item.outcome(), &item.order_id))
        .collect();
    let ids = ["b-1", "b-2"].map(|oid| ids_at_exchange(&lab, oid).pop().unwrap());
    assert_eq!(
        items,
        [
            ("b-1", Outcome::Accepted, &ids[0]),
            ("b-2", Outcome::Accepted, &ids[1])
        ]
    );
    lab.stop().await;
}

#[tokio::test]
async fn batch_with_an_accepted_and_an_absent_order_is_placed() {
    let (mut lab, time) = lab_with_time(Settings {
        config: "[limits]\ndefault_deadline_ms = 60000".to_owned(),
        ..Settings::default()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    let body = json!({"code": "200000", "data": [
        {"orderId": "6717422bd51c29000775ea03", "clientOid": "listed", "success": true},
    ]});
    lab.kucoin.fault(Fault::once(
        MULTI,
        FaultAction::Answer {
            status: 200,
            body,
            when: When::BeforeProcessing,
        },
    ));
    let mut orders = batch(&[("listed", "0.001"), ("missing", "0.001")]);
    (orders.request_id, orders.resolve_ms) = ("half".to_owned(), 30_000);
    let call = tokio::spawn(async move { bot.send(orders).await });
    until("the answer is there", async || {
        lab.audit_of("half").len() == 2
    })
    .await;
    assert_eq!(
        pass_until_resolved(&lab, &time, "half").await["state"],
        "absent"
    );
    let answer = call.await.unwrap().unwrap();
    assert_eq!(resolution(&answer).0, State::Placed);
    assert_eq!(answer.outcome(), Outcome::Accepted);
    let outcomes: Vec<_> = answer.items.iter().map(Item::outcome).collect();
    assert_eq!(outcomes, [Outcome::Accepted, Outcome::Rejected]);
    lab.stop().await;
}

#[tokio::test]
async fn amendment_whose_answer_was_lost_is_looked_up() {
    const ALTER: &str = "/api/v1/hf/orders/alter";
    let (mut lab, time) = lab_with_time(Settings {
        config: "[limits]\ndefault_deadline_ms = 60000".to_owned(),
        ..Settings::default()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(order("amended")).await.unwrap();
    let body = r#"{"symbol":"BTC-USDT","clientOid":"amended","newPrice":"9000"}"#;
    let mut alter = request(Scope::SpotMargin, Method::Post, ALTER, body);
    alter.resolve_ms = 30_000;
    lose_answer(&lab, ALTER, When::AfterProcessing);
    let answer = bot.send(alter.clone()).await.unwrap();
    let id = ids_at_exchange(&lab, "amended").pop().unwrap();
    assert_eq!(resolution(&answer), (State::Placed, id.as_str()));
    // Not processed: the order stays as it was, and it stays unknown whether that is the end of it.
    alter.body = body.replace("9000", "9001").into();
    alter.request_id = "lost".to_owned();
    lose_answer(&lab, ALTER, When::BeforeProcessing);
    let call = tokio::spawn({
        let mut bot = bot.clone();
        async move { bot.send(alter).await }
    });
    until("the answer is lost", async || {
        lab.audit_of("lost").len() == 2
    })
    .await;
    pass_until_resolved(&lab, &time, "lost").await;
    let answer = call.await.unwrap().unwrap();
    assert_eq!(resolution(&answer), (State::Unknown, ""));
    assert_eq!(answer.outcome(), Outcome::MaybeSent);
    lab.stop().await;
}

#[tokio::test]
async fn wait_for_the_resolution_ends_with_resolve_ms_deadline_or_stop() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    lose_answer(&lab, ORDERS, When::BeforeProcessing);
    let lost = bot.send(waiting("short", 1)).await;
    assert_eq!(refusal(lost).1, "ANSWER_LOST");
    lose_answer(&lab, ORDERS, When::BeforeProcessing);
    let within = Duration::from_secs(1);
    let lost = bot.send_within(waiting("deadline", 30_000), within).await;
    assert_eq!(refusal(lost).1, "ANSWER_LOST");
    let malformed = bot.send(waiting("long", 30_001)).await;
    assert_eq!(refusal(malformed).1, "REQUEST_MALFORMED");
    // An order that was sent before must not get `not_sent` for that.
    let known = bot.send(waiting("short", 30_001)).await;
    assert_eq!(repeated(known).0, "maybe_sent");
    lose_answer(&lab, ORDERS, When::BeforeProcessing);
    let call = tokio::spawn({
        let mut bot = bot.clone();
        async move { bot.send(waiting("stop", 30_000)).await }
    });
    until("the answer is lost", async || {
        lab.audit_of("stop").len() == 2
    })
    .await;
    lab.stop().await;
    assert_eq!(refusal(call.await.unwrap()).1, "ANSWER_LOST");
    assert_eq!(resolved(&lab, "stop"), None);
}
