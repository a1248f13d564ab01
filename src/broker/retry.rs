//! Whether a request is sent again. Pure; the table of its test is the rule.

use super::{BrokerError, Receipt};
use crate::base::outcome::Outcome;
use crate::egress::SendError;
use crate::kucoin::code::{KEY_REFUSED, TIMESTAMP_REFUSED};

/// How an attempt ended, as far as a retry depends on it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Attempt<'a> {
    /// It left, and no whole answer came back.
    AnswerLost,
    /// It was provably not sent: the connection gave the request back.
    HandedBack,
    /// No connection was made.
    NotConnected,
    /// The exchange did not execute it, and answered with this code.
    Rejected(&'a str),
    /// Accepted, or failed in a way that a retry does not mend.
    Settled,
}

/// Why a request is sent again, newly signed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Retry {
    AnswerLost,
    HandedBack,
    KeyRefused,
    NotConnected,
    TimestampRefused,
}

/// Retries that have been used: each cause allows one.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct RetryBudget {
    /// Another key.
    key: bool,
    /// The request as it was.
    repeated: bool,
    /// The exchange's time.
    time: bool,
}

impl<'a> Attempt<'a> {
    pub(super) fn of(last: &'a Result<Receipt, BrokerError>) -> Self {
        match last {
            Ok(receipt) if receipt.answer.outcome == Outcome::Rejected => {
                Self::Rejected(&receipt.answer.code)
            }
            Err(BrokerError::Connect(_)) => Self::NotConnected,
            Err(BrokerError::Send(SendError::HandedBack(_))) => Self::HandedBack,
            Err(BrokerError::Send(SendError::AnswerLost(_) | SendError::AnswerTimeout(_))) => {
                Self::AnswerLost
            }
            _ => Self::Settled,
        }
    }
}

impl Retry {
    /// For the log.
    pub(super) fn cause(self) -> &'static str {
        match self {
            Self::AnswerLost => "answer lost, and the request may be repeated",
            Self::HandedBack => "connection closed before the send",
            Self::KeyRefused => "key refused",
            Self::NotConnected => "connect failed",
            Self::TimestampRefused => "timestamp refused",
        }
    }
}

/// Whether to send again. A request that may have been executed is sent again only if it is idempotent. One that brings the
/// key under test (`has_own_key`) is signed with no other key.
pub(super) fn next(
    last: Attempt<'_>,
    is_idempotent: bool,
    has_own_key: bool,
    budget: &mut RetryBudget,
) -> Option<Retry> {
    let (retry, is_used) = match last {
        Attempt::AnswerLost if is_idempotent => (Retry::AnswerLost, &mut budget.repeated),
        Attempt::HandedBack => (Retry::HandedBack, &mut budget.repeated),
        Attempt::NotConnected => (Retry::NotConnected, &mut budget.repeated),
        Attempt::Rejected(TIMESTAMP_REFUSED) => (Retry::TimestampRefused, &mut budget.time),
        Attempt::Rejected(code) if KEY_REFUSED.contains(&code) && !has_own_key => {
            (Retry::KeyRefused, &mut budget.key)
        }
        Attempt::AnswerLost | Attempt::Rejected(_) | Attempt::Settled => return None,
    };
    (!std::mem::replace(is_used, true)).then_some(retry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_did_not_happen_or_does_no_harm_twice_goes_again_and_each_remedy_once() {
        // How the attempt ended, idempotent, own key: the retry. Ending the same way again gives none.
        for (last, is_idempotent, has_own_key, expected) in [
            (Attempt::Settled, true, false, None),
            (Attempt::AnswerLost, false, false, None),
            (Attempt::AnswerLost, true, false, Some(Retry::AnswerLost)),
            (Attempt::HandedBack, false, false, Some(Retry::HandedBack)),
            (
                Attempt::NotConnected,
                false,
                false,
                Some(Retry::NotConnected),
            ),
            (Attempt::Rejected("200004"), true, false, None),
            (
                Attempt::Rejected("400002"),
                false,
                false,
                Some(Retry::TimestampRefused),
            ),
            (
                Attempt::Rejected("400002"),
                false,
                true,
                Some(Retry::TimestampRefused),
            ),
            (
                Attempt::Rejected("400003"),
                false,
                false,
                Some(Retry::KeyRefused),
            ),
            (
                Attempt::Rejected("400004"),
                false,
                false,
                Some(Retry::KeyRefused),
            ),
            (
                Attempt::Rejected("400005"),
                false,
                false,
                Some(Retry::KeyRefused),
            ),
            (Attempt::Rejected("400003"), false, true, None),
            (Attempt::Rejected("400100"), false, false, None),
        ] {
            let mut budget = RetryBudget::default();
            let mut again = || next(last, is_idempotent, has_own_key, &mut budget);
            let case = format!("{last:?}, idempotent {is_idempotent}, own key {has_own_key}");
            assert_eq!((again(), again()), (expected, None), "{case}");
        }
    }

    #[test]
    fn a_lost_connection_is_not_mended_twice_whatever_it_was() {
        let mut budget = RetryBudget::default();
        let mut after = |last| next(last, true, false, &mut budget);
        assert_eq!(after(Attempt::NotConnected), Some(Retry::NotConnected));
        assert_eq!(after(Attempt::HandedBack), None);
        assert_eq!(after(Attempt::AnswerLost), None);
        assert_eq!(
            after(Attempt::Rejected("400002")),
            Some(Retry::TimestampRefused),
            "another remedy is left"
        );
    }
}
