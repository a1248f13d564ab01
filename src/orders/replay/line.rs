//! A line of the audit log, as far as it is about calls and their orders.

use std::borrow::Cow;

use serde::Deserialize;

use super::EarlierCall;
use crate::base::ids::Principal;
use crate::base::outcome::Reason;
use crate::kucoin::lookup::LookupRecord;
use crate::kucoin::{Catalog, Scope};
use crate::orders::calls::CallState;

/// The fields of a line that matter here.
#[derive(Deserialize)]
pub(super) struct Line<'a> {
    #[serde(borrow)]
    pub(super) event: Cow<'a, str>,
    /// Whether the line was cut off, so that its last value can be wrong.
    #[serde(default)]
    pub(super) torn: bool,
    #[serde(default)]
    pub(super) time_ms: i64,
    #[serde(borrow, default)]
    pub(super) run: Cow<'a, str>,
    /// The run that has written the line, if it is another one.
    #[serde(borrow)]
    pub(super) by_run: Option<Cow<'a, str>>,
    pub(super) seq: Option<u64>,
    #[serde(default)]
    pub(super) call: u64,
    #[serde(borrow, default)]
    pub(super) request_id: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) bot: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) account: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) scope: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) endpoint: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) uid: Option<Cow<'a, str>>,
    pub(super) exchange_ms: Option<i64>,
    #[serde(borrow)]
    pub(super) body_sha256: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    pub(super) client_oids: Vec<Cow<'a, str>>,
    #[serde(default)]
    pub(super) lookup: Vec<LookupRecord>,
    #[serde(borrow)]
    pub(super) outcome: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) reason: Option<Cow<'a, str>>,
    /// The orders of a batch.
    #[serde(borrow, default)]
    pub(super) items: Vec<LineItem<'a>>,
    #[serde(borrow)]
    pub(super) client_oid: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) action: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) state: Option<Cow<'a, str>>,
}

/// One order of a batch.
#[derive(Deserialize)]
pub(super) struct LineItem<'a> {
    #[serde(borrow, default)]
    pub(super) client_oid: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) outcome: Cow<'a, str>,
}

impl Line<'_> {
    /// What its outcome says about a call.
    pub(super) fn state(&self) -> CallState {
        match self.outcome.as_deref() {
            Some("accepted") => CallState::Accepted,
            Some("not_sent") => CallState::NotSent,
            Some("rejected") => CallState::Rejected,
            _ if self.reason.as_deref() == Some(Reason::OrderRepeated.as_str()) => {
                CallState::Rejected
            }
            _ => CallState::MaybeSent,
        }
    }

    /// The outcome of an order of the call.
    pub(super) fn outcome_of(&self, client_oid: &str) -> Option<&str> {
        if self.items.is_empty() {
            return self.outcome.as_deref();
        }
        let items = self.items.iter();
        let mut items = items.filter(|item| item.client_oid == client_oid);
        match (items.next(), items.next()) {
            (Some(item), None) => Some(&item.outcome),
            _ => None,
        }
    }

    pub(super) fn scope(&self) -> Option<Scope> {
        let mut scopes = Scope::ALL.into_iter();
        scopes.find(|scope| Some(scope.as_str()) == self.scope.as_deref())
    }

    /// The call of an intent, if it changes something.
    pub(super) fn call(&self) -> Option<EarlierCall> {
        let endpoint = Catalog::get().by_id(self.endpoint.as_deref()?)?;
        if endpoint.is_read() {
            return None;
        }
        let client_oids = self.client_oids.iter();
        let call = EarlierCall {
            run: self.run.clone().into_owned(),
            number: self.call,
            principal: Principal::Bot(self.bot.as_deref()?.parse().ok()?),
            request_id: self.request_id.parse().ok()?,
            account: self.account.as_deref()?.parse().ok()?,
            scope: self.scope()?,
            endpoint,
            client_oids: client_oids.map(|oid| oid.clone().into_owned()).collect(),
            uid: self.uid.as_deref().map(str::to_owned),
            exchange_ms: self.exchange_ms.unwrap_or(self.time_ms),
            lookups: self.lookup.clone(),
            open: Vec::new(),
            has_outcome: false,
        };
        Some(call)
    }
}
