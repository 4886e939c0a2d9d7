"""The gateways of one cluster as the SDK reaches them: the one that answered last, and the others after it.

Used by ``sdk``. Any gateway answers any call, but a request's stream and its cancellation belong to the one
that runs it. Must not know what the calls mean.
"""

import ipaddress
import re
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from farshore import rpc
from farshore.errors import FarshoreError, InvalidRequest
from farshore.proto import admin_pb2_grpc, inference_pb2_grpc

_TOO_LARGE = re.compile(r"(?:SERVER: Received|CLIENT: Sent) message larger than max \((\d+) vs\. (\d+)\)")


class Gateway:
    """One gateway: a stub of each of its services. Connects with the first call. Thread-safe."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=_options(address))
        self.inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self.operators = admin_pb2_grpc.AdminServiceStub(self._channel)
        self.health = health_pb2_grpc.HealthStub(self._channel)

    def close(self) -> None:
        """Closes the connection, which ends the streams that are being read."""
        self._channel.close()

    def error(self, error: grpc.RpcError) -> FarshoreError:
        """The error to raise, chained, for a failed call."""
        if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
            refusal = _too_large(error.details() or "")
            if refusal is not None:
                return refusal
        return rpc.error_of(error, peer=f"gateway {self.address}")


class Gateways:
    """Thread-safe."""

    def __init__(self, addresses: str | Iterable[str]) -> None:
        """``addresses``: each HOST:PORT, in one string with commas between them, or in several. Raises
        InvalidRequest if there is none."""
        given = [addresses] if isinstance(addresses, str) else addresses
        split = [address.strip() for text in given for address in text.split(",")]
        self.addresses = tuple(dict.fromkeys(filter(None, split)))
        if not self.addresses:
            raise InvalidRequest("no gateway's address was given: give HOST:PORT")
        self._gateways = [Gateway(address) for address in self.addresses]
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

    def close(self) -> None:
        for gateway in self._gateways:
            gateway.close()


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
