"""Step plans of one engine, each proven before it is used.

From one step to the next the same sequences mostly read the same spans. What they read is then neither built
nor proven again: only where the rows stand is. Called by ``decoder``; it must not know shards.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan.step_plan import PositionRange, Read, StepPlan
from farshore.ids import WorkerId
from farshore.workers.engine.decode.step_entry import StepEntry


class Planner:
    def __init__(self, attention: AttentionModel) -> None:
        self._groups = attention.specs[0].groups
        self._shape: object = None
        """What the last plan's reads follow from."""
        self._plan: StepPlan | None = None

    def plan(self, step: int, entries: Seq[StepEntry]) -> StepPlan:
        """Rows from each sequence's committed length on. Raises InvalidPlan; nothing has been sent then."""
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
    """A span that rows one after the other attend to alike is read once."""
    reads: dict[WorkerId, list[Read]] = {}
    newest: dict[tuple[str, int, int, int, int], tuple[list[Read], int]] = {}
    row = 0
    for entry in entries:
        end = row + entry.rows
        for span in entry.sequence.spans:
            key = (span.span, span.first, span.last, span.group0, span.group1)
            where, index = newest.get(key, (None, 0))
            if where is not None and where[index].rows.stop == row:
                where[index] = where[index]._replace(rows=range(where[index].rows.start, end))
                continue
            of_worker = reads.setdefault(span.worker, [])
            newest[key] = of_worker, len(of_worker)
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
    return {worker: tuple(its) for worker, its in reads.items()}
