//! `keys rotate` and `keys rollback`, and the state after a killed registration.

use std::collections::BTreeMap;

use credbroker::proto::Outcome;
use credbroker_sim::installation::{MAIN_UID, Settings, kv_path};
use credbroker_sim::kucoin::{Fault as KucoinFault, FaultAction, SimKey, When};
use credbroker_sim::vault::{Fault, FaultRule};
use serde_json::{Value, json};

use super::register::{StoredKeys, is_hanging, lab, lines, matches_key, run, spawn};
use crate::harness::{Bot, Lab, Patient, accounts, spot_order, until};

const INFO: &str = "/api/v1/user/api-key";

const ALL_PERMISSIONS: &[&str] = &["Spot", "Margin", "Futures", "Unified"];

/// A key of account `main`.
fn key(number: u64) -> SimKey {
    SimKey {
        uid: MAIN_UID,
        ..super::register::key(number, ALL_PERMISSIONS)
    }
}

/// An installation where account `main` has its first key, registered with `keys register`.
pub(super) async fn with_first_key() -> (Lab, SimKey, StoredKeys) {
    let lab = lab(Settings {
        keys: vec![("other", "main", 1002)],
        wait_ready: false,
        ..Settings::default()
    })
    .await;
    let first = add_key_at_kucoin(&lab, 1);
    let (code, output) = run(&lab, &["keys", "register", "main"], &first, &lines(&first)).await;
    assert_eq!(code, 0, "{output}");
    let stored = StoredKeys::of(&lab);
    (lab, first, stored)
}

/// Creates a key at the simulated exchange.
pub(super) fn add_key_at_kucoin(lab: &Lab, number: u64) -> SimKey {
    let key = key(number);
    lab.kucoin.add_key(key.clone());
    key
}

pub(super) async fn rotate(lab: &Lab, key: &SimKey) -> (i32, String) {
    run(lab, &["keys", "rotate", "main"], key, &lines(key)).await
}

pub(super) async fn rollback(lab: &Lab, more: &[&str]) -> (i32, String) {
    let words = [&["keys", "rollback", "main"], more].concat();
    run(lab, &words, &key(1), "").await
}

/// The id of the key that signs for a bot now.
pub(super) async fn signer(lab: &Lab, bot: &mut Bot<Patient>) -> String {
    let answer = bot.send(accounts()).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
    let received = lab.kucoin.received();
    let key = received.last().unwrap().header("kc-api-key");
    key.unwrap().to_owned()
}

fn assert_contains_all(output: &str, parts: &[&str]) {
    for part in parts {
        assert!(output.contains(part), "{part:?} is not in {output}");
    }
}

#[tokio::test]
async fn rotate_returns_once_the_new_key_is_in_use_and_names_the_key_to_delete() {
    let (lab, first, stored) = with_first_key().await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(signer(&lab, &mut bot).await, first.api_key);
    let second = add_key_at_kucoin(&lab, 2);
    let (code, output) = rotate(&lab, &second).await;
    assert_eq!(code, 0, "{output}");
    let digest = stored.version("main", 1).await["key_sha256"].clone();
    let digest = &digest.as_str().unwrap()[..12];
    assert_contains_all(
        &output,
        &[
            "main/main: version 2 is in use, and KuCoin accepts its signatures. Version 1 no longer signs.",
            &format!(
                "next: once your bots work with the new key, delete the previous key (id SHA-256 {digest}…) on KuCoin's API Management page"
            ),
            "until then, `credbroker keys rollback main --key main` returns to it",
        ],
    );
    assert_eq!(signer(&lab, &mut bot).await, second.api_key);
    assert!(matches_key(&stored.version("main", 2).await, &second));
    assert_eq!(stored.note("main", "for_version").await, "2");
    lab.check_audit_log();
}

#[tokio::test]
async fn key_that_is_already_in_use_is_not_written_again() {
    let (lab, first, stored) = with_first_key().await;
    for command in ["rotate", "register"] {
        let (code, output) = run(&lab, &["keys", command, "main"], &first, &lines(&first)).await;
        assert_eq!(code, 0, "{output}");
        assert_contains_all(&output, &["not writing it again", "version 1 is in use"]);
        assert!(!output.contains("no longer signs"), "{output}");
    }
    assert_eq!(stored.newest("main").await, 1);
}

#[tokio::test]
async fn rotation_is_rejected_without_a_previous_key_or_to_another_kucoin_account() {
    let (lab, _, stored) = with_first_key().await;
    let other_uid = super::register::key(5, ALL_PERMISSIONS);
    lab.kucoin.add_key(other_uid.clone());
    let (code, output) = rotate(&lab, &other_uid).await;
    assert_eq!(code, 1, "{output}");
    assert_contains_all(
        &output,
        &[
            "The key belongs to KuCoin account 2005, but the previous key belongs to 1001: bots of main would trade on another KuCoin account.",
            "fix: Use a key of KuCoin account 1001. To change the KuCoin account on purpose, add --other-account.",
            "the key failed its test; nothing was stored. Version 1 of main/main stays in use.",
        ],
    );
    assert_eq!(stored.newest("main").await, 1);
    let words = ["keys", "rotate", "main", "--other-account"];
    let (code, output) = run(&lab, &words, &other_uid, &lines(&other_uid)).await;
    assert_eq!(code, 0, "{output}");
    assert_eq!(stored.note("main", "uid").await, "2005");

    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    let (code, output) = rotate(&lab, &other_uid).await;
    assert_eq!(code, 1, "{output}");
    assert_contains_all(
        &output,
        &[
            "Vault has no version of main/main to replace; nothing was stored",
            "fix: run `credbroker keys register main --key main` to register the first key",
        ],
    );
}

#[tokio::test]
async fn new_key_that_the_broker_rejects_leaves_the_previous_key_in_use() {
    let (lab, first, stored) = with_first_key().await;
    let mut bot = lab.patient_bot("maker").await;
    let second = add_key_at_kucoin(&lab, 2);
    // The key passes the command's test but is deleted before the broker tests it.
    let late = FaultRule::new("kv/data/kucoin/prod/main", Fault::Delay { ms: 2000 });
    lab.vault.fault(late.method("POST").times(1));
    let delete_key = async {
        until("the write is in flight", async || {
            is_hanging(&lab, "kv/data/")
        })
        .await;
        lab.kucoin.remove_key(&second.api_key);
    };
    let ((code, output), ()) = tokio::join!(rotate(&lab, &second), delete_key);
    assert_eq!(code, 1, "{output}");
    assert_contains_all(
        &output,
        &[
            "version 2 of main/main is in Vault, but the broker does not use it: ",
            "using version 1 because of this problem: version 2 was rejected: KuCoin reports that this API key does not exist.",
            "Version 1 stays in use.",
            "run `credbroker keys rollback main --key main`, so that the broker does not use this version when it restarts; then register another key",
        ],
    );
    assert_eq!(signer(&lab, &mut bot).await, first.api_key);
    let (code, output) = rollback(&lab, &[]).await;
    assert_eq!(code, 0, "{output}");
    assert_contains_all(&output, &["main/main: version 1 is in use (id SHA-256 "]);
    assert!(!output.contains("was rejected"), "{output}");
    assert_eq!(stored.note("main", "use_version").await, "1");
    // The next rotation ends the hold.
    let third = add_key_at_kucoin(&lab, 3);
    let (code, output) = rotate(&lab, &third).await;
    assert_eq!(code, 0, "{output}");
    assert_eq!(signer(&lab, &mut bot).await, third.api_key);
    assert_eq!(stored.note("main", "use_version").await, Value::Null);
}

#[tokio::test]
async fn rollback_and_return_to_newest_work_only_for_existing_versions() {
    let (lab, first, stored) = with_first_key().await;
    let mut bot = lab.patient_bot("maker").await;
    let (code, output) = rollback(&lab, &[]).await;
    assert_eq!(code, 1, "{output}");
    assert_contains_all(
        &output,
        &["Vault has no usable version before version 1; nothing was changed"],
    );
    let second = add_key_at_kucoin(&lab, 2);
    assert_eq!(rotate(&lab, &second).await.0, 0);
    let (code, output) = rollback(&lab, &[]).await;
    assert_eq!(code, 0, "{output}");
    assert_contains_all(
        &output,
        &[
            "main/main: version 1 is in use (id SHA-256 ",
            "Version 2 no longer signs.",
            "undo: `credbroker keys rollback main --key main --newest`, or register another key. Until then, the broker holds version 1: a new version written to Vault by hand is used only if KuCoin rejects version 1.",
        ],
    );
    assert_eq!(signer(&lab, &mut bot).await, first.api_key);
    let (code, output) = rollback(&lab, &["--newest"]).await;
    assert_eq!(code, 0, "{output}");
    assert_contains_all(
        &output,
        &[
            "main/main: version 2 is in use (id SHA-256 ",
            "Version 1 no longer signs.",
        ],
    );
    assert_eq!(signer(&lab, &mut bot).await, second.api_key);
    assert_eq!(stored.note("main", "use_version").await, Value::Null);

    // The newest version needs no hold, so there is nothing to undo.
    let (code, output) = rollback(&lab, &["--to", "2"]).await;
    assert_eq!(code, 0, "{output}");
    assert!(!output.contains("undo:"), "{output}");
    assert_eq!(stored.note("main", "use_version").await, Value::Null);

    let (code, output) = rollback(&lab, &["--to", "7"]).await;
    assert_eq!(code, 1, "{output}");
    assert_contains_all(
        &output,
        &[
            "Vault has no version 7: it never existed, or it was deleted or destroyed; nothing was changed",
            "fix: with --to, pass a different version that exists in Vault, or register another key with `credbroker keys register main --key main`",
        ],
    );
    // A version whose key was deleted at the exchange: the metadata are restored too.
    lab.kucoin.remove_key(&first.api_key);
    let (code, output) = rollback(&lab, &["--to", "1"]).await;
    assert_eq!(code, 1, "{output}");
    assert_contains_all(
        &output,
        &[
            "the broker did not switch to version 1 of main/main: version 1 was rejected: KuCoin reports that this API key does not exist.",
            "different KuCoin site than the account. Version 2 stays in use; the key's metadata in Vault is again as before this command",
        ],
    );
    assert_eq!(stored.note("main", "use_version").await, Value::Null);
    assert_eq!(signer(&lab, &mut bot).await, second.api_key);
    // A use_version that names a missing version can be removed.
    let missing = BTreeMap::from([("use_version".to_owned(), "9".to_owned())]);
    lab.vault
        .set_custom_metadata("kv", &kv_path("main", "main"), missing);
    let (code, output) = rollback(&lab, &[]).await;
    assert_eq!(code, 1, "{output}");
    assert_contains_all(&output, &["use_version=9, but Vault has no such version"]);
    let (code, output) = rollback(&lab, &["--newest"]).await;
    assert_eq!(code, 0, "{output}");
    assert_eq!(stored.note("main", "use_version").await, Value::Null);
}

/// The step at which a run is killed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step {
    /// The key is being tested at the exchange.
    Tested,
    /// The write of the version was sent.
    Writing,
    /// The version was written, but the response was lost.
    Written,
    /// The metadata update was sent.
    Noting,
    /// The broker is testing the new version.
    Used,
}

const STEPS: [Step; 5] = [
    Step::Tested,
    Step::Writing,
    Step::Written,
    Step::Noting,
    Step::Used,
];

/// Starts a run and kills it at a step.
async fn kill_at(lab: &Lab, step: Step, words: &[&str], key: &SimKey) {
    const DATA: &str = "kv/data/kucoin/prod/main";
    const METADATA: &str = "kv/metadata/kucoin/prod/main";
    let on = |path, fault| FaultRule::new(path, fault).method("POST");
    // A key test without a response stores nothing, however late the run is killed.
    let when = When::BeforeProcessing;
    let silence = KucoinFault {
        times: None,
        ..KucoinFault::once(INFO, FaultAction::Stall { when })
    };
    match step {
        Step::Tested => lab.kucoin.fault(silence.clone()),
        Step::Writing => lab.vault.fault(on(DATA, Fault::Hang)),
        Step::Written => {
            lab.vault.fault(on(DATA, Fault::HalfBody).times(1));
            lab.vault.fault(on(DATA, Fault::Hang));
        }
        Step::Noting | Step::Used => lab
            .vault
            .fault(on(DATA, Fault::Delay { ms: 2000 }).times(1)),
    }
    let before = lab.vault.requests().len();
    // Whether one more POST is waiting for a response after `answered` completed ones.
    let hangs = |path: &str, answered: usize| {
        let requests = lab.vault.requests();
        let path = format!("/v1/{path}");
        let posts: Vec<_> = requests[before..]
            .iter()
            .filter(|seen| seen.method == "POST" && seen.path.starts_with(&path))
            .collect();
        posts.len() == answered + 1 && posts[answered].status.is_none()
    };
    let mut running = spawn(lab, words, &lines(key));
    match step {
        Step::Tested => {
            until("the key is being tested", async || {
                let requests = lab.kucoin.everything_received();
                let signed = |request: &credbroker_sim::kucoin::ReceivedRequest| {
                    request.header("kc-api-key") == Some(&key.api_key)
                };
                requests.iter().any(signed)
            })
            .await;
        }
        Step::Writing | Step::Written => {
            until("the write hangs", async || {
                hangs(DATA, usize::from(step == Step::Written))
            })
            .await;
        }
        Step::Noting => {
            until("the version is being written", async || hangs(DATA, 0)).await;
            lab.vault.fault(on(METADATA, Fault::Hang));
            until("the metadata update hangs", async || hangs(METADATA, 0)).await;
        }
        Step::Used => {
            until("the version is being written", async || hangs(DATA, 0)).await;
            lab.kucoin.fault(silence);
            let stored = StoredKeys::of(lab);
            until("the metadata are updated", async || {
                stored.note("main", "uid").await != Value::Null
                    && !hangs(DATA, 0)
                    && stored.note("main", "for_version").await
                        == json!(stored.newest("main").await.to_string())
            })
            .await;
        }
    }
    // Sends SIGKILL.
    running.kill().unwrap();
    running.wait().unwrap();
    lab.vault.clear_faults();
    lab.kucoin.clear_faults();
}

async fn until_in_use(lab: &Lab, version: u32) {
    let name = "key_version{account=\"main\",key=\"main\"}";
    until(&format!("version {version} is in use"), async || {
        lab.metric(name).await == Some(f64::from(version))
    })
    .await;
}

#[tokio::test]
async fn killed_rotation_leaves_the_old_or_new_key_and_the_next_run_reports_which() {
    let (lab, first, stored) = with_first_key().await;
    let mut bot = lab.patient_bot("maker").await;
    let (mut current, mut newest, mut number) = (first, 1, 1);
    for step in STEPS {
        number += 1;
        let next = add_key_at_kucoin(&lab, number);
        kill_at(&lab, step, &["keys", "rotate", "main"], &next).await;
        // Vault has either version, completely.
        let is_written = matches!(step, Step::Written | Step::Noting | Step::Used);
        let (expected, version) = if is_written {
            (&next, newest + 1)
        } else {
            (&current, newest)
        };
        assert_eq!(stored.newest("main").await, version, "{step:?}");
        assert!(
            matches_key(&stored.version("main", version).await, expected),
            "{step:?}"
        );
        // No call of a bot fails.
        let signing = signer(&lab, &mut bot).await;
        assert!(
            signing == current.api_key || signing == next.api_key,
            "{step:?}"
        );
        let order = spot_order(&format!("killed-{number}"));
        let answer = bot.send(order).await.unwrap();
        assert_eq!(answer.outcome(), Outcome::Accepted, "{step:?} {answer:?}");
        until_in_use(&lab, u32::try_from(version).unwrap()).await;
        assert_eq!(signer(&lab, &mut bot).await, expected.api_key, "{step:?}");

        let (code, output) = rotate(&lab, &next).await;
        assert_eq!(code, 0, "{step:?}: {output}");
        let note = match step {
            Step::Tested | Step::Writing | Step::Used => None,
            Step::Written | Step::Noting => Some(format!(
                "note: the metadata in Vault does not describe version {version} of main/main: a previous run was interrupted"
            )),
        };
        match &note {
            Some(note) => assert_contains_all(
                &output,
                &[
                    note,
                    "The broker uses this version (id SHA-256 ",
                    "Enter the same key to complete its registration, or a different key to replace it.",
                    "not writing it again",
                ],
            ),
            None => assert!(
                !output.contains("a previous run was interrupted"),
                "{step:?}: {output}"
            ),
        }
        // The interrupted run is completed if the key was already written; otherwise the key is written now.
        newest = match step {
            Step::Written | Step::Noting | Step::Used => version,
            Step::Tested | Step::Writing => version + 1,
        };
        assert_eq!(stored.newest("main").await, newest, "{step:?}: {output}");
        assert_eq!(stored.note("main", "for_version").await, newest.to_string());
        assert_eq!(signer(&lab, &mut bot).await, next.api_key, "{step:?}");
        lab.kucoin.remove_key(&current.api_key);
        current = next;
    }
    lab.check_audit_log();
}

#[tokio::test]
async fn killed_first_registration_leaves_no_key_or_the_new_one_and_can_be_rerun() {
    for step in STEPS {
        let lab = lab(Settings {
            keys: vec![("other", "main", 1002)],
            wait_ready: false,
            ..Settings::default()
        })
        .await;
        let stored = StoredKeys::of(&lab);
        let (first, second) = (add_key_at_kucoin(&lab, 1), add_key_at_kucoin(&lab, 2));
        kill_at(&lab, step, &["keys", "register", "main"], &first).await;
        let is_written = matches!(step, Step::Written | Step::Noting | Step::Used);
        assert_eq!(
            stored.newest("main").await,
            u64::from(is_written),
            "{step:?}"
        );
        if is_written {
            assert!(
                matches_key(&stored.version("main", 1).await, &first),
                "{step:?}"
            );
            until_in_use(&lab, 1).await;
        }
        // Another admin registers another key of the same account.
        let (code, output) = run(
            &lab,
            &["keys", "register", "main"],
            &second,
            &lines(&second),
        )
        .await;
        assert_eq!(code, 0, "{step:?}: {output}");
        match step {
            Step::Tested | Step::Writing | Step::Used => {
                assert!(
                    !output.contains("a previous run was interrupted"),
                    "{step:?}: {output}"
                );
            }
            Step::Written | Step::Noting => {
                let note = "note: the metadata in Vault does not describe version 1 of main/main: a previous";
                assert_contains_all(
                    &output,
                    &[note, "The broker uses this version (id SHA-256 "],
                );
            }
        }
        let version = 1 + u64::from(is_written);
        assert!(
            matches_key(&stored.version("main", version).await, &second),
            "{step:?}"
        );
        assert_contains_all(
            &output,
            &[&format!("main/main: version {version} is in use")],
        );
    }
}

#[tokio::test]
async fn rotate_reports_that_another_admin_replaced_the_key_before_it_was_in_use() {
    let (lab, _, stored) = with_first_key().await;
    let (second, third) = (add_key_at_kucoin(&lab, 2), add_key_at_kucoin(&lab, 3));
    // The command's own test passes; the broker's test of the version in Vault takes long.
    let slow = FaultAction::Delay { ms: 3000 };
    lab.kucoin.fault(KucoinFault {
        skip: 1,
        ..KucoinFault::once(INFO, slow)
    });
    let other_admin = async {
        until("the first version is written", async || {
            stored.note("main", "for_version").await == "2"
        })
        .await;
        lab.put_key("main", "main", &third);
    };
    let ((code, output), ()) = tokio::join!(rotate(&lab, &second), other_admin);
    assert_eq!(code, 1, "{output}");
    assert_contains_all(
        &output,
        &[
            "version 2 of main/main is in Vault, but somebody else wrote version 3 after it, and the broker uses that one",
            "fix: find out who else registers keys for this account; if your key is the right one, re-run the command",
        ],
    );
}

#[tokio::test]
async fn version_written_by_another_admin_during_a_rotation_is_not_replaced() {
    let (lab, _, stored) = with_first_key().await;
    let (second, third) = (add_key_at_kucoin(&lab, 2), add_key_at_kucoin(&lab, 3));
    let late = FaultRule::new("kv/data/kucoin/prod/main", Fault::Delay { ms: 2000 });
    lab.vault.fault(late.method("POST").times(1));
    let other_admin = async {
        until("the write is in flight", async || {
            is_hanging(&lab, "kv/data/")
        })
        .await;
        lab.put_key("main", "main", &third);
    };
    let ((code, output), ()) = tokio::join!(rotate(&lab, &second), other_admin);
    assert_eq!(code, 1, "{output}");
    assert_contains_all(
        &output,
        &[
            "someone else changed the key in Vault: the newest version was 1, now it is 2; nothing was stored",
            "fix: find out who else registers keys for this account; then re-run the command",
        ],
    );
    let version = stored.version("main", 2).await;
    assert_eq!(version["api_key"], third.api_key.as_str());
}

/// Makes writes of a version fail with `fault`: the request or its response is lost.
fn lose(lab: &Lab, fault: Fault, times: Option<u32>) {
    let rule = FaultRule::new("kv/data/kucoin/prod/main", fault).method("POST");
    lab.vault.fault(match times {
        Some(times) => rule.times(times),
        None => rule,
    });
}

#[tokio::test]
async fn version_written_although_vaults_response_was_lost_is_recognized_and_used() {
    let (lab, _, stored) = with_first_key().await;
    for (number, times) in [(2, Some(1)), (3, None)] {
        let next = add_key_at_kucoin(&lab, number);
        lose(&lab, Fault::HalfBody, times);
        let (code, output) = rotate(&lab, &next).await;
        lab.vault.clear_faults();
        assert_eq!(code, 0, "{output}");
        assert_contains_all(
            &output,
            &[&format!("main/main: version {number} is in use")],
        );
        assert_eq!(stored.newest("main").await, number);
        assert!(matches_key(&stored.version("main", number).await, &next));
        assert_eq!(stored.note("main", "for_version").await, number.to_string());
    }
}

#[tokio::test]
async fn another_admins_version_is_not_mistaken_for_a_write_whose_response_was_lost() {
    let (lab, _, stored) = with_first_key().await;
    let (second, third) = (add_key_at_kucoin(&lab, 2), add_key_at_kucoin(&lab, 3));
    lose(&lab, Fault::Close, None);
    let before = lab.vault.requests().len();
    let other_admin = async {
        until("the write was sent", async || {
            let requests = lab.vault.requests();
            let mut recent = requests[before..].iter();
            recent.any(|seen| seen.method == "POST" && seen.path.starts_with("/v1/kv/data/"))
        })
        .await;
        lab.put_key("main", "main", &third);
    };
    let ((code, output), ()) = tokio::join!(rotate(&lab, &second), other_admin);
    assert_eq!(code, 1, "{output}");
    assert_contains_all(
        &output,
        &[
            "someone else changed the key in Vault: the newest version was 1, now it is 2; nothing was stored",
            "fix: find out who else registers keys for this account; then re-run the command",
        ],
    );
    assert_eq!(stored.newest("main").await, 2);
    assert_eq!(stored.note("main", "for_version").await, "1");
}

#[tokio::test]
async fn late_write_is_reported_as_unclear_and_completed_by_the_next_run() {
    let (lab, first, stored) = with_first_key().await;
    let mut bot = lab.patient_bot("maker").await;
    let second = add_key_at_kucoin(&lab, 2);
    lose(&lab, Fault::Close, None);
    let (code, output) = rotate(&lab, &second).await;
    lab.vault.clear_faults();
    assert_eq!(code, 1, "{output}");
    assert_contains_all(
        &output,
        &[
            "the write may or may not have taken effect: cannot reach Vault. Vault may hold the new key as version 2. Version 1 of main/main stays in use. If the new version appears in Vault later, the broker does not use it until KuCoin accepts its signatures.",
            "fix: re-run the command once Vault is reachable; it reports which key Vault holds, and continues",
        ],
    );
    assert_eq!(stored.newest("main").await, 1);
    assert_eq!(signer(&lab, &mut bot).await, first.api_key);
    lab.put_key("main", "main", &second);
    until_in_use(&lab, 2).await;
    let (code, output) = rotate(&lab, &second).await;
    assert_eq!(code, 0, "{output}");
    assert_contains_all(
        &output,
        &[
            "the metadata in Vault does not describe version 2 of main/main: a previous",
            "not writing it again",
        ],
    );
    assert_eq!(stored.newest("main").await, 2);
    assert_eq!(stored.note("main", "for_version").await, "2");
}
