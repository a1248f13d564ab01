//! The broker behaves the same with the simulated and with a real Vault: each test runs against both.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use credbroker_sim::installation::{kv_path, secret};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::policies::shipped;
use super::real::Backend;
use super::{CACHED, Rig, Setup, key};
use crate::harness::{not_run, print_always, until};

on_both! {
    broker_started_before_vault_becomes_ready_once_vault_is_unsealed
    deleted_version_evicts_the_key_until_it_is_undeleted
    destroyed_version_evicts_the_key_until_a_new_one_is_written
    failover_fails_no_call_and_new_versions_are_read_from_the_standby
    key_recreated_with_the_same_version_number_is_recognized_as_new
    disabled_key_is_evicted_until_it_is_active_again
    revoked_login_is_repeated_and_a_rejected_login_evicts_nothing
    removed_mount_evicts_the_key_until_it_is_restored
    new_version_is_used_and_a_version_without_data_is_not
    deleted_policy_evicts_the_key_until_it_is_restored
    policy_that_no_longer_allows_the_key_evicts_it_until_restored
    vault_restart_evicts_nothing_and_changes_are_read_afterwards
    vault_seal_evicts_nothing_and_changes_are_read_after_unsealing
    slow_vault_delays_no_call_and_a_timed_out_response_is_an_outage
    revoked_token_evicts_nothing_and_the_next_token_is_picked_up
    version_deleted_by_delete_version_after_evicts_the_key
}

const GONE: &str = "Vault has no such key (404)";
const SEALED: &str = "Vault is sealed or not initialised (503)";
const UNREACHABLE: &str = "cannot reach Vault";

/// A Vault with one mount, a role with the shipped policy for account `main`, and the first keys of `main` and `other`.
struct Stage {
    vault: Backend,
    role_id: Value,
}

impl Stage {
    async fn simulated() -> Self {
        Self::on(Backend::simulated().await).await
    }

    async fn real() -> Option<Self> {
        static PRINTED: Once = Once::new();
        let vault = Backend::real().await;
        PRINTED.call_once(|| {
            match &vault {
                None => not_run(
                    "real Vault",
                    "vault",
                    "no CREDBROKER_TEST_VAULT_ADDR, no bao or vault on PATH",
                ),
                Some(vault) if vault.is_ours() => print_always("real Vault: run"),
                Some(_) => print_always(
                    "real Vault: run; cold start, seal, restart and failover not run, the server is not ours",
                ),
            }
        });
        Some(Self::on(vault?).await)
    }

    async fn on(vault: Backend) -> Self {
        let Backend { api, name, .. } = &vault;
        let approle = json!({ "type": "approle" });
        api.call("POST", &format!("sys/auth/{name}"), approle).await;
        let role = format!("auth/{name}/role/credbroker");
        let settings = json!({
            "token_policies": [name], "token_no_default_policy": true, "token_ttl": "20m",
        });
        api.call("POST", &role, settings).await;
        let role_id = api
            .call("GET", &format!("{role}/role-id"), Value::Null)
            .await;
        let stage = Self {
            role_id: role_id["data"]["role_id"].clone(),
            vault,
        };
        stage.allow_main().await;
        stage.mount().await;
        for account in ["main", "other"] {
            stage.put(account, 1).await;
        }
        stage
    }

    /// Configuration of a broker that logs in to this Vault.
    async fn setup(&self) -> Setup {
        let Backend { api, name, .. } = &self.vault;
        let mut setup = Setup::new(&["main", "other"]).await;
        setup.settings.vault_url = Some(api.url.clone());
        setup.more = format!("mount = \"{name}\"");
        setup.settings.auth = format!(
            "method = \"approle\"\nmount = \"{name}\"\nrole_id = {}\nsecret_id_file = \"secret-id\"",
            self.role_id,
        );
        setup.settings.files = vec![("secret-id", format!("{}\n", self.secret_id().await))];
        setup
    }

    /// A broker that has logged in and loaded the first key of `main`.
    async fn broker(&self) -> Rig {
        let rig = self.setup().await.ready().await;
        rig.until_restored(1).await;
        rig
    }

    async fn mount(&self) {
        let Backend { api, name, .. } = &self.vault;
        let settings = json!({ "type": "kv", "options": { "version": "2" } });
        api.call("POST", &format!("sys/mounts/{name}"), settings)
            .await;
        until("the mount is ready", async || {
            let config = format!("/v1/{name}/config");
            api.raw("GET", &config, None).await.0 == 200
        })
        .await;
    }

    async fn unmount(&self) {
        let path = format!("sys/mounts/{}", self.vault.name);
        self.vault.api.call("DELETE", &path, json!({})).await;
    }

    async fn on_key(&self, method: &str, area: &str, account: &str, body: Value) -> Value {
        let path = format!("{}/{area}/{}", self.vault.name, kv_path(account, "main"));
        self.vault.api.call(method, &path, body).await
    }

    /// Writes a key as a new version; returns the version.
    async fn put(&self, account: &str, generation: u32) -> u64 {
        let data = json!({ "data": secret(&key(account, generation)) });
        let written = self.on_key("POST", "data", account, data).await;
        written["data"]["version"].as_u64().unwrap()
    }

    async fn delete_with_metadata(&self) {
        self.on_key("DELETE", "metadata", "main", json!({})).await;
    }

    async fn set_state(&self, state: &str) {
        let custom = json!({ "custom_metadata": { "state": state } });
        self.on_key("POST", "metadata", "main", custom).await;
    }

    /// The shipped policy, limited to one account as its header describes.
    async fn allow_main(&self) {
        let policy = shipped("broker.hcl", &self.vault.name);
        let policy = policy.replace("/kucoin/prod/*", "/kucoin/prod/main/*");
        self.vault.set_policy(&policy, &["other"]).await;
    }

    async fn allow_no_key(&self) {
        let policy = shipped("broker.hcl", &self.vault.name);
        let policy = policy.replace("/kucoin/prod/*", "/kucoin/prod/nobody/*");
        self.vault.set_policy(&policy, &["main", "other"]).await;
    }

    async fn secret_id(&self) -> String {
        let path = format!("auth/{}/role/credbroker/secret-id", self.vault.name);
        let response = self.vault.api.call("POST", &path, json!({})).await;
        response["data"]["secret_id"].as_str().unwrap().to_owned()
    }

    async fn clean_up(&self) {
        self.vault.clean_up().await;
    }
}

/// Checks that the key of `generation` signs every call until one more poll has failed for this reason.
async fn expect_cached_key_through(rig: &Rig, generation: u32, reason: &str) {
    // Matches both an outage and a rejected login.
    let line = [CACHED, "account.id=main", reason];
    let before = rig.logs.count(&line);
    rig.signs_until(generation, reason, async || rig.logs.count(&line) > before)
        .await;
    assert_eq!(rig.logs.count(&["key unavailable", "account.id=main"]), 0);
}

async fn broker_started_before_vault_becomes_ready_once_vault_is_unsealed(stage: &Stage) {
    if !stage.vault.is_ours() {
        return;
    }
    let setup = stage.setup().await;
    stage.vault.stop().await;
    let rig = setup.start().await;
    for reason in [UNREACHABLE, SEALED] {
        if reason == SEALED {
            stage.vault.restart().await;
        }
        rig.until_not_ready(&format!(
            "key main/main: waiting for Vault: login: {reason}\n"
        ))
        .await;
        rig.until_evicted(reason).await;
        assert_eq!(rig.lab.get("/healthz").await, (200, "ok\n".to_owned()));
    }
    assert!(rig.lab.kucoin.received().is_empty());
    stage.vault.unseal().await;
    rig.lab.until_ready().await;
    rig.until_restored(1).await;
    rig.end().await;
}

async fn deleted_version_evicts_the_key_until_it_is_undeleted(stage: &Stage) {
    let rig = stage.broker().await;
    stage.put("main", 2).await;
    rig.until_signed_with(2).await;
    stage.on_key("DELETE", "data", "main", json!({})).await;
    rig.until_evicted(GONE).await;
    let undeleted = json!({ "versions": [2] });
    stage.on_key("POST", "undelete", "main", undeleted).await;
    rig.until_restored(2).await;
    rig.end().await;
}

async fn destroyed_version_evicts_the_key_until_a_new_one_is_written(stage: &Stage) {
    let rig = stage.broker().await;
    stage.put("main", 2).await;
    rig.until_signed_with(2).await;
    let destroyed = json!({ "versions": [2] });
    stage
        .on_key("PUT", "destroy", "main", destroyed.clone())
        .await;
    rig.until_evicted(GONE).await;
    // A destroyed version cannot be undeleted, so the new version is the next one that signs.
    stage.on_key("POST", "undelete", "main", destroyed).await;
    stage.put("main", 3).await;
    rig.until_restored(3).await;
    rig.end().await;
}

async fn failover_fails_no_call_and_new_versions_are_read_from_the_standby(stage: &Stage) {
    if !stage.vault.is_ours() {
        return;
    }
    stage.vault.add_standby().await;
    let rig = stage.broker().await;
    let is_over = Cell::new(false);
    let failover = async {
        stage.vault.fail_over().await;
        is_over.set(true);
    };
    let calls = rig.signs_until(1, "the failover", async || is_over.get());
    tokio::join!(failover, calls);
    // The broker still sends its requests to the same node, which is the standby now.
    stage.put("main", 2).await;
    rig.until_signed_with(2).await;
    stage.vault.revoke_logins().await;
    stage.put("main", 3).await;
    rig.until_signed_with(3).await;
    rig.end().await;
}

async fn key_recreated_with_the_same_version_number_is_recognized_as_new(stage: &Stage) {
    let rig = stage.broker().await;
    stage.delete_with_metadata().await;
    rig.until_evicted(GONE).await;
    assert_eq!(stage.put("main", 2).await, 1);
    rig.until_restored(2).await;
    // Between two polls, so that the broker never sees the key missing.
    stage.delete_with_metadata().await;
    assert_eq!(stage.put("main", 3).await, 1);
    until("the new key signs", async || {
        rig.signer("main").await == Ok(key("main", 3).api_key)
    })
    .await;
    rig.end().await;
}

async fn disabled_key_is_evicted_until_it_is_active_again(stage: &Stage) {
    let rig = stage.broker().await;
    for (off, on) in [("disabled", "active"), ("Off", "Active")] {
        stage.set_state(off).await;
        rig.until_evicted(&format!(
            "disabled in Vault (state={off} in its custom metadata)"
        ))
        .await;
        stage.set_state(on).await;
        rig.until_restored(1).await;
    }
    stage.set_state("paused").await;
    rig.signs_until(1, "readyz shows the unknown state", async || {
        let (_, text) = rig.lab.get("/readyz").await;
        text.contains(
            "its custom metadata has state=\"paused\", which is neither active nor disabled",
        )
    })
    .await;
    rig.end().await;
}

async fn revoked_login_is_repeated_and_a_rejected_login_evicts_nothing(stage: &Stage) {
    let rig = stage.broker().await;
    stage.vault.revoke_logins().await;
    stage.put("main", 2).await;
    rig.until_signed_with(2).await;

    rig.lab.replace("secret-id", "never-a-secret-id\n").unwrap();
    stage.vault.revoke_logins().await;
    let reason = "login: Vault returned 400: invalid role or secret ID";
    expect_cached_key_through(&rig, 2, reason).await;
    stage.put("main", 3).await;
    rig.lab
        .replace("secret-id", &stage.secret_id().await)
        .unwrap();
    rig.until_signed_with(3).await;
    rig.end().await;
}

async fn removed_mount_evicts_the_key_until_it_is_restored(stage: &Stage) {
    let rig = stage.broker().await;
    stage.unmount().await;
    rig.until_evicted("Vault has no such mount or namespace (404: no handler for route")
        .await;
    stage.mount().await;
    assert_eq!(stage.put("main", 2).await, 1);
    rig.until_restored(2).await;
    rig.end().await;
}

async fn new_version_is_used_and_a_version_without_data_is_not(stage: &Stage) {
    let rig = stage.broker().await;
    stage.put("main", 2).await;
    rig.until_signed_with(2).await;
    let nothing = json!({ "data": null });
    stage.on_key("POST", "data", "main", nothing).await;
    let line = [
        "new key version is unusable",
        "version 3 in Vault is not a valid key: `api_key` is missing",
    ];
    rig.signs_until(2, "the version without data is rejected", async || {
        rig.logs.count(&line) == 1
    })
    .await;
    stage.put("main", 4).await;
    rig.until_signed_with(4).await;
    rig.end().await;
}

/// The token stays valid but cannot even look itself up.
async fn deleted_policy_evicts_the_key_until_it_is_restored(stage: &Stage) {
    let rig = stage.broker().await;
    stage.vault.delete_policy().await;
    rig.until_evicted("Vault denied the broker access (403)")
        .await;
    stage.allow_main().await;
    rig.until_restored(1).await;
    rig.end().await;
}

async fn policy_that_no_longer_allows_the_key_evicts_it_until_restored(stage: &Stage) {
    let denied = "Vault denied the broker access (403)";
    let rig = stage.broker().await;
    let other = rig.signer("other").await.unwrap_err();
    assert!(other.contains(denied), "{other}");
    stage.allow_no_key().await;
    rig.until_evicted(denied).await;
    stage.allow_main().await;
    rig.until_restored(1).await;
    rig.end().await;
}

async fn vault_restart_evicts_nothing_and_changes_are_read_afterwards(stage: &Stage) {
    if !stage.vault.is_ours() {
        return;
    }
    let rig = stage.broker().await;
    stage.vault.stop().await;
    expect_cached_key_through(&rig, 1, UNREACHABLE).await;
    stage.vault.restart().await;
    expect_cached_key_through(&rig, 1, SEALED).await;
    stage.vault.unseal().await;
    stage.put("main", 2).await;
    rig.until_signed_with(2).await;
    rig.end().await;
}

async fn vault_seal_evicts_nothing_and_changes_are_read_after_unsealing(stage: &Stage) {
    if !stage.vault.is_ours() {
        return;
    }
    let rig = stage.broker().await;
    stage.vault.seal().await;
    expect_cached_key_through(&rig, 1, SEALED).await;
    stage.vault.unseal().await;
    stage.put("main", 2).await;
    rig.until_signed_with(2).await;
    rig.end().await;
}

async fn slow_vault_delays_no_call_and_a_timed_out_response_is_an_outage(stage: &Stage) {
    const SLOW_MS: u64 = 300;
    const TOO_SLOW_MS: u64 = 3000;
    let link = Link::to(&stage.vault.api.url).await;
    let mut setup = stage.setup().await;
    setup.settings.vault_url = Some(link.url.clone());
    setup.timeout_ms = 1500;
    link.delay_ms.store(SLOW_MS, Ordering::Relaxed);
    let rig = setup.ready().await;
    rig.until_restored(1).await;
    stage.put("main", 2).await;
    rig.until_signed_with(2).await;

    link.delay_ms.store(TOO_SLOW_MS, Ordering::Relaxed);
    stage.put("main", 3).await;
    for _ in 0..2 {
        expect_cached_key_through(&rig, 2, UNREACHABLE).await;
    }
    // A call that waited for Vault would exceed this limit.
    let call = timeout(Duration::from_millis(TOO_SLOW_MS), rig.signer("main"));
    assert_eq!(call.await.unwrap(), Ok(key("main", 2).api_key));
    link.delay_ms.store(0, Ordering::Relaxed);
    rig.until_signed_with(3).await;
    rig.end().await;
}

/// Uses a token file whose token has only the broker's policy.
async fn revoked_token_evicts_nothing_and_the_next_token_is_picked_up(stage: &Stage) {
    let Backend { api, name, .. } = &stage.vault;
    let token = async || {
        let request = json!({ "policies": [name], "no_default_policy": true, "ttl": "1h" });
        let response = api.call("POST", "auth/token/create", request).await;
        response["auth"]["client_token"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let first = token().await;
    let mut setup = Setup::new(&["main"]).await;
    setup.settings.vault_url = Some(api.url.clone());
    setup.more = format!("mount = \"{name}\"");
    setup.settings.files = vec![("token", format!("{first}\n"))];
    let rig = setup.ready().await;
    let own = api.with_token(&first);
    own.call("POST", "auth/token/revoke-self", json!({})).await;
    expect_cached_key_through(&rig, 1, "Vault rejected the token (403)").await;
    stage.put("main", 2).await;
    rig.lab.replace("token", &token().await).unwrap();
    rig.until_signed_with(2).await;
    rig.end().await;
}

/// The metadata do not change at the moment when the version is deleted.
async fn version_deleted_by_delete_version_after_evicts_the_key(stage: &Stage) {
    // The simulator rejects `delete_version_after`.
    if !stage.vault.is_real() {
        return;
    }
    let after = |text: &str| json!({ "delete_version_after": text });
    let rig = stage.broker().await;
    stage.on_key("POST", "metadata", "main", after("3s")).await;
    stage.put("main", 2).await;
    rig.until_signed_with(2).await;
    rig.until_evicted(GONE).await;
    stage.on_key("POST", "metadata", "main", after("0s")).await;
    stage.put("main", 3).await;
    rig.until_restored(3).await;
    rig.end().await;
}

/// Forwards TCP connections and delays everything that Vault sends back.
struct Link {
    url: String,
    delay_ms: Arc<AtomicU64>,
}

impl Link {
    async fn to(url: &str) -> Self {
        let host = url.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let delay_ms = Arc::new(AtomicU64::new(0));
        let delay = Arc::clone(&delay_ms);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(&host).await;
                if let Ok(far) = far {
                    tokio::spawn(forward(near, far, Arc::clone(&delay)));
                }
            }
        });
        Self { url, delay_ms }
    }
}

async fn forward(near: TcpStream, far: TcpStream, delay_ms: Arc<AtomicU64>) {
    let (mut near_read, mut near_write) = near.into_split();
    let (mut far_read, mut far_write) = far.into_split();
    let upstream = async {
        let _ = tokio::io::copy(&mut near_read, &mut far_write).await;
    };
    let downstream = async {
        let mut chunk = vec![0; 16384];
        while let Ok(length @ 1..) = far_read.read(&mut chunk).await {
            tokio::time::sleep(Duration::from_millis(delay_ms.load(Ordering::Relaxed))).await;
            if near_write.write_all(&chunk[..length]).await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = upstream => {}
        () = downstream => {}
    }
}
