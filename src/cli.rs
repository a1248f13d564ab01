//! The command line: one file per command.

pub mod admin;
mod bots;
mod check_config;
mod clock;
mod completions;
mod confirm;
mod doctor;
mod explain;
mod halt;
mod health;
mod keys;
mod policy;
mod report;
mod secrets;
mod serve;
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

/// Where the configuration file is, unless the command line says otherwise.
const CONFIG: &str = "/etc/credbroker/config.toml";

/// How long the broker gets to put on disk what an admin forbids or allows.
const DECIDE_WITHIN: Duration = Duration::from_secs(30);

/// How to get a mount that the broker can use.
const NEW_MOUNT: &str =
    "`vault secrets enable -path=NAME -version=2 kv` makes one (deploy/vault/README.md, section 1)";

/// Done.
const DONE: u8 = 0;
/// Refused or failed.
const FAILED: u8 = 1;
/// The command line or the configuration is wrong.
const USAGE: u8 = 2;

/// Sends the unsigned requests of trading bots to KuCoin, signed with keys that the bots never see.
#[derive(Debug, Parser)]
#[command(name = "credbroker", version, term_width = text::WIDTH)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Keeps bots out, and lets them in again.
    Bots {
        #[command(subcommand)]
        command: bots::Command,
    },
    /// Reports every problem of the configuration, the rules and the files they name.
    ///
    /// Exit code 0: no problems; 2: problems, or no such file.
    CheckConfig {
        /// The configuration file.
        #[arg(long, default_value = CONFIG)]
        config: PathBuf,
    },
    /// Manage exchange clock checks.
    Clock {
        #[command(subcommand)]
        command: clock::Command,
    },
    /// Print completions for a shell.
    ///
    /// Exit code 0: printed; 1: stdout cannot be written; 2: usage.
    #[command(
        after_long_help = "Examples:\n  credbroker completions bash > /etc/bash_completion.d/credbroker\n  \
                           credbroker completions fish > ~/.config/fish/completions/credbroker.fish\n  \
                           credbroker completions zsh > /usr/local/share/zsh/site-functions/_credbroker"
    )]
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Looks at everything that the broker needs, and says what is wrong and what to do; the broker need not run.
    ///
    /// Changes nothing. Each request that it signs with a key is in the audit log. Exit code 0: all is well,
    /// perhaps with warnings; 1: something failed; 2: usage, or a configuration that cannot be read.
    #[command(
        after_long_help = "Examples:\n  credbroker doctor\n  credbroker doctor --live main > report.txt\n\n\
                           With --json, one object a line: {\"check\":…,\"status\":…,\"detail\":…,\"fix\":…}"
    )]
    Doctor(doctor::Arguments),
    /// Says what a code of KuCoin means, why it usually comes, and what to do; without a code, lists them all.
    ///
    /// Exit code 0: explained; 1: there is no advice on this code; 2: usage.
    #[command(
        after_long_help = "Examples:\n  credbroker explain 400006\n  credbroker explain 200002 --scope futures\n  credbroker explain funds-in-main"
    )]
    Explain(explain::Options),
    /// Halt an account or all accounts: reject new risk, and cancel open orders if asked to.
    ///
    /// Exit code 0: done, and with --cancel-all nothing is open; 1: the broker was not reached, or refused, or something is
    /// open, or it is not known; 2: usage or admin.toml.
    #[command(
        after_long_help = "Examples:\n  credbroker halt --all --cancel-all\n  credbroker halt main\n\nOrders are cancelled with the keys in memory: \
                                 halt before you revoke."
    )]
    Halt(halt::Halt),
    /// Asks a running broker whether it is healthy, and prints its answer.
    ///
    /// Exit code 0: it is; 1: it is not, or no answer came within 2 s; 2: usage or configuration.
    #[command(
        after_long_help = "Examples, for the exec probes of a container:\n  credbroker health\n  \
                                 credbroker health --ready --address 127.0.0.1:9464"
    )]
    Health(health::Options),
    /// Registers, tests, rotates, stops and shows keys.
    Keys {
        #[command(subcommand)]
        command: keys::Command,
    },
    /// Explains, checks and compares rules.
    Policy {
        #[command(subcommand)]
        command: policy::Command,
    },
    /// Ends a halt.
    ///
    /// Exit code 0: done; 1: the broker was not reached, or refused; 2: usage or admin.toml.
    #[command(
        after_long_help = "Examples:\n  credbroker resume main\n  credbroker resume --all\n\nWith --all, confirm on a terminal or pass --yes in \
                           scripts.\n\n\
                           --all lifts the halt of all accounts and lists the accounts that are halted by name."
    )]
    Resume(halt::Resume),
    /// Runs the broker until SIGTERM or Ctrl-C.
    ///
    /// Calls in flight end first. Exit code 0: stopped, and every request has its outcome; 1: failed, or stopped with
    /// requests with an unknown outcome; 2: usage or configuration.
    Serve {
        /// The configuration file.
        #[arg(long, default_value = CONFIG)]
        config: PathBuf,
    },
}

/// Runs the command that the arguments name. Exit code 0: done, 1: refused or failed, 2: usage or configuration.
pub fn run() -> ExitCode {
    let Arguments { command } = Arguments::try_parse().unwrap_or_else(|error| {
        // The library repeats an argument as it was given: have it refuse the clean one.
        let clean = std::env::args_os()
            .map(|argument| clean(&argument.to_string_lossy(), MAX_CHARS).into_owned());
        Arguments::try_parse_from(clean)
            .err()
            .unwrap_or(error)
            .exit()
    });
    ExitCode::from(match command {
        Command::Bots { command } => bots::run(&command),
        Command::CheckConfig { config } => check_config::run(&config),
        Command::Clock { command } => clock::run(&command),
        Command::Completions { shell } => completions::run(shell),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Explain(question) => explain::run(&question),
        Command::Halt(command) => halt::halt(&command),
        Command::Health(probe) => health::run(&probe),
        Command::Keys { command } => keys::run(&command),
        Command::Policy { command } => policy::run(&command),
        Command::Resume(command) => halt::resume(&command),
        Command::Serve { config } => serve::run(&config),
    })
}

/// The command line as clap knows it: completions and man pages are made from it.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Reads a configuration file, or says what is wrong with it.
fn read_config(file: &Path) -> Result<Config, Vec<Problem>> {
    let config = read_file(file, "--config", Config::parse)?;
    Ok(Config {
        file: Some(file.to_owned()),
        ..config
    })
}

/// Reads the file that this option names, or says what is wrong with it.
fn read_file<T>(
    file: &Path,
    option: &str,
    parse: impl FnOnce(&str, &Path) -> Result<T, Vec<Problem>>,
) -> Result<T, Vec<Problem>> {
    let unreadable = |error: std::io::Error| {
        let problem = format_args!("cannot be read: {error}; name another with {option}");
        vec![Problem::new(file.display().to_string(), problem)]
    };
    let bytes = std::fs::read(file).map_err(unreadable)?;
    let text = encoding::text(&bytes).map_err(unreadable)?;
    parse(text, file.parent().unwrap_or(Path::new("."))).map_err(|problems| {
        let in_file = |problem: Problem| problem.in_file(file);
        problems.into_iter().map(in_file).collect()
    })
}

/// A scope on the command line.
fn scope(text: &str) -> Result<Scope, &'static str> {
    let named = |scope: &Scope| scope.as_str() == text;
    let expected = "expected futures, spot-margin or unified";
    Scope::ALL.into_iter().find(named).ok_or(expected)
}

/// Talk goes to stderr.
fn say(text: &str) {
    let text = text::clean_lines(text);
    // Nothing is left to do where even stderr is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Data goes to stdout. Returns `code`, or that it could not be written.
fn show(text: &str, code: u8) -> u8 {
    let mut stdout = std::io::stdout();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Ok(()) => code,
        // Whoever reads has seen enough, as `head` does.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => code,
        Err(error) => {
            say(&format!("stdout cannot be written: {error}"));
            FAILED
        }
    }
}

/// One line of what others wrote (Vault, the exchange): it moves no cursor.
fn printable(text: &str) -> String {
    clean(text, MAX_CHARS).into_owned()
}

/// `again` is the command that looks again.
fn say_problems(problems: &[Problem], again: &str) {
    // One line for each, as tools expect it; whole words for a person.
    let is_wrapped = std::io::stderr().is_terminal();
    for problem in problems {
        let told = problem.to_string();
        if is_wrapped && !told.contains('\n') {
            say(text::paragraph("", &told).trim_end());
        } else {
            say(&told);
        }
    }
    let number = text::counted(problems.len(), "problem");
    let them = if problems.len() == 1 { "it" } else { "them" };
    say(&format!(
        "{number}\nfix: correct {them}; {again} looks again"
    ));
}
