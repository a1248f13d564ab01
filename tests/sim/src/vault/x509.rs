//! Certificates: their fields, and verification of their chains.

use std::sync::Arc;

use aws_lc_rs::digest;
use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

use super::certs::CaError;
use super::ids::hex;

/// The fields of a certificate that roles check and that a login returns.
pub(super) struct Described {
    pub(super) authority_key_id: String,
    pub(super) common_name: String,
    pub(super) dns: Vec<String>,
    pub(super) serial_number: String,
    pub(super) subject_key_id: String,
    pub(super) uris: Vec<String>,
}

/// A verifier for chains that end in one of these CAs.
pub(super) fn chains_to(pem: &str) -> Result<Arc<dyn ClientCertVerifier>, CaError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let certificate = certificate.map_err(|_| CaError::Unreadable)?;
        let parsed = X509Certificate::from_der(&certificate);
        let (_, parsed) = parsed.map_err(|_| CaError::Unreadable)?;
        if !parsed.is_ca() {
            return Err(CaError::NotCa);
        }
        roots.add(certificate).map_err(|_| CaError::Unreadable)?;
    }
    let provider = Arc::new(default_provider());
    // This fails if the store is empty.
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|_| CaError::Unreadable)
}

/// The fields of a certificate; `None` if it cannot be parsed.
pub(super) fn describe(certificate: &CertificateDer<'_>) -> Option<Described> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let common_name = certificate.subject().iter_common_name().last();
    let mut described = Described {
        authority_key_id: String::new(),
        common_name: common_name
            .and_then(|name| name.as_str().ok())
            .unwrap_or_default()
            .to_owned(),
        dns: Vec::new(),
        serial_number: certificate.serial.to_string(),
        subject_key_id: String::new(),
        uris: Vec::new(),
    };
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(authority) => {
                let id = authority.key_identifier.as_ref();
                described.authority_key_id = id.map(|id| colons(id.0)).unwrap_or_default();
            }
            ParsedExtension::SubjectAlternativeName(names) => {
                for name in &names.general_names {
                    match name {
                        GeneralName::DNSName(name) => described.dns.push((*name).to_owned()),
                        GeneralName::URI(uri) => described.uris.push((*uri).to_owned()),
                        _ => {}
                    }
                }
            }
            ParsedExtension::SubjectKeyIdentifier(id) => described.subject_key_id = colons(id.0),
            _ => {}
        }
    }
    Some(described)
}

/// Lower-case hexadecimal with a colon between bytes.
fn colons(bytes: &[u8]) -> String {
    let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

/// SHA-256, hexadecimal.
pub(super) fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    hex(digest::digest(&digest::SHA256, certificate).as_ref())
}
