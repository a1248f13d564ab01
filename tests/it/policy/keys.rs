//! Which key signs a request, and with which headers: key per scope, key version, partner, site.

use credbroker::proto::{Method, Scope};
use credbroker_sim::installation::Settings;
use credbroker_sim::kucoin::{Partner, ReceivedRequest, Signature, SimKey};
use tonic::Code;

use super::{Arena, on};
use crate::harness::{Lab, failure, rules_for};

const ACCOUNT: &str = r#"
[account.main]
key = { spot-margin = "spot", futures = "perpetual", unified = "unified" }

[account.main.partner.spot-margin]
id = "FakeSpotPartner"
broker_name = "FakeBrokerND"

[account.main.partner.futures]
id = "FakeFuturesPartner"
"#;

const ALL: [(&str, &str); 3] = [
    ("spot-margin", "\"read\", \"public\""),
    ("futures", "\"read\", \"public\""),
    ("unified", "\"read\", \"public\""),
];

/// A read in each scope, whose signature the simulator checks.
const READS: [(Scope, &str); 3] = [
    (Scope::SpotMargin, "/api/v1/accounts"),
    (Scope::Futures, "/api/v1/account-overview"),
    (Scope::Unified, "/api/ua/v2/user/api-key"),
];

fn partner(id: &str, key: &str) -> Vec<Partner> {
    vec![Partner {
        id: id.to_owned(),
        key: key.to_owned(),
    }]
}

fn spot() -> SimKey {
    SimKey {
        partners: partner("FakeSpotPartner", "fake-partner-key-of-spot"),
        ..SimKey::fake(21)
    }
}

fn futures() -> SimKey {
    SimKey {
        version: 2,
        partners: partner("FakeFuturesPartner", "fake-partner-key-of-futures"),
        ..SimKey::fake(22)
    }
}

/// A broker with one key per scope of account `main`. `vault` has the keys in Vault, which can differ from those of KuCoin.
async fn lab(vault: [SimKey; 3]) -> Lab {
    let lab = Lab::with(Settings {
        rules: rules_for(ACCOUNT, &ALL),
        keys: Vec::new(),
        wait_ready: false,
        ..Settings::default()
    })
    .await;
    for (name, key) in ["spot", "perpetual", "unified"].into_iter().zip(&vault) {
        lab.put_key("main", name, key);
    }
    for key in [spot(), futures(), SimKey::fake(23)] {
        lab.kucoin.add_key(key);
    }
    lab.until_ready().await;
    lab
}

async fn read_all(lab: &Lab) -> Vec<ReceivedRequest> {
    let mut maker = lab.bot("maker").await;
    for (scope, path) in READS {
        maker
            .send(on("main", scope, Method::Get, path))
            .await
            .unwrap();
    }
    lab.kucoin.received()
}

#[tokio::test]
async fn each_scope_signs_with_its_own_key_and_key_version() {
    let mut lab = lab([spot(), futures(), SimKey::fake(23)]).await;
    let received = read_all(&lab).await;
    let seen: Vec<_> = received
        .iter()
        .map(|arrived| (arrived.uid, arrived.header("kc-api-key-version")))
        .collect();
    assert_eq!(
        seen,
        [
            (Some(21), Some("3")),
            (Some(22), Some("2")),
            (Some(23), Some("3"))
        ]
    );
    assert!(
        received
            .iter()
            .all(|arrived| arrived.signature == Signature::Verified)
    );
    lab.stop().await;
}

#[tokio::test]
async fn each_scope_sends_its_partner_headers_with_a_valid_signature() {
    let mut lab = lab([spot(), futures(), SimKey::fake(23)]).await;
    let received = read_all(&lab).await;
    let headers = |arrived: &ReceivedRequest| {
        ["kc-api-partner", "kc-api-partner-verify", "kc-broker-name"]
            .map(|name| arrived.header(name).map(str::to_owned))
    };
    let text = |text: &str| Some(text.to_owned());
    assert_eq!(
        headers(&received[0]),
        [text("FakeSpotPartner"), text("true"), text("FakeBrokerND")]
    );
    assert_eq!(
        headers(&received[1]),
        [text("FakeFuturesPartner"), text("true"), None]
    );
    assert_eq!(headers(&received[2]), [None, None, None]);
    assert_eq!(received[2].header("kc-api-partner-sign"), None);
    assert!(
        received
            .iter()
            .all(|arrived| arrived.signature == Signature::Verified)
    );
    // Public requests have no partner headers: a partner's signature includes the API key.
    let mut maker = lab.bot("maker").await;
    let public = on("main", Scope::SpotMargin, Method::Get, "/api/v1/timestamp");
    maker.send(public).await.unwrap();
    let arrived = lab.kucoin.received().pop().unwrap();
    assert!(
        arrived
            .headers
            .iter()
            .all(|(name, _)| !name.starts_with("kc-")),
        "{arrived:?}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn simulator_rejects_a_wrong_secret_passphrase_or_partner_key() {
    let wrong_partner = SimKey {
        partners: partner("FakeSpotPartner", "fake-partner-key-of-futures"),
        ..spot()
    };
    let wrong_passphrase = SimKey {
        passphrase: "another".to_owned(),
        ..futures()
    };
    let wrong_secret = SimKey {
        api_secret: "another".to_owned(),
        ..SimKey::fake(23)
    };
    let mut lab = lab([wrong_partner, wrong_passphrase, wrong_secret]).await;
    for arrived in read_all(&lab).await {
        assert!(
            matches!(arrived.signature, Signature::Refused(_)),
            "{arrived:?}"
        );
    }
    lab.stop().await;
}

#[tokio::test]
async fn nothing_is_sent_when_the_partner_key_is_missing() {
    let without = SimKey {
        partners: Vec::new(),
        ..spot()
    };
    let mut lab = lab([without, futures(), SimKey::fake(23)]).await;
    let mut maker = lab.bot("maker").await;
    let request = on("main", Scope::SpotMargin, Method::Get, "/api/v1/accounts");
    let (code, reason, outcome, id) = failure(&maker.send(request).await.unwrap_err());
    assert_eq!(
        (code, reason.as_str()),
        (Code::FailedPrecondition, "KEY_UNAVAILABLE")
    );
    assert_eq!(outcome, "not_sent");
    assert!(lab.kucoin.received().is_empty());
    assert_eq!(
        lab.audit_of(&id).last().unwrap()["reason"],
        "KEY_UNAVAILABLE"
    );
    lab.stop().await;
}

#[tokio::test]
async fn only_australian_accounts_send_the_site_type_header() {
    let mut arena = Arena::start().await;
    for (bot, account) in [
        ("aussie", "australia"),
        ("maker", "main"),
        ("euro", "europe"),
        ("turk", "turkey"),
    ] {
        for path in ["/api/v1/timestamp", "/api/v1/accounts"] {
            let request = on(account, Scope::SpotMargin, Method::Get, path);
            arena.bot(bot).send(request).await.unwrap();
            let arrived = arena.lab.kucoin.received().pop().unwrap();
            let expected = (account == "australia").then_some("australia");
            assert_eq!(arrived.header("x-site-type"), expected, "{account} {path}");
        }
    }
    arena.lab.stop().await;
}
