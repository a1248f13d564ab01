//! How the broker stops, and its state afterwards.

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

/// Sends an order that meets a fault, and waits until the exchange has received it.
async fn order_under_way(
    lab: &Lab,
    action: FaultAction,
) -> tokio::task::JoinHandle<Result<credbroker::proto::SignAndSendResponse, tonic::Status>> {
    lab.kucoin.fault(Fault::once(ORDERS, action));
    let mut bot = lab.bot("maker").await;
    let mut order = spot_order("under-way");
    "under-way".clone_into(&mut order.request_id);
    let call = tokio::spawn(async move { bot.send(order).await });
    until("the order is sent", async || {
        !lab.kucoin.received().is_empty()
    })
    .await;
    call
}

#[tokio::test]
async fn sigterm_completes_calls_in_flight_and_exits_0() {
    let mut lab = lab("").await;
    let call = order_under_way(&lab, FaultAction::Delay { ms: 500 }).await;
    let mut idle = lab.bot("maker").await;
    lab.process().terminate();
    lab.process().log_line("stopping").await;
    // The listener closes and the connection gets a GOAWAY; in either order, nothing is sent.
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
    lab.check_audit_log();
}

#[tokio::test]
async fn log_rotation_signals_do_not_stop_the_broker() {
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
    lab.check_audit_log();
}

#[tokio::test]
async fn sigquit_completes_calls_in_flight() {
    let mut lab = lab("").await;
    let call = order_under_way(&lab, FaultAction::Delay { ms: 500 }).await;
    lab.process().signal("QUIT");
    assert_eq!(call.await.unwrap().unwrap().code, "200000");
    assert_eq!(lab.process().exit_code().await, Some(0));
    lab.check_audit_log();
}

#[tokio::test]
async fn request_with_unknown_outcome_is_audited_as_maybe_sent_and_exits_1() {
    let mut lab = lab("[limits]\ndrain_timeout_ms = 200").await;
    let call = order_under_way(
        &lab,
        FaultAction::Stall {
            when: When::AfterProcessing,
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
            .contains("find the lines with outcome maybe_sent")
    );
    lab.check_audit_log();
}

#[tokio::test]
async fn killed_broker_leaves_the_intent_in_the_audit_log() {
    let mut lab = lab("").await;
    let call = order_under_way(
        &lab,
        FaultAction::Stall {
            when: When::AfterProcessing,
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
        "the lock of a killed broker must be released"
    );
}

#[tokio::test]
async fn invalid_configuration_exits_2_and_lists_every_problem() {
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
        let stderr = String::from_utf8(output.stderr).unwrap();
        for part in [
            "listen.grpc: is missing",
            "egress.address: invalid type",
            "fix: ",
        ] {
            assert!(stderr.contains(part), "{part} is not in {stderr}");
        }
    }
}

#[tokio::test]
async fn drain_stops_after_its_timeout() {
    let mut lab = Lab::with(Settings {
        config: "[limits]\ndrain_timeout_ms = 100".to_owned(),
        ..Settings::default()
    })
    .await;
    let call = order_under_way(
        &lab,
        FaultAction::Stall {
            when: When::AfterProcessing,
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
async fn closed_log_pipe_does_not_stop_the_broker() {
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
    lab.check_audit_log();
}
