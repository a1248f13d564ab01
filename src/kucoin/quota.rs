//! KuCoin's rate limits: what a request weighs, and how much weight each pool has in a window.
//!
//! Source: KuCoin API documentation, "Rate Limit". Private pools count per UID, the public pool per address.

use std::time::Duration;

use serde::Deserialize;

use super::catalog::{Effect, Endpoint, Product, Risk};
use super::{Host, Scope};

/// The length of a window, which starts with the first request after the previous one.
pub(crate) const WINDOW: Duration = Duration::from_secs(30);

/// What a request is assumed to weigh if KuCoin does not publish it: as much as a heavy one. A cancel is assumed to weigh 1, as
/// all documented ones of a single order do.
const ASSUMED_WEIGHT: u32 = 20;

/// A pool of KuCoin: requests to its endpoints share a quota.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Pool {
    /// Exchange brokers. Its quota is not published.
    Broker,
    /// Copy trading.
    CopyTrading,
    /// Earn.
    Earn,
    /// Futures.
    Futures,
    /// Accounts, transfers, withdrawals.
    Management,
    /// Market data, counted per address.
    Public,
    /// Spot and margin.
    Spot,
    /// The unified account.
    Unified,
}

impl Pool {
    /// Its name in metrics and messages.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Broker => "broker",
            Self::CopyTrading => "copy-trading",
            Self::Earn => "earn",
            Self::Futures => "futures",
            Self::Management => "management",
            Self::Public => "public",
            Self::Spot => "spot",
            Self::Unified => "unified",
        }
    }

    /// Weight per window for an account of VIP level `vip`, 0 to 12. Source: KuCoin API documentation, "Rate Limit"; that of the
    /// broker pool is not published, so the lowest one is assumed.
    pub(crate) fn quota(self, vip: u8) -> u64 {
        const SPOT: [u64; 13] = [
            4000, 6000, 8000, 10_000, 13_000, 16_000, 20_000, 23_000, 26_000, 30_000, 33_000,
            36_000, 40_000,
        ];
        const OTHERS: [u64; 13] = [
            2000, 2000, 4000, 5000, 6000, 7000, 8000, 10_000, 12_000, 14_000, 16_000, 18_000,
            20_000,
        ];
        let levels = match self {
            Self::Spot => SPOT,
            Self::Futures | Self::Management | Self::Unified => OTHERS,
            Self::Broker | Self::CopyTrading | Self::Earn | Self::Public => [2000; 13],
        };
        levels.get(usize::from(vip)).copied().unwrap_or(levels[0])
    }
}

/// What a request takes from which pool.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Cost {
    /// The pool.
    pub(crate) pool: Pool,
    /// Its weight.
    pub(crate) weight: u32,
    /// Whether KuCoin does not publish the pool, so that headers may be about another one.
    pub(crate) is_pool_assumed: bool,
    /// Whether KuCoin does not publish the weight.
    pub(crate) is_weight_assumed: bool,
}

impl Cost {
    /// The cost of a request to an endpoint, or to a path that is not in the catalogue.
    pub(crate) fn of(endpoint: Option<&Endpoint>, scope: Scope) -> Self {
        let (pool, weight) = endpoint.map_or((None, None), |endpoint| {
            (endpoint.rate_limit_pool, endpoint.weight)
        });
        let assumed_weight = match endpoint {
            Some(endpoint) if endpoint.effect == Effect::Cancel => 1,
            _ => ASSUMED_WEIGHT,
        };
        Self {
            pool: pool.unwrap_or_else(|| assumed_pool(endpoint, scope)),
            weight: weight.unwrap_or(assumed_weight),
            is_pool_assumed: pool.is_none(),
            is_weight_assumed: weight.is_none(),
        }
    }
}

/// The pool of the endpoint's neighbours in the catalogue.
fn assumed_pool(endpoint: Option<&Endpoint>, scope: Scope) -> Pool {
    match endpoint.map(|endpoint| (endpoint.risk, endpoint.product)) {
        Some((Risk::Public, _)) => Pool::Public,
        Some((_, Product::Broker)) => Pool::Broker,
        Some((_, Product::CopyTrading)) => Pool::CopyTrading,
        Some((_, Product::Earn)) => Pool::Earn,
        Some((
            _,
            Product::Account | Product::Affiliate | Product::Convert | Product::VipLending,
        )) => Pool::Management,
        _ if scope == Scope::Unified => Pool::Unified,
        _ if scope.host() == Host::Futures => Pool::Futures,
        _ => Pool::Spot,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Catalog;
    use super::*;

    fn cost(id: &str) -> Cost {
        let endpoint = Catalog::get().by_id(id).unwrap();
        Cost::of(Some(endpoint), endpoint.scope.unwrap())
    }

    #[test]
    fn weights_and_pools_are_those_of_the_documentation() {
        for (id, pool, weight) in [
            ("spot.post.v1-hf-orders", Pool::Spot, 1),
            ("spot.delete.v1-hf-orders-cancel-all", Pool::Spot, 30),
            ("futures.post.v1-orders", Pool::Futures, 2),
            ("futures.post.v1-orders-multi", Pool::Futures, 20),
            ("futures.delete.v3-orders", Pool::Futures, 10),
            ("spot.get.v1-user-api-key", Pool::Management, 20),
        ] {
            let expected = Cost {
                pool,
                weight,
                is_pool_assumed: false,
                is_weight_assumed: false,
            };
            assert_eq!(cost(id), expected, "{id}");
        }
    }

    #[test]
    fn quotas_are_those_of_the_documentation() {
        for (pool, vip, quota) in [
            (Pool::Spot, 0, 4000),
            (Pool::Spot, 12, 40_000),
            (Pool::Futures, 1, 2000),
            (Pool::Management, 7, 10_000),
            (Pool::Unified, 12, 20_000),
            (Pool::Earn, 12, 2000),
        ] {
            assert_eq!(pool.quota(vip), quota, "{pool:?} {vip}");
        }
    }

    #[test]
    fn unknown_weights_are_assumed() {
        let unlisted = Cost::of(None, Scope::Futures);
        assert_eq!((unlisted.pool, unlisted.weight), (Pool::Futures, 20));
        assert!(unlisted.is_pool_assumed && unlisted.is_weight_assumed);
    }
}
