"""Makes the kernel plans of a micro-batch's attention to KV in the engine's own memory.

Called by the layer loops, once per step and micro-batch. It must not know layers, shards or devices.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
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
    segments are then reused, and the kernels may advance the last plan.
    """

    def __init__(self, attention: AttentionModel, local: LocalKV, make_plan: Callable[..., Any]) -> None:
        self._attention = attention
        self._local = local
        self._make_plan = make_plan
        self._reads_key: object = None
        """Everything that the rows and segments of the last plan depend on, except the tails' last tokens."""
        self._work = WorkList.of([])
        self._segments = Segments.of([])
        self._ends = _ends([])
        self._last: Any = None
        """The last plan; None if it can't be advanced."""

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
        last, self._last = self._last, None  # None after an error, too.
        if last is not None and key == self._reads_key:
            newest = np.array([run.newest for run in runs], np.int32)
            self._segments.count.numpy()[self._ends[0]] = newest + 1 - self._ends[1]
        else:
            last, self._reads_key = None, key
            self._build(runs, reads)
        self._last = self._make_plan(
            self._work,
            self._segments,
            self._local.memory,
            self._attention.layouts[0],
            self._attention.specs[0],
            positions=position_tensor,
            threads=torch.get_num_threads(),
            last=last,
        )
        return self._last

    def _build(self, runs: "list[_TailRun]", reads: Sequence[Read]) -> None:
        """Builds rows and segments: those of ``reads`` first, then those of the tails."""
        work, segments = work_of(reads, self._local.store) if self._local.store is not None else ([], [])
        groups = self._attention.specs[0].groups
        ends = []
        for run in runs:
            of_tail = run.tail.segments(run.newest + 1)
            segments.append(of_tail)
            work += [(run.row, run.rows, len(work) + i, 0, groups) for i in range(of_tail.size)]
            ends.append((len(work) - 1, int(of_tail.position[-1])))
        self._ends = _ends(ends)
        self._work, self._segments = WorkList.of(work), Segments.concat(segments)


def _ends(pairs: Sequence[tuple[int, int]]) -> NDArray[np.int32]:
    """i32[2, tails]: the index of each tail's last segment, and the position of its first token."""
    return np.array(pairs, np.int32).reshape(-1, 2).T


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
