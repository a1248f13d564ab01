//! A limited number of slots, shared fairly: one more evicts the oldest slot of the holder with the most.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::Arc;

use crate::base::lock::Mutex;
use tokio_util::sync::CancellationToken;

/// The slots in use, oldest first.
pub(super) struct HandshakeSlots<K> {
    limit: usize,
    in_use: Mutex<InUse<K>>,
}

struct InUse<K> {
    count: u64,
    slots: BTreeMap<u64, (K, CancellationToken)>,
}

/// One slot; it is free again when this drops.
pub(super) struct HandshakeSlot<K: Clone + Eq + Hash> {
    slots: Arc<HandshakeSlots<K>>,
    number: u64,
    /// Cancelled when the slot is evicted.
    pub(super) eviction: CancellationToken,
}

impl<K: Clone + Eq + Hash> HandshakeSlots<K> {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        let (count, slots) = (0, BTreeMap::new());
        Arc::new(Self {
            limit,
            in_use: Mutex::new(InUse { count, slots }),
        })
    }

    /// Takes a slot for `holder`; evicts another one if none is free.
    pub(super) fn take(slots: &Arc<Self>, holder: K) -> HandshakeSlot<K> {
        Self::take_with(slots, holder, CancellationToken::new())
    }

    /// The same with the token to cancel when this slot is evicted.
    pub(super) fn take_with(
        slots: &Arc<Self>,
        holder: K,
        eviction: CancellationToken,
    ) -> HandshakeSlot<K> {
        let mut in_use = slots.in_use.lock();
        if in_use.slots.len() >= slots.limit {
            in_use.evict_one();
        }
        in_use.count += 1;
        let number = in_use.count;
        in_use.slots.insert(number, (holder, eviction.clone()));
        HandshakeSlot {
            slots: Arc::clone(slots),
            number,
            eviction,
        }
    }
}

impl<K: Clone + Eq + Hash> InUse<K> {
    /// Evicts the oldest slot of the holder with the most slots.
    fn evict_one(&mut self) {
        let mut counts: HashMap<&K, usize> = HashMap::new();
        for (holder, _) in self.slots.values() {
            *counts.entry(holder).or_default() += 1;
        }
        let most = counts.values().max().copied();
        let oldest = self
            .slots
            .iter()
            .find(|(_, (holder, _))| counts.get(holder).copied() == most)
            .map(|(number, _)| *number);
        if let Some((_, eviction)) = oldest.and_then(|number| self.slots.remove(&number)) {
            eviction.cancel();
        }
    }
}

impl<K: Clone + Eq + Hash> Drop for HandshakeSlot<K> {
    fn drop(&mut self) {
        self.slots.in_use.lock().slots.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_full_the_oldest_slot_of_the_largest_holder_is_evicted() {
        let slots = HandshakeSlots::new(512);
        let take = |holder: &'static str| HandshakeSlots::take(&slots, holder);
        let bot = take("bot");
        let silent: Vec<_> = (1..512).map(|_| take("silent")).collect();
        let evicted = |silent: &[HandshakeSlot<_>]| {
            silent
                .iter()
                .filter(|one| one.eviction.is_cancelled())
                .count()
        };
        assert_eq!(evicted(&silent), 0);
        let other = take("other");
        assert!(silent[0].eviction.is_cancelled());
        assert_eq!(evicted(&silent), 1);
        assert!(!bot.eviction.is_cancelled() && !other.eviction.is_cancelled());
        drop((bot, other, silent));
        assert!(slots.in_use.lock().slots.is_empty());
    }

    #[test]
    fn when_every_holder_has_one_slot_the_oldest_is_evicted() {
        let slots = HandshakeSlots::new(8);
        let all: Vec<_> = (0..11)
            .map(|holder| HandshakeSlots::take(&slots, holder))
            .collect();
        for (number, one) in all.iter().enumerate() {
            assert_eq!(one.eviction.is_cancelled(), number < 3, "{number}");
        }
    }
}
