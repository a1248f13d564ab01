//! The only reader of clocks.
//!
//! Three times are kept apart. [`Clock::wall_ms`] is what the system believes; audit lines carry it, and nothing is
//! signed with it once the exchange has told its own time. [`Clock::boot`] only ever runs forward, also through
//! suspend, and no step of the wall clock touches it; ages count on it. [`Clock::exchange`] is the exchange's time:
//! boot time plus an offset measured for each host. Where it and the system's are more than a day apart, one of them is
//! plainly wrong, and an admin has to say that the difference is accepted.

mod offset;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::base::ids::AdminId;
use crate::base::lock::Mutex;
use crate::kucoin::{Host, Site};
use offset::Offset;
pub(crate) use offset::WITNESSES_APART;
pub(crate) use offset::{Measured, Sample};

/// From here on the exchange could refuse a signature: it takes timestamps less than 5 s off, and the request has still
/// to travel. Source: KuCoin API documentation, "Authentication", timestamps.
pub(crate) const MAX_UNCERTAINTY: Duration = Duration::from_secs(2);

/// How far the exchange's time may be from the system's before an admin must accept the difference: no drift and no time
/// zone gets there, and one of the two clocks is plainly wrong.
pub(crate) const MAX_DIFFERENCE: Duration = Duration::from_secs(24 * 60 * 60);

/// A host of a site; each has its own servers, and so its own time.
pub(crate) type HostId = (Site, Host);

/// All clocks.
pub struct Clock {
    boot: Box<dyn Fn() -> Duration + Send + Sync>,
    /// Unix time in milliseconds, as the system has it.
    wall_ms: Box<dyn Fn() -> i64 + Send + Sync>,
    hosts: Mutex<BTreeMap<HostId, HostClock>>,
}

/// What is known about one host.
#[derive(Debug, Default)]
struct HostClock {
    offset: Offset,
    accepted: Option<AcceptedDifference>,
}

/// A difference between the exchange's time and the system's that an admin has accepted, until the broker restarts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct AcceptedDifference {
    /// The admin.
    pub(crate) by: AdminId,
    /// The exchange's time less the system's at that moment, in milliseconds. It covers differences of up to
    /// [`MAX_DIFFERENCE`] from it.
    pub(crate) ms: i64,
}

/// What is known about the exchange's time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ExchangeTime {
    /// Unix time in milliseconds.
    pub(crate) ms: i64,
    /// How far it may be off; `None` while the exchange has never told its time, and `ms` is the system's word.
    pub(crate) uncertainty: Option<Duration>,
    /// Since the measurement it rests on.
    pub(crate) age: Option<Duration>,
}

/// The exchange's time is not certain enough to sign a risk-increasing request with it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum ClockUncertain {
    /// Further than [`MAX_DIFFERENCE`] from the system's, and no admin has accepted that. The exchange's time less the
    /// system's, in milliseconds.
    #[error("the exchange's clock is {}, which is more than 24 hours; nothing was sent", difference(*.0))]
    Different(i64),
    /// Never measured.
    #[error("the exchange's time has not been measured yet; nothing was sent")]
    Never,
    /// Measured too long ago, or too badly.
    #[error("the exchange's time is known only to {} ms, last measured {} s ago; nothing was sent", .0.as_millis(), .1.as_secs())]
    Stale(Duration, Duration),
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

impl Clock {
    /// The system's clocks.
    pub fn system() -> Self {
        Self::reading(since_boot)
    }

    /// Takes `boot` for the time since boot, so that an hour can pass without anybody waiting for it.
    pub fn reading(boot: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self {
            boot: Box::new(boot),
            wall_ms: Box::new(system_ms),
            hosts: Mutex::default(),
        }
    }

    /// Takes `wall_ms` for the system's time in Unix milliseconds, so that a test can step it.
    #[must_use]
    pub fn with_wall(self, wall_ms: impl Fn() -> i64 + Send + Sync + 'static) -> Self {
        Self {
            wall_ms: Box::new(wall_ms),
            ..self
        }
    }

    /// What the system takes for the time: Unix time in milliseconds; 0 should its clock stand before 1970.
    pub fn wall_ms(&self) -> i64 {
        (self.wall_ms)()
    }

    /// Time since boot, suspend included.
    pub(crate) fn boot(&self) -> Duration {
        (self.boot)()
    }

    /// The time on the exchange's host at `host_id`.
    pub(crate) fn exchange(&self, host_id: HostId) -> ExchangeTime {
        let now = self.boot();
        match self
            .hosts
            .lock()
            .get(&host_id)
            .and_then(|host| host.offset.at(now))
        {
            Some(time) => time,
            None => ExchangeTime {
                ms: self.wall_ms(),
                uncertainty: None,
                age: None,
            },
        }
    }

    /// Whether the time at `host_id` is known well enough to sign a risk-increasing request. Reads the system's clock each
    /// time, so that a step of it is noticed with the next request.
    ///
    /// # Errors
    /// When it is further than [`MAX_DIFFERENCE`] from the system's time and from what an admin has accepted, and when it
    /// may be off by more than [`MAX_UNCERTAINTY`].
    pub(crate) fn check(&self, host_id: HostId) -> Result<(), ClockUncertain> {
        let now = self.boot();
        let hosts = self.hosts.lock();
        let host = hosts.get(&host_id).ok_or(ClockUncertain::Never)?;
        let time = host.offset.at(now).ok_or(ClockUncertain::Never)?;
        if let Some(ms) = host.refused_difference(time.ms, self.wall_ms()) {
            return Err(ClockUncertain::Different(ms));
        }
        match (time.uncertainty, time.age) {
            (Some(uncertainty), _) if uncertainty <= MAX_UNCERTAINTY => Ok(()),
            (Some(uncertainty), Some(age)) => Err(ClockUncertain::Stale(uncertainty, age)),
            _ => Err(ClockUncertain::Never),
        }
    }

    /// The exchange's time at `host_id` less the system's, in milliseconds, where that is refused: it is further than
    /// [`MAX_DIFFERENCE`] from 0 and from what an admin has accepted. `None` also while it has not been measured.
    pub(crate) fn refused_difference(&self, host_id: HostId) -> Option<i64> {
        let now = self.boot();
        let hosts = self.hosts.lock();
        let host = hosts.get(&host_id)?;
        host.refused_difference(host.offset.at(now)?.ms, self.wall_ms())
    }

    /// Has `check` accept, until the broker restarts, the difference that there is now between the exchange's time at
    /// `host_id` and the system's. Returns that difference, in milliseconds, where it is refused now; `None`: it is within
    /// [`MAX_DIFFERENCE`] or accepted already, and nothing changes.
    ///
    /// # Errors
    /// With [`ClockUncertain::Never`] where the exchange's time has not been measured.
    pub(crate) fn accept(
        &self,
        host_id: HostId,
        by: &AdminId,
    ) -> Result<Option<i64>, ClockUncertain> {
        if self.exchange(host_id).age.is_none() {
            return Err(ClockUncertain::Never);
        }
        let Some(ms) = self.refused_difference(host_id) else {
            return Ok(None);
        };
        let by = by.clone();
        self.hosts.lock().entry(host_id).or_default().accepted =
            Some(AcceptedDifference { by, ms });
        Ok(Some(ms))
    }

    /// The difference that an admin has accepted for `host_id`.
    pub(crate) fn accepted(&self, host_id: HostId) -> Option<AcceptedDifference> {
        self.hosts.lock().get(&host_id)?.accepted.clone()
    }

    /// Takes in what a host said its time was. `is_refuted`: it has just refused a timestamp of ours, so that a jump is
    /// what is to be expected.
    pub(crate) fn take_in(&self, host_id: HostId, sample: Sample, is_refuted: bool) -> Measured {
        let mut hosts = self.hosts.lock();
        let host = hosts.entry(host_id).or_default();
        host.offset.take_in(sample, is_refuted)
    }
}

impl HostClock {
    fn refused_difference(&self, exchange_ms: i64, wall_ms: i64) -> Option<i64> {
        let difference_ms = exchange_ms.saturating_sub(wall_ms);
        let is_near =
            |ms: i64| u128::from(difference_ms.abs_diff(ms)) <= MAX_DIFFERENCE.as_millis();
        let accepted = self.accepted.as_ref().map(|accepted| accepted.ms);
        (!is_near(0) && !accepted.is_some_and(is_near)).then_some(difference_ms)
    }
}

/// The exchange's time less the system's in words, such as "3650 days ahead of the system clock".
pub(crate) fn difference(ms: i64) -> String {
    const HOUR_MS: u64 = 60 * 60 * 1000;
    let hours = (ms.unsigned_abs() + HOUR_MS / 2) / HOUR_MS;
    let far = match hours {
        0..96 => format!("{hours} hours"),
        _ => format!("{} days", (hours + 12) / 24),
    };
    let side = if ms < 0 { "behind" } else { "ahead of" };
    format!("{far} {side} the system clock")
}

fn system_ms() -> i64 {
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or_default()
}

/// `CLOCK_BOOTTIME`: monotonic, and it goes on while the machine sleeps.
fn since_boot() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(seconds, nanoseconds)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    const PLACE: HostId = (Site::Global, Host::Spot);
    const NOW_MS: i64 = 1_767_225_600_000;
    const HOUR_MS: i64 = 60 * 60 * 1000;

    /// A clock whose system time is `NOW_MS` plus what the counter says, and an exchange that is `ahead_ms` of `NOW_MS`.
    fn clock(ahead_ms: i64) -> (Clock, Arc<AtomicI64>) {
        let step_ms = Arc::new(AtomicI64::new(0));
        let wall = Arc::clone(&step_ms);
        let clock = Clock::reading(|| Duration::ZERO)
            .with_wall(move || NOW_MS + wall.load(Ordering::Relaxed));
        let sample = Sample {
            asked: Duration::ZERO,
            answered: Duration::ZERO,
            server_ms: NOW_MS + ahead_ms,
        };
        assert_eq!(clock.take_in(PLACE, sample, false), Measured::Applied);
        (clock, step_ms)
    }

    #[test]
    fn difference_of_more_than_a_day_is_refused_on_either_side() {
        for (ahead_ms, is_refused) in [
            (24 * HOUR_MS - 1, false),
            (24 * HOUR_MS + 1, true),
            (1 - 24 * HOUR_MS, false),
            (-24 * HOUR_MS - 1, true),
        ] {
            let refused = clock(ahead_ms).0.check(PLACE);
            let expected = if is_refused {
                Err(ClockUncertain::Different(ahead_ms))
            } else {
                Ok(())
            };
            assert_eq!(refused, expected);
        }
    }

    #[test]
    fn step_of_the_system_clock_is_noticed_with_the_next_check() {
        let (clock, step_ms) = clock(0);
        assert_eq!(clock.check(PLACE), Ok(()));
        for (by_ms, refused) in [(25 * HOUR_MS, -25 * HOUR_MS), (-50 * HOUR_MS, 50 * HOUR_MS)] {
            step_ms.store(by_ms, Ordering::Relaxed);
            assert_eq!(clock.check(PLACE), Err(ClockUncertain::Different(refused)));
        }
        step_ms.store(0, Ordering::Relaxed);
        assert_eq!(clock.check(PLACE), Ok(()));
    }

    #[test]
    fn accepted_difference_covers_a_day_around_itself_and_no_more() {
        let by: AdminId = "spiffe://example.org/admin/anna".parse().unwrap();
        let (clock, step_ms) = clock(240 * HOUR_MS);
        assert_eq!(clock.accept(PLACE, &by), Ok(Some(240 * HOUR_MS)));
        assert_eq!(clock.check(PLACE), Ok(()));
        assert_eq!(clock.accept(PLACE, &by), Ok(None), "accepted already");
        for (by_ms, is_refused) in [
            (24 * HOUR_MS, false),
            (24 * HOUR_MS + 1, true),
            (-24 * HOUR_MS, false),
            (-24 * HOUR_MS - 1, true),
            // Both agree.
            (240 * HOUR_MS, false),
        ] {
            step_ms.store(by_ms, Ordering::Relaxed);
            assert_eq!(clock.check(PLACE).is_err(), is_refused, "{by_ms}");
        }
        let other = (Site::Global, Host::Futures);
        assert_eq!(clock.accept(other, &by), Err(ClockUncertain::Never));
        assert_eq!(clock.accepted(other), None);
    }

    #[test]
    fn difference_is_said_in_hours_and_days() {
        for (hours, expected) in [
            (25, "25 hours ahead of the system clock"),
            (-95, "95 hours behind the system clock"),
            (3650 * 24, "3650 days ahead of the system clock"),
        ] {
            assert_eq!(difference(hours * HOUR_MS - 5), expected);
        }
    }
}
