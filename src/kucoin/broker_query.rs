//! The broker's own queries to the exchange: public, unsigned and read-only.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_TYPE, HeaderValue, USER_AGENT};
use http::{Request, Response, Uri};
use http_body_util::Full;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Scope;
use super::answer::{Answer, RequestContext};
use super::code::{self, RefusalCodes};

/// `User-Agent` of the broker's own requests; it distinguishes them from the requests of bots, on both sides.
pub(super) const OWN: &str = concat!("credbroker/", env!("CARGO_PKG_VERSION"), " (own)");

/// One of the broker's own queries.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum BrokerQuery {
    /// The address that requests come from; spot hosts only. Source: KuCoin API documentation, "Get Client IP Address":
    /// public, weight 0.
    MyIp,
    /// The exchange's time; spot and futures hosts. Source: KuCoin API documentation, "Get Server Time": public, weight 3
    /// and 2.
    Time,
}

impl BrokerQuery {
    /// The HTTP request of the query.
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

/// `data` of an answer with the success code; `None` for any other answer.
pub(crate) fn data<T: DeserializeOwned>(body: &[u8]) -> Option<T> {
    #[derive(Deserialize)]
    struct Envelope<T> {
        code: String,
        data: T,
    }
    let envelope: Envelope<T> = serde_json::from_slice(body).ok()?;
    (envelope.code == code::SUCCESS).then_some(envelope.data)
}

/// How long the edge of the exchange blocks the egress address, if an answer says so; `now` replaces the answer's date if
/// it has none.
pub(crate) fn edge_block(
    answer: &Response<Bytes>,
    now: impl FnOnce() -> SystemTime,
) -> Option<Duration> {
    let asked = RequestContext {
        endpoint: None,
        scope: Scope::SpotMargin,
        changes: false,
        refusal_codes: &RefusalCodes::default(),
    };
    let body = answer.body().clone();
    Answer::read(answer.status(), answer.headers(), body, asked, now).edge_block()
}

/// The IP address in the message of a rejection. Source: KuCoin API documentation, code 400006: "… current ip: …".
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
    fn address_in_the_message_of_a_rejection_is_found() {
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
    fn only_a_success_answer_has_data() {
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
