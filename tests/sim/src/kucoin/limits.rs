//! Rate limits: weighted quotas per pool and account, and before them the edge's limit per address.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use http::{HeaderName, HeaderValue, Response};
use serde::{Deserialize, Serialize};

/// Quotas per pool for VIP 0, weight per 30 s. Source: KuCoin API documentation, "Rate Limit". The quota of the
/// Broker pool is not published, so it is not limited here.
const VIP_0: [(&str, u64); 7] = [
    ("CopyTrading", 2000),
    ("Earn", 2000),
    ("Futures", 2000),
    ("Management", 2000),
    ("Public", 2000),
    ("Spot", 4000),
    ("Unified", 2000),
];

/// The rate limits.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Weight per window for each pool; a pool that is not listed is unlimited and sends no `gw-ratelimit` headers.
    pub pools: BTreeMap<String, u64>,
    /// Length of a window, which starts at the first request. KuCoin: 30 s.
    pub window_ms: u64,
    /// Requests per address, to both hosts together, before the edge blocks it; unset: no limit. KuCoin (2023): 500.
    pub edge_requests: Option<u64>,
    /// Length of the edge's window. KuCoin: 10 s.
    pub edge_window_ms: u64,
    /// How long the edge blocks. KuCoin: 30 s.
    pub edge_block_ms: u64,
}

impl Limits {
    /// Limits that no load test reaches. The headers tell them, since a client may hold back what it believes to be over a limit.
    pub fn none() -> Self {
        Self {
            pools: VIP_0
                .map(|(pool, _)| (pool.to_owned(), 1_000_000_000))
                .into(),
            edge_requests: None,
            ..Self::default()
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pools: VIP_0.map(|(pool, quota)| (pool.to_owned(), quota)).into(),
            window_ms: 30_000,
            edge_requests: Some(500),
            edge_window_ms: 10_000,
            edge_block_ms: 30_000,
        }
    }
}

/// Whose quota is charged: private pools count per account, the public one per address.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) enum Subject {
    /// An account.
    Account(u64),
    /// An address.
    Address(IpAddr),
}

/// State of one quota after a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quota {
    limit: u64,
    remaining: u64,
    reset_ms: u64,
    /// The request exceeded it.
    pub(super) exceeded: bool,
}

impl Quota {
    /// A quota that is used up, for faults.
    pub(super) fn used_up(limit: u64, reset_ms: u64) -> Self {
        Self {
            limit,
            remaining: 0,
            reset_ms,
            exceeded: true,
        }
    }

    /// Adds the three `gw-ratelimit` headers to an answer.
    pub(super) fn label<T>(self, response: &mut Response<T>) {
        let headers = response.headers_mut();
        for (name, value) in [
            ("gw-ratelimit-limit", self.limit),
            ("gw-ratelimit-remaining", self.remaining),
            ("gw-ratelimit-reset", self.reset_ms),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from(value));
        }
    }
}

/// The counters.
#[derive(Debug, Default)]
pub(super) struct Usage {
    pools: HashMap<(String, Subject), Window>,
    edge: HashMap<IpAddr, Edge>,
}

#[derive(Debug)]
struct Window {
    started_ms: i64,
    used: u64,
}

#[derive(Debug)]
struct Edge {
    window: Window,
    blocked_until_ms: i64,
}

impl Usage {
    /// Resets all counters.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Charges a request to a pool; `None` for a pool without a limit. A request over the limit costs nothing.
    pub(super) fn charge(
        &mut self,
        limits: &Limits,
        pool: &str,
        subject: Subject,
        weight: u64,
        now_ms: i64,
    ) -> Option<Quota> {
        let limit = *limits.pools.get(pool)?;
        let window = self
            .pools
            .entry((pool.to_owned(), subject))
            .or_insert_with(|| Window::starting(now_ms));
        let left_ms = window.renew(limits.window_ms, now_ms);
        let exceeded = window.used.saturating_add(weight) > limit;
        if !exceeded {
            window.used += weight;
        }
        Some(Quota {
            limit,
            remaining: limit.saturating_sub(window.used),
            reset_ms: left_ms,
            exceeded,
        })
    }

    /// Counts a request at the edge; false if the address is blocked.
    pub(super) fn passes_edge(&mut self, limits: &Limits, from: IpAddr, now_ms: i64) -> bool {
        let Some(allowed) = limits.edge_requests else {
            return true;
        };
        let edge = self.edge.entry(from).or_insert_with(|| Edge {
            window: Window::starting(now_ms),
            blocked_until_ms: i64::MIN,
        });
        if now_ms < edge.blocked_until_ms {
            return false;
        }
        edge.window.renew(limits.edge_window_ms, now_ms);
        edge.window.used += 1;
        if edge.window.used > allowed {
            edge.blocked_until_ms = now_ms.saturating_add_unsigned(limits.edge_block_ms);
            edge.window = Window::starting(edge.blocked_until_ms);
            return false;
        }
        true
    }
}

impl Window {
    fn starting(now_ms: i64) -> Self {
        Self {
            started_ms: now_ms,
            used: 0,
        }
    }

    /// Restarts if it is over or the clock was set back; returns the remaining milliseconds.
    fn renew(&mut self, length_ms: u64, now_ms: i64) -> u64 {
        let age_ms = u64::try_from(now_ms.saturating_sub(self.started_ms)).ok();
        if let Some(age_ms) = age_ms.filter(|age| *age < length_ms) {
            return length_ms - age_ms;
        }
        *self = Self::starting(now_ms);
        length_ms
    }
}
