//! `GetOutcome`: a bot learns what became of an earlier call or order, also after a crash of the broker.

use std::time::Duration;

use credbroker::proto::{
    CallState, GetOutcomeRequest, GetOutcomeResponse, Method, Scope, SignAndSendRequest,
};
use credbroker_sim::installation::{RULES, Settings, grant};
use credbroker_sim::kucoin::{Fault, FaultAction, KucoinSettings, Limits, When};
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::delivery::tls_of;
use crate::harness::{
    Bot, Lab, Patient, accounts, futures_order, refusal, request, spot_cancel_all, spot_order,
    until,
};

const ORDERS: &str = "/api/v1/hf/orders";
const PLACE: &str = "spot.post.v1-hf-orders";

const STALL: FaultAction = FaultAction::Stall {
    when: When::AfterProcessing,
};

/// The same request with a request id.
fn named(id: &str, mut request: SignAndSendRequest) -> SignAndSendRequest {
    id.clone_into(&mut request.request_id);
    request
}

fn by_id(id: &str) -> GetOutcomeRequest {
    GetOutcomeRequest {
        request_id: id.to_owned(),
        ..GetOutcomeRequest::default()
    }
}

fn by_oid(account: &str, client_oid: &str) -> GetOutcomeRequest {
    GetOutcomeRequest {
        account: account.to_owned(),
        scope: Scope::SpotMargin.into(),
        client_oid: client_oid.to_owned(),
        ..GetOutcomeRequest::default()
    }
}

async fn outcome(bot: &mut Bot<Patient>, question: GetOutcomeRequest) -> GetOutcomeResponse {
    let answer = bot.client.get_outcome(question.clone()).await;
    answer
        .unwrap_or_else(|status| panic!("{question:?}: {status:?}"))
        .into_inner()
}

async fn state_of_call(bot: &mut Bot<Patient>, id: &str) -> CallState {
    outcome(bot, by_id(id)).await.state()
}

async fn state_of_order(bot: &mut Bot<Patient>, client_oid: &str) -> CallState {
    outcome(bot, by_oid("main", client_oid)).await.state()
}

/// Code, reason and message of a question that is refused. It must not seem to be the outcome of a call.
async fn refused(bot: &mut Bot<Patient>, question: GetOutcomeRequest) -> (Code, String, String) {
    let answer = bot.client.get_outcome(question).await;
    of_refusal(&answer.expect_err("this question must be refused"))
}

fn of_refusal(status: &Status) -> (Code, String, String) {
    let info = status.get_details_error_info().unwrap();
    assert!(!info.metadata.contains_key("outcome"), "{info:?}");
    (status.code(), info.reason, status.message().to_owned())
}

fn rejection() -> Fault {
    let body = json!({"code": "200004", "msg": "Balance insufficient"});
    let when = When::BeforeProcessing;
    let status = 200;
    Fault::once(ORDERS, FaultAction::Answer { status, body, when })
}

async fn terminate(lab: &mut Lab) {
    lab.process().terminate();
    until("the broker is draining", async || {
        lab.get("/readyz").await.1.contains("shutting down")
    })
    .await;
}

#[tokio::test]
async fn outcome_of_each_kind_is_known_by_request_id_and_by_client_oid() {
    let mut lab = Lab::start().await;
    lab.until_keys_tested().await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(named("r-accepted", spot_order("accepted")))
        .await
        .unwrap();
    let known = outcome(&mut bot, by_id("r-accepted")).await;
    assert_eq!(known.state(), CallState::Accepted);
    assert_eq!(
        (known.endpoint.as_str(), known.client_oid.as_str()),
        (PLACE, "")
    );
    assert!(known.broker_time_ms > 1_600_000_000_000, "{known:?}");
    let known = outcome(&mut bot, by_oid("main", "accepted")).await;
    assert_eq!(known.state(), CallState::Accepted);
    assert_eq!(
        (known.endpoint.as_str(), known.client_oid.as_str()),
        (PLACE, "accepted")
    );
    assert!(known.broker_time_ms > 1_600_000_000_000, "{known:?}");

    lab.kucoin.fault(rejection());
    bot.send(named("r-rejected", spot_order("rejected")))
        .await
        .unwrap();
    assert_eq!(
        state_of_call(&mut bot, "r-rejected").await,
        CallState::Rejected
    );
    assert_eq!(
        state_of_order(&mut bot, "rejected").await,
        CallState::NotPlaced
    );

    let when = When::AfterProcessing;
    lab.kucoin
        .fault(Fault::once(ORDERS, FaultAction::Close { when }));
    bot.send(named("r-lost", spot_order("lost")))
        .await
        .unwrap_err();
    assert_eq!(
        state_of_call(&mut bot, "r-lost").await,
        CallState::MaybeSent
    );
    assert_eq!(state_of_order(&mut bot, "lost").await, CallState::MaybeSent);

    lab.kucoin
        .fault(Fault::once(ORDERS, FaultAction::Delay { ms: 800 }));
    let before = lab.kucoin.received().len();
    let slow = tokio::spawn({
        let mut bot = bot.clone();
        async move { bot.send(named("r-slow", spot_order("slow"))).await }
    });
    until("the order is sent", async || {
        lab.kucoin.received().len() > before
    })
    .await;
    assert_eq!(state_of_call(&mut bot, "r-slow").await, CallState::InFlight);
    assert_eq!(state_of_order(&mut bot, "slow").await, CallState::InFlight);
    slow.await.unwrap().unwrap();
    assert_eq!(state_of_call(&mut bot, "r-slow").await, CallState::Accepted);
    assert_eq!(state_of_order(&mut bot, "slow").await, CallState::Accepted);

    // A call without orders; one that was refused; a read; and what never was.
    bot.send(named("r-cancel", spot_cancel_all()))
        .await
        .unwrap();
    let known = outcome(&mut bot, by_id("r-cancel")).await;
    assert_eq!(known.state(), CallState::Accepted);
    assert_eq!(known.endpoint, "spot.delete.v1-hf-orders");
    lab.admin_cli("anna", &["halt", "main"]).await;
    let halted = bot.send(named("r-halted", spot_order("halted"))).await;
    assert_eq!(refusal(halted).1, "ACCOUNT_FROZEN");
    bot.send(named("r-read", accounts())).await.unwrap();
    for id in ["r-halted", "r-read", "r-never"] {
        assert_eq!(
            state_of_call(&mut bot, id).await,
            CallState::Unknown,
            "{id}"
        );
    }
    for oid in ["halted", "never"] {
        assert_eq!(
            state_of_order(&mut bot, oid).await,
            CallState::NotPlaced,
            "{oid}"
        );
    }
    // Questions are not audited.
    assert!(lab.audit_of("r-never").is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn newest_call_that_left_counts_if_a_request_id_was_used_again() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(named("again", spot_order("first"))).await.unwrap();
    // Refused as a repeated order, and for the halt: these did not leave.
    bot.send(named("again", spot_order("first")))
        .await
        .unwrap_err();
    lab.admin_cli("anna", &["halt", "main"]).await;
    bot.send(named("again", spot_order("second")))
        .await
        .unwrap_err();
    assert_eq!(state_of_call(&mut bot, "again").await, CallState::Accepted);
    lab.admin_cli("anna", &["resume", "main", "--yes"]).await;
    lab.kucoin.fault(rejection());
    bot.send(named("again", spot_order("third"))).await.unwrap();
    assert_eq!(state_of_call(&mut bot, "again").await, CallState::Rejected);
    bot.send(named("again", futures_order("fourth")))
        .await
        .unwrap();
    let known = outcome(&mut bot, by_id("again")).await;
    assert_eq!(known.state(), CallState::Accepted);
    assert_eq!(known.endpoint, "futures.post.v1-orders");
    lab.stop().await;
}

#[tokio::test]
async fn call_that_could_not_be_sent_is_not_placed_until_another_one_claims_its_order() {
    let ca = credbroker_sim::pki::Ca::new("CA of a simulated exchange").unwrap();
    let settings = Settings {
        kucoin: KucoinSettings {
            tls: Some(tls_of(&ca)),
            limits: Limits::none(),
            ..KucoinSettings::default()
        },
        proxy: true,
        files: vec![("exchange-ca.pem", ca.certificate_pem().to_owned())],
        egress: "warm_connections = 0\nroots = \"exchange-ca.pem\"".to_owned(),
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    lab.until_keys_tested().await;
    // The other end never replies, so connecting takes until the deadline.
    lab.proxy().silence();
    let deadline = Duration::from_millis(200);
    let mut bot = lab.patient_bot("maker").await;
    until("connections of key tests are gone", async || {
        let mut bot = lab.patient_bot("maker").await;
        refusal(bot.send_within(accounts(), deadline).await).2 == "not_sent"
    })
    .await;
    let unsent = bot.send_within(named("unsent", spot_order("a")), deadline);
    assert_eq!(refusal(unsent.await).2, "not_sent");
    assert_eq!(
        state_of_call(&mut bot, "unsent").await,
        CallState::NotPlaced
    );
    assert_eq!(state_of_order(&mut bot, "a").await, CallState::NotPlaced);
    // The same order under another request id is in flight.
    let sending = tokio::spawn({
        let mut bot = bot.clone();
        async move { bot.send(named("other", spot_order("a"))).await }
    });
    until("the order is claimed", async || {
        let mut bot = lab.patient_bot("maker").await;
        state_of_order(&mut bot, "a").await == CallState::InFlight
    })
    .await;
    assert_eq!(state_of_call(&mut bot, "unsent").await, CallState::Unknown);
    assert_eq!(state_of_call(&mut bot, "other").await, CallState::InFlight);
    sending.abort();
    lab.stop().await;
}

#[tokio::test]
async fn bot_asks_about_its_own_calls_and_about_orders_of_accounts_that_it_may_read() {
    let rules = RULES.to_owned()
        + &grant(
            "reader",
            "main",
            "spot-margin",
            "\"spot.post.v1-hf-orders\"",
        )
        + &grant(
            "trader",
            "main",
            "spot-margin",
            "\"trade\", \"spot.get.v1-accounts\"",
        );
    let mut lab = Lab::with(Settings {
        rules,
        ..Settings::default()
    })
    .await;
    let mut maker = lab.patient_bot("maker").await;
    maker
        .send(named("mine", spot_order("order")))
        .await
        .unwrap();
    let mut reader = lab.patient_bot("reader").await;
    assert_eq!(state_of_call(&mut reader, "mine").await, CallState::Unknown);
    assert_eq!(
        state_of_order(&mut reader, "order").await,
        CallState::Accepted
    );
    let mut trader = lab.patient_bot("trader").await;
    let (code, reason, message) = refused(&mut trader, by_oid("main", "order")).await;
    assert_eq!(
        (code, reason.as_str()),
        (Code::PermissionDenied, "POLICY_DENIED")
    );
    assert_eq!(
        message,
        "no rule grants class \"read\" to this bot on account main in scope spot-margin"
    );
    let (_, reason, message) = refused(&mut reader, by_oid("other", "order")).await;
    assert_eq!(reason, "POLICY_DENIED");
    assert!(message.contains("unknown or not granted"), "{message}");
    let mut unknown = lab.patient_bot("unknown").await;
    for question in [by_id("mine"), by_oid("main", "order")] {
        assert_eq!(refused(&mut unknown, question).await.1, "CALLER_UNKNOWN");
    }
    let maker_name = "spiffe://demo.test/bot/maker";
    lab.admin_cli("anna", &["bots", "block", maker_name]).await;
    for question in [by_id("mine"), by_oid("main", "order")] {
        assert_eq!(refused(&mut maker, question).await.1, "CALLER_BLOCKED");
    }
    // Refused questions are audited like other refused calls.
    let denied = lab.audit();
    let denied = denied.iter().filter(|line| line["event"] == "denied");
    let reasons: Vec<_> = denied
        .map(|line| line["reason"].as_str().unwrap())
        .collect();
    assert_eq!(reasons.len(), 6, "{reasons:?}");
    lab.stop().await;
}

#[tokio::test]
async fn malformed_question_is_refused_with_its_fields() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let either = "request_id: expected either request_id alone, or account, scope and client_oid";
    let both = GetOutcomeRequest {
        request_id: "id".to_owned(),
        ..by_oid("main", "oid")
    };
    let no_scope = GetOutcomeRequest {
        scope: Scope::Unspecified.into(),
        ..by_oid("main", "oid")
    };
    let unknown_scope = GetOutcomeRequest {
        scope: 99,
        ..GetOutcomeRequest::default()
    };
    for (question, expected) in [
        (GetOutcomeRequest::default(), vec![either]),
        (both, vec![either]),
        (
            by_id("a b"),
            vec!["request_id: expected 1 to 64 characters"],
        ),
        (no_scope, vec!["scope: expected SCOPE_SPOT_MARGIN"]),
        (by_oid("main", ""), vec!["client_oid: expected"]),
        (unknown_scope, vec!["account: ", "scope: ", "client_oid: "]),
    ] {
        let (code, reason, message) = refused(&mut bot, question).await;
        assert_eq!(
            (code, reason.as_str()),
            (Code::InvalidArgument, "REQUEST_MALFORMED")
        );
        for part in expected {
            assert!(message.contains(part), "{part} is not in {message}");
        }
    }
    lab.stop().await;
}

#[tokio::test]
async fn outcomes_survive_a_kill_of_the_broker() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    lab.until_keys_tested().await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(named("r-accepted", spot_order("accepted")))
        .await
        .unwrap();
    lab.kucoin.fault(rejection());
    bot.send(named("r-rejected", spot_order("rejected")))
        .await
        .unwrap();
    bot.send(named("r-cancel", spot_cancel_all()))
        .await
        .unwrap();
    bot.send(named("twice", spot_order("one"))).await.unwrap();
    lab.kucoin.fault(rejection());
    bot.send(named("twice", spot_order("two"))).await.unwrap();
    lab.kucoin.fault(Fault::once(ORDERS, STALL));
    let before = lab.kucoin.received().len();
    let mut other = bot.clone();
    tokio::spawn(async move { other.send(named("r-stalls", spot_order("stalls"))).await });
    until("the order is sent", async || {
        lab.kucoin.received().len() > before
    })
    .await;
    lab.process().signal("KILL");
    lab.process().exit_code().await;

    lab.spawn_broker().await;
    lab.until_ready().await;
    let mut bot = lab.patient_bot("maker").await;
    for (id, state) in [
        ("r-accepted", CallState::Accepted),
        ("r-rejected", CallState::Rejected),
        ("r-cancel", CallState::Accepted),
        ("twice", CallState::Rejected),
        ("r-stalls", CallState::MaybeSent),
        ("r-never", CallState::Unknown),
    ] {
        assert_eq!(state_of_call(&mut bot, id).await, state, "{id}");
    }
    for (oid, state) in [
        ("accepted", CallState::Accepted),
        ("rejected", CallState::NotPlaced),
        ("one", CallState::Accepted),
        ("stalls", CallState::MaybeSent),
        ("never", CallState::NotPlaced),
    ] {
        assert_eq!(state_of_order(&mut bot, oid).await, state, "{oid}");
    }
    assert_eq!(
        outcome(&mut bot, by_oid("main", "one")).await.endpoint,
        PLACE
    );
}

#[tokio::test]
async fn outcome_is_served_while_the_account_is_halted_and_while_the_broker_stops() {
    let mut lab = Lab::with(Settings {
        process: true,
        config: "[limits]\ncalls_in_flight_per_bot = 2\ndrain_timeout_ms = 600000\ndefault_deadline_ms = 600000".to_owned(),
        ..Settings::default()
    })
    .await;
    lab.until_keys_tested().await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(named("r-first", spot_order("first")))
        .await
        .unwrap();
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once(ORDERS, STALL)
    });
    let before = lab.kucoin.received().len();
    for oid in ["stalls-1", "stalls-2"] {
        let mut bot = bot.clone();
        tokio::spawn(async move { bot.send(named(oid, spot_order(oid))).await });
    }
    until("the orders are sent", async || {
        lab.kucoin.received().len() == before + 2
    })
    .await;
    // All calls in flight of the bot are used.
    assert_eq!(refusal(bot.send(accounts()).await).1, "OVERLOADED");
    assert_eq!(
        state_of_call(&mut bot, "stalls-1").await,
        CallState::InFlight
    );
    lab.admin_cli("anna", &["halt", "--all"]).await;
    terminate(&mut lab).await;
    let mut new = lab.patient_bot("maker").await;
    for bot in [&mut bot, &mut new] {
        assert_eq!(state_of_call(bot, "r-first").await, CallState::Accepted);
        assert_eq!(state_of_order(bot, "stalls-2").await, CallState::InFlight);
        assert_eq!(state_of_order(bot, "never").await, CallState::NotPlaced);
    }
}

#[tokio::test]
async fn nothing_is_not_placed_for_sure_after_audit_lines_are_missing() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    lab.until_keys_tested().await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(named("r-known", spot_order("known")))
        .await
        .unwrap();
    lab.process().terminate();
    lab.process().exit_code().await;
    // As if the broker had run for longer, and the log of the first hours was lost.
    std::fs::write(lab.path("state/orders.json"), "{\"since_ms\": 1000}\n").unwrap();
    lab.is_audit_checked = false;
    lab.spawn_broker().await;
    until("the gap is reported", async || {
        lab.get("/readyz").await.1.contains("orders accept-gap")
    })
    .await;
    lab.until_keys_tested().await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(state_of_order(&mut bot, "never").await, CallState::Unknown);
    assert_eq!(state_of_order(&mut bot, "known").await, CallState::Accepted);
    assert_eq!(
        state_of_call(&mut bot, "r-known").await,
        CallState::Accepted
    );
    // Nor once the gap is accepted, also after another start.
    let accepted = lab.admin_cli("anna", &["orders", "accept-gap"]).await;
    assert_eq!(accepted.code, Some(0), "{accepted:?}");
    assert_eq!(state_of_order(&mut bot, "never").await, CallState::Unknown);
    lab.process().terminate();
    lab.process().exit_code().await;
    lab.spawn_broker().await;
    lab.until_ready().await;
    lab.until_keys_tested().await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(state_of_order(&mut bot, "never").await, CallState::Unknown);
    assert_eq!(state_of_order(&mut bot, "known").await, CallState::Accepted);
}

#[tokio::test]
async fn batch_has_the_outcome_of_its_call_and_of_each_order() {
    let mut lab = Lab::start().await;
    lab.until_keys_tested().await;
    let mut bot = lab.patient_bot("maker").await;
    let order = |oid: &str| json!({"clientOid": oid, "side": "buy", "symbol": "BTC-USDT", "type": "limit", "price": "10000", "size": "0.001"});
    let body = json!({"orderList": [order("a"), order("b")]});
    let batch = request(
        Scope::SpotMargin,
        Method::Post,
        "/api/v1/hf/orders/multi",
        &body.to_string(),
    );
    bot.send(named("batch", batch)).await.unwrap();
    assert_eq!(state_of_call(&mut bot, "batch").await, CallState::Accepted);
    for oid in ["a", "b"] {
        let known = outcome(&mut bot, by_oid("main", oid)).await;
        assert_eq!(known.state(), CallState::Accepted);
        assert_eq!(known.endpoint, "spot.post.v1-hf-orders-multi");
    }
    assert!(
        lab.metric("orders_claims")
            .await
            .is_some_and(|claims| claims >= 2.0)
    );
    let share = lab.metric("orders_claims_share").await;
    assert!(
        share.is_some_and(|share| share > 0.0 && share < 0.001),
        "{share:?}"
    );
    lab.stop().await;
}
