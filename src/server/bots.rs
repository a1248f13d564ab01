//! The bot listener: limits the connections and calls of each bot, and answers a refused call with the reason.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use http::{Request, Response};
use http_body_util::{BodyStream, Full, StreamBody};
use hyper::body::Incoming;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;

use super::connection::{
    ClientConnection, Listener, MessageError, is_unimplemented, not_grpc, oversized, too_long,
    unread, unsupported_media_type,
};
use super::tls::Trust;
use crate::api::bots::{GET_BUDGET, GET_OUTCOME, Peer, SIGN_AND_SEND};
use crate::api::status::{status, status_of_question};
use crate::base::ids::{BotId, RequestId};
use crate::broker::admission::{Admitted, CallSlot};
use crate::broker::{BrokerError, Overload};

/// Streams on one connection beyond the calls and cancels that its bot may have in flight: gRPC clients queue further calls,
/// and calls that are being received have no slot yet.
const SPARE_STREAMS: usize = 64;

/// How long a connection over the limit stays open, so that its calls get the reason.
const TURNED_AWAY_FOR: Duration = Duration::from_secs(5);

/// One connection of one bot.
struct BotConnection {
    connection: Arc<ClientConnection>,
    bot: BotId,
    /// Bytes of the longest message.
    limit: usize,
    /// Why its calls are refused; `None` if they are served.
    refusal: Option<Overload>,
}

/// The kind of an RPC.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Rpc {
    /// A method of the service `Broker`.
    Broker,
    /// A stream: reads requests while it responds.
    Reflection,
    /// Health, and unknown methods.
    Other,
}

/// Serves bots until shutdown; returns once every connection has ended. Messages have at most `limit` bytes.
pub(super) async fn serve(listener: Listener, socket: TcpListener, limit: usize) {
    let listener = Arc::new(listener);
    let acceptor = listener.acceptor();
    let serve =
        move |stream, trust, handover| admit(Arc::clone(&listener), stream, trust, handover, limit);
    acceptor.run(socket, serve).await;
}

/// Serves a connection if the limits allow it; otherwise refuses its calls with the reason, or closes it.
async fn admit(
    listener: Arc<Listener>,
    stream: TlsStream<TcpStream>,
    trust: Trust,
    handover: watch::Receiver<()>,
    limit: usize,
) {
    let broker = Arc::clone(&listener.broker);
    let (metrics, admission) = (&broker.metrics, &broker.admission);
    // The verifier has made sure that the certificate names one bot.
    let Some(bot) = trust.caller::<BotId>() else {
        return metrics.connection_refused("certificate");
    };
    let (slot, refusal) = match admission.connection(&bot) {
        Some(Admitted::Served(slot)) => (slot, None),
        Some(Admitted::TurnedAway(slot, refusal)) => {
            let reason = match refusal {
                Overload::Connections(_) => "limit",
                _ => "bot_limit",
            };
            metrics.connection_refused(reason);
            if let Some(suppressed) = metrics.allow_log() {
                tracing::warn!(bot.id = %bot, suppressed, "{refusal}");
            }
            (slot, Some(refusal))
        }
        None => return metrics.connection_refused("limit"),
    };
    let age = match refusal {
        Some(_) => TURNED_AWAY_FOR,
        // Connections that were opened at the same time do not close at the same time.
        None => listener.limits.age.mul_f64(0.9 + 0.1 * fastrand::f64()),
    };
    let never = CancellationToken::new();
    let connection = ClientConnection::new(listener, trust, handover, never, Some(slot));
    let bot_connection = Arc::new(BotConnection {
        connection,
        bot,
        limit,
        refusal,
    });
    let call = |request| Arc::clone(&bot_connection).call(request);
    let calls_in_flight = bot_connection.calls_in_flight();
    let messages = admission.limits().messages_per_bot(calls_in_flight);
    let streams = 2 * messages + SPARE_STREAMS;
    let streams = u32::try_from(streams).unwrap_or(u32::MAX);
    bot_connection
        .connection
        .serve(stream, streams, age, call)
        .await;
}

impl BotConnection {
    /// The limit of its bot in the rules, if it has one.
    fn calls_in_flight(&self) -> Option<usize> {
        let policy = self.connection.listener.broker.policy();
        policy.settings(&self.bot).calls_in_flight
    }

    /// Refuses a call, or passes it on with the bot's name.
    async fn call(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        if let Some(problem) = not_grpc(&request) {
            drop(
                self.refused(BrokerError::Malformed(vec![problem]), false)
                    .await,
            );
            return unsupported_media_type();
        }
        let is_question = matches!(request.uri().path(), GET_BUDGET | GET_OUTCOME);
        match self.answer(request).await {
            Ok(response) => response,
            Err(error) => self.refused(error, is_question).await.into_http(),
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, BrokerError> {
        let arrived = Instant::now();
        let rpc = match request.uri().path() {
            GET_BUDGET | GET_OUTCOME | SIGN_AND_SEND => Rpc::Broker,
            path if path.starts_with("/grpc.reflection.") => Rpc::Reflection,
            _ => Rpc::Other,
        };
        self.check(&request)?;
        let admission = &self.connection.listener.broker.admission;
        let mut in_use = self.connection.begin();
        let (mut head, body) = request.into_parts();
        let path = head.uri.clone();
        let connection = &self.connection;
        let body = if rpc == Rpc::Reflection {
            // A stream is read no longer than a message may take.
            let within = sleep(connection.listener.limits.request);
            in_use.slot = Some(admission.helper(&self.bot)?);
            Body::new(StreamBody::new(BodyStream::new(body).take_until(within)))
        } else {
            if rpc == Rpc::Other {
                in_use.slot = Some(admission.helper(&self.bot)?);
            }
            let mut received = admission.message(&self.bot, self.calls_in_flight())?;
            let message = connection
                .message(body, self.limit, |bytes| received.add(bytes))
                .await;
            head.extensions.insert(Peer {
                bot: self.bot.clone(),
                message: Arc::new(received),
                arrived,
            });
            match message {
                Ok(message) => Body::new(Full::new(message)),
                Err(MessageError::BrokenOff) => {
                    return Ok(
                        Status::cancelled("the request was not received completely").into_http()
                    );
                }
                Err(MessageError::Refused(overload)) => return Err(overload.into()),
                Err(MessageError::Slow(limit)) => return Err(BrokerError::Slow(limit)),
                Err(MessageError::TooLong(limit)) => {
                    return Err(BrokerError::Malformed(vec![too_long(limit)]));
                }
                Err(MessageError::Untrusted) => return Err(BrokerError::Untrusted),
            }
        };
        let mut routes = self.connection.listener.routes.clone();
        let mut response = match routes.call(Request::from_parts(head, body)).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        if let Some(slot) = response.extensions_mut().remove::<CallSlot>() {
            in_use.slot = Some(slot);
        }
        if rpc != Rpc::Broker && is_unimplemented(&response) {
            return Err(BrokerError::MethodUnknown(path.path().to_owned()));
        }
        if let Some(problem) = unread(&response).filter(|_| rpc == Rpc::Broker) {
            return Err(BrokerError::Malformed(vec![problem]));
        }
        // A health stream stays open without data; it must not count as an unread response.
        Ok(in_use.answer(response, rpc == Rpc::Broker))
    }

    /// Checks what is known before the message of a call has arrived.
    fn check(&self, request: &Request<Incoming>) -> Result<(), BrokerError> {
        if !self.connection.is_trusted() {
            return Err(BrokerError::Untrusted);
        }
        if let Some(problem) = oversized(request) {
            return Err(BrokerError::Malformed(vec![problem]));
        }
        self.refusal.map_or(Ok(()), |refusal| Err(refusal.into()))
    }

    /// Audits a call that was refused before it reached the broker, and returns its status.
    async fn refused(&self, error: BrokerError, is_question: bool) -> Status {
        let id = RequestId::random();
        let broker = &self.connection.listener.broker;
        let error = broker.refuse(&self.bot, &id, error).await;
        let time_ms = broker.clock.measured_ms(None);
        if is_question {
            status_of_question(&error, &id, time_ms)
        } else {
            status(&error, &id, time_ms)
        }
    }
}
