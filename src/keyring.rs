//! The keys of all accounts, in memory. They are loaded and removed in the background; the request path only reads.
//!
//! A cached key stays in use while Vault is unreachable, within two bounds on its age, the time since Vault last confirmed
//! it: past `max_stale_s` it signs nothing risk-increasing, past `max_stale_cancel_s` it is wiped. A new key replaces it
//! once the exchange has accepted requests that the new one signed.

pub(crate) mod key_test;
pub(crate) mod refresh;
mod rotation;
pub(crate) mod usage;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use crate::base::ids::{AccountId, KeyName};
use crate::base::lock::{Mutex, RwLock};
use crate::clock::Clock;
use crate::kucoin::Key;
use crate::policy::{Account, MaxStale, Permit};
use crate::restrictions::{KeyDigest, Restrictions, Revoked};

use crate::vault::Hold;
use key_test::{Report, Verdict};
use usage::Usage;

/// How long a refused request waits for another key at most; a test takes a few round trips to the exchange.
const TRIAL_WITHIN: Duration = Duration::from_secs(5);

/// How often keys are checked for being too old to stay in memory. Not a timer per key: timers stand still while the
/// machine sleeps, and ages do not.
const WIPE_EVERY: Duration = Duration::from_secs(1);

/// How long whoever asks for a look at Vault waits for it, test and all.
const LOOK_WITHIN: Duration = Duration::from_secs(20);

/// Every key that the rules name, with its value or the reason why there is none.
#[derive(Debug)]
pub(crate) struct Keyring {
    clock: Arc<Clock>,
    restrictions: Arc<Restrictions>,
    slots: RwLock<BTreeMap<AccountId, Keys>>,
    /// The last test of each key, also of those that are not in memory any more.
    past: Mutex<BTreeMap<(AccountId, KeyName), Past>>,
    changed: watch::Sender<()>,
    /// Wakes whoever asks Vault, when a key turns out older than anybody knew.
    rechecks: Notify,
}

/// The keys of one account.
#[derive(Debug)]
struct Keys {
    max_stale: MaxStale,
    entries: BTreeMap<KeyName, KeyEntry>,
}

/// One key, and what is going on about it.
#[derive(Debug)]
struct KeyEntry {
    state: KeyState,
    /// Whether a key is being tested that may take its place.
    is_testing: bool,
    /// What the last test said of the key in memory.
    tested: Option<Tested>,
    /// Why the exchange has said nothing in a test after that.
    unanswered: Option<String>,
    /// The last key that was in memory here, or found to be revoked.
    last: Option<KeyDigest>,
    /// What its metadata say of it beside its versions.
    noted: Noted,
    /// Why the key was wiped, until Vault has been heard again.
    wiped: Option<String>,
    refresh: Arc<Refresh>,
}

/// What the metadata of a key in Vault say of it beside its versions.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Noted {
    /// Why it signs nothing risk-increasing.
    pub(crate) restricted: Option<String>,
    /// The version that an admin holds in use in place of the newest.
    pub(crate) hold: Option<Hold>,
}

/// The last test of a key.
#[derive(Clone, Debug)]
pub(crate) struct Tested {
    /// When: Unix time in milliseconds.
    pub(crate) at_ms: i64,
    /// What came of it.
    pub(crate) report: Arc<Report>,
}

/// A test of a key that has come back: it needs no other one before its time.
#[derive(Clone, Debug)]
struct Past {
    key: KeyDigest,
    version: u64,
    /// When it is to be tested again: time since boot.
    due: Duration,
    tested: Tested,
}

/// Looks at one key in Vault: asked for, and counted.
#[derive(Debug, Default)]
struct Refresh {
    /// Wakes whoever looks.
    wanted: Notify,
    /// How many have begun, and how many of these have ended.
    count: watch::Sender<(u64, u64)>,
    /// Whether Vault has been asked once, with or without an answer.
    is_read: watch::Sender<bool>,
    /// Whether a version that has been refused is to be tried once more.
    is_fresh: AtomicBool,
}

/// What is known about one key.
#[derive(Clone, Debug)]
pub(crate) enum KeyState {
    /// Vault has said that there is no such key for us: evicted, or never there.
    Absent(String),
    /// In memory, from this version of the secret in Vault.
    Loaded {
        /// The key.
        key: Arc<Key>,
        /// What the exchange has said about it.
        usage: Arc<Usage>,
        /// The version in Vault.
        version: u64,
        /// What is wrong with a newer version, which is not used.
        problem: Option<String>,
        /// When Vault last confirmed it: time since boot.
        confirmed: Duration,
        /// Why Vault has not confirmed it again; none while it does.
        outage: Option<String>,
    },
    /// Vault has not answered yet, or not for so long that the key was wiped.
    Pending(String),
}

/// A key, and how far it can be trusted.
#[derive(Clone, Debug)]
pub(crate) struct KeyLease {
    /// The key.
    pub(crate) key: Arc<Key>,
    /// What the exchange has said about it.
    pub(crate) usage: Arc<Usage>,
    /// Its version in Vault; none for one that is only tested.
    pub(crate) version: Option<u64>,
    /// Since Vault last confirmed it; zero while Vault answers.
    pub(crate) stale: Duration,
}

impl KeyLease {
    /// A key that is only tested.
    pub(crate) fn of_a_test(key: Arc<Key>) -> Self {
        Self {
            key,
            usage: Arc::default(),
            version: None,
            stale: Duration::ZERO,
        }
    }
}

/// What is known about one key, for readiness and metrics.
#[derive(Debug)]
pub(crate) struct KeySnapshot {
    /// Its account.
    pub(crate) account: AccountId,
    /// Its name.
    pub(crate) name: KeyName,
    /// What stands in its place.
    pub(crate) state: KeyState,
    /// Since Vault last confirmed it; none where it is not in memory.
    pub(crate) age: Option<Duration>,
    /// Whether it is too old to sign risk-increasing requests.
    pub(crate) is_too_old: bool,
    /// What its last test said that the exchange answered.
    pub(crate) tested: Option<Tested>,
    /// Why the exchange has said nothing in a test after that.
    pub(crate) unanswered: Option<String>,
    /// The last key that was in memory in this place, or found to be revoked.
    pub(crate) last: Option<KeyDigest>,
    /// What its metadata say of it beside its versions.
    pub(crate) noted: Noted,
}

/// The account's key is not in memory, or too old.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the key of account {account} for this scope is not available: {reason}")]
pub(crate) struct KeyUnavailable {
    account: AccountId,
    reason: String,
}

impl KeyUnavailable {
    /// An admin has killed it; which one is not for bots to know.
    pub(crate) fn revoked(account: &AccountId) -> Self {
        Self {
            account: account.clone(),
            reason: "an admin has revoked it; register another key".to_owned(),
        }
    }
}

/// Says to admins that a key is dead.
fn revoked_by(revoked: &Revoked) -> String {
    format!(
        "{} has revoked it; register another key",
        revoked.by.as_str()
    )
}

impl Keyring {
    /// No keys yet; ages count on `clock`. What `restrictions` say is revoked is never kept.
    pub(crate) fn new(clock: Arc<Clock>, restrictions: Arc<Restrictions>) -> Self {
        Self {
            clock,
            restrictions,
            slots: RwLock::default(),
            past: Mutex::default(),
            changed: watch::Sender::new(()),
            rechecks: Notify::new(),
        }
    }

    /// Makes places for the keys of these accounts; what is there already stays.
    pub(crate) fn add<'a>(&self, accounts: impl Iterator<Item = &'a Arc<Account>>) {
        let mut slots = self.slots.write();
        for account in accounts {
            let keys = slots.entry(account.id.clone()).or_insert_with(|| Keys {
                max_stale: account.max_stale,
                entries: BTreeMap::new(),
            });
            keys.max_stale = account.max_stale;
            for name in account.keys.values() {
                keys.entries
                    .entry(name.clone())
                    .or_insert_with(KeyEntry::new);
            }
        }
        drop(slots);
        self.changed.send_replace(());
    }

    /// Drops all keys but those of these accounts.
    pub(crate) fn retain<'a>(&self, accounts: impl Iterator<Item = &'a Arc<Account>>) {
        let accounts: BTreeMap<_, _> = accounts.map(|account| (&account.id, account)).collect();
        let mut slots = self.slots.write();
        slots.retain(|id, keys| {
            let Some(account) = accounts.get(id) else {
                return false;
            };
            keys.entries
                .retain(|name, _| account.keys.values().any(|named| named == name));
            true
        });
        drop(slots);
        self.changed.send_replace(());
    }

    /// The key that signs what `permit` allows.
    ///
    /// # Errors
    /// When it is not in memory, or Vault has been silent about it for longer than the account allows; says why.
    pub(crate) fn key(&self, permit: &Permit) -> Result<KeyLease, KeyUnavailable> {
        let account = &permit.account().id;
        let unavailable = |reason: &str| KeyUnavailable {
            account: account.clone(),
            reason: reason.to_owned(),
        };
        let unnamed = || unavailable("the rules name no key");
        let name = permit.key_name().ok_or_else(unnamed)?;
        let slots = self.slots.read();
        let keys = slots.get(account).ok_or_else(unnamed)?;
        let entry = keys.entries.get(name);
        match entry.map(|entry| &entry.state) {
            Some(KeyState::Loaded { key, .. })
                if permit.partner().is_some() && !key.has_partner_key() =>
            {
                Err(unavailable(
                    "the account has a partner, and the key in Vault has no `partner_key`",
                ))
            }
            Some(KeyState::Loaded {
                key,
                usage,
                confirmed,
                outage,
                version,
                ..
            }) => {
                let restricted = entry.and_then(|entry| entry.noted.restricted.as_ref());
                if let Some(reason) = restricted.filter(|_| permit.increases_risk()) {
                    return Err(unavailable(reason));
                }
                let age = self.clock.boot().saturating_sub(*confirmed);
                let max = if permit.increases_risk() {
                    keys.max_stale.risk_increasing
                } else {
                    keys.max_stale.cancels_and_reads
                };
                if age > max {
                    if outage.is_none() {
                        // The machine has slept: nobody has asked Vault yet.
                        self.rechecks.notify_waiters();
                    }
                    return Err(unavailable(&too_old(age, max, outage.as_deref())));
                }
                let stale = if outage.is_some() {
                    age
                } else {
                    Duration::ZERO
                };
                Ok(KeyLease {
                    key: Arc::clone(key),
                    usage: Arc::clone(usage),
                    version: Some(*version),
                    stale,
                })
            }
            Some(KeyState::Absent(_)) if self.is_revoked(account, name, entry) => {
                Err(KeyUnavailable::revoked(account))
            }
            Some(KeyState::Pending(reason)) => {
                if entry.is_some_and(|entry| entry.wiped.as_ref() == Some(reason)) {
                    // Nobody has asked Vault since it was wiped.
                    self.rechecks.notify_waiters();
                }
                Err(unavailable(reason))
            }
            Some(KeyState::Absent(reason)) => Err(unavailable(reason)),
            None => Err(unnamed()),
        }
    }

    fn is_revoked(&self, account: &AccountId, name: &KeyName, entry: Option<&KeyEntry>) -> bool {
        let last = entry.and_then(|entry| entry.last);
        self.restrictions.has_revoked(account, name, last)
    }

    /// Every key with what is known about it.
    pub(crate) fn entries(&self) -> Vec<KeySnapshot> {
        let now = self.clock.boot();
        let slots = self.slots.read();
        let all = slots.iter().flat_map(|(account, keys)| {
            keys.entries.iter().map(move |(name, entry)| {
                let state = &entry.state;
                let age = state.confirmed().map(|at| now.saturating_sub(at));
                KeySnapshot {
                    account: account.clone(),
                    name: name.clone(),
                    state: state.clone(),
                    age,
                    is_too_old: age.is_some_and(|age| age > keys.max_stale.risk_increasing),
                    tested: entry.tested.clone(),
                    unanswered: entry.unanswered.clone(),
                    last: entry.last,
                    noted: entry.noted.clone(),
                }
            })
        });
        all.collect()
    }

    /// Returns once Vault has been asked for every key that the keyring has now, with or without an answer.
    pub(crate) async fn first_read(&self) {
        let all: Vec<_> = {
            let slots = self.slots.read();
            let keys = slots.values().flat_map(|keys| keys.entries.values());
            keys.map(|entry| entry.refresh.is_read.subscribe())
                .collect()
        };
        for mut is_read in all {
            // An error means that the rules name it no longer.
            let _ = is_read.wait_for(|is_read| *is_read).await;
        }
    }

    /// Tells when any slot changes.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// How long the keys of an account serve for everything while Vault is silent.
    fn max_stale(&self, account: &AccountId) -> Duration {
        let slots = self.slots.read();
        slots
            .get(account)
            .map_or(Duration::MAX, |keys| keys.max_stale.risk_increasing)
    }

    /// Wipes each key within a second of its account's `max_stale_cancel_s`, and has Vault asked for it. Never ends.
    pub(crate) async fn wipe_on_time(self: Arc<Self>) {
        loop {
            for (account, name) in self.wipe_too_old() {
                tracing::error!(account.id = %account, key = %name, "key wiped: not confirmed by Vault within max_stale_cancel_s");
            }
            sleep(WIPE_EVERY).await;
        }
    }

    /// Wipes the keys that are too old even to cancel orders, and returns which.
    fn wipe_too_old(&self) -> Vec<(AccountId, KeyName)> {
        let now = self.clock.boot();
        let age_past = |max: Duration, entry: &KeyEntry| {
            let age = now.saturating_sub(entry.state.confirmed()?);
            (age > max).then_some(age)
        };
        let is_past = |keys: &Keys| {
            let max = keys.max_stale.cancels_and_reads;
            let mut entries = keys.entries.values();
            entries.any(|entry| age_past(max, entry).is_some())
        };
        // Calls read the same lock, and there is hardly ever anything to wipe.
        let slots = self.slots.read();
        let is_any_past = slots.values().any(is_past);
        drop(slots);
        let mut wiped = Vec::new();
        if !is_any_past {
            return wiped;
        }
        let mut slots = self.slots.write();
        for (account, keys) in slots.iter_mut() {
            let max = keys.max_stale.cancels_and_reads;
            for (name, entry) in &mut keys.entries {
                if let Some(age) = age_past(max, entry) {
                    let outage = entry.state.outage();
                    let why = too_old_to_keep(age, max);
                    entry.wiped = Some(why.clone());
                    entry.put(KeyState::Pending(outage.unwrap_or(why)));
                    wiped.push((account.clone(), name.clone()));
                }
            }
        }
        drop(slots);
        self.changed.send_replace(());
        // Also whoever holds a newer version that waits for its test: it is as old.
        self.rechecks.notify_waiters();
        wiped
    }

    /// What is known about one key.
    fn state(&self, account: &AccountId, name: &KeyName) -> Option<KeyState> {
        let slots = self.slots.read();
        Some(slots.get(account)?.entries.get(name)?.state.clone())
    }

    /// Puts a slot in place; a key that stood there is wiped once its last request is signed.
    fn set(&self, account: &AccountId, name: &KeyName, state: KeyState) {
        self.change(account, name, |entry| {
            // Asked under the lock that `wipe_revoked` takes: a key that was revoked meanwhile does not come back.
            let revoked = self.revoked(account, name, &state);
            entry.put(revoked.map_or(state, |revoked| KeyState::Absent(revoked_by(&revoked))));
        });
    }

    /// Changes what is known of the key in memory, by Vault's word or its silence; one that was revoked meanwhile is wiped.
    fn change_unless_revoked(
        &self,
        account: &AccountId,
        name: &KeyName,
        change: impl FnOnce(&mut KeyEntry),
    ) {
        self.change(account, name, |entry| {
            change(entry);
            if let Some(revoked) = self.revoked(account, name, &entry.state) {
                entry.put(KeyState::Absent(revoked_by(&revoked)));
            }
        });
    }

    /// Keeps that the key that Vault holds is a revoked one.
    fn set_revoked(&self, account: &AccountId, name: &KeyName, key: KeyDigest) {
        self.change(account, name, |entry| entry.last = Some(key));
    }

    /// Keeps what the metadata say; returns what they said before, where that differs.
    fn set_noted(&self, account: &AccountId, name: &KeyName, noted: &Noted) -> Option<Noted> {
        let is_so = {
            let slots = self.slots.read();
            let entry = slots.get(account).and_then(|keys| keys.entries.get(name));
            entry.is_none_or(|entry| entry.noted == *noted)
        };
        // After every look: nobody needs to wake for that.
        if is_so {
            return None;
        }
        let mut before = None;
        self.change(account, name, |entry| {
            before = Some(std::mem::replace(&mut entry.noted, noted.clone()));
        });
        before
    }

    /// Keeps what is wrong with a version that is not used, beside the key in memory.
    fn set_problem(&self, account: &AccountId, name: &KeyName, reason: Option<String>) {
        self.change(account, name, |entry| {
            if let KeyState::Loaded { problem, .. } = &mut entry.state {
                *problem = reason;
            }
        });
    }

    /// Keeps whether a key is being tested that may take this one's place.
    fn set_on_trial(&self, account: &AccountId, name: &KeyName, is_testing: bool) {
        let is_so = {
            let slots = self.slots.read();
            let entry = slots.get(account).and_then(|keys| keys.entries.get(name));
            entry.is_some_and(|entry| entry.is_testing == is_testing)
        };
        // After every look: nobody needs to wake for that.
        if is_so {
            return;
        }
        self.change(account, name, |entry| entry.is_testing = is_testing);
    }

    /// Keeps what a test said of the key in memory, unless another has taken its place meanwhile. A test that the
    /// exchange did not answer leaves what is known as it is.
    pub(crate) fn set_tested(
        &self,
        account: &AccountId,
        name: &KeyName,
        tested: &Arc<Key>,
        report: Arc<Report>,
    ) {
        let at_ms = self.clock.wall_ms();
        self.change(account, name, |entry| {
            let is_it =
                matches!(&entry.state, KeyState::Loaded { key, .. } if Arc::ptr_eq(key, tested));
            match &report.verdict {
                _ if !is_it => {}
                Verdict::Unclear(reason) if report.info.is_none() => {
                    entry.unanswered = Some(reason.clone());
                }
                _ => {
                    entry.tested = Some(Tested { at_ms, report });
                    entry.unanswered = None;
                }
            }
        });
    }

    /// Keeps for later that the key in memory needs no test before `due`.
    fn remember(&self, account: &AccountId, name: &KeyName, due: Duration) {
        let slots = self.slots.read();
        let entry = slots.get(account).and_then(|keys| keys.entries.get(name));
        if let Some(KeyEntry {
            state: KeyState::Loaded { key, version, .. },
            tested: Some(tested),
            ..
        }) = entry
        {
            let past = Past {
                key: KeyDigest(key.id_sha256()),
                version: *version,
                due,
                tested: tested.clone(),
            };
            let mut all = self.past.lock();
            all.insert((account.clone(), name.clone()), past);
        }
    }

    /// Says of a key that has come back what its last test said, and returns when the next one is due; none where it was
    /// not good, or where it is due by now.
    fn recall(&self, account: &AccountId, name: &KeyName) -> Option<Duration> {
        let all = self.past.lock();
        let past = all.get(&(account.clone(), name.clone())).cloned()?;
        drop(all);
        if past.due <= self.clock.boot() || past.tested.report.verdict != Verdict::Good {
            return None;
        }
        let mut due = None;
        self.change(account, name, |entry| {
            if let KeyState::Loaded { key, version, .. } = &entry.state
                && (KeyDigest(key.id_sha256()), *version) == (past.key, past.version)
            {
                entry.tested = Some(past.tested);
                due = Some(past.due);
            }
        });
        due
    }

    fn change(&self, account: &AccountId, name: &KeyName, change: impl FnOnce(&mut KeyEntry)) {
        let mut slots = self.slots.write();
        let keys = slots.get_mut(account);
        if let Some(entry) = keys.and_then(|keys| keys.entries.get_mut(name)) {
            change(entry);
        }
        drop(slots);
        self.changed.send_replace(());
    }

    /// Wipes every key that has been revoked. Returns those that were revoked before anybody knew their ids, for
    /// [`Restrictions::seen`].
    pub(crate) fn wipe_revoked(&self) -> Vec<(AccountId, KeyName, KeyDigest)> {
        let mut unseen = Vec::new();
        let mut slots = self.slots.write();
        for (account, keys) in slots.iter_mut() {
            for (name, entry) in &mut keys.entries {
                let Some(revoked) = self.revoked(account, name, &entry.state) else {
                    continue;
                };
                entry.put(KeyState::Absent(revoked_by(&revoked)));
                unseen.extend(entry.last.map(|key| (account.clone(), name.clone(), key)));
            }
        }
        drop(slots);
        self.changed.send_replace(());
        unseen.retain(|(account, name, _)| self.restrictions.has_revoked_unseen(account, name));
        unseen
    }

    fn revoked(&self, account: &AccountId, name: &KeyName, state: &KeyState) -> Option<Revoked> {
        match state {
            KeyState::Loaded { key, .. } => {
                let key = KeyDigest(key.id_sha256());
                self.restrictions.revoked_in(account, name, key)
            }
            KeyState::Absent(_) | KeyState::Pending(_) => None,
        }
    }

    /// Whether another key than `used`, which the exchange has refused, signs by now. Waits for one that is being tested.
    pub(crate) async fn has_another(&self, permit: &Permit, used: &Arc<Key>) -> bool {
        let Some(name) = permit.key_name() else {
            return false;
        };
        let wait = async {
            let mut changes = self.changes();
            loop {
                changes.borrow_and_update();
                let (is_other, is_testing) = {
                    let slots = self.slots.read();
                    let keys = slots.get(&permit.account().id);
                    let Some(entry) = keys.and_then(|keys| keys.entries.get(name)) else {
                        return false;
                    };
                    let is_other = matches!(&entry.state, KeyState::Loaded { key, .. } if !Arc::ptr_eq(key, used));
                    (is_other, entry.is_testing)
                };
                // An error means that the keyring is gone.
                if is_other || !is_testing || changes.changed().await.is_err() {
                    return is_other;
                }
            }
        };
        timeout(TRIAL_WITHIN, wait).await.unwrap_or(false)
    }

    /// The exchange has refused the key of `permit`: Vault may have another one.
    pub(crate) fn request_refresh(&self, permit: &Permit) {
        if let Some(name) = permit.key_name()
            && let Some(refresh) = self.refresh(&permit.account().id, name)
        {
            refresh.wanted.notify_waiters();
        }
    }

    /// Has a look taken at a key in Vault, and waits until it has ended, with the test of what it found. A version that
    /// was refused is tried once more. Returns whether there was one.
    pub(crate) async fn refresh_now(&self, account: &AccountId, name: &KeyName) -> bool {
        let Some(refresh) = self.refresh(account, name) else {
            return false;
        };
        refresh.is_fresh.store(true, Ordering::Relaxed);
        let mut count = refresh.count.subscribe();
        let (begun, _) = *count.borrow_and_update();
        refresh.wanted.notify_waiters();
        let ended = count.wait_for(|(_, ended)| *ended > begun);
        matches!(timeout(LOOK_WITHIN, ended).await, Ok(Ok(_)))
    }

    fn refresh(&self, account: &AccountId, name: &KeyName) -> Option<Arc<Refresh>> {
        let slots = self.slots.read();
        Some(Arc::clone(&slots.get(account)?.entries.get(name)?.refresh))
    }
}

impl KeyEntry {
    fn new() -> Self {
        Self {
            state: KeyState::Pending("not read from Vault yet".to_owned()),
            is_testing: false,
            tested: None,
            unanswered: None,
            last: None,
            noted: Noted::default(),
            wiped: None,
            refresh: Arc::default(),
        }
    }

    /// What was said of one key says nothing of another.
    fn put(&mut self, state: KeyState) {
        let is_same = matches!((&self.state, &state),
            (KeyState::Loaded { key, .. }, KeyState::Loaded { key: next, .. }) if Arc::ptr_eq(key, next));
        if !is_same {
            self.tested = None;
            self.unanswered = None;
        }
        if let KeyState::Loaded { key, .. } = &state {
            self.last = Some(KeyDigest(key.id_sha256()));
        }
        self.state = match (state, &self.wiped) {
            (KeyState::Pending(reason), Some(wiped)) if reason != *wiped => {
                KeyState::Pending(format!("{wiped}; {reason}"))
            }
            (KeyState::Pending(reason), _) => KeyState::Pending(reason),
            (state, _) => {
                self.wiped = None;
                state
            }
        };
    }
}

impl KeyState {
    fn confirmed(&self) -> Option<Duration> {
        match self {
            Self::Loaded { confirmed, .. } => Some(*confirmed),
            Self::Absent(_) | Self::Pending(_) => None,
        }
    }

    fn outage(&self) -> Option<String> {
        match self {
            Self::Loaded { outage, .. } => outage.clone(),
            Self::Absent(_) | Self::Pending(_) => None,
        }
    }
}

fn too_old(age: Duration, max: Duration, why: Option<&str>) -> String {
    let why = why.unwrap_or("not read yet");
    format!(
        "Vault last confirmed it {} s ago, and {} s are allowed for this request: {why}",
        age.as_secs(),
        max.as_secs()
    )
}

fn too_old_to_keep(age: Duration, max: Duration) -> String {
    format!(
        "wiped: last confirmed by Vault {} s ago, max_stale_cancel_s is {} s",
        age.as_secs(),
        max.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;
    use crate::base::secret::{ApiSecret, Passphrase};
    use crate::kucoin::KeyVersion;
    use crate::restrictions::Mark;

    fn ready(id: &str) -> KeyState {
        let text = |text: &str| Zeroizing::new(text.to_owned());
        let secret = ApiSecret::new(text("fake-secret"));
        let passphrase = Passphrase::new(text("fake-pass"));
        let key = Key::new(text(id), &secret, &passphrase, KeyVersion::V3, None).unwrap();
        KeyState::Loaded {
            key,
            usage: Arc::default(),
            version: 1,
            problem: None,
            confirmed: Duration::ZERO,
            outage: None,
        }
    }

    #[test]
    fn a_key_that_shows_while_an_order_to_kill_it_is_under_way_does_not_serve() {
        let folder = tempfile::tempdir().unwrap();
        let restrictions = Arc::new(Restrictions::open(folder.path()).unwrap());
        let keyring = Keyring::new(Arc::new(Clock::system()), Arc::clone(&restrictions));
        let rules = crate::policy::Policy::parse(
            "[account.main]\nkey = { spot-margin = \"main\", futures = \"late\" }\n",
        );
        keyring.add(rules.unwrap().accounts());
        let account: AccountId = "main".parse().unwrap();
        let names: [KeyName; 2] = ["main", "late"].map(|name| name.parse().unwrap());
        // Each order came while nobody knew the key's id: one key shows before the order, one after it.
        keyring.set(&account, &names[0], ready("fake-1"));
        for name in &names {
            let by = "spiffe://demo.test/admin/anna".parse().unwrap();
            let mark = Mark { by, at_ms: 1 };
            restrictions.revoke(&account, name, None, &mark).unwrap();
        }
        let unseen = keyring.wipe_revoked();
        keyring.set(&account, &names[1], ready("fake-2"));
        for name in &names {
            let state = keyring.state(&account, name);
            assert!(
                matches!(state, Some(KeyState::Absent(_))),
                "{name}: {state:?}"
            );
        }
        // What it was is known now, and another key may come.
        for (account, name, key) in unseen {
            restrictions.seen(&account, &name, key).unwrap();
        }
        keyring.set(&account, &names[0], ready("fake-1"));
        assert!(matches!(
            keyring.state(&account, &names[0]),
            Some(KeyState::Absent(_))
        ));
        keyring.set(&account, &names[0], ready("fake-3"));
        assert!(matches!(
            keyring.state(&account, &names[0]),
            Some(KeyState::Loaded { .. })
        ));
        // An order whose admin hung up before the keys were wiped is in force all the same.
        let by = "spiffe://demo.test/admin/anna".parse().unwrap();
        let mark = Mark { by, at_ms: 1 };
        restrictions
            .revoke(&account, &names[0], None, &mark)
            .unwrap();
        keyring.change_unless_revoked(&account, &names[0], |_| {});
        assert!(matches!(
            keyring.state(&account, &names[0]),
            Some(KeyState::Absent(_))
        ));
    }
}
