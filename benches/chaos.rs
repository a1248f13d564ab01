//! The rows of `tests/it/chaos.rs` with many calls: what the exchange, the audit log and the bots know about each order agrees.
//!
//! Run `cargo bench --bench chaos`, optionally with names of rows, `--kills 50` and `--calls 50000`. By default, the broker is
//! killed 1000 times, at least 100 calls meet the fault of each other row, and there are a million calls in all, at 200 per
//! second: about 2.5 hours. Prints the text of docs/chaos-result.md, and fails if a row is wrong.
#![expect(
    clippy::indexing_slicing,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::too_many_lines,
    clippy::unwrap_used,
    reason = "a benchmark panics if it cannot continue"
)]

#[path = "../tests/it/chaos.rs"]
#[allow(
    dead_code,
    unused_imports,
    reason = "shared with the tests, which use all of it"
)]
mod chaos;
#[path = "../tests/it/drive.rs"]
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
mod drive;
#[path = "../tests/it/harness.rs"]
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
mod harness;

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use chaos::{GROUPS, Group, Report, Row, Scale, run, table};
use harness::print_always;

/// Kills of one installation. Its audit log and the order book of its exchange grow with each.
const KILLS_AT_ONCE: u64 = 100;

/// The row with the kills, which is the last one.
const KILL: &str = "kill";

/// Calls between two kills, if there are already enough in all.
const LEAST_CALLS: u64 = 100;

const SCALE: Scale = Scale {
    per_second: 200,
    met: 100,
    kills: KILLS_AT_ONCE,
    calls_per_restart: 200,
    late_ms: 50,
    lookups_fail_for: Duration::from_secs(30),
};

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let is_ok = runtime.block_on(async { drive::simulate().await || all().await });
    // Tasks that wait for a process do not end by themselves.
    runtime.shutdown_background();
    ExitCode::from(u8::from(!is_ok))
}

/// The arguments of this program.
struct Arguments {
    rows: Vec<String>,
    kills: u64,
    calls: u64,
}

impl Arguments {
    fn read() -> Self {
        let (mut rows, mut kills, mut calls) = (Vec::new(), 1000, 1_000_000);
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut number = || -> u64 {
                let number = words.next().and_then(|number| number.parse().ok());
                number.unwrap_or_else(|| panic!("expected a number after {word}"))
            };
            match word.as_str() {
                // From cargo.
                "--bench" => {}
                "--kills" => kills = number(),
                "--calls" => calls = number(),
                _ => rows.push(word),
            }
        }
        Self { rows, kills, calls }
    }

    /// The rows of a group that are wanted.
    fn of(&self, group: &'static Group) -> Vec<&'static Row> {
        let is_wanted =
            |row: &&Row| self.rows.is_empty() || self.rows.iter().any(|wanted| wanted == row.name);
        group.rows.iter().filter(is_wanted).collect()
    }
}

async fn all() -> bool {
    let (arguments, started) = (Arguments::read(), Instant::now());
    let commit = commit();
    let mut reports: Vec<Report> = Vec::new();
    for group in GROUPS {
        let rows = arguments.of(group);
        let has_kills = rows.iter().any(|row| row.name == KILL);
        let mut left = if has_kills { arguments.kills } else { 1 };
        while left > 0 && !rows.is_empty() {
            let mut scale = SCALE;
            if has_kills {
                // The calls between kills bring them to their number.
                let calls: u64 = reports.iter().map(Report::calls).sum();
                scale.kills = left.min(KILLS_AT_ONCE);
                let calls_left = arguments.calls.saturating_sub(calls);
                scale.calls_per_restart = (calls_left / left).max(LEAST_CALLS);
            }
            left -= scale.kills.min(left);
            for new in run(group.setup, &rows, &scale, &[]).await {
                print_always(&table(std::slice::from_ref(&new)));
                match reports.iter_mut().find(|report| report.name == new.name) {
                    Some(report) => report.add(new),
                    None => reports.push(new),
                }
            }
        }
    }
    let calls: u64 = reports.iter().map(Report::calls).sum();
    let minutes = started.elapsed().as_secs() / 60;
    println!("{}", head(&arguments, &commit, calls, minutes));
    println!("{}", table(&reports));
    let is_ok = reports.iter().all(|report| {
        let met = if report.name == KILL {
            arguments.kills.min(SCALE.met)
        } else {
            SCALE.met
        };
        report.is_ok(met)
    });
    println!(
        "{}",
        if is_ok {
            "All rows are right."
        } else {
            "**Some rows are wrong.**"
        }
    );
    is_ok
}

/// The commit, and whether files differ from it.
fn commit() -> String {
    let git = |words: &[&str]| {
        let output = Command::new("git").args(words).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    let changed = if changed.is_empty() {
        ""
    } else {
        ", with changes"
    };
    git(&["rev-parse", "HEAD"]) + changed
}

fn head(arguments: &Arguments, commit: &str, calls: u64, minutes: u64) -> String {
    let Arguments {
        rows,
        kills,
        calls: wanted,
    } = arguments;
    let rows = rows.iter().map(|row| format!(" {row}"));
    let rows = rows.collect::<Vec<_>>().concat();
    format!(
        "# Result of the chaos bench

For developers: whether the exchange's order book, the audit log and what bots were told agree about every order while something fails.

Printed by `cargo bench --bench chaos -- --kills {kills} --calls {wanted}{rows}` at commit {commit}: {calls} calls in {minutes} minutes. Broker, simulated KuCoin and simulated Vault are separate processes;
two bots make {} calls per second in all, mostly orders (spot, futures, batches). One bot repeats a call after `RetryInfo`, with the same clientOid; the other one never does.

- **Lost**: reported as placed by the broker, an audit line or `GetOutcome`, but not in the order book; or the exchange got it without an `intent` line.
- **Repeated**: twice in the order book, or sent again although the first request could have placed it.
- **Late**: the exchange got it more than {} ms after its `not_after_ms`.
- **Unexplained**: reported as not placed, but in the order book; or neither the bot, the audit log nor `GetOutcome` says whether it was placed.
- **Unknown**: the same, in rows in which this is expected. **Latest**: the latest arrival of an order, compared with its `not_after_ms`; negative: before it.
",
        SCALE.per_second, SCALE.late_ms
    )
}
