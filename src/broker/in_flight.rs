//! Calls in flight that may add risk, per account: whoever cancels all orders waits until these have ended.

use super::Calls;
use crate::base::ids::AccountId;

/// A call that may add risk, from before the last look at what admins forbid until it has ended.
#[derive(Debug)]
pub(super) struct AddingRisk<'c> {
    calls: &'c Calls,
    account: AccountId,
}

impl Calls {
    /// Counts a call that may add risk on an account until the guard drops.
    pub(super) fn add_risk(&self, account: &AccountId) -> AddingRisk<'_> {
        self.adding_risk.send_modify(|counts| {
            *counts.entry(account.clone()).or_default() += 1;
        });
        AddingRisk {
            calls: self,
            account: account.clone(),
        }
    }

    pub(crate) fn is_calm(&self, account: &AccountId) -> bool {
        !self.adding_risk.borrow().contains_key(account)
    }

    /// Returns once no such call of the account is in flight.
    pub(crate) async fn calm(&self, account: &AccountId) {
        let mut counts = self.adding_risk.subscribe();
        // An error means that the broker is gone.
        let _ = counts
            .wait_for(|counts| !counts.contains_key(account))
            .await;
    }
}

impl Drop for AddingRisk<'_> {
    fn drop(&mut self) {
        self.calls.adding_risk.send_modify(|counts| {
            if let Some(count) = counts.get_mut(&self.account) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(&self.account);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn an_account_is_calm_once_the_last_call_that_adds_risk_has_ended() {
        let calls = Calls::default();
        let (one, other) = ("one".parse().unwrap(), "other".parse().unwrap());
        let (first, second) = (calls.add_risk(&one), calls.add_risk(&one));
        assert!(!calls.is_calm(&one) && calls.is_calm(&other));
        drop(first);
        let within = Duration::from_millis(20);
        timeout(within, calls.calm(&one)).await.unwrap_err();
        drop(second);
        calls.calm(&one).await;
        assert!(calls.adding_risk.borrow().is_empty());
    }
}
