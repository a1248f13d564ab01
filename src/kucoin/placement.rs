//! The orders that a request places or amends, and transfers with a clientOid, as the body describes them.

use std::collections::BTreeMap;
use std::fmt;

use super::fields::{self, elements, members};
use super::order_form::{ClientOidLocation, FieldLocation, OrderForm, Requirement};
use super::{Effect, Endpoint, Malformed, Risk, UnsignedRequest};

/// Most orders in a request. Source: none of KuCoin's batches takes more than 20.
pub(crate) const MAX_ORDERS: usize = 100;

/// One order that a request places or amends, or one transfer with a clientOid.
#[derive(Clone, Eq, PartialEq)]
pub(crate) struct Placement {
    /// The clientOid; of the amended order if the request amends one. `None`: the request has none.
    pub(crate) client_oid: Option<String>,
    /// Whether the exchange rejects it without a clientOid.
    pub(crate) requires_client_oid: bool,
    /// The values of the order by the catalogue's names, as exact text; null counts as absent.
    fields: BTreeMap<&'static str, String>,
}

/// Why the orders of a body cannot be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum PlacementError {
    /// It is not an object.
    #[error("expected the order as a JSON object")]
    Order,
    /// It has no list of orders, or too many.
    #[error("expected a list of 1 to {MAX_ORDERS} orders, each an object, at {}", shown(.0))]
    List(&'static str),
}

fn shown(pointer: &str) -> &str {
    if pointer.is_empty() {
        "the top"
    } else {
        pointer
    }
}

impl Placement {
    /// An order of which only these values are known.
    pub(super) fn partial(client_oid: &str, fields: &[(&'static str, &str)]) -> Self {
        let fields = fields.iter();
        Self {
            client_oid: Some(client_oid.to_owned()),
            requires_client_oid: true,
            fields: fields
                .map(|(name, value)| (*name, (*value).to_owned()))
                .collect(),
        }
    }

    /// A value of the order by the catalogue's name of it, such as `symbol`.
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str)
    }
}

/// Without the values, since orders do not belong in a log.
impl fmt::Debug for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Placement({:?})", self.client_oid)
    }
}

/// The orders that `request` places or amends, in the order of the body; or the transfer, if it can carry a clientOid. Empty
/// for any other request.
///
/// # Errors
/// When the body is not what the endpoint takes, so that its orders are unknown.
pub(crate) fn placements(
    endpoint: &'static Endpoint,
    request: &UnsignedRequest,
) -> Result<Vec<Placement>, PlacementError> {
    let places = matches!(endpoint.effect, Effect::Amend | Effect::Place);
    let Some(form) = &endpoint.order else {
        return Ok(Vec::new());
    };
    let is_in_body = matches!(form.client_oid, Some(ClientOidLocation::Body(_)));
    if !is_in_body || !places && endpoint.risk != Risk::Transfer {
        return Ok(Vec::new());
    }
    let body = std::str::from_utf8(&request.body).unwrap_or_default();
    let orders = match form.items.as_deref() {
        None => vec![body],
        Some(list) => fields::at(body, list)
            .and_then(|list| elements(list, MAX_ORDERS))
            .filter(|orders| !orders.is_empty())
            .ok_or(PlacementError::List(list))?,
    };
    let unreadable = match form.items.as_deref() {
        None => PlacementError::Order,
        Some(list) => PlacementError::List(list),
    };
    let orders = orders
        .into_iter()
        .map(|order| placement(endpoint, form, request, body, order));
    orders.collect::<Option<_>>().ok_or(unreadable)
}

/// Checks that each order of `request` has a clientOid where the exchange does not require one.
///
/// # Errors
/// When an order has none, or the orders of the body are unknown.
pub(crate) fn check_client_oids(
    endpoint: &'static Endpoint,
    request: &UnsignedRequest,
) -> Result<(), Malformed> {
    let form = endpoint.order.as_ref();
    let is_batch = form.is_some_and(|form| form.items.is_some());
    if !endpoint.accepts_orders_without_client_oid()
        || !is_batch && !request.body_client_oids.is_empty()
    {
        return Ok(());
    }
    let orders = placements(endpoint, request).map_err(|error| Malformed::new("body", error))?;
    let lacks_one = |order: &Placement| order.client_oid.is_none() && !order.requires_client_oid;
    let Some(index) = orders.iter().position(lacks_one) else {
        return Ok(());
    };
    let of_batch = if is_batch {
        format!(" in order {} of the batch", index + 1)
    } else {
        String::new()
    };
    Err(Malformed::new(
        "body",
        format_args!(
            "expected a clientOid{of_batch}, new for each order; add \"clientOid\": \"<up to 40 characters of A-Z a-z 0-9 _ ->\""
        ),
    ))
}

fn placement(
    endpoint: &'static Endpoint,
    form: &'static OrderForm,
    request: &UnsignedRequest,
    body: &str,
    order: &str,
) -> Option<Placement> {
    let client_oid = client_oid_name(form)?;
    let mut names = vec![client_oid];
    let mut shared = Vec::new();
    for location in form.fields.values() {
        match location {
            FieldLocation::Order(name) => names.push(name.as_str()),
            FieldLocation::Root(name) => shared.push(name.as_str()),
            FieldLocation::Path(_) | FieldLocation::Query(_) => {}
        }
    }
    let own: BTreeMap<_, _> = names.iter().copied().zip(members(order, &names)?).collect();
    let shared_values = if shared.is_empty() {
        Vec::new()
    } else {
        members(body, &shared)?
    };
    let root: BTreeMap<_, _> = shared.iter().copied().zip(shared_values).collect();
    let text_of = |of: &BTreeMap<&str, Option<&str>>, name: &str| {
        let raw = of.get(name).copied().flatten();
        raw.and_then(fields::text)
    };
    let mut values = BTreeMap::new();
    for (field, location) in &form.fields {
        let value = match location {
            FieldLocation::Order(name) => text_of(&own, name.as_str()),
            FieldLocation::Root(name) => text_of(&root, name.as_str()),
            FieldLocation::Path(name) => endpoint
                .path_parameter(name, request.target.path())
                .map(str::to_owned),
            FieldLocation::Query(name) => {
                let mut query = request.target.query().iter();
                let found = query.find(|(named, _)| named == name);
                found.map(|(_, value)| value.clone())
            }
        };
        values.extend(value.map(|value| (field.as_str(), value)));
    }
    let requires_client_oid = match &form.requires_client_oid {
        Requirement::Always => true,
        Requirement::Never => false,
        Requirement::When(rules) => rules.iter().any(|(field, required)| {
            let value = values.get(field.as_str());
            value.is_some_and(|value| required.contains(value))
        }),
    };
    Some(Placement {
        client_oid: text_of(&own, client_oid).filter(|oid| !oid.is_empty()),
        requires_client_oid,
        fields: values,
    })
}

/// The name that the clientOid has in an order.
fn client_oid_name(form: &OrderForm) -> Option<&str> {
    match form.client_oid.as_ref()? {
        ClientOidLocation::Body(pointer) => pointer.leaf(),
        ClientOidLocation::Path(_) | ClientOidLocation::Query(_) => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::{Catalog, Target};
    use super::*;
    use crate::base::ids::RequestId;

    pub(in crate::kucoin) fn endpoint(id: &str) -> &'static Endpoint {
        Catalog::get().by_id(id).unwrap()
    }

    /// A request to the endpoint, with its parameters unfilled.
    pub(in crate::kucoin) fn request(id: &str, body: &str) -> UnsignedRequest {
        let endpoint = endpoint(id);
        let path = endpoint.path.replace(['{', '}'], "");
        UnsignedRequest {
            account: "main".parse().unwrap(),
            scope: endpoint.scope.unwrap(),
            method: endpoint.method,
            target: Target::new(&path, Vec::new()).unwrap(),
            body: body.to_owned().into(),
            id: RequestId::random(),
            body_client_oids: Vec::new(),
        }
    }

    fn of(id: &str, body: &str) -> Result<Vec<Placement>, PlacementError> {
        placements(endpoint(id), &request(id, body))
    }

    fn values<'p>(placement: &'p Placement, names: &[&str]) -> Vec<Option<&'p str>> {
        names.iter().map(|name| placement.field(name)).collect()
    }

    #[test]
    fn order_is_read_with_the_exact_text_of_its_numbers() {
        // Source: Kucoin/kucoin-universal-sdk, "Add Order" of spot and of futures.
        let spot = r#"{"type": "limit", "symbol": "BTC-USDT", "side": "buy", "price": "50000", "size": "0.00001", "clientOid": "5c52e11203aa677f33e493fb", "remark": "order remarks"}"#;
        let found = of("spot.post.v1-hf-orders", spot).unwrap();
        assert_eq!(found.len(), 1);
        let names = ["symbol", "side", "type", "size", "funds", "price", "remark"];
        assert_eq!(
            values(&found[0], &names),
            [
                Some("BTC-USDT"),
                Some("buy"),
                Some("limit"),
                Some("0.00001"),
                None,
                Some("50000"),
                None
            ]
        );
        assert_eq!(
            found[0].client_oid.as_deref(),
            Some("5c52e11203aa677f33e493fb")
        );
        assert!(!found[0].requires_client_oid);
        let futures = r#"{"cli\u0065ntOid": "5c52e11203aa677f33e493fb", "side": "buy", "symbol": "XBTUSDTM", "leverage": 3, "type": "limit", "reduceOnly": false, "price": "0.1", "size": 1.0, "x": {"clientOid": "no", "size": 7}}"#;
        let found = of("futures.post.v1-orders", futures).unwrap();
        let names = ["symbol", "size", "leverage", "reduceOnly", "closeOrder"];
        assert_eq!(
            values(&found[0], &names),
            [
                Some("XBTUSDTM"),
                Some("1.0"),
                Some("3"),
                Some("false"),
                None
            ]
        );
        assert_eq!(
            found[0].client_oid.as_deref(),
            Some("5c52e11203aa677f33e493fb")
        );
        assert!(found[0].requires_client_oid);
        assert_eq!(
            format!("{:?}", found[0]),
            "Placement(Some(\"5c52e11203aa677f33e493fb\"))"
        );
    }

    #[test]
    fn orders_of_a_batch_are_read_one_by_one() {
        // Source: Kucoin/kucoin-universal-sdk, "Batch Add Orders" of futures and of spot, shortened.
        let futures = r#"[{"clientOid": "a", "symbol": "XBTUSDTM", "size": 1}, {"clientOid": "b", "symbol": "XBTUSDTM", "size": 2}]"#;
        let found = of("futures.post.v1-orders-multi", futures).unwrap();
        let sizes: Vec<_> = found.iter().map(|order| order.field("size")).collect();
        assert_eq!(sizes, [Some("1"), Some("2")]);
        let spot = r#"{"orderList": [{"clientOid": "a", "symbol": "BTC-USDT"}, {"symbol": "ETH-USDT", "clientOid": null}]}"#;
        let found = of("spot.post.v1-hf-orders-multi", spot).unwrap();
        let oids: Vec<_> = found.iter().map(|order| &order.client_oid).collect();
        assert_eq!(oids, [&Some("a".to_owned()), &None]);
        // The trade type holds for all orders of the batch.
        let unified =
            r#"{"tradeType": "SPOT", "orderList": [{"clientOid": "a", "orderType": "LIMIT"}]}"#;
        let found = of("spot.post.ua-v1-account-mode-order-place-batch", unified).unwrap();
        let names = ["tradeType", "type"];
        assert_eq!(values(&found[0], &names), [Some("SPOT"), Some("LIMIT")]);
    }

    #[test]
    fn body_whose_orders_are_unknown_is_an_error() {
        let many = format!("[{}]", vec!["{}"; MAX_ORDERS + 1].join(","));
        for (id, body, expected) in [
            ("spot.post.v1-hf-orders", "", PlacementError::Order),
            ("spot.post.v1-hf-orders", "[]", PlacementError::Order),
            (
                "spot.post.v1-hf-orders",
                r#"{"symbol":"a","symbol":"b"}"#,
                PlacementError::Order,
            ),
            (
                "spot.post.v1-hf-orders-multi",
                r#"{"orderlist":[{}]}"#,
                PlacementError::List("/orderList"),
            ),
            (
                "spot.post.v1-hf-orders-multi",
                r#"{"orderList":[]}"#,
                PlacementError::List("/orderList"),
            ),
            (
                "futures.post.v1-orders-multi",
                "[{},7]",
                PlacementError::List(""),
            ),
            (
                "futures.post.v1-orders-multi",
                &many,
                PlacementError::List(""),
            ),
        ] {
            assert_eq!(of(id, body), Err(expected), "{id} {body:.40}");
        }
        assert_eq!(
            PlacementError::List("").to_string(),
            "expected a list of 1 to 100 orders, each an object, at the top"
        );
    }

    #[test]
    fn only_orders_amendments_and_transfers_are_placements() {
        let oid = r#"{"clientOid":"64ccc0f164781800010d8c09"}"#;
        for (id, expected) in [
            ("spot.post.v3-accounts-universal-transfer", 1),
            ("spot.post.v2-accounts-inner-transfer", 1),
            ("spot.post.v2-accounts-sub-transfer", 1),
            ("spot.post.ua-v2-account-transfer", 1),
            ("spot.post.v1-hf-orders-alter", 1),
            ("spot.post.v1-hf-orders-test", 0),
            ("spot.post.ua-v2-unified-order-cancel", 0),
            ("spot.post.v3-withdrawals", 0),
            ("spot.get.v1-accounts", 0),
        ] {
            assert_eq!(of(id, oid).unwrap().len(), expected, "{id}");
        }
        let convert = of(
            "spot.post.v1-convert-limit-order",
            r#"{"clientOrderId":"c","clientOid":"x"}"#,
        );
        assert_eq!(convert.unwrap()[0].client_oid.as_deref(), Some("c"));
    }

    #[test]
    fn client_oid_is_required_where_the_exchange_requires_it() {
        let unified = |kind: &str| {
            let body = format!(r#"{{"tradeType":"{kind}"}}"#);
            of("spot.post.ua-v2-unified-order-place", &body).unwrap()[0].requires_client_oid
        };
        assert!(unified("FUTURES") && unified("MARGIN") && !unified("SPOT"));
        let margin = of("spot.post.v3-hf-margin-order", "{}").unwrap();
        assert!(margin[0].requires_client_oid && margin[0].client_oid.is_none());
        let stop = of("spot.post.v1-stop-order", "{}").unwrap();
        assert!(!stop[0].requires_client_oid);
    }

    #[test]
    fn order_without_client_oid_is_found_where_the_exchange_accepts_it() {
        let check = |id: &str, body: &str, oids: &[&str]| {
            let oids = oids.iter().map(|oid| (*oid).to_owned());
            let request = UnsignedRequest {
                body_client_oids: oids.collect(),
                ..request(id, body)
            };
            let checked = check_client_oids(endpoint(id), &request);
            checked.map_err(|problem| (problem.field, problem.problem))
        };
        let expected = |part: &str| {
            let fix = "add \"clientOid\": \"<up to 40 characters of A-Z a-z 0-9 _ ->\"";
            let problem = format!("expected a clientOid{part}, new for each order; {fix}");
            Err(("body".to_owned(), problem))
        };
        let (one, batch) = ("spot.post.v1-hf-orders", "spot.post.v1-hf-orders-multi");
        assert_eq!(check(one, r#"{"clientOid":"a"}"#, &["a"]), Ok(()));
        for body in ["{}", r#"{"clientOid":null}"#, r#"{"clientOid":""}"#] {
            assert_eq!(check(one, body, &[]), expected(""), "{body}");
        }
        let orders = r#"{"orderList":[{"clientOid":"a"},{"symbol":"b"}]}"#;
        let second = expected(" in order 2 of the batch");
        assert_eq!(check(batch, orders, &["a"]), second);
        let orders = r#"{"orderList":[{"clientOid":"a"},{"clientOid":"b"}]}"#;
        assert_eq!(check(batch, orders, &["a", "b"]), Ok(()));
        // Its orders are unknown.
        assert!(check(batch, r#"{"orderlist":[{}]}"#, &[]).is_err());
        // The exchange rejects these, or they are no orders.
        let unified = "spot.post.ua-v2-unified-order-place";
        assert_eq!(check(unified, r#"{"tradeType":"FUTURES"}"#, &[]), Ok(()));
        assert_eq!(check(unified, r#"{"tradeType":"SPOT"}"#, &[]), expected(""));
        for id in [
            "futures.post.v1-orders",
            "spot.post.v1-hf-orders-alter",
            "spot.post.v1-hf-orders-test",
            "spot.post.ua-v2-account-transfer",
        ] {
            assert_eq!(check(id, "{}", &[]), Ok(()), "{id}");
        }
    }
}
