//! What changes when one set of rules takes the place of another: not the text, but who may do what.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Account, Policy, serves};
use crate::ids::{AccountId, BotId};
use crate::kucoin::{Catalog, Endpoint, Method, Risk, Scope};

/// What changes from old to new rules. `Display` is for people: a line for each class, endpoint or setting.
#[derive(Debug)]
pub struct Diff<'p> {
    /// Settings of accounts.
    pub settings: Vec<SettingChange<'p>>,
    /// What bots gain and lose.
    pub permissions: Vec<PermissionChange<'p>>,
    old: &'p Policy,
    new: &'p Policy,
}

/// A setting of an account that is not what it was.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SettingChange<'p> {
    /// The account.
    pub account: &'p AccountId,
    /// The setting's key, such as `key.futures`.
    pub setting: String,
    /// What it was; `None` where it was not set, or the account is new.
    pub old: Option<String>,
    /// What it becomes; `None` where it is no longer set, or the account is gone.
    pub new: Option<String>,
}

/// What one bot gains or loses.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct PermissionChange<'p> {
    /// The bot.
    pub bot: &'p BotId,
    /// The account.
    pub account: &'p AccountId,
    /// The scope.
    pub scope: Scope,
    /// Whether it gains or loses it.
    pub kind: Kind,
    /// What.
    pub what: Permission<'p>,
}

/// Which way a permission changes.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    /// Allowed by the new rules alone.
    Gain,
    /// Allowed by the old rules alone.
    Loss,
}

/// Something that a bot may do.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Permission<'p> {
    /// Call the endpoint of this id.
    Endpoint(&'static str),
    /// Call this path outside the catalogue; the text is the method's.
    Unlisted(&'static str, &'p str),
}

impl Permission<'_> {
    fn endpoint(self) -> Option<&'static Endpoint> {
        match self {
            Self::Endpoint(id) => Catalog::get().by_id(id),
            Self::Unlisted(..) => None,
        }
    }
}

impl<'p> Diff<'p> {
    /// Compares what each bot may do on each account in each scope, endpoint by endpoint, and the accounts' settings.
    pub fn between(old: &'p Policy, new: &'p Policy) -> Self {
        let places: BTreeSet<_> = old
            .granted()
            .into_keys()
            .chain(new.granted().into_keys())
            .collect();
        let mut permissions = Vec::new();
        for (bot, account, scope) in places {
            let (before, after) = (
                permitted(old, bot, account, scope),
                permitted(new, bot, account, scope),
            );
            let changes = [
                (Kind::Gain, after.difference(&before)),
                (Kind::Loss, before.difference(&after)),
            ];
            for (kind, what) in changes {
                permissions.extend(what.map(|&what| PermissionChange {
                    bot,
                    account,
                    scope,
                    kind,
                    what,
                }));
            }
        }
        Self {
            settings: settings_between(old, new),
            permissions,
            old,
            new,
        }
    }

    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.settings.is_empty() && self.permissions.is_empty()
    }

    /// One object for each change: `gain` or `loss` of a permission, or a `setting`.
    pub fn to_json(&self) -> Vec<Value> {
        let settings = self.settings.iter().map(|change| {
            json!({
                "change": "setting",
                "account": change.account.as_str(),
                "setting": change.setting,
                "old": change.old,
                "new": change.new,
            })
        });
        let permissions = self.permissions.iter().map(|change| {
            let (endpoint, risk, unlisted) = match change.what {
                Permission::Endpoint(id) => {
                    (id, change.what.endpoint().map(|e| e.risk.as_str()), None)
                }
                Permission::Unlisted(method, path) => ("unlisted", None, Some((method, path))),
            };
            let mut line = json!({
                "change": match change.kind { Kind::Gain => "gain", Kind::Loss => "loss" },
                "bot": change.bot.as_str(),
                "account": change.account.as_str(),
                "scope": change.scope.as_str(),
                "endpoint": endpoint,
                "risk": risk.unwrap_or("unlisted"),
                "moves_money": moves_money(change.what),
            });
            if let (Some((method, path)), Some(line)) = (unlisted, line.as_object_mut()) {
                line.insert("method".to_owned(), method.into());
                line.insert("path".to_owned(), path.into());
            }
            line
        });
        settings.chain(permissions).collect()
    }

    /// What is gained or lost of a class, as one line, where one side has the whole class; else endpoint by endpoint.
    fn write_class(
        &self,
        f: &mut fmt::Formatter<'_>,
        first: &PermissionChange<'p>,
        risk: Risk,
        endpoints: &[&'static Endpoint],
    ) -> fmt::Result {
        let &PermissionChange {
            bot,
            account,
            scope,
            kind,
            ..
        } = first;
        let (whole, other, had) = match kind {
            Kind::Gain => (self.new, self.old, "had"),
            Kind::Loss => (self.old, self.new, "keeps"),
        };
        let site = whole.accounts.get(account).map(|account| account.site);
        let class = || {
            let in_class = |endpoint: &&Endpoint| {
                endpoint.class() == Some(risk)
                    && endpoint.scope == Some(scope)
                    && endpoint.grantable
                    && site.is_some_and(|site| serves(site, endpoint))
            };
            Catalog::get().endpoints().iter().filter(in_class)
        };
        let is_whole = class().all(|endpoint| whole.may(bot, account, scope, endpoint));
        if !is_whole || endpoints.len() < 2 {
            return write_each(f, first, endpoints);
        }
        let (changed, of) = (endpoints.len(), class().count());
        write!(f, "{} class {} (", head(first), risk.as_str())?;
        if changed == of {
            return writeln!(f, "{of} endpoints)");
        }
        let rest = class().filter(|endpoint| other.may(bot, account, scope, endpoint));
        let rest: Vec<_> = rest.map(|endpoint| endpoint.id.as_str()).collect();
        writeln!(
            f,
            "{changed} of its {of} endpoints; {had} {})",
            rest.join(", ")
        )
    }
}

impl fmt::Display for Diff<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for SettingChange {
            account,
            setting,
            old,
            new,
        } in &self.settings
        {
            match (old, new) {
                (Some(old), Some(new)) => {
                    writeln!(f, "~ account {account}: {setting} = {old} -> {new}")?;
                }
                (Some(old), None) => writeln!(f, "- account {account}: {setting} = {old}")?,
                (None, Some(new)) => writeln!(f, "+ account {account}: {setting} = {new}")?,
                (None, None) => {}
            }
        }
        let same_place = |a: &PermissionChange, b: &PermissionChange| {
            (a.bot, a.account, a.scope, a.kind) == (b.bot, b.account, b.scope, b.kind)
        };
        for changes in self.permissions.chunk_by(same_place) {
            let Some(first) = changes.first() else {
                continue;
            };
            for risk in Risk::ALL {
                let endpoints = changes.iter().filter_map(|change| change.what.endpoint());
                let (of_class, by_id): (Vec<_>, Vec<_>) = endpoints
                    .filter(|endpoint| endpoint.risk == risk)
                    .partition(|endpoint| endpoint.class().is_some());
                if !of_class.is_empty() {
                    self.write_class(f, first, risk, &of_class)?;
                }
                write_each(f, first, &by_id)?;
            }
            for change in changes {
                if let Permission::Unlisted(method, path) = change.what {
                    let head = head(change);
                    writeln!(f, "{head} unlisted {method} {path} (MAY MOVE MONEY)")?;
                }
            }
        }
        Ok(())
    }
}

fn write_each(
    f: &mut fmt::Formatter<'_>,
    first: &PermissionChange<'_>,
    endpoints: &[&'static Endpoint],
) -> fmt::Result {
    for endpoint in endpoints {
        writeln!(f, "{} {}{}", head(first), endpoint.id, mark(endpoint.risk))?;
    }
    Ok(())
}

fn head(change: &PermissionChange<'_>) -> String {
    let sign = match change.kind {
        Kind::Gain => '+',
        Kind::Loss => '-',
    };
    let PermissionChange {
        bot,
        account,
        scope,
        ..
    } = change;
    format!("{sign} {bot} {account} {scope}:")
}

fn mark(risk: Risk) -> String {
    if risk.moves_money() {
        format!(" ({}, MOVES MONEY)", risk.as_str())
    } else {
        format!(" ({})", risk.as_str())
    }
}

/// What an endpoint outside the catalogue does is unknown: it may.
fn moves_money(what: Permission<'_>) -> bool {
    what.endpoint()
        .is_none_or(|endpoint| endpoint.risk.moves_money())
}

fn permitted<'p>(
    policy: &'p Policy,
    bot: &BotId,
    account: &AccountId,
    scope: Scope,
) -> BTreeSet<Permission<'p>> {
    let Ok((_, Some(grants))) = policy.grants(bot, account, scope) else {
        return BTreeSet::new();
    };
    let endpoints = Catalog::get().endpoints().iter();
    let listed = endpoints
        .filter(|endpoint| policy.may(bot, account, scope, endpoint))
        .map(|endpoint| Permission::Endpoint(&endpoint.id));
    let unlisted = grants
        .unlisted
        .keys()
        .map(|(method, path)| Permission::Unlisted(Method::as_str(*method), path));
    listed.chain(unlisted).collect()
}

fn settings_between<'p>(old: &'p Policy, new: &'p Policy) -> Vec<SettingChange<'p>> {
    let accounts: BTreeSet<_> = old.accounts.keys().chain(new.accounts.keys()).collect();
    let mut changes = Vec::new();
    for account in accounts {
        let settings_in = |policy: &Policy| {
            let account = policy.accounts.get(account);
            account.map(|account| settings(account)).unwrap_or_default()
        };
        let (mut before, mut after) = (settings_in(old), settings_in(new));
        let keys: BTreeSet<_> = before.keys().chain(after.keys()).cloned().collect();
        for setting in keys {
            let (old, new) = (before.remove(&setting), after.remove(&setting));
            if old != new {
                changes.push(SettingChange {
                    account,
                    setting,
                    old,
                    new,
                });
            }
        }
    }
    changes
}

/// What the rules say of an account, as key and value.
fn settings(account: &Account) -> BTreeMap<String, String> {
    let Account {
        id: _,
        site,
        vip,
        purpose,
        allow_money_out,
        keys,
        partners,
        max_stale,
    } = account;
    let seconds = |limit: Duration| limit.as_secs().to_string();
    let mut settings = BTreeMap::from([
        ("allow_money_out".to_owned(), allow_money_out.to_string()),
        ("max_stale_s".to_owned(), seconds(max_stale.add_risk)),
        (
            "max_stale_cancel_s".to_owned(),
            seconds(max_stale.withdraw_risk),
        ),
        ("purpose".to_owned(), purpose.as_str().to_owned()),
        ("site".to_owned(), site.to_string()),
        ("vip".to_owned(), vip.to_string()),
    ]);
    for (scope, key) in keys {
        settings.insert(format!("key.{scope}"), key.to_string());
    }
    for (scope, partner) in partners {
        settings.insert(format!("partner.{scope}.id"), partner.id.clone());
        if let Some(name) = &partner.broker_name {
            settings.insert(format!("partner.{scope}.broker_name"), name.clone());
        }
    }
    settings
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;
    use crate::kucoin::Product;

    fn rules(account: &str, grants: &[(&str, &str)]) -> Policy {
        let mut rules = format!("[account.main]\n{account}\n");
        for (bot, allow) in grants {
            rules += "[[grant]]\naccount = \"main\"\nscope = \"spot-margin\"\n";
            writeln!(rules, "bot = \"{bot}\"\n{allow}").unwrap();
        }
        Policy::parse(&rules).unwrap()
    }

    const KEYED: &str = "allow_money_out = true\nkey = { spot-margin = \"main\" }";

    fn count(risk: Risk) -> usize {
        let endpoints = Catalog::get().endpoints().iter();
        let in_class =
            |e: &&Endpoint| e.risk == risk && e.scope == Some(Scope::SpotMargin) && e.grantable;
        endpoints.filter(in_class).count()
    }

    #[test]
    fn an_undocumented_endpoint_is_listed_beside_its_class_and_not_in_it() {
        let rules = |allow: &str| {
            let text = format!(
                "[account.main]\nkey = {{ unified = \"main\" }}\n\
                 [[grant]]\nbot = \"b\"\naccount = \"main\"\nscope = \"unified\"\nallow = [{allow}]\n"
            );
            Policy::parse(&text).unwrap()
        };
        let undocumented = "spot.get.ua-v1-classic-order-detail";
        let (old, new) = (rules(""), rules(&format!("\"read\", {undocumented:?}")));
        let text = Diff::between(&old, &new).to_string();
        let lines: Vec<_> = text.lines().collect();
        let in_class = Catalog::get()
            .endpoints()
            .iter()
            .filter(|e| e.scope == Some(Scope::Unified) && e.risk == Risk::Read && e.grantable)
            .filter(|e| !e.path.contains("/classic/"))
            .count();
        let expected = [
            format!("+ b main unified: class read ({in_class} endpoints)"),
            format!("+ b main unified: {undocumented} (read)"),
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn other_words_for_the_same_are_no_change() {
        let old = rules(KEYED, &[("b", "allow = [\"read\", \"trade\"]")]);
        let new = rules(
            KEYED,
            &[
                ("b", "allow = [\"trade\"]"),
                (
                    "b",
                    "allow = [\"read\", \"spot.get.v1-accounts\", \"read\"]",
                ),
                ("c", "allow = []"),
            ],
        );
        let diff = Diff::between(&old, &new);
        assert!(diff.is_empty(), "{diff}");
    }

    #[test]
    fn a_person_reads_classes_and_names() {
        let old = rules(
            KEYED,
            &[("b", "allow = [\"read\", \"spot.post.v1-hf-orders\"]")],
        );
        let new = rules(
            &KEYED.replace("main", "other"),
            &[
                (
                    "b",
                    "allow = [\"trade\", \"spot.get.v1-accounts\", \"spot.post.v3-withdrawals\"]",
                ),
                (
                    "c",
                    "unlisted = true\nmethod = \"POST\"\npath = \"/api/v9/new\"",
                ),
                ("c", "allow = [\"spot.post.v1-bullet-private\"]"),
            ],
        );
        let diff = Diff::between(&old, &new);
        let (read, trade) = (count(Risk::Read), count(Risk::Trade));
        let expected = format!(
            "~ account main: key.spot-margin = main -> other\n\
             + b main spot-margin: class trade ({} of its {trade} endpoints; had spot.post.v1-hf-orders)\n\
             + b main spot-margin: spot.post.v3-withdrawals (withdraw, MOVES MONEY)\n\
             - b main spot-margin: class read ({} of its {read} endpoints; keeps spot.get.v1-accounts)\n\
             + c main spot-margin: spot.post.v1-bullet-private (token)\n\
             + c main spot-margin: unlisted POST /api/v9/new (MAY MOVE MONEY)\n",
            trade - 1,
            read - 1
        );
        assert_eq!(diff.to_string(), expected);
    }

    #[test]
    fn every_setting_of_an_account_is_compared() {
        let full = "site = \"au\"\nvip = 3\npurpose = \"read-only\"\nallow_money_out = true\nmax_stale_s = 60\nmax_stale_cancel_s = 61\n\
                    key = { futures = \"f\" }\n\
                    partner = { futures = { id = \"p\", broker_name = \"n\" } }";
        let (plain, full) = (rules("", &[]), rules(full, &[]));
        let expected = "~ account main: allow_money_out = false -> true\n\
                        + account main: key.futures = f\n\
                        ~ account main: max_stale_cancel_s = 86400 -> 61\n\
                        ~ account main: max_stale_s = 900 -> 60\n\
                        + account main: partner.futures.broker_name = n\n\
                        + account main: partner.futures.id = p\n\
                        ~ account main: purpose = trade -> read-only\n\
                        ~ account main: site = global -> au\n\
                        ~ account main: vip = 0 -> 3\n";
        assert_eq!(Diff::between(&plain, &full).to_string(), expected);
        let none = Policy::default();
        let gone = Diff::between(&full, &none);
        assert_eq!(gone.settings.len(), 9);
        assert!(
            gone.to_string()
                .lines()
                .all(|line| line.starts_with("- account main: "))
        );
    }

    #[test]
    fn another_site_takes_permissions_away() {
        let old = rules(KEYED, &[("b", "allow = [\"trade\"]")]);
        let new = rules(
            &format!("site = \"tr\"\n{KEYED}"),
            &[("b", "allow = [\"trade\"]")],
        );
        let diff = Diff::between(&old, &new);
        assert!(!diff.permissions.is_empty());
        for change in &diff.permissions {
            assert_eq!(change.kind, Kind::Loss);
            assert_eq!(change.what.endpoint().unwrap().product, Product::Margin);
        }
    }
}
