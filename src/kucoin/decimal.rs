//! Compares decimal numbers by their text, without rounding.

/// A decimal number: `digits` × 10^`exponent`, with neither leading nor trailing zeros in `digits`.
#[derive(Debug, Eq, PartialEq)]
struct Decimal {
    is_negative: bool,
    digits: String,
    exponent: i64,
}

/// Whether two texts are the same number: `1`, `1.0` and `1e0` are. `None` if one of them is no number.
pub(crate) fn same(one: &str, other: &str) -> Option<bool> {
    Some(parse(one)? == parse(other)?)
}

/// Reads a number as JSON writes it, also with leading zeros or with nothing on one side of the point.
fn parse(text: &str) -> Option<Decimal> {
    let (mut is_negative, unsigned) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, i64::from(exponent.parse::<i32>().ok()?)),
        None => (unsigned, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let mut digits = format!("{whole}{fraction}");
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let mut exponent = exponent - i64::try_from(fraction.len()).ok()?;
    let before = digits.len();
    digits.truncate(digits.trim_end_matches('0').len());
    exponent += i64::try_from(before - digits.len()).ok()?;
    let digits = digits.trim_start_matches('0').to_owned();
    if digits.is_empty() {
        (is_negative, exponent) = (false, 0);
    }
    Some(Decimal {
        is_negative,
        digits,
        exponent,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_compared_by_value_without_rounding() {
        for (one, other, expected) in [
            ("1", "1.0", Some(true)),
            ("1.00", "1", Some(true)),
            ("0.00001", "1E-5", Some(true)),
            ("0.00001", "0.000010", Some(true)),
            ("100", "1e+2", Some(true)),
            ("-0", "0.0", Some(true)),
            (".5", "0.50", Some(true)),
            ("007", "7", Some(true)),
            ("1", "10", Some(false)),
            ("0.1", "0.01", Some(false)),
            ("1", "-1", Some(false)),
            // The same as `f64`.
            ("0.10000000000000000001", "0.1", Some(false)),
            ("9007199254740993", "9007199254740992", Some(false)),
            ("", "0", None),
            (".", "0", None),
            ("1,5", "1.5", None),
            ("1 ", "1", None),
            ("0x1", "1", None),
            ("1e", "1", None),
            ("1e99999999999", "1", None),
            ("NaN", "NaN", None),
        ] {
            assert_eq!(same(one, other), expected, "{one} {other}");
            assert_eq!(same(other, one), expected, "{other} {one}");
        }
    }
}
