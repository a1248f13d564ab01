//! Address ranges from which a token can be used.

use std::net::IpAddr;

/// Whether `address` is in one of the ranges; without ranges, every address is.
pub(super) fn admits(ranges: &[String], address: IpAddr) -> bool {
    ranges.is_empty()
        || ranges
            .iter()
            .any(|range| contains(range, address) == Some(true))
}

/// Whether `address` is in the range; `None` if the range cannot be parsed.
fn contains(range: &str, address: IpAddr) -> Option<bool> {
    let (base, prefix) = match range.split_once('/') {
        None => (range, None),
        Some((base, prefix)) => (base, Some(prefix.parse::<u32>().ok()?)),
    };
    let same = match (base.parse().ok()?, address) {
        (IpAddr::V4(base), IpAddr::V4(address)) => {
            let outside = 32_u32.checked_sub(prefix.unwrap_or(32))?;
            (u32::from(base) ^ u32::from(address))
                .checked_shr(outside)
                .unwrap_or(0)
                == 0
        }
        (IpAddr::V6(base), IpAddr::V6(address)) => {
            let outside = 128_u32.checked_sub(prefix.unwrap_or(128))?;
            (u128::from(base) ^ u128::from(address))
                .checked_shr(outside)
                .unwrap_or(0)
                == 0
        }
        _ => false,
    };
    Some(same)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_admit_only_addresses_inside_them() {
        let local = IpAddr::from([127, 0, 0, 1]);
        for (range, inside) in [
            ("127.0.0.0/8", true),
            ("127.0.0.1", true),
            ("0.0.0.0/0", true),
            ("10.0.0.0/8", false),
            ("127.0.0.2/32", false),
            ("::/0", false),
            ("nonsense", false),
        ] {
            assert_eq!(admits(&[range.to_owned()], local), inside, "{range}");
        }
        assert!(admits(&[], local));
    }
}
