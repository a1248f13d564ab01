//! What the broker makes of Vault is the same for the simulated server and for a real one.

use std::io::Write as _;

use serde_json::{Value, json};

use super::real::{Api, Backend};
use super::{LOGIN_REFUSED, NO_ANSWER, Rig, Setup, key, replace};
use crate::harness::{kv_path, secret};

#[tokio::test]
async fn the_simulated_vault_behaves_as_a_real_one_must() {
    let setup = Setup::new(&["main", "other"]).await;
    let backend = Backend::simulated(&setup.vault);
    behaves(&backend, setup).await;
}

#[tokio::test]
async fn a_real_vault_behaves_like_the_simulated_one() {
    if let Some(backend) = Backend::real().await {
        behaves(&backend, Setup::new(&["main", "other"]).await).await;
        let _ = writeln!(std::io::stderr(), "real Vault: run");
    } else {
        let _ = writeln!(
            std::io::stderr(),
            "real Vault: not run (no CREDBROKER_TEST_VAULT_ADDR, no bao or vault on PATH); policies: not proven"
        );
    }
}

/// What an admin does to the keys of one mount.
struct Admin<'a> {
    backend: &'a Backend,
    api: &'a Api,
    mount: &'a str,
}

impl Admin<'_> {
    async fn on_key(&self, method: &str, area: &str, account: &str, body: Value) -> Value {
        let path = format!("{}/{area}/{}", self.mount, kv_path(account, "main"));
        self.api.call(method, &path, body).await
    }

    async fn put(&self, account: &str, generation: u32) {
        let data = secret(&key(account, generation));
        self.on_key("POST", "data", account, json!({ "data": data }))
            .await;
    }

    async fn set_state(&self, state: &str) {
        let custom = json!({ "custom_metadata": { "state": state } });
        self.on_key("POST", "metadata", "main", custom).await;
    }

    /// The broker's policy: the keys of one account, and its own token.
    async fn allow_main(&self) {
        let area = |area: &str| {
            let path = format!("{}/{area}/kucoin/prod/main/*", self.mount);
            format!("path \"{path}\" {{ capabilities = [\"read\"] }}\n")
        };
        let policy = format!("{OWN_TOKEN}{}{}", area("data"), area("metadata"));
        self.backend.set_policy(&policy, &["other"]).await;
    }

    async fn allow_no_key(&self) {
        self.backend.set_policy(OWN_TOKEN, &["main", "other"]).await;
    }

    async fn secret_id(&self) -> String {
        let path = format!("auth/{}/role/credbroker/secret-id", self.mount);
        let answer = self.api.call("POST", &path, json!({})).await;
        answer["data"]["secret_id"].as_str().unwrap().to_owned()
    }
}

const OWN_TOKEN: &str = r#"
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self"  { capabilities = ["update"] }
path "auth/token/revoke-self" { capabilities = ["update"] }
"#;

async fn behaves(backend: &Backend, mut setup: Setup) {
    let Backend { api, name, .. } = backend;
    let admin = Admin {
        backend,
        api,
        mount: name,
    };
    api.call(
        "POST",
        &format!("sys/mounts/{name}"),
        json!({ "type": "kv", "options": { "version": "2" } }),
    )
    .await;
    api.call(
        "POST",
        &format!("sys/auth/{name}"),
        json!({ "type": "approle" }),
    )
    .await;
    admin.allow_main().await;
    let role =
        json!({ "token_policies": [name], "token_no_default_policy": true, "token_ttl": "20m" });
    let role_path = format!("auth/{name}/role/credbroker");
    api.call("POST", &role_path, role).await;
    let role_id = api
        .call("GET", &format!("{role_path}/role-id"), Value::Null)
        .await;
    for account in ["main", "other"] {
        admin.put(account, 1).await;
    }
    setup.address = Some(api.url.clone());
    setup.more = format!("mount = \"{name}\"");
    setup.auth = format!(
        "method = \"approle\"\nmount = \"{name}\"\nrole_id = {}\nsecret_id_file = \"secret-id\"",
        role_id["data"]["role_id"],
    );
    setup.files = vec![("secret-id", format!("{}\n", admin.secret_id().await))];
    let rig = setup.ready().await;

    follows_versions(&rig, &admin).await;
    follows_authority(&rig, &admin).await;
    survives_sealing(&rig, &admin).await;
    survives_a_lost_login(&rig, &admin).await;
    if backend.is_real() {
        follows_a_version_that_deletes_itself(&rig, &admin).await;
    }
    rig.end().await;
    survives_a_revoked_token(&admin).await;
    backend.clean_up().await;
}

/// Read at start, with this policy alone; then rotation, deletion, undeletion, a version without data.
async fn follows_versions(rig: &Rig, admin: &Admin<'_>) {
    assert_eq!(rig.signer("main").await, Ok(key("main", 1).api_key));
    let refused = rig.signer("other").await.unwrap_err();
    assert!(
        refused.contains("Vault refuses it to the broker (403)"),
        "{refused}"
    );

    admin.put("main", 2).await;
    rig.until_signed_with(2).await;
    admin.on_key("DELETE", "data", "main", json!({})).await;
    rig.until_evicted("Vault has no such key (404)").await;
    admin
        .on_key("POST", "undelete", "main", json!({ "versions": [2] }))
        .await;
    rig.until_restored(2).await;

    admin
        .on_key("POST", "data", "main", json!({ "data": null }))
        .await;
    let line = [
        "new version is unusable",
        "version 3 in Vault: `api_key` is missing",
    ];
    rig.serves_until(2, "the version without data is noticed", async || {
        rig.logs.count(&line) == 1
    })
    .await;

    admin.on_key("DELETE", "metadata", "main", json!({})).await;
    rig.until_evicted("Vault has no such key (404)").await;
    admin.put("main", 3).await;
    rig.until_restored(3).await;
}

async fn follows_authority(rig: &Rig, admin: &Admin<'_>) {
    admin.set_state("disabled").await;
    rig.until_evicted("its metadata in Vault says state=disabled")
        .await;
    admin.set_state("active").await;
    rig.until_restored(3).await;

    admin.allow_no_key().await;
    rig.until_evicted("Vault refuses it to the broker (403)")
        .await;
    admin.allow_main().await;
    rig.until_restored(3).await;
}

async fn survives_sealing(rig: &Rig, admin: &Admin<'_>) {
    if !admin.backend.seal().await {
        return;
    }
    let line = [
        NO_ANSWER,
        "key=main",
        "Vault is sealed or not initialised (503)",
    ];
    rig.serves_until(3, "a poll has met the seal", async || {
        rig.logs.count(&line) >= 1
    })
    .await;
    admin.backend.unseal().await;
    admin.put("main", 4).await;
    rig.until_signed_with(4).await;
}

async fn survives_a_lost_login(rig: &Rig, admin: &Admin<'_>) {
    admin.backend.revoke_logins().await;
    admin.put("main", 1).await;
    rig.until_signed_with(1).await;

    replace(&rig.lab.path("secret-id"), "never-a-secret-id\n");
    admin.backend.revoke_logins().await;
    let line = [
        LOGIN_REFUSED,
        "account.id=main",
        "login: Vault answered 400: invalid role or secret ID",
    ];
    rig.serves_until(1, "a login was refused", async || {
        rig.logs.count(&line) >= 1
    })
    .await;
    admin.put("main", 2).await;
    replace(&rig.lab.path("secret-id"), &admin.secret_id().await);
    rig.until_signed_with(2).await;
}

/// Nothing in the metadata changes at the moment when it is gone.
async fn follows_a_version_that_deletes_itself(rig: &Rig, admin: &Admin<'_>) {
    let after = |text: &str| json!({ "delete_version_after": text });
    admin.on_key("POST", "metadata", "main", after("3s")).await;
    admin.put("main", 3).await;
    rig.until_signed_with(3).await;
    rig.until_evicted("Vault has no such key (404)").await;
    admin.on_key("POST", "metadata", "main", after("0s")).await;
    admin.put("main", 4).await;
    rig.until_restored(4).await;
}

/// The token of a token file, restricted to the broker's policy, is revoked and replaced.
async fn survives_a_revoked_token(admin: &Admin<'_>) {
    let token = async || {
        let wanted = json!({ "policies": [admin.mount], "no_default_policy": true, "ttl": "1h" });
        let answer = admin.api.call("POST", "auth/token/create", wanted).await;
        answer["auth"]["client_token"].as_str().unwrap().to_owned()
    };
    admin.put("main", 1).await;
    let first = token().await;
    let mut setup = Setup::new(&["main"]).await;
    setup.address = Some(admin.api.url.clone());
    setup.more = format!("mount = \"{}\"", admin.mount);
    setup.files = vec![("token", format!("{first}\n"))];
    let rig = setup.ready().await;
    let own = Api::new(&admin.api.url, &first);
    own.call("POST", "auth/token/revoke-self", json!({})).await;
    let line = [NO_ANSWER, "Vault does not accept the broker's token (403)"];
    rig.serves_until(1, "the token is refused", async || {
        rig.logs.count(&line) >= 1
    })
    .await;
    admin.put("main", 2).await;
    replace(&rig.lab.path("token"), &token().await);
    rig.until_signed_with(2).await;
    rig.end().await;
}
