//! A new key version is tested before it signs for a bot; the previous version stays in use until then.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use credbroker::proto::{Outcome, RefreshKeyRequest};
use credbroker_sim::installation::{MAIN_UID, kv_path, secret};
use credbroker_sim::kucoin::{Fault, FaultAction, ReceivedRequest, SimKey, When};
use serde_json::{Value, json};

use crate::harness::{Bot, Lab, Patient, accounts, print_always, spot_order, until};

pub(super) const INFO: &str = "/api/v1/user/api-key";

/// Another key of the account in the default rules.
pub(super) fn key(number: u64) -> SimKey {
    SimKey {
        api_key: format!("simulated-key-{number:010}"),
        ..SimKey::fake(MAIN_UID)
    }
}

pub(super) fn signed_by<'r>(
    requests: &'r [ReceivedRequest],
    key: &SimKey,
) -> Vec<&'r ReceivedRequest> {
    let mut of_key: Vec<_> = requests.iter().collect();
    of_key.retain(|request| request.header("kc-api-key") == Some(&key.api_key));
    of_key
}

pub(super) async fn until_version(lab: &Lab, version: u64) {
    let name = "key_version{account=\"main\",key=\"main\"}";
    until(&format!("version {version} is in use"), async || {
        lab.metric(name).await.map(|now| now.to_string()) == Some(version.to_string())
    })
    .await;
}

/// Status and reasons of `main/main`.
pub(super) async fn status(lab: &Lab) -> (String, Vec<String>) {
    let mut admin = lab.admin_client("anna").await;
    let keys = admin.list_keys(credbroker::proto::ListKeysRequest {}).await;
    let mut keys = keys.unwrap().into_inner().keys;
    keys.retain(|key| key.account == "main");
    let key = keys.remove(0);
    (key.status().word().to_owned(), key.reasons)
}

/// Makes the broker refresh the key from Vault; returns the version in use after that.
pub(super) async fn refresh(lab: &Lab) -> u64 {
    let mut admin = lab.admin_client("anna").await;
    let request = RefreshKeyRequest {
        account: "main".to_owned(),
        key: "main".to_owned(),
    };
    let state = admin.refresh_key(request).await.unwrap().into_inner().state;
    state.unwrap().version
}

pub(super) async fn reads(bot: &mut Bot<Patient>) -> (Outcome, String) {
    let answer = bot.send(accounts()).await.unwrap();
    (answer.outcome(), answer.code)
}

#[tokio::test]
async fn new_version_is_tested_on_every_scope_before_it_signs_for_a_bot() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let next = key(2);
    lab.kucoin.add_key(next.clone());
    lab.put_key("main", "main", &next);
    assert_eq!(refresh(&lab).await, 2);
    assert_eq!(reads(&mut bot).await.0, Outcome::Accepted);
    let requests = lab.kucoin.everything_received();
    let paths: Vec<_> = signed_by(&requests, &next)
        .into_iter()
        .map(|request| (request.is_internal(), request.path()))
        .collect();
    let expected = [
        (true, INFO),
        (true, "/api/v1/account-overview"),
        (true, "/api/v1/accounts"),
        (true, "/api/ua/v2/unified/account/overview"),
        (false, "/api/v1/accounts"),
    ];
    assert_eq!(paths, expected);
    let acts = lab.acts();
    let change = acts.iter().rfind(|act| act["action"] == "key").unwrap();
    assert_eq!(change["outcome"], "activated");
    assert_eq!(
        (&change["version_before"], &change["version_after"]),
        (&json!(1), &json!(2))
    );
    assert_eq!(change["principal"], "vault");
    lab.stop().await;
}

#[tokio::test]
async fn version_rejected_by_kucoin_is_not_used_and_the_reason_is_shown() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    // The key does not exist at the exchange.
    lab.put_key("main", "main", &key(2));
    assert_eq!(refresh(&lab).await, 1);
    assert_eq!(reads(&mut bot).await.0, Outcome::Accepted);
    let (_, reasons) = status(&lab).await;
    let is_shown = reasons
        .iter()
        .any(|reason| reason.contains("version 2 was rejected"));
    assert!(is_shown, "{reasons:?}");
    let requests = lab.kucoin.everything_received();
    let signed = signed_by(&requests, &key(2));
    assert!(signed.iter().all(|request| request.is_internal()));
    // It is not tested again at every poll.
    let tests = signed.len();
    let polls = || lab.vault.requests().len();
    let before = polls();
    until("more polls have passed", async || polls() >= before + 6).await;
    let requests = lab.kucoin.everything_received();
    assert_eq!(signed_by(&requests, &key(2)).len(), tests);
    // Once the key exists at the exchange, a refresh by an admin tests it again.
    lab.kucoin.add_key(key(2));
    assert_eq!(refresh(&lab).await, 2);
    lab.stop().await;
}

#[tokio::test]
async fn key_without_trade_permission_does_not_replace_one_that_has_it() {
    let lab = Lab::start().await;
    let weak = SimKey {
        permissions: vec!["Futures".to_owned(), "Unified".to_owned()],
        ..key(2)
    };
    lab.kucoin.add_key(weak.clone());
    lab.put_key("main", "main", &weak);
    assert_eq!(refresh(&lab).await, 1);
    let (_, reasons) = status(&lab).await;
    let is_shown = reasons
        .iter()
        .any(|reason| reason.contains("lacks the permission Spot"));
    assert!(is_shown, "{reasons:?}");
}

#[tokio::test]
async fn version_that_cannot_be_tested_yet_is_used_once_its_test_passes() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    lab.kucoin.add_key(key(2));
    let busy = Fault {
        times: None,
        ..Fault::once(
            INFO,
            FaultAction::RateLimited {
                reset_ms: Some(100),
            },
        )
    };
    lab.kucoin.fault(busy);
    lab.put_key("main", "main", &key(2));
    assert_eq!(refresh(&lab).await, 1);
    let (_, reasons) = status(&lab).await;
    let is_shown = reasons
        .iter()
        .any(|reason| reason.contains("could not be tested yet"));
    assert!(is_shown, "{reasons:?}");
    assert_eq!(reads(&mut bot).await.0, Outcome::Accepted);
    lab.kucoin.clear_faults();
    until_version(&lab, 2).await;
    assert!(
        status(&lab)
            .await
            .1
            .iter()
            .all(|reason| !reason.contains("version"))
    );
}

#[tokio::test]
async fn request_whose_key_is_deleted_at_kucoin_is_retried_with_the_new_key() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    lab.kucoin.add_key(key(2));
    // The old key is deleted while the test of the new key is running.
    lab.kucoin
        .fault(Fault::once(INFO, FaultAction::Delay { ms: 700 }));
    lab.put_key("main", "main", &key(2));
    until("the new key is being tested", async || {
        let requests = lab.kucoin.everything_received();
        !signed_by(&requests, &key(2)).is_empty()
    })
    .await;
    lab.kucoin.remove_key(&SimKey::fake(MAIN_UID).api_key);
    let answer = bot.send(spot_order("under-it")).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
    let codes: Vec<_> = lab
        .kucoin
        .received()
        .iter()
        .map(|request| request.code().unwrap().to_owned())
        .collect();
    assert_eq!(codes, ["400003", "200000"]);
    assert_eq!(lab.kucoin.orders(MAIN_UID).len(), 1);
    lab.stop().await;
}

#[tokio::test]
async fn key_rejection_is_returned_to_the_bot_at_once_if_there_is_no_other_key() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    lab.kucoin.remove_key(&SimKey::fake(MAIN_UID).api_key);
    assert_eq!(
        reads(&mut bot).await,
        (Outcome::Rejected, "400003".to_owned())
    );
    assert_eq!(lab.kucoin.received().len(), 1);
    let (word, reasons) = status(&lab).await;
    assert_eq!(word, "refused", "{reasons:?}");
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(text.contains("key main/main: refused"), "{text}");
    assert_eq!(
        lab.metric("key_status{account=\"main\",key=\"main\",status=\"refused\"}")
            .await,
        Some(1.0)
    );
}

#[tokio::test]
async fn previous_version_is_used_if_the_newest_is_rejected_at_start() {
    let mut lab = Lab::install(credbroker_sim::installation::Settings::default()).await;
    lab.put_key("main", "main", &key(2));
    lab.start_broker().await;
    until_version(&lab, 1).await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(reads(&mut bot).await.0, Outcome::Accepted);
    let (_, reasons) = status(&lab).await;
    let is_shown = reasons
        .iter()
        .any(|reason| reason.contains("version 2 was rejected"));
    assert!(is_shown, "{reasons:?}");
    // The next version is used as usual.
    lab.kucoin.add_key(key(3));
    lab.put_key("main", "main", &key(3));
    until_version(&lab, 3).await;
    assert_eq!(
        status(&lab).await.0,
        "at-risk",
        "the keys of tests have no whitelist"
    );
}

#[tokio::test]
async fn use_version_switches_to_an_older_version_and_back() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    lab.kucoin.add_key(key(2));
    lab.put_key("main", "main", &key(2));
    until_version(&lab, 2).await;
    let use_version = |version: &str| {
        lab.vault.set_custom_metadata(
            "kv",
            &kv_path("main", "main"),
            BTreeMap::from([("use_version".to_owned(), version.to_owned())]),
        );
    };
    use_version("1");
    until_version(&lab, 1).await;
    assert_eq!(reads(&mut bot).await.0, Outcome::Accepted);
    // A missing version changes nothing.
    use_version("7");
    assert_eq!(refresh(&lab).await, 1);
    let (_, reasons) = status(&lab).await;
    assert!(
        reasons
            .iter()
            .any(|reason| reason.contains("use_version=7")),
        "{reasons:?}"
    );
    use_version("2");
    until_version(&lab, 2).await;
}

#[tokio::test]
async fn keys_are_tested_once_after_the_start_and_not_at_every_poll() {
    let lab = Lab::start().await;
    until("the key is tested", async || {
        lab.metric("key_tested_timestamp_seconds{account=\"main\",key=\"main\"}")
            .await
            .is_some()
    })
    .await;
    let count_tests = || {
        let requests = lab.kucoin.everything_received();
        signed_by(&requests, &SimKey::fake(MAIN_UID)).len()
    };
    assert_eq!(count_tests(), 1);
    let before = lab.vault.requests().len();
    until("polls have passed", async || {
        lab.vault.requests().len() >= before + 6
    })
    .await;
    assert_eq!(count_tests(), 1, "at most once in ten minutes");
}

/// Eight bots call during a hundred rotations; each key is deleted at the exchange as soon as the next one is in use.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundred_rotations_under_load_fail_no_call_and_replaced_keys_never_sign() {
    const ROTATIONS: u64 = 100;
    let lab = Arc::new(Lab::start().await);
    let (calls, is_running) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(true)));
    let mut bots = Vec::new();
    for number in 0..8 {
        let mut bot = lab.patient_bot("maker").await;
        let (calls, is_running) = (Arc::clone(&calls), Arc::clone(&is_running));
        bots.push(tokio::spawn(async move {
            let mut step = 0;
            while is_running.load(Ordering::Relaxed) {
                step += 1;
                let request = if step % 4 == 0 {
                    spot_order(&format!("bot-{number}-{step}"))
                } else {
                    accounts()
                };
                let answer = bot.send(request).await.unwrap();
                assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
                calls.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    let began = std::time::Instant::now();
    let mut before = SimKey::fake(MAIN_UID);
    for number in 2..2 + ROTATIONS {
        let next = key(number);
        lab.kucoin.add_key(next.clone());
        lab.put_key("main", "main", &next);
        assert_eq!(refresh(&lab).await, number);
        lab.kucoin.remove_key(&before.api_key);
        before = next;
        let so_far = calls.load(Ordering::Relaxed);
        until("bots have called", async || {
            calls.load(Ordering::Relaxed) >= so_far + 8
        })
        .await;
    }
    let took = began.elapsed();
    // Signed times are the exchange's; the broker knows them with this uncertainty.
    let (_, metrics) = lab.get("/metrics").await;
    let uncertain_s = metrics
        .lines()
        .filter(|line| line.starts_with("credbroker_clock_uncertainty_seconds"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .fold(0.0, f64::max);
    assert!(uncertain_s < 1.0, "{metrics}");
    let clock_ms =
        5 + i64::try_from(std::time::Duration::from_secs_f64(uncertain_s).as_millis()).unwrap();
    is_running.store(false, Ordering::Relaxed);
    for bot in bots {
        bot.await.unwrap();
    }
    let calls = calls.load(Ordering::Relaxed);
    print_always(&format!(
        "{ROTATIONS} rotations during {calls} calls ({} per second): none failed",
        calls / took.as_secs().max(1)
    ));
    let mut replaced_ms: BTreeMap<u64, i64> = BTreeMap::new();
    for act in lab.acts() {
        if act["action"] == "key" && act["outcome"] == "activated" && act["account"] == "main" {
            let version = act["version_before"].as_u64().unwrap_or_default();
            replaced_ms.insert(version, act["time_ms"].as_i64().unwrap());
        }
    }
    assert_eq!(replaced_ms.len() as u64, ROTATIONS + 1);
    let requests = lab.kucoin.received();
    assert!(!requests.is_empty());
    for version in 1..=ROTATIONS {
        let key = if version == 1 {
            SimKey::fake(MAIN_UID)
        } else {
            key(version)
        };
        for request in signed_by(&requests, &key) {
            let signed_ms: i64 = request.header("kc-api-timestamp").unwrap().parse().unwrap();
            assert!(
                signed_ms <= replaced_ms[&version] + clock_ms,
                "version {version} signed at {signed_ms}, {} ms after it was replaced",
                signed_ms - replaced_ms[&version]
            );
        }
    }
    lab.check_audit_log();
}

/// Several new versions that the exchange rejects or that are malformed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotations_to_broken_keys_under_load_fail_no_call() {
    let lab = Arc::new(Lab::start().await);
    let is_running = Arc::new(AtomicBool::new(true));
    let mut bots = Vec::new();
    for _ in 0..8 {
        let mut bot = lab.patient_bot("maker").await;
        let is_running = Arc::clone(&is_running);
        bots.push(tokio::spawn(async move {
            let mut calls = 0;
            while is_running.load(Ordering::Relaxed) {
                let answer = bot.send(accounts()).await.unwrap();
                assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
                calls += 1;
            }
            calls
        }));
    }
    let wrong_secret = SimKey {
        api_secret: "simulated-secret-that-is-wrong".to_owned(),
        ..key(2)
    };
    lab.kucoin.add_key(key(2));
    let other_address = SimKey {
        ip_whitelist: vec!["203.0.113.9".parse().unwrap()],
        ..key(3)
    };
    lab.kucoin.add_key(other_address.clone());
    let broken: [Value; 5] = [
        secret(&key(99)),
        secret(&wrong_secret),
        secret(&other_address),
        json!({"api_key": "simulated-half"}),
        Value::Null,
    ];
    for value in broken {
        lab.vault.put_secret("kv", &kv_path("main", "main"), value);
        assert_eq!(refresh(&lab).await, 1);
        let (_, reasons) = status(&lab).await;
        let is_expected =
            |reason: &String| reason.starts_with("using version 1 because of this problem: ");
        assert!(reasons.iter().any(is_expected), "{reasons:?}");
    }
    is_running.store(false, Ordering::Relaxed);
    let mut calls = 0;
    for bot in bots {
        calls += bot.await.unwrap();
    }
    assert!(calls > 0);
    let code = |request: &ReceivedRequest| request.answered.clone().unwrap().1;
    assert!(
        lab.kucoin
            .received()
            .iter()
            .all(|request| code(request) == "200000")
    );
    lab.check_audit_log();
}

#[tokio::test]
async fn stalled_test_of_a_new_key_delays_no_call() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    lab.kucoin.add_key(key(2));
    let stall = FaultAction::Stall {
        when: When::BeforeProcessing,
    };
    // Each test of it: on a busy machine, the next one can begin before the last call.
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once(INFO, stall)
    });
    lab.put_key("main", "main", &key(2));
    until("the new key is being tested", async || {
        let requests = lab.kucoin.everything_received();
        !signed_by(&requests, &key(2)).is_empty()
    })
    .await;
    for _ in 0..20 {
        assert_eq!(reads(&mut bot).await.0, Outcome::Accepted);
    }
    let requests = lab.kucoin.received();
    assert!(signed_by(&requests, &key(2)).is_empty());
}
