//! Why a call failed: the errors of every step, joined.

use std::time::Duration;

use crate::audit::AuditError;
use crate::base::outcome::Reason;
use crate::base::text::clean;
use crate::clock::ClockUncertain;
use crate::egress::proof::EgressMismatch;
use crate::egress::{ConnectError, SendError};
use crate::keyring::KeyUnavailable;
use crate::kucoin::Malformed;
use crate::kucoin::sign::SignError;
use crate::policy::Denied;
use crate::restrictions::Restricted;

/// Characters shown of an unknown method: ours have fewer.
const METHOD_CHARS: usize = 100;

/// Why a call failed. `Display` is one sentence for the bot; causes go to the log.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BrokerError {
    /// The bot's time ran out after the request had left.
    #[error(
        "the request was sent, but no answer came before the deadline; look it up before you repeat it"
    )]
    AnswerLate,
    /// The audit log cannot be written.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// Nobody knows the exchange's time well enough.
    #[error(transparent)]
    Clock(#[from] ClockUncertain),
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The bot's time ran out before anything was sent.
    #[error("deadline exceeded before send; nothing was sent")]
    DeadlineExceeded,
    /// The rules say no.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// Requests do not provably leave from the right address.
    #[error("{0}; nothing was sent")]
    Egress(#[from] EgressMismatch),
    /// A defect of the broker.
    #[error(
        "the broker failed; the request may have been sent: look it up and quote the request id"
    )]
    Internal,
    /// No key.
    #[error(transparent)]
    Key(#[from] KeyUnavailable),
    /// Fields that are not as they must be.
    #[error("malformed request: {}", sentence(.0))]
    Malformed(Vec<Malformed>),
    /// No service has this method.
    #[error("unknown method {}; expected /credbroker.v1.Broker/SignAndSend; nothing was sent", clean(.0, METHOD_CHARS))]
    MethodUnknown(String),
    /// One too many at once.
    #[error(transparent)]
    Overloaded(#[from] Overload),
    /// Sent or not, it failed.
    #[error(transparent)]
    Send(#[from] SendError),
    /// An admin has forbidden it.
    #[error(transparent)]
    Restricted(#[from] Restricted),
    /// The broker is stopping.
    #[error("the broker is stopping; nothing was sent")]
    ShuttingDown,
    /// The bot's certificate is not good any more: it has expired, or its CA is trusted no longer.
    #[error("the certificate of this connection is no longer trusted; reconnect with a valid one")]
    Untrusted,
    /// The request took too long to arrive.
    #[error("request not received within {} ms; nothing was sent", .0.as_millis())]
    Slow(Duration),
    /// It cannot be signed.
    #[error(transparent)]
    Sign(#[from] SignError),
}

/// One too many at once.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Overload {
    /// Calls in flight, over all bots.
    #[error(
        "the broker is at its limit of {0} in-flight calls (limits.calls_in_flight); nothing was sent"
    )]
    Calls(usize),
    /// Calls in flight of this bot.
    #[error(
        "the bot exceeded its limit of {0} in-flight calls (limits.calls_in_flight_per_bot); nothing was sent"
    )]
    CallsOfBot(usize),
    /// Connections, over all bots.
    #[error("the broker is at its limit of {0} connections (limits.connections); nothing was sent")]
    Connections(usize),
    /// Connections of this bot.
    #[error(
        "the bot exceeded its limit of {0} connections (limits.connections_per_bot); share one; nothing was sent"
    )]
    ConnectionsOfBot(usize),
    /// Calls for health and reflection of this bot.
    #[error("the bot exceeded its limit of {0} open health and reflection calls; nothing was sent")]
    HelpersOfBot(usize),
}

fn sentence(problems: &[Malformed]) -> String {
    let problems: Vec<_> = problems
        .iter()
        .map(|p| format!("{}: {}", p.field, p.problem))
        .collect();
    problems.join("; ")
}

impl BrokerError {
    /// The word for it.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::AnswerLate
            | Self::Send(
                SendError::AnswerLost(_)
                | SendError::AnswerOfAnother
                | SendError::AnswerTimeout(_)
                | SendError::AnswerTooLarge(_),
            ) => Reason::AnswerLost,
            Self::Audit(_) => Reason::AuditUnavailable,
            Self::Clock(_) => Reason::ClockUncertain,
            Self::Connect(_) | Self::Send(SendError::HandedBack(_)) => Reason::ExchangeUnreachable,
            Self::DeadlineExceeded | Self::Slow(_) => Reason::DeadlineExceeded,
            Self::Denied(Denied::Caller(_)) | Self::Untrusted => Reason::CallerUnknown,
            Self::Denied(_) => Reason::PolicyDenied,
            Self::Egress(_) => Reason::EgressMismatch,
            Self::Internal | Self::Sign(SignError::Rewritten | SignError::Unwritable(_)) => {
                Reason::Internal
            }
            Self::Key(_) | Self::Sign(SignError::PartnerKeyMissing) => Reason::KeyUnavailable,
            Self::Malformed(_) => Reason::RequestMalformed,
            Self::MethodUnknown(_) => Reason::MethodUnknown,
            Self::Overloaded(_) => Reason::Overloaded,
            Self::Restricted(Restricted::Blocked) => Reason::CallerBlocked,
            Self::Restricted(Restricted::Halted(_)) => Reason::AccountFrozen,
            Self::ShuttingDown => Reason::ShuttingDown,
        }
    }

    /// One sentence for a request that can be repeated without harm, such as a read or a cancel: there is nothing to look up
    /// before.
    pub(crate) fn of_repeatable_request(&self) -> String {
        match self.reason() {
            Reason::AnswerLost => "no complete answer came from the exchange".to_owned(),
            _ => self.to_string(),
        }
    }

    /// What the audit line says of it: of a malformed request only which fields, since their values are the bot's.
    pub(crate) fn for_the_record(&self) -> String {
        match self {
            Self::Malformed(problems) => {
                let fields: Vec<_> = problems.iter().map(|p| p.field.as_str()).collect();
                format!("malformed: {}", fields.join(", "))
            }
            other => other.to_string(),
        }
    }
}
