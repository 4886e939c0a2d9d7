"""Defines step plans: which rows read which spans from which shard in one decode step. Proves that no token
is missed or counted twice.

The engine builds and checks a :class:`StepPlan` for each step; the fan-out cuts it into one
:class:`ShardStep` per shard. The module is pure: it must not know stores, connections or kernels. A read
names absolute positions of its sequence, so the proof does not depend on where a store keeps the tokens.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from farshore.errors import InvalidPlan
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId

SequenceKey = tuple[SequenceId, int]
"""(sequence, choice): a fork of a sequence."""


class Replica(NamedTuple):
    """An equal copy of a span at another worker: the same sealed tokens, beginning at the same position."""

    worker: WorkerId
    span: SpanId


class Read(NamedTuple):
    """The rows ``rows`` attend to positions ``first .. last`` and head groups ``group0 .. group1`` of a span,
    ends not included."""

    span: SpanId
    origin: int
    """The position of the span's first token. The store numbers the span's tokens from there."""
    first: int
    last: int
    group0: int
    group1: int
    rows: range
    holder: SequenceId
    """A sequence that holds the span and all its replicas. The shard refuses the read if it does not."""
    replicas: tuple[Replica, ...] = ()
    """The engine reads one of these if the span's shard does not answer. They are not sent to shards."""


class PositionRange(NamedTuple):
    """Positions ``first .. last`` of a sequence, end not included."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ShardStep:
    """One shard's share of a step plan: its reads, and the rows and heads that they need."""

    step: int
    """The step's number."""
    rows: tuple[int, ...]
    """The rows of the step that the shard sees, ascending. The rows of ``reads`` and ``micro_batches`` are
    indices into this tuple."""
    positions: tuple[int, ...]
    """The position of each of ``rows``."""
    group0: int
    group1: int
    """The shard sees the query heads of head groups ``group0 .. group1`` only, end not included."""
    reads: tuple[tuple[Read, ...], ...]
    """The reads of each layer class."""
    micro_batches: tuple[range, ...]
    """The rows that the shard sees of each micro-batch of the step, in order. A layer frame is sent for each
    range that is not empty."""

    @property
    def first_position(self) -> int:
        """The lowest position that the shard reads. It decides the shard's place in span order."""
        return min(read.first for reads in self.reads for read in reads)

    @property
    def work(self) -> int:
        """A measure of the shard's work: the sum of tokens x head groups x rows over all reads."""
        return sum(
            (read.last - read.first) * (read.group1 - read.group0) * len(read.rows)
            for reads in self.reads
            for read in reads
        )

    def reads_as(self, other: "ShardStep") -> bool:
        """Whether this step equals ``other`` except for its number and the positions of its rows."""
        return replace(other, step=self.step, positions=self.positions) == self

    def on_replicas(self, usable: Collection[WorkerId]) -> dict[WorkerId, "ShardStep"] | None:
        """The steps that replace this one if its reads go to replicas at ``usable`` workers, by worker and in
        span order. Returns None if a read has no replica there.

        All reads go to one worker if one has replicas of all of them; else each goes to the worker of its
        first usable replica."""
        candidates = [
            {replica.worker: replica for replica in read.replicas if replica.worker in usable}
            for reads in self.reads
            for read in reads
        ]
        if not all(candidates):
            return None
        common = [worker for worker in candidates[0] if all(worker in by_worker for by_worker in candidates)]
        chosen = iter(
            [by_worker[common[0]] if common else next(iter(by_worker.values())) for by_worker in candidates]
        )
        moved = [[(next(chosen), read) for read in reads] for reads in self.reads]
        workers = {replica.worker for class_reads in moved for replica, _ in class_reads}
        steps = {
            worker: replace(
                self,
                reads=tuple(
                    tuple(
                        read._replace(span=replica.span)
                        for replica, read in class_reads
                        if replica.worker == worker
                    )
                    for class_reads in moved
                ),
            )
            for worker in workers
        }
        return dict(sorted(steps.items(), key=lambda item: (item[1].first_position, item[0])))

    def micro_batch_reads(self, layer_class: int, micro_batch: int) -> list[Read]:
        """The reads of one micro-batch, with rows numbered from its first row. A read whose rows are in
        several micro-batches occurs in each of them."""
        return cut_reads(self.reads[layer_class], self.micro_batches[micro_batch])


def cut_reads(reads: Sequence[Read], rows: range) -> list[Read]:
    """The reads that ``rows`` make, with rows numbered from the first of ``rows``. A read that other rows
    make too is cut."""
    cut = []
    for read in reads:
        first, last = max(read.rows.start, rows.start), min(read.rows.stop, rows.stop)
        if first < last:
            cut.append(read._replace(rows=range(first - rows.start, last - rows.start)))
    return cut


def split_rows(rows: int, micro_batches: int) -> tuple[range, ...]:
    """Divides ``rows`` rows into ``min(rows, micro_batches)`` adjacent ranges, at least one. Their sizes
    differ by at most one row."""
    n = max(1, min(rows, micro_batches))
    return tuple(range(rows * i // n, rows * (i + 1) // n) for i in range(n))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All reads of one step with R rows. A row is one new token of one sequence."""

    step: int
    groups: int
    sequences: tuple[SequenceKey, ...]
    """[R] The sequence of each row."""
    positions: tuple[int, ...]
    """[R] The position of each row's token."""
    epochs: Mapping[SequenceKey, Epoch]
    reads: tuple[Mapping[WorkerId, tuple[Read, ...]], ...]
    """The reads at each worker, for each layer class."""

    def check(self, committed: Mapping[SequenceKey, int], tails: Mapping[SequenceKey, PositionRange]) -> None:
        """Proves invariant 1 (docs/architecture.md) for this step, or raises :class:`InvalidPlan`.

        For every row, layer class and head group, the reads must cover the positions ``[0, tail.first)``
        exactly once, and the tail must cover ``[tail.first, position]``. The rows of a sequence must have
        consecutive positions from its committed length on. ``tails`` are the position ranges of the engine's
        tails, uncommitted positions included.
        """
        self.check_rows(committed, tails)
        for layer_class, by_worker in enumerate(self.reads):
            cover: dict[tuple[int, int], list[PositionRange]] = defaultdict(list)
            for reads in by_worker.values():
                for read in reads:
                    self._check_read(read)
                    for row in read.rows:
                        for group in range(read.group0, read.group1):
                            cover[row, group].append(PositionRange(read.first, read.last))
            for row, sequence in enumerate(self.sequences):
                for group in range(self.groups):
                    where = f"row {row} (sequence {sequence}), layer class {layer_class}, head group {group}"
                    _check_cover(cover[row, group], tails[sequence].first, where)

    def check_rows(
        self, committed: Mapping[SequenceKey, int], tails: Mapping[SequenceKey, PositionRange]
    ) -> None:
        """Those checks of :meth:`check` that depend on the positions of the rows and not on the reads. They
        suffice for a step with the same reads as a checked one. Raises InvalidPlan."""
        following = dict(committed)
        for row, (sequence, position) in enumerate(zip(self.sequences, self.positions, strict=True)):
            if sequence not in self.epochs or sequence not in tails or sequence not in committed:
                raise InvalidPlan(f"row {row}: sequence {sequence} has no epoch, tail or committed length")
            if position != following[sequence]:
                raise InvalidPlan(f"row {row}: position {position}, expected {following[sequence]}")
            following[sequence] += 1
            tail = tails[sequence]
            if not tail.first <= position < tail.last:
                raise InvalidPlan(
                    f"row {row}: position {position} outside the tail {tail.first}..{tail.last}"
                )

    def _check_read(self, read: Read) -> None:
        if not 0 <= read.origin <= read.first < read.last:
            raise InvalidPlan(f"read of {read.span} is empty or negative: {read.first}..{read.last}")
        if not 0 <= read.group0 < read.group1 <= self.groups:
            raise InvalidPlan(f"read of {read.span} names groups {read.group0}..{read.group1}")
        if not 0 <= read.rows.start < read.rows.stop <= len(self.sequences) or read.rows.step != 1:
            raise InvalidPlan(f"read of {read.span} names rows {read.rows}")

    def without(self, workers: Collection[WorkerId]) -> "StepPlan | None":
        """The plan without the reads at ``workers``. Returns None if no read remains."""
        reads = tuple(
            {worker: reads for worker, reads in by_worker.items() if worker not in workers}
            for by_worker in self.reads
        )
        return replace(self, reads=reads) if any(reads) else None

    def shard_steps(self, micro_batches: Sequence[range]) -> dict[WorkerId, ShardStep]:
        """Each worker's share of the step, in the order in which the states are merged: span order, then
        worker id.

        ``micro_batches`` are adjacent ranges of all the step's rows, as :func:`split_rows` returns them.
        """
        assert [row for batch in micro_batches for row in batch] == list(range(len(self.sequences)))
        steps = {}
        for worker in {worker for by_worker in self.reads for worker in by_worker}:
            per_class = [by_worker.get(worker, ()) for by_worker in self.reads]
            reads = [read for class_reads in per_class for read in class_reads]
            if not reads:
                continue
            rows = tuple(sorted({row for read in reads for row in read.rows}))
            index_of = {row: index for index, row in enumerate(rows)}
            steps[worker] = ShardStep(
                step=self.step,
                rows=rows,
                positions=tuple(self.positions[row] for row in rows),
                group0=min(read.group0 for read in reads),
                group1=max(read.group1 for read in reads),
                reads=tuple(
                    tuple(
                        read._replace(rows=range(index_of[read.rows.start], index_of[read.rows[-1]] + 1))
                        for read in class_reads
                    )
                    for class_reads in per_class
                ),
                micro_batches=tuple(
                    range(bisect_left(rows, batch.start), bisect_left(rows, batch.stop))
                    for batch in micro_batches
                ),
            )
        return dict(sorted(steps.items(), key=lambda item: (item[1].first_position, item[0])))


def _check_cover(ranges: list[PositionRange], until: int, where: str) -> None:
    """Raises InvalidPlan, with ``where`` in its text, unless ``ranges`` cover ``[0, until)`` exactly once."""
    reached = 0
    for positions in sorted(ranges):
        if positions.first > reached:
            raise InvalidPlan(f"{where}: positions {reached}..{positions.first} are not read")
        if positions.first < reached:
            raise InvalidPlan(f"{where}: positions {positions.first}..{reached} are read twice")
        reached = positions.last
    if reached < until:
        raise InvalidPlan(f"{where}: positions {reached}..{until} are not read")
    if reached > until:
        raise InvalidPlan(f"{where}: positions {until}..{reached} are in the tail too")
