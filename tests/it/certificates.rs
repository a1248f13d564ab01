//! Who can connect as a bot: only clients with TLS 1.3 and a bot certificate.

use std::process::Command;

use credbroker::clock::Clock;
use credbroker::config::Config;
use credbroker::config::load::load;
use credbroker::server::{Server, StartError};
use credbroker_sim::installation::{RULES, Settings};
use credbroker_sim::pki::{Ca, CaKind, Identity, SanType, Usage};

use crate::harness::{Lab, accounts, failure, not_run, refusal, until};

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

const MAKER: &str = "spiffe://demo.test/bot/maker";

/// Whether a call with this certificate succeeds.
pub(crate) async fn is_call_accepted(lab: &Lab, identity: &Identity) -> bool {
    let Ok(channel) = lab.endpoint(identity).connect().await else {
        return false;
    };
    let mut client = credbroker::proto::broker_client::BrokerClient::new(channel);
    client.sign_and_send(accounts()).await.is_ok()
}

#[tokio::test]
async fn bot_is_identified_by_its_only_uri_san_or_its_only_dns_san() {
    let grant = "[[grant]]\nbot = \"maker.bots.demo.test\"\naccount = \"main\"\nscope = \"spot-margin\"\nallow = [\"read\"]\n";
    let rules = format!("{RULES}\n{grant}");
    let lab = Lab::with(Settings {
        rules,
        process: true,
        ..Settings::default()
    })
    .await;
    let issue = |names: &[SanType], usage| lab.ca.issue("maker", names, usage).unwrap();

    let good = [
        issue(&[uri(MAKER)], Usage::Client),
        issue(
            &[uri(MAKER), dns("unknown.demo.test"), dns("two.demo.test")],
            Usage::Client,
        ),
        issue(&[dns("maker.bots.demo.test")], Usage::Client),
        issue(&[dns("Maker.Bots.Demo.TEST")], Usage::Client),
    ];
    let intermediate_of = |kind| lab.ca.intermediate("issuing CA", kind).unwrap();
    let chained = |ca: &Ca, others: &str| {
        let mut identity = ca.bot("maker").unwrap();
        identity.certificate_pem += ca.certificate_pem();
        identity.certificate_pem += others;
        identity
    };
    let non_signing_ca = intermediate_of(CaKind::NotForSigning);
    let good = good.into_iter().chain([
        chained(&intermediate_of(CaKind::Usual), ""),
        // An intermediate that the chain does not need is ignored.
        chained(
            &intermediate_of(CaKind::NoKeyUsage),
            non_signing_ca.certificate_pem(),
        ),
    ]);
    for (index, identity) in good.enumerate() {
        assert!(
            is_call_accepted(&lab, &identity).await,
            "good certificate {index}"
        );
    }
    let other_ca = Ca::new("another CA").unwrap();
    let bad = [
        (issue(&[], Usage::Client), "got 0 URI and 0 DNS"),
        (
            issue(
                &[uri(MAKER), uri("spiffe://demo.test/bot/other")],
                Usage::Client,
            ),
            "got 2 URI and 0 DNS",
        ),
        (
            issue(
                &[dns("maker.bots.demo.test"), dns("b.demo.test")],
                Usage::Client,
            ),
            "got 0 URI and 2 DNS",
        ),
        (
            issue(&[uri("spiffe://demo.test/admin/anna")], Usage::Client),
            "certificate identity is not valid for this listener: URI SAN: expected spiffe://<trust domain>/bot/<name>, got",
        ),
        (
            issue(&[dns(MAKER)], Usage::Client),
            "certificate identity is not valid for this listener: DNS SAN: expected a DNS name, got",
        ),
        (
            issue(&[uri("maker.bots.demo.test")], Usage::Client),
            "certificate identity is not valid for this listener: URI SAN: expected spiffe://<trust domain>/bot/<name>, got",
        ),
        (
            issue(
                &[
                    uri("https://demo.test/bot/maker"),
                    dns("maker.bots.demo.test"),
                ],
                Usage::Client,
            ),
            "certificate identity is not valid for this listener",
        ),
        (
            issue(&[uri(MAKER)], Usage::None),
            "does not include clientAuth",
        ),
        (
            issue(&[uri(MAKER)], Usage::Server),
            "invalid peer certificate",
        ),
        (other_ca.bot("maker").unwrap(), "UnknownIssuer"),
        (
            chained(&non_signing_ca, ""),
            "UnknownIssuer; ignored an intermediate certificate whose keyUsage lacks keyCertSign",
        ),
    ];
    for (identity, reason) in &bad {
        let refusals = |lab: &Lab| -> Vec<String> {
            let log = lab.process.as_ref().unwrap().log();
            let lines = log.lines();
            let refusals = lines.filter(|line| line.contains("client certificate refused"));
            refusals.map(ToOwned::to_owned).collect()
        };
        let before = refusals(&lab).len();
        assert!(!is_call_accepted(&lab, identity).await, "{reason}");
        // The line of a second attempt with the certificate before can come late.
        let is_logged = |line: &String| line.contains(reason) && line.contains("CN=maker");
        until(&format!("{reason} is logged"), async || {
            refusals(&lab).iter().skip(before).any(is_logged)
        })
        .await;
    }
    let (_, metrics) = lab.get("/metrics").await;
    assert!(
        !metrics.contains("credbroker_certificates_refused_total 0"),
        "{metrics}"
    );
}

#[tokio::test]
async fn clients_without_a_certificate_or_without_tls_are_rejected() {
    let mut lab = Lab::start().await;
    let tls = tonic::transport::ClientTlsConfig::new()
        .ca_certificate(tonic::transport::Certificate::from_pem(
            lab.ca.certificate_pem(),
        ))
        .domain_name("localhost");
    let anonymous =
        tonic::transport::Endpoint::from_shared(format!("https://{}", lab.grpc)).unwrap();
    let anonymous = anonymous.tls_config(tls).unwrap();
    let plain = tonic::transport::Endpoint::from_shared(format!("http://{}", lab.grpc)).unwrap();
    for endpoint in [anonymous, plain] {
        let Ok(channel) = endpoint.connect().await else {
            continue;
        };
        let mut client = credbroker::proto::broker_client::BrokerClient::new(channel);
        assert!(client.sign_and_send(accounts()).await.is_err());
    }
    assert!(lab.kucoin.received().is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let mut lab = Lab::start().await;
    let address = lab.grpc.to_string();
    // Not on this thread: the broker is running on it.
    let openssl = tokio::task::spawn_blocking(move || {
        std::process::Command::new("openssl")
            .args(["s_client", "-tls1_2", "-connect", &address])
            .stdin(std::process::Stdio::null())
            .output()
    });
    let openssl = openssl.await.unwrap();
    match openssl {
        Ok(output) => {
            assert!(!output.status.success());
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(stderr.contains("alert protocol version"), "{stderr}");
        }
        Err(_) => not_run("TLS 1.2", "openssl", "no openssl on PATH"),
    }
    lab.stop().await;
}

#[tokio::test]
async fn bot_that_no_rule_names_can_connect_and_gets_caller_unknown() {
    let mut lab = Lab::start().await;
    let error = lab.bot("nobody").await.send(accounts()).await.unwrap_err();
    let (code, reason, outcome, _) = failure(&error);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (tonic::Code::Unauthenticated, "CALLER_UNKNOWN", "not_sent")
    );
    assert!(error.message().contains("spiffe://demo.test/bot/nobody"));
    lab.stop().await;
}

#[tokio::test]
async fn rules_and_blocks_match_dns_names_case_insensitively() {
    let grant = "[[grant]]\nbot = \"MAKER.bots.demo.test\"\naccount = \"main\"\nscope = \"spot-margin\"\nallow = [\"read\"]\n";
    let mut lab = Lab::with(Settings {
        rules: format!("{RULES}\n{grant}"),
        ..Settings::default()
    })
    .await;
    let names = [dns("Maker.Bots.Demo.TEST")];
    let identity = lab.ca.issue("maker", &names, Usage::Client).unwrap();
    let mut bot = lab.patient_bot_with(&identity).await;
    bot.send(accounts()).await.unwrap();
    let words = ["bots", "block", "maker.BOTS.demo.test"];
    let blocked = lab.admin_cli("anna", &words).await;
    assert_eq!(blocked.code, Some(0), "{blocked:?}");
    assert!(!blocked.stdout.contains("no such bot"), "{blocked:?}");
    let (_, reason, _) = refusal(bot.send(accounts()).await);
    assert_eq!(reason, "CALLER_BLOCKED");
    lab.stop().await;
}

/// The problems of the files of this configuration, one per line.
fn problems(config: &Config) -> String {
    let problems = load(config, Clock::system().wall_ms()).err();
    let problems = problems.unwrap_or_default();
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    problems.join("\n")
}

#[tokio::test]
async fn ca_file_with_a_non_ca_certificate_is_refused() {
    let admin_ca = |config: String| {
        config.replace(
            "client_ca = \"ca.pem\"",
            "client_ca = \"ca.pem\"\nadmin_ca = \"admins-ca.pem\"",
        )
    };
    let lab = Lab::install(Settings {
        edit: Box::new(admin_ca),
        ..Settings::default()
    })
    .await;
    let good = lab.ca.certificate_pem();
    let lines = good.lines().count();
    let pem = |kind| {
        let ca = Ca::of_kind("second CA", kind).unwrap();
        ca.certificate_pem().to_owned()
    };
    let leaf = lab.ca.bot("maker").unwrap().certificate_pem;
    let not_ca = "is not a CA: expected basicConstraints with CA:TRUE";
    let not_for_signing =
        "may not sign certificates: expected a keyUsage with keyCertSign, or no keyUsage";
    let cases = [
        (leaf.clone(), 1, "\"CN=maker\"", not_ca),
        (format!("{good}{leaf}"), lines + 1, "\"CN=maker\"", not_ca),
        (pem(CaKind::NotCa), 1, "\"CN=second CA\"", not_ca),
        (
            pem(CaKind::NotForSigning),
            1,
            "\"CN=second CA\"",
            not_for_signing,
        ),
    ];
    for (setting, file, other) in [
        ("tls.client_ca", "ca.pem", "admins-ca.pem"),
        ("tls.admin_ca", "admins-ca.pem", "ca.pem"),
    ] {
        lab.write(other, good).unwrap();
        for (text, line, subject, message) in &cases {
            lab.write(file, text).unwrap();
            let path = lab.path(file);
            let expected = format!("{setting}: {}:{line}: {subject} {message}", path.display());
            let found = problems(&lab.config());
            assert!(found.starts_with(&expected), "{expected} is not in {found}");
            let started = Server::start(lab.config()).await;
            assert!(matches!(started, Err(StartError::Config(_))), "{expected}");
            // One case is enough, since the commands read the files with the same code.
            let commands: &[_] = if *line > 1 {
                &["check-config", "doctor"]
            } else {
                &[]
            };
            for command in commands.iter().copied() {
                let (code, message) = run(&lab, command).await;
                assert_ne!(code, Some(0), "{command}: {message}");
                assert!(
                    message.contains(&without_quotes(subject)),
                    "{command}: {message}"
                );
            }
        }
        for kind in [CaKind::NoKeyUsage, CaKind::Usual, CaKind::BoundToDns] {
            lab.write(file, &(pem(kind) + good)).unwrap();
            let loaded = load(&lab.config(), Clock::system().wall_ms()).unwrap();
            assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
        }
    }
    // A server's own certificate is accepted as a root only if it is self-signed.
    lab.reconfigure("[vault]\n", "[vault]\nroots = \"root.pem\"\n");
    // The second one has the name of its CA as subject and issuer, but is not self-signed.
    let ca = Ca::new("localhost").unwrap();
    let same_name = ca
        .issue("localhost", &[dns("localhost")], Usage::Server)
        .unwrap();
    for not_ca in [&leaf, &same_name.certificate_pem] {
        lab.write("root.pem", not_ca).unwrap();
        let found = problems(&lab.config());
        assert!(found.starts_with("vault.roots: "), "{found}");
        assert!(found.contains("root.pem:1: "), "{found}");
        assert!(found.contains("is not a CA"), "{found}");
    }
    let own = Ca::self_signed_server(false).unwrap();
    lab.write("root.pem", &own.certificate_pem).unwrap();
    assert_eq!(problems(&lab.config()), "");
}

#[tokio::test]
async fn roots_file_may_contain_the_full_chain_of_a_server() {
    let mut lab = Lab::install(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    let intermediate = lab.ca.intermediate("between", CaKind::Usual).unwrap();
    let leaf = intermediate.server().unwrap().certificate_pem;
    let chain = [
        &leaf,
        intermediate.certificate_pem(),
        lab.ca.certificate_pem(),
    ]
    .concat();
    lab.reconfigure("[vault]\n", "[vault]\nroots = \"fullchain.pem\"\n");
    lab.write("fullchain.pem", &chain).unwrap();
    let loaded = load(&lab.config(), Clock::system().wall_ms()).unwrap();
    let file = lab.path("fullchain.pem");
    let warning = format!(
        "vault.roots: {}:1: ignored: \"CN=credbroker\" is not a CA: expected basicConstraints with CA:TRUE; remove it from the file",
        file.display()
    );
    let warnings: Vec<_> = loaded.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(warnings.join("\n"), warning);
    assert_eq!(loaded.vault_roots.len(), 2);

    lab.spawn_broker().await;
    let line = lab.process().log_line("file warning").await;
    assert_eq!(line["setting"], "vault.roots");
    assert!(warning.ends_with(line["problem"].as_str().unwrap()));
}

/// A text without quotes, to compare it with logs and JSON, which escape them.
fn without_quotes(text: &str) -> String {
    text.replace('"', "")
}

/// Runs the real program; returns its exit code and its output (stdout and stderr) without quotes.
async fn run(lab: &Lab, command: &str) -> (Option<i32>, String) {
    let result = lab.run(&[command]).await;
    let output = result.stdout + &result.stderr;
    (result.code, without_quotes(&output))
}

#[tokio::test]
async fn ca_with_unsupported_name_constraints_is_reported() {
    let bound = Ca::of_kind("bound CA", CaKind::BoundToDirectory).unwrap();
    let install = Settings {
        process: true,
        ..Settings::default()
    };
    let mut lab = Lab::install(install).await;
    let both = format!("{}{}", lab.ca.certificate_pem(), bound.certificate_pem());
    lab.write("ca.pem", &both).unwrap();
    let (code, output) = run(&lab, "check-config").await;
    assert_eq!(code, Some(0), "{output}");
    let warning = "CN=bound CA has name constraints that the TLS library cannot check: directory names (every certificate from this \
                   CA is refused)";
    assert!(
        output.starts_with("warning: tls.client_ca: ") && output.contains(warning),
        "{output}"
    );

    lab.spawn_broker().await;
    lab.until_ready().await;
    let line = lab.process().log_line("file warning").await;
    assert_eq!(line["level"], "WARN");
    assert_eq!(line["setting"], "tls.client_ca");
    assert!(without_quotes(line["problem"].as_str().unwrap()).contains(warning));
    assert_eq!(lab.metric("credbroker_file_warnings").await, Some(1.0));
    let (_, verbose) = lab.get("/readyz?verbose").await;
    assert!(verbose.contains("warning: tls.client_ca: "), "{verbose}");
    assert!(!is_call_accepted(&lab, &bound.bot("maker").unwrap()).await);
    let refused = lab.process().log_line("client certificate refused").await;
    let reason = "a name constraint of the certificate's CA forbids the certificate's names, or is of a type that the TLS \
                  library cannot check (URI, directory name)";
    assert_eq!(refused["reason"], reason);

    lab.write("ca.pem", lab.ca.certificate_pem()).unwrap();
    until("the warning disappears", async || {
        lab.metric("credbroker_file_warnings").await == Some(0.0)
    })
    .await;
}

#[tokio::test]
async fn openssl_files_that_are_damaged_encrypted_or_not_a_ca_are_rejected() {
    let lab = Lab::install(Settings::default()).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/field-cases/pki/make.sh");
    let made = Command::new("sh").arg(script).arg(lab.path("pki")).output();
    if !made.is_ok_and(|made| made.status.success()) {
        not_run("field cases of openssl", "openssl", "no openssl 3 on PATH");
        return;
    }
    let at = |name: &str| lab.path("pki").join(name);
    let config = |change: &dyn Fn(&mut Config)| {
        let mut config = lab.config();
        change(&mut config);
        problems(&config)
    };
    let cas = |name: &str| config(&|config| config.tls.client_ca = at(name));
    assert_eq!(cas("bots-ca.pem"), "");
    assert_eq!(cas("bound-ca.pem"), "");
    for (name, expected) in [
        ("leaf-alone.pem", "leaf-alone.pem:1: \"CN=x\" is not a CA"),
        ("ca-and-a-leaf.pem", "\"CN=x\" is not a CA"),
        (
            "bundle-trusted-label.pem",
            "unexpected section \"TRUSTED CERTIFICATE\" on line 1, expected CERTIFICATE",
        ),
        (
            "bundle-first-line-damaged.pem",
            "line 1 is damaged: expected only a marker such as -----BEGIN CERTIFICATE-----",
        ),
        ("bundle-first-indented.pem", "line 1 is damaged"),
    ] {
        let found = cas(name);
        assert!(found.contains(expected), "{name}: {found}");
    }
    let mut bound = lab.config();
    bound.tls.client_ca = at("bound-ca.pem");
    let bound = load(&bound, Clock::system().wall_ms()).unwrap();
    assert_eq!(bound.warnings.len(), 1);
    assert!(bound.warnings[0].problem.contains("URI names"));

    let key = |name: &str| config(&|config| config.tls.key = at(name));
    for (name, expected) in [
        (
            "key-encrypted-pkcs8.pem",
            "the private key on line 1 is encrypted, expected one without a passphrase; decrypt it: openssl pkey -in OLD -out NEW",
        ),
        (
            "key-encrypted-sec1.pem",
            "the private key on line 1 is encrypted",
        ),
        (
            "key.der",
            "the file is DER, expected PEM; convert it: openssl pkey -inform DER -in OLD -out NEW",
        ),
        // Read despite the byte order mark, and recognized as the key of another certificate.
        (
            "key-utf8-bom.pem",
            "key-utf8-bom.pem is not the key of tls.certificate",
        ),
    ] {
        let found = key(name);
        assert!(found.contains(expected), "{name}: {found}");
    }
    let own = config(&|config| {
        config.tls.certificate = at("certificate-utf8-bom.pem");
        config.tls.key = at("self.key");
    });
    assert_eq!(own, "");
}
