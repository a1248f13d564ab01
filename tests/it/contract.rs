//! The contract with bots: requests in, answers out, failures that say what to do.

use credbroker::api::proto::{Method, Outcome, Scope};
use tonic::Code;

use crate::harness::{Lab, futures_order, json_of, refusal, request, spot_order};

#[tokio::test]
async fn a_bot_places_looks_up_and_cancels_a_spot_order() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let placed = bot.send(spot_order("spot-1")).await.unwrap();
    assert_eq!(
        (placed.http_status, placed.code.as_str()),
        (200, "200000"),
        "{placed:?}"
    );
    assert_eq!(placed.outcome(), Outcome::Accepted);
    assert!(placed.content_type.starts_with("application/json"));
    assert!(placed.timestamp_ms > 1_700_000_000_000);
    let found = "/api/v1/hf/orders/client-order/spot-1?symbol=BTC-USDT";
    let found = bot
        .send(request(Scope::SpotMargin, Method::Get, found, ""))
        .await
        .unwrap();
    assert_eq!(json_of(&found)["data"]["clientOid"], "spot-1");
    assert_eq!(json_of(&found)["data"]["active"], true);
    let cancel = "/api/v1/hf/orders/client-order/spot-1?symbol=BTC-USDT";
    let cancelled = bot
        .send(request(Scope::SpotMargin, Method::Delete, cancel, ""))
        .await
        .unwrap();
    assert_eq!(cancelled.outcome(), Outcome::Accepted);
    assert_eq!(lab.stop().await, 0);
}

#[tokio::test]
async fn a_bot_places_looks_up_and_cancels_a_futures_order() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let placed = bot.send(futures_order("futures-1")).await.unwrap();
    assert_eq!(placed.outcome(), Outcome::Accepted, "{placed:?}");
    let order_id = json_of(&placed)["data"]["orderId"]
        .as_str()
        .unwrap()
        .to_owned();
    let by_oid = request(
        Scope::Futures,
        Method::Get,
        "/api/v1/orders/byClientOid?clientOid=futures-1",
        "",
    );
    let found = bot.send(by_oid).await.unwrap();
    assert_eq!(json_of(&found)["data"]["id"], order_id.as_str());
    let cancel = request(
        Scope::Futures,
        Method::Delete,
        &format!("/api/v1/orders/{order_id}"),
        "",
    );
    assert_eq!(bot.send(cancel).await.unwrap().outcome(), Outcome::Accepted);
    assert_eq!(lab.stop().await, 0);
}

#[tokio::test]
async fn a_refused_request_says_why() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("reader").await;
    let denied = refusal(bot.send(spot_order("never")).await);
    assert_eq!(
        denied,
        (
            Code::PermissionDenied,
            "POLICY_DENIED".to_owned(),
            "not_sent".to_owned()
        )
    );
    assert!(lab.kucoin.received().is_empty());
    lab.stop().await;
}
