//! `credbroker serve`: runs the broker until a signal stops it.

use std::io;
use std::path::Path;

use anyhow::{Context, anyhow};
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

use super::supervisor;
use super::text::counted;
use super::{DONE, FAILED, USAGE, read_config, say, say_problems};
use crate::clock::Clock;
use crate::config::Config;
use crate::process::{Signals, harden};
use crate::server::sockets::Inherited;
use crate::server::{Server, StartError};
use crate::telemetry::{FlushLog, init_logs, start_log_thread};

pub(super) fn run(file: &Path) -> u8 {
    let _flush = FlushLog;
    let config = match read_config(file) {
        Ok(config) => config,
        Err(problems) => {
            say_problems(&problems, "run `credbroker check-config` to check");
            return USAGE;
        }
    };
    match serve(config) {
        Ok(0) => DONE,
        Ok(unresolved) => {
            say(&format!(
                "stopped; the outcome of {} is unknown\n\
                 fix: find the lines with outcome maybe_sent at the end of the audit log, and look these requests up on KuCoin",
                requests(unresolved)
            ));
            FAILED
        }
        Err(error) => {
            if let Some(StartError::Config(problems)) = error.downcast_ref() {
                say_problems(problems, "run `credbroker check-config` to check");
                return USAGE;
            }
            say(&format!("{error:#}"));
            FAILED
        }
    }
}

/// Runs the broker. Returns how many calls ended with an unknown outcome.
fn serve(config: Config) -> anyhow::Result<u64> {
    // Before any thread starts: changes the environment.
    let inherited = Inherited::take()?;
    init_logs(&config.log_filter, config.log_format).context("log.filter")?;
    start_log_thread().context("cannot start the log thread")?;
    harden();
    // One thread: handling a call takes less time than waking a second thread. Calls also rely on it: nothing else runs from the grant
    // of a waiting order to its claim (`budgets.rs`).
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let ended = runtime.block_on(async {
        ignore_signals().context("cannot install signal handlers")?;
        let mut server = Server::start_with(config, Clock::system(), inherited).await?;
        supervisor::ready();
        tokio::spawn(supervisor::feed_watchdog(server.readiness()));
        let stop = Signals::take([
            ("SIGTERM", SignalKind::terminate()),
            ("SIGINT", SignalKind::interrupt()),
            ("SIGQUIT", SignalKind::quit()),
        ]);
        let mut stop = stop.context("cannot install signal handlers")?;
        let failure = tokio::select! {
            signal = stop.next() => {
                tracing::info!(signal, "stopping");
                None
            }
            failure = server.failed() => {
                tracing::error!(exception.message = failure, "background task exited; shutting down");
                Some(failure)
            }
        };
        supervisor::stopping();
        let unresolved = server.stop().await;
        match failure {
            Some(failure) if unresolved == 0 => Err(anyhow!("{failure}: this is a bug")),
            Some(failure) => Err(anyhow!(
                "{failure}: this is a bug; {} ended with an unknown outcome (maybe_sent in the audit log)",
                requests(unresolved)
            )),
            None => Ok(unresolved),
        }
    });
    // Does not wait for name lookups that are still blocked.
    runtime.shutdown_background();
    ended
}

fn requests(number: u64) -> String {
    counted(usize::try_from(number).unwrap_or(usize::MAX), "request")
}

/// Handles signals whose default action would kill the process with calls in flight.
fn ignore_signals() -> io::Result<()> {
    let mut ignored = Signals::take([
        ("SIGHUP", SignalKind::hangup()),
        ("SIGUSR1", SignalKind::user_defined1()),
        ("SIGUSR2", SignalKind::user_defined2()),
    ])?;
    tokio::spawn(async move {
        loop {
            let signal = ignored.next().await;
            tracing::info!(
                signal,
                "signal ignored; the broker reloads changed files and reopens rotated files without a signal"
            );
        }
    });
    // SIGXFSZ: a write past the file size limit (RLIMIT_FSIZE) then fails with an error, which is logged. The handler stays
    // installed after its receiver is dropped.
    drop(signal(SignalKind::from_raw(Signal::XFSZ.as_raw()))?);
    Ok(())
}
