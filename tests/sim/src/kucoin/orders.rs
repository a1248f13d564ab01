//! Orders, in a form that all products share.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::accounts::Wallet;
use super::amount::Amount;
use super::answers::{Refusal, refuse};
use super::call::{amount, flag, text};
use super::market::{Instrument, instrument};

/// The order API of KuCoin that an order belongs to.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Book {
    /// Futures, including stop orders.
    Futures,
    /// Margin.
    Margin,
    /// Margin OCO (one cancels the other) orders.
    MarginOco,
    /// Margin stop orders.
    MarginStop,
    /// Spot, high-frequency or old API.
    Spot,
    /// Spot OCO (one cancels the other) orders.
    SpotOco,
    /// Spot stop orders.
    SpotStop,
    /// Unified trading account.
    Unified,
}

/// Products; a clientOid must be unique within one.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) enum Product {
    Futures,
    Margin,
    Spot,
    Unified,
}

impl Book {
    /// The product.
    pub(super) fn product(self) -> Product {
        match self {
            Self::Futures => Product::Futures,
            Self::Margin | Self::MarginOco | Self::MarginStop => Product::Margin,
            Self::Spot | Self::SpotOco | Self::SpotStop => Product::Spot,
            Self::Unified => Product::Unified,
        }
    }
}

impl Product {
    /// The wallet of its balances.
    pub(super) fn wallet(self) -> Wallet {
        match self {
            Self::Futures => Wallet::Futures,
            Self::Margin => Wallet::Margin,
            Self::Spot => Wallet::Trade,
            Self::Unified => Wallet::Unified,
        }
    }

    /// The refusal of a clientOid that was used before. For spot it is not documented; JKorf/Kucoin.Net issue 120 has it.
    pub(super) fn duplicate(self) -> Refusal {
        match self {
            Self::Futures => refuse("300018", "clientOid parameter repeated"),
            Self::Margin => refuse("126044", "Duplicate clientOid"),
            Self::Spot => refuse("400100", "validation.createOrder.clientOidDuplicated"),
            Self::Unified => refuse("106151", "Duplicate clientOid"),
        }
    }

    /// The refusal of an order that exceeds the available funds.
    pub(super) fn insufficient_funds(self) -> Refusal {
        match self {
            Self::Futures => refuse("300003", "Balance insufficient. Please deposit first"),
            Self::Margin => refuse("126013", "Insufficient account balance"),
            Self::Spot => refuse("200004", "Balance insufficient!"),
            Self::Unified => refuse("106150", "Insufficient balance"),
        }
    }

    /// The refusal of a lookup that found nothing. Codes of spot, margin and futures are from ccxt; the unified account's is
    /// assumed.
    pub(super) fn absent(self) -> Refusal {
        match self {
            Self::Futures => refuse("100001", "error.getOrder.orderNotExist"),
            Self::Margin => refuse("126043", "Order does not exist"),
            Self::Spot => refuse("400100", "order not exist."),
            Self::Unified => refuse("106100", "Order does not exist"),
        }
    }

    /// The refusal of a cancel if there is no such open order. Sources as for [`Product::absent`].
    pub(super) fn not_cancellable(self) -> Refusal {
        match self {
            Self::Futures => refuse("100004", "The order cannot be canceled."),
            Self::Margin => refuse("126043", "Order does not exist"),
            Self::Spot => refuse("400100", "order_not_exist_or_not_allow_to_cancel"),
            Self::Unified => refuse("106102", "Order does not exist or cannot be canceled"),
        }
    }

    /// The refusal of a missing or invalid parameter.
    pub(super) fn bad_parameter(self, name: &str) -> Refusal {
        let code = match self {
            Self::Futures => "100001",
            Self::Margin | Self::Spot | Self::Unified => "400100",
        };
        refuse(code, format!("Parameter error: {name}"))
    }

    fn unknown_symbol(self) -> Refusal {
        match self {
            Self::Futures => refuse("100001", "Symbol parameter invalid"),
            Self::Margin => refuse("126004", "Trading pair does not exist"),
            Self::Spot => refuse("900001", "symbol not exists"),
            Self::Unified => refuse("106053", "Symbol does not exist"),
        }
    }
}

/// Buy or sell.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Buy.
    Buy,
    /// Sell.
    Sell,
}

impl Side {
    /// As Classic answers spell it.
    pub(super) fn lower(self) -> &'static str {
        match self {
            Self::Buy => "buy",
            Self::Sell => "sell",
        }
    }

    /// As unified answers spell it.
    pub(super) fn upper(self) -> &'static str {
        match self {
            Self::Buy => "BUY",
            Self::Sell => "SELL",
        }
    }
}

/// The state of an order.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OrderState {
    /// Cancelled, at once or in parts.
    Cancelled,
    /// Filled completely.
    Filled,
    /// Resting.
    Open,
}

/// An order that the simulator accepted.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Order {
    /// Account.
    pub uid: u64,
    /// Order id.
    pub id: String,
    /// The bot's id for it.
    pub client_oid: Option<String>,
    /// API that it was placed with.
    pub book: Book,
    /// Symbol.
    pub symbol: String,
    /// Buy or sell.
    pub side: Side,
    /// Price of a limit order; unset for a market order.
    pub price: Option<Amount>,
    /// Size in base currency or contracts.
    pub size: Amount,
    /// Filled size.
    pub filled: Amount,
    /// Cancelled size.
    pub cancelled: Amount,
    /// State.
    pub state: OrderState,
    /// When it was accepted, by the exchange's clock.
    pub created_at_ms: i64,
    /// When it last changed, by the exchange's clock.
    pub updated_at_ms: i64,
    /// The order as it was sent.
    pub fields: Value,
    /// Funds held for it: currency and amount.
    #[serde(skip)]
    pub(super) held: (String, Amount),
}

impl Order {
    /// Whether it is resting.
    pub fn is_open(&self) -> bool {
        self.state == OrderState::Open
    }

    /// The size that is neither filled nor cancelled.
    pub(super) fn remaining(&self) -> Amount {
        self.size - self.filled - self.cancelled
    }

    /// Whether it has a trigger.
    pub(super) fn is_conditional(&self) -> bool {
        is_conditional(&self.fields)
    }

    /// Spot, cross margin or isolated margin, with Classic's names. An isolated order uses the cross margin wallet here.
    pub(super) fn trade_type(&self) -> &'static str {
        let isolated = match self.book {
            Book::Margin | Book::MarginOco | Book::MarginStop => flag(&self.fields, "isIsolated"),
            // This API accepts orders of all three types.
            Book::SpotStop if text(&self.fields, "tradeType") == Some("MARGIN_TRADE") => false,
            Book::SpotStop if text(&self.fields, "tradeType") == Some("MARGIN_ISOLATED_TRADE") => {
                true
            }
            _ => return "TRADE",
        };
        if isolated {
            "MARGIN_ISOLATED_TRADE"
        } else {
            "MARGIN_TRADE"
        }
    }

    /// A field as it was sent, or an empty string.
    pub(super) fn sent(&self, name: &str) -> Value {
        self.fields.get(name).cloned().unwrap_or_else(|| json!(""))
    }

    /// The quote currency that a market order was to spend or to receive, as it was sent; `None` for any other order.
    pub(super) fn sent_funds(&self) -> Option<&Value> {
        self.fields.get("funds").filter(|funds| !funds.is_null())
    }

    /// Quote currency that was paid or received for the filled size.
    pub(super) fn filled_value(&self) -> Amount {
        instrument(&self.symbol)
            .and_then(|one| one.base_units(self.filled)?.times(one.fixed_price()))
            .unwrap_or_default()
    }

    /// Ids of the two legs of an OCO order; its own id belongs to the pair, not to a leg.
    pub(super) fn legs(&self) -> [String; 2] {
        [format!("{}-limit", self.id), format!("{}-stop", self.id)]
    }
}

/// Whether the order has a trigger, in any product's fields.
fn is_conditional(fields: &Value) -> bool {
    [
        "stop",
        "stopPrice",
        "triggerPrice",
        "triggerStopUpPrice",
        "triggerStopDownPrice",
    ]
    .into_iter()
    .any(|name| match fields.get(name) {
        None | Some(Value::Null) => false,
        Some(Value::String(text)) => !text.is_empty(),
        Some(_) => true,
    })
}

/// A parsed order request.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) book: Book,
    pub(super) client_oid: Option<String>,
    pub(super) instrument: Instrument,
    pub(super) side: Side,
    /// Unset for a market order.
    pub(super) price: Option<Amount>,
    pub(super) size: Amount,
    /// Waits for a trigger, which never fires in the simulator.
    pub(super) conditional: bool,
    /// Needs no funds: a stop order (assumed: KuCoin holds nothing before the trigger), or a reduce-only order.
    pub(super) unfunded: bool,
    /// The margin is the value divided by this; 1 except for futures.
    pub(super) leverage: Amount,
    pub(super) fields: Value,
}

impl Draft {
    /// Reads one order. `type_field` is the name of the field with `limit` or `market`.
    pub(super) fn read(book: Book, type_field: &str, fields: &Value) -> Result<Self, Refusal> {
        let product = book.product();
        let bad = |name: &str| product.bad_parameter(name);
        let symbol = text(fields, "symbol").ok_or_else(|| bad("symbol"))?;
        let instrument = instrument(symbol).ok_or_else(|| product.unknown_symbol())?;
        let conditional = is_conditional(fields);
        let closing = flag(fields, "closeOrder");
        let side = match text(fields, "side").map(str::to_ascii_lowercase).as_deref() {
            Some("buy") => Side::Buy,
            Some("sell") => Side::Sell,
            None if closing => Side::Sell,
            _ => return Err(bad("side")),
        };
        let positive = |name: &str| positive(product, fields, name);
        let kind = text(fields, type_field).unwrap_or("limit");
        let price = match kind.to_ascii_lowercase().as_str() {
            "limit" => Some(positive("price")?.ok_or_else(|| bad("price"))?),
            "market" => None,
            _ => return Err(bad(type_field)),
        };
        let leverage = positive("leverage")?.unwrap_or(Amount::from(1));
        Ok(Self {
            book,
            client_oid: client_oid(product, fields)?,
            instrument,
            side,
            price,
            size: quantity(product, fields, instrument, price)?,
            conditional,
            unfunded: closing
                || flag(fields, "reduceOnly")
                || conditional && !matches!(book, Book::MarginOco | Book::SpotOco),
            leverage,
            fields: fields.clone(),
        })
    }

    /// Refuses an order without a clientOid.
    pub(super) fn require_client_oid(self) -> Result<Self, Refusal> {
        match self.client_oid {
            Some(_) => Ok(self),
            None => Err(self.book.product().bad_parameter("clientOid")),
        }
    }

    /// The funds that it needs: currency and amount.
    pub(super) fn required_funds(&self) -> Result<(String, Amount), Refusal> {
        let at = self.price.unwrap_or_else(|| self.instrument.fixed_price());
        let currency = match (self.instrument.contracts_per_unit, self.side) {
            (None, Side::Sell) => self.instrument.base,
            _ => self.instrument.quote,
        };
        let needed = if self.unfunded {
            Some(Amount::ZERO)
        } else if currency == self.instrument.base {
            Some(self.size)
        } else {
            self.instrument
                .base_units(self.size)
                .and_then(|units| units.times(at)?.over(self.leverage))
        };
        let needed = needed.ok_or_else(|| self.book.product().bad_parameter("size"))?;
        Ok((currency.to_owned(), needed))
    }
}

/// An amount that must not be zero; `None` if missing.
fn positive(product: Product, fields: &Value, name: &str) -> Result<Option<Amount>, Refusal> {
    match amount(fields, name)? {
        Some(Amount::ZERO) => Err(product.bad_parameter(name)),
        value => Ok(value),
    }
}

/// The size in base currency or contracts. A request gives it directly, as an amount of quote currency, or for contracts in
/// base currency.
fn quantity(
    product: Product,
    fields: &Value,
    instrument: Instrument,
    price: Option<Amount>,
) -> Result<Amount, Refusal> {
    let positive = |name: &str| positive(product, fields, name);
    let (mut size, mut funds) = (positive("size")?, positive("funds")?);
    funds = funds.or(positive("valueQty")?);
    if text(fields, "sizeUnit") == Some("QUOTECCY") {
        funds = size.take();
    }
    if let (Some(units), Some(per_unit)) = (positive("qty")?, instrument.contracts_per_unit) {
        size = units.times(Amount::from(per_unit));
    }
    match (size, funds) {
        (Some(size), None) => Some(size),
        (None, Some(funds)) => bought_for(
            funds,
            price.unwrap_or_else(|| instrument.fixed_price()),
            instrument,
        ),
        // Closes a position, whose size is unknown: the simulator has no positions.
        (None, None) if flag(fields, "closeOrder") => Some(Amount::from(1)),
        _ => None,
    }
    .ok_or_else(|| product.bad_parameter("size"))
}

fn bought_for(funds: Amount, at: Amount, instrument: Instrument) -> Option<Amount> {
    let units = funds.over(at)?;
    match instrument.contracts_per_unit {
        None => Some(units),
        Some(per_unit) => Some(units.times(Amount::from(per_unit))?.whole()),
    }
    .filter(|size| *size > Amount::ZERO)
}

/// At most 40 letters, digits, `_` and `-`. Source: KuCoin API documentation, "Add Order".
fn client_oid(product: Product, fields: &Value) -> Result<Option<String>, Refusal> {
    let Some(id) = text(fields, "clientOid") else {
        return Ok(None);
    };
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    if id.len() > 40 || !id.bytes().all(fits) {
        return Err(product.bad_parameter("clientOid"));
    }
    Ok(Some(id.to_owned()))
}
