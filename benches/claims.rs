//! Measures the tables of claims and of calls at a million entries: memory, time of a claim and of a check, and whether memory
//! grows when another million replaces the first.
//!
//! Run `cargo bench --bench claims`. Memory is the resident memory of this process.
#![expect(
    clippy::cast_precision_loss,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark panics if it cannot continue"
)]

use std::time::{Duration, Instant};

use credbroker::base;
use credbroker::base::ids::BotId;

#[path = "../src/orders/calls.rs"]
#[allow(dead_code, reason = "only a part is measured")]
mod calls;
#[path = "../src/orders/guard.rs"]
#[allow(dead_code, reason = "only a part is measured")]
mod guard;

use calls::{Call, CallState, CallTable};
use guard::{ClaimKey, ClaimedBy, Guard, GuardLimits, OrderState};

const MILLION: u64 = 1_000_000;
const BOTS: u64 = 8;

/// Source: issue "One order, once, never late": at most 96 bytes per claim.
const MOST_BYTES: f64 = 96.0;

fn main() {
    let limits = GuardLimits {
        window_s: 24 * 3600,
        claims: 1_000_000,
        claims_per_bot: 1_000_000 / 8,
    };
    let bots: Vec<BotId> = (0..BOTS)
        .map(|number| format!("bot-{number}").parse().unwrap())
        .collect();
    println!("| Table | Entries | Bytes per entry | ns per new entry | ns per look-up |");
    println!("|---|---|---|---|---|");

    let before = resident();
    let mut guard = Guard::new(limits);
    let fill = |guard: &mut Guard, first: u64, at_s: u32| {
        per_entry(|order| {
            let key = key(first + order);
            let by = ClaimedBy {
                body: order,
                endpoint: 1,
            };
            guard
                .claim(bot(&bots, order), &[vec![key]], by, at_s)
                .unwrap();
            guard.set(key, OrderState::Accepted, Some("6710d8336afcdb0007319c27"));
        })
    };
    let new = fill(&mut guard, 0, 1000);
    let first = resident() - before;
    let found = per_entry(|order| assert!(guard.find(key(order), 1000).is_some()));
    row("claims", "first million", first, new, found);
    // Each one evicts an accepted one that is older than 15 minutes.
    let new = fill(&mut guard, MILLION, 3000);
    let second = resident() - before;
    let found = per_entry(|order| assert!(guard.find(key(MILLION + order), 3000).is_some()));
    row("claims", "second million", second, new, found);
    check(first, second);
    drop(guard);

    let before = resident();
    let mut calls = CallTable::new(limits);
    let fill = |calls: &mut CallTable, first: u64, at_s: u32| {
        per_entry(|number| {
            let call = Call {
                key: key(first + number),
                claim: Some(key(number)),
                is_opaque: false,
                endpoint: 1,
                at_s,
                state: CallState::InFlight,
            };
            let id = calls.begin(bot(&bots, number), call);
            calls.set(id, CallState::Accepted);
        })
    };
    let find = |calls: &CallTable, first: u64| {
        per_entry(|number| {
            let found = calls.find(bot(&bots, number), key(first + number), 3000);
            assert!(found.is_some());
        })
    };
    let new = fill(&mut calls, 0, 1000);
    let first = resident() - before;
    row("calls", "first million", first, new, find(&calls, 0));
    let new = fill(&mut calls, MILLION, 3000);
    let second = resident() - before;
    let found = find(&calls, MILLION);
    row("calls", "second million", second, new, found);
    check(first, second);
}

/// A key like that of a keyed hash.
fn key(number: u64) -> ClaimKey {
    let mixed = |number: u64| fastrand::Rng::with_seed(number).u64(..);
    [mixed(number), mixed(!number)]
}

fn bot(bots: &[BotId], number: u64) -> &BotId {
    bots.get(usize::try_from(number % BOTS).unwrap()).unwrap()
}

/// The time of one of a million steps.
fn per_entry(mut step: impl FnMut(u64)) -> Duration {
    let start = Instant::now();
    for number in 0..MILLION {
        step(number);
    }
    start.elapsed() / 1_000_000
}

fn row(table: &str, entries: &str, bytes: f64, new: Duration, found: Duration) {
    println!(
        "| {table} | {entries} | {:.1} | {} | {} |",
        bytes / MILLION as f64,
        new.as_nanos(),
        found.as_nanos()
    );
}

fn check(first: f64, second: f64) {
    assert!(first <= MOST_BYTES * MILLION as f64, "{first} bytes");
    assert!(second <= 1.1 * first, "{first} bytes, then {second}");
}

/// Bytes of resident memory.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.unwrap().parse::<f64>().unwrap() * 1024.0
}
