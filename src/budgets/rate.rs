//! The rate of one bot, if the rules limit it: a token bucket of one second's requests. No I/O, and no clock.

use std::time::Duration;

/// A thousandth of a request: one per millisecond at one request per second.
const REQUEST: u64 = 1000;

/// The bucket. Times are since boot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    per_s: u32,
    /// Thousandths of a request that may be sent at `at`.
    left: u64,
    at: Duration,
}

impl Rate {
    /// A full bucket.
    pub(super) fn new(per_s: u32, now: Duration) -> Self {
        Self {
            per_s,
            left: u64::from(per_s) * REQUEST,
            at: now,
        }
    }

    /// Fills the bucket up to `now`, for this number of requests per second.
    pub(super) fn fill(&mut self, per_s: u32, now: Duration) {
        let passed_ms = u64::try_from(now.saturating_sub(self.at).as_millis()).unwrap_or(u64::MAX);
        let more = passed_ms.saturating_mul(u64::from(per_s));
        self.left = self
            .left
            .saturating_add(more)
            .min(u64::from(per_s) * REQUEST);
        self.per_s = per_s;
        self.at += Duration::from_millis(passed_ms);
    }

    /// When one request fits; `None`: now.
    pub(super) fn full_until(&self) -> Option<Duration> {
        let missing = REQUEST
            .checked_sub(self.left)
            .filter(|missing| *missing > 0)?;
        let wait_ms = missing.div_ceil(u64::from(self.per_s.max(1)));
        Some(self.at + Duration::from_millis(wait_ms))
    }

    /// Takes one request.
    pub(super) fn take(&mut self) {
        self.left = self.left.saturating_sub(REQUEST);
    }

    /// Whether a new bucket would be the same.
    pub(super) fn is_full(&self, now: Duration) -> bool {
        let mut filled = *self;
        filled.fill(self.per_s, now);
        filled.left >= u64::from(self.per_s) * REQUEST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_holds_over_ten_seconds_after_a_burst_of_one() {
        let mut rate = Rate::new(20, Duration::ZERO);
        let mut sent = 0;
        for ms in 0..10_000 {
            rate.fill(20, Duration::from_millis(ms));
            if rate.full_until().is_none() {
                rate.take();
                sent += 1;
            }
        }
        assert!((218..=220).contains(&sent), "{sent}");
    }

    #[test]
    fn next_request_fits_at_the_time_that_is_reported() {
        let mut rate = Rate::new(3, Duration::ZERO);
        for _ in 0..3 {
            assert_eq!(rate.full_until(), None);
            rate.take();
        }
        let until = rate.full_until().unwrap();
        assert_eq!(until, Duration::from_millis(334));
        rate.fill(3, Duration::from_millis(333));
        assert!(rate.full_until().is_some());
        rate.fill(3, until);
        assert_eq!(rate.full_until(), None);
    }
}
