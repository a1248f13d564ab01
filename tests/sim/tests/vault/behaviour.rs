//! What tests of the broker rely on beyond the recording: an adjustable clock, denials, a standby, stop and restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use credbroker_sim::pki::Ca;
use credbroker_sim::vault::{
    Fault, FaultRule, RoleSettings, Standby, VaultArgs, VaultSettings, VaultSim, serve,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::net::TcpStream;

use crate::client::{Answer, call, host, tls};
use crate::{ROOT, SECRET, read, with_secret};

#[tokio::test]
async fn an_expired_token_stays_expired() {
    let (sim, token) = with_secret().await;
    sim.fault(FaultRule::new("kv/", Fault::ExpireToken).times(1));
    for _ in 0..2 {
        let answer = read(&sim, &token).await;
        assert_eq!(
            (answer.status, &answer.body),
            (403, &json!({ "errors": ["permission denied"] }))
        );
    }
}

#[tokio::test]
async fn tokens_expire_and_renew_by_the_simulators_clock() {
    let (sim, token) = with_secret().await;
    sim.stop_clock();
    let renew = call("POST", "/v1/auth/token/renew-self").header("X-Vault-Token", &token);
    sim.advance_clock(Duration::from_secs(3599));
    assert_eq!(
        renew.send(&sim.address()).await.body["auth"]["lease_duration"],
        3600
    );
    sim.advance_clock(Duration::from_secs(3599));
    assert_eq!(read(&sim, &token).await.status, 200);
    sim.advance_clock(Duration::from_secs(1));
    assert_eq!(read(&sim, &token).await.status, 403);
}

#[tokio::test]
async fn wrapping_tokens_expire_and_any_use_as_client_token_spends_them() {
    let (sim, token) = with_secret().await;
    sim.stop_clock();
    let wrap = call("GET", SECRET)
        .header("X-Vault-Token", &token)
        .header("X-Vault-Wrap-TTL", "30s");
    let unwrap = call("POST", "/v1/sys/wrapping/unwrap");
    let wrapped = |answer: Answer| {
        answer.body["wrap_info"]["token"]
            .as_str()
            .unwrap()
            .to_owned()
    };

    let wrapping = wrapped(wrap.clone().send(&sim.address()).await);
    let opened = unwrap
        .clone()
        .header("X-Vault-Token", &wrapping)
        .send(&sim.address())
        .await;
    assert_eq!(opened.body["data"]["data"]["api_key"], "fake-key");

    let late = wrapped(wrap.clone().send(&sim.address()).await);
    sim.advance_clock(Duration::from_secs(30));
    assert_eq!(
        unwrap
            .clone()
            .header("X-Vault-Token", &late)
            .send(&sim.address())
            .await
            .status,
        400
    );

    let spent = wrapped(wrap.send(&sim.address()).await);
    assert_eq!(read(&sim, &spent).await.status, 403);
    assert_eq!(
        unwrap
            .header("X-Vault-Token", &spent)
            .send(&sim.address())
            .await
            .status,
        400
    );
}

#[tokio::test]
async fn expired_secret_id_works_until_the_next_sweep() {
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    sim.stop_clock();
    let settings = RoleSettings {
        secret_id_ttl: Some(Duration::from_secs(3)),
        ..RoleSettings::default()
    };
    let (role_id, secret_id) = sim.enable_approle("credbroker", settings);
    let body = json!({ "role_id": role_id, "secret_id": secret_id });
    let login = call("POST", "/v1/auth/approle/login").raw_body(&body.to_string());
    sim.advance_clock(Duration::from_secs(40));
    assert_eq!(
        login.clone().send(&sim.address()).await.body["auth"]["lease_duration"],
        1200
    );
    sim.advance_clock(Duration::from_secs(30));
    assert_eq!(login.send(&sim.address()).await.status, 400);
}

#[tokio::test]
async fn token_bound_to_other_addresses_is_issued_and_then_rejected() {
    let (sim, _) = with_secret().await;
    let settings = RoleSettings {
        token_bound_cidrs: vec!["10.0.0.0/8".to_owned()],
        ..RoleSettings::default()
    };
    let (role_id, secret_id) = sim.enable_approle("credbroker", settings);
    let body = json!({ "role_id": role_id, "secret_id": secret_id });
    let login = call("POST", "/v1/auth/approle/login").raw_body(&body.to_string());
    let answer = login.send(&sim.address()).await;
    assert_eq!(answer.status, 200);
    let token = answer.body["auth"]["client_token"].as_str().unwrap();
    assert_eq!(read(&sim, token).await.status, 403);
}

#[tokio::test]
async fn revoking_a_token_revokes_its_children() {
    let (sim, token) = with_secret().await;
    let create = call("POST", "/v1/auth/token/create").header("X-Vault-Token", &token);
    let answer = create
        .raw_body(r#"{"ttl": "2h"}"#)
        .send(&sim.address())
        .await;
    let child = answer.body["auth"]["client_token"].as_str().unwrap();
    assert_eq!(read(&sim, child).await.status, 200);
    sim.revoke_token(&token);
    assert_eq!(read(&sim, child).await.status, 403);
}

#[tokio::test]
async fn denials_apply_to_any_token_and_all_paths_below() {
    let (sim, token) = with_secret().await;
    sim.deny(None, None, "kv/data/kucoin/*");
    for token in [&*token, ROOT] {
        let answer = read(&sim, token).await;
        let errors = json!(["1 error occurred:\n\t* permission denied\n\n"]);
        assert_eq!((answer.status, &answer.body["errors"]), (403, &errors));
    }
    sim.remove_denial(None, None, "kv/data/kucoin/*");
    sim.deny(Some(&token), Some("POST"), "kv/data/kucoin/prod/main");
    assert_eq!(read(&sim, &token).await.status, 200);
}

#[tokio::test]
async fn versions_are_pruned_and_deleted_and_restart_at_1() {
    let (sim, token) = with_secret().await;
    let metadata = call("GET", "/v1/kv/metadata/kucoin/prod/main").header("X-Vault-Token", &token);
    for version in 2..=12 {
        let data = json!({ "api_key": "fake-key" });
        assert_eq!(sim.put_secret("kv", "kucoin/prod/main", data), version);
    }
    let owner = BTreeMap::from([("owner".to_owned(), "desk1".to_owned())]);
    sim.set_custom_metadata("kv", "kucoin/prod/main", owner);
    let answer = metadata.clone().send(&sim.address()).await;
    assert_eq!(answer.body["data"]["oldest_version"], 3);
    assert_eq!(
        answer.body["data"]["versions"].as_object().unwrap().len(),
        10
    );
    assert_eq!(answer.body["data"]["custom_metadata"]["owner"], "desk1");
    sim.delete_latest("kv", "kucoin/prod/main");
    let answer = read(&sim, &token).await;
    assert_eq!(
        (answer.status, &answer.body["data"]["metadata"]["version"]),
        (404, &json!(12))
    );
    sim.delete_metadata("kv", "kucoin/prod/main");
    assert_eq!(
        metadata.send(&sim.address()).await.body,
        json!({ "errors": [] })
    );
    assert_eq!(sim.put_secret("kv", "kucoin/prod/main", json!({})), 1);
}

#[tokio::test]
async fn stopped_server_refuses_connections_and_restarts_with_its_data() {
    let (sim, token) = with_secret().await;
    let address = sim.address();
    sim.stop().await.unwrap();
    let refused = TcpStream::connect(host(&address)).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    sim.restart().await.unwrap();
    assert_eq!(sim.address(), address);
    assert_eq!(
        read(&sim, &token).await.body["data"]["data"]["api_key"],
        "fake-key"
    );
    drop(sim);
    while TcpStream::connect(host(&address)).await.is_ok() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn standby_answers_reads_and_forwards_or_redirects_everything_else() {
    let health = call("GET", "/v1/sys/health");
    for (standby, renewed) in [(Standby::Forwards, 200), (Standby::Redirects, 307)] {
        let sim = VaultSim::start(VaultSettings {
            standby,
            ..VaultSettings::default()
        })
        .await
        .unwrap();
        let second = sim.standby_address().unwrap();
        let token = sim.create_token(Duration::from_secs(3600));
        let lookup = call("GET", "/v1/auth/token/lookup-self").header("X-Vault-Token", &token);
        let renew = call("POST", "/v1/auth/token/renew-self").header("X-Vault-Token", &token);

        let answer = health.clone().send(&second).await;
        assert_eq!(
            (answer.status, &answer.body["standby"]),
            (429, &json!(true))
        );
        assert_eq!(lookup.clone().send(&second).await.status, 200);
        let answer = renew.clone().send(&second).await;
        assert_eq!(answer.status, renewed);
        let target = format!("{}/v1/auth/token/renew-self", sim.address());
        assert_eq!(
            answer.header("location"),
            (renewed == 307).then_some(&*target)
        );

        sim.stop().await.unwrap();
        assert_eq!(renew.clone().send(&second).await.status, 500);
        assert_eq!(lookup.send(&second).await.status, 200);
        sim.fail_over();
        assert_eq!(renew.send(&second).await.status, 200);
        assert_eq!(health.clone().send(&second).await.status, 200);
        sim.restart().await.unwrap();
        assert_eq!(health.clone().send(&sim.address()).await.status, 429);
    }
}

#[tokio::test]
async fn server_uses_tls_when_given_a_certificate() {
    let ca = Ca::new("simulated CA").unwrap();
    let server = ca.server().unwrap();
    let certificate = CertificateDer::from_pem_slice(server.certificate_pem.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(server.key_pem.as_bytes()).unwrap();
    let config = rustls::ServerConfig::builder().with_no_client_auth();
    let config = config.with_single_cert(vec![certificate], key).unwrap();
    let sim = VaultSim::start(VaultSettings {
        tls: Some(Arc::new(config)),
        ..VaultSettings::default()
    })
    .await
    .unwrap();

    let health = call("GET", "/v1/sys/health").over(&tls(&ca, None));
    assert_eq!(health.send(&sim.address()).await.status, 200);
}

#[tokio::test]
async fn server_listens_on_loopback_only() {
    let address = "0.0.0.0:0".parse().unwrap();
    let refused = VaultSim::start(VaultSettings {
        address,
        ..VaultSettings::default()
    })
    .await
    .unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput);
}

#[tokio::test]
async fn simulated_vault_can_be_controlled_over_http() {
    let file = format!("{}/vault-put.json", env!("CARGO_TARGET_TMPDIR"));
    std::fs::write(&file, r#"{"api_key": "fake-key"}"#).unwrap();
    let sim = serve(VaultArgs {
        listen: "127.0.0.1:0".parse().unwrap(),
        root_token: ROOT.to_owned(),
        mount: "kv".to_owned(),
        put: vec![format!("kucoin/prod/main={file}")],
    })
    .await
    .unwrap();
    assert_eq!(
        read(&sim, ROOT).await.body["data"]["data"]["api_key"],
        "fake-key"
    );
    let control = |path: &str, body: &str| call("POST", path).raw_body(body);
    let health = call("GET", "/v1/sys/health");
    let at = sim.address();
    for (path, status) in [("/_sim/seal", 503), ("/_sim/unseal", 200)] {
        assert_eq!(control(path, "").send(&at).await.status, 200);
        assert_eq!(health.clone().send(&at).await.status, status);
    }
    let rule = r#"{"path": "sys/", "method": "GET", "times": 1, "kind": "status", "code": 502}"#;
    assert_eq!(control("/_sim/fault", rule).send(&at).await.status, 200);
    assert_eq!(health.clone().send(&at).await.status, 502);
    assert_eq!(health.clone().send(&at).await.status, 200);
    assert_eq!(
        control("/_sim/fault", r#"{"kind": "delay", "ms": 60000}"#)
            .send(&at)
            .await
            .status,
        200
    );
    assert_eq!(call("DELETE", "/_sim/fault").send(&at).await.status, 200);
    assert_eq!(health.send(&at).await.status, 200);
    let token = sim.create_token(Duration::from_secs(60));
    let lookup = call("GET", "/v1/auth/token/lookup-self").header("X-Vault-Token", &token);
    assert_eq!(lookup.clone().send(&at).await.status, 200);
    assert_eq!(
        control("/_sim/advance", r#"{"seconds": 60}"#)
            .send(&at)
            .await
            .status,
        200
    );
    assert_eq!(lookup.send(&at).await.status, 403);
    for nonsense in [r#"{"kind": "nothing"}"#, "{"] {
        assert_eq!(control("/_sim/fault", nonsense).send(&at).await.status, 400);
    }
    assert!(
        sim.requests()
            .iter()
            .all(|seen| !seen.path.starts_with("/_sim/"))
    );
}

#[tokio::test]
async fn requests_are_recorded_without_tokens_and_bodies() {
    let (sim, token) = with_secret().await;
    let path = format!("{SECRET}?version=1");
    let write = call("PUT", &path).header("X-Vault-Token", &token);
    write
        .raw_body(r#"{"data": {"api_key": "canary"}}"#)
        .send(&sim.address())
        .await;
    let seen = format!("{:?}", sim.requests());
    assert!(seen.contains(r#"method: "PUT", path: "/v1/kv/data/kucoin/prod/main", query: Some("version=1"), status: Some(200)"#));
    assert!(!seen.contains("canary") && !seen.contains(&token));
}
