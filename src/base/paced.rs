//! A connection whose peer cannot keep the broker's one thread busy, however much it sends.

use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::yield_now;
use tokio::time::{Instant, Sleep, sleep};

/// Bytes that are read before other tasks run, and before the clock is read: one TLS record (RFC 8446, section 5.1). With
/// four times as many, large answers made cancels of other bots take almost twice as long.
const TURN: u32 = 16 * 1024;

/// An HTTP/2 frame without content takes about as long as this many bytes of a large one, or less.
const FRAME: u32 = 512;

/// Bytes of one read of HTTP/2: few, since they can be many frames.
const READ: usize = 2048;

/// HTTP/2 frames per second of one connection, and how many at once after a rest. A call has three to five: a connection can
/// carry at least 4,000 calls per second.
const FRAMES: (f64, f64) = (20_000.0, 4000.0);

/// Bytes that an HTTP/2 client sends before its first frame (RFC 9113, section 3.4).
const PREFACE: usize = 24;

/// Bytes of a frame's head after its length (RFC 9113, section 4.1).
const REST_OF_HEAD: usize = 6;

/// A connection that is read in turns of 16 KiB, and at a limited rate after a burst of one second's bytes. Writes are not
/// limited.
#[derive(Debug)]
pub(crate) struct Paced<S> {
    stream: S,
    bytes: Allowance,
    frames: Allowance,
    /// When both were last brought up to date.
    settled: Instant,
    pause: Option<Pin<Box<Sleep>>>,
    /// For HTTP/2 from a client.
    parser: Option<FrameParser>,
}

/// What may be read.
#[derive(Debug)]
struct Allowance {
    per_second: f64,
    most: f64,
    /// Negative while reading is paused.
    left: f64,
    /// What was read in this turn, and is not yet subtracted.
    used: u32,
}

/// Counts the frames in a stream of bytes.
#[derive(Debug)]
struct FrameParser {
    /// Bytes until the next head.
    skip: usize,
    /// Bytes of the next head's length that were received, of 3.
    received: u8,
    /// Their value.
    length: usize,
}

impl Allowance {
    fn new(per_second: f64, most: f64) -> Self {
        Self {
            per_second,
            most,
            left: most,
            used: 0,
        }
    }

    fn add(&mut self, read: usize) {
        // No buffer has as many bytes as a u32 can count.
        self.used += u32::try_from(read).unwrap_or(TURN);
    }

    /// Brings it up to date; returns the seconds until it is no longer negative.
    fn settle(&mut self, seconds: f64) -> f64 {
        let gained = self.per_second * seconds;
        self.left = (self.left + gained).min(self.most) - f64::from(self.used);
        self.used = 0;
        (-self.left / self.per_second).max(0.0)
    }
}

impl<S> Paced<S> {
    /// Limits `stream` to `rate` bytes per second.
    pub(crate) fn new(stream: S, rate: u32) -> Self {
        let rate = f64::from(rate);
        Self {
            stream,
            bytes: Allowance::new(rate, rate),
            frames: Allowance::new(FRAMES.0, FRAMES.1),
            settled: Instant::now(),
            pause: None,
            parser: None,
        }
    }

    /// The same for a connection on which a client sends HTTP/2, and at most 20,000 frames per second.
    pub(crate) fn http2(stream: S, rate: u32) -> Self {
        let parser = FrameParser {
            skip: PREFACE,
            received: 0,
            length: 0,
        };
        Self {
            parser: Some(parser),
            ..Self::new(stream, rate)
        }
    }

    /// Returns once the next read may begin.
    fn poll_turn(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.bytes.used + FRAME * self.frames.used >= TURN {
            let now = Instant::now();
            let seconds = (now - self.settled).as_secs_f64();
            self.settled = now;
            let pause = self.bytes.settle(seconds).max(self.frames.settle(seconds));
            if pause == 0.0 {
                // Unlike a plain wake, it also lets the runtime look for events of other connections first.
                return pin!(yield_now()).poll(context);
            }
            self.pause = Some(Box::pin(sleep(Duration::from_secs_f64(pause))));
        }
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(context));
            self.pause = None;
        }
        Poll::Ready(())
    }
}

impl FrameParser {
    /// How many heads begin in the next bytes of the stream.
    fn count(&mut self, mut bytes: &[u8]) -> usize {
        let mut count = 0;
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            let Some((&first, rest)) = bytes.split_at(skipped).1.split_first() else {
                return count;
            };
            bytes = rest;
            self.length = self.length << 8 | usize::from(first);
            self.received += 1;
            if self.received == 3 {
                count += 1;
                self.skip = REST_OF_HEAD + self.length;
                (self.received, self.length) = (0, 0);
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_turn(context));
        let this = &mut *self;
        let Some(parser) = &mut this.parser else {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(context, buffer))?;
            this.bytes.add(buffer.filled().len() - before);
            return Poll::Ready(Ok(()));
        };
        let most = buffer.remaining().min(READ);
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(most));
        ready!(Pin::new(&mut this.stream).poll_read(context, &mut part))?;
        this.frames.add(parser.count(part.filled()));
        let bytes = part.filled().len();
        this.bytes.add(bytes);
        buffer.advance(bytes);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, join, repeat, sink};

    use super::*;

    const RATE: u32 = 4_000_000;

    /// Reads `bytes` from a connection whose peer sends zeros without end, and returns how long it took.
    async fn read(stream: &mut (impl AsyncRead + Unpin), bytes: usize) -> Duration {
        let started = Instant::now();
        let mut buffer = vec![0; 8192];
        for _ in 0..bytes / buffer.len() {
            stream.read_exact(&mut buffer).await.unwrap();
        }
        started.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn one_second_of_bytes_is_read_at_once_and_the_rest_at_the_rate() {
        let mut stream = Paced::new(join(repeat(0), sink()), RATE);
        assert_eq!(read(&mut stream, 3_900_000).await, Duration::ZERO);
        let took = read(&mut stream, 8_100_000).await.as_secs_f64();
        assert!((1.9..2.1).contains(&took), "{took}");
        // A rest brings back one second's bytes and no more.
        sleep(Duration::from_secs(60)).await;
        assert_eq!(read(&mut stream, 3_800_000).await, Duration::ZERO);
        let took = read(&mut stream, 4_200_000).await.as_secs_f64();
        assert!((0.9..1.1).contains(&took), "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn frames_without_content_are_read_at_twenty_thousand_per_second() {
        // The preface, and then frames without content: all zeros.
        let mut stream = Paced::http2(join(repeat(0), sink()), RATE);
        assert_eq!(read(&mut stream, 9 * 3900).await, Duration::ZERO);
        let took = read(&mut stream, 9 * 40_100).await.as_secs_f64();
        assert!((1.9..2.1).contains(&took), "{took}");
    }

    #[tokio::test]
    async fn other_tasks_run_after_each_16_kib() {
        let mut stream = Paced::new(join(repeat(0), sink()), u32::MAX);
        let reading = tokio::spawn(async move { read(&mut stream, 100 * 16 * 1024).await });
        let mut turns = 0;
        while !reading.is_finished() {
            yield_now().await;
            turns += 1;
        }
        assert!((100..=102).contains(&turns), "{turns}");
    }

    #[test]
    fn frames_are_counted_however_the_bytes_are_split() {
        let mut bytes = vec![7; PREFACE];
        for length in [0, 1, 255, 256, 0, 70_000, 3] {
            bytes.extend(&u32::to_be_bytes(length)[1..]);
            bytes.extend([9; REST_OF_HEAD]);
            bytes.extend(std::iter::repeat_n(0, usize::try_from(length).unwrap()));
        }
        for size in [1, 2, 3, 5, 9, 10, 4096, bytes.len()] {
            let mut parser = Paced::http2((), RATE).parser.unwrap();
            let counts = bytes.chunks(size).map(|part| parser.count(part));
            assert_eq!(counts.sum::<usize>(), 7, "{size}");
        }
    }
}
