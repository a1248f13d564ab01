//! How the exchange has responded to one key, to requests of bots and to tests.

use crate::base::lock::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

/// How long after one rejection the next one counts as new: each new one triggers a refresh from Vault.
const NEWS_INTERVAL_MS: i64 = 5000;

/// Kept as long as the key is loaded; a new key starts over.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    /// When the exchange last accepted a request that it signed: Unix time in milliseconds; 0: never.
    accepted_ms: AtomicI64,
    /// Whether the exchange has rejected the key since.
    is_refused: AtomicBool,
    refusal: Mutex<Option<LastRefusal>>,
}

/// The last rejection, and when one last counted as new.
#[derive(Debug)]
struct LastRefusal {
    refusal: Refusal,
    news_ms: i64,
}

/// A rejection of the key itself, its address, its permissions or its version.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Refusal {
    /// KuCoin's code.
    pub(crate) code: String,
    /// The advice that the bot got.
    pub(crate) advice: String,
    /// When: Unix time in milliseconds.
    pub(crate) at_ms: i64,
}

impl Usage {
    /// The exchange has accepted a request that the key signed.
    pub(crate) fn accepted(&self, now_ms: i64) {
        self.accepted_ms.store(now_ms, Ordering::Relaxed);
        self.is_refused.store(false, Ordering::Relaxed);
    }

    /// The exchange has rejected the key. Returns whether that counts as new, at most once in 5 s, whatever the code.
    pub(crate) fn refused(&self, refusal: Refusal) -> bool {
        let mut last = self.refusal.lock();
        // After the wall clock was set back, the difference is negative: the rejection counts as new.
        let is_recent = |news_ms: &i64| (0..=NEWS_INTERVAL_MS).contains(&(refusal.at_ms - news_ms));
        let news_ms = last.as_ref().map(|last| last.news_ms).filter(is_recent);
        let is_news = news_ms.is_none();
        let news_ms = news_ms.unwrap_or(refusal.at_ms);
        *last = Some(LastRefusal { refusal, news_ms });
        self.is_refused.store(true, Ordering::Relaxed);
        is_news
    }

    /// When the exchange last accepted a request that it signed: Unix time in milliseconds.
    pub(crate) fn accepted_ms(&self) -> Option<i64> {
        let at_ms = self.accepted_ms.load(Ordering::Relaxed);
        (at_ms != 0).then_some(at_ms)
    }

    /// The last rejection, unless the exchange has accepted a request since.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        let is_refused = self.is_refused.load(Ordering::Relaxed);
        let last = self.refusal.lock();
        last.as_ref()
            .filter(|_| is_refused)
            .map(|last| last.refusal.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejection_lasts_until_a_request_is_accepted_and_counts_as_new_once_in_5_s() {
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
        // The order of the calls counts, not the clock.
        usage.accepted(5000);
        assert_eq!((usage.accepted_ms(), usage.refusal()), (Some(5000), None));
        assert!(!refused("400006", 6003));
        assert_eq!(usage.refusal().unwrap().at_ms, 6003);
        assert!(refused("400006", 1), "the clock was set back");
    }
}
