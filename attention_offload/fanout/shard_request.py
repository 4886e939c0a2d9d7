"""One shard's part of the step under way: what it sees of each micro-batch, and where its answers go.

Kept by ``fanout``, served by its channels. It must not know when anything is sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.fanout.latency import LinkRecord
from farshore.attention_offload.plan.step_plan import ShardStep, StepPlan
from farshore.attention_offload.transport.frames import MOST_DEADLINE_S
from farshore.attention_offload.transport.native_connection import NativeConnection
from farshore.errors import FarshoreError, Late, Lost, TransportError
from farshore.ids import WorkerId
from farshore.kernels.base import AttentionSpec, State

Index = slice | Tensor
Key = tuple[int, int]
"""Layer class and micro-batch: frames of one key have one shape."""


class ReplyBuffer(NamedTuple):
    """Where a shard's answers go: ``answer`` is its part of ``whole``, whose rest is the identity."""

    whole: State
    answer: State
    scattered: tuple[Tensor, slice] | None
    """Rows that do not follow each other, and heads: the answer has memory of its own, and is copied."""

    def put(self) -> None:
        """The answer has come."""
        if self.scattered is not None:
            self.whole.o[self.scattered] = self.answer.o
            self.whole.lse[self.scattered] = self.answer.lse


@dataclass(slots=True, eq=False)
class ShardRequest:
    """``rows``, by micro-batch: which of its rows the shard sees, ascending; it may be none. Of heads it sees
    the same in all of them."""

    worker: WorkerId
    client: ShardClient
    record: LinkRecord
    step: ShardStep
    groups: int
    """Of the whole step."""
    rows: list[tuple[int, ...]]
    work: float
    """Of the step, divided by its frames of a layer."""
    deadline_s: float = MOST_DEADLINE_S
    """Of each of the step's frames."""
    frames: NativeConnection | None = None
    """The connection that the step was announced on, where several are served by one native call."""
    announced: bool = False
    """Its peer has begun the step."""
    buffers: dict[Key, ReplyBuffer] = field(default_factory=dict)

    def heads(self, spec: AttentionSpec) -> slice:
        per_group = spec.q_heads_per_group
        return slice(self.step.group0 * per_group, self.step.group1 * per_group)

    def query(self, micro_batch: int, q: Tensor, spec: AttentionSpec) -> Tensor:
        """What the shard sees of q ``[rows of the micro-batch, q_heads, k_dim]``."""
        rows = self.rows[micro_batch]
        if len(rows) == len(q) and self.step.group1 - self.step.group0 == self.groups:
            return q
        return q[_index(rows), self.heads(spec)]

    def buffer(self, key: Key, q: Tensor, spec: AttentionSpec) -> ReplyBuffer:
        """For answers to frames like q, of all rows and heads; the same for as long as the lane lasts."""
        if key not in self.buffers:
            whole = State.identity(len(q), spec.q_heads, spec.v_dim, dtype=q.dtype)
            rows, heads = _index(self.rows[key[1]]), self.heads(spec)
            # A copy where the rows are scattered, a view where they are a slice.
            answer = State(whole.o[rows, heads], whole.lse[rows, heads])
            scattered = None if isinstance(rows, slice) else (rows, heads)
            self.buffers[key] = ReplyBuffer(whole, answer, scattered)
        return self.buffers[key]

    def repeat(self, plan: StepPlan) -> None:
        """The step's next one, of the same reads."""
        positions = tuple(plan.positions[row] for row in self.step.rows)
        self.step = replace(self.step, step=plan.step, positions=positions)

    def named(self, error: FarshoreError) -> FarshoreError:
        """What a call on its peer failed with, as one of this shard: Late or Lost where it is the
        transport's."""
        if not isinstance(error, TransportError):
            return error
        if isinstance(error, Late):
            limit = f": {self.deadline_s:.3g} s" if self.announced else ""
            named: Late | Lost = Late(f"{error}{limit}", shards=[self.worker])
        else:
            named = Lost(str(error), shards=[self.worker])
        named.__cause__ = error.__cause__ or error
        return named


def as_one(failed: Mapping[ShardRequest, FarshoreError]) -> FarshoreError:
    """The error to raise for what some lanes failed with: a shard's refusal as it is, else Lost, else Late,
    for all the shards that it is true of."""
    for error in failed.values():
        if not isinstance(error, Late | Lost):
            return error
    kind = Lost if any(isinstance(error, Lost) for error in failed.values()) else Late
    those = {request.worker: error for request, error in failed.items() if isinstance(error, kind)}
    one = kind("; ".join(dict.fromkeys(map(str, those.values()))), shards=those)
    one.__cause__ = next(iter(those.values()))
    return one


def _index(rows: tuple[int, ...]) -> Index:
    """How to take ``rows``, ascending, out of others: without a copy where they follow each other."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)
