//! The broker's Vault token: from a file that an agent writes, or from an AppRole login.

use std::time::Duration;

use credbroker_sim::installation::ROOT_TOKEN;
use credbroker_sim::vault::{Fault, FaultRule, RoleSettings};

use super::{LOGIN_REFUSED, NO_ANSWER, Rig, Setup, count_responses, key, put};
use crate::harness::until;

pub(super) const LOGIN: &str = "auth/approle/login";
const LOOKUP: &str = "auth/token/lookup-self";
pub(super) const METADATA: &str = "kv/metadata/kucoin/prod/main/main";
const INVALID_TOKEN: &str = "Vault rejected the token (403)";

#[tokio::test]
async fn whitespace_around_the_token_in_its_file_is_ignored() {
    let mut setup = Setup::new(&["main"]).await;
    setup.settings.files = vec![("token", format!("\n  {ROOT_TOKEN} \r\n"))];
    let rig = setup.ready().await;
    assert_eq!(rig.signer("main").await, Ok(key("main", 1).api_key));
    rig.end().await;
}

#[tokio::test]
async fn invalid_token_or_token_file_evicts_nothing_and_a_valid_one_is_picked_up() {
    let mut setup = Setup::new(&["main"]).await;
    let vault = setup.vault.clone();
    let token = || vault.create_token(Duration::from_secs(3600));
    let good = token();
    setup.settings.files = vec![("token", format!("{good}\n"))];
    let rig = setup.ready().await;
    let file = rig.lab.path("token");

    vault.revoke_token(&good);
    outage_then_next_version(&rig, 1, INVALID_TOKEN).await;
    rig.lab.replace("token", "never-a-token\n").unwrap();
    outage_then_next_version(&rig, 1, INVALID_TOKEN).await;
    assert!(
        count_responses(&vault, METADATA, 403) >= 4 && count_responses(&vault, LOOKUP, 403) >= 4
    );
    rig.lab.replace("token", &token()).unwrap();
    rig.until_signed_with(2).await;

    let expected = "expected one line of printable ASCII without spaces";
    rig.lab.replace("token", "two\nlines\n").unwrap();
    outage_then_next_version(&rig, 2, &format!("vault.auth: {expected}")).await;
    rig.lab.replace("token", "").unwrap();
    outage_then_next_version(&rig, 2, &format!("vault.auth: it is empty; {expected}")).await;
    rig.lab.replace("token", &token()).unwrap();
    rig.until_signed_with(3).await;

    std::fs::remove_file(&file).unwrap();
    outage_then_next_version(&rig, 3, "cannot read the credential file in vault.auth").await;
    rig.lab.replace("token", &token()).unwrap();
    rig.until_signed_with(4).await;
    assert_eq!(rig.logs.count(&["never-a-token"]), 0);
    rig.end().await;
}

/// Checks that the key of `generation` stays in use until a poll fails for this reason; then writes the next version to Vault.
async fn outage_then_next_version(rig: &Rig, generation: u32, reason: &str) {
    logged_then_next_version(rig, generation, &[NO_ANSWER, reason]).await;
}

pub(super) async fn logged_then_next_version(rig: &Rig, generation: u32, line: &[&str]) {
    let before = rig.logs.count(line);
    rig.signs_until(generation, &line.join(": "), async || {
        rig.logs.count(line) > before
    })
    .await;
    put(rig.vault(), "main", generation + 1);
}

/// The agent replaces an invalid token between the second 403 and the lookup; the 403s do not count against the new token.
#[tokio::test]
async fn http_403_counts_only_against_the_token_it_was_returned_for() {
    let mut setup = Setup::new(&["main"]).await;
    let vault = setup.vault.clone();
    let dead = vault.create_token(Duration::from_secs(3600));
    setup.settings.files = vec![("token", dead.clone())];
    let rig = setup.ready().await;
    let count_polls = || {
        let requests = vault.requests();
        requests
            .iter()
            .filter(|seen| seen.path == format!("/v1/{METADATA}"))
            .count()
    };
    // Slow enough that the file can be replaced while the broker waits for a 403.
    let before = count_polls();
    vault.fault(FaultRule::new(METADATA, Fault::Delay { ms: 600 }));
    vault.revoke_token(&dead);
    until(
        "one 403 was returned and a second request is in flight",
        async || {
            count_responses(&vault, METADATA, 403) == 1
                && count_responses(&vault, LOOKUP, 403) == 1
                && count_polls() > before + 1
        },
    )
    .await;
    rig.lab.replace("token", ROOT_TOKEN).unwrap();
    put(&vault, "main", 2);
    rig.until_signed_with(2).await;
    assert_eq!(rig.logs.count(&["key unavailable"]), 0);
    assert_eq!(rig.logs.count(&[NO_ANSWER, INVALID_TOKEN]), 0);
    rig.end().await;
}

#[tokio::test]
async fn http_403_evicts_nothing_if_the_token_lookup_fails() {
    for (fault, reason) in [
        (status(404), "token lookup: Vault has no such key (404)"),
        (status(500), "token lookup: Vault returned 500"),
        (
            Fault::WrongJson,
            "token lookup: response is not in Vault's format",
        ),
    ] {
        let rig = Setup::new(&["main"]).await.ready().await;
        rig.vault().fault(FaultRule::new(LOOKUP, fault));
        rig.vault().deny(None, None, METADATA);
        outage_then_next_version(&rig, 1, reason).await;
        rig.vault().clear_faults();
        rig.until_evicted("Vault denied the broker access (403)")
            .await;
        rig.end().await;
    }
}

pub(super) fn status(code: u16) -> Fault {
    Fault::Status {
        code,
        retry_after_s: None,
    }
}

/// A broker that logs in with an AppRole; its secret id is in the file `secret-id`, with a line break.
pub(super) async fn approle(accounts: &[&str], role: RoleSettings) -> Setup {
    let mut setup = Setup::new(accounts).await;
    let (role_id, secret_id) = setup.vault.enable_approle("credbroker", role);
    setup.settings.auth =
        format!("method = \"approle\"\nrole_id = \"{role_id}\"\nsecret_id_file = \"secret-id\"");
    setup.settings.files = vec![("secret-id", format!("{secret_id}\n"))];
    setup
}

pub(super) const FIVE: [&str; 5] = ["main", "b", "c", "d", "e"];

#[tokio::test]
async fn approle_logs_in_once_for_all_keys_with_the_secret_id_from_its_file() {
    let setup = approle(&FIVE, RoleSettings::default()).await;
    let vault = setup.vault.clone();
    // Long enough for every key to need a token.
    vault.fault(FaultRule::new(LOGIN, Fault::Delay { ms: 300 }));
    let rig = setup.ready().await;
    for account in FIVE {
        assert_eq!(rig.signer(account).await, Ok(key(account, 1).api_key));
    }
    assert_eq!(count_responses(&vault, LOGIN, 200), 1);
    rig.end().await;
}

#[tokio::test]
async fn expired_login_is_repeated_once_for_all_keys_without_a_failed_call() {
    let setup = approle(&FIVE, RoleSettings::default()).await;
    let vault = setup.vault.clone();
    vault.stop_clock();
    let rig = setup.ready().await;
    // Long enough for one key to find its token expired while another has already logged in again.
    vault.fault(FaultRule::new(LOOKUP, Fault::Delay { ms: 600 }));
    vault.advance_clock(Duration::from_secs(3600));
    for account in FIVE {
        put(&vault, account, 2);
    }
    until("every key has its new version", async || {
        let mut all = true;
        for account in FIVE {
            all &= rig.signer(account).await.unwrap() == key(account, 2).api_key;
        }
        all
    })
    .await;
    assert!(
        count_responses(&vault, LOOKUP, 403) >= 2,
        "several keys must find the token expired at once"
    );
    assert_eq!(count_responses(&vault, LOGIN, 200), 2);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    rig.end().await;
}

#[tokio::test]
async fn wrong_secret_id_is_reported_and_the_right_one_is_picked_up() {
    let mut setup = approle(&["main"], RoleSettings::default()).await;
    let vault = setup.vault.clone();
    let (_, secret_id) = setup.settings.files.pop().unwrap();
    let rig = setup.start().await;
    rig.until_not_ready("cannot read the credential file in vault.auth")
        .await;
    assert_eq!(vault.requests(), []);
    rig.lab
        .replace("secret-id", "simulated-wrong-secret-id\n")
        .unwrap();
    let reason =
        "key main/main: waiting for Vault: login: Vault returned 400: invalid role or secret ID\n";
    rig.until_not_ready(reason).await;
    assert!(rig.logs.count(&[LOGIN_REFUSED]) >= 1);
    assert_eq!(rig.logs.count(&["simulated-wrong-secret-id"]), 0);
    rig.lab.replace("secret-id", &secret_id).unwrap();
    rig.until_restored(1).await;
    rig.end().await;
}

/// A failed login, even with 403, says nothing about access to the key: Kubernetes logins return 403 while its API server is down.
#[tokio::test]
async fn failed_login_evicts_nothing() {
    for (fault, message, reason) in [
        (status(400), LOGIN_REFUSED, "login: Vault returned 400"),
        (status(403), LOGIN_REFUSED, "login: Vault returned 403"),
        (status(404), LOGIN_REFUSED, "login: Vault returned 404"),
        (status(412), NO_ANSWER, "login: Vault returned 412"),
        (status(429), NO_ANSWER, "login: Vault returned 429"),
        (status(500), NO_ANSWER, "login: Vault returned 500"),
        (Fault::Hang, NO_ANSWER, "login: cannot reach Vault"),
        (
            Fault::NotJson,
            NO_ANSWER,
            "login: response is not in Vault's format",
        ),
    ] {
        let mut setup = approle(&["main"], RoleSettings::default()).await;
        setup.timeout_ms = 1000;
        let vault = setup.vault.clone();
        vault.stop_clock();
        let rig = setup.ready().await;
        vault.fault(FaultRule::new(LOGIN, fault));
        vault.advance_clock(Duration::from_secs(3600));
        logged_then_next_version(&rig, 1, &[message, reason]).await;
        vault.clear_faults();
        rig.until_signed_with(2).await;
        assert_eq!(rig.logs.count(&["key unavailable"]), 0);
        rig.end().await;
    }
}
