//! How the broker stops. Cancels and reads of open orders are served until the calls that were in flight have ended.
//!
//! A stop has three steps, which together take at most `limits.drain_timeout_ms`:
//!
//! 1. **Drain.** Bots' calls that were in flight go on, and `halt --cancel-all` does. Of new ones, only those that a bot
//!    needs while it stops are served. This step ends once no call that changes something and was in flight at the
//!    beginning is left, whatever cancels have come since: a steady stream of them must not delay the exit.
//! 2. **Settle.** The same calls are served, until those that came in the first step have ended.
//! 3. **Close.** No new call is served. The cancels that are still in flight have at least the last tenth of the time.
//!
//! Reads delay a step by [`READS_WITHIN`] at most. What is in flight after that is aborted.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{Broker, Call, Calls};
use crate::base::ids::Principal;
use crate::kucoin::open_orders;

/// How long a read that is in flight may delay a step: most answers of the exchange come sooner.
const READS_WITHIN: Duration = Duration::from_secs(1);

/// The most time that is left for the last step; less if the whole stop has less than ten times as much.
const CLOSE_WITHIN: Duration = Duration::from_secs(1);

/// How far the stop has come.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Stage {
    /// All calls are served.
    #[default]
    Serving,
    /// Of bots' new calls, only cancels and reads of open orders are served.
    Draining,
    /// The same, while those that came since the stop began end.
    Settling,
    /// No new call is served.
    Closing,
}

/// Calls in flight that a step waits for.
#[derive(Debug, Default)]
pub(super) struct OpenCalls {
    changing: TaskTracker,
    reads: TaskTracker,
}

impl OpenCalls {
    /// Returns once every call that changes something has ended, and every read too or [`READS_WITHIN`] has passed.
    async fn ended(&self) {
        self.reads.close();
        let reads = timeout(READS_WITHIN, self.reads.wait());
        let _ = tokio::join!(self.changed(), reads);
    }

    /// Returns once no call that changes something is in flight, even if another one begins right after that.
    async fn changed(&self) {
        self.changing.close();
        self.changing.wait().await;
    }
}

impl Calls {
    /// The stage, and every change of it.
    pub(crate) fn stage(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    /// Lets a stop wait for an admitted call until the result drops; `None` for a read of the broker itself, which nobody waits
    /// for.
    pub(super) fn track(&self, call: &Call, changes: bool) -> Option<TaskTrackerToken> {
        let open = match *self.stage.borrow() {
            Stage::Serving => &self.open,
            Stage::Draining => &self.late,
            Stage::Settling | Stage::Closing => &self.last,
        };
        if changes {
            Some(open.changing.token())
        } else {
            (call.principal != Principal::Broker).then(|| open.reads.token())
        }
    }

    /// Delays the end of a drain until the result drops, `limits.drain_timeout_ms` at most: for work of several calls.
    pub(crate) fn delay_drain(&self) -> TaskTrackerToken {
        self.open.changing.token()
    }
}

impl Broker {
    /// Whether a new call is served at this stage. Bots need cancels and reads of open orders while they stop. The calls of
    /// admins and of the broker itself place no orders, and a cancel may have to wait for the test of another key.
    pub(super) fn is_served(&self, call: &Call) -> bool {
        match *self.calls.stage.borrow() {
            Stage::Serving => true,
            Stage::Draining | Stage::Settling => {
                let is_read = || call.request.endpoint().is_some_and(open_orders::is_read_by);
                call.principal.bot().is_none() || self.is_cancel(&call.request) || is_read()
            }
            Stage::Closing => false,
        }
    }

    /// Stops serving calls, in the three steps above; then aborts calls that are still in flight. Takes at most `limit`. Returns
    /// how many calls that change something have ended as `maybe_sent` since it began.
    pub(crate) async fn drain(&self, limit: Duration) -> u64 {
        let calls = &self.calls;
        let end = Instant::now() + limit;
        calls.stage.send_replace(Stage::Draining);
        let close_within = CLOSE_WITHIN.min(limit / 10);
        let _ = timeout_at(end - close_within, calls.open.ended()).await;
        // A cancel that hangs must not make the broker refuse the cancels of others.
        calls.stage.send_replace(Stage::Settling);
        let _ = timeout_at(end - close_within, async {
            tokio::join!(calls.open.changed(), calls.late.ended())
        })
        .await;
        calls.stage.send_replace(Stage::Closing);
        let _ = timeout_at(end, async {
            tokio::join!(
                calls.open.changed(),
                calls.late.changed(),
                calls.last.ended()
            )
        })
        .await;
        let in_flight = [&calls.open, &calls.late, &calls.last];
        let in_flight: usize = in_flight.map(|calls| calls.changing.len()).iter().sum();
        if in_flight > 0 {
            tracing::warn!(in_flight, "drain timeout; aborting in-flight calls");
        }
        // Calls are refused now, and each one that was admitted ends.
        calls.give_up.cancel();
        calls.tasks.close();
        // Refused calls keep coming until the connections are closed.
        let _ = timeout(CLOSE_WITHIN, calls.tasks.wait()).await;
        self.audit.flush().await;
        calls.unresolved.load(Ordering::Relaxed)
    }

    /// Whether the broker is stopping.
    pub(crate) fn is_draining(&self) -> bool {
        *self.calls.stage.borrow() != Stage::Serving
    }
}
