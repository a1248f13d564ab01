//! Authentication: KuCoin's checks of a private request, on the bytes as they arrived.
//!
//! No code is shared with the broker: this is an independent implementation of KuCoin's rules.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::IpAddr;

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, header};
use serde::{Deserialize, Serialize};

use super::answers::{Refusal, refuse};
use crate::http::Received;

/// KuCoin rejects timestamps that differ by this or more. Source: error table of the futures documentation.
const TOLERANCE_MS: u64 = 5000;

/// An API key of the simulator. Only for made-up keys: never load a real key here.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SimKey {
    /// Id of the key.
    pub api_key: String,
    /// Its secret.
    pub api_secret: String,
    /// Its passphrase.
    pub passphrase: String,
    /// Key version: 1, 2 or 3.
    #[serde(default = "newest_version")]
    pub version: u8,
    /// Permissions with KuCoin's names (Spot, Margin, Futures, Unified, ...); every key has General.
    #[serde(default = "all_trading")]
    pub permissions: Vec<String>,
    /// Addresses that can use the key; empty: any.
    #[serde(default)]
    pub ip_whitelist: Vec<IpAddr>,
    /// Account of the key; keys of one account share balances, orders and rate limits.
    pub uid: u64,
    /// Name of its sub-account; unset: the key belongs to a master account.
    #[serde(default)]
    pub sub_name: Option<String>,
    /// Master account of the sub-account.
    #[serde(default)]
    pub parent_uid: Option<u64>,
    /// The owner's name for the key.
    #[serde(default = "remark")]
    pub remark: String,
    /// When it was created, milliseconds since 1970.
    #[serde(default = "created_at_ms")]
    pub created_at_ms: i64,
    /// When it expires, milliseconds since 1970: from then on the key does not exist; unset: never.
    #[serde(default)]
    pub expires_at_ms: Option<i64>,
    /// Its site: on other sites the key does not exist.
    #[serde(default)]
    pub site: Site,
    /// Two-letter country code of the account's owner.
    #[serde(default = "region")]
    pub region: String,
    /// Whether the owner has passed KYC; KuCoin returns 1 or 0.
    #[serde(default = "kyc_passed")]
    pub kyc_passed: bool,
    /// Partners whose signature is accepted in addition to the key's.
    #[serde(default)]
    pub partners: Vec<Partner>,
}

/// A KuCoin site; a key of one site is unknown to the others.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Site {
    /// Australia.
    Australia,
    /// Europe.
    Europe,
    /// All other countries.
    #[default]
    Global,
    /// Thailand.
    Thailand,
    /// Turkey.
    Turkey,
}

/// A partner (broker) and its key.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Partner {
    /// `KC-API-PARTNER`.
    pub id: String,
    /// Key of `KC-API-PARTNER-SIGN`.
    pub key: String,
}

impl SimKey {
    /// An obviously made-up version 3 key for account `uid` with every trading permission.
    pub fn fake(uid: u64) -> Self {
        Self {
            api_key: format!("simulated{uid:015}"),
            api_secret: format!("simulated-secret-of-{uid}-never-real"),
            passphrase: format!("simulated passphrase {uid}"),
            version: newest_version(),
            permissions: all_trading(),
            ip_whitelist: Vec::new(),
            uid,
            sub_name: None,
            parent_uid: None,
            remark: remark(),
            created_at_ms: created_at_ms(),
            expires_at_ms: None,
            site: Site::default(),
            region: region(),
            kyc_passed: kyc_passed(),
            partners: Vec::new(),
        }
    }

    /// Whether the key has a permission. KuCoin's web site and its API use different names for some.
    pub(super) fn has_permission(&self, permission: &str) -> bool {
        let also = match permission {
            "General" => return true,
            "FlexTransfers" => "InnerTransfer",
            "Withdrawal" => "Transfer",
            other => other,
        };
        self.permissions
            .iter()
            .any(|held| held == permission || held == also)
    }
}

fn newest_version() -> u8 {
    3
}

fn all_trading() -> Vec<String> {
    ["Spot", "Margin", "Futures", "Unified"]
        .map(str::to_owned)
        .into()
}

fn remark() -> String {
    "simulated".to_owned()
}

/// 2025-01-01.
fn created_at_ms() -> i64 {
    1_735_689_600_000
}

/// The ISO code for an unknown country.
fn region() -> String {
    "ZZ".to_owned()
}

fn kyc_passed() -> bool {
    true
}

/// Which keys this exchange accepts.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyRules {
    /// Keys of an older version are rejected with 400008.
    pub(super) oldest_version: u8,
    /// Keys of other sites do not exist here.
    pub(super) site: Site,
    /// Whether a version 3 key also works with the header value 2.
    pub(super) two_opens_three: bool,
}

/// Checks a private request that came from `from` and returns its key.
///
/// Order: headers, media type, key, address, timestamp, key version, passphrase, signature, partner. KuCoin does not
/// document its order; this one reveals the least to an unknown client. The caller checks the permission last.
pub(super) fn check<'a>(
    keys: &'a HashMap<String, SimKey>,
    rules: KeyRules,
    request: &Received,
    from: IpAddr,
    now_ms: i64,
) -> Result<&'a SimKey, Refusal> {
    let headers = &request.head.headers;
    let api_key = single(headers, "KC-API-KEY")?;
    let sign = single(headers, "KC-API-SIGN")?;
    let timestamp = single(headers, "KC-API-TIMESTAMP")?;
    let passphrase = single(headers, "KC-API-PASSPHRASE")?;
    let version = single(headers, "KC-API-KEY-VERSION")?;
    media_type(request)?;
    let key = keys
        .get(api_key)
        .filter(|key| key.site == rules.site)
        .filter(|key| key.expires_at_ms.is_none_or(|at_ms| now_ms < at_ms))
        .ok_or_else(|| refuse("400003", "KC-API-KEY not exists"))?;
    if !key.ip_whitelist.is_empty() && !key.ip_whitelist.contains(&from) {
        let msg =
            format!("The requested ip address is not in the api whitelist, current ip: {from}");
        return Err(refuse("400006", msg));
    }
    timely(timestamp, now_ms)?;
    accepted_version(version, key.version, rules)?;
    let expected = match key.version {
        1 => key.passphrase.clone(),
        _ => mac(&key.api_secret, &[key.passphrase.as_bytes()]),
    };
    if passphrase != expected {
        return Err(refuse("400004", "Invalid KC-API-PASSPHRASE"));
    }
    if sign != signature(&key.api_secret, timestamp, request) {
        return Err(refuse("400005", "Invalid KC-API-SIGN"));
    }
    partner(headers, key, timestamp)?;
    Ok(key)
}

fn single<'a>(headers: &'a HeaderMap, name: &str) -> Result<&'a str, Refusal> {
    let mut values = headers.get_all(name).iter();
    // A repeated header is ambiguous: rejected like a missing one.
    match (values.next().map(|value| value.to_str()), values.next()) {
        (Some(Ok(value)), None) if !value.is_empty() => Ok(value),
        _ => Err(refuse(
            "400001",
            format!("Please check the header of your request for {name}"),
        )),
    }
}

/// Only a request with a body needs a media type: ccxt sends none with GET, and KuCoin accepts that.
fn media_type(request: &Received) -> Result<(), Refusal> {
    let json = request
        .head
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.starts_with("application/json"));
    if json || request.body.is_empty() {
        return Ok(());
    }
    Err(refuse("415000", "Unsupported Media Type"))
}

fn timely(timestamp: &str, now_ms: i64) -> Result<(), Refusal> {
    let digits = timestamp.bytes().all(|byte| byte.is_ascii_digit());
    match timestamp.parse::<i64>() {
        Ok(sent_ms) if digits && sent_ms.abs_diff(now_ms) < TOLERANCE_MS => Ok(()),
        _ => Err(refuse("400002", "KC-API-TIMESTAMP Invalid")),
    }
}

/// The header must match the key's version. The known exception: ccxt sends 2 for every key, and version 3 keys accept it.
fn accepted_version(header: &str, version: u8, rules: KeyRules) -> Result<(), Refusal> {
    if version < rules.oldest_version {
        let msg = "V1 & V2 API keys are no longer supported by this API, please create a V3 key";
        return Err(refuse("400008", msg));
    }
    match (header, version) {
        ("1", 1) | ("2", 2) | ("3", 3) => Ok(()),
        ("2", 3) if rules.two_opens_three => Ok(()),
        _ => Err(refuse("400009", "Invalid KC-API-KEY-VERSION")),
    }
}

/// The signature of timestamp, method, path, percent-decoded query and body.
fn signature(secret: &str, timestamp: &str, request: &Received) -> String {
    let uri = &request.head.uri;
    let query = uri.query().map(|query| form_decoded(query));
    let (mark, query) = match &query {
        None => ("", &[][..]),
        Some(query) => ("?", query.as_ref()),
    };
    mac(
        secret,
        &[
            timestamp.as_bytes(),
            request.head.method.as_str().as_bytes(),
            uri.path().as_bytes(),
            mark.as_bytes(),
            query,
            &request.body,
        ],
    )
}

/// If a partner is named, its signature must be right. `KC-API-PARTNER-VERIFY` is ignored, because KuCoin's English and
/// Chinese documentation contradict each other about it.
fn partner(headers: &HeaderMap, key: &SimKey, timestamp: &str) -> Result<(), Refusal> {
    if !headers.contains_key("KC-API-PARTNER") && !headers.contains_key("KC-API-PARTNER-SIGN") {
        return Ok(());
    }
    let unknown = || refuse("400200", "Invalid KC-API-PARTNER");
    let id = single(headers, "KC-API-PARTNER").map_err(|_| unknown())?;
    let partner = key
        .partners
        .iter()
        .find(|partner| partner.id == id)
        .ok_or_else(unknown)?;
    let expected = mac(
        &partner.key,
        &[timestamp.as_bytes(), id.as_bytes(), key.api_key.as_bytes()],
    );
    match single(headers, "KC-API-PARTNER-SIGN") {
        Ok(sign) if sign == expected => Ok(()),
        _ => Err(refuse("400201", "Invalid KC-API-PARTNER-SIGN")),
    }
}

fn mac(key: &str, parts: &[&[u8]]) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes());
    let mut context = hmac::Context::with_key(&key);
    for part in parts {
        context.update(part);
    }
    STANDARD.encode(context.sign())
}

/// Decodes form encoding: `+` and `%20` both become a space. A `%` without two hex digits is kept.
pub(super) fn form_decoded(text: &str) -> Cow<'_, [u8]> {
    if !text.contains(['%', '+']) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, after @ ..] = rest {
        rest = after;
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => match escaped(after) {
                Some((byte, after)) => {
                    rest = after;
                    byte
                }
                None => b'%',
            },
            other => *other,
        });
    }
    Cow::Owned(decoded)
}

fn escaped(after: &[u8]) -> Option<(u8, &[u8])> {
    let [high, low, after @ ..] = after else {
        return None;
    };
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    let byte = digit(high)? * 16 + digit(low)?;
    Some((u8::try_from(byte).ok()?, after))
}

#[cfg(test)]
mod tests {
    use super::form_decoded;

    #[test]
    fn plus_and_percent_20_both_decode_to_a_space() {
        for (wire, decoded) in [
            ("a=b+c", "a=b c"),
            ("a=b%20c", "a=b c"),
            ("a=b%2Bc", "a=b+c"),
            ("a=%e6%b5%8b", "a=\u{6d4b}"),
            ("a=100%", "a=100%"),
            ("a=%zz%4", "a=%zz%4"),
        ] {
            assert_eq!(form_decoded(wire).as_ref(), decoded.as_bytes(), "{wire}");
        }
    }
}
