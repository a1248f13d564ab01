//! The paths of the catalogue, and answers with every field that it points to.

use credbroker_sim::kucoin::{Host, OrderState, SimKey};
use serde_json::{Value, json};

use crate::client::{Answer, Client, text};

const CATALOGUE: &str = include_str!("../../../../src/kucoin/endpoints.json");

#[tokio::test]
async fn paths_that_a_host_does_not_have_return_404() {
    let client = Client::start().await;
    for (host, method, target) in [
        (Host::Spot, "GET", "/api/v1/no-such-thing"),
        (Host::Spot, "GET", "/api/v1/account-overview"),
        (Host::Spot, "PUT", "/api/v1/hf/orders"),
        (Host::Futures, "POST", "/api/v1/hf/orders"),
        (Host::Futures, "GET", "/_sim/received"),
    ] {
        let answer = client.call(host, method, target, Value::Null).await;
        let gateway = json!({"code": "404", "msg": "Not Found", "retry": false, "success": false});
        assert_eq!((answer.status, answer.json()), (404, gateway), "{target}");
    }
    let empty = client
        .spot("GET", "/api/v1/withdrawals/quotas", Value::Null)
        .await;
    assert!(empty.data().is_array());
}

/// Places, looks up and cancels an order through every endpoint whose use the catalogue describes, and checks that each
/// field is where the catalogue says.
#[tokio::test]
async fn answers_have_every_field_that_the_catalogue_points_to() {
    let client = Client::start_with(SimKey {
        permissions: ["Spot", "Margin", "Futures", "Unified", "LeadtradeFutures"]
            .map(str::to_owned)
            .into(),
        ..SimKey::fake(7)
    })
    .await;
    let endpoints: Vec<Value> = serde_json::from_str(CATALOGUE).unwrap();
    let by_id = |id: &Value| endpoints.iter().find(|endpoint| endpoint["id"] == *id);
    let mut number = 0;
    for endpoint in &endpoints {
        let order = &endpoint["order"];
        let is_removed = endpoint["status"] == "legacy-docs-only";
        let simulated = !text(endpoint, "path").contains("/convert/") && !is_removed;
        if endpoint["effect"] != "place" || !order.is_object() || !simulated {
            continue;
        }
        number += 1;
        let client_oid = format!("order-{number}");
        let fields = sample(text(endpoint, "path"), text(endpoint, "host"), &client_oid);
        let items = order["items"].as_str();
        let body = match items {
            None => fields.clone(),
            Some("") => json!([fields]),
            Some(pointer) => {
                let list = pointer.trim_start_matches('/');
                json!({list: [fields], "tradeType": fields["tradeType"]})
            }
        };
        let path = text(endpoint, "path").replace("{accountMode}", "unified");
        let host = host_of(endpoint);
        let answer = client.call(host, "POST", &path, body).await;
        answer.data();
        let envelope = answer.json();
        let answers = &order["answer"];
        let scope = match &answers["perItem"] {
            Value::Null => envelope,
            per_item => {
                let item = envelope.pointer(text(per_item, "array")).unwrap()[0].clone();
                let ok = &per_item["ok"];
                assert_eq!(
                    item.pointer(text(ok, "field")),
                    Some(&ok["value"]),
                    "{endpoint}"
                );
                item
            }
        };
        let order_id = at(&scope, &answers["orderId"])
            .expect("an order id")
            .clone();
        if let Some(found) = at(&scope, &answers["clientOid"]) {
            assert_eq!(found, client_oid.as_str(), "{endpoint}");
        }
        if let Some(lookup) = order.get("lookup").filter(|lookup| lookup.is_object()) {
            let read = by_id(&lookup["endpoint"]).unwrap();
            let target = target(read, lookup, &fields, &client_oid);
            let found = client.call(host, "GET", &target, Value::Null).await;
            found.data();
            let found = found.json();
            assert_eq!(
                at(&found, &lookup["answer"]["orderId"]),
                Some(&order_id),
                "{target}"
            );
            let same = at(&found, &lookup["answer"]["clientOid"]);
            assert_eq!(same, Some(&json!(client_oid)), "{target}");
            assert!(at(&found, &lookup["answer"]["state"]).is_some(), "{target}");
        }
        let Some(cancel) = by_id(&order["cancelByClientOid"]) else {
            continue;
        };
        let answer = cancel_by_client_oid(&client, cancel, &fields, &client_oid).await;
        assert_eq!(answer.code(), "200000", "{cancel}");
        let answers = &cancel["order"]["answer"];
        for name in ["orderId", "clientOid", "orderIds", "state"] {
            if answers[name].is_string() {
                assert!(
                    at(&answer.json(), &answers[name]).is_some(),
                    "{name} of {cancel}"
                );
            }
        }
        let again = cancel_by_client_oid(&client, cancel, &fields, &client_oid).await;
        assert_ne!(again.code(), "200000", "{cancel}");
    }
    assert_eq!(number, 20);
    let orders = client.sim.orders(client.key.uid);
    assert_eq!(orders.len(), number);
    // The order of version 1's batch endpoint (unified account) stays open: the catalogue has no cancel for it.
    let open = orders
        .iter()
        .filter(|order| order.state != OrderState::Cancelled);
    assert_eq!(open.count(), 1);
}

async fn cancel_by_client_oid(client: &Client, cancel: &Value, fields: &Value, id: &str) -> Answer {
    let host = host_of(cancel);
    let order = &cancel["order"];
    if order["clientOid"]["in"] == "body" {
        let body =
            json!({"clientOid": id, "symbol": fields["symbol"], "tradeType": fields["tradeType"]});
        return client
            .call(host, text(cancel, "method"), text(cancel, "path"), body)
            .await;
    }
    let place = format!(
        "{}:{}",
        text(&order["clientOid"], "in"),
        text(&order["clientOid"], "pointer")
    );
    let how = json!({"clientOid": place, "needs": ["symbol"]});
    let target = target(cancel, &how, fields, id);
    client
        .call(host, text(cancel, "method"), &target, Value::Null)
        .await
}

fn host_of(endpoint: &Value) -> Host {
    match text(endpoint, "host") {
        "futures" => Host::Futures,
        _ => Host::Spot,
    }
}

fn at<'a>(envelope: &'a Value, pointer: &Value) -> Option<&'a Value> {
    envelope.pointer(pointer.as_str()?)
}

/// A limit order, with a trigger if the endpoint is for conditional orders.
fn sample(path: &str, host: &str, client_oid: &str) -> Value {
    let mut order = json!({"clientOid": client_oid, "side": "buy", "type": "limit", "price": "50000", "size": "1"});
    let futures = host == "futures";
    order["symbol"] = json!(if futures { "XBTUSDTM" } else { "BTC-USDT" });
    if path.contains("/ua/") {
        order["orderType"] = json!("LIMIT");
        order["side"] = json!("BUY");
        // Futures, because one of the lookups works only for futures.
        order["tradeType"] = json!("FUTURES");
        order["symbol"] = json!("XBTUSDTM");
    }
    if path.contains("/oco") || path.contains("/stop-order") {
        order["stopPrice"] = json!("70000");
        order["limitPrice"] = json!("70000");
    }
    if path.contains("/st-orders") {
        order["triggerStopUpPrice"] = json!("70000");
    }
    order
}

/// Path and query of a lookup or cancel, as the catalogue describes it.
fn target(endpoint: &Value, how: &Value, fields: &Value, client_oid: &str) -> String {
    let mut path = text(endpoint, "path").to_owned();
    let mut query = Vec::new();
    let mut put = |place: &str, value: &str| match place.split_once(':').unwrap() {
        ("path", name) => path = path.replace(&format!("{{{name}}}"), value),
        (_, name) => query.push(format!("{name}={value}")),
    };
    put(text(how, "clientOid"), client_oid);
    for name in how["needs"].as_array().into_iter().flatten() {
        let name = name.as_str().unwrap();
        put(&format!("query:{name}"), text(fields, name));
    }
    if query.is_empty() {
        return path;
    }
    format!("{path}?{}", query.join("&"))
}
