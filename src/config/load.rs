//! Reads the files that the configuration names, and reports all their problems at once.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use zeroize::Zeroizing;

use super::{Config, Roots, TlsFiles};

use crate::base::encoding;
use crate::base::pem::{self, PemProblem};
use crate::base::toml_file::{Problem, Problems};
use crate::base::trust::{AnchorError, Peers, check_anchor};
use crate::policy::Policy;
use crate::vault::Auth;

/// Contents of the files.
#[derive(Debug)]
pub struct Loaded {
    /// The rules.
    pub(crate) policy: Policy,
    /// Certificates of the listeners for bots and admins.
    pub(crate) certificates: Certificates,
    /// CAs of Vault's certificate.
    pub vault_roots: RootCertStore,
    /// CAs of the exchange's certificates.
    pub(crate) egress_roots: RootCertStore,
    /// CAs whose certificates the broker may refuse because of name constraints, and ignored certificates that are not CAs;
    /// each with the key that names the file.
    pub warnings: Vec<Problem>,
}

/// Certificates of the listeners for bots and admins, and the CAs that they trust.
#[derive(Debug)]
pub(crate) struct Certificates {
    /// Certificate chain.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    /// Its private key.
    pub(crate) key: PrivateKeyDer<'static>,
    /// When the first certificate of the chain expires: Unix time in milliseconds.
    pub(crate) not_after_ms: i64,
    /// CAs of the bots' certificates.
    pub(crate) client_ca: Arc<RootCertStore>,
    /// CAs of the admins' certificates.
    pub(crate) admin_ca: Arc<RootCertStore>,
}

/// The files of [`Certificates`].
#[derive(Debug)]
pub(crate) struct TlsSources {
    certificate: Source,
    key: Source,
    client_ca: Source,
    /// `None`: the same CAs as for bots.
    admin_ca: Option<Source>,
}

impl TlsSources {
    /// Reads the files.
    pub(crate) fn read(files: &TlsFiles) -> Self {
        Self {
            certificate: Source::read(&files.certificate),
            key: Source::read(&files.key),
            client_ca: Source::read(&files.client_ca),
            admin_ca: files.admin_ca.as_deref().map(Source::read),
        }
    }

    fn cas(&self) -> impl Iterator<Item = &Source> {
        [&self.client_ca].into_iter().chain(&self.admin_ca)
    }

    fn all(&self) -> impl Iterator<Item = &Source> {
        [&self.certificate, &self.key].into_iter().chain(self.cas())
    }

    /// Whether one of them could not be opened because the process or system was out of file descriptors.
    pub(crate) fn is_unseen(&self) -> bool {
        self.all().any(Source::is_unseen)
    }

    /// Digest of all files.
    pub(crate) fn digest(&self) -> [u8; 32] {
        digest(self.all())
    }

    /// Digest of the CA files.
    pub(crate) fn cas_digest(&self) -> [u8; 32] {
        digest(self.cas())
    }
}

fn digest<'s>(sources: impl Iterator<Item = &'s Source>) -> [u8; 32] {
    let digests: Vec<_> = sources.map(Source::digest).collect();
    Sha256::digest(digests.concat()).into()
}

/// A file and its contents when it was read.
#[derive(Debug)]
pub(crate) struct Source {
    file: PathBuf,
    content: io::Result<Zeroizing<Vec<u8>>>,
}

impl Source {
    /// Reads the file.
    pub(crate) fn read(file: &Path) -> Self {
        Self {
            file: file.to_owned(),
            content: std::fs::read(file).map(Zeroizing::new),
        }
    }

    fn pem<T>(&self, parse: impl Fn(&[u8]) -> Result<T, PemProblem>) -> Result<T, String> {
        let content = self.content.as_ref().map_err(ToString::to_string)?;
        parse(content).map_err(|problem| problem.to_string())
    }

    fn expected(&self, expected: &str, problem: &str) -> String {
        format!("expected {expected} in {}: {problem}", self.file.display())
    }

    /// Whether it could not be opened because the process or system was out of file descriptors. The file itself may be
    /// fine.
    pub(crate) fn is_unseen(&self) -> bool {
        let is_out_of_descriptors = |code| {
            code == rustix::io::Errno::MFILE.raw_os_error()
                || code == rustix::io::Errno::NFILE.raw_os_error()
        };
        let code = self
            .content
            .as_ref()
            .err()
            .and_then(io::Error::raw_os_error);
        code.is_some_and(is_out_of_descriptors)
    }

    /// Digest of its contents, or of the error if it cannot be read.
    pub(crate) fn digest(&self) -> [u8; 32] {
        match &self.content {
            Ok(content) => Sha256::digest(content).into(),
            Err(error) => Sha256::digest(format!("unreadable: {error}")).into(),
        }
    }
}

/// Reads all files; `now_ms` is the time at which the server certificate must be valid.
///
/// # Errors
/// All problems, each with the key that names the file.
pub fn load(config: &Config, now_ms: i64) -> Result<Loaded, Vec<Problem>> {
    let problems = Problems::default();
    let policy = rules(&Source::read(&config.rules))
        .map_err(|found| found.into_iter().for_each(|problem| problems.push(problem)))
        .ok();
    let certificates = certificates(&TlsSources::read(&config.tls), now_ms, &problems);
    if let Auth::Cert {
        certificate, key, ..
    } = &config.vault.auth
    {
        // Only to report problems early: both files are read again at every login.
        pair(
            ["vault.auth.certificate", "vault.auth.key"],
            &Source::read(certificate),
            &Source::read(key),
            &problems,
        );
    }
    let vault_roots = roots("vault.roots", &config.vault_roots, &problems);
    let egress_roots = roots("egress.roots", &config.egress_roots, &problems);
    let warnings = problems.take_warnings();
    problems.into_result()?;
    // `None` implies a problem, which was returned above.
    let loaded = || {
        Some(Loaded {
            policy: policy?,
            certificates: certificates?,
            vault_roots: vault_roots?,
            egress_roots: egress_roots?,
            warnings,
        })
    };
    loaded().ok_or_else(Vec::new)
}

/// Reads the certificates of the listeners for bots and admins.
pub(crate) fn certificates(
    sources: &TlsSources,
    now_ms: i64,
    problems: &Problems,
) -> Option<Certificates> {
    let names = ["tls.certificate", "tls.key"];
    let (chain, key) = pair(names, &sources.certificate, &sources.key, problems);
    let checked = chain
        .as_deref()
        .map(|chain| check_server_certificate(chain, now_ms));
    let not_after_ms = match checked {
        Some(Ok(not_after_ms)) => Some(not_after_ms),
        Some(Err(problem)) => {
            problems.add("tls.certificate", problem);
            None
        }
        None => None,
    };
    let cas = |key, source| root_file(key, source, Peers::Clients, problems).map(Arc::new);
    let client_ca = cas("tls.client_ca", &sources.client_ca);
    let admin_ca = match &sources.admin_ca {
        Some(admin_ca) => cas("tls.admin_ca", admin_ca),
        None => client_ca.clone(),
    };
    Some(Certificates {
        chain: chain?,
        key: key?,
        not_after_ms: not_after_ms?,
        client_ca: client_ca?,
        admin_ca: admin_ca?,
    })
}

/// Reads a certificate chain and its private key; `chain_name` and `key_name` are their settings.
pub(crate) fn pair(
    [chain_name, key_name]: [&str; 2],
    chain: &Source,
    key: &Source,
    problems: &Problems,
) -> (
    Option<Vec<CertificateDer<'static>>>,
    Option<PrivateKeyDer<'static>>,
) {
    let certificates = pem_certificates(chain_name, chain, problems);
    let der = key
        .pem(pem::private_key)
        .map_err(|error| problems.add(key_name, key.expected("a PEM private key", &error)))
        .ok();
    if let (Some(certificates), Some(der)) = (&certificates, &der) {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let pair = CertifiedKey::from_der(certificates.clone(), der.clone_key(), &provider);
        if let Err(error) = pair {
            let file = key.file.display();
            problems.add(
                key_name,
                format_args!("{file} is not the key of {chain_name}: {error}"),
            );
        }
    }
    (certificates, der)
}

/// Reads the rules of a broker, which must have at least one account.
///
/// # Errors
/// All problems, each with file and line.
pub(crate) fn rules(source: &Source) -> Result<Policy, Vec<Problem>> {
    let policy = rules_or_empty(source)?;
    if policy.accounts().next().is_none() {
        // A write that failed on a full disk can leave an empty file.
        let file = source.file.display();
        let problem = format!("{file} has no account; expected at least one [account.NAME]");
        return Err(vec![Problem::new("rules", problem)]);
    }
    Ok(policy)
}

/// Reads rules that may be empty, to compare or list them.
///
/// # Errors
/// All problems, each with file and line.
pub(crate) fn rules_or_empty(source: &Source) -> Result<Policy, Vec<Problem>> {
    let unreadable = |error: &dyn std::fmt::Display| {
        let problem = format!("{} cannot be read: {error}", source.file.display());
        vec![Problem::new("rules", problem)]
    };
    let text = source
        .content
        .as_deref()
        .map_err(|error| unreadable(error))?;
    let text = encoding::text(text).map_err(|error| unreadable(&error))?;
    Policy::parse(text).map_err(|problems| {
        let in_file = |problem: Problem| problem.in_file(&source.file);
        problems.into_iter().map(in_file).collect()
    })
}

fn pem_certificates(
    key: &str,
    source: &Source,
    problems: &Problems,
) -> Option<Vec<CertificateDer<'static>>> {
    source
        .pem(pem::certificates)
        .map_err(|error| problems.add(key, source.expected("PEM certificates", &error)))
        .ok()
}

/// When the certificate expires (Unix time in milliseconds), or why every client would reject it.
fn check_server_certificate(chain: &[CertificateDer<'_>], now_ms: i64) -> Result<i64, String> {
    let not_x509 = || "is not an X.509 certificate".to_owned();
    let first = chain.first().ok_or_else(not_x509)?;
    let (_, certificate) = X509Certificate::from_der(first).map_err(|_| not_x509())?;
    let usage = certificate.extended_key_usage().ok().flatten();
    if usage.is_some_and(|usage| !usage.value.server_auth && !usage.value.any) {
        return Err(
            "is not a server certificate: its extended key usage lacks serverAuth".to_owned(),
        );
    }
    let names = certificate.subject_alternative_name().ok().flatten();
    let is_name = |name: &GeneralName<'_>| {
        matches!(name, GeneralName::DNSName(_) | GeneralName::IPAddress(_))
    };
    if names.is_none_or(|names| !names.value.general_names.iter().any(is_name)) {
        return Err(
            "has no DNS name or IP address as subject alternative name; issue a certificate that names this host"
                .to_owned(),
        );
    }
    let validity = certificate.validity();
    if validity.not_after.timestamp() < now_ms / 1000 {
        return Err(format!(
            "expired on {}; replace it with a valid one",
            validity.not_after
        ));
    }
    if validity.not_before.timestamp() > now_ms / 1000 {
        return Err(format!(
            "is not valid before {}; check the clock of this machine",
            validity.not_before
        ));
    }
    Ok(validity.not_after.timestamp().saturating_mul(1000))
}

/// Reads the CAs that a setting names for servers.
pub(crate) fn roots(key: &str, roots: &Roots, problems: &Problems) -> Option<RootCertStore> {
    match roots {
        Roots::File(file) => root_file(key, &Source::read(file), Peers::Servers, problems),
        Roots::Mozilla => Some(webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect()),
    }
}

/// Reads the CAs in a PEM file. Every certificate must be a CA, because everything that it signs is trusted. Files for
/// servers often hold the server's complete chain: there, certificates that are not CAs are ignored with a warning.
pub(crate) fn root_file(
    key: &str,
    source: &Source,
    peers: Peers,
    problems: &Problems,
) -> Option<RootCertStore> {
    let file = source.file.display();
    let certificates = source
        .pem(pem::ca_certificates)
        .map_err(|error| problems.add(key, source.expected("PEM certificates", &error)))
        .ok()?;
    let mut store = Some(RootCertStore::empty());
    let mut ignored = Vec::new();
    for (line, certificate) in certificates {
        let problem = match check_anchor(&certificate, peers) {
            Ok(warning) => {
                if let Some(warning) = warning {
                    problems.warn(key, format_args!("{file}:{line}: {warning}"));
                }
                let added = store.as_mut().map(|store| store.add(certificate));
                let unusable = |error| format!("is not a usable CA certificate: {error}");
                added.and_then(Result::err).map(unusable)
            }
            Err(error @ AnchorError::NotCa(_)) if peers == Peers::Servers => {
                ignored.push((line, error));
                None
            }
            Err(error) => Some(error.to_string()),
        };
        if let Some(problem) = problem {
            problems.add(key, format_args!("{file}:{line}: {problem}"));
            store = None;
        }
    }
    let store = store.filter(|store| !store.is_empty());
    for (line, error) in ignored {
        if store.is_some() {
            problems.warn(key, format_args!("{file}:{line}: ignored: {error}"));
        } else {
            problems.add(key, format_args!("{file}:{line}: {error}"));
        }
    }
    store
}
