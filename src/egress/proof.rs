//! Checks that requests leave from the address on the keys' whitelists at the exchange.
//!
//! The broker requests its own address from the exchange, over the connections that carry orders. A failed check proves
//! nothing: the last result stays valid, and its age is reported.

use crate::base::lock::Mutex;
use std::net::IpAddr;
use std::time::Duration;

/// What to do about an address that is not the expected one.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ProofMode {
    /// Report the mismatch, and continue.
    Lenient,
    /// Refuse risk-increasing requests, also before the first check has succeeded.
    #[default]
    Strict,
}

/// What is known about the egress address.
#[derive(Debug)]
pub(crate) struct Proof {
    expected: IpAddr,
    mode: ProofMode,
    state: Mutex<ProofState>,
}

#[derive(Clone, Debug, Default)]
struct ProofState {
    /// The address that the exchange saw last, and when (time since boot).
    seen: Option<(IpAddr, Duration)>,
    /// Why the last check failed; `None` if it succeeded.
    failure: Option<String>,
    /// The address in the last rejection with code 400006, if it named one, and when (time since boot).
    refused: Option<(Option<IpAddr>, Duration)>,
}

/// The state for readiness and metrics.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct ProofStatus {
    /// The address that the exchange saw last, and when (time since boot).
    pub(crate) seen: Option<(IpAddr, Duration)>,
    /// Why the last check failed; `None` if it succeeded.
    pub(crate) failure: Option<String>,
    /// The address in the last rejection with code 400006, if it named one, and when (time since boot).
    pub(crate) refused: Option<(Option<IpAddr>, Duration)>,
    /// The mismatch, if there is one.
    pub(crate) mismatch: Option<EgressMismatch>,
    /// Whether a mismatch blocks risk-increasing requests.
    pub(crate) is_strict: bool,
}

/// It is not proven that requests leave from the expected address.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum EgressMismatch {
    /// The exchange saw another address.
    #[error("requests leave from {seen} instead of egress.expected_ip {expected}")]
    Other {
        /// The address that the exchange saw.
        seen: IpAddr,
        /// The one it should be.
        expected: IpAddr,
    },
    /// No check has succeeded yet.
    #[error("the exchange has not confirmed yet that requests leave from {expected}")]
    Unproven {
        /// The address it should be.
        expected: IpAddr,
    },
}

impl Proof {
    /// The state before the first check.
    pub(crate) fn new(expected: IpAddr, mode: ProofMode) -> Self {
        Self {
            expected: expected.to_canonical(),
            mode,
            state: Mutex::default(),
        }
    }

    /// The address that the exchange must see.
    pub(crate) fn expected(&self) -> IpAddr {
        self.expected
    }

    /// Whether risk-increasing requests may be sent.
    ///
    /// # Errors
    /// In strict mode: when the exchange saw another address, or no check has succeeded yet.
    pub(crate) fn check(&self) -> Result<(), EgressMismatch> {
        match self.mismatch(self.state.lock().seen) {
            Some(mismatch) if self.mode == ProofMode::Strict => Err(mismatch),
            _ => Ok(()),
        }
    }

    /// Applies the address that the exchange reported at `at` (time since boot). Returns whether it has changed.
    pub(crate) fn seen(&self, address: IpAddr, at: Duration) -> bool {
        let mut state = self.state.lock();
        let address = address.to_canonical();
        let is_news = state.seen.is_none_or(|(before, _)| before != address);
        state.seen = Some((address, at));
        state.failure = None;
        is_news
    }

    /// Applies a failed check.
    pub(crate) fn failed(&self, reason: String) {
        self.state.lock().failure = Some(reason);
    }

    /// Applies a rejection for the address of a request. It proves nothing, since the key's whitelist may be wrong.
    pub(crate) fn refused(&self, address: Option<IpAddr>, at: Duration) {
        self.state.lock().refused = Some((address, at));
    }

    /// The current state.
    pub(crate) fn status(&self) -> ProofStatus {
        let ProofState {
            seen,
            failure,
            refused,
        } = self.state.lock().clone();
        ProofStatus {
            mismatch: self.mismatch(seen),
            seen,
            failure,
            refused,
            is_strict: self.mode == ProofMode::Strict,
        }
    }

    fn mismatch(&self, seen: Option<(IpAddr, Duration)>) -> Option<EgressMismatch> {
        let expected = self.expected;
        match seen {
            Some((seen, _)) if seen == expected => None,
            Some((seen, _)) => Some(EgressMismatch::Other { seen, expected }),
            None => Some(EgressMismatch::Unproven { expected }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn only_the_expected_address_is_proof_and_a_failed_check_changes_nothing() {
        let proof = Proof::new(address("203.0.113.7"), ProofMode::Strict);
        assert!(matches!(
            proof.check(),
            Err(EgressMismatch::Unproven { .. })
        ));
        proof.failed("no answer".to_owned());
        assert!(matches!(
            proof.check(),
            Err(EgressMismatch::Unproven { .. })
        ));
        assert!(proof.seen(address("::ffff:203.0.113.7"), Duration::from_secs(1)));
        assert_eq!(proof.check(), Ok(()));
        proof.failed("no answer".to_owned());
        assert_eq!(proof.check(), Ok(()), "the last result stays valid");
        assert_eq!(
            proof.status().seen,
            Some((address("203.0.113.7"), Duration::from_secs(1)))
        );
        assert!(proof.seen(address("203.0.113.8"), Duration::from_secs(2)));
        let refusal = proof.check().unwrap_err().to_string();
        assert!(
            refusal.contains("203.0.113.8") && refusal.contains("203.0.113.7"),
            "{refusal}"
        );
        proof.failed("no answer".to_owned());
        assert!(proof.check().is_err(), "a mismatch stays, too");
    }

    #[test]
    fn lenient_mode_reports_a_mismatch_and_blocks_nothing() {
        let proof = Proof::new(address("203.0.113.7"), ProofMode::Lenient);
        assert_eq!(proof.check(), Ok(()));
        proof.seen(address("203.0.113.8"), Duration::ZERO);
        assert_eq!(proof.check(), Ok(()));
        assert!(proof.status().mismatch.is_some());
    }
}
