//! The status of each key with its reasons: the same in `ListKeys`, in `/readyz?verbose` and in the metrics.

use std::collections::BTreeMap;
use std::time::Duration;

use credbroker::proto::{
    HaltRequest, KeyState, KeyStatus, ListKeysRequest, Outcome, ResumeRequest, RevokeKeyRequest,
    SignAndSendRequest, TestKeyRequest, TestKeyResponse,
};
use credbroker_sim::installation::{MAIN_UID, RULES, Settings, kv_path};
use credbroker_sim::kucoin::{Fault, FaultAction, SimKey, When};
use serde_json::{Value, json};

use crate::harness::{Bot, Lab, Patient, Time, accounts, spot_order, until};

const INFO: &str = "/api/v1/user/api-key";

const MINUTE: Duration = Duration::from_secs(60);

const DAY_MS: i64 = 86_400_000;

/// All values of a key's status.
const STATUSES: [&str; 9] = [
    "at-risk",
    "active",
    "degraded",
    "expiring",
    "frozen",
    "refused",
    "revoked",
    "unavailable",
    "untested",
];

/// A key without problems.
fn good() -> SimKey {
    SimKey {
        ip_whitelist: vec!["127.0.0.1".parse().unwrap()],
        ..SimKey::fake(MAIN_UID)
    }
}

/// Another key of the same account.
fn next() -> SimKey {
    SimKey {
        api_key: "simulated-next-key".to_owned(),
        ..good()
    }
}

/// An installation whose exchange has `key` and whose broker is not started yet.
async fn installed(key: SimKey, settings: Settings) -> Lab {
    let lab = Lab::install(settings).await;
    lab.kucoin.add_key(key);
    lab
}

async fn started(key: SimKey) -> Lab {
    let mut lab = installed(key, Settings::default()).await;
    lab.start_broker().await;
    lab
}

/// The state of key `main/main` in `ListKeys`.
async fn listed(lab: &Lab) -> KeyState {
    let mut admin = lab.admin_client("anna").await;
    let keys = admin.list_keys(ListKeysRequest {}).await;
    let mut keys = keys.unwrap().into_inner().keys;
    keys.retain(|key| key.account == "main");
    keys.remove(0)
}

/// Waits until `main/main` has this status and exactly the reasons that begin with these, then checks `/readyz` and metrics.
async fn expect(lab: &Lab, expected_status: &str, reasons: &[&str]) {
    let is_expected = |key: &KeyState| {
        let mut pairs = key.reasons.iter().zip(reasons);
        key.status().word() == expected_status
            && key.reasons.len() == reasons.len()
            && pairs.all(|(reason, expected)| reason.starts_with(expected))
    };
    until(
        &format!("main/main is {expected_status}: {reasons:?}"),
        async || is_expected(&listed(lab).await),
    )
    .await;
    let (_, text) = lab.get("/readyz?verbose").await;
    let mut lines: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("key main/main: "))
        .filter(|line| !line.contains(" loaded"))
        .collect();
    assert_eq!(
        lines
            .iter()
            .filter(|line| **line == expected_status)
            .count(),
        1
    );
    lines.retain(|line| *line != expected_status);
    assert_eq!(lines.len(), reasons.len(), "{lines:#?}");
    for reason in reasons {
        let found = lines.iter().any(|line| line.starts_with(reason));
        assert!(found, "{reason} is not in {lines:#?}");
    }
    for status in STATUSES {
        let metric = format!("key_status{{account=\"main\",key=\"main\",status=\"{status}\"}}");
        let expected = f64::from(u8::from(status == expected_status));
        assert_eq!(lab.metric(&metric).await, Some(expected), "{status}");
    }
}

async fn test_key(lab: &Lab) -> TestKeyResponse {
    let mut admin = lab.admin_client("anna").await;
    let request = TestKeyRequest {
        account: "main".to_owned(),
        key: "main".to_owned(),
        ..TestKeyRequest::default()
    };
    admin.test_key(request).await.unwrap().into_inner()
}

/// Sends a request; returns code and advice of the answer.
async fn send(bot: &mut Bot<Patient>, request: SignAndSendRequest) -> (String, String) {
    let answer = bot.send(request).await.unwrap();
    let is_accepted = answer.outcome() == Outcome::Accepted;
    assert_eq!(is_accepted, answer.advice.is_empty(), "{answer:?}");
    (answer.code, answer.advice)
}

#[tokio::test]
async fn key_without_problems_is_active_once_it_is_tested() {
    let mut lab = started(good()).await;
    expect(&lab, "active", &[]).await;
    let key = listed(&lab).await;
    assert_eq!(
        key.permissions,
        ["General", "Spot", "Margin", "Futures", "Unified"]
    );
    assert_eq!((key.is_whitelisted, key.version), (Some(true), 1));
    assert_eq!((key.uid, key.used_at_ms), (MAIN_UID.to_string(), 0));
    assert!(key.tested_at_ms > 0);
    let mut bot = lab.patient_bot("maker").await;
    send(&mut bot, accounts()).await;
    assert!(listed(&lab).await.used_at_ms >= key.tested_at_ms);
    let output = lab.admin_cli("anna", &["keys", "list"]).await.stdout;
    assert!(
        output.contains("egress address whitelisted for this key"),
        "{output}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn key_without_ip_restriction_is_at_risk_with_a_single_reason() {
    // Created in 2023, which is more than 30 days ago.
    let mut lab = started(SimKey::fake(MAIN_UID)).await;
    let expected = "The key has no IP restriction, so anyone who obtains it can trade with it, and KuCoin deletes it or \
                removes its trade permissions after 30 days without use. Enter 127.0.0.1 under API Management > Edit > \
                IP restriction.";
    expect(&lab, "at-risk", &[expected]).await;
    lab.stop().await;
}

#[tokio::test]
async fn expiring_key_becomes_expired_without_another_test() {
    let now_ms = credbroker::clock::Clock::system().wall_ms();
    let expiring_in = |ms: i64| SimKey {
        expires_at_ms: Some(now_ms + ms),
        ..good()
    };
    let mut lab = started(expiring_in(10 * DAY_MS)).await;
    expect(
        &lab,
        "expiring",
        &["The key expires in 9 days. At least 14 days are required. Create a new key"],
    )
    .await;
    assert_eq!(listed(&lab).await.expires_at_ms, now_ms + 10 * DAY_MS);
    lab.stop().await;

    let mut lab = started(expiring_in(4000)).await;
    expect(&lab, "expiring", &["The key expires in less than a day. "]).await;
    let expected = ["The key has expired. KuCoin rejects all requests with it. Create a new key"];
    expect(&lab, "refused", &expected).await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(send(&mut bot, accounts()).await.0, "400003");
    expect(&lab, "refused", &expected).await;
    lab.stop().await;
}

#[tokio::test]
async fn rejected_key_stays_rejected_until_a_request_or_test_succeeds() {
    let mut lab = started(good()).await;
    expect(&lab, "active", &[]).await;
    let mut bot = lab.patient_bot("maker").await;
    send(&mut bot, accounts()).await;
    for by_test in [false, true, false] {
        lab.kucoin.remove_key(&good().api_key);
        let (code, advice) = send(&mut bot, accounts()).await;
        assert_eq!(code, "400003");
        expect(&lab, "refused", &[&advice]).await;
        lab.kucoin.add_key(good());
        if by_test {
            assert!(test_key(&lab).await.findings.is_empty());
        } else {
            send(&mut bot, accounts()).await;
        }
        expect(&lab, "active", &[]).await;
    }
    lab.stop().await;
}

#[tokio::test]
async fn key_rejected_by_a_test_stays_rejected_until_a_request_succeeds() {
    let mut lab = installed(good(), Settings::default()).await;
    lab.kucoin.remove_key(&good().api_key);
    lab.start_broker().await;
    expect(
        &lab,
        "refused",
        &["KuCoin reports that this API key does not exist. "],
    )
    .await;
    lab.kucoin.add_key(good());
    let mut bot = lab.patient_bot("maker").await;
    send(&mut bot, accounts()).await;
    expect(&lab, "active", &[]).await;
    lab.stop().await;
}

#[tokio::test]
async fn whitelist_without_the_egress_address_is_reported_once_with_the_address() {
    let elsewhere = SimKey {
        ip_whitelist: vec!["203.0.113.9".parse().unwrap()],
        ..good()
    };
    let mut lab = started(elsewhere).await;
    let expected = "The request's IP address is not whitelisted for this API key. The key has an IP restriction, \
                and this address is not on its list. Add 127.0.0.1 to the key's addresses";
    expect(&lab, "refused", &[expected]).await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(send(&mut bot, accounts()).await.0, "400006");
    expect(&lab, "refused", &[expected]).await;
    lab.stop().await;

    // Requests work now, but would not from `expected_ip`.
    let settings = Settings {
        egress: "expected_ip = \"127.0.0.9\"\nproof = \"lenient\"\n".to_owned(),
        ..Settings::default()
    };
    let mut lab = installed(good(), settings).await;
    lab.start_broker().await;
    let expected = "The key's IP restriction does not include 127.0.0.9, the broker's expected egress address \
                    (egress.expected_ip); it includes 127.0.0.1. If 127.0.0.9 is right, add it under";
    expect(&lab, "degraded", &[expected]).await;
    assert_eq!(listed(&lab).await.is_whitelisted, Some(false));
    lab.stop().await;
}

#[tokio::test]
async fn rejected_address_is_reported_until_a_request_of_the_key_is_accepted() {
    let mut lab = started(good()).await;
    expect(&lab, "active", &[]).await;
    assert_eq!(listed(&lab).await.is_whitelisted, Some(true));
    lab.kucoin.add_key(SimKey {
        ip_whitelist: vec!["203.0.113.9".parse().unwrap()],
        ..good()
    });
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(send(&mut bot, accounts()).await.0, "400006");
    // The last test returned the old whitelist.
    assert_eq!(listed(&lab).await.is_whitelisted, Some(false));
    let rejected = "s ago the exchange rejected a request because 127.0.0.1 is not on the whitelist of its key (400006)";
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(text.contains(rejected), "{text}");
    lab.kucoin.add_key(good());
    send(&mut bot, accounts()).await;
    assert_eq!(listed(&lab).await.is_whitelisted, Some(true));
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(!text.contains("400006"), "{text}");
    lab.stop().await;
}

#[tokio::test]
async fn wrong_permissions_degrade_a_key_and_lacking_all_needed_ones_refuses_it() {
    let with = |permissions: &[&str]| SimKey {
        permissions: permissions.iter().map(|&one| one.to_owned()).collect(),
        ..good()
    };
    let mut lab = started(with(&["Spot", "Margin", "Futures", "Unified", "Transfer"])).await;
    let expected = "The key has the permission Withdrawal, which allows withdrawals without a second factor. Untick \
                Withdrawal under";
    expect(&lab, "degraded", &[expected]).await;
    lab.stop().await;

    let mut lab = started(with(&["Futures", "Unified"])).await;
    let lacks_spot = "The key lacks the permission Spot, which scope spot-margin needs; it has General, Futures, Unified. \
                      Tick Spot under";
    expect(&lab, "degraded", &[lacks_spot]).await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(send(&mut bot, spot_order("lacking")).await.0, "400007");
    expect(&lab, "degraded", &[lacks_spot]).await;
    lab.stop().await;

    let rules = RULES.replace(", futures = \"main\", unified = \"main\"", "");
    let rules = rules.split("[[grant]]").take(2).collect::<Vec<_>>();
    let settings = Settings {
        rules: rules.join("[[grant]]"),
        ..Settings::default()
    };
    let mut lab = installed(with(&[]), settings).await;
    lab.start_broker().await;
    expect(
        &lab,
        "refused",
        &["The key lacks the permission Spot, which scope spot-margin needs; it has General."],
    )
    .await;
    lab.stop().await;
}

#[tokio::test]
async fn keys_of_a_halted_account_show_how_to_lift_each_halt() {
    let mut lab = started(good()).await;
    expect(&lab, "active", &[]).await;
    let mut admin = lab.admin_client("anna").await;
    let by_name = "halted; to resume, run `credbroker resume main`";
    let of_all = "halted; to resume, run `credbroker resume --all`";
    for (account, reasons) in [("main", &[by_name][..]), ("", &[of_all, by_name])] {
        let halt = HaltRequest {
            account: account.to_owned(),
            all: account.is_empty(),
            ..HaltRequest::default()
        };
        admin.halt(halt).await.unwrap();
        expect(&lab, "frozen", reasons).await;
    }
    for (account, status, reasons) in [("", "frozen", &[by_name][..]), ("main", "active", &[])] {
        let resume = ResumeRequest {
            account: account.to_owned(),
            all: account.is_empty(),
        };
        admin.resume(resume).await.unwrap();
        expect(&lab, status, reasons).await;
    }
    lab.stop().await;
}

#[tokio::test]
async fn revoked_key_is_reported_as_revoked_and_its_successor_is_not() {
    let mut lab = started(good()).await;
    expect(&lab, "active", &[]).await;
    let mut admin = lab.admin_client("anna").await;
    let revoke = RevokeKeyRequest {
        account: "main".to_owned(),
        key: "main".to_owned(),
    };
    admin.revoke_key(revoke).await.unwrap();
    let by_anna = "spiffe://demo.test/admin/anna has revoked it; register another key";
    let expected = format!("not available: version 1: {by_anna}");
    expect(&lab, "revoked", &[&expected]).await;
    lab.stop().await;
    lab.start_broker().await;
    expect(&lab, "revoked", &[&expected]).await;

    lab.kucoin.add_key(next());
    lab.put_key("main", "main", &next());
    expect(&lab, "active", &[]).await;
    set_state(&lab, "disabled");
    let disabled = "not available: disabled in Vault (state=disabled in its custom metadata)";
    expect(&lab, "unavailable", &[disabled]).await;
    // The revoked key stays revoked if it is written again.
    set_state(&lab, "active");
    expect(&lab, "active", &[]).await;
    lab.put_key("main", "main", &good());
    let expected = format!("using version 2 because of this problem: version 3: {by_anna}");
    expect(&lab, "degraded", &[&expected]).await;
    lab.stop().await;
}

fn set_state(lab: &Lab, state: &str) {
    let custom = BTreeMap::from([("state".to_owned(), state.to_owned())]);
    lab.vault
        .set_custom_metadata("kv", &kv_path("main", "main"), custom);
}

#[tokio::test]
async fn key_that_cannot_be_read_from_vault_is_unavailable() {
    let mut lab = installed(good(), Settings::default()).await;
    lab.vault.stop().await.unwrap();
    lab.start_broker().await;
    expect(&lab, "unavailable", &["waiting for Vault: "]).await;
    lab.vault.restart().await.unwrap();
    expect(&lab, "active", &[]).await;
    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    let gone = "not available: Vault has no such key (404)";
    expect(&lab, "unavailable", &[gone]).await;
    lab.stop().await;
}

#[tokio::test]
async fn key_is_degraded_while_vault_is_down_or_its_new_version_is_rejected() {
    let rules = RULES.replace("[account.main]", "[account.main]\nmax_stale_s = 60");
    let settings = Settings {
        rules,
        ..Settings::default()
    };
    let mut lab = installed(good(), settings).await;
    let time = Time::new(0);
    lab.start_broker_on(time.clock()).await;
    expect(&lab, "active", &[]).await;
    lab.put_key("main", "main", &next());
    let unused = "using version 1 because of this problem: version 2 was rejected: KuCoin reports that this API key does not exist. ";
    expect(&lab, "degraded", &[unused]).await;
    lab.put_key("main", "main", &good());
    expect(&lab, "active", &[]).await;

    lab.vault.stop().await.unwrap();
    let silent = "cached; Vault last confirmed the key ";
    expect(&lab, "degraded", &[silent]).await;
    time.sleep(&lab, 2 * MINUTE);
    let too_old = "too old for risk-increasing requests; Vault last confirmed the key 12";
    expect(&lab, "degraded", &[too_old]).await;
    lab.stop().await;
}

#[tokio::test]
async fn key_is_untested_while_kucoin_does_not_respond_and_keeps_earlier_results() {
    let mut lab = installed(SimKey::fake(MAIN_UID), Settings::default()).await;
    let silent = Fault {
        times: None,
        ..Fault::once(
            INFO,
            FaultAction::Close {
                when: When::BeforeProcessing,
            },
        )
    };
    lab.kucoin.fault(silent.clone());
    lab.start_broker().await;
    expect(&lab, "untested", &["it could not be tested yet: "]).await;
    assert_eq!(listed(&lab).await.tested_at_ms, 0);
    let mut bot = lab.patient_bot("maker").await;
    send(&mut bot, accounts()).await;
    expect(&lab, "active", &["it could not be tested yet: "]).await;
    lab.kucoin.clear_faults();
    test_key(&lab).await;
    let at_risk = "The key has no IP restriction, ";
    expect(&lab, "at-risk", &[at_risk]).await;
    let tested_at_ms = listed(&lab).await.tested_at_ms;
    lab.kucoin.fault(silent);
    assert!(test_key(&lab).await.is_inconclusive);
    let no_answer = "the last test was inconclusive: ";
    expect(&lab, "at-risk", &[at_risk, no_answer]).await;
    assert_eq!(listed(&lab).await.tested_at_ms, tested_at_ms);
    lab.stop().await;
}

/// How often key `main/main` was tested at the exchange.
fn count_tests(lab: &Lab) -> usize {
    let mut requests = lab.kucoin.everything_received();
    let id = good().api_key;
    requests.retain(|request| {
        request.path() == INFO && request.header("kc-api-key") == Some(id.as_str())
    });
    requests.len()
}

/// Waits for some more polls of Vault.
async fn until_polled(lab: &Lab) {
    let before = lab.vault.requests().len();
    until("polls have passed", async || {
        lab.vault.requests().len() >= before + 6
    })
    .await;
}

#[tokio::test]
async fn background_test_repeats_after_ten_to_twelve_minutes_and_updates_the_status() {
    let mut lab = installed(good(), Settings::default()).await;
    let time = Time::new(0);
    lab.start_broker_on(time.clock()).await;
    expect(&lab, "active", &[]).await;
    let cases = [
        (
            SimKey {
                permissions: vec!["Futures".to_owned(), "Unified".to_owned()],
                ..good()
            },
            "degraded",
            "The key lacks the permission Spot, ",
        ),
        (
            SimKey {
                ip_whitelist: vec!["203.0.113.9".parse().unwrap()],
                ..good()
            },
            "refused",
            "The request's IP address is not whitelisted ",
        ),
        (
            SimKey::fake(MAIN_UID),
            "at-risk",
            "The key has no IP restriction, ",
        ),
    ];
    for (number, (key, status, reason)) in cases.into_iter().enumerate() {
        lab.kucoin.add_key(key);
        time.pass(&lab, 9 * MINUTE).await;
        until_polled(&lab).await;
        assert_eq!(count_tests(&lab), number + 1, "not before ten minutes");
        time.pass(&lab, 3 * MINUTE).await;
        expect(&lab, status, &[reason]).await;
        until_polled(&lab).await;
        assert_eq!(count_tests(&lab), number + 2, "once");
    }
    lab.stop().await;
}

/// The output of `credbroker explain` for a code, with the address and permission of this exchange filled in.
fn explained(code: &str) -> String {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_credbroker"))
        .args(["explain", code, "--json"])
        .output()
        .unwrap();
    let explanation: Value = serde_json::from_slice(&output.stdout).unwrap();
    let part = |name: &str| explanation[name].as_str().unwrap().to_owned();
    let permission = "the permission that KuCoin's documentation names for this request";
    let fix = part("fix")
        .replace("the broker's egress address", "127.0.0.1")
        .replace(permission, "the permission Spot");
    format!("{} {} {fix}", part("meaning"), part("cause"))
}

#[tokio::test]
async fn rejection_has_the_same_text_for_bots_and_in_test_list_and_explain() {
    let mut lab = started(good()).await;
    expect(&lab, "active", &[]).await;
    let mut bot = lab.patient_bot("maker").await;
    for code in ["400003", "400004", "400005", "400006", "400007"] {
        let rejection = FaultAction::Answer {
            status: 200,
            body: json!({"code": code, "msg": "Refused, current ip: 127.0.0.1"}),
            when: When::BeforeProcessing,
        };
        for path in [INFO, "/api/v1/hf/orders"] {
            lab.kucoin.fault(Fault::once(path, rejection.clone()));
        }
        let expected = explained(code);
        let answer = send(&mut bot, spot_order(&format!("refused-{code}"))).await;
        assert_eq!(answer, (code.to_owned(), expected.clone()));
        let status = if code == "400007" {
            "degraded"
        } else {
            "refused"
        };
        expect(&lab, status, &[&expected]).await;
        assert_eq!(listed(&lab).await.reasons, [expected.as_str()]);
        let findings = test_key(&lab).await.findings;
        let found: Vec<_> = findings
            .iter()
            .map(|finding| format!("{} {}", finding.cause, finding.fix))
            .collect();
        assert_eq!(found, [expected.as_str()], "{code}");
        // The same reason from a request and from a test is listed once.
        expect(&lab, "refused", &[&expected]).await;
        assert_eq!(listed(&lab).await.reasons, [expected]);
        until("a request is accepted again", async || {
            send(&mut bot.clone(), accounts()).await;
            listed(&lab).await.status() == KeyStatus::Active
        })
        .await;
    }
    lab.stop().await;
}

#[tokio::test]
async fn text_from_vault_and_kucoin_is_sanitized_in_readyz() {
    let mut lab = started(SimKey {
        permissions: vec!["Spot\u{1b}[2J\nready".to_owned()],
        ..good()
    })
    .await;
    let malicious = "9\u{1b}[2J\nready";
    let metadata = [("use_version".to_owned(), malicious.to_owned())];
    let path = kv_path("main", "main");
    lab.vault.set_custom_metadata("kv", &path, metadata.into());
    until("readyz shows the invalid use_version", async || {
        lab.get("/readyz?verbose").await.1.contains("use_version=9")
    })
    .await;
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(!text.contains('\u{1b}'), "{text:?}");
    // Only the first line tells whether it is ready; `other` may still be loading.
    let mut injected = text.lines().skip(1);
    assert!(!injected.any(|line| line.starts_with("ready")), "{text}");
    lab.stop().await;
}
