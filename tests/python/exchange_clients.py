"""Tests the simulated KuCoin with third-party clients: KuCoin's official SDK and ccxt, with their real signing code.

Usage: exchange_clients.py SPOT_URL FUTURES_URL KEY_JSON

KEY_JSON is a key in the simulator's format (credbroker_sim::kucoin::SimKey). If it has partners, ccxt signs spot
requests as the first and futures requests as the second. Prints one line per step; exits with status 1 at the first
wrong answer.
"""

import json
import sys
import uuid

import ccxt
from kucoin_universal_sdk.api import DefaultClient
from kucoin_universal_sdk.generate.account.account.model_get_futures_account_req import GetFuturesAccountReqBuilder
from kucoin_universal_sdk.generate.account.account.model_get_spot_account_list_req import GetSpotAccountListReqBuilder
from kucoin_universal_sdk.generate.futures import order as futures
from kucoin_universal_sdk.generate.futures.order.model_add_order_req import AddOrderReq as FuturesOrder
from kucoin_universal_sdk.generate.margin import order as margin
from kucoin_universal_sdk.generate.margin.order.model_add_order_req import AddOrderReq as MarginOrder
from kucoin_universal_sdk.generate.spot import order as spot
from kucoin_universal_sdk.generate.spot.order.model_add_order_req import AddOrderReq as SpotOrder
from kucoin_universal_sdk.generate.spot.order.model_add_stop_order_req import AddStopOrderReq as StopOrder
from kucoin_universal_sdk.model.client_option import ClientOptionBuilder
from kucoin_universal_sdk.model.common import RestError
from kucoin_universal_sdk.model.transport_option import TransportOptionBuilder


def expect(step, found, expected):
    """Prints one step; exits if it failed."""
    if found != expected:
        print(f"FAILED {step}: expected {expected!r}, got {found!r}", flush=True)
        sys.exit(1)
    print(f"ok {step}: {found!r}", flush=True)


def expect_error(step, expected, call):
    """Checks that a call of the SDK fails with an error that contains the expected text."""
    try:
        answer = call()
    except RestError as error:
        expect(step, expected in str(error), True)
    else:
        expect(step, answer, f"an error with {expected}")


def new_client_oid():
    """A new clientOid."""
    return str(uuid.uuid4())


def sdk(spot_url, futures_url, key, secret):
    """The official SDK, connected to the simulator by its endpoint settings."""
    return (
        DefaultClient(
            ClientOptionBuilder()
            .set_key(key["api_key"])
            .set_secret(secret)
            .set_passphrase(key["passphrase"])
            .set_spot_endpoint(spot_url)
            .set_futures_endpoint(futures_url)
            .set_broker_endpoint(spot_url)
            .set_transport_option(TransportOptionBuilder().build())
            .build()
        )
        .rest_service()
    )


def run_sdk(spot_url, futures_url, key):
    rest = sdk(spot_url, futures_url, key, key["api_secret"])
    account = rest.get_account_service().get_account_api()
    info = account.get_apikey_info()
    expect("sdk: key info", (info.api_key, info.api_version), (key["api_key"], key["version"]))
    accounts = account.get_spot_account_list(GetSpotAccountListReqBuilder().set_currency("USDT").build())
    expect("sdk: spot balances", sorted(one.type.value for one in accounts.data), ["main", "trade"])
    overview = account.get_futures_account(GetFuturesAccountReqBuilder().set_currency("USDT").build())
    expect("sdk: futures balance", overview.available_balance > 0, True)
    expect("sdk: rate limit headers", overview.common_response.rate_limit.limit, 2000)
    sdk_spot(rest.get_spot_service().get_order_api())
    sdk_stop(rest.get_spot_service().get_order_api())
    sdk_margin(rest.get_margin_service().get_order_api())
    sdk_futures(rest.get_futures_service().get_order_api())
    sdk_unified(rest.get_uta_service().get_order_api())
    wrong = sdk(spot_url, futures_url, key, "another secret")
    expect_error(
        "sdk: wrong secret is rejected",
        "400004",
        lambda: wrong.get_account_service().get_account_api().get_apikey_info(),
    )


def sdk_spot(orders):
    oid = new_client_oid()
    order = SpotOrder(
        clientOid=oid, side="buy", symbol="BTC-USDT", type="limit", price="50000", size="0.001", remark="Zürich & co"
    )
    placed = orders.add_order(order)
    expect("sdk: spot order placed", placed.client_oid, oid)
    found = orders.get_order_by_client_oid(
        spot.GetOrderByClientOidReqBuilder().set_client_oid(oid).set_symbol("BTC-USDT").build()
    )
    expect(
        "sdk: spot order by clientOid",
        (found.id, found.active, found.size, found.remark),
        (placed.order_id, True, "0.001", "Zürich & co"),
    )
    open_orders = orders.get_open_orders(spot.GetOpenOrdersReqBuilder().set_symbol("BTC-USDT").build())
    expect("sdk: spot order is open", placed.order_id in [one.id for one in open_orders.data], True)
    expect_error("sdk: duplicate clientOid is rejected", "clientOidDuplicated", lambda: orders.add_order(order))
    cancelled = orders.cancel_order_by_order_id(
        spot.CancelOrderByOrderIdReqBuilder().set_order_id(placed.order_id).set_symbol("BTC-USDT").build()
    )
    expect("sdk: spot order cancelled", cancelled.order_id, placed.order_id)
    found = orders.get_order_by_order_id(
        spot.GetOrderByOrderIdReqBuilder().set_order_id(placed.order_id).set_symbol("BTC-USDT").build()
    )
    expect("sdk: spot order is done", (found.active, found.cancelled_size), (False, "0.001"))


def sdk_stop(orders):
    oid = new_client_oid()
    placed = orders.add_stop_order(
        StopOrder(
            clientOid=oid, side="sell", symbol="ETH-USDT", type="limit", price="2000", size="0.5", stopPrice="2100"
        )
    )
    found = orders.get_stop_order_by_client_oid(spot.GetStopOrderByClientOidReqBuilder().set_client_oid(oid).build())
    expect("sdk: stop order", [(one.id, one.status) for one in found.data], [(placed.order_id, "NEW")])
    cancelled = orders.cancel_stop_order_by_client_oid(
        spot.CancelStopOrderByClientOidReqBuilder().set_client_oid(oid).set_symbol("ETH-USDT").build()
    )
    expect("sdk: stop order cancelled", cancelled.cancelled_order_id, placed.order_id)


def sdk_margin(orders):
    oid = new_client_oid()
    placed = orders.add_order(
        MarginOrder(clientOid=oid, side="sell", symbol="ETH-USDT", type="limit", price="4000", size="0.1")
    )
    found = orders.get_order_by_client_oid(
        margin.GetOrderByClientOidReqBuilder().set_client_oid(oid).set_symbol("ETH-USDT").build()
    )
    expect("sdk: margin order", (found.id, found.active), (placed.order_id, True))
    cancelled = orders.cancel_order_by_client_oid(
        margin.CancelOrderByClientOidReqBuilder().set_client_oid(oid).set_symbol("ETH-USDT").build()
    )
    expect("sdk: margin order cancelled", cancelled.client_oid, oid)


def sdk_futures(orders):
    oid = new_client_oid()
    placed = orders.add_order(
        FuturesOrder(
            clientOid=oid, side="buy", symbol="XBTUSDTM", leverage=3, type="limit", price="50000", size=1,
            marginMode="ISOLATED",
        )
    )
    found = orders.get_order_by_client_oid(futures.GetOrderByClientOidReqBuilder().set_client_oid(oid).build())
    expect("sdk: futures order", (found.id, found.status.value, found.size), (placed.order_id, "open", 1))
    cancelled = orders.cancel_order_by_id(
        futures.CancelOrderByIdReqBuilder().set_order_id(placed.order_id).build()
    )
    expect("sdk: futures order cancelled", cancelled.cancelled_order_ids, [placed.order_id])


def sdk_unified(orders):
    oid = new_client_oid()
    named = {"tradeType": "SPOT", "symbol": "BTC-USDT", "clientOid": oid}
    placed = orders.place_order({**named, "side": "BUY", "orderType": "LIMIT", "size": "0.001", "price": "50000"})
    found = orders.get_order_details(named)
    expect("sdk: unified order", (found.data["orderId"], found.data["status"]), (placed.data["orderId"], 2))
    cancelled = orders.cancel_order(named)
    expect("sdk: unified order cancelled", cancelled.data["clientOid"], oid)


def ccxt_client(spot_url, futures_url, key, secret):
    """ccxt, connected to the simulator by its URL settings."""
    client = ccxt.kucoin(
        {
            "apiKey": key["api_key"],
            "secret": secret,
            "password": key["passphrase"],
            "enableRateLimit": False,
        }
    )
    client.urls["api"] = {
        name: futures_url if name.startswith("futures") else spot_url for name in client.urls["api"]
    }
    # Without this option, ccxt signs as its own partner.
    partners = key.get("partners", [])
    client.options["partner"] = {
        name: {"id": partner["id"], "key": partner["key"]} for name, partner in zip(["spot", "future"], partners)
    }
    return client


def run_ccxt(spot_url, futures_url, key):
    client = ccxt_client(spot_url, futures_url, key, key["api_secret"])
    client.load_markets()
    expect("ccxt: markets", {"BTC/USDT", "BTC/USDT:USDT"} <= set(client.markets), True)
    expect("ccxt: spot balance", client.fetch_balance()["USDT"]["free"] > 0, True)
    futures_balance = client.fetch_balance({"type": "swap", "code": "USDT"})
    expect("ccxt: futures balance", futures_balance["USDT"]["free"] > 0, True)
    for symbol, amount in [("BTC/USDT", 0.001), ("BTC/USDT:USDT", 1)]:
        oid = new_client_oid()
        placed = client.create_order(symbol, "limit", "buy", amount, 50000, {"clientOid": oid})
        expect(f"ccxt: {symbol} order placed", bool(placed["id"]), True)
        found = client.fetch_order(placed["id"], symbol)
        expect(
            f"ccxt: {symbol} order",
            (found["id"], found["clientOrderId"], found["status"], found["amount"]),
            (placed["id"], oid, "open", amount),
        )
        open_orders = client.fetch_open_orders(symbol)
        expect(f"ccxt: {symbol} open orders", placed["id"] in [one["id"] for one in open_orders], True)
        client.cancel_order(placed["id"], symbol)
        found = client.fetch_order(placed["id"], symbol)
        expect(f"ccxt: {symbol} order cancelled", found["status"], "canceled")
    filled = client.create_order("ETH/USDT", "market", "buy", 0.5)
    found = client.fetch_order(filled["id"], "ETH/USDT")
    expect("ccxt: market order filled", (found["status"], found["filled"]), ("closed", 0.5))
    ccxt_errors(client, spot_url, futures_url, key)


def ccxt_errors(client, spot_url, futures_url, key):
    wrong = ccxt_client(spot_url, futures_url, key, "another secret")
    for request, error, call in [
        (
            "order over the balance",
            ccxt.InsufficientFunds,
            lambda: client.create_order("BTC/USDT", "limit", "buy", 9999, 50000),
        ),
        (
            "unknown order",
            ccxt.OrderNotFound,
            lambda: client.cancel_order("000000000000000001", "BTC/USDT"),
        ),
        ("wrong secret", ccxt.AuthenticationError, wrong.fetch_balance),
    ]:
        try:
            answer = call()
        except error:
            expect(f"ccxt: {request} is rejected", error.__name__, error.__name__)
        else:
            expect(f"ccxt: {request} is rejected", answer, error.__name__)


def main():
    spot_url, futures_url, key_json = sys.argv[1:]
    key = json.loads(key_json)
    run_sdk(spot_url, futures_url, key)
    run_ccxt(spot_url, futures_url, key)
    print("all steps done", flush=True)


if __name__ == "__main__":
    main()
