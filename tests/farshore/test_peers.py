"""Calls between processes of a cluster: a server takes those that prove its token, once, and no others."""

import asyncio
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from farshore import errors, peers, rpc
from farshore.cluster_token import ClusterToken

CODE = grpc.StatusCode
DEADLINE_S = 30
NOW_S = 1_800_000_000.0
PATH = "/test.Echo/Unary"


@pytest.fixture
def tokens(tmp_path):
    """Two tokens."""
    return [ClusterToken.make(tmp_path / name) for name in ("ours", "another")]


class Echo:
    """A service with one method of each kind."""

    def __init__(self):
        self.called = []

    def register(self, server):
        handlers = {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "Down": grpc.unary_stream_rpc_method_handler(self.down),
            "Up": grpc.stream_unary_rpc_method_handler(self.up),
            "Both": grpc.stream_stream_rpc_method_handler(self.both),
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Echo", handlers)])

    def unary(self, request, context):
        self.called.append(dict(context.invocation_metadata()))
        return request

    def down(self, request, context):
        self.called.append(None)
        yield from (request, request)

    def up(self, requests, context):
        self.called.append(None)
        return b"".join(requests)

    def both(self, requests, context):
        self.called.append(None)
        yield from requests


@pytest.fixture
def echo():
    return Echo()


@pytest.fixture
def serve(echo):
    """serve(token, threads=4) -> the address of a server of ``echo``."""
    servers = []

    def start(token, threads=4):
        server, address = rpc.serve(
            echo.register, service="test.Echo", listen="127.0.0.1:0", threads=threads, token=token
        )
        servers.append(server)
        return address

    yield start
    for server in servers:
        server.stop(0).wait()


def call_all(channel):
    """Calls a method of each kind in each of gRPC's ways. Returns the answers."""
    options = {"timeout": DEADLINE_S, "metadata": (("mine", "kept"),)}
    unary = channel.unary_unary(PATH)
    return [
        unary(b"a", **options),
        unary.with_call(b"b", **options)[0],
        unary.future(b"c", **options).result(),
        b"".join(channel.unary_stream("/test.Echo/Down")(b"d", **options)),
        channel.stream_unary("/test.Echo/Up")(iter([b"e", b"f"]), **options),
        b"".join(channel.stream_stream("/test.Echo/Both")(iter([b"g", b"h"]), **options)),
    ]


def test_calls_of_every_kind_with_the_token_are_served(serve, echo, tokens):
    with rpc.channel(serve(tokens[0]), tokens[0]) as channel:
        grpc.channel_ready_future(channel).result(DEADLINE_S)
        assert call_all(channel) == [b"a", b"b", b"c", b"dd", b"ef", b"gh"]
    assert echo.called[0]["mine"] == "kept"


def test_asyncio_calls_of_every_kind_with_the_token_are_served(serve, tokens):
    async def run(address):
        async with rpc.aio_channel(address, tokens[0]) as channel:
            down = channel.unary_stream("/test.Echo/Down")(b"b", timeout=DEADLINE_S)
            both = channel.stream_stream("/test.Echo/Both")(timeout=DEADLINE_S)
            await both.write(b"c")
            await both.done_writing()
            return [
                await channel.unary_unary(PATH)(b"a", timeout=DEADLINE_S),
                *[message async for message in down],
                *[message async for message in both],
            ]

    assert asyncio.run(run(serve(tokens[0]))) == [b"a", b"b", b"b", b"c"]


def refusal(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = rpc.error_of(caught.value, peer="shard:1")
    assert caught.value.code() is CODE.UNAUTHENTICATED and type(error) is errors.Unauthenticated
    return str(error)


@pytest.mark.parametrize(("which", "fix"), [(None, "--token-file"), (1, "copy one token file")])
def test_calls_of_every_kind_without_the_token_are_refused(serve, echo, tokens, which, fix):
    token = tokens[which] if which is not None else None
    with rpc.channel(serve(tokens[0]), token) as channel:
        for call in (
            lambda: channel.unary_unary(PATH)(b"", timeout=DEADLINE_S),
            lambda: list(channel.unary_stream("/test.Echo/Down")(b"", timeout=DEADLINE_S)),
            lambda: channel.stream_unary("/test.Echo/Up")(iter([b""]), timeout=DEADLINE_S),
            lambda: list(channel.stream_stream("/test.Echo/Both")(iter([b""]), timeout=DEADLINE_S)),
            lambda: channel.unary_unary("/no.such/Method")(b"", timeout=DEADLINE_S),
        ):
            said = refusal(call)
            assert fix in said and "shard:1" in said
            assert str(tokens[0].path) not in said, "a stranger is told nothing"
    assert not echo.called


def test_a_server_without_a_token_serves_every_caller_of_this_machine(serve, tokens):
    address = serve(None)
    for token in (None, tokens[0]):
        with rpc.channel(address, token) as channel:
            assert channel.unary_unary(PATH)(b"x", timeout=DEADLINE_S) == b"x"


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.7", "no.such.host.invalid"])
def test_a_server_without_a_token_listens_on_loopback_only(echo, host):
    with pytest.raises(errors.InvalidRequest, match="--token-file"):
        rpc.serve(echo.register, service="test.Echo", listen=f"{host}:0", threads=1, token=None)


def test_a_health_check_needs_no_token_and_says_so_if_it_has_another(serve, tokens):
    """An orchestrator's probe has none. A gateway's has one, and so finds a wrong file."""
    address, request = serve(tokens[0]), health_pb2.HealthCheckRequest(service="test.Echo")
    for token in (None, tokens[0]):
        with rpc.channel(address, token) as channel:
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=DEADLINE_S)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with rpc.channel(address, tokens[1]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert "copy one token file" in refusal(lambda: stub.Check(request, timeout=DEADLINE_S))


def test_watching_health_and_reflection_need_the_token(serve, tokens):
    with grpc.insecure_channel(serve(tokens[0])) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        refusal(lambda: next(watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)))
        ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        refusal(lambda: next(ask(iter([request]), timeout=DEADLINE_S)))


def test_strangers_that_send_half_a_call_keep_nobody_with_the_token_out(serve, tokens):
    """Calls whose message never comes. Such a health check holds a thread, and there are few of them."""
    threads = peers.MOST_OPEN_CHECKS + 2
    address = serve(tokens[0], threads=threads)
    never = threading.Event()

    def nothing():
        never.wait(DEADLINE_S)
        yield from ()

    with grpc.insecure_channel(address) as strange, rpc.channel(address, tokens[0]) as channel:
        half = [
            strange.stream_stream(path)(nothing(), timeout=DEADLINE_S)
            for path in ["/grpc.health.v1.Health/Check", PATH] * threads
        ]
        until_s = time.monotonic() + DEADLINE_S
        while sum(call.is_active() for call in half) > peers.MOST_OPEN_CHECKS:
            assert time.monotonic() < until_s
        assert channel.unary_unary(PATH)(b"x", timeout=DEADLINE_S) == b"x"
        never.set()
        for call in half:
            call.cancel()


# -- one proof ---------------------------------------------------------------------------------------------


@pytest.fixture
def now():
    """[seconds since 1970] of the server's clock."""
    return [NOW_S]


@pytest.fixture
def check(tokens, now):
    return peers.ProofCheck(tokens[0], clock=lambda: now[0])


def proof(token, *, path=PATH, at_s=NOW_S):
    return peers.call_proof(token, path, time_us=int(at_s * 1e6))


def test_a_proof_is_valid_once(check, tokens):
    given = proof(tokens[0])
    assert check.problem(PATH, given) is None
    assert "repetition" in check.problem(PATH, given)
    assert check.problem(PATH, proof(tokens[0])) is None


@pytest.mark.parametrize("ahead_s", [-29.9, 29.9])
def test_a_proof_stays_refused_for_as_long_as_its_time_is_allowed(check, tokens, now, ahead_s):
    given = proof(tokens[0], at_s=NOW_S + ahead_s)
    assert check.problem(PATH, given) is None
    for _ in range(100):
        now[0] += 0.7
        assert check.problem(PATH, given) is not None
        assert check.problem(PATH, proof(tokens[0], at_s=now[0])) is None


@pytest.mark.parametrize(("skew_s", "said"), [(31, "31 s ahead"), (-31, "31 s behind"), (-86400, "86400 s")])
def test_clocks_that_differ_are_told_by_how_much(check, tokens, skew_s, said):
    problem = check.problem(PATH, proof(tokens[0], at_s=NOW_S + skew_s))
    assert said in problem and "NTP" in problem
    assert (
        check.problem(PATH, proof(tokens[0], at_s=NOW_S + skew_s * 0.9 if abs(skew_s) < 99 else NOW_S))
        is None
    )


def test_a_proof_is_of_one_method(check, tokens):
    assert "copy one token file" in check.problem(PATH, proof(tokens[0], path="/test.Echo/Down"))


@pytest.mark.parametrize(
    "given",
    ["", ".", "..", "a.b.c", "1.2.3", "1..", "-1.00.00", f"{1 << 70}.00.00", "1." * 50, b"\xff", "1.zz.00"],
)
def test_a_malformed_proof_is_refused(check, given):
    assert "cluster token" in (said := check.problem(PATH, given)) or "same version" in said


def test_a_changed_proof_is_refused(check, tokens):
    given = proof(tokens[0])
    for at, digit in enumerate(given):
        if digit != ".":
            changed = given[:at] + ("0" if digit != "0" else "1") + given[at + 1 :]
            assert check.problem(PATH, changed) is not None
    assert check.problem(PATH, given) is None


def test_what_a_server_remembers_is_bounded_and_forgotten(check, tokens, now, monkeypatch):
    monkeypatch.setattr(peers, "MOST_CALLS", 50)
    for _ in range(50):
        assert check.problem(PATH, proof(tokens[0])) is None
    assert "more than 50 calls" in check.problem(PATH, proof(tokens[0]))
    now[0] += 3 * peers.WINDOW_S
    assert check.problem(PATH, proof(tokens[0], at_s=now[0])) is None
