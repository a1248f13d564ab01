//! Tests of keys go on beside everything else, and what they say is told no longer than it is true.

use std::time::{Duration, Instant};

use credbroker::proto::{
    KeyState, KeyStatus, ListKeysRequest, Outcome, RevokeKeyRequest, TestKeyRequest,
};
use credbroker_sim::installation::{MAIN_UID, RULES, Settings, kv_path};
use credbroker_sim::kucoin::{Fault, FaultAction, SimKey, When};
use credbroker_sim::vault::{Fault as VaultFault, FaultRule};
use serde_json::Value;

use super::succession::{INFO, key, reads, refresh, signed_by, status, until_version};
use crate::harness::{Bot, Lab, PATIENCE, Patient, Time, accounts, refusal, until};

/// Every test of a key meets this until faults are cleared.
fn fault(action: FaultAction) -> Fault {
    Fault {
        times: None,
        ..Fault::once(INFO, action)
    }
}

fn hang() -> Fault {
    fault(FaultAction::Stall {
        when: When::BeforeTaken,
    })
}

fn note(lab: &Lab, notes: &[(&str, &str)]) {
    let notes = notes.iter();
    let notes = notes.map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
    lab.vault
        .set_custom_metadata("kv", &kv_path("main", "main"), notes.collect());
}

async fn is_refused(bot: &mut Bot<Patient>) -> bool {
    let Err(status) = bot.send(accounts()).await else {
        return false;
    };
    refusal(Err(status)).1 == "KEY_UNAVAILABLE"
}

async fn state(lab: &Lab) -> KeyState {
    let mut admin = lab.admin_client("anna").await;
    let keys = admin.list_keys(ListKeysRequest {}).await.unwrap();
    let mut keys = keys.into_inner().keys;
    keys.retain(|key| key.account == "main");
    keys.remove(0)
}

async fn test(lab: &Lab) {
    let mut admin = lab.admin_client("anna").await;
    let request = TestKeyRequest {
        account: "main".to_owned(),
        ..TestKeyRequest::default()
    };
    admin.test_key(request).await.unwrap();
}

async fn revoke(lab: &Lab) {
    let mut admin = lab.admin_client("anna").await;
    let request = RevokeKeyRequest {
        account: "main".to_owned(),
        key: "main".to_owned(),
    };
    admin.revoke_key(request).await.unwrap();
}

/// How often the key in memory was tested.
fn tests_of(lab: &Lab, key: &SimKey) -> usize {
    let requests = lab.kucoin.everything_received();
    let of_key = signed_by(&requests, key).into_iter();
    of_key.filter(|request| request.path() == INFO).count()
}

async fn until_tested(lab: &Lab, account: &str) {
    let name = format!("key_tested_timestamp_seconds{{account=\"{account}\",key=\"main\"}}");
    until("the key is tested", async || {
        lab.metric(&name).await.is_some()
    })
    .await;
}

/// Whether the last such change of key `main/main` is on record before the first test without an answer was given up. A
/// poll comes each second and a test is given up after four, however slow the machine is.
fn is_before_the_hanging_test_ends(lab: &Lab, outcome: &str) -> bool {
    let text = std::fs::read_to_string(lab.path("state/audit.jsonl")).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let is_change = |line: &Value| line["action"] == "key" && line["outcome"] == outcome;
    let changed = lines.iter().rposition(is_change).unwrap();
    let is_given_up = |line: &Value| {
        line["event"] == "outcome" && line["who"] == "broker" && line["outcome"] == "maybe_sent"
    };
    lines
        .iter()
        .position(is_given_up)
        .is_none_or(|ended| changed < ended)
}

async fn until_polled(lab: &Lab) {
    let before = lab.vault.requests().len();
    until("polls have passed", async || {
        lab.vault.requests().len() >= before + 6
    })
    .await;
}

#[tokio::test]
async fn vault_is_heard_within_one_poll_while_a_test_hangs() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    until_tested(&lab, "main").await;
    lab.kucoin.add_key(key(2));
    lab.kucoin.fault(hang());
    lab.put_key("main", "main", &key(2));
    until("the new key is being tested", async || {
        tests_of(&lab, &key(2)) > 0
    })
    .await;
    note(&lab, &[("state", "disabled")]);
    until("the bot is refused", async || {
        is_refused(&mut lab.patient_bot("maker").await).await
    })
    .await;
    assert!(is_before_the_hanging_test_ends(&lab, "gone"));
    assert!(is_refused(&mut bot).await);
    // The test that was given up brings nothing back.
    lab.kucoin.clear_faults();
    until_polled(&lab).await;
    assert!(is_refused(&mut bot).await);
    note(&lab, &[]);
    until_version(&lab, 2).await;
    lab.check_record();
}

#[tokio::test]
async fn a_newer_version_is_tested_in_place_of_one_whose_test_hangs() {
    let lab = Lab::start().await;
    until_tested(&lab, "main").await;
    let stall = FaultAction::Stall {
        when: When::BeforeTaken,
    };
    lab.kucoin.fault(Fault::once(INFO, stall));
    lab.kucoin.add_key(key(2));
    lab.kucoin.add_key(key(3));
    lab.put_key("main", "main", &key(2));
    until("the new key is being tested", async || {
        tests_of(&lab, &key(2)) > 0
    })
    .await;
    lab.put_key("main", "main", &key(3));
    until_version(&lab, 3).await;
    assert!(is_before_the_hanging_test_ends(&lab, "in_use"));
}

#[tokio::test]
async fn a_key_that_was_deleted_with_all_its_versions_does_not_serve_beside_its_namesake() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    until_tested(&lab, "main").await;
    // Both between two polls; the exchange does not know the new one.
    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    lab.put_key("main", "main", &key(2));
    refresh(&lab).await;
    assert_eq!(
        reads(&mut bot).await,
        (Outcome::Rejected, "400003".to_owned())
    );
    let requests = lab.kucoin.received();
    assert!(signed_by(&requests, &SimKey::fake(MAIN_UID)).is_empty());
}

#[tokio::test]
async fn a_key_that_is_deleted_and_written_anew_between_two_polls_fails_no_call() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    until_tested(&lab, "main").await;
    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    lab.kucoin.add_key(key(2));
    lab.put_key("main", "main", &key(2));
    let began = Instant::now();
    loop {
        assert_eq!(reads(&mut bot).await.0, Outcome::Accepted);
        if !signed_by(&lab.kucoin.received(), &key(2)).is_empty() {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "it is not used");
    }
    lab.check_record();
}

#[tokio::test]
async fn a_key_that_has_no_version_yet_is_told_so() {
    let settings = Settings {
        keys: vec![("other", "main", 1002)],
        ..Settings::default()
    };
    let mut lab = Lab::install(settings).await;
    note(&lab, &[("owner", "desk")]);
    lab.start_broker().await;
    until("Vault has been asked", async || {
        let (word, reasons) = status(&lab).await;
        word == "unavailable" && reasons == ["not available: Vault has no version of it yet"]
    })
    .await;
    lab.kucoin.add_key(key(1));
    lab.put_key("main", "main", &key(1));
    until_version(&lab, 1).await;
}

#[tokio::test]
async fn a_key_that_is_gone_when_it_is_revoked_stays_dead_and_its_successor_lives() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    note(&lab, &[("state", "disabled")]);
    until("it is gone", async || {
        is_refused(&mut lab.patient_bot("maker").await).await
    })
    .await;
    assert_eq!(status(&lab).await.0, "unavailable");
    revoke(&lab).await;
    assert_eq!(status(&lab).await.0, "revoked");
    // Back in Vault, and still dead; read once, and not at every poll.
    note(&lab, &[]);
    refresh(&lab).await;
    assert!(is_refused(&mut bot).await);
    assert_eq!(status(&lab).await.0, "revoked");
    let reads_of_vault = || {
        let requests = lab.vault.requests();
        let of_main = |path: &&str| path.contains("/kv/data/") && path.contains("main/main");
        requests
            .iter()
            .map(|seen| seen.path.as_str())
            .filter(of_main)
            .count()
    };
    let before = reads_of_vault();
    until_polled(&lab).await;
    assert_eq!(reads_of_vault(), before);
    lab.kucoin.add_key(key(2));
    lab.put_key("main", "main", &key(2));
    until_version(&lab, 2).await;
    assert_eq!(reads(&mut bot).await.0, Outcome::Accepted);
    // Now that one is deleted: it was not revoked.
    lab.vault.delete_latest("kv", &kv_path("main", "main"));
    until("it is gone", async || {
        is_refused(&mut lab.patient_bot("maker").await).await
    })
    .await;
    assert_eq!(status(&lab).await.0, "unavailable");
    lab.check_record();
}

#[tokio::test]
async fn a_refusal_is_over_once_a_test_says_so_and_a_test_without_an_answer_takes_nothing_away() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    until_tested(&lab, "main").await;
    let sound = state(&lab).await;
    assert_eq!(
        (sound.status(), sound.permissions.is_empty()),
        (KeyStatus::AtRisk, false)
    );
    lab.kucoin
        .fault(fault(FaultAction::RateLimited { reset_ms: None }));
    test(&lab).await;
    let unanswered = state(&lab).await;
    assert_eq!(
        (&unanswered.status, &unanswered.permissions),
        (&sound.status, &sound.permissions)
    );
    assert_eq!(unanswered.tested_at_ms, sound.tested_at_ms);
    let told = |reason: &String| reason.starts_with("the last test got no answer: 429000");
    assert!(unanswered.reasons.iter().any(told), "{unanswered:?}");
    lab.kucoin.clear_faults();
    lab.kucoin.remove_key(&SimKey::fake(MAIN_UID).api_key);
    assert_eq!(reads(&mut bot).await.1, "400003");
    assert_eq!(state(&lab).await.status(), KeyStatus::Refused);
    test(&lab).await;
    assert_eq!(state(&lab).await.status(), KeyStatus::Refused);
    // Mended at the exchange, and no bot calls.
    lab.kucoin.add_key(SimKey::fake(MAIN_UID));
    test(&lab).await;
    let mended = state(&lab).await;
    assert_eq!(
        (mended.status, mended.reasons),
        (sound.status, sound.reasons)
    );
}

#[tokio::test]
async fn a_version_that_was_refused_is_tried_again_without_being_asked() {
    let mut lab = Lab::install(Settings::default()).await;
    let time = Time::new(0);
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    lab.put_key("main", "main", &key(2));
    assert_eq!(refresh(&lab).await, 1);
    // Whoever made it has mended it at the exchange, and gone home.
    lab.kucoin.add_key(key(2));
    until_polled(&lab).await;
    assert_eq!(state(&lab).await.version, 1, "not at every poll");
    for _ in 0..13 {
        time.pass(&lab, Duration::from_secs(60)).await;
    }
    until_version(&lab, 2).await;
}

#[tokio::test]
async fn a_key_that_comes_back_is_not_tested_before_its_time() {
    let lab = Lab::start().await;
    until_tested(&lab, "main").await;
    let before = state(&lab).await;
    note(&lab, &[("state", "disabled")]);
    until("it is gone", async || {
        is_refused(&mut lab.patient_bot("maker").await).await
    })
    .await;
    note(&lab, &[]);
    until_version(&lab, 1).await;
    let name = "key_available{account=\"main\",key=\"main\"}";
    // And after the rules have not named it for a while.
    let without = "[account.other]\nkey = { spot-margin = \"main\" }\n[[grant]]\n\
                   bot = \"spiffe://demo.test/bot/maker\"\naccount = \"other\"\nscope = \"spot-margin\"\nallow = [\"read\"]\n";
    std::fs::write(lab.path("rules.toml"), without).unwrap();
    until("the rules name it no more", async || {
        lab.metric(name).await.is_none()
    })
    .await;
    std::fs::write(lab.path("rules.toml"), RULES).unwrap();
    until_version(&lab, 1).await;
    until_polled(&lab).await;
    assert_eq!(tests_of(&lab, &SimKey::fake(MAIN_UID)), 1);
    let after = state(&lab).await;
    assert_eq!(
        (after.tested_at_ms, after.status),
        (before.tested_at_ms, before.status)
    );
}

#[tokio::test]
async fn a_key_that_new_rules_name_is_tested_at_once() {
    let lab = Lab::start().await;
    let third = SimKey::fake(1003);
    lab.kucoin.add_key(third.clone());
    lab.put_key("third", "main", &third);
    // Its rules wait for a key that is not to be had, for seconds.
    let hangs = kv_path("fourth", "main");
    lab.vault.fault(FaultRule::new(
        &format!("kv/metadata/{hangs}"),
        VaultFault::Hang,
    ));
    let rules = format!(
        "{RULES}\n[account.third]\nkey = {{ spot-margin = \"main\" }}\n[account.fourth]\nkey = {{ spot-margin = \"main\" }}\n"
    );
    std::fs::write(lab.path("rules.toml"), rules).unwrap();
    until_tested(&lab, "third").await;
    assert_eq!(tests_of(&lab, &third), 1);
}

#[tokio::test]
async fn what_strangers_write_reaches_no_terminal_as_it_is() {
    let lab = Lab::start().await;
    until_tested(&lab, "main").await;
    let body = serde_json::json!({"code": "999999", "msg": format!("\u{1b}[2J\nforged{}", "x".repeat(9000))});
    lab.kucoin.fault(fault(FaultAction::Answer {
        status: 200,
        body,
        when: When::BeforeTaken,
    }));
    test(&lab).await;
    lab.put_key("main", "main", &key(2));
    refresh(&lab).await;
    let reasons = state(&lab).await.reasons;
    let told: Vec<_> = reasons
        .iter()
        .filter(|reason| reason.contains("999999"))
        .collect();
    assert_eq!(told.len(), 2, "{reasons:?}");
    for reason in told {
        assert!(
            reason.len() < 400 && !reason.contains(char::is_control),
            "{reason}"
        );
    }
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(
        !text.contains('\u{1b}') && text.lines().all(|line| !line.starts_with("forged")),
        "{text}"
    );
}

#[tokio::test]
async fn a_test_that_hangs_when_the_broker_stops_leaves_nothing_to_look_up() {
    let mut lab = Lab::start().await;
    until_tested(&lab, "main").await;
    lab.kucoin.fault(hang());
    lab.kucoin.add_key(key(2));
    lab.put_key("main", "main", &key(2));
    until("the new key is being tested", async || {
        tests_of(&lab, &key(2)) > 0
    })
    .await;
    assert_eq!(lab.stop().await, 0);
}
