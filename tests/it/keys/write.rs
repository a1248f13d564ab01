//! What admins write to Vault, with the shipped policy: keys that they cannot read back, and notes about them.

use std::sync::Arc;
use std::time::Duration;

use credbroker::base::ids::{AccountId, KeyName};
use credbroker::base::secret::{ApiSecret, KeyValues, PartnerKey, Passphrase};
use credbroker::kucoin::KeyVersion;
use credbroker::telemetry::Metrics;
use credbroker::vault::{
    Auth, Metadata, NotedState, Notes, OutageKind, Registration, StoredFacts, Vault, VaultError,
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
    a_key_is_written_whole_and_only_on_top_of_the_version_that_was_seen
    a_missing_key_is_none_and_what_the_policy_forbids_is_an_error
    accounts_and_keys_are_listed_and_where_there_are_none_the_list_is_empty
    notes_are_changed_one_by_one_and_those_of_others_stay
    notes_are_kept_short_and_few_enough_for_vault
    two_who_note_something_at_once_both_see_it_kept
}

fn is_disabled(noted: &Metadata) -> bool {
    matches!(noted.state(), NotedState::Disabled(_))
}

/// A Vault with a mount that wants check-and-set, and an admin's way to it.
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
            let wanted = json!({ "policies": [name], "no_default_policy": true, "ttl": "1h" });
            let made = api.call("POST", "auth/token/create", wanted).await;
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

    /// What Vault holds in a version of the key `main/main`, past all policies.
    async fn held(&self, version: u64) -> Value {
        let Backend { api, name, .. } = &self.vault;
        let path = kv_path("main", "main");
        let path = format!("{name}/data/{path}?version={version}");
        api.call("GET", &path, Value::Null).await["data"]["data"].clone()
    }

    async fn clean_up(&self) {
        self.vault.clean_up().await;
    }
}

/// An admin who shows this token.
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

/// A made-up registration; its values need escapes in JSON, and none of them occurs anywhere else.
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
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("fake-"), "{shown}");
    }
    written
}

async fn note(admin: &Vault, changes: &Notes) -> Result<Metadata, WriteError> {
    admin.note(&account("main"), &main_key(), changes).await
}

async fn a_key_is_written_whole_and_only_on_top_of_the_version_that_was_seen(stage: &Stage) {
    assert_eq!(write(&stage.admin, 1, 0).await, Ok(1));
    let whole = json!({
        "api_key": "fake-id-1", "api_secret": "fake-secret\"\\-1",
        "passphrase": "fake-passphrase\u{1}\u{e4}\"\\-1", "key_version": "3",
        "uid": "1001", "site": "global", "permissions": "General,Spot",
        "registered_by": "spiffe://demo.test/admin/anna", "registered_at_ms": "1700000000000",
        "key_sha256": "fake-sha256-1",
    });
    assert_eq!(stage.held(1).await, whole);

    for stale in [0, 2] {
        let expected = WriteError::Stale {
            expected: stale,
            found: 1,
        };
        assert_eq!(write(&stage.admin, 2, stale).await, Err(expected));
    }
    assert_eq!(write(&stage.admin, 2, 1).await, Ok(2));
    assert_eq!(stage.held(2).await["partner_key"], "fake-partner\"\\-2");
    assert_eq!(stage.held(1).await, whole);
    let written = stage.admin.metadata(&account("main"), &main_key()).await;
    let written = written.unwrap();
    assert_eq!(written.current_version, 2);
    assert!(written.created(1).unwrap() < written.created(2).unwrap());

    // The broker makes a key of what was written.
    let Api { url, token, .. } = &stage.vault.api;
    let (broker, _token) = admin(url, &stage.vault.name, token);
    let key = broker.read(&account("main"), &main_key(), 2).await.unwrap();
    assert!(key.has_partner_key());
}

async fn a_missing_key_is_none_and_what_the_policy_forbids_is_an_error(stage: &Stage) {
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
    let (stranger, _token) = admin(url, &stage.vault.name, token);
    assert!(matches!(
        stranger.find(&account, &key).await,
        Err(VaultError::Outage(_) | VaultError::Denied)
    ));
    let written = write(&stranger, 2, 1).await;
    assert!(matches!(written, Err(WriteError::Vault(_))), "{written:?}");
    assert_eq!(stage.admin.accounts().await, Ok(vec![account.clone()]));
}

async fn accounts_and_keys_are_listed_and_where_there_are_none_the_list_is_empty(stage: &Stage) {
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

async fn notes_are_changed_one_by_one_and_those_of_others_stay(stage: &Stage) {
    let admin = &stage.admin;
    // Before there is any version.
    let noted = note(admin, &Notes::state(false)).await.unwrap();
    assert!(noted.current_version == 0 && is_disabled(&noted));
    assert_eq!(write(admin, 1, 0).await, Ok(1));

    let Backend { api, name, .. } = &stage.vault;
    let path = format!("{name}/metadata/{}", kv_path("main", "main"));
    // The last two are notes of older versions of this program.
    let owned = json!({
        "owner": "desk", "state": "disabled", "use_version": "7", "pending_version": "1", "pending_sha256": "ab",
    });
    api.call("POST", &path, json!({ "custom_metadata": owned }))
        .await;

    let registered = Notes::registered(1, &registration(1).facts);
    let noted = note(admin, &registered).await.unwrap();
    assert_eq!(noted.note("owner"), Some("desk"));
    assert!(is_disabled(&noted));
    assert_eq!(noted.use_version(), None);
    assert_eq!(noted.for_version(), Some(1));
    for old in ["pending_version", "pending_sha256"] {
        assert_eq!(noted.note(old), None);
    }
    assert_eq!(
        (noted.uid(), noted.key_sha256()),
        (Some("1001"), Some("fake-sha256-1"))
    );

    let noted = note(admin, &Notes::state(true)).await.unwrap();
    assert!(!is_disabled(&noted));
    let noted = note(admin, &Notes::hold(1, 1)).await.unwrap();
    assert_eq!(noted.use_version(), Some("1"));
    let before = api.call("GET", &path, Value::Null).await["data"].clone();
    note(admin, &Notes::hold(1, 1)).await.unwrap();
    let after = api.call("GET", &path, Value::Null).await["data"].clone();
    assert_eq!(before, after, "what is noted already is not written again");
    assert_eq!(after["custom_metadata"]["owner"], "desk");
}

async fn notes_are_kept_short_and_few_enough_for_vault(stage: &Stage) {
    let facts = StoredFacts {
        ip_whitelist: vec!["192.0.2.100".to_owned(); 100],
        registered_by: "anna\u{200b}\u{e4}".to_owned(),
        ..registration(1).facts
    };
    let noted = note(&stage.admin, &Notes::registered(1, &facts))
        .await
        .unwrap();
    assert_eq!(noted.note("ip_whitelist").map(str::len), Some(512));
    assert_eq!(noted.note("registered_by"), Some("anna??"));

    let many: serde_json::Map<_, _> = (0..64).map(|n| (format!("note-{n}"), json!("x"))).collect();
    let Backend { api, name, .. } = &stage.vault;
    let path = format!("{name}/metadata/{}", kv_path("main", "main"));
    api.call("POST", &path, json!({ "custom_metadata": many }))
        .await;
    let error = note(&stage.admin, &Notes::state(false)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "Vault refuses it: its custom metadata would have 65 entries, and Vault keeps 64; remove some that are not ours"
    );
}

async fn two_who_note_something_at_once_both_see_it_kept(stage: &Stage) {
    for version in 1..=10 {
        let (switched, using) = (
            Notes::state(version % 2 == 0),
            Notes::hold(version, version),
        );
        let (one, other) = tokio::join!(note(&stage.admin, &switched), note(&stage.admin, &using));
        one.unwrap();
        other.unwrap();
        let noted = stage
            .admin
            .metadata(&account("main"), &main_key())
            .await
            .unwrap();
        assert_eq!(is_disabled(&noted), version % 2 == 1);
        assert_eq!(noted.use_version(), Some(version.to_string().as_str()));
    }
}

/// A simulated Vault that fails as `rule` says, and an admin's way to it.
async fn faulty(rule: FaultRule) -> (VaultSim, Vault, TempDir) {
    let vault = VaultSim::start_dev(ROOT_TOKEN).await.unwrap();
    vault.mount_kv("kv");
    let (admin, token) = admin(&vault.address(), "kv", ROOT_TOKEN);
    vault.fault(rule);
    (vault, admin, token)
}

/// Hits what writes a version.
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
async fn a_version_that_arrived_though_its_answer_was_lost_is_not_written_twice() {
    let (vault, admin, _token) = faulty(on_write(Fault::HalfBody).times(1)).await;
    // The admin cannot read whose it is.
    let written = write(&admin, 1, 0).await;
    assert!(matches!(written, Err(WriteError::Unclear(_))));
    assert_eq!((newest(&admin).await, writes(&vault)), (1, 2));
    // Also when no answer comes at all.
    vault.fault(on_write(Fault::HalfBody));
    let written = write(&admin, 2, 1).await;
    assert!(matches!(written, Err(WriteError::Unclear(_))));
    assert_eq!(newest(&admin).await, 2);
}

#[tokio::test]
async fn a_version_that_is_somebody_elses_is_not_taken_for_ours() {
    let (vault, admin, _token) = faulty(on_write(Fault::Close).times(1)).await;
    vault.put_secret("kv", &kv_path("main", "main"), json!({}));
    let stale = WriteError::Stale {
        expected: 0,
        found: 1,
    };
    let lost = WriteError::Unclear("Vault cannot be reached".to_owned());
    assert_eq!(write(&admin, 1, 0).await, Err(lost));
    assert_eq!(write(&admin, 1, 0).await, Err(stale.clone()));
    assert_eq!(
        stale.to_string(),
        "somebody else has written this key meanwhile: version 0 was the newest one, now it is version 1"
    );
    assert_eq!(newest(&admin).await, 1);
}

#[tokio::test]
async fn a_write_that_is_lost_on_the_way_is_repeated() {
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
async fn a_write_that_never_gets_an_answer_may_yet_arrive() {
    let (vault, admin, _token) = faulty(on_write(Fault::Close)).await;
    let error = write(&admin, 1, 0).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "it is not known whether it was written: Vault cannot be reached"
    );
    assert_eq!((newest(&admin).await, writes(&vault)), (0, 3));
    vault.fault(FaultRule::new("kv/metadata/", Fault::Close));
    let error = write(&admin, 1, 0).await.unwrap_err();
    assert!(matches!(error, WriteError::Unclear(_)), "{error:?}");
}

#[tokio::test]
async fn a_vault_that_certainly_did_not_take_it_is_asked_once() {
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
    let away = OutageKind::Unreachable.outage("Vault cannot be reached");
    assert_eq!(write(&admin, 1, 0).await, Err(away.into()));
}

#[tokio::test]
async fn a_note_whose_answer_is_lost_is_looked_for_and_made_again() {
    let on_note = |fault| FaultRule::new("kv/metadata/", fault).method("POST");
    for fault in [Fault::HalfBody, Fault::Close] {
        let (vault, admin, _token) = faulty(on_note(fault).times(1)).await;
        let path = kv_path("main", "main");
        vault.put_secret("kv", &path, json!({}));
        let owner = [("owner".to_owned(), "desk".to_owned())];
        vault.set_custom_metadata("kv", &path, owner.into());
        let noted = note(&admin, &Notes::state(false)).await.unwrap();
        assert!(is_disabled(&noted) && noted.note("owner") == Some("desk"));
        vault.fault(on_note(Fault::Close));
        let error = note(&admin, &Notes::state(true)).await.unwrap_err();
        assert!(matches!(error, WriteError::Unclear(_)), "{error:?}");
    }
}

#[tokio::test]
async fn a_note_that_arrives_after_somebody_elses_does_not_undo_it() {
    let late = FaultRule::new("kv/metadata/", Fault::Delay { ms: 500 });
    let (vault, admin, _token) = faulty(late.method("POST").times(1)).await;
    let disabled = Notes::state(false);
    let others = async {
        let is_note = |seen: &Seen| seen.method == "POST" && seen.status.is_none();
        until("the first note is on its way", async || {
            vault.requests().iter().any(is_note)
        })
        .await;
        note(&admin, &Notes::hold(7, 7)).await.unwrap();
    };
    let (late, ()) = tokio::join!(note(&admin, &disabled), others);
    let noted = late.unwrap();
    assert!(is_disabled(&noted));
    assert_eq!(noted.use_version(), Some("7"));
}
