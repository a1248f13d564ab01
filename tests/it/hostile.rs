//! Untrusted text (from the exchange, Vault, bots, certificates, admins, files) is sanitized in every output.

use std::collections::BTreeMap;

use credbroker::proto::{
    BlockBotRequest, HaltRequest, ListKeysRequest, Method, QueryParameter, Scope, TestKeyRequest,
};
use credbroker_sim::installation::{MAIN_UID, ROOT_TOKEN, RULES, Settings, kv_path};
use credbroker_sim::kucoin::{Fault, FaultAction, KucoinSettings, Matching, SimKey, When};
use credbroker_sim::pki::{Ca, SanType, Usage};
use credbroker_sim::vault::VaultSim;
use prost::Message;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tonic::Status;
use tonic_types::StatusExt;

use crate::delivery::tls_with;
use crate::harness::{CommandOutput, Lab, accounts, patient, program, request, spot_order, until};
use crate::keys::register;

/// Hostile text: a forged log line, escape sequences, right-to-left overrides, invisible characters, and great length.
fn hostile() -> String {
    let start = "spoof\u{202e}\u{2066}\u{200b}\u{feff}\u{1b}[2J\u{9b}31m\u{7}\r\nforged 2026-01-01T00:00:00Z ERROR\u{2028}forged";
    format!("{start}{}", "long".repeat(5000))
}

/// Asserts that an output has no control or invisible characters, no forged line and no flood of text.
fn assert_clean(output: &str, text: &str) {
    // From Unicode's Bidi_Control, Cc, Zl and Zp, and the invisible characters of the text above.
    let is_hostile = |c: char| {
        (c.is_control() && c != '\n')
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    for line in text.lines() {
        let found: String = line.chars().filter(|c| is_hostile(*c)).collect();
        assert_eq!(
            found.escape_unicode().to_string(),
            "",
            "{output}: {line:.300}"
        );
        assert!(!line.starts_with("forged"), "{output}: {line:.300}");
        // A text is cut to 1000 characters; a line can have a few texts.
        let flood = line.matches("long").count() * 4;
        assert!(flood < 4000, "{output}: {} bytes: {line:.300}", line.len());
    }
}

/// Asserts the same for every decoded string in JSON.
fn assert_json_clean(output: &str, value: &Value) {
    match value {
        Value::String(text) => {
            assert!(!text.contains('\n'), "{output}: {text:.300}");
            assert_clean(output, text);
        }
        Value::Array(values) => values
            .iter()
            .for_each(|value| assert_json_clean(output, value)),
        Value::Object(fields) => {
            for (name, value) in fields {
                assert_clean(output, name);
                assert_json_clean(output, value);
            }
        }
        _ => {}
    }
}

fn assert_json_lines_clean(output: &str, text: &str) {
    assert_clean(output, text);
    assert!(
        text.contains("spoof"),
        "{output} does not contain the hostile text:\n{text:.2000}"
    );
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{output}: {line:.300}"));
        assert_json_clean(output, &value);
    }
}

/// Asserts the same for every string of an encoded message.
fn assert_message_clean(output: &str, message: &impl Message) {
    // Tags and lengths are control characters, too, so search only for the hostile sequences.
    let bytes = message.encode_to_vec();
    for hostile in [
        "\u{202e}", "\u{2066}", "\u{200b}", "\u{feff}", "\u{1b}[", "\u{9b}", "\nforged", "\u{2028}",
    ] {
        let found = bytes
            .windows(hostile.len())
            .any(|part| part == hostile.as_bytes());
        assert!(!found, "{output} contains {}", hostile.escape_unicode());
    }
    assert!(bytes.len() < 100_000, "{output} has {} bytes", bytes.len());
}

fn assert_status_clean(output: &str, status: &Status) {
    assert_clean(output, status.message());
    assert!(!status.message().contains('\n'));
    if let Some(request) = status.get_details_bad_request() {
        for violation in request.field_violations {
            assert_clean(output, &violation.field);
            assert_clean(output, &violation.description);
        }
    }
}

/// A Vault that answers every request with a hostile error text.
async fn hostile_vault() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let body = json!({ "errors": [hostile()] }).to_string();
    let answer = format!(
        "HTTP/1.1 500 no\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let answer = answer.clone();
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 8192]).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    format!("http://{address}")
}

/// Makes the exchange answer with a hostile code and message.
fn hostile_answer(path: &str) -> Fault {
    let answer = FaultAction::Answer {
        status: 400,
        body: json!({ "code": hostile(), "msg": hostile() }),
        when: When::BeforeProcessing,
    };
    Fault {
        times: None,
        matching: Matching::Prefix,
        ..Fault::once(path, answer)
    }
}

/// Sends calls of a bot with hostile text in each field.
async fn call_as_bot(lab: &Lab) {
    let mut bot = lab.patient_bot("maker").await;
    let mut by_account = accounts();
    by_account.account = hostile();
    let mut by_id = accounts();
    by_id.request_id = hostile();
    let mut by_path = accounts();
    by_path.path = format!("/api/v1/{}", hostile());
    let mut by_query = accounts();
    by_query.query.push(QueryParameter {
        name: hostile(),
        value: hostile(),
    });
    let body = json!({ hostile(): 1, "clientOid": "fits" }).to_string();
    let by_body = request(Scope::SpotMargin, Method::Post, "/api/v1/hf/orders", &body);
    for call in [by_account, by_id, by_path, by_query] {
        let status = bot.send(call).await.unwrap_err();
        assert_status_clean("status", &status);
    }
    let by_client_oid = spot_order(&format!("oid\u{202e}{}", "x".repeat(30)));
    let status = bot.send(by_client_oid).await.unwrap_err();
    assert_status_clean("status", &status);
    // The broker does not check the member names of a body.
    bot.send(by_body).await.unwrap();
}

/// Connects to both listeners with certificates that have hostile names.
async fn connect_with_hostile_names(lab: &Lab) {
    let uri = SanType::URI(
        "spiffe://demo.test/wrong/spoof\u{1b}[2J\nforged"
            .try_into()
            .unwrap(),
    );
    let identity = lab.ca.issue(&hostile(), &[uri], Usage::Client).unwrap();
    let roots = [lab.ca.certificate_pem().to_owned()];
    for address in [lab.grpc, lab.admin] {
        if let Ok(connection) = patient(address, &roots, &identity).await {
            let mut admin = crate::harness::admin_over(connection);
            admin.list_keys(ListKeysRequest {}).await.unwrap_err();
        }
    }
    let mut bot = lab.patient(&lab.ca.bot("maker").unwrap()).await;
    // Hostile characters that a path can contain.
    let request = http::Request::post("https://localhost/spoof/%E2%80%AE\u{ff}")
        .header("content-type", "application/grpc");
    if let Ok(request) = request.body(tonic::body::Body::empty()) {
        let _ = tonic::codegen::Service::call(&mut bot, request).await;
    }
}

/// Checks the outputs for admins and monitoring.
async fn check_admin_outputs(lab: &Lab) {
    let mut admin = lab.admin_client("anna").await;
    let listed = admin.list_keys(ListKeysRequest {}).await.unwrap();
    assert_message_clean("key list", &listed.into_inner());

    let (_, text) = lab.get("/readyz?verbose").await;
    assert!(text.contains("spoof"), "{text}");
    assert_clean("readyz", &text);
    assert_clean("metrics", &lab.get("/metrics").await.1);
    lab.write_admin_files(&lab.ca.admin("anna").unwrap());
    let typed = "spoof\u{202e}\u{1b}[2J\nforged";
    let new_key = register::lines(&register::key(9, &["General", "Spot"]));
    for (words, input) in [
        (&["keys", "list"][..], ""),
        (&["keys", "list", "--json"], ""),
        (&["keys", "test", "main"], ""),
        (&["keys", "register", "other"], &new_key),
        (&["keys", "register", typed], &new_key),
        (&["keys", "rotate", "main"], &new_key),
        (&["keys", "rotate", "main"], typed),
        (&["keys", "rollback", "main"], ""),
        (&["keys", "revoke", typed, "--yes"], ""),
        (&["bots", "block", typed], ""),
        (&["bots", "unblock", typed], ""),
        (&["bots", "list"], ""),
        (&["clock", "accept", typed], ""),
        (&["halt", "main", "--cancel-all"], ""),
        (&["halt", typed], ""),
        (&["resume", typed], ""),
        (&["resume", "--all", "--yes"], ""),
    ] {
        let result = lab.cli(words, input).await;
        let output = words.join(" ");
        assert_ne!(
            result.stdout.len() + result.stderr.len(),
            0,
            "{output:?} has no output"
        );
        assert_clean(&output, &result.stdout);
        assert_clean(&output, &result.stderr);
        if words.contains(&"--json") {
            assert_json_lines_clean(&output, &result.stdout);
        }
    }
    let named = RULES.replace("bot/maker", "bot/spoof\u{202e}");
    std::fs::write(lab.path("named.toml"), named).unwrap();
    let path = |name: &str| lab.path(name).to_str().unwrap().to_owned();
    let (rules, config) = (path("rules.toml"), path("config.toml"));
    for words in [
        &["doctor", "--config", &config][..],
        &["doctor", "--json", "--config", &config],
        &["check-config", "--config", &config],
        &["policy", "check", &rules],
        &["policy", "diff", &rules, &path("named.toml")],
        &["policy", "diff", typed, &rules],
        &["policy", "show", &path("named.toml")],
        &["policy", "show", "--json", &path("named.toml")],
        &["explain", typed],
    ] {
        run_and_check(words).await;
    }
}

/// Runs the program, checks its output and returns it.
async fn run_and_check(words: &[&str]) -> String {
    let CommandOutput { stdout, stderr, .. } = program(words, "").await;
    let output = words.join(" ");
    assert_clean(&output, &stdout);
    assert_clean(&output, &stderr);
    assert_ne!(stdout.len() + stderr.len(), 0, "{output:?} has no output");
    stdout + &stderr
}

async fn check_outputs_with_hostile_text(format: &str) {
    let key = SimKey {
        sub_name: Some(hostile()),
        parent_uid: Some(1),
        remark: hostile(),
        ..SimKey::fake(MAIN_UID)
    };
    let mut lab = Lab::with(Settings {
        process: true,
        wait_ready: false,
        config: format!("[log]\nformat = \"{format}\"\nfilter = \"info,credbroker=debug\""),
        keys: vec![("other", "main", 1002)],
        ..Settings::default()
    })
    .await;
    lab.add_key("main", "main", &key);
    // The key of the other account is enough to become ready.
    until("the key is loaded", async || {
        let text = lab.get("/readyz?verbose").await.1;
        text.contains("key main/main: version 1 loaded")
    })
    .await;

    call_as_bot(&lab).await;
    connect_with_hostile_names(&lab).await;
    let mut admin = lab.admin_client("anna").await;
    let blocked = admin.block_bot(BlockBotRequest { bot: hostile() }).await;
    assert_status_clean("admin status", &blocked.unwrap_err());
    let test = || TestKeyRequest {
        account: "main".to_owned(),
        ..TestKeyRequest::default()
    };
    let good = admin.test_key(test()).await.unwrap().into_inner();
    assert!(
        good.info.as_ref().unwrap().sub_name.contains("spoof"),
        "{good:?}"
    );
    assert_message_clean("key test", &good);

    lab.kucoin.fault(hostile_answer("/api/"));
    let mut bot = lab.patient_bot("maker").await;
    let refused = bot.send(accounts()).await.unwrap();
    let first = |chars| hostile().chars().take(chars).collect::<String>();
    assert_eq!(
        (refused.code, refused.msg),
        (first(64), first(8192)),
        "code and message are unchanged, except for their length"
    );
    assert_clean("advice", &refused.advice);
    let bad = admin.test_key(test()).await.unwrap().into_inner();
    assert_message_clean("key test", &bad);
    let halt = HaltRequest {
        account: "main".to_owned(),
        cancel_all: true,
        ..HaltRequest::default()
    };
    let halted = admin.halt(halt).await.unwrap().into_inner();
    assert_message_clean("halt", &halted);
    let mut metadata = BTreeMap::new();
    metadata.insert(
        "use_version".to_owned(),
        "spoof\u{202e}\n\u{1b}[2Jforged\r\nforged".to_owned(),
    );
    lab.vault
        .set_custom_metadata("kv", &kv_path("main", "main"), metadata);
    // A reload that fails, so that its problems are reported.
    let wrong = format!("{RULES}\n\"spoof\u{202e}\u{2066}\" = 1\n");
    std::fs::write(lab.path("rules.toml"), wrong).unwrap();
    until("metadata and rules are reported", async || {
        let verbose = lab.get("/readyz?verbose").await.1;
        verbose.contains("use_version")
            && verbose.contains("still using the previously loaded version")
    })
    .await;
    check_admin_outputs(&lab).await;
    lab.process().terminate();
    lab.process().exit_code().await;
    let log = lab.process().log();
    if format == "json" {
        assert_json_lines_clean("log", &log);
    } else {
        assert_clean("log", &log);
        assert!(log.contains("spoof"));
        // Every line is from the broker and starts with a timestamp.
        let is_ours = |line: &str| line.starts_with("20") && line.contains("credbroker");
        assert!(log.lines().all(is_ours), "{log}");
    }
    let audit = std::fs::read_to_string(lab.path("state/audit.jsonl")).unwrap();
    assert_json_lines_clean("audit", &audit);
    for line in audit.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let code = line["code"].as_str().unwrap_or_default();
        assert!(code.chars().count() < 64 * 10, "{code:.300}");
    }
}

#[tokio::test]
async fn untrusted_text_is_sanitized_in_every_output_with_a_json_log() {
    check_outputs_with_hostile_text("json").await;
}

#[tokio::test]
async fn untrusted_text_is_sanitized_in_every_output_with_a_text_log() {
    check_outputs_with_hostile_text("text").await;
}

#[tokio::test]
async fn text_from_vault_is_sanitized_in_every_output() {
    for format in ["json", "text"] {
        let vault = hostile_vault().await;
        let mut lab = Lab::with(Settings {
            vault_url: Some(vault),
            config: format!("[log]\nformat = \"{format}\""),
            process: true,
            wait_ready: false,
            ..Settings::default()
        })
        .await;
        until("Vault's error is reported", async || {
            lab.get("/readyz").await.1.contains("spoof")
        })
        .await;
        assert_clean("readyz", &lab.get("/readyz?verbose").await.1);
        let mut admin = lab.admin_client("anna").await;
        let listed = admin.list_keys(ListKeysRequest {}).await.unwrap();
        assert_message_clean("key list", &listed.into_inner());
        let result = lab.admin_cli("anna", &["keys", "list"]).await;
        assert_clean("keys list", &result.stdout);
        let status = lab.patient_bot("maker").await.send(accounts()).await;
        assert_status_clean("status", &status.unwrap_err());
        lab.process().terminate();
        lab.process().exit_code().await;
        let log = lab.process().log();
        assert!(log.contains("spoof"));
        assert_clean("log", &log);
        let audit = std::fs::read_to_string(lab.path("state/audit.jsonl")).unwrap();
        assert_clean("audit", &audit);
    }
}

/// The certificates of Vault and of the exchange are for other hosts, with hostile names.
#[tokio::test]
async fn names_in_server_certificates_are_sanitized_in_every_output() {
    let ca = Ca::new("hostile").unwrap();
    let names = [
        SanType::DnsName("spoof\u{1b}[2J\nforged".try_into().unwrap()),
        SanType::URI("https://spoof\u{1b}[2J\nforged".try_into().unwrap()),
    ];
    let server = ca.issue(&hostile(), &names, Usage::Server).unwrap();
    let vault = VaultSim::start_dev_tls(ROOT_TOKEN, &server).await.unwrap();
    let mut lab = Lab::install(Settings {
        kucoin: KucoinSettings {
            tls: Some(tls_with(&server)),
            ..KucoinSettings::default()
        },
        egress: "roots = \"roots.pem\"\nconnect_timeout_ms = 1000".to_owned(),
        files: vec![("roots.pem", ca.certificate_pem().to_owned())],
        process: true,
        ..Settings::default()
    })
    .await;
    lab.reconfigure(&lab.vault.address(), &vault.address());
    lab.reconfigure("[vault]\n", "[vault]\nroots = \"roots.pem\"\n");
    lab.spawn_broker().await;
    until(
        "the certificate is rejected, and readyz reports why",
        async || lab.get("/readyz?verbose").await.1.contains("spoof"),
    )
    .await;
    assert_clean("readyz", &lab.get("/readyz?verbose").await.1);
    let config = lab.path("config.toml").to_str().unwrap().to_owned();
    for words in [
        &["doctor", "--config", &config][..],
        &["doctor", "--json", "--config", &config],
    ] {
        let output = run_and_check(words).await;
        for line in output.lines().filter(|line| line.starts_with('{')) {
            assert_json_clean("doctor", &serde_json::from_str(line).unwrap());
        }
        // The names of both certificates, Vault's and the exchange's.
        assert!(output.matches("spoof").count() >= 2, "{output:.2000}");
    }
    lab.process().terminate();
    lab.process().exit_code().await;
    assert_json_lines_clean("log", &lab.process().log());
}

/// Another program answers at the broker's address.
#[tokio::test]
async fn the_health_command_shows_no_control_characters() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 1024]).await;
        let text: String = hostile().chars().take(150).collect();
        let answer = format!("HTTP/1.1 200 ok\r\nconnection: close\r\n\r\n{text}");
        let _ = stream.write_all(answer.as_bytes()).await;
    });
    let text = program(&["health", "--address", &address], "").await.stdout;
    let text = text.replace("\nforged", "");
    assert_clean("health", &text);
    assert!(text.contains("spoof\\u{202e}"), "{text:.300}");
}
