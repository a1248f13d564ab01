//! Reads the files that the configuration names, and reports every problem in them together.

use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{Config, Roots};

use crate::keyring::vault::Auth;
use crate::policy::Policy;
use crate::toml_file::{Problem, Problems};

/// What stands in the files.
#[derive(Debug)]
pub struct Loaded {
    /// The rules.
    pub policy: Policy,
    /// Certificate chain of the bots' listener.
    pub certificate: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// CAs of the bots' certificates.
    pub client_ca: Arc<RootCertStore>,
    /// CAs of Vault.
    pub vault_roots: RootCertStore,
    /// CAs of the exchange.
    pub egress_roots: RootCertStore,
}

/// Reads them all.
///
/// # Errors
/// With every problem at once, each under the key that names the file.
pub fn load(config: &Config) -> Result<Loaded, Vec<Problem>> {
    let problems = Problems::default();
    let policy = policy(&config.rules, &problems);
    let tls = &config.tls;
    let (certificate, key) = pair("tls", &tls.certificate, &tls.key, &problems);
    if let Some(problem) = certificate.as_deref().and_then(unfit_for_a_server) {
        problems.add("tls.certificate", problem);
    }
    if let Auth::Cert {
        certificate, key, ..
    } = &config.vault.auth
    {
        // Only to find problems early: both are read again at every login.
        pair("vault.auth", certificate, key, &problems);
    }
    let client_ca = root_file("tls.client_ca", &config.tls.client_ca, &problems);
    let vault_roots = roots("vault.roots", &config.vault_roots, &problems);
    let egress_roots = roots("egress.roots", &config.egress_roots, &problems);
    problems.into_result()?;
    // What is missing has been reported as a problem.
    let loaded = || {
        Some(Loaded {
            policy: policy?,
            certificate: certificate?,
            key: key?,
            client_ca: Arc::new(client_ca?),
            vault_roots: vault_roots?,
            egress_roots: egress_roots?,
        })
    };
    loaded().ok_or_else(Vec::new)
}

fn policy(file: &Path, problems: &Problems) -> Option<Policy> {
    let found = match std::fs::read_to_string(file) {
        Ok(text) => Policy::parse(&text),
        Err(error) => {
            problems.add(
                "rules",
                format_args!("{} cannot be read: {error}", file.display()),
            );
            return None;
        }
    };
    match found {
        Ok(policy) => Some(policy),
        Err(found) => {
            for problem in found {
                problems.add(
                    format!("{}: {}", file.display(), problem.key),
                    problem.problem,
                );
            }
            None
        }
    }
}

fn certificates(
    key: &str,
    file: &Path,
    problems: &Problems,
) -> Option<Vec<CertificateDer<'static>>> {
    let found =
        CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match found {
        Ok(found) if !found.is_empty() => return Some(found),
        Ok(_) => problems.add(key, format_args!("{} holds no certificate", file.display())),
        Err(error) => problems.add(key, unreadable(file, "certificates as PEM", &error)),
    }
    None
}

/// A certificate chain and its key, under `certificate` and `key` of `section`.
fn pair(
    section: &str,
    certificate_file: &Path,
    key_file: &Path,
    problems: &Problems,
) -> (
    Option<Vec<CertificateDer<'static>>>,
    Option<PrivateKeyDer<'static>>,
) {
    let certificate = certificates(
        &format!("{section}.certificate"),
        certificate_file,
        problems,
    );
    let key = match PrivateKeyDer::from_pem_file(key_file) {
        Ok(key) => Some(key),
        Err(error) => {
            problems.add(
                format!("{section}.key"),
                unreadable(key_file, "a private key as PEM", &error),
            );
            None
        }
    };
    if let (Some(certificate), Some(key)) = (&certificate, &key) {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let pair = CertifiedKey::from_der(certificate.clone(), key.clone_key(), &provider);
        if let Err(error) = pair {
            let file = key_file.display();
            problems.add(
                format!("{section}.key"),
                format_args!("{file} is not the key of {section}.certificate: {error}"),
            );
        }
    }
    (certificate, key)
}

/// What would make every bot refuse the broker's certificate.
fn unfit_for_a_server(chain: &[CertificateDer<'_>]) -> Option<&'static str> {
    let Ok((_, certificate)) = X509Certificate::from_der(chain.first()?) else {
        return Some("is not an X.509 certificate");
    };
    let usage = certificate.extended_key_usage().ok().flatten();
    if usage.is_some_and(|usage| !usage.value.server_auth && !usage.value.any) {
        return Some("is not for servers: its extended key usage does not name serverAuth");
    }
    let names = certificate.subject_alternative_name().ok().flatten();
    let is_name = |name: &GeneralName<'_>| {
        matches!(name, GeneralName::DNSName(_) | GeneralName::IPAddress(_))
    };
    if names.is_none_or(|names| !names.value.general_names.iter().any(is_name)) {
        return Some(
            "names no host: it needs a DNS name or an IP address as subject alternative name",
        );
    }
    None
}

fn roots(key: &str, roots: &Roots, problems: &Problems) -> Option<RootCertStore> {
    match roots {
        Roots::File(file) => root_file(key, file, problems),
        Roots::Mozilla => Some(webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect()),
    }
}

fn root_file(key: &str, file: &Path, problems: &Problems) -> Option<RootCertStore> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(key, file, problems)? {
        if let Err(error) = store.add(certificate) {
            problems.add(
                key,
                format_args!(
                    "{} holds a certificate that is no CA: {error}",
                    file.display()
                ),
            );
            return None;
        }
    }
    Some(store)
}

fn unreadable(file: &Path, expected: &str, error: &dyn std::error::Error) -> String {
    format!("expected {expected} in {}: {error}", file.display())
}
