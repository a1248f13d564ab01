//! Warnings about rules that are valid but probably a mistake.

use std::collections::BTreeSet;

use super::{Grants, Policy, Rule};
use crate::base::ids::{AccountId, BotId};
use crate::base::toml_file::Problem;
use crate::kucoin::{Catalog, Endpoint, Risk, Scope};

impl Policy {
    /// The number of bots and of grants in the rules.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let granted = self.granted();
        let rules = granted.values().flat_map(|grants| grants.all());
        let grants = rules.map(|rule| rule.key.split('.').next());
        (self.bots.len(), grants.collect::<BTreeSet<_>>().len())
    }

    /// Rules that do nothing, or less than they seem to, in the order of the file.
    pub(crate) fn warnings(&self) -> Vec<Problem> {
        let mut warnings = Vec::new();
        let granted = self.granted();
        for (id, account) in &self.accounts {
            let warn = |key: &str, problem: &str| Problem {
                line: self.account_lines.get(id).copied(),
                ..Problem::new(format!("account.{id}{key}"), problem)
            };
            let scopes = granted.keys().filter(|(_, account, _)| *account == id);
            let scopes: BTreeSet<_> = scopes.map(|(.., scope)| *scope).collect();
            if scopes.is_empty() {
                warnings.push(warn(
                    "",
                    "no grant names this account, so no bot can use it",
                ));
                continue;
            }
            for scope in account.keys.keys().filter(|scope| !scopes.contains(scope)) {
                let key = format!(".key.{scope}");
                warnings.push(warn(
                    &key,
                    "no grant names this account in this scope, so no bot can use the key",
                ));
            }
        }
        for (&(bot, account, scope), grants) in &granted {
            self.warn_of_grants(bot, account, scope, grants, &mut warnings);
        }
        for bot in self.bots.keys() {
            let mine = granted.iter().filter(|((other, ..), _)| *other == bot);
            let mut mine: Vec<&Rule> = mine.flat_map(|(_, grants)| grants.all()).collect();
            mine.sort_unstable();
            if let (false, Some(first)) = (mine.iter().any(|rule| needs_key(rule)), mine.first()) {
                let problem = format_args!(
                    "the grants for {bot} allow no endpoint that needs a key; check that no grant is missing"
                );
                warnings.push(at(first, problem));
            }
        }
        warnings.sort_unstable();
        warnings
    }

    /// Warns where class `read` also covers other accounts if the key belongs to a master account, which the rules do not
    /// show: one warning per account.
    pub(crate) fn warnings_of_master_keys(&self) -> Vec<Problem> {
        let accounts = self.accounts.keys();
        accounts.filter_map(|id| self.warn_of_master(id)).collect()
    }

    fn warn_of_master(&self, account: &AccountId) -> Option<Problem> {
        let granted = self.granted().into_iter();
        let reads = granted
            .filter(|((_, other, _), _)| *other == account)
            .filter_map(|(of, grants)| Some((of, grants.classes.get(&Risk::Read)?)));
        let mut endpoints = BTreeSet::new();
        let mut first: Option<&Rule> = None;
        for ((bot, _, scope), rules) in reads {
            let all = Catalog::get().endpoints().iter();
            let affected = all.filter(|endpoint| {
                endpoint.reads_other_accounts
                    && endpoint.class() == Some(Risk::Read)
                    && self.may(bot, account, scope, endpoint)
            });
            let before = endpoints.len();
            endpoints.extend(affected.map(|endpoint| endpoint.id.as_str()));
            if endpoints.len() > before {
                first = first.into_iter().chain(rules).min();
            }
        }
        let example = endpoints.last()?;
        Some(at(
            first?,
            format_args!(
                "if {account}'s key belongs to a master account, \"read\" also covers sub-accounts and invited users \
                 ({} endpoints, such as {example}); use a sub-account's key, or grant endpoints by id",
                endpoints.len()
            ),
        ))
    }

    fn warn_of_grants(
        &self,
        bot: &BotId,
        account: &AccountId,
        scope: Scope,
        grants: &Grants,
        warnings: &mut Vec<Problem>,
    ) {
        for rule in &grants.idle {
            warnings.push(at(rule, "is empty and grants nothing"));
        }
        for (class, rules) in &grants.classes {
            let mut endpoints = Catalog::get().endpoints().iter();
            let is_effective = |endpoint: &'static Endpoint| {
                endpoint.class() == Some(*class) && self.may(bot, account, scope, endpoint)
            };
            if let (false, Some(rule)) = (endpoints.any(is_effective), rules.first()) {
                let word = &rule.word;
                warnings.push(at(
                    rule,
                    format_args!(
                        "{word:?} grants nothing: the site has no endpoint of this class in this scope"
                    ),
                ));
            }
        }
        for (id, rules) in &grants.endpoints {
            let endpoint = Catalog::get().by_id(id);
            let lacks_lookup = endpoint.is_some_and(Endpoint::lacks_lookup);
            if let Some(rule) = rules.first().filter(|_| lacks_lookup) {
                warnings.push(at(
                    rule,
                    format_args!(
                        "KuCoin has no lookup for the orders of {id}: after maybe_sent, nothing shows whether one was placed"
                    ),
                ));
            }
        }
        let unlisted = grants.unlisted.values().map(|rules| (None, rules));
        let classes = grants.classes.values().map(|rules| (None, rules));
        let endpoints = grants.endpoints.iter().map(|(id, rules)| {
            let class = Catalog::get().by_id(id).and_then(Endpoint::class);
            (class.and_then(|class| grants.classes.get(&class)), rules)
        });
        for (class, rules) in endpoints.chain(classes).chain(unlisted) {
            let (first, rest) = match class.and_then(|class| class.first()) {
                Some(class) => (class, rules.as_slice()),
                None => match rules.split_first() {
                    Some(split) => split,
                    None => continue,
                },
            };
            for rule in rest {
                let (word, line) = (&rule.word, first.line);
                let problem = format_args!("{word:?} is already granted by {first} on line {line}");
                warnings.push(at(rule, problem));
            }
        }
    }
}

impl Grants {
    /// All rules, including those of `allow = []`.
    fn all(&self) -> impl Iterator<Item = &Rule> {
        self.rules().into_iter().chain(&self.idle)
    }
}

fn needs_key(rule: &Rule) -> bool {
    match Catalog::get().by_id(&rule.word) {
        Some(endpoint) => endpoint.is_private(),
        None => !rule.word.is_empty() && rule.word != Risk::Public.as_str(),
    }
}

fn at(rule: &Rule, problem: impl std::fmt::Display) -> Problem {
    Problem {
        line: Some(rule.line),
        ..Problem::new(&rule.key, problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grant_of_orders_that_cannot_be_looked_up_is_a_warning() {
        let rules = "[account.main]\nkey = { futures = \"main\" }\n[[grant]]\nbot = \"b\"\naccount = \"main\"\nscope = \"futures\"\n\
                     allow = [\"trade\", \"futures.post.v2-order\"]\n";
        let policy = Policy::parse(rules).unwrap();
        let warnings: Vec<_> = policy.warnings().iter().map(ToString::to_string).collect();
        let expected = "line 7: grant[0].allow[1]: KuCoin has no lookup for the orders of futures.post.v2-order: after maybe_sent, \
                        nothing shows whether one was placed";
        assert_eq!(warnings, [expected]);
    }

    #[test]
    fn each_warning_has_its_line() {
        let rules = r#"[account.main]
key = { spot-margin = "main", futures = "main" }
[account.spare]
[account.turkey]
site = "tr"
key = { spot-margin = "main" }
[[grant]]
bot = "b"
account = "main"
scope = "spot-margin"
allow = ["read", "trade"]
[[grant]]
bot = "b"
account = "main"
scope = "spot-margin"
allow = [
  "spot.get.v1-accounts",
  "spot.post.v1-bullet-private",
  "trade",
]
[[grant]]
bot = "c"
account = "main"
scope = "spot-margin"
allow = []
[[grant]]
bot = "d"
account = "main"
scope = "spot-margin"
allow = ["public", "spot.get.v1-timestamp"]
"#;
        let rules = rules.to_owned()
            + "[[grant]]\nbot = \"b\"\naccount = \"turkey\"\nscope = \"spot-margin\"\nallow = [\"read\"]\n";
        let policy = Policy::parse(&rules).unwrap();
        let texts = |problems: Vec<Problem>| -> Vec<_> {
            problems.iter().map(ToString::to_string).collect()
        };
        let expected = [
            "line 1: account.main.key.futures: no grant names this account in this scope, so no bot can use the key",
            "line 3: account.spare: no grant names this account, so no bot can use it",
            "line 17: grant[1].allow[0]: \"spot.get.v1-accounts\" is already granted by grant[0].allow[0] = \"read\" on line 11",
            "line 19: grant[1].allow[2]: \"trade\" is already granted by grant[0].allow[1] = \"trade\" on line 11",
            "line 25: grant[2].allow: is empty and grants nothing",
            "line 25: grant[2].allow: the grants for c allow no endpoint that needs a key; check that no grant is missing",
            "line 30: grant[3].allow[0]: the grants for d allow no endpoint that needs a key; check that no grant is missing",
            "line 30: grant[3].allow[1]: \"spot.get.v1-timestamp\" is already granted by grant[3].allow[0] = \"public\" on line 30",
        ];
        assert_eq!(texts(policy.warnings()), expected);
        let of_master = |account: &str| {
            format!(
                "if {account}'s key belongs to a master account, \"read\" also covers sub-accounts and invited users \
                 (12 endpoints, such as spot.get.v2-sub-user); use a sub-account's key, or grant endpoints by id"
            )
        };
        let expected = [
            format!("line 11: grant[0].allow[0]: {}", of_master("main")),
            format!("line 35: grant[4].allow[0]: {}", of_master("turkey")),
        ];
        assert_eq!(texts(policy.warnings_of_master_keys()), expected);
        assert_eq!(policy.counts(), (3, 5));
    }
}
