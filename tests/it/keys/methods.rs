//! Vault logins with credentials from the platform: a pod's service account, a certificate, a systemd credential.

use std::time::Duration;

use credbroker::clock::Clock;
use credbroker::config::Config;
use credbroker::config::load::load;
use credbroker_sim::installation::ROOT_TOKEN;
use credbroker_sim::pki::{Ca, Identity, Usage};
use credbroker_sim::vault::{
    CertRole, KubernetesRole, Reviewer, RoleSettings, ServiceAccount, TokenSettings, VaultSim,
};

use super::guards::Program;
use super::login::{FIVE, approle, logged_then_next_version};
use super::wrapped::wrapped;
use super::{LOGIN_REFUSED, NO_ANSWER, Setup, count_responses, key, put};
use crate::harness::until;

const KUBERNETES: &str = "auth/pods/login";
const CERT: &str = "auth/cert/login";
const RENEW: &str = "auth/token/renew-self";
const JWT: &str = "simulated-jwt-of-the-first-hour";

/// A broker in a pod; its projected token is in the file `jwt`.
async fn pod() -> Setup {
    let mut setup = Setup::new(&["main"]).await;
    let vault = &setup.vault;
    vault.enable_kubernetes("pods", "credbroker", KubernetesRole::default());
    vault.accept_jwt(JWT, ServiceAccount::default());
    setup.settings.auth = String::from(
        "method = \"kubernetes\"\nmount = \"pods\"\nrole = \"credbroker\"\njwt_file = \"jwt\"",
    );
    setup.settings.files = vec![("jwt", JWT.to_owned())];
    setup
}

#[tokio::test]
async fn pod_logs_in_with_its_current_service_account_token() {
    let setup = pod().await;
    let vault = setup.vault.clone();
    vault.stop_clock();
    let rig = setup.ready().await;
    assert_eq!(rig.signer("main").await, Ok(key("main", 1).api_key));

    let next = "simulated-jwt-of-the-second-hour";
    vault.refuse_jwt(JWT);
    vault.accept_jwt(next, ServiceAccount::default());
    rig.lab.replace("jwt", next).unwrap();
    vault.advance_clock(Duration::from_secs(3600));
    put(&vault, "main", 2);
    rig.until_signed_with(2).await;
    assert_eq!(count_responses(&vault, KUBERNETES, 200), 2);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    assert_eq!(rig.logs.count(&["simulated-jwt"]), 0);
    rig.end().await;
}

#[tokio::test]
async fn rejected_login_evicts_nothing_while_kubernetes_is_down() {
    let setup = pod().await;
    let vault = setup.vault.clone();
    vault.stop_clock();
    let rig = setup.ready().await;
    vault.set_reviewer(Reviewer::Down);
    vault.advance_clock(Duration::from_secs(3600));
    let line = [
        LOGIN_REFUSED,
        "login: Vault returned 403: permission denied",
    ];
    logged_then_next_version(&rig, 1, &line).await;
    vault.set_reviewer(Reviewer::Up);
    rig.until_signed_with(2).await;
    assert_eq!(rig.logs.count(&["key unavailable"]), 0);
    assert_eq!(rig.logs.count(&[JWT]), 0);
    rig.end().await;
}

/// A broker that logs in with `client.pem` and `client.key`; its tokens are valid for `ttl` seconds.
async fn certified(ttl: u64, role: Option<&str>) -> Setup {
    let ca = Ca::new("throw-away CA of a test").unwrap();
    let vault = VaultSim::start_dev_tls(ROOT_TOKEN, &ca.server().unwrap())
        .await
        .unwrap();
    let settings = CertRole {
        allowed_common_names: vec!["broker".to_owned()],
        certificate_pem: ca.certificate_pem().to_owned(),
        tokens: TokenSettings {
            ttl: Some(Duration::from_secs(ttl)),
            ..TokenSettings::default()
        },
        ..CertRole::default()
    };
    vault.enable_cert("cert", "trader", settings).unwrap();
    let mut setup = Setup::on(vault, &FIVE);
    let Identity {
        certificate_pem,
        key_pem,
    } = issue(&ca);
    setup.settings.files = vec![("client.pem", certificate_pem), ("client.key", key_pem)];
    setup.settings.ca = Some(ca);
    setup.more = String::from("roots = \"ca.pem\"");
    let role = role.map_or_else(String::new, |role| format!("role = \"{role}\"\n"));
    setup.settings.auth =
        format!("method = \"cert\"\n{role}certificate = \"client.pem\"\nkey = \"client.key\"");
    setup
}

fn issue(ca: &Ca) -> Identity {
    ca.issue("broker", &[], Usage::Client).unwrap()
}

#[tokio::test]
async fn certificate_login_works_and_its_token_is_renewed() {
    let setup = certified(10, Some("trader")).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    assert_eq!(rig.signer("main").await, Ok(key("main", 1).api_key));
    rig.signs_until(1, "a renewal", async || {
        count_responses(&vault, RENEW, 200) >= 1
    })
    .await;
    assert_eq!(count_responses(&vault, CERT, 200), 1);
    rig.end().await;
}

#[tokio::test]
async fn new_certificate_is_used_for_login_only_once_its_key_matches() {
    let setup = certified(10, None).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    let next = issue(&rig.lab.ca);
    rig.lab
        .replace("client.pem", &next.certificate_pem)
        .unwrap();
    let reload_failed =
        "cannot reload the client certificate for Vault; still using the current one";
    rig.signs_until(1, "the certificate does not match its key", async || {
        rig.logs.count(&[reload_failed]) >= 1
    })
    .await;
    assert_eq!(count_responses(&vault, CERT, 200), 1);
    std::fs::remove_file(rig.lab.path("client.key")).unwrap();
    let missing = [reload_failed, "No such file"];
    rig.signs_until(1, "the key is missing", async || {
        rig.logs.count(&missing) >= 1
    })
    .await;
    rig.lab.replace("client.key", &next.key_pem).unwrap();
    rig.signs_until(1, "a login with the new certificate", async || {
        count_responses(&vault, CERT, 200) >= 2
    })
    .await;
    // A token works only over the connection with its own certificate; otherwise renewals would return 500.
    let before = count_responses(&vault, RENEW, 200);
    rig.signs_until(1, "a renewal with the new certificate", async || {
        count_responses(&vault, RENEW, 200) > before
    })
    .await;
    assert_eq!(count_responses(&vault, RENEW, 500), 0);
    assert_eq!(count_responses(&vault, CERT, 200), 2);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    rig.end().await;
}

#[tokio::test]
async fn old_token_stays_in_use_while_the_new_certificate_is_rejected() {
    let setup = certified(1200, None).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    let untrusted = issue(&Ca::new("another CA").unwrap());
    rig.lab
        .replace("client.pem", &untrusted.certificate_pem)
        .unwrap();
    rig.lab.replace("client.key", &untrusted.key_pem).unwrap();
    rig.signs_until(1, "a rejected login", async || {
        count_responses(&vault, CERT, 400) >= 1
    })
    .await;
    put(&vault, "main", 2);
    rig.until_signed_with(2).await;
    let right = issue(&rig.lab.ca);
    rig.lab
        .replace("client.pem", &right.certificate_pem)
        .unwrap();
    rig.lab.replace("client.key", &right.key_pem).unwrap();
    rig.signs_until(2, "a login", async || {
        count_responses(&vault, CERT, 200) >= 2
    })
    .await;
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    assert_eq!(rig.logs.count(&["PRIVATE KEY"]), 0);
    rig.end().await;
}

/// Vault picks any matching role if the login names none, so a misspelled field in the login request would go unnoticed.
#[tokio::test]
async fn certificate_login_uses_only_the_configured_role() {
    let setup = certified(1200, Some("nobody")).await;
    let rig = setup.start().await;
    until("the login is rejected", async || {
        rig.logs
            .count(&[LOGIN_REFUSED, "login: Vault returned 400"])
            >= 1
    })
    .await;
    assert_eq!(count_responses(rig.vault(), CERT, 200), 0);
    rig.end().await;
}

#[tokio::test]
async fn config_check_finds_an_unusable_vault_client_certificate() {
    let lab = certified(1200, None).await.install().await;
    assert!(load(&lab.config(), Clock::system().wall_ms()).is_ok());
    let problems = |config: Config| {
        let problems = load(&config, Clock::system().wall_ms()).unwrap_err();
        let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
        problems.join("\n")
    };
    lab.replace("client.key", &issue(&lab.ca).key_pem).unwrap();
    let found = problems(lab.config());
    assert!(
        found.starts_with("vault.auth.key: ")
            && found.contains("is not the key of vault.auth.certificate"),
        "{found}"
    );
    std::fs::remove_file(lab.path("client.key")).unwrap();
    lab.replace("client.pem", "").unwrap();
    let found = problems(lab.config());
    for part in [
        "vault.auth.certificate: ",
        "no CERTIFICATE section found",
        "vault.auth.key: expected a PEM private key in ",
    ] {
        assert!(found.contains(part), "{part} is not in\n{found}");
    }

    let text = std::fs::read_to_string(lab.path("config.toml")).unwrap();
    let plain = text.replace("https://", "http://");
    let problems = Config::parse(&plain, lab.folder.path()).unwrap_err();
    let problems: Vec<_> = problems
        .iter()
        .map(|problem| (problem.key.as_str(), problem.problem.as_str()))
        .collect();
    assert_eq!(
        problems,
        [(
            "vault.address",
            "expected https, because vault.auth.method = \"cert\" sends a client certificate"
        )]
    );
}

#[tokio::test]
async fn logins_are_sent_to_the_configured_namespace() {
    for (mut setup, path) in [
        (pod().await, KUBERNETES),
        (certified(1200, None).await, CERT),
    ] {
        setup.more.push_str("\nnamespace = \"nowhere\"");
        let rig = setup.start().await;
        until("the login is rejected", async || {
            rig.logs.count(&[
                LOGIN_REFUSED,
                "login: Vault returned 404: namespace not found",
            ]) >= 1
        })
        .await;
        assert_eq!(count_responses(rig.vault(), path, 200), 0);
        rig.end().await;
    }
}

/// Runs the `credbroker` program at log level TRACE until it has its keys, then stops it.
#[tokio::test]
async fn no_login_method_logs_secrets_and_each_revokes_its_token_on_exit() {
    for (name, setup) in [
        ("kubernetes", pod().await),
        ("cert", certified(1200, None).await),
        ("wrapped", wrapped("credbroker").await),
        ("credential", credential().await),
    ] {
        let vault = setup.vault.clone();
        let mut secrets: Vec<_> = setup
            .settings
            .files
            .iter()
            .map(|(_, text)| text.clone())
            .collect();
        let lab = setup.install().await;
        let mut config = std::fs::read_to_string(lab.path("config.toml")).unwrap();
        config.push_str("[log]\nfilter = \"trace\"\n");
        std::fs::write(lab.path("config.toml"), config).unwrap();
        let folder = lab.folder.path().to_owned();
        let program = Program::ready(&lab, |command| {
            command.env("CREDENTIALS_DIRECTORY", folder);
        })
        .await;
        let tokens = vault.tokens();
        assert_eq!(
            tokens.len(),
            2,
            "{name}: the root token and the broker's own"
        );
        secrets.extend(tokens);
        let log = program.stop().await;
        assert!(
            log.contains("logged in to Vault"),
            "{name}: expected log level TRACE"
        );
        for secret in secrets {
            assert!(!log.contains(secret.trim()), "{name}: {secret}");
        }
        assert_eq!(vault.tokens(), [ROOT_TOKEN], "{name}");
    }
}

/// A broker that gets its secret id as a systemd credential.
async fn credential() -> Setup {
    let mut setup = approle(&["main"], RoleSettings::default()).await;
    let (name, secret_id) = setup.settings.files.pop().unwrap();
    setup.settings.auth = setup
        .settings
        .auth
        .replace("secret_id_file", "secret_id_credential")
        .replace(name, "vault-secret-id");
    setup.settings.files = vec![("vault-secret-id", secret_id)];
    setup
}
