//! The keys of all accounts, in memory. Filled and emptied in the background; the request path only reads.
//!
//! A key serves on while Vault is silent, but not for ever: its age is the time since Vault last confirmed it, and past
//! the account's bounds it signs no more.

pub mod refresh;
pub mod vault;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use crate::clock::Clock;
use crate::ids::{AccountId, KeyName};
use crate::kucoin::Key;
use crate::policy::{Account, MaxStale, Permit};

/// Every key that the rules name, with its value or the reason why there is none.
#[derive(Debug)]
pub struct Keyring {
    clock: Arc<Clock>,
    slots: RwLock<BTreeMap<AccountId, Keys>>,
    changed: watch::Sender<()>,
    /// Wakes whoever asks Vault, when a key turns out older than anybody knew.
    doubts: Notify,
}

/// The keys of one account.
#[derive(Debug)]
struct Keys {
    max_stale: MaxStale,
    slots: BTreeMap<KeyName, Slot>,
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
        /// When Vault last confirmed it: time since boot.
        confirmed: Duration,
        /// Why Vault has not confirmed it again; none while it does.
        outage: Option<String>,
    },
    /// Vault has not answered yet, or not for so long that the key was wiped.
    Waiting(String),
}

/// A key, and how far it can be trusted.
#[derive(Debug)]
pub struct Lent {
    /// The key.
    pub key: Arc<Key>,
    /// Since Vault last confirmed it; zero while Vault answers.
    pub stale: Duration,
}

/// What is known about one key, for readiness and metrics.
#[derive(Debug)]
pub struct KeyStatus {
    /// Its account.
    pub account: AccountId,
    /// Its name.
    pub name: KeyName,
    /// What stands in its place.
    pub slot: Slot,
    /// Since Vault last confirmed it; none where it is not in memory.
    pub age: Option<Duration>,
    /// Whether it is so old that it signs nothing that adds risk.
    pub is_too_old: bool,
}

/// The account's key is not in memory, or too old.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the key of account {account} for this scope is not available: {reason}")]
pub struct KeyUnavailable {
    account: AccountId,
    reason: String,
}

impl Keyring {
    /// No keys yet; ages count on `clock`.
    pub fn new(clock: Arc<Clock>) -> Self {
        Self {
            clock,
            slots: RwLock::default(),
            changed: watch::Sender::new(()),
            doubts: Notify::new(),
        }
    }

    /// Makes places for the keys of these accounts; what is there already stays.
    pub fn add<'a>(&self, accounts: impl Iterator<Item = &'a Arc<Account>>) {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        for account in accounts {
            let keys = slots.entry(account.id.clone()).or_insert_with(|| Keys {
                max_stale: account.max_stale,
                slots: BTreeMap::new(),
            });
            keys.max_stale = account.max_stale;
            for name in account.keys.values() {
                let waiting = || Slot::Waiting("not read from Vault yet".to_owned());
                keys.slots.entry(name.clone()).or_insert_with(waiting);
            }
        }
        drop(slots);
        self.changed.send_replace(());
    }

    /// Drops all keys but those of these accounts.
    pub fn retain<'a>(&self, accounts: impl Iterator<Item = &'a Arc<Account>>) {
        let accounts: BTreeMap<_, _> = accounts.map(|account| (&account.id, account)).collect();
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|id, keys| {
            let Some(account) = accounts.get(id) else {
                return false;
            };
            keys.slots
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
    pub fn key(&self, permit: &Permit) -> Result<Lent, KeyUnavailable> {
        let account = &permit.account().id;
        let unavailable = |reason: &str| KeyUnavailable {
            account: account.clone(),
            reason: reason.to_owned(),
        };
        let name = permit
            .key_name()
            .ok_or_else(|| unavailable("the rules name none"))?;
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let keys = slots
            .get(account)
            .ok_or_else(|| unavailable("the rules name none"))?;
        match keys.slots.get(name) {
            Some(Slot::Ready { key, .. })
                if permit.partner().is_some() && !key.has_partner_key() =>
            {
                Err(unavailable(
                    "the account has a partner, and the key in Vault has no `partner_key`",
                ))
            }
            Some(Slot::Ready {
                key,
                confirmed,
                outage,
                ..
            }) => {
                let age = self.clock.boot().saturating_sub(*confirmed);
                let max = if permit.adds_risk() {
                    keys.max_stale.add_risk
                } else {
                    keys.max_stale.withdraw_risk
                };
                if age > max {
                    if outage.is_none() {
                        // The machine has slept: nobody has asked Vault yet.
                        self.doubts.notify_waiters();
                    }
                    return Err(unavailable(&too_old(age, max, outage.as_deref())));
                }
                let stale = if outage.is_some() {
                    age
                } else {
                    Duration::ZERO
                };
                Ok(Lent {
                    key: Arc::clone(key),
                    stale,
                })
            }
            Some(Slot::Gone(reason) | Slot::Waiting(reason)) => Err(unavailable(reason)),
            None => Err(unavailable("the rules name none")),
        }
    }

    /// Every key with what is known about it.
    pub fn status(&self) -> Vec<KeyStatus> {
        let now = self.clock.boot();
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let all = slots.iter().flat_map(|(account, keys)| {
            keys.slots.iter().map(move |(name, slot)| {
                let age = slot.confirmed().map(|at| now.saturating_sub(at));
                KeyStatus {
                    account: account.clone(),
                    name: name.clone(),
                    slot: slot.clone(),
                    age,
                    is_too_old: age.is_some_and(|age| age > keys.max_stale.add_risk),
                }
            })
        });
        all.collect()
    }

    /// Tells when any slot changes.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// How long the keys of an account serve for everything while Vault is silent.
    fn max_stale(&self, account: &AccountId) -> Duration {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots
            .get(account)
            .map_or(Duration::MAX, |keys| keys.max_stale.add_risk)
    }

    /// Wipes a key that is too old even to withdraw risk; returns whether it did.
    fn wipe_if_too_old(&self, account: &AccountId, name: &KeyName) -> bool {
        let now = self.clock.boot();
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let Some(keys) = slots.get_mut(account) else {
            return false;
        };
        let max = keys.max_stale.withdraw_risk;
        let Some(slot) = keys.slots.get_mut(name) else {
            return false;
        };
        let age = slot.confirmed().map(|at| now.saturating_sub(at));
        match age {
            Some(age) if age > max => {
                *slot = Slot::Waiting(too_old(age, max, Some("wiped from memory")));
            }
            _ => return false,
        }
        drop(slots);
        self.changed.send_replace(());
        true
    }

    /// What is known about one key.
    fn slot(&self, account: &AccountId, name: &KeyName) -> Option<Slot> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(account)?.slots.get(name).cloned()
    }

    /// Puts a slot in place; a key that stood there is wiped once its last request is signed.
    fn set(&self, account: &AccountId, name: &KeyName, slot: Slot) {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let keys = slots.get_mut(account);
        if let Some(place) = keys.and_then(|keys| keys.slots.get_mut(name)) {
            *place = slot;
        }
        drop(slots);
        self.changed.send_replace(());
    }
}

impl Slot {
    fn confirmed(&self) -> Option<Duration> {
        match self {
            Self::Ready { confirmed, .. } => Some(*confirmed),
            Self::Gone(_) | Self::Waiting(_) => None,
        }
    }
}

fn too_old(age: Duration, max: Duration, why: Option<&str>) -> String {
    let why = why.unwrap_or("it is being asked now");
    format!(
        "Vault last confirmed it {} s ago, and {} s are allowed for this request: {why}",
        age.as_secs(),
        max.as_secs()
    )
}
