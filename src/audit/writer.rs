//! Writes audit lines to the file on a thread of its own, so that no disk blocks the thread that serves calls.
//!
//! Lines wait in one queue, in order, until they are in the file. While writes fail or hang, a second thread copies waiting
//! lines to the reserve file; if the process ends then, the next start writes them to the audit file first.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::timeout;

use super::file::AuditFile;
use super::reserve::Reserve;
use crate::base::lock::Mutex;
use crate::clock::Clock;
use crate::telemetry::Metrics;

/// Once a write takes this long, the file counts as hanging until a write succeeds.
pub(super) const HANGS_AFTER: Duration = Duration::from_millis(500);

/// How often a failed write is tried again without a new line, and how often hanging writes are looked for.
const RETRY_EVERY: Duration = Duration::from_millis(500);

/// Bytes that one write takes from the queue.
const BATCH: usize = 256 * 1024;

/// Risk-increasing requests are refused while the file system has less free space: it is for the lines of cancels.
pub(crate) const LEAST_FREE: u64 = 64 * 1024 * 1024;

/// What a line is about, which decides what happens while the file cannot be written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// The intent of a risk-increasing request: refused, so that the request is not sent.
    RiskIncreasing,
    /// Cancels, results and actions: may use the whole queue.
    Essential,
    /// Reads and refusals: may use half of the queue.
    Other,
}

/// The audit file with the lines that wait for it.
#[derive(Debug)]
pub(super) struct Writer {
    path: PathBuf,
    run: String,
    clock: Arc<Clock>,
    metrics: Arc<Metrics>,
    file: Mutex<AuditFile>,
    lines: Mutex<Lines>,
    /// Wakes the thread that writes the file.
    work: Condvar,
    /// Wakes the thread that writes the reserve file.
    reserve_work: Condvar,
    /// Free and all bytes of the file system; `None` if unknown.
    space: Mutex<Option<Space>>,
}

/// The space of the audit file's file system, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Space {
    /// Free for the broker's user.
    pub(crate) free: u64,
    /// In total.
    pub(crate) total: u64,
}

impl Space {
    /// Whether at least 90 % are used.
    pub(crate) fn is_nearly_full(self) -> bool {
        self.free <= self.total / 10
    }
}

/// Lines that are not in the file yet.
#[derive(Debug, Default)]
struct Lines {
    /// In order, with those that are being written.
    queue: VecDeque<Line>,
    /// Bytes of the queue, and its limit.
    bytes: usize,
    limit: usize,
    /// The number of the last line in its run: gapless, so that a missing line shows.
    seq: u64,
    /// The number of the next line in the queue.
    next: u64,
    /// All lines before this number are in the reserve file or in the audit file.
    in_reserve: u64,
    /// Whether the thread waits for work.
    is_idle: bool,
    /// When the current write began.
    writing_since: Option<Instant>,
    /// Why the last write failed.
    failure: Option<String>,
    /// The number of the next line when the last write began: a failed write is tried again with the next line.
    tried: u64,
    /// Whether a hanging write has been logged.
    hang_is_logged: bool,
    reserve: ReserveState,
    is_closing: bool,
}

#[derive(Debug, Default)]
enum ReserveState {
    /// There is none.
    #[default]
    Missing,
    /// It is empty.
    Empty,
    /// It holds lines.
    Holding,
    WritingSince(Instant),
    /// Its lines are being flushed to the disk.
    Flushing,
    /// It is full, or the last write failed.
    Failed(String),
}

#[derive(Debug)]
struct Line {
    text: String,
    kind: Kind,
    /// Gets the result once the line is in the file or, unless the request is risk-increasing, in the reserve file.
    reply: Option<oneshot::Sender<io::Result<()>>>,
}

/// A line on its way to the file.
#[derive(Debug)]
#[must_use = "wait until the line is written"]
pub(super) struct Queued {
    since: Instant,
    result: Option<oneshot::Receiver<io::Result<()>>>,
}

/// The result of waiting for a line.
#[derive(Debug)]
pub(super) enum Waited {
    /// It is in the file or in the reserve file; or in the queue, if neither can be written.
    Kept,
    /// A write failed. The line stays in the queue.
    Failed(io::Error),
    /// It is still being written. The line stays in the queue.
    Hangs,
}

impl Queued {
    fn new(result: Option<oneshot::Receiver<io::Result<()>>>) -> Self {
        let since = Instant::now();
        Self { since, result }
    }

    /// Nothing to wait for.
    pub(super) fn nothing() -> Self {
        Self::new(None)
    }

    /// Waits until the line is written, for at most `within` since it was queued.
    pub(super) async fn wait(self, within: Duration) -> Waited {
        let Some(result) = self.result else {
            return Waited::Kept;
        };
        match timeout(within.saturating_sub(self.since.elapsed()), result).await {
            Ok(Ok(Ok(()))) => Waited::Kept,
            Ok(Ok(Err(error))) => Waited::Failed(error),
            Ok(Err(_)) => Waited::Failed(io::Error::other("the audit thread has ended")),
            Err(_) => Waited::Hangs,
        }
    }
}

impl Writer {
    /// Opens the file and starts the thread that writes it. At most `limit` bytes of lines wait for it.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(super) fn open(
        path: &Path,
        limit: usize,
        run: String,
        clock: Arc<Clock>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Arc<Self>> {
        let writer = Arc::new(Self {
            path: path.to_owned(),
            run,
            clock,
            metrics,
            file: Mutex::new(AuditFile::open(path)?),
            lines: Mutex::new(Lines {
                limit,
                ..Lines::default()
            }),
            work: Condvar::new(),
            reserve_work: Condvar::new(),
            space: Mutex::default(),
        });
        let thread = Arc::clone(&writer);
        std::thread::Builder::new()
            .name("audit-write".to_owned())
            .spawn(move || thread.write_lines())?;
        Ok(writer)
    }

    /// Uses a reserve file, and queues the lines that it holds from an earlier run.
    ///
    /// # Errors
    /// When it cannot be opened or has no space. The queue is then only in memory.
    pub(super) fn use_reserve(self: &Arc<Self>, path: &Path, bytes: usize) -> io::Result<()> {
        self.open_reserve(path, bytes).inspect_err(|error| {
            self.lines.lock().reserve = ReserveState::Failed(error.to_string());
        })
    }

    fn open_reserve(self: &Arc<Self>, path: &Path, bytes: usize) -> io::Result<()> {
        let (reserve, found) = Reserve::open(path, bytes)?;
        let found = super::reserve::missing_from(&self.path, found)?;
        let count = found.len();
        let mut lines = self.lines.lock();
        for text in found {
            lines.push(text, Kind::Essential, None);
        }
        lines.in_reserve = lines.next;
        lines.reserve = if reserve.is_used() {
            ReserveState::Holding
        } else {
            ReserveState::Empty
        };
        drop(lines);
        self.work.notify_one();
        if count > 0 {
            tracing::warn!(count, file.path = %path.display(), "audit lines that an earlier run could not write are added to the audit log");
        }
        let thread = Arc::clone(self);
        std::thread::Builder::new()
            .name("audit-reserve".to_owned())
            .spawn(move || thread.write_reserve(reserve))?;
        Ok(())
    }

    /// Queues a line, or writes it at once where that cannot wait for the disk. `text` is given the line's number, and is called
    /// while no other line can be queued, so that lines are in the order of their times and numbers.
    ///
    /// # Errors
    /// When the file cannot be written and the line is the intent of a risk-increasing request, or the queue is full. A line
    /// of another kind that does not fit goes to the log.
    pub(super) fn push(
        &self,
        kind: Kind,
        text: impl FnOnce(u64) -> serde_json::Result<String>,
    ) -> io::Result<Queued> {
        let mut lines = self.lines.lock();
        if kind == Kind::RiskIncreasing {
            self.check(&lines)?;
        }
        let seq = lines.seq + 1;
        let text = text(seq)? + "\n";
        if lines.queue.is_empty() && lines.writing_since.is_none() && lines.failure.is_none() {
            let is_written = self
                .file
                .try_lock()
                .is_some_and(|mut file| file.append_at_once(&text));
            if is_written {
                lines.seq = seq;
                return Ok(Queued::nothing());
            }
        }
        if !lines.has_room(&text, kind) {
            let full = io::Error::other("too many lines are waiting for it");
            if kind == Kind::RiskIncreasing {
                return Err(full);
            }
            drop(lines);
            self.metrics.audit_failures.inc();
            tracing::error!(target: "credbroker::audit", line = text.trim_end(), file.path = %self.path.display(), "audit line not written; too many lines are waiting for the audit log");
            return Err(full);
        }
        lines.seq = seq;
        let is_impaired = lines.is_impaired();
        // Nothing that is worth waiting for can happen while the file hangs and there is no reserve.
        let waits = !(is_impaired && lines.hangs() && !lines.reserve_works());
        let (reply, result) = oneshot::channel();
        lines.push(text, kind, waits.then_some(reply));
        let wakes = std::mem::take(&mut lines.is_idle);
        drop(lines);
        if wakes {
            self.work.notify_one();
        }
        if is_impaired {
            self.reserve_work.notify_one();
        }
        Ok(Queued::new(waits.then_some(result)))
    }

    /// Waits until all lines queued so far are in the file or in the reserve file, for at most `within`.
    pub(super) async fn flush(&self, within: Duration) {
        let (reply, result) = oneshot::channel();
        {
            let mut lines = self.lines.lock();
            if lines.queue.is_empty() {
                return;
            }
            lines.push(String::new(), Kind::Essential, Some(reply));
        }
        self.work.notify_one();
        self.reserve_work.notify_one();
        let _ = Queued::new(Some(result)).wait(within).await;
    }

    /// Why no risk-increasing request is recorded now.
    fn check(&self, lines: &Lines) -> io::Result<()> {
        if let Some(Space { free, .. }) = self.space().filter(|space| space.free < LEAST_FREE) {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!(
                    "its file system has only {} MiB of free space, expected at least {} MiB",
                    free >> 20,
                    LEAST_FREE >> 20
                ),
            ));
        }
        if lines.hangs() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "a write to it hangs",
            ));
        }
        Ok(())
    }

    /// Why the file cannot be written; `None` if it can.
    pub(super) fn failure(&self) -> Option<String> {
        let lines = self.lines.lock();
        let cause = match &lines.failure {
            Some(failure) => Some(failure.clone()),
            None => self.check(&lines).err().map(|error| error.to_string()),
        }?;
        Some(format!(
            "{} cannot be written: {cause}",
            self.path.display()
        ))
    }

    /// Whether lines cannot be written to the file now.
    pub(super) fn is_impaired(&self) -> bool {
        self.lines.lock().is_impaired()
    }

    /// How many lines are not in the file yet.
    pub(super) fn waiting(&self) -> usize {
        self.lines.lock().queue.len()
    }

    /// Why the reserve file cannot be written; `None` if it can, or there is none.
    pub(super) fn reserve_failure(&self) -> Option<String> {
        match &self.lines.lock().reserve {
            ReserveState::Failed(failure) => Some(failure.clone()),
            _ => None,
        }
    }

    /// Records that a line has waited for [`HANGS_AFTER`].
    pub(super) fn report_hang(&self) {
        let mut lines = self.lines.lock();
        if !lines.hangs() || std::mem::replace(&mut lines.hang_is_logged, true) {
            return;
        }
        drop(lines);
        self.metrics.audit_failures.inc();
        tracing::error!(file.path = %self.path.display(), "audit log write hangs; risk-increasing requests are refused until it ends");
        self.reserve_work.notify_one();
    }

    /// Logs the lines that are neither in the file nor in the reserve file, when the broker stops.
    pub(super) fn log_rest(&self) {
        let lines = self.lines.lock();
        let first = lines.first();
        for (number, line) in (first..).zip(&lines.queue) {
            if number >= lines.in_reserve && !line.text.is_empty() {
                tracing::error!(target: "credbroker::audit", line = line.text.trim_end(), file.path = %self.path.display(), "audit line not written; the broker stops");
            }
        }
    }

    /// Ends the threads once the queue is empty or cannot be written.
    pub(super) fn close(&self) {
        self.lines.lock().is_closing = true;
        self.work.notify_one();
        self.reserve_work.notify_one();
    }

    /// The open file.
    pub(super) fn current_file(&self) -> io::Result<std::fs::File> {
        self.file.lock().file.try_clone()
    }

    /// Uses another file, and returns the previous one, completed as far as possible.
    pub(super) fn replace_file(&self, new: AuditFile) -> AuditFile {
        let mut file = self.file.lock();
        // The next line goes to the new file, so an incomplete line of the old one must be completed now.
        let _ = file.complete(&self.run, &self.clock);
        std::mem::replace(&mut file, new)
    }

    /// The space of the file system; `None` if unknown.
    pub(super) fn space(&self) -> Option<Space> {
        *self.space.lock()
    }

    pub(super) fn set_space(&self, space: Space) {
        *self.space.lock() = Some(space);
    }

    /// The thread that writes the file.
    fn write_lines(&self) {
        let mut batch = String::new();
        while let Some(count) = self.next_batch(&mut batch) {
            let (written, result) = self.file.lock().append(&batch, &self.run, &self.clock);
            self.end_batch(count, written, result);
        }
    }

    /// Waits for lines, and copies those of the next write to `batch`. Returns how many; `None` once the writer is closed.
    fn next_batch(&self, batch: &mut String) -> Option<usize> {
        let mut lines = self.lines.lock();
        loop {
            let is_due = lines.failure.is_none() || lines.tried < lines.next;
            if !lines.queue.is_empty() && is_due {
                break;
            }
            if lines.is_closing {
                return None;
            }
            lines.is_idle = true;
            if lines.queue.is_empty() {
                lines = wait(&self.work, lines);
            } else {
                // A failed write is tried again with the next line, or after a while.
                let is_timed_out;
                (lines, is_timed_out) = wait_for(&self.work, lines, RETRY_EVERY);
                if is_timed_out {
                    lines.tried = 0;
                }
            }
            lines.is_idle = false;
        }
        batch.clear();
        let mut count = 0;
        // After a failure, one line shows whether the file can be written again.
        let most = if lines.failure.is_some() { 1 } else { BATCH };
        for line in &lines.queue {
            if count > 0 && batch.len() + line.text.len() > most {
                break;
            }
            batch.push_str(&line.text);
            count += 1;
        }
        lines.tried = lines.next;
        lines.writing_since = Some(Instant::now());
        Some(count)
    }

    /// Removes written lines from the queue, and reports the result to those who wait for it.
    fn end_batch(&self, count: usize, mut written: usize, result: io::Result<()>) {
        let mut lines = self.lines.lock();
        lines.writing_since = None;
        let was_hanging = std::mem::take(&mut lines.hang_is_logged);
        for _ in 0..count {
            let length = lines.queue.front().map_or(0, |line| line.text.len());
            if result.is_err() && length > written {
                break;
            }
            written = written.saturating_sub(length);
            lines.pop();
        }
        let had_failed = lines.failure.is_some();
        if let Err(error) = &result {
            let error_text = error.to_string();
            let is_kept = lines.reserve_works();
            for line in &mut lines.queue {
                match line.kind {
                    Kind::RiskIncreasing => line.reply(Err(copy(error))),
                    _ if !is_kept => line.reply(Ok(())),
                    _ => {}
                }
            }
            lines.failure = Some(error_text);
        } else {
            lines.failure = None;
        }
        let has_reserve = !matches!(lines.reserve, ReserveState::Empty | ReserveState::Missing);
        let wakes_reserve = result.is_err() || (lines.queue.is_empty() && has_reserve);
        drop(lines);
        if wakes_reserve {
            self.reserve_work.notify_one();
        }
        let path = self.path.display();
        match result {
            Ok(()) if had_failed || was_hanging => {
                tracing::info!(file.path = %path, "audit log is writable again");
            }
            Ok(()) => {}
            Err(error) => {
                self.metrics.audit_failures.inc();
                if !had_failed {
                    tracing::error!(file.path = %path, exception.message = %error, "audit log write failed; risk-increasing requests are refused until a write succeeds");
                }
            }
        }
    }

    /// The thread that writes the reserve file: copies waiting lines while the audit file cannot be written, and clears the
    /// reserve file once all lines are in the audit file.
    fn write_reserve(&self, mut reserve: Reserve) {
        let mut batch = String::new();
        loop {
            let mut lines = self.lines.lock();
            let upto = loop {
                if lines.queue.is_empty() && reserve.is_used() {
                    break None;
                }
                if lines.is_closing {
                    return;
                }
                if lines.is_impaired() && lines.in_reserve < lines.next {
                    break Some(lines.copy_unreserved(&mut batch));
                }
                lines = wait_for(&self.reserve_work, lines, RETRY_EVERY).0;
                if lines.hangs() && !lines.hang_is_logged {
                    drop(lines);
                    self.report_hang();
                    lines = self.lines.lock();
                }
            };
            let had_failed = matches!(lines.reserve, ReserveState::Failed(_));
            lines.reserve = ReserveState::WritingSince(Instant::now());
            drop(lines);
            let written = match upto {
                Some(_) => reserve.append(&batch),
                None => self.sync_file().and_then(|()| reserve.clear()),
            };
            let mut lines = self.lines.lock();
            if let Some(upto) = upto {
                let replied = if written.is_ok() { upto } else { lines.next };
                lines.reply_unreserved(replied);
                if written.is_ok() {
                    lines.in_reserve = upto;
                }
            }
            match written {
                Ok(()) if upto.is_some() => {
                    // New lines do not wait for the disk: they are in memory, and are copied next.
                    lines.reserve = ReserveState::Flushing;
                    drop(lines);
                    reserve.sync();
                    self.lines.lock().reserve = ReserveState::Holding;
                }
                Ok(()) => lines.reserve = ReserveState::Empty,
                Err(error) => {
                    lines.reserve = ReserveState::Failed(error.to_string());
                    let is_closing = lines.is_closing;
                    drop(lines);
                    if !had_failed {
                        self.metrics.audit_failures.inc();
                        tracing::error!(exception.message = %error, "audit reserve cannot be written; audit lines wait in memory");
                    }
                    if is_closing {
                        return;
                    }
                    // Whatever is queued meanwhile, so that a broken reserve costs little.
                    std::thread::sleep(RETRY_EVERY);
                }
            }
        }
    }

    /// Flushes the audit file, unless it is a device or a pipe.
    fn sync_file(&self) -> io::Result<()> {
        match self.current_file()?.sync_data() {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            synced => synced,
        }
    }
}

impl Lines {
    fn push(&mut self, text: String, kind: Kind, reply: Option<oneshot::Sender<io::Result<()>>>) {
        self.bytes += text.len();
        self.next += 1;
        self.queue.push_back(Line { text, kind, reply });
    }

    /// Removes the first line, which is in the file now.
    fn pop(&mut self) {
        if let Some(mut line) = self.queue.pop_front() {
            self.bytes -= line.text.len();
            line.reply(Ok(()));
        }
        self.in_reserve = self.in_reserve.max(self.first());
    }

    /// Copies lines that are not in the reserve file to `batch`; returns the number after the last one.
    fn copy_unreserved(&self, batch: &mut String) -> u64 {
        batch.clear();
        let mut upto = self.in_reserve.max(self.first());
        let reserved = usize::try_from(upto - self.first()).unwrap_or(usize::MAX);
        for line in self.queue.iter().skip(reserved) {
            if !batch.is_empty() && batch.len() + line.text.len() > BATCH {
                break;
            }
            batch.push_str(&line.text);
            upto += 1;
        }
        upto
    }

    /// Replies to those who wait for lines before number `upto` that were not in the reserve file before.
    fn reply_unreserved(&mut self, upto: u64) {
        let first = self.first();
        let reserved = usize::try_from(self.in_reserve.saturating_sub(first)).unwrap_or(usize::MAX);
        for (number, line) in (first..).zip(&mut self.queue).skip(reserved) {
            if number >= upto {
                break;
            }
            if line.kind != Kind::RiskIncreasing {
                line.reply(Ok(()));
            }
        }
    }

    /// The number of the first line in the queue.
    fn first(&self) -> u64 {
        self.next - self.queue.len() as u64
    }

    fn has_room(&self, text: &str, kind: Kind) -> bool {
        let limit = match kind {
            Kind::Essential => self.limit,
            Kind::RiskIncreasing | Kind::Other => self.limit / 2,
        };
        self.bytes + text.len() <= limit
    }

    /// Whether a write has taken too long.
    fn hangs(&self) -> bool {
        self.writing_since
            .is_some_and(|since| since.elapsed() >= HANGS_AFTER)
    }

    /// Whether lines cannot be written to the file now.
    fn is_impaired(&self) -> bool {
        self.failure.is_some() || self.hangs()
    }

    /// Whether lines can be expected to reach the reserve file soon.
    fn reserve_works(&self) -> bool {
        match self.reserve {
            ReserveState::Missing | ReserveState::Flushing | ReserveState::Failed(_) => false,
            ReserveState::Empty | ReserveState::Holding => true,
            ReserveState::WritingSince(since) => since.elapsed() < HANGS_AFTER,
        }
    }
}

impl Line {
    fn reply(&mut self, result: io::Result<()>) {
        if let Some(reply) = self.reply.take() {
            // The call may have ended meanwhile.
            let _ = reply.send(result);
        }
    }
}

/// The same error once more, for another request.
fn copy(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

fn wait<'a>(signal: &Condvar, lines: MutexGuard<'a, Lines>) -> MutexGuard<'a, Lines> {
    signal.wait(lines).unwrap_or_else(PoisonError::into_inner)
}

/// Returns also whether the time has passed.
fn wait_for<'a>(
    signal: &Condvar,
    lines: MutexGuard<'a, Lines>,
    within: Duration,
) -> (MutexGuard<'a, Lines>, bool) {
    let waited = signal.wait_timeout(lines, within);
    let (lines, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
    (lines, timeout.timed_out())
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, PipeWriter, Read, Write};
    use std::os::fd::AsRawFd;

    use super::*;

    const LIMIT: usize = 100_000;

    /// A writer whose file is a pipe, filled so that its writes hang until someone reads.
    struct Hanging {
        writer: Arc<Writer>,
        reader: PipeReader,
        _ours: PipeWriter,
    }

    impl Hanging {
        fn open() -> Self {
            let (reader, mut ours) = std::io::pipe().unwrap();
            let path = format!("/proc/self/fd/{}", ours.as_raw_fd());
            let clock = Arc::new(Clock::system());
            let run = "run".to_owned();
            let writer = Writer::open(Path::new(&path), LIMIT, run, clock, Arc::default()).unwrap();
            ours.write_all(&vec![b'\n'; 65536]).unwrap();
            Self {
                writer,
                reader,
                _ours: ours,
            }
        }

        fn push(&self, kind: Kind, text: &str) -> io::Result<Queued> {
            self.writer.push(kind, |_| Ok(text.to_owned()))
        }

        /// Waits until a write has hung for long enough.
        async fn until_it_hangs(&self) {
            let first = self.push(Kind::Essential, "first").unwrap();
            drop(first.wait(HANGS_AFTER).await);
            let hangs = async {
                while !self.writer.lines.lock().hangs() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            timeout(Duration::from_secs(20), hangs).await.unwrap();
            self.writer.report_hang();
        }

        /// Reads this many lines.
        fn lines(&mut self, count: usize) -> Vec<String> {
            let (mut text, mut bytes) = (String::new(), vec![0; 65536]);
            let lines = |text: &str| -> Vec<String> {
                let lines = text
                    .split_inclusive('\n')
                    .filter(|line| line.ends_with('\n'));
                let lines = lines.map(|line| line.trim_end().to_owned());
                lines.filter(|line| !line.is_empty()).collect()
            };
            while lines(&text).len() < count {
                let read = self.reader.read(&mut bytes).unwrap();
                text += str::from_utf8(&bytes[..read]).unwrap();
            }
            lines(&text)
        }
    }

    impl Drop for Hanging {
        fn drop(&mut self) {
            self.writer.close();
        }
    }

    #[tokio::test]
    async fn while_a_write_hangs_only_risk_increasing_lines_are_refused_and_order_is_kept() {
        let mut hanging = Hanging::open();
        hanging.until_it_hangs().await;
        let refused = hanging.push(Kind::RiskIncreasing, "order").unwrap_err();
        assert_eq!(refused.to_string(), "a write to it hangs");
        for (kind, text) in [(Kind::Essential, "second"), (Kind::Other, "third")] {
            let queued = hanging.push(kind, text).unwrap();
            // There is no reserve, so the line is only in memory, and there is nothing to wait for.
            assert!(queued.result.is_none());
        }
        assert_eq!(hanging.writer.waiting(), 3);
        assert_eq!(hanging.lines(3), ["first", "second", "third"]);
        let order = hanging.push(Kind::RiskIncreasing, "order").unwrap();
        assert!(matches!(order.wait(20 * HANGS_AFTER).await, Waited::Kept));
        assert_eq!(hanging.lines(1), ["order"]);
        assert_eq!(
            (hanging.writer.failure(), hanging.writer.waiting()),
            (None, 0)
        );
    }

    #[tokio::test]
    async fn reads_and_refusals_use_half_of_the_queue_and_lines_that_do_not_fit_are_counted() {
        let mut hanging = Hanging::open();
        hanging.until_it_hangs().await;
        let line = "x".repeat(999);
        let fill = |kind| {
            (0..200)
                .filter(|_| hanging.push(kind, &line).is_ok())
                .count()
        };
        assert_eq!(fill(Kind::Other), 49);
        let before = hanging.writer.metrics.audit_failures.get();
        hanging.push(Kind::Other, &line).unwrap_err();
        assert_eq!(hanging.writer.metrics.audit_failures.get(), before + 1);
        assert_eq!(fill(Kind::Essential), 50);
        assert_eq!(hanging.lines(100).len(), 100);
    }

    #[tokio::test]
    async fn hanging_lines_are_kept_in_the_reserve_until_the_file_has_them() {
        let mut hanging = Hanging::open();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.reserve");
        hanging.writer.use_reserve(&path, 8192).unwrap();
        hanging.until_it_hangs().await;
        let second = hanging.push(Kind::Essential, "{}").unwrap();
        assert!(matches!(second.wait(20 * HANGS_AFTER).await, Waited::Kept));
        let is_copied = async {
            while !std::fs::read(&path).unwrap().starts_with(b"first\n{}\n\0") {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(20), is_copied).await.unwrap();
        // Beyond the size of the reserve, lines are only in memory.
        let long = hanging.push(Kind::Essential, &"x".repeat(9000)).unwrap();
        assert!(matches!(long.wait(20 * HANGS_AFTER).await, Waited::Kept));
        let is_full = async {
            while hanging.writer.reserve_failure().is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(20), is_full).await.unwrap();
        let failure = hanging.writer.reserve_failure();
        assert!(failure.is_none_or(|failure| failure.starts_with("it is full (8192 bytes")));
        assert_eq!(hanging.lines(3)[..2], ["first", "{}"]);
        let is_empty = async {
            while std::fs::read(&path).unwrap()[0] != 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(20), is_empty).await.unwrap();
    }

    #[tokio::test]
    async fn nearly_full_file_system_refuses_risk_increasing_lines_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let clock = Arc::new(Clock::system());
        let run = "run".to_owned();
        let writer = Writer::open(&path, LIMIT, run, clock, Arc::default()).unwrap();
        let total = 10 * LEAST_FREE;
        let push = |kind| writer.push(kind, |_| Ok("{}".to_owned()));
        writer.set_space(Space {
            free: LEAST_FREE,
            total,
        });
        drop(push(Kind::RiskIncreasing).unwrap());
        assert!(writer.space().unwrap().is_nearly_full());
        writer.set_space(Space {
            free: LEAST_FREE - 1,
            total,
        });
        let refused = push(Kind::RiskIncreasing).unwrap_err();
        let expected = "its file system has only 63 MiB of free space, expected at least 64 MiB";
        assert_eq!(refused.to_string(), expected);
        assert!(writer.failure().unwrap().ends_with(expected));
        drop(push(Kind::Essential).unwrap());
        writer.set_space(Space {
            free: 2 * LEAST_FREE,
            total,
        });
        assert!(!writer.space().unwrap().is_nearly_full());
        drop(push(Kind::RiskIncreasing).unwrap());
        writer.close();
    }
}
