//! Vault: whether it is reachable, accepts the broker's login, returns every key, and lets the broker only read.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::ServerName;
use rustls::{CertificateError, RootCertStore};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use url::Url;

use super::files;
use super::keys::FoundKey;
use crate::base::diagnosis::Diagnosis;
use crate::base::ids::{AccountId, KeyName};
use crate::base::trust::presents_ca;
use crate::cli::NEW_MOUNT;
use crate::clock::Clock;
use crate::config::Config;
use crate::policy::Policy;
use crate::server::build;
use crate::server::identity::not_after_ms;
use crate::telemetry::chain;
use crate::vault::{Auth, Hold, OutageKind, StoredState, Vault, VaultError, unknown_state};

const CHECK: &str = "vault";

const CREDENTIAL_FIX: &str = "put only the credential (token, secret_id or JWT) into the file that vault.auth names, on one line";

/// Limit for connection and TLS handshake, name resolution included.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// Runs all Vault checks; also returns the keys that could be read.
pub(super) async fn check(
    config: &Config,
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
    policy: Option<&Policy>,
    is_running: bool,
) -> (Vec<Diagnosis>, Vec<FoundKey>) {
    let mut lines = match reach(&config.vault.address, roots.clone(), provider).await {
        Ok(lines) => lines,
        Err(line) => return (vec![line], Vec::new()),
    };
    let vault = match build::vault(config, roots, provider, &Arc::default()) {
        Ok(vault) => vault,
        Err(error) => {
            let fix = "correct `[vault]`, then run `credbroker check-config` to check";
            lines.push(Diagnosis::failed(CHECK, chain(&error), fix));
            return (lines, Vec::new());
        }
    };
    let found = check_with_login(config, &vault, policy, is_running, &mut lines).await;
    vault.close().await;
    (lines, found)
}

/// The checks took too long; results so far are dropped.
pub(super) fn timed_out(limit: Duration) -> (Vec<Diagnosis>, Vec<FoundKey>) {
    let detail = format!(
        "Vault did not respond to all requests within {} s",
        limit.as_secs()
    );
    let fix = "check Vault's load and the network path to it";
    (vec![Diagnosis::failed(CHECK, detail, fix)], Vec::new())
}

/// Connects and checks the certificate.
async fn reach(
    address: &Url,
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<Vec<Diagnosis>, Diagnosis> {
    let reached = timeout(CONNECT_WITHIN, connect(address, roots, provider)).await;
    let reached = reached.unwrap_or_else(|_| {
        let late = format!("no response within {} s", CONNECT_WITHIN.as_secs());
        Err(io::Error::other(late))
    });
    match reached {
        Ok(expires_ms) => {
            let mut lines = vec![Diagnosis::ok(CHECK, format!("{address} is reachable"))];
            if address.scheme() == "https" {
                lines.push(files::expiry(
                    "Vault server",
                    "renew Vault's certificate",
                    expires_ms,
                    Clock::system().wall_ms(),
                ));
            }
            Ok(lines)
        }
        Err(error) => {
            let tls = error.get_ref().and_then(|error| error.downcast_ref());
            let fix = match tls {
                Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
                    "put the CA of Vault's certificate into the file that vault.roots names"
                }
                Some(error) if presents_ca(error) => {
                    "in Vault's listener, install a server certificate (CA:FALSE) issued by this CA; vault.roots need not change"
                }
                Some(rustls::Error::InvalidCertificate(_)) => {
                    "renew Vault's certificate if it has expired; otherwise check that it is valid for the name in vault.address"
                }
                _ => {
                    "check that Vault is running, that vault.address is correct, and that DNS and the firewall allow the connection"
                }
            };
            let detail = format!("cannot reach {address}: {error}");
            Err(Diagnosis::failed(CHECK, detail, fix))
        }
    }
}

/// Connects to Vault. Returns when its certificate expires.
async fn connect(
    address: &Url,
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> io::Result<Option<i64>> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "not a valid address");
    let host = address.host_str().ok_or_else(invalid)?;
    let host = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    let port = address.port_or_known_default().ok_or_else(invalid)?;
    let stream = TcpStream::connect((host.as_str(), port)).await?;
    if address.scheme() != "https" {
        return Ok(None);
    }
    let tls = build::client_tls(roots, provider).map_err(io::Error::other)?;
    let name = ServerName::try_from(host).map_err(io::Error::other)?;
    let stream = TlsConnector::from(Arc::new(tls))
        .connect(name, stream)
        .await?;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    Ok(certificates.first().and_then(not_after_ms))
}

/// Checks that need the broker's login.
async fn check_with_login(
    config: &Config,
    vault: &Vault,
    policy: Option<&Policy>,
    is_running: bool,
    lines: &mut Vec<Diagnosis>,
) -> Vec<FoundKey> {
    if let Some(wrapped) = vault.wrapped().await {
        lines.push(of_wrapping(wrapped, is_running));
        return Vec::new();
    }
    match vault.token().await {
        Ok(Some(token)) => {
            let expiry = match token.ttl_s {
                0 => "never expires".to_owned(),
                ttl_s => format!("expires in {ttl_s} s"),
            };
            let policies = token.policies.join(", ");
            let detail = format!("login succeeded; token {expiry}; policies: {policies}");
            lines.push(Diagnosis::ok(CHECK, detail));
        }
        Ok(None) => {
            let detail = "login succeeded, but the token has no permission to look itself up";
            let fix = "attach the policy deploy/vault/broker.hcl to the role; without it, the token cannot be renewed either";
            lines.push(Diagnosis::warning(CHECK, detail, fix));
        }
        Err(error) => {
            lines.push(Diagnosis::failed(
                CHECK,
                error.to_string(),
                login_fix(&error, &config.vault.auth),
            ));
            return Vec::new();
        }
    }
    let Some(policy) = policy else {
        lines.push(Diagnosis::unchecked(
            CHECK,
            "keys not checked, because the rules are invalid",
        ));
        return Vec::new();
    };
    let targets = policy.accounts().flat_map(|account| {
        let names: std::collections::BTreeSet<_> = account.keys.values().collect();
        names.into_iter().map(|name| (&account.id, name))
    });
    let reads = targets
        .map(|(account, name)| async move { (account, name, read(vault, account, name).await) });
    let read = futures_util::future::join_all(reads).await;
    let (count, mut found, mut readable) = (read.len(), Vec::new(), None);
    for (account, name, read) in read {
        let about = format!("{account}/{name}");
        match read {
            Ok((key, warnings)) => {
                readable = Some((account, name));
                found.push(key);
                lines.extend(warnings);
            }
            Err(KeyReadError {
                reason,
                fix,
                has_metadata,
            }) => {
                if has_metadata {
                    readable = Some((account, name));
                }
                lines.push(Diagnosis::failed(CHECK, reason, fix).about(&about));
            }
        }
    }
    if found.len() == count {
        lines.push(Diagnosis::ok(
            CHECK,
            format!("all keys in the rules can be read ({count})"),
        ));
    }
    if let Some((account, name)) = readable {
        lines.push(of_writing(vault.may_write(account, name).await));
    }
    found
}

/// Why a key could not be read.
struct KeyReadError {
    reason: String,
    fix: String,
    /// Whether its metadata can be read.
    has_metadata: bool,
}

/// Reads the key version to use; also returns warnings about its metadata.
async fn read(
    vault: &Vault,
    account: &AccountId,
    name: &KeyName,
) -> Result<(FoundKey, Vec<Diagnosis>), KeyReadError> {
    let register = || format!("register it: `credbroker keys register {account} --key {name}`");
    let failed = |error: VaultError, has_metadata: bool| {
        let fix = match &error {
            VaultError::Denied => {
                "attach the policy deploy/vault/broker.hcl to the broker's role; its mount and prefix must match vault.mount and vault.prefix".to_owned()
            }
            VaultError::Gone(_) => register(),
            VaultError::Unusable(_) => {
                format!("replace the key: `credbroker keys rotate {account} --key {name}`")
            }
            VaultError::LoginRefused(_) | VaultError::Outage(_) => {
                server_fix(&error).unwrap_or("try again; see Vault's log for details").to_owned()
            }
            VaultError::Credential(_) => CREDENTIAL_FIX.to_owned(),
        };
        KeyReadError {
            reason: error.to_string(),
            fix,
            has_metadata,
        }
    };
    let found = vault.find(account, name).await;
    let found = found.map_err(|error| failed(error, false))?;
    let Some(metadata) = found else {
        return Err(match vault.mount_problem().await {
            Some(reason) => KeyReadError {
                reason,
                fix: format!("set vault.mount to a KV version 2 mount; {NEW_MOUNT}"),
                has_metadata: false,
            },
            None => failed(VaultError::no_such_key(), false),
        });
    };
    let unusable = |reason: String, fix: String| KeyReadError {
        reason,
        fix,
        has_metadata: true,
    };
    let about = format!("{account}/{name}");
    let mut warnings = Vec::new();
    match metadata.state() {
        StoredState::Active => {}
        StoredState::Disabled(word) => {
            let reason = format!("disabled in Vault (state={word} in its custom metadata)");
            let fix = "to enable it, set state=active in its custom metadata (deploy/vault/README.md, section 4)";
            return Err(unusable(reason, fix.to_owned()));
        }
        StoredState::Unknown(word) => {
            let fix = "set state=active or state=disabled in its custom metadata (deploy/vault/README.md, section 4)";
            warnings.push(Diagnosis::failed(CHECK, unknown_state(word), fix).about(&about));
        }
    }
    if let Some(Hold {
        version, newest, ..
    }) = metadata.hold()
    {
        let detail = format!(
            "held at version {version} (use_version in the key's custom metadata); version {newest} is not used"
        );
        let fix = format!(
            "to use the newest version, run `credbroker keys rollback {account} --key {name} --newest`; registering a key \
             also ends the hold"
        );
        warnings.push(Diagnosis::warning(CHECK, detail, fix).about(&about));
    }
    let version = metadata.wanted().map_err(|reason| {
        unusable(
            reason,
            format!(
                "to use the newest version, run `credbroker keys rollback {account} --key {name} --newest`; to use another \
                 existing version, replace --newest with --to VERSION"
            ),
        )
    })?;
    let key = vault.read(account, name, version).await;
    let key = key.map_err(|error| failed(error, true))?;
    let found = FoundKey {
        account: account.clone(),
        name: name.clone(),
        version,
        key,
    };
    Ok((found, warnings))
}

/// A wrapped `secret_id` can be unwrapped only once, and the broker needs it.
fn of_wrapping(wrapped: Result<(), VaultError>, is_running: bool) -> Diagnosis {
    match wrapped {
        Ok(()) => {
            let detail = "the wrapping token is valid; doctor does not use it, and therefore cannot test the login or the keys";
            Diagnosis::unchecked(CHECK, detail)
        }
        Err(error) if is_running && server_fix(&error).is_none() => {
            let detail = "the wrapping token can no longer be used, which is normal once the running broker has used it; doctor \
                          cannot test the login or the keys";
            let fix = "run `credbroker keys list` to check the keys in the running broker";
            Diagnosis::warning(CHECK, detail, fix)
        }
        Err(error) => {
            let fresh = "put a fresh wrapping token into vault.auth.secret_id_file; every start of the broker needs a new one";
            let fix = server_fix(&error).unwrap_or(fresh);
            Diagnosis::failed(CHECK, error.to_string(), fix)
        }
    }
}

fn of_writing(may: Result<Vec<&'static str>, VaultError>) -> Diagnosis {
    match may {
        Ok(may) if may.is_empty() => Diagnosis::ok(
            CHECK,
            "the broker can read keys, but not write or delete them",
        ),
        Ok(may) => {
            let detail = format!(
                "the broker can {}; an attacker who takes over the broker could too",
                may.join(", ")
            );
            let fix = "attach only the policy deploy/vault/broker.hcl to the broker's role (token_no_default_policy=true)";
            Diagnosis::failed(CHECK, detail, fix)
        }
        Err(error) => {
            let detail = format!("cannot check that the broker can only read keys: {error}");
            Diagnosis::warning(CHECK, detail, "try again")
        }
    }
}

/// The fix for problems of Vault itself or the network path to it, which no login can solve.
fn server_fix(error: &VaultError) -> Option<&'static str> {
    let VaultError::Outage(outage) = error else {
        return None;
    };
    match outage.kind {
        OutageKind::NotVault => {
            Some("check that vault.address is Vault's own address, and that no proxy is in between")
        }
        OutageKind::Other => None,
        OutageKind::Sealed => Some(
            "unseal it; until then, a running broker uses its cached keys, as long as the account's max_stale_s and max_stale_cancel_s in the rules allow",
        ),
        OutageKind::Server => Some("check Vault's log, then try again"),
        OutageKind::Unreachable => Some(
            "check that Vault is running at vault.address and that no firewall blocks the connection",
        ),
    }
}

fn login_fix(error: &VaultError, auth: &Auth) -> String {
    if let VaultError::Credential(_) = error {
        return CREDENTIAL_FIX.to_owned();
    }
    if let Some(fix) = server_fix(error) {
        return fix.to_owned();
    }
    match auth {
        Auth::AppRole { secret_id_file, .. } => format!(
            "check that vault.auth.role_id is that of the broker's role in Vault, and that the role's bound CIDRs contain this \
             machine's address; then put a fresh secret_id into {}",
            secret_id_file.display()
        ),
        Auth::Cert { certificate, .. } => format!(
            "check that the broker's role in Vault accepts {}, and that Vault itself terminates TLS, with no proxy in front",
            certificate.display()
        ),
        Auth::Kubernetes { role, jwt_file, .. } => format!(
            "check that the service account of {} is bound to the role {role} with the right audience; see Vault's log for details",
            jwt_file.display()
        ),
        Auth::TokenFile(file) => format!(
            "check that the agent that writes the token to {} is running and logged in; see its log for details",
            file.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_wrapping_token_is_expected_while_the_broker_runs_but_an_outage_is_not() {
        let is_reported = |error: VaultError, is_running| {
            let found = of_wrapping(Err(error.clone()), is_running);
            found.is_failed() && found.cause == error.to_string()
        };
        let used = VaultError::LoginRefused("used".to_owned());
        let outages = [
            OutageKind::NotVault,
            OutageKind::Sealed,
            OutageKind::Server,
            OutageKind::Unreachable,
        ];
        for is_running in [false, true] {
            assert_eq!(is_reported(used.clone(), is_running), !is_running);
            for outage in outages.map(|kind| kind.outage("outage")) {
                assert!(is_reported(outage, is_running));
            }
        }
    }
}
