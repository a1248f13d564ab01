//! Looks an order up after an unclear outcome: which read finds it, and what its answer proves.
//!
//! An order with the clientOid is no proof: it can be an older one. No order found is a proof only with an answer of the list
//! in `not_found.rs`, and only together with the conditions that the caller checks: the signed timestamp is too old to be
//! accepted, a second lookup agrees, and the lookup reaches back far enough.

use std::time::Duration;

use super::not_found::NotFoundAnswers;
use super::order_form::{FieldLocation, LookupForm};
use super::placement::Placement;
use super::{Answer, Catalog, Effect, Endpoint, Product, Scope, Target, UnsignedRequest};
use super::{decimal, fields};
use crate::base::ids::{AccountId, RequestId};
use crate::base::outcome::Outcome;

/// The exchange may have created the order this much earlier than the signed time. Source: KuCoin API documentation,
/// "Authentication": it accepts timestamps that differ by at most 5 s.
const CREATED_BEFORE_MS: i64 = 5000;

/// The amendment that cancels the order and places a new one with a new id. Source: KuCoin API documentation, "Modify Order".
const ALTER: &str = "spot.post.v1-hf-orders-alter";

/// The type of an order that has none. Source: KuCoin API documentation (2023), "Place a new order": default is limit.
const DEFAULT_TYPE: &str = "limit";

/// The read that finds one order that a request has placed or amended.
#[derive(Clone, Debug)]
pub(crate) struct Lookup {
    /// The endpoint that placed or amended the order.
    placed_by: &'static Endpoint,
    /// The endpoint of the read.
    pub(crate) endpoint: &'static Endpoint,
    form: &'static LookupForm,
    scope: Scope,
    target: Target,
    placement: Placement,
}

/// What the answer of a lookup shows.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum LookupResult {
    /// The order is the one that was sent, or it is amended as it was asked for.
    Found {
        /// Its id.
        order_id: String,
        /// Its state as the exchange writes it; `None` if the answer has none.
        state: Option<String>,
    },
    /// The exchange has no such order.
    NotFound,
    /// The exchange has an order with this id, but it is not the one that was sent: another one is, or may be, missing.
    Differs(String),
    /// The answer shows nothing.
    Unclear(String),
}

/// The values of an order in the answer of a lookup.
struct Order<'a>(&'a str);

impl Order<'_> {
    fn field(&self, name: &str) -> Option<String> {
        let found = fields::members(self.0, &[name])?;
        found.first().copied().flatten().and_then(fields::text)
    }
}

impl Lookup {
    /// The lookup of an order that a request to `placed_by` places or amends; `None` if the catalogue has none, or if the
    /// order lacks what the lookup needs: a clientOid, a symbol, a trade type.
    pub(crate) fn new(placed_by: &'static Endpoint, placement: &Placement) -> Option<Self> {
        let order = placed_by.order.as_ref()?;
        let by_client_oid = || Some((order.lookup.as_ref()?, placement.client_oid.as_deref()?));
        let by_order_id = || {
            let form = order.lookup_by_order_id.as_ref()?;
            Some((form, placement.field("orderId")?))
        };
        let (form, id) = match placed_by.effect {
            Effect::Place => by_client_oid()?,
            // Under the old id, the exchange has only the cancelled order.
            Effect::Amend if placed_by.id == ALTER => by_client_oid()?,
            // If a request has both, the exchange reads the order id.
            Effect::Amend => by_order_id().or_else(by_client_oid)?,
            Effect::Cancel | Effect::CancelAll | Effect::None | Effect::Test => return None,
        };
        // It would be more than one segment of the path.
        if id.contains('/') {
            return None;
        }
        let endpoint = Catalog::get().by_id(&form.endpoint)?;
        let mut path = endpoint.path.clone();
        let mut query = Vec::new();
        match &form.id {
            FieldLocation::Path(name) => path = path.replace(&format!("{{{name}}}"), id),
            FieldLocation::Query(name) => query.push((name.clone(), id.to_owned())),
            FieldLocation::Order(_) | FieldLocation::Root(_) => return None,
        }
        for name in &form.needs {
            query.push((name.clone(), placement.field(name)?.to_owned()));
        }
        let fixed = form.fixed.iter();
        query.extend(fixed.map(|(name, value)| (name.clone(), value.clone())));
        Some(Self {
            placed_by,
            endpoint,
            form,
            scope: endpoint.scope?,
            target: Target::new(&path, query).ok()?,
            placement: placement.clone(),
        })
    }

    /// The request for `account`, which must be the one that placed the order.
    pub(crate) fn request(&self, account: AccountId, id: RequestId) -> UnsignedRequest {
        UnsignedRequest {
            account,
            scope: self.scope,
            method: self.endpoint.method,
            target: self.target.clone(),
            body: bytes::Bytes::new(),
            id,
            body_client_oids: Vec::new(),
        }
    }

    /// How long the lookup finds an order that is no longer open; zero if it finds only open orders. `None`: not documented.
    pub(crate) fn reach(&self) -> Option<Duration> {
        const HOUR: Duration = Duration::from_secs(3600);
        match self.endpoint.id.as_str() {
            // KuCoin API documentation (2024), "Get Details of a Single Order by clientOid": "single active order".
            "spot.get.v1-order-client-order-client-oid" => Some(Duration::ZERO),
            // KuCoin HF API documentation (2023), "Get Details of a Single HF Order by clientOid".
            "spot.get.v1-hf-orders-client-order-client-oid" => Some(HOUR * 72),
            // Kucoin/kucoin-universal-sdk @cc2ca1fa, Java: cancelled orders without fills.
            "spot.get.ua-v1-unified-order-detail" | "spot.get.ua-v2-unified-order-detail" => {
                Some(HOUR * 2)
            }
            _ => None,
        }
    }

    /// What `answer` shows about the order, whose request was signed at `signed_ms`. The texts have names, but no values.
    pub(crate) fn judge(
        &self,
        answer: &Answer,
        signed_ms: i64,
        not_found: &NotFoundAnswers,
    ) -> LookupResult {
        let unclear = |why: &str| LookupResult::Unclear(why.to_owned());
        let Ok(body) = std::str::from_utf8(&answer.body) else {
            return unclear("the answer is not UTF-8");
        };
        // The order id ends the pointer to the order itself.
        let (order_pointer, id_name) = self.form.order_id.rsplit_once('/').unwrap_or_default();
        let data = fields::at(body, "/data").filter(|_| answer.content_encoding.is_empty());
        let is_empty = data.is_none_or(fields::is_empty);
        if answer.outcome != Outcome::Accepted || is_empty {
            let is_listed = not_found.has(self.endpoint, answer, is_empty);
            return match self.reach() {
                _ if !is_listed => unclear("the answer is not one that means \"no such order\""),
                Some(Duration::ZERO) => unclear("the lookup finds only open orders"),
                _ => LookupResult::NotFound,
            };
        }
        let Some(order) = fields::at(body, order_pointer).map(Order) else {
            return unclear("the answer does not have exactly one order");
        };
        let Some(order_id) = order.field(id_name).filter(|id| !id.is_empty()) else {
            return unclear("the order in the answer has no id");
        };
        if let Err(result) = self.compare(&order, &order_id, body, signed_ms) {
            return result;
        }
        let state = fields::at(body, &self.form.state).and_then(fields::text);
        LookupResult::Found { order_id, state }
    }

    /// Compares the order in the answer with the one that was sent.
    fn compare(
        &self,
        order: &Order<'_>,
        order_id: &str,
        body: &str,
        signed_ms: i64,
    ) -> Result<(), LookupResult> {
        let unclear = |why: String| LookupResult::Unclear(why);
        if let Some(client_oid) = &self.placement.client_oid {
            let found = fields::at(body, &self.form.client_oid).and_then(fields::text);
            if found.as_ref() != Some(client_oid) {
                return Err(unclear("the answer is about another clientOid".to_owned()));
            }
        }
        let is_amendment = self.placed_by.effect == Effect::Amend;
        let (texts, numbers) = self.compared()?;
        for name in texts {
            let sent = self.placement.field(name).unwrap_or(DEFAULT_TYPE);
            let found = self.found(order, name)?;
            if !sent.eq_ignore_ascii_case(&found) {
                return Err(LookupResult::Differs(format!("{name} differs")));
            }
        }
        for name in numbers {
            let sent = self.placement.field(name).unwrap_or_default();
            match decimal::same(sent, &self.found(order, name)?) {
                Some(true) => {}
                Some(false) => return Err(LookupResult::Differs(format!("{name} differs"))),
                None => return Err(unclear(format!("{name} is not a number"))),
            }
        }
        let is_new_order = !is_amendment || self.placed_by.id == ALTER;
        if is_new_order && self.created_ms(order)? < signed_ms.saturating_sub(CREATED_BEFORE_MS) {
            return Err(LookupResult::Differs("the order is older".to_owned()));
        }
        let amended_id = self.placement.field("orderId").filter(|_| is_amendment);
        let has_amended_id = amended_id == Some(order_id);
        if self.placed_by.id == ALTER && has_amended_id {
            return Err(LookupResult::Differs("the order has the old id".to_owned()));
        }
        Ok(())
    }

    /// The names of the values that must be the same: texts and numbers.
    fn compared(&self) -> Result<(Vec<&'static str>, Vec<&'static str>), LookupResult> {
        let has = |name: &&str| self.placement.field(name).is_some();
        let is_true = |name| self.placement.field(name) == Some("true");
        let missing = |what| Err(LookupResult::Unclear(format!("the request has no {what}")));
        if self.placed_by.effect == Effect::Amend {
            let numbers: Vec<_> = ["price", "size"].into_iter().filter(has).collect();
            return match (has(&"symbol"), numbers.is_empty()) {
                (true, false) => Ok((vec!["symbol"], numbers)),
                (true, true) => missing("price or size that the lookup shows"),
                (false, _) => missing("symbol"),
            };
        }
        let mut texts = match self.placed_by.product {
            Product::Convert => vec!["fromCurrency", "toCurrency"],
            // It closes a position, whatever side and size are.
            _ if is_true("closeOrder") => return Ok((vec!["symbol", "closeOrder"], Vec::new())),
            _ => vec!["symbol", "side"],
        };
        if let Some(name) = texts.iter().find(|name| !has(name)) {
            return missing(*name);
        }
        let order = self.placed_by.order.as_ref();
        if order.is_some_and(|order| order.fields.contains_key("type")) {
            texts.push("type");
        }
        texts.extend(Some("sizeUnit").filter(has));
        let sizes = ["size", "funds", "fromCurrencySize", "toCurrencySize"];
        let numbers: Vec<_> = sizes.into_iter().filter(has).collect();
        if numbers.is_empty() {
            return missing("size or funds that the lookup shows");
        }
        Ok((texts, numbers))
    }

    /// A value of the order in the answer, by the catalogue's name of it.
    fn found(&self, order: &Order<'_>, name: &str) -> Result<String, LookupResult> {
        let written = match (self.placed_by.product, name) {
            (Product::Unified, "type") => "orderType",
            _ => name,
        };
        let found = order.field(written);
        found.ok_or_else(|| LookupResult::Unclear(format!("the answer has no {written}")))
    }

    /// When the order was created, Unix milliseconds.
    ///
    /// Source: KuCoin API documentation of each lookup: `createdAt` is in milliseconds; OCO orders have only `orderTime` in
    /// milliseconds, the unified account has only `orderTime` in nanoseconds.
    fn created_ms(&self, order: &Order<'_>) -> Result<i64, LookupResult> {
        let number = |name| order.field(name)?.parse::<i64>().ok();
        let created = match self.placed_by.product {
            Product::Unified => number("orderTime").map(|ns| ns / 1_000_000),
            _ => number("createdAt").or_else(|| number("orderTime")),
        };
        created.ok_or_else(|| LookupResult::Unclear("the answer has no time".to_owned()))
    }
}
