//! Broker, simulated Vault and simulated KuCoin as separate processes, eight bots at once: every call ends once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use credbroker::proto::{Method, Outcome, Scope, SignAndSendRequest};
use credbroker_sim::kucoin::{
    Fault, FaultAction, KucoinSettings, KucoinSim, Limits, Matching, SimKey, When,
};
use credbroker_sim::vault::VaultSim;
use serde_json::Value;

use crate::harness::{
    Addresses, Lab, MAIN_UID, ROOT_TOKEN, Settings, accounts, failure, futures_order, kv_path,
    request, say, secret, spot_order,
};

const BOTS: usize = 8;
const CALLS: usize = 10_000;

/// Set in the environment of the process that shall be a simulator.
const ROLE: &str = "CREDBROKER_TEST_ROLE";

/// Not a test of its own: the load test starts this binary again, with a role, to have simulators in other processes.
#[tokio::test]
async fn a_simulator_in_a_process_of_its_own() {
    let role = std::env::var_os(ROLE);
    match role.as_ref().and_then(|role| role.to_str()) {
        Some("kucoin") => {
            let settings = KucoinSettings {
                limits: Limits::none(),
                keep_requests: 2 * CALLS,
                ..KucoinSettings::default()
            };
            let sim = KucoinSim::start(settings).await.unwrap();
            sim.add_key(SimKey::fake(MAIN_UID));
            for (path, skip, action) in [
                (
                    "/api/v1/hf/orders",
                    100,
                    FaultAction::Close {
                        when: When::AfterTaken,
                    },
                ),
                (
                    "/api/v1/hf/orders",
                    0,
                    FaultAction::Close {
                        when: When::BeforeTaken,
                    },
                ),
                ("/api/v1/hf/orders", 0, FaultAction::CutShort { bytes: 7 }),
                (
                    "/api/v1/orders",
                    50,
                    FaultAction::Html {
                        status: 502,
                        when: When::AfterTaken,
                    },
                ),
                (
                    "/api/v1/accounts",
                    10,
                    FaultAction::Close {
                        when: When::AfterTaken,
                    },
                ),
                ("/api/v1/hf/orders", 0, FaultAction::Delay { ms: 400 }),
            ] {
                sim.fault(Fault {
                    host: None,
                    method: None,
                    path: path.to_owned(),
                    matching: Matching::Exact,
                    skip,
                    times: Some(25),
                    action,
                });
            }
            println!(
                "\naddress {}\naddress {}",
                sim.spot_url(),
                sim.futures_url()
            );
            until_stdin_closes().await;
        }
        Some("vault") => {
            let sim = VaultSim::start_dev(ROOT_TOKEN).await.unwrap();
            sim.mount_kv("kv");
            sim.put_secret(
                "kv",
                &kv_path("main", "main"),
                secret(&SimKey::fake(MAIN_UID)),
            );
            println!("\naddress {}", sim.address());
            until_stdin_closes().await;
        }
        _ => {}
    }
}

/// The parent's end of the pipe goes with the parent, so that no simulator outlives its test.
async fn until_stdin_closes() {
    let read = || std::io::stdin().read_to_end(&mut Vec::new());
    tokio::task::spawn_blocking(read).await.unwrap().unwrap();
}

struct Simulator(Child, Vec<String>);

impl Simulator {
    fn start(role: &str, addresses: usize) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "load::a_simulator_in_a_process_of_its_own",
                "--exact",
                "--nocapture",
            ])
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok);
        let found = lines.filter_map(|line| line.strip_prefix("address ").map(ToOwned::to_owned));
        let found: Vec<_> = found.take(addresses).collect();
        assert_eq!(found.len(), addresses, "{role} did not start");
        Self(child, found)
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a bot was told: an answer's outcome, or a failure's.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Told {
    outcome: String,
    reason: Option<String>,
}

#[tokio::test]
async fn ten_thousand_mixed_calls_each_end_in_exactly_one_outcome_and_its_lines() {
    let (vault, kucoin) = (Simulator::start("vault", 1), Simulator::start("kucoin", 2));
    let addresses = Addresses {
        vault: vault.1[0].clone(),
        spot: kucoin.1[0].clone(),
        futures: kucoin.1[1].clone(),
    };
    let mut rules =
        String::from("[account.main]\nkey = { spot-margin = \"main\", futures = \"main\" }\n");
    for bot in 0..BOTS {
        for scope in ["spot-margin", "futures"] {
            let _ = write!(
                rules,
                "[[grant]]\nbot = \"spiffe://demo.test/bot/bot-{bot}\"\naccount = \"main\"\nscope = \"{scope}\"\nallow = [\"read\", \"trade\", \"public\"]\n"
            );
        }
    }
    let settings = Settings {
        rules,
        addresses: Some(addresses),
        process: true,
        config: "[log]\nfilter = \"warn,credbroker::server=info\"".to_owned(),
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;

    let mut bots = Vec::new();
    for number in 0..BOTS {
        let mut bot = lab.patient_bot(&format!("bot-{number}")).await;
        bots.push(tokio::spawn(async move {
            let mut told = BTreeMap::new();
            for step in 0..CALLS / BOTS {
                let id = format!("{number}-{step}");
                let mut call = nth_call(&id, step);
                call.request_id = id.clone();
                // Some of the delayed orders outlast this, and most calls do not.
                let ended = match bot
                    .send_within(
                        call,
                        Duration::from_millis(if step % 5 == 0 { 300 } else { 20_000 }),
                    )
                    .await
                {
                    Ok(answer) => Told {
                        outcome: word(answer.outcome()).to_owned(),
                        reason: None,
                    },
                    Err(status) => {
                        let (_, reason, outcome, named) = failure(&status);
                        assert_eq!(named, id);
                        Told {
                            outcome,
                            reason: Some(reason),
                        }
                    }
                };
                told.insert(id, ended);
            }
            told
        }));
    }
    let mut told = BTreeMap::new();
    for bot in bots {
        told.extend(bot.await.unwrap());
    }
    assert_eq!(told.len(), CALLS);
    lab.process().terminate();
    assert_eq!(
        lab.process().exit_code().await,
        Some(0),
        "{}",
        lab.process().log()
    );

    // The record tells of each call what its bot was told, once.
    let mut lines: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for line in lab.audit() {
        lines
            .entry(line["request_id"].as_str().unwrap().to_owned())
            .or_default()
            .push(line);
    }
    assert_eq!(
        lines.keys().collect::<BTreeSet<_>>(),
        told.keys().collect::<BTreeSet<_>>()
    );
    let mut kinds = BTreeMap::new();
    for (id, told) in &told {
        let events: Vec<_> = lines[id]
            .iter()
            .map(|line| line["event"].as_str().unwrap())
            .collect();
        let end = match events.as_slice() {
            ["denied"] => &lines[id][0],
            ["intent", "outcome"] | ["intent", "outcome", "learnt"] => &lines[id][1],
            _ => panic!("{id}: {events:?}"),
        };
        let recorded = Told {
            outcome: end["outcome"].as_str().unwrap().to_owned(),
            reason: end["reason"].as_str().map(ToOwned::to_owned),
        };
        assert_eq!(&recorded, told, "{id}");
        *kinds
            .entry((told.outcome.clone(), told.reason.clone()))
            .or_insert(0) += 1;
    }
    say(&format!("{CALLS} calls ended as: {kinds:#?}"));
    for kind in [
        ("accepted", None),
        ("rejected", None),
        ("maybe_sent", Some("ANSWER_LOST")),
        ("not_sent", Some("POLICY_DENIED")),
        ("not_sent", Some("REQUEST_MALFORMED")),
        ("maybe_sent", None),
    ] {
        let kind = (kind.0.to_owned(), kind.1.map(ToOwned::to_owned));
        assert!(kinds.contains_key(&kind), "{kind:?} is not among {kinds:?}");
    }
    check_orders(&kucoin.1[0], &told, &lines).await;
}

/// Every order that a bot was told is accepted exists once; one that was not sent does not exist.
async fn check_orders(
    spot: &str,
    told: &BTreeMap<String, Told>,
    lines: &BTreeMap<String, Vec<Value>>,
) {
    let orders = crate::harness::http_get(spot, &format!("/_sim/orders?uid={MAIN_UID}")).await;
    let orders: Value = serde_json::from_str(&orders).unwrap();
    let mut placed: BTreeMap<&str, usize> = BTreeMap::new();
    for order in orders["orders"]
        .as_array()
        .or_else(|| orders.as_array())
        .unwrap()
    {
        *placed
            .entry(order["client_oid"].as_str().unwrap())
            .or_default() += 1;
    }
    for (id, told) in told {
        let is_order = lines[id][0]["event"] == "intent"
            && lines[id][0]["endpoint"]
                .as_str()
                .unwrap()
                .ends_with("orders")
            && lines[id][0]["method"] == "POST";
        let count = placed.get(id.as_str()).copied().unwrap_or_default();
        match told.outcome.as_str() {
            "accepted" if is_order => assert_eq!(count, 1, "{id}"),
            "maybe_sent" if is_order => assert!(count <= 1, "{id}"),
            _ => assert_eq!(count, 0, "{id}: {told:?}"),
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

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Accepted => "accepted",
        Outcome::MaybeSent => "maybe_sent",
        Outcome::Rejected => "rejected",
        Outcome::Unspecified => "unspecified",
    }
}
