//! The egress check: the broker asks KuCoin which address it sees, over the same network path as orders.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use credbroker::config::Config;
use credbroker::proto::{Outcome, SignAndSendRequest};
use credbroker_sim::installation::{MAIN_UID, Settings};
use credbroker_sim::kucoin::{Fault, FaultAction, SimKey, When};
use credbroker_sim::proxy::Proxy;
use serde_json::json;
use tonic::Code;

use crate::harness::{
    Bot, Lab, Time, accounts, failure, futures_order, not_run, spot_cancel_all, spot_order, until,
};

/// Slightly longer than the default of `egress.proof_every_s`.
const NEXT_PROOF: Duration = Duration::from_secs(310);

const WRONG: &str = "requests leave from 127.0.0.2 instead of egress.expected_ip 127.0.0.3";

/// Settings with egress address 127.0.0.2 and additional `[egress]` settings.
fn settings(egress: &str) -> Settings {
    Settings {
        address: "127.0.0.2",
        egress: egress.to_owned(),
        wait_ready: false,
        ..Settings::default()
    }
}

async fn started(egress: &str) -> (Lab, Time) {
    let mut lab = Lab::install(settings(egress)).await;
    let time = Time::new(0);
    lab.start_broker_on(time.clock()).await;
    (lab, time)
}

/// Makes every egress check fail in this way from now on.
fn fault(lab: &Lab, action: FaultAction) {
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once("/api/v1/my-ip", action)
    });
}

/// Makes the exchange report this address.
fn sees(lab: &Lab, address: &str) {
    let action = FaultAction::Answer {
        status: 200,
        body: json!({"code": "200000", "data": address}),
        when: When::BeforeProcessing,
    };
    fault(lab, action);
}

fn closed() -> FaultAction {
    FaultAction::Close {
        when: When::BeforeProcessing,
    }
}

/// The number of egress checks that the exchange has received.
fn egress_checks(lab: &Lab) -> usize {
    let all = lab.kucoin.everything_received();
    all.iter()
        .filter(|request| request.path() == "/api/v1/my-ip")
        .count()
}

async fn until_metric(lab: &Lab, name: &str, value: f64) {
    until(&format!("{name} is {value}"), async || {
        lab.metric(name).await == Some(value)
    })
    .await;
}

/// Waits until keys and time are ready, whatever the egress check returns.
async fn until_clock_and_keys(lab: &Lab) {
    lab.until_keys_loaded().await;
    until("the time is measured", async || {
        !lab.get("/readyz").await.1.contains("clock ")
    })
    .await;
}

async fn accepted(bot: &mut Bot, request: SignAndSendRequest) {
    let answer = bot.send(request).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
}

/// Checks that orders to both hosts are rejected with exactly this message, and that other requests still work.
async fn assert_only_orders_are_rejected(lab: &Lab, message: &str) {
    let mut bot = lab.bot("maker").await;
    let before = lab.kucoin.received().len();
    for order in [spot_order("refused"), futures_order("refused")] {
        let status = bot.send(order).await.unwrap_err();
        let (code, reason, outcome, request_id) = failure(&status);
        assert_eq!(
            (code, reason.as_str(), outcome.as_str(), status.message()),
            (
                Code::FailedPrecondition,
                "EGRESS_MISMATCH",
                "not_sent",
                format!("{message}; nothing was sent").as_str()
            )
        );
        let lines = lab.audit_of(&request_id);
        assert_eq!((lines.len(), &lines[0]["event"]), (1, &json!("denied")));
        assert_eq!(lines[0]["reason"], "EGRESS_MISMATCH");
    }
    accepted(&mut bot, accounts()).await;
    accepted(&mut bot, spot_cancel_all()).await;
    let methods: Vec<_> = lab.kucoin.received().split_off(before);
    let methods: Vec<_> = methods
        .iter()
        .map(|request| request.method.as_str())
        .collect();
    assert_eq!(methods, ["GET", "DELETE"]);
}

async fn assert_orders_are_accepted(lab: &Lab) {
    let mut bot = lab.bot("maker").await;
    let name = format!("order-{}", lab.kucoin.received().len());
    accepted(&mut bot, spot_order(&name)).await;
    accepted(&mut bot, futures_order(&name)).await;
}

#[tokio::test]
async fn egress_check_at_start_uses_the_same_address_as_orders() {
    let (mut lab, _) = started("").await;
    lab.until_ready().await;
    assert_orders_are_accepted(&lab).await;
    let all = lab.kucoin.everything_received();
    let peers: BTreeSet<_> = all
        .iter()
        .map(|request| request.peer.ip().to_string())
        .collect();
    assert_eq!(peers, BTreeSet::from(["127.0.0.2".to_owned()]));
    assert_eq!(egress_checks(&lab), 1);
    assert_eq!(lab.metric("egress_mismatch").await, Some(0.0));
    assert_eq!(lab.metric("egress_check_failed").await, Some(0.0));
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(
        text.contains(
            "egress: at the last successful check 0 s ago, the exchange saw address 127.0.0.2\n"
        ),
        "{text}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn no_order_is_sent_when_the_egress_address_differs_from_expected_ip() {
    let (mut lab, _) = started("expected_ip = \"127.0.0.3\"").await;
    until_clock_and_keys(&lab).await;
    until("the exchange has reported the address", async || {
        lab.metric("egress_proof_age_seconds").await.is_some()
    })
    .await;
    let (status, text) = lab.get("/readyz").await;
    assert_eq!(
        (status, text),
        (503, format!("not ready\negress: {WRONG}\n"))
    );
    assert_eq!(lab.metric("egress_mismatch").await, Some(1.0));
    assert_eq!(lab.metric("ready").await, Some(0.0));
    assert_only_orders_are_rejected(&lab, WRONG).await;
    lab.stop().await;
}

#[tokio::test]
async fn lenient_reports_a_wrong_egress_address_and_still_sends_orders() {
    let (mut lab, _) = started("expected_ip = \"127.0.0.3\"\nproof = \"lenient\"").await;
    lab.until_ready().await;
    until("the exchange has reported the address", async || {
        lab.metric("egress_proof_age_seconds").await.is_some()
    })
    .await;
    let (status, text) = lab.get("/readyz").await;
    assert_eq!(status, 200);
    assert!(
        text.contains("127.0.0.2") && text.contains("127.0.0.3"),
        "{text}"
    );
    assert_eq!(lab.metric("egress_mismatch").await, Some(1.0));
    assert_orders_are_accepted(&lab).await;
    lab.stop().await;
}

#[tokio::test]
async fn no_order_is_sent_before_the_egress_address_is_verified_unless_lenient() {
    let unproven = "the exchange has not confirmed yet that requests leave from 127.0.0.2";
    for (mode, is_strict) in [("strict", true), ("lenient", false)] {
        let mut lab = Lab::install(settings(&format!("proof = \"{mode}\""))).await;
        fault(&lab, closed());
        let time = Time::new(0);
        lab.start_broker_on(time.clock()).await;
        until_clock_and_keys(&lab).await;
        until_metric(&lab, "egress_check_failed", 1.0).await;
        assert_eq!(lab.metric("egress_mismatch").await, Some(1.0));
        assert_eq!(lab.metric("egress_proof_age_seconds").await, None);
        let (status, text) = lab.get("/readyz").await;
        assert!(text.contains(unproven), "{text}");
        assert_eq!(status, if is_strict { 503 } else { 200 });
        if is_strict {
            assert_only_orders_are_rejected(&lab, unproven).await;
        } else {
            assert_orders_are_accepted(&lab).await;
        }
        lab.kucoin.clear_faults();
        // A failed check is repeated much sooner than a successful one.
        time.pass(&lab, Duration::from_secs(40)).await;
        until_metric(&lab, "egress_mismatch", 0.0).await;
        lab.until_ready().await;
        assert_orders_are_accepted(&lab).await;
        lab.stop().await;
    }
}

#[tokio::test]
async fn failed_first_egress_check_is_not_logged_as_if_there_were_a_last_result() {
    let mut lab = Lab::install(settings("")).await;
    fault(&lab, closed());
    lab.spawn_broker().await;
    let message = "egress IP check failed; address not confirmed yet";
    lab.process().log_line(message).await;
    assert!(!lab.process().log().contains("keeping last result"));
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
}

#[tokio::test]
async fn failed_egress_check_keeps_the_last_result() {
    let failures = [
        closed(),
        FaultAction::Html {
            status: 502,
            when: When::BeforeProcessing,
        },
        FaultAction::RateLimited { reset_ms: None },
        FaultAction::Answer {
            status: 200,
            body: json!({"code": "200000", "data": "not an address"}),
            when: When::BeforeProcessing,
        },
        // An error that contains an address does not verify it.
        FaultAction::Answer {
            status: 200,
            body: json!({"code": "500000", "data": "127.0.0.9"}),
            when: When::BeforeProcessing,
        },
    ];
    let (mut lab, time) = started("").await;
    lab.until_ready().await;
    let mut last = 0.0;
    for failure in failures {
        fault(&lab, failure);
        time.pass(&lab, NEXT_PROOF).await;
        until_metric(&lab, "egress_check_failed", 1.0).await;
        assert_eq!(lab.metric("egress_mismatch").await, Some(0.0));
        let age = lab.metric("egress_proof_age_seconds").await.unwrap();
        assert!(age >= 310.0 && age > last, "{age} after {last}");
        last = age;
        let (status, text) = lab.get("/readyz?verbose").await;
        assert_eq!(status, 200, "{text}");
        assert!(text.contains("egress: last check failed: "), "{text}");
        let is_seen = |line: &str| {
            line.starts_with("egress: at the last successful check ")
                && line.ends_with(" s ago, the exchange saw address 127.0.0.2")
        };
        assert!(text.lines().any(is_seen), "{text}");
        assert_orders_are_accepted(&lab).await;
        lab.kucoin.clear_faults();
        time.pass(&lab, Duration::from_secs(40)).await;
        until_metric(&lab, "egress_check_failed", 0.0).await;
        assert!(lab.metric("egress_proof_age_seconds").await.unwrap() < last);
        last = 0.0;
    }

    // The same after a check that found a mismatch.
    sees(&lab, "127.0.0.9");
    time.pass(&lab, NEXT_PROOF).await;
    until_metric(&lab, "egress_mismatch", 1.0).await;
    lab.kucoin.clear_faults();
    fault(&lab, closed());
    time.pass(&lab, NEXT_PROOF).await;
    until_metric(&lab, "egress_check_failed", 1.0).await;
    let wrong = "requests leave from 127.0.0.9 instead of egress.expected_ip 127.0.0.2";
    assert_only_orders_are_rejected(&lab, wrong).await;
    let (_, text) = lab.get("/readyz").await;
    assert!(
        text.contains(wrong) && text.contains("(last check: "),
        "{text}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn orders_are_sent_again_once_the_egress_address_is_correct_again() {
    let (mut lab, time) = started("").await;
    lab.until_ready().await;
    assert_orders_are_accepted(&lab).await;
    sees(&lab, "2001:db8::7");
    time.pass(&lab, NEXT_PROOF).await;
    until_metric(&lab, "egress_mismatch", 1.0).await;
    let wrong = "requests leave from 2001:db8::7 instead of egress.expected_ip 127.0.0.2";
    assert_only_orders_are_rejected(&lab, wrong).await;
    assert_eq!(lab.get("/readyz").await.0, 503);
    lab.kucoin.clear_faults();
    time.pass(&lab, NEXT_PROOF).await;
    lab.until_ready().await;
    assert_eq!(lab.metric("egress_mismatch").await, Some(0.0));
    assert_orders_are_accepted(&lab).await;
    lab.stop().await;
}

#[tokio::test]
async fn address_rejected_by_the_exchange_is_logged_and_checked_at_once() {
    let mut lab = Lab::with(Settings {
        process: true,
        wait_ready: true,
        ..settings("")
    })
    .await;
    assert_eq!(egress_checks(&lab), 1);
    lab.kucoin.add_key(SimKey {
        ip_whitelist: vec![[127, 0, 0, 9].into()],
        ..SimKey::fake(MAIN_UID)
    });
    // The exchange now sees another address than at the start.
    sees(&lab, "203.0.113.9");
    let mut bot = lab.bot("maker").await;
    // Any request that is rejected for its address triggers a check, also a read.
    let answer = bot.send(accounts()).await.unwrap();
    assert_eq!(
        (answer.outcome(), answer.code.as_str()),
        (Outcome::Rejected, "400006")
    );
    assert_eq!(lab.metric("addresses_refused_total").await, Some(1.0));
    let refused = "egress IP not whitelisted for this key; compare the address that the exchange saw with egress.expected_ip and the key's IP restriction";
    let line = lab.process().log_line(refused).await;
    assert_eq!(
        (&line["egress.address"], &line["account.id"]),
        (&json!("127.0.0.2"), &json!("main"))
    );
    // Minutes before the next regular check.
    until_metric(&lab, "egress_mismatch", 1.0).await;
    assert_eq!(egress_checks(&lab), 2);
    let wrong = "requests leave from 203.0.113.9 instead of egress.expected_ip 127.0.0.2";
    let line = lab.process().log_line(wrong).await;
    assert_eq!(line["level"], "ERROR");
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
    lab.check_audit_log();
}

#[tokio::test]
async fn egress_check_repeats_at_the_interval_proof_every_s() {
    let (mut lab, time) = started("proof_every_s = 3600").await;
    lab.until_ready().await;
    let mut bot = lab.bot("maker").await;
    time.pass(&lab, Duration::from_secs(3000)).await;
    until("the time is measured again", async || {
        lab.metric("clock_age_seconds{site=\"global\",host=\"spot\"}")
            .await
            .unwrap()
            < 3000.0
    })
    .await;
    accepted(&mut bot, accounts()).await;
    assert_eq!(egress_checks(&lab), 1);
    assert!(lab.metric("egress_proof_age_seconds").await.unwrap() >= 3000.0);
    time.pass(&lab, Duration::from_secs(700)).await;
    until("the egress check is repeated", async || {
        egress_checks(&lab) == 2
    })
    .await;
    lab.stop().await;
}

#[tokio::test]
async fn expected_ip_is_required_when_the_system_chooses_the_address() {
    let settings = Settings {
        address: "0.0.0.0",
        egress: "expected_ip = \"127.0.0.1\"".to_owned(),
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    assert_orders_are_accepted(&lab).await;
    lab.stop().await;
    lab.reconfigure("expected_ip = \"127.0.0.1\"\n", "");
    let text = std::fs::read_to_string(lab.path("config.toml")).unwrap();
    let problems = Config::parse(&text, lab.folder.path()).unwrap_err();
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0].contains("egress.expected_ip: is missing"),
        "{problems:?}"
    );
}

/// The exchange's address before its DNS name changes; no other test uses this address.
const OLD_ADDRESS: &str = "127.7.7.7";

/// Whether a process on this machine can have its own `/etc/hosts`.
fn has_mount_namespaces() -> bool {
    let status = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", "mount --bind /etc/hosts /etc/hosts"])
        .stderr(std::process::Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

/// The number of open connections to `address`, from `/proc/net/tcp`.
fn open_connections(address: std::net::SocketAddrV4) -> usize {
    let octets = address.ip().octets();
    let hex = format!("{:08X}:{:04X}", u32::from_le_bytes(octets), address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().map(|line| line.split_whitespace());
    rows.filter_map(|mut row| Some((row.nth(2)?.to_owned(), row.next()?.to_owned())))
        // Established, or closed only by the other end.
        .filter(|(peer, state)| *peer == hex && matches!(state.as_str(), "01" | "08"))
        .count()
}

#[tokio::test]
async fn first_call_after_a_dns_change_reaches_the_new_address() {
    if !has_mount_namespaces() {
        not_run(
            "DNS change of the exchange",
            "root",
            "needs root and unshare",
        );
        return;
    }
    let mut lab = Lab::install(Settings {
        // No warm connections, so that the first call after the change needs a new one.
        egress: "warm_connections = 0\nexpected_ip = \"127.0.0.1\"".to_owned(),
        ..Settings::default()
    })
    .await;
    let target: std::net::SocketAddrV4 = lab.kucoin.spot_url().split_off(7).parse().unwrap();
    let old = format!("{OLD_ADDRESS}:{}", target.port());
    let proxy = Proxy::from(&old, &lab.kucoin.spot_url()).await.unwrap();
    let hosts = lab.path("hosts");
    let points_to = |address: &str| {
        std::fs::write(&hosts, format!("{address} localhost\n")).unwrap();
    };
    points_to(OLD_ADDRESS);
    lab.reconfigure(
        &lab.kucoin.spot_url(),
        &format!("http://localhost:{}", target.port()),
    );
    let own_hosts = "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"";
    let hosts_file = hosts.to_str().unwrap();
    let command = [
        "unshare", "--mount", "sh", "-c", own_hosts, "sh", hosts_file,
    ];
    lab.spawn_broker_under(&command).await;
    lab.until_ready().await;
    let mut bot = lab.bot("maker").await;
    accepted(&mut bot, spot_order("before")).await;

    points_to("127.0.0.1");
    proxy.close();
    until("connections to the old address are closed", async || {
        open_connections(old.parse().unwrap()) == 0
    })
    .await;
    // The first call after the change is one that must not be sent twice.
    accepted(&mut bot, spot_cancel_all()).await;
    accepted(&mut bot, spot_order("after")).await;
    accepted(&mut bot, accounts()).await;
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
    lab.check_audit_log();
}

#[tokio::test]
async fn silent_name_server_delays_bots_by_one_lookup_and_does_not_delay_health_checks() {
    let silent = tokio::net::UdpSocket::bind("127.7.7.8:53").await;
    if !has_mount_namespaces() || silent.is_err() {
        not_run("silent name server", "root", "needs root and unshare");
        return;
    }
    let mut lab = Lab::install(Settings {
        egress: "connect_timeout_ms = 4000".to_owned(),
        ..Settings::default()
    })
    .await;
    let text = std::fs::read_to_string(lab.path("config.toml")).unwrap();
    for (port, name) in [(1, "spot"), (2, "futures")] {
        let start = format!("{name} = \"http://");
        let rest = text.split_once(&start).unwrap().1;
        let address = rest.split('"').next().unwrap();
        let elsewhere = format!("{start}localhost:{port}");
        lab.reconfigure(&format!("{start}{address}"), &elsewhere);
    }
    let resolver = lab.path("resolv.conf");
    std::fs::write(&resolver, "nameserver 127.7.7.8\n").unwrap();
    let own_resolver =
        "mount --bind \"$0\" /etc/resolv.conf && mount --bind /dev/null /etc/hosts && exec \"$@\"";
    let resolver = resolver.to_str().unwrap();
    let began = Instant::now();
    lab.spawn_broker_under(&["unshare", "--mount", "sh", "-c", own_resolver, resolver])
        .await;
    assert_eq!(lab.get("/healthz").await.0, 200);
    let message = "initial key load and checks of the exchange finished; accepting bots";
    assert!(
        !lab.process().log().contains(message),
        "health checks must be answered before bots are accepted"
    );
    lab.process().log_line(message).await;
    let took = began.elapsed().as_secs();
    // Two lookups in sequence would take 8 s.
    assert!((4..8).contains(&took), "one lookup takes 4 s: {took} s");
}

#[tokio::test]
async fn host_without_an_ipv4_address_is_reported() {
    let mut lab = Lab::with(Settings {
        spot_url: Some("http://[::1]:9".to_owned()),
        wait_ready: false,
        ..Settings::default()
    })
    .await;
    lab.until_keys_loaded().await;
    let words = "::1 has no IPv4 address, but egress.address 127.0.0.1 requires one";
    let (status, text) = lab.get("/readyz").await;
    assert_eq!(status, 503);
    assert!(text.contains(&format!("exchange: {words}\n")), "{text}");
    let mut bot = lab.bot("maker").await;
    let status = bot.send(spot_cancel_all()).await.unwrap_err();
    let (code, reason, outcome, _) = failure(&status);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str(), status.message()),
        (
            Code::Unavailable,
            "EXCHANGE_UNREACHABLE",
            "not_sent",
            format!("{words}; nothing was sent").as_str()
        )
    );
    lab.stop().await;
}
