//! The credential files of the login, read again at every use.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use serde_json::Value;
use vaultrs::api::sys::requests::{UnwrapRequest, WrappingLookupRequest};
use zeroize::Zeroizing;

use super::connection::{VaultConnection, execute, reduce, status_of};
use super::{OutageKind, VaultError, Wiped};
use crate::base::encoding::is_utf16;
use crate::base::pem;

/// The secret id from a wrapping token, which can be unwrapped only once.
#[derive(Default)]
pub(super) struct SecretId {
    unwrapped: Option<Zeroizing<String>>,
    /// A wrapping token that cannot be used, and why; it is not sent to Vault again.
    spent: Option<(Zeroizing<String>, VaultError)>,
}

/// A certificate chain and its key, PEM as in their files.
#[derive(Eq, PartialEq)]
pub(super) struct Identity {
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
}

impl Identity {
    /// Reads the files.
    pub(super) async fn read(certificate: &Path, key: &Path) -> Result<Self, String> {
        Ok(Self {
            certificate: read(certificate).await?.to_vec(),
            key: read(key).await?,
        })
    }

    /// `base` with this certificate for the client.
    pub(super) fn tls(&self, base: &ClientConfig) -> Result<ClientConfig, String> {
        let chain = pem::certificates(&self.certificate).map_err(|error| error.to_string())?;
        let key = pem::private_key(&self.key).map_err(|error| error.to_string())?;
        let pair = CertifiedKey::from_der(chain, key, base.crypto_provider());
        let pair = pair.map_err(|error| error.to_string())?;
        let mut tls = base.clone();
        // rustls resumes no session of another resolver.
        tls.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(pair));
        Ok(tls)
    }
}

impl SecretId {
    /// The secret id: from the wrapping token in `file` if that is new, otherwise the one in memory.
    ///
    /// `path` is where the token must have been created: an attacker may have replaced it to make the broker log in under
    /// another role.
    pub(super) async fn unwrapped(
        &mut self,
        connection: &VaultConnection,
        file: &Path,
        path: &str,
    ) -> Result<Zeroizing<String>, VaultError> {
        let memory = self.unwrapped.clone();
        let token = match (read_token(file).await, memory) {
            (Ok(token), _) => token,
            (Err(_), Some(secret_id)) => return Ok(secret_id),
            (Err(error), None) => return Err(error),
        };
        match &self.spent {
            Some((spent, _)) if *spent == token && self.unwrapped.is_some() => {}
            Some((spent, reason)) if *spent == token => return Err(reason.clone()),
            _ => self.unwrap(connection, token, file, path).await?,
        }
        let secret_id = self.unwrapped.clone();
        secret_id.ok_or_else(used_or_expired)
    }

    async fn unwrap(
        &mut self,
        connection: &VaultConnection,
        token: Zeroizing<String>,
        file: &Path,
        path: &str,
    ) -> Result<(), VaultError> {
        match check_wrapping(connection, &token, path).await {
            Ok(()) => {}
            Err(reason @ VaultError::LoginRefused(_)) => return Err(self.spend(token, reason)),
            Err(other) => return Err(other),
        }
        // The token must be sent only as client token: otherwise the server loses the secret id.
        let client = connection.client(&token);
        let request = UnwrapRequest { token: None };
        let mut data = match execute(&client, request).await {
            Ok(data) => Wiped(data),
            Err(error) if status_of(&error) == Some(400) => {
                return Err(self.spend(token, used_or_expired()));
            }
            // The token may be used up now; the next lookup shows it.
            Err(error) => return Err(reduce(&error).during("login: secret_id unwrap")),
        };
        let Some(Value::String(secret_id)) = data.0.get_mut("secret_id").map(Value::take) else {
            let reason = "login: the wrapping token contains no secret_id".to_owned();
            return Err(self.spend(token, VaultError::LoginRefused(reason)));
        };
        self.unwrapped = Some(checked_token(&Zeroizing::new(secret_id))?);
        self.spend(token, used_or_expired());
        // The token is used up, so a failed deletion does no harm.
        if let Err(error) = off_thread(file, std::fs::remove_file).await {
            tracing::warn!(
                exception.message = format!("{}: {error}", file.display()),
                "cannot delete the file of the used wrapping token"
            );
        }
        Ok(())
    }

    fn spend(&mut self, token: Zeroizing<String>, reason: VaultError) -> VaultError {
        self.spent = Some((token, reason.clone()));
        reason
    }
}

/// Looks up a wrapping token without using it; `path` is where it must have been created.
pub(super) async fn check_wrapping(
    connection: &VaultConnection,
    token: &str,
    path: &str,
) -> Result<(), VaultError> {
    let request = WrappingLookupRequest {
        token: token.to_owned(),
    };
    match execute(&connection.client(""), request).await {
        Ok(found) if found.creation_path == path => Ok(()),
        Ok(found) => Err(VaultError::LoginRefused(format!(
            "login: the wrapping token was created at {}, expected {path}; check who replaced it",
            found.creation_path
        ))),
        Err(error) if status_of(&error) == Some(400) => Err(used_or_expired()),
        Err(error) => Err(reduce(&error).during("login: wrapping token lookup")),
    }
}

fn used_or_expired() -> VaultError {
    VaultError::LoginRefused(
        "login: wrapping token used or expired; each start needs a new one".to_owned(),
    )
}

/// The token in a file, without surrounding whitespace.
pub(super) async fn read_token(file: &Path) -> Result<Zeroizing<String>, VaultError> {
    // Bots see this error too, so it does not name the path.
    let unreadable = |error| {
        OutageKind::Other.outage(format!(
            "cannot read the credential file in vault.auth: {error}"
        ))
    };
    let bytes = read(file).await.map_err(unreadable)?;
    token_in(&bytes).map_err(VaultError::Credential)
}

/// The token in a file; or what is wrong with its format, and the fix. Vault would return only 403 for some of these.
fn token_in(bytes: &[u8]) -> Result<Zeroizing<String>, &'static str> {
    const EXPECTED: &str = "expected one line of printable ASCII without spaces";
    if is_utf16(bytes) {
        return Err(
            "it is UTF-16, which PowerShell's `>` writes; save it as ASCII, for example with `Set-Content -Encoding ascii`",
        );
    }
    let text = std::str::from_utf8(bytes).map_err(|_| EXPECTED)?.trim();
    if text.is_empty() {
        return Err("it is empty; expected one line of printable ASCII without spaces");
    }
    if text.starts_with('\u{feff}') {
        return Err("it begins with a byte order mark; save it as UTF-8 without BOM, or as ASCII");
    }
    if text.starts_with(['{', '[']) {
        return Err(
            "it is JSON; write only the token value, for example with `jq -r .auth.client_token`",
        );
    }
    if text.starts_with(['"', '\'', '`']) {
        return Err("the token is in quotes; remove the quotes");
    }
    if is_assignment(text) {
        return Err("it is an assignment (NAME=TOKEN); write only the TOKEN part");
    }
    checked_token(text).map_err(|_| EXPECTED)
}

/// Whether it is a shell assignment. Vault tokens and JWTs contain a `.`, secret ids a `-`, and `=` padding is at the end.
fn is_assignment(text: &str) -> bool {
    let text = text.strip_prefix("export ").unwrap_or(text);
    let Some((name, value)) = text.split_once('=') else {
        return false;
    };
    let is_name = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && is_name(name.trim_end())
        && !value.trim_start_matches('=').is_empty()
}

/// Trims a token, and refuses what the library would panic on.
pub(super) fn checked_token(text: &str) -> Result<Zeroizing<String>, VaultError> {
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(not_a_token());
    }
    Ok(Zeroizing::new(token.to_owned()))
}

fn not_a_token() -> VaultError {
    OutageKind::Other
        .outage("Vault returned an invalid token; expected one line of printable ASCII")
}

async fn read(file: &Path) -> Result<Zeroizing<Vec<u8>>, String> {
    off_thread(file, |file| std::fs::read(file).map(Zeroizing::new)).await
}

/// Runs on another thread: a file on a hanging mount must not make bots wait.
async fn off_thread<T: Send + 'static>(
    file: &Path,
    work: impl FnOnce(PathBuf) -> std::io::Result<T> + Send + 'static,
) -> Result<T, String> {
    let file = file.to_owned();
    match tokio::task::spawn_blocking(|| work(file)).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_one_line_of_printable_ascii() {
        let checked = |text: &str| checked_token(text).map(|token| token.to_string());
        assert_eq!(checked("s.fake\n"), Ok("s.fake".to_owned()));
        for bad in ["", "\n", "a b", "a\nb", "é"] {
            assert!(checked(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn token_of_any_known_format_is_not_mistaken_for_an_assignment() {
        for good in [
            "hvs.CAESIA==",
            "b.AAAAAQJ",
            "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJ4In0.c2ln",
            "00000000-0000-4000-8000-000000000000",
            "Zm9vYmE=",
            "Zm9vYg==",
        ] {
            assert_eq!(token_in(good.as_bytes()).unwrap().as_str(), good);
        }
        for bad in [
            "VAULT_TOKEN=s.fake",
            "export T = s.fake",
            "token=\"s.fake\"",
        ] {
            assert!(token_in(bad.as_bytes()).unwrap_err().contains("assignment"));
        }
    }
}
