//! The audit log: who sent which request, and how it ended. A JSON line, `intent`, before a request is sent, and a line,
//! `outcome`, after.
//!
//! If the intent cannot be written, a risk-increasing request is refused; any other is sent, and its line goes to the log.
//! Lines hold digests and masked targets, never bodies, secrets or signatures.

use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};

use crate::base::ids::{AccountId, BotId, KeyName, Principal, RequestId, hex};
use crate::base::lock::Mutex;
use crate::base::outcome::{Outcome, Reason};
use crate::base::text::{MAX_CHARS, clean, clean_json};
use crate::clock::Clock;
use crate::kucoin::{Scope, UnsignedRequest};
use crate::policy::Permit;
use crate::telemetry::Metrics;

/// How often written lines are flushed to the disk; a power cut can lose the lines of this long.
const SYNC_EVERY: Duration = Duration::from_millis(500);

/// `clientOid`s in a line. A batch has at most 20 orders; the limit bounds the length of a line.
const MAX_CLIENT_OIDS: usize = 100;

/// Characters of the target in the line of a denied call.
const MAX_DENIED_TARGET: usize = 512;

/// `clientOid`s in the line of a denied call.
const MAX_DENIED_OIDS: usize = 5;

/// Characters of each `clientOid` in a line; KuCoin accepts 40.
const MAX_CLIENT_OID_CHARS: usize = 64;

/// Upper bound for the length of a line. The longest lines have [`MAX_CLIENT_OIDS`] ids and a target of a few kilobytes.
const MAX_LINE_BYTES: u64 = 128 * 1024;

/// The audit log.
#[derive(Debug)]
pub(crate) struct Audit {
    path: PathBuf,
    file: Mutex<Appender>,
    clock: Arc<Clock>,
    metrics: Arc<Metrics>,
}

/// Proof that the intent of a request was recorded: in the audit log, or, if that cannot be written and the request is not
/// risk-increasing, in the log.
#[derive(Debug)]
#[must_use = "sending a request requires it"]
pub(crate) struct Recorded(());

/// The intent of a risk-increasing request could not be written.
#[derive(Debug, thiserror::Error)]
#[error(
    "the audit log cannot be written, and risk-increasing requests are refused until it can be; nothing was sent"
)]
pub(crate) struct AuditError(#[source] io::Error);

/// Who called, and on which account: the fields that every line of a call has.
#[derive(Clone, Debug)]
pub(crate) struct CallContext<'a> {
    /// The bot, the admin, or the broker itself.
    pub(crate) principal: &'a Principal,
    /// The request id. Bots choose it, and it may repeat.
    pub(crate) request_id: &'a RequestId,
    /// The number of the call in this run.
    pub(crate) call: u64,
    /// The account and scope; `None` if the request is malformed.
    pub(crate) account_and_scope: Option<(&'a AccountId, Scope)>,
}

/// How a call ended: the fields for it in a line.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct CallEnd<'a> {
    /// The outcome.
    pub(crate) outcome: Option<Outcome>,
    /// Why it failed; `None` if the exchange answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<Reason>,
    /// The error message that the bot got.
    #[serde(serialize_with = "cleaned", skip_serializing_if = "Option::is_none")]
    pub(crate) detail: Option<String>,
    /// HTTP status of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) http_status: Option<u16>,
    /// `code` of the answer, sanitized and truncated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) code: Option<Cow<'a, str>>,
    /// The timestamp that was signed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) timestamp_ms: Option<i64>,
    /// From the arrival of the call to this line.
    pub(crate) duration_us: u64,
}

/// Version of the line format (`v`): incremented when a field is renamed, removed or changes its meaning.
const VERSION: u8 = 1;

/// A line of a call. Its fields are written in this order.
#[derive(Serialize)]
struct Line<'a> {
    v: u8,
    event: &'static str,
    time_ms: i64,
    run: &'a str,
    call: u64,
    request_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    bot: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    principal: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    account: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<&'a str>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    request: Option<AuditedRequest<'a>>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    ending: Option<&'a CallEnd<'a>>,
}

/// An action of an admin, or a change of a key in Vault.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Act<'a> {
    /// The action: the name of the admin's call, or `key` for a change of a key.
    pub(crate) action: &'static str,
    /// The account.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) account: Option<&'a AccountId>,
    /// The name of the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<&'a KeyName>,
    /// The bot that the action is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target_bot: Option<&'a BotId>,
    /// The previously active key version in Vault.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) version_before: Option<u64>,
    /// The key version that was found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) version_after: Option<u64>,
    /// SHA-256 of the id of the previously active key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key_before: Option<String>,
    /// SHA-256 of the id of the key that was found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key_after: Option<String>,
    /// `done` or `failed`; for a key `activated`, `rejected` or `removed`.
    pub(crate) outcome: &'static str,
    /// The cause, or further information.
    #[serde(serialize_with = "cleaned", skip_serializing_if = "Option::is_none")]
    pub(crate) detail: Option<String>,
}

impl<'a> Act<'a> {
    /// An action on an account.
    pub(crate) fn on_account(action: &'static str, account: &'a AccountId) -> Self {
        Self {
            action,
            account: Some(account),
            ..Self::default()
        }
    }

    /// An action on a bot.
    pub(crate) fn on_bot(action: &'static str, bot: &'a BotId) -> Self {
        Self {
            action,
            target_bot: Some(bot),
            ..Self::default()
        }
    }
}

/// The line of an action.
#[derive(Serialize)]
struct ActLine<'a> {
    v: u8,
    event: &'static str,
    time_ms: i64,
    run: &'a str,
    principal: &'a str,
    #[serde(flatten)]
    act: &'a Act<'a>,
}

/// A change of a file that the broker reads. Who changed it is unknown.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    /// The changed file or files.
    pub(crate) file: &'static str,
    /// SHA-256 of the previous content in use; `None` at the start.
    pub(crate) before: Option<&'a [u8; 32]>,
    /// SHA-256 of the new content.
    pub(crate) after: &'a [u8; 32],
    /// `loaded` at the start; later `reloaded` if the broker uses the new content, `rejected` if it does not.
    pub(crate) outcome: &'static str,
    /// Why it was refused.
    pub(crate) detail: Option<String>,
}

/// The line of a change.
#[derive(Serialize)]
struct ChangeLine<'a> {
    v: u8,
    event: &'static str,
    time_ms: i64,
    run: &'a str,
    principal: &'static str,
    file: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256_before: Option<String>,
    sha256_after: String,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<Cow<'a, str>>,
}

/// The line that marks the previous one as incomplete.
#[derive(Serialize)]
struct TornLine<'a> {
    v: u8,
    event: &'static str,
    time_ms: i64,
    run: &'a str,
    detail: &'static str,
}

/// The fields of a request in a line.
#[derive(Serialize)]
struct AuditedRequest<'a> {
    method: &'static str,
    target: String,
    body_bytes: usize,
    body_sha256: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    client_oids: Vec<&'a str>,
}

impl Audit {
    /// Opens the file for appending, creates it if it is missing, and starts a thread that flushes it.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(crate) fn open(
        path: &Path,
        clock: Arc<Clock>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Arc<Self>> {
        let appender = Appender::new(open(path)?)?;
        let run = format!("{:08x}", fastrand::u32(..));
        let audit = Arc::new(Self {
            path: path.to_owned(),
            file: Mutex::new(Appender { run, ..appender }),
            clock,
            metrics,
        });
        let alive = Arc::downgrade(&audit);
        std::thread::Builder::new()
            .name("audit-sync".to_owned())
            .spawn(move || {
                while let Some(audit) = alive.upgrade() {
                    audit.reopen_if_rotated();
                    audit.sync();
                    drop(audit);
                    std::thread::sleep(SYNC_EVERY);
                }
            })?;
        Ok(audit)
    }

    /// Records that a request is about to be sent.
    ///
    /// # Errors
    /// When the line cannot be written and the request is risk-increasing. The line of any other request goes to the log.
    pub(crate) fn intent(
        &self,
        caller: &CallContext<'_>,
        permit: &Permit,
        request: &UnsignedRequest,
    ) -> Result<Recorded, AuditError> {
        let client_oid_in_path = permit
            .endpoint()
            .and_then(|e| e.path_parameter("clientOid", request.target.path()));
        let audited = AuditedRequest::new(request, client_oid_in_path);
        match self.write(
            "intent",
            caller,
            Some(permit.endpoint_id()),
            Some(audited),
            None,
        ) {
            Err(error) if permit.increases_risk() => Err(AuditError(error)),
            _ => Ok(Recorded(())),
        }
    }

    /// Records a call that was refused before its intent was recorded, such as one that the rules deny or a malformed one.
    pub(crate) fn denied(
        &self,
        caller: &CallContext<'_>,
        request: Option<&UnsignedRequest>,
        ending: &CallEnd<'_>,
    ) {
        let audited = request.map(|request| {
            let mut audited = AuditedRequest::new(request, None);
            // A denied caller must not fill the disk with long requests.
            audited.target = cut(&audited.target, MAX_DENIED_TARGET).to_owned();
            audited.client_oids.truncate(MAX_DENIED_OIDS);
            audited
        });
        // The call is denied even if its line cannot be written; `append` has then logged the line.
        let _ = self.write("denied", caller, None, audited, Some(ending));
    }

    /// Records how a call ended, as reported to the caller.
    pub(crate) fn outcome(&self, caller: &CallContext<'_>, endpoint: &str, ending: &CallEnd<'_>) {
        let _ = self.write("outcome", caller, Some(endpoint), None, Some(ending));
    }

    /// Records the late result of a request whose caller has already got `maybe_sent`.
    pub(crate) fn late_answer(
        &self,
        caller: &CallContext<'_>,
        endpoint: &str,
        ending: &CallEnd<'_>,
    ) {
        let _ = self.write("late_answer", caller, Some(endpoint), None, Some(ending));
    }

    /// Records a change of a file. A failure to record it does not undo the change.
    pub(crate) fn changed(&self, change: &Change<'_>) {
        let mut file = self.file.lock();
        let line = ChangeLine {
            v: VERSION,
            event: "change",
            time_ms: self.clock.wall_ms(),
            run: &file.run,
            principal: "file",
            file: change.file,
            sha256_before: change.before.map(|digest| hex(digest)),
            sha256_after: hex(change.after),
            outcome: change.outcome,
            detail: change.detail.as_ref().map(|text| clean(text, MAX_CHARS)),
        };
        let text = serde_json::to_string(&line);
        // `append` has logged a line that it could not write.
        let _ = text
            .map_err(io::Error::from)
            .and_then(|text| self.append(&mut file, text));
    }

    /// Records an action of `principal`: an admin's name, or `vault`. A failure to record it does not undo the action.
    pub(crate) fn record_action(&self, principal: &str, act: &Act<'_>) {
        let mut file = self.file.lock();
        let line = ActLine {
            v: VERSION,
            event: "act",
            time_ms: self.clock.wall_ms(),
            run: &file.run,
            principal,
            act,
        };
        let text = serde_json::to_string(&line);
        // `append` has logged a line that it could not write.
        let _ = text
            .map_err(io::Error::from)
            .and_then(|text| self.append(&mut file, text));
    }

    /// Flushes the file to the disk. Others can write lines meanwhile.
    pub(crate) fn sync(&self) {
        self.report_sync(self.current_file().and_then(|file| file.sync_data()));
    }

    /// Why the last line could not be written; `None` if it was.
    pub(crate) fn failure(&self) -> Option<String> {
        let file = self.file.lock();
        let failure = file.failure.as_ref()?;
        Some(format!(
            "{} cannot be written: {failure}",
            self.path.display()
        ))
    }

    /// Opens a new file if the current one was renamed or removed, for example by log rotation. Files are checked, opened and
    /// flushed without the lock, so that no line waits for a slow disk.
    fn reopen_if_rotated(&self) {
        let Ok(current) = self.current_file().and_then(|file| file.metadata()) else {
            return;
        };
        let is_unchanged = std::fs::metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (current.dev(), current.ino()));
        if is_unchanged || !current.is_file() {
            return;
        }
        match open(&self.path).and_then(Appender::new) {
            Ok(mut new) => {
                let old = {
                    let mut file = self.file.lock();
                    // The next line goes to the new file, so an incomplete line of the old one must be completed now.
                    let _ = file.complete(&self.clock);
                    new.run = std::mem::take(&mut file.run);
                    std::mem::replace(&mut *file, new)
                };
                tracing::info!(file.path = %self.path.display(), "audit log rotated; reopened");
                self.report_sync(old.file.sync_data());
            }
            Err(error) => {
                self.metrics.audit_failures.inc();
                tracing::error!(file.path = %self.path.display(), exception.message = %error, "audit log rotated, but reopening it failed; writing to the old file");
            }
        }
    }

    fn current_file(&self) -> io::Result<File> {
        let file = self.file.lock();
        file.file.try_clone()
    }

    /// Logs a failed flush. The system reports lost data only once, in this result; later writes succeed.
    fn report_sync(&self, synced: io::Result<()>) {
        match synced {
            // Devices and pipes cannot be flushed.
            Err(error) if error.kind() != io::ErrorKind::InvalidInput => {
                self.metrics.audit_failures.inc();
                tracing::error!(exception.message = %error, "audit log flush failed; lines may be lost");
            }
            _ => {}
        }
    }

    fn write(
        &self,
        event: &'static str,
        caller: &CallContext<'_>,
        endpoint: Option<&str>,
        request: Option<AuditedRequest<'_>>,
        ending: Option<&CallEnd<'_>>,
    ) -> io::Result<()> {
        let mut file = self.file.lock();
        let line = Line {
            v: VERSION,
            event,
            time_ms: self.clock.wall_ms(),
            run: &file.run,
            call: caller.call,
            request_id: caller.request_id.as_str(),
            bot: caller.principal.bot().map(BotId::as_str),
            principal: caller.principal.other(),
            account: caller
                .account_and_scope
                .map(|(account, _)| account.as_str()),
            scope: caller.account_and_scope.map(|(_, scope)| scope.as_str()),
            endpoint,
            request,
            ending,
        };
        let text = serde_json::to_string(&line)?;
        self.append(&mut file, text)
    }

    fn append(&self, file: &mut Appender, text: String) -> io::Result<()> {
        let mut text = match clean_json(&text) {
            Cow::Borrowed(_) => text,
            Cow::Owned(cleaned) => cleaned,
        };
        text.push('\n');
        let result = file.append(&text, &self.clock);
        match &result {
            Ok(()) => {
                if file.failure.take().is_some() {
                    tracing::info!(file.path = %self.path.display(), "audit log is writable again");
                }
            }
            Err(error) => {
                file.failure = Some(error.to_string());
                self.metrics.audit_failures.inc();
                tracing::error!(target: "credbroker::audit", line = text.trim_end(), file.path = %self.path.display(), exception.message = %error, "audit log write failed");
            }
        }
        result
    }
}

impl<'a> AuditedRequest<'a> {
    fn new(request: &'a UnsignedRequest, client_oid_in_path: Option<&'a str>) -> Self {
        let in_query = request
            .target
            .query()
            .iter()
            .filter(|(name, _)| matches!(name.as_str(), "clientOid" | "clientOrderId"))
            .map(|(_, value)| value.as_str());
        let in_body = request.body_client_oids.iter().map(String::as_str);
        Self {
            method: request.method.as_str(),
            target: request.target.masked(),
            body_bytes: request.body.len(),
            body_sha256: hex(&Sha256::digest(&request.body)),
            client_oids: in_body
                .chain(in_query)
                .chain(client_oid_in_path)
                .take(MAX_CLIENT_OIDS)
                .map(|oid| cut(oid, MAX_CLIENT_OID_CHARS))
                .collect(),
        }
    }
}

fn cut(text: &str, chars: usize) -> &str {
    let end = text.char_indices().nth(chars).map(|(end, _)| end);
    end.and_then(|end| text.get(..end)).unwrap_or(text)
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// Serializes text from outside, sanitized and truncated.
#[expect(clippy::ref_option, reason = "serde requires this signature")]
fn cleaned<S: Serializer>(text: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    let text = text.as_ref().map(|text| clean(text, MAX_CHARS));
    text.serialize(serializer)
}

/// Appends complete lines to a file.
#[derive(Debug)]
struct Appender {
    file: File,
    run: String,
    /// Whether the file ends in an incomplete line.
    torn: bool,
    /// Why the last line could not be written.
    failure: Option<String>,
}

impl Appender {
    fn new(file: File) -> io::Result<Self> {
        // A crash can leave an incomplete line. Devices have no end to read.
        let torn = !file.metadata()?.file_type().is_char_device() && !unfinished(&file)?.is_empty();
        Ok(Self {
            file,
            run: String::new(),
            torn,
            failure: None,
        })
    }

    /// Appends `line`, which ends with a line feed. Completes an incomplete line first.
    fn append(&mut self, line: &str, clock: &Clock) -> io::Result<()> {
        self.complete(clock)?;
        self.write(line.as_bytes())
    }

    /// Completes an incomplete line, so that it parses and has `"torn":true`, and adds a line that explains it.
    fn complete(&mut self, clock: &Clock) -> io::Result<()> {
        if !self.torn {
            return Ok(());
        }
        // Read again, because `doctor` may have completed the line meanwhile.
        let unfinished = unfinished(&self.file)?;
        if unfinished.is_empty() {
            self.torn = false;
            return Ok(());
        }
        let (mut rest, detail) = match rest_of_line(&unfinished) {
            Some(rest) => (
                rest,
                "the previous line was cut off by a full disk or a crash; if it is an intent, look the order up",
            ),
            None => (
                Vec::new(),
                "the previous line is damaged and is not JSON; inspect it in an editor",
            ),
        };
        let marker = serde_json::to_string(&TornLine {
            v: VERSION,
            event: "torn",
            time_ms: clock.wall_ms(),
            run: &self.run,
            detail,
        })?;
        rest.push(b'\n');
        rest.extend(marker.as_bytes());
        rest.push(b'\n');
        self.write(&rest)
    }

    /// Writes bytes that end with a line feed.
    fn write(&mut self, mut rest: &[u8]) -> io::Result<()> {
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    let (done, left) = rest.split_at_checked(written).unwrap_or((rest, &[]));
                    self.torn = !done.ends_with(b"\n");
                    rest = left;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The bytes after the last line feed of a file.
fn unfinished(mut file: &File) -> io::Result<Vec<u8>> {
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length.saturating_sub(MAX_LINE_BYTES)))?;
    let mut end = Vec::new();
    file.take(MAX_LINE_BYTES).read_to_end(&mut end)?;
    if let Some(line_feed) = end.iter().rposition(|byte| *byte == b'\n') {
        end.drain(..=line_feed);
    }
    Ok(end)
}

/// The bytes that complete a line, cut off at any byte, to a JSON object with `"torn":true`. Empty for a complete object;
/// `None` if the line is not the start of an object.
fn rest_of_line(line: &[u8]) -> Option<Vec<u8>> {
    /// Endings that complete a truncated UTF-8 character (RFC 3629, section 4).
    const CHARACTER_ENDS: [&[u8]; 6] = [
        b"",
        b"\x80",
        b"\x80\x80",
        b"\x80\x80\x80",
        b"\xa0\x80",
        b"\x90\x80\x80",
    ];
    /// Endings that complete a truncated value, or a name and its value; the last ones are for `null`, `true` and `false`.
    const VALUE_ENDS: [&str; 16] = [
        "", "\"", "\":0", ":0", "0", "\\\"", "0000\"", "ull", "ll", "l", "rue", "ue", "e", "alse",
        "lse", "se",
    ];
    let is_object = |text: &[u8]| serde_json::from_slice::<serde_json::Map<_, _>>(text).is_ok();
    if is_object(line) {
        return Some(Vec::new());
    }
    let (mut open, mut in_string, mut escaped) = (Vec::new(), false, false);
    for byte in line {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' if !in_string => open.push(b'}'),
            b'[' if !in_string => open.push(b']'),
            b'}' | b']' if !in_string => {
                open.pop();
            }
            _ => {}
        }
    }
    // The outermost brace is in `mark`.
    let inner = open.get(1..)?.iter().rev();
    for character in CHARACTER_ENDS {
        for value in VALUE_ENDS {
            for mark in [",\"torn\":true}", "\"torn\":true}"] {
                let mut rest = character.to_vec();
                rest.extend(value.as_bytes());
                rest.extend(inner.clone());
                rest.extend(mark.as_bytes());
                if is_object(&[line, &rest].concat()) {
                    return Some(rest);
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes one `denied` line to a file that ends with `end`; returns all lines.
    fn lines_after(end: &[u8]) -> Vec<serde_json::Value> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let before: &[u8] = b"{\"event\":\"act\"}\n";
        std::fs::write(&path, [before, end].concat()).unwrap();
        let audit = Audit::open(&path, Arc::new(Clock::system()), Arc::default()).unwrap();
        let (principal, request_id) = (Principal::Bot("b".parse().unwrap()), "r".parse().unwrap());
        let caller = CallContext {
            principal: &principal,
            request_id: &request_id,
            call: 1,
            account_and_scope: None,
        };
        audit.denied(
            &caller,
            None,
            &CallEnd {
                reason: Some(Reason::PolicyDenied),
                ..CallEnd::default()
            },
        );
        let text = std::fs::read(&path).unwrap();
        assert!(
            text.starts_with(&[before, end].concat()),
            "existing bytes were changed"
        );
        assert!(text.ends_with(b"\n"));
        let lines = text
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty());
        lines
            .map(|line| serde_json::from_slice(line).unwrap_or_default())
            .collect()
    }

    #[test]
    fn every_line_parses_after_one_was_cut_off_at_any_byte() {
        let line = r#"{"event":"intent","time_ms":-1792,"run":"5f","call":7,"bot":"spiffe://a/bot/ä€😀ࠀ","is":[true,false,null],"client_oids":["a\"\\b","c\u00e9"],"nested":{"x":[]}}"#;
        for end in 1..line.len() {
            let lines = lines_after(&line.as_bytes()[..end]);
            let [_, torn, marker, next] = lines.as_slice() else {
                panic!("{end}: {lines:?}")
            };
            assert_eq!(torn["torn"], true, "{end}: {torn}");
            assert_eq!(marker["event"], "torn");
            let detail = marker["detail"].as_str().unwrap();
            assert!(detail.contains("look the order up") && !detail.contains("not sent"));
            assert_eq!(next["reason"], "POLICY_DENIED");
        }
    }

    #[test]
    fn complete_line_without_a_line_feed_is_kept_as_it_is() {
        let lines = lines_after(br#"{"event":"intent","call":7}"#);
        assert_eq!(lines[1], serde_json::json!({"event": "intent", "call": 7}));
        assert_eq!((&lines[2]["event"], lines.len()), (&"torn".into(), 4));
        assert_eq!(lines_after(b"").len(), 2);
    }

    #[test]
    fn damaged_line_is_marked_and_later_lines_are_kept() {
        for damaged in [&b"\0\0\0\0"[..], b"plain words", b"\xff{\"event", b"]"] {
            let lines = lines_after(damaged);
            assert_eq!(lines.len(), 4, "{damaged:?}");
            let detail = lines[2]["detail"].as_str().unwrap();
            assert!(detail.contains("damaged"), "{detail}");
            assert_eq!(lines[3]["reason"], "POLICY_DENIED");
        }
    }

    #[test]
    fn digest_of_an_empty_body_is_that_of_openssl() {
        // printf '' | openssl dgst -sha256
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(hex(&Sha256::digest(b"")), empty);
    }
}
