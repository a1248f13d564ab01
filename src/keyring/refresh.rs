//! Keeps the keyring as Vault has it: reads at start, then polls the metadata of each key for changes.
//!
//! Vault's word (404, or 403 twice to a good token, or `state=disabled`) evicts at once; a `state` that is neither active nor
//! disabled refuses what is risk-increasing. No answer, or an answer that is
//! a fault, changes nothing: what is in memory serves on, within the bounds of its account.
//!
//! Another version takes the place of the one in memory once the exchange has taken requests that it signed. One that
//! the exchange refuses changes nothing, and the reason shows. Only after a start there is nothing to compare with: the
//! newest version serves at once, and if the exchange turns out to refuse it, the version before it is tried.
//!
//! While an admin holds a version in use (`keys rollback`), it alone serves. If the exchange refuses it, a version that was
//! written after the hold began is tried in its place, and never an older one.
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

use super::trial::{KeyChange, Notice, Notices, Report, Trial, Verdict};
use super::usage::Usage;
use super::vault::{Hold, Metadata, NotedState, Vault, VaultError, unknown_state};
use super::{Keyring, Look, Noted, Slot};
use crate::ids::{AccountId, KeyName};
use crate::kucoin::Key;
use crate::kucoin::code::CREDENTIALS_REFUSED;
use crate::restrictions::{KeyDigest, Restrictions};
use crate::telemetry::Metrics;

/// First and longest wait after a failure; each failure doubles it.
pub const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// However much there is to doubt, Vault is not asked more often.
const AT_LEAST: Duration = Duration::from_millis(100);

/// How often a key is tested in the background at most. A test has weight 20 of the 2000 that an account has for such
/// questions in 30 s.
const TEST_EVERY: Duration = Duration::from_secs(600);

/// How long a test may take.
const TEST_WITHIN: Duration = Duration::from_secs(10);

/// First wait after a background test that had no answer; each one in a row doubles it, up to [`TEST_EVERY`].
const TEST_AGAIN: Duration = Duration::from_secs(5);

/// One polling task for each key of the keyring.
#[derive(Debug)]
pub struct Refresher {
    keyring: Arc<Keyring>,
    vault: Arc<Vault>,
    restrictions: Arc<Restrictions>,
    notices: Notices,
    metrics: Arc<Metrics>,
    poll: Duration,
    tasks: Mutex<BTreeMap<(AccountId, KeyName), AbortHandle>>,
}

impl Refresher {
    /// Nothing is polled until [`Refresher::follow`]. Keys are tested by whoever reads `notices`.
    pub fn new(
        keyring: Arc<Keyring>,
        vault: Arc<Vault>,
        restrictions: Arc<Restrictions>,
        notices: Notices,
        metrics: Arc<Metrics>,
        poll: Duration,
    ) -> Self {
        Self {
            keyring,
            vault,
            restrictions,
            notices,
            metrics,
            poll,
            tasks: Mutex::default(),
        }
    }

    /// Polls every key that the keyring has a place for, and no other.
    pub fn follow(&self) {
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
            let Some(look) = self.keyring.look(&key.account, &key.name) else {
                continue;
            };
            tasks
                .entry((key.account.clone(), key.name.clone()))
                .or_insert_with(|| {
                    let watch = Watch {
                        keyring: Arc::clone(&self.keyring),
                        vault: Arc::clone(&self.vault),
                        restrictions: Arc::clone(&self.restrictions),
                        notices: self.notices.clone(),
                        metrics: Arc::clone(&self.metrics),
                        account: key.account,
                        name: key.name,
                        look,
                        seen: None,
                        asked: Duration::ZERO,
                        is_unusable: false,
                        candidate: None,
                        refused: None,
                        after_hold: None,
                        next_test: Duration::ZERO,
                        test_again: TEST_AGAIN,
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
    notices: Notices,
    metrics: Arc<Metrics>,
    account: AccountId,
    name: KeyName,
    look: Arc<Look>,
    /// The metadata that Vault has shown last; none: whatever it shows next is read.
    seen: Option<Metadata>,
    /// When that was asked for, in time since boot: an answer confirms no more than that moment.
    asked: Duration,
    /// Whether the version that shall serve can never do so: it is no key, or it is revoked.
    is_unusable: bool,
    /// The version that shall serve, as long as the exchange has not said whether it takes it.
    candidate: Option<Serving>,
    /// When the version that shall serve, and that the exchange has refused, is to be tried again: time since boot.
    refused: Option<Duration>,
    /// The version that was tried in place of a held one.
    after_hold: Option<AfterHold>,
    /// When the key in memory is to be tested again: time since boot.
    next_test: Duration,
    /// How long to wait after the next test that has no answer.
    test_again: Duration,
    running: Option<Running>,
}

/// A test that is under way.
struct Running {
    what: What,
    told: oneshot::Receiver<Report>,
    /// When it is given up.
    until: Instant,
}

/// What is being tested.
enum What {
    /// A version that may serve in place of the one in memory, which the exchange refuses.
    Instead {
        next: Serving,
        refused: Serving,
        reason: String,
        /// Whether the one in memory is held in use, and this one was written after that began; else it is the one before.
        is_after_hold: bool,
    },
    /// [`Watch::candidate`].
    Candidate,
    /// The key in memory.
    Serving(Serving),
}

/// A version that was tried in place of a held one, which the exchange refuses.
struct AfterHold {
    version: u64,
    /// When it may be tried again: time since boot.
    due: Duration,
    /// Why the exchange refuses it too.
    problem: Option<String>,
}

/// What a look at Vault calls for.
enum Step {
    /// Nothing: all is as it was.
    Confirm,
    /// The version in memory is the one that shall serve.
    Settle(Serving),
    /// To read the version that shall serve, and try it.
    Take,
    /// To test the candidate, if that is not under way.
    Try,
}

/// The key in memory.
#[derive(Clone)]
struct Serving {
    key: Arc<Key>,
    usage: Arc<Usage>,
    version: u64,
}

impl Serving {
    fn new(key: Arc<Key>, version: u64) -> Self {
        Self {
            key,
            usage: Arc::default(),
            version,
        }
    }

    fn digest(&self) -> KeyDigest {
        KeyDigest(self.key.id_sha256())
    }

    /// Whether the exchange has taken a request that it signed.
    fn is_proven(&self) -> bool {
        self.usage.accepted_ms().is_some()
    }
}

/// With up to a fifth more, so that keys spread out.
fn until_next_test() -> Duration {
    TEST_EVERY.mul_f64(1.0 + 0.2 * fastrand::f64())
}

impl Watch {
    async fn run(mut self, poll: Duration) {
        let mut backoff = BACKOFF.0;
        loop {
            // Before the look, so that one that is asked for meanwhile is not missed.
            let (keyring, look) = (Arc::clone(&self.keyring), Arc::clone(&self.look));
            let (doubt, wanted) = (keyring.doubts.notified(), look.wanted.notified());
            look.count.send_modify(|(begun, _)| *begun += 1);
            let is_answered = self.check().await;
            look.is_read.send_replace(true);
            let wait = if is_answered {
                backoff = BACKOFF.0;
                // A key must not grow too old between two polls that both go well.
                let poll = poll.min(self.keyring.max_stale(&self.account) / 3);
                poll.mul_f64(0.8 + 0.4 * fastrand::f64())
            } else {
                // Full jitter, so that many brokers do not meet at a Vault that has just come back.
                let wait = backoff.mul_f64(fastrand::f64());
                backoff = (backoff * 2).min(BACKOFF.1);
                wait
            };
            self.go_on();
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
                        self.go_on();
                    }
                }
            }
        }
    }

    /// Begins the test that is due; where nothing is left to test, the look has ended.
    fn go_on(&mut self) {
        self.test_if_due();
        if self.running.is_none() {
            self.keyring.set_on_trial(&self.account, &self.name, false);
            let ended = |(begun, ended): &mut (u64, u64)| *ended = *begun;
            self.look.count.send_modify(ended);
        }
    }

    /// Compares Vault with memory once; false when Vault gave no usable answer.
    async fn check(&mut self) -> bool {
        self.forget_if_wiped();
        let asked = self.keyring.clock.boot();
        match self.fetch(asked).await {
            Ok(()) => true,
            Err(VaultError::LoginRefused(reason)) => {
                self.metrics.vault_failure("login");
                tracing::error!(account.id = %self.account, key = %self.name, %reason, "Vault refuses the broker's login; what is in memory serves on");
                self.serve_on(reason);
                false
            }
            Err(error @ (VaultError::Outage(_) | VaultError::Credential(_))) => {
                let reason = error.to_string();
                self.metrics.vault_failure("outage");
                tracing::warn!(account.id = %self.account, key = %self.name, %reason, "keys cannot be refreshed; what is in memory serves on");
                self.serve_on(reason);
                false
            }
            Err(VaultError::Denied) => {
                self.evict("Vault refuses it to the broker (403); check the broker's policy");
                true
            }
            Err(VaultError::Gone(reason)) => {
                self.evict(&reason);
                true
            }
            Err(VaultError::Unusable(reason)) => {
                self.keep_from(reason, asked);
                true
            }
        }
    }

    /// The version that shall serve cannot: a half-written one must not take a working key away.
    fn keep_from(&mut self, reason: String, asked: Duration) {
        self.forget_candidate();
        if let Some(serving) = self.serving()
            && self
                .seen
                .as_ref()
                .is_some_and(|seen| seen.has(serving.version))
        {
            self.metrics.vault_failure("unusable");
            let version = serving.version;
            tracing::error!(account.id = %self.account, key = %self.name, %reason, version, "new version is unusable; the one in memory serves on");
            self.confirm(serving, Some(reason), asked);
        } else {
            let seen = self.seen.take();
            self.evict(&reason);
            // It stays so until Vault shows something else: no need to read it at every poll.
            self.seen = seen;
        }
        self.is_unusable = true;
    }

    async fn fetch(&mut self, asked: Duration) -> Result<(), VaultError> {
        let question = self.vault.metadata(&self.account, &self.name);
        let metadata = self.unless_wiped(question).await?;
        if let NotedState::Disabled(word) = metadata.state() {
            return Err(VaultError::Gone(format!(
                "its metadata in Vault says state={word}"
            )));
        }
        self.keep_noted(&metadata);
        if metadata.current_version == 0 {
            return Err(VaultError::Gone(
                "Vault has no version of it yet".to_owned(),
            ));
        }
        self.asked = asked;
        if let (Some(serving), Some(seen)) = (self.serving(), &self.seen)
            && metadata.has_taken_away(seen, serving.version)
        {
            let version = serving.version;
            let replaced = self.replace(&serving, metadata).await;
            if replaced.is_err() {
                self.evict(&format!("version {version} has been deleted in Vault"));
            }
            return replaced;
        }
        let wanted = match metadata.wanted() {
            Ok(wanted) => wanted,
            Err(reason) => {
                self.seen = Some(metadata);
                return Err(VaultError::Unusable(reason));
            }
        };
        self.look_after_itself(&metadata, wanted).await?;
        let step = self.step(&metadata, wanted, asked);
        let mut read = None;
        if matches!(step, Step::Take) || metadata.deletes_itself(wanted) {
            let key = self.read(wanted).await;
            // Seen even when unusable, so that a broken version is read once and not at every poll.
            if matches!(key, Ok(_) | Err(VaultError::Unusable(_))) {
                self.seen = Some(metadata);
            }
            read = Some(key?);
        } else {
            self.seen = Some(metadata);
        }
        match (step, read) {
            (Step::Settle(serving), _) => {
                self.forget_candidate();
                let problem = self.problem_after_hold();
                self.confirm(serving, problem, asked);
            }
            (Step::Take, Some(key)) => return self.adopt(wanted, key, asked).await,
            (Step::Try, _) => {
                self.confirm_again(asked);
                self.try_candidate().await;
            }
            (Step::Confirm | Step::Take, _) => self.confirm_again(asked),
        }
        if let Some(serving) = self.serving()
            && self.is_dead()
            && let Some(refusal) = serving.usage.refusal()
        {
            self.try_after_hold(serving, refusal.advice).await;
        }
        Ok(())
    }

    /// Reads a version of the key from Vault.
    async fn read(&self, version: u64) -> Result<Arc<Key>, VaultError> {
        let question = self.vault.read(&self.account, &self.name, version);
        self.unless_wiped(question).await
    }

    /// The answer to a question to Vault. It fails once the keyring wipes the key for its age: whoever asks holds versions
    /// of the key, and must not hold them for as long as Vault hangs.
    async fn unless_wiped<T>(
        &self,
        question: impl Future<Output = Result<T, VaultError>>,
    ) -> Result<T, VaultError> {
        // Subscribed before the look, so that no change is missed.
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
            () = wiped => Err(VaultError::Outage("no answer before the key was wiped".to_owned())),
        }
    }

    /// Whether the keyring has wiped the key for its age since Vault last showed it.
    fn is_wiped(&self) -> bool {
        let slot = self.keyring.slot(&self.account, &self.name);
        self.seen.is_some() && matches!(slot, Some(Slot::Waiting(_)))
    }

    /// Keeps what the metadata say beside versions, before the key signs by them.
    fn keep_noted(&self, metadata: &Metadata) {
        let restricted = match metadata.state() {
            NotedState::Unknown(word) => Some(format!(
                "{}; set state=active or state=disabled",
                unknown_state(word)
            )),
            NotedState::Active | NotedState::Disabled(_) => None,
        };
        let noted = Noted {
            restricted,
            hold: metadata.hold(),
        };
        let Some(before) = self.keyring.set_noted(&self.account, &self.name, &noted) else {
            return;
        };
        if let Some(reason) = noted.restricted.filter(|_| before.restricted.is_none()) {
            tracing::warn!(account.id = %self.account, key = %self.name, reason, "unknown state of the key in Vault");
        }
        if noted.hold != before.hold {
            let held = noted.hold.map(|hold| hold.version);
            let newest = metadata.current_version;
            tracing::info!(account.id = %self.account, key = %self.name, held, newest, "use_version in Vault changed");
        }
    }

    /// The key in memory has been deleted in Vault: what Vault has instead serves without a test, and without a gap.
    async fn replace(&mut self, gone: &Serving, metadata: Metadata) -> Result<(), VaultError> {
        self.forget_candidate();
        self.running = None;
        let wanted = metadata.wanted().map_err(VaultError::Unusable)?;
        let key = self.read(wanted).await?;
        let next = Serving::new(key, wanted);
        self.check_revoked(wanted, &next.key).await?;
        self.seen = Some(metadata);
        self.serve_untested(Some(gone), next).await;
        Ok(())
    }

    /// What to do about what Vault shows.
    fn step(&mut self, metadata: &Metadata, wanted: u64, asked: Duration) -> Step {
        // Somebody has asked for it.
        let is_fresh = self.look.is_fresh.swap(false, Ordering::Relaxed);
        let seen = self.seen.as_ref();
        if is_fresh {
            self.after_hold = None;
        }
        if !seen.is_some_and(|seen| metadata.is_same(seen, wanted)) {
            return Step::Take;
        }
        let was_wanted = seen.is_some_and(|seen| seen.wanted() == Ok(wanted));
        match (self.serving(), &self.candidate) {
            (Some(serving), _) if serving.version == wanted => {
                if is_fresh {
                    self.next_test = Duration::ZERO;
                }
                Step::Settle(serving)
            }
            (_, Some(candidate)) if candidate.version == wanted => Step::Try,
            _ if is_fresh || !was_wanted => Step::Take,
            (Some(_), _) if self.refused.is_some_and(|at| asked >= at) => Step::Take,
            (Some(_), _) => Step::Confirm,
            (None, _) if self.is_unusable => Step::Confirm,
            (None, _) => Step::Take,
        }
    }

    /// The version in memory may have a time at which it deletes itself, of which the metadata say nothing then.
    async fn look_after_itself(
        &mut self,
        metadata: &Metadata,
        wanted: u64,
    ) -> Result<(), VaultError> {
        let Some(serving) = self.serving() else {
            return Ok(());
        };
        let version = serving.version;
        if version == wanted || !metadata.deletes_itself(version) {
            return Ok(());
        }
        match self.read(version).await {
            Err(VaultError::Gone(_)) => {
                self.evict(&format!("version {version} has been deleted in Vault"));
                Ok(())
            }
            Ok(_) | Err(VaultError::Unusable(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Puts a version to use that Vault has just shown, if the exchange takes it.
    async fn adopt(
        &mut self,
        version: u64,
        key: Arc<Key>,
        asked: Duration,
    ) -> Result<(), VaultError> {
        self.forget_candidate();
        self.check_revoked(version, &key).await?;
        self.candidate = Some(Serving::new(key, version));
        self.confirm_again(asked);
        self.try_candidate().await;
        Ok(())
    }

    /// Tests the candidate, unless that is under way; where there is nothing better, it serves at once.
    async fn try_candidate(&mut self) {
        let is_under_way = |running: &Running| matches!(running.what, What::Candidate);
        if self.running.as_ref().is_some_and(is_under_way) {
            return;
        }
        if self.serving().is_some() {
            if let Some(key) = self.candidate.as_ref().map(|next| Arc::clone(&next.key)) {
                self.begin(What::Candidate, key, true);
            }
        } else if let Some(next) = self.candidate.take() {
            self.serve_untested(None, next).await;
        }
    }

    async fn serve_untested(&mut self, before: Option<&Serving>, next: Serving) {
        // Before it signs: whoever is refused for it waits for its test, which follows at once.
        self.keyring.set_on_trial(&self.account, &self.name, true);
        self.put_to_use(before, next, None).await;
        let due = self.keyring.recall(&self.account, &self.name);
        self.next_test = due.unwrap_or(Duration::ZERO);
    }

    /// What Vault wants now is something else.
    fn forget_candidate(&mut self) {
        if self.candidate.take().is_some() {
            self.running = None;
        }
        self.refused = None;
        self.is_unusable = false;
    }

    async fn check_revoked(&self, version: u64, key: &Arc<Key>) -> Result<(), VaultError> {
        let digest = KeyDigest(key.id_sha256());
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
            "version {version}: {}",
            super::revoked_by(&revoked)
        )))
    }

    /// Tests the key in memory now and then, and at once when it is new.
    fn test_if_due(&mut self) {
        let now = self.keyring.clock.boot();
        if self.running.is_some() || now < self.next_test {
            return;
        }
        if let Some(serving) = self.serving() {
            self.next_test = now + until_next_test();
            let key = Arc::clone(&serving.key);
            self.begin(What::Serving(serving), key, false);
        }
    }

    /// Has a key tested; whoever is refused meanwhile waits for what may be a better one.
    fn begin(&mut self, what: What, key: Arc<Key>, is_candidate: bool) {
        let may_change = match &what {
            What::Instead { .. } | What::Candidate => true,
            What::Serving(serving) => !serving.is_proven(),
        };
        self.keyring
            .set_on_trial(&self.account, &self.name, may_change);
        let (tell, told) = oneshot::channel();
        let trial = Trial {
            account: self.account.clone(),
            name: self.name.clone(),
            key,
            is_candidate,
            tell,
        };
        let _ = self.notices.send(Notice::Trial(trial));
        let until = Instant::now() + TEST_WITHIN;
        self.running = Some(Running { what, told, until });
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

    /// Goes by what a test has said.
    async fn conclude(&mut self, report: Report) {
        match self.running.take().map(|running| running.what) {
            Some(What::Instead {
                next,
                refused,
                reason,
                is_after_hold: false,
            }) => {
                let problem = format!("version {} is refused: {reason}", refused.version);
                self.fall_back(next, &refused, problem, report).await;
            }
            Some(What::Instead {
                next,
                refused,
                reason,
                is_after_hold: true,
            }) => {
                let version = next.version;
                let problem = match self.hold() {
                    Some(hold) if hold.version == refused.version => format!(
                        "version {}, which is held in use, is refused: {reason}",
                        hold.version
                    ),
                    Some(_) | None => format!("version {} is refused: {reason}", refused.version),
                };
                if let Verdict::Refused(reason) = &report.verdict {
                    self.metrics.vault_failure("unusable");
                    tracing::error!(account.id = %self.account, key = %self.name, version, %reason, "exchange rejected the version written after the hold began");
                    let problem = format!(
                        "version {version} was written after the hold began, and is refused: {reason}"
                    );
                    self.after_hold = Some(AfterHold {
                        version,
                        due: self.keyring.clock.boot() + until_next_test(),
                        problem: Some(problem.clone()),
                    });
                    self.set_problem(problem);
                }
                self.fall_back(next, &refused, problem, report).await;
            }
            Some(What::Candidate) => {
                if let Some(next) = self.candidate.take() {
                    self.judge(next, report).await;
                }
            }
            Some(What::Serving(serving)) => self.heed(serving, report).await,
            None => {}
        }
    }

    /// Decides about the version that shall serve.
    async fn judge(&mut self, next: Serving, report: Report) {
        let version = next.version;
        let before = self.serving();
        match &report.verdict {
            Verdict::Good => self.take_over(next, report).await,
            // The exchange has told what it is, so it takes what it signs, and the one in memory is dead.
            Verdict::Unclear(_) if report.info.is_some() && self.is_dead() => {
                self.take_over(next, report).await;
            }
            Verdict::Refused(reason) => {
                self.metrics.vault_failure("unusable");
                tracing::error!(account.id = %self.account, key = %self.name, version, %reason, "the exchange refuses the new version; the one in memory serves on");
                self.tell(
                    before.as_ref(),
                    Some(&next),
                    "refused",
                    Some(reason.clone()),
                );
                self.set_problem(format!("version {version} is refused: {reason}"));
                self.refused = Some(self.keyring.clock.boot() + until_next_test());
            }
            Verdict::Unclear(reason) => {
                tracing::warn!(account.id = %self.account, key = %self.name, version, %reason, "the new version cannot be tested yet; the one in memory serves on");
                self.set_problem(format!("version {version} waits for its test: {reason}"));
                self.candidate = Some(next);
            }
        }
    }

    /// The exchange has taken what `next` signed. That took time: an admin may have killed it meanwhile.
    async fn take_over(&mut self, next: Serving, report: Report) {
        match self.check_revoked(next.version, &next.key).await {
            Ok(()) => {
                let before = self.serving();
                self.put_to_use(before.as_ref(), next, Some(report)).await;
            }
            Err(error) => self.keep_from(error.to_string(), self.asked),
        }
    }

    /// Whether the exchange refuses what the key in memory signs.
    fn is_dead(&self) -> bool {
        let refusal = self.serving().and_then(|serving| serving.usage.refusal());
        refusal.is_some_and(|refusal| CREDENTIALS_REFUSED.contains(&refusal.code.as_str()))
    }

    /// Keeps what a test said of the key in memory.
    async fn heed(&mut self, serving: Serving, report: Report) {
        let now = self.keyring.clock.boot();
        let report = Arc::new(report);
        self.keyring
            .set_tested(&self.account, &self.name, &serving.key, Arc::clone(&report));
        match &report.verdict {
            Verdict::Good => self.test_again = TEST_AGAIN,
            Verdict::Refused(reason) => {
                self.test_again = TEST_AGAIN;
                tracing::error!(account.id = %self.account, key = %self.name, version = serving.version, %reason, "the exchange refuses the key");
                if self.hold().is_some() {
                    self.try_after_hold(serving, reason.clone()).await;
                } else if !serving.is_proven() {
                    self.try_before(serving, reason.clone()).await;
                }
            }
            Verdict::Unclear(_) => {
                self.next_test = self.next_test.min(now + self.test_again);
                self.test_again = (self.test_again * 2).min(TEST_EVERY);
                return;
            }
        }
        self.keyring
            .remember(&self.account, &self.name, self.next_test);
    }

    /// After a start whose newest version the exchange refuses: the one before it may be good.
    async fn try_before(&mut self, refused: Serving, reason: String) {
        // An admin who has named a version wants no other one.
        let is_newest = |seen: &&Metadata| {
            seen.use_version().is_none() && seen.current_version == refused.version
        };
        let newest = self.seen.as_ref().filter(is_newest);
        let Some(version) = newest.and_then(|seen| seen.before(refused.version)) else {
            return;
        };
        let Ok(key) = self.read(version).await else {
            return;
        };
        let before = Serving::new(key, version);
        if self.check_revoked(version, &before.key).await.is_err() {
            return;
        }
        let key = Arc::clone(&before.key);
        let what = What::Instead {
            next: before,
            refused,
            reason,
            is_after_hold: false,
        };
        self.begin(what, key, true);
    }

    /// What an admin holds in use, by the metadata that Vault has shown last.
    fn hold(&self) -> Option<Hold> {
        self.seen.as_ref().and_then(Metadata::hold)
    }

    /// Why the version that was written after the hold began does not serve in place of the held one.
    fn problem_after_hold(&self) -> Option<String> {
        let later = self.hold()?.later?;
        let tried = self.after_hold.as_ref()?;
        tried.problem.clone().filter(|_| tried.version == later)
    }

    /// The exchange refuses the key in memory while an admin holds a version in use: one that was written after that may be
    /// good. An older one never follows by itself, since the admin went back past it.
    async fn try_after_hold(&mut self, refused: Serving, reason: String) {
        if self.running.is_some() || self.candidate.is_some() {
            return;
        }
        let later = self.hold().and_then(|hold| hold.later);
        let Some(version) = later.filter(|later| *later != refused.version) else {
            return;
        };
        let now = self.keyring.clock.boot();
        let is_tried = |tried: &AfterHold| tried.version == version && now < tried.due;
        if self.after_hold.as_ref().is_some_and(is_tried) {
            return;
        }
        self.after_hold = Some(AfterHold {
            version,
            due: now + self.test_again,
            problem: None,
        });
        let next = match self.read(version).await {
            Ok(key) => Serving::new(key, version),
            Err(VaultError::Unusable(problem)) => {
                self.after_hold = Some(AfterHold {
                    version,
                    due: now + until_next_test(),
                    problem: Some(problem.clone()),
                });
                return self.set_problem(problem);
            }
            Err(_) => return,
        };
        if let Err(error) = self.check_revoked(version, &next.key).await {
            return self.set_problem(error.to_string());
        }
        let key = Arc::clone(&next.key);
        let what = What::Instead {
            next,
            refused,
            reason,
            is_after_hold: true,
        };
        self.begin(what, key, true);
    }

    async fn fall_back(
        &mut self,
        next: Serving,
        refused: &Serving,
        problem: String,
        report: Report,
    ) {
        let is_there = |serving: Serving| Arc::ptr_eq(&serving.key, &refused.key);
        match report.verdict {
            Verdict::Good if self.serving().is_some_and(is_there) => {
                if self.check_revoked(next.version, &next.key).await.is_err() {
                    return;
                }
                self.put_to_use(Some(refused), next, Some(report)).await;
                self.set_problem(problem);
                self.refused = Some(self.keyring.clock.boot() + until_next_test());
            }
            Verdict::Unclear(_) => {
                let again = self.keyring.clock.boot() + self.test_again;
                self.next_test = self.next_test.min(again);
                self.test_again = (self.test_again * 2).min(TEST_EVERY);
            }
            Verdict::Good | Verdict::Refused(_) => {}
        }
    }

    /// From now on `next` signs, and nothing else does.
    async fn put_to_use(
        &mut self,
        before: Option<&Serving>,
        next: Serving,
        report: Option<Report>,
    ) {
        let (key, version) = (Arc::clone(&next.key), next.version);
        let outage = match self.keyring.slot(&self.account, &self.name) {
            Some(Slot::Ready { outage, .. }) => outage,
            Some(Slot::Gone(_) | Slot::Waiting(_)) | None => None,
        };
        self.set(next.clone(), None, self.asked, outage);
        let is_there = |serving: Serving| Arc::ptr_eq(&serving.key, &key);
        if !self.serving().is_some_and(is_there) {
            // An admin has killed it a moment ago, maybe without knowing its id.
            let _ = self.check_revoked(version, &key).await;
            return;
        }
        self.tell(before, Some(&next), "in_use", None);
        tracing::info!(account.id = %self.account, key = %self.name, version, "key is in memory");
        if let Some(report) = report {
            self.next_test = self.keyring.clock.boot() + until_next_test();
            self.keyring
                .set_tested(&self.account, &self.name, &key, Arc::new(report));
            self.keyring
                .remember(&self.account, &self.name, self.next_test);
        }
    }

    /// Puts a change on record.
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
        let _ = self.notices.send(Notice::Changed(change));
    }

    fn serving(&self) -> Option<Serving> {
        match self.keyring.slot(&self.account, &self.name)? {
            Slot::Ready {
                key,
                usage,
                version,
                ..
            } => Some(Serving {
                key,
                usage,
                version,
            }),
            Slot::Gone(_) | Slot::Waiting(_) => None,
        }
    }

    /// Vault has just vouched for this key.
    fn confirm(&self, serving: Serving, problem: Option<String>, asked: Duration) {
        if let Some(Slot::Ready {
            outage: Some(_), ..
        }) = self.keyring.slot(&self.account, &self.name)
        {
            let version = serving.version;
            tracing::info!(account.id = %self.account, key = %self.name, version, "Vault answers again; the key is confirmed");
        }
        self.set(serving, problem, asked, None);
    }

    fn set(
        &self,
        serving: Serving,
        problem: Option<String>,
        confirmed: Duration,
        outage: Option<String>,
    ) {
        let Serving {
            key,
            usage,
            version,
        } = serving;
        let slot = Slot::Ready {
            key,
            usage,
            version,
            problem,
            confirmed,
            outage,
        };
        self.keyring.set(&self.account, &self.name, slot);
    }

    fn set_problem(&self, problem: String) {
        self.keyring
            .set_problem(&self.account, &self.name, Some(problem));
    }

    /// Vault has vouched for the key in memory, whatever stands beside it.
    fn confirm_again(&self, asked: Duration) {
        if let Some(Slot::Ready {
            key,
            usage,
            version,
            problem,
            ..
        }) = self.keyring.slot(&self.account, &self.name)
        {
            let serving = Serving {
                key,
                usage,
                version,
            };
            self.confirm(serving, problem, asked);
        }
    }

    /// The keyring has wiped the key for its age: a candidate is as old, and what Vault showed last is to be read anew.
    fn forget_if_wiped(&mut self) {
        if self.is_wiped() {
            self.seen = None;
            self.forget_candidate();
            self.running = None;
        }
    }

    /// Vault has not answered: the key goes on serving, as long as it is not too old for anything.
    fn serve_on(&mut self, reason: String) {
        self.forget_if_wiped();
        let slot = match self.keyring.slot(&self.account, &self.name) {
            Some(Slot::Ready {
                key,
                usage,
                version,
                problem,
                confirmed,
                ..
            }) => Slot::Ready {
                key,
                usage,
                version,
                problem,
                confirmed,
                outage: Some(reason),
            },
            Some(Slot::Waiting(_)) => Slot::Waiting(reason),
            Some(Slot::Gone(_)) | None => return,
        };
        self.keyring.set(&self.account, &self.name, slot);
    }

    fn evict(&mut self, reason: &str) {
        self.seen = None;
        self.forget_candidate();
        self.running = None;
        let told = matches!(self.keyring.slot(&self.account, &self.name), Some(Slot::Gone(before)) if before == reason);
        if !told {
            self.metrics.vault_failure("evicted");
            tracing::error!(account.id = %self.account, key = %self.name, reason, "key is not available");
            let serving = self.serving();
            self.tell(serving.as_ref(), None, "gone", Some(reason.to_owned()));
        }
        self.keyring
            .set(&self.account, &self.name, Slot::Gone(reason.to_owned()));
    }
}
