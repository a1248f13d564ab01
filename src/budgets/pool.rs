//! The budget of one pool of one account: what may be sent in the current window, and by whom. No I/O, and no clock.
//!
//! The exchange counts in windows; the first request after the end of one begins the next. The broker counts what it has sent,
//! and learns from the headers of each answer how much others have used, and when the window ends.

use std::collections::HashMap;
use std::time::Duration;

use crate::base::ids::BotId;
use crate::kucoin::answer::RateLimit;
use crate::kucoin::quota::WINDOW;

/// The part of a quota that only cancels use, in percent. It is also the room for what others send at the same time.
const RESERVE_PERCENT: u64 = 3;

/// The largest quota that counts. More than any account has, and small enough to be multiplied.
const MAX_QUOTA: u64 = 1_000_000_000_000;

/// How long after it was sent a first request can begin a window at the exchange, while no answer has come.
const LATEST_BEGIN: Duration = Duration::from_secs(10);

/// How far the ends of a window that two answers show can differ: the exchange rounds them, and its servers have clocks of their
/// own.
const INEXACT: Duration = Duration::from_millis(500);

/// With an empty pool, one cancel leaves in this time.
pub(super) const CANCEL_EVERY: Duration = Duration::from_secs(1);

/// When to ask again if other bots have a right to what is left: it grows while they do not use it.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// The order in which waiting requests are sent.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Priority {
    /// It cancels orders.
    Cancel,
    /// A request of the broker itself, such as a lookup of an order that may have been placed, or of an admin.
    Internal,
    /// It reads open orders.
    OpenOrders,
    /// It is risk-increasing.
    RiskIncreasing,
    /// Any other request.
    Other,
}

/// A request that asks for its weight.
#[derive(Clone, Debug)]
pub(super) struct Demand {
    /// The bot, and its weight among the bots of the account; `None` for admins and the broker itself.
    pub(super) bot: Option<(BotId, u32)>,
    pub(super) priority: Priority,
    pub(super) weight: u32,
    /// The requests that the bot may send per second, if they are limited.
    pub(super) requests_per_s: Option<u32>,
}

impl Demand {
    pub(super) fn bot_id(&self) -> Option<&BotId> {
        self.bot.as_ref().map(|(bot, _)| bot)
    }
}

/// The weight that a request has taken.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Ticket {
    window: u64,
    /// The weight that counts; zero once it is given back.
    counted: u64,
    /// The weight that has no answer yet.
    unanswered: u64,
    /// What the broker had sent in the window, with this request.
    sent: u64,
    /// What of that had no answer yet, without this request: the exchange may count it later than this request.
    may_come_later: u64,
}

/// A snapshot for metrics and admins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Level {
    /// Weight per window.
    pub(crate) quota: u64,
    /// Weight that the broker has sent in the window.
    pub(crate) sent: u64,
    /// Weight that is left, also for cancels.
    pub(crate) left: u64,
    /// Time until the window ends; zero if there is none.
    pub(crate) reset: Duration,
}

/// The budget. Times are since boot.
#[derive(Debug)]
pub(super) struct PoolBudget {
    quota: u64,
    /// The quota by the rules; headers show the real one.
    configured: u64,
    window: Option<Window>,
    /// How many windows there have been.
    windows: u64,
    bots: HashMap<BotId, Usage>,
    /// When a cancel may leave although the pool is empty.
    next_cancel: Duration,
    /// The exchange rejects requests until then, whatever its window.
    blocked_until: Duration,
}

#[derive(Debug)]
struct Window {
    /// The latest time at which it ends.
    ends: Duration,
    /// Whether an answer has shown when it began.
    is_dated: bool,
    /// The longest time until its end that an answer has shown: some pools have shorter windows.
    length: Duration,
    /// Weight sent by the broker.
    sent: u64,
    /// Of that, weight that has no answer yet.
    unanswered: u64,
    /// What the exchange has counted beyond `sent`: the weight used by others of the same account. Below zero if requests weigh
    /// less than assumed.
    foreign: i64,
    /// [`Ticket::sent`] of the newest request whose answer has shown it.
    newest: u64,
    /// The exchange rejects requests until the window ends.
    is_used_up: bool,
}

/// The requests of a bot.
#[derive(Debug, Default)]
struct Usage {
    share: u32,
    /// Weight sent in the window.
    sent: u64,
    /// Weight asked for in the window, and in the previous one.
    asked: u64,
    asked_before: u64,
}

/// How a quota is divided: by weight, among the bots that want more than their share.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Shares {
    quota: u64,
    total: u64,
}

impl Shares {
    /// What a bot can count on: its share, but not more than it wants.
    fn of(self, usage: Option<&Usage>) -> u64 {
        usage.map_or(0, |usage| self.of_weight(usage.share).min(usage.wants()))
    }

    fn of_weight(self, weight: u32) -> u64 {
        self.quota * u64::from(weight) / self.total.max(1)
    }
}

impl Usage {
    /// The weight that the bot is expected to use in the window. Unlimited in the first window that it uses.
    fn wants(&self) -> u64 {
        match self.asked_before {
            0 => u64::MAX,
            before => self.asked.max(before.saturating_mul(5) / 4),
        }
    }
}

impl PoolBudget {
    pub(super) fn new(quota: u64) -> Self {
        Self {
            quota,
            configured: quota,
            window: None,
            windows: 0,
            bots: HashMap::new(),
            next_cancel: Duration::ZERO,
            blocked_until: Duration::ZERO,
        }
    }

    /// Records that a bot asks for weight. Bots that ask have a share; cancels are not part of it.
    pub(super) fn ask(&mut self, demand: &Demand, now: Duration) {
        self.end_window(now);
        if let Some((bot, share)) = &demand.bot
            && demand.priority != Priority::Cancel
        {
            let usage = self.bots.entry(bot.clone()).or_default();
            usage.share = *share;
            usage.asked += u64::from(demand.weight);
        }
    }

    /// Takes the weight of a request.
    ///
    /// # Errors
    /// The time at which it may fit, if it does not now.
    pub(super) fn take(&mut self, demand: &Demand, now: Duration) -> Result<Ticket, Duration> {
        self.end_window(now);
        if let Err(until) = self.check(demand, now) {
            if demand.priority != Priority::Cancel {
                return Err(until);
            }
            if now < self.next_cancel {
                return Err(self.next_cancel.min(until));
            }
            self.next_cancel = now + CANCEL_EVERY;
        }
        Ok(self.charge(demand, now))
    }

    /// Whether a request fits.
    ///
    /// # Errors
    /// The time at which it may fit, if it does not now.
    pub(super) fn check(&self, demand: &Demand, now: Duration) -> Result<(), Duration> {
        let weight = u64::from(demand.weight);
        let is_cancel = demand.priority == Priority::Cancel;
        let window = self.window.as_ref().filter(|window| now < window.ends);
        let (mut left, mut full_until) = (u64::MAX, None);
        if let Some(window) = window {
            left = self.left(window);
            if !is_cancel {
                left = left.saturating_sub(self.reserve());
            }
            full_until = (window.is_used_up || left < weight).then_some(window.ends);
        }
        if now < self.blocked_until {
            full_until = full_until.max(Some(self.blocked_until));
        }
        if let Some(until) = full_until {
            return Err(until);
        }
        match window {
            Some(window) if !is_cancel && !self.is_fair(demand, left, window, now) => {
                Err(window.ends.min(now + ASK_AGAIN_AFTER))
            }
            _ => Ok(()),
        }
    }

    /// Takes the weight of a request that is sent in any case.
    pub(super) fn charge(&mut self, demand: &Demand, now: Duration) -> Ticket {
        self.end_window(now);
        let weight = u64::from(demand.weight);
        if self.window.is_none() {
            self.windows += 1;
        }
        let window = self.window.get_or_insert(Window {
            ends: now + LATEST_BEGIN + WINDOW,
            is_dated: false,
            length: WINDOW,
            sent: 0,
            unanswered: 0,
            foreign: 0,
            newest: 0,
            is_used_up: false,
        });
        let may_come_later = window.unanswered;
        window.sent += weight;
        window.unanswered += weight;
        let sent = window.sent;
        if let Some(usage) = self.usage(demand) {
            usage.sent += weight;
        }
        Ticket {
            window: self.windows,
            counted: weight,
            unanswered: weight,
            sent,
            may_come_later,
        }
    }

    /// Gives the weight of a request back that the exchange has not counted; once.
    pub(super) fn refund(&mut self, ticket: &mut Ticket, demand: &Demand) {
        let weight = std::mem::take(&mut ticket.counted);
        let unanswered = std::mem::take(&mut ticket.unanswered);
        if ticket.window != self.windows {
            return;
        }
        if let Some(window) = &mut self.window {
            window.sent = window.sent.saturating_sub(weight);
            window.unanswered = window.unanswered.saturating_sub(unanswered);
            window.newest = window.newest.min(window.sent);
        }
        // Nothing has begun a window at the exchange.
        self.window
            .take_if(|window| window.sent == 0 && !window.is_dated);
        if let Some(usage) = self.usage(demand) {
            usage.sent = usage.sent.saturating_sub(weight);
        }
    }

    /// What counts against the share of a bot.
    fn usage(&mut self, demand: &Demand) -> Option<&mut Usage> {
        let (bot, _) = demand.bot.as_ref()?;
        let has_share = demand.priority != Priority::Cancel;
        self.bots.get_mut(bot).filter(|_| has_share)
    }

    /// Applies an answer that came at `now` to a request that was sent at `sent_at`; `limit` is what its headers say.
    pub(super) fn answered(
        &mut self,
        ticket: &mut Ticket,
        limit: Option<RateLimit>,
        sent_at: Duration,
        now: Duration,
    ) {
        let unanswered = std::mem::take(&mut ticket.unanswered);
        let is_current = ticket.window == self.windows;
        let Some(window) = self.window.as_mut().filter(|window| now < window.ends) else {
            return;
        };
        if is_current {
            window.unanswered = window.unanswered.saturating_sub(unanswered);
        }
        // A limit of zero would stop the account for ever.
        let Some(limit) = limit.filter(|limit| limit.limit > 0) else {
            if is_current && !window.is_dated {
                window.ends = window.ends.min(now + WINDOW);
            }
            return;
        };
        self.quota = limit.limit.min(MAX_QUOTA);
        let used = limit.limit.saturating_sub(limit.remaining).min(MAX_QUOTA);
        let reset = limit.reset.min(WINDOW);
        let (earliest, latest) = (sent_at + reset, now + reset);
        if window.is_dated && earliest > window.ends + INEXACT {
            // The window ended before the broker expected it.
            window.ends = now;
            self.end_window(now);
            self.windows += 1;
            self.window = Some(Window {
                ends: latest,
                is_dated: true,
                length: reset,
                sent: used,
                unanswered: 0,
                foreign: 0,
                newest: 0,
                is_used_up: false,
            });
            return;
        }
        if !is_current {
            return;
        }
        if window.is_dated {
            window.ends = window.ends.min(latest);
            window.length = window.length.max(reset);
        } else {
            window.ends = latest;
            window.length = reset;
        }
        window.is_dated = true;
        if ticket.sent >= window.newest {
            window.newest = ticket.sent;
            let least = signed(used) - signed(ticket.sent);
            let most = least + signed(ticket.may_come_later);
            window.foreign = window.foreign.clamp(least, most);
        }
    }

    /// Sends nothing but cancels until the window ends: the exchange has rejected a request because the pool is empty.
    pub(super) fn use_up(&mut self, ticket: &Ticket, reset: Duration, now: Duration) {
        self.end_window(now);
        let is_current = ticket.window == self.windows;
        let Some(window) = self.window.as_mut().filter(|_| is_current) else {
            return;
        };
        window.is_used_up = true;
        window.is_dated = true;
        window.ends = now + reset.min(WINDOW);
        self.next_cancel = self.next_cancel.max(now + CANCEL_EVERY);
    }

    /// Sends nothing but cancels for this long, which has nothing to do with the window.
    pub(super) fn block(&mut self, time: Duration, now: Duration) {
        self.blocked_until = self.blocked_until.max(now + time.min(WINDOW));
        self.next_cancel = self.next_cancel.max(now + CANCEL_EVERY);
    }

    /// Uses another quota, if the rules have changed it.
    pub(super) fn set_quota(&mut self, quota: u64) {
        if self.configured != quota {
            self.configured = quota;
            self.quota = quota;
        }
    }

    pub(super) fn level(&self, now: Duration) -> Level {
        let window = self.window.as_ref().filter(|window| now < window.ends);
        let left = match window {
            None => self.quota,
            Some(window) if window.is_used_up => 0,
            Some(window) => self.left(window),
        };
        let left = if now < self.blocked_until { 0 } else { left };
        Level {
            quota: self.quota,
            sent: window.map_or(0, |window| window.sent),
            left,
            reset: window.map_or(Duration::ZERO, |window| window.ends.saturating_sub(now)),
        }
    }

    /// Whether nothing is known that a new budget would not have.
    pub(super) fn is_idle(&self, now: Duration) -> bool {
        let ended = |window: &Window| now >= window.ends + WINDOW;
        self.window.as_ref().is_none_or(ended)
    }

    fn reserve(&self) -> u64 {
        self.quota * RESERVE_PERCENT / 100
    }

    fn left(&self, window: &Window) -> u64 {
        let used = window.sent.saturating_add_signed(window.foreign);
        self.quota.saturating_sub(used)
    }

    /// Whether a bot may take its weight: it is within its share, or leaves enough for those of the others. The rest of a share that
    /// its bot does not use late in the window is lost, so what is kept for it shrinks with the time.
    fn is_fair(&self, demand: &Demand, left: u64, window: &Window, now: Duration) -> bool {
        let Some((bot, _)) = &demand.bot else {
            return true;
        };
        if self.bots.len() < 2 {
            return true;
        }
        let weight = u64::from(demand.weight);
        let quota = self.quota.saturating_sub(self.reserve());
        let quota = signed(quota).saturating_sub(window.foreign);
        let quota = u64::try_from(quota).unwrap_or(0);
        let shares = self.shares(bot, quota);
        let own = self.bots.get(bot).map_or(0, |usage| usage.sent);
        if own + weight <= shares.of(self.bots.get(bot)) {
            return true;
        }
        let left_time = window.ends.saturating_sub(now).min(window.length);
        let left_ms = u64::try_from(left_time.as_millis()).unwrap_or(0);
        let window_ms = u64::try_from(window.length.as_millis()).unwrap_or(1).max(1);
        let others = self.bots.iter().filter(|(other, _)| *other != bot);
        let kept = others.map(|(_, usage)| {
            let share = shares.of(Some(usage));
            let unused = share.saturating_sub(usage.sent);
            unused.min(share * left_ms / window_ms)
        });
        left.saturating_sub(weight) >= kept.sum()
    }

    /// Divides `quota` by weight. What bots do not want is divided among those that want more than their share, which `bot` does.
    fn shares(&self, bot: &BotId, quota: u64) -> Shares {
        let total = self.bots.values().map(|usage| u64::from(usage.share)).sum();
        let mut shares = Shares { quota, total };
        // Each round, the others get more. There are few bots, and few rounds.
        loop {
            let (mut quota_left, mut total_left) = (quota, total);
            for (other, usage) in &self.bots {
                let want = usage.wants();
                if other != bot && want < shares.of_weight(usage.share) {
                    quota_left = quota_left.saturating_sub(want);
                    total_left -= u64::from(usage.share);
                }
            }
            let next = Shares {
                quota: quota_left,
                total: total_left,
            };
            // Weights are not rounded, so that this ends.
            if next == shares {
                return shares;
            }
            shares = next;
        }
    }

    /// Ends the window if its time is up.
    fn end_window(&mut self, now: Duration) {
        let Some(window) = self.window.take_if(|window| now >= window.ends) else {
            return;
        };
        let is_recent = now < window.ends + WINDOW;
        self.bots.retain(|_, usage| {
            usage.asked_before = std::mem::take(&mut usage.asked);
            usage.sent = 0;
            is_recent && usage.asked_before > 0
        });
    }
}

fn signed(weight: u64) -> i64 {
    i64::try_from(weight).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn demand(name: &str, share: u32, priority: Priority, weight: u32) -> Demand {
        let bot = format!("spiffe://a/bot/{name}").parse().unwrap();
        Demand {
            bot: Some((bot, share)),
            priority,
            weight,
            requests_per_s: None,
        }
    }

    fn order(name: &str, share: u32) -> Demand {
        demand(name, share, Priority::RiskIncreasing, 2)
    }

    fn cancel() -> Demand {
        demand("a", 1, Priority::Cancel, 1)
    }

    fn try_take(budget: &mut PoolBudget, demand: &Demand, now: Duration) -> Option<Ticket> {
        budget.ask(demand, now);
        budget.take(demand, now).ok()
    }

    /// Takes as often as possible.
    fn exhaust(budget: &mut PoolBudget, demand: &Demand, now: Duration) -> u64 {
        let taken = std::iter::from_fn(|| try_take(budget, demand, now)).count();
        taken as u64 * u64::from(demand.weight)
    }

    fn header(limit: u64, remaining: u64, reset: Duration) -> RateLimit {
        RateLimit {
            limit,
            remaining,
            reset,
        }
    }

    #[test]
    fn bot_alone_uses_all_but_the_reserve_of_cancels() {
        let mut budget = PoolBudget::new(2000);
        assert_eq!(exhaust(&mut budget, &order("a", 1), SECOND), 1940);
        let cancels = (0..60).filter(|_| budget.take(&cancel(), SECOND).is_ok());
        assert_eq!(cancels.count(), 60);
        // Of an empty pool, one cancel leaves per second.
        assert!(budget.take(&cancel(), SECOND).is_ok());
        assert_eq!(budget.take(&cancel(), SECOND), Err(2 * SECOND));
        assert!(budget.take(&cancel(), 2 * SECOND).is_ok());
    }

    #[test]
    fn bots_that_want_more_than_there_is_get_their_shares() {
        let mut budget = PoolBudget::new(2000);
        let bots = [("a", 1), ("b", 2), ("c", 4)];
        let mut taken = HashMap::<_, u64>::new();
        for _ in 0..2000 {
            for (name, share) in bots {
                if try_take(&mut budget, &order(name, share), SECOND).is_some() {
                    *taken.entry(name).or_default() += 2;
                }
            }
        }
        for (name, share) in bots {
            let expected = 1940 * u64::from(share) / 7;
            assert!(taken[name].abs_diff(expected) <= 4, "{name}: {taken:?}");
        }
    }

    #[test]
    fn share_of_a_bot_that_asks_for_little_goes_to_the_others() {
        let mut budget = PoolBudget::new(2000);
        for window in 0..2 {
            let now = window * 40 * SECOND + SECOND;
            assert!(try_take(&mut budget, &order("quiet", 1), now).is_some());
        }
        let taken = exhaust(&mut budget, &order("busy", 1), 41 * SECOND);
        assert!((1900..=1940).contains(&taken), "{taken}");
        assert!(try_take(&mut budget, &order("quiet", 1), 41 * SECOND).is_none());
    }

    #[test]
    fn unused_share_is_divided_by_weight() {
        let mut budget = PoolBudget::new(2000);
        for name in ["quiet", "a", "b"] {
            assert!(try_take(&mut budget, &order(name, 1), SECOND).is_some());
        }
        // All but one want much.
        for (name, share) in [("a", 1), ("b", 3)] {
            for _ in 0..1000 {
                budget.ask(&order(name, share), SECOND);
            }
        }
        let mut taken = HashMap::<_, u64>::new();
        for _ in 0..2000 {
            for (name, share) in [("a", 1), ("b", 3)] {
                if try_take(&mut budget, &order(name, share), 42 * SECOND).is_some() {
                    *taken.entry(name).or_default() += 2;
                }
            }
        }
        let (a, b) = (taken["a"], taken["b"]);
        assert!(a + b >= 1930, "{taken:?}");
        assert!(b.abs_diff(3 * a) < 60, "{taken:?}");
    }

    #[test]
    fn cancels_are_not_part_of_the_share_of_a_bot() {
        let mut budget = PoolBudget::new(2000);
        for _ in 0..500 {
            assert!(try_take(&mut budget, &cancel(), SECOND).is_some());
        }
        assert!(try_take(&mut budget, &order("b", 1), SECOND).is_some());
        let taken = exhaust(&mut budget, &order("a", 1), SECOND);
        assert!((960..=970).contains(&taken), "{taken}");
    }

    #[test]
    fn unused_share_is_free_for_others_late_in_the_window() {
        let mut budget = PoolBudget::new(2000);
        let mut ticket = try_take(&mut budget, &order("new", 1), SECOND).unwrap();
        budget.answered(
            &mut ticket,
            Some(header(2000, 1998, WINDOW)),
            SECOND,
            SECOND,
        );
        let early = exhaust(&mut budget, &order("busy", 1), SECOND);
        assert!((960..=980).contains(&early), "{early}");
        let late = early + exhaust(&mut budget, &order("busy", 1), 30 * SECOND);
        assert!(late > 1900, "{late}");
    }

    #[test]
    fn headers_show_what_others_use_and_when_the_window_ends() {
        let mut budget = PoolBudget::new(2000);
        let mut ticket = try_take(&mut budget, &order("a", 1), SECOND).unwrap();
        budget.answered(
            &mut ticket,
            Some(header(4000, 3000, 7 * SECOND)),
            SECOND,
            2 * SECOND,
        );
        let level = budget.level(2 * SECOND);
        assert_eq!((level.quota, level.sent, level.left), (4000, 2, 3000));
        assert_eq!(level.reset, 7 * SECOND);
        assert_eq!(exhaust(&mut budget, &order("a", 1), 3 * SECOND), 2880);
        assert_eq!(budget.take(&order("a", 1), 3 * SECOND), Err(9 * SECOND));
        assert!(budget.take(&order("a", 1), 9 * SECOND).is_ok());
        assert_eq!(budget.level(9 * SECOND).left, 3998);
    }

    #[test]
    fn rounded_reset_does_not_end_the_window() {
        let mut budget = PoolBudget::new(2000);
        let mut first = try_take(&mut budget, &order("a", 1), SECOND).unwrap();
        let reset = Duration::from_millis(29_997);
        budget.answered(&mut first, Some(header(2000, 1998, reset)), SECOND, SECOND);
        let mut next = try_take(&mut budget, &order("a", 1), SECOND).unwrap();
        budget.answered(&mut next, Some(header(2000, 1996, WINDOW)), SECOND, SECOND);
        assert_eq!(budget.bots.values().next().unwrap().sent, 4);
        assert_eq!(budget.level(SECOND).reset, reset);
    }

    #[test]
    fn window_that_ended_early_is_followed() {
        let mut budget = PoolBudget::new(2000);
        let mut first = try_take(&mut budget, &order("a", 1), SECOND).unwrap();
        budget.answered(&mut first, Some(header(2000, 1998, WINDOW)), SECOND, SECOND);
        let mut next = try_take(&mut budget, &order("a", 1), 5 * SECOND).unwrap();
        budget.answered(
            &mut next,
            Some(header(2000, 1990, WINDOW)),
            5 * SECOND,
            5 * SECOND,
        );
        let level = budget.level(5 * SECOND);
        assert_eq!((level.left, level.reset), (1990, WINDOW));
    }

    #[test]
    fn quota_of_the_headers_holds_until_the_rules_change_it() {
        let mut budget = PoolBudget::new(2000);
        let mut ticket = try_take(&mut budget, &order("a", 1), SECOND).unwrap();
        budget.answered(&mut ticket, Some(header(300, 298, WINDOW)), SECOND, SECOND);
        budget.set_quota(2000);
        assert_eq!(budget.level(SECOND).quota, 300);
        assert_eq!(exhaust(&mut budget, &order("a", 1), 60 * SECOND), 290);
        budget.set_quota(4000);
        assert_eq!(budget.level(60 * SECOND).quota, 4000);
    }

    #[test]
    fn rejection_stops_all_but_one_cancel_per_second_until_the_reset() {
        let mut budget = PoolBudget::new(2000);
        let mut ticket = try_take(&mut budget, &order("a", 1), SECOND).unwrap();
        budget.use_up(&ticket, 10 * SECOND, SECOND);
        budget.refund(&mut ticket, &order("a", 1));
        assert_eq!(budget.take(&order("a", 1), SECOND), Err(11 * SECOND));
        assert_eq!(budget.take(&cancel(), SECOND), Err(2 * SECOND));
        assert!(budget.take(&cancel(), 2 * SECOND).is_ok());
        assert_eq!(budget.level(2 * SECOND).left, 0);
        assert!(budget.take(&order("a", 1), 11 * SECOND).is_ok());
    }

    #[test]
    fn answers_during_a_block_do_not_end_it() {
        let mut budget = PoolBudget::new(2000);
        let mut first = try_take(&mut budget, &order("a", 1), SECOND).unwrap();
        let mut next = try_take(&mut budget, &order("a", 1), SECOND).unwrap();
        budget.answered(&mut first, Some(header(2000, 1998, WINDOW)), SECOND, SECOND);
        budget.block(10 * SECOND, 2 * SECOND);
        budget.answered(
            &mut next,
            Some(header(2000, 1996, 28 * SECOND)),
            SECOND,
            3 * SECOND,
        );
        assert_eq!(budget.take(&order("a", 1), 3 * SECOND), Err(12 * SECOND));
        assert_eq!(budget.level(3 * SECOND).left, 0);
        assert!(budget.take(&cancel(), 3 * SECOND).is_ok());
        assert_eq!(budget.take(&cancel(), 3 * SECOND), Err(4 * SECOND));
        assert!(budget.take(&order("a", 1), 12 * SECOND).is_ok());
        assert_eq!(budget.level(12 * SECOND).sent, 7);
    }

    #[test]
    fn refunds_do_not_hide_what_headers_show() {
        let mut budget = PoolBudget::new(2000);
        let order = order("a", 1);
        let mut unsent = try_take(&mut budget, &order, SECOND).unwrap();
        let mut first = try_take(&mut budget, &order, SECOND).unwrap();
        budget.answered(&mut first, Some(header(2000, 1998, WINDOW)), SECOND, SECOND);
        budget.refund(&mut unsent, &order);
        let mut next = try_take(&mut budget, &order, SECOND).unwrap();
        budget.answered(&mut next, Some(header(2000, 900, WINDOW)), SECOND, SECOND);
        assert_eq!(budget.level(SECOND).left, 900);
    }

    #[test]
    fn window_that_nothing_has_begun_is_forgotten() {
        let mut budget = PoolBudget::new(2000);
        let mut unsent = try_take(&mut budget, &order("a", 1), SECOND).unwrap();
        budget.refund(&mut unsent, &order("a", 1));
        let late = 30 * SECOND;
        let mut first = try_take(&mut budget, &order("a", 1), late).unwrap();
        budget.answered(&mut first, Some(header(2000, 1998, WINDOW)), late, late);
        assert_eq!(budget.level(late).reset, WINDOW);
    }

    #[test]
    fn request_that_was_not_counted_is_given_back() {
        let mut budget = PoolBudget::new(2000);
        let order = order("a", 1);
        let mut ticket = try_take(&mut budget, &order, SECOND).unwrap();
        budget.refund(&mut ticket, &order);
        assert_eq!(exhaust(&mut budget, &order, SECOND), 1940);
    }

    #[test]
    fn headers_correct_requests_that_weigh_less_than_assumed() {
        let mut budget = PoolBudget::new(2000);
        let heavy = demand("a", 1, Priority::Other, 20);
        let mut first = try_take(&mut budget, &heavy, SECOND).unwrap();
        budget.answered(&mut first, Some(header(2000, 1999, WINDOW)), SECOND, SECOND);
        assert_eq!(budget.level(SECOND).left, 1999);
        let mut second = try_take(&mut budget, &heavy, SECOND).unwrap();
        let mut third = try_take(&mut budget, &heavy, SECOND).unwrap();
        assert_eq!(budget.level(SECOND).left, 1959);
        // It came first; the second one may come later, and weigh 20.
        budget.answered(&mut third, Some(header(2000, 1998, WINDOW)), SECOND, SECOND);
        assert_eq!(budget.level(SECOND).left, 1978);
        budget.answered(
            &mut second,
            Some(header(2000, 1997, WINDOW)),
            SECOND,
            SECOND,
        );
        let mut last = try_take(&mut budget, &heavy, SECOND).unwrap();
        budget.answered(&mut last, Some(header(2000, 1996, WINDOW)), SECOND, SECOND);
        assert_eq!(budget.level(SECOND).left, 1996);
    }

    /// A step of the model: who sends, the weight, and the milliseconds since the last step.
    type Step = (u8, u32, u64);

    proptest! {
        /// Against a model of the exchange: windows that begin with their first request, and a limit.
        #[test]
        fn exchange_never_rejects_what_the_budget_allows(
            steps in proptest::collection::vec((0_u8..4, 1_u32..40, 0_u64..600), 1..400),
            quota in 200_u64..3000,
        ) {
            let steps: Vec<Step> = steps;
            let mut budget = PoolBudget::new(quota);
            let (mut now, mut began, mut used) = (SECOND, None::<Duration>, 0);
            for (who, weight, wait_ms) in steps {
                now += Duration::from_millis(wait_ms);
                if began.is_some_and(|began| now >= began + WINDOW) {
                    (began, used) = (None, 0);
                }
                let demand = demand(&who.to_string(), 1 + u32::from(who), Priority::Other, weight);
                let Some(mut ticket) = try_take(&mut budget, &demand, now) else {
                    continue;
                };
                let began = *began.get_or_insert(now);
                used += u64::from(weight);
                prop_assert!(used <= quota, "{used} of {quota}");
                let reset = (began + WINDOW).saturating_sub(now);
                let left = header(quota, quota - used, reset);
                budget.answered(&mut ticket, Some(left), now, now);
            }
        }

        /// The exchange counts and answers requests in any order, and some weigh less than the broker assumes. Once all are
        /// answered, the next answer shows what is left.
        #[test]
        fn order_of_the_answers_does_not_matter(
            steps in proptest::collection::vec((0_u8..3, 1_u32..40, 0_usize..8, 0_u64..50), 1..400),
            quota in 200_u64..3000,
        ) {
            let mut budget = PoolBudget::new(quota);
            let (mut now, mut began, mut used) = (SECOND, None::<Duration>, 0);
            // What is on its way, and what is on its way back.
            let (mut sent, mut counted) = (Vec::new(), Vec::new());
            let count = |used: &mut u64, began: &mut Option<Duration>, weight: u64, now| {
                let began = *began.get_or_insert(now);
                *used += weight;
                header(quota, quota.saturating_sub(*used), (began + WINDOW).saturating_sub(now))
            };
            for (what, weight, which, wait_ms) in steps {
                now += Duration::from_millis(wait_ms);
                match what {
                    0 => {
                        let assumed = demand("a", 1, Priority::Other, weight);
                        if let Some(ticket) = try_take(&mut budget, &assumed, now) {
                            sent.push((ticket, u64::from(weight.div_ceil(2)), now));
                        }
                    }
                    1 if !sent.is_empty() => {
                        let (ticket, weight, sent_at) = sent.swap_remove(which % sent.len());
                        let header = count(&mut used, &mut began, weight, now);
                        prop_assert!(used <= quota, "{used} of {quota}");
                        counted.push((ticket, header, sent_at));
                    }
                    2 if !counted.is_empty() => {
                        let (mut ticket, header, sent_at) = counted.swap_remove(which % counted.len());
                        budget.answered(&mut ticket, Some(header), sent_at, now);
                    }
                    _ => {}
                }
            }
            for (ticket, weight, sent_at) in sent {
                counted.push((ticket, count(&mut used, &mut began, weight, now), sent_at));
            }
            for (mut ticket, header, sent_at) in counted {
                budget.answered(&mut ticket, Some(header), sent_at, now);
            }
            let mut last = budget.charge(&cancel(), now);
            let header = count(&mut used, &mut began, 1, now);
            budget.answered(&mut last, Some(header), now, now);
            prop_assert_eq!(budget.level(now).left, quota.saturating_sub(used));
        }
    }

    #[test]
    fn shares_are_kept_in_short_windows_too() {
        let mut budget = PoolBudget::new(200);
        let (a, b) = (order("a", 1), order("b", 1));
        budget.ask(&b, SECOND);
        let mut first = budget.take(&b, SECOND).unwrap();
        let limit = RateLimit {
            limit: 200,
            remaining: 199,
            reset: 3 * SECOND,
        };
        budget.answered(&mut first, Some(limit), SECOND, SECOND);
        let taken = std::iter::from_fn(|| {
            budget.ask(&a, SECOND);
            budget.take(&a, SECOND).ok()
        });
        let taken = taken.count() * 2;
        assert!((90..=100).contains(&taken), "{taken} of 200");
    }
}
