//! The admins' listener: TLS 1.3 with an admin's certificate, few connections, small calls.
//!
//! It has nothing to do with the bots' places: whatever bots do, an admin gets in. A call that has arrived goes on to its
//! end, also when the admin hangs up or loses his certificate meanwhile.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::service::Routes;
use tonic::{Code, Status};

use super::accept::{Acceptor, is_grpc, oversized, told, unsupported_media_type};
use super::listener::{ConnectionLimits, READ_HEADER_BYTES, is_unimplemented};
use super::places::Places;
use super::tls::{Tls, Trust};
use crate::api::admin::AdminError;
use crate::broker::Broker;
use crate::ids::AdminId;
use crate::kucoin::Malformed;
use crate::text::clean;

/// Connections of admins. One more ends the oldest of the admin who has the most.
const CONNECTIONS: usize = 16;

/// Calls at once on one connection.
const STREAMS: u32 = 8;

/// How long a connection lives: a command needs one for a moment.
const AGE: Duration = Duration::from_secs(600);

/// More than any call needs: names, or a key.
const MESSAGE_BYTES: usize = 64 * 1024;

/// Characters of a method in the log: ours have fewer.
const METHOD_CHARS: usize = 100;

/// A peer that answers no ping for so long is gone.
const PING: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));

/// How often a connection looks at the wall clock: its certificate ends by that.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Accepts admins.
pub(super) struct AdminListener {
    pub(super) broker: Arc<Broker>,
    pub(super) routes: Routes,
    pub(super) tls: watch::Receiver<Arc<Tls>>,
    pub(super) limits: ConnectionLimits,
    pub(super) stopping: watch::Receiver<bool>,
}

/// One connection of one admin.
struct Connection {
    listener: Arc<AdminListener>,
    admin: AdminId,
    trust: Trust,
    calls: TaskTracker,
}

impl AdminListener {
    /// Serves until told to stop; returns once every connection and every call has ended.
    pub(super) async fn serve(self, socket: TcpListener) {
        let (listener, calls) = (Arc::new(self), TaskTracker::new());
        let acceptor = Acceptor {
            tls: listener.tls.clone(),
            within: listener.limits.handshake,
            metrics: Arc::clone(&listener.broker.metrics),
            stopping: listener.stopping.clone(),
        };
        let (places, tracker) = (Places::new(CONNECTIONS), calls.clone());
        let serve = move |stream, trust: Trust| {
            let (places, listener, calls) =
                (Arc::clone(&places), Arc::clone(&listener), tracker.clone());
            async move {
                // The verifier has seen to it that the certificate names one admin.
                let Some(admin) = trust.caller::<AdminId>() else {
                    return listener.broker.metrics.connection_refused("certificate");
                };
                let place = Places::take(&places, admin.clone());
                let connection = Connection {
                    listener,
                    admin,
                    trust,
                    calls,
                };
                Arc::new(connection).serve(stream, &place.is_given_up).await;
            }
        };
        acceptor.run(socket, serve).await;
        calls.close();
        calls.wait().await;
    }
}

impl Connection {
    async fn serve(self: Arc<Self>, stream: TlsStream<TcpStream>, is_given_up: &CancellationToken) {
        let service = service_fn(|request| {
            let connection = Arc::clone(&self);
            async move { Ok::<_, Infallible>(connection.call(request).await) }
        });
        let mut http = http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .keep_alive_interval(PING.0)
            .keep_alive_timeout(PING.1)
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(READ_HEADER_BYTES);
        let mut http = pin!(http.serve_connection(TokioIo::new(stream), service));
        let why = tokio::select! {
            // The peer went, or broke the protocol: nobody is left to tell.
            _ = &mut http => return,
            why = self.must_end() => why,
            () = is_given_up.cancelled() => "one too many",
        };
        tracing::debug!(admin.id = %self.admin, why, "connection ends");
        http.as_mut().graceful_shutdown();
        // Calls in flight end whether or not anybody waits for their answer.
        let _ = timeout(self.listener.limits.grace, http).await;
    }

    /// Returns once the connection shall take no more calls, with the reason.
    async fn must_end(&self) -> &'static str {
        let (mut tls, mut stopping) = (self.trust.changes(), self.listener.stopping.clone());
        let mut age = pin!(sleep(AGE));
        loop {
            tokio::select! {
                () = &mut age => return "age",
                () = told(&mut stopping) => return "stopping",
                Ok(()) = tls.changed() => {}
                () = sleep(LOOK_EVERY) => {}
            }
            if !self.is_trusted() {
                return "certificate";
            }
        }
    }

    /// Whether the admin's certificate would still be let in.
    fn is_trusted(&self) -> bool {
        self.trust.holds(self.listener.broker.clock.wall_ms())
    }

    async fn call(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let began = Instant::now();
        let method = clean(request.uri().path(), METHOD_CHARS).into_owned();
        if !is_grpc(&request) {
            let problem = "expected POST with content-type application/grpc";
            let problem = Malformed::new("content-type", problem);
            self.refused(&AdminError::Malformed(vec![problem]));
            if let Some(untold) = self.listener.broker.metrics.may_tell_of_stranger() {
                tracing::warn!(admin.id = %self.admin, method, http.status = 415, untold, "admin call refused: not gRPC");
            }
            return unsupported_media_type();
        }
        let response = match self.answer(request).await {
            Ok(response) => response,
            Err(error) => {
                self.refused(&error);
                Status::from(error).into_http()
            }
        };
        let code =
            Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code());
        let duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(admin.id = %self.admin, method, ?code, duration_ms, "admin call");
        response
    }

    /// Counts and audits a call that never got as far as the API.
    fn refused(&self, error: &AdminError) {
        if let Some(reason) = error.refusal() {
            let broker = &self.listener.broker;
            broker.refuse_admin(&self.admin, reason, error.to_string());
        }
    }

    /// In a task of its own, so that an admin who hangs up tears nothing.
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, AdminError> {
        if let Some(problem) = oversized(&request) {
            return Err(AdminError::Malformed(vec![problem]));
        }
        let (mut head, body) = request.into_parts();
        let method = head.uri.path().to_owned();
        let body = self.whole(body).await?;
        head.extensions.insert(self.admin.clone());
        let request = Request::from_parts(head, Body::new(body));
        let mut routes = self.listener.routes.clone();
        let answering = self.calls.spawn(async move { routes.call(request).await });
        // An error is a panic, and the log has it.
        let response = match answering.await.map_err(|_| AdminError::Internal)? {
            Ok(response) => response,
            Err(never) => match never {},
        };
        if is_unimplemented(&response) {
            return Err(AdminError::MethodUnknown(method));
        }
        match unread(&response) {
            Some(problem) => Err(malformed(problem)),
            None => Ok(response),
        }
    }

    /// The body, once all of it is there, from an admin who is trusted before and after.
    async fn whole(&self, body: Incoming) -> Result<Full<bytes::Bytes>, AdminError> {
        if !self.is_trusted() {
            return Err(AdminError::CallerUnknown);
        }
        let limit = self.listener.limits.request;
        let body = timeout(limit, Limited::new(body, MESSAGE_BYTES).collect()).await;
        let body = body.map_err(|_| AdminError::Slow(limit))?;
        let body = body.map_err(|error| {
            malformed(format!("{error}; at most {MESSAGE_BYTES} bytes are read"))
        })?;
        if self.is_trusted() {
            Ok(Full::new(body.to_bytes()))
        } else {
            Err(AdminError::CallerUnknown)
        }
    }
}

fn malformed(problem: String) -> AdminError {
    AdminError::Malformed(vec![Malformed::new("message", problem)])
}

/// What the gRPC library said of a message that it could not read: it says so without our details.
fn unread(response: &Response<Body>) -> Option<String> {
    let status = Status::from_header_map(response.headers())?;
    let is_ours = !status.details().is_empty();
    (!is_ours).then(|| status.message().to_owned())
}
