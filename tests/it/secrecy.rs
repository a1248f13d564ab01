//! No secret leaks: marked secrets are used everywhere, the log level is TRACE, and all outputs are searched.

use std::fmt::Write as _;

use credbroker::proto::{Candidate, Method, QueryParameter, Scope, TestKeyRequest};
use credbroker_sim::installation::{MAIN_UID, RULES, Settings, kv_path, secret};
use credbroker_sim::kucoin::{Fault, FaultAction, Partner, SimKey, When};
use credbroker_sim::vault;
use serde_json::{Value, json};

use crate::harness::{Lab, accounts, futures_order, request, spot_order, until};

/// The mark of every planted secret.
const MARK: &str = "canary0secret";

/// Put where the search must find it, to prove that the search works.
const PLANTED: &str = "canary0planted";

/// The messages of one successful call, in order.
const STAGES: [&str; 7] = [
    "call authorized",
    "pre-send checks passed",
    "intent audited",
    "connection ready",
    "request signed",
    "answer received",
    "call ended",
];

struct Haystack(Vec<(&'static str, String)>);

impl Haystack {
    fn places_of(&self, needle: &str) -> Vec<&'static str> {
        self.0
            .iter()
            .filter(|(_, text)| text.contains(needle))
            .map(|(place, _)| *place)
            .collect()
    }
}

#[tokio::test]
async fn no_secret_reaches_a_log_an_error_a_metric_or_the_audit_log() {
    let rules = "[account.main]\nkey = { spot-margin = \"main\", futures = \"main\" }\n\
                 [account.main.partner.spot-margin]\nid = \"FakePartner\"\n";
    let rules = crate::harness::rules_for(
        rules,
        &[
            ("spot-margin", "\"read\", \"trade\", \"public\""),
            ("futures", "\"read\", \"trade\""),
        ],
    );
    let auth = "method = \"approle\"\nrole_id = \"fake-role-id\"\nsecret_id_file = \"secret-id\"";
    let settings = Settings {
        rules,
        auth: auth.to_owned(),
        config: "[log]\nfilter = \"trace,rustify::client=trace,vaultrs::api=trace,reqwest=trace\""
            .to_owned(),
        files: vec![("secret-id", format!("{MARK}-secret-id\n"))],
        keys: Vec::new(),
        wait_ready: false,
        process: true,
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;

    // Errors about secrets: a rejected login, a malformed secret, an invalid response.
    until("readyz shows the rejected login", async || {
        lab.get("/readyz").await.1.contains("login")
    })
    .await;
    let role = lab
        .vault
        .enable_approle("credbroker", vault::RoleSettings::default());
    let auth = format!("role_id = \"{}\"", role.0);
    let config = std::fs::read_to_string(lab.path("config.toml")).unwrap();
    std::fs::write(
        lab.path("config.toml"),
        config.replace("role_id = \"fake-role-id\"", &auth),
    )
    .unwrap();
    std::fs::write(lab.path("secret-id"), format!("{}\n", role.1)).unwrap();
    let first_log = lab.process().log();
    lab.process = None;
    let key = SimKey {
        api_key: format!("{MARK}-id"),
        api_secret: format!("{MARK}-key"),
        passphrase: format!("{MARK}-passphrase"),
        partners: vec![Partner {
            id: "FakePartner".to_owned(),
            key: format!("{MARK}-partner"),
        }],
        ..SimKey::fake(MAIN_UID)
    };
    let mut broken = secret(&key);
    broken["passphrase"] = serde_json::json!([format!("{MARK}-passphrase")]);
    lab.vault.put_secret("kv", &kv_path("main", "main"), broken);
    let wrong_json = vault::FaultRule::new("kv/data", vault::Fault::WrongJson).times(2);
    lab.vault.fault(wrong_json);
    lab.spawn_broker().await;
    until("readyz shows the malformed key", async || {
        lab.get("/readyz")
            .await
            .1
            .contains("`passphrase` is not a string")
    })
    .await;
    let (_, not_ready) = lab.get("/readyz").await;
    lab.add_key("main", "main", &key);
    lab.until_ready().await;

    let mut bot = lab.bot("maker").await;
    let mut errors = String::new();
    let mut order = spot_order(&format!("{PLANTED}-oid"));
    order.request_id = PLANTED.to_owned();
    let masked = QueryParameter {
        name: "passphrase".to_owned(),
        value: format!("{MARK}-in-query"),
    };
    let mut delete_key = request(Scope::SpotMargin, Method::Delete, "/api/v1/sub/api-key", "");
    delete_key.query.push(masked.clone());
    let mut read = accounts();
    read.query.push(masked);
    let body = format!(r#"{{"clientTimestamp":1,"remark":"{MARK}-in-body"}}"#);
    let malformed = request(Scope::SpotMargin, Method::Post, "/api/v1/hf/orders", &body);
    let body = format!(r#"{{"remark":"{MARK}-in-body"}}"#);
    let unknown = request(
        Scope::SpotMargin,
        Method::Post,
        "/api/v1/hf/orders/test",
        &body,
    );
    for call in [
        order,
        futures_order("f"),
        accounts(),
        read,
        delete_key,
        malformed,
        unknown,
    ] {
        if let Err(status) = bot.send(call).await {
            let _ = writeln!(errors, "{status:?}");
        }
    }
    for action in [
        FaultAction::Close {
            when: When::AfterProcessing,
        },
        FaultAction::CutShort { bytes: 3 },
        FaultAction::Html {
            status: 502,
            when: When::AfterProcessing,
        },
    ] {
        lab.kucoin.fault(Fault::once("/api/v1/hf/orders", action));
        if let Err(status) = bot.send(spot_order("faulty")).await {
            let _ = writeln!(errors, "{status:?}");
        }
    }
    let mut admin = lab.admin_client("anna").await;
    for account in ["main", "No Such"] {
        let candidate = Candidate {
            api_key: format!("{MARK}-candidate-id"),
            api_secret: format!("{MARK}-candidate-key"),
            passphrase: format!("{MARK}-candidate-passphrase"),
            key_version: 3,
            partner_key: format!("{MARK}-candidate-partner"),
        };
        let test = TestKeyRequest {
            account: account.to_owned(),
            candidate: Some(candidate),
            ..TestKeyRequest::default()
        };
        let _ = writeln!(errors, "{:?}", admin.test_key(test).await);
    }
    lab.kucoin.remove_key(&key.api_key);
    lab.vault
        .put_secret("kv", &kv_path("main", "main"), serde_json::Value::Null);
    lab.vault.seal();
    let log = || lab.process.as_ref().unwrap().log();
    until("the sealed Vault is noticed", async || {
        log().contains("sealed")
    })
    .await;
    let _ = bot.send(accounts()).await;

    let (_, metrics) = lab.get("/metrics").await;
    let (_, readiness) = lab.get("/readyz").await;
    lab.process().terminate();
    assert!(lab.process().exit_code().await.is_some());
    let haystack = Haystack(vec![
        ("log", first_log + &lab.process().log()),
        ("errors", errors),
        ("metrics", metrics),
        ("readiness", not_ready + &readiness),
        (
            "audit",
            std::fs::read_to_string(lab.path("state/audit.jsonl")).unwrap(),
        ),
    ]);
    assert!(haystack.0.iter().all(|(_, text)| !text.is_empty()));
    assert!(
        haystack.0[0].1.contains("\"level\":\"DEBUG\""),
        "expected DEBUG lines in the log"
    );
    // Each stage of a call logs at DEBUG; the search below covers these lines.
    for stage in STAGES {
        let message = format!("\"message\":\"{stage}\"");
        assert_eq!(haystack.places_of(&message), ["log"], "{stage}");
    }
    for silenced in [
        "\"target\":\"rustify",
        "\"target\":\"vaultrs",
        "\"target\":\"reqwest",
    ] {
        assert_eq!(
            haystack.places_of(silenced),
            [""; 0],
            "{silenced} must log nothing, whatever the filter is"
        );
    }
    assert_eq!(
        haystack.places_of(PLANTED),
        ["log", "audit"],
        "the search must find this"
    );

    let received = lab.kucoin.received();
    assert!(received.len() > 5);
    let mut secrets = vec![
        MARK.to_owned(),
        role.1,
        credbroker_sim::installation::ROOT_TOKEN.to_owned(),
    ];
    for request in &received {
        for name in ["kc-api-sign", "kc-api-passphrase", "kc-api-partner-sign"] {
            secrets.extend(request.header(name).map(ToOwned::to_owned));
        }
    }
    secrets.extend(lab.vault.tokens());
    assert!(secrets.len() > 10);
    for secret in secrets {
        assert_eq!(haystack.places_of(&secret), [""; 0], "{secret}");
        let encoded: String = url::form_urlencoded::byte_serialize(secret.as_bytes()).collect();
        assert_eq!(
            haystack.places_of(&encoded),
            [""; 0],
            "{secret} percent-encoded"
        );
    }
}

/// The log lines of calls of `bot`: message and whole line.
fn lines_of_calls(log: &str, bot: &str) -> Vec<(String, Value)> {
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines
        .filter(|line| line["span"]["bot.id"] == bot)
        .map(|line| (line["message"].as_str().unwrap().to_owned(), line))
        .collect()
}

#[tokio::test]
async fn call_stages_are_logged_at_debug_only() {
    let maker = "spiffe://demo.test/bot/maker";
    for filter in ["debug", "info"] {
        let mut lab = Lab::with(Settings {
            config: format!("[log]\nfilter = \"{filter}\""),
            process: true,
            ..Settings::default()
        })
        .await;
        let mut bot = lab.bot("maker").await;
        let mut order = spot_order("staged");
        order.request_id = "order-1".to_owned();
        bot.send(order).await.unwrap();
        lab.kucoin.fault(Fault::once(
            "/api/v1/accounts",
            FaultAction::Close {
                when: When::AfterProcessing,
            },
        ));
        let mut read = accounts();
        read.request_id = "read-1".to_owned();
        bot.send(read).await.unwrap();
        lab.process().terminate();
        assert!(lab.process().exit_code().await.is_some());
        let log = lab.process().log();
        let lines = lines_of_calls(&log, maker);
        let of = |id: &str| -> Vec<_> {
            let of_call = lines
                .iter()
                .filter(|(_, line)| line["span"]["request.id"] == id);
            of_call.map(|(message, _)| message.as_str()).collect()
        };
        if filter == "info" {
            for (_, line) in &lines {
                assert_ne!(line["level"], "DEBUG", "{line}");
            }
            continue;
        }
        assert_eq!(of("order-1"), STAGES);
        // A read whose answer is lost is retried, starting with the connection.
        let (first_try, second_try) = (&STAGES[..5], &STAGES[3..]);
        let expected = [first_try, &["send failed", "sending again"], second_try].concat();
        assert_eq!(of("read-1"), expected);

        let line = |id: &str, message: &str| {
            let found = lines
                .iter()
                .find(|(text, line)| text == message && line["span"]["request.id"] == id);
            found
                .unwrap_or_else(|| panic!("{message} of {id}"))
                .1
                .clone()
        };
        let authorized = line("order-1", "call authorized");
        assert_eq!(authorized["endpoint"], "spot.post.v1-hf-orders");
        assert_eq!(authorized["account.id"], "main");
        let line_number = RULES
            .lines()
            .position(|line| line.contains("\"trade\""))
            .unwrap()
            + 1;
        assert_eq!(
            authorized["rules"],
            format!("line {line_number}: grant[0].allow[2] = \"trade\"")
        );
        assert_eq!(
            line("order-1", "pre-send checks passed")["risk_increasing"],
            true
        );
        assert_eq!(
            line("read-1", "pre-send checks passed")["risk_increasing"],
            false
        );
        let connection = line("order-1", "connection ready");
        let spot = lab.kucoin.spot_url();
        let peer = (
            &connection["network.peer.address"],
            &connection["network.peer.port"],
        );
        let (address, port) = spot.trim_start_matches("http://").split_once(':').unwrap();
        assert_eq!(
            peer,
            (&json!(address), &json!(port.parse::<u16>().unwrap()))
        );
        assert!(connection["reused"].is_boolean(), "{connection}");
        let signed = line("order-1", "request signed");
        assert!(signed["timestamp_ms"].as_i64().unwrap() > 1_700_000_000_000);
        assert_eq!(
            (&signed["key.name"], &signed["key.vault_version"]),
            (&json!("main"), &json!(1))
        );
        let answer = line("order-1", "answer received");
        assert_eq!(
            (
                &answer["http.response.status_code"],
                &answer["exchange.code"],
                &answer["outcome"]
            ),
            (&json!(200), &json!("200000"), &json!("accepted"))
        );
        let failed = line("read-1", "send failed");
        assert!(
            failed["exception.message"]
                .as_str()
                .unwrap()
                .contains("no complete answer came back"),
            "{failed}"
        );
        assert_eq!(
            line("read-1", "sending again")["cause"],
            "answer lost; the request is idempotent"
        );
    }
}
