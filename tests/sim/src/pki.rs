//! Throw-away certificates for tests and the demo: one CA, one server, any number of bots and admins.

use std::ops::Range;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, NameConstraints, date_time_ymd,
};

pub use rcgen::SanType;

/// A certificate authority that exists only in memory.
#[derive(Debug)]
pub struct Ca {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its private key, both PEM.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate chain (one certificate).
    pub certificate_pem: String,
    /// The private key, PKCS #8.
    pub key_pem: String,
}

/// The extended key usage of a certificate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Usage {
    /// TLS client (a bot or an admin).
    Client,
    /// No extended key usage at all.
    None,
    /// TLS server.
    Server,
}

/// Kinds of CA certificates.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CaKind {
    /// Has a name constraint that permits only subjects below `O=demo`.
    BoundToDirectory,
    /// Has a name constraint that permits only DNS names below `demo.test`.
    BoundToDns,
    /// Has no keyUsage extension, like certificates of `openssl req -x509`.
    NoKeyUsage,
    /// CA:FALSE.
    NotCa,
    /// Has a keyUsage extension without keyCertSign.
    NotForSigning,
    /// CA:TRUE and keyCertSign.
    Usual,
}

impl Ca {
    /// Makes a CA with a new key.
    ///
    /// # Errors
    /// If the system provides no randomness.
    pub fn new(common_name: &str) -> Result<Self, rcgen::Error> {
        Self::of_kind(common_name, CaKind::Usual)
    }

    /// The same, of the given kind.
    pub fn of_kind(common_name: &str, kind: CaKind) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate()?;
        let params = Self::ca_params(common_name, kind);
        let certificate_pem = params.self_signed(&key)?.pem();
        Ok(Self {
            certificate_pem,
            issuer: Issuer::new(params, key),
        })
    }

    /// The parameters of a CA certificate.
    fn ca_params(common_name: &str, kind: CaKind) -> CertificateParams {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, common_name);
        params.is_ca = match kind {
            CaKind::NotCa => IsCa::ExplicitNoCa,
            _ => IsCa::Ca(BasicConstraints::Unconstrained),
        };
        params.key_usages = match kind {
            CaKind::NoKeyUsage => Vec::new(),
            CaKind::NotCa | CaKind::NotForSigning => vec![KeyUsagePurpose::DigitalSignature],
            _ => vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign],
        };
        let permitted = match kind {
            CaKind::BoundToDirectory => {
                let mut name = rcgen::DistinguishedName::new();
                name.push(rcgen::DnType::OrganizationName, "demo");
                Some(GeneralSubtree::DirectoryName(name))
            }
            CaKind::BoundToDns => Some(GeneralSubtree::DnsName("demo.test".to_owned())),
            _ => None,
        };
        params.name_constraints = permitted.map(|permitted| NameConstraints {
            permitted_subtrees: vec![permitted],
            excluded_subtrees: Vec::new(),
        });
        params
    }

    /// An intermediate CA of this kind, issued by this CA.
    pub fn intermediate(&self, common_name: &str, kind: CaKind) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate()?;
        let params = Self::ca_params(common_name, kind);
        let certificate_pem = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Self {
            certificate_pem,
            issuer: Issuer::new(params, key),
        })
    }

    /// A bot certificate used as a CA: its key signs other certificates.
    pub fn signing_bot(&self, name: &str) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate()?;
        let params = Self::params(name, &bot_names(name)?, Usage::Client);
        let certificate_pem = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Self {
            certificate_pem,
            issuer: Issuer::new(params, key),
        })
    }

    /// A self-signed server certificate for `localhost`, with CA:TRUE or CA:FALSE.
    pub fn self_signed_server(is_ca: bool) -> Result<Identity, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "localhost");
        params.subject_alt_names = server_names()?.to_vec();
        params.is_ca = if is_ca {
            IsCa::Ca(BasicConstraints::Unconstrained)
        } else {
            IsCa::ExplicitNoCa
        };
        Ok(Identity {
            certificate_pem: params.self_signed(&key)?.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// The CA's own certificate.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// A server certificate for `localhost`, 127.0.0.1 and `::1`.
    pub fn server(&self) -> Result<Identity, rcgen::Error> {
        self.issue("credbroker", &server_names()?, Usage::Server)
    }

    /// The same, valid only in this range of Unix seconds.
    pub fn server_within(&self, seconds: Range<u64>) -> Result<Identity, rcgen::Error> {
        let names = server_names()?;
        self.sign("credbroker", &names, Usage::Server, Some(&seconds))
    }

    /// A bot's certificate with one URI SAN, `spiffe://demo.test/bot/<name>`.
    pub fn bot(&self, name: &str) -> Result<Identity, rcgen::Error> {
        self.issue(name, &bot_names(name)?, Usage::Client)
    }

    /// The same, valid only in this range of Unix seconds.
    pub fn bot_within(&self, name: &str, seconds: Range<u64>) -> Result<Identity, rcgen::Error> {
        self.sign(name, &bot_names(name)?, Usage::Client, Some(&seconds))
    }

    /// An admin's certificate with one URI SAN, `spiffe://demo.test/admin/<name>`.
    pub fn admin(&self, name: &str) -> Result<Identity, rcgen::Error> {
        self.issue(name, &admin_names(name)?, Usage::Client)
    }

    /// The same, valid only in this range of Unix seconds.
    pub fn admin_within(&self, name: &str, seconds: Range<u64>) -> Result<Identity, rcgen::Error> {
        self.sign(name, &admin_names(name)?, Usage::Client, Some(&seconds))
    }

    /// A certificate with exactly these subject alternative names.
    pub fn issue(
        &self,
        common_name: &str,
        names: &[SanType],
        usage: Usage,
    ) -> Result<Identity, rcgen::Error> {
        self.sign(common_name, names, usage, None)
    }

    /// Signs a certificate; without `seconds` it is valid at any time.
    fn sign(
        &self,
        common_name: &str,
        names: &[SanType],
        usage: Usage,
        seconds: Option<&Range<u64>>,
    ) -> Result<Identity, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = Self::params(common_name, names, usage);
        if let Some(Range { start, end }) = seconds {
            let epoch = date_time_ymd(1970, 1, 1);
            params.not_before = epoch + Duration::from_secs(*start);
            params.not_after = epoch + Duration::from_secs(*end);
        }
        let certificate_pem = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Identity {
            certificate_pem,
            key_pem: key.serialize_pem(),
        })
    }

    /// The parameters of a certificate of this CA.
    fn params(common_name: &str, names: &[SanType], usage: Usage) -> CertificateParams {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, common_name);
        params.subject_alt_names = names.to_vec();
        // Adds a subject key identifier, as most CAs do; Vault returns it at a certificate login.
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match usage {
            Usage::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
            Usage::None => Vec::new(),
            Usage::Server => vec![ExtendedKeyUsagePurpose::ServerAuth],
        };
        params
    }
}

fn server_names() -> Result<[SanType; 3], rcgen::Error> {
    Ok([
        SanType::DnsName("localhost".try_into()?),
        SanType::IpAddress([127, 0, 0, 1].into()),
        SanType::IpAddress(std::net::Ipv6Addr::LOCALHOST.into()),
    ])
}

fn bot_names(name: &str) -> Result<[SanType; 1], rcgen::Error> {
    let uri = format!("spiffe://demo.test/bot/{name}");
    Ok([SanType::URI(uri.as_str().try_into()?)])
}

fn admin_names(name: &str) -> Result<[SanType; 1], rcgen::Error> {
    let uri = format!("spiffe://demo.test/admin/{name}");
    Ok([SanType::URI(uri.as_str().try_into()?)])
}
