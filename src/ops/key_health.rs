//! How each key is, in one word and whole sentences: what Vault, the exchange and admins say of it, put together.

use std::sync::Arc;
use std::time::Duration;

use crate::base::diagnosis::Diagnosis;
use crate::base::ids::{AccountId, KeyName};
use crate::broker::Broker;
use crate::keyring::key_test::Verdict;
use crate::keyring::usage::Refusal;
use crate::keyring::{KeySnapshot, KeyState, Tested};
use crate::kucoin::key_info::KeyInfo;
use crate::kucoin::{Scope, advice};
use crate::policy::Account;
use crate::proto::KeyStatus;
use crate::restrictions::KeyDigest;
use crate::vault::Hold;

/// What a key lacks for one request, and may have for another.
const PERMISSION_MISSING: &str = "permission-missing";

/// How KuCoin refuses a key that it does not have, or that has expired.
const KEY_UNKNOWN: &str = "key-unknown";

impl KeyStatus {
    /// All that a key can have, from best to worst.
    pub(crate) const ALL: [Self; 9] = [
        Self::Untested,
        Self::Active,
        Self::Degraded,
        Self::AtRisk,
        Self::Expiring,
        Self::Frozen,
        Self::Refused,
        Self::Unavailable,
        Self::Revoked,
    ];

    /// The word for it, in metrics and on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::AtRisk => "at-risk",
            Self::Degraded => "degraded",
            Self::Expiring => "expiring",
            Self::Frozen => "frozen",
            Self::Refused => "refused",
            Self::Revoked => "revoked",
            Self::Unavailable => "unavailable",
            Self::Unspecified => "unknown",
            Self::Untested => "untested",
        }
    }
}

/// How one key is.
#[derive(Debug)]
pub(crate) struct KeyHealth {
    /// Its account.
    pub(crate) account: AccountId,
    /// Its name.
    pub(crate) name: KeyName,
    /// What it serves, by the rules.
    pub(crate) scopes: Vec<Scope>,
    /// The worst that is known of it.
    pub(crate) status: KeyStatus,
    /// What keeps it from serving as it should, as far as Vault and admins have a say in it.
    pub(crate) troubles: Vec<Diagnosis>,
    /// What the exchange says of it, and halts; no two with the same id.
    pub(crate) findings: Vec<Diagnosis>,
    /// The version in memory.
    pub(crate) version: Option<u64>,
    /// Since Vault last confirmed it; none where it is not in memory.
    pub(crate) age: Option<Duration>,
    /// Whether it is in memory, and Vault has confirmed it as often as it should.
    pub(crate) is_confirmed: bool,
    /// Whether it is in memory and fresh enough for everything.
    pub(crate) is_available: bool,
    /// What the exchange told about it.
    pub(crate) info: Option<Arc<KeyInfo>>,
    /// Whether its whitelist has our address; unknown before its test, and without a whitelist.
    pub(crate) is_whitelisted: Option<bool>,
    /// When the exchange last took a request that it signed: Unix time in milliseconds.
    pub(crate) used_ms: Option<i64>,
    /// When it was last tested, and the exchange answered: Unix time in milliseconds.
    pub(crate) tested_ms: Option<i64>,
    /// SHA-256 of its id.
    pub(crate) id: Option<KeyDigest>,
    /// The same; where none is in memory, of the last one that was.
    pub(crate) last: Option<KeyDigest>,
    /// Whether the account has a partner where it signs.
    pub(crate) needs_partner_key: bool,
}

/// Every key that the rules name.
pub(crate) fn all(broker: &Broker) -> Vec<KeyHealth> {
    let keys = broker.keyring.entries();
    keys.into_iter().map(|key| of(broker, key)).collect()
}

/// One of them.
pub(crate) fn one(broker: &Broker, account: &AccountId, name: &KeyName) -> Option<KeyHealth> {
    let mut keys = broker.keyring.entries().into_iter();
    keys.find(|key| key.account == *account && key.name == *name)
        .map(|key| of(broker, key))
}

fn troubles(key: &KeySnapshot) -> Vec<Diagnosis> {
    let trouble = |cause: String| Diagnosis::warning("key", cause, "");
    match &key.state {
        KeyState::Absent(reason) => vec![trouble(format!("not available: {reason}"))],
        KeyState::Pending(reason) => {
            // Nothing is known of it yet: the broker is not ready.
            let cause = format!("waiting for Vault: {reason}");
            vec![Diagnosis::failed("key", cause, "")]
        }
        KeyState::Loaded {
            version,
            problem,
            outage,
            ..
        } => {
            let using = |problem: &String| format!("using version {version}: {problem}");
            let mut troubles: Vec<_> = key.noted.restricted.iter().cloned().map(trouble).collect();
            troubles.extend(key.noted.hold.map(|hold| held(key, &hold, *version)));
            troubles.extend(problem.iter().map(using).map(trouble));
            let what = if key.is_too_old {
                "too old for risk-increasing requests"
            } else {
                "cached"
            };
            // Too old without an outage: the machine has slept.
            let why = outage
                .as_deref()
                .or_else(|| key.is_too_old.then_some("not asked since"));
            troubles.extend(why.map(|why| {
                let age_s = key.age.unwrap_or_default().as_secs();
                trouble(format!(
                    "{what}; Vault last confirmed it {age_s} s ago: {why}"
                ))
            }));
            troubles
        }
    }
}

/// What an admin holds in use, and what ends that.
fn held(key: &KeySnapshot, hold: &Hold, version: u64) -> Diagnosis {
    let (account, name) = (&key.account, &key.name);
    let other = if version == hold.version {
        format!("version {} is not used", hold.newest)
    } else {
        format!("version {version}, written later, is used instead")
    };
    let cause = format!(
        "held at version {} by use_version in its custom metadata; {other}.",
        hold.version
    );
    let fix = format!(
        "To use the newest version: `credbroker keys rollback {account} --key {name} --newest`"
    );
    Diagnosis::warning("key", cause, fix)
}

fn of(broker: &Broker, key: KeySnapshot) -> KeyHealth {
    let troubles = troubles(&key);
    let KeySnapshot {
        account,
        name,
        state,
        tested,
        unanswered,
        last,
        noted,
        age,
        is_too_old,
    } = key;
    let policy = broker.policy();
    let entry = policy.accounts().find(|entry| entry.id == account);
    let scopes = entry.map(|entry| scopes(entry, &name)).unwrap_or_default();
    let has_partner = |entry: &Arc<Account>| {
        let mut partners = entry.partners.keys();
        partners.any(|scope| scopes.contains(scope))
    };
    let mut health = KeyHealth {
        needs_partner_key: entry.is_some_and(has_partner),
        scopes,
        account,
        name,
        status: KeyStatus::Untested,
        troubles,
        findings: Vec::new(),
        age,
        is_confirmed: false,
        is_available: false,
        version: None,
        info: None,
        is_whitelisted: None,
        used_ms: None,
        tested_ms: None,
        id: None,
        last,
    };
    match state {
        KeyState::Absent(_) => {
            let (account, name) = (&health.account, &health.name);
            let is_revoked = broker.restrictions.has_revoked(account, name, last);
            health.raise_to(if is_revoked {
                KeyStatus::Revoked
            } else {
                KeyStatus::Unavailable
            });
        }
        KeyState::Pending(_) => health.raise_to(KeyStatus::Unavailable),
        KeyState::Loaded {
            key,
            usage,
            version,
            outage,
            ..
        } => {
            health.is_confirmed = outage.is_none() && !is_too_old;
            health.is_available = !is_too_old;
            health.version = Some(version);
            health.id = Some(KeyDigest(key.id_sha256()));
            health.used_ms = usage.accepted_ms();
            if health.used_ms.is_some() {
                health.raise_to(KeyStatus::Active);
            }
            if !health.troubles.is_empty() {
                health.raise_to(KeyStatus::Degraded);
            }
            if noted.restricted.is_some() {
                health.raise_to(KeyStatus::Frozen);
            }
            if let Some(tested) = &tested {
                health.apply(broker, tested);
            }
            if let Some(refusal) = usage.refusal() {
                health.apply_refusal(refusal, tested.as_ref(), broker.clock.wall_ms());
            }
            let no_answer = if health.tested_ms.is_some() {
                "the last test got no answer"
            } else {
                "it could not be tested yet"
            };
            health.findings.extend(unanswered.map(|reason| {
                Diagnosis::warning("test-unanswered", format!("{no_answer}: {reason}"), "")
            }));
        }
    }
    if broker.restrictions.is_all_halted() {
        health.add_halt("--all");
    }
    let halted = broker.restrictions.halted_accounts();
    if halted.contains(&health.account) {
        let account = health.account.to_string();
        health.add_halt(&account);
    }
    health
}

impl KeyHealth {
    /// Why it has its status, a sentence for each thing; none: all is well.
    pub(crate) fn reasons(&self) -> Vec<String> {
        let all = self.troubles.iter().chain(&self.findings);
        all.map(Diagnosis::text).collect()
    }

    fn raise_to(&mut self, status: KeyStatus) {
        self.status = self.status.max(status);
    }

    /// Takes the worse of two, and the finding unless one about the same thing is known.
    fn add(&mut self, status: KeyStatus, finding: Diagnosis) {
        self.raise_to(status);
        if self.findings.iter().all(|known| known.id != finding.id) {
            self.findings.push(finding);
        }
    }

    /// Adds a halt, and with which argument `resume` ends it.
    fn add_halt(&mut self, whose: &str) {
        self.raise_to(KeyStatus::Frozen);
        let cause = format!("halted: `credbroker resume {whose}` lifts it");
        self.findings.push(Diagnosis::warning("halted", cause, ""));
    }

    /// Takes in what the last test said.
    fn apply(&mut self, broker: &Broker, tested: &Tested) {
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
        let has_expired = info.is_some_and(|info| info.has_expired(now_ms));
        if let Some(finding) = info.and_then(|info| info.expiry(now_ms)) {
            let status = if has_expired {
                KeyStatus::Refused
            } else {
                KeyStatus::Expiring
            };
            self.add(status, finding);
        }
        let refusals = report.findings.iter().filter(|finding| finding.is_failed());
        for finding in refusals.clone() {
            let status = match finding.id {
                "expires-soon" => continue,
                // That it has expired says it all.
                KEY_UNKNOWN if has_expired => continue,
                "ip-restriction-missing" => KeyStatus::AtRisk,
                _ => KeyStatus::Degraded,
            };
            self.add(status, finding.clone());
        }
        let lacking = refusals.filter(|finding| finding.id == PERMISSION_MISSING);
        self.raise_to(match &report.verdict {
            Verdict::Refused(_) if info.is_none() || lacking.count() >= self.scopes.len() => {
                KeyStatus::Refused
            }
            Verdict::Refused(_) => KeyStatus::Degraded,
            Verdict::Good | Verdict::Unclear(_) => KeyStatus::Active,
        });
    }

    /// Takes in what a bot was told last, unless a test has gone well since.
    fn apply_refusal(&mut self, refusal: Refusal, tested: Option<&Tested>, now_ms: i64) {
        let is_mended = tested.is_some_and(|tested| {
            tested.at_ms > refusal.at_ms && tested.report.verdict == Verdict::Good
        });
        let topic = advice::of(None, &refusal.code).map(|advice| advice.topic);
        let Some(topic) = topic.filter(|_| !is_mended) else {
            return;
        };
        let status = if topic == PERMISSION_MISSING {
            KeyStatus::Degraded
        } else {
            KeyStatus::Refused
        };
        let info = self.info.as_ref();
        let has_expired = info.is_some_and(|info| info.has_expired(now_ms));
        if topic == KEY_UNKNOWN && has_expired {
            // That it has expired says it all.
            self.raise_to(status);
        } else {
            self.add(status, Diagnosis::failed(topic, refusal.advice, ""));
        }
    }
}

/// The scopes that a key serves, by the rules.
pub(crate) fn scopes(account: &Account, name: &KeyName) -> Vec<Scope> {
    let serves = account.keys.iter().filter(|(_, named)| *named == name);
    serves.map(|(scope, _)| *scope).collect()
}
