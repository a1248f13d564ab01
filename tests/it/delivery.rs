//! What becomes of a request when the way to the exchange fails: told honestly, never sent twice unless harmless.

use std::time::Duration;

use credbroker::proto::{Method, Outcome, Scope};
use credbroker_sim::installation::{MAIN_UID, RULES, Settings, secret};
use credbroker_sim::kucoin::{Fault, FaultAction, KucoinSettings, Limits, SimKey, When};
use tonic::Code;
use tonic_types::StatusExt;

use crate::harness::{Lab, accounts, failure, json_of, refusal, request, spot_order, until};

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
async fn an_order_whose_answer_is_lost_is_maybe_sent_and_never_sent_again() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let faults = [
        FaultAction::Close {
            when: When::AfterTaken,
        },
        FaultAction::Close {
            when: When::BeforeTaken,
        },
        FaultAction::CutShort { bytes: 10 },
        FaultAction::Oversized { megabytes: 17 },
    ];
    for (index, action) in faults.into_iter().enumerate() {
        lab.kucoin.fault(Fault::once(ORDERS, action.clone()));
        let before = orders_received(&lab);
        let ended = refusal(bot.send(spot_order(&format!("lost-{index}"))).await);
        assert_eq!(ended, lost(), "{action:?}");
        assert_eq!(orders_received(&lab), before + 1, "{action:?}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn an_answer_that_does_not_tell_is_maybe_sent_and_a_refusal_is_rejected() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let html = |status| FaultAction::Html {
        status,
        when: When::AfterTaken,
    };
    let json = |status, code: &str| FaultAction::Answer {
        status,
        body: serde_json::json!({"code": code, "msg": "simulated"}),
        when: When::BeforeTaken,
    };
    let cases = [
        (html(502), Outcome::MaybeSent),
        (html(429), Outcome::Rejected),
        (json(500, "500000"), Outcome::MaybeSent),
        (json(200, "400100"), Outcome::Rejected),
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
async fn a_read_whose_answer_is_lost_is_sent_once_more() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let close = || {
        Fault::once(
            "/api/v1/accounts",
            FaultAction::Close {
                when: When::AfterTaken,
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
    assert_eq!(refusal(bot.send(accounts()).await), lost(), "but only once");
    assert_eq!(lab.kucoin.received().len(), 4);
    lab.stop().await;
}

#[tokio::test]
async fn the_bot_is_told_before_its_deadline_and_the_rest_is_learnt() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    lab.kucoin
        .fault(Fault::once(ORDERS, FaultAction::Delay { ms: 600 }));
    let mut order = spot_order("late");
    order.request_id = "late".to_owned();
    let ended = bot
        .send_within(order, Duration::from_millis(300))
        .await
        .unwrap_err();
    let (code, reason, outcome, id) = failure(&ended);
    assert_eq!((code, reason, outcome), lost());
    assert_eq!(id, "late");
    until("the late answer is recorded", async || {
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
async fn a_deadline_that_passes_before_anything_was_sent_says_so_and_nothing_is_sent() {
    let ca = credbroker_sim::pki::Ca::new("CA of a simulated exchange").unwrap();
    let settings = Settings {
        kucoin: KucoinSettings {
            tls: Some(tls_of(&ca)),
            limits: Limits::none(),
            ..KucoinSettings::default()
        },
        road: true,
        files: vec![("exchange-ca.pem", ca.certificate_pem().to_owned())],
        egress: "warm_connections = 0\nroots = \"exchange-ca.pem\"".to_owned(),
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    let mut bot = lab.patient_bot("maker").await;
    // TLS to somebody who never speaks: connecting takes as long as it may.
    lab.road().silence();
    let ended = refusal(
        bot.send_within(spot_order("never"), Duration::from_millis(200))
            .await,
    );
    assert_eq!(
        ended,
        (
            Code::DeadlineExceeded,
            "DEADLINE_EXCEEDED".to_owned(),
            "not_sent".to_owned()
        )
    );
    assert!(lab.kucoin.received().is_empty());
    assert_eq!(lab.stop().await, 0);
}

/// What its bot was told stays true: a read may go twice, but not after that.
#[tokio::test]
async fn a_read_that_loses_its_answer_after_its_deadline_is_not_sent_again() {
    let mut lab = Lab::with(Settings {
        egress: "answer_timeout_ms = 600".to_owned(),
        ..Settings::default()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    let mut read = accounts();
    read.request_id = "late".to_owned();
    let when = When::BeforeTaken;
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once(&read.path, FaultAction::Stall { when })
    });
    let ended = bot.send_within(read, Duration::from_millis(300)).await;
    assert_eq!(refusal(ended), lost());
    until("what was learnt is recorded", async || {
        lab.audit_of("late").len() == 3
    })
    .await;
    assert_eq!(lab.audit_of("late")[2]["event"], "late_answer");
    assert_eq!(lab.kucoin.received().len(), 1);
    assert_eq!(lab.stop().await, 0);
}

#[tokio::test]
async fn the_brokers_own_wait_for_the_exchange_has_a_limit_of_its_own() {
    let settings = Settings {
        egress: "answer_timeout_ms = 200".to_owned(),
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    let mut bot = lab.bot("maker").await;
    lab.kucoin.fault(Fault::once(
        ORDERS,
        FaultAction::Stall {
            when: When::AfterTaken,
        },
    ));
    let ended = bot.send(spot_order("stalled")).await.unwrap_err();
    assert!(
        ended
            .message()
            .contains("no complete answer came within 200 ms"),
        "{}",
        ended.message()
    );
    assert_eq!(refusal(Err(ended)), lost());
    lab.stop().await;
}

#[tokio::test]
async fn a_bot_that_hangs_up_still_gets_its_outcome_recorded() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    lab.kucoin
        .fault(Fault::once(ORDERS, FaultAction::Delay { ms: 300 }));
    let mut order = spot_order("hang-up");
    order.request_id = "hang-up".to_owned();
    let call = tokio::spawn(async move { bot.send(order).await });
    until("the request has left", async || {
        lab.audit_of("hang-up").len() == 1
    })
    .await;
    call.abort();
    until("the outcome is recorded", async || {
        lab.audit_of("hang-up").len() == 2
    })
    .await;
    assert_eq!(lab.audit_of("hang-up")[1]["outcome"], "accepted");
    assert_eq!(lab.kucoin.orders(MAIN_UID).len(), 1);
    lab.stop().await;
}

#[tokio::test]
async fn an_exchange_that_cannot_be_reached_is_not_sent_and_may_be_retried() {
    let settings = Settings {
        road: true,
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    let mut bot = lab.bot("maker").await;
    lab.road().close();
    let ended = bot.send(spot_order("never")).await.unwrap_err();
    assert!(ended.get_details_retry_info().is_some());
    assert_eq!(
        refusal(Err(ended)),
        (
            Code::Unavailable,
            "EXCHANGE_UNREACHABLE".to_owned(),
            "not_sent".to_owned()
        )
    );
    assert_eq!(lab.stop().await, 0);
}

#[tokio::test]
async fn a_rate_limit_is_passed_on_as_numbers() {
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
    let third = bot.send(spot_order("limit-3")).await.unwrap();
    assert_eq!((third.http_status, third.code.as_str()), (429, "429000"));
    assert_eq!(third.outcome(), Outcome::Rejected);
    assert!((1..=30_000).contains(&third.retry_after_ms.unwrap()));
    lab.stop().await;
}

#[tokio::test]
async fn connections_come_from_the_egress_address_and_are_kept() {
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
    assert_eq!(
        peers.len(),
        1,
        "one connection serves one call after the other"
    );
    assert_eq!(peers[0].ip().to_string(), "127.0.0.2");
    lab.stop().await;
}

/// TLS of a simulated exchange.
pub(crate) fn tls_of(ca: &credbroker_sim::pki::Ca) -> std::sync::Arc<rustls::ServerConfig> {
    tls_with(&ca.server().unwrap())
}

/// A server's TLS with this certificate and key.
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
async fn the_exchange_is_reached_over_tls_with_the_named_roots_alone() {
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
        lab.until_keys().await;
        let mut bot = lab.bot("maker").await;
        if is_trusted {
            let placed = bot.send(spot_order("tls")).await.unwrap();
            assert_eq!(placed.outcome(), Outcome::Accepted);
        } else {
            // An order is not even tried: whoever answers there has not proven our address.
            let refused = refusal(bot.send(spot_order("tls")).await).1;
            assert_eq!(refused, "EGRESS_MISMATCH");
            let refused = refusal(bot.send(accounts()).await).1;
            assert_eq!(refused, "EXCHANGE_UNREACHABLE");
        }
        lab.stop().await;
    }
}

#[tokio::test]
async fn a_redirect_is_an_answer_and_is_not_followed() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let action = FaultAction::Answer {
        status: 307,
        body: serde_json::json!({}),
        when: When::BeforeTaken,
    };
    lab.kucoin.fault(Fault::once("/api/v1/accounts", action));
    let answer = bot.send(accounts()).await.unwrap();
    assert_eq!(answer.http_status, 307);
    assert_eq!(json_of(&answer), serde_json::json!({}));
    assert_eq!(lab.kucoin.received().len(), 1);
    lab.stop().await;
}

#[tokio::test]
async fn a_partner_without_its_key_sends_nothing() {
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
    let ended = bot.send(read).await.unwrap_err();
    assert!(
        ended.message().contains("partner_key"),
        "{}",
        ended.message()
    );
    assert_eq!(refusal(Err(ended)).1, "KEY_UNAVAILABLE");
    assert!(lab.kucoin.received().is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn a_read_that_left_and_could_not_go_again_is_not_called_unsent() {
    // The exchange takes one request and is gone: the second try finds nobody.
    let settings = Settings {
        road: true,
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    let stall = FaultAction::Stall {
        when: When::AfterTaken,
    };
    lab.kucoin.fault(Fault::once("/api/v1/accounts", stall));
    let mut bot = lab.bot("maker").await;
    let call = tokio::spawn(async move { bot.send(accounts()).await });
    until("the request has arrived", async || {
        !lab.kucoin.received().is_empty()
    })
    .await;
    lab.road().close();
    assert_eq!(refusal(call.await.unwrap()), lost());
    lab.stop().await;
}

#[tokio::test]
async fn calls_without_a_key_take_no_connection_from_others() {
    let grant = "[[grant]]\nbot = \"spiffe://demo.test/bot/maker\"\naccount = \"other\"\n\
                 scope = \"spot-margin\"\nallow = [\"read\", \"trade\"]\n";
    let settings = Settings {
        rules: format!("{RULES}{grant}"),
        // Vault has none for account `other`.
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
