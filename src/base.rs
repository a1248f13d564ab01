//! Basic types and helpers, used by all other modules and independent of them.

pub(crate) mod backoff;
pub(crate) mod diagnosis;
pub(crate) mod encoding;
pub mod ids;
pub(crate) mod lock;
pub mod outcome;
pub(crate) mod paced;
pub(crate) mod pem;
pub mod secret;
pub(crate) mod state_file;
pub(crate) mod text;
pub(crate) mod toml_file;
pub(crate) mod trust;
