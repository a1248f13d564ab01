//! A small client on a plain socket: it sends exactly the bytes of the test, and shows when an answer was cut off.

use std::fmt::Write;

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use credbroker_sim::kucoin::{Host, KucoinSettings, KucoinSim, SimKey};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::NOW_MS;

/// An answer as it arrived.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    pub(crate) fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or("none").to_owned()
    }

    pub(crate) fn data(&self) -> Value {
        assert_eq!(self.code(), "200000", "{self:?}");
        self.json()["data"].clone()
    }

    pub(crate) fn header(&self, name: &str) -> Option<String> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find_map(|(known, value)| (known == name).then(|| value.to_owned()))
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.header("content-length") == Some(self.body.len().to_string())
    }
}

/// Sends a request; `None` if the connection closed without an answer.
pub(crate) async fn send(
    url: &str,
    method: &str,
    target: &str,
    headers: &[(String, String)],
    body: &str,
) -> Option<Answer> {
    let address = url.strip_prefix("http://").unwrap();
    let mut request = format!("{method} {target} HTTP/1.1\r\nHost: {address}\r\n");
    request.push_str("Connection: close\r\n");
    for (name, value) in headers {
        write!(request, "{name}: {value}\r\n").unwrap();
    }
    write!(request, "Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    // If the connection breaks, keep what arrived before.
    let _ = stream.read_to_end(&mut bytes).await;
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let status = head.split(' ').nth(1)?.parse().unwrap();
    let body = bytes[end + 4..].to_vec();
    let answer = Answer { status, head, body };
    assert_eq!(answer.header("x-credbroker-sim").as_deref(), Some("1"));
    Some(answer)
}

/// A client that signs, for requests that the golden ones do not cover.
pub(crate) struct Client {
    pub(crate) sim: KucoinSim,
    pub(crate) key: SimKey,
}

impl Client {
    pub(crate) async fn start() -> Self {
        Self::start_with(SimKey::fake(7)).await
    }

    pub(crate) async fn start_with(key: SimKey) -> Self {
        let sim = KucoinSim::start(KucoinSettings::default()).await.unwrap();
        sim.set_fixed_time_ms(NOW_MS);
        sim.add_key(key.clone());
        Self { sim, key }
    }

    pub(crate) fn url(&self, host: Host) -> String {
        match host {
            Host::Futures => self.sim.futures_url(),
            Host::Spot => self.sim.spot_url(),
        }
    }

    /// Signs and sends a request. `target` must not need percent-encoding.
    pub(crate) async fn try_call(
        &self,
        host: Host,
        method: &str,
        target: &str,
        body: &Value,
    ) -> Option<Answer> {
        self.try_call_at(NOW_MS, host, method, target, body).await
    }

    pub(crate) async fn try_call_at(
        &self,
        now_ms: i64,
        host: Host,
        method: &str,
        target: &str,
        body: &Value,
    ) -> Option<Answer> {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let headers = signed(&self.key, now_ms, &format!("{method}{target}{body}"));
        send(&self.url(host), method, target, &headers, &body).await
    }

    pub(crate) async fn call(&self, host: Host, method: &str, target: &str, body: Value) -> Answer {
        let answer = self.try_call(host, method, target, &body).await;
        answer.expect("an answer")
    }

    pub(crate) async fn spot(&self, method: &str, target: &str, body: Value) -> Answer {
        self.call(Host::Spot, method, target, body).await
    }

    pub(crate) async fn futures(&self, method: &str, target: &str, body: Value) -> Answer {
        self.call(Host::Futures, method, target, body).await
    }

    pub(crate) async fn available(&self) -> String {
        let target = "/api/v1/accounts?currency=USDT&type=trade";
        let accounts = self.spot("GET", target, Value::Null).await.data();
        accounts[0]["available"].as_str().unwrap().to_owned()
    }
}

pub(crate) fn mac(key: &str, text: &str) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes());
    STANDARD.encode(hmac::sign(&key, text.as_bytes()))
}

pub(crate) fn signed(key: &SimKey, now_ms: i64, to_sign: &str) -> Vec<(String, String)> {
    headers(&[
        ("Content-Type", "application/json"),
        ("KC-API-KEY", &key.api_key),
        ("KC-API-KEY-VERSION", &key.version.to_string()),
        ("KC-API-PASSPHRASE", &mac(&key.api_secret, &key.passphrase)),
        (
            "KC-API-SIGN",
            &mac(&key.api_secret, &format!("{now_ms}{to_sign}")),
        ),
        ("KC-API-TIMESTAMP", &now_ms.to_string()),
    ])
}

pub(crate) fn headers(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

pub(crate) fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}
