//! Orders while everything around the broker fails: at the end, the exchange's order book, the audit log, and what each bot was
//! told agree about every order.
//!
//! Broker, exchange and Vault are separate processes. `benches/chaos.rs` runs the same rows with more calls.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::time::Duration;

use credbroker::proto::CallState;
use credbroker_sim::installation::{Settings, grant};
use credbroker_sim::pki::Ca;
use credbroker_sim::proxy::Proxy;
use futures_util::StreamExt;
use futures_util::stream;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::drive::{KEEP_REQUESTS, Port, Simulator, simulators_with};
use crate::harness::{Lab, not_run, print_always, until};

#[path = "chaos/bots.rs"]
mod bots;
#[path = "../../benches/exhaustion/disk.rs"]
#[allow(dead_code, reason = "only one kind of disk is used")]
mod disk;
#[path = "chaos/evidence.rs"]
mod evidence;
#[path = "chaos/faults.rs"]
mod faults;
#[path = "chaos/front.rs"]
mod front;
#[path = "chaos/judge.rs"]
mod judge;
#[path = "chaos/rows.rs"]
mod rows;

use bots::{Bots, NAMES, Plan};
use disk::HangingDisk;
use evidence::{AuditLog, add_exchange};
use front::Front;
use judge::{Facts, Later, Wrong, judge};
pub(crate) use rows::GROUPS;

/// How many lines about each row are printed if it is wrong.
const EXAMPLES: usize = 10;

/// Without a new audit line for this long, nothing is looked up any more: the longest pause between two lookups is 10 s.
const CALM: Duration = Duration::from_secs(20);

/// How much is done.
#[derive(Clone, Copy)]
pub(crate) struct Scale {
    /// Calls per second of each installation.
    pub(crate) per_second: u32,
    /// How many calls must meet the fault of each row.
    pub(crate) met: u64,
    /// How often the broker is killed.
    pub(crate) kills: u64,
    /// Calls before the broker is killed or terminated.
    pub(crate) calls_per_restart: u64,
    /// How late an order may reach the exchange: scheduling on a busy machine.
    pub(crate) late_ms: i64,
    /// For how long lookups fail.
    pub(crate) lookups_fail_for: Duration,
}

/// A fault.
pub(crate) struct Row {
    /// Also the first part of the clientOids.
    pub(crate) name: &'static str,
    pub(crate) how: &'static str,
    /// Why it can stay unknown whether an order was placed; empty: it must be known.
    pub(crate) unknown: &'static str,
    /// How many orders may be late for each time that the broker stood still: one per connection of the bots.
    pub(crate) late: u64,
    /// Whether it needs to mount file systems, which only root may do.
    pub(crate) mounts: bool,
    /// Causes the fault; returns how many calls met it.
    pub(crate) run: for<'a> fn(&'a mut Site, &'a Scale) -> Running<'a>,
}

pub(crate) type Running<'a> = Pin<Box<dyn Future<Output = u64> + 'a>>;

/// What is special about an installation.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Setup {
    /// The audit log is on a disk that can hang.
    HangingDisk,
    Plain,
    /// The exchange is reached by name and over TLS.
    Tls,
}

/// Rows that share an installation.
pub(crate) struct Group {
    pub(crate) setup: Setup,
    pub(crate) rows: &'static [Row],
}

/// An installation with its bots.
pub(crate) struct Site {
    lab: Lab,
    vault: Simulator,
    kucoin: Simulator,
    bots: Bots,
    /// Between bots and broker.
    proxy: Proxy,
    /// Between broker and exchange: one for each host.
    fronts: Vec<Front>,
    exchange_ca: Ca,
    /// Starts the broker.
    command: Vec<String>,
    disk: Option<HangingDisk>,
    /// How often the broker stood still.
    stops: u64,
    _ports: [Port; 2],
}

/// The result of a row.
#[derive(Clone)]
pub(crate) struct Report {
    pub(crate) name: &'static str,
    how: &'static str,
    met: u64,
    calls: u64,
    orders: u64,
    placed: u64,
    wrong: BTreeMap<Wrong, u64>,
    late_allowed: u64,
    unknown: u64,
    latest_ms: Option<i64>,
    examples: Vec<String>,
}

impl Site {
    async fn start(setup: Setup, arguments: &'static [&'static str]) -> Self {
        let environment = vec![(KEEP_REQUESTS, "1".to_owned())];
        let (vault, kucoin, mut settings) = simulators_with(arguments, environment).await;
        let exchange_ca = Ca::new("CA of a simulated exchange").unwrap();
        let mut fronts = Vec::new();
        let mut egress = "proof_every_s = 1\nanswer_timeout_ms = 2000".to_owned();
        if setup == Setup::Tls {
            let identity = exchange_ca.server().unwrap();
            for port in 0..2 {
                fronts.push(Front::start(None, kucoin.address(port), &identity).await);
            }
            let url = |front: &Front| format!("https://localhost:{}", front.address.port());
            settings.spot_url = Some(url(&fronts[0]));
            settings.futures_url = Some(url(&fronts[1]));
            settings.files = vec![
                ("exchange-ca.pem", exchange_ca.certificate_pem().to_owned()),
                ("hosts", faults::hosts(Some("127.0.0.1"))),
                ("resolv.conf", String::new()),
            ];
            egress += "\nroots = \"exchange-ca.pem\"";
        }
        let mut rules =
            "[account.main]\nkey = { spot-margin = \"main\", futures = \"main\" }\n".to_owned();
        for bot in NAMES {
            for scope in ["spot-margin", "futures"] {
                rules += &grant(bot, "main", scope, "\"read\", \"trade\"");
            }
        }
        let ports = [Port::reserve(), Port::reserve()];
        let [grpc, ops] = [0, 1].map(|which: usize| ports[which].address);
        let mut lab = Lab::install(Settings {
            rules,
            egress,
            // A restarted broker listens on the same address.
            edit: Box::new(move |config| {
                let listen = "grpc = \"127.0.0.1:0\"\nops = \"127.0.0.1:0\"";
                assert!(config.contains(listen));
                let config = config.replace(listen, &format!("grpc = \"{grpc}\"\nops = \"{ops}\""));
                match setup {
                    Setup::HangingDisk => {
                        format!("{config}\n[audit]\nfile = \"disk/audit.jsonl\"\n")
                    }
                    _ => config,
                }
            }),
            ..settings
        })
        .await;
        // The simulators of this process are not used.
        lab.is_audit_checked = false;
        let disk =
            (setup == Setup::HangingDisk).then(|| HangingDisk::mount(&lab.path("disk")).unwrap());
        let command = match setup {
            Setup::Tls if can_mount() => with_own_names(&lab),
            _ => Vec::new(),
        };
        let proxy = Proxy::to(&format!("https://{grpc}")).await.unwrap();
        let mut site = Self {
            bots: Bots::new(proxy.address, &lab.ca),
            lab,
            vault,
            kucoin,
            proxy,
            fronts,
            exchange_ca,
            command,
            disk,
            stops: 0,
            _ports: ports,
        };
        site.spawn_broker().await;
        site.until_key_tested().await;
        site
    }

    async fn spawn_broker(&mut self) {
        let command: Vec<_> = self.command.iter().map(String::as_str).collect();
        self.lab.spawn_broker_under(&command).await;
        self.lab.until_ready().await;
    }

    fn audit_log(&self) -> PathBuf {
        let is_on_disk = self.disk.is_some();
        let folder = if is_on_disk { "disk" } else { "state" };
        self.lab.path(folder).join("audit.jsonl")
    }

    /// Waits until the key was tested: lookups prove nothing before.
    async fn until_key_tested(&mut self) {
        let name = "key_tested_timestamp_seconds{account=\"main\",key=\"main\"}";
        until("the key is tested", async || {
            self.lab.metric(name).await.is_some()
        })
        .await;
    }

    /// Starts the broker again after it has exited.
    async fn restart(&mut self) {
        self.lab.process().exit_code().await;
        self.spawn_broker().await;
    }

    /// Waits until the bots have started this many more calls.
    async fn more_calls(&self, count: u64) {
        let from = self.bots.started();
        until("the bots make more calls", async || {
            self.bots.started() >= from + count
        })
        .await;
    }

    /// How many requests faults of the exchange have hit.
    async fn hits(&self) -> u64 {
        let answer = self.kucoin.control("GET", "fault", Value::Null).await;
        answer["hits"].as_u64().unwrap()
    }

    /// Runs rows, one after the other, and then compares.
    async fn run(mut self, rows: &[&Row], scale: &Scale) -> Vec<Report> {
        self.bots.start(scale.per_second).await;
        let mut met = Vec::new();
        for &row in rows {
            self.bots.plan(Plan::usual(row.name));
            let before = self.bots.started();
            let count = (row.run)(&mut self, scale).await;
            self.kucoin.control("DELETE", "fault", Value::Null).await;
            // Until the next row begins, everything works.
            self.bots.plan(Plan::usual(row.name));
            self.more_calls(5).await;
            self.until_few_lookups().await;
            met.push((row, count, self.bots.started() - before));
        }
        self.bots.stop().await;
        let audit = self.settled().await;
        let orders = self.facts(&audit).await;
        let reports = met.into_iter();
        reports
            .map(|(row, met, calls)| report(row, met, calls, self.stops, &orders, scale))
            .collect()
    }

    /// Waits until the broker looks up only few orders, because it takes only 1000.
    async fn until_few_lookups(&self) {
        const FEW: u64 = 200;
        let orders = async || {
            let text = self.lab.get("/readyz").await.1;
            let line = text
                .lines()
                .find(|line| line.contains(" orders that may have been placed"));
            let mut words = line.unwrap_or_default().split_whitespace();
            words.find_map(|word| word.parse().ok()).unwrap_or(0)
        };
        while orders().await > FEW {
            sleep(Duration::from_secs(1)).await;
        }
    }

    /// Waits until every order is resolved, or nothing happens any more.
    async fn settled(&self) -> AuditLog {
        let mut audit = AuditLog::of(self.audit_log());
        let mut last = Instant::now();
        loop {
            if audit.read_new() {
                last = Instant::now();
            }
            let is_idle = self.lab.metric("calls_in_flight").await == Some(0.0);
            if is_idle && (audit.is_settled() || last.elapsed() > CALM) {
                return audit;
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// Everything that is known about each order, by clientOid.
    async fn facts(&self, audit: &AuditLog) -> HashMap<String, Facts> {
        let mut facts: HashMap<String, Facts> = HashMap::new();
        let orders = self.bots.take_orders();
        for oid in audit.client_oids().chain(orders.keys()) {
            let facts = facts.entry(oid.clone()).or_default();
            facts.recorded = audit.about(oid);
        }
        add_exchange(&self.kucoin, &mut facts).await;
        let asked = stream::iter(
            orders
                .iter()
                .map(async |(oid, order)| (oid, self.bots.outcome(oid, order.scope).await)),
        );
        let mut asked = asked.buffer_unordered(16);
        while let Some((oid, answer)) = asked.next().await {
            let later = answer.map(|answer| match answer.state() {
                CallState::Accepted => Later::Placed(answer.order_id),
                CallState::NotPlaced | CallState::Rejected => Later::NotPlaced,
                _ => Later::Open,
            });
            facts.get_mut(oid).unwrap().later = later;
        }
        drop(asked);
        for (oid, facts) in &mut facts {
            let row = oid.split('_').next().unwrap_or_default();
            row.clone_into(&mut facts.row);
        }
        for (oid, order) in orders {
            let facts = facts.get_mut(&oid).unwrap();
            order.row.clone_into(&mut facts.row);
            facts.attempts = order.attempts;
        }
        facts
    }
}

fn report(
    row: &Row,
    met: u64,
    calls: u64,
    stops: u64,
    orders: &HashMap<String, Facts>,
    scale: &Scale,
) -> Report {
    let mut report = Report {
        name: row.name,
        how: row.how,
        met,
        calls,
        orders: 0,
        placed: 0,
        wrong: BTreeMap::new(),
        late_allowed: row.late * stops,
        unknown: 0,
        latest_ms: None,
        examples: Vec::new(),
    };
    for (oid, facts) in orders {
        if facts.row != row.name {
            continue;
        }
        let verdict = judge(facts, scale.late_ms);
        report.orders += 1;
        report.placed += u64::from(!facts.book.is_empty());
        report.latest_ms = report.latest_ms.max(verdict.late_by_ms);
        report.unknown += u64::from(verdict.is_unknown);
        let mut wrong = verdict.wrong;
        if verdict.is_unknown && row.unknown.is_empty() {
            wrong.push((
                Wrong::Unexplained,
                "nothing says whether it was placed".to_owned(),
            ));
        }
        for (what, why) in wrong {
            *report.wrong.entry(what).or_default() += 1;
            if report.examples.len() < EXAMPLES {
                report
                    .examples
                    .push(format!("{what}: {oid}: {why}: {facts:?}"));
            }
        }
    }
    report
}

impl Report {
    fn count(&self, what: Wrong) -> u64 {
        self.wrong.get(&what).copied().unwrap_or_default()
    }

    #[allow(dead_code, reason = "for benches/chaos.rs")]
    pub(crate) fn calls(&self) -> u64 {
        self.calls
    }

    /// Whether at least this many calls met the fault, and nothing is wrong.
    pub(crate) fn is_ok(&self, met: u64) -> bool {
        let late = self.count(Wrong::Late).saturating_sub(self.late_allowed);
        let others = [Wrong::Lost, Wrong::Repeated, Wrong::Unexplained];
        self.met >= met && late == 0 && others.iter().all(|what| self.count(*what) == 0)
    }

    /// Adds the result of another run of the same row.
    #[allow(dead_code, reason = "for benches/chaos.rs")]
    pub(crate) fn add(&mut self, other: Self) {
        for (what, count) in other.wrong {
            *self.wrong.entry(what).or_default() += count;
        }
        self.met += other.met;
        self.calls += other.calls;
        self.orders += other.orders;
        self.placed += other.placed;
        self.late_allowed += other.late_allowed;
        self.unknown += other.unknown;
        self.latest_ms = self.latest_ms.max(other.latest_ms);
        self.examples.extend(other.examples);
        self.examples.truncate(EXAMPLES);
    }
}

/// Runs rows in an installation of their own. With `arguments`, this binary runs as a simulator.
pub(crate) async fn run(
    setup: Setup,
    rows: &[&Row],
    scale: &Scale,
    arguments: &'static [&'static str],
) -> Vec<Report> {
    let mut rows = rows.to_vec();
    if !can_mount() {
        let needs = rows.extract_if(.., |row| row.mounts);
        needs.for_each(|row| not_run(row.name, "mount", "only root may mount file systems"));
    }
    if rows.is_empty() {
        return Vec::new();
    }
    let site = Site::start(setup, arguments).await;
    site.run(&rows, scale).await
}

/// Whether this process may mount file systems.
fn can_mount() -> bool {
    let unshare = Command::new("unshare").args(["--mount", "true"]).output();
    unshare.is_ok_and(|output| output.status.success()) && Path::new("/dev/fuse").exists()
}

/// The start of a command for which `hosts` and `resolv.conf` in the folder are those of `/etc`.
fn with_own_names(lab: &Lab) -> Vec<String> {
    const MOUNT: &str = "mount --bind \"$0/hosts\" /etc/hosts && mount --bind \"$0/resolv.conf\" /etc/resolv.conf && exec \"$@\"";
    let folder = lab.folder.path().to_str().unwrap();
    let words = ["unshare", "--mount", "sh", "-c", MOUNT, folder];
    words.map(str::to_owned).into()
}

/// The table of all rows, and a line for each order that is wrong.
pub(crate) fn table(reports: &[Report]) -> String {
    let mut text = String::from(
        "| Row | Fault | Calls that met it | Calls | Orders | Placed | Lost | Repeated | Late | Unexplained | Unknown | Latest, ms |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for report in reports {
        let [lost, repeated, late, unexplained] = [
            Wrong::Lost,
            Wrong::Repeated,
            Wrong::Late,
            Wrong::Unexplained,
        ]
        .map(|what| report.count(what));
        let latest = report.latest_ms.map_or(String::new(), |ms| ms.to_string());
        let Report {
            name,
            how,
            met,
            calls,
            orders,
            placed,
            unknown,
            ..
        } = report;
        let _ = writeln!(
            text,
            "| {name} | {how} | {met} | {calls} | {orders} | {placed} | {lost} | {repeated} | {late} | {unexplained} | {unknown} | {latest} |"
        );
    }
    for example in reports.iter().flat_map(|report| &report.examples) {
        let _ = writeln!(text, "\n{example}");
    }
    text
}

/// The rows with few calls, at a low rate, because this machine may be busy with other tests.
#[cfg(test)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_order_is_lost_repeated_late_or_unexplained_while_everything_fails() {
    let scale = Scale {
        per_second: 20,
        met: 5,
        kills: 8,
        calls_per_restart: 20,
        late_ms: 1000,
        lookups_fail_for: Duration::from_secs(3),
    };
    let groups = GROUPS.iter().map(async |group| {
        let rows: Vec<_> = group.rows.iter().collect();
        run(group.setup, &rows, &scale, crate::drive::AS_TEST).await
    });
    let reports = futures_util::future::join_all(groups).await.concat();
    print_always(&table(&reports));
    for report in &reports {
        let name = report.name;
        assert!(report.is_ok(scale.met), "row {name}: see the table above");
    }
}
