//! Certificate and Kubernetes logins, beyond the recording: who gets in, whose renewals work, a reviewer that is down.

use std::sync::Arc;
use std::time::Duration;

use credbroker_sim::pki::{Ca, Identity, SanType, Usage};
use credbroker_sim::vault::{
    CertRole, Fault, FaultRule, KubernetesRole, NoCa, Reviewer, ServiceAccount, TokenSettings,
    VaultSim,
};
use rustls::ClientConfig;
use serde_json::{Value, json};

use crate::ROOT;
use crate::client::{Answer, call, tls};

const STRANGER: &str = "invalid certificate or no client certificate supplied";
const UNFIT: &str = "no chain matching all constraints could be found for this login certificate";

/// A server over TLS with a role `broker` at `auth/cert` for the common name `broker`, and its CA.
async fn with_cert() -> (VaultSim, Ca) {
    let ca = Ca::new("simulated CA").unwrap();
    let sim = VaultSim::start_dev_tls(ROOT, &ca.server().unwrap())
        .await
        .unwrap();
    let role = named(&ca, "broker");
    sim.enable_cert("cert", "broker", role).unwrap();
    (sim, ca)
}

fn named(ca: &Ca, common_name: &str) -> CertRole {
    CertRole {
        allowed_common_names: vec![common_name.to_owned()],
        certificate_pem: ca.certificate_pem().to_owned(),
        ..CertRole::default()
    }
}

fn client(ca: &Ca, common_name: &str) -> Identity {
    ca.issue(common_name, &[], Usage::Client).unwrap()
}

/// Logs in at `auth/cert` over `tls`.
async fn cert_login(sim: &VaultSim, tls: &Arc<ClientConfig>, body: Value) -> Answer {
    let login = call("POST", "/v1/auth/cert/login").over(tls);
    login.raw_body(&body.to_string()).send(&sim.address()).await
}

async fn renew(sim: &VaultSim, tls: &Arc<ClientConfig>, token: &str) -> Answer {
    let renew = call("POST", "/v1/auth/token/renew-self").header("X-Vault-Token", token);
    renew.over(tls).send(&sim.address()).await
}

/// Logs in at `auth/kubernetes`.
async fn jwt_login(sim: &VaultSim, role: &str, jwt: &str) -> Answer {
    let login = call("POST", "/v1/auth/kubernetes/login");
    let body = json!({ "role": role, "jwt": jwt }).to_string();
    login.raw_body(&body).send(&sim.address()).await
}

fn token(came: &Answer) -> String {
    assert_eq!(came.status, 200, "{}", came.body);
    let token = came.body.pointer("/auth/client_token").unwrap();
    token.as_str().unwrap().to_owned()
}

fn refused(came: &Answer) -> (u16, &str) {
    let problem = came.body.pointer("/errors/0").unwrap();
    (came.status, problem.as_str().unwrap())
}

#[tokio::test]
async fn a_certificate_logs_in_and_only_the_very_same_one_renews() {
    let (sim, ca) = with_cert().await;
    let broker = tls(&ca, Some(&client(&ca, "broker")));
    let came = cert_login(&sim, &broker, json!({})).await;
    let token = token(&came);
    assert_eq!(came.body["auth"]["policies"], json!(["broker"]));
    assert_eq!(came.body["auth"]["lease_duration"], 1200);
    assert_eq!(renew(&sim, &broker, &token).await.status, 200);

    let reissued = tls(&ca, Some(&client(&ca, "broker")));
    let came = renew(&sim, &reissued, &token).await;
    let problem = "failed to renew entry: client identity during renewal not matching";
    assert!(came.status == 500 && refused(&came).1.contains(problem));
    let other = tls(&ca, Some(&client(&ca, "other")));
    assert_eq!(refused(&renew(&sim, &other, &token).await), (400, UNFIT));
    let without = tls(&ca, None);
    assert_eq!(
        refused(&renew(&sim, &without, &token).await),
        (400, "no client certificate found")
    );

    // The rest of what a token does, it does without the certificate.
    let lookup = call("GET", "/v1/auth/token/lookup-self").header("X-Vault-Token", &token);
    let came = lookup.over(&without).send(&sim.address()).await;
    assert_eq!(came.body["data"]["display_name"], "cert-broker");
    let other_token = sim.create_token(Duration::from_secs(3600));
    assert_eq!(renew(&sim, &without, &other_token).await.status, 200);
}

#[tokio::test]
async fn the_login_names_the_certificate_it_saw() {
    let (sim, ca) = with_cert().await;
    let identity = client(&ca, "broker");
    let came = cert_login(&sim, &tls(&ca, Some(&identity)), json!({})).await;
    let metadata = &came.body["auth"]["metadata"];
    assert_eq!(metadata["cert_name"], "broker");
    assert_eq!(metadata["common_name"], "broker");
    let serial = metadata["serial_number"].as_str().unwrap();
    assert!(
        serial.chars().all(|digit| digit.is_ascii_digit()),
        "{serial}"
    );
    for id in ["authority_key_id", "subject_key_id"] {
        let mut bytes = metadata[id].as_str().unwrap().split(':');
        assert!(bytes.clone().count() >= 20, "{metadata}");
        assert!(bytes.all(|byte| byte.len() == 2), "{metadata}");
    }
}

#[tokio::test]
async fn certificates_of_other_cas_and_other_names_do_not_log_in() {
    let (sim, ca) = with_cert().await;
    // The second has the name of the trusted one, so that only the signature tells.
    for stranger in ["another CA", "simulated CA"] {
        let stranger = Ca::new(stranger).unwrap();
        let broker = tls(&ca, Some(&client(&stranger, "broker")));
        let came = cert_login(&sim, &broker, json!({})).await;
        assert_eq!(refused(&came), (400, STRANGER));
    }
    let came = cert_login(&sim, &tls(&ca, Some(&client(&ca, "brokers"))), json!({})).await;
    assert_eq!(refused(&came), (400, UNFIT));
    let server = ca.issue("broker", &[], Usage::Server).unwrap();
    let came = cert_login(&sim, &tls(&ca, Some(&server)), json!({})).await;
    assert_eq!(came.status, 500, "{}", came.body);
    assert!(
        refused(&came)
            .1
            .contains("failed to verify client's certificate")
    );
}

#[tokio::test]
async fn a_certificate_login_over_plain_http_finds_no_certificate() {
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    let ca = Ca::new("simulated CA").unwrap();
    let role = named(&ca, "broker");
    sim.enable_cert("cert", "broker", role).unwrap();
    let login = call("POST", "/v1/auth/cert/login");
    let came = login.send(&sim.address()).await;
    assert_eq!(refused(&came), (400, "no client certificate found"));
}

#[tokio::test]
async fn a_login_can_name_its_role_and_otherwise_gets_the_first_that_fits() {
    let (sim, ca) = with_cert().await;
    let wide = CertRole {
        tokens: TokenSettings {
            policies: vec!["wide".to_owned()],
            ttl: Some(Duration::from_secs(60)),
            ..TokenSettings::default()
        },
        ..named(&ca, "b*er")
    };
    sim.enable_cert("cert", "wide", wide).unwrap();
    let broker = tls(&ca, Some(&client(&ca, "broker")));
    for (body, role, ttl) in [
        (json!({}), "broker", 1200),
        (json!({ "name": "" }), "broker", 1200),
        (json!({ "name": "wide" }), "wide", 60),
    ] {
        let came = cert_login(&sim, &broker, body).await;
        let auth = &came.body["auth"];
        assert_eq!(auth["metadata"]["cert_name"], role);
        assert_eq!(auth["lease_duration"], ttl);
    }
    let came = cert_login(&sim, &broker, json!({ "name": "nope" })).await;
    assert_eq!(refused(&came), (400, STRANGER));
}

#[tokio::test]
async fn a_role_can_bind_dns_names_and_uris() {
    let (sim, ca) = with_cert().await;
    let role = CertRole {
        allowed_dns_sans: vec!["*.trading.test".to_owned()],
        allowed_uri_sans: vec!["spiffe://trading.test/credbroker".to_owned()],
        ..named(&ca, "*")
    };
    sim.enable_cert("cert", "broker", role).unwrap();
    let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
    let uri = |name: &str| SanType::URI(name.try_into().unwrap());
    let (host, id) = ("b1.trading.test", "spiffe://trading.test/credbroker");
    for (names, status) in [
        (vec![dns(host), uri(id)], 200),
        (vec![dns("x.test"), dns(host), uri(id)], 200),
        (vec![dns(host)], 400),
        (vec![uri(id)], 400),
        (vec![dns("b1.trading.example"), uri(id)], 400),
        (vec![dns(host), uri("spiffe://trading.test/other")], 400),
    ] {
        let identity = ca.issue("any", &names, Usage::Client).unwrap();
        let came = cert_login(&sim, &tls(&ca, Some(&identity)), json!({})).await;
        assert_eq!(came.status, status, "{names:?}: {}", came.body);
    }
}

#[tokio::test]
async fn a_role_bound_to_other_addresses_refuses_the_login() {
    let (sim, ca) = with_cert().await;
    let tokens = TokenSettings {
        bound_cidrs: vec!["10.0.0.0/8".to_owned()],
        ..TokenSettings::default()
    };
    let role = CertRole {
        tokens,
        ..named(&ca, "broker")
    };
    sim.enable_cert("cert", "broker", role).unwrap();
    let broker = tls(&ca, Some(&client(&ca, "broker")));
    let came = cert_login(&sim, &broker, json!({})).await;
    assert_eq!(refused(&came), (403, "permission denied"));
}

#[tokio::test]
async fn a_role_of_certificates_needs_a_ca() {
    let (sim, ca) = with_cert().await;
    let pem = client(&ca, "broker").certificate_pem;
    for certificate_pem in ["", "nonsense", &pem] {
        let role = CertRole {
            certificate_pem: certificate_pem.to_owned(),
            ..named(&ca, "broker")
        };
        assert_eq!(sim.enable_cert("cert", "broker", role), Err(NoCa));
        let write = call("POST", "/v1/auth/cert/certs/new").header("X-Vault-Token", ROOT);
        let body = json!({ "certificate": certificate_pem }).to_string();
        let write = write.raw_body(&body).over(&tls(&ca, None));
        let came = write.send(&sim.address()).await;
        assert_eq!(refused(&came), (400, "failed to parse certificate"));
    }
    // The role that was there is as it was.
    let broker = tls(&ca, Some(&client(&ca, "broker")));
    token(&cert_login(&sim, &broker, json!({})).await);
}

#[tokio::test]
async fn a_jwt_logs_in_for_its_service_account_while_the_reviewer_answers() {
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    sim.enable_kubernetes("kubernetes", "credbroker", KubernetesRole::default());
    let denied = (403, "permission denied");
    assert_eq!(
        refused(&jwt_login(&sim, "credbroker", "jwt-1").await),
        denied
    );
    sim.accept_jwt("jwt-1", ServiceAccount::default());
    let came = jwt_login(&sim, "credbroker", "jwt-1").await;
    let token = token(&came);
    assert_eq!(came.body["auth"]["lease_duration"], 1200);
    let lookup = call("GET", "/v1/auth/token/lookup-self").header("X-Vault-Token", &token);
    let came = lookup.clone().send(&sim.address()).await;
    let data = &came.body["data"];
    assert_eq!(data["display_name"], "kubernetes-trading-credbroker");
    assert_eq!(data["path"], "auth/kubernetes/login");

    sim.set_reviewer(Reviewer::Down);
    assert_eq!(
        refused(&jwt_login(&sim, "credbroker", "jwt-1").await),
        denied
    );
    // Tokens live and are renewed without the reviewer.
    let renew = call("POST", "/v1/auth/token/renew-self").header("X-Vault-Token", &token);
    assert_eq!(renew.send(&sim.address()).await.status, 200);
    sim.set_reviewer(Reviewer::Up);
    assert_eq!(jwt_login(&sim, "credbroker", "jwt-1").await.status, 200);

    sim.refuse_jwt("jwt-1");
    sim.accept_jwt("jwt-2", ServiceAccount::default());
    assert_eq!(
        refused(&jwt_login(&sim, "credbroker", "jwt-1").await),
        denied
    );
    assert_eq!(jwt_login(&sim, "credbroker", "jwt-2").await.status, 200);
    assert_eq!(lookup.send(&sim.address()).await.status, 200);
}

#[tokio::test]
async fn a_service_account_that_the_role_does_not_name_is_refused() {
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    let role = KubernetesRole {
        service_account_namespaces: vec!["trading-*".to_owned()],
        ..KubernetesRole::default()
    };
    sim.enable_kubernetes("k8s", "credbroker", role);
    let login =
        call("POST", "/v1/auth/k8s/login").raw_body(r#"{"role": "credbroker", "jwt": "fake-jwt"}"#);
    for (name, namespace, came) in [
        (
            "other",
            "trading-1",
            Some("service account name not authorized"),
        ),
        ("credbroker", "research", Some("namespace not authorized")),
        ("credbroker", "trading-1", None),
    ] {
        let account = ServiceAccount {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            ..ServiceAccount::default()
        };
        sim.accept_jwt("fake-jwt", account);
        let answer = login.clone().send(&sim.address()).await;
        match came {
            Some(problem) => assert_eq!(refused(&answer), (403, problem)),
            None => assert_eq!(answer.status, 200),
        }
    }
}

#[tokio::test]
async fn a_kubernetes_login_needs_role_jwt_and_configuration() {
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    let at = sim.address();
    let admin = |path: &str| call("POST", path).header("X-Vault-Token", ROOT);
    let mount = admin("/v1/sys/auth/kubernetes").raw_body(r#"{"type": "kubernetes"}"#);
    assert_eq!(mount.send(&at).await.status, 204);
    let role = admin("/v1/auth/kubernetes/role/credbroker");
    let unbound = role
        .clone()
        .raw_body(r#"{"bound_service_account_names": "*"}"#);
    assert_eq!(
        refused(&unbound.send(&at).await),
        (400, "\"bound_service_account_namespaces\" can not be empty")
    );
    let bound = r#"{"bound_service_account_names": "*", "bound_service_account_namespaces": "*"}"#;
    assert_eq!(role.raw_body(bound).send(&at).await.status, 204);

    sim.accept_jwt("fake-jwt", ServiceAccount::default());
    let came = jwt_login(&sim, "", "fake-jwt").await;
    assert_eq!(refused(&came), (400, "missing role"));
    let came = jwt_login(&sim, "credbroker", "").await;
    assert_eq!(refused(&came), (400, "missing jwt"));
    assert_eq!(jwt_login(&sim, "credbroker", "fake-jwt").await.status, 500);
    let config = admin("/v1/auth/kubernetes/config").raw_body("{}");
    assert_eq!(refused(&config.send(&at).await), (400, "no host provided"));
}

#[tokio::test]
async fn roles_are_shown_listed_kept_on_a_partial_write_and_removed() {
    let (sim, ca) = with_cert().await;
    sim.enable_kubernetes("kubernetes", "credbroker", KubernetesRole::default());
    let tls = tls(&ca, None);
    let admin = async |method: &str, path: &str, body: &str| {
        let call = call(method, path).header("X-Vault-Token", ROOT).over(&tls);
        call.raw_body(body).send(&sim.address()).await
    };
    for (roles, name, field, bound) in [
        (
            "auth/cert/certs",
            "broker",
            "allowed_common_names",
            "broker",
        ),
        (
            "auth/kubernetes/role",
            "credbroker",
            "bound_service_account_names",
            "credbroker",
        ),
    ] {
        let (roles, role) = (format!("/v1/{roles}"), format!("/v1/{roles}/{name}"));
        let keys = admin("LIST", &roles, "").await;
        assert_eq!(keys.body["data"]["keys"], json!([name]));
        let written = admin("POST", &role, r#"{"token_ttl": "5m"}"#).await;
        assert_eq!(written.status, 204, "{}", written.body);
        let data = &admin("GET", &role, "").await.body["data"];
        assert_eq!(data[field], json!([bound]));
        assert_eq!(data["token_policies"], json!(["broker"]));
        assert_eq!(
            (&data["token_ttl"], &data["token_max_ttl"]),
            (&json!(300), &json!(86_400))
        );
        assert_eq!(admin("DELETE", &role, "").await.status, 204);
        assert_eq!(admin("GET", &role, "").await.status, 404);
        assert_eq!(admin("LIST", &roles, "").await.status, 404);
    }
    let mounts = admin("GET", "/v1/sys/auth", "").await;
    assert_eq!(mounts.body["data"]["cert/"]["type"], "cert");
    assert_eq!(mounts.body["data"]["kubernetes/"]["type"], "kubernetes");
    let left_out = admin(
        "POST",
        "/v1/auth/cert/certs/new",
        r#"{"allowed_names": "x"}"#,
    )
    .await;
    assert!(refused(&left_out).1.starts_with("simulator:"));
}

#[tokio::test]
async fn faults_hit_logins_of_every_method() {
    let (sim, ca) = with_cert().await;
    let fault = Fault::Status {
        code: 503,
        retry_after_s: None,
    };
    sim.fault(FaultRule::new("auth/cert/login", fault).times(1));
    let broker = tls(&ca, Some(&client(&ca, "broker")));
    for status in [503, 200] {
        let came = cert_login(&sim, &broker, json!({})).await;
        assert_eq!(came.status, status);
    }
}
