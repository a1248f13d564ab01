//! When a token is renewed, when it is replaced, and how long to wait after a failure. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// What stands for a lease without end.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// What is to be done about a token now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Due {
    /// It is at its end: get another one.
    LogIn,
    /// It is good.
    Nothing,
    /// Two thirds of its lease are over.
    Renew,
}

/// How long a token is good for.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    /// As the login gave it; a renewal that gives less has met the end of all renewals.
    granted: Duration,
    renewable: bool,
    /// Time to renew, or to log in if it is not renewable.
    act_at: Instant,
    /// Time to log in, whatever renewals say.
    grace_at: Instant,
    ends: Instant,
}

impl Lease {
    /// The lease of a login that was sent at `start`; 0 seconds mean that it does not end.
    pub(super) fn new(start: Instant, seconds: u64, renewable: bool) -> Self {
        let length = match seconds {
            0 => FOREVER,
            seconds => Duration::from_secs(seconds).min(FOREVER),
        };
        Self::of(start, length, length, renewable)
    }

    fn of(start: Instant, granted: Duration, length: Duration, renewable: bool) -> Self {
        let between = |from: f64, to: f64| length.mul_f64(from + (to - from) * fastrand::f64());
        Self {
            granted,
            renewable,
            // Two thirds, give or take 10 %, so that brokers that started together do not renew together.
            act_at: start + between(0.6, 0.73),
            // The last 10 to 20 %, as the official clients have it.
            grace_at: start + between(0.8, 0.9),
            ends: start + length,
        }
    }

    /// What this lease becomes by a renewal that was sent at `start`.
    ///
    /// Near the maximum the server gives less than at the login, in the end 0, which then does not mean "for ever".
    #[must_use]
    pub(super) fn renewed(&self, start: Instant, seconds: u64, renewable: bool) -> Self {
        let length = Duration::from_secs(seconds).min(self.granted);
        // A tenth for servers that round or count what has passed.
        let extends = length >= self.granted.mul_f64(0.9);
        Self::of(start, self.granted, length, renewable && extends)
    }

    /// What is to be done at `now`.
    pub(super) fn due(&self, now: Instant) -> Due {
        if now < self.act_at {
            Due::Nothing
        } else if self.renewable && now < self.grace_at {
            Due::Renew
        } else {
            Due::LogIn
        }
    }

    /// A renewal has failed and may be tried again at `at`.
    pub(super) fn put_off(&mut self, at: Instant) {
        self.act_at = at;
    }

    /// No renewal will do: the next thing is a login, at once.
    pub(super) fn give_up(&mut self, now: Instant) {
        self.renewable = false;
        self.act_at = now;
    }

    /// Whether the token cannot be good any more.
    pub(super) fn has_ended(&self, now: Instant) -> bool {
        now >= self.ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3600;

    fn at(start: Instant, share: f64) -> Instant {
        start + Duration::from_secs(HOUR).mul_f64(share)
    }

    #[test]
    fn a_token_is_renewed_at_two_thirds_and_replaced_in_the_last_fifth() {
        let start = Instant::now();
        for _ in 0..100 {
            let lease = Lease::new(start, HOUR, true);
            assert_eq!(lease.due(at(start, 0.59)), Due::Nothing);
            assert_eq!(lease.due(at(start, 0.74)), Due::Renew);
            assert_eq!(lease.due(at(start, 0.79)), Due::Renew);
            assert_eq!(lease.due(at(start, 0.91)), Due::LogIn);
            assert!(!lease.has_ended(at(start, 0.99)) && lease.has_ended(at(start, 1.0)));
        }
    }

    #[test]
    fn a_token_that_cannot_be_renewed_is_replaced_at_two_thirds() {
        let start = Instant::now();
        let lease = Lease::new(start, HOUR, false);
        assert_eq!(lease.due(at(start, 0.59)), Due::Nothing);
        assert_eq!(lease.due(at(start, 0.74)), Due::LogIn);

        let mut lease = Lease::new(start, HOUR, true);
        lease.give_up(start);
        assert_eq!(lease.due(start), Due::LogIn);
    }

    #[test]
    fn a_lease_of_zero_seconds_never_ends_but_one_that_shrinks_to_zero_has() {
        let start = Instant::now();
        let ten_years = start + Duration::from_secs(10 * 365 * 24 * HOUR);
        let endless = Lease::new(start, 0, true);
        assert_eq!(endless.due(ten_years), Due::Nothing);
        assert!(!endless.has_ended(ten_years));
        assert_eq!(
            Lease::new(start, u64::MAX, true).due(ten_years),
            Due::Nothing
        );

        let shrunk = Lease::new(start, HOUR, true).renewed(start, 0, true);
        assert_eq!(shrunk.due(start), Due::LogIn);
        assert!(shrunk.has_ended(start));
    }

    #[test]
    fn a_renewal_extends_the_lease_until_it_gives_less_than_the_login_did() {
        let start = Instant::now();
        let later = at(start, 0.7);
        let lease = Lease::new(start, HOUR, true);
        let renewed = lease.renewed(later, HOUR, true);
        assert_eq!(renewed.due(at(later, 0.59)), Due::Nothing);
        assert_eq!(renewed.due(at(later, 0.74)), Due::Renew);

        let last = renewed.renewed(later, HOUR / 2, true);
        assert_eq!(last.due(at(later, 0.29)), Due::Nothing);
        assert_eq!(last.due(at(later, 0.37)), Due::LogIn);
        assert!(last.has_ended(at(later, 0.5)));
    }

    #[test]
    fn a_renewal_that_failed_waits_and_the_last_fifth_does_not() {
        let start = Instant::now();
        let mut lease = Lease::new(start, HOUR, true);
        lease.put_off(at(start, 0.78));
        assert_eq!(lease.due(at(start, 0.77)), Due::Nothing);
        assert_eq!(lease.due(at(start, 0.79)), Due::Renew);
        assert_eq!(lease.due(at(start, 0.91)), Due::LogIn);
    }
}
