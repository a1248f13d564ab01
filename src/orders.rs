//! One order per clientOid.
//!
//! A placing request claims its clientOids before its intent is recorded. A claim is freed only if the order was certainly not
//! placed; another request with the same clientOid is refused, and learns what is known about the first one. Claims are kept
//! for [`GuardLimits::window_s`]. They are in memory; after a start they are read from the audit log, which has every intent.

mod calls;
mod guard;
mod outcomes;
pub(crate) mod replay;
pub(crate) mod resolve;

use std::collections::BTreeMap;
use std::fmt;
use std::hash::RandomState;
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::audit::MAX_CLIENT_OID_CHARS;
use crate::base::ids::{AccountId, BotId};
use crate::base::lock::Mutex;
use crate::base::text::clean;
use crate::kucoin::lookup::LookupRecord;
use crate::kucoin::{Endpoint, Scope, UnsignedRequest};

use calls::{CallHandle, CallTable};
use guard::{Claim, ClaimKey, ClaimedBy, Guard, GuardLimits, NotClaimed};
pub(crate) use guard::{OrderState, Settled};
use outcomes::number;
pub(crate) use outcomes::{Known, KnownState};

/// The claims of all bots on clientOids.
#[derive(Debug)]
pub(crate) struct Orders {
    /// Of clientOids, so that nobody can choose clientOids that collide.
    hash: Hash,
    /// Of request ids: faster, which suffices because each bot has a table of its own.
    request_ids: [RandomState; 2],
    settings: OrderSettings,
    state_dir: PathBuf,
    guard: Mutex<Guard>,
    /// Locked before the guard.
    calls: Mutex<CallTable>,
    /// The KuCoin accounts that each account in the rules has had, the current one last, as far as key tests have reported them.
    uids: Mutex<BTreeMap<(AccountId, Scope), Vec<String>>>,
    readiness: Mutex<Readiness>,
    settled: Notify,
}

/// Claims of earlier runs may be missing.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(crate) enum ClaimsUnknown {
    /// The audit log is being read.
    #[error(
        "the broker is still reading from its audit log which clientOids were used before; risk-increasing requests are refused until then; nothing was sent; repeat an order only with the same clientOid"
    )]
    Reading,
    /// The audit log does not reach back far enough.
    #[error(
        "the audit log does not show which clientOids were used before; an admin must restore it, or accept the gap with `credbroker orders accept-gap`; nothing was sent; repeat an order only with the same clientOid"
    )]
    Gap,
}

/// The table `[orders]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OrderSettings {
    /// How long a clientOid is kept, in seconds.
    pub(crate) window_s: u32,
    /// How many are kept.
    pub(crate) claims: usize,
    /// How many of one bot; `None`: as many as each bot in the rules can have.
    pub(crate) claims_per_bot: Option<usize>,
}

impl OrderSettings {
    /// The limits for this number of bots.
    pub(crate) fn limits(self, bots: usize) -> GuardLimits {
        GuardLimits {
            window_s: self.window_s,
            claims: self.claims,
            claims_per_bot: self.claims_per_bot.unwrap_or(self.claims / bots.max(1)),
        }
    }
}

/// Whether the claims of earlier runs are known.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Readiness {
    /// The audit log is being read.
    Reading,
    /// They are known.
    Ready,
    /// The audit log may have had more lines.
    Gap,
}

/// The claims of one request.
#[derive(Debug, Default)]
#[must_use = "settle it when the request has ended"]
pub(crate) struct Claims {
    /// Each clientOid with its claim, in the order of the request.
    orders: Vec<(String, ClaimKey)>,
    /// The exchange's id of the account, if the claims are on it.
    uid: Option<String>,
    /// The exchange's time of the claims, Unix milliseconds.
    at_ms: i64,
    /// The request, if it changes something.
    call: Option<CallHandle>,
    /// How each order can be looked up after a restart, if it can be.
    lookups: Vec<LookupRecord>,
}

/// What the audit log needs to have the claims of a request again after a restart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordedClaims<'a> {
    /// The exchange's id of the account, if the claims are on it.
    pub(crate) uid: Option<&'a str>,
    /// The exchange's time of the claims, Unix milliseconds.
    pub(crate) exchange_ms: i64,
    /// How each order can be looked up, if it can be.
    pub(crate) lookups: &'a [LookupRecord],
}

impl ClaimsUnknown {
    /// The problem in `/readyz`.
    pub(crate) fn problem(self) -> &'static str {
        match self {
            Self::Reading => {
                "still reading from the audit log which clientOids were used; risk-increasing requests are refused"
            }
            Self::Gap => {
                "the audit log does not show all clientOids that were used; risk-increasing requests are refused"
            }
        }
    }
}

impl Claims {
    /// What the audit log needs to have these claims again after a restart. `None` without claims.
    pub(crate) fn recorded(&self) -> Option<RecordedClaims<'_>> {
        (!self.is_empty()).then_some(RecordedClaims {
            uid: self.uid.as_deref(),
            exchange_ms: self.at_ms,
            lookups: &self.lookups,
        })
    }

    /// How each order can be looked up after a restart, if it can be.
    pub(crate) fn can_be_looked_up(&mut self, lookups: Vec<LookupRecord>) {
        self.lookups = lookups;
    }

    /// The exchange's id of the account, if the claims are on it.
    pub(crate) fn uid(&self) -> Option<&str> {
        self.uid.as_deref()
    }

    /// Whether the request places nothing with a clientOid.
    pub(crate) fn is_empty(&self) -> bool {
        self.orders.is_empty()
    }

    /// The clientOids, in the order of the request.
    pub(crate) fn client_oids(&self) -> impl Iterator<Item = &str> {
        self.orders
            .iter()
            .map(|(client_oid, _)| client_oid.as_str())
    }

    /// The claim of one order.
    pub(crate) fn of(&self, client_oid: &str) -> Self {
        let is_of = |order: &&(String, ClaimKey)| order.0 == client_oid;
        Self {
            orders: self.orders.iter().filter(is_of).cloned().collect(),
            uid: self.uid.clone(),
            at_ms: self.at_ms,
            call: None,
            lookups: Vec::new(),
        }
    }
}

/// A clientOid that has a claim.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Repeated {
    client_oid: String,
    /// Its position in a batch, from 1.
    item: Option<usize>,
    /// What is known about the earlier order.
    pub(crate) state: OrderState,
    /// The exchange's id of it, if known.
    pub(crate) order_id: Option<String>,
    /// Whether the earlier request had the same body.
    pub(crate) is_same: bool,
}

impl Repeated {
    /// Another call with this clientOid has not ended, and has no claim yet.
    pub(crate) fn in_flight(client_oid: &str) -> Self {
        Self {
            client_oid: client_oid.to_owned(),
            item: None,
            state: OrderState::InFlight,
            order_id: None,
            is_same: true,
        }
    }

    /// The exchange has rejected the only order of a request because an earlier one has its clientOid. `order_id`: of the earlier
    /// order, if it was found and is the same.
    pub(crate) fn at_exchange(client_oid: &str, order_id: Option<String>) -> Self {
        let state = match order_id {
            Some(_) => OrderState::Accepted,
            None => OrderState::Unknown,
        };
        Self {
            client_oid: client_oid.to_owned(),
            item: None,
            state,
            order_id,
            is_same: true,
        }
    }
}

/// Why a request got no claims.
#[derive(Debug)]
pub(crate) enum ClaimError {
    /// One of its clientOids has a claim.
    Repeated(Box<Repeated>),
    /// Two of its orders have the same clientOid.
    Twice(String),
    /// The bot has used up its share of the claims.
    Full(usize),
}

impl fmt::Display for Repeated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            client_oid,
            item,
            state,
            order_id: _,
            is_same,
        } = self;
        write!(f, "clientOid {}", clean(client_oid, MAX_CLIENT_OID_CHARS))?;
        if let Some(item) = item {
            write!(f, " (order {item} of the batch)")?;
        }
        if !is_same {
            return f.write_str(
                " was used for a different request; use a new clientOid for each new order",
            );
        }
        f.write_str(match state {
            OrderState::InFlight => {
                " was sent before, and that call has not ended; wait for its result"
            }
            OrderState::Accepted => {
                " was sent before, and the exchange accepted that order; do not send it again"
            }
            OrderState::MaybeSent => {
                " was sent before, and that order may exist; look it up, and do not send it again"
            }
            OrderState::Unknown => {
                " was sent before, and the broker could not find out what became of that order; look it up, and do not send it again"
            }
        })
    }
}

impl Orders {
    /// Without claims, and not ready.
    pub(crate) fn new(settings: OrderSettings, bots: usize, state_dir: &Path) -> Self {
        let limits = settings.limits(bots);
        Self {
            hash: Hash::random(),
            request_ids: [RandomState::new(), RandomState::new()],
            settings,
            state_dir: state_dir.to_owned(),
            guard: Mutex::new(Guard::new(limits)),
            calls: Mutex::new(CallTable::new(limits)),
            uids: Mutex::default(),
            readiness: Mutex::new(Readiness::Reading),
            settled: Notify::new(),
        }
    }

    /// Returns once a claim is settled after this call.
    pub(crate) fn settled(&self) -> Notified<'_> {
        self.settled.notified()
    }

    /// Whether the claims of earlier runs are known.
    pub(crate) fn readiness(&self) -> Readiness {
        *self.readiness.lock()
    }

    /// Whether the claims of earlier runs are known, which a risk-increasing request needs.
    ///
    /// # Errors
    /// When they are not.
    pub(crate) fn check_known(&self) -> Result<(), ClaimsUnknown> {
        match self.readiness() {
            Readiness::Ready => Ok(()),
            Readiness::Reading => Err(ClaimsUnknown::Reading),
            Readiness::Gap => Err(ClaimsUnknown::Gap),
        }
    }

    /// The clientOids of the orders that this request places. Empty if it places nothing.
    fn client_oids<'r>(request: &'r UnsignedRequest, endpoint: Option<&Endpoint>) -> Vec<&'r str> {
        match endpoint {
            Some(endpoint) if endpoint.claims_client_oids() => endpoint.client_oids(request),
            _ => Vec::new(),
        }
    }

    /// Shares the claims among this number of bots from now on. Existing claims stay.
    pub(crate) fn share(&self, bots: usize) {
        let limits = self.settings.limits(bots);
        self.guard.lock().set_limits(limits);
        self.calls.lock().set_limits(limits);
    }

    /// Looks the clientOids of a request up.
    ///
    /// # Errors
    /// When one of them has a claim.
    pub(crate) fn check(
        &self,
        request: &UnsignedRequest,
        endpoint: Option<&Endpoint>,
        now_ms: i64,
    ) -> Result<(), Box<Repeated>> {
        let oids = Self::client_oids(request, endpoint);
        if oids.is_empty() {
            return Ok(());
        }
        let (account, scope) = (&request.account, request.scope);
        let orders = self.keys(account, scope, &oids);
        let guard = self.guard.lock();
        let found = orders.iter().enumerate().find_map(|(position, keys)| {
            let claim = keys
                .iter()
                .find_map(|key| guard.find(*key, seconds(now_ms)));
            Some((position, claim?))
        });
        match found {
            Some((position, claim)) => Err(Box::new(repeated(request, &oids, position, claim))),
            None => Ok(()),
        }
    }

    /// Claims all clientOids of a request, or none. `uid`: the exchange's id of the account, if known.
    ///
    /// # Errors
    /// When one of them has a claim or occurs twice, or the bot has used up its share.
    pub(crate) fn claim(
        &self,
        bot: &BotId,
        request: &UnsignedRequest,
        endpoint: Option<&Endpoint>,
        uid: Option<&str>,
        now_ms: i64,
    ) -> Result<Claims, ClaimError> {
        let oids = Self::client_oids(request, endpoint);
        if oids.is_empty() {
            return Ok(Claims::default());
        }
        let (account, scope) = (&request.account, request.scope);
        if let Some(uid) = uid {
            self.learn_uid(account, scope, uid);
        }
        for (position, oid) in oids.iter().enumerate() {
            if oids.iter().take(position).any(|before| before == oid) {
                return Err(ClaimError::Twice((*oid).to_owned()));
            }
        }
        let uid = self.uid(account, scope);
        let orders = self.keys(account, scope, &oids);
        let by = ClaimedBy {
            body: body_digest(&request.body),
            endpoint: number(endpoint),
        };
        let mut guard = self.guard.lock();
        match guard.claim(bot, &orders, by, seconds(now_ms)) {
            Ok(()) => {
                let keys = orders.iter().filter_map(|keys| keys.first().copied());
                let oids = oids.iter().map(|oid| (*oid).to_owned());
                let orders = oids.zip(keys).collect();
                Ok(Claims {
                    orders,
                    uid,
                    at_ms: now_ms,
                    call: None,
                    lookups: Vec::new(),
                })
            }
            Err(NotClaimed::Claimed(position, claim)) => Err(ClaimError::Repeated(Box::new(
                repeated(request, &oids, position, claim),
            ))),
            Err(NotClaimed::Full) => Err(ClaimError::Full(guard.limits().claims_per_bot)),
        }
    }

    /// Records what became of each order of a request. `became` is given its clientOid.
    pub(crate) fn settle(&self, claims: &Claims, became: impl Fn(&str) -> Settled) {
        for (client_oid, key) in &claims.orders {
            let settled = became(client_oid);
            let at_s = seconds(claims.at_ms);
            self.guard.lock().settle(*key, at_s, settled);
        }
        self.settled.notify_waiters();
    }

    /// State and time of the claim on a clientOid, also after the window; `None`: it has none.
    pub(crate) fn claimed(
        &self,
        account: &AccountId,
        scope: Scope,
        client_oid: &str,
    ) -> Option<(OrderState, u32)> {
        let keys = self.keys(account, scope, &[client_oid]);
        let guard = self.guard.lock();
        let mut claims = keys.iter().flatten().filter_map(|key| guard.find(*key, 0));
        claims.next().map(|claim| (claim.state, claim.at_s))
    }

    /// Frees the clientOid of an order that is unknown and was not placed. `at_s`: of its claim. False if it was freed before.
    pub(crate) fn settle_absent(
        &self,
        account: &AccountId,
        scope: Scope,
        client_oid: &str,
        at_s: u32,
    ) -> bool {
        let keys = self.keys(account, scope, &[client_oid]);
        let mut guard = self.guard.lock();
        let is_meant = |key: &ClaimKey| {
            let claim = guard.find(*key, 0);
            claim.is_some_and(|claim| claim.state == OrderState::Unknown && claim.at_s == at_s)
        };
        let meant = keys.into_iter().flatten().find(is_meant);
        if let Some(key) = meant {
            guard.free(key);
        }
        meant.is_some()
    }

    /// How many claims there are, and the largest part of its share that a bot has used.
    pub(crate) fn usage(&self) -> (usize, f64) {
        let guard = self.guard.lock();
        (guard.len(), guard.largest_share())
    }

    /// For how long back, in seconds, every clientOid that was used is known; at most the window.
    pub(crate) fn held_s(&self, now_ms: i64) -> u32 {
        self.guard.lock().held_s(seconds(now_ms))
    }

    pub(crate) fn learn_uid(&self, account: &AccountId, scope: Scope, uid: &str) {
        let mut uids = self.uids.lock();
        let place = (account.clone(), scope);
        let known = uids.entry(place).or_default();
        if known.last().is_none_or(|last| last != uid) {
            known.retain(|other| other != uid);
            known.push(uid.to_owned());
        }
    }

    /// Whether an account has had the same KuCoin account all the time.
    pub(crate) fn has_one_uid(&self, account: &AccountId, scope: Scope) -> bool {
        let uids = self.uids.lock();
        let known = uids.get(&(account.clone(), scope));
        known.is_some_and(|known| known.len() == 1)
    }

    /// The exchange's id of an account, if it has ever been known.
    fn uid(&self, account: &AccountId, scope: Scope) -> Option<String> {
        let place = (account.clone(), scope);
        self.uids.lock().get(&place)?.last().cloned()
    }

    /// The keys of each order: by each of the exchange's ids that the account has had, the current one first; and by the names of
    /// the accounts in the rules with one of these ids, because they were not always known.
    fn keys(&self, account: &AccountId, scope: Scope, oids: &[&str]) -> Vec<Vec<ClaimKey>> {
        let uids = self.uids.lock();
        let own = uids.get(&(account.clone(), scope));
        let own = own.map(Vec::as_slice).unwrap_or_default();
        let same = uids.iter().filter(|((other, of), known)| {
            other != account && *of == scope && known.iter().any(|uid| own.contains(uid))
        });
        let names: Vec<_> = [account]
            .into_iter()
            .chain(same.map(|((name, _), _)| name))
            .collect();
        let keys = |oid: &&str| {
            let by_uid = own
                .iter()
                .rev()
                .map(|uid| self.hash.key("uid", uid, scope, oid));
            let by_name = names
                .iter()
                .map(|name| self.hash.key("account", name.as_str(), scope, oid));
            by_uid.chain(by_name).collect()
        };
        oids.iter().map(keys).collect()
    }
}

/// The refusal of a request whose order at `position` has a claim.
fn repeated(request: &UnsignedRequest, oids: &[&str], position: usize, claim: Claim) -> Repeated {
    let client_oid = oids.get(position).copied().unwrap_or_default();
    Repeated {
        client_oid: client_oid.to_owned(),
        item: (oids.len() > 1).then_some(position + 1),
        state: claim.state,
        order_id: claim.order_id,
        is_same: claim.body == body_digest(&request.body),
    }
}

/// A keyed hash.
#[derive(Debug)]
struct Hash(Hmac<Sha256>);

impl Hash {
    fn random() -> Self {
        let secret = std::array::from_fn::<u8, 32, _>(|_| fastrand::u8(..));
        #[expect(clippy::expect_used, reason = "HMAC takes a key of any length")]
        let mac = Hmac::new_from_slice(&secret).expect("a key of 32 bytes");
        Self(mac)
    }

    fn key(&self, kind: &str, owner: &str, scope: Scope, client_oid: &str) -> ClaimKey {
        // The audit log has no more of it; a transfer may have a longer one.
        let end = client_oid.char_indices().nth(MAX_CLIENT_OID_CHARS);
        let client_oid = end
            .and_then(|(end, _)| client_oid.get(..end))
            .unwrap_or(client_oid);
        let mut mac = self.0.clone();
        for part in [kind, owner, scope.as_str(), client_oid] {
            mac.update(part.as_bytes());
            mac.update(b"\0");
        }
        let digest = mac.finalize().into_bytes();
        [
            first_word(&digest),
            first_word(digest.get(8..).unwrap_or_default()),
        ]
    }
}

/// A body is compared by the digest that the audit log has.
fn body_digest(body: &[u8]) -> u64 {
    first_word(&Sha256::digest(body))
}

fn first_word(digest: &[u8]) -> u64 {
    let word = digest.first_chunk().copied().unwrap_or_default();
    u64::from_be_bytes(word)
}

/// Unix time in seconds; claims are kept until the year 2106.
fn seconds(ms: i64) -> u32 {
    u32::try_from(ms.div_euclid(1000)).unwrap_or(u32::MAX)
}
