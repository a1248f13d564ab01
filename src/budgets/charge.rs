//! The part of a budget that one request has taken, and what its answer says about the budget.

use std::sync::Arc;
use std::time::Duration;

use super::pool::{Demand, PoolBudget, Priority, Ticket};
use super::state::PoolId;
use super::{Budgets, NoBudget, RateLimited, Scarce};
use crate::kucoin::answer::RateLimit;
use crate::kucoin::quota::Cost;

/// The part of a budget that a request has taken. If the request is never sent, it is given back.
#[derive(Debug)]
#[must_use = "it is given back when it drops"]
pub(crate) struct Charge {
    budgets: Arc<Budgets>,
    pool: PoolId,
    demand: Demand,
    cost: Cost,
    ticket: Ticket,
    attempts: u32,
    sent_at: Option<Duration>,
}

impl Charge {
    pub(super) fn new(
        budgets: &Arc<Budgets>,
        pool: PoolId,
        demand: Demand,
        cost: Cost,
        ticket: Ticket,
    ) -> Self {
        Self {
            budgets: Arc::clone(budgets),
            pool,
            demand,
            cost,
            ticket,
            attempts: 0,
            sent_at: None,
        }
    }

    /// Refuses a request that was granted its weight before the edge of the exchange blocked the egress address; not a cancel.
    ///
    /// # Errors
    /// How long the block lasts.
    pub(crate) fn check_edge(&self) -> Result<(), NoBudget> {
        let blocked = self.budgets.edge_blocked_for();
        match blocked.filter(|_| self.demand.priority != Priority::Cancel) {
            None => Ok(()),
            Some(retry_after) => Err(NoBudget::RateLimited(RateLimited {
                scarce: Scarce::Edge,
                pool: self.cost.pool,
                retry_after,
            })),
        }
    }

    /// How many times it was sent.
    pub(crate) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// When the last attempt was sent (time since boot).
    pub(crate) fn sent_at(&self) -> Option<Duration> {
        self.sent_at
    }

    /// The request is being sent; each time after the first it takes its weight once more.
    pub(crate) fn begin_attempt(&mut self) {
        let now = self.budgets.clock.boot();
        self.attempts += 1;
        if self.attempts > 1 {
            let mut state = self.budgets.state.lock();
            state.edge.count(now);
            if let Some(budget) = state.budget(self.pool) {
                self.ticket = budget.charge(&self.demand, now);
            }
        }
        self.sent_at = Some(now);
    }

    /// Applies the exchange's answer: `limit` is what its headers say about the pool.
    pub(crate) fn answered(&mut self, limit: Option<RateLimit>) {
        let Some(sent_at) = self.sent_at else { return };
        let limit = limit.filter(|_| !self.cost.is_pool_assumed);
        self.change(|budget, ticket, _, now| budget.answered(ticket, limit, sent_at, now));
    }

    /// The exchange rejected the request because the pool is empty until `reset`. If the pool is assumed, it is another one.
    pub(crate) fn used_up(&mut self, reset: Duration) {
        if !self.cost.is_pool_assumed {
            self.change(|budget, ticket, _, now| budget.use_up(ticket, reset, now));
        }
    }

    /// The exchange rejects all requests to the pool for `time`.
    pub(crate) fn blocked(&mut self, time: Duration) {
        self.change(|budget, _, _, now| budget.block(time, now));
    }

    /// The last attempt was not sent after all.
    pub(crate) fn not_sent(&mut self) {
        if self.sent_at.take().is_some() {
            self.not_counted();
        }
    }

    /// The exchange has not counted the request. What the headers of its answer say, later answers say better.
    pub(crate) fn not_counted(&mut self) {
        self.change(|budget, ticket, demand, _| budget.refund(ticket, demand));
    }

    /// Changes the budget, and grants waiting requests what fits now.
    fn change(&mut self, change: impl FnOnce(&mut PoolBudget, &mut Ticket, &Demand, Duration)) {
        let now = self.budgets.clock.boot();
        let mut state = self.budgets.state.lock();
        if let Some(budget) = state.budget(self.pool) {
            change(budget, &mut self.ticket, &self.demand, now);
            state.serve(self.pool, now);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.sent_at.is_none() {
            self.not_counted();
        }
    }
}
