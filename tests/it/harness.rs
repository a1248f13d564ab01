//! An installation with its broker and any bots.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::future::Future;
use std::io::{self, BufRead, BufReader, Write as _};
use std::net::SocketAddr;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
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
use credbroker_sim::road::Road;
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

/// No wait of a test is longer; each ends as soon as its condition holds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// An installation with its broker.
pub(crate) struct Lab {
    installation: Installation,
    pub(crate) server: Option<Server>,
    pub(crate) process: Option<Process>,
    /// Where bots call.
    pub(crate) grpc: SocketAddr,
    /// Where health and metrics are asked for.
    pub(crate) ops: SocketAddr,
    /// Where admins call.
    pub(crate) admin: SocketAddr,
    /// Whether what the exchange has received is compared with the audit file in the end.
    pub(crate) is_checked: bool,
}

/// What a command has come to.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// What it said on stderr, in one line: lines end where a terminal does.
    pub(crate) fn said(&self) -> String {
        in_one_line(&self.stderr)
    }
}

/// Runs the real program to its end.
pub(crate) async fn program(words: &[&str], input: impl AsRef<[u8]>) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_credbroker"));
    command
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let input = input.as_ref().to_owned();
    // Not on this thread: the broker may run on it.
    let run = move || {
        let mut child = command.spawn().unwrap();
        // A program that has ended already reads nothing.
        let _ = child.stdin.take().unwrap().write_all(&input);
        child.wait_with_output().unwrap()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended {
        code: output.status.code(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// A text without its line ends and indents.
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

    /// The simulators run and the broker's files are written; the broker itself has not started.
    pub(crate) async fn install(settings: Settings) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            installation: Installation::start(settings, folder).await.unwrap(),
            server: None,
            process: None,
            grpc: nowhere,
            ops: nowhere,
            admin: nowhere,
            is_checked: true,
        }
    }

    pub(crate) fn config(&self) -> Config {
        let text = std::fs::read_to_string(self.path("config.toml")).unwrap();
        Config::parse(&text, self.folder.path()).unwrap()
    }

    pub(crate) fn road(&self) -> &Road {
        self.road.as_ref().unwrap()
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

    /// Starts the real program.
    pub(crate) async fn spawn_broker(&mut self) {
        self.spawn_broker_under(&[]).await;
    }

    /// The same, started by a command such as `prlimit` that becomes it.
    pub(crate) async fn spawn_broker_under(&mut self, command: &[&str]) {
        let process = Process::start(command, &self.path("config.toml"));
        let listening = process.log_line_with("listening").await;
        // In either format of the log.
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

    /// Stops the broker and returns how many calls it left unresolved; checks the record on the way.
    pub(crate) async fn stop(&mut self) -> u64 {
        let unresolved = self.server.take().unwrap().stop().await;
        self.check_record();
        unresolved
    }

    pub(crate) async fn until_ready(&self) {
        until("the broker is ready", async || {
            self.get("/readyz").await.0 == 200
        })
        .await;
    }

    /// Waits until nothing is wrong but that the audit log cannot be written.
    pub(crate) async fn until_only_the_record_fails(&self) {
        until("nothing is wrong but the record", async || {
            let (status, text) = self.get("/readyz").await;
            let lines: Vec<_> = text.lines().collect();
            status == 503
                && matches!(lines.as_slice(), [_, line] if line.starts_with("audit: /dev/full cannot be written"))
        })
        .await;
    }

    /// Waits until the keys are in memory, where the exchange cannot be reached and the broker is never ready.
    pub(crate) async fn until_keys(&self) {
        until("the keys are in memory", async || {
            let text = self.get("/readyz?verbose").await.1;
            text.contains(" loaded") && !text.contains("waiting for Vault")
        })
        .await;
    }

    /// A bot with its own certificate, connected.
    pub(crate) async fn bot(&self, name: &str) -> Bot {
        self.bot_with(&self.ca.bot(name).unwrap()).await
    }

    pub(crate) async fn bot_with(&self, identity: &Identity) -> Bot {
        let channel = self.endpoint(identity).connect().await.unwrap();
        Bot {
            client: BrokerClient::new(channel),
        }
    }

    /// A bot that leaves all deadlines to the broker: its own library would give up on a busy machine, and hide the answer.
    pub(crate) async fn patient_bot(&self, name: &str) -> Bot<Patient> {
        self.patient_bot_with(&self.ca.bot(name).unwrap()).await
    }

    pub(crate) async fn patient_bot_with(&self, identity: &Identity) -> Bot<Patient> {
        Bot::over(self.patient(identity).await)
    }

    /// An admin with a certificate of his own, connected.
    pub(crate) async fn admin_client(&self, name: &str) -> AdminClient<Patient> {
        let identity = self.ca.admin(name).unwrap();
        let roots = [self.ca.certificate_pem().to_owned()];
        let connection = patient(self.admin, &roots, &identity).await.unwrap();
        admin_over(connection)
    }

    /// Runs the real program as an admin of this name.
    pub(crate) async fn admin_cli(&self, name: &str, words: &[&str]) -> Ended {
        self.write_admin_files(&self.ca.admin(name).unwrap());
        self.cli(words, "").await
    }

    /// `admin.toml`, and the files that it names.
    pub(crate) fn write_admin_files(&self, identity: &Identity) {
        let ca = "admin-broker-ca.pem";
        self.write(ca, self.ca.certificate_pem()).unwrap();
        let vault = self.vault.address();
        let vault = format!("[vault]\naddress = \"{vault}\"\n[vault.auth]\n{TOKEN_FILE}\n");
        self.write_admin(identity, self.admin, ca, &vault).unwrap();
    }

    /// Runs the real program, with this installation's `admin.toml`; `input` is what its stdin says.
    pub(crate) async fn cli(&self, words: &[&str], input: impl AsRef<[u8]>) -> Ended {
        let file = self.path("admin.toml");
        program(
            &[words, &["--admin", file.to_str().unwrap()]].concat(),
            input,
        )
        .await
    }

    /// The same with its `config.toml`, and nothing on stdin.
    pub(crate) async fn run(&self, words: &[&str]) -> Ended {
        let file = self.path("config.toml");
        program(&[words, &["--config", file.to_str().unwrap()]].concat(), "").await
    }

    /// A connection for requests that no bot's library would send.
    pub(crate) async fn patient(&self, identity: &Identity) -> Patient {
        let roots = [self.ca.certificate_pem().to_owned()];
        patient(self.grpc, &roots, identity).await.unwrap()
    }

    /// A connection over which nothing has been said yet.
    pub(crate) async fn tls(&self, identity: &Identity) -> io::Result<TlsStream<TcpStream>> {
        tls(self.grpc, &self.client_tls(identity)).await
    }

    /// What a bot with this certificate shakes hands with.
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

    /// Status and body of a GET on the ops listener.
    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let answer = http(&self.ops.to_string(), &format!("GET {path}"), "", "").await;
        let (status, _, body) = answer.unwrap();
        (status, body)
    }

    /// A metric by its name and labels as they stand in the text; `None` while it has no value.
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

    /// Changes the text of the configuration file, before a broker starts with it.
    pub(crate) fn reconfigure(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.path("config.toml")).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(self.path("config.toml"), text.replace(from, to)).unwrap();
    }

    /// Every line of the audit file that belongs to a call of a bot.
    pub(crate) fn audit(&self) -> Vec<Value> {
        let mut lines = self.audit_file();
        lines.retain(|line| line["bot"].is_string());
        lines
    }

    /// Every line of the audit file about what an admin did, or what became of a key.
    pub(crate) fn acts(&self) -> Vec<Value> {
        let mut lines = self.audit_file();
        lines.retain(|line| line["event"] == "act");
        lines
    }

    /// Every line of the audit file about a change of rules or certificates, but those of a start.
    pub(crate) fn changes(&self) -> Vec<Value> {
        let mut lines = self.audit_file();
        lines.retain(|line| line["event"] == "change" && line["outcome"] != "in_force");
        lines
    }

    pub(crate) fn audit_file(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("state/audit.jsonl")).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// The lines of one call, by its request id.
    pub(crate) fn audit_of(&self, request_id: &str) -> Vec<Value> {
        let mut lines = self.audit();
        lines.retain(|line| line["request_id"] == request_id);
        lines
    }

    /// Every call on record has exactly one outcome, and the exchange received nothing beyond the record.
    pub(crate) fn check_record(&self) {
        let mut calls: BTreeMap<(String, u64), (usize, usize)> = BTreeMap::new();
        for line in self.calls_on_record() {
            let call = (
                line["run"].as_str().unwrap().to_owned(),
                line["call"].as_u64().unwrap(),
            );
            let counts = calls.entry(call).or_default();
            match line["event"].as_str().unwrap() {
                "intent" => counts.0 += 1,
                "outcome" => counts.1 += 1,
                "denied" | "late_answer" => {}
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

    /// Each request that the exchange received has an intent of its own on record, with the same method, target and body.
    pub(crate) fn check_sent(&self) {
        if !self.is_checked {
            return;
        }
        let mut intents: BTreeMap<Same, usize> = BTreeMap::new();
        for line in self.calls_on_record() {
            if line["event"] == "intent" {
                let text = |field: &str| line[field].as_str().unwrap().to_owned();
                let same = (text("method"), text("target"), text("body_sha256"));
                *intents.entry(same).or_default() += 1;
            }
        }
        // What the broker asks of its own for time and address alone is not on record.
        let is_public = |path: &str| matches!(path, "/api/v1/timestamp" | "/api/v1/my-ip");
        let mut received: BTreeMap<Same, (bool, usize)> = BTreeMap::new();
        for request in self.kucoin.everything_received() {
            if request.is_own_question() && is_public(request.path()) {
                continue;
            }
            let body = Sha256::digest(&request.body);
            let body = body
                .iter()
                .fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
            let count = received
                .entry((request.method.clone(), request.target.clone(), body))
                .or_default();
            // What was refused for its time or its key goes once more, without another intent.
            let was_refused = request
                .code()
                .is_some_and(|code| ("400002"..="400009").contains(&code));
            count.1 += usize::from(!was_refused);
            let id = request.endpoint.as_deref().unwrap_or_default();
            count.0 = Catalog::get().by_id(id).is_some_and(|e| e.idempotent);
        }
        for (same, (is_idempotent, count)) in received {
            // What is idempotent goes once more when its answer is lost, by whatever.
            let times = if is_idempotent { 2 } else { 1 };
            let intents = intents.get(&same).copied().unwrap_or_default();
            assert!(
                intents > 0 && times * intents >= count,
                "{same:?}: received {count} times, {intents} intents"
            );
        }
    }

    /// The lines about calls, of the audit file and of those that it was renamed to. What was cut off tells nothing: what
    /// increases risk is not sent unless its line is whole.
    fn calls_on_record(&self) -> Vec<Value> {
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

/// Requests that the audit file cannot tell apart: method, target, and digest of the body.
type Same = (String, String, String);

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

/// Time that passes without anybody waiting for it, for a broker in this process and its exchange.
pub(crate) struct Time {
    since: std::time::Instant,
    skipped: Arc<Mutex<Duration>>,
    /// How far the exchange's clock has been set ahead besides, in milliseconds.
    ahead_ms: AtomicI64,
    /// How far the system clock of the broker has been set ahead, in milliseconds.
    system_ms: Arc<AtomicI64>,
}

impl Time {
    /// The exchange's clock is so many milliseconds ahead of this machine's.
    pub(crate) fn new(ahead_ms: i64) -> Self {
        Self {
            since: std::time::Instant::now(),
            skipped: Arc::default(),
            ahead_ms: AtomicI64::new(ahead_ms),
            system_ms: Arc::default(),
        }
    }

    /// The clock to start the broker with.
    pub(crate) fn clock(&self) -> Clock {
        let (since, skipped) = (self.since, Arc::clone(&self.skipped));
        let (system, system_ms) = (Clock::system(), Arc::clone(&self.system_ms));
        let passed = Arc::clone(&skipped);
        Clock::reading(move || since.elapsed() + *skipped.lock().unwrap()).with_wall(move || {
            let passed_ms = i64::try_from(passed.lock().unwrap().as_millis()).unwrap();
            system.wall_ms() + passed_ms + system_ms.load(Ordering::Relaxed)
        })
    }

    /// How much time has passed since this clock was made, skipped time included.
    pub(crate) fn passed(&self) -> Duration {
        self.since.elapsed() + *self.skipped.lock().unwrap()
    }

    /// The system clock of the broker's machine, and no other, is set ahead by so many milliseconds.
    pub(crate) fn step_system(&self, by_ms: i64) {
        self.system_ms.fetch_add(by_ms, Ordering::Relaxed);
    }

    /// The broker's machine sleeps: the world goes on, and no timer does.
    pub(crate) fn sleep(&self, lab: &Lab, time: Duration) {
        *self.skipped.lock().unwrap() += time;
        self.set_exchange(lab);
    }

    /// Time passes, and every timer goes on; a call that is in flight runs into its limits.
    pub(crate) async fn pass(&self, lab: &Lab, time: Duration) {
        self.sleep(lab, time);
        // What waits a moment before it begins its long wait gets to begin it.
        let first = time.min(Duration::from_secs(1));
        for step in [first, time.saturating_sub(first)] {
            tokio::time::pause();
            tokio::time::advance(step).await;
            tokio::time::resume();
            // Round trips, in which what the timers have set off comes to its end too.
            for _ in 0..5 {
                lab.get("/healthz").await;
            }
        }
    }

    /// The exchange's clock, and no other, is set ahead by so many milliseconds.
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

/// The real program, killed when this drops.
pub(crate) struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
    is_read: Arc<AtomicBool>,
}

impl Process {
    fn start(command: &[&str], config: &Path) -> Self {
        let program = [env!("CARGO_BIN_EXE_credbroker"), "serve", "--config"];
        let mut words = command.iter().chain(&program);
        let mut child = Command::new(words.next().unwrap())
            .args(words)
            .arg(config)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, sink) = (child.stderr.take().unwrap(), Arc::clone(&log));
        let is_read = Arc::new(AtomicBool::new(true));
        let goes_on = Arc::clone(&is_read);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut log = sink.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
                if !goes_on.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        Self {
            child,
            log,
            is_read,
        }
    }

    /// Reads one more line and then closes the pipe, as a log collector that dies.
    pub(crate) fn close_log(&self) {
        self.is_read.store(false, Ordering::Relaxed);
    }

    /// Everything on stderr so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// The first log line that holds this text, once it is there.
    pub(crate) async fn log_line_with(&self, text: &str) -> String {
        let find = || {
            self.log()
                .lines()
                .find(|line| line.contains(text))
                .map(ToOwned::to_owned)
        };
        until(&format!("the log says {text:?}"), async || find().is_some()).await;
        find().unwrap()
    }

    /// The first log line with this message, once it is there.
    pub(crate) async fn log_line(&self, message: &str) -> Value {
        let find = || {
            let log = self.log();
            let mut lines = log
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.find(|line| line["message"] == message)
        };
        until(&format!("the log says {message:?}"), async || {
            find().is_some()
        })
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

    /// The exit code, once it has ended.
    pub(crate) async fn exit_code(&mut self) -> Option<i32> {
        let child = std::cell::RefCell::new(&mut self.child);
        let ended = || child.borrow_mut().try_wait().unwrap();
        until("the broker ends", async || ended().is_some()).await;
        ended().unwrap().code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One HTTP/2 connection that knows no deadline: `grpc-timeout` goes out, and only the broker acts on it.
#[derive(Clone)]
pub(crate) struct Patient(hyper::client::conn::http2::SendRequest<tonic::body::Body>);

impl Patient {
    /// Whether it takes calls, as far as this end knows.
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

/// What a client with this certificate shakes hands with.
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

/// Connects; `roots` are the CAs, as PEM, that it trusts. Fails when it is not let in.
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

/// An admin's calls over a connection.
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

/// A request of account `main`; the target may hold a query, which is decoded here.
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
        request_id: String::new(),
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

/// What a failure says: code, reason, outcome, request id. Panics where our `ErrorInfo` is missing.
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

/// Cancels whatever rests: a call that is never refused for the broker's own troubles.
pub(crate) fn spot_cancel_all() -> SignAndSendRequest {
    let target = "/api/v1/hf/orders?symbol=BTC-USDT";
    request(Scope::SpotMargin, Method::Delete, target, "")
}

/// Connects and shakes hands.
pub(crate) async fn tls(
    address: SocketAddr,
    connector: &TlsConnector,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    // Without this each call waits 40 ms for an acknowledgement.
    stream.set_nodelay(true)?;
    let name = ServerName::try_from("localhost").unwrap();
    connector.connect(name, stream).await
}

/// Status, head and body of an answer in plain HTTP. `headers` are further lines of the request's head.
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

/// Says something that a person must see even when the test passes: past libtest, which keeps what it captures.
pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Says that a test did not run, for want of what the machine has not. Fails where `CREDBROKER_REQUIRE`, a list such as
/// `openssl,python`, names it: whoever has installed it wants the test.
pub(crate) fn not_run(what: &str, missing: &str, why: &str) {
    let required = std::env::var_os("CREDBROKER_REQUIRE").unwrap_or_default();
    let required = required.to_string_lossy();
    assert!(
        !required.split(',').any(|name| name.trim() == missing),
        "{what}: not run ({why}), and CREDBROKER_REQUIRE names {missing}"
    );
    say(&format!("{what}: not run ({why})"));
}

/// Waits for a condition that nothing announces; fails when it does not come.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "it did not happen: {what}");
        // Only how often to look again: what the test waits for is the condition.
        let _ = timeout(Duration::from_millis(10), std::future::pending::<()>()).await;
    }
}

/// Sets the permission bits of a file.
pub(crate) fn set_mode(file: &Path, mode: u32) {
    std::fs::set_permissions(file, Permissions::from_mode(mode)).unwrap();
}

/// Rules of one bot on one account: `(scope, allow)` pairs.
pub(crate) fn rules_for(account: &str, grants: &[(&str, &str)]) -> String {
    let grants = grants.iter();
    let grants = grants.map(|(scope, allow)| grant("maker", "main", scope, allow));
    std::iter::once(account.to_owned()).chain(grants).collect()
}
