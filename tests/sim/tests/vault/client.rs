//! A client of a few lines: one connection per request.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[derive(Clone)]
pub(crate) struct Call {
    pub(crate) head: String,
    pub(crate) body: String,
    pub(crate) token: Option<String>,
}

#[derive(Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    /// Null if empty; text if not JSON.
    pub(crate) body: Value,
}

pub(crate) fn call(method: &str, path: &str) -> Call {
    Call {
        head: format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"),
        body: String::new(),
        token: None,
    }
}

pub(crate) fn host(url: &str) -> &str {
    url.strip_prefix("http://").unwrap()
}

impl Call {
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        if name == "X-Vault-Token" {
            self.token = Some(value.to_owned());
        }
        self.head = format!("{}{name}: {value}\r\n", self.head);
        self
    }

    pub(crate) fn raw_body(mut self, body: &str) -> Self {
        body.clone_into(&mut self.body);
        self
    }

    pub(crate) fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    pub(crate) async fn bytes(&self, url: &str) -> Vec<u8> {
        let mut stream = TcpStream::connect(host(url)).await.unwrap();
        let request = format!(
            "{}content-length: {}\r\n\r\n{}",
            self.head,
            self.body.len(),
            self.body
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut came = Vec::new();
        stream.read_to_end(&mut came).await.unwrap();
        came
    }

    pub(crate) async fn send(self, url: &str) -> Answer {
        let came = String::from_utf8(self.bytes(url).await).unwrap();
        let Some((head, body)) = came.split_once("\r\n\r\n") else {
            panic!("no answer but {came:?}");
        };
        let mut lines = head.lines();
        let status = lines
            .next()
            .unwrap()
            .split(' ')
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
        let headers = lines.map(|line| line.split_once(": ").unwrap());
        let answer = Answer {
            status,
            headers: headers
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            body: match body {
                "" => Value::Null,
                body => serde_json::from_str(body).unwrap_or_else(|_| json!(body)),
            },
        };
        assert_eq!(
            answer.header("x-credbroker-sim"),
            Some("1"),
            "not labelled: {head}"
        );
        answer
    }
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self
            .headers
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn set_header(&mut self, name: &str, value: &str) {
        self.headers.retain(|(known, _)| known != name);
        self.headers.push((name.to_owned(), value.to_owned()));
    }
}
