//! Behaviour of a running broker, against simulated KuCoin and simulated Vault on loopback.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on says so by panicking"
)]

mod harness;

mod audit;
mod certificates;
mod contract;
mod delivery;
mod deploy;
mod keys;
mod load;
mod policy;
mod secrecy;
mod shutdown;
mod signing;
