//! The golden vectors, compared stage by stage. Every expected value is from the file; this test computes no HMAC.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use credbroker::base::secret::{ApiSecret, PartnerKey, Passphrase};
use credbroker::kucoin::sign::string_to_sign;
use credbroker::kucoin::{
    self, Key, KeyVersion, Method, Partner, Scope, Site, Target, UnsignedRequest,
};
use futures_util::FutureExt;
use http_body_util::BodyExt;
use serde_json::Value;
use zeroize::Zeroizing;

const VECTORS: &str = include_str!("../../vectors/kucoin-signing-vectors.json");

fn file() -> Value {
    serde_json::from_str(VECTORS).unwrap()
}

/// The stages of signing that are compared.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Stage {
    StringToSign,
    Headers,
    Wire,
    Body,
}

/// The inputs of the signature of a vector.
#[derive(Clone)]
struct Inputs {
    api_key: String,
    api_secret: String,
    passphrase: String,
    version: KeyVersion,
    partner: Option<Partner>,
    partner_key: String,
    timestamp_ms: i64,
    method: Method,
    path: String,
    query: Vec<(String, String)>,
    body: Vec<u8>,
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

impl Inputs {
    fn of(file: &Value, vector: &Value) -> Self {
        let own = |name: &str| Some(&vector[name]).filter(|value| !value.is_null());
        let credentials = own("credentials").unwrap_or(&file["credentials"]);
        let timestamp = own("timestamp").unwrap_or(&file["timestamp"]);
        let (request, headers) = (&vector["request"], &vector["headers"]);
        let pair = |pair: &Value| (text(&pair[0]), text(&pair[1]));
        // The vectors of ccxt name their made-up partner key in a sentence.
        let named_key = vector["partnerSignKey"]
            .as_str()
            .and_then(|words| Some(words.split_once("(fake-")?.1.trim_end_matches(')')));
        Self {
            api_key: text(&credentials["apiKey"]),
            api_secret: text(&credentials["apiSecret"]),
            passphrase: text(&credentials["passphrase"]),
            version: match vector["keyVersion"].as_str().unwrap() {
                "2" => KeyVersion::V2,
                "3" | "2 or 3 (passphrase is HMACed)" => KeyVersion::V3,
                other => panic!("key version {other}"),
            },
            partner: headers["KC-API-PARTNER"].as_str().map(|id| Partner {
                id: id.to_owned(),
                broker_name: headers["KC-BROKER-NAME"].as_str().map(str::to_owned),
            }),
            partner_key: named_key.map_or_else(
                || text(&credentials["partnerKey"]),
                |rest| format!("fake-{rest}"),
            ),
            timestamp_ms: text(timestamp).parse().unwrap(),
            method: match request["method"].as_str().unwrap() {
                "DELETE" => Method::Delete,
                "GET" => Method::Get,
                "POST" => Method::Post,
                other => panic!("method {other}"),
            },
            path: text(&request["path"]),
            query: request["query"]
                .as_array()
                .unwrap()
                .iter()
                .map(pair)
                .collect(),
            body: request["body"].as_str().unwrap_or_default().into(),
        }
    }

    fn key(&self) -> Arc<Key> {
        let wiped = |text: &String| Zeroizing::new(text.clone());
        let partner = PartnerKey::new(wiped(&self.partner_key));
        Key::new(
            wiped(&self.api_key),
            &ApiSecret::new(wiped(&self.api_secret)),
            &Passphrase::new(wiped(&self.passphrase)),
            self.version,
            self.partner.is_some().then_some(&partner),
        )
        .unwrap()
    }

    fn request(&self) -> UnsignedRequest {
        UnsignedRequest {
            account: "main".parse().unwrap(),
            scope: Scope::SpotMargin,
            method: self.method,
            target: Target::new(&self.path, self.query.clone()).unwrap(),
            body: Bytes::from(self.body.clone()),
            id: "vector".parse().unwrap(),
            body_client_oids: Vec::new(),
        }
    }

    /// The stages in which the signature of these inputs differs from the vector.
    fn differs_from(&self, vector: &Value) -> BTreeSet<Stage> {
        let mut differs = BTreeSet::new();
        let request = self.request();
        let timestamp = self.timestamp_ms.to_string();
        let target = request.target.to_sign();
        let string = string_to_sign(&timestamp, &request, &target).concat();
        if string != vector["stringToSign"].as_str().unwrap().as_bytes() {
            differs.insert(Stage::StringToSign);
        }

        let partner = self.partner.as_ref();
        let signed = kucoin::sign(
            &request,
            Site::Global,
            &self.key(),
            partner,
            self.timestamp_ms,
        )
        .unwrap();
        let listed = vector["headers"].as_object().unwrap();
        let expected_headers = listed.iter().filter(|(name, _)| name.starts_with("KC-"));
        for (name, value) in expected_headers {
            let sent: Vec<_> = signed.headers().get_all(name.as_str()).iter().collect();
            if sent != [value.as_str().unwrap()] {
                differs.insert(Stage::Headers);
            }
        }

        let (path, pairs) = split(signed.target());
        let (expected_path, expected_pairs) = split(vector["wirePathAndQuery"].as_str().unwrap());
        let requested: Vec<_> = vector["request"]["query"]
            .as_array()
            .unwrap()
            .iter()
            .map(|pair| (text(&pair[0]), text(&pair[1])))
            .collect();
        if path != expected_path || pairs != expected_pairs || pairs != requested {
            differs.insert(Stage::Wire);
        }

        let body = signed
            .body()
            .collect()
            .now_or_never()
            .unwrap()
            .unwrap()
            .to_bytes();
        if body != vector["request"]["body"].as_str().unwrap_or_default() {
            differs.insert(Stage::Body);
        }
        differs
    }
}

/// Path and form-decoded pairs of a target.
fn split(target: &str) -> (&str, Vec<(String, String)>) {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let pairs = url::form_urlencoded::parse(query.as_bytes());
    (path, pairs.into_owned().collect())
}

#[test]
fn every_golden_vector_is_reproduced_byte_for_byte() {
    let file = file();
    let vectors = file["vectors"].as_array().unwrap();
    assert_eq!(vectors.len(), 21);
    for vector in vectors {
        let differs = Inputs::of(&file, vector).differs_from(vector);
        assert!(
            differs.is_empty(),
            "{} differs in {differs:?}",
            vector["id"]
        );
    }
}

#[test]
fn golden_vectors_cover_partners_key_versions_and_methods() {
    let file = file();
    let vectors = file["vectors"].as_array().unwrap();
    let count =
        |fits: &dyn Fn(&Value) -> bool| vectors.iter().filter(|vector| fits(vector)).count();
    assert!(count(&|v| v["headers"]["KC-API-PARTNER-SIGN"].is_string()) >= 3);
    assert!(count(&|v| v["headers"]["KC-API-KEY-VERSION"] == "2") >= 3);
    assert!(count(&|v| v["headers"]["KC-API-KEY-VERSION"] == "3") >= 3);
    for method in ["DELETE", "GET", "POST"] {
        assert!(
            count(&|v| v["request"]["method"] == method) >= 2,
            "{method}"
        );
    }
    assert!(
        vectors
            .iter()
            .all(|v| v["headers"]["KC-API-SIGN"].is_string())
    );
}

#[test]
fn changing_an_input_changes_exactly_the_stages_it_affects() {
    use Stage::{Body, Headers, StringToSign, Wire};
    type Change = fn(&mut Inputs);
    let changes: [(&str, Change, &[Stage]); 10] = [
        ("api key", |i| i.api_key.push('0'), &[Headers]),
        ("secret", |i| i.api_secret.push(' '), &[Headers]),
        ("passphrase", |i| i.passphrase.push(' '), &[Headers]),
        (
            "timestamp",
            |i| i.timestamp_ms += 1,
            &[StringToSign, Headers],
        ),
        (
            "method",
            |i| {
                i.method = match i.method {
                    Method::Get => Method::Delete,
                    Method::Delete | Method::Post => Method::Get,
                }
            },
            &[StringToSign, Headers],
        ),
        ("path", |i| i.path.push('0'), &[StringToSign, Headers, Wire]),
        (
            "body",
            |i| i.body.push(b' '),
            &[StringToSign, Headers, Body],
        ),
        (
            "query, at the end",
            |i| i.query.push(("a".to_owned(), String::new())),
            &[StringToSign, Headers, Wire],
        ),
        (
            "query, at the start",
            |i| i.query.insert(0, ("a".to_owned(), "b".to_owned())),
            &[StringToSign, Headers, Wire],
        ),
        (
            "one letter of the path",
            |i| i.path = i.path.replacen("/api", "/Api", 1),
            &[StringToSign, Headers, Wire],
        ),
    ];
    let file = file();
    for vector in file["vectors"].as_array().unwrap() {
        for (input, change, stages) in &changes {
            let mut inputs = Inputs::of(&file, vector);
            change(&mut inputs);
            let affected: Vec<_> = inputs.differs_from(vector).into_iter().collect();
            assert_eq!(affected, *stages, "{}: {input}", vector["id"]);
        }
    }
}

#[test]
fn changing_partner_key_version_query_value_or_body_byte_is_detected() {
    use Stage::{Body, Headers, StringToSign, Wire};
    let file = file();
    let mut counts = [0; 5];
    for vector in file["vectors"].as_array().unwrap() {
        let inputs = Inputs::of(&file, vector);
        let changed_stages = |change: &dyn Fn(&mut Inputs)| {
            let mut inputs = inputs.clone();
            change(&mut inputs);
            inputs.differs_from(vector).into_iter().collect::<Vec<_>>()
        };
        let id = &vector["id"];
        if let Some(partner) = &inputs.partner {
            counts[0] += 1;
            assert_eq!(
                changed_stages(&|i| i.partner_key.push('0')),
                [Headers],
                "{id}"
            );
            let other = Partner {
                id: format!("{}x", partner.id),
                ..partner.clone()
            };
            assert_eq!(
                changed_stages(&|i| i.partner = Some(other.clone())),
                [Headers],
                "{id}"
            );
            assert_eq!(changed_stages(&|i| i.partner = None), [Headers], "{id}");
        }
        if let Some(broker_name) = inputs.partner.as_ref().and_then(|p| p.broker_name.as_ref()) {
            counts[1] += 1;
            let other = Partner {
                broker_name: Some(broker_name.to_ascii_lowercase()),
                ..inputs.partner.clone().unwrap()
            };
            assert_eq!(
                changed_stages(&|i| i.partner = Some(other.clone())),
                [Headers],
                "{id}"
            );
        }
        if vector["headers"]["KC-API-KEY-VERSION"].is_string() {
            counts[2] += 1;
            let other = if inputs.version == KeyVersion::V2 {
                KeyVersion::V3
            } else {
                KeyVersion::V2
            };
            assert_eq!(changed_stages(&|i| i.version = other), [Headers], "{id}");
        }
        for at in 0..inputs.query.len() {
            counts[3] += 1;
            let stages = changed_stages(&|i| i.query[at].1.push('\u{e9}'));
            assert_eq!(stages, [StringToSign, Headers, Wire], "{id}");
        }
        for at in 0..inputs.body.len() {
            counts[4] += 1;
            let stages = changed_stages(&|i| i.body[at] ^= 1);
            assert_eq!(stages, [StringToSign, Headers, Body], "{id}, byte {at}");
        }
    }
    assert!(counts.iter().all(|count| *count >= 3), "{counts:?}");
}
