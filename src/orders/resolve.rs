//! Decides from the answers of lookups what became of an order that may have been placed. No I/O and no clock.
//!
//! The order is placed only if a lookup finds the one that was sent. It is absent only if the exchange rejects its request from
//! now on, and two lookups after that, for the same account, did not find it. Everything else is asked again for a while, and
//! is unknown then.

use std::time::Duration;

use crate::clock::ExchangeTime;
use crate::kucoin::lookup::LookupResult;

/// The exchange rejects a request whose timestamp is older. Source: KuCoin API documentation, "Authentication".
const TIMESTAMP_VALID_MS: i64 = 5000;

/// For a request that the exchange has accepted in time and has not processed yet. Our own choice: no source has a limit.
const PROCESSED_WITHIN_MS: i64 = 2000;

/// The least time from the answer that did not find the order to the lookup that confirms it.
const APART: Duration = Duration::from_secs(1);

/// The wait before the first lookup; it doubles after each one, up to [`LONGEST_WAIT`].
pub(crate) const FIRST_WAIT: Duration = Duration::from_millis(500);

const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// How long an order is looked up, without the time in which other orders had their turn: longer than most outages.
const LOOK_UP_FOR: Duration = Duration::from_secs(600);

/// What became of an order that may have been placed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Resolution {
    /// It was placed, with this order id.
    Placed(String),
    /// It was not placed, and will not be.
    Absent,
    /// The lookups do not show it; why not.
    Unknown(String),
}

impl Resolution {
    /// The name in audit lines, logs and metrics.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::Placed(_) => "placed",
            Self::Absent => "absent",
            Self::Unknown(_) => "unknown",
        }
    }
}

/// For which KuCoin account a lookup was signed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum SignedFor {
    /// The account of the order.
    Same,
    /// Another one, at least before or after the lookup.
    Other,
    /// That account, or the one of the order, is not known.
    Untested,
}

/// When and how a lookup was sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SentLookup {
    /// Time since boot when it was sent.
    pub(crate) sent: Duration,
    /// Time since boot when it had its answer, or had failed.
    pub(crate) answered: Duration,
    /// The exchange's time when it was sent.
    pub(crate) exchange: ExchangeTime,
    /// The account.
    pub(crate) signed_for: SignedFor,
}

/// What to do after a lookup.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Next {
    /// Look the order up again after this time.
    AskAgain(Duration),
    /// It is known what became of the order, or it is given up.
    Resolved(Resolution),
}

/// The lookups of one order so far.
#[derive(Debug)]
pub(crate) struct Resolver {
    /// `None`: an earlier order has the clientOid, so the order can never be absent.
    signed_ms: Option<i64>,
    /// Whether the order is amended, so that it differs until the exchange has done that.
    is_amendment: bool,
    /// The time for waits and answers so far, the coming wait included.
    spent: Duration,
    backoff: Duration,
    /// When the first answer came that counts and did not find the order.
    not_found: Option<Duration>,
}

impl Resolver {
    /// For an order whose request was signed at `signed_ms` (Unix milliseconds); `None` if the exchange has rejected it because
    /// an earlier order has its clientOid. The first lookup is due after [`FIRST_WAIT`].
    pub(crate) fn new(signed_ms: Option<i64>, is_amendment: bool) -> Self {
        Self {
            signed_ms,
            is_amendment,
            spent: FIRST_WAIT,
            backoff: FIRST_WAIT * 2,
            not_found: None,
        }
    }

    /// What to do after this lookup.
    pub(crate) fn next(&mut self, lookup: SentLookup, result: LookupResult) -> Next {
        let mut wait = self.backoff;
        self.backoff = (self.backoff * 2).min(LONGEST_WAIT);
        let possible_for = self.possible_for(lookup.exchange);
        let why = match (result, lookup.signed_for) {
            (_, SignedFor::Other) => {
                "the key belongs to another KuCoin account than the order".to_owned()
            }
            (LookupResult::Found { order_id, .. }, _) => {
                return Next::Resolved(Resolution::Placed(order_id));
            }
            (LookupResult::Differs(why), _) => {
                let left = possible_for.filter(|left| self.is_amendment && !left.is_zero());
                let why = format!("the exchange has another order with this clientOid: {why}");
                let Some(left) = left else {
                    return Next::Resolved(Resolution::Unknown(why));
                };
                wait = wait.min(left);
                why
            }
            (LookupResult::Unclear(why), _) => why,
            (LookupResult::NotFound, SignedFor::Untested) => {
                "no order was found, but no key test has shown the key's KuCoin account".to_owned()
            }
            (LookupResult::NotFound, SignedFor::Same) => match (possible_for, self.not_found) {
                (Some(Duration::ZERO), Some(first)) if lookup.sent >= first + APART => {
                    return Next::Resolved(Resolution::Absent);
                }
                (Some(Duration::ZERO), first) => {
                    self.not_found = first.or(Some(lookup.answered));
                    wait = APART;
                    "no order was found, and no second lookup has confirmed that".to_owned()
                }
                (Some(left), _) => {
                    wait = wait.min(left);
                    "no order was found, but it could still be placed".to_owned()
                }
                (None, _) => {
                    "no order was found, but that does not prove that none exists".to_owned()
                }
            },
        };
        self.spent += lookup.answered.saturating_sub(lookup.sent) + wait;
        if self.spent > LOOK_UP_FOR {
            return Next::Resolved(Resolution::Unknown(why));
        }
        Next::AskAgain(wait)
    }

    /// For how long, from the time of a lookup, the exchange can still accept or process the request; `None`: unknown.
    fn possible_for(&self, exchange: ExchangeTime) -> Option<Duration> {
        let until_ms = self.signed_ms? + TIMESTAMP_VALID_MS + PROCESSED_WITHIN_MS;
        let left_ms = until_ms.saturating_sub(exchange.earliest_ms()?) + 1;
        Some(Duration::from_millis(left_ms.max(0).unsigned_abs()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGNED_MS: i64 = 1_767_225_600_000;

    /// A lookup that was sent `sent_ms` after the order was signed and answered 100 ms later.
    fn sent(sent_ms: u64, uncertainty_ms: u64) -> SentLookup {
        let sent = Duration::from_millis(sent_ms);
        SentLookup {
            sent,
            answered: sent + Duration::from_millis(100),
            exchange: ExchangeTime {
                ms: SIGNED_MS + i64::try_from(sent_ms).unwrap(),
                uncertainty: Some(Duration::from_millis(uncertainty_ms)),
                age: Some(Duration::ZERO),
            },
            signed_for: SignedFor::Same,
        }
    }

    fn ask_again(ms: u64) -> Next {
        Next::AskAgain(Duration::from_millis(ms))
    }

    fn absent() -> Next {
        Next::Resolved(Resolution::Absent)
    }

    fn unclear() -> LookupResult {
        LookupResult::Unclear("HTTP 500".to_owned())
    }

    #[test]
    fn order_is_absent_only_after_two_lookups_once_the_exchange_rejects_its_timestamp() {
        let not_found = LookupResult::NotFound;
        let mut order = Resolver::new(Some(SIGNED_MS), false);
        assert_eq!(
            order.next(sent(500, 300), not_found.clone()),
            ask_again(1000)
        );
        assert_eq!(
            order.next(sent(1600, 300), not_found.clone()),
            ask_again(2000)
        );
        // 7 s and the uncertainty.
        assert_eq!(
            order.next(sent(5000, 300), not_found.clone()),
            ask_again(2301)
        );
        assert_eq!(order.next(sent(7300, 300), not_found.clone()), ask_again(1));
        assert_eq!(
            order.next(sent(7301, 300), not_found.clone()),
            ask_again(1000)
        );
        // 1 s after the answer to the lookup before, and a failed lookup between is none.
        assert_eq!(
            order.next(sent(8000, 300), not_found.clone()),
            ask_again(1000)
        );
        assert!(matches!(
            order.next(sent(8100, 300), unclear()),
            Next::AskAgain(_)
        ));
        assert_eq!(
            order.next(sent(8400, 300), not_found.clone()),
            ask_again(1000)
        );
        assert_eq!(order.next(sent(8401, 300), not_found), absent());
    }

    #[test]
    fn order_is_not_absent_if_the_account_the_time_or_the_order_is_uncertain() {
        let later = |order: &mut Resolver, change: &dyn Fn(&mut SentLookup)| {
            let mut last = None;
            for seconds in 10..100 {
                let mut lookup = sent(seconds * 1000, 10);
                change(&mut lookup);
                last = Some(order.next(lookup, LookupResult::NotFound));
            }
            last.unwrap()
        };
        let is_unknown = |next: Next, why: &str| {
            let Next::Resolved(Resolution::Unknown(text)) = next else {
                panic!("{next:?}")
            };
            assert!(text.contains(why), "{text}");
        };
        let signed = Some(SIGNED_MS);
        let mut of_other = Resolver::new(signed, false);
        let other: &dyn Fn(&mut SentLookup) = &|lookup| lookup.signed_for = SignedFor::Other;
        is_unknown(later(&mut of_other, other), "another KuCoin account");
        let mut untested = Resolver::new(signed, false);
        let unknown: &dyn Fn(&mut SentLookup) = &|lookup| lookup.signed_for = SignedFor::Untested;
        is_unknown(later(&mut untested, unknown), "no key test");
        let mut unmeasured = Resolver::new(signed, false);
        let no_time: &dyn Fn(&mut SentLookup) = &|lookup| lookup.exchange.uncertainty = None;
        is_unknown(later(&mut unmeasured, no_time), "does not prove");
        let mut duplicate = Resolver::new(None, false);
        is_unknown(later(&mut duplicate, &|_| {}), "does not prove");
        // For comparison.
        let mut order = Resolver::new(signed, false);
        assert_eq!(later(&mut order, &|_| {}), absent());
    }

    #[test]
    fn only_the_order_that_was_sent_counts_as_placed() {
        let found = LookupResult::Found {
            order_id: "7".to_owned(),
            state: None,
        };
        let placed = Next::Resolved(Resolution::Placed("7".to_owned()));
        let mut order = Resolver::new(Some(SIGNED_MS), false);
        assert_eq!(order.next(sent(500, 10), found.clone()), placed);
        let mut of_other = sent(500, 10);
        of_other.signed_for = SignedFor::Other;
        assert_eq!(order.next(of_other, found), ask_again(2000));
        let differs = LookupResult::Differs("size differs".to_owned());
        let mut amended = Resolver::new(Some(SIGNED_MS), true);
        assert_eq!(
            amended.next(sent(500, 10), differs.clone()),
            ask_again(1000)
        );
        let next = order.next(sent(2000, 10), differs.clone());
        let why = "the exchange has another order with this clientOid: size differs";
        let unknown = Next::Resolved(Resolution::Unknown(why.to_owned()));
        assert_eq!(next, unknown);
        assert_eq!(amended.next(sent(7011, 10), differs), unknown);
    }

    #[test]
    fn order_is_unknown_after_ten_minutes_of_unclear_answers() {
        let mut order = Resolver::new(Some(SIGNED_MS), false);
        let (mut at_ms, mut waits) = (500, vec![500]);
        let last = loop {
            // In the queue of the lookups, which does not count.
            at_ms += 60_000;
            match order.next(sent(at_ms, 10), unclear()) {
                Next::AskAgain(wait) => waits.push(u64::try_from(wait.as_millis()).unwrap()),
                last @ Next::Resolved(_) => break last,
            }
        };
        assert_eq!(waits[..7], [500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
        assert_eq!(waits.len(), 62, "{waits:?}");
        let why = "HTTP 500".to_owned();
        assert_eq!(last, Next::Resolved(Resolution::Unknown(why)));
    }
}
