//! Counts with callgrind how many instructions the broker executes and how many allocations it makes per call.
//!
//! Run `cargo bench --bench instructions --features valgrind`. Each number is the difference of two runs, with 100 and with
//! 600 calls of one bot over one connection, divided by 500, so it does not include starting and connecting. For the same
//! binary it varies by about one percent. Under valgrind the processor's SHA instructions are not available, so hashing
//! costs more than in production: compare two builds, and quote the ratio.
//!
//! A processor fills or copies a large block with one instruction (`rep stosb`), but valgrind counts one per byte, so that
//! freeing a buffer of 8 kB seems to cost thousands of instructions. Therefore libc is set to use loops for the first
//! column; the second column is the count without this setting.
//!
//! With `/dev/null` as audit log, lines are written at once, as on xfs and btrfs. The rows with a file on ext4 or tmpfs
//! include the thread that writes it.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark panics if it cannot continue"
)]

#[path = "../tests/it/harness.rs"]
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
mod harness;

use std::collections::BTreeSet;
use std::process::Command;

use credbroker::proto::{Outcome, SignAndSendRequest};
use credbroker_sim::installation::Settings;

use harness::{Lab, accounts, spot_order};

/// Makes libc use loops for blocks of any size.
const LOOPS: &str = "GLIBC_TUNABLES=glibc.cpu.x86_rep_stosb_threshold=100000000:glibc.cpu.x86_rep_movsb_threshold=100000000";

/// Audit lines are written without another thread.
const AT_ONCE: &str = "[audit]\nfile = \"/dev/null\"";

const FEW: u64 = 100;
const MANY: u64 = 600;

fn main() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("instructions: not run (valgrind is not installed)");
        return;
    }
    if !cfg!(feature = "valgrind") {
        println!("instructions: not run (requires --features valgrind)");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    println!("| Call | Instructions | Instructions, large blocks counted per byte | Allocations |");
    println!("|---|---|---|---|");
    for (name, request, audit) in [
        ("read", read as fn(u64) -> SignAndSendRequest, AT_ONCE),
        ("order", order, AT_ONCE),
        ("read, audit log in a file", read, ""),
        ("order, audit log in a file", order, ""),
    ] {
        let per_call = |tunables| {
            let count = |calls| runtime.block_on(count(calls, request, audit, tunables));
            let (few, many) = (count(FEW), count(MANY));
            let average = |of: fn(&Counts) -> u64| (of(&many) - of(&few)) / (MANY - FEW);
            (
                average(|counts| counts.instructions),
                average(|counts| counts.allocations),
            )
        };
        let (instructions, allocations) = per_call(LOOPS);
        let (counted_by_bytes, _) = per_call("GLIBC_TUNABLES=");
        println!("| {name} | {instructions} | {counted_by_bytes} | {allocations} |");
    }
}

fn read(_: u64) -> SignAndSendRequest {
    accounts()
}

fn order(number: u64) -> SignAndSendRequest {
    spot_order(&format!("order-{number}"))
}

/// The counts of a complete run of the broker.
struct Counts {
    instructions: u64,
    allocations: u64,
}

/// Counts a complete run of the broker that answers this many calls.
async fn count(
    calls: u64,
    request: fn(u64) -> SignAndSendRequest,
    audit: &str,
    tunables: &str,
) -> Counts {
    // Background work is rare, so that it does not add to a slow run.
    let settings = Settings {
        config: audit.to_owned(),
        edit: Box::new(|config| {
            config
                .replace("poll_s = 1\n", "poll_s = 60\n")
                .replace("timeout_ms = 1000", "timeout_ms = 20000")
                .replace("every_ms = 50", "every_ms = 60000")
        }),
        ..Settings::default()
    };
    let mut lab = Lab::install(settings).await;
    // Otherwise there is no audit log that could be compared with what the exchange received.
    lab.is_audit_checked = audit.is_empty();
    let profile = lab.path("callgrind.out");
    let output = format!("--callgrind-out-file={}", profile.display());
    lab.spawn_broker_under(&["env", tunables, "valgrind", "--tool=callgrind", &output])
        .await;
    lab.until_ready().await;
    let mut bot = lab.patient_bot("maker").await;
    for number in 0..calls {
        let answer = bot.send(request(number)).await.expect("an answer");
        assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
    }
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
    let profile = std::fs::read_to_string(profile).unwrap();
    let line = profile
        .lines()
        .find_map(|line| {
            line.strip_prefix("totals: ")
                .or(line.strip_prefix("summary: "))
        })
        .expect("a line with totals");
    Counts {
        instructions: line.trim().parse().unwrap(),
        allocations: allocations(&profile),
    }
}

/// Sums the calls of libc's allocation functions: lines `cfn=(id) name`, which have the name only once per id, each followed
/// by `calls=number …`.
fn allocations(profile: &str) -> u64 {
    let (mut ids, mut is_allocation, mut sum) = (BTreeSet::new(), false, 0);
    for line in profile.lines() {
        let function = line.strip_prefix("cfn=").or(line.strip_prefix("fn="));
        if let Some((id, name)) = function.and_then(|function| function.split_once(')')) {
            if [
                "malloc",
                "calloc",
                "realloc",
                "aligned_alloc",
                "posix_memalign",
            ]
            .contains(&name.trim())
            {
                ids.insert(id);
            }
            is_allocation = line.starts_with("cfn=") && ids.contains(id);
        } else if let Some(calls) = line.strip_prefix("calls=").filter(|_| is_allocation) {
            sum += calls.split(' ').next().unwrap().parse::<u64>().unwrap();
        }
    }
    sum
}
