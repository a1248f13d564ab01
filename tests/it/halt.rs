//! The emergency stop: new orders are rejected, open orders are cancelled, and remaining ones are reported.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use credbroker::proto::{
    Cancelled, HaltRequest, Method, Outcome, ResumeRequest, Scope, SignAndSendRequest,
};
use credbroker_sim::installation::{MAIN_UID, RULES, Settings, kv_path};
use credbroker_sim::kucoin::{
    Fault, FaultAction, Host, KucoinSettings, KucoinSim, Limits, Order, ReceivedRequest, SimKey,
    When,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::harness::{Bot, Lab, Patient, Time, refusal, request, spot_order, until};

const OTHER_UID: u64 = 1002;
const HOUR: Duration = Duration::from_secs(3600);

/// Rules that let bot `maker` trade in every scope on both accounts.
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

/// One order of each kind that the exchange supports: scope, path, and body without clientOid.
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

/// An order of kind `number`, modulo the number of kinds.
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

/// Places one order of each kind on each of these accounts.
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

/// The results of the requests that start with `request`: whether each succeeded, and the answer.
fn results_of(cancelled: &Cancelled, request: &str) -> Vec<(bool, String)> {
    let requests = cancelled.requests.iter();
    let about = requests.filter(|one| one.request.starts_with(request));
    about.map(|one| (one.is_ok, one.result.clone())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn halt_cancels_200_orders_of_every_kind_while_bots_place_more() {
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

    let (keep_running, refusals) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
    let mut bots = Vec::new();
    for account in ["main", "other"] {
        let (mut bot, keep_running, refusals) = (
            bot.clone(),
            Arc::clone(&keep_running),
            Arc::clone(&refusals),
        );
        bots.push(tokio::spawn(async move {
            let (mut accepted, mut number) = (0, 0);
            while keep_running.load(Ordering::Relaxed) {
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
    until("the bots have placed more orders", async || {
        open(&lab.kucoin).len() > 230
    })
    .await;
    // An order that is in flight when the halt starts, and is placed long after the first cancel request.
    let path = "/api/v3/hf/margin/stop-order";
    lab.kucoin
        .fault(Fault::once(path, FaultAction::Delay { ms: 2500 }));
    let late = {
        let mut bot = bot.clone();
        let order = order("main", 7, "late");
        assert!(order.path == path);
        tokio::spawn(async move { placed(&mut bot, order).await })
    };
    let is_in_flight = || {
        lab.kucoin
            .received()
            .iter()
            .any(|request| String::from_utf8_lossy(&request.body).contains("\"late\""))
    };
    until("the late order is in flight", async || is_in_flight()).await;
    let is_placed = || {
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
    assert!(is_placed());
    assert_eq!(
        (halted.code, halted.stderr.as_str()),
        (Some(0), ""),
        "{}",
        halted.stdout
    );
    for account in ["main", "other"] {
        for scope in ["futures", "spot-margin", "unified"] {
            let line = format!("\n{account} in {scope}: no open orders\n");
            assert!(halted.stdout.contains(&line), "{}", halted.stdout);
        }
    }
    late.await.unwrap();

    // The bots keep trying, and every order is rejected.
    let now = refusals.load(Ordering::Relaxed);
    until("the bots have tried again", async || {
        refusals.load(Ordering::Relaxed) > now + 100
    })
    .await;
    keep_running.store(false, Ordering::Relaxed);
    let mut accepted = 0;
    for bot in bots {
        accepted += bot.await.unwrap();
    }
    let orders: Vec<_> = [MAIN_UID, OTHER_UID]
        .iter()
        .flat_map(|uid| lab.kucoin.orders(*uid))
        .collect();
    assert_eq!(orders.len(), count, "an order was placed after the halt");
    assert_eq!(count, 200 + 1 + accepted);
    assert!(open(&lab.kucoin).is_empty());

    let mut acts = lab.acts();
    acts.retain(|act| act["principal"] == "spiffe://demo.test/admin/anna");
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
async fn cancel_all_continues_after_a_failed_request_and_reports_the_remaining_orders() {
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
                when: When::BeforeProcessing,
            },
        )
    };
    lab.kucoin.fault(busy("/api/v3/oco/orders", "DELETE"));
    lab.kucoin
        .fault(busy("/api/ua/v2/unified/order/open-list", "GET"));
    let cancelled = cancel_all(&lab).await;

    let spot = of(&cancelled, "main", Scope::SpotMargin);
    assert_eq!(spot.still_open, Some(1), "{spot:?}");
    let [(false, answer)] = &results_of(&spot, "DELETE /api/v3/oco/orders")[..] else {
        panic!("{spot:?}")
    };
    assert!(answer.starts_with("200002"), "{answer}");
    assert_eq!(
        results_of(&spot, "GET /api/v3/oco/orders"),
        [(false, "still open: 1".to_owned())]
    );
    assert_eq!(
        results_of(&spot, "DELETE /api/v1/hf/orders/cancelAll"),
        [(true, "accepted".to_owned())]
    );
    assert_eq!(of(&cancelled, "main", Scope::Futures).still_open, Some(0));
    let unified = of(&cancelled, "main", Scope::Unified);
    assert_eq!(unified.still_open, None);
    let listed = results_of(&unified, "GET /api/ua/v2/unified/order/open-list");
    assert_eq!(listed.len(), 6);
    assert!(
        listed
            .iter()
            .all(|(is_ok, answer)| !is_ok && answer.starts_with("unknown: 200002")),
        "{listed:?}"
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
    assert_eq!(act("main", "futures: no open orders"), "done");
    assert_eq!(act("other", "spot-margin: no open orders"), "done");

    lab.kucoin.clear_faults();
    let again = lab
        .admin_cli("anna", &["halt", "main", "--cancel-all"])
        .await;
    assert_eq!(again.code, Some(0), "{again:?}");
    assert!(open(&lab.kucoin).is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn open_orders_are_unknown_when_the_exchange_returns_no_valid_list() {
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
                when: When::BeforeProcessing,
            },
        )
    };
    let ok_answer = |data: Value| json!({"code": "200000", "data": data});
    let invalid = [
        ("/api/v1/stop-order", json!({"code": "200000"})),
        ("/api/v3/oco/orders", ok_answer(json!({"total": 0}))),
        ("/api/v1/stopOrders", ok_answer(json!("maintenance"))),
        (
            "/api/ua/v2/unified/order/open-list",
            ok_answer(
                json!({"items": [{"symbol": "BTC\u{1b}[2J"}, {"side": "BUY"}, {"symbol": "ETH-USDT"}], "totalPage": 1}),
            ),
        ),
        (
            "/api/v1/hf/orders/active/symbols",
            ok_answer(json!({"symbols": ["BTC\u{1b}[2J", "", 7, "ETH-USDT"]})),
        ),
    ];
    for (path, body) in invalid {
        lab.kucoin.fault(answers(path, body));
    }
    let cancelled = cancel_all(&lab).await;
    for scope in [Scope::SpotMargin, Scope::Futures, Scope::Unified] {
        assert_eq!(of(&cancelled, "main", scope).still_open, None, "{scope:?}");
    }
    let expected = "unknown: unexpected answer to the list request";
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
        let results = results_of(&of(&cancelled, "main", scope), question);
        assert_eq!(results, [(false, expected.to_owned())], "{question}");
    }
    // Orders in the readable part of a list are cancelled.
    let cancels = results_of(
        &of(&cancelled, "main", Scope::Unified),
        "POST /api/ua/v2/unified/order/cancel-all tradeType=SPOT orderFilter=NORMAL symbol=ETH-USDT",
    );
    assert!(matches!(&cancels[..], [(true, _)]), "{cancels:?}");
    let mut probes = cancelled.iter().flat_map(|one| &one.requests);
    assert!(!probes.any(|probe| probe.request.contains('\u{1b}')));
    lab.stop().await;
}

#[tokio::test]
async fn cancel_all_skips_requests_that_the_key_lacks_permission_for() {
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
        "main in spot-margin: no open orders",
        "main in futures: no open orders",
        "warning GET /api/v3/hf/margin/orders/active tradeType=MARGIN_TRADE: not listed, because this key has no access to these orders (400007",
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
async fn cancel_all_waits_when_the_exchange_limits_its_rate() {
    let mut limits = Limits::none();
    // Assumed weights are a fifth of it.
    limits.pools.insert("Spot".to_owned(), 100);
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
    let limited = received.iter().find(|request| request.fault).unwrap();
    let again = received.iter().find(|request| {
        !request.fault
            && request.target == limited.target
            && request.method == limited.method
            && account_of(request) == account_of(limited)
    });
    let waited_ms = again.unwrap().at_ms - limited.at_ms;
    assert!(
        waited_ms >= 1700,
        "waited only {waited_ms} ms instead of 1700 ms"
    );
    // The broker holds back what exceeds the limit: one window was not enough.
    let at_spot = received.iter().filter(|request| request.host == Host::Spot);
    let mut at_ms: Vec<_> = at_spot.map(|request| request.at_ms).collect();
    at_ms.sort_unstable();
    let took_ms = at_ms.last().unwrap() - at_ms.first().unwrap();
    assert!(took_ms >= 1500, "took only {took_ms} ms");
    let rejected = received.iter().filter(|request| {
        let is_rejected = request.code() == Some("429000");
        is_rejected && !request.fault
    });
    assert_eq!(rejected.count(), 0);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancel_all_survives_a_retry_after_too_large_for_the_clock() {
    let exchange = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = exchange.local_addr().unwrap();
    let was_requested = Arc::new(AtomicBool::new(false));
    let set_requested = Arc::clone(&was_requested);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = exchange.accept().await.unwrap();
            let set_requested = Arc::clone(&set_requested);
            tokio::spawn(async move {
                let mut head = [0; 4096];
                let length = stream.read(&mut head).await.unwrap_or_default();
                if head[..length].starts_with(b"DELETE ") {
                    set_requested.store(true, Ordering::Relaxed);
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
    lab.until_keys_loaded().await;
    let mut admin = lab.admin_client("bert").await;
    let resumed = async {
        until("a cancellation has been sent", async || {
            was_requested.load(Ordering::Relaxed)
        })
        .await;
        // Otherwise the broker would try until its time limit.
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
async fn cancel_all_reports_a_deleted_key_and_continues_with_other_accounts() {
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
    assert_eq!(main.requests.len(), 1, "{main:?}");
    assert!(
        main.requests[0].result.contains("is not available"),
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
async fn cancel_all_works_without_audit_log_vault_and_verified_egress_address() {
    let mut lab = Lab::with(settings()).await;
    // Unaudited cancels appear only in the log.
    lab.is_audit_checked = false;
    place_each_kind(&lab, &["main", "other"]).await;
    lab.stop().await;
    // No audit log, a wrong egress address, and a Vault that has been sealed for an hour.
    lab.reconfigure(
        "[egress]\n",
        "[audit]\nfile = \"/dev/full\"\n[egress]\nexpected_ip = \"127.0.0.3\"\n",
    );
    let time = Time::new(0);
    lab.start_broker_on(time.clock()).await;
    lab.until_keys_loaded().await;
    lab.vault.seal();
    time.pass(&lab, HOUR).await;
    let mut bot = lab.patient_bot("maker").await;
    assert_eq!(
        refusal(bot.send(spot_order("never")).await).1,
        "EGRESS_MISMATCH"
    );
    let (_, text) = lab.get("/readyz").await;
    for part in ["audit: ", "egress: ", "Vault last confirmed the key"] {
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
async fn dead_man_switch_is_renewed_on_a_halted_account_and_not_weakened() {
    let mut lab = Lab::start().await;
    let mut bot = lab.patient_bot("maker").await;
    let set = |timeout: i64, symbols: &str| {
        let body = json!({"timeout": timeout, "symbols": symbols}).to_string();
        let path = "/api/v1/hf/orders/dead-cancel-all";
        request(Scope::SpotMargin, Method::Post, path, &body)
    };
    let (both, one) = ("BTC-USDT,ETH-USDT", "BTC-USDT");
    placed(&mut bot, set(60, both)).await;
    let halted = lab.admin_cli("anna", &["halt", "main"]).await;
    assert_eq!(halted.code, Some(0), "{halted:?}");
    for renewal in [set(60, both), set(5, ""), set(300, "")] {
        placed(&mut bot, renewal).await;
    }
    let unified = r#"{"timeout":60,"symbols":""}"#;
    let unified = request(Scope::Unified, Method::Post, "/api/ua/v1/dcp/set", unified);
    let before = lab.kucoin.received().len();
    for weaker in [set(301, ""), set(-1, ""), set(4, ""), set(60, one), unified] {
        let body = weaker.body.clone();
        let refused = refusal(bot.send(weaker).await);
        assert_eq!(refused.1, "ACCOUNT_FROZEN", "{body:?}");
    }
    assert_eq!(lab.kucoin.received().len(), before);
    lab.stop().await;
}

#[tokio::test]
async fn halt_of_one_account_leaves_the_others_running() {
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
        "a halt without --cancel-all must not cancel orders"
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
    // Resuming one account does not lift a halt of all accounts.
    assert_eq!(
        lab.admin_cli("anna", &["halt", "--all"]).await.code,
        Some(0)
    );
    let resumed = lab.admin_cli("anna", &["resume", "main"]).await;
    assert!(
        resumed.stdout.contains(
            "but: all accounts are still halted; run `credbroker resume --all` to lift that"
        ),
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
async fn cancel_all_works_when_restrictions_json_cannot_be_written() {
    let mut lab = Lab::with(settings()).await;
    place_each_kind(&lab, &["main"]).await;
    let obstacle = lab.path("state/restrictions.json.new");
    std::fs::create_dir(&obstacle).unwrap();
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
        text.contains("failed: the change is in effect but not saved, and a restart would undo it"),
        "{text}"
    );
    assert!(open(&lab.kucoin).is_empty());
    std::fs::remove_dir(obstacle).unwrap();
    let halted = lab
        .admin_cli("anna", &["halt", "--all", "--cancel-all"])
        .await;
    assert_eq!(halted.code, Some(0), "{}", halted.stdout);
    lab.stop().await;
}
