"""Snapshots of an engine and its sequences for status calls.

Made by ``engine``, sent by ``engine_service``. They must not hold references to live engine state.
"""

from dataclasses import dataclass
from typing import NamedTuple

from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kernels.base import KVLayout
from farshore.workers.engine.sequence import Sequence


class EngineLoad(NamedTuple):
    """How many requests an engine runs and how many wait."""

    running: int
    """Requests that have been placed and have not ended."""
    waiting: int
    """Requests that wait for their first placement."""
    parked: int
    """Choices that gave their memory back and wait for new memory."""
    parkings: int
    """Number of times that a choice was parked since the engine started."""
    tokens: int
    """Tokens generated since the engine started."""


class SpanView(NamedTuple):
    """Positions ``first .. last`` and groups ``group0 .. group1`` (ends excluded) that a sequence reads from
    a worker, or writes there."""

    worker: WorkerId
    first: int
    last: int
    group0: int
    group1: int
    size_bytes: int
    """Bytes of the KV of these positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceView:
    """One sequence that has memory. Token counts and positions are in tokens."""

    id: SequenceId
    choice: int
    epoch: Epoch
    committed: int
    tail_first: int
    spans: tuple[SpanView, ...]


def view(sequence: Sequence, layout: KVLayout) -> SequenceView | None:
    """Returns a snapshot of ``sequence``, or None if it has no memory. ``layout``: of blocks with all head
    groups. May be called from any thread."""
    tail = sequence.tail
    if tail is None:
        return None
    return SequenceView(
        id=sequence.id,
        choice=sequence.choice,
        epoch=sequence.epoch,
        committed=sequence.committed,
        tail_first=tail.start,
        spans=tuple(
            SpanView(
                span.worker,
                span.first,
                span.last,
                span.group0,
                span.group1,
                (span.last - span.first) * layout.of_groups(span.group1 - span.group0).token_bytes,
            )
            for span in list(sequence.spans)
        ),
    )
