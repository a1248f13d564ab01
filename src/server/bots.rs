//! The bots' listener: what a bot may have at once is bounded, and a call that is refused here is told why.

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

/// Calls at once on one connection; gRPC clients queue what is beyond.
const STREAMS: u32 = 256;

/// How long a connection that is one too many is kept, to tell its calls why.
const TURNED_AWAY_FOR: Duration = Duration::from_secs(5);

/// One connection of one bot.
struct BotConnection {
    connection: Arc<ClientConnection>,
    bot: BotId,
    /// Bytes of the longest message.
    limit: usize,
    /// Why its calls are refused; none where they are served.
    refusal: Option<Overload>,
}

/// What a bot may call.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Rpc {
    SignAndSend,
    /// Reads while it answers.
    Reflection,
    /// Health, and what there is not.
    Other,
}

/// Serves bots until told to stop; returns once every connection has ended. Messages have at most `limit` bytes.
pub(super) async fn serve(listener: Listener, socket: TcpListener, limit: usize) {
    let listener = Arc::new(listener);
    let acceptor = listener.acceptor();
    let serve = move |stream, trust| admit(Arc::clone(&listener), stream, trust, limit);
    acceptor.run(socket, serve).await;
}

/// Serves a connection if its bot has a place for it.
async fn admit(listener: Arc<Listener>, stream: TlsStream<TcpStream>, trust: Trust, limit: usize) {
    let metrics = &listener.broker.metrics;
    // The verifier has seen to it that the certificate names one bot.
    let Some(bot) = trust.caller::<BotId>() else {
        return metrics.connection_refused("certificate");
    };
    let (slot, refusal) = match listener.broker.admission.connection(&bot) {
        Some(Admitted::Served(slot)) => (slot, None),
        Some(Admitted::TurnedAway(slot, refusal)) => {
            let whose = match refusal {
                Overload::Connections(_) => "many",
                _ => "bot",
            };
            metrics.connection_refused(whose);
            if let Some(suppressed) = metrics.allow_log() {
                tracing::warn!(bot.id = %bot, suppressed, "{refusal}");
            }
            (slot, Some(refusal))
        }
        None => return metrics.connection_refused("many"),
    };
    let age = match refusal {
        Some(_) => TURNED_AWAY_FOR,
        // Not all at once that came at once.
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
    /// One call: refused here, or passed on with the bot's name.
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
        let slot = self.place(&request, rpc)?;
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
            // It is not read for longer than a message may take.
            let within = sleep(connection.listener.limits.request);
            Body::new(StreamBody::new(BodyStream::new(body).take_until(within)))
        } else {
            match connection.message(body, self.limit).await {
                Ok(message) => Body::new(Full::new(message)),
                Err(MessageError::BrokenOff) => {
                    return Ok(Status::cancelled("the request was cut off").into_http());
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
        // A stream of health reports lasts; it is no answer that waits.
        Ok(in_use.answer(response, rpc == Rpc::SignAndSend))
    }

    /// The place of a call, if it may have one.
    fn place(&self, request: &Request<Incoming>, rpc: Rpc) -> Result<CallSlot, BrokerError> {
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

    /// Records a call that never got as far as the broker, and makes the answer to it.
    fn refused(&self, error: BrokerError) -> Status {
        let id = RequestId::random();
        let broker = &self.connection.listener.broker;
        status(&broker.refuse(&self.bot, &id, error), &id)
    }
}
