//! Simulated KuCoin and simulated Vault for credbroker's tests, its demo and bot authors.
//!
//! The broker does not contain this crate. Both simulators listen on loopback only and label every answer as simulated.

pub mod http;
pub mod installation;
pub mod kucoin;
pub mod pki;
pub mod proxy;
pub mod vault;
