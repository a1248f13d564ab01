//! Messages of `GetOutcome`.

use super::bots::{REQUEST_ID, SCOPES, scope};
use crate::base::ids::{AccountId, BotId, RequestId};
use crate::broker::{Broker, BrokerError};
use crate::kucoin::{Malformed, Scope};
use crate::orders::{Known, KnownState};
use crate::proto::{self, CallState};

/// What a bot asks about.
enum Question {
    Call(RequestId),
    Order(AccountId, Scope, String),
}

/// What is known about the call or order that `message` names.
pub(super) fn answer(
    broker: &Broker,
    bot: &BotId,
    message: proto::GetOutcomeRequest,
) -> Result<proto::GetOutcomeResponse, BrokerError> {
    let (known, client_oid, host_id) = match question(message).map_err(BrokerError::Malformed)? {
        Question::Call(id) => (broker.known_call(bot, &id)?, String::new(), None),
        Question::Order(account, scope, client_oid) => {
            let known = broker.known_order(bot, &account, scope, &client_oid)?;
            let host_id = broker.policy().host_of(bot, &account, scope);
            (known, client_oid, host_id)
        }
    };
    let Known {
        state,
        order_id,
        endpoint,
    } = known;
    let state = match state {
        KnownState::Accepted => CallState::Accepted,
        KnownState::InFlight => CallState::InFlight,
        KnownState::MaybeSent => CallState::MaybeSent,
        KnownState::NotPlaced => CallState::NotPlaced,
        KnownState::Rejected => CallState::Rejected,
        KnownState::Unknown => CallState::Unknown,
    };
    Ok(proto::GetOutcomeResponse {
        state: state.into(),
        order_id: order_id.unwrap_or_default(),
        client_oid,
        endpoint: endpoint.map_or("", |endpoint| &endpoint.id).to_owned(),
        broker_time_ms: broker.clock.measured_ms(host_id).unwrap_or_default(),
    })
}

/// Reads the message, which has either a request id alone, or account, scope and clientOid.
fn question(message: proto::GetOutcomeRequest) -> Result<Question, Vec<Malformed>> {
    let has_scope = message.scope != proto::Scope::Unspecified as i32;
    let scope = scope(message.scope());
    let proto::GetOutcomeRequest {
        request_id,
        account,
        client_oid,
        ..
    } = message;
    let has_order = has_scope || !account.is_empty() || !client_oid.is_empty();
    if request_id.is_empty() != has_order {
        let problem = "expected either request_id alone, or account, scope and client_oid";
        return Err(vec![Malformed::new("request_id", problem)]);
    }
    if !has_order {
        let id = request_id.parse();
        let id = id.map_err(|_| vec![Malformed::new("request_id", REQUEST_ID)]);
        return id.map(Question::Call);
    }
    let mut problems = Vec::new();
    let account = account.parse();
    let account = account.map_err(|error| problems.push(Malformed::new("account", error)));
    if scope.is_none() {
        problems.push(Malformed::new("scope", SCOPES));
    }
    if client_oid.is_empty() {
        problems.push(Malformed::new(
            "client_oid",
            "expected the clientOid of an order",
        ));
    }
    match (account, scope) {
        (Ok(account), Some(scope)) if problems.is_empty() => {
            Ok(Question::Order(account, scope, client_oid))
        }
        _ => Err(problems),
    }
}
