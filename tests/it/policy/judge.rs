//! Random requests built from problematic fragments, decided twice: by the broker, and by an independent implementation of
//! the rules.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use credbroker::proto::{Method, Scope, SignAndSendRequest};
use credbroker_sim::kucoin::{Host, ReceivedRequest, Signature};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestRunner};
use serde_json::Value;
use tonic::Code;

use super::{
    Arena, BOTS, CATALOGUE, GRANTS, Grant, METHODS, SCOPES, UNLISTED, Unlisted, filled, method_of,
    on, parameter, scope_of, verb,
};
use crate::harness::failure;

/// Enough to combine every fragment with every kind of endpoint; a case takes about a millisecond.
const CASES: u32 = 1500;

/// The decision of the rules about a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    Public,
    Signed,
    Denied,
}

pub(super) fn verdict(
    grants: &[&Grant],
    unlisted: &[&Unlisted],
    bot: &str,
    request: &SignAndSendRequest,
) -> Verdict {
    let (scope, method, path) = (request.scope(), request.method(), request.path.as_str());
    let grants: Vec<_> = grants
        .iter()
        .filter(|grant| (grant.bot, grant.account, grant.scope) == (bot, &request.account, scope))
        .collect();
    let Some(endpoint) = endpoint(scope, method, path) else {
        let is_granted = unlisted.iter().any(|unlisted| {
            (
                unlisted.bot,
                unlisted.account,
                unlisted.scope,
                unlisted.method,
                unlisted.path,
            ) == (bot, request.account.as_str(), scope, method, path)
        });
        return if is_granted {
            Verdict::Signed
        } else {
            Verdict::Denied
        };
    };
    let site_has_it = match request.account.as_str() {
        "europe" => scope == Scope::SpotMargin,
        "turkey" => scope == Scope::SpotMargin && endpoint["product"] != "margin",
        _ => true,
    };
    let has_lookup = endpoint["effect"] != "place" || endpoint["order"]["lookup"].is_object();
    let by_class = endpoint["status"] != "undocumented" && has_lookup;
    let named = |word: &&str| (by_class && endpoint["risk"] == **word) || endpoint["id"] == **word;
    let granted = grants.iter().any(|grant| grant.allow.iter().any(named));
    if endpoint["grantable"] == false || !site_has_it || !granted {
        Verdict::Denied
    } else if endpoint["risk"] == "public" {
        Verdict::Public
    } else {
        Verdict::Signed
    }
}

/// The endpoint of a path; `None` if there is none or the path is ambiguous.
fn endpoint(scope: Scope, method: Method, path: &str) -> Option<&'static Value> {
    let matching = |e: &&Value| scope_of(e) == Some(scope) && method_of(e) == method;
    let matching: Vec<_> = CATALOGUE.iter().filter(matching).collect();
    let path_of = |e: &Value| e["path"].as_str().unwrap().to_owned();
    let (templates, literals): (Vec<_>, Vec<_>) =
        matching.into_iter().partition(|e| path_of(e).contains('{'));
    if let Some(literal) = literals.iter().find(|e| path_of(e) == path) {
        return Some(literal);
    }
    let normalized = |path: &str| {
        let segments = path
            .split('/')
            .map(|segment| segment.split('.').next().unwrap());
        segments.collect::<Vec<_>>().join("/").to_ascii_lowercase()
    };
    // A literal path of any method on the host is not an id, and neither are its lookalikes.
    let on_host = |e: &&Value| {
        e["host"]
            == if scope == Scope::Futures {
                "futures"
            } else {
                "spot"
            }
    };
    if CATALOGUE
        .iter()
        .filter(on_host)
        .map(path_of)
        .any(|literal| !literal.contains('{') && literal.to_ascii_lowercase() == normalized(path))
    {
        return None;
    }
    templates.into_iter().find(|e| fits(&path_of(e), path))
}

fn fits(template: &str, path: &str) -> bool {
    let (wanted, found): (Vec<_>, Vec<_>) =
        (template.split('/').collect(), path.split('/').collect());
    wanted.len() == found.len()
        && wanted
            .iter()
            .zip(found)
            .all(|(wanted, found)| match wanted.find('{') {
                Some(at) => found.len() > at && found.starts_with(&wanted[..at]),
                None => *wanted == found,
            })
}

/// Path parameters and path endings.
const FRAGMENTS: [&str; 51] = [
    "67fe0c1a",
    "BTC-USDT",
    "XBTUSDTM",
    "a.b_c~d-E",
    "20",
    "cancelAll",
    "cancelall",
    "CANCELALL",
    "cancelAll.json",
    "cancelAll.",
    "cancel",
    "multi",
    "MULTI",
    "multi-cancel",
    "Multi-Cancel",
    "classic",
    "byClientOid",
    "active",
    "active.x",
    "done",
    "ledgers",
    "LEDGERS",
    "transferable",
    "quotas",
    "level2",
    "api-key",
    "API-KEY",
    "apikey",
    "update",
    "client-order",
    "sync",
    "..",
    ".",
    "...",
    "",
    "%2e",
    "%2e%2e",
    "%2F",
    "..%2f",
    ";x",
    "a;b",
    "\\",
    "?a=b",
    "#x",
    " ",
    "\r\n",
    "\0",
    "é",
    "@evil",
    "{orderId}",
    "*",
];

#[derive(Clone, Debug)]
enum PathShape {
    /// The endpoint's path, with a fragment for each parameter.
    Own(&'static str),
    /// One more segment.
    Longer(&'static str),
    /// One segment replaced.
    Replaced(Index, &'static str),
    /// One segment with its case swapped.
    Cased(Index),
    /// With a prefix.
    Prefixed(&'static str),
    /// Only fragments.
    Made(Vec<&'static str>),
}

impl PathShape {
    fn of(self, endpoint: &Value) -> String {
        let plain = filled(endpoint, "67fe0c1a");
        let mut segments: Vec<_> = plain.split('/').map(str::to_owned).collect();
        match self {
            Self::Own(value) => return filled(endpoint, value),
            Self::Longer(last) => segments.push(last.to_owned()),
            Self::Replaced(at, with) => with.clone_into(at.get_mut(&mut segments[1..])),
            Self::Cased(at) => {
                let segment = at.get_mut(&mut segments[1..]);
                *segment = segment
                    .chars()
                    .map(|c| {
                        if c.is_lowercase() {
                            c.to_ascii_uppercase()
                        } else {
                            c.to_ascii_lowercase()
                        }
                    })
                    .collect();
            }
            Self::Prefixed(before) => return format!("{before}{plain}"),
            Self::Made(fragments) => return format!("/{}", fragments.join("/")),
        }
        segments.join("/")
    }
}

fn shapes() -> impl Strategy<Value = PathShape> {
    // Mostly valid segments: malformed requests do not test the rules.
    let well_formed = FRAGMENTS
        .iter()
        .position(|fragment| *fragment == "..")
        .unwrap();
    let fragment =
        move || prop_oneof![4 => select(&FRAGMENTS[..well_formed]), 1 => select(&FRAGMENTS[..])];
    let before = [
        "/",
        "//evil.example",
        "http://evil",
        "@evil",
        "/api",
        "/x/..",
        "/.",
        " ",
        "/%2e",
    ];
    prop_oneof![
        6 => fragment().prop_map(PathShape::Own),
        1 => fragment().prop_map(PathShape::Longer),
        2 => (any::<Index>(), fragment()).prop_map(|(at, with)| PathShape::Replaced(at, with)),
        1 => any::<Index>().prop_map(PathShape::Cased),
        1 => select(before.to_vec()).prop_map(PathShape::Prefixed),
        1 => prop::collection::vec(fragment(), 0..6).prop_map(PathShape::Made),
    ]
}

fn queries() -> impl Strategy<Value = Vec<(String, String)>> {
    let text = || {
        prop_oneof![
            6 => "[a-zA-Z]{1,8}",
            2 => "[&=#+% ?/;,:@!$'()*<>\"{}|^`~\\[\\]\\\\-]{0,6}",
            2 => "\\PC{0,6}",
            1 => select(vec!["", "\r\n", "\0", "clientTimestamp", "\u{85}", "..", "symbol"]).prop_map(str::to_owned),
        ]
    };
    prop_oneof![
        3 => Just(Vec::new()),
        1 => prop::collection::vec((text(), text()), 0..4),
    ]
}

fn bodies() -> impl Strategy<Value = Bytes> {
    let texts = [
        "{}",
        "[]",
        " {\"a\" : 1} ",
        "{\"symbol\":\"BTC-USDT\",\"remark\":\"Zürich \\u00e9 🚀\"}",
        "x",
        "null",
        "{\"a\":1,\"a\":2}",
        "{\"clientTimestamp\":1}",
        "{\"x\":[{\"client_timestamp\":1}]}",
        "{}\r\n",
        "{\"orderIdsList\":[\"1\"]}",
    ];
    prop_oneof![
        8 => Just(Bytes::new()),
        1 => select(texts.to_vec()).prop_map(|text| Bytes::from_static(text.as_bytes())),
    ]
}

/// Bots with their requests.
pub(super) fn requests() -> impl Strategy<Value = (&'static str, SignAndSendRequest)> {
    let is_template = |e: &&Value| e["path"].as_str().unwrap().contains('{');
    let templates: Vec<_> = CATALOGUE.iter().filter(is_template).collect();
    let endpoint = prop_oneof![
        3 => (0..CATALOGUE.len()).prop_map(|at| &CATALOGUE[at]),
        2 => select(templates),
    ];
    // Mostly bots on their own account, in the endpoint's own scope: other requests are denied for trivial causes.
    let caller = prop_oneof![
        8 => (0..GRANTS.len()).prop_map(|at| (GRANTS[at].bot, GRANTS[at].account)),
        1 => select(BOTS.to_vec()).prop_map(|bot| (bot, "main")),
        1 => (select(BOTS.to_vec()), select(vec!["treasury", "nobody", "Main", ""])),
    ];
    let scope = prop_oneof![4 => Just(None), 1 => select(SCOPES.to_vec()).prop_map(Some)];
    let method = prop_oneof![6 => Just(None), 1 => select(METHODS.to_vec()).prop_map(Some)];
    (
        endpoint,
        shapes(),
        caller,
        scope,
        method,
        queries(),
        bodies(),
    )
        .prop_map(
            |(endpoint, shape, (bot, account), scope, method, query, body)| {
                let scope = scope.or(scope_of(endpoint)).unwrap_or(Scope::SpotMargin);
                let method = method.unwrap_or(method_of(endpoint));
                let request = SignAndSendRequest {
                    query: query
                        .iter()
                        .map(|(name, value)| parameter(name, value))
                        .collect(),
                    body,
                    ..on(account, scope, method, &shape.of(endpoint))
                };
                (bot, request)
            },
        )
}

/// Checks that the request arrived unchanged at the right host, signed if and only if it must be.
fn check(
    request: &SignAndSendRequest,
    arrived: &ReceivedRequest,
    verdict: Verdict,
) -> Result<(), TestCaseError> {
    prop_assert_ne!(verdict, Verdict::Denied);
    prop_assert_eq!(arrived.path(), &request.path);
    prop_assert_eq!(&arrived.method, verb(request.method()));
    let host = match request.scope() {
        Scope::Futures => Host::Futures,
        _ => Host::Spot,
    };
    prop_assert_eq!(arrived.host, host);
    prop_assert_eq!(&arrived.body, &request.body);
    let query = arrived
        .target
        .split_once('?')
        .map_or("", |(_, query)| query);
    let arrived_pairs: Vec<_> = url::form_urlencoded::parse(query.as_bytes())
        .into_owned()
        .collect();
    let pairs: Vec<_> = request
        .query
        .iter()
        .map(|p| (p.name.clone(), p.value.clone()))
        .collect();
    prop_assert_eq!(arrived_pairs, pairs);
    let has_key = arrived
        .headers
        .iter()
        .any(|(name, _)| name.starts_with("kc-"));
    prop_assert_eq!(has_key, verdict == Verdict::Signed);
    if verdict == Verdict::Signed && arrived.endpoint.is_some() {
        prop_assert_eq!(&arrived.signature, &Signature::Verified);
    }
    Ok(())
}

#[test]
fn random_requests_are_sent_only_if_granted_and_denied_only_if_not() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut arena = runtime.block_on(Arena::start());
    let (sent, denied, malformed) = (
        AtomicUsize::new(0),
        AtomicUsize::new(0),
        AtomicUsize::new(0),
    );
    let count = |counter: &AtomicUsize| counter.fetch_add(1, Ordering::Relaxed);
    let mut runner = TestRunner::new(Config {
        cases: CASES,
        failure_persistence: None,
        ..Config::default()
    });
    let result = runner.run(&requests(), |(bot, request)| {
        let before = arena.lab.kucoin.received().len();
        let answer = runtime.block_on(arena.bot(bot).send(request.clone()));
        let received = arena.lab.kucoin.received();
        let expected = verdict(&GRANTS.each_ref(), &UNLISTED.each_ref(), bot, &request);
        match answer {
            Ok(_) => {
                count(&sent);
                prop_assert_eq!(received.len(), before + 1);
                check(&request, &received[before], expected)?;
            }
            Err(status) => {
                prop_assert_eq!(received.len(), before);
                match failure(&status).0 {
                    Code::InvalidArgument => count(&malformed),
                    code => {
                        let has_rules = bot != "outsider";
                        let expected_code = if has_rules {
                            Code::PermissionDenied
                        } else {
                            Code::Unauthenticated
                        };
                        prop_assert_eq!(code, expected_code);
                        prop_assert_eq!(expected, Verdict::Denied);
                        count(&denied)
                    }
                };
            }
        }
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    for (result, counter) in [
        ("sent", &sent),
        ("denied", &denied),
        ("malformed", &malformed),
    ] {
        let count = counter.load(Ordering::Relaxed);
        assert!(count >= 50, "only {count} of {CASES} were {result}");
    }
    let lines = arena.lab.audit();
    let audited = lines
        .iter()
        .filter(|line| line["event"] == "denied")
        .count();
    let not_sent = denied.load(Ordering::Relaxed) + malformed.load(Ordering::Relaxed);
    assert_eq!(audited, not_sent, "denied calls in the audit log");
    runtime.block_on(arena.lab.stop());
}
