//! The admin listener: few connections, small calls.
//!
//! It has its own limits, so an admin can connect whatever bots do. A call that has been received completes, even if the
//! admin disconnects or the certificate becomes invalid meanwhile.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::{Code, Status};

use super::connection::{
    ClientConnection, Listener, MessageError, is_unimplemented, not_grpc, oversized, too_long,
    unread, unsupported_media_type,
};
use super::handshakes::HandshakeSlots;
use super::tls::Trust;
use crate::api::admin_error::AdminError;
use crate::base::ids::AdminId;
use crate::base::text::clean;
use crate::kucoin::Malformed;

/// Concurrent connections of admins. One more closes the oldest one of the admin who has the most.
const CONNECTIONS: usize = 16;

/// Concurrent calls on one connection.
const STREAMS: u32 = 8;

/// Maximum age of a connection; a command needs one only briefly.
const AGE: Duration = Duration::from_secs(600);

/// Bytes of a message. No call needs as many: it holds names, or a key.
const MESSAGE_BYTES: usize = 64 * 1024;

/// Characters of a method name in the log; names of this API are shorter.
const METHOD_CHARS: usize = 100;

/// One connection of one admin.
struct AdminConnection {
    connection: Arc<ClientConnection>,
    admin: AdminId,
    calls: TaskTracker,
}

/// Serves admins until shutdown; returns once every connection and every call has ended.
pub(super) async fn serve(listener: Listener, socket: TcpListener) {
    let (listener, calls) = (Arc::new(listener), TaskTracker::new());
    let acceptor = listener.acceptor();
    let (slots, tracker) = (HandshakeSlots::new(CONNECTIONS), calls.clone());
    let serve = move |stream, trust: Trust, handover| {
        let (slots, listener, calls) = (Arc::clone(&slots), Arc::clone(&listener), tracker.clone());
        async move {
            // The verifier has made sure that the certificate names one admin.
            let Some(admin) = trust.caller::<AdminId>() else {
                return listener.broker.metrics.connection_refused("certificate");
            };
            let slot = HandshakeSlots::take(&slots, admin.clone());
            let connection =
                ClientConnection::new(listener, trust, handover, slot.eviction.clone(), None);
            let admin_connection = Arc::new(AdminConnection {
                connection,
                admin,
                calls,
            });
            let call = |request| Arc::clone(&admin_connection).call(request);
            admin_connection
                .connection
                .serve(stream, STREAMS, AGE, call)
                .await;
        }
    };
    acceptor.run(socket, serve).await;
    calls.close();
    calls.wait().await;
}

/// The name of a status as in the gRPC specification, such as `DEADLINE_EXCEEDED`.
fn status_name(code: Code) -> String {
    let mut name = String::new();
    for char in format!("{code:?}").chars() {
        if char.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(char.to_ascii_uppercase());
    }
    name
}

impl AdminConnection {
    async fn call(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let began = Instant::now();
        let method = request.uri().path().trim_start_matches('/');
        let method = clean(method, METHOD_CHARS).into_owned();
        if let Some(problem) = not_grpc(&request) {
            self.refused(&AdminError::Malformed(vec![problem])).await;
            let metrics = &self.connection.listener.broker.metrics;
            if let Some(suppressed) = metrics.allow_log() {
                tracing::warn!(admin.id = %self.admin, rpc.method = method, http.response.status_code = 415, suppressed, "admin call refused: not gRPC");
            }
            return unsupported_media_type();
        }
        let response = match self.answer(request).await {
            Ok(response) => response,
            Err(error) => {
                self.refused(&error).await;
                Status::from(error).into_http()
            }
        };
        let code =
            Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code());
        let duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(admin.id = %self.admin, rpc.method = method, rpc.response.status_code = status_name(code), duration_ms, "admin call");
        response
    }

    /// Counts and audits a call that was refused before it reached the API.
    async fn refused(&self, error: &AdminError) {
        if let Some(reason) = error.refusal() {
            let broker = &self.connection.listener.broker;
            let detail = error.to_string();
            broker.refuse_admin(&self.admin, reason, detail).await;
        }
    }

    /// Runs the call in a separate task, so that an admin who disconnects does not interrupt it.
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, AdminError> {
        if let Some(problem) = oversized(&request) {
            return Err(AdminError::Malformed(vec![problem]));
        }
        let in_use = self.connection.begin();
        let (mut head, body) = request.into_parts();
        let method = head.uri.path().to_owned();
        let message = self
            .connection
            .message(body, MESSAGE_BYTES, |_| Ok(()))
            .await?;
        head.extensions.insert(self.admin.clone());
        let request = Request::from_parts(head, Body::new(Full::new(message)));
        let mut routes = self.connection.listener.routes.clone();
        let answering = self.calls.spawn(async move { routes.call(request).await });
        // An error is a panic, which has been logged.
        let response = match answering.await.map_err(|_| AdminError::Internal)? {
            Ok(response) => response,
            Err(never) => match never {},
        };
        if is_unimplemented(&response) {
            return Err(AdminError::MethodUnknown(method));
        }
        match unread(&response) {
            Some(problem) => Err(AdminError::Malformed(vec![problem])),
            None => Ok(in_use.answer(response, true)),
        }
    }
}

impl From<MessageError<Infallible>> for AdminError {
    fn from(error: MessageError<Infallible>) -> Self {
        match error {
            MessageError::Refused(never) => match never {},
            MessageError::BrokenOff => {
                Self::Malformed(vec![Malformed::new("message", "not received completely")])
            }
            MessageError::TooLong(limit) => Self::Malformed(vec![too_long(limit)]),
            MessageError::Slow(limit) => Self::Slow(limit),
            MessageError::Untrusted => Self::CallerUnknown,
        }
    }
}
