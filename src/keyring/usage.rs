//! What the exchange has said about one key, in answers to real requests and to tests.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};

/// How long after one refusal the next one of the same kind is news again.
const OLD_NEWS_MS: i64 = 5000;

/// Kept as long as the key is in memory; another key begins anew.
#[derive(Debug, Default)]
pub struct Usage {
    /// When the exchange last took a request that it signed: Unix time in milliseconds; 0: never.
    accepted_ms: AtomicI64,
    refusal: Mutex<Option<Refusal>>,
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
    }

    /// The exchange has refused the key. Returns whether that is news.
    pub fn refused(&self, code: &str, now_ms: i64) -> bool {
        let mut refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = refusal
            .as_ref()
            .is_none_or(|before| before.code != code || now_ms - before.at_ms > OLD_NEWS_MS);
        if is_news {
            let code = code.to_owned();
            *refusal = Some(Refusal {
                code,
                at_ms: now_ms,
            });
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
        let refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
        let accepted_ms = self.accepted_ms.load(Ordering::Relaxed);
        refusal
            .clone()
            .filter(|refusal| refusal.at_ms > accepted_ms)
    }
}
