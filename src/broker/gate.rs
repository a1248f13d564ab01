//! The gate between sending a request and what ends its call early (deadline, hang-up, shutdown): exactly one of them wins.

use std::mem::replace;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::Receipt;
use crate::base::lock::Mutex;
use crate::egress::SendGuard;

/// The gate of one call. Without it a bot could get `not_sent` while its order is being sent.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<GateState>,
    /// The timestamp of the request that passed last, Unix milliseconds; 0 if none has.
    signed_ms: AtomicI64,
    /// The exchange's id of the account whose key has signed it, if known.
    signed_for: Mutex<Option<String>>,
}

#[derive(Debug, Default)]
enum GateState {
    /// Nothing was sent, or it was provably not executed.
    #[default]
    Open,
    /// The exchange rejected the request; it may be sent once more.
    Refused(Box<Receipt>),
    /// The request was passed to its connection. Until it is written completely, its guard can stop it; without one, it counts
    /// as sent. An earlier rejection is the answer if it is stopped.
    Sent(Option<Arc<SendGuard>>, Option<Box<Receipt>>),
    /// The caller has its answer.
    Closed,
}

/// The state of a call when its gate was closed.
#[derive(Debug)]
pub(super) enum Closed {
    /// Nothing was sent, and nothing will be.
    NotSent,
    /// The exchange rejected the request with this answer.
    Refused(Box<Receipt>),
    /// The request was sent, and its result is unknown.
    Sent,
}

impl Gate {
    /// Allows the request to be sent, also a second time; false after the gate was closed. `guard` can stop it while it is
    /// being written; `signed_ms` is its timestamp.
    pub(super) fn pass(&self, guard: Option<Arc<SendGuard>>, signed_ms: i64) -> bool {
        let mut state = self.state.lock();
        let refused = match replace(&mut *state, GateState::Closed) {
            GateState::Closed => return false,
            GateState::Refused(receipt) => Some(receipt),
            GateState::Open | GateState::Sent(..) => None,
        };
        *state = GateState::Sent(guard, refused);
        self.signed_ms.store(signed_ms, Ordering::Relaxed);
        true
    }

    /// The timestamp of the request that passed last, Unix milliseconds; 0 if none has.
    pub(super) fn signed_ms(&self) -> i64 {
        self.signed_ms.load(Ordering::Relaxed)
    }

    /// Notes for which account the next request is signed: the exchange's id of it, if known.
    pub(super) fn signs_for(&self, uid: Option<String>) {
        *self.signed_for.lock() = uid;
    }

    /// The account for which the last request was signed: the exchange's id of it, if known.
    pub(super) fn signed_for(&self) -> Option<String> {
        self.signed_for.lock().clone()
    }

    /// Marks a sent request as not executed, with the exchange's rejection if there is one; false after the gate was closed.
    pub(super) fn reopen(&self, refused: Option<&Receipt>) -> bool {
        let mut state = self.state.lock();
        let is_sent = matches!(*state, GateState::Sent(..));
        if is_sent {
            let refused = refused.map(|receipt| GateState::Refused(Box::new(receipt.clone())));
            *state = refused.unwrap_or_default();
        }
        is_sent
    }

    /// Closes the gate for good, and stops a request that is not written completely; returns the state of the call.
    pub(super) fn close(&self) -> Closed {
        match replace(&mut *self.state.lock(), GateState::Closed) {
            GateState::Open | GateState::Closed => Closed::NotSent,
            GateState::Refused(receipt) => Closed::Refused(receipt),
            GateState::Sent(Some(guard), refused) if guard.stop() => {
                refused.map_or(Closed::NotSent, Closed::Refused)
            }
            GateState::Sent(..) => Closed::Sent,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;
    use crate::broker::call::tests::refused;
    use crate::clock::Clock;
    use crate::kucoin::{Host, Site};

    #[test]
    fn nothing_is_sent_after_the_bot_got_not_sent() {
        let gate = Gate::default();
        assert!(matches!(gate.close(), Closed::NotSent));
        assert!(!gate.pass(None, 0));
    }

    #[test]
    fn request_that_the_connection_handed_back_is_not_sent() {
        let gate = Gate::default();
        assert!(gate.pass(None, 0));
        assert!(gate.reopen(None));
        assert!(matches!(gate.close(), Closed::NotSent));
    }

    #[test]
    fn request_stays_sent_after_the_bot_got_maybe_sent() {
        let gate = Gate::default();
        assert!(gate.pass(None, 0));
        assert!(matches!(gate.close(), Closed::Sent));
        assert!(!gate.reopen(None));
        assert!(!gate.pass(None, 0));
    }

    #[test]
    fn rejection_is_kept_until_the_request_is_sent_again() {
        let gate = Gate::default();
        assert!(gate.pass(None, 0));
        assert!(gate.reopen(Some(&refused())));
        let again = Gate::default();
        assert!(again.pass(None, 0) && again.reopen(Some(&refused())) && again.pass(None, 0));
        assert!(matches!(gate.close(), Closed::Refused(_)));
        assert!(matches!(again.close(), Closed::Sent));
    }

    #[test]
    fn request_that_is_not_written_yet_is_stopped_and_an_earlier_rejection_is_its_answer() {
        let guard = || {
            let (clock, deadline) = (Clock::system(), Instant::now() + Duration::from_secs(60));
            let host_id = (Site::Global, Host::Spot);
            Arc::new(SendGuard::new(Arc::new(clock), host_id, None, deadline))
        };
        let (first, second) = (guard(), guard());
        let (gate, again) = (Gate::default(), Gate::default());
        assert!(gate.pass(Some(Arc::clone(&first)), 0));
        assert!(matches!(gate.close(), Closed::NotSent));
        assert!(again.pass(None, 0) && again.reopen(Some(&refused())));
        assert!(again.pass(Some(Arc::clone(&second)), 0));
        assert!(matches!(again.close(), Closed::Refused(_)));
        assert!(first.stop() && second.stop());
    }
}
