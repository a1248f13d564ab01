//! The simulated Vault: the part of Vault and `OpenBao` that credbroker uses, with the answers of `OpenBao` 2.6.2.
//!
//! They were recorded in `tests/vectors/vault-transcripts.json`. Policies are stored but not enforced: a token is valid,
//! invalid, or denied on paths that a test lists. Not simulated: transit, quotas, batch tokens. Errors for requests that
//! are not simulated begin with `simulator:`.

mod answer;
mod approle;
mod auth;
mod certs;
mod cidr;
mod clock;
mod control;
mod core;
mod denials;
mod faults;
mod ids;
mod kubernetes;
mod kv;
mod program;
mod request;
mod roles;
mod seal;
mod tls;
mod tokens;
mod wrapping;
mod x509;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::net::TcpSocket;

pub use self::approle::RoleSettings;
pub use self::certs::{CaError, CertRole};
pub use self::faults::{Fault, FaultRule};
pub use self::kubernetes::{KubernetesRole, REVIEWER_URL, Reviewer, ServiceAccount};
pub use self::program::{VaultArgs, serve};
pub use self::roles::TokenSettings;
pub use self::tls::asking_for_certificates;

use self::approle::Approle;
use self::auth::Method;
use self::certs::Certs;
use self::core::{Core, Node};
use self::kubernetes::Kubernetes;
use crate::http::{Received, Reply, Server};
use crate::pki::Identity;

/// A running simulator. Clones share it; it stops listening when the last one is dropped.
#[derive(Clone)]
pub struct VaultSim {
    inner: Arc<Inner>,
}

struct Inner {
    core: Arc<Mutex<Core>>,
    first: SocketAddr,
    second: Option<SocketAddr>,
    sockets: tokio::sync::Mutex<Sockets>,
    tls: Option<Arc<rustls::ServerConfig>>,
}

/// The open sockets.
struct Sockets {
    /// `None` while stopped.
    first: Option<Server>,
    /// While stopped: a socket that is bound but not listening. It keeps the port; connections are refused.
    reserved: Option<TcpSocket>,
    /// The second listener, kept open until the simulator is dropped.
    _second: Option<Server>,
}

/// The settings of a simulator.
#[derive(Clone, Debug)]
pub struct VaultSettings {
    /// Address to listen on; must be loopback. Port 0: the system picks one.
    pub address: SocketAddr,
    /// Whether to start a second listener, and what it does with requests for the active node.
    pub standby: Standby,
    /// State at the start.
    pub state: InitialState,
    /// TLS for both listeners; `None`: plain HTTP.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

impl Default for VaultSettings {
    /// A dev server with the root token `sim-root`, plain HTTP on a free port, no standby.
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            standby: Standby::None,
            state: InitialState::Dev {
                root_token: "sim-root".to_owned(),
            },
            tls: None,
        }
    }
}

/// State at the start.
#[derive(Clone, Debug)]
pub enum InitialState {
    /// Initialised and unsealed, nothing mounted.
    Dev {
        /// The root token.
        root_token: String,
    },
    /// Storage "file", not yet initialised; sealed after each restart.
    File,
}

/// The second listener. It shares all state with the first, including the seal. A standby answers reads itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Standby {
    /// Logins, renewals and writes are forwarded to the active node.
    Forwards,
    /// There is no second listener.
    None,
    /// Logins, renewals and writes are redirected to the active node with status 307.
    Redirects,
}

/// A received request, without token and body.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Seen {
    /// The method, which can be `LIST`.
    pub method: String,
    /// The path as sent, including `/v1/`.
    pub path: String,
    /// The query as sent.
    pub query: Option<String>,
    /// The status of the answer; `None` if no answer was sent (yet).
    pub status: Option<u16>,
}

impl VaultSim {
    /// Starts an initialised and unsealed server on a free loopback port, without any mount.
    pub async fn start_dev(root_token: &str) -> io::Result<Self> {
        let state = InitialState::Dev {
            root_token: root_token.to_owned(),
        };
        Self::start(VaultSettings {
            state,
            ..VaultSettings::default()
        })
        .await
    }

    /// As [`start_dev`](Self::start_dev), but with TLS and the certificate of `server`. It requests a client certificate
    /// and accepts any, or none; a certificate login requires one that its role trusts.
    pub async fn start_dev_tls(root_token: &str, server: &Identity) -> io::Result<Self> {
        let state = InitialState::Dev {
            root_token: root_token.to_owned(),
        };
        let tls = asking_for_certificates(server);
        Self::start(VaultSettings {
            state,
            tls: Some(tls.map_err(io::Error::other)?),
            ..VaultSettings::default()
        })
        .await
    }

    /// Starts one listener, or two with shared state.
    ///
    /// Fails if the address is not loopback or cannot be bound, or if the system provides no randomness.
    pub async fn start(settings: VaultSettings) -> io::Result<Self> {
        let VaultSettings {
            address,
            standby,
            state,
            tls,
        } = settings;
        let core = Arc::new(Mutex::new(Core::new(state, standby)?));
        let first = listen(address, tls.clone(), &core, Node::First).await?;
        let second = match standby {
            Standby::None => None,
            Standby::Forwards | Standby::Redirects => {
                let address = SocketAddr::new(address.ip(), 0);
                Some(listen(address, tls.clone(), &core, Node::Second).await?)
            }
        };
        let sim = Self {
            inner: Arc::new(Inner {
                core,
                first: first.address(),
                second: second.as_ref().map(Server::address),
                sockets: tokio::sync::Mutex::new(Sockets {
                    first: Some(first),
                    reserved: None,
                    _second: second,
                }),
                tls,
            }),
        };
        let mut core = sim.core();
        core.listening.set(Node::First, Some(sim.address()));
        core.listening.set(Node::Second, sim.standby_address());
        drop(core);
        Ok(sim)
    }

    /// URL of the first listener.
    pub fn address(&self) -> String {
        self.inner.url(self.inner.first)
    }

    /// URL of the second listener, if there is one.
    pub fn standby_address(&self) -> Option<String> {
        self.inner.second.map(|address| self.inner.url(address))
    }

    /// Makes the other listener the active node.
    pub fn fail_over(&self) {
        let mut core = self.core();
        core.active = core.active.other();
    }

    /// Closes the first listener and its connections: new connections are refused. Keeps storage and port.
    pub async fn stop(&self) -> io::Result<()> {
        self.stopped().await.map(drop)
    }

    /// Stops if running, and listens again at the same address. With storage "file" the server is then sealed.
    pub async fn restart(&self) -> io::Result<()> {
        let mut sockets = self.stopped().await?;
        let inner = &self.inner;
        let server = listen(inner.first, inner.tls.clone(), &inner.core, Node::First).await?;
        sockets.first = Some(server);
        sockets.reserved = None;
        let mut core = self.core();
        core.listening.set(Node::First, Some(self.address()));
        if core.seal.file {
            core.seal.close();
        }
        Ok(())
    }

    async fn stopped(&self) -> io::Result<tokio::sync::MutexGuard<'_, Sockets>> {
        let mut sockets = self.inner.sockets.lock().await;
        self.core().listening.set(Node::First, None);
        sockets.first = None;
        if sockets.reserved.is_none() {
            sockets.reserved = Some(reserve(self.inner.first).await?);
        }
        Ok(sockets)
    }

    /// Seals the server.
    pub fn seal(&self) {
        self.core().seal.close();
    }

    /// Unseals the server without keys, if it is initialised.
    pub fn unseal(&self) {
        self.core().seal.open();
    }

    /// Mounts KV version 2; does nothing if the mount exists.
    pub fn mount_kv(&self, mount: &str) {
        self.core().kv.entry(mount.to_owned()).or_default();
    }

    /// Mounts KV version 1: every read returns 404, as for a missing key.
    pub fn mount_kv_v1(&self, mount: &str) {
        self.core().kv_v1.insert(mount.to_owned());
    }

    /// Writes a version without check-and-set and returns its number. Creates the mount if needed.
    pub fn put_secret(&self, mount: &str, path: &str, data: Value) -> u64 {
        let mut core = self.core();
        let now = core.now();
        let kv = core.kv.entry(mount.to_owned()).or_default();
        kv.put(path, data, now).0
    }

    /// Replaces the custom metadata of a path. Creates the mount and the path if needed.
    pub fn set_custom_metadata(&self, mount: &str, path: &str, custom: BTreeMap<String, String>) {
        let mut core = self.core();
        let now = core.now();
        let kv = core.kv.entry(mount.to_owned()).or_default();
        kv.set_custom_metadata(path, custom, now);
    }

    /// Soft-deletes the newest version.
    pub fn delete_latest(&self, mount: &str, path: &str) {
        let mut core = self.core();
        let now = core.now();
        if let Some(kv) = core.kv.get_mut(mount) {
            kv.delete_latest(path, now);
        }
    }

    /// Deletes a path with all its versions; the next version is 1.
    pub fn delete_metadata(&self, mount: &str, path: &str) {
        if let Some(kv) = self.core().kv.get_mut(mount) {
            kv.delete_metadata(path);
        }
    }

    /// Mounts `AppRole` at `auth/approle` if needed, creates or replaces a role, and returns its `role_id` and a
    /// `secret_id`.
    pub fn enable_approle(&self, role: &str, settings: RoleSettings) -> (String, String) {
        let mut core = self.core();
        let now = core.now();
        let Core { auth, ids, .. } = &mut *core;
        let mut approle = match auth.mounts.remove("approle") {
            Some(Method::Approle(approle)) => approle,
            _ => Approle::new("approle", now),
        };
        let logins = approle.set_role(role, settings, now, ids);
        let approle = Method::Approle(approle);
        auth.mounts.insert("approle".to_owned(), approle);
        logins
    }

    /// Mounts certificate logins at `auth/<mount>` if needed, and creates or replaces a role. Logins require a server that
    /// requests client certificates: [`start_dev_tls`](Self::start_dev_tls).
    ///
    /// Fails if a CA of the role cannot be read or is not a CA.
    pub fn enable_cert(&self, mount: &str, role: &str, settings: CertRole) -> Result<(), CaError> {
        let mut core = self.core();
        let Core { auth, ids, .. } = &mut *core;
        let mut certs = match auth.mounts.remove(mount) {
            Some(Method::Cert(certs)) => certs,
            _ => Certs::new(mount),
        };
        let result = certs.set_role(role, settings, ids);
        auth.mounts.insert(mount.to_owned(), Method::Cert(certs));
        result
    }

    /// Mounts Kubernetes logins at `auth/<mount>` if needed, with the simulator's own reviewer, and creates or replaces a
    /// role. [`accept_jwt`](Self::accept_jwt) adds a JWT that can log in.
    pub fn enable_kubernetes(&self, mount: &str, role: &str, settings: KubernetesRole) {
        let mut core = self.core();
        let Core { auth, ids, .. } = &mut *core;
        let mut kubernetes = match auth.mounts.remove(mount) {
            Some(Method::Kubernetes(kubernetes)) => kubernetes,
            _ => Kubernetes::new(mount),
        };
        kubernetes.use_reviewer();
        kubernetes.set_role(role, settings, ids);
        let kubernetes = Method::Kubernetes(kubernetes);
        auth.mounts.insert(mount.to_owned(), kubernetes);
    }

    /// Makes the reviewer accept `jwt`, which can be any text, as the JWT of a service account.
    pub fn accept_jwt(&self, jwt: &str, account: ServiceAccount) {
        let mut core = self.core();
        core.auth.reviews.accounts.insert(jwt.to_owned(), account);
    }

    /// Makes the reviewer reject `jwt`, as if it had expired. Tokens from earlier logins stay valid.
    pub fn refuse_jwt(&self, jwt: &str) {
        self.core().auth.reviews.accounts.remove(jwt);
    }

    /// Turns the reviewer on or off.
    pub fn set_reviewer(&self, reviewer: Reviewer) {
        self.core().auth.reviews.reviewer = reviewer;
    }

    /// Creates a renewable orphan token with the policy `default` and no explicit maximum TTL.
    pub fn create_token(&self, ttl: Duration) -> String {
        self.core().create_token(ttl)
    }

    /// Revokes a token and its children.
    pub fn revoke_token(&self, token: &str) {
        self.core().tokens.revoke(token);
    }

    /// Every valid token, for tests that search for leaks.
    pub fn tokens(&self) -> Vec<String> {
        self.core().tokens.ids().map(ToOwned::to_owned).collect()
    }

    /// Denies requests as a policy would: 403 for `token` (`None`: any valid token) with `method` (`None`: any) at `path`;
    /// `*` at the end of `path` denies every path with that prefix.
    pub fn deny(&self, token: Option<&str>, method: Option<&str>, path: &str) {
        self.core().denials.add(token, method, path);
    }

    /// Removes the denial that was added with exactly these arguments.
    pub fn remove_denial(&self, token: Option<&str>, method: Option<&str>, path: &str) {
        self.core().denials.remove(token, method, path);
    }

    /// Moves the clock ahead. It determines when tokens, wrapped answers and secret ids expire, and the times of versions.
    pub fn advance_clock(&self, by: Duration) {
        self.core().clock.advance(by);
    }

    /// Stops the clock; then only [`advance_clock`](Self::advance_clock) moves it.
    pub fn stop_clock(&self) {
        self.core().clock.stop();
    }

    /// Adds a fault.
    pub fn fault(&self, rule: FaultRule) {
        self.core().faults.add(rule);
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        self.core().faults.clear();
    }

    /// All requests so far, to both listeners, in the order of arrival; without those to `/_sim/`.
    pub fn requests(&self) -> Vec<Seen> {
        self.core().seen.clone()
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.inner.core)
    }
}

impl fmt::Debug for VaultSim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VaultSim").field(&self.address()).finish()
    }
}

impl Inner {
    fn url(&self, address: SocketAddr) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{address}")
    }
}

/// Locks; ignores poisoning, so that the panic of the test itself is the one that is reported.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn listen(
    address: SocketAddr,
    tls: Option<Arc<rustls::ServerConfig>>,
    core: &Arc<Mutex<Core>>,
    node: Node,
) -> io::Result<Server> {
    let core = Arc::clone(core);
    Server::start(address, tls, move |received| {
        let core = Arc::clone(&core);
        async move { reply(&core, node, &received).await }
    })
    .await
}

/// Binds the port of a server that has just been dropped; retries until the runtime has dropped the server's task.
async fn reserve(address: SocketAddr) -> io::Result<TcpSocket> {
    const PATIENCE: Duration = Duration::from_secs(5);
    let free = async {
        loop {
            let socket = if address.is_ipv4() {
                TcpSocket::new_v4()?
            } else {
                TcpSocket::new_v6()?
            };
            socket.set_reuseaddr(true)?;
            match socket.bind(address) {
                Ok(()) => return Ok(socket),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    tokio::task::yield_now().await;
                }
                Err(error) => return Err(error),
            }
        }
    };
    tokio::time::timeout(PATIENCE, free).await?
}

/// Answers one request: a control request, a fault, or as Vault would.
async fn reply(core: &Mutex<Core>, node: Node, received: &Received) -> Reply {
    let head = &received.head;
    let target = head
        .uri
        .path_and_query()
        .map_or("/", |target| target.as_str());
    let (at, fault) = {
        let mut core = lock(core);
        if let Some(answer) = control::control(&mut core, received) {
            return answer.into();
        }
        core.seen.push(Seen {
            method: head.method.to_string(),
            path: head.uri.path().to_owned(),
            query: head.uri.query().map(str::to_owned),
            status: None,
        });
        let fault = core.faults.hit(head.method.as_str(), head.uri.path());
        (core.seen.len() - 1, fault)
    };
    let reply = if let Some(reply) = fault.as_ref().and_then(|fault| fault.replacement(target)) {
        reply
    } else {
        execute(core, node, received, fault).await
    };
    let status = match &reply {
        Reply::Answer(response) | Reply::CutShort(response, _) => Some(response.status().as_u16()),
        Reply::Close | Reply::Hang | Reply::Raw(_) => None,
    };
    if let Some(seen) = lock(core).seen.get_mut(at) {
        seen.status = status;
    }
    reply
}

/// Executes the request; with a fault, the answer is late or damaged.
async fn execute(
    core: &Mutex<Core>,
    node: Node,
    received: &Received,
    fault: Option<Fault>,
) -> Reply {
    let Some(fault) = fault else {
        return lock(core).answer(node, received).into();
    };
    tokio::time::sleep(fault.delay()).await;
    let mut core = lock(core);
    let token = received.head.headers.get("x-vault-token");
    if let (Fault::ExpireToken, Some(token)) = (&fault, token) {
        core.tokens
            .revoke(token.to_str().unwrap_or_default().trim());
    }
    fault.damage(core.answer(node, received))
}
