//! What the exchange has said about one key, in answers to real requests and to tests.

use crate::base::lock::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

/// How long after one refusal the next one is news again: each piece of news has Vault asked.
const OLD_NEWS_MS: i64 = 5000;

/// Kept as long as the key is loaded; a new key starts over.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    /// When the exchange last took a request that it signed: Unix time in milliseconds; 0: never.
    accepted_ms: AtomicI64,
    /// Whether the exchange has refused the key since.
    is_refused: AtomicBool,
    refusal: Mutex<Option<Told>>,
}

/// The last refusal, and when one was news last.
#[derive(Debug)]
struct Told {
    refusal: Refusal,
    since_ms: i64,
}

/// A refusal of the key itself, its address, its permissions or its version.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Refusal {
    /// KuCoin's code.
    pub(crate) code: String,
    /// What the bot was told about it.
    pub(crate) advice: String,
    /// When: Unix time in milliseconds.
    pub(crate) at_ms: i64,
}

impl Usage {
    /// The exchange has taken a request that the key signed.
    pub(crate) fn accepted(&self, now_ms: i64) {
        self.accepted_ms.store(now_ms, Ordering::Relaxed);
        self.is_refused.store(false, Ordering::Relaxed);
    }

    /// The exchange has refused the key. Returns whether that is news, which it is now and then, whatever the code.
    pub(crate) fn refused(&self, refusal: Refusal) -> bool {
        let mut told = self.refusal.lock();
        // Also where the wall clock was set back.
        let is_fresh = |since_ms: &i64| (0..=OLD_NEWS_MS).contains(&(refusal.at_ms - since_ms));
        let since_ms = told.as_ref().map(|told| told.since_ms).filter(is_fresh);
        let is_news = since_ms.is_none();
        let since_ms = since_ms.unwrap_or(refusal.at_ms);
        *told = Some(Told { refusal, since_ms });
        self.is_refused.store(true, Ordering::Relaxed);
        is_news
    }

    /// When the exchange last took a request that it signed: Unix time in milliseconds.
    pub(crate) fn accepted_ms(&self) -> Option<i64> {
        let at_ms = self.accepted_ms.load(Ordering::Relaxed);
        (at_ms != 0).then_some(at_ms)
    }

    /// The last refusal, unless the exchange has taken a request since.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        let is_refused = self.is_refused.load(Ordering::Relaxed);
        let told = self.refusal.lock();
        told.as_ref()
            .filter(|_| is_refused)
            .map(|told| told.refusal.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_stands_until_a_request_is_taken_and_is_news_now_and_then() {
        let usage = Usage::default();
        let refused = |code: &str, at_ms| {
            usage.refused(Refusal {
                code: code.to_owned(),
                advice: format!("advice on {code}"),
                at_ms,
            })
        };
        assert_eq!((usage.accepted_ms(), usage.refusal()), (None, None));
        assert!(refused("400003", 1000));
        assert!(!refused("400003", 6000));
        assert!(refused("400003", 6001), "however many came in between");
        assert!(!refused("400006", 6002), "codes may alternate");
        assert_eq!(usage.refusal().unwrap().advice, "advice on 400006");
        // Whatever the clock says: the order counts.
        usage.accepted(5000);
        assert_eq!((usage.accepted_ms(), usage.refusal()), (Some(5000), None));
        assert!(!refused("400006", 6003));
        assert_eq!(usage.refusal().unwrap().at_ms, 6003);
        assert!(refused("400006", 1), "the clock was set back");
    }
}
