//! Accounts: balances, funds held for orders, and the orders.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::amount::Amount;
use super::answers::{Outcome, Refusal};
use super::call::Call;
use super::market::{CURRENCIES, Instrument};
use super::orders::{Book, Draft, Order, OrderState, Product, Side};

/// An account type of KuCoin.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Wallet {
    /// Funding account (`main`).
    Funding,
    /// Futures account.
    Futures,
    /// Cross margin account.
    Margin,
    /// Spot trading account (`trade`).
    Trade,
    /// Unified trading account.
    Unified,
}

/// The balance of each wallet and currency of a new account, so that tests need not fund it.
const OPENING_BALANCE: u32 = 1_000_000;

/// All accounts.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    by_uid: HashMap<u64, Account>,
    /// How long after its acceptance a cancel-all takes effect.
    pub(super) cancel_lag_ms: i64,
    /// How long after its acceptance a lookup finds an order.
    pub(super) lookup_lag_ms: i64,
    now_ms: i64,
    last_id: u64,
}

/// One account.
#[derive(Debug)]
pub(super) struct Account {
    balances: BTreeMap<(Wallet, String), Balance>,
    orders: Vec<Order>,
    by_id: HashMap<String, usize>,
    by_client_oid: HashMap<(Product, String), usize>,
    cancel_lag_ms: i64,
    /// Lookups find orders that were accepted by this time; `None`: all.
    visible_until_ms: Option<i64>,
    /// Accepted cancels: when each takes effect, and the order id.
    due: Vec<(i64, String)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Balance {
    available: Amount,
    /// Held for resting orders.
    hold: Amount,
    /// Margin of positions.
    position: Amount,
}

impl Accounts {
    /// The account of `uid`, created if needed.
    pub(super) fn of(&mut self, uid: u64) -> &mut Account {
        let account = self.by_uid.entry(uid).or_insert_with(Account::new);
        account.cancel_lag_ms = self.cancel_lag_ms;
        let lag_ms = Some(self.lookup_lag_ms).filter(|lag_ms| *lag_ms > 0);
        account.visible_until_ms = lag_ms.map(|lag_ms| self.now_ms - lag_ms);
        account
    }

    /// Cancels the orders whose accepted cancel is due.
    pub(super) fn apply_due_cancels(&mut self, now_ms: i64) {
        self.now_ms = now_ms;
        for account in self.by_uid.values_mut() {
            let due = account.due.extract_if(.., |(at_ms, _)| *at_ms <= now_ms);
            let due: Vec<_> = due.collect();
            for (at_ms, id) in due {
                account.cancel(&id, at_ms);
            }
        }
    }

    /// The orders of an account, oldest first.
    pub(super) fn orders(&self, uid: u64) -> &[Order] {
        self.by_uid.get(&uid).map_or(&[], |one| &one.orders)
    }

    /// Accepts or refuses an order. Market orders fill at once at the fixed price, all others rest.
    pub(super) fn place(&mut self, call: &Call<'_>, draft: Draft) -> Result<&Order, Refusal> {
        self.last_id += 1;
        // 18 digits, like KuCoin's ids of newer orders; they never repeat.
        let id = format!("{:018}", 600_000_000_000_000_000 + self.last_id);
        self.of(call.uid).accept(id, draft, call)
    }
}

impl Account {
    fn new() -> Self {
        let wallets = [
            Wallet::Funding,
            Wallet::Futures,
            Wallet::Margin,
            Wallet::Trade,
            Wallet::Unified,
        ];
        let opening = Balance {
            available: Amount::from(OPENING_BALANCE),
            ..Balance::default()
        };
        let balances = wallets
            .into_iter()
            .flat_map(|wallet| CURRENCIES.map(|currency| ((wallet, currency.to_owned()), opening)))
            .collect();
        Self {
            balances,
            orders: Vec::new(),
            by_id: HashMap::new(),
            by_client_oid: HashMap::new(),
            cancel_lag_ms: 0,
            visible_until_ms: None,
            due: Vec::new(),
        }
    }

    /// Sets the available balance; held funds do not change.
    pub(super) fn set_available(&mut self, wallet: Wallet, currency: &str, amount: Amount) {
        self.balance(wallet, currency).available = amount;
    }

    /// Checks whether an order would be accepted; returns the currency and amount that it needs.
    pub(super) fn check(&self, draft: &Draft) -> Result<(String, Amount), Refusal> {
        let product = draft.book.product();
        if let Some(id) = &draft.client_oid
            && self.by_client_oid.contains_key(&(product, id.clone()))
        {
            return Err(product.duplicate());
        }
        let (currency, needed) = draft.required_funds()?;
        let balance = self.balances.get(&(product.wallet(), currency.clone()));
        if balance.is_none_or(|balance| balance.available < needed) {
            return Err(product.insufficient_funds());
        }
        Ok((currency, needed))
    }

    fn accept(&mut self, id: String, draft: Draft, call: &Call<'_>) -> Result<&Order, Refusal> {
        let (currency, needed) = self.check(&draft)?;
        let product = draft.book.product();
        let balance = self.balance(product.wallet(), &currency);
        balance.available -= needed;
        balance.hold += needed;
        let fills = draft.price.is_none() && !draft.conditional;
        let at = self.orders.len();
        if let Some(client_oid) = &draft.client_oid {
            self.by_client_oid.insert((product, client_oid.clone()), at);
        }
        self.by_id.insert(id.clone(), at);
        self.orders.push(Order {
            uid: call.uid,
            id,
            client_oid: draft.client_oid,
            book: draft.book,
            symbol: draft.instrument.symbol.to_owned(),
            side: draft.side,
            price: draft.price,
            size: draft.size,
            filled: Amount::ZERO,
            cancelled: Amount::ZERO,
            state: OrderState::Open,
            created_at_ms: call.now_ms,
            updated_at_ms: call.now_ms,
            fields: draft.fields,
            held: (currency, needed),
        });
        if fills {
            self.fill(at, draft.instrument);
        }
        self.orders.get(at).ok_or_else(|| product.absent())
    }

    fn fill(&mut self, at: usize, instrument: Instrument) {
        let Some(order) = self.orders.get_mut(at) else {
            return;
        };
        order.filled = order.size;
        order.state = OrderState::Filled;
        let (currency, held) = std::mem::take(&mut order.held);
        let wallet = order.book.product().wallet();
        let (currency_got, got) = match order.side {
            Side::Buy => (instrument.base, order.size),
            Side::Sell => (instrument.quote, order.filled_value()),
        };
        let paid = self.balance(wallet, &currency);
        paid.hold -= held;
        if instrument.contracts_per_unit.is_some() {
            paid.position += held;
        } else {
            self.balance(wallet, currency_got).available += got;
        }
    }

    /// Finds an order of these books by id.
    pub(super) fn by_id(&self, books: &[Book], id: &str) -> Option<&Order> {
        self.orders
            .get(*self.by_id.get(id)?)
            .filter(|order| books.contains(&order.book) && self.is_visible(order))
    }

    fn is_visible(&self, order: &Order) -> bool {
        self.visible_until_ms
            .is_none_or(|until_ms| order.created_at_ms <= until_ms)
    }

    /// Finds an order of these books by clientOid.
    pub(super) fn by_client_oid(&self, books: &[Book], id: &str) -> Option<&Order> {
        let product = books.first()?.product();
        let at = self.by_client_oid.get(&(product, id.to_owned()))?;
        self.orders
            .get(*at)
            .filter(|order| books.contains(&order.book) && self.is_visible(order))
    }

    /// Cancels a resting order and returns its new state; `None` if it is not resting.
    pub(super) fn cancel(&mut self, id: &str, now_ms: i64) -> Option<&Order> {
        let remaining = self.open(id)?.remaining();
        self.reduce(id, remaining, now_ms)
    }

    /// Cancels `by` of a resting order, at most the remaining size, and returns its new state.
    pub(super) fn reduce(&mut self, id: &str, by: Amount, now_ms: i64) -> Option<&Order> {
        let order = self.open(id)?;
        let remaining = order.remaining();
        let by = by.min(remaining);
        order.cancelled += by;
        order.updated_at_ms = now_ms;
        let wallet = order.book.product().wallet();
        let (currency, held) = order.held.clone();
        let freed = if by == remaining {
            order.state = OrderState::Cancelled;
            held
        } else {
            held.times(by)?.over(remaining)?
        };
        order.held.1 -= freed;
        let balance = self.balance(wallet, &currency);
        balance.hold -= freed;
        balance.available += freed;
        self.orders.get(*self.by_id.get(id)?)
    }

    /// Changes price and size of a resting order in place and returns it; the held funds do not change.
    pub(super) fn amend(
        &mut self,
        id: &str,
        price: Option<Amount>,
        size: Option<Amount>,
        now_ms: i64,
    ) -> Option<&Order> {
        let order = self.open(id)?;
        order.price = price.or(order.price);
        order.size = size
            .unwrap_or(order.size)
            .max(order.filled + order.cancelled);
        order.updated_at_ms = now_ms;
        Some(order)
    }

    /// Frees a clientOid, for an amendment that places a new order under it.
    pub(super) fn free_client_oid(&mut self, product: Product, id: &str) {
        self.by_client_oid.remove(&(product, id.to_owned()));
    }

    /// Cancels every matching resting order, at once or after the lag, and returns them.
    pub(super) fn cancel_all(&mut self, now_ms: i64, fits: impl Fn(&Order) -> bool) -> Vec<Order> {
        let ids: Vec<String> = self
            .orders
            .iter()
            .filter(|order| order.is_open() && fits(order))
            .map(|order| order.id.clone())
            .collect();
        if self.cancel_lag_ms > 0 {
            let at_ms = now_ms.saturating_add(self.cancel_lag_ms);
            self.due.extend(ids.iter().map(|id| (at_ms, id.clone())));
            return ids.iter().filter_map(|id| self.open(id).cloned()).collect();
        }
        ids.iter()
            .filter_map(|id| self.cancel(id, now_ms).cloned())
            .collect()
    }

    /// The matching orders, newest first, as KuCoin lists them.
    pub(super) fn list<'a>(
        &'a self,
        fits: impl Fn(&Order) -> bool + 'a,
    ) -> impl Iterator<Item = &'a Order> {
        self.orders.iter().rev().filter(move |order| fits(order))
    }

    fn open(&mut self, id: &str) -> Option<&mut Order> {
        let at = *self.by_id.get(id)?;
        self.orders.get_mut(at).filter(|order| order.is_open())
    }

    fn balance(&mut self, wallet: Wallet, currency: &str) -> &mut Balance {
        self.balances
            .entry((wallet, currency.to_owned()))
            .or_default()
    }

    fn wallet(&self, wallet: Wallet) -> impl Iterator<Item = (&str, &Balance)> {
        self.balances
            .iter()
            .filter(move |((of, _), _)| *of == wallet)
            .map(|((_, currency), balance)| (currency.as_str(), balance))
    }
}

/// Answers the account endpoints that are simulated; `None` for the others.
pub(super) fn answer(accounts: &mut Accounts, call: &Call<'_>) -> Option<Outcome> {
    let account = accounts.of(call.uid);
    let data = match call.route() {
        ("GET", "/api/v1/accounts") => spot_list(account, call),
        ("GET", "/api/v1/hf/accounts/opened") => json!(true),
        ("GET", "/api/v1/account-overview") => {
            futures_view(account, call.query("currency").unwrap_or("XBT"))
        }
        ("GET", "/api/v1/margin/account" | "/api/v3/margin/accounts") => margin_view(account),
        ("GET", "/api/v3/isolated/accounts") => json!({
            "totalAssetOfQuoteCurrency": "0", "totalLiabilityOfQuoteCurrency": "0", "timestamp": call.now_ms, "assets": [],
        }),
        ("GET", "/api/ua/v1/account/mode" | "/api/ua/v2/account/mode") => {
            json!({"selfAccountMode": "CLASSIC"})
        }
        ("GET", "/api/ua/v2/account/balance" | "/api/ua/v2/unified/account/balance") => {
            unified_view(account, call)
        }
        ("GET", "/api/v1/user/api-key" | "/api/ua/v2/user/api-key") => key_view(call),
        _ => return None,
    };
    Some(Ok(data))
}

/// Funding and trading account. Margin is listed only on request: the old documentation has that type, the current official
/// SDK cannot read it.
fn spot_list(account: &Account, call: &Call<'_>) -> Value {
    // `trade_hf` is an older name of the trading account: ccxt requests it and expects it in the answer.
    let kinds: &[(Wallet, &str)] = match call.query("type") {
        None => &[(Wallet::Funding, "main"), (Wallet::Trade, "trade")],
        Some("main") => &[(Wallet::Funding, "main")],
        Some("margin") => &[(Wallet::Margin, "margin")],
        Some("trade") => &[(Wallet::Trade, "trade")],
        Some("trade_hf") => &[(Wallet::Trade, "trade_hf")],
        Some(_) => &[],
    };
    kinds
        .iter()
        .flat_map(|(wallet, kind)| account.wallet(*wallet).map(move |entry| (kind, entry)))
        .filter(|(_, (currency, _))| call.query("currency").is_none_or(|wanted| wanted == *currency))
        .map(|(kind, (currency, balance))| {
            json!({
                "id": format!("{}-{kind}-{currency}", call.uid), "currency": currency, "type": kind,
                "balance": balance.available + balance.hold, "available": balance.available, "holds": balance.hold,
            })
        })
        .collect()
}

fn futures_view(account: &Account, currency: &str) -> Value {
    let balance = account
        .balances
        .get(&(Wallet::Futures, currency.to_owned()))
        .copied()
        .unwrap_or_default();
    let number = Amount::to_json_number;
    let equity = balance.available + balance.hold + balance.position;
    json!({
        "accountEquity": number(equity), "unrealisedPNL": 0, "marginBalance": number(equity),
        "positionMargin": number(balance.position), "orderMargin": number(balance.hold), "frozenFunds": 0,
        "availableBalance": number(balance.available), "currency": currency, "riskRatio": 0,
        "maxWithdrawAmount": number(balance.available), "availableMargin": number(balance.available),
    })
}

fn margin_view(account: &Account) -> Value {
    let accounts: Value = account
        .wallet(Wallet::Margin)
        .map(|(currency, balance)| {
            let total = balance.available + balance.hold;
            json!({
                "currency": currency, "total": total, "available": balance.available, "hold": balance.hold,
                "totalBalance": total, "availableBalance": balance.available, "holdBalance": balance.hold,
                "liability": "0", "maxBorrowSize": "0", "borrowEnabled": true, "transferInEnabled": true,
                "liabilityPrincipal": "0", "liabilityInterest": "0",
            })
        })
        .collect();
    json!({
        "totalAssetOfQuoteCurrency": "0", "totalLiabilityOfQuoteCurrency": "0", "debtRatio": "0", "status": "EFFECTIVE",
        "accounts": accounts,
    })
}

fn unified_view(account: &Account, call: &Call<'_>) -> Value {
    let currencies: Value = account
        .wallet(Wallet::Unified)
        .map(|(currency, balance)| {
            let equity = balance.available + balance.hold + balance.position;
            json!({
                "currency": currency, "equity": equity, "balance": equity, "available": balance.available,
                "hold": balance.hold + balance.position, "liability": "0",
            })
        })
        .collect();
    json!({
        "accountType": "UNIFIED", "ts": call.now_ms,
        "accounts": [{"accountSubtype": null, "riskRatio": "0", "currencies": currencies}],
    })
}

/// Permissions have other names in the API than on the web site. Version 2 of the unified account returns null where Classic
/// omits a field; its answer for a key without a whitelist is not documented and assumed to be as in Classic.
fn key_view(call: &Call<'_>) -> Value {
    let Some(key) = call.key else {
        return Value::Null;
    };
    let mut permissions = vec!["General"];
    permissions.extend(
        key.permissions
            .iter()
            .map(|held| match held.as_str() {
                "FlexTransfers" => "InnerTransfer",
                "Withdrawal" => "Transfer",
                other => other,
            })
            .filter(|held| *held != "General"),
    );
    let addresses: Vec<String> = key.ip_whitelist.iter().map(ToString::to_string).collect();
    let whitelist = (!addresses.is_empty()).then(|| addresses.join(","));
    let mut view = json!({
        "remark": key.remark, "apiKey": key.api_key, "apiVersion": key.version, "permission": permissions.join(","),
        "createdAt": key.created_at_ms, "uid": key.uid, "isMaster": key.sub_name.is_none(), "region": key.region,
        "kycStatus": u8::from(key.kyc_passed), "siteType": key.site, "thirdPartyApp": "",
    });
    let unified = call.endpoint.path.starts_with("/api/ua/");
    for (name, value, is_null_if_unset) in [
        ("ipWhitelist", json!(whitelist), false),
        ("subName", json!(key.sub_name), false),
        ("parentUid", json!(key.parent_uid), unified),
        ("expiredAt", json!(key.expires_at_ms), unified),
    ] {
        if let Some(view) = view.as_object_mut()
            && (is_null_if_unset || !value.is_null())
        {
            view.insert(name.to_owned(), value);
        }
    }
    view
}
