//! Halts, blocks and revocations: in effect at once, whatever Vault does, and still after a kill and a restart.

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
    Bot, CommandOutput, Lab, Patient, accounts, failure, futures_order, in_one_line, refusal,
    request, spot_cancel_all, spot_order, until,
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

/// Kills the broker and starts it again with the same state.
async fn kill_and_restart(lab: &mut Lab) {
    lab.process().signal("KILL");
    lab.process().exit_code().await;
    lab.spawn_broker().await;
}

/// The reason with which the broker rejects a call; `None` if the exchange accepts it.
async fn rejection(bot: &mut Bot<Patient>, request: SignAndSendRequest) -> Option<String> {
    match bot.send(request).await {
        Ok(answer) => {
            assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
            None
        }
        Err(status) => Some(refusal(Err(status)).1),
    }
}

/// The audit lines of `anna`'s actions.
fn acts(lab: &Lab) -> Vec<Value> {
    let mut acts = lab.acts();
    acts.retain(|act| act["principal"] == ANNA);
    acts
}

/// Key `number` of the account; 0 is the first one.
fn key(number: u64) -> SimKey {
    SimKey {
        uid: MAIN_UID,
        ..SimKey::fake(MAIN_UID + 1000 * number)
    }
}

/// When the last request signed with this key arrived: Unix time in milliseconds.
fn last_use(lab: &Lab, key: &SimKey) -> i64 {
    let received = lab.kucoin.everything_received();
    let is_of_key = |header: Option<&str>| header == Some(key.api_key.as_str());
    let signed = received
        .iter()
        .filter(|request| is_of_key(request.header("kc-api-key")));
    signed.map(|request| request.at_ms).max().unwrap()
}

/// Bots that call without a pause.
struct Load {
    is_running: Arc<AtomicBool>,
    accepted: Arc<AtomicU64>,
    rejected: Arc<AtomicU64>,
    bots: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    async fn start(lab: &Lab) -> Self {
        let mut load = Self {
            is_running: Arc::new(AtomicBool::new(true)),
            accepted: Arc::default(),
            rejected: Arc::default(),
            bots: Vec::new(),
        };
        for number in 0..8 {
            let mut bot = lab.patient_bot("maker").await;
            let is_running = Arc::clone(&load.is_running);
            let (accepted, rejected) = (Arc::clone(&load.accepted), Arc::clone(&load.rejected));
            load.bots.push(tokio::spawn(async move {
                let mut count = 0;
                while is_running.load(Ordering::Relaxed) {
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
                            rejected.fetch_add(1, Ordering::Relaxed)
                        }
                    };
                }
            }));
        }
        load.until_more(|load| &load.accepted).await;
        load
    }

    /// Waits until this counter has grown by more than 100.
    async fn until_more(&self, which: impl Fn(&Self) -> &AtomicU64) {
        let before = which(self).load(Ordering::Relaxed);
        until("the bots call", async || {
            which(self).load(Ordering::Relaxed) > before + 100
        })
        .await;
    }

    async fn stop(self) {
        self.is_running.store(false, Ordering::Relaxed);
        for bot in self.bots {
            bot.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoked_key_stops_signing_within_a_second_and_stays_revoked_after_a_kill() {
    let clock = Clock::system();
    for is_sealed in [false, true] {
        let mut lab = in_a_process().await;
        let load = Load::start(&lab).await;
        if is_sealed {
            lab.vault.seal();
            until("the outage is noticed", async || {
                lab.get("/readyz?verbose")
                    .await
                    .1
                    .contains("Vault last confirmed the key")
                    || lab.metric("vault_failures_total{reason=\"outage\"}").await > Some(0.0)
            })
            .await;
            load.until_more(|load| &load.accepted).await;
        }
        let start_ms = clock.wall_ms();
        let revoked = lab
            .admin_cli("anna", &["keys", "revoke", "main", "--yes"])
            .await;
        assert_eq!((revoked.code, revoked.stderr.as_str()), (Some(0), ""));
        assert!(
            revoked
                .stdout
                .starts_with("revoked: main/main version 1. It no longer signs"),
            "{}",
            revoked.stdout
        );
        let listed = lab.admin_cli("anna", &["keys", "list"]).await.stdout;
        assert!(
            in_one_line(&listed).contains("main/main revoked - "),
            "expected the key to be wiped: {listed}"
        );
        load.until_more(|load| &load.rejected).await;
        load.stop().await;
        let took_ms = last_use(&lab, &key(0)) - start_ms;
        assert!(
            took_ms <= 1000,
            "the key was used {took_ms} ms after the command started"
        );
        crate::harness::print_always(&format!(
            "revoked under load{}: last used {took_ms} ms after the command started",
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
        until_status(&lab, "revoked").await;
        let mut bot = lab.patient_bot("maker").await;
        let status = bot.send(accounts()).await.unwrap_err();
        assert_eq!(failure(&status).1, "KEY_UNAVAILABLE");
        let expected = "an admin has revoked it; register another key";
        assert!(status.message().ends_with(expected), "{status:?}");
        assert!(
            !status.message().contains(ANNA),
            "bots must not see admins' names"
        );
        assert_eq!(last_use(&lab, &key(0)), used_ms, "not even for a key test");
        lab.process().terminate();
        lab.process().exit_code().await;
        lab.check_audit_log();
    }
}

/// Waits until `keys list` shows this status of account `main`'s key.
async fn until_status(lab: &Lab, status: &str) {
    until(&format!("the key is {status}"), async || {
        let listed = lab.admin_cli("anna", &["keys", "list", "--json"]).await;
        let first: Value = serde_json::from_str(listed.stdout.lines().next().unwrap()).unwrap();
        first["status"] == status
    })
    .await;
}

/// stdin is a terminal here, but the prompt would go to a file.
#[test]
fn commands_that_need_confirmation_do_nothing_if_stderr_is_not_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("stderr");
    let command = format!(
        "{} resume --all 2>{}",
        env!("CARGO_BIN_EXE_credbroker"),
        file.display()
    );
    let result = std::process::Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .stdin(std::process::Stdio::null())
        .output();
    let Ok(result) = result else {
        crate::harness::not_run("confirmation prompt", "script", "no script on PATH");
        return;
    };
    let stderr = std::fs::read_to_string(&file).unwrap();
    assert_eq!(result.status.code(), Some(2), "{stderr}");
    let stderr: Vec<_> = stderr.split_whitespace().collect();
    assert!(
        stderr
            .join(" ")
            .contains("confirmation required, but stderr is not a terminal; nothing was done"),
        "{stderr:?}"
    );
}

/// Without a terminal nobody can confirm, and a script must not revoke or resume more than it names.
#[tokio::test]
async fn commands_that_need_confirmation_require_yes_if_stdin_is_not_a_terminal() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let halted = lab.admin_cli("anna", &["halt", "--all"]).await;
    assert_eq!(
        halted.code,
        Some(0),
        "halt needs no confirmation: {halted:?}"
    );
    let before = acts(&lab).len();
    for (words, effect) in [
        (
            &["resume", "--all"][..],
            "This command lifts the halt set with `halt --all`; ",
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
        let stderr = ended.stderr_line();
        let cause = "confirmation required, but stdin is not a terminal; nothing was done. ";
        assert!(stderr.starts_with(&format!("{cause}{effect}")), "{stderr}");
        assert!(stderr.ends_with(". fix: add --yes"), "{stderr}");
        assert_eq!(acts(&lab).len(), before, "{words:?}");
    }
    let halted = Some("ACCOUNT_FROZEN".to_owned());
    assert_eq!(rejection(&mut bot, spot_order("halted")).await, halted);
    assert_eq!(rejection(&mut bot, accounts()).await, None);

    let resumed = lab.admin_cli("anna", &["resume", "--all", "--yes"]).await;
    assert_eq!((resumed.code, resumed.stderr.as_str()), (Some(0), ""));
    // Commands for one account or one key need no confirmation.
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
async fn revoked_key_stays_revoked_under_any_version_or_name_and_another_key_works() {
    // The account's scopes use two keys.
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
    let unavailable = Some("KEY_UNAVAILABLE".to_owned());
    assert_eq!(rejection(&mut bot, accounts()).await, unavailable);
    assert_eq!(
        rejection(&mut bot, futures_order("second")).await,
        None,
        "another key"
    );

    // The revoked key is not sent to KuCoin for a test.
    let before = lab.kucoin.everything_received().len();
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
    let finding = tested.findings.iter().find(|finding| finding.is_error);
    assert_eq!(finding.unwrap().name, "key-revoked", "{tested:?}");
    assert_eq!(lab.kucoin.everything_received().len(), before);

    // It stays revoked when written as a new version, after a delete with metadata (versions restart at 1), and under another name.
    let refresh = async |name: &str| {
        let request = RefreshKeyRequest {
            account: "main".to_owned(),
            key: name.to_owned(),
        };
        let response = lab.admin_client("anna").await.refresh_key(request).await;
        response.unwrap().into_inner().state.unwrap()
    };
    assert_eq!(lab.add_key("main", "main", &key(0)), 2);
    assert_eq!(refresh("main").await.status(), KeyStatus::Revoked);
    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    refresh("main").await;
    assert_eq!(lab.add_key("main", "main", &key(0)), 1);
    assert_eq!(refresh("main").await.status(), KeyStatus::Revoked);
    assert_eq!(rejection(&mut bot, accounts()).await, unavailable);
    lab.add_key("main", "second", &key(0));
    let second = refresh("second").await;
    let problem = second
        .reasons
        .iter()
        .any(|reason| reason.contains("has revoked it"));
    assert!(second.version == 1 && problem, "{second:?}");
    assert_eq!(
        rejection(&mut bot, futures_order("still-second")).await,
        None
    );
    let used_ms = last_use(&lab, &key(0));

    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    refresh("main").await;
    assert_eq!(lab.add_key("main", "main", &key(1)), 1);
    let state = refresh("main").await;
    assert_eq!(state.version, 1, "{state:?}");
    assert_eq!(rejection(&mut bot, accounts()).await, None, "with a new id");
    assert_eq!(last_use(&lab, &key(0)), used_ms);
    lab.stop().await;
}

#[tokio::test]
async fn repeated_revocation_does_not_revoke_the_next_key() {
    let mut lab = Lab::start().await;
    for expected in [
        "revoked: main/main version 1",
        "unchanged: main/main was already revoked",
    ] {
        let revoked = lab
            .admin_cli("anna", &["keys", "revoke", "main", "--yes"])
            .await;
        assert_eq!(revoked.code, Some(0), "{revoked:?}");
        assert!(revoked.stdout.starts_with(expected), "{}", revoked.stdout);
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
    assert_eq!(rejection(&mut bot, accounts()).await, None);
    lab.stop().await;
}

#[tokio::test]
async fn key_that_is_not_loaded_yet_can_be_revoked() {
    let mut lab = Lab::install(Settings::default()).await;
    lab.vault.seal();
    lab.start_broker().await;
    let revoked = lab
        .admin_cli("anna", &["keys", "revoke", "main", "--yes"])
        .await;
    assert_eq!(revoked.code, Some(0), "{revoked:?}");
    assert!(
        revoked.stdout.contains("No key was loaded"),
        "{}",
        revoked.stdout
    );
    lab.vault.unseal();
    until_status(&lab, "revoked").await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(
        rejection(&mut bot, accounts()).await.unwrap(),
        "KEY_UNAVAILABLE"
    );
    assert!(lab.kucoin.received().is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn call_waiting_for_a_connection_is_not_sent_after_a_block_halt_or_revocation() {
    let ca = Ca::new("CA of a simulated exchange").unwrap();
    let settings = Settings {
        kucoin: KucoinSettings {
            tls: Some(tls_of(&ca)),
            limits: Limits::none(),
            ..KucoinSettings::default()
        },
        proxy: true,
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
        lab.proxy().hold();
        let mut bot = lab.patient_bot("maker").await;
        let intents = || {
            let lines = lab.audit().into_iter();
            lines.filter(|line| line["event"] == "intent").count()
        };
        let before = intents();
        let waiting = tokio::spawn(async move { bot.send(spot_order("never")).await });
        until("the intent is audited", async || intents() > before).await;
        assert_eq!(lab.admin_cli("anna", words).await.code, Some(0));
        assert!(!waiting.is_finished());
        lab.proxy().open();
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
    let run = async |lab: &Lab, words: &[&str], expected: &str| {
        let ended = lab.admin_cli("anna", words).await;
        assert_eq!(
            (ended.code, ended.stderr.as_str()),
            (Some(0), ""),
            "{words:?}"
        );
        assert!(ended.stdout.starts_with(expected), "{}", ended.stdout);
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
            assert_eq!(rejection(&mut bot, spot_order("never")).await, halted);
            assert_eq!(
                rejection(&mut bot, spot_cancel_all()).await,
                None,
                "cancels still work"
            );
            assert_eq!(
                rejection(&mut bot, accounts()).await,
                None,
                "reads still work"
            );
        }
        run(&lab, undo, "resumed: ").await;
        let mut bot = lab.patient_bot("maker").await;
        let id = words.join("").replace('-', "");
        assert_eq!(rejection(&mut bot, spot_order(&id)).await, None);
    }

    run(&lab, &["bots", "block", MAKER], "blocked: ").await;
    let again = run(&lab, &["bots", "block", MAKER], "blocked: ").await;
    assert!(again.contains("already blocked"), "{again}");
    let but = "but: no rule names this bot";
    assert!(!again.contains(but), "{again}");
    let typo = "spiffe://demo.test/bot/makre";
    let output = run(&lab, &["bots", "block", typo], "blocked: ").await;
    assert!(output.contains(but), "{output}");
    run(&lab, &["bots", "unblock", typo], "unblocked: ").await;
    for is_restarted in [false, true] {
        if is_restarted {
            kill_and_restart(&mut lab).await;
            lab.until_ready().await;
        }
        let mut bot = lab.patient_bot("maker").await;
        for request in [spot_order("never"), spot_cancel_all(), accounts()] {
            assert_eq!(rejection(&mut bot, request).await, blocked);
        }
        let mut reader = lab.patient_bot("reader").await;
        assert_eq!(
            rejection(&mut reader, accounts()).await,
            None,
            "other bots still work"
        );
    }
    run(&lab, &["bots", "unblock", MAKER], "unblocked: ").await;
    run(&lab, &["bots", "unblock", MAKER], "unchanged: ").await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(rejection(&mut bot, spot_order("after-all")).await, None);

    let acts: Vec<_> = acts(&lab)
        .iter()
        .map(|act| {
            let about = ["account", "target_bot", "detail"]
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
    lab.check_audit_log();
}

#[tokio::test]
async fn halt_of_one_account_and_halt_of_all_are_lifted_separately() {
    let mut lab = Lab::start().await;
    for words in [&["halt", "main"], &["halt", "--all"]] {
        assert_eq!(lab.admin_cli("anna", words).await.code, Some(0));
    }
    let resumed = lab.admin_cli("bob", &["resume", "--all", "--yes"]).await;
    let but = "but: still halted individually: main; run `credbroker resume ACCOUNT` for each\n";
    assert!(resumed.stdout.ends_with(but), "{resumed:?}");
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(
        rejection(&mut bot, spot_order("never")).await.unwrap(),
        "ACCOUNT_FROZEN"
    );
    assert_eq!(
        lab.admin_cli("bob", &["resume", "main"]).await.stdout,
        "resumed: the halt of account main is lifted.\n"
    );
    assert_eq!(rejection(&mut bot, spot_order("accepted")).await, None);
    lab.stop().await;
}

#[tokio::test]
async fn accounts_frozen_by_the_previous_version_are_halted_until_resumed() {
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
        rejection(&mut bot, spot_order("never")).await.unwrap(),
        "ACCOUNT_FROZEN"
    );
    let resumed = lab.admin_cli("anna", &["resume", "--all", "--yes"]).await;
    let output = in_one_line(&resumed.stdout);
    let but = "unchanged: `halt --all` was not in effect. but: still halted individually: left-the-rules, main; run ";
    assert!(output.starts_with(but), "{output}");
    for account in ["left-the-rules", "main"] {
        let resumed = lab.admin_cli("anna", &["resume", account]).await;
        assert!(resumed.stdout.starts_with("resumed: "), "{resumed:?}");
    }
    assert_eq!(rejection(&mut bot, spot_order("accepted")).await, None);
    let now: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let expected = json!({
        "version": 1, "blocked_bots": {}, "halted_accounts": {}, "revoked_keys": {}, "revoked_unseen": {},
    });
    assert_eq!(now, expected);
    lab.stop().await;
}

#[tokio::test]
async fn broker_does_not_start_if_restrictions_json_is_unreadable() {
    let lab = Lab::install(Settings::default()).await;
    std::fs::create_dir_all(lab.path("state")).unwrap();
    std::fs::write(lab.path("state/restrictions.json"), "{\"blocked_bots\": ").unwrap();
    let CommandOutput { code, stderr, .. } = lab.run(&["serve"]).await;
    assert_eq!(code, Some(1), "{stderr}");
    let part =
        "state/restrictions.json, which holds all blocks, halts and revocations: EOF while parsing";
    assert!(stderr.contains(part), "{stderr}");
    assert!(lab.kucoin.everything_received().is_empty());
}

#[tokio::test]
async fn restrictions_that_cannot_be_saved_still_take_effect_and_the_command_fails() {
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
    let obstacle = lab.path("state/restrictions.json.new");
    std::fs::create_dir(&obstacle).unwrap();
    let expected = "failed: STATE_UNWRITABLE: the change is in effect but not saved, and a restart would undo it: ";
    let mut bot = lab.patient_bot("maker").await;
    let halted = lab.admin_cli("anna", &["halt", "main"]).await;
    assert_eq!((halted.code, halted.stdout.as_str()), (Some(1), ""));
    assert!(
        halted.stderr_line().starts_with(expected),
        "{}",
        halted.stderr
    );
    assert_eq!(
        rejection(&mut bot, spot_order("never")).await.unwrap(),
        "ACCOUNT_FROZEN"
    );
    // Both of its keys are revoked, although saving the first revocation fails.
    let revoked = lab
        .admin_cli("anna", &["keys", "revoke", "main", "--yes"])
        .await;
    assert!(
        revoked.code == Some(1) && revoked.stderr_line().starts_with(expected),
        "{revoked:?}"
    );
    let read = request(Scope::Futures, Method::Get, "/api/v1/orders", "");
    for request in [accounts(), read.clone()] {
        assert_eq!(
            rejection(&mut bot, request).await.unwrap(),
            "KEY_UNAVAILABLE"
        );
    }
    let blocked = lab.admin_cli("anna", &["bots", "block", MAKER]).await;
    assert!(
        blocked.code == Some(1) && blocked.stderr_line().starts_with(expected),
        "{blocked:?}"
    );
    assert_eq!(
        rejection(&mut bot, accounts()).await.unwrap(),
        "CALLER_BLOCKED"
    );
    let lifted = lab.admin_cli("anna", &["bots", "unblock", MAKER]).await;
    assert!(
        lifted
            .stderr_line()
            .contains("the halt or block is still in effect"),
        "{lifted:?}"
    );
    assert_eq!(
        rejection(&mut bot, accounts()).await.unwrap(),
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

    std::fs::remove_dir(obstacle).unwrap();
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
    until_status(&lab, "revoked").await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(rejection(&mut bot, read).await.unwrap(), "KEY_UNAVAILABLE");
    lab.stop().await;
}

#[tokio::test]
async fn halt_and_block_are_in_effect_when_the_command_returns() {
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
async fn bot_can_be_blocked_by_short_name_and_an_unknown_short_name_is_rejected() {
    let lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let blocked = lab.admin_cli("anna", &["bots", "block", "maker"]).await;
    assert_eq!(blocked.code, Some(0), "{blocked:?}");
    let output = in_one_line(&blocked.stdout);
    assert!(
        output.starts_with(&format!("blocked: {MAKER}. All its calls are refused")),
        "{output}"
    );
    assert_eq!(
        rejection(&mut bot, accounts()).await.unwrap(),
        "CALLER_BLOCKED"
    );
    let unknown = lab.admin_cli("anna", &["bots", "block", "makre"]).await;
    assert_eq!(unknown.code, Some(1), "{unknown:?}");
    assert!(
        unknown.stderr_line().contains("no rule names this bot"),
        "{unknown:?}"
    );
    // A full name can be blocked before any rule names it.
    let later = "spiffe://demo.test/bot/later";
    let blocked = lab.admin_cli("anna", &["bots", "block", later]).await;
    assert_eq!(blocked.code, Some(0), "{blocked:?}");
    for name in ["maker", "later"] {
        let lifted = lab.admin_cli("anna", &["bots", "unblock", name]).await;
        assert_eq!(lifted.code, Some(0), "{lifted:?}");
    }
    assert_eq!(rejection(&mut bot, accounts()).await, None);
}
