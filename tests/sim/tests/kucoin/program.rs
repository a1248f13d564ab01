//! The simulator as a program.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use credbroker_sim::kucoin::SimKey;

use crate::client::send;

#[tokio::test]
async fn program_prints_its_urls_and_its_key() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_credbroker-sim"))
        .args(["kucoin", "--no-limits"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut line = || lines.next().unwrap().unwrap();
    assert!(line().contains("simulated"));
    let spot = line();
    let futures = line();
    let key = line();
    for (line, name) in [(&spot, "spot "), (&futures, "futures ")] {
        let url = line.strip_prefix(name).unwrap();
        let answer = send(url, "GET", "/api/v1/timestamp", &[], "")
            .await
            .unwrap();
        assert!(answer.data().is_number());
        let limit = answer.header("gw-ratelimit-limit");
        assert_eq!(limit.as_deref(), Some("1000000000"));
    }
    let key: SimKey = serde_json::from_str(key.strip_prefix("key ").unwrap()).unwrap();
    assert!(key.api_secret.contains("never-real"));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn the_program_binds_to_loopback_only() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_credbroker-sim"))
        .args(["kucoin", "--spot", "0.0.0.0:0"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let mut output = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut output)
        .unwrap();
    assert!(output.contains("loopback only"), "{output}");
}
