//! `keys register`: which keys it rejects with which messages, and what it stores.

use std::process::{Command, Stdio};

use credbroker::proto::RevokeKeyRequest;
use credbroker_sim::installation::{ROOT_TOKEN, Settings, kv_path};
use credbroker_sim::kucoin::{Amount, KucoinSettings, Limits, SimKey, Site, Wallet};
use credbroker_sim::vault::{Fault, FaultRule, VaultSim};
use serde_json::{Value, json};

use super::real::Api;
use crate::harness::{CommandOutput, Lab, until};

/// Accounts for each purpose and scope; `other` has a key from the start.
const RULES: &str = r#"
[account.futures]
key = { futures = "main" }

[account.many]
key = { spot-margin = "main", futures = "main", unified = "main" }

[account.mover]
allow_money_out = true
key = { spot-margin = "main" }

[account.other]
key = { spot-margin = "main" }

[account.partner]
key = { spot-margin = "main" }
[account.partner.partner.spot-margin]
id = "FakePartner"

[account.reader]
purpose = "read-only"
key = { spot-margin = "main" }

[account.spot]
key = { spot-margin = "main" }

[account.two]
key = { spot-margin = "first", futures = "second" }

[account.unified]
key = { unified = "main" }
"#;

const UID_OF_OTHER: u64 = 1002;

pub(super) fn settings() -> Settings {
    Settings {
        rules: RULES.to_owned(),
        keys: vec![("other", "main", UID_OF_OTHER)],
        wait_ready: false,
        ..Settings::default()
    }
}

/// An installation with the files of an admin.
pub(super) async fn lab(settings: Settings) -> Lab {
    let lab = Lab::with(settings).await;
    lab.write_admin_files(&lab.ca.admin("anna").unwrap());
    lab
}

/// A fake key in KuCoin's format; its whitelist has the address that the simulated exchange sees.
pub(crate) fn key(number: u64, permissions: &[&str]) -> SimKey {
    SimKey {
        api_key: format!("{number:024x}"),
        api_secret: format!("00000000-0000-4000-8000-{number:012x}"),
        passphrase: format!("simulated-pass-{number}"),
        permissions: permissions.iter().map(|&one| one.to_owned()).collect(),
        ip_whitelist: vec!["127.0.0.1".parse().unwrap()],
        ..SimKey::fake(2000 + number)
    }
}

/// A key as an admin pipes it to stdin.
pub(crate) fn lines(key: &SimKey) -> String {
    format!("{}\n{}\n{}\n", key.api_key, key.api_secret, key.passphrase)
}

/// Runs a command; checks that its output contains no value of the key and no line over 80 columns.
pub(super) async fn run(lab: &Lab, words: &[&str], key: &SimKey, input: &str) -> (i32, String) {
    let CommandOutput {
        code,
        stdout,
        stderr,
    } = lab.cli(words, input).await;
    let output = format!("{stdout}\n{stderr}");
    for value in [&key.api_key, &key.api_secret, &key.passphrase] {
        assert!(!output.contains(value.as_str()), "{output}");
    }
    // Exit code 2: the output comes from clap.
    let lines = output.lines().filter(|_| code != Some(2));
    for line in lines.filter(|line| line.contains(' ')) {
        assert!(line.chars().count() <= 80, "{line:?} in {output}");
    }
    let words: Vec<_> = output.split_whitespace().collect();
    (code.unwrap(), words.join(" "))
}

/// Reads keys in Vault with the root token.
pub(super) struct StoredKeys(Api);

impl StoredKeys {
    pub(super) fn of(lab: &Lab) -> Self {
        Self(Api::new(&lab.vault.address(), ROOT_TOKEN))
    }

    /// The metadata of a key; null if there is no such key.
    pub(super) async fn metadata(&self, account: &str, name: &str) -> Value {
        let path = format!("/v1/kv/metadata/{}", kv_path(account, name));
        let (status, text) = self.0.raw("GET", &path, None).await;
        if status == 404 {
            return Value::Null;
        }
        let answer: Value = serde_json::from_str(&text).unwrap();
        answer["data"].clone()
    }

    /// The number of the newest version; 0 if there is none.
    pub(super) async fn newest(&self, account: &str) -> u64 {
        let metadata = self.metadata(account, "main").await;
        metadata["current_version"].as_u64().unwrap_or_default()
    }

    /// An entry of a key's custom metadata.
    pub(super) async fn note(&self, account: &str, note: &str) -> Value {
        self.metadata(account, "main").await["custom_metadata"][note].clone()
    }

    /// The values of one version.
    pub(super) async fn version(&self, account: &str, version: u64) -> Value {
        let path = format!("kv/data/{}?version={version}", kv_path(account, "main"));
        let answer = self.0.call("GET", &path, Value::Null).await;
        answer["data"]["data"].clone()
    }
}

/// Whether `values` from Vault are those of this key.
pub(super) fn matches_key(values: &Value, key: &SimKey) -> bool {
    values["api_key"] == key.api_key.as_str()
        && values["api_secret"] == key.api_secret.as_str()
        && values["passphrase"] == key.passphrase.as_str()
        && values["key_version"] == json!(key.version.to_string())
}

/// A key that `keys register` must reject.
struct Refusal {
    name: &'static str,
    account: &'static str,
    /// As the exchange has it.
    key: SimKey,
    /// As the admin enters it.
    given: SimKey,
    cause: &'static str,
    fix: &'static str,
}

const SPOT: &[&str] = &["Spot", "Margin"];

fn refusals(now_ms: i64) -> Vec<Refusal> {
    let refusal = |name, account, key: SimKey, cause, fix| Refusal {
        name,
        account,
        given: key.clone(),
        key,
        cause,
        fix,
    };
    let with = |more: &[&'static str]| [SPOT, more].concat();
    let wrong = "Either the secret or the passphrase of this API key is wrong. KuCoin verifies the passphrase with the secret";
    let again = "fix: Register the key again with the exact secret and passphrase that it was created with; the passphrase is not the trading password.";
    let day_ms = 24 * 60 * 60 * 1000;
    let mut all = vec![
        refusal(
            "another site",
            "spot",
            SimKey {
                site: Site::Europe,
                ..key(2, SPOT)
            },
            "KuCoin reports that this API key does not exist. The key was deleted, has expired, or belongs to a different KuCoin site than the account.",
            "If it belongs to another site, correct `site` of the account in the rules.",
        ),
        refusal(
            "no permission for spot",
            "spot",
            key(6, &["Futures"]),
            "The key lacks the permission Spot, which scope spot-margin needs; it has General, Futures.",
            "fix: Tick Spot under API Management > Edit > API permissions.",
        ),
        refusal(
            "no permission for futures",
            "futures",
            key(7, SPOT),
            "The key lacks the permission Futures, which scope futures needs; it has General, Spot, Margin.",
            "fix: Tick Futures under API Management > Edit > API permissions.",
        ),
        refusal(
            "no permission for unified",
            "unified",
            key(8, SPOT),
            "The key lacks the permission Unified, which scope unified needs; it has General, Spot, Margin.",
            "fix: Tick Unified under API Management > Edit > API permissions.",
        ),
        refusal(
            "one of three permissions missing",
            "many",
            key(9, &["Spot", "Margin", "Unified"]),
            "The key lacks the permission Futures, which scope futures needs; it has General, Spot, Margin, Unified.",
            "fix: Tick Futures under API Management > Edit > API permissions.",
        ),
        refusal(
            "a read-only account whose key can trade",
            "reader",
            key(10, &["Spot"]),
            "The account's purpose is read-only, but the key has the permission Spot.",
            "fix: Leave only General ticked under API Management > Edit > API permissions.",
        ),
        refusal(
            "withdrawal",
            "spot",
            key(11, &with(&["Withdrawal"])),
            "The key has the permission Withdrawal, which allows withdrawals without a second factor.",
            "fix: Untick Withdrawal under API Management > Edit > API permissions. If the broker should be able to move this account's money, set allow_money_out = true for the account in the rules.",
        ),
        refusal(
            "transfers",
            "spot",
            key(12, &with(&["FlexTransfers"])),
            "The key has the permission FlexTransfers, which allows transfers between the owner's accounts.",
            "fix: Untick FlexTransfers under API Management > Edit > API permissions.",
        ),
        refusal(
            "no IP restriction",
            "spot",
            SimKey {
                ip_whitelist: Vec::new(),
                ..key(13, SPOT)
            },
            "The key has no IP restriction, so anyone who obtains it can trade with it, and KuCoin deletes it or removes its trade permissions after 30 days without use.",
            "fix: Enter 127.0.0.1 under API Management > Edit > IP restriction.",
        ),
        refusal(
            "a whitelist without the egress address",
            "spot",
            SimKey {
                ip_whitelist: vec!["203.0.113.9".parse().unwrap()],
                ..key(14, SPOT)
            },
            "The request's IP address is not whitelisted for this API key.",
            "fix: Add 127.0.0.1 to the key's addresses under API Management > Edit > IP restriction.",
        ),
        refusal(
            "an expiry in 13 days",
            "spot",
            SimKey {
                expires_at_ms: Some(now_ms + 14 * day_ms - 60_000),
                ..key(15, SPOT)
            },
            "The key expires in 13 days. At least 14 days are required.",
            "fix: Create a new key with a later expiry under API Management, and replace this one with it.",
        ),
        refusal(
            "the key of another account",
            "spot",
            SimKey {
                ip_whitelist: vec!["127.0.0.1".parse().unwrap()],
                ..SimKey::fake(UID_OF_OTHER)
            },
            "This key, or another one of the same KuCoin account, is already registered for account other (other/main).",
            "fix: Use a key of another KuCoin account or sub-account, or merge the two accounts in the rules: list the scopes of both under one account.",
        ),
        refusal(
            "another key of the same KuCoin account",
            "spot",
            SimKey {
                uid: UID_OF_OTHER,
                ..key(16, SPOT)
            },
            "This key, or another one of the same KuCoin account, is already registered for account other (other/main).",
            "fix: Use a key of another KuCoin account",
        ),
    ];
    for (name, number, cause, fix) in [
        (
            "a key that does not exist",
            1,
            "KuCoin reports that this API key does not exist.",
            "fix: Look for the key under API Management on the account's KuCoin site. If it is missing, create a new key there and register it.",
        ),
        ("a wrong secret", 3, wrong, again),
        ("a wrong passphrase", 4, wrong, again),
        (
            "the trading password",
            5,
            "note: passphrase: six digits look like the trading password; the API passphrase is the one that was chosen when the key was created",
            again,
        ),
    ] {
        let mut one = refusal(name, "spot", key(number, SPOT), cause, fix);
        match number {
            1 => one.given.api_key = format!("{:024x}", 0xdead),
            3 => "00000000-0000-4000-8000-00000000dead".clone_into(&mut one.given.api_secret),
            4 => "simulated-wrong".clone_into(&mut one.given.passphrase),
            _ => "493817".clone_into(&mut one.given.passphrase),
        }
        all.push(one);
    }
    all
}

#[tokio::test]
async fn unacceptable_key_is_rejected_with_cause_and_fix_and_nothing_is_stored() {
    let mut lab = lab(settings()).await;
    let stored = StoredKeys::of(&lab);
    until("the key of the other account is tested", async || {
        lab.metric("key_tested_timestamp_seconds{account=\"other\",key=\"main\"}")
            .await
            .is_some()
    })
    .await;
    let now_ms = credbroker::clock::Clock::system().wall_ms();
    for Refusal {
        name,
        account,
        key,
        given,
        cause,
        fix,
    } in refusals(now_ms)
    {
        lab.kucoin.add_key(key);
        let words = ["keys", "register", account];
        let (code, output) = run(&lab, &words, &given, &lines(&given)).await;
        assert_eq!(code, 1, "{name}: {output}");
        for part in [
            cause,
            fix,
            "the key failed its test; nothing was stored.",
            &format!("{account}/main has no key."),
            "fix: apply each `fix:` above, then re-run the command",
        ] {
            assert!(output.contains(part), "{name}: {part:?} is not in {output}");
        }
        assert_eq!(
            stored.metadata(account, "main").await,
            Value::Null,
            "{name}"
        );
    }
    lab.stop().await;
}

#[tokio::test]
async fn key_of_an_api_version_that_kucoin_no_longer_accepts_is_rejected() {
    let lab = lab(Settings {
        kucoin: KucoinSettings {
            limits: Limits::none(),
            oldest_key_version: 3,
            ..KucoinSettings::default()
        },
        ..settings()
    })
    .await;
    let old = SimKey {
        version: 2,
        ..key(1, SPOT)
    };
    lab.kucoin.add_key(old.clone());
    let (code, output) = run(&lab, &["keys", "register", "spot"], &old, &lines(&old)).await;
    assert_eq!(code, 1, "{output}");
    for part in [
        "KuCoin no longer accepts API keys of this version for this request.",
        "fix: Create a new key under API Management (new keys have version 3) and register it.",
    ] {
        assert!(output.contains(part), "{output}");
    }
    assert_eq!(StoredKeys::of(&lab).newest("spot").await, 0);
}

#[tokio::test]
async fn inconclusive_key_test_stores_nothing() {
    use credbroker_sim::kucoin::{Fault, FaultAction};
    let lab = lab(settings()).await;
    let good = key(1, SPOT);
    lab.kucoin.add_key(good.clone());
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once(
            "/api/v1/user/api-key",
            FaultAction::RateLimited {
                reset_ms: Some(100),
            },
        )
    });
    let words = ["keys", "register", "spot"];
    let (code, output) = run(&lab, &words, &good, &lines(&good)).await;
    assert_eq!(code, 1, "{output}");
    let expected = "the test was inconclusive: KuCoin neither accepted nor rejected the key; see `failed` above; nothing was stored. spot/main has no key.";
    assert!(output.contains(expected), "{output}");
    assert_eq!(StoredKeys::of(&lab).newest("spot").await, 0);
}

#[tokio::test]
async fn key_for_any_scope_is_registered_and_in_use_when_the_command_exits() {
    let mut lab = lab(settings()).await;
    let stored = StoredKeys::of(&lab);
    // Written by an older version of credbroker.
    let old = ["pending_version", "pending_sha256"].map(|note| (note.to_owned(), "1".to_owned()));
    lab.vault
        .set_custom_metadata("kv", &kv_path("spot", "main"), old.into());
    let sub = |key: SimKey| SimKey {
        sub_name: Some("desk7".to_owned()),
        ..key
    };
    for (number, account, permissions, key_of, shown) in [
        (
            1,
            "spot",
            SPOT,
            None,
            "uid 2001, master account, site global",
        ),
        (
            2,
            "futures",
            &["Futures"][..],
            Some("futures"),
            "ok GET /api/v1/account-overview (futures): accepted",
        ),
        (
            3,
            "unified",
            &["Unified"],
            None,
            "ok GET /api/ua/v2/user/api-key (unified): accepted",
        ),
        (
            4,
            "many",
            &["Spot", "Margin", "Futures", "Unified"],
            Some("unified"),
            "permissions General, Spot, Margin, Futures, Unified",
        ),
        (
            5,
            "mover",
            &["Spot", "Margin", "Withdrawal", "FlexTransfers"],
            None,
            "permissions General, Spot, Margin, Withdrawal, FlexTransfers",
        ),
        (
            6,
            "reader",
            &[],
            None,
            "permissions General IP restriction 127.0.0.1 key API key version 3",
        ),
    ] {
        let key = key(number, permissions);
        let key = if number == 6 { sub(key) } else { key };
        lab.kucoin.add_key(key.clone());
        let mut words = vec!["keys", "register", account];
        if let Some(scope) = key_of {
            words.extend(["--scope", scope]);
        }
        let (code, output) = run(&lab, &words, &key, &lines(&key)).await;
        assert_eq!(code, 0, "{account}: {output}");
        let done =
            format!("{account}/main: version 1 is in use, and KuCoin accepts its signatures.");
        for part in [done.as_str(), shown, "tested from 127.0.0.1"] {
            assert!(
                output.contains(part),
                "{account}: {part:?} is not in {output}"
            );
        }
        assert!(
            matches_key(&stored.version(account, 1).await, &key),
            "{account}"
        );
        let name = format!("key_version{{account=\"{account}\",key=\"main\"}}");
        assert_eq!(lab.metric(&name).await, Some(1.0), "{account}");
    }
    let values = stored.version("spot", 1).await;
    assert_eq!(values["uid"], "2001");
    assert_eq!(values["registered_by"], "spiffe://demo.test/admin/anna");
    for (note, value) in [
        ("uid", json!("2001")),
        ("for_version", json!("1")),
        ("permissions", json!("General,Spot,Margin")),
        ("ip_whitelist", json!("127.0.0.1")),
        ("registered_by", json!("spiffe://demo.test/admin/anna")),
        ("key_sha256", values["key_sha256"].clone()),
        ("pending_version", Value::Null),
        ("pending_sha256", Value::Null),
    ] {
        assert_eq!(stored.note("spot", note).await, value, "{note}");
    }
    let acts: Vec<_> = lab
        .acts()
        .iter()
        .filter(|act| act["account"] == "spot")
        .map(|act| {
            (
                act["action"].clone(),
                act["principal"].clone(),
                act["outcome"].clone(),
            )
        })
        .collect();
    let anna = json!("spiffe://demo.test/admin/anna");
    assert!(
        acts.contains(&(json!("test"), anna.clone(), json!("done"))),
        "{acts:?}"
    );
    assert!(
        acts.contains(&(json!("refresh"), anna, json!("done"))),
        "{acts:?}"
    );
    assert!(
        acts.contains(&(json!("key"), json!("vault"), json!("activated"))),
        "{acts:?}"
    );

    let tested = run(
        &lab,
        &["keys", "test", "spot", "--try-order"],
        &key(1, SPOT),
        "",
    )
    .await;
    assert_eq!(tested.0, 0, "{}", tested.1);
    for part in [
        "ok POST /api/v1/hf/orders/test (spot-margin): accepted",
        "spot/main: KuCoin accepts this key's signatures.",
    ] {
        assert!(tested.1.contains(part), "{}", tested.1);
    }
    lab.kucoin.remove_key(&key(1, SPOT).api_key);
    let (code, output) = run(&lab, &["keys", "test", "spot"], &key(1, SPOT), "").await;
    assert_eq!(code, 1);
    assert!(
        output.contains("refused KuCoin reports that this API key does not exist."),
        "{output}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn register_reports_key_version_test_order_missing_funds_and_trimmed_input() {
    let lab = lab(Settings {
        kucoin: KucoinSettings {
            limits: Limits::none(),
            two_opens_three: false,
            ..KucoinSettings::default()
        },
        ..settings()
    })
    .await;
    let stored = StoredKeys::of(&lab);
    let old = SimKey {
        version: 2,
        sub_name: Some("desk7".to_owned()),
        ..key(1, SPOT)
    };
    lab.kucoin.add_key(old.clone());
    for currency in ["BTC", "ETH", "KCS", "USDT"] {
        lab.kucoin
            .set_balance(old.uid, Wallet::Trade, currency, Amount::ZERO);
    }
    // Values pasted from a web page, with surrounding whitespace and invisible characters.
    let json = json!({
        "api_key": format!(" {}", old.api_key), "api_secret": format!("{}\n", old.api_secret),
        "passphrase": format!("{}\u{200b}", old.passphrase),
    });
    let words = ["keys", "register", "spot", "--try-order"];
    let (code, output) = run(&lab, &words, &old, &json.to_string()).await;
    assert_eq!(code, 0, "{output}");
    for part in [
        "note: api_key: removed leading or trailing spaces, line breaks or invisible characters",
        "note: api_secret: removed leading or trailing spaces,",
        "note: passphrase: removed leading or trailing spaces,",
        "account uid 2001, sub-account desk7, site global",
        "key version 2, created ",
        // Without funds KuCoin rejects the test order, not the key.
        "failed POST /api/v1/hf/orders/test (spot-margin): 200004 Balance insufficient!",
        "warning There are not enough funds for this request in the account that it uses.",
        "warning The funds are in the main account, not in the trading account.",
        "spot/main: version 1 is in use",
    ] {
        assert!(output.contains(part), "{part:?} is not in {output}");
    }
    assert!(matches_key(&stored.version("spot", 1).await, &old));
    assert_eq!(lab.kucoin.orders(old.uid).len(), 0);
}

#[tokio::test]
async fn account_or_scope_missing_from_the_rules_is_rejected_before_the_key_is_read() {
    let lab = lab(settings()).await;
    let none = key(1, SPOT);
    for (words, code, expected) in [
        (
            &["nobody"][..],
            1,
            "unknown account nobody; accounts in the rules: futures, many, mover, other, partner, reader, spot, two, unified fix: correct the name, or add to the rules: [account.nobody] with key = { spot-margin = \"main\" }",
        ),
        (
            &["spot", "--scope", "futures"],
            1,
            "account spot has no key for scope futures in the rules fix: add futures = \"main\" to `key` of [account.spot] in the rules",
        ),
        (
            &["two"],
            1,
            "account two has several keys in the rules: first, second fix: select one with --key, or with --scope",
        ),
        (&["Not A Name"], 2, "expected 1 to 32 characters of a-z"),
        (
            &["spot", "--scope", "options"],
            2,
            "expected futures, spot-margin or unified",
        ),
    ] {
        let words = [&["keys", "register"], words].concat();
        let (exit_code, output) = run(&lab, &words, &none, "").await;
        assert_eq!(exit_code, code, "{output}");
        assert!(output.contains(expected), "{expected:?} is not in {output}");
    }
    let (code, output) = run(&lab, &["keys", "test", "two"], &none, "").await;
    assert_eq!(code, 1, "{output}");
    let names = "account two has several keys in the rules: first, second; select one with --key";
    assert!(output.contains(names), "{output}");
    for (input, expected) in [
        (
            "",
            "expected 3 lines (api_key, api_secret, passphrase) or a JSON object with these fields, got 0 lines; nothing was stored. spot/main has no key.",
        ),
        ("a\nb\n\u{7}\n", "expected 3 lines"),
    ] {
        let (code, output) = run(&lab, &["keys", "register", "spot"], &none, input).await;
        assert_eq!(code, 1, "{output}");
        assert!(output.contains(expected), "{output}");
    }
    // An admin.toml without [vault].
    let toml = std::fs::read_to_string(lab.path("admin.toml")).unwrap();
    let (before, _) = toml.split_once("[vault]").unwrap();
    std::fs::write(lab.path("admin.toml"), before).unwrap();
    let (code, output) = run(&lab, &["keys", "register", "spot"], &none, "").await;
    assert_eq!(code, 2, "{output}");
    assert!(
        output.contains("vault: is missing: this command writes to Vault with your own login"),
        "{output}"
    );
}

#[tokio::test]
async fn account_with_a_partner_requires_the_partner_key() {
    use credbroker_sim::kucoin::Partner;
    let lab = lab(settings()).await;
    let with_partner = SimKey {
        partners: vec![Partner {
            id: "FakePartner".to_owned(),
            key: "fake-partner-key".to_owned(),
        }],
        ..key(1, SPOT)
    };
    lab.kucoin.add_key(with_partner.clone());
    let words = ["keys", "register", "partner"];
    let (code, output) = run(&lab, &words, &with_partner, &lines(&with_partner)).await;
    assert_eq!(code, 1, "{output}");
    assert!(
        output.contains("expected 4 lines (api_key, api_secret, passphrase, partner_key)"),
        "{output}"
    );
    let input = format!("{}fake-partner-key\n", lines(&with_partner));
    let (code, output) = run(&lab, &words, &with_partner, &input).await;
    assert_eq!(code, 0, "{output}");
    assert!(!output.contains("fake-partner-key"), "{output}");
    let values = StoredKeys::of(&lab).version("partner", 1).await;
    assert_eq!(values["partner_key"], "fake-partner-key");

    // The partner's key in Vault cannot be read for comparison, so the key is written again, but only once although the response is lost.
    let lost = FaultRule::new("kv/data/kucoin/prod/partner", Fault::HalfBody);
    lab.vault.fault(lost.method("POST").times(1));
    let (code, output) = run(&lab, &words, &with_partner, &input).await;
    assert_eq!(code, 0, "{output}");
    assert!(
        output.contains("partner/main: version 2 is in use"),
        "{output}"
    );
    assert_eq!(StoredKeys::of(&lab).newest("partner").await, 2);
}

#[tokio::test]
async fn key_registered_in_vault_for_an_account_missing_from_the_rules_is_rejected() {
    let lab = lab(settings()).await;
    let stored = StoredKeys::of(&lab);
    let first = key(1, SPOT);
    lab.kucoin.add_key(first.clone());
    let (code, output) = run(&lab, &["keys", "register", "spot"], &first, &lines(&first)).await;
    assert_eq!(code, 0, "{output}");
    // The account is no longer in the rules; only the metadata in Vault show who has the key.
    let notes = stored.metadata("spot", "main").await["custom_metadata"].clone();
    let notes: std::collections::BTreeMap<String, String> = serde_json::from_value(notes).unwrap();
    let elsewhere = kv_path("elsewhere", "spare");
    lab.vault.put_secret("kv", &elsewhere, json!({}));
    lab.vault.set_custom_metadata("kv", &elsewhere, notes);
    lab.vault.delete_metadata("kv", &kv_path("spot", "main"));
    until("the broker has removed the key", async || {
        let name = "key_version{account=\"spot\",key=\"main\"}";
        lab.metric(name).await.is_none_or(|version| version == 0.0)
    })
    .await;
    let expected = "This key, or another one of the same KuCoin account, is already registered for account elsewhere (elsewhere/spare).";
    let second = SimKey {
        uid: first.uid,
        ..key(2, SPOT)
    };
    lab.kucoin.add_key(second.clone());
    for key in [&first, &second] {
        let (code, output) = run(&lab, &["keys", "register", "spot"], key, &lines(key)).await;
        assert_eq!(code, 1, "{output}");
        assert!(output.contains(expected), "{output}");
        let fix = "Account elsewhere is not in the rules of this broker: if no other broker uses it, delete the versions of elsewhere/spare in Vault";
        assert!(output.contains(fix), "{output}");
        assert_eq!(stored.newest("spot").await, 0);
    }
    // Once that version is deleted, the key can be registered.
    lab.vault.delete_latest("kv", &elsewhere);
    let (code, output) = run(&lab, &["keys", "register", "spot"], &first, &lines(&first)).await;
    assert_eq!(code, 0, "{output}");
}

#[tokio::test]
async fn revoked_key_cannot_be_registered_again_but_another_key_can() {
    let lab = lab(settings()).await;
    let first = key(1, SPOT);
    lab.kucoin.add_key(first.clone());
    let words = ["keys", "register", "spot"];
    let (code, output) = run(&lab, &words, &first, &lines(&first)).await;
    assert_eq!(code, 0, "{output}");
    let mut admin = lab.admin_client("bob").await;
    let revoke = RevokeKeyRequest {
        account: "spot".to_owned(),
        key: String::new(),
    };
    admin.revoke_key(revoke).await.unwrap();
    let (code, output) = run(&lab, &words, &first, &lines(&first)).await;
    assert_eq!(code, 1, "{output}");
    for part in [
        "spiffe://demo.test/admin/bob revoked this key of account spot permanently.",
        "fix: Create a new key under API Management, delete this one there, and register the new one.",
        "nothing was stored. Vault holds version 1 of spot/main, but this broker has not loaded it.",
    ] {
        assert!(output.contains(part), "{part:?} is not in {output}");
    }
    let second = SimKey {
        uid: first.uid,
        ..key(2, SPOT)
    };
    lab.kucoin.add_key(second.clone());
    let (code, output) = run(&lab, &words, &second, &lines(&second)).await;
    assert_eq!(code, 0, "{output}");
    assert!(
        output.contains("spot/main: version 2 is in use"),
        "{output}"
    );
}

#[tokio::test]
async fn disabled_key_is_enabled_only_with_the_enable_flag() {
    let lab = lab(settings()).await;
    let stored = StoredKeys::of(&lab);
    let path = kv_path("spot", "main");
    lab.vault.put_secret("kv", &path, json!({}));
    let disabled = [("state".to_owned(), "disabled".to_owned())];
    lab.vault.set_custom_metadata("kv", &path, disabled.into());
    let good = key(1, SPOT);
    lab.kucoin.add_key(good.clone());
    let words = ["keys", "register", "spot"];
    let (code, output) = run(&lab, &words, &good, &lines(&good)).await;
    assert_eq!(code, 1, "{output}");
    for part in [
        "spot/main is disabled in Vault (state=disabled); nothing was stored",
        "fix: find out who disabled it and why; then pass --enable to register the key and enable it",
    ] {
        assert!(output.contains(part), "{output}");
    }
    assert_eq!(stored.newest("spot").await, 1);
    let words = ["keys", "register", "spot", "--enable"];
    let (code, output) = run(&lab, &words, &good, &lines(&good)).await;
    assert_eq!(code, 0, "{output}");
    assert_eq!(stored.note("spot", "state").await, "active");
}

#[tokio::test]
async fn vault_403_at_any_step_of_register_is_reported_and_a_rerun_completes() {
    let lab = lab(settings()).await;
    let stored = StoredKeys::of(&lab);
    let good = key(1, SPOT);
    lab.kucoin.add_key(good.clone());
    let words = ["keys", "register", "spot"];
    for (method, path, expected) in [
        (
            "GET",
            "kv/metadata/kucoin/prod/spot/main",
            "cannot read the key's metadata in Vault: Vault denied access (403); nothing was stored",
        ),
        (
            "LIST",
            "kv/metadata/kucoin/prod/",
            "cannot check whether another account has this key: Vault denied access (403); nothing was stored. spot/main has no key.",
        ),
        (
            "POST",
            "kv/data/kucoin/prod/spot/main",
            "Vault denied access (403); nothing was stored. spot/main has no key.",
        ),
    ] {
        lab.vault.deny(None, Some(method), path);
        let (code, output) = run(&lab, &words, &good, &lines(&good)).await;
        lab.vault.remove_denial(None, Some(method), path);
        assert_eq!(code, 1, "{method} {path}: {output}");
        for part in [
            expected,
            "check [vault] in admin.toml: the address, the login (your token may have expired)",
        ] {
            assert!(
                output.contains(part),
                "{method} {path}: {part:?} is not in {output}"
            );
        }
        assert_eq!(stored.newest("spot").await, 0);
    }
    let notes = "kv/metadata/kucoin/prod/spot/main";
    lab.vault.deny(None, Some("POST"), notes);
    let (code, output) = run(&lab, &words, &good, &lines(&good)).await;
    lab.vault.remove_denial(None, Some("POST"), notes);
    assert_eq!(code, 1, "{output}");
    assert!(
        !output.contains("a previous run was interrupted"),
        "{output}"
    );
    for part in [
        "version 1 of spot/main is stored in Vault, but its metadata could not be updated",
        "fix: re-run the command with the same key; it continues from there",
    ] {
        assert!(output.contains(part), "{part:?} is not in {output}");
    }
    let (code, output) = run(&lab, &words, &good, &lines(&good)).await;
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("not writing it again"), "{output}");
    assert_eq!(stored.newest("spot").await, 1);
    assert_eq!(stored.note("spot", "for_version").await, "1");
}

#[tokio::test]
async fn kv_version_1_mount_is_rejected_before_the_key_is_tested() {
    let lab = lab(settings()).await;
    let vault = VaultSim::start_dev(ROOT_TOKEN).await.unwrap();
    vault.mount_kv_v1("kv");
    let file = lab.path("admin.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace(&lab.vault.address(), &vault.address())).unwrap();
    let good = key(1, SPOT);
    let (code, output) = run(&lab, &["keys", "register", "spot"], &good, &lines(&good)).await;
    assert_eq!(code, 1, "{output}");
    let expected = "mount kv is KV version 1, but credbroker needs KV version 2; nothing was stored fix: set mount in [vault] of admin.toml";
    assert!(output.contains(expected), "{output}");
    assert!(!output.contains("testing the key with KuCoin"), "{output}");
    assert!(lab.kucoin.received().is_empty());
}

#[tokio::test]
async fn wrong_passphrase_is_reported_in_few_lines_without_advice_for_bots() {
    let lab = lab(settings()).await;
    let good = key(1, SPOT);
    lab.kucoin.add_key(good.clone());
    let wrong = SimKey {
        passphrase: "simulated-wrong".to_owned(),
        ..good
    };
    let output = lab.cli(&["keys", "register", "spot"], &lines(&wrong)).await;
    assert_eq!(output.code, Some(1), "{output:?}");
    let text = output.stdout.as_str();
    assert!(!text.contains("request id"), "{text}");
    let refused = text.lines().skip_while(|line| !line.starts_with("refused"));
    let refused = refused.take_while(|line| !line.trim().is_empty()).count();
    assert!((2..=7).contains(&refused), "{refused} lines in {text}");
}

#[tokio::test]
async fn key_values_are_in_no_argument_or_environment_variable() {
    let lab = lab(settings()).await;
    let good = key(1, SPOT);
    lab.kucoin.add_key(good.clone());
    lab.vault
        .fault(FaultRule::new("kv/data/kucoin/prod/spot", Fault::Hang).method("POST"));
    let running = spawn(&lab, &["keys", "register", "spot"], &lines(&good));
    until("the command writes to Vault", async || {
        is_hanging(&lab, "kv/data/")
    })
    .await;
    let folder = format!("/proc/{}", running.id());
    for file in ["cmdline", "environ"] {
        let bytes = std::fs::read(format!("{folder}/{file}")).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(!text.is_empty());
        for value in [&good.api_key, &good.api_secret, &good.passphrase] {
            assert!(!text.contains(value.as_str()), "{file}");
        }
    }
    // No other user can read its memory.
    let status = std::fs::read_to_string(format!("{folder}/status")).unwrap();
    assert!(status.contains("CoreDumping:\t0"), "{status}");
    // It exits on SIGTERM.
    let sent = Command::new("kill")
        .args(["-TERM", &running.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
    let process = std::cell::RefCell::new(running);
    until("the command has exited", async || {
        process.borrow_mut().try_wait().unwrap().is_some()
    })
    .await;
    let status = process.borrow_mut().wait().unwrap();
    assert_eq!(status.code(), Some(1));
}

/// Starts a command with `input` on stdin.
pub(super) fn spawn(lab: &Lab, words: &[&str], input: &str) -> std::process::Child {
    use std::io::Write as _;
    let mut child = Command::new(env!("CARGO_BIN_EXE_credbroker"))
        .args(words)
        .arg("--admin")
        .arg(lab.path("admin.toml"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // The input fits into the pipe's buffer.
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    child
}

/// Whether Vault has received a POST below this path and not responded yet.
pub(super) fn is_hanging(lab: &Lab, path: &str) -> bool {
    let path = format!("/v1/{path}");
    let requests = lab.vault.requests();
    requests
        .iter()
        .any(|seen| seen.method == "POST" && seen.status.is_none() && seen.path.starts_with(&path))
}

#[tokio::test]
async fn first_key_is_registered_with_a_broker_that_started_without_keys() {
    let mut lab = Lab::install(Settings {
        keys: Vec::new(),
        ..settings()
    })
    .await;
    lab.admin = "127.0.0.1:1".parse().unwrap();
    lab.write_admin_files(&lab.ca.admin("anna").unwrap());
    let stored = StoredKeys::of(&lab);
    let good = key(1, SPOT);
    lab.kucoin.add_key(good.clone());
    let words = ["keys", "register", "spot"];
    let (code, output) = run(&lab, &words, &good, &lines(&good)).await;
    assert_eq!(code, 1, "{output}");
    let fix = "fix: start the broker (it also runs without keys).";
    assert!(output.contains(fix), "{output}");
    assert_eq!(stored.newest("spot").await, 0);

    lab.start_broker().await;
    lab.write_admin_files(&lab.ca.admin("anna").unwrap());
    assert_eq!(lab.get("/readyz").await.0, 503);
    let (code, output) = run(&lab, &words, &good, &lines(&good)).await;
    assert_eq!(code, 0, "{output}");
    assert!(matches_key(&stored.version("spot", 1).await, &good));
    lab.stop().await;
}
