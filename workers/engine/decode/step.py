"""The layer loop of one decode step: what the engine runs between a plan and its commit.

While the shards work on a layer of one micro-batch, the engine computes its keys and values, attends to what
lies in its own memory, and goes on with the other micro-batches::

    engine   A: q k v own   B: q k v own │ A: merge, finish, q k v own │ B: merge, finish, q k v own │
    shards         A ━━━━━━━━━━━━━━━━━━━━━━       B ━━━━━━━━━━━━━━━━━━━━━━━━━      A ━━━━━━━━━━━━━

LocalKV are the tails, and spans where they were placed with the engine: one call of the kernels for both.
Where
everything is its own, nobody is sent anything.

Every row goes through the same operations however the rows are cut. Called by ``engine``; it must not know
sequences, placement or what becomes of the logits.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Shards
from farshore.attention_offload.plan.step_plan import Read, StepPlan, cut_reads, split_rows
from farshore.attention_offload.shard.session import work_of
from farshore.ids import WorkerId
from farshore.kernels.base import Kernels, Segments, State, WorkList
from farshore.kernels.select import implementation
from farshore.kvstore.base import ShardStore
from farshore.kvstore.store.tail import Tail, TailBatch
from farshore.models.llama import Llama


class LocalKV(NamedTuple):
    """The engine's own memory: where the tails are, and the spans of the store ``worker``, if it has one."""

    memory: Tensor
    worker: WorkerId | None = None
    store: ShardStore | None = None


class Steps:
    """One engine's steps. Not thread-safe: its loop calls them. Memory and kernels' plans are kept from one
    step to the next, for as long as these are alike."""

    def __init__(self, *, model: Llama, attention: AttentionModel, shards: Shards, local: LocalKV) -> None:
        self._model = model
        self._attention = attention
        self._shards = shards
        self._local = local
        self._kernels = implementation(local.memory.device, attention.layouts[0].format.dtype)
        self._batches: list[_MicroBatch] = []

    def run(
        self, plan: StepPlan, tokens: Sequence[int], tails: Sequence[Tail], *, micro_batches: int
    ) -> Tensor:
        """Logits ``f32[R, vocab]`` of the plan's rows: row r is ``tokens[r]`` at ``plan.positions[r]``, its
        KV goes to ``tails[r]`` (several rows in a tail follow each other), in the engine's memory.

        Writes scratch into the tails and nothing else. Raises TransportError when a shard did not answer: cut
        the tails back to what is committed, then plan and run again; Full where a tail finds no room.
        """
        local = self._local.worker
        elsewhere = plan.without((local,)) if local is not None else plan
        shards = self._shards if elsewhere is not None and any(elsewhere.reads) else None
        cuts = split_rows(len(tokens), micro_batches)
        if shards is not None and elsewhere is not None:
            shards.begin(elsewhere, cuts)
        reads = plan.reads[0].get(local, ()) if local is not None else ()
        batches = self._sized(cuts)
        for index, (batch, rows) in enumerate(zip(batches, cuts, strict=True)):
            cut = slice(rows.start, rows.stop)
            batch.take(index, tokens[cut], plan.positions[cut], tails[cut], cut_reads(reads, rows), shards)
        self._model.expect_calls()
        try:
            for batch in batches:
                batch.start(0)
            for layer in range(self._model.config.layers):
                for batch in batches:
                    batch.finish(layer)
                    if layer + 1 < self._model.config.layers:
                        batch.start(layer + 1)
        finally:
            # Also where a shard was lost: nobody may read the tails any more when they are cut back.
            self._kernels.wait()
        return self._model.logits(torch.cat([batch.h for batch in batches]))

    def _sized(self, cuts: Sequence[range]) -> "list[_MicroBatch]":
        """Micro-batches of these sizes: the last step's, where they are as many."""
        if [batch.rows for batch in self._batches] != [len(cut) for cut in cuts]:
            self._batches = [
                _MicroBatch(
                    len(cut),
                    model=self._model,
                    attention=self._attention,
                    local=self._local,
                    kernels=self._kernels,
                )
                for cut in cuts
            ]
        return self._batches


class _MicroBatch:
    """Some rows of a step, on their way through the layers: ``take``, then ``start(0)``, ``finish(0)``,
    ``start(1)``, ..."""

    def __init__(
        self, rows: int, *, model: Llama, attention: AttentionModel, local: LocalKV, kernels: Kernels[Any]
    ) -> None:
        spec = attention.specs[0]
        self.rows = rows
        self._overlaps = False
        self._model = model
        self._buffers = way = model.layer_buffers(rows)
        self._kernels = kernels
        self._plans = _Plans(attention, local, kernels.plan)
        # Attention's output is rounded once: here where nothing is merged into it, else by the merge.
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        self._local = State.identity(rows, spec.q_heads, spec.v_dim, dtype=wide)
        self._out = State(way.o, torch.empty_like(self._local.lse))
        self._index = 0
        self._shards: Shards | None = None
        self._append: Callable[[int], None]
        self._plan: Any = None

    @property
    def h(self) -> Tensor:
        return self._buffers.h

    def take(
        self,
        index: int,
        tokens: Sequence[int],
        positions: Sequence[int],
        tails: Sequence[Tail],
        reads: Sequence[Read],
        shards: Shards | None,
    ) -> None:
        """The rows of a step, which has begun at the ``shards``; None: nothing is read from any."""
        self._index, self._shards = index, shards
        self._overlaps = shards is not None and shards.overlaps(index)
        way = self._buffers
        way.positions.copy_(torch.tensor(positions))
        way.enter(self._model.embed(torch.tensor(tokens)))
        self._append = TailBatch(tails, positions).bind(way.k, way.v)
        self._plan = self._plans.of(tails, positions, reads, way.positions)

    def start(self, layer: int) -> None:
        """Send q off, and attend to what is the engine's own: beside the shards where they have cores of
        their own; else first, or on a core that they have not taken yet."""
        way, shards, kernels = self._buffers, self._shards, self._kernels
        if shards is None:
            way.project(layer)
            self._append(layer)
            kernels.partial(self._plan, layer, way.q, out=self._out)
        elif self._overlaps:
            way.query(layer)
            shards.send(layer, self._index, way.q)
            way.key_value(layer)
            self._append(layer)
            kernels.partial(self._plan, layer, way.q, out=self._local)
        else:
            way.project(layer)
            self._append(layer)
            kernels.partial_async(self._plan, layer, way.q, out=self._local)
            shards.send(layer, self._index, way.q)

    def finish(self, layer: int) -> None:
        """Merge what the shards say, in span order, and what the engine has, and go through the layer's
        rest."""
        if self._shards is not None:
            states = self._shards.wait(layer, self._index)
            self._kernels.wait()
            self._kernels.merge([*states, self._local], out=self._out)
        self._buffers.finish(layer)


class _Plans:
    """The kernels' plan of one micro-batch's reads in the engine's own memory, step after step.

    From one step to the next the same rows mostly read the same places, one token more of each tail: rows and
    segments stay as they are, and are not checked again."""

    def __init__(self, attention: AttentionModel, local: LocalKV, plan: Callable[..., Any]) -> None:
        self._attention = attention
        self._local = local
        self._plan = plan
        self._places: object = None
        self._work = WorkList.of([])
        self._segments = Segments.of([])
        self._ends: list[tuple[int, int]] = []
        """Of each tail: its last segment, and the position of that one's first token."""

    def of(
        self, tails: Sequence[Tail], positions: Sequence[int], reads: Sequence[Read], tensor: Tensor
    ) -> Any:
        """Every row on ``reads``, and on its tail up to itself. Rows that follow each other in one tail read
        it together: no row sees what is above its position. ``tensor``: the positions."""
        stretches = _stretches(tails, positions)
        block = self._attention.layouts[0].block_tokens
        places = (
            [(it.rows, it.tail.start, it.tail.bases, it.newest // block) for it in stretches],
            list(reads),
        )
        known = places == self._places
        if known:
            for (segment, first), it in zip(self._ends, stretches, strict=True):
                self._segments.count[segment] = it.newest + 1 - first
        else:
            self._places = None
            self._lay_out(stretches, reads)
        plan = self._plan(
            self._work,
            self._segments,
            self._local.memory,
            self._attention.layouts[0],
            self._attention.specs[0],
            positions=tensor,
            threads=torch.get_num_threads(),
            checked=known,
        )
        self._places = places
        return plan

    def _lay_out(self, stretches: "list[_Stretch]", reads: Sequence[Read]) -> None:
        work, parts = work_of(reads, self._local.store) if self._local.store is not None else ([], [])
        groups = self._attention.specs[0].groups
        self._ends = []
        for it in stretches:
            parts.append(it.tail.segments(it.newest + 1))
            work += [(it.row, it.rows, len(work) + i, 0, groups) for i in range(parts[-1].size)]
            self._ends.append((len(work) - 1, int(parts[-1].position[-1])))
        self._work, self._segments = WorkList.of(work), Segments.concat(parts)


class _Stretch(NamedTuple):
    """Rows that follow each other in one tail."""

    tail: Tail
    row: int
    rows: int
    newest: int
    """The last one's position."""


def _stretches(tails: Sequence[Tail], positions: Sequence[int]) -> list[_Stretch]:
    found: list[_Stretch] = []
    row = 0
    for _, it in groupby(tails, key=id):
        count = len(list(it))
        found.append(_Stretch(tails[row], row, count, positions[row + count - 1]))
        row += count
    return found
