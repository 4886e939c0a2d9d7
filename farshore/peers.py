"""Proofs of the cluster token on gRPC calls between processes of one cluster (invariant 12).

Used by ``rpc``. A call carries its time, a random number and an HMAC-SHA256 of both and of its method; the
server refuses it without them. Must not know any service but health checking, which needs no proof.

A proof covers neither the messages of a call nor the server's name, and nothing is encrypted: a network on
which others can change or record packets needs more than this.
"""

import hmac
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from farshore.cluster_token import ClusterToken

HEADER = "farshore-proof"
WINDOW_S = 30
"""How far a call's time may be from the server's."""

MOST_CALLS = 1 << 20
"""Calls that a server remembers, to refuse their repetition: for up to 90 s, so 11,000 a second."""

MOST_OPEN_CHECKS = 8
"""Health checks without a proof that are served at once. A stranger who sends half of one holds a thread."""

_LABEL = b"farshore gRPC call"
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_NONCE_BYTES = 16


class SignedChannel:
    """A channel whose calls carry proofs; otherwise it behaves as ``channel``, which is one of ``grpc`` or of
    ``grpc.aio``."""

    def __init__(self, channel: Any, token: ClusterToken) -> None:
        self._channel = channel
        self._token = token

    def unary_unary(self, path: str, *args: Any, **options: Any) -> "_SignedMethod":
        return _SignedMethod(self._channel.unary_unary(path, *args, **options), path, self._token)

    def unary_stream(self, path: str, *args: Any, **options: Any) -> "_SignedMethod":
        return _SignedMethod(self._channel.unary_stream(path, *args, **options), path, self._token)

    def stream_unary(self, path: str, *args: Any, **options: Any) -> "_SignedMethod":
        return _SignedMethod(self._channel.stream_unary(path, *args, **options), path, self._token)

    def stream_stream(self, path: str, *args: Any, **options: Any) -> "_SignedMethod":
        return _SignedMethod(self._channel.stream_stream(path, *args, **options), path, self._token)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def __enter__(self) -> "SignedChannel":
        return self

    def __exit__(self, *error: object) -> None:
        self._channel.close()

    async def __aenter__(self) -> "SignedChannel":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._channel.close()


class _SignedMethod:
    """A method of a channel, called in any of gRPC's ways."""

    def __init__(self, method: Any, path: str, token: ClusterToken) -> None:
        self._method = method
        self._path = path
        self._token = token

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._method(*args, **self._signed(options))

    def with_call(self, *args: Any, **options: Any) -> Any:
        return self._method.with_call(*args, **self._signed(options))

    def future(self, *args: Any, **options: Any) -> Any:
        return self._method.future(*args, **self._signed(options))

    def _signed(self, options: dict[str, Any]) -> dict[str, Any]:
        metadata = (HEADER, call_proof(self._token, self._path, time_us=time.time_ns() // 1000))
        return options | {"metadata": (*(options.get("metadata") or ()), metadata)}


def call_proof(token: ClusterToken, path: str, *, time_us: int) -> str:
    """The header's value for one call of the method ``path`` at ``time_us``, in microseconds since 1970."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return f"{time_us}.{nonce.hex()}.{token.proof(_LABEL, _message(path, time_us, nonce)).hex()}"


class ProofCheck(grpc.ServerInterceptor):
    """Refuses calls without a valid proof as UNAUTHENTICATED, before any of their messages is read. A health
    check needs none, but one that it has must be valid. ``clock``: seconds since 1970."""

    def __init__(self, token: ClusterToken, *, clock: Callable[[], float] = time.time) -> None:
        self._token = token
        self._clock = clock
        self._seen = _Seen()
        self._open_checks = threading.Semaphore(MOST_OPEN_CHECKS)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        path = handler_call_details.method
        given = dict(handler_call_details.invocation_metadata).get(HEADER)
        if given is None and path == _HEALTH_CHECK:
            handler = continuation(handler_call_details)
            return self._limited(handler) if handler is not None else None
        problem = self.problem(path, given)
        return continuation(handler_call_details) if problem is None else _refusing(problem)

    def problem(self, path: str, given: str | bytes | None) -> str | None:
        """The reason to refuse a call of ``path`` with the header ``given``, with the fix; None if it is
        valid. A valid one is refused when it is given again."""
        if given is None:
            return "the call proves no cluster token: start the caller with the cluster's --token-file"
        parts = given.split(".") if isinstance(given, str) else []
        try:
            time_us, nonce, proof = int(parts[0]), bytes.fromhex(parts[1]), bytes.fromhex(parts[2])
            expected = self._token.proof(_LABEL, _message(path, time_us, nonce))
        except (ValueError, IndexError, OverflowError):
            return f"a malformed header {HEADER}: run the same version of farshore on every node"
        if len(nonce) != _NONCE_BYTES or not hmac.compare_digest(proof, expected):
            return (
                "the caller's cluster token is another than this server's: copy one token file to every "
                "node, and restart what was started with another"
            )
        now_s = self._clock()
        ahead_s = time_us / 1e6 - now_s
        if abs(ahead_s) > WINDOW_S:
            return (
                f"the call's time is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'} of this "
                f"host's, {WINDOW_S} s are allowed: set the clocks of both hosts (NTP)"
            )
        return self._seen.add(nonce, time_us, now_s)

    def _limited(self, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """A health check's handler as one of streams: it is called before the message arrives."""

        def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            if not self._open_checks.acquire(blocking=False):
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many health checks at once")
            try:
                for request in requests:
                    yield handler.unary_unary(request, context)
                    return
            finally:
                self._open_checks.release()

        return grpc.stream_stream_rpc_method_handler(
            answer, handler.request_deserializer, handler.response_serializer
        )


class _Seen:
    """Random numbers of calls within the window, by the window's length of the call's time. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._periods: dict[int, set[bytes]] = {}

    def add(self, nonce: bytes, time_us: int, now_s: float) -> str | None:
        """Remembers a call. Returns the reason to refuse it instead, if there is one."""
        period = time_us // (WINDOW_S * 1_000_000)
        with self._lock:
            if period not in self._periods:
                oldest = int(now_s) // WINDOW_S - 2
                self._periods = {begun: seen for begun, seen in self._periods.items() if begun >= oldest}
                self._periods[period] = set()
            seen = self._periods[period]
            if nonce in seen:
                return "a repetition of another call: it was recorded, and sent again by a stranger"
            if sum(map(len, self._periods.values())) >= MOST_CALLS:
                return f"more than {MOST_CALLS} calls in {3 * WINDOW_S} s: send fewer"
            seen.add(nonce)
        return None


def _message(path: str, time_us: int, nonce: bytes) -> bytes:
    """What a proof is made of. The fields before the path have fixed lengths."""
    return time_us.to_bytes(8, "big") + nonce + path.encode()


def _refusing(problem: str) -> grpc.RpcMethodHandler:
    """A handler that refuses a call of any kind, and waits for no message."""

    def refuse(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, problem)
        yield b""  # Not reached: abort raises.

    return grpc.stream_stream_rpc_method_handler(refuse)
