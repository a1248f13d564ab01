//! Explains to admins why the rules allow or deny a request. Bots get less detail.

use std::time::Duration;

use super::file::GrantTarget;
use super::{ClientOidRule, Denied, Grants, Policy, Rule, most_generous};
use crate::base::ids::{AccountId, BotId, KeyName};
use crate::kucoin::catalog::Found;
use crate::kucoin::{Catalog, Endpoint, Method, Risk, Scope};

/// Whether the rules allow a request, and why.
#[derive(Debug)]
pub struct Explanation<'p> {
    /// The endpoint with this path, perhaps in another scope; `None` if it is not in the catalogue.
    pub endpoint: Option<&'static Endpoint>,
    /// Allowed or denied.
    pub verdict: Result<Allowed<'p>, Refused<'p>>,
}

impl Explanation<'_> {
    /// Whether the request is risk-increasing; requests to endpoints that are not in the catalogue are.
    pub(crate) fn increases_risk(&self) -> bool {
        self.endpoint.is_none_or(Endpoint::increases_risk)
    }
}

/// The rules allow the request.
#[derive(Debug)]
pub struct Allowed<'p> {
    /// The rules that allow it: at least one, in the order of the file.
    pub by: Vec<&'p Rule>,
    /// The key that would sign; `None` if the request is public.
    pub key: Option<&'p KeyName>,
    /// Whether an order needs a clientOid; `None` if the exchange requires one anyway, or the request is no order.
    pub(crate) client_oid: Option<ClientOidRule>,
    /// How long the request waits for its part of a rate budget; `None` if it is a cancel, which waits until its deadline.
    pub(crate) max_wait: Option<Duration>,
}

/// The rules deny the request.
#[derive(Debug)]
pub struct Refused<'p> {
    /// Why.
    pub why: Denied,
    /// A line that says what to write to allow it, or why no grant can; `None` if `why` explains that already.
    pub(crate) advice: Option<String>,
    /// The rules for this bot on this account in this scope, in the order of the file.
    pub(crate) has: Vec<&'p Rule>,
}

impl Policy {
    /// Returns what [`Policy::authorize`] would decide about this request, and the lines of the rules that decide it.
    pub fn explain(
        &self,
        bot: &BotId,
        account: &AccountId,
        scope: Scope,
        method: Method,
        path: &str,
    ) -> Explanation<'_> {
        let found = Catalog::get().find(scope, method, path);
        let endpoint = match found {
            Found::Endpoint(endpoint) | Found::OtherScope(endpoint) => Some(endpoint),
            Found::Lookalike(_) | Found::NotAnId(_) | Found::Unlisted => None,
        };
        let verdict = match self.decide(bot, account, scope, method, path) {
            Ok(granted) => {
                let mut by: Vec<_> = granted.by.into_iter().flatten().collect();
                by.sort_unstable();
                let key = granted.account.keys.get(&scope);
                let is_open = |e: &Endpoint| e.accepts_orders_without_client_oid();
                let client_oid = granted.endpoint.is_some_and(is_open);
                let is_cancel = granted.endpoint.is_some_and(Endpoint::is_cancel);
                let options = most_generous(granted.by);
                Ok(Allowed {
                    by,
                    client_oid: client_oid.then_some(options.client_oid),
                    max_wait: (!is_cancel).then_some(options.max_wait),
                    key: key.filter(|_| granted.endpoint.is_none_or(Endpoint::is_private)),
                })
            }
            Err(why) => {
                let grants = self.grants(bot, account, scope).ok();
                let grants = grants.and_then(|(_, grants)| grants);
                Err(Refused {
                    advice: self.advice(&why, account, scope, method, path),
                    has: grants.map(Grants::rules).unwrap_or_default(),
                    why,
                })
            }
        };
        Explanation { endpoint, verdict }
    }

    fn advice(
        &self,
        why: &Denied,
        account: &AccountId,
        scope: Scope,
        method: Method,
        path: &str,
    ) -> Option<String> {
        match why {
            Denied::Account(_) | Denied::Caller(_) | Denied::NotGranted { .. } => {}
            Denied::Lookalike { .. }
            | Denied::NeverGranted { .. }
            | Denied::NotAnId { .. }
            | Denied::NotPermittedInternally { .. }
            | Denied::NotServed { .. }
            | Denied::Scope { .. }
            | Denied::Site { .. } => return None,
        }
        let Some(entry) = self.accounts.get(account) else {
            return Some(format!(
                "to allow it: first add [account.{account}] to the rules, or correct the account's name"
            ));
        };
        let target = GrantTarget {
            account: Some(entry),
            scope: Some(scope),
        };
        let judged = match Catalog::get().find(scope, method, path) {
            Found::Endpoint(endpoint) => {
                let word = endpoint.class().map_or(endpoint.id.as_str(), Risk::as_str);
                // Checked by its id: the class can be granted even if this endpoint cannot.
                target
                    .judge(&endpoint.id)
                    .map(|_| format!("allow = [{word:?}]"))
                    .map_err(|problem| format!("{:?} {problem}", endpoint.id))
            }
            Found::Unlisted => target
                .judge_unlisted(Some(method), path)
                .map(|()| format!("unlisted = true, method = \"{method}\", path = {path:?}"))
                .map_err(|problem| format!("{path:?} {problem}")),
            Found::Lookalike(literal) => Err(format!(
                "the path resembles that of {} but is spelled differently; use the exact path",
                literal.id
            )),
            Found::NotAnId(endpoint) => Err(format!(
                "this is the fixed path of {} ({}), so its last segment is not read as an id; check path, method and scope",
                endpoint.id, endpoint.method
            )),
            Found::OtherScope(endpoint) => Err(match endpoint.scope {
                Some(belongs) => format!("{} belongs to scope {belongs}", endpoint.id),
                None => format!(
                    "{} is on a host that credbroker does not support",
                    endpoint.id
                ),
            }),
        };
        Some(match judged {
            Ok(line) => {
                format!(
                    "to allow it: add a [[grant]] for this bot, account and scope, containing {line}"
                )
            }
            Err(problem) => format!("no grant can allow it: {problem}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = r#"[account.main]
key = { spot-margin = "main" }
[account.vault]
allow_money_out = true
key = { spot-margin = "cold" }
[[grant]]
bot = "b"
account = "main"
scope = "spot-margin"
allow = [
  "public",
  "spot.get.v1-accounts",
]
[[grant]]
bot = "b"
account = "main"
scope = "spot-margin"
allow = ["read"]
[[grant]]
bot = "b"
account = "vault"
scope = "spot-margin"
unlisted = true
method = "GET"
path = "/api/v9/new"
"#;

    fn explained(
        (bot, account): (&str, &str),
        scope: Scope,
        method: Method,
        path: &str,
    ) -> Result<Vec<String>, (String, Option<String>)> {
        let policy = Policy::parse(RULES).unwrap();
        let (bot, account) = (bot.parse().unwrap(), account.parse().unwrap());
        let explanation = policy.explain(&bot, &account, scope, method, path);
        match explanation.verdict {
            Ok(Allowed { by, .. }) => {
                let at = |rule: &&Rule| format!("{}: {rule}", rule.line);
                Ok(by.iter().map(at).collect())
            }
            Err(Refused { why, advice, .. }) => Err((why.to_string(), advice)),
        }
    }

    #[test]
    fn explanation_of_an_allowed_request_names_every_line_that_allows_it() {
        let by = explained(
            ("b", "main"),
            Scope::SpotMargin,
            Method::Get,
            "/api/v1/accounts",
        );
        let expected = [
            "12: grant[0].allow[1] = \"spot.get.v1-accounts\"",
            "18: grant[1].allow[0] = \"read\"",
        ];
        assert_eq!(by.unwrap(), expected);
        let by = explained(
            ("b", "vault"),
            Scope::SpotMargin,
            Method::Get,
            "/api/v9/new",
        );
        assert_eq!(by.unwrap(), ["25: grant[2].path = \"/api/v9/new\""]);
    }

    #[test]
    fn explanation_of_a_denied_request_says_what_to_write() {
        let cases = [
            (
                "b",
                "main",
                Method::Post,
                "/api/v1/hf/orders",
                "allow = [\"trade\"]",
            ),
            (
                "x",
                "main",
                Method::Get,
                "/api/v1/accounts",
                "allow = [\"read\"]",
            ),
            (
                "b",
                "main",
                Method::Post,
                "/api/v3/withdrawals",
                "no grant can allow it: \"spot.post.v3-withdrawals\" (withdraw) can move money and needs \
                 allow_money_out = true in [account.main]",
            ),
            (
                "b",
                "vault",
                Method::Post,
                "/api/v3/withdrawals",
                "allow = [\"spot.post.v3-withdrawals\"]",
            ),
            (
                "b",
                "vault",
                Method::Post,
                "/api/v9/new",
                "unlisted = true, method = \"POST\", path = \"/api/v9/new\"",
            ),
            (
                "b",
                "nobody",
                Method::Get,
                "/api/v1/accounts",
                "to allow it: first add [account.nobody] to the rules",
            ),
            (
                "x",
                "main",
                Method::Get,
                "/api/v1/account-overview",
                "belongs to scope futures",
            ),
        ];
        for (bot, account, method, path, part) in cases {
            let (_, advice) =
                explained((bot, account), Scope::SpotMargin, method, path).unwrap_err();
            let advice = advice.unwrap();
            assert!(advice.contains(part), "{part} is not in {advice}");
        }
    }

    #[test]
    fn advised_grant_allows_the_request() {
        let policy = Policy::parse(RULES).unwrap();
        let (bot, account) = ("x".parse().unwrap(), "vault".parse().unwrap());
        let mut helped = 0;
        for endpoint in Catalog::get().endpoints() {
            let path = endpoint.path.replace(['{', '}'], "");
            let ask = |policy: &Policy| {
                let scope = Scope::SpotMargin;
                let explanation = policy.explain(&bot, &account, scope, endpoint.method, &path);
                explanation.verdict.map(|_| ()).map_err(|no| no.advice)
            };
            let advice = ask(&policy).unwrap_err().unwrap();
            let Some((_, line)) = advice.split_once("scope, containing ") else {
                assert!(
                    endpoint.scope != Some(Scope::SpotMargin) || !endpoint.grantable,
                    "{}: {advice}",
                    endpoint.id
                );
                continue;
            };
            let rules = format!(
                "{RULES}[[grant]]\nbot = \"x\"\naccount = \"vault\"\nscope = \"spot-margin\"\n{line}\n"
            );
            assert_eq!(
                ask(&Policy::parse(&rules).unwrap()),
                Ok(()),
                "{}",
                endpoint.id
            );
            helped += 1;
        }
        assert!(helped > 100, "{helped}");
    }
}
