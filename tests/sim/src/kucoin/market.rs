//! Market data: a fixed price per symbol, and the public endpoints that clients read before trading.

use serde_json::{Value, json};

use super::amount::Amount;
use super::answers::Outcome;
use super::call::Call;

/// A currency pair or a contract.
#[derive(Clone, Copy, Debug)]
pub(super) struct Instrument {
    /// Symbol, as in requests.
    pub(super) symbol: &'static str,
    /// Base currency; for contracts the underlying.
    pub(super) base: &'static str,
    /// Quote currency.
    pub(super) quote: &'static str,
    /// Price at which market orders fill, in whole units of `quote`.
    pub(super) price: u32,
    /// Contracts per base unit; unset for a pair.
    pub(super) contracts_per_unit: Option<u32>,
}

const INSTRUMENTS: [Instrument; 5] = [
    pair("BTC-USDT", "BTC", 60_000),
    pair("ETH-USDT", "ETH", 3_000),
    pair("KCS-USDT", "KCS", 10),
    contract("XBTUSDTM", "XBT", 60_000, 1_000),
    contract("ETHUSDTM", "ETH", 3_000, 100),
];

/// Currencies that accounts can hold.
pub(super) const CURRENCIES: [&str; 4] = ["BTC", "ETH", "KCS", "USDT"];

const fn pair(symbol: &'static str, base: &'static str, price: u32) -> Instrument {
    Instrument {
        symbol,
        base,
        quote: "USDT",
        price,
        contracts_per_unit: None,
    }
}

const fn contract(
    symbol: &'static str,
    base: &'static str,
    price: u32,
    contracts_per_unit: u32,
) -> Instrument {
    Instrument {
        symbol,
        base,
        quote: "USDT",
        price,
        contracts_per_unit: Some(contracts_per_unit),
    }
}

/// Finds a symbol.
pub(super) fn instrument(symbol: &str) -> Option<Instrument> {
    INSTRUMENTS
        .into_iter()
        .find(|instrument| instrument.symbol == symbol)
}

impl Instrument {
    /// The fixed price.
    pub(super) fn fixed_price(self) -> Amount {
        Amount::from(self.price)
    }

    /// Base units in `size`: the same number for a pair, contracts times multiplier for a contract.
    pub(super) fn base_units(self, size: Amount) -> Option<Amount> {
        match self.contracts_per_unit {
            None => Some(size),
            Some(per_unit) => size.over(Amount::from(per_unit)),
        }
    }

    fn is_pair(self) -> bool {
        self.contracts_per_unit.is_none()
    }
}

fn pairs() -> impl Iterator<Item = Instrument> {
    INSTRUMENTS.into_iter().filter(|one| one.is_pair())
}

fn contracts() -> impl Iterator<Item = Instrument> {
    INSTRUMENTS.into_iter().filter(|one| !one.is_pair())
}

/// Answers the public endpoints that are simulated; `None` for the others.
pub(super) fn answer(call: &Call<'_>) -> Option<Outcome> {
    let data = match call.route() {
        ("GET", "/api/v1/timestamp") => json!(call.now_ms),
        ("GET", "/api/v1/my-ip" | "/api/ua/v2/user/my-ip") => json!(call.from.to_string()),
        ("GET", "/api/v1/status") => json!({"status": "open", "msg": ""}),
        ("GET", "/api/ua/v2/server/status") => {
            json!({"tradeType": "SPOT", "serverStatus": "open", "msg": ""})
        }
        ("GET", "/api/v1/symbols" | "/api/v2/symbols") => pairs().map(symbol_view).collect(),
        ("GET", "/api/v2/symbols/{symbol}") => one(call, pairs(), symbol_view),
        ("GET", "/api/v3/margin/symbols") => {
            let items: Value = pairs().map(symbol_view).collect();
            json!({"timestamp": call.now_ms, "items": items})
        }
        ("GET", "/api/v1/isolated/symbols") => pairs().map(isolated_view).collect(),
        ("GET", "/api/v1/currencies" | "/api/v3/currencies" | "/api/ua/v2/asset/currencies") => {
            CURRENCIES.into_iter().map(currency_view).collect()
        }
        ("GET", "/api/v1/market/allTickers") => {
            let tickers: Value = pairs().map(ticker_view).collect();
            json!({"time": call.now_ms, "ticker": tickers})
        }
        ("GET", "/api/v1/market/orderbook/level1") => {
            let symbol = call.query("symbol").unwrap_or_default();
            instrument(symbol).map_or(Value::Null, |one| level1_view(one, call.now_ms))
        }
        ("GET", "/api/v1/contracts/active") => contracts().map(contract_view).collect(),
        ("GET", "/api/v1/contracts/{symbol}") => one(call, contracts(), contract_view),
        ("POST", "/api/v1/bullet-public" | "/api/v1/bullet-private") => {
            // Streams are not simulated: the list of servers is empty.
            json!({"token": "simulated-token", "instanceServers": []})
        }
        _ => return None,
    };
    Some(Ok(data))
}

fn one(
    call: &Call<'_>,
    mut among: impl Iterator<Item = Instrument>,
    view: fn(Instrument) -> Value,
) -> Value {
    let symbol = call.param("symbol").unwrap_or_default();
    among
        .find(|one| one.symbol == symbol)
        .map_or(Value::Null, view)
}

fn symbol_view(pair: Instrument) -> Value {
    json!({
        "symbol": pair.symbol, "name": pair.symbol, "baseCurrency": pair.base, "quoteCurrency": pair.quote,
        "feeCurrency": pair.quote, "market": "USDS", "baseMinSize": "0.00001", "quoteMinSize": "0.1",
        "baseMaxSize": "10000000000", "quoteMaxSize": "99999999", "baseIncrement": "0.00001", "quoteIncrement": "0.000001",
        "priceIncrement": "0.1", "priceLimitRate": "0.1", "minFunds": "0.1", "isMarginEnabled": true,
        "enableTrading": true, "feeCategory": 1, "makerFeeCoefficient": "1.00", "takerFeeCoefficient": "1.00", "st": false,
    })
}

fn isolated_view(pair: Instrument) -> Value {
    json!({
        "symbol": pair.symbol, "symbolName": pair.symbol, "baseCurrency": pair.base, "quoteCurrency": pair.quote,
        "maxLeverage": 10, "flDebtRatio": "0.97", "tradeEnable": true, "autoRenewMaxDebtRatio": "0.96",
        "baseBorrowEnable": true, "quoteBorrowEnable": true, "baseTransferInEnable": true, "quoteTransferInEnable": true,
        "baseBorrowCoefficient": "1", "quoteBorrowCoefficient": "1",
    })
}

fn currency_view(currency: &str) -> Value {
    json!({
        "currency": currency, "name": currency, "fullName": currency, "precision": 8, "confirms": null,
        "contractAddress": null, "isMarginEnabled": true, "isDebitEnabled": true,
        "chains": [{
            "chainName": "Simulated", "chainId": "simulated", "withdrawalMinSize": "1", "depositMinSize": "1",
            "withdrawFeeRate": "0", "withdrawalMinFee": "1", "isWithdrawEnabled": false, "isDepositEnabled": false,
            "confirms": 1, "preConfirms": 1, "contractAddress": "", "withdrawPrecision": 8, "needTag": false,
        }],
    })
}

fn ticker_view(pair: Instrument) -> Value {
    let price = pair.price.to_string();
    json!({
        "symbol": pair.symbol, "symbolName": pair.symbol, "buy": price, "sell": price, "last": price,
        "bestBidSize": "1", "bestAskSize": "1", "changeRate": "0", "changePrice": "0", "high": price, "low": price,
        "vol": "1", "volValue": price, "averagePrice": price, "takerFeeRate": "0.001", "makerFeeRate": "0.001",
        "takerCoefficient": "1", "makerCoefficient": "1",
    })
}

fn level1_view(pair: Instrument, now_ms: i64) -> Value {
    let price = pair.price.to_string();
    json!({
        "time": now_ms, "sequence": "1", "price": price, "size": "1", "bestBid": price, "bestBidSize": "1",
        "bestAsk": price, "bestAskSize": "1",
    })
}

fn contract_view(contract: Instrument) -> Value {
    let multiplier = contract
        .base_units(Amount::from(1))
        .map_or(Value::Null, Amount::to_json_number);
    json!({
        "symbol": contract.symbol, "rootSymbol": contract.quote, "type": "FFWCSX", "firstOpenDate": 1_585_555_200_000_u64,
        "expireDate": null, "settleDate": null, "baseCurrency": contract.base, "quoteCurrency": contract.quote,
        "settleCurrency": contract.quote, "maxOrderQty": 1_000_000, "maxPrice": 1_000_000.0, "lotSize": 1, "tickSize": 0.1,
        "indexPriceTickSize": 0.01, "multiplier": multiplier, "initialMargin": 0.008, "maintainMargin": 0.004,
        "maxRiskLimit": 100_000, "minRiskLimit": 100_000, "riskStep": 50_000, "makerFeeRate": 0.0002,
        "takerFeeRate": 0.0006, "isDeleverage": true, "isQuanto": true, "isInverse": false, "markMethod": "FairPrice",
        "fairMethod": "FundingRate", "status": "Open", "fundingFeeRate": 0.0001, "openInterest": "1",
        "turnoverOf24h": 1.0, "volumeOf24h": 1.0, "markPrice": contract.price, "indexPrice": contract.price,
        "lastTradePrice": contract.price, "nextFundingRateTime": 25_481_884, "maxLeverage": 125,
        "lowPrice": contract.price, "highPrice": contract.price, "priceChgPct": 0.0, "priceChg": 0.0,
    })
}
