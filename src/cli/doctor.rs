//! `credbroker doctor`: looks at everything that the broker needs, whether or not the broker runs.
//!
//! It takes the same parts as the server and begins nothing with them: no lock, no listener, no poll. What it asks of the
//! exchange with a key takes the path of bots' requests and is audited like them. Each part is bounded in time.

mod exchange;
mod files;
mod keys;
mod live;
mod process;
mod vault;

use std::path::PathBuf;
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

use keys::Found;

/// For all that is asked of Vault, and for each host of the exchange at the same time. With what follows, the address and
/// the keys, the whole command takes less than half a minute whoever does not answer.
const ASK_WITHIN: Duration = Duration::from_secs(8);

/// For the question about our address.
const ADDRESS_WITHIN: Duration = Duration::from_secs(4);

/// For all questions with keys together, which come last.
const TEST_WITHIN: Duration = Duration::from_secs(8);

#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// The configuration file.
    #[arg(long, default_value = CONFIG)]
    config: PathBuf,
    /// Writes a JSON object a line, for machines.
    #[arg(long)]
    json: bool,
    /// Asks the exchange about this account and with its keys, and compares each answer with what is documented; no order
    /// is placed. The report holds no secret and no balance.
    #[arg(long, value_name = "ACCOUNT")]
    live: Option<AccountId>,
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

/// The line, and the fix on the next one.
fn rows(found: &Diagnosis) -> Vec<Vec<Cell>> {
    let word = Cell::of(found.severity, found.severity.as_str());
    let cause = if found.about.is_empty() {
        found.cause.clone()
    } else {
        format!("{}: {}", found.about, found.cause)
    };
    let mut rows = vec![vec![word, found.id.into(), cause.into()]];
    if !found.fix.is_empty() {
        let fix = format!("fix: {}", found.fix);
        rows.push(vec!["".into(), "".into(), fix.into()]);
    }
    rows
}

/// What others wrote (Vault, the exchange, a file) moves no cursor.
fn harmless(text: &str) -> String {
    clean(text, MAX_CHARS).into_owned()
}

pub(super) fn run(arguments: &Arguments) -> u8 {
    // It holds keys for a moment, as the broker does for long.
    let hardened = harden();
    let name = arguments.config.display().to_string();
    let config = match read_config(&arguments.config) {
        Ok(config) => config,
        Err(problems) => {
            let fix = "correct it; `credbroker check-config` looks again";
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
            say(&format!("no runtime: {error}"));
            return FAILED;
        }
    };
    let code = runtime.block_on(async {
        if let Some(account) = &arguments.live {
            return live::run(&config, account, arguments.json).await;
        }
        let mut lines = vec![Diagnosis::ok("config", format!("{name}: no problems"))];
        lines.extend(examine(&config, &hardened).await);
        report("", &lines, arguments.json, FAILED)
    });
    // Whoever still asks a name server that does not answer is not waited for.
    runtime.shutdown_background();
    code
}

/// Shows the lines below `head`; the exit code is `failed` where one of them says so.
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

/// What it comes to: the last line, as the first ones may have left the screen.
fn verdict(lines: &[Diagnosis]) -> String {
    let number = |level| lines.iter().filter(|line| line.severity == level).count();
    match (number(Severity::Failed), number(Severity::Warning)) {
        (0, 0) => "nothing is wrong".to_owned(),
        (0, warnings) => format!("nothing failed; {}", counted(warnings, "warning")),
        (failed, warnings) => format!("{failed} failed; {}", counted(warnings, "warning")),
    }
}

fn code(lines: &[Diagnosis], failed: u8) -> u8 {
    let has_failed = lines.iter().any(|line| line.severity == Severity::Failed);
    if has_failed { failed } else { DONE }
}

/// Looks at everything, in the order of the screen.
async fn examine(config: &Config, hardened: &Hardened) -> Vec<Diagnosis> {
    let clock = Arc::new(Clock::system());
    let (mut lines, policy) = files::rules(&config.rules);
    lines.extend(files::certificates(config, clock.wall_ms()));
    lines.extend(files::permissions(config));
    let (state_lines, is_running) = files::state(config);
    let (audit_lines, recordable) = files::audit(config);
    let process_lines = process::lines(config, is_running, hardened);

    let provider = build::provider();
    let (egress_roots, egress_lines) = files::roots("egress.roots", &config.egress_roots);
    let (vault_roots, roots_lines) = files::roots("vault.roots", &config.vault_roots);
    lines.extend(egress_lines.into_iter().chain(roots_lines));

    let egress = build::egress(config, egress_roots, &provider);
    let asked = async {
        let host_ids = exchange::host_ids(policy.as_ref());
        match &egress {
            Ok(egress) => exchange::look(config, egress, &clock, &host_ids).await,
            Err(error) => vec![exchange::unfit(error)],
        }
    };
    let keys = async {
        let look = vault::look(config, vault_roots, &provider, policy.as_ref(), is_running);
        match timeout(ASK_WITHIN, look).await {
            Ok(found) => found,
            Err(_) => vault::late(ASK_WITHIN),
        }
    };
    let (exchange_lines, (vault_lines, found)) = tokio::join!(asked, keys);
    lines.extend(vault_lines);
    lines.extend(exchange_lines);
    // Where there is nothing to sign, not even an empty audit file is made.
    if let (Some(policy), Ok(egress), false) = (policy, egress, found.is_empty()) {
        let broker = recordable.and_then(|()| {
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

/// Asks the exchange about every key that Vault gave.
async fn test(broker: Result<Arc<Broker>, String>, found: Vec<Found>) -> Vec<Diagnosis> {
    match broker {
        Ok(broker) => {
            let tests = found.into_iter().map(|found| {
                let broker = Arc::clone(&broker);
                async move {
                    let about = found.about();
                    let tested = timeout(TEST_WITHIN, keys::test(&broker, found)).await;
                    tested.unwrap_or_else(|_| keys::late(&about, TEST_WITHIN))
                }
            });
            let lines = futures_util::future::join_all(tests).await;
            broker.audit.sync();
            lines.concat()
        }
        Err(reason) => found
            .iter()
            .map(|found| {
                let detail = format!("not tested, since nothing is sent unrecorded: {reason}");
                Diagnosis::unchecked("key", detail).about(found.about())
            })
            .collect(),
    }
}
