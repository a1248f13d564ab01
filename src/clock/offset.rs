//! Offset between boot time and one host's time, from requests with a known round-trip time. Pure.

use std::time::Duration;

use super::ExchangeTime;

/// How fast two clocks may drift apart: a bad crystal has 100 ppm, and the kernel corrects by up to 500 ppm.
const DRIFT: f64 = 500e-6;

/// A host is many servers, whose clocks differ slightly.
const SLACK_US: i64 = 250_000;

/// A step is applied once this many samples in a row agree on it: one wrong server does not move the clock, and a wrong
/// clock is corrected.
const CONFIRMATIONS: u32 = 3;

/// After a rejected timestamp fewer samples are needed, since the rejection also indicates a step.
const CONFIRMATIONS_REFUTED: u32 = 2;

/// Samples closer together than this count as one, since an answer from a cache would agree with itself.
pub(crate) const MIN_SAMPLE_GAP: Duration = Duration::from_millis(600);

/// The times that are accepted from a host: the years 2020 to 2100, in Unix milliseconds.
const PLAUSIBLE_MS: std::ops::Range<i64> = 1_577_836_800_000..4_102_444_800_000;

/// One request for the time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Sample {
    /// When the request was sent, in time since boot.
    pub(crate) asked: Duration,
    /// When the answer was received, in time since boot.
    pub(crate) answered: Duration,
    /// The answer: Unix time in whole milliseconds.
    pub(crate) server_ms: i64,
}

/// The result of a sample.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Measured {
    /// Not a valid time; ignored.
    Invalid,
    /// Used from now on.
    Applied,
    /// Agrees with a more precise sample, which stays in use.
    Agreed,
    /// Differs from the current estimate by this many milliseconds, more than any drift; not applied.
    Implausible(i64),
    /// Implausible like the ones before it, but enough of them agree: the clock was moved by this many milliseconds.
    Moved(i64),
}

/// The estimate of one host's time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Offset {
    known: Option<Estimate>,
    /// A step that was not applied, and how many samples agree on it.
    doubtful: Option<(Estimate, u32)>,
}

/// `server = boot + offset`, give or take `radius`, as of `at`. Microseconds.
#[derive(Clone, Copy, Debug)]
struct Estimate {
    offset_us: i64,
    radius_us: i64,
    at: Duration,
}

impl Offset {
    pub(super) fn at(&self, now: Duration) -> Option<ExchangeTime> {
        let known = self.known?;
        let radius_us = known.radius_at(now);
        Some(ExchangeTime {
            ms: (micros(now) + known.offset_us).div_euclid(1000),
            uncertainty: Some(Duration::from_micros(radius_us.unsigned_abs())),
            age: Some(now.saturating_sub(known.at)),
        })
    }

    pub(super) fn apply_sample(&mut self, sample: Sample, is_refuted: bool) -> Measured {
        if !PLAUSIBLE_MS.contains(&sample.server_ms) {
            return Measured::Invalid;
        }
        let new = Estimate::from(sample);
        let Some(known) = self.known else {
            self.known = Some(new);
            return Measured::Applied;
        };
        if known.agrees_with(&new) {
            self.doubtful = None;
            if new.radius_us <= known.radius_at(new.at) {
                self.known = Some(new);
                return Measured::Applied;
            }
            return Measured::Agreed;
        }
        let by_ms = (new.offset_us - known.offset_us) / 1000;
        let seen = match self.doubtful {
            Some((before, seen)) if before.agrees_with(&new) => {
                if new.at.saturating_sub(before.at) < MIN_SAMPLE_GAP {
                    return Measured::Implausible(by_ms);
                }
                seen + 1
            }
            _ => 1,
        };
        let enough = if is_refuted {
            CONFIRMATIONS_REFUTED
        } else {
            CONFIRMATIONS
        };
        if seen >= enough {
            (self.known, self.doubtful) = (Some(new), None);
            return Measured::Moved(by_ms);
        }
        self.doubtful = Some((new, seen));
        Measured::Implausible(by_ms)
    }
}

impl Estimate {
    /// How far off it may be at `now`.
    fn radius_at(&self, now: Duration) -> i64 {
        let age = micros(now.saturating_sub(self.at));
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_precision_loss,
            reason = "microseconds of a process's life fit, and the bound need not be exact"
        )]
        let drift = (age as f64 * DRIFT) as i64;
        self.radius_us + drift
    }

    fn agrees_with(&self, newer: &Self) -> bool {
        let apart = (self.offset_us - newer.offset_us).abs();
        apart <= self.radius_at(newer.at) + newer.radius_us + SLACK_US
    }
}

impl From<Sample> for Estimate {
    /// The host read its clock between request and answer; the best estimate is the middle, and half the round trip bounds
    /// the error. The answer is truncated to milliseconds, not rounded. Its age counts from the request, since a step during
    /// the round trip may not be in the answer.
    fn from(sample: Sample) -> Self {
        let (asked, answered) = (micros(sample.asked), micros(sample.answered));
        let half_round_trip = (answered - asked).max(0) / 2;
        Self {
            offset_us: sample.server_ms.saturating_mul(1000) + 500 - (asked + half_round_trip),
            radius_us: half_round_trip + 500,
            at: sample.asked,
        }
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// When the machine of these tests was booted: 2026-01-01, in Unix milliseconds.
    const BOOT_MS: i64 = 1_767_225_600_000;

    /// A sample in which the host reports that `since_boot_ms` have passed since [`BOOT_MS`].
    fn sample(asked_ms: u64, answered_ms: u64, since_boot_ms: i64) -> Sample {
        Sample {
            asked: Duration::from_millis(asked_ms),
            answered: Duration::from_millis(answered_ms),
            server_ms: BOOT_MS + since_boot_ms,
        }
    }

    #[test]
    fn age_of_a_sample_counts_from_its_request() {
        let mut offset = Offset::default();
        offset.apply_sample(sample(1000, 1200, 50_000), false);
        let time = offset.at(Duration::from_millis(1200)).unwrap();
        // A timestamp that was signed and rejected in between is newer than this sample.
        assert_eq!(time.age, Some(Duration::from_millis(200)));
    }

    #[test]
    fn half_the_round_trip_corrects_the_time_and_bounds_its_error() {
        let mut offset = Offset::default();
        assert!(offset.at(HOUR).is_none());
        // Sent at 1.000 s, answered at 1.200 s: the host read its clock at about 1.100 s.
        assert_eq!(
            offset.apply_sample(sample(1000, 1200, 50_000), false),
            Measured::Applied
        );
        let time = offset.at(Duration::from_millis(1200)).unwrap();
        assert_eq!(time.ms, BOOT_MS + 50_100);
        // Half the round trip, half a millisecond, and the drift since the request.
        assert_eq!(time.uncertainty, Some(Duration::from_micros(100_600)));
    }

    #[test]
    fn uncertainty_grows_with_age_past_two_seconds_in_about_an_hour() {
        let mut offset = Offset::default();
        offset.apply_sample(sample(0, 100, 1_000_000), false);
        let at = |after: Duration| {
            offset
                .at(Duration::from_millis(100) + after)
                .unwrap()
                .uncertainty
                .unwrap()
        };
        assert!(at(HOUR) < super::super::MAX_UNCERTAINTY);
        assert!(at(HOUR * 2) > super::super::MAX_UNCERTAINTY);
    }

    #[test]
    fn more_precise_one_of_two_agreeing_samples_is_kept_until_it_is_old() {
        let mut offset = Offset::default();
        offset.apply_sample(sample(0, 10, 1_000_000), false);
        assert_eq!(
            offset.apply_sample(sample(1000, 1400, 1_001_200), false),
            Measured::Agreed
        );
        // After a quarter of an hour the precise one could be off by half a second.
        assert_eq!(
            offset.apply_sample(sample(900_000, 900_400, 1_900_200), false),
            Measured::Applied
        );
    }

    #[test]
    fn one_wrong_sample_is_ignored_and_three_agreeing_ones_move_the_clock() {
        let mut offset = Offset::default();
        offset.apply_sample(sample(0, 10, 1_000_000), false);
        let right = |offset: &Offset| offset.at(Duration::from_secs(10)).unwrap().ms;
        let before = right(&offset);
        assert_eq!(
            offset.apply_sample(sample(1000, 1010, 4_601_000), false),
            Measured::Implausible(3_600_000)
        );
        assert_eq!(right(&offset), before);
        // A sample that agrees with the current estimate resets the count.
        offset.apply_sample(sample(2000, 2010, 1_002_000), false);
        for asked in [3000, 4000] {
            let jumped = sample(
                asked,
                asked + 10,
                31_000 + 1_000_000 + i64::try_from(asked).unwrap(),
            );
            assert_eq!(
                offset.apply_sample(jumped, false),
                Measured::Implausible(31_000)
            );
        }
        assert_eq!(
            offset.apply_sample(sample(5000, 5010, 1_036_000), false),
            Measured::Moved(31_000)
        );
        assert_eq!(right(&offset), before + 31_000);
    }

    #[test]
    fn cached_answers_never_move_the_clock() {
        let mut offset = Offset::default();
        offset.apply_sample(sample(0, 10, 1_000_000), false);
        for asked in [60_000, 65_000, 70_000, 75_000] {
            let cached = offset.apply_sample(sample(asked, asked + 10, 1_000_000), false);
            assert!(matches!(cached, Measured::Implausible(_)), "{cached:?}");
        }
    }

    #[test]
    fn two_agreeing_samples_move_the_clock_after_a_rejected_timestamp() {
        let mut offset = Offset::default();
        offset.apply_sample(sample(0, 10, 1_000_000), false);
        let jumped = |asked| sample(asked, asked + 10, 1_060_000 + i64::try_from(asked).unwrap());
        assert_eq!(
            offset.apply_sample(jumped(1000), true),
            Measured::Implausible(60_000)
        );
        let too_soon = offset.apply_sample(jumped(1500), true);
        assert_eq!(too_soon, Measured::Implausible(60_000));
        assert_eq!(
            offset.apply_sample(jumped(1700), true),
            Measured::Moved(60_000)
        );
    }

    #[test]
    fn times_outside_2020_to_2100_are_ignored() {
        let mut offset = Offset::default();
        for server_ms in [0, -1, i64::MAX, i64::MIN, 1_767_225_600] {
            let absurd = Sample {
                server_ms,
                ..sample(0, 10, 0)
            };
            assert_eq!(offset.apply_sample(absurd, false), Measured::Invalid);
        }
        assert!(offset.at(HOUR).is_none());
    }

    #[test]
    fn exchange_time_stays_correct_through_suspend() {
        let mut offset = Offset::default();
        offset.apply_sample(sample(0, 10, 1_000_000), false);
        // Boot time includes suspend: half an hour later, the estimate is half an hour later, too.
        let time = offset.at(Duration::from_millis(5) + HOUR / 2).unwrap();
        assert_eq!(time.ms, BOOT_MS + 1_000_000 + 1_800_000);
        assert_eq!(
            offset.apply_sample(sample(1_800_000, 1_800_010, 2_800_000), false),
            Measured::Applied
        );
    }
}
