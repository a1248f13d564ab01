//! A secret id that comes wrapped: a token that can be used once, checked before and deleted after.

use std::time::Duration;

use credbroker_sim::installation::ROOT_TOKEN;
use credbroker_sim::vault::{Fault, FaultRule, RoleSettings, VaultSim};
use serde_json::Value;

use super::login::LOGIN;
use super::real::Api;
use super::{LOGIN_REFUSED, Rig, Setup, answered, key, put};
use crate::harness::until;

const LOOKUP: &str = "sys/wrapping/lookup";
const UNWRAP: &str = "sys/wrapping/unwrap";
const USED: &str = "login: wrapping token used or expired: every start needs a fresh one";

/// Has Vault wrap a new secret id of a role; the wrapping token, good for 60 seconds.
async fn wrapping_token(vault: &VaultSim, role: &str) -> String {
    let api = Api::new(&vault.address(), ROOT_TOKEN);
    let path = format!("auth/approle/role/{role}/secret-id");
    let answer = api
        .with_header("x-vault-wrap-ttl", "60s")
        .call("POST", &path, Value::Null)
        .await;
    answer["wrap_info"]["token"].as_str().unwrap().to_owned()
}

/// A broker whose wrapping token is made for `role`, where it expects one for `credbroker`.
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
async fn a_wrapped_secret_id_is_looked_up_unwrapped_once_and_its_file_deleted() {
    let setup = wrapped("credbroker").await;
    let vault = setup.vault.clone();
    let token = setup.settings.files[0].1.trim().to_owned();
    let rig = setup.ready().await;
    assert!(!file_exists(&rig));
    assert_eq!(answered(&vault, LOOKUP, 200), 1);
    assert_eq!(answered(&vault, UNWRAP, 200), 1);
    assert_eq!(answered(&vault, LOGIN, 200), 1);
    let paths: Vec<_> = vault.requests().into_iter().map(|seen| seen.path).collect();
    let at = |path: &str| paths.iter().position(|seen| seen.ends_with(path)).unwrap();
    assert!(at(LOOKUP) < at(UNWRAP) && at(UNWRAP) < at(LOGIN));
    assert_eq!(rig.logs.count(&[token.as_str()]), 0);
    rig.end().await;
}

#[tokio::test]
async fn the_secret_id_stays_in_memory_for_later_logins() {
    let setup = wrapped("credbroker").await;
    let vault = setup.vault.clone();
    vault.stop_clock();
    let rig = setup.ready().await;
    vault.advance_clock(Duration::from_secs(3600));
    put(&vault, "main", 2);
    rig.until_signed_with(2).await;
    assert_eq!(answered(&vault, LOGIN, 200), 2);
    assert_eq!(answered(&vault, UNWRAP, 200), 1);
    rig.end().await;
}

#[tokio::test]
async fn a_used_or_expired_wrapping_token_is_told_and_asked_about_only_once() {
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
        assert_eq!(answered(&vault, LOOKUP, 400), 1, "expired: {expired}");
        assert_eq!(answered(&vault, LOGIN, 400), 0);
        assert_eq!(rig.logs.count(&[token.as_str()]), 0);

        let fresh = wrapping_token(&vault, "credbroker").await;
        rig.lab.replace("wrapping-token", &fresh).unwrap();
        rig.until_restored(1).await;
        assert!(!file_exists(&rig));
        rig.end().await;
    }
}

/// Who can write the file could else make the broker log in with a secret id of their own.
#[tokio::test]
async fn a_wrapping_token_that_was_made_elsewhere_is_never_unwrapped() {
    let setup = wrapped("other").await;
    let vault = setup.vault.clone();
    let rig = setup.start().await;
    rig.until_not_ready(
        "login: the wrapping token is not from auth/approle/role/credbroker/secret-id, \
         but from auth/approle/role/other/secret-id: who put it there?",
    )
    .await;
    until("many polls", async || rig.logs.count(&[LOGIN_REFUSED]) >= 8).await;
    assert_eq!(answered(&vault, LOOKUP, 200), 1);
    assert_eq!(answered(&vault, UNWRAP, 200), 0);
    assert!(file_exists(&rig), "it is evidence");
    rig.end().await;
}

#[tokio::test]
async fn an_outage_before_the_unwrapping_loses_nothing() {
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
    assert_eq!(answered(&vault, UNWRAP, 200), 1);
    rig.end().await;
}

/// The answer with the secret id is lost: nobody can have it any more.
#[tokio::test]
async fn a_secret_id_that_is_lost_on_its_way_is_told() {
    let setup = wrapped("credbroker").await;
    let vault = setup.vault.clone();
    vault.fault(FaultRule::new(UNWRAP, Fault::HalfBody).times(1));
    let rig = setup.start().await;
    rig.until_not_ready(USED).await;
    rig.end().await;
}
