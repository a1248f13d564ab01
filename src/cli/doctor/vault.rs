//! Vault: is it there, does it take the broker's login, does it give every key, and can the broker only read?

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
use super::keys::Found;
use crate::base::diagnosis::Diagnosis;
use crate::base::ids::{AccountId, KeyName};
use crate::base::trust::shows_ca;
use crate::cli::NEW_MOUNT;
use crate::clock::Clock;
use crate::config::Config;
use crate::policy::Policy;
use crate::server::build;
use crate::server::identity::not_after_ms;
use crate::telemetry::chain;
use crate::vault::{Auth, Hold, NotedState, OutageKind, Vault, VaultError, unknown_state};

const CHECK: &str = "vault";

const CREDENTIAL_FIX: &str =
    "write the token alone into the file that vault.auth names, on one line";

/// For a connection and its handshake, name resolution included.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// All of it, and the keys that Vault gave.
pub(super) async fn look(
    config: &Config,
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
    policy: Option<&Policy>,
    is_running: bool,
) -> (Vec<Diagnosis>, Vec<Found>) {
    let mut lines = match reach(&config.vault.address, roots.clone(), provider).await {
        Ok(lines) => lines,
        Err(line) => return (vec![line], Vec::new()),
    };
    let vault = match build::vault(config, roots, provider, &Arc::default()) {
        Ok(vault) => vault,
        Err(error) => {
            let fix = "correct `[vault]`; `credbroker check-config` looks again";
            lines.push(Diagnosis::failed(CHECK, chain(&error), fix));
            return (lines, Vec::new());
        }
    };
    let found = inside(config, &vault, policy, is_running, &mut lines).await;
    vault.close().await;
    (lines, found)
}

/// Vault took too long; what it had said by then is not told.
pub(super) fn late(limit: Duration) -> (Vec<Diagnosis>, Vec<Found>) {
    let detail = format!(
        "it did not answer all questions within {} s",
        limit.as_secs()
    );
    let fix = "look at its load, and at the way to it";
    (vec![Diagnosis::failed(CHECK, detail, fix)], Vec::new())
}

/// Connects, and looks at the certificate.
async fn reach(
    address: &Url,
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<Vec<Diagnosis>, Diagnosis> {
    let reached = timeout(CONNECT_WITHIN, connect(address, roots, provider)).await;
    let reached = reached.unwrap_or_else(|_| {
        let late = format!("no answer within {} s", CONNECT_WITHIN.as_secs());
        Err(io::Error::other(late))
    });
    match reached {
        Ok(ends_ms) => {
            let mut lines = vec![Diagnosis::ok(CHECK, format!("{address} is reached"))];
            if address.scheme() == "https" {
                lines.push(files::expiry(
                    "of Vault",
                    "have Vault's certificate renewed",
                    ends_ms,
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
                Some(error) if shows_ca(error) => {
                    "give Vault a certificate that its CA has issued (CA:FALSE); vault.roots may stay as it is"
                }
                Some(rustls::Error::InvalidCertificate(_)) => {
                    "Vault's certificate has ended, or is for another name than vault.address has: renew it, or correct vault.address"
                }
                _ => {
                    "does Vault run, is vault.address right, and do name server and firewall let the broker there?"
                }
            };
            let detail = format!("{address} cannot be reached: {error}");
            Err(Diagnosis::failed(CHECK, detail, fix))
        }
    }
}

/// When Vault's certificate ends.
async fn connect(
    address: &Url,
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> io::Result<Option<i64>> {
    let unfit = || io::Error::new(io::ErrorKind::InvalidInput, "it is no address");
    let host = address.host_str().ok_or_else(unfit)?;
    let host = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    let port = address.port_or_known_default().ok_or_else(unfit)?;
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

/// What only the broker's own login shows.
async fn inside(
    config: &Config,
    vault: &Vault,
    policy: Option<&Policy>,
    is_running: bool,
    lines: &mut Vec<Diagnosis>,
) -> Vec<Found> {
    if let Some(wrapped) = vault.wrapped().await {
        lines.push(of_wrapping(wrapped, is_running));
        return Vec::new();
    }
    match vault.token().await {
        Ok(Some(token)) => {
            let ends = match token.ttl_s {
                0 => "never ends".to_owned(),
                ttl_s => format!("is good for {ttl_s} s"),
            };
            let policies = token.policies.join(", ");
            let detail = format!("the login works; policies of the token: {policies}; it {ends}");
            lines.push(Diagnosis::ok(CHECK, detail));
        }
        Ok(None) => {
            let detail = "the login works, and the token may not look itself up";
            let fix = "give the role the policy deploy/vault/broker.hcl: without it the token cannot be renewed either";
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
            "keys are not looked for, since the rules cannot be used",
        ));
        return Vec::new();
    };
    let places = policy.accounts().flat_map(|account| {
        let names: std::collections::BTreeSet<_> = account.keys.values().collect();
        names.into_iter().map(|name| (&account.id, name))
    });
    let reads = places
        .map(|(account, name)| async move { (account, name, read(vault, account, name).await) });
    let read = futures_util::future::join_all(reads).await;
    let (count, mut found, mut readable) = (read.len(), Vec::new(), None);
    for (account, name, read) in read {
        let about = format!("{account}/{name}");
        match read {
            Ok((key, notes)) => {
                readable = Some((account, name));
                found.push(key);
                lines.extend(notes);
            }
            Err(PolicyReadError {
                reason,
                fix,
                is_there,
            }) => {
                if is_there {
                    readable = Some((account, name));
                }
                lines.push(Diagnosis::failed(CHECK, reason, fix).about(&about));
            }
        }
    }
    if found.len() == count {
        lines.push(Diagnosis::ok(
            CHECK,
            format!("gives every key that the rules name ({count})"),
        ));
    }
    if let Some((account, name)) = readable {
        lines.push(of_writing(vault.may_write(account, name).await));
    }
    found
}

/// Why Vault did not give a key.
struct PolicyReadError {
    reason: String,
    fix: String,
    /// Whether its metadata can be read.
    is_there: bool,
}

/// The key that is to be used, and what its metadata say that somebody should know.
async fn read(
    vault: &Vault,
    account: &AccountId,
    name: &KeyName,
) -> Result<(Found, Vec<Diagnosis>), PolicyReadError> {
    let register = || format!("register one: `credbroker keys register {account} --key {name}`");
    let why = |error: VaultError, is_there: bool| {
        let fix = match &error {
            VaultError::Denied => {
                "let the policy of the broker's role read it: deploy/vault/broker.hcl names mount and prefix".to_owned()
            }
            VaultError::Gone(_) => register(),
            VaultError::Unusable(_) => {
                format!("replace the whole key: `credbroker keys rotate {account} --key {name}`")
            }
            VaultError::LoginRefused(_) | VaultError::Outage(_) => {
                server_fix(&error).unwrap_or("try again; Vault's log says more").to_owned()
            }
            VaultError::Credential(_) => CREDENTIAL_FIX.to_owned(),
        };
        PolicyReadError {
            reason: error.to_string(),
            fix,
            is_there,
        }
    };
    let found = vault.find(account, name).await;
    let found = found.map_err(|error| why(error, false))?;
    let Some(metadata) = found else {
        return Err(match vault.unfit_mount().await {
            Some(reason) => PolicyReadError {
                reason,
                fix: format!("set vault.mount to a mount of version 2; {NEW_MOUNT}"),
                is_there: false,
            },
            None => why(VaultError::no_such_key(), false),
        });
    };
    let unread = |reason: String, fix: String| PolicyReadError {
        reason,
        fix,
        is_there: true,
    };
    let about = format!("{account}/{name}");
    let mut notes = Vec::new();
    match metadata.state() {
        NotedState::Active => {}
        NotedState::Disabled(word) => {
            let reason = format!("it is switched off: its custom metadata says state={word}");
            let fix = "to enable it, set state=active in its custom metadata (deploy/vault/README.md, section 4)";
            return Err(unread(reason, fix.to_owned()));
        }
        NotedState::Unknown(word) => {
            let fix = "set state=active or state=disabled in its custom metadata (deploy/vault/README.md, section 4)";
            notes.push(Diagnosis::failed(CHECK, unknown_state(word), fix).about(&about));
        }
    }
    if let Some(Hold {
        version, newest, ..
    }) = metadata.hold()
    {
        let detail = format!(
            "held at version {version} by use_version in its custom metadata; version {newest} is not used"
        );
        let fix = format!(
            "`credbroker keys rollback {account} --key {name} --newest` uses the newest version; registering a key does too"
        );
        notes.push(Diagnosis::warning(CHECK, detail, fix).about(&about));
    }
    let version = metadata.wanted().map_err(|reason| {
        unread(
            reason,
            format!(
                "`credbroker keys rollback {account} --key {name} --newest` uses the newest version again; --to VERSION another \
                 one that is there"
            ),
        )
    })?;
    let key = vault.read(account, name, version).await;
    let key = key.map_err(|error| why(error, true))?;
    let found = Found {
        account: account.clone(),
        name: name.clone(),
        version,
        key,
    };
    Ok((found, notes))
}

/// A wrapped secret id can be had once, and the broker needs it.
fn of_wrapping(wrapped: Result<(), VaultError>, is_running: bool) -> Diagnosis {
    match wrapped {
        Ok(()) => {
            let detail = "the wrapping token is good; it is not used up here, so the login is not tried and no key is read or tested";
            Diagnosis::unchecked(CHECK, detail)
        }
        Err(_) if is_running => {
            let detail = "the running broker has used the wrapping token up, as it should; the login is not tried and no \
                          key is read or tested";
            let fix = "ask the broker: `credbroker keys list`";
            Diagnosis::warning(CHECK, detail, fix)
        }
        Err(error) => {
            let fresh = "have a fresh wrapping token put into vault.auth.secret_id_file; every start needs one";
            let fix = server_fix(&error).unwrap_or(fresh);
            Diagnosis::failed(CHECK, error.to_string(), fix)
        }
    }
}

fn of_writing(may: Result<Vec<&'static str>, VaultError>) -> Diagnosis {
    match may {
        Ok(may) if may.is_empty() => Diagnosis::ok(
            CHECK,
            "lets the broker read keys, and neither write nor delete them",
        ),
        Ok(may) => {
            let detail = format!(
                "lets the broker {}: whoever takes the broker over could too",
                may.join(", ")
            );
            let fix = "give its role the policy deploy/vault/broker.hcl, and no other (token_no_default_policy=true)";
            Diagnosis::failed(CHECK, detail, fix)
        }
        Err(error) => {
            let detail = format!("whether the broker can only read is not known: {error}");
            Diagnosis::warning(CHECK, detail, "try again")
        }
    }
}

/// What to do where the trouble is Vault itself or the way to it, and no login would help.
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
            "unseal it; until then a running broker uses the keys it has in memory, within max_stale_s",
        ),
        OutageKind::Server => Some("look at Vault's log; then try again"),
        OutageKind::Unreachable => Some(
            "check that Vault runs at vault.address and answers, and that no firewall is in between",
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
            "compare vault.auth.role_id with the role; put a fresh secret id into {}; is this machine's address in the role's \
             bound CIDRs?",
            secret_id_file.display()
        ),
        Auth::Cert { certificate, .. } => format!(
            "does the role take {}? Vault itself must end TLS, no proxy before it",
            certificate.display()
        ),
        Auth::Kubernetes { role, jwt_file, .. } => format!(
            "is the service account of {} bound to the role {role}, with its audience? Vault's log says more",
            jwt_file.display()
        ),
        Auth::TokenFile(file) => format!(
            "does the agent that keeps the token in {} run, and log in? Its log says more",
            file.display()
        ),
    }
}
