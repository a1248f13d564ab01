//! The gRPC services: they translate messages into requests of the broker, and its results into messages.

pub(crate) mod admin_error;
pub(crate) mod admins;
pub(crate) mod bots;
mod messages;
pub(crate) mod status;
