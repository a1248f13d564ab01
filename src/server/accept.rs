//! Accepts TLS connections with a verified client certificate, for bots and for admins.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_rustls::server::TlsStream;
use tokio_util::task::TaskTracker;

use super::handshakes::HandshakeSlots;
use super::tls::{Tls, Trust};
use crate::process::Share;
use crate::telemetry::Metrics;

/// Concurrent TLS handshakes. One more closes the oldest one of the network that has the most: a normal handshake takes
/// milliseconds, and a client that opens connections without completing them must not lock others out.
const HANDSHAKES: usize = 512;

/// How long connections wait in the socket for the next broker before this one accepts them again, if it still runs.
const HANDOVER_WAIT: Duration = Duration::from_secs(1);

/// What a listener needs to accept connections.
pub(super) struct Acceptor {
    pub(super) tls: watch::Receiver<Arc<Tls>>,
    /// How long a handshake may take.
    pub(super) within: Duration,
    pub(super) metrics: Arc<Metrics>,
    pub(super) stopping: watch::Receiver<bool>,
    /// See [`Listener::handover`](super::connection::Listener).
    pub(super) handover: watch::Receiver<()>,
    pub(super) connections: TaskTracker,
}

impl Acceptor {
    /// Accepts connections until shutdown and passes each one to `serve`, with what changes at a handover; returns once all have
    /// ended.
    pub(super) async fn run<F: Future<Output = ()> + Send + 'static>(
        self,
        socket: TcpListener,
        serve: impl Fn(TlsStream<TcpStream>, Trust, watch::Receiver<()>) -> F + Clone + Send + 'static,
    ) {
        let connections = self.connections;
        let handshakes = HandshakeSlots::new(Share::Small.limit(HANDSHAKES));
        let (mut stopping, mut handover) = (self.stopping.clone(), self.handover);
        loop {
            let accepted = tokio::select! {
                biased;
                () = shutdown_requested(&mut stopping) => break,
                Ok(()) = handover.changed() => {
                    // Connections wait for the next broker, unless a call delays the exit: cancels are not to wait for it.
                    let _ = timeout(HANDOVER_WAIT, shutdown_requested(&mut stopping)).await;
                    continue;
                }
                accepted = socket.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                // The peer has already disconnected.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(_) => {
                    // Out of descriptors: wait until some connections end.
                    self.metrics.connection_refused("descriptors");
                    sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let slot = HandshakeSlots::take(&handshakes, network(peer.ip()));
            let (tls, within) = (self.tls.clone(), self.within);
            let (metrics, serve) = (Arc::clone(&self.metrics), serve.clone());
            // Notices a handover from now on, also while the handshake takes place.
            let handover = handover.clone();
            connections.spawn(async move {
                let handshake = tokio::select! {
                    handshake = shake_hands(stream, tls, within) => handshake,
                    () = slot.eviction.cancelled() => Err(io::Error::other("closed: too many handshakes at once")),
                };
                drop(slot);
                match handshake {
                    Ok(Some((stream, trust))) => serve(stream, trust, handover).await,
                    Ok(None) => _ = metrics.connections_unused.inc(),
                    Err(error) => refused(&metrics, peer, &error),
                }
            });
        }
        // Clients that connect from now on are refused and can try another broker.
        drop(socket);
        connections.close();
        connections.wait().await;
    }
}

fn refused(metrics: &Metrics, peer: SocketAddr, error: &io::Error) {
    metrics.connection_refused("handshake");
    if let Some(suppressed) = metrics.allow_log() {
        tracing::info!(network.peer.address = %peer.ip(), network.peer.port = peer.port(), exception.message = %error, suppressed, "TLS handshake failed");
    }
}

/// Returns `None` if the peer closes before its first byte, as the TCP check of a load balancer does.
async fn shake_hands(
    stream: TcpStream,
    tls: watch::Receiver<Arc<Tls>>,
    within: Duration,
) -> io::Result<Option<(TlsStream<TcpStream>, Trust)>> {
    // Otherwise each small response waits 40 ms for an acknowledgement.
    stream.set_nodelay(true)?;
    let (tls_used, handshake) = timeout(within, async {
        let is_unused = match stream.peek(&mut [0]).await {
            Ok(bytes) => bytes == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        };
        let tls = Arc::clone(&tls.borrow());
        if is_unused {
            return (tls, None);
        }
        let handshake = tls.acceptor.accept(stream).await;
        (tls, Some(handshake))
    })
    .await
    .map_err(|_| io::ErrorKind::TimedOut)?;
    let Some(stream) = handshake.transpose()? else {
        return Ok(None);
    };
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    // The verifier has made sure that there is a certificate that parses.
    let trust = Trust::new(chain, tls_used.generation, tls).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Some((stream, trust)))
}

/// Returns once the broker is shutting down.
pub(super) async fn shutdown_requested(stopping: &mut watch::Receiver<bool>) {
    // An error means that the broker was dropped.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// The addresses that count as one peer: an IPv4 address, or a /64 of IPv6.
pub(super) fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_ipv6_64_count_as_one_peer() {
        let network = |address: &str| network(address.parse().unwrap());
        assert_eq!(network("2001:db8::1"), network("2001:db8::2"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
        assert_ne!(network("192.0.2.1"), network("192.0.2.2"));
    }
}
