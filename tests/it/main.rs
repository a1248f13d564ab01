//! Behaviour of a running broker, against simulated KuCoin and simulated Vault on loopback.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]
#![expect(
    clippy::print_stdout,
    reason = "simulator processes print a line when they listen"
)]
#![expect(
    clippy::too_many_lines,
    reason = "a long scenario stays in one function"
)]

mod harness;

mod admin;
mod answer_memory;
mod answers;
mod audit;
mod batches;
mod blocks;
mod budgets;
mod certificates;
mod chaos;
mod clock;
mod commands;
mod connections;
mod contract;
mod delivery;
mod deploy;
mod doctor;
mod documents;
mod drain;
mod drive;
mod egress;
mod examples;
mod firewall;
mod floods;
mod halt;
mod hostile;
mod key_health;
mod keys;
mod language;
mod late;
mod load;
mod memory;
mod network;
mod ops;
mod orders;
mod outcomes;
mod policy;
mod process;
mod proto_baseline;
mod raw_bot;
mod reload;
mod resolution;
mod restrictions;
mod rotation;
mod secrecy;
mod shutdown;
mod signing;
mod situations;
mod sockets;
mod state;
mod systemd;
