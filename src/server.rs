//! Builds everything from [`Config`], opens the listeners, and drains calls at shutdown.

mod accept;
mod admins;
mod bots;
pub(crate) mod build;
mod connection;
pub(crate) mod descriptors;
mod handshakes;
pub(crate) mod identity;
pub(crate) mod ops_http;
pub(crate) mod probes;
mod reload;
pub(crate) mod sockets;
mod tls;

use std::fs::{DirBuilder, File, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::OFlags;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use crate::api::admins::AdminApi;
use crate::api::bots::GrpcApi;
use crate::audit::Change;
use crate::base::ids::{AdminId, BotId};
use crate::base::toml_file::Problem;
use crate::broker::Broker;
use crate::clock::Clock;
use crate::config::load::{Source, TlsSources, load};
use crate::config::{Config, FileProblems, permissions};
use crate::keyring::refresh::Refresher;
use crate::ops::health::{Readiness, readiness};
use crate::ops::key_test;
use crate::proto::DESCRIPTORS;
use crate::proto::admin_server::AdminServer;
use crate::proto::broker_server::BrokerServer;
use crate::restrictions::RestrictionsError;
use crate::vault::Vault;

use accept::shutdown_requested;
use build::{Assembled, assemble};
use connection::{Listener, STOP_IDLE};
use probes::Probes;
use reload::Reloader;
use sockets::{Inherited, Sockets};
use tls::Tls;

/// How long a start waits for the clientOids of earlier runs.
const CLAIMS_WITHIN: Duration = Duration::from_secs(1);

/// How long the last responses may take to be written once all calls have ended.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// How long connections may take to close before the drain begins, if the next broker gets their clients.
const HANDOVER_WITHIN: Duration = STOP_IDLE.saturating_mul(2);

/// How often readiness is checked for changes that cause no event, such as a DNS name that resolves.
const HEALTH_EVERY: Duration = Duration::from_secs(1);

/// Bytes of a message in addition to the body: names and numbers. No call needs as many.
const MESSAGE_OVERHEAD: usize = 64 * 1024;

/// Bytes of a health or reflection request. None needs as many; the library's own limit is 4 MB.
const HELPER_MESSAGE: usize = 4096;

/// How long bots wait after a start until all keys are read and all names are looked up. Then keys that were read can
/// cancel orders, even if Vault does not answer for others.
const FIRST_READ_WITHIN: Duration = Duration::from_secs(10);

/// The file in the state folder that a running broker keeps locked.
const LOCK: &str = "lock";

/// How often to try the lock, and how long to wait between two tries: a command that checks the lock holds it briefly.
const LOCK_TRIES: u32 = 5;
const LOCK_AGAIN: Duration = Duration::from_millis(20);

/// Why the broker cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The audit log cannot be opened.
    #[error(
        "cannot open audit file {0}; let the broker's user create and write it, or correct audit.file"
    )]
    Audit(String, #[source] io::Error),
    /// Files that the configuration names have problems.
    #[error("the configuration has {} problem(s)", .0.len())]
    Config(Vec<Problem>),
    /// The inherited sockets do not fit the configuration.
    #[error("cannot use the inherited sockets (LISTEN_FDS): {0}")]
    Inherited(String),
    /// A listener cannot be opened.
    #[error(
        "cannot bind {0}; check that no other process uses this address, or change it in [listen]"
    )]
    Listen(SocketAddr, #[source] io::Error),
    /// Another broker uses the state folder.
    #[error("another broker uses state_dir {0}; stop it, or set a different state_dir")]
    Locked(String),
    /// The reflection service rejects the descriptors: a defect of the build.
    #[error("cannot set up gRPC reflection")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// The lock is a symbolic link; opening it would create and lock another file.
    #[error("{0} is a symbolic link; remove the link, or correct state_dir")]
    LockIsLink(String),
    /// Blocks, halts and revocations cannot be loaded.
    #[error("cannot load restrictions.json")]
    Restrictions(#[source] RestrictionsError),
    /// The parent of the state folder is missing. It is never created, since its disk may not be mounted.
    #[error(
        "cannot create {folder}: its parent {parent} does not exist; mount the disk, create the parent, or correct state_dir"
    )]
    StateParent {
        /// The state folder.
        folder: String,
        /// Its parent.
        parent: String,
    },
    /// The state folder cannot be used.
    #[error(
        "cannot use state_dir {0}; give the broker's user write permission on it and search (x) permission on its parent folders, or correct state_dir"
    )]
    StateDir(String, #[source] io::Error),
    /// TLS cannot be set up.
    #[error("cannot set up TLS; check tls.certificate, tls.key, tls.client_ca and tls.admin_ca")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A running broker.
#[derive(Debug)]
pub struct Server {
    /// Address of the bot listener.
    pub grpc: SocketAddr,
    /// Address of health checks and metrics.
    pub ops: SocketAddr,
    /// Address of the admin listener; `None` if the configuration has none.
    pub admin: Option<SocketAddr>,
    broker: Arc<Broker>,
    vault: Arc<Vault>,
    readiness: watch::Receiver<Readiness>,
    drain_timeout: Duration,
    /// If another process keeps the bots' socket open: begins the handover to the next broker, and the connections that are open.
    handover: Option<(watch::Sender<()>, TaskTracker)>,
    stop: watch::Sender<bool>,
    /// The bot and admin listeners; each task ends with its last connection.
    listeners: TaskTracker,
    background: JoinSet<&'static str>,
    /// Locked while the broker runs, so that no second broker uses the folder.
    _lock: File,
}

impl Server {
    /// Starts a broker. Admins are accepted once this returns. Bots are accepted once the read of every key from
    /// Vault, the lookup of every DNS name of the exchange and the first checks of its time and of the egress address have
    /// succeeded or failed, after 10 s at most.
    ///
    /// # Errors
    /// When something required is missing. Vault is not required.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        Self::start_on(config, Clock::system()).await
    }

    /// The same with the given clock.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn start_on(config: Config, clock: Clock) -> Result<Self, StartError> {
        Self::start_with(config, clock, Inherited::default()).await
    }

    /// The same with sockets that this process has inherited.
    #[expect(
        clippy::too_many_lines,
        reason = "assembles all parts, each one after its dependencies"
    )]
    pub(crate) async fn start_with(
        config: Config,
        clock: Clock,
        inherited: Inherited,
    ) -> Result<Self, StartError> {
        let bots_wait_until = Instant::now() + FIRST_READ_WITHIN;
        let clock = Arc::new(clock);
        let watched = (Source::read(&config.rules), TlsSources::read(&config.tls));
        let mut loaded = load(&config, clock.wall_ms()).map_err(StartError::Config)?;
        let ca_warnings = std::mem::take(&mut loaded.warnings);
        let lock = lock(&config.state_dir).await?;
        let audit_file_found = config.audit_file.exists();
        let Assembled {
            broker,
            vault,
            certificates,
            provider,
        } = assemble(&config, loaded, clock)?;
        broker
            .audit
            .use_reserve(&config.audit_reserve, config.audit_reserve_bytes);
        if !broker.restrictions.was_found() {
            record_missing_restrictions(&broker, &config.state_dir, audit_file_found);
        }
        read_claims(&broker).await;
        let metrics = Arc::clone(&broker.metrics);
        let not_after_s = certificates.not_after_ms / 1000;
        metrics.certificate_not_after.set(not_after_s);
        let (bots_ca, admins_ca) = (&certificates.client_ca, &certificates.admin_ca);
        let tls = Tls::new::<BotId>(&certificates, bots_ca, 0, &provider, &metrics)?;
        let (set_tls, tls) = watch::channel(Arc::new(tls));
        let admins_tls = Tls::new::<AdminId>(&certificates, admins_ca, 0, &provider, &metrics)?;
        let (set_admins_tls, admins_tls) = watch::channel(Arc::new(admins_tls));

        let Sockets {
            grpc: (grpc_listener, grpc),
            ops: (ops_listener, ops),
            admin: admin_listener,
            inherited,
        } = inherited.open(&config).await?;
        let admin = admin_listener.as_ref().map(|(_, bound)| *bound);
        let are_bots_kept = inherited
            .as_ref()
            .is_some_and(|names| names.contains("grpc"));

        let (key_events, requested_tests) = mpsc::unbounded_channel();
        let refresher = Refresher::new(
            Arc::clone(&broker.keyring),
            Arc::clone(&vault),
            Arc::clone(&broker.restrictions),
            key_events,
            metrics,
            config.vault_poll,
        );
        refresher.follow();
        broker.egress.start();
        let mut probes = Probes::new(config.proof_every);
        probes.follow(&broker, &broker.policy());
        let first_checks = probes.first_checks();

        let (stop, stopping) = watch::channel(false);
        let (handover, handing_over) = watch::channel(());
        let bots = TaskTracker::new();
        let (health, health_service) = tonic_health::server::health_reporter();
        let api = GrpcApi::new(
            Arc::clone(&broker),
            config.request_limits,
            config.default_deadline,
        );
        let limit = config.request_limits.body_bytes + MESSAGE_OVERHEAD;
        let api = BrokerServer::new(api).max_decoding_message_size(limit);
        let health_service = health_service.max_decoding_message_size(HELPER_MESSAGE);
        let routes = Routes::new(api).add_service(health_service);
        let routes = with_reflection(routes).map_err(StartError::Reflection)?;
        let listener = Listener {
            broker: Arc::clone(&broker),
            routes: routes.prepare(),
            tls,
            limits: config.connection_limits,
            stopping: stopping.clone(),
            handover: handing_over,
            connections: bots.clone(),
        };
        let admins = AdminServer::new(AdminApi::new(Arc::clone(&broker)));
        let for_admins = Listener {
            broker: Arc::clone(&broker),
            routes: Routes::new(admins).prepare(),
            tls: admins_tls,
            limits: config.connection_limits,
            stopping,
            // Admins are served until the end.
            handover: watch::channel(()).1,
            connections: TaskTracker::new(),
        };
        let (problems_sender, problems) = watch::channel(FileProblems::default());
        let reloader = Reloader {
            files: permissions::files(&config).into(),
            ca_warnings,
            broker: Arc::clone(&broker),
            refresher,
            probes,
            provider,
            rules: config.rules,
            tls_files: config.tls,
            tls: set_tls,
            admins_tls: set_admins_tls,
            problems: problems_sender,
            cas: watched.1.cas_digest(),
        };
        let (readiness_sender, readiness_receiver) = watch::channel(readiness(&broker));
        let health = report_health(Arc::clone(&broker), health, readiness_sender);
        let mut background = JoinSet::new();
        background.spawn(named(
            "key test task",
            key_test::run_key_tests(Arc::clone(&broker), requested_tests),
        ));
        background.spawn(named(
            "ops listener",
            ops_http::serve(ops_listener, Arc::clone(&broker), problems),
        ));
        background.spawn(named("health reporter", health));
        let wiping = Arc::clone(&broker.keyring).wipe_on_time();
        background.spawn(named("key wipe task", wiping));
        let (of_exchange, state_dir) = (Arc::clone(&broker), config.state_dir.clone());
        let addresses = async move { of_exchange.egress.write_addresses(state_dir).await };
        background.spawn(named("address file task", addresses));
        let reloads = reloader.run(config.reload_every, watched.0, watched.1);
        background.spawn(named("file reload task", reloads));
        let listeners = TaskTracker::new();
        let serving = listeners.track_future(serve_bots(
            listener,
            grpc_listener,
            limit,
            first_checks,
            bots_wait_until,
        ));
        background.spawn(named("bot listener", serving));
        if let Some((socket, _)) = admin_listener {
            let serving = listeners.track_future(admins::serve(for_admins, socket));
            background.spawn(named("admin listener", serving));
        }
        listeners.close();
        let shown_admin = admin.map(tracing::field::display);
        tracing::info!(%grpc, %ops, admin = shown_admin, inherited, "listening");
        let drain_timeout = config.drain_timeout;
        Ok(Self {
            grpc,
            ops,
            admin,
            broker,
            vault,
            readiness: readiness_receiver,
            drain_timeout,
            handover: are_bots_kept.then_some((handover, bots)),
            stop,
            listeners,
            background,
            _lock: lock,
        })
    }

    /// The current readiness, and every change of it.
    pub fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.clone()
    }

    /// Returns once a background task has exited: a bug; the broker should be restarted.
    pub(crate) async fn failed(&mut self) -> String {
        match self.background.join_next().await {
            Some(Ok(name)) => format!("{name} exited"),
            Some(Err(error)) => error.to_string(),
            // Unreachable: there are always some.
            None => "no background task is running".to_owned(),
        }
    }

    /// Stops: drains the calls in flight, writes their outcomes, then closes all connections. Clients can connect until then,
    /// since cancels are served while calls are drained.
    ///
    /// Returns how many calls that change something ended with an unknown outcome.
    pub async fn stop(self) -> u64 {
        if let Some((handover, connections)) = &self.handover {
            // Calls that were sent before their clients knew are served like all others.
            handover.send_replace(());
            connections.close();
            let _ = timeout(HANDOVER_WITHIN, connections.wait()).await;
        }
        let unresolved = self.broker.drain(self.drain_timeout).await;
        tracing::info!("calls drained; closing connections");
        self.stop.send_replace(true);
        // The calls have ended; their last responses are still being written.
        let flush = timeout(FLUSH_TIMEOUT, self.listeners.wait());
        let _ = tokio::join!(flush, self.vault.close());
        unresolved
    }
}

/// Accepts bots once the first read of all keys, the first lookup of all names and the first checks of time and egress address
/// have ended, at `latest` in any case. Until then connections wait in the socket's queue.
async fn serve_bots(
    listener: Listener,
    socket: TcpListener,
    limit: usize,
    first_checks: impl Future<Output = ()>,
    latest: Instant,
) {
    let mut stopping = listener.stopping.clone();
    let broker = Arc::clone(&listener.broker);
    let is_prepared = async {
        tokio::join!(
            broker.egress.first_lookups(),
            broker.keyring.first_read(),
            first_checks
        );
    };
    tokio::select! {
        () = shutdown_requested(&mut stopping) => return,
        () = is_prepared => {
            tracing::info!("initial key load and checks of the exchange finished; accepting bots");
        }
        () = sleep_until(latest) => {
            let within_s = FIRST_READ_WITHIN.as_secs();
            tracing::warn!("initial key load and checks of the exchange not finished within {within_s} s; accepting bots");
        }
    }
    bots::serve(listener, socket, limit).await;
}

/// Runs a background task; returns its name once it has exited.
async fn named(name: &'static str, task: impl Future<Output = ()>) -> &'static str {
    task.await;
    name
}

/// Adds reflection, so that tools such as `grpcurl` work without the proto file and show error details.
fn with_reflection(routes: Routes) -> Result<Routes, tonic_reflection::server::Error> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    Ok(routes
        .add_service(
            reflection()
                .build_v1()?
                .max_decoding_message_size(HELPER_MESSAGE),
        )
        .add_service(
            reflection()
                .build_v1alpha()?
                .max_decoding_message_size(HELPER_MESSAGE),
        ))
}

/// Locks the state folder against other brokers for as long as the returned file is open.
async fn lock(folder: &Path) -> Result<File, StartError> {
    let name = || folder.display().to_string();
    // Mode 0600: a user who can open the file can lock it.
    let open = || {
        match DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => created?,
        }
        let mut options = File::options();
        options.create(true).truncate(false).write(true).mode(0o600);
        // A symbolic link would create and lock another file.
        options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        options.open(folder.join(LOCK))
    };
    let file = open().map_err(|error| match missing_parent(folder) {
        Some(parent) => StartError::StateParent {
            folder: name(),
            parent: parent.display().to_string(),
        },
        None if folder.join(LOCK).is_symlink() => {
            StartError::LockIsLink(folder.join(LOCK).display().to_string())
        }
        None => StartError::StateDir(name(), error),
    })?;
    for _ in 0..LOCK_TRIES {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            // A command that only checks the lock releases it at once.
            Err(TryLockError::WouldBlock) => sleep(LOCK_AGAIN).await,
            Err(TryLockError::Error(error)) => {
                return Err(StartError::StateDir(name(), error));
            }
        }
    }
    Err(StartError::Locked(name()))
}

/// The parent of a state folder if neither of them exists; `None` also if permissions prevent the check.
pub(crate) fn missing_parent(folder: &Path) -> Option<&Path> {
    let parent = folder.parent()?;
    // The parent of a bare name is empty: the working folder.
    let is_missing = |folder: &Path| folder.try_exists().is_ok_and(|exists| !exists);
    (parent != Path::new("") && is_missing(folder) && is_missing(parent)).then_some(parent)
}

/// Reads in the background which clientOids earlier runs used. Returns once that is done or [`CLAIMS_WITHIN`] has passed: most
/// audit logs are read in that time, and then no order is refused.
async fn read_claims(broker: &Arc<Broker>) {
    // Lines that an earlier run could not write come first.
    broker.audit.flush_lines().await;
    let broker = Arc::clone(broker);
    let reading = spawn_blocking(move || {
        let now_ms = broker.clock.wall_ms();
        let calls = broker.orders.read_log(&broker.audit.log(), now_ms);
        broker.resolve_earlier(&calls);
    });
    let _ = timeout(CLAIMS_WITHIN, reading).await;
}

/// Logs and audits that no `restrictions.json` was found, and creates an empty one.
fn record_missing_restrictions(broker: &Broker, state_dir: &Path, audit_file_found: bool) {
    let nothing = "no bot is blocked, no account is halted, no key is revoked";
    let missing = if audit_file_found {
        "no restrictions.json found"
    } else {
        "no restrictions.json and no audit file found"
    };
    let state_dir = state_dir.display();
    tracing::warn!(%state_dir, audit_file_found, "no restrictions.json found; {nothing}; if this broker has run before, check state_dir and its mount");
    let change = Change {
        file: "restrictions",
        before: None,
        after: &Sha256::digest(b"").into(),
        outcome: "loaded",
        detail: Some(format!(
            "{missing}: {nothing}. If this broker has run before, check that state_dir ({state_dir}) is correct and its disk is mounted"
        )),
    };
    drop(broker.audit.changed(&change));
    if let Err(error) = broker.restrictions.create() {
        tracing::error!(%state_dir, exception.message = %error, "cannot create restrictions.json; check permissions and free space of state_dir");
    }
}

/// Whether a broker is running on a state folder; false if the folder does not exist. Does not prevent one from starting.
///
/// # Errors
/// When the lock cannot be checked.
pub(crate) fn is_locked(folder: &Path) -> io::Result<bool> {
    let file = match File::open(folder.join(LOCK)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match file.try_lock_shared() {
        // Closing the file releases the lock.
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Keeps the gRPC health service and [`Server::readiness`] up to date.
async fn report_health(
    broker: Arc<Broker>,
    health: tonic_health::server::HealthReporter,
    readiness_sender: watch::Sender<Readiness>,
) {
    let mut changes = broker.keyring.changes();
    let mut stage = broker.calls.stage();
    loop {
        let now = readiness(&broker);
        let status = if now.is_ready {
            tonic_health::ServingStatus::Serving
        } else {
            tonic_health::ServingStatus::NotServing
        };
        for service in [
            "",
            <BrokerServer<GrpcApi> as tonic::server::NamedService>::NAME,
        ] {
            health.set_service_status(service, status).await;
        }
        readiness_sender.send_replace(now);
        // Whichever comes first; an error means that the broker was dropped.
        let is_alive = tokio::select! {
            event = changes.changed() => event.is_ok(),
            event = stage.changed() => event.is_ok(),
            () = sleep(HEALTH_EVERY) => true,
        };
        if !is_alive {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lock_that_is_a_symlink_is_refused_and_no_file_is_created() {
        let folder = tempfile::tempdir().unwrap();
        let elsewhere = folder.path().join("elsewhere");
        std::os::unix::fs::symlink(&elsewhere, folder.path().join(LOCK)).unwrap();
        let error = lock(folder.path()).await.unwrap_err();
        let lock = folder.path().join(LOCK);
        let expected = format!(
            "{} is a symbolic link; remove the link, or correct state_dir",
            lock.display()
        );
        assert_eq!(error.to_string(), expected);
        assert!(!elsewhere.exists());
    }

    #[tokio::test]
    async fn parent_that_cannot_be_checked_is_not_reported_missing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        // A file instead of a folder fails like a folder without search permission, also for root.
        let state_dir = file.join("parent/state");
        assert_eq!(missing_parent(&state_dir), None);
        let error = lock(&state_dir).await.unwrap_err();
        assert!(matches!(error, StartError::StateDir(..)), "{error}");
        let missing = folder.path().join("parent/state");
        assert_eq!(missing_parent(&missing), missing.parent());
    }
}
