"""A bot that waits for the broker: places and cancels orders at a steady rate, and reports what became of the calls.

`waiting_bot.py ADDRESS FOLDER SECONDS ORDERS_PER_SECOND`; each order is followed by its cancel. It follows docs/bots.md: waitForReady,
deadlines, no retryPolicy.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "proto"))
messages, services = grpc.protos_and_services("credbroker/v1/broker.proto")

OPTIONS = [
    ("grpc.service_config", json.dumps({"methodConfig": [{"name": [{"service": "credbroker.v1.Broker"}], "waitForReady": True}]})),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.ssl_target_name_override", "localhost"),
]


def main(address, folder, seconds, rate):
    def read(name):
        return (Path(folder) / name).read_bytes()

    identity = grpc.ssl_channel_credentials(read("ca.pem"), read("bot.key"), read("bot.pem"))
    broker = services.BrokerStub(grpc.secure_channel(address, identity, OPTIONS))

    def send(method, path, query=(), body=b""):
        request = messages.SignAndSendRequest(
            account="main", scope=messages.SCOPE_SPOT_MARGIN, method=method, path=path, body=body,
            query=[messages.QueryParameter(name=name, value=value) for name, value in query],
        )
        began = time.monotonic()
        try:
            answer = broker.SignAndSend(request, timeout=8)
            ended = messages.Outcome.Name(answer.outcome)
        except grpc.RpcError as error:
            ended = f"{error.code().name}: {error.details()}"
        return ended, (time.monotonic() - began) * 1000

    def trade(number):
        oid = f"waiting-{number}"
        order = {
            "clientOid": oid, "symbol": "BTC-USDT", "side": "buy", "type": "limit", "price": "10000", "size": "0.00001",
        }
        placed, _ = send(messages.METHOD_POST, "/api/v1/hf/orders", body=json.dumps(order).encode())
        cancelled, took_ms = send(
            messages.METHOD_DELETE, f"/api/v1/hf/orders/client-order/{oid}", [("symbol", "BTC-USDT")]
        )
        return [placed, cancelled], took_ms

    trades = []
    with ThreadPoolExecutor(400) as pool:
        began = time.monotonic()
        for number in range(seconds * rate):
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            trades.append(pool.submit(trade, number))
    ended = [trade.result() for trade in trades]
    calls = [call for both, _ in ended for call in both]
    failed = [call for call in calls if call != "OUTCOME_ACCEPTED"]
    cancels_ms = sorted(took_ms for _, took_ms in ended)
    result = {
        "calls": len(calls), "failed": len(failed), "why": sorted(set(failed))[:5],
        "cancels_p50_ms": cancels_ms[len(cancels_ms) // 2], "cancels_p99_ms": cancels_ms[len(cancels_ms) * 99 // 100],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
