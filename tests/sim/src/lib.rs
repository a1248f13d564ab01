//! Simulated KuCoin and simulated Vault for credbroker's tests, its demo and bot authors.
//!
//! Nothing here ships in the broker. Both simulators bind to loopback only and label every answer as simulated.

pub mod http;
pub mod installation;
pub mod kucoin;
pub mod pki;
pub mod road;
pub mod vault;
