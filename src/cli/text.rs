//! Text output of commands: 80 columns, wrapped between words; colour adds no information.
//!
//! The width is fixed: output of 80 columns fits everywhere, can be pasted anywhere, and is the same in tests.

use std::ffi::OsStr;
use std::io::{self, IsTerminal};

use crate::base::diagnosis::Severity;
use crate::base::text::clean;

/// Columns per line.
pub(crate) const WIDTH: usize = 80;

/// Columns between two columns of a table.
const GAP: usize = 2;

/// The minimum width of the last column of a table.
const MIN_WIDTH: usize = 20;

/// The ANSI escape for the colour of `severity`.
fn colour(severity: Severity) -> &'static str {
    match severity {
        Severity::Failed => "\x1b[31m",
        Severity::Ok => "\x1b[32m",
        Severity::Warning => "\x1b[33m",
    }
}

/// One field of a table.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cell {
    text: String,
    severity: Option<Severity>,
}

impl Cell {
    /// A word in the colour of `severity`.
    pub(crate) fn of(severity: Severity, text: impl Into<String>) -> Self {
        Self {
            severity: Some(severity),
            ..text.into().into()
        }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        // Cleaned before colour is added, so that the text cannot contain escapes of its own.
        let text = clean(&text, usize::MAX).into_owned();
        Self {
            text,
            severity: None,
        }
    }
}

/// How output is formatted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    colour: bool,
}

impl Style {
    /// The style for stdout: in colour if that is a terminal that supports it.
    ///
    /// `NO_COLOR` and `TERM` are read here and not in the configuration: they describe the terminal.
    pub(crate) fn of_stdout() -> Self {
        let (no_color, term) = (std::env::var_os("NO_COLOR"), std::env::var_os("TERM"));
        Self {
            colour: use_colour(
                io::stdout().is_terminal(),
                no_color.as_deref(),
                term.as_deref(),
            ),
        }
    }

    /// Without colour.
    #[cfg(test)]
    pub(crate) fn plain() -> Self {
        Self { colour: false }
    }

    /// `text` in the colour of `severity`.
    pub(crate) fn coloured(self, severity: Severity, text: &str) -> String {
        if self.colour {
            format!("{}{text}\x1b[0m", colour(severity))
        } else {
            text.to_owned()
        }
    }

    /// Aligns rows in columns. The first columns are as wide as needed; the last one is wrapped.
    pub(crate) fn table(self, rows: &[Vec<Cell>]) -> String {
        let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| columns_of(&cell.text)).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns.saturating_sub(1)).map(width).collect();
        let indent: usize = widths.iter().map(|width| width + GAP).sum();
        let mut table = String::new();
        for row in rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let pad = width - columns_of(&cell.text) + GAP;
                line += &self.cell(cell, &cell.text);
                line += &" ".repeat(pad);
            }
            if let Some(last) = row.get(widths.len()) {
                let lines = wrap(&last.text, WIDTH.saturating_sub(indent).max(MIN_WIDTH));
                let lines: Vec<_> = lines.iter().map(|text| self.cell(last, text)).collect();
                line += &lines.join(&format!("\n{}", " ".repeat(indent)));
            }
            table += line.trim_end();
            table.push('\n');
        }
        table
    }

    fn cell(self, cell: &Cell, text: &str) -> String {
        match cell.severity {
            Some(severity) => self.coloured(severity, text),
            None => text.to_owned(),
        }
    }
}

/// `text` after `label`, wrapped; further lines are indented to the beginning of the text.
pub(crate) fn paragraph(label: &str, text: &str) -> String {
    let indent = columns_of(label);
    let lines = wrap(
        &clean(text, usize::MAX),
        WIDTH.saturating_sub(indent).max(MIN_WIDTH),
    );
    let lines = lines.join(&format!("\n{}", " ".repeat(indent)));
    format!("{label}{lines}").trim_end().to_owned() + "\n"
}

/// Cleans each line of a text that may come from outside.
pub(crate) fn clean_lines(text: &str) -> String {
    let lines: Vec<_> = text
        .split('\n')
        .map(|line| clean(line, usize::MAX))
        .collect();
    lines.join("\n")
}

/// A number with its noun, such as "1 account" and "2 accounts".
pub(crate) fn counted(number: usize, thing: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {thing}{plural}")
}

/// Wraps between words. A word wider than `width` is not split, so that it can be copied.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && columns_of(&line) + 1 + columns_of(word) > width {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line += word;
    }
    lines.push(line);
    lines
}

/// The width of `text`; messages of this program have no wide or combining characters.
fn columns_of(text: &str) -> usize {
    text.chars().count()
}

/// Sources: no-color.org (set and not empty), and the terminfo name of terminals without colour.
fn use_colour(is_terminal: bool, no_color: Option<&OsStr>, term: Option<&OsStr>) -> bool {
    is_terminal && no_color.is_none_or(OsStr::is_empty) && term.is_none_or(|term| term != "dumb")
}

/// A duration in words, such as "2 min ago".
pub(crate) fn ago(ms: i64) -> String {
    let s = ms.max(0) / 1000;
    match s {
        0..120 => format!("{s} s ago"),
        120..7200 => format!("{} min ago", s / 60),
        7200..172_800 => format!("{} h ago", s / 3600),
        _ => format!("{} days ago", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraph_wraps_between_words_and_is_indented_to_its_label() {
        let text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen";
        assert_eq!(
            paragraph("fix: ", text),
            "fix: one two three four five six seven eight nine ten eleven twelve thirteen\n     fourteen fifteen\n"
        );
        let long = "x".repeat(100);
        assert_eq!(
            paragraph("", &format!("a {long} b")),
            format!("a\n{long}\nb\n")
        );
        assert_eq!(paragraph("- ", ""), "-\n");
        let two = |first: usize| format!("{} {}", "a".repeat(first), "b".repeat(40));
        assert_eq!(paragraph("", &two(39)), two(39) + "\n");
        assert_eq!(paragraph("", &two(40)), two(40).replace(' ', "\n") + "\n");
        let full = "y".repeat(78);
        assert_eq!(paragraph("- ", &full), format!("- {full}\n"));
    }

    #[test]
    fn counted_noun_is_plural_unless_there_is_one() {
        let texts = [0, 1, 2].map(|number| counted(number, "account"));
        assert_eq!(texts, ["0 accounts", "1 account", "2 accounts"]);
    }

    #[test]
    fn table_is_aligned_in_columns_and_fits_80_columns() {
        let style = Style::plain();
        let words = "word ".repeat(30);
        let table = style.table(&[
            vec!["account".into(), "status".into(), "why".into()],
            vec![
                "main".into(),
                Cell::of(Severity::Failed, "unavailable"),
                words.into(),
            ],
            vec!["other".into()],
        ]);
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines[0], "account  status       why");
        assert!(
            lines[1].starts_with("main     unavailable  word word"),
            "{table}"
        );
        assert!(
            lines[2].starts_with("                      word"),
            "{table}"
        );
        assert_eq!(lines.last().unwrap(), &"other");
        assert!(lines.iter().all(|line| line.len() <= 80), "{table}");
        assert_eq!(style.table(&[]), "");
    }

    #[test]
    fn colour_does_not_change_the_alignment() {
        let rows = [
            vec![Cell::of(Severity::Failed, "failed"), "a".into()],
            vec![Cell::of(Severity::Ok, "ok"), "b".into()],
        ];
        let coloured = Style { colour: true }.table(&rows);
        assert_eq!(
            coloured,
            "\x1b[31mfailed\x1b[0m  a\n\x1b[32mok\x1b[0m      b\n"
        );
        assert_eq!(Style::plain().table(&rows), "failed  a\nok      b\n");
        assert_eq!(
            Style::plain().coloured(Severity::Warning, Severity::Warning.as_str()),
            "warning"
        );
    }

    #[test]
    fn colour_is_used_only_on_terminals_that_support_it() {
        let is_coloured = |is_terminal, no_color: Option<&str>, term: Option<&str>| {
            use_colour(is_terminal, no_color.map(OsStr::new), term.map(OsStr::new))
        };
        assert!(is_coloured(true, None, Some("xterm")));
        assert!(is_coloured(true, Some(""), None));
        assert!(!is_coloured(true, Some("1"), Some("xterm")));
        assert!(!is_coloured(true, None, Some("dumb")));
        assert!(!is_coloured(false, None, Some("xterm")));
    }

    #[test]
    fn ages_have_a_fitting_unit() {
        let cases = [
            (-5, "0 s"),
            (119_999, "119 s"),
            (120_000, "2 min"),
            (7_200_000, "2 h"),
            (172_800_000, "2 days"),
        ];
        for (ms, expected) in cases {
            assert_eq!(ago(ms), format!("{expected} ago"));
        }
    }
}
