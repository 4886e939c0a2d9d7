"""The gateways of one cluster as the SDK reaches them: the one that answered last, and the others after it.

Used by the rooms above, of both clients. Any gateway answers any call, but a request's stream and its
cancellation belong to the one that runs it. Must not know what the calls mean.
"""

import ipaddress
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore import rpc
from farshore.errors import FarshoreError, InvalidRequest
from farshore.proto import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

_TOO_LARGE = re.compile(r"(?:SERVER: Received|CLIENT: Sent) message larger than max \((\d+) vs\. (\d+)\)")

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
_ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]

_RETRIES = {
    "methodConfig": [
        {
            # Not streams, which ``course`` repeats: a call that waits to be repeated when its server ends may
            # wait until its deadline (grpcio 1.85), and a stream's is a day. Not health checks: they find out
            # what is there now.
            "name": [
                {"service": service.full_name, "method": method.name}
                for service in (_INFERENCE, _ADMIN)
                for method in service.methods
                if not method.server_streaming
            ],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}
"""gRPC's service config. The calls are idempotent. gRPC waits as long as the gateway's retry hint says."""

_RETRY_OPTIONS = [
    ("grpc.enable_retries", 1),
    ("grpc.service_config", json.dumps(_RETRIES)),
    # gRPC repeats no call whose message is larger than this buffer (256 KiB by default).
    ("grpc.per_rpc_retry_buffer_size", rpc.MAX_MESSAGE_BYTES),
]

Connect = Callable[..., Any]
"""``grpc.insecure_channel``, or that of ``grpc.aio``."""


class Gateway:
    """One gateway: a stub of each of its services. Connects with the first call. Thread-safe if its channel
    is."""

    def __init__(self, address: str, connect: Connect, *, retries: bool) -> None:
        self.address = address
        self.channel = connect(address, options=_options(address) + (_RETRY_OPTIONS if retries else []))
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.operators = admin_pb2_grpc.AdminServiceStub(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    def check(self, timeout_s: float) -> Any:
        """The call that asks for its health; its reply has a ``status``."""
        return self._health.Check(
            health_pb2.HealthCheckRequest(service=_INFERENCE.full_name), timeout=timeout_s
        )

    def error(self, error: grpc.RpcError) -> FarshoreError:
        """The error to raise, chained, for a failed call."""
        if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
            refusal = _too_large(error.details() or "")
            if refusal is not None:
                return refusal
        return rpc.error_of(error, peer=f"gateway {self.address}")


class Gateways:
    """As thread-safe as its channels."""

    def __init__(self, addresses: tuple[str, ...], connect: Connect) -> None:
        # With several gateways, asking the next one is the retry: gRPC's own would wait for the first.
        self._gateways = [Gateway(address, connect, retries=len(addresses) == 1) for address in addresses]
        self._preferred = 0

    @property
    def preferred(self) -> Gateway:
        """The one that answered last; the first one until one has."""
        return self._gateways[self._preferred]

    def in_turn(self) -> list[Gateway]:
        """All of them: the preferred one, then those that follow it, in a circle."""
        first = self._preferred
        return self._gateways[first:] + self._gateways[:first]

    def prefer(self, gateway: Gateway) -> None:
        """``gateway`` answered."""
        self._preferred = self._gateways.index(gateway)


def addresses_of(given: str | Iterable[str]) -> tuple[str, ...]:
    """The addresses, each once. ``given``: each HOST:PORT, in one string with commas between them, or in
    several. Raises InvalidRequest if there is none."""
    texts = [given] if isinstance(given, str) else given
    split = [address.strip() for text in texts for address in text.split(",")]
    addresses = tuple(dict.fromkeys(filter(None, split)))
    if not addresses:
        raise InvalidRequest("no gateway's address was given: give HOST:PORT")
    return addresses


def sent_by_gateway(error: grpc.RpcError) -> bool:
    """Whether a gateway sent this status; otherwise gRPC made it, or something between."""
    return any(key == rpc.STATUS_DETAILS for key, _ in error.trailing_metadata() or ())


def retry_after_s(error: grpc.RpcError) -> float | None:
    """When the gateway wants to be asked again; None if it did not say; infinity: never."""
    told = dict(error.trailing_metadata() or ()).get(rpc.RETRY_PUSHBACK)
    if told is None:
        return None
    return int(told) / 1e3 if told.isdecimal() else math.inf


def _options(address: str) -> list[tuple[str, Any]]:
    """Channel options; a web proxy may be used unless ``address`` is on this machine."""
    if _is_here(address.rpartition(":")[0].strip("[]")):
        return rpc.OPTIONS
    return [option for option in rpc.OPTIONS if option[0] != "grpc.enable_http_proxy"]


def _is_here(host: str) -> bool:
    """Whether ``host`` names the machine that uses it (loopback or unspecified); does not resolve names."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    return address.is_loopback or address.is_unspecified


def _too_large(details: str) -> InvalidRequest | None:
    """The error for gRPC's refusal of a message above the receiver's or the sender's limit; else None."""
    found = _TOO_LARGE.search(details)
    if found is None:
        return None
    size, most = found.groups()
    return InvalidRequest(
        f"the request takes {size} bytes and the gateway at most {most}: shorten the prompt, or send text "
        "instead of token ids"
    )
