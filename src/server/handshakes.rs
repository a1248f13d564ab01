//! Places that are bounded, and shared out fairly: one more ends the oldest of whoever has the most.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::Arc;

use crate::base::lock::Mutex;
use tokio_util::sync::CancellationToken;

/// Places that are taken, in the order in which they were.
pub(super) struct HandshakeSlots<K> {
    limit: usize,
    taken: Mutex<Taken<K>>,
}

struct Taken<K> {
    count: u64,
    places: BTreeMap<u64, (K, CancellationToken)>,
}

/// One of them; it is free again when this drops.
pub(super) struct HandshakeSlot<K: Clone + Eq + Hash> {
    places: Arc<HandshakeSlots<K>>,
    number: u64,
    /// Cancelled when it must make room.
    pub(super) is_given_up: CancellationToken,
}

impl<K: Clone + Eq + Hash> HandshakeSlots<K> {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        let (count, places) = (0, BTreeMap::new());
        Arc::new(Self {
            limit,
            taken: Mutex::new(Taken { count, places }),
        })
    }

    /// Takes one; makes room for it where there is none.
    pub(super) fn take(places: &Arc<Self>, who: K) -> HandshakeSlot<K> {
        let mut taken = places.taken.lock();
        if taken.places.len() >= places.limit {
            taken.give_one_up();
        }
        taken.count += 1;
        let (number, is_given_up) = (taken.count, CancellationToken::new());
        taken.places.insert(number, (who, is_given_up.clone()));
        HandshakeSlot {
            places: Arc::clone(places),
            number,
            is_given_up,
        }
    }
}

impl<K: Clone + Eq + Hash> Taken<K> {
    /// Ends the oldest of whoever has the most.
    fn give_one_up(&mut self) {
        let mut counts: HashMap<&K, usize> = HashMap::new();
        for (who, _) in self.places.values() {
            *counts.entry(who).or_default() += 1;
        }
        let most = counts.values().max().copied();
        let oldest = self
            .places
            .iter()
            .find(|(_, (who, _))| counts.get(who).copied() == most)
            .map(|(number, _)| *number);
        if let Some((_, is_given_up)) = oldest.and_then(|number| self.places.remove(&number)) {
            is_given_up.cancel();
        }
    }
}

impl<K: Clone + Eq + Hash> Drop for HandshakeSlot<K> {
    fn drop(&mut self) {
        self.places.taken.lock().places.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_more_ends_the_oldest_of_whoever_has_the_most() {
        let places = HandshakeSlots::new(512);
        let take = |who: &'static str| HandshakeSlots::take(&places, who);
        let bot = take("bot");
        let silent: Vec<_> = (1..512).map(|_| take("silent")).collect();
        let gone = |silent: &[HandshakeSlot<_>]| {
            silent
                .iter()
                .filter(|one| one.is_given_up.is_cancelled())
                .count()
        };
        assert_eq!(gone(&silent), 0);
        let other = take("other");
        assert!(silent[0].is_given_up.is_cancelled());
        assert_eq!(gone(&silent), 1);
        assert!(!bot.is_given_up.is_cancelled() && !other.is_given_up.is_cancelled());
        drop((bot, other, silent));
        assert!(places.taken.lock().places.is_empty());
    }

    #[test]
    fn where_everybody_has_one_the_oldest_of_all_ends() {
        let places = HandshakeSlots::new(8);
        let all: Vec<_> = (0..11)
            .map(|who| HandshakeSlots::take(&places, who))
            .collect();
        for (number, one) in all.iter().enumerate() {
            assert_eq!(one.is_given_up.is_cancelled(), number < 3, "{number}");
        }
    }
}
