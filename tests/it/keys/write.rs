//! Writes of admins to Vault under the shipped policy: keys, which admins cannot read, and custom metadata.

use std::sync::Arc;
use std::time::Duration;

use credbroker::base::ids::{AccountId, KeyName};
use credbroker::base::secret::{ApiSecret, KeyValues, PartnerKey, Passphrase};
use credbroker::kucoin::KeyVersion;
use credbroker::telemetry::Metrics;
use credbroker::vault::{
    Auth, Metadata, Notes, OutageKind, Registration, StoredFacts, StoredState, Vault, VaultError,
    VaultSettings, WriteError,
};
use credbroker_sim::installation::{ROOT_TOKEN, kv_path};
use credbroker_sim::vault::{Fault, FaultRule, Seen, VaultSim};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tempfile::TempDir;
use zeroize::Zeroizing;

use super::policies::shipped;
use super::real::{Api, Backend};
use crate::harness::until;

on_both! {
    key_is_written_completely_and_only_over_the_expected_version
    missing_key_is_none_and_access_denied_by_policy_is_an_error
    accounts_and_keys_are_listed_and_an_empty_vault_gives_an_empty_list
    metadata_entries_are_changed_one_by_one_and_foreign_entries_are_kept
    metadata_stays_within_vaults_limits_on_length_and_number_of_entries
    concurrent_metadata_changes_are_both_kept
}

fn is_disabled(metadata: &Metadata) -> bool {
    matches!(metadata.state(), StoredState::Disabled(_))
}

/// A Vault with a mount that requires check-and-set, and an admin's client.
struct Stage {
    vault: Backend,
    admin: Vault,
    _token: TempDir,
}

impl Stage {
    async fn simulated() -> Self {
        Self::on(Backend::simulated().await).await
    }

    async fn real() -> Option<Self> {
        Some(Self::on(Backend::real().await?).await)
    }

    async fn on(vault: Backend) -> Self {
        let Backend { api, name, .. } = &vault;
        let kv = json!({ "type": "kv", "options": { "version": "2" } });
        api.call("POST", &format!("sys/mounts/{name}"), kv).await;
        let policy = json!({ "policy": shipped("admin.hcl", name) });
        api.call("PUT", &format!("sys/policies/acl/{name}"), policy)
            .await;
        until("the mount is ready", async || {
            let config = format!("/v1/{name}/config");
            let settings = json!({ "cas_required": true });
            api.raw("POST", &config, Some(&settings)).await.0 == 204
        })
        .await;
        let token = if vault.is_real() {
            let request = json!({ "policies": [name], "no_default_policy": true, "ttl": "1h" });
            let made = api.call("POST", "auth/token/create", request).await;
            made["auth"]["client_token"].as_str().unwrap().to_owned()
        } else {
            api.token.clone()
        };
        let (admin, token) = admin(&api.url, name, &token);
        Self {
            vault,
            admin,
            _token: token,
        }
    }

    /// The values of a version of the key `main/main`, read with the root token.
    async fn stored(&self, version: u64) -> Value {
        let Backend { api, name, .. } = &self.vault;
        let path = kv_path("main", "main");
        let path = format!("{name}/data/{path}?version={version}");
        api.call("GET", &path, Value::Null).await["data"]["data"].clone()
    }

    async fn clean_up(&self) {
        self.vault.clean_up().await;
    }
}

/// A client of an admin with this token.
fn admin(url: &str, mount: &str, token: &str) -> (Vault, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, token).unwrap();
    let settings = VaultSettings {
        address: url.parse().unwrap(),
        redirects: Vec::new(),
        namespace: None,
        mount: mount.to_owned(),
        prefix: "kucoin/prod".to_owned(),
        auth: Auth::TokenFile(file),
        timeout: Duration::from_secs(5),
    };
    (vault(settings), folder)
}

fn vault(settings: VaultSettings) -> Vault {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    Vault::new(settings, tls, Arc::new(Metrics::default())).unwrap()
}

fn account(name: &str) -> AccountId {
    name.parse().unwrap()
}

fn main_key() -> KeyName {
    "main".parse().unwrap()
}

/// A fake registration; its values need escapes in JSON and are unique.
fn registration(generation: u32) -> Registration {
    let text = |text: &str| Zeroizing::new(format!("fake-{text}\"\\-{generation}"));
    Registration {
        values: KeyValues {
            api_key: Zeroizing::new(format!("fake-id-{generation}")),
            api_secret: ApiSecret::new(text("secret")),
            passphrase: Passphrase::new(text("passphrase\u{1}\u{e4}")),
            partner_key: (generation == 2).then(|| PartnerKey::new(text("partner"))),
        },
        key_version: KeyVersion::V3,
        facts: StoredFacts {
            uid: "1001".to_owned(),
            site: "global".to_owned(),
            permissions: vec!["General".to_owned(), "Spot".to_owned()],
            registered_by: "spiffe://demo.test/admin/anna".to_owned(),
            registered_at_ms: 1_700_000_000_000,
            key_sha256: format!("fake-sha256-{generation}"),
            ..StoredFacts::default()
        },
    }
}

async fn write(admin: &Vault, generation: u32, cas: u64) -> Result<u64, WriteError> {
    let (account, key) = (account("main"), main_key());
    let registration = registration(generation);
    let written = admin.write(&account, &key, &registration, cas).await;
    if let Err(error) = &written {
        let text = format!("{error} {error:?}");
        assert!(!text.contains("fake-"), "{text}");
    }
    written
}

async fn note(admin: &Vault, changes: &Notes) -> Result<Metadata, WriteError> {
    admin.note(&account("main"), &main_key(), changes).await
}

async fn key_is_written_completely_and_only_over_the_expected_version(stage: &Stage) {
    assert_eq!(write(&stage.admin, 1, 0).await, Ok(1));
    let complete = json!({
        "api_key": "fake-id-1", "api_secret": "fake-secret\"\\-1",
        "passphrase": "fake-passphrase\u{1}\u{e4}\"\\-1", "key_version": "3",
        "uid": "1001", "site": "global", "permissions": "General,Spot",
        "registered_by": "spiffe://demo.test/admin/anna", "registered_at_ms": "1700000000000",
        "key_sha256": "fake-sha256-1",
    });
    assert_eq!(stage.stored(1).await, complete);

    for stale in [0, 2] {
        let expected = WriteError::Stale {
            expected: stale,
            found: 1,
        };
        assert_eq!(write(&stage.admin, 2, stale).await, Err(expected));
    }
    assert_eq!(write(&stage.admin, 2, 1).await, Ok(2));
    assert_eq!(stage.stored(2).await["partner_key"], "fake-partner\"\\-2");
    assert_eq!(stage.stored(1).await, complete);
    let written = stage.admin.metadata(&account("main"), &main_key()).await;
    let written = written.unwrap();
    assert_eq!(written.current_version, 2);
    assert!(written.created(1).unwrap() < written.created(2).unwrap());

    // The broker can read the key that was written.
    let Api { url, token, .. } = &stage.vault.api;
    let (broker, _token) = admin(url, &stage.vault.name, token);
    let key = broker.read(&account("main"), &main_key(), 2).await.unwrap();
    assert!(key.has_partner_key());
}

async fn missing_key_is_none_and_access_denied_by_policy_is_an_error(stage: &Stage) {
    let (account, key) = (account("main"), main_key());
    assert_eq!(stage.admin.find(&account, &key).await, Ok(None));
    let gone = VaultError::Gone("Vault has no such key (404)".to_owned());
    assert_eq!(stage.admin.metadata(&account, &key).await, Err(gone));
    if !stage.vault.is_real() {
        return;
    }
    assert_eq!(write(&stage.admin, 1, 0).await, Ok(1));
    let read = stage.admin.read(&account, &key, 1).await;
    assert_eq!(read.unwrap_err(), VaultError::Denied);

    let Api { url, token, .. } = &stage.vault.api.with_token("never-a-token");
    let (unauthorized, _token) = admin(url, &stage.vault.name, token);
    assert!(matches!(
        unauthorized.find(&account, &key).await,
        Err(VaultError::Outage(_) | VaultError::Denied)
    ));
    let written = write(&unauthorized, 2, 1).await;
    assert!(matches!(written, Err(WriteError::Vault(_))), "{written:?}");
    assert_eq!(stage.admin.accounts().await, Ok(vec![account.clone()]));
}

async fn accounts_and_keys_are_listed_and_an_empty_vault_gives_an_empty_list(stage: &Stage) {
    assert_eq!(stage.admin.accounts().await, Ok(Vec::new()));
    assert_eq!(stage.admin.keys(&account("main")).await, Ok(Vec::new()));
    let Backend { api, name, .. } = &stage.vault;
    for path in [
        "main/main",
        "main/futures",
        "other/main",
        "lonely",
        "main/Not-A-Name",
    ] {
        let written = json!({ "options": { "cas": 0 }, "data": {} });
        let path = format!("{name}/data/kucoin/prod/{path}");
        api.call("POST", &path, written).await;
    }
    let accounts = stage.admin.accounts().await.unwrap();
    assert_eq!(accounts, [account("main"), account("other")]);
    let keys = stage.admin.keys(&account("main")).await.unwrap();
    assert_eq!(keys, ["futures".parse().unwrap(), main_key()]);
}

async fn metadata_entries_are_changed_one_by_one_and_foreign_entries_are_kept(stage: &Stage) {
    let admin = &stage.admin;
    // Before the first version.
    let metadata = note(admin, &Notes::state(false)).await.unwrap();
    assert!(metadata.current_version == 0 && is_disabled(&metadata));
    assert_eq!(write(admin, 1, 0).await, Ok(1));

    let Backend { api, name, .. } = &stage.vault;
    let path = format!("{name}/metadata/{}", kv_path("main", "main"));
    // Older versions of credbroker wrote the last two.
    let owned = json!({
        "owner": "desk", "state": "disabled", "use_version": "7", "pending_version": "1", "pending_sha256": "ab",
    });
    api.call("POST", &path, json!({ "custom_metadata": owned }))
        .await;

    let registered = Notes::registered(1, &registration(1).facts);
    let metadata = note(admin, &registered).await.unwrap();
    assert_eq!(metadata.note("owner"), Some("desk"));
    assert!(is_disabled(&metadata));
    assert_eq!(metadata.use_version(), None);
    assert_eq!(metadata.for_version(), Some(1));
    for old in ["pending_version", "pending_sha256"] {
        assert_eq!(metadata.note(old), None);
    }
    assert_eq!(
        (metadata.uid(), metadata.key_sha256()),
        (Some("1001"), Some("fake-sha256-1"))
    );

    let metadata = note(admin, &Notes::state(true)).await.unwrap();
    assert!(!is_disabled(&metadata));
    let metadata = note(admin, &Notes::hold(1, 1)).await.unwrap();
    assert_eq!(metadata.use_version(), Some("1"));
    let before = api.call("GET", &path, Value::Null).await["data"].clone();
    note(admin, &Notes::hold(1, 1)).await.unwrap();
    let after = api.call("GET", &path, Value::Null).await["data"].clone();
    assert_eq!(before, after, "unchanged entries must not be written again");
    assert_eq!(after["custom_metadata"]["owner"], "desk");
}

async fn metadata_stays_within_vaults_limits_on_length_and_number_of_entries(stage: &Stage) {
    let facts = StoredFacts {
        ip_whitelist: vec!["192.0.2.100".to_owned(); 100],
        registered_by: "anna\u{200b}\u{e4}".to_owned(),
        ..registration(1).facts
    };
    let metadata = note(&stage.admin, &Notes::registered(1, &facts))
        .await
        .unwrap();
    assert_eq!(metadata.note("ip_whitelist").map(str::len), Some(512));
    assert_eq!(metadata.note("registered_by"), Some("anna??"));

    let many: serde_json::Map<_, _> = (0..64).map(|n| (format!("note-{n}"), json!("x"))).collect();
    let Backend { api, name, .. } = &stage.vault;
    let path = format!("{name}/metadata/{}", kv_path("main", "main"));
    api.call("POST", &path, json!({ "custom_metadata": many }))
        .await;
    let error = note(&stage.admin, &Notes::state(false)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "not written to Vault: the key's custom metadata would have 65 entries, but Vault allows 64; remove entries that credbroker did not write"
    );
}

async fn concurrent_metadata_changes_are_both_kept(stage: &Stage) {
    for version in 1..=10 {
        let (enabled, hold) = (
            Notes::state(version % 2 == 0),
            Notes::hold(version, version),
        );
        let (one, other) = tokio::join!(note(&stage.admin, &enabled), note(&stage.admin, &hold));
        one.unwrap();
        other.unwrap();
        let metadata = stage
            .admin
            .metadata(&account("main"), &main_key())
            .await
            .unwrap();
        assert_eq!(is_disabled(&metadata), version % 2 == 1);
        assert_eq!(metadata.use_version(), Some(version.to_string().as_str()));
    }
}

/// A simulated Vault with a fault, and an admin's client.
async fn faulty(rule: FaultRule) -> (VaultSim, Vault, TempDir) {
    let vault = VaultSim::start_dev(ROOT_TOKEN).await.unwrap();
    vault.mount_kv("kv");
    let (admin, token) = admin(&vault.address(), "kv", ROOT_TOKEN);
    vault.fault(rule);
    (vault, admin, token)
}

/// Applies `fault` to writes of versions.
fn on_write(fault: Fault) -> FaultRule {
    FaultRule::new("kv/data/", fault).method("POST")
}

fn writes(vault: &VaultSim) -> usize {
    let requests = vault.requests();
    let is_write = |path: &str| path.starts_with("/v1/kv/data/");
    requests.iter().filter(|seen| is_write(&seen.path)).count()
}

async fn newest(admin: &Vault) -> u64 {
    let metadata = admin.find(&account("main"), &main_key()).await;
    metadata.unwrap().unwrap_or_default().current_version
}

#[tokio::test]
async fn version_written_although_the_response_was_lost_is_not_written_twice() {
    let (vault, admin, _token) = faulty(on_write(Fault::HalfBody).times(1)).await;
    // The admin cannot read the version to see whether it is the written one.
    let written = write(&admin, 1, 0).await;
    assert!(matches!(written, Err(WriteError::Unclear(_))));
    assert_eq!((newest(&admin).await, writes(&vault)), (1, 2));
    // The same if no attempt gets a complete response.
    vault.fault(on_write(Fault::HalfBody));
    let written = write(&admin, 2, 1).await;
    assert!(matches!(written, Err(WriteError::Unclear(_))));
    assert_eq!(newest(&admin).await, 2);
}

#[tokio::test]
async fn another_admins_version_is_not_mistaken_for_ours() {
    let (vault, admin, _token) = faulty(on_write(Fault::Close).times(1)).await;
    vault.put_secret("kv", &kv_path("main", "main"), json!({}));
    let stale = WriteError::Stale {
        expected: 0,
        found: 1,
    };
    let lost = WriteError::Unclear("cannot reach Vault".to_owned());
    assert_eq!(write(&admin, 1, 0).await, Err(lost));
    assert_eq!(write(&admin, 1, 0).await, Err(stale.clone()));
    assert_eq!(
        stale.to_string(),
        "someone else changed the key in Vault: the newest version was 0, now it is 1"
    );
    assert_eq!(newest(&admin).await, 1);
}

#[tokio::test]
async fn lost_write_is_retried() {
    for fault in [
        Fault::Close,
        Fault::NotJson,
        Fault::Status {
            code: 502,
            retry_after_s: None,
        },
    ] {
        let (_vault, admin, _token) = faulty(on_write(fault.clone()).times(2)).await;
        assert_eq!(write(&admin, 1, 0).await, Ok(1), "{fault:?}");
        assert_eq!(newest(&admin).await, 1, "{fault:?}");
    }
}

#[tokio::test]
async fn write_that_never_gets_a_response_is_reported_as_unclear() {
    let (vault, admin, _token) = faulty(on_write(Fault::Close)).await;
    let error = write(&admin, 1, 0).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the write may or may not have taken effect: cannot reach Vault"
    );
    assert_eq!((newest(&admin).await, writes(&vault)), (0, 3));
    vault.fault(FaultRule::new("kv/metadata/", Fault::Close));
    let error = write(&admin, 1, 0).await.unwrap_err();
    assert!(matches!(error, WriteError::Unclear(_)), "{error:?}");
}

#[tokio::test]
async fn write_that_vault_certainly_did_not_execute_is_not_retried() {
    let (vault, admin, _token) = faulty(on_write(Fault::Status {
        code: 503,
        retry_after_s: None,
    }))
    .await;
    let sealed = OutageKind::Sealed.outage("Vault is sealed or not initialised (503)");
    assert_eq!(write(&admin, 1, 0).await, Err(sealed.clone().into()));
    assert_eq!(writes(&vault), 1);
    vault.clear_faults();
    vault.deny(None, Some("POST"), "kv/data/*");
    assert_eq!(write(&admin, 1, 0).await, Err(VaultError::Denied.into()));
    vault.stop().await.unwrap();
    let unreachable = OutageKind::Unreachable.outage("cannot reach Vault");
    assert_eq!(write(&admin, 1, 0).await, Err(unreachable.into()));
}

#[tokio::test]
async fn metadata_change_whose_response_was_lost_is_checked_and_retried() {
    let on_metadata_write = |fault| FaultRule::new("kv/metadata/", fault).method("POST");
    for fault in [Fault::HalfBody, Fault::Close] {
        let (vault, admin, _token) = faulty(on_metadata_write(fault).times(1)).await;
        let path = kv_path("main", "main");
        vault.put_secret("kv", &path, json!({}));
        let owner = [("owner".to_owned(), "desk".to_owned())];
        vault.set_custom_metadata("kv", &path, owner.into());
        let metadata = note(&admin, &Notes::state(false)).await.unwrap();
        assert!(is_disabled(&metadata) && metadata.note("owner") == Some("desk"));
        vault.fault(on_metadata_write(Fault::Close));
        let error = note(&admin, &Notes::state(true)).await.unwrap_err();
        assert!(matches!(error, WriteError::Unclear(_)), "{error:?}");
    }
}

#[tokio::test]
async fn late_metadata_change_does_not_undo_another_admins_change() {
    let late = FaultRule::new("kv/metadata/", Fault::Delay { ms: 500 });
    let (vault, admin, _token) = faulty(late.method("POST").times(1)).await;
    let disabled = Notes::state(false);
    let other_admin = async {
        let is_in_flight = |seen: &Seen| seen.method == "POST" && seen.status.is_none();
        until("the first metadata change is in flight", async || {
            vault.requests().iter().any(is_in_flight)
        })
        .await;
        note(&admin, &Notes::hold(7, 7)).await.unwrap();
    };
    let (late, ()) = tokio::join!(note(&admin, &disabled), other_admin);
    let metadata = late.unwrap();
    assert!(is_disabled(&metadata));
    assert_eq!(metadata.use_version(), Some("7"));
}
