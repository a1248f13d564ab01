//! The gRPC services: messages to requests of the broker, and its results back to messages.

pub(crate) mod admin_error;
pub(crate) mod admins;
pub(crate) mod bots;
mod budgets;
mod messages;
mod orders;
mod outcomes;
pub(crate) mod status;
