//! A Vault over its HTTP API, real or simulated, as an admin uses it.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use credbroker_sim::vault::{Fault, FaultRule, VaultSim};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{ROOT_TOKEN, until};

/// An HTTP server on plain TCP, and the token to show it.
pub(super) struct Api {
    pub(super) url: String,
    token: String,
}

impl Api {
    pub(super) fn new(url: &str, token: &str) -> Self {
        Self {
            url: url.trim_end_matches('/').to_owned(),
            token: token.to_owned(),
        }
    }

    /// One request; status and body. Status 0: no answer.
    pub(super) async fn raw(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> (u16, String) {
        self.exchange(method, path, "", body).await
    }

    /// One request below `/v1/` whose answer Vault wraps for `ttl`.
    pub(super) async fn wrapped(&self, method: &str, path: &str, ttl: &str) -> Value {
        let more = format!("x-vault-wrap-ttl: {ttl}\r\n");
        let (status, answer) = self
            .exchange(method, &format!("/v1/{path}"), &more, None)
            .await;
        assert_eq!(status, 200, "{method} {path}: {answer}");
        serde_json::from_str(&answer).unwrap()
    }

    /// `more`: further header lines.
    async fn exchange(
        &self,
        method: &str,
        path: &str,
        more: &str,
        body: Option<&Value>,
    ) -> (u16, String) {
        let host = self
            .url
            .strip_prefix("http://")
            .expect("only http:// is spoken here");
        let body = body.map(Value::to_string).unwrap_or_default();
        // HTTP/1.0, so that the answer ends with the connection.
        let request = format!(
            "{method} {path} HTTP/1.0\r\nhost: {host}\r\nx-vault-token: {}\r\n{more}content-length: {}\r\n\r\n{body}",
            self.token,
            body.len(),
        );
        let mut answer = String::new();
        let exchange = async {
            let mut stream = TcpStream::connect(host).await?;
            stream.write_all(request.as_bytes()).await?;
            stream.read_to_string(&mut answer).await
        };
        if exchange.await.is_err() {
            return (0, String::new());
        }
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (
            head.split(' ').nth(1).unwrap().parse().unwrap(),
            body.to_owned(),
        )
    }

    /// One request below `/v1/` that must succeed; the JSON of its answer. A body of null is none.
    pub(super) async fn call(&self, method: &str, path: &str, body: Value) -> Value {
        let body = Some(body).filter(|body| !body.is_null());
        let (status, answer) = self
            .raw(method, &format!("/v1/{path}"), body.as_ref())
            .await;
        assert!(
            (200..300).contains(&status),
            "{method} {path}: {status} {answer}"
        );
        serde_json::from_str(&answer).unwrap_or_default()
    }
}

/// A Vault under test.
pub(super) struct Backend {
    pub(super) api: Api,
    /// Name of everything that the test mounts and writes, so that a server can be used twice.
    pub(super) name: String,
    kind: Kind,
}

enum Kind {
    /// A dev server of our own.
    Dev(Dev),
    /// Somebody's dev server; we have no key to unseal it.
    Given,
    Sim(VaultSim),
}

/// A dev server; it ends with the test.
struct Dev {
    process: Child,
    unseal_key: String,
    _home: TempDir,
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Backend {
    pub(super) fn simulated(vault: &VaultSim) -> Self {
        Self::new(
            Api::new(&vault.address(), ROOT_TOKEN),
            Kind::Sim(vault.clone()),
        )
    }

    /// The server that the environment names, or a dev server of the program that PATH has, or none.
    pub(super) async fn real() -> Option<Self> {
        let text = |name: &str| std::env::var_os(name).map(|value| value.into_string().unwrap());
        if let Some(address) = text("CREDBROKER_TEST_VAULT_ADDR") {
            let token = text("CREDBROKER_TEST_VAULT_TOKEN")
                .expect("CREDBROKER_TEST_VAULT_TOKEN is needed too");
            return Some(Self::new(Api::new(&address, &token), Kind::Given));
        }
        let path = std::env::var_os("PATH")?;
        let mut programs = std::env::split_paths(&path)
            .flat_map(|folder| ["bao", "vault"].map(|name| folder.join(name)));
        Some(Self::dev(programs.find(|program| program.is_file())?).await)
    }

    async fn dev(program: PathBuf) -> Self {
        let home = tempfile::tempdir().unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let output = home.path().join("output");
        let mut command = Command::new(program);
        command.args(["server", "-dev", "-dev-no-store-token"]);
        command.arg(format!("-dev-root-token-id={ROOT_TOKEN}"));
        command.arg(format!("-dev-listen-address={address}"));
        let is_own = |name: &OsStr| {
            let name = name.to_string_lossy();
            name.starts_with("VAULT_") || name.starts_with("BAO_")
        };
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_own(name)) {
            command.env_remove(name);
        }
        let process = command
            .env("HOME", home.path())
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&output).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut dev = Dev {
            process,
            unseal_key: String::new(),
            _home: home,
        };
        let unseal_key = || {
            let output = std::fs::read_to_string(&output).unwrap();
            let key = output
                .lines()
                .find_map(|line| line.strip_prefix("Unseal Key: "));
            key.map(|key| key.trim().to_owned())
        };
        until("the dev server prints its unseal key", async || {
            unseal_key().is_some()
        })
        .await;
        dev.unseal_key = unseal_key().unwrap();
        let api = Api::new(&format!("http://{address}"), ROOT_TOKEN);
        until("the dev server is up", async || {
            api.raw("GET", "/v1/sys/health", None).await.0 == 200
        })
        .await;
        Self::new(api, Kind::Dev(dev))
    }

    fn new(api: Api, kind: Kind) -> Self {
        let name = format!("credbroker-test-{:08x}", fastrand::u32(..));
        Self { api, name, kind }
    }

    pub(super) fn is_real(&self) -> bool {
        !matches!(self.kind, Kind::Sim(_))
    }

    /// Takes a policy into force. The simulator only keeps it: there, these paths are denied besides.
    pub(super) async fn set_policy(&self, policy: &str, denied: &[&str]) {
        let path = format!("sys/policies/acl/{}", self.name);
        self.api
            .call("PUT", &path, json!({ "policy": policy }))
            .await;
        if let Kind::Sim(vault) = &self.kind {
            for area in ["data", "metadata"] {
                for account in ["main", "other"] {
                    let path = format!("{}/{area}/kucoin/prod/{account}/*", self.name);
                    vault.allow_again(None, Some("GET"), &path);
                    if denied.contains(&account) {
                        vault.deny(None, Some("GET"), &path);
                    }
                }
            }
        }
    }

    /// Kills all tokens that logins gave out.
    pub(super) async fn revoke_logins(&self) {
        if let Kind::Sim(vault) = &self.kind {
            let path = format!("{}/metadata/kucoin/prod/main/", self.name);
            vault.fault(FaultRule::new(&path, Fault::ExpireToken).times(1));
        } else {
            let path = format!("sys/leases/revoke-prefix/auth/{}/login", self.name);
            self.api.call("PUT", &path, json!({})).await;
        }
    }

    /// Seals it; false where nobody could unseal it again.
    pub(super) async fn seal(&self) -> bool {
        if let Kind::Given = self.kind {
            let _ = writeln!(
                std::io::stderr(),
                "real Vault: sealing not run, the server is not ours"
            );
            return false;
        }
        self.api.call("PUT", "sys/seal", json!({})).await;
        true
    }

    pub(super) async fn unseal(&self) {
        match &self.kind {
            Kind::Dev(dev) => {
                let status = self
                    .api
                    .call("PUT", "sys/unseal", json!({ "key": dev.unseal_key }))
                    .await;
                assert_eq!(status["sealed"], false, "{status}");
                until("the dev server is active", async || {
                    self.api.raw("GET", "/v1/sys/health", None).await.0 == 200
                })
                .await;
            }
            Kind::Given => {}
            Kind::Sim(vault) => vault.unseal(),
        }
    }

    /// Removes all that the test made.
    pub(super) async fn clean_up(&self) {
        for path in ["sys/mounts/", "sys/auth/", "sys/policies/acl/"] {
            self.api
                .call("DELETE", &format!("{path}{}", self.name), json!({}))
                .await;
        }
    }
}
