//! `/healthz`, `/readyz` and `/metrics`, on a separate listener.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;

use super::accept::network;
use super::handshakes::HandshakeSlots;
use crate::base::lock::Mutex;
use crate::base::text::{MAX_CHARS, clean};
use crate::broker::Broker;
use crate::config::FileProblems;
use crate::ops::health::{HealthMetrics, ProcessMetrics, Readiness, details, readiness};
use crate::process::Share;
use crate::telemetry::MetricsFormat;

/// Concurrent connections of scrapers and probes: half of them before their request has arrived, half of them after. One
/// more closes the oldest one of the network that has the most of this half, so that silent clients do not block probes.
const CONNECTIONS: usize = 64;

/// Bytes of a request head.
const HEAD_BYTES: usize = 16 * 1024;

/// How long a connection may take in total, so that scrapers that do not read do not block probes.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a scraper may take to send its request head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves until it is dropped.
pub(crate) async fn serve(
    listener: TcpListener,
    broker: Arc<Broker>,
    problems: watch::Receiver<FileProblems>,
) {
    let mut registry = Registry::default();
    registry
        .sub_registry_with_prefix("process")
        .register_collector(Box::new(ProcessMetrics));
    let own = registry.sub_registry_with_prefix("credbroker");
    broker.metrics.register(own);
    let state = Arc::new(HealthMetrics { broker, problems });
    own.register_collector(Box::new(Arc::clone(&state)));
    let registry = Arc::new(registry);
    let half = (Share::Small.limit(CONNECTIONS) / 2).max(1);
    let (waiting, answering) = (HandshakeSlots::new(half), HandshakeSlots::new(half));
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            // Out of descriptors: wait until some connections end.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (state, registry) = (Arc::clone(&state), Arc::clone(&registry));
        let (peer, answering) = (network(peer.ip()), Arc::clone(&answering));
        let slot = HandshakeSlots::take(&waiting, peer);
        tokio::spawn(async move {
            let eviction = slot.eviction.clone();
            let slot = Mutex::new(slot);
            let service = service_fn(|request: Request<Incoming>| {
                // From now on it competes only with other requests, and not with silent connections.
                let answered = HandshakeSlots::take_with(&answering, peer, eviction.clone());
                *slot.lock() = answered;
                let response = route(&request, &state, &registry);
                async move { Ok::<_, Infallible>(response) }
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(HEAD_BYTES)
                .keep_alive(false);
            // If the connection fails, there is nobody to respond to.
            let serving = http.serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = timeout(CONNECTION_TIMEOUT, serving) => {}
                () = eviction.cancelled() => {}
            }
        });
    }
}

fn route(
    request: &Request<Incoming>,
    state: &HealthMetrics,
    registry: &Registry,
) -> Response<Full<Bytes>> {
    // The HTTP library omits the body of the response to a HEAD (RFC 9110, section 9.3.2).
    let method = match *request.method() {
        Method::HEAD => &Method::GET,
        ref other => other,
    };
    let (status, kind, text) = match (method, request.uri().path()) {
        (&Method::GET, "/healthz") => (
            StatusCode::OK,
            "text/plain; charset=utf-8",
            "ok\n".to_owned(),
        ),
        (&Method::GET, "/readyz") => {
            let Readiness { is_ready, problems } = readiness(&state.broker);
            let mut reasons: Vec<_> = problems.iter().map(ToString::to_string).collect();
            let (status, word) = if is_ready {
                (StatusCode::OK, "ready")
            } else {
                (StatusCode::SERVICE_UNAVAILABLE, "not ready")
            };
            if request.uri().query() == Some("verbose") {
                reasons.extend(details(&state.broker, &state.problems.borrow()));
            }
            // Contains text from Vault and the exchange, and is read in terminals.
            let line = |reason: &String| clean(reason, MAX_CHARS).into_owned() + "\n";
            let lines: String = reasons.iter().map(line).collect();
            let lines = format!("{word}\n{lines}");
            (status, "text/plain; charset=utf-8", lines)
        }
        (&Method::GET, "/metrics") => {
            let accept = request.headers().get_all(ACCEPT).iter();
            let accept: Vec<_> = accept.filter_map(|value| value.to_str().ok()).collect();
            let format = MetricsFormat::accepted(&accept.join(","));
            (StatusCode::OK, format.content_type(), format.text(registry))
        }
        _ => (
            StatusCode::NOT_FOUND,
            "text/plain; charset=utf-8",
            "expected GET /healthz, /readyz, /readyz?verbose or /metrics\n".to_owned(),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}
