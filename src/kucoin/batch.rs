//! Judges each order of a batch by its result in the answer.
//!
//! Source: KuCoin API documentation, "Batch Add Orders" and "Batch Cancel Orders": the envelope of a batch is a success, and
//! each order has its own result. A result that belongs to no order of the request leaves the outcome open, as does an order
//! without a result.

use super::code::{self, Class, RefusalCodes};
use super::fields::{self, elements, members};
use super::order_form::{BatchResults, ClientOidLocation, FieldLocation, MatchedBy, OrderForm};
use super::placement::MAX_ORDERS;
use super::{Answer, Endpoint, UnsignedRequest};
use crate::base::outcome::Outcome;

/// Results beyond the orders of the request that are still read.
const MAX_EXTRA: usize = 20;

/// Words in a message about an order that leave open whether it was executed: some results have no code.
const UNCLEAR_WORDS: [&str; 6] = [
    "busy",
    "internal",
    "system",
    "time out",
    "timed out",
    "timeout",
];

/// The outcome of one order of a batch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct BatchItem {
    /// Its clientOid; empty if there is none.
    pub(crate) client_oid: String,
    /// Its order id; empty if there is none.
    pub(crate) order_id: String,
    /// Whether it was placed or cancelled.
    pub(crate) outcome: Outcome,
    /// The code of its result; empty if there is none.
    pub(crate) code: String,
    /// The message of its result; empty if there is none.
    pub(crate) msg: String,
}

/// How a request or a result names an order.
#[derive(Debug, Default)]
struct Names {
    client_oid: Option<String>,
    order_id: Option<String>,
}

impl Names {
    /// Whether both name the same order.
    fn is_same(&self, other: &Self) -> bool {
        let same = |one: &Option<String>, other| one.is_some() && one == other;
        same(&self.client_oid, &other.client_oid) || same(&self.order_id, &other.order_id)
    }

    /// Whether both have a clientOid, and not the same.
    fn is_other(&self, other: &Self) -> bool {
        self.client_oid.is_some()
            && other.client_oid.is_some()
            && self.client_oid != other.client_oid
    }
}

/// One result in the answer.
struct BatchResult {
    names: Names,
    outcome: Outcome,
    code: String,
    msg: String,
}

impl Answer {
    /// Judges the results of an accepted batch: the call is `maybe_sent` if any order is, else accepted if any is, else
    /// rejected.
    pub(crate) fn judge_batch(
        mut self,
        endpoint: Option<&Endpoint>,
        request: &UnsignedRequest,
        refusal_codes: &RefusalCodes,
    ) -> Self {
        let form = endpoint.and_then(|endpoint| Some((endpoint, endpoint.order.as_ref()?)));
        let Some((endpoint, form)) = form else {
            return self;
        };
        let Some(results) = &form.results else {
            return self;
        };
        if self.outcome != Outcome::Accepted {
            return self;
        }
        let Some(orders) = orders(form, &request.body) else {
            self.outcome = Outcome::MaybeSent;
            return self;
        };
        let most = orders.len() + MAX_EXTRA;
        let list = std::str::from_utf8(&self.body)
            .ok()
            .and_then(|body| elements(fields::at(body, &results.array)?, most));
        let read = |json: &str| BatchResult::read(json, endpoint, results, refusal_codes);
        let answered = list.unwrap_or_default().into_iter().map(read).collect();
        self.items = matched(orders, answered, results.matched_by);
        let has = |outcome| self.items.iter().any(|item| item.outcome == outcome);
        self.outcome = if has(Outcome::MaybeSent) || self.items.is_empty() {
            Outcome::MaybeSent
        } else if has(Outcome::Accepted) {
            Outcome::Accepted
        } else {
            Outcome::Rejected
        };
        self
    }
}

/// The orders that the body of a batch names, in its order; `None` if they cannot be read or are more than [`MAX_ORDERS`].
fn orders(form: &OrderForm, body: &[u8]) -> Option<Vec<Names>> {
    let body = std::str::from_utf8(body).ok()?;
    let list = |pointer: &str| match fields::at(body, pointer).filter(|list| *list != "null") {
        Some(list) => elements(list, MAX_ORDERS),
        None => Some(Vec::new()),
    };
    let mut orders = Vec::new();
    // Only a batch cancel of futures has a list of order ids, beside that of clientOids.
    if let Some(FieldLocation::Root(name)) = form.fields.get("orderIds") {
        orders.extend(list(&format!("/{name}"))?.into_iter().map(|id| Names {
            client_oid: None,
            order_id: fields::text(id),
        }));
    }
    let Some(ClientOidLocation::Body(client_oid)) = &form.client_oid else {
        return None;
    };
    let order_id = match form.fields.get("orderId") {
        Some(FieldLocation::Order(name)) => name,
        _ => "",
    };
    for order in list(form.items.as_deref()?)? {
        let (client_oid, order_id) = names(order, client_oid.leaf()?, order_id)?;
        orders.push(Names {
            client_oid,
            order_id,
        });
    }
    (orders.len() <= MAX_ORDERS).then_some(orders)
}

/// The clientOid and the order id in an object; empty texts count as absent.
fn names(json: &str, client_oid: &str, order_id: &str) -> Option<(Option<String>, Option<String>)> {
    let found = members(json, &[client_oid, order_id])?;
    let mut texts = found.into_iter().map(|raw| {
        let text = raw.and_then(fields::text);
        text.filter(|text| !text.is_empty())
    });
    Some((texts.next()?, texts.next()?))
}

impl BatchResult {
    /// A result that is missing or cannot be read.
    fn unclear() -> Self {
        Self {
            names: Names::default(),
            outcome: Outcome::MaybeSent,
            code: String::new(),
            msg: String::new(),
        }
    }

    fn read(
        json: &str,
        endpoint: &Endpoint,
        form: &BatchResults,
        refusal_codes: &RefusalCodes,
    ) -> Self {
        let name = |name: &Option<String>| name.clone().unwrap_or_default();
        let (client_oid, order_id) = (name(&form.client_oid), name(&form.order_id));
        let (ok_name, ok_value) = &form.ok;
        let code_name = form.code.as_deref().unwrap_or_default();
        let read = || {
            let (client_oid, order_id) = names(json, &client_oid, &order_id)?;
            let found = members(json, &[ok_name, &form.msg])?;
            let mut texts = found.into_iter().map(|raw| raw.and_then(fields::text));
            let (ok, msg) = (texts.next()?, texts.next()?.unwrap_or_default());
            let code = members(json, &[code_name])?.first().copied().flatten();
            let names = Names {
                client_oid,
                order_id,
            };
            Some((names, ok, code.and_then(fields::text), msg))
        };
        let Some((names, ok, code, msg)) = read() else {
            return Self::unclear();
        };
        let is_rejected = if let (Some(code), Some(scope)) = (&code, endpoint.scope) {
            let product = Some(endpoint.product);
            let class = code::class(scope.host(), product, code, &[], refusal_codes);
            class == Class::Refusal
        } else {
            // Without a code, the words must say that the exchange has rejected the order.
            let words = msg.to_ascii_lowercase();
            matches!(ok.as_deref(), Some("fail" | "false"))
                && !msg.is_empty()
                && !UNCLEAR_WORDS.iter().any(|word| words.contains(word))
        };
        let outcome = match ok {
            Some(value) if value == *ok_value => Outcome::Accepted,
            _ if is_rejected => Outcome::Rejected,
            _ => Outcome::MaybeSent,
        };
        Self {
            names,
            outcome,
            code: code.unwrap_or_default(),
            msg,
        }
    }
}

/// One item for each order, in the order of the request; then one for each result that belongs to no order.
fn matched(orders: Vec<Names>, results: Vec<BatchResult>, by: MatchedBy) -> Vec<BatchItem> {
    let is_complete = orders.len() == results.len();
    let mut results: Vec<_> = results.into_iter().map(Some).collect();
    let mut items = Vec::with_capacity(orders.len());
    for (index, order) in orders.into_iter().enumerate() {
        // With a missing or an additional result, the position shows nothing.
        let at = if by == MatchedBy::Position && is_complete {
            let result = results.get(index).and_then(Option::as_ref);
            let is_other = result.is_none_or(|result| result.names.is_other(&order));
            (!is_other).then_some(index)
        } else {
            let is_same = |result: &Option<BatchResult>| {
                let result = result.as_ref();
                result.is_some_and(|result| result.names.is_same(&order))
            };
            results.iter().position(is_same)
        };
        let result = at.and_then(|at| results.get_mut(at)?.take());
        items.push(item(order, result));
    }
    // Whatever such a result says, it is unknown which order it is about.
    items.extend(results.into_iter().flatten().map(|result| BatchItem {
        outcome: Outcome::MaybeSent,
        ..item(Names::default(), Some(result))
    }));
    items
}

fn item(order: Names, result: Option<BatchResult>) -> BatchItem {
    let result = result.unwrap_or_else(BatchResult::unclear);
    let client_oid = order.client_oid.or(result.names.client_oid);
    let order_id = result.names.order_id.or(order.order_id);
    BatchItem {
        client_oid: client_oid.unwrap_or_default(),
        order_id: order_id.unwrap_or_default(),
        outcome: result.outcome,
        code: result.code,
        msg: result.msg,
    }
}
