//! What the system is told about the real program: its memory is nobody else's.

use std::process::Command;

use credbroker_sim::installation::Settings;
use rustix::process::geteuid;
use serde_json::Value;

use crate::harness::{Lab, not_run, until};

/// The line of a file of `/proc/PID` that begins so, as words.
fn proc_line(id: u32, file: &str, start: &str) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/{id}/{file}")).unwrap();
    let line = text.lines().find(|line| line.starts_with(start)).unwrap();
    line.split_whitespace().map(str::to_owned).collect()
}

async fn running() -> Lab {
    Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await
}

/// Takes root's rights from what root starts: with them any memory can be read.
fn bare() -> &'static [&'static str] {
    if geteuid().is_root() {
        &["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    } else {
        &[]
    }
}

/// A command that is started without root's rights.
fn bare_command(words: &[&str]) -> Command {
    let mut words = bare().iter().chain(words);
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    command
}

/// Whether another process of the same user may look into the memory of this one.
fn is_readable(id: u32) -> bool {
    let look = format!("/proc/{id}/environ");
    let output = bare_command(&["cat", &look]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success() || said.contains("Permission denied"),
        "{said}"
    );
    output.status.success()
}

#[tokio::test]
async fn nobody_of_the_same_user_reads_its_memory_and_no_core_is_dumped() {
    let mut other = bare_command(&["sleep", "60"]).spawn().unwrap();
    until("the memory of any other program can be read", async || {
        is_readable(other.id())
    })
    .await;
    other.kill().unwrap();
    other.wait().unwrap();

    let mut lab = running().await;
    drop(lab.process.take());
    lab.spawn_broker_under(bare()).await;
    let id = lab.process().id();
    assert!(!is_readable(id));
    assert_eq!(
        proc_line(id, "limits", "Max core file size")[4..6],
        ["0", "0"]
    );
    let files = proc_line(id, "limits", "Max open files");
    assert_eq!(files[3], files[4], "as many as the system allows");
    let log = lab.process().log_line("process hardened").await;
    assert_eq!(log["undumpable"], true);
    assert_eq!(log["descriptors"].to_string(), files[3]);
}

#[tokio::test]
async fn memory_is_locked_where_that_is_allowed_and_the_log_says_what_to_set_where_not() {
    let mut lab = running().await;
    for (limit, is_locked) in [("65536", false), ("unlimited", true)] {
        drop(lab.process.take());
        let memlock = format!("--memlock={limit}:{limit}");
        let allowed = Command::new("prlimit").args([&memlock, "true"]).output();
        if !allowed.is_ok_and(|output| output.status.success()) {
            not_run(
                &format!("memory locked with limit {limit}"),
                "prlimit",
                "no prlimit, or no right to use it",
            );
            continue;
        }
        lab.spawn_broker_under(&["prlimit", &memlock]).await;
        lab.until_ready().await;
        let log = lab.process().log_line("process hardened").await;
        assert_eq!(log["locked"], is_locked, "{log}");
        let id = lab.process().id();
        let locked_kb = || proc_line(id, "status", "VmLck")[1].parse::<u64>().unwrap();
        let text = lab.process().log();
        let warning = text
            .lines()
            .find(|line| line.contains("memory is not locked"));
        if is_locked {
            until("pages are locked as they are used", async || {
                locked_kb() > 0
            })
            .await;
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
