//! What `credbroker doctor` asks of Vault: does the login work, and can the broker only read?
//!
//! It leaves no trace there but in Vault's own audit log: a wrapped secret id is looked at and not unwrapped, and no write
//! that is tried can succeed.

use std::collections::BTreeMap;

use rustify::endpoint::Endpoint;
use rustify::enums::{RequestMethod, RequestType, ResponseType};
use serde::Deserialize;
use serde_json::{Value, json};

use super::connection::{reduce, status_of};
use super::credentials::{check_wrapping, read_token};
use super::{Auth, Vault, VaultError};
use crate::base::ids::{AccountId, KeyName};

/// No key will ever have so many versions, so that check-and-set refuses whoever names it.
const NO_VERSION: u32 = i32::MAX.unsigned_abs();

/// Bytes of a value of custom metadata that the server refuses; it takes 512. What it refuses for its type it refuses before
/// it looks at policies, so that this would tell nothing.
const TOO_LONG: usize = 1000;

/// The broker's token, as Vault describes it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TokenInfo {
    /// Its policies.
    pub policies: Vec<String>,
    /// Seconds that it is still good for; 0: it does not end.
    pub(crate) ttl_s: u64,
}

impl Vault {
    /// Logs in as the broker does, and asks for the token. `None`: Vault takes the token, and it may not look itself up.
    ///
    /// # Errors
    /// When there is no token, or Vault does not take it.
    pub async fn token(&self) -> Result<Option<TokenInfo>, VaultError> {
        let pass = self.pass().await?;
        match vaultrs::token::lookup_self(&pass.client()).await {
            Ok(found) => Ok(Some(TokenInfo {
                policies: found.policies,
                ttl_s: found.ttl,
            })),
            Err(error) if super::is_by_policy(&error) => Ok(None),
            Err(error) if reduce(&error) == VaultError::Denied => Err(super::login::not_accepted()),
            Err(error) => Err(reduce(&error)),
        }
    }

    /// Whether the login takes a wrapped secret id, which can be had only once: then whether the one in the file is good.
    /// It is not unwrapped.
    pub(crate) async fn wrapped(&self) -> Option<Result<(), VaultError>> {
        let Auth::AppRole {
            mount,
            secret_id_file,
            wrapped_for: Some(role),
            ..
        } = &self.settings.auth
        else {
            return None;
        };
        let look = async {
            let token = read_token(secret_id_file).await?;
            let connection = self.session.lock().await.connection.clone();
            let path = format!("auth/{mount}/role/{role}/secret-id");
            check_wrapping(&connection, &token, &path).await
        };
        Some(look.await)
    }

    /// Why the mount cannot hold keys, where Vault says what kind of mount it is; one of KV version 1 answers 404 for every
    /// key, as one of version 2 does for a key that is not there.
    pub(crate) async fn unfit_mount(&self) -> Option<String> {
        let mount = self.settings.mount.clone();
        let pass = self.pass().await.ok()?;
        let request = DescribeMount(mount.clone());
        let found = vaultrs::api::exec_with_result(&pass.client(), request).await;
        let MountInfo { kind, options } = found.ok()?;
        let version = options.as_ref().and_then(|options| options.get("version"));
        match (kind.as_str(), version.map(String::as_str)) {
            ("kv", Some("2")) => None,
            ("kv", _) => Some(format!(
                "mount {mount} is KV version 1, and credbroker needs version 2"
            )),
            _ => Some(format!(
                "mount {mount} is no KV engine, and credbroker needs KV version 2"
            )),
        }
    }

    /// What the broker may do to a key beyond reading it. The key's metadata must have been read before: that proves that
    /// the mount is KV v2, where none of what is tried here can succeed.
    ///
    /// # Errors
    /// When Vault did not answer all of it.
    pub async fn may_write(
        &self,
        account: &AccountId,
        name: &KeyName,
    ) -> Result<Vec<&'static str>, VaultError> {
        let (mount, path) = self.place(account, name);
        let no_versions = json!({ "versions": [] });
        let hopeless = [
            // Check-and-set fails.
            (
                "write versions",
                "data",
                json!({ "data": {}, "options": { "cas": NO_VERSION } }),
            ),
            // A value is longer than the server takes.
            (
                "change metadata",
                "metadata",
                json!({ "custom_metadata": { "doctor": "x".repeat(TOO_LONG) } }),
            ),
            // Of no version.
            ("delete versions", "delete", no_versions.clone()),
            ("undelete versions", "undelete", no_versions.clone()),
            ("destroy versions", "destroy", no_versions),
        ];
        let pass = self.pass().await?;
        let mut allowed = Vec::new();
        for (what, kind, body) in hopeless {
            let request = WriteProbe {
                path: format!("{mount}/{kind}/{path}"),
                body,
            };
            match vaultrs::api::exec_with_empty(&pass.client(), request).await {
                Ok(()) => allowed.push(what),
                Err(error) => match status_of(&error) {
                    Some(403) => {}
                    // Refused for what it asks, and not for who asks.
                    Some(400 | 404 | 405) => allowed.push(what),
                    _ => return Err(reduce(&error)),
                },
            }
        }
        Ok(allowed)
    }
}

/// `GET sys/internal/ui/mounts/<mount>`, which answers every token that may reach something below the mount. Source:
/// OpenBao 2.6.2 was seen to; the command lines of OpenBao and Vault find the version of KV out like this.
struct DescribeMount(String);

/// What kind of mount it is.
#[derive(Debug, Deserialize)]
struct MountInfo {
    #[serde(rename = "type")]
    kind: String,
    options: Option<BTreeMap<String, String>>,
}

impl Endpoint for DescribeMount {
    type Response = MountInfo;
    const REQUEST_BODY_TYPE: RequestType = RequestType::JSON;
    const RESPONSE_BODY_TYPE: ResponseType = ResponseType::JSON;

    fn path(&self) -> String {
        format!("sys/internal/ui/mounts/{}", self.0)
    }

    fn method(&self) -> RequestMethod {
        RequestMethod::GET
    }
}

/// A write that cannot succeed.
struct WriteProbe {
    path: String,
    body: Value,
}

impl Endpoint for WriteProbe {
    type Response = ();
    const REQUEST_BODY_TYPE: RequestType = RequestType::JSON;
    const RESPONSE_BODY_TYPE: ResponseType = ResponseType::JSON;

    fn path(&self) -> String {
        self.path.clone()
    }

    fn method(&self) -> RequestMethod {
        RequestMethod::POST
    }

    fn body(&self) -> Result<Option<Vec<u8>>, rustify::errors::ClientError> {
        Ok(Some(self.body.to_string().into_bytes()))
    }
}
