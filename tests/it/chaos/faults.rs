//! Causes the faults. Each function returns how many calls met its fault.

use std::time::Duration;

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use credbroker::clock::Clock;
use credbroker::proto::SignAndSendRequest;
use credbroker_sim::installation::{MAIN_UID, ROOT_TOKEN};
use credbroker_sim::kucoin::SimKey;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::bots::Plan;
use super::judge::Told;
use super::{Running, Scale, Site};
use crate::harness::{http, spot_order, until};

/// Calls that were in flight, or were started, while a fault was on.
struct Meeting {
    before: u64,
}

impl Meeting {
    fn begin(site: &Site) -> Self {
        Self {
            before: site.bots.started().saturating_sub(site.bots.in_flight()),
        }
    }

    fn met(&self, site: &Site) -> u64 {
        site.bots.started() - self.before
    }

    /// Waits until enough calls have met it.
    async fn until(&self, site: &Site, count: u64) {
        until("enough calls meet the fault", async || {
            self.met(site) >= count
        })
        .await;
    }
}

/// A fault of the exchange that orders, and nothing else, meet.
fn orders(times: Option<u64>, action: &Value) -> Value {
    json!({"path": "/api/v1/", "matching": "prefix", "method": "POST", "times": times, "action": action})
}

/// Some orders meet a fault of the exchange.
pub(super) fn hit<'a>(site: &'a mut Site, scale: &'a Scale, action: Value) -> Running<'a> {
    Box::pin(async move { hit_orders(site, scale.met, action).await })
}

async fn hit_orders(site: &Site, count: u64, action: Value) -> u64 {
    let before = site.hits().await;
    let fault = orders(Some(count), &action);
    site.kucoin.control("POST", "fault", fault).await;
    until("enough orders meet the fault", async || {
        site.hits().await >= before + count
    })
    .await;
    site.hits().await - before
}

async fn lose_answers(site: &Site, count: u64) -> u64 {
    hit_orders(site, count, json!({"close": {"when": "after_processing"}})).await
}

pub(super) async fn lookup_lag(site: &mut Site, scale: &Scale, ms: u32) -> u64 {
    let set = async |ms: u32| {
        let lag = json!({"ms": ms});
        site.kucoin.control("POST", "lookup-lag", lag).await;
    };
    set(ms).await;
    let met = lose_answers(site, scale.met).await;
    sleep(Duration::from_millis(ms.into()) + Duration::from_secs(1)).await;
    set(0).await;
    met
}

pub(super) async fn lookups_fail(site: &mut Site, scale: &Scale) -> u64 {
    for path in [
        "/api/v1/hf/orders/client-order/",
        "/api/v1/orders/byClientOid",
    ] {
        let action = json!({"html": {"status": 502, "when": "before_processing"}});
        let fault = json!({"path": path, "matching": "prefix", "method": "GET", "action": action});
        site.kucoin.control("POST", "fault", fault).await;
    }
    let met = lose_answers(site, scale.met).await;
    sleep(scale.lookups_fail_for).await;
    met
}

/// The path of orders of [`older_order`], which no other order uses.
const OWN_PATH: &str = "/api/v1/hf/orders/sync";

pub(super) async fn older_order(site: &mut Site, scale: &Scale) -> u64 {
    let count = scale.met.max(6);
    let orders: Vec<_> = (0..count)
        .map(|number| {
            let oid = format!("older-order_x_{number}");
            let order = SignAndSendRequest {
                path: OWN_PATH.to_owned(),
                ..spot_order(&oid)
            };
            (oid, order)
        })
        .collect();
    for (_, order) in &orders {
        place_without_broker(site, order).await;
    }
    // Older than the difference of clocks that the broker allows for.
    sleep(Duration::from_secs(6)).await;
    for (number, (oid, order)) in orders.into_iter().enumerate() {
        if number % 2 == 0 {
            let action = json!({"close": {"when": "before_processing"}});
            let fault = json!({"path": OWN_PATH, "times": 1, "action": action});
            site.kucoin.control("POST", "fault", fault).await;
        }
        site.bots.send(&oid, order).await;
    }
    count
}

/// Places an order with the account's key, like another program of its owner.
async fn place_without_broker(site: &Site, order: &SignAndSendRequest) {
    let key = SimKey::fake(MAIN_UID);
    let mac = |text: &str| {
        let key = hmac::Key::new(hmac::HMAC_SHA256, key.api_secret.as_bytes());
        STANDARD.encode(hmac::sign(&key, text.as_bytes()))
    };
    let (path, body) = (&order.path, str::from_utf8(&order.body).unwrap());
    let time_ms = Clock::system().wall_ms();
    let headers = [
        ("KC-API-KEY", key.api_key.clone()),
        ("KC-API-SIGN", mac(&format!("{time_ms}POST{path}{body}"))),
        ("KC-API-TIMESTAMP", time_ms.to_string()),
        ("KC-API-PASSPHRASE", mac(&key.passphrase)),
        ("KC-API-KEY-VERSION", key.version.to_string()),
        ("content-type", "application/json".to_owned()),
    ];
    let headers = headers.map(|(name, value)| format!("{name}: {value}\r\n"));
    let headers = headers.concat();
    let authority = site.kucoin.address(0).to_string();
    let (_, _, answer) = http(&authority, &format!("POST {path}"), &headers, body)
        .await
        .unwrap();
    assert!(answer.contains("200000"), "{answer}");
}

async fn set_clock(site: &Site, offset_ms: i64) {
    site.kucoin
        .control("POST", "clock", json!({"offset_ms": offset_ms}))
        .await;
}

pub(super) async fn clock_jump(site: &mut Site, scale: &Scale) -> u64 {
    let rejected = async |site: &Site| -> u64 {
        let received = site.kucoin.control("GET", "received", Value::Null).await;
        let requests = received["requests"].as_array().unwrap().iter();
        let wrong_time = requests.filter(|request| request["signature"] == "refused");
        wrong_time
            .map(|request| request["count"].as_u64().unwrap())
            .sum()
    };
    let before = rejected(site).await;
    for jump in 0.. {
        if rejected(site).await >= before + scale.met && jump % 2 == 0 {
            break;
        }
        let offset_ms = if jump % 2 == 0 { 20_000 } else { 0 };
        set_clock(site, offset_ms).await;
        until_placed_again(site).await;
    }
    rejected(site).await - before
}

/// Waits until orders are placed that were sent after this moment.
async fn until_placed_again(site: &Site) {
    static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    until("orders are placed", async || {
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let oid = format!("{}_x_{number}", site.bots.row());
        matches!(
            site.bots.send(&oid, spot_order(&oid)).await,
            Told::Placed(_)
        )
    })
    .await;
}

async fn stop_fronts(site: &mut Site) {
    for front in &mut site.fronts {
        front.stop().await;
    }
}

async fn start_fronts(site: &mut Site, is_expired: bool) {
    let ca = &site.exchange_ca;
    let identity = if is_expired {
        ca.server_within(0..1_000_000_000)
    } else {
        ca.server()
    };
    for front in &mut site.fronts {
        front.start_again(identity.as_ref().unwrap()).await;
    }
}

pub(super) async fn refused(site: &mut Site, scale: &Scale) -> u64 {
    let meeting = Meeting::begin(site);
    stop_fronts(site).await;
    sleep(Duration::from_secs(1)).await;
    meeting.until(site, scale.met).await;
    let met = meeting.met(site);
    start_fronts(site, false).await;
    until_placed_again(site).await;
    met
}

/// The text of `/etc/hosts` with this address of the exchange.
pub(super) fn hosts(address: Option<&str>) -> String {
    address.map_or(String::new(), |address| format!("{address} localhost\n"))
}

pub(super) async fn dns(site: &mut Site, scale: &Scale) -> u64 {
    let set = |site: &Site, address| {
        // In place, because the file is mounted.
        std::fs::write(site.lab.path("hosts"), hosts(address)).unwrap();
    };
    let failures = |site: &Site| site.bots.failed_with("EXCHANGE_UNREACHABLE");
    let before = failures(site);
    set(site, None);
    stop_fronts(site).await;
    until("calls fail", async || failures(site) >= before + scale.met).await;
    let met = failures(site) - before;
    for address in ["127.0.0.2", "127.0.0.1"] {
        stop_fronts(site).await;
        for front in &mut site.fronts {
            front.address.set_ip(address.parse().unwrap());
        }
        set(site, Some(address));
        start_fronts(site, false).await;
        until_placed_again(site).await;
    }
    met
}

pub(super) async fn tls_expired(site: &mut Site, scale: &Scale) -> u64 {
    let failures = |site: &Site| {
        ["EXCHANGE_UNREACHABLE", "EGRESS_MISMATCH"]
            .iter()
            .map(|reason| site.bots.failed_with(reason))
            .sum::<u64>()
    };
    let before = failures(site);
    stop_fronts(site).await;
    start_fronts(site, true).await;
    until("calls fail", async || failures(site) >= before + scale.met).await;
    let met = failures(site) - before;
    stop_fronts(site).await;
    start_fronts(site, false).await;
    until_placed_again(site).await;
    met
}

/// Orders that are useful for only 300 ms.
fn short(row: &'static str) -> Plan {
    Plan {
        deadline: Duration::from_millis(300),
        not_after: Duration::from_millis(300),
        ..Plan::usual(row)
    }
}

/// How often bots or broker stand still.
fn pauses(scale: &Scale) -> u64 {
    scale.met.div_ceil(5)
}

pub(super) async fn held_up(site: &mut Site, scale: &Scale) -> u64 {
    site.bots.plan(short("held-up"));
    let mut met = 0;
    for _ in 0..pauses(scale) {
        site.more_calls(scale.met).await;
        let meeting = Meeting::begin(site);
        site.proxy.pause(true);
        sleep(Duration::from_secs(2)).await;
        met += meeting.met(site);
        site.proxy.pause(false);
    }
    site.more_calls(scale.met).await;
    met
}

pub(super) async fn hang_up(site: &mut Site, scale: &Scale) -> u64 {
    site.bots.plan(Plan {
        hang_up: Some(Duration::from_millis(5)),
        ..Plan::usual("hang-up")
    });
    // So that most calls are in flight when their bot hangs up.
    let slow = orders(None, &json!({"delay": {"ms": 20}}));
    site.kucoin.control("POST", "fault", slow).await;
    let before = site.bots.hung_up();
    for _ in 0..3 {
        site.more_calls(scale.met).await;
        site.proxy.open();
    }
    until("enough calls are cancelled", async || {
        site.bots.hung_up() >= before + scale.met
    })
    .await;
    site.bots.hung_up() - before
}

pub(super) async fn stopped(site: &mut Site, scale: &Scale) -> u64 {
    site.bots.plan(short("stopped"));
    let mut met = 0;
    for _ in 0..pauses(scale) {
        site.more_calls(scale.met).await;
        let meeting = Meeting::begin(site);
        site.lab.process().signal("STOP");
        site.stops += 1;
        sleep(Duration::from_secs(2)).await;
        met += meeting.met(site);
        site.lab.process().signal("CONT");
    }
    site.more_calls(scale.met).await;
    met
}

/// How long an outage of Vault lasts: longer than two polls.
const OUTAGE: Duration = Duration::from_millis(2500);

async fn during_outage(site: &Site, scale: &Scale) -> u64 {
    let meeting = Meeting::begin(site);
    sleep(OUTAGE).await;
    meeting.until(site, scale.met).await;
    meeting.met(site)
}

pub(super) async fn vault_sealed(site: &mut Site, scale: &Scale) -> u64 {
    site.vault.control("POST", "seal", json!({})).await;
    let met = during_outage(site, scale).await;
    site.vault.control("POST", "unseal", json!({})).await;
    met
}

pub(super) async fn vault_fault(site: &mut Site, scale: &Scale, fault: Value) -> u64 {
    let hits = async |site: &Site| {
        let answer = site.vault.control("GET", "fault", Value::Null).await;
        answer["hits"].as_u64().unwrap()
    };
    let before = hits(site).await;
    site.vault.control("POST", "fault", fault).await;
    let met = during_outage(site, scale).await;
    // Late after an earlier outage, because of the backoff.
    until("the broker calls Vault", async || hits(site).await > before).await;
    site.vault.control("DELETE", "fault", Value::Null).await;
    met
}

pub(super) async fn vault_gone(site: &mut Site, scale: &Scale) -> u64 {
    site.vault.kill();
    let met = during_outage(site, scale).await;
    site.vault.start(ROOT_TOKEN).await;
    met
}

/// Sends orders again that were placed. An answer that one was not sent makes it unexplained.
async fn send_known(site: &Site, scale: &Scale) -> u64 {
    let known = site.bots.known_orders(usize::try_from(scale.met).unwrap());
    for (oid, order) in &known {
        site.bots.send(oid, order.clone()).await;
    }
    known.len() as u64
}

/// Waits until calls fail with this reason that were sent after this moment.
async fn until_refused(site: &Site, reason: &str) {
    let before = site.bots.failed_with(reason);
    until(&format!("calls are refused with {reason}"), async || {
        site.bots.failed_with(reason) > before + 2
    })
    .await;
}

async fn admin(site: &Site, words: &[&str]) {
    let output = site.lab.admin_cli("anna", words).await;
    assert_eq!(output.code, Some(0), "{output:?}");
}

pub(super) async fn known_while_halted(site: &mut Site, scale: &Scale) -> u64 {
    admin(site, &["halt", "--all"]).await;
    until_refused(site, "ACCOUNT_FROZEN").await;
    let met = send_known(site, scale).await;
    admin(site, &["resume", "--all", "--yes"]).await;
    until_placed_again(site).await;
    met
}

pub(super) async fn known_while_egress_is_wrong(site: &mut Site, scale: &Scale) -> u64 {
    let other = json!({"address": "203.0.113.7"});
    site.kucoin.control("POST", "source-address", other).await;
    until_refused(site, "EGRESS_MISMATCH").await;
    let met = send_known(site, scale).await;
    let real = json!({"address": null});
    site.kucoin.control("POST", "source-address", real).await;
    until_placed_again(site).await;
    met
}

pub(super) async fn known_while_clock_is_wrong(site: &mut Site, scale: &Scale) -> u64 {
    set_clock(site, 2 * 86_400_000).await;
    until_refused(site, "CLOCK_UNCERTAIN").await;
    let met = send_known(site, scale).await;
    set_clock(site, 0).await;
    until_placed_again(site).await;
    met
}

/// Limits the size of the broker's files, like a full disk; `None` removes the limit.
fn limit_files(site: &mut Site, bytes: Option<u64>) {
    let id = site.lab.process().id();
    let pid = Pid::from_raw(i32::try_from(id).unwrap());
    let limit = Rlimit {
        current: bytes,
        maximum: None,
    };
    prlimit(pid, Resource::Fsize, limit).unwrap();
}

pub(super) async fn known_while_audit_disk_is_full(site: &mut Site, scale: &Scale) -> u64 {
    let log = site.lab.path("state/audit.jsonl");
    let length = std::fs::metadata(log).unwrap().len();
    limit_files(site, Some(length + 100));
    until_refused(site, "AUDIT_UNAVAILABLE").await;
    let met = send_known(site, scale).await;
    limit_files(site, None);
    until_placed_again(site).await;
    met
}

pub(super) async fn known_while_audit_disk_hangs(site: &mut Site, scale: &Scale) -> u64 {
    site.more_calls(10 * scale.met).await;
    site.disk.as_ref().unwrap().hang(true);
    until_refused(site, "AUDIT_UNAVAILABLE").await;
    let met = send_known(site, scale).await;
    site.disk.as_ref().unwrap().hang(false);
    until_placed_again(site).await;
    met
}

pub(super) async fn known_while_draining(site: &mut Site, scale: &Scale) -> u64 {
    let before = site.hits().await;
    let hold = orders(Some(1), &json!({"hold": {}}));
    site.kucoin.control("POST", "fault", hold).await;
    until("an order is in flight", async || site.hits().await > before).await;
    site.lab.process().terminate();
    until_refused(site, "SHUTTING_DOWN").await;
    let met = send_known(site, scale).await;
    site.kucoin.control("DELETE", "fault", Value::Null).await;
    site.restart().await;
    until_placed_again(site).await;
    met
}

/// Orders take some time at the exchange, so that about three are in flight whenever the broker ends: more would have to wait
/// long for their lookups.
async fn slow_orders(site: &Site, scale: &Scale) {
    let ms = 3000 / scale.per_second;
    let slow = orders(None, &json!({"delay": {"ms": ms}}));
    site.kucoin.control("POST", "fault", slow).await;
}

pub(super) async fn terminated(site: &mut Site, scale: &Scale) -> u64 {
    slow_orders(site, scale).await;
    let mut met = 0;
    while met < scale.met {
        site.more_calls(scale.calls_per_restart).await;
        met += site.bots.in_flight();
        site.lab.process().terminate();
        site.restart().await;
    }
    met
}

pub(super) async fn killed(site: &mut Site, scale: &Scale) -> u64 {
    slow_orders(site, scale).await;
    let mut met = 0;
    for _ in 0..scale.kills {
        site.more_calls(scale.calls_per_restart).await;
        met += site.bots.in_flight();
        site.lab.process().signal("KILL");
        site.restart().await;
    }
    met
}
