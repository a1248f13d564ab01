//! The gate between sending a request and its deadline: exactly one of them wins.

use std::mem::replace;

use super::Receipt;
use crate::base::lock::Mutex;

/// The gate of one call. Without it a bot could get `not_sent` while its order is being sent.
#[derive(Debug, Default)]
pub(super) struct Gate(Mutex<GateState>);

#[derive(Debug, Default)]
enum GateState {
    /// Nothing was sent, or it was provably not executed.
    #[default]
    Open,
    /// The exchange rejected the request; it may be sent once more.
    Refused(Box<Receipt>),
    /// The request was sent.
    Sent,
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
    /// Allows the request to be sent, also a second time; false after the gate was closed.
    pub(super) fn pass(&self) -> bool {
        let mut state = self.0.lock();
        let is_open = !matches!(*state, GateState::Closed);
        if is_open {
            *state = GateState::Sent;
        }
        is_open
    }

    /// Marks a sent request as not executed, with the exchange's rejection if there is one; false after the gate was closed.
    pub(super) fn reopen(&self, refused: Option<&Receipt>) -> bool {
        let mut state = self.0.lock();
        let is_sent = matches!(*state, GateState::Sent);
        if is_sent {
            let refused = refused.map(|receipt| GateState::Refused(Box::new(receipt.clone())));
            *state = refused.unwrap_or_default();
        }
        is_sent
    }

    /// Closes the gate for good; returns the state of the call.
    pub(super) fn close(&self) -> Closed {
        match replace(&mut *self.0.lock(), GateState::Closed) {
            GateState::Open | GateState::Closed => Closed::NotSent,
            GateState::Refused(receipt) => Closed::Refused(receipt),
            GateState::Sent => Closed::Sent,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::call::tests::refused;

    #[test]
    fn nothing_is_sent_after_the_bot_got_not_sent() {
        let gate = Gate::default();
        assert!(matches!(gate.close(), Closed::NotSent));
        assert!(!gate.pass());
    }

    #[test]
    fn request_that_the_connection_handed_back_is_not_sent() {
        let gate = Gate::default();
        assert!(gate.pass());
        assert!(gate.reopen(None));
        assert!(matches!(gate.close(), Closed::NotSent));
    }

    #[test]
    fn request_stays_sent_after_the_bot_got_maybe_sent() {
        let gate = Gate::default();
        assert!(gate.pass());
        assert!(matches!(gate.close(), Closed::Sent));
        assert!(!gate.reopen(None));
        assert!(!gate.pass());
    }

    #[test]
    fn rejection_is_kept_until_the_request_is_sent_again() {
        let gate = Gate::default();
        assert!(gate.pass());
        assert!(gate.reopen(Some(&refused())));
        let again = Gate::default();
        assert!(again.pass() && again.reopen(Some(&refused())) && again.pass());
        assert!(matches!(gate.close(), Closed::Refused(_)));
        assert!(matches!(again.close(), Closed::Sent));
    }
}
