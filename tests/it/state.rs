//! `state_dir` at the start: missing files are always reported.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use credbroker::config::Config;
use credbroker_sim::installation::Settings;
use serde_json::{Value, json};

use crate::harness::{Lab, accounts, refusal, spot_order};

/// Log message if there is no `restrictions.json`.
const NOTHING_FOUND: &str = "no restrictions.json found; no bot is blocked, no account is halted, no key is revoked; if this \
                             broker has run before, check state_dir and its mount";

async fn in_a_process() -> Lab {
    Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await
}

async fn stop(lab: &mut Lab) {
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
}

/// The log line about a missing `restrictions.json`, if any, once the broker is ready.
async fn missing_file_warning(lab: &mut Lab) -> Option<Value> {
    lab.until_ready().await;
    let log = lab.process().log();
    let mut lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.find(|line| line["message"] == NOTHING_FOUND)
}

fn audit_lines(lab: &Lab) -> Vec<Value> {
    lab.audit_file()
}

#[tokio::test]
async fn start_with_an_empty_state_dir_is_logged_and_audited() {
    let mut lab = in_a_process().await;
    // The test deletes the audit file with the state.
    lab.is_audit_checked = false;
    let line = missing_file_warning(&mut lab)
        .await
        .expect("the first start logs it");
    assert_eq!(line["level"], "WARN");
    let halted = lab.admin_cli("anna", &["halt", "main"]).await;
    assert_eq!(halted.code, Some(0), "{halted:?}");
    stop(&mut lab).await;

    lab.spawn_broker().await;
    assert_eq!(
        missing_file_warning(&mut lab).await,
        None,
        "restrictions.json exists"
    );
    stop(&mut lab).await;

    // As if its disk were not mounted.
    std::fs::remove_dir_all(lab.path("state")).unwrap();
    lab.spawn_broker().await;
    let line = missing_file_warning(&mut lab)
        .await
        .expect("the empty folder is logged");
    assert_eq!(line["level"], "WARN");
    assert_eq!(line["audit_file_found"], false);
    let state_dir = lab.path("state").display().to_string();
    assert_eq!(line["state_dir"], state_dir);
    let first = audit_lines(&lab).remove(0);
    assert_eq!(
        (&first["event"], &first["file"], &first["outcome"]),
        (&json!("change"), &json!("restrictions"), &json!("loaded"))
    );
    let detail = first["detail"].as_str().unwrap();
    assert_eq!(
        detail,
        format!(
            "no restrictions.json and no audit file found: no bot is blocked, no account is halted, no key is revoked. If \
             this broker has run before, check that state_dir ({state_dir}) is correct and its disk is mounted"
        )
    );
    stop(&mut lab).await;
}

#[tokio::test]
async fn start_with_an_audit_file_but_no_restrictions_json_is_logged_and_audited() {
    let mut lab = in_a_process().await;
    lab.until_ready().await;
    stop(&mut lab).await;
    let before = audit_lines(&lab).len();
    std::fs::remove_file(lab.path("state/restrictions.json")).unwrap();
    lab.spawn_broker().await;
    let line = missing_file_warning(&mut lab)
        .await
        .expect("the missing file is logged");
    assert_eq!(line["audit_file_found"], true);
    let next = audit_lines(&lab).remove(before);
    assert_eq!(next["file"], "restrictions");
    let detail = next["detail"].as_str().unwrap();
    assert!(
        detail.starts_with("no restrictions.json found: "),
        "{detail}"
    );
    stop(&mut lab).await;
}

#[tokio::test]
async fn parent_of_state_dir_is_never_created() {
    let lab = Lab::install(Settings::default()).await;
    lab.reconfigure("state_dir = \"state\"", "state_dir = \"mnt/state\"");
    let ended = lab.run(&["serve"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for part in [
        "cannot create ",
        "mnt/state: its parent ",
        "mnt does not exist; mount the disk, create the parent, or correct state_dir",
    ] {
        assert!(ended.stderr.contains(part), "{part:?} is not in {ended:?}");
    }
    assert!(!lab.path("mnt").exists());
    let ended = lab.run(&["doctor", "--json"]).await;
    let state = ended
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .find(|line| line["check"] == "state")
        .unwrap();
    assert_eq!(state["status"], "failed", "{state}");
    assert!(
        state["fix"].as_str().unwrap().contains("mount the disk"),
        "{state}"
    );
    assert!(!lab.path("mnt").exists());
}

#[tokio::test]
async fn doctor_warns_about_an_empty_state_dir() {
    let lab = Lab::install(Settings::default()).await;
    std::fs::create_dir(lab.path("state")).unwrap();
    let ended = lab.run(&["doctor", "--json"]).await;
    let is_reported = ended.stdout.lines().any(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        line["check"] == "state"
            && line["status"] == "warning"
            && line["detail"]
                .as_str()
                .unwrap()
                .ends_with("holds no restrictions.json")
    });
    assert!(is_reported, "{ended:?}");
}

#[tokio::test]
async fn state_dir_with_tilde_or_variable_is_rejected_with_the_fix() {
    let text = std::fs::read_to_string("tests/field-cases/files/folders-taken-literally.toml");
    let text = text.unwrap();
    let lines = text.lines().map(|line| line.trim_start_matches("# "));
    let cases: Vec<_> = lines.filter(|line| line.starts_with("state_dir")).collect();
    assert_eq!(cases.len(), 2);
    let lab = Lab::install(Settings::default()).await;
    let usual = std::fs::read_to_string(lab.path("config.toml")).unwrap();
    for case in cases {
        let config = usual.replace("state_dir = \"state\"", case);
        let problems = Config::parse(&config, lab.folder.path()).unwrap_err();
        let value = case.split_once(" = ").unwrap().1;
        assert_eq!(
            problems[0].to_string(),
            format!(
                "line 2: state_dir: expected a path without ~ or variables, which are not expanded, got {value}; write the \
                 full path, for example: state_dir = \"/var/lib/credbroker\""
            )
        );
        assert_eq!(problems.len(), 1, "{problems:?}");
    }
    assert!(!Path::new("~").exists());
}

#[tokio::test]
async fn file_paths_with_tilde_or_variable_are_rejected_in_every_setting() {
    let text = "rules = \"~/rules.toml\"\nstate_dir = \"$HOME/state\"\n\
                [audit]\nfile = \"~broker/audit.jsonl\"\n\
                [listen]\ngrpc = \"127.0.0.1:0\"\nops = \"127.0.0.1:0\"\n\
                [tls]\ncertificate = \"${TLS}/server.pem\"\nkey = \"~/server.key\"\nclient_ca = \"~/ca.pem\"\nadmin_ca = \"~/a.pem\"\n\
                [vault]\naddress = \"http://127.0.0.1:8200\"\nroots = \"~/vault.pem\"\n\
                [egress]\naddress = \"127.0.0.1\"\nroots = \"$HOME/exchange.pem\"\n\
                [vault.auth]\n";
    let common = [
        "rules",
        "state_dir",
        "audit.file",
        "tls.certificate",
        "tls.key",
        "tls.client_ca",
        "tls.admin_ca",
        "vault.roots",
    ];
    for (auth, keys) in [
        (
            "method = \"token_file\"\nfile = \"~/token\"",
            &["vault.auth.file"][..],
        ),
        (
            "method = \"approle\"\nrole_id = \"i\"\nsecret_id_file = \"~/secret-id\"",
            &["vault.auth.secret_id_file"],
        ),
        (
            "method = \"kubernetes\"\nrole = \"r\"\njwt_file = \"$DIR/token\"",
            &["vault.auth.jwt_file"],
        ),
        (
            "method = \"cert\"\ncertificate = \"~/c.pem\"\nkey = \"~/c.key\"",
            &["vault.auth.certificate", "vault.auth.key"],
        ),
    ] {
        let text = format!("{text}{auth}\n");
        let problems = Config::parse(&text, Path::new("/etc/credbroker")).unwrap_err();
        let mut found: Vec<_> = problems
            .iter()
            .filter(|problem| problem.problem.starts_with("expected a path without ~"))
            .map(|problem| problem.key.as_str())
            .collect();
        found.sort_unstable();
        let mut expected: Vec<_> = common.iter().chain(keys).copied().collect();
        expected.push("egress.roots");
        expected.sort_unstable();
        assert_eq!(found, expected, "{problems:?}");
    }
}

#[tokio::test]
async fn broker_starts_even_if_restrictions_json_cannot_be_created() {
    let mut lab = Lab::install(Settings::default()).await;
    std::fs::create_dir_all(lab.path("state/restrictions.json.new")).unwrap();
    lab.start_broker().await;
    lab.until_ready().await;
    lab.stop().await;
}

/// `tests/upgrade` was written by the broker at 9c3d1f9, which froze accounts instead of halting them: after a read and an
/// order, an admin froze account main, blocked bot reader and revoked the key of account other.
#[tokio::test]
async fn state_and_audit_log_of_the_previous_version_are_read() {
    let mut lab = Lab::install(Settings::default()).await;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/upgrade");
    for (file, mode) in [("restrictions.json", 0o600), ("audit.jsonl", 0o600)] {
        let to = lab.path("state").join(file);
        std::fs::create_dir_all(lab.path("state")).unwrap();
        std::fs::copy(folder.join(file), &to).unwrap();
        std::fs::set_permissions(to, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let before = std::fs::read_to_string(lab.path("state/audit.jsonl")).unwrap();
    // That broker's requests are in the audit log, but this simulated exchange never received them.
    lab.start_broker().await;
    lab.until_keys_loaded().await;

    let mut maker = lab.patient_bot("maker").await;
    let mut reader = lab.patient_bot("reader").await;
    let reasons = [
        refusal(maker.send(spot_order("never")).await).1,
        refusal(reader.send(accounts()).await).1,
    ];
    assert_eq!(reasons, ["ACCOUNT_FROZEN", "CALLER_BLOCKED"]);
    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(text.contains("\nkey other/main: revoked\n"), "{text}");
    maker.send(accounts()).await.unwrap();
    let resumed = lab.admin_cli("anna", &["resume", "main"]).await;
    assert_eq!(resumed.code, Some(0), "{resumed:?}");
    maker.send(spot_order("after")).await.unwrap();

    let after = std::fs::read_to_string(lab.path("state/audit.jsonl")).unwrap();
    assert!(after.starts_with(&before), "existing lines must not change");
    let runs: BTreeSet<_> = audit_lines(&lab)
        .iter()
        .map(|line| line["run"].to_string())
        .collect();
    assert_eq!(runs.len(), 2);
    let stored: Value =
        serde_json::from_slice(&std::fs::read(lab.path("state/restrictions.json")).unwrap())
            .unwrap();
    assert_eq!(
        (&stored["version"], &stored["halted_accounts"]),
        (&json!(1), &json!({}))
    );
    assert!(stored["blocked_bots"]["spiffe://demo.test/bot/reader"].is_object());
    assert_eq!(stored["revoked_keys"].as_object().unwrap().len(), 1);
    lab.stop().await;
}
