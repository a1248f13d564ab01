//! The HTTP/1.1 server of both simulators: loopback only; a handler gets the complete request and returns an answer or a
//! fault.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, request};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

/// A request as it arrived: head (raw path and query in `uri`), complete body, and sender.
#[derive(Clone, Debug)]
pub struct Received {
    /// Method, target as sent, headers.
    pub head: Arc<request::Parts>,
    /// The body, byte for byte.
    pub body: Bytes,
    /// The certificates that the client presented, its own first; empty without TLS or if it presented none.
    pub certificates: Arc<[CertificateDer<'static>]>,
    /// Address and port of the sender.
    pub peer: SocketAddr,
}

/// What the server does with a request.
#[derive(Debug)]
pub enum Reply {
    /// Sends the complete answer.
    Answer(Response<Bytes>),
    /// Sends the head and the first bytes of the body, then closes the connection.
    CutShort(Response<Bytes>, usize),
    /// Keeps the connection open and never answers.
    Hang,
    /// Closes the connection without an answer.
    Close,
    /// Sends bytes that a well-behaved server does not send.
    Raw(Raw),
}

/// Bytes that are sent in place of an answer.
#[derive(Clone, Debug)]
pub struct Raw {
    /// Sent once.
    pub first: Bytes,
    /// Then sent again and again until the client disconnects; if empty, the connection closes after `first`.
    pub repeated: Bytes,
}

impl From<Response<Bytes>> for Reply {
    fn from(response: Response<Bytes>) -> Self {
        Self::Answer(response)
    }
}

/// A listening server; dropping it closes it and all its connections.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    in_progress: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

/// Counts a request until its handler ends or is dropped, because the client has disconnected.
struct InProgress(Arc<AtomicUsize>);

impl InProgress {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Server {
    /// Binds `address`, which must be loopback (port 0: the system picks a port), and answers with `handler`.
    ///
    /// Fails if the address is not loopback or cannot be bound.
    pub async fn start<H, F>(
        address: SocketAddr,
        tls: Option<Arc<rustls::ServerConfig>>,
        handler: H,
    ) -> io::Result<Self>
    where
        H: Fn(Received) -> F + Send + Sync + 'static,
        F: Future<Output = Reply> + Send + 'static,
    {
        if !address.ip().is_loopback() {
            let problem = format!("a simulator listens on loopback only, got {}", address.ip());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let in_progress = Arc::<AtomicUsize>::default();
        let count = Arc::clone(&in_progress);
        let handler = move |received| {
            let (answer, counted) = (handler(received), InProgress::new(&count));
            async move {
                let reply = answer.await;
                if matches!(reply, Reply::Hang) {
                    std::future::pending::<()>().await;
                }
                drop(counted);
                reply
            }
        };
        let task = tokio::spawn(accept(
            listener,
            tls.map(TlsAcceptor::from),
            Arc::new(handler),
        ));
        Ok(Self {
            address,
            in_progress,
            task,
        })
    }

    /// Requests that have been received and not answered, on connections that are still open.
    pub fn in_progress(&self) -> usize {
        self.in_progress.load(Ordering::Relaxed)
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept<H, F>(listener: TcpListener, tls: Option<TlsAcceptor>, handler: Arc<H>)
where
    H: Fn(Received) -> F + Send + Sync + 'static,
    F: Future<Output = Reply> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((stream, peer)) = listener.accept().await else {
            // Most likely out of file descriptors: wait until some connections close.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (tls, handler) = (tls.clone(), Arc::clone(&handler));
        connections.spawn(async move {
            match tls {
                None => connection(stream, Arc::default(), peer, handler).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        let presented = stream.get_ref().1.peer_certificates();
                        let certificates = presented.unwrap_or_default().into();
                        connection(stream, certificates, peer, handler).await;
                    }
                }
            }
        });
    }
}

async fn connection<S, H, F>(
    stream: S,
    certificates: Arc<[CertificateDer<'static>]>,
    peer: SocketAddr,
    handler: Arc<H>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Received) -> F,
    F: Future<Output = Reply>,
{
    let (raw_sender, mut raw) = mpsc::channel(1);
    let service = service_fn(move |request: Request<Incoming>| {
        let (handler, certificates) = (Arc::clone(&handler), Arc::clone(&certificates));
        let raw_sender = raw_sender.clone();
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.map_err(|_| Closed)?.to_bytes();
            match handler(Received {
                head: Arc::new(head),
                body,
                certificates,
                peer,
            })
            .await
            {
                Reply::Answer(response) => Ok(response.map(|body| Partial::new(body, usize::MAX))),
                Reply::CutShort(response, bytes) => {
                    Ok(response.map(|body| Partial::new(body, bytes)))
                }
                Reply::Hang => std::future::pending().await,
                Reply::Close => Err(Closed),
                Reply::Raw(raw) => {
                    let _ = raw_sender.send(raw).await;
                    std::future::pending().await
                }
            }
        }
    });
    // An error here means that the client disconnected or a fault closed the connection: nothing to report.
    let mut serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service);
    let raw = tokio::select! {
        _ = &mut serving => return,
        raw = raw.recv() => raw,
    };
    if let Some(raw) = raw {
        let _ = raw.send(serving.into_parts().io.into_inner()).await;
    }
}

impl Raw {
    /// Ends when everything is sent, or with an error when the client disconnects.
    async fn send(&self, mut stream: impl AsyncWrite + Unpin) -> io::Result<()> {
        stream.write_all(&self.first).await?;
        while !self.repeated.is_empty() {
            stream.write_all(&self.repeated).await?;
        }
        stream.shutdown().await
    }
}

/// Closes a connection without an answer.
#[derive(Debug)]
struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("connection closed on purpose")
    }
}

impl std::error::Error for Closed {}

/// A body that announces its full length and may break off before it.
#[derive(Debug)]
struct Partial {
    missing: usize,
    next: Option<Bytes>,
    /// Whether hyper has had a turn to send the part before the break.
    sent: bool,
}

impl Partial {
    fn new(mut body: Bytes, send: usize) -> Self {
        let full = body.len();
        body.truncate(send);
        Self {
            missing: full - body.len(),
            next: Some(body).filter(|body| !body.is_empty()),
            sent: false,
        }
    }
}

impl Body for Partial {
    type Data = Bytes;
    type Error = Closed;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Closed>>> {
        match self.next.take() {
            Some(bytes) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
            None if self.missing == 0 => Poll::Ready(None),
            // On an immediate error hyper would drop the buffered bytes; while the body is pending, it sends them.
            None if !self.sent => {
                self.sent = true;
                context.waker().wake_by_ref();
                Poll::Pending
            }
            None => Poll::Ready(Some(Err(Closed))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.next.is_none() && self.missing == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact((self.next.as_ref().map_or(0, Bytes::len) + self.missing) as u64)
    }
}
