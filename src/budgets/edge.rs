//! The budget of the egress address at the edge of the exchange (Cloudflare): requests per 10 s, over all accounts. No I/O, and no
//! clock.

use std::collections::VecDeque;
use std::time::Duration;

use super::pool::{CANCEL_EVERY, Priority};

/// The edge counts requests in this time. Source: KuCoin API documentation of 2023, "Rate Limit".
const PERIOD: Duration = Duration::from_secs(10);

/// How long the limit stays reduced after the edge has blocked the address.
const REDUCED_FOR: Duration = Duration::from_secs(3600);

/// The limit after a block, in percent of the requests of the 10 s before it.
const REDUCED_PERCENT: u64 = 80;

/// The lowest limit: so few requests are not what the edge blocks. Source: a fifth of the published limit, 500.
const LOWEST: u64 = 100;

/// The part of a limit that only cancels use, in percent.
const RESERVE_PERCENT: u64 = 3;

/// The longest block that is believed at once, and its length if the edge says none. Source: KuCoin API documentation, code 1015:
/// 30 s.
const LONGEST: Duration = Duration::from_secs(60);
const USUAL: Duration = Duration::from_secs(30);

/// The budget. Times are since boot.
#[derive(Debug, Default)]
pub(super) struct Edge {
    /// From the configuration; `None`: no limit.
    configured: Option<u64>,
    /// After a block, and until when.
    reduced: Option<(u64, Duration)>,
    /// Requests of the last 10 s, by tenth of a second.
    sent: VecDeque<(u64, u64)>,
    /// All of them together.
    recent: u64,
    blocked_until: Duration,
    /// When a cancel may leave although it is blocked, or the budget is used up.
    next_cancel: Duration,
}

impl Edge {
    pub(super) fn new(configured: Option<u64>) -> Self {
        Self {
            configured,
            ..Self::default()
        }
    }

    /// Whether one request fits.
    ///
    /// # Errors
    /// The time at which it may fit, if it does not now.
    pub(super) fn check(&mut self, priority: Priority, now: Duration) -> Result<(), Duration> {
        let Some(until) = self.scarce_until(priority, now) else {
            return Ok(());
        };
        match priority {
            Priority::Cancel if now >= self.next_cancel => Ok(()),
            Priority::Cancel => Err(self.next_cancel.min(until)),
            _ => Err(until),
        }
    }

    /// Takes one request that fits.
    pub(super) fn take(&mut self, priority: Priority, now: Duration) {
        if self.scarce_until(priority, now).is_some() {
            self.next_cancel = now + CANCEL_EVERY;
        }
        self.count(now);
    }

    /// Until when the address is blocked, or its budget used up.
    fn scarce_until(&mut self, priority: Priority, now: Duration) -> Option<Duration> {
        if now < self.blocked_until {
            Some(self.blocked_until)
        } else {
            self.full_until(priority, now)
        }
    }

    /// Counts a request that is sent in any case.
    pub(super) fn count(&mut self, now: Duration) {
        self.recent(now);
        self.recent += 1;
        let tenth = tenths(now);
        match self.sent.back_mut() {
            Some((last, count)) if *last >= tenth => *count += 1,
            _ => self.sent.push_back((tenth, 1)),
        }
    }

    /// The edge has blocked the address for `time`, as its answer to a request shows that was sent at `sent_at`. Returns whether
    /// that is new. Requests that it rejects during a block do not make it longer: each block has a fixed length.
    pub(super) fn block(&mut self, time: Duration, sent_at: Duration, now: Duration) -> bool {
        if sent_at.min(now) < self.blocked_until {
            return false;
        }
        let time = if time.is_zero() { USUAL } else { time };
        let is_renewed = now < self.blocked_until + PERIOD;
        self.blocked_until = now + time.min(LONGEST);
        self.next_cancel = now + CANCEL_EVERY;
        // After a block, only few requests were sent, which say nothing about the limit of the edge.
        let limit = (self.recent(now) * REDUCED_PERCENT / 100).max(LOWEST);
        let known = self.reduced.filter(|(_, until)| now < *until);
        let limit = match known {
            Some((known, _)) if is_renewed => known,
            Some((known, _)) => known.min(limit),
            None => limit,
        };
        self.reduced = Some((limit, now + REDUCED_FOR));
        true
    }

    /// How long the address is still blocked.
    pub(super) fn blocked_for(&self, now: Duration) -> Option<Duration> {
        self.blocked_until
            .checked_sub(now)
            .filter(|time| !time.is_zero())
    }

    /// Whether it is blocked, or has just been: cancels are sent first then.
    pub(super) fn was_just_blocked(&self, now: Duration) -> bool {
        now < self.blocked_until + CANCEL_EVERY
    }

    /// Requests per 10 s; `None`: no limit.
    pub(super) fn limit(&self, now: Duration) -> Option<u64> {
        let reduced = self.reduced.filter(|(_, until)| now < *until);
        let reduced = reduced.map(|(limit, _)| limit);
        match (self.configured, reduced) {
            (Some(configured), Some(reduced)) => Some(configured.min(reduced)),
            (configured, reduced) => configured.or(reduced),
        }
    }

    /// When the next request fits; `None`: now.
    fn full_until(&mut self, priority: Priority, now: Duration) -> Option<Duration> {
        let limit = self.limit(now)?;
        let limit = match priority {
            Priority::Cancel => limit,
            _ => limit - (limit * RESERVE_PERCENT).div_ceil(100),
        };
        if self.recent(now) < limit {
            return None;
        }
        let oldest = self.sent.front().map(|(tenth, _)| *tenth)?;
        Some(Duration::from_millis((oldest + 1) * 100) + PERIOD)
    }

    /// Requests of the last 10 s.
    fn recent(&mut self, now: Duration) -> u64 {
        let since = tenths(now).saturating_sub(tenths(PERIOD));
        while let Some((tenth, count)) = self.sent.front()
            && *tenth < since
        {
            self.recent -= count;
            self.sent.pop_front();
        }
        self.recent
    }
}

fn tenths(time: Duration) -> u64 {
    u64::try_from(time.as_millis() / 100).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn try_take(edge: &mut Edge, priority: Priority, now: Duration) -> Result<(), Duration> {
        edge.check(priority, now)?;
        edge.take(priority, now);
        Ok(())
    }

    fn fits(edge: &mut Edge, now: Duration) -> bool {
        try_take(edge, Priority::RiskIncreasing, now).is_ok()
    }

    #[test]
    fn configured_limit_holds_in_any_ten_seconds() {
        let mut edge = Edge::new(Some(50));
        let mut sent: Vec<Duration> = Vec::new();
        for step in 0..600 {
            let now = SECOND + step * Duration::from_millis(70);
            if fits(&mut edge, now) {
                sent.push(now);
                let recent = sent.iter().filter(|at| **at + PERIOD > now).count();
                assert!(recent <= 50, "{recent} at {now:?}");
            }
        }
        assert!(sent.len() >= 190, "{}", sent.len());
    }

    #[test]
    fn without_a_limit_everything_leaves() {
        let mut edge = Edge::new(None);
        assert!((0..10_000).all(|_| fits(&mut edge, SECOND)));
    }

    #[test]
    fn during_a_block_one_cancel_per_second_leaves_and_nothing_else() {
        let mut edge = Edge::new(None);
        for _ in 0..500 {
            assert!(fits(&mut edge, SECOND));
        }
        assert!(edge.block(30 * SECOND, SECOND, SECOND));
        assert!(!edge.block(30 * SECOND, SECOND, SECOND));
        let mut cancels = 0;
        for second in 1..31 {
            let now = second * SECOND;
            assert_eq!(
                try_take(&mut edge, Priority::RiskIncreasing, now),
                Err(31 * SECOND),
                "{second}"
            );
            if try_take(&mut edge, Priority::Cancel, now).is_ok() {
                cancels += 1;
                // It is rejected.
                assert!(!edge.block(30 * SECOND, now, now));
            }
            assert!(try_take(&mut edge, Priority::Cancel, now).is_err());
        }
        assert_eq!(cancels, 29);
        assert!(fits(&mut edge, 31 * SECOND));
    }

    #[test]
    fn limit_is_reduced_for_an_hour_after_a_block() {
        let mut edge = Edge::new(None);
        for _ in 0..500 {
            assert!(fits(&mut edge, SECOND));
        }
        edge.block(30 * SECOND, SECOND, SECOND);
        assert_eq!(edge.limit(40 * SECOND), Some(400));
        let sent = (0..1000).filter(|_| fits(&mut edge, 40 * SECOND)).count();
        // The rest is for cancels.
        assert_eq!(sent, 388);
        let mut cancels = (0..12).map(|_| try_take(&mut edge, Priority::Cancel, 40 * SECOND));
        assert!(cancels.all(|cancel| cancel.is_ok()));
        assert_eq!(edge.limit(3602 * SECOND), None);
    }

    #[test]
    fn block_that_is_renewed_does_not_lower_the_limit_again() {
        let mut edge = Edge::new(None);
        for _ in 0..500 {
            assert!(fits(&mut edge, SECOND));
        }
        edge.block(30 * SECOND, SECOND, SECOND);
        assert!(try_take(&mut edge, Priority::Cancel, 31 * SECOND).is_ok());
        assert!(edge.block(30 * SECOND, 32 * SECOND, 32 * SECOND));
        assert_eq!(edge.limit(32 * SECOND), Some(400));
    }

    #[test]
    fn length_of_a_block_is_bounded() {
        for (time, expected) in [(0, 30), (1, 1), (3600, 60)] {
            let mut edge = Edge::new(None);
            edge.block(time * SECOND, SECOND, SECOND);
            assert_eq!(edge.blocked_for(SECOND), Some(expected * SECOND));
        }
    }

    #[test]
    fn rejection_that_comes_after_a_block_of_a_request_during_it_begins_no_other() {
        let mut edge = Edge::new(None);
        edge.block(30 * SECOND, SECOND, SECOND);
        let (sent_at, answered) = (30 * SECOND, 32 * SECOND);
        assert!(!edge.block(30 * SECOND, sent_at, answered));
        assert_eq!(edge.blocked_for(answered), None);
    }
}
