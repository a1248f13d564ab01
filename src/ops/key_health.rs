//! The health of each key: one status and its reasons, from Vault, the exchange, the rules and halts.

use std::sync::Arc;
use std::time::Duration;

use crate::base::diagnosis::Diagnosis;
use crate::base::ids::{AccountId, KeyName};
use crate::broker::Broker;
use crate::keyring::key_test::Verdict;
use crate::keyring::usage::Refusal;
use crate::keyring::{KeySnapshot, KeyState, Tested};
use crate::kucoin::code::ADDRESS_REFUSED;
use crate::kucoin::key_info::KeyInfo;
use crate::kucoin::{Scope, advice};
use crate::policy::Account;
use crate::proto::KeyStatus;
use crate::restrictions::KeyDigest;
use crate::vault::Hold;

/// Topic of a rejection of one request for a missing permission; other requests may still be accepted.
const PERMISSION_MISSING: &str = "permission-missing";

/// Topic of the rejection of a key that does not exist at KuCoin or has expired.
const KEY_UNKNOWN: &str = "key-unknown";

impl KeyStatus {
    /// Every status that a key can have, from best to worst.
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

/// The health of one key.
#[derive(Debug)]
pub(crate) struct KeyHealth {
    /// Its account.
    pub(crate) account: AccountId,
    /// Its name.
    pub(crate) name: KeyName,
    /// The scopes that the rules use it for.
    pub(crate) scopes: Vec<Scope>,
    /// The worst known status.
    pub(crate) status: KeyStatus,
    /// Problems with the key in Vault, in its metadata, or with its age.
    pub(crate) vault_problems: Vec<Diagnosis>,
    /// Problems that the exchange reported, and halts; each id at most once, except `halted`.
    pub(crate) findings: Vec<Diagnosis>,
    /// The loaded version.
    pub(crate) version: Option<u64>,
    /// Time since Vault last confirmed it; `None` if it is not loaded.
    pub(crate) age: Option<Duration>,
    /// Whether it is loaded, not too old, and Vault is reachable for it.
    pub(crate) is_confirmed: bool,
    /// Whether it is loaded and fresh enough for all requests.
    pub(crate) is_available: bool,
    /// Its details as reported by the exchange.
    pub(crate) info: Option<Arc<KeyInfo>>,
    /// Whether its whitelist has the egress address; `None` before its test, and without a whitelist.
    pub(crate) is_whitelisted: Option<bool>,
    /// When the exchange rejected the address of the last request that it signed: Unix time in milliseconds.
    pub(crate) address_refused_ms: Option<i64>,
    /// When the exchange last accepted a request signed with it: Unix time in milliseconds.
    pub(crate) used_ms: Option<i64>,
    /// When it was last tested with a result: Unix time in milliseconds.
    pub(crate) tested_ms: Option<i64>,
    /// SHA-256 of its id.
    pub(crate) id: Option<KeyDigest>,
    /// SHA-256 of the id of the key that was loaded, or found to be revoked, last.
    pub(crate) last: Option<KeyDigest>,
    /// Whether the rules name a partner for one of its scopes.
    pub(crate) needs_partner_key: bool,
}

/// Every key that the rules name.
pub(crate) fn all(broker: &Broker) -> Vec<KeyHealth> {
    let keys = broker.keyring.entries();
    keys.into_iter().map(|key| of(broker, key)).collect()
}

/// The health of the key `name`.
pub(crate) fn one(broker: &Broker, account: &AccountId, name: &KeyName) -> Option<KeyHealth> {
    let mut keys = broker.keyring.entries().into_iter();
    keys.find(|key| key.account == *account && key.name == *name)
        .map(|key| of(broker, key))
}

fn vault_problems(key: &KeySnapshot) -> Vec<Diagnosis> {
    let trouble = |cause: String| Diagnosis::warning("key", cause, "");
    match &key.state {
        KeyState::Absent(reason) => vec![trouble(format!("not available: {reason}"))],
        KeyState::Pending(reason) => {
            // Nothing is known about the key yet, so the broker is not ready.
            let cause = format!("waiting for Vault: {reason}");
            vec![Diagnosis::failed("key", cause, "")]
        }
        KeyState::Loaded {
            version,
            problem,
            outage,
            ..
        } => {
            let mut vault_problems: Vec<_> =
                key.noted.restricted.iter().cloned().map(trouble).collect();
            vault_problems.extend(key.noted.hold.map(|hold| held(key, &hold, *version)));
            let problem = problem.iter().map(|problem| using(*version) + problem);
            vault_problems.extend(problem.map(trouble));
            let age_problem = if key.is_too_old {
                "too old for risk-increasing requests"
            } else {
                "cached"
            };
            // Too old without an outage: the machine was suspended.
            let why = outage
                .as_deref()
                .or_else(|| key.is_too_old.then_some("the broker has not polled Vault"));
            vault_problems.extend(why.map(|why| {
                let age_s = key.age.unwrap_or_default().as_secs();
                trouble(format!(
                    "{age_problem}; Vault last confirmed the key {age_s} s ago; since then: {why}"
                ))
            }));
            vault_problems
        }
    }
}

/// The beginning of the reason why the wanted version is not used; the cause follows.
pub(crate) fn using(version: u64) -> String {
    format!("using version {version} because of this problem: ")
}

/// The beginning of the reason that a version was selected with `keys rollback`, but is not used.
pub(crate) fn selects(version: u64) -> String {
    format!("use_version in the key's custom metadata selects version {version}")
}

/// The finding about a version that an admin holds in use with `keys rollback`.
fn held(key: &KeySnapshot, hold: &Hold, version: u64) -> Diagnosis {
    let (account, name) = (&key.account, &key.name);
    let Hold {
        version: selected,
        newest,
        ..
    } = *hold;
    let cause = if version == selected {
        format!(
            "held at version {selected} (use_version in the key's custom metadata); version {newest} is not used."
        )
    } else {
        format!(
            "{}, but the broker cannot use that version now, and uses version {version}.",
            selects(selected)
        )
    };
    let fix = format!(
        "To use the newest version: `credbroker keys rollback {account} --key {name} --newest`"
    );
    Diagnosis::warning("key", cause, fix)
}

fn of(broker: &Broker, key: KeySnapshot) -> KeyHealth {
    let vault_problems = vault_problems(&key);
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
        vault_problems,
        findings: Vec::new(),
        age,
        is_confirmed: false,
        is_available: false,
        version: None,
        info: None,
        is_whitelisted: None,
        address_refused_ms: None,
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
            if !health.vault_problems.is_empty() {
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
                "the last test was inconclusive"
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
    /// The reasons of its status, one sentence for each; empty if there is no problem.
    pub(crate) fn reasons(&self) -> Vec<String> {
        let all = self.vault_problems.iter().chain(&self.findings);
        all.map(Diagnosis::text).collect()
    }

    fn raise_to(&mut self, status: KeyStatus) {
        self.status = self.status.max(status);
    }

    /// Raises the status to `status`, and adds the finding unless there is one with its id.
    fn add(&mut self, status: KeyStatus, finding: Diagnosis) {
        self.raise_to(status);
        if self.findings.iter().all(|known| known.id != finding.id) {
            self.findings.push(finding);
        }
    }

    /// Adds a halt; `argument` is that of the `resume` command that lifts it.
    fn add_halt(&mut self, argument: &str) {
        self.raise_to(KeyStatus::Frozen);
        let cause = format!("halted; to resume, run `credbroker resume {argument}`");
        self.findings.push(Diagnosis::warning("halted", cause, ""));
    }

    /// Applies the result of the last test.
    fn apply(&mut self, broker: &Broker, tested: &Tested) {
        let Tested { at_ms, report } = tested;
        self.tested_ms = Some(*at_ms);
        if report.info.is_none() && self.used_ms.is_some_and(|used_ms| used_ms > *at_ms) {
            // The exchange has accepted a request since, so the rejection is outdated.
            return;
        }
        self.info.clone_from(&report.info);
        let info = report.info.as_deref();
        self.is_whitelisted = info.and_then(|info| info.admits(broker.proof.expected()));
        let now_ms = broker.clock.wall_ms();
        // The key may have expired since the test.
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
                // Already explained by the expiry.
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

    /// Applies the last rejection that a request got, unless a test has succeeded since.
    fn apply_refusal(&mut self, refusal: Refusal, tested: Option<&Tested>, now_ms: i64) {
        let is_outdated = tested.is_some_and(|tested| {
            tested.at_ms > refusal.at_ms && tested.report.verdict == Verdict::Good
        });
        let topic = advice::of(None, &refusal.code).map(|advice| advice.topic);
        let Some(topic) = topic.filter(|_| !is_outdated) else {
            return;
        };
        if refusal.code == ADDRESS_REFUSED {
            // Newer than the whitelist that the last test returned.
            self.address_refused_ms = Some(refusal.at_ms);
            self.is_whitelisted = Some(false);
        }
        let status = if topic == PERMISSION_MISSING {
            KeyStatus::Degraded
        } else {
            KeyStatus::Refused
        };
        let info = self.info.as_ref();
        let has_expired = info.is_some_and(|info| info.has_expired(now_ms));
        if topic == KEY_UNKNOWN && has_expired {
            // Already explained by the expiry.
            self.raise_to(status);
        } else {
            self.add(status, Diagnosis::failed(topic, refusal.advice, ""));
        }
    }
}

/// The scopes that the rules use a key for.
pub(crate) fn scopes(account: &Account, name: &KeyName) -> Vec<Scope> {
    let uses = account.keys.iter().filter(|(_, named)| *named == name);
    uses.map(|(scope, _)| *scope).collect()
}
