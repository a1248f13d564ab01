//! Futures orders, including copy trading.

use serde_json::{Value, json};

use super::accounts::Accounts;
use super::amount::Amount;
use super::answers::{Outcome, Refusal, refuse};
use super::call::{Call, flag, text};
use super::orders::{Book, Draft, Order, OrderState, Product, Side};
use super::pages::Paging;

const BOOKS: &[Book] = &[Book::Futures];

const PAGING: Paging = Paging {
    number: "currentPage",
    sizes: 1..=1000,
    default_size: Some(50),
};

/// Answers the futures order endpoints; `None` for all others.
pub(super) fn answer(accounts: &mut Accounts, call: &Call<'_>) -> Option<Outcome> {
    Some(match call.route() {
        (
            "POST",
            "/api/v1/orders"
            | "/api/v1/st-orders"
            | "/api/v1/copy-trade/futures/orders"
            | "/api/v1/copy-trade/futures/st-orders",
        ) => place(accounts, call),
        ("POST", "/api/v1/orders/test" | "/api/v1/copy-trade/futures/orders/test") => {
            test(accounts, call)
        }
        ("POST", "/api/v1/orders/multi") => place_all(accounts, call),
        ("GET", "/api/v1/orders/{orderId}") => {
            let id = call.param("orderId").unwrap_or_default();
            let found = accounts.of(call.uid).by_id(BOOKS, id);
            found.map(order_view).ok_or_else(absent)
        }
        ("GET", "/api/v1/orders/byClientOid") => {
            let id = call.query("clientOid").unwrap_or_default();
            let found = accounts.of(call.uid).by_client_oid(BOOKS, id);
            found.map(order_view).ok_or_else(absent)
        }
        ("GET", "/api/v1/orders") => match call.query("status") {
            Some("active") => page(accounts, call, |order| {
                order.is_open() && !order.is_conditional()
            }),
            None | Some("done") => page(accounts, call, |order| !order.is_open()),
            Some(_) => Err(Product::Futures.bad_parameter("status")),
        },
        ("GET", "/api/v1/stopOrders") => page(accounts, call, |order| {
            order.is_open() && order.is_conditional()
        }),
        ("GET", "/api/v1/openOrderStatistics") => statistics(accounts, call),
        ("GET", "/api/v1/recentDoneOrders") => {
            Ok(json!(list(accounts, call, |order| !order.is_open())))
        }
        ("DELETE", "/api/v1/orders/{orderId}" | "/api/v1/copy-trade/futures/orders") => {
            let id = call.any("orderId").unwrap_or_default();
            let order = cancel(accounts, call, id, None);
            order.map(|order| json!({"cancelledOrderIds": [order.id]}))
        }
        (
            "DELETE",
            "/api/v1/orders/client-order/{clientOid}"
            | "/api/v1/copy-trade/futures/orders/client-order",
        ) => {
            let id = call.any("clientOid").unwrap_or_default();
            let order = cancel_client_oid(accounts, call, id, call.query("symbol"));
            order.map(|order| json!({"clientOid": order.client_oid}))
        }
        ("DELETE", "/api/v1/orders/multi-cancel") => cancel_named(accounts, call),
        ("DELETE", "/api/v1/orders") => {
            Ok(cancel_all(accounts, call, |order| !order.is_conditional()))
        }
        // Unlike version 1, which cancels everything without a symbol, version 3 requires one.
        ("DELETE", "/api/v3/orders") => {
            symbol(call).map(|_| cancel_all(accounts, call, |order| !order.is_conditional()))
        }
        ("DELETE", "/api/v1/stopOrders") => Ok(cancel_all(accounts, call, Order::is_conditional)),
        _ => return None,
    })
}

fn absent() -> Refusal {
    Product::Futures.absent()
}

fn draft(fields: &Value) -> Result<Draft, Refusal> {
    Draft::read(Book::Futures, "type", fields)?.require_client_oid()
}

fn place(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let order = accounts.place(call, draft(&call.body)?)?;
    Ok(json!({"orderId": order.id, "clientOid": order.client_oid}))
}

fn test(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let draft = draft(&call.body)?;
    accounts.of(call.uid).check(&draft)?;
    Ok(json!({"orderId": "000000000000000000", "clientOid": draft.client_oid}))
}

fn place_all(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let orders = call.body.as_array();
    let orders = orders.ok_or_else(|| refuse("100001", "The body is not a list of orders"))?;
    Ok(orders
        .iter()
        .map(|fields| {
            let (id, code, msg) = match draft(fields).and_then(|draft| accounts.place(call, draft)) {
                Ok(order) => (Some(order.id.clone()), "200000", "success".to_owned()),
                Err(refusal) => (None, refusal.code, refusal.msg),
            };
            json!({
                "orderId": id, "clientOid": text(fields, "clientOid"), "symbol": text(fields, "symbol"),
                "code": code, "msg": msg,
            })
        })
        .collect())
}

fn cancel(
    accounts: &mut Accounts,
    call: &Call<'_>,
    id: &str,
    symbol: Option<&str>,
) -> Result<Order, Refusal> {
    let account = accounts.of(call.uid);
    account
        .by_id(BOOKS, id)
        .filter(|order| symbol.is_none_or(|symbol| symbol == order.symbol))
        .ok_or_else(absent)?;
    let order = account.cancel(id, call.now_ms).cloned();
    order.ok_or_else(|| Product::Futures.not_cancellable())
}

fn cancel_client_oid(
    accounts: &mut Accounts,
    call: &Call<'_>,
    client_oid: &str,
    symbol: Option<&str>,
) -> Result<Order, Refusal> {
    let order = accounts.of(call.uid).by_client_oid(BOOKS, client_oid);
    let id = order.ok_or_else(absent)?.id.clone();
    cancel(accounts, call, &id, symbol)
}

/// Cancels orders by id, or by clientOid and symbol. Only in this answer the items have the code `200`.
fn cancel_named(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let item = |order_id: Option<&str>,
                client_oid: Option<&str>,
                result: Result<Order, Refusal>| {
        let (order, code, msg) = match result {
            Ok(order) => (Some(order), "200", "success".to_owned()),
            Err(refusal) => (None, refusal.code, refusal.msg),
        };
        let known = order.as_ref().map(|order| order.id.as_str());
        json!({"orderId": known.or(order_id), "clientOid": client_oid, "code": code, "msg": msg})
    };
    let named = |list: &str| call.body.get(list).and_then(Value::as_array);
    let mut items = Vec::new();
    for id in named("orderIdsList").into_iter().flatten() {
        let id = id.as_str().unwrap_or_default();
        items.push(item(Some(id), None, cancel(accounts, call, id, None)));
    }
    for entry in named("clientOidsList").into_iter().flatten() {
        let client_oid = text(entry, "clientOid").unwrap_or_default();
        let result = cancel_client_oid(accounts, call, client_oid, text(entry, "symbol"));
        items.push(item(None, Some(client_oid), result));
    }
    if items.is_empty() {
        return Err(Product::Futures.bad_parameter("orderIdsList"));
    }
    Ok(Value::Array(items))
}

fn symbol<'a>(call: &'a Call<'_>) -> Result<&'a str, Refusal> {
    call.query("symbol")
        .ok_or_else(|| Product::Futures.bad_parameter("symbol"))
}

fn cancel_all(accounts: &mut Accounts, call: &Call<'_>, kind: fn(&Order) -> bool) -> Value {
    let orders = accounts.of(call.uid).cancel_all(call.now_ms, |order| {
        order.book == Book::Futures && kind(order) && call.matches_symbol(&order.symbol)
    });
    let ids: Vec<String> = orders.into_iter().map(|order| order.id).collect();
    json!({"cancelledOrderIds": ids})
}

fn list(accounts: &mut Accounts, call: &Call<'_>, kind: fn(&Order) -> bool) -> Vec<Value> {
    accounts
        .of(call.uid)
        .list(|order| {
            order.book == Book::Futures && kind(order) && call.matches_symbol(&order.symbol)
        })
        .map(order_view)
        .collect()
}

fn page(accounts: &mut Accounts, call: &Call<'_>, kind: fn(&Order) -> bool) -> Outcome {
    PAGING.answer(call, Product::Futures, &list(accounts, call, kind))
}

/// Size and cost of the resting orders of one symbol.
fn statistics(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let symbol = symbol(call)?;
    let mut sums = [(Amount::ZERO, Amount::ZERO); 2];
    for order in accounts.of(call.uid).list(|order| {
        order.book == Book::Futures
            && order.is_open()
            && !order.is_conditional()
            && order.symbol == symbol
    }) {
        let [buy, sell] = &mut sums;
        let (size, cost) = match order.side {
            Side::Buy => buy,
            Side::Sell => sell,
        };
        *size += order.remaining();
        *cost += order.held.1;
    }
    let [buy, sell] = sums;
    Ok(json!({
        "openOrderBuySize": buy.0.to_json_number(), "openOrderSellSize": sell.0.to_json_number(),
        "openOrderBuyCost": buy.1, "openOrderSellCost": sell.1, "settleCurrency": "USDT",
    }))
}

fn order_view(order: &Order) -> Value {
    let done = !order.is_open();
    let stop_price = text(&order.fields, "stopPrice").and_then(|price| price.parse::<f64>().ok());
    json!({
        "id": order.id, "clientOid": order.client_oid, "symbol": order.symbol,
        "type": if order.price.is_none() { "market" } else { "limit" }, "side": order.side.lower(),
        "price": order.price, "size": order.size.to_json_number(), "value": order.filled_value(),
        "dealValue": order.filled_value(), "dealSize": order.filled.to_json_number(),
        "filledValue": order.filled_value(), "filledSize": order.filled.to_json_number(), "avgDealPrice": "0",
        "stp": "", "stop": order.sent("stop"), "stopPriceType": order.sent("stopPriceType"), "stopTriggered": false,
        "stopPrice": stop_price, "timeInForce": text(&order.fields, "timeInForce").unwrap_or("GTC"),
        "postOnly": flag(&order.fields, "postOnly"), "hidden": false, "iceberg": false,
        "leverage": leverage(order), "forceHold": false, "closeOrder": flag(&order.fields, "closeOrder"),
        "reduceOnly": flag(&order.fields, "reduceOnly"), "visibleSize": null, "remark": order.sent("remark"), "tags": "",
        "isActive": !done, "cancelExist": order.state == OrderState::Cancelled,
        "status": if done { "done" } else { "open" }, "createdAt": order.created_at_ms,
        "updatedAt": order.updated_at_ms, "endAt": done.then_some(order.updated_at_ms),
        "orderTime": order.created_at_ms.saturating_mul(1_000_000), "settleCurrency": "USDT",
        "marginMode": text(&order.fields, "marginMode").unwrap_or("ISOLATED"),
    })
}

fn leverage(order: &Order) -> String {
    match order.fields.get("leverage") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        _ => "1".to_owned(),
    }
}
