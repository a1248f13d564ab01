//! The errors of admin calls, and their gRPC status.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::status::{DOMAIN, add_violations, cut};
use crate::base::ids::{AccountId, KeyName};
use crate::base::outcome::Reason;
use crate::base::text::clean;
use crate::clock::HostId;
use crate::kucoin::Malformed;
use crate::restrictions::RestrictionsError;
use crate::telemetry::chain;

/// Why an admin's call failed. `Display` is the message for the admin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdminError {
    /// The account is not in the rules.
    #[error("unknown account {0}; run `credbroker keys list` to list the accounts in the rules")]
    AccountUnknown(AccountId),
    /// The exchange's time at this host has not been measured yet.
    #[error("the clock of {} has not been measured yet; nothing was accepted", host_name(*.0))]
    ClockUnknown(HostId),
    /// The caller's certificate has expired, or its CA is no longer trusted.
    #[error("the certificate of this connection has expired, or its CA is no longer trusted")]
    CallerUnknown,
    /// The state folder cannot be written.
    #[error(
        "the gap is accepted, but a restart would open it again: orders.json in the state folder cannot be written: {0}"
    )]
    Gap(std::io::Error),
    /// The audit log is still being read.
    #[error(
        "the broker is still reading from the audit log which clientOids were used; try again later"
    )]
    ClaimsUnknown,
    /// The order cannot be settled.
    #[error("nothing was changed: {0}")]
    NotOpen(String),
    /// The key to test is not loaded.
    #[error("the key is not loaded: {0}")]
    KeyUnavailable(String),
    /// `restrictions.json` cannot be written.
    #[error("{}", chain(.0))]
    Restrictions(#[from] RestrictionsError),
    /// A defect of the broker.
    #[error("internal error; the log and the audit log show how far the call got")]
    Internal,
    /// The account has no key of this name.
    #[error("account {0} has no key {1} in the rules")]
    KeyUnknown(AccountId, KeyName),
    /// Invalid fields.
    #[error("malformed request: {}", .0.iter().map(|one| format!("{}: {}", one.field, one.problem)).collect::<Vec<_>>().join("; "))]
    Malformed(Vec<Malformed>),
    /// No service has this method.
    #[error("unknown method {}; nothing was done", clean(.0, 100))]
    MethodUnknown(String),
    /// The request did not arrive in time.
    #[error("request not received within {} ms; nothing was done", .0.as_millis())]
    Slow(Duration),
}

impl AdminError {
    pub(super) fn field(field: &str, problem: impl std::fmt::Display) -> Self {
        Self::Malformed(vec![Malformed::new(field, problem)])
    }

    /// `ErrorInfo.reason` and the gRPC code.
    fn reason(&self) -> (&'static str, Code) {
        match self {
            Self::AccountUnknown(_) => ("ACCOUNT_UNKNOWN", Code::NotFound),
            Self::CallerUnknown => ("CALLER_UNKNOWN", Code::Unauthenticated),
            Self::ClockUnknown(_) => ("CLOCK_UNCERTAIN", Code::FailedPrecondition),
            Self::Internal => ("INTERNAL", Code::Internal),
            Self::KeyUnavailable(_) => ("KEY_UNAVAILABLE", Code::FailedPrecondition),
            Self::ClaimsUnknown => ("AUDIT_UNAVAILABLE", Code::Unavailable),
            Self::NotOpen(_) => ("ORDER_NOT_OPEN", Code::FailedPrecondition),
            Self::Gap(_) | Self::Restrictions(_) => ("STATE_UNWRITABLE", Code::Unavailable),
            Self::KeyUnknown(..) => ("KEY_UNKNOWN", Code::NotFound),
            Self::Malformed(_) => ("REQUEST_MALFORMED", Code::InvalidArgument),
            Self::MethodUnknown(_) => ("METHOD_UNKNOWN", Code::Unimplemented),
            Self::Slow(_) => ("DEADLINE_EXCEEDED", Code::DeadlineExceeded),
        }
    }

    /// The reason of a call that was refused before it started; none if it failed later.
    pub(crate) fn refusal(&self) -> Option<Reason> {
        match self {
            Self::CallerUnknown => Some(Reason::CallerUnknown),
            Self::Malformed(_) => Some(Reason::RequestMalformed),
            Self::MethodUnknown(_) => Some(Reason::MethodUnknown),
            Self::Slow(_) => Some(Reason::DeadlineExceeded),
            Self::AccountUnknown(_)
            | Self::ClockUnknown(_)
            | Self::Gap(_)
            | Self::ClaimsUnknown
            | Self::NotOpen(_)
            | Self::Internal
            | Self::KeyUnavailable(_)
            | Self::KeyUnknown(..)
            | Self::Restrictions(_) => None,
        }
    }
}

impl From<AdminError> for Status {
    fn from(error: AdminError) -> Self {
        let (reason, code) = error.reason();
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, []);
        if let AdminError::Malformed(problems) = &error {
            add_violations(&mut details, problems);
        }
        Self::with_error_details(code, cut(&error.to_string()), details)
    }
}

/// The name of a host in `/readyz` and in admin calls.
pub(super) fn host_name((site, host): HostId) -> String {
    format!("{site}/{}", host.as_str())
}
