//! From a socket to TLS connections whose peers have shown their certificates: for bots and for admins alike.

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
use crate::telemetry::Metrics;

/// TLS handshakes at once. One more ends the oldest of the address that has the most: a handshake that goes on takes
/// milliseconds, and whoever opens connections and says nothing does not keep others out.
const HANDSHAKES: usize = 512;

/// What a listener needs to take connections.
pub(super) struct Acceptor {
    pub(super) tls: watch::Receiver<Arc<Tls>>,
    /// How long a handshake may take.
    pub(super) within: Duration,
    pub(super) metrics: Arc<Metrics>,
    pub(super) stopping: watch::Receiver<bool>,
}

impl Acceptor {
    /// Has every connection served until told to stop; returns once all of them have ended.
    pub(super) async fn run<F: Future<Output = ()> + Send + 'static>(
        self,
        socket: TcpListener,
        serve: impl Fn(TlsStream<TcpStream>, Trust) -> F + Clone + Send + 'static,
    ) {
        let (connections, handshakes) = (TaskTracker::new(), HandshakeSlots::new(HANDSHAKES));
        let mut stopping = self.stopping.clone();
        loop {
            let accepted = tokio::select! {
                accepted = socket.accept() => accepted,
                () = shutdown_requested(&mut stopping) => break,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                // The peer has gone again already.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(_) => {
                    // Out of descriptors: let some connections end first.
                    self.metrics.connection_refused("descriptors");
                    sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let place = HandshakeSlots::take(&handshakes, network(peer.ip()));
            let (tls, within) = (self.tls.clone(), self.within);
            let (metrics, serve) = (Arc::clone(&self.metrics), serve.clone());
            connections.spawn(async move {
                let shaken = tokio::select! {
                    shaken = shake_hands(stream, tls, within) => shaken,
                    () = place.is_given_up.cancelled() => Err(io::Error::other("too many handshakes at once")),
                };
                drop(place);
                match shaken {
                    Ok(Some((stream, trust))) => serve(stream, trust).await,
                    Ok(None) => _ = metrics.connections_unused.inc(),
                    Err(error) => refused(&metrics, peer, &error),
                }
            });
        }
        // Whoever comes now is refused, and goes elsewhere.
        drop(socket);
        connections.close();
        connections.wait().await;
    }
}

fn refused(metrics: &Metrics, peer: SocketAddr, error: &io::Error) {
    metrics.connection_refused("handshake");
    if let Some(suppressed) = metrics.allow_log() {
        tracing::info!(%peer, %error, suppressed, "TLS handshake failed");
    }
}

/// `None` for a peer that closes before its first byte, as the TCP check of a load balancer does.
async fn shake_hands(
    stream: TcpStream,
    tls: watch::Receiver<Arc<Tls>>,
    within: Duration,
) -> io::Result<Option<(TlsStream<TcpStream>, Trust)>> {
    // Small answers must not wait for acknowledgements: 40 ms each without this.
    stream.set_nodelay(true)?;
    let (now, shaken) = timeout(within, async {
        let is_unused = match stream.peek(&mut [0]).await {
            Ok(bytes) => bytes == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        };
        let now = Arc::clone(&tls.borrow());
        if is_unused {
            return (now, None);
        }
        let shaken = now.acceptor.accept(stream).await;
        (now, Some(shaken))
    })
    .await
    .map_err(|_| io::ErrorKind::TimedOut)?;
    let Some(stream) = shaken.transpose()? else {
        return Ok(None);
    };
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    // The verifier has seen to it that there is a certificate that can be read.
    let trust = Trust::new(chain, now.generation, tls).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Some((stream, trust)))
}

/// Returns once the broker stops.
pub(super) async fn shutdown_requested(stopping: &mut watch::Receiver<bool>) {
    // An error means that the broker is gone.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// What one peer can have for itself: an IPv4 address, or a /64 of IPv6.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_network_are_one_peer() {
        let network = |address: &str| network(address.parse().unwrap());
        assert_eq!(network("2001:db8::1"), network("2001:db8::2"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
        assert_ne!(network("192.0.2.1"), network("192.0.2.2"));
    }
}
