//! Batches: the outcome of each order, in the response and in the audit log.

use credbroker::proto::{Item, Method, Outcome, Scope, SignAndSendRequest, SignAndSendResponse};
use serde_json::{Value, json};

use crate::answers::{Exchange, http};
use crate::harness::{Lab, request};

const MULTI: &str = "/api/v1/hf/orders/multi";

fn spot_batch(orders: &[Value]) -> SignAndSendRequest {
    let body = json!({"orderList": orders}).to_string();
    request(Scope::SpotMargin, Method::Post, MULTI, &body)
}

fn spot(client_oid: &str, size: &str) -> Value {
    json!({
        "clientOid": client_oid, "side": "buy", "symbol": "BTC-USDT", "type": "limit", "price": "10000", "size": size,
    })
}

fn futures(client_oid: &str) -> Value {
    json!({
        "clientOid": client_oid, "side": "buy", "symbol": "XBTUSDTM", "type": "limit", "price": "10000", "size": 1,
        "leverage": 3,
    })
}

/// The clientOid, outcome and code of each item.
fn items(answer: &SignAndSendResponse) -> Vec<(&str, Outcome, &str)> {
    let item = |item: &Item| (item.outcome(), item.code.len());
    assert!(
        answer
            .items
            .iter()
            .map(item)
            .all(|(_, length)| length <= 64)
    );
    let items = answer.items.iter();
    items
        .map(|item| (item.client_oid.as_str(), item.outcome(), item.code.as_str()))
        .collect()
}

#[tokio::test]
async fn each_order_of_a_batch_has_an_outcome_in_response_and_audit_log() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let mut batch = spot_batch(&[spot("b-1", "0.001"), spot("b-2", "100000000")]);
    batch.request_id = "mixed".to_owned();
    let answer = bot.send(batch).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted);
    assert_eq!(
        items(&answer),
        [
            ("b-1", Outcome::Accepted, ""),
            ("b-2", Outcome::Rejected, "")
        ]
    );
    assert_eq!(answer.items[1].msg, "Balance insufficient!");
    let order_id = answer.items[0].order_id.clone();
    assert!(!order_id.is_empty());
    let lines = lab.audit_of("mixed");
    assert_eq!(lines[1]["outcome"], "accepted");
    let expected = json!([
        {"client_oid": "b-1", "order_id": order_id, "outcome": "accepted"},
        {"client_oid": "b-2", "outcome": "rejected"},
    ]);
    assert_eq!(lines[1]["items"], expected);

    let body = json!([futures("f-1"), futures("f-2")]).to_string();
    let batch = request(Scope::Futures, Method::Post, "/api/v1/orders/multi", &body);
    let answer = bot.send(batch).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted);
    assert_eq!(
        items(&answer),
        [
            ("f-1", Outcome::Accepted, "200000"),
            ("f-2", Outcome::Accepted, "200000"),
        ]
    );

    let named = json!({
        "orderIdsList": [answer.items[0].order_id, "1"],
        "clientOidsList": [{"symbol": "XBTUSDTM", "clientOid": "f-2"}],
    });
    let path = "/api/v1/orders/multi-cancel";
    let cancel = request(Scope::Futures, Method::Delete, path, &named.to_string());
    let cancelled = bot.send(cancel).await.unwrap();
    assert_eq!(cancelled.outcome(), Outcome::Accepted);
    assert_eq!(
        items(&cancelled),
        [
            ("", Outcome::Accepted, "200"),
            ("", Outcome::Rejected, "100001"),
            ("f-2", Outcome::Accepted, "200"),
        ]
    );
    assert_eq!(cancelled.items[0].order_id, answer.items[0].order_id);

    // A single order has no items.
    let mut single = crate::harness::spot_order("single");
    single.request_id = "single".to_owned();
    assert!(bot.send(single).await.unwrap().items.is_empty());
    assert_eq!(lab.audit_of("single")[1].get("items"), None);
    lab.stop().await;
}

#[tokio::test]
async fn order_of_a_batch_without_a_result_is_maybe_sent() {
    let exchange = Exchange::start("spot").await;
    let lab = Lab::with(exchange.settings()).await;
    let mut bot = lab.bot("maker").await;
    let accepted = |oid: &str| json!({"success": true, "orderId": "1", "clientOid": oid});
    let rejected = json!({"success": false, "failMsg": "no"});
    let long = json!({"success": false, "failMsg": "x".repeat(10_000)});
    let (sent, open) = (Outcome::Accepted, Outcome::MaybeSent);
    // Each batch has clientOids of its own: `b-1` and `b-2` with a number.
    let cases = [
        (json!([accepted("b-1")]), open, vec![sent, open]),
        (json!([]), open, vec![open, open]),
        (json!(null), open, vec![open, open]),
        (json!([accepted("b-1"), 7]), open, vec![sent, open]),
        (
            json!([accepted("b-1"), rejected, rejected]),
            open,
            vec![sent, open, open, open],
        ),
        // The failed order can be either one, by position "b-2", which was accepted.
        (
            json!([accepted("b-2"), rejected]),
            open,
            vec![open, sent, open],
        ),
        (
            json!([accepted("b-1"), long]),
            sent,
            vec![sent, Outcome::Rejected],
        ),
    ];
    for (number, (results, outcome, expected)) in cases.into_iter().enumerate() {
        let body = json!({"code": "200000", "data": results}).to_string();
        let [first, second] = ["b-1", "b-2"].map(|oid| format!("{oid}-{number}"));
        let body = body.replace("b-1", &first).replace("b-2", &second);
        exchange.answer(MULTI, http("200 OK", &body));
        let batch = spot_batch(&[spot(&first, "0.001"), spot(&second, "0.001")]);
        let answer = bot.send(batch).await.unwrap();
        assert_eq!(answer.outcome(), outcome, "{body:.200}");
        let outcomes: Vec<_> = answer.items.iter().map(Item::outcome).collect();
        assert_eq!(outcomes, expected, "{body:.200}");
        assert!(answer.items.iter().all(|item| item.msg.len() <= 200));
        assert_eq!(answer.body, body.as_bytes());
        let needs_lookup = answer.advice.contains("look the order up");
        assert_eq!(needs_lookup, outcome == open, "{}", answer.advice);
    }
    // The batch as a whole.
    let body = r#"{"code":"400100","msg":"Parameter error"}"#;
    exchange.answer(MULTI, http("200 OK", body));
    let answer = bot.send(spot_batch(&[spot("b-1", "0.001")])).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Rejected);
    assert!(answer.items.is_empty());
}
