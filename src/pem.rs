//! PEM files: certificates and private keys.
//!
//! The library's errors show what stands in the file, which can be the key itself: a key whose line breaks were lost is
//! one line, and the error shows the line. Only what kind of error it is leaves this file.

use rustls::pki_types::pem::{Error, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// What is wrong with a PEM file, without a byte of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PemProblem {
    /// A line of dashes that begins nothing known.
    #[error("a line that begins a section is malformed; are the line breaks still there?")]
    Begin,
    /// Not base64.
    #[error("a section is not base64")]
    Content,
    /// Cut off.
    #[error("a section has no end; is the file cut off, or are its line breaks lost?")]
    End,
    /// None of what was looked for.
    #[error("there is none in it")]
    Nothing,
    /// Anything else.
    #[error("it cannot be read as PEM")]
    Other,
}

/// All certificates in the text; at least one.
///
/// # Errors
/// When there is none, or the text is not PEM.
pub fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemProblem> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
    match found {
        Ok(found) if found.is_empty() => Err(PemProblem::Nothing),
        Ok(found) => Ok(found),
        Err(error) => Err(reduce(&error)),
    }
}

/// The first private key in the text.
///
/// # Errors
/// When there is none, or the text is not PEM.
pub fn private_key(text: &[u8]) -> Result<PrivateKeyDer<'static>, PemProblem> {
    PrivateKeyDer::from_pem_slice(text).map_err(|error| reduce(&error))
}

fn reduce(error: &Error) -> PemProblem {
    match error {
        Error::IllegalSectionStart { .. } => PemProblem::Begin,
        Error::Base64Decode(_) => PemProblem::Content,
        Error::MissingSectionEnd { .. } => PemProblem::End,
        Error::NoItemsFound => PemProblem::Nothing,
        _ => PemProblem::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said_without_a_byte_of_the_file() {
        let one_line =
            r"-----BEGIN PRIVATE KEY-----\nMC4CFakeFakeFake\n-----END PRIVATE KEY-----\n";
        let cases = [
            (one_line, PemProblem::End),
            ("-----BEGIN PRIVATE KEY-----MC4CFake\n", PemProblem::Begin),
            ("-----BEGIN PRIVATE KEY-----\nMC4CFake\n", PemProblem::End),
            (
                "-----BEGIN PRIVATE KEY-----\nMC4C*Fake\n-----END PRIVATE KEY-----\n",
                PemProblem::Content,
            ),
            ("MC4CFakeFakeFake", PemProblem::Nothing),
        ];
        for (text, expected) in cases {
            let problem = private_key(text.as_bytes()).unwrap_err();
            let told = problem.to_string();
            assert!(!told.contains("Fake") && !told.contains("70, 97"), "{told}");
            // Which of the two it is depends on where the library looks first.
            assert!(
                problem == expected || matches!(problem, PemProblem::Begin | PemProblem::End),
                "{text}: {problem:?}"
            );
            assert!(certificates(text.as_bytes()).is_err());
        }
    }
}
