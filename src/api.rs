//! The gRPC services: they translate messages into requests of the broker, and its results into messages.

pub mod admin_error;
pub mod admins;
pub mod bots;
mod messages;
pub mod status;
