//! One TLS connection of a bot or an admin: served as HTTP/2 until the peer disconnects or the broker closes it.
//!
//! The broker closes a connection that is too old or idle for too long, whose certificate has expired or is no longer
//! trusted, or whose peer does not read responses, and all connections at shutdown.

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::{Code, Status};

use super::accept::{Acceptor, shutdown_requested};
use super::tls::{Tls, Trust};
use crate::base::lock::Mutex;
use crate::base::paced::Paced;
use crate::broker::Broker;
use crate::broker::admission::{CallSlot, ConnectionSlot};
use crate::config::ConnectionLimits;
use crate::kucoin::Malformed;

/// How long a peer may take to read a response, beyond the time for its size.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Bytes of a response for which its peer gets one more second, however fast it reads.
const ANSWER_BYTES_PER_SECOND: usize = 256 * 1024;

/// Bytes of a response that are passed on at once. The next ones wait until the peer has read these, so that an unread
/// response is noticed.
const PIECE: usize = 16 * 1024;

/// Bytes of responses that a connection buffers for its peer.
const SEND_BUFFER: usize = 64 * 1024;

/// Bytes of a call's headers; no call needs as many.
const HEADER_BYTES: usize = 16 * 1024;

/// Bytes of headers that are read, so that the broker itself can refuse a call with more than [`HEADER_BYTES`]. Beyond
/// this, the HTTP library responds with 431 and without details, and gRPC clients do not even send the call.
const READ_HEADER_BYTES: u32 = 256 * 1024;

/// Interval of pings, and how long to wait for a pong before the connection closes.
const PING: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));

/// How often a connection is checked. Certificates expire by the wall clock, also while the machine is suspended.
const CHECK_EVERY: Duration = Duration::from_secs(5);

/// How long a closing connection waits for a peer that neither calls nor disconnects.
const CLOSE_IDLE: Duration = Duration::from_secs(5);

/// The same while the broker stops: enough for a call that was sent before its client got GOAWAY.
pub(super) const STOP_IDLE: Duration = Duration::from_millis(200);

/// What all connections of a listener share.
pub(super) struct Listener {
    pub(super) broker: Arc<Broker>,
    pub(super) routes: Routes,
    pub(super) tls: watch::Receiver<Arc<Tls>>,
    pub(super) limits: ConnectionLimits,
    pub(super) stopping: watch::Receiver<bool>,
    /// Changes when a stop begins and another process keeps the socket open: the connections that are open then close, so that
    /// their clients connect again and wait in the socket for the next broker.
    pub(super) handover: watch::Receiver<()>,
    /// The open connections.
    pub(super) connections: TaskTracker,
}

/// One connection.
pub(super) struct ClientConnection {
    pub(super) listener: Arc<Listener>,
    trust: Trust,
    /// Changes when it must close for the next broker.
    handover: watch::Receiver<()>,
    /// Cancelled when it must make room for another connection.
    eviction: CancellationToken,
    /// When each response must have been read by its peer.
    answers: AnswerDeadlines,
    calls: AtomicUsize,
    /// How many calls it has had; numbers the next one.
    numbers: AtomicU64,
    /// When its last call ended, in milliseconds since boot.
    used_ms: AtomicI64,
    /// Its slot among the bots' connections.
    _slot: Option<ConnectionSlot>,
}

/// Why the broker closes a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Close {
    Age,
    Certificate,
    Idle,
    Evicted,
    Stopping,
    /// The peer does not read responses in time.
    Stuck,
}

/// Why the message of a call could not be read.
pub(super) enum MessageError<E> {
    /// The stream or connection ended before the whole message was received.
    BrokenOff,
    /// It is longer than this number of bytes.
    TooLong(usize),
    /// The listener refuses to receive so many bytes.
    Refused(E),
    /// It did not arrive within this time.
    Slow(Duration),
    /// The peer's certificate is no longer trusted.
    Untrusted,
}

impl Listener {
    pub(super) fn acceptor(&self) -> Acceptor {
        Acceptor {
            tls: self.tls.clone(),
            within: self.limits.handshake,
            metrics: Arc::clone(&self.broker.metrics),
            stopping: self.stopping.clone(),
            handover: self.handover.clone(),
            connections: self.connections.clone(),
        }
    }

    fn boot_ms(&self) -> i64 {
        i64::try_from(self.broker.clock.boot().as_millis()).unwrap_or(i64::MAX)
    }
}

impl ClientConnection {
    pub(super) fn new(
        listener: Arc<Listener>,
        trust: Trust,
        handover: watch::Receiver<()>,
        eviction: CancellationToken,
        slot: Option<ConnectionSlot>,
    ) -> Arc<Self> {
        let used_ms = AtomicI64::new(listener.boot_ms());
        Arc::new(Self {
            listener,
            trust,
            handover,
            eviction,
            answers: AnswerDeadlines::default(),
            calls: AtomicUsize::new(0),
            numbers: AtomicU64::new(0),
            used_ms,
            _slot: slot,
        })
    }

    /// Runs `call` for each call, at most `streams` at the same time; closes the connection after `age` at the latest.
    pub(super) async fn serve<F: Future<Output = Response<Body>> + Send + 'static>(
        &self,
        stream: TlsStream<TcpStream>,
        streams: u32,
        age: Duration,
        call: impl Fn(Request<Incoming>) -> F,
    ) {
        let service = service_fn(|request| {
            let answer = call(request);
            async move { Ok::<_, Infallible>(answer.await) }
        });
        let mut http = http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .keep_alive_interval(PING.0)
            .keep_alive_timeout(PING.1)
            .max_concurrent_streams(streams)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(READ_HEADER_BYTES);
        let stream = TokioIo::new(Paced::http2(stream, self.listener.limits.read_rate));
        let mut http = pin!(http.serve_connection(stream, service));
        let reason = tokio::select! {
            // The peer disconnected or broke the protocol: there is nobody to respond to.
            _ = &mut http => return,
            reason = self.must_end(age) => reason,
        };
        tracing::debug!(?reason, "closing connection");
        if reason == Close::Stuck {
            return;
        }
        http.as_mut().graceful_shutdown();
        let idle = if reason == Close::Stopping {
            STOP_IDLE
        } else {
            CLOSE_IDLE
        };
        // Calls in flight run to completion, also if the peer has disconnected.
        tokio::select! {
            _ = timeout(self.listener.limits.grace, http) => {}
            () = self.unused(idle) => {}
        }
    }

    /// Returns once the connection has been idle for `limit` from now.
    async fn unused(&self, limit: Duration) {
        loop {
            sleep(limit).await;
            if self.is_idle_for(limit) {
                return;
            }
        }
    }

    /// Whether it has no calls and has had none for `limit`.
    fn is_idle_for(&self, limit: Duration) -> bool {
        let idle_ms = self.listener.boot_ms() - self.used_ms.load(Ordering::Relaxed);
        self.calls.load(Ordering::Relaxed) == 0
            && idle_ms >= i64::try_from(limit.as_millis()).unwrap_or(i64::MAX)
    }

    /// Returns once the connection must be closed.
    async fn must_end(&self, age: Duration) -> Close {
        let (mut trust, mut stopping) = (self.trust.changes(), self.listener.stopping.clone());
        let mut handover = self.handover.clone();
        let mut age = pin!(sleep(age));
        loop {
            tokio::select! {
                () = &mut age => return Close::Age,
                () = shutdown_requested(&mut stopping) => return Close::Stopping,
                Ok(()) = handover.changed() => return Close::Stopping,
                () = self.eviction.cancelled() => return Close::Evicted,
                Ok(()) = trust.changed() => {}
                () = sleep(CHECK_EVERY) => {}
            }
            if !self.is_trusted() {
                return Close::Certificate;
            }
            if self.answers.is_one_over() {
                return Close::Stuck;
            }
            if self.is_idle_for(self.listener.limits.idle) {
                return Close::Idle;
            }
        }
    }

    /// Whether the peer's certificate is still valid and trusted.
    pub(super) fn is_trusted(&self) -> bool {
        self.trust.holds(self.listener.broker.clock.wall_ms())
    }

    /// Reads the whole message of a call, and calls `admit` with the number of bytes of each part of it. The peer must be
    /// trusted before and after.
    pub(super) async fn message<E>(
        &self,
        body: Incoming,
        limit: usize,
        admit: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<Bytes, MessageError<E>> {
        if !self.is_trusted() {
            return Err(MessageError::Untrusted);
        }
        let within = self.listener.limits.request;
        let message = timeout(within, read(body, limit, admit)).await;
        let message = message.map_err(|_| MessageError::Slow(within))??;
        // The certificate may have expired, or its CA may have been removed, since the call started.
        if self.is_trusted() {
            Ok(message)
        } else {
            Err(MessageError::Untrusted)
        }
    }

    /// Counts a call until its response is written.
    pub(super) fn begin(self: &Arc<Self>) -> InUse {
        self.calls.fetch_add(1, Ordering::Relaxed);
        InUse {
            connection: Arc::clone(self),
            number: self.numbers.fetch_add(1, Ordering::Relaxed),
            slot: None,
        }
    }
}

/// When the responses of a connection must have been read, by the number of the call. A peer that reads slowly cannot put
/// its deadline off.
#[derive(Debug, Default)]
struct AnswerDeadlines(Mutex<HashMap<u64, Instant>>);

impl AnswerDeadlines {
    /// The response to this call is ready.
    fn start(&self, number: u64) {
        self.0.lock().insert(number, Instant::now() + ANSWER_WITHIN);
    }

    /// The response has this many bytes more than was known.
    fn extend(&self, number: u64, bytes: usize) {
        let millis = bytes.saturating_mul(1000) / ANSWER_BYTES_PER_SECOND;
        if let Some(deadline) = self.0.lock().get_mut(&number) {
            *deadline += Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX));
        }
    }

    fn end(&self, number: u64) {
        self.0.lock().remove(&number);
    }

    /// Whether a response is unread after its deadline.
    fn is_one_over(&self) -> bool {
        let now = Instant::now();
        self.0.lock().values().any(|deadline| *deadline < now)
    }
}

/// A call in flight on its connection.
pub(super) struct InUse {
    connection: Arc<ClientConnection>,
    number: u64,
    /// The call's slot, once it has one.
    pub(super) slot: Option<CallSlot>,
}

async fn read<E>(
    mut body: Incoming,
    limit: usize,
    mut admit: impl FnMut(usize) -> Result<(), E>,
) -> Result<Bytes, MessageError<E>> {
    // Most messages are one frame, which is not copied.
    let (mut first, mut rest) = (Bytes::new(), BytesMut::new());
    while let Some(frame) = body.frame().await {
        let Ok(part) = frame.map_err(|_| MessageError::BrokenOff)?.into_data() else {
            continue;
        };
        if part.len() > limit - first.len() - rest.len() {
            return Err(MessageError::TooLong(limit));
        }
        admit(part.len()).map_err(MessageError::Refused)?;
        if first.is_empty() && rest.is_empty() {
            first = part;
        } else {
            rest.extend_from_slice(&std::mem::take(&mut first));
            rest.extend_from_slice(&part);
        }
    }
    Ok(if rest.is_empty() {
        first
    } else {
        rest.freeze()
    })
}

impl InUse {
    /// The response, which keeps the call's slot until it is written. With `is_timed`, the peer must read it in time.
    pub(super) fn answer(self, response: Response<Body>, is_timed: bool) -> Response<Body> {
        if is_timed {
            self.connection.answers.start(self.number);
        }
        response.map(|body| {
            Body::new(AnswerBody {
                body,
                rest: Bytes::new(),
                in_use: Arc::new(self),
            })
        })
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let connection = &self.connection;
        connection.answers.end(self.number);
        connection.calls.fetch_sub(1, Ordering::Relaxed);
        let now_ms = connection.listener.boot_ms();
        connection.used_ms.store(now_ms, Ordering::Relaxed);
    }
}

/// A response that keeps its call's slot until it is written, since an unread response uses memory.
struct AnswerBody {
    body: Body,
    /// The part of the body that has not been passed on yet.
    rest: Bytes,
    in_use: Arc<InUse>,
}

/// Data of a response. The HTTP library frees it once it is written to the connection, or the stream has ended.
struct Unwritten {
    data: Bytes,
    _in_use: Arc<InUse>,
}

impl AsRef<[u8]> for Unwritten {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl http_body::Body for AnswerBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.rest.is_empty() {
            let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
            match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => {
                    let in_use = Arc::clone(&self.in_use);
                    in_use.connection.answers.extend(in_use.number, data.len());
                    self.rest = Bytes::from_owner(Unwritten {
                        data,
                        _in_use: in_use,
                    });
                }
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
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

/// The problem of a message of more than `limit` bytes.
pub(super) fn too_long(limit: usize) -> Malformed {
    Malformed::new("message", format!("expected at most {limit} bytes"))
}

/// The problem of a request that is not a gRPC call. Cross-site requests of browsers never are gRPC calls.
///
/// Source: gRPC over HTTP/2, "Requests".
pub(super) fn not_grpc<B>(request: &Request<B>) -> Option<Malformed> {
    let kind = request.headers().get(CONTENT_TYPE);
    let kind = kind.map(HeaderValue::as_bytes).unwrap_or_default();
    let is_grpc = request.method() == Method::POST && kind.starts_with(b"application/grpc");
    let problem = "expected POST with content-type application/grpc";
    (!is_grpc).then(|| Malformed::new("content-type", problem))
}

/// The response to a request that is not a gRPC call, according to the same source.
pub(super) fn unsupported_media_type() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    response
}

/// The problem of a call whose headers and path are longer than [`HEADER_BYTES`], counted as in RFC 9113, section 6.5.2.
pub(super) fn oversized<B>(request: &Request<B>) -> Option<Malformed> {
    let path = request.uri().path_and_query();
    let path = (":path", path.map_or(0, |path| path.as_str().len()));
    let headers = request.headers().iter();
    let bytes: usize = headers
        .map(|(name, value)| (name.as_str(), value.len()))
        .chain([path])
        .map(|(name, length)| name.len() + length + 32)
        .sum();
    (bytes > HEADER_BYTES).then(|| {
        let problem = format!("expected at most {HEADER_BYTES} bytes, got {bytes}");
        Malformed::new("metadata", problem)
    })
}

/// The problem that the gRPC library reported for an unreadable message or an unknown compression. Its status has no
/// details, so a bot would have to treat the call as `maybe_sent`.
pub(super) fn unread(response: &Response<Body>) -> Option<Malformed> {
    let status = Status::from_header_map(response.headers())?;
    let is_ours = status.code() == Code::Ok || !status.details().is_empty();
    (!is_ours).then(|| Malformed::new("message", status.message()))
}

/// Whether no service has the called method: only then does the gRPC library return UNIMPLEMENTED without a message. With
/// a message, a service lacks something else, such as a compression.
pub(super) fn is_unimplemented(response: &Response<Body>) -> bool {
    let status = Status::from_header_map(response.headers());
    status.is_some_and(|status| status.code() == Code::Unimplemented && status.message().is_empty())
}
