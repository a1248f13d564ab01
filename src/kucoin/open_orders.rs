//! How the exchange lists and cancels open orders of each kind: the table that cancel-all uses. Pure.
//!
//! Also the reads that tell a bot which of its orders are open: the lists, and lookups of one order.

use serde_json::Value;

use super::{Endpoint, Method, Scope};
use crate::base::text::clean;

/// Orders per page, which every list accepts. Source: KuCoin API documentation, `pageSize` of these lists.
pub(crate) const PAGE: usize = 100;

/// Most pages that are read of a list: 5000 orders. Lists of one-cancels-other orders also contain closed orders.
pub(crate) const PAGES: usize = 50;

/// `status` of a closed one-cancels-other order. The order that a triggered one places is listed with the normal orders.
const OVER: [&str; 3] = ["CANCELLED", "DONE", "TRIGGERED"];

/// One kind of order, which only its own requests cancel.
#[derive(Debug)]
pub(crate) struct Kind {
    /// The scope of these orders.
    pub(crate) scope: Scope,
    /// Cancels all of them (DELETE).
    pub(crate) whole: Option<&'static str>,
    /// Cancels those of one symbol, and on the unified account of one margin mode.
    pub(crate) by_symbol: Option<(Method, &'static str)>,
    /// How they are listed.
    pub(crate) list: List,
    /// Parameters of all these requests.
    pub(crate) names: &'static [(&'static str, &'static str)],
}

/// How the open orders of a kind are listed.
#[derive(Debug)]
pub(crate) enum List {
    /// Page by page.
    Paged {
        /// Path of the list.
        path: &'static str,
        /// Name of the page parameter.
        number: &'static str,
        /// Parameters of only the list.
        names: &'static [(&'static str, &'static str)],
    },
    /// First the symbols with open orders, then the orders of each symbol.
    PerSymbol {
        /// Path of the list of symbols.
        symbols: &'static str,
        /// Path of the list of a symbol's orders.
        path: &'static str,
    },
}

const SPOT: &[(&str, &str)] = &[("tradeType", "TRADE")];
const CROSS: &[(&str, &str)] = &[("tradeType", "MARGIN_TRADE")];
const ISOLATED: &[(&str, &str)] = &[("tradeType", "MARGIN_ISOLATED_TRADE")];

/// Every kind. Source: KuCoin API documentation, the pages of these endpoints; a test compares them with the catalogue.
pub(crate) const KINDS: [Kind; 19] = [
    Kind {
        scope: Scope::SpotMargin,
        whole: Some("/api/v1/hf/orders/cancelAll"),
        // The answer lists symbols that failed; these are cancelled one by one.
        by_symbol: Some((Method::Delete, "/api/v1/hf/orders")),
        list: List::PerSymbol {
            symbols: "/api/v1/hf/orders/active/symbols",
            path: "/api/v1/hf/orders/active",
        },
        names: &[],
    },
    margin(CROSS),
    margin(ISOLATED),
    // The only spot endpoint that still accepts margin orders.
    stop("/api/v1/stop-order/cancel", "/api/v1/stop-order", SPOT),
    stop("/api/v1/stop-order/cancel", "/api/v1/stop-order", CROSS),
    stop("/api/v1/stop-order/cancel", "/api/v1/stop-order", ISOLATED),
    stop(MARGIN_STOP.0, MARGIN_STOP.1, CROSS),
    stop(MARGIN_STOP.0, MARGIN_STOP.1, ISOLATED),
    stop("/api/v3/oco/orders", "/api/v3/oco/orders", &[]),
    stop(MARGIN_OCO.0, MARGIN_OCO.1, CROSS),
    stop(MARGIN_OCO.0, MARGIN_OCO.1, ISOLATED),
    Kind {
        scope: Scope::Futures,
        whole: None,
        by_symbol: Some((Method::Delete, "/api/v3/orders")),
        list: paged("/api/v1/orders", "currentPage", &[("status", "active")]),
        names: &[],
    },
    Kind {
        scope: Scope::Futures,
        whole: Some("/api/v1/stopOrders"),
        by_symbol: None,
        list: paged("/api/v1/stopOrders", "currentPage", &[]),
        names: &[],
    },
    unified(&[("tradeType", "SPOT"), ("orderFilter", "NORMAL")]),
    unified(&[("tradeType", "SPOT"), ("orderFilter", "ADVANCED")]),
    unified(&[("tradeType", "MARGIN"), ("orderFilter", "NORMAL")]),
    unified(&[("tradeType", "MARGIN"), ("orderFilter", "ADVANCED")]),
    unified(&[("tradeType", "FUTURES"), ("orderFilter", "NORMAL")]),
    unified(&[("tradeType", "FUTURES"), ("orderFilter", "ADVANCED")]),
];

const MARGIN_STOP: (&str, &str) = (
    "/api/v3/hf/margin/stop-order/cancel",
    "/api/v3/hf/margin/stop-orders",
);

const MARGIN_OCO: (&str, &str) = (
    "/api/v3/hf/margin/oco-order/cancel",
    "/api/v3/hf/margin/oco-orders",
);

const fn margin(names: &'static [(&'static str, &'static str)]) -> Kind {
    Kind {
        scope: Scope::SpotMargin,
        whole: None,
        by_symbol: Some((Method::Delete, "/api/v3/hf/margin/orders")),
        list: List::PerSymbol {
            symbols: "/api/v3/hf/margin/order/active/symbols",
            path: "/api/v3/hf/margin/orders/active",
        },
        names,
    }
}

/// Stop orders and one-cancels-other orders of spot and margin.
const fn stop(
    whole: &'static str,
    list: &'static str,
    names: &'static [(&'static str, &'static str)],
) -> Kind {
    Kind {
        scope: Scope::SpotMargin,
        whole: Some(whole),
        by_symbol: None,
        list: paged(list, "currentPage", &[]),
        names,
    }
}

const fn unified(names: &'static [(&'static str, &'static str)]) -> Kind {
    Kind {
        scope: Scope::Unified,
        whole: None,
        by_symbol: Some((Method::Post, "/api/ua/v2/unified/order/cancel-all")),
        list: paged("/api/ua/v2/unified/order/open-list", "pageNumber", &[]),
        names,
    }
}

const fn paged(
    path: &'static str,
    number: &'static str,
    names: &'static [(&'static str, &'static str)],
) -> List {
    List::Paged {
        path,
        number,
        names,
    }
}

/// Reads that tell a bot which of its orders are open: lists of open orders, their number, and lookups of one order, which show
/// whether an order or a cancel with an unknown outcome has reached the exchange. Not lists of closed orders or of trades.
const READS: [&str; 41] = [
    "futures.get.v1-open-order-statistics",
    "futures.get.v1-orders",
    "futures.get.v1-orders-by-client-oid",
    "futures.get.v1-orders-order-id",
    "futures.get.v1-stop-orders",
    "futures.get.v2-order-detail",
    "futures.get.v2-orders-active",
    "futures.get.v2-orders-all-active",
    "spot.get.ua-v1-classic-order-detail",
    "spot.get.ua-v1-classic-order-open-list",
    "spot.get.ua-v1-unified-order-detail",
    "spot.get.ua-v1-unified-order-open-list",
    "spot.get.ua-v2-unified-order-detail",
    "spot.get.ua-v2-unified-order-open-list",
    "spot.get.v1-hf-orders-active",
    "spot.get.v1-hf-orders-active-page",
    "spot.get.v1-hf-orders-active-symbols",
    "spot.get.v1-hf-orders-client-order-client-oid",
    "spot.get.v1-hf-orders-order-id",
    "spot.get.v1-limit-orders",
    "spot.get.v1-order-client-order-client-oid",
    "spot.get.v1-orders",
    "spot.get.v1-orders-order-id",
    "spot.get.v1-stop-order",
    "spot.get.v1-stop-order-order-id",
    "spot.get.v1-stop-order-query-order-by-client-oid",
    "spot.get.v3-hf-margin-oco-order-client-oid",
    "spot.get.v3-hf-margin-oco-order-detail-order-id",
    "spot.get.v3-hf-margin-oco-order-order-id",
    "spot.get.v3-hf-margin-oco-orders",
    "spot.get.v3-hf-margin-order-active-symbols",
    "spot.get.v3-hf-margin-orders-active",
    "spot.get.v3-hf-margin-orders-client-order-client-oid",
    "spot.get.v3-hf-margin-orders-order-id",
    "spot.get.v3-hf-margin-stop-order-client-oid",
    "spot.get.v3-hf-margin-stop-order-order-id",
    "spot.get.v3-hf-margin-stop-orders",
    "spot.get.v3-oco-client-order-client-oid",
    "spot.get.v3-oco-order-details-order-id",
    "spot.get.v3-oco-order-order-id",
    "spot.get.v3-oco-orders",
];

/// Whether a call of this endpoint reads which orders are open.
pub(crate) fn is_read_by(endpoint: &Endpoint) -> bool {
    READS.contains(&endpoint.id.as_str())
}

/// Orders that one request cancels: a symbol, and a margin mode if the orders have one.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Group {
    /// The symbol.
    pub(crate) symbol: String,
    /// The margin mode, on the unified account.
    pub(crate) margin_mode: Option<String>,
}

/// A list; null counts as empty. `None`: not a list.
pub(crate) fn list(list: &Value) -> Option<&[Value]> {
    match list {
        Value::Array(items) => Some(items),
        Value::Null => Some(&[]),
        _ => None,
    }
}

/// The list in this field; empty if `data` is null. `None`: not a list.
pub(crate) fn items<'v>(data: &'v Value, field: &str) -> Option<&'v [Value]> {
    if data.is_null() {
        return Some(&[]);
    }
    list(data.get(field)?)
}

/// A symbol or a margin mode: a name that is safe to send and to show. `None`: not such a name.
pub(crate) fn name(name: &Value) -> Option<&str> {
    let fits = |name: &&str| (1..=64).contains(&name.len()) && clean(name, 64) == *name;
    name.as_str().filter(fits)
}

/// Whether a listed order is closed.
pub(crate) fn is_over(item: &Value) -> bool {
    let status = item.get("status").and_then(Value::as_str);
    status.is_some_and(|status| OVER.contains(&status))
}

impl Group {
    /// The group of a listed order; `None` if it cannot be read.
    pub(crate) fn of(kind: &Kind, item: &Value) -> Option<Self> {
        let mode = item.get("marginMode").filter(|mode| {
            let is_none = mode.is_null() || mode.as_str() == Some("");
            kind.scope == Scope::Unified && !is_none
        });
        let mode = match mode {
            Some(mode) => Some(name(mode)?.to_owned()),
            None => None,
        };
        Some(Self {
            symbol: name(item.get("symbol").unwrap_or(&Value::Null))?.to_owned(),
            margin_mode: mode,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::kucoin::{Catalog, Risk};

    #[test]
    fn every_current_cancel_all_of_the_catalogue_is_used() {
        let endpoints: Vec<Value> = serde_json::from_str(include_str!("endpoints.json")).unwrap();
        let wanted: BTreeSet<_> = endpoints
            .iter()
            .filter(|one| one["effect"] == "cancel-all" && one["status"] == "current")
            .map(|one| {
                let text = |name: &str| one[name].as_str().unwrap().to_owned();
                (text("scope"), text("method"), text("path"))
            })
            .collect();
        assert!(wanted.len() >= 10);
        let used: BTreeSet<_> = KINDS
            .iter()
            .flat_map(|kind| {
                let whole = kind.whole.map(|path| (Method::Delete, path));
                let requests = [whole, kind.by_symbol].into_iter().flatten();
                requests.map(|(method, path)| {
                    let (scope, method) = (kind.scope.to_string(), method.to_string());
                    (scope, method, path.to_owned())
                })
            })
            .collect();
        assert_eq!(used, wanted);
    }

    #[test]
    fn reads_of_open_orders_are_reads_and_include_every_list_of_cancel_all() {
        let catalog = Catalog::get();
        for id in READS {
            let endpoint = catalog
                .by_id(id)
                .unwrap_or_else(|| panic!("no endpoint {id}"));
            assert_eq!((endpoint.method, endpoint.risk), (Method::Get, Risk::Read));
            let path = &endpoint.path;
            assert!(
                !path.contains("done") && !path.contains("history"),
                "{path}"
            );
        }
        for kind in &KINDS {
            let paths = match kind.list {
                List::Paged { path, .. } => vec![path],
                List::PerSymbol { symbols, path } => vec![symbols, path],
            };
            for path in paths {
                let endpoint = catalog.route(Some(kind.scope), Method::Get, path).unwrap();
                assert!(is_read_by(endpoint), "{path}");
            }
        }
        assert!(!is_read_by(catalog.by_id("spot.get.v1-accounts").unwrap()));
    }
}
