//! Decides between a request about to leave and a deadline about to pass: exactly one of them wins.

use std::mem::replace;

use super::Receipt;
use crate::base::lock::Mutex;

/// The gate of one call. Without it a bot could be told `not_sent` while its order leaves.
#[derive(Debug, Default)]
pub(super) struct Gate(Mutex<GateState>);

#[derive(Debug, Default)]
enum GateState {
    /// Nothing has left, or what left provably did not arrive.
    #[default]
    Open,
    /// The exchange has refused the request, which may leave once more, for a better answer.
    Refused(Box<Receipt>),
    /// The request is on its way.
    Left,
    /// The bot has its answer.
    Closed,
}

/// How a call stood when its gate was closed.
#[derive(Debug)]
pub(super) enum Closed {
    /// Nothing has been sent, and nothing will be.
    NotSent,
    /// The exchange has given this answer.
    Refused(Box<Receipt>),
    /// Nobody knows yet.
    Sent,
}

impl Gate {
    /// Lets the request leave, also a second time; false once the bot has its answer.
    pub(super) fn pass(&self) -> bool {
        let mut state = self.0.lock();
        let is_open = !matches!(*state, GateState::Closed);
        if is_open {
            *state = GateState::Left;
        }
        is_open
    }

    /// Marks the request as not executed after all, with the answer that says so if there is one; false once the bot has
    /// been told that it may have been executed.
    pub(super) fn reopen(&self, refused: Option<&Receipt>) -> bool {
        let mut state = self.0.lock();
        let has_left = matches!(*state, GateState::Left);
        if has_left {
            let refused = refused.map(|receipt| GateState::Refused(Box::new(receipt.clone())));
            *state = refused.unwrap_or_default();
        }
        has_left
    }

    /// Closes the gate for good; returns how the call stood.
    pub(super) fn close(&self) -> Closed {
        match replace(&mut *self.0.lock(), GateState::Closed) {
            GateState::Open | GateState::Closed => Closed::NotSent,
            GateState::Refused(receipt) => Closed::Refused(receipt),
            GateState::Left => Closed::Sent,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::call::tests::refused;

    #[test]
    fn a_call_that_was_told_not_sent_sends_nothing() {
        let gate = Gate::default();
        assert!(matches!(gate.close(), Closed::NotSent));
        assert!(!gate.pass());
    }

    #[test]
    fn a_call_that_was_handed_back_counts_as_not_sent() {
        let gate = Gate::default();
        assert!(gate.pass());
        assert!(gate.reopen(None));
        assert!(matches!(gate.close(), Closed::NotSent));
    }

    #[test]
    fn a_call_that_left_cannot_be_taken_back_once_told() {
        let gate = Gate::default();
        assert!(gate.pass());
        assert!(matches!(gate.close(), Closed::Sent));
        assert!(!gate.reopen(None));
        assert!(!gate.pass());
    }

    #[test]
    fn a_refusal_is_kept_until_the_request_leaves_once_more() {
        let gate = Gate::default();
        assert!(gate.pass());
        assert!(gate.reopen(Some(&refused())));
        let again = Gate::default();
        assert!(again.pass() && again.reopen(Some(&refused())) && again.pass());
        assert!(matches!(gate.close(), Closed::Refused(_)));
        assert!(matches!(again.close(), Closed::Sent));
    }
}
