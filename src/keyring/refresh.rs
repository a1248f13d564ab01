//! Keeps the keyring as Vault has it: reads at start, then polls the metadata of each key for changes.
//!
//! Decides nothing about versions: `rotation.rs` does, and this asks Vault, has keys tested and changes the keyring
//! as it says.
//!
//! Tests go on beside the polls: an exchange that does not answer keeps nobody from hearing what Vault says.

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
use super::rotation::{Action, Event, Rotation, Serving};
use super::{KeyState, Keyring, Noted, Refresh};
use crate::base::ids::{AccountId, KeyName};
use crate::restrictions::Restrictions;
use crate::telemetry::Metrics;
use crate::vault::{BACKOFF, Vault, VaultError};

/// However much there is to doubt, Vault is not asked more often.
const AT_LEAST: Duration = Duration::from_millis(100);

/// How long a test may take.
const TEST_WITHIN: Duration = Duration::from_secs(10);

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
    /// Nothing is polled until [`Refresher::follow`]. Keys are tested by whoever reads `key_events`.
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

    /// Polls every key that the keyring has a place for, and no other.
    pub(crate) fn follow(&self) {
        let keys: Vec<_> = self.keyring.entries();
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|(account, name), task| {
            // One that a defect has ended is started again.
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
                        asked: Duration::ZERO,
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

/// The life of one key.
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
    /// When the last answer of Vault was asked for, in time since boot: it confirms no more than that moment.
    asked: Duration,
    /// Whether the last look got a usable answer.
    is_answered: bool,
    running: Option<Running>,
}

/// A test that is under way.
struct Running {
    tested: Serving,
    /// Whether it is not the key in memory.
    is_candidate: bool,
    told: oneshot::Receiver<Report>,
    /// When it is given up.
    until: Instant,
}

impl Watch {
    async fn run(mut self, poll: Duration) {
        let mut backoff = BACKOFF;
        loop {
            // Before the look, so that one that is asked for meanwhile is not missed.
            let (keyring, refresh) = (Arc::clone(&self.keyring), Arc::clone(&self.refresh));
            let (doubt, wanted) = (keyring.rechecks.notified(), refresh.wanted.notified());
            refresh.count.send_modify(|(begun, _)| *begun += 1);
            self.check().await;
            refresh.is_read.send_replace(true);
            let wait = if self.is_answered {
                backoff.reset();
                // A key must not grow too old between two polls that both go well.
                let poll = poll.min(self.keyring.max_stale(&self.account) / 3);
                poll.mul_f64(0.8 + 0.4 * fastrand::f64())
            } else {
                backoff.wait()
            };
            self.go_on().await;
            let next_look = async {
                sleep(AT_LEAST).await;
                let called = async {
                    tokio::select! {
                        () = doubt => {}
                        () = wanted => {}
                    }
                };
                let _ = timeout(wait.saturating_sub(AT_LEAST), called).await;
            };
            let mut next_look = pin!(next_look);
            loop {
                tokio::select! {
                    () = &mut next_look => break,
                    report = self.report() => {
                        self.conclude(report).await;
                        self.go_on().await;
                    }
                }
            }
        }
    }

    /// Begins the test that is due; where nothing is left to test, the look has ended.
    async fn go_on(&mut self) {
        self.handle(Event::Idle).await;
        if self.running.is_none() {
            self.keyring.set_on_trial(&self.account, &self.name, false);
            let ended = |(begun, ended): &mut (u64, u64)| *ended = *begun;
            self.refresh.count.send_modify(ended);
        }
    }

    /// Compares Vault with memory once.
    async fn check(&mut self) {
        self.forget_if_wiped();
        let asked = self.keyring.clock.boot();
        let question = self.vault.metadata(&self.account, &self.name);
        let answer = self.unless_wiped(question).await;
        if answer.is_ok() {
            self.asked = asked;
        }
        self.is_answered = true;
        let is_fresh = self.refresh.is_fresh.swap(false, Ordering::Relaxed);
        self.handle(Event::Metadata(answer, is_fresh)).await;
    }

    /// What has come of the test that is under way; without one it never returns.
    async fn report(&mut self) -> Report {
        let Some(running) = &mut self.running else {
            return pending().await;
        };
        let told = timeout_at(running.until, &mut running.told).await;
        // An error means that the broker is stopping, or that its rules do not name the key yet.
        told.ok().and_then(Result::ok).unwrap_or_else(|| Report {
            verdict: Verdict::Unclear("the exchange did not answer in time".to_owned()),
            info: None,
            findings: Vec::new(),
        })
    }

    /// Goes by what a test has said. That took time: an admin may have killed the key meanwhile.
    async fn conclude(&mut self, report: Report) {
        let Some(running) = self.running.take() else {
            return;
        };
        let mut checked = Ok(());
        let may_serve = match report.verdict {
            Verdict::Good => true,
            Verdict::Refused(_) => false,
            Verdict::Unclear(_) => report.info.is_some(),
        };
        if running.is_candidate && may_serve {
            checked = self.check_revoked(&running.tested).await;
        }
        let revoked = checked.err().map(|error| error.to_string());
        self.handle(Event::Tested(running.tested, report, revoked))
            .await;
    }

    /// Does what an event calls for.
    async fn handle(&mut self, event: Event) {
        let mut event = Some(event);
        while let Some(next) = event.take() {
            let now = self.keyring.clock.boot();
            let actions = self.rotation.step(now, self.serving(), next);
            if !self.rotation.is_testing() {
                self.running = None;
            }
            let problem = self.rotation.problem();
            // After every look: nobody needs to wake where it is as before.
            if matches!(self.state(), Some(KeyState::Loaded { problem: shown, .. }) if shown != problem)
            {
                self.keyring.set_problem(&self.account, &self.name, problem);
            }
            for action in actions {
                event = self.perform(action).await;
            }
        }
    }

    /// Does what is to be done, and returns what Vault has said to a question.
    async fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Activate(next) => self.activate(&next).await,
            Action::ActivateUntested(next) => {
                // Before it signs: whoever is refused for it waits for its test, which follows at once.
                self.keyring.set_on_trial(&self.account, &self.name, true);
                self.activate(&next).await;
                let due = self.keyring.recall(&self.account, &self.name);
                self.rotation.recall(due);
            }
            Action::AwaitTest(version, reason) => {
                tracing::warn!(account.id = %self.account, key = %self.name, version, %reason, "new key version cannot be tested yet; keeping current");
            }
            Action::Confirm => self.confirm(),
            Action::Evict(reason) => self.evict(reason),
            Action::LookFor(version) => return Some(Event::Version(self.read(version).await)),
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
                    tracing::error!(account.id = %account, key = %name, version = tested.version, %reason, "exchange rejected the key");
                }
                if let Some(due) = due {
                    self.keyring.remember(account, name, due);
                }
            }
            Action::Refuse(next, reason) => {
                self.metrics.vault_failure("unusable");
                tracing::error!(account.id = %self.account, key = %self.name, version = next.version, %reason, "exchange rejected new key version; keeping current");
                self.tell(
                    self.serving().as_ref(),
                    Some(&next),
                    "refused",
                    Some(reason),
                );
            }
            Action::RefuseLater(version, reason) => {
                self.metrics.vault_failure("unusable");
                tracing::error!(account.id = %self.account, key = %self.name, version, %reason, "exchange rejected the version written after the hold began");
            }
            Action::Reject(version, reason) => {
                self.metrics.vault_failure("unusable");
                tracing::error!(account.id = %self.account, key = %self.name, %reason, version, "new key version is unusable; keeping current");
            }
            Action::TestCandidate(next) => self.test(next, true),
            Action::TestServing(serving) => self.test(serving, false),
        }
        None
    }

    /// Reads a version of the key from Vault.
    async fn read(&self, version: u64) -> Result<Serving, VaultError> {
        let question = self.vault.read(&self.account, &self.name, version);
        Ok(Serving {
            key: self.unless_wiped(question).await?,
            usage: Arc::default(),
            version,
        })
    }

    /// The answer to a question to Vault. It fails once the keyring wipes the key for its age: whoever asks holds versions
    /// of the key, and must not hold them for as long as Vault hangs.
    async fn unless_wiped<T>(
        &self,
        question: impl Future<Output = Result<T, VaultError>>,
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
            answer = question => answer,
            () = wiped => Err(VaultError::Outage("key wiped before the test was answered".into())),
        }
    }

    /// Whether the keyring has wiped the key for its age since Vault last showed it.
    fn is_wiped(&self) -> bool {
        self.rotation.has_seen() && matches!(self.state(), Some(KeyState::Pending(_)))
    }

    /// The keyring has wiped the key for its age: a candidate is as old.
    fn forget_if_wiped(&mut self) {
        if self.is_wiped() {
            self.rotation.forget();
            self.running = None;
        }
    }

    async fn check_revoked(&self, found: &Serving) -> Result<(), VaultError> {
        let digest = found.digest();
        let (account, name) = (self.account.clone(), self.name.clone());
        if self.restrictions.has_revoked_unseen(&account, &name) {
            let restrictions = Arc::clone(&self.restrictions);
            let seen = spawn_blocking(move || restrictions.seen(&account, &name, digest)).await;
            if let Ok(Err(error)) = seen {
                tracing::error!(account.id = %self.account, key = %self.name, %error, "revocation cannot be written");
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

    /// Has a key tested; whoever is refused meanwhile waits for what may be a better one.
    fn test(&mut self, tested: Serving, is_candidate: bool) {
        let may_change = is_candidate || !tested.is_proven();
        self.keyring
            .set_on_trial(&self.account, &self.name, may_change);
        let (tell, told) = oneshot::channel();
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
            told,
            until: Instant::now() + TEST_WITHIN,
        });
    }

    /// From now on `next` signs, and nothing else does.
    async fn activate(&self, next: &Serving) {
        let before = self.serving();
        let state = KeyState::Loaded {
            key: Arc::clone(&next.key),
            usage: Arc::clone(&next.usage),
            version: next.version,
            problem: self.rotation.problem(),
            confirmed: self.asked,
            outage: self.state().and_then(|state| state.outage()),
        };
        self.keyring.set(&self.account, &self.name, state);
        let is_there = |serving: Serving| Arc::ptr_eq(&serving.key, &next.key);
        if self.serving().is_some_and(is_there) {
            self.tell(before.as_ref(), Some(next), "in_use", None);
            tracing::info!(account.id = %self.account, key = %self.name, version = next.version, "key loaded");
        } else {
            // An admin has killed it a moment ago, maybe without knowing its id.
            let _ = self.check_revoked(next).await;
        }
    }

    /// Vault has just vouched for the key in memory.
    fn confirm(&self) {
        let mut outage = None;
        self.keyring
            .change_unless_revoked(&self.account, &self.name, |entry| {
                if let KeyState::Loaded {
                    confirmed,
                    outage: ended,
                    ..
                } = &mut entry.state
                {
                    *confirmed = self.asked;
                    outage = ended.take();
                }
            });
        if outage.is_some()
            && let Some(Serving { version, .. }) = self.serving()
        {
            tracing::info!(account.id = %self.account, key = %self.name, version, "Vault reachable again; key confirmed");
        }
    }

    fn evict(&self, reason: String) {
        let is_known = matches!(self.state(), Some(KeyState::Absent(before)) if before == reason);
        if !is_known {
            self.metrics.vault_failure("evicted");
            tracing::error!(account.id = %self.account, key = %self.name, reason, "key unavailable");
            self.tell(self.serving().as_ref(), None, "gone", Some(reason.clone()));
        }
        self.keyring
            .set(&self.account, &self.name, KeyState::Absent(reason));
    }

    /// Vault has not answered: the key stays in use, as long as it is not too old for anything.
    fn mark_outage(&mut self, error: &VaultError) {
        let reason = error.to_string();
        if matches!(error, VaultError::LoginRefused(_)) {
            self.metrics.vault_failure("login");
            tracing::error!(account.id = %self.account, key = %self.name, %reason, "Vault login rejected; using cached keys");
        } else {
            self.metrics.vault_failure("outage");
            tracing::warn!(account.id = %self.account, key = %self.name, %reason, "Vault unreachable; using cached keys");
        }
        self.is_answered = false;
        self.forget_if_wiped();
        self.keyring
            .change_unless_revoked(&self.account, &self.name, |entry| match &mut entry.state {
                KeyState::Absent(_) => {}
                KeyState::Loaded { outage, .. } => *outage = Some(reason),
                KeyState::Pending(_) => entry.put(KeyState::Pending(reason)),
            });
    }

    /// Keeps what the metadata say beside versions.
    fn note(&self, noted: Noted, newest: u64) {
        let Some(before) = self.keyring.set_noted(&self.account, &self.name, &noted) else {
            return;
        };
        if let Some(reason) = noted.restricted.filter(|_| before.restricted.is_none()) {
            tracing::warn!(account.id = %self.account, key = %self.name, reason, "unknown state of the key in Vault");
        }
        if noted.hold != before.hold {
            let held = noted.hold.map(|hold| hold.version);
            tracing::info!(account.id = %self.account, key = %self.name, held, newest, "use_version in Vault changed");
        }
    }

    /// Audits a change.
    fn tell(
        &self,
        before: Option<&Serving>,
        after: Option<&Serving>,
        outcome: &'static str,
        detail: Option<String>,
    ) {
        let named = |serving: &Serving| (serving.version, serving.digest());
        let change = KeyChange {
            account: self.account.clone(),
            name: self.name.clone(),
            before: before.map(named),
            after: after.map(named),
            outcome,
            detail,
        };
        let _ = self.key_events.send(KeyEvent::Changed(change));
    }

    fn serving(&self) -> Option<Serving> {
        match self.state()? {
            KeyState::Loaded {
                key,
                usage,
                version,
                ..
            } => Some(Serving {
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
}
