//! The record of who asked for what and how it ended: one JSON line before a request leaves, one after.
//!
//! A record, not a log: it holds digests and masked targets, never bodies, secrets or signatures.

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

/// How often written lines are flushed to the disk: what a power cut can take.
const SYNC_EVERY: Duration = Duration::from_millis(500);

/// A batch has 20 orders; more ids are no order, and a line has to be bounded.
const MAX_CLIENT_OIDS: usize = 100;

/// Characters of the target in the line of a call that was refused.
const MAX_DENIED_TARGET: usize = 512;

/// `clientOid`s in the line of a call that was refused.
const MAX_DENIED_OIDS: usize = 5;

/// KuCoin takes 40 characters.
const MAX_CLIENT_OID_CHARS: usize = 64;

/// No line is longer: the longest are orders of [`MAX_CLIENT_OIDS`], and targets of a few kilobytes.
const MAX_LINE_BYTES: u64 = 128 * 1024;

/// The audit file.
#[derive(Debug)]
pub(crate) struct Audit {
    path: PathBuf,
    file: Mutex<Appender>,
    clock: Arc<Clock>,
    metrics: Arc<Metrics>,
}

/// Proof that the intent of one request is in the audit log (or, unless it is risk-increasing, at least in the log).
#[derive(Debug)]
#[must_use = "nothing is sent without it"]
pub(crate) struct Recorded(());

/// The record could not be written.
#[derive(Debug, thiserror::Error)]
#[error("the audit log cannot be written; risk-increasing requests are refused until it can")]
pub(crate) struct AuditError(#[source] io::Error);

/// Who asked, in every line of a call.
#[derive(Clone, Debug)]
pub(crate) struct CallContext<'a> {
    /// The bot, or an admin, or the broker itself.
    pub(crate) who: &'a Principal,
    /// The call's name.
    pub(crate) request_id: &'a RequestId,
    /// This run's own name of the call; request ids are the bot's and may repeat.
    pub(crate) call: u64,
    /// On whose account and in which scope; unknown where the request is malformed.
    pub(crate) place: Option<(&'a AccountId, Scope)>,
}

/// How a call ended, as far as its lines tell.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Ending<'a> {
    /// What is known about the request.
    pub(crate) outcome: Option<Outcome>,
    /// Why it failed; none for an answer of the exchange.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<Reason>,
    /// What the bot was told beside the reason.
    #[serde(serialize_with = "cleaned", skip_serializing_if = "Option::is_none")]
    pub(crate) detail: Option<String>,
    /// HTTP status of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) http_status: Option<u16>,
    /// `code` of the answer, cleaned and cut.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) code: Option<Cow<'a, str>>,
    /// The timestamp that was signed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) timestamp_ms: Option<i64>,
    /// From the arrival of the call to this line.
    pub(crate) duration_us: u64,
}

/// Version of the format of a line (`v`): it grows when a field is renamed, removed or changes its meaning.
const VERSION: u8 = 1;

/// One line of the file. The order of its fields is the order in the file.
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
    who: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    account: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<&'a str>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    request: Option<AuditedRequest<'a>>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    ending: Option<&'a Ending<'a>>,
}

/// What an admin did, or what became of a key.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Act<'a> {
    /// What was done: the name of the call, or `key` where another key serves.
    pub(crate) action: &'static str,
    /// The account.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) account: Option<&'a AccountId>,
    /// The name of the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<&'a KeyName>,
    /// The bot it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) about_bot: Option<&'a BotId>,
    /// The version that served until now, as Vault counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) version_before: Option<u64>,
    /// The version that was found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) version_after: Option<u64>,
    /// SHA-256 of the id of the key that served until now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key_before: Option<String>,
    /// SHA-256 of the id of the key that was found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key_after: Option<String>,
    /// `done` or `failed`; of a key `in_use`, `refused` or `gone`.
    pub(crate) outcome: &'static str,
    /// Why, or what else is to be known.
    #[serde(serialize_with = "cleaned", skip_serializing_if = "Option::is_none")]
    pub(crate) detail: Option<String>,
}

impl<'a> Act<'a> {
    /// About an account.
    pub(crate) fn on_account(action: &'static str, account: &'a AccountId) -> Self {
        Self {
            action,
            account: Some(account),
            ..Self::default()
        }
    }

    /// About a bot.
    pub(crate) fn on_bot(action: &'static str, bot: &'a BotId) -> Self {
        Self {
            action,
            about_bot: Some(bot),
            ..Self::default()
        }
    }
}

/// An act as it stands in the file.
#[derive(Serialize)]
struct ActLine<'a> {
    v: u8,
    event: &'static str,
    time_ms: i64,
    run: &'a str,
    who: &'a str,
    #[serde(flatten)]
    act: &'a Act<'a>,
}

/// A change of a file that the broker reads, made by whoever can write the file.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    /// Which file or files.
    pub(crate) what: &'static str,
    /// SHA-256 of what was in force until now; none at the start.
    pub(crate) before: Option<&'a [u8; 32]>,
    /// SHA-256 of what was found.
    pub(crate) after: &'a [u8; 32],
    /// `in_force` at the start, `taken` or `refused` later.
    pub(crate) outcome: &'static str,
    /// Why it was refused.
    pub(crate) detail: Option<String>,
}

/// A change as it stands in the file.
#[derive(Serialize)]
struct ChangeLine<'a> {
    v: u8,
    event: &'static str,
    time_ms: i64,
    run: &'a str,
    who: &'static str,
    what: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256_before: Option<String>,
    sha256_after: String,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<Cow<'a, str>>,
}

/// Says that the line before it was cut off.
#[derive(Serialize)]
struct TornLine<'a> {
    v: u8,
    event: &'static str,
    time_ms: i64,
    run: &'a str,
    detail: &'static str,
}

/// What was asked.
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
    /// Opens the file for appending, makes it where it is missing, and flushes it in the background.
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
                    audit.follow();
                    audit.sync();
                    drop(audit);
                    std::thread::sleep(SYNC_EVERY);
                }
            })?;
        Ok(audit)
    }

    /// Records that a request is about to leave.
    ///
    /// # Errors
    /// When the line cannot be written and the request is risk-increasing; any other goes on, with its line in the log.
    pub(crate) fn intent(
        &self,
        caller: &CallContext<'_>,
        permit: &Permit,
        request: &UnsignedRequest,
    ) -> Result<Recorded, AuditError> {
        let client_oid_in_path = permit
            .endpoint()
            .and_then(|e| e.path_parameter("clientOid", request.target.path()));
        let what = AuditedRequest::new(request, client_oid_in_path);
        match self.write(
            "intent",
            caller,
            Some(permit.endpoint_id()),
            Some(what),
            None,
        ) {
            Err(error) if permit.increases_risk() => Err(AuditError(error)),
            _ => Ok(Recorded(())),
        }
    }

    /// Records a call that ended without an intent: refused by the rules, malformed, or while shutting down.
    pub(crate) fn denied(
        &self,
        caller: &CallContext<'_>,
        request: Option<&UnsignedRequest>,
        ending: &Ending<'_>,
    ) {
        let what = request.map(|request| {
            let mut what = AuditedRequest::new(request, None);
            // Whoever is refused chooses how long it is.
            what.target = cut(&what.target, MAX_DENIED_TARGET).to_owned();
            what.client_oids.truncate(MAX_DENIED_OIDS);
            what
        });
        // A refusal stands even where it cannot be recorded; `write` has put it into the log.
        let _ = self.write("denied", caller, None, what, Some(ending));
    }

    /// Records how a call ended: what the bot was told.
    pub(crate) fn outcome(&self, caller: &CallContext<'_>, endpoint: &str, ending: &Ending<'_>) {
        let _ = self.write("outcome", caller, Some(endpoint), None, Some(ending));
    }

    /// Records the late result of a request whose bot was answered with `maybe_sent`.
    pub(crate) fn late_answer(
        &self,
        caller: &CallContext<'_>,
        endpoint: &str,
        ending: &Ending<'_>,
    ) {
        let _ = self.write("late_answer", caller, Some(endpoint), None, Some(ending));
    }

    /// Records a change of a file. It is in force (or not) whether or not it can be recorded.
    pub(crate) fn changed(&self, change: &Change<'_>) {
        let mut file = self.file.lock();
        let line = ChangeLine {
            v: VERSION,
            event: "change",
            time_ms: self.clock.wall_ms(),
            run: &file.run,
            who: "file",
            what: change.what,
            sha256_before: change.before.map(|digest| hex(digest)),
            sha256_after: hex(change.after),
            outcome: change.outcome,
            detail: change.detail.as_ref().map(|text| clean(text, MAX_CHARS)),
        };
        let text = serde_json::to_string(&line);
        // `append` has logged what it could not write.
        let _ = text
            .map_err(io::Error::from)
            .and_then(|text| self.append(&mut file, text));
    }

    /// Records what `who` did: an admin's name, or `vault`. It is done whether or not it can be recorded.
    pub(crate) fn acted(&self, who: &str, act: &Act<'_>) {
        let mut file = self.file.lock();
        let line = ActLine {
            v: VERSION,
            event: "act",
            time_ms: self.clock.wall_ms(),
            run: &file.run,
            who,
            act,
        };
        let text = serde_json::to_string(&line);
        // `append` has logged what it could not write.
        let _ = text
            .map_err(io::Error::from)
            .and_then(|text| self.append(&mut file, text));
    }

    /// Flushes the file to the disk, and keeps nobody from writing meanwhile.
    pub(crate) fn sync(&self) {
        self.report(self.in_use().and_then(|file| file.sync_data()));
    }

    /// Why the last line could not be written, as long as none could be written since.
    pub(crate) fn failure(&self) -> Option<String> {
        let file = self.file.lock();
        let failure = file.failure.as_ref()?;
        Some(format!(
            "{} cannot be written: {failure}",
            self.path.display()
        ))
    }

    /// Goes on in a new file once the old one has been renamed or removed, as by whoever rotates it. No line waits for a
    /// slow disk meanwhile: files are looked at, opened and flushed while others write.
    fn follow(&self) {
        let Ok(in_use) = self.in_use().and_then(|file| file.metadata()) else {
            return;
        };
        let stays = std::fs::metadata(&self.path)
            .is_ok_and(|there| (there.dev(), there.ino()) == (in_use.dev(), in_use.ino()));
        if stays || !in_use.is_file() {
            return;
        }
        match open(&self.path).and_then(Appender::new) {
            Ok(mut new) => {
                let old = {
                    let mut file = self.file.lock();
                    // The next line goes to the new file, so that nothing else completes the old one.
                    let _ = file.complete(&self.clock);
                    new.run = std::mem::take(&mut file.run);
                    std::mem::replace(&mut *file, new)
                };
                tracing::info!(file = %self.path.display(), "audit log rotated; reopened");
                self.report(old.file.sync_data());
            }
            Err(error) => {
                self.metrics.audit_failures.inc();
                tracing::error!(file = %self.path.display(), %error, "audit log rotated, but reopening it failed; writing to the old file");
            }
        }
    }

    fn in_use(&self) -> io::Result<File> {
        let file = self.file.lock();
        file.file.try_clone()
    }

    /// The system tells of lost data once, here, and takes later writes as if nothing had been.
    fn report(&self, synced: io::Result<()>) {
        match synced {
            // What is no file of a disk cannot be flushed to one.
            Err(error) if error.kind() != io::ErrorKind::InvalidInput => {
                self.metrics.audit_failures.inc();
                tracing::error!(%error, "audit log flush failed; lines may be lost");
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
        ending: Option<&Ending<'_>>,
    ) -> io::Result<()> {
        let mut file = self.file.lock();
        let line = Line {
            v: VERSION,
            event,
            time_ms: self.clock.wall_ms(),
            run: &file.run,
            call: caller.call,
            request_id: caller.request_id.as_str(),
            bot: caller.who.bot().map(BotId::as_str),
            who: caller.who.other(),
            account: caller.place.map(|(account, _)| account.as_str()),
            scope: caller.place.map(|(_, scope)| scope.as_str()),
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
                    tracing::info!(file = %self.path.display(), "audit log is writable again");
                }
            }
            Err(error) => {
                file.failure = Some(error.to_string());
                self.metrics.audit_failures.inc();
                tracing::error!(target: "credbroker::audit", line = text.trim_end(), file = %self.path.display(), %error, "audit log write failed");
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

/// Writes a text of others, cleaned and cut.
#[expect(clippy::ref_option, reason = "serde calls it so")]
fn cleaned<S: Serializer>(text: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    let text = text.as_ref().map(|text| clean(text, MAX_CHARS));
    text.serialize(serializer)
}

/// Appends whole lines.
#[derive(Debug)]
struct Appender {
    file: File,
    run: String,
    /// Whether the file ends inside a line that could not be finished.
    torn: bool,
    /// Why the last line could not be written.
    failure: Option<String>,
}

impl Appender {
    fn new(file: File) -> io::Result<Self> {
        // A crash can leave half a line behind; devices have no end to look at.
        let torn = !file.metadata()?.file_type().is_char_device() && !unfinished(&file)?.is_empty();
        Ok(Self {
            file,
            run: String::new(),
            torn,
            failure: None,
        })
    }

    /// Appends a line, which ends with its line feed. A line that was cut off before it is completed first.
    fn append(&mut self, line: &str, clock: &Clock) -> io::Result<()> {
        self.complete(clock)?;
        self.write(line.as_bytes())
    }

    /// Completes a line that was cut off, so that it parses and says `"torn":true`, and adds a line that tells why.
    fn complete(&mut self, clock: &Clock) -> io::Result<()> {
        if !self.torn {
            return Ok(());
        }
        // Read again, since `doctor` may have appended to the same file meanwhile.
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

    /// Writes whole lines, or the end of one and further ones.
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

/// What a file ends with after its last line feed.
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

/// What makes a JSON object of a line that was cut off at any byte, with `"torn":true` in it; nothing for a whole object.
/// `None` where it is not the beginning of an object.
fn rest_of_line(line: &[u8]) -> Option<Vec<u8>> {
    /// The end of a character that was cut, for each of the forms of UTF-8 (RFC 3629, section 4).
    const CHARACTER_ENDS: [&[u8]; 6] = [
        b"",
        b"\x80",
        b"\x80\x80",
        b"\x80\x80\x80",
        b"\xa0\x80",
        b"\x90\x80\x80",
    ];
    /// The end of a value, or of a name with a value; the last ones are those of `null`, `true` and `false`.
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
    // The outermost one ends after the mark.
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

    /// Writes one refusal to a file that ends as given; returns its lines.
    fn lines_after(end: &[u8]) -> Vec<serde_json::Value> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let before: &[u8] = b"{\"event\":\"act\"}\n";
        std::fs::write(&path, [before, end].concat()).unwrap();
        let audit = Audit::open(&path, Arc::new(Clock::system()), Arc::default()).unwrap();
        let (who, request_id) = (Principal::Bot("b".parse().unwrap()), "r".parse().unwrap());
        let caller = CallContext {
            who: &who,
            request_id: &request_id,
            call: 1,
            place: None,
        };
        audit.denied(
            &caller,
            None,
            &Ending {
                reason: Some(Reason::PolicyDenied),
                ..Ending::default()
            },
        );
        let text = std::fs::read(&path).unwrap();
        assert!(text.starts_with(&[before, end].concat()), "only appended");
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
    fn a_line_without_its_line_feed_is_whole() {
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
    fn digests_are_those_of_openssl() {
        // printf '' | openssl dgst -sha256
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(hex(&Sha256::digest(b"")), empty);
    }
}
