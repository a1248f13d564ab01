//! How each key is, in one word and whole sentences: the same in `ListKeys`, in `/readyz?verbose` and in the metrics.

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

/// All that a key can be.
const WORDS: [&str; 9] = [
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

/// A key with which nothing is wrong.
fn good() -> SimKey {
    SimKey {
        ip_whitelist: vec!["127.0.0.1".parse().unwrap()],
        ..SimKey::fake(MAIN_UID)
    }
}

/// Another one of the same account.
fn next() -> SimKey {
    SimKey {
        api_key: "simulated-next-key".to_owned(),
        ..good()
    }
}

/// An installation whose exchange knows `key`, and whose broker has not started.
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

/// What the broker says of key `main/main` now.
async fn listed(lab: &Lab) -> KeyState {
    let mut admin = lab.admin_client("anna").await;
    let keys = admin.list_keys(ListKeysRequest {}).await;
    let mut keys = keys.unwrap().into_inner().keys;
    keys.retain(|key| key.account == "main");
    keys.remove(0)
}

/// Waits until key `main/main` is this in all three places, for reasons that begin with these and no others.
async fn expect(lab: &Lab, word: &str, reasons: &[&str]) {
    let is_it = |key: &KeyState| {
        let mut told = key.reasons.iter().zip(reasons);
        key.status().word() == word
            && key.reasons.len() == reasons.len()
            && told.all(|(told, expected)| told.starts_with(expected))
    };
    until(&format!("main/main is {word}: {reasons:?}"), async || {
        is_it(&listed(lab).await)
    })
    .await;
    let (_, text) = lab.get("/readyz?verbose").await;
    let mut lines: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("key main/main: "))
        .filter(|line| !line.contains(" loaded"))
        .collect();
    assert_eq!(lines.iter().filter(|line| **line == word).count(), 1);
    lines.retain(|line| *line != word);
    assert_eq!(lines.len(), reasons.len(), "{lines:#?}");
    for reason in reasons {
        let found = lines.iter().any(|line| line.starts_with(reason));
        assert!(found, "{reason} is not in {lines:#?}");
    }
    for known in WORDS {
        let metric = format!("key_status{{account=\"main\",key=\"main\",status=\"{known}\"}}");
        let expected = f64::from(u8::from(known == word));
        assert_eq!(lab.metric(&metric).await, Some(expected), "{known}");
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

/// What a bot is told: code and advice.
async fn sent(bot: &mut Bot<Patient>, request: SignAndSendRequest) -> (String, String) {
    let answer = bot.send(request).await.unwrap();
    let is_taken = answer.outcome() == Outcome::Accepted;
    assert_eq!(is_taken, answer.advice.is_empty(), "{answer:?}");
    (answer.code, answer.advice)
}

#[tokio::test]
async fn a_key_with_which_nothing_is_wrong_is_connected_once_it_is_tested() {
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
    sent(&mut bot, accounts()).await;
    assert!(listed(&lab).await.used_at_ms >= key.tested_at_ms);
    let shown = lab.admin_cli("anna", &["keys", "list"]).await.stdout;
    assert!(shown.contains("our address is on its whitelist"), "{shown}");
    lab.stop().await;
}

#[tokio::test]
async fn a_key_without_ip_restriction_is_at_risk_of_the_thirty_day_rule_and_one_sentence_says_so() {
    // Made in 2023: past the 30 days, too.
    let mut lab = started(SimKey::fake(MAIN_UID)).await;
    let told = "The key has no IP restriction, so whoever gets hold of it can trade with it, and KuCoin deletes it or \
                takes its trade permissions away after 30 days without use. Enter 127.0.0.1 under API Management > Edit > \
                IP restriction.";
    expect(&lab, "at-risk", &[told]).await;
    lab.stop().await;
}

#[tokio::test]
async fn a_key_expires_and_then_has_expired_without_another_test() {
    let now_ms = credbroker::clock::Clock::system().wall_ms();
    let ends = |ms: i64| SimKey {
        expires_at_ms: Some(now_ms + ms),
        ..good()
    };
    let mut lab = started(ends(10 * DAY_MS)).await;
    expect(
        &lab,
        "expiring",
        &["The key expires in 9 days. At least 14 days are asked for. Create a new key"],
    )
    .await;
    assert_eq!(listed(&lab).await.expires_at_ms, now_ms + 10 * DAY_MS);
    lab.stop().await;

    let mut lab = started(ends(4000)).await;
    expect(&lab, "expiring", &["The key expires in less than a day. "]).await;
    let told = ["The key has expired. KuCoin takes no more requests with it. Create a new key"];
    expect(&lab, "refused", &told).await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(sent(&mut bot, accounts()).await.0, "400003");
    expect(&lab, "refused", &told).await;
    lab.stop().await;
}

#[tokio::test]
async fn a_key_that_a_request_finds_refused_is_refused_until_a_request_or_a_test_is_taken() {
    let mut lab = started(good()).await;
    expect(&lab, "active", &[]).await;
    let mut bot = lab.patient_bot("maker").await;
    sent(&mut bot, accounts()).await;
    for by_test in [false, true, false] {
        lab.kucoin.remove_key(&good().api_key);
        let (code, advice) = sent(&mut bot, accounts()).await;
        assert_eq!(code, "400003");
        expect(&lab, "refused", &[&advice]).await;
        lab.kucoin.add_key(good());
        if by_test {
            assert!(test_key(&lab).await.findings.is_empty());
        } else {
            sent(&mut bot, accounts()).await;
        }
        expect(&lab, "active", &[]).await;
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_key_that_a_test_finds_refused_is_refused_until_a_request_is_taken() {
    let mut lab = installed(good(), Settings::default()).await;
    lab.kucoin.remove_key(&good().api_key);
    lab.start_broker().await;
    expect(&lab, "refused", &["KuCoin does not know this API key. "]).await;
    lab.kucoin.add_key(good());
    let mut bot = lab.patient_bot("maker").await;
    sent(&mut bot, accounts()).await;
    expect(&lab, "active", &[]).await;
    lab.stop().await;
}

#[tokio::test]
async fn a_whitelist_without_our_address_is_told_with_the_address_once() {
    let elsewhere = SimKey {
        ip_whitelist: vec!["203.0.113.9".parse().unwrap()],
        ..good()
    };
    let mut lab = started(elsewhere).await;
    let told = "KuCoin takes no requests with this API key from the address that this one came from. The key is restricted \
                to certain IP addresses, and this one is not among them. Add 127.0.0.1 to the key's addresses";
    expect(&lab, "refused", &[told]).await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(sent(&mut bot, accounts()).await.0, "400006");
    expect(&lab, "refused", &[told]).await;
    lab.stop().await;

    // It works now, and will not from the address that is meant.
    let settings = Settings {
        egress: "expected_ip = \"127.0.0.9\"\nproof = \"lenient\"\n".to_owned(),
        ..Settings::default()
    };
    let mut lab = installed(good(), settings).await;
    lab.start_broker().await;
    let told = "The key's IP restriction does not have 127.0.0.9, the address that KuCoin sees; it has 127.0.0.1. Add \
                127.0.0.9 under";
    expect(&lab, "degraded", &[told]).await;
    assert_eq!(listed(&lab).await.is_whitelisted, Some(false));
    lab.stop().await;
}

#[tokio::test]
async fn a_key_with_wrong_permissions_is_degraded_and_refused_where_it_has_none_that_it_needs() {
    let with = |permissions: &[&str]| SimKey {
        permissions: permissions.iter().map(|&one| one.to_owned()).collect(),
        ..good()
    };
    let mut lab = started(with(&["Spot", "Margin", "Futures", "Unified", "Transfer"])).await;
    let told = "The key has the permission Withdrawal, which sends money away without asking for a second factor. Untick \
                Withdrawal under";
    expect(&lab, "degraded", &[told]).await;
    lab.stop().await;

    let mut lab = started(with(&["Futures", "Unified"])).await;
    let lacks_spot = "The key lacks the permission Spot, which scope spot-margin needs; it has General, Futures, Unified. \
                      Tick Spot under";
    expect(&lab, "degraded", &[lacks_spot]).await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(sent(&mut bot, spot_order("lacking")).await.0, "400007");
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
async fn keys_of_a_halted_account_say_how_each_halt_ends() {
    let mut lab = started(good()).await;
    expect(&lab, "active", &[]).await;
    let mut admin = lab.admin_client("anna").await;
    let by_name = "halted: `credbroker resume main` lifts it";
    let of_all = "halted: `credbroker resume --all` lifts it";
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
async fn a_revoked_key_is_revoked_and_what_becomes_of_the_next_one_is_not() {
    let mut lab = started(good()).await;
    expect(&lab, "active", &[]).await;
    let mut admin = lab.admin_client("anna").await;
    let revoke = RevokeKeyRequest {
        account: "main".to_owned(),
        key: "main".to_owned(),
    };
    admin.revoke_key(revoke).await.unwrap();
    let by_anna = "spiffe://demo.test/admin/anna has revoked it; register another key";
    let found = format!("not available: version 1: {by_anna}");
    expect(&lab, "revoked", &[&found]).await;
    lab.stop().await;
    lab.start_broker().await;
    expect(&lab, "revoked", &[&found]).await;

    lab.kucoin.add_key(next());
    lab.put_key("main", "main", &next());
    expect(&lab, "active", &[]).await;
    set_state(&lab, "disabled");
    let disabled = "not available: its metadata in Vault says state=disabled";
    expect(&lab, "unavailable", &[disabled]).await;
    // And the revoked one is no better for being written again.
    set_state(&lab, "active");
    expect(&lab, "active", &[]).await;
    lab.put_key("main", "main", &good());
    let kept = format!("using version 2: version 3: {by_anna}");
    expect(&lab, "degraded", &[&kept]).await;
    lab.stop().await;
}

fn set_state(lab: &Lab, state: &str) {
    let custom = BTreeMap::from([("state".to_owned(), state.to_owned())]);
    lab.vault
        .set_custom_metadata("kv", &kv_path("main", "main"), custom);
}

#[tokio::test]
async fn a_key_that_vault_does_not_give_is_unavailable() {
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
async fn a_key_that_vault_does_not_confirm_or_will_not_replace_is_degraded() {
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
    let unused = "using version 1: version 2 is refused: KuCoin does not know this API key. ";
    expect(&lab, "degraded", &[unused]).await;
    lab.put_key("main", "main", &good());
    expect(&lab, "active", &[]).await;

    lab.vault.stop().await.unwrap();
    let silent = "cached; Vault last confirmed it ";
    expect(&lab, "degraded", &[silent]).await;
    time.sleep(&lab, 2 * MINUTE);
    let too_old = "too old for risk-increasing requests; Vault last confirmed it 12";
    expect(&lab, "degraded", &[too_old]).await;
    lab.stop().await;
}

#[tokio::test]
async fn a_key_is_untested_while_the_exchange_does_not_answer_and_what_it_said_before_stays() {
    let mut lab = installed(SimKey::fake(MAIN_UID), Settings::default()).await;
    let silent = Fault {
        times: None,
        ..Fault::once(
            INFO,
            FaultAction::Close {
                when: When::BeforeTaken,
            },
        )
    };
    lab.kucoin.fault(silent.clone());
    lab.start_broker().await;
    expect(&lab, "untested", &["it could not be tested yet: "]).await;
    assert_eq!(listed(&lab).await.tested_at_ms, 0);
    let mut bot = lab.patient_bot("maker").await;
    sent(&mut bot, accounts()).await;
    expect(&lab, "active", &["it could not be tested yet: "]).await;
    lab.kucoin.clear_faults();
    test_key(&lab).await;
    let at_risk = "The key has no IP restriction, ";
    expect(&lab, "at-risk", &[at_risk]).await;
    let tested_at_ms = listed(&lab).await.tested_at_ms;
    lab.kucoin.fault(silent);
    assert!(test_key(&lab).await.is_unclear);
    let no_answer = "the last test got no answer: ";
    expect(&lab, "at-risk", &[at_risk, no_answer]).await;
    assert_eq!(listed(&lab).await.tested_at_ms, tested_at_ms);
    lab.stop().await;
}

/// How often the exchange has been asked about key `main/main`.
fn tests(lab: &Lab) -> usize {
    let mut requests = lab.kucoin.everything_received();
    let id = good().api_key;
    requests.retain(|request| {
        request.path() == INFO && request.header("kc-api-key") == Some(id.as_str())
    });
    requests.len()
}

/// Vault is polled some more, and nothing else comes due.
async fn polled(lab: &Lab) {
    let before = lab.vault.requests().len();
    until("polls have passed", async || {
        lab.vault.requests().len() >= before + 6
    })
    .await;
}

#[tokio::test]
async fn the_background_check_comes_again_after_ten_to_twelve_minutes_and_changes_the_status() {
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
            "KuCoin takes no requests with this API key from the address ",
        ),
        (
            SimKey::fake(MAIN_UID),
            "at-risk",
            "The key has no IP restriction, ",
        ),
    ];
    for (number, (key, word, reason)) in cases.into_iter().enumerate() {
        lab.kucoin.add_key(key);
        time.pass(&lab, 9 * MINUTE).await;
        polled(&lab).await;
        assert_eq!(tests(&lab), number + 1, "not before ten minutes");
        time.pass(&lab, 3 * MINUTE).await;
        expect(&lab, word, &[reason]).await;
        polled(&lab).await;
        assert_eq!(tests(&lab), number + 2, "once");
    }
    lab.stop().await;
}

/// What `credbroker explain` says of a code, with the facts of this exchange put in.
fn explained(code: &str) -> String {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_credbroker"))
        .args(["explain", code, "--json"])
        .output()
        .unwrap();
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let part = |name: &str| told[name].as_str().unwrap().to_owned();
    let permission = "the permission that KuCoin's documentation names for this request";
    let fix = part("fix")
        .replace("the broker's egress address", "127.0.0.1")
        .replace(permission, "the permission Spot");
    format!("{} {} {fix}", part("meaning"), part("cause"))
}

#[tokio::test]
async fn bots_tests_lists_and_explanations_say_the_same_of_a_refusal() {
    let mut lab = started(good()).await;
    expect(&lab, "active", &[]).await;
    let mut bot = lab.patient_bot("maker").await;
    for code in ["400003", "400004", "400005", "400006", "400007"] {
        let refused = FaultAction::Answer {
            status: 200,
            body: json!({"code": code, "msg": "Refused, current ip: 127.0.0.1"}),
            when: When::BeforeTaken,
        };
        for path in [INFO, "/api/v1/hf/orders"] {
            lab.kucoin.fault(Fault::once(path, refused.clone()));
        }
        let expected = explained(code);
        let told = sent(&mut bot, spot_order(&format!("refused-{code}"))).await;
        assert_eq!(told, (code.to_owned(), expected.clone()));
        let word = if code == "400007" {
            "degraded"
        } else {
            "refused"
        };
        expect(&lab, word, &[&expected]).await;
        assert_eq!(listed(&lab).await.reasons, [expected.as_str()]);
        let findings = test_key(&lab).await.findings;
        let found: Vec<_> = findings
            .iter()
            .map(|finding| format!("{} {}", finding.cause, finding.fix))
            .collect();
        assert_eq!(found, [expected.as_str()], "{code}");
        // The same from two sides is one reason.
        expect(&lab, "refused", &[&expected]).await;
        assert_eq!(listed(&lab).await.reasons, [expected]);
        until("a request is taken after that", async || {
            sent(&mut bot.clone(), accounts()).await;
            listed(&lab).await.status() == KeyStatus::Active
        })
        .await;
    }
    lab.stop().await;
}

#[tokio::test]
async fn what_vault_and_the_exchange_write_adds_no_line_and_moves_no_cursor() {
    let mut lab = started(SimKey {
        permissions: vec!["Spot\u{1b}[2J\nready".to_owned()],
        ..good()
    })
    .await;
    let odd = "9\u{1b}[2J\nready";
    let notes = [("use_version".to_owned(), odd.to_owned())];
    let path = kv_path("main", "main");
    lab.vault.set_custom_metadata("kv", &path, notes.into());
    until("the odd note shows", async || {
        lab.get("/readyz?verbose").await.1.contains("use_version=9")
    })
    .await;
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(!text.contains('\u{1b}'), "{text:?}");
    let heads = text.lines().filter(|line| line.starts_with("ready"));
    assert_eq!(heads.count(), 1, "{text}");
    lab.stop().await;
}
