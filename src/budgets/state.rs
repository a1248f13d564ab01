//! The state of all budgets, behind one lock: the pools, the requests that wait for them, and the edge.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::sync::oneshot;

use super::edge::Edge;
use super::pool::{Demand, PoolBudget, Priority, Ticket};
use super::rate::Rate;
use super::{BudgetRequest, Scarce, Subject};
use crate::base::ids::{AccountId, BotId};
use crate::kucoin::cancel_scope::{CancelScope, PendingOrders};
use crate::kucoin::quota::Pool;

/// How often budgets of accounts that send nothing are removed.
const CLEAN_EVERY: Duration = Duration::from_secs(600);

/// When to ask again while cancels wait, which are sent first.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Why a request does not fit now, and when it may fit.
pub(super) type Refusal = (Scarce, Duration);

/// A pool that is in use.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct PoolId(u64);

/// The place of a waiting request, in the order in which they are sent.
pub(super) type Turn = (Priority, u64);

#[derive(Debug)]
pub(super) struct State {
    pub(super) edge: Edge,
    pools: BTreeMap<PoolId, Entry>,
    ids: HashMap<(Subject, Pool), PoolId>,
    /// Pools that have been used, and requests that have waited.
    numbers: u64,
    /// Bots whose requests per second are limited.
    rates: HashMap<BotId, Rate>,
    /// Cancels that wait.
    cancels_waiting: usize,
    /// The orders of requests that wait, or have waited and do not go on yet.
    pending: BTreeMap<Turn, Pending>,
    cleaned: Duration,
}

#[derive(Debug)]
pub(super) struct Entry {
    /// The accounts that have used it, and the quotas of their VIP levels.
    pub(super) accounts: BTreeMap<AccountId, u64>,
    pub(super) budget: PoolBudget,
    pub(super) waiting: BTreeMap<Turn, Waiting>,
}

#[derive(Debug)]
pub(super) struct Waiting {
    demand: Demand,
    granted: oneshot::Sender<Ticket>,
    /// Why it still waits, and until when at least.
    refusal: Refusal,
}

/// A request that waits.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) account: AccountId,
    /// The exchange's id of the account, if it is known.
    pub(super) uid: Option<String>,
    pub(super) orders: Option<PendingOrders>,
    pub(super) pool: PoolId,
    pub(super) is_cancelled: bool,
}

impl State {
    pub(super) fn new(edge_limit: Option<u64>, now: Duration) -> Self {
        Self {
            edge: Edge::new(edge_limit),
            pools: BTreeMap::new(),
            ids: HashMap::new(),
            numbers: 0,
            rates: HashMap::new(),
            cancels_waiting: 0,
            pending: BTreeMap::new(),
            cleaned: now,
        }
    }

    /// The pool that a request uses. Removes others that are not needed any more.
    pub(super) fn open(&mut self, request: &BudgetRequest, now: Duration) -> PoolId {
        if now.saturating_sub(self.cleaned) > CLEAN_EVERY {
            self.cleaned = now;
            self.pools
                .retain(|_, entry| !entry.waiting.is_empty() || !entry.budget.is_idle(now));
            self.ids.retain(|_, id| self.pools.contains_key(id));
            self.rates.retain(|_, rate| !rate.is_full(now));
        }
        let quota = request.cost.pool.quota(request.vip);
        let id = self.id(request);
        let entry = self.pools.entry(id).or_insert_with(|| Entry {
            accounts: BTreeMap::new(),
            budget: PoolBudget::new(quota),
            waiting: BTreeMap::new(),
        });
        if entry.accounts.get(&request.account) != Some(&quota) {
            entry.accounts.insert(request.account.clone(), quota);
        }
        // Accounts with the same uid can have different levels in the rules; the highest one is right.
        let highest = entry.accounts.values().max().copied();
        entry.budget.set_quota(highest.unwrap_or(quota));
        id
    }

    fn id(&mut self, request: &BudgetRequest) -> PoolId {
        let key = (request.subject.clone(), request.cost.pool);
        if let Some(id) = self.ids.get(&key) {
            return *id;
        }
        // What was used before the uid of the account was known, and the requests that wait for it.
        let without_uid = (Subject::Account(request.account.clone()), key.1);
        let id = self.ids.remove(&without_uid).unwrap_or_else(|| {
            self.numbers += 1;
            PoolId(self.numbers)
        });
        self.ids.insert(key, id);
        id
    }

    /// The pools in use, with who shares them.
    pub(super) fn pools(&self) -> impl Iterator<Item = (&Subject, Pool, &Entry)> {
        self.ids.iter().filter_map(|((subject, pool), id)| {
            let entry = self.pools.get(id)?;
            Some((subject, *pool, entry))
        })
    }

    /// The budget of a pool; `None` if it was removed, because nothing has used it for long.
    pub(super) fn budget(&mut self, pool: PoolId) -> Option<&mut PoolBudget> {
        self.pools.get_mut(&pool).map(|entry| &mut entry.budget)
    }

    /// Gives back what a request has taken and does not need, and grants it to others.
    pub(super) fn refund(
        &mut self,
        pool: PoolId,
        ticket: &mut Ticket,
        demand: &Demand,
        now: Duration,
    ) {
        if let Some(budget) = self.budget(pool) {
            budget.refund(ticket, demand);
            self.serve(pool, now);
        }
    }

    /// Takes what a new request needs, unless it does not fit or others wait before it.
    pub(super) fn first(
        &mut self,
        pool: PoolId,
        demand: &Demand,
        now: Duration,
    ) -> Result<Ticket, Refusal> {
        if let Some(entry) = self.pools.get_mut(&pool) {
            entry.budget.ask(demand, now);
            if entry
                .waiting
                .values()
                .any(|waiting| waiting.refusal.1 <= now)
            {
                self.serve(pool, now);
            }
        }
        match self.ahead(pool, demand) {
            Some(ahead) => Err(self.behind(ahead, pool, demand, now)),
            None => self.take(pool, demand, now),
        }
    }

    /// Why a request waits behind another one, which has the refusal `ahead`, or longer if it would not fit anyway.
    fn behind(&self, ahead: Refusal, pool: PoolId, demand: &Demand, now: Duration) -> Refusal {
        if demand.priority == Priority::Cancel {
            return ahead;
        }
        let blocked = self
            .edge
            .blocked_for(now)
            .map(|time| (Scarce::Edge, now + time));
        let budget = self.pools.get(&pool).map(|entry| &entry.budget);
        let full = budget.and_then(|budget| budget.check(demand, now).err());
        let full = full.map(|until| (Scarce::Pool, until));
        let all = [blocked, full].into_iter().flatten();
        all.fold(
            ahead,
            |latest, own| if own.1 > latest.1 { own } else { latest },
        )
    }

    /// Whether cancels that wait go first everywhere: during an edge block, and right after it.
    pub(super) fn are_cancels_first(&self, now: Duration) -> bool {
        self.cancels_waiting > 0 && self.edge.was_just_blocked(now)
    }

    /// Why a request waits that is sent before a new one: a cancel, or one of the same bot.
    fn ahead(&self, pool: PoolId, demand: &Demand) -> Option<Refusal> {
        let waiting = self.pools.get(&pool)?.waiting.iter();
        let mut before = waiting.take_while(|((priority, _), _)| *priority <= demand.priority);
        let ahead = before.find(|((priority, _), other)| {
            other.demand.bot_id() == demand.bot_id()
                || *priority == Priority::Cancel && demand.priority != Priority::Cancel
        });
        ahead.map(|(_, other)| other.refusal)
    }

    fn take(&mut self, pool: PoolId, demand: &Demand, now: Duration) -> Result<Ticket, Refusal> {
        let is_cancel = demand.priority == Priority::Cancel;
        if !is_cancel && self.are_cancels_first(now) {
            let soon = (Scarce::Edge, now + ASK_AGAIN_AFTER);
            return Err(self.behind(soon, pool, demand, now));
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
        let edge = self.edge.check(demand.priority, now);
        edge.map_err(|until| (Scarce::Edge, until))?;
        let unknown = (Scarce::Pool, now + ASK_AGAIN_AFTER);
        let budget = &mut self.pools.get_mut(&pool).ok_or(unknown)?.budget;
        let taken = budget.take(demand, now);
        let ticket = taken.map_err(|until| (Scarce::Pool, until))?;
        self.edge.take(demand.priority, now);
        if let Some(rate) = &mut rate {
            rate.take();
        }
        Ok(ticket)
    }

    /// Lets a request wait. Returns its turn, and what gets its ticket once it may go on.
    pub(super) fn wait(
        &mut self,
        pending: Pending,
        demand: Demand,
        refusal: Refusal,
    ) -> (Turn, oneshot::Receiver<Ticket>) {
        let (granted, grant) = oneshot::channel();
        self.numbers += 1;
        self.cancels_waiting += usize::from(demand.priority == Priority::Cancel);
        let turn = (demand.priority, self.numbers);
        if let Some(entry) = self.pools.get_mut(&pending.pool) {
            let waiting = Waiting {
                demand,
                granted,
                refusal,
            };
            entry.waiting.insert(turn, waiting);
        }
        self.pending.insert(turn, pending);
        (turn, grant)
    }

    /// A request does not wait any more, or its caller has gone.
    pub(super) fn leave(&mut self, turn: Turn) -> Option<Pending> {
        let pending = self.pending.remove(&turn)?;
        self.cancels_waiting -= usize::from(turn.0 == Priority::Cancel);
        if let Some(entry) = self.pools.get_mut(&pending.pool) {
            entry.waiting.remove(&turn);
        }
        Some(pending)
    }

    /// The requests that wait, or have waited and do not go on yet.
    pub(super) fn pending(&self) -> impl Iterator<Item = &Pending> {
        self.pending.values()
    }

    /// Ends the wait of requests of the same account with orders that a cancel covers.
    pub(super) fn cancel(&mut self, by: &BudgetRequest, cancel: &CancelScope) {
        for (turn, pending) in &mut self.pending {
            let is_covered = |orders: &PendingOrders| cancel.covers(orders);
            // The uid can have become known meanwhile, and accounts in the rules can share it.
            let is_same =
                pending.account == by.account || pending.uid.is_some() && pending.uid == by.uid;
            if is_same && pending.orders.as_ref().is_some_and(is_covered) {
                pending.is_cancelled = true;
                // Its sender drops, which ends the wait.
                if let Some(entry) = self.pools.get_mut(&pending.pool) {
                    entry.waiting.remove(turn);
                }
            }
        }
    }

    /// Whether a cancel has ended the wait of a request.
    pub(super) fn is_cancelled(&self, turn: Turn) -> bool {
        let pending = self.pending.get(&turn);
        pending.is_some_and(|pending| pending.is_cancelled)
    }

    /// Why a request still waits; `None`: it does not.
    pub(super) fn refusal(&self, pool: PoolId, turn: Turn) -> Option<Refusal> {
        Some(self.pools.get(&pool)?.waiting.get(&turn)?.refusal)
    }

    /// Grants waiting requests of a pool what fits, in their order. While a cancel waits, nothing but cancels is granted. Requests
    /// of one bot do not overtake each other.
    pub(super) fn serve(&mut self, pool: PoolId, now: Duration) {
        let Some(entry) = self.pools.get_mut(&pool) else {
            return;
        };
        if entry.waiting.is_empty() {
            return;
        }
        let waiting = std::mem::take(&mut entry.waiting);
        let mut left = BTreeMap::new();
        let mut cancel_waits = None;
        let mut bots_wait: Vec<(Option<BotId>, Refusal)> = Vec::new();
        for (turn, mut request) in waiting {
            if request.granted.is_closed() {
                continue;
            }
            let is_cancel = turn.0 == Priority::Cancel;
            let bot = request.demand.bot_id();
            let ahead = bots_wait.iter().find(|(other, _)| other.as_ref() == bot);
            let ahead = ahead.map(|(_, refusal)| *refusal);
            let taken = match ahead.or(cancel_waits.filter(|_| !is_cancel)) {
                Some(ahead) => Err(self.behind(ahead, pool, &request.demand, now)),
                None => self.take(pool, &request.demand, now),
            };
            match taken {
                Ok(ticket) => {
                    if let Err(mut ticket) = request.granted.send(ticket)
                        && let Some(budget) = self.budget(pool)
                    {
                        budget.refund(&mut ticket, &request.demand);
                    }
                }
                Err(refusal) => {
                    if is_cancel {
                        cancel_waits = Some(refusal);
                    }
                    if ahead.is_none() {
                        bots_wait.push((bot.cloned(), refusal));
                    }
                    request.refusal = refusal;
                    left.insert(turn, request);
                }
            }
        }
        if let Some(entry) = self.pools.get_mut(&pool) {
            entry.waiting = left;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kucoin::quota::Cost;

    const SECOND: Duration = Duration::from_secs(1);

    fn request(uid: &str) -> BudgetRequest {
        BudgetRequest {
            subject: Subject::Uid(uid.to_owned()),
            account: "main".parse().unwrap(),
            uid: Some(uid.to_owned()),
            cost: Cost {
                pool: Pool::Futures,
                weight: 2,
                is_pool_assumed: false,
                is_weight_assumed: false,
            },
            vip: 0,
            bot: None,
            requests_per_s: None,
            priority: Priority::Cancel,
        }
    }

    fn demand(bot: &str, priority: Priority) -> Demand {
        let bot = format!("spiffe://example.org/bot/{bot}");
        Demand {
            bot: Some((bot.parse().unwrap(), 1)),
            priority,
            weight: 2,
            requests_per_s: None,
        }
    }

    /// Lets a cancel wait that does not fit.
    fn let_cancel_wait(state: &mut State, pool: PoolId) -> oneshot::Receiver<Ticket> {
        let cancel = demand("a", Priority::Cancel);
        let refusal = state.first(pool, &cancel, SECOND).unwrap_err();
        assert!(refusal.1 <= 2 * SECOND);
        let pending = Pending {
            account: "main".parse().unwrap(),
            uid: None,
            orders: None,
            pool,
            is_cancelled: false,
        };
        state.wait(pending, cancel, refusal).1
    }

    #[test]
    fn order_behind_a_cancel_is_refused_until_the_edge_block_ends() {
        for other_pool in [false, true] {
            let mut state = State::new(None, SECOND);
            let pool = state.open(&request("1"), SECOND);
            let other = state.open(&request("2"), SECOND);
            state.edge.block(30 * SECOND, SECOND, SECOND);
            let _grant = let_cancel_wait(&mut state, pool);
            let pool = if other_pool { other } else { pool };
            let order = demand("b", Priority::RiskIncreasing);
            let refusal = state.first(pool, &order, SECOND);
            assert_eq!(refusal, Err((Scarce::Edge, 31 * SECOND)));
        }
    }

    #[test]
    fn order_behind_a_cancel_is_refused_until_the_empty_pool_is_reset() {
        let mut state = State::new(None, SECOND);
        let pool = state.open(&request("1"), SECOND);
        let order = demand("b", Priority::RiskIncreasing);
        let budget = state.budget(pool).unwrap();
        let ticket = budget.charge(&order, SECOND);
        budget.use_up(&ticket, 25 * SECOND, SECOND);
        let _grant = let_cancel_wait(&mut state, pool);
        let refusal = state.first(pool, &order, SECOND);
        assert_eq!(refusal, Err((Scarce::Pool, 26 * SECOND)));
    }

    #[test]
    fn what_is_given_back_is_granted_to_a_request_that_waits() {
        let mut state = State::new(None, SECOND);
        let pool = state.open(&request("1"), SECOND);
        let large = Demand {
            weight: 1939,
            ..demand("a", Priority::RiskIncreasing)
        };
        let mut ticket = state.first(pool, &large, SECOND).unwrap();
        let order = demand("b", Priority::RiskIncreasing);
        let refusal = state.first(pool, &order, SECOND).unwrap_err();
        let pending = Pending {
            account: "main".parse().unwrap(),
            uid: None,
            orders: None,
            pool,
            is_cancelled: false,
        };
        let (_, mut grant) = state.wait(pending, order, refusal);
        grant.try_recv().unwrap_err();
        state.refund(pool, &mut ticket, &large, SECOND);
        grant.try_recv().unwrap();
    }
}
