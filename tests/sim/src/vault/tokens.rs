//! Tokens: creation, use, renewal, expiry, and revocation with their children.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use serde_json::{Map, Value, json};

use super::answer::{Answer, Logical, Outcome, Refusal};
use super::cidr;
use super::clock::{rfc3339, short, unix_s};
use super::ids::Ids;
use super::request::{Operation, Request};

/// The server's default and maximum TTL: 32 days.
pub(super) const SYSTEM_TTL: Duration = Duration::from_secs(768 * 3600);

/// All valid tokens by id.
#[derive(Default)]
pub(super) struct Tokens(BTreeMap<String, Token>);

struct Token {
    accessor: String,
    creation_ttl: Duration,
    expires: Option<SystemTime>,
    issued: SystemTime,
    last_renewal: Option<SystemTime>,
    /// 0: no limit; -1: this request is the last one.
    num_uses: i64,
    grant: Grant,
}

/// The properties of a new token.
#[derive(Clone, Default)]
pub(super) struct Grant {
    pub(super) bound_cidrs: Vec<String>,
    /// The client certificate of a certificate login.
    pub(super) certificate: Option<CertificateDer<'static>>,
    pub(super) display_name: String,
    pub(super) entity_id: String,
    pub(super) explicit_max_ttl: Option<Duration>,
    /// Maximum TTL of the role; limits renewals like `explicit_max_ttl`.
    pub(super) max_ttl: Option<Duration>,
    pub(super) metadata: Value,
    pub(super) num_uses: u64,
    /// The token whose revocation also revokes it.
    pub(super) parent: Option<String>,
    pub(super) path: String,
    pub(super) period: Option<Duration>,
    pub(super) policies: Vec<String>,
    pub(super) renewable: bool,
    /// `None`: the server's default, or no expiry for a root token.
    pub(super) ttl: Option<Duration>,
}

/// The certificate login that issued a token.
pub(super) struct CertificateLogin<'a> {
    pub(super) certificate: &'a CertificateDer<'static>,
    /// The mount, without `auth/`.
    pub(super) mount: &'a str,
    pub(super) role: &'a str,
}

impl Grant {
    /// A root token that does not expire.
    pub(super) fn root(path: &str, display_name: &str) -> Self {
        Self {
            display_name: display_name.to_owned(),
            path: path.to_owned(),
            policies: vec!["root".to_owned()],
            ..Self::default()
        }
    }

    fn is_root(&self) -> bool {
        self.policies.iter().any(|policy| policy == "root")
    }
}

impl Tokens {
    pub(super) fn ids(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Adds a token and returns its `auth` object.
    pub(super) fn issue(
        &mut self,
        id: String,
        grant: Grant,
        now: SystemTime,
        ids: &mut Ids,
    ) -> Logical {
        let mut token = Token {
            accessor: ids.accessor(),
            creation_ttl: Duration::ZERO,
            expires: None,
            issued: now,
            last_renewal: None,
            num_uses: i64::try_from(grant.num_uses).unwrap_or(i64::MAX),
            grant,
        };
        let mut warnings = Vec::new();
        if !token.grant.is_root() || token.grant.ttl.is_some() {
            let wanted = token.grant.ttl.unwrap_or(SYSTEM_TTL);
            let (ttl, warning) = token.lease(wanted, now);
            token.creation_ttl = ttl;
            token.expires = Some(now + ttl);
            warnings.extend(warning);
        }
        let mut answer = Logical::auth(token.auth(&id, token.creation_ttl));
        answer.warnings = warnings;
        self.0.insert(id, token);
        answer
    }

    /// The certificate login that issued a token; `None` if another method issued it.
    pub(super) fn certificate_login(&self, id: &str) -> Option<CertificateLogin<'_>> {
        let grant = &self.0.get(id)?.grant;
        Some(CertificateLogin {
            certificate: grant.certificate.as_ref()?,
            mount: grant.path.strip_prefix("auth/")?.strip_suffix("/login")?,
            role: grant.metadata.get("cert_name")?.as_str()?,
        })
    }

    /// Counts a use of a valid token; rejects an invalid one.
    pub(super) fn authenticate(&mut self, id: &str, peer: IpAddr) -> Result<(), Refusal> {
        let token = self.0.get_mut(id).ok_or_else(Refusal::invalid_token)?;
        if !cidr::admits(&token.grant.bound_cidrs, peer) {
            return Err(Refusal::invalid_token());
        }
        token.num_uses = match token.num_uses {
            0 => 0,
            1 => -1,
            more => more - 1,
        };
        Ok(())
    }

    /// Revokes a token whose last use is over.
    pub(super) fn revoke_if_used_up(&mut self, id: &str) {
        if self.0.get(id).is_some_and(|token| token.num_uses < 0) {
            self.revoke(id);
        }
    }

    /// Removes a token and its children; returns whether it existed.
    pub(super) fn revoke(&mut self, id: &str) -> bool {
        let found = self.0.remove(id).is_some();
        let is_child = |(_, token): &(&String, &Token)| token.grant.parent.as_deref() == Some(id);
        while let Some(child) = self.0.iter().find(is_child).map(|(id, _)| id.clone()) {
            self.revoke(&child);
        }
        found
    }

    /// Revokes expired tokens.
    pub(super) fn sweep(&mut self, now: SystemTime) {
        let has_expired =
            |(_, token): &(&String, &Token)| token.expires.is_some_and(|expires| expires <= now);
        while let Some(id) = self.0.iter().find(has_expired).map(|(id, _)| id.clone()) {
            self.revoke(&id);
        }
    }

    /// Answers requests below `auth/token/`; `caller` is an authenticated token.
    pub(super) fn handle(
        &mut self,
        path: &str,
        caller: &str,
        request: &Request,
        ids: &mut Ids,
    ) -> Outcome {
        match (path, request.operation) {
            ("create" | "create-orphan", Operation::Write) => {
                self.create(path == "create-orphan", caller, request, ids)
            }
            ("lookup-self", Operation::Read | Operation::Write) => {
                let token = self.0.get(caller).ok_or_else(Refusal::invalid_token)?;
                Ok(Logical::data(token.lookup(caller, request.now)).into())
            }
            ("renew-self", Operation::Write) => self.renew(caller, request),
            ("revoke", Operation::Write) => {
                let id = request.body.text("token").unwrap_or_default();
                if id.is_empty() {
                    return Err(Refusal::bad_request("missing token ID"));
                }
                self.revoke(id);
                Ok(Answer::Empty)
            }
            ("revoke-self", Operation::Write) => {
                self.revoke(caller);
                Ok(Answer::Empty)
            }
            (
                "create" | "create-orphan" | "lookup-self" | "renew-self" | "revoke"
                | "revoke-self",
                _,
            ) => Err(Refusal::unsupported_operation()),
            _ => Err(Refusal::unsupported_path()),
        }
    }

    fn create(&mut self, orphan: bool, caller: &str, request: &Request, ids: &mut Ids) -> Outcome {
        let body = &request.body;
        if body.text("type") == Some("batch") {
            return Err(Refusal::bad_request(
                "simulator: batch tokens are not simulated",
            ));
        }
        let parent = self.0.get(caller).ok_or_else(Refusal::invalid_token)?;
        let mut policies = match body.texts("policies") {
            Some(policies) if !policies.is_empty() => policies,
            _ => parent.grant.policies.clone(),
        };
        let is_root = policies.iter().any(|policy| policy == "root");
        if !is_root && !body.flag("no_default_policy").unwrap_or(false) {
            policies.push("default".to_owned());
        }
        let display_name = match body.text("display_name") {
            Some(name) if !name.is_empty() => format!("token-{name}"),
            _ => "token".to_owned(),
        };
        let ttl = body.duration("ttl")?;
        let period = body.duration("period")?;
        let orphan = orphan || body.flag("no_parent").unwrap_or(false);
        let grant = Grant {
            display_name,
            explicit_max_ttl: body.duration("explicit_max_ttl")?,
            metadata: body.get("meta").cloned().unwrap_or_default(),
            num_uses: body.number("num_uses").unwrap_or(0),
            parent: (!orphan).then(|| caller.to_owned()),
            path: request.path.clone(),
            period,
            policies: sorted(policies),
            renewable: body.flag("renewable").unwrap_or(true) && !(is_root && ttl.is_none()),
            ttl,
            ..Grant::default()
        };
        let id = ids.token();
        Ok(self.issue(id, grant, request.now, ids).into())
    }

    fn renew(&mut self, id: &str, request: &Request) -> Outcome {
        let token = self.0.get_mut(id).ok_or_else(Refusal::invalid_token)?;
        if !token.grant.renewable {
            return Err(Refusal::bad_request("lease is not renewable"));
        }
        let increment = request.body.duration("increment")?;
        let wanted = increment
            .filter(|increment| !increment.is_zero())
            .unwrap_or(token.creation_ttl);
        let (ttl, warning) = token.lease(wanted, request.now);
        token.expires = Some(request.now + ttl);
        token.last_renewal = Some(request.now);
        let mut answer = Logical::auth(token.auth(id, ttl));
        answer.warnings.extend(warning);
        Ok(answer.into())
    }
}

impl Token {
    /// The TTL that a lease of `wanted` gets now, and a warning if it is shortened.
    fn lease(&self, wanted: Duration, now: SystemTime) -> (Duration, Option<String>) {
        let wanted = self.grant.period.unwrap_or(wanted);
        let system = self.grant.period.is_none().then_some(SYSTEM_TTL);
        let limits = [self.grant.explicit_max_ttl, self.grant.max_ttl, system];
        let Some(max) = limits
            .into_iter()
            .flatten()
            .filter(|max| !max.is_zero())
            .min()
        else {
            return (wanted, None);
        };
        let age = now.duration_since(self.issued).unwrap_or_default();
        let left = max.saturating_sub(age);
        if wanted <= left {
            return (wanted, None);
        }
        // Rounded up, so that the time between login and renewal does not change the text.
        let shown = Duration::from_secs((left + Duration::from_nanos(999_999_999)).as_secs());
        let warning = format!(
            "TTL of \"{}\" exceeded the effective max_ttl of \"{}\"; TTL value is capped accordingly",
            short(wanted),
            short(shown),
        );
        (left, Some(warning))
    }

    fn auth(&self, id: &str, lease: Duration) -> Value {
        let grant = &self.grant;
        let mut auth = json!({
            "client_token": id,
            "accessor": self.accessor,
            "policies": grant.policies,
        });
        if let (Some(fields), false) = (auth.as_object_mut(), grant.policies.is_empty()) {
            fields.insert("token_policies".to_owned(), json!(grant.policies));
        }
        extend(
            auth,
            json!({
                "metadata": grant.metadata,
                "lease_duration": lease.as_secs(),
                "renewable": grant.renewable,
                "entity_id": grant.entity_id,
                "token_type": "service",
                "orphan": grant.parent.is_none(),
                "mfa_requirement": null,
                "num_uses": self.num_uses,
            }),
        )
    }

    fn lookup(&self, id: &str, now: SystemTime) -> Value {
        let grant = &self.grant;
        let ttl = self
            .expires
            .and_then(|expires| expires.duration_since(now).ok())
            .unwrap_or_default();
        let mut data = json!({
            "accessor": self.accessor,
            "creation_time": unix_s(self.issued),
            "creation_ttl": self.creation_ttl.as_secs(),
            "display_name": grant.display_name,
            "entity_id": grant.entity_id,
            "expire_time": self.expires.map(rfc3339),
            "explicit_max_ttl": grant.explicit_max_ttl.unwrap_or_default().as_secs(),
            "id": id,
            "issue_time": rfc3339(self.issued),
            "meta": grant.metadata,
            "num_uses": self.num_uses,
            "orphan": grant.parent.is_none(),
            "path": grant.path,
            "policies": grant.policies,
            "renewable": grant.renewable,
            "ttl": ttl.as_secs(),
            "type": "service",
        });
        if !grant.bound_cidrs.is_empty() {
            data = extend(data, json!({ "bound_cidrs": grant.bound_cidrs }));
        }
        if let Some(renewed) = self.last_renewal {
            data = extend(
                data,
                json!({ "last_renewal": rfc3339(renewed), "last_renewal_time": unix_s(renewed) }),
            );
        }
        if let Some(period) = grant.period {
            data = extend(data, json!({ "period": period.as_secs() }));
        }
        data
    }
}

/// Policies as the server stores them: sorted, without duplicates.
pub(super) fn sorted(mut policies: Vec<String>) -> Vec<String> {
    policies.sort();
    policies.dedup();
    policies
}

/// Merges two objects.
pub(super) fn extend(object: Value, more: Value) -> Value {
    match (object, more) {
        (Value::Object(object), Value::Object(more)) => {
            Value::Object(object.into_iter().chain(more).collect::<Map<_, _>>())
        }
        (object, _) => object,
    }
}
