"""How an engine connects to a shard: each transport gives the same bits, and the next one replaces it."""

import logging
import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from farshore.attention_offload import codec
from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.shard.server import serve
from farshore.attention_offload.shard.service import AttentionService
from farshore.attention_offload.transport import connect as connecting
from farshore.attention_offload.transport.frames import REMOTE, Transport, frame_bytes, native
from farshore.controller.listen import free_port
from farshore.errors import InvalidRequest, TransportError
from farshore.proto import attention_pb2 as pb

pytestmark = pytest.mark.skipif(native() is None, reason="needs the native module")


class Offering(AttentionService):
    """A shard whose offer is changed, as if it were behind a firewall or on another host."""

    def Connect(self, request, context):
        offer = super().Connect(request, context)
        for field, value in self.changes.items():
            setattr(offer, field, value)
        return offer


class Asked(AttentionService):
    """A shard that records the remaining deadline, in seconds, of each request for an offer."""

    def __init__(self, worker, store):
        super().__init__(worker, store)
        self.waits_s = []

    def Connect(self, request, context):
        self.waits_s.append(context.time_remaining())
        return super().Connect(request, context)


def offering(**changes):
    return type("Offering", (Offering,), {"changes": dict(changes)})


def said(caplog):
    """Warnings of the engine's end."""
    return [
        record.message
        for record in caplog.records
        if record.levelno == logging.WARNING and record.name == connecting.__name__
    ]


ELSEWHERE = {"unix_name": "farshore-of-another-host"}
FIREWALLED = {"tcp_port": free_port("127.0.0.1")}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Transport.SHARED_MEMORY),
        (ELSEWHERE, Transport.TCP),
        ({"unix_name": ""}, Transport.TCP),
        (ELSEWHERE | FIREWALLED, Transport.GRPC),
        (ELSEWHERE | {"tcp_port": 0}, Transport.GRPC),
        ({"token": b"of another shard"}, Transport.GRPC),
    ],
    ids=[
        "one host",
        "two hosts",
        "no memory offered",
        "a closed port",
        "nothing offered",
        "a token not given",
    ],
)
def test_the_fastest_transport_that_connects_is_used_and_grpc_is_warned_about(
    start_shard, reach, work, changes, expected, caplog
):
    shard = start_shard(service=offering(**changes))
    client, local = reach(shard.address), InProcessClient(shard.worker, shard.store, work.model)
    assert client.transport is None
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    for _ in range(2):
        assert work.run(client, step) == work.run(local, step)
    assert client.transport is expected and client.bulk_transport is expected
    warnings = said(caplog)
    if expected is Transport.GRPC:
        assert len(warnings) == 2, "once for hot frames, once for bulk KV"
        for text in warnings:
            assert shard.address in text and "over gRPC, the slowest way" in text
            assert "shared memory: " in text and "TCP: " in text
        if changes.get("tcp_port"):
            assert f"127.0.0.1, port {changes['tcp_port']}" in warnings[0]
    else:
        assert not warnings


def test_without_grpc_an_unreachable_shard_is_a_transport_error_that_says_what_was_tried(start_shard, reach):
    client = reach(
        start_shard(service=offering(**ELSEWHERE, **FIREWALLED)).address,
        transports=(Transport.SHARED_MEMORY, Transport.TCP),
    )
    with pytest.raises(TransportError, match=r"cannot be reached: shared memory: .*; TCP: .* port \d+"):
        client.connect()


def test_a_port_that_swallows_packets_is_not_tried_for_every_step(start_shard, reach, monkeypatch, caplog):
    tried = []

    def swallowed(where, timeout):
        tried.append(where)
        raise TimeoutError("timed out")

    monkeypatch.setattr(connecting.socket, "create_connection", swallowed)
    client = reach(start_shard(service=offering(**ELSEWHERE)).address)
    for _ in range(3):
        assert client.connect() is Transport.GRPC
        client.break_off()
    assert len(tried) == 1
    assert "does a firewall let only gRPC's port through?" in said(caplog)[0]


def test_what_grpc_secures_never_leaves_the_host_in_the_clear(shard, work):
    """A shard whose gRPC is secured offers its Unix socket, but not unencrypted TCP."""

    class Context:
        def __init__(self, **properties):
            self.properties = properties

        def auth_context(self):
            return self.properties

    request = pb.ConnectRequest(open=codec.model_to_pb(work.model, work.dtype))
    for asked in (request, pb.ConnectRequest()):
        plain = shard.service.Connect(asked, Context())
        secured = shard.service.Connect(asked, Context(transport_security_type=[b"ssl"]))
        assert plain.tcp_port and plain.unix_name == secured.unix_name != ""
        assert secured.tcp_port == 0 and secured.token


def test_a_secured_channel_says_so_to_its_handler():
    """The previous test relies on this: gRPC names the security of a call's channel."""
    seen = []

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            def answer(request, context):
                seen.append(context.auth_context().get("transport_security_type"))
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, handlers=[Handler()])
        local = server.add_secure_port("127.0.0.1:0", grpc.local_server_credentials())
        plain = server.add_insecure_port("127.0.0.1:0")
        server.start()
        credentials = grpc.local_channel_credentials()
        with grpc.secure_channel(f"127.0.0.1:{local}", credentials) as channel:
            channel.unary_unary("/x/y")(b"", timeout=30)
        with grpc.insecure_channel(f"127.0.0.1:{plain}") as channel:
            channel.unary_unary("/x/y")(b"", timeout=30)
        server.stop(None).wait()
    assert seen[0] == [b"local"] and seen[1] in (None, [b"insecure"])


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0", "localhost:0"])
@pytest.mark.parametrize("transport", [Transport.TCP])
def test_tcp_listens_where_grpc_does_and_nowhere_else(listen, transport, start_shard, reach):
    if "::1" in listen and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    shard = start_shard()
    shard.stop()
    shard.server, shard.address = serve(shard.service, listen)
    where = shard.service.listener.tcp_address
    assert where[0] in ("127.0.0.1", "::1")
    client = reach(shard.address, transports=(transport,))
    assert client.connect() is transport
    assert not accepts("127.0.0.2", where[1]), "every address of this host is listened on"


def accepts(host, port):
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


# -- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "group0"), [(1, 0), (3, 1)])
def test_a_layer_costs_the_bytes_that_the_formula_says(start_shard, reach, work, rows, group0, proxy_to):
    """A proxy between the two ends counts the bytes."""
    shard = start_shard(service=offering(**ELSEWHERE))
    counter = proxy_to(shard)
    shard.service.changes["tcp_port"] = counter.port
    client = reach(shard.address, transports=(Transport.TCP,))
    read = work.sealed_span(client.store, "a", 0, 20, group0, 3)._replace(rows=range(rows))
    groups = 3 - group0
    step = work.step([read], positions=(30,) * rows, group0=group0)
    client.connect()
    client.begin(step)
    client.wait(client.send(0, 0, work.query(rows=rows, groups=groups)))
    before = counter.counts()
    client.wait(client.send(1, 0, work.query(rows=rows, groups=groups)))
    there, back = (after - was for after, was in zip(counter.counts(), before, strict=True))
    heads = groups * work.spec.q_heads_per_group
    spec, size = work.spec, work.dtype.itemsize
    assert there == 12 + rows * heads * spec.k_dim * size
    assert back == 12 + rows * heads * (4 + spec.v_dim * size)
    q, lse, o = frame_bytes(spec, rows=rows, heads=heads, dtype=work.dtype)
    assert (there, back) == (12 + q, 12 + lse + o)


@pytest.mark.parametrize("transport", REMOTE)
def test_a_query_of_another_dtype_is_refused(shard, connect, work, transport):
    client = connect(shard.address)
    client.connect()
    client.begin(work.step([work.sealed_span(client.store, "a", 0, 20)]))
    with pytest.raises(InvalidRequest):
        client.wait(client.send(0, 0, work.query().to(torch.float16)))


def test_a_shard_is_asked_where_it_listens_within_the_callers_deadline(start_shard, reach, work):
    """For frames and for bulk KV. A frozen shard must not block its cold-call thread for longer."""
    shard = start_shard(service=Asked)
    by_default, chosen = reach(shard.address), reach(shard.address, deadline_s=3.0)
    by_default.connect()
    work.sealed_span(by_default.store, "a", 0, 20)
    by_default.connect(deadline_s=1.0)  # Connected already: asks nothing.
    chosen.connect(deadline_s=2.0)
    work.sealed_span(chosen.store, "b", 0, 20)
    assert by_default.bulk_transport == chosen.bulk_transport == Transport.SHARED_MEMORY
    for wait_s, most_s in zip(shard.service.waits_s, [5.0, 5.0, 2.0, 3.0], strict=True):
        assert 0 < wait_s <= 1.1 * most_s  # gRPC rounds deadlines.
