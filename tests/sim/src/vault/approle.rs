//! `AppRole`: roles, `secret_ids`, login.
//!
//! `secret_id_bound_cidrs` is accepted and ignored: all clients of the simulator are on loopback.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde_json::json;

use super::answer::{Answer, Logical, Outcome, Refusal};
use super::ids::Ids;
use super::request::{Operation, Request};
use super::roles::TokenSettings;
use super::tokens::{Tokens, extend};

/// The server removes expired `secret_ids` this often; until then they still work.
const SWEEP: Duration = Duration::from_secs(60);

/// The settings of an `AppRole`. Default: tokens for 20 minutes, renewable up to 24 hours.
#[derive(Clone, Debug)]
pub struct RoleSettings {
    /// How often a `secret_id` can log in; 0: no limit.
    pub secret_id_num_uses: u64,
    /// How long a `secret_id` works; `None`: no limit.
    pub secret_id_ttl: Option<Duration>,
    /// Addresses that can use the tokens; empty: all.
    pub token_bound_cidrs: Vec<String>,
    /// Maximum lifetime of a token with renewals; `None`: the server's 768 hours.
    pub token_max_ttl: Option<Duration>,
    /// How many requests a token can make; 0: no limit.
    pub token_num_uses: u64,
    /// Makes tokens periodic: each renewal lasts this long, without a maximum.
    pub token_period: Option<Duration>,
    /// The tokens' policies; include `default` if wanted.
    pub token_policies: Vec<String>,
    /// Lifetime of a token without renewal; `None`: the server's 768 hours.
    pub token_ttl: Option<Duration>,
}

impl Default for RoleSettings {
    fn default() -> Self {
        let tokens = TokenSettings::default();
        Self {
            secret_id_num_uses: 0,
            secret_id_ttl: None,
            token_bound_cidrs: tokens.bound_cidrs,
            token_max_ttl: tokens.max_ttl,
            token_num_uses: tokens.num_uses,
            token_period: tokens.period,
            token_policies: tokens.policies,
            token_ttl: tokens.ttl,
        }
    }
}

/// One mount.
pub(super) struct Approle {
    mount: String,
    roles: BTreeMap<String, Role>,
    started: SystemTime,
}

struct Role {
    entity_id: String,
    /// The `role_id`.
    id: String,
    secret_id_num_uses: u64,
    secret_id_ttl: Option<Duration>,
    secret_ids: BTreeMap<String, SecretId>,
    tokens: TokenSettings,
}

struct SecretId {
    expires: Option<SystemTime>,
    /// `None`: no limit.
    uses_left: Option<u64>,
}

impl Role {
    fn new(tokens: TokenSettings, ids: &mut Ids) -> Self {
        Self {
            entity_id: ids.uuid(),
            id: ids.uuid(),
            secret_id_num_uses: 0,
            secret_id_ttl: None,
            secret_ids: BTreeMap::new(),
            tokens,
        }
    }

    fn new_secret_id(&mut self, now: SystemTime, ids: &mut Ids) -> String {
        let id = ids.uuid();
        let uses = self.secret_id_num_uses;
        let secret_id = SecretId {
            expires: self.secret_id_ttl.map(|ttl| now + ttl),
            uses_left: (uses > 0).then_some(uses),
        };
        self.secret_ids.insert(id.clone(), secret_id);
        id
    }
}

impl Approle {
    pub(super) fn new(mount: &str, now: SystemTime) -> Self {
        Self {
            mount: mount.to_owned(),
            roles: BTreeMap::new(),
            started: now,
        }
    }

    /// Creates or replaces a role; returns its `role_id` and a `secret_id`.
    pub(super) fn set_role(
        &mut self,
        name: &str,
        settings: RoleSettings,
        now: SystemTime,
        ids: &mut Ids,
    ) -> (String, String) {
        let tokens = TokenSettings {
            bound_cidrs: settings.token_bound_cidrs,
            max_ttl: settings.token_max_ttl,
            num_uses: settings.token_num_uses,
            period: settings.token_period,
            policies: settings.token_policies,
            ttl: settings.token_ttl,
        };
        let mut role = Role::new(tokens, ids);
        role.secret_id_num_uses = settings.secret_id_num_uses;
        role.secret_id_ttl = settings.secret_id_ttl;
        let secret_id = role.new_secret_id(now, ids);
        let role_id = role.id.clone();
        self.roles.insert(name.to_owned(), role);
        (role_id, secret_id)
    }

    /// Answers a login, the only request of this method that needs no token.
    pub(super) fn login(
        &mut self,
        request: &Request,
        tokens: &mut Tokens,
        ids: &mut Ids,
    ) -> Outcome {
        let invalid = || Refusal::bad_request("invalid role or secret ID");
        let role_id = match request.body.text("role_id") {
            None | Some("") => return Err(Refusal::routed(500, "missing role_id")),
            Some(role_id) => role_id,
        };
        let secret_id = request.body.text("secret_id").unwrap_or_default();
        let swept = self.last_sweep(request.now);
        let (name, role) = self
            .roles
            .iter_mut()
            .find(|(_, role)| role.id == role_id)
            .ok_or_else(invalid)?;
        role.secret_ids
            .retain(|_, known| known.expires.is_none_or(|expires| expires > swept));
        let known = role.secret_ids.get_mut(secret_id).ok_or_else(invalid)?;
        if let Some(uses_left) = &mut known.uses_left {
            *uses_left -= 1;
            if *uses_left == 0 {
                role.secret_ids.remove(secret_id);
            }
        }
        let mut grant = role.tokens.grant();
        grant.display_name.clone_from(&self.mount);
        grant.entity_id.clone_from(&role.entity_id);
        grant.metadata = json!({ "role_name": name });
        grant.path.clone_from(&request.path);
        let id = ids.token();
        Ok(tokens.issue(id, grant, request.now, ids).into())
    }

    /// Answers requests below the mount other than logins.
    pub(super) fn handle(&mut self, path: &str, request: &Request, ids: &mut Ids) -> Outcome {
        let mut segments = path.splitn(3, '/');
        if segments.next() != Some("role") {
            return Err(Refusal::unsupported_path());
        }
        let name = segments.next().unwrap_or_default();
        match (name, segments.next(), request.operation) {
            ("", None, Operation::List) if self.roles.is_empty() => Err(Refusal::missing()),
            ("", None, Operation::List) => {
                let names: Vec<_> = self.roles.keys().collect();
                Ok(Logical::data(json!({ "keys": names })).into())
            }
            ("", _, _) => Err(Refusal::unsupported_operation()),
            (_, None, Operation::Delete) => {
                self.roles.remove(name);
                Ok(Answer::Empty)
            }
            (_, None, Operation::Read) => {
                let role = self.roles.get(name).ok_or_else(Refusal::missing)?;
                let data = json!({
                    "bind_secret_id": true,
                    "secret_id_num_uses": role.secret_id_num_uses,
                    "secret_id_ttl": role.secret_id_ttl.unwrap_or_default().as_secs(),
                });
                Ok(Logical::data(extend(data, role.tokens.describe())).into())
            }
            (_, None, Operation::Write) => self.write_role(name, request, ids),
            (_, Some("role-id"), Operation::Read) => {
                let role = self.roles.get(name).ok_or_else(Refusal::missing)?;
                Ok(Logical::data(json!({ "role_id": role.id })).into())
            }
            (_, Some("secret-id"), Operation::Write) => self.write_secret_id(name, request, ids),
            (_, None | Some("role-id" | "secret-id"), _) => Err(Refusal::unsupported_operation()),
            _ => Err(Refusal::unsupported_path()),
        }
    }

    fn write_role(&mut self, name: &str, request: &Request, ids: &mut Ids) -> Outcome {
        let body = &request.body;
        if body.flag("bind_secret_id") == Some(false) {
            return Err(Refusal::bad_request(
                "simulator: roles without secret_id are not simulated",
            ));
        }
        let old = self.roles.get(name).map(|role| &role.tokens);
        let tokens = TokenSettings::written(old, body)?;
        let secret_id_ttl = body.duration("secret_id_ttl")?;
        let role = self
            .roles
            .entry(name.to_owned())
            .or_insert_with(|| Role::new(tokens.clone(), ids));
        role.tokens = tokens;
        role.secret_id_ttl = secret_id_ttl.or(role.secret_id_ttl);
        if let Some(uses) = body.number("secret_id_num_uses") {
            role.secret_id_num_uses = uses;
        }
        if let Some(role_id) = body.text("role_id") {
            role_id.clone_into(&mut role.id);
        }
        Ok(Answer::Empty)
    }

    fn write_secret_id(&mut self, name: &str, request: &Request, ids: &mut Ids) -> Outcome {
        let role = self
            .roles
            .get_mut(name)
            .ok_or_else(|| Refusal::bad_request(format!("role {name:?} does not exist")))?;
        let data = json!({
            "secret_id": role.new_secret_id(request.now, ids),
            "secret_id_accessor": ids.uuid(),
            "secret_id_num_uses": role.secret_id_num_uses,
            "secret_id_ttl": role.secret_id_ttl.unwrap_or_default().as_secs(),
        });
        Ok(Logical::data(data).into())
    }

    fn last_sweep(&self, now: SystemTime) -> SystemTime {
        let running = now.duration_since(self.started).unwrap_or_default();
        let sweeps = running.as_secs() / SWEEP.as_secs();
        self.started + Duration::from_secs(sweeps * SWEEP.as_secs())
    }
}
