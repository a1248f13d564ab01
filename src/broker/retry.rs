//! Whether a request leaves once more. Pure: the table below the code is the rule.

use super::{BrokerError, Receipt};
use crate::egress::SendError;
use crate::kucoin::code::{KEY_REFUSED, TIMESTAMP_REFUSED};
use crate::outcome::Outcome;

/// How the last try ended, as far as it matters here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Last<'a> {
    /// It left, and no whole answer came back.
    AnswerLost,
    /// It was provably not sent: the connection gave the request back.
    HandedBack,
    /// No connection was made.
    NotConnected,
    /// The exchange did not execute it, and answered with this code.
    Rejected(&'a str),
    /// Accepted, or failed in a way that another try does not mend.
    Settled,
}

/// Why a request leaves once more, signed anew.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Retry {
    AnswerLost,
    HandedBack,
    KeyRefused,
    NotConnected,
    TimestampRefused,
}

/// What has been tried: each remedy helps once.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Tried {
    /// Another key.
    key: bool,
    /// Once more as it was.
    repeated: bool,
    /// The exchange's time.
    time: bool,
}

impl<'a> Last<'a> {
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

/// Whether to try once more. A request that may have been executed goes again only if it is idempotent; one that brought
/// its own key to be tested (`has_own_key`) is not signed with another.
pub(super) fn next(
    last: Last<'_>,
    is_idempotent: bool,
    has_own_key: bool,
    tried: &mut Tried,
) -> Option<Retry> {
    let (retry, is_tried) = match last {
        Last::AnswerLost if is_idempotent => (Retry::AnswerLost, &mut tried.repeated),
        Last::HandedBack => (Retry::HandedBack, &mut tried.repeated),
        Last::NotConnected => (Retry::NotConnected, &mut tried.repeated),
        Last::Rejected(TIMESTAMP_REFUSED) => (Retry::TimestampRefused, &mut tried.time),
        Last::Rejected(code) if KEY_REFUSED.contains(&code) && !has_own_key => {
            (Retry::KeyRefused, &mut tried.key)
        }
        Last::AnswerLost | Last::Rejected(_) | Last::Settled => return None,
    };
    (!std::mem::replace(is_tried, true)).then_some(retry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_did_not_happen_or_does_no_harm_twice_goes_again_and_each_remedy_once() {
        // Last try, idempotent, own key: what comes first and what if it ends the same way again.
        for (last, is_idempotent, has_own_key, expected) in [
            (Last::Settled, true, false, None),
            (Last::AnswerLost, false, false, None),
            (Last::AnswerLost, true, false, Some(Retry::AnswerLost)),
            (Last::HandedBack, false, false, Some(Retry::HandedBack)),
            (Last::NotConnected, false, false, Some(Retry::NotConnected)),
            (Last::Rejected("200004"), true, false, None),
            (
                Last::Rejected("400002"),
                false,
                false,
                Some(Retry::TimestampRefused),
            ),
            (
                Last::Rejected("400002"),
                false,
                true,
                Some(Retry::TimestampRefused),
            ),
            (
                Last::Rejected("400003"),
                false,
                false,
                Some(Retry::KeyRefused),
            ),
            (
                Last::Rejected("400004"),
                false,
                false,
                Some(Retry::KeyRefused),
            ),
            (
                Last::Rejected("400005"),
                false,
                false,
                Some(Retry::KeyRefused),
            ),
            (Last::Rejected("400003"), false, true, None),
            (Last::Rejected("400100"), false, false, None),
        ] {
            let mut tried = Tried::default();
            let mut again = || next(last, is_idempotent, has_own_key, &mut tried);
            let case = format!("{last:?}, idempotent {is_idempotent}, own key {has_own_key}");
            assert_eq!((again(), again()), (expected, None), "{case}");
        }
    }

    #[test]
    fn a_lost_connection_is_not_mended_twice_whatever_it_was() {
        let mut tried = Tried::default();
        let mut after = |last| next(last, true, false, &mut tried);
        assert_eq!(after(Last::NotConnected), Some(Retry::NotConnected));
        assert_eq!(after(Last::HandedBack), None);
        assert_eq!(after(Last::AnswerLost), None);
        assert_eq!(
            after(Last::Rejected("400002")),
            Some(Retry::TimestampRefused),
            "another remedy is left"
        );
    }
}
