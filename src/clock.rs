//! The only reader of clocks.
//!
//! Three times are kept apart. [`Clock::wall_ms`] is what the system believes; audit lines carry it, and nothing is
//! signed with it once the exchange has told its own time. [`Clock::boot`] only ever runs forward, also through
//! suspend, and no step of the wall clock touches it; ages count on it. [`Clock::exchange`] is the exchange's time:
//! boot time plus an offset measured for each host.

mod offset;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::kucoin::{Host, Site};
use offset::Offset;
pub(crate) use offset::WITNESSES_APART;
pub use offset::{Measured, Sample};

/// From here on the exchange could refuse a signature: it takes timestamps less than 5 s off, and the request has still
/// to travel. Source: KuCoin API documentation, "Authentication", timestamps.
pub const MAX_UNCERTAINTY: Duration = Duration::from_secs(2);

/// A host of a site; each has its own servers, and so its own time.
pub type Place = (Site, Host);

/// All clocks.
pub struct Clock {
    boot: Box<dyn Fn() -> Duration + Send + Sync>,
    offsets: Mutex<BTreeMap<Place, Offset>>,
}

/// What is known about the exchange's time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExchangeTime {
    /// Unix time in milliseconds.
    pub ms: i64,
    /// How far it may be off; `None` while the exchange has never told its time, and `ms` is the system's word.
    pub uncertainty: Option<Duration>,
    /// Since the measurement it rests on.
    pub age: Option<Duration>,
}

/// Nobody knows the exchange's time well enough to sign what adds risk.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ClockUncertain {
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
            offsets: Mutex::default(),
        }
    }

    /// What the system takes for the time: Unix time in milliseconds; 0 should its clock stand before 1970.
    pub fn wall_ms(&self) -> i64 {
        #[expect(clippy::disallowed_methods, reason = "this is the one place")]
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        i64::try_from(since_epoch.as_millis()).unwrap_or_default()
    }

    /// Time since boot, suspend included.
    pub fn boot(&self) -> Duration {
        (self.boot)()
    }

    /// The time on the exchange's host at `place`.
    pub fn exchange(&self, place: Place) -> ExchangeTime {
        let now = self.boot();
        match self.offsets().get(&place).and_then(|offset| offset.at(now)) {
            Some(time) => time,
            None => ExchangeTime {
                ms: self.wall_ms(),
                uncertainty: None,
                age: None,
            },
        }
    }

    /// Whether the time at `place` is known well enough to sign what adds risk.
    ///
    /// # Errors
    /// When it may be off by more than [`MAX_UNCERTAINTY`].
    pub fn check(&self, place: Place) -> Result<(), ClockUncertain> {
        let time = self.exchange(place);
        match (time.uncertainty, time.age) {
            (Some(uncertainty), _) if uncertainty <= MAX_UNCERTAINTY => Ok(()),
            (Some(uncertainty), Some(age)) => Err(ClockUncertain::Stale(uncertainty, age)),
            _ => Err(ClockUncertain::Never),
        }
    }

    /// Takes in what a host said its time was. `is_refuted`: it has just refused a timestamp of ours, so that a jump is
    /// what is to be expected.
    pub fn take_in(&self, place: Place, sample: Sample, is_refuted: bool) -> Measured {
        let mut offsets = self.offsets();
        offsets
            .entry(place)
            .or_default()
            .take_in(sample, is_refuted)
    }

    fn offsets(&self) -> std::sync::MutexGuard<'_, BTreeMap<Place, Offset>> {
        self.offsets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `CLOCK_BOOTTIME`: monotonic, and it goes on while the machine sleeps.
fn since_boot() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(seconds, nanoseconds)
}
