//! An installation of separate processes (the real broker, simulated Vault and KuCoin) and two bots that never rest.
//!
//! What each bot was told about each call is kept with its time, so that a test can say what bots saw of a situation,
//! how long it lasted, and whether the record says the same.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::fs::File;
use std::future::Future;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use credbroker::proto::{Method, Outcome, Scope, SignAndSendRequest};
use credbroker_sim::installation::{MAIN_UID, ROOT_TOKEN, Settings, kv_path, secret};
use credbroker_sim::kucoin::{KucoinSettings, KucoinSim, Limits, SimKey};
use credbroker_sim::pki::Identity;
use credbroker_sim::vault::{InitialState, Standby, VaultSettings, VaultSim};
use serde_json::{Value, json};
use tokio::net::TcpSocket;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tonic_types::StatusExt;

use crate::harness::{
    Bot, Lab, Patient, accounts, failure, futures_order, http, patient, request, spot_order, until,
};

/// The account of the key `main/second`.
pub(crate) const SECOND_UID: u64 = 1002;

/// Rules of the two bots: the trader does everything, the reader only reads.
pub(crate) const TRADER: &str = r#"
[account.main]
key = { spot-margin = "main", futures = "main" }

[[grant]]
bot = "spiffe://demo.test/bot/trader"
account = "main"
scope = "spot-margin"
allow = ["read", "trade"]

[[grant]]
bot = "spiffe://demo.test/bot/trader"
account = "main"
scope = "futures"
allow = ["read", "trade"]
"#;

/// What [`TRADER`] lacks for the reader.
pub(crate) const READER: &str = r#"
[[grant]]
bot = "spiffe://demo.test/bot/reader"
account = "main"
scope = "spot-margin"
allow = ["read"]
"#;

/// Set in the environment of a process that shall be a simulator.
const ROLE: &str = "CREDBROKER_DRIVE_ROLE";
/// On which ports.
const PORTS: &str = "CREDBROKER_DRIVE_PORTS";
/// The root token of the simulated Vault.
const TOKEN: &str = "CREDBROKER_DRIVE_TOKEN";

/// No call of a bot is waited for any longer; the broker's own limit is 10 s.
const UNHEARD_AFTER: Duration = Duration::from_secs(30);

/// Fewer than the broker allows one bot, which is not what is looked at here.
const IN_FLIGHT: usize = 200;

/// Not a test of its own: tests start this binary again, with a role, to have simulators in other processes.
#[cfg(test)]
#[tokio::test]
async fn a_simulator_in_a_process_of_its_own() {
    simulate().await;
}

/// How this binary is told to do nothing but [`simulate`].
pub(crate) const AS_TEST: &[&str] = &[
    "drive::a_simulator_in_a_process_of_its_own",
    "--exact",
    "--nocapture",
];

/// Runs the simulator that the environment asks for until stdin closes; false, at once, where it asks for none.
pub(crate) async fn simulate() -> bool {
    let variable = |name| std::env::var_os(name).and_then(|value| value.into_string().ok());
    let Some(role) = variable(ROLE) else {
        return false;
    };
    let ports = variable(PORTS).unwrap();
    let ports: Vec<SocketAddr> = ports
        .split(',')
        .map(|port| SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap())))
        .collect();
    let keys = [("main", MAIN_UID), ("second", SECOND_UID)];
    // libtest has begun a line.
    if role == "vault" {
        let sim = VaultSim::start(VaultSettings {
            address: ports[0],
            standby: Standby::Forwards,
            state: InitialState::Dev {
                root_token: variable(TOKEN).unwrap(),
            },
            tls: None,
        });
        let sim = sim.await.unwrap();
        for (name, uid) in keys {
            sim.put_secret("kv", &kv_path("main", name), secret(&SimKey::fake(uid)));
        }
        println!("\nlistening");
        until_stdin_closes().await;
    } else {
        let sim = KucoinSim::start(KucoinSettings {
            spot: ports[0],
            futures: ports[1],
            limits: Limits::none(),
            keep_requests: 0,
            ..KucoinSettings::default()
        });
        let sim = sim.await.unwrap();
        for (_, uid) in keys {
            sim.add_key(SimKey::fake(uid));
        }
        println!("\nlistening");
        until_stdin_closes().await;
    }
    true
}

/// The parent's end of the pipe goes with the parent, so that no simulator outlives its test.
async fn until_stdin_closes() {
    let read = || std::io::stdin().read_to_end(&mut Vec::new());
    tokio::task::spawn_blocking(read).await.unwrap().unwrap();
}

/// A port that the system picked, and that stays ours while whoever listens on it is gone.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) address: SocketAddr,
    /// Bound, never listening: connections are refused, and nobody else gets the port.
    _reserved: TcpSocket,
}

impl Port {
    pub(crate) fn reserve() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        Self {
            address: socket.local_addr().unwrap(),
            _reserved: socket,
        }
    }
}

/// A simulator in a process of its own, which can end and come back at the same address.
pub(crate) struct Simulator {
    role: &'static str,
    arguments: &'static [&'static str],
    ports: Vec<Port>,
    process: Option<Child>,
}

impl Simulator {
    fn new(
        role: &'static str,
        arguments: &'static [&'static str],
        ports: impl IntoIterator<Item = Port>,
    ) -> Self {
        Self {
            role,
            arguments,
            ports: ports.into_iter().collect(),
            process: None,
        }
    }

    /// Starts it; what it held before is gone.
    pub(crate) async fn start(&mut self, token: &str) {
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|port| port.address.port().to_string())
            .collect();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(self.arguments)
            .env(ROLE, self.role)
            .env(PORTS, ports.join(","))
            .env(TOKEN, token)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let started = tokio::task::spawn_blocking(move || {
            let started = lines.any(|line| line.is_ok_and(|line| line == "listening"));
            // libtest says something after a minute, and fails where nobody takes it.
            std::thread::spawn(move || lines.for_each(drop));
            started
        });
        assert!(started.await.unwrap(), "{} did not start", self.role);
        self.process = Some(child);
    }

    /// Kills it; connections to it are refused from then on.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    fn url(&self, port: usize) -> String {
        format!("http://{}", self.ports[port].address)
    }

    /// Asks for one thing over its control API.
    pub(crate) async fn control(&self, method: &str, command: &str, body: Value) -> Value {
        let authority = self.ports[0].address.to_string();
        let request = format!("{method} /_sim/{command}");
        let answer = http(&authority, &request, "", &body.to_string()).await;
        let (status, _, answer) = answer.unwrap();
        assert_eq!(status, 200, "{request}: {answer}");
        serde_json::from_str(&answer).unwrap()
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Vault and KuCoin in processes of their own, and the settings of a broker in another; `arguments` make this binary a
/// simulator.
pub(crate) async fn simulators(
    arguments: &'static [&'static str],
) -> (Simulator, Simulator, Settings) {
    let mut vault = Simulator::new("vault", arguments, [Port::reserve()]);
    let mut kucoin = Simulator::new("kucoin", arguments, [Port::reserve(), Port::reserve()]);
    vault.start(ROOT_TOKEN).await;
    kucoin.start("").await;
    let settings = Settings {
        vault_url: Some(vault.url(0)),
        spot_url: Some(kucoin.url(0)),
        futures_url: Some(kucoin.url(1)),
        config: "[log]\nfilter = \"warn,credbroker::server=info\"\n".to_owned(),
        process: true,
        ..Settings::default()
    };
    (vault, kucoin, settings)
}

/// What a call is, as far as it matters to what becomes of it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Kind {
    Cancel,
    Order,
    Read,
}

/// What a bot knows of a call when it has ended.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Told {
    /// The exchange answered.
    Answered { outcome: &'static str, code: String },
    /// The broker failed it.
    Failed { outcome: String, reason: String },
    /// It never got a connection, or the connection went before the call left: nothing happened, the bot knows.
    Unconnected,
    /// The connection went while the broker had the call.
    Unheard(String),
}

impl Told {
    pub(crate) fn is_well(&self) -> bool {
        matches!(
            self,
            Self::Answered {
                outcome: "accepted",
                ..
            }
        )
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered { outcome, code } => write!(f, "{outcome} ({code})"),
            Self::Failed { outcome, reason } => write!(f, "`{reason}` ({outcome})"),
            Self::Unconnected => f.write_str("no connection (nothing sent)"),
            Self::Unheard(what) => write!(f, "no answer ({what})"),
        }
    }
}

/// One call of a bot, ended.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) bot: &'static str,
    pub(crate) kind: Kind,
    /// Its request id, as the record has it.
    pub(crate) id: String,
    pub(crate) started: Instant,
    pub(crate) ended: Instant,
    pub(crate) told: Told,
    pub(crate) stale_s: u64,
}

/// Where bots connect, whom they trust, and what they show.
#[derive(Clone)]
pub(crate) struct Dial {
    pub(crate) address: SocketAddr,
    pub(crate) roots: Vec<String>,
    pub(crate) identities: BTreeMap<&'static str, Identity>,
}

/// The bots.
pub(crate) struct Driver {
    state: Arc<State>,
    tasks: Vec<JoinHandle<()>>,
}

struct State {
    dial: Mutex<(u64, Arc<Dial>)>,
    calls: Mutex<Vec<Call>>,
    /// When the calls began that have not ended.
    open: Mutex<BTreeSet<(Instant, u64)>>,
    books: Mutex<Books>,
    /// Ids of first tries that never left.
    unsent: Mutex<Vec<String>>,
    count: AtomicU64,
}

/// What stands on the exchange's books, as far as the trader knows.
#[derive(Default)]
struct Books {
    /// Counts how often the exchange has lost its memory; what was placed before is not there any more.
    era: u64,
    /// Oldest first, and whether they are futures orders.
    orders: VecDeque<(String, bool)>,
}

/// One bot's connection, and of which dial it is; the number tells connections apart.
type Line = tokio::sync::Mutex<Option<(u64, u64, Patient)>>;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Driver {
    /// A trader with 60 calls a second, and a reader with 40.
    pub(crate) fn start(dial: Dial) -> Self {
        let state = Arc::new(State {
            dial: Mutex::new((0, Arc::new(dial))),
            calls: Mutex::default(),
            open: Mutex::default(),
            books: Mutex::default(),
            unsent: Mutex::default(),
            count: AtomicU64::new(0),
        });
        let tasks = [("trader", 60), ("reader", 40)].map(|(bot, per_second)| {
            tokio::spawn(Arc::clone(&state).run(bot, Duration::from_secs(1) / per_second))
        });
        Self {
            state,
            tasks: tasks.into(),
        }
    }

    /// New calls go over new connections, made by this; calls under way end where they are.
    pub(crate) fn redial(&self, change: impl FnOnce(&mut Dial)) {
        let mut dial = locked(&self.state.dial);
        let mut new = Dial::clone(&dial.1);
        change(&mut new);
        *dial = (dial.0 + 1, Arc::new(new));
    }

    /// The orders on the books are gone with the exchange's memory.
    pub(crate) fn forget_orders(&self) {
        let mut books = locked(&self.state.books);
        *books = Books {
            era: books.era + 1,
            orders: VecDeque::new(),
        };
    }

    /// How many orders could be cancelled.
    pub(crate) fn standing_orders(&self) -> usize {
        locked(&self.state.books).orders.len()
    }

    /// All calls so far that have ended and began at `from` or later.
    pub(crate) fn calls_since(&self, from: Instant) -> Vec<Call> {
        let mut calls = locked(&self.state.calls).clone();
        calls.retain(|call| call.started >= from);
        calls
    }

    /// Waits until every call that has begun by now has ended.
    pub(crate) async fn settled(&self) {
        let now = Instant::now();
        until("the calls under way end", async || {
            let open = locked(&self.state.open);
            open.first().is_none_or(|(started, _)| *started > now)
        })
        .await;
    }

    /// Waits until so many calls have begun after this moment and ended.
    pub(crate) async fn more_calls(&self, count: usize) {
        let from = Instant::now();
        until("more calls end", async || {
            let calls = locked(&self.state.calls);
            let new = calls.iter().rev().take(4 * count);
            new.filter(|call| call.started >= from).count() >= count
        })
        .await;
        self.settled().await;
    }

    /// No new calls.
    pub(crate) fn rest(&mut self) {
        self.tasks.drain(..).for_each(|task| task.abort());
    }

    /// No new calls; waits for those under way. Returns them all, and the ids of first tries that never left.
    pub(crate) async fn stop(mut self) -> (Vec<Call>, Vec<String>) {
        self.rest();
        self.settled().await;
        let calls = std::mem::take(&mut *locked(&self.state.calls));
        (calls, std::mem::take(&mut *locked(&self.state.unsent)))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl State {
    async fn run(self: Arc<Self>, bot: &'static str, every: Duration) {
        let (line, places) = (
            Arc::new(Line::default()),
            Arc::new(Semaphore::new(IN_FLIGHT)),
        );
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for step in 0.. {
            ticks.tick().await;
            let place = Arc::clone(&places).acquire_owned().await.unwrap();
            let (state, line) = (Arc::clone(&self), Arc::clone(&line));
            tokio::spawn(async move {
                state.call(bot, step, &line).await;
                drop(place);
            });
        }
    }

    async fn call(&self, bot: &'static str, step: u64, line: &Line) {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let started = Instant::now();
        locked(&self.open).insert((started, number));
        let is_futures = step.is_multiple_of(10);
        let era = locked(&self.books).era;
        let to_cancel = || locked(&self.books).orders.pop_front();
        let of_trader = bot == "trader";
        let mut cancelled = None;
        let (kind, order) = match step % 5 {
            0 | 1 if of_trader => (Kind::Order, None),
            2 if of_trader => {
                cancelled = to_cancel();
                match &cancelled {
                    Some((id, is_futures)) => (Kind::Cancel, Some(cancel(id, *is_futures))),
                    None => (Kind::Read, None),
                }
            }
            _ => (Kind::Read, None),
        };
        let mut tries = 0;
        let (id, told, stale_s) = loop {
            tries += 1;
            let id = format!("{bot}-{number}-{tries}");
            let mut call = match (&kind, &order) {
                (_, Some(order)) => order.clone(),
                (Kind::Order, None) if is_futures => futures_order(&id),
                (Kind::Order, None) => spot_order(&id),
                (_, None) => accounts(),
            };
            call.request_id.clone_from(&id);
            let (id, told, stale_s) = self.attempt(bot, line, call).await;
            // The way of every gRPC library: what provably never left goes over another connection, once.
            if tries == 1 && told == Told::Unconnected {
                locked(&self.unsent).push(id);
                continue;
            }
            break (id, told, stale_s);
        };
        let stands = match (kind, told.is_well(), cancelled) {
            (Kind::Order, true, _) => Some((id.clone(), is_futures)),
            (_, false, order) => order,
            _ => None,
        };
        let mut books = locked(&self.books);
        if books.era == era {
            books.orders.extend(stands);
        }
        drop(books);
        let mut open = locked(&self.open);
        locked(&self.calls).push(Call {
            bot,
            kind,
            id,
            started,
            ended: Instant::now(),
            told,
            stale_s,
        });
        open.remove(&(started, number));
    }

    /// Sends it once: the id under which it is on record, what the bot was told, and how old the key was.
    async fn attempt(
        &self,
        bot: &'static str,
        line: &Line,
        call: SignAndSendRequest,
    ) -> (String, Told, u64) {
        let id = call.request_id.clone();
        let Ok((connection, client)) = self.connected(bot, line).await else {
            return (id, Told::Unconnected, 0);
        };
        let status = match timeout(UNHEARD_AFTER, Bot::over(client).send(call)).await {
            Ok(Ok(answer)) => {
                let told = Told::Answered {
                    outcome: word(answer.outcome()),
                    code: answer.code,
                };
                return (id, told, answer.stale_seconds);
            }
            Ok(Err(status)) => status,
            Err(_) => return (id, Told::Unheard("for 30 s".to_owned()), 0),
        };
        if status.get_details_error_info().is_some() {
            let (_, reason, outcome, id) = failure(&status);
            return (id, Told::Failed { outcome, reason }, 0);
        }
        let mut line = line.lock().await;
        if line.as_ref().is_some_and(|line| line.1 == connection) {
            *line = None;
        }
        let told = if never_left(&status) {
            Told::Unconnected
        } else {
            Told::Unheard(format!("{status:?}"))
        };
        (id, told, 0)
    }

    /// The bot's connection, made anew where it is gone or out of date.
    async fn connected(&self, bot: &'static str, line: &Line) -> std::io::Result<(u64, Patient)> {
        let mut line = line.lock().await;
        let (generation, dial) = locked(&self.dial).clone();
        if let Some((of, number, client)) = &*line
            && *of == generation
            && client.is_open()
        {
            return Ok((*number, client.clone()));
        }
        let connect = patient(dial.address, &dial.roots, &dial.identities[bot]);
        let client = timeout(Duration::from_secs(5), connect)
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))?;
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        *line = Some((generation, number, client.clone()));
        Ok((number, client))
    }
}

/// Whether the connection was gone before the call was on it, or the broker said that it does not take it any more.
fn never_left(status: &tonic::Status) -> bool {
    let first = std::error::Error::source(status);
    let causes: Vec<_> = std::iter::successors(first, |cause| cause.source()).collect();
    let mut of_hyper = causes
        .iter()
        .filter_map(|cause| cause.downcast_ref::<hyper::Error>());
    // RFC 9113, 6.8: the call's number is above the last one that the other end has taken.
    let is_beyond = |error: &hyper::Error| format!("{error:?}").contains("NO_ERROR, Remote");
    of_hyper.any(|error| error.is_canceled() || is_beyond(error))
}

fn cancel(client_oid: &str, is_futures: bool) -> SignAndSendRequest {
    if is_futures {
        let target = format!("/api/v1/orders/client-order/{client_oid}?symbol=XBTUSDTM");
        request(Scope::Futures, Method::Delete, &target, "")
    } else {
        let target = format!("/api/v1/hf/orders/client-order/{client_oid}?symbol=BTC-USDT");
        request(Scope::SpotMargin, Method::Delete, &target, "")
    }
}

pub(crate) fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Accepted => "accepted",
        Outcome::MaybeSent => "maybe_sent",
        Outcome::Rejected => "rejected",
        Outcome::Unspecified => "unspecified",
    }
}

/// The end of the audit file, as it grows.
pub(crate) struct Tail {
    path: PathBuf,
    read: u64,
    pub(crate) changes: Vec<Value>,
}

impl Tail {
    pub(crate) fn of(path: PathBuf) -> Self {
        Self {
            path,
            read: 0,
            changes: Vec::new(),
        }
    }

    /// Reads what is new.
    pub(crate) fn read_on(&mut self) {
        let mut file = File::open(&self.path).unwrap();
        file.seek(SeekFrom::Start(self.read)).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        self.read += whole as u64;
        for line in text[..whole].lines() {
            if line.contains("\"event\":\"change\"") && !line.contains("\"outcome\":\"in_force\"") {
                self.changes.push(serde_json::from_str(line).unwrap());
            }
        }
    }
}

/// An installation with its bots.
pub(crate) struct Site {
    pub(crate) lab: Lab,
    pub(crate) vault: Simulator,
    pub(crate) kucoin: Simulator,
    pub(crate) driver: Driver,
    pub(crate) record: Tail,
    _ports: [Port; 2],
}

impl Site {
    /// Starts everything and waits until the bots' calls pass. `arguments` make this binary a simulator.
    pub(crate) async fn start(
        arguments: &'static [&'static str],
        rules: String,
        edit: impl Fn(String) -> String + Send + 'static,
    ) -> Self {
        let (vault, kucoin, settings) = simulators(arguments).await;
        let ports = [Port::reserve(), Port::reserve()];
        let [grpc, ops] = [0, 1].map(|which: usize| ports[which].address);
        let lab = Lab::with(Settings {
            rules,
            egress: "proof_every_s = 1".to_owned(),
            // A broker that starts again does so at the same address.
            edit: Box::new(move |config| {
                let listen = "grpc = \"127.0.0.1:0\"\nops = \"127.0.0.1:0\"";
                assert!(config.contains(listen));
                let fixed = format!("grpc = \"{grpc}\"\nops = \"{ops}\"");
                edit(config.replace(listen, &fixed))
            }),
            ..settings
        })
        .await;
        let driver = Driver::start(Dial {
            address: lab.grpc,
            roots: vec![lab.ca.certificate_pem().to_owned()],
            identities: identities(&lab.ca),
        });
        let site = Self {
            record: Tail::of(lab.path("state/audit.jsonl")),
            lab,
            vault,
            kucoin,
            driver,
            _ports: ports,
        };
        site.driver.more_calls(50).await;
        site
    }

    /// Waits for the next line about a change of `what`, and returns its outcome and details.
    pub(crate) async fn change(&mut self, what: &str) -> (String, String) {
        let record = std::cell::RefCell::new(&mut self.record);
        until(&format!("a change of {what} is on record"), async || {
            let mut record = record.borrow_mut();
            record.read_on();
            record.changes.iter().any(|change| change["what"] == what)
        })
        .await;
        let at = self
            .record
            .changes
            .iter()
            .position(|change| change["what"] == what);
        let change = self.record.changes.remove(at.unwrap());
        let digests = ["sha256_before", "sha256_after"].map(|key| change[key].as_str().unwrap());
        assert_ne!(digests[0], digests[1], "{change}");
        let text = |key: &str| change[key].as_str().unwrap_or_default().to_owned();
        (text("outcome"), text("detail"))
    }

    /// Waits until the newest change of `what` has been taken; a refusal of a half-changed state may stand before it.
    pub(crate) async fn taken(&mut self, what: &str) {
        while self.change(what).await.0 != "taken" {}
    }

    /// Text of `/readyz`.
    pub(crate) async fn readyz(&self) -> String {
        self.lab.get("/readyz").await.1
    }

    /// Waits until `/readyz` says this.
    pub(crate) async fn until_readyz_says(&self, part: &str) {
        let says = async || self.lab.get("/readyz?verbose").await.1.contains(part);
        until(&format!("/readyz says {part:?}"), says).await;
    }

    /// Waits until nothing is wrong any more.
    pub(crate) async fn until_all_is_well(&self) {
        let is_well = async || self.readyz().await == "ready\n";
        until("nothing is wrong any more", is_well).await;
    }

    /// The value of a metric with its labels; 0 where it is not written.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        self.lab.metric(name).await.unwrap_or_default()
    }

    /// Waits until a metric satisfies `condition`.
    pub(crate) async fn until_metric(&self, name: &str, condition: impl Fn(f64) -> bool) {
        let holds = async || condition(self.metric(name).await);
        until(&format!("metric {name}"), holds).await;
    }

    /// Stops the bots and compares what they were told with the record, call by call. Calls that began within
    /// `unrecorded` have no lines, since the file could not be written.
    pub(crate) async fn compare_record(self, unrecorded: &[(Instant, Instant)]) -> usize {
        let Self {
            mut lab, driver, ..
        } = self;
        let (calls, unsent) = driver.stop().await;
        lab.process().terminate();
        assert_eq!(lab.process().exit_code().await, Some(0));
        let mut lines: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        for line in lab.audit() {
            let id = line["request_id"].as_str().unwrap().to_owned();
            lines.entry(id).or_default().push(line);
        }
        for id in &unsent {
            assert!(!lines.contains_key(id), "{id} was sent twice");
        }
        let mut compared = 0;
        for call in &calls {
            let is_unrecorded = unrecorded
                .iter()
                .any(|(from, to)| call.ended >= *from && call.started <= *to);
            if is_unrecorded {
                continue;
            }
            compared += 1;
            let lines = lines.remove(&call.id).unwrap_or_default();
            let events: Vec<_> = lines
                .iter()
                .map(|line| line["event"].as_str().unwrap())
                .collect();
            let end = match events.as_slice() {
                [] => None,
                ["denied"] => Some(&lines[0]),
                ["intent", "outcome"] | ["intent", "outcome", "late_answer"] => Some(&lines[1]),
                _ => panic!("{}: {events:?}", call.id),
            };
            let recorded = end.map(|end| {
                let text = |key: &str| end[key].as_str().unwrap_or_default();
                (text("outcome"), text("reason"), text("code"))
            });
            match &call.told {
                Told::Answered { outcome, code } => {
                    assert_eq!(recorded, Some((*outcome, "", code.as_str())), "{call:?}");
                }
                Told::Failed { outcome, reason } => {
                    assert_eq!(
                        recorded,
                        Some((outcome.as_str(), reason.as_str(), "")),
                        "{call:?}"
                    );
                }
                Told::Unconnected => assert_eq!(recorded, None, "{call:?}"),
                // The bot knows nothing; the record may know either.
                Told::Unheard(_) => {}
            }
        }
        lab.check_record();
        compared
    }
}

/// Certificates of both bots.
pub(crate) fn identities(ca: &credbroker_sim::pki::Ca) -> BTreeMap<&'static str, Identity> {
    ["trader", "reader"]
        .into_iter()
        .map(|bot| (bot, ca.bot(bot).unwrap()))
        .collect()
}

/// Vault's body for a key.
pub(crate) fn written(name: &str, key: &SimKey) -> Value {
    json!({"mount": "kv", "path": kv_path("main", name), "data": secret(key)})
}

/// Waits at most as long as any other wait of a test; for what is not a condition but a future.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future)
        .await
        .unwrap_or_else(|_| panic!("it did not happen: {what}"))
}
