//! Tests of the simulated KuCoin: golden requests, every endpoint of the catalogue, and third-party clients.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "tests and their helpers stop at the first unexpected result"
)]

mod cancelling;
mod catalogue;
mod client;
mod control;
mod faults;
mod golden;
mod keys;
mod limits;
mod orders;
mod program;
mod third_party;

/// The time of the golden requests; in most tests the clock of the simulator is stopped at it.
const NOW_MS: i64 = 1_735_689_600_123;
