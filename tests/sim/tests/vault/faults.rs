//! Faults of the simulated Vault.

use std::time::{Duration, Instant};

use credbroker_sim::vault::{Fault, FaultRule};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::{call, host};
use crate::{SECRET, read, with_secret};

#[tokio::test]
async fn status_faults_return_the_status_and_an_errors_body() {
    let (sim, token) = with_secret().await;
    for code in [400, 403, 404, 412, 429, 472, 473, 500, 501, 502, 503, 504] {
        let retry_after_s = (code == 429).then_some(7);
        let fault = Fault::Status {
            code,
            retry_after_s,
        };
        sim.fault(FaultRule::new("kv/", fault).times(1));
        let answer = read(&sim, &token).await;
        assert_eq!(answer.status, code);
        assert!(answer.body["errors"].is_array());
        assert_eq!(answer.header("retry-after"), retry_after_s.map(|_| "7"));
    }
    assert_eq!(read(&sim, &token).await.status, 200);
}

#[tokio::test]
async fn a_fault_hits_only_its_path_method_and_number_of_requests() {
    let (sim, token) = with_secret().await;
    let fault = Fault::Status {
        code: 500,
        retry_after_s: None,
    };
    sim.fault(FaultRule::new("/v1/kv/metadata/", fault.clone()));
    sim.fault(FaultRule::new("kv/data/", fault.clone()).method("POST"));
    assert_eq!(read(&sim, &token).await.status, 200);
    sim.fault(FaultRule::new("", fault).times(2));
    for status in [500, 500, 200] {
        assert_eq!(read(&sim, &token).await.status, status);
    }
    let metadata = call("GET", "/v1/kv/metadata/kucoin/prod/main").header("X-Vault-Token", &token);
    assert_eq!(metadata.clone().send(&sim.address()).await.status, 500);
    sim.clear_faults();
    assert_eq!(metadata.send(&sim.address()).await.status, 200);
}

#[tokio::test]
async fn delayed_answer_arrives_late_and_complete() {
    let (sim, token) = with_secret().await;
    sim.fault(FaultRule::new("kv/", Fault::Delay { ms: 40 }));
    let sent = Instant::now();
    assert_eq!(read(&sim, &token).await.status, 200);
    assert!(sent.elapsed() >= Duration::from_millis(40));
}

#[tokio::test]
async fn hanging_and_closed_requests_get_no_answer() {
    let (sim, token) = with_secret().await;
    sim.fault(FaultRule::new("kv/", Fault::Hang).times(1));
    let mut hanging = Box::pin(read(&sim, &token));
    let patience = Duration::from_millis(40);
    while sim.requests().is_empty() {
        assert!(tokio::time::timeout(patience, &mut hanging).await.is_err());
    }
    assert!(tokio::time::timeout(patience, hanging).await.is_err());
    sim.fault(FaultRule::new("kv/", Fault::Close).times(1));
    let call = call("GET", SECRET).header("X-Vault-Token", &token);
    assert_eq!(call.bytes(&sim.address()).await, b"");
    let statuses: Vec<_> = sim.requests().iter().map(|seen| seen.status).collect();
    assert_eq!(statuses, [None, None]);
}

#[tokio::test]
async fn half_body_fault_sends_half_of_the_announced_length() {
    let (sim, token) = with_secret().await;
    let complete = read(&sim, &token).await;
    sim.fault(FaultRule::new("kv/", Fault::HalfBody));
    let call = call("GET", SECRET).header("X-Vault-Token", &token);
    let answer = String::from_utf8(call.bytes(&sim.address()).await).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let announced = complete.header("content-length").unwrap();
    assert!(head.contains(&format!("content-length: {announced}")));
    assert_eq!(body.len(), announced.parse::<usize>().unwrap() / 2);
}

#[tokio::test]
async fn wrong_json_and_not_json_faults_return_status_200() {
    let (sim, token) = with_secret().await;
    sim.fault(FaultRule::new("kv/", Fault::WrongJson).times(1));
    let answer = read(&sim, &token).await;
    assert_eq!(answer.body["data"][0]["data"]["api_key"], "fake-key");
    sim.fault(FaultRule::new("kv/", Fault::NotJson).times(1));
    let answer = read(&sim, &token).await;
    assert_eq!(
        (answer.status, answer.header("content-type")),
        (200, Some("text/html; charset=utf-8"))
    );
}

#[tokio::test]
async fn a_redirect_keeps_path_and_query() {
    let (sim, token) = with_secret().await;
    let to = "http://127.0.0.1:1/".to_owned();
    sim.fault(FaultRule::new("kv/", Fault::Redirect { to }));
    let path = format!("{SECRET}?version=1");
    let answer = call("GET", &path)
        .header("X-Vault-Token", &token)
        .send(&sim.address())
        .await;
    assert_eq!(answer.status, 307);
    assert_eq!(
        answer.header("location"),
        Some(&*format!("http://127.0.0.1:1{path}"))
    );
}

#[tokio::test]
async fn endless_answer_is_larger_than_any_answer_of_vault() {
    let (sim, token) = with_secret().await;
    sim.fault(FaultRule::new("kv/", Fault::Endless).times(1));
    let mut stream = TcpStream::connect(host(&sim.address())).await.unwrap();
    let request =
        format!("GET {SECRET} HTTP/1.1\r\nhost: localhost\r\nx-vault-token: {token}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut start = vec![0; 8_000_000];
    stream.read_exact(&mut start).await.unwrap();
    let head = String::from_utf8_lossy(&start[..200]);
    assert!(
        head.contains("\r\n\r\nb\r\n{\"data\": \"x\r\n4000\r\nxxx"),
        "{head}"
    );
    assert_eq!(read(&sim, &token).await.status, 200);
}
