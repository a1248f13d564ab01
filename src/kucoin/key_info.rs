//! What KuCoin tells about an API key, and whether the key fits what it is for. Pure.
//!
//! Source: KuCoin API documentation, "Get Apikey Info" (`GET /api/v1/user/api-key`, and its twin for unified accounts), change
//! log of 2025-11-14 and 2026-01-27 for its later fields, and support article 360015102174 for the 30-day rule.

use std::fmt;
use std::net::IpAddr;

use serde_json::{Map, Value};

use super::advice::{self, AdviceContext};
use super::broker_query::{address_in, data};
use super::{KeyVersion, Scope, Site};
use crate::base::diagnosis::Diagnosis;
use crate::base::text::clean;

/// A key that ends sooner is refused: time enough to find and replace it without haste.
const EXPIRY_REFUSED_DAYS: i64 = 14;

/// A key that ends sooner is warned of.
const EXPIRY_WARNED_DAYS: i64 = 30;

/// KuCoin deletes a trading key without IP restriction, or its trade permissions, after this long without use.
const INACTIVITY_DAYS: i64 = 30;

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// Where permissions, addresses and dates of a key are changed on KuCoin's site.
const PAGE: &str = "API Management > Edit";

/// What KuCoin tells about a key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct KeyInfo {
    /// KuCoin's number of the account; `None`: it told none.
    pub(crate) uid: Option<String>,
    /// Whether it is the master account's, and not a sub-account's.
    pub(crate) is_master: bool,
    /// Name of the sub-account.
    pub(crate) sub_name: Option<String>,
    /// KuCoin's word for the site, such as `global`; `None`: it told none.
    pub(crate) site: Option<String>,
    /// What the key may do.
    pub(crate) permissions: Vec<Permission>,
    /// Addresses that may use it, as KuCoin writes them, which hides parts: `203.**.154`. None: any address.
    pub(crate) ip_whitelist: Vec<String>,
    /// Its version.
    pub(crate) version: Option<i64>,
    /// When it was made: Unix milliseconds.
    pub(crate) created_at_ms: Option<i64>,
    /// When it ends: Unix milliseconds; `None`: never.
    pub(crate) expires_at_ms: Option<i64>,
    /// The third-party application that it is linked to.
    pub(crate) third_party_app: Option<String>,
    /// Fields whose value is not as the documentation has it.
    pub(crate) unread: Vec<&'static str>,
}

/// What a key may do. `Display` has the words of KuCoin's page, which are not those of its answers.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Permission {
    /// Subscribe and redeem.
    Earn,
    /// Move money between accounts of the owner; `InnerTransfer` in answers.
    FlexTransfers,
    /// Trade futures.
    Futures,
    /// Read; every key has it.
    General,
    /// Lead copy trading.
    LeadtradeFutures,
    /// Trade on margin.
    Margin,
    /// One that is not known here, in KuCoin's word.
    Other(String),
    /// Trade spot.
    Spot,
    /// Trade with the unified account.
    Unified,
    /// Send money away; `Transfer` in answers.
    Withdrawal,
}

impl Permission {
    fn read(word: &str) -> Self {
        match word.to_ascii_lowercase().as_str() {
            "earn" => Self::Earn,
            "flextransfers" | "innertransfer" => Self::FlexTransfers,
            "futures" => Self::Futures,
            "general" => Self::General,
            "leadtradefutures" => Self::LeadtradeFutures,
            "margin" => Self::Margin,
            "spot" => Self::Spot,
            "transfer" | "withdrawal" => Self::Withdrawal,
            "unified" => Self::Unified,
            _ => Self::Other(word.to_owned()),
        }
    }

    /// Whether it is for trading; an unknown one by its name, such as the "Trade" of old keys.
    fn trades(&self) -> bool {
        match self {
            Self::Futures | Self::LeadtradeFutures | Self::Margin | Self::Spot | Self::Unified => {
                true
            }
            Self::Other(word) => word.to_ascii_lowercase().contains("trad"),
            Self::Earn | Self::FlexTransfers | Self::General | Self::Withdrawal => false,
        }
    }

    /// Whether it lets money out; an unknown one by its name, such as "Third-party withdrawals".
    fn moves_money(&self) -> bool {
        match self {
            Self::FlexTransfers | Self::Withdrawal => true,
            Self::Other(word) => {
                let word = word.to_ascii_lowercase();
                word.contains("withdraw") || word.contains("transfer")
            }
            _ => false,
        }
    }

    /// The scope that it is for; `None` for those that belong to none.
    fn scope(&self) -> Option<Scope> {
        match self {
            Self::Futures | Self::LeadtradeFutures => Some(Scope::Futures),
            Self::Margin | Self::Spot => Some(Scope::SpotMargin),
            Self::Unified => Some(Scope::Unified),
            _ => None,
        }
    }

    /// What trading in `scope` takes; orders of the first kind are the usual ones.
    fn of_scope(scope: Scope) -> &'static [Self] {
        match scope {
            Scope::Futures => &[Self::Futures],
            Scope::SpotMargin => &[Self::Spot, Self::Margin],
            Scope::Unified => &[Self::Unified],
        }
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Earn => "Earn",
            Self::FlexTransfers => "FlexTransfers",
            Self::Futures => "Futures",
            Self::General => "General",
            Self::LeadtradeFutures => "LeadtradeFutures",
            Self::Margin => "Margin",
            Self::Other(word) => word,
            Self::Spot => "Spot",
            Self::Unified => "Unified",
            Self::Withdrawal => "Withdrawal",
        })
    }
}

/// An answer that does not tell about a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "expected what KuCoin's documentation describes for user/api-key: code 200000 and `data` with `permission`; got something else"
)]
pub(crate) struct NotKeyInfo;

/// What a key is for.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    /// Scopes that it serves.
    pub(crate) scopes: Vec<Scope>,
    /// Whether its account is for reading alone.
    pub(crate) is_read_only: bool,
    /// Whether it may let money out.
    pub(crate) allow_money_out: bool,
    /// The account's site.
    pub(crate) site: Site,
    /// The address that KuCoin sees.
    pub(crate) egress_ip: IpAddr,
    /// The version that the request was signed with.
    pub(crate) version: KeyVersion,
    /// Now: Unix milliseconds.
    pub(crate) now_ms: i64,
}

impl KeyInfo {
    /// Reads a whole answer of `user/api-key`. Only `permission` must be there: a new form of the rest is no reason to refuse a key.
    pub(crate) fn read(answer: &[u8]) -> Result<Self, NotKeyInfo> {
        let fields: Map<String, Value> = data(answer).ok_or(NotKeyInfo)?;
        let mut unread = Vec::new();
        let mut number = |name: &'static str| {
            let text = text(&fields, name)?;
            let number = text.parse().ok();
            if number.is_none() {
                unread.push(name);
            }
            number
        };
        let version = number("apiVersion");
        // A time before 1970 is none: whoever counts the days since then must not overflow.
        let created_at_ms = number("createdAt").filter(|&at| at > 0);
        // Sub-account keys are made with -1 for "never".
        let expires_at_ms = number("expiredAt").filter(|&at| at > 0);
        // The second is how KuCoin's answers about sub-account keys of exchange brokers write it.
        let permissions = ["permission", "permissions"]
            .map(|name| list(&fields, name))
            .concat();
        if permissions.is_empty() {
            return Err(NotKeyInfo);
        }
        let sub_name = text(&fields, "subName");
        let is_master = text(&fields, "isMaster").map_or(sub_name.is_none(), |told| told == "true");
        Ok(Self {
            uid: text(&fields, "uid"),
            is_master,
            sub_name,
            site: text(&fields, "siteType"),
            permissions: permissions
                .iter()
                .map(|word| Permission::read(word))
                .collect(),
            ip_whitelist: list(&fields, "ipWhitelist"),
            version,
            created_at_ms,
            expires_at_ms,
            third_party_app: text(&fields, "thirdPartyApp").filter(|told| told != "false"),
            unread,
        })
    }

    /// Whether the key's whitelist has `address`; `None` where it has no whitelist.
    ///
    /// An entry that hides parts of an address counts as it where the rest fits, and one that names a range where the range
    /// has it: KuCoin documents neither, and a key that answers is the better witness.
    pub(crate) fn admits(&self, address: IpAddr) -> Option<bool> {
        let mut entries = self.ip_whitelist.iter().map(String::as_str);
        (!self.ip_whitelist.is_empty()).then(|| entries.any(|entry| fits(entry, address)))
    }

    /// Whether the key can trade.
    pub(crate) fn can_trade(&self) -> bool {
        self.permissions.iter().any(Permission::trades)
    }

    /// What is wrong with the key for what it is `expected` to be, refusals first; nothing: all is well.
    pub(crate) fn judge(&self, expected: &Expected) -> Vec<Diagnosis> {
        let mut findings = Vec::new();
        findings.extend(self.site(expected.site));
        if expected.is_read_only {
            findings.extend(self.more_than_reading());
        } else {
            let scopes = expected.scopes.iter();
            findings.extend(scopes.flat_map(|scope| self.missing(*scope)));
            findings.extend(self.unneeded(expected));
        }
        findings.extend(self.money_out(expected));
        findings.extend(self.addresses(expected));
        findings.extend(self.expiry(expected.now_ms));
        findings.extend(self.oddities(expected));
        findings.sort_by_key(|finding| !finding.is_failed());
        findings
    }

    fn has(&self, permission: &Permission) -> bool {
        self.permissions.contains(permission)
    }

    fn site(&self, expected: Site) -> Option<Diagnosis> {
        let told = self.site.as_deref()?;
        // Source: KuCoin API documentation, "Authentication", X-SITE-TYPE, for the first two; the others are not documented.
        let site = match told.to_ascii_lowercase().as_str() {
            "global" => Some(Site::Global),
            "au" | "australia" => Some(Site::Au),
            "eu" | "europe" => Some(Site::Eu),
            "tr" | "turkey" | "turkiye" => Some(Site::Tr),
            _ => None,
        };
        match site {
            Some(site) if site == expected => None,
            Some(site) => Some(Diagnosis::failed(
                "site-wrong",
                format!(
                    "The key belongs to KuCoin's site {site}, and the account is one of site {expected}."
                ),
                format!(
                    "Register a key of site {expected}, or write site = \"{site}\" for the account in the rules."
                ),
            )),
            None => Some(Diagnosis::warning(
                "site-unknown",
                format!(
                    "KuCoin says that the key belongs to its site {told:?}, which credbroker does not know."
                ),
                format!("Make sure that it is the account's site, {expected}."),
            )),
        }
    }

    fn missing(&self, scope: Scope) -> Vec<Diagnosis> {
        let needed = Permission::of_scope(scope);
        let missing: Vec<_> = needed.iter().filter(|one| !self.has(one)).collect();
        let has_none = missing.len() == needed.len();
        missing
            .into_iter()
            .enumerate()
            // Of a scope with nothing at all, the usual permission is the refusal; the others would only repeat it.
            .filter(|(index, _)| !has_none || *index == 0)
            .map(|(_, one)| {
                let has = listed(self.permissions.iter());
                let fix = format!("Tick {one} under {PAGE} > API permissions.");
                if has_none {
                    let cause = format!("The key lacks the permission {one}, which scope {scope} needs; it has {has}.");
                    return Diagnosis::failed("permission-missing", cause, fix);
                }
                let kind = one.to_string().to_lowercase();
                let cause = format!("The key lacks the permission {one}, so KuCoin will refuse its {kind} orders; it has {has}.");
                Diagnosis::warning("permission-missing", cause, format!("{fix} Without {kind} orders nothing needs to be done."))
            })
            .collect()
    }

    /// What a key for reading has besides; what lets money out is found on its own.
    fn more_than_reading(&self) -> Option<Diagnosis> {
        let beyond = |one: &&Permission| one.trades() || **one == Permission::Earn;
        let (more, _) = the(self.permissions.iter().filter(beyond))?;
        Some(Diagnosis::failed(
            "read-only-key-can-trade",
            format!("The account's purpose is read-only, and the key has {more}."),
            format!("Leave only General ticked under {PAGE} > API permissions."),
        ))
    }

    fn unneeded(&self, expected: &Expected) -> Option<Diagnosis> {
        let unneeded = |one: &&Permission| match one.scope() {
            Some(scope) => !expected.scopes.contains(&scope),
            None => **one == Permission::Earn && !expected.allow_money_out,
        };
        let (more, names) = the(self.permissions.iter().filter(unneeded))?;
        Some(Diagnosis::warning(
            "permission-unneeded",
            format!("The key has {more}, which the account's scopes do not need."),
            format!("Untick {names} under {PAGE} > API permissions."),
        ))
    }

    fn money_out(&self, expected: &Expected) -> Vec<Diagnosis> {
        if expected.allow_money_out && !expected.is_read_only {
            return Vec::new();
        }
        let letting_out = self.permissions.iter().filter(|one| one.moves_money());
        let found = letting_out.map(|one| {
            let (name, does) = match one {
                Permission::FlexTransfers => (
                    "flex-transfers-permission",
                    "moves money between the owner's accounts",
                ),
                Permission::Withdrawal => (
                    "withdrawal-permission",
                    "sends money away without asking for a second factor",
                ),
                _ => ("money-out-permission", "seems to let money out"),
            };
            let cause = format!("The key has the permission {one}, which {does}.");
            let mut fix = format!("Untick {one} under {PAGE} > API permissions.");
            if !expected.is_read_only {
                fix += " If the broker is meant to move this account's money, write allow_money_out = true for it in the rules.";
            }
            Diagnosis::failed(name, cause, fix)
        });
        found.collect()
    }

    fn addresses(&self, expected: &Expected) -> Vec<Diagnosis> {
        let ip = expected.egress_ip;
        let enter = format!("Enter {ip} under {PAGE} > IP restriction.");
        match self.admits(ip) {
            None if !self.can_trade() => vec![Diagnosis::warning(
                "ip-restriction-missing",
                "The key has no IP restriction, so whoever gets hold of it can read this account.",
                enter,
            )],
            None => {
                let cause = "The key has no IP restriction, so whoever gets hold of it can trade with it, and KuCoin deletes it \
                             or takes its trade permissions away after 30 days without use.";
                let mut found = vec![Diagnosis::failed(
                    "ip-restriction-missing",
                    cause,
                    enter.clone(),
                )];
                let age = self.created_at_ms.map(|at| (expected.now_ms - at) / DAY_MS);
                found.extend(age.filter(|&age| age >= INACTIVITY_DAYS).map(|age| {
                    let cause = format!(
                        "The key is {age} days old and has no IP restriction: after 30 days without use KuCoin deletes it or \
                         takes its trade permissions away."
                    );
                    Diagnosis::warning("inactivity-rule", cause, enter)
                }));
                found
            }
            Some(false) => vec![Diagnosis::failed(
                "address-not-whitelisted",
                format!(
                    "The key's IP restriction does not have {ip}, the address that KuCoin sees; it has {}.",
                    self.ip_whitelist.join(", ")
                ),
                format!("Add {ip} under {PAGE} > IP restriction."),
            )],
            Some(true) => {
                let others = self.ip_whitelist.iter();
                let others: Vec<_> = others
                    .filter(|entry| entry.contains('/') || !fits(entry, ip))
                    .map(String::as_str)
                    .collect();
                let cause = || {
                    let others = others.join(", ");
                    format!(
                        "The key may be used from other addresses than the broker's too: {others}."
                    )
                };
                let fix = format!("Leave only {ip} under {PAGE} > IP restriction.");
                let warning = (!others.is_empty())
                    .then(|| Diagnosis::warning("other-addresses-whitelisted", cause(), fix));
                warning.into_iter().collect()
            }
        }
    }

    /// What is wrong with the time that the key has left.
    pub(crate) fn expiry(&self, now_ms: i64) -> Option<Diagnosis> {
        let left_ms = self.expires_at_ms?.saturating_sub(now_ms);
        let when = match left_ms.div_euclid(DAY_MS) {
            _ if self.has_expired(now_ms) => "has expired".to_owned(),
            0 => "expires in less than a day".to_owned(),
            1 => "expires in 1 day".to_owned(),
            days => format!("expires in {days} days"),
        };
        let fix = "Create a new key under API Management that lasts longer, and put it in this one's place.";
        let cause = format!("The key {when}.");
        if self.has_expired(now_ms) {
            let cause = format!("{cause} KuCoin takes no more requests with it.");
            Some(Diagnosis::failed("expires-soon", cause, fix))
        } else if left_ms < EXPIRY_REFUSED_DAYS * DAY_MS {
            let cause = format!("{cause} At least {EXPIRY_REFUSED_DAYS} days are asked for.");
            Some(Diagnosis::failed("expires-soon", cause, fix))
        } else if left_ms < EXPIRY_WARNED_DAYS * DAY_MS {
            Some(Diagnosis::warning("expires-soon", cause, fix))
        } else {
            None
        }
    }

    /// Whether its time is over.
    pub(crate) fn has_expired(&self, now_ms: i64) -> bool {
        self.expires_at_ms.is_some_and(|at_ms| at_ms <= now_ms)
    }

    fn oddities(&self, expected: &Expected) -> Vec<Diagnosis> {
        let mut found = Vec::new();
        let asked = match expected.version {
            KeyVersion::V2 => 2,
            KeyVersion::V3 => 3,
        };
        found.extend(self.version.filter(|&version| version != asked).map(|version| {
            Diagnosis::warning(
                "version-differs",
                format!("The key is used with version {asked}, and KuCoin says that its version is {version}."),
                format!("Register the key with key_version = {version}."),
            )
        }));
        found.extend(self.third_party_app.as_ref().map(|app| {
            Diagnosis::warning(
                "third-party-app",
                format!("The key is linked to a third-party application: {app}."),
                "Create a key of its own for the broker under API Management, of the kind API Trading.",
            )
        }));
        let unknown = |one: &&Permission| {
            matches!(one, Permission::Other(_)) && !one.moves_money() && !one.trades()
        };
        found.extend(the(self.permissions.iter().filter(unknown)).map(|(unknown, _)| {
            Diagnosis::warning(
                "permission-unknown",
                format!("The key has {unknown}, which credbroker does not know."),
                format!("Look at what it allows, and untick it under {PAGE} > API permissions unless it is needed."),
            )
        }));
        if !self.unread.is_empty() {
            found.push(Diagnosis::warning(
                "answer-unreadable",
                format!(
                    "KuCoin gave {} in a form that credbroker does not know, so it was not checked.",
                    self.unread.join(", ")
                ),
                "Check it under API Management, and report it as a credbroker bug.",
            ));
        }
        found
    }
}

/// What KuCoin's refusal of a request in `scope` tells about the key that signed it. `egress_ip` is the address that KuCoin
/// must see; the one that the message names counts for more.
pub(crate) fn refusal(code: &str, msg: &str, scope: Scope, egress_ip: IpAddr) -> Diagnosis {
    let Some(advice) = advice::of_message(scope, code, msg) else {
        // Text of the exchange goes to a terminal.
        let (code, said) = (clean(code, 64), clean(msg, 200));
        return Diagnosis::failed(
            "refused",
            format!("KuCoin refused the key with code {code}: {said}"),
            "Look the code up in KuCoin's API documentation under Error Code, and try again.",
        );
    };
    let seen = address_in(msg);
    let permission = Permission::of_scope(scope).first().map(ToString::to_string);
    let facts = AdviceContext {
        address: Some(seen.unwrap_or(egress_ip)),
        permission: permission.as_deref(),
    };
    let mut cause = format!("{} {}", advice.meaning, advice.cause);
    if let Some(seen) = seen.filter(|&seen| seen != egress_ip) {
        cause = format!(
            "{cause} KuCoin saw {seen}, and {egress_ip} was expected: see egress.expected_ip in the configuration."
        );
    }
    Diagnosis::failed(advice.topic, cause, advice.fix(&facts))
}

/// Refuses a key that another account has already.
pub(crate) fn duplicate_key(account: &str, key: &str) -> Diagnosis {
    Diagnosis::failed(
        "key-taken",
        format!(
            "This key, or another one of the same KuCoin account, is registered for account {account} ({account}/{key})."
        ),
        "Use a key of another KuCoin account or sub-account, or name both scopes in one account of the rules.",
    )
}

/// A warning when `answer`, that of `GET /api/v1/accounts`, has money in the main account and nowhere else.
pub(crate) fn funds_in_main(answer: &[u8]) -> Option<Diagnosis> {
    let accounts: Vec<Map<String, Value>> = data(answer)?;
    let has_money = |account: &&Map<String, Value>| {
        text(account, "balance")
            .is_some_and(|held| held.parse::<f64>().is_ok_and(|held| held > 0.0))
    };
    let mut kinds = accounts
        .iter()
        .filter(has_money)
        .map(|account| text(account, "type"));
    let advice = advice::topic("funds-in-main")?;
    let is_main = |kind: Option<String>| kind.as_deref() == Some("main");
    // The first one apart: of an empty account all are in main, too.
    (kinds.next().is_some_and(is_main) && kinds.all(is_main)).then(|| {
        let cause = format!("{} {}", advice.meaning, advice.cause);
        Diagnosis::warning(advice.topic, cause, advice.fix(&AdviceContext::default()))
    })
}

/// Text, number or boolean as text; `None` for what is absent, null or empty.
fn text(fields: &Map<String, Value>, name: &str) -> Option<String> {
    match fields.get(name)? {
        Value::String(text) => Some(text.trim().to_owned()).filter(|text| !text.is_empty()),
        value @ (Value::Bool(_) | Value::Number(_)) => Some(value.to_string()),
        _ => None,
    }
}

/// A list, or text with commas; both forms are KuCoin's.
fn list(fields: &Map<String, Value>, name: &str) -> Vec<String> {
    let entries: Vec<&str> = match fields.get(name) {
        Some(Value::String(text)) => text.split(',').collect(),
        Some(Value::Array(values)) => values.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let entries = entries.into_iter().map(str::trim);
    entries
        .filter(|entry| !entry.is_empty())
        .map(str::to_owned)
        .collect()
}

/// "the permission Spot" or "the permissions Spot, Futures", and the names alone; `None` for none.
fn the<'p>(permissions: impl Iterator<Item = &'p Permission>) -> Option<(String, String)> {
    let names = listed(permissions);
    let word = if names.contains(',') {
        "permissions"
    } else {
        "permission"
    };
    (!names.is_empty()).then(|| (format!("the {word} {names}"), names))
}

fn listed<'p>(permissions: impl Iterator<Item = &'p Permission>) -> String {
    let words: Vec<_> = permissions.map(ToString::to_string).collect();
    words.join(", ")
}

/// Whether an entry of a whitelist has `address`: written out, as a range `a.b.c.d/n`, or with its middle hidden.
fn fits(entry: &str, address: IpAddr) -> bool {
    if let Ok(entry) = entry.parse::<IpAddr>() {
        return entry.to_canonical() == address.to_canonical();
    }
    if let Some((base, bits)) = entry.split_once('/') {
        return base
            .parse()
            .ok()
            .zip(bits.parse().ok())
            .is_some_and(|(base, bits)| in_range(base, bits, address));
    }
    let hidden = entry.split_once('*').zip(entry.rsplit_once('*'));
    hidden.is_some_and(|((start, _), (_, end))| {
        let address = address.to_string();
        start.len() + end.len() < address.len()
            && address.starts_with(start)
            && address.ends_with(end)
    })
}

/// Whether the first `bits` of both are the same.
fn in_range(base: IpAddr, bits: u32, address: IpAddr) -> bool {
    let same = |differing: u128, width: u32| {
        let rest = width.checked_sub(bits);
        rest.is_some_and(|rest| differing.checked_shr(rest).unwrap_or(0) == 0)
    };
    match (base.to_canonical(), address.to_canonical()) {
        (IpAddr::V4(base), IpAddr::V4(address)) => {
            same((base.to_bits() ^ address.to_bits()).into(), 32)
        }
        (IpAddr::V6(base), IpAddr::V6(address)) => same(base.to_bits() ^ address.to_bits(), 128),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Kucoin/kucoin-universal-sdk 1.3.0, spec/rest/api/openapi-account-account.json, `/api/v1/user/api-key`,
    /// `x-response-example`.
    const OFFICIAL: &str = r#"{
        "code": "200000",
        "data": {
            "remark": "account1",
            "apiKey": "6705f5c311545b000157d3eb",
            "apiVersion": 3,
            "permission": "General,Futures,Spot,Earn,InnerTransfer,Transfer,Margin",
            "ipWhitelist": "203.**.154,103.**.34",
            "createdAt": 1728443843000,
            "uid": 165111215,
            "isMaster": true
        }
    }"#;

    /// The same specification, `/api/v1/accounts`.
    const OFFICIAL_ACCOUNTS: &str = r#"{
        "code": "200000",
        "data": [
            {"id": "548674591753", "currency": "USDT", "type": "trade", "balance": "26.66759503", "available": "26.66759503", "holds": "0"},
            {"id": "63355cd156298d0001b66e61", "currency": "USDT", "type": "main", "balance": "0.01", "available": "0.01", "holds": "0"}
        ]
    }"#;

    /// Code, name, beginning of the cause, part of the fix.
    const REFUSED: [(&str, &str, &str, &str); 13] = [
        (
            "400003",
            "key-unknown",
            "KuCoin does not know this API key. It was deleted, has expired,",
            "create a new key",
        ),
        (
            "400004",
            "secret-or-passphrase-wrong",
            "Either the secret or the passphrase of this API key is wrong.",
            "Register the key again",
        ),
        (
            "400005",
            "secret-or-passphrase-wrong",
            "Either the secret or the passphrase of this API key is wrong.",
            "Register the key again",
        ),
        (
            "400006",
            "address-not-whitelisted",
            "KuCoin takes no requests with this API key from the address",
            "Add 203.0.113.7 to the key's",
        ),
        (
            "400007",
            "permission-missing",
            "This API key is not allowed to do this.",
            "tick the permission Futures under",
        ),
        (
            "400008",
            "key-too-old",
            "KuCoin no longer accepts API keys of this version.",
            "which will have version 3",
        ),
        (
            "400009",
            "key-version-wrong",
            "KuCoin does not accept the key version that was sent.",
            "finds the version out",
        ),
        (
            "400010",
            "account-not-allowed",
            "KuCoin does not let this account do this.",
            "Open the product",
        ),
        (
            "400301",
            "region-restricted",
            "KuCoin does not offer this in the region",
            "the country of 203.0.113.7",
        ),
        (
            "400302",
            "region-restricted",
            "KuCoin does not offer this in the region",
            "the country of 203.0.113.7",
        ),
        (
            "400303",
            "identity-unverified",
            "KuCoin asks the owner of this account to verify",
            "identity verification",
        ),
        (
            "400304",
            "identity-unverified",
            "KuCoin asks the owner of this account to verify",
            "in the master account",
        ),
        (
            "411100",
            "account-frozen",
            "KuCoin has frozen this account.",
            "support",
        ),
    ];

    const NOW_MS: i64 = 1_760_000_000_000;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn expected() -> Expected {
        Expected {
            scopes: vec![Scope::SpotMargin],
            is_read_only: false,
            allow_money_out: false,
            site: Site::Global,
            egress_ip: ip("203.0.113.7"),
            version: KeyVersion::V3,
            now_ms: NOW_MS,
        }
    }

    /// A spot key with which all is well, but for these fields.
    fn key(changed: Value) -> KeyInfo {
        let mut data = json!({
            "remark": "bots", "apiKey": "670fake", "apiVersion": 3, "permission": "General,Spot,Margin",
            "ipWhitelist": "203.0.113.7", "createdAt": NOW_MS - 90 * DAY_MS, "uid": 165_111_215, "isMaster": true,
            "siteType": "global",
        });
        let Value::Object(changed) = changed else {
            panic!()
        };
        data.as_object_mut().unwrap().extend(changed);
        KeyInfo::read(
            json!({"code": "200000", "data": data})
                .to_string()
                .as_bytes(),
        )
        .unwrap()
    }

    /// The one finding about this key.
    fn only(changed: Value, expected: &Expected) -> Diagnosis {
        let mut findings = key(changed).judge(expected);
        assert_eq!(findings.len(), 1, "{findings:?}");
        findings.remove(0)
    }

    fn refused(changed: Value, expected: &Expected) -> (&'static str, String, String) {
        let found = only(changed, expected);
        assert!(found.is_failed(), "{}", found.id);
        (found.id, found.cause, found.fix)
    }

    fn warned(changed: Value, expected: &Expected) -> (&'static str, String, String) {
        let found = only(changed, expected);
        assert!(!found.is_failed(), "{}", found.id);
        (found.id, found.cause, found.fix)
    }

    fn says(finding: &(&'static str, String, String), name: &str, cause: &str, fix: &str) {
        assert_eq!(
            (finding.0, finding.1.as_str(), finding.2.as_str()),
            (name, cause, fix)
        );
    }

    #[test]
    fn the_official_example_is_read_in_the_words_of_the_page() {
        let info = KeyInfo::read(OFFICIAL.as_bytes()).unwrap();
        assert_eq!(
            info,
            KeyInfo {
                uid: Some("165111215".to_owned()),
                is_master: true,
                sub_name: None,
                site: None,
                permissions: vec![
                    Permission::General,
                    Permission::Futures,
                    Permission::Spot,
                    Permission::Earn,
                    Permission::FlexTransfers,
                    Permission::Withdrawal,
                    Permission::Margin,
                ],
                ip_whitelist: vec!["203.**.154".to_owned(), "103.**.34".to_owned()],
                version: Some(3),
                created_at_ms: Some(1_728_443_843_000),
                expires_at_ms: None,
                third_party_app: None,
                unread: vec![],
            }
        );
        let words = listed(info.permissions.iter());
        assert_eq!(
            words,
            "General, Futures, Spot, Earn, FlexTransfers, Withdrawal, Margin"
        );
        assert_eq!(info.admits(ip("203.0.113.154")), Some(true));
        assert_eq!(info.admits(ip("203.0.113.15")), Some(false));
    }

    #[test]
    fn other_forms_of_the_answer_are_read_too() {
        let info = key(json!({
            "uid": "77", "isMaster": "false", "subName": "bot1", "ipWhitelist": ["203.0.113.7", "10.0.0.0/8"],
            "expiredAt": "1762592000000", "permission": "General, Spot ,NewThing", "siteType": null, "apiVersion": "3",
            "thirdPartyApp": false, "createdAt": "yesterday",
        }));
        assert_eq!(
            (info.uid.as_deref(), info.is_master, info.version),
            (Some("77"), false, Some(3))
        );
        assert_eq!(
            info.permissions[2],
            Permission::Other("NewThing".to_owned())
        );
        assert_eq!(info.expires_at_ms, Some(1_762_592_000_000));
        assert_eq!((info.ip_whitelist.len(), info.third_party_app), (2, None));
        assert_eq!(info.unread, ["createdAt"]);
        assert_eq!(key(json!({"expiredAt": -1})).expires_at_ms, None);
        assert_eq!(key(json!({"createdAt": i64::MIN})).created_at_ms, None);
        assert_eq!(
            key(json!({"ipWhitelist": ""})).admits(ip("203.0.113.7")),
            None
        );
        for other in [
            "<html>",
            r#"{"code":"400003","msg":"KC-API-KEY not exists"}"#,
            r#"{"code":"200000","data":{"uid":1}}"#,
        ] {
            assert_eq!(KeyInfo::read(other.as_bytes()), Err(NotKeyInfo), "{other}");
        }
    }

    #[test]
    fn a_correct_key_has_no_findings() {
        assert_eq!(key(json!({})).judge(&expected()), []);
        let read_only = Expected {
            is_read_only: true,
            ..expected()
        };
        assert_eq!(key(json!({"permission": "General"})).judge(&read_only), []);
        let money = Expected {
            allow_money_out: true,
            ..expected()
        };
        let all = json!({"permission": "General,Spot,Margin,Earn,InnerTransfer,Transfer"});
        assert_eq!(key(all).judge(&money), []);
        let sub = json!({"permission": "General,Spot,Margin", "isMaster": false, "subName": "bot1", "parentUid": 1, "expiredAt": -1});
        assert_eq!(key(sub).judge(&expected()), []);
    }

    #[test]
    fn a_key_without_the_permission_of_its_scope_is_refused() {
        let of = |scope| Expected {
            scopes: vec![scope],
            ..expected()
        };
        says(
            &refused(json!({"permission": "General"}), &of(Scope::Futures)),
            "permission-missing",
            "The key lacks the permission Futures, which scope futures needs; it has General.",
            "Tick Futures under API Management > Edit > API permissions.",
        );
        let (name, cause, _) = refused(json!({"permission": "General"}), &of(Scope::SpotMargin));
        assert_eq!(name, "permission-missing");
        assert!(
            cause.contains("the permission Spot, which scope spot-margin needs"),
            "{cause}"
        );
        let (_, _, fix) = refused(json!({"permission": "General"}), &of(Scope::Unified));
        assert!(fix.starts_with("Tick Unified under"), "{fix}");
        says(
            &warned(json!({"permission": "General,Spot"}), &expected()),
            "permission-missing",
            "The key lacks the permission Margin, so KuCoin will refuse its margin orders; it has General, Spot.",
            "Tick Margin under API Management > Edit > API permissions. Without margin orders nothing needs to be done.",
        );
        let (_, cause, _) = warned(json!({"permission": "General,Margin"}), &expected());
        assert!(cause.contains("refuse its spot orders"), "{cause}");
    }

    #[test]
    fn a_key_that_can_trade_is_refused_where_reading_is_the_purpose() {
        let read_only = Expected {
            is_read_only: true,
            ..expected()
        };
        says(
            &refused(json!({"permission": "General,Spot,Futures"}), &read_only),
            "read-only-key-can-trade",
            "The account's purpose is read-only, and the key has the permissions Spot, Futures.",
            "Leave only General ticked under API Management > Edit > API permissions.",
        );
        let (name, ..) = refused(json!({"permission": "General,Trade"}), &read_only);
        assert_eq!(name, "read-only-key-can-trade", "the word of old keys");
        let money = Expected {
            allow_money_out: true,
            ..read_only
        };
        let (name, _, fix) = refused(json!({"permission": "General,Transfer"}), &money);
        assert_eq!(
            name, "withdrawal-permission",
            "a purpose of reading moves no money"
        );
        assert!(!fix.contains("allow_money_out"), "{fix}");
    }

    #[test]
    fn a_key_that_lets_money_out_is_refused_under_the_name_of_the_page() {
        says(
            &refused(
                json!({"permission": "General,Spot,Margin,Transfer"}),
                &expected(),
            ),
            "withdrawal-permission",
            "The key has the permission Withdrawal, which sends money away without asking for a second factor.",
            "Untick Withdrawal under API Management > Edit > API permissions. If the broker is meant to move this account's money, write allow_money_out = true for it in the rules.",
        );
        let flex = refused(
            json!({"permission": "General,Spot,Margin,InnerTransfer"}),
            &expected(),
        );
        assert_eq!(flex.0, "flex-transfers-permission");
        assert!(
            flex.2.starts_with("Untick FlexTransfers under"),
            "{}",
            flex.2
        );
        let other = json!({"permission": "General,Spot,Margin,Third-party withdrawals"});
        assert_eq!(refused(other, &expected()).0, "money-out-permission");
    }

    #[test]
    fn a_trading_key_needs_an_ip_restriction_that_has_our_address() {
        let open = json!({"ipWhitelist": "", "createdAt": NOW_MS - DAY_MS});
        says(
            &refused(open, &expected()),
            "ip-restriction-missing",
            "The key has no IP restriction, so whoever gets hold of it can trade with it, and KuCoin deletes it or takes its \
             trade permissions away after 30 days without use.",
            "Enter 203.0.113.7 under API Management > Edit > IP restriction.",
        );
        let old =
            key(json!({"ipWhitelist": null, "createdAt": NOW_MS - 45 * DAY_MS})).judge(&expected());
        let names: Vec<_> = old
            .iter()
            .map(|found| (found.id, found.is_failed()))
            .collect();
        assert_eq!(
            names,
            [("ip-restriction-missing", true), ("inactivity-rule", false)]
        );
        assert!(
            old[1]
                .cause
                .starts_with("The key is 45 days old and has no IP restriction"),
            "{}",
            old[1].cause
        );
        says(
            &refused(
                json!({"ipWhitelist": "198.51.100.1,203.0.113.70"}),
                &expected(),
            ),
            "address-not-whitelisted",
            "The key's IP restriction does not have 203.0.113.7, the address that KuCoin sees; it has 198.51.100.1, 203.0.113.70.",
            "Add 203.0.113.7 under API Management > Edit > IP restriction.",
        );
        says(
            &warned(
                json!({"ipWhitelist": "203.0.113.7, 198.51.100.1"}),
                &expected(),
            ),
            "other-addresses-whitelisted",
            "The key may be used from other addresses than the broker's too: 198.51.100.1.",
            "Leave only 203.0.113.7 under API Management > Edit > IP restriction.",
        );
        let read_only = Expected {
            is_read_only: true,
            ..expected()
        };
        let reads = warned(
            json!({"ipWhitelist": "", "permission": "General"}),
            &read_only,
        );
        assert_eq!(reads.0, "ip-restriction-missing");
    }

    #[test]
    fn an_entry_fits_written_out_as_a_range_or_with_its_middle_hidden() {
        for (entry, fit) in [
            ("203.0.113.7", true),
            ("::ffff:203.0.113.7", true),
            ("203.0.113.0/24", true),
            ("0.0.0.0/0", true),
            ("203.0.113.7/32", true),
            ("203.**.7", true),
            ("203.0.113.*", true),
            ("203.0.113.8", false),
            ("203.0.112.0/24", false),
            ("203.0.113.7/33", false),
            ("203.**.17", false),
            ("20.**.7", false),
            ("203.0.113.7*7", false),
            ("2001:db8::/32", false),
            ("anywhere", false),
        ] {
            assert_eq!(fits(entry, ip("203.0.113.7")), fit, "{entry}");
        }
        assert!(fits("2001:db8::/32", ip("2001:db8::7")));
        assert!(fits("::/0", ip("2001:db8::7")));
    }

    #[test]
    fn a_key_that_ends_soon_is_refused_or_warned_of() {
        let ends_in = |ms: i64| json!({"expiredAt": NOW_MS + ms});
        says(
            &refused(ends_in(9 * DAY_MS + 1), &expected()),
            "expires-soon",
            "The key expires in 9 days. At least 14 days are asked for.",
            "Create a new key under API Management that lasts longer, and put it in this one's place.",
        );
        for (ms, cause) in [
            (DAY_MS, "The key expires in 1 day. "),
            (DAY_MS - 1, "The key expires in less than a day. "),
            (-1, "The key has expired. "),
        ] {
            let (_, told, _) = refused(ends_in(ms), &expected());
            assert!(told.starts_with(cause), "{told}");
        }
        let (name, cause, _) = warned(ends_in(14 * DAY_MS), &expected());
        assert_eq!(
            (name, cause.as_str()),
            ("expires-soon", "The key expires in 14 days.")
        );
        assert_eq!(key(ends_in(30 * DAY_MS)).judge(&expected()), []);
    }

    #[test]
    fn a_key_of_another_site_is_refused() {
        says(
            &refused(json!({"siteType": "australia"}), &expected()),
            "site-wrong",
            "The key belongs to KuCoin's site au, and the account is one of site global.",
            "Register a key of site global, or write site = \"au\" for the account in the rules.",
        );
        assert_eq!(
            warned(json!({"siteType": "mars"}), &expected()).0,
            "site-unknown"
        );
        let au = Expected {
            site: Site::Au,
            ..expected()
        };
        assert_eq!(key(json!({"siteType": "australia"})).judge(&au), []);
    }

    #[test]
    fn what_is_only_worth_knowing_is_a_warning() {
        for (changed, name, part) in [
            (
                json!({"permission": "General,Spot,Margin,Futures,Earn"}),
                "permission-unneeded",
                "the permissions Futures, Earn,",
            ),
            (
                json!({"permission": "General,Spot,Margin,Affiliate"}),
                "permission-unknown",
                "the permission Affiliate,",
            ),
            (
                json!({"thirdPartyApp": "Some App"}),
                "third-party-app",
                "application: Some App.",
            ),
            (
                json!({"apiVersion": 2}),
                "version-differs",
                "used with version 3, and KuCoin says that its version is 2.",
            ),
            (
                json!({"expiredAt": "never"}),
                "answer-unreadable",
                "KuCoin gave expiredAt in a form",
            ),
        ] {
            let (found, cause, _) = warned(changed, &expected());
            assert_eq!(found, name);
            assert!(cause.contains(part), "{cause}");
        }
    }

    #[test]
    fn refusals_come_first() {
        let worst = json!({
            "permission": "General,Futures,Transfer", "ipWhitelist": "", "siteType": "mars", "expiredAt": NOW_MS,
        });
        let findings = key(worst).judge(&expected());
        let names: Vec<_> = findings
            .iter()
            .map(|found| (found.id, found.is_failed()))
            .collect();
        let expected = [
            ("permission-missing", true),
            ("withdrawal-permission", true),
            ("ip-restriction-missing", true),
            ("expires-soon", true),
            ("site-unknown", false),
            ("permission-unneeded", false),
            ("inactivity-rule", false),
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn a_refused_key_is_told_in_the_sentences_of_the_table() {
        let ours = ip("203.0.113.7");
        let told = |code, msg| refusal(code, msg, Scope::Futures, ours);
        for (code, name, cause, fix) in REFUSED {
            let found = told(code, "");
            assert_eq!((found.id, found.is_failed()), (name, true), "{code}");
            assert!(found.cause.starts_with(cause), "{code}: {}", found.cause);
            assert!(found.fix.contains(fix), "{code}: {}", found.fix);
            let advice = advice::of(Some(Scope::Futures), code).unwrap();
            assert!(found.cause.starts_with(advice.meaning));
        }
        let elsewhere = told(
            "400006",
            "Invalid request IP, the current client IP is: 198.51.100.9.",
        );
        assert!(
            elsewhere.fix.contains("Add 198.51.100.9 to"),
            "{}",
            elsewhere.fix
        );
        assert!(elsewhere.cause.ends_with(
            "KuCoin saw 198.51.100.9, and 203.0.113.7 was expected: see egress.expected_ip in the configuration."
        ));
        let new = told("999999", "brand\u{1b}[31m new");
        assert_eq!(
            new.cause,
            "KuCoin refused the key with code 999999: brand\\u{1b}[31m new"
        );
    }

    #[test]
    fn money_in_the_main_account_alone_is_warned_of() {
        assert_eq!(funds_in_main(OFFICIAL_ACCOUNTS.as_bytes()), None);
        let accounts = |rows: &[(&str, &str)]| {
            let rows = rows.iter().map(
                |(kind, balance)| json!({"type": kind, "currency": "USDT", "balance": balance}),
            );
            funds_in_main(
                json!({"code": "200000", "data": rows.collect::<Vec<_>>()})
                    .to_string()
                    .as_bytes(),
            )
        };
        let found = accounts(&[("trade", "0"), ("main", "12.5"), ("main", "0E-8")]).unwrap();
        assert_eq!((found.id, found.is_failed()), ("funds-in-main", false));
        assert!(
            found
                .cause
                .starts_with("Balances are in the main account, not in the trading account.")
        );
        for rows in [
            &[][..],
            &[("main", "0")],
            &[("main", "1"), ("margin", "0.1")],
            &[("trade", "1")],
        ] {
            assert_eq!(accounts(rows), None, "{rows:?}");
        }
        assert_eq!(funds_in_main(br#"{"code":"400007","msg":"no"}"#), None);
    }
}
