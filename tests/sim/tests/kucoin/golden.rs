//! Requests that other implementations signed, unchanged and with one part changed.

use std::net::IpAddr;

use credbroker_sim::kucoin::{Host, KucoinSettings, KucoinSim, Partner, Signature, SimKey};
use serde_json::Value;

use crate::NOW_MS;
use crate::client::{Answer, send, text};

const VECTORS: &str = include_str!("../../../vectors/kucoin-signing-vectors.json");

/// A golden request, ready to send.
#[derive(Clone)]
struct Golden {
    id: String,
    host: Host,
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: String,
    now_ms: i64,
}

impl Golden {
    /// Replaces a header, or removes it.
    fn with_header(mut self, name: &str, value: Option<&str>) -> Self {
        self.headers.retain(|(known, _)| known != name);
        self.headers
            .extend(value.map(|value| (name.to_owned(), value.to_owned())));
        self
    }

    async fn send_to(&self, sim: &KucoinSim) -> Answer {
        let url = match self.host {
            Host::Futures => sim.futures_url(),
            Host::Spot => sim.spot_url(),
        };
        let answer = send(&url, &self.method, &self.target, &self.headers, &self.body).await;
        answer.unwrap()
    }
}

/// The golden requests to simulated hosts, and the keys that they are signed with.
fn golden() -> (Vec<Golden>, Vec<SimKey>) {
    let file: Value = serde_json::from_str(VECTORS).unwrap();
    let mut keys = vec![golden_key(&file["credentials"])];
    // ccxt signs futures requests as another partner, whose key only the text of the vectors names.
    keys[0].partners.push(Partner {
        id: "FakeBrokerFut".to_owned(),
        key: "fake-partner-key-0002".to_owned(),
    });
    let mut requests = Vec::new();
    for vector in file["vectors"].as_array().unwrap() {
        let host = match text(&vector["request"], "host") {
            "https://api.kucoin.com" => Host::Spot,
            "https://api-futures.kucoin.com" => Host::Futures,
            other => {
                assert_eq!(
                    (text(vector, "id"), other),
                    ("v3-get-partner", "https://api-broker.kucoin.com")
                );
                continue;
            }
        };
        if vector["credentials"].is_object() {
            keys.push(golden_key(&vector["credentials"]));
        }
        let headers = vector["headers"].as_object().unwrap();
        let headers = headers
            .iter()
            .map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned()));
        let timestamp = vector["timestamp"]
            .as_str()
            .or(file["timestamp"].as_str())
            .unwrap();
        let mut request = Golden {
            id: text(vector, "id").to_owned(),
            host,
            method: text(&vector["request"], "method").to_owned(),
            target: text(vector, "wirePathAndQuery").to_owned(),
            headers: headers.collect(),
            body: text(&vector["request"], "body").to_owned(),
            now_ms: timestamp.parse().unwrap(),
        };
        if request.id == "official-docs-broker-example" {
            // The documentation page leaves these two headers out.
            request = request
                .with_header("Content-Type", Some("application/json"))
                .with_header("KC-API-KEY-VERSION", Some("2"));
        }
        requests.push(request);
    }
    (requests, keys)
}

fn golden_key(credentials: &Value) -> SimKey {
    SimKey {
        api_key: text(credentials, "apiKey").to_owned(),
        api_secret: text(credentials, "apiSecret").to_owned(),
        passphrase: text(credentials, "passphrase").to_owned(),
        partners: vec![Partner {
            id: text(credentials, "partner").to_owned(),
            key: text(credentials, "partnerKey").to_owned(),
        }],
        ..SimKey::fake(1)
    }
}

fn golden_request(id: &str) -> Golden {
    let (requests, _) = golden();
    requests
        .into_iter()
        .find(|request| request.id == id)
        .unwrap()
}

async fn golden_sim(settings: KucoinSettings) -> KucoinSim {
    let sim = KucoinSim::start(settings).await.unwrap();
    sim.set_fixed_time_ms(NOW_MS);
    for key in golden().1 {
        sim.add_key(key);
    }
    sim
}

#[tokio::test]
async fn every_golden_request_verifies() {
    let sim = golden_sim(KucoinSettings::default()).await;
    let (requests, _) = golden();
    for request in &requests {
        sim.set_fixed_time_ms(request.now_ms);
        request.send_to(&sim).await;
        let received = sim.received().pop().unwrap();
        assert_eq!(received.signature, Signature::Verified, "{}", request.id);
        assert_eq!(received.target, request.target);
        assert_eq!(received.body, request.body.as_bytes());
    }
    assert_eq!(requests.len(), 20);
}

#[tokio::test]
async fn each_kind_of_change_is_rejected_with_its_own_code() {
    let sim = golden_sim(KucoinSettings::default()).await;
    let post = golden_request("v3-post-partner");
    let get = golden_request("v3-get-special-chars");
    let changed = |body: &str, target: &str| {
        let mut request = post.clone();
        request.body = body.to_owned();
        request.target = target.to_owned();
        request
    };
    let at = |timestamp: &str| {
        post.clone()
            .with_header("KC-API-TIMESTAMP", Some(timestamp))
    };
    let with = |name: &str, value: &str| post.clone().with_header(name, Some(value));
    let without = |name: &str| post.clone().with_header(name, None);
    let other_query = |target: String| Golden {
        target,
        ..get.clone()
    };
    for (request, status, code) in [
        (
            changed(&post.body.replace("50000", "50001"), &post.target),
            401,
            "400005",
        ),
        (changed(&post.body, "/api/v1/hf/orders/test"), 401, "400005"),
        (
            other_query(get.target.replace("bot+one", "bot+two")),
            401,
            "400005",
        ),
        (
            other_query(get.target.replace("bot+one", "bot%2Bone")),
            401,
            "400005",
        ),
        (at("1735689600124"), 401, "400005"),
        (at("1735689605123"), 400, "400002"),
        (at("1735689595123"), 400, "400002"),
        (at("+1735689600123"), 400, "400002"),
        (at("now"), 400, "400002"),
        (
            with("KC-API-PASSPHRASE", "Fake Passphrase! #1"),
            401,
            "400004",
        ),
        (with("KC-API-KEY-VERSION", "1"), 400, "400009"),
        (with("KC-API-KEY-VERSION", "4"), 400, "400009"),
        (with("KC-API-KEY", "fakekey0000000000000002"), 401, "400003"),
        (with("KC-API-PARTNER", "FakeBrokes"), 403, "400200"),
        (with("KC-API-PARTNER-SIGN", "AAAA"), 403, "400201"),
        (without("KC-API-PARTNER"), 403, "400200"),
        (without("Content-Type"), 415, "415000"),
        (without("KC-API-KEY"), 401, "400001"),
        (without("KC-API-KEY-VERSION"), 401, "400001"),
        (without("KC-API-PASSPHRASE"), 401, "400001"),
        (without("KC-API-SIGN"), 401, "400001"),
        (without("KC-API-TIMESTAMP"), 401, "400001"),
    ] {
        let answer = request.send_to(&sim).await;
        let label = format!("{} {:?}", request.target, request.headers);
        assert_eq!(
            (answer.status, answer.code()),
            (status, code.to_owned()),
            "{label}"
        );
        assert_ne!(sim.received().pop().unwrap().signature, Signature::Verified);
    }
    assert!(sim.orders(1).is_empty());
    let twice = Golden {
        headers: [post.headers.clone(), post.headers.clone()].concat(),
        ..post.clone()
    };
    assert_eq!(twice.send_to(&sim).await.code(), "400001");
    for space in ["bot%20one", "bot+one"] {
        let request = other_query(get.target.replace("bot+one", space));
        assert_eq!(request.send_to(&sim).await.code(), "200000", "{space}");
    }
}

#[tokio::test]
async fn key_works_only_with_its_version_addresses_and_permissions() {
    let (_, keys) = golden();
    let post = golden_request("v3-post-json");
    let v2 = post.clone().with_header("KC-API-KEY-VERSION", Some("2"));
    let v1 = post
        .clone()
        .with_header("KC-API-KEY-VERSION", Some("1"))
        .with_header("KC-API-PASSPHRASE", Some(&keys[0].passphrase));
    let elsewhere: IpAddr = "192.0.2.1".parse().unwrap();
    let here: IpAddr = "127.0.0.1".parse().unwrap();
    let version = |version| SimKey {
        version,
        ..keys[0].clone()
    };
    let from = |address| SimKey {
        ip_whitelist: vec![address],
        ..keys[0].clone()
    };
    let may = |permission: &str| SimKey {
        permissions: vec![permission.to_owned()],
        ..keys[0].clone()
    };
    for (key, oldest, request, code) in [
        (version(3), 2, &post, "200000"),
        (version(3), 2, &v2, "200000"),
        (version(2), 2, &v2, "200000"),
        (version(2), 2, &post, "400009"),
        (version(2), 3, &v2, "400008"),
        (version(1), 2, &v1, "400008"),
        (version(1), 1, &v1, "200000"),
        (from(here), 2, &post, "200000"),
        (from(elsewhere), 2, &post, "400006"),
        (may("Spot"), 2, &post, "200000"),
        (may("Futures"), 2, &post, "400007"),
    ] {
        let sim = golden_sim(KucoinSettings {
            oldest_key_version: oldest,
            ..KucoinSettings::default()
        })
        .await;
        sim.add_key(key);
        let answer = request.send_to(&sim).await;
        assert_eq!(answer.code(), code, "{answer:?}");
        if code == "400006" {
            assert!(text(&answer.json(), "msg").contains("127.0.0.1"));
            assert_eq!(answer.status, 403);
        }
        sim.remove_key(&keys[0].api_key);
        assert_eq!(request.send_to(&sim).await.code(), "400003");
    }
}
