//! The command line: one file per command.

pub mod admin;
mod bots;
mod budgets;
mod check_config;
mod clock;
mod completions;
mod confirm;
mod doctor;
mod explain;
mod halt;
mod health;
mod keys;
mod orders;
mod policy;
mod report;
mod secrets;
mod serve;
mod supervisor;
pub(crate) mod text;

use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::base::encoding;
use crate::base::text::{MAX_CHARS, clean};
use crate::base::toml_file::Problem;
use crate::config::Config;
use crate::kucoin::Scope;
use crate::telemetry::write_stderr;

/// Default path of the configuration file.
const CONFIG: &str = "/etc/credbroker/config.toml";

/// Time limit of admin calls that change what the broker allows; most of them write to disk first.
const DECIDE_WITHIN: Duration = Duration::from_secs(30);

/// How to create a mount that the broker can use.
const NEW_MOUNT: &str = "create one with `vault secrets enable -path=NAME -version=2 kv` (deploy/vault/README.md, section 1)";

/// Exit code: done.
const DONE: u8 = 0;
/// Exit code: refused or failed.
const FAILED: u8 = 1;
/// Exit code: invalid command line or configuration.
const USAGE: u8 = 2;

/// Sign and send the KuCoin requests of trading bots, so that no bot holds an API key.
#[derive(Debug, Parser)]
#[command(name = "credbroker", version, term_width = text::WIDTH)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Block or unblock bots.
    Bots {
        #[command(subcommand)]
        command: bots::Command,
    },
    /// Show how much of KuCoin's rate limits the accounts have used.
    ///
    /// Weights of the current window of each pool, as the running broker counts them. Exit code 0: shown; 1: broker
    /// unreachable or call refused; 2: usage error or invalid admin.toml.
    #[command(
        after_long_help = "Examples:\n  credbroker budgets\n  credbroker budgets main --json"
    )]
    Budgets(budgets::Options),
    /// Check the configuration, the rules and all files that they name.
    ///
    /// Reports every problem. Exit code 0: no problems; 2: problems found, or the file cannot be read.
    CheckConfig {
        /// Path of the configuration file.
        #[arg(long, default_value = CONFIG)]
        config: PathBuf,
    },
    /// Accept a large difference between the exchange's clock and the system clock.
    Clock {
        #[command(subcommand)]
        command: clock::Command,
    },
    /// Print completions for a shell.
    ///
    /// Exit code 0: printed; 1: cannot write to stdout; 2: usage error.
    #[command(
        after_long_help = "Examples:\n  credbroker completions bash > /etc/bash_completion.d/credbroker\n  \
                           credbroker completions fish > ~/.config/fish/completions/credbroker.fish\n  \
                           credbroker completions zsh > /usr/local/share/zsh/site-functions/_credbroker"
    )]
    Completions {
        /// Shell to print completions for.
        shell: Shell,
    },
    /// Check everything that the broker needs, and print each problem with its fix.
    ///
    /// Works whether or not the broker is running. Changes nothing, but records in the audit log each request that it
    /// signs with a key. Exit code 0: no check failed (warnings are possible); 1: a check failed; 2: usage error, or the
    /// configuration cannot be read.
    #[command(
        after_long_help = "Examples:\n  credbroker doctor\n  credbroker doctor --live main > report.txt\n\n\
                           With --json: one object per line, {\"check\":…,\"status\":…,\"detail\":…,\"fix\":…}"
    )]
    Doctor(doctor::Arguments),
    /// Explain a KuCoin error code: meaning, usual cause and fix; without a code, list all codes.
    ///
    /// Exit code 0: explained; 1: no advice for this code; 2: usage error.
    #[command(
        after_long_help = "Examples:\n  credbroker explain 400006\n  credbroker explain 200002 --scope futures\n  credbroker explain funds-in-main"
    )]
    Explain(explain::Options),
    /// Halt an account or all accounts: refuse risk-increasing requests; with --cancel-all, cancel open orders.
    ///
    /// Exit code 0: halted, and with --cancel-all no order is open; 1: broker unreachable, call refused, halt not written
    /// to disk, orders still open, or open orders unknown; 2: usage error or invalid admin.toml.
    #[command(
        after_long_help = "Examples:\n  credbroker halt --all --cancel-all\n  credbroker halt main\n\nA revoked key cannot cancel orders: run \
                                 `credbroker halt ACCOUNT --cancel-all` before you revoke keys."
    )]
    Halt(halt::Halt),
    /// Check whether a running broker is healthy, and print its response.
    ///
    /// Exit code 0: healthy (with --ready: ready); 1: unhealthy (with --ready: not ready), or no response within 2 s;
    /// 2: usage error or invalid configuration.
    #[command(
        after_long_help = "Examples, for the exec probes of a container:\n  credbroker health\n  \
                                 credbroker health --ready --address 127.0.0.1:9464"
    )]
    Health(health::Options),
    /// List, register, test, rotate, roll back and revoke keys.
    Keys {
        #[command(subcommand)]
        command: keys::Command,
    },
    /// Decide about clientOids that are not in the audit log.
    Orders {
        #[command(subcommand)]
        command: orders::Command,
    },
    /// Explain, check, compare and show rules.
    Policy {
        #[command(subcommand)]
        command: policy::Command,
    },
    /// End a halt.
    ///
    /// Exit code 0: done; 1: broker unreachable or call refused; 2: usage error or invalid admin.toml.
    #[command(
        after_long_help = "Examples:\n  credbroker resume main\n  credbroker resume --all\n\nWith --all, confirm on a terminal or pass --yes in \
                           scripts.\n\n\
                           --all lifts only the halt set with `halt --all`; accounts that were halted individually stay halted and are listed."
    )]
    Resume(halt::Resume),
    /// Run the broker until SIGTERM or Ctrl-C.
    ///
    /// Calls in flight finish first. Exit code 0: stopped, and the outcome of every request in flight is known; 1: failed,
    /// or stopped while the outcome of some requests is unknown; 2: usage error or invalid configuration.
    Serve {
        /// Path of the configuration file.
        #[arg(long, default_value = CONFIG)]
        config: PathBuf,
    },
}

/// Runs the command on the command line. Exit code 0: done, 1: refused or failed, 2: usage error or configuration.
pub fn run() -> ExitCode {
    let Arguments { command } = Arguments::try_parse().unwrap_or_else(|error| {
        // clap repeats arguments unescaped in its errors: parse escaped ones, so that it shows those.
        let clean = std::env::args_os()
            .map(|argument| clean(&argument.to_string_lossy(), MAX_CHARS).into_owned());
        Arguments::try_parse_from(clean)
            .err()
            .unwrap_or(error)
            .exit()
    });
    ExitCode::from(match command {
        Command::Bots { command } => bots::run(&command),
        Command::Budgets(options) => budgets::run(&options),
        Command::CheckConfig { config } => check_config::run(&config),
        Command::Clock { command } => clock::run(&command),
        Command::Orders { command } => orders::run(&command),
        Command::Completions { shell } => completions::run(shell),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Explain(options) => explain::run(&options),
        Command::Halt(command) => halt::halt(&command),
        Command::Health(options) => health::run(&options),
        Command::Keys { command } => keys::run(&command),
        Command::Policy { command } => policy::run(&command),
        Command::Resume(command) => halt::resume(&command),
        Command::Serve { config } => serve::run(&config),
    })
}

/// The clap command, from which completions and man pages are generated.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Reads a configuration file, or returns its problems.
fn read_config(file: &Path) -> Result<Config, Vec<Problem>> {
    let config = read_file(file, "--config", Config::parse)?;
    Ok(Config {
        file: Some(file.to_owned()),
        ..config
    })
}

/// Reads the file that `option` names, or returns its problems.
fn read_file<T>(
    file: &Path,
    option: &str,
    parse: impl FnOnce(&str, &Path) -> Result<T, Vec<Problem>>,
) -> Result<T, Vec<Problem>> {
    let unreadable = |error: std::io::Error| {
        let problem = format_args!("cannot be read: {error}; set the path with {option}");
        vec![Problem::new(file.display().to_string(), problem)]
    };
    let bytes = std::fs::read(file).map_err(unreadable)?;
    let text = encoding::text(&bytes).map_err(unreadable)?;
    parse(text, file.parent().unwrap_or(Path::new("."))).map_err(|problems| {
        let in_file = |problem: Problem| problem.in_file(file);
        problems.into_iter().map(in_file).collect()
    })
}

/// Parses a scope on the command line.
fn scope(text: &str) -> Result<Scope, &'static str> {
    let named = |scope: &Scope| scope.as_str() == text;
    let expected = "expected futures, spot-margin or unified";
    Scope::ALL.into_iter().find(named).ok_or(expected)
}

/// Writes a message to stderr.
fn say(text: &str) {
    write_stderr(&text::clean_lines(text));
}

/// Writes output to stdout. Returns `code`, or [`FAILED`] if stdout cannot be written.
fn show(text: &str, code: u8) -> u8 {
    let mut stdout = std::io::stdout();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Ok(()) => code,
        // The reader closed the pipe early, as `head` does.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => code,
        Err(error) => {
            say(&format!("cannot write to stdout: {error}"));
            FAILED
        }
    }
}

/// Text from outside (Vault, the exchange) on one line, with control characters escaped.
fn printable(text: &str) -> String {
    clean(text, MAX_CHARS).into_owned()
}

/// Prints problems; `next` is what to do once they are corrected.
fn say_problems(problems: &[Problem], next: &str) {
    // On a terminal wrapped between words; otherwise one line per problem, for tools.
    let is_wrapped = std::io::stderr().is_terminal();
    for problem in problems {
        let line = problem.to_string();
        if is_wrapped && !line.contains('\n') {
            say(text::paragraph("", &line).trim_end());
        } else {
            say(&line);
        }
    }
    let number = text::counted(problems.len(), "problem");
    let them = if problems.len() == 1 { "it" } else { "them" };
    say(&format!("{number}\nfix: correct {them}, then {next}"));
}
