//! Memory for answers: limits per bot and for all bots, free again once an answer is written, and a deadline for the peer that
//! reads it.

use std::time::Duration;

use bytes::Bytes;
use credbroker::proto::SignAndSendRequest;
use credbroker_sim::installation::Settings;
use credbroker_sim::kucoin::{Fault, FaultAction, When};
use credbroker_sim::vault::{Fault as VaultFault, FaultRule};
use http::Response;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::time::{advance, pause, resume};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::answers::Exchange;
use crate::harness::{Lab, accounts, failure, print_always, spot_cancel_all, until};
use crate::process::proc_line;
use crate::raw_bot::{RawBot, message};

const ACCOUNTS: &str = "/api/v1/accounts";
const ORDERS: &str = "/api/v1/hf/orders";
const IN_FLIGHT: &str = "credbroker_calls_in_flight";

/// A bot that reads only the heads of responses, and 16 KiB of each body when asked.
struct SlowBot(SendRequest<Full<Bytes>>);

impl SlowBot {
    async fn open(lab: &Lab, name: &str) -> Self {
        let stream = lab.tls(&lab.ca.bot(name).unwrap()).await.unwrap();
        let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(16 * 1024)
            .handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    /// Sends a call, and returns its response once the head has arrived.
    async fn call(&mut self, request: &SignAndSendRequest) -> Response<Incoming> {
        let call = http::Request::post("https://localhost/credbroker.v1.Broker/SignAndSend")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(Bytes::from(message(request))))
            .unwrap();
        let response = self.0.send_request(call).await.unwrap();
        assert_eq!(response.status(), 200);
        response
    }

    /// The same for a call that must succeed.
    async fn hold(&mut self, request: &SignAndSendRequest) -> Response<Incoming> {
        let response = self.call(request).await;
        let status = response.headers().get("grpc-status");
        assert_eq!(status, None, "{:?}", response.headers());
        response
    }
}

/// Makes the exchange answer every request with this method and path with `bytes` bytes.
fn answer(lab: &Lab, method: &str, path: &str, bytes: usize) {
    let body = json!({"code": "200000", "data": "x".repeat(bytes - 30)});
    let action = FaultAction::Answer {
        status: 200,
        body,
        when: When::BeforeProcessing,
    };
    lab.kucoin.fault(Fault {
        times: None,
        method: Some(method.to_owned()),
        ..Fault::once(path, action)
    });
}

/// Checks that a call got `OVERLOADED` with this outcome and a retry delay, for this limit.
fn assert_overloaded(status: &Status, expected: &str, text: &str) {
    let (code, reason, outcome, _) = failure(status);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (Code::ResourceExhausted, "OVERLOADED", expected),
        "{status:?}"
    );
    assert!(status.message().contains(text), "{status:?}");
    assert!(status.get_details_retry_info().is_some());
}

/// Bytes of memory of a process: `VmRSS` now, or `VmHWM` at most so far.
fn memory(lab: &mut Lab, field: &str) -> usize {
    let line = proc_line(lab.process().id(), "status", field);
    1024 * line[1].parse::<usize>().unwrap()
}

#[tokio::test]
async fn reads_over_the_memory_for_answers_are_refused_while_cancels_and_other_bots_go_on() {
    // A dropped answer counts for one more second: with or without it, two answers of the other bot fit, and a third does not.
    let (size, of_bot, of_all) = (950_000, 3_500_000, 6_500_000);
    let mut lab = Lab::with(Settings {
        process: true,
        egress: "max_answer_bytes = 1000000".to_owned(),
        config: format!("[limits]\nanswer_bytes_per_bot = {of_bot}\nanswer_bytes = {of_all}"),
        ..Settings::default()
    })
    .await;
    answer(&lab, "GET", ACCOUNTS, size);
    answer(&lab, "DELETE", ORDERS, size);
    let mut maker = lab.patient_bot("maker").await;
    let mut reader = lab.patient_bot("reader").await;
    maker.send(accounts()).await.unwrap();
    let before = memory(&mut lab, "VmRSS");

    // The bot does not read three answers; the next one does not fit.
    let mut slow = SlowBot::open(&lab, "maker").await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(slow.hold(&accounts()).await);
    }
    let dropped = maker.send(accounts()).await.map(drop).unwrap_err();
    assert_overloaded(&dropped, "maybe_sent", "limits.answer_bytes_per_bot");
    assert!(dropped.message().contains("exchange received this read"));
    // Cancels take more than the bot's limit, and then its reads are not even sent.
    held.push(slow.hold(&spot_cancel_all()).await);
    let received = lab.kucoin.received().len();
    let refused = maker.send(accounts()).await.map(drop).unwrap_err();
    assert_overloaded(&refused, "not_sent", "limits.answer_bytes_per_bot");
    assert!(refused.message().ends_with("nothing was sent"));
    assert_eq!(lab.kucoin.received().len(), received);
    let cancelled = maker.send(spot_cancel_all()).await.unwrap();
    assert!(cancelled.body.len() > size - 100);

    // Another bot reads as long as all bots together are below their limit.
    let mut slow_reader = SlowBot::open(&lab, "reader").await;
    reader.send(accounts()).await.unwrap();
    for _ in 0..2 {
        held.push(slow_reader.hold(&accounts()).await);
    }
    let dropped = reader.send(accounts()).await.map(drop).unwrap_err();
    assert_overloaded(&dropped, "maybe_sent", "(limits.answer_bytes)");
    maker.send(spot_cancel_all()).await.unwrap();
    let used = memory(&mut lab, "VmRSS").saturating_sub(before);
    print_always(&format!(
        "memory of {} unread answers: {used} bytes",
        held.len()
    ));
    assert!(used < 2 * of_all + 8_000_000, "{used}");
    let outcome = lab
        .audit()
        .into_iter()
        .rev()
        .find(|line| line["event"] == "outcome" && line["reason"] == "OVERLOADED");
    assert_eq!(outcome.unwrap()["outcome"], "maybe_sent");
    let counted =
        "requests_total{scope=\"spot-margin\",outcome=\"maybe_sent\",reason=\"OVERLOADED\"}";
    assert_eq!(lab.metric(counted).await, Some(2.0));

    for response in held {
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert!(body.len() > size - 100);
    }
    until("all memory is free", async || {
        lab.metric(IN_FLIGHT).await == Some(0.0)
    })
    .await;
    for _ in 0..3 {
        maker.send(accounts()).await.unwrap();
        reader.send(accounts()).await.unwrap();
    }
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
}

#[tokio::test]
async fn memory_for_answers_is_free_again_however_a_call_ends() {
    const LARGEST: usize = 1_000_000;
    let exchange = Exchange::start("spot").await;
    let mut lab = Lab::with(Settings {
        process: false,
        egress: format!("max_answer_bytes = {LARGEST}"),
        // An answer of the largest size gets through only if all memory is free.
        config: format!("[limits]\nanswer_bytes_per_bot = {LARGEST}"),
        ..exchange.settings()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    let start = r#"{"code":"200000","data":""#;
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {LARGEST}\r\n\r\n{start}");
    let complete = format!("{head}{}\"}}", "x".repeat(LARGEST - start.len() - 2));
    let half = format!("{head}{}", "x".repeat(LARGEST / 2));
    let broken = format!(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n61a80\r\n{}\r\nno chunk\r\n",
        "x".repeat(400_000)
    );
    for ending in [
        "broken",
        "deadline",
        "disconnect",
        "reset",
        "unread",
        "read",
    ] {
        match ending {
            // Sent twice, since it is a read.
            "broken" => {
                exchange.answer(ACCOUNTS, broken.as_bytes());
                let lost = bot.send(accounts()).await.map(drop).unwrap_err();
                assert_eq!(failure(&lost).1, "ANSWER_LOST");
            }
            "deadline" => {
                exchange.answer(ACCOUNTS, half.as_bytes());
                let limit = Duration::from_millis(500);
                let late = bot.send_within(accounts(), limit).await.unwrap_err();
                assert_eq!(failure(&late).1, "ANSWER_LOST");
            }
            "disconnect" => {
                exchange.answer(ACCOUNTS, half.as_bytes());
                let sent = exchange.connections(ACCOUNTS).len();
                let mut other = lab.patient_bot("maker").await;
                let call = tokio::spawn(async move { other.send(accounts()).await });
                until("the read is sent", async || {
                    exchange.connections(ACCOUNTS).len() > sent
                })
                .await;
                call.abort();
            }
            // The stream ends while the answer is unread.
            "reset" => {
                exchange.answer(ACCOUNTS, complete.as_bytes());
                let mut slow = SlowBot::open(&lab, "maker").await;
                let response = slow.hold(&accounts()).await;
                let full = bot.send(accounts()).await.map(drop).unwrap_err();
                assert_overloaded(&full, "not_sent", "limits.answer_bytes_per_bot");
                drop(response);
            }
            // The connection ends while the answer is unread.
            "unread" => {
                exchange.answer(ACCOUNTS, complete.as_bytes());
                let mut raw = RawBot::open(&lab, &lab.ca.bot("maker").unwrap()).await;
                let ended = lab.audit().len() + 2;
                raw.call(&accounts()).await;
                until("the answer has arrived", async || {
                    lab.audit().len() == ended
                })
                .await;
                let full = bot.send(accounts()).await.map(drop).unwrap_err();
                assert_overloaded(&full, "not_sent", "limits.answer_bytes_per_bot");
            }
            _ => {}
        }
        exchange.answer(ACCOUNTS, complete.as_bytes());
        until(&format!("the memory is free after {ending}"), async || {
            bot.clone().send(accounts()).await.is_ok()
        })
        .await;
    }
    lab.stop().await;
}

#[tokio::test]
async fn answer_in_many_chunks_or_values_takes_no_more_memory_than_its_bytes() {
    const BYTES: usize = 100_000;
    let exchange = Exchange::start("spot").await;
    let mut lab = Lab::with(Settings {
        // A busy machine needs some time for so many chunks.
        config: "[limits]\ndefault_deadline_ms = 60000".to_owned(),
        egress: "answer_timeout_ms = 60000".to_owned(),
        ..exchange.settings()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    let body = format!("{{\"code\":\"200000\",\"data\":\"{}\"}}", "x".repeat(BYTES));
    let length = body.len();
    exchange.answer(
        ACCOUNTS,
        format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}"),
    );
    bot.send(accounts()).await.unwrap();
    let before = memory(&mut lab, "VmHWM");
    let chunks: Vec<_> = body
        .chars()
        .map(|byte| format!("1\r\n{byte}\r\n"))
        .collect();
    let chunks = chunks.concat();
    exchange.answer(
        ACCOUNTS,
        format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunks}0\r\n\r\n"),
    );
    let received = bot.send(accounts()).await.unwrap();
    assert_eq!(received.body, body);
    let more = memory(&mut lab, "VmHWM") - before;
    print_always(&format!(
        "{length} bytes in chunks of one byte: {more} bytes of memory"
    ));
    assert!(more < 3_000_000, "{more}");

    // A message of many JSON values, which would take 16 times as much as parsed values.
    let zeros = vec!["0"; 3 * BYTES].join(",");
    let body = format!("{{\"code\":\"400100\",\"msg\":[{zeros}]}}");
    let length = body.len();
    exchange.answer(
        ACCOUNTS,
        format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}"),
    );
    let before = memory(&mut lab, "VmHWM");
    assert_eq!(bot.send(accounts()).await.unwrap().body, body);
    let more = memory(&mut lab, "VmHWM") - before;
    print_always(&format!(
        "message of {length} bytes: {more} bytes of memory"
    ));
    assert!(more < 6_000_000, "{more}");
    lab.process().terminate();
    lab.process().exit_code().await;
}

#[tokio::test]
async fn slow_reader_is_disconnected_at_its_deadline_although_it_keeps_reading() {
    let mut lab = Lab::start().await;
    answer(&lab, "GET", ACCOUNTS, 512 * 1024);
    let mut slow = SlowBot::open(&lab, "maker").await;
    let mut body = slow.hold(&accounts()).await.into_body();
    // It could read the whole answer, 16 KiB every 4 s, in more than two minutes. It gets 30 s, and 2 s for the size.
    let (mut waited, mut read) = (0, 0);
    while let Some(Ok(frame)) = body.frame().await {
        read += frame.into_data().unwrap_or_default().len();
        pause();
        advance(Duration::from_secs(4)).await;
        resume();
        waited += 4;
    }
    assert!(read < 512 * 1024, "it has read everything");
    assert!((32..=52).contains(&waited), "{waited} s");
    until("its memory is free", async || {
        lab.metric(IN_FLIGHT).await == Some(0.0)
    })
    .await;
    lab.patient_bot("maker")
        .await
        .send(accounts())
        .await
        .unwrap();
    lab.stop().await;
}

#[tokio::test]
async fn endless_response_of_vault_takes_little_memory() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    let before = memory(&mut lab, "VmHWM");
    lab.vault.fault(FaultRule::new("kv/", VaultFault::Endless));
    let line = lab
        .process()
        .log_line_with("response has more than 1048576 bytes")
        .await;
    assert!(line.contains("Vault unreachable"), "{line}");
    let more = memory(&mut lab, "VmHWM") - before;
    print_always(&format!(
        "endless response of Vault: {more} bytes of memory"
    ));
    assert!(more < 12_000_000, "{more}");
    lab.patient_bot("maker")
        .await
        .send(accounts())
        .await
        .unwrap();
    lab.process().terminate();
    lab.process().exit_code().await;
}
