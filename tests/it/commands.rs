//! The commands that ask without changing anything, as the real program: `policy explain`, `check`, `diff`, `show`, `explain`, and
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
    /// With the example configuration and rules.
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
fn told(output: Output) -> (Option<i32>, String, String) {
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
    told(command.args(words).output().unwrap())
}

fn code(words: &[&str]) -> (Option<i32>, String, String) {
    told(program().arg("explain").args(words).output().unwrap())
}

/// The line, from 1, of the first one that holds this.
fn line_of(text: &str, part: &str) -> usize {
    text.lines().position(|line| line.contains(part)).unwrap() + 1
}

#[test]
fn explain_names_the_line_that_allows() {
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
    let (code, said, talk) = explain(&rules, &words);
    let line = line_of(RULES, "allow = [\"public\", \"read\", \"trade\"]");
    let expected = format!(
        "allowed\n{}:{line}: grant[0].allow[2] = \"trade\"\nendpoint: spot.post.v1-hf-orders\nrisk: trade\nrisk-increasing: yes\n\
         key: main/main\nsite: global\n",
        rules.display()
    );
    assert_eq!(
        (code, said.as_str(), talk.as_str()),
        (Some(0), expected.as_str(), "")
    );

    let mut command = program();
    command
        .args(["policy", "explain", "--config"])
        .arg(folder.path("config.toml"));
    let by_config = told(command.args(words).output().unwrap());
    assert_eq!(by_config, (Some(0), expected, String::new()));
}

#[test]
fn explain_says_why_not_and_what_would_help() {
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
                "to allow it: no grant can allow it as things stand:",
                "allow_money_out = true in [account.main]",
                "this bot may do on this account in this scope:",
                "grant[0].allow[0] = \"public\"",
            ],
        ),
        (
            "spiffe://example.org/bot/nobody",
            ["GET", "/api/v1/accounts"],
            &[
                "refused: CALLER_UNKNOWN: no rule names the bot",
                "to allow it: a [[grant]] for this bot, account and scope with allow = [\"read\"]",
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
                "query parameters go into `query`",
            ],
        ),
    ];
    for (bot, [method, path], parts) in cases {
        let words = [&["--bot", bot], &spot[..], &[method, path]].concat();
        let (code, said, talk) = explain(&rules, &words);
        assert_eq!((code, talk.as_str()), (Some(1), ""), "{said}");
        for part in parts {
            assert!(said.contains(part), "{part} is not in\n{said}");
        }
    }
}

#[test]
fn explain_tells_its_own_misuse_from_a_refusal() {
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
        let (code, said, talk) = explain(&rules, &words);
        assert_eq!((code, said.as_str()), (Some(2), ""), "{to}: {talk}");
        assert!(talk.contains("expected"), "{talk}");
    }
    let (code, said, talk) = explain(&folder.path("none.toml"), &good);
    assert_eq!((code, said.as_str()), (Some(2), ""));
    assert!(talk.contains("none.toml cannot be read"), "{talk}");
}

#[test]
fn check_names_the_line_of_every_problem() {
    let folder = Folder::new();
    let bad = RULES
        .replace("vip = 3", "vip = 99")
        .replace("\"trade\"]", "\"withdraw\"]")
        .replace("account = \"treasury\"", "account = \"tresury\"");
    let file = folder.write("bad.toml", &bad);
    let check = |file: &Path| {
        told(
            program()
                .args(["policy", "check"])
                .arg(file)
                .output()
                .unwrap(),
        )
    };
    let (code, said, talk) = check(&file);
    assert_eq!((code, said.as_str()), (Some(2), ""));
    let at = |part| format!("{}:{}: ", file.display(), line_of(&bad, part));
    for part in [
        at("vip = 99") + "account.main.vip: expected 0 to 12, got 99",
        at("withdraw") + "grant[0].allow[2]: \"withdraw\" is not granted as a class",
        at("account = \"tresury\"") + "grant[3].account: names no account of this file",
        "3 problems".to_owned(),
    ] {
        assert!(talk.contains(&part), "{part} is not in\n{talk}");
    }

    let file = folder.write("syntax.toml", "[account.main]\nvip = \n");
    let (code, _, talk) = check(&file);
    assert_eq!(code, Some(2));
    let start = format!("{}:2: rules: is not TOML: ", file.display());
    assert!(talk.starts_with(&start), "{talk}");
}

#[test]
fn check_counts_and_warns() {
    let folder = Folder::new();
    let check = |file: &Path| {
        told(
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
    // Of class `read`, once for each account that has it.
    let line = line_of(RULES, "\"read\"");
    let of_master = format!(
        "warning: {}:{line}: grant[0].allow[1]: \"read\" also reads other accounts if main's key belongs to a master account: ",
        rules.display()
    );
    let (code, counts, talk) = check(&rules);
    assert_eq!((code, counts), (Some(0), expected));
    assert!(talk.starts_with(&of_master), "{talk}");
    assert_eq!(talk.matches("warning: ").count(), 2, "{talk}");
    assert!(talk.contains("if treasury's key belongs"), "{talk}");

    let text = RULES.to_owned() + "[account.spare]\n";
    let file = folder.write("spare.toml", &text);
    let (code, _, talk) = check(&file);
    let line = line_of(&text, "[account.spare]");
    let warning = format!(
        "warning: {}:{line}: account.spare: no grant names this account",
        file.display()
    );
    assert_eq!(code, Some(0));
    assert!(talk.contains(&warning), "{talk}");
}

#[test]
fn diff_shows_what_changes_and_not_how_it_is_written() {
    let folder = Folder::new();
    let old = folder.path("rules.toml");
    let diff = |new: &Path, flags: &[&str]| {
        let mut command = program();
        command
            .args(["policy", "diff"])
            .args([&old, new])
            .args(flags);
        told(command.output().unwrap())
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
    let (code, said, _) = diff(&new, &[]);
    let treasurer = "spiffe://example.org/bot/treasurer treasury spot-margin:";
    let expected = format!(
        "~ account main: vip = 3 -> 4\n\
         - {treasurer} spot.post.v3-accounts-universal-transfer (transfer, MOVES MONEY)\n\
         + {treasurer} spot.post.v3-withdrawals (withdraw, MOVES MONEY)\n"
    );
    assert_eq!((code, said.as_str()), (Some(0), expected.as_str()));
    let (code, said, _) = diff(&new, &["--exit-code", "--json"]);
    assert_eq!(code, Some(1));
    let lines: Vec<Value> = said
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
    let (code, said, talk) = diff(&bad, &[]);
    assert_eq!((code, said.as_str()), (Some(2), ""));
    assert!(talk.contains("bad.toml:1: typo: is not a key"), "{talk}");
}

#[test]
fn show_lists_what_the_rules_allow_a_line_each() {
    let folder = Folder::new();
    let show = |file: &Path, flags: &[&str]| {
        let mut command = program();
        command.args(["policy", "show"]).arg(file).args(flags);
        told(command.output().unwrap())
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
    let (code, said, _) = show(&file, &["--json"]);
    assert_eq!(code, Some(0));
    let lines: Vec<Value> = said
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
    let (code, said, talk) = show(&bad, &[]);
    assert_eq!((code, said.as_str()), (Some(2), ""));
    assert!(talk.contains("bad.toml:1: typo: is not a key"), "{talk}");
}

#[test]
fn a_code_is_explained_in_the_sentences_that_bots_get() {
    let expected = "\
400006: address-not-whitelisted
  KuCoin takes no requests with this API key from the address that this one came
  from.
  why: The key is restricted to certain IP addresses, and this one is not among
       them.
  fix: Add the broker's egress address to the key's addresses under API
       Management > Edit > IP restriction.
";
    let nothing = String::new();
    assert_eq!(
        code(&["400006"]),
        (Some(0), expected.to_owned(), nothing.clone())
    );

    let (ended, both, _) = code(&["200002"]);
    assert_eq!(ended, Some(0));
    let titles: Vec<_> = both
        .lines()
        .filter(|line| line.starts_with("200002"))
        .collect();
    let expected = [
        "200002 (futures): futures-rate-limited",
        "200002 (spot-margin): cancel-suspended",
    ];
    assert_eq!(titles, expected);
    let (_, one, _) = code(&["200002", "--scope", "spot-margin"]);
    assert!(
        one.starts_with(expected[1]) && !one.contains(expected[0]),
        "{one}"
    );
    let (ended, topic, _) = code(&["funds-in-main"]);
    assert_eq!(ended, Some(0));
    assert!(
        topic.contains("  Balances are in the main account, not in the trading account.\n"),
        "{topic}"
    );

    let (ended, json, _) = code(&["400004", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (ended, &json["topic"]),
        (Some(0), &"secret-or-passphrase-wrong".into())
    );
    assert_eq!(
        json["codes"][0]["codes"],
        serde_json::json!(["400004", "400005"])
    );
}

#[test]
fn a_code_without_advice_is_no_success() {
    let (ended, said, talk) = code(&["123456"]);
    assert_eq!((ended, said.as_str()), (Some(1), ""));
    assert!(
        talk.starts_with("There is no advice on 123456.\nfix: Look it up"),
        "{talk}"
    );
    let (ended, _, talk) = code(&["200002", "--scope", "unified"]);
    assert_eq!(ended, Some(1));
    assert!(
        talk.contains("in scope unified.\nfix: Leave --scope out"),
        "{talk}"
    );
    for misuse in [&["400006", "--list"][..], &["400006", "--scope", "spot"]] {
        assert_eq!(code(misuse).0, Some(2), "{misuse:?}");
    }
}

#[test]
fn all_codes_are_listed_in_one_screenful_of_eighty_columns() {
    let (ended, list, talk) = code(&["--list"]);
    assert_eq!((ended, talk.as_str()), (Some(0), ""));
    assert_eq!(code(&[]).1, list);
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
        let (ended, said, _) = code(&[advice.topic]);
        assert_eq!(ended, Some(0));
        assert!(
            said.lines().all(|line| line.chars().count() <= 80),
            "{said}"
        );
    }
    let (_, json, _) = code(&["--json"]);
    assert_eq!(json.lines().count(), credbroker::kucoin::advice::ALL.len());
    let (_, unified, _) = code(&["--scope", "unified"]);
    assert!(unified.contains("not-a-unified-account") && !unified.contains("cancel-suspended"));
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
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
    let (code, _, talk) = told(output);
    assert_eq!(code, Some(0), "{talk}");
    assert!(!talk.contains("panicked"), "{talk}");
}

async fn health(words: Vec<String>) -> (Option<i32>, String, String) {
    // The broker under test needs this thread.
    let run = move || told(program().arg("health").args(words).output().unwrap());
    tokio::task::spawn_blocking(run).await.unwrap()
}

#[tokio::test]
async fn a_probe_says_what_the_broker_says() {
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
    let (code, said, talk) = health(vec!["--address".to_owned(), ops.to_string()]).await;
    assert_eq!((code, said.as_str()), (Some(1), ""));
    assert!(talk.contains("/healthz: "), "{talk}");
}

#[tokio::test]
async fn a_probe_of_a_broker_without_keys_fails_when_asked_for_readiness_alone() {
    let mut lab = Lab::with(Settings {
        keys: Vec::new(),
        wait_ready: false,
        ..Settings::default()
    })
    .await;
    let at = vec!["--address".to_owned(), lab.ops.to_string()];
    assert_eq!(health(at.clone()).await.0, Some(0));
    let (code, said, talk) = health([at, vec!["--ready".to_owned()]].concat()).await;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.starts_with("not ready\nkey "), "{said}");
    assert!(talk.contains("/readyz answered 503"), "{talk}");
    lab.stop().await;
}

/// Answers one connection with this, and then keeps it open for as long as the other side does.
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
fn a_probe_waits_two_seconds_and_no_longer() {
    let port = stub("HTTP/1.1 200 OK\r\n");
    let started = std::time::Instant::now();
    let mut command = program();
    let (code, said, talk) = told(
        command
            .args(["health", "--address", &format!("127.0.0.1:{port}")])
            .output()
            .unwrap(),
    );
    let took = started.elapsed().as_millis();
    assert_eq!((code, said.as_str()), (Some(1), ""));
    assert!(talk.contains("no complete answer within 2 s"), "{talk}");
    assert!((2000..10_000).contains(&took), "{took} ms");
}

#[test]
fn a_probe_asks_where_the_configuration_says() {
    let folder = Folder::new();
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = [0; 4096];
            let count = stream.read(&mut head).unwrap();
            let line = String::from_utf8_lossy(&head[..count]);
            let asked = line.lines().next().unwrap();
            write!(stream, "HTTP/1.1 200 OK\r\n\r\n{asked}\n").unwrap();
        });
        port
    };
    let with_ops = |ops: &str| {
        let text = CONFIG.replace("ops = \"127.0.0.1:9464\"", &format!("ops = \"{ops}\""));
        assert_ne!(text, CONFIG);
        let file = folder.write("config.toml", &text);
        told(
            program()
                .args(["health", "--ready", "--config"])
                .arg(file)
                .output()
                .unwrap(),
        )
    };
    let asked = with_ops(&format!("0.0.0.0:{port}"));
    assert_eq!(
        asked,
        (Some(0), "GET /readyz HTTP/1.1\n".to_owned(), String::new())
    );
    let (code, _, talk) = with_ops("127.0.0.1:0");
    assert_eq!(code, Some(2));
    assert!(
        talk.contains("expected an address with a port, got 127.0.0.1:0"),
        "{talk}"
    );
    let (code, _, talk) = with_ops("nowhere");
    assert_eq!(code, Some(2));
    assert!(talk.contains("listen.ops: "), "{talk}");
}
