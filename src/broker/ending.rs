//! What audit and log say about the end of a call.

use super::call::micros;
use super::{BrokerError, Call, Receipt};
use crate::audit::{CallContext, CallEnd};
use crate::base::ids::Principal;
use crate::base::outcome::{Outcome, Reason};
use crate::base::text::clean;
use crate::kucoin::code;
use crate::telemetry::chain;

pub(super) fn call_context(call: &Call, number: u64) -> CallContext<'_> {
    let Call {
        principal, request, ..
    } = call;
    let account_and_scope = Some((&request.account, request.scope));
    CallContext {
        principal,
        request_id: &request.id,
        call: number,
        earlier_run: None,
        account_and_scope,
    }
}

pub(super) fn outcome_and_reason(
    ended: &Result<Receipt, BrokerError>,
) -> (Option<Outcome>, Option<Reason>) {
    match ended {
        Ok(receipt) => (Some(receipt.answer.outcome), None),
        Err(error) => (error.outcome(), Some(error.reason())),
    }
}

pub(super) fn ending<'a>(call: &Call, ended: &'a Result<Receipt, BrokerError>) -> CallEnd<'a> {
    match ended {
        Err(error) => ending_of_error(call, error),
        Ok(receipt) => CallEnd {
            outcome: Some(receipt.answer.outcome),
            reason: None,
            detail: None,
            http_status: Some(receipt.answer.http_status.as_u16()),
            code: Some(clean(&receipt.answer.code, code::MAX_CODE_CHARS)),
            items: &receipt.answer.items,
            timestamp_ms: Some(receipt.timestamp_ms),
            duration_us: micros(call.arrived.elapsed()),
        },
    }
}

pub(super) fn ending_of_error(call: &Call, error: &BrokerError) -> CallEnd<'static> {
    CallEnd {
        outcome: error.outcome(),
        reason: Some(error.reason()),
        detail: Some(error.to_string()),
        duration_us: micros(call.arrived.elapsed()),
        ..CallEnd::default()
    }
}

pub(super) fn log_end(
    call: &Call,
    endpoint: &str,
    ending: &CallEnd<'_>,
    error: Option<&BrokerError>,
    message: &str,
) {
    let is_dropped_read = matches!(
        error,
        Some(BrokerError::AnswerDropped(_) | BrokerError::ReadDropped)
    );
    let error = error.map(|error| chain(error));
    macro_rules! line {
        ($level:ident) => {
            tracing::$level!(
                account.id = %call.request.account,
                scope = %call.request.scope,
                endpoint,
                outcome = ending.outcome.map(tracing::field::display),
                reason = ending.reason.map(Reason::as_str),
                http.response.status_code = ending.http_status,
                duration_ms = ending.duration_us / 1000,
                exception.message = error,
                "{message}",
            )
        };
    }
    if call.principal == Principal::Broker {
        line!(debug);
    } else if ending.outcome == Some(Outcome::MaybeSent) && !is_dropped_read {
        // A call that ended as `maybe_sent` has to be looked up.
        line!(warn);
    } else {
        line!(info);
    }
}
