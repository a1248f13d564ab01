//! Properties of keys: key info, address whitelist, version, permissions, account.

use std::net::IpAddr;

use credbroker_sim::kucoin::{Amount, Host, KucoinSettings, KucoinSim, SimKey, Site, Wallet};
use serde_json::{Value, json};

use crate::NOW_MS;
use crate::client::{Answer, Client, headers, send, signed, text};

const CLASSIC: &str = "/api/v1/user/api-key";
const UNIFIED: &str = "/api/ua/v2/user/api-key";

async fn key_info(client: &Client, path: &str) -> Value {
    client.spot("GET", path, Value::Null).await.data()
}

/// Source: specification of KuCoin's universal SDK, "Get Apikey Info", example; its masked addresses are filled in.
#[tokio::test]
async fn key_info_matches_the_official_example() {
    let example = json!({
        "remark": "account1", "apiKey": "6705f5c311545b000157d3eb", "apiVersion": 3,
        "permission": "General,Futures,Spot,Earn,InnerTransfer,Transfer,Margin",
        "ipWhitelist": "203.0.113.154,127.0.0.1", "createdAt": 1_728_443_843_000_u64, "uid": 165_111_215,
        "isMaster": true,
    });
    let client = Client::start_with(SimKey {
        api_key: text(&example, "apiKey").to_owned(),
        remark: text(&example, "remark").to_owned(),
        permissions: text(&example, "permission")
            .split(',')
            .map(str::to_owned)
            .collect(),
        ip_whitelist: vec![
            "203.0.113.154".parse().unwrap(),
            "127.0.0.1".parse().unwrap(),
        ],
        created_at_ms: 1_728_443_843_000,
        ..SimKey::fake(165_111_215)
    })
    .await;
    for path in [CLASSIC, UNIFIED] {
        let info = key_info(&client, path).await;
        for (name, value) in example.as_object().unwrap() {
            assert_eq!(&info[name], value, "{name} of {path}");
        }
    }
}

#[tokio::test]
async fn key_info_fields_that_do_not_apply_are_omitted_or_null() {
    let master = Client::start().await;
    let classic = key_info(&master, CLASSIC).await;
    for absent in ["ipWhitelist", "subName", "parentUid", "expiredAt"] {
        assert_eq!(classic.get(absent), None, "{absent}");
    }
    let unified = key_info(&master, UNIFIED).await;
    for (name, value) in [
        ("ipWhitelist", None),
        ("subName", None),
        ("parentUid", Some(&Value::Null)),
        ("expiredAt", Some(&Value::Null)),
    ] {
        assert_eq!(unified.get(name), value, "{name}");
    }
    let sub = Client::start_with(SimKey {
        sub_name: Some("desk1".to_owned()),
        parent_uid: Some(7),
        expires_at_ms: Some(NOW_MS + 1),
        region: "DE".to_owned(),
        kyc_passed: false,
        ..SimKey::fake(8)
    })
    .await;
    for path in [CLASSIC, UNIFIED] {
        let info = key_info(&sub, path).await;
        for (name, value) in [
            ("subName", json!("desk1")),
            ("parentUid", json!(7)),
            ("isMaster", json!(false)),
            ("expiredAt", json!(NOW_MS + 1)),
            ("region", json!("DE")),
            ("kycStatus", json!(0)),
            ("siteType", json!("global")),
        ] {
            assert_eq!(info[name], value, "{name} of {path}");
        }
    }
}

#[tokio::test]
async fn expired_keys_and_keys_of_another_site_do_not_exist() {
    for (key, code) in [
        (SimKey::fake(7), "200000"),
        (
            SimKey {
                expires_at_ms: Some(NOW_MS + 1),
                ..SimKey::fake(7)
            },
            "200000",
        ),
        (
            SimKey {
                expires_at_ms: Some(NOW_MS),
                ..SimKey::fake(7)
            },
            "400003",
        ),
        (
            SimKey {
                site: Site::Turkey,
                ..SimKey::fake(7)
            },
            "400003",
        ),
    ] {
        let client = Client::start_with(key).await;
        let answer = client.spot("GET", CLASSIC, Value::Null).await;
        assert_eq!(answer.code(), code, "{:?}", client.key);
    }
    let settings = KucoinSettings {
        site: Site::Turkey,
        ..KucoinSettings::default()
    };
    let sim = KucoinSim::start(settings).await.unwrap();
    sim.set_fixed_time_ms(NOW_MS);
    let key = SimKey {
        site: Site::Turkey,
        ..SimKey::fake(7)
    };
    sim.add_key(key.clone());
    let client = Client { sim, key };
    assert_eq!(key_info(&client, CLASSIC).await["siteType"], "turkey");
}

#[tokio::test]
async fn address_seen_by_the_exchange_can_be_set() {
    let seen: IpAddr = "203.0.113.7".parse().unwrap();
    let client = Client::start_with(SimKey {
        ip_whitelist: vec![seen],
        ..SimKey::fake(7)
    })
    .await;
    let from = async || {
        let answer = client.spot("GET", "/api/v1/my-ip", Value::Null).await;
        answer.data()
    };
    let refused = async || client.spot("GET", CLASSIC, Value::Null).await;
    assert_eq!(from().await, "127.0.0.1");
    assert_eq!(refused().await.code(), "400006");
    client.sim.set_source_address(Some(seen));
    assert_eq!(from().await, "203.0.113.7");
    assert_eq!(
        key_info(&client, CLASSIC).await["ipWhitelist"],
        "203.0.113.7"
    );
    client
        .sim
        .set_source_address(Some("203.0.113.9".parse().unwrap()));
    let answer = refused().await;
    assert_eq!(answer.code(), "400006");
    assert!(text(&answer.json(), "msg").ends_with("current ip: 203.0.113.9"));
    client.sim.set_source_address(None);
    assert_eq!(from().await, "127.0.0.1");
}

#[tokio::test]
async fn version_header_must_match_the_key_unless_2_is_accepted_for_version_3() {
    for (two_opens_three, oldest, version, expected) in [
        (true, 2, 3, ["200000", "200000"]),
        (false, 2, 3, ["200000", "400009"]),
        (true, 2, 2, ["400009", "200000"]),
        (true, 3, 2, ["400008", "400008"]),
        (true, 2, 1, ["400008", "400008"]),
        // A version 1 key needs a version 1 header and a plain passphrase.
        (true, 1, 1, ["400009", "400009"]),
    ] {
        let sim = KucoinSim::start(KucoinSettings {
            oldest_key_version: oldest,
            two_opens_three,
            ..KucoinSettings::default()
        })
        .await
        .unwrap();
        sim.set_fixed_time_ms(NOW_MS);
        let key = SimKey {
            version,
            ..SimKey::fake(7)
        };
        sim.add_key(key.clone());
        let mut answers = Vec::new();
        for header in ["3", "2"] {
            let mut sent = signed(&key, NOW_MS, &format!("GET{CLASSIC}"));
            sent.retain(|(name, _)| name != "KC-API-KEY-VERSION");
            sent.extend(headers(&[("KC-API-KEY-VERSION", header)]));
            let answer: Option<Answer> = send(&sim.spot_url(), "GET", CLASSIC, &sent, "").await;
            answers.push(answer.unwrap().code());
        }
        assert_eq!(answers, expected, "version {version}, oldest {oldest}");
    }
}

#[tokio::test]
async fn each_permission_allows_only_its_endpoints_under_each_of_its_names() {
    let order =
        json!({"clientOid": "a", "symbol": "XBTUSDTM", "side": "buy", "price": "1", "size": 1});
    let mut unified = order.clone();
    unified["tradeType"] = json!("FUTURES");
    unified["orderType"] = json!("LIMIT");
    let endpoints = [
        (
            &["FlexTransfers", "InnerTransfer"][..],
            Host::Spot,
            "/api/v3/accounts/universal-transfer",
            json!({}),
        ),
        (
            &["Withdrawal", "Transfer"],
            Host::Spot,
            "/api/v3/withdrawals",
            json!({}),
        ),
        (
            &["Unified"],
            Host::Spot,
            "/api/ua/v2/unified/order/place",
            unified,
        ),
        (
            &["LeadtradeFutures"],
            Host::Futures,
            "/api/v1/copy-trade/futures/orders/test",
            order.clone(),
        ),
        (&["Futures"], Host::Futures, "/api/v1/orders/test", order),
    ];
    let names = endpoints.iter().flat_map(|(names, ..)| names.iter());
    for held in names.chain(&["General", "Spot", "Margin", "Earn"]) {
        let client = Client::start_with(SimKey {
            permissions: vec![(*held).to_owned()],
            ..SimKey::fake(7)
        })
        .await;
        for (permissions, host, path, body) in &endpoints {
            let answer = client.call(*host, "POST", path, body.clone()).await;
            let code = if permissions.contains(held) {
                "200000"
            } else {
                "400007"
            };
            assert_eq!(answer.code(), code, "{held} at {path}");
        }
        let shown = text(&key_info(&client, CLASSIC).await, "permission").to_owned();
        let shown: Vec<_> = shown.split(',').collect();
        let api_name = match *held {
            "FlexTransfers" => "InnerTransfer",
            "Withdrawal" => "Transfer",
            other => other,
        };
        assert!(shown.contains(&"General") && shown.contains(&api_name));
        assert!(!shown.contains(&"FlexTransfers") && !shown.contains(&"Withdrawal"));
    }
}

#[tokio::test]
async fn keys_of_one_account_share_its_orders_and_can_be_replaced() {
    let old = Client::start().await;
    let new = Client {
        sim: old.sim.clone(),
        key: SimKey {
            api_key: "simulated-successor".to_owned(),
            api_secret: "another-secret-never-real".to_owned(),
            passphrase: "another passphrase".to_owned(),
            ..old.key.clone()
        },
    };
    new.sim.add_key(new.key.clone());
    let path = "/api/v1/hf/orders";
    let order = json!({"clientOid": "a", "symbol": "BTC-USDT", "side": "buy", "price": "50000", "size": "1"});
    old.spot("POST", path, order.clone()).await.data();
    assert_eq!(new.available().await, "950000");
    assert_eq!(new.spot("POST", path, order).await.code(), "400100");
    old.sim.remove_key(&old.key.api_key);
    let removed = old.spot("GET", CLASSIC, Value::Null).await;
    assert_eq!(removed.code(), "400003");
    let cancelled = "/api/v1/hf/orders/client-order/a?symbol=BTC-USDT";
    new.spot("DELETE", cancelled, Value::Null).await.data();
    assert_eq!(new.available().await, "1000000");
    // The same key id with another secret: signatures with the old secret are rejected.
    new.sim.add_key(SimKey {
        api_secret: "a-third-secret-never-real".to_owned(),
        ..new.key.clone()
    });
    let replaced = new.spot("GET", CLASSIC, Value::Null).await;
    assert_eq!(replaced.code(), "400004");
}

#[tokio::test]
async fn funds_in_the_funding_account_do_not_cover_orders() {
    let client = Client::start().await;
    client
        .sim
        .set_balance(7, Wallet::Trade, "USDT", Amount::ZERO);
    let order = json!({"clientOid": "a", "symbol": "BTC-USDT", "side": "buy", "price": "50000", "size": "1"});
    for path in ["/api/v1/hf/orders", "/api/v1/hf/orders/test"] {
        let answer = client.spot("POST", path, order.clone()).await;
        assert_eq!(answer.code(), "200004", "{path}");
    }
    let list = async |kind: &str| {
        let target = format!("/api/v1/accounts?currency=USDT{kind}");
        let accounts = client.spot("GET", &target, Value::Null).await.data();
        let accounts = accounts.as_array().unwrap().clone();
        accounts
            .iter()
            .map(|one| format!("{} {}", text(one, "type"), text(one, "available")))
            .collect::<Vec<_>>()
    };
    assert_eq!(list("").await, ["main 1000000", "trade 0"]);
    assert_eq!(list("&type=main").await, ["main 1000000"]);
    assert_eq!(list("&type=trade").await, ["trade 0"]);
    assert_eq!(list("&type=margin").await, ["margin 1000000"]);
}
