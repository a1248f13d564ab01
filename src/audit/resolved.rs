//! The line of an order that may have been placed, once it is known what became of it, or will not be.

use serde::Serialize;

use super::writer::Kind;
use super::{
    Audit, AuditLine, CallContext, Line, MAX_CLIENT_OID_CHARS, VERSION, cleaned, cleaned_line,
};
use crate::base::ids::BotId;
use crate::base::text::clean;
use crate::orders::resolve::Resolution;

#[derive(Serialize)]
struct ResolvedLine<'a> {
    #[serde(flatten)]
    call: Line<'a>,
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
        let line = self.writer.push(Kind::Essential, || {
            cleaned_line(&ResolvedLine {
                call: Line {
                    v: VERSION,
                    event: "resolved",
                    time_ms: self.clock.wall_ms(),
                    run: &self.run,
                    call: caller.call,
                    request_id: caller.request_id.as_str(),
                    bot: caller.principal.bot().map(BotId::as_str),
                    principal: caller.principal.other(),
                    account: caller
                        .account_and_scope
                        .map(|(account, _)| account.as_str()),
                    scope: caller.account_and_scope.map(|(_, scope)| scope.as_str()),
                    endpoint: Some(endpoint),
                    request: None,
                    ending: None,
                },
                client_oid: &clean(client_oid, MAX_CLIENT_OID_CHARS),
                state: resolution.as_str(),
                order_id: order_id.as_deref(),
                detail,
            })
        });
        AuditLine(line.ok())
    }
}
