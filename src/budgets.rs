//! Rate budgets: what may be sent to the exchange now, so that it rejects nothing for its rate limits.
//!
//! One budget for each pool of an account at KuCoin, shared by all bots of the account (`budgets/pool.rs`), and one for the egress
//! address (`budgets/edge.rs`). A request takes its weight before its intent is audited and before it has a connection. If it
//! does not fit, it waits here, or is refused. Waiting requests are sent in the order of [`Priority`].

mod edge;
mod pool;
mod rate;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::time::{Instant, sleep_until};

use crate::base::ids::{AccountId, BotId};
use crate::base::lock::Mutex;
use crate::clock::Clock;
use crate::kucoin::Scope;
use crate::kucoin::answer::RateLimit;
use crate::kucoin::cancel_scope::{CancelScope, PendingOrders};
use crate::kucoin::quota::{Cost, Pool};
use edge::Edge;
use pool::{Demand, PoolBudget, Ticket};
pub(crate) use pool::{Level, Priority};
use rate::Rate;

/// How often budgets of accounts that send nothing are removed.
const CLEAN_EVERY: Duration = Duration::from_secs(600);

/// When to ask again while cancels wait, which are sent first.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Who shares a quota at the exchange.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Subject {
    /// An account whose uid is not known yet.
    Account(AccountId),
    /// The egress address: the public pool.
    Address,
    /// An account of the exchange.
    Uid(String),
}

/// A request that needs a part of a budget.
#[derive(Clone, Debug)]
pub(crate) struct BudgetRequest {
    /// Whose quota it uses.
    pub(crate) subject: Subject,
    /// The account, as named in the rules.
    pub(crate) account: AccountId,
    /// The exchange's id of the account, if it is known.
    pub(crate) uid: Option<String>,
    /// What it takes.
    pub(crate) cost: Cost,
    /// The account's VIP level.
    pub(crate) vip: u8,
    /// The bot, and its weight among the bots of the account; `None` for admins and the broker itself.
    pub(crate) bot: Option<(BotId, u32)>,
    /// The requests that the bot may send per second, if the rules limit them.
    pub(crate) requests_per_s: Option<u32>,
    /// When it is sent, compared with others.
    pub(crate) priority: Priority,
}

/// The budget that is used up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Scarce {
    /// That of the bot alone: `requests_per_s` in the rules.
    Bot,
    /// That of the egress address.
    Edge,
    /// That of a pool.
    Pool(Pool),
}

/// A request does not fit into its budget in time.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{}; nothing was sent; repeat the request after {} ms", self.what(), self.retry_after.as_millis())]
pub(crate) struct RateLimited {
    scarce: Scarce,
    /// When it may fit.
    pub(crate) retry_after: Duration,
}

impl RateLimited {
    fn what(&self) -> String {
        match self.scarce {
            Scarce::Bot => {
                "the bot exceeded its limit of requests per second (requests_per_s in the rules)"
                    .to_owned()
            }
            Scarce::Edge => {
                "the exchange limits or blocks the requests of the broker's egress address"
                    .to_owned()
            }
            Scarce::Pool(pool) => format!(
                "the bot's part of the account's rate limit in pool {} is used up",
                pool.as_str()
            ),
        }
    }
}

/// Why a request got no part of a budget.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum NoBudget {
    /// A cancel that covers its orders came while it waited.
    #[error(
        "a cancel that covers this order came while the order waited for the rate limit; nothing was sent"
    )]
    Cancelled,
    /// It does not fit in time.
    #[error(transparent)]
    RateLimited(#[from] RateLimited),
}

/// The state of a pool that an account has used.
#[derive(Clone, Debug)]
pub(crate) struct UsedPool {
    pub(crate) account: AccountId,
    pub(crate) pool: Pool,
    pub(crate) level: Level,
    /// Requests that wait for it.
    pub(crate) waiting: usize,
}

/// All budgets.
#[derive(Debug)]
pub(crate) struct Budgets {
    clock: Arc<Clock>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pools: HashMap<PoolKey, Entry>,
    /// Bots whose requests per second are limited.
    rates: HashMap<BotId, Rate>,
    edge: Edge,
    /// Requests that have waited.
    waited: u64,
    /// Cancels that wait.
    cancels_waiting: usize,
    /// The orders of requests that wait, or have waited and do not go on yet.
    pending: HashMap<u64, Pending>,
    cleaned: Duration,
}

type PoolKey = (Subject, Pool);

/// A request that waits.
#[derive(Debug)]
struct Pending {
    account: AccountId,
    /// The exchange's id of the account, if it is known.
    uid: Option<String>,
    orders: Option<PendingOrders>,
    is_cancelled: bool,
}

#[derive(Debug)]
struct Entry {
    /// The accounts that have used it, and the quotas of their VIP levels.
    accounts: BTreeMap<AccountId, u64>,
    budget: PoolBudget,
    /// In the order in which they are sent.
    waiting: BTreeMap<(Priority, u64), Waiting>,
}

#[derive(Debug)]
struct Waiting {
    demand: Demand,
    granted: oneshot::Sender<Ticket>,
    /// Why it still waits, and until when at least.
    refusal: Refusal,
}

type Refusal = (Scarce, Duration);

/// The part of a budget that a request has taken. If the request is never sent, it is given back.
#[derive(Debug)]
#[must_use = "it is given back when it drops"]
pub(crate) struct Charge {
    budgets: Arc<Budgets>,
    key: PoolKey,
    demand: Demand,
    is_pool_assumed: bool,
    ticket: Ticket,
    sent_at: Option<Duration>,
    /// Whether its weight has been given back.
    is_given_back: bool,
}

/// A request that waits; dropping this ends its wait.
struct Place<'b> {
    budgets: &'b Budgets,
    key: &'b PoolKey,
    demand: &'b Demand,
    at: (Priority, u64),
    grant: oneshot::Receiver<Ticket>,
}

impl Budgets {
    /// Nothing has been sent yet. `edge_limit`: requests of the egress address per 10 s; `None`: no limit.
    pub(crate) fn new(edge_limit: Option<u64>, clock: Arc<Clock>) -> Self {
        Self {
            state: Mutex::new(State {
                pools: HashMap::new(),
                rates: HashMap::new(),
                edge: Edge::new(edge_limit),
                waited: 0,
                cancels_waiting: 0,
                pending: HashMap::new(),
                cleaned: clock.boot(),
            }),
            clock,
        }
    }

    /// Takes what a request needs, and waits for it for at most `patience`; a cancel waits for as long as it takes. `orders`: those
    /// that it places or amends; a cancel that covers one of them ends its wait.
    ///
    /// # Errors
    /// When it does not fit in time; at once if that is known. When it is cancelled.
    pub(crate) async fn take(
        self: &Arc<Self>,
        request: BudgetRequest,
        patience: Duration,
        orders: impl FnOnce() -> Option<PendingOrders>,
    ) -> Result<Charge, NoBudget> {
        let (key, account) = ((request.subject, request.cost.pool), request.account);
        let demand = Demand {
            bot: request.bot,
            priority: request.priority,
            weight: request.cost.weight,
            requests_per_s: request.requests_per_s,
        };
        let now = self.clock.boot();
        let give_up = now + patience;
        let quota = key.1.quota(request.vip);
        let first = {
            let mut state = self.state.lock();
            state.open(&key, &account, quota, now);
            state.first(&key, &demand, now)
        };
        let ticket = match first {
            Ok(ticket) => ticket,
            Err(refusal) => {
                let pending = Pending {
                    account,
                    uid: request.uid,
                    orders: orders(),
                    is_cancelled: false,
                };
                self.wait(&key, &demand, pending, refusal, give_up).await?
            }
        };
        Ok(Charge {
            budgets: Arc::clone(self),
            key,
            demand,
            is_pool_assumed: request.cost.is_pool_assumed,
            ticket,
            sent_at: None,
            is_given_back: false,
        })
    }

    async fn wait(
        &self,
        key: &PoolKey,
        demand: &Demand,
        pending: Pending,
        mut refusal: Refusal,
        give_up: Duration,
    ) -> Result<Ticket, NoBudget> {
        let (granted, grant) = oneshot::channel();
        let mut place = {
            let mut state = self.state.lock();
            state.waited += 1;
            state.cancels_waiting += usize::from(demand.priority == Priority::Cancel);
            let at = (demand.priority, state.waited);
            state.pending.insert(at.1, pending);
            let waiting = Waiting {
                demand: demand.clone(),
                granted,
                refusal,
            };
            if let Some(entry) = state.pools.get_mut(key) {
                entry.waiting.insert(at, waiting);
            }
            Place {
                budgets: self,
                key,
                demand,
                at,
                grant,
            }
        };
        loop {
            let (scarce, until) = refusal;
            let now = self.clock.boot();
            if demand.priority != Priority::Cancel && until > give_up {
                // It may have been granted just now.
                return match place.grant.try_recv() {
                    Ok(ticket) => self.go_on(&place, ticket),
                    Err(TryRecvError::Closed) => Err(NoBudget::Cancelled),
                    Err(TryRecvError::Empty) => Err(RateLimited {
                        scarce,
                        retry_after: until.saturating_sub(now),
                    }
                    .into()),
                };
            }
            tokio::select! {
                biased;
                granted = &mut place.grant => {
                    return match granted {
                        Ok(ticket) => self.go_on(&place, ticket),
                        Err(_) => Err(NoBudget::Cancelled),
                    };
                }
                () = sleep_until(Instant::now() + until.saturating_sub(now)) => {}
            }
            let now = self.clock.boot();
            let mut state = self.state.lock();
            // Another request may have served all of them just now.
            if state
                .refusal(key, place.at)
                .is_some_and(|(_, until)| until <= now)
            {
                state.serve(key, now);
            }
            refusal = state.refusal(key, place.at).unwrap_or(refusal);
        }
    }

    /// Lets a request go on that has waited, unless it was cancelled meanwhile. From here until the claim on its clientOids, nothing
    /// is awaited.
    fn go_on(&self, place: &Place<'_>, ticket: Ticket) -> Result<Ticket, NoBudget> {
        let mut state = self.state.lock();
        let pending = state.pending.get(&place.at.1);
        if pending.is_none_or(|pending| !pending.is_cancelled) {
            return Ok(ticket);
        }
        if let Some(entry) = state.pools.get_mut(place.key) {
            entry.budget.refund(ticket, place.demand);
        }
        Err(NoBudget::Cancelled)
    }

    /// Whether a request that waits places or amends an order with one of these clientOids.
    pub(crate) fn waits_with<'o>(
        &self,
        account: &AccountId,
        scope: Scope,
        oids: &[&'o str],
    ) -> Option<&'o str> {
        let state = self.state.lock();
        let orders = state
            .pending
            .values()
            .filter(|pending| pending.account == *account);
        let mut orders = orders.filter_map(|pending| pending.orders.as_ref());
        orders.find_map(|orders| oids.iter().find(|oid| orders.has(scope, oid)).copied())
    }

    /// Ends the wait of requests of the same account with orders that a cancel covers.
    pub(crate) fn cancel_waiting(&self, by: &BudgetRequest, cancel: &CancelScope) {
        let mut state = self.state.lock();
        let State { pending, pools, .. } = &mut *state;
        for (id, pending) in pending.iter_mut() {
            let is_covered = |orders: &PendingOrders| cancel.covers(orders);
            // The uid can have become known meanwhile, and accounts in the rules can share it.
            let is_same =
                pending.account == by.account || pending.uid.is_some() && pending.uid == by.uid;
            if is_same && pending.orders.as_ref().is_some_and(is_covered) {
                pending.is_cancelled = true;
                for entry in pools.values_mut() {
                    // Its sender drops, which ends the wait.
                    entry.waiting.retain(|(_, waiting), _| waiting != id);
                }
            }
        }
    }

    /// Charges a request that is sent once more, without waiting.
    fn charge_again(&self, key: &PoolKey, demand: &Demand) -> Option<Ticket> {
        let now = self.clock.boot();
        let mut state = self.state.lock();
        state.edge.count(now);
        let entry = state.pools.get_mut(key)?;
        Some(entry.budget.charge(demand, now))
    }

    /// The state of each pool that an account has used, sorted. Once the uid of an account is known, the budgets without it are not
    /// used any more.
    pub(crate) fn used(&self) -> Vec<UsedPool> {
        let now = self.clock.boot();
        let state = self.state.lock();
        let mut used = BTreeMap::new();
        for ((subject, pool), entry) in &state.pools {
            for account in entry.accounts.keys() {
                let has_uid = !matches!(subject, Subject::Account(_));
                let pool = UsedPool {
                    account: account.clone(),
                    pool: *pool,
                    level: entry.budget.level(now),
                    waiting: entry.waiting.len(),
                };
                let key = (account.clone(), pool.pool);
                if has_uid {
                    used.insert(key, pool);
                } else {
                    used.entry(key).or_insert(pool);
                }
            }
        }
        used.into_values().collect()
    }

    /// Requests per 10 s over all accounts; `None`: no limit.
    pub(crate) fn edge_limit(&self) -> Option<u64> {
        self.state.lock().edge.limit(self.clock.boot())
    }

    /// The edge of the exchange has blocked the egress address for `time`. Returns whether that is new.
    pub(crate) fn edge_blocked(&self, time: Duration) -> bool {
        let now = self.clock.boot();
        self.state.lock().edge.block(time, now)
    }

    /// How long the edge of the exchange still blocks the egress address.
    pub(crate) fn edge_blocked_for(&self) -> Option<Duration> {
        self.state.lock().edge.blocked_for(self.clock.boot())
    }
}

impl State {
    /// Makes the budget of a pool if there is none, and removes others that are not needed any more.
    fn open(&mut self, key: &PoolKey, account: &AccountId, quota: u64, now: Duration) {
        if now.saturating_sub(self.cleaned) > CLEAN_EVERY {
            self.cleaned = now;
            self.pools
                .retain(|_, entry| !entry.waiting.is_empty() || !entry.budget.is_idle(now));
            self.rates.retain(|_, rate| !rate.is_full(now));
        }
        if let Some(entry) = self.pools.get_mut(key) {
            if entry.accounts.get(account) != Some(&quota) {
                entry.accounts.insert(account.clone(), quota);
            }
            // Accounts with the same uid can have different levels in the rules; the highest one is right.
            let highest = entry.accounts.values().max().copied();
            entry.budget.set_quota(highest.unwrap_or(quota));
            return;
        }
        // What was counted before the uid of the account was known.
        let without_uid = (Subject::Account(account.clone()), key.1);
        let known = self
            .pools
            .get_mut(&without_uid)
            .map(|entry| &mut entry.budget);
        let known = known.map(|budget| std::mem::replace(budget, PoolBudget::new(quota)));
        let entry = Entry {
            accounts: BTreeMap::from([(account.clone(), quota)]),
            budget: known.unwrap_or_else(|| PoolBudget::new(quota)),
            waiting: BTreeMap::new(),
        };
        self.pools.insert(key.clone(), entry);
    }

    /// Takes what a new request needs, unless it does not fit or others wait before it.
    fn first(&mut self, key: &PoolKey, demand: &Demand, now: Duration) -> Result<Ticket, Refusal> {
        let mut others_wait = false;
        if let Some(entry) = self.pools.get_mut(key) {
            entry.budget.ask(demand, now);
            let mut waiting = entry.waiting.values();
            others_wait = !entry.waiting.is_empty();
            if waiting.any(|waiting| waiting.refusal.1 <= now) {
                self.serve(key, now);
            }
        }
        if others_wait {
            let entry = self.pools.get(key);
            let first = entry.and_then(|entry| entry.waiting.keys().next());
            if first.is_some_and(|(priority, _)| *priority == Priority::Cancel)
                && demand.priority != Priority::Cancel
            {
                return Err((Scarce::Pool(key.1), now + ASK_AGAIN_AFTER));
            }
        }
        self.take(key, demand, now)
    }

    fn take(&mut self, key: &PoolKey, demand: &Demand, now: Duration) -> Result<Ticket, Refusal> {
        let is_cancel = demand.priority == Priority::Cancel;
        if !is_cancel && self.cancels_waiting > 0 && self.edge.was_just_blocked(now) {
            return Err((Scarce::Edge, now + ASK_AGAIN_AFTER));
        }
        let mut rate = match (&demand.bot, demand.requests_per_s) {
            (Some((bot, _)), Some(per_s)) if !is_cancel => {
                let rate = self.rates.entry(bot.clone());
                let rate = rate.or_insert_with(|| Rate::new(per_s, now));
                rate.fill(per_s, now);
                if let Some(until) = rate.full_until() {
                    return Err((Scarce::Bot, until));
                }
                Some(rate)
            }
            _ => None,
        };
        let unknown = (Scarce::Pool(key.1), now + ASK_AGAIN_AFTER);
        let budget = &mut self.pools.get_mut(key).ok_or(unknown)?.budget;
        let edge = self.edge.check(demand.priority, now);
        edge.map_err(|until| (Scarce::Edge, until))?;
        let taken = budget.take(demand, now);
        let ticket = taken.map_err(|until| (Scarce::Pool(key.1), until))?;
        self.edge.take(demand.priority, now);
        if let Some(rate) = &mut rate {
            rate.take();
        }
        Ok(ticket)
    }

    /// Why a request still waits; `None`: it does not.
    fn refusal(&self, key: &PoolKey, at: (Priority, u64)) -> Option<Refusal> {
        let waiting = self.pools.get(key)?.waiting.get(&at)?;
        Some(waiting.refusal)
    }

    /// Grants waiting requests of a pool what fits, in their order. While a cancel waits, nothing else is granted.
    fn serve(&mut self, key: &PoolKey, now: Duration) {
        let Some(entry) = self.pools.get_mut(key) else {
            return;
        };
        let waiting = std::mem::take(&mut entry.waiting);
        let mut left = BTreeMap::new();
        let mut blocked_by = None;
        for (at, mut request) in waiting {
            if request.granted.is_closed() {
                continue;
            }
            let taken = match blocked_by {
                Some(refusal) => Err(refusal),
                None => self.take(key, &request.demand, now),
            };
            match taken {
                Ok(ticket) => {
                    if let Err(ticket) = request.granted.send(ticket)
                        && let Some(entry) = self.pools.get_mut(key)
                    {
                        entry.budget.refund(ticket, &request.demand);
                    }
                }
                Err(refusal) => {
                    if at.0 == Priority::Cancel {
                        blocked_by = Some(refusal);
                    }
                    request.refusal = refusal;
                    left.insert(at, request);
                }
            }
        }
        if let Some(entry) = self.pools.get_mut(key) {
            entry.waiting = left;
        }
    }
}

impl Charge {
    /// The request is being sent; each time after the first it takes its weight once more.
    pub(crate) fn begin_attempt(&mut self) {
        if self.sent_at.is_some() || std::mem::take(&mut self.is_given_back) {
            let again = self.budgets.charge_again(&self.key, &self.demand);
            self.ticket = again.unwrap_or(self.ticket);
        }
        self.sent_at = Some(self.budgets.clock.boot());
    }

    /// Applies the exchange's answer: `limit` is what its headers say about the pool.
    pub(crate) fn answered(&self, limit: Option<RateLimit>) {
        let Some(sent_at) = self.sent_at else { return };
        let limit = limit.filter(|_| !self.is_pool_assumed);
        self.change(|budget, ticket, now| budget.answered(ticket, limit, sent_at, now));
    }

    /// The exchange rejected the request because the pool is empty until `reset`. If the pool is assumed, it is another one.
    pub(crate) fn used_up(&self, reset: Duration) {
        if !self.is_pool_assumed {
            self.change(|budget, ticket, now| budget.use_up(ticket, reset, now));
        }
    }

    /// The exchange rejects all requests to the pool for `time`.
    pub(crate) fn blocked(&self, time: Duration) {
        self.change(|budget, _, now| budget.block(time, now));
    }

    /// The request was not sent after all.
    pub(crate) fn not_sent(&mut self) {
        if self.sent_at.take().is_some() {
            self.not_counted();
            self.is_given_back = true;
        }
    }

    /// The exchange has not counted the request.
    pub(crate) fn not_counted(&self) {
        self.change(|budget, ticket, _| budget.refund(ticket, &self.demand));
    }

    /// Changes the budget, and grants waiting requests what fits now.
    fn change(&self, change: impl FnOnce(&mut PoolBudget, Ticket, Duration)) {
        let now = self.budgets.clock.boot();
        let mut state = self.budgets.state.lock();
        let Some(entry) = state.pools.get_mut(&self.key) else {
            return;
        };
        change(&mut entry.budget, self.ticket, now);
        if !entry.waiting.is_empty() {
            state.serve(&self.key, now);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.sent_at.is_none() && !self.is_given_back {
            self.not_counted();
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.budgets.state.lock();
        state.cancels_waiting -= usize::from(self.at.0 == Priority::Cancel);
        state.pending.remove(&self.at.1);
        if let Some(entry) = state.pools.get_mut(self.key) {
            entry.waiting.remove(&self.at);
            // Its caller has gone before it went on.
            if let Ok(ticket) = self.grant.try_recv() {
                entry.budget.refund(ticket, self.demand);
            }
        }
    }
}
