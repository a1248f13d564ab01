//! That requests leave from the address which KuCoin's whitelists name is proven by asking KuCoin, the way orders go.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use credbroker::config::Config;
use credbroker::proto::{Outcome, SignAndSendRequest};
use credbroker_sim::installation::{MAIN_UID, Settings};
use credbroker_sim::kucoin::{Fault, FaultAction, SimKey, When};
use credbroker_sim::road::Road;
use serde_json::json;
use tonic::Code;

use crate::harness::{
    Bot, Lab, Time, accounts, failure, futures_order, not_run, spot_cancel_all, spot_order, until,
};

/// The default of `egress.proof_every_s`, and a little more.
const NEXT_PROOF: Duration = Duration::from_secs(310);

const WRONG: &str = "requests leave from 127.0.0.2 instead of egress.expected_ip 127.0.0.3";

/// From 127.0.0.2, with these further keys of `[egress]`.
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

/// Every question for the address goes wrong like this from now on.
fn fault(lab: &Lab, action: FaultAction) {
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once("/api/v1/my-ip", action)
    });
}

/// The exchange says that it sees this address.
fn sees(lab: &Lab, address: &str) {
    let action = FaultAction::Answer {
        status: 200,
        body: json!({"code": "200000", "data": address}),
        when: When::BeforeTaken,
    };
    fault(lab, action);
}

fn closed() -> FaultAction {
    FaultAction::Close {
        when: When::BeforeTaken,
    }
}

/// How often the exchange has been asked for the address.
fn asked(lab: &Lab) -> usize {
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

/// Everything but the address is in order.
async fn until_clock_and_keys(lab: &Lab) {
    lab.until_keys().await;
    until("the time is measured", async || {
        !lab.get("/readyz").await.1.contains("clock ")
    })
    .await;
}

async fn accepted(bot: &mut Bot, request: SignAndSendRequest) {
    let answer = bot.send(request).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
}

/// Orders to both hosts are refused with exactly this message, and everything else goes on.
async fn only_orders_are_refused(lab: &Lab, message: &str) {
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

async fn orders_pass(lab: &Lab) {
    let mut bot = lab.bot("maker").await;
    let name = format!("order-{}", lab.kucoin.received().len());
    accepted(&mut bot, spot_order(&name)).await;
    accepted(&mut bot, futures_order(&name)).await;
}

#[tokio::test]
async fn the_proof_at_start_leaves_from_the_address_that_orders_leave_from() {
    let (mut lab, _) = started("").await;
    lab.until_ready().await;
    orders_pass(&lab).await;
    let all = lab.kucoin.everything_received();
    let peers: BTreeSet<_> = all
        .iter()
        .map(|request| request.peer.ip().to_string())
        .collect();
    assert_eq!(peers, BTreeSet::from(["127.0.0.2".to_owned()]));
    assert_eq!(asked(&lab), 1);
    assert_eq!(lab.metric("egress_mismatch").await, Some(0.0));
    assert_eq!(lab.metric("egress_check_failed").await, Some(0.0));
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(
        text.contains("egress: the exchange saw 127.0.0.2 0 s ago"),
        "{text}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn from_another_address_than_the_expected_one_no_order_leaves_and_both_are_named() {
    let (mut lab, _) = started("expected_ip = \"127.0.0.3\"").await;
    until_clock_and_keys(&lab).await;
    until("the address has been seen", async || {
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
    only_orders_are_refused(&lab, WRONG).await;
    lab.stop().await;
}

#[tokio::test]
async fn lenient_raises_the_alarm_and_goes_on() {
    let (mut lab, _) = started("expected_ip = \"127.0.0.3\"\nproof = \"lenient\"").await;
    lab.until_ready().await;
    until("the address has been seen", async || {
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
    orders_pass(&lab).await;
    lab.stop().await;
}

#[tokio::test]
async fn before_the_first_proof_no_order_leaves_unless_lenient() {
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
            only_orders_are_refused(&lab, unproven).await;
        } else {
            orders_pass(&lab).await;
        }
        lab.kucoin.clear_faults();
        // It is not given up: the wait after a failure is much shorter than that between two proofs.
        time.pass(&lab, Duration::from_secs(40)).await;
        until_metric(&lab, "egress_mismatch", 0.0).await;
        lab.until_ready().await;
        orders_pass(&lab).await;
        lab.stop().await;
    }
}

#[tokio::test]
async fn a_check_that_failed_proves_nothing_either_way() {
    let failures = [
        closed(),
        FaultAction::Html {
            status: 502,
            when: When::BeforeTaken,
        },
        FaultAction::RateLimited { reset_ms: None },
        FaultAction::Answer {
            status: 200,
            body: json!({"code": "200000", "data": "nobody knows"}),
            when: When::BeforeTaken,
        },
        // A refusal that names an address is no proof of it.
        FaultAction::Answer {
            status: 200,
            body: json!({"code": "500000", "data": "127.0.0.9"}),
            when: When::BeforeTaken,
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
        assert!(
            text.contains("egress: the last question got no answer: "),
            "{text}"
        );
        assert!(
            text.contains("egress: the exchange saw 127.0.0.2 "),
            "{text}"
        );
        orders_pass(&lab).await;
        lab.kucoin.clear_faults();
        time.pass(&lab, Duration::from_secs(40)).await;
        until_metric(&lab, "egress_check_failed", 0.0).await;
        assert!(lab.metric("egress_proof_age_seconds").await.unwrap() < last);
        last = 0.0;
    }

    // The same when the last answer was a mismatch.
    sees(&lab, "127.0.0.9");
    time.pass(&lab, NEXT_PROOF).await;
    until_metric(&lab, "egress_mismatch", 1.0).await;
    lab.kucoin.clear_faults();
    fault(&lab, closed());
    time.pass(&lab, NEXT_PROOF).await;
    until_metric(&lab, "egress_check_failed", 1.0).await;
    let wrong = "requests leave from 127.0.0.9 instead of egress.expected_ip 127.0.0.2";
    only_orders_are_refused(&lab, wrong).await;
    let (_, text) = lab.get("/readyz").await;
    assert!(
        text.contains(wrong) && text.contains("(last question: "),
        "{text}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn orders_pass_again_once_the_address_is_right_again() {
    let (mut lab, time) = started("").await;
    lab.until_ready().await;
    orders_pass(&lab).await;
    sees(&lab, "2001:db8::7");
    time.pass(&lab, NEXT_PROOF).await;
    until_metric(&lab, "egress_mismatch", 1.0).await;
    let wrong = "requests leave from 2001:db8::7 instead of egress.expected_ip 127.0.0.2";
    only_orders_are_refused(&lab, wrong).await;
    assert_eq!(lab.get("/readyz").await.0, 503);
    lab.kucoin.clear_faults();
    time.pass(&lab, NEXT_PROOF).await;
    lab.until_ready().await;
    assert_eq!(lab.metric("egress_mismatch").await, Some(0.0));
    orders_pass(&lab).await;
    lab.stop().await;
}

#[tokio::test]
async fn an_address_that_the_exchange_refuses_is_named_and_checked_at_once() {
    let mut lab = Lab::with(Settings {
        process: true,
        wait_ready: true,
        ..settings("")
    })
    .await;
    assert_eq!(asked(&lab), 1);
    lab.kucoin.add_key(SimKey {
        ip_whitelist: vec![[127, 0, 0, 9].into()],
        ..SimKey::fake(MAIN_UID)
    });
    // By now the exchange sees another address than at the start.
    sees(&lab, "203.0.113.9");
    let mut bot = lab.bot("maker").await;
    // Any answer will do, a read's too.
    let answer = bot.send(accounts()).await.unwrap();
    assert_eq!(
        (answer.outcome(), answer.code.as_str()),
        (Outcome::Rejected, "400006")
    );
    assert_eq!(lab.metric("addresses_refused_total").await, Some(1.0));
    let refused = "egress IP not whitelisted for this key; compare the key's IP restriction with egress.expected_ip";
    let line = lab.process().log_line(refused).await;
    assert_eq!(
        (&line["seen"], &line["account.id"]),
        (&json!("127.0.0.2"), &json!("main"))
    );
    // Minutes before its time.
    until_metric(&lab, "egress_mismatch", 1.0).await;
    assert_eq!(asked(&lab), 2);
    let wrong = "requests leave from 203.0.113.9 instead of egress.expected_ip 127.0.0.2";
    let line = lab.process().log_line(wrong).await;
    assert_eq!(line["level"], "ERROR");
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
    lab.check_record();
}

#[tokio::test]
async fn the_proof_is_repeated_as_often_as_the_configuration_says() {
    let (mut lab, time) = started("proof_every_s = 3600").await;
    lab.until_ready().await;
    let mut bot = lab.bot("maker").await;
    time.pass(&lab, Duration::from_secs(3000)).await;
    until("other questions have been asked again", async || {
        lab.metric("clock_age_seconds{site=\"global\",host=\"spot\"}")
            .await
            .unwrap()
            < 3000.0
    })
    .await;
    accepted(&mut bot, accounts()).await;
    assert_eq!(asked(&lab), 1);
    assert!(lab.metric("egress_proof_age_seconds").await.unwrap() >= 3000.0);
    time.pass(&lab, Duration::from_secs(700)).await;
    until("the proof is repeated", async || asked(&lab) == 2).await;
    lab.stop().await;
}

#[tokio::test]
async fn where_the_system_chooses_the_address_the_expected_one_must_be_said() {
    let settings = Settings {
        address: "0.0.0.0",
        egress: "expected_ip = \"127.0.0.1\"".to_owned(),
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    orders_pass(&lab).await;
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

/// Where the exchange's name points before it moves; no other test uses this address.
const OLD_ADDRESS: &str = "127.7.7.7";

/// Whether this machine lets a process have an `/etc/hosts` of its own.
fn has_mount_namespaces() -> bool {
    let status = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", "mount --bind /etc/hosts /etc/hosts"])
        .stderr(std::process::Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

/// How many open connections lead to `address`, as the kernel knows them.
fn open_connections(address: std::net::SocketAddrV4) -> usize {
    let octets = address.ip().octets();
    let hex = format!("{:08X}:{:04X}", u32::from_le_bytes(octets), address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().map(|line| line.split_whitespace());
    rows.filter_map(|mut row| Some((row.nth(2)?.to_owned(), row.next()?.to_owned())))
        // Established, or closed by the other end alone.
        .filter(|(peer, state)| *peer == hex && matches!(state.as_str(), "01" | "08"))
        .count()
}

#[tokio::test]
async fn calls_follow_the_exchange_to_its_new_address_at_once() {
    if !has_mount_namespaces() {
        not_run("exchange's name moves", "root", "needs root and unshare");
        return;
    }
    let mut lab = Lab::install(Settings {
        // Kept short, so that the first call after the move needs a new connection.
        egress: "warm_connections = 0\nexpected_ip = \"127.0.0.1\"".to_owned(),
        ..Settings::default()
    })
    .await;
    let target: std::net::SocketAddrV4 = lab.kucoin.spot_url().split_off(7).parse().unwrap();
    let old = format!("{OLD_ADDRESS}:{}", target.port());
    let road = Road::from(&old, &lab.kucoin.spot_url()).await.unwrap();
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
    road.close();
    until("connections to the old address are closed", async || {
        open_connections(old.parse().unwrap()) == 0
    })
    .await;
    // The very first call, which is one that must not be repeated.
    accepted(&mut bot, spot_cancel_all()).await;
    accepted(&mut bot, spot_order("after")).await;
    accepted(&mut bot, accounts()).await;
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
    lab.check_record();
}

#[tokio::test]
async fn silent_name_server_holds_up_bots_once_and_nothing_else() {
    let silent = tokio::net::UdpSocket::bind("127.7.7.8:53").await;
    if !has_mount_namespaces() || silent.is_err() {
        not_run(
            "name server that does not answer",
            "root",
            "needs root and unshare",
        );
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
    let told = "initial key load finished; accepting bots";
    assert!(!lab.process().log().contains(told), "it listens before");
    lab.process().log_line(told).await;
    let took = began.elapsed().as_secs();
    // One after the other they would take eight.
    assert!((4..8).contains(&took), "one lookup takes 4 s: {took} s");
}

#[tokio::test]
async fn a_host_without_an_address_of_the_right_kind_is_named_as_such() {
    let mut lab = Lab::with(Settings {
        spot_url: Some("http://[::1]:9".to_owned()),
        wait_ready: false,
        ..Settings::default()
    })
    .await;
    lab.until_keys().await;
    let words = "::1 has no IPv4 address, which egress.address 127.0.0.1 needs";
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
