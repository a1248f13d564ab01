//! Decisions of admins about clientOids.

use std::sync::Arc;

use tokio::task::spawn_blocking;

use super::admin_error::AdminError;
use super::admins::AdminApi;
use super::bots::scope;
use super::messages::in_proto;
use crate::audit::Act;
use crate::base::ids::AdminId;
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
                Some((scope, self.broker.orders.state(account, scope, client_oid)?))
            })
            .collect();
        let open: Vec<_> = found.iter().filter(|(_, state)| state.is_open()).collect();
        let &[&(scope, _)] = open.as_slice() else {
            return Err(AdminError::not_open(client_oid, &found, open.len()));
        };
        let mut act = Act::on_account("settle-order", account);
        (act.scope, act.client_oid) = (Some(scope.as_str()), Some(client_oid));
        act.outcome = "done";
        act.detail = Some("the order was not placed".to_owned());
        // Before the clientOid is free: the next order with it must have the later line.
        self.record(admin, &act).await;
        if !self.broker.orders.settle_absent(account, scope, client_oid) {
            return Err(AdminError::NotOpen(
                "the broker found out meanwhile what became of the order; its `resolved` line in the audit log has the result".to_owned(),
            ));
        }
        let [scope] = in_proto(&[scope])[..] else {
            return Err(AdminError::Internal);
        };
        Ok(proto::SettleOrderResponse { scope })
    }
}

impl AdminError {
    /// No order with this clientOid is open, or several are.
    fn not_open(client_oid: &str, found: &[(Scope, OrderState)], open: usize) -> Self {
        let client_oid = crate::base::text::clean(client_oid, crate::audit::MAX_CLIENT_OID_CHARS);
        if open > 1 {
            return Self::field(
                "scope",
                "orders of several scopes have this clientOid; set the scope",
            );
        }
        let why = found.first().map_or_else(
            || format!("the broker knows no order with clientOid {client_oid} on this account; it is free"),
            |(scope, state)| {
                let what = match state {
                    OrderState::InFlight => "its call has not ended; wait for its result",
                    _ => "the exchange accepted it; cancel it instead",
                };
                format!("order {client_oid} ({scope}) is not open: {what}")
            },
        );
        Self::NotOpen(why)
    }
}
