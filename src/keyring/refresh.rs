//! Keeps the keyring as Vault has it: reads at start, then polls the metadata of each key for changes.
//!
//! Vault's word (404, or 403 twice to a good token, or `state=disabled`) evicts at once. No answer, or an answer that is
//! a fault, changes nothing: what is in memory serves on.

use std::sync::Arc;
use std::time::Duration;

use super::vault::{Metadata, Vault, VaultError};
use super::{Keyring, Slot};
use crate::ids::{AccountId, KeyName};

/// First and longest wait after a failure; each failure doubles it.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Starts one polling task per key. They end with the runtime.
pub fn start(keyring: &Arc<Keyring>, vault: &Arc<Vault>, poll: Duration) {
    for (account, name, _) in keyring.slots() {
        let watch = Watch {
            keyring: Arc::clone(keyring),
            vault: Arc::clone(vault),
            account,
            name,
            seen: None,
        };
        tokio::spawn(watch.run(poll));
    }
}

struct Watch {
    keyring: Arc<Keyring>,
    vault: Arc<Vault>,
    account: AccountId,
    name: KeyName,
    /// The metadata of the version in memory.
    seen: Option<Metadata>,
}

impl Watch {
    async fn run(mut self, poll: Duration) {
        let mut backoff = BACKOFF.0;
        loop {
            let wait = if self.check().await {
                backoff = BACKOFF.0;
                poll.mul_f64(0.8 + 0.4 * fastrand::f64())
            } else {
                // Full jitter, so that many brokers do not meet at a Vault that has just come back.
                let wait = backoff.mul_f64(fastrand::f64());
                backoff = (backoff * 2).min(BACKOFF.1);
                wait
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// Compares Vault with memory once; false when Vault gave no usable answer.
    async fn check(&mut self) -> bool {
        match self.fetch().await {
            Ok(()) => true,
            Err(VaultError::LoginRefused(reason)) => {
                tracing::error!(account.id = %self.account, key = %self.name, %reason, "Vault refuses the broker's login; what is in memory serves on");
                self.keep_waiting(reason);
                false
            }
            Err(VaultError::Outage(reason)) => {
                tracing::warn!(account.id = %self.account, key = %self.name, %reason, "keys cannot be refreshed; what is in memory serves on");
                self.keep_waiting(reason);
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
                if let Some(Slot::Ready { key, version, .. }) = slot {
                    tracing::error!(account.id = %self.account, key = %self.name, %reason, version, "new version is unusable; the one in memory serves on");
                    let problem = Some(reason);
                    let slot = Slot::Ready {
                        key,
                        version,
                        problem,
                    };
                    self.keyring.set(&self.account, &self.name, slot);
                } else {
                    self.evict(&reason);
                }
                true
            }
        }
    }

    async fn fetch(&mut self) -> Result<(), VaultError> {
        let metadata = self.vault.metadata(&self.account, &self.name).await?;
        if metadata.is_disabled() {
            return Err(VaultError::Gone(
                "its metadata in Vault says state=disabled".to_owned(),
            ));
        }
        let is_unchanged = self.seen.as_ref() == Some(&metadata);
        if is_unchanged && !metadata.deletes_itself() {
            return Ok(());
        }
        let version = metadata.current_version;
        let key = self.vault.read(&self.account, &self.name, version).await;
        if is_unchanged && key.is_ok() {
            return Ok(());
        }
        // Seen even when unusable, so that a broken version beside a working key is read once and not at every poll.
        if matches!(key, Ok(_) | Err(VaultError::Unusable(_))) {
            self.seen = Some(metadata);
        }
        self.keyring.set(
            &self.account,
            &self.name,
            Slot::Ready {
                key: Arc::new(key?),
                version,
                problem: None,
            },
        );
        tracing::info!(account.id = %self.account, key = %self.name, version, "key is in memory");
        Ok(())
    }

    /// Tells why a key that was never read is still not there.
    fn keep_waiting(&self, reason: String) {
        if let Some(Slot::Waiting(_)) = self.keyring.slot(&self.account, &self.name) {
            self.keyring
                .set(&self.account, &self.name, Slot::Waiting(reason));
        }
    }

    fn evict(&mut self, reason: &str) {
        self.seen = None;
        let told = matches!(self.keyring.slot(&self.account, &self.name), Some(Slot::Gone(before)) if before == reason);
        if !told {
            tracing::error!(account.id = %self.account, key = %self.name, reason, "key is not available");
        }
        self.keyring
            .set(&self.account, &self.name, Slot::Gone(reason.to_owned()));
    }
}
