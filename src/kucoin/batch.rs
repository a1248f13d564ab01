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
const MAX_EXTRA: usize = 10;

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
        let code_text = code.as_deref().unwrap_or_default();
        let is_duplicate = endpoint.claims_client_oids()
            && code::is_duplicate_client_oid(endpoint.product, code_text, &msg);
        let outcome = match ok {
            Some(value) if value == *ok_value => Outcome::Accepted,
            // An earlier order exists, perhaps this one.
            _ if is_duplicate => Outcome::MaybeSent,
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
    // With a missing or an additional result, or one that is about another order than its position says, positions show
    // nothing: a failed result, which has no id, could be about any order.
    let mut pairs = orders.iter().zip(&results);
    let is_positional = by == MatchedBy::Position
        && orders.len() == results.len()
        && !pairs.any(|(order, result)| result.names.is_other(order));
    let mut results: Vec<_> = results.into_iter().map(Some).collect();
    let mut items = Vec::with_capacity(orders.len());
    for (index, order) in orders.into_iter().enumerate() {
        let is_same = |result: &Option<BatchResult>| {
            let result = result.as_ref();
            result.is_some_and(|result| result.names.is_same(&order))
        };
        let at = if is_positional {
            Some(index)
        } else {
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

#[cfg(test)]
mod tests {
    use http::{HeaderMap, StatusCode};

    use super::super::RequestContext;
    use super::super::placement::tests::{endpoint, request};
    use super::*;

    const HF: &str = "spot.post.v1-hf-orders-multi";
    const FUTURES: &str = "futures.post.v1-orders-multi";
    const CANCEL: &str = "futures.delete.v1-orders-multi-cancel";
    const ACCEPTED: Outcome = Outcome::Accepted;
    const MAYBE_SENT: Outcome = Outcome::MaybeSent;
    const REJECTED: Outcome = Outcome::Rejected;

    fn judge(id: &str, body: &str, answer: &str) -> Answer {
        let endpoint = endpoint(id);
        let refusal_codes = &RefusalCodes::default();
        let asked = RequestContext {
            endpoint: Some(endpoint),
            scope: endpoint.scope.unwrap(),
            changes: true,
            refusal_codes,
        };
        let now = || std::time::SystemTime::UNIX_EPOCH;
        let body_of = answer.to_owned().into();
        let answer = Answer::read(StatusCode::OK, &HeaderMap::new(), body_of, asked, now);
        answer.judge_batch(Some(endpoint), &request(id, body), refusal_codes)
    }

    /// The clientOid and outcome of each item.
    fn items(answer: &Answer) -> Vec<(&str, Outcome)> {
        let items = answer.items.iter();
        items
            .map(|item| (item.client_oid.as_str(), item.outcome))
            .collect()
    }

    fn hf(results: &str) -> Answer {
        let body = r#"{"orderList":[{"clientOid":"a"},{"clientOid":"b"}]}"#;
        judge(
            HF,
            body,
            &format!(r#"{{"code":"200000","data":{results}}}"#),
        )
    }

    #[test]
    fn failed_order_of_a_spot_batch_is_found_by_its_position() {
        // Source: Kucoin/kucoin-universal-sdk, "Batch Add Orders" of spot.
        let body = r#"{"orderList": [{"clientOid": "client order id 12", "symbol": "BTC-USDT", "type": "limit", "side": "buy", "price": "30000", "size": "0.00001"}, {"clientOid": "client order id 13", "symbol": "ETH-USDT", "type": "limit", "side": "sell", "price": "2000", "size": "0.00001"}]}"#;
        let answer = r#"{"code":"200000","data":[{"orderId":"6710d8336afcdb0007319c27","clientOid":"client order id 12","success":true},{"success":false,"failMsg":"The order funds should more then 0.1 USDT."}]}"#;
        let judged = judge(HF, body, answer);
        assert_eq!(judged.outcome, ACCEPTED);
        let [one, other] = &judged.items[..] else {
            panic!("{:?}", judged.items)
        };
        assert_eq!(
            (one.client_oid.as_str(), one.order_id.as_str(), one.outcome),
            ("client order id 12", "6710d8336afcdb0007319c27", ACCEPTED)
        );
        assert_eq!(
            (
                other.client_oid.as_str(),
                other.order_id.as_str(),
                other.outcome
            ),
            ("client order id 13", "", REJECTED)
        );
        assert_eq!(other.msg, "The order funds should more then 0.1 USDT.");
        assert_eq!(other.code, "");
    }

    #[test]
    fn results_whose_positions_are_wrong_show_nothing_about_failed_orders() {
        let (ok_a, ok_b) = (
            r#"{"success":true,"orderId":"1","clientOid":"a"}"#,
            r#"{"success":true,"orderId":"2","clientOid":"b"}"#,
        );
        let failed = r#"{"success":false,"failMsg":"no"}"#;
        for (results, expected) in [
            (
                format!("[{ok_a},{failed}]"),
                vec![("a", ACCEPTED), ("b", REJECTED)],
            ),
            // The failed result can be about either order, but "b" was accepted.
            (
                format!("[{ok_b},{failed}]"),
                vec![("a", MAYBE_SENT), ("b", ACCEPTED), ("", MAYBE_SENT)],
            ),
            (
                format!("[{ok_b},{ok_a}]"),
                vec![("a", ACCEPTED), ("b", ACCEPTED)],
            ),
            (
                format!("[{ok_a}]"),
                vec![("a", ACCEPTED), ("b", MAYBE_SENT)],
            ),
            (
                format!("[{failed}]"),
                vec![("a", MAYBE_SENT), ("b", MAYBE_SENT), ("", MAYBE_SENT)],
            ),
            (
                format!("[{ok_a},{failed},{failed}]"),
                vec![
                    ("a", ACCEPTED),
                    ("b", MAYBE_SENT),
                    ("", MAYBE_SENT),
                    ("", MAYBE_SENT),
                ],
            ),
        ] {
            let judged = hf(&results);
            assert_eq!(items(&judged), expected, "{results}");
            let is_open = expected.iter().any(|(_, outcome)| *outcome == MAYBE_SENT);
            let outcome = if is_open { MAYBE_SENT } else { ACCEPTED };
            assert_eq!(judged.outcome, outcome, "{results}");
        }
    }

    #[test]
    fn result_that_cannot_be_read_leaves_its_order_open() {
        let both_open = vec![("a", MAYBE_SENT), ("b", MAYBE_SENT)];
        for results in [
            "null",
            "{}",
            "\"x\"",
            "[]",
            "[7,null]",
            "[{},{}]",
            r#"[{"success":null},{"success":"yes"}]"#,
            r#"[{"success":false},{"success":false,"failMsg":""}]"#,
            r#"[{"success":false,"failMsg":"System busy"},{"success":false,"failMsg":"request timeout"}]"#,
            r#"[{"success":true,"success":false,"failMsg":"no"},{}]"#,
        ] {
            let judged = hf(results);
            assert_eq!(items(&judged), both_open, "{results}");
            assert_eq!(judged.outcome, MAYBE_SENT, "{results}");
        }
        let many = format!("[{}]", vec!["{}"; 13].join(","));
        assert_eq!(items(&hf(&many)), both_open, "more results than are read");
    }

    #[test]
    fn batch_is_rejected_only_if_every_order_is() {
        let failed = r#"{"success":false,"failMsg":"no"}"#;
        let judged = hf(&format!("[{failed},{failed}]"));
        assert_eq!(items(&judged), [("a", REJECTED), ("b", REJECTED)]);
        assert_eq!(judged.outcome, REJECTED);
        let refused = judge(HF, "{}", r#"{"code":"400100","msg":"Parameter error"}"#);
        assert_eq!((refused.outcome, refused.items), (REJECTED, Vec::new()));
        let single = judge(
            "spot.post.v1-hf-orders",
            "{}",
            r#"{"code":"200000","data":{}}"#,
        );
        assert_eq!((single.outcome, single.items), (ACCEPTED, Vec::new()));
        let unknown = judge(HF, r#"{"orders":[{}]}"#, r#"{"code":"200000","data":[]}"#);
        assert_eq!(unknown.outcome, MAYBE_SENT, "the orders are unknown");
    }

    #[test]
    fn codes_of_a_futures_batch_decide_about_each_order() {
        // Source: Kucoin/kucoin-universal-sdk, "Batch Add Orders" of futures; codes: KuCoin API documentation.
        let body = r#"[{"clientOid":"5c52e11203aa677f33e493fb"},{"clientOid":"5c52e11203aa677f33e493fc"},{"clientOid":"c"},{"clientOid":"d"},{"clientOid":"e"},{"clientOid":"f"}]"#;
        let answer = r#"{"code":"200000","data":[{"orderId":"235919387855482880","clientOid":"5c52e11203aa677f33e493fc","symbol":"XBTUSDTM","code":"200000","msg":"success"},{"orderId":"235919387779985408","clientOid":"5c52e11203aa677f33e493fb","symbol":"XBTUSDTM","code":"200000","msg":"success"},{"orderId":null,"clientOid":"c","code":"300018","msg":"clientOid parameter repeated"},{"clientOid":"d","code":"500000"},{"clientOid":"e","code":"999999"},{"clientOid":"f","code":"300003","msg":"Balance insufficient"}]}"#;
        let judged = judge(FUTURES, body, answer);
        assert_eq!(
            items(&judged),
            [
                ("5c52e11203aa677f33e493fb", ACCEPTED),
                ("5c52e11203aa677f33e493fc", ACCEPTED),
                // An earlier order has its clientOid.
                ("c", MAYBE_SENT),
                ("d", MAYBE_SENT),
                ("e", MAYBE_SENT),
                ("f", REJECTED),
            ]
        );
        assert_eq!(judged.items[0].order_id, "235919387779985408");
        assert_eq!(judged.items[2].code, "300018");
        assert_eq!(judged.items[2].msg, "clientOid parameter repeated");
        assert_eq!(judged.outcome, MAYBE_SENT);
    }

    #[test]
    fn cancels_of_a_batch_are_judged_by_order_id_or_client_oid() {
        // Source: Kucoin/kucoin-universal-sdk, "Batch Cancel Orders" of futures.
        let body = r#"{"orderIdsList": ["250445104152670209", "250445181751463936"]}"#;
        let answer = r#"{"code":"200000","data":[{"orderId":"250445104152670209","clientOid":null,"code":"200","msg":"success"},{"orderId":"250445181751463936","clientOid":null,"code":"200","msg":"success"}]}"#;
        let judged = judge(CANCEL, body, answer);
        let ids: Vec<_> = judged.items.iter().map(|item| &item.order_id).collect();
        assert_eq!(ids, ["250445104152670209", "250445181751463936"]);
        assert_eq!(judged.outcome, ACCEPTED);
        let body =
            r#"{"orderIdsList":["1"],"clientOidsList":[{"symbol":"XBTUSDTM","clientOid":"a"}]}"#;
        let answer = r#"{"code":"200000","data":[{"orderId":"7","clientOid":"a","code":"100004","msg":"no"},{"orderId":"1","code":"200"}]}"#;
        let judged = judge(CANCEL, body, answer);
        assert_eq!(items(&judged), [("", ACCEPTED), ("a", REJECTED)]);
        let unified = "spot.post.ua-v2-unified-order-cancel-batch";
        let body = r#"{"tradeType":"SPOT","cancelOrderList":[{"orderId":"1"},{"clientOid":"a"}]}"#;
        let answer = r#"{"code":"200000","data":{"items":[{"orderId":"1","code":"200000"},{"orderId":"2","clientOid":"a"}]}}"#;
        let judged = judge(unified, body, answer);
        // Without a code, the result shows nothing.
        assert_eq!(items(&judged), [("", ACCEPTED), ("a", MAYBE_SENT)]);
    }

    #[test]
    fn results_of_the_old_spot_batch_are_read() {
        // Source: Kucoin/kucoin-universal-sdk, "Batch Add Orders - Old".
        let body = r#"{"symbol":"BTC-USDT","orderList":[{"clientOid":"3d07008668054da6b3cb12e432c2b13a"},{"clientOid":"37245dbe6e134b5c97732bfb36cd4a9d"}]}"#;
        let answer = r#"{"code":"200000","data":{"data":[{"id":"674a97dfef434f0007efc431","status":"success","failMsg":null,"clientOid":"3d07008668054da6b3cb12e432c2b13a"},{"id":"674a97dffb378b00077b9c20","status":"fail","failMsg":"Balance insufficient!","clientOid":"37245dbe6e134b5c97732bfb36cd4a9d"}]}}"#;
        let judged = judge("spot.post.v1-orders-multi", body, answer);
        assert_eq!(
            items(&judged),
            [
                ("3d07008668054da6b3cb12e432c2b13a", ACCEPTED),
                ("37245dbe6e134b5c97732bfb36cd4a9d", REJECTED),
            ]
        );
    }
}
