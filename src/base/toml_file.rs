//! Reads a TOML document key by key and collects all problems with their lines, instead of stopping at the first.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use crate::base::text::clean;

/// A problem with a key.
#[expect(clippy::struct_field_names, reason = "`problem` is the message itself")]
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Problem {
    /// The file with the problem, if its name is known.
    pub(crate) file: Option<PathBuf>,
    /// The line, from 1, if it is known: that of the key, or of its table if the key is missing.
    pub(crate) line: Option<usize>,
    /// The full key, such as `egress.address`.
    pub key: String,
    /// What was expected, what was found and what to do.
    pub problem: String,
}

impl Problem {
    /// A problem without a known line.
    pub(crate) fn new(key: impl Into<String>, problem: impl fmt::Display) -> Self {
        Self {
            file: None,
            line: None,
            key: key.into(),
            problem: problem.to_string(),
        }
    }

    /// Sets the file.
    #[must_use]
    pub(crate) fn in_file(self, file: &Path) -> Self {
        Self {
            file: Some(file.to_owned()),
            ..self
        }
    }
}

/// `rules.toml:12: grant[0].bot: expected …`, a form that editors and terminals can open.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let location = match (&self.file, self.line) {
            (Some(file), Some(line)) => format!("{}:{line}: ", file.display()),
            (Some(file), None) => format!("{}: ", file.display()),
            (None, Some(line)) => format!("line {line}: "),
            (None, None) => String::new(),
        };
        // File names and keys may contain line breaks.
        let line = format!("{location}{}: {}", self.key, self.problem);
        f.write_str(&clean(&line, usize::MAX))
    }
}

/// All problems of a file, in the order in which they were found, and its warnings. A file with only warnings can be used.
#[derive(Clone, Debug, Default)]
pub(crate) struct Problems {
    problems: Rc<RefCell<Vec<Problem>>>,
    warnings: Rc<RefCell<Vec<Problem>>>,
}

impl Problems {
    /// Adds a problem without a known line.
    pub(crate) fn add(&self, key: impl Into<String>, problem: impl fmt::Display) {
        self.push(Problem::new(key, problem));
    }

    /// Adds a problem.
    pub(crate) fn push(&self, problem: Problem) {
        self.problems.borrow_mut().push(problem);
    }

    /// Adds a warning.
    pub(crate) fn warn(&self, key: impl Into<String>, problem: impl fmt::Display) {
        self.warnings.borrow_mut().push(Problem::new(key, problem));
    }

    /// Removes and returns the warnings.
    pub(crate) fn take_warnings(&self) -> Vec<Problem> {
        self.warnings.take()
    }

    /// `Ok` if there is no problem.
    pub(crate) fn into_result(self) -> Result<(), Vec<Problem>> {
        let problems = self.problems.take();
        if problems.is_empty() {
            Ok(())
        } else {
            Err(problems)
        }
    }
}

/// Byte positions of the line ends of a document.
#[derive(Debug)]
struct LineEnds(Vec<usize>);

impl LineEnds {
    fn of(text: &str) -> Rc<Self> {
        Rc::new(Self(text.match_indices('\n').map(|(at, _)| at).collect()))
    }

    /// The line, from 1, of this byte.
    fn line(&self, at: usize) -> usize {
        self.0.partition_point(|end| *end < at) + 1
    }
}

/// One table of the document. On drop, each key that was not read is reported as unknown.
#[derive(Debug)]
pub(crate) struct Section<'t> {
    name: String,
    table: DeTable<'t>,
    /// Line of the table, or of the nearest enclosing table that exists in the document.
    line: Option<usize>,
    /// Lines of its keys and of array elements such as `allow[1]`.
    lines: HashMap<String, usize>,
    ends: Rc<LineEnds>,
    known: Vec<&'static str>,
    problems: Problems,
}

impl<'t> Section<'t> {
    /// Parses a document; a syntax error is its only problem.
    pub(crate) fn parse(text: &'t str, file: &str, problems: &Problems) -> Option<Self> {
        let ends = LineEnds::of(text);
        match DeTable::parse(text) {
            Ok(table) => Some(Self::new(
                String::new(),
                table.into_inner(),
                None,
                &ends,
                problems,
            )),
            Err(error) => {
                problems.push(Problem {
                    line: error.span().map(|span| ends.line(span.start)),
                    ..Problem::new(file, format_args!("is not valid TOML: {}", error.message()))
                });
                None
            }
        }
    }

    fn new(
        name: String,
        table: DeTable<'t>,
        line: Option<usize>,
        ends: &Rc<LineEnds>,
        problems: &Problems,
    ) -> Self {
        let mut lines = HashMap::new();
        for (key, value) in &table {
            if let DeValue::Array(array) = value.get_ref() {
                for (index, element) in array.iter().enumerate() {
                    let line = ends.line(element.span().start);
                    lines.insert(format!("{}[{index}]", key.get_ref()), line);
                }
            }
            lines.insert(key.get_ref().to_string(), ends.line(key.span().start));
        }
        Self {
            name,
            table,
            line,
            lines,
            ends: Rc::clone(ends),
            known: Vec::new(),
            problems: problems.clone(),
        }
    }

    /// The full name of `key`.
    pub(crate) fn key(&self, key: &str) -> String {
        match (self.name.as_str(), key) {
            ("", key) => key.to_owned(),
            (name, "") => name.to_owned(),
            (name, key) => format!("{name}.{key}"),
        }
    }

    /// The line, from 1, of `key` or of an element such as `allow[1]`, or of the table if the key is missing.
    pub(crate) fn line(&self, key: &str) -> Option<usize> {
        self.lines.get(key).copied().or(self.line)
    }

    /// Reports a problem of this section's `key`.
    pub(crate) fn problem(&self, key: &str, problem: impl fmt::Display) {
        self.problem_at(self.line(key), key, problem);
    }

    fn problem_at(&self, line: Option<usize>, key: &str, problem: impl fmt::Display) {
        self.problems.push(Problem {
            line,
            ..Problem::new(self.key(key), problem)
        });
    }

    fn take(&mut self, key: &'static str) -> Option<Spanned<DeValue<'t>>> {
        self.known.push(key);
        self.table.remove(key)
    }

    /// The value of `key`, if the key exists; a value of the wrong type is a problem.
    pub(crate) fn optional<T: DeserializeOwned>(&mut self, key: &'static str) -> Option<T> {
        match T::deserialize(ValueDeserializer::from(self.take(key)?)) {
            Ok(value) => Some(value),
            Err(error) => {
                // In an array over several lines, the error has a more exact line than the key.
                let line = error.span().map(|span| self.ends.line(span.start));
                self.problem_at(line.or(self.line(key)), key, error.message());
                None
            }
        }
    }

    /// Like [`optional`](Self::optional), but a missing key is a problem, with `example` as the fix.
    pub(crate) fn required<T: DeserializeOwned>(
        &mut self,
        key: &'static str,
        example: &str,
    ) -> Option<T> {
        if !self.table.contains_key(key) {
            self.known.push(key);
            self.problem(
                key,
                format_args!("is missing; add it, for example: {key} = {example}"),
            );
            return None;
        }
        self.optional(key)
    }

    /// An integer within `range`, or `default` if the key is missing.
    pub(crate) fn number(
        &mut self,
        key: &'static str,
        default: u64,
        range: std::ops::RangeInclusive<u64>,
    ) -> u64 {
        match self.optional::<u64>(key) {
            Some(value) if range.contains(&value) => value,
            Some(value) => {
                self.problem(
                    key,
                    format_args!("expected {} to {}, got {value}", range.start(), range.end()),
                );
                default
            }
            None => default,
        }
    }

    /// Reports no unknown keys in the rest of the table, because an earlier problem makes it unclear which keys belong
    /// here.
    pub(crate) fn ignore_rest(&mut self) {
        self.table.clear();
    }

    /// Whether the key exists and has not been read yet.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// The table under `key`, or an empty table if the key is missing.
    #[must_use]
    pub(crate) fn section(&mut self, key: &'static str) -> Self {
        let table = match self.take(key).map(Spanned::into_inner) {
            Some(DeValue::Table(table)) => table,
            Some(other) => {
                let found = other.type_str();
                self.problem(key, format_args!("expected a table, got {found}"));
                DeTable::new()
            }
            None => DeTable::new(),
        };
        self.inner(self.key(key), table, self.line(key))
    }

    /// The tables under `key` with their names, as in `[account.main]`.
    pub(crate) fn named_sections(&mut self, key: &'static str) -> Vec<(String, Self)> {
        let mut tables = self.section(key);
        let mut sections = Vec::new();
        for (name, value) in std::mem::take(&mut tables.table) {
            let name = name.into_inner().into_owned();
            match value.into_inner() {
                DeValue::Table(table) => {
                    let section = self.inner(tables.key(&name), table, tables.line(&name));
                    sections.push((name, section));
                }
                other => tables.problem(
                    &name,
                    format_args!("expected a table, got {}", other.type_str()),
                ),
            }
        }
        sections
    }

    /// The tables of an array, as in `[[grant]]`.
    pub(crate) fn numbered_sections(&mut self, key: &'static str) -> Vec<Self> {
        let elements = match self.take(key).map(Spanned::into_inner) {
            Some(DeValue::Array(array)) => array,
            Some(other) => {
                let found = other.type_str();
                self.problem(key, format_args!("expected [[{key}]] tables, got {found}"));
                return Vec::new();
            }
            None => return Vec::new(),
        };
        let mut sections = Vec::new();
        for (index, element) in elements.into_iter().enumerate() {
            let key = format!("{key}[{index}]");
            match element.into_inner() {
                DeValue::Table(table) => {
                    sections.push(self.inner(self.key(&key), table, self.line(&key)));
                }
                other => self.problem(
                    &key,
                    format_args!("expected a table, got {}", other.type_str()),
                ),
            }
        }
        sections
    }

    fn inner(&self, name: String, table: DeTable<'t>, line: Option<usize>) -> Self {
        Self::new(name, table, line, &self.ends, &self.problems)
    }
}

impl Drop for Section<'_> {
    fn drop(&mut self) {
        for key in self.table.keys() {
            let known = self.known.join(", ");
            self.problem(
                key.get_ref(),
                format_args!("is not a key of this section; its keys are: {known}"),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str, read: impl FnOnce(&mut Section)) -> Vec<String> {
        let problems = Problems::default();
        if let Some(mut section) = Section::parse(text, "file", &problems) {
            read(&mut section);
        }
        let problems = problems.into_result().expect_err("this text is wrong");
        problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn problems_have_the_line_of_the_key_or_if_missing_of_its_table() {
        let text = "# one\nname = 1\n\n[table]\n\n[table.inner]\nsize = \"x\"\n\n[[entry]]\n\n[[entry]]\nwords = [\n  \"a\",\n  2,\n]\n[[entry]]\nport = 9\ntypo = 1\n\
                    [by.name]\n[by]\nodd = 1\n[late]\n";
        let problems = problems(text, |file| {
            file.optional::<String>("name");
            file.required::<String>("none", "1");
            let mut table = file.section("table");
            table.required::<String>("missing", "1");
            table.section("absent").required::<String>("deeper", "1");
            table.section("inner").optional::<u8>("size");
            let mut entries = file.numbered_sections("entry");
            entries[0].required::<String>("words", "[]");
            entries[1].optional::<Vec<String>>("words");
            entries[2].number("port", 1, 1..=8);
            entries[1].problem("words[1]", "reported later");
            drop(entries);
            for (_, mut named) in file.named_sections("by") {
                named.required::<u8>("x", "1");
            }
            file.section("late").problem("", "is late");
        });
        let expected = [
            "line 2: name: invalid type: integer `1`, expected a string",
            "none: is missing; add it, for example: none = 1",
            "line 4: table.missing: is missing; add it, for example: missing = 1",
            "line 4: table.absent.deeper: is missing; add it, for example: deeper = 1",
            "line 7: table.inner.size: invalid type: string \"x\", expected u8",
            "line 9: entry[0].words: is missing; add it, for example: words = []",
            "line 14: entry[1].words: invalid type: integer `2`, expected a string",
            "line 17: entry[2].port: expected 1 to 8, got 9",
            "line 14: entry[1].words[1]: reported later",
            "line 18: entry[2].typo: is not a key of this section; its keys are: port",
            "line 21: by.odd: expected a table, got integer",
            "line 19: by.name.x: is missing; add it, for example: x = 1",
            "line 22: late: is late",
        ];
        assert_eq!(problems, expected);
    }

    #[test]
    fn other_values_instead_of_tables_are_problems() {
        let problems = problems("a = 1\nb = 2\nc = [ {}, 3 ]\nd = { e = 4 }", |file| {
            let _ = file.section("a");
            file.numbered_sections("b");
            file.numbered_sections("c");
            file.named_sections("d");
        });
        let expected = [
            "line 1: a: expected a table, got integer",
            "line 2: b: expected [[b]] tables, got integer",
            "line 3: c[1]: expected a table, got integer",
            "line 4: d.e: expected a table, got integer",
        ];
        assert_eq!(problems, expected);
    }

    #[test]
    fn a_syntax_error_names_its_line() {
        for text in [
            "a = 1\r\nb = \r\n",
            "a = 1\na = 2\n",
            "[t]\n[t]\n",
            "\u{feff}\n\"é",
        ] {
            let problems = problems(text, |_| {});
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(
                problems[0].starts_with("line 2: file: is not valid TOML: "),
                "{problems:?}"
            );
        }
    }

    #[test]
    fn problem_location_has_a_form_that_editors_open() {
        let problem = Problem {
            line: Some(12),
            ..Problem::new("a.b", "is wrong")
        };
        assert_eq!(problem.to_string(), "line 12: a.b: is wrong");
        let problem = problem.in_file(Path::new("/etc/x.toml"));
        assert_eq!(problem.to_string(), "/etc/x.toml:12: a.b: is wrong");
    }
}
