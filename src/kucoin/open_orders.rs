//! How the exchange lists open orders and cancels them, kind by kind: the table that cancel-all uses. Pure.

use serde_json::Value;

use super::{Method, Scope};
use crate::base::text::clean;

/// Orders on a page: every list takes so many. Source: KuCoin API documentation, `pageSize` of these lists.
pub(crate) const PAGE: usize = 100;

/// Pages of a list that are read: 5000 orders. Lists of one-cancels-other orders hold those that are over, too.
pub(crate) const PAGES: usize = 50;

/// `status` of a one-cancels-other order that is over. What a triggered one has placed is an order like any other.
const OVER: [&str; 3] = ["CANCELLED", "DONE", "TRIGGERED"];

/// One kind of order, which no other kind's requests cancel.
#[derive(Debug)]
pub(crate) struct Kind {
    /// Where such orders are.
    pub(crate) scope: Scope,
    /// Cancels all of them (DELETE).
    pub(crate) whole: Option<&'static str>,
    /// Cancels those of one symbol; on the unified account of one margin mode, too.
    pub(crate) by_symbol: Option<(Method, &'static str)>,
    /// How they are listed.
    pub(crate) list: List,
    /// What each of these requests names.
    pub(crate) names: &'static [(&'static str, &'static str)],
}

/// How the open orders of a kind are listed.
#[derive(Debug)]
pub(crate) enum List {
    /// Page by page.
    Paged {
        /// Of the list.
        path: &'static str,
        /// The parameter that says which page.
        number: &'static str,
        /// What only the list names.
        names: &'static [(&'static str, &'static str)],
    },
    /// The symbols that have any, then those of each symbol.
    PerSymbol {
        /// Of the list of symbols.
        symbols: &'static str,
        /// Of the list of a symbol's orders.
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
        // It answers with symbols that have failed; these are cancelled one by one.
        by_symbol: Some((Method::Delete, "/api/v1/hf/orders")),
        list: List::PerSymbol {
            symbols: "/api/v1/hf/orders/active/symbols",
            path: "/api/v1/hf/orders/active",
        },
        names: &[],
    },
    margin(CROSS),
    margin(ISOLATED),
    // The one place where spot's interface still takes margin's orders.
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

/// Orders that one request cancels, where it must name them: a symbol, and a margin mode where orders have one.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Group {
    /// The symbol.
    pub(crate) symbol: String,
    /// The margin mode, on the unified account.
    pub(crate) margin_mode: Option<String>,
}

/// A list; an empty one may come as null. `None`: it is none.
pub(crate) fn list(list: &Value) -> Option<&[Value]> {
    match list {
        Value::Array(items) => Some(items),
        Value::Null => Some(&[]),
        _ => None,
    }
}

/// The list in this field; where there is nothing at all it may be missing. `None`: it is none.
pub(crate) fn items<'v>(data: &'v Value, field: &str) -> Option<&'v [Value]> {
    if data.is_null() {
        return Some(&[]);
    }
    list(data.get(field)?)
}

/// A symbol or a mode: a name that can be asked for, and shown. `None`: it is none.
pub(crate) fn name(name: &Value) -> Option<&str> {
    let fits = |name: &&str| (1..=64).contains(&name.len()) && clean(name, 64) == *name;
    name.as_str().filter(fits)
}

/// Whether a listed order is over.
pub(crate) fn is_over(item: &Value) -> bool {
    let status = item.get("status").and_then(Value::as_str);
    status.is_some_and(|status| OVER.contains(&status))
}

impl Group {
    /// Where a listed order belongs; `None`: it cannot be read.
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
}
