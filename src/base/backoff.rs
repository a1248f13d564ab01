//! Increasing waits after failures.

use std::time::Duration;

/// Exponential backoff with random jitter, so that many brokers do not all return at once to a server that has just
/// restarted.
#[derive(Clone, Debug)]
pub struct Backoff {
    step: Duration,
    first: Duration,
    longest: Duration,
    /// The minimum share of each step, from 0 to 1.
    least: f64,
}

impl Backoff {
    /// Waits up to `first` after the first failure, and up to `longest` after many.
    pub(crate) const fn new(first: Duration, longest: Duration) -> Self {
        Self {
            step: first,
            first,
            longest,
            least: 0.0,
        }
    }

    /// Sets the minimum share of each step, from 0 to 1.
    #[must_use]
    pub(crate) const fn at_least(mut self, least: f64) -> Self {
        self.least = least;
        self
    }

    /// The longest wait.
    pub const fn longest(&self) -> Duration {
        self.longest
    }

    /// How long to wait after one more failure.
    pub(crate) fn wait(&mut self) -> Duration {
        let share = self.least + (1.0 - self.least) * fastrand::f64();
        let wait = self.step.mul_f64(share);
        self.step = (self.step * 2).min(self.longest);
        wait
    }

    /// Restarts with the first step, after a success.
    pub(crate) fn reset(&mut self) {
        self.step = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_restart_after_a_success() {
        let (first, longest) = (Duration::from_secs(1), Duration::from_secs(5));
        for _ in 0..100 {
            let mut backoff = Backoff::new(first, longest).at_least(0.5);
            for step in [1, 2, 4, 5, 5] {
                let step = Duration::from_secs(step);
                let wait = backoff.wait();
                assert!(step / 2 <= wait && wait <= step, "{wait:?} of {step:?}");
            }
            backoff.reset();
            assert!(backoff.wait() <= first);
            assert!(Backoff::new(first, longest).wait() <= first);
        }
    }
}
