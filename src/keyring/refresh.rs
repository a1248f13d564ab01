//! Keeps the keyring in sync with Vault: reads every key at start, then polls its metadata for changes.
//!
//! `rotation.rs` decides which version signs; this file carries that out: it reads from Vault, requests key tests and
//! changes the keyring.
//!
//! Tests run concurrently with the polls: an exchange that does not respond delays no poll.

use std::collections::BTreeMap;
use std::future::pending;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::key_test::{KeyChange, KeyEvent, KeyEvents, KeyTestRequest, Report, Verdict};
use super::rotation::{Action, ActiveVersion, Event, Rotation};
use super::{KeyState, Keyring, Noted, Refresh};
use crate::base::ids::{AccountId, KeyName};
use crate::restrictions::Restrictions;
use crate::telemetry::Metrics;
use crate::vault::{BACKOFF, Vault, VaultError};

/// The shortest time between two polls of a key, whatever requests a refresh.
const MIN_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Time limit of a key test.
const TEST_TIMEOUT: Duration = Duration::from_secs(10);

/// One polling task for each key of the keyring.
#[derive(Debug)]
pub(crate) struct Refresher {
    keyring: Arc<Keyring>,
    vault: Arc<Vault>,
    restrictions: Arc<Restrictions>,
    key_events: KeyEvents,
    metrics: Arc<Metrics>,
    poll: Duration,
    tasks: Mutex<BTreeMap<(AccountId, KeyName), AbortHandle>>,
}

impl Refresher {
    /// Polls nothing until [`Refresher::follow`]. The receiver of `key_events` tests keys and audits changes.
    pub(crate) fn new(
        keyring: Arc<Keyring>,
        vault: Arc<Vault>,
        restrictions: Arc<Restrictions>,
        key_events: KeyEvents,
        metrics: Arc<Metrics>,
        poll: Duration,
    ) -> Self {
        Self {
            keyring,
            vault,
            restrictions,
            key_events,
            metrics,
            poll,
            tasks: Mutex::default(),
        }
    }

    /// Polls every key in the keyring, and stops polling all others.
    pub(crate) fn follow(&self) {
        let keys: Vec<_> = self.keyring.entries();
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|(account, name), task| {
            // A task that panicked is started again.
            let stays = !task.is_finished()
                && keys
                    .iter()
                    .any(|key| key.account == *account && key.name == *name);
            if !stays {
                task.abort();
            }
            stays
        });
        for key in keys {
            let Some(refresh) = self.keyring.refresh(&key.account, &key.name) else {
                continue;
            };
            tasks
                .entry((key.account.clone(), key.name.clone()))
                .or_insert_with(|| {
                    let watch = Watch {
                        keyring: Arc::clone(&self.keyring),
                        vault: Arc::clone(&self.vault),
                        restrictions: Arc::clone(&self.restrictions),
                        key_events: self.key_events.clone(),
                        metrics: Arc::clone(&self.metrics),
                        account: key.account,
                        name: key.name,
                        refresh,
                        rotation: Rotation::default(),
                        sent_at: Duration::ZERO,
                        is_answered: false,
                        running: None,
                    };
                    tokio::spawn(watch.run(self.poll)).abort_handle()
                });
        }
    }
}

impl Drop for Refresher {
    fn drop(&mut self) {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.values().for_each(AbortHandle::abort);
    }
}

/// The polling task of one key.
struct Watch {
    keyring: Arc<Keyring>,
    vault: Arc<Vault>,
    restrictions: Arc<Restrictions>,
    key_events: KeyEvents,
    metrics: Arc<Metrics>,
    account: AccountId,
    name: KeyName,
    refresh: Arc<Refresh>,
    rotation: Rotation,
    /// When the last read that succeeded was sent, in time since boot: Vault confirms the key as of that moment.
    sent_at: Duration,
    /// Whether the last poll got a usable response.
    is_answered: bool,
    running: Option<Running>,
}

/// A running test.
struct Running {
    tested: ActiveVersion,
    /// Whether it is not the key in memory.
    is_candidate: bool,
    report: oneshot::Receiver<Report>,
    /// When it times out.
    until: Instant,
}

impl Watch {
    async fn run(mut self, poll: Duration) {
        let mut backoff = BACKOFF;
        loop {
            // Subscribed before the poll, so that no request for a refresh is missed meanwhile.
            let (keyring, refresh) = (Arc::clone(&self.keyring), Arc::clone(&self.refresh));
            let (all, wanted) = (keyring.refresh_all.notified(), refresh.wanted.notified());
            refresh.count.send_modify(|(started, _)| *started += 1);
            self.check().await;
            refresh.is_read.send_replace(true);
            let wait = if self.is_answered {
                backoff.reset();
                // A key must not become too old between two successful polls.
                let poll = poll.min(self.keyring.max_stale(&self.account) / 3);
                poll.mul_f64(0.8 + 0.4 * fastrand::f64())
            } else {
                backoff.wait()
            };
            self.start_due_test().await;
            let next_poll = async {
                sleep(MIN_POLL_INTERVAL).await;
                let woken = async {
                    tokio::select! {
                        () = all => {}
                        () = wanted => {}
                    }
                };
                let _ = timeout(wait.saturating_sub(MIN_POLL_INTERVAL), woken).await;
            };
            let mut next_poll = pin!(next_poll);
            loop {
                tokio::select! {
                    () = &mut next_poll => break,
                    report = self.report() => {
                        self.conclude(report).await;
                        self.start_due_test().await;
                    }
                }
            }
        }
    }

    /// Starts the test that is due; without one, the refresh is finished.
    async fn start_due_test(&mut self) {
        self.handle(Event::Idle).await;
        if self.running.is_none() {
            self.keyring.set_testing(&self.account, &self.name, false);
            let finish = |(started, finished): &mut (u64, u64)| *finished = *started;
            self.refresh.count.send_modify(finish);
        }
    }

    /// Polls Vault once, and compares the metadata with the key in memory.
    async fn check(&mut self) {
        self.forget_if_wiped();
        let sent_at = self.keyring.clock.boot();
        let request = self.vault.metadata(&self.account, &self.name);
        let answer = self.unless_wiped(request).await;
        if answer.is_ok() {
            self.sent_at = sent_at;
        }
        self.is_answered = true;
        let is_fresh = self.refresh.is_fresh.swap(false, Ordering::Relaxed);
        self.handle(Event::Metadata(answer, is_fresh)).await;
    }

    /// Waits for the result of the running test; never returns without one.
    async fn report(&mut self) -> Report {
        let Some(running) = &mut self.running else {
            return pending().await;
        };
        let report = timeout_at(running.until, &mut running.report).await;
        // An error means that the broker is shutting down, or that its rules do not name the key yet.
        report.ok().and_then(Result::ok).unwrap_or_else(|| Report {
            verdict: Verdict::Unclear("the exchange did not respond in time".to_owned()),
            info: None,
            findings: Vec::new(),
        })
    }

    /// Handles the result of a test. The key may have been revoked while the test ran.
    async fn conclude(&mut self, report: Report) {
        let Some(running) = self.running.take() else {
            return;
        };
        let mut checked = Ok(());
        let may_sign = match report.verdict {
            Verdict::Good => true,
            Verdict::Refused(_) => false,
            Verdict::Unclear(_) => report.info.is_some(),
        };
        if running.is_candidate && may_sign {
            checked = self.check_revoked(&running.tested).await;
        }
        let revoked = checked.err().map(|error| error.to_string());
        self.handle(Event::Tested(running.tested, report, revoked))
            .await;
    }

    /// Performs the actions that an event requires.
    async fn handle(&mut self, event: Event) {
        let mut event = Some(event);
        while let Some(next) = event.take() {
            let now = self.keyring.clock.boot();
            let actions = self.rotation.step(now, self.serving(), next);
            if !self.rotation.is_testing() {
                self.running = None;
            }
            let problem = self.rotation.problem();
            // This runs at every poll: do not wake receivers of `changes` without a change.
            if matches!(self.state(), Some(KeyState::Loaded { problem: shown, .. }) if shown != problem)
            {
                self.keyring.set_problem(&self.account, &self.name, problem);
            }
            for action in actions {
                event = self.perform(action).await;
            }
        }
    }

    /// Performs an action; returns the result of a read from Vault as the next event.
    async fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Activate(next) => self.activate(&next).await,
            Action::ActivateUntested(next) => {
                // Before it signs: requests that the exchange rejects wait for its test, which follows at once.
                self.keyring.set_testing(&self.account, &self.name, true);
                self.activate(&next).await;
                let due = self.keyring.recall(&self.account, &self.name);
                self.rotation.recall(due);
            }
            Action::AwaitTest(version, reason) => {
                tracing::warn!(account.id = %self.account, key.name = %self.name, key.vault_version = version, %reason, "new key version cannot be tested yet; still using the current one");
            }
            Action::Confirm => self.confirm(),
            Action::Evict(reason) => self.evict(reason),
            Action::CheckExists(version) => return Some(Event::Version(self.read(version).await)),
            Action::MarkOutage(error) => self.mark_outage(&error),
            Action::Note(noted, newest) => self.note(noted, newest),
            Action::Read(version) => {
                let mut found = self.read(version).await;
                if let Ok(next) = &found {
                    let checked = self.check_revoked(next).await;
                    found = checked.and(found);
                }
                return Some(Event::Version(found));
            }
            Action::Record(tested, report, due) => {
                let (account, name) = (&self.account, &self.name);
                let report = Arc::new(report);
                self.keyring
                    .set_tested(account, name, &tested.key, Arc::clone(&report));
                if let Verdict::Refused(reason) = &report.verdict {
                    tracing::error!(account.id = %account, key.name = %name, key.vault_version = tested.version, %reason, "key failed its test");
                }
                if let Some(due) = due {
                    self.keyring.remember(account, name, due);
                }
            }
            Action::RejectTested(next, reason) => {
                self.metrics.vault_failure("unusable");
                tracing::error!(account.id = %self.account, key.name = %self.name, key.vault_version = next.version, %reason, "new key version failed its test; still using the current one");
                self.audit_change(
                    self.serving().as_ref(),
                    Some(&next),
                    "rejected",
                    Some(reason),
                );
            }
            Action::RejectLater(version, reason) => {
                self.metrics.vault_failure("unusable");
                tracing::error!(account.id = %self.account, key.name = %self.name, key.vault_version = version, %reason, "version newer than the held one failed its test; still using the held version");
            }
            Action::RejectUnusable(version, reason) => {
                self.metrics.vault_failure("unusable");
                tracing::error!(account.id = %self.account, key.name = %self.name, %reason, key.vault_version = version, "new key version is unusable; still using the current one");
            }
            Action::TestCandidate(next) => self.test(next, true),
            Action::TestServing(serving) => self.test(serving, false),
        }
        None
    }

    /// Reads a version of the key from Vault.
    async fn read(&self, version: u64) -> Result<ActiveVersion, VaultError> {
        let request = self.vault.read(&self.account, &self.name, version);
        Ok(ActiveVersion {
            key: self.unless_wiped(request).await?,
            usage: Arc::default(),
            version,
        })
    }

    /// Sends a request to Vault, but fails as soon as the keyring wipes the key for its age: this task holds versions of
    /// the key, and must not hold them for as long as Vault hangs.
    async fn unless_wiped<T>(
        &self,
        request: impl Future<Output = Result<T, VaultError>>,
    ) -> Result<T, VaultError> {
        // Subscribed before the check, so that no change is missed.
        let mut changes = self.keyring.changes();
        let wiped = async {
            while !self.is_wiped() {
                if changes.changed().await.is_err() {
                    return pending().await;
                }
            }
        };
        tokio::select! {
            biased;
            answer = request => answer,
            () = wiped => Err(VaultError::Outage("key wiped before Vault responded".into())),
        }
    }

    /// Whether the keyring has wiped the key for its age since the last successful poll.
    fn is_wiped(&self) -> bool {
        self.rotation.has_seen() && matches!(self.state(), Some(KeyState::Pending(_)))
    }

    /// Drops the candidate if the keyring has wiped the key for its age: the candidate is as old.
    fn forget_if_wiped(&mut self) {
        if self.is_wiped() {
            self.rotation.forget();
            self.running = None;
        }
    }

    async fn check_revoked(&self, found: &ActiveVersion) -> Result<(), VaultError> {
        let digest = found.digest();
        let (account, name) = (self.account.clone(), self.name.clone());
        if self.restrictions.has_pending_revocation(&account, &name) {
            let restrictions = Arc::clone(&self.restrictions);
            let seen = spawn_blocking(move || restrictions.seen(&account, &name, digest)).await;
            if let Ok(Err(error)) = seen {
                tracing::error!(account.id = %self.account, key.name = %self.name, exception.message = %error, "cannot write the revocation to restrictions.json");
            }
        }
        let Some(revoked) = self.restrictions.revoked(digest) else {
            return Ok(());
        };
        if self.serving().is_none() {
            self.keyring.set_revoked(&self.account, &self.name, digest);
        }
        Err(VaultError::Unusable(format!(
            "version {}: {}",
            found.version,
            super::revoked_by(&revoked)
        )))
    }

    /// Requests a key test; requests that the exchange rejects meanwhile wait if another key may replace this one.
    fn test(&mut self, tested: ActiveVersion, is_candidate: bool) {
        let may_change = is_candidate || !tested.is_proven();
        self.keyring
            .set_testing(&self.account, &self.name, may_change);
        let (tell, report) = oneshot::channel();
        let key_test = KeyTestRequest {
            account: self.account.clone(),
            name: self.name.clone(),
            key: Arc::clone(&tested.key),
            is_candidate,
            tell,
        };
        let _ = self.key_events.send(KeyEvent::KeyTestRequest(key_test));
        self.running = Some(Running {
            tested,
            is_candidate,
            report,
            until: Instant::now() + TEST_TIMEOUT,
        });
    }

    /// Makes `next` the only version that signs.
    async fn activate(&self, next: &ActiveVersion) {
        let before = self.serving();
        let state = KeyState::Loaded {
            key: Arc::clone(&next.key),
            usage: Arc::clone(&next.usage),
            version: next.version,
            problem: self.rotation.problem(),
            confirmed: self.sent_at,
            outage: self.outage(),
        };
        self.keyring.set(&self.account, &self.name, state);
        let is_next = |serving: ActiveVersion| Arc::ptr_eq(&serving.key, &next.key);
        if self.serving().is_some_and(is_next) {
            self.audit_change(before.as_ref(), Some(next), "activated", None);
            tracing::info!(account.id = %self.account, key.name = %self.name, key.vault_version = next.version, "key loaded");
        } else {
            // An admin has just revoked it, maybe before its id was known.
            let _ = self.check_revoked(next).await;
        }
    }

    /// Records that Vault has confirmed the key in memory.
    fn confirm(&self) {
        let mut outage = None;
        self.keyring
            .change_unless_revoked(&self.account, &self.name, |entry| {
                if let KeyState::Loaded {
                    confirmed,
                    outage: current,
                    ..
                } = &mut entry.state
                {
                    *confirmed = self.sent_at;
                    outage = current.take();
                }
            });
        if outage.is_some()
            && let Some(ActiveVersion { version, .. }) = self.serving()
        {
            tracing::info!(account.id = %self.account, key.name = %self.name, key.vault_version = version, "Vault reachable again; key confirmed");
        }
    }

    /// Removes the key from memory.
    fn evict(&self, reason: String) {
        let is_known = matches!(self.state(), Some(KeyState::Absent(before)) if before == reason);
        if !is_known {
            let serving = self.serving();
            // Without a loaded key, such as at the first start, nothing is removed.
            if serving.is_some() {
                self.metrics.vault_failure("evicted");
            }
            tracing::error!(account.id = %self.account, key.name = %self.name, reason, "key unavailable");
            self.audit_change(serving.as_ref(), None, "removed", Some(reason.clone()));
        }
        self.keyring
            .set(&self.account, &self.name, KeyState::Absent(reason));
    }

    /// Records that Vault gave no usable response: the key stays in use until it is too old.
    fn mark_outage(&mut self, error: &VaultError) {
        let reason = error.to_string();
        let is_login = matches!(error, VaultError::LoginRefused(_));
        self.metrics
            .vault_failure(if is_login { "login" } else { "outage" });
        match (is_login, self.serving().is_some()) {
            (true, true) => {
                tracing::error!(account.id = %self.account, key.name = %self.name, exception.message = %reason, "Vault login rejected; using cached keys");
            }
            (true, false) => {
                tracing::error!(account.id = %self.account, key.name = %self.name, exception.message = %reason, "Vault login rejected; key not loaded");
            }
            (false, true) => {
                tracing::warn!(account.id = %self.account, key.name = %self.name, exception.message = %reason, "Vault unreachable; using cached keys");
            }
            (false, false) => {
                tracing::warn!(account.id = %self.account, key.name = %self.name, exception.message = %reason, "Vault unreachable; key not loaded");
            }
        }
        self.is_answered = false;
        self.forget_if_wiped();
        self.keyring
            .change_unless_revoked(&self.account, &self.name, |entry| match &mut entry.state {
                KeyState::Absent(_) => {}
                KeyState::Loaded { outage, .. } => *outage = Some(reason),
                KeyState::Pending(_) => entry.set_state(KeyState::Pending(reason)),
            });
    }

    /// Stores restriction and hold, and logs changes.
    fn note(&self, noted: Noted, newest: u64) {
        let Some(before) = self.keyring.set_noted(&self.account, &self.name, &noted) else {
            return;
        };
        if let Some(reason) = noted.restricted.filter(|_| before.restricted.is_none()) {
            tracing::warn!(account.id = %self.account, key.name = %self.name, reason, "key has an unknown state in Vault");
        }
        if noted.hold != before.hold {
            let held = noted.hold.map(|hold| hold.version);
            match (before.hold, held) {
                (None, _) => {
                    tracing::info!(account.id = %self.account, key.name = %self.name, key.held_version = held, key.newest_version = newest, "key version is held");
                }
                (Some(_), Some(_)) => {
                    tracing::info!(account.id = %self.account, key.name = %self.name, key.held_version = held, key.newest_version = newest, "held or newest key version changed");
                }
                (Some(_), None) => {
                    tracing::info!(account.id = %self.account, key.name = %self.name, key.newest_version = newest, "key version is no longer held");
                }
            }
        }
    }

    /// Audits a change.
    fn audit_change(
        &self,
        before: Option<&ActiveVersion>,
        after: Option<&ActiveVersion>,
        outcome: &'static str,
        detail: Option<String>,
    ) {
        let identity = |serving: &ActiveVersion| (serving.version, serving.digest());
        let change = KeyChange {
            account: self.account.clone(),
            name: self.name.clone(),
            before: before.map(identity),
            after: after.map(identity),
            outcome,
            detail,
        };
        let _ = self.key_events.send(KeyEvent::Changed(change));
    }

    fn serving(&self) -> Option<ActiveVersion> {
        match self.state()? {
            KeyState::Loaded {
                key,
                usage,
                version,
                ..
            } => Some(ActiveVersion {
                key,
                usage,
                version,
            }),
            KeyState::Absent(_) | KeyState::Pending(_) => None,
        }
    }

    fn state(&self) -> Option<KeyState> {
        self.keyring.state(&self.account, &self.name)
    }

    /// Why the last poll did not confirm the key; none if it got a usable response. The state still has the outage from
    /// before that response if the key in memory was lost during the outage: no key was there to confirm.
    fn outage(&self) -> Option<String> {
        self.state()?.outage().filter(|_| !self.is_answered)
    }
}
