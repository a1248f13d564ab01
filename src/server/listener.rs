//! The bots' listener: TLS 1.3 with client certificates, always; HTTP/2 connections that end in time.
//!
//! A connection ends gracefully after an hour, with its certificate, when its CA is trusted no longer, or when it has
//! been idle for long. What a bot may have at once is bounded, and a call that is refused here is told why.

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_rustls::server::TlsStream;
use tonic::codegen::Service;
use tonic::service::Routes;
use tonic::{Code, Status};

use super::accept::{Acceptor, is_grpc, oversized, told, unsupported_media_type};
use super::tls::{Tls, Trust};
use crate::api::grpc::{Arrived, SIGN_AND_SEND};
use crate::api::status::status;
use crate::broker::admission::{Admitted, CallSlot, ConnectionSlot};
use crate::broker::{Broker, BrokerError, Overload};
use crate::ids::{BotId, RequestId};
use crate::kucoin::Malformed;

/// How long an answer may wait for its bot to take it.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Calls at once on one connection; gRPC clients queue what is beyond.
const STREAMS: u32 = 256;

/// Bytes of an answer that are handed on at once. The next ones wait until the bot has taken these, so that an answer
/// that nobody reads is known to be one.
const PIECE: usize = 16 * 1024;

/// Bytes of answers that a connection buffers for its bot.
const SEND_BUFFER: usize = 64 * 1024;

/// Bytes of a call's headers: more than any call needs.
pub(super) const HEADER_BYTES: usize = 16 * 1024;

/// Bytes of headers that are read, so that a call with more than [`HEADER_BYTES`] is refused by us: the HTTP library
/// answers what is beyond with 431, without our details, and libraries of bots do not even send it.
pub(super) const READ_HEADER_BYTES: u32 = 256 * 1024;

/// A peer that answers no ping for so long is gone.
const PING: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));

/// Why a connection ends whose peer does not read.
const STUCK: &str = "answers are not taken";

/// How often a connection looks at the wall clock: its certificate ends by that, also after the machine has slept.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How long a connection that is one too many is kept, to tell its calls why.
const TURNED_AWAY_FOR: Duration = Duration::from_secs(5);

/// How long a connection that shall end waits for a peer that neither calls nor goes.
const FAREWELL: Duration = Duration::from_secs(5);

/// What a connection may take.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// For the TLS handshake.
    pub handshake: Duration,
    /// For a request to arrive whole.
    pub request: Duration,
    /// Without a call.
    pub idle: Duration,
    /// In all.
    pub age: Duration,
    /// For calls in flight, once the connection shall end.
    pub grace: Duration,
}

/// Accepts bots.
pub(super) struct Listener {
    pub(super) broker: Arc<Broker>,
    pub(super) routes: Routes,
    pub(super) tls: watch::Receiver<Arc<Tls>>,
    pub(super) limits: ConnectionLimits,
    pub(super) stopping: watch::Receiver<bool>,
}

/// One connection of one bot.
struct Connection {
    listener: Arc<Listener>,
    bot: BotId,
    trust: Trust,
    /// Answers that are being written, by their number, since when.
    answers: Mutex<HashMap<u64, Instant>>,
    /// Why its calls are refused; none where they are served.
    refusal: Option<Overload>,
    calls: AtomicUsize,
    /// How many calls it has had.
    numbers: AtomicU64,
    /// When its last call ended, in milliseconds since boot.
    used_ms: AtomicI64,
    _slot: ConnectionSlot,
}

impl Listener {
    /// Serves until told to stop; returns once every connection has ended.
    pub(super) async fn serve(self, socket: TcpListener) {
        let listener = Arc::new(self);
        let acceptor = Acceptor {
            tls: listener.tls.clone(),
            within: listener.limits.handshake,
            metrics: Arc::clone(&listener.broker.metrics),
            stopping: listener.stopping.clone(),
        };
        let serve = move |stream, trust| Arc::clone(&listener).admit(stream, trust);
        acceptor.run(socket, serve).await;
    }

    /// Serves a connection if its bot has a place for it.
    async fn admit(self: Arc<Self>, stream: TlsStream<TcpStream>, trust: Trust) {
        // The verifier has seen to it that the certificate names one bot.
        let Some(bot) = trust.caller::<BotId>() else {
            return self.broker.metrics.connection_refused("certificate");
        };
        let (slot, refusal) = match self.broker.admission.connection(&bot) {
            Some(Admitted::Served(slot)) => (slot, None),
            Some(Admitted::TurnedAway(slot, refusal)) => {
                let whose = match refusal {
                    Overload::Connections(_) => "many",
                    _ => "bot",
                };
                self.broker.metrics.connection_refused(whose);
                if let Some(untold) = self.broker.metrics.may_tell_of_stranger() {
                    tracing::warn!(bot.id = %bot, untold, "{refusal}");
                }
                (slot, Some(refusal))
            }
            None => return self.broker.metrics.connection_refused("many"),
        };
        let used_ms = AtomicI64::new(self.boot_ms());
        let connection = Arc::new(Connection {
            listener: self,
            bot,
            trust,
            answers: Mutex::default(),
            refusal,
            calls: AtomicUsize::new(0),
            numbers: AtomicU64::new(0),
            used_ms,
            _slot: slot,
        });
        connection.serve(stream).await;
    }

    fn boot_ms(&self) -> i64 {
        i64::try_from(self.broker.clock.boot().as_millis()).unwrap_or(i64::MAX)
    }
}

impl Connection {
    async fn serve(self: Arc<Self>, stream: TlsStream<TcpStream>) {
        let service = service_fn(|request| {
            let connection = Arc::clone(&self);
            async move { Ok::<_, Infallible>(connection.call(request).await) }
        });
        let mut http = http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .keep_alive_interval(PING.0)
            .keep_alive_timeout(PING.1)
            .max_concurrent_streams(STREAMS)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(READ_HEADER_BYTES);
        let mut http = pin!(http.serve_connection(TokioIo::new(stream), service));
        let why = tokio::select! {
            // The peer went, or broke the protocol: nobody is left to tell.
            _ = &mut http => return,
            why = self.must_end() => why,
        };
        tracing::debug!(bot.id = %self.bot, why, "connection ends");
        if why == STUCK {
            return;
        }
        http.as_mut().graceful_shutdown();
        // Calls in flight are the broker's, and end whether or not anybody waits for their answer.
        tokio::select! {
            _ = timeout(self.listener.limits.grace, http) => {}
            () = self.unused() => {}
        }
    }

    /// Returns once no call has used the connection for a while from now on.
    async fn unused(&self) {
        loop {
            sleep(FAREWELL).await;
            if self.is_idle_for(FAREWELL) {
                return;
            }
        }
    }

    /// Whether it has no call, and had none for so long.
    fn is_idle_for(&self, limit: Duration) -> bool {
        let idle_ms = self.listener.boot_ms() - self.used_ms.load(Ordering::Relaxed);
        self.calls.load(Ordering::Relaxed) == 0
            && idle_ms >= i64::try_from(limit.as_millis()).unwrap_or(i64::MAX)
    }

    /// Returns once the connection shall take no more calls, with the reason.
    async fn must_end(&self) -> &'static str {
        let limits = self.listener.limits;
        let age = match self.refusal {
            Some(_) => TURNED_AWAY_FOR,
            // Not all at once that came at once.
            None => limits.age.mul_f64(0.9 + 0.1 * fastrand::f64()),
        };
        let (mut trust, mut stopping) = (self.trust.changes(), self.listener.stopping.clone());
        let mut age = pin!(sleep(age));
        loop {
            tokio::select! {
                () = &mut age => return "age",
                () = told(&mut stopping) => return "stopping",
                Ok(()) = trust.changed() => {}
                () = sleep(LOOK_EVERY) => {}
            }
            if !self.is_trusted() {
                return "certificate";
            }
            if self.is_stuck() {
                return STUCK;
            }
            if self.is_idle_for(limits.idle) {
                return "idle";
            }
        }
    }

    /// Whether the bot's certificate would still be let in.
    fn is_trusted(&self) -> bool {
        self.trust.holds(self.listener.broker.clock.wall_ms())
    }

    /// Whether an answer has been waiting for long to be taken.
    fn is_stuck(&self) -> bool {
        let answers = self.answers();
        let oldest = answers.values().min();
        oldest.is_some_and(|since| since.elapsed() > ANSWER_WITHIN)
    }

    fn answers(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Instant>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One call: refused here, or passed on with the bot's name.
    async fn call(self: Arc<Self>, request: Request<Incoming>) -> Response<tonic::body::Body> {
        let broker = &self.listener.broker;
        if !is_grpc(&request) {
            let problem = "expected POST with content-type application/grpc";
            let problem = Malformed::new("content-type", problem);
            drop(self.refused(BrokerError::Malformed(vec![problem])));
            return unsupported_media_type();
        }
        let is_ours = request.uri().path() == SIGN_AND_SEND;
        let refused = if !self.is_trusted() {
            Err(BrokerError::Untrusted)
        } else if let Some(problem) = oversized(&request) {
            Err(BrokerError::Malformed(vec![problem]))
        } else if let Some(refusal) = self.refusal {
            Err(refusal.into())
        } else if is_ours {
            broker.admission.call(&self.bot).map_err(BrokerError::from)
        } else {
            broker
                .admission
                .helper(&self.bot)
                .map_err(BrokerError::from)
        };
        let slot = match refused {
            Ok(slot) => slot,
            Err(error) => return self.refused(error).into_http(),
        };
        let in_use = InUse::new(&self, slot.clone());
        let method = (!is_ours).then(|| request.uri().path().to_owned());
        let mut request = request.map(|body| {
            tonic::body::Body::new(Timed {
                body,
                deadline: Box::pin(sleep(self.listener.limits.request)),
                connection: Arc::clone(&self),
            })
        });
        request.extensions_mut().insert(Arrived(Instant::now()));
        request.extensions_mut().insert(self.bot.clone());
        request.extensions_mut().insert(slot);
        let mut routes = self.listener.routes.clone();
        let response = match routes.call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        if let Some(problem) = unread(&response).filter(|_| is_ours) {
            let problem = Malformed::new("message", problem);
            return self
                .refused(BrokerError::Malformed(vec![problem]))
                .into_http();
        }
        if let Some(method) = method.filter(|_| is_unimplemented(&response)) {
            return self.refused(BrokerError::MethodUnknown(method)).into_http();
        }
        if is_ours {
            in_use.is_answered();
        }
        response.map(|body| {
            tonic::body::Body::new(Held {
                body,
                rest: Bytes::new(),
                in_use,
                // A stream of health reports lasts; it is no answer that waits.
                is_timed: is_ours,
            })
        })
    }

    /// Records a call that never got as far as the broker, and makes the answer to it.
    fn refused(&self, error: BrokerError) -> Status {
        let id = RequestId::random();
        status(&self.listener.broker.refuse(&self.bot, &id, error), &id)
    }
}

/// What the gRPC library said of a message that it could not read (too large, or not the one it should be): it says so
/// without our details, and a bot would have to take it for `maybe_sent`.
fn unread(response: &Response<tonic::body::Body>) -> Option<String> {
    let status = Status::from_header_map(response.headers())?;
    let is_ours = !status.details().is_empty();
    let is_about_the_message = matches!(
        status.code(),
        Code::Internal
            | Code::InvalidArgument
            | Code::OutOfRange
            | Code::ResourceExhausted
            | Code::Unimplemented
    );
    (!is_ours && is_about_the_message).then(|| status.message().to_owned())
}

/// Whether no service has the method that was called: only then does the gRPC library answer UNIMPLEMENTED without a
/// message. With one, a service says what else it cannot do, such as a compression.
pub(super) fn is_unimplemented(response: &Response<tonic::body::Body>) -> bool {
    let status = Status::from_header_map(response.headers());
    status.is_some_and(|status| status.code() == Code::Unimplemented && status.message().is_empty())
}

/// Counts a call on its connection, until its answer is written.
struct InUse {
    connection: Arc<Connection>,
    number: u64,
    _slot: CallSlot,
}

impl InUse {
    fn new(connection: &Arc<Connection>, slot: CallSlot) -> Self {
        connection.calls.fetch_add(1, Ordering::Relaxed);
        Self {
            connection: Arc::clone(connection),
            number: connection.numbers.fetch_add(1, Ordering::Relaxed),
            _slot: slot,
        }
    }

    /// From now on it is for the bot to take what comes of the answer.
    fn is_answered(&self) {
        self.connection
            .answers()
            .insert(self.number, Instant::now());
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let connection = &self.connection;
        connection.answers().remove(&self.number);
        connection.calls.fetch_sub(1, Ordering::Relaxed);
        let now_ms = connection.listener.boot_ms();
        connection.used_ms.store(now_ms, Ordering::Relaxed);
    }
}

/// An answer that holds its call's place until it is written: one that nobody takes uses memory.
struct Held {
    body: tonic::body::Body,
    /// What of the body has not been handed on yet.
    rest: Bytes,
    in_use: InUse,
    /// Whether it must be taken within a limit.
    is_timed: bool,
}

impl Body for Held {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.rest.is_empty() {
            let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
            match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => self.rest = data,
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
        if self.is_timed {
            // The bot takes it: the wait begins anew.
            self.in_use.is_answered();
        }
        let piece = self.rest.len().min(PIECE);
        let piece = self.rest.split_to(piece);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// A body that must have arrived within a limit.
struct Timed {
    body: Incoming,
    deadline: Pin<Box<Sleep>>,
    connection: Arc<Connection>,
}

impl Body for Timed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        // First, so that a body that comes in drops never outlives it.
        if self.deadline.as_mut().poll(context).is_ready() {
            let error = BrokerError::Slow(self.connection.listener.limits.request);
            return Poll::Ready(Some(Err(self.connection.refused(error))));
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        // Its CA may have been taken away, or its time be over, since the head of the call came.
        if frame.is_some() && !self.connection.is_trusted() {
            return Poll::Ready(Some(Err(self.connection.refused(BrokerError::Untrusted))));
        }
        Poll::Ready(frame)
            .map_err(|error| Status::cancelled(format!("the request broke off: {error}")))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
