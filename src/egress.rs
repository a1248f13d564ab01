//! The only client that connects to the exchange, from the egress address.
//!
//! It uses HTTP/1.1 over plain hyper connections, because a general client normalizes the target after it was signed. It
//! has no proxies, no redirects and no 0-RTT, and never sends a request twice: retries are up to the broker.

mod addresses;
mod body;
mod decode;
mod pool;
pub(crate) mod proof;
mod send_guard;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, header, uri};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::ext::on_informational;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpSocket;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use crate::audit::Recorded;
use crate::base::lock::RwLock;
use crate::base::paced::Paced;
use crate::kucoin::broker_query::BrokerQuery;
use crate::kucoin::{Host, OutboundRequest, Site};
use crate::telemetry::chain;

use body::Collector;
use pool::{Open, Pool};
pub(crate) use send_guard::SendGuard;
use send_guard::{Guard, GuardedSocket};

/// How often to maintain idle connections and, less often, resolve names again.
const MAINTAIN_EVERY: Duration = Duration::from_secs(5);

/// How long a resolved address is used before the name is resolved again.
const RESOLVE_EVERY: Duration = Duration::from_secs(30);

/// After a failed connect the name is resolved again at once, but not more often than this.
const RESOLVE_AGAIN_EVERY: Duration = Duration::from_secs(1);

/// How long a call whose connect failed waits for that lookup; a later result is for the next call.
const RESOLVE_AGAIN_WITHIN: Duration = Duration::from_secs(1);

/// Most header lines that an answer may have; with the HTTP library's own limit of 100 an order's answer could be lost. Not
/// higher than plausible: each answer allocates and wipes 64 bytes per line.
const MAX_HEADERS: usize = 256;

/// Most informational responses (1xx) before an answer. The HTTP library skips them without a limit; KuCoin sends none.
const MAX_INFORMATIONAL: u32 = 10;
/// Most bytes that a connection buffers of what it receives: as many as a call reserves before it is sent. The head of an
/// answer must fit.
const READ_BUFFER: usize = 64 * 1024;

/// Settings of the client.
#[derive(Clone, Debug)]
pub struct EgressSettings {
    /// Source address of every connection; with 0.0.0.0 the system chooses it. With an IPv4 address only IPv4 is used, with an
    /// IPv6 address only IPv6.
    pub(crate) address: IpAddr,
    /// Time limit for opening a connection, including TLS.
    pub(crate) connect_timeout: Duration,
    /// How long the broker itself waits for a complete answer, whatever the bot's deadline.
    pub(crate) answer_timeout: Duration,
    /// Bytes per second that are read from one connection, see [`Paced`].
    pub(crate) read_rate: u32,
    /// Bytes of the largest answer that is accepted, after decoding.
    pub(crate) max_answer_bytes: usize,
    /// Age from which an idle connection is closed.
    pub(crate) max_idle: Duration,
    /// Age from which an idle connection is not used for a request that must not be repeated.
    pub(crate) max_idle_for_writes: Duration,
    /// Idle connections kept ready per host.
    pub(crate) warm_connections: usize,
}

impl EgressSettings {
    /// The longest that one request waits for a connection: two connects, and a lookup between them.
    pub(crate) fn longest_connect(&self) -> Duration {
        2 * self.connect_timeout + RESOLVE_AGAIN_WITHIN
    }
}

/// Where to connect for a host: KuCoin's own address, or a simulator's.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) struct Origin {
    /// Whether to use TLS.
    pub(crate) tls: bool,
    /// DNS name or IP address.
    pub(crate) name: String,
    /// TCP port.
    pub(crate) port: u16,
}

/// The client for the exchange.
#[derive(Debug)]
pub(crate) struct Egress {
    destinations: HashMap<(Site, Host), Arc<Destination>>,
    settings: EgressSettings,
}

/// One host with its addresses and idle connections.
struct Destination {
    origin: Origin,
    host_header: HeaderValue,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    addresses: RwLock<Vec<SocketAddr>>,
    /// Whether the last lookup found addresses, but none of the IP version of the egress address.
    is_other_kind: AtomicBool,
    /// When the name was last resolved after a failed connect; locked during that lookup and the first one.
    resolved_again: tokio::sync::Mutex<Option<Instant>>,
    /// Whether the first lookup since the start has ended, successful or not.
    is_looked_up: watch::Sender<bool>,
    pool: Pool,
}

impl std::fmt::Debug for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Destination({}:{})", self.origin.name, self.origin.port)
    }
}

/// A connection that is ready for one request.
#[derive(Debug)]
pub(crate) struct UpstreamConnection {
    open: Open,
    is_reused: bool,
    destination: Arc<Destination>,
}

impl UpstreamConnection {
    /// The exchange's address at the other end.
    pub(crate) fn peer(&self) -> SocketAddr {
        self.open.peer
    }

    /// Whether it was already open before this request.
    pub(crate) fn is_reused(&self) -> bool {
        self.is_reused
    }
}

/// Why a host has no usable address.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, thiserror::Error)]
pub(crate) enum NoAddress {
    /// It has only IPv6 addresses, and the egress address is IPv4, or the other way round.
    #[error(
        "{host} has no {} address, but egress.address {egress} requires one",
        if egress.is_ipv4() { "IPv4" } else { "IPv6" }
    )]
    OtherKind {
        /// The host.
        host: String,
        /// The egress address.
        egress: IpAddr,
    },
    /// No lookup of its name has succeeded yet.
    #[error("no DNS lookup of {0} has succeeded yet")]
    Unresolved(String),
}

/// An answer and its connection. Dropping it closes the connection.
#[derive(Debug)]
pub(crate) struct Answered {
    /// The complete answer, decompressed if possible.
    pub(crate) response: Response<Bytes>,
    connection: UpstreamConnection,
}

impl Answered {
    /// Keeps the connection for the next request.
    pub(crate) fn keep(self) -> Response<Bytes> {
        let UpstreamConnection {
            open, destination, ..
        } = self.connection;
        destination.pool.put(open);
        self.response
    }
}

/// Opening a connection failed; nothing was sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The site has no such host.
    #[error("site {} has no {} host", .0.as_str(), .1.as_str())]
    NoHost(Site, Host),
    /// TCP or TLS failed.
    #[error("the exchange could not be reached; nothing was sent")]
    Failed(#[source] io::Error),
    /// HTTP could not be set up.
    #[error("the exchange could not be reached; nothing was sent")]
    Handshake(#[source] hyper::Error),
    /// It took too long.
    #[error("the exchange could not be reached within {} ms; nothing was sent", .0.as_millis())]
    Timeout(Duration),
    /// The host has no usable address.
    #[error("{0}; nothing was sent")]
    NoAddress(NoAddress),
}

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// It may have reached the exchange.
    #[error("the request may have reached the exchange, but no complete answer came back")]
    AnswerLost(#[source] hyper::Error),
    /// It may have reached the exchange, which sent informational responses (1xx) instead of an answer.
    #[error(
        "the request may have reached the exchange, but more than {MAX_INFORMATIONAL} informational responses (1xx) came instead of its answer"
    )]
    Informational,
    /// Its [`SendGuard`] stopped it before it was completely written: it is not executed.
    #[error("the time limit passed before the request was completely written; it is not executed")]
    Stopped,
    /// It may have reached the exchange; the received answer names another order.
    #[error(
        "the request may have reached the exchange, but the answer received has a different clientOid and belongs to another request"
    )]
    WrongAnswer,
    /// It may have reached the exchange; there was no complete answer within the time limit.
    #[error("the request may have reached the exchange, but no complete answer came within {} ms", .0.as_millis())]
    AnswerTimeout(Duration),
    /// It reached the exchange; the answer is too large.
    #[error("the request reached the exchange, but its answer has more than {0} bytes")]
    AnswerTooLarge(usize),
    /// The connection closed before the request was written: provably not sent.
    #[error("the connection closed before the request was written; nothing was sent")]
    NotWritten(#[source] hyper::Error),
}

impl Egress {
    /// Prepares the hosts; connects nothing until [`Egress::start`].
    ///
    /// # Errors
    /// The origin whose name is neither a DNS name nor an IP address.
    pub(crate) fn new(
        settings: EgressSettings,
        origins: HashMap<(Site, Host), Origin>,
        tls: &Arc<rustls::ClientConfig>,
    ) -> Result<Self, Origin> {
        // Sites with the same origin share its connections.
        let mut known: HashMap<Origin, Arc<Destination>> = HashMap::new();
        let mut destinations = HashMap::new();
        for (host_id, origin) in origins {
            let destination = match known.get(&origin) {
                Some(destination) => Arc::clone(destination),
                None => {
                    Arc::new(Destination::new(origin.clone(), tls).ok_or_else(|| origin.clone())?)
                }
            };
            known.insert(origin, Arc::clone(&destination));
            destinations.insert(host_id, destination);
        }
        Ok(Self {
            destinations,
            settings,
        })
    }

    /// Resolves all names in parallel, then keeps addresses and warm connections fresh, all in the background.
    pub(crate) fn start(&self) {
        let mut distinct: Vec<&Arc<Destination>> = Vec::new();
        for destination in self.destinations.values() {
            if !distinct.iter().any(|known| Arc::ptr_eq(known, destination)) {
                distinct.push(destination);
            }
        }
        for destination in distinct {
            tokio::spawn(Arc::clone(destination).maintain(self.settings.clone()));
        }
    }

    /// Waits until the first lookup of every name after [`start`](Self::start) has ended, successful or not: at most
    /// `connect_timeout`, since the lookups run in parallel.
    pub(crate) async fn first_lookups(&self) {
        for destination in self.destinations.values() {
            let mut is_looked_up = destination.is_looked_up.subscribe();
            // The destination owns the sender, so there is no error.
            let _ = is_looked_up.wait_for(|is_looked_up| *is_looked_up).await;
        }
    }

    /// Resolves the name of a host once, for commands that do not [`start`](Self::start) the client.
    ///
    /// Returns the name.
    ///
    /// # Errors
    /// When there is no such host, the lookup fails or times out, or the host has no usable address.
    pub(crate) async fn resolve(&self, host_id: (Site, Host)) -> Result<String, ConnectError> {
        let destination = self.destination(host_id)?;
        let (limit, source) = (self.settings.connect_timeout, self.settings.address);
        timeout(limit, destination.resolve(source))
            .await
            .map_err(|_| ConnectError::Timeout(limit))?
            .map_err(ConnectError::Failed)?;
        match destination.no_address(source) {
            Some(missing) => Err(ConnectError::NoAddress(missing)),
            None => Ok(destination.origin.name.clone()),
        }
    }

    /// How long it waits for a complete answer; after that a call is no longer in flight.
    pub(crate) fn answer_timeout(&self) -> Duration {
        self.settings.answer_timeout
    }

    /// The hosts among `host_ids` without a usable address, and why.
    pub(crate) fn without_address(&self, host_ids: &BTreeSet<(Site, Host)>) -> BTreeSet<NoAddress> {
        host_ids
            .iter()
            .filter_map(|host_id| self.destinations.get(host_id))
            .filter_map(|destination| destination.no_address(self.settings.address))
            .collect()
    }

    /// Returns a connection for one request: a warm one, or a new one.
    ///
    /// With `repeatable`, the idle connection may be older, since the request can be sent again if it is closed.
    pub(crate) async fn connect(
        &self,
        host_id: (Site, Host),
        repeatable: bool,
    ) -> Result<UpstreamConnection, ConnectError> {
        let destination = self.destination(host_id)?;
        let max_idle = if repeatable {
            self.settings.max_idle
        } else {
            self.settings.max_idle_for_writes
        };
        let idle = destination.pool.take(max_idle).await;
        let is_reused = idle.is_some();
        let open = match idle {
            Some(open) => open,
            // Boxed: connecting is rare, and its future is larger than the rest of a call.
            None => Box::pin(destination.open(&self.settings)).await?,
        };
        Ok(UpstreamConnection {
            open,
            is_reused,
            destination: Arc::clone(destination),
        })
    }

    /// Sends a request and waits for the complete answer. `guard` can stop it until it is completely written. `admit` gets the
    /// number of bytes of each part of the answer's body, before the part is stored; if it refuses the part, the answer is
    /// dropped.
    ///
    /// # Errors
    /// Only [`SendError::NotWritten`] and [`SendError::Stopped`] mean that nothing was executed.
    pub(crate) async fn send<E: From<SendError>>(
        &self,
        mut connection: UpstreamConnection,
        signed: OutboundRequest,
        _: &Recorded,
        guard: Option<Arc<SendGuard>>,
        admit: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<Answered, E> {
        connection.open.remember_key(signed.key);
        self.exchange(connection, signed.request, guard, admit)
            .await
    }

    /// Sends an unsigned request of the broker itself to a public endpoint, which needs neither rules nor audit.
    pub(crate) async fn ask(
        &self,
        connection: UpstreamConnection,
        broker_query: BrokerQuery,
    ) -> Result<Response<Bytes>, SendError> {
        let request = broker_query.request();
        let answered = self.exchange(connection, request, None, |_| Ok(())).await?;
        Ok(answered.keep())
    }

    fn destination(&self, host_id: (Site, Host)) -> Result<&Arc<Destination>, ConnectError> {
        let destination = self.destinations.get(&host_id);
        destination.ok_or(ConnectError::NoHost(host_id.0, host_id.1))
    }

    async fn exchange<E: From<SendError>>(
        &self,
        connection: UpstreamConnection,
        request: Request<Full<Bytes>>,
        guard: Option<Arc<SendGuard>>,
        admit: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<Answered, E> {
        let limit = self.settings.answer_timeout;
        let max_bytes = self.settings.max_answer_bytes;
        let exchange = exchange(connection, request, guard, max_bytes, admit);
        timeout(limit, exchange)
            .await
            .unwrap_or_else(|_| Err(SendError::AnswerTimeout(limit).into()))
    }
}

async fn exchange<E: From<SendError>>(
    mut connection: UpstreamConnection,
    mut request: Request<Full<Bytes>>,
    guard: Option<Arc<SendGuard>>,
    max_bytes: usize,
    mut admit: impl FnMut(usize) -> Result<(), E>,
) -> Result<Answered, E> {
    request
        .headers_mut()
        .insert(header::HOST, connection.destination.host_header.clone());
    let too_many = limit_informational(&mut request);
    connection.open.guard.lock().clone_from(&guard);
    let response = tokio::select! {
        biased;
        response = connection.open.sender.try_send_request(request) => response,
        () = too_many.notified() => return Err(SendError::Informational.into()),
    };
    let response = response.map_err(|mut error| {
        let is_unsent = error.take_message().is_some();
        let error = error.into_error();
        if is_unsent {
            SendError::NotWritten(error)
        } else if guard.is_some_and(|guard| guard.is_stopped()) {
            SendError::Stopped
        } else {
            SendError::AnswerLost(error)
        }
    })?;
    let (mut head, mut body) = response.into_parts();
    let mut received = Collector::new(body.size_hint().exact(), max_bytes, &mut admit);
    while let Some(frame) = body.frame().await {
        // A frame without data has trailers, which mean nothing here.
        if let Ok(part) = frame.map_err(SendError::AnswerLost)?.into_data() {
            received.push(&part)?;
        }
    }
    let body = decode::decode(&mut head.headers, received.finish(), max_bytes, admit)?;
    Ok(Answered {
        response: Response::from_parts(head, body),
        connection,
    })
}

/// Returns what is notified once more than [`MAX_INFORMATIONAL`] informational responses have come before the answer.
fn limit_informational(request: &mut Request<Full<Bytes>>) -> Arc<Notify> {
    let too_many = Arc::new(Notify::new());
    let (notify, count) = (Arc::clone(&too_many), AtomicU32::new(0));
    on_informational(request, move |_| {
        if count.fetch_add(1, Ordering::Relaxed) == MAX_INFORMATIONAL {
            notify.notify_one();
        }
    });
    too_many
}

impl Destination {
    fn new(origin: Origin, tls: &Arc<rustls::ClientConfig>) -> Option<Self> {
        let default_port = if origin.tls { 443 } else { 80 };
        let name = match origin.name.parse() {
            Ok(IpAddr::V6(address)) => format!("[{address}]"),
            _ => origin.name.clone(),
        };
        let host = if origin.port == default_port {
            name
        } else {
            format!("{name}:{}", origin.port)
        };
        let host: uri::Authority = host.parse().ok()?;
        let tls = if origin.tls {
            let name = ServerName::try_from(origin.name.clone()).ok()?;
            Some((TlsConnector::from(Arc::clone(tls)), name))
        } else {
            None
        };
        let host_header = HeaderValue::from_str(host.as_str()).ok()?;
        Some(Self {
            origin,
            host_header,
            tls,
            addresses: RwLock::default(),
            is_other_kind: AtomicBool::new(false),
            resolved_again: tokio::sync::Mutex::default(),
            is_looked_up: watch::Sender::new(false),
            pool: Pool::default(),
        })
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.addresses.read().clone()
    }

    /// Why there is no usable address; `None` if there is one.
    fn no_address(&self, egress: IpAddr) -> Option<NoAddress> {
        if !self.addresses().is_empty() {
            return None;
        }
        let host = self.origin.name.clone();
        Some(if self.is_other_kind.load(Ordering::Relaxed) {
            NoAddress::OtherKind { host, egress }
        } else {
            NoAddress::Unresolved(host)
        })
    }

    /// Resolves the name. If that fails, the last addresses stay in use.
    async fn resolve(&self, source: IpAddr) -> io::Result<()> {
        let name = (self.origin.name.as_str(), self.origin.port);
        let found = tokio::net::lookup_host(name).await?;
        self.keep(found, source);
        Ok(())
    }

    /// Resolves the name within `connect_timeout`, so that a name server that hangs blocks nothing else.
    async fn refresh(&self, settings: &EgressSettings) {
        let limit = settings.connect_timeout;
        let error = match timeout(limit, self.resolve(settings.address)).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_) => io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer within {} ms", limit.as_millis()),
            ),
        };
        tracing::warn!(server.address = self.origin.name, exception.message = %error, "DNS lookup failed; using cached addresses");
    }

    /// Resolves the name after a failed connect: at once, but not more often than [`RESOLVE_AGAIN_EVERY`]. Concurrent callers
    /// wait for the same lookup. `had_none`: the connect failed because there was no address, so an address that another
    /// lookup has found meanwhile is enough.
    async fn refresh_again(self: Arc<Self>, settings: EgressSettings, had_none: bool) {
        let mut last = self.resolved_again.lock().await;
        let is_found = || had_none && !self.addresses().is_empty();
        if !is_found() && last.is_none_or(|at| at.elapsed() >= RESOLVE_AGAIN_EVERY) {
            self.refresh(&settings).await;
            // The first address that is found may be outdated, too, so finding it does not delay the next lookup.
            if !is_found() {
                *last = Some(Instant::now());
            }
        }
    }

    /// Stores the addresses of the same IP version as `source`; if there are none, the last good ones stay.
    fn keep(&self, found: impl Iterator<Item = SocketAddr>, source: IpAddr) {
        let (usable, others): (Vec<_>, Vec<_>) =
            found.partition(|address| address.is_ipv4() == source.is_ipv4());
        let is_other_kind = usable.is_empty() && !others.is_empty();
        self.is_other_kind.store(is_other_kind, Ordering::Relaxed);
        if !usable.is_empty() {
            *self.addresses.write() = usable;
        }
    }

    async fn maintain(self: Arc<Self>, settings: EgressSettings) {
        // A connect in the meantime waits for this lookup.
        let lookup = self.resolved_again.lock().await;
        self.refresh(&settings).await;
        drop(lookup);
        self.is_looked_up.send_replace(true);
        tokio::join!(
            self.keep_fresh(&settings),
            self.drop_idle(settings.max_idle)
        );
    }

    /// Closes connections that were idle for too long or have carried a dropped key, also while the exchange does not answer.
    async fn drop_idle(&self, max_idle: Duration) {
        loop {
            self.pool.drop_older_than(max_idle);
            tokio::time::sleep(MAINTAIN_EVERY).await;
        }
    }

    /// Keeps warm connections open and addresses fresh.
    async fn keep_fresh(self: &Arc<Self>, settings: &EgressSettings) {
        let mut resolved = Instant::now();
        loop {
            for _ in self.pool.fresh(settings.max_idle_for_writes)..settings.warm_connections {
                match self.open(settings).await {
                    Ok(open) => self.pool.put(open),
                    Err(error) => {
                        tracing::warn!(
                            server.address = self.origin.name,
                            exception.message = chain(&error),
                            "connect to exchange failed"
                        );
                        break;
                    }
                }
            }
            tokio::time::sleep(MAINTAIN_EVERY).await;
            if self.addresses().is_empty() || resolved.elapsed() >= RESOLVE_EVERY {
                self.refresh(settings).await;
                resolved = Instant::now();
            }
        }
    }

    /// Opens a new connection. If no known address accepts it, the name may have new addresses: resolves it again and tries
    /// those.
    async fn open(self: &Arc<Self>, settings: &EgressSettings) -> Result<Open, ConnectError> {
        let tried = self.addresses();
        let error = match self.dial(&tried, settings).await {
            Ok(open) => return Ok(open),
            Err(error) => error,
        };
        // In a separate task: the next call needs the result, too, even if this one is cancelled.
        let again =
            tokio::spawn(Arc::clone(self).refresh_again(settings.clone(), tried.is_empty()));
        let _ = timeout(RESOLVE_AGAIN_WITHIN, again).await;
        let now = self.addresses();
        let is_gone = |address: &SocketAddr| tried.contains(address) && !now.contains(address);
        self.pool.drop_where(is_gone);
        let new: Vec<_> = now
            .iter()
            .copied()
            .filter(|address| !tried.contains(address))
            .collect();
        if new.is_empty() && !tried.is_empty() {
            return Err(error);
        }
        self.dial(&new, settings).await
    }

    /// Connects to the first of `addresses` that accepts a connection from the egress address within the time limit.
    async fn dial(
        &self,
        addresses: &[SocketAddr],
        settings: &EgressSettings,
    ) -> Result<Open, ConnectError> {
        // Each address gets a share of the time, so that one that does not answer leaves time for the others.
        let share = settings.connect_timeout / u32::try_from(addresses.len().max(1)).unwrap_or(1);
        let mut failure = None;
        for &address in addresses {
            let dialled = timeout(share, self.dial_one(address, settings)).await;
            let error = match dialled.unwrap_or(Err(ConnectError::Timeout(share))) {
                Ok((sender, guard)) => return Ok(Open::new(sender, address, guard)),
                Err(error) => error,
            };
            tracing::debug!(server.address = self.origin.name, network.peer.address = %address.ip(), network.peer.port = address.port(), exception.message = chain(&error), "address did not accept the connection");
            failure = Some(error);
            self.put_last(address);
        }
        Err(failure.unwrap_or_else(|| {
            let missing = self.no_address(settings.address);
            let unresolved = || NoAddress::Unresolved(self.origin.name.clone());
            ConnectError::NoAddress(missing.unwrap_or_else(unresolved))
        }))
    }

    /// Moves an address that has just failed to the end, so that the next connection tries another one first.
    fn put_last(&self, failed: SocketAddr) {
        let mut addresses = self.addresses.write();
        if addresses.first() == Some(&failed) {
            addresses.rotate_left(1);
        }
    }

    async fn dial_one(
        &self,
        address: SocketAddr,
        settings: &EgressSettings,
    ) -> Result<(http1::SendRequest<Full<Bytes>>, Guard), ConnectError> {
        let (source, rate) = (settings.address, settings.read_rate);
        let open = async {
            let socket = if address.is_ipv4() {
                TcpSocket::new_v4()?
            } else {
                TcpSocket::new_v6()?
            };
            if !source.is_unspecified() {
                socket.bind(SocketAddr::new(source, 0))?;
            }
            socket.set_nodelay(true)?;
            // A closed connection ends with a reset, and its local port is free at once. Otherwise a slow exchange, whose
            // reads are dropped at their deadlines, could use up the ports of the egress address for cancels too.
            socket.set_zero_linger()?;
            socket.connect(address).await
        };
        let guard = Guard::default();
        let socket = open.await.map_err(ConnectError::Failed)?;
        let stream = GuardedSocket::new(socket, Arc::clone(&guard));
        let sender = match &self.tls {
            Some((connector, name)) => {
                let stream = connector
                    .connect(name.clone(), stream)
                    .await
                    .map_err(ConnectError::Failed)?;
                handshake(Paced::new(stream, rate)).await?
            }
            None => handshake(Paced::new(stream, rate)).await?,
        };
        Ok((sender, guard))
    }
}

async fn handshake<S>(stream: S) -> Result<http1::SendRequest<Full<Bytes>>, ConnectError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = http1::Builder::new()
        .max_headers(MAX_HEADERS)
        .max_buf_size(READ_BUFFER)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(ConnectError::Handshake)?;
    // The owner of the sender notices when the connection ends.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(sender)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use tokio::io::AsyncReadExt;
    use zeroize::Zeroizing;

    use super::*;
    use crate::base::secret::{ApiSecret, Passphrase};
    use crate::kucoin::{Key, KeyVersion};

    fn origin(port: u16) -> Origin {
        Origin {
            tls: false,
            name: "localhost".to_owned(),
            port,
        }
    }

    fn tls() -> Arc<rustls::ClientConfig> {
        let roots = rustls::RootCertStore::empty();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider);
        let tls = tls.with_safe_default_protocol_versions().unwrap();
        Arc::new(tls.with_root_certificates(roots).with_no_client_auth())
    }

    fn localhost(port: u16) -> Arc<Destination> {
        Arc::new(Destination::new(origin(port), &tls()).unwrap())
    }

    fn settings() -> EgressSettings {
        EgressSettings {
            address: "127.0.0.1".parse().unwrap(),
            connect_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(10),
            read_rate: 4_000_000,
            max_answer_bytes: 1024,
            max_idle: Duration::from_secs(60),
            max_idle_for_writes: Duration::from_secs(20),
            warm_connections: 0,
        }
    }

    /// Points the destination at an address of this machine where nothing listens.
    fn move_away(destination: &Destination) -> SocketAddr {
        let old = SocketAddr::from(([127, 7, 7, 6], destination.origin.port));
        destination.keep([old].into_iter(), settings().address);
        old
    }

    #[test]
    fn start_does_not_wait_for_dns_and_first_lookups_waits_for_every_name() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            // Lookups run on this thread: while it is busy, none completes.
            .max_blocking_threads(1)
            .build()
            .unwrap();
        runtime.block_on(async {
            let (release, released) = std::sync::mpsc::channel::<()>();
            let busy_thread = tokio::task::spawn_blocking(move || released.recv());
            let origins = [(Host::Spot, origin(1)), (Host::Futures, origin(2))];
            let origins = origins.map(|(host, origin)| ((Site::Global, host), origin));
            let egress = Egress::new(settings(), origins.into(), &tls()).unwrap();
            egress.start();
            for _ in 0..10 {
                assert!(egress.first_lookups().now_or_never().is_none());
                tokio::task::yield_now().await;
            }
            for destination in egress.destinations.values() {
                let is_resolving = destination.resolved_again.try_lock().is_err();
                assert!(
                    is_resolving,
                    "{} waits for another lookup",
                    destination.origin.port
                );
            }
            release.send(()).unwrap();
            egress.first_lookups().await;
            for destination in egress.destinations.values() {
                let port = destination.origin.port;
                assert_eq!(
                    destination.addresses(),
                    [SocketAddr::from(([127, 0, 0, 1], port))]
                );
            }
            busy_thread.await.unwrap().unwrap();
        });
    }

    #[tokio::test]
    async fn failed_connect_resolves_the_name_again_and_uses_the_new_address() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let new = listener.local_addr().unwrap();
        let destination = localhost(new.port());
        move_away(&destination);
        let open = destination.open(&settings()).await.unwrap();
        assert_eq!(open.peer, new);
        assert_eq!(destination.addresses(), [new]);
    }

    #[tokio::test]
    async fn idle_connections_to_a_removed_address_are_dropped_and_others_stay() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let new = listener.local_addr().unwrap();
        let destination = localhost(new.port());
        let old = move_away(&destination);
        let (ours, _theirs) = tokio::io::duplex(64);
        let sender = handshake(ours).await.unwrap();
        destination
            .pool
            .put(Open::new(sender, old, Guard::default()));
        let open = destination.open(&settings()).await.unwrap();
        destination.pool.put(open);
        let idle = destination.pool.take(settings().max_idle).await.unwrap();
        assert_eq!(idle.peer, new);
        assert!(destination.pool.take(settings().max_idle).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn failed_connects_resolve_the_name_at_most_once_per_second() {
        let destination = localhost(1);
        let again = || Arc::clone(&destination).refresh_again(settings(), false);
        let new = SocketAddr::from(([127, 0, 0, 1], 1));
        move_away(&destination);
        again().await;
        assert_eq!(destination.addresses(), [new], "at once");
        let old = move_away(&destination);
        for _ in 0..3 {
            again().await;
        }
        assert_eq!(destination.addresses(), [old], "within a second");
        tokio::time::advance(RESOLVE_AGAIN_EVERY).await;
        again().await;
        assert_eq!(destination.addresses(), [new], "after a second");
    }

    #[tokio::test(start_paused = true)]
    async fn connection_of_a_dropped_key_closes_on_time_while_the_exchange_is_silent() {
        // Accepts connections, and never responds in TLS.
        let exchange = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = exchange.local_addr().unwrap();
        let origin = Origin {
            tls: true,
            ..origin(address.port())
        };
        let destination = Arc::new(Destination::new(origin, &tls()).unwrap());
        let text = |text: &str| Zeroizing::new(text.to_owned());
        let secret = ApiSecret::new(text("fake-secret"));
        let passphrase = Passphrase::new(text("fake-pass"));
        let key = Key::new(text("fake-id"), &secret, &passphrase, KeyVersion::V3, None).unwrap();
        let (ours, _theirs) = tokio::io::duplex(64);
        let (sender, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
        let connection = tokio::spawn(connection);
        let mut open = Open::new(sender, address, Guard::default());
        open.remember_key(Some(Arc::downgrade(&key)));
        destination.pool.put(open);
        let settings = EgressSettings {
            warm_connections: 2,
            ..settings()
        };
        tokio::spawn(Arc::clone(&destination).maintain(settings));
        let _silent = exchange.accept().await.unwrap();
        let dropped = Instant::now();
        drop(key);
        // Ends only once the other end is dropped.
        connection.await.unwrap().unwrap();
        assert!(
            dropped.elapsed() <= MAINTAIN_EVERY,
            "{:?}",
            dropped.elapsed()
        );
    }

    #[test]
    fn last_good_addresses_stay_and_only_the_ip_version_of_the_egress_address_is_used() {
        let destination = localhost(1);
        let (four, six) = (
            "192.0.2.1:1".parse().unwrap(),
            "[2001:db8::1]:1".parse().unwrap(),
        );
        let source = |text: &str| text.parse::<IpAddr>().unwrap();
        let problem = |egress| destination.no_address(source(egress)).unwrap().to_string();
        assert_eq!(
            problem("192.0.2.9"),
            "no DNS lookup of localhost has succeeded yet"
        );
        destination.keep([four].into_iter(), source("2001:db8::9"));
        assert_eq!(
            problem("2001:db8::9"),
            "localhost has no IPv6 address, but egress.address 2001:db8::9 requires one"
        );
        destination.keep([six, four].into_iter(), source("192.0.2.9"));
        assert_eq!(destination.no_address(source("192.0.2.9")), None);
        assert_eq!(destination.addresses(), [four]);
        destination.keep([].into_iter(), source("192.0.2.9"));
        destination.keep([six].into_iter(), source("0.0.0.0"));
        assert_eq!(
            destination.addresses(),
            [four],
            "no usable address was found"
        );
        destination.keep([six].into_iter(), source("2001:db8::9"));
        assert_eq!(destination.addresses(), [six]);
    }

    #[tokio::test]
    async fn request_whose_time_is_up_does_not_reach_the_socket_and_is_stopped_also_over_tls() {
        let ca = credbroker_sim::pki::Ca::new("CA of a simulated exchange").unwrap();
        let identity = ca.server().unwrap();
        let certificate = CertificateDer::from_pem_slice(identity.certificate_pem.as_bytes());
        let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).unwrap();
        let provider = || Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let server = rustls::ServerConfig::builder_with_provider(provider());
        let server = server.with_safe_default_protocol_versions().unwrap();
        let server = server.with_no_client_auth();
        let server = server
            .with_single_cert(vec![certificate.unwrap()], key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
        let mut roots = rustls::RootCertStore::empty();
        let root = CertificateDer::from_pem_slice(ca.certificate_pem().as_bytes());
        roots.add(root.unwrap()).unwrap();
        let client = rustls::ClientConfig::builder_with_provider(provider());
        let client = client.with_safe_default_protocol_versions().unwrap();
        let client = Arc::new(client.with_root_certificates(roots).with_no_client_auth());
        for (is_tls, is_late) in [(false, true), (true, true), (false, false), (true, false)] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let acceptor = acceptor.clone();
            let exchange = tokio::spawn(async move {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut received = [0; 1];
                // The number of bytes; a connection that is cut is an error.
                if is_tls {
                    // The reset can arrive before the end of the handshake was read.
                    match acceptor.accept(socket).await {
                        Ok(mut stream) => stream.read(&mut received).await.unwrap_or_default(),
                        Err(_) => 0,
                    }
                } else {
                    socket.read(&mut received).await.unwrap_or_default()
                }
            });
            let origin = Origin {
                tls: is_tls,
                ..origin(address.port())
            };
            let destination = Arc::new(Destination::new(origin, &client).unwrap());
            destination.keep([address].into_iter(), settings().address);
            let connection = UpstreamConnection {
                open: destination.open(&settings()).await.unwrap(),
                is_reused: false,
                destination,
            };
            let clock = Arc::new(crate::clock::Clock::system());
            // Unmeasured, so it is the system's time.
            let not_after_ms = clock.wall_ms() + if is_late { -1 } else { 60_000 };
            let host_id = (Site::Global, Host::Spot);
            let deadline = Instant::now() + Duration::from_secs(60);
            let guard = SendGuard::new(clock, host_id, Some(not_after_ms), deadline);
            let request = Request::post("/").body(Full::from("order")).unwrap();
            let admit = |_| Ok::<_, SendError>(());
            let sent = super::exchange(connection, request, Some(Arc::new(guard)), 1, admit);
            let error = sent.await.unwrap_err();
            assert_eq!(exchange.await.unwrap(), usize::from(!is_late), "{error}");
            let is_stopped = matches!(error, SendError::Stopped);
            assert_eq!(is_stopped, is_late, "TLS {is_tls}: {error}");
        }
    }
}
