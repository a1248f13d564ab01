//! No order leaves late: `not_after_ms`, hang-ups, and a broker that stood still.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use credbroker::clock::Clock;
use credbroker::proto::{Outcome, SignAndSendRequest, SignAndSendResponse};
use credbroker_sim::installation::Settings;
use credbroker_sim::kucoin::{Fault, FaultAction, KucoinSettings, Limits};
use credbroker_sim::pki::Ca;
use credbroker_sim::proxy::Proxy;
use futures_util::future::join_all;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::delivery::tls_of;
use crate::harness::{
    Bot, Lab, Patient, accounts, failure, patient, spot_cancel_all, spot_order, until,
};
use crate::raw_bot::{DATA, END_STREAM, GOAWAY, HEADERS, PING, RawBot, message};

const ORDERS: &str = "/api/v1/hf/orders";

/// This machine's time, which is also the time of the simulated exchange.
fn now_ms() -> i64 {
    Clock::system().wall_ms()
}

/// The request with a request id, which is also the clientOid of an order, and with `not_after_ms`.
fn with(mut request: SignAndSendRequest, id: &str, not_after_ms: i64) -> SignAndSendRequest {
    id.clone_into(&mut request.request_id);
    request.not_after_ms = not_after_ms;
    request
}

fn order(id: &str, not_after_ms: i64) -> SignAndSendRequest {
    with(spot_order(id), id, not_after_ms)
}

/// The `broker_time_ms` of an error.
fn broker_time_ms(status: &Status) -> Option<i64> {
    let info = status.get_details_error_info().unwrap();
    Some(info.metadata.get("broker_time_ms")?.parse().unwrap())
}

/// Checks that a call was refused because its `not_after_ms` had passed.
fn assert_passed(result: Result<SignAndSendResponse, Status>) {
    let status = result.expect_err("this call must be refused");
    let (code, reason, outcome, _) = failure(&status);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (Code::DeadlineExceeded, "DEADLINE_EXCEEDED", "not_sent")
    );
    let text = status.message();
    assert!(
        text.contains("not_after_ms")
            && text.contains("has passed")
            && text.ends_with("broker_time_ms"),
        "{text}"
    );
}

/// An installation whose exchange can be reached over TLS through a proxy, on which the handshakes can be held.
async fn lab_behind_tls() -> Lab {
    let ca = Ca::new("CA of a simulated exchange").unwrap();
    Lab::with(Settings {
        kucoin: KucoinSettings {
            tls: Some(tls_of(&ca)),
            limits: Limits::none(),
            ..KucoinSettings::default()
        },
        proxy: true,
        files: vec![("exchange-ca.pem", ca.certificate_pem().to_owned())],
        egress: "warm_connections = 0\nconnect_timeout_ms = 15000\nroots = \"exchange-ca.pem\""
            .to_owned(),
        ..Settings::default()
    })
    .await
}

/// Starts a call, and waits until its intent is audited.
async fn start(
    lab: &Lab,
    bot: &Bot<Patient>,
    request: SignAndSendRequest,
) -> JoinHandle<Result<SignAndSendResponse, Status>> {
    let (mut bot, id) = (bot.clone(), request.request_id.clone());
    let call = tokio::spawn(async move { bot.send(request).await });
    until("the intent is audited", async || {
        lab.audit_of(&id).len() == 1
    })
    .await;
    call
}

/// Waits for the outcome line of a call and returns its outcome.
async fn outcome(lab: &Lab, id: &str) -> String {
    until("the outcome is audited", async || {
        lab.audit_of(id).len() == 2
    })
    .await;
    let line = &lab.audit_of(id)[1];
    assert_eq!(line["event"], "outcome");
    line["outcome"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn order_after_its_not_after_ms_is_refused_before_it_is_audited_as_intent() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    assert_passed(bot.send(order("past", now_ms() - 1000)).await);
    let lines = lab.audit_of("past");
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(lines[0]["event"], "denied");
    assert!(lab.kucoin.received().is_empty());
    let placed = bot.send(order("soon", now_ms() + 50_000)).await.unwrap();
    assert_eq!(placed.outcome(), Outcome::Accepted);
    // Calls that are not risk-increasing always leave.
    for not_after_ms in [1, i64::MAX] {
        for request in [spot_cancel_all(), accounts()] {
            let sent = bot.send(with(request, "", not_after_ms)).await.unwrap();
            assert_eq!(sent.outcome(), Outcome::Accepted);
        }
    }
    lab.stop().await;
}

#[tokio::test]
async fn not_after_ms_that_cannot_be_meant_is_malformed() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let mut assert_malformed = async |request| {
        let status = bot.send(request).await.unwrap_err();
        assert_eq!(failure(&status).1, "REQUEST_MALFORMED");
        let fields = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(fields.len(), 1, "{fields:?}");
        assert_eq!(fields[0].field, "not_after_ms");
    };
    assert_malformed(order("negative", -1)).await;
    assert_malformed(with(spot_cancel_all(), "cancel", -1)).await;
    assert_malformed(order("far", now_ms() + 70_000)).await;
    assert_malformed(order("microseconds", now_ms() * 1000)).await;
    assert_malformed(order("largest", i64::MAX)).await;
    assert!(lab.kucoin.received().is_empty());
    lab.stop().await;
}

/// The bot's clock, and the broker's own, may be wrong: only the exchange's counts.
#[tokio::test]
async fn not_after_ms_is_exchange_time_which_every_reply_has() {
    const AHEAD_MS: i64 = 3_600_000;
    let kucoin = KucoinSettings {
        clock_offset_ms: AHEAD_MS,
        limits: Limits::none(),
        ..KucoinSettings::default()
    };
    let mut lab = Lab::with(Settings {
        kucoin,
        ..Settings::default()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    let before = now_ms() + AHEAD_MS;
    let is_right = |time_ms: i64| (before - 1000..=now_ms() + AHEAD_MS + 1000).contains(&time_ms);
    let read = bot.send(accounts()).await.unwrap();
    assert!(is_right(read.broker_time_ms), "{read:?}");
    let late = bot.send(order("late", now_ms() + 10_000)).await;
    let status = late.clone().unwrap_err();
    assert_passed(late);
    let time_ms = broker_time_ms(&status).unwrap();
    assert!(is_right(time_ms), "{status:?}");
    assert!(status.message().contains("the exchange's time is"));
    let placed = bot.send(order("in-time", time_ms + 10_000)).await.unwrap();
    assert_eq!(placed.outcome(), Outcome::Accepted);
    // The host is unknown: that of the other host, which has the same clock here.
    let unknown = bot.send(SignAndSendRequest::default()).await.unwrap_err();
    assert!(is_right(broker_time_ms(&unknown).unwrap()));
    lab.stop().await;
}

#[tokio::test]
async fn orders_held_up_on_the_way_to_the_broker_are_not_sent_late() {
    let mut lab = Lab::start().await;
    let proxy = Proxy::to(&format!("https://{}", lab.grpc)).await.unwrap();
    let roots = [lab.ca.certificate_pem().to_owned()];
    let identity = lab.ca.bot("maker").unwrap();
    let connection = patient(proxy.address, &roots, &identity).await.unwrap();
    let mut bot = Bot::over(connection);
    let first = bot.send(spot_order("first")).await.unwrap();
    let offset_ms = first.broker_time_ms - now_ms();
    proxy.pause(true);
    let limit = Duration::from_millis(300);
    let not_after_ms = now_ms() + offset_ms + 300;
    let calls = (0..40).map(|number| {
        let (mut bot, order) = (bot.clone(), order(&format!("held-{number}"), not_after_ms));
        tokio::spawn(async move { bot.send_within(order, limit).await })
    });
    let calls: Vec<_> = calls.collect();
    let mut cancels = bot.clone();
    let cancel = with(spot_cancel_all(), "cancel", not_after_ms);
    let cancel = tokio::spawn(async move { cancels.send(cancel).await });
    sleep(Duration::from_secs(2)).await;
    proxy.pause(false);
    for call in calls {
        assert_passed(call.await.unwrap());
    }
    let cancelled = cancel.await.unwrap().unwrap();
    assert_eq!(cancelled.outcome(), Outcome::Accepted);
    assert_eq!(
        lab.kucoin.received().len(),
        2,
        "the first order, and the cancel"
    );
    lab.stop().await;
}

#[tokio::test]
async fn order_whose_connect_takes_beyond_its_not_after_ms_is_not_sent() {
    let mut lab = lab_behind_tls().await;
    let bot = lab.patient_bot("maker").await;
    lab.proxy().hold();
    let not_after_ms = now_ms() + 2000;
    let order = start(&lab, &bot, order("order", not_after_ms)).await;
    let cancel = with(spot_cancel_all(), "cancel", not_after_ms);
    let cancel = start(&lab, &bot, cancel).await;
    until("the time has passed", async || now_ms() > not_after_ms).await;
    lab.proxy().open();
    assert_passed(order.await.unwrap());
    assert_eq!(outcome(&lab, "order").await, "not_sent");
    let cancelled = cancel.await.unwrap().unwrap();
    assert_eq!(cancelled.outcome(), Outcome::Accepted);
    assert_eq!(lab.kucoin.received().len(), 1);
    lab.stop().await;
}

#[tokio::test]
async fn order_that_has_not_left_is_not_sent_after_a_hang_up_and_a_cancel_still_is() {
    for is_closed in [false, true] {
        let mut lab = lab_behind_tls().await;
        let bot = lab.patient_bot("maker").await;
        lab.proxy().hold();
        let order = start(&lab, &bot, order("order", 0)).await;
        let cancel = start(&lab, &bot, with(spot_cancel_all(), "cancel", 0)).await;
        // Resets the streams; without other users of the connection it is closed, too.
        let other = (!is_closed).then(|| bot.clone());
        drop(bot);
        order.abort();
        cancel.abort();
        assert_eq!(outcome(&lab, "order").await, "not_sent");
        let line = &lab.audit_of("order")[1];
        assert_eq!(line["reason"], "DEADLINE_EXCEEDED");
        assert_eq!(
            line["detail"],
            "the caller cancelled the call or disconnected; nothing was sent"
        );
        assert_eq!(lab.audit_of("cancel").len(), 1);
        lab.proxy().open();
        assert_eq!(outcome(&lab, "cancel").await, "accepted");
        assert_eq!(lab.kucoin.received().len(), 1);
        drop(other);
        lab.stop().await;
    }
}

#[tokio::test]
async fn order_that_has_left_has_its_real_outcome_after_a_hang_up_also_after_its_deadline() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    lab.kucoin.fault(Fault::once(ORDERS, FaultAction::Hold {}));
    let request = order("left", 0);
    let call = tokio::spawn(async move {
        let limit = Duration::from_millis(500);
        bot.send_within(request, limit).await
    });
    until("the order has left", async || {
        lab.kucoin.received().len() == 1
    })
    .await;
    call.abort();
    // Beyond the deadline.
    sleep(Duration::from_secs(1)).await;
    assert_eq!(lab.audit_of("left").len(), 1);
    lab.kucoin.clear_faults();
    assert_eq!(outcome(&lab, "left").await, "accepted");
    lab.stop().await;
}

#[tokio::test]
async fn goaway_and_the_end_of_the_stream_are_no_hang_up() {
    let mut lab = lab_behind_tls().await;
    let mut bot = RawBot::open(&lab, &lab.ca.bot("maker").unwrap()).await;
    lab.proxy().hold();
    let stream = bot.head(&[]).await;
    let request = message(&order("order", 0));
    bot.write(DATA, END_STREAM, stream, &request).await;
    until("the intent is audited", async || {
        lab.audit_of("order").len() == 1
    })
    .await;
    bot.write(GOAWAY, 0, 0, &[0; 8]).await;
    // Once it is answered, the broker has read the GOAWAY.
    bot.write(PING, 0, 0, &[7; 8]).await;
    bot.until_frame(PING).await;
    lab.proxy().open();
    bot.until_frame(HEADERS).await;
    bot.until_frame(DATA).await;
    assert_eq!(outcome(&lab, "order").await, "accepted");
    lab.stop().await;
}

/// Orders with a `not_after_ms` of 300 ms, on eight connections, while the broker's process is stopped for 2 s. At most the one
/// that was between check and write may be late. The bound is wide, since this machine may be busy; without the checks, orders
/// are late by 1.7 s.
#[tokio::test]
async fn broker_that_was_stopped_for_two_seconds_sends_at_most_one_order_late() {
    const STOPPED: Duration = Duration::from_secs(2);
    const LATE_MS: i64 = 1000;
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    let limits = Arc::new(Mutex::new(HashMap::new()));
    let (is_over, refused) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let mut bots = Vec::new();
    for connection in 0..8 {
        let bot = lab.patient_bot("maker").await;
        for stream in 0..4 {
            let (mut bot, limits) = (bot.clone(), Arc::clone(&limits));
            let (is_over, refused) = (Arc::clone(&is_over), Arc::clone(&refused));
            bots.push(tokio::spawn(async move {
                for number in 0.. {
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    let (id, not_after_ms) =
                        (format!("{connection}-{stream}-{number}"), now_ms() + 300);
                    limits.lock().unwrap().insert(id.clone(), not_after_ms);
                    match bot.send(order(&id, not_after_ms)).await {
                        Ok(answer) => assert_eq!(answer.outcome(), Outcome::Accepted),
                        Err(status) => {
                            assert_passed(Err(status));
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            }));
        }
    }
    until("orders are placed", async || {
        lab.kucoin.received().len() > 100
    })
    .await;
    lab.process().signal("STOP");
    sleep(STOPPED).await;
    let before = lab.kucoin.received().len();
    lab.process().signal("CONT");
    until("orders are placed again", async || {
        lab.kucoin.received().len() > before + 50
    })
    .await;
    is_over.store(true, Ordering::Relaxed);
    join_all(bots).await.into_iter().for_each(Result::unwrap);
    assert!(refused.load(Ordering::Relaxed) > 0);
    let limits = limits.lock().unwrap();
    let late_ms = lab.kucoin.received().into_iter().filter_map(|received| {
        let body: serde_json::Value = serde_json::from_slice(&received.body).unwrap();
        let late_ms = received.at_ms - limits[body["clientOid"].as_str().unwrap()];
        (late_ms > LATE_MS).then_some(late_ms)
    });
    let late_ms: Vec<_> = late_ms.collect();
    assert!(late_ms.len() <= 1, "{late_ms:?}");
}
