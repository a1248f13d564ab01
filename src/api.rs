//! The doors: messages in, messages out.

pub mod admin_error;
pub mod admins;
pub mod bots;
mod messages;
pub mod status;
