//! Replays the requests recorded against a real server: the answers must be the same.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use credbroker_sim::pki::{Ca, Identity, Usage};
use credbroker_sim::vault::{
    InitialState, REVIEWER_URL, ServiceAccount, VaultSettings, VaultSim, asking_for_certificates,
};
use rustls::ClientConfig;
use serde_json::{Value, json};

use crate::ROOT;
use crate::client::{Answer, call, tls};

const TRANSCRIPTS: &str = include_str!("../../../vectors/vault-transcripts.json");

/// Steps that are not replayed, with the reason.
const SKIPPED: &[(&str, &[&str])] = &[
    (
        "HTTP clients refuse to send such a token, and hyper would reject it before the simulator does",
        &["d60", "d61"],
    ),
    (
        "transit and BYOK import are not simulated: the broker does not use them",
        &["d73", "d74", "d75", "d76"],
    ),
    (
        "quotas are not simulated: a fault can return 429",
        &["d91", "d92", "d93", "d94", "d95"],
    ),
];

type Captured = BTreeMap<String, String>;

#[tokio::test]
async fn answers_match_the_recorded_server() {
    let file: Value = serde_json::from_str(TRANSCRIPTS).unwrap();
    let compared_headers = texts(&file["headers_of_interest"]);
    let steps = file["steps"].as_array().unwrap();
    let mut skipped: Vec<&str> = SKIPPED.iter().flat_map(|(_, ids)| *ids).copied().collect();
    let (mut replayed, mut problems) = (0, Vec::new());
    let clients = Clients::new();
    for state in ["file", "dev"] {
        let sim = VaultSim::start(VaultSettings {
            state: match state {
                "file" => InitialState::File,
                _ => InitialState::Dev {
                    root_token: ROOT.to_owned(),
                },
            },
            tls: (state == "file").then(|| asking_for_certificates(&clients.server).unwrap()),
            ..VaultSettings::default()
        })
        .await
        .unwrap();
        sim.stop_clock();
        sim.accept_jwt("fake-jwt", ServiceAccount::default());
        let given = [
            ("root", ROOT),
            ("ca_pem", clients.ca.certificate_pem()),
            ("jwt", "fake-jwt"),
            ("reviewer_url", REVIEWER_URL),
        ];
        let given = given.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let mut captured = Captured::from(given);
        let in_state = |step: &&Value| step["state"].as_str().unwrap().starts_with(state);
        for step in steps.iter().filter(in_state) {
            let id = step["id"].as_str().unwrap();
            if let Some(at) = skipped.iter().position(|skipped| *skipped == id) {
                skipped.remove(at);
                continue;
            }
            let client = (state == "file").then(|| clients.of(step));
            let answer = replay(&sim, step, client, &captured).await;
            for problem in differences(&step["response"], &answer, &compared_headers, &captured) {
                problems.push(format!("{id} ({}): {problem}", step["about"]));
            }
            for (name, path) in step["capture"].as_object().into_iter().flatten() {
                let value = answer.body.pointer(&pointer(path.as_str().unwrap()));
                match value.and_then(Value::as_str) {
                    Some(value) => captured.extend([(name.clone(), value.to_owned())]),
                    None => problems.push(format!("{id}: nothing to capture at {path}")),
                }
            }
            replayed += 1;
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(
        skipped.is_empty(),
        "skipped steps that the file does not have: {skipped:?}"
    );
    assert_eq!((replayed, steps.len()), (143, 154));
}

#[tokio::test]
async fn comparison_detects_every_kind_of_difference() {
    type Alter = fn(&mut Answer);
    let file: Value = serde_json::from_str(TRANSCRIPTS).unwrap();
    let compared_headers = texts(&file["headers_of_interest"]);
    let steps = file["steps"].as_array().unwrap();
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    sim.mount_kv("kv");
    sim.put_secret("kv", "kucoin/prod/main", json!({ "api_key": "fake-key" }));
    let captured = Captured::from([("root".to_owned(), ROOT.to_owned())]);
    let step = steps.iter().find(|step| step["id"] == "f19").unwrap();
    let answer = replay(&sim, step, None, &captured).await;
    let differ = |answer: &Answer| {
        differences(&step["response"], answer, &compared_headers, &captured).len()
    };
    assert_eq!(differ(&answer), 0);

    let altered: [(&str, Alter); 11] = [
        ("status", |answer| answer.status = 201),
        ("header changed", |answer| {
            answer.set_header("cache-control", "no-cache");
        }),
        ("header added", |answer| {
            answer.set_header("location", "/v1/");
        }),
        ("header removed", |answer| answer.headers.clear()),
        ("value", |answer| {
            answer.body["data"]["data"]["api_key"] = json!("other");
        }),
        ("type", |answer| {
            answer.body["data"]["metadata"]["version"] = json!("1");
        }),
        ("key added", |answer| {
            answer.body["data"]["data"]["more"] = json!(1);
        }),
        ("key removed", |answer| {
            answer.body["data"]
                .as_object_mut()
                .unwrap()
                .remove("metadata");
        }),
        ("not a UUID", |answer| {
            answer.body["request_id"] = json!("F0F0");
        }),
        ("not a time", |answer| {
            answer.body["data"]["metadata"]["created_time"] = json!("2026-11-21 03:00:00Z");
        }),
        ("body removed", |answer| answer.body = Value::Null),
    ];
    for (change, alter) in altered {
        let mut answer = answer.clone();
        alter(&mut answer);
        assert!(differ(&answer) > 0, "not detected: {change}");
    }
    let list = |answer: Value| {
        let mut problems = Vec::new();
        compare(
            &json!(["a", "<int>"]),
            &answer,
            &captured,
            "",
            &mut problems,
        );
        problems.len()
    };
    assert_eq!(list(json!(["a", 1])), 0);
    for other in [
        json!([1, "a"]),
        json!(["a"]),
        json!(["a", 1, 1]),
        json!(["a", 1.5]),
    ] {
        assert!(list(other.clone()) > 0, "not detected: {other}");
    }
}

/// The CA that the recording needs, with its certificates. In the state "file" every step goes to the TLS listener: the
/// simulator has either a TLS or a plain listener.
struct Clients {
    broker: Identity,
    broker2: Identity,
    ca: Ca,
    server: Identity,
}

impl Clients {
    fn new() -> Self {
        let ca = Ca::new("CA of the recording").unwrap();
        let broker = || ca.issue("broker", &[], Usage::Client).unwrap();
        Self {
            broker: broker(),
            broker2: broker(),
            server: ca.server().unwrap(),
            ca,
        }
    }

    fn of(&self, step: &Value) -> Arc<ClientConfig> {
        let identity = match step["client_cert"].as_str() {
            Some("broker") => Some(&self.broker),
            Some("broker2") => Some(&self.broker2),
            None | Some("absent") => None,
            Some(other) => panic!("unknown client certificate {other}"),
        };
        tls(&self.ca, identity)
    }
}

async fn replay(
    sim: &VaultSim,
    step: &Value,
    client: Option<Arc<ClientConfig>>,
    captured: &Captured,
) -> Answer {
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
    call.tls = client;
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
        call = call.raw_body(&filled_in(&request["body"], captured).to_string());
    }
    let denied = step["tags"]
        .as_array()
        .is_some_and(|tags| tags.contains(&json!("acl")));
    let token = call.token().map(str::to_owned);
    if denied {
        sim.deny(token.as_deref(), Some(method), path);
    }
    let answer = call.send(&sim.address()).await;
    if denied {
        sim.remove_denial(token.as_deref(), Some(method), path);
    }
    answer
}

/// How an answer differs from the recorded one, by the rules at the top of the recording.
fn differences(
    expected: &Value,
    answer: &Answer,
    compared_headers: &[String],
    captured: &Captured,
) -> Vec<String> {
    let mut problems = Vec::new();
    if expected["status"] != answer.status {
        problems.push(format!(
            "status: expected {}, got {}",
            expected["status"], answer.status
        ));
    }
    for name in compared_headers {
        let expected = expected["headers"]
            .get(name)
            .map(|value| value.as_str().unwrap());
        let answer = answer.header(name);
        let same = match (expected, answer) {
            (None, None) => true,
            (Some("<int>"), Some(answer)) => answer.parse::<u64>().is_ok(),
            (Some(expected), Some(answer)) => fits(expected, answer),
            _ => false,
        };
        if !same {
            problems.push(format!("{name}: expected {expected:?}, got {answer:?}"));
        }
    }
    compare(
        &expected["body"],
        &answer.body,
        captured,
        "body",
        &mut problems,
    );
    problems
}

fn compare(
    expected: &Value,
    answer: &Value,
    captured: &Captured,
    at: &str,
    problems: &mut Vec<String>,
) {
    let same = match (expected, answer) {
        (Value::Object(expected), Value::Object(answer)) => {
            for (key, expected) in expected {
                match answer.get(key) {
                    Some(answer) => {
                        compare(expected, answer, captured, &format!("{at}.{key}"), problems);
                    }
                    None => problems.push(format!("{at}.{key}: expected {expected}, got nothing")),
                }
            }
            for (key, answer) in answer
                .iter()
                .filter(|(key, _)| !expected.contains_key(*key))
            {
                problems.push(format!("{at}.{key}: expected nothing, got {answer}"));
            }
            return;
        }
        (Value::Array(expected), Value::Array(answer)) if expected.len() == answer.len() => {
            for (index, (expected, answer)) in expected.iter().zip(answer).enumerate() {
                compare(
                    expected,
                    answer,
                    captured,
                    &format!("{at}.{index}"),
                    problems,
                );
            }
            return;
        }
        (Value::String(expected), answer) if expected == "<int>" => {
            answer.is_i64() || answer.is_u64()
        }
        (Value::String(expected), Value::String(answer)) => {
            fits(&filled(expected, captured), answer)
        }
        _ => expected == answer,
    };
    if !same {
        problems.push(format!("{at}: expected {expected}, got {answer}"));
    }
}

/// Whether `text` matches `pattern`, which may contain placeholders.
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

/// A JSON value with the placeholders in its strings filled in. (Some values have line breaks, so not in its text form.)
fn filled_in(value: &Value, captured: &Captured) -> Value {
    match value {
        Value::Array(items) => items.iter().map(|item| filled_in(item, captured)).collect(),
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| (name.clone(), filled_in(value, captured)))
            .collect(),
        Value::String(text) => json!(filled(text, captured)),
        other => other.clone(),
    }
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
