//! The table of claims: which clientOids have been used, by whom, and what became of their orders. No I/O and no clock.
//!
//! It is sized for a million claims: entries have a fixed size, and the index holds only their numbers.

use std::collections::HashMap;

use hashbrown::HashTable;

use crate::base::ids::BotId;

/// Accepted claims that are younger than this are never evicted: a bot may still repeat its order.
const EVICTABLE_AFTER_S: u32 = 15 * 60;

/// Expired claims that one placing call removes: of its bot, and of another one.
const EXPIRE_AT_ONCE: usize = 8;

/// The lists of a bot.
const ACCEPTED: usize = 0;
const OTHERS: usize = 1;

/// No claim.
const NONE: u32 = u32::MAX;

/// Bytes of an order id that are kept; KuCoin's have at most 24.
const ORDER_ID_BYTES: usize = 30;

/// Identifies a clientOid of an account and scope: a keyed hash.
pub(super) type ClaimKey = [u64; 2];

/// What is known about an order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum OrderState {
    /// Its call has not ended.
    InFlight,
    /// The exchange accepted it.
    Accepted,
    /// It may exist.
    MaybeSent,
    /// It may exist, and the broker could not find out: it does not look it up any more.
    Unknown,
}

/// What became of an order that has a claim.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Settled {
    /// The exchange accepted it; its order id, if known.
    Accepted(Option<String>),
    /// It may have been placed, and the broker looks it up or waits for the answer.
    MaybeSent,
    /// It was not placed.
    NotPlaced,
    /// It may have been placed, and the broker cannot find out.
    Unknown,
}

impl OrderState {
    /// The name in `ErrorInfo`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::InFlight => "in_flight",
            Self::Accepted => "accepted",
            Self::MaybeSent => "maybe_sent",
            Self::Unknown => "unknown",
        }
    }
}

/// A claim on a clientOid.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Claim {
    pub(super) state: OrderState,
    pub(super) order_id: Option<String>,
    /// A digest of the request.
    pub(super) body: u64,
    /// Position of its endpoint in the catalogue.
    pub(super) endpoint: u16,
    /// When it was made, in seconds.
    pub(super) at_s: u32,
}

/// The request that makes a claim.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct ClaimedBy {
    /// A digest of its body.
    pub(super) body: u64,
    /// Position of its endpoint in the catalogue.
    pub(super) endpoint: u16,
}

/// Why no claim was made.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum NotClaimed {
    /// The order at this position has a claim.
    Claimed(usize, Claim),
    /// The bot has used up its share, and none of its claims can be evicted.
    Full,
}

/// The limits of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuardLimits {
    /// How long a claim is kept, in seconds.
    pub(crate) window_s: u32,
    /// Claims of all bots.
    pub(crate) claims: usize,
    /// Claims of one bot.
    pub(crate) claims_per_bot: usize,
}

/// The claims of all bots.
#[derive(Debug)]
pub(super) struct Guard {
    limits: GuardLimits,
    entries: Vec<Entry>,
    /// The first free entry; the others follow in `next`.
    free: u32,
    index: HashTable<u32>,
    bots: Vec<Bot>,
    bot_numbers: HashMap<BotId, u16>,
    /// The bot whose expired claims are removed next.
    next_bot: u16,
    /// Until then (seconds), claims of the window may be missing.
    incomplete_until_s: u32,
}

/// The claims of one bot.
#[derive(Debug)]
struct Bot {
    /// Those of accepted orders, and all others.
    lists: [List; 2],
    count: usize,
}

/// Claims from the oldest to the newest.
#[derive(Clone, Copy, Debug)]
struct List {
    first: u32,
    last: u32,
}

impl List {
    const EMPTY: Self = Self {
        first: NONE,
        last: NONE,
    };
}

/// A claim in the table.
#[derive(Debug)]
struct Entry {
    key: ClaimKey,
    body: u64,
    at_s: u32,
    previous: u32,
    next: u32,
    bot: u16,
    endpoint: u16,
    state: OrderState,
    order_id_len: u8,
    order_id: [u8; ORDER_ID_BYTES],
}

impl Guard {
    pub(super) fn new(limits: GuardLimits) -> Self {
        Self {
            limits,
            entries: Vec::new(),
            free: NONE,
            index: HashTable::new(),
            bots: Vec::new(),
            bot_numbers: HashMap::new(),
            next_bot: 0,
            incomplete_until_s: 0,
        }
    }

    /// Whether every claim of the window is in the table, except those that were freed.
    pub(super) fn is_complete(&self, now_s: u32) -> bool {
        now_s > self.incomplete_until_s
    }

    /// For how long back, in seconds, no claim can be missing except those that were freed; at most the window.
    pub(super) fn held_s(&self, now_s: u32) -> u32 {
        let incomplete_s = self.incomplete_until_s.saturating_sub(now_s);
        self.limits.window_s.saturating_sub(incomplete_s)
    }

    /// Notes that claims which were made until `at_s` may be missing.
    pub(super) fn miss(&mut self, at_s: u32) {
        let until_s = at_s.saturating_add(self.limits.window_s);
        self.incomplete_until_s = self.incomplete_until_s.max(until_s);
    }

    /// Sets the limits of new claims; existing ones stay.
    pub(super) fn set_limits(&mut self, limits: GuardLimits) {
        self.limits = limits;
    }

    pub(super) fn limits(&self) -> GuardLimits {
        self.limits
    }

    /// How many claims there are.
    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// The largest part of its share that a bot has used.
    pub(super) fn largest_share(&self) -> f64 {
        let largest = self.bots.iter().map(|bot| bot.count).max().unwrap_or(0);
        #[expect(clippy::cast_precision_loss, reason = "a ratio for an alarm")]
        let share = largest as f64 / self.limits.claims_per_bot.max(1) as f64;
        share
    }

    /// The claim with this key.
    pub(super) fn find(&self, key: ClaimKey, now_s: u32) -> Option<Claim> {
        let entry = self.entry(self.number_of(key)?)?;
        let is_expired = now_s.saturating_sub(entry.at_s) > self.limits.window_s;
        (!is_expired).then(|| entry.claim())
    }

    /// Claims all of these orders of one request, or none. For each order there are one or two keys, of which the first is
    /// claimed.
    pub(super) fn claim(
        &mut self,
        bot: &BotId,
        orders: &[Vec<ClaimKey>],
        by: ClaimedBy,
        now_s: u32,
    ) -> Result<(), NotClaimed> {
        for (position, keys) in orders.iter().enumerate() {
            let found = keys.iter().find_map(|key| self.find(*key, now_s));
            if let Some(claim) = found {
                return Err(NotClaimed::Claimed(position, claim));
            }
        }
        let bot = self.number_of_bot(bot);
        self.expire(bot, now_s);
        self.expire(self.next_bot, now_s);
        let bots = u16::try_from(self.bots.len()).unwrap_or(u16::MAX);
        self.next_bot = (self.next_bot + 1) % bots.max(1);
        if !self.make_room(bot, orders.len(), now_s) {
            return Err(NotClaimed::Full);
        }
        for key in orders.iter().filter_map(|keys| keys.first()) {
            self.insert(*key, bot, by, OrderState::InFlight, now_s);
        }
        Ok(())
    }

    /// Adds a claim that an earlier run made. Older accepted claims are evicted for it, but it is added in any case.
    pub(super) fn restore(
        &mut self,
        bot: &BotId,
        key: ClaimKey,
        by: ClaimedBy,
        state: OrderState,
        at_s: u32,
    ) {
        let bot = self.number_of_bot(bot);
        let _ = self.make_room(bot, 1, at_s);
        self.insert(key, bot, by, state, at_s);
    }

    /// Sets what is known about an order, and its order id if that is known.
    pub(super) fn set(&mut self, key: ClaimKey, state: OrderState, order_id: Option<&str>) {
        let Some(number) = self.number_of(key) else {
            return;
        };
        self.unlink(number);
        if let Some(entry) = self.entry_mut(number) {
            entry.state = state;
        }
        self.link(number);
        let Some(entry) = self.entry_mut(number) else {
            return;
        };
        if let Some(id) = order_id.map(str::as_bytes)
            && let Some(place) = entry.order_id.get_mut(..id.len())
            && let Ok(len) = u8::try_from(id.len())
        {
            place.copy_from_slice(id);
            entry.order_id_len = len;
        }
    }

    /// Records what became of an order. `at_s`: when it was claimed, since another one may have the clientOid by now.
    pub(super) fn settle(&mut self, key: ClaimKey, at_s: u32, settled: Settled) {
        let entry = self.number_of(key).and_then(|number| self.entry(number));
        if entry.is_none_or(|entry| entry.at_s != at_s) {
            return;
        }
        match settled {
            Settled::Accepted(id) => self.set(key, OrderState::Accepted, id.as_deref()),
            Settled::MaybeSent => self.set(key, OrderState::MaybeSent, None),
            Settled::NotPlaced => self.free(key),
            Settled::Unknown => self.set(key, OrderState::Unknown, None),
        }
    }

    /// Frees a clientOid: its order was not placed.
    pub(super) fn free(&mut self, key: ClaimKey) {
        if let Some(number) = self.number_of(key) {
            self.remove(number);
        }
    }

    fn insert(&mut self, key: ClaimKey, bot: u16, by: ClaimedBy, state: OrderState, at_s: u32) {
        self.free(key);
        let entry = Entry {
            key,
            body: by.body,
            at_s,
            previous: NONE,
            next: NONE,
            bot,
            endpoint: by.endpoint,
            state,
            order_id_len: 0,
            order_id: [0; ORDER_ID_BYTES],
        };
        let number = if let Some(place) = self.entries.get_mut(self.free as usize) {
            let number = self.free;
            self.free = std::mem::replace(place, entry).next;
            number
        } else {
            let number = u32::try_from(self.entries.len()).unwrap_or(NONE);
            self.entries.push(entry);
            number
        };
        self.link(number);
        let entries = &self.entries;
        let hash = |number: &u32| {
            entries
                .get(*number as usize)
                .map_or(0, |entry| entry.key[0])
        };
        self.index.insert_unique(key[0], number, hash);
        if let Some(bot) = self.bots.get_mut(usize::from(bot)) {
            bot.count += 1;
        }
    }

    fn remove(&mut self, number: u32) {
        let Some(entry) = self.entry(number) else {
            return;
        };
        let (key, bot) = (entry.key, entry.bot);
        self.unlink(number);
        if let Ok(found) = self.index.find_entry(key[0], |other| *other == number) {
            found.remove();
        }
        if let Some(bot) = self.bots.get_mut(usize::from(bot)) {
            bot.count -= 1;
        }
        let free = std::mem::replace(&mut self.free, number);
        if let Some(entry) = self.entry_mut(number) {
            entry.next = free;
        }
    }

    /// Adds an entry to the end of its list.
    fn link(&mut self, number: u32) {
        let Some((bot, which)) = self.entry(number).map(Entry::list) else {
            return;
        };
        let Some(list) = self.list_mut(bot, which) else {
            return;
        };
        let previous = std::mem::replace(&mut list.last, number);
        if list.first == NONE {
            list.first = number;
        }
        if let Some(entry) = self.entry_mut(number) {
            (entry.previous, entry.next) = (previous, NONE);
        }
        if let Some(previous) = self.entry_mut(previous) {
            previous.next = number;
        }
    }

    /// Removes an entry from its list.
    fn unlink(&mut self, number: u32) {
        let Some(entry) = self.entry(number) else {
            return;
        };
        let ((bot, which), previous, next) = (entry.list(), entry.previous, entry.next);
        if let Some(previous) = self.entry_mut(previous) {
            previous.next = next;
        }
        if let Some(next) = self.entry_mut(next) {
            next.previous = previous;
        }
        if let Some(list) = self.list_mut(bot, which) {
            if list.first == number {
                list.first = next;
            }
            if list.last == number {
                list.last = previous;
            }
        }
    }

    /// Removes claims of a bot that are older than the window.
    fn expire(&mut self, bot: u16, now_s: u32) {
        let window_s = self.limits.window_s;
        for which in [ACCEPTED, OTHERS] {
            for _ in 0..EXPIRE_AT_ONCE {
                let first = self.first(bot, which);
                let is_expired = |entry: &Entry| now_s.saturating_sub(entry.at_s) > window_s;
                if !self.entry(first).is_some_and(is_expired) {
                    break;
                }
                self.remove(first);
            }
        }
    }

    /// Evicts the oldest accepted claims until there is room for `count` more of this bot: its own if it has used up its
    /// share, otherwise those of the bot with the most claims.
    fn make_room(&mut self, bot: u16, count: usize, now_s: u32) -> bool {
        loop {
            let of_bot = self.bot(bot).map_or(0, |bot| bot.count);
            let from = if of_bot + count > self.limits.claims_per_bot {
                bot
            } else if self.len() + count > self.limits.claims {
                let most = (0..).zip(&self.bots).max_by_key(|(_, bot)| bot.count);
                most.map_or(bot, |(number, _)| number)
            } else {
                return true;
            };
            let first = self.first(from, ACCEPTED);
            let Some(at_s) = self.entry(first).map(|entry| entry.at_s) else {
                return false;
            };
            if now_s.saturating_sub(at_s) <= EVICTABLE_AFTER_S {
                return false;
            }
            self.miss(at_s);
            self.remove(first);
        }
    }

    fn first(&self, bot: u16, which: usize) -> u32 {
        let lists = self.bot(bot).map(|bot| &bot.lists);
        let list = lists.and_then(|lists| lists.get(which));
        list.map_or(NONE, |list| list.first)
    }

    fn list_mut(&mut self, bot: u16, which: usize) -> Option<&mut List> {
        let bot = self.bots.get_mut(usize::from(bot))?;
        bot.lists.get_mut(which)
    }

    fn number_of(&self, key: ClaimKey) -> Option<u32> {
        let is_same = |number: &u32| self.entry(*number).is_some_and(|entry| entry.key == key);
        self.index.find(key[0], is_same).copied()
    }

    fn number_of_bot(&mut self, bot: &BotId) -> u16 {
        if let Some(number) = self.bot_numbers.get(bot) {
            return *number;
        }
        let number = u16::try_from(self.bots.len()).unwrap_or(u16::MAX);
        if number < u16::MAX {
            self.bots.push(Bot {
                lists: [List::EMPTY; 2],
                count: 0,
            });
            self.bot_numbers.insert(bot.clone(), number);
        }
        number
    }

    fn bot(&self, number: u16) -> Option<&Bot> {
        self.bots.get(usize::from(number))
    }

    fn entry(&self, number: u32) -> Option<&Entry> {
        self.entries.get(number as usize)
    }

    fn entry_mut(&mut self, number: u32) -> Option<&mut Entry> {
        self.entries.get_mut(number as usize)
    }
}

impl Entry {
    /// Its bot, and which of the bot's lists it is in.
    fn list(&self) -> (u16, usize) {
        let is_accepted = self.state == OrderState::Accepted;
        (self.bot, if is_accepted { ACCEPTED } else { OTHERS })
    }

    fn claim(&self) -> Claim {
        let order_id = self.order_id.get(..usize::from(self.order_id_len));
        let order_id = order_id.and_then(|id| str::from_utf8(id).ok());
        Claim {
            state: self.state,
            order_id: order_id.filter(|id| !id.is_empty()).map(str::to_owned),
            body: self.body,
            endpoint: self.endpoint,
            at_s: self.at_s,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW_S: u32 = 24 * 3600;

    fn guard(claims: usize, claims_per_bot: usize) -> Guard {
        Guard::new(GuardLimits {
            window_s: WINDOW_S,
            claims,
            claims_per_bot,
        })
    }

    fn bot(name: &str) -> BotId {
        name.parse().unwrap()
    }

    fn key(order: u64) -> ClaimKey {
        // The same first word for several orders: the index compares whole keys.
        [order / 3, order]
    }

    fn by(body: u64) -> ClaimedBy {
        ClaimedBy { body, endpoint: 7 }
    }

    fn claim(guard: &mut Guard, name: &str, order: u64, at_s: u32) -> Result<(), NotClaimed> {
        guard.claim(&bot(name), &[vec![key(order)]], by(order), at_s)
    }

    fn claimed(guard: &Guard, orders: std::ops::Range<u64>, now_s: u32) -> Vec<u64> {
        let is_claimed = |order: &u64| guard.find(key(*order), now_s).is_some();
        orders.filter(is_claimed).collect()
    }

    /// The orders of a bot: those of each list, from the oldest to the newest. Checks the links in both directions.
    fn listed(guard: &Guard, bot: u16) -> [Vec<u64>; 2] {
        let orders = [ACCEPTED, OTHERS].map(|which| {
            let (mut orders, mut number, mut previous) =
                (Vec::new(), guard.first(bot, which), NONE);
            while let Some(entry) = guard.entry(number) {
                assert_eq!((entry.previous, entry.list()), (previous, (bot, which)));
                orders.push(entry.key[1]);
                (previous, number) = (number, entry.next);
            }
            orders
        });
        let count = orders.iter().map(Vec::len).sum();
        assert_eq!(guard.bot(bot).map(|bot| bot.count), Some(count));
        orders
    }

    #[test]
    fn result_of_a_call_does_not_change_a_later_claim_on_its_client_oid() {
        let mut guard = guard(100, 100);
        claim(&mut guard, "a", 1, 1000).unwrap();
        guard.settle(key(1), 1000, Settled::NotPlaced);
        claim(&mut guard, "a", 1, 2000).unwrap();
        guard.settle(key(1), 1000, Settled::NotPlaced);
        let state = |guard: &Guard| guard.find(key(1), 2000).unwrap().state;
        assert_eq!(state(&guard), OrderState::InFlight);
        assert_eq!(guard.held_s(2000), WINDOW_S);
        guard.miss(1900);
        assert_eq!(guard.held_s(2000), 100);
        guard.settle(key(1), 2000, Settled::Unknown);
        assert_eq!(state(&guard), OrderState::Unknown);
    }

    #[test]
    fn only_accepted_claims_older_than_15_min_are_evicted_oldest_first() {
        let mut guard = guard(100, 6);
        for order in 0..6 {
            claim(&mut guard, "a", order, 1000).unwrap();
        }
        for (order, state) in [
            (1, OrderState::MaybeSent),
            (2, OrderState::Accepted),
            (4, OrderState::Accepted),
        ] {
            guard.set(key(order), state, None);
        }
        let young = 1000 + EVICTABLE_AFTER_S;
        assert_eq!(claim(&mut guard, "a", 6, young), Err(NotClaimed::Full));
        assert!(guard.is_complete(young));
        claim(&mut guard, "a", 6, young + 1).unwrap();
        assert_eq!(listed(&guard, 0), [vec![4], vec![0, 3, 5, 1, 6]]);
        guard.set(key(6), OrderState::Accepted, None);
        claim(&mut guard, "a", 7, young + 1).unwrap();
        // Of the rest, two are in flight, one may exist, and one is young.
        assert_eq!(claim(&mut guard, "a", 8, young + 1), Err(NotClaimed::Full));
        assert_eq!(listed(&guard, 0), [vec![6], vec![0, 3, 5, 1, 7]]);
        // What was evicted could have been found until the end of its window.
        assert!(!guard.is_complete(1000 + WINDOW_S));
        assert!(guard.is_complete(1001 + WINDOW_S));
    }

    #[test]
    fn claims_expire_with_the_window_and_their_slots_are_reused() {
        let mut guard = guard(100, 3);
        for order in 0..3 {
            claim(&mut guard, "a", order, 1000).unwrap();
        }
        let end = 1000 + WINDOW_S;
        assert_eq!(claimed(&guard, 0..3, end), [0, 1, 2]);
        assert!(matches!(
            claim(&mut guard, "a", 1, end),
            Err(NotClaimed::Claimed(0, _))
        ));
        assert_eq!(claim(&mut guard, "a", 3, end), Err(NotClaimed::Full));
        assert_eq!(claimed(&guard, 0..3, end + 1), [0; 0]);
        claim(&mut guard, "a", 1, end + 1).unwrap();
        assert_eq!(listed(&guard, 0), [vec![], vec![1]]);
        for order in 10..12 {
            claim(&mut guard, "a", order, end + 1).unwrap();
        }
        // An expired claim says nothing, so the table is complete without it.
        assert!(guard.is_complete(end + 1));
        assert_eq!((guard.len(), guard.entries.len()), (3, 3));
        guard.free(key(10));
        assert_eq!(listed(&guard, 0), [vec![], vec![1, 11]]);
        claim(&mut guard, "b", 12, end + 1).unwrap();
        assert_eq!((guard.len(), guard.entries.len()), (3, 3));
    }

    #[test]
    fn batch_is_claimed_whole_or_not_at_all() {
        let mut guard = guard(100, 4);
        claim(&mut guard, "a", 2, 1000).unwrap();
        let batch = |orders: &[u64]| -> Vec<_> { orders.iter().map(|o| vec![key(*o)]).collect() };
        let refused = guard.claim(&bot("a"), &batch(&[1, 2, 3]), by(0), 1000);
        assert!(matches!(refused, Err(NotClaimed::Claimed(1, _))));
        let full = guard.claim(&bot("a"), &batch(&[3, 4, 5, 6]), by(0), 1000);
        assert_eq!(full, Err(NotClaimed::Full));
        assert_eq!(claimed(&guard, 0..10, 1000), [2]);
        guard
            .claim(&bot("a"), &batch(&[3, 4, 5]), by(0), 1000)
            .unwrap();
        assert_eq!(listed(&guard, 0), [vec![], vec![2, 3, 4, 5]]);
        // By either of its keys; only the first one is claimed.
        let both = [vec![key(9), key(4)]];
        let found = guard.claim(&bot("b"), &both, by(0), 1000);
        assert!(matches!(found, Err(NotClaimed::Claimed(0, _))));
        assert_eq!(guard.len(), 4);
    }

    #[test]
    fn one_bot_uses_up_its_own_share_only() {
        let mut guard = guard(10, 4);
        for order in 0..4 {
            claim(&mut guard, "a", order, 1000).unwrap();
        }
        assert_eq!(claim(&mut guard, "a", 4, 1000), Err(NotClaimed::Full));
        for (name, first) in [("b", 10), ("c", 20)] {
            for order in first..first + 3 {
                claim(&mut guard, name, order, 1000).unwrap();
            }
        }
        assert!((guard.largest_share() - 1.0).abs() < f64::EPSILON);
        // The limit of all bots.
        assert_eq!(claim(&mut guard, "b", 13, 1000), Err(NotClaimed::Full));
        for order in [11, 21] {
            guard.free(key(order));
        }
        claim(&mut guard, "b", 13, 1000).unwrap();
        assert_eq!(listed(&guard, 0), [vec![], vec![0, 1, 2, 3]]);
        assert_eq!(listed(&guard, 1), [vec![], vec![10, 12, 13]]);
        assert_eq!(listed(&guard, 2), [vec![], vec![20, 22]]);
        // Lower limits refuse new claims, and keep the old ones.
        let limits = guard.limits();
        guard.set_limits(GuardLimits {
            claims_per_bot: 1,
            ..limits
        });
        assert_eq!(claim(&mut guard, "c", 30, 1000), Err(NotClaimed::Full));
        assert_eq!(guard.len(), 9);
    }

    #[test]
    fn many_bots_claim_free_and_expire_at_random() {
        let mut guard = guard(1000, 100);
        let mut expected: Vec<(u64, usize, u32)> = Vec::new();
        let mut random = fastrand::Rng::with_seed(13);
        for step in 0..20_000_u32 {
            let now_s = step * 20;
            let (order, name) = (random.u64(0..5000), random.usize(0..20));
            let position = expected.iter().position(|(other, ..)| *other == order);
            match position {
                Some(position) if random.bool() => {
                    guard.free(key(order));
                    expected.remove(position);
                }
                _ => {
                    let result = claim(&mut guard, &format!("bot-{name}"), order, now_s);
                    let age = |position: usize| now_s - expected[position].2;
                    match position {
                        Some(position) if age(position) <= WINDOW_S => {
                            assert!(matches!(result, Err(NotClaimed::Claimed(..))));
                        }
                        _ if result.is_ok() => {
                            position.map(|position| expected.remove(position));
                            expected.push((order, name, now_s));
                        }
                        _ => {}
                    }
                }
            }
            if step % 500 == 0 {
                let live = expected.iter().filter(|(.., at)| now_s - at <= WINDOW_S);
                let mut live: Vec<_> = live.map(|(order, ..)| *order).collect();
                live.sort_unstable();
                assert_eq!(claimed(&guard, 0..5000, now_s), live);
                let bots = 0..u16::try_from(guard.bots.len()).unwrap();
                let sum: usize = bots.map(|bot| listed(&guard, bot).concat().len()).sum();
                assert_eq!(sum, guard.len());
            }
        }
        assert!(guard.entries.len() <= 1000, "{}", guard.entries.len());
    }

    #[test]
    fn claim_has_state_order_id_and_endpoint() {
        let mut guard = guard(10, 10);
        claim(&mut guard, "a", 1, 1000).unwrap();
        let id = "6710d8336afcdb0007319c27";
        guard.set(key(1), OrderState::Accepted, Some(id));
        // Longer than any order id of KuCoin: not kept.
        guard.set(key(1), OrderState::Accepted, Some(&"x".repeat(31)));
        let expected = Claim {
            state: OrderState::Accepted,
            order_id: Some(id.to_owned()),
            body: 1,
            endpoint: 7,
            at_s: 1000,
        };
        assert_eq!(guard.find(key(1), 1000), Some(expected));
    }
}
