//! Orders of the unified trading account. Versions 1 and 2 of these paths use the same action names.

use serde_json::{Value, json};

use super::accounts::Accounts;
use super::amount::Amount;
use super::answers::{Outcome, Refusal};
use super::call::{Call, amount, flag, text};
use super::orders::{Book, Draft, Order, OrderState, Product};
use super::pages::Paging;

const BOOKS: &[Book] = &[Book::Unified];

/// `CROSS` and `ISOLATED` are version 1's names for `MARGIN` of version 2.
const TRADE_TYPES: [&str; 5] = ["CROSS", "FUTURES", "ISOLATED", "MARGIN", "SPOT"];

/// Answers the unified order endpoints; `None` for all others.
pub(super) fn answer(accounts: &mut Accounts, call: &Call<'_>) -> Option<Outcome> {
    let (method, path) = call.route();
    if path == "/api/ua/v1/{accountMode}/order/place-batch" {
        return Some(place_all(accounts, call));
    }
    let action = path
        .strip_prefix("/api/ua/v1/unified/order/")
        .or_else(|| path.strip_prefix("/api/ua/v2/unified/order/"))?;
    Some(match (method, action) {
        ("POST", "place") => place(accounts, call),
        ("POST", "amend") => amend(accounts, call),
        ("POST", "cancel") => cancel(accounts, call, &call.body).map(|order| named(&order)),
        ("POST", "cancel-batch") => cancel_named(accounts, call),
        ("POST", "cancel-all") => cancel_all(accounts, call),
        ("GET", "detail") => detail(accounts, call),
        ("GET", "open-list") => list(accounts, call, true),
        ("GET", "history") => list(accounts, call, false),
        ("GET", "execution") => Ok(json!({"items": [], "lastId": null})),
        _ => return None,
    })
}

fn bad(name: &str) -> Refusal {
    Product::Unified.bad_parameter(name)
}

fn trade_type(fields: &Value) -> Result<&str, Refusal> {
    text(fields, "tradeType")
        .filter(|kind| TRADE_TYPES.contains(kind))
        .ok_or_else(|| bad("tradeType"))
}

fn draft(kind: &str, fields: &Value) -> Result<Draft, Refusal> {
    let draft = Draft::read(Book::Unified, "orderType", fields)?;
    if (kind == "FUTURES") != draft.instrument.contracts_per_unit.is_some() {
        return Err(bad("symbol"));
    }
    match kind {
        "FUTURES" | "MARGIN" => draft.require_client_oid(),
        _ => Ok(draft),
    }
}

fn place(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let draft = draft(trade_type(&call.body)?, &call.body)?;
    accounts.place(call, draft).map(named)
}

/// Places several orders of one trade type. Version 2 has no such endpoint.
fn place_all(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let kind = trade_type(&call.body)?;
    let orders = call.body.get("orderList").and_then(Value::as_array);
    let orders = orders.ok_or_else(|| bad("orderList"))?;
    let mut items = Vec::new();
    for fields in orders {
        let mut fields = fields.clone();
        if let Some(fields) = fields.as_object_mut() {
            fields.insert("tradeType".to_owned(), json!(kind));
        }
        let order = draft(kind, &fields).and_then(|draft| accounts.place(call, draft));
        let (id, code, msg) = match order {
            Ok(order) => (Some(order.id.clone()), "200000", "success".to_owned()),
            Err(refusal) => (None, refusal.code, refusal.msg),
        };
        items.push(json!({
            "orderId": id, "clientOid": text(&fields, "clientOid"), "code": code, "msg": msg,
        }));
    }
    Ok(json!({"tradeType": kind, "ts": nanoseconds(call.now_ms), "items": items}))
}

/// Futures only: changes price or size in place. The held funds do not change.
fn amend(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let (price, size) = (
        amount(&call.body, "newPrice")?,
        amount(&call.body, "newSize")?,
    );
    let id = find(accounts, call, &call.body)?.id.clone();
    let order = accounts.of(call.uid).amend(&id, price, size, call.now_ms);
    order
        .map(named)
        .ok_or_else(|| Product::Unified.not_cancellable())
}

/// Finds the order with this id or clientOid; symbol and trade type must match it, if given.
fn find<'a>(
    accounts: &'a mut Accounts,
    call: &Call<'_>,
    named: &Value,
) -> Result<&'a Order, Refusal> {
    let account = accounts.of(call.uid);
    let order = match (text(named, "orderId"), text(named, "clientOid")) {
        (Some(id), _) => account.by_id(BOOKS, id),
        (None, Some(id)) => account.by_client_oid(BOOKS, id),
        (None, None) => return Err(bad("orderId")),
    };
    let matches = |order: &&Order, name: &str| {
        text(named, name).is_none_or(|value| text(&order.fields, name) == Some(value))
    };
    order
        .filter(|order| matches(order, "symbol") && matches(order, "tradeType"))
        .ok_or_else(|| Product::Unified.absent())
}

fn cancel(accounts: &mut Accounts, call: &Call<'_>, named: &Value) -> Result<Order, Refusal> {
    let id = find(accounts, call, named)?.id.clone();
    let order = accounts.of(call.uid).cancel(&id, call.now_ms).cloned();
    order.ok_or_else(|| Product::Unified.not_cancellable())
}

fn cancel_named(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let kind = trade_type(&call.body)?;
    let orders = call.body.get("cancelOrderList").and_then(Value::as_array);
    let orders = orders.ok_or_else(|| bad("cancelOrderList"))?;
    let mut items = Vec::new();
    for named in orders {
        let (code, msg) = match cancel(accounts, call, named) {
            Ok(_) => ("200000", "success".to_owned()),
            Err(refusal) => (refusal.code, refusal.msg),
        };
        items.push(json!({
            "orderId": text(named, "orderId"), "clientOid": text(named, "clientOid"), "code": code, "msg": msg,
        }));
    }
    Ok(json!({"tradeType": kind, "ts": nanoseconds(call.now_ms), "items": items}))
}

/// Cancels orders of one symbol, margin mode (default: cross) and kind (plain, or with a trigger). No request cancels
/// everything at once.
fn cancel_all(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let kind = trade_type(&call.body)?;
    let symbol = text(&call.body, "symbol").ok_or_else(|| bad("symbol"))?;
    let conditional = text(&call.body, "orderFilter")
        .and_then(is_advanced)
        .ok_or_else(|| bad("orderFilter"))?;
    let mode = margin_mode(&call.body);
    if !["CROSS", "ISOLATED"].contains(&mode) {
        return Err(bad("marginMode"));
    }
    let orders = accounts.of(call.uid).cancel_all(call.now_ms, |order| {
        order.book == Book::Unified
            && text(&order.fields, "tradeType") == Some(kind)
            && order.symbol == symbol
            && order.is_conditional() == conditional
            && (kind == "SPOT" || margin_mode(&order.fields) == mode)
    });
    let items: Value = orders.iter().map(named).collect();
    Ok(json!({"tradeType": kind, "ts": nanoseconds(call.now_ms), "items": items}))
}

fn detail(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let mut named = serde_json::Map::new();
    for name in ["tradeType", "symbol", "orderId", "clientOid"] {
        if let Some(value) = call.query(name) {
            named.insert(name.to_owned(), json!(value));
        }
    }
    let named = Value::Object(named);
    trade_type(&named)?;
    if text(&named, "symbol").is_none() {
        return Err(bad("symbol"));
    }
    find(accounts, call, &named).map(order_view)
}

/// Whether a filter selects orders with a trigger; `None` if it is not a filter.
fn is_advanced(filter: &str) -> Option<bool> {
    match filter {
        "ADVANCED" => Some(true),
        "NORMAL" => Some(false),
        _ => None,
    }
}

fn margin_mode(fields: &Value) -> &str {
    text(fields, "marginMode").unwrap_or("CROSS")
}

/// Lists orders of one trade type: plain ones by default, or those with a trigger.
fn list(accounts: &mut Accounts, call: &Call<'_>, open: bool) -> Outcome {
    let kind = call.query("tradeType");
    let kind = kind.filter(|kind| TRADE_TYPES.contains(kind));
    let kind = kind.ok_or_else(|| bad("tradeType"))?;
    let filter = call.query("orderFilter").unwrap_or("NORMAL");
    let conditional = is_advanced(filter).ok_or_else(|| bad("orderFilter"))?;
    let items: Vec<Value> = accounts
        .of(call.uid)
        .list(|order| {
            order.book == Book::Unified
                && order.is_open() == open
                && order.is_conditional() == conditional
                && call.matches_symbol(&order.symbol)
                && text(&order.fields, "tradeType") == Some(kind)
        })
        .map(order_view)
        .collect();
    let paging = Paging {
        number: "pageNumber",
        sizes: 1..=200,
        default_size: Some(50),
    };
    let page = paging.cut(call, Product::Unified, &items)?;
    // Only version 1 returns the total.
    if call.endpoint.path.starts_with("/api/ua/v1/") {
        return Ok(json!({
            "tradeType": kind, "pageNumber": page.number, "pageSize": page.size, "totalNum": page.total,
            "totalPage": page.pages, "items": page.items,
        }));
    }
    Ok(json!({"tradeType": kind, "pageNumber": page.number, "items": page.items}))
}

fn nanoseconds(ms: i64) -> i64 {
    ms.saturating_mul(1_000_000)
}

fn named(order: &Order) -> Value {
    json!({
        "orderId": order.id, "clientOid": order.client_oid, "tradeType": order.sent("tradeType"),
        "ts": nanoseconds(order.updated_at_ms),
    })
}

fn order_view(order: &Order) -> Value {
    // Numbers as ccxt reads them: 0 waiting for its trigger, 2 open, 3 filled, 5 cancelled.
    let state = match order.state {
        OrderState::Cancelled => 5,
        OrderState::Filled => 3,
        OrderState::Open if order.is_conditional() => 0,
        OrderState::Open => 2,
    };
    let price = order.price.unwrap_or(Amount::ZERO);
    json!({
        "orderId": order.id, "clientOid": order.client_oid, "symbol": order.symbol, "tradeType": order.sent("tradeType"),
        "orderType": if order.price.is_none() { "MARKET" } else { "LIMIT" }, "side": order.side.upper(),
        "size": order.size, "sizeUnit": text(&order.fields, "sizeUnit").unwrap_or("BASECCY"), "price": price,
        "timeInForce": text(&order.fields, "timeInForce").unwrap_or("GTC"), "tags": order.sent("tags"),
        "orderTime": nanoseconds(order.created_at_ms), "updatedTime": nanoseconds(order.updated_at_ms), "stp": "",
        "marginMode": if order.sent("tradeType") == "SPOT" { "" } else { margin_mode(&order.fields) },
        "cancelAfter": null, "postOnly": flag(&order.fields, "postOnly"), "reduceOnly": flag(&order.fields, "reduceOnly"),
        "triggerDirection": order.sent("triggerDirection"), "triggerPrice": order.sent("triggerPrice"),
        "triggerPriceType": order.sent("triggerPriceType"), "filledSize": order.filled, "avgPrice": "0", "fee": "0",
        "feeCurrency": "USDT", "tax": "0", "triggerOrderId": "", "cancelReason": "", "cancelSize": order.cancelled,
        "tradeId": "", "status": state,
    })
}
