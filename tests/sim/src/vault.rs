//! The simulated Vault: what credbroker uses of Vault and `OpenBao`, answering as `OpenBao` 2.6.2 was recorded to.
//!
//! The recording is `tests/vectors/vault-transcripts.json`. Policies are kept but not enforced: a token is valid,
//! invalid, or denied on paths that a test lists. Left out: transit, quotas, batch tokens. Where a request asks for something left out, the error text begins with `simulator:`.

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

/// What holds the ports.
struct Sockets {
    /// None while stopped.
    first: Option<Server>,
    /// While stopped: bound but not listening, so that connections are refused and nobody else gets the port.
    reserved: Option<TcpSocket>,
    /// Kept for its drop: it listens as long as the simulator lives.
    _second: Option<Server>,
}

/// What to start.
#[derive(Clone, Debug)]
pub struct VaultSettings {
    /// Where to listen; loopback, port 0 lets the system pick one.
    pub address: SocketAddr,
    /// Whether there is a second listener, and what it does with requests for the active node.
    pub standby: Standby,
    /// What it finds at its start.
    pub state: InitialState,
    /// Speak TLS, with this certificate, on both listeners.
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
    /// Storage "file", not yet initialised; sealed again after each restart.
    File,
}

/// The second listener. It shares all state with the first, the seal included. A standby answers reads itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Standby {
    /// Logins, renewals and writes are forwarded to the active node.
    Forwards,
    /// There is no second listener.
    None,
    /// Logins, renewals and writes are answered 307 to the active node.
    Redirects,
}

/// A request that arrived. Tokens and bodies are not kept.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Seen {
    /// The method, `LIST` included.
    pub method: String,
    /// The path as sent, with `/v1/`.
    pub path: String,
    /// The query as sent.
    pub query: Option<String>,
    /// The status answered; none if no answer was sent (yet).
    pub status: Option<u16>,
}

impl VaultSim {
    /// Starts an initialised and unsealed server on a free loopback port, with nothing mounted.
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

    /// As [`start_dev`](Self::start_dev), but speaks TLS with the certificate of `server` and asks for a client
    /// certificate: any will do, and none too, until a certificate login wants one that its role trusts.
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

    /// Starts a server, or two over one state.
    ///
    /// Fails when the address is not loopback or cannot be bound, or the system gives no randomness.
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

    /// URL of the second listener.
    pub fn standby_address(&self) -> Option<String> {
        self.inner.second.map(|address| self.inner.url(address))
    }

    /// Makes the other listener the active node.
    pub fn fail_over(&self) {
        let mut core = self.core();
        core.active = core.active.other();
    }

    /// Closes the first listener and its connections: from now on connections are refused. Storage and port are kept.
    pub async fn stop(&self) -> io::Result<()> {
        self.stopped().await.map(drop)
    }

    /// Stops if need be and listens again at the same address. In the state "file" the server is then sealed.
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

    /// Seals.
    pub fn seal(&self) {
        self.core().seal.close();
    }

    /// Unseals without keys, if initialised.
    pub fn unseal(&self) {
        self.core().seal.open();
    }

    /// Mounts KV version 2; does nothing if it is there.
    pub fn mount_kv(&self, mount: &str) {
        self.core().kv.entry(mount.to_owned()).or_default();
    }

    /// Mounts KV version 1: every read of it is answered 404, as one of a key that is not there.
    pub fn mount_kv_v1(&self, mount: &str) {
        self.core().kv_v1.insert(mount.to_owned());
    }

    /// Writes a version, whatever check-and-set says, and returns its number. Mounts `mount` if needed.
    pub fn put_secret(&self, mount: &str, path: &str, data: Value) -> u64 {
        let mut core = self.core();
        let now = core.now();
        let kv = core.kv.entry(mount.to_owned()).or_default();
        kv.put(path, data, now).0
    }

    /// Replaces the custom metadata of a path. Mounts `mount` and makes the path if needed.
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

    /// Removes a path with all its versions; their numbers start again at 1.
    pub fn delete_metadata(&self, mount: &str, path: &str) {
        if let Some(kv) = self.core().kv.get_mut(mount) {
            kv.delete_metadata(path);
        }
    }

    /// Mounts `AppRole` at `auth/approle` if needed, makes or replaces a role, and returns its `role_id` and a
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

    /// Mounts certificate logins at `auth/<mount>` if needed, and makes or replaces a role. For logins to work the
    /// server must ask for certificates: [`start_dev_tls`](Self::start_dev_tls).
    ///
    /// Fails when the role's CAs cannot be read or are none.
    pub fn enable_cert(&self, mount: &str, role: &str, settings: CertRole) -> Result<(), CaError> {
        let mut core = self.core();
        let Core { auth, ids, .. } = &mut *core;
        let mut certs = match auth.mounts.remove(mount) {
            Some(Method::Cert(certs)) => certs,
            _ => Certs::new(mount),
        };
        let made = certs.set_role(role, settings, ids);
        auth.mounts.insert(mount.to_owned(), Method::Cert(certs));
        made
    }

    /// Mounts Kubernetes logins at `auth/<mount>` if needed, with the simulator's own reviewer, and makes or replaces
    /// a role. [`accept_jwt`](Self::accept_jwt) says who can log in.
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

    /// From now on the reviewer takes `jwt`, any text, for that of a service account.
    pub fn accept_jwt(&self, jwt: &str, account: ServiceAccount) {
        let mut core = self.core();
        core.auth.reviews.accounts.insert(jwt.to_owned(), account);
    }

    /// From now on the reviewer does not know `jwt`, as if it had expired. Tokens that it brought stay valid.
    pub fn refuse_jwt(&self, jwt: &str) {
        self.core().auth.reviews.accounts.remove(jwt);
    }

    /// Lets the reviewer answer from now on, or not.
    pub fn set_reviewer(&self, reviewer: Reviewer) {
        self.core().auth.reviews.reviewer = reviewer;
    }

    /// Makes a renewable token that dies with no other, has the policy `default` and no maximum of its own.
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

    /// Denies requests as a policy would: 403 for `token` (none: any valid one) with `method` (none: any) at `path`,
    /// or below it if it ends in `*`.
    pub fn deny(&self, token: Option<&str>, method: Option<&str>, path: &str) {
        self.core().denials.add(token, method, path);
    }

    /// Lifts a denial that was given in just these words.
    pub fn allow_again(&self, token: Option<&str>, method: Option<&str>, path: &str) {
        self.core().denials.remove(token, method, path);
    }

    /// Moves the clock ahead: times to live of tokens, wrapped answers and secret ids, times of versions.
    pub fn advance_clock(&self, by: Duration) {
        self.core().clock.advance(by);
    }

    /// Stops the clock, so that only [`advance_clock`](Self::advance_clock) moves it.
    pub fn stop_clock(&self) {
        self.core().clock.stop();
    }

    /// Does something wrong from now on.
    pub fn fault(&self, rule: FaultRule) {
        self.core().faults.add(rule);
    }

    /// Ends all faults.
    pub fn clear_faults(&self) {
        self.core().faults.clear();
    }

    /// Every request so far, in the order of arrival, at either listener; those to `/_sim/` are left out.
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

/// A test that panicked must not hide behind a poisoned lock.
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

/// Takes the port of a server that has just been dropped; its task gives it up only when the runtime gets to it.
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

/// Answers one request: control, fault, or what Vault would say.
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
    let reply = if let Some(reply) = fault.as_ref().and_then(|fault| fault.instead(target)) {
        reply
    } else {
        carry_out(core, node, received, fault).await
    };
    let status = match &reply {
        Reply::Answer(response) | Reply::CutShort(response, _) => Some(response.status().as_u16()),
        Reply::Close | Reply::Hang => None,
    };
    if let Some(seen) = lock(core).seen.get_mut(at) {
        seen.status = status;
    }
    reply
}

/// Answers as Vault would, but late or damaged if there is a fault.
async fn carry_out(
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
