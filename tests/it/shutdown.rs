//! How the broker stops, and what it leaves behind.

use std::time::Duration;

use credbroker_sim::installation::{MAIN_UID, Settings};
use credbroker_sim::kucoin::{Fault, FaultAction, When};

use crate::harness::{Lab, accounts, failure, refusal, spot_order, until};

const ORDERS: &str = "/api/v1/hf/orders";

async fn lab(config: &str) -> Lab {
    Lab::with(Settings {
        process: true,
        config: config.to_owned(),
        ..Settings::default()
    })
    .await
}

/// Sends an order that hits a fault, and waits until it has left.
async fn order_under_way(
    lab: &Lab,
    action: FaultAction,
) -> tokio::task::JoinHandle<Result<credbroker::proto::SignAndSendResponse, tonic::Status>> {
    lab.kucoin.fault(Fault::once(ORDERS, action));
    let mut bot = lab.bot("maker").await;
    let mut order = spot_order("under-way");
    "under-way".clone_into(&mut order.request_id);
    let call = tokio::spawn(async move { bot.send(order).await });
    until("the order has left", async || {
        !lab.kucoin.received().is_empty()
    })
    .await;
    call
}

#[tokio::test]
async fn sigterm_finishes_what_is_in_flight_and_exits_0() {
    let mut lab = lab("").await;
    let call = order_under_way(&lab, FaultAction::Delay { ms: 500 }).await;
    let mut idle = lab.bot("maker").await;
    lab.process().terminate();
    lab.process().log_line("stopping").await;
    // The listener is closed and the connection is told to go; whichever comes first, nothing is sent.
    if let Err(status) = idle.send(accounts()).await
        && tonic_types::StatusExt::get_details_error_info(&status).is_some()
    {
        assert_eq!(failure(&status).1, "SHUTTING_DOWN");
    }
    let placed = call.await.unwrap().unwrap();
    assert_eq!(placed.code, "200000");
    assert_eq!(lab.process().exit_code().await, Some(0));
    assert_eq!(lab.audit_of("under-way")[1]["outcome"], "accepted");
    assert_eq!(lab.kucoin.received().len(), 1);
    lab.check_record();
}

#[tokio::test]
async fn signals_of_log_rotation_end_nothing() {
    let mut lab = lab("").await;
    let call = order_under_way(&lab, FaultAction::Delay { ms: 500 }).await;
    for signal in ["HUP", "USR1", "USR2"] {
        lab.process().signal(signal);
        let process = lab.process.as_ref().unwrap();
        until(&format!("SIG{signal} is logged"), async || {
            let log = process.log();
            let mut lines = log.lines().filter(|line| line.contains("signal ignored"));
            lines.any(|line| line.contains(&format!("\"SIG{signal}\"")))
        })
        .await;
    }
    assert_eq!(call.await.unwrap().unwrap().code, "200000");
    lab.bot("maker").await.send(accounts()).await.unwrap();
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
    lab.check_record();
}

#[tokio::test]
async fn sigquit_finishes_what_is_in_flight() {
    let mut lab = lab("").await;
    let call = order_under_way(&lab, FaultAction::Delay { ms: 500 }).await;
    lab.process().signal("QUIT");
    assert_eq!(call.await.unwrap().unwrap().code, "200000");
    assert_eq!(lab.process().exit_code().await, Some(0));
    lab.check_record();
}

#[tokio::test]
async fn a_request_that_nobody_knows_the_end_of_is_recorded_and_exits_1() {
    let mut lab = lab("[limits]\ndrain_timeout_ms = 200").await;
    let call = order_under_way(
        &lab,
        FaultAction::Stall {
            when: When::AfterTaken,
        },
    )
    .await;
    lab.process().terminate();
    assert_eq!(refusal(call.await.unwrap()).1, "ANSWER_LOST");
    assert_eq!(lab.process().exit_code().await, Some(1));
    let lines = lab.audit_of("under-way");
    assert_eq!(lines[1]["outcome"], "maybe_sent");
    assert!(
        lab.process()
            .log()
            .contains("look up the lines with outcome maybe_sent")
    );
    lab.check_record();
}

#[tokio::test]
async fn a_broker_that_is_killed_leaves_the_intent_on_file() {
    let mut lab = lab("").await;
    let call = order_under_way(
        &lab,
        FaultAction::Stall {
            when: When::AfterTaken,
        },
    )
    .await;
    lab.process().signal("KILL");
    assert!(call.await.unwrap().is_err());
    assert_eq!(lab.process().exit_code().await, None);
    let lines = lab.audit_of("under-way");
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["event"], "intent");
    assert_eq!(lab.kucoin.orders(MAIN_UID).len(), 1);
    lab.spawn_broker().await;
    lab.until_ready().await;
    assert!(
        lab.bot("maker").await.send(accounts()).await.is_ok(),
        "the lock of a dead broker is free"
    );
}

#[tokio::test]
async fn a_wrong_configuration_exits_2_and_names_every_problem() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.toml");
    std::fs::write(
        &config,
        "state_dir = \"state\"\nrules = \"none.toml\"\n[egress]\naddress = 1\n",
    )
    .unwrap();
    for command in ["serve", "check-config"] {
        let run = std::process::Command::new(env!("CARGO_BIN_EXE_credbroker"));
        let output = { run }
            .args([command, "--config"])
            .arg(&config)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{command}");
        assert!(output.stdout.is_empty());
        let said = String::from_utf8(output.stderr).unwrap();
        for part in [
            "listen.grpc: is missing",
            "egress.address: invalid type",
            "fix: ",
        ] {
            assert!(said.contains(part), "{part} is not in {said}");
        }
    }
}

#[tokio::test]
async fn draining_takes_no_longer_than_it_may() {
    let mut lab = Lab::with(Settings {
        config: "[limits]\ndrain_timeout_ms = 100".to_owned(),
        ..Settings::default()
    })
    .await;
    let call = order_under_way(
        &lab,
        FaultAction::Stall {
            when: When::AfterTaken,
        },
    )
    .await;
    let unresolved = tokio::time::timeout(Duration::from_secs(10), lab.stop())
        .await
        .unwrap();
    assert_eq!(unresolved, 1);
    assert_eq!(refusal(call.await.unwrap()).1, "ANSWER_LOST");
}

#[tokio::test]
async fn a_log_that_nobody_takes_any_more_stops_nothing() {
    let mut lab = lab("").await;
    lab.process().close_log();
    let mut bot = lab.bot("maker").await;
    for index in 0..5 {
        let placed = bot
            .send(spot_order(&format!("unlogged-{index}")))
            .await
            .unwrap();
        assert_eq!(placed.code, "200000");
    }
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
    assert_eq!(lab.kucoin.orders(MAIN_UID).len(), 5);
    lab.check_record();
}
