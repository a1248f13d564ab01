//! `credbroker halt` and `resume`: the emergency stop, and its end.

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

/// Beside the time that the broker gives itself for the orders.
const SLACK: Duration = Duration::from_secs(30);

/// Whose orders are meant.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("whose").required(true).args(["account", "all"])))]
struct Whose {
    /// The account, as the rules file names it.
    account: Option<String>,
    /// Every account, also those that the rules name later.
    #[arg(long)]
    all: bool,
    /// How to reach the broker.
    #[arg(long, default_value = ADMIN)]
    admin: PathBuf,
}

#[derive(Args, Debug)]
pub(super) struct Halt {
    #[command(flatten)]
    whose: Whose,
    /// Cancels every open order too, and looks what is still open.
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

    /// As the command line has it.
    fn word(&self) -> &str {
        self.account.as_deref().unwrap_or("--all")
    }

    fn name(&self) -> String {
        match &self.account {
            Some(account) => format!("account {account}"),
            None => "every account".to_owned(),
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
    let mut text = paragraph(
        "halted: ",
        &format!(
            "{name}, in force now. New risk is rejected (ACCOUNT_FROZEN); survives restarts. Cancels and reads still work."
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
        text += &paragraph("open: ", &left(cancelled));
    }
    if cancel_all && cancelled.is_empty() {
        let what =
            "the rules name no key for it: nothing was cancelled, and open orders are unknown";
        text += &paragraph("failed: ", what);
    }
    if !problem.is_empty() {
        text += &paragraph("failed: ", problem);
        code = FAILED;
    }
    let next = match (cancel_all, is_clear) {
        (true, true) => None,
        (true, false) => Some(
            "re-run the command to cancel what is left, or cancel it on KuCoin's site. `credbroker keys list` shows whether a key is the problem"
                .to_owned(),
        ),
        (false, _) => Some(format!(
            "open orders stay open: `credbroker halt {word} --cancel-all` cancels them"
        )),
    };
    if let Some(next) = next {
        text += &paragraph("next: ", &next);
    }
    text += &paragraph("undo: ", &format!("credbroker resume {word}"));
    (text, code)
}

/// What is left of all of it, since the report is longer than a screen.
fn left(cancelled: &[Cancelled]) -> String {
    let places = cancelled.iter().filter_map(|one| {
        let place = format!("{} in {}", one.account, scope(one));
        match one.still_open {
            Some(0) => None,
            Some(open) => Some(format!("{open} on {place}")),
            None => Some(format!("unknown on {place}")),
        }
    });
    let places: Vec<_> = places.collect();
    if places.is_empty() {
        "none".to_owned()
    } else {
        places.join(", ")
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

/// What is left of one account in one scope, and what was asked that did not go well. The rest is counted: a screen that is
/// full of good news hides the bad.
fn reported(one: &Cancelled, style: Style) -> String {
    let (level, left) = match one.still_open {
        Some(0) => (Severity::Ok, "none open".to_owned()),
        Some(open) => (Severity::Failed, format!("{open} still open")),
        None => (Severity::Failed, "open orders unknown".to_owned()),
    };
    let left = style.coloured(level, &left);
    let mut text = format!("{} in {}: {left}\n", one.account, scope(one));
    let mut row = |level: Severity, told: &str| {
        let (told, word) = (paragraph("           ", told), level.as_str());
        // Put in afterwards: colour takes no columns.
        let shown = style.coloured(level, word) + &" ".repeat(9 - word.len());
        text += &["  ", &shown, told.trim_start()].concat();
    };
    let (good, bad): (Vec<_>, Vec<_>) = one.probes.iter().partition(|probe| probe.is_ok);
    if !good.is_empty() {
        let told = format!("{}: taken, or none open", counted(good.len(), "request"));
        row(Severity::Ok, &told);
    }
    let level = if one.still_open == Some(0) {
        Severity::Warning
    } else {
        Severity::Failed
    };
    for probe in bad {
        row(
            level,
            &printable(&format!("{}: {}", probe.question, probe.answer)),
        );
    }
    text
}

pub(super) fn resume(command: &Resume) -> u8 {
    let Resume { whose, yes } = command;
    let what = "lifts the halt of all accounts; those that are halted by name stay halted";
    if whose.all
        && let Err(code) = confirm(what, *yes)
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
        (true, true) => paragraph("resumed: ", "the halt of all accounts is lifted."),
        (true, false) => paragraph("resumed: ", &format!("{name}, in force now.")),
        (false, true) => paragraph("unchanged: ", "there was no halt of all accounts."),
        (false, false) => {
            let what = format!("{name} was not halted by its name.");
            paragraph("unchanged: ", &what)
        }
    };
    let accounts = still_halted.join(", ");
    let but = if *is_all_halted {
        "all accounts are still halted: `credbroker resume --all` lifts it.".to_owned()
    } else if !accounts.is_empty() {
        format!("still halted by name: {accounts}. `credbroker resume ACCOUNT` lifts one.")
    } else {
        return text;
    };
    text += &paragraph("but: ", &but);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Probe;

    fn whose(account: Option<&str>) -> Whose {
        Whose {
            account: account.map(ToOwned::to_owned),
            all: account.is_none(),
            admin: PathBuf::new(),
        }
    }

    fn cancelled(still_open: Option<u64>) -> Cancelled {
        let probe = |question: &str, is_ok, answer: &str| Probe {
            question: question.to_owned(),
            is_ok,
            answer: answer.to_owned(),
        };
        Cancelled {
            account: "main".to_owned(),
            scope: Scope::SpotMargin.into(),
            probes: vec![
                probe(
                    "DELETE /api/v1/stop-order/cancel tradeType=TRADE",
                    true,
                    "taken",
                ),
                probe(
                    "GET /api/v3/hf/margin/orders/active tradeType=MARGIN_ISOLATED_TRADE",
                    false,
                    "not known: no \u{1b}answer came",
                ),
            ],
            still_open,
        }
    }

    #[test]
    fn a_report_says_what_is_left_and_what_to_do_and_fits_a_terminal() {
        let cases = [
            (Some(0), "none open", "warning", DONE),
            (Some(3), "3 still open", "failed", FAILED),
            (None, "open orders unknown", "failed", FAILED),
        ];
        for (still_open, left, word, code) in cases {
            let response = HaltResponse {
                cancelled: vec![cancelled(still_open)],
                problem: String::new(),
            };
            let (text, ended) = halted(&whose(None), true, &response, Style::plain());
            let expected = format!(
                "\n\nmain in spot-margin: {left}\n  ok       1 request: taken, or none open\n  \
                 {word:<9}GET /api/v3/hf/margin/orders/active tradeType=MARGIN_ISOLATED_TRADE:\n           \
                 not known: no \\u{{1b}}answer came\n\n"
            );
            assert!(text.contains(&expected), "{text}");
            let open = match still_open {
                Some(0) => "none",
                Some(_) => "3 on main in spot-margin",
                None => "unknown on main in spot-margin",
            };
            assert!(text.contains(&format!("\nopen: {open}\n")), "{text}");
            assert_eq!(text.contains("\nnext: "), code == FAILED, "{text}");
            assert!(text.ends_with("undo: credbroker resume --all\n"), "{text}");
            assert!(
                text.lines().all(|line| line.chars().count() <= 80),
                "{text}"
            );
            assert_eq!(ended, code);
        }
    }

    #[test]
    fn resume_says_what_it_lifted_and_which_halts_remain() {
        let said = |account, was_halted, is_all_halted, still_halted: &[&str]| {
            let response = ResumeResponse {
                still_halted: still_halted.iter().map(ToString::to_string).collect(),
                was_halted,
                is_all_halted,
            };
            resumed(&whose(account), &response)
        };
        assert_eq!(
            said(Some("main"), true, false, &[]),
            "resumed: account main, in force now.\n"
        );
        assert_eq!(
            said(Some("main"), false, true, &["main"]),
            "unchanged: account main was not halted by its name.\n\
             but: all accounts are still halted: `credbroker resume --all` lifts it.\n"
        );
        assert_eq!(
            said(None, true, false, &["main", "other"]),
            "resumed: the halt of all accounts is lifted.\n\
             but: still halted by name: main, other. `credbroker resume ACCOUNT` lifts one.\n"
        );
        assert_eq!(
            said(None, false, false, &[]),
            "unchanged: there was no halt of all accounts.\n"
        );
    }

    #[test]
    fn what_is_not_on_disk_or_was_not_looked_at_is_a_failure() {
        let unwritten = HaltResponse {
            cancelled: vec![cancelled(Some(0))],
            problem: "it is in force, but not on disk".to_owned(),
        };
        let (text, code) = halted(&whose(Some("main")), true, &unwritten, Style::plain());
        assert!(
            text.contains("\nfailed: it is in force, but not on disk\n"),
            "{text}"
        );
        assert_eq!(code, FAILED);
        let none = HaltResponse::default();
        let (text, code) = halted(&whose(Some("main")), true, &none, Style::plain());
        assert!(text.contains("the rules name no key for it"), "{text}");
        assert_eq!(code, FAILED);
        let (text, code) = halted(&whose(Some("main")), false, &none, Style::plain());
        assert!(
            text.contains("`credbroker halt main --cancel-all`"),
            "{text}"
        );
        assert_eq!(code, DONE);
    }
}
