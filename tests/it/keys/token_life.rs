//! The lifecycle of a token from a login: renewed, replaced before it expires, revoked at shutdown.

use std::sync::Arc;
use std::time::Duration;

use credbroker::vault::{OutageKind, Vault};
use credbroker_sim::installation::ROOT_TOKEN;
use credbroker_sim::vault::{Fault, FaultRule, RoleSettings, Seen, VaultSim};

use super::login::{FIVE, LOGIN, METADATA, approle, status};
use super::{NO_ANSWER, count_responses, put};
use crate::harness::until;

const RENEW: &str = "auth/token/renew-self";
const REVOKE: &str = "auth/token/revoke-self";
const NOT_RENEWED: &str = "Vault token renewal failed";

/// A role whose tokens have this TTL and this maximum TTL, in seconds.
///
/// Some polls must fall between two thirds of a lease and its last fifth; with five keys, polls are frequent enough.
fn role(ttl: u64, max_ttl: u64) -> RoleSettings {
    RoleSettings {
        token_ttl: Some(Duration::from_secs(ttl)),
        token_max_ttl: Some(Duration::from_secs(max_ttl)),
        ..RoleSettings::default()
    }
}

/// The number of responses 403, each to a request with an expired token.
fn refusals(vault: &VaultSim) -> usize {
    let requests = vault.requests();
    let denied = requests.iter().filter(|seen| seen.status == Some(403));
    denied.count()
}

/// The valid tokens of the broker.
fn own_tokens(vault: &VaultSim) -> Vec<String> {
    let mut tokens = vault.tokens();
    tokens.retain(|token| token != ROOT_TOKEN);
    tokens
}

#[tokio::test]
async fn token_is_renewed_as_long_as_renewal_extends_its_lease() {
    let setup = approle(&FIVE, role(10, 3600)).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    let tokens = own_tokens(&vault);
    rig.signs_until(1, "two renewals", async || {
        count_responses(&vault, RENEW, 200) >= 2
    })
    .await;
    assert_eq!(own_tokens(&vault), tokens);
    assert_eq!(count_responses(&vault, LOGIN, 200), 1);
    assert_eq!(refusals(&vault), 0);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    // Once per lease, not once per poll and key.
    assert!(count_responses(&vault, METADATA, 200) > count_responses(&vault, RENEW, 200));
    rig.end().await;
}

#[tokio::test]
async fn token_at_its_max_ttl_is_replaced_before_it_expires() {
    let setup = approle(&FIVE, role(10, 15)).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    rig.signs_until(1, "a renewal and a second login", async || {
        count_responses(&vault, LOGIN, 200) >= 2
    })
    .await;
    // This renewal showed that the lease can no longer be extended.
    assert_eq!(count_responses(&vault, RENEW, 200), 1);
    assert_eq!(refusals(&vault), 0);
    rig.end().await;
}

#[tokio::test]
async fn failed_renewal_is_retried_without_an_outage() {
    let setup = approle(&FIVE, role(20, 3600)).await;
    let vault = setup.vault.clone();
    vault.fault(FaultRule::new(RENEW, status(500)).times(1));
    let rig = setup.ready().await;
    rig.signs_until(1, "a successful renewal", async || {
        count_responses(&vault, RENEW, 200) >= 1
    })
    .await;
    assert_eq!(count_responses(&vault, RENEW, 500), 1);
    assert_eq!(count_responses(&vault, LOGIN, 200), 1);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    assert_eq!(rig.logs.count(&[NOT_RENEWED, "Vault returned 500"]), 1);
    rig.end().await;
}

#[tokio::test]
async fn non_renewable_token_is_replaced_at_once() {
    assert_eq!(renewals_before_a_new_login(400).await, 1);
}

/// For example under a policy without renew-self.
#[tokio::test]
async fn token_without_permission_to_renew_is_replaced_after_two_attempts() {
    assert_eq!(renewals_before_a_new_login(403).await, 2);
}

#[tokio::test]
async fn token_whose_renewals_keep_failing_is_replaced_before_it_expires() {
    // As many as fit between two thirds of the lease and its last fifth, with backoff in between.
    let renewals = renewals_before_a_new_login(500).await;
    assert!((1..=8).contains(&renewals), "{renewals} renewals");
}

/// The number of renewal attempts if each returns `code`. The old token stays in use until the new login.
async fn renewals_before_a_new_login(code: u16) -> usize {
    let setup = approle(&FIVE, role(16, 3600)).await;
    let vault = setup.vault.clone();
    vault.fault(FaultRule::new(RENEW, status(code)));
    let rig = setup.ready().await;
    rig.signs_until(1, "a second login", async || {
        count_responses(&vault, LOGIN, 200) >= 2
    })
    .await;
    // On a very slow machine the token may expire before the login; the broker handles that too.
    let expired = count_responses(&vault, METADATA, 403);
    assert!(expired <= FIVE.len(), "{expired}");
    for about in ["login", "token"] {
        assert_eq!(rig.logs.count(&[NO_ANSWER, about]), 0, "{:?}", rig.logs);
    }
    let renewals = count_responses(&vault, RENEW, code);
    rig.end().await;
    renewals
}

#[tokio::test]
async fn token_is_used_until_it_expires_if_the_new_login_is_rejected() {
    let setup = approle(&FIVE, role(12, 3600)).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    vault.fault(FaultRule::new(RENEW, status(400)));
    vault.fault(FaultRule::new(LOGIN, status(403)));
    rig.signs_until(1, "a rejected login", async || {
        count_responses(&vault, LOGIN, 403) >= 1
    })
    .await;
    // The old token still works.
    put(&vault, "main", 2);
    rig.until_signed_with(2).await;
    let warning = "Vault login failed; using current token until it expires";
    assert!(rig.logs.count(&[warning, "login: Vault returned 403"]) >= 1);
    vault.clear_faults();
    rig.signs_until(2, "a second login", async || {
        count_responses(&vault, LOGIN, 200) >= 2
    })
    .await;
    rig.end().await;
}

#[tokio::test]
async fn request_is_retried_before_a_new_login_if_a_node_does_not_know_the_token() {
    let setup = approle(&["main"], RoleSettings::default()).await;
    let vault = setup.vault.clone();
    vault.fault(FaultRule::new(METADATA, status(403)).times(1));
    vault.fault(FaultRule::new("auth/token/lookup-self", status(403)).times(1));
    let rig = setup.ready().await;
    assert_eq!(count_responses(&vault, METADATA, 403), 1);
    assert_eq!(count_responses(&vault, LOGIN, 200), 1);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    rig.end().await;
}

#[tokio::test]
async fn request_is_tried_three_times_if_a_node_lags_behind() {
    let setup = approle(&["main"], RoleSettings::default()).await;
    let vault = setup.vault.clone();
    vault.fault(FaultRule::new(METADATA, status(412)).times(2));
    let rig = setup.ready().await;
    assert_eq!(count_responses(&vault, METADATA, 412), 2);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    vault.fault(FaultRule::new(METADATA, status(412)).times(3));
    rig.signs_until(1, "three failed attempts", async || {
        rig.logs.count(&[NO_ANSWER, "Vault returned 412"]) == 1
    })
    .await;
    rig.end().await;
}

/// Logins succeed, but each use of their tokens returns 403.
#[tokio::test]
async fn logins_back_off_while_token_bound_cidrs_exclude_the_broker() {
    let role = RoleSettings {
        token_bound_cidrs: vec!["192.0.2.0/24".to_owned()],
        ..RoleSettings::default()
    };
    let setup = approle(&FIVE, role).await;
    let vault = setup.vault.clone();
    let rig = setup.start().await;
    rig.until_not_ready("key main/main: waiting for Vault: Vault rejected the token (403); check that token_bound_cidrs includes this machine's address")
        .await;
    // Five keys send requests; the waits between logins are random parts of 1, 2, 4, 8 s.
    until("many polls", async || rig.logs.count(&[NO_ANSWER]) >= 15).await;
    let logins = count_responses(&vault, LOGIN, 200);
    assert!((2..=8).contains(&logins), "{logins} logins");
    rig.end().await;
}

#[tokio::test]
async fn login_token_is_revoked_when_the_broker_stops() {
    let setup = approle(&FIVE, RoleSettings::default()).await;
    let vault = setup.vault.clone();
    let mut rig = setup.ready().await;
    assert_eq!(own_tokens(&vault).len(), 1);
    assert_eq!(rig.lab.stop().await, 0);
    assert_eq!(own_tokens(&vault), [""; 0]);
    assert_eq!(count_responses(&vault, REVOKE, 204), 1);
    assert_eq!(count_responses(&vault, LOGIN, 200), 1);
}

#[tokio::test]
async fn poll_after_shutdown_revoked_the_token_does_not_log_in_again() {
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
    assert_eq!(count_responses(&vault, LOGIN, 200), 1);
    assert_eq!(own_tokens(&vault), [""; 0]);
}

#[tokio::test]
async fn token_from_a_token_file_is_never_renewed_or_revoked() {
    let setup = super::Setup::new(&["main"]).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    rig.end().await;
    let is_token_request = |seen: &Seen| seen.path.starts_with("/v1/auth/token/");
    assert!(!vault.requests().iter().any(is_token_request));
}

#[tokio::test]
async fn hanging_vault_does_not_block_shutdown() {
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
