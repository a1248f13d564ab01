//! Who may connect: TLS 1.3 with a bot's certificate, and nobody else.

use credbroker_sim::pki::{Ca, Identity, SanType, Usage};

use crate::harness::{Lab, RULES, Settings, accounts, failure, refusal, say, until};

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

const MAKER: &str = "spiffe://demo.test/bot/maker";

/// Whether a call with this certificate gets as far as our handler.
pub(crate) async fn gets_in(lab: &Lab, identity: &Identity) -> bool {
    let Ok(channel) = lab.endpoint(identity).connect().await else {
        return false;
    };
    let mut client = credbroker::api::proto::broker_client::BrokerClient::new(channel);
    client.sign_and_send(accounts()).await.is_ok()
}

#[tokio::test]
async fn a_bot_is_its_one_uri_san_or_its_one_dns_san() {
    let grant = "[[grant]]\nbot = \"maker.bots.demo.test\"\naccount = \"main\"\nscope = \"spot-margin\"\nallow = [\"read\"]\n";
    let rules = format!("{RULES}\n{grant}");
    let mut lab = Lab::with(Settings {
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
    for (index, identity) in good.iter().enumerate() {
        assert!(gets_in(&lab, identity).await, "good certificate {index}");
    }
    let stranger = Ca::new("somebody else's CA").unwrap();
    let bad = [
        (issue(&[], Usage::Client), "it has 0 URI and 0 DNS"),
        (
            issue(
                &[uri(MAKER), uri("spiffe://demo.test/bot/other")],
                Usage::Client,
            ),
            "it has 2 URI and 0 DNS",
        ),
        (
            issue(
                &[dns("maker.bots.demo.test"), dns("b.demo.test")],
                Usage::Client,
            ),
            "it has 0 URI and 2 DNS",
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
            "does not name clientAuth",
        ),
        (
            issue(&[uri(MAKER)], Usage::Server),
            "invalid peer certificate",
        ),
        (stranger.bot("maker").unwrap(), "UnknownIssuer"),
    ];
    for (identity, reason) in &bad {
        let before = lab
            .process()
            .log()
            .matches("client certificate refused")
            .count();
        assert!(!gets_in(&lab, identity).await, "{reason}");
        let log = || lab.process.as_ref().unwrap().log();
        until("the refusal is logged", async || {
            log().matches("client certificate refused").count() > before
        })
        .await;
        let log = log();
        let line = log
            .lines()
            .rfind(|line| line.contains("client certificate refused"))
            .unwrap();
        assert!(line.contains(reason), "{reason} is not in {line}");
        assert!(line.contains("CN=maker"), "{line}");
    }
    let (_, metrics) = lab.get("/metrics").await;
    assert!(
        !metrics.contains("credbroker_certificates_refused_total 0"),
        "{metrics}"
    );
}

#[tokio::test]
async fn nobody_gets_in_without_a_certificate_or_in_plain_text() {
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
        let mut client = credbroker::api::proto::broker_client::BrokerClient::new(channel);
        assert!(client.sign_and_send(accounts()).await.is_err());
    }
    assert!(lab.kucoin.received().is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let mut lab = Lab::start().await;
    let address = lab.grpc.to_string();
    // Not on this thread: the broker runs on it.
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
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains("alert protocol version"), "{said}");
        }
        Err(_) => say("TLS 1.2: not run (no openssl on PATH)"),
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_certificate_that_no_rule_names_may_call_and_is_told_so() {
    let mut lab = Lab::start().await;
    let ended = lab.bot("nobody").await.send(accounts()).await.unwrap_err();
    let (code, reason, outcome, _) = failure(&ended);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (tonic::Code::Unauthenticated, "CALLER_UNKNOWN", "not_sent")
    );
    assert!(ended.message().contains("spiffe://demo.test/bot/nobody"));
    lab.stop().await;
}

#[tokio::test]
async fn a_dns_name_is_the_same_bot_in_any_case_for_rules_and_blocks() {
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
