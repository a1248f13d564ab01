//! Rate budgets: what may be sent to the exchange now, so that it rejects nothing for its rate limits.
//!
//! One budget for each pool of an account at KuCoin, shared by all bots of the account (`budgets/pool.rs`), and one for the egress
//! address (`budgets/edge.rs`). A request takes its weight before its intent is audited and before it has a connection. If it
//! does not fit, it waits here, or is refused. Waiting requests are sent in the order of [`Priority`].

mod charge;
mod edge;
mod pool;
mod rate;
mod state;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::time::{Instant, sleep_until};

use crate::base::ids::{AccountId, BotId};
use crate::base::lock::Mutex;
use crate::clock::Clock;
use crate::kucoin::Scope;
use crate::kucoin::cancel_scope::{CancelScope, PendingOrders};
use crate::kucoin::quota::{Cost, Pool, WINDOW};
pub(crate) use charge::Charge;
use pool::{Demand, Ticket};
pub(crate) use pool::{Level, Priority};
use state::{Pending, PoolId, Refusal, State, Turn};

/// How long a waiting request sleeps at most before it checks again.
const ASK_AGAIN_WITHIN: Duration = Duration::from_secs(1);

/// The shortest time after which a refused request is worth repeating.
const MIN_RETRY_AFTER: Duration = Duration::from_millis(1);

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
    Pool,
}

/// A request does not fit into its budget in time.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{}; nothing was sent; repeat the request after {} ms", self.what(), self.retry_after.as_millis())]
pub(crate) struct RateLimited {
    scarce: Scarce,
    pool: Pool,
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
            Scarce::Pool => format!(
                "the bot's part of the account's rate limit in pool {} is used up",
                self.pool.as_str()
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
    RateLimited(RateLimited),
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

/// A request that waits; dropping this ends its wait.
struct Place<'b> {
    budgets: &'b Budgets,
    pool: PoolId,
    demand: Demand,
    turn: Turn,
    grant: oneshot::Receiver<Ticket>,
}

impl Budgets {
    /// Nothing has been sent yet. `edge_limit`: requests of the egress address per 10 s; `None`: no limit.
    pub(crate) fn new(edge_limit: Option<u64>, clock: Arc<Clock>) -> Self {
        Self {
            state: Mutex::new(State::new(edge_limit, clock.boot())),
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
        mut request: BudgetRequest,
        patience: Duration,
        orders: impl FnOnce() -> Option<PendingOrders>,
    ) -> Result<Charge, NoBudget> {
        let demand = Demand {
            bot: request.bot.take(),
            priority: request.priority,
            weight: request.cost.weight,
            requests_per_s: request.requests_per_s,
        };
        let cost = request.cost;
        let give_up = self.clock.boot() + patience;
        let (pool, taken) = self.begin(request, &demand, orders);
        let ticket = match taken {
            Ok(ticket) => ticket,
            Err((place, refusal)) => {
                let waited = place.wait(refusal, give_up).await;
                waited.map_err(|refusal| match refusal {
                    None => NoBudget::Cancelled,
                    Some((scarce, until)) => {
                        let until = until.saturating_sub(self.clock.boot());
                        // Until an answer has shown when the window began, its end is an upper bound.
                        let until = match scarce {
                            Scarce::Pool => until.min(WINDOW),
                            Scarce::Bot | Scarce::Edge => until,
                        };
                        NoBudget::RateLimited(RateLimited {
                            scarce,
                            pool: cost.pool,
                            retry_after: until.max(MIN_RETRY_AFTER),
                        })
                    }
                })?
            }
        };
        Ok(Charge::new(self, pool, demand, cost, ticket))
    }

    /// Takes what a request needs, or lets it wait; both behind one lock, because a cancel that comes next has to find it.
    fn begin(
        &self,
        request: BudgetRequest,
        demand: &Demand,
        orders: impl FnOnce() -> Option<PendingOrders>,
    ) -> (PoolId, Result<Ticket, (Place<'_>, Refusal)>) {
        let now = self.clock.boot();
        let mut state = self.state.lock();
        let pool = state.open(&request, now);
        let taken = state.first(pool, demand, now).map_err(|refusal| {
            let pending = Pending {
                account: request.account,
                uid: request.uid,
                orders: orders(),
                pool,
                is_cancelled: false,
            };
            let (turn, grant) = state.wait(pending, demand.clone(), refusal);
            let place = Place {
                budgets: self,
                pool,
                demand: demand.clone(),
                turn,
                grant,
            };
            (place, refusal)
        });
        (pool, taken)
    }

    /// Counts a check of the broker itself against the edge's budget. It is never refused for the limit, which the bots could
    /// use up.
    ///
    /// # Errors
    /// How long the edge still blocks the egress address.
    pub(crate) fn take_check(&self) -> Result<(), Duration> {
        let now = self.clock.boot();
        let mut state = self.state.lock();
        if let Some(time) = state.edge.blocked_for(now) {
            return Err(time);
        }
        if state.are_cancels_first(now) {
            return Err(MIN_RETRY_AFTER);
        }
        state.edge.count(now);
        Ok(())
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
            .pending()
            .filter(|pending| pending.account == *account);
        let mut orders = orders.filter_map(|pending| pending.orders.as_ref());
        orders.find_map(|orders| oids.iter().find(|oid| orders.has(scope, oid)).copied())
    }

    /// Ends the wait of requests of the same account with orders that a cancel covers.
    pub(crate) fn cancel_waiting(&self, by: &BudgetRequest, cancel: &CancelScope) {
        self.state.lock().cancel(by, cancel);
    }

    /// The state of each pool that an account has used, sorted. Once the uid of an account is known, the budgets without it are not
    /// used any more.
    pub(crate) fn used(&self) -> Vec<UsedPool> {
        let now = self.clock.boot();
        let state = self.state.lock();
        let mut used = BTreeMap::new();
        for (subject, pool, entry) in state.pools() {
            for account in entry.accounts.keys() {
                let has_uid = !matches!(subject, Subject::Account(_));
                let pool = UsedPool {
                    account: account.clone(),
                    pool,
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

    /// The edge of the exchange has answered a request that was sent at `sent_at` (time since boot): it blocks the egress address
    /// for `time`. Returns whether that is new.
    pub(crate) fn edge_blocked(&self, time: Duration, sent_at: Duration) -> bool {
        let now = self.clock.boot();
        self.state.lock().edge.block(time, sent_at, now)
    }

    /// How long the edge of the exchange still blocks the egress address.
    pub(crate) fn edge_blocked_for(&self) -> Option<Duration> {
        self.state.lock().edge.blocked_for(self.clock.boot())
    }
}

impl Place<'_> {
    /// Waits until the request is granted its weight, for at most until `give_up`; a cancel for as long as it takes.
    ///
    /// # Errors
    /// Why it is refused; `None`: it was cancelled.
    async fn wait(
        mut self,
        mut refusal: Refusal,
        give_up: Duration,
    ) -> Result<Ticket, Option<Refusal>> {
        let clock = &self.budgets.clock;
        loop {
            let until = refusal.1;
            if self.turn.0 != Priority::Cancel && until > give_up {
                // It may have been granted just now.
                return match self.grant.try_recv() {
                    Ok(ticket) => self.go_on(ticket),
                    Err(TryRecvError::Closed) => Err(None),
                    Err(TryRecvError::Empty) => Err(Some(refusal)),
                };
            }
            // What it waits for can move to an earlier time.
            let wait = until.saturating_sub(clock.boot()).min(ASK_AGAIN_WITHIN);
            tokio::select! {
                biased;
                granted = &mut self.grant => {
                    return granted.map_or(Err(None), |ticket| self.go_on(ticket));
                }
                () = sleep_until(Instant::now() + wait) => {}
            }
            let now = clock.boot();
            let mut state = self.budgets.state.lock();
            // Another request may have served all of them just now.
            let known = state.refusal(self.pool, self.turn);
            if known.is_some_and(|(_, until)| until <= now) {
                state.serve(self.pool, now);
            }
            refusal = state.refusal(self.pool, self.turn).unwrap_or(refusal);
        }
    }

    /// Lets a request go on that has waited, unless it was cancelled meanwhile. From here until the claim on its clientOids, nothing
    /// is awaited.
    fn go_on(&self, mut ticket: Ticket) -> Result<Ticket, Option<Refusal>> {
        let mut state = self.budgets.state.lock();
        if !state.is_cancelled(self.turn) {
            return Ok(ticket);
        }
        state.refund(
            self.pool,
            &mut ticket,
            &self.demand,
            self.budgets.clock.boot(),
        );
        Err(None)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.budgets.state.lock();
        state.leave(self.turn);
        // Its caller has gone before it went on.
        if let Ok(mut ticket) = self.grant.try_recv() {
            state.refund(
                self.pool,
                &mut ticket,
                &self.demand,
                self.budgets.clock.boot(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::{JoinHandle, yield_now};

    use super::*;
    use crate::kucoin::answer::RateLimit;
    use crate::kucoin::cancel_scope::tests::{spot_cancel_all, spot_order};

    /// The spot quota of VIP 0 without the reserve for cancels. Source: KuCoin API documentation, "Rate Limit".
    const QUOTA: u32 = 4000 - 120;

    /// Longer than a window can last.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn budgets() -> Arc<Budgets> {
        let clock = Clock::reading(|| Duration::ZERO);
        Arc::new(Budgets::new(None, Arc::new(clock)))
    }

    /// A spot order of bot `a` on account `main`, whose uid is not known.
    fn order(weight: u32) -> BudgetRequest {
        let account: AccountId = "main".parse().unwrap();
        BudgetRequest {
            subject: Subject::Account(account.clone()),
            account,
            uid: None,
            cost: Cost {
                pool: Pool::Spot,
                weight,
                is_pool_assumed: false,
                is_weight_assumed: false,
            },
            vip: 0,
            bot: Some((bot("a"), 1)),
            requests_per_s: None,
            priority: Priority::RiskIncreasing,
        }
    }

    fn bot(name: &str) -> BotId {
        format!("spiffe://example.org/bot/{name}").parse().unwrap()
    }

    /// The same request for an account with uid 1.
    fn with_uid(request: BudgetRequest) -> BudgetRequest {
        BudgetRequest {
            subject: Subject::Uid("1".to_owned()),
            uid: Some("1".to_owned()),
            ..request
        }
    }

    async fn take_now(budgets: &Arc<Budgets>, request: BudgetRequest) -> Result<Charge, NoBudget> {
        budgets.take(request, Duration::ZERO, || None).await
    }

    /// A request that has begun to wait, with the spot order of the tests.
    async fn waiting(
        budgets: &Arc<Budgets>,
        request: BudgetRequest,
    ) -> JoinHandle<Result<Charge, NoBudget>> {
        let before = spot(budgets).waiting;
        let own = Arc::clone(budgets);
        let waits =
            tokio::spawn(async move { own.take(request, PATIENCE, || Some(spot_order())).await });
        while spot(budgets).waiting == before {
            assert!(!waits.is_finished());
            yield_now().await;
        }
        waits
    }

    fn spot(budgets: &Budgets) -> UsedPool {
        budgets.used().into_iter().next().unwrap()
    }

    #[tokio::test]
    async fn request_does_not_overtake_one_of_the_same_bot() {
        let budgets = budgets();
        let first = take_now(&budgets, order(QUOTA - 10)).await.unwrap();
        let waits = waiting(&budgets, order(20)).await;
        // It would fit.
        take_now(&budgets, order(1)).await.unwrap_err();
        let _of_other_bot = take_now(
            &budgets,
            BudgetRequest {
                bot: Some((bot("b"), 1)),
                ..order(1)
            },
        )
        .await
        .unwrap();
        let _cancel = take_now(
            &budgets,
            BudgetRequest {
                priority: Priority::Cancel,
                ..order(1)
            },
        )
        .await
        .unwrap();
        drop(first);
        let _granted = waits.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn requests_that_wait_stay_with_the_pool_when_its_uid_becomes_known() {
        let budgets = budgets();
        let first = take_now(&budgets, order(QUOTA)).await.unwrap();
        let waits = waiting(&budgets, order(20)).await;
        let refused = take_now(&budgets, with_uid(order(1))).await;
        assert!(matches!(refused, Err(NoBudget::RateLimited(_))));
        let used = spot(&budgets);
        assert_eq!((used.waiting, used.level.sent), (1, u64::from(QUOTA)));
        drop(first);
        let _granted = waits.await.unwrap().unwrap();
        assert_eq!(spot(&budgets).level.sent, 20);
    }

    #[tokio::test]
    async fn cancel_ends_waits_of_its_account_also_if_the_uid_became_known_later() {
        for (waits_with_uid, cancel_with_uid, same_account, is_ended) in [
            (false, false, true, true),
            (false, true, true, true),
            (true, true, false, true),
            (true, false, false, false),
            (false, true, false, false),
        ] {
            let budgets = budgets();
            let known = |request, has_uid| {
                if has_uid { with_uid(request) } else { request }
            };
            let _first = take_now(&budgets, known(order(QUOTA), waits_with_uid))
                .await
                .unwrap();
            let waits = waiting(&budgets, known(order(20), waits_with_uid)).await;
            let mut by = known(order(1), cancel_with_uid);
            if !same_account {
                by.account = "other".parse().unwrap();
            }
            budgets.cancel_waiting(&by, &spot_cancel_all());
            if is_ended {
                let ended = waits.await.unwrap();
                assert_eq!(ended.unwrap_err(), NoBudget::Cancelled);
            } else {
                assert_eq!(spot(&budgets).waiting, 1);
                waits.abort();
            }
        }
    }

    #[tokio::test]
    async fn highest_vip_level_of_accounts_with_the_same_uid_counts() {
        let budgets = budgets();
        for (account, vip) in [("low", 0), ("high", 5), ("low", 0)] {
            let request = BudgetRequest {
                account: account.parse().unwrap(),
                vip,
                ..with_uid(order(1))
            };
            let _charge = take_now(&budgets, request).await.unwrap();
        }
        // Source: KuCoin API documentation, "Rate Limit".
        let quotas: Vec<_> = budgets.used().iter().map(|used| used.level.quota).collect();
        assert_eq!(quotas, [16_000, 16_000]);
    }

    #[tokio::test]
    async fn headers_do_not_count_for_an_assumed_pool() {
        for (is_pool_assumed, left) in [(true, 3990), (false, 500)] {
            let budgets = budgets();
            let mut request = order(10);
            request.cost.is_pool_assumed = is_pool_assumed;
            let mut charge = take_now(&budgets, request).await.unwrap();
            charge.begin_attempt();
            charge.answered(Some(RateLimit {
                limit: 1000,
                remaining: 500,
                reset: Duration::from_secs(10),
            }));
            assert_eq!(spot(&budgets).level.left, left);
        }
    }

    #[tokio::test]
    async fn attempt_that_was_not_sent_is_given_back_and_the_next_one_counts() {
        let budgets = budgets();
        let sent = || spot(&budgets).level.sent;
        let mut charge = take_now(&budgets, order(10)).await.unwrap();
        charge.begin_attempt();
        charge.not_sent();
        assert_eq!(sent(), 0);
        charge.begin_attempt();
        assert_eq!(sent(), 10);
        charge.answered(None);
        charge.begin_attempt();
        assert_eq!(sent(), 20);
        drop(charge);
        assert_eq!(sent(), 20);
    }

    #[tokio::test]
    async fn order_that_was_granted_before_an_edge_block_is_not_sent_during_it() {
        let budgets = budgets();
        let granted = take_now(&budgets, order(1)).await.unwrap();
        let cancel = BudgetRequest {
            priority: Priority::Cancel,
            ..order(1)
        };
        let cancel = take_now(&budgets, cancel).await.unwrap();
        granted.check_edge().unwrap();
        let block = Duration::from_secs(20);
        budgets.edge_blocked(block, Duration::ZERO);
        let Err(NoBudget::RateLimited(refusal)) = granted.check_edge() else {
            panic!("an order during an edge block");
        };
        assert_eq!(refusal.retry_after, block);
        cancel.check_edge().unwrap();
    }

    #[test]
    fn own_checks_count_at_the_edge_and_are_not_sent_during_a_block() {
        let clock = Clock::reading(|| Duration::ZERO);
        let budgets = Budgets::new(Some(1), Arc::new(clock));
        budgets.take_check().unwrap();
        budgets.take_check().unwrap();
        let block = Duration::from_secs(20);
        budgets.edge_blocked(block, Duration::ZERO);
        assert_eq!(budgets.take_check(), Err(block));
    }
}
