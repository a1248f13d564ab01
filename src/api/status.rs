//! `BrokerError` to gRPC status.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::base::ids::RequestId;
use crate::base::outcome::{Outcome, Reason};
use crate::base::text::clean;
use crate::broker::BrokerError;
use crate::budgets::NoBudget;
use crate::kucoin::Malformed;
use crate::orders::Repeated;

/// `ErrorInfo.domain` of every error of the broker.
pub(crate) const DOMAIN: &str = "credbroker";

/// Wait before a retry: long enough for a new connection, or for another broker to take over.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A status is sent in headers, and clients accept about 8 KB of headers: more would break the whole connection.
const MAX_VIOLATIONS: usize = 8;

/// Characters of the message, and of each field's name and problem.
const MAX_TEXT: usize = 250;

/// The status for a bot: message, `ErrorInfo` with reason, outcome, request id and the exchange's time (if it is known),
/// invalid fields, and a retry delay.
pub(crate) fn status(
    error: &BrokerError,
    request_id: &RequestId,
    broker_time_ms: Option<i64>,
) -> Status {
    status_with(error, error.outcome(), request_id, broker_time_ms)
}

/// The status for a bot whose question about an outcome failed. It has no outcome, which the bot could take for the answer.
pub(crate) fn status_of_question(
    error: &BrokerError,
    request_id: &RequestId,
    broker_time_ms: Option<i64>,
) -> Status {
    status_with(error, None, request_id, broker_time_ms)
}

fn status_with(
    error: &BrokerError,
    outcome: Option<Outcome>,
    request_id: &RequestId,
    broker_time_ms: Option<i64>,
) -> Status {
    let reason = error.reason();
    let mut metadata = HashMap::from([("request_id".to_owned(), request_id.to_string())]);
    if let Some(outcome) = outcome {
        metadata.insert("outcome".to_owned(), outcome.to_string());
    }
    if let BrokerError::Repeated(repeated) = error {
        add_earlier_order(&mut metadata, repeated);
    }
    if let Some(ms) = broker_time_ms {
        metadata.insert("broker_time_ms".to_owned(), ms.to_string());
    }
    let mut details = ErrorDetails::with_error_info(reason.as_str(), DOMAIN, metadata);
    if let BrokerError::Malformed(problems) = error {
        add_violations(&mut details, problems);
    }
    if retry_helps(reason) {
        details.set_retry_info(Some(match error {
            BrokerError::NoBudget(NoBudget::RateLimited(limited)) => limited.retry_after,
            _ => RETRY_AFTER,
        }));
    }
    Status::with_error_details(code(reason), cut(&error.to_string()), details)
}

/// Adds what is known about the earlier order with the same clientOid.
fn add_earlier_order(metadata: &mut HashMap<String, String>, repeated: &Repeated) {
    let state = repeated.state.as_str();
    metadata.insert("order_outcome".to_owned(), state.to_owned());
    if let Some(id) = &repeated.order_id {
        metadata.insert("order_id".to_owned(), id.clone());
    }
    metadata.insert("retry".to_owned(), "never".to_owned());
}

/// Adds the invalid fields.
pub(super) fn add_violations(details: &mut ErrorDetails, problems: &[Malformed]) {
    for problem in problems.iter().take(MAX_VIOLATIONS) {
        details.add_bad_request_violation(cut(&problem.field), cut(&problem.problem));
    }
}

/// A text, cleaned and cut to fit into headers.
pub(super) fn cut(text: &str) -> String {
    clean(text, MAX_TEXT).into_owned()
}

fn code(reason: Reason) -> Code {
    match reason {
        // Not UNAVAILABLE, which client libraries can be configured to retry.
        Reason::AnswerLost => Code::Unknown,
        Reason::AuditUnavailable | Reason::ExchangeUnreachable | Reason::ShuttingDown => {
            Code::Unavailable
        }
        Reason::CallerBlocked | Reason::CallerUnknown => Code::Unauthenticated,
        Reason::ClientOidReused | Reason::OrderRepeated => Code::AlreadyExists,
        Reason::DeadlineExceeded => Code::DeadlineExceeded,
        Reason::Internal => Code::Internal,
        Reason::AccountFrozen
        | Reason::CancelledWhileWaiting
        | Reason::ClockUncertain
        | Reason::EgressMismatch
        | Reason::KeyUnavailable => Code::FailedPrecondition,
        Reason::Overloaded | Reason::RateLimited => Code::ResourceExhausted,
        Reason::MethodUnknown => Code::Unimplemented,
        Reason::PolicyDenied => Code::PermissionDenied,
        Reason::RequestMalformed => Code::InvalidArgument,
    }
}

fn retry_helps(reason: Reason) -> bool {
    match reason {
        Reason::AuditUnavailable
        | Reason::ExchangeUnreachable
        | Reason::Overloaded
        | Reason::RateLimited
        | Reason::ShuttingDown => true,
        Reason::AccountFrozen
        | Reason::AnswerLost
        | Reason::CallerBlocked
        | Reason::CallerUnknown
        | Reason::CancelledWhileWaiting
        | Reason::ClientOidReused
        | Reason::ClockUncertain
        | Reason::DeadlineExceeded
        | Reason::EgressMismatch
        | Reason::Internal
        | Reason::KeyUnavailable
        | Reason::MethodUnknown
        | Reason::OrderRepeated
        | Reason::PolicyDenied
        | Reason::RequestMalformed => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_fits_into_the_headers_that_clients_accept() {
        let problem = Malformed::new("query[99].name", "é".repeat(100_000));
        let error = BrokerError::Malformed(vec![problem; 100]);
        let status = status(&error, &RequestId::random(), Some(i64::MAX));
        // The message is percent-encoded: three bytes for each non-ASCII byte.
        let message = status
            .message()
            .bytes()
            .map(|b| if b.is_ascii() { 1 } else { 3 })
            .sum::<usize>();
        let details = status.details().len() * 4 / 3;
        assert!(details + message < 8_000, "{details} + {message}");
    }
}
