//! Cancelling all orders of an account: which requests cancel each kind of order, and which list the open ones.

use std::collections::BTreeSet;
use std::time::Duration;

use credbroker_sim::kucoin::{Host, Order};
use serde_json::{Value, json};

use crate::NOW_MS;
use crate::client::{Client, text};

const CATALOGUE: &str = include_str!("../../../../src/kucoin/endpoints.json");

/// A kind of order, with the requests that place it, cancel all of its kind, and list them.
struct Kind {
    host: Host,
    place: (&'static str, Value),
    cancel: (&'static str, &'static str, Value),
    list: &'static str,
}

fn spot(
    place: &'static str,
    fields: &Value,
    cancel: (&'static str, &'static str, Value),
    list: &'static str,
) -> Kind {
    let mut order = json!({"symbol": "BTC-USDT", "side": "sell", "type": "limit", "price": "70000", "size": "0.01"});
    merge(&mut order, fields);
    Kind {
        host: Host::Spot,
        place: (place, order),
        cancel,
        list,
    }
}

fn futures(place: &'static str, fields: &Value, cancel: &'static str, list: &'static str) -> Kind {
    let mut order =
        json!({"symbol": "XBTUSDTM", "side": "buy", "type": "limit", "price": "50000", "size": 1});
    merge(&mut order, fields);
    Kind {
        host: Host::Futures,
        place: (place, order),
        cancel: ("DELETE", cancel, Value::Null),
        list,
    }
}

fn unified(fields: &Value, cancel: Value, list: &'static str) -> Kind {
    let mut order = json!({"side": "BUY", "orderType": "LIMIT", "price": "2000", "size": "1"});
    merge(&mut order, fields);
    Kind {
        host: Host::Spot,
        place: ("/api/ua/v2/unified/order/place", order),
        cancel: ("POST", "/api/ua/v2/unified/order/cancel-all", cancel),
        list,
    }
}

fn merge(order: &mut Value, fields: &Value) {
    let fields = fields.as_object().unwrap().clone();
    order.as_object_mut().unwrap().extend(fields);
}

fn kinds() -> Vec<Kind> {
    let delete = |target| ("DELETE", target, Value::Null);
    let isolated = |fields: Value| {
        let mut fields = fields;
        fields["isIsolated"] = json!(true);
        fields
    };
    let (hf, margin) = ("/api/v1/hf/orders", "/api/v3/hf/margin/order");
    let (margin_stop, margin_oco) = (
        "/api/v3/hf/margin/stop-order",
        "/api/v3/hf/margin/oco-order",
    );
    let stop = json!({"stopPrice": "65000"});
    let oco = json!({"stopPrice": "50000", "limitPrice": "49000"});
    let mut all = vec![
        spot(
            hf,
            &json!({"symbol": "ETH-USDT"}),
            delete("/api/v1/hf/orders?symbol=ETH-USDT"),
            "/api/v1/hf/orders/active?symbol=ETH-USDT",
        ),
        spot(
            hf,
            &json!({}),
            delete("/api/v1/hf/orders/cancelAll"),
            "/api/v1/hf/orders/active?symbol=BTC-USDT",
        ),
        spot(
            margin,
            &json!({}),
            delete("/api/v3/hf/margin/orders?symbol=BTC-USDT&tradeType=MARGIN_TRADE"),
            "/api/v3/hf/margin/orders/active?symbol=BTC-USDT&tradeType=MARGIN_TRADE",
        ),
        spot(
            margin,
            &isolated(json!({})),
            delete("/api/v3/hf/margin/orders?symbol=BTC-USDT&tradeType=MARGIN_ISOLATED_TRADE"),
            "/api/v3/hf/margin/orders/active?symbol=BTC-USDT&tradeType=MARGIN_ISOLATED_TRADE",
        ),
        spot(
            "/api/v1/stop-order",
            &stop,
            delete("/api/v1/stop-order/cancel"),
            "/api/v1/stop-order",
        ),
        spot(
            margin_stop,
            &stop,
            delete("/api/v3/hf/margin/stop-order/cancel?tradeType=MARGIN_TRADE"),
            "/api/v3/hf/margin/stop-orders?tradeType=MARGIN_TRADE",
        ),
        spot(
            margin_stop,
            &isolated(stop.clone()),
            delete("/api/v3/hf/margin/stop-order/cancel?tradeType=MARGIN_ISOLATED_TRADE"),
            "/api/v3/hf/margin/stop-orders?tradeType=MARGIN_ISOLATED_TRADE",
        ),
        spot(
            "/api/v3/oco/order",
            &oco,
            delete("/api/v3/oco/orders"),
            "/api/v3/oco/orders",
        ),
        spot(
            margin_oco,
            &oco,
            delete("/api/v3/hf/margin/oco-order/cancel?tradeType=MARGIN_TRADE"),
            "/api/v3/hf/margin/oco-orders?pageSize=50&currentPage=1&tradeType=MARGIN_TRADE",
        ),
        spot(
            margin_oco,
            &isolated(oco.clone()),
            delete("/api/v3/hf/margin/oco-order/cancel?tradeType=MARGIN_ISOLATED_TRADE"),
            "/api/v3/hf/margin/oco-orders?pageSize=50&currentPage=1&tradeType=MARGIN_ISOLATED_TRADE",
        ),
        futures(
            "/api/v1/orders",
            &json!({}),
            "/api/v3/orders?symbol=XBTUSDTM",
            "/api/v1/orders?status=active",
        ),
        futures(
            "/api/v1/orders",
            &json!({"stop": "down", "stopPrice": "50500", "stopPriceType": "MP"}),
            "/api/v1/stopOrders?symbol=XBTUSDTM",
            "/api/v1/stopOrders?symbol=XBTUSDTM",
        ),
        futures(
            "/api/v1/st-orders",
            &json!({"symbol": "ETHUSDTM", "price": "2000", "triggerStopDownPrice": "1900"}),
            "/api/v1/stopOrders",
            "/api/v1/stopOrders",
        ),
    ];
    all.extend(unified_kinds());
    all
}

fn unified_kinds() -> Vec<Kind> {
    vec![
        unified(
            &json!({"tradeType": "SPOT", "symbol": "ETH-USDT"}),
            json!({"tradeType": "SPOT", "symbol": "ETH-USDT", "orderFilter": "NORMAL"}),
            "/api/ua/v2/unified/order/open-list?tradeType=SPOT",
        ),
        unified(
            &json!({"tradeType": "SPOT", "symbol": "ETH-USDT", "triggerPrice": "1900"}),
            json!({"tradeType": "SPOT", "symbol": "ETH-USDT", "orderFilter": "ADVANCED"}),
            "/api/ua/v2/unified/order/open-list?tradeType=SPOT&orderFilter=ADVANCED",
        ),
        unified(
            &json!({"tradeType": "MARGIN", "symbol": "ETH-USDT"}),
            json!({"tradeType": "MARGIN", "symbol": "ETH-USDT", "orderFilter": "NORMAL"}),
            "/api/ua/v2/unified/order/open-list?tradeType=MARGIN",
        ),
        unified(
            &json!({"tradeType": "FUTURES", "symbol": "ETHUSDTM"}),
            json!({"tradeType": "FUTURES", "symbol": "ETHUSDTM", "orderFilter": "NORMAL"}),
            "/api/ua/v2/unified/order/open-list?tradeType=FUTURES&symbol=ETHUSDTM",
        ),
        unified(
            &json!({"tradeType": "FUTURES", "symbol": "XBTUSDTM", "marginMode": "ISOLATED"}),
            json!({
                "tradeType": "FUTURES", "symbol": "XBTUSDTM", "orderFilter": "NORMAL", "marginMode": "ISOLATED",
            }),
            "/api/ua/v2/unified/order/open-list?tradeType=FUTURES&symbol=XBTUSDTM",
        ),
    ]
}

/// The clientOids that a list shows as open. Only lists of OCO orders also contain finished ones.
async fn listed(client: &Client, kind: &Kind) -> Vec<String> {
    let list = client.call(kind.host, "GET", kind.list, Value::Null).await;
    let list = list.data();
    let items = list.get("items").unwrap_or(&list);
    let items = items.as_array().unwrap().iter();
    items
        .filter(|item| item["status"] != "CANCELLED")
        .map(|item| text(item, "clientOid").to_owned())
        .collect()
}

fn open(client: &Client) -> Vec<String> {
    let orders = client.sim.orders(client.key.uid).into_iter();
    orders
        .filter(Order::is_open)
        .filter_map(|order| order.client_oid)
        .collect()
}

#[tokio::test]
async fn each_kind_of_order_is_listed_and_cancelled_only_by_its_own_requests() {
    let client = Client::start().await;
    let kinds = kinds();
    let mut expected = Vec::new();
    for (number, kind) in kinds.iter().enumerate() {
        let id = format!("kind-{number}");
        let (path, mut order) = kind.place.clone();
        order["clientOid"] = json!(id);
        client.call(kind.host, "POST", path, order).await.data();
        expected.push(id);
    }
    assert_eq!(open(&client), expected);
    for kind in &kinds {
        let id = expected.remove(0);
        let shown = listed(&client, kind).await;
        assert!(shown.contains(&id), "{}: {shown:?}", kind.list);
        let (method, target, body) = kind.cancel.clone();
        client.call(kind.host, method, target, body).await.data();
        assert_eq!(open(&client), expected, "after {target}");
        let shown = listed(&client, kind).await;
        assert!(!shown.contains(&id), "{}: {shown:?}", kind.list);
    }
}

#[tokio::test]
async fn every_current_cancel_all_endpoint_of_the_catalogue_is_tested() {
    let endpoints: Vec<Value> = serde_json::from_str(CATALOGUE).unwrap();
    let wanted: BTreeSet<_> = endpoints
        .iter()
        .filter(|one| one["effect"] == "cancel-all" && one["status"] == "current")
        .map(|one| {
            (
                text(one, "host"),
                text(one, "method"),
                text(one, "path").to_owned(),
            )
        })
        .collect();
    let known: BTreeSet<_> = kinds()
        .into_iter()
        .map(|kind| {
            let (method, target, _) = kind.cancel;
            let host = match kind.host {
                Host::Futures => "futures",
                Host::Spot => "spot",
            };
            (
                host,
                method,
                target.split('?').next().unwrap_or_default().to_owned(),
            )
        })
        .collect();
    assert_eq!(known, wanted);
}

#[tokio::test]
async fn missing_and_invalid_parameters_are_rejected() {
    let client = Client::start().await;
    let spot = [
        "DELETE /api/v1/hf/orders",
        "DELETE /api/v3/hf/margin/orders?symbol=BTC-USDT",
        "DELETE /api/v3/hf/margin/orders?symbol=BTC-USDT&tradeType=TRADE",
        "DELETE /api/v3/hf/margin/orders?tradeType=MARGIN_TRADE",
        "DELETE /api/v3/hf/margin/stop-order/cancel",
        "GET /api/ua/v2/unified/order/open-list",
        "GET /api/ua/v2/unified/order/open-list?tradeType=SPOT&orderFilter=ALL",
        "GET /api/v1/hf/orders/active",
        "GET /api/v1/hf/orders/active/page?pageNum=1",
        "GET /api/v1/hf/orders/active/page?symbol=BTC-USDT&pageSize=51",
        "GET /api/v1/stop-order?currentPage=0",
        "GET /api/v1/stop-order?pageSize=9",
        "GET /api/v3/hf/margin/oco-orders",
        "GET /api/v3/hf/margin/order/active/symbols",
        "GET /api/v3/hf/margin/orders/active?symbol=BTC-USDT",
        "GET /api/v3/hf/margin/orders/active?tradeType=MARGIN_TRADE",
    ];
    let futures = [
        "DELETE /api/v3/orders",
        "GET /api/v1/openOrderStatistics",
        "GET /api/v1/orders?status=open",
        "GET /api/v1/stopOrders?pageSize=1001",
    ];
    for (host, code, requests) in [
        (Host::Spot, "400100", &spot[..]),
        (Host::Futures, "100001", &futures),
    ] {
        for request in requests {
            let (method, target) = request.split_once(' ').unwrap();
            let answer = client.call(host, method, target, Value::Null).await;
            assert_eq!(answer.code(), code, "{request}");
        }
    }
    let complete = json!({"tradeType": "SPOT", "symbol": "ETH-USDT", "orderFilter": "NORMAL"});
    for name in ["tradeType", "symbol", "orderFilter"] {
        let mut body = complete.clone();
        body.as_object_mut().unwrap().remove(name);
        let path = "/api/ua/v2/unified/order/cancel-all";
        let answer = client.spot("POST", path, body).await;
        assert_eq!(answer.code(), "400100", "without {name}");
    }
}

#[tokio::test]
async fn futures_list_shows_finished_orders_unless_status_is_active() {
    let client = Client::start().await;
    for id in ["a", "b"] {
        let order = json!({"clientOid": id, "symbol": "XBTUSDTM", "side": "buy", "price": 50000, "size": 2});
        client.futures("POST", "/api/v1/orders", order).await.data();
    }
    let cancelled = "/api/v1/orders/client-order/a?symbol=XBTUSDTM";
    client
        .futures("DELETE", cancelled, Value::Null)
        .await
        .data();
    for (query, id) in [("", "a"), ("?status=done", "a"), ("?status=active", "b")] {
        let target = format!("/api/v1/orders{query}");
        let list = client.futures("GET", &target, Value::Null).await.data();
        assert_eq!(
            (&list["totalNum"], &list["items"][0]["clientOid"]),
            (&json!(1), &json!(id)),
            "{query}"
        );
    }
    let target = "/api/v1/openOrderStatistics?symbol=XBTUSDTM";
    let sums = client.futures("GET", target, Value::Null).await.data();
    assert_eq!(
        (&sums["openOrderBuySize"], &sums["openOrderSellSize"]),
        (&json!(2), &json!(0))
    );
}

#[tokio::test]
async fn lists_are_paged_and_filtered_and_symbols_with_open_orders_are_listed() {
    let client = Client::start().await;
    for number in 0..45 {
        let symbol = ["BTC-USDT", "ETH-USDT"][number % 2];
        let order = json!({
            "clientOid": format!("s{number}"), "symbol": symbol, "side": "sell", "price": "70000", "size": "0.01",
            "stopPrice": "65000",
        });
        let (stop, margin) = ("/api/v1/stop-order", "/api/v3/hf/margin/order");
        client.spot("POST", stop, order.clone()).await.data();
        let mut plain = order.as_object().unwrap().clone();
        plain.remove("stopPrice");
        plain.insert("isIsolated".to_owned(), json!(number == 0));
        client.spot("POST", margin, json!(plain)).await.data();
    }
    let list = async |query: &str| {
        let target = format!("/api/v1/stop-order?{query}");
        client.spot("GET", &target, Value::Null).await.data()
    };
    let mut seen = BTreeSet::new();
    for (page, length) in [(1, 20), (2, 20), (3, 5), (4, 0)] {
        let answer = list(&format!("pageSize=20&currentPage={page}")).await;
        assert_eq!(
            (&answer["totalNum"], &answer["totalPage"]),
            (&json!(45), &json!(3))
        );
        let items = answer["items"].as_array().unwrap();
        assert_eq!(items.len(), length, "page {page}");
        seen.extend(items.iter().map(|item| text(item, "id").to_owned()));
    }
    assert_eq!(seen.len(), 45);
    assert_eq!(list("symbol=ETH-USDT").await["totalNum"], 22);
    assert_eq!(list("side=buy").await["totalNum"], 0);
    assert_eq!(list("tradeType=MARGIN_TRADE").await["totalNum"], 0);
    let two: Vec<_> = seen.into_iter().take(2).collect();
    let ids = format!("orderIds={}", two.join(","));
    assert_eq!(list(&ids).await["totalNum"], 2);
    let target = format!("/api/v1/stop-order/cancel?{ids}");
    let cancelled = client.spot("DELETE", &target, Value::Null).await.data();
    assert_eq!(cancelled["cancelledOrderIds"].as_array().unwrap().len(), 2);
    assert_eq!(list("").await["totalNum"], 43);
    let symbols = async |kind: &str| {
        let target = format!("/api/v3/hf/margin/order/active/symbols?tradeType={kind}");
        let answer = client.spot("GET", &target, Value::Null).await.data();
        answer["symbols"].clone()
    };
    assert_eq!(
        symbols("MARGIN_TRADE").await,
        json!(["BTC-USDT", "ETH-USDT"])
    );
    assert_eq!(symbols("MARGIN_ISOLATED_TRADE").await, json!(["BTC-USDT"]));
}

#[tokio::test]
async fn cancel_all_can_be_accepted_before_it_takes_effect() {
    let client = Client::start().await;
    client.sim.set_cancel_lag(Duration::from_millis(300));
    let path = "/api/v1/hf/orders";
    for id in ["a", "b"] {
        let order = json!({"clientOid": id, "symbol": "BTC-USDT", "side": "buy", "price": "50000", "size": "1"});
        client.spot("POST", path, order).await.data();
    }
    let cancelled = client
        .spot("DELETE", "/api/v1/hf/orders/cancelAll", Value::Null)
        .await
        .data();
    assert_eq!(cancelled["succeedSymbols"], json!(["BTC-USDT"]));
    // A cancel by clientOid takes effect at once, also for an order that waits for the cancel-all.
    let named = "/api/v1/hf/orders/client-order/a?symbol=BTC-USDT";
    client.spot("DELETE", named, Value::Null).await.data();
    let later = "c";
    let order = json!({"clientOid": later, "symbol": "BTC-USDT", "side": "buy", "price": "50000", "size": "1"});
    client.spot("POST", path, order).await.data();
    for (after_ms, expected) in [
        (0, vec!["b", later]),
        (299, vec!["b", later]),
        (300, vec![later]),
    ] {
        client.sim.set_fixed_time_ms(NOW_MS + after_ms);
        assert_eq!(open(&client), expected, "after {after_ms} ms");
    }
}
