//! Runs a simulator as a program: `cargo run -p credbroker-sim -- kucoin` or `-- vault`.

use std::fs;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use credbroker_sim::kucoin::{KucoinSettings, KucoinSim, Limits, SimKey};
use credbroker_sim::vault::VaultArgs;
use tokio::signal::unix::{SignalKind, signal};

/// Simulated KuCoin and simulated Vault: loopback only, made-up keys only
#[derive(Parser)]
#[command(name = "credbroker-sim")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the simulated KuCoin: one spot and one futures host
    Kucoin(KucoinArgs),
    /// Run the simulated Vault
    Vault(VaultArgs),
}

#[derive(Args)]
struct KucoinArgs {
    /// Address of the host for spot, margin, account and unified account (port 0 picks a free port)
    #[arg(long, default_value = "127.0.0.1:0")]
    spot: SocketAddr,
    /// Address of the futures host (port 0 picks a free port)
    #[arg(long, default_value = "127.0.0.1:0")]
    futures: SocketAddr,
    /// JSON file with a made-up API key (`api_key`, `api_secret`, `passphrase`, `uid`, ...); may be repeated
    #[arg(long = "key", value_name = "FILE")]
    keys: Vec<PathBuf>,
    /// Raise the rate limits so far that nothing reaches them
    #[arg(long)]
    no_limits: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Kucoin(args) => kucoin(args).await,
        Command::Vault(args) => vault(args).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If stderr is closed, the exit code must be enough.
            let _ = writeln!(io::stderr(), "credbroker-sim: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn kucoin(args: KucoinArgs) -> io::Result<()> {
    let keys = args
        .keys
        .iter()
        .map(|file| read_key(file))
        .collect::<io::Result<Vec<_>>>()?;
    let settings = KucoinSettings {
        spot: args.spot,
        futures: args.futures,
        limits: if args.no_limits {
            Limits::none()
        } else {
            Limits::default()
        },
        ..KucoinSettings::default()
    };
    let sim = KucoinSim::start(settings).await?;
    let mut banner = Vec::new();
    writeln!(
        banner,
        "simulated KuCoin: nothing here is real\nspot {}\nfutures {}",
        sim.spot_url(),
        sim.futures_url()
    )?;
    if keys.is_empty() {
        let key = SimKey::fake(1);
        writeln!(banner, "key {}", serde_json::to_string(&key)?)?;
        sim.add_key(key);
    }
    for key in keys {
        sim.add_key(key);
    }
    print(&banner)?;
    until_stopped().await
}

async fn vault(args: VaultArgs) -> io::Result<()> {
    let root_token = args.root_token.clone();
    let sim = credbroker_sim::vault::serve(args).await?;
    let banner = format!(
        "simulated Vault: nothing here is secret\nvault {}\ntoken {root_token}\n",
        sim.address()
    );
    print(banner.as_bytes())?;
    until_stopped().await
}

fn read_key(file: &Path) -> io::Result<SimKey> {
    let problem =
        |error: &dyn std::fmt::Display| io::Error::other(format!("{}: {error}", file.display()));
    let text = fs::read(file).map_err(|error| problem(&error))?;
    serde_json::from_slice(&text).map_err(|error| problem(&error))
}

/// Writes and flushes, so that a script that reads a pipe gets the URLs at once.
fn print(text: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text)?;
    out.flush()
}

/// Waits for Ctrl-C or SIGTERM.
async fn until_stopped() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}
