//! Confirmation of commands that affect more than one account or one key.

use std::io::{self, BufRead, IsTerminal, Write};

use super::text::paragraph;
use super::{FAILED, USAGE, say};

/// Asks for confirmation. `effect` describes what the command does, and follows "This command".
///
/// # Errors
/// With the exit code, after printing the reason: not confirmed, or stdin or stderr (which shows the prompt) is not a
/// terminal.
pub(super) fn confirm(effect: &str, is_confirmed: bool) -> Result<(), u8> {
    if is_confirmed {
        return Ok(());
    }
    let terminals = [
        ("stdin", io::stdin().is_terminal()),
        ("stderr", io::stderr().is_terminal()),
    ];
    if let Some((stream, _)) = terminals.iter().find(|(_, is_terminal)| !is_terminal) {
        let why = format!(
            "confirmation required, but {stream} is not a terminal; nothing was done. This command {effect}."
        );
        say((paragraph("", &why) + "fix: add --yes").trim_end());
        return Err(USAGE);
    }
    if ask(io::stdin().lock(), io::stderr(), effect) {
        return Ok(());
    }
    say("not confirmed; nothing was done");
    Err(FAILED)
}

fn ask(mut input: impl BufRead, mut terminal: impl Write, effect: &str) -> bool {
    let effect = paragraph("", &format!("This command {effect}."));
    let mut line = String::new();
    // If the terminal cannot be written or read, the command is not confirmed.
    let prompted = write!(terminal, "{effect}Continue? Type yes: ").and_then(|()| terminal.flush());
    let read = prompted.and_then(|()| input.read_line(&mut line));
    read.is_ok() && line.trim() == "yes"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_line_with_exactly_yes_confirms() {
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
            let is_confirmed = ask(answer.as_bytes(), &mut terminal, "ends every halt");
            assert_eq!(is_confirmed, confirms, "{answer:?}");
            assert_eq!(
                terminal,
                b"This command ends every halt.\nContinue? Type yes: "
            );
        }
    }
}
