//! An installation of separate processes (the real broker, simulated Vault and KuCoin) and two bots that call all the time.
//!
//! The result of each call is kept with its time, so that a test can show what bots saw of a situation, how long it lasted,
//! and whether the audit log agrees.

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

/// Rules for bot `trader`, which reads and trades.
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

/// Added to [`TRADER`]: rules for bot `reader`, which only reads.
pub(crate) const READER: &str = r#"
[[grant]]
bot = "spiffe://demo.test/bot/reader"
account = "main"
scope = "spot-margin"
allow = ["read"]
"#;

/// Environment variable: which simulator a process runs.
const ROLE: &str = "CREDBROKER_DRIVE_ROLE";
/// Environment variable: the ports of the simulator.
const PORTS: &str = "CREDBROKER_DRIVE_PORTS";
/// Environment variable: the root token of the simulated Vault.
const TOKEN: &str = "CREDBROKER_DRIVE_TOKEN";

/// Environment variable: if set, the simulated KuCoin keeps every request, and lists them with `/_sim/placing`.
pub(crate) const KEEP_REQUESTS: &str = "CREDBROKER_DRIVE_KEEP_REQUESTS";

/// How long a bot waits for a call; the broker's own limit is 10 s.
const NO_ANSWER_AFTER: Duration = Duration::from_secs(30);

/// Calls in flight per bot: below the broker's limit, which is not under test here.
const IN_FLIGHT: usize = 200;

/// Not a real test: tests start this binary again with [`ROLE`] set to run a simulator in another process.
#[cfg(test)]
#[tokio::test]
async fn entry_point_of_a_simulator_process() {
    simulate().await;
}

/// Arguments with which this binary runs only [`simulate`].
pub(crate) const AS_TEST: &[&str] = &[
    "drive::entry_point_of_a_simulator_process",
    "--exact",
    "--nocapture",
];

/// Runs the simulator named by [`ROLE`] until stdin closes; returns false at once if it is not set.
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
    // libtest has printed an incomplete line, so `listening` starts with a line break.
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
            keep_requests: variable(KEEP_REQUESTS).map_or(0, |_| usize::MAX),
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

/// The pipe closes when the parent exits, so that no simulator outlives its test.
async fn until_stdin_closes() {
    let read = || std::io::stdin().read_to_end(&mut Vec::new());
    tokio::task::spawn_blocking(read).await.unwrap().unwrap();
}

/// A port chosen by the system, which stays reserved while nothing listens on it.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) address: SocketAddr,
    /// Bound but never listening: connections are refused, and no other process gets the port.
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

/// A simulator in a separate process, which can be killed and restarted at the same address.
pub(crate) struct Simulator {
    role: &'static str,
    arguments: &'static [&'static str],
    ports: Vec<Port>,
    /// Further environment variables.
    environment: Vec<(&'static str, String)>,
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
            environment: Vec::new(),
            process: None,
        }
    }

    /// Starts it with empty state.
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
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let started = tokio::task::spawn_blocking(move || {
            let started = lines.any(|line| line.is_ok_and(|line| line == "listening"));
            // libtest prints a line after a minute, and fails if the pipe is closed.
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

    pub(crate) fn address(&self, port: usize) -> SocketAddr {
        self.ports[port].address
    }

    fn url(&self, port: usize) -> String {
        format!("http://{}", self.ports[port].address)
    }

    /// Sends one command to its control API.
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

/// Starts Vault and KuCoin in separate processes, and returns them with the settings of a broker for them; with
/// `arguments` this binary runs as a simulator.
pub(crate) async fn simulators(
    arguments: &'static [&'static str],
) -> (Simulator, Simulator, Settings) {
    simulators_with(arguments, Vec::new()).await
}

/// The same, with further environment variables for KuCoin.
pub(crate) async fn simulators_with(
    arguments: &'static [&'static str],
    environment: Vec<(&'static str, String)>,
) -> (Simulator, Simulator, Settings) {
    let mut vault = Simulator::new("vault", arguments, [Port::reserve()]);
    let mut kucoin = Simulator::new("kucoin", arguments, [Port::reserve(), Port::reserve()]);
    kucoin.environment = environment;
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

/// The kind of a call.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Kind {
    Cancel,
    Order,
    Read,
}

/// The result of a call, as its bot saw it.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum CallResult {
    /// The bot got an answer of the exchange.
    Answered { outcome: &'static str, code: String },
    /// The bot got an error of the broker.
    Failed { outcome: String, reason: String },
    /// No connection, or it closed before the call was sent: the bot knows that nothing was sent.
    NotConnected,
    /// The connection closed after the call was sent, or no answer came in time.
    NoAnswer(String),
}

impl CallResult {
    pub(crate) fn is_accepted(&self) -> bool {
        matches!(
            self,
            Self::Answered {
                outcome: "accepted",
                ..
            }
        )
    }
}

impl fmt::Display for CallResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered { outcome, code } => write!(f, "{outcome} ({code})"),
            Self::Failed { outcome, reason } => write!(f, "`{reason}` ({outcome})"),
            Self::NotConnected => f.write_str("no connection (nothing sent)"),
            Self::NoAnswer(what) => write!(f, "no answer ({what})"),
        }
    }
}

/// A finished call of a bot.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) bot: &'static str,
    pub(crate) kind: Kind,
    /// Its request id in the audit log.
    pub(crate) id: String,
    pub(crate) started: Instant,
    pub(crate) ended: Instant,
    pub(crate) result: CallResult,
    pub(crate) stale_s: u64,
}

/// How bots connect: the broker's address, the CAs that they trust, and their own certificates.
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
    /// Start times of the calls in flight.
    open: Mutex<BTreeSet<(Instant, u64)>>,
    books: Mutex<Books>,
    /// Ids of first attempts that were never sent.
    unsent: Mutex<Vec<String>>,
    count: AtomicU64,
}

/// The trader's open orders on the exchange, as far as the trader knows.
#[derive(Default)]
struct Books {
    /// How often the exchange has lost its state, and with it all earlier orders.
    era: u64,
    /// Client order ids, oldest first, and whether each is a futures order.
    orders: VecDeque<(String, bool)>,
}

/// One bot's connection: the generation of its [`Dial`], its number, and the connection.
type ConnectionSlot = tokio::sync::Mutex<Option<(u64, u64, Patient)>>;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Driver {
    /// Starts a trader with 60 calls per second and a reader with 40.
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

    /// Sends new calls over new connections with changed settings; calls in flight finish on the old ones.
    pub(crate) fn redial(&self, change: impl FnOnce(&mut Dial)) {
        let mut dial = locked(&self.state.dial);
        let mut new = Dial::clone(&dial.1);
        change(&mut new);
        *dial = (dial.0 + 1, Arc::new(new));
    }

    /// Forgets all open orders after the exchange has lost its state.
    pub(crate) fn forget_orders(&self) {
        let mut books = locked(&self.state.books);
        *books = Books {
            era: books.era + 1,
            orders: VecDeque::new(),
        };
    }

    /// The number of orders that the trader can still cancel.
    pub(crate) fn cancellable_orders(&self) -> usize {
        locked(&self.state.books).orders.len()
    }

    /// All finished calls that started at `from` or later.
    pub(crate) fn calls_since(&self, from: Instant) -> Vec<Call> {
        let mut calls = locked(&self.state.calls).clone();
        calls.retain(|call| call.started >= from);
        calls
    }

    /// Waits until every call that has started by now has finished.
    pub(crate) async fn settled(&self) {
        let now = Instant::now();
        until("the calls in flight finish", async || {
            let open = locked(&self.state.open);
            open.first().is_none_or(|(started, _)| *started > now)
        })
        .await;
    }

    /// Waits until `count` calls have started after this moment and finished.
    pub(crate) async fn more_calls(&self, count: usize) {
        let from = Instant::now();
        until("more calls finish", async || {
            let calls = locked(&self.state.calls);
            let new = calls.iter().rev().take(4 * count);
            new.filter(|call| call.started >= from).count() >= count
        })
        .await;
        self.settled().await;
    }

    /// Starts no more calls.
    pub(crate) fn stop_new_calls(&mut self) {
        self.tasks.drain(..).for_each(|task| task.abort());
    }

    /// Starts no more calls and waits for those in flight. Returns all calls, and the ids of first attempts that were never
    /// sent.
    pub(crate) async fn stop(mut self) -> (Vec<Call>, Vec<String>) {
        self.stop_new_calls();
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
        let (slot, permits) = (
            Arc::new(ConnectionSlot::default()),
            Arc::new(Semaphore::new(IN_FLIGHT)),
        );
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for step in 0.. {
            ticks.tick().await;
            let permit = Arc::clone(&permits).acquire_owned().await.unwrap();
            let (state, slot) = (Arc::clone(&self), Arc::clone(&slot));
            tokio::spawn(async move {
                state.call(bot, step, &slot).await;
                drop(permit);
            });
        }
    }

    async fn call(&self, bot: &'static str, step: u64, slot: &ConnectionSlot) {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let started = Instant::now();
        locked(&self.open).insert((started, number));
        let is_futures = step.is_multiple_of(10);
        let era = locked(&self.books).era;
        let to_cancel = || locked(&self.books).orders.pop_front();
        let is_trader = bot == "trader";
        let mut cancelled = None;
        let (kind, order) = match step % 5 {
            0 | 1 if is_trader => (Kind::Order, None),
            2 if is_trader => {
                cancelled = to_cancel();
                match &cancelled {
                    Some((id, is_futures)) => (Kind::Cancel, Some(cancel(id, *is_futures))),
                    None => (Kind::Read, None),
                }
            }
            _ => (Kind::Read, None),
        };
        let mut tries = 0;
        let (id, result, stale_s) = loop {
            tries += 1;
            let id = format!("{bot}-{number}-{tries}");
            let mut call = match (&kind, &order) {
                (_, Some(order)) => order.clone(),
                (Kind::Order, None) if is_futures => futures_order(&id),
                (Kind::Order, None) => spot_order(&id),
                (_, None) => accounts(),
            };
            call.request_id.clone_from(&id);
            let (id, result, stale_s) = self.attempt(bot, slot, call).await;
            // Like every gRPC library: a call that was provably not sent is retried once on another connection.
            if tries == 1 && result == CallResult::NotConnected {
                locked(&self.unsent).push(id);
                continue;
            }
            break (id, result, stale_s);
        };
        let open_order = match (kind, result.is_accepted(), cancelled) {
            (Kind::Order, true, _) => Some((id.clone(), is_futures)),
            (_, false, order) => order,
            _ => None,
        };
        let mut books = locked(&self.books);
        if books.era == era {
            books.orders.extend(open_order);
        }
        drop(books);
        let mut open = locked(&self.open);
        locked(&self.calls).push(Call {
            bot,
            kind,
            id,
            started,
            ended: Instant::now(),
            result,
            stale_s,
        });
        open.remove(&(started, number));
    }

    /// Sends a call once; returns its id in the audit log, its result, and how long ago Vault last confirmed the key.
    async fn attempt(
        &self,
        bot: &'static str,
        slot: &ConnectionSlot,
        call: SignAndSendRequest,
    ) -> (String, CallResult, u64) {
        let id = call.request_id.clone();
        let Ok((number, client)) = self.connected(bot, slot).await else {
            return (id, CallResult::NotConnected, 0);
        };
        let status = match timeout(NO_ANSWER_AFTER, Bot::over(client).send(call)).await {
            Ok(Ok(answer)) => {
                let result = CallResult::Answered {
                    outcome: word(answer.outcome()),
                    code: answer.code,
                };
                return (id, result, answer.stale_seconds);
            }
            Ok(Err(status)) => status,
            Err(_) => return (id, CallResult::NoAnswer("for 30 s".to_owned()), 0),
        };
        if status.get_details_error_info().is_some() {
            let (_, reason, outcome, id) = failure(&status);
            return (id, CallResult::Failed { outcome, reason }, 0);
        }
        let mut slot = slot.lock().await;
        if slot.as_ref().is_some_and(|slot| slot.1 == number) {
            *slot = None;
        }
        let result = if was_never_sent(&status) {
            CallResult::NotConnected
        } else {
            CallResult::NoAnswer(format!("{status:?}"))
        };
        (id, result, 0)
    }

    /// The bot's connection; reconnects if it is closed or its [`Dial`] has changed.
    async fn connected(
        &self,
        bot: &'static str,
        slot: &ConnectionSlot,
    ) -> std::io::Result<(u64, Patient)> {
        let mut slot = slot.lock().await;
        let (generation, dial) = locked(&self.dial).clone();
        if let Some((of, number, client)) = &*slot
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
        *slot = Some((generation, number, client.clone()));
        Ok((number, client))
    }
}

/// Whether the call was not sent: the connection was closed before, or the broker rejected the stream with GOAWAY.
fn was_never_sent(status: &tonic::Status) -> bool {
    let first = std::error::Error::source(status);
    let causes: Vec<_> = std::iter::successors(first, |cause| cause.source()).collect();
    let mut hyper_errors = causes
        .iter()
        .filter_map(|cause| cause.downcast_ref::<hyper::Error>());
    // RFC 9113, 6.8: the stream id is above the last one that the server has processed.
    let is_beyond = |error: &hyper::Error| format!("{error:?}").contains("NO_ERROR, Remote");
    hyper_errors.any(|error| error.is_canceled() || is_beyond(error))
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

/// Reads the audit log as it grows, and keeps its `change` lines.
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

    /// Reads the new lines.
    pub(crate) fn read_new(&mut self) {
        let mut file = File::open(&self.path).unwrap();
        file.seek(SeekFrom::Start(self.read)).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        self.read += whole as u64;
        for line in text[..whole].lines() {
            if line.contains("\"event\":\"change\"") && !line.contains("\"outcome\":\"loaded\"") {
                self.changes.push(serde_json::from_str(line).unwrap());
            }
        }
    }
}

/// An installation with its simulators and bots.
pub(crate) struct Site {
    pub(crate) lab: Lab,
    pub(crate) vault: Simulator,
    pub(crate) kucoin: Simulator,
    pub(crate) driver: Driver,
    pub(crate) audit_tail: Tail,
    _ports: [Port; 2],
}

impl Site {
    /// Starts everything and waits until the bots have finished 50 calls. With `arguments` this binary runs as a simulator.
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
            // A restarted broker listens on the same address.
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
            audit_tail: Tail::of(lab.path("state/audit.jsonl")),
            lab,
            vault,
            kucoin,
            driver,
            _ports: ports,
        };
        site.driver.more_calls(50).await;
        site
    }

    /// Waits for the next `change` line about `what` (`rules` or `tls`), and returns its outcome and detail.
    pub(crate) async fn change(&mut self, what: &str) -> (String, String) {
        let audit_tail = std::cell::RefCell::new(&mut self.audit_tail);
        until(&format!("a change of {what} is audited"), async || {
            let mut audit_tail = audit_tail.borrow_mut();
            audit_tail.read_new();
            audit_tail
                .changes
                .iter()
                .any(|change| change["file"] == what)
        })
        .await;
        let at = self
            .audit_tail
            .changes
            .iter()
            .position(|change| change["file"] == what);
        let change = self.audit_tail.changes.remove(at.unwrap());
        let digests = ["sha256_before", "sha256_after"].map(|key| change[key].as_str().unwrap());
        assert_ne!(digests[0], digests[1], "{change}");
        let text = |key: &str| change[key].as_str().unwrap_or_default().to_owned();
        (text("outcome"), text("detail"))
    }

    /// Waits until a change of `what` has been applied; a rejection of a half-written change may come before it.
    pub(crate) async fn until_applied(&mut self, what: &str) {
        while self.change(what).await.0 != "reloaded" {}
    }

    /// Text of `/readyz`.
    pub(crate) async fn readyz(&self) -> String {
        self.lab.get("/readyz").await.1
    }

    /// Waits until `/readyz?verbose` contains this text.
    pub(crate) async fn until_readyz_contains(&self, part: &str) {
        let is_shown = async || self.lab.get("/readyz?verbose").await.1.contains(part);
        until(&format!("/readyz contains {part:?}"), is_shown).await;
    }

    /// Waits until `/readyz` reports no problem.
    pub(crate) async fn until_all_ready(&self) {
        let is_ready = async || self.readyz().await == "ready\n";
        until("/readyz reports no problem", is_ready).await;
    }

    /// The value of a metric with its labels; 0 if it is missing.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        self.lab.metric(name).await.unwrap_or_default()
    }

    /// Waits until a metric satisfies `condition`.
    pub(crate) async fn until_metric(&self, name: &str, condition: impl Fn(f64) -> bool) {
        let holds = async || condition(self.metric(name).await);
        until(&format!("metric {name} has the expected value"), holds).await;
    }

    /// Stops the bots and the broker, and compares each call's result with the audit log. Calls that overlap `unrecorded` are
    /// skipped, since the audit log could not be written then. Returns how many calls were compared.
    pub(crate) async fn compare_with_audit_log(self, unrecorded: &[(Instant, Instant)]) -> usize {
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
            assert!(
                !lines.contains_key(id),
                "{id} was audited, but its bot never sent it"
            );
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
            let last = match events.as_slice() {
                [] => None,
                ["denied"] => Some(&lines[0]),
                ["intent", "outcome"]
                | ["intent", "outcome", "late_answer" | "resolved"]
                | ["intent", "outcome", "late_answer", "resolved"] => Some(&lines[1]),
                _ => panic!("{}: {events:?}", call.id),
            };
            let recorded = last.map(|last| {
                let text = |key: &str| last[key].as_str().unwrap_or_default();
                (text("outcome"), text("reason"), text("code"))
            });
            match &call.result {
                CallResult::Answered { outcome, code } => {
                    assert_eq!(recorded, Some((*outcome, "", code.as_str())), "{call:?}");
                }
                CallResult::Failed { outcome, reason } => {
                    assert_eq!(
                        recorded,
                        Some((outcome.as_str(), reason.as_str(), "")),
                        "{call:?}"
                    );
                }
                CallResult::NotConnected => assert_eq!(recorded, None, "{call:?}"),
                // The bot does not know the outcome, so any is possible.
                CallResult::NoAnswer(_) => {}
            }
        }
        lab.check_audit_log();
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

/// The body of a control request that writes a key to the simulated Vault.
pub(crate) fn written(name: &str, key: &SimKey) -> Value {
    json!({"mount": "kv", "path": kv_path("main", name), "data": secret(key)})
}

/// Waits for a future; fails after 20 s, like [`until`].
pub(crate) async fn within<T>(event: &str, future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future)
        .await
        .unwrap_or_else(|_| panic!("timed out waiting for {event}"))
}
