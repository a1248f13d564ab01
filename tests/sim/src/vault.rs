//! The simulated Vault.
