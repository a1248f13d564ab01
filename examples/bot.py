"""A bot in Python: reads balances and tests an order. Run `python bot.py ADDRESS FOLDER`; the demo prints both arguments.

Needs grpcio, grpcio-tools (which compiles the proto on import) and grpcio-status.
"""

import json
import sys
import time
from pathlib import Path

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proto"))
messages, services = grpc.protos_and_services("credbroker/v1/broker.proto")


def connect(address, folder):
    def read(name):
        return (Path(folder) / name).read_bytes()

    identity = grpc.ssl_channel_credentials(read("ca.pem"), read("bot.key"), read("bot.pem"))
    return services.BrokerStub(grpc.secure_channel(address, identity))


def outcome_of(error):
    """Reason and outcome of a failed call. Without the broker's ErrorInfo, the transport failed."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == "credbroker":
            return info.reason, info.metadata.get("outcome", "")
    return "TRANSPORT", "maybe_sent"


def main(address, folder):
    broker = connect(address, folder)
    # `/api/v1/hf/orders/test` places nothing, so a fixed clientOid is enough. Each real order (`/api/v1/hf/orders`) needs a new
    # one: `str(uuid.uuid4())`.
    order = {
        "clientOid": "python-1", "side": "buy", "symbol": "BTC-USDT", "type": "limit", "price": "10000", "size": "0.001",
    }
    offset_ms = None  # the exchange's clock minus this machine's, from the latest answer
    for method, path, body in (
        (messages.METHOD_GET, "/api/v1/accounts", b""),
        (messages.METHOD_POST, "/api/v1/hf/orders/test", json.dumps(order).encode()),
    ):
        request = messages.SignAndSendRequest(
            account="alpha", scope=messages.SCOPE_SPOT_MARGIN, method=method, path=path, body=body
        )
        if offset_ms is not None:  # an order that has not left the broker after 2 s is not sent
            request.not_after_ms = round(time.time() * 1000 + offset_ms) + 2000
        try:
            answer = broker.SignAndSend(request, timeout=5)
        except grpc.RpcError as error:
            reason, outcome = outcome_of(error)
            print(f"{path}: {reason}, {outcome}: {error.details()}")
        else:
            if answer.broker_time_ms:
                offset_ms = answer.broker_time_ms - time.time() * 1000
            print(f"{path}: HTTP {answer.http_status}, {messages.Outcome.Name(answer.outcome)}: {answer.body.decode()}")
            if answer.advice:  # empty unless the exchange rejected the request, or may have
                print(f"{path}: {answer.advice}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: bot.py ADDRESS FOLDER")
    main(*sys.argv[1:])
