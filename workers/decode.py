"""One decode step: plan, run, commit. A step that fails leaves no trace and is run again."""

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Shards
from farshore.attention_offload.plan import Read, StepPlan, Stretch
from farshore.ids import WorkerId
from farshore.kernels.base import Rows, Segments, State
from farshore.kernels.select import Kernels, implementation
from farshore.models.llama import Llama
from farshore.workers.sequence import Sequence


def make_plan(step: int, batch: Seq[Sequence], attention: AttentionModel) -> StepPlan:
    """One row per sequence, at its committed length. Reserves its slot in the tail (Full if that fails)."""
    reads: dict[WorkerId, list[Read]] = {}
    for row, sequence in enumerate(batch):
        _tail(sequence).reserve(sequence.committed + 1)
        for span in sequence.spans:
            read = Read(
                span.span, span.first, span.first, span.last, span.group0, span.group1, range(row, row + 1)
            )
            reads.setdefault(span.worker, []).append(read)
    return StepPlan(
        step=step,
        groups=attention.specs[0].groups,
        sequences=tuple(sequence.id for sequence in batch),
        positions=tuple(sequence.committed for sequence in batch),
        epochs={sequence.id: sequence.epoch for sequence in batch},
        reads=({worker: tuple(r) for worker, r in reads.items()},),
    )


def check_plan(plan: StepPlan, batch: Seq[Sequence]) -> None:
    """Raises InvalidPlan; nothing has been sent then."""
    plan.check(
        {sequence.id: sequence.committed for sequence in batch},
        {sequence.id: Stretch(_tail(sequence).start, sequence.committed + 1) for sequence in batch},
    )


def run_step(
    plan: StepPlan,
    batch: Seq[Sequence],
    *,
    model: Llama,
    attention: AttentionModel,
    shards: Shards,
    memory: Tensor,
) -> Tensor:
    """Logits ``f32[R, vocab]``. Writes scratch into the tails and nothing else.

    Raises TransportError when a shard did not answer: :func:`drop_scratch`, then plan and run again.
    """
    shards.begin(plan)
    kernels = implementation(memory.device, attention.layouts[0].format.dtype)
    tails = _tail_plan(plan, batch, attention, memory, kernels)
    positions = torch.tensor(plan.positions)
    h = model.embed(torch.tensor([sequence.tokens[sequence.committed] for sequence in batch]))
    for layer in range(model.config.layers):
        normed = model.attention_input(layer, h)
        q = model.query(layer, normed, positions)
        pending = shards.send(layer, 0, q)
        k, v = model.key_value(layer, normed, positions)
        for row, sequence in enumerate(batch):
            tail = _tail(sequence)
            tail.append(layer, sequence.committed, k[row].unsqueeze(1), v[row].unsqueeze(1))
        state = State.identity(*q.shape[:2], v.shape[2])
        kernels.partial(tails, layer, q, out=state)
        states = [*shards.wait(pending), state]
        o = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype)
        kernels.merge(states, out=State(o, torch.empty(q.shape[:2])))
        h = model.finish(layer, h, o)
    return model.logits(h)


def commit(plan: StepPlan, batch: Seq[Sequence], attention: AttentionModel) -> None:
    """The step's KV becomes part of every sequence, and what the shards attended to is counted."""
    layout = attention.layouts[0]
    group_bytes = layout.of_groups(1).token_bytes
    for worker, reads in plan.reads[0].items():
        for read in reads:
            size = (read.last - read.first) * (read.group1 - read.group0) * group_bytes
            batch[read.rows.start].attended_bytes[worker] += size
    for sequence in batch:
        sequence.committed += 1
        _tail(sequence).advance(sequence.committed)


def drop_scratch(batch: Seq[Sequence]) -> None:
    """After a failed step: nothing above the committed lengths remains."""
    for sequence in batch:
        _tail(sequence).truncate(sequence.committed)


def _tail_plan(
    plan: StepPlan, batch: Seq[Sequence], attention: AttentionModel, memory: Tensor, kernels: Kernels
) -> Any:
    spec, layout = attention.specs[0], attention.layouts[0]
    parts: list[Segments] = []
    work: list[tuple[int, int, int, int, int]] = []
    for row, sequence in enumerate(batch):
        segments = _tail(sequence).segments(sequence.committed + 1)
        work += [(row, 1, len(work) + i, 0, spec.groups) for i in range(segments.size)]
        parts.append(segments)
    return kernels.plan(
        Rows.of(work),
        Segments.concat(parts),
        memory,
        layout,
        spec,
        positions=torch.tensor(plan.positions),
        threads=torch.get_num_threads(),
    )


def _tail(sequence: Sequence):
    assert sequence.tail is not None, f"sequence {sequence.id} has not been placed"
    return sequence.tail
