//! Certificate and Kubernetes logins beyond the recording: who can log in and renew, and a reviewer that is down.

use std::sync::Arc;
use std::time::Duration;

use credbroker_sim::pki::{Ca, Identity, SanType, Usage};
use credbroker_sim::vault::{
    CaError, CertRole, Fault, FaultRule, KubernetesRole, Reviewer, ServiceAccount, TokenSettings,
    VaultSim,
};
use rustls::ClientConfig;
use serde_json::{Value, json};

use crate::ROOT;
use crate::client::{Answer, call, tls};

const UNTRUSTED: &str = "invalid certificate or no client certificate supplied";
const NO_MATCH: &str =
    "no chain matching all constraints could be found for this login certificate";

/// A TLS server that has the role `broker` at `auth/cert` for the common name `broker`, and its CA.
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

fn token(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let token = answer.body.pointer("/auth/client_token").unwrap();
    token.as_str().unwrap().to_owned()
}

fn rejection(answer: &Answer) -> (u16, &str) {
    let problem = answer.body.pointer("/errors/0").unwrap();
    (answer.status, problem.as_str().unwrap())
}

#[tokio::test]
async fn certificate_login_is_renewed_only_with_the_same_certificate() {
    let (sim, ca) = with_cert().await;
    let broker = tls(&ca, Some(&client(&ca, "broker")));
    let answer = cert_login(&sim, &broker, json!({})).await;
    let token = token(&answer);
    assert_eq!(answer.body["auth"]["policies"], json!(["broker"]));
    assert_eq!(answer.body["auth"]["lease_duration"], 1200);
    assert_eq!(renew(&sim, &broker, &token).await.status, 200);

    let reissued = tls(&ca, Some(&client(&ca, "broker")));
    let answer = renew(&sim, &reissued, &token).await;
    let problem = "failed to renew entry: client identity during renewal not matching";
    assert!(answer.status == 500 && rejection(&answer).1.contains(problem));
    let other = tls(&ca, Some(&client(&ca, "other")));
    assert_eq!(
        rejection(&renew(&sim, &other, &token).await),
        (400, NO_MATCH)
    );
    let without = tls(&ca, None);
    assert_eq!(
        rejection(&renew(&sim, &without, &token).await),
        (400, "no client certificate found")
    );

    // Every other use of the token works without the certificate.
    let lookup = call("GET", "/v1/auth/token/lookup-self").header("X-Vault-Token", &token);
    let answer = lookup.over(&without).send(&sim.address()).await;
    assert_eq!(answer.body["data"]["display_name"], "cert-broker");
    let other_token = sim.create_token(Duration::from_secs(3600));
    assert_eq!(renew(&sim, &without, &other_token).await.status, 200);
}

#[tokio::test]
async fn certificate_login_returns_metadata_of_the_certificate() {
    let (sim, ca) = with_cert().await;
    let identity = client(&ca, "broker");
    let answer = cert_login(&sim, &tls(&ca, Some(&identity)), json!({})).await;
    let metadata = &answer.body["auth"]["metadata"];
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
async fn certificates_of_other_cas_names_or_usages_cannot_log_in() {
    let (sim, ca) = with_cert().await;
    // The second CA has the name of the trusted one: only the signature differs.
    for name in ["another CA", "simulated CA"] {
        let untrusted = Ca::new(name).unwrap();
        let broker = tls(&ca, Some(&client(&untrusted, "broker")));
        let answer = cert_login(&sim, &broker, json!({})).await;
        assert_eq!(rejection(&answer), (400, UNTRUSTED));
    }
    let answer = cert_login(&sim, &tls(&ca, Some(&client(&ca, "brokers"))), json!({})).await;
    assert_eq!(rejection(&answer), (400, NO_MATCH));
    let server = ca.issue("broker", &[], Usage::Server).unwrap();
    let answer = cert_login(&sim, &tls(&ca, Some(&server)), json!({})).await;
    assert_eq!(answer.status, 500, "{}", answer.body);
    assert!(
        rejection(&answer)
            .1
            .contains("failed to verify client's certificate")
    );
}

#[tokio::test]
async fn certificate_login_over_plain_http_is_rejected() {
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    let ca = Ca::new("simulated CA").unwrap();
    let role = named(&ca, "broker");
    sim.enable_cert("cert", "broker", role).unwrap();
    let login = call("POST", "/v1/auth/cert/login");
    let answer = login.send(&sim.address()).await;
    assert_eq!(rejection(&answer), (400, "no client certificate found"));
}

#[tokio::test]
async fn login_uses_the_named_role_or_else_the_first_that_matches() {
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
        let answer = cert_login(&sim, &broker, body).await;
        let auth = &answer.body["auth"];
        assert_eq!(auth["metadata"]["cert_name"], role);
        assert_eq!(auth["lease_duration"], ttl);
    }
    let answer = cert_login(&sim, &broker, json!({ "name": "nope" })).await;
    assert_eq!(rejection(&answer), (400, UNTRUSTED));
}

#[tokio::test]
async fn role_can_require_dns_names_and_uris() {
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
        let answer = cert_login(&sim, &tls(&ca, Some(&identity)), json!({})).await;
        assert_eq!(answer.status, status, "{names:?}: {}", answer.body);
    }
}

#[tokio::test]
async fn role_bound_to_other_addresses_rejects_the_login() {
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
    let answer = cert_login(&sim, &broker, json!({})).await;
    assert_eq!(rejection(&answer), (403, "permission denied"));
}

#[tokio::test]
async fn certificate_role_requires_a_ca_certificate() {
    let (sim, ca) = with_cert().await;
    let pem = client(&ca, "broker").certificate_pem;
    for (certificate_pem, error) in [
        ("", CaError::Unreadable),
        ("nonsense", CaError::Unreadable),
        (&pem, CaError::NotCa),
    ] {
        let role = CertRole {
            certificate_pem: certificate_pem.to_owned(),
            ..named(&ca, "broker")
        };
        assert_eq!(sim.enable_cert("cert", "broker", role), Err(error));
        let write = call("POST", "/v1/auth/cert/certs/new").header("X-Vault-Token", ROOT);
        let body = json!({ "certificate": certificate_pem }).to_string();
        let write = write.raw_body(&body).over(&tls(&ca, None));
        let answer = write.send(&sim.address()).await;
        assert_eq!(rejection(&answer), (400, &*error.to_string()));
    }
    // The existing role is unchanged.
    let broker = tls(&ca, Some(&client(&ca, "broker")));
    token(&cert_login(&sim, &broker, json!({})).await);
}

#[tokio::test]
async fn jwt_logs_in_as_its_service_account_while_the_reviewer_is_up() {
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    sim.enable_kubernetes("kubernetes", "credbroker", KubernetesRole::default());
    let denied = (403, "permission denied");
    assert_eq!(
        rejection(&jwt_login(&sim, "credbroker", "jwt-1").await),
        denied
    );
    sim.accept_jwt("jwt-1", ServiceAccount::default());
    let answer = jwt_login(&sim, "credbroker", "jwt-1").await;
    let token = token(&answer);
    assert_eq!(answer.body["auth"]["lease_duration"], 1200);
    let lookup = call("GET", "/v1/auth/token/lookup-self").header("X-Vault-Token", &token);
    let answer = lookup.clone().send(&sim.address()).await;
    let data = &answer.body["data"];
    assert_eq!(data["display_name"], "kubernetes-trading-credbroker");
    assert_eq!(data["path"], "auth/kubernetes/login");

    sim.set_reviewer(Reviewer::Down);
    assert_eq!(
        rejection(&jwt_login(&sim, "credbroker", "jwt-1").await),
        denied
    );
    // Existing tokens stay valid and can be renewed without the reviewer.
    let renew = call("POST", "/v1/auth/token/renew-self").header("X-Vault-Token", &token);
    assert_eq!(renew.send(&sim.address()).await.status, 200);
    sim.set_reviewer(Reviewer::Up);
    assert_eq!(jwt_login(&sim, "credbroker", "jwt-1").await.status, 200);

    sim.refuse_jwt("jwt-1");
    sim.accept_jwt("jwt-2", ServiceAccount::default());
    assert_eq!(
        rejection(&jwt_login(&sim, "credbroker", "jwt-1").await),
        denied
    );
    assert_eq!(jwt_login(&sim, "credbroker", "jwt-2").await.status, 200);
    assert_eq!(lookup.send(&sim.address()).await.status, 200);
}

#[tokio::test]
async fn service_account_that_the_role_does_not_name_is_rejected() {
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    let role = KubernetesRole {
        service_account_namespaces: vec!["trading-*".to_owned()],
        ..KubernetesRole::default()
    };
    sim.enable_kubernetes("k8s", "credbroker", role);
    let login =
        call("POST", "/v1/auth/k8s/login").raw_body(r#"{"role": "credbroker", "jwt": "fake-jwt"}"#);
    for (name, namespace, expected) in [
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
        match expected {
            Some(problem) => assert_eq!(rejection(&answer), (403, problem)),
            None => assert_eq!(answer.status, 200),
        }
    }
}

#[tokio::test]
async fn kubernetes_login_requires_role_jwt_and_configuration() {
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    let at = sim.address();
    let admin = |path: &str| call("POST", path).header("X-Vault-Token", ROOT);
    let mount = admin("/v1/sys/auth/kubernetes").raw_body(r#"{"type": "kubernetes"}"#);
    assert_eq!(mount.send(&at).await.status, 204);
    let role = admin("/v1/auth/kubernetes/role/credbroker");
    let unbound = role
        .clone()
        .raw_body(r#"{"bound_service_account_names": "*"}"#);
    let problem = r#""bound_service_account_namespaces" can not be empty if "bound_service_account_namespace_selector" is not set"#;
    assert_eq!(rejection(&unbound.send(&at).await), (400, problem));
    let bound = r#"{"bound_service_account_names": "*", "bound_service_account_namespaces": "*"}"#;
    assert_eq!(role.raw_body(bound).send(&at).await.status, 204);

    sim.accept_jwt("fake-jwt", ServiceAccount::default());
    let answer = jwt_login(&sim, "", "fake-jwt").await;
    assert_eq!(rejection(&answer), (400, "missing role"));
    let answer = jwt_login(&sim, "credbroker", "").await;
    assert_eq!(rejection(&answer), (400, "missing jwt"));
    assert_eq!(jwt_login(&sim, "credbroker", "fake-jwt").await.status, 500);
    let config = admin("/v1/auth/kubernetes/config").raw_body("{}");
    assert_eq!(
        rejection(&config.send(&at).await),
        (400, "no host provided")
    );
    for (path, field) in [
        ("config", "pem_keys"),
        ("role/new", "bound_service_account_namespace_selector"),
    ] {
        let body = json!({ field: "x" }).to_string();
        let write = admin(&format!("/v1/auth/kubernetes/{path}")).raw_body(&body);
        let problem = format!("simulator: {field} is not simulated");
        assert_eq!(rejection(&write.send(&at).await), (400, &*problem));
    }
}

#[tokio::test]
async fn roles_can_be_read_listed_partially_updated_and_deleted() {
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
    assert!(rejection(&left_out).1.starts_with("simulator:"));
}

#[tokio::test]
async fn faults_hit_certificate_logins() {
    let (sim, ca) = with_cert().await;
    let fault = Fault::Status {
        code: 503,
        retry_after_s: None,
    };
    sim.fault(FaultRule::new("auth/cert/login", fault).times(1));
    let broker = tls(&ca, Some(&client(&ca, "broker")));
    for status in [503, 200] {
        let answer = cert_login(&sim, &broker, json!({})).await;
        assert_eq!(answer.status, status);
    }
}
