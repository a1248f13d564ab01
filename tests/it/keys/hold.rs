//! What `keys rollback` holds in use: it shows everywhere, and once it is dead only what was written after it follows.

use std::collections::BTreeMap;

use credbroker_sim::installation::kv_path;
use credbroker_sim::kucoin::SimKey;
use serde_json::{Value, json};

use super::register::{Held, run};
use super::rotate::{known, rollback, rotate, signer, with_first_key};
use super::succession::{refresh, signed_by, status, until_version};
use crate::harness::{Lab, accounts, in_one_line, until};

/// What shows while version 1 is held and `newest` is the newest one.
fn told(newest: u64) -> String {
    format!(
        "held at version 1 by use_version in its custom metadata; version {newest} is not used. To use the newest version: \
         `credbroker keys rollback main --key main --newest`"
    )
}

/// Version 1 is held, and version 2 was the newest one when that began.
async fn with_hold() -> (Lab, [SimKey; 2], Held) {
    let (lab, first, held) = with_first_key().await;
    let second = known(&lab, 2);
    assert_eq!(rotate(&lab, &second).await.0, 0);
    let (code, said) = rollback(&lab, &[]).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(held.note("main", "use_version").await, "1");
    assert_eq!(held.note("main", "hold").await, "1 since 2");
    (lab, [first, second], held)
}

/// How many requests this key has signed.
fn uses(lab: &Lab, key: &SimKey) -> usize {
    signed_by(&lab.kucoin.everything_received(), key).len()
}

/// Waits until Vault has been polled a few more times.
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
async fn hold_and_its_end_show_in_list_readyz_and_doctor() {
    let (lab, [first, second], held) = with_hold().await;
    let third = known(&lab, 3);
    for newest in [2, 3] {
        if newest == 3 {
            lab.put_key("main", "main", &third);
            assert_eq!(refresh(&lab).await, 1);
        }
        let told = told(newest);
        let (code, said) = run(&lab, &["keys", "list"], &first, "").await;
        assert_eq!(code, 0, "{said}");
        assert!(said.contains(&told), "{said}");
        let (ready, text) = lab.get("/readyz").await;
        assert_eq!(ready, 200);
        assert!(text.contains(&format!("key main/main: {told}\n")), "{text}");
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
    let (code, said) = rollback(&lab, &["--newest"]).await;
    assert_eq!(code, 0, "{said}");
    assert!(!said.contains("held at version"), "{said}");
    assert_eq!(signer(&lab, &mut bot).await, third.api_key);
    for note in ["use_version", "hold"] {
        assert_eq!(held.note("main", note).await, Value::Null);
    }
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(!text.contains("held at version"), "{text}");
    let tests_of_second = uses(&lab, &second);
    until_polled(&lab).await;
    assert_eq!(uses(&lab, &second), tests_of_second);
}

#[tokio::test]
async fn registration_ends_the_hold() {
    let (lab, [first, _], held) = with_hold().await;
    let third = known(&lab, 3);
    let (code, said) = rotate(&lab, &third).await;
    assert_eq!(code, 0, "{said}");
    for note in ["use_version", "hold"] {
        assert_eq!(held.note("main", note).await, Value::Null);
    }
    let (_, said) = run(&lab, &["keys", "list"], &first, "").await;
    assert!(!said.contains("held at version"), "{said}");
}

#[tokio::test]
async fn version_written_after_the_hold_is_used_once_the_held_key_is_dead() {
    let (mut lab, [first, second], _) = with_hold().await;
    let third = known(&lab, 3);
    lab.put_key("main", "main", &third);
    let mut bot = lab.patient_bot("maker").await;
    until_polled(&lab).await;
    assert_eq!(signer(&lab, &mut bot).await, first.api_key);
    assert_eq!(uses(&lab, &third), 0, "the held key works");
    let uses_of_second = uses(&lab, &second);
    lab.kucoin.remove_key(&first.api_key);
    // It is the broker's first sign of that.
    bot.send(accounts()).await.unwrap();
    until_version(&lab, 3).await;
    assert_eq!(signer(&lab, &mut bot).await, third.api_key);
    let (_, reasons) = status(&lab).await;
    let held = "version 1, which is held in use, is refused: KuCoin does not know this API key.";
    assert!(
        reasons.iter().any(|reason| reason.contains(held)),
        "{reasons:?}"
    );
    let in_its_place = "version 3, written later, is used instead";
    assert!(
        reasons.iter().any(|reason| reason.contains(in_its_place)),
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
        (&json!(1), &json!(3), &json!("in_use"))
    );
    // The same after a restart, which begins with the version that is held.
    lab.stop().await;
    lab.start_broker().await;
    until_version(&lab, 3).await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(signer(&lab, &mut bot).await, third.api_key);
    assert_eq!(uses(&lab, &second), uses_of_second, "older than the hold");
    lab.stop().await;
}

#[tokio::test]
async fn version_from_before_the_hold_is_never_tried_and_the_way_out_is_named() {
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
    assert_eq!(reasons[0], told(2), "before the advice to register a key");
    let advice = answer.advice;
    assert!(!advice.is_empty());
    // A version after the hold that is no good changes nothing.
    lab.put_key("main", "main", &super::register::key(7, &["Spot"]));
    until_polled(&lab).await;
    assert_eq!(refresh(&lab).await, 1);
    let (_, reasons) = status(&lab).await;
    let refused = "version 3 was written after the hold began, and is refused: KuCoin does not know this API key.";
    assert!(
        reasons
            .iter()
            .any(|reason| in_one_line(reason).contains(refused)),
        "{reasons:?}"
    );
    assert_eq!(uses(&lab, &second), uses_of_second);
}

#[tokio::test]
async fn manual_use_version_never_falls_back_to_a_newer_version() {
    let (lab, first, _) = with_first_key().await;
    let second = known(&lab, 2);
    assert_eq!(rotate(&lab, &second).await.0, 0);
    let notes = BTreeMap::from([("use_version".to_owned(), "1".to_owned())]);
    lab.vault
        .set_custom_metadata("kv", &kv_path("main", "main"), notes);
    until_version(&lab, 1).await;
    let third = known(&lab, 3);
    lab.put_key("main", "main", &third);
    lab.kucoin.remove_key(&first.api_key);
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(bot.send(accounts()).await.unwrap().code, "400003");
    until_polled(&lab).await;
    assert_eq!(refresh(&lab).await, 1);
    assert_eq!(uses(&lab, &third), 0);
    let (_, reasons) = status(&lab).await;
    assert_eq!(reasons[0], told(3));
}
