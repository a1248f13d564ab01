//! Rules and certificates are reloaded while bots work, however their files are replaced; unusable files change nothing.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use credbroker::clock::Clock;
use credbroker::proto::SignAndSendRequest;
use credbroker::server::{Server, StartError};
use credbroker_sim::installation::{RULES, Settings, kv_path, secret};
use credbroker_sim::kucoin::{Fault, FaultAction, KucoinSettings, Limits, SimKey};
use credbroker_sim::pki::{Ca, Identity};
use credbroker_sim::vault::{Fault as VaultFault, FaultRule};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tonic::{Code, Status};

use crate::certificates::is_call_accepted;
use crate::delivery::tls_of;
use crate::harness::{Bot, Lab, Patient, accounts, not_run, refusal, set_mode, spot_order, until};
use crate::raw_bot::{GOAWAY, RawBot};

/// A grant to read spot on an account.
fn reading(bot: &str, account: &str) -> String {
    format!(
        "\n[[grant]]\nbot = \"spiffe://demo.test/bot/{bot}\"\naccount = \"{account}\"\nscope = \"spot-margin\"\nallow = [\"read\"]\n"
    )
}

/// The usual rules with one more account.
fn with_account(name: &str) -> String {
    format!("{RULES}\n[account.{name}]\nkey = {{ spot-margin = \"main\" }}\n")
}

fn balance_of(account: &str) -> SignAndSendRequest {
    SignAndSendRequest {
        account: account.to_owned(),
        ..accounts()
    }
}

/// How a file is replaced.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Another file is renamed over it.
    Rename,
    /// It is a symlink into a symlinked folder, which is pointed at another folder, as Kubernetes does.
    Links,
    /// It is overwritten in place.
    Write,
}

fn link_over(lab: &Lab, name: &str, target: &str) {
    let new = lab.path("link.new");
    std::os::unix::fs::symlink(target, &new).unwrap();
    std::fs::rename(new, lab.path(name)).unwrap();
}

/// Turns the files into symlinks, as Kubernetes mounts them, without changing their contents.
fn mount(lab: &Lab, names: &[&str]) {
    std::fs::create_dir(lab.path("..first")).unwrap();
    link_over(lab, "..data", "..first");
    for name in names {
        std::fs::copy(lab.path(name), lab.path(&format!("..first/{name}"))).unwrap();
        link_over(lab, name, &format!("..data/{name}"));
    }
}

impl Way {
    fn replace(self, lab: &Lab, files: &[(&str, &str)]) {
        if let Self::Links = self {
            let names: Vec<_> = files.iter().map(|(name, _)| *name).collect();
            mount(lab, &names);
            std::fs::create_dir(lab.path("..second")).unwrap();
        }
        for (name, text) in files {
            match self {
                Self::Rename => lab.replace(name, text).unwrap(),
                Self::Links => std::fs::write(lab.path(&format!("..second/{name}")), text).unwrap(),
                Self::Write => std::fs::write(lab.path(name), text).unwrap(),
            }
        }
        if let Self::Links = self {
            link_over(lab, "..data", "..second");
            std::fs::remove_dir_all(lab.path("..first")).unwrap();
        }
    }
}

/// The file's SHA-256 according to `sha256sum`.
fn sha256sum(file: &Path) -> String {
    let output = Command::new("sha256sum").arg(file).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap().to_owned()
}

/// Waits until a change after the first `known` ones is audited, and returns it.
async fn change_after(lab: &Lab, known: usize) -> Value {
    until("a change is audited", async || lab.changes().len() > known).await;
    lab.changes()[known].clone()
}

/// Replaces the rules and waits until the new ones are in effect.
async fn set_rules(lab: &Lab, rules: &str) {
    let known = lab.changes().len();
    lab.replace("rules.toml", rules).unwrap();
    let change = change_after(lab, known).await;
    assert_eq!(
        (&change["file"], &change["outcome"]),
        (&"rules".into(), &"reloaded".into()),
        "{change}"
    );
}

/// Replaces the bots' CAs and waits until the new ones are in effect.
async fn set_cas(lab: &Lab, cas: &[&Ca]) {
    let known = lab.changes().len();
    lab.replace("ca.pem", &bundle(cas)).unwrap();
    let change = change_after(lab, known).await;
    assert_eq!(
        (&change["file"], &change["outcome"]),
        (&"tls".into(), &"reloaded".into()),
        "{change}"
    );
}

fn bundle(cas: &[&Ca]) -> String {
    cas.iter().map(|ca| ca.certificate_pem()).collect()
}

/// The server certificate of a new connection.
async fn presented_certificate(lab: &Lab) -> CertificateDer<'static> {
    let stream = lab.tls(&lab.ca.bot("maker").unwrap()).await.unwrap();
    let chain = stream.get_ref().1.peer_certificates().unwrap();
    chain[0].clone().into_owned()
}

fn der(identity: &Identity) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(identity.certificate_pem.as_bytes()).unwrap()
}

/// A bot that calls without a pause until `stop`.
struct Busy {
    stop: watch::Sender<bool>,
    calls: JoinHandle<(usize, Vec<Status>)>,
}

impl Busy {
    fn start(mut bot: Bot<Patient>, request: SignAndSendRequest) -> Self {
        let (stop, stopped) = watch::channel(false);
        let calls = tokio::spawn(async move {
            let (mut accepted, mut failures) = (0, Vec::new());
            while !*stopped.borrow() {
                match bot.send(request.clone()).await {
                    Ok(_) => accepted += 1,
                    Err(status) => failures.push(status),
                }
                // The test and the broker run on the same thread.
                sleep(Duration::from_millis(1)).await;
            }
            (accepted, failures)
        });
        Self { stop, calls }
    }

    /// The number of accepted calls, and the errors of the others.
    async fn stop(self) -> (usize, Vec<Status>) {
        self.stop.send_replace(true);
        self.calls.await.unwrap()
    }
}

#[tokio::test]
async fn files_are_reloaded_however_they_are_replaced() {
    let mut lab = Lab::start().await;
    let mut rules = RULES.to_owned();
    for way in [Way::Rename, Way::Write, Way::Links] {
        let known = lab.changes().len();
        let name = format!("{way:?}").to_lowercase();
        let ca = Ca::new(&name).unwrap();
        let identity = ca.bot(&name).unwrap();
        let server = lab.ca.server().unwrap();
        let before = sha256sum(&lab.path("rules.toml"));
        rules += &reading(&name, "main");
        way.replace(
            &lab,
            &[
                ("rules.toml", rules.as_str()),
                ("server.pem", server.certificate_pem.as_str()),
                ("server.key", server.key_pem.as_str()),
                ("ca.pem", bundle(&[&lab.ca, &ca]).as_str()),
            ],
        );
        change_after(&lab, known + 1).await;
        let mut changes = lab.changes().split_off(known);
        changes.sort_by_key(|change| change["file"].to_string());
        let describe = |change: &Value| {
            format!(
                "{} {} {}",
                change["principal"], change["file"], change["outcome"]
            )
        };
        assert_eq!(
            changes.iter().map(describe).collect::<Vec<_>>(),
            [r#""file" "rules" "reloaded""#, r#""file" "tls" "reloaded""#],
            "{way:?}"
        );
        assert_eq!(changes[0]["sha256_before"], before);
        assert_eq!(
            changes[0]["sha256_after"],
            sha256sum(&lab.path("rules.toml"))
        );
        assert_ne!(changes[1]["sha256_before"], changes[1]["sha256_after"]);

        let mut bot = lab.patient_bot_with(&identity).await;
        bot.send(accounts()).await.unwrap();
        assert_eq!(presented_certificate(&lab).await, der(&server), "{way:?}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn half_written_file_never_takes_effect() {
    let mut lab = Lab::start().await;
    let busy = Busy::start(lab.patient_bot("reader").await, accounts());
    let (head, tail) = RULES.split_at(
        RULES
            .find("[[grant]]\nbot = \"spiffe://demo.test/bot/reader\"")
            .unwrap(),
    );
    let texts: Vec<_> = (0..20)
        .map(|round| format!("# {round}\n{head}{tail}"))
        .collect();
    let file = lab.path("rules.toml");
    let mut digests = BTreeSet::new();
    for text in &texts {
        let known = lab.changes().len();
        let (first, rest) = text.split_at(text.len() - tail.len());
        assert!(
            credbroker::policy::Policy::parse(first).is_ok(),
            "the half-written file must be valid rules"
        );
        std::fs::write(&file, first).unwrap();
        // Less than the time between two checks, so at most one check sees the half-written file.
        sleep(Duration::from_millis(30)).await;
        let mut open = std::fs::File::options().append(true).open(&file).unwrap();
        std::io::Write::write_all(&mut open, rest.as_bytes()).unwrap();
        digests.insert(sha256sum(&file));
        change_after(&lab, known).await;
    }
    let (accepted, failures) = busy.stop().await;
    assert!(accepted > 20, "{accepted}");
    assert!(failures.is_empty(), "{failures:?}");
    let changes = lab.changes();
    assert_eq!(changes.len(), texts.len());
    for change in changes {
        assert!(
            digests.contains(change["sha256_after"].as_str().unwrap()),
            "{change}"
        );
    }
    lab.stop().await;
}

#[tokio::test]
async fn certificate_and_key_may_be_replaced_one_after_the_other() {
    let mut lab = Lab::start().await;
    let (old, new) = (presented_certificate(&lab).await, lab.ca.server().unwrap());
    for (name, text, outcome) in [
        ("server.pem", &new.certificate_pem, "rejected"),
        ("server.key", &new.key_pem, "reloaded"),
    ] {
        let known = lab.changes().len();
        assert_eq!(presented_certificate(&lab).await, old);
        lab.replace(name, text).unwrap();
        assert_eq!(change_after(&lab, known).await["outcome"], outcome);
    }
    assert_eq!(presented_certificate(&lab).await, der(&new));
    assert_eq!(
        lab.metric("credbroker_file_unusable{file=\"tls\"}").await,
        Some(0.0)
    );
    lab.stop().await;
}

fn now_s() -> u64 {
    u64::try_from(Clock::system().wall_ms() / 1000).unwrap()
}

/// Contents of an unusable file.
enum Bad {
    Text(String),
    Bytes(Vec<u8>),
    Missing,
    Folder,
}

#[tokio::test]
async fn unusable_file_changes_nothing_and_is_reported_until_it_is_fixed() {
    let lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    let mut old_connection = lab.patient_bot("maker").await;
    let (day, now) = (86_400, now_s());
    let expired = lab.ca.server_within(now - 2 * day..now - day).unwrap();
    let early = lab.ca.server_within(now + day..now + 2 * day).unwrap();
    let (other, one_line) = (lab.ca.server().unwrap(), lab.ca.server().unwrap().key_pem);
    let (first, other_ca) = (lab.ca.certificate_pem(), Ca::new("another CA").unwrap());
    let second = other_ca.certificate_pem();
    let utf16: Vec<u8> = first.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let rules_line = RULES.lines().count() + 1;
    let text = |text: &str| Bad::Text(text.to_owned());
    let cases = [
        (
            "rules.toml",
            Bad::Text(format!("{RULES}[[grant")),
            format!("rules.toml:{rules_line}"),
        ),
        (
            "rules.toml",
            Bad::Text(format!("{RULES}permit = [\"read\"]\n")),
            format!("rules.toml:{rules_line}"),
        ),
        (
            "rules.toml",
            Bad::Text(RULES.replace("reader", "\u{7f}")),
            "rules.toml:".to_owned(),
        ),
        ("rules.toml", text(""), "rules.toml".to_owned()),
        (
            "rules.toml",
            // As it is while the grants are still being written.
            Bad::Text(RULES.split("[[grant]]").next().unwrap().to_owned()),
            "has no grants".to_owned(),
        ),
        (
            "server.key",
            // Line breaks replaced by `\n`: the whole key is on one line.
            Bad::Text(one_line.replace('\n', "\\n")),
            "expected a PEM private key".to_owned(),
        ),
        (
            "rules.toml",
            Bad::Missing,
            "rules.toml cannot be read".to_owned(),
        ),
        (
            "rules.toml",
            Bad::Folder,
            "rules.toml cannot be read".to_owned(),
        ),
        (
            "server.key",
            Bad::Text(other.key_pem),
            "server.key is not the key of tls.certificate".to_owned(),
        ),
        ("server.key", text(""), "server.key".to_owned()),
        (
            "server.pem",
            Bad::Text(expired.certificate_pem),
            "expired on".to_owned(),
        ),
        (
            "server.pem",
            Bad::Text(early.certificate_pem),
            "is not valid before".to_owned(),
        ),
        (
            "server.pem",
            text(""),
            "server.pem: no CERTIFICATE section found".to_owned(),
        ),
        ("server.pem", Bad::Missing, "server.pem".to_owned()),
        (
            "ca.pem",
            text(""),
            "ca.pem: no CERTIFICATE section found".to_owned(),
        ),
        (
            "ca.pem",
            text("-----BEGIN CERTIFICATE-----\nAAAA\n"),
            "ca.pem".to_owned(),
        ),
        ("ca.pem", Bad::Folder, "ca.pem".to_owned()),
        (
            "ca.pem",
            Bad::Text(first.replace(" CERTIFICATE", " TRUSTED CERTIFICATE") + second),
            "ca.pem: unexpected section \"TRUSTED CERTIFICATE\" on line 1".to_owned(),
        ),
        (
            "ca.pem",
            Bad::Text(first.replacen('-', "", 1) + second),
            "ca.pem: line 1 is damaged".to_owned(),
        ),
        (
            "ca.pem",
            Bad::Text(first.replace("-----BEGIN", " -----BEGIN") + second),
            "ca.pem: line 1 is damaged".to_owned(),
        ),
        (
            "ca.pem",
            Bad::Bytes([second.as_bytes(), &utf16].concat()),
            format!(
                "ca.pem: line {} contains NUL bytes",
                second.lines().count() + 1
            ),
        ),
        (
            "ca.pem",
            Bad::Text(
                lab.ca
                    .signing_bot("maker")
                    .unwrap()
                    .certificate_pem()
                    .to_owned(),
            ),
            "ca.pem:1: \"CN=maker\" is not a CA".to_owned(),
        ),
    ];
    for (number, (name, bad, problem)) in cases.iter().enumerate() {
        let case = format!("{number}: {name}: {problem}");
        let kind = if *name == "rules.toml" {
            "rules"
        } else {
            "tls"
        };
        let (known, path) = (lab.changes().len(), lab.path(name));
        let (good, digest) = (std::fs::read_to_string(&path).unwrap(), sha256sum(&path));
        let certificate = presented_certificate(&lab).await;
        match bad {
            Bad::Text(text) => lab.replace(name, text).unwrap(),
            Bad::Bytes(bytes) => std::fs::write(&path, bytes).unwrap(),
            Bad::Missing => std::fs::remove_file(&path).unwrap(),
            Bad::Folder => {
                std::fs::remove_file(&path).unwrap();
                std::fs::create_dir(&path).unwrap();
            }
        }
        let rejected = change_after(&lab, known).await;
        assert_eq!(
            (&rejected["file"], &rejected["outcome"]),
            (&kind.into(), &"rejected".into()),
            "{case}"
        );
        assert!(
            rejected["detail"].as_str().unwrap().contains(problem),
            "{case}: {rejected}"
        );
        if kind == "rules" {
            assert_eq!(rejected["sha256_before"], digest, "{case}");
        }
        if let (Bad::Text(_), "rules") = (bad, kind) {
            assert_eq!(rejected["sha256_after"], sha256sum(&path), "{case}");
        }
        let unusable = format!("credbroker_file_unusable{{file=\"{kind}\"}}");
        let rejections =
            format!("credbroker_reloads_total{{file=\"{kind}\",outcome=\"rejected\"}}");
        assert_eq!(lab.metric(&unusable).await, Some(1.0), "{case}");
        let rejections = lab.metric(&rejections).await.unwrap();
        let recorded = lab.changes();
        let recorded = recorded
            .iter()
            .filter(|change| change["file"] == kind && change["outcome"] == "rejected");
        assert!(
            (rejections - f64::from(u32::try_from(recorded.count()).unwrap())).abs() < 0.1,
            "{case}"
        );
        let (status, verbose) = lab.get("/readyz?verbose").await;
        assert_eq!(status, 200, "the current files stay in use: {case}");
        let text = format!("{kind}: reload failed; still using the previously loaded version");
        let is_reported = |line: &str| line.starts_with(&text) && line.contains(problem);
        assert!(verbose.lines().any(is_reported), "{case}: {verbose}");
        let problem = &problem.replace('"', "\\\"");
        let is_logged = |line: &str| line.contains("reload failed") && line.contains(problem);
        until(
            &format!("the failed reload is logged: {case}"),
            async || lab.process.as_ref().unwrap().log().lines().any(is_logged),
        )
        .await;

        old_connection.send(accounts()).await.unwrap();
        lab.patient_bot("reader")
            .await
            .send(accounts())
            .await
            .unwrap();
        assert_eq!(presented_certificate(&lab).await, certificate, "{case}");

        if let Bad::Folder = bad {
            std::fs::remove_dir(&path).unwrap();
        }
        lab.replace(name, &good).unwrap();
        assert_eq!(
            change_after(&lab, known + 1).await["outcome"],
            "reloaded",
            "{case}"
        );
        assert_eq!(lab.metric(&unusable).await, Some(0.0), "{case}");
        assert!(
            !lab.get("/readyz?verbose").await.1.contains("reload failed"),
            "{case}"
        );
    }
    assert_eq!(
        lab.changes().len(),
        2 * cases.len(),
        "each change is audited once"
    );
    // No byte of a key is in the log or the audit log, neither as text nor as the numbers of Debug output.
    let key = one_line.lines().nth(1).unwrap();
    let numbers: Vec<_> = key.bytes().take(8).map(|byte| byte.to_string()).collect();
    let outputs = lab.process.as_ref().unwrap().log()
        + &std::fs::read_to_string(lab.path("state/audit.jsonl")).unwrap();
    assert!(!outputs.contains(&key[..8]) && !outputs.contains(&numbers.join(", ")));
}

#[tokio::test]
async fn certificate_that_is_not_valid_yet_is_loaded_once_it_is_valid() {
    let mut lab = Lab::start().await;
    let now = now_s();
    let early = lab.ca.server_within(now + 3..now + 86_400).unwrap();
    lab.replace("server.pem", &early.certificate_pem).unwrap();
    lab.replace("server.key", &early.key_pem).unwrap();
    assert_eq!(change_after(&lab, 0).await["outcome"], "rejected");
    assert_eq!(change_after(&lab, 1).await["outcome"], "reloaded");
    assert_eq!(lab.changes().len(), 2);
    assert_eq!(presented_certificate(&lab).await, der(&early));
    lab.stop().await;
}

#[tokio::test]
async fn changed_rules_apply_to_the_next_call_on_an_open_connection() {
    let mut lab = Lab::start().await;
    let mut reader = lab.patient_bot("reader").await;
    let mut newcomer = lab.patient_bot("newcomer").await;
    let unknown = (
        Code::Unauthenticated,
        "CALLER_UNKNOWN".to_owned(),
        "not_sent".to_owned(),
    );
    reader.send(accounts()).await.unwrap();
    assert_eq!(refusal(newcomer.send(accounts()).await), unknown);
    set_rules(&lab, &RULES.replace("bot/reader", "bot/newcomer")).await;
    assert_eq!(refusal(reader.send(accounts()).await), unknown);
    newcomer.send(accounts()).await.unwrap();
    set_rules(&lab, RULES).await;
    reader.send(accounts()).await.unwrap();
    assert_eq!(refusal(newcomer.send(accounts()).await), unknown);
    lab.stop().await;
}

#[tokio::test]
async fn key_of_a_new_account_is_loaded_before_its_rules_take_effect() {
    let mut lab = Lab::start().await;
    let key = SimKey::fake(1003);
    lab.vault
        .put_secret("kv", &kv_path("added", "main"), secret(&key));
    lab.kucoin.add_key(key);
    // Slow, so that calls would fail if the rules took effect before the key is loaded.
    lab.vault.fault(FaultRule::new(
        "kv/data/kucoin/prod/added",
        VaultFault::Delay { ms: 300 },
    ));
    let busy = Busy::start(lab.patient_bot("reader").await, balance_of("added"));
    let rules = with_account("added") + &reading("reader", "added");
    set_rules(&lab, &rules).await;
    let mut bot = lab.patient_bot("reader").await;
    bot.send(balance_of("added")).await.unwrap();
    let (_, failures) = busy.stop().await;
    assert!(
        !failures.is_empty(),
        "expected calls before the rules took effect"
    );
    for status in failures {
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn renaming_the_key_of_an_account_fails_no_call() {
    let mut lab = Lab::start().await;
    let key = SimKey {
        api_key: "simulated-second-key".to_owned(),
        ..SimKey::fake(credbroker_sim::installation::MAIN_UID)
    };
    lab.vault
        .put_secret("kv", &kv_path("main", "second"), secret(&key));
    lab.kucoin.add_key(key);
    let busy = Busy::start(lab.patient_bot("maker").await, accounts());
    set_rules(&lab, &RULES.replacen("\"main\"", "\"second\"", 3)).await;
    let mut bot = lab.patient_bot("maker").await;
    bot.send(accounts()).await.unwrap();
    let (accepted, failures) = busy.stop().await;
    assert!(
        accepted > 0 && failures.is_empty(),
        "{accepted} {failures:?}"
    );
    assert_eq!(signed_by(&lab).pop().unwrap(), "simulated-second-key");
    lab.stop().await;
}

#[tokio::test]
async fn call_waiting_for_a_connection_follows_the_rules_in_effect_when_it_is_signed() {
    let exchange_ca = Ca::new("CA of a simulated exchange").unwrap();
    let mut lab = Lab::with(Settings {
        kucoin: KucoinSettings {
            tls: Some(tls_of(&exchange_ca)),
            limits: Limits::none(),
            ..KucoinSettings::default()
        },
        proxy: true,
        files: vec![("exchange-ca.pem", exchange_ca.certificate_pem().to_owned())],
        egress: "warm_connections = 0\nroots = \"exchange-ca.pem\"\nconnect_timeout_ms = 20000"
            .to_owned(),
        ..Settings::default()
    })
    .await;
    let key = SimKey {
        api_key: "simulated-second-key".to_owned(),
        ..SimKey::fake(credbroker_sim::installation::MAIN_UID)
    };
    lab.vault
        .put_secret("kv", &kv_path("main", "second"), secret(&key));
    lab.kucoin.add_key(key);
    lab.proxy().hold();
    let mut calls = Vec::new();
    for name in ["maker", "reader"] {
        let mut bot = lab.patient_bot(name).await;
        calls.push(tokio::spawn(async move { bot.send(accounts()).await }));
    }
    until("both intents are audited", async || lab.audit().len() == 2).await;
    let rules = RULES.replacen("\"main\"", "\"second\"", 3);
    set_rules(&lab, &rules.replace("bot/reader", "bot/another")).await;
    lab.proxy().open();
    let reader = calls.pop().unwrap();
    calls.pop().unwrap().await.unwrap().unwrap();
    let rejected = refusal(reader.await.unwrap());
    assert_eq!(
        (rejected.1.as_str(), rejected.2.as_str()),
        ("CALLER_UNKNOWN", "not_sent")
    );
    assert_eq!(signed_by(&lab), ["simulated-second-key"]);
    lab.stop().await;
}

/// The ids of the keys that signed the requests of bots.
fn signed_by(lab: &Lab) -> Vec<String> {
    let key = |(name, value)| (name == "kc-api-key").then_some(value);
    let requests = lab.kucoin.received().into_iter();
    requests
        .filter_map(|request| request.headers.into_iter().find_map(key))
        .collect()
}

#[tokio::test]
async fn key_of_a_removed_account_is_removed_from_memory() {
    let mut lab = Lab::start().await;
    let version = "credbroker_key_version{account=\"other\",key=\"main\"}";
    assert_eq!(lab.metric(version).await, Some(1.0));
    let rules = RULES.replace("[account.other]\nkey = { spot-margin = \"main\" }\n", "");
    set_rules(&lab, &rules).await;
    assert_eq!(lab.metric(version).await, None);
    assert!(!lab.get("/readyz?verbose").await.1.contains("other/main"));
    // It is no longer polled in Vault.
    let count_all = || lab.vault.requests().len();
    let count_other = || {
        let seen = lab.vault.requests();
        seen.iter()
            .filter(|seen| seen.path.contains("/other/"))
            .count()
    };
    let (all, before) = (count_all(), count_other());
    until("the other keys are polled again", async || {
        count_all() >= all + 3
    })
    .await;
    assert_eq!(count_other(), before);
    lab.stop().await;
}

/// An installation with a second trusted CA for bots.
async fn with_second_ca(config: &str) -> (Lab, Ca) {
    let lab = Lab::with(Settings {
        config: config.to_owned(),
        ..Settings::default()
    })
    .await;
    let second = Ca::new("a second CA").unwrap();
    set_cas(&lab, &[&lab.ca, &second]).await;
    (lab, second)
}

#[tokio::test]
async fn connections_of_a_removed_ca_close_gracefully_and_others_stay_open() {
    let (mut lab, second) = with_second_ca("").await;
    let identity = second.bot("maker").unwrap();
    let busy = Busy::start(lab.patient_bot("maker").await, accounts());
    let mut idle = lab.patient_bot_with(&identity).await;
    idle.send(accounts()).await.unwrap();
    let mut in_flight = lab.patient_bot_with(&identity).await;
    let orders = "/api/v1/hf/orders";
    lab.kucoin
        .fault(Fault::once(orders, FaultAction::Delay { ms: 1000 }));
    let mut same_connection = in_flight.clone();
    let call = tokio::spawn(async move { in_flight.send(spot_order("in-flight")).await });
    until("the order is sent", async || {
        lab.kucoin
            .received()
            .iter()
            .any(|request| request.target == orders)
    })
    .await;
    let connections = "credbroker_connections";
    assert_eq!(lab.metric(connections).await, Some(3.0));
    let started = std::time::Instant::now();
    set_cas(&lab, &[&lab.ca]).await;
    until("the idle connection is closed", async || {
        lab.metric(connections)
            .await
            .is_some_and(|open| open <= 2.0)
    })
    .await;
    let placed = call.await.unwrap().unwrap();
    assert_eq!(placed.code, "200000", "the call in flight must complete");
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "the idle connection must be closed at once"
    );
    until("the other connection is closed", async || {
        lab.metric(connections).await == Some(1.0)
    })
    .await;
    let orders_before = lab
        .kucoin
        .received()
        .iter()
        .filter(|r| r.target == orders)
        .count();
    for bot in [&mut idle, &mut same_connection] {
        let status = bot.send(spot_order("too-late")).await.unwrap_err();
        if tonic_types::StatusExt::get_details_error_info(&status).is_some() {
            assert_eq!(refusal(Err(status)).1, "CALLER_UNKNOWN");
        }
    }
    assert!(
        !is_call_accepted(&lab, &identity).await,
        "new handshakes must be rejected"
    );
    let orders_after = lab
        .kucoin
        .received()
        .iter()
        .filter(|r| r.target == orders)
        .count();
    assert_eq!(orders_before, orders_after);
    let (accepted, failures) = busy.stop().await;
    assert!(
        accepted > 10 && failures.is_empty(),
        "{accepted} {failures:?}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn client_that_ignores_goaway_after_its_ca_is_removed_can_make_no_call() {
    let (mut lab, second) = with_second_ca("[limits]\ndrain_timeout_ms = 1000").await;
    let mut client = RawBot::open(&lab, &second.bot("maker").unwrap()).await;
    client.call(&spot_order("before")).await;
    until("the order is placed", async || {
        lab.kucoin.received().len() == 1
    })
    .await;
    set_cas(&lab, &[&lab.ca]).await;
    client.until_frame(GOAWAY).await;
    // The client answers no PING and keeps calling.
    for number in 0..3 {
        client.call(&spot_order(&format!("after-{number}"))).await;
    }
    let denied = || {
        let mut lines = lab.audit();
        lines.retain(|line| line["event"] == "denied" && line["reason"] == "CALLER_UNKNOWN");
        lines.len()
    };
    until("its calls are rejected", async || denied() == 3).await;
    until("its connection is closed", async || {
        lab.metric("credbroker_connections").await == Some(0.0)
    })
    .await;
    assert_eq!(lab.kucoin.received().len(), 1);
    lab.stop().await;
}

#[tokio::test]
async fn bots_signed_by_a_leaf_certificate_in_the_ca_file_are_refused() {
    let mut lab = Lab::start().await;
    let maker = lab.ca.signing_bot("maker").unwrap();
    let forged = maker.bot("reader").unwrap();
    for bundle in [
        maker.certificate_pem().to_owned(),
        lab.ca.certificate_pem().to_owned() + maker.certificate_pem(),
    ] {
        let known = lab.changes().len();
        lab.replace("ca.pem", &bundle).unwrap();
        let change = change_after(&lab, known).await;
        assert!(!is_call_accepted(&lab, &forged).await, "{change}");
        assert_eq!(change["outcome"], "rejected");
        lab.replace("ca.pem", lab.ca.certificate_pem()).unwrap();
        change_after(&lab, known + 1).await;
    }
    lab.stop().await;
}

#[tokio::test]
async fn files_that_others_can_read_or_change_are_reported_while_the_broker_runs() {
    let mut lab = Lab::install(Settings::default()).await;
    set_mode(&lab.path("server.key"), 0o644);
    set_mode(&lab.path("config.toml"), 0o666);
    lab.spawn_broker().await;
    lab.until_ready().await;
    let warnings = async |number: u8| {
        until(&format!("there are {number} warnings"), async || {
            lab.metric("credbroker_file_warnings").await == Some(f64::from(number))
        })
        .await;
        lab.get("/readyz?verbose").await.1
    };
    let warning = |setting: &str, file: &str, can: &str, mode: &str, less: &str| {
        let file = lab.path(file);
        let file = file.display();
        format!(
            "warning: {setting}: {file} can be {can} by other users (mode {mode}); chmod {less} {file}\n"
        )
    };
    let key = warning("tls.key", "server.key", "read", "0644", "o-rwx");
    let config = warning("config", "config.toml", "changed", "0666", "o-w");
    let verbose = warnings(2).await;
    assert!(
        verbose.contains(&key) && verbose.contains(&config),
        "{verbose}"
    );
    set_mode(&lab.path("server.key"), 0o600);
    set_mode(&lab.path("config.toml"), 0o644);
    assert!(!warnings(0).await.contains("warning: "));
    set_mode(&lab.path("rules.toml"), 0o666);
    set_mode(&lab.path("ca.pem"), 0o602);
    set_mode(&lab.path("token"), 0o604);
    let verbose = warnings(3).await;
    for expected in [
        warning("rules", "rules.toml", "changed", "0666", "o-w"),
        warning("tls.client_ca", "ca.pem", "changed", "0602", "o-w"),
        warning("vault.auth.file", "token", "read", "0604", "o-rwx"),
    ] {
        assert!(
            verbose.contains(&expected),
            "{expected} is not in {verbose}"
        );
    }
    let log = lab.process.as_ref().unwrap().log();
    let logged: Vec<Value> = log
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|line: &Value| line["message"] == "file warning")
        .collect();
    let settings: Vec<_> = logged.iter().map(|line| &line["setting"]).collect();
    assert_eq!(settings[..2], ["config", "tls.key"], "{log}");
    assert_eq!(settings.len(), 5, "each is logged once: {log}");
    assert!(logged.iter().all(|line| line["level"] == "WARN"));
}

/// Mounts a FUSE file system that never responds over a folder: every access to a file in it hangs.
const HANG: &str = "exec 9<>/dev/fuse && mount -i -t fuse -o fd=9,rootmode=40000,user_id=0,group_id=0 hang \"$0\" && \
                    echo mounted && exec sleep 60";

#[tokio::test]
async fn rules_are_reloaded_while_access_to_another_file_hangs() {
    let can_mount = Command::new("unshare")
        .args([
            "--mount",
            "sh",
            "-c",
            &HANG.replace("sleep 60", "true"),
            "/mnt",
        ])
        .output();
    if !can_mount.is_ok_and(|ended| ended.status.success()) {
        not_run(
            "file that hangs",
            "root",
            "needs root, unshare and /dev/fuse",
        );
        return;
    }
    let mut lab = Lab::install(Settings::default()).await;
    let folder = lab.path("roots");
    std::fs::create_dir(&folder).unwrap();
    lab.write("roots/ca.pem", lab.ca.certificate_pem()).unwrap();
    // Read only at the start; later only its permissions are checked.
    lab.reconfigure("[vault]\n", "[vault]\nroots = \"roots/ca.pem\"\n");
    lab.spawn_broker_under(&["unshare", "--mount"]).await;
    lab.until_ready().await;
    let broker = lab.process().id().to_string();
    let mut hanging = Command::new("nsenter")
        .args(["--target", &broker, "--mount", "sh", "-c", HANG])
        .arg(&folder)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = [0; 7];
    hanging
        .stdout
        .take()
        .unwrap()
        .read_exact(&mut output)
        .unwrap();
    assert_eq!(&output, b"mounted");
    // The second change is reloaded while a check of file permissions hangs.
    for bot in ["late", "later"] {
        set_rules(&lab, &format!("{RULES}{}", reading(bot, "main"))).await;
    }
    hanging.kill().unwrap();
    hanging.wait().unwrap();
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
}

#[tokio::test]
async fn broker_does_not_start_with_an_expired_or_not_yet_valid_server_certificate() {
    let mut lab = Lab::start().await;
    lab.stop().await;
    let (day, now) = (86_400, now_s());
    for (seconds, problem) in [
        (now - 2 * day..now - day, "expired on"),
        (now + day..now + 2 * day, "is not valid before"),
    ] {
        let server = lab.ca.server_within(seconds).unwrap();
        lab.replace("server.pem", &server.certificate_pem).unwrap();
        lab.replace("server.key", &server.key_pem).unwrap();
        let Err(StartError::Config(problems)) = Server::start(lab.config()).await else {
            panic!("started with a certificate that {problem}");
        };
        assert_eq!(problems.len(), 1);
        assert!(problems[0].to_string().contains(problem), "{problems:?}");
        for command in ["check-config", "serve"] {
            let output = Command::new(env!("CARGO_BIN_EXE_credbroker"))
                .args([command, "--config"])
                .arg(lab.path("config.toml"))
                .output()
                .unwrap();
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(2), "{stderr}");
            assert!(
                stderr.contains("tls.certificate") && stderr.contains(problem),
                "{stderr}"
            );
        }
    }
}
