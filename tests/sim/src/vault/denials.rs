//! Denied requests, listed by tests: policies are not enforced.

use super::request::relative_path;

/// Requests that are denied although the token is valid.
#[derive(Default)]
pub(super) struct Denials(Vec<Denial>);

#[derive(PartialEq)]
struct Denial {
    /// `None`: every token.
    token: Option<String>,
    /// `None`: every method.
    method: Option<String>,
    /// A path below `/v1/`; with `*` at the end, every path with that prefix.
    path: String,
}

impl Denial {
    fn new(token: Option<&str>, method: Option<&str>, path: &str) -> Self {
        Self {
            token: token.map(str::to_owned),
            method: method.map(str::to_owned),
            path: relative_path(path),
        }
    }

    fn covers(&self, token: &str, method: &str, path: &str) -> bool {
        let same_path = match self.path.strip_suffix('*') {
            None => path == self.path,
            Some(start) => path.starts_with(start),
        };
        same_path
            && self.token.as_deref().is_none_or(|denied| denied == token)
            && self.method.as_deref().is_none_or(|denied| denied == method)
    }
}

impl Denials {
    pub(super) fn add(&mut self, token: Option<&str>, method: Option<&str>, path: &str) {
        self.0.push(Denial::new(token, method, path));
    }

    pub(super) fn remove(&mut self, token: Option<&str>, method: Option<&str>, path: &str) {
        let removed = Denial::new(token, method, path);
        self.0.retain(|denial| *denial != removed);
    }

    pub(super) fn deny(&self, token: &str, method: &str, path: &str) -> bool {
        self.0
            .iter()
            .any(|denial| denial.covers(token, method, path))
    }
}
