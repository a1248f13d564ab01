//! Limits for bots: connections, calls in flight, time and size. Each limit has a clear error, and no bot can use up the
//! capacity of another.

use std::io;
use std::time::{Duration, Instant};

use bytes::Bytes;
use credbroker::clock::Clock;
use credbroker::proto::{Outcome, SignAndSendRequest, SignAndSendResponse};
use credbroker_sim::installation::{MAIN_UID, Settings};
use credbroker_sim::kucoin::{Fault, FaultAction, Matching, When};
use credbroker_sim::pki::Identity;
use http_body_util::{BodyExt, StreamBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt;
use tonic::codegen::Service;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::harness::{
    Bot, Lab, Patient, accounts, failure, print_always, refusal, spot_cancel_all, spot_order, tls,
    until,
};
use crate::raw_bot::{
    ACK, DATA, GOAWAY, PING, PRIORITY, RST_STREAM, RawBot, SETTINGS, WINDOW_UPDATE, message,
};

const ACCOUNTS: &str = "/api/v1/accounts";
const ORDERS: &str = "/api/v1/hf/orders";
pub(crate) const OPEN: &str = "credbroker_connections";
const IN_FLIGHT: &str = "credbroker_calls_in_flight";

/// Reads until the broker has closed the connection.
async fn closed(stream: &mut (impl tokio::io::AsyncRead + Unpin)) {
    let mut rest = Vec::new();
    let read = timeout(Duration::from_secs(20), stream.read_to_end(&mut rest)).await;
    // Closed with or without a TLS close_notify.
    let _: io::Result<usize> = read.expect("the connection is still open");
}

async fn lab(limits: &str) -> Lab {
    Lab::with(Settings {
        config: format!("[limits]\n{limits}"),
        ..Settings::default()
    })
    .await
}

/// Checks that a call was rejected with `OVERLOADED` and a retry delay of 1 s.
fn assert_overloaded(result: Result<SignAndSendResponse, Status>, text: &str) {
    let status = result.expect_err("this call must be refused");
    let (code, reason, outcome, _) = failure(&status);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (Code::ResourceExhausted, "OVERLOADED", "not_sent")
    );
    assert!(status.message().contains(text), "{status:?}");
    let retry = status
        .get_details_retry_info()
        .and_then(|info| info.retry_delay);
    assert_eq!(retry, Some(Duration::from_secs(1)));
}

/// The number of `denied` audit lines with this reason.
fn denied(lab: &Lab, reason: &str) -> usize {
    let mut lines = lab.audit();
    lines.retain(|line| line["event"] == "denied" && line["reason"] == reason);
    lines.len()
}

async fn until_open(lab: &Lab, count: f64) {
    until(&format!("{count} connections are open"), async || {
        lab.metric(OPEN).await == Some(count)
    })
    .await;
}

#[tokio::test]
async fn connection_over_the_bot_limit_is_rejected_until_another_one_closes() {
    let mut lab = lab("connections_per_bot = 2").await;
    let limit = "limits.connections_per_bot";
    let mut accepted = [
        lab.patient_bot("maker").await,
        lab.patient_bot("maker").await,
    ];
    for bot in &mut accepted {
        bot.send(accounts()).await.unwrap();
    }
    let mut third = lab.patient_bot("maker").await;
    assert_overloaded(third.send(accounts()).await, limit);
    assert_eq!(denied(&lab, "OVERLOADED"), 1);
    // Eight connections over the limit get an error; the next one is closed.
    let mut rejected = vec![third];
    for _ in 0..7 {
        let mut bot = lab.patient_bot("maker").await;
        assert_overloaded(bot.send(accounts()).await, limit);
        rejected.push(bot);
    }
    let identity = lab.ca.bot("maker").unwrap();
    closed(&mut lab.tls(&identity).await.unwrap()).await;
    let refused = async |reason| {
        lab.metric(&format!(
            "credbroker_connections_refused_total{{reason=\"{reason}\"}}"
        ))
        .await
    };
    assert_eq!(
        (refused("bot_limit").await, refused("limit").await),
        (Some(8.0), Some(1.0))
    );
    lab.patient_bot("reader")
        .await
        .send(accounts())
        .await
        .unwrap();
    for bot in &mut accepted {
        bot.send(accounts()).await.unwrap();
    }

    // A slot is free as soon as its connection is closed, even while rejected connections are still open.
    let [first, second] = accepted;
    drop(first);
    until_open(&lab, 9.0).await;
    let mut replacement = lab.patient_bot("maker").await;
    replacement.send(accounts()).await.unwrap();
    // Rejected connections are closed after a short time.
    until_open(&lab, 2.0).await;
    for bot in &mut rejected {
        bot.send(accounts()).await.unwrap_err();
    }
    drop((second, replacement));
    until_open(&lab, 0.0).await;
    lab.stop().await;
}

#[tokio::test]
async fn connections_of_all_bots_together_are_limited() {
    let mut lab = lab("connections = 2").await;
    let mut first = lab.patient_bot("maker").await;
    let mut second = lab.patient_bot("reader").await;
    first.send(accounts()).await.unwrap();
    second.send(accounts()).await.unwrap();
    let identity = lab.ca.bot("maker").unwrap();
    closed(&mut lab.tls(&identity).await.unwrap()).await;
    drop(second);
    until_open(&lab, 1.0).await;
    lab.patient_bot("reader")
        .await
        .send(accounts())
        .await
        .unwrap();
    lab.stop().await;
}

/// Starts calls that the exchange answers late, and waits until they are sent.
async fn start_calls<const N: usize>(
    lab: &Lab,
    bot: &Bot<Patient>,
    requests: [SignAndSendRequest; N],
) -> [JoinHandle<Result<SignAndSendResponse, Status>>; N] {
    let before = lab.kucoin.received().len();
    let calls = requests.map(|request| {
        let mut bot = bot.clone();
        tokio::spawn(async move { bot.send(request).await })
    });
    until("the calls are sent", async || {
        lab.kucoin.received().len() == before + N
    })
    .await;
    calls
}

/// Local sockets in the state `TIME_WAIT` whose peer has this port.
fn waiting_sockets(port: u16) -> usize {
    const TIME_WAIT: &str = "06";
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let peer = format!(":{port:04X}");
    let rows = table
        .lines()
        .skip(1)
        .map(|row| row.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[2].ends_with(&peer) && row[3] == TIME_WAIT)
        .count()
}

fn slow(method: &str, path: &str, ms: u64) -> Fault {
    Fault {
        times: None,
        method: Some(method.to_owned()),
        matching: Matching::Exact,
        ..Fault::once(path, FaultAction::Delay { ms })
    }
}

#[tokio::test]
async fn calls_over_the_limit_are_refused_and_cancelled_orders_still_count() {
    let mut lab = lab("calls_in_flight = 3\ncalls_in_flight_per_bot = 2").await;
    let (mut maker, mut reader) = (
        lab.patient_bot("maker").await,
        lab.patient_bot("reader").await,
    );
    lab.kucoin.fault(slow("POST", ORDERS, 3000));
    let orders = [spot_order("first"), spot_order("second")];
    let of_maker = start_calls(&lab, &maker, orders).await;
    assert_overloaded(
        maker.send(accounts()).await,
        "limits.calls_in_flight_per_bot",
    );
    lab.kucoin.fault(slow("GET", ACCOUNTS, 3000));
    let of_reader = start_calls(&lab, &reader, [accounts()]).await;
    assert_overloaded(reader.send(accounts()).await, "(limits.calls_in_flight)");
    assert_eq!(denied(&lab, "OVERLOADED"), 2);
    assert_eq!(lab.metric(IN_FLIGHT).await, Some(3.0));

    for call in of_maker {
        call.abort();
    }
    // A new connection, so that the broker has had time to notice the cancelled calls on the first one.
    let mut again = lab.patient_bot("maker").await;
    assert_overloaded(again.send(accounts()).await, "limits.calls_in_flight");
    assert_overloaded(maker.send(accounts()).await, "limits.calls_in_flight");
    assert_eq!(lab.kucoin.received().len(), 3);
    for call in of_reader {
        call.await.unwrap().unwrap();
    }
    until("all calls have finished", async || {
        lab.metric(IN_FLIGHT).await == Some(0.0)
    })
    .await;
    lab.kucoin.clear_faults();
    maker.send(accounts()).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn read_is_dropped_at_its_deadline_and_when_its_bot_is_gone() {
    let mut lab = lab("calls_in_flight_per_bot = 1").await;
    lab.kucoin.fault(slow("GET", ACCOUNTS, 60_000));
    let (bot, mut other) = (
        lab.patient_bot("maker").await,
        lab.patient_bot("maker").await,
    );
    let is_free = async || lab.metric(IN_FLIGHT).await == Some(0.0);
    let mut late = tonic::Request::new(accounts());
    late.set_timeout(Duration::from_millis(500));
    let status = other.client.sign_and_send(late).await.unwrap_err();
    assert_eq!(failure(&status).1, "ANSWER_LOST");
    until("the read at its deadline is dropped", is_free).await;

    let [call] = start_calls(&lab, &bot, [accounts()]).await;
    assert_overloaded(
        other.send(accounts()).await,
        "limits.calls_in_flight_per_bot",
    );
    call.abort();
    until("the read of the bot that is gone is dropped", is_free).await;
    let [call] = start_calls(&lab, &bot, [accounts()]).await;
    drop(bot);
    call.abort();
    until("the read of the closed connection is dropped", is_free).await;
    until("no request is left at the exchange", async || {
        lab.kucoin.in_progress() == 0
    })
    .await;
    let port: u16 = lab
        .kucoin
        .spot_url()
        .rsplit_once(':')
        .unwrap()
        .1
        .parse()
        .unwrap();
    assert_eq!(waiting_sockets(port), 0, "local ports stay in use");
    let outcomes: Vec<_> = lab
        .audit()
        .into_iter()
        .filter(|line| line["event"] != "intent")
        .map(|line| {
            assert_eq!(
                line["event"].as_str().map(|event| event == "late_answer"),
                Some(false)
            );
            (line["reason"].clone(), line["detail"].clone())
        })
        .collect();
    let dropped = "the caller cancelled the call or disconnected; its read was dropped";
    assert_eq!(outcomes.len(), 4, "{outcomes:?}");
    assert!(
        outcomes[2..]
            .iter()
            .all(|(reason, detail)| reason == "ANSWER_LOST" && detail == dropped),
        "{outcomes:?}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn cancels_have_a_reserve_when_reads_and_orders_use_every_slot() {
    let mut lab = lab(
        "calls_in_flight = 3\ncalls_in_flight_per_bot = 2\ncancels_in_flight_per_bot = 1\ncancels_in_flight = 2",
    )
    .await;
    let (mut maker, mut reader) = (
        lab.patient_bot("maker").await,
        lab.patient_bot("reader").await,
    );
    lab.kucoin.fault(slow("POST", ORDERS, 20_000));
    lab.kucoin.fault(slow("GET", ACCOUNTS, 20_000));
    let _own = start_calls(&lab, &maker, [spot_order("hung"), accounts()]).await;
    assert_overloaded(
        maker.send(spot_order("next")).await,
        "limits.calls_in_flight_per_bot",
    );
    for _ in 0..3 {
        let cancelled = maker.send(spot_cancel_all()).await.unwrap();
        assert_eq!(cancelled.outcome(), Outcome::Accepted);
    }
    // Another bot takes the last slot of all bots.
    let _others = start_calls(&lab, &reader, [accounts()]).await;
    assert_overloaded(reader.send(accounts()).await, "(limits.calls_in_flight)");
    maker.send(spot_cancel_all()).await.unwrap();

    lab.kucoin.fault(slow("DELETE", ORDERS, 20_000));
    let _cancel = start_calls(&lab, &maker, [spot_cancel_all()]).await;
    assert_overloaded(
        maker.send(spot_cancel_all()).await,
        "(limits.cancels_in_flight_per_bot)",
    );
    lab.stop().await;
}

#[tokio::test]
async fn idle_bot_connections_leave_descriptors_for_admins_probes_and_the_exchange() {
    const DESCRIPTORS: &str = "ulimit -n 128 && exec \"$@\"";
    let settings = Settings {
        process: true,
        ..Settings::default()
    };
    let mut lab = Lab::install(settings).await;
    lab.spawn_broker_under(&["sh", "-c", DESCRIPTORS, "sh"])
        .await;
    let warning = "the limit of open files allows fewer connections than [limits]; set LimitNOFILE (systemd) or --ulimit \
                   nofile (containers)";
    let warning = lab.process().log_line(warning).await;
    let fields =
        ["connections", "exchange_connections", "needed"].map(|name| warning[name].clone());
    assert_eq!(fields, [64, 0, 16_384]);
    let mut idle = Vec::new();
    for bot in ["maker", "reader"] {
        let identity = lab.ca.bot(bot).unwrap();
        for _ in 0..64 {
            // Beyond the limit, connections are closed.
            if let Ok(stream) = lab.tls(&identity).await {
                idle.push(stream);
            }
        }
    }
    until("bots use all of their connections", async || {
        lab.metric(OPEN).await >= Some(64.0)
    })
    .await;
    let halted = timeout(
        Duration::from_secs(10),
        lab.admin_cli("anna", &["halt", "--all", "--cancel-all"]),
    );
    let halted = halted.await.expect("the halt hangs");
    assert_eq!(halted.code, Some(0), "{halted:?}");
    assert_eq!(lab.get("/healthz").await.0, 200);
    drop(idle);
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
}

#[tokio::test]
async fn call_stays_in_flight_until_the_bot_has_read_its_answer() {
    let mut lab = lab("calls_in_flight_per_bot = 1").await;
    let large = FaultAction::Answer {
        status: 200,
        body: json!({"code": "200000", "data": "x".repeat(300_000)}),
        when: When::BeforeProcessing,
    };
    lab.kucoin.fault(Fault::once(ACCOUNTS, large));
    let stream = lab.tls(&lab.ca.bot("maker").unwrap()).await.unwrap();
    // A window that is much smaller than the answer.
    let (mut sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(16 * 1024)
        .handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("https://localhost/credbroker.v1.Broker/SignAndSend")
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let body = http_body_util::Full::new(Bytes::from(message(&accounts())));
    let answer = sender
        .send_request(request.body(body).unwrap())
        .await
        .unwrap();
    assert_eq!(answer.status(), 200);
    // The call has finished, but the bot has not read its answer.
    until("the outcome is audited", async || lab.audit().len() == 2).await;
    assert_eq!(lab.metric(IN_FLIGHT).await, Some(1.0));
    let mut other = lab.patient_bot("maker").await;
    assert_overloaded(
        other.send(accounts()).await,
        "limits.calls_in_flight_per_bot",
    );
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert!(body.len() > 300_000);
    until("its slot is free", async || {
        lab.metric(IN_FLIGHT).await == Some(0.0)
    })
    .await;
    other.send(accounts()).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn responses_in_the_buffers_of_a_connection_count_until_they_are_written() {
    let mut lab = Lab::start().await;
    let answer = FaultAction::Answer {
        status: 200,
        body: json!({"code": "200000", "data": "x".repeat(60_000)}),
        when: When::BeforeProcessing,
    };
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once(ACCOUNTS, answer)
    });
    let mut raw = RawBot::open(&lab, &lab.ca.bot("maker").unwrap()).await;
    // Windows that never fill, for each stream and for the connection: only TCP stops the broker.
    let largest = [0, 4, 0x7f, 0xff, 0xff, 0xff];
    raw.write(SETTINGS, 0, 0, &largest).await;
    raw.write(WINDOW_UPDATE, 0, 0, &[0x70, 0, 0, 0]).await;
    // More than the buffers of TCP hold.
    let calls = 250;
    for _ in 0..calls {
        raw.call(&accounts()).await;
    }
    until("every outcome is audited", async || {
        lab.audit().len() == 2 * calls
    })
    .await;
    let mut other = lab.patient_bot("reader").await;
    for _ in 0..20 {
        other.send(accounts()).await.unwrap();
    }
    let unwritten = lab.metric(IN_FLIGHT).await.unwrap();
    assert!(unwritten > 10.0, "{unwritten}");
    drop(raw);
    until("all slots are free", async || {
        lab.metric(IN_FLIGHT).await == Some(0.0)
    })
    .await;
    lab.stop().await;
}

#[tokio::test]
async fn silent_peers_are_disconnected_and_delay_bots_at_most_by_the_handshake_timeout() {
    let limit = Duration::from_secs(2);
    let mut lab = lab("handshake_timeout_ms = 2000").await;
    let mut silent = Vec::new();
    for _ in 0..600 {
        silent.push(TcpStream::connect(lab.grpc).await.unwrap());
    }
    let called = async {
        let mut bot = lab.patient_bot("reader").await;
        bot.send(accounts()).await.unwrap();
        bot
    };
    // Twice the limit, in case the machine is busy with other tests.
    let mut bot = timeout(2 * limit, called)
        .await
        .expect("the bot was delayed for longer than the handshake timeout");
    for stream in &mut silent {
        closed(stream).await;
    }
    bot.send(accounts()).await.unwrap();
    until("all are counted", async || {
        lab.metric("credbroker_connections_refused_total{reason=\"handshake\"}")
            .await
            == Some(600.0)
    })
    .await;
    lab.stop().await;
}

#[tokio::test]
async fn log_lines_about_failed_handshakes_are_limited() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    let clients = 600;
    for address in [lab.grpc, lab.admin] {
        for _ in 0..clients / 2 {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
            closed(&mut client).await;
        }
    }
    let refused = "credbroker_connections_refused_total{reason=\"handshake\"}";
    until("all are counted", async || {
        lab.metric(refused).await == Some(f64::from(clients))
    })
    .await;
    let log = lab.process().log();
    let lines = log.matches("TLS handshake failed").count();
    // A burst of two hundred, and more over time.
    assert!((200..400).contains(&lines), "{lines}");
    lab.process().terminate();
    lab.process().exit_code().await;
}

/// Sends a call whose body arrives in pieces, one after each pause; returns its status.
async fn in_pieces(lab: &Lab, identity: &Identity, pieces: Vec<Bytes>, pause: Duration) -> Status {
    let pieces = tokio_stream::iter(pieces).then(move |piece| async move {
        sleep(pause).await;
        Ok::<_, Status>(http_body::Frame::data(piece))
    });
    let body = tonic::body::Body::new(http_body_util::combinators::UnsyncBoxBody::new(
        StreamBody::new(pieces),
    ));
    let request = http::Request::post("https://localhost/credbroker.v1.Broker/SignAndSend")
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let mut connection = lab.patient(identity).await;
    let answer = connection.call(request.body(body).unwrap()).await.unwrap();
    Status::from_header_map(answer.headers()).unwrap()
}

#[tokio::test]
async fn request_that_arrives_too_slowly_gets_deadline_exceeded() {
    let mut lab = lab("request_timeout_ms = 500").await;
    let mut bot = lab.patient_bot("maker").await;
    let drops: Vec<_> = message(&spot_order("drops"))
        .iter()
        .map(|&byte| Bytes::from(vec![byte]))
        .collect();
    let pause = Duration::from_millis(100);
    let arriving = pause * u32::try_from(drops.len()).unwrap();
    let started = Instant::now();
    let status = in_pieces(&lab, &lab.ca.bot("maker").unwrap(), drops, pause).await;
    let waited = started.elapsed();
    assert!(
        // Before the complete message has arrived, even on a slow machine.
        Duration::from_millis(500) <= waited && waited < arriving,
        "{waited:?}"
    );
    let (code, reason, outcome, _) = failure(&status);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (Code::DeadlineExceeded, "DEADLINE_EXCEEDED", "not_sent")
    );
    assert!(status.message().contains("within 500 ms"), "{status:?}");
    assert_eq!(denied(&lab, "DEADLINE_EXCEEDED"), 1);
    until("its slot is free", async || {
        lab.metric(IN_FLIGHT).await == Some(0.0)
    })
    .await;
    assert!(lab.kucoin.received().is_empty());
    bot.send(accounts()).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn oversized_or_undecodable_message_is_rejected_and_audited() {
    let mut lab = lab("body_bytes = 1000").await;
    let mut bot = lab.patient_bot("maker").await;
    let large = SignAndSendRequest {
        body: Bytes::from(vec![b' '; 100_000]),
        ..spot_order("large")
    };
    let malformed = (
        Code::InvalidArgument,
        "REQUEST_MALFORMED".to_owned(),
        "not_sent".to_owned(),
    );
    let status = bot.send(large).await.unwrap_err();
    let field = &status.get_details_bad_request().unwrap().field_violations[0];
    assert_eq!(field.field, "message");
    assert!(field.description.contains("66536"), "{field:?}");
    assert_eq!(refusal(Err(status)), malformed);
    // A valid length prefix before bytes that are not a protobuf message.
    let nonsense = vec![Bytes::from_static(&[0, 0, 0, 0, 3, 0xff, 0xff, 0xff])];
    let status = in_pieces(
        &lab,
        &lab.ca.bot("maker").unwrap(),
        nonsense,
        Duration::ZERO,
    )
    .await;
    assert_eq!(refusal(Err(status)), malformed);
    assert_eq!(denied(&lab, "REQUEST_MALFORMED"), 2);
    assert!(lab.kucoin.received().is_empty());
    bot.send(accounts()).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn oversized_metadata_is_rejected_counted_and_audited() {
    let mut lab = lab("").await;
    let mut bot = lab.patient_bot("maker").await;
    let mut with_metadata = async |bytes: usize| {
        let mut request = tonic::Request::new(accounts());
        let long = "x".repeat(bytes).parse().unwrap();
        request.metadata_mut().insert("x-token", long);
        bot.client.sign_and_send(request).await
    };
    with_metadata(15_000).await.unwrap();
    let status = with_metadata(17_000).await.unwrap_err();
    let field = &status.get_details_bad_request().unwrap().field_violations[0];
    assert_eq!(field.field, "metadata");
    assert!(
        field.description.contains("expected at most 16384"),
        "{field:?}"
    );
    let (code, reason, outcome, _) = failure(&status);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (Code::InvalidArgument, "REQUEST_MALFORMED", "not_sent")
    );
    assert_eq!(denied(&lab, "REQUEST_MALFORMED"), 1);
    assert_eq!(refused_calls(&lab, "REQUEST_MALFORMED").await, Some(1.0));
    // The HTTP library rejects far larger metadata: only that call fails, without error details, and it is not counted.
    let status = with_metadata(270_000).await.unwrap_err();
    assert!(status.get_details_error_info().is_none(), "{status:?}");
    assert!(status.message().contains("431"), "{status:?}");
    assert_eq!(denied(&lab, "REQUEST_MALFORMED"), 1);
    assert_eq!(refused_calls(&lab, "REQUEST_MALFORMED").await, Some(1.0));
    with_metadata(0).await.unwrap();
    assert_eq!(lab.kucoin.received().len(), 2);
    lab.stop().await;
}

/// The number of calls that were rejected before their scope was known, by reason.
async fn refused_calls(lab: &Lab, reason: &str) -> Option<f64> {
    let labels = format!("scope=\"\",outcome=\"not_sent\",reason=\"{reason}\"");
    lab.metric(&format!("credbroker_requests_total{{{labels}}}"))
        .await
}

#[tokio::test]
async fn call_to_an_unknown_method_is_counted_and_audited() {
    let mut lab = lab("").await;
    let mut connection = lab.patient(&lab.ca.bot("maker").unwrap()).await;
    let long = format!("/credbroker.v1.Broker/{}", "Long".repeat(1000));
    for path in [
        "/credbroker.v1.Broker/Withdraw",
        "/other.v1.Wallet/Send",
        &long,
    ] {
        let request = http::Request::post(format!("https://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(tonic::body::Body::empty())
            .unwrap();
        let answer = connection.call(request).await.unwrap();
        let status = Status::from_header_map(answer.headers()).unwrap();
        let (code, reason, outcome, _) = failure(&status);
        assert_eq!(
            (code, reason.as_str(), outcome.as_str()),
            (Code::Unimplemented, "METHOD_UNKNOWN", "not_sent")
        );
        let shown = &path[..path.len().min(100)];
        assert!(status.message().contains(shown), "{status:?}");
    }
    let lines = lab.audit();
    let details: Vec<_> = lines
        .iter()
        .map(|line| line["detail"].as_str().unwrap())
        .collect();
    assert_eq!(denied(&lab, "METHOD_UNKNOWN"), 3);
    assert!(details[1].contains("/other.v1.Wallet/Send"), "{details:?}");
    assert!(
        details.iter().all(|detail| detail.len() < 300),
        "{details:?}"
    );
    assert_eq!(refused_calls(&lab, "METHOD_UNKNOWN").await, Some(3.0));
    assert!(lab.kucoin.received().is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn request_path_counts_towards_the_metadata_limit() {
    let mut lab = lab("").await;
    let mut connection = lab.patient(&lab.ca.bot("maker").unwrap()).await;
    let request = http::Request::post(format!("https://localhost/{}", "x".repeat(60_000)))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::empty())
        .unwrap();
    let answer = connection.call(request).await.unwrap();
    let status = Status::from_header_map(answer.headers()).unwrap();
    let (code, reason, ..) = failure(&status);
    assert_eq!(
        (code, reason.as_str()),
        (Code::InvalidArgument, "REQUEST_MALFORMED")
    );
    assert!(
        status
            .message()
            .contains("metadata: expected at most 16384 bytes, got 60"),
        "{status:?}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn unsupported_compression_is_not_reported_as_an_unknown_method() {
    let mut lab = lab("").await;
    let mut connection = lab.patient(&lab.ca.bot("maker").unwrap()).await;
    let mut call = async |path: &str| {
        let request = http::Request::post(format!("https://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("grpc-encoding", "gzip")
            .body(tonic::body::Body::empty())
            .unwrap();
        let answer = connection.call(request).await.unwrap();
        Status::from_header_map(answer.headers()).unwrap()
    };
    for path in [
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ] {
        let status = call(path).await;
        assert_eq!(status.code(), Code::Unimplemented, "{path}");
        assert!(status.message().contains("gzip"), "{status:?}");
        assert!(status.get_details_error_info().is_none(), "{status:?}");
    }
    assert_eq!(denied(&lab, "METHOD_UNKNOWN"), 0);
    let status = call("/credbroker.v1.Broker/SignAndSend").await;
    assert_eq!(failure(&status).1, "REQUEST_MALFORMED");
    lab.stop().await;
}

#[tokio::test]
async fn non_grpc_request_gets_415_and_is_audited() {
    let mut lab = lab("").await;
    let mut connection = lab.patient(&lab.ca.bot("maker").unwrap()).await;
    let url = "https://localhost/credbroker.v1.Broker/SignAndSend";
    let order = Bytes::from(message(&spot_order("from-a-page")));
    for (method, kind) in [
        ("POST", "text/plain"),
        ("GET", "application/grpc"),
        ("POST", ""),
    ] {
        let mut request = http::Request::builder().method(method).uri(url);
        if !kind.is_empty() {
            request = request.header("content-type", kind);
        }
        let body = tonic::body::Body::new(http_body_util::Full::new(order.clone()));
        let request = request.header("origin", "https://example.org").body(body);
        let answer = connection.call(request.unwrap()).await.unwrap();
        assert_eq!(answer.status(), 415, "{method} {kind}");
        assert!(!answer.headers().contains_key("grpc-status"));
    }
    assert_eq!(denied(&lab, "REQUEST_MALFORMED"), 3);
    assert!(lab.kucoin.received().is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn unsolicited_frames_are_not_logged() {
    let mut lab = Lab::with(Settings {
        process: true,
        config: "[log]\nfilter = \"trace\"".to_owned(),
        ..Settings::default()
    })
    .await;
    let mut bot = RawBot::open(&lab, &lab.ca.bot("maker").unwrap()).await;
    bot.call(&accounts()).await;
    until("the first call has finished", async || {
        lab.audit().len() == 2
    })
    .await;
    let lines = |lab: &Lab| lab.process.as_ref().unwrap().log().lines().count();
    let before = lines(&lab);
    for _ in 0..1000 {
        // Unsolicited frames: a PING acknowledgement, a PRIORITY for an idle stream, and an unknown frame type.
        bot.write(PING, ACK, 0, &[7; 8]).await;
        bot.write(PRIORITY, 0, 99, &[0, 0, 0, 0, 1]).await;
        bot.write(0x42, 0, 0, &[0; 8]).await;
    }
    bot.call(&accounts()).await;
    until("the second call has finished", async || {
        lab.audit().len() == 4
    })
    .await;
    let more = lines(&lab) - before;
    assert!(more < 200, "{more} lines for 3000 frames");
    for library in ["h2", "hyper"] {
        let target = format!("\"target\":\"{library}");
        assert!(!lab.process().log().contains(&target), "{library}");
    }
    lab.process().terminate();
    lab.process().exit_code().await;
}

#[tokio::test]
async fn connections_that_send_nothing_are_counted_and_not_logged() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    for address in [lab.grpc, lab.admin] {
        for _ in 0..150 {
            drop(TcpStream::connect(address).await.unwrap());
        }
    }
    until("all are counted", async || {
        lab.metric("credbroker_connections_unused_total").await == Some(300.0)
    })
    .await;
    let refused = "credbroker_connections_refused_total{reason=\"handshake\"}";
    assert_eq!(lab.metric(refused).await, Some(0.0));
    let mut client = TcpStream::connect(lab.grpc).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    closed(&mut client).await;
    until("the failed handshake is counted", async || {
        lab.metric(refused).await == Some(1.0)
    })
    .await;
    lab.process().log_line("TLS handshake failed").await;
    let log = lab.process().log();
    assert_eq!(log.matches("TLS handshake failed").count(), 1);
    lab.process().terminate();
    lab.process().exit_code().await;
}

#[tokio::test]
async fn idle_connection_is_closed_and_the_next_call_reconnects() {
    let mut lab = lab("connection_idle_s = 1").await;
    let mut usual = lab.bot("reader").await;
    usual.send(accounts()).await.unwrap();
    // One that never sends HTTP/2, and one that does not reply to GOAWAY.
    let identity = lab.ca.bot("reader").unwrap();
    let mut mute = lab.tls(&identity).await.unwrap();
    let mut raw = RawBot::open(&lab, &identity).await;
    let mut busy = lab.patient_bot("maker").await;
    // Longer than the interval of the idle check. The exchange rejects such a late timestamp, and the second attempt
    // succeeds.
    lab.kucoin
        .fault(Fault::once(ACCOUNTS, FaultAction::Delay { ms: 6500 }));
    let [call] = start_calls(&lab, &busy, [accounts()]).await;
    call.await.unwrap().unwrap();
    // A connection with a call in flight is not idle: it still accepts calls.
    busy.send(accounts()).await.unwrap();
    closed(&mut mute).await;
    closed(&mut raw.stream).await;
    until_open(&lab, 0.0).await;
    usual.send(accounts()).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn connection_is_closed_at_its_maximum_age_even_while_calls_continue() {
    let mut lab = lab("connection_age_s = 2").await;
    // Its gRPC library reconnects automatically.
    let mut bot = lab.bot("reader").await;
    let mut raw = RawBot::open(&lab, &lab.ca.bot("maker").unwrap()).await;
    let started = Instant::now();
    let aged = tokio::spawn(async move {
        raw.until_frame(GOAWAY).await;
        started.elapsed()
    });
    while !aged.is_finished() {
        bot.send(accounts()).await.unwrap();
        sleep(Duration::from_millis(5)).await;
    }
    let age = aged.await.unwrap();
    assert!(
        Duration::from_millis(1700) < age && age < Duration::from_secs(4),
        "{age:?}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn call_is_rejected_when_its_certificate_expires_before_it_has_arrived() {
    let mut lab = lab("").await;
    let end = u64::try_from(Clock::system().wall_ms() / 1000).unwrap() + 2;
    let identity = lab.ca.bot_within("maker", end - 60..end).unwrap();
    let order = Bytes::from(message(&spot_order("late")));
    let (head, rest) = (order.slice(..40), order.slice(40..));
    // The first part arrives in time, the second one after the certificate has expired.
    let status = in_pieces(
        &lab,
        &identity,
        vec![head, rest],
        Duration::from_millis(1700),
    )
    .await;
    let (code, reason, outcome, _) = failure(&status);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (Code::Unauthenticated, "CALLER_UNKNOWN", "not_sent")
    );
    assert!(lab.kucoin.orders(MAIN_UID).is_empty());
    assert_eq!(denied(&lab, "CALLER_UNKNOWN"), 1);
    lab.stop().await;
}

#[tokio::test]
async fn reflection_calls_are_limited_in_number_and_size() {
    let mut lab = lab("").await;
    let bot = lab.ca.bot("nobody").unwrap();
    let connection = lab.patient(&bot).await;
    let open = |first: &'static [u8]| {
        let mut connection = connection.clone();
        let pieces = [Ok::<_, Status>(http_body::Frame::data(Bytes::from_static(
            first,
        )))];
        let body = StreamBody::new(tokio_stream::iter(pieces).chain(tokio_stream::pending()));
        let body = tonic::body::Body::new(http_body_util::combinators::UnsyncBoxBody::new(body));
        let path = "https://localhost/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        let request = http::Request::post(path)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(body)
            .unwrap();
        async move { connection.call(request).await.unwrap() }
    };
    // A message that announces 4 MB is rejected before it arrives.
    let announced = open(&[0, 0, 0x3f, 0, 0]).await;
    let result = timeout(Duration::from_secs(5), announced.into_body().collect()).await;
    result
        .expect("the call must be rejected before its message arrives")
        .unwrap();
    until("its slot is free", async || {
        lab.metric(IN_FLIGHT).await == Some(0.0)
    })
    .await;
    let mut lasting = Vec::new();
    for _ in 0..16 {
        lasting.push(open(&[0]).await);
    }
    let refused = Status::from_header_map(open(&[0]).await.headers()).unwrap();
    assert_overloaded(Err(refused), "health and reflection");
    // They do not count towards the limit of calls.
    lab.bot("maker").await.send(accounts()).await.unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn connection_is_closed_when_its_certificate_expires() {
    let mut lab = lab("drain_timeout_ms = 500").await;
    let now_s = || u64::try_from(Clock::system().wall_ms() / 1000).unwrap();
    let end = now_s() + 3;
    let identity = lab.ca.bot_within("maker", end - 60..end).unwrap();
    let mut bot = lab.patient_bot_with(&identity).await;
    let mut raw = RawBot::open(&lab, &identity).await;
    let mut served = 0;
    let refused = loop {
        match bot.send(accounts()).await {
            Ok(_) => served += 1,
            Err(status) => break status,
        }
        assert!(now_s() <= end + 1, "accepted after it has expired");
        sleep(Duration::from_millis(20)).await;
    };
    assert!(served > 0);
    assert!(
        now_s() >= end,
        "rejected {} s before it expires",
        end - now_s()
    );
    let (code, reason, outcome) = refusal(Err(refused));
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (Code::Unauthenticated, "CALLER_UNKNOWN", "not_sent")
    );
    closed(&mut raw.stream).await;
    until_open(&lab, 0.0).await;
    lab.stop().await;
}

#[tokio::test]
async fn ten_thousand_idle_connections_of_one_bot_do_not_block_another() {
    const CONNECTIONS: u64 = 10_000;
    const AT_ONCE: usize = 50;
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    // Other tests in this process need file descriptors, too.
    let allowed = limit.maximum.unwrap_or(u64::MAX).saturating_sub(2000);
    let connections = CONNECTIONS.min(allowed);
    let lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    let (address, connector) = (lab.grpc, lab.client_tls(&lab.ca.bot("maker").unwrap()));
    let mut other = lab.patient_bot("reader").await;
    let started = Instant::now();
    let flood = tokio::spawn(async move {
        let handshakes = tokio_stream::iter(0..connections).map(|_| tls(address, &connector));
        let opened = futures_util::StreamExt::buffer_unordered(handshakes, AT_ONCE);
        opened.collect::<io::Result<Vec<_>>>().await
    });
    let (mut calls, mut slowest) = (0, Duration::ZERO);
    while !flood.is_finished() {
        let called = Instant::now();
        other.send(accounts()).await.unwrap();
        slowest = slowest.max(called.elapsed());
        calls += 1;
    }
    let open = flood.await.unwrap().unwrap();
    let took = started.elapsed();
    other.send(accounts()).await.unwrap();
    lab.patient_bot("reader")
        .await
        .send(accounts())
        .await
        .unwrap();
    let held = lab.metric(OPEN).await.unwrap();
    let refused = async |reason| {
        let name = format!("credbroker_connections_refused_total{{reason=\"{reason}\"}}");
        lab.metric(&name).await.unwrap_or_default()
    };
    let (rejected, closed) = (refused("bot_limit").await, refused("limit").await);
    print_always(&format!(
        "{} connections of one bot in {took:?}: {held} open, {rejected} rejected with an error, {closed} closed; {calls} calls of another bot, slowest {slowest:?}",
        open.len()
    ));
    assert_eq!(u64::try_from(open.len()).unwrap(), connections);
    assert!(
        held < 80.0,
        "at most 64 accepted, some rejected but still open, and two of the other bot"
    );
    assert!(rejected >= 8.0 && closed > 0.0);
    assert!(calls > 10);
}

#[tokio::test]
async fn incomplete_health_check_is_audited_as_rejected_and_a_cancelled_call_is_not_audited() {
    let mut lab = lab("request_timeout_ms = 500").await;
    let mut bot = RawBot::open(&lab, &lab.ca.bot("maker").unwrap()).await;
    // Half of a message, then CANCEL (RFC 9113, section 7).
    let stream = bot.head(&[]).await;
    bot.write(DATA, 0, stream, &[0, 0]).await;
    bot.write(RST_STREAM, 0, stream, &8_u32.to_be_bytes()).await;
    bot.head_of("/grpc.health.v1.Health/Check", &[]).await;
    until("the incomplete health check is rejected", async || {
        !lab.audit().is_empty()
    })
    .await;
    let reasons: Vec<_> = lab
        .audit()
        .iter()
        .map(|line| line["reason"].clone())
        .collect();
    assert_eq!(reasons, ["DEADLINE_EXCEEDED"]);
    drop(bot);
    lab.stop().await;
}
