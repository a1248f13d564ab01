//! Stop orders and one-cancels-other (OCO) orders of spot and margin. They never trigger: prices are fixed.

use serde_json::{Value, json};

use super::accounts::Accounts;
use super::amount::Amount;
use super::answers::{Outcome, Refusal};
use super::call::{Call, text};
use super::orders::{Book, Draft, Order, OrderState};
use super::pages::{FIFTY, Paging};
use super::spot::margin_trade_type;

/// Answers the stop and OCO endpoints; `None` for all others.
pub(super) fn answer(accounts: &mut Accounts, call: &Call<'_>) -> Option<Outcome> {
    let path = call.endpoint.path.as_str();
    let book = [
        ("/api/v1/stop-order", Book::SpotStop),
        ("/api/v3/hf/margin/oco-order", Book::MarginOco),
        ("/api/v3/hf/margin/stop-order", Book::MarginStop),
        ("/api/v3/oco/", Book::SpotOco),
    ]
    .into_iter()
    .find_map(|(prefix, book)| path.starts_with(prefix).then_some(book))?;
    Some(match call.route() {
        (
            "POST",
            "/api/v1/stop-order"
            | "/api/v3/hf/margin/stop-order"
            | "/api/v3/oco/order"
            | "/api/v3/hf/margin/oco-order",
        ) => place(accounts, call, book),
        (
            "GET",
            "/api/v1/stop-order/{orderId}"
            | "/api/v3/hf/margin/stop-order/orderId"
            | "/api/v3/hf/margin/stop-order/clientOid",
        ) => find(accounts, call, book).map(stop_view),
        ("GET", "/api/v1/stop-order/queryOrderByClientOid") => {
            // The answer is a list; assumed to be empty for an unknown clientOid.
            Ok(find(accounts, call, book)
                .into_iter()
                .map(stop_view)
                .collect())
        }
        (
            "GET",
            "/api/v3/oco/order/{orderId}"
            | "/api/v3/oco/client-order/{clientOid}"
            | "/api/v3/hf/margin/oco-order/orderId"
            | "/api/v3/hf/margin/oco-order/clientOid",
        ) => find(accounts, call, book).map(oco_view),
        (
            "GET",
            "/api/v3/oco/order/details/{orderId}" | "/api/v3/hf/margin/oco-order/detail/orderId",
        ) => find(accounts, call, book).map(oco_detail),
        ("GET", "/api/v1/stop-order" | "/api/v3/hf/margin/stop-orders") => {
            list(accounts, call, book, stop_view)
        }
        ("GET", "/api/v3/oco/orders" | "/api/v3/hf/margin/oco-orders") => {
            list(accounts, call, book, oco_view)
        }
        ("DELETE", "/api/v1/stop-order/cancelOrderByClientOid") => {
            let order = cancel(accounts, call, book);
            order.map(|order| json!({"cancelledOrderId": order.id, "clientOid": order.client_oid}))
        }
        (
            "DELETE",
            "/api/v1/stop-order/{orderId}"
            | "/api/v3/hf/margin/stop-order/cancel-by-id"
            | "/api/v3/hf/margin/stop-order/cancel-by-clientOid"
            | "/api/v3/oco/order/{orderId}"
            | "/api/v3/oco/client-order/{clientOid}"
            | "/api/v3/hf/margin/oco-order/cancel-by-id"
            | "/api/v3/hf/margin/oco-order/cancel-by-clientOid",
        ) => cancel(accounts, call, book).map(|order| cancelled(&[order])),
        (
            "DELETE",
            "/api/v1/stop-order/cancel"
            | "/api/v3/hf/margin/stop-order/cancel"
            | "/api/v3/oco/orders"
            | "/api/v3/hf/margin/oco-order/cancel",
        ) => cancel_all(accounts, call, book),
        _ => return None,
    })
}

fn is_oco(book: Book) -> bool {
    matches!(book, Book::MarginOco | Book::SpotOco)
}

fn place(accounts: &mut Accounts, call: &Call<'_>, book: Book) -> Outcome {
    let draft = Draft::read(book, "type", &call.body)?;
    let product = book.product();
    let draft = match book {
        Book::SpotStop => draft,
        _ => draft.require_client_oid()?,
    };
    if !draft.conditional {
        return Err(product.bad_parameter("stopPrice"));
    }
    let order = accounts.place(call, draft)?;
    Ok(match book {
        Book::MarginStop => json!({"orderId": order.id, "clientOid": order.client_oid}),
        _ => json!({"orderId": order.id}),
    })
}

fn find<'a>(accounts: &'a mut Accounts, call: &Call<'_>, book: Book) -> Result<&'a Order, Refusal> {
    let account = accounts.of(call.uid);
    let product = book.product();
    match (call.any("orderId"), call.any("clientOid")) {
        (Some(id), _) => account.by_id(&[book], id),
        (None, Some(id)) => account.by_client_oid(&[book], id),
        (None, None) => return Err(product.bad_parameter("orderId")),
    }
    .ok_or_else(|| product.absent())
}

fn cancel(accounts: &mut Accounts, call: &Call<'_>, book: Book) -> Result<Order, Refusal> {
    let refusal = || book.product().not_cancellable();
    let id = find(accounts, call, book)
        .map_err(|_| refusal())?
        .id
        .clone();
    let account = accounts.of(call.uid);
    account
        .cancel(&id, call.now_ms)
        .cloned()
        .ok_or_else(refusal)
}

/// Cancels the orders in `orderIds`; without it, every order of the symbol and trade type.
fn cancel_all(accounts: &mut Accounts, call: &Call<'_>, book: Book) -> Outcome {
    if book == Book::MarginStop {
        margin_trade_type(call)?;
    }
    let kind = trade_type(call, book)?;
    let orders = accounts
        .of(call.uid)
        .cancel_all(call.now_ms, |order| fits(call, book, kind, order));
    Ok(cancelled(&orders))
}

/// The trade type of a call. The default is documented only for the list of spot stop orders (spot); the same default for
/// the other spot endpoints, and cross margin for margin, are assumed.
fn trade_type<'a>(call: &'a Call<'_>, book: Book) -> Result<&'a str, Refusal> {
    let margin = matches!(book, Book::MarginOco | Book::MarginStop);
    match call.query("tradeType") {
        None if margin => Ok("MARGIN_TRADE"),
        None | Some("TRADE") if !margin => Ok("TRADE"),
        // Spot OCO endpoints have no trade type.
        Some(_) if book == Book::SpotOco => Ok("TRADE"),
        _ => margin_trade_type(call),
    }
}

/// Whether an order matches trade type, symbol, side and ids of a call. Times and kinds of trigger are ignored.
fn fits(call: &Call<'_>, book: Book, kind: &str, order: &Order) -> bool {
    order.book == book
        && order.trade_type() == kind
        && call.matches_symbol(&order.symbol)
        && call
            .query("side")
            .is_none_or(|side| side == order.side.lower())
        && call
            .query("orderIds")
            .is_none_or(|ids| ids.split(',').any(|id| id == order.id))
}

/// The answer of a cancel: the ids of the orders, or of the legs of OCO orders.
fn cancelled(orders: &[Order]) -> Value {
    let ids: Vec<String> = orders
        .iter()
        .flat_map(|order| {
            if is_oco(order.book) {
                Vec::from(order.legs())
            } else {
                vec![order.id.clone()]
            }
        })
        .collect();
    json!({"cancelledOrderIds": ids})
}

/// Lists of stop orders show open orders, lists of OCO orders show all.
fn list(
    accounts: &mut Accounts,
    call: &Call<'_>,
    book: Book,
    view: fn(&Order) -> Value,
) -> Outcome {
    let kind = trade_type(call, book)?;
    let items: Vec<Value> = accounts
        .of(call.uid)
        .list(|order| (order.is_open() || is_oco(book)) && fits(call, book, kind, order))
        .map(view)
        .collect();
    let paging = Paging {
        // Documented: margin OCO orders require page number and size; margin stop orders have 50 (20 were observed).
        default_size: match book {
            Book::MarginOco => None,
            Book::MarginStop => Some(20),
            _ => FIFTY.default_size,
        },
        ..FIFTY
    };
    paging.answer(call, book.product(), &items)
}

fn state(order: &Order) -> &'static str {
    match order.state {
        OrderState::Cancelled => "CANCELLED",
        OrderState::Filled => "DONE",
        OrderState::Open => "NEW",
    }
}

fn stop_view(order: &Order) -> Value {
    json!({
        "id": order.id, "clientOid": order.client_oid, "symbol": order.symbol, "userId": order.uid.to_string(),
        "status": state(order), "type": if order.price.is_none() { "market" } else { "limit" },
        "side": order.side.lower(), "price": order.price.unwrap_or_default(), "size": order.size, "funds": order.sent_funds(),
        "stp": null, "timeInForce": text(&order.fields, "timeInForce").unwrap_or("GTC"), "cancelAfter": -1,
        "postOnly": false, "hidden": false, "iceberg": false, "visibleSize": null, "channel": "API",
        "remark": order.sent("remark"), "tags": order.sent("tags"), "domainId": "kucoin", "tradeSource": "USER",
        "tradeType": order.trade_type(),
        "feeCurrency": "USDT", "takerFeeRate": "0.001", "makerFeeRate": "0.001", "createdAt": order.created_at_ms,
        "stop": text(&order.fields, "stop").unwrap_or("loss"), "stopTriggerTime": null,
        "stopPrice": order.sent("stopPrice"), "orderTime": order.created_at_ms.saturating_mul(1_000_000),
    })
}

fn oco_view(order: &Order) -> Value {
    json!({
        "orderId": order.id, "clientOid": order.client_oid, "symbol": order.symbol,
        "orderTime": order.created_at_ms, "status": state(order),
    })
}

fn oco_detail(order: &Order) -> Value {
    let [limit, stop] = order.legs();
    let leg = |id: String, price: Value, stop_price: Value| {
        json!({
            "id": id, "symbol": order.symbol, "side": order.side.lower(), "price": price, "stopPrice": stop_price,
            "size": order.size, "status": state(order),
        })
    };
    let at = json!(order.price.unwrap_or(Amount::ZERO));
    let mut detail = oco_view(order);
    if let Some(detail) = detail.as_object_mut() {
        let legs = [
            leg(limit, at.clone(), at),
            leg(stop, order.sent("limitPrice"), order.sent("stopPrice")),
        ];
        detail.insert("orders".to_owned(), json!(legs));
    }
    detail
}
