"""Runs the engine's layer loop for the offload benchmark, over sequences whose KV is in stores.

Called by ``step`` and by the test of the micro-batch tuner. The KV is random: the time of a step does not
depend on its values. It must not know which measurements are compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, pairwise
from time import monotonic

import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.remote_store import RemoteStore
from farshore.attention_offload.fanout.fanout import Fanout
from farshore.attention_offload.plan.step_plan import Read, StepPlan
from farshore.benchmarks.delay import proxy
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kernels.base import BLOCK_TOKENS, KVLayout
from farshore.kernels.select import implementation
from farshore.kvstore.base import ShardStore, SpanKey
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.tail import Tail
from farshore.models.llama import Llama
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import channel
from farshore.workers.engine.decode.kernel_plans import LocalKV
from farshore.workers.engine.decode.step import LayerLoop

EPOCH = Epoch(1)
TAIL_TOKENS = BLOCK_TOKENS // 2
"""The tokens in each tail: half of a block. A full block of a tail would be handed off."""

NEAR, FAR = "127.0.0.1", "127.0.0.2"
"""Two addresses of this host. Workers listen at NEAR, the delaying proxy at FAR."""
CALL_DEADLINE_S = 10.0
BEAT_S = 10.0
"""The interval of beats to the shards, which drop an engine's holds after 30 s without one."""


@contextmanager
def delayed(address: str, attention: AttentionModel, dtype: torch.dtype, delay_s: float) -> Iterator[str]:
    """Starts a proxy that delays all bytes to and from the worker at ``address``, which listens on NEAR, by
    ``delay_s`` each way. Yields the proxy's address."""
    port = int(address.rpartition(":")[2])
    with channel(address, None) as worker:
        request = pb.ConnectRequest(open=codec.model_to_pb(attention, dtype))
        offer = pb_grpc.AttentionStub(worker).Connect(request, timeout=CALL_DEADLINE_S)
    with proxy(listen=FAR, target=NEAR, ports=[port, offer.tcp_port], delay_s=delay_s):
        yield f"{FAR}:{port}"


class StepRig:
    """Sequences with ``context_tokens`` tokens each in spans, divided by token range over ``stores``, and a
    tail.

    Each call runs a step, or one side of it, as the engine does, and truncates the tails afterwards, so that
    all calls do the same work.
    """

    def __init__(
        self,
        model: Llama,
        attention: AttentionModel,
        stores: Mapping[WorkerId, ShardStore],
        *,
        sequences: int,
        context_tokens: int,
        arena: Arena | None = None,
        local: WorkerId | None = None,
    ) -> None:
        """``arena`` holds the tails, and the spans of the store ``local``, which is the engine's own, if one
        is given."""
        self._model = model
        self._attention = attention
        self._layout = attention.layouts[0]
        self._names = [SequenceId(f"{context_tokens} tokens, {i}") for i in range(sequences)]
        self._position = context_tokens + TAIL_TOKENS
        self._arena = arena or Arena(sequences * 2 * self._layout.block_bytes)
        self._local = LocalKV(self._arena.memory, local, stores[local] if local is not None else None)
        self._tails = [_tail(self._arena, self._layout, context_tokens) for _ in self._names]
        self._spans = [_spans(self._layout, name, context_tokens, stores) for name in self._names]
        self._steps: dict[Fanout, LayerLoop] = {}
        self._numbers = count(1)
        self._remote = [store for store in stores.values() if isinstance(store, RemoteStore)]
        self._beat_s = monotonic()

    def step(self, shards: Fanout, *, micro_batches: int = 1) -> None:
        """Runs a step with one row of every sequence."""
        self._run(self._plan(len(self._names)), shards, micro_batches)

    def dense(self, rows: int) -> None:
        """Runs a step with ``rows`` of the sequences that attends to their tails only."""
        plan = self._plan(rows, spans=False)
        self._run(plan, Fanout({}, self._attention), 1)

    def attention(self, shards: Fanout, rows: int) -> None:
        """Runs only the shards' side of a step with ``rows`` of the sequences: one frame per layer."""
        spec = self._attention.specs[0]
        q = torch.ones(rows, spec.q_heads, spec.k_dim, dtype=self._model.dtype)
        shards.begin(self._plan(rows), [range(rows)])
        for layer in range(self._layout.layers):
            shards.send(layer, 0, q)
            shards.wait(layer, 0)

    def _plan(self, rows: int, *, spans: bool = True) -> StepPlan:
        if monotonic() - self._beat_s > BEAT_S:
            for store in self._remote:
                store.beat(None)
            self._beat_s = monotonic()
        reads: dict[WorkerId, list[Read]] = {}
        for row, sequence_reads in enumerate(self._spans[:rows] if spans else []):
            for worker, read in sequence_reads:
                reads.setdefault(worker, []).append(read._replace(rows=range(row, row + 1)))
        return StepPlan(
            step=next(self._numbers),
            groups=self._layout.groups,
            sequences=tuple(self._names[:rows]),
            positions=(self._position,) * rows,
            epochs=dict.fromkeys(self._names[:rows], EPOCH),
            reads=({worker: tuple(worker_reads) for worker, worker_reads in reads.items()},),
        )

    def _run(self, plan: StepPlan, shards: Fanout, micro_batches: int) -> None:
        tails = self._tails[: len(plan.sequences)]
        if shards not in self._steps:
            self._steps[shards] = LayerLoop(
                model=self._model,
                attention=self._attention,
                kernels=implementation(self._model.device, dtype=self._model.dtype),
                shards=shards,
                local=self._local,
            )
        steps = self._steps[shards]
        with torch.inference_mode():
            steps.run(plan, [0] * len(tails), tails, micro_batches=micro_batches)
        for tail in tails:
            tail.truncate(self._position)


def _tail(arena: Arena, layout: KVLayout, start: int) -> Tail:
    tail = Tail(arena=arena, layout=layout, start=start)
    k, v = _tokens(layout, TAIL_TOKENS)
    for layer in range(layout.layers):
        tail.append(layer, start, k, v)
    tail.advance(start + TAIL_TOKENS)
    return tail


def _spans(
    layout: KVLayout, sequence: SequenceId, tokens: int, stores: Mapping[WorkerId, ShardStore]
) -> list[tuple[WorkerId, Read]]:
    """Writes and seals a sequence's spans, with an equal share of its tokens in each store. Returns their
    reads by worker; the caller sets the rows."""
    cuts = [tokens * i // len(stores) for i in range(len(stores) + 1)]
    return [
        (worker, _span(layout, sequence, first, last, store))
        for (worker, store), (first, last) in zip(stores.items(), pairwise(cuts), strict=True)
    ]


def _span(layout: KVLayout, sequence: SequenceId, first: int, last: int, store: ShardStore) -> Read:
    key = SpanKey(sequence=sequence, layer_class=0, first=first, group0=0, group1=layout.groups)
    span = store.create(key, capacity_tokens=last - first, layout=layout, epoch=EPOCH)
    k, v = _tokens(layout, last - first)
    for layer in range(layout.layers):
        store.write(span, layer, 0, k, v, sequence=sequence, epoch=EPOCH)
    store.seal(span, last - first, sequence=sequence, epoch=EPOCH)
    return Read(span, first, first, last, 0, layout.groups, range(0), sequence)


def _tokens(layout: KVLayout, tokens: int) -> Sequence[Tensor]:
    random = torch.Generator().manual_seed(tokens)
    shapes = ((layout.k_heads, tokens, layout.k_dim), (layout.v_heads, tokens, layout.v_dim))
    return [torch.randn(shape, generator=random).to(layout.format.dtype) for shape in shapes]
