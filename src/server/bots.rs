//! The bot listener: limits the connections and calls of each bot, and answers a refused call with the reason.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use http::{Request, Response};
use http_body_util::{BodyStream, Full, StreamBody};
use hyper::body::Incoming;
use tokio::net::{TcpListener, TcpStream};
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
use crate::api::bots::{Peer, SIGN_AND_SEND};
use crate::api::status::status;
use crate::base::ids::{BotId, RequestId};
use crate::broker::admission::{Admitted, CallSlot};
use crate::broker::{BrokerError, Overload};

/// Concurrent calls on one connection; gRPC clients queue further ones.
const STREAMS: u32 = 256;

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
    SignAndSend,
    /// A stream: reads requests while it responds.
    Reflection,
    /// Health, and unknown methods.
    Other,
}

/// Serves bots until shutdown; returns once every connection has ended. Messages have at most `limit` bytes.
pub(super) async fn serve(listener: Listener, socket: TcpListener, limit: usize) {
    let listener = Arc::new(listener);
    let acceptor = listener.acceptor();
    let serve = move |stream, trust| admit(Arc::clone(&listener), stream, trust, limit);
    acceptor.run(socket, serve).await;
}

/// Serves a connection if the limits allow it; otherwise refuses its calls with the reason, or closes it.
async fn admit(listener: Arc<Listener>, stream: TlsStream<TcpStream>, trust: Trust, limit: usize) {
    let metrics = &listener.broker.metrics;
    // The verifier has made sure that the certificate names one bot.
    let Some(bot) = trust.caller::<BotId>() else {
        return metrics.connection_refused("certificate");
    };
    let (slot, refusal) = match listener.broker.admission.connection(&bot) {
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
    let connection = ClientConnection::new(listener, trust, never, Some(slot));
    let bot_connection = Arc::new(BotConnection {
        connection,
        bot,
        limit,
        refusal,
    });
    let call = |request| Arc::clone(&bot_connection).call(request);
    bot_connection
        .connection
        .serve(stream, STREAMS, age, call)
        .await;
}

impl BotConnection {
    /// Refuses a call, or passes it on with the bot's name.
    async fn call(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        if let Some(problem) = not_grpc(&request) {
            drop(self.refused(BrokerError::Malformed(vec![problem])));
            return unsupported_media_type();
        }
        match self.answer(request).await {
            Ok(response) => response,
            Err(error) => self.refused(error).into_http(),
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, BrokerError> {
        let arrived = Instant::now();
        let rpc = match request.uri().path() {
            SIGN_AND_SEND => Rpc::SignAndSend,
            path if path.starts_with("/grpc.reflection.") => Rpc::Reflection,
            _ => Rpc::Other,
        };
        let slot = self.slot(&request, rpc)?;
        let in_use = self.connection.begin(Some(slot.clone()));
        let (mut head, body) = request.into_parts();
        let path = head.uri.clone();
        head.extensions.insert(Peer {
            bot: self.bot.clone(),
            slot,
            arrived,
        });
        let connection = &self.connection;
        let body = if rpc == Rpc::Reflection {
            // A stream is read no longer than a message may take.
            let within = sleep(connection.listener.limits.request);
            Body::new(StreamBody::new(BodyStream::new(body).take_until(within)))
        } else {
            match connection.message(body, self.limit).await {
                Ok(message) => Body::new(Full::new(message)),
                Err(MessageError::BrokenOff) => {
                    return Ok(
                        Status::cancelled("the request was not received completely").into_http()
                    );
                }
                Err(MessageError::Slow(limit)) => return Err(BrokerError::Slow(limit)),
                Err(MessageError::TooLong(limit)) => {
                    return Err(BrokerError::Malformed(vec![too_long(limit)]));
                }
                Err(MessageError::Untrusted) => return Err(BrokerError::Untrusted),
            }
        };
        let mut routes = self.connection.listener.routes.clone();
        let response = match routes.call(Request::from_parts(head, body)).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        if rpc != Rpc::SignAndSend && is_unimplemented(&response) {
            return Err(BrokerError::MethodUnknown(path.path().to_owned()));
        }
        if let Some(problem) = unread(&response).filter(|_| rpc == Rpc::SignAndSend) {
            return Err(BrokerError::Malformed(vec![problem]));
        }
        // A health stream stays open without data; it must not count as an unread response.
        Ok(in_use.answer(response, rpc == Rpc::SignAndSend))
    }

    /// Takes a slot for a call, if it is allowed.
    fn slot(&self, request: &Request<Incoming>, rpc: Rpc) -> Result<CallSlot, BrokerError> {
        let admission = &self.connection.listener.broker.admission;
        if !self.connection.is_trusted() {
            return Err(BrokerError::Untrusted);
        }
        if let Some(problem) = oversized(request) {
            return Err(BrokerError::Malformed(vec![problem]));
        }
        if let Some(refusal) = self.refusal {
            return Err(refusal.into());
        }
        Ok(match rpc {
            Rpc::SignAndSend => admission.call(&self.bot)?,
            Rpc::Reflection | Rpc::Other => admission.helper(&self.bot)?,
        })
    }

    /// Audits a call that was refused before it reached the broker, and returns its status.
    fn refused(&self, error: BrokerError) -> Status {
        let id = RequestId::random();
        let broker = &self.connection.listener.broker;
        status(&broker.refuse(&self.bot, &id, error), &id)
    }
}
