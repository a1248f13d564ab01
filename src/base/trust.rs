//! Checks which certificates a file of CAs may hold, and explains why a chain was refused.
//!
//! The TLS library accepts any certificate as a root, without checking that it is a CA. If a bot's certificate were in the
//! file, the owner of its key could sign other bots and admins.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, SignatureVerificationAlgorithm, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore,
    SignatureScheme,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Whether a file of CAs is for certificates of clients or servers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Peers {
    /// Bots and admins, which connect to the broker.
    Clients,
    /// Vault, the exchange or the broker, to which this program connects. The server's own certificate is allowed instead of
    /// a CA if it is self-signed.
    Servers,
}

/// Why a certificate does not belong in a file of CAs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnchorError {
    /// It does not parse.
    #[error("is not an X.509 certificate")]
    NotX509,
    /// Its basicConstraints lack CA:TRUE.
    #[error("{0} is not a CA: expected basicConstraints with CA:TRUE; remove it from the file")]
    NotCa(String),
    /// It has a keyUsage extension without keyCertSign.
    #[error(
        "{0} may not sign certificates: expected a keyUsage with keyCertSign, or no keyUsage; remove it from the file"
    )]
    NotForSigning(String),
}

/// Checks that a certificate is a CA. Returns a warning if it has name constraints for which the TLS library refuses
/// certificates from this CA.
///
/// # Errors
/// If it is not a CA. Source: RFC 5280, 4.2.1.3 and 4.2.1.9.
pub(crate) fn check_anchor(
    certificate: &CertificateDer<'_>,
    peers: Peers,
) -> Result<Option<String>, AnchorError> {
    let (_, certificate) =
        X509Certificate::from_der(certificate).map_err(|_| AnchorError::NotX509)?;
    let constraints = certificate
        .basic_constraints()
        .map_err(|_| AnchorError::NotX509)?;
    let usage = certificate.key_usage().map_err(|_| AnchorError::NotX509)?;
    let is_ca = constraints.is_some_and(|constraints| constraints.value.ca);
    if !is_ca {
        return if peers == Peers::Servers && is_self_signed(&certificate) {
            Ok(None)
        } else {
            Err(AnchorError::NotCa(subject(&certificate)))
        };
    }
    if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err(AnchorError::NotForSigning(subject(&certificate)));
    }
    let constraints = certificate
        .name_constraints()
        .map_err(|_| AnchorError::NotX509)?;
    let Some(constraints) = constraints.map(|constraints| constraints.value) else {
        return Ok(None);
    };
    let subtrees = [
        &constraints.permitted_subtrees,
        &constraints.excluded_subtrees,
    ];
    let mut unknown: Vec<_> = subtrees
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|subtree| match subtree.base {
            GeneralName::DNSName(_) | GeneralName::IPAddress(_) => None,
            // Affects every certificate, because each has a subject.
            GeneralName::DirectoryName(_) => {
                Some("directory names (every certificate from this CA is refused)")
            }
            GeneralName::URI(_) => {
                Some("URI names (certificates from this CA with a URI name are refused)")
            }
            _ => Some(
                "another kind of name (certificates from this CA with such a name are refused)",
            ),
        })
        .collect();
    unknown.sort_unstable();
    unknown.dedup();
    let subject = subject(&certificate);
    Ok((!unknown.is_empty()).then(|| {
        format!(
            "{subject} has name constraints that the TLS library cannot check: {}; issue a CA without them",
            unknown.join("; ")
        )
    }))
}

/// Whether it is signed with its own key. Equal issuer and subject names do not prove that: a CA can issue a certificate
/// with its own name as the subject.
fn is_self_signed(certificate: &X509Certificate<'_>) -> bool {
    let key = &certificate.public_key().subject_public_key.data;
    let signed = certificate.tbs_certificate.as_ref();
    let signature = &certificate.signature_value.data;
    let algorithms =
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
    let is_its_own = |algorithm: &&dyn SignatureVerificationAlgorithm| {
        algorithm.verify_signature(key, signed, signature).is_ok()
    };
    certificate.issuer().as_raw() == certificate.subject().as_raw()
        && algorithms.all.iter().any(is_its_own)
}

/// The subject, escaped and cut because it is text from outside.
fn subject(certificate: &X509Certificate<'_>) -> String {
    let subject: String = certificate
        .subject()
        .to_string()
        .chars()
        .take(200)
        .collect();
    format!("{subject:?}")
}

/// A server presents a CA certificate as its own; `openssl req -x509` creates such certificates by default.
#[derive(Debug, thiserror::Error)]
#[error(
    "the server presents a CA certificate as its server certificate; use one that this CA has issued, or a self-signed one with \
     CA:FALSE"
)]
pub(crate) struct PresentsCa;

/// Whether a handshake failed because the server presents a CA certificate as its own.
pub(crate) fn presents_ca(error: &rustls::Error) -> bool {
    matches!(error, rustls::Error::Other(OtherError(inner)) if inner.is::<PresentsCa>())
}

/// The same for an error that other libraries have wrapped.
pub(crate) fn is_caused_by_presented_ca(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|error| {
        let tls = error.downcast_ref().and_then(tls_error);
        tls.is_some_and(presents_ca)
    })
}

/// The TLS error inside an I/O error. Libraries wrap one I/O error in another, and `source` skips the inner one.
fn tls_error(error: &std::io::Error) -> Option<&rustls::Error> {
    let inner = error.get_ref()?;
    let deeper = || tls_error(inner.downcast_ref()?);
    inner.downcast_ref().or_else(deeper)
}

/// Why the certificate chain of a client was refused.
pub(crate) fn reason(error: &rustls::Error) -> String {
    match webpki_error(error) {
        Some(webpki::Error::NameConstraintViolation) => {
            "a name constraint of the certificate's CA forbids the certificate's names, or is of a type that the TLS \
             library cannot check (URI, directory name)"
                .to_owned()
        }
        Some(webpki::Error::CaUsedAsEndEntity) => {
            "the certificate is a CA certificate; use one that this CA has issued".to_owned()
        }
        _ => error.to_string(),
    }
}

fn webpki_error(error: &rustls::Error) -> Option<&webpki::Error> {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => {
            inner.downcast_ref()
        }
        _ => None,
    }
}

/// Appended to the reason if [`signing_intermediates`] has removed a certificate from the refused chain.
pub(crate) const IGNORED_INTERMEDIATE: &str =
    "; ignored an intermediate certificate whose keyUsage lacks keyCertSign";

/// The intermediate certificates of a peer whose keyUsage allows signing certificates. The TLS library checks only CA:TRUE.
/// Source: RFC 5280, 4.2.1.3.
pub(crate) fn signing_intermediates<'c>(
    intermediates: &[CertificateDer<'c>],
) -> Vec<CertificateDer<'c>> {
    let may_sign = |certificate: &&CertificateDer<'_>| {
        X509Certificate::from_der(certificate).is_ok_and(|(_, certificate)| {
            let usage = certificate.key_usage();
            usage.is_ok_and(|usage| usage.is_none_or(|usage| usage.value.key_cert_sign()))
        })
    };
    intermediates.iter().filter(may_sign).cloned().collect()
}

/// Makes a TLS client accept only servers with a certificate from these roots.
pub(crate) fn with_roots(
    builder: rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>,
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    let roots = Arc::new(roots);
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(provider));
    match verifier.build() {
        Ok(verifier) => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ServerVerifier(verifier))),
        // Fails only if `roots` is empty; then no server is trusted.
        Err(_) => builder.with_root_certificates(roots),
    }
}

/// Verifies servers like rustls, but ignores intermediates that may not sign certificates, and names [`PresentsCa`].
#[derive(Debug)]
struct ServerVerifier(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let intermediates = signing_intermediates(intermediates);
        let verified =
            self.0
                .verify_server_cert(end_entity, &intermediates, server_name, ocsp_response, now);
        verified.map_err(|error| match webpki_error(&error) {
            Some(webpki::Error::CaUsedAsEndEntity) => OtherError(Arc::new(PresentsCa)).into(),
            _ => error,
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use credbroker_sim::pki::{Ca, CaKind};
    use rustls::pki_types::pem::PemObject;

    use super::*;

    fn der(pem: &str) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
    }

    #[test]
    fn server_intermediate_that_may_not_sign_is_ignored() {
        let root = Ca::new("root").unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(der(root.certificate_pem())).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider);
        let verifier = ServerVerifier(inner.build().unwrap());
        let now = UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000));
        let verify_below = |kind| {
            let between = root.intermediate("between", kind).unwrap();
            let (leaf, between) = (
                der(&between.server().unwrap().certificate_pem),
                der(between.certificate_pem()),
            );
            let name = ServerName::try_from("localhost").unwrap();
            verifier.verify_server_cert(&leaf, &[between], &name, &[], now)
        };
        verify_below(CaKind::Usual).unwrap();
        verify_below(CaKind::NoKeyUsage).unwrap();
        let refused = verify_below(CaKind::NotForSigning).unwrap_err();
        assert_eq!(
            refused,
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)
        );
    }

    /// `openssl req -x509 -addext "nameConstraints=critical,permitted;URI:example.org" -addext keyUsage=critical,keyCertSign`
    const BOUND_BY_URI: &str = "\
-----BEGIN CERTIFICATE-----\n\
MIIBtTCCAVygAwIBAgIUAr8QfVxhIu4YK/nfHdq3rgh6uQ4wCgYIKoZIzj0EAwIw\n\
FzEVMBMGA1UEAwwMYm91bmQgYnkgVVJJMCAXDTI2MTEyOTIzNDExMloYDzIxMjYx\n\
MTA1MjM0MTEyWjAXMRUwEwYDVQQDDAxib3VuZCBieSBVUkkwWTATBgcqhkjOPQIB\n\
BggqhkjOPQMBBwNCAAR7a7l8n1sq8EsLwUtVS15UQbnGCJnCD3akg2isJBuWQ5t9\n\
1zEymK2Mwtyec+/zq5kkaQuT47LOv4/MQZa/o499o4GDMIGAMB0GA1UdDgQWBBTu\n\
w5A4uMSdHKfl7H7NSyfK7i2pCDAfBgNVHSMEGDAWgBTuw5A4uMSdHKfl7H7NSyfK\n\
7i2pCDAPBgNVHRMBAf8EBTADAQH/MB0GA1UdHgEB/wQTMBGgDzANhgtleGFtcGxl\n\
Lm9yZzAOBgNVHQ8BAf8EBAMCAgQwCgYIKoZIzj0EAwIDRwAwRAIgRAyXC1AkRW7+\n\
0/Ln9Oiin65GmlgH/NY3VA+cmk9XmcgCIF3Qps2ZT0wjZp24nG6+yWov9MPJttp/\n\
HoExmUFH1Avg\n\
-----END CERTIFICATE-----\n\
";

    #[test]
    fn uri_name_constraint_gives_a_warning() {
        let ca = CertificateDer::from_pem_slice(BOUND_BY_URI.as_bytes()).unwrap();
        for peers in [Peers::Clients, Peers::Servers] {
            let warning = check_anchor(&ca, peers).unwrap().unwrap();
            assert_eq!(
                warning,
                "\"CN=bound by URI\" has name constraints that the TLS library cannot check: URI names (certificates from this CA \
                 with a URI name are refused); issue a CA without them"
            );
        }
    }
}
