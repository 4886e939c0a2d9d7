"""All shards of one engine behind one :class:`~farshore.attention_offload.base.Shards`.

Cuts each shard's rows and heads out of q, sends to all at once, and hands back the states in span order:
the order in which they are merged, so that the same plan always gives the same bits.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Peer
from farshore.attention_offload.plan import ShardStep, StepPlan
from farshore.errors import TransportError
from farshore.ids import WorkerId
from farshore.kernels.base import State


class Pending(NamedTuple):
    """A layer frame under way to every shard of the step."""

    layer: int
    rows: int
    dtype: torch.dtype
    sent: tuple[Any, ...]


class _Part(NamedTuple):
    """Where one shard's state belongs in the whole step's."""

    peer: Peer
    step: ShardStep
    rows: Tensor


class Fanout:
    """Not thread-safe: one engine loop calls it."""

    def __init__(self, peers: Mapping[WorkerId, Peer], model: AttentionModel) -> None:
        self._peers = peers
        self._model = model
        self._parts: list[_Part] = []

    def begin(self, plan: StepPlan) -> None:
        """Announce the step to every shard it reads from. Raises TransportError for one that is gone."""
        self._parts = []
        parts = []
        for worker, step in plan.shard_steps().items():
            if worker not in self._peers:
                raise TransportError(f"no connection to attention worker {worker}")
            peer = self._peers[worker]
            peer.begin(step)
            parts.append(_Part(peer, step, torch.tensor(step.rows)))
        self._parts = parts

    def send(self, layer: int, micro_batch: int, q: Tensor) -> Pending:
        """q ``[R, q_heads, k_dim]``."""
        sent = []
        for part in self._parts:
            heads = self._heads(part.step, layer)
            sent.append(part.peer.send(layer, micro_batch, q[part.rows, heads].contiguous()))
        return Pending(layer, q.shape[0], q.dtype, tuple(sent))

    def wait(self, pending: Pending) -> list[State]:
        """One state per shard over all R rows and heads, in span order; the identity where a shard had
        nothing to read."""
        spec = self._model.specs[self._model.layer_class[pending.layer]]
        states = []
        for part, sent in zip(self._parts, pending.sent, strict=True):
            answer = part.peer.wait(sent)
            state = State.identity(pending.rows, spec.q_heads, spec.v_dim, dtype=pending.dtype)
            heads = self._heads(part.step, pending.layer)
            state.o[part.rows, heads] = answer.o
            state.lse[part.rows, heads] = answer.lse
            states.append(state)
        return states

    def _heads(self, step: ShardStep, layer: int) -> slice:
        per_group = self._model.specs[self._model.layer_class[layer]].q_heads_per_group
        return slice(step.group0 * per_group, step.group1 * per_group)
