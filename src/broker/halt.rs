//! Withdraws all open orders.

use std::sync::Arc;

use super::Broker;
use super::trial::Probe;
use crate::ids::{AccountId, AdminId};
use crate::kucoin::Scope;
use crate::policy::Account;

/// What became of the open orders of one account in one scope.
#[derive(Debug)]
pub struct Cancelled {
    /// The account.
    pub account: AccountId,
    /// The scope.
    pub scope: Scope,
    /// What was asked, and what came.
    pub probes: Vec<Probe>,
    /// How many are still open; unknown where the exchange did not tell.
    pub still_open: Option<u64>,
}

impl Broker {
    /// Cancels every open order of an account, or of all.
    #[expect(clippy::unused_async, reason = "being written")]
    pub async fn cancel_all(self: &Arc<Self>, _: &AdminId, _: Option<&Account>) -> Vec<Cancelled> {
        Vec::new()
    }
}
