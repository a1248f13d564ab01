//! credbroker: sends the unsigned requests of trading bots to KuCoin, signed with keys that the bots never see.
//!
//! In reading order: [`broker`] is the request path; [`policy`], [`audit`], [`keyring`], [`clock`] and [`egress`] answer
//! its questions; [`kucoin`] holds the exchange's rules, [`restrictions`] what admins have forbidden; [`vault`] is where
//! keys come from; [`ops`] tests keys, cancels everything and says how the broker is. [`api`] holds the doors, [`proto`]
//! their messages, [`server`] puts everything together from [`config`], [`cli`] is the command line, and [`base`] is what
//! all else is made of.
#![allow(
    rustdoc::private_intra_doc_links,
    reason = "a program: its documentation is made with private items"
)]

mod api;
mod audit;
pub mod base;
mod broker;
pub mod cli;
pub mod clock;
pub mod config;
mod egress;
mod keyring;
pub mod kucoin;
mod ops;
pub mod policy;
mod process;
pub mod proto;
mod restrictions;
pub mod server;
pub mod telemetry;
pub mod vault;
