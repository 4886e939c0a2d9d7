"""One decode step's plan and commit; ``step`` runs it. A step that fails leaves no trace and is run again."""

from collections.abc import Sequence as Seq

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan import Read, StepPlan, Stretch
from farshore.ids import WorkerId
from farshore.kvstore.tail import Tail
from farshore.workers.sequence import Sequence


def make_plan(step: int, batch: Seq[Sequence], attention: AttentionModel) -> StepPlan:
    """One row per sequence, at its committed length. Reserves its slot in the tail (Full if that fails)."""
    reads: dict[WorkerId, list[Read]] = {}
    for row, sequence in enumerate(batch):
        tail_of(sequence).reserve(sequence.committed + 1)
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
        {sequence.id: Stretch(tail_of(sequence).start, sequence.committed + 1) for sequence in batch},
    )


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
        tail_of(sequence).advance(sequence.committed)


def drop_scratch(batch: Seq[Sequence]) -> None:
    """After a failed step: nothing above the committed lengths remains."""
    for sequence in batch:
        tail_of(sequence).truncate(sequence.committed)


def tail_of(sequence: Sequence) -> Tail:
    assert sequence.tail is not None, f"sequence {sequence.id} has not been placed"
    return sequence.tail
