//! Cancels all open orders, over the normal request path: what `halt --cancel-all` does once new risk is refused.
//!
//! Each kind of order has its own cancel requests and its own list, see [`crate::kucoin::open_orders`]. Orders are reported
//! as open according to the final lists and not to the answers to the cancel requests, since the exchange cancels
//! asynchronously.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::join_all;
use serde_json::{Map, Value};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::key_test::{Ask, Check};
use crate::base::ids::{AccountId, AdminId, Principal};
use crate::base::lock::Mutex;
use crate::base::outcome::Outcome;
use crate::base::text::clean;
use crate::broker::{Broker, BrokerError};
use crate::budgets::NoBudget;
use crate::kucoin::code::{self, KEY_REFUSED};
use crate::kucoin::open_orders::{
    Group, KINDS, Kind, List, PAGE, PAGES, is_over, items, list, name,
};
use crate::kucoin::{Answer, Method, Scope, advice};
use crate::policy::Account;

/// Time limit of a run; open orders that are not known by then are reported as unknown.
pub(crate) const WITHIN: Duration = Duration::from_secs(90);

/// How long an accepted request may take to show in the exchange's lists. An assumption: KuCoin documents no limit. An order
/// that shows up later is left for the next halt.
const LIST_DELAY: Duration = Duration::from_millis(500);

/// How many rounds to read the lists and cancel open orders again, once no calls are in flight.
const ROUNDS: u32 = 6;

/// Pause between the first two of these rounds; doubles before each further one, since cancels are asynchronous.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// How often to cancel known open orders again while calls are in flight.
const REPEAT_EVERY: Duration = Duration::from_secs(1);

/// How long to wait if the exchange limits the rate without naming a wait.
const BUSY: Duration = Duration::from_secs(1);

/// Requests of all accounts together that may be sent at once, and the time between two after that: at most 400 in any 10 s,
/// since the exchange's edge blocks an address for half a minute at 500. Source: KuCoin API documentation, "Rate Limit", 2023.
const BURST: (u32, Duration) = (150, Duration::from_millis(40));

/// Requests of one kind that are reported individually, so that the report fits into a message however many orders are listed.
const REPORTED: usize = 200;

/// Topics of the rejections that mean that this key can have no such orders.
const NOT_ALLOWED: [&str; 3] = [
    "margin-not-enabled",
    "not-a-unified-account",
    "permission-missing",
];

/// The result for the open orders of one account in one scope.
#[derive(Debug)]
pub(crate) struct Cancelled {
    /// The account.
    pub(crate) account: AccountId,
    /// The scope.
    pub(crate) scope: Scope,
    /// The requests and their results.
    pub(crate) checks: Vec<Check>,
    /// How many orders are still open; `None` if unknown.
    pub(crate) still_open: Option<u64>,
}

/// Why the open orders are unknown.
#[derive(Clone, Debug)]
enum ListError {
    /// The key can have no orders of this kind.
    NotAllowed(String),
    /// No key is available, or the exchange rejects it: every further request would fail, too.
    NoKey(String),
    /// The site of the account does not have this endpoint.
    NotServed,
    /// The next try may succeed.
    Unknown(String),
}

/// The state of one kind of order in a run.
#[derive(Debug)]
struct CancelRun {
    kind: &'static Kind,
    /// The open orders at the last read of the list.
    open: BTreeMap<Group, u64>,
    /// Why the last read was incomplete.
    list_error: Option<ListError>,
    /// The last result of each cancel request.
    cancels: BTreeMap<String, Check>,
}

/// The run of one account.
struct Halt<'h> {
    broker: &'h Arc<Broker>,
    principal: Principal,
    account: &'h Account,
    pace: &'h Pacer,
    until: Instant,
}

impl Broker {
    /// Cancels every open order of one account, or of all, in every scope that has a key, and counts the orders still open.
    /// The accounts must be halted first: the run stops once they are resumed. The broker does not stop meanwhile, within the
    /// limit of a drain.
    pub(crate) async fn cancel_all(
        self: &Arc<Self>,
        admin: &AdminId,
        account: Option<&Account>,
    ) -> Vec<Cancelled> {
        let _running = self.calls.delay_drain();
        let (policy, pace) = (self.policy(), Pacer::new(Instant::now()));
        let until = Instant::now() + WITHIN;
        let accounts = policy
            .accounts()
            .filter(|entry| account.is_none_or(|one| one.id == entry.id));
        let halts: Vec<_> = accounts
            .map(|account| Halt {
                broker: self,
                principal: Principal::Admin(admin.clone()),
                account,
                pace: &pace,
                until,
            })
            .collect();
        let scopes = halts.iter().flat_map(|halt| {
            let scopes = halt.account.keys.keys();
            scopes.map(move |scope| halt.cancel_scope_caught(*scope))
        });
        join_all(scopes).await
    }
}

impl Halt<'_> {
    /// Catches a panic, so that a defect in one scope does not stop the others.
    async fn cancel_scope_caught(&self, scope: Scope) -> Cancelled {
        let cancelled = AssertUnwindSafe(self.cancel_scope(scope))
            .catch_unwind()
            .await;
        cancelled.unwrap_or_else(|_| Cancelled {
            account: self.account.id.clone(),
            scope,
            checks: vec![Check {
                request: "all requests".to_owned(),
                is_ok: false,
                result:
                    "internal error; see the broker's log, and cancel the orders on KuCoin's site"
                        .to_owned(),
            }],
            still_open: None,
        })
    }

    async fn cancel_scope(&self, scope: Scope) -> Cancelled {
        let of_scope = KINDS.iter().filter(|kind| kind.scope == scope);
        let mut all: Vec<_> = of_scope.map(CancelRun::new).collect();
        join_all(all.iter_mut().map(|one| self.cancel_at_once(one))).await;
        let (calls, account) = (&self.broker.calls, &self.account.id);
        let patience = Instant::now() + self.broker.egress.answer_timeout();
        let mut rounds = 0;
        loop {
            // Checked before the lists are read: a call in flight may place an order after that.
            let is_quiescent = calls.is_quiescent(account) || Instant::now() >= patience;
            if is_quiescent {
                if rounds == 0 {
                    sleep(LIST_DELAY).await;
                }
                rounds += 1;
            }
            join_all(all.iter_mut().map(|one| self.read_open(one))).await;
            let is_over = Instant::now() >= self.until || rounds == ROUNDS;
            let is_lifted = !self.broker.restrictions.is_halted(account);
            if is_over || is_lifted || (is_quiescent && all.iter().all(CancelRun::is_settled)) {
                break;
            }
            join_all(all.iter_mut().map(|one| self.cancel_again(one))).await;
            if is_quiescent {
                sleep(FIRST_PAUSE * 2_u32.pow(rounds - 1)).await;
            } else {
                let _ = timeout(REPEAT_EVERY, calls.quiescent(account)).await;
            }
        }
        Cancelled {
            account: account.clone(),
            scope,
            still_open: all.iter().map(CancelRun::still_open).sum(),
            checks: checks(&all),
        }
    }

    /// The first cancel; reads the list first only if there is no request that cancels all orders of the kind.
    async fn cancel_at_once(&self, run: &mut CancelRun) {
        if run.kind.whole.is_none() {
            self.read_open(run).await;
        }
        self.cancel_again(run).await;
    }

    async fn cancel_kind(&self, run: &mut CancelRun) {
        if let Some(path) = run.kind.whole {
            self.cancel(run, Method::Delete, path, None).await;
        }
    }

    /// Cancels again unless nothing is left to cancel.
    async fn cancel_again(&self, run: &mut CancelRun) {
        if run.is_settled() {
            return;
        }
        self.cancel_kind(run).await;
        if let Some((method, path)) = run.kind.by_symbol {
            let groups: Vec<_> = run.open.keys().cloned().collect();
            for group in groups {
                self.cancel(run, method, path, Some(group)).await;
            }
        }
    }

    async fn cancel(
        &self,
        run: &mut CancelRun,
        method: Method,
        path: &'static str,
        group: Option<Group>,
    ) {
        let names = run.kind.names.iter();
        let mut names: Vec<_> = names
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        if let Some(group) = group {
            names.push(("symbol".to_owned(), group.symbol));
            names.extend(
                group
                    .margin_mode
                    .map(|mode| ("marginMode".to_owned(), mode)),
            );
        }
        let request = request(method, path, &names);
        let mut ask = Ask::get(path);
        ask.method = method;
        if method == Method::Post {
            let fields = names
                .into_iter()
                .map(|(name, value)| (name, Value::from(value)));
            ask.body = Bytes::from(Value::Object(fields.collect::<Map<_, _>>()).to_string());
        } else {
            ask.query = names;
        }
        let (is_ok, result) = match self.ask(run.kind.scope, ask).await {
            Ok(_) => (true, "accepted".to_owned()),
            Err(ListError::NotServed) => return,
            Err(
                ListError::NoKey(problem)
                | ListError::NotAllowed(problem)
                | ListError::Unknown(problem),
            ) => (false, problem),
        };
        let check = Check {
            request: request.clone(),
            is_ok,
            result,
        };
        run.cancels.insert(request, check);
    }

    /// Reads the list of open orders.
    async fn read_open(&self, run: &mut CancelRun) {
        let mut open = BTreeMap::new();
        let read = match run.kind.list {
            List::Paged {
                path,
                number,
                names,
            } => {
                let names = run.kind.names.iter().chain(names);
                let ask = names.fold(Ask::get(path), |ask, (name, value)| ask.with(name, value));
                self.read_pages(run.kind, &ask, number, &mut open).await
            }
            List::PerSymbol { symbols, path } => {
                self.read_symbols(run.kind, symbols, path, &mut open).await
            }
        };
        run.open = open;
        run.list_error = read.err();
    }

    async fn read_pages(
        &self,
        kind: &Kind,
        ask: &Ask,
        number: &str,
        open: &mut BTreeMap<Group, u64>,
    ) -> Result<(), ListError> {
        let ask = ask.clone().with("pageSize", &PAGE.to_string());
        let mut read = Ok(());
        for page in 1..=PAGES {
            let ask = ask.clone().with(number, &page.to_string());
            let data = self.list(kind.scope, ask).await?;
            let items = items(&data, "items").ok_or_else(unexpected)?;
            for item in items.iter().filter(|item| !is_over(item)) {
                match Group::of(kind, item) {
                    Some(group) => *open.entry(group).or_default() += 1,
                    // The other orders can still be cancelled.
                    None => read = Err(unexpected()),
                }
            }
            let is_last = match data.get("totalPage").and_then(Value::as_u64) {
                Some(pages) => page as u64 >= pages,
                None => items.len() < PAGE,
            };
            if is_last {
                return read;
            }
        }
        let read = PAGE * PAGES;
        Err(ListError::Unknown(format!(
            "the list has more than {read} orders, the most that the broker reads"
        )))
    }

    async fn read_symbols(
        &self,
        kind: &Kind,
        symbols: &'static str,
        path: &'static str,
        open: &mut BTreeMap<Group, u64>,
    ) -> Result<(), ListError> {
        let names = || kind.names.iter();
        let with = |path| names().fold(Ask::get(path), |ask, (name, value)| ask.with(name, value));
        let data = self.list(kind.scope, with(symbols)).await?;
        let mut read = Ok(());
        for symbol in items(&data, "symbols").ok_or_else(unexpected)? {
            let Some(symbol) = name(symbol) else {
                read = Err(unexpected());
                continue;
            };
            let group = Group {
                symbol: symbol.to_owned(),
                margin_mode: None,
            };
            let ask = with(path).with("symbol", symbol);
            let listed = self.list(kind.scope, ask).await;
            // If this list fails, the symbol is still known, and its orders can be cancelled.
            let count = |data: Value| Ok(list(&data).ok_or_else(unexpected)?.len() as u64);
            match listed.and_then(count) {
                Ok(0) => {}
                Ok(count) => {
                    open.insert(group, count);
                }
                Err(list_error) => {
                    open.insert(group, 0);
                    read = Err(list_error);
                }
            }
        }
        read
    }

    fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// Waits; false if the account is resumed meanwhile, which ends the run.
    async fn pause(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        while Instant::now() < end {
            sleep_until(end.min(Instant::now() + REPEAT_EVERY)).await;
            if !self.broker.restrictions.is_halted(&self.account.id) {
                return false;
            }
        }
        true
    }

    /// Requests a list. An answer without `data` is an error, not an empty list.
    async fn list(&self, scope: Scope, ask: Ask) -> Result<Value, ListError> {
        self.ask(scope, ask).await?.ok_or_else(unexpected)
    }

    /// Sends one request and returns `data` of an accepted answer. Repeats the request while the exchange limits the rate.
    async fn ask(&self, scope: Scope, ask: Ask) -> Result<Option<Value>, ListError> {
        loop {
            let turn = self.pace.next(Instant::now());
            if turn > self.until {
                return Err(ListError::Unknown(format!(
                    "the time limit of {} s was reached",
                    WITHIN.as_secs()
                )));
            }
            sleep_until(turn).await;
            let (principal, account) = (self.principal.clone(), &self.account.id);
            let asked = self
                .broker
                .send_internal(principal, account, scope, ask.clone(), None);
            let answer = match asked.await {
                Ok(receipt) => receipt.answer,
                Err(BrokerError::Denied(_)) => return Err(ListError::NotServed),
                Err(error @ BrokerError::Key(_)) => {
                    return Err(ListError::NoKey(error.to_string()));
                }
                // The broker holds back what the exchange would reject.
                Err(BrokerError::NoBudget(NoBudget::RateLimited(limited)))
                    if limited.retry_after < self.left() =>
                {
                    if self.pause(limited.retry_after).await {
                        continue;
                    }
                    return Err(ListError::Unknown(limited.to_string()));
                }
                Err(error) => return Err(ListError::Unknown(error.of_repeatable_request())),
            };
            if answer.outcome == Outcome::Accepted {
                let body: Option<Value> = serde_json::from_slice(&answer.body).ok();
                return Ok(body.and_then(|mut body| Some(body.get_mut("data")?.take())));
            }
            match retry_after(&answer) {
                Some(wait) if wait < self.left() && self.pause(wait).await => {}
                _ => return Err(refused(scope, &answer)),
            }
        }
    }
}

/// How long to wait before sending the same request again; `None` if it should not be sent again.
fn retry_after(answer: &Answer) -> Option<Duration> {
    let is_busy = code::BUSY.contains(&answer.code.as_str());
    answer.retry_after.or(is_busy.then_some(BUSY))
}

fn refused(scope: Scope, answer: &Answer) -> ListError {
    let (code, msg) = (answer.code.as_str(), answer.msg.as_str());
    let advice = advice::of_message(scope, code, msg);
    let message = match (advice, code) {
        (Some(advice), _) => format!("{code}: {}", advice.meaning),
        (None, "") => format!("HTTP {}", answer.http_status.as_u16()),
        // Text of the exchange is shown in a terminal.
        (None, _) => {
            format!("{} {}", clean(code, 64), clean(msg, 200))
        }
    };
    match advice {
        Some(advice) if NOT_ALLOWED.contains(&advice.topic) => ListError::NotAllowed(message),
        _ if KEY_REFUSED.contains(&code) => ListError::NoKey(message),
        _ => ListError::Unknown(message),
    }
}

fn unexpected() -> ListError {
    ListError::Unknown("unexpected answer to the list request".to_owned())
}

fn request(method: Method, path: &str, names: &[(String, String)]) -> String {
    let mut request = format!("{method} {path}");
    for (name, value) in names {
        let _ = write!(request, " {name}={value}");
    }
    request
}

impl CancelRun {
    fn new(kind: &'static Kind) -> Self {
        Self {
            kind,
            open: BTreeMap::new(),
            list_error: Some(ListError::Unknown("list not read yet".to_owned())),
            cancels: BTreeMap::new(),
        }
    }

    /// Whether nothing is open, or the open orders cannot be cancelled.
    fn is_settled(&self) -> bool {
        match &self.list_error {
            None => self.open.is_empty(),
            Some(ListError::NotAllowed(_) | ListError::NoKey(_) | ListError::NotServed) => true,
            Some(ListError::Unknown(_)) => false,
        }
    }

    fn still_open(&self) -> Option<u64> {
        match &self.list_error {
            None | Some(ListError::NotAllowed(_) | ListError::NotServed) => {
                Some(self.open.values().sum())
            }
            Some(ListError::NoKey(_) | ListError::Unknown(_)) => None,
        }
    }

    /// Summary of the cancel requests that are not reported individually.
    fn others(&self) -> Option<Check> {
        let others: Vec<_> = self.cancels.values().skip(REPORTED).collect();
        let (_, path) = self.kind.by_symbol.filter(|_| !others.is_empty())?;
        let failed = others.iter().filter(|one| !one.is_ok).count();
        Some(Check {
            request: format!("{} more requests to {path}", others.len()),
            is_ok: failed == 0,
            result: format!("{failed} failed"),
        })
    }

    /// The final result of the list.
    fn listed(&self) -> Option<Check> {
        let (path, names) = match self.kind.list {
            List::Paged { path, names, .. } => (path, names),
            List::PerSymbol { path, .. } => (path, &[][..]),
        };
        let names = self.kind.names.iter().chain(names);
        let names: Vec<_> = names
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let open: u64 = self.open.values().sum();
        let result = match &self.list_error {
            None if open == 0 => "no open orders".to_owned(),
            None => format!("still open: {open}"),
            Some(ListError::NotServed) => return None,
            Some(ListError::NotAllowed(reason)) => {
                format!("not listed, because this key has no access to these orders ({reason})")
            }
            Some(ListError::NoKey(problem) | ListError::Unknown(problem)) => {
                format!("unknown: {problem}")
            }
        };
        Some(Check {
            request: request(Method::Get, path, &names),
            is_ok: self.list_error.is_none() && open == 0,
            result,
        })
    }
}

/// All requests and results, kind by kind; if no key is available, only that.
fn checks(all: &[CancelRun]) -> Vec<Check> {
    let without_key = all
        .iter()
        .find(|one| matches!(one.list_error, Some(ListError::NoKey(_))));
    if let Some(run) = without_key {
        return run.listed().into_iter().collect();
    }
    let of_each = all.iter().flat_map(|one| {
        let cancels = one.cancels.values().take(REPORTED).cloned();
        cancels.chain(one.others()).chain(one.listed())
    });
    of_each.collect()
}

/// Paces requests so that the exchange's edge does not block the address.
#[derive(Debug)]
struct Pacer(Mutex<Instant>);

impl Pacer {
    /// Allows a full burst at `now`.
    fn new(now: Instant) -> Self {
        let (burst, gap) = BURST;
        Self(Mutex::new(now.checked_sub(gap * burst).unwrap_or(now)))
    }

    /// Returns when the next request may be sent.
    fn next(&self, now: Instant) -> Instant {
        let (burst, gap) = BURST;
        let mut last = self.0.lock();
        let earliest = now.checked_sub(gap * burst).unwrap_or(now);
        *last = (*last + gap).max(earliest + gap);
        // The rest of the burst may be sent at once.
        (*last).max(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_is_bounded_however_many_orders_are_listed() {
        let by_symbol = |kind: &&Kind| kind.by_symbol.is_some();
        let mut run = CancelRun::new(KINDS.iter().find(by_symbol).unwrap());
        for number in 0..REPORTED + 5 {
            let check = Check {
                request: format!("{number:05}"),
                is_ok: number != REPORTED + 1,
                result: String::new(),
            };
            run.cancels.insert(check.request.clone(), check);
        }
        let reported = checks(&[run]);
        // The first ones, one summary of the others, and the list.
        assert_eq!(reported.len(), REPORTED + 2);
        let others = reported.get(REPORTED).unwrap();
        assert!(
            others.request.starts_with("5 more requests to /api/"),
            "{others:?}"
        );
        assert_eq!((others.is_ok, others.result.as_str()), (false, "1 failed"));
    }

    #[tokio::test]
    async fn burst_is_sent_at_once_and_at_most_400_requests_in_ten_seconds() {
        let start = Instant::now();
        let pace = Pacer::new(start);
        let ten_s = start + Duration::from_secs(10);
        let at_once = (0..150).filter(|_| pace.next(start) == start).count();
        assert_eq!(at_once, 150);
        let then = (0..1000).map(|_| pace.next(start));
        assert_eq!(then.filter(|at| *at <= ten_s).count(), 250);
        let later = start + Duration::from_secs(1000);
        assert_eq!((0..200).filter(|_| pace.next(later) == later).count(), 150);
    }
}
