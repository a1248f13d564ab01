//! Outcomes of requests when the network path to the exchange fails: they are reported correctly, and no order is sent
//! twice.

use std::time::Duration;

use credbroker::proto::{Method, Outcome, Scope};
use credbroker_sim::installation::{MAIN_UID, RULES, Settings, secret};
use credbroker_sim::kucoin::{Fault, FaultAction, KucoinSettings, Limits, SimKey, When};
use tonic::Code;
use tonic_types::StatusExt;

use crate::harness::{
    Lab, accounts, failure, json_of, refusal, request, spot_cancel_all, spot_order, until,
};

const ORDERS: &str = "/api/v1/hf/orders";

fn lost() -> (Code, String, String) {
    (
        Code::Unknown,
        "ANSWER_LOST".to_owned(),
        "maybe_sent".to_owned(),
    )
}

fn orders_received(lab: &Lab) -> usize {
    lab.kucoin
        .received()
        .iter()
        .filter(|request| request.path() == ORDERS)
        .count()
}

#[tokio::test]
async fn order_is_maybe_sent_and_never_sent_twice_when_the_answer_is_lost() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let faults = [
        FaultAction::Close {
            when: When::AfterProcessing,
        },
        FaultAction::Close {
            when: When::BeforeProcessing,
        },
        FaultAction::CutShort { bytes: 10 },
        FaultAction::Oversized { megabytes: 17 },
    ];
    for (index, action) in faults.into_iter().enumerate() {
        lab.kucoin.fault(Fault::once(ORDERS, action.clone()));
        let before = orders_received(&lab);
        let error = refusal(bot.send(spot_order(&format!("lost-{index}"))).await);
        assert_eq!(error, lost(), "{action:?}");
        assert_eq!(orders_received(&lab), before + 1, "{action:?}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn ambiguous_answer_is_maybe_sent_and_a_clear_rejection_is_rejected() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let html = |status| FaultAction::Html {
        status,
        when: When::AfterProcessing,
    };
    let json = |status, code: &str| FaultAction::Answer {
        status,
        body: serde_json::json!({"code": code, "msg": "simulated"}),
        when: When::BeforeProcessing,
    };
    let cases = [
        (html(502), Outcome::MaybeSent),
        (json(500, "500000"), Outcome::MaybeSent),
        (json(200, "400100"), Outcome::Rejected),
        // Last, since no more orders are sent after it for a while.
        (html(429), Outcome::Rejected),
    ];
    for (index, (action, outcome)) in cases.into_iter().enumerate() {
        lab.kucoin.fault(Fault::once(ORDERS, action.clone()));
        let answer = bot
            .send(spot_order(&format!("unclear-{index}")))
            .await
            .unwrap();
        assert_eq!(answer.outcome(), outcome, "{action:?}");
    }
    assert_eq!(orders_received(&lab), 4);
    lab.stop().await;
}

#[tokio::test]
async fn read_is_sent_once_more_when_the_answer_is_lost() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let close = || {
        Fault::once(
            "/api/v1/accounts",
            FaultAction::Close {
                when: When::AfterProcessing,
            },
        )
    };
    lab.kucoin.fault(close());
    assert_eq!(
        bot.send(accounts()).await.unwrap().outcome(),
        Outcome::Accepted
    );
    let received = lab.kucoin.received();
    assert_eq!(received.len(), 2);
    let signature = |index: usize| received[index].header("kc-api-sign").unwrap().to_owned();
    let timestamp = |index: usize| {
        received[index]
            .header("kc-api-timestamp")
            .unwrap()
            .to_owned()
    };
    assert!(
        signature(0) != signature(1) || timestamp(0) == timestamp(1),
        "a retry signs again"
    );
    lab.kucoin.fault(close());
    lab.kucoin.fault(close());
    assert_eq!(
        refusal(bot.send(accounts()).await),
        lost(),
        "a read is retried only once"
    );
    assert_eq!(lab.kucoin.received().len(), 4);
    lab.stop().await;
}

#[tokio::test]
async fn bot_gets_maybe_sent_at_its_deadline_and_the_late_answer_is_audited() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    lab.kucoin
        .fault(Fault::once(ORDERS, FaultAction::Delay { ms: 600 }));
    let mut order = spot_order("late");
    order.request_id = "late".to_owned();
    let error = bot
        .send_within(order, Duration::from_millis(300))
        .await
        .unwrap_err();
    let (code, reason, outcome, id) = failure(&error);
    assert_eq!((code, reason, outcome), lost());
    assert_eq!(id, "late");
    until("the late answer is audited", async || {
        lab.audit_of("late").len() == 3
    })
    .await;
    let lines = lab.audit_of("late");
    let events: Vec<_> = lines
        .iter()
        .map(|line| (&line["event"], &line["outcome"]))
        .collect();
    assert_eq!(lines[1]["reason"], "ANSWER_LOST");
    assert_eq!(events[1], (&"outcome".into(), &"maybe_sent".into()));
    assert_eq!(events[2], (&"late_answer".into(), &"accepted".into()));
    assert_eq!(lab.stop().await, 0);
}

#[tokio::test]
async fn order_is_not_sent_when_its_deadline_passes_during_connect() {
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
    // The other end never replies, so the TLS handshake takes until its timeout.
    lab.proxy().silence();
    let deadline = Duration::from_millis(200);
    until("connections of key tests are gone", async || {
        let mut bot = lab.patient_bot("maker").await;
        refusal(bot.send_within(accounts(), deadline).await).2 == "not_sent"
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    let error = refusal(bot.send_within(spot_order("never"), deadline).await);
    assert_eq!(
        error,
        (
            Code::DeadlineExceeded,
            "DEADLINE_EXCEEDED".to_owned(),
            "not_sent".to_owned()
        )
    );
    assert!(lab.kucoin.received().is_empty());
    assert_eq!(lab.stop().await, 0);
}

/// A read may be sent again when its answer is lost, but not after the bot has got its outcome.
#[tokio::test]
async fn read_is_not_sent_again_after_its_deadline() {
    let mut lab = Lab::with(Settings {
        egress: "answer_timeout_ms = 600".to_owned(),
        ..Settings::default()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    let mut read = accounts();
    read.request_id = "late".to_owned();
    let when = When::BeforeProcessing;
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once(&read.path, FaultAction::Stall { when })
    });
    let error = bot.send_within(read, Duration::from_millis(300)).await;
    assert_eq!(refusal(error), lost());
    // It is dropped: nothing waits for its late answer, and the stop does not, either.
    until("the exchange's connection is closed", async || {
        lab.kucoin.in_progress() == 0
    })
    .await;
    assert_eq!(lab.audit_of("late").len(), 2);
    assert_eq!(lab.kucoin.received().len(), 1);
    assert_eq!(lab.stop().await, 0);
}

#[tokio::test]
async fn answer_timeout_ms_limits_the_wait_for_the_exchange() {
    let settings = Settings {
        egress: "answer_timeout_ms = 200".to_owned(),
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    let mut bot = lab.bot("maker").await;
    lab.kucoin.fault(Fault::once(
        ORDERS,
        FaultAction::Stall {
            when: When::AfterProcessing,
        },
    ));
    let error = bot.send(spot_order("stalled")).await.unwrap_err();
    assert!(
        error
            .message()
            .contains("no complete answer came within 200 ms"),
        "{}",
        error.message()
    );
    assert_eq!(refusal(Err(error)), lost());
    lab.stop().await;
}

#[tokio::test]
async fn outcome_is_audited_when_the_bot_disconnects() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    lab.kucoin
        .fault(Fault::once(ORDERS, FaultAction::Delay { ms: 300 }));
    let mut order = spot_order("hang-up");
    order.request_id = "hang-up".to_owned();
    let call = tokio::spawn(async move { bot.send(order).await });
    until("the intent is audited", async || {
        lab.audit_of("hang-up").len() == 1
    })
    .await;
    call.abort();
    until("the outcome is audited", async || {
        lab.audit_of("hang-up").len() == 2
    })
    .await;
    assert_eq!(lab.audit_of("hang-up")[1]["outcome"], "accepted");
    assert_eq!(lab.kucoin.orders(MAIN_UID).len(), 1);
    lab.stop().await;
}

#[tokio::test]
async fn order_is_not_sent_and_may_be_retried_when_the_exchange_is_unreachable() {
    let settings = Settings {
        proxy: true,
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    let mut bot = lab.bot("maker").await;
    lab.proxy().close();
    let error = bot.send(spot_order("never")).await.unwrap_err();
    assert!(error.get_details_retry_info().is_some());
    assert_eq!(
        refusal(Err(error)),
        (
            Code::Unavailable,
            "EXCHANGE_UNREACHABLE".to_owned(),
            "not_sent".to_owned()
        )
    );
    assert_eq!(lab.stop().await, 0);
}

#[tokio::test]
async fn rate_limit_headers_are_returned_as_numbers() {
    let mut limits = Limits::none();
    limits.pools.insert("Spot".to_owned(), 2);
    let kucoin = KucoinSettings {
        limits,
        ..KucoinSettings::default()
    };
    let mut lab = Lab::with(Settings {
        kucoin,
        ..Settings::default()
    })
    .await;
    let mut bot = lab.bot("maker").await;
    let first = bot.send(spot_order("limit-1")).await.unwrap();
    let limit = first.rate_limit.unwrap();
    assert_eq!((limit.limit, limit.remaining), (2, 1));
    bot.send(spot_order("limit-2")).await.unwrap();
    // The broker would not send an order now.
    let third = bot.send(spot_cancel_all()).await.unwrap();
    assert_eq!((third.http_status, third.code.as_str()), (429, "429000"));
    assert_eq!(third.outcome(), Outcome::Rejected);
    assert!((1..=30_000).contains(&third.retry_after_ms.unwrap()));
    lab.stop().await;
}

#[tokio::test]
async fn connections_leave_from_the_egress_address_and_are_reused() {
    let mut lab = Lab::with(Settings {
        address: "127.0.0.2",
        ..Settings::default()
    })
    .await;
    let key = SimKey {
        ip_whitelist: vec![[127, 0, 0, 2].into()],
        ..SimKey::fake(MAIN_UID)
    };
    lab.kucoin.add_key(key);
    // A test of a key at the same time needs a connection of its own.
    lab.until_keys_tested().await;
    let mut bot = lab.bot("maker").await;
    for index in 0..10 {
        let placed = bot
            .send(spot_order(&format!("kept-{index}")))
            .await
            .unwrap();
        assert_eq!(placed.outcome(), Outcome::Accepted, "{placed:?}");
    }
    let mut peers: Vec<_> = lab
        .kucoin
        .received()
        .iter()
        .map(|request| request.peer)
        .collect();
    peers.dedup();
    assert_eq!(peers.len(), 1, "all calls must use the same connection");
    assert_eq!(peers[0].ip().to_string(), "127.0.0.2");
    lab.stop().await;
}

/// The TLS settings of a simulated exchange.
pub(crate) fn tls_of(ca: &credbroker_sim::pki::Ca) -> std::sync::Arc<rustls::ServerConfig> {
    tls_with(&ca.server().unwrap())
}

/// The TLS settings of a server with this certificate and key.
pub(crate) fn tls_with(
    identity: &credbroker_sim::pki::Identity,
) -> std::sync::Arc<rustls::ServerConfig> {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let certificate = CertificateDer::from_pem_slice(identity.certificate_pem.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).unwrap();
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let builder = rustls::ServerConfig::builder_with_provider(provider.into());
    let builder = builder
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth();
    std::sync::Arc::new(builder.with_single_cert(vec![certificate], key).unwrap())
}

#[tokio::test]
async fn exchange_certificate_is_verified_against_the_configured_roots_only() {
    for (roots, is_trusted) in [
        ("roots = \"exchange-ca.pem\"", true),
        ("roots = \"mozilla\"", false),
    ] {
        let ca = credbroker_sim::pki::Ca::new("CA of a simulated exchange").unwrap();
        let kucoin = KucoinSettings {
            tls: Some(tls_of(&ca)),
            limits: Limits::none(),
            ..KucoinSettings::default()
        };
        let files = vec![("exchange-ca.pem", ca.certificate_pem().to_owned())];
        let settings = Settings {
            kucoin,
            files,
            egress: roots.to_owned(),
            wait_ready: is_trusted,
            ..Settings::default()
        };
        let mut lab = Lab::with(settings).await;
        lab.until_keys_loaded().await;
        let mut bot = lab.bot("maker").await;
        if is_trusted {
            let placed = bot.send(spot_order("tls")).await.unwrap();
            assert_eq!(placed.outcome(), Outcome::Accepted);
        } else {
            // No order is sent: an untrusted server cannot verify the egress address.
            let refused = refusal(bot.send(spot_order("tls")).await).1;
            assert_eq!(refused, "EGRESS_MISMATCH");
            let refused = refusal(bot.send(accounts()).await).1;
            assert_eq!(refused, "EXCHANGE_UNREACHABLE");
        }
        lab.stop().await;
    }
}

#[tokio::test]
async fn redirect_is_returned_to_the_bot_and_not_followed() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let action = FaultAction::Answer {
        status: 307,
        body: serde_json::json!({}),
        when: When::BeforeProcessing,
    };
    lab.kucoin.fault(Fault::once("/api/v1/accounts", action));
    let answer = bot.send(accounts()).await.unwrap();
    assert_eq!(answer.http_status, 307);
    assert_eq!(json_of(&answer), serde_json::json!({}));
    assert_eq!(lab.kucoin.received().len(), 1);
    lab.stop().await;
}

#[tokio::test]
async fn nothing_is_sent_for_a_partner_account_without_a_partner_key() {
    let partner = "[account.main]\nkey = { spot-margin = \"main\" }\n\
                   [account.main.partner.spot-margin]\nid = \"FakePartner\"\n\
                   [[grant]]\nbot = \"spiffe://demo.test/bot/maker\"\naccount = \"main\"\nscope = \"spot-margin\"\n\
                   allow = [\"read\"]\n";
    let settings = Settings {
        rules: partner.to_owned(),
        keys: vec![("main", "main", MAIN_UID)],
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    assert_eq!(
        secret(&SimKey::fake(MAIN_UID))["partner_key"],
        serde_json::Value::Null
    );
    let mut bot = lab.bot("maker").await;
    let read = request(Scope::SpotMargin, Method::Get, "/api/v1/accounts", "");
    let error = bot.send(read).await.unwrap_err();
    assert!(
        error.message().contains("partner_key"),
        "{}",
        error.message()
    );
    assert_eq!(refusal(Err(error)).1, "KEY_UNAVAILABLE");
    assert!(lab.kucoin.received().is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn read_is_maybe_sent_when_its_retry_cannot_connect() {
    // The exchange receives one request and becomes unreachable, so the second attempt cannot connect.
    let settings = Settings {
        proxy: true,
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    let stall = FaultAction::Stall {
        when: When::AfterProcessing,
    };
    lab.kucoin.fault(Fault::once("/api/v1/accounts", stall));
    let mut bot = lab.bot("maker").await;
    let call = tokio::spawn(async move { bot.send(accounts()).await });
    until("the request has arrived", async || {
        !lab.kucoin.received().is_empty()
    })
    .await;
    lab.proxy().close();
    assert_eq!(refusal(call.await.unwrap()), lost());
    lab.stop().await;
}

#[tokio::test]
async fn calls_without_a_key_do_not_use_up_connections() {
    let grant = "[[grant]]\nbot = \"spiffe://demo.test/bot/maker\"\naccount = \"other\"\n\
                 scope = \"spot-margin\"\nallow = [\"read\", \"trade\"]\n";
    let settings = Settings {
        rules: format!("{RULES}{grant}"),
        // Vault has no key for account `other`.
        keys: vec![("main", "main", MAIN_UID)],
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    let mut bot = lab.bot("maker").await;
    bot.send(spot_order("before")).await.unwrap();
    for _ in 0..5 {
        let mut never = spot_order("never");
        "other".clone_into(&mut never.account);
        assert_eq!(refusal(bot.send(never).await).1, "KEY_UNAVAILABLE");
    }
    bot.send(spot_order("after")).await.unwrap();
    let peers: Vec<_> = lab
        .kucoin
        .received()
        .iter()
        .map(|request| request.peer)
        .collect();
    assert_eq!(peers[0], peers[1], "the same connection as before");
    lab.stop().await;
}
