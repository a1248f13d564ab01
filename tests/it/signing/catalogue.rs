//! Every private endpoint that rules can grant, called through a broker and verified by the simulator.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use credbroker::proto::{Method, QueryParameter, Scope, SignAndSendRequest};
use credbroker_sim::installation::{MAIN_UID, Settings};
use credbroker_sim::kucoin::{Host, Signature, SimKey};
use serde_json::Value;

use crate::harness::{Lab, request};

/// Values for path parameters: ids, symbols, and every character that is allowed in a segment.
const VALUES: [&str; 6] = [
    "67fe0c1aab12cd0001f3e5a7",
    "BTC-USDT",
    "XBTUSDTM",
    "00000000-0000-4000-8000-000000000001",
    "A.z_0~9-.",
    "~",
];

const QUERY: [(&str, &str); 10] = [
    ("symbol", "BTC-USDT"),
    ("symbols", "BTC-USDT,ETH-USDT"),
    ("id", "1"),
    ("id", "2"),
    ("id", "1"),
    ("note", "a&b=c#d+e f%20g?h/i:j@k!l$m'n(o)p*q;r,s[t]"),
    ("uni", "Zürich-测试-🚀"),
    ("empty", ""),
    ("na me[&=]", "\"<>\\^`{|}~"),
    ("percent", "100%"),
];

const BODY: &str = "{ \"clientOid\":\"signing-1\",\"symbol\":\"BTC-USDT\", \"remark\":\"Z\u{fc}rich \\\"x\\\" \\u00e9 \u{6d4b}\u{8bd5} \u{1f680}\",\n\"list\":[1,2.50,{\"a\":null}] }";

fn endpoints() -> Vec<Value> {
    let all: Vec<Value> =
        serde_json::from_str(include_str!("../../../src/kucoin/endpoints.json")).unwrap();
    let is_private_and_grantable =
        |e: &Value| !e["scope"].is_null() && e["risk"] != "public" && e["grantable"] != false;
    all.into_iter().filter(is_private_and_grantable).collect()
}

/// Rules that grant endpoints by class if they are in one, and all others by name.
fn rules(endpoints: &[Value]) -> String {
    let mut rules = "[account.main]\nallow_money_out = true\n\
                     key = { spot-margin = \"main\", futures = \"main\", unified = \"main\" }\n"
        .to_owned();
    for scope in ["spot-margin", "futures", "unified"] {
        let classes = ["read", "trade", "trade-config"];
        let by_class = |e: &Value| {
            let has_lookup = e["effect"] != "place" || e["order"]["lookup"].is_object();
            e["status"] != "undocumented"
                && has_lookup
                && classes.contains(&e["risk"].as_str().unwrap())
        };
        let named = endpoints
            .iter()
            .filter(|e| e["scope"] == scope && !by_class(e))
            .map(|e| e["id"].as_str().unwrap());
        let allow: Vec<_> = classes.into_iter().chain(named).collect();
        writeln!(
 rules,
            "[[grant]]\nbot = \"spiffe://demo.test/bot/maker\"\naccount = \"main\"\nscope = \"{scope}\"\nallow = {allow:?}\nclient_oid = \"optional\""
        ).unwrap();
    }
    rules
}

fn request_for(endpoint: &Value, index: usize) -> SignAndSendRequest {
    let scope = match endpoint["scope"].as_str().unwrap() {
        "futures" => Scope::Futures,
        "spot-margin" => Scope::SpotMargin,
        "unified" => Scope::Unified,
        other => panic!("scope {other}"),
    };
    // Each clientOid can be used only once.
    let body = BODY.replace("signing-1", &format!("signing-{index}"));
    let (method, body) = match endpoint["method"].as_str().unwrap() {
        "DELETE" if endpoint["path"] == "/api/v1/orders/multi-cancel" => {
            (Method::Delete, body.as_str())
        }
        "DELETE" => (Method::Delete, ""),
        "GET" => (Method::Get, ""),
        "POST" => (Method::Post, body.as_str()),
        other => panic!("method {other}"),
    };
    let value = VALUES[index % VALUES.len()];
    let segments = endpoint["path"].as_str().unwrap().split('/');
    let filled = segments.map(|segment| match segment.split_once('{') {
        // A clientOid has no other characters.
        Some((before, "clientOid}")) => format!("{before}Signing_{index}-a"),
        Some((before, _)) => format!("{before}{value}"),
        None => segment.to_owned(),
    });
    let query = if body.is_empty() { &QUERY[..] } else { &[] };
    SignAndSendRequest {
        path: filled.collect::<Vec<_>>().join("/"),
        query: query
            .iter()
            .map(|(name, value)| QueryParameter {
                name: (*name).to_owned(),
                value: (*value).to_owned(),
            })
            .collect(),
        ..request(scope, method, "", body)
    }
}

#[tokio::test]
async fn signatures_verify_for_every_private_endpoint_that_can_be_granted() {
    let endpoints = endpoints();
    assert_eq!(endpoints.len(), 429);
    let mut lab = Lab::with(Settings {
        rules: rules(&endpoints),
        ..Settings::default()
    })
    .await;
    let permissions: BTreeSet<_> = endpoints
        .iter()
        .filter_map(|endpoint| endpoint["permission"].as_str().map(str::to_owned))
        .collect();
    assert!(permissions.len() >= 9, "{permissions:?}");
    lab.kucoin.add_key(SimKey {
        permissions: permissions.into_iter().collect(),
        ..SimKey::fake(MAIN_UID)
    });
    let mut maker = lab.bot("maker").await;
    let mut verified = 0;
    for (index, endpoint) in endpoints.iter().enumerate() {
        let id = endpoint["id"].as_str().unwrap();
        let sent = request_for(endpoint, index);
        let answer = maker.send(sent.clone()).await;
        let answer = answer.unwrap_or_else(|status| panic!("{id}: {status:?}"));
        let received = lab.kucoin.received();
        assert_eq!(received.len(), index + 1, "{id}");
        let arrived = &received[index];
        assert_eq!(arrived.signature, Signature::Verified, "{id}: {arrived:?}");
        assert_eq!(arrived.endpoint.as_deref(), Some(id));
        assert_eq!(
            arrived.host == Host::Futures,
            sent.scope() == Scope::Futures,
            "{id}"
        );
        assert_eq!(arrived.path(), sent.path, "{id}");
        assert_eq!(arrived.body, sent.body, "{id}");
        assert_ne!(
            arrived.code(),
            Some("400007"),
            "{id}: the key has every permission"
        );
        assert_eq!(arrived.uid, Some(MAIN_UID), "{id}");
        assert_eq!(
            arrived.header("kc-api-timestamp"),
            Some(&*answer.timestamp_ms.to_string()),
            "{id}"
        );
        verified += 1;
    }
    assert_eq!(verified, 429);
    // Every combination of host and method was tested.
    let received = lab.kucoin.received();
    for host in [Host::Futures, Host::Spot] {
        for method in ["DELETE", "GET", "POST"] {
            assert!(
                received
                    .iter()
                    .any(|arrived| arrived.host == host && arrived.method == method)
            );
        }
    }
    lab.stop().await;
}
