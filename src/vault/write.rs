//! Writes of admins: registers keys and changes their custom metadata, under a policy that cannot read a key.

use std::collections::BTreeMap;
use std::str::Utf8Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};
use vaultrs::api::kv2::requests::ListSecretsRequest;
use zeroize::Zeroizing;

use super::connection::{self, execute, if_exists, is_vaults_own, post, status_of, texts_of};
use super::login::AuthToken;
use super::metadata::{MAX_NOTES, Metadata, Notes, StoredFacts};
use super::{Vault, VaultError};
use crate::base::ids::{AccountId, KeyName};
use crate::base::secret::{KeyValues, PartnerKey};
use crate::kucoin::KeyVersion;

/// How many attempts a write gets, if a response is lost or someone else changes the notes at the same time.
const TRIES: usize = 3;

/// The wait before a write is repeated, in milliseconds: least and most.
const REPEAT_AFTER: (u64, u64) = (100, 400);

/// A version of a key to write.
#[derive(Debug)]
pub struct Registration {
    /// The key itself.
    pub values: KeyValues,
    /// Its version at KuCoin.
    pub key_version: KeyVersion,
    /// Facts about it.
    pub facts: StoredFacts,
}

/// Why a write failed, or may have failed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum WriteError {
    /// Vault or this module rejected it; nothing was written.
    #[error("not written to Vault: {0}")]
    Refused(String),
    /// Someone else has written meanwhile; this write changed nothing.
    #[error(
        "someone else changed the key in Vault: the newest version was {expected}, now it is {found}"
    )]
    Stale {
        /// The version that was expected as the newest.
        expected: u64,
        /// The newest version in Vault.
        found: u64,
    },
    /// It may or may not have been written, or may still be.
    #[error("the write may or may not have taken effect: {0}")]
    Unclear(String),
    /// Nothing was written.
    #[error(transparent)]
    Vault(#[from] VaultError),
}

/// Why one request failed.
enum Failure {
    /// Vault returned 400, with this text.
    Refused(String),
    /// Vault returned 400: check-and-set expected another version.
    Stale,
    Vault {
        error: VaultError,
        may_be_done: bool,
    },
}

impl Vault {
    /// The accounts that have keys in Vault; other paths below the prefix are left out.
    pub async fn accounts(&self) -> Result<Vec<AccountId>, VaultError> {
        let names = self.names(self.settings.prefix.clone()).await?;
        let account = |name: &String| name.strip_suffix('/')?.parse().ok();
        Ok(names.iter().filter_map(account).collect())
    }

    /// The keys of an account in Vault, also those without any version left.
    pub async fn keys(&self, account: &AccountId) -> Result<Vec<KeyName>, VaultError> {
        let folder = format!("{}/{account}", self.settings.prefix);
        let names = self.names(folder).await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    async fn names(&self, folder: String) -> Result<Vec<String>, VaultError> {
        let list = |auth: &AuthToken| {
            let client = auth.client();
            // With the slash, because the policy for paths below a folder does not cover the folder without it.
            let (mount, path) = (self.settings.mount.clone(), format!("{folder}/"));
            let request = ListSecretsRequest { mount, path };
            async move { if_exists(execute(&client, request).await) }
        };
        let found = self.with_authority(list).await?;
        Ok(found.map(|found| found.keys).unwrap_or_default())
    }

    /// Writes a key as the version that follows `cas` (0: as the first), and returns the number of the new version.
    ///
    /// # Errors
    /// They hold no value of the key. After [`WriteError::Unclear`] the key may have been written: only a reader of the key
    /// can distinguish that version from someone else's.
    pub async fn write(
        &self,
        account: &AccountId,
        name: &KeyName,
        registration: &Registration,
        cas: u64,
    ) -> Result<u64, WriteError> {
        let (mount, path) = self.kv_path(account, name);
        let path = format!("{mount}/data/{path}");
        let body = body(registration, cas)?;
        let mut unclear = None;
        // With check-and-set, it takes effect at most once, even if it is sent several times.
        for _ in 0..TRIES {
            let problem = match self.send(&path, &body).await {
                Ok(answer) => match answer.and_then(|answer| answer.get("version")?.as_u64()) {
                    Some(version) => return Ok(version),
                    None => "response is not in Vault's format".to_owned(),
                },
                // Either someone else has written, or an earlier attempt has taken effect.
                Err(Failure::Stale | Failure::Refused(_)) if unclear.is_some() => break,
                Err(Failure::Stale) => {
                    let newest = self.find(account, name).await?.unwrap_or_default();
                    return Err(WriteError::Stale {
                        expected: cas,
                        found: newest.current_version,
                    });
                }
                Err(Failure::Refused(text)) => {
                    return Err(WriteError::Refused(without_values(text, registration)));
                }
                Err(Failure::Vault { error, may_be_done }) if !may_be_done && unclear.is_none() => {
                    return Err(WriteError::Vault(error));
                }
                Err(Failure::Vault { error, .. }) => error.to_string(),
            };
            unclear = Some(without_values(problem, registration));
            pause().await;
        }
        Err(WriteError::Unclear(unclear.unwrap_or_default()))
    }

    /// Changes notes of a key, and returns the resulting metadata. All other notes stay.
    ///
    /// A server with check-and-set for metadata (OpenBao) rejects a write that would undo someone else's; it is repeated
    /// on top of that one. On other servers, a change that someone else makes between read and write is lost.
    pub async fn note(
        &self,
        account: &AccountId,
        name: &KeyName,
        changes: &Notes,
    ) -> Result<Metadata, WriteError> {
        let (mount, path) = self.kv_path(account, name);
        let path = format!("{mount}/metadata/{path}");
        let others = "someone else keeps changing the key's custom metadata; re-run the command";
        // Why a write may have taken effect that the metadata do not show.
        let mut unclear = None;
        for round in 0..=TRIES {
            let found = self.find(account, name).await;
            let before = match (found, &unclear) {
                (Ok(before), _) => before.unwrap_or_else(Metadata::of_nothing),
                (Err(error), None) => return Err(WriteError::Vault(error)),
                (Err(error), Some(_)) => return Err(WriteError::Unclear(error.to_string())),
            };
            if before.shows(changes) {
                return Ok(before);
            }
            if round == TRIES {
                break;
            }
            let notes = before.noted(changes);
            if notes.len() > MAX_NOTES {
                return Err(WriteError::Refused(format!(
                    "the key's custom metadata would have {} entries, but Vault allows {MAX_NOTES}; remove entries that credbroker did not write",
                    notes.len()
                )));
            }
            let body = match before.writes {
                Some(writes) => json!({ "custom_metadata": notes, "metadata_cas": writes }),
                None => json!({ "custom_metadata": notes }),
            };
            match self.send(&path, &body.to_string().into()).await {
                Ok(_) => {
                    unclear = Some(others.to_owned());
                    continue;
                }
                Err(Failure::Stale) => {}
                Err(Failure::Refused(text)) => return Err(WriteError::Refused(text)),
                Err(Failure::Vault { error, may_be_done }) if !may_be_done && unclear.is_none() => {
                    return Err(WriteError::Vault(error));
                }
                Err(Failure::Vault { error, .. }) => unclear = Some(error.to_string()),
            }
            pause().await;
        }
        Err(unclear.map_or_else(
            || WriteError::Refused(others.to_owned()),
            WriteError::Unclear,
        ))
    }

    /// Posts once, except for repeats as with a read: after a temporary 403, or if a node is behind.
    async fn send(&self, path: &str, body: &Bytes) -> Result<Option<Value>, Failure> {
        let may_be_done = AtomicBool::new(false);
        let write = |auth: &AuthToken| {
            let (client, may_be_done) = (auth.client_for_secrets(), &may_be_done);
            async move {
                match post(&client, path, body.clone()).await {
                    Err(error) if status_of(&error) == Some(400) && is_vaults_own(&error) => {
                        Ok(Err(refusal(texts_of(&error))))
                    }
                    Err(error) => {
                        may_be_done.fetch_or(connection::may_be_done(&error), Ordering::Relaxed);
                        Err(error)
                    }
                    Ok(answer) => Ok(Ok(answer)),
                }
            }
        };
        let done = self.with_authority(write).await;
        done.unwrap_or_else(|error| {
            let may_be_done = may_be_done.load(Ordering::Relaxed);
            Err(Failure::Vault { error, may_be_done })
        })
    }
}

/// Vault has no code for a failed check-and-set. These words are in both error texts, for versions and for metadata.
fn refusal(text: String) -> Failure {
    if text.contains("check-and-set parameter d") {
        Failure::Stale
    } else {
        Failure::Refused(text)
    }
}

async fn pause() {
    let wait = fastrand::u64(REPEAT_AFTER.0..=REPEAT_AFTER.1);
    tokio::time::sleep(Duration::from_millis(wait)).await;
}

/// Withholds an error text that contains a value of the key. Vault should never send one.
fn without_values(text: String, registration: &Registration) -> String {
    let values = &registration.values;
    let partner_key = values.partner_key.as_ref().map(PartnerKey::expose);
    let is_in_text = |value: &[u8]| {
        !value.is_empty()
            && text
                .as_bytes()
                .windows(value.len())
                .any(|part| part == value)
    };
    let all = [
        Some(values.api_key.as_bytes()),
        Some(values.api_secret.expose()),
        Some(values.passphrase.expose()),
        partner_key,
    ];
    if all.into_iter().flatten().any(is_in_text) {
        return "error text withheld: it contains the key's id, secret, passphrase or partner key"
            .to_owned();
    }
    text
}

/// The request body, wiped once the last handle is dropped.
fn body(registration: &Registration, cas: u64) -> Result<Bytes, WriteError> {
    #[derive(Serialize)]
    struct Options {
        cas: u64,
    }
    #[derive(Serialize)]
    struct Body<'a> {
        options: Options,
        data: BTreeMap<&'a str, &'a str>,
    }
    let values = &registration.values;
    let facts = registration.facts.texts();
    let mut data: BTreeMap<_, _> = facts
        .iter()
        .filter(|(_, text)| !text.is_empty())
        .map(|(name, text)| (*name, text.as_bytes()))
        .collect();
    data.insert("api_key", values.api_key.as_bytes());
    data.insert("api_secret", values.api_secret.expose());
    data.insert("passphrase", values.passphrase.expose());
    data.insert("key_version", registration.key_version.as_str().as_bytes());
    if let Some(key) = &values.partner_key {
        data.insert("partner_key", key.expose());
    }
    // JSON needs at most six bytes for one. If this were too small, the buffer would move and leave a copy behind.
    let room = |(name, value): (&&str, &&[u8])| name.len() + 6 * value.len() + 8;
    let room = 64 + data.iter().map(room).sum::<usize>();
    let text = |(name, value)| Ok((name, str::from_utf8(value)?));
    let data = data.into_iter().map(text).collect::<Result<_, Utf8Error>>();
    let unwritable = || {
        let problem = "the key's id, secret, passphrase or partner key is not valid UTF-8";
        WriteError::Refused(problem.to_owned())
    };
    let data = data.map_err(|_| unwritable())?;
    let options = Options { cas };
    let mut body = Zeroizing::new(Vec::with_capacity(room));
    serde_json::to_writer(&mut *body, &Body { options, data }).map_err(|_| unwritable())?;
    debug_assert!(body.len() <= room, "{} of {room} bytes", body.len());
    Ok(Bytes::from_owner(body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::secret::{ApiSecret, Passphrase};

    fn registration(text: &str) -> Registration {
        let text = |name: &str| Zeroizing::new(format!("fake-{name}{text}"));
        Registration {
            values: KeyValues {
                api_key: text("id"),
                api_secret: ApiSecret::new(text("secret")),
                passphrase: Passphrase::new(text("passphrase")),
                partner_key: Some(PartnerKey::new(text("partner"))),
            },
            key_version: KeyVersion::V2,
            facts: StoredFacts::default(),
        }
    }

    #[test]
    fn error_text_that_contains_a_value_of_the_key_is_not_shown() {
        let registration = registration("");
        for name in ["id", "secret", "passphrase", "partner"] {
            let echo = format!("cannot read \"fake-{name}\"");
            let shown = without_values(echo, &registration);
            assert_eq!(
                shown,
                "error text withheld: it contains the key's id, secret, passphrase or partner key"
            );
        }
        let harmless = "check-and-set parameter required for this call";
        assert_eq!(without_values(harmless.to_owned(), &registration), harmless);
    }

    #[test]
    fn body_buffer_has_room_for_values_that_json_makes_six_times_as_long() {
        let body = body(&registration(&"\u{1}".repeat(1000)), 7).unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["options"]["cas"], 7);
        assert_eq!(body["data"]["key_version"], "2");
        let secret = body["data"]["api_secret"].as_str().unwrap();
        assert_eq!(secret.len(), "fake-secret".len() + 1000);
    }
}
