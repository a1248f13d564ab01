//! When to renew a token and when to replace it. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// The length of a lease that does not expire.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// What to do with a token now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Due {
    /// It expires soon: get another one.
    LogIn,
    /// It is valid.
    Nothing,
    /// Two thirds of its lease have passed.
    Renew,
}

/// How long a token is valid.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    /// As the login granted it; a renewal that grants less means that the maximum is near.
    granted: Duration,
    renewable: bool,
    /// Time to renew, or to log in if it is not renewable.
    act_at: Instant,
    /// Time to log in, even if renewals still succeed.
    grace_at: Instant,
    expires_at: Instant,
}

impl Lease {
    /// The lease of a login that was sent at `start`; 0 seconds: it does not expire.
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
            // The last 10 to 20 %, as in the official clients.
            grace_at: start + between(0.8, 0.9),
            expires_at: start + length,
        }
    }

    /// The lease after a renewal that was sent at `start`.
    ///
    /// Near its maximum, the server grants less than at the login, at the end 0, which here does not mean unlimited.
    #[must_use]
    pub(super) fn renewed(&self, start: Instant, seconds: u64, renewable: bool) -> Self {
        let length = Duration::from_secs(seconds).min(self.granted);
        // A tolerance of a tenth, for servers that round or subtract elapsed time.
        let extends = length >= self.granted.mul_f64(0.9);
        Self::of(start, self.granted, length, renewable && extends)
    }

    /// What to do at `now`.
    pub(super) fn due(&self, now: Instant) -> Due {
        if now < self.act_at {
            Due::Nothing
        } else if self.renewable && now < self.grace_at {
            Due::Renew
        } else {
            Due::LogIn
        }
    }

    /// Puts off the next renewal until `at`, after one that failed.
    pub(super) fn put_off(&mut self, at: Instant) {
        self.act_at = at;
    }

    /// Makes a login due at once, since renewals are useless.
    pub(super) fn give_up(&mut self, now: Instant) {
        self.renewable = false;
        self.act_at = now;
    }

    /// Whether the lease has expired.
    pub(super) fn has_expired(&self, now: Instant) -> bool {
        now >= self.expires_at
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
            assert!(!lease.has_expired(at(start, 0.99)) && lease.has_expired(at(start, 1.0)));
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
    fn login_lease_of_zero_seconds_never_expires_but_a_renewal_of_zero_seconds_has_expired() {
        let start = Instant::now();
        let ten_years = start + Duration::from_secs(10 * 365 * 24 * HOUR);
        let endless = Lease::new(start, 0, true);
        assert_eq!(endless.due(ten_years), Due::Nothing);
        assert!(!endless.has_expired(ten_years));
        assert_eq!(
            Lease::new(start, u64::MAX, true).due(ten_years),
            Due::Nothing
        );

        let shrunk = Lease::new(start, HOUR, true).renewed(start, 0, true);
        assert_eq!(shrunk.due(start), Due::LogIn);
        assert!(shrunk.has_expired(start));
    }

    #[test]
    fn renewal_extends_the_lease_until_it_grants_less_than_the_login() {
        let start = Instant::now();
        let later = at(start, 0.7);
        let lease = Lease::new(start, HOUR, true);
        let renewed = lease.renewed(later, HOUR, true);
        assert_eq!(renewed.due(at(later, 0.59)), Due::Nothing);
        assert_eq!(renewed.due(at(later, 0.74)), Due::Renew);

        let last = renewed.renewed(later, HOUR / 2, true);
        assert_eq!(last.due(at(later, 0.29)), Due::Nothing);
        assert_eq!(last.due(at(later, 0.37)), Due::LogIn);
        assert!(last.has_expired(at(later, 0.5)));
    }

    #[test]
    fn failed_renewal_is_put_off_but_not_beyond_the_last_fifth() {
        let start = Instant::now();
        let mut lease = Lease::new(start, HOUR, true);
        lease.put_off(at(start, 0.78));
        assert_eq!(lease.due(at(start, 0.77)), Due::Nothing);
        assert_eq!(lease.due(at(start, 0.79)), Due::Renew);
        assert_eq!(lease.due(at(start, 0.91)), Due::LogIn);
    }
}
