//! The only reader of the wall clock.

use std::time::{SystemTime, UNIX_EPOCH};

/// The time that requests are signed with and audit lines carry.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock;

impl Clock {
    /// Unix time in milliseconds; 0 should the clock stand before 1970.
    pub fn now_ms(self) -> i64 {
        #[expect(clippy::disallowed_methods, reason = "this is the one place")]
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        i64::try_from(since_epoch.as_millis()).unwrap_or_default()
    }
}
