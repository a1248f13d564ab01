//! `credbroker serve`: runs until it is told to stop.

use std::io;
use std::path::Path;

use anyhow::{Context, anyhow};
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

use super::text::counted;
use super::{DONE, FAILED, USAGE, read_config, say, say_problems};
use crate::config::Config;
use crate::process::{Signals, harden};
use crate::server::{Server, StartError};
use crate::telemetry::init_logs;

pub(super) fn run(file: &Path) -> u8 {
    let config = match read_config(file) {
        Ok(config) => config,
        Err(problems) => {
            say_problems(&problems, "credbroker check-config");
            return USAGE;
        }
    };
    match serve(config) {
        Ok(0) => DONE,
        Ok(unresolved) => {
            say(&format!(
                "stopped; the outcome of {} is unknown\n\
                 fix: look up the lines with outcome maybe_sent at the end of the audit file",
                requests(unresolved)
            ));
            FAILED
        }
        Err(error) => {
            if let Some(StartError::Config(problems)) = error.downcast_ref() {
                say_problems(problems, "credbroker check-config");
                return USAGE;
            }
            say(&format!("{error:#}"));
            FAILED
        }
    }
}

/// Returns how many calls ended with nobody knowing whether they were executed.
fn serve(config: Config) -> anyhow::Result<u64> {
    init_logs(&config.log_filter, config.log_format).context("log.filter")?;
    harden();
    // One thread: a call costs less than waking a second one would.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no runtime")?;
    let ended = runtime.block_on(async {
        ignore_signals().context("cannot install signal handlers")?;
        let mut server = Server::start(config).await?;
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
                tracing::error!(failure, "background task exited; shutting down");
                Some(failure)
            }
        };
        let unresolved = server.stop().await;
        match failure {
            Some(failure) => Err(anyhow!(
                "{failure}: this is a bug; {} left unresolved, see the audit log",
                requests(unresolved)
            )),
            None => Ok(unresolved),
        }
    });
    // Whoever still asks a name server that does not answer is not waited for.
    runtime.shutdown_background();
    ended
}

fn requests(number: u64) -> String {
    counted(usize::try_from(number).unwrap_or(usize::MAX), "request")
}

/// Takes signals whose default would end the process with calls in flight.
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
                "signal ignored; changed and rotated files are noticed without it"
            );
        }
    });
    // The write past a file size limit (RLIMIT_FSIZE) fails as well, and that is logged; the handler stays without its
    // receiver.
    drop(signal(SignalKind::from_raw(Signal::XFSZ.as_raw()))?);
    Ok(())
}
