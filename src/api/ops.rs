//! `/healthz`, `/readyz` and `/metrics`, on a listener of their own.

use std::collections::BTreeSet;
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
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use crate::broker::Broker;
use crate::clock::{ExchangeTime, Place};
use crate::config::FileProblems;
use crate::egress::proof::ProofStatus;
use crate::keyring::{KeyStatus, Slot};
use crate::policy::Account;
use crate::telemetry::State;

/// Scrapers and probes at once.
const CONNECTIONS: usize = 64;

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
/// Not ready while it stops, while Vault has not said a word about a key, while no key at all is in memory and fresh
/// enough, while a host of the exchange has no address or no known time, and while requests do not provably leave from
/// the expected address. A key that Vault refuses is a reason, but does not take the others down.
pub fn readiness(broker: &Broker) -> Readiness {
    let mut reasons = Vec::new();
    let mut is_ready = !broker.is_draining();
    if !is_ready {
        reasons.push("the broker is stopping".to_owned());
    }
    let keys = broker.keyring.status();
    is_ready &= keys.is_empty()
        || keys
            .iter()
            .any(|key| matches!(key.slot, Slot::Ready { .. }) && !key.is_too_old);
    for key in keys {
        let name = format!("key {}/{}", key.account, key.name);
        match key.slot {
            Slot::Gone(reason) => reasons.push(format!("{name}: not available: {reason}")),
            Slot::Ready {
                version,
                problem,
                outage,
                ..
            } => {
                let serves = |problem| format!("{name}: version {version} serves on: {problem}");
                reasons.extend(problem.map(serves));
                if let Some(outage) = outage {
                    let age_s = key.age.unwrap_or_default().as_secs();
                    let what = if key.is_too_old {
                        "too old for what adds risk"
                    } else {
                        "serves on"
                    };
                    reasons.push(format!(
                        "{name}: {what}; Vault last confirmed it {age_s} s ago: {outage}"
                    ));
                }
            }
            Slot::Waiting(reason) => {
                is_ready = false;
                reasons.push(format!("{name}: waiting for Vault: {reason}"));
            }
        }
    }
    for host in broker.egress.unresolved() {
        is_ready = false;
        reasons.push(format!("exchange: the name {host} has not been resolved"));
    }
    let ProofStatus {
        mismatch,
        is_strict,
        failure,
        ..
    } = broker.proof.status();
    if let Some(mismatch) = mismatch {
        is_ready &= !is_strict;
        let failure = failure.map(|failure| format!(" (last question: {failure})"));
        reasons.push(format!("egress: {mismatch}{}", failure.unwrap_or_default()));
    }
    for (site, host) in places(broker) {
        if let Err(uncertain) = broker.clock.check((site, host)) {
            is_ready = false;
            reasons.push(format!("clock {site}/{}: {uncertain}", host.as_str()));
        }
    }
    Readiness { is_ready, reasons }
}

/// The hosts whose time matters: those that accounts sign for.
fn places(broker: &Broker) -> BTreeSet<Place> {
    let policy = broker.policy();
    let of_account = |account: &Arc<Account>| {
        let site = account.site;
        let hosts: Vec<_> = account
            .keys
            .keys()
            .map(|scope| (site, scope.host()))
            .collect();
        hosts
    };
    policy.accounts().flat_map(of_account).collect()
}

/// What is in force, beside what is wrong: for `/readyz?verbose`.
fn details(broker: &Broker, problems: &FileProblems) -> Vec<String> {
    let mut lines = Vec::new();
    for key in broker.keyring.status() {
        if let (Slot::Ready { version, .. }, Some(age)) = (&key.slot, key.age) {
            lines.push(format!(
                "key {}/{}: version {version} in memory, confirmed by Vault {} s ago",
                key.account,
                key.name,
                age.as_secs()
            ));
        }
    }
    let ProofStatus { seen, failure, .. } = broker.proof.status();
    let now = broker.clock.boot();
    if let Some((address, at)) = seen {
        let age_s = now.saturating_sub(at).as_secs();
        lines.push(format!("egress: the exchange saw {address} {age_s} s ago"));
    }
    lines.extend(
        failure.map(|failure| format!("egress: the last question got no answer: {failure}")),
    );
    for place in places(broker) {
        let time = broker.clock.exchange(place);
        if let (Some(uncertainty), Some(age)) = (time.uncertainty, time.age) {
            lines.push(format!(
                "clock {}/{}: {} ms from the system's, to within {} ms, measured {} s ago",
                place.0,
                place.1.as_str(),
                time.ms - broker.clock.wall_ms(),
                uncertainty.as_millis(),
                age.as_secs()
            ));
        }
    }
    let (connections, calls) = broker.admission.now();
    lines.push(format!(
        "{connections} connection(s), {calls} call(s) in flight"
    ));
    for (what, problems) in problems {
        for problem in problems {
            lines.push(format!("{what}: a changed file is not in force: {problem}"));
        }
    }
    lines
}

/// The broker's state as gauges.
fn states(broker: &Broker) -> Vec<State> {
    let keys = broker.keyring.status();
    let of_keys = |name, help, value: &dyn Fn(&KeyStatus) -> Option<f64>| State {
        name,
        help,
        values: keys
            .iter()
            .filter_map(|key| {
                let labels = vec![
                    ("account", key.account.to_string()),
                    ("key", key.name.to_string()),
                ];
                Some((labels, value(key)?))
            })
            .collect(),
    };
    let times: Vec<_> = places(broker)
        .into_iter()
        .map(|place| (place, broker.clock.exchange(place)))
        .collect();
    let wall_ms = broker.clock.wall_ms();
    let of_hosts = |name, help, value: &dyn Fn(&ExchangeTime) -> Option<f64>| State {
        name,
        help,
        values: times
            .iter()
            .filter_map(|((site, host), time)| {
                let labels = vec![
                    ("site", site.to_string()),
                    ("host", host.as_str().to_owned()),
                ];
                Some((labels, value(time)?))
            })
            .collect(),
    };
    let proof = broker.proof.status();
    let proof_age = proof
        .seen
        .map(|(_, at)| broker.clock.boot().saturating_sub(at).as_secs_f64());
    let (connections, calls) = broker.admission.now();
    let tasks = Handle::try_current().map_or(0, |runtime| runtime.metrics().num_alive_tasks());
    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of connections are small"
    )]
    let (connections, calls, tasks) = (connections as f64, calls as f64, tasks as f64);
    let flag = |is_set: bool| if is_set { 1.0 } else { 0.0 };
    vec![
        State::single(
            "ready",
            "1 while the broker can do its work",
            flag(readiness(broker).is_ready),
        ),
        of_keys(
            "key_available",
            "1 while the key is in memory and fresh enough for everything",
            &|key| {
                Some(flag(
                    matches!(key.slot, Slot::Ready { .. }) && !key.is_too_old,
                ))
            },
        ),
        of_keys(
            "key_age_seconds",
            "Since Vault last confirmed the key; nothing where it is not in memory",
            &|key| key.age.map(|age| age.as_secs_f64()),
        ),
        of_keys(
            "key_version",
            "Version of the key in memory, as Vault counts",
            &|key| match &key.slot {
                #[expect(clippy::cast_precision_loss, reason = "versions are small")]
                Slot::Ready { version, .. } => Some(*version as f64),
                Slot::Gone(_) | Slot::Waiting(_) => None,
            },
        ),
        of_hosts(
            "clock_offset_seconds",
            "The exchange's time less the system's",
            &|time| {
                #[expect(clippy::cast_precision_loss, reason = "offsets are small")]
                time.uncertainty
                    .map(|_| (time.ms - wall_ms) as f64 / 1000.0)
            },
        ),
        of_hosts(
            "clock_uncertainty_seconds",
            "How far the exchange's time may be off; past 2 what adds risk is refused",
            &|time| {
                time.uncertainty
                    .map(|uncertainty| uncertainty.as_secs_f64())
            },
        ),
        of_hosts(
            "clock_age_seconds",
            "Since the exchange's time was measured",
            &|time| time.age.map(|age| age.as_secs_f64()),
        ),
        State::single(
            "egress_mismatch",
            "1 while requests do not provably leave from the expected address",
            flag(proof.mismatch.is_some()),
        ),
        State {
            values: proof_age.map(|age| (Vec::new(), age)).into_iter().collect(),
            ..State::single(
                "egress_proof_age_seconds",
                "Since the exchange last said from which address requests come",
                0.0,
            )
        },
        State::single(
            "egress_check_failed",
            "1 while the last question for the egress address has no answer",
            flag(proof.failure.is_some()),
        ),
        State::single("connections", "Open connections of bots", connections),
        State::single(
            "calls_in_flight",
            "Calls of bots that have not ended",
            calls,
        ),
        State::single("tasks", "Tasks of the runtime that have not ended", tasks),
    ]
}

/// Serves until it is dropped.
pub async fn serve(
    listener: TcpListener,
    broker: Arc<Broker>,
    problems: watch::Receiver<FileProblems>,
) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Never closed, so it never fails.
        let permit = Arc::clone(&connections).acquire_owned().await;
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors: let some connections end first.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (broker, problems) = (Arc::clone(&broker), problems.clone());
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let response = route(&request, &broker, &problems.borrow());
                async move { Ok::<_, Infallible>(response) }
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT);
            // The scraper's connection failed: nobody is left to tell.
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
            drop(permit);
        });
    }
}

fn route(
    request: &Request<Incoming>,
    broker: &Broker,
    problems: &FileProblems,
) -> Response<Full<Bytes>> {
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/healthz") => (
            StatusCode::OK,
            "text/plain; charset=utf-8",
            "ok\n".to_owned(),
        ),
        (&Method::GET, "/readyz") => {
            let Readiness {
                is_ready,
                mut reasons,
            } = readiness(broker);
            let (status, word) = if is_ready {
                (StatusCode::OK, "ready")
            } else {
                (StatusCode::SERVICE_UNAVAILABLE, "not ready")
            };
            if request.uri().query() == Some("verbose") {
                reasons.extend(details(broker, problems));
            }
            let lines = reasons
                .iter()
                .fold(format!("{word}\n"), |text, reason| text + reason + "\n");
            (status, "text/plain; charset=utf-8", lines)
        }
        (&Method::GET, "/metrics") => (
            StatusCode::OK,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            broker.metrics.text(&states(broker)),
        ),
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
