//! `credbroker doctor`: checks everything that the broker needs, whether or not the broker is running.
//!
//! It builds the same parts as the server, but takes no lock, opens no listener and starts no polls. Requests signed with a
//! key take the same path as bots' requests and are audited like them. Each part has a time limit.

mod exchange;
mod files;
mod keys;
mod live;
mod process;
mod vault;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tokio::time::timeout;

use super::text::{Cell, Style, counted};
use super::{CONFIG, DONE, FAILED, USAGE, read_config, say, show};
use crate::base::diagnosis::{Diagnosis, Severity};
use crate::base::ids::AccountId;
use crate::base::text::{MAX_CHARS, clean, clean_json};
use crate::broker::Broker;
use crate::clock::Clock;
use crate::config::Config;
use crate::process::{Hardened, harden};
use crate::server::build;
use crate::telemetry::chain;

use keys::FoundKey;

/// Limit for all Vault checks, and for each exchange host; both run at the same time. Together with the two limits below,
/// the command takes less than half a minute even if no server responds.
const ASK_WITHIN: Duration = Duration::from_secs(8);

/// Limit for the check of the egress address.
const ADDRESS_WITHIN: Duration = Duration::from_secs(4);

/// Limit for all key tests together, which run last.
const TEST_WITHIN: Duration = Duration::from_secs(8);

#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// The configuration file.
    #[arg(long, default_value = CONFIG)]
    config: PathBuf,
    /// Print one JSON object per line.
    #[arg(long)]
    json: bool,
    /// Send test requests with this account's keys and compare each response with KuCoin's documentation. No real order is
    /// placed. The report contains no secret and no balance.
    #[arg(long, value_name = "ACCOUNT")]
    live: Option<AccountId>,
}

impl Arguments {
    /// The command that runs all checks with these arguments, to run it again as another user.
    fn command(&self) -> String {
        let mut command = "credbroker doctor".to_owned();
        if self.config != Path::new(CONFIG) {
            command += " --config ";
            command += &quoted(&self.config);
        }
        if self.json {
            command += " --json";
        }
        command
    }
}

/// A path as a word for the shell.
fn quoted(path: &Path) -> String {
    let path = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%=".contains(c);
    if path.chars().all(is_plain) {
        path
    } else {
        format!("'{}'", path.replace('\'', r"'\''"))
    }
}

fn in_json(found: &Diagnosis) -> String {
    let Diagnosis {
        id,
        about,
        severity,
        cause,
        fix,
    } = found;
    let check = format!("{id} {about}");
    let fix = (!fix.is_empty()).then_some(fix);
    let object = json!({
        "check": check.trim_end(), "status": severity.as_str(), "detail": cause, "fix": fix,
    });
    clean_json(&object.to_string()).into_owned()
}

/// The finding, with the fix on the next line.
fn rows(found: &Diagnosis) -> Vec<Vec<Cell>> {
    let status = Cell::of(found.severity, found.severity.as_str());
    let cause = if found.about.is_empty() {
        found.cause.clone()
    } else {
        format!("{}: {}", found.about, found.cause)
    };
    let mut rows = vec![vec![status, found.id.into(), cause.into()]];
    if !found.fix.is_empty() {
        let fix = format!("fix: {}", found.fix);
        rows.push(vec!["".into(), "".into(), fix.into()]);
    }
    rows
}

/// Escapes control characters in text from Vault, the exchange or a file.
fn harmless(text: &str) -> String {
    clean(text, MAX_CHARS).into_owned()
}

pub(super) fn run(arguments: &Arguments) -> u8 {
    // Doctor reads keys into memory for a short time.
    let hardened = harden();
    let name = arguments.config.display().to_string();
    let config = match read_config(&arguments.config) {
        Ok(config) => config,
        Err(problems) => {
            let fix = "correct it, then run `credbroker check-config` to check";
            let failed = |problem: &dyn std::fmt::Display| {
                Diagnosis::failed("config", problem.to_string(), fix)
            };
            let lines: Vec<_> = problems.iter().map(|problem| failed(problem)).collect();
            return report("", &lines, arguments.json, USAGE);
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            say(&format!("cannot start the async runtime: {error}"));
            return FAILED;
        }
    };
    let code = runtime.block_on(async {
        if let Some(account) = &arguments.live {
            return live::run(&config, account, arguments.json).await;
        }
        let mut lines = vec![Diagnosis::ok("config", format!("{name}: no problems"))];
        lines.extend(examine(&config, &hardened, &arguments.command()).await);
        report("", &lines, arguments.json, FAILED)
    });
    // Does not wait for name lookups that are still blocked.
    runtime.shutdown_background();
    code
}

/// Prints the lines below `head`; the exit code is `failed` if one of them has failed.
fn report(head: &str, lines: &[Diagnosis], json: bool, failed: u8) -> u8 {
    let text = if json {
        lines
            .iter()
            .fold(String::new(), |text, line| text + &in_json(line) + "\n")
    } else {
        let rows: Vec<_> = lines.iter().flat_map(rows).collect();
        head.to_owned() + &Style::of_stdout().table(&rows) + &verdict(lines) + "\n"
    };
    show(&text, code(lines, failed))
}

/// The summary. It is the last line, because the first ones may have scrolled off the screen.
fn verdict(lines: &[Diagnosis]) -> String {
    let number = |level| lines.iter().filter(|line| line.severity == level).count();
    match (number(Severity::Failed), number(Severity::Warning)) {
        (0, 0) => "no problems".to_owned(),
        (0, warnings) => format!("no failures, {}", counted(warnings, "warning")),
        (failures, warnings) => format!(
            "{}, {}",
            counted(failures, "failure"),
            counted(warnings, "warning")
        ),
    }
}

fn code(lines: &[Diagnosis], failed: u8) -> u8 {
    let has_failed = lines.iter().any(|line| line.severity == Severity::Failed);
    if has_failed { failed } else { DONE }
}

/// Runs all checks; the lines are in the order in which they are printed. `command`: how doctor was called.
async fn examine(config: &Config, hardened: &Hardened, command: &str) -> Vec<Diagnosis> {
    let clock = Arc::new(Clock::system());
    let (mut lines, policy) = files::rules(&config.rules);
    lines.extend(files::certificates(config, clock.wall_ms()));
    lines.extend(files::permissions(config));
    let (state_lines, is_running) = files::state(config, command);
    let (audit_lines, audit_ready) = files::audit(config);
    let process_lines = process::lines(config, is_running, hardened);

    let provider = build::provider();
    let (egress_roots, egress_lines) = files::roots("egress.roots", &config.egress_roots);
    let (vault_roots, roots_lines) = files::roots("vault.roots", &config.vault_roots);
    lines.extend(egress_lines.into_iter().chain(roots_lines));

    let egress = build::egress(config, egress_roots, &provider);
    let exchange_checks = async {
        let host_ids = exchange::host_ids(policy.as_ref());
        match &egress {
            Ok(egress) => exchange::check(config, egress, &clock, &host_ids).await,
            Err(error) => vec![exchange::setup_failed(error)],
        }
    };
    let vault_checks = async {
        let check = vault::check(config, vault_roots, &provider, policy.as_ref(), is_running);
        match timeout(ASK_WITHIN, check).await {
            Ok(found) => found,
            Err(_) => vault::timed_out(ASK_WITHIN),
        }
    };
    let (exchange_lines, (vault_lines, found)) = tokio::join!(exchange_checks, vault_checks);
    lines.extend(vault_lines);
    lines.extend(exchange_lines);
    // Without a key to test, not even an empty audit file is created.
    if let (Some(policy), Ok(egress), false) = (policy, egress, found.is_empty()) {
        let unaudited = |reason| {
            format!("doctor cannot write the audit log, which records each test: {reason}")
        };
        let broker = audit_ready.map_err(unaudited).and_then(|()| {
            let broker = build::broker(config, policy, egress, clock);
            broker.map_err(|error| chain(&error))
        });
        lines.extend(test(broker.map(Arc::new), found).await);
    }
    lines.extend(audit_lines);
    lines.extend(state_lines);
    lines.extend(process_lines);
    lines
}

/// Tests on the exchange every key that Vault returned.
async fn test(broker: Result<Arc<Broker>, String>, found: Vec<FoundKey>) -> Vec<Diagnosis> {
    match broker {
        Ok(broker) => {
            let tests = found.into_iter().map(|found| {
                let broker = Arc::clone(&broker);
                async move {
                    let about = found.about();
                    let tested = timeout(TEST_WITHIN, keys::test(&broker, found)).await;
                    tested.unwrap_or_else(|_| keys::timed_out(&about, TEST_WITHIN))
                }
            });
            let lines = futures_util::future::join_all(tests).await;
            broker.audit.flush().await;
            lines.concat()
        }
        Err(reason) => found
            .iter()
            .map(|found| {
                let detail = format!("not tested: {reason}");
                Diagnosis::unchecked("key", detail).about(found.about())
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proposed_command_has_all_arguments_of_this_run() {
        for (config, json, expected) in [
            (CONFIG, false, "credbroker doctor"),
            (
                "/etc/test.toml",
                true,
                "credbroker doctor --config /etc/test.toml --json",
            ),
            (
                "it's here.toml",
                false,
                r"credbroker doctor --config 'it'\''s here.toml'",
            ),
        ] {
            let arguments = Arguments {
                config: config.into(),
                json,
                live: None,
            };
            assert_eq!(arguments.command(), expected);
        }
    }
}
