"""Step plans: who reads what in one decode step, and the proof that nothing is missed or counted twice.

The engine builds a :class:`StepPlan` once per step; each shard is sent its :class:`ShardStep`. A read names
absolute positions, so that the proof is about the sequence and not about where its KV happens to lie.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from farshore.errors import InvalidPlan
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId

SequenceKey = tuple[SequenceId, int]
"""A sequence's id, and which of its choices."""


class Replica(NamedTuple):
    """The same sealed tokens as a span, from the same first one on, at another worker."""

    worker: WorkerId
    span: SpanId


class Read(NamedTuple):
    """Rows ``rows`` attend to positions ``first .. last``, head groups ``group0 .. group1``, in ``span``.

    ``origin`` is the position of the span's own first token: the store counts from there. ``holder`` is a
    sequence that holds the span, and every replica of it: the shard refuses the read otherwise. Where the
    span is not reached, any of its ``replicas`` is read; they are the engine's business, and no shard is
    told."""

    span: SpanId
    origin: int
    first: int
    last: int
    group0: int
    group1: int
    rows: range
    holder: SequenceId
    replicas: tuple[Replica, ...] = ()


class Stretch(NamedTuple):
    """Positions ``first .. last``, end not included."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ShardStep:
    """One shard's part of a step plan.

    ``rows``: which rows of the step it sees, ascending; reads' rows index into them. It sees the query heads
    of groups ``group0 .. group1`` only. Its rows come in ``micro_batches``, one layer frame each.
    """

    step: int
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    group0: int
    group1: int
    reads: tuple[tuple[Read, ...], ...]
    """Per layer class."""
    micro_batches: tuple[range, ...]
    """Stretches of its rows, in order: each micro-batch of the step as far as this shard sees it, so some may
    be empty (no frame comes then)."""

    @property
    def first_position(self) -> int:
        """Where this shard comes in span order: the lowest position it reads."""
        return min(read.first for reads in self.reads for read in reads)

    @property
    def work(self) -> int:
        """Tokens times head groups times rows that it reads."""
        return sum(
            (read.last - read.first) * (read.group1 - read.group0) * len(read.rows)
            for reads in self.reads
            for read in reads
        )

    def reads_as(self, other: "ShardStep") -> bool:
        """Whether it asks for the same work as ``other``: all but its number, and where its rows stand."""
        return replace(other, step=self.step, positions=self.positions) == self

    def on_replicas(self, usable: Collection[WorkerId]) -> dict[WorkerId, "ShardStep"] | None:
        """The same reads from replicas at ``usable`` workers, in span order: at one that has all of them,
        else each at the first that has it. None where a read has no such replica."""
        alive = [
            {it.worker: it for it in read.replicas if it.worker in usable}
            for reads in self.reads
            for read in reads
        ]
        if not all(alive):
            return None
        everywhere = [worker for worker in alive[0] if all(worker in replicas for replicas in alive)]
        chosen = iter(
            [replicas[everywhere[0]] if everywhere else next(iter(replicas.values())) for replicas in alive]
        )
        moved = [[(next(chosen), read) for read in reads] for reads in self.reads]
        workers = {replica.worker for part in moved for replica, _ in part}
        steps = {
            worker: replace(
                self,
                reads=tuple(
                    tuple(
                        read._replace(span=replica.span) for replica, read in part if replica.worker == worker
                    )
                    for part in moved
                ),
            )
            for worker in workers
        }
        return dict(sorted(steps.items(), key=lambda item: (item[1].first_position, item[0])))

    def micro_batch_reads(self, layer_class: int, micro_batch: int) -> list[Read]:
        """The reads of one micro-batch, rows counted from its first. A read that several micro-batches share
        is in each of them."""
        return cut_reads(self.reads[layer_class], self.micro_batches[micro_batch])


def cut_reads(reads: Sequence[Read], rows: range) -> list[Read]:
    """What of ``reads`` concerns ``rows``, counted from the first of these."""
    parts = []
    for read in reads:
        first, last = max(read.rows.start, rows.start), min(read.rows.stop, rows.stop)
        if first < last:
            parts.append(read._replace(rows=range(first - rows.start, last - rows.start)))
    return parts


def split_rows(rows: int, micro_batches: int) -> tuple[range, ...]:
    """At most ``micro_batches`` stretches of ``rows`` rows, none empty, in size one row apart at most."""
    n = max(1, min(rows, micro_batches))
    return tuple(range(rows * i // n, rows * (i + 1) // n) for i in range(n))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All reads of one step. R rows; a row is one new token of one sequence."""

    step: int
    groups: int
    sequences: tuple[SequenceKey, ...]
    """[R] the sequence of each row."""
    positions: tuple[int, ...]
    """[R] the position of each row's token."""
    epochs: Mapping[SequenceKey, Epoch]
    reads: tuple[Mapping[WorkerId, tuple[Read, ...]], ...]
    """Per layer class: what every worker reads."""

    def check(self, committed: Mapping[SequenceKey, int], tails: Mapping[SequenceKey, Stretch]) -> None:
        """Prove design invariant 1, or raise :class:`InvalidPlan`.

        For every row, layer class and head group, the reads cover ``[0, tail.first)`` exactly once and the
        tail covers ``[tail.first, position]``; rows of a sequence stand at its committed length and above.
        ``tails`` are the stretches that the engine's own tails hold, scratch positions included.
        """
        self.check_rows(committed, tails)
        for layer_class, by_worker in enumerate(self.reads):
            cover: dict[tuple[int, int], list[Stretch]] = defaultdict(list)
            for reads in by_worker.values():
                for read in reads:
                    self._check_read(read)
                    for row in read.rows:
                        for group in range(read.group0, read.group1):
                            cover[row, group].append(Stretch(read.first, read.last))
            for row, sequence in enumerate(self.sequences):
                for group in range(self.groups):
                    where = f"row {row} (sequence {sequence}), layer class {layer_class}, head group {group}"
                    _check_cover(cover[row, group], tails[sequence].first, where)

    def check_rows(self, committed: Mapping[SequenceKey, int], tails: Mapping[SequenceKey, Stretch]) -> None:
        """What of :meth:`check` depends on where the rows stand, and not on the reads. Raises InvalidPlan."""
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
        """What others than ``workers`` read; None if nobody does."""
        reads = tuple(
            {worker: its for worker, its in by_worker.items() if worker not in workers}
            for by_worker in self.reads
        )
        return replace(self, reads=reads) if any(reads) else None

    def shard_steps(self, micro_batches: Sequence[range]) -> dict[WorkerId, ShardStep]:
        """Each worker's part, workers in span order (ties by id): the order their states are merged in.

        ``micro_batches`` cut the step's rows without a gap, as :func:`split_rows` does.
        """
        assert [row for batch in micro_batches for row in batch] == list(range(len(self.sequences)))
        parts = {}
        for worker in {w for by_worker in self.reads for w in by_worker}:
            per_class = [by_worker.get(worker, ()) for by_worker in self.reads]
            reads = [read for part in per_class for read in part]
            if not reads:
                continue
            rows = tuple(sorted({row for read in reads for row in read.rows}))
            local = {row: i for i, row in enumerate(rows)}
            parts[worker] = ShardStep(
                step=self.step,
                rows=rows,
                positions=tuple(self.positions[row] for row in rows),
                group0=min(read.group0 for read in reads),
                group1=max(read.group1 for read in reads),
                reads=tuple(
                    tuple(
                        read._replace(rows=range(local[read.rows.start], local[read.rows[-1]] + 1))
                        for read in part
                    )
                    for part in per_class
                ),
                micro_batches=tuple(
                    range(bisect_left(rows, batch.start), bisect_left(rows, batch.stop))
                    for batch in micro_batches
                ),
            )
        return dict(sorted(parts.items(), key=lambda item: (item[1].first_position, item[0])))


def _check_cover(stretches: list[Stretch], until: int, where: str) -> None:
    reached = 0
    for stretch in sorted(stretches):
        if stretch.first > reached:
            raise InvalidPlan(f"{where}: nobody reads positions {reached}..{stretch.first}")
        if stretch.first < reached:
            raise InvalidPlan(f"{where}: positions {stretch.first}..{reached} are read twice")
        reached = stretch.last
    if reached < until:
        raise InvalidPlan(f"{where}: nobody reads positions {reached}..{until}")
    if reached > until:
        raise InvalidPlan(f"{where}: positions {until}..{reached} are in the tail too")
