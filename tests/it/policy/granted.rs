//! Granted requests: each is sent unchanged, and nothing else is sent.

use std::fmt::Write as _;

use credbroker::proto::{Method, Scope, SignAndSendRequest};
use credbroker_sim::installation::Settings;
use credbroker_sim::kucoin::{Host, Signature};

use super::{Arena, CATALOGUE, CLASSES, SCOPES, filled, method_of, on, parameter, scope_of, word};
use crate::harness::{Lab, refusal};

/// Rules with one bot per class, in every scope, on an account without restrictions.
fn class_rules() -> String {
    let mut rules = "[account.main]\nallow_money_out = true\n\
                     key = { spot-margin = \"main\", futures = \"main\", unified = \"main\" }\n"
        .to_owned();
    for class in CLASSES {
        for scope in SCOPES.map(word) {
            writeln!(
 rules,
                "[[grant]]\nbot = \"spiffe://demo.test/bot/{class}\"\naccount = \"main\"\nscope = \"{scope}\"\nallow = [\"{class}\"]\nclient_oid = \"optional\""
            ).unwrap();
        }
    }
    rules
}

#[tokio::test]
async fn class_grant_allows_exactly_the_catalogue_endpoints_of_its_class() {
    let mut lab = Lab::with(Settings {
        rules: class_rules(),
        ..Settings::default()
    })
    .await;
    let supported: Vec<_> = CATALOGUE
        .iter()
        .filter_map(|endpoint| Some((endpoint, scope_of(endpoint)?)))
        .collect();
    assert_eq!(supported.len(), 561);
    for class in CLASSES {
        let before = lab.kucoin.received().len();
        let mut bot = lab.bot(class).await;
        let mut sent = Vec::new();
        for (endpoint, scope) in &supported {
            let (id, path) = (
                endpoint["id"].as_str().unwrap(),
                filled(endpoint, "67fe0c1a"),
            );
            let mut request = on("main", *scope, method_of(endpoint), &path);
            if method_of(endpoint) == Method::Post {
                request.body = "{}".into();
            }
            let answer = bot.send(request).await;
            let is_documented = endpoint["status"] != "undocumented";
            let has_lookup =
                endpoint["effect"] != "place" || endpoint["order"]["lookup"].is_object();
            let is_grantable = endpoint["grantable"] != false && is_documented && has_lookup;
            if endpoint["risk"] == class && is_grantable {
                answer.unwrap_or_else(|status| panic!("{class} does not grant {id}: {status:?}"));
                sent.push((*endpoint, *scope, path));
            } else {
                assert_eq!(refusal(answer).1, "POLICY_DENIED", "{class} grants {id}");
            }
        }
        assert!(sent.len() > 25, "{class} has {} endpoints", sent.len());
        let received = lab.kucoin.received().split_off(before);
        assert_eq!(received.len(), sent.len(), "{class}");
        for (arrived, (endpoint, scope, path)) in received.iter().zip(sent) {
            let id = endpoint["id"].as_str().unwrap();
            assert_eq!(
                (arrived.endpoint.as_deref(), arrived.path()),
                (Some(id), path.as_str())
            );
            assert_eq!(
                arrived.host == Host::Futures,
                scope == Scope::Futures,
                "{id}"
            );
            let has_key = arrived
                .headers
                .iter()
                .any(|(name, _)| name.starts_with("kc-"));
            assert_eq!(has_key, class != "public", "KC headers of {id}");
            let expected = if has_key {
                Signature::Verified
            } else {
                Signature::Unchecked
            };
            assert_eq!(arrived.signature, expected, "{id}");
        }
    }
    lab.stop().await;
}

#[tokio::test]
async fn endpoint_granted_by_name_accepts_any_id_that_is_not_a_literal_path() {
    let mut arena = Arena::start().await;
    let mut picky = arena.bot("picky");
    let ids = [
        "67fe0c1a",
        "cancelAll2",
        "cancel-all",
        "cancelAl",
        "xcancelAll",
        "a.cancelAll",
        "...",
        "~",
    ];
    for id in ids {
        let path = format!("/api/v1/hf/orders/{id}");
        let request = on("main", Scope::SpotMargin, Method::Delete, &path);
        picky
            .send(request)
            .await
            .unwrap_or_else(|status| panic!("{id}: {status:?}"));
    }
    let received = arena.lab.kucoin.received();
    assert_eq!(received.len(), ids.len());
    for arrived in received {
        assert_eq!(
            arrived.endpoint.as_deref(),
            Some("spot.delete.v1-hf-orders-order-id")
        );
        assert_eq!(arrived.signature, Signature::Verified);
    }
    arena.lab.stop().await;
}

#[tokio::test]
async fn withdrawal_is_sent_only_for_the_bot_granted_it_by_name() {
    let mut arena = Arena::start().await;
    let request = SignAndSendRequest {
        body: "{\"currency\":\"USDT\",\"amount\":\"1\"}".into(),
        ..on(
            "treasury",
            Scope::SpotMargin,
            Method::Post,
            "/api/v3/withdrawals",
        )
    };
    assert_eq!(
        refusal(arena.bot("banker").send(request.clone()).await).1,
        "POLICY_DENIED"
    );
    arena.bot("clerk").send(request).await.unwrap();
    let received = arena.lab.kucoin.received();
    assert_eq!(received.len(), 1);
    assert_eq!(
        received[0].endpoint.as_deref(),
        Some("spot.post.v3-withdrawals")
    );
    assert_eq!(
        (&received[0].signature, received[0].uid),
        (&Signature::Verified, Some(1003))
    );
    arena.lab.stop().await;
}

#[tokio::test]
async fn request_to_a_granted_unlisted_endpoint_is_signed_and_sent() {
    let mut arena = Arena::start().await;
    let mut explorer = arena.bot("explorer");
    for unlisted in &super::UNLISTED {
        let request = SignAndSendRequest {
            query: vec![parameter("a b", "c&d")],
            ..on(
                unlisted.account,
                unlisted.scope,
                unlisted.method,
                unlisted.path,
            )
        };
        explorer.send(request).await.unwrap();
        let arrived = arena.lab.kucoin.received().pop().unwrap();
        assert_eq!(arrived.target, format!("{}?a%20b=c%26d", unlisted.path));
        assert_eq!(
            arrived.header("kc-api-key"),
            Some("simulated000000000001003")
        );
        assert!(arrived.header("kc-api-sign").is_some());
        assert_eq!(
            arrived.host == Host::Futures,
            unlisted.scope == Scope::Futures
        );
    }
    arena.lab.stop().await;
}

#[tokio::test]
async fn public_request_is_sent_without_a_key() {
    let mut arena = Arena::start().await;
    let request = on("keyless", Scope::Futures, Method::Get, "/api/v1/timestamp");
    let answer = arena.bot("onlooker").send(request).await.unwrap();
    assert_eq!((answer.code.as_str(), answer.timestamp_ms), ("200000", 0));
    let received = arena.lab.kucoin.received();
    assert_eq!(received.len(), 1);
    assert!(
        received[0]
            .headers
            .iter()
            .all(|(name, _)| !name.starts_with("kc-"))
    );
    arena.lab.stop().await;
}

#[tokio::test]
async fn multi_cancel_delete_is_sent_with_its_body() {
    let mut arena = Arena::start().await;
    let request = SignAndSendRequest {
        body: "{\"orderIdsList\":[\"1\", \"2\"]}".into(),
        ..on(
            "main",
            Scope::Futures,
            Method::Delete,
            "/api/v1/orders/multi-cancel",
        )
    };
    arena.bot("maker").send(request.clone()).await.unwrap();
    let arrived = arena.lab.kucoin.received().pop().unwrap();
    assert_eq!(arrived.body, request.body);
    assert_eq!(arrived.signature, Signature::Verified);
    arena.lab.stop().await;
}

#[tokio::test]
async fn requests_at_the_size_limits_are_sent_unchanged() {
    let mut arena = Arena::start().await;
    let mut maker = arena.bot("maker");
    let value = |bytes: usize| "测".repeat(bytes / 3) + &"x".repeat(bytes % 3);
    let long = SignAndSendRequest {
        query: (0..100).map(|_| parameter("ab", &value(79))).collect(),
        ..on(
            "main",
            Scope::SpotMargin,
            Method::Get,
            &format!("/api/v1/accounts/{}", "x".repeat(1024 - 17)),
        )
    };
    maker.send(long.clone()).await.unwrap();
    let arrived = arena.lab.kucoin.received().pop().unwrap();
    assert_eq!(arrived.path(), long.path);
    assert_eq!(arrived.signature, Signature::Verified);
    let one = SignAndSendRequest {
        query: vec![parameter("a", &value(8191))],
        ..on("main", Scope::SpotMargin, Method::Get, "/api/v1/accounts")
    };
    maker.send(one).await.unwrap();
    assert_eq!(
        arena.lab.kucoin.received().pop().unwrap().signature,
        Signature::Verified
    );
    let large = SignAndSendRequest {
        body: format!("{{\"remark\":\"{}\"}}", "x".repeat(128 * 1024 - 13)).into(),
        ..on("main", Scope::SpotMargin, Method::Post, "/api/v1/hf/orders")
    };
    assert_eq!(large.body.len(), 128 * 1024);
    maker.send(large.clone()).await.unwrap();
    let arrived = arena.lab.kucoin.received().pop().unwrap();
    assert_eq!(
        (arrived.body, arrived.signature),
        (large.body, Signature::Verified)
    );
    arena.lab.stop().await;
}
