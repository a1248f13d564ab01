//! Reads a TOML document key by key and collects every problem, instead of stopping at the first.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

use serde::de::DeserializeOwned;

/// A key that is not as it must be.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Problem {
    /// The key in full, such as `egress.address`.
    pub key: String,
    /// What was expected, what came and what to do.
    pub problem: String,
}

impl Problem {
    /// A problem of `key`.
    pub fn new(key: impl Into<String>, problem: impl fmt::Display) -> Self {
        Self {
            key: key.into(),
            problem: problem.to_string(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.problem)
    }
}

/// Every problem of a file, in the order in which they were met.
#[derive(Clone, Debug, Default)]
pub struct Problems(Rc<RefCell<Vec<Problem>>>);

impl Problems {
    /// Adds one.
    pub fn add(&self, key: impl Into<String>, problem: impl fmt::Display) {
        self.0.borrow_mut().push(Problem {
            key: key.into(),
            problem: problem.to_string(),
        });
    }

    /// `Ok` when there is none.
    pub fn into_result(self) -> Result<(), Vec<Problem>> {
        let problems = self.0.take();
        if problems.is_empty() {
            Ok(())
        } else {
            Err(problems)
        }
    }
}

/// One table of the document. Keys that nobody took are problems when it drops.
#[derive(Debug)]
pub struct Section {
    name: String,
    table: toml::Table,
    known: Vec<&'static str>,
    problems: Problems,
}

impl Section {
    /// Parses a document; a syntax error is its one problem.
    pub fn parse(text: &str, file: &str, problems: &Problems) -> Option<Self> {
        match text.parse::<toml::Table>() {
            Ok(table) => Some(Self::new(String::new(), table, problems)),
            Err(error) => {
                problems.add(
                    file,
                    format_args!("is not TOML: {}", error.to_string().trim_end()),
                );
                None
            }
        }
    }

    fn new(name: String, table: toml::Table, problems: &Problems) -> Self {
        Self {
            name,
            table,
            known: Vec::new(),
            problems: problems.clone(),
        }
    }

    /// The key's full name.
    pub fn key(&self, key: &str) -> String {
        match (self.name.as_str(), key) {
            ("", key) => key.to_owned(),
            (name, "") => name.to_owned(),
            (name, key) => format!("{name}.{key}"),
        }
    }

    /// Reports a problem of this section's `key`.
    pub fn problem(&self, key: &str, problem: impl fmt::Display) {
        self.problems.add(self.key(key), problem);
    }

    fn take(&mut self, key: &'static str) -> Option<toml::Value> {
        self.known.push(key);
        self.table.remove(key)
    }

    /// The value of `key` if it stands there; a value of the wrong kind is a problem.
    pub fn optional<T: DeserializeOwned>(&mut self, key: &'static str) -> Option<T> {
        match self.take(key)?.try_into() {
            Ok(value) => Some(value),
            Err(error) => {
                self.problem(key, error.to_string().trim_end());
                None
            }
        }
    }

    /// The value of `key`; its absence is a problem too, with `example` as the fix.
    pub fn required<T: DeserializeOwned>(&mut self, key: &'static str, example: &str) -> Option<T> {
        if !self.table.contains_key(key) {
            self.known.push(key);
            self.problem(
                key,
                format_args!("is missing; write for example: {key} = {example}"),
            );
            return None;
        }
        self.optional(key)
    }

    /// A whole number within `range`, or `default` where the key does not stand.
    pub fn number(
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

    /// Leaves the rest unread, where what stands before it makes it impossible to tell what belongs here.
    pub fn ignore_rest(&mut self) {
        self.table.clear();
    }

    /// Whether the key stands and has not been taken.
    pub fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// The table under `key`; an empty one where there is none.
    #[must_use]
    pub fn section(&mut self, key: &'static str) -> Self {
        let table = self.optional(key).unwrap_or_default();
        Self::new(self.key(key), table, &self.problems)
    }

    /// The tables under `key` by name, as in `[account.main]`.
    pub fn named_sections(&mut self, key: &'static str) -> Vec<(String, Self)> {
        let tables: std::collections::BTreeMap<String, toml::Table> =
            self.optional(key).unwrap_or_default();
        let prefix = self.key(key);
        let section = |(name, table)| {
            let section = Self::new(format!("{prefix}.{name}"), table, &self.problems);
            (name, section)
        };
        tables.into_iter().map(section).collect()
    }

    /// The tables of an array, as in `[[grant]]`.
    pub fn numbered_sections(&mut self, key: &'static str) -> Vec<Self> {
        let tables: Vec<toml::Table> = self.optional(key).unwrap_or_default();
        let prefix = self.key(key);
        let section =
            |(index, table)| Self::new(format!("{prefix}[{index}]"), table, &self.problems);
        tables.into_iter().enumerate().map(section).collect()
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        for key in self.table.keys() {
            let known = self.known.join(", ");
            self.problem(
                key,
                format_args!("is not a key of this section; its keys are: {known}"),
            );
        }
    }
}
