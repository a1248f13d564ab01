//! `keys register`: what it refuses and in which words, and what it stores.

use std::process::{Command, Stdio};

use credbroker::proto::RevokeKeyRequest;
use credbroker_sim::installation::{ROOT_TOKEN, Settings, kv_path};
use credbroker_sim::kucoin::{Amount, KucoinSettings, Limits, SimKey, Site, Wallet};
use credbroker_sim::vault::{Fault, FaultRule, VaultSim};
use serde_json::{Value, json};

use super::real::Api;
use crate::harness::{Ended, Lab, until};

/// One account for each kind of purpose and scope; `other` has a key from the start.
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

const OTHERS_UID: u64 = 1002;

pub(super) fn settings() -> Settings {
    Settings {
        rules: RULES.to_owned(),
        keys: vec![("other", "main", OTHERS_UID)],
        wait_ready: false,
        ..Settings::default()
    }
}

/// A whole installation, and an admin's files.
pub(super) async fn lab(settings: Settings) -> Lab {
    let lab = Lab::with(settings).await;
    lab.write_admin_files(&lab.ca.admin("anna").unwrap());
    lab
}

/// A made-up key in KuCoin's form, for the address that the simulated exchange sees.
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

/// What an admin pipes in.
pub(crate) fn lines(key: &SimKey) -> String {
    format!("{}\n{}\n{}\n", key.api_key, key.api_secret, key.passphrase)
}

/// Runs a command; nothing that it says holds a value of the key, or is wider than a terminal.
pub(super) async fn run(lab: &Lab, words: &[&str], key: &SimKey, input: &str) -> (i32, String) {
    let Ended {
        code,
        stdout,
        stderr,
    } = lab.cli(words, input).await;
    let said = format!("{stdout}\n{stderr}");
    for value in [&key.api_key, &key.api_secret, &key.passphrase] {
        assert!(!said.contains(value.as_str()), "{said}");
    }
    // What is wrong with the command line itself is said by clap.
    let own = said.lines().filter(|_| code != Some(2));
    for line in own.filter(|line| line.contains(' ')) {
        assert!(line.chars().count() <= 80, "{line:?} in {said}");
    }
    let words: Vec<_> = said.split_whitespace().collect();
    (code.unwrap(), words.join(" "))
}

/// Everything that Vault holds, past all policies.
pub(super) struct Held(Api);

impl Held {
    pub(super) fn of(lab: &Lab) -> Self {
        Self(Api::new(&lab.vault.address(), ROOT_TOKEN))
    }

    /// The metadata of a key; null: there is none.
    pub(super) async fn metadata(&self, account: &str, name: &str) -> Value {
        let path = format!("/v1/kv/metadata/{}", kv_path(account, name));
        let (status, text) = self.0.raw("GET", &path, None).await;
        if status == 404 {
            return Value::Null;
        }
        let answer: Value = serde_json::from_str(&text).unwrap();
        answer["data"].clone()
    }

    /// Number of the newest version; 0: there is none.
    pub(super) async fn newest(&self, account: &str) -> u64 {
        let metadata = self.metadata(account, "main").await;
        metadata["current_version"].as_u64().unwrap_or_default()
    }

    /// What is noted about a key.
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

/// Whether `values`, as Vault has them, are those of this key.
pub(super) fn is(values: &Value, key: &SimKey) -> bool {
    values["api_key"] == key.api_key.as_str()
        && values["api_secret"] == key.api_secret.as_str()
        && values["passphrase"] == key.passphrase.as_str()
        && values["key_version"] == json!(key.version.to_string())
}

/// One key that must not get in.
struct Refusal {
    name: &'static str,
    account: &'static str,
    /// As the exchange has it.
    key: SimKey,
    /// As the admin gives it.
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
    let wrong = "Either the secret or the passphrase of this API key is wrong. KuCoin checks the passphrase with the help of the secret";
    let again = "fix: Register the key again, with secret and passphrase exactly as they were when it was created; the passphrase is not the trading password.";
    let day_ms = 24 * 60 * 60 * 1000;
    let mut all = vec![
        refusal(
            "another site",
            "spot",
            SimKey {
                site: Site::Europe,
                ..key(2, SPOT)
            },
            "KuCoin does not know this API key. It was deleted, has expired, or belongs to another KuCoin site than the account's.",
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
            "a reader that can trade",
            "reader",
            key(10, &["Spot"]),
            "The account's purpose is read-only, and the key has the permission Spot.",
            "fix: Leave only General ticked under API Management > Edit > API permissions.",
        ),
        refusal(
            "withdrawal",
            "spot",
            key(11, &with(&["Withdrawal"])),
            "The key has the permission Withdrawal, which sends money away without asking for a second factor.",
            "fix: Untick Withdrawal under API Management > Edit > API permissions. If the broker is meant to move this account's money, write allow_money_out = true for it in the rules.",
        ),
        refusal(
            "transfers",
            "spot",
            key(12, &with(&["FlexTransfers"])),
            "The key has the permission FlexTransfers, which moves money between the owner's accounts.",
            "fix: Untick FlexTransfers under API Management > Edit > API permissions.",
        ),
        refusal(
            "no IP restriction",
            "spot",
            SimKey {
                ip_whitelist: Vec::new(),
                ..key(13, SPOT)
            },
            "The key has no IP restriction, so whoever gets hold of it can trade with it, and KuCoin deletes it or takes its trade permissions away after 30 days without use.",
            "fix: Enter 127.0.0.1 under API Management > Edit > IP restriction.",
        ),
        refusal(
            "a whitelist without our address",
            "spot",
            SimKey {
                ip_whitelist: vec!["203.0.113.9".parse().unwrap()],
                ..key(14, SPOT)
            },
            "KuCoin takes no requests with this API key from the address that this one came from.",
            "fix: Add 127.0.0.1 to the key's addresses under API Management > Edit > IP restriction.",
        ),
        refusal(
            "an end in 13 days",
            "spot",
            SimKey {
                expires_at_ms: Some(now_ms + 14 * day_ms - 60_000),
                ..key(15, SPOT)
            },
            "The key expires in 13 days. At least 14 days are asked for.",
            "fix: Create a new key under API Management that lasts longer, and put it in this one's place.",
        ),
        refusal(
            "the key of another account",
            "spot",
            SimKey {
                ip_whitelist: vec!["127.0.0.1".parse().unwrap()],
                ..SimKey::fake(OTHERS_UID)
            },
            "This key, or another one of the same KuCoin account, is registered for account other (other/main).",
            "fix: Use a key of another KuCoin account or sub-account, or name both scopes in one account of the rules.",
        ),
        refusal(
            "another key of the same KuCoin account",
            "spot",
            SimKey {
                uid: OTHERS_UID,
                ..key(16, SPOT)
            },
            "This key, or another one of the same KuCoin account, is registered for account other (other/main).",
            "fix: Use a key of another KuCoin account",
        ),
    ];
    for (name, number, cause, fix) in [
        (
            "a key that nobody knows",
            1,
            "KuCoin does not know this API key.",
            "fix: Look for the key under API Management on the account's KuCoin site. If it is gone, create a new key there and register it.",
        ),
        ("a wrong secret", 3, wrong, again),
        ("a wrong passphrase", 4, wrong, again),
        (
            "the trading password",
            5,
            "note: passphrase: six digits look like the trading password; KuCoin's API passphrase is the one that was chosen when the key was made",
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
async fn a_key_that_must_not_get_in_is_refused_with_cause_and_fix_and_nothing_is_stored() {
    let mut lab = lab(settings()).await;
    let held = Held::of(&lab);
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
        let (code, said) = run(&lab, &words, &given, &lines(&given)).await;
        assert_eq!(code, 1, "{name}: {said}");
        for part in [
            cause,
            fix,
            "the key is refused; nothing was stored.",
            &format!("{account}/main has no key."),
            "fix: apply the `fix:` above and re-run the command",
        ] {
            assert!(said.contains(part), "{name}: {part:?} is not in {said}");
        }
        assert_eq!(held.metadata(account, "main").await, Value::Null, "{name}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_key_of_a_version_that_the_exchange_takes_no_more_is_refused() {
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
    let (code, said) = run(&lab, &["keys", "register", "spot"], &old, &lines(&old)).await;
    assert_eq!(code, 1, "{said}");
    for part in [
        "KuCoin no longer accepts API keys of this version.",
        "fix: Create a new key under API Management, which will have version 3, and register it.",
    ] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(Held::of(&lab).newest("spot").await, 0);
}

#[tokio::test]
async fn an_exchange_that_does_not_say_is_no_reason_to_store_a_key() {
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
    let (code, said) = run(&lab, &words, &good, &lines(&good)).await;
    assert_eq!(code, 1, "{said}");
    let expected = "KuCoin has not said whether the key is good: see `failed` above; nothing was stored. spot/main has no key.";
    assert!(said.contains(expected), "{said}");
    assert_eq!(Held::of(&lab).newest("spot").await, 0);
}

#[tokio::test]
async fn a_key_is_registered_for_each_scope_and_is_in_use_when_the_command_ends() {
    let mut lab = lab(settings()).await;
    let held = Held::of(&lab);
    // Left by an older version of this program.
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
            "ok GET /api/v1/account-overview (futures): taken",
        ),
        (
            3,
            "unified",
            &["Unified"],
            None,
            "ok GET /api/ua/v2/user/api-key (unified): taken",
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
        let (code, said) = run(&lab, &words, &key, &lines(&key)).await;
        assert_eq!(code, 0, "{account}: {said}");
        let done =
            format!("{account}/main: version 1 is in use, and KuCoin accepts its signatures.");
        for part in [done.as_str(), shown, "tested from 127.0.0.1"] {
            assert!(said.contains(part), "{account}: {part:?} is not in {said}");
        }
        assert!(is(&held.version(account, 1).await, &key), "{account}");
        let name = format!("key_version{{account=\"{account}\",key=\"main\"}}");
        assert_eq!(lab.metric(&name).await, Some(1.0), "{account}");
    }
    let values = held.version("spot", 1).await;
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
        assert_eq!(held.note("spot", note).await, value, "{note}");
    }
    let acts: Vec<_> = lab
        .acts()
        .iter()
        .filter(|act| act["account"] == "spot")
        .map(|act| {
            (
                act["action"].clone(),
                act["who"].clone(),
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
        acts.contains(&(json!("key"), json!("vault"), json!("in_use"))),
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
        "ok POST /api/v1/hf/orders/test (spot-margin): taken",
        "spot/main: KuCoin accepts this key's signatures.",
    ] {
        assert!(tested.1.contains(part), "{}", tested.1);
    }
    lab.kucoin.remove_key(&key(1, SPOT).api_key);
    let (code, said) = run(&lab, &["keys", "test", "spot"], &key(1, SPOT), "").await;
    assert_eq!(code, 1);
    assert!(
        said.contains("refused KuCoin does not know this API key."),
        "{said}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn versions_orders_funds_and_trimmed_input_are_found_out_and_said() {
    let lab = lab(Settings {
        kucoin: KucoinSettings {
            limits: Limits::none(),
            two_opens_three: false,
            ..KucoinSettings::default()
        },
        ..settings()
    })
    .await;
    let held = Held::of(&lab);
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
    // As it is pasted from a page, with what comes along.
    let json = json!({
        "api_key": format!(" {}", old.api_key), "api_secret": format!("{}\n", old.api_secret),
        "passphrase": format!("{}\u{200b}", old.passphrase),
    });
    let words = ["keys", "register", "spot", "--try-order"];
    let (code, said) = run(&lab, &words, &old, &json.to_string()).await;
    assert_eq!(code, 0, "{said}");
    for part in [
        "note: api_key: removed spaces, line ends or invisible characters around it",
        "note: api_secret: removed spaces,",
        "note: passphrase: removed spaces,",
        "account uid 2001, sub-account desk7, site global",
        "key version 2, made ",
        // Without money there it is the order that is refused, and not the key.
        "failed POST /api/v1/hf/orders/test (spot-margin): 200004 Balance insufficient!",
        "warning There is not enough money for this request where it is needed.",
        "warning Balances are in the main account, not in the trading account.",
        "spot/main: version 1 is in use",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    assert!(is(&held.version("spot", 1).await, &old));
    assert_eq!(lab.kucoin.orders(old.uid).len(), 0);
}

#[tokio::test]
async fn what_the_rules_do_not_name_is_refused_before_a_key_is_asked_for() {
    let lab = lab(settings()).await;
    let none = key(1, SPOT);
    for (words, code, expected) in [
        (
            &["nobody"][..],
            1,
            "the rules name no account nobody; they name futures, many, mover, other, partner, reader, spot, two, unified fix: correct the name, or add to the rules: [account.nobody] with key = { spot-margin = \"main\" }",
        ),
        (
            &["spot", "--scope", "futures"],
            1,
            "the rules name no key of account spot for scope futures fix: add futures = \"main\" to `key` of [account.spot] in the rules",
        ),
        (
            &["two"],
            1,
            "account two has several keys in the rules: first, second fix: name one with --key, or with --scope what it serves",
        ),
        (&["Not A Name"], 2, "expected a name of a-z"),
        (
            &["spot", "--scope", "options"],
            2,
            "expected futures, spot-margin or unified",
        ),
    ] {
        let words = [&["keys", "register"], words].concat();
        let (ended, said) = run(&lab, &words, &none, "").await;
        assert_eq!(ended, code, "{said}");
        assert!(said.contains(expected), "{expected:?} is not in {said}");
    }
    for (input, expected) in [
        (
            "",
            "expected 3 lines (api_key, api_secret, passphrase), or a JSON object with these names; got 0; nothing was stored. spot/main has no key.",
        ),
        ("a\nb\n\u{7}\n", "expected 3 lines"),
    ] {
        let (code, said) = run(&lab, &["keys", "register", "spot"], &none, input).await;
        assert_eq!(code, 1, "{said}");
        assert!(said.contains(expected), "{said}");
    }
    // The file without a way to Vault.
    let toml = std::fs::read_to_string(lab.path("admin.toml")).unwrap();
    let (before, _) = toml.split_once("[vault]").unwrap();
    std::fs::write(lab.path("admin.toml"), before).unwrap();
    let (code, said) = run(&lab, &["keys", "register", "spot"], &none, "").await;
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("vault: is missing: this command writes to Vault as you"),
        "{said}"
    );
}

#[tokio::test]
async fn an_account_with_a_partner_is_asked_for_the_partners_key() {
    use credbroker_sim::kucoin::Partner;
    let lab = lab(settings()).await;
    let whole = SimKey {
        partners: vec![Partner {
            id: "FakePartner".to_owned(),
            key: "fake-partner-key".to_owned(),
        }],
        ..key(1, SPOT)
    };
    lab.kucoin.add_key(whole.clone());
    let words = ["keys", "register", "partner"];
    let (code, said) = run(&lab, &words, &whole, &lines(&whole)).await;
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("expected 4 lines (api_key, api_secret, passphrase, partner_key)"),
        "{said}"
    );
    let input = format!("{}fake-partner-key\n", lines(&whole));
    let (code, said) = run(&lab, &words, &whole, &input).await;
    assert_eq!(code, 0, "{said}");
    assert!(!said.contains("fake-partner-key"), "{said}");
    let held = Held::of(&lab).version("partner", 1).await;
    assert_eq!(held["partner_key"], "fake-partner-key");

    // Nobody can compare a partner's key with the one in Vault, so it is written again; once, though the answer is lost.
    let lost = FaultRule::new("kv/data/kucoin/prod/partner", Fault::HalfBody);
    lab.vault.fault(lost.method("POST").times(1));
    let (code, said) = run(&lab, &words, &whole, &input).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("partner/main: version 2 is in use"), "{said}");
    assert_eq!(Held::of(&lab).newest("partner").await, 2);
}

#[tokio::test]
async fn a_key_that_vault_alone_knows_for_another_account_is_refused() {
    let lab = lab(settings()).await;
    let held = Held::of(&lab);
    let first = key(1, SPOT);
    lab.kucoin.add_key(first.clone());
    let (code, said) = run(&lab, &["keys", "register", "spot"], &first, &lines(&first)).await;
    assert_eq!(code, 0, "{said}");
    // No broker has that account any more, so only the notes in Vault tell.
    let notes = held.metadata("spot", "main").await["custom_metadata"].clone();
    let notes: std::collections::BTreeMap<String, String> = serde_json::from_value(notes).unwrap();
    let elsewhere = kv_path("elsewhere", "spare");
    lab.vault.put_secret("kv", &elsewhere, json!({}));
    lab.vault.set_custom_metadata("kv", &elsewhere, notes);
    lab.vault.delete_metadata("kv", &kv_path("spot", "main"));
    until("the broker has dropped it", async || {
        let name = "key_version{account=\"spot\",key=\"main\"}";
        lab.metric(name).await.is_none_or(|version| version == 0.0)
    })
    .await;
    let expected = "This key, or another one of the same KuCoin account, is registered for account elsewhere (elsewhere/spare).";
    let second = SimKey {
        uid: first.uid,
        ..key(2, SPOT)
    };
    lab.kucoin.add_key(second.clone());
    for key in [&first, &second] {
        let (code, said) = run(&lab, &["keys", "register", "spot"], key, &lines(key)).await;
        assert_eq!(code, 1, "{said}");
        assert!(said.contains(expected), "{said}");
        let fix = "The rules of this broker do not name account elsewhere: if no other broker does, delete the versions of elsewhere/spare in Vault";
        assert!(said.contains(fix), "{said}");
        assert_eq!(held.newest("spot").await, 0);
    }
    // Once that version is deleted, nobody uses the key.
    lab.vault.delete_latest("kv", &elsewhere);
    let (code, said) = run(&lab, &["keys", "register", "spot"], &first, &lines(&first)).await;
    assert_eq!(code, 0, "{said}");
}

#[tokio::test]
async fn a_revoked_key_is_not_registered_again_and_another_one_is() {
    let lab = lab(settings()).await;
    let first = key(1, SPOT);
    lab.kucoin.add_key(first.clone());
    let words = ["keys", "register", "spot"];
    let (code, said) = run(&lab, &words, &first, &lines(&first)).await;
    assert_eq!(code, 0, "{said}");
    let mut admin = lab.admin_client("bob").await;
    let revoke = RevokeKeyRequest {
        account: "spot".to_owned(),
        key: String::new(),
    };
    admin.revoke_key(revoke).await.unwrap();
    let (code, said) = run(&lab, &words, &first, &lines(&first)).await;
    assert_eq!(code, 1, "{said}");
    for part in [
        "spiffe://demo.test/admin/bob revoked this key for account spot for good.",
        "fix: Create a new key under API Management, delete this one there, and register the new one.",
        "nothing was stored. Vault holds version 1 of spot/main, and no broker is known to use it.",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    let second = SimKey {
        uid: first.uid,
        ..key(2, SPOT)
    };
    lab.kucoin.add_key(second.clone());
    let (code, said) = run(&lab, &words, &second, &lines(&second)).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("spot/main: version 2 is in use"), "{said}");
}

#[tokio::test]
async fn a_disabled_key_is_switched_on_only_when_that_is_said() {
    let lab = lab(settings()).await;
    let held = Held::of(&lab);
    let path = kv_path("spot", "main");
    lab.vault.put_secret("kv", &path, json!({}));
    let disabled = [("state".to_owned(), "disabled".to_owned())];
    lab.vault.set_custom_metadata("kv", &path, disabled.into());
    let good = key(1, SPOT);
    lab.kucoin.add_key(good.clone());
    let words = ["keys", "register", "spot"];
    let (code, said) = run(&lab, &words, &good, &lines(&good)).await;
    assert_eq!(code, 1, "{said}");
    for part in [
        "spot/main is disabled in Vault (state=disabled), and registering a key would enable it; nothing was stored",
        "fix: find out who has disabled it and why; --enable registers a key and switches it on",
    ] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(held.newest("spot").await, 1);
    let words = ["keys", "register", "spot", "--enable"];
    let (code, said) = run(&lab, &words, &good, &lines(&good)).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(held.note("spot", "state").await, "active");
}

#[tokio::test]
async fn a_vault_that_refuses_leaves_everything_as_it_was_and_says_so() {
    let lab = lab(settings()).await;
    let held = Held::of(&lab);
    let good = key(1, SPOT);
    lab.kucoin.add_key(good.clone());
    let words = ["keys", "register", "spot"];
    for (method, path, expected) in [
        (
            "GET",
            "kv/metadata/kucoin/prod/spot/main",
            "cannot read the key's metadata in Vault: Vault refuses the path (403); nothing was stored",
        ),
        (
            "LIST",
            "kv/metadata/kucoin/prod/",
            "whether another account has the key cannot be checked: Vault refuses the path (403); nothing was stored. spot/main has no key.",
        ),
        (
            "POST",
            "kv/data/kucoin/prod/spot/main",
            "Vault refuses the path (403); nothing was stored. spot/main has no key.",
        ),
    ] {
        lab.vault.deny(None, Some(method), path);
        let (code, said) = run(&lab, &words, &good, &lines(&good)).await;
        lab.vault.allow_again(None, Some(method), path);
        assert_eq!(code, 1, "{method} {path}: {said}");
        for part in [
            expected,
            "look at [vault] in admin.toml: the address, the login (an admin's token ends)",
        ] {
            assert!(
                said.contains(part),
                "{method} {path}: {part:?} is not in {said}"
            );
        }
        assert_eq!(held.newest("spot").await, 0);
    }
    let notes = "kv/metadata/kucoin/prod/spot/main";
    lab.vault.deny(None, Some("POST"), notes);
    let (code, said) = run(&lab, &words, &good, &lines(&good)).await;
    lab.vault.allow_again(None, Some("POST"), notes);
    assert_eq!(code, 1, "{said}");
    assert!(!said.contains("ended early"), "{said}");
    for part in [
        "version 1 of spot/main is in Vault, whole; what it is could not be noted beside it",
        "fix: re-run the command with the same key: it continues from there",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    let (code, said) = run(&lab, &words, &good, &lines(&good)).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("it is not written again"), "{said}");
    assert_eq!(held.newest("spot").await, 1);
    assert_eq!(held.note("spot", "for_version").await, "1");
}

#[tokio::test]
async fn nothing_is_asked_or_written_where_the_mount_is_kv_version_1() {
    let lab = lab(settings()).await;
    let vault = VaultSim::start_dev(ROOT_TOKEN).await.unwrap();
    vault.mount_kv_v1("kv");
    let file = lab.path("admin.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace(&lab.vault.address(), &vault.address())).unwrap();
    let good = key(1, SPOT);
    let (code, said) = run(&lab, &["keys", "register", "spot"], &good, &lines(&good)).await;
    assert_eq!(code, 1, "{said}");
    let told = "mount kv is KV version 1, and credbroker needs version 2; nothing was stored fix: set mount in [vault] of admin.toml";
    assert!(said.contains(told), "{said}");
    assert!(!said.contains("testing it with KuCoin"), "{said}");
    assert!(lab.kucoin.received().is_empty());
}

#[tokio::test]
async fn a_wrong_passphrase_is_told_in_few_lines_without_advice_for_bots() {
    let lab = lab(settings()).await;
    let good = key(1, SPOT);
    lab.kucoin.add_key(good.clone());
    let wrong = SimKey {
        passphrase: "simulated-wrong".to_owned(),
        ..good
    };
    let ended = lab.cli(&["keys", "register", "spot"], &lines(&wrong)).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let text = ended.stdout.as_str();
    assert!(!text.contains("request id"), "{text}");
    let refused = text.lines().skip_while(|line| !line.starts_with("refused"));
    let refused = refused.take_while(|line| !line.trim().is_empty()).count();
    assert!((2..=7).contains(&refused), "{refused} lines in {text}");
}

#[tokio::test]
async fn the_values_of_a_key_stand_in_no_argument_and_no_environment() {
    let lab = lab(settings()).await;
    let good = key(1, SPOT);
    lab.kucoin.add_key(good.clone());
    lab.vault
        .fault(FaultRule::new("kv/data/kucoin/prod/spot", Fault::Hang).method("POST"));
    let running = spawn(&lab, &["keys", "register", "spot"], &lines(&good));
    until("it writes to Vault", async || is_hanging(&lab, "kv/data/")).await;
    let folder = format!("/proc/{}", running.id());
    for file in ["cmdline", "environ"] {
        let bytes = std::fs::read(format!("{folder}/{file}")).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(!text.is_empty());
        for value in [&good.api_key, &good.api_secret, &good.passphrase] {
            assert!(!text.contains(value.as_str()), "{file}");
        }
    }
    // Nobody but root reads its memory.
    let status = std::fs::read_to_string(format!("{folder}/status")).unwrap();
    assert!(status.contains("CoreDumping:\t0"), "{status}");
    // And it ends when it is told to.
    let sent = Command::new("kill")
        .args(["-TERM", &running.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
    let ended = std::cell::RefCell::new(running);
    until("it has ended", async || {
        ended.borrow_mut().try_wait().unwrap().is_some()
    })
    .await;
    let status = ended.borrow_mut().wait().unwrap();
    assert_eq!(status.code(), Some(1));
}

/// Starts a command, which reads `input` to its end.
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
    // So little fits into the pipe.
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    child
}

/// Whether a POST below this path has arrived that has no answer yet.
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
    let held = Held::of(&lab);
    let good = key(1, SPOT);
    lab.kucoin.add_key(good.clone());
    let words = ["keys", "register", "spot"];
    let (code, said) = run(&lab, &words, &good, &lines(&good)).await;
    assert_eq!(code, 1, "{said}");
    let fix = "fix: start the broker; it runs without keys, too.";
    assert!(said.contains(fix), "{said}");
    assert_eq!(held.newest("spot").await, 0);

    lab.start_broker().await;
    lab.write_admin_files(&lab.ca.admin("anna").unwrap());
    assert_eq!(lab.get("/readyz").await.0, 503);
    let (code, said) = run(&lab, &words, &good, &lines(&good)).await;
    assert_eq!(code, 0, "{said}");
    assert!(is(&held.version("spot", 1).await, &good));
    lab.stop().await;
}
