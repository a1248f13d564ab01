//! What the broker signs is what KuCoin verifies: against golden vectors made by others, and against a simulator that
//! reads the wire by itself.

mod catalogue;
mod queries;
mod vectors;
