//! The doors: they translate and decide nothing.

pub mod admin;
pub mod admin_error;
pub mod caller;
pub mod codec;
pub mod grpc;
pub mod key_health;
mod messages;
pub mod ops;
pub mod state;
pub mod status;

use std::fmt;

use zeroize::Zeroize;

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

/// A key that an admin sent to be tested: shows nothing, and is wiped on drop.
impl fmt::Debug for proto::Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Candidate(redacted)")
    }
}

impl Drop for proto::Candidate {
    fn drop(&mut self) {
        let Self {
            api_key,
            api_secret,
            passphrase,
            partner_key,
            ..
        } = self;
        for secret in [api_key, api_secret, passphrase, partner_key] {
            secret.zeroize();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_candidate() {
        let candidate = proto::Candidate {
            api_key: "fake-id".to_owned(),
            api_secret: "fake-secret".to_owned(),
            passphrase: "fake-passphrase".to_owned(),
            key_version: 3,
            partner_key: "fake-partner-key".to_owned(),
        };
        let request = proto::TestKeyRequest {
            candidate: Some(candidate),
            ..proto::TestKeyRequest::default()
        };
        let shown = format!("{request:?}");
        assert!(
            shown.contains("Some(Candidate(redacted))") && !shown.contains("fake"),
            "{shown}"
        );
    }
}
