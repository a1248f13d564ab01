//! What is wrong with something that the broker needs, and what to do: the one form for `doctor`, `/readyz` and key tests.

use std::fmt;

use crate::base::text::{MAX_CHARS, clean};

/// How bad it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Severity {
    /// It does not work, or must not be used like this.
    Failed,
    /// It works.
    Ok,
    /// It works, and somebody should know this.
    Warning,
}

impl Severity {
    /// The word for it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Ok => "ok",
            Self::Warning => "warning",
        }
    }
}

/// One thing that was checked. `Display` is one line: what it is about, cause and fix.
///
/// Others (KuCoin, Vault, a file) may have written parts of cause and fix: both are cleaned, and cut to [`MAX_CHARS`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Diagnosis {
    /// A stable word for what was checked or found, in kebab case.
    pub(crate) id: &'static str,
    /// Which one, where there are several; or empty.
    pub(crate) about: String,
    /// How bad it is.
    pub(crate) severity: Severity,
    /// What was found.
    pub(crate) cause: String,
    /// What to do; empty where nothing needs to be done, or another line says it.
    pub(crate) fix: String,
}

impl Diagnosis {
    fn new(id: &'static str, severity: Severity, cause: &str, fix: &str) -> Self {
        let harmless = |text: &str| clean(text, MAX_CHARS).into_owned();
        Self {
            id,
            about: String::new(),
            severity,
            cause: harmless(cause),
            fix: harmless(fix),
        }
    }

    /// It works.
    pub(crate) fn ok(id: &'static str, cause: impl AsRef<str>) -> Self {
        Self::new(id, Severity::Ok, cause.as_ref(), "")
    }

    /// It works, and somebody should know this.
    pub(crate) fn warning(id: &'static str, cause: impl AsRef<str>, fix: impl AsRef<str>) -> Self {
        Self::new(id, Severity::Warning, cause.as_ref(), fix.as_ref())
    }

    /// It does not work, or must not be used like this.
    pub(crate) fn failed(id: &'static str, cause: impl AsRef<str>, fix: impl AsRef<str>) -> Self {
        Self::new(id, Severity::Failed, cause.as_ref(), fix.as_ref())
    }

    /// It could not be checked, because of what another diagnosis says.
    pub(crate) fn unchecked(id: &'static str, cause: impl AsRef<str>) -> Self {
        Self::warning(id, cause, "")
    }

    /// The same, about this one.
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
    fn a_line_says_what_it_is_about_cause_and_fix() {
        let found = Diagnosis::failed("clock", "12 s off", "set it").about("global/spot");
        assert_eq!(found.to_string(), "clock global/spot: 12 s off; set it");
        let found = Diagnosis::warning("audit", "It is full.", "Make room.");
        assert_eq!(found.to_string(), "audit: It is full. Make room.");
        assert_eq!(Diagnosis::ok("audit", "fine").to_string(), "audit: fine");
    }

    #[test]
    fn what_others_wrote_moves_no_cursor() {
        let found = Diagnosis::failed("key", "\u{1b}[2Jno", "\u{202e}fix");
        assert_eq!(found.text(), "\\u{1b}[2Jno; \\u{202e}fix");
    }
}
