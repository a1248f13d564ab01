//! Faults on demand: failures between a client and KuCoin, for chosen requests.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use super::catalog::Host;

/// A fault and the requests that it hits. If several faults match a request, the one added first applies.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Host; unset: both.
    #[serde(default)]
    pub host: Option<Host>,
    /// Method, in upper case; unset: every method.
    #[serde(default)]
    pub method: Option<String>,
    /// Path, without the query.
    pub path: String,
    /// Whether `path` is the complete path or its start.
    #[serde(default)]
    pub matching: Matching,
    /// How many matching requests pass before the fault starts.
    #[serde(default)]
    pub skip: u32,
    /// How many requests it hits; unset: all until the faults are cleared.
    #[serde(default)]
    pub times: Option<u32>,
    /// What the fault does.
    pub action: FaultAction,
}

impl Fault {
    /// A fault for the next request to exactly this path, on any host and with any method.
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

/// How the path of a [`Fault`] is compared.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Matching {
    /// The path is equal.
    #[default]
    Exact,
    /// The path starts with it.
    Prefix,
}

/// Whether the fault happens before or after the exchange processes the request.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// The exchange has processed the request: an order is placed.
    AfterProcessing,
    /// The exchange never processes the request.
    BeforeProcessing,
}

/// What a fault does.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultAction {
    /// Answers with this status and JSON.
    Answer {
        /// HTTP status.
        status: u16,
        /// The body.
        body: Value,
        /// Whether the request was processed.
        when: When,
    },
    /// Closes the connection without an answer.
    Close {
        /// Whether the request was processed.
        when: When,
    },
    /// Processes the request, sends the head and this many bytes of the body, then closes the connection.
    CutShort {
        /// Bytes of the body that are sent.
        bytes: usize,
    },
    /// Waits, then processes the request and answers it normally.
    Delay {
        /// Milliseconds to wait.
        ms: u64,
    },
    /// Sends informational answers with status 103 without end, and never an answer; the request is not processed.
    EarlyHints {},
    /// Answers 429 with an HTML page and `retry-after`, as the edge does when it blocks an address; the request is not processed.
    EdgeBlock {
        /// Seconds in `retry-after`.
        retry_after_s: u64,
    },
    /// Keeps the request until the faults are cleared, then processes it and answers normally.
    Hold {},
    /// Answers with an HTML page.
    Html {
        /// HTTP status.
        status: u16,
        /// Whether the request was processed.
        when: When,
    },
    /// Processes the request and answers with a valid envelope in chunks of one byte.
    OneByteChunks {
        /// Size of the envelope.
        kilobytes: usize,
    },
    /// Processes the request and answers with the ids of another order.
    OtherOrder {},
    /// Processes the request and answers with a valid envelope that is far too large.
    Oversized {
        /// Size of the answer.
        megabytes: usize,
    },
    /// Answers 429 with code 429000; the request is not processed.
    RateLimited {
        /// Milliseconds in the `gw-ratelimit` headers; unset: without these headers, as on overload.
        reset_ms: Option<u64>,
    },
    /// Keeps the connection open and never answers.
    Stall {
        /// Whether the request was processed.
        when: When,
    },
}

/// The active faults.
#[derive(Debug, Default)]
pub(super) struct Faults {
    active: Vec<Fault>,
    /// How many requests were hit.
    pub(super) hits: u64,
    /// Notified when the faults are cleared.
    pub(super) cleared: watch::Sender<()>,
}

impl Faults {
    /// Adds a fault.
    pub(super) fn add(&mut self, fault: Fault) {
        self.active.push(fault);
    }

    /// Removes all faults.
    pub(super) fn clear(&mut self) {
        self.active.clear();
        self.cleared.send_replace(());
    }

    /// The fault that hits this request, if any; counts the request.
    pub(super) fn hit(&mut self, host: Host, method: &str, path: &str) -> Option<FaultAction> {
        let mut action = None;
        for fault in self
            .active
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
        self.active.retain(|fault| fault.times != Some(0));
        self.hits += u64::from(action.is_some());
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
