"""Makes the kernel plans of a micro-batch's attention to KV in the engine's own memory.

Called by the layer loops, once per step and micro-batch. It must not know layers, shards or devices.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan.step_plan import Read
from farshore.attention_offload.shard.session import work_of
from farshore.ids import WorkerId
from farshore.kernels.base import Segments, WorkList
from farshore.kvstore.base import ShardStore
from farshore.kvstore.store.tail import Tail


class LocalKV(NamedTuple):
    """KV in the engine's own memory: the tails, and the spans of ``store`` (of ``worker``), if any."""

    memory: Tensor
    worker: WorkerId | None = None
    store: ShardStore | None = None


class KernelPlans:
    """Makes the kernel plans of one micro-batch's reads of local KV.

    In successive steps the same rows mostly read the same memory, with one more token of each tail. Rows and
    segments are then reused, and not checked again.
    """

    def __init__(self, attention: AttentionModel, local: LocalKV, make_plan: Callable[..., Any]) -> None:
        self._attention = attention
        self._local = local
        self._make_plan = make_plan
        self._reads_key: object = None
        """Everything that the rows and segments of the last plan depend on, except the tails' last tokens."""
        self._work = WorkList.of([])
        self._segments = Segments.of([])
        self._ends: list[tuple[int, int]] = []
        """For each tail: (index of its last segment, position of that segment's first token)."""

    def plan(
        self, tails: Sequence[Tail], positions: Sequence[int], reads: Sequence[Read], position_tensor: Tensor
    ) -> Any:
        """Returns the plan by which each row attends to ``reads`` and to its tail, up to its own position.

        Adjacent rows of one tail share its segments; kernels mask positions above a row's own.
        ``position_tensor`` holds ``positions``.
        """
        runs = _tail_runs(tails, positions)
        block = self._attention.layouts[0].block_tokens
        key = (
            [(run.rows, run.tail.start, run.tail.bases, run.newest // block) for run in runs],
            list(reads),
        )
        unchanged = key == self._reads_key
        if unchanged:
            for (segment, first), run in zip(self._ends, runs, strict=True):
                self._segments.count[segment] = run.newest + 1 - first
        else:
            self._reads_key = None
            self._build(runs, reads)
        plan = self._make_plan(
            self._work,
            self._segments,
            self._local.memory,
            self._attention.layouts[0],
            self._attention.specs[0],
            positions=position_tensor,
            threads=torch.get_num_threads(),
            checked=unchanged,
        )
        self._reads_key = key
        return plan

    def _build(self, runs: "list[_TailRun]", reads: Sequence[Read]) -> None:
        """Builds rows and segments: those of ``reads`` first, then those of the tails."""
        work, segments = work_of(reads, self._local.store) if self._local.store is not None else ([], [])
        groups = self._attention.specs[0].groups
        self._ends = []
        for run in runs:
            of_tail = run.tail.segments(run.newest + 1)
            segments.append(of_tail)
            work += [(run.row, run.rows, len(work) + i, 0, groups) for i in range(of_tail.size)]
            self._ends.append((len(work) - 1, int(of_tail.position[-1])))
        self._work, self._segments = WorkList.of(work), Segments.concat(segments)


class _TailRun(NamedTuple):
    """Adjacent rows of one tail."""

    tail: Tail
    row: int
    """Index of the first row."""
    rows: int
    newest: int
    """Position of the last row."""


def _tail_runs(tails: Sequence[Tail], positions: Sequence[int]) -> list[_TailRun]:
    runs: list[_TailRun] = []
    row = 0
    for _, same_tail in groupby(tails, key=id):
        count = len(list(same_tail))
        runs.append(_TailRun(tails[row], row, count, positions[row + count - 1]))
        row += count
    return runs
