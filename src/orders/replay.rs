//! Reads the claims of earlier runs from the audit log: from the current file and from rotated ones beside it, also if they are
//! compressed with gzip.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use flate2::read::MultiGzDecoder;
use serde::{Deserialize, Serialize};

use super::guard::{ClaimKey, Guard, OrderState};
use super::{Orders, Readiness, seconds};
use crate::base::ids::{AccountId, Principal, RequestId};
use crate::base::state_file;
use crate::kucoin::{Catalog, Endpoint, Scope};

/// The longest line that is read; the broker's own are much shorter.
const LONGEST_LINE: u64 = 4 * 1024 * 1024;

/// The file's name in the state folder.
const FILE: &str = "orders.json";

/// Bytes at the end of the audit file that have its last line.
const LAST_BYTES: u64 = 256 * 1024;

/// How much later than expected the log may begin: the time of a slow start.
const GAP_TOLERANCE_MS: i64 = 60_000;

/// What the audit log had.
#[derive(Debug, Default)]
pub(crate) struct Replayed {
    /// Calls without a result: the broker ended before it had one.
    pub(crate) unresolved: Vec<Unresolved>,
    /// The time of the first line that was read, Unix milliseconds.
    first_ms: Option<i64>,
}

/// A call that changes something, and was sent or about to be sent when an earlier run ended.
#[derive(Clone, Debug)]
pub(crate) struct Unresolved {
    /// The run, and the number of the call in it.
    pub(crate) run: String,
    pub(crate) call: u64,
    pub(crate) principal: Principal,
    pub(crate) request_id: RequestId,
    pub(crate) account: AccountId,
    pub(crate) scope: Scope,
    pub(crate) endpoint: &'static str,
    pub(crate) client_oids: Vec<String>,
}

/// The content of [`FILE`].
#[derive(Deserialize, Serialize)]
struct State {
    /// The audit log reaches back to this time (Unix milliseconds), unless lines are missing.
    since_ms: i64,
}

/// The fields of a line that matter here.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(default)]
    time_ms: i64,
    #[serde(borrow, default)]
    run: Cow<'a, str>,
    #[serde(default)]
    call: u64,
    #[serde(borrow, default)]
    request_id: Cow<'a, str>,
    #[serde(borrow)]
    bot: Option<Cow<'a, str>>,
    #[serde(borrow)]
    account: Option<Cow<'a, str>>,
    #[serde(borrow)]
    scope: Option<Cow<'a, str>>,
    #[serde(borrow)]
    endpoint: Option<Cow<'a, str>>,
    #[serde(borrow)]
    uid: Option<Cow<'a, str>>,
    #[serde(borrow)]
    body_sha256: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    client_oids: Vec<Cow<'a, str>>,
    #[serde(borrow)]
    outcome: Option<Cow<'a, str>>,
}

/// A call whose result has not been read yet.
struct Open {
    keys: Vec<ClaimKey>,
    call: Unresolved,
    has_outcome: bool,
}

impl Orders {
    /// Reads the claims of earlier runs from the audit log; from then on orders can be placed, unless the log does not reach back
    /// far enough. Returns the calls that ended without a result.
    pub(crate) fn read_log(&self, audit_file: &Path, now_ms: i64) -> Vec<Unresolved> {
        let since_ms = since(&self.state_dir);
        let replayed = match self.replay(audit_file, since_ms, now_ms) {
            Ok(replayed) => replayed,
            Err(error) => {
                tracing::error!(file.path = %audit_file.display(), exception.message = %error, "cannot read from the audit log which clientOids were used; risk-increasing requests are refused; correct the cause and restart, or run `credbroker orders accept-gap`");
                *self.readiness.lock() = Readiness::Gap;
                return Vec::new();
            }
        };
        if self.readiness() == Readiness::Gap {
            tracing::error!(file.path = %audit_file.display(), "the audit log does not reach back far enough to know which clientOids were used; risk-increasing requests are refused; restore the rotated files beside it and restart, or run `credbroker orders accept-gap`");
        } else {
            let (count, _) = self.usage();
            tracing::info!(count, "clientOids of earlier runs read from the audit log");
        }
        let first_ms = replayed.first_ms.unwrap_or(now_ms);
        if since_ms.is_none()
            && let Err(error) = write_since(&self.state_dir, first_ms)
        {
            tracing::error!(exception.message = %error, "cannot write {FILE} in the state folder; a later start may not notice that audit lines are missing");
        }
        replayed.unresolved
    }

    /// Accepts that clientOids which were used before `now_ms` may be unknown. Returns whether orders were refused for that.
    ///
    /// # Errors
    /// When this cannot be saved: the next start finds the gap again.
    pub(crate) fn accept_gap(&self, now_ms: i64) -> io::Result<bool> {
        let mut readiness = self.readiness.lock();
        if *readiness != Readiness::Gap {
            return Ok(false);
        }
        *readiness = Readiness::Ready;
        drop(readiness);
        write_since(&self.state_dir, now_ms)?;
        Ok(true)
    }

    /// Reads the claims of earlier runs. `since_ms`: when this broker first started; the log must reach back to it, or for as
    /// long as claims are kept.
    ///
    /// # Errors
    /// When the audit log cannot be read. The claims stay unknown.
    fn replay(
        &self,
        audit_file: &Path,
        since_ms: Option<i64>,
        now_ms: i64,
    ) -> io::Result<Replayed> {
        let window_ms = i64::from(self.guard.lock().limits().window_s) * 1000;
        // If the system clock was set ahead, the last line shows that.
        let from_ms = last_time(audit_file)?.unwrap_or(now_ms).min(now_ms) - window_ms;
        let mut replayed = Replayed::default();
        let mut open = HashMap::new();
        for file in files(audit_file, from_ms)? {
            self.replay_file(&file, from_ms, &mut open, &mut replayed)?;
        }
        let mut guard = self.guard.lock();
        for call in open.into_values().filter(|call: &Open| !call.has_outcome) {
            for key in &call.keys {
                guard.set(*key, OrderState::MaybeSent, None);
            }
            replayed.unresolved.push(call.call);
        }
        drop(guard);
        let expected_ms = since_ms.map_or(i64::MIN, |since_ms| since_ms.max(from_ms));
        let begins_ms = replayed.first_ms.unwrap_or(i64::MAX);
        *self.readiness.lock() = match since_ms {
            Some(_) if begins_ms > expected_ms.saturating_add(GAP_TOLERANCE_MS) => Readiness::Gap,
            _ => Readiness::Ready,
        };
        Ok(replayed)
    }

    fn replay_file(
        &self,
        file: &Path,
        from_ms: i64,
        open: &mut HashMap<(String, u64), Open>,
        replayed: &mut Replayed,
    ) -> io::Result<()> {
        let mut reader = reader(file)?;
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let read = (&mut reader)
                .take(LONGEST_LINE)
                .read_until(b'\n', &mut bytes)?;
            if read == 0 {
                return Ok(());
            }
            // A line that was cut off, or is of another kind, has no claims.
            let Ok(line) = serde_json::from_slice::<Line>(&bytes) else {
                continue;
            };
            replayed.first_ms.get_or_insert(line.time_ms);
            if line.time_ms < from_ms {
                continue;
            }
            match line.event.as_ref() {
                "intent" => self.replay_intent(&line, open),
                "outcome" | "late_answer" | "resolved" => {
                    replay_result(&mut self.guard.lock(), &line, open);
                }
                _ => {}
            }
        }
    }

    fn replay_intent(&self, line: &Line<'_>, open: &mut HashMap<(String, u64), Open>) {
        let Some((call, endpoint)) = line.call() else {
            return;
        };
        let (account, scope) = (&call.account, call.scope);
        let places = endpoint.claims_client_oids();
        if let Some(uid) = line.uid.as_ref().filter(|_| places) {
            self.learn_uid(account, scope, uid);
        }
        let key = |oid: &String| match &line.uid {
            Some(uid) => self.hash.key("uid", uid, scope, oid),
            None => self.hash.key("account", account.as_str(), scope, oid),
        };
        let oids = call.client_oids.iter().filter(|_| places);
        let keys: Vec<_> = oids.map(key).collect();
        let digest = line.body_sha256.as_deref().and_then(|text| text.get(..16));
        let digest = digest.and_then(|digest| u64::from_str_radix(digest, 16).ok());
        if let Some(bot) = call.principal.bot() {
            let mut guard = self.guard.lock();
            for key in &keys {
                guard.restore(bot, *key, digest.unwrap_or(0), seconds(line.time_ms));
            }
        }
        let id = (call.run.clone(), call.call);
        let has_outcome = false;
        let call = Open {
            keys,
            call,
            has_outcome,
        };
        open.insert(id, call);
    }
}

impl Line<'_> {
    /// The call of an intent, if it changes something.
    fn call(&self) -> Option<(Unresolved, &'static Endpoint)> {
        let endpoint = Catalog::get().by_id(self.endpoint.as_deref()?)?;
        if endpoint.is_read() {
            return None;
        }
        let scope = self.scope.as_deref()?;
        let call = Unresolved {
            run: self.run.clone().into_owned(),
            call: self.call,
            principal: Principal::Bot(self.bot.as_deref()?.parse().ok()?),
            request_id: self.request_id.parse().ok()?,
            account: self.account.as_deref()?.parse().ok()?,
            scope: Scope::ALL
                .into_iter()
                .find(|known| known.as_str() == scope)?,
            endpoint: &endpoint.id,
            client_oids: self
                .client_oids
                .iter()
                .map(|oid| oid.clone().into_owned())
                .collect(),
        };
        Some((call, endpoint))
    }
}

fn replay_result(guard: &mut Guard, line: &Line<'_>, open: &mut HashMap<(String, u64), Open>) {
    let id = (line.run.clone().into_owned(), line.call);
    let Some(call) = open.get_mut(&id) else {
        return;
    };
    call.has_outcome = true;
    for key in &call.keys {
        match line.outcome.as_deref() {
            Some("accepted") => guard.set(*key, OrderState::Accepted, None),
            Some("not_sent" | "rejected") => guard.free(*key),
            _ => {}
        }
    }
    // A later line of the call can only have the result of a request that may have been sent.
    if line.outcome.as_deref() != Some("maybe_sent") {
        open.remove(&id);
    }
}

/// When this broker first started, or a gap was accepted; `None` if the file is missing. Unreadable: long ago.
fn since(state_dir: &Path) -> Option<i64> {
    match std::fs::read(state_dir.join(FILE)) {
        Ok(text) => Some(serde_json::from_slice(&text).map_or(0, |state: State| state.since_ms)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(_) => Some(0),
    }
}

fn write_since(state_dir: &Path, since_ms: i64) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(&State { since_ms })?;
    text.push(b'\n');
    state_file::replace(state_dir, FILE, &text)
}

/// The audit file and its rotated predecessors that have lines since `from_ms`, the oldest first.
fn files(audit_file: &Path, from_ms: i64) -> io::Result<Vec<PathBuf>> {
    let from = UNIX_EPOCH + Duration::from_millis(from_ms.max(0).unsigned_abs());
    let (Some(folder), Some(name)) = (audit_file.parent(), audit_file.file_name()) else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let is_ours = entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(name.as_encoded_bytes());
        if is_ours && metadata.is_file() && metadata.modified()? >= from {
            let path = entry.path();
            if let Some(first_ms) = first_time(&path)? {
                found.push((first_ms, path));
            }
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// The time of the first line of a file; `None` if it is not an audit log.
fn first_time(file: &Path) -> io::Result<Option<i64>> {
    let mut bytes = Vec::new();
    let read = reader(file)?
        .take(LONGEST_LINE)
        .read_until(b'\n', &mut bytes);
    // Such as a compressed file that is not complete yet.
    if read.is_err() {
        return Ok(None);
    }
    let line = serde_json::from_slice::<Line>(&bytes).ok();
    Ok(line.map(|line| line.time_ms))
}

/// The time of the last line of the audit file; `None` if it has none.
fn last_time(audit_file: &Path) -> io::Result<Option<i64>> {
    let mut file = match File::open(audit_file) {
        Ok(file) if file.metadata()?.is_file() => file,
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => return Ok(None),
    };
    let end = file.metadata()?.len();
    file.seek(SeekFrom::Start(end.saturating_sub(LAST_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let lines = bytes.rsplit(|byte| *byte == b'\n');
    let mut times = lines.filter_map(|line| serde_json::from_slice::<Line>(line).ok());
    Ok(times.next().map(|line| line.time_ms))
}

fn reader(file: &Path) -> io::Result<Box<dyn BufRead>> {
    let open = BufReader::with_capacity(256 * 1024, File::open(file)?);
    if file.extension() == Some(OsStr::new("gz")) {
        return Ok(Box::new(BufReader::with_capacity(
            256 * 1024,
            MultiGzDecoder::new(open),
        )));
    }
    Ok(Box::new(open))
}
