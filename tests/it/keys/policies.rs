//! The shipped policies allow what is needed and nothing else. This needs a real server: the simulator stores policies
//! but does not enforce them.

use std::path::Path;
use std::sync::{Arc, Once};
use std::time::Duration;

use credbroker::config::Config;
use credbroker::vault::{Auth, Vault, VaultSettings};
use credbroker_sim::installation::{kv_path, secret};
use credbroker_sim::kucoin::SimKey;
use serde_json::{Value, json};

use super::real::{Api, Backend};
use super::{Setup, key};
use crate::harness::{not_run, until};

/// A file of `deploy/vault/`, for a mount and an `AppRole` mount of this name.
pub(super) fn shipped(file: &str, name: &str) -> String {
    as_shipped(file)
        .replace("path \"kv/", &format!("path \"{name}/"))
        .replace("path \"auth/approle/", &format!("path \"auth/{name}/"))
}

fn as_shipped(file: &str) -> String {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/vault");
    std::fs::read_to_string(format!("{folder}/{file}")).unwrap()
}

const UNWRAPPED: &str = "/v1/sys/wrapping/unwrap";

/// A real server with a mount that requires check-and-set, the three shipped policies and the broker's role.
struct Stage {
    vault: Backend,
}

impl Stage {
    async fn new() -> Option<Self> {
        let Some(vault) = Backend::real().await else {
            static PRINTED: Once = Once::new();
            PRINTED.call_once(|| not_run("policies", "vault", "no real Vault"));
            return None;
        };
        let Backend { api, name, .. } = &vault;
        for (method, path, body) in [
            (
                "POST",
                format!("sys/mounts/{name}"),
                json!({ "type": "kv", "options": { "version": "2" } }),
            ),
            (
                "POST",
                format!("sys/auth/{name}"),
                json!({ "type": "approle" }),
            ),
            (
                "PUT",
                format!("sys/policies/acl/{name}"),
                json!({ "policy": shipped("broker.hcl", name) }),
            ),
            (
                "PUT",
                format!("sys/policies/acl/{name}-admin"),
                json!({ "policy": shipped("admin.hcl", name) }),
            ),
            (
                "PUT",
                format!("sys/policies/acl/{name}-deployer"),
                json!({ "policy": shipped("deployer.hcl", name) }),
            ),
            (
                "POST",
                format!("auth/{name}/role/credbroker"),
                json!({
                    "token_type": "service", "token_policies": [name], "token_no_default_policy": true,
                    "token_period": "1h",
                }),
            ),
        ] {
            api.call(method, &path, body).await;
        }
        until("the mount is ready", async || {
            let config = format!("/v1/{name}/config");
            let settings = json!({ "cas_required": true });
            api.raw("POST", &config, Some(&settings)).await.0 == 204
        })
        .await;
        Some(Self { vault })
    }

    fn name(&self) -> &str {
        &self.vault.name
    }

    /// A client whose token has only this policy.
    async fn client_with(&self, policy: &str) -> Api {
        let api = &self.vault.api;
        let request = json!({ "policies": [policy], "no_default_policy": true, "ttl": "1h" });
        let made = api.call("POST", "auth/token/create", request).await;
        assert_eq!(
            made["auth"]["policies"],
            json!([policy]),
            "no default policy"
        );
        api.with_token(made["auth"]["client_token"].as_str().unwrap())
    }

    /// Writes the first key of `main` with the root token.
    async fn write_first_key(&self) {
        let path = format!("{}/data/{}", self.name(), kv_path("main", "main"));
        let written = json!({ "options": { "cas": 0 }, "data": secret(&key("main", 1)) });
        self.vault.api.call("POST", &path, written).await;
    }

    async fn role_id(&self) -> String {
        let path = format!("auth/{}/role/credbroker/role-id", self.name());
        let answer = self.vault.api.call("GET", &path, Value::Null).await;
        answer["data"]["role_id"].as_str().unwrap().to_owned()
    }

    async fn login(&self, secret_id: &str) -> Api {
        let anonymous = self.vault.api.with_token("");
        let path = format!("auth/{}/login", self.name());
        let credentials = json!({ "role_id": self.role_id().await, "secret_id": secret_id });
        let login = anonymous.call("POST", &path, credentials).await;
        assert_eq!(login["auth"]["policies"], json!([self.name()]));
        anonymous.with_token(login["auth"]["client_token"].as_str().unwrap())
    }

    async fn clean_up(&self) {
        for policy in ["admin", "deployer"] {
            let path = format!("sys/policies/acl/{}-{policy}", self.name());
            self.vault.api.call("DELETE", &path, json!({})).await;
        }
        self.vault.clean_up().await;
    }
}

/// Checks that each of these requests returns 403; `{}` in a path is the mount.
async fn assert_denied(client: &Api, name: &str, requests: &[(&str, &str)]) {
    let client = client.with_header("content-type", "application/merge-patch+json");
    let body = json!({ "data": {}, "options": { "cas": 1 }, "versions": [1], "policy": "" });
    for (method, path) in requests {
        let path = path.replace("{}", name);
        let body = Some(&body).filter(|_| *method != "GET" && *method != "LIST");
        let (status, answer) = client.raw(method, &format!("/v1/{path}"), body).await;
        assert_eq!(status, 403, "{method} {path}: {answer}");
        assert!(answer.contains("permission denied"), "{answer}");
    }
}

/// Requests that none of the three policies allows.
const ALWAYS_DENIED: [(&str, &str); 11] = [
    ("GET", "sys/mounts"),
    ("GET", "sys/policies/acl/{}"),
    ("PUT", "sys/policies/acl/{}"),
    ("GET", "{}/config"),
    ("POST", "{}/config"),
    ("GET", "{}/data/kucoin/test/main/main"),
    ("POST", "{}/data/kucoin/test/main/main"),
    ("DELETE", "{}/metadata/kucoin/prod/main/main"),
    ("PUT", "{}/destroy/kucoin/prod/main/main"),
    ("POST", "auth/token/create"),
    ("POST", "auth/{}/role/credbroker"),
];

#[test]
fn shipped_policies_use_the_mount_and_prefix_of_the_example_config() {
    let text = include_str!("../../../deploy/config.toml");
    let vault = Config::parse(text, Path::new("/etc/credbroker"))
        .unwrap()
        .vault;
    for file in ["broker.hcl", "admin.hcl"] {
        let policy = as_shipped(file);
        for area in ["data", "metadata"] {
            let path = format!("\npath \"{}/{area}/{}/*\"", vault.mount, vault.prefix);
            assert!(policy.contains(&path), "{path} is not in {file}");
        }
    }
}

#[tokio::test]
async fn broker_policy_allows_what_the_broker_needs_and_nothing_else() {
    let Some(stage) = Stage::new().await else {
        return;
    };
    let Backend { api, name, .. } = &stage.vault;
    stage.write_first_key().await;
    let path = format!("auth/{name}/role/credbroker/secret-id");
    let created = api.call("POST", &path, json!({})).await;
    let secret_id = created["data"]["secret_id"].as_str().unwrap().to_owned();

    // Login, read and poll by a running broker.
    let mut setup = Setup::new(&["main"]).await;
    setup.settings.vault_url = Some(api.url.clone());
    setup.more = format!("mount = \"{name}\"");
    setup.settings.auth = format!(
        "method = \"approle\"\nmount = \"{name}\"\nrole_id = \"{}\"\nsecret_id_file = \"secret-id\"",
        stage.role_id().await,
    );
    setup.settings.files = vec![("secret-id", format!("{secret_id}\n"))];
    let rig = setup.ready().await;
    rig.until_restored(1).await;
    let path = format!("{name}/data/{}", kv_path("main", "main"));
    let written = json!({ "options": { "cas": 1 }, "data": secret(&key("main", 2)) });
    api.call("POST", &path, written).await;
    rig.until_signed_with(2).await;
    rig.end().await;

    let own = stage.login(&secret_id).await;
    assert_denied(&own, name, &ALWAYS_DENIED).await;
    assert_denied(
        &own,
        name,
        &[
            ("POST", "{}/data/kucoin/prod/main/main"),
            ("PATCH", "{}/data/kucoin/prod/main/main"),
            ("DELETE", "{}/data/kucoin/prod/main/main"),
            ("POST", "{}/metadata/kucoin/prod/main/main"),
            ("PATCH", "{}/metadata/kucoin/prod/main/main"),
            ("POST", "{}/delete/kucoin/prod/main/main"),
            ("POST", "{}/undelete/kucoin/prod/main/main"),
            ("LIST", "{}/metadata/kucoin/prod/main"),
            ("LIST", "{}/metadata/kucoin/prod"),
            ("LIST", "{}/metadata/kucoin"),
            ("GET", "{}/subkeys/kucoin/prod/main/main"),
            ("GET", "{}/metadata/kucoin/test/main/main"),
            ("POST", "auth/{}/role/credbroker/secret-id"),
        ],
    )
    .await;

    let looked_up = own.call("GET", "auth/token/lookup-self", Value::Null).await;
    assert_eq!(looked_up["data"]["policies"], json!([name]));
    let renewed = own.call("POST", "auth/token/renew-self", json!({})).await;
    assert_eq!(renewed["auth"]["lease_duration"], 3600);
    own.call("POST", "auth/token/revoke-self", json!({})).await;
    assert_denied(&own, name, &[("GET", "auth/token/lookup-self")]).await;
    stage.clean_up().await;
}

#[tokio::test]
async fn keys_are_registered_rotated_and_rolled_back_under_the_shipped_policies() {
    use super::register::{lines, matches_key, run};
    let Some(stage) = Stage::new().await else {
        return;
    };
    let Backend { api, name, .. } = &stage.vault;
    let path = format!("auth/{name}/role/credbroker/secret-id");
    let created = api.call("POST", &path, json!({})).await;
    let secret_id = created["data"]["secret_id"].as_str().unwrap();
    let mut setup = Setup::new(&["main"]).await;
    setup.settings.vault_url = Some(api.url.clone());
    setup.more = format!("mount = \"{name}\"");
    setup.settings.auth = format!(
        "method = \"approle\"\nmount = \"{name}\"\nrole_id = \"{}\"\nsecret_id_file = \"secret-id\"",
        stage.role_id().await,
    );
    setup.settings.files = vec![("secret-id", format!("{secret_id}\n"))];
    let rig = setup.start().await;
    let lab = &rig.lab;

    let admin = stage.client_with(&format!("{name}-admin")).await;
    lab.write_admin_files(&lab.ca.admin("anna").unwrap());
    lab.write("admin-token", admin.token()).unwrap();
    let toml = std::fs::read_to_string(lab.path("admin.toml")).unwrap();
    let own = format!("address = \"{}\"\nmount = \"{name}\"", api.url);
    let toml = toml
        .replace(&format!("address = \"{}\"", lab.vault.address()), &own)
        .replace("file = \"token\"", "file = \"admin-token\"");
    std::fs::write(lab.path("admin.toml"), toml).unwrap();

    let key = |number| {
        let key = SimKey {
            uid: 2001,
            ..super::register::key(number, &["Spot", "Margin"])
        };
        lab.kucoin.add_key(key.clone());
        key
    };
    let (first, second) = (key(1), key(2));
    for (words, key, expected) in [
        (&["register", "main"][..], &first, "version 1 is in use"),
        (&["rotate", "main"], &second, "version 2 is in use"),
        (&["rollback", "main"], &first, "version 1 is in use"),
        (
            &["rollback", "main", "--newest"],
            &second,
            "version 2 is in use",
        ),
    ] {
        let words = [&["keys"], words].concat();
        let (code, output) = run(lab, &words, key, &lines(key)).await;
        assert_eq!(code, 0, "{output}");
        assert!(output.contains(expected), "{output}");
        assert_eq!(rig.signer("main").await, Ok(key.api_key.clone()));
    }
    for (version, key) in [(1, &first), (2, &second)] {
        let path = format!("{name}/data/{}?version={version}", kv_path("main", "main"));
        let values = api.call("GET", &path, Value::Null).await["data"]["data"].clone();
        assert!(matches_key(&values, key), "version {version}");
    }
    rig.end().await;
    stage.clean_up().await;
}

#[tokio::test]
async fn doctor_write_check_lists_write_permissions_and_writes_nothing() {
    let Some(stage) = Stage::new().await else {
        return;
    };
    let name = stage.name();
    stage.write_first_key().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    let settings = VaultSettings {
        address: stage.vault.api.url.parse().unwrap(),
        redirects: Vec::new(),
        namespace: None,
        mount: name.to_owned(),
        prefix: "kucoin/prod".to_owned(),
        auth: Auth::TokenFile(file.clone()),
        timeout: Duration::from_secs(10),
    };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider);
    let tls = tls.with_safe_default_protocol_versions().unwrap();
    let tls = tls
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let vault = Vault::new(settings, tls, Arc::default()).unwrap();
    let check_with = async |token: &str| {
        std::fs::write(&file, token).unwrap();
        let (account, key) = ("main".parse().unwrap(), "main".parse().unwrap());
        let token = vault.token().await.unwrap();
        let permissions = vault.may_write(&account, &key).await.unwrap();
        (token.map(|token| token.policies), permissions)
    };
    let metadata = format!("{name}/metadata/{}", kv_path("main", "main"));
    let api = &stage.vault.api;
    let before = api.call("GET", &metadata, Value::Null).await;
    let broker = stage.client_with(name).await;
    assert_eq!(
        check_with(broker.token()).await,
        (Some(vec![name.to_owned()]), Vec::new())
    );
    let admin = stage.client_with(&format!("{name}-admin")).await;
    let all = [
        "write versions",
        "change metadata",
        "delete versions",
        "undelete versions",
        "destroy versions",
    ];
    assert_eq!(check_with(admin.token()).await, (None, all[..4].to_vec()));
    assert_eq!(check_with(api.token()).await.1, all);
    let after = api.call("GET", &metadata, Value::Null).await;
    assert_eq!(before["data"], after["data"]);
    // The check of a key that does not exist creates nothing.
    let (account, key) = ("other".parse().unwrap(), "main".parse().unwrap());
    assert_eq!(vault.may_write(&account, &key).await.unwrap(), all);
    let path = format!("/v1/{name}/metadata/{}", kv_path("other", "main"));
    assert_eq!(api.raw("GET", &path, None).await.0, 404);
    stage.clean_up().await;
}

#[tokio::test]
async fn admin_policy_writes_keys_only_with_check_and_set_and_cannot_read_them() {
    let Some(stage) = Stage::new().await else {
        return;
    };
    let name = stage.name();
    let admin = stage.client_with(&format!("{name}-admin")).await;
    let path = kv_path("main", "main");
    let metadata = async || {
        let path = format!("{name}/metadata/{path}");
        admin.call("GET", &path, Value::Null).await["data"].clone()
    };
    let write = async |version: u64, generation: u32| {
        let body =
            json!({ "options": { "cas": version }, "data": secret(&key("main", generation)) });
        let path = format!("/v1/{name}/data/{path}");
        admin.raw("POST", &path, Some(&body)).await.0
    };

    assert_eq!(write(0, 1).await, 200);
    assert_eq!(metadata().await["current_version"], 1);
    assert_eq!(write(1, 2).await, 200);
    assert_eq!(write(1, 3).await, 400, "a stale version");
    let blind = json!({ "data": secret(&key("main", 3)) });
    let data = format!("/v1/{name}/data/{path}");
    let (status, answer) = admin.raw("POST", &data, Some(&blind)).await;
    assert_eq!(status, 400, "without check-and-set: {answer}");

    let custom = json!({ "custom_metadata": { "owner": "desk", "state": "disabled" } });
    admin
        .call("POST", &format!("{name}/metadata/{path}"), custom)
        .await;
    assert_eq!(metadata().await["custom_metadata"]["state"], "disabled");
    let folder = format!("{name}/metadata/kucoin/prod/");
    let listed = admin.call("LIST", &folder, Value::Null).await;
    assert_eq!(listed["data"]["keys"], json!(["main/"]));
    let second = json!({ "versions": [2] });
    for (area, is_deleted) in [("delete", true), ("undelete", false)] {
        admin
            .call("POST", &format!("{name}/{area}/{path}"), second.clone())
            .await;
        let deleted_at = metadata().await["versions"]["2"]["deletion_time"].clone();
        assert_eq!(deleted_at != "", is_deleted, "{area}");
    }

    let reads = [
        ("GET", "{}/data/kucoin/prod/main/main"),
        ("GET", "{}/data/kucoin/prod/main/main?version=1"),
        ("GET", "{}/subkeys/kucoin/prod/main/main"),
        ("PATCH", "{}/data/kucoin/prod/main/main"),
        ("PATCH", "{}/metadata/kucoin/prod/main/main"),
        ("GET", "auth/token/lookup-self"),
    ];
    for client in [&admin, &admin.with_header("x-vault-wrap-ttl", "60s")] {
        assert_denied(client, name, &reads).await;
        assert_denied(client, name, &ALWAYS_DENIED).await;
    }
    stage.clean_up().await;
}

#[tokio::test]
async fn deployer_policy_creates_only_secret_ids_wrapped_for_30_s_to_5_min() {
    let Some(stage) = Stage::new().await else {
        return;
    };
    let name = stage.name();
    let deployer = stage.client_with(&format!("{name}-deployer")).await;
    let path = format!("auth/{name}/role/credbroker/secret-id");
    for ttl in ["30s", "60s", "5m"] {
        let wrapping = deployer.with_header("x-vault-wrap-ttl", ttl);
        let wrapped = wrapping.call("POST", &path, json!({})).await;
        assert_eq!(wrapped["data"], Value::Null);
        assert_eq!(wrapped["wrap_info"]["creation_path"], path.as_str());
        let bearer = deployer.with_token(wrapped["wrap_info"]["token"].as_str().unwrap());
        let (status, unwrapped) = bearer.raw("POST", UNWRAPPED, None).await;
        assert_eq!(status, 200, "{unwrapped}");
        let unwrapped: Value = serde_json::from_str(&unwrapped).unwrap();
        let secret_id = unwrapped["data"]["secret_id"].as_str().unwrap();
        let own = stage.login(secret_id).await;
        own.call("POST", "auth/token/revoke-self", json!({})).await;
        let (status, again) = bearer.raw("POST", UNWRAPPED, None).await;
        assert_eq!(status, 400, "a second unwrap must fail: {again}");
    }
    let create = [("POST", "auth/{}/role/credbroker/secret-id")];
    assert_denied(&deployer, name, &create).await;
    for ttl in ["10s", "29s", "301s", "10m"] {
        assert_denied(
            &deployer.with_header("x-vault-wrap-ttl", ttl),
            name,
            &create,
        )
        .await;
    }
    let wrapping = deployer.with_header("x-vault-wrap-ttl", "60s");
    let others = [
        ("GET", "auth/{}/role/credbroker"),
        ("GET", "auth/{}/role/credbroker/role-id"),
        ("LIST", "auth/{}/role/credbroker/secret-id"),
        ("POST", "auth/{}/role/credbroker/custom-secret-id"),
        ("POST", "auth/{}/role/other/secret-id"),
        ("GET", "{}/data/kucoin/prod/main/main"),
        ("POST", "{}/data/kucoin/prod/main/main"),
        ("GET", "{}/metadata/kucoin/prod/main/main"),
    ];
    for client in [&deployer, &wrapping] {
        assert_denied(client, name, &others).await;
        assert_denied(client, name, &ALWAYS_DENIED).await;
    }
    stage.clean_up().await;
}
