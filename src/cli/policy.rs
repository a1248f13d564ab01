//! `credbroker policy`: checks and shows rules before a broker uses them.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::Value;

use super::text::{clean_lines, counted};
use super::{CONFIG, DONE, FAILED, USAGE, read_config, say, say_problems, scope, show};
use crate::base::ids::{AccountId, BotId};
use crate::base::text::clean_json;
use crate::base::toml_file::Problem;
use crate::broker::BrokerError;
use crate::config::load::{Source, rules, rules_or_empty};
use crate::kucoin::catalog::Status;
use crate::kucoin::{Endpoint, Method, RequestLimits, Scope, request};
use crate::policy::explain::{Allowed, Explanation, Refused};
use crate::policy::listing::{Item, differences};
use crate::policy::{ClientOidRule, Policy};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check a rules file: report every problem with its line, and warn about likely mistakes.
    ///
    /// Exit code 0: no problems (warnings are possible); 2: problems found, or the file cannot be read.
    #[command(after_long_help = "Example:\n  credbroker policy check /etc/credbroker/rules.toml")]
    Check {
        /// Rules file.
        file: PathBuf,
    },
    /// Compare two rules files: show which bot gains or loses which endpoint on which account.
    ///
    /// Compares what the rules allow, as `policy show` lists it, and not their text. `+` is a gain, `-` a loss, `~` a changed
    /// account setting; endpoints that move money are marked. Exit code 0: compared; 1: with --exit-code, if something
    /// changes; 2: a file cannot be read or has problems.
    #[command(
        after_long_help = "Example, before you replace the rules:\n  credbroker policy diff /etc/credbroker/rules.toml rules.new.toml\n\n\
                           With --json: one object per line:\n  {\"change\":\"gain\",\"bot\":…,\"account\":…,\"scope\":…,\"endpoint\":…,\"risk\":…,\"moves_money\":…}\n  \
                           {\"change\":\"setting\",\"account\":…,\"setting\":…,\"old\":…,\"new\":…}"
    )]
    Diff {
        /// Current rules file.
        old: PathBuf,
        /// New rules file.
        new: PathBuf,
        /// Print one JSON object per line.
        #[arg(long)]
        json: bool,
        /// Exit with code 1 if something changes.
        #[arg(long)]
        exit_code: bool,
    },
    /// Show whether a bot may send a request, and which lines of the rules allow it.
    ///
    /// Exit code 0: allowed; 1: refused; 2: usage error, or invalid configuration or rules.
    #[command(
        after_long_help = "Example:\n  credbroker policy explain --rules /etc/credbroker/rules.toml \\\n    \
                           --bot spiffe://example.org/bot/maker --account main \\\n    --scope spot-margin POST /api/v1/hf/orders"
    )]
    Explain(ExplainOptions),
    /// List what a rules file allows: one line per bot, account, scope and endpoint, and one per account setting.
    ///
    /// Lines are sorted; endpoints that move money are marked. Exit code 0: listed; 2: the file cannot be read or has
    /// problems.
    #[command(
        after_long_help = "Example, everything that moves money:\n  credbroker policy show /etc/credbroker/rules.toml | grep MONEY\n\n\
                           With --json: one object per line:\n  {\"account\":…,\"setting\":…,\"value\":…}\n  \
                           {\"bot\":…,\"account\":…,\"scope\":…,\"endpoint\":…,\"risk\":…,\"moves_money\":…}"
    )]
    Show {
        /// Rules file.
        file: PathBuf,
        /// Print one JSON object per line.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args, Debug)]
pub(super) struct ExplainOptions {
    /// Configuration file, which names the rules file and sets the limits of requests.
    #[arg(long, default_value = CONFIG)]
    config: PathBuf,
    /// Rules file, instead of the one that the configuration names.
    #[arg(long, conflicts_with = "config")]
    rules: Option<PathBuf>,
    /// Bot, as named in its certificate.
    #[arg(long)]
    bot: BotId,
    /// Account, as named in the rules.
    #[arg(long)]
    account: AccountId,
    /// Scope: futures, spot-margin or unified.
    #[arg(long, value_parser = scope)]
    scope: Scope,
    /// Method: DELETE, GET or POST.
    #[arg(value_parser = method)]
    method: Method,
    /// Path without query, such as /api/v1/accounts.
    path: String,
}

fn method(text: &str) -> Result<Method, &'static str> {
    let named = |method: &Method| method.as_str().eq_ignore_ascii_case(text);
    let expected = "expected DELETE, GET or POST";
    let all = [Method::Delete, Method::Get, Method::Post];
    all.into_iter().find(named).ok_or(expected)
}

pub(super) fn run(command: &Command) -> u8 {
    let result = match command {
        Command::Check { file } => check(file),
        Command::Diff {
            old,
            new,
            json,
            exit_code,
        } => diff(old, new, *json, *exit_code),
        Command::Explain(options) => explain(options),
        Command::Show { file, json } => list(file, *json),
    };
    result.unwrap_or_else(|problems| {
        say_problems(&problems, "re-run the command");
        USAGE
    })
}

fn check(file: &Path) -> Result<u8, Vec<Problem>> {
    let policy = rules(&Source::read(file))?;
    let mut warnings = policy.warnings();
    warnings.extend(policy.warnings_of_master_keys());
    warnings.sort_unstable();
    for warning in warnings {
        say(&format!("warning: {}", warning.in_file(file)));
    }
    let (bots, grants) = policy.counts();
    let accounts = policy.accounts().count();
    Ok(show(
        &format!(
            "{}: no problems; {}, {}, {}\n",
            file.display(),
            counted(accounts, "account"),
            counted(bots, "bot"),
            counted(grants, "grant")
        ),
        DONE,
    ))
}

fn diff(old: &Path, new: &Path, json: bool, exit_code: bool) -> Result<u8, Vec<Problem>> {
    let (old, new) = match (
        rules_or_empty(&Source::read(old)),
        rules_or_empty(&Source::read(new)),
    ) {
        (Ok(old), Ok(new)) => (old, new),
        (old, new) => {
            let problems = [old, new].into_iter().filter_map(Result::err);
            return Err(problems.flatten().collect());
        }
    };
    let changes = differences(&old.listing(), &new.listing());
    let is_permission = |item: &Item| matches!(item, Item::Permission { .. });
    let permissions = changes.iter().filter(|change| is_permission(&change.item));
    let (gained, lost): (Vec<_>, Vec<_>) = permissions.partition(|change| change.new.is_some());
    say(&format!(
        "{} gained, {} lost, {} changed",
        counted(gained.len(), "permission"),
        lost.len(),
        counted(changes.len() - gained.len() - lost.len(), "setting")
    ));
    let lines = changes.iter().map(|change| {
        if json {
            json_line(&change.to_json())
        } else {
            clean_lines(&format!("{change}\n"))
        }
    });
    let differs = exit_code && !changes.is_empty();
    Ok(show(
        &lines.collect::<String>(),
        if differs { FAILED } else { DONE },
    ))
}

fn list(file: &Path, json: bool) -> Result<u8, Vec<Problem>> {
    let policy = rules_or_empty(&Source::read(file))?;
    let listing = policy.listing();
    let lines = listing.iter().map(|(item, value)| {
        if json {
            json_line(&item.to_json(value))
        } else {
            clean_lines(&(item.line(value) + "\n"))
        }
    });
    Ok(show(&lines.collect::<String>(), DONE))
}

fn json_line(object: &Value) -> String {
    clean_json(&object.to_string()).into_owned() + "\n"
}

fn explain(options: &ExplainOptions) -> Result<u8, Vec<Problem>> {
    let ExplainOptions {
        config,
        rules: file,
        bot,
        account,
        scope,
        method,
        path,
    } = options;
    let (file, limits) = if let Some(file) = file {
        (file.clone(), RequestLimits::default())
    } else {
        let config = read_config(config)?;
        (config.rules, config.request_limits)
    };
    let policy = rules(&Source::read(&file))?;
    // A malformed request is refused before the rules are checked, as in the broker.
    let mut problems = Vec::new();
    let Some(target) = request::target(path, Vec::new(), &limits, &mut problems) else {
        let error = BrokerError::Malformed(problems);
        return Ok(show(
            &clean_lines(&format!("refused: {}: {error}\n", error.reason())),
            FAILED,
        ));
    };
    let explanation = policy.explain(bot, account, *scope, *method, target.path());
    let (text, code) = explanation_text(&policy, &file, account, explanation);
    Ok(show(&clean_lines(&text), code))
}

fn explanation_text(
    policy: &Policy,
    file: &Path,
    account: &AccountId,
    explanation: Explanation,
) -> (String, u8) {
    let mut lines = Vec::new();
    let increases_risk = if explanation.increases_risk() {
        "yes"
    } else {
        "no"
    };
    let mut about = match explanation.endpoint {
        Some(endpoint) => vec![
            format!("endpoint: {}", endpoint.id),
            format!("risk: {}", endpoint.risk.as_str()),
        ],
        None => vec![
            "endpoint: not in the catalogue".to_owned(),
            "risk: unknown".to_owned(),
        ],
    };
    if explanation
        .endpoint
        .is_some_and(|endpoint| endpoint.status == Status::Undocumented)
    {
        about.push("status: undocumented; can be granted only by its id".to_owned());
    }
    if explanation.endpoint.is_some_and(Endpoint::lacks_lookup) {
        about.push("lookup: none; can be granted only by its id".to_owned());
    }
    let at = |rule: &crate::policy::Rule| format!("{}:{}: {rule}", file.display(), rule.line);
    let code = match explanation.verdict {
        Ok(Allowed {
            by,
            key,
            client_oid,
            max_wait,
        }) => {
            lines.push("allowed".to_owned());
            lines.extend(by.into_iter().map(at));
            lines.extend(about);
            lines.push(format!("risk-increasing: {increases_risk}"));
            let key = key.map_or("none (the request is not signed)".to_owned(), |key| {
                format!("{account}/{key}")
            });
            lines.push(format!("key: {key}"));
            lines.extend(client_oid.map(|rule| match rule {
                ClientOidRule::Optional => "clientOid: optional".to_owned(),
                ClientOidRule::Required => {
                    "clientOid: required, unless client_oid = \"optional\" in the grant".to_owned()
                }
            }));
            lines.extend(max_wait.map(|wait| format!("max_wait_ms: {}", wait.as_millis())));
            let site = policy.accounts().find(|entry| entry.id == *account);
            lines.extend(site.map(|entry| format!("site: {}", entry.site)));
            DONE
        }
        Err(Refused { why, advice, has }) => {
            let error = BrokerError::from(why);
            lines.push(format!("refused: {}: {error}", error.reason()));
            lines.extend(about);
            lines.push(format!("risk-increasing: {increases_risk}"));
            lines.extend(advice);
            if !has.is_empty() {
                lines.push("grants of this bot on this account in this scope:".to_owned());
                lines.extend(has.into_iter().map(at));
            }
            FAILED
        }
    };
    (lines.join("\n") + "\n", code)
}
