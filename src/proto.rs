//! The generated messages of `proto/credbroker/v1/`.

pub(crate) mod codec;

use std::fmt;

use zeroize::Zeroize;

pub use generated::*;

/// The compiled descriptors of the bots' API, for reflection.
pub(crate) const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Code generated from `proto/credbroker/v1/`.
#[allow(
    missing_docs,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
mod generated {
    tonic::include_proto!("credbroker.v1");
}

/// A key that an admin sent for a test: redacted in debug output, wiped on drop.
impl fmt::Debug for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Candidate(redacted)")
    }
}

impl Drop for Candidate {
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
    fn debug_output_redacts_the_candidate() {
        let candidate = Candidate {
            api_key: "fake-id".to_owned(),
            api_secret: "fake-secret".to_owned(),
            passphrase: "fake-passphrase".to_owned(),
            key_version: 3,
            partner_key: "fake-partner-key".to_owned(),
        };
        let request = TestKeyRequest {
            candidate: Some(candidate),
            ..TestKeyRequest::default()
        };
        let shown = format!("{request:?}");
        assert!(
            shown.contains("Some(Candidate(redacted))") && !shown.contains("fake"),
            "{shown}"
        );
    }
}
