//! A hold by `keys rollback` is shown everywhere; if KuCoin rejects the held key, only a version written after the hold replaces it.

use std::collections::BTreeMap;

use credbroker_sim::installation::kv_path;
use credbroker_sim::kucoin::SimKey;
use serde_json::{Value, json};

use super::register::{StoredKeys, run};
use super::rotate::{add_key_at_kucoin, rollback, rotate, signer, with_first_key};
use super::succession::{refresh, signed_by, status, until_version};
use crate::harness::{Lab, accounts, in_one_line, until};

/// The status text while version 1 is held and `newest` is the newest version.
fn hold_text(newest: u64) -> String {
    format!(
        "held at version 1 (use_version in the key's custom metadata); version {newest} is not used. To use the newest version: \
         `credbroker keys rollback main --key main --newest`"
    )
}

/// An installation where version 1 is held; version 2 was the newest when the hold began.
async fn with_hold() -> (Lab, [SimKey; 2], StoredKeys) {
    let (lab, first, stored) = with_first_key().await;
    let second = add_key_at_kucoin(&lab, 2);
    assert_eq!(rotate(&lab, &second).await.0, 0);
    let (code, output) = rollback(&lab, &[]).await;
    assert_eq!(code, 0, "{output}");
    assert_eq!(stored.note("main", "use_version").await, "1");
    assert_eq!(stored.note("main", "hold").await, "1 since 2");
    (lab, [first, second], stored)
}

/// The number of requests that this key has signed.
fn uses(lab: &Lab, key: &SimKey) -> usize {
    signed_by(&lab.kucoin.everything_received(), key).len()
}

/// Waits for a few more polls of Vault.
async fn until_polled(lab: &Lab) {
    let before = lab.vault.requests().len();
    until("more polls have passed", async || {
        lab.vault.requests().len() >= before + 8
    })
    .await;
}

async fn doctor(lab: &Lab) -> Vec<Value> {
    let text = lab.run(&["doctor", "--json"]).await.stdout;
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.collect()
}

#[tokio::test]
async fn hold_shows_in_list_readyz_and_doctor_until_it_ends() {
    let (lab, [first, second], stored) = with_hold().await;
    let third = add_key_at_kucoin(&lab, 3);
    for newest in [2, 3] {
        if newest == 3 {
            lab.put_key("main", "main", &third);
            assert_eq!(refresh(&lab).await, 1);
        }
        let expected = hold_text(newest);
        let (code, output) = run(&lab, &["keys", "list"], &first, "").await;
        assert_eq!(code, 0, "{output}");
        assert!(output.contains(&expected), "{output}");
        let (ready, text) = lab.get("/readyz").await;
        assert_eq!(ready, 200);
        assert!(
            text.contains(&format!("key main/main: {expected}\n")),
            "{text}"
        );
        let lines = doctor(&lab).await;
        let line = lines.iter().find(|line| {
            line["check"] == "vault main/main"
                && line["detail"]
                    .as_str()
                    .unwrap()
                    .starts_with("held at version 1 ")
        });
        let line = line.unwrap_or_else(|| panic!("{lines:#?}"));
        assert_eq!(line["status"], "warning");
        let detail = line["detail"].as_str().unwrap();
        assert!(
            detail.contains(&format!("version {newest} is not used")),
            "{detail}"
        );
        let fix = line["fix"].as_str().unwrap();
        assert!(
            fix.contains("credbroker keys rollback main --key main --newest"),
            "{fix}"
        );
    }
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(signer(&lab, &mut bot).await, first.api_key);
    let (code, output) = rollback(&lab, &["--newest"]).await;
    assert_eq!(code, 0, "{output}");
    assert!(!output.contains("held at version"), "{output}");
    assert_eq!(signer(&lab, &mut bot).await, third.api_key);
    for note in ["use_version", "hold"] {
        assert_eq!(stored.note("main", note).await, Value::Null);
    }
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(!text.contains("held at version"), "{text}");
    let tests_of_second = uses(&lab, &second);
    until_polled(&lab).await;
    assert_eq!(uses(&lab, &second), tests_of_second);
}

#[tokio::test]
async fn rotating_to_a_new_key_ends_the_hold() {
    let (lab, [first, _], stored) = with_hold().await;
    let third = add_key_at_kucoin(&lab, 3);
    let (code, output) = rotate(&lab, &third).await;
    assert_eq!(code, 0, "{output}");
    for note in ["use_version", "hold"] {
        assert_eq!(stored.note("main", note).await, Value::Null);
    }
    let (_, output) = run(&lab, &["keys", "list"], &first, "").await;
    assert!(!output.contains("held at version"), "{output}");
}

#[tokio::test]
async fn version_written_after_the_hold_is_used_once_the_held_key_is_rejected() {
    let (mut lab, [first, second], _) = with_hold().await;
    let third = add_key_at_kucoin(&lab, 3);
    lab.put_key("main", "main", &third);
    let mut bot = lab.patient_bot("maker").await;
    until_polled(&lab).await;
    assert_eq!(signer(&lab, &mut bot).await, first.api_key);
    assert_eq!(uses(&lab, &third), 0, "the held key works");
    let uses_of_second = uses(&lab, &second);
    lab.kucoin.remove_key(&first.api_key);
    // This call tells the broker that the key was deleted.
    bot.send(accounts()).await.unwrap();
    until_version(&lab, 3).await;
    assert_eq!(signer(&lab, &mut bot).await, third.api_key);
    let (_, reasons) = status(&lab).await;
    let rejected = "held version 1 was rejected: KuCoin reports that this API key does not exist.";
    assert!(
        reasons.iter().any(|reason| reason.contains(rejected)),
        "{reasons:?}"
    );
    let replacement =
        "selects version 1, but the broker cannot use that version now, and uses version 3.";
    assert!(
        reasons.iter().any(|reason| reason.contains(replacement)),
        "{reasons:?}"
    );
    let acts = lab.acts();
    let change = acts.iter().rfind(|act| act["action"] == "key").unwrap();
    assert_eq!(
        (
            &change["version_before"],
            &change["version_after"],
            &change["outcome"]
        ),
        (&json!(1), &json!(3), &json!("activated"))
    );
    // The same after a restart, which starts with the held version.
    lab.stop().await;
    lab.start_broker().await;
    until_version(&lab, 3).await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(signer(&lab, &mut bot).await, third.api_key);
    assert_eq!(
        uses(&lab, &second),
        uses_of_second,
        "version 2 is older than the hold"
    );
    lab.stop().await;
}

#[tokio::test]
async fn version_from_before_the_hold_is_never_used_and_the_fix_is_shown() {
    let (lab, [first, second], _) = with_hold().await;
    let mut bot = lab.patient_bot("maker").await;
    let uses_of_second = uses(&lab, &second);
    lab.kucoin.remove_key(&first.api_key);
    let answer = bot.send(accounts()).await.unwrap();
    assert_eq!(answer.code, "400003");
    until_polled(&lab).await;
    assert_eq!(refresh(&lab).await, 1);
    assert_eq!(uses(&lab, &second), uses_of_second);
    let (word, reasons) = status(&lab).await;
    assert_eq!(word, "refused", "{reasons:?}");
    assert_eq!(
        reasons[0],
        hold_text(2),
        "expected before the advice to register a key"
    );
    let advice = answer.advice;
    assert!(!advice.is_empty());
    // A rejected version written after the hold changes nothing.
    lab.put_key("main", "main", &super::register::key(7, &["Spot"]));
    until_polled(&lab).await;
    assert_eq!(refresh(&lab).await, 1);
    let (_, reasons) = status(&lab).await;
    let rejected = "version 3, written after the hold began, was rejected: KuCoin reports that this API key does not exist.";
    assert!(
        reasons
            .iter()
            .any(|reason| in_one_line(reason).contains(rejected)),
        "{reasons:?}"
    );
    assert_eq!(uses(&lab, &second), uses_of_second);
}

#[tokio::test]
async fn manual_use_version_never_falls_back_to_a_newer_version() {
    let (lab, first, _) = with_first_key().await;
    let second = add_key_at_kucoin(&lab, 2);
    assert_eq!(rotate(&lab, &second).await.0, 0);
    let metadata = BTreeMap::from([("use_version".to_owned(), "1".to_owned())]);
    lab.vault
        .set_custom_metadata("kv", &kv_path("main", "main"), metadata);
    until_version(&lab, 1).await;
    let third = add_key_at_kucoin(&lab, 3);
    lab.put_key("main", "main", &third);
    lab.kucoin.remove_key(&first.api_key);
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(bot.send(accounts()).await.unwrap().code, "400003");
    until_polled(&lab).await;
    assert_eq!(refresh(&lab).await, 1);
    assert_eq!(uses(&lab, &third), 0);
    let (_, reasons) = status(&lab).await;
    assert_eq!(reasons[0], hold_text(3));
}
