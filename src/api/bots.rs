//! The `Broker` service: `SignAndSend`, `GetOutcome` with `outcomes.rs`, and `GetBudget` with `budgets.rs`.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::status::{status, status_of_question};
use super::{budgets, outcomes};
use crate::base::ids::{BotId, Principal, RequestId};
use crate::base::outcome::Outcome;
use crate::broker::admission::{CallKind, CallSlot, MessageSlot};
use crate::broker::resolve::ResolvedState;
use crate::broker::{Broker, BrokerError, Call, Receipt, catch_panic, micros};
use crate::clock::HostId;
use crate::kucoin::request::{self, RequestLimits};
use crate::kucoin::{
    BatchItem, Catalog, Endpoint, Malformed, Method, Scope, UnsignedRequest, advice, code,
};
use crate::proto::{self, broker_server::Broker as BrokerRpc};

/// The broker responds at least this long before the bot's deadline, so that its response arrives before the bot's gRPC
/// library gives up.
const DEADLINE_MARGIN: Duration = Duration::from_millis(50);

/// Characters of `msg` in a response; the body has all of it. Limits how much longer than the body a response gets, as does
/// the limit of `code`.
const MAX_MSG_CHARS: usize = 8192;

/// Characters of a clientOid or order id in an item; KuCoin's have at most 40. The limits of items keep a response with the
/// longest answer below 4 MiB, the default receive limit of gRPC libraries.
const MAX_ID_CHARS: usize = 64;

/// Characters of `msg` in an item.
const MAX_ITEM_MSG_CHARS: usize = 200;

/// The problem of a missing or unknown scope.
pub(super) const SCOPES: &str = "expected SCOPE_SPOT_MARGIN, SCOPE_FUTURES or SCOPE_UNIFIED";

/// The problem of an invalid request id.
pub(super) const REQUEST_ID: &str = "expected 1 to 64 characters of A-Z, a-z, 0-9, '.', '_', '-'";

/// The longest `resolve_ms`.
const MAX_RESOLVE_MS: u32 = 30_000;

/// The paths of the methods.
pub(crate) const SIGN_AND_SEND: &str = "/credbroker.v1.Broker/SignAndSend";
pub(crate) const GET_BUDGET: &str = "/credbroker.v1.Broker/GetBudget";
pub(crate) const GET_OUTCOME: &str = "/credbroker.v1.Broker/GetOutcome";

/// The caller, as passed on by the listener.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    /// The bot in the certificate.
    pub(crate) bot: BotId,
    /// The slot of the request, until the call has one.
    pub(crate) message: Arc<MessageSlot>,
    /// When the headers of the call arrived. The message may have arrived later; the bot's deadline counts from here.
    pub(crate) arrived: Instant,
}

/// The service.
#[derive(Debug)]
pub(crate) struct GrpcApi {
    broker: Arc<Broker>,
    limits: RequestLimits,
    default_deadline: Duration,
}

impl GrpcApi {
    /// Creates the API of `broker`.
    pub(crate) fn new(
        broker: Arc<Broker>,
        limits: RequestLimits,
        default_deadline: Duration,
    ) -> Self {
        Self {
            broker,
            limits,
            default_deadline,
        }
    }

    /// The host of the request; `None` if the bot has no grant for its account and scope.
    fn host_id(&self, bot: &BotId, message: &proto::SignAndSendRequest) -> Option<HostId> {
        let account = message.account.parse().ok()?;
        self.broker
            .policy()
            .host_of(bot, &account, scope(message.scope())?)
    }

    /// Answers a question about the broker's own state.
    async fn respond<Q, A>(
        &self,
        request: Request<Q>,
        answer: impl FnOnce(&Broker, &BotId, Q) -> Result<A, BrokerError>,
    ) -> Result<Response<A>, Status> {
        // Not the id that a bot asks about, whose calls have audit lines of their own.
        let id = RequestId::random();
        let peer = request.extensions().get::<Peer>().cloned();
        let peer = peer.ok_or_else(|| status_of_question(&BrokerError::Internal, &id, None))?;
        let message = request.into_inner();
        let answer = async { answer(&self.broker, &peer.bot, message) };
        match catch_panic(answer).await {
            Ok(answer) => Ok(Response::new(answer)),
            Err(error) => {
                let error = self.broker.refuse(&peer.bot, &id, error).await;
                let time_ms = self.broker.clock.measured_ms(None);
                Err(status_of_question(&error, &id, time_ms))
            }
        }
    }

    async fn answer(
        &self,
        peer: Peer,
        message: proto::SignAndSendRequest,
        id: &RequestId,
        limit: Duration,
    ) -> Result<(Receipt, CallSlot), BrokerError> {
        let Peer {
            bot,
            message: received,
            arrived,
        } = peer;
        let not_after_ms = Some(message.not_after_ms).filter(|&ms| ms != 0);
        let resolve_within = Duration::from_millis(message.resolve_ms.into());
        let limit_problems = limit_problems(&message);
        let request = match unsigned_request(message, id, &self.limits) {
            Ok(request) => request,
            Err(mut problems) => {
                problems.extend(limit_problems);
                let error = BrokerError::Malformed(problems);
                return Err(self.broker.refuse(&bot, id, error).await);
            }
        };
        let deadline = arrived + limit.saturating_sub(DEADLINE_MARGIN.min(limit / 10));
        let mut call = Call {
            principal: Principal::Bot(bot.clone()),
            request,
            key: None,
            arrived,
            deadline,
            not_after_ms,
            resolve_within,
            slot: None,
        };
        let endpoint = call.request.endpoint();
        call = self.broker.refuse_repeated(call, endpoint).await?;
        if !limit_problems.is_empty() {
            let error = BrokerError::Malformed(limit_problems);
            return Err(self.broker.refuse(&bot, id, error).await);
        }
        let request = &call.request;
        let kind = if self.broker.passes_like_a_cancel(request, endpoint) {
            CallKind::Cancel
        } else if endpoint.is_some_and(Endpoint::is_read) {
            CallKind::Read
        } else {
            CallKind::Write
        };
        let calls_in_flight = self.broker.policy().settings(&bot).calls_in_flight;
        let slot = match self.broker.admission.call(&bot, kind, calls_in_flight) {
            Ok(slot) => slot,
            Err(overload) => return Err(self.broker.refuse(&bot, id, overload.into()).await),
        };
        drop(received);
        call.slot = Some(slot.clone());
        let ended = self.broker.sign_and_send(call).await;
        ended.map(|receipt| (receipt, slot))
    }
}

#[tonic::async_trait]
impl BrokerRpc for GrpcApi {
    async fn sign_and_send(
        &self,
        request: Request<proto::SignAndSendRequest>,
    ) -> Result<Response<proto::SignAndSendResponse>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let limit = time_limit(request.metadata()).unwrap_or(self.default_deadline);
        let message = request.into_inner();
        // An invalid id is reported together with the other fields, under a generated id.
        let id = message
            .request_id
            .parse()
            .unwrap_or_else(|_| RequestId::random());
        // The listener sets it on every call.
        let peer = peer.ok_or_else(|| status(&BrokerError::Internal, &id, None))?;
        let host_id = self.host_id(&peer.bot, &message);
        let broker_time_ms = || self.broker.clock.measured_ms(host_id);
        match catch_panic(self.answer(peer, message, &id, limit)).await {
            Ok((receipt, slot)) => {
                let egress_ip = self.broker.proof.expected();
                let mut response = response(receipt, &id, egress_ip);
                response.broker_time_ms = broker_time_ms().unwrap_or_default();
                let mut response = Response::new(response);
                // The listener keeps it until the response is written.
                response.extensions_mut().insert(slot);
                Ok(response)
            }
            Err(error) => Err(status(&error, &id, broker_time_ms())),
        }
    }

    async fn get_outcome(
        &self,
        request: Request<proto::GetOutcomeRequest>,
    ) -> Result<Response<proto::GetOutcomeResponse>, Status> {
        self.respond(request, outcomes::answer).await
    }

    async fn get_budget(
        &self,
        request: Request<proto::GetBudgetRequest>,
    ) -> Result<Response<proto::GetBudgetResponse>, Status> {
        let answer =
            |broker: &Broker, bot: &BotId, message| budgets::of_account(broker, bot, &message);
        self.respond(request, answer).await
    }
}

/// The bot's time limit. Source: gRPC over HTTP/2, `grpc-timeout`: at most 8 digits and a unit.
fn time_limit(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let value: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

pub(super) fn scope(scope: proto::Scope) -> Option<Scope> {
    match scope {
        proto::Scope::Futures => Some(Scope::Futures),
        proto::Scope::SpotMargin => Some(Scope::SpotMargin),
        proto::Scope::Unified => Some(Scope::Unified),
        proto::Scope::Unspecified => None,
    }
}

/// The problems of `not_after_ms` and `resolve_ms`. They refuse a request only after its clientOids were looked up: a repeated
/// order must not get `not_sent` for them.
fn limit_problems(message: &proto::SignAndSendRequest) -> Vec<Malformed> {
    let mut problems = Vec::new();
    if message.not_after_ms < 0 {
        problems.push(Malformed::new(
            "not_after_ms",
            format_args!(
                "expected Unix time in milliseconds, or 0, got {}",
                message.not_after_ms
            ),
        ));
    }
    if message.resolve_ms > MAX_RESOLVE_MS {
        let got = message.resolve_ms;
        problems.push(Malformed::new(
            "resolve_ms",
            format_args!("expected at most {MAX_RESOLVE_MS}, got {got}"),
        ));
    }
    problems
}

fn unsigned_request(
    message: proto::SignAndSendRequest,
    id: &RequestId,
    limits: &RequestLimits,
) -> Result<UnsignedRequest, Vec<Malformed>> {
    let mut problems = Vec::new();
    let scope = scope(message.scope());
    let method = match message.method() {
        proto::Method::Delete => Some(Method::Delete),
        proto::Method::Get => Some(Method::Get),
        proto::Method::Post => Some(Method::Post),
        proto::Method::Unspecified => None,
    };
    if scope.is_none() {
        problems.push(Malformed::new("scope", SCOPES));
    }
    if method.is_none() {
        problems.push(Malformed::new(
            "method",
            "expected METHOD_GET, METHOD_POST or METHOD_DELETE",
        ));
    }
    let account = message
        .account
        .parse()
        .map_err(|error| problems.push(Malformed::new("account", error)))
        .ok();
    if !message.request_id.is_empty() && message.request_id != id.as_str() {
        problems.push(Malformed::new(
            "request_id",
            format_args!("{REQUEST_ID}, or an empty string"),
        ));
    }
    let endpoint = scope
        .zip(method)
        .and_then(|(scope, method)| Catalog::get().route(Some(scope), method, &message.path));
    let oids = match method.map(|method| {
        request::body(
            endpoint,
            scope,
            method,
            &message.path,
            &message.body,
            limits,
        )
    }) {
        Some(Ok(oids)) => oids,
        Some(Err(problem)) => {
            problems.push(problem);
            Vec::new()
        }
        None => Vec::new(),
    };
    let query: Vec<_> = message
        .query
        .into_iter()
        .map(|parameter| (parameter.name, parameter.value))
        .collect();
    let target = request::target(&message.path, query, limits, &mut problems);
    match (account, scope, method, target) {
        (Some(account), Some(scope), Some(method), Some(target)) if problems.is_empty() => {
            Ok(UnsignedRequest {
                account,
                scope,
                method,
                target,
                body: message.body,
                id: id.clone(),
                body_client_oids: oids,
            })
        }
        _ => Err(problems),
    }
}

fn response(receipt: Receipt, id: &RequestId, egress_ip: IpAddr) -> proto::SignAndSendResponse {
    let Receipt {
        answer,
        resolution,
        endpoint,
        scope,
        timestamp_ms,
        waiting,
        signing,
        exchange,
        stale,
        lease: _,
    } = receipt;
    let advice = match &resolution {
        Some(resolved) => resolved.state.advice().to_owned(),
        None => advice::for_bot(&answer, scope, endpoint, egress_ip),
    };
    let is_answered = resolution
        .as_ref()
        .is_none_or(|resolved| resolved.is_answered);
    let http_status = if is_answered {
        answer.http_status.as_u16()
    } else {
        0
    };
    proto::SignAndSendResponse {
        http_status: http_status.into(),
        body: answer.body,
        content_type: answer.content_type,
        content_encoding: answer.content_encoding,
        code: cut(answer.code, code::MAX_CODE_CHARS),
        msg: cut(answer.msg, MAX_MSG_CHARS),
        outcome: outcome(answer.outcome).into(),
        rate_limit: answer.rate_limit.map(|limit| proto::RateLimit {
            limit: limit.limit,
            remaining: limit.remaining,
            reset_ms: millis(limit.reset),
        }),
        retry_after_ms: answer.retry_after.map(millis),
        request_id: id.to_string(),
        timestamp_ms,
        timing: Some(proto::Timing {
            waiting_us: micros(waiting),
            signing_us: micros(signing),
            exchange_us: micros(exchange),
        }),
        stale_seconds: stale.as_secs(),
        advice,
        items: answer.items.into_iter().map(item).collect(),
        resolution: resolution.map(|resolved| proto::Resolution {
            state: match resolved.state {
                ResolvedState::Absent => proto::resolution::State::Absent,
                ResolvedState::Placed => proto::resolution::State::Placed,
                ResolvedState::Unknown => proto::resolution::State::Unknown,
            }
            .into(),
            order_id: cut(resolved.order_id.unwrap_or_default(), MAX_ID_CHARS),
        }),
        broker_time_ms: 0,
    }
}

fn outcome(outcome: Outcome) -> proto::Outcome {
    match outcome {
        Outcome::Accepted => proto::Outcome::Accepted,
        Outcome::MaybeSent => proto::Outcome::MaybeSent,
        Outcome::NotSent => proto::Outcome::Unspecified,
        Outcome::Rejected => proto::Outcome::Rejected,
    }
}

fn item(item: BatchItem) -> proto::Item {
    proto::Item {
        client_oid: cut(item.client_oid, MAX_ID_CHARS),
        order_id: cut(item.order_id, MAX_ID_CHARS),
        outcome: outcome(item.outcome).into(),
        code: cut(item.code, code::MAX_CODE_CHARS),
        msg: cut(item.msg, MAX_ITEM_MSG_CHARS),
    }
}

/// The first `chars` characters of a text, unescaped.
fn cut(mut text: String, chars: usize) -> String {
    if let Some((end, _)) = text.char_indices().nth(chars) {
        text.truncate(end);
    }
    text
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeout_is_parsed_as_specified() {
        let limit = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            time_limit(&metadata)
        };
        assert_eq!(limit("250m"), Some(Duration::from_millis(250)));
        assert_eq!(limit("2S"), Some(Duration::from_secs(2)));
        assert_eq!(
            limit("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        for bad in ["", "S", "1", "999999999n", "-1S", "1.5S", "1s"] {
            assert_eq!(limit(bad), None, "{bad:?}");
        }
    }
}
