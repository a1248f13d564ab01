//! Keys in Vault: read at start, changed, evicted, cached during outages.

/// Runs each test against the simulator, and against a real Vault if one is available.
macro_rules! on_both {
    ($($test:ident)*) => {
        mod simulated {
            $(#[tokio::test]
            async fn $test() {
                super::$test(&super::Stage::simulated().await).await;
            })*
        }

        mod real {
            $(#[tokio::test]
            async fn $test() {
                if let Some(stage) = super::Stage::real().await {
                    super::$test(&stage).await;
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
mod key_tests;
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
mod wrapped;
mod write;

use std::io;
use std::sync::{Arc, Mutex};

use credbroker::proto::{Method, Outcome, Scope};
use credbroker::telemetry::log_filter;
use credbroker_sim::installation::{MAIN_UID, ROOT_TOKEN, Settings, grant, kv_path, secret};
use credbroker_sim::kucoin::SimKey;
use credbroker_sim::vault::{Seen, VaultSim};
use tonic::Code;
use tracing::subscriber::DefaultGuard;

use crate::harness::{Bot, Lab, failure, request, until};

/// Log message while Vault cannot be reached or returns no usable response, up to the part about the key: loaded or not.
const NO_ANSWER: &str = "Vault unreachable; ";

/// Log message while Vault rejects the broker's login, up to the part about the key: loaded or not.
const LOGIN_REFUSED: &str = "Vault login rejected; ";

/// The part about a loaded key.
const CACHED: &str = "; using cached keys";

/// The part about a key that is not loaded.
const NOT_LOADED: &str = "; key not loaded";

/// Configuration of a test's broker and its Vault.
struct Setup {
    vault: VaultSim,
    /// The rules define one key `main` for each; bot `maker` may read.
    accounts: Vec<String>,
    /// Seconds between two polls.
    poll_s: u32,
    /// Time limit per request; long, so that a slow machine does not cause an outage.
    timeout_ms: u32,
    /// Further settings of `[vault]`.
    more: String,
    /// All other settings.
    settings: Settings,
}

impl Setup {
    /// A simulated Vault with the first key of each account; its root token is in the token file.
    async fn new(accounts: &[&str]) -> Self {
        let vault = VaultSim::start_dev(ROOT_TOKEN).await.unwrap();
        Self::on(vault, accounts)
    }

    fn on(vault: VaultSim, accounts: &[&str]) -> Self {
        for account in accounts {
            put(&vault, account, 1);
        }
        Self {
            settings: Settings {
                simulated_vault: Some(vault.clone()),
                keys: Vec::new(),
                reload: "",
                ..Settings::default()
            },
            vault,
            accounts: accounts.iter().map(|&account| account.to_owned()).collect(),
            poll_s: 1,
            timeout_ms: 5000,
            more: String::new(),
        }
    }

    /// Starts the broker and waits until its keys are loaded.
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
        // For this thread only; the test and its broker run on it.
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

    /// Writes the broker's files; starts only the simulators.
    async fn install(mut self) -> Lab {
        let (poll_s, timeout_ms, more) = (self.poll_s, self.timeout_ms, self.more);
        self.settings.vault = format!("poll_s = {poll_s}\ntimeout_ms = {timeout_ms}\n{more}");
        let rules = self.accounts.iter().map(|account| {
            let account_table =
                format!("[account.{account}]\nkey = {{ spot-margin = \"main\" }}\n");
            account_table + &grant("maker", account, "spot-margin", "\"public\", \"read\"")
        });
        self.settings.rules = rules.collect();
        let lab = Lab::install(self.settings).await;
        for account in &self.accounts {
            for generation in 1..=4 {
                lab.kucoin.add_key(key(account, generation));
            }
        }
        lab
    }
}

/// A running broker, its bot and its log.
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

    /// Sends one private read; returns the id of the KuCoin key that signed it, or the message of `KEY_UNAVAILABLE`.
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

    /// Checks that calls of `main` are signed with its key of this generation until `condition` is true, and once more after it.
    async fn signs_until<F>(&self, generation: u32, label: &str, condition: impl Fn() -> F)
    where
        F: Future<Output = bool>,
    {
        let expected = Ok(key("main", generation).api_key);
        until(label, async || {
            let is_done = condition().await;
            assert_eq!(self.signer("main").await, expected, "waiting for: {label}");
            is_done
        })
        .await;
    }

    /// Waits until calls of `main` are signed with its key of this generation; none may fail until then.
    async fn until_signed_with(&self, generation: u32) {
        let expected = key("main", generation).api_key;
        until(&format!("calls are signed with {expected}"), async || {
            self.signer("main").await.unwrap() == expected
        })
        .await;
    }

    /// Waits until calls of `main` are rejected, and checks that the message contains `reason`.
    async fn until_evicted(&self, reason: &str) {
        until("the key is evicted", async || {
            self.signer("main").await.is_err()
        })
        .await;
        let message = self.signer("main").await.unwrap_err();
        let expected = "the key of account main for this scope is not available: ";
        assert!(
            message.starts_with(expected) && message.contains(reason),
            "{message}"
        );
    }

    /// Waits until calls of `main` are signed again, and checks that its key of this generation signs them.
    async fn until_restored(&self, generation: u32) {
        until("the key is loaded again", async || {
            self.signer("main").await.is_ok()
        })
        .await;
        assert_eq!(
            self.signer("main").await,
            Ok(key("main", generation).api_key)
        );
    }

    /// Waits until `/readyz` returns 503 and its text contains `reason`.
    async fn until_not_ready(&self, reason: &str) {
        until(
            &format!("/readyz is 503 and contains: {reason}"),
            async || {
                let (status, text) = self.lab.get("/readyz").await;
                status == 503 && text.contains(reason)
            },
        )
        .await;
    }

    /// Stops the broker and checks its audit log.
    async fn end(mut self) {
        assert_eq!(self.lab.stop().await, 0);
    }
}

/// The log of one broker so far.
#[derive(Clone, Default)]
struct Logs(Arc<Mutex<Vec<u8>>>);

impl Logs {
    /// The number of lines that contain all of `parts`.
    fn count(&self, parts: &[&str]) -> usize {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let contains_all = |line: &&str| parts.iter().all(|part| line.contains(part));
        text.lines().filter(contains_all).count()
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

/// A fake key; the simulated KuCoin has four generations per account.
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

/// The requests that Vault received for the key of `account`: method, path and query below `/v1/kv/`, and the status returned.
fn requests_for(vault: &VaultSim, account: &str) -> Vec<(String, Option<u16>)> {
    let path = kv_path(account, "main");
    let describe = |seen: Seen| {
        let short = seen.path.strip_prefix("/v1/kv/")?;
        let area = short.strip_suffix(&path)?.trim_end_matches('/');
        let query = seen.query.map(|q| format!("?{q}")).unwrap_or_default();
        Some((format!("{} {area}{query}", seen.method), seen.status))
    };
    vault.requests().into_iter().filter_map(describe).collect()
}

/// The number of responses with this status to requests for a path below `/v1/`.
fn count_responses(vault: &VaultSim, path: &str, status: u16) -> usize {
    let requests = vault.requests();
    let matching = requests.iter().filter(|seen| {
        seen.path
            .strip_prefix("/v1/")
            .is_some_and(|short| short == path)
            && seen.status == Some(status)
    });
    matching.count()
}
