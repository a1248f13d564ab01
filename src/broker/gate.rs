//! Decides between a request that is about to leave and a deadline that is about to pass: exactly one of them wins.

use std::sync::atomic::{AtomicU8, Ordering};

const WAITING: u8 = 0;
const TAKEN: u8 = 1;
const CLOSED: u8 = 2;

/// The gate of one call. Without it a bot could be told `not_sent` while its order leaves.
#[derive(Debug, Default)]
pub(super) struct Gate(AtomicU8);

impl Gate {
    /// Lets the request through, again if need be; false once the bot has been told how its call ended.
    pub(super) fn take(&self) -> bool {
        let open = |state| (state != CLOSED).then_some(TAKEN);
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, open)
            .is_ok()
    }

    /// Takes it back, when it provably was not sent; false once the bot has been told that it may have been.
    pub(super) fn hand_back(&self) -> bool {
        self.0
            .compare_exchange(TAKEN, WAITING, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Lets nothing through any more; true when the request went through before.
    pub(super) fn close(&self) -> bool {
        self.0.swap(CLOSED, Ordering::AcqRel) == TAKEN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_was_told_not_sent_sends_nothing() {
        let gate = Gate::default();
        assert!(!gate.close());
        assert!(!gate.take());
    }

    #[test]
    fn a_call_that_was_handed_back_counts_as_not_sent() {
        let gate = Gate::default();
        assert!(gate.take());
        assert!(gate.hand_back());
        assert!(!gate.close());
    }

    #[test]
    fn a_call_that_left_cannot_be_taken_back_once_told() {
        let gate = Gate::default();
        assert!(gate.take());
        assert!(gate.close());
        assert!(!gate.hand_back());
        assert!(!gate.take());
    }
}
