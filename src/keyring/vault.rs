//! The only user of vaultrs: reads keys from KV v2, with a guard for each defect that the library has.
//!
//! - Its settings and errors show tokens and bodies in `Debug`: none of its types leaves this file, and errors are
//!   reduced to status and Vault's own error texts.
//! - It panics on a token with a line end: tokens are trimmed and checked before a client is made.
//! - It takes addresses, tokens and `VAULT_SKIP_VERIFY` from the environment: its settings are written out here.
//! - It has no time limit, follows redirects with the token to any host, and honours proxies from the environment: the
//!   HTTP client is ours.
//! - Its health call fails on current OpenBao servers: it is not used.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use std::time::Duration;

use serde_json::Value;
use tokio::sync::Mutex;
use tokio::time::Instant;
use url::Url;
use vaultrs::api::EndpointMiddleware;
use vaultrs::api::kv2::requests::ReadSecretRequest;
use vaultrs::client::{VaultClient, VaultClientSettings};
use vaultrs::error::ClientError;
use zeroize::{Zeroize, Zeroizing};

use crate::ids::{AccountId, KeyName};
use crate::kucoin::{Key, KeyVersion};
use crate::secret::{ApiSecret, PartnerKey, Passphrase};

/// A follower may not know a token for a moment after its login: the wait before a 403 counts.
const REPEAT_AFTER: (u64, u64) = (100, 250);

/// How often a read meets a 403 before it is given up: once with a dead token, twice with the next.
const TRIES: usize = 3;

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
        /// File that holds the secret id; read again at every login.
        secret_id_file: PathBuf,
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
    /// No answer, a fault, a refused login: says nothing about the key.
    #[error("{0}")]
    Outage(String),
    /// The secret is there and is not a key.
    #[error("{0}")]
    Unusable(String),
}

/// What polling compares: any difference means that the key changed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Metadata {
    /// Number of the newest version.
    pub current_version: u64,
    versions: BTreeMap<String, (String, String, bool)>,
    custom: HashMap<String, String>,
}

impl Metadata {
    /// Whether an admin has switched the key off.
    pub fn is_disabled(&self) -> bool {
        self.custom
            .get("state")
            .is_some_and(|state| state == "disabled")
    }

    /// Whether the newest version has a time at which it deletes itself; nothing in the metadata changes then.
    pub fn deletes_itself(&self) -> bool {
        self.versions
            .get(&self.current_version.to_string())
            .is_some_and(|(_, deletion_time, _)| !deletion_time.is_empty())
    }
}

/// The connection to Vault.
#[derive(Debug)]
pub struct Vault {
    settings: VaultSettings,
    http: reqwest::Client,
    /// The token of our own login; held while logging in, so that only one login is under way.
    login: Mutex<Option<Login>>,
}

struct Login {
    token: Zeroizing<String>,
    good_until: Instant,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Login(redacted)")
    }
}

impl Vault {
    /// Prepares the connection; nothing is sent yet.
    ///
    /// # Errors
    /// When the TLS library refuses the configuration.
    pub fn new(settings: VaultSettings, tls: rustls::ClientConfig) -> Result<Self, reqwest::Error> {
        let known: Vec<_> = settings
            .redirects
            .iter()
            .chain([&settings.address])
            .map(Url::origin)
            .collect();
        let redirects = reqwest::redirect::Policy::custom(move |attempt| {
            let follows = attempt.status() == http::StatusCode::TEMPORARY_REDIRECT
                && attempt.previous().len() == 1
                && attempt
                    .previous()
                    .first()
                    .is_some_and(|first| first.scheme() == attempt.url().scheme())
                && known.contains(&attempt.url().origin());
            if follows {
                attempt.follow()
            } else {
                attempt.stop()
            }
        });
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .connect_timeout(settings.timeout.min(Duration::from_secs(1)))
            .timeout(settings.timeout)
            .redirect(redirects)
            .no_proxy()
            .build()?;
        Ok(Self {
            settings,
            http,
            login: Mutex::new(None),
        })
    }

    /// The metadata of a key; it carries no secret.
    pub async fn metadata(
        &self,
        account: &AccountId,
        name: &KeyName,
    ) -> Result<Metadata, VaultError> {
        let (mount, path) = self.place(account, name);
        let read = |client: VaultClient| {
            let (mount, path) = (mount.clone(), path.clone());
            async move { vaultrs::kv2::read_metadata(&client, &mount, &path).await }
        };
        let found = self.with_authority(read).await?;
        let version =
            |(number, version): (String, vaultrs::api::kv2::responses::SecretMetadata)| {
                (
                    number,
                    (
                        version.created_time,
                        version.deletion_time,
                        version.destroyed,
                    ),
                )
            };
        Ok(Metadata {
            current_version: found.current_version,
            versions: found.versions.into_iter().map(version).collect(),
            custom: found.custom_metadata.unwrap_or_default(),
        })
    }

    /// One version of a key, ready to sign.
    pub async fn read(
        &self,
        account: &AccountId,
        name: &KeyName,
        version: u64,
    ) -> Result<Key, VaultError> {
        let (mount, path) = self.place(account, name);
        let read = |client: VaultClient| {
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
    async fn with_authority<T, F>(&self, read: impl Fn(VaultClient) -> F) -> Result<T, VaultError>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let mut refusals = 0;
        for _ in 0..TRIES {
            let token = self.token().await?;
            match read(self.client(&token)).await {
                Err(error) if reduce(&error) == VaultError::Denied => {}
                other => return other.map_err(|error| reduce(&error)),
            }
            if self.is_good(&token).await? {
                refusals += 1;
            } else {
                self.forget(&token).await;
            }
            if refusals == 2 {
                return Err(VaultError::Denied);
            }
            let wait = fastrand::u64(REPEAT_AFTER.0..=REPEAT_AFTER.1);
            tokio::time::sleep(Duration::from_millis(wait)).await;
        }
        Err(VaultError::Outage(
            "Vault does not accept the broker's token (403)".to_owned(),
        ))
    }

    async fn is_good(&self, token: &str) -> Result<bool, VaultError> {
        match vaultrs::token::lookup_self(&self.client(token)).await {
            Ok(_) => Ok(true),
            Err(error) => match reduce(&error) {
                VaultError::Denied => Ok(false),
                // It was the token that Vault was asked about, not the key.
                other => Err(VaultError::Outage(format!("lookup of the token: {other}"))),
            },
        }
    }

    /// Gives up the login that got `token`, unless another key has already logged in again.
    async fn forget(&self, token: &str) {
        let mut login = self.login.lock().await;
        if login
            .as_ref()
            .is_some_and(|login| login.token.as_str() == token)
        {
            *login = None;
        }
    }

    /// A token that should be valid.
    async fn token(&self) -> Result<Zeroizing<String>, VaultError> {
        match &self.settings.auth {
            Auth::TokenFile(file) => read_token(file).await,
            Auth::AppRole {
                mount,
                role_id,
                secret_id_file,
            } => {
                let mut login = self.login.lock().await;
                if let Some(login) = login
                    .as_ref()
                    .filter(|login| Instant::now() < login.good_until)
                {
                    return Ok(login.token.clone());
                }
                let secret_id = read_token(secret_id_file).await?;
                let found =
                    vaultrs::auth::approle::login(&self.client(""), mount, role_id, &secret_id)
                        .await;
                let found = found.map_err(|error| match reduce(&error) {
                    // A login that is refused says nothing about the keys.
                    VaultError::Outage(reason) => VaultError::Outage(format!("login: {reason}")),
                    other => VaultError::Outage(format!("Vault refuses the login: {other}")),
                })?;
                let token = checked_token(&Zeroizing::new(found.client_token))?;
                // Two thirds of the lease, as the official clients do; 0 means that it does not expire.
                let lease = match found.lease_duration {
                    0 => u64::from(u32::MAX),
                    lease => lease.min(u64::from(u32::MAX)),
                };
                let good_until = Instant::now() + Duration::from_secs(lease) * 2 / 3;
                *login = Some(Login {
                    token: token.clone(),
                    good_until,
                });
                Ok(token)
            }
        }
    }

    /// Written out in full, because the builder of these settings reads the environment.
    fn client(&self, token: &str) -> VaultClient {
        let address = self.settings.address.clone();
        let http = rustify::clients::reqwest::Client::new(address.as_str(), self.http.clone());
        let settings = VaultClientSettings {
            address,
            ca_certs: Vec::new(),
            identity: None,
            timeout: Some(self.settings.timeout),
            token: String::new(),
            verify: true,
            version: 1,
            wrapping: false,
            namespace: self.settings.namespace.clone(),
            proxy: None,
        };
        let middle = EndpointMiddleware {
            token: token.to_owned(),
            version: "v1".to_owned(),
            wrap: None,
            namespace: self.settings.namespace.clone(),
        };
        VaultClient {
            http,
            middle,
            settings,
        }
    }
}

/// Reads off the broker's own thread: a file on a mount that hangs must not keep bots waiting.
async fn read_token(file: &Path) -> Result<Zeroizing<String>, VaultError> {
    let unreadable = |error: &dyn std::fmt::Display| {
        // Bots are told this too: which file it is, the configuration knows.
        VaultError::Outage(format!("the file of vault.auth cannot be read: {error}"))
    };
    let owned = file.to_owned();
    match tokio::task::spawn_blocking(|| std::fs::read_to_string(owned)).await {
        Ok(Ok(text)) => checked_token(&Zeroizing::new(text)),
        Ok(Err(error)) => Err(unreadable(&error)),
        Err(error) => Err(unreadable(&error)),
    }
}

fn checked_token(text: &str) -> Result<Zeroizing<String>, VaultError> {
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(VaultError::Outage(
            "expected a token: one line of printable ASCII".to_owned(),
        ));
    }
    Ok(Zeroizing::new(token.to_owned()))
}

/// The HTTP status in either of the two forms in which the library hides it.
fn status_of(error: &ClientError) -> Option<u16> {
    match error {
        ClientError::APIError { code, .. }
        | ClientError::RestClientError {
            source: rustify::errors::ClientError::ServerResponseError { code, .. },
        } => Some(*code),
        _ => None,
    }
}

/// Whether Vault itself wrote this error, and not a proxy in front of it.
fn is_vaults_own(error: &ClientError) -> bool {
    match error {
        // It holds Vault's list of texts.
        ClientError::APIError { .. } => true,
        // For a deleted version it is the envelope of an ordinary answer.
        ClientError::RestClientError {
            source:
                rustify::errors::ClientError::ServerResponseError {
                    content: Some(body),
                    ..
                },
        } => serde_json::from_str::<serde_json::Map<String, Value>>(body)
            .is_ok_and(|body| body.contains_key("request_id")),
        _ => false,
    }
}

/// Reduces an error of the library to what may be known: never a body, never a token.
fn reduce(error: &ClientError) -> VaultError {
    let texts = match error {
        ClientError::APIError { errors, .. } => errors.join("; ").replace(['\n', '\t'], " "),
        _ => String::new(),
    };
    match status_of(error) {
        Some(status @ (403 | 404)) if !is_vaults_own(error) => VaultError::Outage(format!(
            "Vault answered {status}, but not in its own words; is a proxy in between?"
        )),
        Some(404) if texts.is_empty() => VaultError::Gone("Vault has no such key (404)".to_owned()),
        Some(404) => VaultError::Gone(format!(
            "Vault has no such mount or namespace (404: {texts})"
        )),
        Some(403) => VaultError::Denied,
        Some(503) => VaultError::Outage("Vault is sealed or not initialised (503)".to_owned()),
        Some(status) => VaultError::Outage(format!("Vault answered {status}: {texts}")),
        None => VaultError::Outage(match error {
            ClientError::RestClientError {
                source: rustify::errors::ClientError::RequestError { .. },
            } => "Vault cannot be reached".to_owned(),
            _ => "Vault's answer is not what its API describes".to_owned(),
        }),
    }
}

/// Makes a key of the fields of a secret: `api_key`, `api_secret`, `passphrase`, `key_version`, `partner_key`.
fn key_from(data: Value) -> Result<Key, String> {
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

    #[test]
    fn a_token_is_one_line_of_printable_ascii() {
        let checked = |text: &str| checked_token(text).map(|token| token.to_string());
        assert_eq!(checked("s.fake\n"), Ok("s.fake".to_owned()));
        for bad in ["", "\n", "a b", "a\nb", "é"] {
            assert!(checked(bad).is_err(), "{bad:?}");
        }
    }
}
