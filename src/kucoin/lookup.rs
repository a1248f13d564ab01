//! Looks an order up after an unclear outcome: which read finds it, and what its answer proves.
//!
//! An order with the clientOid is no proof: it can be an older one. No order found is a proof only with an answer of the list
//! in `not_found.rs`, and only together with the conditions that the caller checks: the signed timestamp is too old to be
//! accepted, a second lookup agrees, and the lookup reaches back far enough.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::not_found::{NotFoundAnswers, NotFoundError};
use super::order_form::{FieldLocation, LookupForm};
use super::placement::Placement;
use super::{Answer, Catalog, Effect, Endpoint, Product, Scope, Target, UnsignedRequest};
use super::{decimal, fields};
use crate::base::ids::{AccountId, RequestId};
use crate::base::outcome::Outcome;

/// The exchange may have created the order this much earlier than the signed time. Source: KuCoin API documentation,
/// "Authentication": it accepts timestamps that differ by at most 5 s.
const CREATED_BEFORE_MS: i64 = 5000;

/// How long a lookup is taken to find an order where that is not documented: our own choice.
const DEFAULT_REACH: Duration = Duration::from_secs(2 * 3600);

/// An order that is nearly as old as a lookup reaches counts as older.
const REACH_MARGIN: Duration = Duration::from_secs(600);

/// Bytes of a symbol or a trade type in a record; KuCoin's have under 30.
const MAX_RECORDED: usize = 64;

/// Bytes of an order id; KuCoin's have at most 24.
const MAX_ORDER_ID: usize = 64;

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
    /// Whether the order is known only from a [`LookupRecord`].
    is_recorded: bool,
}

/// What the audit log has about an order, so that it can be looked up after a restart.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct LookupRecord {
    /// The endpoint of the read.
    endpoint: String,
    pub(crate) client_oid: String,
    symbol: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trade_type: Option<String>,
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
            is_recorded: false,
        })
    }

    /// What the audit log needs for this lookup. `None`: the order cannot be recognized by that, such as an amendment.
    pub(crate) fn record(&self) -> Option<LookupRecord> {
        if self.placed_by.effect != Effect::Place {
            return None;
        }
        let record = LookupRecord {
            endpoint: self.endpoint.id.clone(),
            client_oid: self.placement.client_oid.clone()?,
            symbol: self.placement.field("symbol")?.to_owned(),
            trade_type: self.placement.field("tradeType").map(str::to_owned),
        };
        let trade_type = record.trade_type.as_ref();
        let texts = [Some(&record.client_oid), Some(&record.symbol), trade_type];
        let is_short = texts
            .into_iter()
            .flatten()
            .all(|text| text.len() <= MAX_RECORDED);
        is_short.then_some(record)
    }

    /// The lookup of a record; `None` if the catalogue has no such lookup any more. It recognizes the order by clientOid, symbol
    /// and time.
    pub(crate) fn of_record(placed_by: &'static Endpoint, record: &LookupRecord) -> Option<Self> {
        let mut fields = vec![("symbol", record.symbol.as_str())];
        fields.extend(record.trade_type.as_deref().map(|name| ("tradeType", name)));
        let placement = Placement::partial(&record.client_oid, &fields);
        let mut lookup = Self::new(placed_by, &placement)?;
        lookup.is_recorded = true;
        (lookup.endpoint.id == record.endpoint).then_some(lookup)
    }

    /// Lookups of an order with a clientOid that no order has, one for each product of a scope whose orders can be absent.
    pub(crate) fn of_no_order(scope: Scope, client_oid: &str) -> Vec<Self> {
        let (placed_by, symbol): (&[_], _) = match scope {
            Scope::Futures => (&["futures.post.v1-orders"], "XBTUSDTM"),
            Scope::SpotMargin => (
                &["spot.post.v1-hf-orders", "spot.post.v3-hf-margin-order"],
                "BTC-USDT",
            ),
            Scope::Unified => (&[], ""),
        };
        let placement = Placement::partial(client_oid, &[("symbol", symbol)]);
        let placed_by = placed_by.iter().filter_map(|id| Catalog::get().by_id(id));
        placed_by
            .filter_map(|placed_by| Self::new(placed_by, &placement))
            .collect()
    }

    /// The entry for `exchange.not_found` that would make `answer` mean "no such order".
    ///
    /// # Errors
    /// When such an answer cannot mean that.
    pub(crate) fn entry_for(&self, answer: &Answer) -> Result<String, NotFoundError> {
        let body = std::str::from_utf8(&answer.body).unwrap_or_default();
        let is_empty = fields::at(body, "/data").is_none_or(fields::is_empty);
        NotFoundAnswers::entry_for(self.endpoint, answer, is_empty)
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

    /// How long the lookup finds an order that is no longer open; zero if it finds only open orders, or if that is in doubt.
    /// `None`: not documented.
    pub(crate) fn reach(&self) -> Option<Duration> {
        const HOUR: Duration = Duration::from_secs(3600);
        match self.endpoint.id.as_str() {
            // KuCoin API documentation (2024), "Get Details of a Single Order by clientOid": "single active order".
            "spot.get.v1-order-client-order-client-oid"
            // Not documented; but a triggered order is another one, which they may not find.
            | "spot.get.v1-stop-order-query-order-by-client-oid"
            | "spot.get.v3-hf-margin-oco-order-client-oid"
            | "spot.get.v3-hf-margin-stop-order-client-oid"
            | "spot.get.v3-oco-client-order-client-oid" => Some(Duration::ZERO),
            // KuCoin HF API documentation (2023), "Get Details of a Single HF Order by clientOid".
            "spot.get.v1-hf-orders-client-order-client-oid" => Some(HOUR * 72),
            // Kucoin/kucoin-universal-sdk @cc2ca1fa, Java: cancelled orders without fills.
            "spot.get.ua-v1-unified-order-detail" | "spot.get.ua-v2-unified-order-detail" => {
                Some(HOUR * 2)
            }
            _ => None,
        }
    }

    /// What `answer`, of the exchange's time `now_ms`, shows about the order, whose request was signed at `signed_ms`. The texts
    /// have names, but no values.
    pub(crate) fn judge(
        &self,
        answer: &Answer,
        now_ms: i64,
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
            let reach = self.reach().unwrap_or(DEFAULT_REACH);
            let age_ms = now_ms.saturating_sub(signed_ms).max(0).unsigned_abs();
            return match reach {
                _ if !is_listed => unclear("the answer is not one that means \"no such order\""),
                Duration::ZERO => unclear("the lookup may find only open orders"),
                reach if Duration::from_millis(age_ms) + REACH_MARGIN > reach => {
                    unclear("the order is older than the lookup reaches")
                }
                _ => LookupResult::NotFound,
            };
        }
        let Some(order) = fields::at(body, order_pointer).map(Order) else {
            return unclear("the answer does not have exactly one order");
        };
        let is_id = |id: &String| (1..=MAX_ORDER_ID).contains(&id.len());
        let Some(order_id) = order.field(id_name).filter(is_id) else {
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
        if self.is_recorded {
            return Ok((vec!["symbol"], Vec::new()));
        }
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

#[cfg(test)]
mod tests {
    use http::{HeaderMap, StatusCode};

    use super::super::RequestContext;
    use super::super::code::RefusalCodes;
    use super::super::placement::placements;
    use super::super::placement::tests::{endpoint, request};
    use super::*;

    /// Answers of the lookups. Source: Kucoin/kucoin-universal-sdk, examples of each endpoint, shortened.
    const SPOT: &str = r#"{"code":"200000","data":{"id":"6717422bd51c29000775ea03","clientOid":"5c52e11203aa677f33e493fb","symbol":"BTC-USDT","type":"limit","side":"buy","price":"70000","size":"0.00001","funds":"0.7","active":false,"createdAt":1729577515444,"lastUpdatedAt":1729577515481}}"#;
    const FUTURES: &str = r#"{"code":"200000","data":{"id":"250444645610336256","symbol":"XRPUSDTM","type":"limit","side":"buy","price":"0.1","size":1,"value":"1","closeOrder":false,"clientOid":"5c52e11203aa677f33e493fb","createdAt":1732523858568,"orderTime":1732523858550892322,"status":"open"}}"#;
    const STOP: &str = r#"{"code":"200000","data":[{"id":"vs8hoo8os561f5np0032vngj","symbol":"KCS-USDT","status":"NEW","type":"limit","side":"buy","price":"0.01000000000000000000","size":"0.01000000000000000000","funds":null,"clientOid":"2b700942b5db41cebe578cff48960e09","orderTime":1629020492834532600,"createdAt":1629020492837}]}"#;
    const OCO: &str = r#"{"code":"200000","data":{"orderId":"674c3cfa72cf2800072ee7ce","symbol":"BTC-USDT","clientOid":"5c52e1203aa6f3g7f1e493fb","orderTime":1733049594803,"status":"NEW"}}"#;

    const SPOT_ORDER: &str = r#"{"clientOid":"5c52e11203aa677f33e493fb","symbol":"BTC-USDT","side":"buy","type":"limit","price":"70000","size":"0.000010"}"#;

    fn lookup(id: &str, body: &str) -> Option<Lookup> {
        let found = placements(endpoint(id), &request(id, body)).unwrap();
        Lookup::new(endpoint(id), &found[0])
    }

    fn answer(lookup: &Lookup, status: u16, body: &str) -> Answer {
        let asked = RequestContext {
            endpoint: Some(lookup.endpoint),
            scope: lookup.scope,
            changes: false,
            refusal_codes: &RefusalCodes::default(),
        };
        let status = StatusCode::from_u16(status).unwrap();
        let now = || std::time::SystemTime::UNIX_EPOCH;
        Answer::read(
            status,
            &HeaderMap::new(),
            body.to_owned().into(),
            asked,
            now,
        )
    }

    fn judge(id: &str, order: &str, signed_ms: i64, found: &str) -> LookupResult {
        let lookup = lookup(id, order).unwrap();
        let answer = answer(&lookup, 200, found);
        lookup.judge(&answer, signed_ms, signed_ms, &NotFoundAnswers::default())
    }

    fn found(order_id: &str, state: &str) -> LookupResult {
        LookupResult::Found {
            order_id: order_id.to_owned(),
            state: Some(state.to_owned()),
        }
    }

    fn differs(why: &str) -> LookupResult {
        LookupResult::Differs(why.to_owned())
    }

    fn unclear(why: &str) -> LookupResult {
        LookupResult::Unclear(why.to_owned())
    }

    #[test]
    fn lookup_is_the_read_that_the_catalogue_names() {
        for (id, body, expected) in [
            (
                "spot.post.v1-hf-orders",
                SPOT_ORDER,
                "/api/v1/hf/orders/client-order/5c52e11203aa677f33e493fb?symbol=BTC-USDT",
            ),
            (
                "futures.post.v1-st-orders",
                r#"{"clientOid":"a"}"#,
                "/api/v1/orders/byClientOid?clientOid=a",
            ),
            (
                "spot.post.v3-oco-order",
                r#"{"clientOid":"a"}"#,
                "/api/v3/oco/client-order/a",
            ),
            (
                "spot.post.v3-hf-margin-order",
                r#"{"clientOid":"a","symbol":"BTC-USDT"}"#,
                "/api/v3/hf/margin/orders/client-order/a?symbol=BTC-USDT",
            ),
            (
                "spot.post.v1-convert-limit-order",
                r#"{"clientOrderId":"a"}"#,
                "/api/v1/convert/limit/order/detail?clientOrderId=a",
            ),
            (
                "spot.post.ua-v2-unified-order-place",
                r#"{"clientOid":"a","symbol":"BTC-USDT","tradeType":"SPOT"}"#,
                "/api/ua/v2/unified/order/detail?clientOid=a&tradeType=SPOT&symbol=BTC-USDT",
            ),
            (
                "spot.post.ua-v2-unified-order-amend",
                r#"{"clientOid":"a","orderId":"7","symbol":"XBTUSDTM","newSize":"1"}"#,
                "/api/ua/v2/unified/order/detail?orderId=7&symbol=XBTUSDTM&tradeType=FUTURES",
            ),
        ] {
            let lookup = lookup(id, body).expect(id);
            let request = lookup.request("main".parse().unwrap(), RequestId::random());
            assert_eq!(request.target.to_sign(), expected);
            let (scope, method) = (endpoint(id).scope.unwrap(), super::super::Method::Get);
            assert_eq!((request.scope, request.method), (scope, method));
            assert_eq!(request.endpoint().unwrap().id, lookup.endpoint.id);
        }
    }

    #[test]
    fn order_that_cannot_be_looked_up_has_no_lookup() {
        for (id, body) in [
            ("spot.post.v1-hf-orders", r#"{"symbol":"BTC-USDT"}"#),
            ("spot.post.v1-hf-orders", r#"{"clientOid":"a"}"#),
            (
                "futures.post.v1-copy-trade-futures-orders",
                r#"{"clientOid":"a"}"#,
            ),
            ("futures.post.v2-order", r#"{"clientOid":"a"}"#),
            (
                "spot.post.ua-v2-unified-order-place",
                r#"{"clientOid":"a","symbol":"BTC-USDT"}"#,
            ),
            (
                "spot.post.v3-accounts-universal-transfer",
                r#"{"clientOid":"a"}"#,
            ),
            // Under the old id, the exchange has only the cancelled order.
            (
                "spot.post.v1-hf-orders-alter",
                r#"{"orderId":"670fd33bf9406e0007ab3945","symbol":"BTC-USDT","newPrice":"30000"}"#,
            ),
            (
                "spot.post.v1-hf-orders-alter",
                r#"{"clientOid":"a/b","symbol":"BTC-USDT","newPrice":"30000"}"#,
            ),
        ] {
            assert!(lookup(id, body).is_none(), "{id} {body}");
        }
    }

    #[test]
    fn order_is_found_only_if_it_is_the_one_that_was_sent() {
        let id = "spot.post.v1-hf-orders";
        let created = 1_729_577_515_444;
        let spot = |order: &str, signed_ms| judge(id, order, signed_ms, SPOT);
        let is_found = found("6717422bd51c29000775ea03", "false");
        assert_eq!(spot(SPOT_ORDER, created), is_found);
        assert_eq!(spot(SPOT_ORDER, created + 5000), is_found);
        assert_eq!(
            spot(SPOT_ORDER, created + 5001),
            differs("the order is older")
        );
        assert_eq!(spot(SPOT_ORDER, created - 86_400_000), is_found);
        let by_funds = SPOT_ORDER.replace(r#""size":"0.000010""#, r#""funds":0.70"#);
        assert_eq!(spot(&by_funds, created), is_found);
        let without_type = SPOT_ORDER.replace(r#""type":"limit","#, "");
        assert_eq!(spot(&without_type, created), is_found);
        for (sent, other, expected) in [
            ("BTC-USDT", "ETH-USDT", differs("symbol differs")),
            ("buy", "sell", differs("side differs")),
            ("limit", "market", differs("type differs")),
            ("0.000010", "0.00002", differs("size differs")),
            ("0.000010", "1,5", unclear("size is not a number")),
            (
                r#","size":"0.000010""#,
                "",
                unclear("the request has no size or funds that the lookup shows"),
            ),
            (r#""side":"buy","#, "", unclear("the request has no side")),
            (
                "5c52e11203aa677f33e493fb",
                "another",
                unclear("the answer is about another clientOid"),
            ),
        ] {
            let order = SPOT_ORDER.replace(sent, other);
            assert_eq!(spot(&order, created), expected, "{other}");
        }
        let older = |answer: &str| judge(id, SPOT_ORDER, created, answer);
        for (name, expected) in [
            (r#""symbol":"BTC-USDT","#, "the answer has no symbol"),
            (r#""side":"buy","#, "the answer has no side"),
            (r#""type":"limit","#, "the answer has no type"),
            (r#""size":"0.00001","#, "the answer has no size"),
            (r#""createdAt":1729577515444,"#, "the answer has no time"),
            (
                r#""id":"6717422bd51c29000775ea03","#,
                "the order in the answer has no id",
            ),
            (
                r#""clientOid":"5c52e11203aa677f33e493fb","#,
                "the answer is about another clientOid",
            ),
        ] {
            assert_eq!(older(&SPOT.replace(name, "")), unclear(expected), "{name}");
        }
    }

    #[test]
    fn answers_of_every_kind_of_lookup_are_read() {
        let futures = r#"{"clientOid":"5c52e11203aa677f33e493fb","symbol":"XRPUSDTM","side":"buy","type":"limit","size":"1.0"}"#;
        let of_futures = |order: &str| {
            judge(
                "futures.post.v1-orders-multi",
                &format!("[{order}]"),
                1_732_523_858_000,
                FUTURES,
            )
        };
        assert_eq!(of_futures(futures), found("250444645610336256", "open"));
        let by_value = futures.replace(r#""size""#, r#""valueQty""#);
        let why = "the request has no size or funds that the lookup shows";
        assert_eq!(of_futures(&by_value), unclear(why));
        let closing = futures.replace(r#""size":"1.0""#, r#""closeOrder":true"#);
        assert_eq!(of_futures(&closing), differs("closeOrder differs"));
        let stop = r#"{"clientOid":"2b700942b5db41cebe578cff48960e09","symbol":"KCS-USDT","side":"buy","type":"limit","size":"0.01"}"#;
        let of_stop =
            |answer: &str| judge("spot.post.v1-stop-order", stop, 1_629_020_492_000, answer);
        assert_eq!(of_stop(STOP), found("vs8hoo8os561f5np0032vngj", "NEW"));
        let why = "the answer does not have exactly one order";
        assert_eq!(of_stop(&STOP.replace("}]", "},{}]")), unclear(why));
        // It has neither side nor size: it proves nothing.
        let oco = r#"{"clientOid":"5c52e1203aa6f3g7f1e493fb","symbol":"BTC-USDT","side":"buy","size":"1"}"#;
        let of_oco = judge("spot.post.v3-oco-order", oco, 1_733_049_594_000, OCO);
        assert_eq!(of_oco, unclear("the answer has no side"));
        // Source: Kucoin/kucoin-universal-sdk @cc2ca1fa, Java models of the unified account: `orderTime` is in nanoseconds.
        let unified = r#"{"code":"200000","data":{"orderId":"7","clientOid":"a","symbol":"BTC-USDT","orderType":"LIMIT","side":"BUY","size":"0.10","sizeUnit":"BASECCY","orderTime":1732523858550892322,"status":2}}"#;
        let order = r#"{"clientOid":"a","symbol":"BTC-USDT","tradeType":"SPOT","side":"BUY","orderType":"LIMIT","size":"0.1","sizeUnit":"BASECCY"}"#;
        let of_unified = |signed_ms| {
            judge(
                "spot.post.ua-v2-unified-order-place",
                order,
                signed_ms,
                unified,
            )
        };
        assert_eq!(of_unified(1_732_523_863_550), found("7", "2"));
        assert_eq!(of_unified(1_732_523_863_551), differs("the order is older"));
    }

    #[test]
    fn amendment_is_found_only_with_the_price_and_size_that_it_asked_for() {
        let id = "spot.post.v1-hf-orders-alter";
        let created = 1_729_577_515_444;
        let alter = |change: &str, signed_ms| {
            let body = format!(
                r#"{{"clientOid":"5c52e11203aa677f33e493fb","symbol":"BTC-USDT",{change}}}"#
            );
            judge(id, &body, signed_ms, SPOT)
        };
        let is_found = found("6717422bd51c29000775ea03", "false");
        assert_eq!(alter(r#""newPrice":"70000.0""#, created), is_found);
        assert_eq!(
            alter(r#""newSize":"1E-5","newPrice":70000"#, created),
            is_found
        );
        assert_eq!(
            alter(r#""newPrice":"70001""#, created),
            differs("price differs")
        );
        assert_eq!(
            alter(r#""newPrice":"70000","newSize":"2""#, created),
            differs("size differs")
        );
        // The order before the amendment: it is older, or has the old id.
        assert_eq!(
            alter(r#""newPrice":"70000""#, created + 60_000),
            differs("the order is older")
        );
        let old_id = r#""newPrice":"70000","orderId":"6717422bd51c29000775ea03""#;
        assert_eq!(alter(old_id, created), differs("the order has the old id"));
        let why = "the request has no price or size that the lookup shows";
        assert_eq!(alter(r#""newFunds":"1""#, created), unclear(why));
        // The unified account amends in place.
        let unified = r#"{"code":"200000","data":{"orderId":"7","clientOid":"a","symbol":"XBTUSDTM","price":"2","size":"3","orderTime":1,"status":2}}"#;
        let amend = |size: &str| {
            let body = format!(r#"{{"orderId":"7","symbol":"XBTUSDTM","newSize":"{size}"}}"#);
            judge(
                "spot.post.ua-v2-unified-order-amend",
                &body,
                created,
                unified,
            )
        };
        assert_eq!(amend("3"), found("7", "2"));
        assert_eq!(amend("4"), differs("size differs"));
    }

    #[test]
    fn order_is_absent_only_with_an_answer_of_the_list() {
        let spot = lookup("spot.post.v1-hf-orders", SPOT_ORDER).unwrap();
        let judge = |lookup: &Lookup, status, body: &str, more: &NotFoundAnswers| {
            lookup.judge(&answer(lookup, status, body), 0, 0, more)
        };
        let none = NotFoundAnswers::default();
        let absent = r#"{"code":"400100","msg":"order not exist."}"#;
        for (status, body, is_absent) in [
            (200, absent, true),
            (400, absent, true),
            (
                200,
                r#"{"code":"order_not_exist","msg":"order_not_exist"}"#,
                true,
            ),
            (
                200,
                r#"{"code":"400100","msg":"Parameter error: symbol"}"#,
                false,
            ),
            (
                200,
                r#"{"code":"126043","msg":"Order does not exist"}"#,
                false,
            ),
            (200, r#"{"code":"200000","data":null}"#, false),
            (200, r#"{"code":"200000","data":{}}"#, false),
            (200, r#"{"code":"200000"}"#, false),
            (
                200,
                r#"{"code":"400100","msg":"order not exist.","data":{"id":"1"}}"#,
                false,
            ),
            (500, absent, false),
            (429, absent, false),
            (403, absent, false),
            (404, r#"{"code":"404","msg":"Not Found"}"#, false),
            (429, "<html>", false),
            (200, "", false),
        ] {
            let found = judge(&spot, status, body, &none);
            assert_eq!(
                found == LookupResult::NotFound,
                is_absent,
                "{status} {body}"
            );
            assert!(
                is_absent || matches!(found, LookupResult::Unclear(_)),
                "{body}"
            );
        }
        let futures = lookup("futures.post.v1-orders", r#"{"clientOid":"a"}"#).unwrap();
        // Source: ccxt/ccxt issue 26776.
        let absent = r#"{"msg":"error.getOrder.orderNotExist","code":"100001"}"#;
        assert_eq!(judge(&futures, 200, absent, &none), LookupResult::NotFound);
        let invalid = r#"{"msg":"There are invalid parameters","code":"100001"}"#;
        let why = unclear("the answer is not one that means \"no such order\"");
        assert_eq!(judge(&futures, 200, invalid, &none), why);
        // This lookup finds only open orders: a filled one is absent, too.
        let old = lookup("spot.post.v1-orders", r#"{"clientOid":"a"}"#).unwrap();
        let absent = r#"{"code":"400100","msg":"order not exist."}"#;
        let why = unclear("the lookup may find only open orders");
        assert_eq!(judge(&old, 200, absent, &none), why);
        let stop = lookup("spot.post.v1-stop-order", r#"{"clientOid":"a"}"#).unwrap();
        assert_eq!(judge(&stop, 200, absent, &none), why);
        // Observed, and added by an admin.
        let entry = r#"[{"host":"spot","product":"spot","http_status":200,"code":"200000","empty_data":true}]"#;
        let entries: Vec<super::super::not_found::NotFoundAnswer> =
            serde_json::from_str(entry).unwrap();
        let more: NotFoundAnswers = entries.into_iter().collect();
        for empty in [r#"{"code":"200000","data":[ ]}"#, r#"{"code":"200000"}"#] {
            assert_eq!(judge(&spot, 200, empty, &more), LookupResult::NotFound);
            assert_ne!(judge(&spot, 200, empty, &none), LookupResult::NotFound);
            assert_ne!(judge(&spot, 400, empty, &more), LookupResult::NotFound);
            assert_ne!(judge(&futures, 200, empty, &more), LookupResult::NotFound);
            assert_eq!(judge(&stop, 200, empty, &more), why);
        }
        assert_ne!(judge(&spot, 200, SPOT, &more), LookupResult::NotFound);
        // Older than the lookup reaches, or than is documented.
        let hours = |hours: i64| hours * 3_600_000;
        let aged = |lookup: &Lookup, age_ms: i64, body: &str| {
            lookup.judge(&answer(lookup, 200, body), age_ms, 0, &none)
        };
        let absent = r#"{"code":"400100","msg":"order not exist."}"#;
        assert_eq!(aged(&spot, hours(71), absent), LookupResult::NotFound);
        let why = unclear("the order is older than the lookup reaches");
        assert_eq!(aged(&spot, hours(72), absent), why);
        let absent = r#"{"msg":"error.getOrder.orderNotExist","code":"100001"}"#;
        assert_eq!(aged(&futures, hours(1), absent), LookupResult::NotFound);
        assert_eq!(aged(&futures, hours(2), absent), why);
    }

    #[test]
    fn reach_is_known_where_it_is_documented() {
        let reach = |id: &str, body: &str| lookup(id, body).unwrap().reach();
        let hours = |hours: u64| Some(Duration::from_secs(hours * 3600));
        assert_eq!(reach("spot.post.v1-hf-orders", SPOT_ORDER), hours(72));
        assert_eq!(reach("spot.post.v1-orders", SPOT_ORDER), hours(0));
        assert_eq!(reach("futures.post.v1-orders", SPOT_ORDER), None);
        let unified = r#"{"clientOid":"a","symbol":"BTC-USDT","tradeType":"SPOT"}"#;
        assert_eq!(
            reach("spot.post.ua-v2-unified-order-place", unified),
            hours(2)
        );
    }
}
