//! What the exchange has said about one key, in answers to real requests and to tests.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How long after one refusal the next one is news again.
const OLD_NEWS_MS: i64 = 5000;

/// Kept as long as the key is in memory; another key begins anew.
#[derive(Debug, Default)]
pub struct Usage {
    /// When the exchange last took a request that it signed: Unix time in milliseconds; 0: never.
    accepted_ms: AtomicI64,
    /// Whether the last answer was a refusal.
    is_refused: AtomicBool,
    refusals: Mutex<Refusals>,
}

#[derive(Debug, Default)]
struct Refusals {
    last: Option<Refusal>,
    /// When one was last told as news.
    told_ms: Option<i64>,
}

/// A refusal of the key itself, its address, its permissions or its version.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// KuCoin's code.
    pub code: String,
    /// When: Unix time in milliseconds.
    pub at_ms: i64,
}

impl Usage {
    /// The exchange has taken a request that the key signed.
    pub fn accepted(&self, now_ms: i64) {
        self.accepted_ms.store(now_ms, Ordering::Relaxed);
        self.is_refused.store(false, Ordering::Relaxed);
    }

    /// The exchange has refused the key. Returns whether that is news, which it is once in a while, whatever the code.
    pub fn refused(&self, code: &str, now_ms: i64) -> bool {
        let mut refusals = self.refusals();
        self.is_refused.store(true, Ordering::Relaxed);
        refusals.last = Some(Refusal {
            code: code.to_owned(),
            at_ms: now_ms,
        });
        // Also where the wall clock was set back.
        let is_old = |told_ms: i64| !(0..=OLD_NEWS_MS).contains(&(now_ms - told_ms));
        let is_news = refusals.told_ms.is_none_or(is_old);
        if is_news {
            refusals.told_ms = Some(now_ms);
        }
        is_news
    }

    /// When the exchange last took a request that it signed: Unix time in milliseconds.
    pub fn accepted_ms(&self) -> Option<i64> {
        let at_ms = self.accepted_ms.load(Ordering::Relaxed);
        (at_ms != 0).then_some(at_ms)
    }

    /// The last refusal, unless the exchange has taken a request since.
    pub fn refusal(&self) -> Option<Refusal> {
        let is_refused = self.is_refused.load(Ordering::Relaxed);
        self.refusals().last.clone().filter(|_| is_refused)
    }

    fn refusals(&self) -> MutexGuard<'_, Refusals> {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_answer_says_whether_a_key_is_refused_however_close_they_are() {
        let usage = Usage::default();
        assert_eq!(usage.refusal(), None);
        usage.refused("400003", 1000);
        usage.accepted(2000);
        assert_eq!(usage.refusal(), None);
        usage.refused("400003", 2000);
        assert_eq!(usage.refusal().unwrap().at_ms, 2000);
        usage.accepted(2000);
        assert_eq!((usage.refusal(), usage.accepted_ms()), (None, Some(2000)));
        // The wall clock was set back.
        usage.refused("400006", 100);
        assert_eq!(usage.refusal().unwrap().code, "400006");
    }

    #[test]
    fn refusals_are_news_once_in_a_while_however_their_codes_alternate() {
        let usage = Usage::default();
        let news: Vec<_> = (0..20_000)
            .step_by(100)
            .filter(|now| {
                usage.refused(["400006", "400007"][usize::from(now / 100 % 2 == 1)], *now)
            })
            .collect();
        assert_eq!(news, [0, 5100, 10_200, 15_300]);
        assert!(usage.refused("400003", -1), "set back");
    }
}
