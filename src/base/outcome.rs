//! Outcomes and reasons of calls, with their names in errors, metrics, audit lines and the proto.

use std::fmt;

use serde::{Serialize, Serializer};

/// What is known about a request once its call has ended.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Outcome {
    /// The exchange accepted the request.
    Accepted,
    /// It may have reached the exchange and been executed; the outcome is unknown.
    MaybeSent,
    /// Nothing left the broker.
    NotSent,
    /// The exchange rejected the request; nothing was executed.
    Rejected,
}

impl Outcome {
    /// The name in metrics, audit lines and `ErrorInfo`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::MaybeSent => "maybe_sent",
            Self::NotSent => "not_sent",
            Self::Rejected => "rejected",
        }
    }
}

impl Serialize for Outcome {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a call failed: `ErrorInfo.reason`, and the label of the same name in metrics and audit lines.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Reason {
    /// An admin has halted the account, and the request is risk-increasing.
    AccountFrozen,
    /// The request may have reached the exchange, but no complete answer was received.
    AnswerLost,
    /// The audit log cannot be written, and the request is risk-increasing.
    AuditUnavailable,
    /// An admin has blocked this bot.
    CallerBlocked,
    /// No rule names this bot.
    CallerUnknown,
    /// A cancel that covers the order came while the order waited for the rate limit.
    CancelledWhileWaiting,
    /// The clientOid was used for a request with another body.
    ClientOidReused,
    /// The exchange's time is not known well enough, and the request is risk-increasing.
    ClockUncertain,
    /// The deadline or `not_after_ms` passed, or the caller went away, before anything was sent.
    DeadlineExceeded,
    /// The egress address is not proven to be the expected one, and the request is risk-increasing.
    EgressMismatch,
    /// No connection to the exchange could be made.
    ExchangeUnreachable,
    /// A defect of the broker.
    Internal,
    /// No usable key of the account is loaded.
    KeyUnavailable,
    /// No service has the called method.
    MethodUnknown,
    /// The clientOid was used before, in a request with the same body.
    OrderRepeated,
    /// Too many calls or connections at once.
    Overloaded,
    /// The rules do not allow it.
    PolicyDenied,
    /// The request does not fit into the rate limits of the exchange now.
    RateLimited,
    /// A field of the request is invalid.
    RequestMalformed,
    /// The broker is shutting down.
    ShuttingDown,
}

impl Reason {
    /// All reasons.
    pub const ALL: [Self; 20] = [
        Self::AccountFrozen,
        Self::AnswerLost,
        Self::AuditUnavailable,
        Self::CallerBlocked,
        Self::CallerUnknown,
        Self::CancelledWhileWaiting,
        Self::ClientOidReused,
        Self::ClockUncertain,
        Self::DeadlineExceeded,
        Self::EgressMismatch,
        Self::ExchangeUnreachable,
        Self::Internal,
        Self::KeyUnavailable,
        Self::MethodUnknown,
        Self::OrderRepeated,
        Self::Overloaded,
        Self::PolicyDenied,
        Self::RateLimited,
        Self::RequestMalformed,
        Self::ShuttingDown,
    ];

    /// The name in metrics, audit lines and `ErrorInfo`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AccountFrozen => "ACCOUNT_FROZEN",
            Self::AnswerLost => "ANSWER_LOST",
            Self::AuditUnavailable => "AUDIT_UNAVAILABLE",
            Self::CallerBlocked => "CALLER_BLOCKED",
            Self::CallerUnknown => "CALLER_UNKNOWN",
            Self::CancelledWhileWaiting => "CANCELLED_WHILE_WAITING",
            Self::ClientOidReused => "CLIENT_OID_REUSED",
            Self::ClockUncertain => "CLOCK_UNCERTAIN",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::EgressMismatch => "EGRESS_MISMATCH",
            Self::ExchangeUnreachable => "EXCHANGE_UNREACHABLE",
            Self::Internal => "INTERNAL",
            Self::KeyUnavailable => "KEY_UNAVAILABLE",
            Self::MethodUnknown => "METHOD_UNKNOWN",
            Self::OrderRepeated => "ORDER_REPEATED",
            Self::Overloaded => "OVERLOADED",
            Self::PolicyDenied => "POLICY_DENIED",
            Self::RateLimited => "RATE_LIMITED",
            Self::RequestMalformed => "REQUEST_MALFORMED",
            Self::ShuttingDown => "SHUTTING_DOWN",
        }
    }

    /// The outcome of a call that fails for this reason; `None` if the error is about an earlier order.
    pub(crate) fn outcome(self) -> Option<Outcome> {
        Some(match self {
            Self::ClientOidReused | Self::OrderRepeated => return None,
            Self::AnswerLost | Self::Internal => Outcome::MaybeSent,
            Self::AccountFrozen
            | Self::AuditUnavailable
            | Self::CallerBlocked
            | Self::CallerUnknown
            | Self::CancelledWhileWaiting
            | Self::ClockUncertain
            | Self::DeadlineExceeded
            | Self::EgressMismatch
            | Self::ExchangeUnreachable
            | Self::KeyUnavailable
            | Self::MethodUnknown
            | Self::Overloaded
            | Self::PolicyDenied
            | Self::RateLimited
            | Self::RequestMalformed
            | Self::ShuttingDown => Outcome::NotSent,
        })
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
