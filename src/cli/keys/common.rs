//! Shared by the `keys` commands: calls to the broker, and the choice of a key.

use std::time::Duration;

use crate::base::ids::{AccountId, KeyName};
use crate::cli::admin::{Admin, Client, Failure};
use crate::cli::printable;
use crate::kucoin::Scope;
use crate::proto::{KeyState, ListKeysRequest, RefreshKeyRequest, TestKeyRequest, TestKeyResponse};

/// Time limit of a list, which the broker makes from memory.
const LIST_WITHIN: Duration = Duration::from_secs(10);

/// Time limit of a test: a few requests per scope, for each API key version that is tried.
const TEST_WITHIN: Duration = Duration::from_secs(60);

/// Time limit of a refresh: a read from Vault and a test.
const REFRESH_WITHIN: Duration = Duration::from_secs(30);

/// Digits of a digest that are shown; enough to tell two keys apart.
const SHOWN_DIGITS: usize = 12;

/// The fix where a request to Vault failed.
pub(super) const VAULT: &str = "check that Vault is running and unsealed, and check [vault] in admin.toml: the address, the login \
                                (your token may have expired), and that it has the policy deploy/vault/admin.hcl; then re-run \
                                the command";

impl Admin {
    /// Every key that the rules name, with its status.
    pub(super) async fn keys(&mut self) -> Result<Vec<KeyState>, Failure> {
        let list = async |client: &mut Client, request| client.list_keys(request).await;
        let listed = self.ask(LIST_WITHIN, ListKeysRequest {}, list).await?;
        Ok(listed.keys)
    }

    /// Tests a key: the one in `request`, or the loaded one.
    pub(super) async fn test(
        &mut self,
        request: TestKeyRequest,
    ) -> Result<TestKeyResponse, Failure> {
        let test = async |client: &mut Client, request| client.test_key(request).await;
        self.ask(TEST_WITHIN, request, test).await
    }

    /// Has the broker refresh a key from Vault now.
    pub(super) async fn refresh(
        &mut self,
        account: &AccountId,
        key: &KeyName,
    ) -> Result<KeyState, Failure> {
        let request = RefreshKeyRequest {
            account: account.to_string(),
            key: key.to_string(),
        };
        let refresh = async |client: &mut Client, request| client.refresh_key(request).await;
        let response = self.ask(REFRESH_WITHIN, request, refresh).await?;
        Ok(response.state.unwrap_or_default())
    }
}

/// Finds a key by its name, by its scopes, or as the account's only one.
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
                "unknown account {account}; accounts in the rules: {}",
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
                format!("account {account} has no key for scope {scope} in the rules"),
                format!(
                    "add {scope} = \"{}\" to `key` of [account.{account}] in the rules; the broker reloads them without a restart",
                    printable(&name)
                ),
            ));
        };
        if let Some(name) = name.filter(|name| name.as_str() != key.key) {
            return Err(Failure::new(
                format!(
                    "scope {scope} of account {account} uses key {} in the rules, not key {name}",
                    key.key
                ),
                format!("pass --key {}, or correct the rules", key.key),
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
            "run `credbroker keys list` to list its keys",
        )),
        (None, ..) => Err(Failure::new(
            format!("these scopes of account {account} use different keys in the rules"),
            "register the keys one at a time, each with its own --scope",
        )),
        (Some(_), ..) => Err(Failure::new(
            format!(
                "account {account} has several keys in the rules: {}",
                listed(&names)
            ),
            "select one with --key, or with --scope",
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

/// The scopes that a key is used for, in the words of the rules.
pub(super) fn scopes_of(key: &KeyState) -> Vec<&'static str> {
    words(key.scopes())
}

/// Scopes in the words of the rules.
pub(in crate::cli) fn words(
    scopes: impl Iterator<Item = crate::proto::Scope>,
) -> Vec<&'static str> {
    use crate::proto::Scope as ProtoScope;
    let word = |scope| match scope {
        ProtoScope::Futures => Scope::Futures.as_str(),
        ProtoScope::SpotMargin => Scope::SpotMargin.as_str(),
        ProtoScope::Unified => Scope::Unified.as_str(),
        ProtoScope::Unspecified => "unknown",
    };
    scopes.map(word).collect()
}

/// States that the previous version no longer signs; empty if there was none.
pub(super) fn retired(before: &KeyState, version: u64) -> String {
    if before.version == 0 || before.version == version {
        return String::new();
    }
    format!(" Version {} no longer signs.", before.version)
}

/// Joins reasons to a part of a sentence: without their full stops.
pub(super) fn joined<'a>(reasons: impl IntoIterator<Item = &'a str>) -> String {
    let reasons: Vec<_> = reasons
        .into_iter()
        .map(|reason| reason.trim_end_matches('.'))
        .collect();
    if reasons.is_empty() {
        return "no reason given".to_owned();
    }
    reasons.join("; ")
}

/// The beginning of a digest.
pub(super) fn shown(digest: &str) -> String {
    let short: String = digest.chars().take(SHOWN_DIGITS).collect();
    format!("{}…", printable(&short))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto;

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
            Failure::Failed { cause, fix } => format!("{cause} / {fix}"),
            Failure::Files(problems) => panic!("{problems:?}"),
        })
    }

    #[test]
    fn key_is_found_by_name_by_scope_or_as_the_only_one() {
        let main = Ok("main".to_owned());
        assert_eq!(picked("one", None, &[]), main);
        assert_eq!(picked("one", None, &[Scope::Futures]), main);
        assert_eq!(picked("one", Some("main"), &[]), main);
        assert_eq!(picked("two", None, &[Scope::Futures]).unwrap(), "perp");
        for (account, name, scopes, cause) in [
            (
                "three",
                None,
                &[Scope::Futures][..],
                "unknown account three; accounts in the rules: one, two / correct the name, or add to the rules: [account.three] with key = { futures = \"main\" }",
            ),
            (
                "one",
                None,
                &[Scope::Unified],
                "account one has no key for scope unified in the rules / add unified = \"main\" to `key` of [account.one]",
            ),
            (
                "two",
                Some("spot"),
                &[Scope::Futures],
                "scope futures of account two uses key perp in the rules, not key spot / pass --key perp",
            ),
            (
                "two",
                None,
                &[],
                "account two has several keys in the rules: spot, perp / select one with --key",
            ),
            (
                "two",
                None,
                &[Scope::Futures, Scope::SpotMargin],
                "these scopes of account two use different keys in the rules / register the keys one at a time",
            ),
            (
                "two",
                Some("main"),
                &[],
                "account two has no key main in the rules / ",
            ),
        ] {
            let failure = picked(account, name, scopes).unwrap_err();
            assert!(failure.starts_with(cause), "{failure}");
        }
    }

    #[test]
    fn joined_reasons_have_no_full_stops_and_are_never_empty() {
        assert_eq!(joined(["a problem.", "another"]), "a problem; another");
        assert_eq!(joined([]), "no reason given");
    }
}
