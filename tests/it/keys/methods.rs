//! Logins with what the platform gives the broker: a pod's service account, a certificate, a systemd credential.

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
use super::login::{FIVE, approle, serves_through_what_is_logged};
use super::wrapped::wrapped;
use super::{LOGIN_REFUSED, NO_ANSWER, Setup, answered, key, put};
use crate::harness::until;

const KUBERNETES: &str = "auth/pods/login";
const CERT: &str = "auth/cert/login";
const RENEW: &str = "auth/token/renew-self";
const JWT: &str = "simulated-jwt-of-the-first-hour";

/// A broker in a pod; its projected token stands in `jwt`.
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
async fn a_pod_logs_in_with_the_service_account_token_of_the_moment() {
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
    assert_eq!(answered(&vault, KUBERNETES, 200), 2);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    assert_eq!(rig.logs.count(&["simulated-jwt"]), 0);
    rig.end().await;
}

#[tokio::test]
async fn while_kubernetes_is_down_the_refused_login_evicts_nothing() {
    let setup = pod().await;
    let vault = setup.vault.clone();
    vault.stop_clock();
    let rig = setup.ready().await;
    vault.set_reviewer(Reviewer::Down);
    vault.advance_clock(Duration::from_secs(3600));
    let line = [
        LOGIN_REFUSED,
        "login: Vault answered 403: permission denied",
    ];
    serves_through_what_is_logged(&rig, 1, &line).await;
    vault.set_reviewer(Reviewer::Up);
    rig.until_signed_with(2).await;
    assert_eq!(rig.logs.count(&["key unavailable"]), 0);
    assert_eq!(rig.logs.count(&[JWT]), 0);
    rig.end().await;
}

/// A broker with a certificate, `client.pem` and `client.key`, whose tokens live for `ttl` seconds.
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
async fn a_certificate_logs_in_and_renews() {
    let setup = certified(10, Some("trader")).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    assert_eq!(rig.signer("main").await, Ok(key("main", 1).api_key));
    rig.serves_until(1, "a renewal", async || answered(&vault, RENEW, 200) >= 1)
        .await;
    assert_eq!(answered(&vault, CERT, 200), 1);
    rig.end().await;
}

#[tokio::test]
async fn a_new_certificate_is_logged_in_with_and_one_without_its_key_is_not_used() {
    let setup = certified(10, None).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    let next = issue(&rig.lab.ca);
    rig.lab
        .replace("client.pem", &next.certificate_pem)
        .unwrap();
    let kept = "cannot reload the client certificate for Vault; keeping current";
    rig.serves_until(1, "the certificate is found without its key", async || {
        rig.logs.count(&[kept]) >= 1
    })
    .await;
    assert_eq!(answered(&vault, CERT, 200), 1);
    std::fs::remove_file(rig.lab.path("client.key")).unwrap();
    let missing = [kept, "No such file"];
    rig.serves_until(1, "the key is missing", async || {
        rig.logs.count(&missing) >= 1
    })
    .await;
    rig.lab.replace("client.key", &next.key_pem).unwrap();
    rig.serves_until(1, "a login with the new one", async || {
        answered(&vault, CERT, 200) >= 2
    })
    .await;
    // The connection and its token belong together: else these would be 500.
    let before = answered(&vault, RENEW, 200);
    rig.serves_until(1, "a renewal with the new one", async || {
        answered(&vault, RENEW, 200) > before
    })
    .await;
    assert_eq!(answered(&vault, RENEW, 500), 0);
    assert_eq!(answered(&vault, CERT, 200), 2);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    rig.end().await;
}

#[tokio::test]
async fn the_old_token_serves_while_a_new_certificate_is_refused() {
    let setup = certified(1200, None).await;
    let vault = setup.vault.clone();
    let rig = setup.ready().await;
    let stranger = issue(&Ca::new("another CA").unwrap());
    rig.lab
        .replace("client.pem", &stranger.certificate_pem)
        .unwrap();
    rig.lab.replace("client.key", &stranger.key_pem).unwrap();
    rig.serves_until(1, "a refused login", async || {
        answered(&vault, CERT, 400) >= 1
    })
    .await;
    put(&vault, "main", 2);
    rig.until_signed_with(2).await;
    let right = issue(&rig.lab.ca);
    rig.lab
        .replace("client.pem", &right.certificate_pem)
        .unwrap();
    rig.lab.replace("client.key", &right.key_pem).unwrap();
    rig.serves_until(2, "a login", async || answered(&vault, CERT, 200) >= 2)
        .await;
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    assert_eq!(rig.logs.count(&["PRIVATE KEY"]), 0);
    rig.end().await;
}

/// Vault takes any role that fits when none is named, and none is named where the field has another name.
#[tokio::test]
async fn a_certificate_logs_in_at_the_configured_role_and_no_other() {
    let setup = certified(1200, Some("nobody")).await;
    let rig = setup.start().await;
    until("the login is refused", async || {
        rig.logs
            .count(&[LOGIN_REFUSED, "login: Vault answered 400"])
            >= 1
    })
    .await;
    assert_eq!(answered(rig.vault(), CERT, 200), 0);
    rig.end().await;
}

#[tokio::test]
async fn the_check_finds_a_certificate_that_cannot_be_shown() {
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
        "there is none in it",
        "vault.auth.key: expected a private key as PEM in ",
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
            "expected https: vault.auth.method = \"cert\" shows a certificate, which http cannot"
        )]
    );
}

#[tokio::test]
async fn logins_name_the_configured_namespace() {
    for (mut setup, path) in [
        (pod().await, KUBERNETES),
        (certified(1200, None).await, CERT),
    ] {
        setup.more.push_str("\nnamespace = \"nowhere\"");
        let rig = setup.start().await;
        until("the login is refused", async || {
            rig.logs.count(&[
                LOGIN_REFUSED,
                "login: Vault answered 404: namespace not found",
            ]) >= 1
        })
        .await;
        assert_eq!(answered(rig.vault(), path, 200), 0);
        rig.end().await;
    }
}

/// The shipped program logs everything, gets its keys, and ends.
#[tokio::test]
async fn no_method_shows_its_secrets_and_every_token_is_revoked_at_the_end() {
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
            "{name}: everything is logged"
        );
        for secret in secrets {
            assert!(!log.contains(secret.trim()), "{name}: {secret}");
        }
        assert_eq!(vault.tokens(), [ROOT_TOKEN], "{name}");
    }
}

/// A broker whose secret id is a credential that systemd hands it.
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
