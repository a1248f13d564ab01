//! What all else is made of; knows nothing of the broker.

pub mod backoff;
pub mod diagnosis;
pub(crate) mod encoding;
pub mod ids;
pub mod lock;
pub mod outcome;
pub mod pem;
pub mod secret;
pub mod text;
pub mod toml_file;
pub mod trust;
