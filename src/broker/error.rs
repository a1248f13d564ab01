//! The error of a call: the errors of all its steps in one type.

use std::time::Duration;

use super::not_after::NotAfterPassed;
use crate::audit::AuditError;
use crate::base::outcome::{Outcome, Reason};
use crate::base::text::clean;
use crate::budgets::NoBudget;
use crate::clock::ClockUncertain;
use crate::egress::proof::EgressMismatch;
use crate::egress::{ConnectError, SendError};
use crate::keyring::KeyUnavailable;
use crate::kucoin::Malformed;
use crate::kucoin::sign::SignError;
use crate::orders::{ClaimsUnknown, Repeated};
use crate::policy::Denied;
use crate::restrictions::Restricted;

/// Characters shown of an unknown method; the broker's own names are shorter.
const METHOD_CHARS: usize = 100;

/// Why a call failed. `Display` is the message for the bot; causes go to the log.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BrokerError {
    /// The deadline passed after the request was sent.
    #[error(
        "the request was sent, but no answer came before the deadline; look it up before you repeat it"
    )]
    AnswerLate,
    /// The memory for answers was used up while the answer to a read arrived.
    #[error("{0}; the exchange received this read, but its answer was dropped; repeat it later")]
    AnswerDropped(AnswerLimit),
    /// The audit log cannot be written.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The caller of a read or of a risk-increasing request went away before it was sent.
    #[error("the caller cancelled the call or disconnected; nothing was sent")]
    CallerGone,
    /// The exchange's time is not known exactly enough, or too far from the system's.
    #[error("{0}; nothing was sent")]
    Clock(ClockUncertain),
    /// The broker does not know yet, or not completely, which clientOids earlier runs used.
    #[error(transparent)]
    ClaimsUnknown(#[from] ClaimsUnknown),
    /// No connection to the exchange.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The deadline passed before anything was sent.
    #[error("deadline exceeded before send; nothing was sent")]
    DeadlineExceeded,
    /// The rules do not allow the request.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The exchange has not confirmed that requests leave from the expected address.
    #[error("{0}; nothing was sent")]
    Egress(EgressMismatch),
    /// A defect of the broker.
    #[error(
        "internal error; the request may have been sent: look it up, and report the request id to an admin"
    )]
    Internal,
    /// The key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyUnavailable),
    /// Invalid fields.
    #[error("malformed request: {}", joined(.0))]
    Malformed(Vec<Malformed>),
    /// No service has this method.
    #[error("unknown method {}; expected SignAndSend, GetOutcome or GetBudget of /credbroker.v1.Broker; nothing was sent", clean(.0, METHOD_CHARS))]
    MethodUnknown(String),
    /// `not_after_ms` has passed.
    #[error(transparent)]
    NotAfter(#[from] NotAfterPassed),
    /// A limit of calls, connections or memory was reached.
    #[error(transparent)]
    Overloaded(#[from] Overload),
    /// It does not fit into the rate limits of the exchange in time, or was cancelled while it waited.
    #[error(transparent)]
    NoBudget(#[from] NoBudget),
    /// The caller of a read went away after the request was sent.
    #[error("the caller cancelled the call or disconnected; its read was dropped")]
    ReadDropped,
    /// Its clientOid was used before.
    #[error("{0}")]
    Repeated(Box<Repeated>),
    /// Sending failed, or the answer was lost.
    #[error(transparent)]
    Send(#[from] SendError),
    /// An admin has blocked the bot or halted the account.
    #[error(transparent)]
    Restricted(#[from] Restricted),
    /// The broker is stopping.
    #[error("the broker is stopping; nothing was sent")]
    ShuttingDown,
    /// The bot's certificate has expired, or its CA is no longer trusted.
    #[error("the certificate of this connection is no longer trusted; reconnect with a valid one")]
    Untrusted,
    /// The request took too long to arrive.
    #[error("request not received within {} ms; nothing was sent", .0.as_millis())]
    Slow(Duration),
    /// The request cannot be signed.
    #[error(transparent)]
    Sign(#[from] SignError),
}

/// The limit of answers in memory that was reached.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum AnswerLimit {
    /// That of all bots.
    #[error("the broker is at its limit of {0} bytes of answers in memory (limits.answer_bytes)")]
    All(usize),
    /// That of this bot.
    #[error(
        "the bot exceeded its limit of {0} bytes of answers in memory (limits.answer_bytes_per_bot)"
    )]
    OfBot(usize),
}

/// The limit that was reached.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Overload {
    /// Answers in memory.
    #[error("{0}; nothing was sent")]
    Answers(AnswerLimit),
    /// Calls in flight of all bots.
    #[error(
        "the broker is at its limit of {0} in-flight calls (limits.calls_in_flight); nothing was sent"
    )]
    Calls(usize),
    /// Calls in flight of this bot.
    #[error(
        "the bot exceeded its limit of {0} in-flight calls (limits.calls_in_flight_per_bot, or calls_in_flight in the rules); nothing was sent"
    )]
    CallsOfBot(usize),
    /// Cancels in flight of all bots, beyond the calls in flight.
    #[error(
        "the broker is at its limit of {0} in-flight cancels (limits.cancels_in_flight); nothing was sent"
    )]
    Cancels(usize),
    /// Cancels in flight of this bot, beyond its calls in flight.
    #[error(
        "the bot exceeded its limit of {0} in-flight cancels (limits.cancels_in_flight_per_bot); nothing was sent"
    )]
    CancelsOfBot(usize),
    /// clientOids of this bot that are kept, none of which can be removed.
    #[error(
        "the bot exceeded its limit of {0} clientOids that are kept (orders.claims_per_bot), and none of their orders is known to be accepted and older than 15 min; nothing was sent"
    )]
    ClaimsOfBot(usize),
    /// Connections of all bots.
    #[error("the broker is at its limit of {0} connections (limits.connections); nothing was sent")]
    Connections(usize),
    /// Connections of this bot.
    #[error(
        "the bot exceeded its limit of {0} connections (limits.connections_per_bot); use one connection for all its calls; nothing was sent"
    )]
    ConnectionsOfBot(usize),
    /// Health and reflection calls of this bot.
    #[error("the bot exceeded its limit of {0} open health and reflection calls; nothing was sent")]
    HelpersOfBot(usize),
    /// Bytes of requests of all bots that are being received.
    #[error("the broker is at its limit of {0} bytes of requests being received; nothing was sent")]
    MessageBytes(usize),
    /// Bytes of requests of this bot that are being received.
    #[error("the bot exceeded its limit of {0} bytes of requests being received; nothing was sent")]
    MessageBytesOfBot(usize),
    /// Requests of this bot that are being received.
    #[error("the bot exceeded its limit of {0} requests being received; nothing was sent")]
    MessagesOfBot(usize),
}

// These two are not `#[from]`, which would make them sources: the message contains them, and the log would repeat them.
impl From<ClockUncertain> for BrokerError {
    fn from(uncertain: ClockUncertain) -> Self {
        Self::Clock(uncertain)
    }
}

impl From<EgressMismatch> for BrokerError {
    fn from(mismatch: EgressMismatch) -> Self {
        Self::Egress(mismatch)
    }
}

fn joined(problems: &[Malformed]) -> String {
    let problems: Vec<_> = problems
        .iter()
        .map(|p| format!("{}: {}", p.field, p.problem))
        .collect();
    problems.join("; ")
}

impl BrokerError {
    /// The reason that is reported for it.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::AnswerLate
            | Self::ReadDropped
            | Self::Send(
                SendError::AnswerLost(_)
                | SendError::Informational
                | SendError::WrongAnswer
                | SendError::AnswerTimeout(_)
                | SendError::AnswerTooLarge(_),
            ) => Reason::AnswerLost,
            Self::Audit(_) | Self::ClaimsUnknown(_) => Reason::AuditUnavailable,
            Self::Clock(_) => Reason::ClockUncertain,
            Self::Connect(_) | Self::Send(SendError::NotWritten(_)) => Reason::ExchangeUnreachable,
            Self::CallerGone
            | Self::DeadlineExceeded
            | Self::NotAfter(_)
            | Self::Send(SendError::Stopped)
            | Self::Slow(_) => Reason::DeadlineExceeded,
            Self::Denied(Denied::Caller(_)) | Self::Untrusted => Reason::CallerUnknown,
            Self::Denied(_) => Reason::PolicyDenied,
            Self::Egress(_) => Reason::EgressMismatch,
            Self::Internal | Self::Sign(SignError::Rewritten | SignError::Unwritable(_)) => {
                Reason::Internal
            }
            Self::Key(_) | Self::Sign(SignError::PartnerKeyMissing) => Reason::KeyUnavailable,
            Self::Malformed(_) => Reason::RequestMalformed,
            Self::MethodUnknown(_) => Reason::MethodUnknown,
            Self::AnswerDropped(_) | Self::Overloaded(_) => Reason::Overloaded,
            Self::NoBudget(NoBudget::Cancelled) => Reason::CancelledWhileWaiting,
            Self::NoBudget(NoBudget::RateLimited(_)) => Reason::RateLimited,
            Self::Repeated(repeated) if repeated.is_same => Reason::OrderRepeated,
            Self::Repeated(_) => Reason::ClientOidReused,
            Self::Restricted(Restricted::Blocked) => Reason::CallerBlocked,
            Self::Restricted(Restricted::Halted(_)) => Reason::AccountFrozen,
            Self::ShuttingDown => Reason::ShuttingDown,
        }
    }

    /// What is known about the request: the outcome of the reason, except that the exchange got a read whose answer was
    /// dropped. `None` if the error is about an earlier order.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        match self {
            Self::AnswerDropped(_) => Some(Outcome::MaybeSent),
            _ => self.reason().outcome(),
        }
    }

    /// The message for a request that can be repeated without harm, such as a read or a cancel: it does not ask to look the
    /// request up first.
    pub(crate) fn of_repeatable_request(&self) -> String {
        match self.reason() {
            Reason::AnswerLost => "no complete answer came from the exchange".to_owned(),
            _ => self.to_string(),
        }
    }

    /// The text for the audit log. Of a malformed request it has only the names of fields, since problems can quote values.
    pub(crate) fn audit_detail(&self) -> String {
        match self {
            Self::Malformed(problems) => {
                let fields: Vec<_> = problems.iter().map(|p| p.field.as_str()).collect();
                format!("malformed: {}", fields.join(", "))
            }
            other => other.to_string(),
        }
    }
}
