//! `credbroker doctor`, as the real program: on a healthy installation, and with one problem after the other.

use std::time::{Duration, Instant};

use credbroker::clock::Clock;
use credbroker_sim::installation::{MAIN_UID, ROOT_TOKEN, Settings, kv_path, secret};
use credbroker_sim::kucoin::{Fault, FaultAction, KucoinSettings, ReceivedRequest, SimKey, When};
use credbroker_sim::pki::Ca;
use credbroker_sim::vault::{RoleSettings, VaultSim};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::delivery::tls_with;
use crate::harness::{CommandOutput, Lab, in_one_line, rules_for, set_mode, until};

use crate::keys::real::Api;

/// A part of every secret, which must not appear in any output.
const MARK: &str = "canary0secret";

const DAY_S: u64 = 24 * 3600;

fn now_s() -> u64 {
    Clock::system().wall_ms().unsigned_abs() / 1000
}

/// One key for all scopes.
const ACCOUNT: &str =
    "[account.main]\nkey = { spot-margin = \"main\", futures = \"main\", unified = \"main\" }\n";

fn rules() -> String {
    let grants = [
        ("spot-margin", "\"read\", \"trade\""),
        ("futures", "\"read\", \"trade\""),
        ("unified", "\"read\", \"trade\""),
    ];
    rules_for(ACCOUNT, &grants)
}

/// A key without problems.
fn key() -> SimKey {
    let mut key = SimKey::fake(MAIN_UID);
    key.api_key = format!("{MARK}0key0id");
    key.api_secret = format!("{MARK}-secret");
    key.passphrase = format!("{MARK}-passphrase");
    key.ip_whitelist = vec!["127.0.0.1".parse().unwrap()];
    key
}

fn settings() -> Settings {
    Settings {
        rules: rules(),
        keys: Vec::new(),
        wait_ready: false,
        egress: "connect_timeout_ms = 1000".to_owned(),
        ..Settings::default()
    }
}

/// An installation without problems, whose broker has run and was stopped.
async fn healthy() -> Lab {
    healthy_with(settings()).await
}

async fn healthy_with(settings: Settings) -> Lab {
    let mut lab = Lab::install(settings).await;
    lab.add_key("main", "main", &key());
    deny_writes(&lab);
    lab.start_broker().await;
    lab.until_ready().await;
    lab.stop().await;
    lab
}

/// Denies writes like the policy `deploy/vault/broker.hcl`, which tests against a real Vault check.
fn deny_writes(lab: &Lab) {
    lab.vault.deny(Some(ROOT_TOKEN), Some("POST"), "kv/*");
}

async fn doctor(lab: &Lab, words: &[&str]) -> CommandOutput {
    let result = lab.run(&[&["doctor"], words].concat()).await;
    let both = format!("{}{}", result.stdout, result.stderr);
    assert!(!both.contains(MARK) && !both.contains(ROOT_TOKEN), "{both}");
    result
}

/// Exit code and lines of `doctor --json`.
async fn lines(lab: &Lab) -> (Option<i32>, Vec<Value>) {
    let result = doctor(lab, &["--json"]).await;
    assert_eq!(result.stderr, "");
    let lines = result.stdout.lines();
    let lines = lines.map(|line| serde_json::from_str(line).unwrap());
    (result.code, lines.collect())
}

/// Checks that `doctor` fails, and that a line of this check contains this detail and this fix.
async fn assert_failed(lab: &Lab, check: &str, detail: &str, fix: &str) {
    assert_reported(lab, "failed", check, detail, fix).await;
}

async fn assert_reported(lab: &Lab, status: &str, check: &str, detail: &str, fix: &str) {
    let (code, lines) = lines(lab).await;
    let is_match = |line: &&Value| {
        line["check"] == check
            && line["status"] == status
            && line["detail"].as_str().unwrap().contains(detail)
    };
    let found = lines.iter().find(is_match);
    let found = found.unwrap_or_else(|| panic!("no {status} {check}: {detail} in {lines:#?}"));
    let found_fix = found["fix"].as_str().unwrap();
    assert!(found_fix.contains(fix), "{fix} is not in {found_fix}");
    let expected = i32::from(status == "failed");
    assert_eq!(code, Some(expected), "{lines:#?}");
}

/// Every line that is not ok, except those that depend on the machine of the test.
fn not_ok(lines: &[Value]) -> Vec<&Value> {
    let is_of_machine = |line: &Value| {
        let is_warning = line["status"] == "warning";
        let depends = ["descriptors", "memory"].contains(&line["check"].as_str().unwrap());
        depends || line["check"] == "audit" && is_warning
    };
    let is_bad = |line: &&Value| line["status"] != "ok" && !is_of_machine(line);
    lines.iter().filter(is_bad).collect()
}

#[tokio::test]
async fn healthy_installation_passes_every_check_on_one_screen() {
    let lab = healthy().await;
    let before = lab.kucoin.everything_received().len();
    let (code, found) = lines(&lab).await;
    assert_eq!((code, not_ok(&found)), (Some(0), Vec::new()), "{found:#?}");
    let mut checks: Vec<_> = found.iter().map(|l| l["check"].as_str().unwrap()).collect();
    checks.dedup();
    // A warning that depends on this machine.
    checks.retain(|check| *check != "descriptors");
    let expected = [
        "config",
        "rules",
        "certificate server",
        "certificate bots' CA",
        "permissions",
        "vault",
        "host global/spot",
        "clock global/spot",
        "host global/futures",
        "clock global/futures",
        "egress",
        "key main/main",
        "audit",
        "state",
        "memory",
    ];
    let sorted = |mut all: Vec<String>| {
        all.sort();
        all
    };
    assert_eq!(
        sorted(checks.iter().map(ToString::to_string).collect()),
        sorted(expected.map(str::to_owned).to_vec())
    );
    // One signed request, which reads the key's details; it is audited like every signed request.
    let received = lab.kucoin.everything_received();
    let signed: Vec<_> = received[before..]
        .iter()
        .map(ReceivedRequest::path)
        .filter(|path| !path.ends_with("timestamp") && !path.ends_with("my-ip"))
        .collect();
    assert_eq!(signed, ["/api/v1/user/api-key"]);
    lab.check_audit_log();

    let result = doctor(&lab, &[]).await;
    assert_eq!((result.code, result.stderr.as_str()), (Some(0), ""));
    let screen = result.stdout;
    assert!(screen.lines().count() <= 30, "{screen}");
    let wide: Vec<_> = screen.lines().filter(|l| l.chars().count() > 80).collect();
    assert!(wide.is_empty(), "{wide:#?}");
    assert!(!screen.contains('\u{1b}'), "no colour without a terminal");
    for part in [
        "ok       key          main/main: works (version 1 in Vault)",
        "127.0.0.1 is on\n                      its whitelist",
        "no broker is using it",
    ] {
        assert!(screen.contains(part), "{part} is not in\n{screen}");
    }
    // Warnings about memory and open files depend on this machine.
    let last = screen.lines().last().unwrap();
    let warnings = screen.matches("\nwarning ").count();
    let expected = [
        "no problems",
        "no failures, 1 warning",
        "no failures, 2 warnings",
    ][warnings];
    assert_eq!(last, expected, "{screen}");
    lab.vault
        .remove_denial(Some(ROOT_TOKEN), Some("POST"), "kv/*");
    let failed = doctor(&lab, &[]).await;
    let last = failed.stdout.lines().last().unwrap();
    assert!(last.starts_with("1 failure, "), "{}", failed.stdout);
}

#[tokio::test]
async fn doctor_also_checks_a_running_broker_without_disturbing_it() {
    let mut lab = healthy().await;
    lab.spawn_broker().await;
    lab.until_ready().await;
    lab.reconfigure("ops = \"127.0.0.1:0\"", &format!("ops = \"{}\"", lab.ops));
    let (code, found) = lines(&lab).await;
    assert_eq!((code, not_ok(&found)), (Some(0), Vec::new()), "{found:#?}");
    let detail_of = |check: &str| {
        let line = found.iter().find(|line| line["check"] == check);
        line.unwrap()["detail"].as_str().unwrap().to_owned()
    };
    assert!(detail_of("state").contains("a broker is using it"));
    assert_eq!(detail_of("broker"), "running and ready");
    assert!(detail_of("memory").starts_with("the running broker's memory is"));
    // The broker is still running and still holds its lock.
    lab.until_ready().await;
    let again = credbroker::server::Server::start(lab.config()).await;
    assert!(
        again
            .unwrap_err()
            .to_string()
            .contains("another broker uses state_dir")
    );
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
    lab.check_audit_log();
}

#[tokio::test]
async fn doctor_reports_a_broker_that_is_not_ready_or_not_at_listen_ops() {
    let mut lab = healthy().await;
    lab.start_broker().await;
    lab.until_ready().await;
    lab.reconfigure("ops = \"127.0.0.1:0\"", "ops = \"127.0.0.1:1\"");
    let failed = "request to listen.ops (http://127.0.0.1:1) failed";
    assert_failed(
        &lab,
        "broker",
        failed,
        "check that it was started with this configuration",
    )
    .await;
    let ops = format!("ops = \"{}\"", lab.ops);
    lab.reconfigure("ops = \"127.0.0.1:1\"", &ops);
    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    until("the broker is not ready", async || {
        lab.get("/readyz").await.0 == 503
    })
    .await;
    let why = "running, but not ready: key main/main: not available";
    assert_failed(&lab, "broker", why, "credbroker health --ready").await;
    lab.stop().await;
}

#[tokio::test]
async fn doctor_warns_about_files_that_the_running_broker_has_rejected() {
    let mut lab = healthy().await;
    lab.start_broker().await;
    lab.until_ready().await;
    lab.reconfigure("ops = \"127.0.0.1:0\"", &format!("ops = \"{}\"", lab.ops));
    std::fs::write(lab.path("rules.toml"), "[account.main]\nkey = 1\n").unwrap();
    let rejected = "rules: reload failed; still using the previously loaded version.";
    until("the rules are rejected", async || {
        lab.get("/readyz?verbose").await.1.contains(rejected)
    })
    .await;
    let (_, found) = lines(&lab).await;
    let mut of_broker: Vec<_> = found.iter().filter(|l| l["check"] == "broker").collect();
    let warning = of_broker.pop().unwrap();
    assert_eq!(of_broker[0]["detail"], "running and ready");
    let detail = warning["detail"].as_str().unwrap();
    assert!(
        detail.starts_with("running, but rules: reload failed; "),
        "{detail}"
    );
    assert!(detail.contains("account.main.key: "), "{detail}");
    assert_eq!(
        (of_broker.len(), &warning["status"]),
        (1, &json!("warning"))
    );
    lab.stop().await;
}

/// Doctor must not propose a restart: only the memory of the running broker has the restrictions.
#[tokio::test]
async fn lost_restrictions_of_a_running_broker_are_written_again_as_doctor_proposes() {
    let mut lab = healthy().await;
    lab.start_broker().await;
    lab.until_ready().await;
    lab.reconfigure("ops = \"127.0.0.1:0\"", &format!("ops = \"{}\"", lab.ops));
    let bots = |act| ["bots", act, "spiffe://demo.test/bot/maker"];
    assert_eq!(lab.admin_cli("anna", &bots("block")).await.code, Some(0));
    let file = lab.path("state/restrictions.json");
    let before = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let detail =
        "a broker is using it; its restrictions.json is missing: the broker has the blocks";
    let fix = "do not restart the broker. Run `credbroker bots unblock BOT`";
    assert_failed(&lab, "state", detail, fix).await;
    let other = ["bots", "unblock", "spiffe://demo.test/bot/unblocked"];
    assert_eq!(lab.admin_cli("anna", &other).await.code, Some(0));
    assert_eq!(std::fs::read(&file).unwrap(), before);
    lab.stop().await;
    std::fs::remove_file(&file).unwrap();
    let detail = "no broker is using it; it holds no restrictions.json";
    assert_reported(
        &lab,
        "warning",
        "state",
        detail,
        "start the broker, which creates it",
    )
    .await;
}

#[tokio::test]
async fn before_the_first_start_doctor_creates_nothing_and_warns_about_missing_files() {
    let lab = Lab::install(settings()).await;
    lab.add_key("main", "main", &key());
    deny_writes(&lab);
    let audit = "audit.jsonl does not exist yet";
    assert_reported(&lab, "warning", "audit", audit, "start the broker").await;
    let state = "state does not exist; the broker creates it";
    assert_reported(&lab, "warning", "state", state, "start the broker").await;
    assert!(!lab.path("state").exists());
    let only_public = |request: &ReceivedRequest| {
        request.path().ends_with("timestamp") || request.path().ends_with("my-ip")
    };
    assert!(lab.kucoin.everything_received().iter().all(only_public));
    // `doctor` creates the audit log only to audit a signed request; without a key there is none.
    std::fs::create_dir(lab.path("state")).unwrap();
    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    lines(&lab).await;
    assert!(!lab.path("state/audit.jsonl").exists());
}

#[tokio::test]
async fn doctor_exits_with_2_on_an_invalid_configuration() {
    let lab = Lab::install(settings()).await;
    lab.reconfigure("rules =", "rulez =");
    let (code, found) = lines(&lab).await;
    assert_eq!(code, Some(2));
    let details: Vec<_> = found
        .iter()
        .map(|l| l["detail"].as_str().unwrap())
        .collect();
    assert!(
        details.iter().any(|d| d.contains("rulez: is not a key")),
        "{details:?}"
    );
    assert!(
        found
            .iter()
            .all(|line| line["check"] == "config" && line["status"] == "failed")
    );
    assert_eq!(doctor(&lab, &["--wrong"]).await.code, Some(2));
}

#[tokio::test]
async fn doctor_reports_broken_files_and_still_runs_the_other_checks() {
    let lab = healthy().await;
    let write = |name: &str, text: &str| std::fs::write(lab.path(name), text).unwrap();

    write("rules.toml", "[account.main]\nkey = 1\n");
    let again = "credbroker policy check";
    assert_failed(&lab, "rules", "rules.toml:2: account.main.key: ", again).await;
    let (_, found) = lines(&lab).await;
    assert!(
        found
            .iter()
            .any(|line| line["check"] == "egress" && line["status"] == "ok")
    );
    let unused = format!(
        "{}\n[account.other]\nkey = {{ spot-margin = \"main\" }}\n",
        rules()
    );
    lab.put_key("other", "main", &key());
    write("rules.toml", &unused);
    assert_reported(
        &lab,
        "warning",
        "rules",
        "no grant names this account",
        again,
    )
    .await;
    write("rules.toml", &rules());

    let (now, day) = (now_s(), DAY_S);
    let right = std::fs::read_to_string(lab.path("server.pem")).unwrap();
    let right_key = std::fs::read_to_string(lab.path("server.key")).unwrap();
    let certificate = "certificate server";
    for (ends, status, detail) in [
        (now + 20 * day + 60, "warning", "in 20 days"),
        (now - day, "failed", "expired on "),
    ] {
        let served = lab.ca.server_within(now - 10 * day..ends).unwrap();
        write("server.pem", &served.certificate_pem);
        write("server.key", &served.key_pem);
        assert_reported(&lab, status, certificate, detail, "without a restart").await;
    }
    write("server.pem", &right);
    assert_failed(
        &lab,
        certificate,
        "is not the key of tls.certificate",
        "right files",
    )
    .await;
    write("server.key", &right_key);
    let ca = std::fs::read_to_string(lab.path("ca.pem")).unwrap();
    write("ca.pem", "nothing\n");
    assert_failed(
        &lab,
        "certificate bots' CA",
        "expected PEM certificates",
        "right files",
    )
    .await;
    write("ca.pem", &ca);

    let audit_log = lab.path("state/audit.jsonl");
    let saved = std::fs::read(&audit_log).unwrap();
    std::fs::remove_file(&audit_log).unwrap();
    std::fs::create_dir(&audit_log).unwrap();
    assert_failed(
        &lab,
        "audit",
        "audit.jsonl cannot be written",
        "correct audit.file",
    )
    .await;
    let (_, found) = lines(&lab).await;
    let untested = found.iter().find(|line| line["check"] == "key main/main");
    let untested = untested.unwrap()["detail"].as_str().unwrap();
    assert!(
        untested.starts_with(
            "not tested: doctor cannot write the audit log, which records each test: "
        ) && untested.contains("audit.jsonl cannot be written: "),
        "{untested}"
    );
    std::fs::remove_dir(&audit_log).unwrap();
    std::fs::write(&audit_log, saved).unwrap();

    let refuses = "the broker will not start";
    write("state/restrictions.json", "{");
    assert_failed(&lab, "state", refuses, "restore it").await;
    let mark = json!({ "by": "spiffe://demo.test/admin/anna", "at_ms": 1 });
    let halted = json!({
        "version": 1, "blocked_bots": { "spiffe://demo.test/bot/maker": mark }, "halted_accounts": { "main": mark },
        "revoked_keys": {}, "revoked_unseen": {},
    });
    write("state/restrictions.json", &halted.to_string());
    let counts = "1 account halted individually, 1 bot blocked";
    assert_reported(&lab, "warning", "state", counts, "credbroker resume").await;
    let digest = Sha256::digest(key().api_key);
    let digest = digest
        .iter()
        .fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
    let revocation = json!({ "account": "main", "key": "main", "by": "spiffe://demo.test/admin/anna", "at_ms": 1 });
    let revoked = json!({
        "version": 1, "blocked_bots": {}, "halted_accounts": {}, "revoked_keys": { digest: revocation },
        "revoked_unseen": {},
    });
    write("state/restrictions.json", &revoked.to_string());
    let by = "version 1 was revoked by spiffe://demo.test/admin/anna";
    assert_failed(&lab, "key main/main", by, "credbroker keys rotate main").await;
    lab.check_audit_log();
}

#[tokio::test]
async fn doctor_reports_every_kind_of_vault_problem() {
    let mut lab = healthy().await;
    let path = kv_path("main", "main");
    let of_key = "vault main/main";

    lab.vault
        .remove_denial(Some(ROOT_TOKEN), Some("POST"), "kv/*");
    let metadata = format!("kv/metadata/{path}");
    lab.vault.deny(Some(ROOT_TOKEN), Some("POST"), &metadata);
    let may =
        "the broker can write versions, delete versions, undelete versions, destroy versions;";
    let api = Api::new(&lab.vault.address(), ROOT_TOKEN);
    let before = api.call("GET", &metadata, Value::Null).await;
    assert_failed(&lab, "vault", may, "deploy/vault/broker.hcl").await;
    let after = api.call("GET", &metadata, Value::Null).await;
    assert_eq!(before["data"], after["data"], "nothing was written");
    lab.vault
        .remove_denial(Some(ROOT_TOKEN), Some("POST"), &metadata);
    deny_writes(&lab);

    lab.vault.deny(Some(ROOT_TOKEN), Some("GET"), "kv/*");
    assert_failed(
        &lab,
        of_key,
        "Vault denied access (403)",
        "its mount and prefix must match",
    )
    .await;
    lab.vault
        .remove_denial(Some(ROOT_TOKEN), Some("GET"), "kv/*");

    let custom = [("state".to_owned(), "disabled".to_owned())];
    lab.vault.set_custom_metadata("kv", &path, custom.into());
    assert_failed(&lab, of_key, "state=disabled", "set state=active").await;
    let custom = [("state".to_owned(), "paused".to_owned())];
    lab.vault.set_custom_metadata("kv", &path, custom.into());
    let detail = "its custom metadata has state=\"paused\", which is neither active nor disabled; risk-increasing requests are refused";
    assert_failed(&lab, of_key, detail, "set state=active or state=disabled").await;
    lab.vault.set_custom_metadata("kv", &path, [].into());

    lab.vault
        .put_secret("kv", &path, json!({ "api_key": MARK }));
    assert_failed(
        &lab,
        of_key,
        "`api_secret` is missing",
        "credbroker keys rotate main",
    )
    .await;
    lab.vault.delete_metadata("kv", &path);
    assert_failed(
        &lab,
        of_key,
        "Vault has no such key (404)",
        "credbroker keys register main",
    )
    .await;

    std::fs::write(lab.path("token"), format!("{MARK}\n")).unwrap();
    assert_failed(&lab, "vault", "Vault rejected the token", "the agent").await;
    lab.vault.seal();
    assert_failed(&lab, "vault", "sealed", "unseal it").await;

    let address = lab.vault.address();
    lab.vault.stop().await.unwrap();
    assert_failed(
        &lab,
        "vault",
        "cannot reach ",
        "check that Vault is running",
    )
    .await;
    lab.reconfigure(&address, "https://vault.invalid:8200");
    assert_failed(
        &lab,
        "vault",
        "cannot reach https://vault.invalid:8200/",
        "DNS",
    )
    .await;
    assert!(lab.server.take().is_none());
}

#[tokio::test]
async fn doctor_names_the_key_when_an_account_has_several() {
    let two = ACCOUNT.replace("futures = \"main\"", "futures = \"second\"");
    let settings = Settings {
        rules: rules().replace(ACCOUNT, &two),
        ..settings()
    };
    let lab = Lab::install(settings).await;
    for name in ["main", "second"] {
        let check = format!("vault main/{name}");
        let register = format!("`credbroker keys register main --key {name}`");
        assert_failed(&lab, &check, "Vault has no such key (404)", &register).await;
    }
    let path = kv_path("main", "second");
    let notes = [("use_version".to_owned(), "9".to_owned())];
    lab.vault.put_secret("kv", &path, secret(&key()));
    lab.vault.set_custom_metadata("kv", &path, notes.into());
    let newest = "`credbroker keys rollback main --key second --newest`";
    assert_failed(&lab, "vault main/second", "use_version=9", newest).await;
    lab.vault.set_custom_metadata("kv", &path, [].into());
    lab.vault
        .put_secret("kv", &path, json!({ "api_key": MARK }));
    let rotate = "`credbroker keys rotate main --key second`";
    assert_failed(&lab, "vault main/second", "`api_secret` is missing", rotate).await;
}

/// If Vault does not answer, or another server does, the fix is about the server and not about the secret id.
#[tokio::test]
async fn doctor_does_not_blame_the_secret_id_when_vault_is_unreachable() {
    let mut lab = Lab::install(settings()).await;
    // The simulated exchange also receives requests for Vault, which are not audited.
    lab.is_audit_checked = false;
    std::fs::write(lab.path("secret-id"), "fake-secret-id").unwrap();
    let plain = "method = \"approle\"\nrole_id = \"fake\"\nsecret_id_file = \"secret-id\"";
    let wrapped = format!("{plain}\nwrapped = true\nrole = \"credbroker\"");
    // The system accepts connections, but nothing answers them.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    let (mut auth, mut address) = (
        "method = \"token_file\"\nfile = \"token\"".to_owned(),
        lab.vault.address(),
    );
    for method in [plain, &wrapped] {
        lab.reconfigure(&auth, method);
        method.clone_into(&mut auth);
        for (server, detail, fix) in [
            (
                silent.clone(),
                "cannot reach Vault",
                "check that Vault is running at vault.address",
            ),
            (
                lab.kucoin.spot_url(),
                "not in Vault's format",
                "check that vault.address is Vault's own address",
            ),
        ] {
            lab.reconfigure(&address, &server);
            address = server;
            let (_, lines) = lines(&lab).await;
            let failed = lines
                .iter()
                .find(|line| line["check"] == "vault" && line["status"] == "failed");
            let failed = failed.unwrap_or_else(|| panic!("{lines:#?}"));
            let field = |name: &str| failed[name].as_str().unwrap();
            assert!(field("detail").contains(detail), "{failed}");
            assert!(field("fix").contains(fix), "{failed}");
            assert!(!field("fix").contains("fresh"), "{failed}");
        }
    }
}

#[tokio::test]
async fn doctor_distinguishes_a_kv_version_1_mount_from_a_missing_key() {
    let lab = Lab::install(settings()).await;
    let vault = VaultSim::start_dev(ROOT_TOKEN).await.unwrap();
    vault.mount_kv_v1("kv");
    lab.reconfigure(&lab.vault.address(), &vault.address());
    let detail = "mount kv is KV version 1, but credbroker needs KV version 2";
    let fix = "set vault.mount to a KV version 2 mount";
    assert_failed(&lab, "vault main/main", detail, fix).await;
}

#[tokio::test]
async fn doctor_checks_the_server_certificate_of_vault() {
    let lab = healthy().await;
    let now = now_s();
    let served = lab
        .ca
        .server_within(now - DAY_S..now + 20 * DAY_S + 60)
        .unwrap();
    let vault = VaultSim::start_dev_tls(ROOT_TOKEN, &served).await.unwrap();
    vault.mount_kv("kv");
    vault.put_secret("kv", &kv_path("main", "main"), secret(&key()));
    vault.deny(Some(ROOT_TOKEN), Some("POST"), "kv/*");
    lab.reconfigure(&lab.vault.address(), &vault.address());
    let ca = "put the CA of Vault's certificate into the file";
    assert_failed(&lab, "vault", "invalid peer certificate: UnknownIssuer", ca).await;
    lab.reconfigure("[vault]\n", "[vault]\nroots = \"ca.pem\"\n");
    let renew = "renew Vault's certificate";
    assert_reported(
        &lab,
        "warning",
        "certificate Vault server",
        "in 20 days",
        renew,
    )
    .await;
}

#[tokio::test]
async fn server_that_presents_a_ca_certificate_is_reported() {
    let sentence = "the server presents a CA certificate as its server certificate; use one that this CA has issued, or a \
                    self-signed one with CA:FALSE";
    let mut lab = healthy().await;
    let mut address = lab.vault.address();
    lab.reconfigure("[vault]\n", "[vault]\nroots = \"self.pem\"\n");
    for is_ca in [false, true] {
        let own = Ca::self_signed_server(is_ca).unwrap();
        lab.write("self.pem", &own.certificate_pem).unwrap();
        let vault = VaultSim::start_dev_tls(ROOT_TOKEN, &own).await.unwrap();
        vault.mount_kv("kv");
        vault.put_secret("kv", &kv_path("main", "main"), secret(&key()));
        vault.deny(Some(ROOT_TOKEN), Some("POST"), "kv/*");
        lab.reconfigure(&address, &vault.address());
        address = vault.address();
        if is_ca {
            assert_failed(
                &lab,
                "vault",
                sentence,
                "install a server certificate (CA:FALSE) issued by this CA",
            )
            .await;
            lab.start_broker().await;
            until("the broker reports it, too", async || {
                let (_, text) = lab.get("/readyz").await;
                text.contains(&format!("cannot reach Vault: {sentence}"))
            })
            .await;
            lab.stop().await;
        } else {
            let (code, found) = lines(&lab).await;
            assert_eq!((code, not_ok(&found)), (Some(0), Vec::new()), "{found:#?}");
        }
    }
    let own = Ca::self_signed_server(true).unwrap();
    let lab = Lab::install(Settings {
        kucoin: KucoinSettings {
            tls: Some(tls_with(&own)),
            ..KucoinSettings::default()
        },
        egress: "roots = \"self.pem\"\nconnect_timeout_ms = 1000".to_owned(),
        files: vec![("self.pem", own.certificate_pem)],
        ..settings()
    })
    .await;
    let fix = "install a server certificate (CA:FALSE) issued by this CA";
    assert_failed(&lab, "host global/spot", sentence, fix).await;
}

#[tokio::test]
async fn doctor_fails_on_files_that_other_users_can_read_or_change() {
    let lab = healthy().await;
    for (file, setting, mode, can, fix) in [
        ("config.toml", "config", 0o666, "changed", "chmod o-w "),
        ("rules.toml", "rules", 0o602, "changed", "chmod o-w "),
        (
            "state/audit.jsonl",
            "audit.file",
            0o646,
            "changed",
            "chmod o-w ",
        ),
        ("server.key", "tls.key", 0o644, "read", "chmod o-rwx "),
        (
            "token",
            "vault.auth.file",
            0o666,
            "read and changed",
            "chmod o-rwx ",
        ),
    ] {
        set_mode(&lab.path(file), mode);
        let detail = format!("{file} can be {can} by other users (mode {mode:04o})");
        let fix = format!("{fix}{}", lab.path(file).display());
        assert_failed(&lab, &format!("permissions {setting}"), &detail, &fix).await;
        set_mode(&lab.path(file), 0o640);
    }
    let (code, found) = lines(&lab).await;
    assert_eq!((code, not_ok(&found)), (Some(0), Vec::new()), "{found:#?}");
}

#[tokio::test]
async fn doctor_checks_a_wrapped_secret_id_without_using_it_up() {
    let lab = Lab::install(settings()).await;
    lab.add_key("main", "main", &key());
    let (role_id, secret_id) = lab
        .vault
        .enable_approle("credbroker", RoleSettings::default());
    let api = Api::new(&lab.vault.address(), ROOT_TOKEN);
    let api = api.with_header("x-vault-wrap-ttl", "60s");
    let made = api
        .call("POST", "auth/approle/role/credbroker/secret-id", json!({}))
        .await;
    let token = made["wrap_info"]["token"].as_str().unwrap();
    std::fs::write(lab.path("wrapped"), token).unwrap();
    let auth = format!(
        "method = \"approle\"\nrole_id = \"{role_id}\"\nsecret_id_file = \"wrapped\"\nwrapped = true\nrole = \"credbroker\""
    );
    lab.reconfigure("method = \"token_file\"\nfile = \"token\"", &auth);
    for _ in 0..2 {
        let (_, found) = lines(&lab).await;
        let detail = "the wrapping token is valid; doctor does not use it";
        let is_reported = |line: &Value| line["detail"].as_str().unwrap().contains(detail);
        assert!(found.iter().any(is_reported), "{found:#?}");
        assert!(!found.iter().any(|line| line["check"] == "key main/main"));
    }
    assert!(lab.path("wrapped").exists());
    std::fs::write(lab.path("wrapped"), secret_id).unwrap();
    assert_failed(
        &lab,
        "vault",
        "wrapping token used or expired",
        "fresh wrapping token",
    )
    .await;
}

#[tokio::test]
async fn doctor_reports_problems_between_the_broker_and_the_exchange() {
    let lab = healthy().await;
    lab.kucoin.set_clock_offset_ms(-5000);
    assert_reported(
        &lab,
        "warning",
        "clock global/spot",
        "ms ahead of the exchange's clock",
        "NTP",
    )
    .await;
    lab.kucoin.set_clock_offset_ms(0);

    lab.kucoin
        .set_source_address(Some("127.0.0.9".parse().unwrap()));
    let enter = "enter 127.0.0.9 under API Management > Edit > IP restriction";
    assert_failed(
        &lab,
        "egress",
        "requests leave from 127.0.0.9 instead of egress.expected_ip 127.0.0.1",
        enter,
    )
    .await;
    assert_failed(&lab, "key main/main", "127.0.0.9", "127.0.0.9").await;
    lab.kucoin.set_source_address(None);

    let html = FaultAction::Html {
        status: 502,
        when: When::BeforeProcessing,
    };
    lab.kucoin.fault(Fault::once("/api/v1/my-ip", html.clone()));
    assert_failed(
        &lab,
        "egress",
        "unexpected answer (HTTP 502)",
        "`host` lines",
    )
    .await;
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once("/api/v1/timestamp", html)
    });
    assert_failed(
        &lab,
        "clock global/futures",
        "HTTP 502",
        "names KuCoin's hosts",
    )
    .await;
    lab.kucoin.clear_faults();

    lab.reconfigure(
        "[egress]\naddress = \"127.0.0.1\"",
        "[egress]\naddress = \"203.0.113.7\"",
    );
    let host = "host global/spot";
    assert_failed(
        &lab,
        host,
        "cannot reach ",
        "203.0.113.7 is not an address of this machine",
    )
    .await;
    lab.reconfigure(
        "[egress]\naddress = \"203.0.113.7\"",
        "[egress]\naddress = \"127.0.0.1\"",
    );
    lab.reconfigure(&lab.kucoin.spot_url(), "http://127.0.0.1:1");
    assert_failed(
        &lab,
        host,
        ": Connection refused",
        "curl --interface 127.0.0.1",
    )
    .await;
    lab.reconfigure("http://127.0.0.1:1\"", "http://[::1]:1\"");
    assert_failed(
        &lab,
        host,
        "::1 has no IPv4 address, but egress.address 127.0.0.1 requires one",
        "set egress.address to an IPv6 address of this machine",
    )
    .await;
    lab.reconfigure("http://[::1]:1\"", "http://127.0.0.1:1\"");
    let elsewhere = "[exchange]\nsend_signed_requests_to_hosts_other_than_kucoin = true";
    lab.reconfigure("[exchange]", elsewhere);
    lab.reconfigure("http://127.0.0.1:1\"", "https://kucoin.invalid\"");
    assert_failed(
        &lab,
        host,
        "cannot resolve kucoin.invalid",
        "getent hosts kucoin.invalid",
    )
    .await;
}

#[tokio::test]
async fn doctor_fails_when_the_exchange_clock_is_more_than_a_day_off() {
    let lab = healthy().await;
    lab.kucoin.set_clock_offset_ms(10 * 365 * 24 * 3_600_000);
    assert_failed(
        &lab,
        "clock global/spot",
        "the exchange's clock is 3650 days ahead of the system clock",
        "`credbroker clock accept global/spot`",
    )
    .await;
}

#[tokio::test]
async fn doctor_reports_every_kind_of_key_problem() {
    let lab = healthy().await;
    let check = "key main/main";
    let edited = |edit: &dyn Fn(&mut SimKey)| {
        let mut key = key();
        edit(&mut key);
        lab.kucoin.remove_key(&key.api_key);
        lab.kucoin.add_key(key);
    };
    edited(&|key| key.ip_whitelist.clear());
    assert_failed(
        &lab,
        check,
        "no IP restriction",
        "Enter 127.0.0.1 under API Management",
    )
    .await;
    edited(&|key| key.permissions.push("Withdrawal".to_owned()));
    assert_failed(&lab, check, "permission Withdrawal", "Untick Withdrawal").await;
    edited(&|key| key.permissions.retain(|held| held != "Futures"));
    assert_failed(&lab, check, "lacks the permission Futures", "Tick Futures").await;
    edited(&|key| key.passphrase = "another".to_owned());
    assert_failed(&lab, check, "passphrase", "").await;
    lab.kucoin.remove_key(&key().api_key);
    assert_failed(&lab, check, "KuCoin", "").await;
    lab.check_audit_log();
}

#[tokio::test]
async fn with_everything_unreachable_doctor_ends_within_30_s_and_writes_nothing() {
    // An address that never answers, like one behind a firewall that drops packets.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let lab = healthy_with(Settings {
        egress: "connect_timeout_ms = 3000".to_owned(),
        ..settings()
    })
    .await;
    let urls = [
        lab.vault.address(),
        lab.kucoin.spot_url(),
        lab.kucoin.futures_url(),
    ];
    for url in urls {
        lab.reconfigure(&url, &format!("http://{address}"));
    }
    lab.reconfigure("timeout_ms = 1000", "timeout_ms = 60000");
    let before = std::fs::read(lab.path("state/audit.jsonl")).unwrap();
    let began = Instant::now();
    let (code, found) = lines(&lab).await;
    assert!(began.elapsed() < Duration::from_secs(30));
    assert_eq!(code, Some(1), "{found:#?}");
    let after = std::fs::read(lab.path("state/audit.jsonl")).unwrap();
    assert_eq!(before, after);
    drop(silent);
}

#[tokio::test]
async fn live_report_compares_answers_with_the_documented_fields() {
    let lab = healthy().await;
    let result = doctor(&lab, &["--live", "main"]).await;
    let report = result.stdout.as_str();
    assert!(result.stderr.is_empty(), "{}", result.stderr);
    let words = report.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "doctor --live main ",
        "ok live GET /api/v1/timestamp (spot host, unsigned): expected HTTP 200, code 200000, data: number; got HTTP \
         200, code 200000, data: number, as documented",
        "ok live GET /api/v1/timestamp (futures host, unsigned): ",
        "ok live GET /api/v1/my-ip (spot host, unsigned): ",
        "ok live GET /api/v1/user/api-key (spot-margin, key main): ",
        "ok live GET /api/v1/accounts (spot-margin, key main): expected HTTP 200, code 200000, data: list; ",
        "ok live POST /api/v1/hf/orders/test (spot-margin, key main): ",
        "ok live GET /api/v1/account-overview (futures, key main): ",
        "ok live POST /api/v1/orders/test (futures, key main): ",
        "GET /api/ua/v2/unified/account/overview (unified, key main): ",
        "ok live GET /api/v1/hf/orders/client-order/{clientOid} (no such order, key main): ",
        "ok live GET /api/v1/orders/byClientOid (no such order, key main): ",
    ] {
        assert!(words.contains(part), "{part} is not in\n{report}");
    }
    assert!(
        !report.contains("1000000"),
        "the report contains a balance:\n{report}"
    );
    assert!(report.lines().all(|line| line.chars().count() <= 80));
    assert!(
        lab.kucoin.orders(MAIN_UID).is_empty(),
        "an order was placed"
    );
    lab.check_audit_log();

    let msg = format!("key {MARK}0key0id lacks \u{1b}[31mfutures");
    let refused = FaultAction::Answer {
        status: 200,
        body: json!({ "code": "400007", "msg": msg }),
        when: When::BeforeProcessing,
    };
    lab.kucoin
        .fault(Fault::once("/api/v1/account-overview", refused));
    let result = doctor(&lab, &["--live", "main", "--json"]).await;
    assert_eq!(result.code, Some(1));
    let lines = result
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let failed: Vec<_> = lines.filter(|line| line["status"] == "failed").collect();
    let overview = failed
        .iter()
        .find(|line| line["check"] == "live GET /api/v1/account-overview (futures, key main)");
    let overview = overview.unwrap();
    let detail = overview["detail"].as_str().unwrap();
    assert!(
        detail.contains("got HTTP 200, code 400007") && detail.contains("***"),
        "{detail}"
    );
    assert!(!detail.contains('\u{1b}'));
    assert!(overview["fix"].as_str().unwrap().contains("Futures"));

    // An answer that is not known yet.
    let unknown = FaultAction::Answer {
        status: 200,
        body: json!({"code": "200000", "data": null}),
        when: When::BeforeProcessing,
    };
    lab.kucoin
        .fault(Fault::once("/api/v1/orders/byClientOid", unknown));
    let result = doctor(&lab, &["--live", "main", "--json"]).await;
    let lines = result.stdout.lines();
    let mut lines = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    let lookup = lines.find(|line| {
        let check = line["check"].as_str().unwrap();
        check.starts_with("live GET /api/v1/orders/byClientOid")
    });
    let lookup = lookup.unwrap();
    assert_eq!(lookup["status"], "warning", "{lookup}");
    let fix = lookup["fix"].as_str().unwrap();
    let entry = fix
        .strip_prefix("add this to exchange.not_found: ")
        .unwrap();
    assert_eq!(
        entry,
        r#"{ host = "futures", product = "futures", http_status = 200, code = "200000", empty_data = true }"#
    );
    // A rejection of the lookup itself must not become an entry.
    let rejected = FaultAction::Answer {
        status: 200,
        body: json!({"code": "400007", "msg": "Access denied"}),
        when: When::BeforeProcessing,
    };
    lab.kucoin
        .fault(Fault::once("/api/v1/orders/byClientOid", rejected));
    let result = doctor(&lab, &["--live", "main"]).await;
    let words = result.stdout.split_whitespace().collect::<Vec<_>>();
    let words = words.join(" ");
    assert!(!words.contains("exchange.not_found"), "{}", result.stdout);
    assert!(
        words.contains("the gateway rejected the lookup itself; correct what"),
        "{}",
        result.stdout
    );
    // With the entry, it is known.
    lab.reconfigure("[exchange]", &format!("[exchange]\nnot_found = [{entry}]"));
    let body = json!({"code": "200000", "data": null});
    let when = When::BeforeProcessing;
    let (path, status) = ("/api/v1/orders/byClientOid", 200);
    lab.kucoin.fault(Fault::once(
        path,
        FaultAction::Answer { status, body, when },
    ));
    let result = doctor(&lab, &["--live", "main"]).await;
    let words = result
        .stdout
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    let ok = "ok live GET /api/v1/orders/byClientOid (no such order, key main): ";
    assert!(words.contains(ok), "{}", result.stdout);

    let nobody = doctor(&lab, &["--live", "nobody"]).await;
    assert_eq!((nobody.code, nobody.stdout.as_str()), (Some(2), ""));
    assert!(
        nobody.stderr.contains("has no account nobody"),
        "{}",
        nobody.stderr
    );
}

#[tokio::test]
async fn doctor_and_check_config_warn_if_too_few_files_may_be_open() {
    const DESCRIPTORS: &str = "ulimit -n 1024 && exec \"$@\"";
    let lab = healthy().await;
    let config = lab.path("config.toml");
    let run = |words: &[&str]| {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", DESCRIPTORS, "sh", env!("CARGO_BIN_EXE_credbroker")]);
        command.args(words).arg("--config").arg(&config);
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };
    let cause = "a broker started from this shell may have 1024 files open, which allows 512 of 8192 connections of bots \
                 (limits.connections) and 256 of 1536 connections to the exchange (limits.calls_in_flight + \
                 limits.cancels_in_flight)";
    let fix = "set LimitNOFILE=16384 (systemd) or --ulimit nofile=16384 (containers), or lower these limits";
    let checked = run(&["check-config"]).await.unwrap();
    assert_eq!(checked.status.code(), Some(0));
    let text = in_one_line(&String::from_utf8(checked.stderr).unwrap());
    let expected = format!("warning: {cause}; a service may have other limits fix: {fix}");
    assert!(text.contains(&expected), "{text}");
    let examined = run(&["doctor", "--json"]).await.unwrap();
    let text = String::from_utf8(examined.stdout).unwrap();
    let mut lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let line = lines.find(|line| line["check"] == "descriptors").unwrap();
    assert_eq!(
        (&line["status"], &line["detail"], &line["fix"]),
        (&"warning".into(), &cause.into(), &fix.into())
    );
}
