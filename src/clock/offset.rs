//! Offset between boot time and one host's time, from questions that took some time to answer. Pure.

use std::time::Duration;

use super::ExchangeTime;

/// How fast two clocks may drift apart: a bad crystal has 100 ppm, and the kernel corrects by up to 500 ppm.
const DRIFT: f64 = 500e-6;

/// A host is many servers, and their clocks do not agree to the millisecond.
const SLACK_US: i64 = 250_000;

/// A jump counts once this many measurements in a row agree on it: one wrong server does not move the clock, and a
/// clock that was wrong does not stay so.
const CONFIRMATIONS: u32 = 3;

/// After a timestamp of ours was refused, the refusal is the first witness.
const CONFIRMATIONS_REFUTED: u32 = 2;

/// Measurements closer together than this are one witness: an answer from a cache would agree with itself.
pub(crate) const WITNESSES_APART: Duration = Duration::from_millis(600);

/// What a host may call the time: the years 2020 to 2100, in Unix milliseconds.
const PLAUSIBLE_MS: std::ops::Range<i64> = 1_577_836_800_000..4_102_444_800_000;

/// One question for the time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Sample {
    /// When it was asked, in time since boot.
    pub(crate) asked: Duration,
    /// When the answer was there, in time since boot.
    pub(crate) answered: Duration,
    /// The answer: Unix time in whole milliseconds.
    pub(crate) server_ms: i64,
}

/// What became of a measurement.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Measured {
    /// Not a valid time; ignored.
    Absurd,
    /// The clock uses it.
    Applied,
    /// A better one is in use; this one agrees with it.
    Agreed,
    /// It is off by this many milliseconds from what is known, further than any drift; not applied.
    Implausible(i64),
    /// As implausible as those before it, and they agree among themselves (or the exchange had refused our time): the
    /// clock has been moved by this many milliseconds.
    Moved(i64),
}

/// What is known about one host's time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Offset {
    known: Option<Estimate>,
    /// A jump that was not applied, and how often it has been seen.
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

    pub(super) fn take_in(&mut self, sample: Sample, is_refuted: bool) -> Measured {
        if !PLAUSIBLE_MS.contains(&sample.server_ms) {
            return Measured::Absurd;
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
                if new.at.saturating_sub(before.at) < WITNESSES_APART {
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
    /// How far off it may be by now.
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
    /// The host looked at its clock between question and answer; in the middle of the two is the best guess, and half
    /// the trip is how wrong it can be. The answer's milliseconds are cut off, not rounded. It is as old as the question:
    /// what happened while that was under way need not be in the answer.
    fn from(sample: Sample) -> Self {
        let (asked, answered) = (micros(sample.asked), micros(sample.answered));
        let half_trip = (answered - asked).max(0) / 2;
        Self {
            offset_us: sample.server_ms.saturating_mul(1000) + 500 - (asked + half_trip),
            radius_us: half_trip + 500,
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

    /// When these machines were booted: 2026-01-01, in Unix milliseconds.
    const BOOT_MS: i64 = 1_767_225_600_000;

    /// The host said that this many milliseconds had passed since [`BOOT_MS`].
    fn sample(asked_ms: u64, answered_ms: u64, since_boot_ms: i64) -> Sample {
        Sample {
            asked: Duration::from_millis(asked_ms),
            answered: Duration::from_millis(answered_ms),
            server_ms: BOOT_MS + since_boot_ms,
        }
    }

    #[test]
    fn an_answer_is_as_old_as_its_question() {
        let mut offset = Offset::default();
        offset.take_in(sample(1000, 1200, 50_000), false);
        let time = offset.at(Duration::from_millis(1200)).unwrap();
        // A timestamp that was signed and refused in between was not measured by it.
        assert_eq!(time.age, Some(Duration::from_millis(200)));
    }

    #[test]
    fn half_the_trip_is_taken_off_and_bounds_the_error() {
        let mut offset = Offset::default();
        assert!(offset.at(HOUR).is_none());
        // Asked at 1.000 s, answered at 1.200 s: the answer is of about 1.100 s.
        assert_eq!(
            offset.take_in(sample(1000, 1200, 50_000), false),
            Measured::Applied
        );
        let time = offset.at(Duration::from_millis(1200)).unwrap();
        assert_eq!(time.ms, BOOT_MS + 50_100);
        // Half the trip, half a millisecond, and the drift since the question.
        assert_eq!(time.uncertainty, Some(Duration::from_micros(100_600)));
    }

    #[test]
    fn uncertainty_grows_with_age_past_two_seconds_in_about_an_hour() {
        let mut offset = Offset::default();
        offset.take_in(sample(0, 100, 1_000_000), false);
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
    fn of_two_that_agree_the_better_one_is_kept_until_it_is_old() {
        let mut offset = Offset::default();
        offset.take_in(sample(0, 10, 1_000_000), false);
        assert_eq!(
            offset.take_in(sample(1000, 1400, 1_001_200), false),
            Measured::Agreed
        );
        // After a quarter of an hour the good one could be off by half a second.
        assert_eq!(
            offset.take_in(sample(900_000, 900_400, 1_900_200), false),
            Measured::Applied
        );
    }

    #[test]
    fn one_wrong_answer_moves_nothing_and_three_that_agree_do() {
        let mut offset = Offset::default();
        offset.take_in(sample(0, 10, 1_000_000), false);
        let right = |offset: &Offset| offset.at(Duration::from_secs(10)).unwrap().ms;
        let before = right(&offset);
        assert_eq!(
            offset.take_in(sample(1000, 1010, 4_601_000), false),
            Measured::Implausible(3_600_000)
        );
        assert_eq!(right(&offset), before);
        // One that agrees with what is known clears the doubt.
        offset.take_in(sample(2000, 2010, 1_002_000), false);
        for asked in [3000, 4000] {
            let jumped = sample(
                asked,
                asked + 10,
                31_000 + 1_000_000 + i64::try_from(asked).unwrap(),
            );
            assert_eq!(offset.take_in(jumped, false), Measured::Implausible(31_000));
        }
        assert_eq!(
            offset.take_in(sample(5000, 5010, 1_036_000), false),
            Measured::Moved(31_000)
        );
        assert_eq!(right(&offset), before + 31_000);
    }

    #[test]
    fn an_answer_from_a_cache_never_agrees_with_itself() {
        let mut offset = Offset::default();
        offset.take_in(sample(0, 10, 1_000_000), false);
        for asked in [60_000, 65_000, 70_000, 75_000] {
            let cached = offset.take_in(sample(asked, asked + 10, 1_000_000), false);
            assert!(matches!(cached, Measured::Implausible(_)), "{cached:?}");
        }
    }

    #[test]
    fn when_the_exchange_has_refused_our_time_two_that_agree_move_it() {
        let mut offset = Offset::default();
        offset.take_in(sample(0, 10, 1_000_000), false);
        let jumped = |asked| sample(asked, asked + 10, 1_060_000 + i64::try_from(asked).unwrap());
        assert_eq!(
            offset.take_in(jumped(1000), true),
            Measured::Implausible(60_000)
        );
        let too_soon = offset.take_in(jumped(1500), true);
        assert_eq!(too_soon, Measured::Implausible(60_000));
        assert_eq!(offset.take_in(jumped(1700), true), Measured::Moved(60_000));
    }

    #[test]
    fn what_is_no_time_at_all_is_not_taken_for_one() {
        let mut offset = Offset::default();
        for server_ms in [0, -1, i64::MAX, i64::MIN, 1_767_225_600] {
            let absurd = Sample {
                server_ms,
                ..sample(0, 10, 0)
            };
            assert_eq!(offset.take_in(absurd, false), Measured::Absurd);
        }
        assert!(offset.at(HOUR).is_none());
    }

    #[test]
    fn a_machine_that_slept_keeps_the_exchanges_time() {
        let mut offset = Offset::default();
        offset.take_in(sample(0, 10, 1_000_000), false);
        // Boot time runs through suspend: half an hour later it is half an hour later.
        let time = offset.at(Duration::from_millis(5) + HOUR / 2).unwrap();
        assert_eq!(time.ms, BOOT_MS + 1_000_000 + 1_800_000);
        assert_eq!(
            offset.take_in(sample(1_800_000, 1_800_010, 2_800_000), false),
            Measured::Applied
        );
    }
}
