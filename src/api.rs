//! The doors: they translate and decide nothing.

pub mod admin;
pub mod caller;
pub mod grpc;
pub mod ops;
pub mod standing;
pub mod state;
pub mod status;

/// Code generated from `proto/credbroker/v1/`.
#[allow(
    missing_docs,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod proto {
    tonic::include_proto!("credbroker.v1");

    /// The compiled descriptors of the bots' door, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
