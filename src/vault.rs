//! The only user of vaultrs: reads keys from KV v2, and writes them for admins, with a guard for each defect that the
//! library has.
//!
//! - Its settings and errors show tokens and bodies in `Debug`: none of its types leaves this module, and errors are
//!   reduced to status and Vault's own error texts.
//! - It panics on a token with a line end: tokens are trimmed and checked before a client is made.
//! - It takes addresses, tokens and `VAULT_SKIP_VERIFY` from the environment: its settings are written out.
//! - It has no time limit, follows redirects with the token to any host, and honours proxies from the environment: the
//!   HTTP client is ours.
//! - Its health call fails on current OpenBao servers: it is not used.
//! - Its certificate login names the role in a field that servers do not read: that request is ours.
//! - It takes bodies as text that nobody wipes: a key is written past it, on the same HTTP client.

pub(crate) mod check;
mod connection;
mod credentials;
mod lease;
mod login;
mod metadata;
mod write;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use serde_json::Value;
use tokio::sync::Mutex;
use url::Url;
use vaultrs::api::kv2::requests::ReadSecretRequest;
use vaultrs::error::ClientError;
use zeroize::{Zeroize, Zeroizing};

use self::connection::{VaultConnection, caught_up, if_there, is_by_policy, reduce};
use self::login::{AuthToken, Session};
use self::metadata::ReadMetadata;
pub(crate) use self::metadata::{Hold, unknown_state};
pub use self::metadata::{Metadata, NotedState, Notes, StoredFacts};
pub use self::write::{Registration, WriteError};
use crate::base::backoff::Backoff;
use crate::base::ids::{AccountId, KeyName};
use crate::base::secret::{ApiSecret, PartnerKey, Passphrase};
use crate::kucoin::{Key, KeyVersion};
use crate::telemetry::Metrics;

/// Waits between attempts of all kinds while Vault does not answer as it should.
pub const BACKOFF: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));

/// A follower may not know a token for a moment after its login: the wait before a 403 counts.
const REPEAT_AFTER: (u64, u64) = (100, 250);

/// How often a read meets a 403 before it is given up: twice with a dead token, twice with the next.
const TRIES: usize = 4;

/// Where Vault is and how the broker logs in.
#[derive(Clone, Debug)]
pub struct VaultSettings {
    /// Its address.
    pub address: Url,
    /// Addresses of other nodes to which one redirect may lead.
    pub redirects: Vec<Url>,
    /// Namespace, where Vault has them.
    pub namespace: Option<String>,
    /// Mount of the KV v2 engine.
    pub mount: String,
    /// Path below the mount under which accounts stand, such as `kucoin/prod`.
    pub prefix: String,
    /// How to log in.
    pub auth: Auth,
    /// Limit for one whole request.
    pub timeout: Duration,
}

/// How the broker gets its token.
#[derive(Clone, Debug)]
pub enum Auth {
    /// Role id and secret id.
    AppRole {
        /// Mount of the auth method.
        mount: String,
        /// The role id; not secret.
        role_id: String,
        /// File that holds the secret id, or a wrapping token for it; read again at every login.
        secret_id_file: PathBuf,
        /// Name of the role, where the file holds a wrapping token.
        wrapped_for: Option<String>,
    },
    /// The certificate that the broker shows Vault. When the files change it logs in again.
    Cert {
        /// Mount of the auth method.
        mount: String,
        /// Role to log in as; without it Vault takes any that fits the certificate.
        role: Option<String>,
        /// Certificate chain, PEM.
        certificate: PathBuf,
        /// Its private key, PEM.
        key: PathBuf,
    },
    /// The service account of a pod.
    Kubernetes {
        /// Mount of the auth method.
        mount: String,
        /// Role to log in as.
        role: String,
        /// File that holds the account's token; Kubernetes replaces it, and it is read again at every login.
        jwt_file: PathBuf,
    },
    /// A file that somebody else (an agent) keeps a valid token in; read again at every use.
    TokenFile(PathBuf),
}

/// What went wrong, as far as anybody outside may know.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum VaultError {
    /// 403 twice, to a token that Vault accepts: authority.
    #[error("Vault refuses the path (403)")]
    Denied,
    /// 404: no such path, or the version is deleted. Authority.
    #[error("{0}")]
    Gone(String),
    /// Vault refuses the broker's login: says nothing about the key, and somebody must do something.
    #[error("{0}")]
    LoginRefused(String),
    /// The file that the broker logs in with is not in the form it should have: says nothing about the key.
    #[error("the token in the file of vault.auth: {0}")]
    Credential(&'static str),
    /// No answer, a fault: says nothing about the key.
    #[error("{0}")]
    Outage(Outage),
    /// The secret is there and is not a key.
    #[error("{0}")]
    Unusable(String),
}

/// Why Vault gave no usable answer.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub struct Outage {
    /// Its kind.
    pub(crate) kind: OutageKind,
    reason: String,
}

/// What kind of outage it is, as far as the fix differs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OutageKind {
    /// Something answers that does not speak as Vault does.
    NotVault,
    /// None of the others.
    Other,
    /// Vault is sealed or not initialised.
    Sealed,
    /// Vault answers that something inside it failed.
    Server,
    /// No connection, or no answer on it.
    Unreachable,
}

impl OutageKind {
    /// The error of this kind, in words for people.
    pub fn outage(self, reason: impl Into<String>) -> VaultError {
        let reason = reason.into();
        VaultError::Outage(Outage { kind: self, reason })
    }
}

impl From<&str> for Outage {
    fn from(reason: &str) -> Self {
        Self {
            kind: OutageKind::Other,
            reason: reason.to_owned(),
        }
    }
}

impl VaultError {
    /// The same, as an outage during `step`: it says nothing about the key.
    fn during(&self, step: &str) -> Self {
        let kind = match self {
            Self::Outage(outage) => outage.kind,
            _ => OutageKind::Other,
        };
        kind.outage(format!("{step}: {self}"))
    }

    /// Vault knows the mount, and no such key in it.
    pub(crate) fn no_such_key() -> Self {
        Self::Gone("Vault has no such key (404)".to_owned())
    }
}

/// The connection to Vault.
#[derive(Debug)]
pub struct Vault {
    settings: VaultSettings,
    tls: ClientConfig,
    /// Held while logging in, so that only one login is under way.
    session: Mutex<Session>,
    metrics: Arc<Metrics>,
}

impl Vault {
    /// Prepares the connection; nothing is sent yet.
    ///
    /// # Errors
    /// When the TLS library refuses the configuration.
    pub fn new(
        settings: VaultSettings,
        tls: ClientConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Self, reqwest::Error> {
        let connection = VaultConnection::new(&settings, tls.clone())?;
        Ok(Self {
            settings,
            tls,
            session: Mutex::new(Session::new(connection)),
            metrics,
        })
    }

    /// The metadata of a key; it carries no secret.
    pub async fn metadata(
        &self,
        account: &AccountId,
        name: &KeyName,
    ) -> Result<Metadata, VaultError> {
        if let Some(found) = self.find(account, name).await? {
            return Ok(found);
        }
        let problem = self.unfit_mount().await;
        Err(problem.map_or_else(VaultError::no_such_key, VaultError::Gone))
    }

    /// The same; none where Vault has no such key.
    pub async fn find(
        &self,
        account: &AccountId,
        name: &KeyName,
    ) -> Result<Option<Metadata>, VaultError> {
        let (mount, path) = self.place(account, name);
        let read = |pass: &AuthToken| {
            let (mount, path) = (mount.clone(), path.clone());
            let (client, request) = (pass.client(), ReadMetadata { mount, path });
            async move { if_there(vaultrs::api::exec_with_result(&client, request).await) }
        };
        self.with_authority(read).await
    }

    /// One version of a key, ready to sign.
    pub async fn read(
        &self,
        account: &AccountId,
        name: &KeyName,
        version: u64,
    ) -> Result<Arc<Key>, VaultError> {
        let (mount, path) = self.place(account, name);
        let read = |pass: &AuthToken| {
            let client = pass.client_for_secrets();
            let request = ReadSecretRequest {
                mount: mount.clone(),
                path: path.clone(),
                version: Some(version),
            };
            async move { vaultrs::api::exec_with_result(&client, request).await }
        };
        let found = self.with_authority(read).await?;
        key_from(found.data).map_err(|problem| {
            VaultError::Unusable(format!("version {version} in Vault: {problem}"))
        })
    }

    fn place(&self, account: &AccountId, name: &KeyName) -> (String, String) {
        (
            self.settings.mount.clone(),
            format!("{}/{account}/{name}", self.settings.prefix),
        )
    }

    /// Runs a read; a 403 counts as Vault's word only when it comes twice and Vault accepts the token that met it.
    async fn with_authority<T, F>(&self, read: impl Fn(&AuthToken) -> F) -> Result<T, VaultError>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let mut refusals = 0;
        let mut dead: Option<Zeroizing<String>> = None;
        for _ in 0..TRIES {
            let pass = self.pass().await?;
            match caught_up(|| read(&pass)).await {
                Ok(found) => {
                    self.accepted(&pass).await;
                    return Ok(found);
                }
                Err(error) if reduce(&error) == VaultError::Denied => {}
                Err(error) => return Err(reduce(&error)),
            }
            if self.is_good(&pass).await? {
                self.accepted(&pass).await;
                refusals += 1;
            } else if dead.as_ref() == Some(&pass.token) {
                self.forget(&pass).await;
            } else {
                dead = Some(pass.token);
            }
            if refusals == 2 {
                return Err(VaultError::Denied);
            }
            let wait = fastrand::u64(REPEAT_AFTER.0..=REPEAT_AFTER.1);
            tokio::time::sleep(Duration::from_millis(wait)).await;
        }
        Err(login::not_accepted())
    }

    async fn is_good(&self, pass: &AuthToken) -> Result<bool, VaultError> {
        let client = pass.client();
        match caught_up(|| vaultrs::token::lookup_self(&client)).await {
            Ok(_) => Ok(true),
            Err(error) => match reduce(&error) {
                // Without any policy it may not look itself up either.
                VaultError::Denied => Ok(is_by_policy(&error)),
                // It was the token that Vault was asked about, not the key.
                other => Err(other.during("lookup of the token")),
            },
        }
    }
}

/// Makes a key of the fields of a secret: `api_key`, `api_secret`, `passphrase`, `key_version`, `partner_key`.
fn key_from(data: Value) -> Result<Arc<Key>, String> {
    let mut data = Wiped(data);
    let mut text = |name: &str| match data.0.get_mut(name).map(Value::take) {
        Some(Value::String(text)) => {
            let text = Zeroizing::new(text);
            let blank = |c: char| c.is_whitespace() || c.is_control();
            if text.starts_with(blank) || text.ends_with(blank) {
                return Err(format!("`{name}` begins or ends with a blank"));
            }
            Ok(Some(text))
        }
        Some(Value::Number(number)) => Ok(Some(Zeroizing::new(number.to_string()))),
        Some(Value::Null) | None => Ok(None),
        Some(_) => Err(format!("`{name}` is not text")),
    };
    let version = match text("key_version")?.as_deref().map(String::as_str) {
        Some("3") | None => KeyVersion::V3,
        Some("2") => KeyVersion::V2,
        Some(_) => return Err("`key_version` is neither 2 nor 3".to_owned()),
    };
    let mut required = |name: &str| text(name)?.ok_or_else(|| format!("`{name}` is missing"));
    let id = required("api_key")?;
    let secret = ApiSecret::new(required("api_secret")?);
    let passphrase = Passphrase::new(required("passphrase")?);
    let partner = text("partner_key")?.map(PartnerKey::new);
    Key::new(id, &secret, &passphrase, version, partner.as_ref()).map_err(|error| error.to_string())
}

/// What Vault sent, wiped on drop, also where it turns out to be no key.
struct Wiped(Value);

impl Drop for Wiped {
    fn drop(&mut self) {
        wipe(&mut self.0);
    }
}

fn wipe(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(wipe),
        Value::Object(fields) => fields.values_mut().for_each(wipe),
        Value::String(text) => text.zeroize(),
        Value::Bool(_) | Value::Null | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_secret_that_is_no_key_says_why_without_its_values() {
        let whole = json!({"api_key": "fake-id", "api_secret": "fake-secret", "passphrase": "fake-pass", "key_version": 2});
        assert!(key_from(whole.clone()).is_ok());
        let cases = [
            ("api_key", Value::Null, "`api_key` is missing"),
            ("api_secret", json!(""), "`api_secret` is empty"),
            (
                "api_secret",
                json!("fake-secret\n"),
                "`api_secret` begins or ends with a blank",
            ),
            (
                "passphrase",
                json!(["fake-pass"]),
                "`passphrase` is not text",
            ),
            (
                "key_version",
                json!("1"),
                "`key_version` is neither 2 nor 3",
            ),
            (
                "partner_key",
                json!(" fake"),
                "`partner_key` begins or ends with a blank",
            ),
        ];
        for (name, value, problem) in cases {
            let mut broken = whole.clone();
            broken[name] = value;
            assert_eq!(key_from(broken).unwrap_err(), problem);
        }
        assert_eq!(key_from(Value::Null).unwrap_err(), "`api_key` is missing");
    }
}
