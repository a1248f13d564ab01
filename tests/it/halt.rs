//! The emergency stop: nothing new gets through, everything open is withdrawn, and what is not is reported.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use credbroker::proto::{
    Cancelled, HaltRequest, Method, Outcome, ResumeRequest, Scope, SignAndSendRequest,
};
use credbroker_sim::installation::{MAIN_UID, RULES, Settings, kv_path};
use credbroker_sim::kucoin::{
    Fault, FaultAction, KucoinSettings, KucoinSim, Limits, Order, ReceivedRequest, SimKey, When,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::harness::{Bot, Lab, Patient, Time, refusal, request, spot_order, until};

const OTHER_UID: u64 = 1002;
const HOUR: Duration = Duration::from_secs(3600);

/// Bot `maker` trades in every scope on both accounts.
fn rules() -> String {
    let accounts = RULES.split("[[grant]]").next().unwrap();
    let keys = "key = { spot-margin = \"main\" }";
    let every = "key = { spot-margin = \"main\", futures = \"main\", unified = \"main\" }";
    let mut rules = accounts.replace(keys, every);
    for account in ["main", "other"] {
        for scope in ["spot-margin", "futures", "unified"] {
            let _ = write!(
                rules,
                "[[grant]]\nbot = \"spiffe://demo.test/bot/maker\"\naccount = \"{account}\"\nscope = \"{scope}\"\n\
                 allow = [\"read\", \"trade\"]\n"
            );
        }
    }
    rules
}

fn settings() -> Settings {
    Settings {
        rules: rules(),
        ..Settings::default()
    }
}

/// One order of each kind that the exchange knows: scope, path, and what it says beside its clientOid.
fn kinds() -> Vec<(Scope, &'static str, Value)> {
    let mut kinds = Vec::new();
    let spot = json!({"symbol": "BTC-USDT", "side": "sell", "type": "limit", "price": "70000", "size": "0.01"});
    let stop = json!({"stopPrice": "65000"});
    let oco = json!({"stopPrice": "50000", "limitPrice": "49000"});
    let isolated = json!({"isIsolated": true});
    let [order, margin_stop, margin_oco] = [
        "/api/v3/hf/margin/order",
        "/api/v3/hf/margin/stop-order",
        "/api/v3/hf/margin/oco-order",
    ];
    for (path, parts) in [
        ("/api/v1/hf/orders", vec![]),
        ("/api/v1/hf/orders", vec![&json!({"symbol": "ETH-USDT"})]),
        (order, vec![]),
        (order, vec![&isolated, &json!({"symbol": "ETH-USDT"})]),
        ("/api/v1/stop-order", vec![&stop]),
        (
            "/api/v1/stop-order",
            vec![&stop, &json!({"tradeType": "MARGIN_TRADE"})],
        ),
        (
            "/api/v1/stop-order",
            vec![&stop, &json!({"tradeType": "MARGIN_ISOLATED_TRADE"})],
        ),
        (margin_stop, vec![&stop]),
        (margin_stop, vec![&stop, &isolated]),
        ("/api/v3/oco/order", vec![&oco]),
        (margin_oco, vec![&oco]),
        (margin_oco, vec![&oco, &isolated]),
    ] {
        kinds.push((Scope::SpotMargin, path, with(&spot, &parts)));
    }
    let futures =
        json!({"symbol": "XBTUSDTM", "side": "buy", "type": "limit", "price": "50000", "size": 1});
    for (path, part) in [
        ("/api/v1/orders", json!({})),
        (
            "/api/v1/orders",
            json!({"symbol": "ETHUSDTM", "price": "2000"}),
        ),
        (
            "/api/v1/orders",
            json!({"stop": "down", "stopPrice": "50500", "stopPriceType": "MP"}),
        ),
        (
            "/api/v1/st-orders",
            json!({"symbol": "ETHUSDTM", "price": "2000", "triggerStopDownPrice": "1900"}),
        ),
    ] {
        kinds.push((Scope::Futures, path, with(&futures, &[&part])));
    }
    let unified = json!({"side": "BUY", "orderType": "LIMIT", "price": "2000", "size": "1"});
    let trigger = json!({"triggerPrice": "1900"});
    for parts in [
        vec![&json!({"tradeType": "SPOT", "symbol": "ETH-USDT"})],
        vec![
            &json!({"tradeType": "SPOT", "symbol": "ETH-USDT"}),
            &trigger,
        ],
        vec![&json!({"tradeType": "MARGIN", "symbol": "ETH-USDT"})],
        vec![
            &json!({"tradeType": "MARGIN", "symbol": "ETH-USDT", "marginMode": "ISOLATED"}),
            &trigger,
        ],
        vec![&json!({"tradeType": "FUTURES", "symbol": "ETHUSDTM"})],
        vec![&json!({"tradeType": "FUTURES", "symbol": "XBTUSDTM", "marginMode": "ISOLATED"})],
        vec![
            &json!({"tradeType": "FUTURES", "symbol": "ETHUSDTM"}),
            &trigger,
        ],
    ] {
        kinds.push((
            Scope::Unified,
            "/api/ua/v2/unified/order/place",
            with(&unified, &parts),
        ));
    }
    kinds
}

fn with(order: &Value, parts: &[&Value]) -> Value {
    let mut order = order.as_object().unwrap().clone();
    for part in parts {
        order.extend(part.as_object().unwrap().clone());
    }
    Value::Object(order)
}

/// An order of kind `number`, counted round.
fn order(account: &str, number: usize, client_oid: &str) -> SignAndSendRequest {
    let kinds = kinds();
    let (scope, path, mut body) = kinds[number % kinds.len()].clone();
    body["clientOid"] = json!(client_oid);
    let mut order = request(scope, Method::Post, path, &body.to_string());
    account.clone_into(&mut order.account);
    order
}

async fn placed(bot: &mut Bot<Patient>, order: SignAndSendRequest) {
    let answer = bot.send(order.clone()).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted, "{order:?} {answer:?}");
}

/// One open order of each kind on each of these accounts.
async fn place_each_kind(lab: &Lab, accounts: &[&str]) {
    let mut bot = lab.patient_bot("maker").await;
    for account in accounts {
        for number in 0..kinds().len() {
            placed(
                &mut bot,
                order(account, number, &format!("{account}-{number}")),
            )
            .await;
        }
    }
}

fn open(kucoin: &KucoinSim) -> Vec<Order> {
    let mut orders = kucoin.orders(MAIN_UID);
    orders.extend(kucoin.orders(OTHER_UID));
    orders.retain(Order::is_open);
    orders
}

async fn cancel_all(lab: &Lab) -> Vec<Cancelled> {
    let request = HaltRequest {
        account: String::new(),
        all: true,
        cancel_all: true,
    };
    let response = lab.admin_client("anna").await.halt(request).await;
    response.unwrap().into_inner().cancelled
}

fn of(cancelled: &[Cancelled], account: &str, scope: Scope) -> Cancelled {
    let found = cancelled
        .iter()
        .find(|one| one.account == account && one.scope() == scope);
    found.unwrap().clone()
}

/// What was said about the requests whose question begins so.
fn said(cancelled: &Cancelled, question: &str) -> Vec<(bool, String)> {
    let probes = cancelled.probes.iter();
    let about = probes.filter(|probe| probe.question.starts_with(question));
    about
        .map(|probe| (probe.is_ok, probe.answer.clone()))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_orders_of_every_kind_are_cancelled_while_bots_place_more() {
    let mut lab = Lab::with(settings()).await;
    lab.kucoin.set_cancel_lag(Duration::from_millis(300));
    let mut bot = lab.patient_bot("maker").await;
    for number in 0..100 {
        for account in ["main", "other"] {
            placed(
                &mut bot,
                order(account, number, &format!("{account}-{number}")),
            )
            .await;
        }
    }
    assert_eq!(open(&lab.kucoin).len(), 200);

    let (goes_on, refusals) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
    let mut bots = Vec::new();
    for account in ["main", "other"] {
        let (mut bot, goes_on, refusals) =
            (bot.clone(), Arc::clone(&goes_on), Arc::clone(&refusals));
        bots.push(tokio::spawn(async move {
            let (mut accepted, mut number) = (0, 0);
            while goes_on.load(Ordering::Relaxed) {
                number += 1;
                match bot
                    .send(order(account, number, &format!("more-{account}-{number}")))
                    .await
                {
                    Ok(answer) => {
                        assert_eq!(answer.outcome(), Outcome::Accepted);
                        accepted += 1;
                    }
                    Err(status) => {
                        assert_eq!(refusal(Err(status)).1, "ACCOUNT_FROZEN");
                        refusals.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            accepted
        }));
    }
    until("the bots have begun", async || {
        open(&lab.kucoin).len() > 230
    })
    .await;
    // One that has left when the halt begins, and lands long after the first cancellation.
    let path = "/api/v3/hf/margin/stop-order";
    lab.kucoin
        .fault(Fault::once(path, FaultAction::Delay { ms: 2500 }));
    let late = {
        let mut bot = bot.clone();
        let order = order("main", 7, "late");
        assert!(order.path == path);
        tokio::spawn(async move { placed(&mut bot, order).await })
    };
    let arrived = || {
        lab.kucoin
            .received()
            .iter()
            .any(|request| String::from_utf8_lossy(&request.body).contains("\"late\""))
    };
    until("the late one has left", async || arrived()).await;
    let has_landed = || {
        lab.kucoin
            .orders(MAIN_UID)
            .iter()
            .any(|order| order.client_oid.as_deref() == Some("late"))
    };

    let before = refusals.load(Ordering::Relaxed);
    assert_eq!(before, 0);
    let halted = lab
        .admin_cli("anna", &["halt", "--all", "--cancel-all"])
        .await;
    let (left, count) = (
        open(&lab.kucoin),
        lab.kucoin.orders(MAIN_UID).len() + lab.kucoin.orders(OTHER_UID).len(),
    );
    assert!(left.is_empty(), "{left:?}");
    assert!(has_landed());
    assert_eq!(
        (halted.code, halted.stderr.as_str()),
        (Some(0), ""),
        "{}",
        halted.stdout
    );
    for account in ["main", "other"] {
        for scope in ["futures", "spot-margin", "unified"] {
            let line = format!("\n{account} in {scope}: none open\n");
            assert!(halted.stdout.contains(&line), "{}", halted.stdout);
        }
    }
    late.await.unwrap();

    // The bots go on trying, and get nowhere.
    let now = refusals.load(Ordering::Relaxed);
    until("the bots have tried again", async || {
        refusals.load(Ordering::Relaxed) > now + 100
    })
    .await;
    goes_on.store(false, Ordering::Relaxed);
    let mut accepted = 0;
    for bot in bots {
        accepted += bot.await.unwrap();
    }
    let orders: Vec<_> = [MAIN_UID, OTHER_UID]
        .iter()
        .flat_map(|uid| lab.kucoin.orders(*uid))
        .collect();
    assert_eq!(orders.len(), count, "one was placed after the halt");
    assert_eq!(count, 200 + 1 + accepted);
    assert!(open(&lab.kucoin).is_empty());

    let mut acts = lab.acts();
    acts.retain(|act| act["who"] == "spiffe://demo.test/admin/anna");
    assert!(acts.iter().all(|act| act["outcome"] == "done"), "{acts:?}");
    let acts: Vec<_> = acts
        .iter()
        .map(|act| act["action"].as_str().unwrap())
        .collect();
    assert_eq!(
        acts,
        [
            "halt",
            "cancel-all",
            "cancel-all",
            "cancel-all",
            "cancel-all",
            "cancel-all",
            "cancel-all"
        ]
    );
    let resumed = lab.admin_cli("anna", &["resume", "--all", "--yes"]).await;
    assert_eq!(resumed.code, Some(0), "{resumed:?}");
    placed(&mut bot, order("main", 0, "after")).await;
    assert_eq!(open(&lab.kucoin).len(), 1);
    lab.stop().await;
}

#[tokio::test]
async fn one_request_that_fails_keeps_no_other_from_being_tried_and_what_stays_is_reported() {
    let mut lab = Lab::with(settings()).await;
    place_each_kind(&lab, &["main"]).await;
    let busy = |path: &str, method: &str| Fault {
        method: Some(method.to_owned()),
        times: None,
        ..Fault::once(
            path,
            FaultAction::Answer {
                status: 200,
                body: json!({"code": "200002", "msg": "cancel is \u{1b}[2J suspended"}),
                when: When::BeforeTaken,
            },
        )
    };
    lab.kucoin.fault(busy("/api/v3/oco/orders", "DELETE"));
    lab.kucoin
        .fault(busy("/api/ua/v2/unified/order/open-list", "GET"));
    let cancelled = cancel_all(&lab).await;

    let spot = of(&cancelled, "main", Scope::SpotMargin);
    assert_eq!(spot.still_open, Some(1), "{spot:?}");
    let [(false, answer)] = &said(&spot, "DELETE /api/v3/oco/orders")[..] else {
        panic!("{spot:?}")
    };
    assert!(answer.starts_with("200002"), "{answer}");
    assert_eq!(
        said(&spot, "GET /api/v3/oco/orders"),
        [(false, "1 open".to_owned())]
    );
    assert_eq!(
        said(&spot, "DELETE /api/v1/hf/orders/cancelAll"),
        [(true, "taken".to_owned())]
    );
    assert_eq!(of(&cancelled, "main", Scope::Futures).still_open, Some(0));
    let unified = of(&cancelled, "main", Scope::Unified);
    assert_eq!(unified.still_open, None);
    let told = said(&unified, "GET /api/ua/v2/unified/order/open-list");
    assert_eq!(told.len(), 6);
    assert!(
        told.iter()
            .all(|(is_ok, answer)| !is_ok && answer.starts_with("not known: 200002")),
        "{told:?}"
    );
    let is_unified = |order: &&Order| order.fields.get("orderType").is_some();
    let left = open(&lab.kucoin);
    let unified_left = left.iter().filter(is_unified).count();
    assert_eq!((left.len(), unified_left), (8, 7), "{left:?}");
    let act = |account: &str, detail: &str| {
        let mut acts = lab.acts().into_iter();
        let found = acts.find(|act| act["account"] == account && act["detail"] == detail);
        found.unwrap_or_else(|| panic!("no act says {detail}"))["outcome"].clone()
    };
    assert_eq!(act("main", "spot-margin: still open: 1"), "failed");
    assert_eq!(act("main", "unified: open orders unknown"), "failed");
    assert_eq!(act("main", "futures: nothing is open"), "done");
    assert_eq!(act("other", "spot-margin: nothing is open"), "done");

    lab.kucoin.clear_faults();
    let again = lab
        .admin_cli("anna", &["halt", "main", "--cancel-all"])
        .await;
    assert_eq!(again.code, Some(0), "{again:?}");
    assert!(open(&lab.kucoin).is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn an_answer_that_is_no_list_does_not_say_that_nothing_is_open() {
    let mut lab = Lab::with(settings()).await;
    place_each_kind(&lab, &["main"]).await;
    let answers = |path: &str, body: Value| Fault {
        method: Some("GET".to_owned()),
        times: None,
        ..Fault::once(
            path,
            FaultAction::Answer {
                status: 200,
                body,
                when: When::BeforeTaken,
            },
        )
    };
    let taken = |data: Value| json!({"code": "200000", "data": data});
    let odd = [
        ("/api/v1/stop-order", json!({"code": "200000"})),
        ("/api/v3/oco/orders", taken(json!({"total": 0}))),
        ("/api/v1/stopOrders", taken(json!("maintenance"))),
        (
            "/api/ua/v2/unified/order/open-list",
            taken(
                json!({"items": [{"symbol": "BTC\u{1b}[2J"}, {"side": "BUY"}, {"symbol": "ETH-USDT"}], "totalPage": 1}),
            ),
        ),
        (
            "/api/v1/hf/orders/active/symbols",
            taken(json!({"symbols": ["BTC\u{1b}[2J", "", 7, "ETH-USDT"]})),
        ),
    ];
    for (path, body) in odd {
        lab.kucoin.fault(answers(path, body));
    }
    let cancelled = cancel_all(&lab).await;
    for scope in [Scope::SpotMargin, Scope::Futures, Scope::Unified] {
        assert_eq!(of(&cancelled, "main", scope).still_open, None, "{scope:?}");
    }
    let expected = "not known: unexpected answer to the list request";
    for (scope, question) in [
        (Scope::SpotMargin, "GET /api/v1/stop-order tradeType=TRADE"),
        (Scope::SpotMargin, "GET /api/v3/oco/orders"),
        (Scope::SpotMargin, "GET /api/v1/hf/orders/active"),
        (Scope::Futures, "GET /api/v1/stopOrders"),
        (
            Scope::Unified,
            "GET /api/ua/v2/unified/order/open-list tradeType=SPOT orderFilter=NORMAL",
        ),
    ] {
        let told = said(&of(&cancelled, "main", scope), question);
        assert_eq!(told, [(false, expected.to_owned())], "{question}");
    }
    // What could be read of a list is cancelled.
    let asked = said(
        &of(&cancelled, "main", Scope::Unified),
        "POST /api/ua/v2/unified/order/cancel-all tradeType=SPOT orderFilter=NORMAL symbol=ETH-USDT",
    );
    assert!(matches!(&asked[..], [(true, _)]), "{asked:?}");
    let mut probes = cancelled.iter().flat_map(|one| &one.probes);
    assert!(!probes.any(|probe| probe.question.contains('\u{1b}')));
    lab.stop().await;
}

#[tokio::test]
async fn a_key_without_a_permission_is_no_failure_of_the_rest() {
    let mut lab = Lab::with(settings()).await;
    let mut bot = lab.patient_bot("maker").await;
    for number in [0, 1, 4] {
        placed(&mut bot, order("main", number, &format!("{number}"))).await;
    }
    lab.kucoin.add_key(SimKey {
        permissions: vec!["Spot".to_owned()],
        ..SimKey::fake(MAIN_UID)
    });
    let shown = lab
        .admin_cli("anna", &["halt", "main", "--cancel-all"])
        .await;
    assert_eq!(shown.code, Some(0), "{shown:?}");
    let words: Vec<_> = shown.stdout.split_whitespace().collect();
    let text = words.join(" ");
    for part in [
        "main in spot-margin: none open",
        "main in futures: none open",
        "warning GET /api/v3/hf/margin/orders/active tradeType=MARGIN_TRADE: skipped: key lacks permission: 400007",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(open(&lab.kucoin).is_empty());
    lab.stop().await;
}

fn account_of(request: &ReceivedRequest) -> Option<&str> {
    request.header("kc-api-key")
}

#[tokio::test]
async fn an_exchange_that_says_too_many_is_waited_for() {
    let mut limits = Limits::none();
    limits.pools.insert("Spot".to_owned(), 60);
    limits.window_ms = 1500;
    let mut lab = Lab::with(settings()).await;
    place_each_kind(&lab, &["main", "other"]).await;
    lab.kucoin.set_limits(limits);
    let path = "/api/v1/stopOrders";
    let reset_ms = Some(1700);
    let fault = Fault::once(path, FaultAction::RateLimited { reset_ms });
    lab.kucoin.fault(Fault {
        method: Some("DELETE".to_owned()),
        ..fault
    });
    let from = lab.kucoin.received().len();
    let cancelled = cancel_all(&lab).await;
    for one in &cancelled {
        assert_eq!(one.still_open, Some(0), "{one:?}");
    }
    assert!(open(&lab.kucoin).is_empty());
    let received = lab.kucoin.received().split_off(from);
    let told = received.iter().find(|request| request.fault).unwrap();
    let again = received.iter().find(|request| {
        !request.fault
            && request.target == told.target
            && request.method == told.method
            && account_of(request) == account_of(told)
    });
    let waited_ms = again.unwrap().at_ms - told.at_ms;
    assert!(
        waited_ms >= 1700,
        "it was told to wait, and waited {waited_ms} ms"
    );
    let refused: BTreeSet<_> = received
        .iter()
        .filter(|request| request.code() == Some("429000"))
        .map(|request| request.uid)
        .collect();
    assert!(refused.len() >= 2, "nobody was told to wait: {refused:?}");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_that_no_clock_can_hold_ends_no_halt() {
    let exchange = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = exchange.local_addr().unwrap();
    let asked = Arc::new(AtomicBool::new(false));
    let is_asked = Arc::clone(&asked);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = exchange.accept().await.unwrap();
            let is_asked = Arc::clone(&is_asked);
            tokio::spawn(async move {
                let mut head = [0; 4096];
                let length = stream.read(&mut head).await.unwrap_or_default();
                if head[..length].starts_with(b"DELETE ") {
                    is_asked.store(true, Ordering::Relaxed);
                }
                let answer = format!(
                    "HTTP/1.1 429 Too Many Requests\r\nretry-after: {}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
                    u64::MAX
                );
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    let mut lab = Lab::with(Settings {
        spot_url: Some(format!("http://{address}")),
        wait_ready: false,
        ..settings()
    })
    .await;
    lab.until_keys().await;
    let mut admin = lab.admin_client("bert").await;
    let resumed = async {
        until("a cancellation has been sent", async || {
            asked.load(Ordering::Relaxed)
        })
        .await;
        // So that it does not try for as long as it may.
        let all = ResumeRequest {
            account: String::new(),
            all: true,
        };
        admin.resume(all).await.unwrap();
    };
    let (cancelled, ()) = tokio::join!(cancel_all(&lab), resumed);
    let spot = of(&cancelled, "main", Scope::SpotMargin);
    assert_eq!(spot.still_open, None, "{spot:?}");
    lab.stop().await;
}

#[tokio::test]
async fn a_key_that_is_gone_is_told_and_other_accounts_go_on() {
    let mut lab = Lab::with(settings()).await;
    place_each_kind(&lab, &["main", "other"]).await;
    lab.vault.delete_latest("kv", &kv_path("main", "main"));
    until("the key is gone", async || {
        let gone = "key_available{account=\"main\",key=\"main\"}";
        lab.metric(gone).await == Some(0.0)
    })
    .await;
    let before = lab.kucoin.received().len();
    let cancelled = cancel_all(&lab).await;
    for one in &cancelled {
        assert_eq!(
            one.still_open,
            (one.account == "other").then_some(0),
            "{one:?}"
        );
    }
    let main = of(&cancelled, "main", Scope::Futures);
    assert_eq!(main.probes.len(), 1, "{main:?}");
    assert!(
        main.probes[0].answer.contains("is not available"),
        "{main:?}"
    );
    let of_main = lab
        .kucoin
        .received()
        .split_off(before)
        .into_iter()
        .filter(|request| request.uid == Some(MAIN_UID));
    assert_eq!(of_main.count(), 0);
    assert_eq!(open(&lab.kucoin).len(), kinds().len());
    lab.stop().await;
}

#[tokio::test]
async fn orders_are_cancelled_whatever_else_is_wrong() {
    let mut lab = Lab::with(settings()).await;
    // What is withdrawn without a record is in the log alone.
    lab.is_checked = false;
    place_each_kind(&lab, &["main", "other"]).await;
    lab.stop().await;
    // No record, the wrong address, a Vault that has been silent for an hour, and a time that nobody knows.
    lab.reconfigure(
        "[egress]\n",
        "[audit]\nfile = \"/dev/full\"\n[egress]\nexpected_ip = \"127.0.0.3\"\n",
    );
    let time = Time::new(0);
    lab.start_broker_on(time.clock()).await;
    lab.until_keys().await;
    lab.vault.seal();
    time.pass(&lab, HOUR).await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(
        refusal(bot.send(spot_order("never")).await).1,
        "EGRESS_MISMATCH"
    );
    let (_, text) = lab.get("/readyz").await;
    for part in ["audit: ", "egress: ", "Vault last confirmed it"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let cancelled = cancel_all(&lab).await;
    for one in &cancelled {
        assert_eq!(one.still_open, Some(0), "{one:?}");
    }
    assert_eq!(cancelled.len(), 6);
    assert!(open(&lab.kucoin).is_empty());
    lab.server.take().unwrap().stop().await;
}

#[tokio::test]
async fn one_account_is_halted_alone() {
    let mut lab = Lab::with(Settings {
        kucoin: KucoinSettings {
            limits: Limits::none(),
            ..KucoinSettings::default()
        },
        ..settings()
    })
    .await;
    place_each_kind(&lab, &["main", "other"]).await;
    let halted = lab.admin_cli("anna", &["halt", "main"]).await;
    assert_eq!(halted.code, Some(0), "{halted:?}");
    assert!(
        halted
            .stdout
            .contains("`credbroker halt main --cancel-all`"),
        "{}",
        halted.stdout
    );
    assert_eq!(
        open(&lab.kucoin).len(),
        2 * kinds().len(),
        "nobody asked for that"
    );
    let halted = lab
        .admin_cli("anna", &["halt", "main", "--cancel-all"])
        .await;
    assert_eq!(halted.code, Some(0), "{halted:?}");
    let left = open(&lab.kucoin);
    assert!(left.len() == kinds().len() && left.iter().all(|order| order.uid == OTHER_UID));
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(
        refusal(bot.send(order("main", 0, "never")).await).1,
        "ACCOUNT_FROZEN"
    );
    placed(&mut bot, order("other", 0, "goes-on")).await;
    // A halt of all is not undone by one account's resume.
    assert_eq!(
        lab.admin_cli("anna", &["halt", "--all"]).await.code,
        Some(0)
    );
    let resumed = lab.admin_cli("anna", &["resume", "main"]).await;
    assert!(
        resumed
            .stdout
            .contains("but: all accounts are still halted: `credbroker resume --all` lifts it."),
        "{resumed:?}"
    );
    assert_eq!(
        refusal(bot.send(order("main", 0, "never")).await).1,
        "ACCOUNT_FROZEN"
    );
    for words in [&["halt"][..], &["halt", "main", "--all"], &["resume"]] {
        assert_eq!(
            lab.admin_cli("anna", words).await.code,
            Some(2),
            "{words:?}"
        );
    }
    lab.stop().await;
}

#[tokio::test]
async fn a_full_disk_keeps_nobody_from_withdrawing_orders_and_is_told() {
    let mut lab = Lab::with(settings()).await;
    place_each_kind(&lab, &["main"]).await;
    let in_the_way = lab.path("state/restrictions.json.new");
    std::fs::create_dir(&in_the_way).unwrap();
    let halted = lab
        .admin_cli("anna", &["halt", "--all", "--cancel-all"])
        .await;
    assert_eq!(
        (halted.code, halted.stderr.as_str()),
        (Some(1), ""),
        "{}",
        halted.stdout
    );
    let text = halted
        .stdout
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    assert!(
        text.contains("failed: it is in force, but not on disk, and a restart would lift it"),
        "{text}"
    );
    assert!(open(&lab.kucoin).is_empty());
    std::fs::remove_dir(in_the_way).unwrap();
    let halted = lab
        .admin_cli("anna", &["halt", "--all", "--cancel-all"])
        .await;
    assert_eq!(halted.code, Some(0), "{}", halted.stdout);
    lab.stop().await;
}
