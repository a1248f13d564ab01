//! Idle connections to one host; the newest is used first.

use std::net::SocketAddr;
use std::sync::Weak;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::SendRequest;
use tokio::time::{Instant, timeout};

use super::send_guard::Guard;
use crate::base::lock::Mutex;
use crate::kucoin::Key;

/// Most idle connections that are kept.
const MAX_IDLE_CONNECTIONS: usize = 256;

/// How long to wait for an idle connection to be ready. After a complete answer it is ready at once, unless it is still
/// writing the body of a request that was answered before that was complete, which may never finish.
const READY_WITHIN: Duration = Duration::from_millis(20);

/// Last in, first out, so that the surplus of a burst ages and is closed.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<Idle>>);

/// An open connection, and the keys that signed its requests.
///
/// The HTTP library keeps the buffer of each request, including the signed passphrase, for the next one. Therefore a
/// connection must not outlive a key that it has carried.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) sender: SendRequest<Full<Bytes>>,
    /// The address at the other end.
    pub(super) peer: SocketAddr,
    /// Set for each request.
    pub(super) guard: Guard,
    /// Without duplicates. They do not keep the keys in memory.
    keys: Vec<Weak<Key>>,
}

impl Open {
    /// A connection that has carried no request.
    pub(super) fn new(sender: SendRequest<Full<Bytes>>, peer: SocketAddr, guard: Guard) -> Self {
        Self {
            sender,
            peer,
            guard,
            keys: Vec::new(),
        }
    }

    /// Remembers the key of the next request, if it is signed.
    pub(super) fn remember_key(&mut self, key: Option<Weak<Key>>) {
        if let Some(key) = key
            && !self.keys.iter().rev().any(|known| known.ptr_eq(&key))
        {
            self.keys.push(key);
        }
    }

    /// Whether it is open and every key that it has carried is still loaded.
    fn is_usable(&self) -> bool {
        !self.sender.is_closed() && self.keys.iter().all(|key| key.strong_count() > 0)
    }
}

#[derive(Debug)]
struct Idle {
    open: Open,
    since: Instant,
}

impl Pool {
    /// Takes the newest connection that is usable, ready, and idle for less than `max_idle`.
    pub(super) async fn take(&self, max_idle: Duration) -> Option<Open> {
        loop {
            let mut open = {
                let mut idle = self.0.lock();
                // The newest is last: if it is too old, all are.
                idle.pop_if(|newest| newest.since.elapsed() < max_idle)?
                    .open
            };
            if open.is_usable()
                && let Ok(Ok(())) = timeout(READY_WITHIN, open.sender.ready()).await
            {
                return Some(open);
            }
        }
    }

    /// Keeps a connection for the next request.
    pub(super) fn put(&self, open: Open) {
        let mut idle = self.0.lock();
        if open.is_usable() && idle.len() < MAX_IDLE_CONNECTIONS {
            idle.push(Idle {
                open,
                since: Instant::now(),
            });
        }
    }

    /// Drops connections that the exchange has closed, that have carried a dropped key, or that were idle for `max_idle`.
    pub(super) fn drop_older_than(&self, max_idle: Duration) {
        let mut idle = self.0.lock();
        idle.retain(|connection| {
            connection.open.is_usable() && connection.since.elapsed() < max_idle
        });
    }

    /// Drops connections to addresses that `is_gone` returns true for.
    pub(super) fn drop_where(&self, is_gone: impl Fn(&SocketAddr) -> bool) {
        let mut idle = self.0.lock();
        idle.retain(|connection| !is_gone(&connection.open.peer));
    }

    /// How many open connections have been idle for less than `max_idle`.
    pub(super) fn fresh(&self, max_idle: Duration) -> usize {
        let idle = self.0.lock();
        idle.iter()
            .filter(|c| c.open.is_usable() && c.since.elapsed() < max_idle)
            .count()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hyper::client::conn::http1;
    use hyper_util::rt::TokioIo;
    use zeroize::Zeroizing;

    use super::*;
    use crate::base::secret::{ApiSecret, Passphrase};
    use crate::kucoin::KeyVersion;

    fn peer() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 1))
    }

    #[tokio::test(start_paused = true)]
    async fn old_connection_is_not_used_for_writes_and_closed_one_not_at_all() {
        let pool = Pool::default();
        let (ours, theirs) = tokio::io::duplex(64);
        let (sender, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
        let connection = tokio::spawn(connection);
        pool.put(Open::new(sender, peer(), Guard::default()));
        tokio::time::advance(Duration::from_secs(21)).await;
        let (writes, reads) = (Duration::from_secs(20), Duration::from_secs(60));
        assert_eq!((pool.fresh(writes), pool.fresh(reads)), (0, 1));
        assert!(pool.take(writes).await.is_none());
        let open = pool.take(reads).await.expect("a read may use it");
        assert!(
            pool.take(reads).await.is_none(),
            "each connection serves one call at a time"
        );
        pool.put(open);
        drop(theirs);
        let _ = connection.await.unwrap();
        assert!(pool.take(reads).await.is_none());
    }

    #[tokio::test]
    async fn connection_closes_once_a_key_that_it_has_carried_is_dropped() {
        let text = |text: &str| Zeroizing::new(text.to_owned());
        let key = || {
            let (secret, passphrase) = (
                ApiSecret::new(text("fake-secret")),
                Passphrase::new(text("fake-pass")),
            );
            Key::new(text("fake-id"), &secret, &passphrase, KeyVersion::V3, None).unwrap()
        };
        let (first, second) = (key(), key());
        let (ours, _theirs) = tokio::io::duplex(64);
        let (sender, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
        let connection = tokio::spawn(connection);
        let pool = Pool::default();
        let mut open = Open::new(sender, peer(), Guard::default());
        for key in [&first, &second, &first] {
            open.remember_key(Some(Arc::downgrade(key)));
        }
        open.remember_key(None);
        assert_eq!(open.keys.len(), 2);
        pool.put(open);
        let reads = Duration::from_secs(60);
        pool.drop_older_than(reads);
        let open = pool.take(reads).await.expect("both keys are loaded");
        pool.put(open);
        drop(second);
        assert_eq!(pool.fresh(reads), 0);
        pool.drop_older_than(reads);
        // Ends only once the other end is dropped.
        connection.await.unwrap().unwrap();
        assert!(pool.take(reads).await.is_none());
    }
}
