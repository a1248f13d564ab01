//! What KuCoin's documentation says that an answer looks like, and how one differs from it. Pure.
//!
//! It tells of names and kinds and never of values, so that what it says can be shown to anybody.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::Method;

/// Characters of a name that comes from the exchange.
const MAX_NAME_CHARS: usize = 40;

/// What `data` of an answer is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Schema {
    /// Objects of these fields; those that need not be there begin with `?`.
    List(&'static [&'static str]),
    /// A number.
    Number,
    /// One object of these fields.
    Object(&'static [&'static str]),
    /// Text.
    Text,
}

/// How an answer differs from what is documented.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Difference {
    /// What `data` is.
    pub(crate) kind: &'static str,
    /// Fields that are documented and are not there.
    pub(crate) missing: Vec<&'static str>,
    /// Fields that are there and are not documented, with what they are.
    pub(crate) new: Vec<String>,
}

/// What `data` of an answer is documented to be, for what a doctor asks.
///
/// Source: KuCoin API documentation, "Get Server Time", "Get Client IP Address", "Get Apikey Info" with its change log of
/// 2025-11-14 and 2026-01-27, "Get Account List - Spot", "Get Account - Futures", "Add Order Test" of spot and futures; for
/// the overview of the unified account the models of client libraries, since its page was not to be had.
pub(crate) fn schema(method: Method, path: &str) -> Option<Schema> {
    const ORDER: Schema = Schema::Object(&["orderId", "clientOid"]);
    Some(match (method, path) {
        (Method::Get, "/api/v1/timestamp") => Schema::Number,
        (Method::Get, "/api/v1/my-ip") => Schema::Text,
        (Method::Get, "/api/v1/user/api-key" | "/api/ua/v2/user/api-key") => Schema::Object(&[
            "remark",
            "apiKey",
            "apiVersion",
            "permission",
            "?ipWhitelist",
            "createdAt",
            "uid",
            "isMaster",
            "?subName",
            "?parentUid",
            "region",
            "kycStatus",
            "?expiredAt",
            "?thirdPartyApp",
            "siteType",
        ]),
        (Method::Get, "/api/v1/accounts") => {
            Schema::List(&["id", "currency", "type", "balance", "available", "holds"])
        }
        (Method::Get, "/api/v1/account-overview") => Schema::Object(&[
            "accountEquity",
            "unrealisedPNL",
            "marginBalance",
            "positionMargin",
            "orderMargin",
            "frozenFunds",
            "availableBalance",
            "currency",
            "riskRatio",
            "maxWithdrawAmount",
            "availableMargin",
        ]),
        (Method::Get, "/api/ua/v2/unified/account/overview") => Schema::Object(&[
            "accountType",
            "riskRatio",
            "equity",
            "liability",
            "availableMargin",
            "adjustedEquity",
            "im",
            "mm",
        ]),
        (Method::Post, "/api/v1/hf/orders/test" | "/api/v1/orders/test") => ORDER,
        _ => return None,
    })
}

impl Schema {
    /// In a word.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::List(_) => "list",
            Self::Number => "number",
            Self::Object(_) => "object",
            Self::Text => "text",
        }
    }

    /// Compares with the whole body of an answer.
    pub(crate) fn compare(self, body: &[u8]) -> Difference {
        let envelope: Map<String, Value> = serde_json::from_slice(body).unwrap_or_default();
        let data = envelope.get("data");
        let kind = data.map_or("nothing", kind_of);
        let (fields, items): (_, Vec<_>) = match (self, data) {
            (Self::Object(fields), Some(Value::Object(item))) => (fields, vec![item]),
            (Self::List(fields), Some(Value::Array(items))) => {
                (fields, items.iter().filter_map(Value::as_object).collect())
            }
            // What is of another kind altogether has no fields to compare.
            _ => (&[][..], Vec::new()),
        };
        let is_missing =
            |name: &&&str| !name.starts_with('?') && items.iter().any(|i| !i.contains_key(**name));
        let missing = fields.iter().filter(is_missing).copied().collect();
        let is_known = |name: &str| {
            fields
                .iter()
                .any(|field| field.trim_start_matches('?') == name)
        };
        let all = items.iter().flat_map(|item| item.iter());
        let new: BTreeMap<_, _> = all.filter(|(name, _)| !is_known(name)).collect();
        let shown = |name: &str| name.chars().take(MAX_NAME_CHARS).collect::<String>();
        Difference {
            kind,
            missing,
            new: new
                .iter()
                .map(|(name, value)| format!("{} ({})", shown(name), kind_of(value)))
                .collect(),
        }
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Array(_) => "list",
        Value::Bool(_) => "boolean",
        Value::Null => "null",
        Value::Number(_) => "number",
        Value::Object(_) => "object",
        Value::String(_) => "text",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_kinds_differ_and_values_do_not_show() {
        let order = schema(Method::Post, "/api/v1/hf/orders/test").unwrap();
        let whole = br#"{"code":"200000","data":{"orderId":"1","clientOid":"2"}}"#;
        let kind = "object";
        let same = Difference {
            kind,
            ..Difference::default()
        };
        assert_eq!(order.compare(whole), same);
        let other = br#"{"code":"200000","data":{"orderId":"1","balance":"1000","list":[1]}}"#;
        let expected = Difference {
            kind,
            missing: vec!["clientOid"],
            new: vec!["balance (text)".to_owned(), "list (list)".to_owned()],
        };
        assert_eq!(order.compare(other), expected);
    }

    #[test]
    fn what_need_not_be_there_is_not_missed_and_is_not_new() {
        let info = schema(Method::Get, "/api/v1/user/api-key").unwrap();
        let text = r#"{"data":{"remark":"","apiKey":"","apiVersion":3,"permission":"General","createdAt":1,"uid":1,
            "isMaster":true,"region":"XX","kycStatus":1,"siteType":"global"}}"#;
        assert_eq!(
            info.compare(text.as_bytes()).missing,
            Vec::<&str>::default()
        );
        let more = text.replace("\"uid\"", "\"subName\":\"a\",\"uid\"");
        assert!(info.compare(more.as_bytes()).new.is_empty());
    }

    #[test]
    fn every_item_of_a_list_counts_and_another_kind_is_named() {
        let list = Schema::List(&["id", "type"]);
        let body = br#"{"data":[{"id":1,"type":2},{"id":1,"extra":null}]}"#;
        let found = list.compare(body);
        assert_eq!(
            (found.missing, found.new),
            (vec!["type"], vec!["extra (null)".to_owned()])
        );
        assert_eq!(list.compare(b"{\"data\":{}}").kind, "object");
        assert_eq!(list.compare(b"<html>").kind, "nothing");
        assert_eq!(Schema::Number.compare(b"{\"data\":1}").kind, "number");
    }
}
