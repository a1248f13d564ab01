//! Explanations and comparisons of rules agree with what `authorize` decides, for random rules.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fmt::Write as _;

use bytes::Bytes;
use credbroker::base::ids::{BotId, Principal, RequestId};
use credbroker::kucoin::{Catalog, Method, Scope, Target, UnsignedRequest};
use credbroker::policy::Policy;
use credbroker::policy::listing::{Call, Item, differences};
use credbroker::proto::{Method as ProtoMethod, Scope as ProtoScope};
use proptest::prelude::*;
use proptest::sample::subsequence;
use proptest::test_runner::{Config, TestRunner};

use super::judge::{Verdict, requests, verdict};
use super::{CATALOGUE, GRANTS, Grant, UNLISTED, Unlisted, filled, method_of, rules_of, scope_of};

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    })
}

fn kucoin_scope(scope: ProtoScope) -> Scope {
    match scope {
        ProtoScope::Futures => Scope::Futures,
        ProtoScope::SpotMargin => Scope::SpotMargin,
        ProtoScope::Unified => Scope::Unified,
        ProtoScope::Unspecified => panic!("the generators name a scope"),
    }
}

fn kucoin_method(method: ProtoMethod) -> Method {
    match method {
        ProtoMethod::Delete => Method::Delete,
        ProtoMethod::Get => Method::Get,
        ProtoMethod::Post => Method::Post,
        ProtoMethod::Unspecified => panic!("the generators name a method"),
    }
}

fn unsigned(account: &str, scope: Scope, method: Method, path: &str) -> Option<UnsignedRequest> {
    Some(UnsignedRequest {
        account: account.parse().ok()?,
        scope,
        method,
        target: Target::new(path, Vec::new()).ok()?,
        body: Bytes::new(),
        id: RequestId::random(),
        body_client_oids: Vec::new(),
    })
}

fn spiffe(bot: &str) -> BotId {
    format!("spiffe://demo.test/bot/{bot}").parse().unwrap()
}

/// Some of the arena's grants.
fn grants() -> impl Strategy<Value = (Vec<&'static Grant>, Vec<&'static Unlisted>)> {
    (
        subsequence(GRANTS.iter().collect::<Vec<_>>(), 0..=GRANTS.len()),
        subsequence(UNLISTED.iter().collect::<Vec<_>>(), 0..=UNLISTED.len()),
    )
}

#[test]
fn explain_agrees_with_authorize_and_cites_the_rules_that_allow_the_request() {
    let (allowed, denied) = (Cell::new(0), Cell::new(0));
    let requests = prop::collection::vec(requests(), 1..40);
    let strategy = (grants(), requests);
    let result = runner(100).run(&strategy, |((grants, unlisted), requests)| {
        let rules = rules_of(&grants, &unlisted);
        let lines: Vec<_> = rules.lines().collect();
        let policy = Policy::parse(&rules).unwrap();
        for (bot, message) in requests {
            let scope = kucoin_scope(message.scope());
            let method = kucoin_method(message.method());
            let Some(request) = unsigned(&message.account, scope, method, &message.path) else {
                continue;
            };
            let id = spiffe(bot);
            let permit = policy.authorize(&Principal::Bot(id.clone()), &request);
            let explanation =
                policy.explain(&id, &request.account, scope, method, request.target.path());
            let expected = verdict(&grants, &unlisted, bot, &message);
            match (permit, explanation.verdict) {
                (Ok(permit), Ok(yes)) => {
                    prop_assert_ne!(expected, Verdict::Denied);
                    prop_assert_eq!(
                        permit.endpoint().map(|e| &e.id),
                        explanation.endpoint.map(|e| &e.id)
                    );
                    prop_assert_eq!(permit.is_private(), yes.key.is_some());
                    prop_assert!(!yes.by.is_empty());
                    for rule in yes.by {
                        let line = lines[rule.line - 1];
                        let quoted = format!("{:?}", rule.word);
                        prop_assert!(line.contains(&quoted), "{} is not in {}", quoted, line);
                        // The line is in a grant for this bot, account and scope.
                        let grant = lines[..rule.line]
                            .rsplit(|line| *line == "[[grant]]")
                            .next()
                            .unwrap();
                        let has = |key: &str, value: &str| {
                            grant.contains(&format!("{key} = \"{value}\"").as_str())
                        };
                        prop_assert!(
                            has("bot", id.as_str())
                                && has("account", &message.account)
                                && has("scope", scope.as_str())
                        );
                        // The word is the class or id of the endpoint, or the path of an unlisted one.
                        let word = rule.word.as_str();
                        let fits = permit.endpoint().map_or(word == message.path, |e| {
                            word == e.id || word == e.risk.as_str()
                        });
                        prop_assert!(fits, "{}", word);
                    }
                    allowed.set(allowed.get() + 1);
                }
                (Err(cause), Err(no)) => {
                    prop_assert_eq!(expected, Verdict::Denied);
                    prop_assert_eq!(cause, no.why);
                    denied.set(denied.get() + 1);
                }
                (permit, explained) => prop_assert!(false, "{:?}, but {:?}", permit, explained),
            }
        }
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    assert!(allowed.get() >= 100, "only {} were allowed", allowed.get());
    assert!(denied.get() >= 100, "only {} were denied", denied.get());
}

/// Rules of one account, at a site that may lack some scopes.
#[derive(Clone, Debug)]
struct SmallRules {
    site: &'static str,
    grants: Vec<(&'static str, Scope, Vec<&'static str>)>,
    unlisted: Vec<(&'static str, &'static str)>,
}

const WORDS: [(Scope, &[&str]); 3] = [
    (
        Scope::SpotMargin,
        &[
            "public",
            "read",
            "trade",
            "trade-config",
            "spot.post.v3-withdrawals",
            "spot.post.v1-bullet-private",
            "spot.get.v1-accounts",
            "spot.post.v1-hf-orders",
        ],
    ),
    (
        Scope::Futures,
        &["read", "trade", "futures.get.v1-position"],
    ),
    (Scope::Unified, &["public", "read", "trade"]),
];

fn small_rules() -> impl Strategy<Value = SmallRules> {
    let grant = (
        prop::sample::select(vec!["a", "b"]),
        prop::sample::select(WORDS.to_vec()),
    )
        .prop_flat_map(|(bot, (scope, words))| {
            subsequence(words, 0..=words.len()).prop_map(move |words| (bot, scope, words))
        });
    let unlisted = subsequence(
        vec![("a", "/api/v9/x"), ("a", "/api/v9/y"), ("b", "/api/v9/x")],
        0..=3,
    );
    let site = prop_oneof![4 => Just("global"), 1 => Just("au"), 1 => Just("tr"), 1 => Just("eu")];
    (site, prop::collection::vec(grant, 0..5), unlisted).prop_map(|(site, mut grants, unlisted)| {
        if matches!(site, "eu" | "tr") {
            // Grants in scopes that the site does not have are errors.
            grants.retain(|(_, scope, _)| *scope == Scope::SpotMargin);
        }
        SmallRules {
            site,
            grants,
            unlisted,
        }
    })
}

impl SmallRules {
    fn policy(&self) -> Policy {
        let keys = match self.site {
            "eu" | "tr" => "spot-margin = \"k\"",
            _ => "spot-margin = \"k\", futures = \"k\", unified = \"k\"",
        };
        let mut rules = format!(
            "[account.main]\nsite = \"{}\"\nallow_money_out = true\nkey = {{ {keys} }}\n",
            self.site
        );
        for (bot, scope, allow) in &self.grants {
            write!(
                rules,
                "[[grant]]\nbot = \"{bot}\"\naccount = \"main\"\nscope = \"{scope}\"\nallow = {allow:?}\n"
            )
            .unwrap();
        }
        for (bot, path) in &self.unlisted {
            write!(
                rules,
                "[[grant]]\nbot = \"{bot}\"\naccount = \"main\"\nscope = \"spot-margin\"\nunlisted = true\nmethod = \"GET\"\npath = \"{path}\"\n"
            )
            .unwrap();
        }
        Policy::parse(&rules).unwrap_or_else(|problems| panic!("{problems:?} in\n{rules}"))
    }
}

#[test]
fn policy_diff_lists_exactly_the_calls_whose_decision_changes() {
    // Every path of the catalogue, in its own scope and in another one; and two unlisted paths.
    let mut requests = Vec::new();
    for endpoint in CATALOGUE.iter() {
        let own = scope_of(endpoint).map_or(Scope::SpotMargin, kucoin_scope);
        let other = if own == Scope::Futures {
            Scope::Unified
        } else {
            Scope::Futures
        };
        let method = kucoin_method(method_of(endpoint));
        for scope in [own, other] {
            requests.push(unsigned("main", scope, method, &filled(endpoint, "67fe0c1a")).unwrap());
        }
    }
    for path in ["/api/v9/x", "/api/v9/y"] {
        requests.push(unsigned("main", Scope::SpotMargin, Method::Get, path).unwrap());
    }
    let changed = Cell::new(0);
    let result = runner(32).run(&(small_rules(), small_rules()), |(old, new)| {
        let (old, new) = (old.policy(), new.policy());
        let mut expected = BTreeSet::new();
        for bot in ["a", "b"] {
            let id: BotId = bot.parse().unwrap();
            let principal = Principal::Bot(id.clone());
            for request in &requests {
                let (before, after) = (
                    old.authorize(&principal, request),
                    new.authorize(&principal, request),
                );
                let (is_gain, permit) = match (before, after) {
                    (Err(_), Ok(permit)) => (true, permit),
                    (Ok(permit), Err(_)) => (false, permit),
                    (Ok(_), Ok(_)) | (Err(_), Err(_)) => continue,
                };
                let call = match permit.endpoint() {
                    Some(endpoint) => Call::Endpoint(&endpoint.id),
                    None => Call::Unlisted("GET", request.target.path()),
                };
                expected.insert((bot, request.scope, is_gain, call));
            }
        }
        let (old, new) = (old.listing(), new.listing());
        let mut differing = differences(&old, &new);
        differing.retain(|change| matches!(change.item, Item::Permission { .. }));
        let mut shown = BTreeSet::new();
        for change in &differing {
            let Item::Permission {
                bot, scope, call, ..
            } = &change.item
            else {
                continue;
            };
            prop_assert_ne!(change.old.is_some(), change.new.is_some());
            shown.insert((bot.as_str(), *scope, change.new.is_some(), *call));
            // The text marks exactly the calls that move money.
            let moves_money = match call {
                Call::Endpoint(id) | Call::WithoutClientOid(id) => {
                    Catalog::get().by_id(id).unwrap().risk.moves_money()
                }
                Call::Unlisted(..) => true,
            };
            let line = change.to_string();
            prop_assert_eq!(line.contains("MONEY"), moves_money, "{}", line);
            prop_assert!(line.contains(&format!(" {call} (")), "{}", line);
            let json = change.to_json();
            let kind = if change.new.is_some() { "gain" } else { "loss" };
            prop_assert_eq!(&json["change"], kind);
            prop_assert_eq!(&json["moves_money"], moves_money);
        }
        prop_assert_eq!(shown.len(), differing.len());
        prop_assert_eq!(&shown, &expected);
        changed.set(changed.get() + expected.len());
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    assert!(changed.get() > 1000, "only {} changes", changed.get());
}
