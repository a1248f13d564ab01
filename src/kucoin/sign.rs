//! Signs requests: string-to-sign and headers, key versions 2 and 3, partner headers.
//!
//! Source: KuCoin API documentation, "Authentication" and "Broker: Instructions". The only module that uses secrets to sign.

use std::sync::{Arc, Weak};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use http::header::{ACCEPT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use http::uri::{PathAndQuery, Uri};
use http_body_util::Full;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::{Site, UnsignedRequest, broker_query};
use crate::base::secret::{ApiSecret, PartnerKey, Passphrase, with_clean_stack};

const API_KEY: HeaderName = HeaderName::from_static("kc-api-key");
const BROKER_NAME: HeaderName = HeaderName::from_static("kc-broker-name");
const KEY_VERSION: HeaderName = HeaderName::from_static("kc-api-key-version");
const PARTNER: HeaderName = HeaderName::from_static("kc-api-partner");
const PARTNER_SIGN: HeaderName = HeaderName::from_static("kc-api-partner-sign");
const PARTNER_VERIFY: HeaderName = HeaderName::from_static("kc-api-partner-verify");
const PASSPHRASE: HeaderName = HeaderName::from_static("kc-api-passphrase");
const SIGN: HeaderName = HeaderName::from_static("kc-api-sign");
const SITE_TYPE: HeaderName = HeaderName::from_static("x-site-type");
const TIMESTAMP: HeaderName = HeaderName::from_static("kc-api-timestamp");

/// Base64 of an HMAC-SHA256: 32 bytes in 44 characters.
const SIGNATURE_CHARS: usize = 44;

/// Version of an API key, as KuCoin's key management shows it. Version 1 was retired in 2021.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum KeyVersion {
    /// Keys created from 2021 to 2025.
    V2,
    /// Keys created since.
    V3,
}

impl KeyVersion {
    /// The version number, as in the header.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::V2 => "2",
            Self::V3 => "3",
        }
    }
}

/// A KuCoin API key, ready to sign: the HMAC states and the signed passphrase are computed once.
///
/// Not `Clone`, and always behind an `Arc`: moving a value leaves copies on stacks and in futures. Its secrets are wiped on
/// drop.
pub struct Key {
    /// The header value; headers share its memory.
    id: HeaderValue,
    /// Checked at every call: a revoked key must sign nothing.
    id_sha256: [u8; 32],
    version: KeyVersion,
    secret: Hmac<Sha256>,
    /// The signed passphrase, as secret as the passphrase itself: constant for the life of the key, and sufficient for the
    /// header. Headers share its memory.
    passphrase: HeaderValue,
    partner: Option<Hmac<Sha256>>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(redacted)")
    }
}

/// Why values are not a valid key.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum KeyError {
    /// The key id is not a valid header value.
    #[error("`api_key` is empty or not printable ASCII")]
    Id,
    /// The named value is empty.
    #[error("`{0}` is empty")]
    Empty(&'static str),
}

impl Key {
    /// Prepares a key; the secrets passed in are not needed afterwards.
    pub fn new(
        id: Zeroizing<String>,
        secret: &ApiSecret,
        passphrase: &Passphrase,
        version: KeyVersion,
        partner: Option<&PartnerKey>,
    ) -> Result<Arc<Self>, KeyError> {
        if id.is_empty() || !id.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(KeyError::Id);
        }
        if passphrase.expose().is_empty() {
            return Err(KeyError::Empty("passphrase"));
        }
        with_clean_stack(|| {
            let secret = mac(secret.expose(), "api_secret")?;
            let partner = partner
                .map(|key| mac(key.expose(), "partner_key"))
                .transpose()?;
            let signed = signature(&secret, &[passphrase.expose()]);
            let signed = Zeroizing::new(Box::<[u8]>::from(signed.as_slice()));
            Ok(Arc::new(Self {
                id_sha256: Sha256::digest(id.as_bytes()).into(),
                id: header(id)?,
                version,
                secret,
                passphrase: header(signed)?,
                partner,
            }))
        })
    }

    /// Whether it can sign for a partner.
    pub fn has_partner_key(&self) -> bool {
        self.partner.is_some()
    }

    /// The key version that it signs with.
    pub(crate) fn version(&self) -> KeyVersion {
        self.version
    }

    /// SHA-256 of the key id: identifies the key where the id itself must not appear (custom metadata, lists of revoked
    /// keys). Not a secret: key ids are random, so the hash does not reveal them.
    pub(crate) fn id_sha256(&self) -> [u8; 32] {
        self.id_sha256
    }
}

/// A header value that is wiped when its last handle is dropped.
fn header(text: impl AsRef<[u8]> + Send + 'static) -> Result<HeaderValue, KeyError> {
    // Base64, or an id that was checked, so this does not fail.
    let value = HeaderValue::from_maybe_shared(Bytes::from_owner(text));
    let mut value = value.map_err(|_| KeyError::Id)?;
    value.set_sensitive(true);
    Ok(value)
}

fn mac(key: &[u8], name: &'static str) -> Result<Hmac<Sha256>, KeyError> {
    if key.is_empty() {
        return Err(KeyError::Empty(name));
    }
    // HMAC accepts keys of any length, so this does not fail.
    Hmac::new_from_slice(key).map_err(|_| KeyError::Empty(name))
}

/// A partner (broker) registered with KuCoin; its key is part of the account's key in Vault.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Partner {
    /// Partner id, `KC-API-PARTNER`.
    pub id: String,
    /// Broker name, `KC-BROKER-NAME`; sent if set.
    pub broker_name: Option<String>,
}

/// A request that is ready to send. Moved, never copied, so that no signature is sent twice.
pub struct OutboundRequest {
    /// The request on the wire, without the host.
    pub(crate) request: http::Request<Full<Bytes>>,
    /// The signed timestamp, Unix milliseconds; 0 if unsigned.
    pub(crate) timestamp_ms: i64,
    /// The key that signed; `None` if unsigned.
    pub(crate) key: Option<Weak<Key>>,
}

impl OutboundRequest {
    /// Marks it as the broker's own, to distinguish it from requests of bots on both sides.
    pub(crate) fn mark_internal(&mut self) {
        let headers = self.request.headers_mut();
        headers.insert(USER_AGENT, HeaderValue::from_static(broker_query::OWN));
    }

    /// All headers, with the signature: secret for as long as KuCoin accepts the signature.
    pub fn headers(&self) -> &HeaderMap {
        self.request.headers()
    }

    /// Path and query as on the wire.
    pub fn target(&self) -> &str {
        self.request
            .uri()
            .path_and_query()
            .map_or("", PathAndQuery::as_str)
    }

    /// The body as on the wire.
    pub fn body(&self) -> Full<Bytes> {
        self.request.body().clone()
    }
}

/// Without headers, query and body.
impl std::fmt::Debug for OutboundRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (method, path) = (self.request.method(), self.request.uri().path());
        write!(f, "OutboundRequest({method} {path})")
    }
}

/// Why a request cannot be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The rules name a partner, but the key has no partner key.
    #[error(
        "the account has a partner, but its key in Vault has no `partner_key`; nothing was sent"
    )]
    PartnerKeyMissing,
    /// The HTTP library would change the checked target.
    #[error(
        "the HTTP library would send a different path or query than the one checked against the rules; nothing was sent"
    )]
    Rewritten,
    /// The target or a header value is not valid in HTTP.
    #[error("the request cannot be encoded as HTTP; nothing was sent")]
    Unwritable(#[source] http::Error),
}

/// Signs `request` with the time `now_ms` (Unix milliseconds, exchange clock). KuCoin rejects it if that is 5 s or more off.
///
/// String-to-sign: timestamp, method, path and query *not* percent-encoded, body; no separators. Partner signature:
/// timestamp, partner id, key id, with the partner's key.
/// Source: KuCoin API documentation, "Authentication", key versions 2 and 3; "Broker: Instructions".
pub fn sign(
    request: &UnsignedRequest,
    site: Site,
    key: &Arc<Key>,
    partner: Option<&Partner>,
    now_ms: i64,
) -> Result<OutboundRequest, SignError> {
    let timestamp = now_ms.to_string();
    let signed_target = request.target.to_sign();
    let parts = string_to_sign(&timestamp, request, &signed_target);
    let mut signed = unsigned(request, site)?;
    signed.timestamp_ms = now_ms;
    signed.key = Some(Arc::downgrade(key));
    let hidden = |value: &[u8]| -> Result<HeaderValue, SignError> {
        let mut value = HeaderValue::from_bytes(value).map_err(unwritable)?;
        value.set_sensitive(true);
        Ok(value)
    };
    let headers = signed.request.headers_mut();
    headers.insert(API_KEY, key.id.clone());
    headers.insert(SIGN, hidden(&signature(&key.secret, &parts))?);
    headers.insert(TIMESTAMP, hidden(timestamp.as_bytes())?);
    headers.insert(PASSPHRASE, key.passphrase.clone());
    headers.insert(KEY_VERSION, hidden(key.version.as_str().as_bytes())?);
    if let Some(partner) = partner {
        let mac = key.partner.as_ref().ok_or(SignError::PartnerKeyMissing)?;
        let id = partner.id.as_bytes();
        headers.insert(PARTNER, hidden(id)?);
        let signed = signature(mac, &[timestamp.as_bytes(), id, key.id.as_bytes()]);
        headers.insert(PARTNER_SIGN, hidden(&signed)?);
        headers.insert(PARTNER_VERIFY, hidden(b"true")?);
        if let Some(name) = &partner.broker_name {
            headers.insert(BROKER_NAME, hidden(name.as_bytes())?);
        }
    }
    Ok(signed)
}

/// The four parts of the string-to-sign, in the order in which the HMAC gets them.
pub fn string_to_sign<'a>(
    timestamp: &'a str,
    request: &'a UnsignedRequest,
    target: &'a str,
) -> [&'a [u8]; 4] {
    [
        timestamp.as_bytes(),
        request.method.as_str().as_bytes(),
        target.as_bytes(),
        &request.body,
    ]
}

/// Builds the unsigned HTTP request, for public endpoints.
pub fn unsigned(request: &UnsignedRequest, site: Site) -> Result<OutboundRequest, SignError> {
    let wire = request.target.to_wire();
    let target: PathAndQuery = wire.parse().map_err(unwritable)?;
    if target.as_str() != wire {
        return Err(SignError::Rewritten);
    }
    let mut written = http::Request::new(Full::new(request.body.clone()));
    *written.method_mut() = request.method.as_http();
    *written.uri_mut() = Uri::from(target);
    let headers = written.headers_mut();
    // Without this header every encoding is acceptable (RFC 9110, 12.5.3).
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(
        USER_AGENT,
        HeaderValue::from_static(concat!("credbroker/", env!("CARGO_PKG_VERSION"))),
    );
    if site == Site::Au {
        headers.insert(SITE_TYPE, HeaderValue::from_static("australia"));
    }
    Ok(OutboundRequest {
        request: written,
        timestamp_ms: 0,
        key: None,
    })
}

fn unwritable(error: impl Into<http::Error>) -> SignError {
    SignError::Unwritable(error.into())
}

/// Signs `parts` in order; copies of the HMAC state on the stack are wiped.
fn signature(mac: &Hmac<Sha256>, parts: &[&[u8]]) -> [u8; SIGNATURE_CHARS] {
    let mut text = [0; SIGNATURE_CHARS];
    with_clean_stack(|| {
        let mut mac = mac.clone();
        for part in parts {
            mac.update(part);
        }
        let written = BASE64.encode_slice(mac.finalize().into_bytes(), &mut text);
        debug_assert_eq!(written, Ok(SIGNATURE_CHARS));
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compiles only if the type is wiped on drop.
    fn is_wiped<T: zeroize::ZeroizeOnDrop>() {}

    #[test]
    fn secrets_of_a_key_are_wiped_on_drop() {
        // An HMAC consists of two of these.
        is_wiped::<Sha256>();
        is_wiped::<Zeroizing<String>>();
        is_wiped::<Zeroizing<Box<[u8]>>>();
    }

    #[test]
    fn key_is_identified_by_the_sha256_of_its_id() {
        let text = |text: &str| Zeroizing::new(text.to_owned());
        let secret = ApiSecret::new(text("fake-secret"));
        let passphrase = Passphrase::new(text("fake-pass"));
        let id = text("0123456789abcdef01234567");
        let key = Key::new(id, &secret, &passphrase, KeyVersion::V3, None).unwrap();
        let digest = key.id_sha256();
        // Computed with `printf 0123456789abcdef01234567 | openssl dgst -sha256`.
        let expected = "8865fea8edb697169ac2b4f5e6339e16439381033640eeb4f55edbad9bdc2d3d";
        let digits = |n: usize| u8::from_str_radix(&expected[2 * n..2 * n + 2], 16).unwrap();
        assert_eq!(digest, std::array::from_fn(digits));
    }

    #[test]
    fn debug_of_a_key_shows_nothing() {
        let text = |text: &str| Zeroizing::new(text.to_owned());
        let secret = ApiSecret::new(text("fake-secret"));
        let passphrase = Passphrase::new(text("fake-pass"));
        let key = Key::new(text("fake-id"), &secret, &passphrase, KeyVersion::V3, None).unwrap();
        assert_eq!(format!("{key:?}"), "Key(redacted)");
        let newline = Key::new(text("fake\nid"), &secret, &passphrase, KeyVersion::V3, None);
        assert_eq!(newline.unwrap_err(), KeyError::Id);
        let empty = ApiSecret::new(text(""));
        let empty = Key::new(text("fake-id"), &empty, &passphrase, KeyVersion::V3, None);
        assert_eq!(empty.unwrap_err(), KeyError::Empty("api_secret"));
    }
}
