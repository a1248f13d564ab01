//! Rate limits: quotas per account, and the limit of the edge per address.

use credbroker_sim::kucoin::{Host, Limits, SimKey};
use serde_json::{Value, json};

use crate::NOW_MS;
use crate::client::Client;

#[tokio::test]
async fn quota_is_per_account_and_resets_with_its_window() {
    let client = Client::start().await;
    let mut limits = Limits::default();
    limits.pools.insert("Spot".to_owned(), 3);
    client.sim.set_limits(limits);
    let target = "/api/v1/hf/orders/active?symbol=BTC-USDT";
    let first = client.spot("GET", target, Value::Null).await;
    assert_eq!(first.header("gw-ratelimit-limit").as_deref(), Some("3"));
    assert_eq!(first.header("gw-ratelimit-remaining").as_deref(), Some("1"));
    assert_eq!(first.header("gw-ratelimit-reset").as_deref(), Some("30000"));
    client.sim.set_fixed_time_ms(NOW_MS + 1000);
    let second = client.spot("GET", target, Value::Null).await;
    assert_eq!((second.status, second.code()), (429, "429000".to_owned()));
    assert_eq!(
        second.header("gw-ratelimit-reset").as_deref(),
        Some("29000")
    );
    let other = SimKey::fake(8);
    client.sim.add_key(other.clone());
    let other = Client {
        sim: client.sim.clone(),
        key: other,
    };
    assert_eq!(
        other.spot("GET", target, Value::Null).await.code(),
        "200000"
    );
    let later = NOW_MS + 30_000;
    client.sim.set_fixed_time_ms(later);
    let again = client
        .try_call_at(later, Host::Spot, "GET", target, &Value::Null)
        .await;
    assert_eq!(again.unwrap().code(), "200000");
}

#[tokio::test]
async fn edge_blocks_an_address_with_an_html_page() {
    let client = Client::start().await;
    client.sim.set_limits(Limits {
        edge_requests: Some(2),
        ..Limits::default()
    });
    for status in [200, 200, 429, 429] {
        let answer = client
            .futures("GET", "/api/v1/timestamp", Value::Null)
            .await;
        assert_eq!(answer.status, status);
        assert_eq!(answer.json().is_null(), status == 429);
        assert_eq!(answer.header("gw-ratelimit-limit").is_some(), status == 200);
    }
    assert_eq!(client.sim.received().last().unwrap().code(), Some("1015"));
    client.sim.set_fixed_time_ms(NOW_MS + 30_000);
    let after = client.spot("GET", "/api/v1/timestamp", Value::Null).await;
    assert_eq!(after.data(), json!(NOW_MS + 30_000));
}
