//! A small client: one connection per request.

use std::sync::Arc;

use credbroker_sim::pki::{Ca, Identity};
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

#[derive(Clone)]
pub(crate) struct Call {
    pub(crate) head: String,
    pub(crate) body: String,
    pub(crate) tls: Option<Arc<ClientConfig>>,
    pub(crate) token: Option<String>,
}

#[derive(Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    /// Null if empty; a string if not JSON.
    pub(crate) body: Value,
}

pub(crate) fn call(method: &str, path: &str) -> Call {
    Call {
        head: format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"),
        body: String::new(),
        tls: None,
        token: None,
    }
}

pub(crate) fn host(url: &str) -> &str {
    url.split_once("://").unwrap().1
}

/// TLS that trusts servers of `ca`, with or without a client certificate.
pub(crate) fn tls(ca: &Ca, identity: Option<&Identity>) -> Arc<ClientConfig> {
    let certificate = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate(ca.certificate_pem())).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    Arc::new(match identity {
        None => config.with_no_client_auth(),
        Some(identity) => {
            let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).unwrap();
            config
                .with_client_auth_cert(vec![certificate(&identity.certificate_pem)], key)
                .unwrap()
        }
    })
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

    pub(crate) fn over(mut self, tls: &Arc<ClientConfig>) -> Self {
        self.tls = Some(Arc::clone(tls));
        self
    }

    pub(crate) async fn bytes(&self, url: &str) -> Vec<u8> {
        let stream = TcpStream::connect(host(url)).await.unwrap();
        let request = format!(
            "{}content-length: {}\r\n\r\n{}",
            self.head,
            self.body.len(),
            self.body
        );
        match &self.tls {
            None => exchange(stream, &request).await,
            Some(tls) => {
                let name = ServerName::try_from("127.0.0.1").unwrap();
                let tls = TlsConnector::from(Arc::clone(tls));
                exchange(tls.connect(name, stream).await.unwrap(), &request).await
            }
        }
    }

    pub(crate) async fn send(self, url: &str) -> Answer {
        let text = String::from_utf8(self.bytes(url).await).unwrap();
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            panic!("not an HTTP answer: {text:?}");
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
            "not labelled as simulated: {head}"
        );
        answer
    }
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> Vec<u8> {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    bytes
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
