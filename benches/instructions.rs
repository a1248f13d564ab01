//! Instructions that the broker's process executes for one call, and memory that it allocates, counted by callgrind.
//!
//! `cargo bench --bench instructions --features valgrind`. Each number is the difference of two runs, with 100 and with
//! 600 calls of one bot over one connection, divided by 500: what starting and connecting cost is in neither. It
//! repeats within about one percent for the same binary. Valgrind hides the processor's SHA instructions, so hashing
//! weighs more here than it does in production; compare two builds, and quote the ratio.
//!
//! A processor executes one instruction to fill or copy a large block (`rep stosb`); valgrind counts one per byte, which
//! makes a freed buffer of 8 kB look like a thousand lines of code. So libc is told to use loops for the first column;
//! the second is what valgrind counts otherwise.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a measurement that cannot go on says so by panicking"
)]

#[path = "../tests/it/harness.rs"]
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
mod harness;

use std::collections::BTreeSet;
use std::process::Command;

use credbroker::proto::{Outcome, SignAndSendRequest};
use credbroker_sim::installation::Settings;

use harness::{Lab, accounts, spot_order};

/// Tells libc to use loops for blocks of any size.
const LOOPS: &str = "GLIBC_TUNABLES=glibc.cpu.x86_rep_stosb_threshold=100000000:glibc.cpu.x86_rep_movsb_threshold=100000000";

const FEW: u64 = 100;
const MANY: u64 = 600;

fn main() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("instructions: not run, valgrind is not installed");
        return;
    }
    if !cfg!(feature = "valgrind") {
        println!("instructions: not run, it needs --features valgrind");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    println!("| Call | Instructions | Bytes of large blocks counted one by one | Allocations |");
    println!("|---|---|---|---|");
    for (name, request) in [
        ("read", read as fn(u64) -> SignAndSendRequest),
        ("order", order),
    ] {
        let per_call = |tunables| {
            let count = |calls| runtime.block_on(count(calls, request, tunables));
            let (few, many) = (count(FEW), count(MANY));
            let each = |of: fn(&Counts) -> u64| (of(&many) - of(&few)) / (MANY - FEW);
            (
                each(|counts| counts.instructions),
                each(|counts| counts.allocations),
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

/// What a whole run of the broker costs.
struct Counts {
    instructions: u64,
    allocations: u64,
}

/// Counts a whole run of the broker that answers this many calls.
async fn count(calls: u64, request: fn(u64) -> SignAndSendRequest, tunables: &str) -> Counts {
    // What goes on in the background takes no part of a slow run.
    let settings = Settings {
        edit: Box::new(|config| {
            config
                .replace("poll_s = 1\n", "poll_s = 60\n")
                .replace("timeout_ms = 1000", "timeout_ms = 20000")
                .replace("every_ms = 50", "every_ms = 60000")
        }),
        ..Settings::default()
    };
    let mut lab = Lab::install(settings).await;
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
        .expect("callgrind sums up");
    Counts {
        instructions: line.trim().parse().unwrap(),
        allocations: allocations(&profile),
    }
}

/// Sums the calls of libc's allocating functions: a line `cfn=(id) name`, whose name is given once, and `calls=number …`
/// after it.
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
