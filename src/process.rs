//! What the system is told about this process: nobody may read its memory, on disk or while it runs; and the signals
//! that it takes.

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

/// Signals that are waited for, and do nothing by themselves from then on.
pub(crate) struct Signals(Vec<(&'static str, Signal)>);

impl Signals {
    /// Takes these signals, each with its name.
    pub(crate) fn take<const N: usize>(
        signals: [(&'static str, SignalKind); N],
    ) -> io::Result<Self> {
        let taken = signals.into_iter();
        let taken = taken.map(|(name, kind)| Ok((name, signal(kind)?)));
        taken.collect::<io::Result<_>>().map(Self)
    }

    /// Takes those that end a command.
    pub(crate) fn of_a_command() -> io::Result<Self> {
        Self::take([
            ("SIGHUP", SignalKind::hangup()),
            ("SIGINT", SignalKind::interrupt()),
            ("SIGTERM", SignalKind::terminate()),
        ])
    }

    /// Waits for the next one, and returns its name.
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

/// What could be had of the system.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Hardened {
    /// Whether nobody but root can attach to it or read its memory, and no core is dumped.
    pub(crate) is_undumpable: bool,
    /// Whether its memory stays out of swap.
    pub(crate) is_locked: bool,
    /// How many files and connections it may have open.
    pub(crate) descriptors: u64,
    /// When it started, in seconds of Unix time.
    pub(crate) started_s: u64,
}

/// What [`harden`] came to.
static HARDENED: OnceLock<Hardened> = OnceLock::new();

/// What could be had of the system; `None` where nobody has asked (tests).
pub(crate) fn hardened() -> Option<Hardened> {
    HARDENED.get().copied()
}

/// Closes what can be closed, and warns of the rest with what to set. To be called before any secret is read, and
/// before threads are started.
pub(crate) fn harden() -> Hardened {
    let no_core = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let core = setrlimit(Resource::Core, no_core);
    let dumpable = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    for error in [core, dumpable].into_iter().filter_map(Result::err) {
        tracing::warn!(%error, "memory could end up in a core dump: the system refuses to switch dumps off");
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
        "process hardened"
    );
    *HARDENED.get_or_init(|| hardened)
}

/// Locks pages as they are used; only where there is no limit, since with one the next allocation past it would fail.
fn lock_memory() -> bool {
    if let Some(limit) = getrlimit(Resource::Memlock).current {
        tracing::warn!(
            limit_bytes = limit,
            "memory is not locked and could be swapped out: set LimitMEMLOCK=infinity (systemd) or --ulimit memlock=-1 (containers), or run without swap"
        );
        return false;
    }
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    match mlockall(all) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, "memory is not locked and could be swapped out");
            false
        }
    }
}

/// As many descriptors as the system allows: each connection is one.
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
