//! The keys of all accounts come from Vault and follow it: read at start, changed, evicted, kept through outages.

/// Each situation on the simulator, and on a real server if there is one.
macro_rules! on_both {
    ($($situation:ident)*) => {
        mod simulated {
            $(#[tokio::test]
            async fn $situation() {
                super::$situation(&super::Stage::simulated().await).await;
            })*
        }

        mod real {
            $(#[tokio::test]
            async fn $situation() {
                if let Some(stage) = super::Stage::real().await {
                    super::$situation(&stage).await;
                    stage.clean_up().await;
                }
            })*
        }
    };
}

mod changes;
mod conformance;
mod forms;
mod guards;
mod hold;
mod login;
mod methods;
mod outages;
mod policies;
pub(crate) mod real;
pub(crate) mod register;
mod rotate;
mod stale;
mod start;
mod succession;
mod token_life;
mod trials;
mod wrapped;
mod write;

use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};

use credbroker::proto::{Method, Outcome, Scope};
use credbroker::telemetry::log_filter;
use credbroker_sim::kucoin::{KucoinSettings, KucoinSim, Limits, SimKey};
use credbroker_sim::pki::Ca;
use credbroker_sim::vault::{Seen, VaultSim};
use tonic::Code;
use tracing::subscriber::DefaultGuard;

use crate::harness::{
    Bot, Lab, MAIN_UID, ROOT_TOKEN, failure, kv_path, request, secret, until, write_private,
};

const TOKEN_FILE: &str = "method = \"token_file\"\nfile = \"token\"";

/// Where a broker listens that has not started.
const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// What the broker logs when Vault says nothing about a key.
const NO_ANSWER: &str = "keys cannot be refreshed; what is in memory serves on";

/// What it logs when Vault refuses its login, which says nothing about a key either.
const LOGIN_REFUSED: &str = "Vault refuses the broker's login; what is in memory serves on";

/// How the broker of a test reaches its Vault.
struct Setup {
    vault: VaultSim,
    /// The rules name one key `main` for each; bot `maker` may read.
    accounts: Vec<String>,
    /// `vault.address`, where it is not that of `vault`.
    address: Option<String>,
    /// Seconds between two polls.
    poll_s: u32,
    /// Limit for one request; long, so that a busy machine does not look like an outage.
    timeout_ms: u32,
    /// Further keys of `[vault]`.
    more: String,
    /// The table `[vault.auth]`.
    auth: String,
    /// Further files beside the configuration, or others in place of the usual ones: names and texts.
    files: Vec<(&'static str, String)>,
    /// Issues the certificates; `ca.pem` is its own.
    ca: Ca,
}

impl Setup {
    /// A simulated Vault that holds the first key of each account; its root token stands in the token file.
    async fn new(accounts: &[&str]) -> Self {
        let vault = VaultSim::start_dev(ROOT_TOKEN).await.unwrap();
        Self::on(vault, accounts)
    }

    fn on(vault: VaultSim, accounts: &[&str]) -> Self {
        vault.mount_kv("kv");
        for account in accounts {
            put(&vault, account, 1);
        }
        Self {
            vault,
            accounts: accounts.iter().map(|&account| account.to_owned()).collect(),
            address: None,
            poll_s: 1,
            timeout_ms: 5000,
            more: String::new(),
            auth: TOKEN_FILE.to_owned(),
            files: Vec::new(),
            ca: Ca::new("throw-away CA of a test").unwrap(),
        }
    }

    /// Starts the broker and waits until it has its keys.
    async fn ready(self) -> Rig {
        let rig = self.start().await;
        rig.lab.until_ready().await;
        rig
    }

    /// Starts the broker.
    async fn start(self) -> Rig {
        let mut lab = self.install().await;
        let logs = Logs::default();
        let writer = logs.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(log_filter("info").unwrap())
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        // Only for this thread: that of the test, and with it that of its whole broker.
        let guard = tracing::subscriber::set_default(subscriber);
        lab.start_broker().await;
        let bot = lab.bot("maker").await;
        Rig {
            lab,
            bot,
            logs,
            _guard: guard,
        }
    }

    /// Writes the broker's files; nothing is started but the simulators.
    async fn install(self) -> Lab {
        let kucoin = KucoinSim::start(KucoinSettings {
            limits: Limits::none(),
            ..KucoinSettings::default()
        });
        let kucoin = kucoin.await.unwrap();
        for account in &self.accounts {
            for generation in 1..=4 {
                kucoin.add_key(key(account, generation));
            }
        }
        let lab = Lab {
            vault: self.vault,
            kucoin,
            ca: self.ca,
            folder: tempfile::tempdir().unwrap(),
            server: None,
            process: None,
            road: None,
            grpc: NOWHERE,
            ops: NOWHERE,
            admin: NOWHERE,
            is_checked: true,
        };
        let identity = lab.ca.server().unwrap();
        let address = self.address.unwrap_or_else(|| lab.vault.address());
        let config = format!(
            "rules = \"rules.toml\"\nstate_dir = \"state\"\n\
             [listen]\ngrpc = \"127.0.0.1:0\"\nops = \"127.0.0.1:0\"\nadmin = \"127.0.0.1:0\"\n\
             [tls]\ncertificate = \"server.pem\"\nkey = \"server.key\"\nclient_ca = \"ca.pem\"\n\
             [vault]\naddress = \"{address}\"\npoll_s = {}\ntimeout_ms = {}\n{}\n[vault.auth]\n{}\n\
             [egress]\naddress = \"127.0.0.1\"\n\
             [exchange]\nspot = \"{}\"\nfutures = \"{}\"\n",
            self.poll_s,
            self.timeout_ms,
            self.more,
            self.auth,
            lab.kucoin.spot_url(),
            lab.kucoin.futures_url(),
        );
        let rules = self
            .accounts
            .iter()
            .fold(String::new(), |mut rules, account| {
                let _ = write!(
                    rules,
                    "[account.{account}]\nkey = {{ spot-margin = \"main\" }}\n\
                 [[grant]]\nbot = \"spiffe://demo.test/bot/maker\"\naccount = \"{account}\"\n\
                 scope = \"spot-margin\"\nallow = [\"public\", \"read\"]\n"
                );
                rules
            });
        for (name, text) in [
            ("server.pem", identity.certificate_pem.as_str()),
            ("server.key", &identity.key_pem),
            ("ca.pem", lab.ca.certificate_pem()),
            ("token", &format!("{ROOT_TOKEN}\n")),
            ("rules.toml", &rules),
            ("config.toml", &config),
        ] {
            std::fs::write(lab.path(name), text).unwrap();
        }
        for (name, text) in self.files {
            std::fs::write(lab.path(name), text).unwrap();
        }
        lab
    }
}

/// A running broker, its bot, and what it logs.
struct Rig {
    lab: Lab,
    bot: Bot,
    logs: Logs,
    _guard: DefaultGuard,
}

impl Rig {
    fn vault(&self) -> &VaultSim {
        &self.lab.vault
    }

    /// Sends one private read: the id of the KuCoin key that signed it, or what `KEY_UNAVAILABLE` says.
    async fn signer(&self, account: &str) -> Result<String, String> {
        let mut request = request(Scope::SpotMargin, Method::Get, "/api/v1/accounts", "");
        account.clone_into(&mut request.account);
        let status = match self.bot.clone().send(request).await {
            Ok(answer) => {
                assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
                let received = self.lab.kucoin.received();
                let key = received.last().unwrap().header("kc-api-key");
                return Ok(key.unwrap().to_owned());
            }
            Err(status) => status,
        };
        let (code, reason, outcome, _) = failure(&status);
        assert_eq!(
            (code, reason.as_str(), outcome.as_str()),
            (Code::FailedPrecondition, "KEY_UNAVAILABLE", "not_sent"),
            "{status:?}"
        );
        Err(status.message().to_owned())
    }

    /// The calls of `main` are signed with its key of this generation, until `condition` holds and once more after it.
    async fn serves_until<F>(&self, generation: u32, what: &str, condition: impl Fn() -> F)
    where
        F: Future<Output = bool>,
    {
        let expected = Ok(key("main", generation).api_key);
        until(what, async || {
            let held = condition().await;
            assert_eq!(self.signer("main").await, expected, "waiting for: {what}");
            held
        })
        .await;
    }

    /// Every call of `main` is signed, in the end with its key of this generation.
    async fn until_signed_with(&self, generation: u32) {
        let expected = key("main", generation).api_key;
        until(&format!("calls are signed with {expected}"), async || {
            self.signer("main").await.unwrap() == expected
        })
        .await;
    }

    /// The calls of `main` are refused at last, and the refusal holds `reason`.
    async fn until_evicted(&self, reason: &str) {
        until("the key is evicted", async || {
            self.signer("main").await.is_err()
        })
        .await;
        let told = self.signer("main").await.unwrap_err();
        let expected = "the key of account main for this scope is not available: ";
        assert!(
            told.starts_with(expected) && told.contains(reason),
            "{told}"
        );
    }

    /// The calls of `main` are signed again, with its key of this generation.
    async fn until_restored(&self, generation: u32) {
        until("the key is back", async || {
            self.signer("main").await.is_ok()
        })
        .await;
        assert_eq!(
            self.signer("main").await,
            Ok(key("main", generation).api_key)
        );
    }

    /// `/readyz` is 503 at last, and its text holds `reason`.
    async fn until_not_ready(&self, reason: &str) {
        until(&format!("/readyz is 503 and says: {reason}"), async || {
            let (status, text) = self.lab.get("/readyz").await;
            status == 503 && text.contains(reason)
        })
        .await;
    }

    /// Stops the broker and checks its record.
    async fn end(mut self) {
        assert_eq!(self.lab.stop().await, 0);
    }
}

/// What one broker has logged so far.
#[derive(Clone, Default)]
struct Logs(Arc<Mutex<Vec<u8>>>);

impl Logs {
    /// How many lines hold all of these.
    fn count(&self, parts: &[&str]) -> usize {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let holds = |line: &&str| parts.iter().all(|part| line.contains(part));
        text.lines().filter(holds).count()
    }
}

impl std::fmt::Debug for Logs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0.lock().unwrap()))
    }
}

impl io::Write for Logs {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A made-up key; KuCoin knows four generations of each account's.
fn key(account: &str, generation: u32) -> SimKey {
    SimKey {
        api_key: format!("simulated-{account}-{generation}"),
        api_secret: format!("simulated-secret-of-{account}-{generation}"),
        passphrase: format!("simulated passphrase of {account} {generation}"),
        ..SimKey::fake(MAIN_UID)
    }
}

/// Writes a key to Vault as a new version; returns the version.
fn put(vault: &VaultSim, account: &str, generation: u32) -> u64 {
    let secret = secret(&key(account, generation));
    vault.put_secret("kv", &kv_path(account, "main"), secret)
}

/// Replaces a file as an agent does: written aside, then moved in place.
fn replace(file: &Path, text: &str) {
    let aside = file.with_extension("new");
    write_private(&aside, text);
    std::fs::rename(aside, file).unwrap();
}

/// What has arrived for the key of `account`: method, path and query below `/v1/kv/`, and the status answered.
fn asked(vault: &VaultSim, account: &str) -> Vec<(String, Option<u16>)> {
    let path = kv_path(account, "main");
    let describe = |seen: Seen| {
        let short = seen.path.strip_prefix("/v1/kv/")?;
        let area = short.strip_suffix(&path)?.trim_end_matches('/');
        let query = seen.query.map(|q| format!("?{q}")).unwrap_or_default();
        Some((format!("{} {area}{query}", seen.method), seen.status))
    };
    vault.requests().into_iter().filter_map(describe).collect()
}

/// How many requests for a path below `/v1/` have been answered with this status.
fn answered(vault: &VaultSim, path: &str, status: u16) -> usize {
    let requests = vault.requests();
    let matching = requests.iter().filter(|seen| {
        seen.path
            .strip_prefix("/v1/")
            .is_some_and(|short| short == path)
            && seen.status == Some(status)
    });
    matching.count()
}
