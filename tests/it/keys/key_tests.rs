//! Key tests run in the background without delaying anything else, and outdated results are not shown.

use std::time::{Duration, Instant};

use credbroker::proto::{
    KeyState, KeyStatus, ListKeysRequest, Outcome, RevokeKeyRequest, TestKeyRequest,
};
use credbroker_sim::installation::{MAIN_UID, RULES, Settings, kv_path};
use credbroker_sim::kucoin::{Fault, FaultAction, SimKey, When};
use credbroker_sim::vault::{Fault as VaultFault, FaultRule};
use serde_json::Value;

use super::succession::{INFO, key, reads, refresh, signed_by, status, until_version};
use crate::harness::{Bot, Lab, Patient, Time, WAIT_LIMIT, accounts, refusal, until};

/// A fault of every key test until faults are cleared.
fn fault(action: FaultAction) -> Fault {
    Fault {
        times: None,
        ..Fault::once(INFO, action)
    }
}

fn hang() -> Fault {
    fault(FaultAction::Stall {
        when: When::BeforeProcessing,
    })
}

fn set_metadata(lab: &Lab, entries: &[(&str, &str)]) {
    let entries = entries.iter();
    let entries = entries.map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
    lab.vault
        .set_custom_metadata("kv", &kv_path("main", "main"), entries.collect());
}

async fn is_rejected(bot: &mut Bot<Patient>) -> bool {
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

/// How often this key was tested.
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

/// Whether the last change with this outcome was audited before the first hanging key test timed out. Polls come every second
/// and a test times out after four seconds, however slow the machine is.
fn happened_before_the_test_timed_out(lab: &Lab, outcome: &str) -> bool {
    let lines = lab.audit_file();
    let is_change = |line: &Value| line["action"] == "key" && line["outcome"] == outcome;
    let changed = lines.iter().rposition(is_change).unwrap();
    let is_timed_out = |line: &Value| {
        line["event"] == "outcome"
            && line["principal"] == "broker"
            && line["outcome"] == "maybe_sent"
            // A test that is not needed any more is dropped, and does not time out.
            && !line["detail"].as_str().unwrap().ends_with("its read was dropped")
    };
    lines
        .iter()
        .position(is_timed_out)
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
async fn changes_in_vault_take_effect_within_one_poll_while_a_key_test_hangs() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    until_tested(&lab, "main").await;
    lab.kucoin.add_key(key(2));
    lab.kucoin.fault(hang());
    lab.put_key("main", "main", &key(2));
    until("the new key is being tested", async || {
        tests_of(&lab, &key(2)) > 0
    })
    .await;
    set_metadata(&lab, &[("state", "disabled")]);
    until("the bot is rejected", async || {
        is_rejected(&mut lab.patient_bot("maker").await).await
    })
    .await;
    assert!(happened_before_the_test_timed_out(&lab, "removed"));
    assert!(is_rejected(&mut bot).await);
    // The end of the hanging test does not restore the key.
    lab.kucoin.clear_faults();
    until_polled(&lab).await;
    assert!(is_rejected(&mut bot).await);
    set_metadata(&lab, &[]);
    until_version(&lab, 2).await;
    lab.stop().await;
}

#[tokio::test]
async fn newer_version_is_tested_instead_of_one_whose_test_hangs() {
    let lab = Lab::start().await;
    until_tested(&lab, "main").await;
    let stall = FaultAction::Stall {
        when: When::BeforeProcessing,
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
    assert!(happened_before_the_test_timed_out(&lab, "activated"));
}

#[tokio::test]
async fn deleted_key_signs_nothing_after_a_new_key_is_created_under_its_name() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    until_tested(&lab, "main").await;
    // Both between two polls; the new key does not exist at the exchange.
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
async fn key_deleted_and_recreated_between_two_polls_fails_no_call() {
    let mut lab = Lab::start().await;
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
        assert!(began.elapsed() < WAIT_LIMIT, "the new key is not used");
    }
    lab.stop().await;
}

#[tokio::test]
async fn key_without_any_version_is_reported_as_unavailable() {
    let settings = Settings {
        keys: vec![("other", "main", 1002)],
        ..Settings::default()
    };
    let mut lab = Lab::install(settings).await;
    set_metadata(&lab, &[("owner", "desk")]);
    lab.start_broker().await;
    until("the key is reported as unavailable", async || {
        let (word, reasons) = status(&lab).await;
        word == "unavailable" && reasons == ["not available: Vault has no version of it yet"]
    })
    .await;
    lab.kucoin.add_key(key(1));
    lab.put_key("main", "main", &key(1));
    until_version(&lab, 1).await;
}

#[tokio::test]
async fn key_revoked_while_absent_stays_revoked_and_its_successor_works() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    set_metadata(&lab, &[("state", "disabled")]);
    until("the key is evicted", async || {
        is_rejected(&mut lab.patient_bot("maker").await).await
    })
    .await;
    assert_eq!(status(&lab).await.0, "unavailable");
    revoke(&lab).await;
    assert_eq!(status(&lab).await.0, "revoked");
    // Enabled in Vault again, but still revoked; it is read once and not at every poll.
    set_metadata(&lab, &[]);
    refresh(&lab).await;
    assert!(is_rejected(&mut bot).await);
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
    // The second key is deleted, which is not a revocation.
    lab.vault.delete_latest("kv", &kv_path("main", "main"));
    until("the key is evicted", async || {
        is_rejected(&mut lab.patient_bot("maker").await).await
    })
    .await;
    assert_eq!(status(&lab).await.0, "unavailable");
    lab.stop().await;
}

#[tokio::test]
async fn passed_test_clears_a_rejection_and_an_inconclusive_test_keeps_the_status() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    until_tested(&lab, "main").await;
    let initial = state(&lab).await;
    assert_eq!(
        (initial.status(), initial.permissions.is_empty()),
        (KeyStatus::AtRisk, false)
    );
    lab.kucoin
        .fault(fault(FaultAction::RateLimited { reset_ms: None }));
    test(&lab).await;
    let inconclusive = state(&lab).await;
    assert_eq!(
        (&inconclusive.status, &inconclusive.permissions),
        (&initial.status, &initial.permissions)
    );
    assert_eq!(inconclusive.tested_at_ms, initial.tested_at_ms);
    let is_expected =
        |reason: &String| reason.starts_with("the last test was inconclusive: 429000");
    assert!(
        inconclusive.reasons.iter().any(is_expected),
        "{inconclusive:?}"
    );
    lab.kucoin.clear_faults();
    lab.kucoin.remove_key(&SimKey::fake(MAIN_UID).api_key);
    assert_eq!(reads(&mut bot).await.1, "400003");
    assert_eq!(state(&lab).await.status(), KeyStatus::Refused);
    test(&lab).await;
    assert_eq!(state(&lab).await.status(), KeyStatus::Refused);
    // The key exists at the exchange again, and no bot calls.
    lab.kucoin.add_key(SimKey::fake(MAIN_UID));
    test(&lab).await;
    let restored = state(&lab).await;
    assert_eq!(
        (restored.status, restored.reasons),
        (initial.status, initial.reasons)
    );
}

#[tokio::test]
async fn rejected_version_is_retested_automatically_but_not_at_every_poll() {
    let mut lab = Lab::install(Settings::default()).await;
    let time = Time::new(0);
    lab.start_broker_on(time.clock()).await;
    lab.until_ready().await;
    lab.put_key("main", "main", &key(2));
    assert_eq!(refresh(&lab).await, 1);
    // The key is created at the exchange later, without a refresh by an admin.
    lab.kucoin.add_key(key(2));
    until_polled(&lab).await;
    assert_eq!(state(&lab).await.version, 1, "not at every poll");
    for _ in 0..13 {
        time.pass(&lab, Duration::from_secs(60)).await;
    }
    until_version(&lab, 2).await;
}

#[tokio::test]
async fn key_that_reappears_is_not_retested_before_its_next_due_test() {
    let lab = Lab::start().await;
    until_tested(&lab, "main").await;
    let before = state(&lab).await;
    set_metadata(&lab, &[("state", "disabled")]);
    until("the key is evicted", async || {
        is_rejected(&mut lab.patient_bot("maker").await).await
    })
    .await;
    set_metadata(&lab, &[]);
    until_version(&lab, 1).await;
    let name = "key_available{account=\"main\",key=\"main\"}";
    // Also after it was missing from the rules for a while.
    let without = "[account.other]\nkey = { spot-margin = \"main\" }\n[[grant]]\n\
                   bot = \"spiffe://demo.test/bot/maker\"\naccount = \"other\"\nscope = \"spot-margin\"\nallow = [\"read\"]\n";
    std::fs::write(lab.path("rules.toml"), without).unwrap();
    until("the key is no longer in the rules", async || {
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
async fn key_added_by_new_rules_is_tested_at_once() {
    let lab = Lab::start().await;
    let third = SimKey::fake(1003);
    lab.kucoin.add_key(third.clone());
    lab.put_key("third", "main", &third);
    // The new rules wait some seconds for another key that cannot be read.
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
async fn kucoin_error_texts_are_sanitized_and_shortened() {
    let lab = Lab::start().await;
    until_tested(&lab, "main").await;
    let body = serde_json::json!({"code": "999999", "msg": format!("\u{1b}[2J\nforged{}", "x".repeat(9000))});
    lab.kucoin.fault(fault(FaultAction::Answer {
        status: 200,
        body,
        when: When::BeforeProcessing,
    }));
    test(&lab).await;
    lab.put_key("main", "main", &key(2));
    refresh(&lab).await;
    let reasons = state(&lab).await.reasons;
    let matching: Vec<_> = reasons
        .iter()
        .filter(|reason| reason.contains("999999"))
        .collect();
    assert_eq!(matching.len(), 2, "{reasons:?}");
    for reason in matching {
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
async fn hanging_key_test_at_shutdown_leaves_no_unresolved_request() {
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
