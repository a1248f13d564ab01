//! Decimal amounts: prices, sizes and balances with ten decimals, without the rounding errors of binary fractions.

use std::fmt;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

/// Ten decimals: two more than the finest increment in the price table.
const DECIMALS: usize = 10;
const SCALE: i128 = 10_i128.pow(10);
/// Far above any balance here, and low enough that sums never overflow.
const MAX_WHOLE_DIGITS: usize = 15;

/// A non-negative decimal number with at most ten decimals.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Amount(i128);

impl Amount {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// Reads a JSON string or number; KuCoin accepts both for most fields.
    pub(super) fn from_json(value: &Value) -> Option<Self> {
        match value {
            Value::Number(number) => number.to_string().parse().ok(),
            Value::String(text) => text.parse().ok(),
            _ => None,
        }
    }

    /// The amount as a JSON number, for the answers that use numbers instead of strings.
    pub(super) fn to_json_number(self) -> Value {
        serde_json::from_str(&self.to_string()).unwrap_or(Value::Null)
    }

    /// Product, rounded down; `None` when it is too large.
    pub(super) fn times(self, other: Self) -> Option<Self> {
        Some(Self(self.0.checked_mul(other.0)? / SCALE))
    }

    /// Quotient, rounded down; `None` when `other` is zero or the result is too large.
    pub(super) fn over(self, other: Self) -> Option<Self> {
        Some(Self(self.0.checked_mul(SCALE)?.checked_div(other.0)?))
    }

    /// The integer part.
    pub(super) fn whole(self) -> Self {
        Self(self.0 - self.0 % SCALE)
    }
}

impl From<u32> for Amount {
    fn from(whole: u32) -> Self {
        Self(i128::from(whole) * SCALE)
    }
}

impl FromStr for Amount {
    type Err = BadAmount;

    fn from_str(text: &str) -> Result<Self, BadAmount> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        let fraction = fraction.trim_end_matches('0');
        if whole.is_empty()
            || whole.len() > MAX_WHOLE_DIGITS
            || fraction.len() > DECIMALS
            || !digits(whole)
            || !digits(fraction)
        {
            return Err(BadAmount);
        }
        format!("{whole}{fraction:0<DECIMALS$}")
            .parse()
            .map(Self)
            .map_err(|_| BadAmount)
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fraction = format!("{:0DECIMALS$}", self.0 % SCALE);
        match fraction.trim_end_matches('0') {
            "" => write!(f, "{}", self.0 / SCALE),
            fraction => write!(f, "{}.{fraction}", self.0 / SCALE),
        }
    }
}

impl Add for Amount {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl AddAssign for Amount {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl Sub for Amount {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl SubAssign for Amount {
    fn sub_assign(&mut self, other: Self) {
        self.0 -= other.0;
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Self::from_json(&value).ok_or_else(|| de::Error::custom(BadAmount))
    }
}

/// The error for text that is not an [`Amount`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BadAmount;

impl fmt::Display for BadAmount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("expected an unsigned decimal number with at most 15 digits and 10 decimals")
    }
}

impl std::error::Error for BadAmount {}

#[cfg(test)]
mod tests {
    use super::Amount;

    #[test]
    fn amounts_keep_every_decimal() {
        for text in ["0", "1", "0.00001", "60000.1234567891", "0.1"] {
            assert_eq!(text.parse::<Amount>().unwrap().to_string(), text);
        }
        let third = Amount::from(1).over(Amount::from(3)).unwrap();
        assert_eq!(third.to_string(), "0.3333333333");
        let tenth: Amount = "0.1".parse().unwrap();
        assert_eq!((tenth + tenth + tenth).to_string(), "0.3");
    }

    #[test]
    fn anything_but_a_plain_decimal_number_is_rejected() {
        for text in ["", "-1", "+1", "1e5", ".5", "1.00000000001", "1,5", "1 "] {
            assert!(text.parse::<Amount>().is_err(), "{text}");
        }
    }
}
