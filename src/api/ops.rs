//! `/healthz`, `/readyz` and `/metrics`, on a listener of their own.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use crate::broker::Broker;
use crate::keyring::Slot;

/// How long a scraper may take to send its request head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether the broker can do its work, and what is wrong.
#[derive(Debug)]
pub struct Readiness {
    /// Whether bots should be sent here.
    pub is_ready: bool,
    /// One line for each thing that is wrong, also where the broker is ready all the same.
    pub reasons: Vec<String>,
}

/// Asks `broker` how it is.
///
/// Not ready while it stops, while Vault has not said a word about a key, while no key at all is in memory, and while a
/// host of the exchange has no address. A key that Vault refuses is a reason, but does not take the others down.
pub fn readiness(broker: &Broker) -> Readiness {
    let mut reasons = Vec::new();
    let mut is_ready = !broker.is_draining();
    if !is_ready {
        reasons.push("the broker is stopping".to_owned());
    }
    let slots = broker.keyring.slots();
    is_ready &= slots.is_empty()
        || slots
            .iter()
            .any(|(_, _, slot)| matches!(slot, Slot::Ready { .. }));
    for (account, name, slot) in slots {
        match slot {
            Slot::Gone(reason) => {
                reasons.push(format!("key {account}/{name}: not available: {reason}"));
            }
            Slot::Ready {
                version, problem, ..
            } => {
                let line = |problem| {
                    format!("key {account}/{name}: version {version} serves on: {problem}")
                };
                reasons.extend(problem.map(line));
            }
            Slot::Waiting(reason) => {
                is_ready = false;
                reasons.push(format!("key {account}/{name}: waiting for Vault: {reason}"));
            }
        }
    }
    for host in broker.egress.unresolved() {
        is_ready = false;
        reasons.push(format!("exchange: the name {host} has not been resolved"));
    }
    Readiness { is_ready, reasons }
}

/// Serves until it is dropped.
pub async fn serve(listener: TcpListener, broker: Arc<Broker>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors: let some connections end first.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let broker = Arc::clone(&broker);
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let response = route(request.method(), request.uri().path(), &broker);
                async move { Ok::<_, Infallible>(response) }
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT);
            // The scraper's connection failed: nobody is left to tell.
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

fn route(method: &Method, path: &str, broker: &Broker) -> Response<Full<Bytes>> {
    let (status, kind, text) = match (method, path) {
        (&Method::GET, "/healthz") => (
            StatusCode::OK,
            "text/plain; charset=utf-8",
            "ok\n".to_owned(),
        ),
        (&Method::GET, "/readyz") => {
            let Readiness { is_ready, reasons } = readiness(broker);
            let (status, word) = if is_ready {
                (StatusCode::OK, "ready")
            } else {
                (StatusCode::SERVICE_UNAVAILABLE, "not ready")
            };
            let lines = reasons
                .iter()
                .fold(format!("{word}\n"), |text, reason| text + reason + "\n");
            (status, "text/plain; charset=utf-8", lines)
        }
        (&Method::GET, "/metrics") => (
            StatusCode::OK,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            broker.metrics.text(),
        ),
        _ => (
            StatusCode::NOT_FOUND,
            "text/plain; charset=utf-8",
            "expected GET /healthz, /readyz or /metrics\n".to_owned(),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}
