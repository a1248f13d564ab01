//! Load of eight bots on a broker, with simulated Vault and KuCoin as separate processes: every call ends exactly once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use credbroker::proto::{Method, Scope, SignAndSendRequest};
use credbroker_sim::installation::{MAIN_UID, Settings, grant};
use credbroker_sim::kucoin::{Fault, FaultAction, When};
use serde_json::{Value, json};

use crate::drive::{self, Simulator, word};
use crate::harness::{Lab, accounts, failure, futures_order, print_always, request, spot_order};

const BOTS: usize = 8;
const CALLS: usize = 10_000;

/// Faults of the exchange: path, requests to skip, fault.
fn faults() -> [(&'static str, u32, FaultAction); 6] {
    let close = |when| FaultAction::Close { when };
    let bad_gateway = FaultAction::Html {
        status: 502,
        when: When::AfterProcessing,
    };
    let orders = "/api/v1/hf/orders";
    [
        (orders, 100, close(When::AfterProcessing)),
        (orders, 0, close(When::BeforeProcessing)),
        (orders, 0, FaultAction::CutShort { bytes: 7 }),
        ("/api/v1/orders", 50, bad_gateway),
        ("/api/v1/accounts", 10, close(When::AfterProcessing)),
        (orders, 0, FaultAction::Delay { ms: 400 }),
    ]
}

/// How a call ended: the outcome of its answer, or outcome and reason of its failure.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Ending {
    outcome: String,
    reason: Option<String>,
}

#[tokio::test]
async fn each_of_ten_thousand_mixed_calls_has_exactly_one_audited_outcome() {
    let (_vault, kucoin, settings) = drive::simulators(drive::AS_TEST).await;
    for (path, skip, action) in faults() {
        let fault = Fault {
            skip,
            times: Some(25),
            ..Fault::once(path, action)
        };
        kucoin.control("POST", "fault", json!(fault)).await;
    }
    let mut rules =
        String::from("[account.main]\nkey = { spot-margin = \"main\", futures = \"main\" }\n");
    for bot in 0..BOTS {
        for scope in ["spot-margin", "futures"] {
            let allow = "\"read\", \"trade\", \"public\"";
            rules += &grant(&format!("bot-{bot}"), "main", scope, allow);
        }
    }
    let settings = Settings { rules, ..settings };
    let mut lab = Lab::with(settings).await;

    let mut bots = Vec::new();
    for number in 0..BOTS {
        let mut bot = lab.patient_bot(&format!("bot-{number}")).await;
        bots.push(tokio::spawn(async move {
            let mut endings = BTreeMap::new();
            for step in 0..CALLS / BOTS {
                let id = format!("{number}-{step}");
                let mut call = nth_call(&id, step);
                call.request_id = id.clone();
                // Shorter than the delay of some orders, and long enough for most calls.
                let ending = match bot
                    .send_within(
                        call,
                        Duration::from_millis(if step % 5 == 0 { 300 } else { 20_000 }),
                    )
                    .await
                {
                    Ok(answer) => Ending {
                        outcome: word(answer.outcome()).to_owned(),
                        reason: None,
                    },
                    Err(status) => {
                        let (_, reason, outcome, named) = failure(&status);
                        assert_eq!(named, id);
                        Ending {
                            outcome,
                            reason: Some(reason),
                        }
                    }
                };
                endings.insert(id, ending);
            }
            endings
        }));
    }
    let mut endings = BTreeMap::new();
    for bot in bots {
        endings.extend(bot.await.unwrap());
    }
    assert_eq!(endings.len(), CALLS);
    lab.process().terminate();
    assert_eq!(
        lab.process().exit_code().await,
        Some(0),
        "{}",
        lab.process().log()
    );

    // The audit log has each call once, with the outcome that the bot received.
    let mut lines: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for line in lab.audit() {
        lines
            .entry(line["request_id"].as_str().unwrap().to_owned())
            .or_default()
            .push(line);
    }
    assert_eq!(
        lines.keys().collect::<BTreeSet<_>>(),
        endings.keys().collect::<BTreeSet<_>>()
    );
    let mut kinds = BTreeMap::new();
    for (id, ending) in &endings {
        let events: Vec<_> = lines[id]
            .iter()
            .map(|line| line["event"].as_str().unwrap())
            .collect();
        let end = match events.as_slice() {
            ["denied"] => &lines[id][0],
            ["intent", "outcome"]
            | ["intent", "outcome", "late_answer" | "resolved"]
            | ["intent", "outcome", "late_answer", "resolved"] => &lines[id][1],
            _ => panic!("{id}: {events:?}"),
        };
        let audited = Ending {
            outcome: end["outcome"].as_str().unwrap().to_owned(),
            reason: end["reason"].as_str().map(ToOwned::to_owned),
        };
        assert_eq!(&audited, ending, "{id}");
        *kinds
            .entry((ending.outcome.clone(), ending.reason.clone()))
            .or_insert(0) += 1;
    }
    print_always(&format!("outcomes of {CALLS} calls: {kinds:#?}"));
    for kind in [
        ("accepted", None),
        ("rejected", None),
        ("maybe_sent", Some("ANSWER_LOST")),
        ("not_sent", Some("POLICY_DENIED")),
        ("not_sent", Some("REQUEST_MALFORMED")),
        ("maybe_sent", None),
    ] {
        let kind = (kind.0.to_owned(), kind.1.map(ToOwned::to_owned));
        assert!(
            kinds.contains_key(&kind),
            "no call ended as {kind:?}: {kinds:?}"
        );
    }
    check_orders(&kucoin, &endings, &lines).await;
}

/// Checks that every accepted order exists once, and that no order exists that was rejected or not sent.
async fn check_orders(
    kucoin: &Simulator,
    endings: &BTreeMap<String, Ending>,
    lines: &BTreeMap<String, Vec<Value>>,
) {
    let orders = format!("orders?uid={MAIN_UID}");
    let orders = kucoin.control("GET", &orders, json!({})).await;
    let mut placed: BTreeMap<&str, usize> = BTreeMap::new();
    for order in orders.as_array().unwrap() {
        *placed
            .entry(order["client_oid"].as_str().unwrap())
            .or_default() += 1;
    }
    for (id, ending) in endings {
        let is_order = lines[id][0]["event"] == "intent"
            && lines[id][0]["endpoint"]
                .as_str()
                .unwrap()
                .ends_with("orders")
            && lines[id][0]["method"] == "POST";
        let count = placed.get(id.as_str()).copied().unwrap_or_default();
        match ending.outcome.as_str() {
            "accepted" if is_order => assert_eq!(count, 1, "{id}"),
            "maybe_sent" if is_order => assert!(count <= 1, "{id}"),
            _ => assert_eq!(count, 0, "{id}: {ending:?}"),
        }
    }
}

fn nth_call(id: &str, step: usize) -> SignAndSendRequest {
    let spot = Scope::SpotMargin;
    match step % 10 {
        0..=2 => spot_order(id),
        3 | 4 => futures_order(id),
        5 => accounts(),
        6 => request(
            spot,
            Method::Get,
            "/api/v1/hf/orders/client-order/none?symbol=BTC-USDT",
            "",
        ),
        7 => request(
            Scope::Futures,
            Method::Delete,
            "/api/v1/orders/client-order/none?symbol=XBTUSDTM",
            "",
        ),
        8 => request(spot, Method::Post, "/api/v3/withdrawals", "{}"),
        _ => request(spot, Method::Get, "/api/v1/../accounts", ""),
    }
}
