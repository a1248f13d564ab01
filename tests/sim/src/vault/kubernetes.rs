//! Kubernetes logins: roles, and a reviewer inside the simulator that replaces `TokenReview` of the Kubernetes API server.
//!
//! A JWT is not parsed: it identifies the service account that a test registered for it. Its expiry and audience are not
//! checked, and a role's `audience` is ignored.

use std::collections::BTreeMap;

use serde_json::json;

use super::answer::{Answer, Logical, Outcome, Refusal};
use super::ids::Ids;
use super::request::{Operation, Request};
use super::roles::{TokenSettings, matches};
use super::tokens::{Tokens, extend};

/// The `kubernetes_host` of the simulator's reviewer. Logins with any other host are rejected.
pub const REVIEWER_URL: &str = "https://reviewer.simulated";

/// Which service accounts can log in to a role. Default: `trading/credbroker`.
#[derive(Clone, Debug)]
pub struct KubernetesRole {
    /// Names of service accounts; `*` matches any text.
    pub service_account_names: Vec<String>,
    /// Namespaces of service accounts; `*` matches any text.
    pub service_account_namespaces: Vec<String>,
    /// The tokens that a login gets.
    pub tokens: TokenSettings,
}

impl Default for KubernetesRole {
    fn default() -> Self {
        let ServiceAccount {
            name, namespace, ..
        } = ServiceAccount::default();
        Self {
            service_account_names: vec![name],
            service_account_namespaces: vec![namespace],
            tokens: TokenSettings::default(),
        }
    }
}

/// The service account of a JWT. Default: `trading/credbroker` with UID `u-1`.
#[derive(Clone, Debug)]
pub struct ServiceAccount {
    /// Name of the account.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its UID.
    pub uid: String,
}

impl Default for ServiceAccount {
    fn default() -> Self {
        Self {
            name: "credbroker".to_owned(),
            namespace: "trading".to_owned(),
            uid: "u-1".to_owned(),
        }
    }
}

/// Whether the reviewer is running.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Reviewer {
    /// The reviewer does not answer: every login is rejected.
    Down,
    /// The reviewer checks JWTs.
    #[default]
    Up,
}

/// State of the reviewer.
#[derive(Default)]
pub(super) struct Reviews {
    /// Service accounts by JWT.
    pub(super) accounts: BTreeMap<String, ServiceAccount>,
    pub(super) reviewer: Reviewer,
}

/// One mount.
pub(super) struct Kubernetes {
    host: Option<String>,
    mount: String,
    roles: BTreeMap<String, Role>,
}

struct Role {
    entity_id: String,
    settings: KubernetesRole,
}

impl Kubernetes {
    pub(super) fn new(mount: &str) -> Self {
        Self {
            host: None,
            mount: mount.to_owned(),
            roles: BTreeMap::new(),
        }
    }

    /// Configures the simulator's reviewer.
    pub(super) fn use_reviewer(&mut self) {
        self.host = Some(REVIEWER_URL.to_owned());
    }

    /// Creates or replaces a role.
    pub(super) fn set_role(&mut self, name: &str, settings: KubernetesRole, ids: &mut Ids) {
        let old = self.roles.remove(name);
        let role = Role {
            entity_id: old.map_or_else(|| ids.uuid(), |old| old.entity_id),
            settings,
        };
        self.roles.insert(name.to_owned(), role);
    }

    /// Answers a login. Checks in the server's order: role, service account of the JWT, reviewer. If the reviewer is down,
    /// the login is rejected.
    pub(super) fn login(
        &self,
        request: &Request,
        reviews: &Reviews,
        tokens: &mut Tokens,
        ids: &mut Ids,
    ) -> Outcome {
        let field = |name| match request.body.text(name) {
            None | Some("") => Err(Refusal::bad_request(format!("missing {name}"))),
            Some(text) => Ok(text),
        };
        let (name, jwt) = (field("role")?, field("jwt")?);
        let role = self
            .roles
            .get(name)
            .ok_or_else(|| Refusal::bad_request(format!("invalid role name {name:?}")))?;
        let settings = &role.settings;
        settings.tokens.admit(request.peer)?;
        let host = self
            .host
            .as_deref()
            .ok_or_else(|| Refusal::routed(500, "could not load backend configuration"))?;
        let account = reviews
            .accounts
            .get(jwt)
            .ok_or_else(Refusal::invalid_token)?;
        if !matches(&settings.service_account_names, &account.name) {
            return Err(Refusal::new(403, "service account name not authorized"));
        }
        if !matches(&settings.service_account_namespaces, &account.namespace) {
            return Err(Refusal::new(403, "namespace not authorized"));
        }
        if host != REVIEWER_URL || reviews.reviewer == Reviewer::Down {
            return Err(Refusal::invalid_token());
        }
        let mut grant = settings.tokens.grant();
        grant.display_name = format!("{}-{}-{}", self.mount, account.namespace, account.name);
        grant.entity_id.clone_from(&role.entity_id);
        grant.path.clone_from(&request.path);
        grant.metadata = json!({
            "role": name,
            "service_account_name": account.name,
            "service_account_namespace": account.namespace,
            "service_account_secret_name": "",
            "service_account_uid": account.uid,
        });
        let id = ids.token();
        Ok(tokens.issue(id, grant, request.now, ids).into())
    }

    /// Answers requests below the mount other than logins.
    pub(super) fn handle(&mut self, path: &str, request: &Request, ids: &mut Ids) -> Outcome {
        let (area, name) = path.split_once('/').unwrap_or((path, ""));
        match (area, name, request.operation) {
            ("config", "", Operation::Write) => {
                reject_unsimulated(request, "pem_keys")?;
                let host = request.body.text("kubernetes_host");
                let host = host.filter(|host| !host.is_empty());
                let host = host.ok_or_else(|| Refusal::bad_request("no host provided"))?;
                self.host = Some(host.to_owned());
                Ok(Answer::Empty)
            }
            ("config", "", Operation::Read) => Err(Refusal::bad_request(
                "simulator: reading the kubernetes configuration is not simulated",
            )),
            ("role", "", Operation::List) if self.roles.is_empty() => Err(Refusal::missing()),
            ("role", "", Operation::List) => {
                let names: Vec<_> = self.roles.keys().collect();
                Ok(Logical::data(json!({ "keys": names })).into())
            }
            ("role", _, Operation::Delete) if !name.is_empty() => {
                self.roles.remove(name);
                Ok(Answer::Empty)
            }
            ("role", _, Operation::Read) if !name.is_empty() => {
                let role = self.roles.get(name).ok_or_else(Refusal::missing)?;
                let settings = &role.settings;
                let data = json!({
                    "bound_service_account_names": settings.service_account_names,
                    "bound_service_account_namespaces": settings.service_account_namespaces,
                });
                Ok(Logical::data(extend(data, settings.tokens.describe())).into())
            }
            ("role", _, Operation::Write) if !name.is_empty() => {
                self.write_role(name, request, ids)
            }
            ("config", "", _) | ("role", _, _) => Err(Refusal::unsupported_operation()),
            _ => Err(Refusal::unsupported_path()),
        }
    }

    fn write_role(&mut self, name: &str, request: &Request, ids: &mut Ids) -> Outcome {
        reject_unsimulated(request, "bound_service_account_namespace_selector")?;
        let body = &request.body;
        let old = self.roles.get(name).map(|role| &role.settings);
        let bound = |field: &str, old: Option<&Vec<String>>, when: &str| {
            let texts = body.texts(field).or_else(|| old.cloned());
            texts
                .filter(|texts| !texts.is_empty())
                .ok_or_else(|| Refusal::bad_request(format!("{field:?} can not be empty{when}")))
        };
        let settings = KubernetesRole {
            service_account_names: bound(
                "bound_service_account_names",
                old.map(|old| &old.service_account_names),
                "",
            )?,
            service_account_namespaces: bound(
                "bound_service_account_namespaces",
                old.map(|old| &old.service_account_namespaces),
                " if \"bound_service_account_namespace_selector\" is not set",
            )?,
            tokens: TokenSettings::written(old.map(|old| &old.tokens), body)?,
        };
        self.set_role(name, settings, ids);
        Ok(Answer::Empty)
    }
}

/// Rejects a field that would change the server's behaviour but is not simulated.
fn reject_unsimulated(request: &Request, field: &str) -> Result<(), Refusal> {
    match request.body.get(field) {
        None => Ok(()),
        Some(_) => Err(Refusal::bad_request(format!(
            "simulator: {field} is not simulated"
        ))),
    }
}
