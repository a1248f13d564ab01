//! Asks an admin before a command that reaches further than one account or one key.

use std::io::{self, BufRead, IsTerminal, Write};

use super::text::paragraph;
use super::{FAILED, USAGE, say};

/// Asks whether to go on. `what` says what the command does, in words that follow "This command".
///
/// # Errors
/// With the exit code, after saying why: nobody confirmed it, or nobody can: stdin is no terminal, or stderr is none, which
/// shows the question.
pub(super) fn confirm(what: &str, is_confirmed: bool) -> Result<(), u8> {
    if is_confirmed {
        return Ok(());
    }
    let terminals = [
        ("stdin", io::stdin().is_terminal()),
        ("stderr", io::stderr().is_terminal()),
    ];
    if let Some((stream, _)) = terminals.iter().find(|(_, is_terminal)| !is_terminal) {
        let why = format!(
            "confirmation needed, but {stream} is not a terminal; nothing was done. This command {what}."
        );
        say((paragraph("", &why) + "fix: add --yes").trim_end());
        return Err(USAGE);
    }
    if ask(io::stdin().lock(), io::stderr(), what) {
        return Ok(());
    }
    say("not confirmed; nothing was done");
    Err(FAILED)
}

fn ask(mut answers: impl BufRead, mut terminal: impl Write, what: &str) -> bool {
    let question = paragraph("", &format!("This command {what}."));
    let mut answer = String::new();
    // A terminal that cannot be written or read confirms nothing.
    let asked = write!(terminal, "{question}Go on? Type yes: ").and_then(|()| terminal.flush());
    let answered = asked.and_then(|()| answers.read_line(&mut answer));
    answered.is_ok() && answer.trim() == "yes"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_word_yes_confirms() {
        for (answer, confirms) in [
            ("yes\n", true),
            (" yes \r\n", true),
            ("y\n", false),
            ("\n", false),
            ("", false),
            ("no\nyes\n", false),
            ("yes, please\n", false),
        ] {
            let mut terminal = Vec::new();
            let asked = ask(answer.as_bytes(), &mut terminal, "ends every halt");
            assert_eq!(asked, confirms, "{answer:?}");
            assert_eq!(
                terminal,
                b"This command ends every halt.\nGo on? Type yes: "
            );
        }
    }
}
