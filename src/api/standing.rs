//! How each key is, in one word and whole sentences: what Vault, the exchange and admins say of it, put together.

use std::sync::Arc;

use crate::broker::Broker;
use crate::ids::{AccountId, KeyName};
use crate::keyring::trial::Verdict;
use crate::keyring::usage::Refusal;
use crate::keyring::{KeyStatus, Slot, Tested};
use crate::kucoin::Scope;
use crate::kucoin::key_info::{self, Finding, KeyInfo};
use crate::policy::Account;
use crate::restrictions::KeyDigest;

/// All words for how a key is.
pub const WORDS: [&str; 9] = [
    "at-risk",
    "connected",
    "degraded",
    "expiring",
    "frozen",
    "refused",
    "revoked",
    "unavailable",
    "untested",
];

/// Codes with which the exchange refuses a key whatever it signs; 400007 may be about one endpoint alone.
const REFUSED: [&str; 6] = ["400003", "400004", "400005", "400006", "400008", "400009"];

/// How one key is.
#[derive(Debug)]
pub struct Standing {
    /// Its account.
    pub account: AccountId,
    /// Its name.
    pub name: KeyName,
    /// What it serves, by the rules.
    pub scopes: Vec<Scope>,
    /// One of [`WORDS`].
    pub status: &'static str,
    /// Why, a sentence for each thing; none: all is well.
    pub reasons: Vec<String>,
    /// The version in memory.
    pub version: Option<u64>,
    /// What the exchange told about it.
    pub info: Option<Arc<KeyInfo>>,
    /// Whether its whitelist has our address; unknown before its test, and without a whitelist.
    pub is_whitelisted: Option<bool>,
    /// When the exchange last took a request that it signed: Unix time in milliseconds.
    pub used_ms: Option<i64>,
    /// When it was last tested: Unix time in milliseconds.
    pub tested_ms: Option<i64>,
    /// SHA-256 of its id.
    pub id: Option<KeyDigest>,
    /// The same; where none is in memory, of the key that was there last.
    pub last: Option<KeyDigest>,
}

/// Every key that the rules name.
pub fn standings(broker: &Broker) -> Vec<Standing> {
    let keys = broker.keyring.status();
    keys.into_iter().map(|key| of(broker, key)).collect()
}

/// One of them.
pub fn standing(broker: &Broker, account: &AccountId, name: &KeyName) -> Option<Standing> {
    let mut keys = broker.keyring.status().into_iter();
    keys.find(|key| key.account == *account && key.name == *name)
        .map(|key| of(broker, key))
}

fn of(broker: &Broker, key: KeyStatus) -> Standing {
    let KeyStatus {
        account,
        name,
        slot,
        age,
        is_too_old,
        tested,
        last,
    } = key;
    let policy = broker.policy();
    let entry = policy.accounts().find(|entry| entry.id == account);
    let mut standing = Standing {
        scopes: entry.map(|entry| scopes(entry, &name)).unwrap_or_default(),
        account,
        name,
        status: "untested",
        reasons: Vec::new(),
        version: None,
        info: None,
        is_whitelisted: None,
        used_ms: None,
        tested_ms: None,
        id: None,
        last,
    };
    let frozen = frozen(broker, &standing.account);
    match slot {
        Slot::Gone(reason) => standing.is(absent(broker, &standing), Some(reason)),
        Slot::Waiting(reason) => {
            let reason = format!("waiting for Vault: {reason}");
            standing.is(absent(broker, &standing), Some(reason));
        }
        Slot::Ready {
            key,
            usage,
            version,
            problem,
            outage,
            ..
        } => {
            standing.version = Some(version);
            standing.id = Some(KeyDigest(key.id_sha256()));
            standing.used_ms = usage.accepted_ms();
            if standing.used_ms.is_some() {
                standing.is("connected", None);
            }
            let is_mended = |refusal: &Refusal| {
                tested.as_ref().is_some_and(|tested| {
                    tested.report.verdict == Verdict::Good && tested.at_ms > refusal.at_ms
                })
            };
            if let Some(refusal) = usage.refusal().filter(|refusal| !is_mended(refusal)) {
                let scope = standing.scopes.first().copied();
                let scope = scope.unwrap_or(Scope::SpotMargin);
                let ip = broker.proof.expected();
                let found = key_info::refusal(&refusal.code, "", scope, ip);
                let is_final = REFUSED.contains(&refusal.code.as_str());
                let status = if is_final { "refused" } else { "degraded" };
                standing.is(status, Some(sentence(&found)));
            }
            if let Some(tested) = tested {
                standing.heed(broker, &tested);
            }
            let unused = problem.map(|problem| format!("a newer version is not used: {problem}"));
            standing.is_wrong("degraded", unused);
            let silent = outage.map(|outage| {
                let age_s = age.unwrap_or_default().as_secs();
                format!("Vault last confirmed it {age_s} s ago: {outage}")
            });
            standing.is_wrong("degraded", silent);
            let old = "too old for what adds risk; cancels and reads go on".to_owned();
            standing.is_wrong("degraded", is_too_old.then_some(old));
        }
    }
    standing.is_wrong("frozen", frozen);
    standing
}

/// From worst to best.
const ORDER: [&str; 9] = [
    "revoked",
    "unavailable",
    "refused",
    "frozen",
    "expiring",
    "at-risk",
    "degraded",
    "connected",
    "untested",
];

impl Standing {
    /// Takes the worse of two words, and keeps every reason.
    fn is(&mut self, status: &'static str, reason: Option<String>) {
        let rank = |word: &str| ORDER.iter().position(|known| *known == word);
        if rank(status) < rank(self.status) {
            self.status = status;
        }
        if let Some(reason) = reason
            && !self.reasons.contains(&reason)
        {
            self.reasons.push(reason);
        }
    }

    fn is_wrong(&mut self, status: &'static str, reason: Option<String>) {
        if reason.is_some() {
            self.is(status, reason);
        }
    }

    /// Takes in what the last test said.
    fn heed(&mut self, broker: &Broker, tested: &Tested) {
        let Tested {
            at_ms,
            report,
            unanswered,
        } = tested;
        self.tested_ms = Some(*at_ms);
        let has_signed_since = self.used_ms.is_some_and(|used_ms| used_ms > *at_ms);
        match &report.verdict {
            Verdict::Good => self.is("connected", None),
            // A key that has signed since is not refused any more.
            Verdict::Refused(_) if has_signed_since => {}
            Verdict::Refused(reason) => {
                let found = report.findings.iter().any(|finding| finding.is_refusal);
                self.is("refused", (!found).then(|| reason.clone()));
            }
            Verdict::Unclear(reason) if self.used_ms.is_some() => {
                self.is("connected", Some(no_answer(reason)));
            }
            Verdict::Unclear(reason) => self.is("degraded", Some(no_answer(reason))),
        }
        if let Some(reason) = unanswered {
            self.is("untested", Some(no_answer(reason)));
        }
        // What the exchange said when it refused the key is over with that; what it told about the key is not.
        let is_over = has_signed_since && report.info.is_none();
        let refusals = report.findings.iter().filter(|finding| {
            finding.is_refusal && !is_over && finding.name != key_info::EXPIRES_SOON
        });
        for finding in refusals {
            let status = match finding.name {
                "inactivity-rule" | "ip-restriction-missing" => "at-risk",
                _ => "degraded",
            };
            self.is(status, Some(sentence(finding)));
        }
        // Time has passed since the test.
        let now_ms = broker.clock.wall_ms();
        let expiry = report.info.as_ref().and_then(|info| info.expiry(now_ms));
        self.is_wrong("expiring", expiry.as_ref().map(sentence));
        self.is_whitelisted = report
            .info
            .as_ref()
            .and_then(|info| info.admits(broker.proof.expected()));
        self.info.clone_from(&report.info);
    }
}

fn no_answer(reason: &str) -> String {
    format!("the last test has no answer: {reason}")
}

/// The word for a key that is not in memory.
fn absent(broker: &Broker, standing: &Standing) -> &'static str {
    let Standing {
        account,
        name,
        last,
        ..
    } = standing;
    let is_revoked = match last {
        Some(key) => broker
            .restrictions
            .revoked_in(account, name, *key)
            .is_some(),
        None => broker.restrictions.has_revoked_unseen(account, name),
    };
    if is_revoked { "revoked" } else { "unavailable" }
}

/// The scopes that a key serves, by the rules.
pub fn scopes(account: &Account, name: &KeyName) -> Vec<Scope> {
    let serves = account.keys.iter().filter(|(_, named)| *named == name);
    serves.map(|(scope, _)| *scope).collect()
}

fn sentence(finding: &Finding) -> String {
    format!("{} {}", finding.cause, finding.fix)
}

fn frozen(broker: &Broker, account: &AccountId) -> Option<String> {
    let how = if broker.restrictions.is_halted(account) {
        "halted; `credbroker resume` lifts that"
    } else if broker.restrictions.is_frozen(account) {
        "frozen; `credbroker keys thaw` lifts that"
    } else {
        return None;
    };
    Some(format!(
        "the account is {how}; what adds risk is refused, cancels and reads go on"
    ))
}
