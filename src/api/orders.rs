//! Decisions of admins about clientOids.

use std::sync::Arc;

use tokio::task::spawn_blocking;

use super::admin_error::AdminError;
use super::admins::AdminApi;
use super::bots::scope;
use crate::audit::{Act, MAX_CLIENT_OID_CHARS};
use crate::base::ids::AdminId;
use crate::base::text::clean;
use crate::kucoin::Scope;
use crate::orders::{OrderState, Readiness};
use crate::proto;

impl AdminApi {
    /// Accepts that clientOids may be unknown that were used before now.
    pub(super) async fn gap_accepted(
        &self,
        admin: &AdminId,
    ) -> Result<proto::AcceptGapResponse, AdminError> {
        if self.broker.orders.readiness() == Readiness::Reading {
            return Err(AdminError::ClaimsUnknown);
        }
        let broker = Arc::clone(&self.broker);
        let accepted = spawn_blocking(move || broker.orders.accept_gap(broker.clock.wall_ms()));
        let accepted = accepted.await.map_err(|_| AdminError::Internal)?;
        let detail = match &accepted {
            Ok(true) => None,
            Ok(false) => Some("nothing changed: there was no gap".to_owned()),
            Err(error) => Some(format!("in effect, but not saved: {error}")),
        };
        let act = Act {
            action: "gap-accept",
            outcome: if accepted.is_ok() { "done" } else { "failed" },
            detail,
            ..Act::default()
        };
        self.record(admin, &act).await;
        let was_refused = accepted.map_err(AdminError::Gap)?;
        Ok(proto::AcceptGapResponse { was_refused })
    }

    /// Frees the clientOid of an order that was not placed, as an admin has found out.
    pub(super) async fn order_settled(
        &self,
        admin: &AdminId,
        message: &proto::SettleOrderRequest,
    ) -> Result<proto::SettleOrderResponse, AdminError> {
        let account = &self.account(&message.account)?.id;
        let client_oid = message.client_oid.as_str();
        if client_oid.is_empty() {
            return Err(AdminError::field(
                "client_oid",
                "expected the clientOid of the order",
            ));
        }
        if !message.absent {
            return Err(AdminError::field(
                "absent",
                "must be set: only orders that do not exist can be settled",
            ));
        }
        if self.broker.orders.readiness() == Readiness::Reading {
            return Err(AdminError::ClaimsUnknown);
        }
        let wanted = scope(message.scope());
        let scopes = Scope::ALL.into_iter();
        let found: Vec<_> = scopes
            .filter(|scope| wanted.is_none_or(|wanted| wanted == *scope))
            .filter_map(|scope| {
                let (state, at_s) = self.broker.orders.claimed(account, scope, client_oid)?;
                Some((scope, state, at_s))
            })
            .collect();
        let is_unknown = |(_, state, _): &&(Scope, OrderState, u32)| *state == OrderState::Unknown;
        let unknown: Vec<_> = found.iter().filter(is_unknown).collect();
        let &[&(scope, _, at_s)] = unknown.as_slice() else {
            return Err(AdminError::not_unknown(client_oid, &found, unknown.len()));
        };
        let mut act = Act::on_account("settle-order", account);
        (act.scope, act.client_oid) = (Some(scope.as_str()), Some(client_oid));
        act.outcome = "done";
        act.detail = Some("the order was not placed".to_owned());
        // Before the clientOid is free: the next order with it must have the later line.
        self.record(admin, &act).await;
        if !self
            .broker
            .orders
            .settle_absent(account, scope, client_oid, at_s)
        {
            return Err(AdminError::NotOpen(
                "another admin has settled it meanwhile".to_owned(),
            ));
        }
        Ok(proto::SettleOrderResponse {
            scope: proto::Scope::from(scope).into(),
        })
    }
}

impl AdminError {
    /// No order with this clientOid is unknown, or several are.
    fn not_unknown(client_oid: &str, found: &[(Scope, OrderState, u32)], unknown: usize) -> Self {
        let client_oid = clean(client_oid, MAX_CLIENT_OID_CHARS);
        if unknown > 1 {
            let problem = "orders of several scopes have this clientOid; set the scope";
            return Self::field("scope", problem);
        }
        let Some((scope, state, _)) = found.first() else {
            return Self::NotOpen(format!(
                "the broker has sent no order with clientOid {client_oid} on this account, so it is free"
            ));
        };
        let what = match state {
            OrderState::InFlight => "its call has not ended; wait for its result",
            OrderState::MaybeSent => {
                "the broker still waits for its answer or looks it up, for 10 minutes at most; wait for the result"
            }
            OrderState::Accepted | OrderState::Unknown => {
                "the exchange accepted it, or a lookup found it; cancel it instead"
            }
        };
        Self::NotOpen(format!("order {client_oid} ({scope}): {what}"))
    }
}
