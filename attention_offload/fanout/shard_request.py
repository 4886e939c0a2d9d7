"""Defines the shard request: one shard's share of the current step, and the buffers for its answers.

Made by ``fanout``, used by its channels. It must not know when frames are sent.
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
from farshore.kernels.host import HOST

RowIndex = slice | Tensor
ShapeKey = tuple[int, int]
"""(layer class, micro-batch). All frames of a step with the same key have the same shape."""


class ReplyBuffer(NamedTuple):
    """The memory for a shard's answers to frames of one shape."""

    state: State
    """A state over all rows and heads of the micro-batch. It is the identity where the shard sees nothing."""
    answer: State
    """The shard's rows and heads. A view of ``state`` if the rows are adjacent, else separate memory."""
    scattered: tuple[Tensor, slice] | None
    """The rows and heads of ``answer`` in ``state``, if ``answer`` is separate memory; else None."""

    def store_answer(self) -> None:
        """Copies a received answer to ``state`` if it is separate memory."""
        if self.scattered is not None:
            self.state.o[self.scattered] = self.answer.o
            self.state.lse[self.scattered] = self.answer.lse


@dataclass(slots=True, eq=False)
class ShardRequest:
    """One shard's share of the current step. It is kept for later steps with the same reads."""

    worker: WorkerId
    client: ShardClient
    record: LinkRecord
    step: ShardStep
    groups: int
    """The number of head groups of the whole step."""
    rows: list[tuple[int, ...]]
    """For each micro-batch, the rows of it that the shard sees, ascending and possibly none. The shard sees
    the same heads in all of them."""
    work: float
    """The work of one layer frame: the step's work divided by the number of its frames per layer."""
    deadline_s: float = MOST_DEADLINE_S
    """The deadline of each frame of the step."""
    native_connection: NativeConnection | None = None
    """The native connection on which the step was announced; None if it was announced over gRPC or in
    process."""
    announced: bool = False
    """Whether the client has begun the step."""
    buffers: dict[ShapeKey, ReplyBuffer] = field(default_factory=dict)

    def heads(self, spec: AttentionSpec) -> slice:
        """The query heads that the shard sees."""
        per_group = spec.q_heads_per_group
        return slice(self.step.group0 * per_group, self.step.group1 * per_group)

    def query(self, micro_batch: int, q: Tensor, spec: AttentionSpec) -> Tensor:
        """The part of q ``[rows of the micro-batch, q_heads, k_dim]`` that is sent to this shard."""
        rows = self.rows[micro_batch]
        if len(rows) == len(q) and self.step.group1 - self.step.group0 == self.groups:
            return q
        return q[_row_index(rows), self.heads(spec)]

    def buffer(self, key: ShapeKey, q: Tensor, spec: AttentionSpec) -> ReplyBuffer:
        """The buffer for answers to frames of shape ``key``. q ``[rows of the micro-batch, q_heads, k_dim]``
        gives the number of rows and the dtype. Every call with the same key returns the same buffer."""
        if key not in self.buffers:
            state = State.identity(len(q), spec.q_heads, spec.v_dim, dtype=q.dtype, device=q.device)
            rows, heads = _row_index(self.rows[key[1]]), self.heads(spec)
            # Indexing by a tensor copies, indexing by a slice gives a view.
            answer = State(state.o[rows, heads], state.lse[rows, heads])
            scattered = None if isinstance(rows, slice) else (rows, heads)
            self.buffers[key] = ReplyBuffer(state, answer, scattered)
        return self.buffers[key]

    def repeat(self, plan: StepPlan) -> None:
        """Changes the request to the step ``plan``, which has the same reads as the current one."""
        positions = tuple(plan.positions[row] for row in self.step.rows)
        self.step = replace(self.step, step=plan.step, positions=positions)

    def shard_error(self, error: FarshoreError) -> FarshoreError:
        """The error to report for an error of a call on the client. A TransportError becomes a Late or Lost
        that names this shard; any other error is returned as it is."""
        if not isinstance(error, TransportError):
            return error
        if isinstance(error, Late):
            limit = f": {self.deadline_s:.3g} s" if self.announced else ""
            shard_error: Late | Lost = Late(f"{error}{limit}", shards=[self.worker])
        else:
            shard_error = Lost(str(error), shards=[self.worker])
        shard_error.__cause__ = error.__cause__ or error
        return shard_error


def combined_error(failed: Mapping[ShardRequest, FarshoreError]) -> FarshoreError:
    """The single error to raise for the errors of several requests. A shard's refusal is returned as it is;
    else, if a shard is lost, a Lost that names all lost shards; else a Late that names all late ones."""
    for error in failed.values():
        if not isinstance(error, Late | Lost):
            return error
    kind = Lost if any(isinstance(error, Lost) for error in failed.values()) else Late
    by_worker = {request.worker: error for request, error in failed.items() if isinstance(error, kind)}
    combined = kind("; ".join(dict.fromkeys(map(str, by_worker.values()))), shards=by_worker)
    combined.__cause__ = next(iter(by_worker.values()))
    return combined


def _row_index(rows: tuple[int, ...]) -> RowIndex:
    """An index that selects the ascending ``rows`` of a tensor: a slice, which needs no copy, if the rows are
    adjacent."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=HOST)
