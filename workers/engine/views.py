"""What status shows of an engine and its sequences. Made by ``engine``, told by ``engine_service``."""

from dataclasses import dataclass
from typing import NamedTuple

from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.workers.engine.sequence import Sequence


class EngineLoad(NamedTuple):
    running: int
    """Requests that have been placed and have not ended."""
    waiting: int
    """Requests that wait for their first placement."""
    parked: int
    """Choices that gave their memory back and wait for it again."""
    parkings: int
    """How often a choice had to, since the engine started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceView:
    id: SequenceId
    choice: int
    epoch: Epoch
    committed: int
    tail_first: int
    spans: tuple[tuple[WorkerId, int, int, int, int], ...]
    """(worker, first, last, group0, group1)"""


def view(sequence: Sequence) -> SequenceView | None:
    """None for one without memory. From any thread."""
    tail = sequence.tail
    if tail is None:
        return None
    return SequenceView(
        id=sequence.id,
        choice=sequence.choice,
        epoch=sequence.epoch,
        committed=sequence.committed,
        tail_first=tail.start,
        spans=tuple((s.worker, s.first, s.last, s.group0, s.group1) for s in list(sequence.spans)),
    )
