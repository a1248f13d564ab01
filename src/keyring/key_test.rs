//! What the keyring asks of whoever can reach the exchange: is this key good? And what it tells of its keys.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::base::diagnosis::Diagnosis;
use crate::base::ids::{AccountId, KeyName};
use crate::kucoin::Key;
use crate::kucoin::key_info::KeyInfo;
use crate::restrictions::KeyDigest;

/// Events for the task that tests keys and audits changes.
pub(crate) type KeyEvents = mpsc::UnboundedSender<KeyEvent>;

/// Something that the keyring wants, or has done.
#[derive(Debug)]
pub(crate) enum KeyEvent {
    /// Another key, or none, serves from now on.
    Changed(KeyChange),
    /// A key is to be tested.
    KeyTestRequest(KeyTestRequest),
}

/// A key to be tested on the exchange.
#[derive(Debug)]
pub(crate) struct KeyTestRequest {
    /// Its account.
    pub(crate) account: AccountId,
    /// Its name.
    pub(crate) name: KeyName,
    /// The key.
    pub(crate) key: Arc<Key>,
    /// Whether it is to replace another key, so that every scope is tried too.
    pub(crate) is_candidate: bool,
    /// Takes the answer.
    pub(crate) tell: oneshot::Sender<Report>,
}

/// What the exchange says about a key.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    /// Whether it can be used.
    pub(crate) verdict: Verdict,
    /// What the exchange told about it.
    pub(crate) info: Option<Arc<KeyInfo>>,
    /// What is wrong with it, or worth knowing.
    pub(crate) findings: Vec<Diagnosis>,
}

/// Whether a key can be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    /// The exchange has taken requests that it signed.
    Good,
    /// The exchange refuses it.
    Refused(String),
    /// The exchange has not said.
    Unclear(String),
}

/// What became of the key in one place.
#[derive(Debug)]
pub(crate) struct KeyChange {
    /// Its account.
    pub(crate) account: AccountId,
    /// Its name.
    pub(crate) name: KeyName,
    /// The version that served until now, and the digest of its id.
    pub(crate) before: Option<(u64, KeyDigest)>,
    /// The version that was found, and the digest of its id.
    pub(crate) after: Option<(u64, KeyDigest)>,
    /// `in_use`, `refused`, `gone`.
    pub(crate) outcome: &'static str,
    /// Why.
    pub(crate) detail: Option<String>,
}
