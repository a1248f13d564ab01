//! Which orders a cancel covers, as far as the orders are still on their way to the exchange.

use std::slice::from_ref;

use serde_json::Value;

use super::catalog::{Effect, Endpoint, Product};
use super::placement::placements;
use super::{Method, Scope, UnsignedRequest};

/// The orders that a request places or amends, or the transfers that it makes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct PendingOrders {
    scope: Scope,
    product: Product,
    /// Cancels do not cover transfers.
    are_transfers: bool,
    /// Their clientOids; of an amended order also its order id.
    ids: Vec<String>,
    /// Their symbols; empty: unknown.
    symbols: Vec<String>,
    /// Their trade types; empty: unknown.
    trade_types: Vec<String>,
}

/// The orders that a request cancels.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct CancelScope {
    scope: Scope,
    product: Product,
    what: Cancelled,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Cancelled {
    /// Those with one of these clientOids or order ids.
    Ids(Vec<String>),
    /// All of a product that have one of these symbols (empty: all symbols) and this trade type (`None`: any).
    All {
        symbols: Vec<String>,
        trade_type: Option<String>,
    },
}

impl PendingOrders {
    /// `None` if the request neither places nor amends orders, and makes no transfer.
    pub(crate) fn of(endpoint: &'static Endpoint, request: &UnsignedRequest) -> Option<Self> {
        let are_transfers = !matches!(endpoint.effect, Effect::Amend | Effect::Place);
        if are_transfers && !endpoint.claims_client_oids() {
            return None;
        }
        let orders = placements(endpoint, request).unwrap_or_default();
        let fields = |name: &'static str| {
            let fields = orders.iter().filter_map(move |order| order.field(name));
            fields.map(str::to_owned)
        };
        let ids = orders.iter().filter_map(|order| order.client_oid.clone());
        let ids = ids.chain(request.body_client_oids.iter().cloned());
        let is_isolated = body(request).pointer("/isIsolated") == Some(&Value::Bool(true));
        let trade_types = match endpoint.product {
            Product::Margin if is_isolated => vec!["MARGIN_ISOLATED_TRADE".to_owned()],
            Product::Margin => vec!["MARGIN_TRADE".to_owned()],
            Product::Spot => match body(request).get("tradeType").and_then(Value::as_str) {
                // An old endpoint that also accepts margin orders.
                Some(trade_type) => vec![trade_type.to_owned()],
                None => vec!["TRADE".to_owned()],
            },
            _ => fields("tradeType").collect(),
        };
        Some(Self {
            scope: request.scope,
            product: endpoint.product,
            are_transfers,
            ids: ids.chain(fields("orderId")).collect(),
            symbols: fields("symbol").collect(),
            trade_types,
        })
    }
}

impl PendingOrders {
    /// Whether one of them has this clientOid or order id.
    pub(crate) fn has(&self, scope: Scope, id: &str) -> bool {
        self.scope == scope && self.ids.iter().any(|known| known == id)
    }
}

impl CancelScope {
    /// `None` if the request cancels nothing.
    pub(crate) fn of(endpoint: &Endpoint, request: &UnsignedRequest) -> Option<Self> {
        let query = request.target.query();
        let body = body(request);
        let what = match endpoint.effect {
            Effect::Cancel => {
                let in_path = request.target.path().rsplit('/').next();
                let in_path = in_path.filter(|_| request.method == Method::Delete);
                let mut ids: Vec<_> = in_path.map(str::to_owned).into_iter().collect();
                let in_query = query.iter().filter(|(name, _)| names_ids(name));
                ids.extend(in_query.map(|(_, value)| value.clone()));
                add_ids(&body, false, &mut ids);
                Cancelled::Ids(ids)
            }
            Effect::CancelAll => {
                let named = |wanted: &str| {
                    let in_query = query.iter().find(|(name, _)| name == wanted);
                    let in_body = body.get(wanted).and_then(Value::as_str);
                    in_query.map(|(_, value)| value.as_str()).or(in_body)
                };
                // Some cancel only the orders that they name.
                let ids = named("orderIds").filter(|ids| !ids.is_empty());
                if let Some(ids) = ids {
                    let ids = ids.split(',').map(|id| id.trim().to_owned());
                    return Some(Self {
                        scope: request.scope,
                        product: endpoint.product,
                        what: Cancelled::Ids(ids.collect()),
                    });
                }
                let symbols = ["symbol", "symbols"].into_iter().filter_map(named);
                let symbols = symbols.flat_map(|symbols| symbols.split(','));
                let symbols = symbols.filter(|symbol| !symbol.is_empty());
                Cancelled::All {
                    symbols: symbols.map(str::to_owned).collect(),
                    trade_type: named("tradeType").map(str::to_owned),
                }
            }
            Effect::Amend | Effect::None | Effect::Place | Effect::Test => return None,
        };
        Some(Self {
            scope: request.scope,
            product: endpoint.product,
            what,
        })
    }

    /// Whether it would cancel one of these orders, if they were at the exchange already.
    pub(crate) fn covers(&self, orders: &PendingOrders) -> bool {
        let has_one = |known: &[String], wanted: &[String]| {
            known.is_empty() || known.iter().any(|known| wanted.contains(known))
        };
        if orders.are_transfers {
            return false;
        }
        match &self.what {
            Cancelled::Ids(ids) => {
                self.scope == orders.scope && orders.ids.iter().any(|id| ids.contains(id))
            }
            Cancelled::All {
                symbols,
                trade_type,
            } => {
                self.product == orders.product
                    && (symbols.is_empty() || has_one(&orders.symbols, symbols))
                    && trade_type
                        .as_ref()
                        .is_none_or(|wanted| has_one(&orders.trade_types, from_ref(wanted)))
            }
        }
    }
}

fn body(request: &UnsignedRequest) -> Value {
    serde_json::from_slice(&request.body).unwrap_or_default()
}

/// Whether a parameter or field has clientOids or order ids, such as `orderId` and `clientOidsList`.
fn names_ids(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let name = name.strip_suffix("list").unwrap_or(&name);
    name.strip_suffix('s').unwrap_or(name).ends_with("id")
}

/// Adds every clientOid and order id in a JSON value. `is_id`: whether a text here is one.
fn add_ids(value: &Value, is_id: bool, ids: &mut Vec<String>) {
    match value {
        Value::String(text) if is_id => ids.push(text.clone()),
        Value::Array(values) => values.iter().for_each(|value| add_ids(value, is_id, ids)),
        Value::Object(members) => {
            for (name, value) in members {
                add_ids(value, names_ids(name), ids);
            }
        }
        Value::Bool(_) | Value::Null | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::Catalog;
    use super::*;
    use crate::kucoin::request::RequestLimits;

    fn request(
        id: &str,
        path: &str,
        query: &[(&str, &str)],
        body: &str,
    ) -> (&'static Endpoint, UnsignedRequest) {
        let endpoint = Catalog::get().by_id(id).unwrap();
        let query = query.iter();
        let query = query.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let limits = RequestLimits::default();
        let mut problems = Vec::new();
        let path = if path.is_empty() {
            &endpoint.path
        } else {
            path
        };
        let target = super::super::request::target(path, query.collect(), &limits, &mut problems);
        let scope = endpoint.scope.unwrap();
        let body_client_oids = super::super::request::body(
            Some(endpoint),
            Some(scope),
            endpoint.method,
            path,
            body.as_bytes(),
            &limits,
        );
        let request = UnsignedRequest {
            id: "r".parse().unwrap(),
            account: "main".parse().unwrap(),
            scope,
            method: endpoint.method,
            target: target.unwrap(),
            body: body.to_owned().into(),
            body_client_oids: body_client_oids.unwrap(),
        };
        (endpoint, request)
    }

    pub(crate) fn spot_order() -> PendingOrders {
        let body = r#"{"clientOid":"a-1","side":"buy","symbol":"BTC-USDT","type":"limit","price":"1","size":"1"}"#;
        let (endpoint, request) = request("spot.post.v1-hf-orders", "", &[], body);
        PendingOrders::of(endpoint, &request).unwrap()
    }

    /// The cancel of all spot orders.
    pub(crate) fn spot_cancel_all() -> CancelScope {
        let (endpoint, request) = request("spot.delete.v1-hf-orders-cancel-all", "", &[], "");
        CancelScope::of(endpoint, &request).unwrap()
    }

    fn margin_order(isolated: bool) -> PendingOrders {
        let body = format!(
            r#"{{"clientOid":"m-1","side":"buy","symbol":"BTC-USDT","type":"limit","price":"1","size":"1","isIsolated":{isolated}}}"#
        );
        let (endpoint, request) = request("spot.post.v3-hf-margin-order", "", &[], &body);
        PendingOrders::of(endpoint, &request).unwrap()
    }

    fn covers(id: &str, path: &str, query: &[(&str, &str)], orders: &PendingOrders) -> bool {
        let (endpoint, request) = request(id, path, query, "");
        CancelScope::of(endpoint, &request).unwrap().covers(orders)
    }

    #[test]
    fn cancel_by_client_oid_covers_only_that_order() {
        let id = "spot.delete.v1-hf-orders-client-order-client-oid";
        let path = |oid: &str| format!("/api/v1/hf/orders/client-order/{oid}");
        let query = [("symbol", "BTC-USDT")];
        assert!(covers(id, &path("a-1"), &query, &spot_order()));
        assert!(!covers(id, &path("a-2"), &query, &spot_order()));
    }

    #[test]
    fn cancel_all_covers_orders_of_its_product_symbol_and_trade_type() {
        let (spot, by_symbol) = (
            "spot.delete.v1-hf-orders-cancel-all",
            "spot.delete.v1-hf-orders",
        );
        assert!(covers(spot, "", &[], &spot_order()));
        assert!(covers(
            by_symbol,
            "",
            &[("symbol", "BTC-USDT")],
            &spot_order()
        ));
        assert!(!covers(
            by_symbol,
            "",
            &[("symbol", "ETH-USDT")],
            &spot_order()
        ));
        assert!(!covers(spot, "", &[], &margin_order(false)));
        let margin = "spot.delete.v3-hf-margin-orders";
        for (trade_type, isolated) in [("MARGIN_TRADE", false), ("MARGIN_ISOLATED_TRADE", true)] {
            let query = [("symbol", "BTC-USDT"), ("tradeType", trade_type)];
            assert!(covers(margin, "", &query, &margin_order(isolated)));
            assert!(!covers(margin, "", &query, &margin_order(!isolated)));
        }
    }

    #[test]
    fn cancel_of_named_stop_orders_covers_no_others() {
        let id = "spot.delete.v1-stop-order-cancel";
        assert!(!covers(id, "", &[("orderIds", "1,2")], &spot_order()));
        assert!(covers(id, "", &[("orderIds", "1, a-1")], &spot_order()));
        assert!(!covers(
            id,
            "",
            &[("tradeType", "MARGIN_TRADE")],
            &spot_order()
        ));
    }

    #[test]
    fn other_parameters_and_scopes_are_not_ids() {
        let partial = "spot.delete.v1-hf-orders-cancel-order-id";
        let path = "/api/v1/hf/orders/cancel/9";
        let query = [("symbol", "BTC-USDT"), ("cancelSize", "a-1")];
        assert!(!covers(partial, path, &query, &spot_order()));
        let futures = "futures.delete.v1-orders-client-order-client-oid";
        let path = "/api/v1/orders/client-order/a-1";
        assert!(!covers(
            futures,
            path,
            &[("symbol", "XBTUSDTM")],
            &spot_order()
        ));
    }

    #[test]
    fn transfer_that_waits_is_known_by_its_client_oid_and_no_cancel_covers_it() {
        let transfer = "spot.post.ua-v1-account-transfer";
        let body = r#"{"clientOid":"t-1","currency":"USDT","amount":"1","type":"INTERNAL"}"#;
        let (endpoint, transfer) = request(transfer, "", &[], body);
        let pending = PendingOrders::of(endpoint, &transfer).unwrap();
        assert!(pending.has(transfer.scope, "t-1"));
        let all = "spot.post.ua-v2-unified-order-cancel-all";
        let (endpoint, cancel) = request(all, "", &[], "{}");
        let cancel = CancelScope::of(endpoint, &cancel).unwrap();
        assert!(!cancel.covers(&pending));
    }

    #[test]
    fn batch_cancel_covers_every_order_in_its_body() {
        let body = r#"{"clientOidsList":[{"symbol":"XBTUSDTM","clientOid":"f-1"},{"symbol":"XBTUSDTM","clientOid":"f-2"}]}"#;
        let (endpoint, cancel) = request("futures.delete.v1-orders-multi-cancel", "", &[], body);
        let cancel = CancelScope::of(endpoint, &cancel).unwrap();
        for (oid, is_covered) in [("f-1", true), ("f-2", true), ("f-3", false)] {
            let body = format!(
                r#"{{"clientOid":"{oid}","side":"buy","symbol":"XBTUSDTM","type":"limit","price":"1","size":1,"leverage":1}}"#
            );
            let (endpoint, order) = request("futures.post.v1-orders", "", &[], &body);
            let orders = PendingOrders::of(endpoint, &order).unwrap();
            assert_eq!(cancel.covers(&orders), is_covered, "{oid}");
        }
    }

    #[test]
    fn reads_cancel_nothing_and_place_nothing() {
        let (endpoint, read) = request("spot.get.v1-accounts", "", &[], "");
        assert_eq!(CancelScope::of(endpoint, &read), None);
        assert_eq!(PendingOrders::of(endpoint, &read), None);
    }
}
