//! The keys of all accounts, in memory. They are loaded and removed in the background; the request path only reads.
//!
//! A cached key stays in use while Vault is unreachable. Its age is the time since Vault last confirmed it: past
//! `max_stale_s` it signs nothing risk-increasing, past `max_stale_cancel_s` it is wiped. A new key replaces it once the
//! exchange has accepted requests that the new key signed.

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

/// How long a rejected request waits for another key at most; a test takes a few round trips to the exchange.
const KEY_TEST_TIMEOUT: Duration = Duration::from_secs(5);

/// How often keys are checked for being too old to stay in memory. Not a timer per key: timers pause while the machine
/// sleeps, and ages do not.
const WIPE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How long [`Keyring::refresh_now`] waits for Vault and for the key test.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(20);

/// Every key that the rules name, with its value or the reason why it is not loaded.
#[derive(Debug)]
pub(crate) struct Keyring {
    clock: Arc<Clock>,
    restrictions: Arc<Restrictions>,
    accounts: RwLock<BTreeMap<AccountId, Keys>>,
    /// The last test of each key, also of keys that are no longer in memory.
    past: Mutex<BTreeMap<(AccountId, KeyName), PastTest>>,
    changed: watch::Sender<()>,
    /// Wakes all polling tasks: a key was wiped, or is too old and was not polled since (the machine slept).
    refresh_all: Notify,
}

/// The keys of one account.
#[derive(Debug)]
struct Keys {
    max_stale: MaxStale,
    entries: BTreeMap<KeyName, KeyEntry>,
}

/// One key and its state.
#[derive(Debug)]
struct KeyEntry {
    state: KeyState,
    /// Whether a test is running that may change which key signs.
    is_testing: bool,
    /// The result of the last test of the key in memory.
    tested: Option<Tested>,
    /// Why a later test got no answer from the exchange.
    unanswered: Option<String>,
    /// The last key that was in memory here, or found to be revoked.
    last: Option<KeyDigest>,
    /// Restriction and hold from its custom metadata.
    noted: Noted,
    /// Why the key was wiped, until Vault responds again.
    wiped: Option<String>,
    refresh: Arc<Refresh>,
}

/// What admins have set in the key's custom metadata in Vault.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Noted {
    /// Why it signs nothing risk-increasing.
    pub(crate) restricted: Option<String>,
    /// The version that an admin holds instead of the newest.
    pub(crate) hold: Option<Hold>,
}

/// The last test of a key.
#[derive(Clone, Debug)]
pub(crate) struct Tested {
    /// When: Unix time in milliseconds.
    pub(crate) at_ms: i64,
    /// The result.
    pub(crate) report: Arc<Report>,
}

/// The last test of a key. If the key is loaded again, the test stays valid until the next one is due.
#[derive(Clone, Debug)]
struct PastTest {
    key: KeyDigest,
    version: u64,
    /// When the next test is due: time since boot.
    due: Duration,
    tested: Tested,
}

/// Requests to refresh one key from Vault, and counters of refreshes.
#[derive(Debug, Default)]
struct Refresh {
    /// Wakes the polling task of the key.
    wanted: Notify,
    /// How many refreshes have started, and how many of these have finished.
    count: watch::Sender<(u64, u64)>,
    /// Whether the first read from Vault is done, successful or not.
    is_read: watch::Sender<bool>,
    /// Whether a rejected version is to be tried once more.
    is_fresh: AtomicBool,
}

/// The state of one key.
#[derive(Clone, Debug)]
pub(crate) enum KeyState {
    /// Vault reports no key that the broker may use: removed, disabled, denied, or never written.
    Absent(String),
    /// In memory.
    Loaded {
        /// The key.
        key: Arc<Key>,
        /// How the exchange has responded to requests that it signed.
        usage: Arc<Usage>,
        /// The version in Vault.
        version: u64,
        /// Why another version is not used: the newest, or the one that an admin holds.
        problem: Option<String>,
        /// When Vault last confirmed it: time since boot.
        confirmed: Duration,
        /// Why Vault has not confirmed it since; none if the last attempt succeeded.
        outage: Option<String>,
    },
    /// Vault has not responded yet, or not for so long that the key was wiped.
    Pending(String),
}

/// A key to sign one request, and how stale it is.
#[derive(Clone, Debug)]
pub(crate) struct KeyLease {
    /// The key.
    pub(crate) key: Arc<Key>,
    /// How the exchange has responded to requests that it signed.
    pub(crate) usage: Arc<Usage>,
    /// Its version in Vault; none for a key under test.
    pub(crate) version: Option<u64>,
    /// Time since Vault last confirmed it; zero while Vault responds.
    pub(crate) stale: Duration,
}

impl KeyLease {
    /// A key that signs only test requests.
    pub(crate) fn for_test(key: Arc<Key>) -> Self {
        Self {
            key,
            usage: Arc::default(),
            version: None,
            stale: Duration::ZERO,
        }
    }
}

/// A snapshot of one key, for readiness and metrics.
#[derive(Debug)]
pub(crate) struct KeySnapshot {
    /// Its account.
    pub(crate) account: AccountId,
    /// Its name.
    pub(crate) name: KeyName,
    /// Its state.
    pub(crate) state: KeyState,
    /// Time since Vault last confirmed it; none if it is not in memory.
    pub(crate) age: Option<Duration>,
    /// Whether it is too old to sign risk-increasing requests.
    pub(crate) is_too_old: bool,
    /// The result of the last test that the exchange answered.
    pub(crate) tested: Option<Tested>,
    /// Why a later test got no answer from the exchange.
    pub(crate) unanswered: Option<String>,
    /// The last key that was in memory under this name, or found to be revoked.
    pub(crate) last: Option<KeyDigest>,
    /// Restriction and hold from its custom metadata.
    pub(crate) noted: Noted,
}

/// The account's key cannot sign this request.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the key of account {account} for this scope is not available: {reason}")]
pub(crate) struct KeyUnavailable {
    account: AccountId,
    reason: String,
}

impl KeyUnavailable {
    /// An admin has revoked it; bots do not learn which admin.
    pub(crate) fn revoked(account: &AccountId) -> Self {
        Self {
            account: account.clone(),
            reason: "an admin has revoked it; register another key".to_owned(),
        }
    }
}

/// Who revoked a key, for admins.
fn revoked_by(revoked: &Revoked) -> String {
    format!(
        "{} has revoked it; register another key",
        revoked.by.as_str()
    )
}

impl Keyring {
    /// An empty keyring; ages are measured with `clock`. Keys that `restrictions` list as revoked are never kept.
    pub(crate) fn new(clock: Arc<Clock>, restrictions: Arc<Restrictions>) -> Self {
        Self {
            clock,
            restrictions,
            accounts: RwLock::default(),
            past: Mutex::default(),
            changed: watch::Sender::new(()),
            refresh_all: Notify::new(),
        }
    }

    /// Adds entries for the keys of these accounts; existing entries stay.
    pub(crate) fn add<'a>(&self, accounts: impl Iterator<Item = &'a Arc<Account>>) {
        let mut known = self.accounts.write();
        for account in accounts {
            let keys = known.entry(account.id.clone()).or_insert_with(|| Keys {
                max_stale: account.max_stale,
                entries: BTreeMap::new(),
            });
            keys.max_stale = account.max_stale;
            for name in account.keys.values() {
                let entry = keys.entries.entry(name.clone());
                entry.or_insert_with(KeyEntry::new);
            }
        }
        drop(known);
        self.changed.send_replace(());
    }

    /// Drops all keys except those of these accounts.
    pub(crate) fn retain<'a>(&self, accounts: impl Iterator<Item = &'a Arc<Account>>) {
        let accounts: BTreeMap<_, _> = accounts.map(|account| (&account.id, account)).collect();
        let mut known = self.accounts.write();
        known.retain(|id, keys| {
            let Some(account) = accounts.get(id) else {
                return false;
            };
            keys.entries
                .retain(|name, _| account.keys.values().any(|named| named == name));
            true
        });
        drop(known);
        self.changed.send_replace(());
    }

    /// The key that signs what `permit` allows.
    ///
    /// # Errors
    /// When it is not in memory, cannot sign this request, or Vault last confirmed it longer ago than the account allows.
    pub(crate) fn key(&self, permit: &Permit) -> Result<KeyLease, KeyUnavailable> {
        let account = &permit.account().id;
        let unavailable = |reason: &str| KeyUnavailable {
            account: account.clone(),
            reason: reason.to_owned(),
        };
        let unnamed = || unavailable("the rules name no key for this scope");
        let name = permit.key_name().ok_or_else(unnamed)?;
        let accounts = self.accounts.read();
        let keys = accounts.get(account).ok_or_else(unnamed)?;
        let (entry, has_partner) = (keys.entries.get(name), permit.partner().is_some());
        match entry.map(|entry| &entry.state) {
            Some(KeyState::Loaded { key, .. }) if has_partner && !key.has_partner_key() => Err(
                unavailable("the account has a partner, but its key in Vault has no `partner_key`"),
            ),
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
                        // The machine has slept, and no poll has run since.
                        self.refresh_all.notify_waiters();
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
                    // No poll has run since it was wiped.
                    self.refresh_all.notify_waiters();
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

    /// A snapshot of every key.
    pub(crate) fn entries(&self) -> Vec<KeySnapshot> {
        let now = self.clock.boot();
        let accounts = self.accounts.read();
        let all = accounts.iter().flat_map(|(account, keys)| {
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

    /// Returns once the first read from Vault is done for every key that is in the keyring now, successful or not.
    pub(crate) async fn first_read(&self) {
        let all: Vec<_> = {
            let accounts = self.accounts.read();
            let keys = accounts.values().flat_map(|keys| keys.entries.values());
            keys.map(|entry| entry.refresh.is_read.subscribe())
                .collect()
        };
        for mut is_read in all {
            // An error means that the rules no longer name the key.
            let _ = is_read.wait_for(|is_read| *is_read).await;
        }
    }

    /// Notifies when any key changes.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// How long the keys of an account may sign everything without confirmation by Vault.
    fn max_stale(&self, account: &AccountId) -> Duration {
        let accounts = self.accounts.read();
        accounts
            .get(account)
            .map_or(Duration::MAX, |keys| keys.max_stale.risk_increasing)
    }

    /// Wipes each key within a second after its account's `max_stale_cancel_s`, and requests a refresh. Never returns.
    pub(crate) async fn wipe_on_time(self: Arc<Self>) {
        loop {
            for (account, name) in self.wipe_too_old() {
                tracing::error!(account.id = %account, key.name = %name, "key wiped: not confirmed by Vault within max_stale_cancel_s");
            }
            sleep(WIPE_CHECK_INTERVAL).await;
        }
    }

    /// Wipes the keys that are too old even to cancel orders, and returns them.
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
        let accounts = self.accounts.read();
        let is_any_past = accounts.values().any(is_past);
        drop(accounts);
        let mut wiped = Vec::new();
        if !is_any_past {
            return wiped;
        }
        let mut accounts = self.accounts.write();
        for (account, keys) in accounts.iter_mut() {
            let max = keys.max_stale.cancels_and_reads;
            for (name, entry) in &mut keys.entries {
                if let Some(age) = age_past(max, entry) {
                    let outage = entry.state.outage();
                    let why = too_old_to_keep(age, max);
                    entry.wiped = Some(why.clone());
                    entry.set_state(KeyState::Pending(outage.unwrap_or(why)));
                    wiped.push((account.clone(), name.clone()));
                }
            }
        }
        drop(accounts);
        self.changed.send_replace(());
        // Polling tasks drop a newer version that waits for its test: it is as old.
        self.refresh_all.notify_waiters();
        wiped
    }

    /// The state of one key.
    fn state(&self, account: &AccountId, name: &KeyName) -> Option<KeyState> {
        let accounts = self.accounts.read();
        Some(accounts.get(account)?.entries.get(name)?.state.clone())
    }

    /// Sets the state of a key; the previous key is wiped once its last request is signed.
    fn set(&self, account: &AccountId, name: &KeyName, state: KeyState) {
        self.change(account, name, |entry| {
            // Checked under the lock that `wipe_revoked` takes: a key that was revoked meanwhile does not come back.
            let revoked = self.revoked(account, name, &state);
            entry
                .set_state(revoked.map_or(state, |revoked| KeyState::Absent(revoked_by(&revoked))));
        });
    }

    /// Changes an entry after a response or an outage of Vault; a key that was revoked meanwhile is wiped.
    fn change_unless_revoked(
        &self,
        account: &AccountId,
        name: &KeyName,
        change: impl FnOnce(&mut KeyEntry),
    ) {
        self.change(account, name, |entry| {
            change(entry);
            if let Some(revoked) = self.revoked(account, name, &entry.state) {
                entry.set_state(KeyState::Absent(revoked_by(&revoked)));
            }
        });
    }

    /// Records that Vault holds a revoked key.
    fn set_revoked(&self, account: &AccountId, name: &KeyName, key: KeyDigest) {
        self.change(account, name, |entry| entry.last = Some(key));
    }

    /// Stores restriction and hold; returns the previous ones if they differ.
    fn set_noted(&self, account: &AccountId, name: &KeyName, noted: &Noted) -> Option<Noted> {
        let is_unchanged = {
            let accounts = self.accounts.read();
            let keys = accounts.get(account);
            let entry = keys.and_then(|keys| keys.entries.get(name));
            entry.is_none_or(|entry| entry.noted == *noted)
        };
        // This runs at every poll: do not wake receivers of `changed` without a change.
        if is_unchanged {
            return None;
        }
        let mut before = None;
        self.change(account, name, |entry| {
            before = Some(std::mem::replace(&mut entry.noted, noted.clone()));
        });
        before
    }

    /// Stores why another version is not used, next to the key in memory.
    fn set_problem(&self, account: &AccountId, name: &KeyName, reason: Option<String>) {
        self.change(account, name, |entry| {
            if let KeyState::Loaded { problem, .. } = &mut entry.state {
                *problem = reason;
            }
        });
    }

    /// Stores whether a test is running that may change which key signs.
    fn set_testing(&self, account: &AccountId, name: &KeyName, is_testing: bool) {
        let is_unchanged = {
            let accounts = self.accounts.read();
            let keys = accounts.get(account);
            let entry = keys.and_then(|keys| keys.entries.get(name));
            entry.is_some_and(|entry| entry.is_testing == is_testing)
        };
        // This runs at every poll: do not wake receivers of `changed` without a change.
        if is_unchanged {
            return;
        }
        self.change(account, name, |entry| entry.is_testing = is_testing);
    }

    /// The last test of the key that the rules name for this request.
    pub(crate) fn tested(&self, permit: &Permit) -> Option<Tested> {
        let accounts = self.accounts.read();
        let keys = accounts.get(&permit.account().id)?;
        keys.entries.get(permit.key_name()?)?.tested.clone()
    }

    /// Stores a test result of the key in memory, unless another key has replaced it meanwhile. A test that the exchange
    /// did not answer leaves the previous result in place.
    pub(crate) fn set_tested(
        &self,
        account: &AccountId,
        name: &KeyName,
        tested: &Arc<Key>,
        report: Arc<Report>,
    ) {
        let at_ms = self.clock.wall_ms();
        self.change(account, name, |entry| {
            let is_current =
                matches!(&entry.state, KeyState::Loaded { key, .. } if Arc::ptr_eq(key, tested));
            match &report.verdict {
                _ if !is_current => {}
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

    /// Remembers that the key in memory needs no test before `due`, also if it is wiped and loaded again.
    fn remember(&self, account: &AccountId, name: &KeyName, due: Duration) {
        let accounts = self.accounts.read();
        let keys = accounts.get(account);
        let entry = keys.and_then(|keys| keys.entries.get(name));
        if let Some(KeyEntry {
            state: KeyState::Loaded { key, version, .. },
            tested: Some(tested),
            ..
        }) = entry
        {
            let past = PastTest {
                key: KeyDigest(key.id_sha256()),
                version: *version,
                due,
                tested: tested.clone(),
            };
            let mut all = self.past.lock();
            all.insert((account.clone(), name.clone()), past);
        }
    }

    /// Restores the last test result of a key that is loaded again, and returns when the next test is due; none if that
    /// result was not good, or the next test is due already.
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
        let mut accounts = self.accounts.write();
        let keys = accounts.get_mut(account);
        if let Some(entry) = keys.and_then(|keys| keys.entries.get_mut(name)) {
            change(entry);
        }
        drop(accounts);
        self.changed.send_replace(());
    }

    /// Wipes every revoked key. Returns the keys that were revoked before their ids were known, for
    /// [`Restrictions::seen`].
    pub(crate) fn wipe_revoked(&self) -> Vec<(AccountId, KeyName, KeyDigest)> {
        let mut unseen = Vec::new();
        let mut accounts = self.accounts.write();
        for (account, keys) in accounts.iter_mut() {
            for (name, entry) in &mut keys.entries {
                let Some(revoked) = self.revoked(account, name, &entry.state) else {
                    continue;
                };
                entry.set_state(KeyState::Absent(revoked_by(&revoked)));
                unseen.extend(entry.last.map(|key| (account.clone(), name.clone(), key)));
            }
        }
        drop(accounts);
        self.changed.send_replace(());
        unseen.retain(|(account, name, _)| self.restrictions.has_pending_revocation(account, name));
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

    /// Whether a key other than `used`, which the exchange has rejected, signs by now. Waits while a key is being tested.
    pub(crate) async fn wait_for_other_key(&self, permit: &Permit, used: &Arc<Key>) -> bool {
        let Some(name) = permit.key_name() else {
            return false;
        };
        let wait = async {
            let mut changes = self.changes();
            loop {
                changes.borrow_and_update();
                let (is_other, is_testing) = {
                    let accounts = self.accounts.read();
                    let keys = accounts.get(&permit.account().id);
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
        timeout(KEY_TEST_TIMEOUT, wait).await.unwrap_or(false)
    }

    /// Requests a refresh after the exchange has rejected the key of `permit`: Vault may have a newer one.
    pub(crate) fn request_refresh(&self, permit: &Permit) {
        if let Some(name) = permit.key_name()
            && let Some(refresh) = self.refresh(&permit.account().id, name)
        {
            refresh.wanted.notify_waiters();
        }
    }

    /// Refreshes a key from Vault, and waits until that is done, including the test of a new version. A rejected version
    /// is tried once more. Returns whether the refresh finished in time.
    pub(crate) async fn refresh_now(&self, account: &AccountId, name: &KeyName) -> bool {
        let Some(refresh) = self.refresh(account, name) else {
            return false;
        };
        refresh.is_fresh.store(true, Ordering::Relaxed);
        let mut count = refresh.count.subscribe();
        let (started, _) = *count.borrow_and_update();
        refresh.wanted.notify_waiters();
        let finished = count.wait_for(|(_, finished)| *finished > started);
        matches!(timeout(REFRESH_TIMEOUT, finished).await, Ok(Ok(_)))
    }

    fn refresh(&self, account: &AccountId, name: &KeyName) -> Option<Arc<Refresh>> {
        let accounts = self.accounts.read();
        let entry = accounts.get(account)?.entries.get(name)?;
        Some(Arc::clone(&entry.refresh))
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

    /// Sets the state; test results of another key are dropped.
    fn set_state(&mut self, state: KeyState) {
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
    let why = why.unwrap_or("the broker has not polled Vault");
    format!(
        "Vault last confirmed the key {} s ago (limit for this request: {} s); since then: {why}",
        age.as_secs(),
        max.as_secs()
    )
}

fn too_old_to_keep(age: Duration, max: Duration) -> String {
    format!(
        "wiped from memory: last confirmed by Vault {} s ago, max_stale_cancel_s is {} s",
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

    fn loaded(id: &str) -> KeyState {
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
    fn key_that_was_revoked_before_its_id_was_known_is_never_used() {
        let folder = tempfile::tempdir().unwrap();
        let restrictions = Arc::new(Restrictions::open(folder.path()).unwrap());
        let keyring = Keyring::new(Arc::new(Clock::system()), Arc::clone(&restrictions));
        let rules = crate::policy::Policy::parse(
            "[account.main]\nkey = { spot-margin = \"main\", futures = \"late\" }\n",
        );
        keyring.add(rules.unwrap().accounts());
        let account: AccountId = "main".parse().unwrap();
        let names: [KeyName; 2] = ["main", "late"].map(|name| name.parse().unwrap());
        // Both are revoked without an id: one key is loaded before the revocation, one after it.
        keyring.set(&account, &names[0], loaded("fake-1"));
        for name in &names {
            let by = "spiffe://demo.test/admin/anna".parse().unwrap();
            let mark = Mark { by, at_ms: 1 };
            restrictions.revoke(&account, name, None, &mark).unwrap();
        }
        let unseen = keyring.wipe_revoked();
        keyring.set(&account, &names[1], loaded("fake-2"));
        for name in &names {
            let state = keyring.state(&account, name);
            assert!(
                matches!(state, Some(KeyState::Absent(_))),
                "{name}: {state:?}"
            );
        }
        // Its id is known now, and another key may be loaded.
        for (account, name, key) in unseen {
            restrictions.seen(&account, &name, key).unwrap();
        }
        keyring.set(&account, &names[0], loaded("fake-1"));
        assert!(matches!(
            keyring.state(&account, &names[0]),
            Some(KeyState::Absent(_))
        ));
        keyring.set(&account, &names[0], loaded("fake-3"));
        assert!(matches!(
            keyring.state(&account, &names[0]),
            Some(KeyState::Loaded { .. })
        ));
        // A revocation also applies if the admin disconnected before the keys were wiped.
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
