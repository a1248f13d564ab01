//! Process settings: memory that other processes cannot read and that is not written to disk, file descriptors, and
//! signal handling.

use std::future::poll_fn;
use std::io;
use std::sync::OnceLock;
use std::task::Poll;

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::clock::Clock;

/// Signals to wait for. Their default actions no longer apply.
pub(crate) struct Signals(Vec<(&'static str, Signal)>);

impl Signals {
    /// Installs handlers for these signals, each with its name.
    pub(crate) fn take<const N: usize>(
        signals: [(&'static str, SignalKind); N],
    ) -> io::Result<Self> {
        let handled = signals.into_iter();
        let handled = handled.map(|(name, kind)| Ok((name, signal(kind)?)));
        handled.collect::<io::Result<_>>().map(Self)
    }

    /// The signals that end a command.
    pub(crate) fn of_a_command() -> io::Result<Self> {
        Self::take([
            ("SIGHUP", SignalKind::hangup()),
            ("SIGINT", SignalKind::interrupt()),
            ("SIGTERM", SignalKind::terminate()),
        ])
    }

    /// Waits for the next signal and returns its name.
    pub(crate) async fn next(&mut self) -> &'static str {
        poll_fn(|context| {
            for (name, signal) in &mut self.0 {
                if signal.poll_recv(context).is_ready() {
                    return Poll::Ready(*name);
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// The protections and limits that the system granted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Hardened {
    /// Whether only root can attach to it or read its memory, and core dumps are disabled.
    pub(crate) is_undumpable: bool,
    /// Whether its memory is never swapped to disk.
    pub(crate) is_locked: bool,
    /// How many files and connections it may have open.
    pub(crate) descriptors: u64,
    /// Start time: Unix time in seconds.
    pub(crate) started_s: u64,
}

/// The result of [`harden`].
static HARDENED: OnceLock<Hardened> = OnceLock::new();

/// The result of [`harden`]; `None` if it was not called (tests).
pub(crate) fn hardened() -> Option<Hardened> {
    HARDENED.get().copied()
}

/// The part of the descriptors that one purpose may use at most: one `n`th of them. What is left (at least a quarter) is for
/// admins, the exchange, Vault and files, so that no number of bots' connections makes `halt --cancel-all` fail.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Share {
    /// Connections of bots.
    Bots = 2,
    /// Handshakes of one listener, and connections of probes and scrapers.
    Small = 16,
}

impl Share {
    /// How many of `wanted` connections may be open at the same time.
    pub(crate) fn limit(self, wanted: usize) -> usize {
        hardened().map_or(wanted, |process| self.of(process.descriptors, wanted))
    }

    fn of(self, descriptors: u64, wanted: usize) -> usize {
        let most = (descriptors / self as u64).max(1);
        usize::try_from(most).map_or(wanted, |most| wanted.min(most))
    }
}

/// Disables core dumps, locks memory and raises the descriptor limit; logs a warning if dumps or the lock fail. Must be
/// called before any secret is read.
pub(crate) fn harden() -> Hardened {
    let no_core = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let core = setrlimit(Resource::Core, no_core);
    let dumpable = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    for error in [core, dumpable].into_iter().filter_map(Result::err) {
        tracing::warn!(exception.message = %error, "cannot disable core dumps; keys could end up in one");
    }
    let hardened = Hardened {
        is_undumpable: core.is_ok() && dumpable.is_ok(),
        is_locked: lock_memory(),
        descriptors: raise_descriptors(),
        started_s: Clock::system().wall_ms().unsigned_abs() / 1000,
    };
    tracing::info!(
        undumpable = hardened.is_undumpable,
        locked = hardened.is_locked,
        descriptors = hardened.descriptors,
        "process hardening done; the fields show what is in effect"
    );
    *HARDENED.get_or_init(|| hardened)
}

/// Locks pages as they are used. Only without a limit: with one, allocations above it would fail.
fn lock_memory() -> bool {
    if let Some(limit) = getrlimit(Resource::Memlock).current {
        tracing::warn!(
            limit_bytes = limit,
            "memory is not locked, and keys could be swapped to disk; set LimitMEMLOCK=infinity (systemd) or --ulimit memlock=-1 (containers), or disable swap"
        );
        return false;
    }
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    match mlockall(all) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(exception.message = %error, "memory is not locked, and keys could be swapped to disk");
            false
        }
    }
}

/// Raises the limit of open descriptors to the maximum: each connection needs one.
fn raise_descriptors() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum.unwrap_or(u64::MAX),
        Err(_) => limit.current.unwrap_or(u64::MAX),
    }
}

/// How many files a broker that is started with the limits of this process may have open: it raises its limit to the maximum.
pub(crate) fn max_descriptors() -> u64 {
    getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX)
}
