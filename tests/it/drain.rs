//! What the broker serves between SIGTERM and its exit, and when it exits.

use std::time::{Duration, Instant};

use credbroker::proto::{Method, Scope, SignAndSendRequest, SignAndSendResponse};
use credbroker_sim::installation::{MAIN_UID, Settings};
use credbroker_sim::kucoin::{Fault, FaultAction, OrderState, When};
use tokio::task::JoinHandle;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;

use crate::harness::{
    Bot, Lab, Patient, accounts, failure, json_of, refusal, request, spot_cancel_all, spot_order,
    until,
};
use crate::raw_bot::{GOAWAY, HEADERS, RawBot};

const ACCOUNTS: &str = "/api/v1/accounts";
const ACTIVE: &str = "/api/v1/hf/orders/active";
const ORDERS: &str = "/api/v1/hf/orders";

/// Limits that no test reaches: a drain that takes so long fails the test.
const NO_LIMIT: &str = "drain_timeout_ms = 600000\ndefault_deadline_ms = 600000";

const STALL: FaultAction = FaultAction::Stall {
    when: When::AfterProcessing,
};

async fn lab(limits: &str) -> Lab {
    Lab::with(Settings {
        process: true,
        config: format!("[limits]\n{limits}"),
        ..Settings::default()
    })
    .await
}

/// A fault for every request to this endpoint.
fn always(method: &str, path: &str, action: FaultAction) -> Fault {
    Fault {
        method: Some(method.to_owned()),
        times: None,
        ..Fault::once(path, action)
    }
}

fn read(target: &str) -> SignAndSendRequest {
    request(Scope::SpotMargin, Method::Get, target, "")
}

fn open_orders() -> SignAndSendRequest {
    read(&format!("{ACTIVE}?symbol=BTC-USDT"))
}

type Sent = JoinHandle<Result<SignAndSendResponse, Status>>;

/// Sends a call and waits until the exchange has received it.
async fn under_way(lab: &Lab, bot: &Bot<Patient>, call: SignAndSendRequest) -> Sent {
    let (before, mut bot) = (lab.kucoin.received().len(), bot.clone());
    let sent = tokio::spawn(async move { bot.send(call).await });
    until("the call is sent", async || {
        lab.kucoin.received().len() > before
    })
    .await;
    sent
}

/// Sends SIGTERM, and waits until the broker is draining.
async fn terminate(lab: &mut Lab) {
    lab.process().terminate();
    until("the broker is draining", async || {
        lab.get("/readyz").await.1.contains("shutting down")
    })
    .await;
}

fn assert_shutting_down(result: Result<SignAndSendResponse, Status>) {
    let status = result.expect_err("this call must be refused");
    let (code, reason, outcome, _) = failure(&status);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (Code::Unavailable, "SHUTTING_DOWN", "not_sent")
    );
    let retry = status.get_details_retry_info();
    let delay = retry.and_then(|info| info.retry_delay);
    assert_eq!(delay, Some(Duration::from_secs(1)));
}

#[tokio::test]
async fn cancels_and_reads_of_open_orders_are_served_during_a_drain_on_old_and_new_connections() {
    let mut lab = lab(NO_LIMIT).await;
    let mut old = lab.patient_bot("maker").await;
    old.send(spot_order("resting")).await.unwrap();
    lab.kucoin.fault(always("POST", ORDERS, STALL));
    let hanging = under_way(&lab, &old, spot_order("hanging")).await;
    terminate(&mut lab).await;

    let mut new = lab.patient_bot("maker").await;
    for bot in [&mut old, &mut new] {
        let before = lab.kucoin.received().len();
        assert_shutting_down(bot.send(spot_order("refused")).await);
        assert_shutting_down(bot.send(accounts()).await);
        assert_shutting_down(
            bot.send(read("/api/v1/hf/orders/done?symbol=BTC-USDT"))
                .await,
        );
        assert_eq!(
            lab.kucoin.received().len(),
            before,
            "a refused call was sent"
        );
        let listed = bot.send(open_orders()).await.unwrap();
        assert_eq!(json_of(&listed)["code"], "200000");
        let found = read("/api/v1/hf/orders/client-order/resting?symbol=BTC-USDT");
        assert_eq!(json_of(&bot.send(found).await.unwrap())["code"], "200000");
        let cancelled = bot.send(spot_cancel_all()).await.unwrap();
        assert_eq!(cancelled.code, "200000");
    }
    assert_eq!(lab.get("/healthz").await.0, 200);
    assert_eq!(lab.get("/readyz").await.0, 503);
    assert_eq!(lab.metric("credbroker_ready").await, Some(0.0));
    let identity = lab.ca.bot("maker").unwrap();
    let channel = lab.endpoint(&identity).connect().await.unwrap();
    let health = HealthClient::new(channel);
    until("health is not serving", async || {
        let request = HealthCheckRequest::default();
        let status = health.clone().check(request).await.unwrap().into_inner();
        status.status() == ServingStatus::NotServing
    })
    .await;
    assert!(!hanging.is_finished());
    assert!(!lab.process().log().contains("calls drained"));
}

#[tokio::test]
async fn admin_can_halt_and_cancel_everything_during_a_drain() {
    let mut lab = lab(NO_LIMIT).await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(spot_order("resting")).await.unwrap();
    // A cancel that hangs delays the end of the drain, but not the halt.
    lab.kucoin.fault(Fault {
        times: Some(1),
        ..always("DELETE", ORDERS, FaultAction::Delay { ms: 3000 })
    });
    let hanging = under_way(&lab, &bot, spot_cancel_all()).await;
    terminate(&mut lab).await;
    let halted = lab
        .admin_cli("anna", &["halt", "--all", "--cancel-all"])
        .await;
    assert_eq!(halted.code, Some(0), "{halted:?}");
    let orders = lab.kucoin.orders(MAIN_UID);
    let states: Vec<_> = orders.iter().map(|order| order.state).collect();
    assert_eq!(states, [OrderState::Cancelled]);
    hanging.await.unwrap().unwrap();
    assert_eq!(lab.process().exit_code().await, Some(0));
}

#[tokio::test]
async fn cancel_all_that_is_running_at_sigterm_is_completed() {
    let mut lab = lab(NO_LIMIT).await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(spot_order("resting")).await.unwrap();
    // Until then the order is listed as open, and the run pauses between its requests.
    lab.kucoin.set_cancel_lag(Duration::from_secs(2));
    let words = ["halt", "--all", "--cancel-all"];
    let stop = async {
        until("the cancel is sent", async || {
            let received = lab.kucoin.received();
            received.iter().any(|request| request.method == "DELETE")
        })
        .await;
        lab.process.as_ref().unwrap().terminate();
    };
    let (halted, ()) = tokio::join!(lab.admin_cli("anna", &words), stop);
    assert_eq!(halted.code, Some(0), "{halted:?}");
    assert_eq!(lab.process().exit_code().await, Some(0));
}

#[tokio::test]
async fn connections_get_goaway_once_the_calls_in_flight_have_ended() {
    let mut lab = lab(NO_LIMIT).await;
    let mut raw = RawBot::open(&lab, &lab.ca.bot("reader").unwrap()).await;
    let bot = lab.patient_bot("maker").await;
    lab.kucoin
        .fault(always("POST", ORDERS, FaultAction::Delay { ms: 2000 }));
    let order = under_way(&lab, &bot, spot_order("in-flight")).await;
    let answered = tokio::spawn(async move {
        order.await.unwrap().unwrap();
        Instant::now()
    });
    terminate(&mut lab).await;
    raw.until_frame(GOAWAY).await;
    let closed = Instant::now();
    // A call that arrives now gets a response with the reason.
    raw.call(&accounts()).await;
    raw.until_frame(HEADERS).await;
    // Both were read at about the same time.
    let answered = answered.await.unwrap();
    assert!(
        closed + Duration::from_millis(500) > answered,
        "GOAWAY came {:?} before the answer",
        answered - closed
    );
    assert_eq!(lab.process().exit_code().await, Some(0));
    let refused = lab.audit();
    let refused = refused.iter().filter(|line| line["event"] == "denied");
    let reasons: Vec<_> = refused.map(|line| line["reason"].clone()).collect();
    assert_eq!(reasons, ["SHUTTING_DOWN"]);
}

#[tokio::test]
async fn hung_reads_do_not_delay_the_exit_and_answered_ones_are_completed() {
    let mut lab = lab(NO_LIMIT).await;
    let bot = lab.patient_bot("maker").await;
    lab.kucoin.fault(always("GET", ACTIVE, STALL));
    let mut hung = Vec::new();
    for _ in 0..5 {
        hung.push(under_way(&lab, &bot, open_orders()).await);
    }
    lab.kucoin
        .fault(Fault::once(ACCOUNTS, FaultAction::Delay { ms: 200 }));
    let answered = under_way(&lab, &bot, accounts()).await;
    let stopped = Instant::now();
    terminate(&mut lab).await;
    // One that hangs and came during the drain does not delay it either.
    hung.push(under_way(&lab, &bot, open_orders()).await);
    answered.await.unwrap().unwrap();
    for read in hung {
        assert_eq!(
            refusal(read.await.unwrap()),
            (
                Code::Unknown,
                "ANSWER_LOST".to_owned(),
                "maybe_sent".to_owned()
            )
        );
    }
    assert_eq!(lab.process().exit_code().await, Some(0));
    // The exchange would have 30 s for an answer.
    let took = stopped.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    lab.check_audit_log();
}

#[tokio::test]
async fn steady_stream_of_cancels_does_not_delay_the_exit_and_none_is_lost() {
    let mut lab = lab(NO_LIMIT).await;
    lab.kucoin
        .fault(always("DELETE", ORDERS, FaultAction::Delay { ms: 300 }));
    lab.kucoin
        .fault(always("POST", ORDERS, FaultAction::Delay { ms: 1000 }));
    let bot = lab.patient_bot("maker").await;
    let order = under_way(&lab, &bot, spot_order("in-flight")).await;
    let mut streams = Vec::new();
    for index in 0..4 {
        let mut bot = lab.patient_bot("maker").await;
        streams.push(tokio::spawn(async move {
            // One of them is in flight at any time.
            let _ = tokio::time::timeout(
                Duration::from_millis(75 * index),
                std::future::pending::<()>(),
            )
            .await;
            let mut cancelled = 0;
            loop {
                match bot.send(spot_cancel_all()).await {
                    Ok(answer) => assert_eq!(answer.code, "200000"),
                    Err(status) => return (cancelled, status),
                }
                cancelled += 1;
            }
        }));
    }
    terminate(&mut lab).await;
    assert_eq!(order.await.unwrap().unwrap().code, "200000");
    for stream in streams {
        let (cancelled, status) = stream.await.unwrap();
        assert!(cancelled > 1, "{cancelled}");
        assert_shutting_down(Err(status));
    }
    assert_eq!(lab.process().exit_code().await, Some(0));
    lab.check_audit_log();
}

#[tokio::test]
async fn hung_cancel_does_not_stop_the_cancels_of_others() {
    let mut lab = lab(NO_LIMIT).await;
    let mut others = lab.patient_bot("maker").await;
    lab.kucoin
        .fault(Fault::once(ORDERS, FaultAction::Delay { ms: 500 }));
    let order = under_way(&lab, &others, spot_order("in-flight")).await;
    terminate(&mut lab).await;
    lab.kucoin.fault(Fault {
        times: Some(1),
        ..always("DELETE", ORDERS, STALL)
    });
    let hung = under_way(&lab, &others, spot_cancel_all()).await;
    assert_eq!(order.await.unwrap().unwrap().code, "200000");
    // Nothing that was in flight at SIGTERM is left, only the cancel that came later.
    for _ in 0..50 {
        let cancelled = others.send(spot_cancel_all()).await.unwrap();
        assert_eq!(cancelled.code, "200000");
    }
    assert!(!hung.is_finished());
    assert_shutting_down(others.send(spot_order("refused")).await);
}

#[tokio::test]
async fn cancel_that_hangs_until_the_limit_is_maybe_sent_and_exits_1() {
    let mut lab = lab("drain_timeout_ms = 1000").await;
    let bot = lab.patient_bot("maker").await;
    lab.kucoin.fault(always("DELETE", ORDERS, STALL));
    lab.kucoin.fault(always("POST", ORDERS, STALL));
    let order = under_way(&lab, &bot, spot_order("hanging")).await;
    terminate(&mut lab).await;
    let cancel = under_way(&lab, &bot, spot_cancel_all()).await;
    for call in [order, cancel] {
        assert_eq!(refusal(call.await.unwrap()).1, "ANSWER_LOST");
    }
    assert_eq!(lab.process().exit_code().await, Some(1));
    let log = lab.process().log();
    assert!(
        log.contains("the outcome of 2 requests is unknown"),
        "{log}"
    );
    lab.check_audit_log();
}
