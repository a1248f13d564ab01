//! Changes in Vault take effect in the broker: new versions, evictions, restored keys, malformed secrets.

use std::collections::BTreeMap;

use credbroker::proto::Outcome;
use credbroker_sim::installation::{Settings, kv_path, secret};
use credbroker_sim::vault::{Fault, FaultRule};
use serde_json::{Value, json};

use super::{NO_ANSWER, Setup, count_responses, key, put, requests_for};
use crate::harness::{Lab, accounts, failure, spot_cancel_all, spot_order, until};

#[tokio::test]
async fn keys_are_read_at_start_and_calls_send_no_request_to_vault() {
    let mut setup = Setup::new(&["main", "other"]).await;
    setup.poll_s = 3600;
    let rig = setup.ready().await;
    let at_start = rig.vault().requests();
    for account in ["main", "other"] {
        let once = [
            ("GET metadata".to_owned(), Some(200)),
            ("GET data?version=1".to_owned(), Some(200)),
        ];
        assert_eq!(requests_for(rig.vault(), account), once);
    }
    assert_eq!(at_start.len(), 4, "{at_start:?}");
    for _ in 0..20 {
        for account in ["main", "other"] {
            assert_eq!(rig.signer(account).await, Ok(key(account, 1).api_key));
        }
    }
    assert_eq!(rig.vault().requests(), at_start);
    rig.end().await;
}

#[tokio::test]
async fn polls_read_only_metadata_while_nothing_changes() {
    let rig = Setup::new(&["main"]).await.ready().await;
    until("three polls have followed the first read", async || {
        requests_for(rig.vault(), "main").len() >= 5
    })
    .await;
    let data = requests_for(rig.vault(), "main").split_off(1).remove(0);
    assert_eq!(data, ("GET data?version=1".to_owned(), Some(200)));
    assert_eq!(
        count_responses(rig.vault(), "kv/data/kucoin/prod/main/main", 200),
        1
    );
    rig.end().await;
}

#[tokio::test]
async fn new_version_is_used_after_the_next_poll_without_a_failed_call() {
    let rig = Setup::new(&["main"]).await.ready().await;
    assert_eq!(rig.signer("main").await, Ok(key("main", 1).api_key));
    assert_eq!(put(rig.vault(), "main", 2), 2);
    rig.until_signed_with(2).await;
    let data: Vec<_> = requests_for(rig.vault(), "main")
        .into_iter()
        .filter(|(request, _)| request.starts_with("GET data"))
        .collect();
    let expected =
        ["GET data?version=1", "GET data?version=2"].map(|request| (request.to_owned(), Some(200)));
    assert_eq!(data, expected);
    rig.end().await;
}

#[tokio::test]
async fn deleted_version_evicts_the_key_and_the_previous_version_is_not_used() {
    let rig = Setup::new(&["main"]).await.ready().await;
    put(rig.vault(), "main", 2);
    rig.until_signed_with(2).await;
    rig.vault().delete_latest("kv", &kv_path("main", "main"));
    rig.until_evicted("Vault has no such key (404)").await;
    let metadata = "kv/metadata/kucoin/prod/main/main";
    let polls = count_responses(rig.vault(), metadata, 200);
    until("two more polls have passed", async || {
        assert!(rig.signer("main").await.is_err());
        count_responses(rig.vault(), metadata, 200) >= polls + 2
    })
    .await;
    put(rig.vault(), "main", 3);
    rig.until_restored(3).await;
    rig.end().await;
}

#[tokio::test]
async fn eviction_is_counted_only_if_a_key_was_loaded() {
    let setup = Setup::new(&["main"]).await;
    let path = kv_path("main", "main");
    setup.vault.delete_metadata("kv", &path);
    let rig = setup.start().await;
    let reason = "Vault has no such key (404)";
    rig.until_not_ready(reason).await;
    let counter = "vault_failures_total{reason=\"evicted\"}";
    assert_eq!(rig.lab.metric(counter).await, Some(0.0));
    put(rig.vault(), "main", 1);
    rig.until_restored(1).await;
    rig.vault().delete_metadata("kv", &path);
    rig.until_evicted(reason).await;
    assert_eq!(rig.lab.metric(counter).await, Some(1.0));
    rig.end().await;
}

#[tokio::test]
async fn key_with_state_disabled_in_metadata_is_evicted_until_state_is_active() {
    let rig = Setup::new(&["main"]).await.ready().await;
    let path = kv_path("main", "main");
    let state = |state: &str| BTreeMap::from([("state".to_owned(), state.to_owned())]);
    rig.vault()
        .set_custom_metadata("kv", &path, state("disabled"));
    rig.until_evicted("disabled in Vault (state=disabled in its custom metadata)")
        .await;
    // A new version does not enable it again.
    put(rig.vault(), "main", 2);
    let metadata = "kv/metadata/kucoin/prod/main/main";
    let polls = count_responses(rig.vault(), metadata, 200);
    until("two more polls have passed", async || {
        assert!(rig.signer("main").await.is_err());
        count_responses(rig.vault(), metadata, 200) >= polls + 2
    })
    .await;
    rig.vault()
        .set_custom_metadata("kv", &path, state("active"));
    rig.until_restored(2).await;
    rig.end().await;
}

#[tokio::test]
async fn each_disabling_state_value_evicts_the_key_in_any_letter_case() {
    let rig = Setup::new(&["main"]).await.ready().await;
    let path = kv_path("main", "main");
    for word in [
        "disable",
        "off",
        "revoked",
        "Disabled",
        "DISABLED",
        "Off",
        "REVOKED",
        " disabled ",
    ] {
        let metadata = |word: &str| BTreeMap::from([("state".to_owned(), word.to_owned())]);
        rig.vault().set_custom_metadata("kv", &path, metadata(word));
        let reason = format!(
            "disabled in Vault (state={} in its custom metadata)",
            word.trim()
        );
        rig.until_evicted(&reason).await;
        rig.vault()
            .set_custom_metadata("kv", &path, metadata("Active"));
        rig.until_restored(1).await;
    }
    rig.end().await;
}

#[tokio::test]
async fn unknown_state_value_rejects_only_risk_increasing_calls() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let path = kv_path("main", "main");
    let set = |word: &str| {
        let metadata = BTreeMap::from([("state".to_owned(), word.to_owned())]);
        lab.vault.set_custom_metadata("kv", &path, metadata);
    };
    for word in ["paused", "disabled?", "0", ""] {
        set(word);
        let expected = format!(
            "its custom metadata has state={word:?}, which is neither active nor disabled; risk-increasing requests \
             are refused"
        );
        until("readyz shows the unknown state", async || {
            lab.get("/readyz").await.1.contains(&expected)
        })
        .await;
        let status = bot.send(spot_order("never")).await.unwrap_err();
        assert_eq!(failure(&status).1, "KEY_UNAVAILABLE", "{status:?}");
        assert!(status.message().contains(&expected), "{status:?}");
        assert_eq!(
            bot.send(spot_cancel_all()).await.unwrap().outcome(),
            Outcome::Accepted
        );
        assert_eq!(
            bot.send(accounts()).await.unwrap().outcome(),
            Outcome::Accepted
        );
        // The status in `ListKeys`, with its reason.
        let (status, reasons) = super::succession::status(&lab).await;
        assert_eq!(status, "frozen", "{reasons:?}");
        assert!(reasons.iter().any(|reason| reason.contains(&expected)));
        assert_eq!(lab.get("/readyz").await.0, 200, "other keys still work");
        set("active");
        until("orders are accepted again", async || {
            let order = spot_order(&format!("again{}", word.len()));
            bot.clone().send(order).await.is_ok()
        })
        .await;
    }
    assert!(
        lab.kucoin
            .received()
            .iter()
            .all(|request| !String::from_utf8_lossy(&request.body).contains("never"))
    );
    lab.stop().await;
}

#[tokio::test]
async fn unknown_state_value_rejects_the_first_order_after_a_start() {
    let mut lab = Lab::install(Settings::default()).await;
    let metadata = BTreeMap::from([("state".to_owned(), "paused".to_owned())]);
    lab.vault
        .set_custom_metadata("kv", &kv_path("main", "main"), metadata);
    lab.start_broker().await;
    let mut bot = lab.patient_bot("maker").await;
    until("the key is read", async || {
        bot.clone().send(accounts()).await.is_ok()
    })
    .await;
    let status = bot.send(spot_order("never")).await.unwrap_err();
    assert_eq!(failure(&status).1, "KEY_UNAVAILABLE", "{status:?}");
    lab.stop().await;
}

#[tokio::test]
async fn key_disabled_before_the_start_is_never_read() {
    let setup = Setup::new(&["main", "other"]).await;
    let disabled = BTreeMap::from([("state".to_owned(), "disabled".to_owned())]);
    setup
        .vault
        .set_custom_metadata("kv", &kv_path("main", "main"), disabled);
    let rig = setup.ready().await;
    rig.until_evicted("disabled in Vault (state=disabled in its custom metadata)")
        .await;
    assert_eq!(rig.signer("other").await, Ok(key("other", 1).api_key));
    let is_read = |(request, _): &(String, _)| request.starts_with("GET data");
    assert!(!requests_for(rig.vault(), "main").iter().any(is_read));
    rig.end().await;
}

#[tokio::test]
async fn two_403s_with_a_valid_token_evict_the_key_until_access_is_restored() {
    let rig = Setup::new(&["main", "other"]).await.ready().await;
    let path = "kv/metadata/kucoin/prod/main/main";
    rig.vault().deny(None, None, path);
    rig.until_evicted("Vault denied the broker access (403); check the broker's Vault policy")
        .await;
    let denied = count_responses(rig.vault(), path, 403);
    let lookups = count_responses(rig.vault(), "auth/token/lookup-self", 200);
    assert!(
        denied >= 2 && lookups >= 2,
        "{denied} responses 403, {lookups} lookups"
    );
    // The other key stays in use.
    let (status, text) = rig.lab.get("/readyz").await;
    assert_eq!(status, 200);
    assert!(
        text.contains("key main/main: not available: Vault denied the broker access (403)"),
        "{text}"
    );
    assert_eq!(rig.signer("other").await, Ok(key("other", 1).api_key));
    rig.vault().remove_denial(None, None, path);
    rig.until_restored(1).await;
    rig.end().await;
}

#[tokio::test]
async fn a_single_403_evicts_nothing() {
    let rig = Setup::new(&["main"]).await.ready().await;
    let path = "kv/metadata/kucoin/prod/main/main";
    let polls = count_responses(rig.vault(), path, 200);
    rig.vault().fault(
        FaultRule::new(
            path,
            Fault::Status {
                code: 403,
                retry_after_s: None,
            },
        )
        .times(1),
    );
    rig.signs_until(1, "two polls have followed the 403", async || {
        count_responses(rig.vault(), path, 403) == 1
            && count_responses(rig.vault(), path, 200) >= polls + 2
    })
    .await;
    assert_eq!(rig.logs.count(&["key unavailable"]), 0);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    // The secret is not read again.
    assert_eq!(
        count_responses(rig.vault(), "kv/data/kucoin/prod/main/main", 200),
        1
    );
    rig.end().await;
}

/// Malformed secrets: account, secret in Vault, problem that the broker reports.
fn malformed() -> Vec<(&'static str, Value, &'static str)> {
    let with = |name: &str, value: Value| {
        let mut secret = secret(&key("main", 1));
        secret[name] = value;
        secret
    };
    vec![
        (
            "blank",
            with("api_secret", json!("simulated-secret-with-line-end\n")),
            "`api_secret` begins or ends with whitespace",
        ),
        (
            "lost",
            with("passphrase", Value::Null),
            "`passphrase` is missing",
        ),
        ("nothing", Value::Null, "`api_key` is missing"),
        (
            "list",
            with("api_secret", json!(["simulated-secret-in-a-list"])),
            "`api_secret` is not a string",
        ),
        (
            "old",
            with("key_version", json!(1)),
            "`key_version` must be 2 or 3",
        ),
    ]
}

#[tokio::test]
async fn malformed_secret_is_reported_with_its_field_but_not_its_value() {
    let accounts: Vec<_> = malformed()
        .iter()
        .map(|(account, ..)| *account)
        .chain(["main"])
        .collect();
    let setup = Setup::new(&accounts).await;
    for (account, secret, _) in malformed() {
        setup.vault.delete_metadata("kv", &kv_path(account, "main"));
        setup
            .vault
            .put_secret("kv", &kv_path(account, "main"), secret);
    }
    let rig = setup.ready().await;
    let (_, ready) = rig.lab.get("/readyz").await;
    for (account, _, problem) in malformed() {
        let reason = format!("version 1 in Vault is not a valid key: {problem}");
        let message = rig.signer(account).await.unwrap_err();
        assert_eq!(
            message,
            format!("the key of account {account} for this scope is not available: {reason}")
        );
        assert!(
            ready.contains(&format!("key {account}/main: not available: {reason}\n")),
            "{ready}"
        );
        assert_eq!(rig.logs.count(&["key unavailable", &reason]), 1);
    }
    assert!(!ready.contains("simulated"), "{ready}");
    assert_eq!(rig.logs.count(&["simulated-secret"]), 0);
    assert_eq!(rig.signer("main").await, Ok(key("main", 1).api_key));
    // An admin corrects one.
    put(rig.vault(), "nothing", 2);
    until("the corrected key signs", async || {
        rig.signer("nothing").await == Ok(key("nothing", 2).api_key)
    })
    .await;
    rig.end().await;
}

#[tokio::test]
async fn malformed_new_version_is_read_once_and_the_old_version_stays_in_use() {
    let rig = Setup::new(&["main"]).await.ready().await;
    let (metadata, path) = ("kv/metadata/kucoin/prod/main/main", kv_path("main", "main"));
    for (version, (_, secret, problem)) in (2..).zip(malformed()) {
        assert_eq!(rig.vault().put_secret("kv", &path, secret), version);
        let reason = format!("version {version} in Vault is not a valid key: {problem}");
        let line = [
            "new key version is unusable; still using the current one",
            reason.as_str(),
        ];
        rig.signs_until(1, &reason, async || rig.logs.count(&line) == 1)
            .await;
        let (status, ready) = rig.lab.get("/readyz").await;
        assert_eq!(status, 200);
        assert!(
            ready.contains(&format!(
                "using version 1 because of this problem: {reason}"
            )),
            "{ready}"
        );
    }
    let polls = count_responses(rig.vault(), metadata, 200);
    rig.signs_until(1, "two more polls have passed", async || {
        count_responses(rig.vault(), metadata, 200) >= polls + 2
    })
    .await;
    let reads = count_responses(rig.vault(), "kv/data/kucoin/prod/main/main", 200);
    assert_eq!(reads, 1 + malformed().len());
    put(rig.vault(), "main", 2);
    rig.until_signed_with(2).await;
    rig.end().await;
}
