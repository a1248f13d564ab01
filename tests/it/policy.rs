//! What bots can and cannot do under the rules: hostile requests, each with its expected error, and requests that are
//! granted.
//!
//! The grants are defined here once, as data: the rules file is generated from them, and [`judge`] evaluates them with its
//! own code.

mod collisions;
mod denied;
mod explained;
mod granted;
mod judge;
mod keys;
mod malformed;
mod transport;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::LazyLock;

use credbroker::proto::{Method, QueryParameter, Scope, SignAndSendRequest};
use credbroker_sim::installation::Settings;
use serde_json::Value;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::harness::{Bot, Lab, failure, request};

/// The accounts; each has its own uid at the simulator.
const ACCOUNTS: &str = r#"
[account.main]
key = { spot-margin = "main", futures = "main", unified = "main" }

[account.other]
key = { spot-margin = "main" }

[account.treasury]
allow_money_out = true
key = { spot-margin = "main", futures = "main", unified = "main" }

[account.archive]
purpose = "read-only"
key = { spot-margin = "main", futures = "main", unified = "main" }

[account.europe]
site = "eu"
key = { spot-margin = "main" }

[account.turkey]
site = "tr"
key = { spot-margin = "main" }

[account.australia]
site = "au"
key = { spot-margin = "main", futures = "main" }

[account.keyless]
"#;

const KEYS: [(&str, &str, u64); 7] = [
    ("main", "main", 1001),
    ("other", "main", 1002),
    ("treasury", "main", 1003),
    ("archive", "main", 1004),
    ("europe", "main", 1005),
    ("turkey", "main", 1006),
    ("australia", "main", 1007),
];

const CLASSES: [&str; 4] = ["public", "read", "trade", "trade-config"];

/// Ids of every template that also matches a literal path of another endpoint.
const SPOT_TEMPLATES: [&str; 10] = [
    "spot.delete.v1-hf-orders-order-id",
    "spot.delete.v1-orders-order-id",
    "spot.delete.v1-stop-order-order-id",
    "spot.get.v1-accounts-account-id",
    "spot.get.v1-hf-orders-order-id",
    "spot.get.v1-orders-order-id",
    "spot.get.v1-stop-order-order-id",
    "spot.get.v1-withdrawals-withdrawal-id",
    "spot.get.v3-hf-margin-orders-order-id",
    "spot.get.v3-market-orderbook-level-level",
];
const FUTURES_TEMPLATES: [&str; 4] = [
    "futures.delete.v1-orders-order-id",
    "futures.get.v1-contracts-symbol",
    "futures.get.v1-orders-order-id",
    "futures.get.v2-contracts-symbol",
];

/// What a bot can do on an account in a scope.
#[derive(Debug)]
struct Grant {
    bot: &'static str,
    account: &'static str,
    scope: Scope,
    allow: &'static [&'static str],
}

const fn grant(
    bot: &'static str,
    account: &'static str,
    scope: Scope,
    allow: &'static [&'static str],
) -> Grant {
    Grant {
        bot,
        account,
        scope,
        allow,
    }
}

/// `maker` has every class, `picky` only templates by name, `banker` every class on an account that allows money out.
const GRANTS: [Grant; 22] = [
    grant("maker", "main", Scope::SpotMargin, &CLASSES),
    grant("maker", "main", Scope::Futures, &CLASSES),
    grant("maker", "main", Scope::Unified, &CLASSES),
    grant("picky", "main", Scope::SpotMargin, &SPOT_TEMPLATES),
    grant("picky", "main", Scope::Futures, &FUTURES_TEMPLATES),
    grant("reader", "main", Scope::SpotMargin, &["read"]),
    grant("onlooker", "main", Scope::SpotMargin, &["public"]),
    grant("onlooker", "keyless", Scope::Futures, &["public"]),
    grant("foreign", "other", Scope::SpotMargin, &CLASSES),
    grant("banker", "treasury", Scope::SpotMargin, &CLASSES),
    grant("banker", "treasury", Scope::Futures, &CLASSES),
    grant("banker", "treasury", Scope::Unified, &CLASSES),
    grant(
        "clerk",
        "treasury",
        Scope::SpotMargin,
        &["spot.post.v3-withdrawals", "read"],
    ),
    grant("auditor", "archive", Scope::SpotMargin, &["public", "read"]),
    grant("auditor", "archive", Scope::Futures, &["public", "read"]),
    grant("euro", "europe", Scope::SpotMargin, &CLASSES),
    grant("turk", "turkey", Scope::SpotMargin, &CLASSES),
    grant("aussie", "australia", Scope::SpotMargin, &CLASSES),
    grant("aussie", "australia", Scope::Futures, &["public", "trade"]),
    grant("futurist", "main", Scope::Futures, &CLASSES),
    grant("unifier", "main", Scope::Unified, &CLASSES),
    grant("spotter", "main", Scope::SpotMargin, &["trade"]),
];

/// A grant of one endpoint outside the catalogue.
#[derive(Debug)]
struct Unlisted {
    bot: &'static str,
    account: &'static str,
    scope: Scope,
    method: Method,
    path: &'static str,
}

/// The grants of `explorer`.
const UNLISTED: [Unlisted; 3] = [
    Unlisted {
        bot: "explorer",
        account: "treasury",
        scope: Scope::SpotMargin,
        method: Method::Get,
        path: "/api/v9/new/Thing",
    },
    Unlisted {
        bot: "explorer",
        account: "treasury",
        scope: Scope::Futures,
        method: Method::Post,
        path: "/api/v9/orders.new",
    },
    Unlisted {
        bot: "explorer",
        account: "treasury",
        scope: Scope::Unified,
        method: Method::Get,
        path: "/api/ua/v9/accounts",
    },
];

const BOTS: [&str; 16] = [
    "maker", "picky", "reader", "onlooker", "foreign", "banker", "clerk", "auditor", "euro",
    "turk", "aussie", "futurist", "unifier", "spotter", "explorer", "outsider",
];

/// The catalogue as data, parsed without the broker's code.
static CATALOGUE: LazyLock<Vec<Value>> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../src/kucoin/endpoints.json")).unwrap()
});

fn word(scope: Scope) -> &'static str {
    match scope {
        Scope::Futures => "futures",
        Scope::SpotMargin => "spot-margin",
        Scope::Unified => "unified",
        Scope::Unspecified => "unspecified",
    }
}

fn verb(method: Method) -> &'static str {
    match method {
        Method::Delete => "DELETE",
        Method::Get => "GET",
        Method::Post => "POST",
        Method::Unspecified => "unspecified",
    }
}

fn scope_of(endpoint: &Value) -> Option<Scope> {
    SCOPES
        .into_iter()
        .find(|scope| endpoint["scope"].as_str() == Some(word(*scope)))
}

fn method_of(endpoint: &Value) -> Method {
    METHODS
        .into_iter()
        .find(|method| endpoint["method"].as_str() == Some(verb(*method)))
        .unwrap()
}

const SCOPES: [Scope; 3] = [Scope::Futures, Scope::SpotMargin, Scope::Unified];
const METHODS: [Method; 3] = [Method::Delete, Method::Get, Method::Post];

/// The endpoint's path with `value` for every parameter.
fn filled(endpoint: &Value, value: &str) -> String {
    let path = endpoint["path"].as_str().unwrap();
    let segments = path
        .split('/')
        .map(|segment| match segment.split_once('{') {
            Some((before, _)) => format!("{before}{value}"),
            None => segment.to_owned(),
        });
    segments.collect::<Vec<_>>().join("/")
}

fn rules() -> String {
    rules_of(&GRANTS.each_ref(), &UNLISTED.each_ref())
}

fn rules_of(grants: &[&Grant], unlisted: &[&Unlisted]) -> String {
    let mut rules = ACCOUNTS.to_owned();
    for Grant {
        bot,
        account,
        scope,
        allow,
    } in grants
    {
        let scope = word(*scope);
        write!(
            rules,
            "\n[[grant]]\nbot = \"spiffe://demo.test/bot/{bot}\"\naccount = \"{account}\"\nscope = \"{scope}\"\nallow = {allow:?}\nclient_oid = \"optional\"\n"
        )
        .unwrap();
    }
    for Unlisted {
        bot,
        account,
        scope,
        method,
        path,
    } in unlisted
    {
        let (scope, method) = (word(*scope), verb(*method));
        write!(
            rules,
            "\n[[grant]]\nbot = \"spiffe://demo.test/bot/{bot}\"\naccount = \"{account}\"\nscope = \"{scope}\"\nunlisted = true\nmethod = \"{method}\"\npath = \"{path}\"\n"
        )
        .unwrap();
    }
    rules
}

/// A running broker with the rules above, and every bot connected.
struct Arena {
    lab: Lab,
    bots: BTreeMap<&'static str, Bot>,
}

impl Arena {
    async fn start() -> Self {
        let lab = Lab::with(Settings {
            rules: rules(),
            keys: KEYS.to_vec(),
            ..Settings::default()
        })
        .await;
        let mut bots = BTreeMap::new();
        for name in BOTS {
            bots.insert(name, lab.bot(name).await);
        }
        Self { lab, bots }
    }

    fn bot(&self, name: &str) -> Bot {
        self.bots[name].clone()
    }

    /// Sends every request; checks that it fails as expected, reaches no exchange and is audited.
    async fn assert_denied(mut self, cases: Vec<Case>) {
        let mut ids = BTreeMap::new();
        for case in cases {
            let Case { label, bot, .. } = &case;
            let result = self.bot(bot).send(case.request.clone()).await;
            let received = self.lab.kucoin.received();
            assert!(
                received.is_empty(),
                "{label}: the exchange received {received:?}"
            );
            let Err(status) = result else {
                panic!("{label}: did not fail");
            };
            let (code, reason, outcome, id) = failure(&status);
            assert_eq!(
                (code, reason.as_str()),
                case.expected.error(),
                "{label}: {}",
                status.message()
            );
            assert_eq!(outcome, "not_sent", "{label}");
            match &case.expected {
                Expected::Denied(part) | Expected::Unknown(part) => assert!(
                    status.message().contains(part),
                    "{label}: {part:?} is not in {:?}",
                    status.message()
                ),
                Expected::Malformed(expected) => {
                    assert_eq!(&fields(&status), expected, "{label}: {}", status.message());
                }
            }
            ids.insert(id, case);
        }
        let mut lines: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        for line in self.lab.audit() {
            let id = line["request_id"].as_str().unwrap().to_owned();
            lines.entry(id).or_default().push(line);
        }
        assert_eq!(lines.len(), ids.len(), "calls in the audit log");
        for (
            id,
            Case {
                label,
                bot,
                expected,
                ..
            },
        ) in &ids
        {
            let [line] = lines[id].as_slice() else {
                panic!("{label}: expected one audit line: {:?}", lines[id]);
            };
            assert_eq!(line["event"], "denied", "{label}");
            assert_eq!(line["outcome"], "not_sent", "{label}");
            assert_eq!(line["reason"], expected.error().1, "{label}");
            assert_eq!(
                line["bot"],
                format!("spiffe://demo.test/bot/{bot}"),
                "{label}"
            );
        }
        self.lab.stop().await;
    }
}

/// The invalid fields that the error of a malformed request names.
fn fields(status: &Status) -> Vec<String> {
    let details = status.get_details_bad_request();
    let violations = details.into_iter().flat_map(|d| d.field_violations);
    violations.map(|violation| violation.field).collect()
}

/// A request that must fail.
struct Case {
    label: String,
    bot: &'static str,
    request: SignAndSendRequest,
    expected: Expected,
}

/// How it must fail.
#[derive(Clone)]
enum Expected {
    /// Permission denied, with this text in the message.
    Denied(String),
    /// Malformed; the error names exactly these fields.
    Malformed(Vec<String>),
    /// The bot is in no rule; with this text in the message.
    Unknown(String),
}

impl Expected {
    fn error(&self) -> (Code, &'static str) {
        match self {
            Self::Denied(_) => (Code::PermissionDenied, "POLICY_DENIED"),
            Self::Malformed(_) => (Code::InvalidArgument, "REQUEST_MALFORMED"),
            Self::Unknown(_) => (Code::Unauthenticated, "CALLER_UNKNOWN"),
        }
    }
}

fn case(
    label: impl Into<String>,
    bot: &'static str,
    request: SignAndSendRequest,
    expected: Expected,
) -> Case {
    Case {
        label: label.into(),
        bot,
        request,
        expected,
    }
}

fn denied(part: impl Into<String>) -> Expected {
    Expected::Denied(part.into())
}

fn malformed(field: &str) -> Expected {
    Expected::Malformed(vec![field.to_owned()])
}

/// A request for an account, with the path exactly as given.
fn on(account: &str, scope: Scope, method: Method, path: &str) -> SignAndSendRequest {
    SignAndSendRequest {
        account: account.to_owned(),
        path: path.to_owned(),
        ..request(scope, method, "", "")
    }
}

fn parameter(name: &str, value: &str) -> QueryParameter {
    QueryParameter {
        name: name.to_owned(),
        value: value.to_owned(),
    }
}

#[test]
fn at_least_200_distinct_hostile_requests_are_tested() {
    let cases: Vec<_> = [
        malformed::paths(),
        malformed::queries(),
        malformed::bodies(),
        malformed::other_fields(),
        collisions::collisions(),
        denied::api_keys(),
        denied::money(),
        denied::scopes_and_hosts(),
        denied::accounts_and_bots(),
        denied::sites_and_read_only_accounts(),
        denied::near_misses_of_unlisted(),
    ]
    .into_iter()
    .inspect(|group| assert!(group.len() >= 10, "only {} cases in a group", group.len()))
    .flatten()
    .collect();
    let mut seen = BTreeSet::new();
    for Case {
        label,
        bot,
        request,
        ..
    } in &cases
    {
        assert!(
            seen.insert(format!("{bot} {request:?}")),
            "{label} is listed twice"
        );
    }
    assert!(cases.len() >= 200, "only {} cases", cases.len());
}
