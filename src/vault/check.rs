//! Checks of Vault for `credbroker doctor`: whether the login works, and whether the broker can only read.
//!
//! They change nothing in Vault: a wrapped secret id is looked up and not unwrapped, and the attempted writes cannot
//! succeed. Only Vault's own audit log shows them.

use std::collections::BTreeMap;

use rustify::endpoint::Endpoint;
use rustify::enums::{RequestMethod, RequestType, ResponseType};
use serde::Deserialize;
use serde_json::{Value, json};
use vaultrs::api::token::requests::LookupTokenSelfRequest;

use super::connection::{execute, execute_only, reduce, status_of};
use super::credentials::{check_wrapping, read_token};
use super::{Auth, Vault, VaultError};
use crate::base::ids::{AccountId, KeyName};

/// More versions than any key has, so that check-and-set rejects the write.
const NO_VERSION: u32 = i32::MAX.unsigned_abs();

/// Bytes of a custom metadata value that the server rejects; it accepts 512. A value of a wrong type would show nothing: the
/// server rejects it before it checks policies.
const TOO_LONG: usize = 1000;

/// The broker's token, as Vault describes it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TokenInfo {
    /// Its policies.
    pub policies: Vec<String>,
    /// Remaining lifetime in seconds; 0: it does not expire.
    pub(crate) ttl_s: u64,
}

impl Vault {
    /// Logs in as the broker does, and looks the token up. `None`: the token is valid, but may not look itself up.
    ///
    /// # Errors
    /// When the login fails, or Vault rejects the token.
    pub async fn token(&self) -> Result<Option<TokenInfo>, VaultError> {
        let auth = self.auth_token().await?;
        match execute(&auth.client(), LookupTokenSelfRequest {}).await {
            Ok(found) => Ok(Some(TokenInfo {
                policies: found.policies,
                ttl_s: found.ttl,
            })),
            Err(error) if super::is_by_policy(&error) => Ok(None),
            Err(error) if reduce(&error) == VaultError::Denied => Err(super::login::not_accepted()),
            Err(error) => Err(reduce(&error)),
        }
    }

    /// Checks the wrapping token in the file, if the login uses one. It is not unwrapped, since that works only once.
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
        let check = async {
            let token = read_token(secret_id_file).await?;
            let connection = self.session.lock().await.connection.clone();
            let path = format!("auth/{mount}/role/{role}/secret-id");
            check_wrapping(&connection, &token, &path).await
        };
        Some(check.await)
    }

    /// Why the mount cannot hold keys, if Vault reports its type. A KV version 1 mount returns 404 for every key, as version
    /// 2 does for a missing key.
    pub(crate) async fn mount_problem(&self) -> Option<String> {
        let mount = self.settings.mount.clone();
        let auth = self.auth_token().await.ok()?;
        let request = DescribeMount(mount.clone());
        let found = execute(&auth.client(), request).await;
        let MountInfo { kind, options } = found.ok()?;
        let version = options.as_ref().and_then(|options| options.get("version"));
        match (kind.as_str(), version.map(String::as_str)) {
            ("kv", Some("2")) => None,
            ("kv", _) => Some(format!(
                "mount {mount} is KV version 1, but credbroker needs KV version 2"
            )),
            _ => Some(format!(
                "mount {mount} is not a KV engine, but credbroker needs KV version 2"
            )),
        }
    }

    /// What the broker may do to a key apart from reading it. The caller must have read the key's metadata: that proves that
    /// the mount is KV v2, where none of these writes can succeed.
    ///
    /// # Errors
    /// When one of the requests failed for another reason than its content or the policy.
    pub async fn may_write(
        &self,
        account: &AccountId,
        name: &KeyName,
    ) -> Result<Vec<&'static str>, VaultError> {
        let (mount, path) = self.kv_path(account, name);
        let no_versions = json!({ "versions": [] });
        let probes = [
            // Check-and-set rejects it.
            (
                "write versions",
                "data",
                json!({ "data": {}, "options": { "cas": NO_VERSION } }),
            ),
            // A value is too long.
            (
                "change metadata",
                "metadata",
                json!({ "custom_metadata": { "doctor": "x".repeat(TOO_LONG) } }),
            ),
            // These name no version.
            ("delete versions", "delete", no_versions.clone()),
            ("undelete versions", "undelete", no_versions.clone()),
            ("destroy versions", "destroy", no_versions),
        ];
        let auth = self.auth_token().await?;
        let mut allowed = Vec::new();
        for (action, kind, body) in probes {
            let request = WriteProbe {
                path: format!("{mount}/{kind}/{path}"),
                body,
            };
            match execute_only(&auth.client(), request).await {
                Ok(()) => allowed.push(action),
                Err(error) => match status_of(&error) {
                    Some(403) => {}
                    // Rejected for its content, so the policy allows it.
                    Some(400 | 404 | 405) => allowed.push(action),
                    _ => return Err(reduce(&error)),
                },
            }
        }
        Ok(allowed)
    }
}

/// `GET sys/internal/ui/mounts/<mount>`, allowed for every token with access to any path below the mount. Source: observed
/// on OpenBao 2.6.2; the command lines of OpenBao and Vault detect the KV version this way.
struct DescribeMount(String);

/// Type and options of a mount.
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
