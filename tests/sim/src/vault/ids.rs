//! Random tokens, accessors, UUIDs and unseal keys, different in each run.

use std::fmt::Write as _;
use std::io;

use aws_lc_rs::{digest, rand};

/// Values from SHA-256 of a random seed and a counter: only the start of the simulator needs randomness and can fail.
pub(super) struct Ids {
    seed: [u8; 32],
    drawn: u64,
}

impl Ids {
    pub(super) fn new() -> io::Result<Self> {
        let mut seed = [0; 32];
        rand::fill(&mut seed).map_err(|_| io::Error::other("the system provides no randomness"))?;
        Ok(Self { seed, drawn: 0 })
    }

    /// 32 bytes.
    pub(super) fn bytes(&mut self) -> Vec<u8> {
        self.drawn += 1;
        let mut hash = digest::Context::new(&digest::SHA256);
        hash.update(&self.seed);
        hash.update(&self.drawn.to_be_bytes());
        hash.finish().as_ref().to_vec()
    }

    /// A service token in the format of `OpenBao`: `s.` and 24 letters and digits.
    pub(super) fn token(&mut self) -> String {
        format!("s.{}", self.accessor())
    }

    /// 24 letters and digits.
    pub(super) fn accessor(&mut self) -> String {
        hex(&self.bytes()).chars().take(24).collect()
    }

    /// A version 4 UUID, lower case.
    pub(super) fn uuid(&mut self) -> String {
        let mut text = hex(&self.bytes());
        text.truncate(32);
        for at in [8, 13, 18, 23] {
            text.insert(at, '-');
        }
        text.replace_range(14..15, "4");
        text.replace_range(19..20, "8");
        text
    }
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
