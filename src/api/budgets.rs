//! Messages of `GetBudget` and `ListBudgets`.

use std::time::Duration;

use crate::base::ids::{AccountId, BotId};
use crate::broker::{Broker, BrokerError};
use crate::budgets::UsedPool;
use crate::kucoin::Malformed;
use crate::proto;

/// The rate limits of the account that `message` names.
pub(super) fn of_account(
    broker: &Broker,
    bot: &BotId,
    message: &proto::GetBudgetRequest,
) -> Result<proto::GetBudgetResponse, BrokerError> {
    let account: AccountId = message
        .account
        .parse()
        .map_err(|error| BrokerError::Malformed(vec![Malformed::new("account", error)]))?;
    broker.policy().check_account(bot, &account)?;
    broker.restrictions.check_bot(bot)?;
    let used = broker.budgets.used().into_iter();
    let pools = used.filter(|used| used.account == account);
    Ok(proto::GetBudgetResponse {
        pools: pools.map(|used| pool(&used)).collect(),
        edge_blocked_ms: blocked_ms(broker),
    })
}

/// The rate limits of an account, or of all.
pub(super) fn list(broker: &Broker, account: Option<&AccountId>) -> proto::ListBudgetsResponse {
    let used = broker.budgets.used().into_iter();
    let used = used.filter(|used| account.is_none_or(|account| used.account == *account));
    let budgets = used.map(|used| proto::AccountBudget {
        account: used.account.to_string(),
        pool: Some(pool(&used)),
        sent: used.level.sent,
        waiting: u32::try_from(used.waiting).unwrap_or(u32::MAX),
    });
    proto::ListBudgetsResponse {
        budgets: budgets.collect(),
        edge_blocked_ms: blocked_ms(broker),
        edge_limit: broker.budgets.edge_limit().unwrap_or_default(),
    }
}

fn pool(used: &UsedPool) -> proto::PoolBudget {
    proto::PoolBudget {
        pool: used.pool.as_str().to_owned(),
        limit: used.level.quota,
        remaining: used.level.left,
        reset_ms: millis(used.level.reset),
    }
}

fn blocked_ms(broker: &Broker) -> u64 {
    broker.budgets.edge_blocked_for().map_or(0, millis)
}

/// Rounded up, so that the time has passed then.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}
