//! Hardening of the real program: its memory is protected from other processes and from swap.

use std::process::Command;

use credbroker_sim::installation::Settings;
use futures_util::future::join_all;
use rustix::process::geteuid;
use serde_json::Value;

use crate::harness::{Lab, accounts, not_run, until};

/// The words of the line of a `/proc/PID` file that starts with `start`.
pub(crate) fn proc_line(id: u32, file: &str, start: &str) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/{id}/{file}")).unwrap();
    let line = text.lines().find(|line| line.starts_with(start)).unwrap();
    line.split_whitespace().map(str::to_owned).collect()
}

async fn start() -> Lab {
    Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await
}

/// The command prefix that drops root's capabilities, which allow a process to read any memory.
fn unprivileged() -> &'static [&'static str] {
    if geteuid().is_root() {
        &["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    } else {
        &[]
    }
}

/// A command without root's capabilities.
fn unprivileged_command(words: &[&str]) -> Command {
    let mut words = unprivileged().iter().chain(words);
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    command
}

/// Whether another process of the same user can read the memory of process `id`.
fn is_readable(id: u32) -> bool {
    let file = format!("/proc/{id}/environ");
    let output = unprivileged_command(&["cat", &file]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success() || stderr.contains("Permission denied"),
        "{stderr}"
    );
    output.status.success()
}

#[tokio::test]
async fn other_processes_of_the_user_cannot_read_its_memory_and_core_dumps_are_off() {
    let mut other = unprivileged_command(&["sleep", "60"]).spawn().unwrap();
    until("the memory of another program can be read", async || {
        is_readable(other.id())
    })
    .await;
    other.kill().unwrap();
    other.wait().unwrap();

    let mut lab = start().await;
    drop(lab.process.take());
    lab.spawn_broker_under(unprivileged()).await;
    let id = lab.process().id();
    assert!(!is_readable(id));
    assert_eq!(
        proc_line(id, "limits", "Max core file size")[4..6],
        ["0", "0"]
    );
    let files = proc_line(id, "limits", "Max open files");
    assert_eq!(files[3], files[4], "the soft limit is the hard limit");
    let log = lab
        .process()
        .log_line("process hardening done; the fields show what is in effect")
        .await;
    assert_eq!(log["undumpable"], true);
    assert_eq!(log["descriptors"].to_string(), files[3]);
}

#[tokio::test]
async fn memory_is_locked_if_allowed_or_a_warning_names_the_settings_to_change() {
    let mut lab = start().await;
    for (limit, is_locked) in [("65536", false), ("unlimited", true)] {
        drop(lab.process.take());
        let memlock = format!("--memlock={limit}:{limit}");
        let allowed = Command::new("prlimit").args([&memlock, "true"]).output();
        if !allowed.is_ok_and(|output| output.status.success()) {
            not_run(
                &format!("memory locked with limit {limit}"),
                "prlimit",
                "prlimit is missing or not permitted",
            );
            continue;
        }
        lab.spawn_broker_under(&["prlimit", &memlock]).await;
        lab.until_ready().await;
        let log = lab
            .process()
            .log_line("process hardening done; the fields show what is in effect")
            .await;
        assert_eq!(log["locked"], is_locked, "{log}");
        let id = lab.process().id();
        let locked_kb = || proc_line(id, "status", "VmLck")[1].parse::<u64>().unwrap();
        let text = lab.process().log();
        let warning = text
            .lines()
            .find(|line| line.contains("memory is not locked"));
        if is_locked {
            until("used pages are locked", async || locked_kb() > 0).await;
            assert_eq!(warning, None);
        } else {
            assert_eq!(locked_kb(), 0);
            let warning: Value = serde_json::from_str(warning.unwrap()).unwrap();
            assert_eq!(
                (&warning["level"], &warning["limit_bytes"]),
                (&"WARN".into(), &65536.into())
            );
            let fix = warning["message"].as_str().unwrap();
            assert!(
                fix.contains("LimitMEMLOCK=infinity") && fix.contains("--ulimit memlock=-1"),
                "{fix}"
            );
        }
    }
}

#[tokio::test]
async fn stderr_that_nobody_reads_stops_nothing_and_dropped_lines_are_counted_and_announced() {
    const DROPPED: &str = "credbroker_log_lines_dropped_total";
    let mut lab = Lab::with(Settings {
        process: true,
        config: "[log]\nfilter = \"trace\"".to_owned(),
        ..Settings::default()
    })
    .await;
    // Calls until more than `count` lines are dropped.
    let log_more_than = async |lab: &Lab, count: f64| {
        let mut bots = Vec::new();
        for _ in 0..8 {
            bots.push(lab.patient_bot("maker").await);
        }
        // Limited in calls and not in time, for a machine that is busy with other tests.
        for _ in 0..100 {
            let calls = bots.iter().cloned().map(|mut bot| async move {
                for _ in 0..20 {
                    bot.send(accounts()).await.unwrap();
                }
            });
            join_all(calls).await;
            assert_eq!(lab.get("/healthz").await.0, 200);
            if lab.metric(DROPPED).await > Some(count) {
                return;
            }
        }
        panic!("no lines are dropped");
    };
    assert_eq!(lab.metric(DROPPED).await, Some(0.0));
    lab.process().pause_log(true);
    log_more_than(&lab, 100.0).await;
    lab.process().pause_log(false);
    let announcement = "log lines dropped; the reader of stderr was too slow";
    let announced = lab.process().log_line(announcement).await;
    assert_eq!(announced["level"], "WARN");
    assert_eq!(announced["count"].as_f64(), lab.metric(DROPPED).await);

    lab.process().pause_log(true);
    log_more_than(&lab, announced["count"].as_f64().unwrap()).await;
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
}
