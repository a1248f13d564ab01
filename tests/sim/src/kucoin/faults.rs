//! Faults on demand: what can go wrong between a client and KuCoin, made to happen to chosen requests.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::catalog::Host;

/// A fault and the requests that it hits. Of several faults that fit a request, the one set first applies.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Only on this host; unset: on both.
    #[serde(default)]
    pub host: Option<Host>,
    /// Only for this method, upper case; unset: for every method.
    #[serde(default)]
    pub method: Option<String>,
    /// Path, without the query.
    pub path: String,
    /// Is `path` the whole path or its beginning?
    #[serde(default)]
    pub matching: Matching,
    /// So many fitting requests pass unharmed before.
    #[serde(default)]
    pub skip: u32,
    /// So many requests are hit; unset: every one until the faults are cleared.
    #[serde(default)]
    pub times: Option<u32>,
    /// What happens to them.
    pub action: FaultAction,
}

impl Fault {
    /// Hits the next request to exactly this path, on either host and with any method.
    pub fn once(path: impl Into<String>, action: FaultAction) -> Self {
        Self {
            host: None,
            method: None,
            path: path.into(),
            matching: Matching::Exact,
            skip: 0,
            times: Some(1),
            action,
        }
    }
}

/// How the path of a [`Fault`] is meant.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Matching {
    /// The whole path.
    #[default]
    Exact,
    /// Every path that starts with it.
    Prefix,
}

/// Does the fault happen before the exchange acted on the request, or after?
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// The exchange checked the request and acted on it: an order is placed.
    AfterTaken,
    /// The exchange never saw it.
    BeforeTaken,
}

/// What goes wrong.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultAction {
    /// Answers with this status and JSON.
    Answer {
        /// HTTP status.
        status: u16,
        /// The whole body.
        body: Value,
        /// Was the request taken?
        when: When,
    },
    /// Closes the connection without an answer.
    Close {
        /// Was the request taken?
        when: When,
    },
    /// Takes the request, sends the head and this many bytes of the body, then closes the connection.
    CutShort {
        /// Bytes of the body that get through.
        bytes: usize,
    },
    /// Waits, then takes the request and answers as usual.
    Delay {
        /// How long.
        ms: u64,
    },
    /// Answers with an HTML page.
    Html {
        /// HTTP status.
        status: u16,
        /// Was the request taken?
        when: When,
    },
    /// Takes the request and answers with a valid envelope that is far too large.
    Oversized {
        /// Size of the answer.
        megabytes: usize,
    },
    /// Answers 429 with code 429000; the request is not taken.
    RateLimited {
        /// With `gw-ratelimit` headers that say so many milliseconds; unset: without them, as on overload.
        reset_ms: Option<u64>,
    },
    /// Never answers and keeps the connection open.
    Stall {
        /// Was the request taken?
        when: When,
    },
}

/// The faults that are set.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<Fault>);

impl Faults {
    /// Adds one.
    pub(super) fn add(&mut self, fault: Fault) {
        self.0.push(fault);
    }

    /// Removes all.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// What happens to this request; counts it.
    pub(super) fn hit(&mut self, host: Host, method: &str, path: &str) -> Option<FaultAction> {
        let mut action = None;
        for fault in self
            .0
            .iter_mut()
            .filter(|fault| fault.fits(host, method, path))
        {
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            if let Some(times) = &mut fault.times {
                *times = times.saturating_sub(1);
            }
            action = Some(fault.action.clone());
            break;
        }
        self.0.retain(|fault| fault.times != Some(0));
        action
    }
}

impl Fault {
    fn fits(&self, host: Host, method: &str, path: &str) -> bool {
        self.host.is_none_or(|wanted| wanted == host)
            && self.method.as_deref().is_none_or(|wanted| wanted == method)
            && match self.matching {
                Matching::Exact => path == self.path,
                Matching::Prefix => path.starts_with(&self.path),
            }
    }
}
