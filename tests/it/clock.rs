//! Requests are signed with the exchange's time, whatever the clocks do; orders are rejected while that time is uncertain.

use std::time::Duration;

use credbroker::proto::{Outcome, SignAndSendRequest};
use credbroker_sim::installation::{MAIN_UID, RULES, Settings};
use credbroker_sim::kucoin::{
    Fault, FaultAction, Host, KucoinSettings, KucoinSim, Limits, Matching, ReceivedRequest, SimKey,
    When,
};
use serde_json::json;
use tonic::Code;

use crate::harness::{
    Bot, Lab, Time, accounts, failure, futures_order, refusal, spot_cancel_all, spot_order, until,
};

const MINUTE_MS: i64 = 60_000;
const HOUR: Duration = Duration::from_secs(3600);
const HOUR_MS: i64 = 3_600_000;

/// Longer than the broker's interval between time measurements.
const HALF_MINUTE_AND_MORE: Duration = Duration::from_secs(40);

/// A ready broker, and an exchange whose clock is `ahead_ms` ahead.
async fn ready(ahead_ms: i64) -> (Lab, Time) {
    let (mut lab, time) = installed(ahead_ms).await;
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    (lab, time)
}

async fn installed(ahead_ms: i64) -> (Lab, Time) {
    let kucoin = KucoinSettings {
        limits: Limits::none(),
        clock_offset_ms: ahead_ms,
        ..KucoinSettings::default()
    };
    let settings = Settings {
        kucoin,
        // Keys must not become stale when a test advances the clocks.
        rules: RULES.replace("[account.main]", "[account.main]\nmax_stale_s = 86400"),
        ..Settings::default()
    };
    (Lab::install(settings).await, Time::new(ahead_ms))
}

/// A fault of time requests, on one host or on both.
fn time_fault(host: Option<Host>, times: Option<u32>, action: FaultAction) -> Fault {
    Fault {
        host,
        method: None,
        path: "/api/v1/timestamp".to_owned(),
        matching: Matching::Exact,
        skip: 0,
        times,
        action,
    }
}

fn closed() -> FaultAction {
    FaultAction::Close {
        when: When::BeforeProcessing,
    }
}

/// The number of time requests that `host` has received.
fn time_requests(lab: &Lab, host: Host) -> usize {
    let all = lab.kucoin.everything_received();
    let is_time_request =
        |request: &&ReceivedRequest| request.path() == "/api/v1/timestamp" && request.host == host;
    all.iter().filter(is_time_request).count()
}

async fn metric(lab: &Lab, name: &str, host: &str) -> Option<f64> {
    lab.metric(&format!("{name}{{site=\"global\",host=\"{host}\"}}"))
        .await
}

async fn until_counted(lab: &Lab, counter: &str, count: f64) {
    until(&format!("{counter} is {count}"), async || {
        lab.metric(counter).await.unwrap() >= count
    })
    .await;
}

/// Checks the offset metric of `host` to within 5 s, since measurements on a busy machine are inexact.
async fn assert_offset(lab: &Lab, host: &str, expected_s: f64) {
    let offset = metric(lab, "clock_offset_seconds", host).await.unwrap();
    assert!(
        (offset - expected_s).abs() < 5.0,
        "{host}: {offset} instead of {expected_s}"
    );
}

/// Checks that the exchange accepted signature and timestamp of every private request, and returns how many there were.
fn all_verified(kucoin: &KucoinSim) -> usize {
    let received = kucoin.received();
    for request in &received {
        assert_eq!(request.code(), Some("200000"), "{request:?}");
    }
    received.len()
}

async fn accepted(bot: &mut Bot, request: SignAndSendRequest) -> i64 {
    let answer = bot.send(request).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
    answer.timestamp_ms
}

#[tokio::test]
async fn requests_are_signed_with_the_exchange_time_even_an_hour_from_ours() {
    for ahead_ms in [MINUTE_MS, HOUR_MS, -HOUR_MS] {
        let (mut lab, _) = ready(ahead_ms).await;
        let mut bot = lab.bot("maker").await;
        for request in [
            spot_order("ahead"),
            futures_order("ahead"),
            accounts(),
            spot_cancel_all(),
        ] {
            let reported = accepted(&mut bot, request).await;
            let received = lab.kucoin.received();
            let signed = received.last().unwrap().header("kc-api-timestamp").unwrap();
            assert_eq!(
                signed,
                reported.to_string(),
                "timestamp_ms must be the signed timestamp"
            );
        }
        assert_eq!(all_verified(&lab.kucoin), 4, "each on the first attempt");
        for host in ["spot", "futures"] {
            #[expect(
                clippy::cast_precision_loss,
                reason = "an hour in milliseconds is exact"
            )]
            assert_offset(&lab, host, ahead_ms as f64 / 1000.0).await;
            let uncertainty = metric(&lab, "clock_uncertainty_seconds", host)
                .await
                .unwrap();
            assert!((0.0..2.0).contains(&uncertainty), "{uncertainty}");
        }
        lab.stop().await;
    }
}

#[tokio::test]
async fn each_exchange_host_has_its_own_clock_offset() {
    let (mut lab, time) = installed(HOUR_MS).await;
    let futures = KucoinSim::start(KucoinSettings {
        limits: Limits::none(),
        clock_offset_ms: -HOUR_MS,
        ..KucoinSettings::default()
    });
    let futures = futures.await.unwrap();
    futures.add_key(SimKey::fake(MAIN_UID));
    lab.reconfigure(&lab.kucoin.futures_url(), &futures.futures_url());
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    let mut bot = lab.bot("maker").await;
    accepted(&mut bot, spot_order("ahead")).await;
    accepted(&mut bot, futures_order("behind")).await;
    assert_eq!((all_verified(&lab.kucoin), all_verified(&futures)), (1, 1));
    assert_offset(&lab, "spot", 3600.0).await;
    assert_offset(&lab, "futures", -3600.0).await;
    lab.stop().await;
}

#[tokio::test]
async fn request_rejected_for_its_timestamp_is_signed_again_and_sent_once_more() {
    let (mut lab, time) = ready(0).await;
    // A test of a key can be rejected for its timestamp, too.
    lab.until_keys_tested().await;
    let mut bot = lab.bot("maker").await;
    for request in [
        spot_order("jump"),
        futures_order("jump"),
        accounts(),
        spot_cancel_all(),
    ] {
        // A rejection triggers a measurement of its own host only, so each request is rejected after a step.
        time.jump(&lab, MINUTE_MS);
        let (path, before) = (request.path.clone(), lab.kucoin.received().len());
        let answer = bot.send(request).await.unwrap();
        assert_eq!(
            (answer.outcome(), answer.code.as_str()),
            (Outcome::Accepted, "200000")
        );
        let received = lab.kucoin.received().split_off(before);
        let codes: Vec<_> = received
            .iter()
            .map(|request| request.code().unwrap())
            .collect();
        assert_eq!(codes, ["400002", "200000"], "{path}");
        assert!(received.iter().all(|request| request.path() == path));
        let [first, second] = [0, 1].map(|at: usize| {
            let signed = received[at].header("kc-api-timestamp").unwrap();
            signed.parse::<i64>().unwrap()
        });
        assert!(second - first > MINUTE_MS / 2, "{first} and {second}");
        assert_eq!(answer.timestamp_ms, second);
        let signatures: Vec<_> = received
            .iter()
            .map(|request| request.header("kc-api-sign"))
            .collect();
        assert_ne!(signatures[0], signatures[1]);
        let lines = lab.audit_of(&answer.request_id);
        let events: Vec<_> = lines.iter().map(|line| &line["event"]).collect();
        assert_eq!(events, ["intent", "outcome"]);
        assert_eq!(lines[1]["outcome"], "accepted");
    }
    assert_eq!(lab.kucoin.orders(MAIN_UID).len(), 2, "each order once");
    assert_eq!(lab.metric("timestamps_refused_total").await, Some(4.0));
    // The spot host was measured for the last request, so the next one is accepted at once.
    time.jump(&lab, 0);
    let before = lab.kucoin.received().len();
    accepted(&mut bot, spot_order("afterwards")).await;
    assert_eq!(lab.kucoin.received().len(), before + 1);
    lab.stop().await;
}

#[tokio::test]
async fn concurrent_calls_after_a_clock_step_are_each_sent_again_at_most_once() {
    let (mut lab, time) = ready(0).await;
    let bot = lab.bot("maker").await;
    time.jump(&lab, -HOUR_MS);
    let calls = (0..20).map(|index| {
        let mut bot = bot.clone();
        async move { accepted(&mut bot, spot_order(&format!("together-{index}"))).await }
    });
    futures_util::future::join_all(calls).await;
    assert_eq!(lab.kucoin.orders(MAIN_UID).len(), 20);
    let received = lab.kucoin.received();
    let of = |code: &str| {
        received
            .iter()
            .filter(|request| request.code() == Some(code))
            .count()
    };
    assert_eq!(of("200000"), 20);
    assert_eq!(received.len(), 20 + of("400002"));
    assert!((1..=20).contains(&of("400002")));
    lab.stop().await;
}

#[tokio::test]
async fn repeated_timestamp_rejection_or_failed_measurement_is_returned_to_the_bot() {
    let (mut lab, _) = ready(0).await;
    // The rejections are injected faults, whose code the simulator does not record.
    lab.is_audit_checked = false;
    let mut bot = lab.bot("maker").await;
    let refused = FaultAction::Answer {
        status: 400,
        body: json!({"code": "400002", "msg": "KC-API-TIMESTAMP Invalid"}),
        when: When::BeforeProcessing,
    };
    for (is_measured, sent) in [(true, 2), (false, 1)] {
        lab.kucoin.fault(Fault {
            times: None,
            ..Fault::once("/api/v1/hf/orders", refused.clone())
        });
        if !is_measured {
            lab.kucoin.fault(time_fault(None, None, closed()));
        }
        let before = lab.kucoin.received().len();
        let answer = bot.send(spot_order("refused")).await.unwrap();
        assert_eq!(
            (answer.outcome(), answer.code.as_str()),
            (Outcome::Rejected, "400002")
        );
        assert_eq!(lab.kucoin.received().len() - before, sent);
        let events: Vec<_> = lab.audit_of(&answer.request_id);
        let events: Vec<_> = events
            .iter()
            .map(|line| line["event"].as_str().unwrap())
            .collect();
        assert_eq!(events, ["intent", "outcome"]);
        lab.kucoin.clear_faults();
    }
    assert!(lab.kucoin.orders(MAIN_UID).is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn order_is_not_sent_again_when_a_502_contains_the_timestamp_code() {
    let (mut lab, _) = ready(0).await;
    let mut bot = lab.bot("maker").await;
    let quoted = FaultAction::Answer {
        status: 502,
        body: json!({"code": "400002", "msg": "KC-API-TIMESTAMP Invalid"}),
        when: When::AfterProcessing,
    };
    lab.kucoin.fault(Fault::once("/api/v1/hf/orders", quoted));
    let answer = bot.send(spot_order("quoted")).await.unwrap();
    assert_eq!(
        (answer.outcome(), answer.code.as_str()),
        (Outcome::MaybeSent, "400002")
    );
    assert_eq!(lab.kucoin.received().len(), 1);
    assert_eq!(lab.kucoin.orders(MAIN_UID).len(), 1);
    lab.stop().await;
}

#[tokio::test]
async fn deadline_during_a_time_measurement_returns_the_timestamp_rejection() {
    let (mut lab, time) = ready(0).await;
    let mut bot = lab.patient_bot("maker").await;
    time.jump(&lab, MINUTE_MS);
    let stalled = FaultAction::Stall {
        when: When::BeforeProcessing,
    };
    lab.kucoin.fault(time_fault(None, None, stalled));
    let limit = Duration::from_millis(2500);
    let before = time_requests(&lab, Host::Spot);
    let call = tokio::spawn(async move { bot.send_within(spot_order("late"), limit).await });
    until("the time is measured again", async || {
        time_requests(&lab, Host::Spot) > before
    })
    .await;
    time.pass(&lab, limit).await;
    let answer = call.await.unwrap().unwrap();
    assert_eq!(
        (answer.outcome(), answer.code.as_str()),
        (Outcome::Rejected, "400002")
    );
    // The measurement times out, and later the host answers again: the order must still not be sent again.
    lab.kucoin.clear_faults();
    time.pass(&lab, HALF_MINUTE_AND_MORE).await;
    let mut other = lab.bot("maker").await;
    accepted(&mut other, accounts()).await;
    let orders = lab.kucoin.received();
    let orders: Vec<_> = orders
        .iter()
        .filter(|request| request.method == "POST")
        .collect();
    assert_eq!(orders.len(), 1);
    assert_eq!(orders[0].code(), Some("400002"));
    let lines = lab.audit_of(&answer.request_id);
    assert_eq!(lines.len(), 2);
    assert_eq!(
        (&lines[1]["outcome"], &lines[1]["code"]),
        (&json!("rejected"), &json!("400002"))
    );
    lab.stop().await;
}

#[tokio::test]
async fn clock_step_is_applied_only_after_three_measurements_agree() {
    let (mut lab, time) = ready(0).await;
    let mut bot = lab.bot("maker").await;
    let now_ms = accepted(&mut bot, accounts()).await;
    let wrong = FaultAction::Answer {
        status: 200,
        body: json!({"code": "200000", "data": now_ms + HOUR_MS}),
        when: When::BeforeProcessing,
    };
    lab.kucoin
        .fault(time_fault(Some(Host::Spot), Some(1), wrong));
    time.pass(&lab, HALF_MINUTE_AND_MORE).await;
    until_counted(&lab, "clock_jumps_refused_total", 1.0).await;
    accepted(&mut bot, spot_order("one-wrong")).await;
    assert_eq!(all_verified(&lab.kucoin), 2);
    assert_offset(&lab, "spot", 0.0).await;

    // It is measured again soon, with the old result.
    time.pass(&lab, Duration::from_secs(1)).await;
    until("the spot host is measured again", async || {
        time_requests(&lab, Host::Spot) >= 3
    })
    .await;
    accepted(&mut bot, spot_order("right-again")).await;
    assert_offset(&lab, "spot", 0.0).await;
    assert_eq!(lab.metric("clock_jumps_refused_total").await, Some(1.0));

    // Now the exchange's clock really steps, on both hosts.
    time.jump(&lab, HOUR_MS);
    time.pass(&lab, HALF_MINUTE_AND_MORE).await;
    until_counted(&lab, "clock_jumps_refused_total", 3.0).await;
    time.pass(&lab, Duration::from_secs(1)).await;
    until_counted(&lab, "clock_jumps_refused_total", 5.0).await;
    time.pass(&lab, Duration::from_secs(1)).await;
    for host in ["spot", "futures"] {
        until("the offset is updated", async || {
            metric(&lab, "clock_offset_seconds", host).await.unwrap() > 1800.0
        })
        .await;
        assert_offset(&lab, host, 3600.0).await;
    }
    let refused = lab.metric("clock_jumps_refused_total").await;
    assert_eq!(
        refused,
        Some(5.0),
        "two rejected per host; the third is accepted"
    );
    let before = lab.kucoin.received().len();
    accepted(&mut bot, spot_order("moved")).await;
    accepted(&mut bot, futures_order("moved")).await;
    assert_eq!(
        lab.kucoin.received().len(),
        before + 2,
        "on the first attempt"
    );
    assert_eq!(lab.metric("timestamps_refused_total").await, Some(0.0));
    lab.stop().await;
}

#[tokio::test]
async fn signed_time_is_still_correct_after_the_machine_slept_for_an_hour() {
    let (mut lab, time) = ready(MINUTE_MS).await;
    let mut bot = lab.bot("maker").await;
    time.sleep(&lab, HOUR);
    accepted(&mut bot, spot_order("awake")).await;
    accepted(&mut bot, futures_order("awake")).await;
    assert_eq!(all_verified(&lab.kucoin), 2, "each on the first attempt");
    for host in [Host::Spot, Host::Futures] {
        assert_eq!(
            time_requests(&lab, host),
            1,
            "a measurement is still used after an hour"
        );
    }
    lab.stop().await;
}

#[tokio::test]
async fn first_order_after_a_two_hour_sleep_is_rejected_and_triggers_a_measurement() {
    let (mut lab, time) = ready(0).await;
    let mut bot = lab.bot("maker").await;
    time.sleep(&lab, HOUR * 2);
    let (status, text) = lab.get("/readyz").await;
    assert_eq!(status, 503);
    assert!(
        text.contains(
            "clock global/spot: the broker's estimate of the exchange's time may be off by 36"
        ),
        "{text}"
    );
    accepted(&mut bot, accounts()).await;
    accepted(&mut bot, spot_cancel_all()).await;
    assert_eq!(time_requests(&lab, Host::Spot), 1);
    let refused = bot.send(spot_order("asleep")).await.unwrap_err();
    assert!(
        refused.message().contains("last measured 72"),
        "{refused:?}"
    );
    assert_eq!(
        refusal(Err(refused)),
        (
            Code::FailedPrecondition,
            "CLOCK_UNCERTAIN".to_owned(),
            "not_sent".to_owned()
        )
    );
    // Timers did not advance, so the rejected order has triggered the measurement.
    lab.until_ready().await;
    accepted(&mut bot, spot_order("awake")).await;
    assert_eq!(all_verified(&lab.kucoin), 3);
    lab.stop().await;
}

#[tokio::test]
async fn without_recent_measurements_orders_are_rejected_and_cancels_use_the_last_offset() {
    let (mut lab, time) = ready(MINUTE_MS).await;
    lab.kucoin.fault(time_fault(None, None, closed()));
    time.pass(&lab, HOUR * 2).await;
    until("two measurements have failed", async || {
        lab.metric("clock_failures_total").await.unwrap() >= 2.0
    })
    .await;
    let mut bot = lab.bot("maker").await;
    for order in [spot_order("uncertain"), futures_order("uncertain")] {
        let status = bot.send(order).await.unwrap_err();
        let (code, reason, outcome, request_id) = failure(&status);
        assert_eq!(
            (code, reason.as_str(), outcome.as_str()),
            (Code::FailedPrecondition, "CLOCK_UNCERTAIN", "not_sent")
        );
        let lines = lab.audit_of(&request_id);
        assert_eq!((lines.len(), &lines[0]["event"]), (1, &json!("denied")));
        assert_eq!(lines[0]["reason"], "CLOCK_UNCERTAIN");
    }
    accepted(&mut bot, spot_cancel_all()).await;
    accepted(&mut bot, accounts()).await;
    assert_eq!(all_verified(&lab.kucoin), 2);
    for host in ["spot", "futures"] {
        let age = metric(&lab, "clock_age_seconds", host).await.unwrap();
        assert!(age >= 7200.0, "{age}");
        let uncertainty = metric(&lab, "clock_uncertainty_seconds", host)
            .await
            .unwrap();
        assert!((3.6..5.0).contains(&uncertainty), "{uncertainty}");
        assert_offset(&lab, host, 60.0).await;
    }
    let (status, text) = lab.get("/readyz").await;
    assert_eq!(status, 503);
    for host in ["spot", "futures"] {
        assert!(text.contains(&format!("clock global/{host}: ")), "{text}");
    }
    assert_eq!(lab.metric("ready").await, Some(0.0));

    lab.kucoin.clear_faults();
    time.pass(&lab, HALF_MINUTE_AND_MORE).await;
    lab.until_ready().await;
    accepted(&mut bot, spot_order("certain")).await;
    accepted(&mut bot, futures_order("certain")).await;
    let age = metric(&lab, "clock_age_seconds", "spot").await.unwrap();
    assert!(age < 7200.0, "{age}");
    lab.stop().await;
}

#[tokio::test]
async fn before_the_first_measurement_orders_are_rejected_and_cancels_use_the_system_clock() {
    let (mut lab, time) = installed(0).await;
    lab.kucoin.fault(time_fault(None, None, closed()));
    lab.start_broker_on(time.clock()).await;
    lab.until_keys_loaded().await;
    until("the egress address is verified", async || {
        lab.metric("egress_mismatch").await == Some(0.0)
    })
    .await;
    let mut bot = lab.bot("maker").await;
    let refused = bot.send(spot_order("too-early")).await.unwrap_err();
    assert!(
        refused.message().contains("has not been measured yet"),
        "{refused:?}"
    );
    assert_eq!(
        refusal(Err(refused)),
        (
            Code::FailedPrecondition,
            "CLOCK_UNCERTAIN".to_owned(),
            "not_sent".to_owned()
        )
    );
    accepted(&mut bot, accounts()).await;
    accepted(&mut bot, spot_cancel_all()).await;
    assert_eq!(all_verified(&lab.kucoin), 2);
    for name in [
        "clock_offset_seconds",
        "clock_uncertainty_seconds",
        "clock_age_seconds",
    ] {
        assert_eq!(metric(&lab, name, "spot").await, None, "{name}");
    }
    let (status, text) = lab.get("/readyz").await;
    assert_eq!(status, 503);
    assert!(
        text.contains("clock global/futures: the exchange's time has not been measured yet"),
        "{text}"
    );

    lab.kucoin.clear_faults();
    time.pass(&lab, HALF_MINUTE_AND_MORE).await;
    lab.until_ready().await;
    accepted(&mut bot, spot_order("measured")).await;
    lab.stop().await;
}

/// Measurements in quick succession could all get the same cached answer, and then agree by mistake.
#[tokio::test]
async fn rejected_orders_do_not_shorten_the_wait_before_the_next_time_measurement() {
    let (mut lab, time) = ready(0).await;
    let mut bot = lab.bot("maker").await;
    let now_ms = accepted(&mut bot, accounts()).await;
    let cached = FaultAction::Answer {
        status: 200,
        body: json!({"code": "200000", "data": now_ms}),
        when: When::BeforeProcessing,
    };
    lab.kucoin.fault(time_fault(Some(Host::Spot), None, cached));
    time.pass(&lab, HOUR * 2).await;
    until_counted(&lab, "clock_jumps_refused_total", 1.0).await;
    let mut bot = lab.bot("maker").await;
    let refused = refusal(bot.send(spot_order("hurry")).await).1;
    assert_eq!(refused, "CLOCK_UNCERTAIN");
    time.pass(&lab, Duration::from_millis(500)).await;
    // A round trip, during which a measurement that is due would also arrive.
    accepted(&mut bot, accounts()).await;
    time.pass(&lab, Duration::from_millis(500)).await;
    until("the spot host is measured again", async || {
        time_requests(&lab, Host::Spot) >= 3
    })
    .await;
    let all = lab.kucoin.everything_received();
    let mut requests = all
        .iter()
        .filter(|request| request.path() == "/api/v1/timestamp" && request.host == Host::Spot);
    let (second, third) = (
        requests.nth(1).unwrap().at_ms,
        requests.next().unwrap().at_ms,
    );
    assert!(
        third - second > 950,
        "measured again after {} ms",
        third - second
    );
    lab.stop().await;
}

const YEAR_MS: i64 = 365 * 24 * HOUR_MS;

/// A broker that has measured both hosts of an exchange whose clock is `ahead_ms` ahead, whether or not it accepts the
/// result.
async fn measured(ahead_ms: i64) -> (Lab, Time) {
    let (mut lab, time) = installed(ahead_ms).await;
    lab.start_broker_on(time.clock()).await;
    lab.until_keys_loaded().await;
    until("both hosts are measured", async || {
        let spot = metric(&lab, "clock_offset_seconds", "spot").await;
        spot.is_some()
            && metric(&lab, "clock_offset_seconds", "futures")
                .await
                .is_some()
    })
    .await;
    until("the egress address is verified", async || {
        lab.metric("egress_mismatch").await == Some(0.0)
    })
    .await;
    (lab, time)
}

async fn assert_rejected_for_difference(bot: &mut Bot, request: SignAndSendRequest, text: &str) {
    let status = bot.send(request).await.unwrap_err();
    assert!(status.message().contains(text), "{status:?}");
    assert_eq!(
        refusal(Err(status)),
        (
            Code::FailedPrecondition,
            "CLOCK_UNCERTAIN".to_owned(),
            "not_sent".to_owned()
        )
    );
}

#[tokio::test]
async fn order_is_refused_while_the_exchange_clock_is_more_than_a_day_from_ours() {
    let cases = [
        (
            10 * YEAR_MS,
            Some("the exchange's clock is 3650 days ahead of the system clock"),
        ),
        (
            -5 * YEAR_MS,
            Some("the exchange's clock is 1825 days behind the system clock"),
        ),
        (
            25 * HOUR_MS,
            Some("the exchange's clock is 25 hours ahead of the system clock"),
        ),
        (23 * HOUR_MS, None),
        (-23 * HOUR_MS, None),
    ];
    for (ahead_ms, refused) in cases {
        let (mut lab, _) = measured(ahead_ms).await;
        let mut bot = lab.bot("maker").await;
        for order in [spot_order("far-off"), futures_order("far-off")] {
            match refused {
                Some(text) => assert_rejected_for_difference(&mut bot, order, text).await,
                None => _ = accepted(&mut bot, order).await,
            }
        }
        // Cancels and reads are signed with the exchange's time: it accepts their timestamps.
        accepted(&mut bot, spot_cancel_all()).await;
        accepted(&mut bot, accounts()).await;
        let sent = if refused.is_some() { 2 } else { 4 };
        assert_eq!(all_verified(&lab.kucoin), sent);
        let (status, text) = lab.get("/readyz").await;
        assert_eq!(status == 503, refused.is_some(), "{text}");
        for host in ["spot", "futures"] {
            let fix = format!("run `credbroker clock accept global/{host}`");
            assert_eq!(text.contains(&fix), refused.is_some(), "{text}");
            let state = metric(&lab, "clock_difference_refused", host).await;
            assert_eq!(state, Some(f64::from(u8::from(refused.is_some()))));
        }
        lab.stop().await;
    }
}

#[tokio::test]
async fn order_is_refused_after_the_system_clock_steps_by_more_than_a_day() {
    let (mut lab, time) = ready(0).await;
    let mut bot = lab.bot("maker").await;
    accepted(&mut bot, spot_order("before")).await;
    // Backwards, since the same clock checks certificates, and those of tests were valid two days ago.
    time.step_system(-2 * 24 * HOUR_MS);
    let message = "the exchange's clock is 48 hours ahead of the system clock";
    assert_rejected_for_difference(&mut bot, spot_order("stepped"), message).await;
    accepted(&mut bot, spot_cancel_all()).await;
    accepted(&mut bot, accounts()).await;
    time.step_system(2 * 24 * HOUR_MS);
    accepted(&mut bot, spot_order("after")).await;
    assert_eq!(all_verified(&lab.kucoin), 4);
    lab.stop().await;
}

#[tokio::test]
async fn orders_are_refused_after_the_exchange_clock_steps_by_a_year_until_it_steps_back() {
    let (mut lab, time) = ready(0).await;
    let mut bot = lab.bot("maker").await;
    accepted(&mut bot, spot_order("before")).await;
    time.jump(&lab, YEAR_MS);
    // Signed with the old time and rejected by the exchange; the new measurement is not used for signing.
    let answer = bot.send(spot_order("jump")).await.unwrap();
    assert_eq!(
        (answer.outcome(), answer.code.as_str()),
        (Outcome::Rejected, "400002")
    );
    assert_eq!(lab.kucoin.orders(MAIN_UID).len(), 1);
    let message = "the exchange's clock is 365 days ahead of the system clock";
    assert_rejected_for_difference(&mut bot, spot_order("different"), message).await;
    accepted(&mut bot, spot_cancel_all()).await;
    assert_eq!(
        metric(&lab, "clock_difference_refused", "spot").await,
        Some(1.0)
    );
    time.jump(&lab, -YEAR_MS);
    until("the step back is detected", async || {
        // A read that is rejected with 400002 triggers a measurement.
        bot.clone().send(accounts()).await.unwrap();
        metric(&lab, "clock_difference_refused", "spot").await == Some(0.0)
    })
    .await;
    accepted(&mut bot, spot_order("agreed")).await;
    lab.stop().await;
}

#[tokio::test]
async fn accepted_clock_difference_lasts_until_it_changes_by_a_day_or_the_broker_restarts() {
    let (mut lab, time) = measured(YEAR_MS).await;
    let mut bot = lab.bot("maker").await;
    let run = async |lab: &Lab, host: &str| {
        let result = lab.admin_cli("anna", &["clock", "accept", host]).await;
        let stdout = crate::harness::in_one_line(&result.stdout);
        (result.code, stdout, result.stderr_line())
    };
    let (code, _, output) = run(&lab, "mars/spot").await;
    assert_eq!(code, Some(1));
    let expected = "host: expected one of global/futures, global/spot, got \"mars/spot\"";
    assert!(output.contains(expected), "{output}");
    let message = "the exchange's clock is 365 days ahead";
    assert_rejected_for_difference(&mut bot, spot_order("refused"), message).await;

    let (code, output, _) = run(&lab, "spot").await;
    assert_eq!(code, Some(0), "{output}");
    let expected = "accepted: the clock of global/spot is 365 days ahead of the system clock. Risk-increasing requests are accepted again";
    assert!(output.starts_with(expected), "{output}");
    accepted(&mut bot, spot_order("accepted")).await;
    assert_rejected_for_difference(&mut bot, futures_order("other-host"), message).await;
    let act = lab.acts().pop().unwrap();
    assert_eq!(
        (&act["action"], &act["outcome"], &act["principal"]),
        (
            &json!("clock-accept"),
            &json!("done"),
            &json!("spiffe://demo.test/admin/anna")
        )
    );
    let detail = act["detail"].as_str().unwrap();
    assert_eq!(
        detail,
        "the clock of global/spot is 365 days ahead of the system clock"
    );
    let (status, text) = lab.get("/readyz?verbose").await;
    assert_eq!(status, 503, "{text}");
    let by = "clock global/spot: spiffe://demo.test/admin/anna has accepted this difference until the broker restarts: the exchange's clock is 365 days ahead of the system clock";
    assert!(
        text.contains(by) && !text.contains("accept global/spot"),
        "{text}"
    );

    let (code, output, _) = run(&lab, "global/futures").await;
    assert_eq!(code, Some(0), "{output}");
    lab.until_ready().await;
    accepted(&mut bot, futures_order("accepted")).await;
    let (code, output, _) = run(&lab, "global/spot").await;
    assert_eq!(code, Some(0));
    assert!(output.starts_with("unchanged: "), "{output}");

    // An accepted difference may change by up to a day.
    time.step_system(-23 * HOUR_MS);
    accepted(&mut bot, spot_order("within")).await;
    time.step_system(-2 * HOUR_MS);
    let message = "the exchange's clock is 366 days ahead";
    assert_rejected_for_difference(&mut bot, spot_order("beyond"), message).await;
    time.step_system(25 * HOUR_MS);
    accepted(&mut bot, spot_order("back")).await;

    lab.stop().await;
    lab.start_broker_on(time.clock()).await;
    until("spot is measured again", async || {
        metric(&lab, "clock_difference_refused", "spot").await == Some(1.0)
    })
    .await;
    lab.stop().await;
}
