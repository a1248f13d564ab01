//! The broker's own token: from a file that an agent writes, or from an AppRole login.

use std::time::Duration;

use credbroker_sim::installation::ROOT_TOKEN;
use credbroker_sim::vault::{Fault, FaultRule, RoleSettings};

use super::{LOGIN_REFUSED, NO_ANSWER, Rig, Setup, answered, key, put};
use crate::harness::until;

pub(super) const LOGIN: &str = "auth/approle/login";
const LOOKUP: &str = "auth/token/lookup-self";
pub(super) const METADATA: &str = "kv/metadata/kucoin/prod/main/main";
const DEAD_TOKEN: &str = "Vault does not accept our token (403)";

#[tokio::test]
async fn a_token_file_may_have_blanks_and_a_line_end_around_the_token() {
    let mut setup = Setup::new(&["main"]).await;
    setup.settings.files = vec![("token", format!("\n  {ROOT_TOKEN} \r\n"))];
    let rig = setup.ready().await;
    assert_eq!(rig.signer("main").await, Ok(key("main", 1).api_key));
    rig.end().await;
}

#[tokio::test]
async fn a_dead_token_or_a_broken_token_file_evicts_nothing_and_a_good_token_is_picked_up() {
    let mut setup = Setup::new(&["main"]).await;
    let vault = setup.vault.clone();
    let token = || vault.create_token(Duration::from_secs(3600));
    let good = token();
    setup.settings.files = vec![("token", format!("{good}\n"))];
    let rig = setup.ready().await;
    let file = rig.lab.path("token");

    vault.revoke_token(&good);
    serves_through(&rig, 1, DEAD_TOKEN).await;
    rig.lab.replace("token", "never-a-token\n").unwrap();
    serves_through(&rig, 1, DEAD_TOKEN).await;
    assert!(answered(&vault, METADATA, 403) >= 4 && answered(&vault, LOOKUP, 403) >= 4);
    rig.lab.replace("token", &token()).unwrap();
    rig.until_signed_with(2).await;

    let expected = "expected one line of printable ASCII without blanks";
    rig.lab.replace("token", "two\nlines\n").unwrap();
    serves_through(&rig, 2, &format!("vault.auth: {expected}")).await;
    rig.lab.replace("token", "").unwrap();
    serves_through(&rig, 2, &format!("vault.auth: it is empty; {expected}")).await;
    rig.lab.replace("token", &token()).unwrap();
    rig.until_signed_with(3).await;

    std::fs::remove_file(&file).unwrap();
    serves_through(&rig, 3, "file of vault.auth cannot be read").await;
    rig.lab.replace("token", &token()).unwrap();
    rig.until_signed_with(4).await;
    assert_eq!(rig.logs.count(&["never-a-token"]), 0);
    rig.end().await;
}

/// A poll fails for this reason, and the key of `generation` stays in use. Vault then holds the next one, unseen.
async fn serves_through(rig: &Rig, generation: u32, reason: &str) {
    serves_through_what_is_logged(rig, generation, &[NO_ANSWER, reason]).await;
}

pub(super) async fn serves_through_what_is_logged(rig: &Rig, generation: u32, line: &[&str]) {
    let before = rig.logs.count(line);
    rig.serves_until(generation, &line.join(": "), async || {
        rig.logs.count(line) > before
    })
    .await;
    put(rig.vault(), "main", generation + 1);
}

/// The agent replaces a dead token between the second 403 and the lookup: the 403 were not about the new one.
#[tokio::test]
async fn a_403_counts_only_against_the_token_that_met_it() {
    let mut setup = Setup::new(&["main"]).await;
    let vault = setup.vault.clone();
    let dead = vault.create_token(Duration::from_secs(3600));
    setup.settings.files = vec![("token", dead.clone())];
    let rig = setup.ready().await;
    let begun = || {
        let requests = vault.requests();
        requests
            .iter()
            .filter(|seen| seen.path == format!("/v1/{METADATA}"))
            .count()
    };
    // Late enough that the file can be replaced while the broker waits for a 403.
    let before = begun();
    vault.fault(FaultRule::new(METADATA, Fault::Delay { ms: 600 }));
    vault.revoke_token(&dead);
    until("one 403 has come and a second is on its way", async || {
        answered(&vault, METADATA, 403) == 1
            && answered(&vault, LOOKUP, 403) == 1
            && begun() > before + 1
    })
    .await;
    rig.lab.replace("token", ROOT_TOKEN).unwrap();
    put(&vault, "main", 2);
    rig.until_signed_with(2).await;
    assert_eq!(rig.logs.count(&["key unavailable"]), 0);
    assert_eq!(rig.logs.count(&[NO_ANSWER, DEAD_TOKEN]), 0);
    rig.end().await;
}

#[tokio::test]
async fn a_403_to_a_token_that_cannot_be_looked_up_evicts_nothing() {
    for (fault, reason) in [
        (
            status(404),
            "lookup of the token: Vault has no such key (404)",
        ),
        (status(500), "lookup of the token: Vault answered 500"),
        (
            Fault::WrongJson,
            "lookup of the token: Vault's answer is not what its API describes",
        ),
    ] {
        let rig = Setup::new(&["main"]).await.ready().await;
        rig.vault().fault(FaultRule::new(LOOKUP, fault));
        rig.vault().deny(None, None, METADATA);
        serves_through(&rig, 1, reason).await;
        rig.vault().clear_faults();
        rig.until_evicted("Vault refuses it to the broker (403)")
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

/// A broker that logs in with an AppRole; its secret id stands in `secret-id`, with a line end.
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
async fn an_approle_logs_in_once_for_all_keys_with_the_secret_id_from_its_file() {
    let setup = approle(&FIVE, RoleSettings::default()).await;
    let vault = setup.vault.clone();
    // Long enough for every key to want a token.
    vault.fault(FaultRule::new(LOGIN, Fault::Delay { ms: 300 }));
    let rig = setup.ready().await;
    for account in FIVE {
        assert_eq!(rig.signer(account).await, Ok(key(account, 1).api_key));
    }
    assert_eq!(answered(&vault, LOGIN, 200), 1);
    rig.end().await;
}

#[tokio::test]
async fn a_login_that_vault_revoked_is_repeated_once_for_all_keys_and_no_call_fails() {
    let setup = approle(&FIVE, RoleSettings::default()).await;
    let vault = setup.vault.clone();
    vault.stop_clock();
    let rig = setup.ready().await;
    // Long enough for one key to find its token dead while another has already logged in again.
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
    assert!(answered(&vault, LOOKUP, 403) >= 2, "the keys were to meet");
    assert_eq!(answered(&vault, LOGIN, 200), 2);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    rig.end().await;
}

#[tokio::test]
async fn a_wrong_secret_id_is_told_and_the_right_one_is_picked_up() {
    let mut setup = approle(&["main"], RoleSettings::default()).await;
    let vault = setup.vault.clone();
    let (_, secret_id) = setup.settings.files.pop().unwrap();
    let rig = setup.start().await;
    rig.until_not_ready("file of vault.auth cannot be read")
        .await;
    assert_eq!(vault.requests(), []);
    rig.lab
        .replace("secret-id", "simulated-wrong-secret-id\n")
        .unwrap();
    let reason =
        "key main/main: waiting for Vault: login: Vault answered 400: invalid role or secret ID\n";
    rig.until_not_ready(reason).await;
    assert!(rig.logs.count(&[LOGIN_REFUSED]) >= 1);
    assert_eq!(rig.logs.count(&["simulated-wrong-secret-id"]), 0);
    rig.lab.replace("secret-id", &secret_id).unwrap();
    rig.until_restored(1).await;
    rig.end().await;
}

/// Kubernetes logins are 403 while its API server is down: no authority over the secret.
#[tokio::test]
async fn a_login_that_is_refused_evicts_nothing() {
    for (fault, message, reason) in [
        (status(400), LOGIN_REFUSED, "login: Vault answered 400"),
        (status(403), LOGIN_REFUSED, "login: Vault answered 403"),
        (status(404), LOGIN_REFUSED, "login: Vault answered 404"),
        (status(412), NO_ANSWER, "login: Vault answered 412"),
        (status(429), NO_ANSWER, "login: Vault answered 429"),
        (status(500), NO_ANSWER, "login: Vault answered 500"),
        (Fault::Hang, NO_ANSWER, "login: Vault cannot be reached"),
        (
            Fault::NotJson,
            NO_ANSWER,
            "login: Vault's answer is not what its API describes",
        ),
    ] {
        let mut setup = approle(&["main"], RoleSettings::default()).await;
        setup.timeout_ms = 1000;
        let vault = setup.vault.clone();
        vault.stop_clock();
        let rig = setup.ready().await;
        vault.fault(FaultRule::new(LOGIN, fault));
        vault.advance_clock(Duration::from_secs(3600));
        serves_through_what_is_logged(&rig, 1, &[message, reason]).await;
        vault.clear_faults();
        rig.until_signed_with(2).await;
        assert_eq!(rig.logs.count(&["key unavailable"]), 0);
        rig.end().await;
    }
}
