//! A test installation: the broker, its simulators, and any number of bots.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::future::Future;
use std::io::{self, BufRead, BufReader, Write as _};
use std::net::SocketAddr;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use credbroker::clock::Clock;
use credbroker::config::Config;
use credbroker::kucoin::Catalog;
use credbroker::proto::admin_client::AdminClient;
use credbroker::proto::broker_client::BrokerClient;
use credbroker::proto::{Method, QueryParameter, Scope, SignAndSendRequest, SignAndSendResponse};
use credbroker::server::Server;
use credbroker_sim::installation::{Installation, Settings, TOKEN_FILE, grant};
use credbroker_sim::pki::Identity;
use credbroker_sim::proxy::Proxy;
use http_body::Body;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::client::GrpcService;
use tonic::codegen::{Service, StdError};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// The longest that a test waits for a condition; a wait ends as soon as its condition holds.
pub(crate) const WAIT_LIMIT: Duration = Duration::from_secs(60);

/// A broker, its simulators, and its files.
pub(crate) struct Lab {
    installation: Installation,
    pub(crate) server: Option<Server>,
    pub(crate) process: Option<Process>,
    /// Address of the bots' listener.
    pub(crate) grpc: SocketAddr,
    /// Address of the listener for health and metrics.
    pub(crate) ops: SocketAddr,
    /// Address of the admin listener.
    pub(crate) admin: SocketAddr,
    /// Whether the requests that the exchange received are compared with the audit log at the end.
    pub(crate) is_audit_checked: bool,
}

/// Exit code and output of a command.
#[derive(Debug)]
pub(crate) struct CommandOutput {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl CommandOutput {
    /// Its stderr as one line, since the command wraps lines at the width of a terminal.
    pub(crate) fn stderr_line(&self) -> String {
        in_one_line(&self.stderr)
    }
}

/// Runs the real program until it exits.
pub(crate) async fn program(words: &[&str], input: impl AsRef<[u8]>) -> CommandOutput {
    let mut command = Command::new(env!("CARGO_BIN_EXE_credbroker"));
    command
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let input = input.as_ref().to_owned();
    // Not on this thread: the broker may be running on it.
    let run = move || {
        let mut child = command.spawn().unwrap();
        // Fails if the program has already exited.
        let _ = child.stdin.take().unwrap().write_all(&input);
        child.wait_with_output().unwrap()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    CommandOutput {
        code: output.status.code(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// A text with its line breaks and indents replaced by single spaces.
pub(crate) fn in_one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Lab {
    pub(crate) async fn start() -> Self {
        Self::with(Settings::default()).await
    }

    pub(crate) async fn with(settings: Settings) -> Self {
        let (process, wait_ready) = (settings.process, settings.wait_ready);
        let mut lab = Self::install(settings).await;
        if process {
            lab.spawn_broker().await;
        } else {
            lab.start_broker().await;
        }
        if wait_ready {
            lab.until_ready().await;
        }
        lab
    }

    /// Starts the simulators and writes the broker's files, but does not start the broker.
    pub(crate) async fn install(settings: Settings) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let unset = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            installation: Installation::start(settings, folder).await.unwrap(),
            server: None,
            process: None,
            grpc: unset,
            ops: unset,
            admin: unset,
            is_audit_checked: true,
        }
    }

    pub(crate) fn config(&self) -> Config {
        let text = std::fs::read_to_string(self.path("config.toml")).unwrap();
        Config::parse(&text, self.folder.path()).unwrap()
    }

    pub(crate) fn proxy(&self) -> &Proxy {
        self.proxy.as_ref().unwrap()
    }

    pub(crate) async fn start_broker(&mut self) {
        self.start_broker_on(Clock::system()).await;
    }

    pub(crate) async fn start_broker_on(&mut self, clock: Clock) {
        let server = Server::start_on(self.config(), clock).await.unwrap();
        (self.grpc, self.ops) = (server.grpc, server.ops);
        if let Some(admin) = server.admin {
            self.admin = admin;
        }
        self.server = Some(server);
    }

    /// Starts the broker as the real program.
    pub(crate) async fn spawn_broker(&mut self) {
        self.spawn_broker_under(&[]).await;
    }

    /// The same, started by a command such as `prlimit` that executes it in its own process.
    pub(crate) async fn spawn_broker_under(&mut self, command: &[&str]) {
        self.adopt(Process::start(command, &self.path("config.toml")))
            .await;
    }

    /// Waits until a broker that was started for this installation listens.
    pub(crate) async fn adopt(&mut self, process: Process) {
        let listening = process.log_line_with("listening").await;
        // The log is JSON or text.
        let address = |name: &str| -> Option<SocketAddr> {
            let (json, text) = (format!("\"{name}\":\""), format!(" {name}="));
            let (_, rest) = listening
                .split_once(&json)
                .or_else(|| listening.split_once(&text))?;
            rest.split(['"', ' ']).next()?.parse().ok()
        };
        (self.grpc, self.ops) = (address("grpc").unwrap(), address("ops").unwrap());
        self.admin = address("admin").unwrap_or(self.admin);
        self.process = Some(process);
    }

    pub(crate) fn process(&mut self) -> &mut Process {
        self.process.as_mut().unwrap()
    }

    /// Stops the broker, checks the audit log, and returns how many calls were left unresolved.
    pub(crate) async fn stop(&mut self) -> u64 {
        let unresolved = self.server.take().unwrap().stop().await;
        self.check_audit_log();
        unresolved
    }

    pub(crate) async fn until_ready(&self) {
        until("the broker is ready", async || {
            self.get("/readyz").await.0 == 200
        })
        .await;
    }

    /// Waits until the only problem is that the audit log cannot be written.
    pub(crate) async fn until_only_the_audit_log_fails(&self) {
        until("only the audit log fails", async || {
            let (status, text) = self.get("/readyz").await;
            let lines: Vec<_> = text.lines().collect();
            status == 503
                && matches!(lines.as_slice(), [_, line, ..] if line.starts_with("audit: /dev/full cannot be written"))
                // Nor can the clientOids of earlier runs be read from it.
                && lines.iter().skip(2).all(|line| line.starts_with("orders: "))
        })
        .await;
    }

    /// Waits until the keys are loaded; for tests in which the broker never becomes ready.
    pub(crate) async fn until_keys_loaded(&self) {
        until("the keys are loaded", async || {
            let text = self.get("/readyz?verbose").await.1;
            text.contains(" loaded") && !text.contains("waiting for Vault")
        })
        .await;
    }

    /// Waits until the broker has tested the keys of both accounts: after that, only calls of bots are sent and audited.
    pub(crate) async fn until_keys_tested(&self) {
        until("both keys are tested", async || {
            let mut is_tested = true;
            for account in ["main", "other"] {
                let labels = format!("{{account=\"{account}\",key=\"main\"}}");
                let name = format!("credbroker_key_tested_timestamp_seconds{labels}");
                is_tested &= self.metric(&name).await.is_some();
            }
            is_tested
        })
        .await;
    }

    /// A connected bot with a certificate of its own.
    pub(crate) async fn bot(&self, name: &str) -> Bot {
        self.bot_with(&self.ca.bot(name).unwrap()).await
    }

    pub(crate) async fn bot_with(&self, identity: &Identity) -> Bot {
        let channel = self.endpoint(identity).connect().await.unwrap();
        Bot {
            client: BrokerClient::new(channel),
        }
    }

    /// A bot without deadlines of its own: on a busy machine its library would give up first and hide the broker's answer.
    pub(crate) async fn patient_bot(&self, name: &str) -> Bot<Patient> {
        self.patient_bot_with(&self.ca.bot(name).unwrap()).await
    }

    pub(crate) async fn patient_bot_with(&self, identity: &Identity) -> Bot<Patient> {
        Bot::over(self.patient(identity).await)
    }

    /// A connected admin with a certificate of this name.
    pub(crate) async fn admin_client(&self, name: &str) -> AdminClient<Patient> {
        let identity = self.ca.admin(name).unwrap();
        let roots = [self.ca.certificate_pem().to_owned()];
        let connection = patient(self.admin, &roots, &identity).await.unwrap();
        admin_over(connection)
    }

    /// Runs the real program as an admin of this name.
    pub(crate) async fn admin_cli(&self, name: &str, words: &[&str]) -> CommandOutput {
        self.write_admin_files(&self.ca.admin(name).unwrap());
        self.cli(words, "").await
    }

    /// Writes `admin.toml` and the files that it names.
    pub(crate) fn write_admin_files(&self, identity: &Identity) {
        let ca = "admin-broker-ca.pem";
        self.write(ca, self.ca.certificate_pem()).unwrap();
        let vault = self.vault.address();
        let vault = format!("[vault]\naddress = \"{vault}\"\n[vault.auth]\n{TOKEN_FILE}\n");
        self.write_admin(identity, self.admin, ca, &vault).unwrap();
    }

    /// Runs the real program with this installation's `admin.toml` and with `input` on its stdin.
    pub(crate) async fn cli(&self, words: &[&str], input: impl AsRef<[u8]>) -> CommandOutput {
        let file = self.path("admin.toml");
        program(
            &[words, &["--admin", file.to_str().unwrap()]].concat(),
            input,
        )
        .await
    }

    /// Runs the real program with this installation's `config.toml` and an empty stdin.
    pub(crate) async fn run(&self, words: &[&str]) -> CommandOutput {
        let file = self.path("config.toml");
        program(&[words, &["--config", file.to_str().unwrap()]].concat(), "").await
    }

    /// A connection for raw requests that a gRPC library would not send.
    pub(crate) async fn patient(&self, identity: &Identity) -> Patient {
        let roots = [self.ca.certificate_pem().to_owned()];
        patient(self.grpc, &roots, identity).await.unwrap()
    }

    /// A TLS connection on which nothing has been sent yet.
    pub(crate) async fn tls(&self, identity: &Identity) -> io::Result<TlsStream<TcpStream>> {
        tls(self.grpc, &self.client_tls(identity)).await
    }

    /// The TLS settings of a bot with this certificate.
    pub(crate) fn client_tls(&self, identity: &Identity) -> TlsConnector {
        client_tls(&[self.ca.certificate_pem().to_owned()], identity)
    }

    pub(crate) fn endpoint(&self, identity: &Identity) -> Endpoint {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.ca.certificate_pem()))
            .identity(tonic::transport::Identity::from_pem(
                &identity.certificate_pem,
                &identity.key_pem,
            ))
            .domain_name("localhost");
        Endpoint::from_shared(format!("https://{}", self.grpc))
            .unwrap()
            .tls_config(tls)
            .unwrap()
    }

    /// Sends a GET to the ops listener and returns status and body.
    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let answer = http(&self.ops.to_string(), &format!("GET {path}"), "", "").await;
        let (status, _, body) = answer.unwrap();
        (status, body)
    }

    /// The value of a metric, by its name and labels as `/metrics` shows them; `None` if it is missing.
    pub(crate) async fn metric(&self, name: &str) -> Option<f64> {
        let (_, text) = self.get("/metrics").await;
        let name = format!("{} ", name.trim_start_matches("credbroker_"));
        let mut lines = text
            .lines()
            .filter_map(|line| line.strip_prefix("credbroker_"));
        Some(
            lines
                .find_map(|line| line.strip_prefix(&name))?
                .parse()
                .unwrap(),
        )
    }

    /// Replaces text in the configuration file before a broker starts with it.
    pub(crate) fn reconfigure(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.path("config.toml")).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(self.path("config.toml"), text.replace(from, to)).unwrap();
    }

    /// Every audit line about a call of a bot.
    pub(crate) fn audit(&self) -> Vec<Value> {
        let mut lines = self.audit_file();
        lines.retain(|line| line["bot"].is_string());
        lines
    }

    /// Every `act` line of the audit log: actions of admins, and events of keys.
    pub(crate) fn acts(&self) -> Vec<Value> {
        let mut lines = self.audit_file();
        lines.retain(|line| line["event"] == "act");
        lines
    }

    /// Every audit line about a change of rules or certificates, except those written at a start.
    pub(crate) fn changes(&self) -> Vec<Value> {
        let mut lines = self.audit_file();
        lines.retain(|line| line["event"] == "change" && line["outcome"] != "loaded");
        lines
    }

    /// Every line of the audit log.
    pub(crate) fn audit_file(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("state/audit.jsonl")).unwrap();
        // The last line may be only half written.
        let lines = text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// The audit lines of one call, by its request id.
    pub(crate) fn audit_of(&self, request_id: &str) -> Vec<Value> {
        let mut lines = self.audit();
        lines.retain(|line| line["request_id"] == request_id);
        lines
    }

    /// Waits until work that timers have started is done: no call is open and nothing has reached the audit log, Vault or
    /// the exchange for a few round trips; or, if something hangs, until there were many.
    async fn until_quiet(&self) {
        let mut quiet = 0;
        for _ in 0..100 {
            let before = self.activity();
            self.get("/healthz").await;
            let now = self.activity();
            let has_open_calls = now.intents > now.outcomes;
            quiet = if now == before && !has_open_calls {
                quiet + 1
            } else {
                0
            };
            if quiet == 8 {
                break;
            }
        }
    }

    fn activity(&self) -> Activity {
        let text = std::fs::read_to_string(self.path("state/audit.jsonl")).unwrap_or_default();
        let count = |event: &str| text.matches(&format!("\"event\":\"{event}\"")).count();
        Activity {
            intents: count("intent"),
            outcomes: count("outcome"),
            at_exchange: self.kucoin.everything_received().len(),
            at_vault: self.vault.requests().len(),
        }
    }

    /// Checks that every audited call has exactly one outcome, and that the exchange received no unaudited request.
    pub(crate) fn check_audit_log(&self) {
        let mut calls: BTreeMap<(String, u64), (usize, usize)> = BTreeMap::new();
        for line in self.audited_calls() {
            let call = (
                line["run"].as_str().unwrap().to_owned(),
                line["call"].as_u64().unwrap(),
            );
            let counts = calls.entry(call).or_default();
            match line["event"].as_str().unwrap() {
                "intent" => counts.0 += 1,
                "outcome" => counts.1 += 1,
                "denied" | "late_answer" | "resolved" => {}
                other => panic!("unknown event {other}"),
            }
        }
        for (call, counts) in &calls {
            assert!(
                matches!(counts, (0, 0) | (1, 1)),
                "call {call:?} has {counts:?} intents and outcomes"
            );
        }
        self.check_sent();
    }

    /// Checks that each request that the exchange received has an intent line of its own with the same method, target and
    /// body.
    pub(crate) fn check_sent(&self) {
        if !self.is_audit_checked {
            return;
        }
        let mut intents: BTreeMap<RequestKey, usize> = BTreeMap::new();
        for line in self.audited_calls() {
            if line["event"] == "intent" {
                let text = |field: &str| line[field].as_str().unwrap().to_owned();
                let key = (text("method"), text("target"), text("body_sha256"));
                *intents.entry(key).or_default() += 1;
            }
        }
        // The broker's own requests for the time and its address are not audited.
        let is_public = |path: &str| matches!(path, "/api/v1/timestamp" | "/api/v1/my-ip");
        let mut received: BTreeMap<RequestKey, (bool, usize)> = BTreeMap::new();
        for request in self.kucoin.everything_received() {
            if request.is_internal() && is_public(request.path()) {
                continue;
            }
            let body = Sha256::digest(&request.body);
            let body = body
                .iter()
                .fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
            let count = received
                .entry((request.method.clone(), request.target.clone(), body))
                .or_default();
            // A request rejected for its timestamp or key is sent once more, without another intent.
            let was_refused = request
                .code()
                .is_some_and(|code| ("400002"..="400009").contains(&code));
            count.1 += usize::from(!was_refused);
            let id = request.endpoint.as_deref().unwrap_or_default();
            count.0 = Catalog::get().by_id(id).is_some_and(|e| e.idempotent);
        }
        for (key, (is_idempotent, count)) in received {
            // An idempotent request is sent once more when its answer is lost.
            let times = if is_idempotent { 2 } else { 1 };
            let masked = || intents.iter().find(|(intent, _)| is_masked(&key, intent));
            let found = intents.get(&key).or_else(|| Some(masked()?.1));
            let intents = found.copied().unwrap_or_default();
            assert!(
                intents > 0 && times * intents >= count,
                "{key:?}: received {count} times, {intents} intents"
            );
        }
    }

    /// The lines about calls, from the audit log and the files that it was renamed to. Torn lines are ignored: no
    /// risk-increasing request is sent unless its line is complete.
    fn audited_calls(&self) -> Vec<Value> {
        let mut lines = Vec::new();
        for entry in std::fs::read_dir(self.path("state")).into_iter().flatten() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy();
            if name.starts_with("audit.jsonl") {
                let text = std::fs::read_to_string(&path).unwrap();
                let parsed = text
                    .lines()
                    .filter_map(|line| serde_json::from_str(line).ok());
                lines.extend(parsed);
            }
        }
        lines.retain(|line: &Value| line["call"].is_u64() && line["torn"] != true);
        lines
    }
}

/// Identifies a request in the audit log: method, target, and digest of the body.
type RequestKey = (String, String, String);

/// A masked query value in the audit log: `***`, percent-encoded.
const MASK: &str = "%2A%2A%2A";

/// Whether the audit log has a request with masked query values, since these can be secret.
fn is_masked(request: &RequestKey, audited: &RequestKey) -> bool {
    let is_same = |(sent, audited): (&str, &str)| {
        let name = audited
            .strip_suffix(MASK)
            .filter(|name| name.ends_with('='));
        sent == audited || name.is_some_and(|name| sent.starts_with(name))
    };
    let parts = |target: &str| target.matches(['?', '&']).count();
    audited.1.contains(MASK)
        && (&request.0, &request.2) == (&audited.0, &audited.2)
        && parts(&request.1) == parts(&audited.1)
        && request
            .1
            .split(['?', '&'])
            .zip(audited.1.split(['?', '&']))
            .all(is_same)
}

impl Deref for Lab {
    type Target = Installation;

    fn deref(&self) -> &Installation {
        &self.installation
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check_sent();
        }
    }
}

/// What a broker has done so far.
#[derive(Eq, PartialEq)]
struct Activity {
    intents: usize,
    outcomes: usize,
    at_exchange: usize,
    at_vault: usize,
}

/// A clock that a test can advance, for a broker in this process and its exchange.
pub(crate) struct Time {
    since: std::time::Instant,
    skipped: Arc<Mutex<Duration>>,
    /// How far the exchange's clock is set ahead in addition to skipped time, in milliseconds.
    ahead_ms: AtomicI64,
    /// How far the broker's system clock is set ahead, in milliseconds.
    system_ms: Arc<AtomicI64>,
}

impl Time {
    /// `ahead_ms`: how far the exchange's clock is ahead of this machine's.
    pub(crate) fn new(ahead_ms: i64) -> Self {
        Self {
            since: std::time::Instant::now(),
            skipped: Arc::default(),
            ahead_ms: AtomicI64::new(ahead_ms),
            system_ms: Arc::default(),
        }
    }

    /// The clock for the broker.
    pub(crate) fn clock(&self) -> Clock {
        let (since, skipped) = (self.since, Arc::clone(&self.skipped));
        let (system, system_ms) = (Clock::system(), Arc::clone(&self.system_ms));
        let passed = Arc::clone(&skipped);
        Clock::reading(move || since.elapsed() + *skipped.lock().unwrap()).with_wall(move || {
            let passed_ms = i64::try_from(passed.lock().unwrap().as_millis()).unwrap();
            system.wall_ms() + passed_ms + system_ms.load(Ordering::Relaxed)
        })
    }

    /// The time since this clock was created, including skipped time.
    pub(crate) fn passed(&self) -> Duration {
        self.since.elapsed() + *self.skipped.lock().unwrap()
    }

    /// Sets only the broker's system clock ahead.
    pub(crate) fn step_system(&self, by_ms: i64) {
        self.system_ms.fetch_add(by_ms, Ordering::Relaxed);
    }

    /// Suspends the broker's machine: clocks advance, but timers do not.
    pub(crate) fn sleep(&self, lab: &Lab, time: Duration) {
        *self.skipped.lock().unwrap() += time;
        self.set_exchange(lab);
    }

    /// Advances clocks and timers; a call in flight may reach its timeouts.
    pub(crate) async fn pass(&self, lab: &Lab, time: Duration) {
        self.sleep(lab, time);
        // Tasks with a short delay before their long wait can start that wait.
        let first = time.min(Duration::from_secs(1));
        for step in [first, time.saturating_sub(first)] {
            tokio::time::pause();
            tokio::time::advance(step).await;
            tokio::time::resume();
            lab.until_quiet().await;
        }
    }

    /// Sets only the exchange's clock ahead.
    pub(crate) fn jump(&self, lab: &Lab, by_ms: i64) {
        self.ahead_ms.fetch_add(by_ms, Ordering::Relaxed);
        self.set_exchange(lab);
    }

    fn set_exchange(&self, lab: &Lab) {
        let skipped_ms = i64::try_from(self.skipped.lock().unwrap().as_millis()).unwrap();
        let ahead_ms = self.ahead_ms.load(Ordering::Relaxed);
        lab.kucoin.set_clock_offset_ms(skipped_ms + ahead_ms);
    }
}

/// The real program; dropping this kills it.
pub(crate) struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
    is_read: Arc<AtomicBool>,
    is_paused: Arc<AtomicBool>,
    /// The pipe from which the log is read.
    pipe: OwnedFd,
}

impl Process {
    fn start(command: &[&str], config: &Path) -> Self {
        Self::start_with(command, config, Stdio::null(), Stdio::inherit())
    }

    pub(crate) fn start_with(command: &[&str], config: &Path, stdin: Stdio, stdout: Stdio) -> Self {
        let program = [env!("CARGO_BIN_EXE_credbroker"), "serve", "--config"];
        let mut words = command.iter().chain(&program);
        let mut child = Command::new(words.next().unwrap())
            .args(words)
            .arg(config)
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, sink) = (child.stderr.take().unwrap(), Arc::clone(&log));
        let pipe = stderr.as_fd().try_clone_to_owned().unwrap();
        let is_paused = Arc::<AtomicBool>::default();
        let wait = Arc::clone(&is_paused);
        let is_read = Arc::new(AtomicBool::new(true));
        let keep_reading = Arc::clone(&is_read);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut log = sink.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
                if !keep_reading.load(Ordering::Relaxed) {
                    break;
                }
                while wait.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        });
        Self {
            child,
            log,
            is_read,
            is_paused,
            pipe,
        }
    }

    /// Stops reading the log, or reads on; the pipe stays open.
    pub(crate) fn pause_log(&self, is_paused: bool) {
        self.is_paused.store(is_paused, Ordering::Relaxed);
    }

    /// Bytes of the log that are in the pipe and not read.
    #[allow(dead_code, reason = "for benches/exhaustion.rs")]
    pub(crate) fn unread_log(&self) -> u64 {
        rustix::io::ioctl_fionread(&self.pipe).unwrap()
    }

    /// Reads one more line and then closes the pipe, like a log collector that crashes.
    pub(crate) fn close_log(&self) {
        self.is_read.store(false, Ordering::Relaxed);
    }

    /// Everything on stderr so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits for a log line that contains this text, and returns the first one.
    pub(crate) async fn log_line_with(&self, text: &str) -> String {
        let find = || {
            self.log()
                .lines()
                .find(|line| line.contains(text))
                .map(ToOwned::to_owned)
        };
        until(&format!("the log contains {text:?}"), async || {
            find().is_some()
        })
        .await;
        find().unwrap()
    }

    /// Waits for a log line with this message, and returns the first one.
    pub(crate) async fn log_line(&self, message: &str) -> Value {
        let find = || {
            let log = self.log();
            let mut lines = log
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.find(|line| line["message"] == message)
        };
        until(
            &format!("the log contains message {message:?}"),
            async || find().is_some(),
        )
        .await;
        find().unwrap()
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        self.signal("TERM");
    }

    /// Sends a signal by its name.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .arg(format!("-{name}"))
            .arg(self.id().to_string())
            .status();
        assert!(sent.unwrap().success());
    }

    /// How it has exited; `None` while it runs.
    pub(crate) fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until it exits, and returns the exit code.
    pub(crate) async fn exit_code(&mut self) -> Option<i32> {
        let process = std::cell::RefCell::new(self);
        let exit_status = || process.borrow_mut().exit_status();
        until("the broker exits", async || exit_status().is_some()).await;
        exit_status().unwrap().code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An HTTP/2 connection without client-side deadlines: it sends `grpc-timeout`, and only the broker enforces it.
#[derive(Clone)]
pub(crate) struct Patient(hyper::client::conn::http2::SendRequest<tonic::body::Body>);

impl Patient {
    /// Whether the connection is open, as far as the client can tell.
    pub(crate) fn is_open(&self) -> bool {
        !self.0.is_closed()
    }
}

impl Service<http::Request<tonic::body::Body>> for Patient {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// The TLS settings of a client with this certificate.
fn client_tls(roots: &[String], identity: &Identity) -> TlsConnector {
    let mut trusted = rustls::RootCertStore::empty();
    for root in roots {
        let root = CertificateDer::from_pem_slice(root.as_bytes()).unwrap();
        trusted.add(root).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap();
    let pem = identity.certificate_pem.as_bytes();
    let mut tls = tls
        .with_root_certificates(trusted)
        .with_client_auth_cert(
            CertificateDer::pem_slice_iter(pem)
                .collect::<Result<_, _>>()
                .unwrap(),
            PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).unwrap(),
        )
        .unwrap();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    TlsConnector::from(Arc::new(tls))
}

/// Connects and trusts the CAs in `roots` (PEM). Fails if the server rejects the connection.
pub(crate) async fn patient(
    address: SocketAddr,
    roots: &[String],
    identity: &Identity,
) -> io::Result<Patient> {
    let stream = tls(address, &client_tls(roots, identity)).await?;
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
    tokio::spawn(connection);
    Ok(Patient(sender))
}

/// A client for admin calls over this connection.
pub(crate) fn admin_over(connection: Patient) -> AdminClient<Patient> {
    AdminClient::with_origin(connection, "https://localhost".parse().unwrap())
}

/// One bot's connection.
#[derive(Clone)]
pub(crate) struct Bot<T = Channel> {
    pub(crate) client: BrokerClient<T>,
}

impl<T> Bot<T>
where
    T: GrpcService<tonic::body::Body, Error: Into<StdError>>,
    T::ResponseBody: Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
{
    pub(crate) async fn send(
        &mut self,
        request: SignAndSendRequest,
    ) -> Result<SignAndSendResponse, Status> {
        Ok(self.client.sign_and_send(request).await?.into_inner())
    }

    pub(crate) async fn send_within(
        &mut self,
        request: SignAndSendRequest,
        limit: Duration,
    ) -> Result<SignAndSendResponse, Status> {
        let mut request = tonic::Request::new(request);
        request.set_timeout(limit);
        Ok(self.client.sign_and_send(request).await?.into_inner())
    }
}

impl Bot<Patient> {
    pub(crate) fn over(connection: Patient) -> Self {
        let origin = "https://localhost".parse().unwrap();
        Self {
            client: BrokerClient::with_origin(connection, origin),
        }
    }
}

/// A request for account `main`; a query in the target becomes query parameters.
pub(crate) fn request(
    scope: Scope,
    method: Method,
    target: &str,
    body: &str,
) -> SignAndSendRequest {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query = query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| QueryParameter {
            name: name.to_owned(),
            value: value.to_owned(),
        });
    SignAndSendRequest {
        account: "main".to_owned(),
        scope: scope.into(),
        method: method.into(),
        path: path.to_owned(),
        query: query.collect(),
        body: Bytes::from(body.to_owned()),
        ..SignAndSendRequest::default()
    }
}

pub(crate) fn spot_order(client_oid: &str) -> SignAndSendRequest {
    let body = json!({
        "clientOid": client_oid, "side": "buy", "symbol": "BTC-USDT", "type": "limit", "price": "10000", "size": "0.001",
    });
    request(
        Scope::SpotMargin,
        Method::Post,
        "/api/v1/hf/orders",
        &body.to_string(),
    )
}

pub(crate) fn futures_order(client_oid: &str) -> SignAndSendRequest {
    let body = json!({
        "clientOid": client_oid, "side": "buy", "symbol": "XBTUSDTM", "type": "limit", "price": "10000", "size": 1,
        "leverage": 3,
    });
    request(
        Scope::Futures,
        Method::Post,
        "/api/v1/orders",
        &body.to_string(),
    )
}

pub(crate) fn accounts() -> SignAndSendRequest {
    request(Scope::SpotMargin, Method::Get, "/api/v1/accounts", "")
}

/// Code, reason, outcome and request id of an error. Panics if its `ErrorInfo` is missing.
pub(crate) fn failure(status: &Status) -> (Code, String, String, String) {
    let info = status
        .get_details_error_info()
        .unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "credbroker");
    (
        status.code(),
        info.reason,
        info.metadata["outcome"].clone(),
        info.metadata["request_id"].clone(),
    )
}

/// Code, reason and outcome of a call that must fail.
pub(crate) fn refusal(result: Result<SignAndSendResponse, Status>) -> (Code, String, String) {
    let (code, reason, outcome, _) = failure(&result.expect_err("this call must fail"));
    (code, reason, outcome)
}

/// The body of an answer as JSON.
pub(crate) fn json_of(response: &SignAndSendResponse) -> Value {
    serde_json::from_slice(&response.body).unwrap()
}

/// Cancels all open spot orders: a call that the broker never refuses because of its own problems.
pub(crate) fn spot_cancel_all() -> SignAndSendRequest {
    let target = "/api/v1/hf/orders?symbol=BTC-USDT";
    request(Scope::SpotMargin, Method::Delete, target, "")
}

/// Connects and completes the TLS handshake.
pub(crate) async fn tls(
    address: SocketAddr,
    connector: &TlsConnector,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    // Otherwise each call waits 40 ms for a delayed acknowledgement.
    stream.set_nodelay(true)?;
    let name = ServerName::try_from("localhost").unwrap();
    connector.connect(name, stream).await
}

/// Sends a plain HTTP request and returns status, head and body. `headers` are additional header lines.
pub(crate) async fn http(
    authority: &str,
    request_line: &str,
    headers: &str,
    body: &str,
) -> io::Result<(u16, String, String)> {
    let mut stream = TcpStream::connect(authority).await?;
    let length = body.len();
    let request = format!(
        "{request_line} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Ok((status, head.to_owned(), body.to_owned()))
}

/// Prints a line even when the test passes: libtest captures `println!`, but not a direct write to stderr.
pub(crate) fn print_always(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Reports that a test did not run because the machine lacks `missing`. Fails if `CREDBROKER_REQUIRE`, a list such as
/// `openssl,python`, names it.
pub(crate) fn not_run(test: &str, missing: &str, reason: &str) {
    let required = std::env::var_os("CREDBROKER_REQUIRE").unwrap_or_default();
    let required = required.to_string_lossy();
    assert!(
        !required.split(',').any(|name| name.trim() == missing),
        "{test}: not run ({reason}), and CREDBROKER_REQUIRE names {missing}"
    );
    print_always(&format!("{test}: not run ({reason})"));
}

/// Polls until a condition holds; fails after [`WAIT_LIMIT`].
pub(crate) async fn until<F: Future<Output = bool>>(event: &str, condition: impl Fn() -> F) {
    let deadline = Instant::now() + WAIT_LIMIT;
    while !condition().await {
        assert!(Instant::now() < deadline, "timed out waiting until {event}");
        // Only the polling interval: the test waits for the condition.
        let _ = timeout(Duration::from_millis(10), std::future::pending::<()>()).await;
    }
}

/// Sets the permission bits of a file.
pub(crate) fn set_mode(file: &Path, mode: u32) {
    std::fs::set_permissions(file, Permissions::from_mode(mode)).unwrap();
}

/// Rules with grants for bot `maker` on account `main`, as `(scope, allow)` pairs.
pub(crate) fn rules_for(account: &str, grants: &[(&str, &str)]) -> String {
    let grants = grants.iter();
    let grants = grants.map(|(scope, allow)| grant("maker", "main", scope, allow));
    std::iter::once(account.to_owned()).chain(grants).collect()
}
