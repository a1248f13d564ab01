//! Lists what the rules allow (endpoints that bots may call, settings of accounts), and compares two listings.
//!
//! A listing depends only on what the rules allow, over the whole catalogue, and not on how they are written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{Account, BotSettings, ClientOidRule, Policy, most_generous};
use crate::base::ids::{AccountId, BotId};
use crate::kucoin::{Catalog, Endpoint, Method, Scope};

/// The subject of a line. Each is in a listing once, sorted.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Item<'p> {
    /// A setting of an account, such as `key.futures`.
    Setting {
        /// The account.
        account: &'p AccountId,
        /// The setting's key.
        setting: String,
    },
    /// A setting of a bot.
    BotSetting {
        /// The bot.
        bot: &'p BotId,
        /// The setting's key.
        setting: String,
    },
    /// An endpoint that a bot may call.
    Permission {
        /// The bot.
        bot: &'p BotId,
        /// The account.
        account: &'p AccountId,
        /// The scope.
        scope: Scope,
        /// The endpoint.
        call: Call<'p>,
    },
}

/// An endpoint that a bot may call.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Call<'p> {
    /// The endpoint with this id.
    Endpoint(&'static str),
    /// A method and a path that are not in the catalogue.
    Unlisted(&'static str, &'p str),
    /// The endpoint with this id, also for orders without a clientOid.
    WithoutClientOid(&'static str),
}

/// The value of each setting, and the risk of each permission.
pub(crate) type Listing<'p> = BTreeMap<Item<'p>, String>;

/// An item that differs between two listings. Its `Display` starts with `+` (added), `-` (removed) or `~` (changed).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Change<'p> {
    /// What differs.
    pub item: Item<'p>,
    /// Its value in the old listing; `None` if it is not in there.
    pub old: Option<String>,
    /// Its value in the new listing; `None` if it is not in there.
    pub new: Option<String>,
}

impl Policy {
    /// Every setting of an account and every endpoint that a bot may call.
    pub fn listing(&self) -> Listing<'_> {
        let mut listing = Listing::new();
        for (id, account) in &self.accounts {
            listing.extend(settings(account).into_iter().map(|(setting, value)| {
                let account = id;
                (Item::Setting { account, setting }, value)
            }));
        }
        for (bot, settings) in &self.settings {
            let BotSettings {
                weight,
                requests_per_s,
                calls_in_flight,
            } = settings;
            let requests_per_s = requests_per_s.map(|limit| ("requests_per_s", limit.to_string()));
            let calls_in_flight =
                calls_in_flight.map(|limit| ("calls_in_flight", limit.to_string()));
            let settings = [("weight", weight.to_string())].into_iter();
            for (setting, value) in settings.chain(requests_per_s).chain(calls_in_flight) {
                let setting = setting.to_owned();
                listing.insert(Item::BotSetting { bot, setting }, value);
            }
        }
        for ((bot, account, scope), grants) in self.granted() {
            if let Some(max_wait) = grants.max_wait() {
                let setting = format!("max_wait_ms on {account} in {scope}");
                listing.insert(
                    Item::BotSetting { bot, setting },
                    max_wait.as_millis().to_string(),
                );
            }
            let endpoints = Catalog::get().endpoints().iter();
            let listed = endpoints
                .filter(|endpoint| self.may(bot, account, scope, endpoint))
                .map(|endpoint| Call::Endpoint(&endpoint.id));
            let endpoints = Catalog::get().endpoints().iter();
            let without_client_oid = endpoints
                .filter(|endpoint| {
                    endpoint.accepts_orders_without_client_oid()
                        && self.may(bot, account, scope, endpoint)
                        && most_generous(grants.by(endpoint)).client_oid == ClientOidRule::Optional
                })
                .map(|endpoint| Call::WithoutClientOid(&endpoint.id));
            let listed = listed.chain(without_client_oid);
            let unlisted = grants.unlisted.keys();
            let unlisted =
                unlisted.map(|(method, path)| Call::Unlisted(Method::as_str(*method), path));
            listing.extend(listed.chain(unlisted).map(|call| {
                let item = Item::Permission {
                    bot,
                    account,
                    scope,
                    call,
                };
                (item, call.risk_marked())
            }));
        }
        listing
    }
}

/// The items that differ between two listings, sorted.
pub fn differences<'p>(old: &Listing<'p>, new: &Listing<'p>) -> Vec<Change<'p>> {
    let items: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let changes = items.into_iter().map(|item| Change {
        item: item.clone(),
        old: old.get(item).cloned(),
        new: new.get(item).cloned(),
    });
    changes.filter(|change| change.old != change.new).collect()
}

impl Item<'_> {
    /// The line for it.
    pub(crate) fn line(&self, value: &str) -> String {
        match self {
            Self::Setting { account, setting } => format!("account {account}: {setting} = {value}"),
            Self::BotSetting { bot, setting } => format!("bot {bot}: {setting} = {value}"),
            Self::Permission {
                bot,
                account,
                scope,
                call,
            } => format!("{bot} {account} {scope}: {call} ({value})"),
        }
    }

    /// The line for it as a JSON object.
    pub(crate) fn to_json(&self, value: &str) -> Value {
        let mut line = self.fields();
        if let Self::Setting { .. } | Self::BotSetting { .. } = self {
            line.insert("value".to_owned(), value.into());
        }
        line.into()
    }

    fn fields(&self) -> Map<String, Value> {
        let mut fields = Map::new();
        let mut add = |key: &str, value: Value| fields.insert(key.to_owned(), value);
        match self {
            Self::Setting { account, setting } => {
                add("account", account.as_str().into());
                add("setting", setting.as_str().into());
            }
            Self::BotSetting { bot, setting } => {
                add("bot", bot.as_str().into());
                add("setting", setting.as_str().into());
            }
            Self::Permission {
                bot,
                account,
                scope,
                call,
            } => {
                let (id, risk) = match call.endpoint() {
                    Some(endpoint) => (endpoint.id.as_str(), endpoint.risk.as_str()),
                    None => ("unlisted", "unlisted"),
                };
                add("bot", bot.as_str().into());
                add("account", account.as_str().into());
                add("scope", scope.as_str().into());
                add("endpoint", id.into());
                add("risk", risk.into());
                add("moves_money", call.moves_money().into());
                match *call {
                    Call::Endpoint(_) => {}
                    Call::Unlisted(method, path) => {
                        add("method", method.into());
                        add("path", path.into());
                    }
                    Call::WithoutClientOid(_) => {
                        add("client_oid", "optional".into());
                    }
                }
            }
        }
        fields
    }
}

impl Call<'_> {
    fn endpoint(self) -> Option<&'static Endpoint> {
        match self {
            Self::Endpoint(id) | Self::WithoutClientOid(id) => Catalog::get().by_id(id),
            Self::Unlisted(..) => None,
        }
    }

    /// Whether it can move money. An endpoint that is not in the catalogue is assumed to.
    pub(crate) fn moves_money(self) -> bool {
        let endpoint = self.endpoint();
        endpoint.is_none_or(|endpoint| endpoint.risk.moves_money())
    }

    fn risk_marked(self) -> String {
        match self.endpoint().map(|endpoint| endpoint.risk) {
            Some(risk) if risk.moves_money() => format!("{}, MOVES MONEY", risk.as_str()),
            Some(risk) => risk.as_str().to_owned(),
            None => "MAY MOVE MONEY".to_owned(),
        }
    }
}

impl fmt::Display for Call<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Endpoint(id) => f.write_str(id),
            Self::Unlisted(method, path) => write!(f, "unlisted {method} {path}"),
            Self::WithoutClientOid(id) => write!(f, "{id} without clientOid"),
        }
    }
}

impl Change<'_> {
    /// The line as a JSON object: `gain` or `loss` of a permission, or a `setting`.
    pub fn to_json(&self) -> Value {
        let mut line = Map::new();
        let change = match (&self.item, &self.new) {
            (Item::Setting { .. } | Item::BotSetting { .. }, _) => "setting",
            (Item::Permission { .. }, Some(_)) => "gain",
            (Item::Permission { .. }, None) => "loss",
        };
        line.insert("change".to_owned(), change.into());
        line.extend(self.item.fields());
        if let Item::Setting { .. } | Item::BotSetting { .. } = self.item {
            line.insert("old".to_owned(), json!(self.old));
            line.insert("new".to_owned(), json!(self.new));
        }
        line.into()
    }
}

impl fmt::Display for Change<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, value) = match (&self.old, &self.new) {
            (Some(old), Some(new)) => ('~', &format!("{old} -> {new}")),
            (Some(old), None) => ('-', old),
            (None, Some(new)) => ('+', new),
            (None, None) => return Ok(()),
        };
        write!(f, "{sign} {}", self.item.line(value))
    }
}

/// The settings of an account: key and value.
fn settings(account: &Account) -> BTreeMap<String, String> {
    let Account {
        id: _,
        site,
        vip,
        parent_uid,
        purpose,
        allow_money_out,
        keys,
        partners,
        max_stale,
    } = account;
    let seconds = |limit: Duration| limit.as_secs().to_string();
    let mut settings = BTreeMap::from([
        ("allow_money_out".to_owned(), allow_money_out.to_string()),
        ("max_stale_s".to_owned(), seconds(max_stale.risk_increasing)),
        (
            "max_stale_cancel_s".to_owned(),
            seconds(max_stale.cancels_and_reads),
        ),
        ("purpose".to_owned(), purpose.as_str().to_owned()),
        ("site".to_owned(), site.to_string()),
        ("vip".to_owned(), vip.to_string()),
    ]);
    if let Some(uid) = parent_uid {
        settings.insert("parent_uid".to_owned(), uid.clone());
    }
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
    use crate::kucoin::{Product, Risk};

    fn rules(account: &str, grants: &[(&str, &str)]) -> Policy {
        let mut rules = format!("[account.main]\n{account}\n");
        for (bot, allow) in grants {
            rules += "[[grant]]\naccount = \"main\"\nscope = \"spot-margin\"\n";
            writeln!(rules, "bot = \"{bot}\"\n{allow}").unwrap();
        }
        Policy::parse(&rules).unwrap()
    }

    fn changes(old: &Policy, new: &Policy) -> Vec<String> {
        let changes = differences(&old.listing(), &new.listing());
        changes.iter().map(ToString::to_string).collect()
    }

    const KEYED: &str = "allow_money_out = true\nkey = { spot-margin = \"main\" }";

    #[test]
    fn class_grants_its_documented_endpoints_and_no_undocumented_one() {
        let rules = |allow: &str| {
            let text = format!(
                "[account.main]\nkey = {{ unified = \"main\" }}\n\
                 [[grant]]\nbot = \"b\"\naccount = \"main\"\nscope = \"unified\"\nallow = [{allow}]\n"
            );
            Policy::parse(&text).unwrap()
        };
        let undocumented = "spot.get.ua-v1-classic-order-detail";
        let (none, class) = (rules(""), rules("\"read\""));
        let in_class = Catalog::get()
            .endpoints()
            .iter()
            .filter(|e| e.scope == Some(Scope::Unified) && e.risk == Risk::Read && e.grantable)
            .filter(|e| !e.path.contains("/classic/"));
        let mut expected: Vec<_> = in_class
            .map(|e| format!("+ b main unified: {} (read)", e.id))
            .collect();
        expected.sort_unstable();
        assert_eq!(changes(&none, &class), expected);
        let both = rules(&format!("\"read\", {undocumented:?}"));
        assert_eq!(
            changes(&class, &both),
            [format!("+ b main unified: {undocumented} (read)")]
        );
    }

    #[test]
    fn rewriting_the_rules_without_effect_is_no_change() {
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
        assert_eq!(changes(&old, &new), [""; 0]);
    }

    #[test]
    fn each_change_is_one_line_and_marks_endpoints_that_move_money() {
        let old = rules(
            KEYED,
            &[(
                "b",
                "allow = [\"spot.get.v1-accounts\", \"spot.post.v1-hf-orders\"]",
            )],
        );
        let new = rules(
            &KEYED.replace("main", "other"),
            &[
                (
                    "b",
                    "allow = [\"spot.get.v1-accounts\", \"spot.post.v3-withdrawals\"]",
                ),
                (
                    "c",
                    "unlisted = true\nmethod = \"POST\"\npath = \"/api/v9/new\"",
                ),
                ("c", "allow = [\"spot.post.v1-bullet-private\"]"),
            ],
        );
        let expected = [
            "~ account main: key.spot-margin = main -> other",
            "- b main spot-margin: spot.post.v1-hf-orders (trade)",
            "+ b main spot-margin: spot.post.v3-withdrawals (withdraw, MOVES MONEY)",
            "+ c main spot-margin: spot.post.v1-bullet-private (token)",
            "+ c main spot-margin: unlisted POST /api/v9/new (MAY MOVE MONEY)",
        ];
        assert_eq!(changes(&old, &new), expected);
    }

    #[test]
    fn orders_without_client_oid_are_a_permission_of_their_own() {
        let allow = "allow = [\"spot.post.v1-hf-orders\", \"spot.post.v3-oco-order\"]";
        let optional = format!("{allow}\nclient_oid = \"optional\"");
        let (old, new) = (
            rules(KEYED, &[("b", allow)]),
            rules(KEYED, &[("b", &optional)]),
        );
        // KuCoin requires a clientOid for OCO orders.
        let line = "b main spot-margin: spot.post.v1-hf-orders without clientOid (trade)";
        assert_eq!(changes(&old, &new), [format!("+ {line}")]);
        assert_eq!(changes(&new, &old), [format!("- {line}")]);
        let json = differences(&old.listing(), &new.listing())[0].to_json();
        assert_eq!(
            (&json["endpoint"], &json["client_oid"]),
            (&json!("spot.post.v1-hf-orders"), &json!("optional"))
        );
        // One grant that allows it is enough.
        let both = rules(KEYED, &[("b", allow), ("b", &optional)]);
        assert_eq!(changes(&both, &new), [""; 0]);
    }

    #[test]
    fn every_setting_of_an_account_is_compared() {
        let full = "site = \"au\"\nvip = 3\npurpose = \"read-only\"\nallow_money_out = true\nmax_stale_s = 60\nmax_stale_cancel_s = 61\n\
                    key = { futures = \"f\" }\n\
                    partner = { futures = { id = \"p\", broker_name = \"n\" } }";
        let (plain, full) = (rules("", &[]), rules(full, &[]));
        let expected = [
            "~ account main: allow_money_out = false -> true",
            "+ account main: key.futures = f",
            "~ account main: max_stale_cancel_s = 86400 -> 61",
            "~ account main: max_stale_s = 900 -> 60",
            "+ account main: partner.futures.broker_name = n",
            "+ account main: partner.futures.id = p",
            "~ account main: purpose = trade -> read-only",
            "~ account main: site = global -> au",
            "~ account main: vip = 0 -> 3",
        ];
        assert_eq!(changes(&plain, &full), expected);
        let gone = changes(&full, &Policy::default());
        assert_eq!(gone.len(), 9);
        assert!(gone.iter().all(|line| line.starts_with("- account main: ")));
    }

    #[test]
    fn change_of_site_removes_permissions() {
        let grants = [("b", "allow = [\"trade\"]")];
        let old = rules(KEYED, &grants);
        let new = rules(&format!("site = \"tr\"\n{KEYED}"), &grants);
        let changes = differences(&old.listing(), &new.listing());
        assert!(changes.len() > 1);
        for change in changes {
            match change.item {
                Item::Permission { call, .. } => {
                    assert_eq!(change.new, None);
                    assert_eq!(call.endpoint().unwrap().product, Product::Margin);
                }
                Item::Setting { setting, .. } => assert_eq!(setting, "site"),
                Item::BotSetting { setting, .. } => panic!("{setting}"),
            }
        }
    }
}
