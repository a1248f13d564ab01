//! Who tests keys for a command: the running broker, or this process in its place.
//!
//! Both answer the same calls; the second one without a network in between, on the broker's own configuration.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tonic::{Request, Response, Status};

use super::admin::{Admin, AdminFile, Client, Failure, told};
use super::{printable, read_config};
use crate::api::admin::AdminApi;
use crate::api::proto::admin_server::Admin as _;
use crate::api::proto::{
    KeyState, ListKeysRequest, RefreshKeyRequest, TestKeyRequest, TestKeyResponse,
};
use crate::broker::Broker;
use crate::clock::Clock;
use crate::config::load::load;
use crate::ids::{AccountId, AdminId, KeyName};
use crate::kucoin::Scope;
use crate::server::assembly::assemble;
use crate::server::probes::Probes;
use crate::server::{StartError, lock};
use crate::telemetry::chain;

/// The broker answers from memory.
pub(super) const LIST_WITHIN: Duration = Duration::from_secs(10);

/// A question or two for each scope, once for each version that the key may have.
const TEST_WITHIN: Duration = Duration::from_secs(60);

/// A look at Vault, and a test of what it found.
const REFRESH_WITHIN: Duration = Duration::from_secs(30);

/// How long the exchange may take to tell its time and our address.
const PROOF_WITHIN: Duration = Duration::from_secs(15);

/// Who tests keys.
pub(super) enum Door {
    /// This process.
    Direct(Direct),
    /// The running broker.
    Running(Admin),
}

/// A broker without listeners, in this process.
pub(super) struct Direct {
    api: AdminApi,
    admin: AdminId,
    _probes: Probes,
    /// Held so that no broker runs beside this.
    _lock: File,
}

impl Door {
    /// Connects to the running broker.
    pub(super) async fn of_broker(admin: &AdminFile) -> Result<Self, Failure> {
        Ok(Self::Running(Admin::connect(admin).await?))
    }

    /// Puts a broker together of its configuration `file`, and has the exchange confirm that it is on the egress host.
    pub(super) async fn direct(admin: AdminId, file: &Path) -> Result<Self, Failure> {
        let config = read_config(file).map_err(Failure::Files)?;
        let clock = Arc::new(Clock::system());
        let loaded = load(&config, clock.wall_ms()).map_err(Failure::Files)?;
        let unstarted = |error: StartError| match error {
            StartError::Config(problems) => Failure::Files(problems),
            StartError::Locked(folder) => Failure::new(
                format!("a broker runs on {folder}, and it alone may use the exchange from there"),
                "leave --direct out, so that the running broker tests the key; it needs listen.admin in its configuration",
            ),
            error => Failure::new(
                chain(&error),
                "run this as the broker's own user, on its host",
            ),
        };
        let lock = lock(&config.state_dir).await.map_err(unstarted)?;
        let broker = assemble(&config, loaded, clock).map_err(unstarted)?.broker;
        broker.egress.start();
        broker.egress.first_lookups().await;
        let mut probes = Probes::new(config.proof_every);
        probes.follow(&broker, &broker.policy());
        proven(&broker).await?;
        Ok(Self::Direct(Direct {
            api: AdminApi::new(broker),
            admin,
            _probes: probes,
            _lock: lock,
        }))
    }

    /// Every key that the rules name, with its status.
    pub(super) async fn keys(&mut self) -> Result<Vec<KeyState>, Failure> {
        let request = ListKeysRequest {};
        let listed = match self {
            Self::Direct(direct) => {
                Direct::answer(direct.api.list_keys(direct.request(request)).await)?
            }
            Self::Running(admin) => {
                let list = async |client: &mut Client, request| client.list_keys(request).await;
                admin.ask(LIST_WITHIN, request, list).await?
            }
        };
        Ok(listed.keys)
    }

    /// Tests a key: the one in `request`, or the one in memory.
    pub(super) async fn test(
        &mut self,
        request: TestKeyRequest,
    ) -> Result<TestKeyResponse, Failure> {
        match self {
            Self::Direct(direct) => {
                Direct::answer(direct.api.test_key(direct.request(request)).await)
            }
            Self::Running(admin) => {
                let test = async |client: &mut Client, request| client.test_key(request).await;
                admin.ask(TEST_WITHIN, request, test).await
            }
        }
    }

    /// Has the running broker look at a key in Vault now; none where there is no running broker.
    pub(super) async fn refresh(
        &mut self,
        account: &AccountId,
        key: &KeyName,
    ) -> Result<Option<KeyState>, Failure> {
        let Self::Running(admin) = self else {
            return Ok(None);
        };
        let request = RefreshKeyRequest {
            account: account.to_string(),
            key: key.to_string(),
        };
        let refresh = async |client: &mut Client, request| client.refresh_key(request).await;
        Ok(admin.ask(REFRESH_WITHIN, request, refresh).await?.state)
    }

    /// Whether a broker runs that can be told.
    pub(super) fn is_running(&self) -> bool {
        matches!(self, Self::Running(_))
    }
}

impl Direct {
    fn request<M>(&self, message: M) -> Request<M> {
        let mut request = Request::new(message);
        request.extensions_mut().insert(self.admin.clone());
        request
    }

    fn answer<T>(answer: Result<Response<T>, Status>) -> Result<T, Failure> {
        let answer = answer.map(Response::into_inner);
        answer.map_err(|status| told("in this process", &status))
    }
}

/// Waits until the exchange has told its time, and that requests leave from the expected address.
async fn proven(broker: &Broker) -> Result<(), Failure> {
    let places = broker.policy().places();
    let until = Instant::now() + PROOF_WITHIN;
    loop {
        let proof = broker.proof.status();
        if proof.seen.is_some() {
            if let Some(mismatch) = proof.mismatch {
                return Err(Failure::new(
                    format!("this is not the egress host: {mismatch}; nothing was stored"),
                    "run the command on the broker's host, or leave --direct out, so that the running broker tests the key",
                ));
            }
            let is_known = |place: &_| broker.clock.exchange(*place).age.is_some();
            if places.iter().all(is_known) {
                return Ok(());
            }
        }
        if Instant::now() > until {
            let why = proof.failure.unwrap_or_else(|| "no answer".to_owned());
            return Err(Failure::new(
                format!(
                    "the exchange has not told its time and our address within {} s: {why}; nothing was stored",
                    PROOF_WITHIN.as_secs()
                ),
                "look whether this host reaches KuCoin; `credbroker doctor` says what is in the way",
            ));
        }
        // Nothing announces it; the questions are asked again in the background.
        sleep(Duration::from_millis(50)).await;
    }
}

/// The key that is meant: by its name, by what it shall serve, or as the account's only one.
pub(super) fn pick(
    keys: Vec<KeyState>,
    account: &AccountId,
    name: Option<&KeyName>,
    scopes: &[Scope],
) -> Result<KeyState, Failure> {
    let known: Vec<_> = keys.iter().map(|key| key.account.clone()).collect();
    let mut keys: Vec<_> = keys
        .into_iter()
        .filter(|key| key.account == account.as_str())
        .collect();
    if keys.is_empty() {
        let mut known = known;
        known.dedup();
        let scope = scopes.first().copied().unwrap_or(Scope::SpotMargin);
        let name = name.map_or("main", KeyName::as_str);
        return Err(Failure::new(
            format!(
                "the rules name no account {account}; they name {}",
                listed(&known)
            ),
            format!(
                "correct the name, or add to the rules: [account.{account}] with key = {{ {scope} = \"{name}\" }}"
            ),
        ));
    }
    let serves = |key: &KeyState, scope: Scope| scopes_of(key).contains(&scope.as_str());
    for &scope in scopes {
        let Some(key) = keys.iter().find(|key| serves(key, scope)) else {
            let name = name.map_or_else(|| first_name(&keys), ToString::to_string);
            return Err(Failure::new(
                format!("the rules name no key of account {account} for scope {scope}"),
                format!(
                    "add {scope} = \"{}\" to `key` of [account.{account}] in the rules; they are taken up without a restart",
                    printable(&name)
                ),
            ));
        };
        if let Some(name) = name.filter(|name| name.as_str() != key.key) {
            return Err(Failure::new(
                format!(
                    "by the rules scope {scope} of account {account} is served by key {}, and not by {name}",
                    key.key
                ),
                format!("name --key {}, or correct the rules", key.key),
            ));
        }
    }
    keys.retain(|key| {
        name.is_none_or(|name| name.as_str() == key.key)
            && scopes.iter().all(|scope| serves(key, *scope))
    });
    let names: Vec<_> = keys.iter().map(|key| key.key.clone()).collect();
    let mut keys = keys.into_iter();
    match (keys.next(), keys.next(), name) {
        (Some(only), None, _) => Ok(only),
        (None, _, Some(name)) => Err(Failure::new(
            format!("account {account} has no key {name} in the rules"),
            "`credbroker keys list` shows those that there are",
        )),
        (None, ..) => Err(Failure::new(
            format!("by the rules these scopes of account {account} have keys of their own"),
            "register them one after the other, each with its own --scope",
        )),
        (Some(_), ..) => Err(Failure::new(
            format!(
                "account {account} has several keys in the rules: {}",
                listed(&names)
            ),
            "name one with --key, or with --scope what it serves",
        )),
    }
}

fn first_name(keys: &[KeyState]) -> String {
    keys.first().map(|key| key.key.clone()).unwrap_or_default()
}

fn listed(names: &[String]) -> String {
    if names.is_empty() {
        return "none".to_owned();
    }
    names.join(", ")
}

/// The scopes that a key serves, in the words of the rules.
pub(super) fn scopes_of(key: &KeyState) -> Vec<&'static str> {
    words(key.scopes())
}

/// Scopes in the words of the rules.
pub(super) fn words(scopes: impl Iterator<Item = crate::api::proto::Scope>) -> Vec<&'static str> {
    use crate::api::proto::Scope as Said;
    let word = |scope| match scope {
        Said::Futures => Scope::Futures.as_str(),
        Said::SpotMargin => Scope::SpotMargin.as_str(),
        Said::Unified => Scope::Unified.as_str(),
        Said::Unspecified => "unknown",
    };
    scopes.map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::proto;

    fn key(account: &str, name: &str, scopes: &[Scope]) -> KeyState {
        let scopes = scopes.iter().copied();
        KeyState {
            account: account.to_owned(),
            key: name.to_owned(),
            scopes: scopes
                .map(|scope| proto::Scope::from(scope).into())
                .collect(),
            ..KeyState::default()
        }
    }

    fn picked(account: &str, name: Option<&str>, scopes: &[Scope]) -> Result<String, String> {
        let keys = vec![
            key("one", "main", &[Scope::Futures, Scope::SpotMargin]),
            key("two", "spot", &[Scope::SpotMargin]),
            key("two", "perp", &[Scope::Futures]),
        ];
        let name = name.map(|name| name.parse().unwrap());
        let picked = pick(keys, &account.parse().unwrap(), name.as_ref(), scopes);
        picked.map(|key| key.key).map_err(|failure| match failure {
            Failure::Undone { what, fix } => format!("{what} / {fix}"),
            Failure::Files(problems) => panic!("{problems:?}"),
        })
    }

    #[test]
    fn a_key_is_found_by_its_name_by_its_scope_or_as_the_only_one() {
        let main = Ok("main".to_owned());
        assert_eq!(picked("one", None, &[]), main);
        assert_eq!(picked("one", None, &[Scope::Futures]), main);
        assert_eq!(picked("one", Some("main"), &[]), main);
        assert_eq!(picked("two", None, &[Scope::Futures]).unwrap(), "perp");
        for (account, name, scopes, what) in [
            (
                "three",
                None,
                &[Scope::Futures][..],
                "the rules name no account three; they name one, two / correct the name, or add to the rules: [account.three] with key = { futures = \"main\" }",
            ),
            (
                "one",
                None,
                &[Scope::Unified],
                "the rules name no key of account one for scope unified / add unified = \"main\" to `key` of [account.one]",
            ),
            (
                "two",
                Some("spot"),
                &[Scope::Futures],
                "by the rules scope futures of account two is served by key perp, and not by spot / name --key perp",
            ),
            (
                "two",
                None,
                &[],
                "account two has several keys in the rules: spot, perp / name one with --key",
            ),
            (
                "two",
                None,
                &[Scope::Futures, Scope::SpotMargin],
                "by the rules these scopes of account two have keys of their own / register them one after the other",
            ),
            (
                "two",
                Some("main"),
                &[],
                "account two has no key main in the rules / ",
            ),
        ] {
            let told = picked(account, name, scopes).unwrap_err();
            assert!(told.starts_with(what), "{told}");
        }
    }
}
