//! `credbroker halt` and `resume`: start and end of an emergency stop.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args};

use super::admin::{self, ADMIN, Client};
use super::confirm::confirm;
use super::text::{Style, counted, paragraph};
use super::{DECIDE_WITHIN, DONE, FAILED, printable, show};
use crate::base::diagnosis::Severity;
use crate::ops::cancel_all::WITHIN;
use crate::proto::{Cancelled, HaltRequest, HaltResponse, ResumeRequest, ResumeResponse, Scope};

/// Added to the broker's own time limit for cancelling orders.
const SLACK: Duration = Duration::from_secs(30);

/// One account, or all.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("whose").required(true).args(["account", "all"])))]
struct Whose {
    /// Account, as named in the rules.
    account: Option<String>,
    /// All accounts, including those added to the rules later.
    #[arg(long)]
    all: bool,
    /// Path of admin.toml, which has the address of the broker.
    #[arg(long, default_value = ADMIN)]
    admin: PathBuf,
}

#[derive(Args, Debug)]
pub(super) struct Halt {
    #[command(flatten)]
    whose: Whose,
    /// Also cancel every open order, and report orders that are still open.
    #[arg(long)]
    cancel_all: bool,
}

#[derive(Args, Debug)]
pub(super) struct Resume {
    #[command(flatten)]
    whose: Whose,
    /// Skip the confirmation of --all.
    #[arg(long)]
    yes: bool,
}

impl Whose {
    fn account(&self) -> String {
        self.account.clone().unwrap_or_default()
    }

    /// The argument on the command line.
    fn word(&self) -> &str {
        self.account.as_deref().unwrap_or("--all")
    }

    fn name(&self) -> String {
        match &self.account {
            Some(account) => format!("account {account}"),
            None => "all accounts".to_owned(),
        }
    }
}

pub(super) fn halt(command: &Halt) -> u8 {
    let Halt { whose, cancel_all } = command;
    admin::run(&whose.admin, async |mut admin| {
        let request = HaltRequest {
            account: whose.account(),
            all: whose.all,
            cancel_all: *cancel_all,
        };
        let within = if *cancel_all {
            WITHIN + SLACK
        } else {
            DECIDE_WITHIN
        };
        let halt = async |client: &mut Client, request| client.halt(request).await;
        let response = admin.ask(within, request, halt).await?;
        let (text, code) = halted(whose, *cancel_all, &response, Style::of_stdout());
        Ok(show(&text, code))
    })
}

fn halted(whose: &Whose, cancel_all: bool, response: &HaltResponse, style: Style) -> (String, u8) {
    let HaltResponse { cancelled, problem } = response;
    let (name, word) = (whose.name(), whose.word());
    let lasting = if problem.is_empty() {
        "; the halt survives restarts"
    } else {
        ""
    };
    let mut text = paragraph(
        "halted: ",
        &format!(
            "{name}. Risk-increasing requests are refused (ACCOUNT_FROZEN){lasting}. Cancels and reads still work."
        ),
    );
    let is_clear = !cancelled.is_empty() && cancelled.iter().all(|one| one.still_open == Some(0));
    let mut code = if is_clear || !cancel_all {
        DONE
    } else {
        FAILED
    };
    if !cancelled.is_empty() {
        text.push('\n');
    }
    for one in cancelled {
        text += &reported(one, style);
    }
    if !cancelled.is_empty() {
        text += "\n";
        text += &paragraph("open orders: ", &summary(cancelled));
    }
    if cancel_all && cancelled.is_empty() {
        let detail = "no key in the rules to cancel with: nothing was cancelled, and open orders are unknown";
        text += &paragraph("failed: ", detail);
    }
    if !problem.is_empty() {
        text += &paragraph("failed: ", problem);
        code = FAILED;
    }
    let next = match (cancel_all, is_clear) {
        (true, true) => None,
        (true, false) => Some(
            "re-run the command to cancel the remaining orders, or cancel them on KuCoin's site; run `credbroker keys list` to check the keys"
                .to_owned(),
        ),
        (false, _) => Some(format!(
            "open orders stay open; run `credbroker halt {word} --cancel-all` to cancel them"
        )),
    };
    if let Some(next) = next {
        text += &paragraph("next: ", &next);
    }
    text += &paragraph("undo: ", &format!("credbroker resume {word}"));
    (text, code)
}

/// The open orders of all accounts and scopes, since the report can be longer than a screen.
fn summary(cancelled: &[Cancelled]) -> String {
    let open = cancelled.iter().filter_map(|one| {
        let place = format!("{} in {}", one.account, scope(one));
        match one.still_open {
            Some(0) => None,
            Some(open) => Some(format!("{open} on {place}")),
            None => Some(format!("unknown on {place}")),
        }
    });
    let open: Vec<_> = open.collect();
    if open.is_empty() {
        "none".to_owned()
    } else {
        open.join(", ")
    }
}

fn scope(one: &Cancelled) -> &'static str {
    match one.scope() {
        Scope::Futures => "futures",
        Scope::SpotMargin => "spot-margin",
        Scope::Unified => "unified",
        Scope::Unspecified => "unknown",
    }
}

/// The open orders of one account in one scope, and each failed request. Successful requests are only counted, so that the
/// failures are easy to see.
fn reported(one: &Cancelled, style: Style) -> String {
    let (level, open) = match one.still_open {
        Some(0) => (Severity::Ok, "no open orders".to_owned()),
        Some(open) => (Severity::Failed, format!("{open} still open")),
        None => (Severity::Failed, "open orders unknown".to_owned()),
    };
    let open = style.coloured(level, &open);
    let mut text = format!("{} in {}: {open}\n", one.account, scope(one));
    let mut row = |level: Severity, detail: &str| {
        let (detail, word) = (paragraph("           ", detail), level.as_str());
        // Added after wrapping, because colour codes take no columns.
        let shown = style.coloured(level, word) + &" ".repeat(9 - word.len());
        text += &["  ", &shown, detail.trim_start()].concat();
    };
    let (good, bad): (Vec<_>, Vec<_>) = one.requests.iter().partition(|one| one.is_ok);
    if !good.is_empty() {
        let detail = format!("{} succeeded", counted(good.len(), "request"));
        row(Severity::Ok, &detail);
    }
    let level = if one.still_open == Some(0) {
        Severity::Warning
    } else {
        Severity::Failed
    };
    for result in bad {
        row(
            level,
            &printable(&format!("{}: {}", result.request, result.result)),
        );
    }
    text
}

pub(super) fn resume(command: &Resume) -> u8 {
    let Resume { whose, yes } = command;
    let detail = "lifts the halt set with `halt --all`; accounts that were also halted individually stay halted";
    if whose.all
        && let Err(code) = confirm(detail, *yes)
    {
        return code;
    }
    admin::run(&whose.admin, async |mut admin| {
        let request = ResumeRequest {
            account: whose.account(),
            all: whose.all,
        };
        let resume = async |client: &mut Client, request| client.resume(request).await;
        let response = admin.ask(DECIDE_WITHIN, request, resume).await?;
        Ok(show(&resumed(whose, &response), DONE))
    })
}

fn resumed(whose: &Whose, response: &ResumeResponse) -> String {
    let ResumeResponse {
        still_halted,
        was_halted,
        is_all_halted,
    } = response;
    let name = whose.name();
    let mut text = match (was_halted, whose.all) {
        (true, true) => paragraph("resumed: ", "the halt set with `halt --all` is lifted."),
        (true, false) => paragraph("resumed: ", &format!("the halt of {name} is lifted.")),
        (false, true) => paragraph("unchanged: ", "`halt --all` was not in effect."),
        (false, false) => {
            let detail = format!("{name} was not halted individually.");
            paragraph("unchanged: ", &detail)
        }
    };
    let accounts = still_halted.join(", ");
    let but = if *is_all_halted {
        "all accounts are still halted; run `credbroker resume --all` to lift that.".to_owned()
    } else if !accounts.is_empty() {
        format!("still halted individually: {accounts}; run `credbroker resume ACCOUNT` for each")
    } else {
        return text;
    };
    text += &paragraph("but: ", &but);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::RequestResult;

    fn whose(account: Option<&str>) -> Whose {
        Whose {
            account: account.map(ToOwned::to_owned),
            all: account.is_none(),
            admin: PathBuf::new(),
        }
    }

    fn cancelled(still_open: Option<u64>) -> Cancelled {
        let result = |request: &str, is_ok, result: &str| RequestResult {
            request: request.to_owned(),
            is_ok,
            result: result.to_owned(),
        };
        Cancelled {
            account: "main".to_owned(),
            scope: Scope::SpotMargin.into(),
            requests: vec![
                result(
                    "DELETE /api/v1/stop-order/cancel tradeType=TRADE",
                    true,
                    "accepted",
                ),
                result(
                    "GET /api/v3/hf/margin/orders/active tradeType=MARGIN_ISOLATED_TRADE",
                    false,
                    "unknown: no \u{1b}answer came",
                ),
            ],
            still_open,
        }
    }

    #[test]
    fn report_lists_open_orders_and_the_next_step_and_fits_a_terminal() {
        let cases = [
            (Some(0), "no open orders", "warning", DONE),
            (Some(3), "3 still open", "failed", FAILED),
            (None, "open orders unknown", "failed", FAILED),
        ];
        for (still_open, open_text, word, code) in cases {
            let response = HaltResponse {
                cancelled: vec![cancelled(still_open)],
                problem: String::new(),
            };
            let (text, exit_code) = halted(&whose(None), true, &response, Style::plain());
            let expected = format!(
                "\n\nmain in spot-margin: {open_text}\n  ok       1 request succeeded\n  \
                 {word:<9}GET /api/v3/hf/margin/orders/active tradeType=MARGIN_ISOLATED_TRADE:\n           \
                 unknown: no \\u{{1b}}answer came\n\n"
            );
            assert!(text.contains(&expected), "{text}");
            let open = match still_open {
                Some(0) => "none",
                Some(_) => "3 on main in spot-margin",
                None => "unknown on main in spot-margin",
            };
            assert!(text.contains(&format!("\nopen orders: {open}\n")), "{text}");
            assert_eq!(text.contains("\nnext: "), code == FAILED, "{text}");
            assert!(text.ends_with("undo: credbroker resume --all\n"), "{text}");
            assert!(
                text.lines().all(|line| line.chars().count() <= 80),
                "{text}"
            );
            assert_eq!(exit_code, code);
        }
    }

    #[test]
    fn resume_reports_what_it_lifted_and_which_halts_remain() {
        let output = |account, was_halted, is_all_halted, still_halted: &[&str]| {
            let response = ResumeResponse {
                still_halted: still_halted.iter().map(ToString::to_string).collect(),
                was_halted,
                is_all_halted,
            };
            resumed(&whose(account), &response)
        };
        assert_eq!(
            output(Some("main"), true, false, &[]),
            "resumed: the halt of account main is lifted.\n"
        );
        assert_eq!(
            output(Some("main"), false, true, &["main"]),
            "unchanged: account main was not halted individually.\n\
             but: all accounts are still halted; run `credbroker resume --all` to lift that.\n"
        );
        assert_eq!(
            output(None, true, false, &["main", "other"]),
            "resumed: the halt set with `halt --all` is lifted.\n\
             but: still halted individually: main, other; run `credbroker resume ACCOUNT` for\n     each\n"
        );
        assert_eq!(
            output(None, false, false, &[]),
            "unchanged: `halt --all` was not in effect.\n"
        );
    }

    #[test]
    fn halt_not_on_disk_or_unknown_open_orders_are_a_failure() {
        let unwritten = HaltResponse {
            cancelled: vec![cancelled(Some(0))],
            problem: "the change is in effect but not saved".to_owned(),
        };
        let (text, code) = halted(&whose(Some("main")), true, &unwritten, Style::plain());
        assert!(
            text.contains("\nfailed: the change is in effect but not saved\n"),
            "{text}"
        );
        assert_eq!(code, FAILED);
        let none = HaltResponse::default();
        let (text, code) = halted(&whose(Some("main")), true, &none, Style::plain());
        assert!(
            text.contains("no key in the rules to cancel with"),
            "{text}"
        );
        assert_eq!(code, FAILED);
        let (text, code) = halted(&whose(Some("main")), false, &none, Style::plain());
        assert!(
            text.contains("`credbroker halt main --cancel-all`"),
            "{text}"
        );
        assert_eq!(code, DONE);
    }
}
