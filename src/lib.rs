//! credbroker signs and sends the KuCoin requests of trading bots, so that no bot holds an exchange key.
//!
//! A bot sends an unsigned request over gRPC with its own client certificate. The broker checks the rules, writes an audit
//! line, signs with a key from Vault, sends the request and returns the exchange's answer.
//!
//! # The path of one call
//!
//! Read these modules in this order to follow an order from its arrival to its answer:
//!
//! 1. [`server`] accepts TLS connections, and the certificate names the bot.
//! 2. [`api`] turns the message into an unsigned request and reports every invalid field.
//! 3. [`broker`] runs the call: `broker/call.rs` is the main path, from top to bottom.
//! 4. [`policy`] decides whether the rules allow the request, and returns a `Permit`. No key is handed out without it.
//! 5. [`restrictions`] has the halted accounts, blocked bots and revoked keys.
//! 6. [`audit`] writes the intent and returns the `Recorded` that sending requires. If it cannot write, it refuses
//!    risk-increasing requests.
//! 7. [`egress`] connects to the exchange from the configured address.
//! 8. [`keyring`] provides the key, [`clock`] the exchange's time, and [`kucoin`] signs.
//! 9. [`egress`] sends, [`kucoin`] reads the answer, and [`audit`] writes the outcome.
//!
//! # Around the path
//!
//! - [`vault`] reads keys from Vault, and [`keyring`] keeps the loaded keys in sync with Vault.
//! - [`ops`] tests keys, cancels all orders of an account, and reports health.
//! - [`config`] reads the configuration and the files that it names.
//! - [`telemetry`] has logs and metrics, [`process`] locks memory and prevents core dumps.
//! - [`cli`] is the command line: one file per command.
//! - [`proto`] has the generated messages, and [`base`] has what all other modules use.
//!
//! # Rules of the code
//!
//! - Dependencies point down: `main`, [`cli`], [`server`], [`api`], [`ops`], [`broker`]; then [`policy`], [`audit`],
//!   [`keyring`], [`egress`] and [`clock`]; then [`vault`], [`kucoin`] and [`restrictions`]; then [`base`] and [`proto`].
//! - [`kucoin`] and [`policy`] are pure: no I/O, no clock, no async.
//! - Only [`clock`] reads clocks, and only [`egress`] connects to the exchange.
//!
//! `ARCHITECTURE.md` has the invariants and the tests that check them, `docs/` the documents for bot authors, admins and
//! operators.
#![allow(
    rustdoc::private_intra_doc_links,
    reason = "a program: its documentation is built with private items"
)]

mod api;
mod audit;
pub mod base;
mod broker;
mod budgets;
pub mod cli;
pub mod clock;
pub mod config;
mod egress;
mod keyring;
pub mod kucoin;
mod ops;
mod orders;
pub mod policy;
mod process;
pub mod proto;
mod restrictions;
pub mod server;
pub mod telemetry;
pub mod vault;
