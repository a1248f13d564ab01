//! The state of both listeners, and the routing of requests.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderValue, Response};
use serde_json::{Value, json};

use super::answer::{Answer, Logical, Outcome, Refusal, response};
use super::auth::Auth;
use super::clock::Clock;
use super::denials::Denials;
use super::faults::{Faults, redirect};
use super::ids::Ids;
use super::kv::Kv;
use super::request::{Operation, Request};
use super::seal::{Init, Seal};
use super::tokens::{Grant, Tokens};
use super::wrapping::Wraps;
use super::{InitialState, Seen, Standby};
use crate::http::Received;

/// All state except the sockets.
pub(super) struct Core {
    pub(super) active: Node,
    pub(super) auth: Auth,
    pub(super) clock: Clock,
    pub(super) denials: Denials,
    pub(super) faults: Faults,
    pub(super) ids: Ids,
    pub(super) kv: BTreeMap<String, Kv>,
    /// Mounts of KV version 1, which contain nothing.
    pub(super) kv_v1: BTreeSet<String>,
    pub(super) listening: Listening,
    pub(super) policies: BTreeMap<String, Value>,
    pub(super) seal: Seal,
    pub(super) seen: Vec<Seen>,
    pub(super) standby: Standby,
    pub(super) tokens: Tokens,
    wraps: Wraps,
}

/// One of the two listeners.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Node {
    First,
    Second,
}

impl Node {
    pub(super) fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// The URLs of the nodes that are listening.
#[derive(Default)]
pub(super) struct Listening {
    first: Option<String>,
    second: Option<String>,
}

impl Listening {
    pub(super) fn set(&mut self, node: Node, url: Option<String>) {
        match node {
            Node::First => self.first = url,
            Node::Second => self.second = url,
        }
    }

    fn url(&self, node: Node) -> Option<&str> {
        match node {
            Node::First => self.first.as_deref(),
            Node::Second => self.second.as_deref(),
        }
    }
}

impl Core {
    pub(super) fn new(state: InitialState, standby: Standby) -> io::Result<Self> {
        let mut ids = Ids::new()?;
        let mut core = Self {
            active: Node::First,
            auth: Auth::default(),
            clock: Clock::default(),
            denials: Denials::default(),
            faults: Faults::default(),
            kv: BTreeMap::new(),
            kv_v1: BTreeSet::new(),
            listening: Listening::default(),
            policies: BTreeMap::new(),
            seal: Seal::uninitialised(&mut ids),
            seen: Vec::new(),
            standby,
            tokens: Tokens::default(),
            wraps: Wraps::default(),
            ids,
        };
        if let InitialState::Dev { root_token } = state {
            core.seal = Seal::dev(&mut core.ids);
            let root = Grant::root("auth/token/create", "token");
            core.issue(root_token, root);
        }
        Ok(core)
    }

    pub(super) fn now(&self) -> SystemTime {
        self.clock.now()
    }

    /// Adds a token without a request.
    pub(super) fn issue(&mut self, id: String, grant: Grant) {
        self.tokens
            .issue(id, grant, self.clock.now(), &mut self.ids);
    }

    /// Creates a renewable orphan token.
    pub(super) fn create_token(&mut self, ttl: Duration) -> String {
        let id = self.ids.token();
        let grant = Grant {
            display_name: "token".to_owned(),
            path: "auth/token/create".to_owned(),
            policies: vec!["default".to_owned()],
            renewable: true,
            ttl: Some(ttl),
            ..Grant::default()
        };
        self.issue(id.clone(), grant);
        id
    }

    /// Answers a request that arrived at `node`.
    pub(super) fn answer(&mut self, node: Node, received: &Received) -> Response<Bytes> {
        let mut answered = match Request::read(received, self.now()) {
            Err(refusal) => response(refusal.status, &refusal.body()),
            Ok(request) => self.answer_parsed(node, &request, received),
        };
        // The server returns the namespace header of the request.
        if let Some(namespace) = received.head.headers.get("x-vault-namespace") {
            let namespace = HeaderValue::clone(namespace);
            answered
                .headers_mut()
                .insert("x-vault-namespace", namespace);
        }
        answered
    }

    fn answer_parsed(
        &mut self,
        node: Node,
        request: &Request,
        received: &Received,
    ) -> Response<Bytes> {
        if node != self.active && !self.seal.sealed && needs_active(request) {
            match (self.standby, self.listening.url(self.active)) {
                (Standby::Redirects, Some(active)) => {
                    let uri = &received.head.uri;
                    let target = uri.path_and_query().map_or("/", |target| target.as_str());
                    return redirect(active, target);
                }
                (Standby::Forwards | Standby::None, Some(_)) => {}
                (_, None) => {
                    let problem = "local node not active but active cluster node not found";
                    return response(500, &Refusal::new(500, problem).body());
                }
            }
        }
        let outcome = match self.system(node, request) {
            Some(outcome) => outcome,
            None => self.logical(request),
        };
        match outcome {
            Err(refusal) => response(refusal.status, &refusal.body()),
            Ok(Answer::Empty) => response(204, &Value::Null),
            Ok(Answer::Plain(status, body)) => response(status, &body),
            Ok(Answer::Logical(answer)) => {
                let status = answer.status;
                response(status, &answer.envelope(&self.ids.uuid()))
            }
        }
    }

    /// Answers requests that need no token and no unsealed server; `None` for all others.
    fn system(&mut self, node: Node, request: &Request) -> Option<Outcome> {
        let in_namespace = request.namespace.is_some();
        match request.path.as_str() {
            "sys/health" | "sys/init" | "sys/seal-status" | "sys/unseal" if in_namespace => Some(
                Err(Refusal::bad_request("operation unavailable in namespaces")),
            ),
            "sys/health" => Some(self.seal.health(node != self.active, request)),
            "sys/init" => Some(self.init(request)),
            "sys/seal-status" => Some(match request.operation {
                Operation::Read => Ok(Answer::Plain(200, self.seal.status())),
                _ => Err(Refusal::unsupported_operation()),
            }),
            "sys/unseal" => Some(self.seal.enter(request, &mut self.ids)),
            _ if self.seal.sealed => Some(Err(Refusal::new(503, "Vault is sealed"))),
            _ if in_namespace => Some(Err(Refusal::new(404, "namespace not found"))),
            _ => None,
        }
    }

    fn init(&mut self, request: &Request) -> Outcome {
        let body = match self.seal.init(request, &mut self.ids)? {
            Init::Status(status) => status,
            Init::Done { answer, root_token } => {
                self.issue(root_token, Grant::root("auth/token/root", "root"));
                answer
            }
        };
        Ok(Answer::Plain(200, body))
    }

    /// Answers requests that need an unsealed server.
    fn logical(&mut self, request: &Request) -> Outcome {
        self.tokens.sweep(request.now);
        self.wraps.sweep(request.now);
        match (request.path.as_str(), request.operation) {
            ("sys/wrapping/lookup", Operation::Read | Operation::Write) => {
                return self.wraps.lookup(request);
            }
            ("sys/wrapping/unwrap", Operation::Write) => {
                return self.wraps.unwrap(request, &mut self.tokens);
            }
            _ => {}
        }
        let login = self.auth.login(request, &mut self.tokens, &mut self.ids);
        let answer = match login {
            Some(outcome) => outcome?,
            None => self.authenticated(request)?,
        };
        Ok(match (answer, request.wrap_ttl) {
            (Answer::Logical(answer), Some(ttl)) if answer.status == 200 && !ttl.is_zero() => {
                self.wraps.wrap(answer, ttl, request, &mut self.ids)
            }
            (answer, _) => answer,
        })
    }

    fn authenticated(&mut self, request: &Request) -> Outcome {
        let token = request.token.as_deref().unwrap_or_default();
        if self.wraps.consume(token) {
            return Err(Refusal::denied());
        }
        self.tokens.authenticate(token, request.peer)?;
        let outcome = if self.denials.deny(token, &request.method, &request.path) {
            Err(Refusal::denied())
        } else {
            self.dispatch(token, request)
        };
        self.tokens.revoke_if_used_up(token);
        outcome
    }

    fn dispatch(&mut self, token: &str, request: &Request) -> Outcome {
        let path = request.path.as_str();
        if let Some(rest) = path.strip_prefix("sys/") {
            return self.sys(rest, request);
        }
        if let Some(rest) = path.strip_prefix("auth/token/") {
            if (rest, request.operation) == ("renew-self", Operation::Write) {
                self.auth.check_renewal(token, request, &self.tokens)?;
            }
            return self.tokens.handle(rest, token, request, &mut self.ids);
        }
        if let Some(rest) = path.strip_prefix("auth/")
            && let Some(outcome) = self.auth.handle(rest, request, &mut self.ids)
        {
            return outcome;
        }
        if path
            .split_once('/')
            .is_some_and(|(mount, _)| self.kv_v1.contains(mount))
        {
            return match request.operation {
                Operation::List | Operation::Read => Err(Refusal::missing()),
                _ => Err(Refusal::bad_request(
                    "simulator: writes to KV version 1 are not simulated",
                )),
            };
        }
        match below_mount(path, &mut self.kv) {
            Some((mount, rest)) => mount.handle(rest, request),
            None => Err(Refusal::no_route(path)),
        }
    }

    /// Answers requests below `sys/` that need a token.
    fn sys(&mut self, path: &str, request: &Request) -> Outcome {
        let (area, name) = path.split_once('/').unwrap_or((path, ""));
        match (area, name, request.operation) {
            ("seal", "", Operation::Write) => {
                self.seal.close();
                Ok(Answer::Empty)
            }
            ("mounts", "", Operation::Read) => {
                let mounts = self.kv.keys().map(|mount| (mount, "kv"));
                Ok(describe_mounts(mounts))
            }
            ("mounts", _, Operation::Write) if !name.is_empty() => self.mount_kv(name, request),
            ("mounts", _, Operation::Delete) if !name.is_empty() => {
                self.kv.remove(name);
                Ok(Answer::Empty)
            }
            ("internal", _, Operation::Read) => self.describe_mount(name),
            ("auth", "", Operation::Read) => {
                let mounts = self.auth.mounts.iter();
                let mounts = mounts.map(|(mount, method)| (mount, method.kind()));
                Ok(describe_mounts(mounts))
            }
            ("auth", _, Operation::Write) if !name.is_empty() => self.auth.mount(name, request),
            ("auth", _, Operation::Delete) if !name.is_empty() => {
                self.auth.mounts.remove(name);
                Ok(Answer::Empty)
            }
            ("policies", _, operation) => match name
                .strip_prefix("acl")
                .map(|name| name.trim_start_matches('/'))
            {
                Some(name) => self.policy(name, operation, request),
                None => Err(Refusal::unsupported_path()),
            },
            ("seal" | "mounts" | "auth", _, _) => Err(Refusal::unsupported_operation()),
            _ => Err(Refusal::unsupported_path()),
        }
    }

    /// Answers `sys/internal/ui/mounts/<mount>`, from which clients learn the KV version. A real server returns the same
    /// error for a missing mount as for one that the token must not see.
    fn describe_mount(&self, name: &str) -> Outcome {
        let mount = name
            .strip_prefix("ui/mounts/")
            .map(|name| name.trim_end_matches('/'));
        let mount = mount.ok_or_else(Refusal::unsupported_path)?;
        let version = match mount {
            mount if self.kv.contains_key(mount) => "2",
            mount if self.kv_v1.contains(mount) => "1",
            _ => return Err(Refusal::denied()),
        };
        Ok(Logical::data(json!({
            "type": "kv", "path": format!("{mount}/"), "options": { "version": version },
        }))
        .into())
    }

    fn mount_kv(&mut self, name: &str, request: &Request) -> Outcome {
        let options = request.body.get("options");
        let version = options.and_then(|options| options.get("version"));
        let is_v2 = match request.body.text("type") {
            Some("kv") => version.and_then(Value::as_str) == Some("2"),
            Some("kv-v2") => true,
            _ => false,
        };
        if !is_v2 {
            return Err(Refusal::bad_request(
                "simulator: only KV version 2 is simulated",
            ));
        }
        if self.kv.contains_key(name) {
            return Err(Refusal::bad_request(format!(
                "path is already in use at {name}/"
            )));
        }
        self.kv.insert(name.to_owned(), Kv::default());
        Ok(Answer::Empty)
    }

    /// Stores and returns policies; they are not enforced.
    fn policy(&mut self, name: &str, operation: Operation, request: &Request) -> Outcome {
        match (name, operation) {
            ("", Operation::List | Operation::Read) => {
                let names: Vec<_> = self.policies.keys().collect();
                Ok(Logical::data(json!({ "keys": names })).into())
            }
            ("", _) => Err(Refusal::unsupported_operation()),
            (_, Operation::Read) => {
                let policy = self.policies.get(name).ok_or_else(Refusal::missing)?;
                Ok(Logical::data(json!({ "name": name, "policy": policy })).into())
            }
            (_, Operation::Write) => match request.body.get("policy") {
                Some(policy) if policy.is_string() => {
                    self.policies.insert(name.to_owned(), policy.clone());
                    Ok(Answer::Empty)
                }
                _ => Err(Refusal::bad_request(
                    "'policy' parameter not supplied or empty",
                )),
            },
            (_, Operation::Delete) => {
                self.policies.remove(name);
                Ok(Answer::Empty)
            }
            _ => Err(Refusal::unsupported_operation()),
        }
    }
}

/// Whether a standby cannot answer a request itself: every request except reads and those about its own state.
fn needs_active(request: &Request) -> bool {
    let state = ["sys/health", "sys/init", "sys/seal-status", "sys/unseal"];
    !matches!(request.operation, Operation::List | Operation::Read)
        && !state.contains(&request.path.as_str())
}

/// The mount with the longest name that is a prefix of `path`, and the rest of the path.
pub(super) fn below_mount<'a, 'b, T>(
    path: &'a str,
    mounts: &'b mut BTreeMap<String, T>,
) -> Option<(&'b mut T, &'a str)> {
    mounts
        .iter_mut()
        .filter_map(|(name, mount)| {
            let rest = path.strip_prefix(name.as_str())?.strip_prefix('/')?;
            Some((mount, rest))
        })
        .min_by_key(|(_, rest)| rest.len())
}

fn describe_mounts<'a>(mounts: impl Iterator<Item = (&'a String, &'a str)>) -> Answer {
    let mounts: serde_json::Map<_, _> = mounts
        .map(|(name, kind)| {
            let options = if kind == "kv" {
                json!({ "version": "2" })
            } else {
                Value::Null
            };
            let mount = json!({ "type": kind, "description": "", "options": options });
            (format!("{name}/"), mount)
        })
        .collect();
    Logical::data(Value::Object(mounts)).into()
}
