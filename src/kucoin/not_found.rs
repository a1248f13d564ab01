//! Answers to lookups that mean "no such order".
//!
//! No official source has them: the documentation only says that "the system will prompt that the order does not exist". So
//! each entry has its basis, and an answer that is missing here leaves the order unknown. A wrong entry can hide an open order.

use serde::Deserialize;

use super::code::{self, Class, RefusalCodes};
use super::{Answer, Endpoint, Host, Product};

/// Why an answer counts as "no such order".
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Basis {
    /// ccxt maps it to `OrderNotFound`.
    Ccxt,
    /// Somebody has reported it in a public issue.
    IssueThread,
}

/// A built-in entry.
struct Row {
    host: Host,
    product: Product,
    code: &'static str,
    /// Exactly one of these; empty: any message.
    messages: &'static [&'static str],
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "for readers and the test of the table")
    )]
    basis: (Basis, &'static str),
}

/// 400100 and 100001 also mean "invalid parameter", so only their messages count.
static ROWS: &[Row] = &[
    Row {
        host: Host::Futures,
        product: Product::Futures,
        code: "100001",
        messages: &["error.getOrder.orderNotExist"],
        basis: (
            Basis::IssueThread,
            "ccxt/ccxt issue 26776 (2025); gocryptotrader's live test of GET /api/v1/orders/byClientOid expects it",
        ),
    },
    Row {
        host: Host::Spot,
        product: Product::Margin,
        code: "126043",
        messages: &[],
        basis: (Basis::Ccxt, "kucoin, exceptions, exact: 126043"),
    },
    Row {
        host: Host::Spot,
        product: Product::Spot,
        code: "400100",
        messages: &[
            "The order does not exist.",
            "order not exist",
            "order not exist.",
        ],
        basis: (
            Basis::Ccxt,
            "kucoin, exceptions, exact; freqtrade/freqtrade issue 5624 (2021); gocryptotrader's live test expects 400100",
        ),
    },
    Row {
        host: Host::Spot,
        product: Product::Spot,
        code: "order_not_exist",
        messages: &[],
        basis: (Basis::Ccxt, "kucoin, exceptions, exact: order_not_exist"),
    },
];

/// Codes that also mean other problems of a request, so that an entry must have the message.
const AMBIGUOUS: [&str; 3] = ["100001", "400100", "400101"];

/// An entry from the configuration, as somebody has observed it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(try_from = "Entry")]
pub(crate) struct NotFoundAnswer(Entry);

#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields)]
struct Entry {
    host: Host,
    product: Product,
    http_status: u16,
    code: String,
    #[serde(default)]
    msg: Option<String>,
    /// Whether `data` is missing, null, or an empty list or object.
    #[serde(default)]
    empty_data: bool,
}

/// Why an entry cannot mean "no such order".
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum NotFoundError {
    /// The code also means an invalid parameter.
    #[error("code {0} also means other problems: add the message of the answer as msg")]
    Ambiguous(String),
    /// The code is about the key, the signature, the address, the time or a limit.
    #[error(
        "code {0} cannot mean that there is no such order: the gateway rejected the lookup itself"
    )]
    Gateway(String),
    /// The code leaves open what happened.
    #[error(
        "code {0} cannot mean that there is no such order: KuCoin uses it for internal errors and timeouts"
    )]
    Unclear(String),
    /// The status leaves open what happened.
    #[error("HTTP status {0} cannot mean that there is no such order: expected 200, 400 or 404")]
    Status(u16),
    /// A success with data has an order.
    #[error("an answer with code {0} has an order unless its data is empty: add empty_data = true")]
    Success(String),
}

impl TryFrom<Entry> for NotFoundAnswer {
    type Error = NotFoundError;

    fn try_from(entry: Entry) -> Result<Self, NotFoundError> {
        let (code, product) = (&entry.code, Some(entry.product));
        let class = code::class(entry.host, product, code, &[], &RefusalCodes::default());
        match class {
            _ if !matches!(entry.http_status, 200 | 400 | 404) => {
                Err(NotFoundError::Status(entry.http_status))
            }
            Class::Unclear | Class::Missing => Err(NotFoundError::Unclear(code.clone())),
            _ if code::is_of_gateway(code) => Err(NotFoundError::Gateway(code.clone())),
            Class::Success if !entry.empty_data => Err(NotFoundError::Success(code.clone())),
            _ if AMBIGUOUS.contains(&code.as_str()) && entry.msg.is_none() => {
                Err(NotFoundError::Ambiguous(code.clone()))
            }
            _ => Ok(Self(entry)),
        }
    }
}

/// The answers that mean "no such order": the built-in ones, and those of the configuration.
#[derive(Clone, Debug, Default)]
pub(crate) struct NotFoundAnswers(Vec<NotFoundAnswer>);

impl FromIterator<NotFoundAnswer> for NotFoundAnswers {
    /// Adds entries to the built-in ones.
    fn from_iter<I: IntoIterator<Item = NotFoundAnswer>>(entries: I) -> Self {
        Self(entries.into_iter().collect())
    }
}

impl NotFoundAnswers {
    /// The entry for `exchange.not_found` that would make `answer` to a lookup at `endpoint` mean "no such order", as TOML.
    ///
    /// # Errors
    /// When such an answer cannot mean that.
    pub(super) fn entry_for(
        endpoint: &Endpoint,
        answer: &Answer,
        is_empty: bool,
    ) -> Result<String, NotFoundError> {
        let is_ambiguous = AMBIGUOUS.contains(&answer.code.as_str());
        let entry = Entry {
            host: endpoint.scope.map_or(Host::Spot, super::Scope::host),
            product: endpoint.product,
            http_status: answer.http_status.as_u16(),
            code: answer.code.clone(),
            msg: is_ambiguous.then(|| answer.msg.clone()),
            empty_data: is_empty,
        };
        let NotFoundAnswer(entry) = entry.try_into()?;
        // A JSON string is also one of TOML.
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let msg = entry.msg.map(|msg| format!(", msg = {}", quoted(&msg)));
        Ok(format!(
            "{{ host = \"{}\", product = \"{}\", http_status = {}, code = {}{}, empty_data = {} }}",
            entry.host.as_str(),
            entry.product.as_str(),
            entry.http_status,
            quoted(&entry.code),
            msg.unwrap_or_default(),
            entry.empty_data
        ))
    }

    /// Whether `answer` to a lookup at `endpoint` means "no such order".
    pub(super) fn has(&self, endpoint: &Endpoint, answer: &Answer, is_empty: bool) -> bool {
        let Some(host) = endpoint.scope.map(super::Scope::host) else {
            return false;
        };
        let status = answer.http_status;
        let is_of = |of: Host, product, code: &str| {
            (of, product, code) == (host, endpoint.product, &answer.code)
        };
        let is_built_in = ROWS.iter().any(|row| {
            let has_message =
                row.messages.is_empty() || row.messages.contains(&answer.msg.as_str());
            // No source has the HTTP status.
            let is_final = matches!(status.as_u16(), 200 | 400 | 404);
            is_of(row.host, row.product, row.code) && has_message && is_final && is_empty
        });
        let is_configured = || {
            self.0.iter().any(|NotFoundAnswer(entry)| {
                is_of(entry.host, entry.product, &entry.code)
                    && entry.http_status == status.as_u16()
                    && entry.msg.as_ref().is_none_or(|msg| *msg == answer.msg)
                    && (is_empty || !entry.empty_data)
            })
        };
        answer.content_encoding.is_empty() && (is_built_in || is_configured())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Catalog;
    use super::*;

    #[test]
    fn every_built_in_entry_has_a_basis_and_belongs_to_a_lookup() {
        for row in ROWS {
            assert!(!row.basis.1.is_empty());
            assert!(
                !AMBIGUOUS.contains(&row.code) || !row.messages.is_empty(),
                "{}",
                row.code
            );
            let endpoints = Catalog::get().endpoints().iter();
            let lookups = endpoints.filter_map(|one| one.order.as_ref()?.lookup.as_ref());
            let mut lookups = lookups.filter_map(|form| Catalog::get().by_id(&form.endpoint));
            let is_of = |endpoint: &Endpoint| {
                (
                    endpoint.scope.map(super::super::Scope::host),
                    endpoint.product,
                ) == (Some(row.host), row.product)
            };
            assert!(lookups.any(is_of), "{}", row.code);
        }
    }

    #[test]
    fn entry_that_could_hide_an_order_is_refused() {
        let parse = |rest: &str| {
            let text = format!(r#"{{"host":"spot","product":"spot",{rest}}}"#);
            let parsed = serde_json::from_str::<NotFoundAnswer>(&text);
            parsed.map(drop).map_err(|error| error.to_string())
        };
        for (rest, problem) in [
            (
                r#""http_status":200,"code":"400100""#,
                "add the message of the answer as msg",
            ),
            (
                r#""http_status":200,"code":"200000""#,
                "add empty_data = true",
            ),
            (
                r#""http_status":200,"code":"500000""#,
                "internal errors and timeouts",
            ),
            (
                r#""http_status":400,"code":"400002""#,
                "the gateway rejected the lookup itself",
            ),
            (
                r#""http_status":200,"code":"411100""#,
                "the gateway rejected the lookup itself",
            ),
            (
                r#""http_status":200,"code":"""#,
                "internal errors and timeouts",
            ),
            (
                r#""http_status":503,"code":"1""#,
                "HTTP status 503 cannot mean",
            ),
            (
                r#""http_status":429,"code":"1""#,
                "HTTP status 429 cannot mean",
            ),
            (
                r#""http_status":200,"code":"1","status":1"#,
                "unknown field `status`",
            ),
            (r#""code":"1""#, "missing field `http_status`"),
        ] {
            let error = parse(rest).unwrap_err();
            assert!(error.contains(problem), "{rest}: {error}");
        }
        for rest in [
            r#""http_status":200,"code":"400100","msg":"order not exist""#,
            r#""http_status":200,"code":"200000","empty_data":true"#,
            r#""http_status":400,"code":"order_gone""#,
        ] {
            assert_eq!(parse(rest), Ok(()), "{rest}");
        }
    }
}
