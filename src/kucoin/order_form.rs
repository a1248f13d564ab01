//! `order` of the catalogue: where requests and answers of an endpoint carry orders, and which read finds an order.
//!
//! Sources: KuCoin's SDK specification unless `basis` in `endpoints.json` names another; transfers are our own judgement.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::fields;
use super::pointer::Pointer;

/// Where an endpoint's requests and answers carry orders, or the clientOid of a transfer.
#[derive(Debug, Deserialize)]
#[serde(from = "CatalogOrder")]
pub(crate) struct OrderForm {
    /// The clientOid in the request; `None` if the request identifies orders in another way.
    pub(crate) client_oid: Option<ClientOidLocation>,
    /// When the exchange requires a clientOid.
    pub(crate) requires_client_oid: Requirement,
    /// Pointer to the list of orders in the body; empty if the body is the list. `None`: one order.
    pub(crate) items: Option<String>,
    /// Where the request has the other values of an order, by KuCoin's usual name of the value.
    pub(crate) fields: BTreeMap<String, FieldLocation>,
    /// The clientOids in the answer; `None` if it carries none.
    pub(crate) answer_client_oid: Option<Pointer>,
    /// Pointer to the order id in the answer, or in each result of a batch.
    pub(crate) answer_order_id: Option<String>,
    /// The results in the answer to a batch; `None` if the endpoint takes one order.
    pub(crate) results: Option<BatchResults>,
    /// The read that finds an order by its clientOid.
    pub(crate) lookup: Option<LookupForm>,
    /// The read that finds an order by its id.
    pub(crate) lookup_by_order_id: Option<LookupForm>,
}

impl OrderForm {
    /// The order id in the answer to a request with one order.
    pub(crate) fn order_id(&self, body: &[u8]) -> Option<String> {
        let pointer = self
            .answer_order_id
            .as_deref()
            .filter(|_| self.results.is_none())?;
        fields::text(fields::at(std::str::from_utf8(body).ok()?, pointer)?)
    }
}

/// Where a request carries clientOids.
#[derive(Debug)]
pub(crate) enum ClientOidLocation {
    /// In the body.
    Body(Pointer),
    /// The path parameter of this name.
    Path(String),
    /// The query parameter of this name.
    Query(String),
}

/// When the exchange requires a value.
#[derive(Debug)]
pub(crate) enum Requirement {
    /// In every request.
    Always,
    /// Never.
    Never,
    /// If one of these fields has one of these values.
    When(BTreeMap<String, Vec<String>>),
}

/// Where a request has a value of an order.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub(crate) enum FieldLocation {
    /// A member of the order: of the body, or of an element of the list of orders.
    Order(String),
    /// The path parameter of this name.
    Path(String),
    /// The query parameter of this name.
    Query(String),
    /// A member of the body, which holds for all orders of the list.
    Root(String),
}

/// The results in the answer to a batch: one for each order.
#[derive(Debug)]
pub(crate) struct BatchResults {
    /// Pointer to the list.
    pub(crate) array: String,
    /// The member of a result that shows whether the order was accepted, and its value then.
    pub(crate) ok: (String, String),
    /// The member with the code of a result.
    pub(crate) code: Option<String>,
    /// The member with the message of a result.
    pub(crate) msg: String,
    /// The member with the clientOid of the order.
    pub(crate) client_oid: Option<String>,
    /// The member with the id of the order.
    pub(crate) order_id: Option<String>,
    /// How results belong to orders.
    pub(crate) matched_by: MatchedBy,
}

/// How the results of a batch belong to its orders.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "camelCase")]
pub(crate) enum MatchedBy {
    /// By clientOid.
    ClientOid,
    /// By clientOid or order id, whichever the request has.
    Id,
    /// By position: a failed result has no id.
    Position,
}

/// A read that finds one order.
#[derive(Debug, Deserialize)]
#[serde(from = "CatalogLookup")]
pub(crate) struct LookupForm {
    /// Id of the endpoint in the catalogue.
    pub(crate) endpoint: String,
    /// The parameter for the clientOid or order id.
    pub(crate) id: FieldLocation,
    /// Names of fields that are further query parameters.
    pub(crate) needs: Vec<String>,
    /// Query parameters that are always the same.
    pub(crate) fixed: BTreeMap<String, String>,
    /// Pointer to the order id in the answer.
    pub(crate) order_id: String,
    /// Pointer to the clientOid in the answer.
    pub(crate) client_oid: String,
    /// Pointer to the order's state in the answer.
    pub(crate) state: String,
}

/// `order` of the catalogue as it is written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CatalogOrder {
    client_oid: Option<CatalogClientOid>,
    items: Option<String>,
    #[serde(default)]
    fields: BTreeMap<String, FieldLocation>,
    answer: Option<CatalogAnswer>,
    lookup: Option<LookupForm>,
    lookup_by_order_id: Option<LookupForm>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CatalogClientOid {
    r#in: CatalogPart,
    pointer: String,
    #[serde(default)]
    required: bool,
    #[serde(default)]
    required_when: BTreeMap<String, Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum CatalogPart {
    Body,
    Path,
    Query,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CatalogAnswer {
    order_id: Option<String>,
    client_oid: Option<String>,
    per_item: Option<CatalogResults>,
}

#[derive(Deserialize)]
struct CatalogResults {
    array: String,
    ok: CatalogOk,
    code: Option<String>,
    msg: String,
    r#match: MatchedBy,
}

#[derive(Deserialize)]
struct CatalogOk {
    field: String,
    value: serde_json::Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CatalogLookup {
    endpoint: String,
    client_oid: Option<FieldLocation>,
    order_id: Option<FieldLocation>,
    #[serde(default)]
    needs: Vec<String>,
    #[serde(default)]
    fixed: BTreeMap<String, String>,
    answer: CatalogFound,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CatalogFound {
    order_id: String,
    client_oid: String,
    state: String,
}

impl TryFrom<String> for FieldLocation {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (part, name) = text.split_once(':').unwrap_or(("", &text));
        let member = || {
            let name = name.strip_prefix('/').filter(|name| !name.contains('/'));
            name.map(str::to_owned)
        };
        let location = match part {
            "" => member().map(Self::Order),
            "root" => member().map(Self::Root),
            "path" => Some(Self::Path(name.to_owned())),
            "query" => Some(Self::Query(name.to_owned())),
            _ => None,
        };
        location.ok_or_else(|| format!("{text:?} is no location of a field"))
    }
}

impl From<CatalogLookup> for LookupForm {
    fn from(lookup: CatalogLookup) -> Self {
        let CatalogLookup {
            endpoint,
            client_oid,
            order_id,
            needs,
            fixed,
            answer,
        } = lookup;
        // Each lookup of the catalogue has one of them, which its test checks.
        let id = client_oid.or(order_id);
        Self {
            endpoint,
            id: id.unwrap_or_else(|| FieldLocation::Query(String::new())),
            needs,
            fixed,
            order_id: answer.order_id,
            client_oid: answer.client_oid,
            state: answer.state,
        }
    }
}

/// The name in a pointer to a member.
fn member(pointer: &str) -> String {
    pointer.trim_start_matches('/').to_owned()
}

impl BatchResults {
    fn new(
        results: CatalogResults,
        client_oid: Option<&String>,
        order_id: Option<&String>,
    ) -> Self {
        let value = match results.ok.value {
            serde_json::Value::String(text) => text,
            other => other.to_string(),
        };
        Self {
            array: results.array,
            ok: (member(&results.ok.field), value),
            code: results.code.as_deref().map(member),
            msg: member(&results.msg),
            client_oid: client_oid.map(|pointer| member(pointer)),
            order_id: order_id.map(|pointer| member(pointer)),
            matched_by: results.r#match,
        }
    }
}

impl From<CatalogOrder> for OrderForm {
    fn from(order: CatalogOrder) -> Self {
        let items = order.items.as_deref();
        let mut requires_client_oid = Requirement::Never;
        let client_oid = order.client_oid.map(|one| {
            requires_client_oid = match one.required {
                true => Requirement::Always,
                false if one.required_when.is_empty() => Requirement::Never,
                false => Requirement::When(one.required_when),
            };
            match one.r#in {
                CatalogPart::Body => ClientOidLocation::Body(Pointer::new(items, &one.pointer)),
                CatalogPart::Path => ClientOidLocation::Path(one.pointer),
                CatalogPart::Query => ClientOidLocation::Query(one.pointer),
            }
        });
        let (mut answer_client_oid, mut answer_order_id, mut results) = (None, None, None);
        if let Some(answer) = order.answer {
            let array = answer.per_item.as_ref().map(|items| items.array.as_str());
            let pointer = answer.client_oid.as_ref();
            answer_client_oid = pointer.map(|pointer| Pointer::new(array, pointer));
            results = answer
                .per_item
                .map(|results| BatchResults::new(results, pointer, answer.order_id.as_ref()));
            answer_order_id = answer.order_id;
        }
        Self {
            client_oid,
            requires_client_oid,
            items: order.items,
            fields: order.fields,
            answer_client_oid,
            answer_order_id,
            results,
            lookup: order.lookup,
            lookup_by_order_id: order.lookup_by_order_id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Catalog, Effect, Endpoint, Method, Risk};
    use super::*;

    fn forms() -> impl Iterator<Item = (&'static Endpoint, &'static OrderForm)> {
        let all = Catalog::get().endpoints().iter();
        all.filter_map(|endpoint| Some((endpoint, endpoint.order.as_ref()?)))
    }

    #[test]
    fn every_lookup_is_a_read_that_has_its_parameters() {
        let mut lookups = 0;
        for (endpoint, form) in forms() {
            for lookup in form.lookup.iter().chain(&form.lookup_by_order_id) {
                lookups += 1;
                let read = Catalog::get().by_id(&lookup.endpoint).unwrap();
                let expected = (Method::Get, endpoint.scope, Risk::Read);
                assert_eq!((read.method, read.scope, read.risk), expected);
                match &lookup.id {
                    FieldLocation::Path(name) => {
                        assert!(read.path.contains(&format!("{{{name}}}")), "{}", read.path);
                    }
                    FieldLocation::Query(name) => assert!(!name.is_empty(), "{}", endpoint.id),
                    other => panic!("{}: {other:?}", endpoint.id),
                }
                for name in &lookup.needs {
                    assert!(form.fields.contains_key(name), "{}: {name}", endpoint.id);
                }
            }
        }
        assert_eq!(lookups, 56);
    }

    #[test]
    fn endpoints_that_place_orders_without_a_lookup_are_the_documented_ones() {
        let places = |endpoint: &Endpoint| matches!(endpoint.effect, Effect::Amend | Effect::Place);
        let without = forms().filter(|(endpoint, form)| places(endpoint) && form.lookup.is_none());
        let mut without: Vec<_> = without.map(|(endpoint, _)| endpoint.id.as_str()).collect();
        without.sort_unstable();
        assert_eq!(
            without,
            [
                "futures.post.v1-copy-trade-futures-orders",
                "futures.post.v1-copy-trade-futures-st-orders",
                "futures.post.v2-order",
                "spot.post.ua-v1-account-mode-order-place-batch",
            ]
        );
    }

    #[test]
    fn batch_results_are_read_as_documented() {
        let of = |id: &str| {
            let form = Catalog::get().by_id(id).unwrap().order.as_ref();
            form.unwrap().results.as_ref().unwrap()
        };
        // Source: KuCoin API documentation, "Batch Add Orders" of spot and of futures, "Batch Cancel Orders" of futures.
        let spot = of("spot.post.v1-hf-orders-multi");
        assert_eq!(spot.ok, ("success".to_owned(), "true".to_owned()));
        assert_eq!((spot.msg.as_str(), &spot.code), ("failMsg", &None));
        assert_eq!(spot.matched_by, MatchedBy::Position);
        let futures = of("futures.post.v1-orders-multi");
        assert_eq!(futures.ok, ("code".to_owned(), "200000".to_owned()));
        assert_eq!(futures.matched_by, MatchedBy::ClientOid);
        let cancels = of("futures.delete.v1-orders-multi-cancel");
        assert_eq!(cancels.ok, ("code".to_owned(), "200".to_owned()));
        assert_eq!(cancels.matched_by, MatchedBy::Id);
        assert_eq!(
            forms().filter(|(_, form)| form.results.is_some()).count(),
            8
        );
    }
}
