//! `BrokerError` -> gRPC status: one match per column of the error reference.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::broker::BrokerError;
use crate::ids::RequestId;
use crate::outcome::Reason;

/// `ErrorInfo.domain` of every failure of ours.
pub const DOMAIN: &str = "credbroker";

/// How long to wait before a retry that may help: long enough for a connection to be made or a peer to take over.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The status that a bot gets: message, `ErrorInfo` with reason, outcome and request id, and what else helps.
pub fn status(error: &BrokerError, request_id: &RequestId) -> Status {
    let reason = error.reason();
    let metadata = HashMap::from([
        ("outcome".to_owned(), reason.outcome().to_string()),
        ("request_id".to_owned(), request_id.to_string()),
    ]);
    let mut details = ErrorDetails::with_error_info(reason.as_str(), DOMAIN, metadata);
    if let BrokerError::Malformed(problems) = error {
        for problem in problems {
            details.add_bad_request_violation(&problem.field, &problem.problem);
        }
    }
    if retry_helps(reason) {
        details.set_retry_info(Some(RETRY_AFTER));
    }
    Status::with_error_details(code(reason), error.to_string(), details)
}

fn code(reason: Reason) -> Code {
    match reason {
        // Never UNAVAILABLE: client libraries retry that by themselves.
        Reason::AnswerLost => Code::Unknown,
        Reason::AuditUnavailable | Reason::ExchangeUnreachable | Reason::ShuttingDown => {
            Code::Unavailable
        }
        Reason::CallerUnknown => Code::Unauthenticated,
        Reason::DeadlineExceeded => Code::DeadlineExceeded,
        Reason::Internal => Code::Internal,
        Reason::KeyUnavailable => Code::FailedPrecondition,
        Reason::PolicyDenied => Code::PermissionDenied,
        Reason::RequestMalformed => Code::InvalidArgument,
    }
}

fn retry_helps(reason: Reason) -> bool {
    match reason {
        Reason::AuditUnavailable | Reason::ExchangeUnreachable | Reason::ShuttingDown => true,
        Reason::AnswerLost
        | Reason::CallerUnknown
        | Reason::DeadlineExceeded
        | Reason::Internal
        | Reason::KeyUnavailable
        | Reason::PolicyDenied
        | Reason::RequestMalformed => false,
    }
}
