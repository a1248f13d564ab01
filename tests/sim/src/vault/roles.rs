//! Common parts of the roles of all login methods: token settings and name patterns.

use std::net::IpAddr;
use std::time::Duration;

use serde_json::{Value, json};

use super::answer::Refusal;
use super::cidr;
use super::request::Fields;
use super::tokens::{Grant, sorted};

/// The tokens that a login gets. Default: policy `broker`, 20 minutes, renewable up to 24 hours.
#[derive(Clone, Debug)]
pub struct TokenSettings {
    /// Addresses that can use the tokens; empty: all.
    pub bound_cidrs: Vec<String>,
    /// Maximum lifetime of a token with renewals; `None`: the server's 768 hours.
    pub max_ttl: Option<Duration>,
    /// How many requests a token can make; 0: no limit.
    pub num_uses: u64,
    /// Makes tokens periodic: each renewal lasts this long, without a maximum.
    pub period: Option<Duration>,
    /// The tokens' policies; include `default` if wanted.
    pub policies: Vec<String>,
    /// Lifetime of a token without renewal; `None`: the server's 768 hours.
    pub ttl: Option<Duration>,
}

impl Default for TokenSettings {
    fn default() -> Self {
        Self {
            bound_cidrs: Vec::new(),
            max_ttl: Some(Duration::from_secs(24 * 3600)),
            num_uses: 0,
            period: None,
            policies: vec!["broker".to_owned()],
            ttl: Some(Duration::from_secs(20 * 60)),
        }
    }
}

impl TokenSettings {
    /// The settings of a role after a write request; `old` are the settings before, if the role existed.
    pub(super) fn written(old: Option<&Self>, body: &Fields) -> Result<Self, Refusal> {
        if body.text("token_type") == Some("batch") {
            return Err(Refusal::bad_request(
                "simulator: batch tokens are not simulated",
            ));
        }
        let policies = match (body.texts("token_policies"), old) {
            (None, Some(old)) => old.policies.clone(),
            (given, _) => {
                let mut policies = given.unwrap_or_default();
                if !body.flag("token_no_default_policy").unwrap_or(false) {
                    policies.push("default".to_owned());
                }
                sorted(policies)
            }
        };
        let bare = Self {
            max_ttl: None,
            policies: Vec::new(),
            ttl: None,
            ..Self::default()
        };
        let old = old.cloned().unwrap_or(bare);
        Ok(Self {
            bound_cidrs: body.texts("token_bound_cidrs").unwrap_or(old.bound_cidrs),
            max_ttl: body.duration("token_max_ttl")?.or(old.max_ttl),
            num_uses: body.number("token_num_uses").unwrap_or(old.num_uses),
            period: body.duration("token_period")?.or(old.period),
            policies,
            ttl: body.duration("token_ttl")?.or(old.ttl),
        })
    }

    /// Rejects a login from an address that could not use the token. `AppRole` does not check this.
    pub(super) fn admit(&self, peer: IpAddr) -> Result<(), Refusal> {
        if cidr::admits(&self.bound_cidrs, peer) {
            Ok(())
        } else {
            Err(Refusal::invalid_token())
        }
    }

    /// A token with the role's settings; the login method adds the identity.
    pub(super) fn grant(&self) -> Grant {
        Grant {
            bound_cidrs: self.bound_cidrs.clone(),
            max_ttl: self.max_ttl,
            num_uses: self.num_uses,
            period: self.period,
            policies: self.policies.clone(),
            renewable: true,
            ttl: self.ttl,
            ..Grant::default()
        }
    }

    /// The fields in the answer of a role read.
    pub(super) fn describe(&self) -> Value {
        let seconds = |duration: Option<Duration>| duration.unwrap_or_default().as_secs();
        json!({
            "token_bound_cidrs": self.bound_cidrs,
            "token_max_ttl": seconds(self.max_ttl),
            "token_num_uses": self.num_uses,
            "token_period": seconds(self.period),
            "token_policies": self.policies,
            "token_ttl": seconds(self.ttl),
            "token_type": "service",
        })
    }
}

/// Whether a name matches one of the patterns, in which `*` matches any text.
pub(super) fn matches(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| fits(pattern, name))
}

fn fits(pattern: &str, name: &str) -> bool {
    let Some((start, pattern)) = pattern.split_once('*') else {
        return pattern == name;
    };
    name.strip_prefix(start).is_some_and(|rest| {
        (0..=rest.len())
            .filter_map(|at| rest.get(at..))
            .any(|rest| fits(pattern, rest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn star_matches_any_text() {
        for (pattern, name, fit) in [
            ("broker", "broker", true),
            ("broker", "broker2", false),
            ("", "broker", false),
            ("*", "", true),
            ("bro*", "broker", true),
            ("*ker", "broker", true),
            ("b*k*r", "broker", true),
            ("b*k*x", "broker", false),
            ("*ö*", "größe", true),
        ] {
            assert_eq!(
                matches(&[pattern.to_owned()], name),
                fit,
                "{pattern} {name}"
            );
        }
        assert!(!matches(&[], "broker"));
    }
}
