//! What arrived, in order and byte for byte: the evidence that tests look at.

use std::collections::VecDeque;
use std::net::SocketAddr;

use bytes::Bytes;

use super::catalog::Host;
use crate::http::Received;

/// Was the signature of a request right?
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Signature {
    /// No: the code that the checks came to.
    Refused(&'static str),
    /// The endpoint is public or unknown: nothing was checked.
    Unchecked,
    /// Yes, and everything else about headers, time, address and key as well. The permission is not part of it.
    Verified,
}

/// A request as it arrived, and what became of it.
#[derive(Clone, Debug)]
pub struct ReceivedRequest {
    /// Host that it was sent to.
    pub host: Host,
    /// Method.
    pub method: String,
    /// Path and query, as on the wire.
    pub target: String,
    /// Headers in their order, names in lower case; values that are no text are left out.
    pub headers: Vec<(String, String)>,
    /// Body, byte for byte.
    pub body: Bytes,
    /// Sender.
    pub peer: SocketAddr,
    /// Exchange clock on arrival.
    pub at_ms: i64,
    /// Catalogue id of the endpoint; `None` when the host does not have it.
    pub endpoint: Option<String>,
    /// Account of the key that signed it, when that verified.
    pub uid: Option<u64>,
    /// Was it signed as KuCoin wants it? Checked on arrival, whatever fault hits the request afterwards.
    pub signature: Signature,
    /// Did a fault hit it?
    pub fault: bool,
    /// HTTP status and code of what the exchange answered; `None` when it never took the request. After a fault
    /// the client may have seen something else, or nothing.
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

    /// Whether a broker asked it on its own behalf (the time, its address), as its user agent says.
    pub fn is_own_question(&self) -> bool {
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
    /// The exchange's.
    pub id: String,
    /// The bot's.
    pub client_oid: Option<String>,
}

/// The last requests; older ones are dropped.
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

    /// The request with this number, unless it was dropped.
    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut ReceivedRequest> {
        let at = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.requests.get_mut(at)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &ReceivedRequest> {
        self.requests.iter()
    }
}
