//! The simulator's clock: the system clock plus an offset; and formats of times and durations.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// System time, or a stopped time, plus an offset.
#[derive(Debug, Default)]
pub(super) struct Clock {
    offset: Duration,
    stopped_at: Option<SystemTime>,
}

#[expect(
    clippy::disallowed_methods,
    reason = "the simulator has its own clock; the ban is for the broker"
)]
impl Clock {
    pub(super) fn now(&self) -> SystemTime {
        self.stopped_at.unwrap_or_else(SystemTime::now) + self.offset
    }

    pub(super) fn advance(&mut self, by: Duration) {
        self.offset += by;
    }

    pub(super) fn stop(&mut self) {
        self.stopped_at.get_or_insert_with(SystemTime::now);
    }
}

/// Whole seconds since 1970.
pub(super) fn unix_s(time: SystemTime) -> u64 {
    since_epoch(time).as_secs()
}

/// UTC with nanoseconds, as Vault writes times: `2026-11-21T03:02:22.000000001Z`.
pub(super) fn rfc3339(time: SystemTime) -> String {
    let since = since_epoch(time);
    let (year, month, day) = date(since.as_secs() / 86_400);
    let in_day = since.as_secs() % 86_400;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        in_day / 3600,
        in_day / 60 % 60,
        in_day % 60,
        since.subsec_nanos(),
    )
}

/// Time since 1970; zero for earlier times.
pub(super) fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Year, month and day of a number of days since 1970-01-01. The usual conversion for the Gregorian calendar, with eras of
/// 400 years that start on 1 March, so that the leap day is the last day of a year.
fn date(day: u64) -> (u64, u64, u64) {
    let day = day + 719_468; // from 0000-03-01
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let march_month = (5 * day + 2) / 153;
    let day = day - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

/// Parses a duration of a request: seconds, or text with units such as `1h30m`.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let (number, tail) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?);
        let unit_end = tail
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let unit_s = match unit {
            "d" => 86_400,
            "h" => 3_600,
            "m" => 60,
            "s" => 1,
            _ => return None,
        };
        let seconds = number.parse::<u64>().ok()?.checked_mul(unit_s)?;
        total = total.checked_add(Duration::from_secs(seconds))?;
        rest = tail;
    }
    Some(total).filter(|_| !text.is_empty())
}

/// A duration as the server formats it in warnings, without zero units: `99h`, `1h30m`, `4s`.
pub(super) fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let parts = [
        (seconds / 3600, 'h'),
        (seconds / 60 % 60, 'm'),
        (seconds % 60, 's'),
    ];
    let parts: Vec<_> = parts
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, unit)| format!("{count}{unit}"))
        .collect();
    if parts.is_empty() {
        "0s".to_owned()
    } else {
        parts.concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_utc() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn durations_are_parsed_and_formatted_as_vault_does() {
        for (text, seconds) in [
            ("20m", 1_200),
            ("1h30m", 5_400),
            ("60", 60),
            ("30d", 2_592_000),
        ] {
            assert_eq!(parse_duration(text), Some(Duration::from_secs(seconds)));
        }
        for text in ["", "h", "5x", "1h30"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
        assert_eq!(short(Duration::from_secs(99 * 3600)), "99h");
        assert_eq!(short(Duration::from_secs(5_404)), "1h30m4s");
        assert_eq!(short(Duration::ZERO), "0s");
    }
}
