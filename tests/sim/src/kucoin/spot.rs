//! Spot and margin orders of the high-frequency API, and of the old spot API as far as it still exists.

use serde_json::{Value, json};

use super::accounts::Accounts;
use super::amount::Amount;
use super::answers::{Outcome, Refusal, refuse};
use super::call::{Call, amount, flag, text};
use super::orders::{Book, Draft, Order, Product};
use super::pages::{FIFTY, Paging};

/// Answers the spot and margin order endpoints; `None` for all others.
pub(super) fn answer(accounts: &mut Accounts, call: &Call<'_>) -> Option<Outcome> {
    high_frequency(accounts, call)
        .or_else(|| margin(accounts, call))
        .or_else(|| old(accounts, call))
}

fn high_frequency(accounts: &mut Accounts, call: &Call<'_>) -> Option<Outcome> {
    const BOOK: Book = Book::Spot;
    let (method, path) = call.route();
    let action = path.strip_prefix("/api/v1/hf/")?;
    Some(match (method, action) {
        ("POST", "orders") => place(accounts, call, BOOK, placed),
        ("POST", "orders/sync") => place(accounts, call, BOOK, matched),
        ("POST", "orders/test") => test(accounts, call, BOOK),
        ("POST", "orders/multi") => place_all(accounts, call, |_, order| item(order, placed)),
        ("POST", "orders/multi/sync") => place_all(accounts, call, |_, order| item(order, matched)),
        ("POST", "orders/alter") => alter(accounts, call),
        ("GET", "orders/client-order/{clientOid}" | "orders/{orderId}") => {
            find(accounts, call, BOOK).map(order_view)
        }
        ("GET", "orders/active") => {
            symbol(call, BOOK).map(|_| json!(list(accounts, call, BOOK, true)))
        }
        ("GET", "orders/active/page") => symbol(call, BOOK).and_then(|_| {
            let paging = Paging {
                number: "pageNum",
                sizes: 1..=50,
                default_size: Some(20),
            };
            paging.answer(call, Product::Spot, &list(accounts, call, BOOK, true))
        }),
        ("GET", "orders/active/symbols") => {
            Ok(json!({"symbols": open_symbols(accounts, call, BOOK)}))
        }
        ("GET", "orders/done") => Ok(scrolled(&list(accounts, call, BOOK, false))),
        ("GET", "fills") => Ok(scrolled(&[])),
        ("DELETE", "orders/{orderId}") => cancel(accounts, call, BOOK, by_id),
        ("DELETE", "orders/client-order/{clientOid}") => {
            cancel(accounts, call, BOOK, by_client_oid)
        }
        ("DELETE", "orders/sync/{orderId}") => cancel(accounts, call, BOOK, |order| {
            joined(by_id(order), sizes(order))
        }),
        ("DELETE", "orders/sync/client-order/{clientOid}") => {
            cancel(accounts, call, BOOK, |order| {
                joined(by_client_oid(order), sizes(order))
            })
        }
        ("DELETE", "orders/cancel/{orderId}") => reduce(accounts, call),
        ("DELETE", "orders") => symbol(call, BOOK).map(|_| cancel_fitting(accounts, call, BOOK)),
        ("DELETE", "orders/cancelAll") => {
            let symbols = open_symbols(accounts, call, BOOK);
            cancel_where(accounts, call, |order| order.book == BOOK);
            Ok(json!({"succeedSymbols": symbols, "failedSymbols": []}))
        }
        _ => return None,
    })
}

fn margin(accounts: &mut Accounts, call: &Call<'_>) -> Option<Outcome> {
    const BOOK: Book = Book::Margin;
    let (method, path) = call.route();
    let action = path.strip_prefix("/api/v3/hf/margin/")?;
    Some(match (method, action) {
        ("POST", "order") => place(accounts, call, BOOK, margin_placed),
        ("POST", "order/test") => test(accounts, call, BOOK),
        ("GET", "orders/client-order/{clientOid}" | "orders/{orderId}") => {
            find(accounts, call, BOOK).map(order_view)
        }
        ("GET", "orders/active") => symbol(call, BOOK)
            .and_then(|_| margin_trade_type(call))
            .map(|_| json!(list(accounts, call, BOOK, true))),
        ("GET", "orders/done") => Ok(scrolled(&list(accounts, call, BOOK, false))),
        ("GET", "order/active/symbols") => margin_trade_type(call).map(|_| {
            let symbols = open_symbols(accounts, call, BOOK);
            json!({"symbolSize": symbols.len(), "symbols": symbols})
        }),
        ("GET", "fills") => Ok(scrolled(&[])),
        ("DELETE", "orders/{orderId}") => cancel(accounts, call, BOOK, by_id),
        ("DELETE", "orders/client-order/{clientOid}") => {
            cancel(accounts, call, BOOK, by_client_oid)
        }
        ("DELETE", "orders") => symbol(call, BOOK)
            .and_then(|_| margin_trade_type(call))
            .map(|_| cancel_fitting(accounts, call, BOOK)),
        _ => return None,
    })
}

/// The old API has one kind of order for spot and margin; here they are all spot.
fn old(accounts: &mut Accounts, call: &Call<'_>) -> Option<Outcome> {
    const BOOK: Book = Book::Spot;
    Some(match call.route() {
        ("POST", "/api/v1/orders" | "/api/v1/margin/order") => place(accounts, call, BOOK, by_id),
        ("POST", "/api/v1/orders/test" | "/api/v1/margin/order/test") => test(accounts, call, BOOK),
        ("POST", "/api/v1/orders/multi") => {
            place_all(accounts, call, old_item).map(|items| json!({"data": items}))
        }
        ("GET", "/api/v1/order/client-order/{clientOid}" | "/api/v1/orders/{orderId}") => {
            find(accounts, call, BOOK).map(old_view)
        }
        ("GET", "/api/v1/orders") => {
            let open = call.query("status") == Some("active");
            FIFTY.answer(call, Product::Spot, &list(accounts, call, BOOK, open))
        }
        ("DELETE", "/api/v1/orders/{orderId}") => cancel(
            accounts,
            call,
            BOOK,
            |order| json!({"cancelledOrderIds": [order.id]}),
        ),
        ("DELETE", "/api/v1/order/client-order/{clientOid}") => cancel(
            accounts,
            call,
            BOOK,
            |order| json!({"cancelledOrderId": order.id, "clientOid": order.client_oid}),
        ),
        ("DELETE", "/api/v1/orders") => {
            let orders = cancel_where(accounts, call, |order| {
                order.book == BOOK && call.matches_symbol(&order.symbol)
            });
            let ids: Vec<String> = orders.into_iter().map(|order| order.id).collect();
            Ok(json!({"cancelledOrderIds": ids}))
        }
        _ => return None,
    })
}

/// The order format of the API of this call.
fn view_of(call: &Call<'_>) -> fn(&Order) -> Value {
    if call.endpoint.path.starts_with("/api/v1/order") {
        old_view
    } else {
        order_view
    }
}

fn draft(book: Book, fields: &Value) -> Result<Draft, Refusal> {
    let draft = Draft::read(book, "type", fields)?;
    match book {
        Book::Margin => draft.require_client_oid(),
        _ => Ok(draft),
    }
}

fn place(
    accounts: &mut Accounts,
    call: &Call<'_>,
    book: Book,
    view: fn(&Order) -> Value,
) -> Outcome {
    accounts.place(call, draft(book, &call.body)?).map(view)
}

fn test(accounts: &mut Accounts, call: &Call<'_>, book: Book) -> Outcome {
    let draft = draft(book, &call.body)?;
    accounts.of(call.uid).check(&draft)?;
    Ok(json!({"orderId": "000000000000000000", "clientOid": draft.client_oid}))
}

/// The answer itself is always a success; each order has its own result.
fn place_all(
    accounts: &mut Accounts,
    call: &Call<'_>,
    item: fn(&Value, Result<&Order, Refusal>) -> Value,
) -> Outcome {
    let orders = call.body.get("orderList").and_then(Value::as_array);
    let orders = orders.ok_or_else(|| Product::Spot.bad_parameter("orderList"))?;
    Ok(orders
        .iter()
        .map(|fields| {
            let order = draft(Book::Spot, fields).and_then(|draft| accounts.place(call, draft));
            item(fields, order)
        })
        .collect())
}

/// Cancels the order and places a new one under the same clientOid; the new order has a new id.
fn alter(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let order = find(accounts, call, Book::Spot)?;
    let (id, client_oid) = (order.id.clone(), order.client_oid.clone());
    let mut fields = order.fields.clone();
    for (name, new) in [("size", "newSize"), ("price", "newPrice")] {
        let Some(value) = amount(&call.body, new)? else {
            continue;
        };
        if let Some(fields) = fields.as_object_mut() {
            fields.insert(name.to_owned(), json!(value));
        }
    }
    let draft = draft(Book::Spot, &fields)?;
    let account = accounts.of(call.uid);
    account
        .cancel(&id, call.now_ms)
        .ok_or_else(|| Product::Spot.not_cancellable())?;
    if let Some(client_oid) = &client_oid {
        account.free_client_oid(Product::Spot, client_oid);
    }
    let order = accounts.place(call, draft)?;
    Ok(json!({"newOrderId": order.id, "clientOid": client_oid}))
}

/// Finds the order by the id or clientOid in path, query or body.
fn find<'a>(accounts: &'a mut Accounts, call: &Call<'_>, book: Book) -> Result<&'a Order, Refusal> {
    let account = accounts.of(call.uid);
    let order = match (call.any("orderId"), call.any("clientOid")) {
        (Some(id), _) => account.by_id(&[book], id),
        (None, Some(id)) => account.by_client_oid(&[book], id),
        (None, None) => return Err(book.product().bad_parameter("orderId")),
    };
    // An order of another symbol is not found.
    order
        .filter(|order| {
            call.any("symbol")
                .is_none_or(|symbol| symbol == order.symbol)
        })
        .ok_or_else(|| book.product().absent())
}

fn cancel(
    accounts: &mut Accounts,
    call: &Call<'_>,
    book: Book,
    view: fn(&Order) -> Value,
) -> Outcome {
    let refusal = || book.product().not_cancellable();
    let id = find(accounts, call, book)
        .map_err(|_| refusal())?
        .id
        .clone();
    let account = accounts.of(call.uid);
    account
        .cancel(&id, call.now_ms)
        .map(view)
        .ok_or_else(refusal)
}

fn reduce(accounts: &mut Accounts, call: &Call<'_>) -> Outcome {
    let size = call.query("cancelSize").and_then(|size| size.parse().ok());
    let size = size.ok_or_else(|| refuse("400100", "Parameter error: cancelSize"))?;
    let id = find(accounts, call, Book::Spot)?.id.clone();
    let account = accounts.of(call.uid);
    account
        .reduce(&id, size, call.now_ms)
        .map(|order| json!({"orderId": order.id, "cancelSize": size}))
        .ok_or_else(|| Product::Spot.not_cancellable())
}

/// The required parameter `symbol`.
fn symbol<'a>(call: &'a Call<'_>, book: Book) -> Result<&'a str, Refusal> {
    call.query("symbol")
        .ok_or_else(|| book.product().bad_parameter("symbol"))
}

/// The required parameter `tradeType`: cross or isolated margin.
pub(super) fn margin_trade_type<'a>(call: &'a Call<'_>) -> Result<&'a str, Refusal> {
    call.query("tradeType")
        .filter(|kind| ["MARGIN_ISOLATED_TRADE", "MARGIN_TRADE"].contains(kind))
        .ok_or_else(|| Product::Margin.bad_parameter("tradeType"))
}

/// Cancels the orders of the call's symbol and trade type.
fn cancel_fitting(accounts: &mut Accounts, call: &Call<'_>, book: Book) -> Value {
    cancel_where(accounts, call, |order| fits(call, book, order));
    json!("success")
}

/// Whether an order is of this book, and of the call's symbol and trade type, if it has these parameters.
fn fits(call: &Call<'_>, book: Book, order: &Order) -> bool {
    order.book == book
        && call.matches_symbol(&order.symbol)
        && (book != Book::Margin
            || call
                .query("tradeType")
                .is_none_or(|kind| kind == order.trade_type()))
}

fn cancel_where(
    accounts: &mut Accounts,
    call: &Call<'_>,
    fits: impl Fn(&Order) -> bool,
) -> Vec<Order> {
    accounts.of(call.uid).cancel_all(call.now_ms, fits)
}

fn list(accounts: &mut Accounts, call: &Call<'_>, book: Book, open: bool) -> Vec<Value> {
    accounts
        .of(call.uid)
        .list(|order| order.is_open() == open && fits(call, book, order))
        .map(view_of(call))
        .collect()
}

/// All items in one answer; KuCoin would return them in parts.
fn scrolled(items: &[Value]) -> Value {
    json!({"lastId": 0, "items": items})
}

fn open_symbols(accounts: &mut Accounts, call: &Call<'_>, book: Book) -> Vec<String> {
    let mut symbols: Vec<String> = accounts
        .of(call.uid)
        .list(|order| order.is_open() && fits(call, book, order))
        .map(|order| order.symbol.clone())
        .collect();
    symbols.sort();
    symbols.dedup();
    symbols
}

fn placed(order: &Order) -> Value {
    json!({"orderId": order.id, "clientOid": order.client_oid})
}

/// A refused order of a batch has no id.
fn item(order: Result<&Order, Refusal>, view: fn(&Order) -> Value) -> Value {
    match order {
        Ok(order) => joined(view(order), json!({"success": true})),
        Err(refusal) => json!({"success": false, "failMsg": refusal.msg}),
    }
}

fn old_item(fields: &Value, order: Result<&Order, Refusal>) -> Value {
    let (id, status, problem) = match order {
        Ok(order) => (Some(order.id.clone()), "success", None),
        Err(refusal) => (None, "fail", Some(refusal.msg)),
    };
    json!({
        "id": id, "clientOid": text(fields, "clientOid"), "symbol": text(fields, "symbol"), "status": status,
        "failMsg": problem,
    })
}

fn margin_placed(order: &Order) -> Value {
    json!({"orderId": order.id, "clientOid": order.client_oid, "loanApplyId": null, "borrowSize": "0"})
}

fn matched(order: &Order) -> Value {
    let times = json!({"orderTime": order.created_at_ms, "matchTime": order.updated_at_ms});
    joined(joined(placed(order), sizes(order)), times)
}

fn by_id(order: &Order) -> Value {
    json!({"orderId": order.id})
}

fn by_client_oid(order: &Order) -> Value {
    json!({"clientOid": order.client_oid})
}

fn sizes(order: &Order) -> Value {
    json!({
        "originSize": order.size, "dealSize": order.filled, "remainSize": order.remaining(),
        "canceledSize": order.cancelled, "status": if order.is_open() { "open" } else { "done" },
    })
}

/// Merges two objects.
fn joined(mut one: Value, other: Value) -> Value {
    if let (Some(one), Value::Object(other)) = (one.as_object_mut(), other) {
        one.extend(other);
    }
    one
}

fn order_view(order: &Order) -> Value {
    let market = order.price.is_none();
    let funds = match order.sent_funds() {
        Some(funds) => funds.clone(),
        None if market => json!(order.filled_value()),
        None => json!(Amount::ZERO),
    };
    json!({
        "id": order.id, "clientOid": order.client_oid, "symbol": order.symbol, "opType": "DEAL",
        "type": if market { "market" } else { "limit" }, "side": order.side.lower(),
        "price": order.price.unwrap_or_default(), "size": order.size,
        "funds": funds,
        "dealSize": order.filled, "dealFunds": order.filled_value(), "remainSize": order.remaining(), "remainFunds": "0",
        "cancelledSize": order.cancelled, "cancelledFunds": "0", "fee": "0", "feeCurrency": "USDT", "tax": "0",
        "stp": text(&order.fields, "stp"), "stop": "", "stopTriggered": false, "stopPrice": "0",
        "timeInForce": text(&order.fields, "timeInForce").unwrap_or("GTC"),
        "postOnly": flag(&order.fields, "postOnly"), "hidden": false, "iceberg": false, "visibleSize": "0",
        "cancelAfter": 0, "channel": "API", "remark": order.sent("remark"), "tags": order.sent("tags"),
        "cancelExist": order.cancelled > Amount::ZERO, "tradeType": order.trade_type(),
        "inOrderBook": order.is_open(), "active": order.is_open(),
        "createdAt": order.created_at_ms, "lastUpdatedAt": order.updated_at_ms,
    })
}

fn old_view(order: &Order) -> Value {
    joined(order_view(order), json!({"isActive": order.is_open()}))
}
