//! Rotates a key 100 times under 500 requests per second of eight bots: no call fails, and no replaced key signs. Then
//! rotates to keys that the exchange rejects: no call fails either.
//!
//! Run `cargo bench --bench rotations`. The broker is a separate process; the simulated Vault, the simulated KuCoin (without
//! rate limits) and the bots share another one.
#![expect(
    clippy::cast_precision_loss,
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

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use credbroker::proto::{Outcome, RefreshKeyRequest};
use credbroker_sim::installation::{MAIN_UID, Settings};
use credbroker_sim::kucoin::{KucoinSettings, Limits, SimKey};
use tokio::time::MissedTickBehavior;

use harness::{Lab, accounts, spot_order};

const BOTS: u64 = 8;
const PER_SECOND: u64 = 500;
const ROTATIONS: u64 = 100;
const INVALID: u64 = 20;

/// Pause between two rotations.
const PAUSE: Duration = Duration::from_millis(200);

/// Tolerance: the broker knows the exchange's time only to within some milliseconds.
const CLOCK_MS: i64 = 5;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(rotations());
}

#[derive(Default)]
struct Counts {
    calls: AtomicU64,
    failed: AtomicU64,
}

fn key(number: u64) -> SimKey {
    SimKey {
        api_key: format!("simulated-key-{number:010}"),
        ..SimKey::fake(MAIN_UID)
    }
}

#[expect(clippy::too_many_lines, reason = "one measurement, step by step")]
async fn rotations() {
    let kucoin = KucoinSettings {
        limits: Limits::none(),
        keep_requests: 1_000_000,
        ..KucoinSettings::default()
    };
    let settings = Settings {
        process: true,
        kucoin,
        ..Settings::default()
    };
    let lab = Arc::new(Lab::with(settings).await);
    let (counts, is_running) = (Arc::new(Counts::default()), Arc::new(AtomicBool::new(true)));
    let mut bots = Vec::new();
    for number in 0..BOTS {
        let bot = lab.patient_bot("maker").await;
        let (counts, is_running) = (Arc::clone(&counts), Arc::clone(&is_running));
        bots.push(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(1) * 8 / 500);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            let mut calls = Vec::new();
            for step in 0_u64.. {
                ticks.tick().await;
                if !is_running.load(Ordering::Relaxed) {
                    break;
                }
                let (mut bot, counts) = (bot.clone(), Arc::clone(&counts));
                calls.push(tokio::spawn(async move {
                    let request = if step % 4 == 0 {
                        spot_order(&format!("bot-{number}-{step}"))
                    } else {
                        accounts()
                    };
                    let answer = bot.send(request).await;
                    counts.calls.fetch_add(1, Ordering::Relaxed);
                    if !matches!(&answer, Ok(answer) if answer.outcome() == Outcome::Accepted) {
                        println!("call failed: {answer:?}");
                        counts.failed.fetch_add(1, Ordering::Relaxed);
                    }
                }));
            }
            for call in calls {
                call.await.unwrap();
            }
        }));
    }
    let started = Instant::now();
    let mut durations = Vec::new();
    let mut admin = lab.admin_client("anna").await;
    let mut refresh = async |expected: u64| {
        let request = RefreshKeyRequest {
            account: "main".to_owned(),
            key: "main".to_owned(),
        };
        let state = admin.refresh_key(request).await.unwrap().into_inner().state;
        assert_eq!(state.unwrap().version, expected);
    };
    let mut before = SimKey::fake(MAIN_UID);
    for number in 2..2 + ROTATIONS {
        let next = key(number);
        lab.kucoin.add_key(next.clone());
        let put_at = Instant::now();
        lab.put_key("main", "main", &next);
        refresh(number).await;
        durations.push(put_at.elapsed());
        // At once: requests that were signed with it but arrive later are rejected, and signed again with the new key.
        lab.kucoin.remove_key(&before.api_key);
        before = next;
        tokio::time::sleep(PAUSE).await;
    }
    let at_rotated = (counts.calls.load(Ordering::Relaxed), started.elapsed());
    for number in 0..INVALID {
        lab.put_key("main", "main", &key(10_000 + number));
        refresh(1 + ROTATIONS).await;
        tokio::time::sleep(PAUSE).await;
    }
    is_running.store(false, Ordering::Relaxed);
    for bot in bots {
        bot.await.unwrap();
    }
    let failed = counts.failed.load(Ordering::Relaxed);
    durations.sort_unstable();
    let rate = at_rotated.0 as f64 / at_rotated.1.as_secs_f64();
    println!(
        "{ROTATIONS} rotations and {INVALID} rotations to rejected keys during {} calls ({rate:.0} of {PER_SECOND} per second): {failed} calls failed",
        counts.calls.load(Ordering::Relaxed)
    );
    println!(
        "from the write to Vault until the new key is active: median {} ms, maximum {} ms",
        durations[durations.len() / 2].as_millis(),
        durations[durations.len() - 1].as_millis()
    );
    let (late, again) = signed_with_replaced_keys(&lab);
    println!(
        "signatures with a replaced key: {late}; requests signed again with the new key: {again}"
    );
    lab.check_audit_log();
    assert_eq!((failed, late), (0, 0));
    assert!(
        rate > 0.95 * PER_SECOND as f64,
        "the machine is too slow: {rate:.0} calls per second"
    );
}

/// How many requests were signed with a key after the next one was active, and how many were rejected because their key
/// had been removed, and so signed again.
fn signed_with_replaced_keys(lab: &Lab) -> (usize, usize) {
    let mut replaced_ms = BTreeMap::new();
    for act in lab.acts() {
        if act["action"] == "key" && act["outcome"] == "activated" && act["account"] == "main" {
            let at_ms = act["time_ms"].as_i64().unwrap();
            replaced_ms.insert(act["version_before"].as_u64().unwrap_or_default(), at_ms);
        }
    }
    assert_eq!(replaced_ms.len() as u64, ROTATIONS + 1);
    let mut by_id = BTreeMap::from([(SimKey::fake(MAIN_UID).api_key, 1)]);
    by_id.extend((2..2 + ROTATIONS).map(|number| (key(number).api_key, number)));
    let requests = lab.kucoin.received();
    let late = requests.iter().filter(|request| {
        let version = request.header("kc-api-key").and_then(|id| by_id.get(id));
        let replaced_ms = version.and_then(|version| replaced_ms.get(version));
        let signed_ms: Option<i64> = request
            .header("kc-api-timestamp")
            .and_then(|at| at.parse().ok());
        signed_ms
            .zip(replaced_ms)
            .is_some_and(|(signed_ms, at_ms)| signed_ms > at_ms + CLOCK_MS)
    });
    let again = requests
        .iter()
        .filter(|request| request.code() == Some("400003"));
    (late.count(), again.count())
}
