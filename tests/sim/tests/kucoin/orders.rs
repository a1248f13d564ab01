//! How orders change balances and affect each other.

use credbroker_sim::kucoin::{Amount, Order, Wallet};
use serde_json::{Value, json};

use crate::client::{Client, text};

#[tokio::test]
async fn spot_order_holds_funds_until_filled_or_cancelled() {
    let client = Client::start().await;
    let order = |id: &str, side: &str, kind: &str, size: &str| json!({"clientOid": id, "symbol": "BTC-USDT", "side": side, "type": kind, "price": "50000", "size": size});
    let path = "/api/v1/hf/orders";
    client
        .sim
        .set_balance(7, Wallet::Trade, "USDT", Amount::from(100_000));
    let tested = client
        .spot(
            "POST",
            "/api/v1/hf/orders/test",
            order("a", "buy", "limit", "1"),
        )
        .await;
    assert_eq!(tested.code(), "200000");
    assert_eq!(client.available().await, "100000");
    let placed = client
        .spot("POST", path, order("a", "buy", "limit", "1.5"))
        .await
        .data();
    assert_eq!(client.available().await, "25000");
    let unfunded = client
        .spot("POST", path, order("b", "buy", "limit", "0.50001"))
        .await;
    assert_eq!(unfunded.code(), "200004");
    let again = client
        .spot("POST", path, order("a", "buy", "limit", "0.1"))
        .await;
    assert_eq!(again.code(), "400100");
    let id = text(&placed, "orderId");
    let part = format!("{path}/cancel/{id}?symbol=BTC-USDT&cancelSize=0.5");
    client.spot("DELETE", &part, Value::Null).await.data();
    assert_eq!(client.available().await, "50000");
    let altered = json!({"symbol": "BTC-USDT", "clientOid": "a", "newPrice": "40000"});
    let altered = client
        .spot("POST", "/api/v1/hf/orders/alter", altered)
        .await
        .data();
    assert_ne!(text(&altered, "newOrderId"), id);
    client
        .spot(
            "DELETE",
            "/api/v1/hf/orders/client-order/a?symbol=BTC-USDT",
            Value::Null,
        )
        .await
        .data();
    assert_eq!(client.available().await, "100000");
    client
        .spot("POST", path, order("c", "buy", "market", "0.5"))
        .await
        .data();
    assert_eq!(client.available().await, "70000");
    client
        .spot("POST", path, order("d", "sell", "market", "0.5"))
        .await
        .data();
    assert_eq!(client.available().await, "100000");
    let done = client
        .spot("GET", "/api/v1/hf/orders/done?symbol=BTC-USDT", Value::Null)
        .await;
    assert_eq!(done.data()["items"].as_array().unwrap().len(), 4);
    let bad = client
        .spot("POST", path, json!({"symbol": "BTC-USDT", "side": "buy"}))
        .await;
    assert_eq!(bad.code(), "400100");
}

#[tokio::test]
async fn cancel_all_cancels_every_order_of_its_kind_and_no_other() {
    let client = Client::start().await;
    let plain = json!({"clientOid": "plain", "symbol": "BTC-USDT", "side": "sell", "price": "70000", "size": "1"});
    let mut stop = plain.clone();
    stop["clientOid"] = json!("stop");
    stop["stopPrice"] = json!("65000");
    client.spot("POST", "/api/v1/hf/orders", plain).await.data();
    client
        .spot("POST", "/api/v1/stop-order", stop.clone())
        .await
        .data();
    let cancelled = client
        .spot("DELETE", "/api/v1/hf/orders/cancelAll", Value::Null)
        .await
        .data();
    assert_eq!(cancelled["succeedSymbols"], json!(["BTC-USDT"]));
    let contract = |id: &str| json!({"clientOid": id, "symbol": "XBTUSDTM", "side": "buy", "type": "limit", "price": 50000, "size": 1});
    let batch = json!([contract("f1"), contract("f2"), contract("f1")]);
    let placed = client
        .futures("POST", "/api/v1/orders/multi", batch)
        .await
        .data();
    assert_eq!(placed[1]["code"], "200000");
    assert_eq!(
        (&placed[2]["code"], &placed[2]["clientOid"]),
        (&json!("300018"), &json!("f1"))
    );
    let named = json!({"orderIdsList": [placed[0]["orderId"], "1"]});
    let cancelled = client
        .futures("DELETE", "/api/v1/orders/multi-cancel", named)
        .await
        .data();
    assert_eq!(
        (&cancelled[0]["code"], &cancelled[1]["code"]),
        (&json!("200"), &json!("100001"))
    );
    let mut unfunded = contract("f3");
    unfunded["size"] = json!(1_000_000);
    let unfunded = client.futures("POST", "/api/v1/orders", unfunded).await;
    assert_eq!(unfunded.code(), "300003");
    let rest = client
        .futures("DELETE", "/api/v3/orders?symbol=XBTUSDTM", Value::Null)
        .await
        .data();
    assert_eq!(rest["cancelledOrderIds"], json!([placed[1]["orderId"]]));
    let absent = client
        .futures(
            "GET",
            "/api/v1/orders/byClientOid?clientOid=f9",
            Value::Null,
        )
        .await;
    assert_eq!(absent.code(), "100001");
    let open: Vec<_> = client
        .sim
        .orders(7)
        .into_iter()
        .filter(Order::is_open)
        .collect();
    assert_eq!(open.len(), 1);
    assert_eq!(open[0].client_oid.as_deref(), Some("stop"));
}
