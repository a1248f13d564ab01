//! What Vault says about a key, the broker does: new versions, evictions, returns, secrets that are no keys.

use std::collections::BTreeMap;

use credbroker::proto::Outcome;
use credbroker_sim::installation::{Settings, kv_path, secret};
use credbroker_sim::vault::{Fault, FaultRule};
use serde_json::{Value, json};

use super::{NO_ANSWER, Setup, answered, asked, key, put};
use crate::harness::{Lab, accounts, failure, spot_cancel_all, spot_order, until};

#[tokio::test]
async fn keys_are_read_at_start_and_no_call_of_a_bot_asks_vault() {
    let mut setup = Setup::new(&["main", "other"]).await;
    setup.poll_s = 3600;
    let rig = setup.ready().await;
    let at_start = rig.vault().requests();
    for account in ["main", "other"] {
        let once = [
            ("GET metadata".to_owned(), Some(200)),
            ("GET data?version=1".to_owned(), Some(200)),
        ];
        assert_eq!(asked(rig.vault(), account), once);
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
        asked(rig.vault(), "main").len() >= 5
    })
    .await;
    let data = asked(rig.vault(), "main").split_off(1).remove(0);
    assert_eq!(data, ("GET data?version=1".to_owned(), Some(200)));
    assert_eq!(
        answered(rig.vault(), "kv/data/kucoin/prod/main/main", 200),
        1
    );
    rig.end().await;
}

#[tokio::test]
async fn a_new_version_is_used_after_the_next_poll_and_no_call_fails_meanwhile() {
    let rig = Setup::new(&["main"]).await.ready().await;
    assert_eq!(rig.signer("main").await, Ok(key("main", 1).api_key));
    assert_eq!(put(rig.vault(), "main", 2), 2);
    rig.until_signed_with(2).await;
    let data: Vec<_> = asked(rig.vault(), "main")
        .into_iter()
        .filter(|(asked, _)| asked.starts_with("GET data"))
        .collect();
    let expected =
        ["GET data?version=1", "GET data?version=2"].map(|asked| (asked.to_owned(), Some(200)));
    assert_eq!(data, expected);
    rig.end().await;
}

#[tokio::test]
async fn a_deleted_version_evicts_the_key_and_never_brings_the_one_before_it_back() {
    let rig = Setup::new(&["main"]).await.ready().await;
    put(rig.vault(), "main", 2);
    rig.until_signed_with(2).await;
    rig.vault().delete_latest("kv", &kv_path("main", "main"));
    rig.until_evicted("Vault has no such key (404)").await;
    let metadata = "kv/metadata/kucoin/prod/main/main";
    let polls = answered(rig.vault(), metadata, 200);
    until("two more polls have passed", async || {
        assert!(rig.signer("main").await.is_err());
        answered(rig.vault(), metadata, 200) >= polls + 2
    })
    .await;
    put(rig.vault(), "main", 3);
    rig.until_restored(3).await;
    rig.end().await;
}

#[tokio::test]
async fn a_key_that_its_metadata_disables_is_evicted_until_they_say_active() {
    let rig = Setup::new(&["main"]).await.ready().await;
    let path = kv_path("main", "main");
    let state = |state: &str| BTreeMap::from([("state".to_owned(), state.to_owned())]);
    rig.vault()
        .set_custom_metadata("kv", &path, state("disabled"));
    rig.until_evicted("its metadata in Vault says state=disabled")
        .await;
    // A new version does not switch it on again.
    put(rig.vault(), "main", 2);
    let metadata = "kv/metadata/kucoin/prod/main/main";
    let polls = answered(rig.vault(), metadata, 200);
    until("two more polls have passed", async || {
        assert!(rig.signer("main").await.is_err());
        answered(rig.vault(), metadata, 200) >= polls + 2
    })
    .await;
    rig.vault()
        .set_custom_metadata("kv", &path, state("active"));
    rig.until_restored(2).await;
    rig.end().await;
}

#[tokio::test]
async fn every_word_for_off_evicts_the_key_in_any_case() {
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
        let note = |word: &str| BTreeMap::from([("state".to_owned(), word.to_owned())]);
        rig.vault().set_custom_metadata("kv", &path, note(word));
        let told = format!("its metadata in Vault says state={}", word.trim());
        rig.until_evicted(&told).await;
        rig.vault().set_custom_metadata("kv", &path, note("Active"));
        rig.until_restored(1).await;
    }
    rig.end().await;
}

#[tokio::test]
async fn unknown_state_word_refuses_risk_increasing_calls_only() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let path = kv_path("main", "main");
    let set = |word: &str| {
        let note = BTreeMap::from([("state".to_owned(), word.to_owned())]);
        lab.vault.set_custom_metadata("kv", &path, note);
    };
    for word in ["paused", "disabled?", "0", ""] {
        set(word);
        let told = format!(
            "its custom metadata says state={word:?}, which is neither active nor disabled; risk-increasing requests \
             are refused"
        );
        until("a new order is refused", async || {
            lab.get("/readyz").await.1.contains(&told)
        })
        .await;
        let status = bot.send(spot_order("never")).await.unwrap_err();
        assert_eq!(failure(&status).1, "KEY_UNAVAILABLE", "{status:?}");
        assert!(status.message().contains(&told), "{status:?}");
        assert_eq!(
            bot.send(spot_cancel_all()).await.unwrap().outcome(),
            Outcome::Accepted
        );
        assert_eq!(
            bot.send(accounts()).await.unwrap().outcome(),
            Outcome::Accepted
        );
        // One word for it in the list and the metric, and its sentence.
        let (status, reasons) = super::succession::status(&lab).await;
        assert_eq!(status, "frozen", "{reasons:?}");
        assert!(reasons.iter().any(|reason| reason.contains(&told)));
        assert_eq!(lab.get("/readyz").await.0, 200, "others still trade");
        set("active");
        until("orders go again", async || {
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
async fn unknown_state_word_is_known_before_the_first_order_after_a_start() {
    let mut lab = Lab::install(Settings::default()).await;
    let note = BTreeMap::from([("state".to_owned(), "paused".to_owned())]);
    lab.vault
        .set_custom_metadata("kv", &kv_path("main", "main"), note);
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
async fn a_key_that_is_disabled_from_the_start_is_never_read() {
    let setup = Setup::new(&["main", "other"]).await;
    let disabled = BTreeMap::from([("state".to_owned(), "disabled".to_owned())]);
    setup
        .vault
        .set_custom_metadata("kv", &kv_path("main", "main"), disabled);
    let rig = setup.ready().await;
    rig.until_evicted("its metadata in Vault says state=disabled")
        .await;
    assert_eq!(rig.signer("other").await, Ok(key("other", 1).api_key));
    let data = |(asked, _): &(String, _)| asked.starts_with("GET data");
    assert!(!asked(rig.vault(), "main").iter().any(data));
    rig.end().await;
}

#[tokio::test]
async fn two_403_to_a_token_that_vault_accepts_evict_the_key_until_vault_allows_it_again() {
    let rig = Setup::new(&["main", "other"]).await.ready().await;
    let path = "kv/metadata/kucoin/prod/main/main";
    rig.vault().deny(None, None, path);
    rig.until_evicted("Vault refuses it to the broker (403); check the broker's policy")
        .await;
    let refused = answered(rig.vault(), path, 403);
    let lookups = answered(rig.vault(), "auth/token/lookup-self", 200);
    assert!(
        refused >= 2 && lookups >= 2,
        "{refused} times 403, {lookups} lookups"
    );
    // One key that Vault refuses does not take the others down.
    let (status, text) = rig.lab.get("/readyz").await;
    assert_eq!(status, 200);
    assert!(
        text.contains("key main/main: not available: Vault refuses it to the broker (403)"),
        "{text}"
    );
    assert_eq!(rig.signer("other").await, Ok(key("other", 1).api_key));
    rig.vault().allow_again(None, None, path);
    rig.until_restored(1).await;
    rig.end().await;
}

#[tokio::test]
async fn a_single_403_evicts_nothing() {
    let rig = Setup::new(&["main"]).await.ready().await;
    let path = "kv/metadata/kucoin/prod/main/main";
    let polls = answered(rig.vault(), path, 200);
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
    rig.serves_until(1, "two polls have followed the 403", async || {
        answered(rig.vault(), path, 403) == 1 && answered(rig.vault(), path, 200) >= polls + 2
    })
    .await;
    assert_eq!(rig.logs.count(&["key unavailable"]), 0);
    assert_eq!(rig.logs.count(&[NO_ANSWER]), 0);
    // It is no change either.
    assert_eq!(
        answered(rig.vault(), "kv/data/kucoin/prod/main/main", 200),
        1
    );
    rig.end().await;
}

/// Secrets that are no key: the name of the account, what Vault holds, what the broker says of it.
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
            "`api_secret` begins or ends with a blank",
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
            "`api_secret` is not text",
        ),
        (
            "old",
            with("key_version", json!(1)),
            "`key_version` is neither 2 nor 3",
        ),
    ]
}

#[tokio::test]
async fn a_secret_that_is_no_key_is_named_with_its_field_and_without_its_value() {
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
        let reason = format!("version 1 in Vault: {problem}");
        let told = rig.signer(account).await.unwrap_err();
        assert_eq!(
            told,
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
async fn a_malformed_new_version_leaves_the_old_key_in_memory_and_is_read_only_once() {
    let rig = Setup::new(&["main"]).await.ready().await;
    let (metadata, path) = ("kv/metadata/kucoin/prod/main/main", kv_path("main", "main"));
    for (version, (_, secret, problem)) in (2..).zip(malformed()) {
        assert_eq!(rig.vault().put_secret("kv", &path, secret), version);
        let reason = format!("version {version} in Vault: {problem}");
        let line = [
            "new key version is unusable; keeping current",
            reason.as_str(),
        ];
        rig.serves_until(1, &reason, async || rig.logs.count(&line) == 1)
            .await;
        let (status, ready) = rig.lab.get("/readyz").await;
        assert_eq!(status, 200);
        assert!(
            ready.contains(&format!("using version 1: {reason}")),
            "{ready}"
        );
    }
    let polls = answered(rig.vault(), metadata, 200);
    rig.serves_until(1, "two more polls have passed", async || {
        answered(rig.vault(), metadata, 200) >= polls + 2
    })
    .await;
    let reads = answered(rig.vault(), "kv/data/kucoin/prod/main/main", 200);
    assert_eq!(reads, 1 + malformed().len());
    put(rig.vault(), "main", 2);
    rig.until_signed_with(2).await;
    rig.end().await;
}
