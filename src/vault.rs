//! The only user of vaultrs: reads keys from KV v2, and writes them for admins. It works around each defect of the
//! library:
//!
//! - Its settings and errors show tokens and bodies in `Debug`: none of its types leaves this module, and errors are
//!   reduced to the status and Vault's own error texts.
//! - It panics on a token with a line end: tokens are trimmed and checked before a client is made.
//! - It reads addresses, tokens and `VAULT_SKIP_VERIFY` from the environment: all its settings are set explicitly.
//! - It has no timeout, follows redirects with the token to any host, and uses proxies from the environment: this module
//!   builds its own HTTP client.
//! - Its health call fails on current OpenBao servers: it is not used.
//! - Its certificate login sends the role in a field that servers do not read: this module sends its own request.
//! - It keeps request bodies as text that is never wiped: keys are written without it, with the same HTTP client.

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
use vaultrs::api::token::requests::LookupTokenSelfRequest;
use vaultrs::error::ClientError;
use zeroize::{Zeroize, Zeroizing};

use self::connection::{
    VaultConnection, execute, if_exists, is_by_policy, reduce, repeat_while_behind,
};
use self::login::{AuthToken, Session};
use self::metadata::ReadMetadata;
pub(crate) use self::metadata::{Hold, unknown_state};
pub use self::metadata::{Metadata, Notes, StoredFacts, StoredState};
pub use self::write::{Registration, WriteError};
use crate::base::backoff::Backoff;
use crate::base::ids::{AccountId, KeyName};
use crate::base::secret::{ApiSecret, PartnerKey, Passphrase};
use crate::kucoin::{Key, KeyVersion};
use crate::telemetry::Metrics;

/// Waits between attempts of all kinds while Vault gives no usable response.
pub const BACKOFF: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));

/// Milliseconds to wait before a request that got a 403 is repeated: a follower may not know a new token at once.
const REPEAT_AFTER: (u64, u64) = (100, 250);

/// How many attempts a request gets that meets 403s: two with an invalid token, two with the next token.
const TRIES: usize = 4;

/// Where Vault is and how the broker logs in.
#[derive(Clone, Debug)]
pub struct VaultSettings {
    /// Vault's address.
    pub address: Url,
    /// Addresses of other nodes; one redirect to these is followed.
    pub redirects: Vec<Url>,
    /// Namespace, if Vault uses namespaces.
    pub namespace: Option<String>,
    /// Mount of the KV v2 engine.
    pub mount: String,
    /// Path of the accounts below the mount, such as `kucoin/prod`.
    pub prefix: String,
    /// How to log in.
    pub auth: Auth,
    /// Time limit of one request.
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
        /// File with the secret id, or with a wrapping token for it; read again at every login.
        secret_id_file: PathBuf,
        /// Name of the role, if the file holds a wrapping token.
        wrapped_for: Option<String>,
    },
    /// A client certificate. When the files change, the broker logs in again.
    Cert {
        /// Mount of the auth method.
        mount: String,
        /// Role to log in as; without it, Vault uses any role that fits the certificate.
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
        /// File with the account's token; Kubernetes replaces it, and it is read again at every login.
        jwt_file: PathBuf,
    },
    /// A file in which another process (an agent) keeps a valid token; read again at every use.
    TokenFile(PathBuf),
}

/// A failed request to Vault, without secrets.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum VaultError {
    /// 403 twice, with a token that Vault accepts. Removes the key.
    #[error("Vault denied access (403)")]
    Denied,
    /// 404: no such path, or the version is deleted. Removes the key.
    #[error("{0}")]
    Gone(String),
    /// Vault rejected the login. Does not affect the key, but an admin must act.
    #[error("{0}")]
    LoginRefused(String),
    /// The credential file is malformed. Does not affect the key.
    #[error("invalid credential file in vault.auth: {0}")]
    Credential(&'static str),
    /// No response or a server error. Does not affect the key.
    #[error("{0}")]
    Outage(Outage),
    /// The secret exists, but is not a valid key.
    #[error("{0}")]
    Unusable(String),
}

/// Why Vault gave no usable response.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub struct Outage {
    /// Its kind.
    pub(crate) kind: OutageKind,
    reason: String,
}

/// Kinds of outages that need different fixes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OutageKind {
    /// The response did not come from Vault.
    NotVault,
    /// Any other.
    Other,
    /// Vault is sealed or not initialised.
    Sealed,
    /// Vault returned a 5xx other than 503.
    Server,
    /// No connection, or no response on it.
    Unreachable,
}

impl OutageKind {
    /// An outage of this kind, with a reason for humans.
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
    /// The same error as an outage during `step`, which does not affect the key.
    fn during(&self, step: &str) -> Self {
        let kind = match self {
            Self::Outage(outage) => outage.kind,
            _ => OutageKind::Other,
        };
        kind.outage(format!("{step}: {self}"))
    }

    /// The mount exists, but has no such key.
    pub(crate) fn no_such_key() -> Self {
        Self::Gone("Vault has no such key (404)".to_owned())
    }
}

/// The connection to Vault.
#[derive(Debug)]
pub struct Vault {
    settings: VaultSettings,
    tls: ClientConfig,
    /// Locked during a login, so that only one login runs at a time.
    session: Mutex<Session>,
    metrics: Arc<Metrics>,
}

impl Vault {
    /// Prepares the connection; nothing is sent yet.
    ///
    /// # Errors
    /// When the TLS library rejects the configuration.
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

    /// The metadata of a key; they hold no secret.
    pub async fn metadata(
        &self,
        account: &AccountId,
        name: &KeyName,
    ) -> Result<Metadata, VaultError> {
        if let Some(found) = self.find(account, name).await? {
            return Ok(found);
        }
        let problem = self.mount_problem().await;
        Err(problem.map_or_else(VaultError::no_such_key, VaultError::Gone))
    }

    /// The same; none if Vault has no such key.
    pub async fn find(
        &self,
        account: &AccountId,
        name: &KeyName,
    ) -> Result<Option<Metadata>, VaultError> {
        let (mount, path) = self.kv_path(account, name);
        let read = |auth: &AuthToken| {
            let (mount, path) = (mount.clone(), path.clone());
            let (client, request) = (auth.client(), ReadMetadata { mount, path });
            async move { if_exists(execute(&client, request).await) }
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
        let (mount, path) = self.kv_path(account, name);
        let read = |auth: &AuthToken| {
            let client = auth.client_for_secrets();
            let request = ReadSecretRequest {
                mount: mount.clone(),
                path: path.clone(),
                version: Some(version),
            };
            async move { execute(&client, request).await }
        };
        let found = self.with_authority(read).await?;
        key_from(found.data).map_err(|problem| {
            VaultError::Unusable(format!(
                "version {version} in Vault is not a valid key: {problem}"
            ))
        })
    }

    fn kv_path(&self, account: &AccountId, name: &KeyName) -> (String, String) {
        (
            self.settings.mount.clone(),
            format!("{}/{account}/{name}", self.settings.prefix),
        )
    }

    /// Runs a request. A 403 counts only if it comes twice and Vault accepts the token that was used.
    async fn with_authority<T, F>(&self, request: impl Fn(&AuthToken) -> F) -> Result<T, VaultError>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let mut refusals = 0;
        let mut invalid: Option<Zeroizing<String>> = None;
        for _ in 0..TRIES {
            let auth = self.auth_token().await?;
            match repeat_while_behind(|| request(&auth)).await {
                Ok(found) => {
                    self.accepted(&auth).await;
                    return Ok(found);
                }
                Err(error) if reduce(&error) == VaultError::Denied => {}
                Err(error) => return Err(reduce(&error)),
            }
            if self.is_accepted(&auth).await? {
                self.accepted(&auth).await;
                refusals += 1;
            } else if invalid.as_ref() == Some(&auth.token) {
                self.forget(&auth).await;
            } else {
                invalid = Some(auth.token);
            }
            if refusals == 2 {
                return Err(VaultError::Denied);
            }
            let wait = fastrand::u64(REPEAT_AFTER.0..=REPEAT_AFTER.1);
            tokio::time::sleep(Duration::from_millis(wait)).await;
        }
        Err(login::not_accepted())
    }

    /// Whether Vault accepts the token.
    async fn is_accepted(&self, auth: &AuthToken) -> Result<bool, VaultError> {
        let client = auth.client();
        match repeat_while_behind(|| execute(&client, LookupTokenSelfRequest {})).await {
            Ok(_) => Ok(true),
            Err(error) => match reduce(&error) {
                // A token without any policy may not look itself up either.
                VaultError::Denied => Ok(is_by_policy(&error)),
                // An outage, since this request was about the token and not about the key.
                other => Err(other.during("token lookup")),
            },
        }
    }
}

/// Builds a key from the fields of a secret: `api_key`, `api_secret`, `passphrase`, `key_version`, `partner_key`.
fn key_from(data: Value) -> Result<Arc<Key>, String> {
    let mut data = Wiped(data);
    let mut text = |name: &str| match data.0.get_mut(name).map(Value::take) {
        Some(Value::String(text)) => {
            let text = Zeroizing::new(text);
            let blank = |c: char| c.is_whitespace() || c.is_control();
            if text.starts_with(blank) || text.ends_with(blank) {
                return Err(format!("`{name}` begins or ends with whitespace"));
            }
            Ok(Some(text))
        }
        Some(Value::Number(number)) => Ok(Some(Zeroizing::new(number.to_string()))),
        Some(Value::Null) | None => Ok(None),
        Some(_) => Err(format!("`{name}` is not a string")),
    };
    let version = match text("key_version")?.as_deref().map(String::as_str) {
        Some("3") | None => KeyVersion::V3,
        Some("2") => KeyVersion::V2,
        Some(_) => return Err("`key_version` must be 2 or 3".to_owned()),
    };
    let mut required = |name: &str| text(name)?.ok_or_else(|| format!("`{name}` is missing"));
    let id = required("api_key")?;
    let secret = ApiSecret::new(required("api_secret")?);
    let passphrase = Passphrase::new(required("passphrase")?);
    let partner = text("partner_key")?.map(PartnerKey::new);
    Key::new(id, &secret, &passphrase, version, partner.as_ref()).map_err(|error| error.to_string())
}

/// A response of Vault, wiped on drop, even if it is not a valid key.
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
    fn malformed_secret_is_rejected_without_showing_its_values() {
        let valid = json!({"api_key": "fake-id", "api_secret": "fake-secret", "passphrase": "fake-pass", "key_version": 2});
        assert!(key_from(valid.clone()).is_ok());
        let cases = [
            ("api_key", Value::Null, "`api_key` is missing"),
            ("api_secret", json!(""), "`api_secret` is empty"),
            (
                "api_secret",
                json!("fake-secret\n"),
                "`api_secret` begins or ends with whitespace",
            ),
            (
                "passphrase",
                json!(["fake-pass"]),
                "`passphrase` is not a string",
            ),
            ("key_version", json!("1"), "`key_version` must be 2 or 3"),
            (
                "partner_key",
                json!(" fake"),
                "`partner_key` begins or ends with whitespace",
            ),
        ];
        for (name, value, problem) in cases {
            let mut broken = valid.clone();
            broken[name] = value;
            assert_eq!(key_from(broken).unwrap_err(), problem);
        }
        assert_eq!(key_from(Value::Null).unwrap_err(), "`api_key` is missing");
    }
}
