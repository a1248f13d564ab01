//! Builds everything from [`Config`], opens the listeners, and drains on the way out.

mod accept;
mod admins;
mod bots;
pub(crate) mod build;
mod connection;
mod handshakes;
pub(crate) mod identity;
pub(crate) mod ops_http;
pub(crate) mod probes;
mod reload;
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
use tokio::task::JoinSet;
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
use connection::Listener;
use probes::Probes;
use reload::Reloader;
use tls::Tls;

/// How long the last answers may take to leave once all calls have ended.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// How often the health service looks for what no event tells, such as a name that resolves at last.
const HEALTH_EVERY: Duration = Duration::from_secs(1);

/// More than any call needs beside its body: names and numbers.
const MESSAGE_OVERHEAD: usize = 64 * 1024;

/// More than any question for health or reflection needs; the library's own limit is 4 MB for each.
const HELPER_MESSAGE: usize = 4096;

/// How long bots wait at a start for all keys to be read and all names to be looked up: a Vault that does not answer holds
/// up no cancel of a key that was read.
const FIRST_READ_WITHIN: Duration = Duration::from_secs(10);

/// The file in the state folder that a running broker holds locked.
const LOCK: &str = "lock";

/// How often the lock is tried, and how long between two tries: somebody may be looking whether it is held.
const LOCK_TRIES: u32 = 5;
const LOCK_AGAIN: Duration = Duration::from_millis(20);

/// Why the broker cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The audit file cannot be opened.
    #[error("the audit file {0} cannot be opened; make it writable or correct audit.file")]
    Audit(String, #[source] io::Error),
    /// Files that the configuration names are not as they must be.
    #[error("the configuration has {} problem(s)", .0.len())]
    Config(Vec<Problem>),
    /// A listener cannot be opened.
    #[error("cannot bind {0}; is another process using it?")]
    Listen(SocketAddr, #[source] io::Error),
    /// Another broker uses the state folder.
    #[error("another broker runs on {0}; stop it, or give this one a state_dir of its own")]
    Locked(String),
    /// The descriptors do not fit the reflection service: a defect of the build.
    #[error("the reflection service cannot be set up")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// The lock is a symbolic link, which would have another file made and locked.
    #[error("{0} is a symbolic link; remove the link, or correct state_dir")]
    LockIsLink(String),
    /// What admins have forbidden cannot be read.
    #[error("cannot load restrictions.json")]
    Restrictions(#[source] RestrictionsError),
    /// The folder above the state folder is missing: it is never made, since its disk may not be mounted.
    #[error(
        "cannot create {folder}: its parent {parent} does not exist; mount the disk, create the parent, or correct state_dir"
    )]
    StateParent {
        /// The state folder.
        folder: String,
        /// The folder above it.
        parent: String,
    },
    /// The state folder cannot be used.
    #[error(
        "the state folder {0} cannot be used; make it writable and the folders above it searchable for the broker's user, or correct state_dir"
    )]
    HealthMetrics(String, #[source] io::Error),
    /// TLS cannot be set up.
    #[error("TLS cannot be set up: check tls.certificate, tls.key, tls.client_ca and tls.admin_ca")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A running broker.
#[derive(Debug)]
pub struct Server {
    /// Where bots call.
    pub grpc: SocketAddr,
    /// Where health and metrics are asked for.
    pub ops: SocketAddr,
    /// Where admins call; none where the configuration names no address.
    pub admin: Option<SocketAddr>,
    broker: Arc<Broker>,
    vault: Arc<Vault>,
    readiness: watch::Receiver<Readiness>,
    drain_timeout: Duration,
    stop: watch::Sender<bool>,
    /// The listeners of bots and admins; each ends with its last connection.
    listeners: TaskTracker,
    background: JoinSet<&'static str>,
    /// Held while the broker runs, so that no second one uses the folder.
    _lock: File,
}

impl Server {
    /// Starts a broker. Admins are let in once this returns; bots can connect, and are let in once every key has been read
    /// from Vault or could not be, and every name of the exchange was looked up, after 10 s at most.
    ///
    /// # Errors
    /// When anything that it cannot do without is missing; says what. Vault is not among them.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        Self::start_on(config, Clock::system()).await
    }

    /// The same, by the given clock.
    ///
    /// # Errors
    /// As [`Server::start`].
    #[expect(
        clippy::too_many_lines,
        reason = "everything is put together here, each part after what it needs"
    )]
    pub async fn start_on(config: Config, clock: Clock) -> Result<Self, StartError> {
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
        if !broker.restrictions.was_found() {
            record_missing_restrictions(&broker, &config.state_dir, audit_file_found);
        }
        let metrics = Arc::clone(&broker.metrics);
        let not_after_s = certificates.not_after_ms / 1000;
        metrics.certificate_ends.set(not_after_s);
        let (bots_ca, admins_ca) = (&certificates.client_ca, &certificates.admin_ca);
        let tls = Tls::new::<BotId>(&certificates, bots_ca, 0, &provider, &metrics)?;
        let (set_tls, tls) = watch::channel(Arc::new(tls));
        let admins_tls = Tls::new::<AdminId>(&certificates, admins_ca, 0, &provider, &metrics)?;
        let (set_admins_tls, admins_tls) = watch::channel(Arc::new(admins_tls));

        let (grpc_listener, grpc) = listen(config.grpc).await?;
        let (ops_listener, ops) = listen(config.ops).await?;
        let admin_listener = match config.admin {
            Some(address) => Some(listen(address).await?),
            None => None,
        };
        let admin = admin_listener.as_ref().map(|(_, bound)| *bound);

        let (key_events, trials) = mpsc::unbounded_channel();
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

        let (stop, stopping) = watch::channel(false);
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
        };
        let admins = AdminServer::new(AdminApi::new(Arc::clone(&broker)));
        let for_admins = Listener {
            broker: Arc::clone(&broker),
            routes: Routes::new(admins).prepare(),
            tls: admins_tls,
            limits: config.connection_limits,
            stopping,
        };
        let (tell_problems, problems) = watch::channel(FileProblems::default());
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
            problems: tell_problems,
            cas: watched.1.cas_digest(),
        };
        let (tell_readiness, told_readiness) = watch::channel(readiness(&broker));
        let health = report_health(Arc::clone(&broker), health, tell_readiness);
        let mut background = JoinSet::new();
        background.spawn(named(
            "tests of keys",
            key_test::run_key_tests(Arc::clone(&broker), trials),
        ));
        background.spawn(named(
            "ops listener",
            ops_http::serve(ops_listener, Arc::clone(&broker), problems),
        ));
        background.spawn(named("health service", health));
        let wiping = Arc::clone(&broker.keyring).wipe_on_time();
        background.spawn(named("wipe of old keys", wiping));
        let reloads = reloader.run(config.reload_every, watched.0, watched.1);
        background.spawn(named("look at changed files", reloads));
        let listeners = TaskTracker::new();
        let serving =
            listeners.track_future(serve_bots(listener, grpc_listener, limit, bots_wait_until));
        background.spawn(named("bots' listener", serving));
        if let Some((socket, _)) = admin_listener {
            let serving = listeners.track_future(admins::serve(for_admins, socket));
            background.spawn(named("admins' listener", serving));
        }
        listeners.close();
        let shown = admin.map(tracing::field::display);
        tracing::info!(%grpc, %ops, admin = shown, "listening");
        let drain_timeout = config.drain_timeout;
        Ok(Self {
            grpc,
            ops,
            admin,
            broker,
            vault,
            readiness: told_readiness,
            drain_timeout,
            stop,
            listeners,
            background,
            _lock: lock,
        })
    }

    /// Whether the broker can do its work, now and from now on.
    pub fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.clone()
    }

    /// Returns when a background task has exited: a bug, after which a restart is best.
    pub(crate) async fn failed(&mut self) -> String {
        match self.background.join_next().await {
            Some(Ok(name)) => format!("{name}: ended"),
            Some(Err(error)) => error.to_string(),
            // There are always some.
            None => "nothing is left".to_owned(),
        }
    }

    /// Stops: takes no new calls, finishes those in flight, writes their outcomes.
    ///
    /// Returns how many calls ended with nobody knowing whether they were executed.
    pub async fn stop(self) -> u64 {
        self.stop.send_replace(true);
        let unresolved = self.broker.drain(self.drain_timeout).await;
        // The calls have ended; what is left are their answers on the way out.
        let flush = timeout(FLUSH_TIMEOUT, self.listeners.wait());
        let _ = tokio::join!(flush, self.vault.close());
        unresolved
    }
}

/// Lets bots in once the first read of all keys and the first lookup of all names have ended, and at `latest` in any case;
/// until then connections wait in the socket's queue.
async fn serve_bots(listener: Listener, socket: TcpListener, limit: usize, latest: Instant) {
    let mut stopping = listener.stopping.clone();
    let broker = Arc::clone(&listener.broker);
    let is_prepared = async {
        tokio::join!(broker.egress.first_lookups(), broker.keyring.first_read());
    };
    tokio::select! {
        () = shutdown_requested(&mut stopping) => return,
        () = is_prepared => {
            tracing::info!("initial key load finished; accepting bots");
        }
        () = sleep_until(latest) => {
            let within_s = FIRST_READ_WITHIN.as_secs();
            tracing::warn!("initial key load or DNS lookups not finished within {within_s} s; accepting bots");
        }
    }
    bots::serve(listener, socket, limit).await;
}

/// A task of the background, by name.
async fn named(name: &'static str, task: impl Future<Output = ()>) -> &'static str {
    task.await;
    name
}

/// So that `grpcurl` and its like work without the proto file, and show the details of errors.
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

/// Keeps every other broker off the state folder for as long as the file is open.
async fn lock(folder: &Path) -> Result<File, StartError> {
    let name = || folder.display().to_string();
    // What others can open they can lock.
    let open = || {
        match DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
        let mut options = File::options();
        options.create(true).truncate(false).write(true).mode(0o600);
        // A link would have somebody else's file made and locked.
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
        None => StartError::HealthMetrics(name(), error),
    })?;
    for _ in 0..LOCK_TRIES {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            // Whoever only looks whether it is held lets go at once.
            Err(TryLockError::WouldBlock) => sleep(LOCK_AGAIN).await,
            Err(TryLockError::Error(error)) => {
                return Err(StartError::HealthMetrics(name(), error));
            }
        }
    }
    Err(StartError::Locked(name()))
}

/// The folder above a state folder, where neither of them exists; `None` also where permissions hide whether they do.
pub(crate) fn missing_parent(folder: &Path) -> Option<&Path> {
    let parent = folder.parent()?;
    // The parent of a bare name is empty, and is the working folder.
    let is_missing = |folder: &Path| folder.try_exists().is_ok_and(|exists| !exists);
    (parent != Path::new("") && is_missing(folder) && is_missing(parent)).then_some(parent)
}

/// Logs and audits that no `restrictions.json` was found, and makes one: all that admins have forbidden stands in it.
fn record_missing_restrictions(broker: &Broker, state_dir: &Path, audit_file_found: bool) {
    let nothing = "no bot is blocked, no account halted, no key revoked";
    let missing = if audit_file_found {
        "no restrictions.json found"
    } else {
        "no restrictions.json and no audit file found"
    };
    let state_dir = state_dir.display();
    tracing::warn!(%state_dir, audit_file_found, "no restrictions.json found; {nothing}; if this broker has run before, check state_dir and its mount");
    broker.audit.changed(&Change {
        what: "restrictions",
        before: None,
        after: &Sha256::digest(b"").into(),
        outcome: "in_force",
        detail: Some(format!(
            "{missing}: {nothing}. If this broker has run before, check that state_dir ({state_dir}) is right and its disk mounted"
        )),
    });
    if let Err(error) = broker.restrictions.create() {
        tracing::error!(%state_dir, %error, "cannot create restrictions.json; check permissions and free space of state_dir");
    }
}

/// Whether a broker runs on a state folder; none does where there is no such folder. It is not kept from starting.
///
/// # Errors
/// When nobody can tell.
pub(crate) fn is_locked(folder: &Path) -> io::Result<bool> {
    let file = match File::open(folder.join(LOCK)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match file.try_lock_shared() {
        // Closing the file lets go of it.
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let open = async {
        let listener = TcpListener::bind(address).await?;
        let bound = listener.local_addr()?;
        Ok((listener, bound))
    };
    open.await
        .map_err(|error| StartError::Listen(address, error))
}

/// Keeps the health service and [`Server::readiness`] as the broker is.
async fn report_health(
    broker: Arc<Broker>,
    health: tonic_health::server::HealthReporter,
    tell: watch::Sender<Readiness>,
) {
    let mut changes = broker.keyring.changes();
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
        tell.send_replace(now);
        // Whichever comes first; an error means that the keyring is gone, and so is the broker.
        if let Ok(Err(_)) = timeout(HEALTH_EVERY, changes.changed()).await {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_link_in_place_of_the_lock_is_refused_and_makes_no_file() {
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
    async fn parent_that_cannot_be_looked_at_is_not_called_missing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        // Not a folder: fails as a folder without search permission does, also for root.
        let state_dir = file.join("parent/state");
        assert_eq!(missing_parent(&state_dir), None);
        let error = lock(&state_dir).await.unwrap_err();
        assert!(matches!(error, StartError::HealthMetrics(..)), "{error}");
        let missing = folder.path().join("parent/state");
        assert_eq!(missing_parent(&missing), missing.parent());
    }
}
