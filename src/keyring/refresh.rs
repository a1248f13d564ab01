//! Keeps the keyring as Vault has it: reads at start, then polls the metadata of each key for changes.
//!
//! Vault's word (404, or 403 twice to a good token, or `state=disabled`) evicts at once. No answer, or an answer that is
//! a fault, changes nothing: what is in memory serves on, within the bounds of its account.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use super::vault::{Metadata, Vault, VaultError};
use super::{Keyring, Slot};
use crate::ids::{AccountId, KeyName};
use crate::kucoin::Key;
use crate::telemetry::Metrics;

/// First and longest wait after a failure; each failure doubles it.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// However much there is to doubt, Vault is not asked more often.
const AT_LEAST: Duration = Duration::from_millis(100);

/// One polling task for each key of the keyring.
#[derive(Debug)]
pub struct Refresher {
    keyring: Arc<Keyring>,
    vault: Arc<Vault>,
    metrics: Arc<Metrics>,
    poll: Duration,
    tasks: Mutex<BTreeMap<(AccountId, KeyName), AbortHandle>>,
}

impl Refresher {
    /// Nothing is polled until [`Refresher::follow`].
    pub fn new(
        keyring: Arc<Keyring>,
        vault: Arc<Vault>,
        metrics: Arc<Metrics>,
        poll: Duration,
    ) -> Self {
        Self {
            keyring,
            vault,
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
            tasks
                .entry((key.account.clone(), key.name.clone()))
                .or_insert_with(|| {
                    let watch = Watch {
                        keyring: Arc::clone(&self.keyring),
                        vault: Arc::clone(&self.vault),
                        metrics: Arc::clone(&self.metrics),
                        account: key.account,
                        name: key.name,
                        seen: None,
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

struct Watch {
    keyring: Arc<Keyring>,
    vault: Arc<Vault>,
    metrics: Arc<Metrics>,
    account: AccountId,
    name: KeyName,
    /// The metadata of the version in memory.
    seen: Option<Metadata>,
}

impl Watch {
    async fn run(mut self, poll: Duration) {
        let mut backoff = BACKOFF.0;
        loop {
            let doubt = Arc::clone(&self.keyring);
            let doubt = doubt.doubts.notified();
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
            sleep(AT_LEAST).await;
            let _ = timeout(wait.saturating_sub(AT_LEAST), doubt).await;
        }
    }

    /// Compares Vault with memory once; false when Vault gave no usable answer.
    async fn check(&mut self) -> bool {
        let asked = self.keyring.clock.boot();
        match self.fetch(asked).await {
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
                let slot = self.keyring.slot(&self.account, &self.name);
                if let Some(Slot::Ready { key, version, .. }) = slot
                    && self.seen.as_ref().is_some_and(|seen| seen.has(version))
                {
                    self.metrics.vault_failure("unusable");
                    tracing::error!(account.id = %self.account, key = %self.name, %reason, version, "new version is unusable; the one in memory serves on");
                    self.confirm(key, version, Some(reason), asked);
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
        let is_unchanged = self.seen.as_ref() == Some(&metadata);
        if is_unchanged && !metadata.deletes_itself() {
            self.confirm_again(asked);
            return Ok(());
        }
        let version = metadata.current_version;
        let key = self.vault.read(&self.account, &self.name, version).await;
        if is_unchanged && key.is_ok() {
            self.confirm_again(asked);
            return Ok(());
        }
        // Seen even when unusable, so that a broken version beside a working key is read once and not at every poll.
        if matches!(key, Ok(_) | Err(VaultError::Unusable(_))) {
            self.seen = Some(metadata);
        }
        self.confirm(Arc::new(key?), version, None, asked);
        tracing::info!(account.id = %self.account, key = %self.name, version, "key is in memory");
        Ok(())
    }

    /// Vault has just vouched for this key.
    fn confirm(&self, key: Arc<Key>, version: u64, problem: Option<String>, asked: Duration) {
        if let Some(Slot::Ready {
            outage: Some(_), ..
        }) = self.keyring.slot(&self.account, &self.name)
        {
            tracing::info!(account.id = %self.account, key = %self.name, version, "Vault answers again; the key is confirmed");
        }
        let slot = Slot::Ready {
            key,
            version,
            problem,
            confirmed: asked,
            outage: None,
        };
        self.keyring.set(&self.account, &self.name, slot);
    }

    /// Nothing has changed, says Vault.
    fn confirm_again(&mut self, asked: Duration) {
        match self.keyring.slot(&self.account, &self.name) {
            Some(Slot::Ready {
                key,
                version,
                problem,
                ..
            }) => self.confirm(key, version, problem, asked),
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
                version,
                problem,
                confirmed,
                ..
            }) => Slot::Ready {
                key,
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
        let told = matches!(self.keyring.slot(&self.account, &self.name), Some(Slot::Gone(before)) if before == reason);
        if !told {
            self.metrics.vault_failure("evicted");
            tracing::error!(account.id = %self.account, key = %self.name, reason, "key is not available");
        }
        self.keyring
            .set(&self.account, &self.name, Slot::Gone(reason.to_owned()));
    }
}
