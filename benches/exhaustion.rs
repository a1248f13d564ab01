//! Whether something that a bot, the exchange, Vault, a disk or a log reader uses up reaches cancels, admins or probes.
//!
//! Run `cargo bench --bench exhaustion`, optionally with names of rows. Broker and simulators are separate processes; what
//! floods the broker runs at the lowest priority. In each row, blocks of cancels alternate between a healthy broker and one
//! with the fault; then the broker gets SIGTERM while the fault is on. Prints a Markdown table, and fails if a verdict is not
//! `ok`.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark panics if it cannot continue"
)]

#[path = "exhaustion/disk.rs"]
mod disk;
#[path = "../tests/it/drive.rs"]
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
mod drive;
#[path = "exhaustion/faults.rs"]
mod faults;
#[path = "../tests/it/harness.rs"]
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
mod harness;
#[path = "../tests/it/raw_bot.rs"]
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
mod raw_bot;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use credbroker::proto::Outcome;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Handle};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tonic_types::StatusExt;

use credbroker_sim::installation::{Settings, grant};
use disk::{HangingDisk, SmallDisk};
use drive::{Simulator, simulators};
use faults::Fault;
use harness::{Bot, Lab, Patient, not_run, print_always, spot_cancel_all};

/// Blocks of each kind, and cancels per block and bot: 200 of each kind.
const BLOCKS: usize = 10;
const CANCELS: usize = 20;

/// After this many failed cancels a row has failed, and starts no more blocks.
const ENOUGH_FAILURES: u64 = 20;

/// How long a cancel may take.
const CANCEL_WITHIN: Duration = Duration::from_secs(3);

/// How long a drain may take (10 s), and what a busy machine adds.
const EXIT_WITHIN: Duration = Duration::from_secs(12);

/// The most memory that the broker may use: what it needs idle (about 20 MB), the budgets for answers (64 MiB), messages
/// (64 MiB) and audit lines (16 MiB), and copies in buffers of TLS and HTTP.
const MAX_RSS_MB: f64 = 256.0;

fn main() -> ExitCode {
    let build = |mut builder: Builder| builder.enable_all().build().unwrap();
    let mut measuring = Builder::new_multi_thread();
    measuring.worker_threads(2);
    let runtime = build(measuring);
    let mut flooding = Builder::new_multi_thread();
    flooding.worker_threads(1).on_thread_start(|| {
        let _ = rustix::process::nice(19);
    });
    let flooding = build(flooding);
    let is_ok =
        runtime.block_on(async { drive::simulate().await || table(flooding.handle()).await });
    // Tasks that wait for a process do not end by themselves.
    runtime.shutdown_background();
    flooding.shutdown_background();
    ExitCode::from(u8::from(!is_ok))
}

/// A resource: who uses it up, and what is allowed meanwhile.
struct Row {
    name: &'static str,
    how: &'static str,
    /// What meets the fault.
    unit: &'static str,
    start: for<'a> fn(&'a Site) -> faults::Starting<'a>,
    /// Changes the configuration.
    config: fn(String) -> String,
    /// Mounted at `disk`.
    disk: Option<Disk>,
    /// Limit of open files; `None`: that of this process.
    descriptors: Option<u32>,
    /// How much slower cancels may be, as a ratio of medians.
    max_ratio: f64,
    /// Time limit of `/healthz`.
    max_healthz: Duration,
    /// How long the first block with the fault lasts at least.
    min_block: Duration,
    /// Exit code if stopped during the fault.
    exit_code: i32,
}

/// A disk for the audit log.
#[derive(PartialEq)]
enum Disk {
    Hanging,
    Small,
}

/// An installation, and what faults need of it.
struct Site {
    small_disk: Option<SmallDisk>,
    hanging_disk: Option<HangingDisk>,
    lab: Lab,
    vault: Simulator,
    kucoin: Simulator,
    /// Connections of bots by name; a fault and the cancels of the same bot share one.
    connections: Mutex<HashMap<String, Patient>>,
    flooding: Handle,
}

impl Site {
    async fn start(row: &Row, flooding: &Handle) -> Self {
        let (vault, kucoin, settings) = simulators(&[]).await;
        let lab = Lab::install(Settings {
            rules: rules(),
            edit: Box::new(row.config),
            ..settings
        })
        .await;
        let folder = lab.path("disk");
        let mut site = Self {
            small_disk: (row.disk == Some(Disk::Small)).then(|| SmallDisk::mount(&folder).unwrap()),
            hanging_disk: (row.disk == Some(Disk::Hanging))
                .then(|| HangingDisk::mount(&folder).unwrap()),
            lab,
            vault,
            kucoin,
            connections: Mutex::default(),
            flooding: flooding.clone(),
        };
        let limit = row
            .descriptors
            .map(|limit| format!("--nofile={limit}:{limit}"));
        let command: Vec<_> = limit.iter().flat_map(|limit| ["prlimit", limit]).collect();
        site.lab.spawn_broker_under(&command).await;
        site.lab.until_ready().await;
        let admin = site.lab.ca.admin("anna").unwrap();
        site.lab.write_admin_files(&admin);
        site
    }

    /// The broker's address, and the TLS settings of this bot.
    fn dial(&self, bot: &str) -> (SocketAddr, TlsConnector) {
        let identity = self.lab.ca.bot(bot).unwrap();
        (self.lab.grpc, self.lab.client_tls(&identity))
    }

    /// This bot's connection; a new one if it has none or the last one is closed.
    async fn connection(&self, bot: &str) -> io::Result<Patient> {
        let open = self.connections.lock().unwrap().get(bot).cloned();
        if let Some(open) = open.filter(Patient::is_open) {
            return Ok(open);
        }
        let new = self.new_connection(bot).await?;
        let mut connections = self.connections.lock().unwrap();
        connections.insert(bot.to_owned(), new.clone());
        Ok(new)
    }

    async fn new_connection(&self, bot: &str) -> io::Result<Patient> {
        let identity = self.lab.ca.bot(bot).unwrap();
        let roots = [self.lab.ca.certificate_pem().to_owned()];
        timeout(
            CANCEL_WITHIN,
            harness::patient(self.lab.grpc, &roots, &identity),
        )
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Ends everything that a fault may have started outside its tasks.
    async fn repair(&self) {
        if let Some(disk) = &self.hanging_disk {
            disk.hang(false);
        }
        if let Some(disk) = &self.small_disk {
            disk.make_room();
        }
        self.lab.process.as_ref().unwrap().pause_log(false);
        for simulator in [&self.kucoin, &self.vault] {
            simulator.control("DELETE", "fault", Value::Null).await;
        }
    }

    /// Waits until the broker has no call in flight and answers as usual; some calls end only at their deadline.
    async fn until_healthy(&self) {
        let is_idle = |text: &str| text.contains("credbroker_calls_in_flight 0\n");
        for _ in 0..200 {
            let metrics = timeout(CANCEL_WITHIN, get(self.lab.ops, "/metrics")).await;
            if metrics.is_ok_and(|text| text.is_ok_and(|text| is_idle(&text)))
                && self.cancel("other").await.is_ok()
            {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
        print_always("the broker has not recovered within 20 s");
    }

    /// Sends a cancel of this bot; returns how long it took in milliseconds, or why it failed.
    async fn cancel(&self, bot: &str) -> Result<f64, String> {
        let started = Instant::now();
        let connection = self.connection(bot).await;
        send_cancel(connection.map_err(|error| format!("connect: {error}"))?).await?;
        Ok(ms(started))
    }

    /// How long `/healthz` takes, in milliseconds; infinite if it fails.
    async fn healthz(&self) -> f64 {
        let started = Instant::now();
        match timeout(Duration::from_secs(10), get(self.lab.ops, "/healthz")).await {
            Ok(Ok(text)) if text.ends_with("ok\n") => ms(started),
            _ => f64::INFINITY,
        }
    }

    /// How long an admin's command takes, in milliseconds; infinite if it fails.
    async fn admin(&self, words: &[&str]) -> f64 {
        let started = Instant::now();
        match timeout(Duration::from_secs(20), self.lab.cli(words, "")).await {
            Ok(output) if output.code == Some(0) => ms(started),
            Ok(output) => {
                print_always(&format!("{words:?}: {output:?}"));
                f64::INFINITY
            }
            Err(_) => f64::INFINITY,
        }
    }

    /// The most memory that the broker has used so far.
    fn max_rss_mb(&self) -> f64 {
        let id = self.lab.process.as_ref().unwrap().id();
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kb: f64 = line
            .unwrap()
            .split_whitespace()
            .next()
            .unwrap()
            .parse()
            .unwrap();
        kb / 1024.0
    }
}

/// Sends a cancel; returns why it failed.
async fn send_cancel(connection: Patient) -> Result<(), String> {
    let mut bot = Bot::over(connection);
    let call = bot.send_within(spot_cancel_all(), CANCEL_WITHIN);
    match timeout(CANCEL_WITHIN, call).await {
        Ok(Ok(answer)) if answer.outcome() == Outcome::Accepted => Ok(()),
        Ok(Ok(answer)) => Err(format!("{:?} {}", answer.outcome(), answer.code)),
        Ok(Err(status)) => Err(match status.get_details_error_info() {
            Some(info) => info.reason,
            None => format!("connection: {:?}", status.code()),
        }),
        Err(_) => Err("no answer".to_owned()),
    }
}

/// The complete answer to a GET, head included.
async fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// The bots of the rules: `bot-0` to `bot-7` use resources up, `other` only cancels.
fn rules() -> String {
    let mut rules = "[account.main]\nkey = { spot-margin = \"main\" }\n".to_owned();
    for bot in (0..8)
        .map(|bot| format!("bot-{bot}"))
        .chain(["other".to_owned()])
    {
        rules += &grant(&bot, "main", "spot-margin", "\"read\", \"trade\"");
    }
    rules
}

/// What was measured in a row.
#[derive(Default)]
struct Measured {
    /// Durations of cancels in milliseconds: of another bot and of the same bot, each healthy and faulty.
    cancels: [[Vec<f64>; 2]; 2],
    /// Failed cancels while healthy, and during the fault, by cause.
    failed_healthy: u64,
    failed: BTreeMap<String, u64>,
    /// The most that met the fault in one block.
    met: u64,
    halt: Vec<f64>,
    healthz: Vec<f64>,
    max_rss_mb: f64,
    stop: Stop,
}

/// How the broker stopped.
#[derive(Default)]
struct Stop {
    answered: u64,
    /// Failed cancels by cause, without those sent in the last half second of the process.
    failed: BTreeMap<String, u64>,
    exited_after: f64,
    code: Option<i32>,
}

/// Measures every row, or those that the arguments name; returns whether every verdict is ok.
async fn table(flooding: &Handle) -> bool {
    // Cargo adds options.
    let names: Vec<_> = std::env::args()
        .skip(1)
        .filter(|name| !name.starts_with('-'))
        .collect();
    for name in &names {
        assert!(
            faults::ROWS.iter().any(|row| row.name == name),
            "no row {name}"
        );
    }
    println!(
        "| Used up | Met the fault | Cancels of another bot, p50 ms | Cancels of the same bot, p50 ms | Failed cancels | \
         `halt --all`, ms | `/healthz`, ms | Max RSS, MB | SIGTERM meanwhile | Verdict |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let mut is_ok = true;
    for row in &faults::ROWS {
        if !names.is_empty() && !names.iter().any(|name| name == row.name) {
            continue;
        }
        if row.disk.is_some() && !rustix::process::geteuid().is_root() {
            not_run(row.name, "root", "only root can mount a disk");
            println!(
                "| {}: {} | not run (only root can mount a disk) |||||||||",
                row.name, row.how
            );
            continue;
        }
        let mut site = Site::start(row, flooding).await;
        let mut measured = measure(row, &site).await;
        measured.stop = stop(row, &mut site).await;
        let (line, verdict) = report(row, &measured);
        println!("{line}");
        is_ok &= verdict == "ok";
    }
    is_ok
}

async fn measure(row: &Row, site: &Site) -> Measured {
    let mut measured = Measured::default();
    // Connects, and warms up.
    block(site, 0, Duration::ZERO, &mut Measured::default()).await;
    for round in 0..BLOCKS {
        block(site, 0, Duration::ZERO, &mut measured).await;
        let fault = Fault::start(row, site).await;
        let min = if round == 0 {
            row.min_block
        } else {
            Duration::ZERO
        };
        block(site, 1, min, &mut measured).await;
        measured.healthz.push(site.healthz().await);
        let halts = round % 5 == 0;
        if halts {
            measured.halt.push(site.admin(&["halt", "--all"]).await);
        }
        measured.met = measured.met.max(fault.met(site).await);
        fault.end(site).await;
        site.until_healthy().await;
        if halts {
            site.admin(&["resume", "--all", "--yes"]).await;
        }
        if measured.failed.values().sum::<u64>() >= ENOUGH_FAILURES {
            break;
        }
    }
    measured.max_rss_mb = site.max_rss_mb();
    measured
}

/// A block of cancels: of another bot, and of the one that causes the fault.
async fn block(site: &Site, faulty: usize, min: Duration, measured: &mut Measured) {
    let (started, mut count, mut failures) = (Instant::now(), 0, 0);
    // A block in which the first cancels fail ends early: each may take its whole time limit.
    while (count < CANCELS || started.elapsed() < min) && failures < 6 {
        count += 1;
        for (which, bot) in ["other", "bot-0"].into_iter().enumerate() {
            match site.cancel(bot).await {
                Ok(took) => measured.cancels[which][faulty].push(took),
                Err(_) if faulty == 0 => measured.failed_healthy += 1,
                Err(cause) => {
                    failures += 1;
                    *measured
                        .failed
                        .entry(format!("{bot}: {cause}"))
                        .or_default() += 1;
                }
            }
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// Stops the broker while the fault is on; another bot cancels until it exits, on its connection and on new ones in turn.
async fn stop(row: &Row, site: &mut Site) -> Stop {
    let fault = Fault::start(row, site).await;
    let open = site.connection("other").await.ok();
    let (identity, address) = (site.lab.ca.bot("other").unwrap(), site.lab.grpc);
    let roots = [site.lab.ca.certificate_pem().to_owned()];
    let started = Instant::now();
    site.lab.process().terminate();
    let (mut cancels, mut status, mut closed_after) = (Vec::new(), None, None);
    while status.is_none() && started.elapsed() < Duration::from_secs(60) {
        let open = open.clone().filter(|_| cancels.len() % 2 == 0);
        let (roots, identity) = (roots.clone(), identity.clone());
        let cancel = async move {
            if let Some(open) = open {
                return send_cancel(open).await;
            }
            let new = timeout(CANCEL_WITHIN, harness::patient(address, &roots, &identity)).await;
            let new = new.map_err(|_| "connect: no answer".to_owned())?;
            send_cancel(new.map_err(|error| format!("connect: {}", error.kind()))?).await
        };
        cancels.push((Instant::now(), tokio::spawn(cancel)));
        sleep(Duration::from_millis(100)).await;
        // The kernel cannot end a process that waits for a disk, so the disk answers once the listener is closed.
        if let Some(disk) = &site.hanging_disk
            && closed_after.is_none()
            && TcpStream::connect(address).await.is_err()
        {
            closed_after = Some(started.elapsed());
            disk.hang(false);
        }
        status = site.lab.process().exit_status();
    }
    let exited_after = started.elapsed();
    let mut stop = Stop {
        exited_after: exited_after.as_secs_f64(),
        code: status.and_then(|status| status.code()),
        ..Stop::default()
    };
    let last = closed_after
        .unwrap_or(exited_after)
        .saturating_sub(Duration::from_millis(1200));
    let last = started + last;
    fault.end(site).await;
    for (sent, cancel) in cancels {
        match cancel.await.unwrap() {
            Ok(()) => stop.answered += 1,
            Err(_) if sent > last => {}
            Err(cause) => *stop.failed.entry(cause).or_default() += 1,
        }
    }
    stop
}

/// The row as Markdown, and its verdict.
fn report(row: &Row, measured: &Measured) -> (String, String) {
    let mut problems = Vec::new();
    let mut require = |is_ok: bool, problem: String| {
        if !is_ok {
            problems.push(problem);
        }
    };
    require(measured.met > 0, "nothing met the fault".to_owned());
    let [other, same] = [0, 1].map(|which| {
        let [healthy, faulty] = [0, 1].map(|state| median(&measured.cancels[which][state]));
        let whose = ["another bot", "the same bot"][which];
        let count = measured.cancels[which][1].len();
        if count == 0 {
            require(false, format!("{whose} cannot cancel"));
            return format!("{healthy:.1} → none answered");
        }
        let ratio = faulty / healthy;
        require(ratio <= row.max_ratio, format!("{whose} ×{ratio:.1}"));
        format!("{healthy:.1} → {faulty:.1} (×{ratio:.2}, {count} cancels)")
    });
    let failed = counts(&measured.failed);
    require(measured.failed.is_empty(), "cancels failed".to_owned());
    let count = measured.failed_healthy;
    require(count == 0, format!("{count} cancels failed between faults"));
    let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let (halt, healthz) = (most(&measured.halt), most(&measured.healthz));
    require(halt <= 1000.0, "`halt`".to_owned());
    require(
        healthz <= row.max_healthz.as_secs_f64() * 1000.0,
        "`/healthz`".to_owned(),
    );
    let rss_mb = measured.max_rss_mb;
    require(rss_mb <= MAX_RSS_MB, "RSS".to_owned());
    let stop = &measured.stop;
    let in_time = stop.exited_after <= EXIT_WITHIN.as_secs_f64();
    require(in_time, "exit too late".to_owned());
    require(
        stop.code == Some(row.exit_code) || !in_time,
        "exit code".to_owned(),
    );
    require(
        stop.failed.is_empty(),
        "cancels failed after SIGTERM".to_owned(),
    );
    let code = stop.code.map_or("none".to_owned(), |code| code.to_string());
    let stopped = format!(
        "{} cancels answered, failed: {}; exit after {:.1} s with code {code}",
        stop.answered,
        counts(&stop.failed),
        stop.exited_after,
    );
    let verdict = match problems.as_slice() {
        [] => "ok".to_owned(),
        problems => problems.join(", "),
    };
    let line = format!(
        "| {}: {} | {} {} | {other} | {same} | {failed} | {halt:.0} | {healthz:.0} | {rss_mb:.0} | {stopped} | {verdict} |",
        row.name, row.how, measured.met, row.unit,
    );
    (line, verdict)
}

/// `3 × OVERLOADED, 1 × no answer`, or `0`.
fn counts(counts: &BTreeMap<String, u64>) -> String {
    let mut text = String::new();
    for (cause, count) in counts {
        let separator = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{separator}{count} × {cause}");
    }
    if text.is_empty() {
        "0".to_owned()
    } else {
        text
    }
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
