"""Measures the cost of the wire by transport: the time of a hop and the rate of bulk KV, to a real shard
process.

Called by ``benchmark``, ``setting`` and ``step``. A hop carries 16 KiB of q to the shard and 16 KiB of o, and
lse, back; the attention to one token takes almost no time. Bulk KV is written to and read from a span of
Llama-8B's shape. It is compared with a raw socket: one TCP connection on loopback between two processes.
"""

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median, quantiles

import torch

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.remote import RemoteClient
from farshore.attention_offload.plan.step_plan import Read, ShardStep
from farshore.attention_offload.transport.connect import tune
from farshore.attention_offload.transport.frames import Transport
from farshore.benchmarks.kernels.shapes import LLAMA_8B
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import SpanKey
from farshore.rpc import SHARD_ENVIRONMENT

DTYPE = torch.bfloat16
HOP = AttentionSpec(q_heads=64, k_heads=1, v_heads=1, k_dim=128, v_dim=128, scale=128**-0.5)
"""The shape of a hop: q and o of one row have 16 KiB each."""

BULK_TOKENS = 2048
BULK_LAYERS = 4
SHARD_MEMORY_BYTES = 512 << 20
RAW_CHUNK_BYTES = 1 << 20

_EPOCH = Epoch(1)
_RAW_CHILD = """
import socket, sys
port, count, chunk = map(int, sys.argv[1:])
data, buffer = bytes(count), memoryview(bytearray(chunk))
with socket.create_connection(("127.0.0.1", port)) as connection:
    while order := connection.recv(1):
        if order == b"r":
            connection.sendall(data)
            continue
        left = count
        while left:
            left -= connection.recv_into(buffer[: min(chunk, left)])
        connection.sendall(b".")
"""
_BULK_CLIENT = """
import sys
from farshore.attention_offload.transport.frames import Transport
from farshore.benchmarks.offload.hop import bulk_until_eof
bulk_until_eof(sys.argv[1], Transport(sys.argv[2]))
"""


@dataclass(frozen=True, slots=True)
class BulkRates:
    """Rates in bytes per second, one for each sample. Sample i of KV and sample i of the raw socket moved the
    same number of bytes, one right after the other."""

    write: tuple[float, ...]
    raw_write: tuple[float, ...]
    read: tuple[float, ...]
    raw_read: tuple[float, ...]

    @property
    def write_over_raw(self) -> float:
        """The median of the ratios of each pair of samples."""
        return median(a / b for a, b in zip(self.write, self.raw_write, strict=True))

    @property
    def read_over_raw(self) -> float:
        return median(a / b for a, b in zip(self.read, self.raw_read, strict=True))


@contextmanager
def shard_process(*, threads: int, memory_bytes: int = SHARD_MEMORY_BYTES) -> Iterator[str]:
    """Starts an attention worker and yields its address. The process ends with the context, or with this
    process."""
    options = ("--worker", "shard", "--kv-memory-bytes", str(memory_bytes), "--threads", str(threads))
    with _child("-m", "farshore.workers.attention", *options, environment=SHARD_ENVIRONMENT) as child:
        assert child.stdout is not None
        yield child.stdout.readline().strip()


def hop_times_s(
    address: str, transport: Transport, *, calls: int, think_s: float = 0.0, warm_up: int = 200
) -> tuple[float, ...]:
    """The times of ``calls`` consecutive frames, in seconds from the send of q to the answer.

    ``think_s`` is the time that this process computes between an answer and the next frame, as an engine's
    dense layers do. If it is longer than the shard spins, the shard is asleep when the frame arrives. Raises
    TransportError if ``transport`` does not connect.
    """
    layout = KVLayout.of(HOP, layers=1, format=KVFormat.of(DTYPE))
    with _client(address, transport, HOP, layout) as client:
        span = _sealed(client, layout, "hop", tokens=1)
        read = Read(span, 0, 0, 1, 0, 1, range(1), SequenceId("hop"))
        client.begin(ShardStep(1, (0,), (1,), 0, 1, ((read,),), (range(1),)))
        q = torch.randn(1, HOP.q_heads, HOP.k_dim).to(DTYPE)
        times_s = []
        for _ in range(warm_up + calls):
            start = time.perf_counter()
            client.wait(client.send(0, 0, q))
            end = time.perf_counter()
            times_s.append(end - start)
            while time.perf_counter() < end + think_s:
                pass
        client.store.drop_sequence(SequenceId("hop"), epoch=_EPOCH)
    return tuple(times_s[warm_up:])


def bulk_rates(address: str, transport: Transport, *, rounds: int) -> BulkRates:
    """Measures writes and reads of one layer of 2,048 tokens (8 MiB). Each is followed by a raw transfer of
    the same size to or from a third process. Takes ``rounds`` samples of each layer."""
    layout = bulk_layout()
    count = BULK_TOKENS * layout.layer_token_bytes
    k, v = _kv(layout, BULK_TOKENS)
    samples: dict[str, list[float]] = {"write": [], "raw_write": [], "read": [], "raw_read": []}
    with _bulk_client(address, transport) as client, _raw_client(count) as raw:
        span = _span(client, layout, "bulk", BULK_TOKENS)
        for layer in range(layout.layers):
            _write(client, "bulk", span, layer, k, v)  # touches the span's memory for the first time
        data, buffer = bytes(count), memoryview(bytearray(count))
        transfers: dict[str, Callable[[int], object]] = {
            "write": lambda layer: _write(client, "bulk", span, layer, k, v),
            "raw_write": lambda _: _raw_write(raw, data),
            "read": lambda layer: client.store.read(span, layer, 0, BULK_TOKENS, sequence=SequenceId("bulk")),
            "raw_read": lambda _: _raw_read(raw, buffer),
        }
        for names in (("write", "raw_write"), ("read", "raw_read")):
            for index in range(rounds * layout.layers):
                for name in names:
                    taken_s = _timed(partial(transfers[name], index % layout.layers))
                    samples[name].append(count / taken_s)
            client.store.seal(span, BULK_TOKENS, sequence=SequenceId("bulk"), epoch=_EPOCH)
        client.store.drop_sequence(SequenceId("bulk"), epoch=_EPOCH)
    return BulkRates(**{name: tuple(rates) for name, rates in samples.items()})


@contextmanager
def _raw_client(count: int) -> Iterator[socket.socket]:
    """A TCP connection on loopback to a process that receives or sends ``count`` bytes at a time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with _child("-c", _RAW_CHILD, str(port), str(count), str(RAW_CHUNK_BYTES)):
            connection, _ = server.accept()
            with connection:
                tune(connection)
                yield connection


def _raw_write(connection: socket.socket, data: bytes) -> None:
    connection.sendall(b"w")
    connection.sendall(data)
    assert connection.recv(1) == b"."


def _raw_read(connection: socket.socket, buffer: memoryview) -> None:
    connection.sendall(b"r")
    received = 0
    while received < len(buffer):
        received += connection.recv_into(buffer[received:])


@contextmanager
def bulk_load(address: str, transport: Transport) -> Iterator[None]:
    """Runs another process that writes and reads bulk KV without a pause until the context ends."""
    with _child("-c", _BULK_CLIENT, address, str(transport)) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield


def bulk_until_eof(address: str, transport: Transport) -> None:
    """Writes and reads bulk KV until standard input ends. The process of :func:`bulk_load` runs this."""
    with _bulk_client(address, transport) as client:
        layout = bulk_layout()
        k, v = _kv(layout, BULK_TOKENS)
        span = _span(client, layout, "load", BULK_TOKENS)
        for layer in range(layout.layers):
            _write(client, "load", span, layer, k, v)
        client.store.seal(span, BULK_TOKENS, sequence=SequenceId("load"), epoch=_EPOCH)
        scratch = _span(client, layout, "load", BULK_TOKENS)
        print("started", flush=True)
        while not _at_eof():
            _write(client, "load", scratch, 0, k, v)
            client.store.read(span, 0, 0, BULK_TOKENS, sequence=SequenceId("load"))
        client.store.drop_sequence(SequenceId("load"), epoch=_EPOCH)


def percentile(samples: Sequence[float], percent: int) -> float:
    return quantiles(samples, n=100, method="inclusive")[percent - 1]


def bulk_layout() -> KVLayout:
    """The layout of the spans for bulk KV."""
    return KVLayout.of(LLAMA_8B.spec, layers=BULK_LAYERS, format=KVFormat.of(DTYPE))


@contextmanager
def _bulk_client(address: str, transport: Transport) -> Iterator[RemoteClient]:
    with _client(address, transport, LLAMA_8B.spec, bulk_layout()) as client:
        yield client


@contextmanager
def _client(
    address: str, transport: Transport, spec: AttentionSpec, layout: KVLayout
) -> Iterator[RemoteClient]:
    model = AttentionModel(specs=(spec,), layer_class=(0,) * layout.layers, layouts=(layout,))
    client = RemoteClient(address, model, DTYPE, transports=(transport,))
    try:
        client.connect()
        yield client
    finally:
        client.close()


def _span(client: RemoteClient, layout: KVLayout, name: str, tokens: int) -> SpanId:
    key = SpanKey(sequence=SequenceId(name), layer_class=0, first=0, group0=0, group1=layout.groups)
    return client.store.create(key, capacity_tokens=tokens, layout=layout, epoch=_EPOCH)


def _sealed(client: RemoteClient, layout: KVLayout, name: str, *, tokens: int) -> SpanId:
    span = _span(client, layout, name, tokens)
    for layer in range(layout.layers):
        _write(client, name, span, layer, *_kv(layout, tokens))
    client.store.seal(span, tokens, sequence=SequenceId(name), epoch=_EPOCH)
    return span


def _kv(layout: KVLayout, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v ``[heads, tokens, dim]`` with the strides that a model's projections give: a token's heads are
    adjacent in memory."""
    k = torch.randn(tokens, layout.k_heads, layout.k_dim).to(DTYPE).transpose(0, 1)
    v = torch.randn(tokens, layout.v_heads, layout.v_dim).to(DTYPE).transpose(0, 1)
    return k, v


def _write(
    client: RemoteClient, name: str, span: SpanId, layer: int, k: torch.Tensor, v: torch.Tensor
) -> None:
    client.store.write(span, layer, 0, k, v, sequence=SequenceId(name), epoch=_EPOCH)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _at_eof() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


@contextmanager
def _child(*arguments: str, environment: Mapping[str, str] = {}) -> Iterator[subprocess.Popen[str]]:
    """Starts a Python process that must end when its standard input ends, so that it does not outlive this
    process."""
    command = [sys.executable, "-P", *arguments]
    pipe, env = subprocess.PIPE, {**os.environ, **environment}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as child:
        try:
            yield child
        finally:
            assert child.stdin is not None
            child.stdin.close()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def _main() -> None:
    """Prints hops and bulk rates, for a quick look. ``farshore bench offload`` makes the report."""
    remote = (Transport.SHARED_MEMORY, Transport.TCP, Transport.GRPC)

    def micros(times_s: Sequence[float]) -> str:
        return f"p50 {percentile(times_s, 50) * 1e6:.1f} us, p99 {percentile(times_s, 99) * 1e6:.1f} us"

    with shard_process(threads=1) as address:
        for think_s in (0.0, 200e-6):
            for transport in remote:
                times_s = hop_times_s(address, transport, calls=2000, think_s=think_s)
                print(f"hop, {transport}, {think_s * 1e6:.0f} us apart: {micros(times_s)}", flush=True)
        for transport in remote:
            rates = bulk_rates(address, transport, rounds=6)
            text = ", ".join(f"{name} {median(rate) / 1e9:.2f} GB/s" for name, rate in asdict(rates).items())
            print(
                f"bulk, {transport}: {text}; {rates.write_over_raw:.0%} and {rates.read_over_raw:.0%} of raw",
                flush=True,
            )
            idle = hop_times_s(address, transport, calls=2000, think_s=200e-6)
            with bulk_load(address, transport):
                busy = hop_times_s(address, transport, calls=2000, think_s=200e-6)
            print(f"hop, {transport}: idle {micros(idle)}; during bulk {micros(busy)}", flush=True)


if __name__ == "__main__":
    _main()
