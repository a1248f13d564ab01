//! What the broker asks the exchange on its own behalf: public, unsigned, and nothing that could change anything.

use std::net::IpAddr;

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_TYPE, HeaderValue, USER_AGENT};
use http::{Request, Uri};
use http_body_util::Full;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::code;

/// `User-Agent` of what the broker asks on its own behalf: told apart from what bots ask, on both sides.
pub(super) const OWN: &str = concat!("credbroker/", env!("CARGO_PKG_VERSION"), " (own)");

/// A question of the broker's own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum BrokerQuery {
    /// From which address do my requests come? Answered by spot hosts. Source: KuCoin API documentation, "Get Client IP
    /// Address": public, weight 0.
    MyIp,
    /// What time is it? Answered by spot and futures hosts. Source: KuCoin API documentation, "Get Server Time": public,
    /// weight 3 and 2.
    Time,
}

impl BrokerQuery {
    /// The request that asks it.
    pub(crate) fn request(self) -> Request<Full<Bytes>> {
        let path = match self {
            Self::MyIp => "/api/v1/my-ip",
            Self::Time => "/api/v1/timestamp",
        };
        let mut request = Request::new(Full::default());
        *request.uri_mut() = Uri::from_static(path);
        let headers = request.headers_mut();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(USER_AGENT, HeaderValue::from_static(OWN));
        request
    }
}

/// `data` of an answer that says that all went well; `None` for any other.
pub(crate) fn data<T: DeserializeOwned>(body: &[u8]) -> Option<T> {
    #[derive(Deserialize)]
    struct Envelope<T> {
        code: String,
        data: T,
    }
    let envelope: Envelope<T> = serde_json::from_slice(body).ok()?;
    (envelope.code == code::SUCCESS).then_some(envelope.data)
}

/// The address that the text of a refusal names. Source: KuCoin API documentation, code 400006: "… current ip: …".
pub(crate) fn address_in(msg: &str) -> Option<IpAddr> {
    let of_an_address = |c: char| c.is_ascii_hexdigit() || matches!(c, '.' | ':');
    msg.split(|c| !of_an_address(c))
        .map(|word| word.trim_matches(['.', ':']))
        .filter(|word| word.contains(['.', ':']))
        .find_map(|word| word.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_in_a_refusal_is_found_whatever_stands_around_it() {
        let found = |msg: &str| address_in(msg).map(|address| address.to_string());
        for (msg, expected) in [
            (
                "The requested ip address is not in the api whitelist, current ip: 203.0.113.9",
                Some("203.0.113.9"),
            ),
            (
                "Invalid request ip, the current clientIp is:203.0.113.9.",
                Some("203.0.113.9"),
            ),
            ("ip [2001:db8::7] refused", Some("2001:db8::7")),
            ("not in the whitelist", None),
            ("error 400006: see 1.2", None),
        ] {
            assert_eq!(found(msg).as_deref(), expected, "{msg}");
        }
    }

    #[test]
    fn only_an_answer_that_says_so_has_data() {
        assert_eq!(
            data(br#"{"code":"200000","data":1546837113087}"#),
            Some(1_546_837_113_087_i64)
        );
        assert_eq!(
            data::<i64>(br#"{"code":"429000","msg":"Too many requests"}"#),
            None
        );
        assert_eq!(data::<i64>(br#"{"code":"500000","data":1}"#), None);
        assert_eq!(data::<i64>(b"<html>"), None);
    }
}
