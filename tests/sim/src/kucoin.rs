//! The simulated KuCoin: two hosts in front of one exchange that verifies every signature with its own code, keeps
//! balances and orders, and fails on demand.
//!
//! Where KuCoin's documentation leaves something open, a comment says what is assumed. There are no streams, no moving
//! prices, no fees and no positions. It listens on loopback only, and every answer has the header `X-Credbroker-Sim: 1`.

mod accounts;
mod amount;
mod answers;
mod auth;
mod call;
mod catalog;
mod conditional;
mod control;
mod exchange;
mod faults;
mod futures;
mod limits;
mod market;
mod orders;
mod pages;
mod record;
mod spot;
mod unified;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};

pub use accounts::Wallet;
pub use amount::{Amount, BadAmount};
pub use auth::{Partner, SimKey, Site};
pub use catalog::Host;
pub use faults::{Fault, FaultAction, Matching, When};
pub use limits::Limits;
pub use orders::{Book, Order, OrderState, Side};
pub use record::{CreatedOrder, ReceivedRequest, Signature};

use self::accounts::Accounts;
use self::auth::KeyRules;
use self::catalog::Catalog;
use self::exchange::{Clock, Exchange};
use self::limits::{Quota, Usage};
use self::record::Records;
use crate::http::{Received, Reply, Server};

/// Enough for any test; bounds the memory of a simulator that runs for days.
const KEPT_REQUESTS: usize = 10_000;

/// The settings of a simulator.
#[derive(Clone)]
pub struct KucoinSettings {
    /// Address of the spot host; must be loopback. Default: 127.0.0.1, port 0.
    pub spot: SocketAddr,
    /// Address of the futures host; must be loopback. Default: 127.0.0.1, port 0.
    pub futures: SocketAddr,
    /// TLS for both hosts; `None`: plain HTTP.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Rate limits. Default: those of VIP 0.
    pub limits: Limits,
    /// How far the exchange's clock is ahead of this machine's, in milliseconds.
    pub clock_offset_ms: i64,
    /// Keys of an older version are rejected with 400008. Default: 2, because KuCoin switched version 1 off in 2021.
    pub oldest_key_version: u8,
    /// The site that is simulated: keys of other sites do not exist here. Default: the global one.
    pub site: Site,
    /// Whether a version 3 key also works with the header value 2, as ccxt sends it; otherwise that is rejected with
    /// 400009. Default: true.
    pub two_opens_three: bool,
    /// How many requests to keep for [`KucoinSim::received`]; 0: none. Default: 10000.
    pub keep_requests: usize,
}

impl Default for KucoinSettings {
    fn default() -> Self {
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self {
            spot: any_port,
            futures: any_port,
            tls: None,
            limits: Limits::default(),
            clock_offset_ms: 0,
            oldest_key_version: 2,
            site: Site::default(),
            two_opens_three: true,
            keep_requests: KEPT_REQUESTS,
        }
    }
}

impl fmt::Debug for KucoinSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KucoinSettings")
            .field("spot", &self.spot)
            .field("futures", &self.futures)
            .field("tls", &self.tls.is_some())
            .finish_non_exhaustive()
    }
}

/// A running simulator; it stops when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct KucoinSim {
    hosts: Arc<Hosts>,
    world: Arc<World>,
}

#[derive(Debug)]
struct Hosts {
    scheme: &'static str,
    spot: Server,
    futures: Server,
}

#[derive(Debug)]
struct World {
    catalog: Catalog,
    exchange: Mutex<Exchange>,
}

impl KucoinSim {
    /// Starts both hosts, without any key.
    ///
    /// Fails if an address is not loopback or cannot be bound.
    pub async fn start(settings: KucoinSettings) -> io::Result<Self> {
        let exchange = Exchange {
            accounts: Accounts::default(),
            clock: Clock::Offset(settings.clock_offset_ms),
            faults: faults::Faults::default(),
            key_rules: KeyRules {
                oldest_version: settings.oldest_key_version,
                site: settings.site,
                two_opens_three: settings.two_opens_three,
            },
            keys: HashMap::new(),
            limits: settings.limits,
            records: Records::new(settings.keep_requests),
            source_address: None,
            usage: Usage::default(),
        };
        let world = Arc::new(World {
            catalog: Catalog::load()?,
            exchange: Mutex::new(exchange),
        });
        let serve = |host| {
            let world = Arc::clone(&world);
            move |request| {
                let world = Arc::clone(&world);
                async move { world.reply(host, request).await }
            }
        };
        let tls = settings.tls;
        let hosts = Hosts {
            scheme: if tls.is_some() { "https" } else { "http" },
            spot: Server::start(settings.spot, tls.clone(), serve(Host::Spot)).await?,
            futures: Server::start(settings.futures, tls, serve(Host::Futures)).await?,
        };
        Ok(Self {
            hosts: Arc::new(hosts),
            world,
        })
    }

    /// URL of the spot host (spot, margin, account, unified account): `http://127.0.0.1:<port>`, or `https` with TLS.
    pub fn spot_url(&self) -> String {
        self.hosts.url(&self.hosts.spot)
    }

    /// Requests of both hosts that have been received and not answered, on connections that are still open.
    pub fn in_progress(&self) -> usize {
        self.hosts.in_progress()
    }

    /// URL of the futures host.
    pub fn futures_url(&self) -> String {
        self.hosts.url(&self.hosts.futures)
    }

    /// Adds a key, or replaces the one with the same id.
    pub fn add_key(&self, key: SimKey) {
        self.exchange().keys.insert(key.api_key.clone(), key);
    }

    /// Removes a key, as if an admin had deleted it on the web site.
    pub fn remove_key(&self, api_key: &str) {
        self.exchange().keys.remove(api_key);
    }

    /// Sets the available balance of a wallet. A new account has 1000000 of each currency in every wallet.
    pub fn set_balance(&self, uid: u64, wallet: Wallet, currency: &str, amount: Amount) {
        let mut exchange = self.exchange();
        exchange
            .accounts
            .of(uid)
            .set_available(wallet, currency, amount);
    }

    /// Sets the source address that the exchange sees: `my-ip` returns it, whitelists are checked against it and messages
    /// of 400006 name it. `None`: the real one.
    pub fn set_source_address(&self, address: Option<IpAddr>) {
        self.exchange().source_address = address;
    }

    /// Adds a fault; [`Fault`] describes which requests it hits.
    pub fn fault(&self, fault: Fault) {
        self.exchange().faults.add(fault);
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        self.exchange().faults.clear();
    }

    /// Sets the rate limits and resets the counters.
    pub fn set_limits(&self, limits: Limits) {
        self.exchange().set_limits(limits);
    }

    /// Sets how long after its acceptance a cancel-all (or a cancel of a list) takes effect: KuCoin documents only that it
    /// accepts them. Default: zero.
    pub fn set_cancel_lag(&self, lag: Duration) {
        let lag_ms = i64::try_from(lag.as_millis()).unwrap_or(i64::MAX);
        self.exchange().accounts.cancel_lag_ms = lag_ms;
    }

    /// Sets how long after its acceptance a lookup of one order finds it. Default: zero.
    pub fn set_lookup_lag(&self, lag: Duration) {
        let lag_ms = i64::try_from(lag.as_millis()).unwrap_or(i64::MAX);
        self.exchange().accounts.lookup_lag_ms = lag_ms;
    }

    /// Sets how far the exchange's clock is ahead of this machine's, in milliseconds.
    pub fn set_clock_offset_ms(&self, offset_ms: i64) {
        self.exchange().clock = Clock::Offset(offset_ms);
    }

    /// Stops the exchange's clock at this time, in milliseconds since 1970.
    pub fn set_fixed_time_ms(&self, now_ms: i64) {
        self.exchange().clock = Clock::Fixed(now_ms);
    }

    /// The requests received on behalf of bots, oldest first; without the broker's own requests.
    pub fn received(&self) -> Vec<ReceivedRequest> {
        let mut records = self.everything_received();
        records.retain(|request| !request.is_internal());
        records
    }

    /// All requests received, oldest first.
    pub fn everything_received(&self) -> Vec<ReceivedRequest> {
        self.exchange().records.iter().cloned().collect()
    }

    /// All orders of an account, oldest first.
    pub fn orders(&self, uid: u64) -> Vec<Order> {
        self.exchange().orders(uid).to_vec()
    }

    fn exchange(&self) -> MutexGuard<'_, Exchange> {
        self.world.exchange()
    }
}

impl Hosts {
    fn in_progress(&self) -> usize {
        self.spot.in_progress() + self.futures.in_progress()
    }

    fn url(&self, server: &Server) -> String {
        format!("{}://{}", self.scheme, server.address())
    }
}

impl World {
    fn exchange(&self) -> MutexGuard<'_, Exchange> {
        self.exchange.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn reply(&self, host: Host, request: Received) -> Reply {
        if host == Host::Spot && request.head.uri.path().starts_with(control::PREFIX) {
            return control::answer(&mut self.exchange(), &request).into();
        }
        let (arrival, mut cleared) = {
            let mut exchange = self.exchange();
            let arrival = exchange.arrive(&self.catalog, host, &request);
            (arrival, exchange.faults.cleared.subscribe())
        };
        let arrival = match arrival {
            Ok(arrival) => arrival,
            Err(blocked) => return Response::from(blocked).into(),
        };
        let process = || {
            self.exchange()
                .process(&self.catalog, host, &arrival, &request)
        };
        let process_if_after = |when| {
            if when == When::AfterProcessing {
                process();
            }
        };
        let Some(fault) = &arrival.fault else {
            return process().into();
        };
        match fault {
            FaultAction::Answer { status, body, when } => {
                process_if_after(*when);
                answers::json_answer(status_of(*status), body).into()
            }
            FaultAction::Close { when } => {
                process_if_after(*when);
                Reply::Close
            }
            FaultAction::CutShort { bytes } => Reply::CutShort(process(), *bytes),
            FaultAction::Delay { ms } => {
                tokio::time::sleep(Duration::from_millis(*ms)).await;
                process().into()
            }
            FaultAction::EarlyHints {} => Reply::Raw(answers::early_hints()),
            FaultAction::EdgeBlock { retry_after_s } => {
                let mut page = answers::html_page(StatusCode::TOO_MANY_REQUESTS, "simulated block");
                let seconds = HeaderValue::from(*retry_after_s);
                page.headers_mut().insert(header::RETRY_AFTER, seconds);
                page.into()
            }
            FaultAction::Hold {} => {
                // The sender lives as long as the exchange.
                let _ = cleared.changed().await;
                process().into()
            }
            FaultAction::Html { status, when } => {
                process_if_after(*when);
                answers::html_page(status_of(*status), "simulated fault").into()
            }
            FaultAction::OneByteChunks { kilobytes } => {
                process();
                Reply::Raw(answers::one_byte_chunks(*kilobytes))
            }
            FaultAction::OtherOrder {} => answers::of_other_order(&process()).into(),
            FaultAction::Oversized { megabytes } => {
                process();
                answers::filled(megabytes.saturating_mul(1_000_000)).into()
            }
            FaultAction::RateLimited { reset_ms } => rate_limited(*reset_ms).into(),
            FaultAction::Stall { when } => {
                process_if_after(*when);
                Reply::Hang
            }
        }
    }
}

/// The status code, or 500 if it is not a valid one.
fn status_of(status: u16) -> StatusCode {
    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

fn rate_limited(reset_ms: Option<u64>) -> Response<Bytes> {
    let mut response = answers::envelope(&Err(exchange::too_many()));
    if let Some(reset_ms) = reset_ms {
        Quota::used_up(2000, reset_ms).label(&mut response);
    }
    response
}
