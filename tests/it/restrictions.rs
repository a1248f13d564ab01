//! What admins forbid: in force at once, whatever Vault does, and still after a kill and a restart.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use credbroker::clock::Clock;
use credbroker::proto::{
    Candidate, KeyStatus, Method, Outcome, RefreshKeyRequest, Scope, SignAndSendRequest,
    TestKeyRequest,
};
use credbroker_sim::installation::{MAIN_UID, RULES, Settings, kv_path};
use credbroker_sim::kucoin::{KucoinSettings, Limits, SimKey};
use credbroker_sim::pki::Ca;
use serde_json::{Value, json};
use tonic::Status;

use crate::delivery::tls_of;
use crate::harness::{
    Bot, Ended, Lab, Patient, accounts, failure, futures_order, in_one_line, refusal, request,
    spot_cancel_all, spot_order, until,
};

const ANNA: &str = "spiffe://demo.test/admin/anna";
const MAKER: &str = "spiffe://demo.test/bot/maker";

async fn in_a_process() -> Lab {
    Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await
}

/// Kills the broker, and starts it again on the same state.
async fn kill_and_restart(lab: &mut Lab) {
    lab.process().signal("KILL");
    lab.process().exit_code().await;
    lab.spawn_broker().await;
}

/// The reason with which a call is refused; none where the exchange accepts it.
async fn refused(bot: &mut Bot<Patient>, request: SignAndSendRequest) -> Option<String> {
    match bot.send(request).await {
        Ok(answer) => {
            assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
            None
        }
        Err(status) => Some(refusal(Err(status)).1),
    }
}

/// What an admin has done, one line for each act.
fn acts(lab: &Lab) -> Vec<Value> {
    let mut acts = lab.acts();
    acts.retain(|act| act["who"] == ANNA);
    acts
}

/// The id of the account's first key, and of its next ones.
fn key(number: u64) -> SimKey {
    SimKey {
        uid: MAIN_UID,
        ..SimKey::fake(MAIN_UID + 1000 * number)
    }
}

/// When the last request arrived that this key signed: Unix time in milliseconds.
fn last_use(lab: &Lab, key: &SimKey) -> i64 {
    let received = lab.kucoin.everything_received();
    let signed = |header: Option<&str>| header == Some(key.api_key.as_str());
    let by_it = received
        .iter()
        .filter(|request| signed(request.header("kc-api-key")));
    by_it.map(|request| request.at_ms).max().unwrap()
}

/// Bots that call without a pause.
struct Load {
    goes_on: Arc<AtomicBool>,
    accepted: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
    bots: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    async fn start(lab: &Lab) -> Self {
        let mut load = Self {
            goes_on: Arc::new(AtomicBool::new(true)),
            accepted: Arc::default(),
            refused: Arc::default(),
            bots: Vec::new(),
        };
        for number in 0..8 {
            let mut bot = lab.patient_bot("maker").await;
            let goes_on = Arc::clone(&load.goes_on);
            let (accepted, refused) = (Arc::clone(&load.accepted), Arc::clone(&load.refused));
            load.bots.push(tokio::spawn(async move {
                let mut count = 0;
                while goes_on.load(Ordering::Relaxed) {
                    count += 1;
                    let id = format!("b{number}-{count}");
                    let request = match count % 3 {
                        0 => accounts(),
                        1 => spot_order(&id),
                        _ => futures_order(&id),
                    };
                    match bot.send(request).await {
                        Ok(_) => accepted.fetch_add(1, Ordering::Relaxed),
                        Err(status) => {
                            assert_eq!(refusal(Err(status)).1, "KEY_UNAVAILABLE");
                            refused.fetch_add(1, Ordering::Relaxed)
                        }
                    };
                }
            }));
        }
        load.until_more(|load| &load.accepted).await;
        load
    }

    /// Waits until every bot has had some more answers of a kind.
    async fn until_more(&self, which: impl Fn(&Self) -> &AtomicU64) {
        let before = which(self).load(Ordering::Relaxed);
        until("the bots call", async || {
            which(self).load(Ordering::Relaxed) > before + 100
        })
        .await;
    }

    async fn stop(self) {
        self.goes_on.store(false, Ordering::Relaxed);
        for bot in self.bots {
            bot.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_key_signs_nothing_a_second_later_and_stays_dead() {
    let clock = Clock::system();
    for is_sealed in [false, true] {
        let mut lab = in_a_process().await;
        let load = Load::start(&lab).await;
        if is_sealed {
            lab.vault.seal();
            until("Vault is silent", async || {
                lab.get("/readyz?verbose")
                    .await
                    .1
                    .contains("Vault last confirmed it")
                    || lab.metric("vault_failures_total{reason=\"outage\"}").await > Some(0.0)
            })
            .await;
            load.until_more(|load| &load.accepted).await;
        }
        let began_ms = clock.wall_ms();
        let revoked = lab
            .admin_cli("anna", &["keys", "revoke", "main", "--yes"])
            .await;
        assert_eq!((revoked.code, revoked.stderr.as_str()), (Some(0), ""));
        assert!(
            revoked
                .stdout
                .starts_with("revoked: main/main version 1, in force now"),
            "{}",
            revoked.stdout
        );
        let listed = lab.admin_cli("anna", &["keys", "list"]).await.stdout;
        assert!(
            in_one_line(&listed).contains("main/main revoked - "),
            "wiped: {listed}"
        );
        load.until_more(|load| &load.refused).await;
        load.stop().await;
        let took_ms = last_use(&lab, &key(0)) - began_ms;
        assert!(
            took_ms <= 1000,
            "it was used {took_ms} ms after the command began"
        );
        crate::harness::say(&format!(
            "revoked under load{}: last used {took_ms} ms after the command began",
            if is_sealed { " with Vault sealed" } else { "" }
        ));

        let act = acts(&lab).pop().unwrap();
        for (field, value) in [
            ("action", json!("revoke")),
            ("account", json!("main")),
            ("key", json!("main")),
            ("version_before", json!(1)),
            ("outcome", json!("done")),
        ] {
            assert_eq!(act[field], value, "{act}");
        }
        assert_eq!(act["key_before"].as_str().unwrap().len(), 64);

        let used_ms = last_use(&lab, &key(0));
        kill_and_restart(&mut lab).await;
        if is_sealed {
            lab.vault.unseal();
        }
        until_said(&lab, "revoked").await;
        let mut bot = lab.patient_bot("maker").await;
        let told = bot.send(accounts()).await.unwrap_err();
        assert_eq!(failure(&told).1, "KEY_UNAVAILABLE");
        let expected = "an admin has revoked it; register another key";
        assert!(told.message().ends_with(expected), "{told:?}");
        assert!(!told.message().contains(ANNA), "bots learn no admin's name");
        assert_eq!(last_use(&lab, &key(0)), used_ms, "not even to test it");
        lab.process().terminate();
        lab.process().exit_code().await;
        lab.check_record();
    }
}

/// Waits until the list of keys begins with this status of account `main`'s key.
async fn until_said(lab: &Lab, status: &str) {
    until(&format!("the key is {status}"), async || {
        let listed = lab.admin_cli("anna", &["keys", "list", "--json"]).await;
        let first: Value = serde_json::from_str(listed.stdout.lines().next().unwrap()).unwrap();
        first["status"] == status
    })
    .await;
}

/// stdin is a terminal here, but the question would go into a file.
#[test]
fn wide_commands_do_nothing_while_stderr_is_no_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("stderr");
    let command = format!(
        "{} resume --all 2>{}",
        env!("CARGO_BIN_EXE_credbroker"),
        file.display()
    );
    let ended = std::process::Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .stdin(std::process::Stdio::null())
        .output();
    let Ok(ended) = ended else {
        crate::harness::not_run("a terminal for stdin alone", "script", "no script on PATH");
        return;
    };
    let said = std::fs::read_to_string(&file).unwrap();
    assert_eq!(ended.status.code(), Some(2), "{said}");
    let said: Vec<_> = said.split_whitespace().collect();
    assert!(
        said.join(" ")
            .contains("confirmation needed, but stderr is not a terminal; nothing was done"),
        "{said:?}"
    );
}

/// Nobody can answer a question where stdin is no terminal, and a script must not revoke or resume more than it names.
#[tokio::test]
async fn wide_commands_without_a_terminal_do_nothing_unless_yes_is_given() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let halted = lab.admin_cli("anna", &["halt", "--all"]).await;
    assert_eq!(halted.code, Some(0), "halt never asks: {halted:?}");
    let before = acts(&lab).len();
    for (words, effect) in [
        (
            &["resume", "--all"][..],
            "This command lifts the halt of all accounts",
        ),
        (
            &["keys", "revoke", "main"],
            "This command permanently revokes every key of account main: ",
        ),
    ] {
        let ended = lab.admin_cli("anna", words).await;
        assert_eq!(
            (ended.code, ended.stdout.as_str()),
            (Some(2), ""),
            "{ended:?}"
        );
        let said = ended.said();
        let why = "confirmation needed, but stdin is not a terminal; nothing was done. ";
        assert!(said.starts_with(&format!("{why}{effect}")), "{said}");
        assert!(said.ends_with(". fix: add --yes"), "{said}");
        assert_eq!(acts(&lab).len(), before, "{words:?}");
    }
    let halted = Some("ACCOUNT_FROZEN".to_owned());
    assert_eq!(refused(&mut bot, spot_order("halted")).await, halted);
    assert_eq!(refused(&mut bot, accounts()).await, None);

    let resumed = lab.admin_cli("anna", &["resume", "--all", "--yes"]).await;
    assert_eq!((resumed.code, resumed.stderr.as_str()), (Some(0), ""));
    // What names one account or one key needs no confirmation.
    let narrow = lab.admin_cli("anna", &["resume", "main"]).await;
    assert_eq!((narrow.code, narrow.stderr.as_str()), (Some(0), ""));
    let one = ["keys", "revoke", "other", "--key", "main"];
    let revoked = lab.admin_cli("anna", &one).await;
    assert_eq!((revoked.code, revoked.stderr.as_str()), (Some(0), ""));
    let all = ["keys", "revoke", "main", "--yes"];
    let revoked = lab.admin_cli("anna", &all).await;
    assert_eq!((revoked.code, revoked.stderr.as_str()), (Some(0), ""));
    let register = "`credbroker keys register main --key main`";
    assert!(
        in_one_line(&revoked.stdout).contains(register),
        "{revoked:?}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn only_another_key_takes_the_place_of_a_revoked_one() {
    // The account's scopes have two keys: one name each.
    let rules = RULES.replace("futures = \"main\"", "futures = \"second\"");
    let mut lab = Lab::with(Settings {
        rules,
        keys: vec![
            ("main", "main", MAIN_UID),
            ("main", "second", MAIN_UID + 1),
            ("other", "main", 1002),
        ],
        ..Settings::default()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    let revoked = lab
        .admin_cli("anna", &["keys", "revoke", "main", "--key", "main"])
        .await;
    assert_eq!(revoked.code, Some(0), "{revoked:?}");
    let dead = Some("KEY_UNAVAILABLE".to_owned());
    assert_eq!(refused(&mut bot, accounts()).await, dead);
    assert_eq!(
        refused(&mut bot, futures_order("second")).await,
        None,
        "another key"
    );

    // Nor is it tested.
    let asked = lab.kucoin.everything_received().len();
    let candidate = Candidate {
        api_key: key(0).api_key,
        api_secret: key(0).api_secret,
        passphrase: key(0).passphrase,
        key_version: 3,
        partner_key: String::new(),
    };
    let request = TestKeyRequest {
        account: "main".to_owned(),
        key: "main".to_owned(),
        candidate: Some(candidate),
        try_order: false,
    };
    let tested = lab.admin_client("anna").await.test_key(request).await;
    let tested = tested.unwrap().into_inner();
    let found = tested.findings.iter().find(|finding| finding.is_refusal);
    assert_eq!(found.unwrap().name, "key-revoked", "{tested:?}");
    assert_eq!(lab.kucoin.everything_received().len(), asked);

    // Written again, made anew so that its versions count from 1, and under another name: it is the same key.
    let looked = async |name: &str| {
        let request = RefreshKeyRequest {
            account: "main".to_owned(),
            key: name.to_owned(),
        };
        let response = lab.admin_client("anna").await.refresh_key(request).await;
        response.unwrap().into_inner().state.unwrap()
    };
    assert_eq!(lab.add_key("main", "main", &key(0)), 2);
    assert_eq!(looked("main").await.status(), KeyStatus::Revoked);
    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    looked("main").await;
    assert_eq!(lab.add_key("main", "main", &key(0)), 1);
    assert_eq!(looked("main").await.status(), KeyStatus::Revoked);
    assert_eq!(refused(&mut bot, accounts()).await, dead);
    lab.add_key("main", "second", &key(0));
    let second = looked("second").await;
    let problem = second
        .reasons
        .iter()
        .any(|reason| reason.contains("has revoked it"));
    assert!(second.version == 1 && problem, "{second:?}");
    assert_eq!(refused(&mut bot, futures_order("still-second")).await, None);
    let used_ms = last_use(&lab, &key(0));

    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    looked("main").await;
    assert_eq!(lab.add_key("main", "main", &key(1)), 1);
    let state = looked("main").await;
    assert_eq!(state.version, 1, "{state:?}");
    assert_eq!(refused(&mut bot, accounts()).await, None, "with a new id");
    assert_eq!(last_use(&lab, &key(0)), used_ms);
    lab.stop().await;
}

#[tokio::test]
async fn a_revocation_that_is_repeated_does_not_kill_the_next_key() {
    let mut lab = Lab::start().await;
    for said in [
        "revoked: main/main version 1",
        "unchanged: main/main was already revoked",
    ] {
        let revoked = lab
            .admin_cli("anna", &["keys", "revoke", "main", "--yes"])
            .await;
        assert_eq!(revoked.code, Some(0), "{revoked:?}");
        assert!(revoked.stdout.starts_with(said), "{}", revoked.stdout);
    }
    assert_eq!(lab.add_key("main", "main", &key(1)), 2);
    let request = RefreshKeyRequest {
        account: "main".to_owned(),
        key: "main".to_owned(),
    };
    let response = lab.admin_client("anna").await.refresh_key(request).await;
    let state = response.unwrap().into_inner().state.unwrap();
    assert_eq!(state.version, 2, "{state:?}");
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(refused(&mut bot, accounts()).await, None);
    lab.stop().await;
}

#[tokio::test]
async fn a_key_that_is_not_in_memory_is_revoked_before_it_comes() {
    let mut lab = Lab::install(Settings::default()).await;
    lab.vault.seal();
    lab.start_broker().await;
    let revoked = lab
        .admin_cli("anna", &["keys", "revoke", "main", "--yes"])
        .await;
    assert_eq!(revoked.code, Some(0), "{revoked:?}");
    assert!(
        revoked.stdout.contains("None was in memory"),
        "{}",
        revoked.stdout
    );
    lab.vault.unseal();
    until_said(&lab, "revoked").await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(
        refused(&mut bot, accounts()).await.unwrap(),
        "KEY_UNAVAILABLE"
    );
    assert!(lab.kucoin.received().is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn a_call_that_waits_for_its_connection_does_not_leave_once_it_is_forbidden() {
    let ca = Ca::new("CA of a simulated exchange").unwrap();
    let settings = Settings {
        kucoin: KucoinSettings {
            tls: Some(tls_of(&ca)),
            limits: Limits::none(),
            ..KucoinSettings::default()
        },
        road: true,
        files: vec![("exchange-ca.pem", ca.certificate_pem().to_owned())],
        egress: "warm_connections = 0\nroots = \"exchange-ca.pem\"".to_owned(),
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    for (words, undo, reason) in [
        (
            &["bots", "block", MAKER][..],
            &["bots", "unblock", MAKER][..],
            "CALLER_BLOCKED",
        ),
        (&["halt", "main"], &["resume", "main"], "ACCOUNT_FROZEN"),
        (
            &["keys", "revoke", "main", "--yes"],
            &["keys", "list"],
            "KEY_UNAVAILABLE",
        ),
    ] {
        lab.road().hold();
        let mut bot = lab.patient_bot("maker").await;
        let intents = || {
            let lines = lab.audit().into_iter();
            lines.filter(|line| line["event"] == "intent").count()
        };
        let before = intents();
        let waiting = tokio::spawn(async move { bot.send(spot_order("never")).await });
        until("the call is on record", async || intents() > before).await;
        assert_eq!(lab.admin_cli("anna", words).await.code, Some(0));
        assert!(!waiting.is_finished());
        lab.road().open();
        assert_eq!(refusal(waiting.await.unwrap()).1, reason);
        assert_eq!(lab.admin_cli("anna", undo).await.code, Some(0));
    }
    assert!(lab.kucoin.received().is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn halts_and_blocks_survive_a_kill_until_they_are_lifted() {
    let mut lab = in_a_process().await;
    let halted = Some("ACCOUNT_FROZEN".to_owned());
    let blocked = Some("CALLER_BLOCKED".to_owned());
    let run = async |lab: &Lab, words: &[&str], said: &str| {
        let ended = lab.admin_cli("anna", words).await;
        assert_eq!(
            (ended.code, ended.stderr.as_str()),
            (Some(0), ""),
            "{words:?}"
        );
        assert!(ended.stdout.starts_with(said), "{}", ended.stdout);
        ended.stdout
    };
    for (words, undo) in [
        (&["halt", "main"][..], &["resume", "main"][..]),
        (&["halt", "--all"], &["resume", "--all", "--yes"]),
    ] {
        run(&lab, words, "halted: ").await;
        for is_restarted in [false, true] {
            if is_restarted {
                kill_and_restart(&mut lab).await;
                lab.until_ready().await;
            }
            let mut bot = lab.patient_bot("maker").await;
            assert_eq!(refused(&mut bot, spot_order("never")).await, halted);
            assert_eq!(
                refused(&mut bot, spot_cancel_all()).await,
                None,
                "cancels go on"
            );
            assert_eq!(refused(&mut bot, accounts()).await, None, "reads go on");
        }
        run(&lab, undo, "resumed: ").await;
        let mut bot = lab.patient_bot("maker").await;
        let id = words.join("").replace('-', "");
        assert_eq!(refused(&mut bot, spot_order(&id)).await, None);
    }

    run(&lab, &["bots", "block", MAKER], "blocked: ").await;
    let again = run(&lab, &["bots", "block", MAKER], "blocked: ").await;
    assert!(again.contains("already in force"), "{again}");
    let but = "but: the rules name no such bot";
    assert!(!again.contains(but), "{again}");
    let typo = "spiffe://demo.test/bot/makre";
    let told = run(&lab, &["bots", "block", typo], "blocked: ").await;
    assert!(told.contains(but), "{told}");
    run(&lab, &["bots", "unblock", typo], "unblocked: ").await;
    for is_restarted in [false, true] {
        if is_restarted {
            kill_and_restart(&mut lab).await;
            lab.until_ready().await;
        }
        let mut bot = lab.patient_bot("maker").await;
        for request in [spot_order("never"), spot_cancel_all(), accounts()] {
            assert_eq!(refused(&mut bot, request).await, blocked);
        }
        let mut reader = lab.patient_bot("reader").await;
        assert_eq!(refused(&mut reader, accounts()).await, None, "others go on");
    }
    run(&lab, &["bots", "unblock", MAKER], "unblocked: ").await;
    run(&lab, &["bots", "unblock", MAKER], "unchanged: ").await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(refused(&mut bot, spot_order("after-all")).await, None);

    let acts: Vec<_> = acts(&lab)
        .iter()
        .map(|act| {
            let about = ["account", "about_bot", "detail"]
                .map(|name| act[name].as_str().unwrap_or_default());
            format!(
                "{} {} {}",
                act["action"].as_str().unwrap(),
                about.concat(),
                act["outcome"].as_str().unwrap()
            )
        })
        .collect();
    let expected = [
        "halt main done",
        "resume main done",
        "halt all accounts done",
        "resume all accounts done",
        &format!("block {MAKER} done"),
        &format!("block {MAKER} done"),
        "block spiffe://demo.test/bot/makre done",
        "unblock spiffe://demo.test/bot/makre done",
        &format!("unblock {MAKER} done"),
        &format!("unblock {MAKER} done"),
    ];
    assert_eq!(acts, expected);
    lab.process().terminate();
    lab.process().exit_code().await;
    lab.check_record();
}

#[tokio::test]
async fn halt_by_name_and_halt_of_all_are_lifted_one_by_one() {
    let mut lab = Lab::start().await;
    for words in [&["halt", "main"], &["halt", "--all"]] {
        assert_eq!(lab.admin_cli("anna", words).await.code, Some(0));
    }
    let resumed = lab.admin_cli("bob", &["resume", "--all", "--yes"]).await;
    let but = "but: still halted by name: main. `credbroker resume ACCOUNT` lifts one.\n";
    assert!(resumed.stdout.ends_with(but), "{resumed:?}");
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(
        refused(&mut bot, spot_order("never")).await.unwrap(),
        "ACCOUNT_FROZEN"
    );
    assert_eq!(
        lab.admin_cli("bob", &["resume", "main"]).await.stdout,
        "resumed: account main, in force now.\n"
    );
    assert_eq!(refused(&mut bot, spot_order("goes")).await, None);
    lab.stop().await;
}

#[tokio::test]
async fn accounts_frozen_by_the_version_before_are_halted_until_they_are_resumed() {
    let mut lab = Lab::install(Settings::default()).await;
    let mark = json!({ "by": ANNA, "at_ms": 1 });
    let written = json!({
        "blocked_bots": {}, "frozen_accounts": { "left-the-rules": mark, "main": mark }, "halted_accounts": {},
        "revoked_keys": {}, "revoked_unseen": {},
    });
    let file = lab.path("state/restrictions.json");
    std::fs::create_dir_all(lab.path("state")).unwrap();
    std::fs::write(&file, written.to_string()).unwrap();
    lab.start_broker().await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(
        refused(&mut bot, spot_order("never")).await.unwrap(),
        "ACCOUNT_FROZEN"
    );
    let resumed = lab.admin_cli("anna", &["resume", "--all", "--yes"]).await;
    let told = in_one_line(&resumed.stdout);
    let but = "unchanged: there was no halt of all accounts. but: still halted by name: left-the-rules, main.";
    assert!(told.starts_with(but), "{told}");
    for account in ["left-the-rules", "main"] {
        let resumed = lab.admin_cli("anna", &["resume", account]).await;
        assert!(resumed.stdout.starts_with("resumed: "), "{resumed:?}");
    }
    assert_eq!(refused(&mut bot, spot_order("goes")).await, None);
    let now: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let expected = json!({
        "version": 1, "blocked_bots": {}, "halted_accounts": {}, "revoked_keys": {}, "revoked_unseen": {},
    });
    assert_eq!(now, expected);
    lab.stop().await;
}

#[tokio::test]
async fn a_broker_that_cannot_read_what_is_forbidden_does_not_start() {
    let lab = Lab::install(Settings::default()).await;
    std::fs::create_dir_all(lab.path("state")).unwrap();
    std::fs::write(lab.path("state/restrictions.json"), "{\"blocked_bots\": ").unwrap();
    let Ended {
        code, stderr: said, ..
    } = lab.run(&["serve"]).await;
    assert_eq!(code, Some(1), "{said}");
    let part =
        "state/restrictions.json cannot be read, and what it forbids must not be lost; restore it";
    assert!(said.contains(part), "{said}");
    assert!(lab.kucoin.everything_received().is_empty());
}

#[tokio::test]
async fn a_full_disk_keeps_nobody_from_forbidding_and_the_admin_knows() {
    let rules = RULES.replace("futures = \"main\"", "futures = \"second\"");
    let mut lab = Lab::with(Settings {
        rules,
        keys: vec![
            ("main", "main", MAIN_UID),
            ("main", "second", MAIN_UID + 1),
            ("other", "main", 1002),
        ],
        ..Settings::default()
    })
    .await;
    let in_the_way = lab.path("state/restrictions.json.new");
    std::fs::create_dir(&in_the_way).unwrap();
    let told =
        "refused: STATE_UNWRITABLE: it is in force, but not on disk, and a restart would lift it: ";
    let mut bot = lab.patient_bot("maker").await;
    let halted = lab.admin_cli("anna", &["halt", "main"]).await;
    assert_eq!((halted.code, halted.stdout.as_str()), (Some(1), ""));
    assert!(halted.said().starts_with(told), "{}", halted.stderr);
    assert_eq!(
        refused(&mut bot, spot_order("never")).await.unwrap(),
        "ACCOUNT_FROZEN"
    );
    // Both of its keys, although the first one fails.
    let revoked = lab
        .admin_cli("anna", &["keys", "revoke", "main", "--yes"])
        .await;
    assert!(
        revoked.code == Some(1) && revoked.said().starts_with(told),
        "{revoked:?}"
    );
    let read = request(Scope::Futures, Method::Get, "/api/v1/orders", "");
    for request in [accounts(), read.clone()] {
        assert_eq!(refused(&mut bot, request).await.unwrap(), "KEY_UNAVAILABLE");
    }
    let blocked = lab.admin_cli("anna", &["bots", "block", MAKER]).await;
    assert!(
        blocked.code == Some(1) && blocked.said().starts_with(told),
        "{blocked:?}"
    );
    assert_eq!(
        refused(&mut bot, accounts()).await.unwrap(),
        "CALLER_BLOCKED"
    );
    let lifted = lab.admin_cli("anna", &["bots", "unblock", MAKER]).await;
    assert!(lifted.said().contains("it is still in force"), "{lifted:?}");
    assert_eq!(
        refused(&mut bot, accounts()).await.unwrap(),
        "CALLER_BLOCKED"
    );
    let failed = acts(&lab);
    assert!(
        failed.iter().all(|act| act["outcome"] == "failed"),
        "{failed:?}"
    );
    assert!(
        failed[0]["detail"]
            .as_str()
            .unwrap()
            .contains("restrictions.json cannot be written"),
        "{failed:?}"
    );
    assert_eq!(failed.len(), 5);

    std::fs::remove_dir(in_the_way).unwrap();
    for words in [
        &["keys", "revoke", "main", "--yes"][..],
        &["bots", "block", MAKER],
    ] {
        assert_eq!(
            lab.admin_cli("anna", words).await.code,
            Some(0),
            "{words:?}"
        );
    }
    lab.stop().await;
    lab.start_broker().await;
    lab.admin_cli("anna", &["bots", "unblock", MAKER]).await;
    until_said(&lab, "revoked").await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(refused(&mut bot, read).await.unwrap(), "KEY_UNAVAILABLE");
    lab.stop().await;
}

#[tokio::test]
async fn what_an_admin_forbids_holds_once_the_command_has_ended() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    for (words, request) in [
        (&["halt", "main"][..], spot_order("never")),
        (&["bots", "block", MAKER], accounts()),
    ] {
        assert_eq!(lab.admin_cli("anna", words).await.code, Some(0));
        let status: Status = bot.send(request).await.unwrap_err();
        assert!(["ACCOUNT_FROZEN", "CALLER_BLOCKED"].contains(&failure(&status).1.as_str()));
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_bot_is_blocked_by_the_end_of_its_name_and_what_would_block_nobody_is_refused() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let blocked = lab.admin_cli("anna", &["bots", "block", "maker"]).await;
    assert_eq!(blocked.code, Some(0), "{blocked:?}");
    let told = in_one_line(&blocked.stdout);
    assert!(
        told.starts_with(&format!("blocked: {MAKER}, in force now.")),
        "{told}"
    );
    assert_eq!(
        refused(&mut bot, accounts()).await.unwrap(),
        "CALLER_BLOCKED"
    );
    let unknown = lab.admin_cli("anna", &["bots", "block", "makre"]).await;
    assert_eq!(unknown.code, Some(1), "{unknown:?}");
    assert!(
        unknown.said().contains("no rule names this bot"),
        "{unknown:?}"
    );
    // In full it counts, also before any rule names it.
    let later = "spiffe://demo.test/bot/later";
    let blocked = lab.admin_cli("anna", &["bots", "block", later]).await;
    assert_eq!(blocked.code, Some(0), "{blocked:?}");
    for name in ["maker", "later"] {
        let lifted = lab.admin_cli("anna", &["bots", "unblock", name]).await;
        assert_eq!(lifted.code, Some(0), "{lifted:?}");
    }
    assert_eq!(refused(&mut bot, accounts()).await, None);
}
