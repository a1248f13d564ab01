//! The audit log: who sent which request, and how it ended. A JSON line, `intent`, before a request is sent, and a line,
//! `outcome`, after.
//!
//! A risk-increasing request is refused unless its intent is in the file. Any other request is sent; its line is in the
//! reserve file or waits in memory while the file cannot be written, and is added to the file later.
//! Lines hold digests and masked targets, never bodies, secrets or signatures.

mod file;
mod items;
mod reserve;
mod resolved;
mod writer;

use std::borrow::Cow;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::fstatvfs;
use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};
use tokio::time::{Instant, timeout};

use crate::base::ids::{AccountId, BotId, KeyName, Principal, RequestId, hex};
use crate::base::outcome::{Outcome, Reason};
use crate::base::text::{MAX_CHARS, clean, clean_json};
use crate::clock::Clock;
use crate::kucoin::lookup::LookupRecord;
use crate::kucoin::{BatchItem, Scope, UnsignedRequest};
use crate::orders::RecordedClaims;
use crate::orders::replay::AuditLog;
use crate::policy::Permit;
use crate::telemetry::Metrics;

use file::AuditFile;
pub(crate) use writer::Space;
use writer::{HANGS_AFTER, Kind, Queued, Waited, Writer};

/// How often written lines are flushed to the disk; a power cut can lose the lines of this long.
const SYNC_EVERY: Duration = Duration::from_millis(500);

/// How long the broker waits for the flush when it stops.
const LAST_SYNC: Duration = Duration::from_secs(1);

/// How long a result waits for its line if the caller's deadline has passed.
const LATE_LINE: Duration = Duration::from_millis(20);

/// `clientOid`s in a line. A batch has at most 20 orders; the limit bounds the length of a line.
const MAX_CLIENT_OIDS: usize = 100;

/// Characters of the target in the line of a denied call.
const MAX_DENIED_TARGET: usize = 512;

/// `clientOid`s in the line of a denied call.
const MAX_DENIED_OIDS: usize = 5;

/// Characters of each `clientOid` in a line; KuCoin accepts 40.
pub(crate) const MAX_CLIENT_OID_CHARS: usize = 64;

/// The audit log.
#[derive(Debug)]
pub(crate) struct Audit {
    path: PathBuf,
    run: String,
    writer: Arc<Writer>,
    clock: Arc<Clock>,
    metrics: Arc<Metrics>,
}

/// The intent of a request, on its way to the file.
#[derive(Debug)]
#[must_use = "sending a request requires its record"]
pub(crate) struct Intent {
    line: Queued,
    is_risk_increasing: bool,
}

/// A line on its way to the file. It is written even if this is dropped.
#[derive(Debug)]
#[must_use = "wait until the line is written"]
pub(crate) struct AuditLine(Option<Queued>);

/// Proof that the intent of a request was recorded: in the file or, if that cannot be written and the request is not
/// risk-increasing, in the reserve file or in memory.
#[derive(Debug)]
#[must_use = "sending a request requires it"]
pub(crate) struct Recorded(());

/// The intent of a risk-increasing request could not be written.
#[derive(Debug, thiserror::Error)]
#[error(
    "the audit log cannot be written, and risk-increasing requests are refused until it can be; nothing was sent"
)]
pub(crate) struct AuditError {
    #[source]
    cause: io::Error,
}

/// Who called, and on which account: the fields that every line of a call has.
#[derive(Clone, Debug)]
pub(crate) struct CallContext<'a> {
    /// The bot, the admin, or the broker itself.
    pub(crate) principal: &'a Principal,
    /// The request id. Bots choose it, and it may repeat.
    pub(crate) request_id: &'a RequestId,
    /// The number of the call in its run.
    pub(crate) call: u64,
    /// Its run, if that was an earlier one.
    pub(crate) earlier_run: Option<&'a str>,
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
    /// The orders of a batch.
    #[serde(
        serialize_with = "items::audited",
        skip_serializing_if = "<[_]>::is_empty"
    )]
    pub(crate) items: &'a [BatchItem],
    /// The timestamp that was signed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) timestamp_ms: Option<i64>,
    /// From the arrival of the call to this line.
    pub(crate) duration_us: u64,
}

/// Version of the line format (`v`): incremented when a field is renamed, removed or changes its meaning.
const VERSION: u8 = 2;

/// A line of a call. Its fields are written in this order.
#[derive(Serialize)]
struct Line<'a> {
    v: u8,
    event: &'static str,
    time_ms: i64,
    run: &'a str,
    /// The run that has written the line, if it is not `run`.
    #[serde(skip_serializing_if = "Option::is_none")]
    by_run: Option<&'a str>,
    seq: u64,
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
    /// The scope of the order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) scope: Option<&'static str>,
    /// The clientOid of the order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) client_oid: Option<&'a str>,
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
    seq: u64,
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
    seq: u64,
    principal: &'static str,
    file: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256_before: Option<String>,
    sha256_after: String,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<Cow<'a, str>>,
}

/// The fields of a request in a line.
#[derive(Serialize)]
struct AuditedRequest<'a> {
    method: &'static str,
    target: String,
    body_bytes: usize,
    body_sha256: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exchange_ms: Option<i64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    client_oids: Vec<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    lookup: &'a [LookupRecord],
}

impl Intent {
    /// Waits until the intent is written, for at most 500 ms; unless the request is risk-increasing, also for at most half of
    /// the time until `deadline`.
    ///
    /// # Errors
    /// When it is not written by then and the request is risk-increasing.
    pub(crate) async fn recorded(
        self,
        audit: &Audit,
        deadline: Instant,
    ) -> Result<Recorded, AuditError> {
        let within = if self.is_risk_increasing {
            HANGS_AFTER
        } else {
            let left = deadline.saturating_duration_since(Instant::now());
            HANGS_AFTER.min(left / 2)
        };
        let cause = match self.line.wait(within).await {
            Waited::Kept => return Ok(Recorded(())),
            Waited::Failed(error) => error,
            Waited::Hangs => {
                audit.writer.report_hang();
                io::Error::new(io::ErrorKind::TimedOut, "a write to it hangs")
            }
        };
        if self.is_risk_increasing {
            return Err(AuditError { cause });
        }
        Ok(Recorded(()))
    }
}

impl AuditLine {
    /// Waits until the line is written, for at most 500 ms and not much longer than until `deadline`.
    pub(crate) async fn written_by(self, deadline: Instant) {
        if let Some(line) = self.0 {
            let left = deadline.saturating_duration_since(Instant::now());
            let _ = line.wait(left.clamp(LATE_LINE, HANGS_AFTER)).await;
        }
    }

    /// Waits until the line is written, for at most 500 ms.
    pub(crate) async fn written(self) {
        if let Some(line) = self.0 {
            let _ = line.wait(HANGS_AFTER).await;
        }
    }
}

impl Audit {
    /// Opens the file for appending, creates it if it is missing, and starts the threads that write and flush it. At most
    /// `queue_bytes` of lines wait in memory while it cannot be written.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(crate) fn open(
        path: &Path,
        queue_bytes: usize,
        clock: Arc<Clock>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Arc<Self>> {
        let run = format!("{:08x}", fastrand::u32(..));
        let writer = Writer::open(
            path,
            queue_bytes,
            run.clone(),
            Arc::clone(&clock),
            Arc::clone(&metrics),
        )?;
        let audit = Arc::new(Self {
            path: path.to_owned(),
            run,
            writer,
            clock,
            metrics,
        });
        let alive = Arc::downgrade(&audit);
        std::thread::Builder::new()
            .name("audit-sync".to_owned())
            .spawn(move || {
                while let Some(audit) = alive.upgrade() {
                    audit.reopen_if_rotated();
                    audit.check_space();
                    audit.report_sync(audit.sync());
                    drop(audit);
                    std::thread::sleep(SYNC_EVERY);
                }
            })?;
        Ok(audit)
    }

    /// Uses a reserve file for lines that cannot be written, and adds the lines that it has from an earlier run. Without it,
    /// such lines are only in memory.
    pub(crate) fn use_reserve(&self, path: &Path, bytes: usize) {
        if let Err(error) = self.writer.use_reserve(path, bytes) {
            self.metrics.audit_failures.inc();
            tracing::error!(file.path = %path.display(), exception.message = %error, "audit reserve cannot be used; let the broker's user create and write it, or correct audit.reserve, and restart the broker");
        }
    }

    /// Records that a request is about to be sent. `claims`: of its clientOids, [`Claims::recorded`](crate::orders::Claims::recorded).
    ///
    /// # Errors
    /// When the request is risk-increasing and it is known that its line cannot be written.
    pub(crate) fn intent(
        &self,
        caller: &CallContext<'_>,
        permit: &Permit,
        request: &UnsignedRequest,
        claims: Option<RecordedClaims<'_>>,
    ) -> Result<Intent, AuditError> {
        let client_oid_in_path = permit
            .endpoint()
            .and_then(|e| e.path_parameter("clientOid", request.target.path()));
        let mut audited = AuditedRequest::new(request, client_oid_in_path);
        if let Some(claims) = claims {
            audited.uid = claims.uid;
            audited.exchange_ms = Some(claims.exchange_ms);
            audited.lookup = claims.lookups;
        }
        let is_risk_increasing = permit.increases_risk();
        let kind = match kind_of(permit) {
            Kind::Essential if is_risk_increasing => Kind::RiskIncreasing,
            kind => kind,
        };
        let endpoint = Some(permit.endpoint_id());
        let line = self.write("intent", kind, caller, endpoint, Some(audited), None);
        match line {
            Ok(line) => Ok(Intent {
                line,
                is_risk_increasing,
            }),
            Err(cause) if is_risk_increasing => Err(AuditError { cause }),
            // The line went to the log.
            Err(_) => Ok(Intent {
                line: Queued::nothing(),
                is_risk_increasing,
            }),
        }
    }

    /// Records a call that was refused before its intent was recorded, such as one that the rules deny or a malformed one.
    pub(crate) fn denied(
        &self,
        caller: &CallContext<'_>,
        request: Option<&UnsignedRequest>,
        ending: &CallEnd<'_>,
    ) -> AuditLine {
        let audited = request.map(|request| {
            let mut audited = AuditedRequest::new(request, None);
            // A denied caller must not fill the disk with long requests.
            audited.target = cut(&audited.target, MAX_DENIED_TARGET).to_owned();
            audited.client_oids.truncate(MAX_DENIED_OIDS);
            audited
        });
        AuditLine(
            self.write("denied", Kind::Other, caller, None, audited, Some(ending))
                .ok(),
        )
    }

    /// Records how a call ended, as reported to the caller.
    pub(crate) fn outcome(
        &self,
        caller: &CallContext<'_>,
        permit: &Permit,
        ending: &CallEnd<'_>,
    ) -> AuditLine {
        self.result("outcome", caller, permit, ending)
    }

    /// Records the late result of a request whose caller has already got `maybe_sent`.
    pub(crate) fn late_answer(
        &self,
        caller: &CallContext<'_>,
        permit: &Permit,
        ending: &CallEnd<'_>,
    ) -> AuditLine {
        self.result("late_answer", caller, permit, ending)
    }

    fn result(
        &self,
        event: &'static str,
        caller: &CallContext<'_>,
        permit: &Permit,
        ending: &CallEnd<'_>,
    ) -> AuditLine {
        let (kind, endpoint) = (kind_of(permit), Some(permit.endpoint_id()));
        let line = self.write(event, kind, caller, endpoint, None, Some(ending));
        // While the file cannot be written, the response does not wait: the line is in memory, and soon in the reserve.
        AuditLine(line.ok().filter(|_| !self.writer.is_impaired()))
    }

    /// The file, and the name of this run in its lines.
    pub(crate) fn log(&self) -> AuditLog<'_> {
        AuditLog {
            file: &self.path,
            run: &self.run,
        }
    }

    /// Waits until the lines queued so far are written, for at most half a second.
    pub(crate) async fn flush_lines(&self) {
        self.writer.flush(LAST_SYNC / 2).await;
    }

    /// Records a change of a file. A failure to record it does not undo the change.
    pub(crate) fn changed(&self, change: &Change<'_>) -> AuditLine {
        let line = self.writer.push(Kind::Essential, |seq| {
            cleaned_line(&ChangeLine {
                v: VERSION,
                event: "change",
                time_ms: self.clock.wall_ms(),
                run: &self.run,
                seq,
                principal: "file",
                file: change.file,
                sha256_before: change.before.map(|digest| hex(digest)),
                sha256_after: hex(change.after),
                outcome: change.outcome,
                detail: change.detail.as_ref().map(|text| clean(text, MAX_CHARS)),
            })
        });
        AuditLine(line.ok())
    }

    /// Records an action of `principal`: an admin's name, or `vault`. A failure to record it does not undo the action.
    pub(crate) fn record_action(&self, principal: &str, act: &Act<'_>) -> AuditLine {
        let line = self.writer.push(Kind::Essential, |seq| {
            cleaned_line(&ActLine {
                v: VERSION,
                event: "act",
                time_ms: self.clock.wall_ms(),
                run: &self.run,
                seq,
                principal,
                act,
            })
        });
        AuditLine(line.ok())
    }

    /// Waits until every line is written and flushed to the disk, for about a second. Lines that are then in no file go to the
    /// log.
    pub(crate) async fn flush(self: &Arc<Self>) {
        self.writer.flush(LAST_SYNC / 2).await;
        self.writer.log_rest();
        let audit = Arc::clone(self);
        let synced = tokio::task::spawn_blocking(move || audit.report_sync(audit.sync()));
        let _ = timeout(LAST_SYNC / 2, synced).await;
    }

    /// Why lines cannot be written; `None` if they can.
    pub(crate) fn failure(&self) -> Option<String> {
        self.writer.failure()
    }

    /// Why the reserve file cannot be written; `None` if it can, or if the broker has none.
    pub(crate) fn reserve_failure(&self) -> Option<String> {
        self.writer.reserve_failure()
    }

    /// How many lines are not in the file yet.
    pub(crate) fn waiting(&self) -> usize {
        self.writer.waiting()
    }

    /// The space of the audit file's file system; `None` for devices and pipes.
    pub(crate) fn space(&self) -> Option<Space> {
        self.writer.space()
    }

    /// Flushes the file to the disk. Others can write lines meanwhile.
    fn sync(&self) -> io::Result<()> {
        self.writer.current_file()?.sync_data()
    }

    /// Opens a new file if the current one was renamed or removed, for example by log rotation. Files are checked, opened and
    /// flushed without the lock, so that no line waits for a slow disk.
    fn reopen_if_rotated(&self) {
        let Ok(current) = self.writer.current_file().and_then(|file| file.metadata()) else {
            return;
        };
        let is_unchanged = std::fs::metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (current.dev(), current.ino()));
        if is_unchanged || !current.is_file() {
            return;
        }
        match AuditFile::open(&self.path) {
            Ok(new) => {
                let old = self.writer.replace_file(new);
                tracing::info!(file.path = %self.path.display(), "audit log rotated; reopened");
                if old.file.metadata().is_ok_and(|old| old.nlink() == 0) {
                    self.metrics.audit_failures.inc();
                    tracing::error!(file.path = %self.path.display(), "the rotated audit log was deleted or compressed at once; lines of up to a second may be lost; let the rotation wait (`delaycompress`)");
                }
                self.report_sync(old.file.sync_data());
            }
            Err(error) => {
                self.metrics.audit_failures.inc();
                tracing::error!(file.path = %self.path.display(), exception.message = %error, "audit log rotated, but reopening it failed; writing to the old file");
            }
        }
    }

    /// Checks the free space of the file system. Devices and pipes need none, and some file systems do not report it.
    fn check_space(&self) {
        let file = self.writer.current_file();
        let file = file.and_then(|file| Ok((file.metadata()?.is_file(), file)));
        if let Ok((true, file)) = file
            && let Ok(disk) = fstatvfs(&file)
            && disk.f_blocks > 0
        {
            let space = Space {
                free: disk.f_bavail.saturating_mul(disk.f_frsize),
                total: disk.f_blocks.saturating_mul(disk.f_frsize),
            };
            let was_nearly_full = self.space().is_some_and(Space::is_nearly_full);
            self.writer.set_space(space);
            if space.is_nearly_full() && !was_nearly_full {
                tracing::warn!(file.path = %self.path.display(), free_bytes = space.free, size_bytes = space.total, "file system of the audit log is at least 90 % full");
            }
        }
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
        kind: Kind,
        caller: &CallContext<'_>,
        endpoint: Option<&str>,
        request: Option<AuditedRequest<'_>>,
        ending: Option<&CallEnd<'_>>,
    ) -> io::Result<Queued> {
        self.writer.push(kind, |seq| {
            cleaned_line(&Line {
                request,
                ending,
                ..self.line(seq, event, caller, endpoint)
            })
        })
    }

    /// A line with the fields that every line of a call has.
    fn line<'a>(
        &'a self,
        seq: u64,
        event: &'static str,
        caller: &CallContext<'a>,
        endpoint: Option<&'a str>,
    ) -> Line<'a> {
        Line {
            v: VERSION,
            event,
            time_ms: self.clock.wall_ms(),
            run: caller.earlier_run.unwrap_or(&self.run),
            by_run: caller.earlier_run.map(|_| self.run.as_str()),
            seq,
            call: caller.call,
            request_id: caller.request_id.as_str(),
            bot: caller.principal.bot().map(BotId::as_str),
            principal: caller.principal.other(),
            account: caller
                .account_and_scope
                .map(|(account, _)| account.as_str()),
            scope: caller.account_and_scope.map(|(_, scope)| scope.as_str()),
            endpoint,
            request: None,
            ending: None,
        }
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.writer.close();
    }
}

/// Lines about requests that change something are kept first.
fn kind_of(permit: &Permit) -> Kind {
    if permit.changes() {
        Kind::Essential
    } else {
        Kind::Other
    }
}

/// A line as JSON, with cleaned text.
fn cleaned_line(line: &impl Serialize) -> serde_json::Result<String> {
    let text = serde_json::to_string(line)?;
    Ok(match clean_json(&text) {
        Cow::Borrowed(_) => text,
        Cow::Owned(cleaned) => cleaned,
    })
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
            uid: None,
            exchange_ms: None,
            lookup: &[],
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

/// Serializes text from outside, sanitized and truncated.
#[expect(clippy::ref_option, reason = "serde requires this signature")]
fn cleaned<S: Serializer>(text: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    let text = text.as_ref().map(|text| clean(text, MAX_CHARS));
    text.serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_time().build().unwrap()
    }

    /// Writes one `denied` line to a file that ends with `end`; returns all lines.
    fn lines_after(end: &[u8]) -> Vec<serde_json::Value> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let before: &[u8] = b"{\"event\":\"act\"}\n";
        std::fs::write(&path, [before, end].concat()).unwrap();
        let clock = Arc::new(Clock::system());
        let audit = Audit::open(&path, 1 << 20, clock, Arc::default()).unwrap();
        let (principal, request_id) = (Principal::Bot("b".parse().unwrap()), "r".parse().unwrap());
        let caller = CallContext {
            principal: &principal,
            request_id: &request_id,
            call: 1,
            earlier_run: None,
            account_and_scope: None,
        };
        let line = audit.denied(
            &caller,
            None,
            &CallEnd {
                reason: Some(Reason::PolicyDenied),
                ..CallEnd::default()
            },
        );
        runtime().block_on(line.written());
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
