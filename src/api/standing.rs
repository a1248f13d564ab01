//! How each key is, in one word and whole sentences: what Vault, the exchange and admins say of it, put together.

use std::sync::Arc;

use crate::broker::Broker;
use crate::ids::{AccountId, KeyName};
use crate::keyring::trial::Verdict;
use crate::keyring::usage::Refusal;
use crate::keyring::vault::Hold;
use crate::keyring::{KeyStatus, Slot, Tested};
use crate::kucoin::key_info::{Finding, KeyInfo};
use crate::kucoin::{Scope, advice};
use crate::policy::Account;
use crate::restrictions::KeyDigest;

/// All words for how a key is, from worst to best.
pub const WORDS: [&str; 9] = [
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

/// What a key lacks for one request, and may have for another.
const PERMISSION_MISSING: &str = "permission-missing";

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
    /// Those of the reasons that keep it from serving as it should, whatever the exchange says.
    pub troubles: Vec<String>,
    /// The version in memory.
    pub version: Option<u64>,
    /// What the exchange told about it.
    pub info: Option<Arc<KeyInfo>>,
    /// Whether its whitelist has our address; unknown before its test, and without a whitelist.
    pub is_whitelisted: Option<bool>,
    /// When the exchange last took a request that it signed: Unix time in milliseconds.
    pub used_ms: Option<i64>,
    /// When it was last tested, and the exchange answered: Unix time in milliseconds.
    pub tested_ms: Option<i64>,
    /// SHA-256 of its id.
    pub id: Option<KeyDigest>,
    /// The same; where none is in memory, of the last one that was.
    pub last: Option<KeyDigest>,
    /// What the reasons are about, so that none is told twice.
    topics: Vec<&'static str>,
    /// Whether the account has a partner where it signs.
    pub needs_partner_key: bool,
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

/// What keeps a key from serving as it should, as far as Vault and admins have a say in it.
pub fn troubles(key: &KeyStatus) -> Vec<String> {
    match &key.slot {
        Slot::Gone(reason) => vec![format!("not available: {reason}")],
        Slot::Waiting(reason) => vec![format!("waiting for Vault: {reason}")],
        Slot::Ready {
            version,
            problem,
            outage,
            ..
        } => {
            let serves_on = |problem: &String| format!("version {version} serves on: {problem}");
            let mut troubles: Vec<_> = key.noted.restricted.iter().cloned().collect();
            troubles.extend(key.noted.hold.map(|hold| held(key, &hold, *version)));
            troubles.extend(problem.iter().map(serves_on));
            let what = if key.is_too_old {
                "too old for what adds risk"
            } else {
                "serves on"
            };
            // Too old without an outage: the machine has slept.
            let why = outage
                .as_deref()
                .or_else(|| key.is_too_old.then_some("not asked since"));
            troubles.extend(why.map(|why| {
                let age_s = key.age.unwrap_or_default().as_secs();
                format!("{what}; Vault last confirmed it {age_s} s ago: {why}")
            }));
            troubles
        }
    }
}

/// What an admin holds in use, and what ends that.
fn held(key: &KeyStatus, hold: &Hold, version: u64) -> String {
    let (account, name) = (&key.account, &key.name);
    let other = if version == hold.version {
        format!("version {} is not used", hold.newest)
    } else {
        format!("version {version}, written later, is used instead")
    };
    format!(
        "held at version {} by use_version in its custom metadata; {other}. To use the newest version: `credbroker keys rollback \
         {account} --key {name} --newest`",
        hold.version
    )
}

fn of(broker: &Broker, key: KeyStatus) -> Standing {
    let troubles = troubles(&key);
    let KeyStatus {
        account,
        name,
        slot,
        tested,
        unanswered,
        last,
        noted,
        ..
    } = key;
    let policy = broker.policy();
    let entry = policy.accounts().find(|entry| entry.id == account);
    let scopes = entry.map(|entry| scopes(entry, &name)).unwrap_or_default();
    let has_partner = |entry: &Arc<Account>| {
        let mut partners = entry.partners.keys();
        partners.any(|scope| scopes.contains(scope))
    };
    let mut standing = Standing {
        needs_partner_key: entry.is_some_and(has_partner),
        scopes,
        account,
        name,
        status: "untested",
        reasons: troubles.clone(),
        troubles,
        version: None,
        info: None,
        is_whitelisted: None,
        used_ms: None,
        tested_ms: None,
        id: None,
        last,
        topics: Vec::new(),
    };
    match slot {
        Slot::Gone(_) => {
            let (account, name) = (&standing.account, &standing.name);
            let is_revoked = broker.restrictions.has_revoked(account, name, last);
            standing.is(if is_revoked { "revoked" } else { "unavailable" });
        }
        Slot::Waiting(_) => standing.is("unavailable"),
        Slot::Ready {
            key,
            usage,
            version,
            ..
        } => {
            standing.version = Some(version);
            standing.id = Some(KeyDigest(key.id_sha256()));
            standing.used_ms = usage.accepted_ms();
            if standing.used_ms.is_some() {
                standing.is("connected");
            }
            if !standing.troubles.is_empty() {
                standing.is("degraded");
            }
            if noted.restricted.is_some() {
                standing.is("frozen");
            }
            if let Some(tested) = &tested {
                standing.heed(broker, tested);
            }
            if let Some(refusal) = usage.refusal() {
                standing.heed_refusal(refusal, tested.as_ref());
            }
            let no_answer = if standing.tested_ms.is_some() {
                "the last test has had no answer"
            } else {
                "it could not be tested yet"
            };
            let unanswered = unanswered.map(|reason| format!("{no_answer}: {reason}"));
            standing.reasons.extend(unanswered);
        }
    }
    if broker.restrictions.is_all_halted() {
        standing.add_halt("--all");
    }
    let halted = broker.restrictions.halted_accounts();
    if halted.contains(&standing.account) {
        let account = standing.account.to_string();
        standing.add_halt(&account);
    }
    standing
}

impl Standing {
    /// Takes the worse of two words.
    fn is(&mut self, status: &'static str) {
        let rank = |word: &str| WORDS.iter().position(|known| *known == word);
        if rank(status) < rank(self.status) {
            self.status = status;
        }
    }

    /// Takes the worse of two words, and the reason unless one about the same thing is known.
    fn is_for(&mut self, status: &'static str, topic: &'static str, reason: String) {
        self.is(status);
        if !self.topics.contains(&topic) {
            self.topics.push(topic);
            self.reasons.push(reason);
        }
    }

    /// Adds a halt, and with which argument `resume` ends it.
    fn add_halt(&mut self, whose: &str) {
        self.is("frozen");
        self.reasons
            .push(format!("halted: `credbroker resume {whose}` ends it"));
    }

    /// Takes in what the last test said.
    fn heed(&mut self, broker: &Broker, tested: &Tested) {
        let Tested { at_ms, report } = tested;
        self.tested_ms = Some(*at_ms);
        if report.info.is_none() && self.used_ms.is_some_and(|used_ms| used_ms > *at_ms) {
            // A key that has signed since is not refused any more.
            return;
        }
        self.info.clone_from(&report.info);
        let info = report.info.as_deref();
        self.is_whitelisted = info.and_then(|info| info.admits(broker.proof.expected()));
        let now_ms = broker.clock.wall_ms();
        // Days pass between two tests.
        if let Some(finding) = info.and_then(|info| info.expiry(now_ms)) {
            let has_ended = info.is_some_and(|info| info.has_expired(now_ms));
            let status = if has_ended { "refused" } else { "expiring" };
            self.is_for(status, finding.name, sentence(&finding));
            if has_ended {
                // That is how KuCoin refuses it then.
                self.topics.push("key-unknown");
            }
        }
        let refusals = report.findings.iter().filter(|finding| finding.is_refusal);
        for finding in refusals.clone() {
            let status = match finding.name {
                "expires-soon" => continue,
                "ip-restriction-missing" => "at-risk",
                _ => "degraded",
            };
            self.is_for(status, finding.name, sentence(finding));
        }
        let lacking = refusals.filter(|finding| finding.name == PERMISSION_MISSING);
        self.is(match &report.verdict {
            Verdict::Refused(_) if info.is_none() || lacking.count() >= self.scopes.len() => {
                "refused"
            }
            Verdict::Refused(_) => "degraded",
            Verdict::Good | Verdict::Unclear(_) => "connected",
        });
    }

    /// Takes in what a bot was told last, unless a test has gone well since.
    fn heed_refusal(&mut self, refusal: Refusal, tested: Option<&Tested>) {
        let is_mended = tested.is_some_and(|tested| {
            tested.at_ms > refusal.at_ms && tested.report.verdict == Verdict::Good
        });
        let topic = advice::of(None, &refusal.code).map(|advice| advice.topic);
        let Some(topic) = topic.filter(|_| !is_mended) else {
            return;
        };
        let status = if topic == PERMISSION_MISSING {
            "degraded"
        } else {
            "refused"
        };
        self.is_for(status, topic, refusal.advice);
    }
}

/// The scopes that a key serves, by the rules.
pub fn scopes(account: &Account, name: &KeyName) -> Vec<Scope> {
    let serves = account.keys.iter().filter(|(_, named)| *named == name);
    serves.map(|(scope, _)| *scope).collect()
}

fn sentence(finding: &Finding) -> String {
    format!("{} {}", finding.cause, finding.fix)
}
