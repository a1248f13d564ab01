//! The simulated Vault against the recorded requests and answers of a real server, and what only the simulator does:
//! faults, a clock to move, a standby, stop and restart.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests may fail as loudly as tests"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use credbroker_sim::pki::Ca;
use credbroker_sim::vault::{
    Fault, FaultRule, InitialState, RoleSettings, Standby, VaultArgs, VaultSettings, VaultSim,
    serve,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const TRANSCRIPTS: &str = include_str!("../../vectors/vault-transcripts.json");
const ROOT: &str = "sim-root";
const SECRET: &str = "/v1/kv/data/kucoin/prod/main";

/// Steps that are not replayed, and why.
const SKIPPED: &[(&str, &[&str])] = &[
    (
        "certificate logins come with a later issue",
        &["f20", "f21", "f22", "f23", "f24", "f25"],
    ),
    (
        "HTTP clients refuse to send such a token, and hyper would judge it before the simulator",
        &["d60", "d61"],
    ),
    (
        "transit and BYOK import are not simulated: the broker does not use them",
        &["d73", "d74", "d75", "d76"],
    ),
    (
        "Kubernetes logins come with a later issue",
        &["d77", "d78", "d79", "d80", "d81", "d82", "d83"],
    ),
    (
        "quotas are not simulated: a fault answers 429",
        &["d91", "d92", "d93", "d94", "d95"],
    ),
];

// --- the recording ---------------------------------------------------------------------------------------------------

type Captured = BTreeMap<String, String>;

#[tokio::test]
async fn it_answers_as_the_recorded_server_did() {
    let file: Value = serde_json::from_str(TRANSCRIPTS).unwrap();
    let interesting = texts(&file["headers_of_interest"]);
    let steps = file["steps"].as_array().unwrap();
    let mut skipped: Vec<&str> = SKIPPED.iter().flat_map(|(_, ids)| *ids).copied().collect();
    let (mut replayed, mut problems) = (0, Vec::new());
    for state in ["file", "dev"] {
        let sim = VaultSim::start(VaultSettings {
            state: match state {
                "file" => InitialState::File,
                _ => InitialState::Dev {
                    root_token: ROOT.to_owned(),
                },
            },
            ..VaultSettings::default()
        })
        .await
        .unwrap();
        sim.stop_clock();
        let mut captured = Captured::from([("root".to_owned(), ROOT.to_owned())]);
        let in_state = |step: &&Value| step["state"].as_str().unwrap().starts_with(state);
        for step in steps.iter().filter(in_state) {
            let id = step["id"].as_str().unwrap();
            if let Some(at) = skipped.iter().position(|skipped| *skipped == id) {
                skipped.remove(at);
                continue;
            }
            let came = replay(&sim, step, &captured).await;
            for problem in differences(&step["response"], &came, &interesting, &captured) {
                problems.push(format!("{id} ({}): {problem}", step["about"]));
            }
            for (name, path) in step["capture"].as_object().into_iter().flatten() {
                let value = came.body.pointer(&pointer(path.as_str().unwrap()));
                match value.and_then(Value::as_str) {
                    Some(value) => captured.extend([(name.clone(), value.to_owned())]),
                    None => problems.push(format!("{id}: nothing at {path} to capture")),
                }
            }
            replayed += 1;
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(skipped.is_empty(), "not in the file: {skipped:?}");
    assert_eq!((replayed, steps.len()), (96, 120));
}

#[tokio::test]
async fn the_comparison_notices_every_kind_of_difference() {
    type Alter = fn(&mut Answer);
    let file: Value = serde_json::from_str(TRANSCRIPTS).unwrap();
    let interesting = texts(&file["headers_of_interest"]);
    let steps = file["steps"].as_array().unwrap();
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    sim.mount_kv("kv");
    sim.put_secret("kv", "kucoin/prod/main", json!({ "api_key": "fake-key" }));
    let captured = Captured::from([("root".to_owned(), ROOT.to_owned())]);
    let step = steps.iter().find(|step| step["id"] == "f19").unwrap();
    let came = replay(&sim, step, &captured).await;
    let differ =
        |came: &Answer| differences(&step["response"], came, &interesting, &captured).len();
    assert_eq!(differ(&came), 0);

    let altered: [(&str, Alter); 11] = [
        ("status", |came| came.status = 201),
        ("header changed", |came| {
            came.set_header("cache-control", "no-cache");
        }),
        ("header added", |came| came.set_header("location", "/v1/")),
        ("header lost", |came| came.headers.clear()),
        ("value", |came| {
            came.body["data"]["data"]["api_key"] = json!("other");
        }),
        ("type", |came| {
            came.body["data"]["metadata"]["version"] = json!("1");
        }),
        ("key added", |came| {
            came.body["data"]["data"]["more"] = json!(1);
        }),
        ("key lost", |came| {
            came.body["data"]
                .as_object_mut()
                .unwrap()
                .remove("metadata");
        }),
        ("not a UUID", |came| came.body["request_id"] = json!("F0F0")),
        ("not a time", |came| {
            came.body["data"]["metadata"]["created_time"] = json!("2026-11-21 03:00:00Z");
        }),
        ("body lost", |came| came.body = Value::Null),
    ];
    for (what, alter) in altered {
        let mut came = came.clone();
        alter(&mut came);
        assert!(differ(&came) > 0, "unnoticed: {what}");
    }
    let list = |came: Value| {
        let mut problems = Vec::new();
        compare(&json!(["a", "<int>"]), &came, &captured, "", &mut problems);
        problems.len()
    };
    assert_eq!(list(json!(["a", 1])), 0);
    for other in [
        json!([1, "a"]),
        json!(["a"]),
        json!(["a", 1, 1]),
        json!(["a", 1.5]),
    ] {
        assert!(list(other.clone()) > 0, "unnoticed: {other}");
    }
}

async fn replay(sim: &VaultSim, step: &Value, captured: &Captured) -> Answer {
    if let Some(wait_s) = step["wait_s"].as_f64() {
        sim.advance_clock(Duration::from_secs_f64(wait_s));
    }
    if step["restart"] == true {
        sim.restart().await.unwrap();
    }
    let request = &step["request"];
    let (method, path) = (
        request["method"].as_str().unwrap(),
        request["path"].as_str().unwrap(),
    );
    let mut call = call(method, path);
    for (name, value) in request["headers"].as_object().unwrap() {
        let value = value.as_str().unwrap();
        let name_of_token = value
            .strip_prefix('<')
            .and_then(|value| value.strip_suffix('>'));
        call = match name_of_token {
            Some("none") => call,
            Some(token) => call.header(name, &captured[token]),
            None => call.header(name, value),
        };
    }
    if let Some(raw) = request["raw_body"].as_str() {
        call = call.raw_body(raw);
    } else if !request["body"].is_null() {
        call = call.raw_body(&filled(&request["body"].to_string(), captured));
    }
    let denied = step["tags"]
        .as_array()
        .is_some_and(|tags| tags.contains(&json!("acl")));
    let token = call.token().map(str::to_owned);
    if denied {
        sim.deny(token.as_deref(), Some(method), path);
    }
    let came = call.send(&sim.address()).await;
    if denied {
        sim.allow_again(token.as_deref(), Some(method), path);
    }
    came
}

/// What is wrong with an answer, by the rules in the head of the file.
fn differences(
    expected: &Value,
    came: &Answer,
    interesting: &[String],
    captured: &Captured,
) -> Vec<String> {
    let mut problems = Vec::new();
    if expected["status"] != came.status {
        problems.push(format!(
            "status: expected {}, came {}",
            expected["status"], came.status
        ));
    }
    for name in interesting {
        let expected = expected["headers"]
            .get(name)
            .map(|value| value.as_str().unwrap());
        let came = came.header(name);
        let same = match (expected, came) {
            (None, None) => true,
            (Some("<int>"), Some(came)) => came.parse::<u64>().is_ok(),
            (Some(expected), Some(came)) => fits(expected, came),
            _ => false,
        };
        if !same {
            problems.push(format!("{name}: expected {expected:?}, came {came:?}"));
        }
    }
    compare(
        &expected["body"],
        &came.body,
        captured,
        "body",
        &mut problems,
    );
    problems
}

fn compare(
    expected: &Value,
    came: &Value,
    captured: &Captured,
    at: &str,
    problems: &mut Vec<String>,
) {
    let same = match (expected, came) {
        (Value::Object(expected), Value::Object(came)) => {
            for (key, expected) in expected {
                match came.get(key) {
                    Some(came) => {
                        compare(expected, came, captured, &format!("{at}.{key}"), problems);
                    }
                    None => problems.push(format!("{at}.{key}: expected {expected}, came nothing")),
                }
            }
            for (key, came) in came.iter().filter(|(key, _)| !expected.contains_key(*key)) {
                problems.push(format!("{at}.{key}: expected nothing, came {came}"));
            }
            return;
        }
        (Value::Array(expected), Value::Array(came)) if expected.len() == came.len() => {
            for (index, (expected, came)) in expected.iter().zip(came).enumerate() {
                compare(expected, came, captured, &format!("{at}.{index}"), problems);
            }
            return;
        }
        (Value::String(expected), came) if expected == "<int>" => came.is_i64() || came.is_u64(),
        (Value::String(expected), Value::String(came)) => fits(&filled(expected, captured), came),
        _ => expected == came,
    };
    if !same {
        problems.push(format!("{at}: expected {expected}, came {came}"));
    }
}

/// Whether `text` is `pattern`, in which placeholders may stand.
fn fits(pattern: &str, text: &str) -> bool {
    type Allows = fn(&str) -> bool;
    let kinds: [(&str, Allows); 3] = [
        ("<rfc3339>", is_rfc3339),
        ("<string>", |text| !text.is_empty()),
        ("<uuid>", is_uuid),
    ];
    let placed = kinds
        .iter()
        .filter_map(|(name, allows)| Some((pattern.find(name)?, name, allows)))
        .min_by_key(|(at, ..)| *at);
    let Some((at, name, allows)) = placed else {
        return pattern == text;
    };
    let Some(text) = text.strip_prefix(&pattern[..at]) else {
        return false;
    };
    let rest = &pattern[at + name.len()..];
    let ends = text.char_indices().map(|(at, _)| at).chain([text.len()]);
    ends.into_iter()
        .any(|end| allows(&text[..end]) && fits(rest, &text[end..]))
}

fn is_uuid(text: &str) -> bool {
    let shape = text.chars().map(|c| match c {
        '0'..='9' | 'a'..='f' => 'x',
        other => other,
    });
    shape.eq("xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx".chars())
}

fn is_rfc3339(text: &str) -> bool {
    let shape: String = text
        .chars()
        .map(|c| if c.is_ascii_digit() { '0' } else { c })
        .collect();
    let Some(fraction) = shape
        .strip_prefix("0000-00-00T00:00:00")
        .and_then(|rest| rest.strip_suffix('Z'))
    else {
        return false;
    };
    let decimals = fraction.strip_prefix('.').unwrap_or(fraction);
    decimals.len() <= 9 && decimals.chars().all(|c| c == '0') && fraction != "."
}

fn filled(text: &str, captured: &Captured) -> String {
    captured
        .iter()
        .fold(text.to_owned(), |text, (name, value)| {
            text.replace(&format!("{{{{{name}}}}}"), value)
        })
}

fn pointer(dotted: &str) -> String {
    format!("/{}", dotted.replace('.', "/"))
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|text| text.as_str().unwrap().to_owned())
        .collect()
}

// --- faults ----------------------------------------------------------------------------------------------------------

/// A dev server with one secret, and a token to read it.
async fn with_secret() -> (VaultSim, String) {
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    sim.put_secret("kv", "kucoin/prod/main", json!({ "api_key": "fake-key" }));
    let token = sim.create_token(Duration::from_secs(3600));
    (sim, token)
}

async fn read(sim: &VaultSim, token: &str) -> Answer {
    call("GET", SECRET)
        .header("X-Vault-Token", token)
        .send(&sim.address())
        .await
}

#[tokio::test]
async fn status_faults_answer_with_the_status_and_an_errors_body() {
    let (sim, token) = with_secret().await;
    for code in [400, 403, 404, 412, 429, 472, 473, 500, 501, 502, 503, 504] {
        let retry_after_s = (code == 429).then_some(7);
        let fault = Fault::Status {
            code,
            retry_after_s,
        };
        sim.fault(FaultRule::new("kv/", fault).times(1));
        let came = read(&sim, &token).await;
        assert_eq!(came.status, code);
        assert!(came.body["errors"].is_array());
        assert_eq!(came.header("retry-after"), retry_after_s.map(|_| "7"));
    }
    assert_eq!(read(&sim, &token).await.status, 200);
}

#[tokio::test]
async fn a_fault_hits_only_its_path_method_and_number_of_requests() {
    let (sim, token) = with_secret().await;
    let fault = Fault::Status {
        code: 500,
        retry_after_s: None,
    };
    sim.fault(FaultRule::new("/v1/kv/metadata/", fault.clone()));
    sim.fault(FaultRule::new("kv/data/", fault.clone()).method("POST"));
    assert_eq!(read(&sim, &token).await.status, 200);
    sim.fault(FaultRule::new("", fault).times(2));
    for status in [500, 500, 200] {
        assert_eq!(read(&sim, &token).await.status, status);
    }
    let metadata = call("GET", "/v1/kv/metadata/kucoin/prod/main").header("X-Vault-Token", &token);
    assert_eq!(metadata.clone().send(&sim.address()).await.status, 500);
    sim.clear_faults();
    assert_eq!(metadata.send(&sim.address()).await.status, 200);
}

#[tokio::test]
async fn a_delayed_answer_is_late_and_right() {
    let (sim, token) = with_secret().await;
    sim.fault(FaultRule::new("kv/", Fault::Delay { ms: 40 }));
    let asked = Instant::now();
    assert_eq!(read(&sim, &token).await.status, 200);
    assert!(asked.elapsed() >= Duration::from_millis(40));
}

#[tokio::test]
async fn a_hanging_request_gets_no_answer_and_a_closed_one_neither() {
    let (sim, token) = with_secret().await;
    sim.fault(FaultRule::new("kv/", Fault::Hang).times(1));
    let mut hanging = Box::pin(read(&sim, &token));
    let patience = Duration::from_millis(40);
    while sim.requests().is_empty() {
        assert!(tokio::time::timeout(patience, &mut hanging).await.is_err());
    }
    assert!(tokio::time::timeout(patience, hanging).await.is_err());
    sim.fault(FaultRule::new("kv/", Fault::Close).times(1));
    let call = call("GET", SECRET).header("X-Vault-Token", &token);
    assert_eq!(call.bytes(&sim.address()).await, b"");
    let statuses: Vec<_> = sim.requests().iter().map(|seen| seen.status).collect();
    assert_eq!(statuses, [None, None]);
}

#[tokio::test]
async fn half_a_body_breaks_off_before_its_promised_length() {
    let (sim, token) = with_secret().await;
    let whole = read(&sim, &token).await;
    sim.fault(FaultRule::new("kv/", Fault::HalfBody));
    let call = call("GET", SECRET).header("X-Vault-Token", &token);
    let came = String::from_utf8(call.bytes(&sim.address()).await).unwrap();
    let (head, body) = came.split_once("\r\n\r\n").unwrap();
    let promised = whole.header("content-length").unwrap();
    assert!(head.contains(&format!("content-length: {promised}")));
    assert_eq!(body.len(), promised.parse::<usize>().unwrap() / 2);
}

#[tokio::test]
async fn wrong_answers_are_200_with_another_shape_or_no_json() {
    let (sim, token) = with_secret().await;
    sim.fault(FaultRule::new("kv/", Fault::WrongJson).times(1));
    let came = read(&sim, &token).await;
    assert_eq!(came.body["data"][0]["data"]["api_key"], "fake-key");
    sim.fault(FaultRule::new("kv/", Fault::NotJson).times(1));
    let came = read(&sim, &token).await;
    assert_eq!(
        (came.status, came.header("content-type")),
        (200, Some("text/html; charset=utf-8"))
    );
}

#[tokio::test]
async fn a_redirect_keeps_path_and_query() {
    let (sim, token) = with_secret().await;
    let to = "http://127.0.0.1:1/".to_owned();
    sim.fault(FaultRule::new("kv/", Fault::Redirect { to }));
    let path = format!("{SECRET}?version=1");
    let came = call("GET", &path)
        .header("X-Vault-Token", &token)
        .send(&sim.address())
        .await;
    assert_eq!(came.status, 307);
    assert_eq!(
        came.header("location"),
        Some(&*format!("http://127.0.0.1:1{path}"))
    );
}

#[tokio::test]
async fn an_expired_token_stays_expired() {
    let (sim, token) = with_secret().await;
    sim.fault(FaultRule::new("kv/", Fault::ExpireToken).times(1));
    for _ in 0..2 {
        let came = read(&sim, &token).await;
        assert_eq!(
            (came.status, &came.body),
            (403, &json!({ "errors": ["permission denied"] }))
        );
    }
}

// --- clock, tokens, keys ---------------------------------------------------------------------------------------------

#[tokio::test]
async fn tokens_expire_by_the_simulators_clock_and_renewals_count_from_it() {
    let (sim, token) = with_secret().await;
    sim.stop_clock();
    let renew = call("POST", "/v1/auth/token/renew-self").header("X-Vault-Token", &token);
    sim.advance_clock(Duration::from_secs(3599));
    assert_eq!(
        renew.send(&sim.address()).await.body["auth"]["lease_duration"],
        3600
    );
    sim.advance_clock(Duration::from_secs(3599));
    assert_eq!(read(&sim, &token).await.status, 200);
    sim.advance_clock(Duration::from_secs(1));
    assert_eq!(read(&sim, &token).await.status, 403);
}

#[tokio::test]
async fn wrapped_answers_expire_and_any_use_as_a_token_spends_them() {
    let (sim, token) = with_secret().await;
    sim.stop_clock();
    let wrap = call("GET", SECRET)
        .header("X-Vault-Token", &token)
        .header("X-Vault-Wrap-TTL", "30s");
    let unwrap = call("POST", "/v1/sys/wrapping/unwrap");
    let wrapped = |came: Answer| came.body["wrap_info"]["token"].as_str().unwrap().to_owned();

    let wrapping = wrapped(wrap.clone().send(&sim.address()).await);
    let opened = unwrap
        .clone()
        .header("X-Vault-Token", &wrapping)
        .send(&sim.address())
        .await;
    assert_eq!(opened.body["data"]["data"]["api_key"], "fake-key");

    let late = wrapped(wrap.clone().send(&sim.address()).await);
    sim.advance_clock(Duration::from_secs(30));
    assert_eq!(
        unwrap
            .clone()
            .header("X-Vault-Token", &late)
            .send(&sim.address())
            .await
            .status,
        400
    );

    let spent = wrapped(wrap.send(&sim.address()).await);
    assert_eq!(read(&sim, &spent).await.status, 403);
    assert_eq!(
        unwrap
            .header("X-Vault-Token", &spent)
            .send(&sim.address())
            .await
            .status,
        400
    );
}

#[tokio::test]
async fn a_secret_id_outlives_its_ttl_until_the_next_sweep() {
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    sim.stop_clock();
    let settings = RoleSettings {
        secret_id_ttl: Some(Duration::from_secs(3)),
        ..RoleSettings::default()
    };
    let (role_id, secret_id) = sim.enable_approle("credbroker", settings);
    let body = json!({ "role_id": role_id, "secret_id": secret_id });
    let login = call("POST", "/v1/auth/approle/login").raw_body(&body.to_string());
    sim.advance_clock(Duration::from_secs(40));
    assert_eq!(
        login.clone().send(&sim.address()).await.body["auth"]["lease_duration"],
        1200
    );
    sim.advance_clock(Duration::from_secs(30));
    assert_eq!(login.send(&sim.address()).await.status, 400);
}

#[tokio::test]
async fn a_token_bound_to_other_addresses_is_issued_and_then_refused() {
    let (sim, _) = with_secret().await;
    let settings = RoleSettings {
        token_bound_cidrs: vec!["10.0.0.0/8".to_owned()],
        ..RoleSettings::default()
    };
    let (role_id, secret_id) = sim.enable_approle("credbroker", settings);
    let body = json!({ "role_id": role_id, "secret_id": secret_id });
    let login = call("POST", "/v1/auth/approle/login").raw_body(&body.to_string());
    let came = login.send(&sim.address()).await;
    assert_eq!(came.status, 200);
    let token = came.body["auth"]["client_token"].as_str().unwrap();
    assert_eq!(read(&sim, token).await.status, 403);
}

#[tokio::test]
async fn revoking_a_token_revokes_its_children() {
    let (sim, token) = with_secret().await;
    let create = call("POST", "/v1/auth/token/create").header("X-Vault-Token", &token);
    let came = create
        .raw_body(r#"{"ttl": "2h"}"#)
        .send(&sim.address())
        .await;
    let child = came.body["auth"]["client_token"].as_str().unwrap();
    assert_eq!(read(&sim, child).await.status, 200);
    sim.revoke_token(&token);
    assert_eq!(read(&sim, child).await.status, 403);
}

#[tokio::test]
async fn denials_cover_any_token_and_all_paths_below() {
    let (sim, token) = with_secret().await;
    sim.deny(None, None, "kv/data/kucoin/*");
    for token in [&*token, ROOT] {
        let came = read(&sim, token).await;
        let errors = json!(["1 error occurred:\n\t* permission denied\n\n"]);
        assert_eq!((came.status, &came.body["errors"]), (403, &errors));
    }
    sim.allow_again(None, None, "kv/data/kucoin/*");
    sim.deny(Some(&token), Some("POST"), "kv/data/kucoin/prod/main");
    assert_eq!(read(&sim, &token).await.status, 200);
}

#[tokio::test]
async fn versions_are_pruned_deleted_and_restart_at_one() {
    let (sim, token) = with_secret().await;
    let metadata = call("GET", "/v1/kv/metadata/kucoin/prod/main").header("X-Vault-Token", &token);
    for version in 2..=12 {
        let data = json!({ "api_key": "fake-key" });
        assert_eq!(sim.put_secret("kv", "kucoin/prod/main", data), version);
    }
    let owner = BTreeMap::from([("owner".to_owned(), "desk1".to_owned())]);
    sim.set_custom_metadata("kv", "kucoin/prod/main", owner);
    let came = metadata.clone().send(&sim.address()).await;
    assert_eq!(came.body["data"]["oldest_version"], 3);
    assert_eq!(came.body["data"]["versions"].as_object().unwrap().len(), 10);
    assert_eq!(came.body["data"]["custom_metadata"]["owner"], "desk1");
    sim.delete_latest("kv", "kucoin/prod/main");
    let came = read(&sim, &token).await;
    assert_eq!(
        (came.status, &came.body["data"]["metadata"]["version"]),
        (404, &json!(12))
    );
    sim.delete_metadata("kv", "kucoin/prod/main");
    assert_eq!(
        metadata.send(&sim.address()).await.body,
        json!({ "errors": [] })
    );
    assert_eq!(sim.put_secret("kv", "kucoin/prod/main", json!({})), 1);
}

// --- listeners -------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_stopped_server_refuses_connections_and_comes_back_with_its_storage() {
    let (sim, token) = with_secret().await;
    let address = sim.address();
    sim.stop().await.unwrap();
    let refused = TcpStream::connect(host(&address)).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    sim.restart().await.unwrap();
    assert_eq!(sim.address(), address);
    assert_eq!(
        read(&sim, &token).await.body["data"]["data"]["api_key"],
        "fake-key"
    );
    drop(sim);
    while TcpStream::connect(host(&address)).await.is_ok() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_standby_reads_itself_and_needs_the_active_node_for_the_rest() {
    let health = call("GET", "/v1/sys/health");
    for (standby, renewed) in [(Standby::Forwards, 200), (Standby::Redirects, 307)] {
        let sim = VaultSim::start(VaultSettings {
            standby,
            ..VaultSettings::default()
        })
        .await
        .unwrap();
        let second = sim.standby_address().unwrap();
        let token = sim.create_token(Duration::from_secs(3600));
        let lookup = call("GET", "/v1/auth/token/lookup-self").header("X-Vault-Token", &token);
        let renew = call("POST", "/v1/auth/token/renew-self").header("X-Vault-Token", &token);

        let came = health.clone().send(&second).await;
        assert_eq!((came.status, &came.body["standby"]), (429, &json!(true)));
        assert_eq!(lookup.clone().send(&second).await.status, 200);
        let came = renew.clone().send(&second).await;
        assert_eq!(came.status, renewed);
        let target = format!("{}/v1/auth/token/renew-self", sim.address());
        assert_eq!(
            came.header("location"),
            (renewed == 307).then_some(&*target)
        );

        sim.stop().await.unwrap();
        assert_eq!(renew.clone().send(&second).await.status, 500);
        assert_eq!(lookup.send(&second).await.status, 200);
        sim.fail_over();
        assert_eq!(renew.send(&second).await.status, 200);
        assert_eq!(health.clone().send(&second).await.status, 200);
        sim.restart().await.unwrap();
        assert_eq!(health.clone().send(&sim.address()).await.status, 429);
    }
}

#[tokio::test]
async fn it_speaks_tls_when_given_a_certificate() {
    let ca = Ca::new("simulated CA").unwrap();
    let server = ca.server().unwrap();
    let certificate = CertificateDer::from_pem_slice(server.certificate_pem.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(server.key_pem.as_bytes()).unwrap();
    let tls = rustls::ServerConfig::builder().with_no_client_auth();
    let tls = Some(Arc::new(
        tls.with_single_cert(vec![certificate], key).unwrap(),
    ));
    let sim = VaultSim::start(VaultSettings {
        tls,
        ..VaultSettings::default()
    })
    .await
    .unwrap();

    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(ca.certificate_pem().as_bytes()).unwrap())
        .unwrap();
    let client = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let address = sim.address();
    let address = address.strip_prefix("https://").unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = TlsConnector::from(Arc::new(client))
        .connect(name, stream)
        .await
        .unwrap();
    let request = call("GET", "/v1/sys/health");
    stream
        .write_all(format!("{}\r\n", request.head).as_bytes())
        .await
        .unwrap();
    let mut came = [0; 15];
    stream.read_exact(&mut came).await.unwrap();
    assert_eq!(&came, b"HTTP/1.1 200 OK");
}

#[tokio::test]
async fn only_loopback_is_served() {
    let address = "0.0.0.0:0".parse().unwrap();
    let refused = VaultSim::start(VaultSettings {
        address,
        ..VaultSettings::default()
    })
    .await
    .unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput);
}

#[tokio::test]
async fn as_a_program_it_is_controlled_over_http() {
    let file = format!("{}/vault-put.json", env!("CARGO_TARGET_TMPDIR"));
    std::fs::write(&file, r#"{"api_key": "fake-key"}"#).unwrap();
    let sim = serve(VaultArgs {
        listen: "127.0.0.1:0".parse().unwrap(),
        root_token: ROOT.to_owned(),
        mount: "kv".to_owned(),
        put: vec![format!("kucoin/prod/main={file}")],
    })
    .await
    .unwrap();
    assert_eq!(
        read(&sim, ROOT).await.body["data"]["data"]["api_key"],
        "fake-key"
    );
    let control = |path: &str, body: &str| call("POST", path).raw_body(body);
    let health = call("GET", "/v1/sys/health");
    let at = sim.address();
    for (path, status) in [("/_sim/seal", 503), ("/_sim/unseal", 200)] {
        assert_eq!(control(path, "").send(&at).await.status, 200);
        assert_eq!(health.clone().send(&at).await.status, status);
    }
    let rule = r#"{"path": "sys/", "method": "GET", "times": 1, "kind": "status", "code": 502}"#;
    assert_eq!(control("/_sim/fault", rule).send(&at).await.status, 200);
    assert_eq!(health.clone().send(&at).await.status, 502);
    assert_eq!(health.clone().send(&at).await.status, 200);
    assert_eq!(
        control("/_sim/fault", r#"{"kind": "delay", "ms": 60000}"#)
            .send(&at)
            .await
            .status,
        200
    );
    assert_eq!(call("DELETE", "/_sim/fault").send(&at).await.status, 200);
    assert_eq!(health.send(&at).await.status, 200);
    let token = sim.create_token(Duration::from_secs(60));
    let lookup = call("GET", "/v1/auth/token/lookup-self").header("X-Vault-Token", &token);
    assert_eq!(lookup.clone().send(&at).await.status, 200);
    assert_eq!(
        control("/_sim/advance", r#"{"seconds": 60}"#)
            .send(&at)
            .await
            .status,
        200
    );
    assert_eq!(lookup.send(&at).await.status, 403);
    for nonsense in [r#"{"kind": "nothing"}"#, "{"] {
        assert_eq!(control("/_sim/fault", nonsense).send(&at).await.status, 400);
    }
    assert!(
        sim.requests()
            .iter()
            .all(|seen| !seen.path.starts_with("/_sim/"))
    );
}

#[tokio::test]
async fn requests_are_remembered_without_tokens_and_bodies() {
    let (sim, token) = with_secret().await;
    let path = format!("{SECRET}?version=1");
    let write = call("PUT", &path).header("X-Vault-Token", &token);
    write
        .raw_body(r#"{"data": {"api_key": "canary"}}"#)
        .send(&sim.address())
        .await;
    let seen = format!("{:?}", sim.requests());
    assert!(seen.contains(r#"method: "PUT", path: "/v1/kv/data/kucoin/prod/main", query: Some("version=1"), status: Some(200)"#));
    assert!(!seen.contains("canary") && !seen.contains(&token));
}

// --- a client of a few lines: one connection per request -------------------------------------------------------------

#[derive(Clone)]
struct Call {
    head: String,
    body: String,
    token: Option<String>,
}

#[derive(Clone)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    /// Null if empty; text if not JSON.
    body: Value,
}

fn call(method: &str, path: &str) -> Call {
    Call {
        head: format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"),
        body: String::new(),
        token: None,
    }
}

fn host(url: &str) -> &str {
    url.strip_prefix("http://").unwrap()
}

impl Call {
    fn header(mut self, name: &str, value: &str) -> Self {
        if name == "X-Vault-Token" {
            self.token = Some(value.to_owned());
        }
        self.head = format!("{}{name}: {value}\r\n", self.head);
        self
    }

    fn raw_body(mut self, body: &str) -> Self {
        body.clone_into(&mut self.body);
        self
    }

    fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    async fn bytes(&self, url: &str) -> Vec<u8> {
        let mut stream = TcpStream::connect(host(url)).await.unwrap();
        let request = format!(
            "{}content-length: {}\r\n\r\n{}",
            self.head,
            self.body.len(),
            self.body
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut came = Vec::new();
        stream.read_to_end(&mut came).await.unwrap();
        came
    }

    async fn send(self, url: &str) -> Answer {
        let came = String::from_utf8(self.bytes(url).await).unwrap();
        let Some((head, body)) = came.split_once("\r\n\r\n") else {
            panic!("no answer but {came:?}");
        };
        let mut lines = head.lines();
        let status = lines
            .next()
            .unwrap()
            .split(' ')
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
        let headers = lines.map(|line| line.split_once(": ").unwrap());
        let answer = Answer {
            status,
            headers: headers
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            body: match body {
                "" => Value::Null,
                body => serde_json::from_str(body).unwrap_or_else(|_| json!(body)),
            },
        };
        assert_eq!(
            answer.header("x-credbroker-sim"),
            Some("1"),
            "not labelled: {head}"
        );
        answer
    }
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let found = self
            .headers
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    fn set_header(&mut self, name: &str, value: &str) {
        self.headers.retain(|(known, _)| known != name);
        self.headers.push((name.to_owned(), value.to_owned()));
    }
}
