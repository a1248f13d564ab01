//! Read-only commands of the real program: `policy explain`, `policy check`, `policy diff`, `policy show`, `explain`, and
//! `health`.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;

use credbroker_sim::installation::Settings;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::Lab;

const CONFIG: &str = include_str!("../../deploy/config.toml");
const RULES: &str = include_str!("../../deploy/rules.toml");

const MAKER: &str = "spiffe://example.org/bot/maker";

struct Folder(TempDir);

impl Folder {
    /// A folder with the example configuration and rules.
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.write("config.toml", &CONFIG.replace("/etc/credbroker/", ""));
        folder.write("rules.toml", RULES);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }
}

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_credbroker"))
}

/// Exit code, stdout, stderr.
fn result_of(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn explain(rules: &Path, words: &[&str]) -> (Option<i32>, String, String) {
    let mut command = program();
    command.args(["policy", "explain", "--rules"]).arg(rules);
    result_of(command.args(words).output().unwrap())
}

fn explain_code(words: &[&str]) -> (Option<i32>, String, String) {
    result_of(program().arg("explain").args(words).output().unwrap())
}

/// The number, from 1, of the first line that contains `part`.
fn line_of(text: &str, part: &str) -> usize {
    text.lines().position(|line| line.contains(part)).unwrap() + 1
}

#[test]
fn policy_explain_names_the_rules_line_that_allows_the_request() {
    let folder = Folder::new();
    let rules = folder.path("rules.toml");
    let words = [
        "--bot",
        MAKER,
        "--account",
        "main",
        "--scope",
        "spot-margin",
        "POST",
        "/api/v1/hf/orders",
    ];
    let (code, stdout, stderr) = explain(&rules, &words);
    let line = line_of(RULES, "allow = [\"public\", \"read\", \"trade\"]");
    let expected = format!(
        "allowed\n{}:{line}: grant[0].allow[2] = \"trade\"\nendpoint: spot.post.v1-hf-orders\nrisk: trade\nrisk-increasing: yes\n\
         key: main/main\nclientOid: required, unless client_oid = \"optional\" in the grant\nmax_wait_ms: 200\nsite: global\n",
        rules.display()
    );
    assert_eq!(
        (code, stdout.as_str(), stderr.as_str()),
        (Some(0), expected.as_str(), "")
    );

    let mut command = program();
    command
        .args(["policy", "explain", "--config"])
        .arg(folder.path("config.toml"));
    let by_config = result_of(command.args(words).output().unwrap());
    assert_eq!(by_config, (Some(0), expected, String::new()));
}

#[test]
fn policy_explain_shows_why_a_request_is_denied_and_how_to_allow_it() {
    let folder = Folder::new();
    let rules = folder.path("rules.toml");
    let spot = ["--account", "main", "--scope", "spot-margin"];
    let cases: [(&str, [&str; 2], &[&str]); 6] = [
        (
            MAKER,
            ["POST", "/api/v3/withdrawals"],
            &[
                "refused: POLICY_DENIED: no rule grants spot.post.v3-withdrawals to this bot on account main",
                "endpoint: spot.post.v3-withdrawals",
                "risk: withdraw",
                "no grant can allow it: ",
                "allow_money_out = true in [account.main]",
                "grants of this bot on this account in this scope:",
                "grant[0].allow[0] = \"public\"",
            ],
        ),
        (
            "spiffe://example.org/bot/nobody",
            ["GET", "/api/v1/accounts"],
            &[
                "refused: CALLER_UNKNOWN: no rule names bot ",
                "to allow it: add a [[grant]] for this bot, account and scope, containing allow = [\"read\"]",
            ],
        ),
        (
            "spiffe://example.org/bot/treasurer",
            ["GET", "/api/v1/accounts"],
            &["refused: POLICY_DENIED: account main is unknown or not granted"],
        ),
        (
            MAKER,
            ["GET", "/api/v1/position"],
            &["refused: POLICY_DENIED: futures.get.v1-position belongs to scope futures"],
        ),
        (
            MAKER,
            ["GET", "/api/v1/brand-new"],
            &[
                "endpoint: not in the catalogue",
                "risk: unknown",
                "risk-increasing: yes",
            ],
        ),
        (
            MAKER,
            ["GET", "/api/v1/accounts?currency=BTC"],
            &[
                "refused: REQUEST_MALFORMED: malformed request: path: expected segments",
                "put query parameters into `query`",
            ],
        ),
    ];
    for (bot, [method, path], parts) in cases {
        let words = [&["--bot", bot], &spot[..], &[method, path]].concat();
        let (code, stdout, stderr) = explain(&rules, &words);
        assert_eq!((code, stderr.as_str()), (Some(1), ""), "{stdout}");
        for part in parts {
            assert!(stdout.contains(part), "{part} is not in\n{stdout}");
        }
    }
}

#[test]
fn policy_explain_exits_with_2_on_invalid_arguments() {
    let folder = Folder::new();
    let rules = folder.path("rules.toml");
    let good = [
        "--bot",
        MAKER,
        "--account",
        "main",
        "--scope",
        "spot-margin",
        "GET",
        "/a",
    ];
    let wrong = [
        ("spot-margin", "spot"),
        ("main", "Main"),
        (MAKER, "*"),
        ("GET", "PUT"),
    ];
    for (from, to) in wrong {
        let words = good.map(|word| if word == from { to } else { word });
        let (code, stdout, stderr) = explain(&rules, &words);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{to}: {stderr}");
        assert!(stderr.contains("expected"), "{stderr}");
    }
    let (code, stdout, stderr) = explain(&folder.path("none.toml"), &good);
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert!(stderr.contains("none.toml cannot be read"), "{stderr}");
}

#[test]
fn policy_check_reports_the_line_of_every_problem() {
    let folder = Folder::new();
    let bad = RULES
        .replace("vip = 3", "vip = 99")
        .replace("\"trade\"]", "\"withdraw\"]")
        .replace("account = \"treasury\"", "account = \"tresury\"");
    let file = folder.write("bad.toml", &bad);
    let check = |file: &Path| {
        result_of(
            program()
                .args(["policy", "check"])
                .arg(file)
                .output()
                .unwrap(),
        )
    };
    let (code, stdout, stderr) = check(&file);
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    let at = |part| format!("{}:{}: ", file.display(), line_of(&bad, part));
    for part in [
        at("vip = 99") + "account.main.vip: expected 0 to 12, got 99",
        at("withdraw") + "grant[0].allow[2]: \"withdraw\" cannot be granted as a class",
        at("account = \"tresury\"") + "grant[3].account: account tresury is not in this file",
        "3 problems".to_owned(),
    ] {
        assert!(stderr.contains(&part), "{part} is not in\n{stderr}");
    }

    let file = folder.write("syntax.toml", "[account.main]\nvip = \n");
    let (code, _, stderr) = check(&file);
    assert_eq!(code, Some(2));
    let start = format!("{}:2: rules: is not valid TOML: ", file.display());
    assert!(stderr.starts_with(&start), "{stderr}");
}

#[test]
fn policy_check_prints_counts_and_warnings() {
    let folder = Folder::new();
    let check = |file: &Path| {
        result_of(
            program()
                .args(["policy", "check"])
                .arg(file)
                .output()
                .unwrap(),
        )
    };
    let rules = folder.path("rules.toml");
    let expected = format!(
        "{}: no problems; 2 accounts, 3 bots, 4 grants\n",
        rules.display()
    );
    // One warning about class `read` for each account that grants it.
    let line = line_of(RULES, "\"read\"");
    let read_warning = format!(
        "warning: {}:{line}: grant[0].allow[1]: if main's key belongs to a master account, \"read\" also covers sub-accounts and invited users (",
        rules.display()
    );
    let (code, counts, stderr) = check(&rules);
    assert_eq!((code, counts), (Some(0), expected));
    assert!(stderr.starts_with(&read_warning), "{stderr}");
    assert_eq!(stderr.matches("warning: ").count(), 2, "{stderr}");
    assert!(stderr.contains("if treasury's key belongs"), "{stderr}");

    let text = RULES.to_owned() + "[account.spare]\n";
    let file = folder.write("spare.toml", &text);
    let (code, _, stderr) = check(&file);
    let line = line_of(&text, "[account.spare]");
    let warning = format!(
        "warning: {}:{line}: account.spare: no grant names this account",
        file.display()
    );
    assert_eq!(code, Some(0));
    assert!(stderr.contains(&warning), "{stderr}");
}

#[test]
fn policy_diff_shows_changed_permissions_and_settings_and_ignores_comments() {
    let folder = Folder::new();
    let old = folder.path("rules.toml");
    let diff = |new: &Path, flags: &[&str]| {
        let mut command = program();
        command
            .args(["policy", "diff"])
            .args([&old, new])
            .args(flags);
        result_of(command.output().unwrap())
    };
    let same = folder.write("same.toml", &format!("# other words\n{RULES}"));
    let nothing = (
        Some(0),
        String::new(),
        "0 permissions gained, 0 lost, 0 settings changed\n".to_owned(),
    );
    assert_eq!(diff(&same, &["--exit-code"]), nothing);

    let text = RULES
        .replace(
            "allow = [\"read\", \"spot.post.v3-accounts-universal-transfer\"]",
            "allow = [\"read\", \"spot.post.v3-withdrawals\"]",
        )
        .replace("vip = 3", "vip = 4");
    let new = folder.write("new.toml", &text);
    let (code, stdout, _) = diff(&new, &[]);
    let treasurer = "spiffe://example.org/bot/treasurer treasury spot-margin:";
    let expected = format!(
        "~ account main: vip = 3 -> 4\n\
         - {treasurer} spot.post.v3-accounts-universal-transfer (transfer, MOVES MONEY)\n\
         + {treasurer} spot.post.v3-withdrawals (withdraw, MOVES MONEY)\n"
    );
    assert_eq!((code, stdout.as_str()), (Some(0), expected.as_str()));
    let (code, stdout, _) = diff(&new, &["--exit-code", "--json"]);
    assert_eq!(code, Some(1));
    let lines: Vec<Value> = stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 3);
    let permission = serde_json::json!({
        "change": "gain", "bot": "spiffe://example.org/bot/treasurer", "account": "treasury", "scope": "spot-margin",
        "endpoint": "spot.post.v3-withdrawals", "risk": "withdraw", "moves_money": true,
    });
    assert_eq!(lines[2], permission);
    let setting = serde_json::json!({
        "change": "setting", "account": "main", "setting": "vip", "old": "3", "new": "4",
    });
    assert_eq!(lines[0], setting);

    let bad = folder.write("bad.toml", "typo = 1\n");
    let (code, stdout, stderr) = diff(&bad, &[]);
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert!(
        stderr.contains("bad.toml:1: typo: is not a key"),
        "{stderr}"
    );
}

#[test]
fn policy_show_lists_each_setting_and_permission_on_its_own_line() {
    let folder = Folder::new();
    let show = |file: &Path, flags: &[&str]| {
        let mut command = program();
        command.args(["policy", "show"]).arg(file).args(flags);
        result_of(command.output().unwrap())
    };
    let file = folder.write(
        "small.toml",
        "[account.main]\nvip = 3\nallow_money_out = true\nkey = { spot-margin = \"k\" }\n\
         [[grant]]\nbot = \"b\"\naccount = \"main\"\nscope = \"spot-margin\"\n\
         allow = [\"spot.post.v3-withdrawals\", \"spot.get.v1-accounts\"]\n\
         [[grant]]\nbot = \"b\"\naccount = \"main\"\nscope = \"spot-margin\"\n\
         unlisted = true\nmethod = \"GET\"\npath = \"/api/v9/new\"\n",
    );
    let expected = "\
account main: allow_money_out = true
account main: key.spot-margin = k
account main: max_stale_cancel_s = 86400
account main: max_stale_s = 900
account main: purpose = trade
account main: site = global
account main: vip = 3
b main spot-margin: spot.get.v1-accounts (read)
b main spot-margin: spot.post.v3-withdrawals (withdraw, MOVES MONEY)
b main spot-margin: unlisted GET /api/v9/new (MAY MOVE MONEY)
";
    assert_eq!(
        show(&file, &[]),
        (Some(0), expected.to_owned(), String::new())
    );
    let (code, stdout, _) = show(&file, &["--json"]);
    assert_eq!(code, Some(0));
    let lines: Vec<Value> = stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), expected.lines().count());
    let setting = serde_json::json!({"account": "main", "setting": "vip", "value": "3"});
    let unlisted = serde_json::json!({
        "bot": "b", "account": "main", "scope": "spot-margin", "endpoint": "unlisted", "risk": "unlisted",
        "moves_money": true, "method": "GET", "path": "/api/v9/new",
    });
    assert_eq!((&lines[6], &lines[9]), (&setting, &unlisted));

    let bad = folder.write("bad.toml", "typo = 1\n");
    let (code, stdout, stderr) = show(&bad, &[]);
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert!(
        stderr.contains("bad.toml:1: typo: is not a key"),
        "{stderr}"
    );
}

#[test]
fn explain_prints_the_advice_that_bots_get_for_a_code() {
    let expected = "\
400006: address-not-whitelisted
  The request's IP address is not whitelisted for this API key.
  cause: The key has an IP restriction, and this address is not on its list.
  fix: Add the broker's egress address to the key's addresses under API
       Management > Edit > IP restriction.
";
    let nothing = String::new();
    assert_eq!(
        explain_code(&["400006"]),
        (Some(0), expected.to_owned(), nothing.clone())
    );

    let (exit_code, both, _) = explain_code(&["200002"]);
    assert_eq!(exit_code, Some(0));
    let titles: Vec<_> = both
        .lines()
        .filter(|line| line.starts_with("200002"))
        .collect();
    let expected = [
        "200002 (futures): futures-rate-limited",
        "200002 (spot-margin): cancel-suspended",
    ];
    assert_eq!(titles, expected);
    let (_, one, _) = explain_code(&["200002", "--scope", "spot-margin"]);
    assert!(
        one.starts_with(expected[1]) && !one.contains(expected[0]),
        "{one}"
    );
    let (exit_code, topic, _) = explain_code(&["funds-in-main"]);
    assert_eq!(exit_code, Some(0));
    assert!(
        topic.contains("  The funds are in the main account, not in the trading account.\n"),
        "{topic}"
    );

    let (exit_code, json, _) = explain_code(&["400004", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (exit_code, &json["topic"]),
        (Some(0), &"secret-or-passphrase-wrong".into())
    );
    assert_eq!(
        json["codes"][0]["codes"],
        serde_json::json!(["400004", "400005"])
    );
}

#[test]
fn explain_exits_with_1_for_a_code_without_advice() {
    let (exit_code, stdout, stderr) = explain_code(&["123456"]);
    assert_eq!((exit_code, stdout.as_str()), (Some(1), ""));
    assert!(
        stderr.starts_with("No advice for 123456.\nfix: Look it up"),
        "{stderr}"
    );
    let (exit_code, _, stderr) = explain_code(&["200002", "--scope", "unified"]);
    assert_eq!(exit_code, Some(1));
    assert!(
        stderr.contains("in scope unified.\nfix: Omit --scope"),
        "{stderr}"
    );
    for misuse in [&["400006", "--list"][..], &["400006", "--scope", "spot"]] {
        assert_eq!(explain_code(misuse).0, Some(2), "{misuse:?}");
    }
}

#[test]
fn explain_list_fits_60_lines_of_80_columns() {
    let (exit_code, list, stderr) = explain_code(&["--list"]);
    assert_eq!((exit_code, stderr.as_str()), (Some(0), ""));
    assert_eq!(explain_code(&[]).1, list);
    assert!(list.lines().count() <= 60, "{list}");
    assert!(list.lines().all(|line| line.len() <= 80), "{list}");
    for advice in credbroker::kucoin::advice::ALL {
        let codes = advice
            .codes
            .iter()
            .flat_map(|(_, codes)| codes.iter().copied());
        for word in codes.chain([advice.topic]) {
            assert!(list.split_whitespace().any(|shown| shown == word), "{word}");
        }
        let (exit_code, stdout, _) = explain_code(&[advice.topic]);
        assert_eq!(exit_code, Some(0));
        assert!(
            stdout.lines().all(|line| line.chars().count() <= 80),
            "{stdout}"
        );
    }
    let (_, json, _) = explain_code(&["--json"]);
    assert_eq!(json.lines().count(), credbroker::kucoin::advice::ALL.len());
    let (_, unified, _) = explain_code(&["--scope", "unified"]);
    assert!(unified.contains("not-a-unified-account") && !unified.contains("cancel-suspended"));
}

#[test]
fn closed_stdout_is_not_an_error() {
    let folder = Folder::new();
    let empty = folder.write("empty.toml", "[account.lonely]\n");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = program();
    command
        .args(["policy", "diff"])
        .arg(&empty)
        .arg(folder.path("rules.toml"));
    let output = command.stdout(Stdio::from(writer)).output().unwrap();
    let (code, _, stderr) = result_of(output);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

async fn health(words: Vec<String>) -> (Option<i32>, String, String) {
    // Not on this thread: the broker is running on it.
    let run = move || result_of(program().arg("health").args(words).output().unwrap());
    tokio::task::spawn_blocking(run).await.unwrap()
}

#[tokio::test]
async fn health_prints_healthz_or_readyz_of_the_broker() {
    let mut lab = Lab::start().await;
    let at = || vec!["--address".to_owned(), lab.ops.to_string()];
    assert_eq!(
        health(at()).await,
        (Some(0), "ok\n".to_owned(), String::new())
    );
    let ready = [at(), vec!["--ready".to_owned()]].concat();
    assert_eq!(
        health(ready.clone()).await,
        (Some(0), "ready\n".to_owned(), String::new())
    );
    let ops = lab.ops;
    lab.stop().await;
    let (code, stdout, stderr) = health(vec!["--address".to_owned(), ops.to_string()]).await;
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(stderr.contains("/healthz: "), "{stderr}");
}

#[tokio::test]
async fn health_succeeds_and_health_ready_fails_on_a_broker_without_keys() {
    let mut lab = Lab::with(Settings {
        keys: Vec::new(),
        wait_ready: false,
        ..Settings::default()
    })
    .await;
    let at = vec!["--address".to_owned(), lab.ops.to_string()];
    assert_eq!(health(at.clone()).await.0, Some(0));
    let (code, stdout, stderr) = health([at, vec!["--ready".to_owned()]].concat()).await;
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stdout.starts_with("not ready\nkey "), "{stdout}");
    assert!(
        stderr.contains("/readyz returned HTTP status 503"),
        "{stderr}"
    );
    lab.stop().await;
}

/// Sends this answer on one connection, and keeps it open until the client closes it.
fn stub(answer: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    port
}

#[test]
fn health_times_out_after_two_seconds() {
    let port = stub("HTTP/1.1 200 OK\r\n");
    let started = std::time::Instant::now();
    let mut command = program();
    let (code, stdout, stderr) = result_of(
        command
            .args(["health", "--address", &format!("127.0.0.1:{port}")])
            .output()
            .unwrap(),
    );
    let elapsed_ms = started.elapsed().as_millis();
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(
        stderr.contains("no complete response within 2 s"),
        "{stderr}"
    );
    assert!((2000..10_000).contains(&elapsed_ms), "{elapsed_ms} ms");
}

#[test]
fn health_connects_to_listen_ops_of_the_configuration() {
    let folder = Folder::new();
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = [0; 4096];
            let count = stream.read(&mut head).unwrap();
            let line = String::from_utf8_lossy(&head[..count]);
            let requested = line.lines().next().unwrap();
            write!(stream, "HTTP/1.1 200 OK\r\n\r\n{requested}\n").unwrap();
        });
        port
    };
    let with_ops = |ops: &str| {
        let text = CONFIG.replace("ops = \"127.0.0.1:9464\"", &format!("ops = \"{ops}\""));
        assert_ne!(text, CONFIG);
        let file = folder.write("config.toml", &text);
        result_of(
            program()
                .args(["health", "--ready", "--config"])
                .arg(file)
                .output()
                .unwrap(),
        )
    };
    let requested = with_ops(&format!("0.0.0.0:{port}"));
    assert_eq!(
        requested,
        (Some(0), "GET /readyz HTTP/1.1\n".to_owned(), String::new())
    );
    let (code, _, stderr) = with_ops("127.0.0.1:0");
    assert_eq!(code, Some(2));
    assert!(
        stderr.contains("expected an address with a port, got 127.0.0.1:0"),
        "{stderr}"
    );
    let (code, _, stderr) = with_ops("nowhere");
    assert_eq!(code, Some(2));
    assert!(stderr.contains("listen.ops: "), "{stderr}");
}
