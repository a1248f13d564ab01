//! Decides whether a request is sent again. Pure; the table in its test has every case.

use super::{BrokerError, Receipt};
use crate::base::outcome::Outcome;
use crate::egress::SendError;
use crate::kucoin::code::{KEY_REFUSED, TIMESTAMP_REFUSED};

/// How an attempt ended, as far as a retry depends on it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Attempt<'a> {
    /// It was sent, and no complete answer came back.
    AnswerLost,
    /// It was provably not sent: the connection gave the request back.
    NotWritten,
    /// No connection was made.
    NotConnected,
    /// The exchange rejected it with this code and did not execute it.
    Rejected(&'a str),
    /// Accepted, or failed in a way that a retry cannot fix.
    Settled,
}

/// Why a request is sent again, with a new signature.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Retry {
    AnswerLost,
    NotWritten,
    KeyRefused,
    NotConnected,
    TimestampRefused,
}

/// Retries that have been used: each cause allows one.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct RetryBudget {
    /// With another key.
    key: bool,
    /// After a failed connect, a request handed back, or a lost answer.
    repeated: bool,
    /// With a new measurement of the exchange's time.
    time: bool,
}

impl<'a> Attempt<'a> {
    pub(super) fn of(last: &'a Result<Receipt, BrokerError>) -> Self {
        match last {
            Ok(receipt) if receipt.answer.outcome == Outcome::Rejected => {
                Self::Rejected(&receipt.answer.code)
            }
            Err(BrokerError::Connect(_)) => Self::NotConnected,
            Err(BrokerError::Send(SendError::NotWritten(_))) => Self::NotWritten,
            Err(BrokerError::Send(
                SendError::AnswerLost(_) | SendError::AnswerTimeout(_) | SendError::Informational,
            )) => Self::AnswerLost,
            _ => Self::Settled,
        }
    }
}

impl Retry {
    /// The cause, for the log.
    pub(super) fn cause(self) -> &'static str {
        match self {
            Self::AnswerLost => "answer lost; the request is idempotent",
            Self::NotWritten => "connection closed before the send",
            Self::KeyRefused => "key rejected",
            Self::NotConnected => "connect failed",
            Self::TimestampRefused => "timestamp rejected",
        }
    }
}

/// Decides whether to send again. A request that may have been executed is sent again only if it is idempotent. A request
/// that tests a key (`has_own_key`) is never signed with another one.
pub(super) fn next(
    last: Attempt<'_>,
    is_idempotent: bool,
    has_own_key: bool,
    budget: &mut RetryBudget,
) -> Option<Retry> {
    let (retry, is_used) = match last {
        Attempt::AnswerLost if is_idempotent => (Retry::AnswerLost, &mut budget.repeated),
        Attempt::NotWritten => (Retry::NotWritten, &mut budget.repeated),
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
    fn unexecuted_or_idempotent_requests_are_sent_again_once_per_cause() {
        // How the attempt ended, idempotent, own key: the retry. Ending the same way again gives none.
        for (last, is_idempotent, has_own_key, expected) in [
            (Attempt::Settled, true, false, None),
            (Attempt::AnswerLost, false, false, None),
            (Attempt::AnswerLost, true, false, Some(Retry::AnswerLost)),
            (Attempt::NotWritten, false, false, Some(Retry::NotWritten)),
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
    fn failed_connect_hand_back_and_lost_answer_share_one_retry() {
        let mut budget = RetryBudget::default();
        let mut after = |last| next(last, true, false, &mut budget);
        assert_eq!(after(Attempt::NotConnected), Some(Retry::NotConnected));
        assert_eq!(after(Attempt::NotWritten), None);
        assert_eq!(after(Attempt::AnswerLost), None);
        assert_eq!(
            after(Attempt::Rejected("400002")),
            Some(Retry::TimestampRefused),
            "the retry with a new time is still unused"
        );
    }
}
