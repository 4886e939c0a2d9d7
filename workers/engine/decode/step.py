"""The layer loop of one decode step: projections, attention, merge and the rest of each layer.

While the shards work on a layer of one micro-batch, the engine computes its keys and values, attends to the
KV in its own memory, and continues with the other micro-batches::

    engine   A: q k v local   B: q k v local │ A: merge, finish, q k v local │ B: merge, finish, q k v local │
    shards           A ━━━━━━━━━━━━━━━━━━━━━━━━      B ━━━━━━━━━━━━━━━━━━━━━━━━━━━      A ━━━━━━━━━━━━━

"local" is attention to the engine's own memory: the tails, and the spans that were placed on the engine
itself. One kernel call attends to both. A step that reads only local KV sends no frames.

The result does not depend on how rows are cut into micro-batches, up to float rounding of matrix products.
Called by ``retry``. It must not know sequences, placement or how tokens are drawn.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Shards
from farshore.attention_offload.plan.step_plan import Read, StepPlan, cut_reads, split_rows
from farshore.kernels.base import Kernels, State
from farshore.kvstore.store.tail import Tail, TailBatch
from farshore.models.llama import Llama
from farshore.workers.engine.attention_model import merged_dtype
from farshore.workers.engine.decode.kernel_plans import KernelPlans, LocalKV


class LayerLoop:
    """Runs the steps of one engine. Not thread-safe.

    Buffers and kernel plans are kept from step to step while micro-batches keep their sizes and reads.
    """

    def __init__(
        self,
        *,
        model: Llama,
        attention: AttentionModel,
        kernels: Kernels[Any],
        shards: Shards,
        local: LocalKV,
    ) -> None:
        self._model = model
        self._attention = attention
        self._shards = shards
        self._local = local
        self._kernels = kernels
        self._batches: list[_MicroBatch] = []

    def run(
        self, plan: StepPlan, tokens: Sequence[int], tails: Sequence[Tail], *, micro_batches: int
    ) -> Tensor:
        """Runs one step; returns the logits ``f32[R, vocab]`` of the plan's R rows.

        Row r is ``tokens[r]`` at ``plan.positions[r]``; its KV goes to ``tails[r]``, in the engine's memory.
        Rows of one tail are adjacent. The step writes uncommitted KV into the tails and changes nothing else.
        Raises TransportError if a shard does not answer: truncate the tails to the committed length, then
        plan and run again. Raises Full if a tail finds no room.
        """
        cuts = split_rows(len(tokens), micro_batches)
        shards, reads = begin(plan, cuts, shards=self._shards, local=self._local)
        batches = self._batches_for(cuts)
        for index, (batch, rows) in enumerate(zip(batches, cuts, strict=True)):
            cut = slice(rows.start, rows.stop)
            batch.begin(index, tokens[cut], plan.positions[cut], tails[cut], cut_reads(reads, rows), shards)
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
            # After an error, too: no kernel may read the tails while they are truncated.
            self._kernels.wait()
        return self._model.logits(torch.cat([batch.h for batch in batches]))

    def _batches_for(self, cuts: Sequence[range]) -> "list[_MicroBatch]":
        """Returns micro-batches with as many rows as ``cuts``; the last step's if the sizes are equal."""
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


def begin(
    plan: StepPlan, cuts: Sequence[range], *, shards: Shards, local: LocalKV
) -> tuple[Shards | None, Sequence[Read]]:
    """Begins a step at the shards. ``cuts``: the rows of its micro-batches. Returns the shards, None if the
    step reads from none, and the reads of local spans."""
    worker = local.worker
    remote_plan = plan.without((worker,)) if worker is not None else plan
    reads = plan.reads[0].get(worker, ()) if worker is not None else ()
    if remote_plan is None or not any(remote_plan.reads):
        return None, reads
    shards.begin(remote_plan, cuts)
    return shards, reads


class _MicroBatch:
    """Some rows of a step. Call ``begin``, then ``start(0)``, ``finish(0)``, ``start(1)``, and so on."""

    def __init__(
        self, rows: int, *, model: Llama, attention: AttentionModel, local: LocalKV, kernels: Kernels[Any]
    ) -> None:
        spec = attention.specs[0]
        self.rows = rows
        self._overlaps = False
        self._model = model
        self._buffers = model.layer_buffers(rows)
        self._kernels = kernels
        self._plans = KernelPlans(attention, local, kernels.plan)
        self._local = State.identity(
            rows, spec.q_heads, spec.v_dim, dtype=merged_dtype(model.dtype), device=model.device
        )
        self._out = State(self._buffers.o, torch.empty_like(self._local.lse))
        self._index = 0
        self._shards: Shards | None = None
        self._append: Callable[[int], None]
        self._plan: Any = None

    @property
    def h(self) -> Tensor:
        """Hidden states ``[rows, hidden]``."""
        return self._buffers.h

    def begin(
        self,
        index: int,
        tokens: Sequence[int],
        positions: Sequence[int],
        tails: Sequence[Tail],
        reads: Sequence[Read],
        shards: Shards | None,
    ) -> None:
        """Takes the micro-batch's rows of a new step.

        ``index`` is the micro-batch's number in the step. ``shards`` must have begun the step; None if the
        step reads from no shard.
        """
        self._index, self._shards = index, shards
        self._overlaps = shards is not None and shards.overlaps(index)
        buffers = self._buffers
        device = self._model.device
        buffers.positions.copy_(torch.tensor(positions, device=device))
        buffers.enter(self._model.embed(torch.tensor(tokens, device=device)))
        self._append = TailBatch(tails, positions).bind(buffers.k, buffers.v)
        self._plan = self._plans.plan(tails, positions, reads, buffers.positions)

    def start(self, layer: int) -> None:
        """Sends q to the shards and attends to local KV.

        If the shards run on cores of their own, q is sent first, so that both run at the same time. If they
        share the engine's cores, the local kernel call is started before q is sent: it may run on a core that
        the shards do not use yet.
        """
        buffers, shards, kernels = self._buffers, self._shards, self._kernels
        if shards is None:
            buffers.project(layer)
            self._append(layer)
            kernels.partial(self._plan, layer, buffers.q, out=self._out)
        elif self._overlaps:
            buffers.query(layer)
            shards.send(layer, self._index, buffers.q)
            buffers.key_value(layer)
            self._append(layer)
            kernels.partial(self._plan, layer, buffers.q, out=self._local)
        else:
            buffers.project(layer)
            self._append(layer)
            kernels.partial_async(self._plan, layer, buffers.q, out=self._local)
            shards.send(layer, self._index, buffers.q)

    def finish(self, layer: int) -> None:
        """Merges the shards' states, in span order, with the local state, and runs the rest of the layer."""
        if self._shards is not None:
            states = self._shards.wait(layer, self._index)
            self._kernels.wait()
            self._kernels.merge([*states, self._local], out=self._out)
        self._buffers.finish(layer)
