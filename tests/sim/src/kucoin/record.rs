//! The requests received, in order and byte for byte, for tests to check.

use std::collections::VecDeque;
use std::net::SocketAddr;

use bytes::Bytes;

use super::catalog::Host;
use crate::http::Received;

/// Whether the signature of a request is right.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Signature {
    /// Rejected, with the code of the failed check.
    Refused(&'static str),
    /// Not checked: the endpoint is public or unknown.
    Unchecked,
    /// Right, as are headers, time, address and key. Does not include the permission.
    Verified,
}

/// A request as it arrived, and its result.
#[derive(Clone, Debug)]
pub struct ReceivedRequest {
    /// Host that it was sent to.
    pub host: Host,
    /// Method.
    pub method: String,
    /// Path and query, as sent.
    pub target: String,
    /// Headers in the order received, names in lower case; without values that are not text.
    pub headers: Vec<(String, String)>,
    /// Body, byte for byte.
    pub body: Bytes,
    /// Sender.
    pub peer: SocketAddr,
    /// Time of arrival by the exchange's clock.
    pub at_ms: i64,
    /// Catalogue id of the endpoint; `None` if the host does not have it.
    pub endpoint: Option<String>,
    /// Account of the key that signed it, if the signature is right.
    pub uid: Option<u64>,
    /// Result of the signature check, made on arrival, before any fault.
    pub signature: Signature,
    /// Whether a fault hit it.
    pub fault: bool,
    /// HTTP status and code of the exchange's answer; `None` if it did not process the request. After a fault the client
    /// may have received something else, or nothing.
    pub answered: Option<(u16, String)>,
    /// Orders that it created.
    pub created: Vec<CreatedOrder>,
}

impl ReceivedRequest {
    /// The path, without the query.
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// A header's value; the name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(known, _)| known == name)?;
        Some(value)
    }

    /// Whether it is the broker's own request (time or address), by its user agent.
    pub fn is_internal(&self) -> bool {
        self.header("user-agent")
            .is_some_and(|agent| agent.ends_with("(own)"))
    }

    /// The code of the exchange's answer.
    pub fn code(&self) -> Option<&str> {
        let (_, code) = self.answered.as_ref()?;
        Some(code)
    }

    pub(super) fn new(host: Host, request: &Received, at_ms: i64) -> Self {
        let head = &request.head;
        let target = head.uri.path_and_query();
        let headers = head.headers.iter().filter_map(|(name, value)| {
            Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned()))
        });
        Self {
            host,
            method: head.method.as_str().to_owned(),
            target: target.map_or_else(String::new, |target| target.as_str().to_owned()),
            headers: headers.collect(),
            body: request.body.clone(),
            peer: request.peer,
            at_ms,
            endpoint: None,
            uid: None,
            signature: Signature::Unchecked,
            fault: false,
            answered: None,
            created: Vec::new(),
        }
    }
}

/// Ids of an order that a request created.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CreatedOrder {
    /// The exchange's id.
    pub id: String,
    /// The bot's id.
    pub client_oid: Option<String>,
}

/// The newest requests; older ones are dropped.
#[derive(Debug)]
pub(super) struct Records {
    keep: usize,
    first: u64,
    requests: VecDeque<ReceivedRequest>,
}

impl Records {
    pub(super) fn new(keep: usize) -> Self {
        Self {
            keep,
            first: 0,
            requests: VecDeque::new(),
        }
    }

    /// Adds a request and returns its number.
    pub(super) fn add(&mut self, request: ReceivedRequest) -> u64 {
        self.requests.push_back(request);
        let number = self.first + self.requests.len() as u64 - 1;
        while self.requests.len() > self.keep {
            self.requests.pop_front();
            self.first += 1;
        }
        number
    }

    /// The request with this number; `None` if it was dropped.
    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut ReceivedRequest> {
        let at = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.requests.get_mut(at)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &ReceivedRequest> {
        self.requests.iter()
    }
}
