//! The life of a token that the broker logged in for: renewed, replaced before it ends, revoked at the stop.

use std::sync::Arc;
use std::time::Duration;

use credbroker::vault::{OutageKind, Vault};
use credbroker_sim::installation::ROOT_TOKEN;
use credbroker_sim::vault::{Fault, FaultRule, RoleSettings, Seen, VaultSim};

use super::login::{FIVE, LOGIN, METADATA, approle, status};
use super::{NO_ANSWER, answered, put};
use crate::harness::until;

const RENEW: &str = "auth/token/renew-self";
const REVOKE: &str = "auth/token/revoke-self";
const NOT_RENEWED: &str = "Vault token renewal failed";

/// A role whose tokens live for so many seconds, and with renewals for so many.
///
/// Between two thirds of a lease and its last fifth must lie some polls; with five keys they come close together.
fn role(ttl: u64, max_ttl: u64) -> RoleSettings {
    RoleSettings {
        token_ttl: Some(Duration::from_secs(ttl)),
        token_max_ttl: Some(Duration::from_secs(max_ttl)),
        ..RoleSettings::default()
    }
}

/// How many requests were refused with 403: each is a token that was used too long.
fn refusals(vault: &VaultSim) -> usize {
    let requests = vault.requests();
    let refused = requests.iter().filter(|seen| seen.status == Some(403));
    refused.count()
}

/// The broker's own tokens that are valid.
fn own_tokens(vault: &VaultSim) -> Vec<String> {
    let mut tokens = vault.tokens();
    tokens.retain(|token| token != ROOT_TOKEN);
    tokens
}

#[tokio::test]
async fn a_token_is_renewed_as_long_as_that_extends_its_lease() {
    let setup = approle(&FIVE, role(10, 3600)).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    let tokens = own_tokens(&vault);
    rig.serves_until(1, "two renewals", async || {
        answered(&vault, RENEW, 200) >= 2
    })
    .await;
    assert_eq!(own_tokens(&vault), tokens);
    assert_eq!(answered(&vault, LOGIN, 200), 1);
    assert_eq!(refusals(&vault), 0);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    // Once per lease, not once per poll and key.
    assert!(answered(&vault, METADATA, 200) > answered(&vault, RENEW, 200));
    rig.end().await;
}

#[tokio::test]
async fn at_its_maximum_a_token_is_replaced_before_it_ends() {
    let setup = approle(&FIVE, role(10, 15)).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    rig.serves_until(1, "a renewal and a second login", async || {
        answered(&vault, LOGIN, 200) >= 2
    })
    .await;
    // The one that showed that the lease gets no longer.
    assert_eq!(answered(&vault, RENEW, 200), 1);
    assert_eq!(refusals(&vault), 0);
    rig.end().await;
}

#[tokio::test]
async fn a_renewal_that_fails_is_repeated_after_a_wait_and_nobody_notices() {
    let setup = approle(&FIVE, role(20, 3600)).await;
    let vault = setup.vault.clone();
    vault.fault(FaultRule::new(RENEW, status(500)).times(1));
    let rig = setup.ready().await;
    rig.serves_until(1, "a renewal in the end", async || {
        answered(&vault, RENEW, 200) >= 1
    })
    .await;
    assert_eq!(answered(&vault, RENEW, 500), 1);
    assert_eq!(answered(&vault, LOGIN, 200), 1);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    assert_eq!(rig.logs.count(&[NOT_RENEWED, "Vault answered 500"]), 1);
    rig.end().await;
}

#[tokio::test]
async fn a_token_that_is_not_renewable_is_replaced_at_once() {
    assert_eq!(renewals_before_a_new_login(400).await, 1);
}

/// A policy without renew-self.
#[tokio::test]
async fn a_token_that_may_not_be_renewed_is_replaced_after_two_attempts() {
    assert_eq!(renewals_before_a_new_login(403).await, 2);
}

#[tokio::test]
async fn a_token_whose_renewal_fails_on_and_on_is_replaced_before_it_ends() {
    // As many as fit between two thirds of the lease and its last fifth, with waits between.
    let renewals = renewals_before_a_new_login(500).await;
    assert!((1..=8).contains(&renewals), "{renewals} renewals");
}

/// How often a renewal is tried that is always answered `code`. The old token is good until the new one is there.
async fn renewals_before_a_new_login(code: u16) -> usize {
    let setup = approle(&FIVE, role(16, 3600)).await;
    let vault = setup.vault.clone();
    vault.fault(FaultRule::new(RENEW, status(code)));
    let rig = setup.ready().await;
    rig.serves_until(1, "a second login", async || {
        answered(&vault, LOGIN, 200) >= 2
    })
    .await;
    // On a machine slower than the last tenth of the lease the token may end first: that is noticed and mended, too.
    let ended_first = answered(&vault, METADATA, 403);
    assert!(ended_first <= FIVE.len(), "{ended_first}");
    for about in ["login", "token"] {
        assert_eq!(rig.logs.count(&[NO_ANSWER, about]), 0, "{:?}", rig.logs);
    }
    let renewals = answered(&vault, RENEW, code);
    rig.end().await;
    renewals
}

#[tokio::test]
async fn a_token_whose_replacement_is_refused_is_used_to_its_end() {
    let setup = approle(&FIVE, role(12, 3600)).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    vault.fault(FaultRule::new(RENEW, status(400)));
    vault.fault(FaultRule::new(LOGIN, status(403)));
    rig.serves_until(1, "a refused login", async || {
        answered(&vault, LOGIN, 403) >= 1
    })
    .await;
    // The old token still reads.
    put(&vault, "main", 2);
    rig.until_signed_with(2).await;
    let warned = "Vault token is about to expire and login fails";
    assert!(rig.logs.count(&[warned, "login: Vault answered 403"]) >= 1);
    vault.clear_faults();
    rig.serves_until(2, "a second login", async || {
        answered(&vault, LOGIN, 200) >= 2
    })
    .await;
    rig.end().await;
}

#[tokio::test]
async fn a_follower_that_does_not_know_the_token_yet_is_asked_again_before_another_login() {
    let setup = approle(&["main"], RoleSettings::default()).await;
    let vault = setup.vault.clone();
    vault.fault(FaultRule::new(METADATA, status(403)).times(1));
    vault.fault(FaultRule::new("auth/token/lookup-self", status(403)).times(1));
    let rig = setup.ready().await;
    assert_eq!(answered(&vault, METADATA, 403), 1);
    assert_eq!(answered(&vault, LOGIN, 200), 1);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    rig.end().await;
}

#[tokio::test]
async fn a_node_that_is_behind_is_asked_three_times() {
    let setup = approle(&["main"], RoleSettings::default()).await;
    let vault = setup.vault.clone();
    vault.fault(FaultRule::new(METADATA, status(412)).times(2));
    let rig = setup.ready().await;
    assert_eq!(answered(&vault, METADATA, 412), 2);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    vault.fault(FaultRule::new(METADATA, status(412)).times(3));
    rig.serves_until(1, "three answers in vain", async || {
        rig.logs.count(&[NO_ANSWER, "Vault answered 412"]) == 1
    })
    .await;
    rig.end().await;
}

/// Logins succeed there, and every use of their tokens is 403.
#[tokio::test]
async fn outside_the_addresses_of_a_token_there_is_no_storm_of_logins() {
    let role = RoleSettings {
        token_bound_cidrs: vec!["192.0.2.0/24".to_owned()],
        ..RoleSettings::default()
    };
    let setup = approle(&FIVE, role).await;
    let vault = setup.vault.clone();
    let rig = setup.start().await;
    rig.until_not_ready("key main/main: waiting for Vault: Vault does not accept our token (403); is this address in token_bound_cidrs?")
        .await;
    // Five keys have asked; the logins are a random part of 1, 2, 4, 8 s apart.
    until("many polls", async || rig.logs.count(&[NO_ANSWER]) >= 15).await;
    let logins = answered(&vault, LOGIN, 200);
    assert!((2..=8).contains(&logins), "{logins} logins");
    rig.end().await;
}

#[tokio::test]
async fn the_token_of_a_login_is_revoked_when_the_broker_stops() {
    let setup = approle(&FIVE, RoleSettings::default()).await;
    let vault = setup.vault.clone();
    let mut rig = setup.ready().await;
    assert_eq!(own_tokens(&vault).len(), 1);
    assert_eq!(rig.lab.stop().await, 0);
    assert_eq!(own_tokens(&vault), [""; 0]);
    assert_eq!(answered(&vault, REVOKE, 204), 1);
    assert_eq!(answered(&vault, LOGIN, 200), 1);
}

#[tokio::test]
async fn a_poll_that_comes_after_the_token_was_revoked_logs_in_no_more() {
    let setup = approle(&["main"], RoleSettings::default()).await;
    let vault = setup.vault.clone();
    let lab = setup.install().await;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let client = Vault::new(lab.config().vault, tls, std::sync::Arc::default()).unwrap();
    let (account, name) = ("main".parse().unwrap(), "main".parse().unwrap());
    assert!(client.metadata(&account, &name).await.is_ok());
    client.close().await;
    assert_eq!(
        client.metadata(&account, &name).await,
        Err(OutageKind::Other.outage("the broker is stopping"))
    );
    assert_eq!(answered(&vault, LOGIN, 200), 1);
    assert_eq!(own_tokens(&vault), [""; 0]);
}

#[tokio::test]
async fn an_agents_token_is_not_the_brokers_to_revoke() {
    let setup = super::Setup::new(&["main"]).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    rig.end().await;
    let about_tokens = |seen: &Seen| seen.path.starts_with("/v1/auth/token/");
    assert!(!vault.requests().iter().any(about_tokens));
}

#[tokio::test]
async fn a_vault_that_hangs_keeps_no_broker_from_stopping() {
    let mut setup = approle(&["main"], RoleSettings::default()).await;
    setup.timeout_ms = 500;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    vault.fault(FaultRule::new(REVOKE, Fault::Hang));
    let logs = rig.logs.clone();
    rig.end().await;
    assert_eq!(
        logs.count(&["Vault token not revoked; it expires with its lease"]),
        1
    );
}
