//! KuCoin's codes, and whether a request that got one was executed.
//!
//! The same number means different things on different hosts and for different products, so a code counts as a refusal code
//! only if a table of KuCoin's documentation (or a client library that has seen it) lists it. A code that is missing here leaves
//! the outcome of an order open, which costs a lookup; a code that is wrongly listed here can hide an open order.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use super::{Host, Product};

/// Success. Some endpoints have further success codes: `successCodes` in the catalogue.
pub(crate) const SUCCESS: &str = "200000";

/// The exchange rejected the timestamp; nothing was executed.
pub(crate) const TIMESTAMP_REFUSED: &str = "400002";

/// The exchange rejected the address that the request came from; nothing was executed.
pub(crate) const ADDRESS_REFUSED: &str = "400006";

/// The exchange rejected the key, its passphrase or its signature; nothing was executed.
pub(crate) const CREDENTIALS_REFUSED: [&str; 3] = ["400003", "400004", "400005"];

/// The exchange rejected the key, its address, its permissions or its version; nothing was executed. Another key may be
/// accepted.
pub(crate) const KEY_REFUSED: [&str; 7] = [
    "400003", "400004", "400005", "400006", "400007", "400008", "400009",
];

/// Rejections that another key version, or another secret, may fix.
pub(crate) const VERSION_OR_SECRET: [&str; 4] = ["400004", "400005", "400008", "400009"];

/// Rejections of the account, not of one request or of the key: no access, region, identity, frozen, blacklisted.
pub(crate) const ACCOUNT_REFUSED: [&str; 7] = [
    "400010", "400301", "400302", "400303", "400304", "411100", "411200",
];

/// The account has used up a quota, or KuCoin is overloaded.
pub(crate) const RATE_LIMITED: &str = "429000";

/// The edge has blocked the broker's egress address. Source: KuCoin API documentation, "Rate Limit", code 1015.
pub(crate) const EDGE_BLOCKED: &str = "1015";

/// Futures: too many requests. On spot the same code means that cancellations are suspended.
pub(crate) const FUTURES_RATE_LIMITED: &str = "200002";

/// Rejections that end by themselves after a moment.
pub(crate) const BUSY: [&str; 3] = [RATE_LIMITED, "429001", "429002"];

/// What a code means for the request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Class {
    /// There is no readable code.
    Missing,
    /// The exchange rejected the request; nothing was executed.
    Refusal,
    /// The exchange executed or accepted the request.
    Success,
    /// Something inside the exchange failed; the request may have been executed.
    Unclear,
    /// The code is in no table for this host and product.
    Unknown,
}

/// The class of `code` in an answer of `host` to a request for `product` (`None`: an endpoint outside the catalogue).
/// `success` are the endpoint's further success codes, `configured` the refusal codes from the configuration.
pub(crate) fn class(
    host: Host,
    product: Option<Product>,
    code: &str,
    success: &[String],
    configured: &RefusalCodes,
) -> Class {
    let is_in = |table: &[Row]| table.iter().any(|row| row.has(host, product, code));
    if code.is_empty() {
        Class::Missing
    } else if code == SUCCESS || success.iter().any(|other| other == code) {
        Class::Success
    } else if is_in(UNCLEAR) {
        Class::Unclear
    } else if is_in(REFUSALS) || configured.has(host, product, code) {
        Class::Refusal
    } else {
        Class::Unknown
    }
}

/// Whether an answer means that an earlier order, or transfer, has the same clientOid. In the result of a batch, `code` can
/// be empty.
///
/// Source: KuCoin API documentation, docs-new/error-code: futures, margin, convert and unified account. None of them has a
/// code for spot; its message is from JKorf/Kucoin.Net issue 120 (2022), with code 400100.
pub(crate) fn is_duplicate_client_oid(product: Product, code: &str, msg: &str) -> bool {
    match product {
        Product::Convert => code == "102426",
        Product::CopyTrading | Product::Futures => code == "300018",
        Product::Margin => matches!(code, "126033" | "126044"),
        Product::Spot => msg.contains("clientOidDuplicated"),
        Product::Unified => matches!(code, "106151" | "106152" | "106209"),
        Product::Account
        | Product::Affiliate
        | Product::Broker
        | Product::Earn
        | Product::Market
        | Product::VipLending => false,
    }
}

/// Codes that share hosts, products and a source.
struct Row {
    hosts: &'static [Host],
    /// `None`: every product, and endpoints outside the catalogue.
    products: Option<&'static [Product]>,
    codes: &'static [&'static str],
    /// The source for the meaning of these codes.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "for readers and the test of the table")
    )]
    source: &'static str,
}

impl Row {
    fn has(&self, host: Host, product: Option<Product>, code: &str) -> bool {
        self.codes.contains(&code)
            && self.hosts.contains(&host)
            && self
                .products
                .is_none_or(|products| product.is_some_and(|product| products.contains(&product)))
    }
}

const BOTH: &[Host] = &[Host::Futures, Host::Spot];
const FUTURES: &[Host] = &[Host::Futures];
const SPOT: &[Host] = &[Host::Spot];

/// Every product on the spot host except the unified account, which has its own codes.
const CLASSIC: Option<&[Product]> = Some(&[
    Product::Account,
    Product::Affiliate,
    Product::Broker,
    Product::Convert,
    Product::Earn,
    Product::Margin,
    Product::Market,
    Product::Spot,
    Product::VipLending,
]);
const CONVERT: Option<&[Product]> = Some(&[Product::Convert]);
const EARN: Option<&[Product]> = Some(&[Product::Earn]);
const MARGIN: Option<&[Product]> = Some(&[Product::Margin]);
/// The gateway returns 400400 for a bad token; margin also uses the number for errors of its service.
const NOT_MARGIN: Option<&[Product]> = Some(&[
    Product::Account,
    Product::Affiliate,
    Product::Broker,
    Product::Convert,
    Product::CopyTrading,
    Product::Earn,
    Product::Futures,
    Product::Market,
    Product::Spot,
    Product::Unified,
    Product::VipLending,
]);
const UNIFIED: Option<&[Product]> = Some(&[Product::Unified]);
const WITHDRAWALS: Option<&[Product]> =
    Some(&[Product::Account, Product::Broker, Product::Unified]);

/// Whether the gateway, or the edge before it, rejects requests with this code: because of the key, the signature, the address,
/// the time or a limit. Such an answer shows nothing about an order.
pub(super) fn is_of_gateway(code: &str) -> bool {
    const PARAMETERS: [&str; 2] = ["400100", "400101"];
    let is_gateway = code.len() == 6
        && [
            "4000", "4001", "4002", "4003", "4004", "4111", "4112", "4150", "4010", "4290",
        ]
        .iter()
        .any(|start| code.starts_with(start));
    code == EDGE_BLOCKED || (is_gateway && !PARAMETERS.contains(&code))
}

/// The exchange rejected the request and executed nothing.
///
/// Left out because their texts do not show that nothing was executed: 126034 and 126036 (failed to create an order), 130202
/// (among others "a timeout has occurred"), 130310 (abnormal account), 300010 (failed to close), 400800 (leverage order
/// failed), 180001 to 180208 (copy trading; text unavailable).
static REFUSALS: &[Row] = &[
    Row {
        hosts: BOTH,
        products: None,
        codes: &[
            "400001", "400002", "400003", "400004", "400005", "400006", "400007", "400008",
            "400009", "400010", "400011", "400012", "400200", "400201", "400202", "400301",
            "400302", "400303", "400304", "400401", "411200", "429000", "429001", "429002",
        ],
        source: "KuCoin API documentation, docs-new/error-code, \"Gateway Error Code\"",
    },
    Row {
        hosts: BOTH,
        products: None,
        codes: &["400100", "404000", "411100", "415000"],
        source: "KuCoin API documentation, error codes of spot and of futures",
    },
    Row {
        hosts: BOTH,
        products: NOT_MARGIN,
        codes: &["400400"],
        source: "KuCoin API documentation, docs-new/error-code, \"Gateway Error Code\"",
    },
    Row {
        hosts: BOTH,
        products: None,
        codes: &["400101", "400102", "404", "405"],
        source: "KuCoin API documentation, docs-new/error-code, HTTP and gateway tables",
    },
    Row {
        hosts: BOTH,
        products: None,
        codes: &[EDGE_BLOCKED],
        source: "KuCoin API documentation, \"Rate Limit\" (Cloudflare)",
    },
    Row {
        hosts: BOTH,
        products: None,
        codes: &["401000", "order_not_exist"],
        source: "seen by ccxt 4.5.90, kucoin.py: \"The interface has been deprecated\", \"order_not_exist\"",
    },
    Row {
        hosts: BOTH,
        products: None,
        codes: &["400413"],
        source: "KuCoin API change log, 2026-08-03: hidden and iceberg parameters",
    },
    Row {
        hosts: SPOT,
        products: CLASSIC,
        codes: &[
            "200001", "200002", "200003", "200004", "200009", "260210", "400500", "400600",
            "400700", "600203", "900001",
        ],
        source: "KuCoin API documentation, \"Spot Error Code\"",
    },
    Row {
        hosts: SPOT,
        products: CLASSIC,
        codes: &["400444", "40010"],
        source: "KuCoin API documentation, docs-new/error-code, region and risk",
    },
    Row {
        hosts: SPOT,
        products: CLASSIC,
        codes: &[
            "101030", "103000", "210014", "210021", "230003", "260000", "260100", "260220",
            "400330", "400350", "400370", "400760", "600100", "600101", "900014",
        ],
        source: "seen by ccxt 4.5.90, kucoin.py, each with its message: funds, limits, prices, addresses",
    },
    Row {
        hosts: SPOT,
        products: WITHDRAWALS,
        codes: &["110003", "115007"],
        source: "KuCoin API documentation, docs-new/error-code, withdrawals: 24 h cap, balance of the funding account",
    },
    Row {
        hosts: SPOT,
        products: CONVERT,
        codes: &["102421", "102426", "102441"],
        source: "KuCoin API documentation, \"Convert\": balance, repeated id, agreement missing",
    },
    Row {
        hosts: SPOT,
        products: EARN,
        codes: &["151009"],
        source: "KuCoin API documentation, docs-new/error-code, \"Earn\": balance",
    },
    Row {
        hosts: SPOT,
        products: MARGIN,
        codes: &[
            "126001", "126002", "126003", "126004", "126005", "126006", "126007", "126008",
            "126009", "126010", "126011", "126013", "126015", "126021", "126022", "126027",
            "126028", "126029", "126030", "126033", "126037", "126041", "126042", "126043",
            "126044", "126045", "126046", "126047", "126048",
        ],
        source: "KuCoin API documentation, docs-new/error-code, \"Margin\" (orders)",
    },
    Row {
        hosts: SPOT,
        products: MARGIN,
        codes: &[
            "130301", "130302", "130303", "130304", "130305", "130306", "130307", "130308",
            "130309", "130311", "130312", "130313", "130314", "130315", "130323",
        ],
        source: "KuCoin API documentation, docs-new/error-code, \"Margin\" (positions and limits)",
    },
    Row {
        hosts: SPOT,
        products: MARGIN,
        codes: &[
            "130101", "130102", "130103", "130104", "130105", "130106", "130107", "130108",
            "130201", "130203", "130204",
        ],
        source: "KuCoin API documentation (2023), \"Margin Trading (V3)\" and \"Lending Market (V3)\", error codes",
    },
    Row {
        hosts: FUTURES,
        products: None,
        codes: &[
            "40010",
            "100001",
            "100003",
            "100004",
            "100005",
            FUTURES_RATE_LIMITED,
            "200003",
            "200005",
            "300000",
            "300001",
            "300002",
            "300003",
            "300004",
            "300005",
            "300006",
            "300007",
            "300008",
            "300009",
            "300011",
            "300012",
            "300013",
            "300014",
            "300015",
            "300016",
            "300017",
            "300018",
        ],
        source: "KuCoin API documentation, \"Futures Error Code\"",
    },
    Row {
        hosts: FUTURES,
        products: None,
        codes: &["300019"],
        source: "KuCoin futures API documentation (2022), POST /api/v2/order: clientTimestamp outside its window",
    },
    Row {
        hosts: FUTURES,
        products: None,
        codes: &["330005", "330008", "330011", "330012"],
        source: "KuCoin API documentation, \"Futures Error Code\": margin mode, position mode, open limit; seen by ccxt",
    },
    Row {
        hosts: SPOT,
        products: UNIFIED,
        codes: &[
            "106052", "106053", "106054", "106100", "106102", "106150", "106151", "106152",
            "106190", "106194", "106206", "106209", "106212", "301100", "301101", "301102",
            "301103", "301130", "301133",
        ],
        source: "KuCoin API documentation, docs-new/error-code, \"UTA\" (orders, funds, restrictions)",
    },
    Row {
        hosts: SPOT,
        products: UNIFIED,
        codes: &["112010"],
        source: "seen by ccxt 4.5.90, kucoin.py: \"Invalid Unified Account user.\"",
    },
];

/// The exchange had an internal error: whatever the HTTP status, the request may have been executed.
static UNCLEAR: &[Row] = &[
    Row {
        hosts: BOTH,
        products: None,
        codes: &[
            "230005", "408000", "500000", "501000", "503000", "504000", "505000",
        ],
        source: "KuCoin API documentation, docs-new/error-code: internal error, busy, gateway timeout, unknown, network timeout",
    },
    Row {
        hosts: BOTH,
        products: None,
        codes: &["420001", "420002", "500", "503"],
        source: "KuCoin API documentation, docs-new/error-code, HTTP table and ended WebSocket connections",
    },
    Row {
        hosts: FUTURES,
        products: None,
        codes: &["100000", "100002"],
        source: "KuCoin futures API documentation (2022), POST /api/v2/order: \"error.timeOut\"; error codes: \"systemConfigError\"",
    },
    Row {
        hosts: SPOT,
        products: MARGIN,
        codes: &["126000", "126038", "126039", "135005", "135018", "400400"],
        source: "KuCoin API documentation, docs-new/error-code, \"Margin\": abnormal, third-party service failed, service error",
    },
    Row {
        hosts: SPOT,
        products: MARGIN,
        codes: &["130202"],
        source: "KuCoin API documentation (2023), \"Margin Trading (V3)\": among others \"A timeout has occurred\"",
    },
    Row {
        hosts: SPOT,
        products: UNIFIED,
        codes: &[
            "106204", "109099", "110000", "110001", "112001", "112002", "112003",
        ],
        source: "KuCoin API documentation, docs-new/error-code, \"UTA\": system error, busy, timeout",
    },
];

/// Refusal codes from the configuration (`exchange.refusal_codes`), until a release includes them.
#[derive(Clone, Debug, Default)]
pub(crate) struct RefusalCodes(BTreeSet<RefusalCode>);

impl RefusalCodes {
    fn has(&self, host: Host, product: Option<Product>, code: &str) -> bool {
        self.0.iter().any(|refusal| {
            refusal.code == code
                && refusal.host == host
                && (refusal.product.is_none() || refusal.product == product)
        })
    }
}

impl FromIterator<RefusalCode> for RefusalCodes {
    fn from_iter<I: IntoIterator<Item = RefusalCode>>(codes: I) -> Self {
        Self(codes.into_iter().collect())
    }
}

/// One code that means a rejection, as the configuration writes it: `futures/futures/300099`, or `spot/*/400999` for every
/// product of the host.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct RefusalCode {
    host: Host,
    /// `None`: every product, and endpoints outside the catalogue.
    product: Option<Product>,
    code: String,
}

/// Why a text is not a refusal code.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum RefusalCodeError {
    /// The code is empty, too long or has invalid characters.
    #[error("{0:?} is not a code: expected 1 to {MAX_CODE_CHARS} letters, digits, '_' or '-'")]
    Code(String),
    /// It does not have three parts.
    #[error(
        "{0:?} is not of the form host/product/code, for example \"futures/futures/300099\", or \"spot/*/400999\" for every product"
    )]
    Form(String),
    /// There is no such host.
    #[error("{0:?} is not a host: expected spot or futures")]
    Host(String),
    /// The host has no such product.
    #[error("{product:?} is not a product of the {} host: expected * or one of {}", host.as_str(), names(*host))]
    Product {
        /// The host.
        host: Host,
        /// What was written for the product.
        product: String,
    },
    /// The code means success.
    #[error("code {0} means success, so it cannot be a refusal code")]
    Success(String),
    /// With this code the request may have been executed.
    #[error(
        "code {0} cannot be a refusal code: KuCoin uses it for internal errors and timeouts, so an order answered with it stays maybe_sent"
    )]
    Unclear(String),
}

/// Longer than any code; the longest known one, `order_not_exist`, has 15 characters.
pub(crate) const MAX_CODE_CHARS: usize = 64;

impl FromStr for RefusalCode {
    type Err = RefusalCodeError;

    fn from_str(text: &str) -> Result<Self, RefusalCodeError> {
        let parts: Vec<_> = text.split('/').collect();
        let [host, product, code] = parts.as_slice() else {
            return Err(RefusalCodeError::Form(text.to_owned()));
        };
        let host = match *host {
            "futures" => Host::Futures,
            "spot" => Host::Spot,
            other => return Err(RefusalCodeError::Host(other.to_owned())),
        };
        let product = match *product {
            "*" => None,
            name => {
                let known = products(host).find(|product| product.as_str() == name);
                Some(known.ok_or_else(|| RefusalCodeError::Product {
                    host,
                    product: name.to_owned(),
                })?)
            }
        };
        Self::new(host, product, code)
    }
}

impl RefusalCode {
    /// The refusal code `code`; fails if it is not a valid code, or if a request that got it may have been executed.
    pub(crate) fn new(
        host: Host,
        product: Option<Product>,
        code: &str,
    ) -> Result<Self, RefusalCodeError> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        let code = code.to_owned();
        if !(1..=MAX_CODE_CHARS).contains(&code.len()) || !code.chars().all(is_allowed) {
            return Err(RefusalCodeError::Code(code));
        }
        if matches!(code.as_str(), SUCCESS | "200" | "OK") {
            return Err(RefusalCodeError::Success(code));
        }
        // For "every product", the code must not be unclear for any product.
        let is_unclear = |product| UNCLEAR.iter().any(|row| row.has(host, product, &code));
        let unclear = match product {
            Some(_) => is_unclear(product),
            None => is_unclear(None) || products(host).any(|product| is_unclear(Some(product))),
        };
        if unclear {
            return Err(RefusalCodeError::Unclear(code));
        }
        Ok(Self {
            host,
            product,
            code,
        })
    }
}

/// The products that have endpoints on `host`.
fn products(host: Host) -> impl Iterator<Item = Product> {
    let is_of = move |product: &Product| match host {
        Host::Futures => matches!(
            product,
            Product::Account | Product::CopyTrading | Product::Futures
        ),
        Host::Spot => !matches!(product, Product::CopyTrading | Product::Futures),
    };
    Product::ALL.into_iter().filter(is_of)
}

fn names(host: Host) -> String {
    let names: Vec<_> = products(host).map(Product::as_str).collect();
    names.join(", ")
}

impl fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let product = self.product.map_or("*", Product::as_str);
        write!(f, "{}/{product}/{}", self.host.as_str(), self.code)
    }
}

/// Every code that leaves the outcome open somewhere.
#[cfg(test)]
pub(super) fn unclear_codes() -> impl Iterator<Item = &'static str> {
    UNCLEAR.iter().flat_map(|row| row.codes).copied()
}

#[cfg(test)]
mod tests {
    use super::super::Catalog;
    use super::*;

    fn of(host: Host, product: Product, code: &str) -> Class {
        class(host, Some(product), code, &[], &RefusalCodes::default())
    }

    #[test]
    fn class_of_a_code_depends_on_host_and_product() {
        for (host, product, code, expected) in [
            (Host::Spot, Product::Spot, "200000", Class::Success),
            (Host::Spot, Product::Spot, "", Class::Missing),
            (Host::Spot, Product::Spot, "200", Class::Unknown),
            (Host::Spot, Product::Spot, "400100", Class::Refusal),
            (Host::Futures, Product::Futures, "400100", Class::Refusal),
            (Host::Futures, Product::Futures, "100001", Class::Refusal),
            (Host::Spot, Product::Spot, "100001", Class::Unknown),
            (Host::Futures, Product::Futures, "100000", Class::Unclear),
            (Host::Spot, Product::Spot, "100000", Class::Unknown),
            (Host::Spot, Product::Margin, "126013", Class::Refusal),
            (Host::Spot, Product::Unified, "126013", Class::Unknown),
            (Host::Spot, Product::Margin, "130202", Class::Unclear),
            (Host::Spot, Product::Margin, "400400", Class::Unclear),
            (Host::Spot, Product::Spot, "400400", Class::Refusal),
            (Host::Spot, Product::Unified, "106150", Class::Refusal),
            (Host::Spot, Product::Spot, "106150", Class::Unknown),
            (Host::Spot, Product::Unified, "112001", Class::Unclear),
            (Host::Spot, Product::Unified, "200004", Class::Unknown),
            (Host::Futures, Product::Futures, "999999", Class::Unknown),
        ] {
            assert_eq!(
                of(host, product, code),
                expected,
                "{host:?} {product:?} {code}"
            );
        }
        let none = RefusalCodes::default();
        let outside = |code| class(Host::Spot, None, code, &[], &none);
        assert_eq!(outside("400003"), Class::Refusal);
        assert_eq!(outside("200004"), Class::Unknown, "the product is unknown");
        let further = class(Host::Spot, None, "200", &["200".to_owned()], &none);
        assert_eq!(further, Class::Success);
    }

    #[test]
    fn duplicate_client_oid_is_a_refusal_of_its_product_only() {
        // Source: KuCoin API documentation, docs-new/error-code.
        let codes = [
            (Host::Futures, Product::Futures, "300018"),
            (Host::Futures, Product::CopyTrading, "300018"),
            (Host::Spot, Product::Margin, "126033"),
            (Host::Spot, Product::Margin, "126044"),
            (Host::Spot, Product::Convert, "102426"),
            (Host::Spot, Product::Unified, "106151"),
            (Host::Spot, Product::Unified, "106152"),
            (Host::Spot, Product::Unified, "106209"),
        ];
        for (host, product, code) in codes {
            assert_eq!(of(host, product, code), Class::Refusal, "{code}");
            for other in Product::ALL {
                let has_code = |(_, product, listed)| (product, listed) == (other, code);
                let expected = codes.into_iter().any(has_code);
                let is_duplicate = is_duplicate_client_oid(other, code, "");
                assert_eq!(is_duplicate, expected, "{code} {other:?}");
            }
        }
        // Source: JKorf/Kucoin.Net issue 120.
        let msg = "validation.createOrder.clientOidDuplicated";
        assert!(is_duplicate_client_oid(Product::Spot, "400100", msg));
        assert!(!is_duplicate_client_oid(
            Product::Spot,
            "400100",
            "Parameter error"
        ));
    }

    #[test]
    fn no_code_is_in_two_tables_and_every_row_has_a_source() {
        for host in [Host::Futures, Host::Spot] {
            for product in Product::ALL.map(Some).into_iter().chain([None]) {
                let mut seen = BTreeSet::from([SUCCESS]);
                for row in REFUSALS.iter().chain(UNCLEAR) {
                    assert!(!row.source.is_empty());
                    for code in row.codes.iter().filter(|code| row.has(host, product, code)) {
                        assert!(
                            seen.insert(code),
                            "{code} twice on {host:?} for {product:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn products_of_a_host_match_the_catalogue() {
        for endpoint in Catalog::get().endpoints() {
            let Some(scope) = endpoint.scope else {
                continue;
            };
            assert!(
                products(scope.host()).any(|product| product == endpoint.product),
                "{}",
                endpoint.id
            );
        }
    }

    #[test]
    fn configured_code_is_a_refusal_for_its_host_and_product() {
        let codes = ["spot/margin/126099", "futures/*/300099"];
        let codes: RefusalCodes = codes.iter().map(|code| code.parse().unwrap()).collect();
        let of = |host, product, code| class(host, product, code, &[], &codes);
        let margin = Some(Product::Margin);
        assert_eq!(of(Host::Spot, margin, "126099"), Class::Refusal);
        assert_eq!(
            of(Host::Spot, Some(Product::Spot), "126099"),
            Class::Unknown
        );
        assert_eq!(
            of(Host::Futures, Some(Product::Account), "300099"),
            Class::Refusal
        );
        assert_eq!(of(Host::Futures, None, "300099"), Class::Refusal);
        assert_eq!(of(Host::Spot, margin, "300099"), Class::Unknown);
    }

    #[test]
    fn error_for_an_invalid_refusal_code_names_the_expected_form() {
        let problem = |text: &str| text.parse::<RefusalCode>().unwrap_err().to_string();
        for (text, part) in [
            (
                "300099",
                "is not of the form host/product/code, for example",
            ),
            ("spot/300099", "is not of the form host/product/code"),
            (
                "kucoin/spot/300099",
                "\"kucoin\" is not a host: expected spot or futures",
            ),
            (
                "futures/spot/300099",
                "expected * or one of account, copytrading, futures",
            ),
            ("spot/spot/", "\"\" is not a code: expected 1 to 64"),
            ("spot/spot/30 99", "is not a code"),
            ("spot/spot/200000", "code 200000 means success"),
            ("futures/*/200", "code 200 means success"),
            ("spot/spot/500000", "cannot be a refusal code: KuCoin"),
            ("spot/*/112001", "cannot be a refusal code: KuCoin"),
            ("futures/futures/100000", "cannot be a refusal code: KuCoin"),
        ] {
            assert!(problem(text).contains(part), "{text}: {}", problem(text));
        }
        for text in [
            "spot/spot/112001",
            "spot/*/order_gone",
            "futures/copytrading/180011",
        ] {
            assert_eq!(text.parse::<RefusalCode>().unwrap().to_string(), text);
        }
    }
}
