//! Reads from the audit log which clientOids earlier runs used: from the current file and from rotated ones beside it, also if
//! they are compressed with gzip.
//!
//! A line can be in several files, such as in a copy, and files can be read in a wrong order after the system clock was set.
//! Therefore a clientOid belongs to the call that used it last, and only the results of that call count for it.

mod files;
mod line;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::io::{self, BufRead, Read};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use indexmap::IndexSet;
use serde::{Deserialize, Serialize};

use files::{Files, last_time, reader};
use line::Line;

use super::calls::{CallHandle, CallState};
use super::guard::{ClaimKey, ClaimedBy, OrderState};
use super::{Claims, Orders, Readiness, seconds};
use crate::audit::CallContext;
use crate::base::ids::{AccountId, BotId, Principal, RequestId};
use crate::base::outcome::Reason;
use crate::base::state_file;
use crate::kucoin::lookup::LookupRecord;
use crate::kucoin::{Endpoint, Scope};

/// The longest line that is read; the broker's own are much shorter.
const LONGEST_LINE: u64 = 4 * 1024 * 1024;

/// The file's name in the state folder.
const FILE: &str = "orders.json";

/// How much later than expected the log may begin: the time of a slow start.
const GAP_TOLERANCE_MS: i64 = 60_000;

/// A call of an earlier run that changes something, and was sent or about to be sent.
#[derive(Clone, Debug)]
pub(crate) struct EarlierCall {
    /// The run, and the number of the call in it.
    run: String,
    number: u64,
    pub(crate) principal: Principal,
    pub(crate) request_id: RequestId,
    pub(crate) account: AccountId,
    pub(crate) scope: Scope,
    pub(crate) endpoint: &'static Endpoint,
    client_oids: Vec<String>,
    /// The exchange's id of the account, if it was known.
    uid: Option<String>,
    /// The exchange's time of the call, Unix milliseconds.
    pub(crate) exchange_ms: i64,
    /// How the orders can be looked up that may have been placed.
    lookups: Vec<LookupRecord>,
    /// Those orders.
    open: Vec<(LookupRecord, ClaimKey)>,
    /// Whether the log has its outcome, which is `maybe_sent` then.
    pub(crate) has_outcome: bool,
}

/// The audit log, and where to find it.
#[derive(Debug)]
pub(crate) struct AuditLog<'a> {
    /// The current file.
    pub(crate) file: &'a Path,
    /// This run, whose lines do not count.
    pub(crate) run: &'a str,
}

/// The content of [`FILE`].
#[derive(Deserialize, Serialize)]
struct State {
    /// The audit log reaches back to this time (Unix milliseconds), unless lines are missing.
    since_ms: i64,
    /// When an admin last accepted that lines are missing (Unix milliseconds).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gap_ms: Option<i64>,
}

/// A call: the number of its run in [`Reading::runs`], and its number in that run.
type CallId = (usize, u64);

/// What the log says about a clientOid.
struct Used {
    by: CallId,
    /// Its number in [`Reading::bots`].
    bot: usize,
    time_ms: i64,
    exchange_ms: i64,
    body: u64,
    endpoint: u16,
    /// `None`: the order was not placed.
    state: Option<OrderState>,
}

/// The state of reading.
struct Reading<'a> {
    run: &'a str,
    from_ms: i64,
    /// The time of the first line.
    first_ms: Option<i64>,
    used: HashMap<ClaimKey, Used>,
    /// About this many clientOids are remembered.
    limit: usize,
    /// The exchange's time of the last one that was forgotten because there were more.
    forgotten_ms: Option<i64>,
    /// Each run and bot once, since memory is short with a million clientOids.
    runs: IndexSet<String>,
    bots: IndexSet<BotId>,
    open: HashMap<CallId, Open>,
    /// Of each run: the numbers of its lines.
    numbers: HashMap<String, Numbers>,
}

/// The numbers of the lines of a run: the first and the last of each range, and the time of its first line.
#[derive(Default)]
struct Numbers(BTreeMap<u64, (u64, i64)>);

impl Numbers {
    fn add(&mut self, seq: u64, time_ms: i64) {
        let before = self.0.range_mut(..=seq).next_back();
        let first = match before {
            Some((_, (last, _))) if *last >= seq => return,
            Some((first, (last, _))) if *last + 1 == seq => {
                *last = seq;
                *first
            }
            _ => {
                self.0.insert(seq, (seq, time_ms));
                seq
            }
        };
        if let Some((last, _)) = self.0.remove(&seq.saturating_add(1))
            && let Some((end, _)) = self.0.get_mut(&first)
        {
            *end = last;
        }
    }

    /// Whether lines are missing before one that was written after `since_ms`.
    fn has_gap(&self, since_ms: i64) -> bool {
        let later = self.0.values().skip(1);
        later.into_iter().any(|(_, time_ms)| *time_ms > since_ms)
    }
}

/// A call whose result has not been read yet, or is `maybe_sent`.
struct Open {
    /// The clientOids that it was the last to use: position in `call.client_oids`, and key.
    keys: Vec<(usize, ClaimKey)>,
    call: EarlierCall,
    /// The call in the table of calls.
    handle: Option<CallHandle>,
    /// Whether the line was cut off; a complete one may follow.
    is_torn: bool,
}

impl Orders {
    /// Reads the claims of earlier runs from the audit log; from then on orders can be placed, unless the log does not reach back
    /// far enough, or lines are missing. Returns the calls without a result, and those with orders that may have been placed.
    pub(crate) fn read_log(&self, log: &AuditLog<'_>, now_ms: i64) -> Vec<EarlierCall> {
        let state = read_state(&self.state_dir);
        let gap_ms = state.as_ref().and_then(|state| state.gap_ms);
        if let Some(gap_ms) = gap_ms {
            self.guard.lock().miss(seconds(gap_ms));
        }
        let since_ms = state.map(|state| state.since_ms);
        let is_first_start = since_ms.is_none();
        let limits = self.guard.lock().limits();
        let window_ms = i64::from(limits.window_s) * 1000;
        // If the system clock was set ahead, the last line shows that.
        let last_ms = last_time(log.file).ok().flatten();
        let from_ms = last_ms.unwrap_or(now_ms).min(now_ms) - window_ms;
        let mut reading = Reading {
            run: log.run,
            from_ms,
            first_ms: None,
            used: HashMap::new(),
            limit: limits.claims,
            forgotten_ms: None,
            runs: IndexSet::new(),
            bots: IndexSet::new(),
            open: HashMap::new(),
            numbers: HashMap::new(),
        };
        let Files {
            opened,
            found: _,
            reaches_back,
            mut unreadable,
        } = Files::list(log.file, from_ms);
        let mut complete = BTreeSet::new();
        for (_, path, file) in opened {
            match self.read_file(reader(&path, file), &mut reading) {
                Ok(()) => drop(complete.insert(path)),
                Err(error) => unreadable.push((path, error)),
            }
        }
        // Being compressed, or left by a compression that was ended.
        unreadable.retain(|(path, _)| {
            let is_compressed = path.extension() == Some(OsStr::new("gz"));
            !is_compressed || !complete.contains(&path.with_extension(""))
        });
        let accepted = UNIX_EPOCH + Duration::from_millis(gap_ms.unwrap_or(0).unsigned_abs());
        unreadable.retain(|(path, _)| {
            let modified = std::fs::metadata(path).and_then(|file| file.modified());
            gap_ms.is_none() || modified.is_ok_and(|modified| modified > accepted)
        });
        for (path, error) in &unreadable {
            tracing::error!(file.path = %path.display(), exception.message = %error, "cannot read from the audit log which clientOids were used");
        }
        let first_ms = reading.first_ms;
        let expected_ms = since_ms.map(|since_ms| since_ms.max(from_ms) + GAP_TOLERANCE_MS);
        let begins_late = expected_ms.is_some_and(|ms| first_ms.is_none_or(|first| first > ms));
        let since_ms = since_ms.unwrap_or_default();
        let mut runs = reading.numbers.values();
        let lacks_lines = runs.any(|numbers| numbers.has_gap(since_ms.max(from_ms)));
        let has_gap = !unreadable.is_empty() || lacks_lines || (begins_late && !reaches_back);
        let calls = self.take_over(reading);
        let (count, _) = self.usage();
        tracing::info!(count, "clientOids of earlier runs read from the audit log");
        if has_gap {
            tracing::error!(file.path = %log.file.display(), "the audit log does not show all clientOids that were used; risk-increasing requests are refused; restore the rotated files beside it and restart the broker, or run `credbroker orders accept-gap`");
        }
        *self.readiness.lock() = if has_gap {
            Readiness::Gap
        } else {
            Readiness::Ready
        };
        if is_first_start
            && let Err(error) = write_since(&self.state_dir, first_ms.unwrap_or(now_ms), None)
        {
            tracing::error!(exception.message = %error, "cannot write {FILE} in the state folder; a later start may not notice that audit lines are missing");
        }
        calls
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
        self.guard.lock().miss(seconds(now_ms));
        drop(readiness);
        write_since(&self.state_dir, now_ms, Some(now_ms))?;
        Ok(true)
    }

    fn read_file(&self, mut reader: impl BufRead, reading: &mut Reading<'_>) -> io::Result<()> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let read = (&mut reader)
                .take(LONGEST_LINE)
                .read_until(b'\n', &mut bytes)?;
            if read == 0 {
                return Ok(());
            }
            // A line that was cut off before its end, or is of another kind, is about no order.
            let Ok(line) = serde_json::from_slice::<Line>(&bytes) else {
                continue;
            };
            if !line.torn {
                let first_ms = reading.first_ms.get_or_insert(line.time_ms);
                *first_ms = line.time_ms.min(*first_ms);
            }
            let by_run = line.by_run.as_ref().unwrap_or(&line.run);
            if by_run == reading.run {
                continue;
            }
            if let Some(seq) = line.seq.filter(|_| !line.torn) {
                if !reading.numbers.contains_key(by_run.as_ref()) {
                    let run = by_run.clone().into_owned();
                    reading.numbers.insert(run, Numbers::default());
                }
                if let Some(numbers) = reading.numbers.get_mut(by_run.as_ref()) {
                    numbers.add(seq, line.time_ms);
                }
            }
            if line.time_ms < reading.from_ms {
                continue;
            }
            match line.event.as_ref() {
                "intent" => self.read_intent(&line, reading),
                "outcome" | "late_answer" => {
                    if let Some(call) = reading.read_result(&line) {
                        self.calls.lock().set(call, line.state());
                    }
                }
                "resolved" => reading.read_resolution(&line),
                "act" if line.action.as_deref() == Some("settle-order") => {
                    self.read_settled(&line, reading);
                }
                _ => {}
            }
        }
    }

    fn read_intent(&self, line: &Line<'_>, reading: &mut Reading<'_>) {
        let Some(call) = line.call() else {
            return;
        };
        let (account, scope, endpoint) = (&call.account, call.scope, call.endpoint);
        let id = (reading.runs.insert_full(call.run.clone()).0, call.number);
        let at_ms = call.exchange_ms;
        let is_cut_off = |open: &Open| open.is_torn && !line.torn;
        if reading.open.get(&id).is_some_and(is_cut_off) {
            // The complete line replaces it.
            reading.open.remove(&id);
            reading.used.retain(|_, used| used.by != id);
        }
        let mut keys = Vec::new();
        if endpoint.claims_client_oids()
            && let Some(bot) = call.principal.bot()
        {
            if let Some(uid) = &line.uid {
                self.learn_uid(account, scope, uid);
            }
            let digest = line.body_sha256.as_deref().and_then(|text| text.get(..16));
            let body = digest.and_then(|digest| u64::from_str_radix(digest, 16).ok());
            let bot = reading.bots.insert_full(bot.clone()).0;
            for (position, oid) in call.client_oids.iter().enumerate() {
                let key = match &line.uid {
                    Some(uid) => self.hash.key("uid", uid, scope, oid),
                    None => self.hash.key("account", account.as_str(), scope, oid),
                };
                let used = Used {
                    by: id,
                    bot,
                    time_ms: line.time_ms,
                    exchange_ms: at_ms,
                    body: body.unwrap_or(0),
                    endpoint: endpoint.number,
                    state: Some(OrderState::MaybeSent),
                };
                if reading.is_used(key, used) {
                    keys.push((position, key));
                }
            }
            if keys.is_empty() && !call.client_oids.is_empty() {
                // This line was read before.
                return;
            }
        }
        let Entry::Vacant(known) = reading.open.entry(id) else {
            return;
        };
        let bot = call.principal.bot();
        let handle = bot.map(|bot| {
            let claimed: Vec<_> = keys.iter().map(|(_, key)| *key).collect();
            let has_orders = endpoint.claims_client_oids() && !call.client_oids.is_empty();
            let is_opaque = call.client_oids.len() > 1 || has_orders && call.uid.is_none();
            let claims = (claimed.as_slice(), is_opaque);
            self.add_call(bot, &call.request_id, Some(endpoint), claims, at_ms)
        });
        let is_torn = line.torn;
        known.insert(Open {
            keys,
            call,
            handle,
            is_torn,
        });
    }

    /// Records that an order was not placed, as an admin has found out.
    fn read_settled(&self, line: &Line<'_>, reading: &mut Reading<'_>) {
        let account = line.account.as_deref().and_then(|id| id.parse().ok());
        let (Some(account), Some(scope), Some(oid)) = (account, line.scope(), &line.client_oid)
        else {
            return;
        };
        // `unknown` is not in the log if no lookup finds the order.
        let is_meant = |used: &Used| {
            let is_open = matches!(
                used.state,
                Some(OrderState::MaybeSent | OrderState::Unknown)
            );
            is_open && used.time_ms <= line.time_ms
        };
        let mut keys = self.keys(&account, scope, &[oid]).into_iter().flatten();
        let meant = keys.find(|key| reading.used.get(key).is_some_and(is_meant));
        if let Some(used) = meant.and_then(|key| reading.used.get_mut(&key)) {
            used.state = None;
        }
    }

    /// Adds the claims that were read, from the oldest to the newest.
    fn take_over(&self, mut reading: Reading<'_>) -> Vec<EarlierCall> {
        let open = std::mem::take(&mut reading.open);
        let open = open
            .into_iter()
            .map(|(id, open)| reading.close(id, open))
            .collect::<Vec<_>>();
        let mut used: Vec<_> = reading.used.into_iter().collect();
        used.sort_unstable_by_key(|(_, used)| used.time_ms);
        for (key, used) in used {
            if let Some(state) = used.state
                && let Some(bot) = reading.bots.get_index(used.bot)
            {
                let at_s = seconds(used.exchange_ms);
                // Locked for each one: bots are served meanwhile.
                let mut guard = self.guard.lock();
                let Used { body, endpoint, .. } = used;
                guard.restore(bot, key, ClaimedBy { body, endpoint }, state, at_s);
            }
        }
        if let Some(ms) = reading.forgotten_ms {
            self.guard.lock().miss(seconds(ms));
        }
        let mut calls = Vec::new();
        for Open { call, handle, .. } in open {
            if let Some(handle) = handle.filter(|_| !call.has_outcome) {
                self.calls.lock().set(handle, CallState::MaybeSent);
            }
            if !call.has_outcome || !call.open.is_empty() {
                calls.push(call);
            }
        }
        calls
    }
}

impl EarlierCall {
    /// The fields of its lines in the audit log.
    pub(crate) fn context(&self) -> CallContext<'_> {
        CallContext {
            principal: &self.principal,
            request_id: &self.request_id,
            call: self.number,
            earlier_run: Some(&self.run),
            account_and_scope: Some((&self.account, self.scope)),
        }
    }

    /// The orders that may have been placed and can be looked up, each with its claim.
    pub(crate) fn open_orders(&self) -> impl Iterator<Item = (&LookupRecord, Claims)> {
        self.open.iter().map(|(lookup, key)| {
            let claim = Claims {
                orders: vec![(lookup.client_oid.clone(), *key)],
                uid: self.uid.clone(),
                at_ms: self.exchange_ms,
                ..Claims::default()
            };
            (lookup, claim)
        })
    }
}

impl Reading<'_> {
    /// Records that a call used a clientOid; false if a later call, or the same one, has used it already.
    fn is_used(&mut self, key: ClaimKey, used: Used) -> bool {
        if let Some(known) = self.used.get(&key) {
            // The system clock may have been set back since, but the calls of a run are numbered.
            let is_later = if known.by.0 == used.by.0 {
                used.by.1 > known.by.1
            } else {
                used.time_ms > known.time_ms || known.state.is_none()
            };
            if !is_later {
                return false;
            }
        }
        self.used.insert(key, used);
        if self.used.len() > self.limit + self.limit / 4 {
            self.forget_oldest();
        }
        true
    }

    /// Forgets the oldest clientOids whose orders were accepted or not placed.
    fn forget_oldest(&mut self) {
        let mut times: Vec<_> = self.used.values().map(|used| used.time_ms).collect();
        times.sort_unstable();
        let oldest_ms = times.get(times.len() / 4).copied().unwrap_or(i64::MIN);
        let forgotten_ms = &mut self.forgotten_ms;
        self.used.retain(|_, used| {
            let is_kept = matches!(
                used.state,
                Some(OrderState::MaybeSent | OrderState::Unknown)
            ) || used.time_ms > oldest_ms;
            if !is_kept {
                *forgotten_ms = (*forgotten_ms).max(Some(used.exchange_ms));
            }
            is_kept
        });
    }

    /// Returns the call, if it is in the table of calls.
    fn read_result(&mut self, line: &Line<'_>) -> Option<CallHandle> {
        let id = (self.runs.get_index_of(line.run.as_ref())?, line.call);
        let open = self.open.get_mut(&id)?;
        open.call.has_outcome = true;
        if line.reason.as_deref() == Some(Reason::OrderRepeated.as_str()) {
            // The exchange had an earlier order with this clientOid, and a lookup did not show that it is the same.
            open.call.lookups.clear();
        }
        let handle = open.handle;
        for (position, key) in &open.keys {
            let oid = open.call.client_oids.get(*position);
            let state = match line.outcome_of(oid.map_or("", String::as_str)) {
                Some("accepted") => Some(OrderState::Accepted),
                Some("not_sent" | "rejected") => None,
                _ => continue,
            };
            if let Some(used) = self.used.get_mut(key)
                && used.by == id
            {
                used.state = state;
            }
        }
        // Otherwise a later line of the call can have the result.
        if let Some("accepted" | "not_sent" | "rejected") = line.outcome.as_deref() {
            self.open.remove(&id);
        }
        handle
    }

    /// Completes a call that may have placed orders: those that cannot be looked up are unknown.
    fn close(&mut self, id: CallId, mut open: Open) -> Open {
        for (position, key) in &open.keys {
            let Some(used) = self.used.get_mut(key) else {
                continue;
            };
            if used.by != id || used.state != Some(OrderState::MaybeSent) {
                continue;
            }
            let oid = open.call.client_oids.get(*position);
            let mut lookups = open.call.lookups.iter();
            match lookups.find(|lookup| Some(&lookup.client_oid) == oid) {
                Some(lookup) => open.call.open.push((lookup.clone(), *key)),
                None => used.state = Some(OrderState::Unknown),
            }
        }
        open
    }

    /// Records what lookups have found about an order of a call that was `maybe_sent`.
    fn read_resolution(&mut self, line: &Line<'_>) {
        let Some(run) = self.runs.get_index_of(line.run.as_ref()) else {
            return;
        };
        let id = (run, line.call);
        let (Some(open), Some(client_oid)) = (self.open.get_mut(&id), &line.client_oid) else {
            return;
        };
        open.call
            .lookups
            .retain(|lookup| lookup.client_oid != *client_oid);
        let oids = &open.call.client_oids;
        let is_of = |(position, _): &&(usize, ClaimKey)| {
            oids.get(*position).is_some_and(|oid| oid == client_oid)
        };
        if let Some((_, key)) = open.keys.iter().find(is_of)
            && let Some(used) = self.used.get_mut(key)
            && used.by == id
        {
            used.state = match line.state.as_deref() {
                Some("placed") => Some(OrderState::Accepted),
                Some("absent") => None,
                _ => Some(OrderState::Unknown),
            };
        }
    }
}

/// When this broker first started, or a gap was accepted; `None` if the file is missing. Unreadable: long ago.
fn read_state(state_dir: &Path) -> Option<State> {
    let unreadable = State {
        since_ms: 0,
        gap_ms: None,
    };
    match std::fs::read(state_dir.join(FILE)) {
        Ok(text) => Some(serde_json::from_slice(&text).unwrap_or(unreadable)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(_) => Some(unreadable),
    }
}

fn write_since(state_dir: &Path, since_ms: i64, gap_ms: Option<i64>) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(&State { since_ms, gap_ms })?;
    text.push(b'\n');
    state_file::replace(state_dir, FILE, &text)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::PathBuf;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::super::{KnownState, OrderSettings, Repeated};
    use super::*;
    use crate::kucoin::{Method, Target, UnsignedRequest};

    const DAY_MS: i64 = 24 * 3600 * 1000;
    /// Earlier than the times of the files.
    const NOW_MS: i64 = 1_700_000_000_000;

    struct Site {
        folder: tempfile::TempDir,
        orders: Orders,
    }

    impl Site {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let settings = OrderSettings {
                window_s: 24 * 3600,
                claims: 1000,
                claims_per_bot: None,
            };
            let orders = Orders::new(settings, 1, folder.path());
            Self { folder, orders }
        }

        /// A broker that has run for long.
        fn old() -> Self {
            let site = Self::new();
            write_since(site.folder.path(), 0, None).unwrap();
            site
        }

        fn write(&self, name: &str, lines: &[String]) -> PathBuf {
            let path = self.folder.path().join(name);
            std::fs::write(&path, lines.concat()).unwrap();
            path
        }

        fn read(&self) -> Vec<EarlierCall> {
            let file = &self.folder.path().join("audit.jsonl");
            let run = "current";
            self.orders.read_log(&AuditLog { file, run }, NOW_MS)
        }

        /// What is known about an order; `None` if its clientOid is free.
        fn state(&self, oid: &str) -> Option<OrderState> {
            let body = format!("{{\"clientOid\":\"{oid}\"}}");
            let request = UnsignedRequest {
                account: "main".parse().unwrap(),
                scope: Scope::SpotMargin,
                method: Method::Post,
                target: Target::new("/api/v1/hf/orders", Vec::new()).unwrap(),
                body: body.into(),
                id: "r".parse().unwrap(),
                body_client_oids: vec![oid.to_owned()],
            };
            let endpoint = request.endpoint();
            let checked = self.orders.check(&request, endpoint, NOW_MS);
            checked.err().map(|repeated: Box<Repeated>| repeated.state)
        }
    }

    fn intent(run: &str, call: u64, time_ms: i64, oid: &str) -> String {
        format!(
            "{{\"v\":1,\"event\":\"intent\",\"time_ms\":{time_ms},\"run\":\"{run}\",\"call\":{call},\"request_id\":\"r{call}\",\
             \"bot\":\"spiffe://demo.test/bot/maker\",\"account\":\"main\",\"scope\":\"spot-margin\",\
             \"endpoint\":\"spot.post.v1-hf-orders\",\"body_sha256\":\"00\",\"client_oids\":[\"{oid}\"],\
             \"lookup\":[{{\"endpoint\":\"spot.get.v1-hf-orders-client-order-client-oid\",\"client_oid\":\"{oid}\",\
             \"symbol\":\"BTC-USDT\"}}]}}\n"
        )
    }

    /// The same line with a number, as written by `by_run`.
    fn numbered(line: &str, by_run: &str, seq: u64) -> String {
        line.replace(
            "{\"v\":1,",
            &format!("{{\"v\":2,\"by_run\":\"{by_run}\",\"seq\":{seq},"),
        )
    }

    fn result(event: &str, run: &str, call: u64, time_ms: i64, outcome: &str) -> String {
        format!(
            "{{\"v\":1,\"event\":\"{event}\",\"time_ms\":{time_ms},\"run\":\"{run}\",\"call\":{call},\"outcome\":\"{outcome}\"}}\n"
        )
    }

    fn outcome(run: &str, call: u64, time_ms: i64, outcome: &str) -> String {
        result("outcome", run, call, time_ms, outcome)
    }

    #[test]
    fn clientoid_belongs_to_the_call_that_used_it_last_also_if_older_lines_are_read_again() {
        let site = Site::new();
        let start = NOW_MS - 1000;
        let first = [
            intent("a", 1, start, "x"),
            outcome("a", 1, start + 1, "not_sent"),
        ];
        let second = [
            intent("a", 2, start + 2, "x"),
            outcome("a", 2, start + 3, "accepted"),
        ];
        site.write("audit.jsonl", &[first.clone(), second].concat());
        // A copy from before the second call, and the lines of a reserve, in a file that sorts after it.
        site.write("audit.jsonl.bak", &first);
        let mut again = vec![outcome("a", 9, start + 4, "accepted")];
        again.extend(first);
        site.write("audit.jsonl.later", &again);
        assert!(site.read().is_empty());
        assert_eq!(site.orders.readiness(), Readiness::Ready);
        assert_eq!(site.state("x"), Some(OrderState::Accepted));
    }

    #[test]
    fn results_decide_about_claims_and_calls_without_one_are_returned() {
        let site = Site::new();
        let start = NOW_MS - 1000;
        let mut lines = Vec::new();
        for (call, (oid, events)) in (1..).zip([
            ("accepted", vec![("outcome", "accepted")]),
            ("rejected", vec![("outcome", "rejected")]),
            ("lost", vec![("outcome", "maybe_sent")]),
            (
                "late",
                vec![("outcome", "maybe_sent"), ("late_answer", "rejected")],
            ),
            ("open", vec![]),
        ]) {
            lines.push(intent("a", call, start, oid));
            for (event, outcome) in events {
                lines.push(result(event, "a", call, start + 1, outcome));
            }
        }
        lines.push(intent("current", 1, start, "mine"));
        site.write("audit.jsonl", &lines);
        let calls = site.read();
        let open = |call: &EarlierCall| {
            let orders = call.open_orders();
            let oids: Vec<_> = orders.map(|(order, _)| order.client_oid.clone()).collect();
            (call.has_outcome, oids.concat())
        };
        let mut calls: Vec<_> = calls.iter().map(open).collect();
        calls.sort();
        let (lost, open) = ("lost".to_owned(), "open".to_owned());
        assert_eq!(calls, [(false, open), (true, lost)]);
        let states =
            ["accepted", "rejected", "lost", "late", "open", "mine"].map(|oid| site.state(oid));
        let (accepted, maybe) = (Some(OrderState::Accepted), Some(OrderState::MaybeSent));
        assert_eq!(states, [accepted, None, maybe, None, maybe, None]);
    }

    #[test]
    fn client_oid_that_was_free_again_can_be_used_later_also_if_the_system_clock_was_set_back() {
        let site = Site::new();
        let start = NOW_MS - 10_000;
        site.write(
            "audit.jsonl",
            &[
                intent("a", 1, start, "x"),
                outcome("a", 1, start + 1, "rejected"),
                intent("a", 2, start - 5000, "x"),
                outcome("a", 2, start - 4999, "accepted"),
            ],
        );
        site.read();
        assert_eq!(site.state("x"), Some(OrderState::Accepted));
    }

    #[test]
    fn calls_of_a_run_are_in_the_order_of_their_numbers_whatever_the_clock_and_the_files() {
        let site = Site::new();
        let start = NOW_MS - 10_000;
        site.write(
            "audit.jsonl.1",
            &[
                intent("a", 1, start, "x"),
                outcome("a", 1, start + 1, "rejected"),
            ],
        );
        // Written later, after the clock was set back, and read first.
        site.write(
            "audit.jsonl",
            &[
                intent("a", 2, start - 5000, "x"),
                outcome("a", 2, start - 4999, "accepted"),
            ],
        );
        site.read();
        assert_eq!(site.state("x"), Some(OrderState::Accepted));
    }

    #[test]
    fn complete_line_replaces_one_that_was_cut_off() {
        let site = Site::new();
        let start = NOW_MS - 10_000;
        let torn = |call: u64, oid: &str| {
            let line = intent("a", call, start, oid);
            let (line, _) = line.split_once(",\"lookup\"").unwrap();
            format!("{line},\"torn\":true}}\n")
        };
        site.write(
            "audit.jsonl",
            &[
                torn(1, "x"),
                intent("a", 1, start + 1, "x"),
                outcome("a", 1, start + 2, "not_sent"),
                torn(2, "y"),
                intent("a", 2, start + 1, "y"),
            ],
        );
        let calls = site.read();
        assert_eq!(site.state("x"), None);
        assert_eq!(site.state("y"), Some(OrderState::MaybeSent));
        assert_eq!(calls.len(), 1);
        assert_eq!(calls[0].open_orders().count(), 1);
    }

    #[test]
    fn partly_compressed_copy_of_a_complete_file_is_no_gap() {
        let site = Site::new();
        let line = intent("a", 1, NOW_MS - 1000, "x");
        site.write("audit.jsonl.1", std::slice::from_ref(&line));
        let mut compressed = GzEncoder::new(Vec::new(), Compression::default());
        std::io::Write::write_all(&mut compressed, line.repeat(1000).as_bytes()).unwrap();
        let compressed = compressed.finish().unwrap();
        let half = &compressed[..compressed.len() - 12];
        std::fs::write(site.folder.path().join("audit.jsonl.1.gz"), half).unwrap();
        site.read();
        assert_eq!(site.orders.readiness(), Readiness::Ready);
        std::fs::remove_file(site.folder.path().join("audit.jsonl.1")).unwrap();
        site.read();
        assert_eq!(site.orders.readiness(), Readiness::Gap);
    }

    #[test]
    fn orders_are_known_also_after_their_account_got_a_key_of_another_kucoin_account() {
        let site = Site::new();
        let intent = intent("a", 1, NOW_MS - 1000, "x")
            .replace("\"client_oids\"", "\"uid\":\"1\",\"client_oids\"");
        let outcome = outcome("a", 1, NOW_MS - 999, "accepted");
        site.write("audit.jsonl", &[intent, outcome]);
        site.read();
        let (main, scope) = ("main".parse().unwrap(), Scope::SpotMargin);
        site.orders.learn_uid(&main, scope, "2");
        assert_eq!(site.state("x"), Some(OrderState::Accepted));
        let known = |oid: &str, now_ms: i64| {
            let known = site.orders.known_order(&main, scope, oid, now_ms);
            known.state
        };
        assert_eq!(known("x", NOW_MS), KnownState::Accepted);
        assert_eq!(known("other", NOW_MS), KnownState::NotPlaced);
        // The exchange's time is not known yet.
        assert_eq!(known("x", 0), KnownState::Accepted);
        assert_eq!(known("other", 0), KnownState::Unknown);
    }

    #[test]
    fn orders_without_a_lookup_or_after_an_unclear_one_are_unknown_and_are_not_looked_up_again() {
        let site = Site::new();
        let start = NOW_MS - 1000;
        let resolved = |call: u64, oid: &str, state: &str| {
            result("resolved", "a", call, start + 2, "maybe_sent").replace(
                "\"outcome\":\"maybe_sent\"",
                &format!("\"client_oid\":\"{oid}\",\"state\":\"{state}\""),
            )
        };
        let repeated = result("outcome", "a", 5, start + 1, "none")
            .replace("\"outcome\":\"none\"", "\"reason\":\"ORDER_REPEATED\"");
        let mut lines = vec![
            intent("a", 1, start, "old").replace("\"lookup\"", "\"other\""),
            intent("a", 5, start, "repeated"),
            repeated,
        ];
        for (call, state) in [(2, "placed"), (3, "absent"), (4, "unknown")] {
            lines.push(intent("a", call, start, state));
            lines.push(outcome("a", call, start + 1, "maybe_sent"));
            lines.push(resolved(call, state, state));
        }
        site.write("audit.jsonl", &lines);
        let calls = site.read();
        assert!(calls.iter().all(|call| call.open_orders().count() == 0));
        assert_eq!(calls.len(), 1);
        let states = ["old", "repeated", "placed", "absent", "unknown"].map(|oid| site.state(oid));
        let (accepted, unknown) = (Some(OrderState::Accepted), Some(OrderState::Unknown));
        assert_eq!(states, [unknown, unknown, accepted, None, unknown]);
    }

    #[test]
    fn line_that_is_missing_between_others_of_its_run_is_a_gap() {
        let start = NOW_MS - 1000;
        let line = |seq: u64| numbered(&intent("a", seq, start, &format!("x{seq}")), "a", seq);
        let other = numbered(&outcome("a", 3, start + 1, "maybe_sent"), "b", 1);
        let readiness = |lines: &[String], again: &[String]| {
            let site = Site::new();
            site.write("audit.jsonl.1", lines);
            site.write("audit.jsonl", again);
            site.read();
            site.orders.readiness()
        };
        let lines = [line(3), line(4), line(5)];
        assert_eq!(
            readiness(&lines, &[other.clone(), line(6)]),
            Readiness::Ready
        );
        // Read in a wrong order, and twice.
        assert_eq!(
            readiness(&[line(5), line(6), line(4)], &[line(3), line(4), other]),
            Readiness::Ready
        );
        assert_eq!(readiness(&lines, &[line(7)]), Readiness::Gap);
    }

    #[test]
    fn file_that_cannot_be_read_is_a_gap_and_hides_no_newer_one() {
        let site = Site::new();
        site.write("audit.jsonl.2.gz", &["not gzip".to_owned()]);
        site.write("audit.jsonl.1.zst", &["\u{28}\u{b5}binary\n".to_owned()]);
        site.write("audit.jsonl", &[intent("a", 1, NOW_MS - 1000, "x")]);
        site.read();
        assert_eq!(site.orders.readiness(), Readiness::Gap);
        assert_eq!(site.state("x"), Some(OrderState::MaybeSent));
    }

    #[test]
    fn damaged_first_line_hides_no_other() {
        let site = Site::new();
        let damaged = "{\"v\":1,\"ev\0\0\n".to_owned();
        site.write(
            "audit.jsonl",
            &[damaged, intent("a", 1, NOW_MS - 1000, "x")],
        );
        site.read();
        assert_eq!(site.orders.readiness(), Readiness::Ready);
        assert_eq!(site.state("x"), Some(OrderState::MaybeSent));
    }

    #[test]
    fn missing_lines_are_a_gap_but_a_quiet_broker_has_none() {
        let site = Site::old();
        site.write("audit.jsonl", &[intent("a", 1, NOW_MS - 1000, "x")]);
        site.read();
        assert_eq!(site.orders.readiness(), Readiness::Gap);
        assert!(site.orders.accept_gap(NOW_MS).unwrap());
        assert_eq!(site.orders.readiness(), Readiness::Ready);

        let quiet = Site::old();
        let old = quiet.write("audit.jsonl.1", &[intent("a", 1, NOW_MS - 3 * DAY_MS, "x")]);
        let time = UNIX_EPOCH + Duration::from_millis(u64::try_from(NOW_MS - 3 * DAY_MS).unwrap());
        File::options()
            .append(true)
            .open(old)
            .unwrap()
            .set_modified(time)
            .unwrap();
        quiet.write("audit.jsonl", &[]);
        quiet.read();
        assert_eq!(quiet.orders.readiness(), Readiness::Ready);
        assert_eq!(quiet.state("x"), None);
    }
}
