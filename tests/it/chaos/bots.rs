//! Bots that call all the time, and keep what they were told about each order.
//!
//! One repeats a call as docs/bots.md says: only after `RetryInfo`, with the same clientOid. The other one never does.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use credbroker::clock::Clock;
use credbroker::proto::resolution::State;
use credbroker::proto::{
    GetOutcomeRequest, GetOutcomeResponse, Method, Outcome, Resolution, Scope, SignAndSendRequest,
    SignAndSendResponse,
};
use credbroker_sim::pki::{Ca, Identity};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tonic::Status;
use tonic_types::StatusExt;

use super::judge::{Attempt, Told};
use crate::harness::{Bot, Patient, accounts, futures_order, patient, request, spot_order, until};

/// The bot that repeats calls, and the one that does not.
pub(crate) const NAMES: [&str; 2] = ["repeats", "once"];

/// Calls in flight per bot: below the broker's limit.
const IN_FLIGHT: u32 = 150;

/// How long a bot waits for an answer, beyond its deadline.
const NO_ANSWER_AFTER: Duration = Duration::from_secs(30);

/// How often an order is sent at most.
const ATTEMPTS: usize = 4;

/// The longest pause before a call is repeated: a test is short.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Orders that a test can send again.
const SENDABLE: usize = 2000;

/// What calls are like at the moment.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    /// The row, which is the first part of each clientOid.
    pub(crate) row: &'static str,
    pub(crate) deadline: Duration,
    /// How long after its start an order may leave.
    pub(crate) not_after: Duration,
    /// Bots cancel every second order, at most after this time.
    pub(crate) hang_up: Option<Duration>,
}

impl Plan {
    pub(crate) fn usual(row: &'static str) -> Self {
        Self {
            row,
            deadline: Duration::from_secs(4),
            not_after: Duration::from_secs(3),
            hang_up: None,
        }
    }
}

/// An order, as its bot knows it.
pub(crate) struct BotOrder {
    /// The row of its last call.
    pub(crate) row: &'static str,
    pub(crate) scope: Scope,
    pub(crate) attempts: Vec<Attempt>,
}

pub(crate) struct Bots {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

struct Shared {
    address: Mutex<SocketAddr>,
    roots: [String; 1],
    plan: Mutex<Plan>,
    orders: Mutex<HashMap<String, BotOrder>>,
    /// Orders that were placed: clientOid and request.
    sendable: Mutex<VecDeque<(String, SignAndSendRequest)>>,
    bots: [OneBot; 2],
    started: AtomicU64,
    hung_up: AtomicU64,
    /// How often a call failed with each reason.
    reasons: Mutex<HashMap<String, u64>>,
}

struct OneBot {
    name: &'static str,
    repeats: bool,
    identity: Identity,
    connection: tokio::sync::Mutex<Option<Patient>>,
    /// The exchange's clock minus this machine's.
    offset_ms: AtomicI64,
    /// Orders to cancel.
    open: Mutex<VecDeque<(String, Scope)>>,
    in_flight: Arc<Semaphore>,
}

fn now_ms() -> i64 {
    Clock::system().wall_ms()
}

impl Bots {
    /// Prepares the bots; they call once [`Bots::start`] is called.
    pub(crate) fn new(address: SocketAddr, ca: &Ca) -> Self {
        let bots = NAMES.map(|name| OneBot {
            name,
            repeats: name == "repeats",
            identity: ca.bot(name).unwrap(),
            connection: tokio::sync::Mutex::default(),
            offset_ms: AtomicI64::new(0),
            open: Mutex::default(),
            in_flight: Arc::new(Semaphore::new(IN_FLIGHT as usize)),
        });
        let shared = Shared {
            address: Mutex::new(address),
            roots: [ca.certificate_pem().to_owned()],
            plan: Mutex::new(Plan::usual("start")),
            orders: Mutex::default(),
            sendable: Mutex::default(),
            bots,
            started: AtomicU64::new(0),
            hung_up: AtomicU64::new(0),
            reasons: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
            tasks: Vec::new(),
        }
    }

    /// Starts to call, this often per second in all.
    pub(crate) async fn start(&mut self, per_second: u32) {
        let every = Duration::from_secs(NAMES.len() as u64) / per_second;
        for at in 0..NAMES.len() {
            let shared = Arc::clone(&self.shared);
            // Learns the exchange's time.
            shared.call(&shared.bots[at], accounts()).await;
            self.tasks.push(tokio::spawn(shared.run(at, every)));
        }
    }

    /// Makes no more calls, and waits for those in flight.
    pub(crate) async fn stop(&mut self) {
        self.tasks.drain(..).for_each(|task| task.abort());
        until("the calls in flight end", async || self.in_flight() == 0).await;
    }

    pub(crate) fn plan(&self, plan: Plan) {
        *self.shared.plan.lock().unwrap() = plan;
    }

    /// The row that is running.
    pub(crate) fn row(&self) -> &'static str {
        self.shared.plan.lock().unwrap().row
    }

    /// Calls that have started so far.
    pub(crate) fn started(&self) -> u64 {
        self.shared.started.load(Ordering::Relaxed)
    }

    pub(crate) fn in_flight(&self) -> u64 {
        let left = self.shared.bots.iter();
        left.map(|bot| u64::from(IN_FLIGHT) - bot.in_flight.available_permits() as u64)
            .sum()
    }

    /// Calls that bots have cancelled so far.
    pub(crate) fn hung_up(&self) -> u64 {
        self.shared.hung_up.load(Ordering::Relaxed)
    }

    /// How often a call has failed with this reason.
    pub(crate) fn failed_with(&self, reason: &str) -> u64 {
        let reasons = self.shared.reasons.lock().unwrap();
        reasons.get(reason).copied().unwrap_or_default()
    }

    pub(crate) fn take_orders(&self) -> HashMap<String, BotOrder> {
        std::mem::take(&mut *self.shared.orders.lock().unwrap())
    }

    /// Orders that were placed, newest first.
    pub(crate) fn known_orders(&self, count: usize) -> Vec<(String, SignAndSendRequest)> {
        let sendable = self.shared.sendable.lock().unwrap();
        sendable.iter().rev().take(count).cloned().collect()
    }

    /// Sends an order with this clientOid once, as the bot that does not repeat calls.
    pub(crate) async fn send(&self, oid: &str, order: SignAndSendRequest) -> Told {
        let plan = *self.shared.plan.lock().unwrap();
        let bot = &self.shared.bots[1];
        let oids = [oid.to_owned()];
        self.shared.attempt(bot, plan, &oids, order, None).await;
        let orders = self.shared.orders.lock().unwrap();
        let last = orders[oid].attempts.last();
        last.unwrap().told.clone()
    }

    /// What `GetOutcome` says about an order; `None` if that fails.
    pub(crate) async fn outcome(&self, oid: &str, scope: Scope) -> Option<GetOutcomeResponse> {
        let mut bot = Bot::over(self.shared.connected(&self.shared.bots[0]).await);
        let question = GetOutcomeRequest {
            account: "main".to_owned(),
            scope: scope.into(),
            client_oid: oid.to_owned(),
            ..GetOutcomeRequest::default()
        };
        let answer = timeout(NO_ANSWER_AFTER, bot.client.get_outcome(question)).await;
        Some(answer.ok()?.ok()?.into_inner())
    }
}

impl Drop for Bots {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Shared {
    async fn run(self: Arc<Self>, at: usize, every: Duration) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for step in 0_u64.. {
            ticks.tick().await;
            let bot = &self.bots[at];
            let permit = Arc::clone(&bot.in_flight).acquire_owned().await.unwrap();
            let shared = Arc::clone(&self);
            tokio::spawn(async move {
                shared.step(&shared.bots[at], step).await;
                drop(permit);
            });
        }
    }

    /// One call of the mix: mostly orders.
    async fn step(&self, bot: &OneBot, step: u64) {
        let plan = *self.plan.lock().unwrap();
        let oid = format!("{}_{}_{}", plan.row, &bot.name[..1], step);
        match step % 10 {
            4 | 9 => {
                let order = futures_order(&oid);
                self.place(bot, plan, step, &[oid], order).await;
            }
            5 => {
                let oids: Vec<_> = (0..3).map(|item| format!("{oid}_{item}")).collect();
                self.place(bot, plan, step, &oids, batch(&oids)).await;
            }
            6 => {
                let order = bot.open.lock().unwrap().pop_front();
                let call = order.map_or_else(accounts, |(oid, scope)| cancel(&oid, scope));
                self.call(bot, call).await;
            }
            7 => self.call(bot, accounts()).await,
            number => {
                let mut order = spot_order(&oid);
                if number == 8 {
                    order.resolve_ms = 12_000;
                }
                self.place(bot, plan, step, &[oid], order).await;
            }
        }
    }

    /// Sends orders, and again if the bot repeats calls and may do so.
    async fn place(
        &self,
        bot: &OneBot,
        plan: Plan,
        step: u64,
        oids: &[String],
        order: SignAndSendRequest,
    ) {
        let hang_up = plan.hang_up.filter(|_| step.is_multiple_of(2));
        // At different places on its way through the broker.
        let hang_up = hang_up.map(|longest| longest * u32::try_from(step % 10).unwrap() / 8);
        for _ in 0..ATTEMPTS {
            let pause = self.attempt(bot, plan, oids, order.clone(), hang_up).await;
            match pause.filter(|_| bot.repeats) {
                Some(pause) => sleep(pause.min(LONGEST_PAUSE)).await,
                None => return,
            }
        }
    }

    /// Sends orders once. Returns how long to wait before the call may be repeated; `None`: it must not be.
    async fn attempt(
        &self,
        bot: &OneBot,
        plan: Plan,
        oids: &[String],
        mut order: SignAndSendRequest,
        hang_up: Option<Duration>,
    ) -> Option<Duration> {
        let connection = self.connected(bot).await;
        let offset_ms = bot.offset_ms.load(Ordering::Relaxed);
        let after_ms = i64::try_from(plan.not_after.as_millis()).unwrap();
        order.not_after_ms = now_ms() + offset_ms + after_ms;
        let waits = Duration::from_millis(order.resolve_ms.into());
        let scope = order.scope();
        for oid in oids {
            let mut orders = self.orders.lock().unwrap();
            let order_of_bot = orders.entry(oid.clone()).or_insert_with(|| BotOrder {
                row: plan.row,
                scope,
                attempts: Vec::new(),
            });
            order_of_bot.row = plan.row;
            order_of_bot.attempts.push(Attempt {
                not_after_ms: order.not_after_ms,
                told: Told::NoAnswer,
            });
        }
        self.started.fetch_add(1, Ordering::Relaxed);
        let again = order.clone();
        let mut client = Bot::over(connection);
        let call = client.send_within(order, plan.deadline + waits);
        let Ok(result) = timeout(hang_up.unwrap_or(NO_ANSWER_AFTER), call).await else {
            self.hung_up
                .fetch_add(u64::from(hang_up.is_some()), Ordering::Relaxed);
            return None;
        };
        self.learn(bot, &result).await;
        let told: Vec<_> = oids.iter().map(|oid| told(&result, oid)).collect();
        for (oid, told) in oids.iter().zip(&told) {
            if matches!(told, Told::Placed(_)) {
                bot.open.lock().unwrap().push_back((oid.clone(), scope));
                let mut sendable = self.sendable.lock().unwrap();
                if let [oid] = oids {
                    sendable.push_back((oid.clone(), again.clone()));
                }
                if sendable.len() > SENDABLE {
                    sendable.pop_front();
                }
            }
            let mut orders = self.orders.lock().unwrap();
            let attempts = &mut orders.get_mut(oid).unwrap().attempts;
            attempts.last_mut().unwrap().told = told.clone();
        }
        let retry = result.err()?.get_details_retry_info()?;
        let pause = retry.retry_delay.unwrap_or_default();
        told.iter()
            .all(|told| *told == Told::NotSent)
            .then_some(pause)
    }

    /// Sends a call that places nothing.
    async fn call(&self, bot: &OneBot, call: SignAndSendRequest) {
        let mut client = Bot::over(self.connected(bot).await);
        self.started.fetch_add(1, Ordering::Relaxed);
        let plan = *self.plan.lock().unwrap();
        if let Ok(result) = timeout(NO_ANSWER_AFTER, client.send_within(call, plan.deadline)).await
        {
            self.learn(bot, &result).await;
        }
    }

    /// Takes what every reply has: the exchange's time, and the reason of a failure.
    async fn learn(&self, bot: &OneBot, result: &Result<SignAndSendResponse, Status>) {
        let info = result.as_ref().err().map(StatusExt::get_details_error_info);
        let time_ms = match (result, info.flatten()) {
            (Ok(answer), _) => answer.broker_time_ms,
            (Err(_), Some(info)) => {
                let mut reasons = self.reasons.lock().unwrap();
                *reasons.entry(info.reason).or_default() += 1;
                let time_ms = info.metadata.get("broker_time_ms");
                time_ms.map_or(0, |time_ms| time_ms.parse().unwrap())
            }
            (Err(_), None) => {
                // The next call connects again.
                *bot.connection.lock().await = None;
                0
            }
        };
        if time_ms != 0 {
            bot.offset_ms.store(time_ms - now_ms(), Ordering::Relaxed);
        }
    }

    /// The bot's connection; waits until there is one.
    async fn connected(&self, bot: &OneBot) -> Patient {
        let mut connection = bot.connection.lock().await;
        loop {
            if let Some(open) = connection.as_ref().filter(|open| open.is_open()) {
                return open.clone();
            }
            let address = *self.address.lock().unwrap();
            let connecting = patient(address, &self.roots, &bot.identity);
            match timeout(Duration::from_secs(2), connecting).await {
                Ok(Ok(new)) => *connection = Some(new),
                _ => sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

/// What the result of a call says about one of its orders.
fn told(result: &Result<SignAndSendResponse, Status>, oid: &str) -> Told {
    let answer = match result {
        Ok(answer) => answer,
        Err(status) => {
            let Some(info) = status.get_details_error_info() else {
                return Told::NoAnswer;
            };
            let text = |key: &str| info.metadata.get(key).cloned();
            return match text("outcome").as_deref() {
                Some("not_sent") => Told::NotSent,
                Some(_) => Told::Maybe,
                None => Told::Repeated(text("order_outcome").unwrap_or_default(), text("order_id")),
            };
        }
    };
    let items: Vec<_> = answer
        .items
        .iter()
        .filter(|item| item.client_oid == oid)
        .collect();
    let (outcome, item_id) = match items[..] {
        [item] => (item.outcome(), item.order_id.clone()),
        _ if answer.items.is_empty() => (answer.outcome(), String::new()),
        _ => (Outcome::MaybeSent, String::new()),
    };
    let state = answer.resolution.as_ref().map(Resolution::state);
    match outcome {
        Outcome::Accepted => {
            let resolved = answer
                .resolution
                .as_ref()
                .map(|found| found.order_id.clone());
            let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
            let in_body = body["data"]["orderId"].as_str().map(str::to_owned);
            let ids = [Some(item_id), resolved, in_body].into_iter().flatten();
            Told::Placed(ids.into_iter().find(|id| !id.is_empty()))
        }
        Outcome::Rejected if state == Some(State::Absent) => Told::Absent,
        Outcome::Rejected => Told::Rejected,
        _ if state == Some(State::Unknown) => Told::Unknown,
        _ => Told::Maybe,
    }
}

fn batch(oids: &[String]) -> SignAndSendRequest {
    let order = |oid: &String| json!({"clientOid": oid, "side": "buy", "symbol": "BTC-USDT", "type": "limit", "price": "10000", "size": "0.001"});
    let orders: Vec<_> = oids.iter().map(order).collect();
    let body = json!({ "orderList": orders }).to_string();
    let path = "/api/v1/hf/orders/multi";
    request(Scope::SpotMargin, Method::Post, path, &body)
}

fn cancel(oid: &str, scope: Scope) -> SignAndSendRequest {
    let (path, symbol) = match scope {
        Scope::Futures => ("/api/v1/orders/client-order", "XBTUSDTM"),
        _ => ("/api/v1/hf/orders/client-order", "BTC-USDT"),
    };
    let target = format!("{path}/{oid}?symbol={symbol}");
    request(scope, Method::Delete, &target, "")
}
