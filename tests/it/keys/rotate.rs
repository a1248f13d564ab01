//! `keys rotate` and `keys rollback`, and what a registration leaves behind that is killed half-way.

use std::collections::BTreeMap;

use credbroker::proto::Outcome;
use credbroker_sim::installation::{MAIN_UID, Settings, kv_path};
use credbroker_sim::kucoin::{Fault as Trouble, FaultAction, SimKey, When};
use credbroker_sim::vault::{Fault, FaultRule};
use serde_json::{Value, json};

use super::register::{Held, is, is_hanging, lab, lines, run, spawn};
use crate::harness::{Bot, Lab, Patient, accounts, spot_order, until};

const INFO: &str = "/api/v1/user/api-key";

const EVERYTHING: &[&str] = &["Spot", "Margin", "Futures", "Unified"];

/// A key of account `main`, which bots use while the tests run.
fn key(number: u64) -> SimKey {
    SimKey {
        uid: MAIN_UID,
        ..super::register::key(number, EVERYTHING)
    }
}

/// Account `main` has its first key, registered as it should be.
pub(super) async fn with_first_key() -> (Lab, SimKey, Held) {
    let lab = lab(Settings {
        keys: vec![("other", "main", 1002)],
        wait_ready: false,
        ..Settings::default()
    })
    .await;
    let first = known(&lab, 1);
    let (code, said) = run(&lab, &["keys", "register", "main"], &first, &lines(&first)).await;
    assert_eq!(code, 0, "{said}");
    let held = Held::of(&lab);
    (lab, first, held)
}

/// A key that the exchange knows.
pub(super) fn known(lab: &Lab, number: u64) -> SimKey {
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

/// The key that signs for a bot now.
pub(super) async fn signer(lab: &Lab, bot: &mut Bot<Patient>) -> String {
    let answer = bot.send(accounts()).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
    let received = lab.kucoin.received();
    let key = received.last().unwrap().header("kc-api-key");
    key.unwrap().to_owned()
}

fn holds_all(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}

#[tokio::test]
async fn a_rotation_ends_once_the_new_key_signs_and_says_what_to_delete() {
    let (lab, first, held) = with_first_key().await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(signer(&lab, &mut bot).await, first.api_key);
    let second = known(&lab, 2);
    let (code, said) = rotate(&lab, &second).await;
    assert_eq!(code, 0, "{said}");
    let digest = held.version("main", 1).await["key_sha256"].clone();
    let digest = &digest.as_str().unwrap()[..12];
    holds_all(
        &said,
        &[
            "main/main: version 2 is in use, and KuCoin accepts its signatures. Version 1 signs no more.",
            &format!(
                "next: delete the key before it (id SHA-256 {digest}…) on KuCoin's page under API Management"
            ),
            "`credbroker keys rollback main --key main` does that as long as it exists",
        ],
    );
    assert_eq!(signer(&lab, &mut bot).await, second.api_key);
    assert!(is(&held.version("main", 2).await, &second));
    assert_eq!(held.note("main", "for_version").await, "2");
    lab.check_record();
}

#[tokio::test]
async fn the_key_that_is_in_use_is_not_written_again() {
    let (lab, first, held) = with_first_key().await;
    for command in ["rotate", "register"] {
        let (code, said) = run(&lab, &["keys", command, "main"], &first, &lines(&first)).await;
        assert_eq!(code, 0, "{said}");
        holds_all(&said, &["it is not written again", "version 1 is in use"]);
        assert!(!said.contains("signs no more"), "{said}");
    }
    assert_eq!(held.newest("main").await, 1);
}

#[tokio::test]
async fn a_rotation_without_a_key_or_to_another_account_is_refused() {
    let (lab, _, held) = with_first_key().await;
    let stranger = super::register::key(5, EVERYTHING);
    lab.kucoin.add_key(stranger.clone());
    let (code, said) = rotate(&lab, &stranger).await;
    assert_eq!(code, 1, "{said}");
    holds_all(
        &said,
        &[
            "The key belongs to KuCoin account 2005, and the key before it to 1001: bots of main would trade in another account.",
            "fix: Use a key of KuCoin account 1001. If the account is meant to change, add --other-account.",
            "the key is refused; nothing was stored. Version 1 of main/main stays in use.",
        ],
    );
    assert_eq!(held.newest("main").await, 1);
    let words = ["keys", "rotate", "main", "--other-account"];
    let (code, said) = run(&lab, &words, &stranger, &lines(&stranger)).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(held.note("main", "uid").await, "2005");

    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    let (code, said) = rotate(&lab, &stranger).await;
    assert_eq!(code, 1, "{said}");
    holds_all(
        &said,
        &[
            "Vault has no version of main/main that another key could replace; nothing was stored",
            "fix: `credbroker keys register main --key main` registers the first one",
        ],
    );
}

#[tokio::test]
async fn a_new_key_that_the_broker_does_not_take_leaves_the_one_before_in_use_and_says_why() {
    let (lab, first, held) = with_first_key().await;
    let mut bot = lab.patient_bot("maker").await;
    let second = known(&lab, 2);
    // It passes its test, and is dead by the time that the broker tries it.
    let late = FaultRule::new("kv/data/kucoin/prod/main", Fault::Delay { ms: 2000 });
    lab.vault.fault(late.method("POST").times(1));
    let dies = async {
        until("it is written", async || is_hanging(&lab, "kv/data/")).await;
        lab.kucoin.remove_key(&second.api_key);
    };
    let ((code, said), ()) = tokio::join!(rotate(&lab, &second), dies);
    assert_eq!(code, 1, "{said}");
    holds_all(
        &said,
        &[
            "version 2 of main/main is in Vault, and the broker does not use it: ",
            "using version 1: version 2 is refused: KuCoin does not know this API key.",
            "Version 1 stays in use.",
            "`credbroker keys rollback main --key main` makes sure that a restart does not take it up either; then register another key",
        ],
    );
    assert_eq!(signer(&lab, &mut bot).await, first.api_key);
    let (code, said) = rollback(&lab, &[]).await;
    assert_eq!(code, 0, "{said}");
    holds_all(&said, &["main/main: version 1 is in use (id SHA-256 "]);
    assert!(!said.contains("is refused"), "{said}");
    assert_eq!(held.note("main", "use_version").await, "1");
    // The next rotation ends the rollback.
    let third = known(&lab, 3);
    let (code, said) = rotate(&lab, &third).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(signer(&lab, &mut bot).await, third.api_key);
    assert_eq!(held.note("main", "use_version").await, Value::Null);
}

#[tokio::test]
async fn an_admin_goes_back_a_version_and_on_again_and_only_to_versions_that_are_there() {
    let (lab, first, held) = with_first_key().await;
    let mut bot = lab.patient_bot("maker").await;
    let (code, said) = rollback(&lab, &[]).await;
    assert_eq!(code, 1, "{said}");
    holds_all(
        &said,
        &["Vault has no version before version 1 that could be used; nothing was changed"],
    );
    let second = known(&lab, 2);
    assert_eq!(rotate(&lab, &second).await.0, 0);
    let (code, said) = rollback(&lab, &[]).await;
    assert_eq!(code, 0, "{said}");
    holds_all(
        &said,
        &[
            "main/main: version 1 is in use (id SHA-256 ",
            "Version 2 signs no more.",
            "undo: credbroker keys rollback main --key main --newest, or register another key. Until then, a version written to Vault by hand is used only if KuCoin rejects this one.",
        ],
    );
    assert_eq!(signer(&lab, &mut bot).await, first.api_key);
    let (code, said) = rollback(&lab, &["--newest"]).await;
    assert_eq!(code, 0, "{said}");
    holds_all(
        &said,
        &[
            "main/main: version 2 is in use (id SHA-256 ",
            "Version 1 signs no more.",
        ],
    );
    assert_eq!(signer(&lab, &mut bot).await, second.api_key);
    assert_eq!(held.note("main", "use_version").await, Value::Null);

    let (code, said) = rollback(&lab, &["--to", "7"]).await;
    assert_eq!(code, 1, "{said}");
    holds_all(
        &said,
        &[
            "Vault has no version 7: it never existed, or it was deleted or destroyed; nothing was changed",
            "fix: name a version that is there with --to, or register another key with `credbroker keys register main --key main`",
        ],
    );
    // One that the exchange has forgotten: what is noted goes back too.
    lab.kucoin.remove_key(&first.api_key);
    let (code, said) = rollback(&lab, &["--to", "1"]).await;
    assert_eq!(code, 1, "{said}");
    holds_all(
        &said,
        &[
            "the broker does not take version 1 of main/main: ",
            "KuCoin does not know this API key.",
            "Version 2 stays in use, and what is noted in Vault is as it was.",
        ],
    );
    assert_eq!(held.note("main", "use_version").await, Value::Null);
    assert_eq!(signer(&lab, &mut bot).await, second.api_key);
    // A note that names what is not there can be undone.
    let strange = BTreeMap::from([("use_version".to_owned(), "9".to_owned())]);
    lab.vault
        .set_custom_metadata("kv", &kv_path("main", "main"), strange);
    let (code, said) = rollback(&lab, &[]).await;
    assert_eq!(code, 1, "{said}");
    holds_all(&said, &["use_version=9, and Vault has no such version"]);
    let (code, said) = rollback(&lab, &["--newest"]).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(held.note("main", "use_version").await, Value::Null);
}

/// Where a run is killed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step {
    /// The exchange is being asked about the key.
    Tested,
    /// The version is on its way.
    Writing,
    /// The version has arrived, and its answer has not.
    Written,
    /// The note of what was written is on its way.
    Noting,
    /// The broker is looking at it.
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
    const NOTES: &str = "kv/metadata/kucoin/prod/main";
    let on = |path, fault| FaultRule::new(path, fault).method("POST");
    // However late it is killed, a test that gets no answer stores nothing.
    let when = When::BeforeTaken;
    let silence = Trouble {
        times: None,
        ..Trouble::once(INFO, FaultAction::Stall { when })
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
    // After so many that have an answer.
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
            until("the exchange is asked", async || {
                let requests = lab.kucoin.everything_received();
                let signed = |request: &credbroker_sim::kucoin::ReceivedRequest| {
                    request.header("kc-api-key") == Some(&key.api_key)
                };
                requests.iter().any(signed)
            })
            .await;
        }
        Step::Writing | Step::Written => {
            until("it hangs", async || {
                hangs(DATA, usize::from(step == Step::Written))
            })
            .await;
        }
        Step::Noting => {
            until("it is written", async || hangs(DATA, 0)).await;
            lab.vault.fault(on(NOTES, Fault::Hang));
            until("it hangs", async || hangs(NOTES, 0)).await;
        }
        Step::Used => {
            until("it is written", async || hangs(DATA, 0)).await;
            lab.kucoin.fault(silence);
            let held = Held::of(lab);
            until("it is noted", async || {
                held.note("main", "uid").await != Value::Null
                    && !hangs(DATA, 0)
                    && held.note("main", "for_version").await
                        == json!(held.newest("main").await.to_string())
            })
            .await;
        }
    }
    // SIGKILL.
    running.kill().unwrap();
    running.wait().unwrap();
    lab.vault.clear_faults();
    lab.kucoin.clear_faults();
}

async fn until_serves(lab: &Lab, version: u32) {
    let name = "key_version{account=\"main\",key=\"main\"}";
    until(&format!("version {version} serves"), async || {
        lab.metric(name).await == Some(f64::from(version))
    })
    .await;
}

#[tokio::test]
async fn a_rotation_that_is_killed_leaves_the_old_key_or_the_new_one_and_the_next_run_says_which() {
    let (lab, first, held) = with_first_key().await;
    let mut bot = lab.patient_bot("maker").await;
    let (mut current, mut newest, mut number) = (first, 1, 1);
    for step in STEPS {
        number += 1;
        let next = known(&lab, number);
        kill_at(&lab, step, &["keys", "rotate", "main"], &next).await;
        // Whole, either of them.
        let is_written = matches!(step, Step::Written | Step::Noting | Step::Used);
        let (holds, version) = if is_written {
            (&next, newest + 1)
        } else {
            (&current, newest)
        };
        assert_eq!(held.newest("main").await, version, "{step:?}");
        assert!(is(&held.version("main", version).await, holds), "{step:?}");
        // Bots never notice.
        let signing = signer(&lab, &mut bot).await;
        assert!(
            signing == current.api_key || signing == next.api_key,
            "{step:?}"
        );
        let order = spot_order(&format!("killed-{number}"));
        let answer = bot.send(order).await.unwrap();
        assert_eq!(answer.outcome(), Outcome::Accepted, "{step:?} {answer:?}");
        until_serves(&lab, u32::try_from(version).unwrap()).await;
        assert_eq!(signer(&lab, &mut bot).await, holds.api_key, "{step:?}");

        let (code, said) = rotate(&lab, &next).await;
        assert_eq!(code, 0, "{step:?}: {said}");
        let told = match step {
            Step::Tested | Step::Writing | Step::Used => None,
            Step::Written | Step::Noting => Some(format!(
                "note: Vault holds version {version} of main/main, and no note of what it is: a previous run was interrupted"
            )),
        };
        match &told {
            Some(told) => holds_all(
                &said,
                &[
                    told,
                    "The broker uses it (id SHA-256 ",
                    "Give the same key to finish that run, or another key to replace it.",
                    "it is not written again",
                ],
            ),
            None => assert!(!said.contains("ended early"), "{step:?}: {said}"),
        }
        // Finished, where the key was there already; written, where it was not.
        newest = match step {
            Step::Written | Step::Noting | Step::Used => version,
            Step::Tested | Step::Writing => version + 1,
        };
        assert_eq!(held.newest("main").await, newest, "{step:?}: {said}");
        assert_eq!(held.note("main", "for_version").await, newest.to_string());
        assert_eq!(signer(&lab, &mut bot).await, next.api_key, "{step:?}");
        lab.kucoin.remove_key(&current.api_key);
        current = next;
    }
    lab.check_record();
}

#[tokio::test]
async fn a_first_registration_that_is_killed_leaves_no_key_or_the_new_one_and_the_next_run_goes_on()
{
    for step in STEPS {
        let lab = lab(Settings {
            keys: vec![("other", "main", 1002)],
            wait_ready: false,
            ..Settings::default()
        })
        .await;
        let held = Held::of(&lab);
        let (first, second) = (known(&lab, 1), known(&lab, 2));
        kill_at(&lab, step, &["keys", "register", "main"], &first).await;
        let is_written = matches!(step, Step::Written | Step::Noting | Step::Used);
        assert_eq!(held.newest("main").await, u64::from(is_written), "{step:?}");
        if is_written {
            assert!(is(&held.version("main", 1).await, &first), "{step:?}");
            until_serves(&lab, 1).await;
        }
        // Somebody else's turn, with another key of the same account.
        let (code, said) = run(
            &lab,
            &["keys", "register", "main"],
            &second,
            &lines(&second),
        )
        .await;
        assert_eq!(code, 0, "{step:?}: {said}");
        match step {
            Step::Tested | Step::Writing | Step::Used => {
                assert!(!said.contains("ended early"), "{step:?}: {said}");
            }
            Step::Written | Step::Noting => {
                let told = "note: Vault holds version 1 of main/main, and no note of what it is";
                holds_all(&said, &[told, "The broker uses it (id SHA-256 "]);
            }
        }
        let version = 1 + u64::from(is_written);
        assert!(
            is(&held.version("main", version).await, &second),
            "{step:?}"
        );
        holds_all(&said, &[&format!("main/main: version {version} is in use")]);
    }
}

#[tokio::test]
async fn a_key_that_somebody_else_replaces_before_it_is_in_use_is_told_so() {
    let (lab, _, held) = with_first_key().await;
    let (second, third) = (known(&lab, 2), known(&lab, 3));
    // The command's own test passes; the broker's test of the version in Vault takes long.
    let slow = FaultAction::Delay { ms: 3000 };
    lab.kucoin.fault(Trouble {
        skip: 1,
        ..Trouble::once(INFO, slow)
    });
    let others = async {
        until("it is written", async || {
            held.note("main", "for_version").await == "2"
        })
        .await;
        lab.put_key("main", "main", &third);
    };
    let ((code, said), ()) = tokio::join!(rotate(&lab, &second), others);
    assert_eq!(code, 1, "{said}");
    holds_all(
        &said,
        &[
            "version 2 of main/main is in Vault, but somebody else has written version 3 after it, which is in use",
            "fix: ask who else registers keys for this account; if yours is the right one, re-run the command",
        ],
    );
}

#[tokio::test]
async fn what_somebody_else_has_written_meanwhile_is_not_replaced() {
    let (lab, _, held) = with_first_key().await;
    let (second, third) = (known(&lab, 2), known(&lab, 3));
    let late = FaultRule::new("kv/data/kucoin/prod/main", Fault::Delay { ms: 2000 });
    lab.vault.fault(late.method("POST").times(1));
    let others = async {
        until("it is on its way", async || is_hanging(&lab, "kv/data/")).await;
        lab.put_key("main", "main", &third);
    };
    let ((code, said), ()) = tokio::join!(rotate(&lab, &second), others);
    assert_eq!(code, 1, "{said}");
    holds_all(
        &said,
        &[
            "somebody else has written this key meanwhile: version 1 was the newest one, now it is version 2; nothing was stored",
            "fix: ask who else registers keys for this account; then re-run the command",
        ],
    );
    let version = held.version("main", 2).await;
    assert_eq!(version["api_key"], third.api_key.as_str());
}

/// Vault loses what writes a version, or the answer to it.
fn lose(lab: &Lab, fault: Fault, times: Option<u32>) {
    let rule = FaultRule::new("kv/data/kucoin/prod/main", fault).method("POST");
    lab.vault.fault(match times {
        Some(times) => rule.times(times),
        None => rule,
    });
}

#[tokio::test]
async fn a_version_that_arrived_though_its_answer_was_lost_is_known_for_ours_and_put_to_use() {
    let (lab, _, held) = with_first_key().await;
    for (number, times) in [(2, Some(1)), (3, None)] {
        let next = known(&lab, number);
        lose(&lab, Fault::HalfBody, times);
        let (code, said) = rotate(&lab, &next).await;
        lab.vault.clear_faults();
        assert_eq!(code, 0, "{said}");
        holds_all(&said, &[&format!("main/main: version {number} is in use")]);
        assert_eq!(held.newest("main").await, number);
        assert!(is(&held.version("main", number).await, &next));
        assert_eq!(held.note("main", "for_version").await, number.to_string());
    }
}

#[tokio::test]
async fn a_version_of_somebody_else_is_not_taken_for_one_whose_answer_was_lost() {
    let (lab, _, held) = with_first_key().await;
    let (second, third) = (known(&lab, 2), known(&lab, 3));
    lose(&lab, Fault::Close, None);
    let before = lab.vault.requests().len();
    let others = async {
        until("it is lost", async || {
            let requests = lab.vault.requests();
            let mut since = requests[before..].iter();
            since.any(|seen| seen.method == "POST" && seen.path.starts_with("/v1/kv/data/"))
        })
        .await;
        lab.put_key("main", "main", &third);
    };
    let ((code, said), ()) = tokio::join!(rotate(&lab, &second), others);
    assert_eq!(code, 1, "{said}");
    holds_all(
        &said,
        &[
            "somebody else has written this key meanwhile: version 1 was the newest one, now it is version 2; nothing was stored",
            "fix: ask who else registers keys for this account; then re-run the command",
        ],
    );
    assert_eq!(held.newest("main").await, 2);
    assert_eq!(held.note("main", "for_version").await, "1");
}

#[tokio::test]
async fn a_version_that_arrives_late_is_told_to_be_unclear_and_finished_by_the_next_run() {
    let (lab, first, held) = with_first_key().await;
    let mut bot = lab.patient_bot("maker").await;
    let second = known(&lab, 2);
    lose(&lab, Fault::Close, None);
    let (code, said) = rotate(&lab, &second).await;
    lab.vault.clear_faults();
    assert_eq!(code, 1, "{said}");
    holds_all(
        &said,
        &[
            "it is not known whether it was written: Vault cannot be reached. Vault holds the new key as version 2, or what it held before. Version 1 of main/main stays in use. A new version that arrives late is used only once KuCoin accepts its signatures.",
            "fix: re-run the command once Vault answers: it shows which key Vault holds, and continues",
        ],
    );
    assert_eq!(held.newest("main").await, 1);
    assert_eq!(signer(&lab, &mut bot).await, first.api_key);
    lab.put_key("main", "main", &second);
    until_serves(&lab, 2).await;
    let (code, said) = rotate(&lab, &second).await;
    assert_eq!(code, 0, "{said}");
    holds_all(
        &said,
        &[
            "Vault holds version 2 of main/main, and no note of what it is",
            "it is not written again",
        ],
    );
    assert_eq!(held.newest("main").await, 2);
    assert_eq!(held.note("main", "for_version").await, "2");
}
