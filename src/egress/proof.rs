//! Proof that requests leave from the address that the exchange's whitelists name.
//!
//! The exchange itself is asked, over the connections that carry orders. A question that got no answer proves nothing
//! in either direction: the last answer stands, and its age shows.

use crate::base::lock::Mutex;
use std::net::IpAddr;
use std::time::Duration;

/// What to do about an address that is not the expected one.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ProofMode {
    /// Raise the alarm, and go on.
    Lenient,
    /// Refuse risk-increasing requests, also before the first proof.
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
    /// Why the last question got no answer.
    failure: Option<String>,
    /// What a 400006 named last, and when (time since boot).
    refused: Option<(Option<IpAddr>, Duration)>,
}

/// For readiness and metrics.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct ProofStatus {
    /// The address that was seen last, and when (time since boot).
    pub(crate) seen: Option<(IpAddr, Duration)>,
    /// Why the last question got no answer; none when it got one.
    pub(crate) failure: Option<String>,
    /// The address that the last 400006 named, if it did, and when (time since boot).
    pub(crate) refused: Option<(Option<IpAddr>, Duration)>,
    /// What is wrong, if anything is.
    pub(crate) mismatch: Option<EgressMismatch>,
    /// Whether that keeps requests back.
    pub(crate) is_strict: bool,
}

/// Requests do not provably leave from the expected address.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum EgressMismatch {
    /// Another address.
    #[error("requests leave from {seen} instead of egress.expected_ip {expected}")]
    Other {
        /// The address that the exchange saw.
        seen: IpAddr,
        /// The one it should be.
        expected: IpAddr,
    },
    /// Not asked with success yet.
    #[error("the exchange has not confirmed yet that requests leave from {expected}")]
    Unproven {
        /// The address it should be.
        expected: IpAddr,
    },
}

impl Proof {
    /// Nothing is proven yet.
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

    /// Whether risk-increasing requests may leave.
    ///
    /// # Errors
    /// When the last proof failed, or there has been none, and the mode is strict.
    pub(crate) fn check(&self) -> Result<(), EgressMismatch> {
        match self.mismatch(self.state.lock().seen) {
            Some(mismatch) if self.mode == ProofMode::Strict => Err(mismatch),
            _ => Ok(()),
        }
    }

    /// Takes in what the exchange answered at `at` (time since boot). Returns whether that changed anything.
    pub(crate) fn seen(&self, address: IpAddr, at: Duration) -> bool {
        let mut state = self.state.lock();
        let address = address.to_canonical();
        let is_news = state.seen.is_none_or(|(before, _)| before != address);
        state.seen = Some((address, at));
        state.failure = None;
        is_news
    }

    /// Takes in that the question got no answer.
    pub(crate) fn failed(&self, reason: String) {
        self.state.lock().failure = Some(reason);
    }

    /// Takes in that the exchange refused a request for its address; no proof, since the key's whitelist may be wrong.
    pub(crate) fn refused(&self, address: Option<IpAddr>, at: Duration) {
        self.state.lock().refused = Some((address, at));
    }

    /// What is known.
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
    fn only_the_expected_address_proves_anything_and_a_failed_question_changes_nothing() {
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
        assert_eq!(proof.check(), Ok(()), "the last answer stands");
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
        assert!(proof.check().is_err(), "a mismatch stands too");
    }

    #[test]
    fn lenient_only_tells() {
        let proof = Proof::new(address("203.0.113.7"), ProofMode::Lenient);
        assert_eq!(proof.check(), Ok(()));
        proof.seen(address("203.0.113.8"), Duration::ZERO);
        assert_eq!(proof.check(), Ok(()));
        assert!(proof.status().mismatch.is_some());
    }
}
