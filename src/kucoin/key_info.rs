//! What KuCoin returns about an API key, and whether the key fits its account. Pure.
//!
//! Source: KuCoin API documentation, "Get Apikey Info" (`GET /api/v1/user/api-key`, and its equivalent for unified accounts), change
//! log of 2025-11-14 and 2026-01-27 for its later fields, and support article 360015102174 for the 30-day rule.

use std::fmt;
use std::net::IpAddr;

use serde_json::{Map, Value};

use super::advice::{self, AdviceContext};
use super::broker_query::{address_in, data};
use super::{KeyVersion, Scope, Site};
use crate::base::diagnosis::Diagnosis;
use crate::base::text::clean;

/// A key that expires sooner fails the check: this leaves time to replace it.
const EXPIRY_REFUSED_DAYS: i64 = 14;

/// A key that expires sooner causes a warning.
const EXPIRY_WARNED_DAYS: i64 = 30;

/// KuCoin deletes a trading key without IP restriction, or its trade permissions, after this long without use.
const INACTIVITY_DAYS: i64 = 30;

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// Where permissions, addresses and dates of a key are changed on KuCoin's site.
const PAGE: &str = "API Management > Edit";

/// What KuCoin returns about a key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct KeyInfo {
    /// KuCoin's number of the account; `None` if the answer has none.
    pub(crate) uid: Option<String>,
    /// Whether the key belongs to the master account, not to a sub-account.
    pub(crate) is_master: bool,
    /// Name of the sub-account.
    pub(crate) sub_name: Option<String>,
    /// KuCoin's word for the site, such as `global`; `None` if the answer has none.
    pub(crate) site: Option<String>,
    /// What the key may do.
    pub(crate) permissions: Vec<Permission>,
    /// Addresses that may use it, as KuCoin writes them, partly masked: `203.**.154`. Empty: any address.
    pub(crate) ip_whitelist: Vec<String>,
    /// Version of the key.
    pub(crate) version: Option<i64>,
    /// When it was created: Unix milliseconds.
    pub(crate) created_at_ms: Option<i64>,
    /// When it expires: Unix milliseconds; `None`: never.
    pub(crate) expires_at_ms: Option<i64>,
    /// The third-party application that it is linked to.
    pub(crate) third_party_app: Option<String>,
    /// Fields whose value does not have the documented format.
    pub(crate) unread: Vec<&'static str>,
}

/// What a key may do. `Display` uses the words of KuCoin's page, which differ from those of its answers.
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
    /// An unknown one, in KuCoin's word.
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

    /// Whether it allows trading; an unknown permission is judged by its name, such as the "Trade" of old keys.
    fn trades(&self) -> bool {
        match self {
            Self::Futures | Self::LeadtradeFutures | Self::Margin | Self::Spot | Self::Unified => {
                true
            }
            Self::Other(word) => word.to_ascii_lowercase().contains("trad"),
            Self::Earn | Self::FlexTransfers | Self::General | Self::Withdrawal => false,
        }
    }

    /// Whether it allows moving money out; an unknown permission is judged by its name, such as "Third-party withdrawals".
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

    /// The scope that it belongs to, if any.
    fn scope(&self) -> Option<Scope> {
        match self {
            Self::Futures | Self::LeadtradeFutures => Some(Scope::Futures),
            Self::Margin | Self::Spot => Some(Scope::SpotMargin),
            Self::Unified => Some(Scope::Unified),
            _ => None,
        }
    }

    /// Permissions needed to trade in `scope`; the first one is needed for most orders.
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

/// The answer is not one of `user/api-key`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "unexpected answer to user/api-key: expected code 200000 and `data` with `permission`, as KuCoin documents"
)]
pub(crate) struct NotKeyInfo;

/// What a key must fit.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    /// Scopes that it is used for.
    pub(crate) scopes: Vec<Scope>,
    /// Whether its account is read-only.
    pub(crate) is_read_only: bool,
    /// Whether the rules allow it to move money out.
    pub(crate) allow_money_out: bool,
    /// The account's site.
    pub(crate) site: Site,
    /// The expected egress address (`egress.expected_ip`); KuCoin may see another one.
    pub(crate) egress_ip: IpAddr,
    /// The version that the request was signed with.
    pub(crate) version: KeyVersion,
    /// Now: Unix milliseconds.
    pub(crate) now_ms: i64,
}

impl KeyInfo {
    /// Reads the body of an answer of `user/api-key`. Only `permission` is required, so that a new format of other fields does
    /// not fail a key.
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
        // A time before 1970 is ignored, so that the age in days cannot overflow.
        let created_at_ms = number("createdAt").filter(|&at| at > 0);
        // Sub-account keys are created with -1 for "never".
        let expires_at_ms = number("expiredAt").filter(|&at| at > 0);
        // KuCoin's answers about sub-account keys of exchange brokers use the second name.
        let permissions = ["permission", "permissions"]
            .map(|name| list(&fields, name))
            .concat();
        if permissions.is_empty() {
            return Err(NotKeyInfo);
        }
        let sub_name = text(&fields, "subName");
        let is_master = text(&fields, "isMaster").map_or(sub_name.is_none(), |text| text == "true");
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
            third_party_app: text(&fields, "thirdPartyApp").filter(|app| app != "false"),
            unread,
        })
    }

    /// Whether the key's whitelist includes `address`; `None` without a whitelist.
    ///
    /// A masked entry matches if its visible parts match, and a range matches if it contains the address. KuCoin documents
    /// neither; whether a signed request succeeds is better evidence.
    pub(crate) fn admits(&self, address: IpAddr) -> Option<bool> {
        let mut entries = self.ip_whitelist.iter().map(String::as_str);
        (!self.ip_whitelist.is_empty()).then(|| entries.any(|entry| fits(entry, address)))
    }

    /// Whether the key can trade.
    pub(crate) fn can_trade(&self) -> bool {
        self.permissions.iter().any(Permission::trades)
    }

    /// Findings about a key that does not fit `expected`, failures first; empty if it fits.
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
        findings.extend(self.other_warnings(expected));
        findings.sort_by_key(|finding| !finding.is_failed());
        findings
    }

    fn has(&self, permission: &Permission) -> bool {
        self.permissions.contains(permission)
    }

    fn site(&self, expected: Site) -> Option<Diagnosis> {
        let reported = self.site.as_deref()?;
        // Source: KuCoin API documentation, "Authentication", X-SITE-TYPE, for the first two; the others are not documented.
        let site = match reported.to_ascii_lowercase().as_str() {
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
                    "The key belongs to KuCoin site {site}, but the account's site is {expected}."
                ),
                format!(
                    "Register a key of site {expected}, or set site = \"{site}\" for the account in the rules."
                ),
            )),
            None => Some(Diagnosis::warning(
                "site-unknown",
                format!(
                    "KuCoin reports site {reported:?} for the key, which credbroker does not recognize."
                ),
                format!("Check that the key was created on the account's KuCoin site, {expected}."),
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
            // If the scope's permissions are all missing, only the first one is reported.
            .filter(|(index, _)| !has_none || *index == 0)
            .map(|(_, one)| {
                let has = listed(self.permissions.iter());
                let fix = format!("Tick {one} under {PAGE} > API permissions.");
                if has_none {
                    let cause = format!("The key lacks the permission {one}, which scope {scope} needs; it has {has}.");
                    return Diagnosis::failed("permission-missing", cause, fix);
                }
                let kind = one.to_string().to_lowercase();
                let cause = format!("The key lacks the permission {one}, so KuCoin will reject its {kind} orders; it has {has}.");
                Diagnosis::warning("permission-missing", cause, format!("{fix} If you send no {kind} orders, ignore this warning."))
            })
            .collect()
    }

    /// Permissions that a read-only key must not have, except those that move money, which `money_out` reports.
    fn more_than_reading(&self) -> Option<Diagnosis> {
        let beyond = |one: &&Permission| one.trades() || **one == Permission::Earn;
        let (more, _) = permission_list(self.permissions.iter().filter(beyond))?;
        Some(Diagnosis::failed(
            "read-only-key-can-trade",
            format!("The account's purpose is read-only, but the key has {more}."),
            format!("Leave only General ticked under {PAGE} > API permissions."),
        ))
    }

    fn unneeded(&self, expected: &Expected) -> Option<Diagnosis> {
        let unneeded = |one: &&Permission| match one.scope() {
            Some(scope) => !expected.scopes.contains(&scope),
            None => **one == Permission::Earn && !expected.allow_money_out,
        };
        let (more, names) = permission_list(self.permissions.iter().filter(unneeded))?;
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
        let moving_money = self.permissions.iter().filter(|one| one.moves_money());
        let found = moving_money.map(|one| {
            let (name, effect) = match one {
                Permission::FlexTransfers => (
                    "flex-transfers-permission",
                    "allows transfers between the owner's accounts",
                ),
                Permission::Withdrawal => (
                    "withdrawal-permission",
                    "allows withdrawals without a second factor",
                ),
                _ => ("money-out-permission", "appears to allow moving money out"),
            };
            let cause = format!("The key has the permission {one}, which {effect}.");
            let mut fix = format!("Untick {one} under {PAGE} > API permissions.");
            if !expected.is_read_only {
                fix += " If the broker should be able to move this account's money, set allow_money_out = true for the account in the rules.";
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
                "The key has no IP restriction, so anyone who obtains it can read this account.",
                enter,
            )],
            None => {
                let cause = "The key has no IP restriction, so anyone who obtains it can trade with it, and KuCoin deletes it \
                             or removes its trade permissions after 30 days without use.";
                let mut found = vec![Diagnosis::failed(
                    "ip-restriction-missing",
                    cause,
                    enter.clone(),
                )];
                let age = self.created_at_ms.map(|at| (expected.now_ms - at) / DAY_MS);
                found.extend(age.filter(|&age| age >= INACTIVITY_DAYS).map(|age| {
                    let cause = format!(
                        "The key is {age} days old and has no IP restriction: after 30 days without use KuCoin deletes it or \
                         removes its trade permissions."
                    );
                    Diagnosis::warning("inactivity-rule", cause, enter)
                }));
                found
            }
            Some(false) => vec![Diagnosis::failed(
                "address-not-whitelisted",
                format!(
                    "The key's IP restriction does not include {ip}, the broker's expected egress address (egress.expected_ip); it includes {}.",
                    self.ip_whitelist.join(", ")
                ),
                format!(
                    "If {ip} is right, add it under {PAGE} > IP restriction; otherwise correct egress.expected_ip."
                ),
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
                        "The key can also be used from addresses other than the broker's: {others}."
                    )
                };
                let fix = format!("Leave only {ip} under {PAGE} > IP restriction.");
                let warning = (!others.is_empty())
                    .then(|| Diagnosis::warning("other-addresses-whitelisted", cause(), fix));
                warning.into_iter().collect()
            }
        }
    }

    /// The finding about a key that has expired or expires soon.
    pub(crate) fn expiry(&self, now_ms: i64) -> Option<Diagnosis> {
        let left_ms = self.expires_at_ms?.saturating_sub(now_ms);
        let when = match left_ms.div_euclid(DAY_MS) {
            _ if self.has_expired(now_ms) => "has expired".to_owned(),
            0 => "expires in less than a day".to_owned(),
            1 => "expires in 1 day".to_owned(),
            days => format!("expires in {days} days"),
        };
        let fix = "Create a new key with a later expiry under API Management, and replace this one with it.";
        let cause = format!("The key {when}.");
        if self.has_expired(now_ms) {
            let cause = format!("{cause} KuCoin rejects all requests with it.");
            Some(Diagnosis::failed("expires-soon", cause, fix))
        } else if left_ms < EXPIRY_REFUSED_DAYS * DAY_MS {
            let cause = format!("{cause} At least {EXPIRY_REFUSED_DAYS} days are required.");
            Some(Diagnosis::failed("expires-soon", cause, fix))
        } else if left_ms < EXPIRY_WARNED_DAYS * DAY_MS {
            Some(Diagnosis::warning("expires-soon", cause, fix))
        } else {
            None
        }
    }

    pub(crate) fn has_expired(&self, now_ms: i64) -> bool {
        self.expires_at_ms.is_some_and(|at_ms| at_ms <= now_ms)
    }

    fn other_warnings(&self, expected: &Expected) -> Vec<Diagnosis> {
        let mut found = Vec::new();
        let used = match expected.version {
            KeyVersion::V2 => 2,
            KeyVersion::V3 => 3,
        };
        found.extend(self.version.filter(|&version| version != used).map(|version| {
            let cause = format!(
                "The broker uses the key as API key version {used}, but KuCoin reports API key version {version}."
            );
            let fix = match version {
                2 | 3 => "Register the key again; registration detects the API key version.",
                _ => "Create a new key under API Management (new keys have version 3) and register it.",
            };
            Diagnosis::warning("version-differs", cause, fix)
        }));
        found.extend(self.third_party_app.as_ref().map(|app| {
            Diagnosis::warning(
                "third-party-app",
                format!("The key is linked to a third-party application: {app}."),
                "Create a separate key of the type API Trading for the broker under API Management.",
            )
        }));
        let unknown = |one: &&Permission| {
            matches!(one, Permission::Other(_)) && !one.moves_money() && !one.trades()
        };
        found.extend(permission_list(self.permissions.iter().filter(unknown)).map(|(unknown, _)| {
            Diagnosis::warning(
                "permission-unknown",
                format!("The key has {unknown}, which credbroker does not recognize."),
                format!("Check what it allows, and untick it under {PAGE} > API permissions unless it is needed."),
            )
        }));
        if !self.unread.is_empty() {
            found.push(Diagnosis::warning(
                "answer-unreadable",
                format!(
                    "KuCoin returned {} in an unexpected format, so credbroker could not check this.",
                    self.unread.join(", ")
                ),
                "Check this under API Management, and report the unexpected format as a credbroker bug.",
            ));
        }
        found
    }
}

/// The finding about a key whose request in `scope` KuCoin rejected. `egress_ip` is the expected egress address; an address
/// in the message takes precedence.
pub(crate) fn refusal(code: &str, msg: &str, scope: Scope, egress_ip: IpAddr) -> Diagnosis {
    let Some(advice) = advice::of_message(scope, code, msg) else {
        // Text from the exchange is printed to a terminal.
        let (code, msg) = (clean(code, 64), clean(msg, 200));
        return Diagnosis::failed(
            "refused",
            format!("KuCoin rejected the key with code {code}: {msg}"),
            "Look the code up in KuCoin's API documentation under Error Code, then try again.",
        );
    };
    let permission = Permission::of_scope(scope).first().map(ToString::to_string);
    let facts = AdviceContext {
        address: Some(address_in(msg).unwrap_or(egress_ip)),
        expected: Some(egress_ip),
        permission: permission.as_deref(),
    };
    let cause = format!("{} {}", advice.meaning, advice.cause_with(&facts));
    Diagnosis::failed(advice.topic, cause, advice.fix(&facts))
}

/// The finding about a key whose KuCoin account is already registered for another account.
pub(crate) fn duplicate_key(account: &str, key: &str) -> Diagnosis {
    Diagnosis::failed(
        "key-taken",
        format!(
            "This key, or another one of the same KuCoin account, is already registered for account {account} ({account}/{key})."
        ),
        "Use a key of another KuCoin account or sub-account, or merge the two accounts in the rules: list the scopes of both \
         under one account.",
    )
}

/// A warning if `answer`, of `GET /api/v1/accounts`, shows funds only in the main account.
pub(crate) fn funds_in_main(answer: &[u8]) -> Option<Diagnosis> {
    let accounts: Vec<Map<String, Value>> = data(answer)?;
    let has_funds = |account: &&Map<String, Value>| {
        text(account, "balance")
            .is_some_and(|text| text.parse::<f64>().is_ok_and(|balance| balance > 0.0))
    };
    let mut kinds = accounts
        .iter()
        .filter(has_funds)
        .map(|account| text(account, "type"));
    let advice = advice::topic("funds-in-main")?;
    let is_main = |kind: Option<String>| kind.as_deref() == Some("main");
    // `all` is also true without any funds, so the first one is checked separately.
    (kinds.next().is_some_and(is_main) && kinds.all(is_main)).then(|| {
        let cause = format!("{} {}", advice.meaning, advice.cause);
        Diagnosis::warning(advice.topic, cause, advice.fix(&AdviceContext::default()))
    })
}

/// Text, number or boolean as text; `None` if it is missing, null or empty.
fn text(fields: &Map<String, Value>, name: &str) -> Option<String> {
    match fields.get(name)? {
        Value::String(text) => Some(text.trim().to_owned()).filter(|text| !text.is_empty()),
        value @ (Value::Bool(_) | Value::Number(_)) => Some(value.to_string()),
        _ => None,
    }
}

/// A list, or text with commas; KuCoin uses both.
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

/// "the permission Spot" or "the permissions Spot, Futures", and only the names; `None` if there are none.
fn permission_list<'p>(
    permissions: impl Iterator<Item = &'p Permission>,
) -> Option<(String, String)> {
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

/// Whether a whitelist entry matches `address`: written in full, as a range `a.b.c.d/n`, or with masked parts.
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

/// Whether the first `bits` bits of both addresses are the same.
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

    /// Code, id, beginning of the cause, part of the fix.
    const REFUSED: [(&str, &str, &str, &str); 13] = [
        (
            "400003",
            "key-unknown",
            "KuCoin reports that this API key does not exist. The key was deleted, has expired,",
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
            "The request's IP address is not whitelisted for this API key.",
            "Add 203.0.113.7 to the key's",
        ),
        (
            "400007",
            "permission-missing",
            "This API key lacks a permission that the request needs.",
            "tick the permission Futures under",
        ),
        (
            "400008",
            "key-too-old",
            "KuCoin no longer accepts API keys of this version for this request.",
            "new keys have version 3",
        ),
        (
            "400009",
            "key-version-wrong",
            "KuCoin rejected the API key version that was sent.",
            "registration detects the API key version",
        ),
        (
            "400010",
            "account-not-allowed",
            "This KuCoin account is not allowed to make this request.",
            "Enable the product",
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
            "KuCoin requires the owner of this account to verify",
            "identity verification",
        ),
        (
            "400304",
            "identity-unverified",
            "KuCoin requires the owner of this account to verify",
            "in the master account",
        ),
        (
            "411100",
            "account-frozen",
            "This KuCoin account is frozen.",
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

    /// A correct spot key, except for these fields.
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

    fn assert_finding(
        finding: &(&'static str, String, String),
        name: &str,
        cause: &str,
        fix: &str,
    ) {
        assert_eq!(
            (finding.0, finding.1.as_str(), finding.2.as_str()),
            (name, cause, fix)
        );
    }

    #[test]
    fn official_example_is_shown_in_the_words_of_the_page() {
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
    fn other_formats_of_the_answer_are_read_too() {
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
    fn key_without_the_permission_of_its_scope_is_rejected() {
        let of = |scope| Expected {
            scopes: vec![scope],
            ..expected()
        };
        assert_finding(
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
        assert_finding(
            &warned(json!({"permission": "General,Spot"}), &expected()),
            "permission-missing",
            "The key lacks the permission Margin, so KuCoin will reject its margin orders; it has General, Spot.",
            "Tick Margin under API Management > Edit > API permissions. If you send no margin orders, ignore this warning.",
        );
        let (_, cause, _) = warned(json!({"permission": "General,Margin"}), &expected());
        assert!(cause.contains("reject its spot orders"), "{cause}");
    }

    #[test]
    fn key_that_can_trade_is_rejected_for_a_read_only_account() {
        let read_only = Expected {
            is_read_only: true,
            ..expected()
        };
        assert_finding(
            &refused(json!({"permission": "General,Spot,Futures"}), &read_only),
            "read-only-key-can-trade",
            "The account's purpose is read-only, but the key has the permissions Spot, Futures.",
            "Leave only General ticked under API Management > Edit > API permissions.",
        );
        let (name, ..) = refused(json!({"permission": "General,Trade"}), &read_only);
        assert_eq!(
            name, "read-only-key-can-trade",
            "the permission of old keys"
        );
        let money = Expected {
            allow_money_out: true,
            ..read_only
        };
        let (name, _, fix) = refused(json!({"permission": "General,Transfer"}), &money);
        assert_eq!(
            name, "withdrawal-permission",
            "a read-only account moves no money"
        );
        assert!(!fix.contains("allow_money_out"), "{fix}");
    }

    #[test]
    fn key_that_can_move_money_out_is_rejected_and_the_page_name_shown() {
        assert_finding(
            &refused(
                json!({"permission": "General,Spot,Margin,Transfer"}),
                &expected(),
            ),
            "withdrawal-permission",
            "The key has the permission Withdrawal, which allows withdrawals without a second factor.",
            "Untick Withdrawal under API Management > Edit > API permissions. If the broker should be able to move this account's money, set allow_money_out = true for the account in the rules.",
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
    fn trading_key_needs_an_ip_restriction_with_the_egress_address() {
        let open = json!({"ipWhitelist": "", "createdAt": NOW_MS - DAY_MS});
        assert_finding(
            &refused(open, &expected()),
            "ip-restriction-missing",
            "The key has no IP restriction, so anyone who obtains it can trade with it, and KuCoin deletes it or removes its \
             trade permissions after 30 days without use.",
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
        assert_finding(
            &refused(
                json!({"ipWhitelist": "198.51.100.1,203.0.113.70"}),
                &expected(),
            ),
            "address-not-whitelisted",
            "The key's IP restriction does not include 203.0.113.7, the broker's expected egress address (egress.expected_ip); it includes \
             198.51.100.1, 203.0.113.70.",
            "If 203.0.113.7 is right, add it under API Management > Edit > IP restriction; otherwise correct egress.expected_ip.",
        );
        assert_finding(
            &warned(
                json!({"ipWhitelist": "203.0.113.7, 198.51.100.1"}),
                &expected(),
            ),
            "other-addresses-whitelisted",
            "The key can also be used from addresses other than the broker's: 198.51.100.1.",
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
    fn whitelist_entry_matches_in_full_as_a_range_or_masked() {
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
    fn key_that_expires_soon_is_rejected_or_causes_a_warning() {
        let expires_in = |ms: i64| json!({"expiredAt": NOW_MS + ms});
        assert_finding(
            &refused(expires_in(9 * DAY_MS + 1), &expected()),
            "expires-soon",
            "The key expires in 9 days. At least 14 days are required.",
            "Create a new key with a later expiry under API Management, and replace this one with it.",
        );
        for (ms, cause) in [
            (DAY_MS, "The key expires in 1 day. "),
            (DAY_MS - 1, "The key expires in less than a day. "),
            (-1, "The key has expired. "),
        ] {
            let (_, found, _) = refused(expires_in(ms), &expected());
            assert!(found.starts_with(cause), "{found}");
        }
        let (name, cause, _) = warned(expires_in(14 * DAY_MS), &expected());
        assert_eq!(
            (name, cause.as_str()),
            ("expires-soon", "The key expires in 14 days.")
        );
        assert_eq!(key(expires_in(30 * DAY_MS)).judge(&expected()), []);
    }

    #[test]
    fn key_of_another_site_is_rejected() {
        assert_finding(
            &refused(json!({"siteType": "australia"}), &expected()),
            "site-wrong",
            "The key belongs to KuCoin site au, but the account's site is global.",
            "Register a key of site global, or set site = \"au\" for the account in the rules.",
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
    fn minor_findings_are_warnings() {
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
                "as API key version 3, but KuCoin reports API key version 2.",
            ),
            (
                json!({"expiredAt": "never"}),
                "answer-unreadable",
                "KuCoin returned expiredAt in an unexpected format",
            ),
        ] {
            let (found, cause, _) = warned(changed, &expected());
            assert_eq!(found, name);
            assert!(cause.contains(part), "{cause}");
        }
    }

    #[test]
    fn failures_come_first() {
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
    fn rejected_key_is_explained_with_the_advice_for_its_code() {
        let ours = ip("203.0.113.7");
        let finding = |code, msg| refusal(code, msg, Scope::Futures, ours);
        for (code, name, cause, fix) in REFUSED {
            let found = finding(code, "");
            assert_eq!((found.id, found.is_failed()), (name, true), "{code}");
            assert!(found.cause.starts_with(cause), "{code}: {}", found.cause);
            assert!(found.fix.contains(fix), "{code}: {}", found.fix);
            let advice = advice::of(Some(Scope::Futures), code).unwrap();
            assert!(found.cause.starts_with(advice.meaning));
        }
        let elsewhere = finding(
            "400006",
            "Invalid request IP, the current client IP is: 198.51.100.9.",
        );
        assert_eq!(
            elsewhere.fix,
            "Find out which address is right. If it is 203.0.113.7, correct the route by which the broker's requests leave, and do not \
             whitelist 198.51.100.9. If it is 198.51.100.9, set egress.expected_ip to it and add it to the key's addresses under API \
             Management > Edit > IP restriction."
        );
        let both = " KuCoin saw 198.51.100.9, not the expected 203.0.113.7.";
        assert!(elsewhere.cause.ends_with(both), "{}", elsewhere.cause);
        let mapped = finding("400006", "current ip: ::ffff:203.0.113.7");
        assert!(mapped.fix.contains("Add 203.0.113.7 to"), "{}", mapped.fix);
        let new = finding("999999", "brand\u{1b}[31m new");
        assert_eq!(
            new.cause,
            "KuCoin rejected the key with code 999999: brand\\u{1b}[31m new"
        );
    }

    #[test]
    fn funds_only_in_the_main_account_cause_a_warning() {
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
                .starts_with("The funds are in the main account, not in the trading account.")
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
