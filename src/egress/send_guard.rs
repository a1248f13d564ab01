//! Stops a request that must not leave any more, in the write to the socket itself: below TLS, so that no buffer lies between
//! the check and the socket.
//!
//! A request is not executed before its last byte has arrived. Its head ends with an empty line and has a `Content-Length`;
//! a server must treat a message with fewer bytes as incomplete (RFC 9112, section 6.3). Over TLS, a record that was cut off
//! is not even decrypted (RFC 8446, section 5.2).
//!
//! What remains after the check: the write itself, and the way of the bytes from the socket to the exchange.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::base::lock::Mutex;
use crate::clock::{Clock, HostId};

/// Decides whether one request may still be written to its socket.
#[derive(Debug)]
pub(crate) struct SendGuard {
    clock: Arc<Clock>,
    host_id: HostId,
    /// Exchange time, in Unix milliseconds; `None`: no limit.
    not_after_ms: Option<i64>,
    deadline: Instant,
    state: Mutex<Progress>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Progress {
    /// At least its last byte has not been written.
    Incomplete,
    /// It was written completely.
    Written,
    /// It is incomplete and stays so.
    Stopped,
}

impl SendGuard {
    /// A request that must be written before `deadline`, and not after `not_after_ms` by the clock of `host_id`.
    pub(crate) fn new(
        clock: Arc<Clock>,
        host_id: HostId,
        not_after_ms: Option<i64>,
        deadline: Instant,
    ) -> Self {
        Self {
            clock,
            host_id,
            not_after_ms,
            deadline,
            state: Mutex::new(Progress::Incomplete),
        }
    }

    /// Stops the request unless it was written completely. Returns whether it is stopped: then it is never executed.
    pub(crate) fn stop(&self) -> bool {
        let mut state = self.state.lock();
        if *state == Progress::Incomplete {
            *state = Progress::Stopped;
        }
        *state == Progress::Stopped
    }

    /// Whether it is stopped.
    pub(super) fn is_stopped(&self) -> bool {
        *self.state.lock() == Progress::Stopped
    }

    fn is_late(&self) -> bool {
        let is_after = |ms| self.clock.exchange(self.host_id).latest_ms() > ms;
        Instant::now() >= self.deadline || self.not_after_ms.is_some_and(is_after)
    }

    /// Writes `offered` bytes unless it is too late. A write that takes all of them counts as the last one. That is exact up to
    /// 64 KiB, which TLS offers at once; a longer request counts as written too early, and is only checked less.
    fn write(
        &self,
        offered: usize,
        write: impl FnOnce() -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        // Locked during the write, so that `stop` cannot come between check and write.
        let mut state = self.state.lock();
        if *state == Progress::Incomplete && self.is_late() {
            *state = Progress::Stopped;
        }
        if *state == Progress::Stopped {
            let error = "the time limit passed before the request was completely written";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, error)));
        }
        let written = write();
        if matches!(written, Poll::Ready(Ok(bytes)) if bytes == offered) {
            *state = Progress::Written;
        }
        written
    }
}

/// The guard of the request that a connection carries; `None`: the request may always be written.
pub(super) type Guard = Arc<Mutex<Option<Arc<SendGuard>>>>;

/// A socket that asks the current guard before each write. Once a request was stopped, nothing more is written, also no
/// `close_notify`, since that would complete the record that was cut off.
#[derive(Debug)]
pub(super) struct GuardedSocket<S> {
    socket: S,
    guard: Guard,
}

impl<S: AsyncWrite + Unpin> GuardedSocket<S> {
    pub(super) fn new(socket: S, guard: Guard) -> Self {
        Self { socket, guard }
    }

    fn write(
        &mut self,
        offered: usize,
        write: impl FnOnce(Pin<&mut S>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let guard = self.guard.lock().clone();
        let socket = Pin::new(&mut self.socket);
        match guard {
            Some(guard) => guard.write(offered, || write(socket)),
            None => write(socket),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for GuardedSocket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for GuardedSocket<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.write(bytes.len(), |socket| socket.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let offered = parts.iter().map(|part| part.len()).sum();
        self.write(offered, |socket| socket.poll_write_vectored(context, parts))
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use futures_util::poll;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;
    use crate::clock::{Measured, Sample};
    use crate::kucoin::{Host, Site};

    const HOST: HostId = (Site::Global, Host::Spot);
    const NOW_MS: i64 = 1_767_225_600_000;

    /// A clock that shows `NOW_MS` with an uncertainty of 10 ms, later by the milliseconds in the counter.
    fn clock() -> (Arc<Clock>, Arc<AtomicU64>) {
        let passed_ms = Arc::new(AtomicU64::new(0));
        let passed = Arc::clone(&passed_ms);
        let clock = Clock::reading(move || Duration::from_millis(passed.load(Ordering::Relaxed)));
        let sample = Sample {
            asked: Duration::ZERO,
            answered: Duration::from_millis(20),
            server_ms: NOW_MS + 10,
        };
        assert_eq!(clock.apply_sample(HOST, sample, false), Measured::Applied);
        (Arc::new(clock), passed_ms)
    }

    /// A socket that takes `bytes` before its peer reads, with a guard that allows writes until `NOW_MS` + 100.
    fn socket(
        clock: &Arc<Clock>,
        bytes: usize,
    ) -> (GuardedSocket<DuplexStream>, Arc<SendGuard>, DuplexStream) {
        let (ours, theirs) = duplex(bytes);
        let deadline = Instant::now() + Duration::from_secs(600);
        let guard = SendGuard::new(Arc::clone(clock), HOST, Some(NOW_MS + 100), deadline);
        let guard = Arc::new(guard);
        let slot = Guard::default();
        *slot.lock() = Some(Arc::clone(&guard));
        (GuardedSocket::new(ours, slot), guard, theirs)
    }

    async fn received(mut peer: DuplexStream) -> String {
        let mut text = String::new();
        peer.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn nothing_is_written_once_the_time_may_have_passed() {
        let (clock, passed_ms) = clock();
        let (mut socket, guard, peer) = socket(&clock, 64);
        // Not passed yet, but the uncertainty reaches beyond it.
        passed_ms.store(95, Ordering::Relaxed);
        let error = socket.write_all(b"order").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(guard.is_stopped());
        // Also not if the clock is set back.
        passed_ms.store(0, Ordering::Relaxed);
        socket.write_all(b"order").await.unwrap_err();
        drop(socket);
        assert_eq!(received(peer).await, "");
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_written_after_the_deadline() {
        let (clock, _) = clock();
        let (mut socket, guard, peer) = socket(&clock, 64);
        tokio::time::advance(Duration::from_secs(600)).await;
        socket.write_all(b"order").await.unwrap_err();
        assert!(guard.stop());
        drop(socket);
        assert_eq!(received(peer).await, "");
    }

    #[tokio::test]
    async fn request_whose_last_byte_is_not_written_is_stopped_and_stays_incomplete() {
        for is_late in [true, false] {
            let (clock, passed_ms) = clock();
            let (mut socket, guard, mut peer) = socket(&clock, 4);
            {
                let mut write = std::pin::pin!(socket.write_all(b"order"));
                assert!(poll!(&mut write).is_pending());
                if is_late {
                    passed_ms.store(200, Ordering::Relaxed);
                } else {
                    assert!(guard.stop());
                }
                // Makes room for the last byte.
                peer.read_exact(&mut [0; 4]).await.unwrap();
                write.await.unwrap_err();
            }
            assert!(guard.is_stopped());
            drop(socket);
            assert_eq!(received(peer).await, "");
        }
    }

    #[tokio::test]
    async fn request_that_is_written_completely_cannot_be_stopped() {
        let (clock, passed_ms) = clock();
        let (mut socket, guard, peer) = socket(&clock, 64);
        socket.write_all(b"order").await.unwrap();
        passed_ms.store(200, Ordering::Relaxed);
        assert!(!guard.stop());
        // What TLS writes afterwards, such as `close_notify`.
        socket.write_all(b"!").await.unwrap();
        assert!(!guard.is_stopped());
        drop(socket);
        assert_eq!(received(peer).await, "order!");
    }
}
