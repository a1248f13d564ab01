//! Lines about calls without a result, and about orders that may have been placed, once it is known what became of them.

use serde::Serialize;

use super::writer::Kind;
use super::{
    Audit, AuditLine, CallContext, CallEnd, Line, MAX_CLIENT_OID_CHARS, cleaned, cleaned_line,
};
use crate::base::outcome::{Outcome, Reason};
use crate::base::text::clean;
use crate::orders::replay::EarlierCall;
use crate::orders::resolve::Resolution;

#[derive(Serialize)]
struct ResolvedLine<'a> {
    #[serde(flatten)]
    call: Line<'a>,
    #[serde(skip_serializing_if = "str::is_empty")]
    client_oid: &'a str,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    order_id: Option<&'a str>,
    #[serde(serialize_with = "cleaned", skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

impl Audit {
    /// Records what became of an order of a call whose result was `maybe_sent`.
    pub(crate) fn resolved(
        &self,
        caller: &CallContext<'_>,
        endpoint: &str,
        client_oid: &str,
        resolution: &Resolution,
    ) -> AuditLine {
        let (order_id, detail) = match resolution {
            Resolution::Placed(id) => (Some(clean(id, MAX_CLIENT_OID_CHARS)), None),
            Resolution::Absent => (None, None),
            Resolution::Unknown(why) => (None, Some(why.clone())),
        };
        let line = self.writer.push(Kind::Essential, |seq| {
            cleaned_line(&ResolvedLine {
                call: self.line(seq, "resolved", caller, Some(endpoint)),
                client_oid: &clean(client_oid, MAX_CLIENT_OID_CHARS),
                state: resolution.as_str(),
                order_id: order_id.as_deref(),
                detail,
            })
        });
        AuditLine(line.ok())
    }

    /// Records that a call of an earlier run has no result: that run ended before it had one.
    pub(crate) fn unresolved(&self, call: &EarlierCall) -> AuditLine {
        let ending = CallEnd {
            outcome: Some(Outcome::MaybeSent),
            reason: Some(Reason::AnswerLost),
            detail: Some("the broker ended before it had a result".to_owned()),
            ..CallEnd::default()
        };
        let (context, endpoint) = (call.context(), Some(call.endpoint.id.as_str()));
        let line = self.write(
            "outcome",
            Kind::Essential,
            &context,
            endpoint,
            None,
            Some(&ending),
        );
        AuditLine(line.ok())
    }
}
