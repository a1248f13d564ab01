//! Maps a client certificate to a bot or admin. Refuses any other certificate, and logs its names and the reason.

use std::fmt::{self, Write};
use std::marker::PhantomData;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::base::ids::{AdminId, BotId, IdError};
use crate::base::trust;
use crate::telemetry::Metrics;

/// Why a certificate that a trusted CA signed is not valid for the role of the listener.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CertificateRefused {
    /// The name is not valid for this role.
    #[error("certificate identity is not valid for this listener: {kind} SAN: {error}")]
    Name {
        /// Which kind of subject alternative name: `DNS` or `URI`.
        kind: &'static str,
        /// What was expected.
        error: IdError,
    },
    /// Too many or too few names.
    #[error(
        "expected exactly one URI SAN, or no URI SAN and exactly one DNS SAN; got {uris} URI and {dns} DNS"
    )]
    Names {
        /// How many URI SANs it has.
        uris: usize,
        /// How many DNS SANs it has.
        dns: usize,
    },
    /// It does not parse.
    #[error("not an X.509 certificate")]
    NotX509,
    /// It was not issued for clients.
    #[error("extended key usage does not include clientAuth")]
    Usage,
}

/// A role of callers. Each kind of subject alternative name is parsed separately: name constraints of a CA apply to one
/// kind each, so a DNS name that looks like a URI would bypass those for URIs.
pub(crate) trait CertificateRole: fmt::Debug + Sized + 'static {
    /// The caller that a DNS SAN names.
    ///
    /// # Errors
    /// When it is not a name of this role.
    fn from_dns_san(name: &str) -> Result<Self, IdError>;

    /// The caller that a URI SAN names.
    ///
    /// # Errors
    /// When it is not a name of this role.
    fn from_uri_san(uri: &str) -> Result<Self, IdError>;
}

impl CertificateRole for AdminId {
    fn from_dns_san(name: &str) -> Result<Self, IdError> {
        let expected = "a URI SAN spiffe://<trust domain>/admin/<name>";
        Err(IdError::new(expected, name))
    }

    fn from_uri_san(uri: &str) -> Result<Self, IdError> {
        uri.parse()
    }
}

impl CertificateRole for BotId {
    fn from_dns_san(name: &str) -> Result<Self, IdError> {
        Self::from_dns_san(name)
    }

    fn from_uri_san(uri: &str) -> Result<Self, IdError> {
        Self::from_uri_san(uri)
    }
}

/// The caller, a [`BotId`] or [`AdminId`], that a certificate names: its one URI SAN, or without one its one DNS SAN. The
/// common name is never used.
pub(crate) fn caller_of<R: CertificateRole>(
    certificate: &CertificateDer<'_>,
) -> Result<R, CertificateRefused> {
    let (_, certificate) =
        X509Certificate::from_der(certificate).map_err(|_| CertificateRefused::NotX509)?;
    let usage = certificate
        .extended_key_usage()
        .map_err(|_| CertificateRefused::NotX509)?;
    if !usage.is_some_and(|usage| usage.value.client_auth) {
        return Err(CertificateRefused::Usage);
    }
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| CertificateRefused::NotX509)?;
    let (mut uris, mut dns) = (Vec::new(), Vec::new());
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            GeneralName::DNSName(name) => dns.push(*name),
            // It could be an invalid URI, so the number of URIs is unknown.
            GeneralName::Invalid(..) => return Err(CertificateRefused::NotX509),
            _ => {}
        }
    }
    match (uris.as_slice(), dns.as_slice()) {
        ([uri], _) => {
            R::from_uri_san(uri).map_err(|error| CertificateRefused::Name { kind: "URI", error })
        }
        ([], [name]) => {
            R::from_dns_san(name).map_err(|error| CertificateRefused::Name { kind: "DNS", error })
        }
        _ => Err(CertificateRefused::Names {
            uris: uris.len(),
            dns: dns.len(),
        }),
    }
}

/// When a certificate expires: Unix time in milliseconds; `None` if it does not parse.
pub(crate) fn not_after_ms(certificate: &CertificateDer<'_>) -> Option<i64> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    certificate
        .validity()
        .not_after
        .timestamp()
        .checked_mul(1000)
}

/// Verifies client certificates: first the chain, without intermediates that must not sign; then that it names one caller
/// of the role `R`.
#[derive(Debug)]
pub(crate) struct CallerVerifier<R> {
    chain: Arc<dyn ClientCertVerifier>,
    metrics: Arc<Metrics>,
    role: PhantomData<fn() -> R>,
}

impl<R> CallerVerifier<R> {
    /// Verifies the chain with `chain`.
    pub(crate) fn new(chain: Arc<dyn ClientCertVerifier>, metrics: Arc<Metrics>) -> Self {
        Self {
            chain,
            metrics,
            role: PhantomData,
        }
    }

    fn refused(&self, certificate: &CertificateDer<'_>, reason: &str) {
        self.metrics.certificates_refused.inc();
        if let Some(suppressed) = self.metrics.allow_log() {
            tracing::warn!(
                names = names(certificate),
                reason,
                suppressed,
                "client certificate refused"
            );
        }
    }
}

impl<R: CertificateRole> ClientCertVerifier for CallerVerifier<R> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let signing = trust::signing_intermediates(intermediates);
        let verified = self.chain.verify_client_cert(end_entity, &signing, now);
        let verified = verified.inspect_err(|error| {
            let mut reason = trust::reason(error);
            if signing.len() < intermediates.len() {
                reason += trust::IGNORED_INTERMEDIATE;
            }
            self.refused(end_entity, &reason);
        })?;
        if let Err(error) = caller_of::<R>(end_entity) {
            self.refused(end_entity, &error.to_string());
            let error = CertificateError::Other(OtherError(Arc::new(error)));
            return Err(rustls::Error::InvalidCertificate(error));
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain
            .verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain
            .verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Subject and alternative names of any certificate, for the log. The client chose them: escaped and truncated.
fn names(certificate: &CertificateDer<'_>) -> String {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return "unreadable certificate".to_owned();
    };
    let mut names = format!("subject {:?}", certificate.subject().to_string());
    if let Ok(Some(alternative)) = certificate.subject_alternative_name() {
        for name in &alternative.value.general_names {
            // Writing to a String does not fail.
            let _ = match name {
                GeneralName::URI(uri) => write!(names, ", URI {uri:?}"),
                GeneralName::DNSName(name) => write!(names, ", DNS {name:?}"),
                _ => Ok(()),
            };
        }
    }
    names.chars().take(500).collect()
}
