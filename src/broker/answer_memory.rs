//! Limits the memory that answers of the exchange use, per bot and for all bots.
//!
//! A read is refused, or its answer is dropped, when a budget is used up. A call that changes something takes what it needs
//! and is never dropped; the number of calls in flight and the size of one answer limit it. Requests of admins and of the
//! broker itself are not counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::error::AnswerLimit;

/// Bytes that each call reserves before it is sent; few answers are longer.
pub(crate) const RESERVED: usize = 64 * 1024;

/// Bytes of answers in memory, of one bot or of all bots.
#[derive(Debug)]
pub(super) struct AnswerBudget {
    limit: usize,
    /// More than `limit` if calls that change something needed more.
    used: AtomicUsize,
}

/// The memory of the answer to one call; free again when it drops.
#[derive(Debug)]
pub(super) struct AnswerMemory {
    of_bot: Arc<AnswerBudget>,
    shared: Arc<AnswerBudget>,
    /// Whether the call is dropped when a budget is used up.
    is_read: bool,
    /// Bytes received so far; those of an earlier attempt count too. Only the task of the call adds to them.
    received: AtomicUsize,
}

impl AnswerBudget {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            used: AtomicUsize::new(0),
        }
    }

    fn take(&self, bytes: usize, is_read: bool) -> bool {
        let taken = |used: usize| Some(used + bytes).filter(|&used| !is_read || used <= self.limit);
        let taken = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken);
        taken.is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl AnswerMemory {
    /// Reserves the first [`RESERVED`] bytes.
    ///
    /// # Errors
    /// The budget that is used up; only for a read.
    pub(super) fn reserve(
        of_bot: &Arc<AnswerBudget>,
        shared: &Arc<AnswerBudget>,
        is_read: bool,
    ) -> Result<Self, AnswerLimit> {
        take_both(of_bot, shared, RESERVED, is_read)?;
        Ok(Self {
            of_bot: Arc::clone(of_bot),
            shared: Arc::clone(shared),
            is_read,
            received: AtomicUsize::new(0),
        })
    }

    /// Counts `bytes` more that have arrived.
    ///
    /// # Errors
    /// The budget that is used up; only for a read.
    pub(super) fn add(&self, bytes: usize) -> Result<(), AnswerLimit> {
        let before = self.received.load(Ordering::Relaxed);
        let after = before + bytes;
        let more = after.max(RESERVED) - before.max(RESERVED);
        if more > 0 {
            take_both(&self.of_bot, &self.shared, more, self.is_read)?;
        }
        self.received.store(after, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for AnswerMemory {
    fn drop(&mut self) {
        let taken = self.received.load(Ordering::Relaxed).max(RESERVED);
        self.of_bot.give_back(taken);
        self.shared.give_back(taken);
    }
}

fn take_both(
    of_bot: &AnswerBudget,
    shared: &AnswerBudget,
    bytes: usize,
    is_read: bool,
) -> Result<(), AnswerLimit> {
    if !of_bot.take(bytes, is_read) {
        return Err(AnswerLimit::OfBot(of_bot.limit));
    }
    if !shared.take(bytes, is_read) {
        of_bot.give_back(bytes);
        return Err(AnswerLimit::All(shared.limit));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_stay_within_both_budgets_and_other_calls_take_what_they_need() {
        let budget = |reserves| Arc::new(AnswerBudget::new(reserves * RESERVED));
        let (one, two, shared) = (budget(2), budget(2), budget(3));
        let used = || [&one, &two, &shared].map(|budget| budget.used.load(Ordering::Relaxed));
        let reserve = |of_bot, is_read| AnswerMemory::reserve(of_bot, &shared, is_read);
        let first = reserve(&one, true).unwrap();
        first.add(RESERVED).unwrap();
        assert_eq!(used(), [RESERVED, 0, RESERVED], "bytes within the reserve");
        first.add(RESERVED - 1).unwrap();
        first.add(1).unwrap();
        assert_eq!(first.add(1), Err(AnswerLimit::OfBot(2 * RESERVED)));
        assert_eq!(
            reserve(&one, true).unwrap_err(),
            AnswerLimit::OfBot(2 * RESERVED)
        );
        let second = reserve(&two, true).unwrap();
        let full = Err(AnswerLimit::All(3 * RESERVED));
        assert_eq!(second.add(RESERVED + 1), full);
        assert_eq!(used(), [2 * RESERVED, RESERVED, 3 * RESERVED]);
        let order = reserve(&one, false).unwrap();
        order.add(5 * RESERVED).unwrap();
        assert_eq!(used(), [7 * RESERVED, RESERVED, 8 * RESERVED]);
        drop(first);
        assert_eq!(second.add(RESERVED + 1), full, "the order still uses it");
        drop(order);
        second.add(2 * RESERVED).unwrap();
        drop(second);
        assert_eq!(used(), [0; 3]);
    }
}
