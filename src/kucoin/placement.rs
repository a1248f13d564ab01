//! The orders that a request places or amends, and transfers with a clientOid, as the body describes them.

use std::collections::BTreeMap;
use std::fmt;

use sha2::{Digest, Sha256};

use super::fields::{self, elements, members};
use super::order_form::{ClientOidLocation, FieldLocation, OrderForm, Requirement};
use super::{Effect, Endpoint, Risk, UnsignedRequest};

/// Most orders in a request. Source: none of KuCoin's batches takes more than 20.
pub(crate) const MAX_ORDERS: usize = 100;

/// One order that a request places or amends, or one transfer with a clientOid.
#[derive(Clone, Eq, PartialEq)]
pub(crate) struct Placement {
    /// The clientOid; of the amended order if the request amends one. `None`: the request has none.
    pub(crate) client_oid: Option<String>,
    /// Whether the exchange rejects it without a clientOid.
    pub(crate) requires_client_oid: bool,
    /// SHA-256 of the endpoint and of the order as it was sent; in a batch also of the values that hold for all its orders.
    pub(crate) digest: [u8; 32],
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
    let mut digest = Sha256::new_with_prefix(&endpoint.id);
    for part in root.values().copied().chain([Some(order)]) {
        digest.update([0]);
        digest.update(part.unwrap_or_default());
    }
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
        digest: digest.finalize().into(),
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
