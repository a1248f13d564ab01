//! Certificate logins: roles, each with the CAs it trusts and the names it accepts.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::CertificateError;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use serde_json::json;

use super::answer::{Answer, Logical, Outcome, Refusal};
use super::clock::since_epoch;
use super::ids::Ids;
use super::request::{Operation, Request};
use super::roles::{TokenSettings, matches};
use super::tokens::{CertificateLogin, Tokens, extend};
use super::x509::{Described, chains_to, describe, fingerprint};

/// Conditions of a role that are not simulated.
const NOT_SIMULATED: [&str; 6] = [
    "allowed_email_sans",
    "allowed_metadata_extensions",
    "allowed_names",
    "allowed_organizational_units",
    "ocsp_enabled",
    "required_extensions",
];

/// Which certificates can log in to a role. `*` in a name matches any text. A certificate must match one entry of each list
/// that is not empty.
#[derive(Clone, Debug, Default)]
pub struct CertRole {
    /// Common names.
    pub allowed_common_names: Vec<String>,
    /// DNS names among the subject alternative names.
    pub allowed_dns_sans: Vec<String>,
    /// URIs among the subject alternative names.
    pub allowed_uri_sans: Vec<String>,
    /// The trusted CAs, PEM.
    pub certificate_pem: String,
    /// The tokens that a login gets.
    pub tokens: TokenSettings,
}

/// Why the CAs of a role are invalid.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CaError {
    /// A certificate is not a CA. A real server would trust exactly that certificate; this is not simulated.
    NotCa,
    /// There is no certificate, or one cannot be parsed.
    Unreadable,
}

impl fmt::Display for CaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotCa => "simulator: only CA certificates can be trusted",
            Self::Unreadable => "failed to parse certificate",
        })
    }
}

impl std::error::Error for CaError {}

/// One mount.
pub(super) struct Certs {
    mount: String,
    roles: BTreeMap<String, Role>,
}

struct Role {
    chains: Arc<dyn ClientCertVerifier>,
    entity_id: String,
    settings: CertRole,
}

impl Certs {
    pub(super) fn new(mount: &str) -> Self {
        Self {
            mount: mount.to_owned(),
            roles: BTreeMap::new(),
        }
    }

    /// Creates or replaces a role.
    pub(super) fn set_role(
        &mut self,
        name: &str,
        settings: CertRole,
        ids: &mut Ids,
    ) -> Result<(), CaError> {
        let chains = chains_to(&settings.certificate_pem)?;
        let old = self.roles.remove(name);
        let role = Role {
            chains,
            entity_id: old.map_or_else(|| ids.uuid(), |old| old.entity_id),
            settings,
        };
        self.roles.insert(name.to_owned(), role);
        Ok(())
    }

    pub(super) fn login(&self, request: &Request, tokens: &mut Tokens, ids: &mut Ids) -> Outcome {
        let wanted = request.body.text("name").filter(|name| !name.is_empty());
        let (name, role, certificate) = self.verified(wanted, request)?;
        role.settings.tokens.admit(request.peer)?;
        let described = describe(certificate).ok_or_else(unknown)?;
        let mut grant = role.settings.tokens.grant();
        grant.certificate = Some(certificate.clone());
        grant.display_name = format!("{}-{name}", self.mount);
        grant.entity_id.clone_from(&role.entity_id);
        grant.path.clone_from(&request.path);
        grant.metadata = json!({
            "authority_key_id": described.authority_key_id,
            "cert_name": name,
            "common_name": described.common_name,
            "serial_number": described.serial_number,
            "subject_key_id": described.subject_key_id,
        });
        let id = ids.token();
        Ok(tokens.issue(id, grant, request.now, ids).into())
    }

    /// Checks that the certificate can still log in to the token's role and is the same as at the login.
    pub(super) fn check_renewal(
        &self,
        login: &CertificateLogin<'_>,
        request: &Request,
    ) -> Result<(), Refusal> {
        let (_, _, certificate) = self.verified(Some(login.role), request)?;
        if certificate == login.certificate {
            return Ok(());
        }
        // How the server identifies the two is not known; fingerprints distinguish them.
        let problem = format!(
            "failed to renew entry: client identity during renewal not matching client identity used during login:\
             \n\toriginal: {}\n\trenewal: {}",
            fingerprint(login.certificate),
            fingerprint(certificate),
        );
        Err(Refusal::routed(500, &problem))
    }

    /// The named role, or the first one, that accepts the client's certificate, and that certificate.
    fn verified<'a>(
        &self,
        wanted: Option<&str>,
        request: &'a Request,
    ) -> Result<(&str, &Role, &'a CertificateDer<'static>), Refusal> {
        let (certificate, intermediates) = request
            .certificates
            .split_first()
            .ok_or_else(|| Refusal::bad_request("no client certificate found"))?;
        let mut trusted = Vec::new();
        let mut rejected = None;
        for (name, role) in &self.roles {
            if wanted.is_some_and(|wanted| wanted != name) {
                continue;
            }
            match role.trust(certificate, intermediates, request.now) {
                Ok(()) => trusted.push((name.as_str(), role)),
                // BadSignature: another CA of the same name, which the server does not trust either.
                Err(rustls::Error::InvalidCertificate(
                    CertificateError::UnknownIssuer | CertificateError::BadSignature,
                )) => {}
                Err(error) => rejected = Some(error),
            }
        }
        match rejected {
            Some(error) if trusted.is_empty() => {
                let problem = format!("failed to verify client's certificate: {error}");
                return Err(Refusal::routed(500, &problem));
            }
            None if trusted.is_empty() => return Err(unknown()),
            _ => {}
        }
        let described = describe(certificate).ok_or_else(unknown)?;
        let (name, role) = trusted
            .into_iter()
            .find(|(_, role)| role.settings.allow(&described))
            .ok_or_else(|| {
                Refusal::bad_request(
                    "no chain matching all constraints could be found for this login certificate",
                )
            })?;
        Ok((name, role, certificate))
    }

    /// Answers requests below the mount other than logins.
    pub(super) fn handle(&mut self, path: &str, request: &Request, ids: &mut Ids) -> Outcome {
        let (area, name) = path.split_once('/').unwrap_or((path, ""));
        match (area, name, request.operation) {
            ("certs", "", Operation::List) if self.roles.is_empty() => Err(Refusal::missing()),
            ("certs", "", Operation::List) => {
                let names: Vec<_> = self.roles.keys().collect();
                Ok(Logical::data(json!({ "keys": names })).into())
            }
            ("certs", _, Operation::Delete) if !name.is_empty() => {
                self.roles.remove(name);
                Ok(Answer::Empty)
            }
            ("certs", _, Operation::Read) if !name.is_empty() => {
                let role = self.roles.get(name).ok_or_else(Refusal::missing)?;
                let settings = &role.settings;
                let data = json!({
                    "allowed_common_names": settings.allowed_common_names,
                    "allowed_dns_sans": settings.allowed_dns_sans,
                    "allowed_uri_sans": settings.allowed_uri_sans,
                    "certificate": settings.certificate_pem,
                    "display_name": name,
                });
                Ok(Logical::data(extend(data, settings.tokens.describe())).into())
            }
            ("certs", _, Operation::Write) if !name.is_empty() => {
                self.write_role(name, request, ids)
            }
            ("certs", _, _) => Err(Refusal::unsupported_operation()),
            _ => Err(Refusal::unsupported_path()),
        }
    }

    fn write_role(&mut self, name: &str, request: &Request, ids: &mut Ids) -> Outcome {
        let body = &request.body;
        if let Some(field) = NOT_SIMULATED.iter().find(|field| body.get(field).is_some()) {
            let problem = format!("simulator: {field} is not simulated");
            return Err(Refusal::bad_request(problem));
        }
        let known = self.roles.get(name).map(|role| &role.settings);
        let tokens = TokenSettings::written(known.map(|known| &known.tokens), body)?;
        let old = known.cloned().unwrap_or_default();
        let settings = CertRole {
            allowed_common_names: body
                .texts("allowed_common_names")
                .unwrap_or(old.allowed_common_names),
            allowed_dns_sans: body
                .texts("allowed_dns_sans")
                .unwrap_or(old.allowed_dns_sans),
            allowed_uri_sans: body
                .texts("allowed_uri_sans")
                .unwrap_or(old.allowed_uri_sans),
            certificate_pem: body
                .text("certificate")
                .map_or(old.certificate_pem, str::to_owned),
            tokens,
        };
        self.set_role(name, settings, ids)
            .map_err(|error| Refusal::bad_request(error.to_string()))?;
        Ok(Answer::Empty)
    }
}

impl Role {
    fn trust(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<(), rustls::Error> {
        let now = UnixTime::since_unix_epoch(since_epoch(now));
        self.chains
            .verify_client_cert(certificate, intermediates, now)
            .map(drop)
    }
}

impl CertRole {
    fn allow(&self, certificate: &Described) -> bool {
        let allow = |allowed: &[String], names: &[String]| {
            allowed.is_empty() || names.iter().any(|name| matches(allowed, name))
        };
        let common_name = std::slice::from_ref(&certificate.common_name);
        allow(&self.allowed_common_names, common_name)
            && allow(&self.allowed_dns_sans, &certificate.dns)
            && allow(&self.allowed_uri_sans, &certificate.uris)
    }
}

fn unknown() -> Refusal {
    Refusal::bad_request("invalid certificate or no client certificate supplied")
}
