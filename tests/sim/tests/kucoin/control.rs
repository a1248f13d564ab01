//! The simulator's control endpoints.

use credbroker_sim::kucoin::{Host, KucoinSettings, KucoinSim, SimKey};
use serde_json::{Value, json};

use crate::NOW_MS;
use crate::client::{Client, send};

#[tokio::test]
async fn simulated_kucoin_can_be_controlled_over_http() {
    let sim = KucoinSim::start(KucoinSettings::default()).await.unwrap();
    let key = SimKey::fake(9);
    let control = async |method: &str, target: &str, body: Value| {
        let answer = send(&sim.spot_url(), method, target, &[], &body.to_string())
            .await
            .unwrap();
        (answer.status, answer.json())
    };
    let accepted = (200, json!({"ok": true}));
    for (target, body) in [
        ("/_sim/keys", serde_json::to_value(&key).unwrap()),
        (
            "/_sim/balance",
            json!({"uid": 9, "wallet": "trade", "currency": "USDT", "amount": "12.5"}),
        ),
        ("/_sim/limits", json!({"edge_requests": 100})),
        ("/_sim/clock", json!({"fixed_ms": NOW_MS})),
        ("/_sim/source-address", json!({"address": "203.0.113.7"})),
        ("/_sim/cancel-lag", json!({"ms": 0})),
        ("/_sim/lookup-lag", json!({"ms": 0})),
        (
            "/_sim/fault",
            json!({"path": "/api/v1/status", "times": 1, "action": {"close": {"when": "before_processing"}}}),
        ),
    ] {
        assert_eq!(control("POST", target, body).await, accepted, "{target}");
    }
    for (target, body) in [
        ("/_sim/keys", json!({})),
        ("/_sim/source-address", json!({})),
        ("/_sim/source-address", json!({"address": "here"})),
    ] {
        assert_eq!(control("POST", target, body).await.0, 400, "{target}");
    }
    let from = async || {
        let answer = send(&sim.spot_url(), "GET", "/api/v1/my-ip", &[], "").await;
        answer.unwrap().data()
    };
    assert_eq!(from().await, "203.0.113.7");
    let unset = json!({"address": null});
    assert_eq!(
        control("POST", "/_sim/source-address", unset).await,
        accepted
    );
    assert_eq!(from().await, "127.0.0.1");
    let client = Client {
        sim: sim.clone(),
        key,
    };
    assert_eq!(client.available().await, "12.5");
    let status = client
        .try_call(Host::Spot, "GET", "/api/v1/status", &Value::Null)
        .await;
    assert!(status.is_none());
    let hits = control("GET", "/_sim/fault", Value::Null).await;
    assert_eq!(hits, (200, json!({"hits": 1})));
    let order = json!({"clientOid": "mine", "symbol": "BTC-USDT", "side": "buy", "price": "1", "size": "1"});
    client.spot("POST", "/api/v1/hf/orders", order).await.data();
    let (_, received) = control("GET", "/_sim/received", Value::Null).await;
    assert_eq!(received["client_oids"], json!(["mine"]));
    let placed = json!({
        "method": "POST", "path": "/api/v1/hf/orders", "code": "200000", "signature": "verified", "count": 1,
    });
    assert!(received["requests"].as_array().unwrap().contains(&placed));
    let (_, orders) = control("GET", "/_sim/orders?uid=9", Value::Null).await;
    let (_, placing) = control("GET", "/_sim/placing", Value::Null).await;
    let request = json!({
        "path": "/api/v1/hf/orders", "agent": null, "at_ms": NOW_MS, "client_oids": ["mine"], "created": [orders[0]["id"]],
    });
    assert_eq!(placing, json!([request]));
    assert_eq!(
        (&orders[0]["client_oid"], &orders[0]["state"]),
        (&json!("mine"), &json!("open"))
    );
    assert_eq!(
        control(
            "DELETE",
            "/_sim/keys?api_key=simulated000000000000009",
            Value::Null
        )
        .await,
        accepted
    );
    let removed = client.spot("GET", "/api/v1/accounts", Value::Null).await;
    assert_eq!(removed.code(), "400003");
}

#[tokio::test]
async fn only_the_last_requests_are_kept() {
    let settings = KucoinSettings {
        keep_requests: 2,
        ..KucoinSettings::default()
    };
    let sim = KucoinSim::start(settings).await.unwrap();
    for number in 1..=3 {
        let target = format!("/api/v1/timestamp?number={number}");
        send(&sim.spot_url(), "GET", &target, &[], "")
            .await
            .unwrap();
    }
    let received = sim.received();
    let kept: Vec<_> = received
        .iter()
        .map(|one| (one.target.as_str(), one.code()))
        .collect();
    let code = Some("200000");
    assert_eq!(
        kept,
        [
            ("/api/v1/timestamp?number=2", code),
            ("/api/v1/timestamp?number=3", code)
        ]
    );
}
