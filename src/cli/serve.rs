//! `credbroker serve`: runs until it is told to stop.

use std::io;
use std::path::Path;

use anyhow::{Context, anyhow};
use tokio::signal::unix::{SignalKind, signal};

use super::text::counted;
use super::{DONE, FAILED, USAGE, read_config, say, say_problems};
use crate::config::Config;
use crate::process::harden;
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
                "stopped; {} may have been sent without anybody knowing how it ended\n\
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
        let mut server = Server::start(config).await?;
        let failure = tokio::select! {
            signal = stop_signal() => {
                let signal = signal.context("no signal handler")?;
                tracing::info!(signal, "stopping");
                None
            }
            failure = server.failed() => {
                tracing::error!(failure, "a part of the broker has ended; stopping");
                Some(failure)
            }
        };
        let unresolved = server.stop().await;
        match failure {
            Some(failure) => Err(anyhow!(
                "{failure}: a defect; {} left unresolved, see the audit file",
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

async fn stop_signal() -> io::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Its default would end the process; files that change are noticed without it.
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            tracing::info!(
                "SIGHUP: nothing to do, changed and rotated files are noticed without it"
            );
        }
    });
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    })
}
