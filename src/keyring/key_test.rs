//! Messages from the keyring: requests to test a key on the exchange, and changes of keys for the audit log.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::base::diagnosis::Diagnosis;
use crate::base::ids::{AccountId, KeyName};
use crate::kucoin::Key;
use crate::kucoin::key_info::KeyInfo;
use crate::restrictions::KeyDigest;

/// Events for the task that tests keys and audits changes.
pub(crate) type KeyEvents = mpsc::UnboundedSender<KeyEvent>;

/// A request or a change of the keyring.
#[derive(Debug)]
pub(crate) enum KeyEvent {
    /// The key in use changed, or a new version was rejected.
    Changed(KeyChange),
    /// A key needs a test.
    KeyTestRequest(KeyTestRequest),
}

/// A request to test a key on the exchange.
#[derive(Debug)]
pub(crate) struct KeyTestRequest {
    /// Its account.
    pub(crate) account: AccountId,
    /// Its name.
    pub(crate) name: KeyName,
    /// The key.
    pub(crate) key: Arc<Key>,
    /// Whether it may replace another key; then every scope is tested too.
    pub(crate) is_candidate: bool,
    /// Receives the result.
    pub(crate) tell: oneshot::Sender<Report>,
}

/// The result of a key test.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    /// Whether it can be used.
    pub(crate) verdict: Verdict,
    /// What the exchange reported about the key.
    pub(crate) info: Option<Arc<KeyInfo>>,
    /// Problems and notes for the admin.
    pub(crate) findings: Vec<Diagnosis>,
}

/// Whether a key can be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    /// The exchange accepts requests that it signed.
    Good,
    /// It failed the test, for this reason.
    Refused(String),
    /// The test gave no result, for this reason.
    Unclear(String),
}

/// A change of one key, for the audit log.
#[derive(Debug)]
pub(crate) struct KeyChange {
    /// Its account.
    pub(crate) account: AccountId,
    /// Its name.
    pub(crate) name: KeyName,
    /// The version in use before, and the digest of its id.
    pub(crate) before: Option<(u64, KeyDigest)>,
    /// The new version, and the digest of its id.
    pub(crate) after: Option<(u64, KeyDigest)>,
    /// `activated`, `rejected`, `removed`.
    pub(crate) outcome: &'static str,
    /// Why.
    pub(crate) detail: Option<String>,
}
