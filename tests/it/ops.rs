//! Tests of `/healthz`, `/readyz` and `/metrics`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use credbroker_sim::installation::Settings;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::harness::{Lab, accounts, http, print_always};

/// Sends a request, with an `Accept` header unless `accept` is empty; returns head and body of the answer.
async fn fetch(lab: &Lab, method: &str, path: &str, accept: &str) -> (String, String) {
    let accept = match accept {
        "" => String::new(),
        accept => format!("accept: {accept}\r\n"),
    };
    let request = format!("{method} {path}");
    let answer = http(&lab.ops.to_string(), &request, &accept, "").await;
    let (_, head, body) = answer.unwrap();
    (head.to_ascii_lowercase(), body)
}

#[tokio::test]
async fn head_returns_the_headers_of_get_without_a_body() {
    let mut lab = Lab::start().await;
    for path in ["/healthz", "/readyz", "/readyz?verbose", "/metrics"] {
        let (get, body) = fetch(&lab, "GET", path, "").await;
        assert!(!body.is_empty());
        let (head, nothing) = fetch(&lab, "HEAD", path, "").await;
        assert_eq!(nothing, "", "{path}");
        let lines = |head: &str| -> Vec<_> {
            let lines = head.lines().filter(|line| !line.starts_with("date:"));
            // The length of a body can change from one request to the next.
            let lines = lines.filter(|line| !line.starts_with("content-length:"));
            lines.map(ToOwned::to_owned).collect()
        };
        assert_eq!(lines(&head), lines(&get), "{path}");
        assert!(head.starts_with("http/1.1 200"), "{head}");
        assert!(head.contains("content-length: "), "{head}");
    }
    let (head, _) = fetch(&lab, "HEAD", "/", "").await;
    assert!(head.starts_with("http/1.1 404"), "{head}");
    lab.stop().await;
}

#[tokio::test]
async fn metrics_format_follows_the_accept_header() {
    let mut lab = Lab::start().await;
    let open_metrics = "application/openmetrics-text; version=1.0.0";
    for (accept, kind) in [
        ("", "text/plain; version=0.0.4"),
        ("text/plain;version=0.0.4", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        (
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3",
            open_metrics,
        ),
    ] {
        let (head, body) = fetch(&lab, "GET", "/metrics", accept).await;
        assert!(
            head.contains(&format!("content-type: {kind}")),
            "{accept}: {head}"
        );
        let is_open = kind == open_metrics;
        assert_eq!(body.ends_with("# EOF\n"), is_open, "{accept}");
        let counter = "# TYPE credbroker_requests counter\n";
        assert_eq!(body.contains(counter), is_open, "{accept}");
    }
    lab.stop().await;
}

/// Checks every line by the rules of `promtool check metrics` (promlint).
#[tokio::test]
async fn every_metric_sample_has_help_and_type() {
    let mut lab = Lab::start().await;
    lab.bot("maker").await.send(accounts()).await.unwrap();
    let (_, text) = fetch(&lab, "GET", "/metrics", "").await;
    let (mut help, mut types) = (BTreeMap::new(), BTreeMap::new());
    let mut samples = 0;
    for line in text.lines() {
        if let Some(declared) = line.strip_prefix("# HELP ") {
            let (name, text) = declared.split_once(' ').unwrap();
            assert!(!text.trim().is_empty(), "{name} has no help");
            assert!(
                help.insert(name, text).is_none(),
                "{name} is declared twice"
            );
        } else if let Some(declared) = line.strip_prefix("# TYPE ") {
            let (name, kind) = declared.split_once(' ').unwrap();
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name} {kind}");
            assert!(
                types.insert(name, kind).is_none(),
                "{name} is declared twice"
            );
        } else {
            assert!(!line.starts_with('#'), "{line}");
            let end = line.find(['{', ' ']).unwrap();
            let name = &line[..end];
            let histogram = ["_bucket", "_count", "_sum"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix))
                .filter(|name| types.get(name) == Some(&"histogram"));
            let name = histogram.unwrap_or(name);
            assert!(
                help.contains_key(name) && types.contains_key(name),
                "{line}"
            );
            assert!(
                name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{line}"
            );
            let value = line.rsplit_once(' ').unwrap().1;
            assert!(value.parse::<f64>().is_ok(), "{line}");
            samples += 1;
        }
    }
    assert_eq!(help.len(), types.len());
    assert!(samples > 50, "{text}");
    for (name, kind) in [
        ("credbroker_requests_total", "counter"),
        ("credbroker_connections_unused_total", "counter"),
        ("credbroker_stage_duration_seconds", "histogram"),
        ("credbroker_ready", "gauge"),
    ] {
        assert_eq!(types.get(name), Some(&kind), "{name}");
    }
    lab.stop().await;
}

/// A connection to the ops listener from this address, on which nothing is sent yet.
async fn connect(lab: &Lab, from: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
    socket.connect(lab.ops).await.unwrap()
}

#[tokio::test]
async fn silent_connections_delay_no_probe_and_no_request_that_arrives_slowly() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    let (mut silent, mut slowest) = (Vec::new(), Duration::ZERO);
    // Another address than that of the silent clients.
    let mut slow = connect(&lab, "127.0.0.9").await;
    slow.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
    for number in 1..=256 {
        silent.push(connect(&lab, "127.0.0.1").await);
        if number % 16 == 0 {
            let began = Instant::now();
            assert_eq!(lab.get("/healthz").await.0, 200);
            slowest = slowest.max(began.elapsed());
        }
    }
    print_always(&format!("slowest probe: {slowest:?}"));
    // Silent clients are closed after 5 s; the machine may be busy with other tests.
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    slow.write_all(b"host: test\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // Every silent client is disconnected: the oldest at once, the others at the time limit.
    for mut stream in silent {
        let _ = stream.read(&mut [0]).await;
    }
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
}
