//! The simulated KuCoin, judged by golden requests, by the catalogue and by clients that are not ours.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test ends at the first surprise, its helpers included"
)]

mod catalogue;
mod client;
mod control;
mod faults;
mod golden;
mod keys;
mod limits;
mod orders;
mod others;
mod program;
mod withdrawing;

/// The clock of the golden requests; the simulators of most tests stand still at it.
const NOW_MS: i64 = 1_735_689_600_123;
