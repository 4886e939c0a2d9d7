"""One shard's part of the step under way: what it sees of each micro-batch, and where its answers go.

Kept by ``fanout``. It must not know when anything is sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.base import Peer
from farshore.attention_offload.exchange import Exchange, Part
from farshore.attention_offload.frame_stream import FrameStream
from farshore.attention_offload.latency import LinkRecord
from farshore.attention_offload.plan import ShardStep
from farshore.ids import WorkerId
from farshore.kernels.base import AttentionSpec, State

Index = slice | Tensor


@dataclass(slots=True, eq=False)
class Lane:
    """``rows``, by micro-batch: which of its rows the shard sees, ascending; it may be none. Of heads it sees
    the same in all of them."""

    worker: WorkerId
    peer: Peer
    record: LinkRecord
    step: ShardStep
    groups: int
    """Of the whole step."""
    rows: list[tuple[int, ...]]
    work: int
    """Of the step."""
    frames: FrameStream | None = None
    """The connection that the step was announced on, where several are served by one native call."""

    def heads(self, spec: AttentionSpec) -> slice:
        per_group = spec.q_heads_per_group
        return slice(self.step.group0 * per_group, self.step.group1 * per_group)

    def query(self, micro_batch: int, q: Tensor, spec: AttentionSpec) -> Tensor:
        """What the shard sees of q ``[rows of the micro-batch, q_heads, k_dim]``."""
        rows = self.rows[micro_batch]
        if len(rows) == len(q) and self.step.group1 - self.step.group0 == self.groups:
            return q
        return q[_index(rows), self.heads(spec)]


class Place(NamedTuple):
    """Where a shard's answers go: ``answer`` is its part of ``whole``, whose rest is the identity."""

    whole: State
    answer: State
    scattered: tuple[Tensor, slice] | None
    """Rows that do not follow each other, and heads: the answer has memory of its own, and is copied."""

    @classmethod
    def of(cls, lane: Lane, micro_batch: int, q: Tensor, spec: AttentionSpec) -> "Place":
        whole = State.identity(len(q), spec.q_heads, spec.v_dim, dtype=q.dtype)
        rows, heads = _index(lane.rows[micro_batch]), lane.heads(spec)
        # A copy where the rows are scattered, a view where they are a slice.
        answer = State(whole.o[rows, heads], whole.lse[rows, heads])
        return cls(whole, answer, None if isinstance(rows, slice) else (rows, heads))

    def put(self) -> None:
        """The answer has come."""
        if self.scattered is not None:
            self.whole.o[self.scattered] = self.answer.o
            self.whole.lse[self.scattered] = self.answer.lse


@dataclass(slots=True, eq=False)
class Pending:
    """A layer frame under way to every shard that has rows of its micro-batch: to those of ``together`` at
    once, and to the others, or if one of these was lost to all, one by one."""

    layer: int
    micro_batch: int
    q: Tensor
    sent_s: float
    together: "Group | None" = None
    sent: dict[Lane, Any] = field(default_factory=dict)
    """What their peers wait for."""

    def went_to(self, lane: Lane) -> bool:
        return lane in self.sent or (self.together is not None and lane in self.together.lanes)

    def part(self) -> None:
        """From now on, every shard that owes an answer is waited for by itself."""
        if self.together is not None:
            owed = zip(self.together.lanes, self.together.exchange.owed(), strict=True)
            self.sent |= {lane: sent for lane, sent in owed if sent is not None}
            self.together = None


class Group(NamedTuple):
    """The lanes of a micro-batch that are served by one native call; ``complete``: there are no others."""

    lanes: list[Lane]
    exchange: Exchange
    complete: bool

    @classmethod
    def of(
        cls, lanes: Mapping[Lane, Place], pending: Pending, spec: AttentionSpec, *, complete: bool
    ) -> "Group":
        parts = []
        for lane, place in lanes.items():
            assert lane.frames is not None, "a lane that has no native connection"
            parts.append(Part(lane.frames, lane.rows[pending.micro_batch], lane.heads(spec), place.whole))
        return cls(list(lanes), Exchange(parts, spec, pending.q.dtype), complete)


def _index(rows: tuple[int, ...]) -> Index:
    """How to take ``rows``, ascending, out of others: without a copy where they follow each other."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)
