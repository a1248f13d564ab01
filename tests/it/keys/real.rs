//! A real or simulated Vault, and a client for its HTTP API.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use credbroker_sim::vault::{Fault, FaultRule, InitialState, Standby, VaultSettings, VaultSim};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::until;

/// Client of an HTTP server without TLS, with a Vault token.
#[derive(Clone)]
pub(crate) struct Api {
    pub(super) url: String,
    pub(super) token: String,
    /// Further header lines of each request.
    headers: String,
}

impl Api {
    pub(crate) fn new(url: &str, token: &str) -> Self {
        Self {
            url: url.trim_end_matches('/').to_owned(),
            token: token.to_owned(),
            headers: String::new(),
        }
    }

    /// The token that is sent with requests.
    pub(super) fn token(&self) -> &str {
        &self.token
    }

    /// The same server with another token.
    pub(super) fn with_token(&self, token: &str) -> Self {
        Self::new(&self.url, token)
    }

    /// The same server and token with one more header.
    pub(crate) fn with_header(&self, name: &str, value: &str) -> Self {
        let headers = format!("{}{name}: {value}\r\n", self.headers);
        Self {
            headers,
            ..self.clone()
        }
    }

    /// Sends one request; returns status and body. Status 0: no response.
    pub(super) async fn raw(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> (u16, String) {
        let host = self
            .url
            .strip_prefix("http://")
            .expect("expected an http:// URL");
        let body = body.map(Value::to_string).unwrap_or_default();
        // HTTP/1.0: the server closes the connection after the response.
        let request = format!(
            "{method} {path} HTTP/1.0\r\nhost: {host}\r\nx-vault-token: {}\r\n{}content-length: {}\r\n\r\n{body}",
            self.token,
            self.headers,
            body.len(),
        );
        let mut response = String::new();
        let exchange = async {
            let mut stream = TcpStream::connect(host).await?;
            stream.write_all(request.as_bytes()).await?;
            stream.read_to_string(&mut response).await
        };
        if exchange.await.is_err() {
            return (0, String::new());
        }
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        (
            head.split(' ').nth(1).unwrap().parse().unwrap(),
            body.to_owned(),
        )
    }

    /// Sends one request below `/v1/` that must succeed; returns the JSON of the response. `Null` sends no body.
    pub(crate) async fn call(&self, method: &str, path: &str, body: Value) -> Value {
        let body = Some(body).filter(|body| !body.is_null());
        let (status, response) = self
            .raw(method, &format!("/v1/{path}"), body.as_ref())
            .await;
        assert!(
            (200..300).contains(&status),
            "{method} {path}: {status} {response}"
        );
        serde_json::from_str(&response).unwrap_or_default()
    }
}

/// A Vault under test: initialised and unsealed; restarts keep its storage.
pub(super) struct Backend {
    pub(super) api: Api,
    /// Unique name of all mounts, roles and policies of the test, so that a server can be reused.
    pub(super) name: String,
    unseal_key: String,
    kind: Kind,
}

enum Kind {
    /// An external server; the test cannot unseal or restart it.
    External,
    Own(Box<Cluster>),
    Sim(VaultSim),
}

/// A server started by the test, with a standby after `add_standby`. Both are killed when dropped.
struct Cluster {
    program: PathBuf,
    first: Node,
    standby: Mutex<Option<Node>>,
}

/// One server process with its storage.
struct Node {
    process: Mutex<Child>,
    address: SocketAddr,
    home: TempDir,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Node {
    /// Starts a server with empty storage.
    fn new(program: &Path, name: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let free = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let [address, cluster] = free.map(|listener| listener.local_addr().unwrap());
        let data = home.path().join("data");
        std::fs::create_dir(&data).unwrap();
        // HashiCorp Vault locks its memory by default; OpenBao only warns about the unknown setting.
        let config = format!(
            "disable_mlock = true\napi_addr = \"http://{address}\"\ncluster_addr = \"https://{cluster}\"\n\
             storage \"raft\" {{\n  path = \"{}\"\n  node_id = \"{name}\"\n  performance_multiplier = 1\n}}\n\
             listener \"tcp\" {{\n  address = \"{address}\"\n  cluster_address = \"{cluster}\"\n  tls_disable = true\n}}\n",
            data.display(),
        );
        std::fs::write(home.path().join("server.hcl"), config).unwrap();
        Self {
            process: Mutex::new(Self::spawn(program, &home)),
            address,
            home,
        }
    }

    fn spawn(program: &Path, home: &TempDir) -> Child {
        let mut command = Command::new(program);
        command.arg("server").arg("-config");
        command.arg(home.path().join("server.hcl"));
        let is_for_server = |name: &OsStr| {
            let name = name.to_string_lossy();
            name.starts_with("VAULT_") || name.starts_with("BAO_")
        };
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_for_server(name)) {
            command.env_remove(name);
        }
        command
            .env("HOME", home.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn kill(&self) {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = process.kill();
        let _ = process.wait();
    }

    fn restart(&self, program: &Path) {
        self.kill();
        *self.process.lock().unwrap() = Self::spawn(program, &self.home);
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// The HTTP status of the server's health endpoint.
async fn health(api: &Api) -> u16 {
    api.raw("GET", "/v1/sys/health", None).await.0
}

const ACTIVE: u16 = 200;
const STANDBY: u16 = 429;
const UNINITIALISED: u16 = 501;
const SEALED: u16 = 503;

async fn until_health(api: &Api, expected: u16) {
    until(&format!("{} has health {expected}", api.url), async || {
        health(api).await == expected
    })
    .await;
}

impl Backend {
    pub(super) async fn simulated() -> Self {
        let vault = VaultSim::start(VaultSettings {
            state: InitialState::File,
            standby: Standby::Forwards,
            ..VaultSettings::default()
        });
        let vault = vault.await.unwrap();
        let url = vault.address();
        Self::initialised(&url, Kind::Sim(vault)).await
    }

    /// The server from the environment, else one started with the program on PATH, else none.
    pub(super) async fn real() -> Option<Self> {
        let text = |name: &str| std::env::var_os(name).map(|value| value.into_string().unwrap());
        if let Some(address) = text("CREDBROKER_TEST_VAULT_ADDR") {
            let token = text("CREDBROKER_TEST_VAULT_TOKEN")
                .expect("CREDBROKER_TEST_VAULT_TOKEN must be set too");
            let api = Api::new(&address, &token);
            return Some(Self::new(api, String::new(), Kind::External));
        }
        let path = std::env::var_os("PATH")?;
        let mut programs = std::env::split_paths(&path)
            .flat_map(|folder| ["bao", "vault"].map(|name| folder.join(name)));
        let program = programs.find(|program| program.is_file())?;
        let first = Node::new(&program, "first");
        let url = first.url();
        let cluster = Cluster {
            program,
            first,
            standby: Mutex::new(None),
        };
        Some(Self::initialised(&url, Kind::Own(Box::new(cluster))).await)
    }

    async fn initialised(url: &str, kind: Kind) -> Self {
        let anonymous = Api::new(url, "");
        until_health(&anonymous, UNINITIALISED).await;
        let shares = json!({ "secret_shares": 1, "secret_threshold": 1 });
        let made = anonymous.call("PUT", "sys/init", shares).await;
        let api = anonymous.with_token(made["root_token"].as_str().unwrap());
        let backend = Self::new(api, made["keys"][0].as_str().unwrap().to_owned(), kind);
        backend.unseal().await;
        backend
    }

    fn new(api: Api, unseal_key: String, kind: Kind) -> Self {
        Self {
            api,
            name: format!("credbroker-test-{:08x}", fastrand::u32(..)),
            unseal_key,
            kind,
        }
    }

    pub(super) fn is_real(&self) -> bool {
        !matches!(self.kind, Kind::Sim(_))
    }

    /// Whether the test can seal and stop it and add a standby.
    pub(super) fn is_ours(&self) -> bool {
        !matches!(self.kind, Kind::External)
    }

    /// Sets the policy. The simulator does not enforce policies: there, requests for the keys of `denied` accounts are denied instead.
    pub(super) async fn set_policy(&self, policy: &str, denied: &[&str]) {
        let path = format!("sys/policies/acl/{}", self.name);
        self.api
            .call("PUT", &path, json!({ "policy": policy }))
            .await;
        if let Kind::Sim(vault) = &self.kind {
            vault.remove_denial(None, Some("GET"), "auth/token/lookup-self");
            for area in ["data", "metadata"] {
                for account in ["main", "other"] {
                    let path = format!("{}/{area}/kucoin/prod/{account}/*", self.name);
                    vault.remove_denial(None, Some("GET"), &path);
                    if denied.contains(&account) {
                        vault.deny(None, Some("GET"), &path);
                    }
                }
            }
        }
    }

    /// Deletes the policy, including the right to look up the token itself.
    pub(super) async fn delete_policy(&self) {
        let path = format!("sys/policies/acl/{}", self.name);
        if let Kind::Sim(vault) = &self.kind {
            self.set_policy("", &["main", "other"]).await;
            vault.deny(None, Some("GET"), "auth/token/lookup-self");
        }
        self.api.call("DELETE", &path, json!({})).await;
    }

    /// Revokes all tokens from logins.
    pub(super) async fn revoke_logins(&self) {
        if let Kind::Sim(vault) = &self.kind {
            let path = format!("{}/metadata/kucoin/prod/main/", self.name);
            vault.fault(FaultRule::new(&path, Fault::ExpireToken).times(1));
        } else {
            let path = format!("sys/leases/revoke-prefix/auth/{}/login", self.name);
            self.api.call("PUT", &path, json!({})).await;
        }
    }

    pub(super) async fn seal(&self) {
        self.api.call("PUT", "sys/seal", json!({})).await;
    }

    pub(super) async fn unseal(&self) {
        unseal(&self.api, &self.unseal_key).await;
        until_health(&self.api, ACTIVE).await;
    }

    /// Kills the server; connections are refused from then on.
    pub(super) async fn stop(&self) {
        match &self.kind {
            Kind::External => {}
            Kind::Own(cluster) => cluster.first.kill(),
            Kind::Sim(vault) => vault.stop().await.unwrap(),
        }
    }

    /// Starts it again at the same address, sealed.
    pub(super) async fn restart(&self) {
        match &self.kind {
            Kind::External => {}
            Kind::Own(cluster) => cluster.first.restart(&cluster.program),
            Kind::Sim(vault) => vault.restart().await.unwrap(),
        }
        until_health(&self.api, SEALED).await;
    }

    /// Adds a voting standby. The simulator has one already.
    pub(super) async fn add_standby(&self) {
        if let Kind::Own(cluster) = &self.kind {
            let second = Node::new(&cluster.program, "second");
            self.join(&Api::new(&second.url(), "")).await;
            *cluster.standby.lock().unwrap() = Some(second);
        }
    }

    /// Makes the standby the active node; the node at `api` becomes the standby.
    pub(super) async fn fail_over(&self) {
        if let Kind::Sim(vault) = &self.kind {
            vault.fail_over();
        } else {
            self.api.call("PUT", "sys/step-down", json!({})).await;
        }
        until_health(&self.api, STANDBY).await;
        // A standby can forward a write only if there is an active node.
        until("there is an active node again", async || {
            let request = json!({ "ttl": "1s" });
            let path = "/v1/auth/token/create";
            self.api.raw("POST", path, Some(&request)).await.0 == 200
        })
        .await;
    }

    /// Makes an uninitialised server a voting standby.
    async fn join(&self, second: &Api) {
        until_health(second, UNINITIALISED).await;
        // It becomes a voter at the next autopilot round (every 10 s).
        let autopilot = "sys/storage/raft/autopilot/configuration";
        let settings = json!({ "server_stabilization_time": "1s" });
        self.api.call("POST", autopilot, settings).await;
        let leader = json!({ "leader_api_addr": self.api.url });
        let join = "sys/storage/raft/join";
        second.call("POST", join, leader).await;
        unseal(second, &self.unseal_key).await;
        until_health(second, STANDBY).await;
        until("the standby is a voter", async || {
            let path = "sys/storage/raft/configuration";
            let raft = self.api.call("GET", path, Value::Null).await;
            let servers = raft["data"]["config"]["servers"].as_array().unwrap();
            servers.iter().filter(|node| node["voter"] == true).count() == 2
        })
        .await;
    }

    /// Removes everything that the test created.
    pub(super) async fn clean_up(&self) {
        for path in ["sys/mounts/", "sys/auth/", "sys/policies/acl/"] {
            self.api
                .call("DELETE", &format!("{path}{}", self.name), json!({}))
                .await;
        }
    }
}

async fn unseal(api: &Api, key: &str) {
    api.call("PUT", "sys/unseal", json!({ "key": key })).await;
}
