//! The Vault token is sent only to configured servers, and environment variables change nothing.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use credbroker_sim::installation::ROOT_TOKEN;
use credbroker_sim::pki::{Ca, Identity};
use credbroker_sim::vault::{Fault, FaultRule, InitialState, VaultSettings, VaultSim};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::time::timeout;

use super::real::Api;
use super::{NO_ANSWER, Setup, key, put};
use crate::harness::{Lab, until};

/// A second Vault that accepts the same token and holds the key of `generation`, so a followed redirect would succeed.
async fn elsewhere(generation: u32) -> VaultSim {
    let vault = VaultSim::start_dev(ROOT_TOKEN).await.unwrap();
    put(&vault, "main", generation);
    vault
}

fn redirect_all(from: &VaultSim, to: &VaultSim) {
    from.fault(FaultRule::new("", Fault::Redirect { to: to.address() }));
}

#[tokio::test]
async fn redirect_to_an_unlisted_server_is_never_followed() {
    let elsewhere = elsewhere(2).await;
    let setup = Setup::new(&["main"]).await;
    redirect_all(&setup.vault, &elsewhere);
    let rig = setup.start().await;
    rig.until_not_ready("key main/main: waiting for Vault: Vault returned 307")
        .await;
    rig.vault().clear_faults();
    rig.lab.until_ready().await;
    redirect_all(rig.vault(), &elsewhere);
    rig.signs_until(1, "a poll was redirected", async || {
        rig.logs.count(&[NO_ANSWER, "Vault returned 307"]) >= 1
    })
    .await;
    assert_eq!(
        elsewhere.requests(),
        [],
        "the other server must receive no request"
    );
    rig.end().await;
}

#[tokio::test]
async fn redirect_to_a_listed_server_is_followed_only_once() {
    let (second, third) = (elsewhere(2).await, elsewhere(3).await);
    let mut setup = Setup::new(&["main"]).await;
    setup.more = format!(
        "redirects = [\"{}\", \"{}\"]",
        second.address(),
        third.address()
    );
    redirect_all(&setup.vault, &second);
    let rig = setup.ready().await;
    assert_eq!(rig.signer("main").await, Ok(key("main", 2).api_key));
    // The second server receives only requests that the first one redirected.
    assert!(second.requests().len() <= rig.vault().requests().len());

    redirect_all(&second, &third);
    rig.signs_until(2, "a poll was redirected twice", async || {
        rig.logs.count(&[NO_ANSWER, "Vault returned 307"]) >= 1
    })
    .await;
    assert_eq!(third.requests(), []);
    rig.end().await;
}

/// A simulated Vault that serves TLS with a certificate of `ca`.
async fn vault_with_tls(ca: &Ca) -> VaultSim {
    let Identity {
        certificate_pem,
        key_pem,
    } = ca.server().unwrap();
    let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let settings = VaultSettings {
        state: InitialState::Dev {
            root_token: ROOT_TOKEN.to_owned(),
        },
        tls: Some(Arc::new(tls)),
        ..VaultSettings::default()
    };
    VaultSim::start(settings).await.unwrap()
}

#[tokio::test]
async fn redirect_from_https_to_http_is_never_followed() {
    let downgraded = elsewhere(2).await;
    let ca = Ca::new("throw-away CA of a test").unwrap();
    let mut setup = Setup::on(vault_with_tls(&ca).await, &["main"]);
    setup.settings.ca = Some(ca);
    setup.more = format!(
        "roots = \"ca.pem\"\nredirects = [\"{}\"]",
        downgraded.address()
    );
    let rig = setup.ready().await;
    redirect_all(rig.vault(), &downgraded);
    rig.signs_until(1, "a poll was redirected", async || {
        rig.logs.count(&[NO_ANSWER, "Vault returned 307"]) >= 1
    })
    .await;
    assert_eq!(downgraded.requests(), []);
    rig.end().await;
}

#[tokio::test]
async fn vault_with_an_untrusted_certificate_receives_no_request() {
    let other_ca = Ca::new("another CA").unwrap();
    let mut setup = Setup::on(vault_with_tls(&other_ca).await, &["main"]);
    setup.more = "roots = \"ca.pem\"".to_owned();
    let rig = setup.start().await;
    rig.until_not_ready("key main/main: waiting for Vault: cannot reach Vault")
        .await;
    assert_eq!(rig.vault().requests(), []);
    rig.end().await;
}

#[tokio::test]
async fn configured_namespace_is_sent_and_an_unknown_namespace_is_reported() {
    let mut setup = Setup::new(&["main"]).await;
    setup.more = "namespace = \"nowhere\"".to_owned();
    let rig = setup.start().await;
    let reason = "key main/main: not available: Vault has no such mount or namespace (404: namespace not found)";
    rig.until_not_ready(reason).await;
    rig.end().await;
}

/// The `credbroker` program with a log file; killed when dropped.
pub(super) struct Program {
    child: Child,
    log: std::path::PathBuf,
}

impl Program {
    /// Starts it with the files of `lab` and waits until it is ready; `adjust` changes its environment.
    pub(super) async fn ready(lab: &Lab, adjust: impl FnOnce(&mut Command)) -> Self {
        let log = lab.path("log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_credbroker"));
        command
            .args(["serve", "--config"])
            .arg(lab.path("config.toml"));
        adjust(&mut command);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let program = Self { child, log };
        let ops = program.line("listening").await["ops"]
            .as_str()
            .unwrap()
            .to_owned();
        let ops = Api::new(&format!("http://{ops}"), "");
        until("the program is ready", async || {
            ops.raw("GET", "/readyz", None).await.0 == 200
        })
        .await;
        program
    }

    /// Stops it with SIGTERM, as systemd does, and returns its whole log.
    pub(super) async fn stop(mut self) -> String {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(sent.unwrap().success());
        let child = std::cell::RefCell::new(&mut self.child);
        until("the program exits", async || {
            child.borrow_mut().try_wait().unwrap().is_some()
        })
        .await;
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits for the JSON log line with this message and returns it.
    async fn line(&self, message: &str) -> Value {
        let find = || {
            let text = std::fs::read_to_string(&self.log).unwrap();
            let mut lines = text
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.find(|line| line["message"] == message)
        };
        until(&format!("it logs {message:?}"), async || find().is_some()).await;
        find().unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn proxy_and_vault_variables_in_the_environment_are_ignored() {
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let trap = format!("http://{}", proxy.local_addr().unwrap());
    let lab = Setup::new(&["main"]).await.install().await;
    let adjust = |command: &mut Command| {
        for name in [
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "VAULT_ADDR",
        ] {
            command.env(name, &trap);
        }
        for name in ["NO_PROXY", "no_proxy", "REQUEST_METHOD"] {
            command.env_remove(name);
        }
        command
            .env("VAULT_TOKEN", "simulated-token-from-the-environment")
            .env("VAULT_NAMESPACE", "nowhere");
    };
    let program = Program::ready(&lab, adjust).await;
    program.line("key loaded").await;
    // A request to the proxy would be waiting here.
    let connection = timeout(std::time::Duration::ZERO, proxy.accept()).await;
    assert!(
        connection.is_err(),
        "a request went to the proxy from the environment"
    );
}
