//! `credbroker doctor`, as the real program: a healthy installation, and one thing after the other broken in it.

use std::time::{Duration, Instant};

use credbroker::clock::Clock;
use credbroker_sim::installation::{MAIN_UID, ROOT_TOKEN, Settings, kv_path, secret};
use credbroker_sim::kucoin::{Fault, FaultAction, KucoinSettings, ReceivedRequest, SimKey, When};
use credbroker_sim::pki::Ca;
use credbroker_sim::vault::{RoleSettings, VaultSim};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::delivery::tls_with;
use crate::harness::{Ended, Lab, rules_for, set_mode, until};

use crate::keys::real::Api;

/// The mark of every secret that must not show.
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

/// A key as it should be.
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

/// An installation in which a broker has run, and nothing is wrong but that it does not run.
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

/// As the policy `deploy/vault/broker.hcl` does; that it does so a real server proves.
fn deny_writes(lab: &Lab) {
    lab.vault.deny(Some(ROOT_TOKEN), Some("POST"), "kv/*");
}

async fn doctor(lab: &Lab, words: &[&str]) -> Ended {
    let ended = lab.run(&[&["doctor"], words].concat()).await;
    let both = format!("{}{}", ended.stdout, ended.stderr);
    assert!(!both.contains(MARK) && !both.contains(ROOT_TOKEN), "{both}");
    ended
}

/// Its lines as JSON.
async fn lines(lab: &Lab) -> (Option<i32>, Vec<Value>) {
    let ended = doctor(lab, &["--json"]).await;
    assert_eq!(ended.stderr, "");
    let lines = ended.stdout.lines();
    let lines = lines.map(|line| serde_json::from_str(line).unwrap());
    (ended.code, lines.collect())
}

/// The program has failed, and says so and what to do in one line of this check.
async fn fails(lab: &Lab, check: &str, detail: &str, fix: &str) {
    told(lab, "failed", check, detail, fix).await;
}

async fn told(lab: &Lab, status: &str, check: &str, detail: &str, fix: &str) {
    let (code, lines) = lines(lab).await;
    let is_it = |line: &&Value| {
        line["check"] == check
            && line["status"] == status
            && line["detail"].as_str().unwrap().contains(detail)
    };
    let found = lines.iter().find(is_it);
    let found = found.unwrap_or_else(|| panic!("no {status} {check}: {detail} in {lines:#?}"));
    let told = found["fix"].as_str().unwrap();
    assert!(told.contains(fix), "{fix} is not in {told}");
    let expected = i32::from(status == "failed");
    assert_eq!(code, Some(expected), "{lines:#?}");
}

/// Every line that is not ok, but for what the machine of the test decides.
fn not_ok(lines: &[Value]) -> Vec<&Value> {
    let is_of_machine = |line: &Value| {
        let is_warning = line["status"] == "warning";
        line["check"] == "memory" || line["check"] == "audit" && is_warning
    };
    let is_bad = |line: &&Value| line["status"] != "ok" && !is_of_machine(line);
    lines.iter().filter(is_bad).collect()
}

#[tokio::test]
async fn a_healthy_installation_is_all_ok_on_one_screen() {
    let lab = healthy().await;
    let before = lab.kucoin.everything_received().len();
    let (code, found) = lines(&lab).await;
    assert_eq!((code, not_ok(&found)), (Some(0), Vec::new()), "{found:#?}");
    let mut checks: Vec<_> = found.iter().map(|l| l["check"].as_str().unwrap()).collect();
    checks.dedup();
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
    // Asked with the key: once what it is, and nothing else; on record like everything that is signed.
    let received = lab.kucoin.everything_received();
    let signed: Vec<_> = received[before..]
        .iter()
        .map(ReceivedRequest::path)
        .filter(|path| !path.ends_with("timestamp") && !path.ends_with("my-ip"))
        .collect();
    assert_eq!(signed, ["/api/v1/user/api-key"]);
    lab.check_record();

    let ended = doctor(&lab, &[]).await;
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let screen = ended.stdout;
    assert!(screen.lines().count() <= 30, "{screen}");
    let wide: Vec<_> = screen.lines().filter(|l| l.chars().count() > 80).collect();
    assert!(wide.is_empty(), "{wide:#?}");
    assert!(!screen.contains('\u{1b}'), "no colour without a terminal");
    for part in [
        "ok       key          main/main: works (version 1 in Vault)",
        "127.0.0.1 is on its whitelist",
        "no broker runs on it",
    ] {
        assert!(screen.contains(part), "{part} is not in\n{screen}");
    }
    // Of the memory, which this machine may lock or not.
    let last = screen.lines().last().unwrap();
    let is_warned = screen.contains("\nwarning ");
    let expected = ["nothing is wrong", "nothing failed; 1 warning"][usize::from(is_warned)];
    assert_eq!(last, expected, "{screen}");
    lab.vault
        .allow_again(Some(ROOT_TOKEN), Some("POST"), "kv/*");
    let failed = doctor(&lab, &[]).await;
    let last = failed.stdout.lines().last().unwrap();
    assert!(last.starts_with("1 failed; "), "{}", failed.stdout);
}

#[tokio::test]
async fn beside_a_running_broker_it_disturbs_nothing_and_asks_it_too() {
    let mut lab = healthy().await;
    lab.spawn_broker().await;
    lab.until_ready().await;
    lab.reconfigure("ops = \"127.0.0.1:0\"", &format!("ops = \"{}\"", lab.ops));
    let (code, found) = lines(&lab).await;
    assert_eq!((code, not_ok(&found)), (Some(0), Vec::new()), "{found:#?}");
    let of = |check: &str| {
        let line = found.iter().find(|line| line["check"] == check);
        line.unwrap()["detail"].as_str().unwrap().to_owned()
    };
    assert!(of("state").contains("a broker runs on it"));
    assert_eq!(of("broker"), "runs, and is ready");
    assert!(of("memory").starts_with("the running broker's is"));
    // It keeps running, and its lock is its own.
    lab.until_ready().await;
    let again = credbroker::server::Server::start(lab.config()).await;
    assert!(
        again
            .unwrap_err()
            .to_string()
            .contains("another broker runs")
    );
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
    lab.check_record();
}

#[tokio::test]
async fn a_broker_that_is_not_ready_and_one_that_is_elsewhere_are_told() {
    let mut lab = healthy().await;
    lab.start_broker().await;
    lab.until_ready().await;
    lab.reconfigure("ops = \"127.0.0.1:0\"", "ops = \"127.0.0.1:1\"");
    let asked = "cannot be asked at listen.ops, http://127.0.0.1:1";
    fails(
        &lab,
        "broker",
        asked,
        "has it been started with this configuration",
    )
    .await;
    let ops = format!("ops = \"{}\"", lab.ops);
    lab.reconfigure("ops = \"127.0.0.1:1\"", &ops);
    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    until("it is not ready", async || {
        lab.get("/readyz").await.0 == 503
    })
    .await;
    let why = "runs, and is not ready: key main/main: not available";
    fails(&lab, "broker", why, "credbroker health --ready").await;
    lab.stop().await;
}

#[tokio::test]
async fn before_the_first_start_it_makes_nothing_and_says_what_is_not_there_yet() {
    let lab = Lab::install(settings()).await;
    lab.add_key("main", "main", &key());
    deny_writes(&lab);
    let audit = "audit.jsonl is not there yet";
    told(&lab, "warning", "audit", audit, "start the broker").await;
    let state = "state is not there; the broker makes it";
    told(&lab, "warning", "state", state, "start the broker").await;
    assert!(!lab.path("state").exists());
    let only_public = |request: &ReceivedRequest| {
        request.path().ends_with("timestamp") || request.path().ends_with("my-ip")
    };
    assert!(lab.kucoin.everything_received().iter().all(only_public));
    // A file that somebody else would have to make is made by the broker's user alone, and only to record what is signed.
    std::fs::create_dir(lab.path("state")).unwrap();
    lab.vault.delete_metadata("kv", &kv_path("main", "main"));
    lines(&lab).await;
    assert!(!lab.path("state/audit.jsonl").exists());
}

#[tokio::test]
async fn a_configuration_that_cannot_be_used_is_usage() {
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
async fn broken_files_are_told_and_the_rest_is_looked_at_all_the_same() {
    let lab = healthy().await;
    let write = |name: &str, text: &str| std::fs::write(lab.path(name), text).unwrap();

    write("rules.toml", "[account.main]\nkey = 1\n");
    let again = "credbroker policy check";
    fails(&lab, "rules", "rules.toml:2: account.main.key: ", again).await;
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
    told(
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
        (now - day, "failed", "ended on "),
    ] {
        let served = lab.ca.server_within(now - 10 * day..ends).unwrap();
        write("server.pem", &served.certificate_pem);
        write("server.key", &served.key_pem);
        told(&lab, status, certificate, detail, "without a restart").await;
    }
    write("server.pem", &right);
    fails(
        &lab,
        certificate,
        "is not the key of tls.certificate",
        "right files",
    )
    .await;
    write("server.key", &right_key);
    let ca = std::fs::read_to_string(lab.path("ca.pem")).unwrap();
    write("ca.pem", "nothing\n");
    fails(
        &lab,
        "certificate bots' CA",
        "expected certificates as PEM",
        "right files",
    )
    .await;
    write("ca.pem", &ca);

    let record = lab.path("state/audit.jsonl");
    let kept = std::fs::read(&record).unwrap();
    std::fs::remove_file(&record).unwrap();
    std::fs::create_dir(&record).unwrap();
    fails(
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
        untested.contains("nothing is sent unrecorded"),
        "{untested}"
    );
    std::fs::remove_dir(&record).unwrap();
    std::fs::write(&record, kept).unwrap();

    let forbids = "no broker starts";
    write("state/restrictions.json", "{");
    fails(&lab, "state", forbids, "restore it").await;
    let mark = json!({ "by": "spiffe://demo.test/admin/anna", "at_ms": 1 });
    let halted = json!({
        "version": 1, "blocked_bots": { "spiffe://demo.test/bot/maker": mark }, "halted_accounts": { "main": mark },
        "revoked_keys": {}, "revoked_unseen": {},
    });
    write("state/restrictions.json", &halted.to_string());
    let counts = "1 account halted by name, 1 bot blocked";
    told(&lab, "warning", "state", counts, "credbroker resume").await;
    let digest = Sha256::digest(key().api_key);
    let digest = digest
        .iter()
        .fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
    let dead = json!({ "account": "main", "key": "main", "by": "spiffe://demo.test/admin/anna", "at_ms": 1 });
    let revoked = json!({
        "version": 1, "blocked_bots": {}, "halted_accounts": {}, "revoked_keys": { digest: dead },
        "revoked_unseen": {},
    });
    write("state/restrictions.json", &revoked.to_string());
    let by = "version 1: spiffe://demo.test/admin/anna has revoked it";
    fails(&lab, "key main/main", by, "credbroker keys rotate main").await;
    lab.check_record();
}

#[tokio::test]
async fn what_is_wrong_with_vault_is_told() {
    let mut lab = healthy().await;
    let path = kv_path("main", "main");
    let of_key = "vault main/main";

    lab.vault
        .allow_again(Some(ROOT_TOKEN), Some("POST"), "kv/*");
    let metadata = format!("kv/metadata/{path}");
    lab.vault.deny(Some(ROOT_TOKEN), Some("POST"), &metadata);
    let may =
        "lets the broker write versions, delete versions, undelete versions, destroy versions:";
    let api = Api::new(&lab.vault.address(), ROOT_TOKEN);
    let before = api.call("GET", &metadata, Value::Null).await;
    fails(&lab, "vault", may, "deploy/vault/broker.hcl").await;
    let after = api.call("GET", &metadata, Value::Null).await;
    assert_eq!(before["data"], after["data"], "nothing was written");
    lab.vault
        .allow_again(Some(ROOT_TOKEN), Some("POST"), &metadata);
    deny_writes(&lab);

    lab.vault.deny(Some(ROOT_TOKEN), Some("GET"), "kv/*");
    fails(
        &lab,
        of_key,
        "Vault refuses the path (403)",
        "broker.hcl names mount and prefix",
    )
    .await;
    lab.vault.allow_again(Some(ROOT_TOKEN), Some("GET"), "kv/*");

    let custom = [("state".to_owned(), "disabled".to_owned())];
    lab.vault.set_custom_metadata("kv", &path, custom.into());
    fails(&lab, of_key, "state=disabled", "set state=active").await;
    let custom = [("state".to_owned(), "paused".to_owned())];
    lab.vault.set_custom_metadata("kv", &path, custom.into());
    let told = "its custom metadata says state=\"paused\", which is neither active nor disabled; risk-increasing requests are refused";
    fails(&lab, of_key, told, "set state=active or state=disabled").await;
    lab.vault.set_custom_metadata("kv", &path, [].into());

    lab.vault
        .put_secret("kv", &path, json!({ "api_key": MARK }));
    fails(
        &lab,
        of_key,
        "`api_secret` is missing",
        "credbroker keys rotate main",
    )
    .await;
    lab.vault.delete_metadata("kv", &path);
    fails(
        &lab,
        of_key,
        "Vault has no such key (404)",
        "credbroker keys register main",
    )
    .await;

    std::fs::write(lab.path("token"), format!("{MARK}\n")).unwrap();
    fails(
        &lab,
        "vault",
        "Vault does not accept our token",
        "the agent",
    )
    .await;
    lab.vault.seal();
    fails(&lab, "vault", "sealed", "unseal it").await;

    let address = lab.vault.address();
    lab.vault.stop().await.unwrap();
    fails(&lab, "vault", "cannot be reached", "does Vault run").await;
    lab.reconfigure(&address, "https://vault.invalid:8200");
    fails(
        &lab,
        "vault",
        "https://vault.invalid:8200/ cannot be reached",
        "name server",
    )
    .await;
    assert!(lab.server.take().is_none());
}

#[tokio::test]
async fn doctor_names_the_key_where_an_account_has_several() {
    let two = ACCOUNT.replace("futures = \"main\"", "futures = \"second\"");
    let settings = Settings {
        rules: rules().replace(ACCOUNT, &two),
        ..settings()
    };
    let lab = Lab::install(settings).await;
    for name in ["main", "second"] {
        let check = format!("vault main/{name}");
        let register = format!("`credbroker keys register main --key {name}`");
        fails(&lab, &check, "Vault has no such key (404)", &register).await;
    }
    let path = kv_path("main", "second");
    let notes = [("use_version".to_owned(), "9".to_owned())];
    lab.vault.put_secret("kv", &path, secret(&key()));
    lab.vault.set_custom_metadata("kv", &path, notes.into());
    let newest = "`credbroker keys rollback main --key second --newest`";
    fails(&lab, "vault main/second", "use_version=9", newest).await;
    lab.vault.set_custom_metadata("kv", &path, [].into());
    lab.vault
        .put_secret("kv", &path, json!({ "api_key": MARK }));
    let rotate = "`credbroker keys rotate main --key second`";
    fails(&lab, "vault main/second", "`api_secret` is missing", rotate).await;
}

/// The fix is about the server, and never about a secret id, where Vault does not answer or something else does.
#[tokio::test]
async fn doctor_does_not_blame_the_secret_id_when_vault_is_unreachable() {
    let mut lab = Lab::install(settings()).await;
    // The exchange stands in Vault's place once.
    lab.is_checked = false;
    std::fs::write(lab.path("secret-id"), "fake-secret-id").unwrap();
    let plain = "method = \"approle\"\nrole_id = \"fake\"\nsecret_id_file = \"secret-id\"";
    let wrapped = format!("{plain}\nwrapped = true\nrole = \"credbroker\"");
    // Connections are accepted by the system, and nobody answers them.
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
                "Vault cannot be reached",
                "check that Vault runs at vault.address",
            ),
            (
                lab.kucoin.spot_url(),
                "not in its own words",
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
            let told = |name: &str| failed[name].as_str().unwrap();
            assert!(told("detail").contains(detail), "{failed}");
            assert!(told("fix").contains(fix), "{failed}");
            assert!(!told("fix").contains("fresh"), "{failed}");
        }
    }
}

#[tokio::test]
async fn a_mount_of_kv_version_1_is_told_from_a_missing_key() {
    let lab = Lab::install(settings()).await;
    let vault = VaultSim::start_dev(ROOT_TOKEN).await.unwrap();
    vault.mount_kv_v1("kv");
    lab.reconfigure(&lab.vault.address(), &vault.address());
    let detail = "mount kv is KV version 1, and credbroker needs version 2";
    let fix = "set vault.mount to a mount of version 2";
    fails(&lab, "vault main/main", detail, fix).await;
}

#[tokio::test]
async fn the_certificate_that_vault_shows_is_looked_at() {
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
    fails(&lab, "vault", "invalid peer certificate: UnknownIssuer", ca).await;
    lab.reconfigure("[vault]\n", "[vault]\nroots = \"ca.pem\"\n");
    let renew = "have Vault's certificate renewed";
    told(&lab, "warning", "certificate of Vault", "in 20 days", renew).await;
}

#[tokio::test]
async fn a_server_that_shows_a_ca_as_its_own_certificate_is_named() {
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
            fails(
                &lab,
                "vault",
                sentence,
                "a certificate that its CA has issued",
            )
            .await;
            lab.start_broker().await;
            until("the broker names it too", async || {
                let (_, text) = lab.get("/readyz").await;
                text.contains(&format!("Vault cannot be reached: {sentence}"))
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
    let fix = "a certificate that its CA has issued";
    fails(&lab, "host global/spot", sentence, fix).await;
}

#[tokio::test]
async fn files_that_others_can_read_or_change_fail() {
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
        fails(&lab, &format!("permissions {setting}"), &detail, &fix).await;
        set_mode(&lab.path(file), 0o640);
    }
    let (code, found) = lines(&lab).await;
    assert_eq!((code, not_ok(&found)), (Some(0), Vec::new()), "{found:#?}");
}

#[tokio::test]
async fn a_wrapped_secret_id_is_looked_at_and_not_used_up() {
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
        let good = "the wrapping token is good; it is not used up";
        let is_told = |line: &Value| line["detail"].as_str().unwrap().contains(good);
        assert!(found.iter().any(is_told), "{found:#?}");
        assert!(!found.iter().any(|line| line["check"] == "key main/main"));
    }
    assert!(lab.path("wrapped").exists());
    std::fs::write(lab.path("wrapped"), secret_id).unwrap();
    fails(
        &lab,
        "vault",
        "wrapping token used or expired",
        "fresh wrapping token",
    )
    .await;
}

#[tokio::test]
async fn what_is_wrong_with_the_way_to_the_exchange_is_told() {
    let lab = healthy().await;
    lab.kucoin.set_clock_offset_ms(-5000);
    told(
        &lab,
        "warning",
        "clock global/spot",
        "ms ahead of the exchange's",
        "NTP",
    )
    .await;
    lab.kucoin.set_clock_offset_ms(0);

    lab.kucoin
        .set_seen_address(Some("127.0.0.9".parse().unwrap()));
    let enter = "enter 127.0.0.9 under API Management > Edit > IP restriction";
    fails(
        &lab,
        "egress",
        "the exchange sees 127.0.0.9, and egress.expected_ip is 127.0.0.1",
        enter,
    )
    .await;
    fails(&lab, "key main/main", "127.0.0.9", "127.0.0.9").await;
    lab.kucoin.set_seen_address(None);

    let html = FaultAction::Html {
        status: 502,
        when: When::BeforeTaken,
    };
    lab.kucoin.fault(Fault::once("/api/v1/my-ip", html.clone()));
    fails(&lab, "egress", "unexpected answer (HTTP 502)", "hosts").await;
    lab.kucoin.fault(Fault {
        times: None,
        ..Fault::once("/api/v1/timestamp", html)
    });
    fails(
        &lab,
        "clock global/futures",
        "HTTP 502",
        "is it KuCoin that answers",
    )
    .await;
    lab.kucoin.clear_faults();

    lab.reconfigure(
        "[egress]\naddress = \"127.0.0.1\"",
        "[egress]\naddress = \"203.0.113.7\"",
    );
    let host = "host global/spot";
    fails(
        &lab,
        host,
        "cannot be reached",
        "203.0.113.7 is no address of this machine",
    )
    .await;
    lab.reconfigure(
        "[egress]\naddress = \"203.0.113.7\"",
        "[egress]\naddress = \"127.0.0.1\"",
    );
    lab.reconfigure(&lab.kucoin.spot_url(), "http://127.0.0.1:1");
    fails(
        &lab,
        host,
        "cannot be reached: Connection refused",
        "curl --interface 127.0.0.1",
    )
    .await;
    lab.reconfigure("http://127.0.0.1:1\"", "http://[::1]:1\"");
    fails(
        &lab,
        host,
        "::1 has no IPv4 address, which egress.address 127.0.0.1 needs",
        "correct egress.address",
    )
    .await;
    lab.reconfigure("http://[::1]:1\"", "http://127.0.0.1:1\"");
    let elsewhere = "[exchange]\nsend_signed_requests_to_hosts_other_than_kucoin = true";
    lab.reconfigure("[exchange]", elsewhere);
    lab.reconfigure("http://127.0.0.1:1\"", "https://kucoin.invalid\"");
    fails(
        &lab,
        host,
        "the name kucoin.invalid cannot be resolved",
        "getent hosts kucoin.invalid",
    )
    .await;
}

#[tokio::test]
async fn doctor_fails_where_the_exchange_clock_is_more_than_a_day_off() {
    let lab = healthy().await;
    lab.kucoin.set_clock_offset_ms(10 * 365 * 24 * 3_600_000);
    fails(
        &lab,
        "clock global/spot",
        "the exchange's clock is 3650 days ahead of the system clock",
        "`credbroker clock accept global/spot`",
    )
    .await;
}

#[tokio::test]
async fn what_is_wrong_with_a_key_is_told_in_the_sentences_of_every_command() {
    let lab = healthy().await;
    let check = "key main/main";
    let edited = |edit: &dyn Fn(&mut SimKey)| {
        let mut key = key();
        edit(&mut key);
        lab.kucoin.remove_key(&key.api_key);
        lab.kucoin.add_key(key);
    };
    edited(&|key| key.ip_whitelist.clear());
    fails(
        &lab,
        check,
        "no IP restriction",
        "Enter 127.0.0.1 under API Management",
    )
    .await;
    edited(&|key| key.permissions.push("Withdrawal".to_owned()));
    fails(&lab, check, "permission Withdrawal", "Untick Withdrawal").await;
    edited(&|key| key.permissions.retain(|held| held != "Futures"));
    fails(&lab, check, "lacks the permission Futures", "Tick Futures").await;
    edited(&|key| key.passphrase = "another".to_owned());
    fails(&lab, check, "passphrase", "").await;
    lab.kucoin.remove_key(&key().api_key);
    fails(&lab, check, "KuCoin", "").await;
    lab.check_record();
}

#[tokio::test]
async fn with_everything_unreachable_it_ends_in_time_and_writes_nothing() {
    // Addresses that swallow everything, as firewalls do.
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
async fn a_live_report_compares_what_came_with_what_is_documented() {
    let lab = healthy().await;
    let ended = doctor(&lab, &["--live", "main"]).await;
    let report = ended.stdout.as_str();
    assert!(ended.stderr.is_empty(), "{}", ended.stderr);
    let words = report.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "doctor --live main ",
        "ok live GET /api/v1/timestamp (spot host, unsigned): expected HTTP 200, code 200000, data: number; came HTTP \
         200, code 200000, data: number, as documented",
        "ok live GET /api/v1/timestamp (futures host, unsigned): ",
        "ok live GET /api/v1/my-ip (spot host, unsigned): ",
        "ok live GET /api/v1/user/api-key (spot-margin, key main): ",
        "ok live GET /api/v1/accounts (spot-margin, key main): expected HTTP 200, code 200000, data: list; ",
        "ok live POST /api/v1/hf/orders/test (spot-margin, key main): ",
        "ok live GET /api/v1/account-overview (futures, key main): ",
        "ok live POST /api/v1/orders/test (futures, key main): ",
        "GET /api/ua/v2/unified/account/overview (unified, key main): ",
    ] {
        assert!(words.contains(part), "{part} is not in\n{report}");
    }
    assert!(!report.contains("1000000"), "a balance shows:\n{report}");
    assert!(report.lines().all(|line| line.chars().count() <= 80));
    assert!(lab.kucoin.orders(MAIN_UID).is_empty(), "nothing is ordered");
    lab.check_record();

    let msg = format!("key {MARK}0key0id lacks \u{1b}[31mfutures");
    let refused = FaultAction::Answer {
        status: 200,
        body: json!({ "code": "400007", "msg": msg }),
        when: When::BeforeTaken,
    };
    lab.kucoin
        .fault(Fault::once("/api/v1/account-overview", refused));
    let ended = doctor(&lab, &["--live", "main", "--json"]).await;
    assert_eq!(ended.code, Some(1));
    let lines = ended
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
        detail.contains("came HTTP 200, code 400007") && detail.contains("***"),
        "{detail}"
    );
    assert!(!detail.contains('\u{1b}'));
    assert!(overview["fix"].as_str().unwrap().contains("Futures"));

    let nobody = doctor(&lab, &["--live", "nobody"]).await;
    assert_eq!((nobody.code, nobody.stdout.as_str()), (Some(2), ""));
    assert!(
        nobody.stderr.contains("names no account nobody"),
        "{}",
        nobody.stderr
    );
}
