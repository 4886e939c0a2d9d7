"""Fixtures of the offload tests: shards, clients of them, and a small workload of random spans, steps and
queries."""

import socket
import threading
from contextlib import suppress
from functools import partial

import pytest
import torch

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.client.remote import RemoteClient
from farshore.attention_offload.plan.step_plan import Read, ShardStep
from farshore.attention_offload.shard.bulk_loop import serve_bulk
from farshore.attention_offload.shard.engine_holds import EngineHolds
from farshore.attention_offload.shard.frame_loop import FrameListener, serve_frames
from farshore.attention_offload.shard.session import AttendedBytes, ShardSession
from farshore.attention_offload.transport.frames import REMOTE, Sent, Transport
from farshore.attention_offload.transport.handshake import prove_as_engine
from farshore.attention_offload.transport.native_connection import NativeConnection
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kernels.base import AttentionSpec, KVLayout, State
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import SpanKey
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore

DEADLINE_S = 60.0


class Workload:
    """The spans, steps and queries of an engine with a small model."""

    spec = AttentionSpec(q_heads=6, k_heads=3, v_heads=3, k_dim=8, v_dim=6, scale=8**-0.5)
    layers = 2
    old, owner, new = Epoch(1), Epoch(2), Epoch(3)

    def __init__(self, dtype):
        """Blocks have 16 tokens, so that short spans need several."""
        self.dtype = dtype
        self.layout = KVLayout.of(self.spec, layers=self.layers, format=KVFormat.of(dtype))
        self.layout = self.layout._replace(block_tokens=16)
        self.model = AttentionModel(
            specs=(self.spec,), layer_class=(0,) * self.layers, layouts=(self.layout,)
        )

    def tokens(self, count, *, seed=0, **changes):
        """Random k and v of ``count`` tokens, in the shape of the layout with ``changes``."""
        layout = self.layout._replace(**changes)
        random = torch.Generator().manual_seed(seed)
        k = torch.randn(layout.k_heads, count, layout.k_dim, generator=random)
        v = torch.randn(layout.v_heads, count, layout.v_dim, generator=random)
        return k.to(layout.format.dtype), v.to(layout.format.dtype)

    def key(self, name, *, first=0, group0=0, group1=3):
        return SpanKey(sequence=SequenceId(name), layer_class=0, first=first, group0=group0, group1=group1)

    def sealed_span(self, store, name, first, last, group0=0, group1=3):
        """Creates and seals a span of random tokens at positions ``first .. last``. Returns a read of all of
        it."""
        layout = self.layout.of_groups(group1 - group0)
        key = self.key(name, first=first, group0=group0, group1=group1)
        span = store.create(key, capacity_tokens=last - first, layout=layout, epoch=self.owner)
        for layer in range(layout.layers):
            k, v = self.tokens(last - first, groups=layout.groups, seed=first + layer)
            store.write(span, layer, 0, k, v, sequence=key.sequence, epoch=self.owner)
        store.seal(span, last - first, sequence=key.sequence, epoch=self.owner)
        return Read(span, first, first, last, group0, group1, range(0, 1), key.sequence)

    def step(self, reads, *, positions=(100,), number=1, group0=0, group1=3):
        rows = tuple(range(len(positions)))
        return ShardStep(number, rows, tuple(positions), group0, group1, (tuple(reads),), (range(len(rows)),))

    def query(self, *, rows=1, groups=3, seed=0):
        random = torch.Generator().manual_seed(seed)
        q = torch.randn(rows, groups * self.spec.q_heads_per_group, self.spec.k_dim, generator=random)
        return q.to(self.dtype)

    def run(self, client, step):
        """Runs a step and returns the states of all layers as raw bytes, which must be equal for all clients.
        Connects first if there is no connection, as the engine does outside its loop."""
        client.connect()
        client.begin(step)
        states = []
        for layer in range(self.layers):
            q = self.query(rows=len(step.rows), groups=step.group1 - step.group0, seed=layer)
            states.append(client.wait(client.send(layer, 0, q)))
        return self.raw_bytes(states)

    def raw_bytes(self, states):
        assert all(state.o.dtype == self.dtype and state.lse.isfinite().all() for state in states)
        return [field.contiguous().view(torch.uint8).tolist() for state in states for field in state]


@pytest.fixture
def dtype():
    """The dtype of the workload. A test may parametrize it."""
    return torch.float32


@pytest.fixture
def work(dtype):
    return Workload(dtype)


@pytest.fixture
def start_shard(serve_store):
    """start_shard(worker=..., memory_bytes=..., service=...) -> Shard with an empty store."""

    def start(*, worker="shard", memory_bytes=8 << 20, **options):
        store = LocalStore(worker=WorkerId(worker), arena=Arena(memory_bytes))
        return serve_store(store, WorkerId(worker), **options)

    return start


@pytest.fixture
def shard(start_shard):
    return start_shard()


@pytest.fixture(params=REMOTE)
def transport(request):
    """The first transport that clients try for hot frames. A test of a single one may parametrize it."""
    return request.param


@pytest.fixture
def reach(work):
    """reach(address, ...) -> RemoteClient of the workload's model that tries all transports, or those given.
    It is closed after the test."""
    clients = []

    def to(address, **options):
        clients.append(RemoteClient(address, work.model, work.dtype, **options))
        return clients[-1]

    yield to
    for client in clients:
        client.close()


@pytest.fixture
def connect(connect, work, transport):
    """connect(address, ...) -> RemoteClient of the workload's model, which tries ``transport``, then gRPC."""
    return partial(connect, model=work.model, transports=(transport, Transport.GRPC))


class CountingProxy:
    """Forwards connections to a shard's TCP port and counts the bytes in both directions."""

    def __init__(self, target):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._target = target
        self._counts = [0, 0]
        self._lock = threading.Lock()
        self._connections = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def counts(self):
        """(bytes to the shard, bytes back)."""
        with self._lock:
            return tuple(self._counts)

    def close(self):
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _accept(self):
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._connections.append(near)
            for pair in ((near, far, 0), (far, near, 1)):
                self._threads.append(threading.Thread(target=self._pass_on, args=pair))
                self._threads[-1].start()

    def _pass_on(self, source, sink, direction):
        # Counted before the bytes are sent, so that a test that has received an answer finds it counted.
        with source, suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    self._counts[direction] += len(data)
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy_to():
    """proxy_to(shard) -> CountingProxy to the shard's TCP port."""
    proxies = []

    def start(shard):
        proxies.append(CountingProxy(shard.service.listener.tcp_address))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


class ListeningShard:
    """A store with one sealed span, and a listener that serves its native connections. Tests send it
    malformed data and check that the span does not change."""

    def __init__(self, work):
        self.work = work
        self.store = LocalStore(worker=WorkerId("shard"), arena=Arena(1 << 20))
        self.listener = FrameListener("127.0.0.1", token=None)
        self.read = work.sealed_span(self.store, "a", 0, 20)
        self.step = work.step([self.read])
        self.digest = self.fingerprint()

    def fingerprint(self):
        """The span's digest and contents."""
        span, holder = self.read.span, self.read.holder
        return self.store.seal(span, 20, sequence=holder, epoch=self.work.owner), [
            tensor.tolist()
            for layer in range(2)
            for tensor in self.store.read(span, layer, 0, 20, sequence=holder)
        ]

    def knock(self, serve, unix=True):
        """An accepted connection to a thread that runs ``serve``."""
        offer = self.listener.expect(serve, tcp=True)
        connection = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        connection.settimeout(DEADLINE_S)
        connection.connect(f"\0{offer.unix_name}" if unix else self.listener.tcp_address)
        prove_as_engine(connection, offer.token, None, deadline_s=DEADLINE_S)
        connection.settimeout(DEADLINE_S)
        return connection

    def frames(self, unix):
        """A connection for hot frames: for shared memory if ``unix``, else TCP."""
        session = ShardSession(self.store, self.work.model, AttendedBytes())
        return self.knock(partial(serve_frames, session, self.work.dtype, False), unix)

    def bulk(self):
        """A connection for bulk KV."""
        return self.knock(partial(serve_bulk, self.store, EngineHolds(self.store)))

    def check(self, unix):
        """Checks that the store has not changed, and that an engine that sends valid frames is served."""
        assert self.fingerprint() == self.digest
        self.store.check_integrity()
        transport = Transport.SHARED_MEMORY if unix else Transport.TCP
        connection = NativeConnection(self.frames(unix), transport, "shard", self.work.model, self.work.dtype)
        connection.begin(self.step, DEADLINE_S)
        sent = Sent(1, 0, 0, 1, 6)
        out = State(torch.empty(1, 6, self.work.spec.v_dim), torch.empty(1, 6))
        q = self.work.query()
        connection.send(sent, q)
        connection.wait(sent, out, DEADLINE_S)
        connection.close()
        local = InProcessClient(WorkerId("shard"), self.store, self.work.model)
        local.begin(self.step)
        expected = local.wait(local.send(0, 0, q))
        assert torch.equal(out.o, expected.o) and torch.equal(out.lse, expected.lse)


@pytest.fixture
def target(work):
    shard = ListeningShard(work)
    yield shard
    shard.listener.close()
    shard.store.check_integrity()
