//! The documented fields of KuCoin's answers, and how an answer differs from them. Pure.
//!
//! A difference contains only names and types, never values, so that it can be shared.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::Method;

/// Most characters shown of a name from the exchange.
const MAX_NAME_CHARS: usize = 40;

/// The type of `data` in an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Schema {
    /// A list of objects with these fields; optional ones begin with `?`.
    List(&'static [&'static str]),
    /// A number.
    Number,
    /// An object with these fields; optional ones begin with `?`.
    Object(&'static [&'static str]),
    /// A string.
    Text,
}

/// How an answer differs from the documentation.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Difference {
    /// The type of `data`.
    pub(crate) kind: &'static str,
    /// Documented fields that are missing.
    pub(crate) missing: Vec<&'static str>,
    /// Undocumented fields, with their types.
    pub(crate) new: Vec<String>,
}

/// The documented `data` of an answer, for the requests of `doctor`.
///
/// Source: KuCoin API documentation, "Get Server Time", "Get Client IP Address", "Get Apikey Info" with its change log of
/// 2025-11-14 and 2026-01-27, "Get Account List - Spot", "Get Account - Futures", "Add Order Test" of spot and futures; for
/// the overview of the unified account, the models of client libraries, since its page was unavailable.
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
    /// Name of the type.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::List(_) => "list",
            Self::Number => "number",
            Self::Object(_) => "object",
            Self::Text => "text",
        }
    }

    /// Compares with the body of an answer.
    pub(crate) fn compare(self, body: &[u8]) -> Difference {
        let envelope: Map<String, Value> = serde_json::from_slice(body).unwrap_or_default();
        let data = envelope.get("data");
        let kind = data.map_or("nothing", kind_of);
        let (fields, items): (_, Vec<_>) = match (self, data) {
            (Self::Object(fields), Some(Value::Object(item))) => (fields, vec![item]),
            (Self::List(fields), Some(Value::Array(items))) => {
                (fields, items.iter().filter_map(Value::as_object).collect())
            }
            // Another type has no fields to compare.
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
    fn difference_has_names_and_types_but_no_values() {
        let order = schema(Method::Post, "/api/v1/hf/orders/test").unwrap();
        let documented = br#"{"code":"200000","data":{"orderId":"1","clientOid":"2"}}"#;
        let kind = "object";
        let same = Difference {
            kind,
            ..Difference::default()
        };
        assert_eq!(order.compare(documented), same);
        let other = br#"{"code":"200000","data":{"orderId":"1","balance":"1000","list":[1]}}"#;
        let expected = Difference {
            kind,
            missing: vec!["clientOid"],
            new: vec!["balance (text)".to_owned(), "list (list)".to_owned()],
        };
        assert_eq!(order.compare(other), expected);
    }

    #[test]
    fn optional_fields_are_neither_missing_nor_new() {
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
    fn every_item_of_a_list_is_compared_and_another_type_is_named() {
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
