//! The broker's signatures are valid: compared with golden vectors of other implementations, and verified by a simulator
//! with its own code.

mod catalogue;
mod queries;
mod vectors;
