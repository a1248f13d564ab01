//! Log lines on their way to stderr. A thread of its own writes them, so that a reader of stderr that does not read stops
//! nothing else.

use std::io::{self, ErrorKind, Write};
use std::sync::{Condvar, PoisonError};
use std::thread;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;

use crate::base::lock::Mutex;

/// Bytes of lines that may wait; the thread can have as many at the same time. Further lines are dropped.
const LIMIT: usize = 2 * 1024 * 1024;

/// More bytes for lines that are the only record of something.
const RESERVE: usize = 2 * 1024 * 1024;

/// How long to wait before another try if stderr does not block and its reader is slow.
const WRITE_AGAIN: Duration = Duration::from_millis(10);

/// How long the thread waits after a write, so that a busy broker wakes it for many lines at a time.
const COLLECT_FOR: Duration = Duration::from_millis(2);

/// Lines that wait to be written.
#[derive(Default)]
pub(super) struct LogQueue {
    state: Mutex<State>,
    filled: Condvar,
    emptied: Condvar,
    /// Lines that were dropped since the start.
    pub(super) dropped: Counter,
}

#[derive(Default)]
struct State {
    lines: Vec<u8>,
    /// Lines that were dropped after these, and are not announced yet.
    dropped: u64,
    has_writer: bool,
    /// Whether the thread waits for lines.
    is_idle: bool,
    /// Whether the thread announces dropped lines: its line must not be dropped.
    is_announcing: bool,
}

impl LogQueue {
    /// Starts the thread that writes the lines.
    pub(super) fn start(&'static self, announce: impl Fn(u64) + Send + 'static) -> io::Result<()> {
        let mut state = self.state.lock();
        let thread = thread::Builder::new().name("log".to_owned());
        // It never ends.
        drop(thread.spawn(move || self.write(io::stderr(), announce))?);
        state.has_writer = true;
        Ok(())
    }

    /// Takes a line, or drops it; without a thread, writes it at once.
    pub(super) fn push(&self, line: &[u8], has_reserve: bool) {
        let mut state = self.state.lock();
        if !state.has_writer {
            drop(state);
            // If stderr is closed, the line is lost.
            let _ = io::stderr().write_all(line);
            return;
        }
        let limit = LIMIT + if has_reserve { RESERVE } else { 0 };
        if state.lines.len() + line.len() > limit && !state.is_announcing {
            state.dropped += 1;
            self.dropped.inc();
            return;
        }
        state.lines.extend_from_slice(line);
        if std::mem::take(&mut state.is_idle) {
            self.filled.notify_one();
        }
    }

    /// Waits until all lines are written, or for `within`.
    pub(super) fn flush(&self, within: Duration) {
        let state = self.state.lock();
        let is_open = |state: &mut State| state.has_writer && !state.is_idle;
        // The lock is not poisoned; in any case there is nothing more to do.
        let _ = self.emptied.wait_timeout_while(state, within, is_open);
    }

    /// Writes lines without end; passes the number of dropped lines to `announce` once lines are written again.
    fn write(&self, mut stderr: impl Write, announce: impl Fn(u64)) -> ! {
        loop {
            let mut state = self.state.lock();
            while state.lines.is_empty() {
                state.is_idle = true;
                self.emptied.notify_all();
                let waiting = self.filled.wait(state);
                state = waiting.unwrap_or_else(PoisonError::into_inner);
            }
            // Lines that come from now on wait for the next round.
            state.is_idle = false;
            let lines = std::mem::take(&mut state.lines);
            let dropped = std::mem::take(&mut state.dropped);
            state.is_announcing = dropped > 0;
            drop(state);
            if dropped > 0 {
                announce(dropped);
                self.state.lock().is_announcing = false;
            }
            write_all(&mut stderr, &lines);
            thread::sleep(COLLECT_FOR);
        }
    }
}

/// Writes all bytes; they are lost if the reader has closed its end.
fn write_all(stderr: &mut impl Write, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match stderr.write(bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(WRITE_AGAIN),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    use super::*;

    /// A stderr whose reader takes each write when it wants to.
    struct Pipe(SyncSender<Vec<u8>>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // In parts, as a pipe does.
            let part = &bytes[..bytes.len().min(64 * 1024)];
            self.0.send(part.to_vec()).unwrap();
            Ok(part.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A queue with its thread, and the reader.
    fn start() -> (&'static LogQueue, Receiver<Vec<u8>>) {
        let queue: &LogQueue = Box::leak(Box::default());
        let (pipe, reader) = sync_channel(0);
        queue.state.lock().has_writer = true;
        let announce = |count| queue.push(format!("{count} dropped\n").as_bytes(), false);
        thread::spawn(move || queue.write(Pipe(pipe), announce));
        (queue, reader)
    }

    #[test]
    fn lines_over_the_limit_are_dropped_counted_and_announced_in_their_place() {
        let (queue, reader) = start();
        let line = |number: usize| format!("{number:0>1023}\n").into_bytes();
        queue.push(&line(0), false);
        let mut read = vec![reader.recv().unwrap()];
        queue.push(&line(0), false);
        // The thread has taken this line, and is stuck with it.
        while !queue.state.lock().lines.is_empty() {
            thread::yield_now();
        }
        let lines = LIMIT / 1024;
        for number in 1..=lines + 7 {
            queue.push(&line(number), false);
        }
        queue.push(&line(7777), true);
        assert_eq!(queue.dropped.get(), 7);
        queue.flush(Duration::from_millis(10));
        while read.iter().map(Vec::len).sum::<usize>() < (lines + 3) * 1024 + "7 dropped\n".len() {
            read.push(reader.recv().unwrap());
        }
        queue.flush(Duration::from_secs(20));
        assert!(queue.state.lock().is_idle);
        let expected = [0].into_iter().chain(0..=lines).chain([7777]);
        let mut expected: Vec<u8> = expected.flat_map(line).collect();
        expected.extend(b"7 dropped\n");
        assert!(read.concat() == expected);
    }

    #[test]
    fn nothing_is_lost_when_stderr_does_not_block() {
        struct Reluctant(u32, Vec<u8>);
        impl Write for Reluctant {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0 += 1;
                match self.0 % 3 {
                    0 => Err(ErrorKind::WouldBlock.into()),
                    1 => Err(ErrorKind::Interrupted.into()),
                    _ => self.1.write(&bytes[..1]),
                }
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut stderr = Reluctant(0, Vec::new());
        write_all(&mut stderr, b"a line\n");
        assert_eq!(stderr.1, b"a line\n");
    }
}
