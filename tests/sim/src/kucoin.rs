//! The simulated KuCoin.
