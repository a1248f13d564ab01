//! Result of a check with cause and fix: the common form of `doctor`, `/readyz` and key tests.

use std::fmt;

use crate::base::text::{MAX_CHARS, clean};

/// Severity of a diagnosis.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Severity {
    /// It does not work, or must not be used like this.
    Failed,
    /// It works.
    Ok,
    /// It works, but needs attention.
    Warning,
}

impl Severity {
    /// The word in output.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Ok => "ok",
            Self::Warning => "warning",
        }
    }
}

/// The result of one check. `Display` is one line: id, subject, cause and fix.
///
/// Cause and fix can contain text from outside (KuCoin, Vault, a file): both are cleaned and cut to [`MAX_CHARS`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Diagnosis {
    /// Stable id of what was checked or found, in kebab case.
    pub(crate) id: &'static str,
    /// Which one was checked, if there are several; otherwise empty.
    pub(crate) about: String,
    /// Severity.
    pub(crate) severity: Severity,
    /// What was found.
    pub(crate) cause: String,
    /// What to do; empty if nothing needs to be done, or another line has the fix.
    pub(crate) fix: String,
}

impl Diagnosis {
    fn new(id: &'static str, severity: Severity, cause: &str, fix: &str) -> Self {
        let cleaned = |text: &str| clean(text, MAX_CHARS).into_owned();
        Self {
            id,
            about: String::new(),
            severity,
            cause: cleaned(cause),
            fix: cleaned(fix),
        }
    }

    /// It works.
    pub(crate) fn ok(id: &'static str, cause: impl AsRef<str>) -> Self {
        Self::new(id, Severity::Ok, cause.as_ref(), "")
    }

    /// It works, but needs attention.
    pub(crate) fn warning(id: &'static str, cause: impl AsRef<str>, fix: impl AsRef<str>) -> Self {
        Self::new(id, Severity::Warning, cause.as_ref(), fix.as_ref())
    }

    /// It does not work, or must not be used like this.
    pub(crate) fn failed(id: &'static str, cause: impl AsRef<str>, fix: impl AsRef<str>) -> Self {
        Self::new(id, Severity::Failed, cause.as_ref(), fix.as_ref())
    }

    /// It could not be checked, because of a problem that another diagnosis reports.
    pub(crate) fn unchecked(id: &'static str, cause: impl AsRef<str>) -> Self {
        Self::warning(id, cause, "")
    }

    /// Sets which one was checked.
    #[must_use]
    pub(crate) fn about(mut self, about: impl Into<String>) -> Self {
        self.about = about.into();
        self
    }

    /// Whether it does not work.
    pub(crate) fn is_failed(&self) -> bool {
        self.severity == Severity::Failed
    }

    /// Cause and fix.
    pub(crate) fn text(&self) -> String {
        let Self { cause, fix, .. } = self;
        match (fix.is_empty(), cause.ends_with('.')) {
            (true, _) => cause.clone(),
            (false, true) => format!("{cause} {fix}"),
            (false, false) => format!("{cause}; {fix}"),
        }
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id)?;
        if !self.about.is_empty() {
            write!(f, " {}", self.about)?;
        }
        write!(f, ": {}", self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn diagnosis_shows_subject_cause_and_fix_on_one_line() {
        let found = Diagnosis::failed("clock", "12 s off", "set it").about("global/spot");
        assert_eq!(found.to_string(), "clock global/spot: 12 s off; set it");
        let found = Diagnosis::warning("audit", "It is full.", "Make room.");
        assert_eq!(found.to_string(), "audit: It is full. Make room.");
        assert_eq!(Diagnosis::ok("audit", "fine").to_string(), "audit: fine");
    }

    #[test]
    fn control_characters_in_cause_and_fix_are_escaped() {
        let found = Diagnosis::failed("key", "\u{1b}[2Jno", "\u{202e}fix");
        assert_eq!(found.text(), "\\u{1b}[2Jno; \\u{202e}fix");
    }
}
