//! A wrapped secret id: the wrapping token can be used once; it is checked before use and deleted after.

use std::time::Duration;

use credbroker_sim::installation::ROOT_TOKEN;
use credbroker_sim::vault::{Fault, FaultRule, RoleSettings, VaultSim};
use serde_json::Value;

use super::login::LOGIN;
use super::real::Api;
use super::{LOGIN_REFUSED, Rig, Setup, count_responses, key, put};
use crate::harness::until;

const LOOKUP: &str = "sys/wrapping/lookup";
const UNWRAP: &str = "sys/wrapping/unwrap";
const USED: &str = "login: wrapping token used or expired; each start needs a new one";

/// Creates a wrapped secret id of a role; returns the wrapping token, valid for 60 seconds.
async fn wrapping_token(vault: &VaultSim, role: &str) -> String {
    let api = Api::new(&vault.address(), ROOT_TOKEN);
    let path = format!("auth/approle/role/{role}/secret-id");
    let response = api
        .with_header("x-vault-wrap-ttl", "60s")
        .call("POST", &path, Value::Null)
        .await;
    response["wrap_info"]["token"].as_str().unwrap().to_owned()
}

/// A broker whose wrapping token was created for `role`; it expects one for `credbroker`.
pub(super) async fn wrapped(role: &str) -> Setup {
    let mut setup = Setup::new(&["main", "b", "c"]).await;
    let vault = setup.vault.clone();
    let (role_id, _) = vault.enable_approle("credbroker", RoleSettings::default());
    vault.enable_approle("other", RoleSettings::default());
    setup.settings.auth = format!(
        "method = \"approle\"\nrole_id = \"{role_id}\"\nrole = \"credbroker\"\nwrapped = true\n\
         secret_id_file = \"wrapping-token\""
    );
    let token = wrapping_token(&vault, role).await;
    setup.settings.files = vec![("wrapping-token", format!("{token}\n"))];
    setup
}

fn file_exists(rig: &Rig) -> bool {
    rig.lab.path("wrapping-token").exists()
}

#[tokio::test]
async fn wrapped_secret_id_is_looked_up_and_unwrapped_once_and_its_file_deleted() {
    let setup = wrapped("credbroker").await;
    let vault = setup.vault.clone();
    let token = setup.settings.files[0].1.trim().to_owned();
    let rig = setup.ready().await;
    assert!(!file_exists(&rig));
    assert_eq!(count_responses(&vault, LOOKUP, 200), 1);
    assert_eq!(count_responses(&vault, UNWRAP, 200), 1);
    assert_eq!(count_responses(&vault, LOGIN, 200), 1);
    let paths: Vec<_> = vault.requests().into_iter().map(|seen| seen.path).collect();
    let at = |path: &str| paths.iter().position(|seen| seen.ends_with(path)).unwrap();
    assert!(at(LOOKUP) < at(UNWRAP) && at(UNWRAP) < at(LOGIN));
    assert_eq!(rig.logs.count(&[token.as_str()]), 0);
    rig.end().await;
}

#[tokio::test]
async fn unwrapped_secret_id_stays_in_memory_for_later_logins() {
    let setup = wrapped("credbroker").await;
    let vault = setup.vault.clone();
    vault.stop_clock();
    let rig = setup.ready().await;
    vault.advance_clock(Duration::from_secs(3600));
    put(&vault, "main", 2);
    rig.until_signed_with(2).await;
    assert_eq!(count_responses(&vault, LOGIN, 200), 2);
    assert_eq!(count_responses(&vault, UNWRAP, 200), 1);
    rig.end().await;
}

#[tokio::test]
async fn used_or_expired_wrapping_token_is_reported_and_looked_up_only_once() {
    for expired in [false, true] {
        let setup = wrapped("credbroker").await;
        let vault = setup.vault.clone();
        let token = setup.settings.files[0].1.trim().to_owned();
        if expired {
            vault.advance_clock(Duration::from_secs(61));
        } else {
            let api = Api::new(&vault.address(), &token);
            api.call("POST", UNWRAP, Value::Null).await;
        }
        let rig = setup.start().await;
        rig.until_not_ready(&format!("key main/main: waiting for Vault: {USED}\n"))
            .await;
        until("many polls", async || {
            rig.logs.count(&[LOGIN_REFUSED, USED]) >= 8
        })
        .await;
        assert_eq!(
            count_responses(&vault, LOOKUP, 400),
            1,
            "expired: {expired}"
        );
        assert_eq!(count_responses(&vault, LOGIN, 400), 0);
        assert_eq!(rig.logs.count(&[token.as_str()]), 0);

        let fresh = wrapping_token(&vault, "credbroker").await;
        rig.lab.replace("wrapping-token", &fresh).unwrap();
        rig.until_restored(1).await;
        assert!(!file_exists(&rig));
        rig.end().await;
    }
}

/// Otherwise, anyone who can write the file could make the broker log in with a secret id of their choice.
#[tokio::test]
async fn wrapping_token_created_for_another_role_is_never_unwrapped() {
    let setup = wrapped("other").await;
    let vault = setup.vault.clone();
    let rig = setup.start().await;
    rig.until_not_ready(
        "login: the wrapping token was created at auth/approle/role/other/secret-id, expected \
         auth/approle/role/credbroker/secret-id; check who replaced it",
    )
    .await;
    until("many polls", async || rig.logs.count(&[LOGIN_REFUSED]) >= 8).await;
    assert_eq!(count_responses(&vault, LOOKUP, 200), 1);
    assert_eq!(count_responses(&vault, UNWRAP, 200), 0);
    assert!(file_exists(&rig), "the file must be kept as evidence");
    rig.end().await;
}

#[tokio::test]
async fn outage_before_unwrapping_does_not_lose_the_secret_id() {
    let setup = wrapped("credbroker").await;
    let vault = setup.vault.clone();
    vault.fault(FaultRule::new(LOOKUP, Fault::Close).times(1));
    vault.fault(
        FaultRule::new(
            UNWRAP,
            Fault::Status {
                code: 503,
                retry_after_s: None,
            },
        )
        .times(1),
    );
    let rig = setup.ready().await;
    assert_eq!(rig.signer("main").await, Ok(key("main", 1).api_key));
    assert_eq!(count_responses(&vault, UNWRAP, 200), 1);
    rig.end().await;
}

/// The response with the secret id is lost, so the secret id cannot be fetched again.
#[tokio::test]
async fn secret_id_lost_in_an_incomplete_response_is_reported() {
    let setup = wrapped("credbroker").await;
    let vault = setup.vault.clone();
    vault.fault(FaultRule::new(UNWRAP, Fault::HalfBody).times(1));
    let rig = setup.start().await;
    rig.until_not_ready(USED).await;
    rig.end().await;
}
