//! The keys of all accounts, in memory. Filled and emptied in the background; the request path only reads.

pub mod refresh;
pub mod vault;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;

use crate::ids::{AccountId, KeyName};
use crate::kucoin::Key;
use crate::policy::{Account, Permit};

/// Every key that the rules name, with its value or the reason why there is none.
#[derive(Debug)]
pub struct Keyring {
    slots: RwLock<BTreeMap<AccountId, BTreeMap<KeyName, Slot>>>,
    changed: watch::Sender<()>,
}

/// What is known about one key.
#[derive(Clone, Debug)]
pub enum Slot {
    /// Vault has said that there is no such key for us: evicted, or never there.
    Gone(String),
    /// In memory, from this version of the secret in Vault.
    Ready {
        /// The key.
        key: Arc<Key>,
        /// The version in Vault.
        version: u64,
        /// What is wrong with a newer version, which is not used.
        problem: Option<String>,
    },
    /// Vault has not answered yet.
    Waiting(String),
}

/// The account's key is not in memory.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the key of account {account} for this scope is not available: {reason}")]
pub struct KeyUnavailable {
    account: AccountId,
    reason: String,
}

impl Keyring {
    /// Empty places for the keys of these accounts.
    pub fn new<'a>(accounts: impl Iterator<Item = &'a Arc<Account>>) -> Self {
        let waiting = |key: &KeyName| {
            (
                key.clone(),
                Slot::Waiting("not read from Vault yet".to_owned()),
            )
        };
        let slots = accounts.map(|account| {
            (
                account.id.clone(),
                account.keys.values().map(waiting).collect(),
            )
        });
        Self {
            slots: RwLock::new(slots.collect()),
            changed: watch::Sender::new(()),
        }
    }

    /// The key that signs what `permit` allows.
    ///
    /// # Errors
    /// When it is not in memory; says why.
    pub fn key(&self, permit: &Permit) -> Result<Arc<Key>, KeyUnavailable> {
        let account = &permit.account().id;
        let unavailable = |reason: &str| KeyUnavailable {
            account: account.clone(),
            reason: reason.to_owned(),
        };
        let name = permit
            .key_name()
            .ok_or_else(|| unavailable("the rules name none"))?;
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        match slots.get(account).and_then(|keys| keys.get(name)) {
            Some(Slot::Ready { key, .. })
                if permit.partner().is_some() && !key.has_partner_key() =>
            {
                Err(unavailable(
                    "the account has a partner, and the key in Vault has no `partner_key`",
                ))
            }
            Some(Slot::Ready { key, .. }) => Ok(Arc::clone(key)),
            Some(Slot::Gone(reason) | Slot::Waiting(reason)) => Err(unavailable(reason)),
            None => Err(unavailable("the rules name none")),
        }
    }

    /// Every key with what is known about it.
    pub fn slots(&self) -> Vec<(AccountId, KeyName, Slot)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let all = slots.iter().flat_map(|(account, keys)| {
            keys.iter()
                .map(|(name, slot)| (account.clone(), name.clone(), slot.clone()))
        });
        all.collect()
    }

    /// Tells when any slot changes.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// What is known about one key.
    fn slot(&self, account: &AccountId, name: &KeyName) -> Option<Slot> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(account)?.get(name).cloned()
    }

    /// Puts a slot in place; a key that stood there is wiped once its last request is signed.
    fn set(&self, account: &AccountId, name: &KeyName, slot: Slot) {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = slots.get_mut(account).and_then(|keys| keys.get_mut(name)) {
            *place = slot;
        }
        drop(slots);
        self.changed.send_replace(());
    }
}
