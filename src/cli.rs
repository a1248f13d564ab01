//! The command line: one file per command.

mod check_config;
mod serve;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::Config;
use crate::toml_file::Problem;

/// Done.
const DONE: u8 = 0;
/// Refused or failed.
const FAILED: u8 = 1;
/// The command line or the configuration is wrong.
const USAGE: u8 = 2;

/// Sends the unsigned requests of trading bots to `KuCoin`, signed with keys that the bots never see.
#[derive(Debug, Parser)]
#[command(name = "credbroker", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Reports every problem of the configuration, the rules and the files they name.
    CheckConfig {
        /// The configuration file.
        #[arg(long, default_value = "/etc/credbroker/config.toml")]
        config: PathBuf,
    },
    /// Runs the broker until SIGTERM or Ctrl-C.
    Serve {
        /// The configuration file.
        #[arg(long, default_value = "/etc/credbroker/config.toml")]
        config: PathBuf,
    },
}

/// Runs the command that the arguments name. Exit code 0: done, 1: refused or failed, 2: usage or configuration.
pub fn run() -> ExitCode {
    let Arguments { command } = Arguments::parse();
    ExitCode::from(match command {
        Command::CheckConfig { config } => check_config::run(&config),
        Command::Serve { config } => serve::run(&config),
    })
}

/// Reads a configuration file, or says what is wrong with it.
fn read_config(file: &Path) -> Result<Config, Vec<Problem>> {
    let text = std::fs::read_to_string(file).map_err(|error| {
        let problem = format_args!("cannot be read: {error}; name another with --config");
        vec![Problem::new(file.display().to_string(), problem)]
    })?;
    Config::parse(&text, file.parent().unwrap_or(Path::new("."))).map_err(|problems| {
        let in_file = |problem: Problem| problem.in_file(file);
        problems.into_iter().map(in_file).collect()
    })
}

/// Talk goes to stderr.
fn say(text: &str) {
    // Nothing is left to do where even stderr is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn say_problems(problems: &[Problem]) {
    for problem in problems {
        say(&format!("{problem}"));
    }
    say(&format!(
        "{} problem(s)\nfix: correct them; credbroker check-config looks again",
        problems.len()
    ));
}
