//! The limit that a bot sets with `not_after_ms`: the exchange time after which a risk-increasing request must not leave.

use std::sync::Arc;

use super::{Broker, BrokerError, Call};
use crate::clock::{ExchangeTime, HostId};
use crate::egress::{SendError, SendGuard};
use crate::kucoin::Malformed;

/// How far ahead it may be. A bot wants its orders within seconds, so a larger value has the wrong unit or the wrong clock.
const MAX_AHEAD_MS: i64 = 60_000;

/// The limit has passed, or may have.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error(
    "not_after_ms {not_after_ms} has passed: the exchange's time is {} (may be off by {} ms); nothing was sent: decide again whether to send the order, with a new not_after_ms derived from broker_time_ms",
    .time.ms,
    .time.uncertainty.unwrap_or_default().as_micros().div_ceil(1000)
)]
pub(crate) struct NotAfterPassed {
    not_after_ms: i64,
    time: ExchangeTime,
}

impl Broker {
    /// Checks the limit of a risk-increasing request against the time of its host.
    ///
    /// # Errors
    /// If it has passed, may have passed, or is more than 60 s ahead.
    pub(super) fn check_not_after(&self, call: &Call, host_id: HostId) -> Result<(), BrokerError> {
        let Some(not_after_ms) = call.not_after_ms else {
            return Ok(());
        };
        let time = self.clock.exchange(host_id);
        if time.latest_ms() > not_after_ms {
            return Err(NotAfterPassed { not_after_ms, time }.into());
        }
        if not_after_ms.saturating_sub(time.ms) > MAX_AHEAD_MS {
            let problem = format!(
                "expected Unix time in milliseconds, at most {MAX_AHEAD_MS} ms after the exchange's time {}, got {not_after_ms}",
                time.ms
            );
            return Err(BrokerError::Malformed(vec![Malformed::new(
                "not_after_ms",
                problem,
            )]));
        }
        Ok(())
    }

    /// The error for the bot if its request was stopped while it was being written: which limit had passed.
    pub(super) fn with_limit(
        &self,
        error: BrokerError,
        call: &Call,
        host_id: HostId,
    ) -> BrokerError {
        match error {
            BrokerError::Send(SendError::Stopped) => self
                .check_not_after(call, host_id)
                .err()
                .unwrap_or(BrokerError::DeadlineExceeded),
            other => other,
        }
    }

    /// What stops a risk-increasing request that is not written in time.
    pub(super) fn send_guard(&self, call: &Call, host_id: HostId) -> Arc<SendGuard> {
        let clock = Arc::clone(&self.clock);
        Arc::new(SendGuard::new(
            clock,
            host_id,
            call.not_after_ms,
            call.deadline,
        ))
    }
}
