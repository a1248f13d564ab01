//! The only code that reads clocks.
//!
//! There are three times. [`Clock::wall_ms`] is the system's time; audit lines have it, and nothing is signed with it once
//! the exchange's time has been measured. [`Clock::boot`] is monotonic, includes suspend and ignores steps of the system
//! clock; ages use it. [`Clock::exchange`] is the exchange's time: boot time plus an offset measured per host. If it
//! differs from the system's by more than a day, one of them is wrong, and an admin has to accept the difference.

mod offset;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::base::ids::AdminId;
use crate::base::lock::Mutex;
use crate::kucoin::{Host, Site};
pub(crate) use offset::MIN_SAMPLE_GAP;
use offset::Offset;
pub(crate) use offset::{Measured, Sample};

/// Above this uncertainty the exchange could reject a signature: timestamps must be less than 5 s off, and the request has
/// to travel, too. Source: KuCoin API documentation, "Authentication", timestamps.
pub(crate) const MAX_UNCERTAINTY: Duration = Duration::from_secs(2);

/// Above this difference between the exchange's time and the system's, an admin must accept it. No drift and no time zone
/// error is that large, so one of the two clocks is wrong.
pub(crate) const MAX_DIFFERENCE: Duration = Duration::from_secs(24 * 60 * 60);

/// A host of a site. Each host has its own servers, and therefore its own time.
pub(crate) type HostId = (Site, Host);

/// All clocks.
pub struct Clock {
    boot: Box<dyn Fn() -> Duration + Send + Sync>,
    /// The system's time: Unix time in milliseconds.
    wall_ms: Box<dyn Fn() -> i64 + Send + Sync>,
    hosts: Mutex<BTreeMap<HostId, HostClock>>,
}

/// The state of one host.
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
    /// The exchange's time minus the system's at that moment, in milliseconds. The acceptance covers differences
    /// of up to [`MAX_DIFFERENCE`] from it.
    pub(crate) ms: i64,
}

/// The exchange's time and its uncertainty.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ExchangeTime {
    /// Unix time in milliseconds.
    pub(crate) ms: i64,
    /// How far it may be off; `None` if it has not been measured, and `ms` is the system's time.
    pub(crate) uncertainty: Option<Duration>,
    /// Time since its measurement.
    pub(crate) age: Option<Duration>,
}

impl ExchangeTime {
    /// The same as a time of the standard library; 1970 if it is before that.
    pub(crate) fn as_system_time(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(u64::try_from(self.ms).unwrap_or_default())
    }

    /// The latest that it may be, rounded up.
    pub(crate) fn latest_ms(&self) -> i64 {
        let uncertainty = self.uncertainty.unwrap_or_default();
        let uncertainty_ms = uncertainty.as_micros().div_ceil(1000);
        self.ms
            .saturating_add(i64::try_from(uncertainty_ms).unwrap_or(i64::MAX))
    }

    /// The earliest that it may be, rounded down; `None` if it has not been measured.
    pub(crate) fn earliest_ms(&self) -> Option<i64> {
        let uncertainty_ms = self.uncertainty?.as_micros().div_ceil(1000);
        let uncertainty_ms = i64::try_from(uncertainty_ms).unwrap_or(i64::MAX);
        Some(self.ms.saturating_sub(uncertainty_ms))
    }
}

/// The exchange's time is not certain enough to sign a risk-increasing request with it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum ClockUncertain {
    /// Differs from the system's by more than [`MAX_DIFFERENCE`], and no admin has accepted that. The exchange's time minus
    /// the system's, in milliseconds.
    #[error("the exchange's clock is {}, more than the allowed 24 hours", difference(*.0))]
    Different(i64),
    /// Never measured.
    #[error("the exchange's time has not been measured yet")]
    Never,
    /// Measured too long ago, or too imprecisely.
    #[error("the broker's estimate of the exchange's time may be off by {} ms (limit {} ms), last measured {} s ago", .0.as_millis(), MAX_UNCERTAINTY.as_millis(), .1.as_secs())]
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

    /// Uses `boot` as the time since boot, so that tests need not wait.
    pub fn reading(boot: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self {
            boot: Box::new(boot),
            wall_ms: Box::new(system_ms),
            hosts: Mutex::default(),
        }
    }

    /// Uses `wall_ms` as the system's time in Unix milliseconds, so that a test can step it.
    #[must_use]
    pub fn with_wall(self, wall_ms: impl Fn() -> i64 + Send + Sync + 'static) -> Self {
        Self {
            wall_ms: Box::new(wall_ms),
            ..self
        }
    }

    /// The system's time: Unix time in milliseconds; 0 if its clock is before 1970.
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

    /// The time at `host_id` if it has been measured; without `host_id`, that of any host that has been measured.
    pub(crate) fn measured_ms(&self, host_id: Option<HostId>) -> Option<i64> {
        let now = self.boot();
        let hosts = self.hosts.lock();
        let time = match host_id {
            Some(host_id) => hosts.get(&host_id)?.offset.at(now),
            None => hosts.values().find_map(|host| host.offset.at(now)),
        };
        time.map(|time| time.ms)
    }

    /// Whether the time at `host_id` is certain enough to sign a risk-increasing request. Reads the system clock each time,
    /// so that a step of it is noticed with the next request.
    ///
    /// # Errors
    /// When it differs from the system's time by more than [`MAX_DIFFERENCE`] and no acceptance covers that, or may be off
    /// by more than [`MAX_UNCERTAINTY`].
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

    /// The exchange's time at `host_id` minus the system's, in milliseconds, if that is refused: it is more than
    /// [`MAX_DIFFERENCE`] from 0 and from the difference that an admin has accepted. `None` also if not measured yet.
    pub(crate) fn refused_difference(&self, host_id: HostId) -> Option<i64> {
        let now = self.boot();
        let hosts = self.hosts.lock();
        let host = hosts.get(&host_id)?;
        host.refused_difference(host.offset.at(now)?.ms, self.wall_ms())
    }

    /// Makes `check` accept, until the broker restarts, the current difference between the exchange's time at `host_id` and
    /// the system's. Returns that difference, in milliseconds; `None` if it is within [`MAX_DIFFERENCE`] or already
    /// accepted, and nothing changes.
    ///
    /// # Errors
    /// [`ClockUncertain::Never`] if the exchange's time has not been measured.
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

    /// Applies a measurement of a host's time. `is_refuted`: the host has just rejected a timestamp of the broker, so a step
    /// of its clock is likely.
    pub(crate) fn apply_sample(
        &self,
        host_id: HostId,
        sample: Sample,
        is_refuted: bool,
    ) -> Measured {
        let mut hosts = self.hosts.lock();
        let host = hosts.entry(host_id).or_default();
        host.offset.apply_sample(sample, is_refuted)
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

/// The exchange's time minus the system's in words, such as "3650 days ahead of the system clock".
pub(crate) fn difference(ms: i64) -> String {
    const HOUR_MS: u64 = 60 * 60 * 1000;
    let hours = (ms.unsigned_abs() + HOUR_MS / 2) / HOUR_MS;
    let distance = match hours {
        0..96 => format!("{hours} hours"),
        _ => format!("{} days", (hours + 12) / 24),
    };
    let side = if ms < 0 { "behind" } else { "ahead of" };
    format!("{distance} {side} the system clock")
}

fn system_ms() -> i64 {
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or_default()
}

/// `CLOCK_BOOTTIME`: monotonic, and includes suspend.
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

    const HOST: HostId = (Site::Global, Host::Spot);
    const NOW_MS: i64 = 1_767_225_600_000;
    const HOUR_MS: i64 = 60 * 60 * 1000;

    /// A clock whose system time is `NOW_MS` plus the counter, and an exchange that is `ahead_ms` ahead of `NOW_MS`.
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
        assert_eq!(clock.apply_sample(HOST, sample, false), Measured::Applied);
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
            let refused = clock(ahead_ms).0.check(HOST);
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
        assert_eq!(clock.check(HOST), Ok(()));
        for (by_ms, refused) in [(25 * HOUR_MS, -25 * HOUR_MS), (-50 * HOUR_MS, 50 * HOUR_MS)] {
            step_ms.store(by_ms, Ordering::Relaxed);
            assert_eq!(clock.check(HOST), Err(ClockUncertain::Different(refused)));
        }
        step_ms.store(0, Ordering::Relaxed);
        assert_eq!(clock.check(HOST), Ok(()));
    }

    #[test]
    fn accepted_difference_covers_a_day_around_itself_and_no_more() {
        let by: AdminId = "spiffe://example.org/admin/anna".parse().unwrap();
        let (clock, step_ms) = clock(240 * HOUR_MS);
        assert_eq!(clock.accept(HOST, &by), Ok(Some(240 * HOUR_MS)));
        assert_eq!(clock.check(HOST), Ok(()));
        assert_eq!(clock.accept(HOST, &by), Ok(None), "accepted already");
        for (by_ms, is_refused) in [
            (24 * HOUR_MS, false),
            (24 * HOUR_MS + 1, true),
            (-24 * HOUR_MS, false),
            (-24 * HOUR_MS - 1, true),
            // Both agree.
            (240 * HOUR_MS, false),
        ] {
            step_ms.store(by_ms, Ordering::Relaxed);
            assert_eq!(clock.check(HOST).is_err(), is_refused, "{by_ms}");
        }
        let other = (Site::Global, Host::Futures);
        assert_eq!(clock.accept(other, &by), Err(ClockUncertain::Never));
        assert_eq!(clock.accepted(other), None);
    }

    #[test]
    fn difference_is_worded_in_hours_or_days() {
        for (hours, expected) in [
            (25, "25 hours ahead of the system clock"),
            (-95, "95 hours behind the system clock"),
            (3650 * 24, "3650 days ahead of the system clock"),
        ] {
            assert_eq!(difference(hours * HOUR_MS - 5), expected);
        }
    }
}
