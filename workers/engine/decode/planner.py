"""Makes an engine's step plans, each proven before it is used.

Successive steps mostly read the same spans for the same sequences. The planner then reuses the reads and
their proof, and checks only the positions of the rows. Called by ``retry``. It must not know shards.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan.step_plan import PositionRange, Read, StepPlan
from farshore.ids import WorkerId
from farshore.workers.engine.decode.step_entry import StepEntry


class Planner:
    """Makes the step plans of one engine. Not thread-safe."""

    def __init__(self, attention: AttentionModel) -> None:
        self._groups = attention.specs[0].groups
        self._shape: object = None
        """Everything that the last plan's reads depend on."""
        self._plan: StepPlan | None = None

    def plan(self, step: int, entries: Seq[StepEntry]) -> StepPlan:
        """Returns the plan of step number ``step``; each entry's rows start at its committed length.

        Raises InvalidPlan if the plan does not cover each row's positions exactly once (invariant 1,
        docs/architecture.md).
        """
        shape = [
            (entry.sequence, entry.sequence.version, entry.sequence.placed_tail.start, entry.rows)
            for entry in entries
        ]
        positions = tuple(entry.sequence.committed + i for entry in entries for i in range(entry.rows))
        committed = {entry.sequence.key: entry.sequence.committed for entry in entries}
        tails = {
            entry.sequence.key: PositionRange(
                entry.sequence.placed_tail.start, entry.sequence.committed + entry.rows
            )
            for entry in entries
        }
        if self._plan is not None and shape == self._shape:
            plan = replace(self._plan, step=step, positions=positions)
            plan.check_rows(committed, tails)
        else:
            self._plan = None
            plan = StepPlan(
                step=step,
                groups=self._groups,
                sequences=tuple(entry.sequence.key for entry in entries for _ in range(entry.rows)),
                positions=positions,
                epochs={entry.sequence.key: entry.sequence.epoch for entry in entries},
                reads=(_reads(entries),),
            )
            plan.check(committed, tails)
            self._shape = shape
        self._plan = plan
        return plan


def _reads(entries: Seq[StepEntry]) -> dict[WorkerId, tuple[Read, ...]]:
    """Returns the reads by worker. Adjacent rows that attend to the same range of a span share one read."""
    reads: dict[WorkerId, list[Read]] = {}
    # Range of a span -> the list that holds its newest read, and the index in that list.
    last_read: dict[tuple[str, int, int, int, int], tuple[list[Read], int]] = {}
    row = 0
    for entry in entries:
        end = row + entry.rows
        for span in entry.sequence.spans:
            key = (span.span, span.first, span.last, span.group0, span.group1)
            of_worker, index = last_read.get(key, (None, 0))
            if of_worker is not None and of_worker[index].rows.stop == row:
                of_worker[index] = of_worker[index]._replace(rows=range(of_worker[index].rows.start, end))
                continue
            of_worker = reads.setdefault(span.worker, [])
            last_read[key] = of_worker, len(of_worker)
            of_worker.append(
                Read(
                    span.span,
                    span.origin,
                    span.first,
                    span.last,
                    span.group0,
                    span.group1,
                    range(row, end),
                    holder=entry.sequence.id,
                )
            )
        row = end
    return {worker: tuple(of_worker) for worker, of_worker in reads.items()}
