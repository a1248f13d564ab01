//! Keeps the keyring as Vault has it: reads at start, then polls the metadata of each key for changes.
//!
//! Vault's word (404, or 403 twice to a good token, or `state=disabled`) evicts at once. No answer, or an answer that is
//! a fault, changes nothing: what is in memory serves on, within the bounds of its account.
//!
//! Another version takes the place of the one in memory once the exchange has taken requests that it signed. One that
//! the exchange refuses changes nothing, and the reason shows. Only after a start there is nothing to compare with: the
//! newest version serves at once, and if the exchange turns out to refuse it, the version before it is tried.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use super::trial::{KeyChange, Notice, Notices, Report, Trial, Verdict};
use super::usage::Usage;
use super::vault::{Metadata, Vault, VaultError};
use super::{Keyring, Look, Slot};
use crate::ids::{AccountId, KeyName};
use crate::kucoin::Key;
use crate::restrictions::{KeyDigest, Restrictions};
use crate::telemetry::Metrics;

/// First and longest wait after a failure; each failure doubles it.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// However much there is to doubt, Vault is not asked more often.
const AT_LEAST: Duration = Duration::from_millis(100);

/// How often a key is tested in the background at most, with up to a fifth more so that keys spread out. A test has
/// weight 20 of the 2000 that an account has for such questions in 30 s.
const TEST_EVERY: Duration = Duration::from_secs(600);

/// How long a test may take.
const TEST_WITHIN: Duration = Duration::from_secs(10);

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
        let keys: Vec<_> = self.keyring.status();
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
                        untested: None,
                        next_test: Duration::ZERO,
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
    /// The metadata with which the last look ended well.
    seen: Option<Metadata>,
    /// The version that shall serve, as long as the exchange has not said whether it takes it.
    untested: Option<(u64, Arc<Key>)>,
    /// When the key in memory is to be tested again: time since boot.
    next_test: Duration,
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
}

impl Watch {
    async fn run(mut self, poll: Duration) {
        let mut backoff = BACKOFF.0;
        loop {
            // Before the look, so that one that is asked for meanwhile is not missed.
            let (keyring, look) = (Arc::clone(&self.keyring), Arc::clone(&self.look));
            let (doubt, wanted) = (keyring.doubts.notified(), look.wanted.notified());
            look.count.send_modify(|(begun, _)| *begun += 1);
            let wait = if self.check().await {
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
            self.test_if_due().await;
            look.count.send_modify(|(begun, ended)| *ended = *begun);
            sleep(AT_LEAST).await;
            let called = async {
                tokio::select! {
                    () = doubt => {}
                    () = wanted => {}
                }
            };
            let _ = timeout(wait.saturating_sub(AT_LEAST), called).await;
        }
    }

    /// Compares Vault with memory once; false when Vault gave no usable answer.
    async fn check(&mut self) -> bool {
        let asked = self.keyring.clock.boot();
        let found = self.fetch(asked).await;
        self.keyring.set_on_trial(&self.account, &self.name, false);
        match found {
            Ok(()) => true,
            Err(VaultError::LoginRefused(reason)) => {
                self.metrics.vault_failure("login");
                tracing::error!(account.id = %self.account, key = %self.name, %reason, "Vault refuses the broker's login; what is in memory serves on");
                self.serve_on(reason);
                false
            }
            Err(VaultError::Outage(reason)) => {
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
                // A half-written new version must not take a working key away.
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
                    self.evict(&reason);
                }
                true
            }
        }
    }

    /// `asked`: when, in time since boot; an answer confirms no more than that moment.
    async fn fetch(&mut self, asked: Duration) -> Result<(), VaultError> {
        let metadata = self.vault.metadata(&self.account, &self.name).await?;
        if metadata.is_disabled() {
            return Err(VaultError::Gone(
                "its metadata in Vault says state=disabled".to_owned(),
            ));
        }
        if let (Some(serving), Some(seen)) = (self.serving(), &self.seen)
            && metadata.has_taken_away(seen, serving.version)
        {
            let version = serving.version;
            self.evict(&format!("version {version} has been deleted in Vault"));
        }
        let wanted = match metadata.wanted() {
            Ok(wanted) => wanted,
            Err(reason) => {
                self.seen = Some(metadata);
                return Err(VaultError::Unusable(reason));
            }
        };
        let is_fresh = self.look.is_fresh.swap(false, Ordering::Relaxed);
        let is_unchanged = !is_fresh
            && self
                .seen
                .as_ref()
                .is_some_and(|seen| seen.wanted() == Ok(wanted) && metadata.is_same(seen, wanted));
        if is_unchanged && !metadata.deletes_itself(wanted) {
            self.seen = Some(metadata);
            if let Some((version, key)) = self.untested.take() {
                return self.adopt(version, key, asked).await;
            }
            self.confirm_again(asked);
            return Ok(());
        }
        let key = self.vault.read(&self.account, &self.name, wanted).await;
        // Seen even when unusable, so that a broken version beside a working key is read once and not at every poll.
        if matches!(key, Ok(_) | Err(VaultError::Unusable(_))) {
            self.seen = Some(metadata);
        }
        let key = Arc::new(key?);
        if is_unchanged && self.untested.is_none() {
            self.confirm_again(asked);
            return Ok(());
        }
        self.adopt(wanted, key, asked).await
    }

    /// Puts a version to use that Vault has just shown, if the exchange takes it.
    async fn adopt(
        &mut self,
        version: u64,
        key: Arc<Key>,
        asked: Duration,
    ) -> Result<(), VaultError> {
        self.untested = None;
        self.check_revoked(version, &key)?;
        let next = Serving::new(key, version);
        let Some(serving) = self.serving() else {
            // Nothing better is there, and the test follows at once.
            self.put_to_use(None, next, None, asked);
            self.next_test = Duration::ZERO;
            return Ok(());
        };
        self.keyring.set_on_trial(&self.account, &self.name, true);
        let report = self.trial(&next.key, true).await;
        match &report.verdict {
            Verdict::Good => {
                // It took time: an admin may have killed it meanwhile.
                self.check_revoked(version, &next.key)?;
                self.put_to_use(Some(&serving), next, Some(report), asked);
            }
            Verdict::Refused(reason) => {
                let problem = format!("version {version} is refused: {reason}");
                self.metrics.vault_failure("unusable");
                tracing::error!(account.id = %self.account, key = %self.name, version, %reason, "the exchange refuses the new version; the one in memory serves on");
                self.tell(Some(&serving), Some(&next), "refused", Some(reason.clone()));
                self.confirm_serving(Some(problem), asked);
            }
            Verdict::Unclear(reason) => {
                let problem = format!("version {version} waits for its test: {reason}");
                tracing::warn!(account.id = %self.account, key = %self.name, version, %reason, "the new version cannot be tested yet; the one in memory serves on");
                self.untested = Some((version, next.key));
                self.confirm_serving(Some(problem), asked);
            }
        }
        Ok(())
    }

    fn check_revoked(&self, version: u64, key: &Arc<Key>) -> Result<(), VaultError> {
        let digest = KeyDigest(key.id_sha256());
        if let Err(error) = self.restrictions.seen(&self.account, &self.name, digest) {
            tracing::error!(account.id = %self.account, key = %self.name, %error, "revocation cannot be written");
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
    async fn test_if_due(&mut self) {
        let now = self.keyring.clock.boot();
        let Some(serving) = self.serving() else {
            return;
        };
        if now < self.next_test {
            return;
        }
        self.next_test = now + TEST_EVERY.mul_f64(1.0 + 0.2 * fastrand::f64());
        let is_proven = serving.usage.accepted_ms().is_some();
        self.keyring
            .set_on_trial(&self.account, &self.name, !is_proven);
        let report = Arc::new(self.trial(&serving.key, false).await);
        self.keyring
            .set_tested(&self.account, &self.name, &serving.key, Arc::clone(&report));
        if let Verdict::Refused(reason) = &report.verdict {
            tracing::error!(account.id = %self.account, key = %self.name, version = serving.version, %reason, "the exchange refuses the key");
            if !is_proven {
                self.fall_back(&serving, reason).await;
            }
        }
        self.keyring.set_on_trial(&self.account, &self.name, false);
    }

    /// After a start whose newest version the exchange refuses: the one before it may be good.
    async fn fall_back(&mut self, refused: &Serving, reason: &str) {
        let version = refused.version.saturating_sub(1);
        let is_newest = self
            .seen
            .as_ref()
            .is_some_and(|seen| seen.current_version == refused.version && seen.has(version));
        if !is_newest {
            return;
        }
        let asked = self.keyring.clock.boot();
        let Ok(key) = self.vault.read(&self.account, &self.name, version).await else {
            return;
        };
        let before = Serving::new(Arc::new(key), version);
        if self.check_revoked(version, &before.key).is_err() {
            return;
        }
        let report = self.trial(&before.key, true).await;
        if report.verdict == Verdict::Good {
            let problem = format!("version {} is refused: {reason}", refused.version);
            self.put_to_use(Some(refused), before, Some(report), asked);
            self.confirm_serving(Some(problem), asked);
        }
    }

    async fn trial(&self, key: &Arc<Key>, is_candidate: bool) -> Report {
        let (tell, told) = oneshot::channel();
        let trial = Trial {
            account: self.account.clone(),
            name: self.name.clone(),
            key: Arc::clone(key),
            is_candidate,
            tell,
        };
        let _ = self.notices.send(Notice::Trial(trial));
        let no_answer = || Report {
            verdict: Verdict::Unclear("the exchange did not answer in time".to_owned()),
            info: None,
            findings: Vec::new(),
        };
        let told = timeout(TEST_WITHIN, told).await;
        // An error means that the broker is stopping.
        told.ok().and_then(Result::ok).unwrap_or_else(no_answer)
    }

    /// From now on `next` signs, and nothing else does.
    fn put_to_use(
        &mut self,
        before: Option<&Serving>,
        next: Serving,
        report: Option<Report>,
        asked: Duration,
    ) {
        let (key, version) = (Arc::clone(&next.key), next.version);
        self.tell(before, Some(&next), "in_use", None);
        self.confirm(next, None, asked);
        if let Some(report) = report {
            let report = Arc::new(report);
            self.keyring
                .set_tested(&self.account, &self.name, &key, report);
            let now = self.keyring.clock.boot();
            self.next_test = now + TEST_EVERY.mul_f64(1.0 + 0.2 * fastrand::f64());
        }
        tracing::info!(account.id = %self.account, key = %self.name, version, "key is in memory");
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
        let Serving {
            key,
            usage,
            version,
        } = serving;
        if let Some(Slot::Ready {
            outage: Some(_), ..
        }) = self.keyring.slot(&self.account, &self.name)
        {
            tracing::info!(account.id = %self.account, key = %self.name, version, "Vault answers again; the key is confirmed");
        }
        let slot = Slot::Ready {
            key,
            usage,
            version,
            problem,
            confirmed: asked,
            outage: None,
        };
        self.keyring.set(&self.account, &self.name, slot);
    }

    /// The key in memory goes on, whatever was found beside it; unless it is gone meanwhile.
    fn confirm_serving(&self, problem: Option<String>, asked: Duration) {
        if let Some(serving) = self.serving() {
            self.confirm(serving, problem, asked);
        }
    }

    /// Nothing has changed, says Vault.
    fn confirm_again(&mut self, asked: Duration) {
        match self.keyring.slot(&self.account, &self.name) {
            Some(Slot::Ready {
                key,
                usage,
                version,
                problem,
                ..
            }) => {
                let serving = Serving {
                    key,
                    usage,
                    version,
                };
                self.confirm(serving, problem, asked);
            }
            // It was wiped meanwhile: the next look reads it again.
            _ => self.seen = None,
        }
    }

    /// Vault has not answered: the key goes on serving, unless it is too old for anything.
    fn serve_on(&mut self, reason: String) {
        if self.keyring.wipe_if_too_old(&self.account, &self.name) {
            self.seen = None;
            tracing::error!(account.id = %self.account, key = %self.name, "key is wiped: Vault has been silent for longer than max_stale_cancel_s");
            return;
        }
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
        self.untested = None;
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
