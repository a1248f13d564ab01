//! Why a call failed: the errors of every step, joined.

use crate::audit::AuditError;
use crate::egress::{ConnectError, SendError};
use crate::keyring::KeyUnavailable;
use crate::kucoin::Malformed;
use crate::kucoin::sign::SignError;
use crate::outcome::Reason;
use crate::policy::Denied;

/// Why a call failed. `Display` is one sentence for the bot; causes go to the log.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The bot's time ran out after the request had left.
    #[error(
        "the request is on its way to the exchange, but no answer came in time; look it up before repeating it"
    )]
    AnswerLate,
    /// The audit file cannot be written.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The bot's time ran out before anything was sent.
    #[error("the time limit passed before anything was sent; nothing will be")]
    DeadlineExceeded,
    /// The rules say no.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// A defect of the broker.
    #[error(
        "the broker failed; the request may have been sent: look it up and quote the request id"
    )]
    Internal,
    /// No key.
    #[error(transparent)]
    Key(#[from] KeyUnavailable),
    /// Fields that are not as they must be.
    #[error("the request is malformed: {}", sentence(.0))]
    Malformed(Vec<Malformed>),
    /// Sent or not, it failed.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The broker is stopping.
    #[error("the broker is stopping; nothing was sent")]
    ShuttingDown,
    /// It cannot be signed.
    #[error(transparent)]
    Sign(#[from] SignError),
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
    pub fn reason(&self) -> Reason {
        match self {
            Self::AnswerLate
            | Self::Send(
                SendError::AnswerLost(_)
                | SendError::AnswerTimeout(_)
                | SendError::AnswerTooLarge(_),
            ) => Reason::AnswerLost,
            Self::Audit(_) => Reason::AuditUnavailable,
            Self::Connect(_) | Self::Send(SendError::HandedBack(_)) => Reason::ExchangeUnreachable,
            Self::DeadlineExceeded => Reason::DeadlineExceeded,
            Self::Denied(Denied::Caller(_)) => Reason::CallerUnknown,
            Self::Denied(_) => Reason::PolicyDenied,
            Self::Internal | Self::Sign(SignError::Rewritten | SignError::Unwritable(_)) => {
                Reason::Internal
            }
            Self::Key(_) | Self::Sign(SignError::PartnerKeyMissing) => Reason::KeyUnavailable,
            Self::Malformed(_) => Reason::RequestMalformed,
            Self::ShuttingDown => Reason::ShuttingDown,
        }
    }
}
