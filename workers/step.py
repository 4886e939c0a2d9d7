"""The layer loop of one decode step: what the engine runs between a plan and its commit.

While the shards work on a layer of one micro-batch, the engine computes its keys and values, attends to its
tails, and goes on with the other micro-batches::

    engine   A: q k v tail   B: q k v tail │ A: merge, finish, q k v tail │ B: merge, finish, q k v tail │
    shards         A ━━━━━━━━━━━━━━━━━━━━━━       B ━━━━━━━━━━━━━━━━━━━━━━━━━      A ━━━━━━━━━━━━━

Every row goes through the same operations however the rows are cut. Called by ``engine``; it must not know
sequences, placement or what becomes of the logits.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Shards
from farshore.attention_offload.plan import StepPlan, split_rows
from farshore.kernels.base import Rows, Segments, State
from farshore.kernels.select import implementation
from farshore.kvstore.tail import Tail, TailBatch
from farshore.models.llama import Llama


def run_step(
    plan: StepPlan,
    tokens: Sequence[int],
    tails: Sequence[Tail],
    *,
    model: Llama,
    attention: AttentionModel,
    shards: Shards,
    memory: Tensor,
    micro_batches: int,
) -> Tensor:
    """Logits ``f32[R, vocab]`` of the plan's rows: row r is ``tokens[r]`` at ``plan.positions[r]``, its KV
    goes to ``tails[r]`` (several rows in a tail follow each other), in ``memory``.

    Writes scratch into the tails and nothing else. Raises TransportError when a shard did not answer: cut the
    tails back to what is committed, then plan and run again; Full where a tail finds no room.
    """
    cuts = split_rows(len(tokens), micro_batches)
    shards.begin(plan, cuts)
    batches = [
        _MicroBatch(
            index,
            tokens[rows.start : rows.stop],
            plan.positions[rows.start : rows.stop],
            tails[rows.start : rows.stop],
            model=model,
            attention=attention,
            shards=shards,
            memory=memory,
        )
        for index, rows in enumerate(cuts)
    ]
    model.expect_calls()
    for batch in batches:
        batch.start(0)
    for layer in range(model.config.layers):
        for batch in batches:
            batch.finish(layer)
            if layer + 1 < model.config.layers:
                batch.start(layer + 1)
    return model.logits(torch.cat([batch.h for batch in batches]))


class _MicroBatch:
    """Some rows of a step, on their way through the layers: ``start(0)``, ``finish(0)``, ``start(1)``, ..."""

    def __init__(
        self,
        index: int,
        tokens: Sequence[int],
        positions: Sequence[int],
        tails: Sequence[Tail],
        *,
        model: Llama,
        attention: AttentionModel,
        shards: Shards,
        memory: Tensor,
    ) -> None:
        spec = attention.specs[0]
        self._index = index
        self._model = model
        self._shards = shards
        self._tails = TailBatch(tails, positions)
        self._positions = torch.tensor(positions)
        self.h = model.embed(torch.tensor(tokens))
        self._kernels = implementation(memory.device, attention.layouts[0].format.dtype)
        rows = list(zip(tails, positions, strict=True))
        self._plan = _tail_plan(rows, attention, memory, self._kernels.plan)
        self._tail_state = State.identity(len(tokens), spec.q_heads, spec.v_dim)
        lse = torch.empty(len(tokens), spec.q_heads)
        self._out = State(torch.empty(len(tokens), spec.q_heads, spec.v_dim, dtype=self.h.dtype), lse)
        self._pending: Any = None
        self.travels = shards.travels(index)

    def start(self, layer: int) -> None:
        """Send q off first, if it travels; k, v and the tail's attention come while the shards work."""
        if self.travels:
            normed = self._model.attention_input(layer, self.h)
            q = self._model.query(layer, normed, self._positions)
            self._pending = self._shards.send(layer, self._index, q)
            k, v = self._model.key_value(layer, normed, self._positions)
        else:
            q, k, v = self._model.project(layer, self.h, self._positions)
            self._pending = self._shards.send(layer, self._index, q)
        self._tails.append(layer, k, v)
        self._kernels.partial(self._plan, layer, q, out=self._tail_state)

    def finish(self, layer: int) -> None:
        """Merge what the shards and the tail say, in span order, and go through the layer's rest."""
        states = self._shards.wait(self._pending)
        self._kernels.merge([*states, self._tail_state], out=self._out)
        self.h = self._model.finish(layer, self.h, self._out.o)


def _tail_plan(rows: list[tuple[Tail, int]], attention: AttentionModel, memory: Tensor, plan: Any) -> Any:
    """Every row on its tail up to itself. Rows that follow each other in one tail read it
    together: no row sees what is above its position."""
    spec = attention.specs[0]
    parts: list[Segments] = []
    work: list[tuple[int, int, int, int, int]] = []
    row = segment = 0
    for _, it in groupby(rows, key=lambda tail_position: id(tail_position[0])):
        following = list(it)
        tail, newest = following[-1]
        segments = tail.segments(newest + 1)
        work += [(row, len(following), segment + i, 0, spec.groups) for i in range(segments.size)]
        parts.append(segments)
        row, segment = row + len(following), segment + segments.size
    return plan(
        Rows.of(work),
        Segments.concat(parts),
        memory,
        attention.layouts[0],
        spec,
        positions=torch.tensor([position for _, position in rows]),
        threads=torch.get_num_threads(),
    )
