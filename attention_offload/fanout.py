"""All shards of one engine behind one :class:`~farshore.attention_offload.base.Shards`.

Cuts each shard's rows and heads out of q, sends to all at once, and hands back the states in span order:
the order in which they are merged, so that the same plan always gives the same bits.
"""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Peer
from farshore.attention_offload.frames import Transport
from farshore.attention_offload.latency import Link, LinkRecord, links
from farshore.attention_offload.plan import StepPlan
from farshore.errors import TransportError
from farshore.ids import WorkerId
from farshore.kernels.base import State

Index = slice | Tensor

BLOCKED_S = 20e-6
"""An answer that was waited for so long came just now; one that was there may have come earlier."""


class Pending(NamedTuple):
    """A layer frame under way to every shard that has rows of its micro-batch."""

    layer_class: int
    micro_batch: int
    dtype: torch.dtype
    sent_s: float
    sent: list[Any]
    """As the micro-batch's cuts."""


class _Cut(NamedTuple):
    """What one shard sees of one micro-batch: by row and by group, of the engine's."""

    peer: Peer
    record: LinkRecord
    rows: Index
    groups: range


class _Place(NamedTuple):
    """Where a shard's answers go: ``answer`` is its part of ``whole``, whose rest is the identity."""

    whole: State
    answer: State
    scattered: tuple[Tensor, slice] | None
    """Rows that do not follow each other, and heads: the answer has memory of its own, and is copied."""


class Fanout:
    """Not thread-safe: one engine loop calls it."""

    def __init__(self, peers: Mapping[WorkerId, Peer], model: AttentionModel) -> None:
        self._peers = peers
        self._model = model
        self._rows: list[int] = []
        self._cuts: list[list[_Cut]] = []
        self._places: dict[tuple[int, int], list[_Place]] = {}
        self._records = {worker: LinkRecord() for worker in peers}
        self._turn = 0
        self.waited_s = 0.0
        """For other processes' answers, so far."""

    def links(self) -> list[Link]:
        """What frames to each shard have taken. May be asked from another thread."""
        return links(self._records, {worker: peer.transport for worker, peer in self._peers.items()})

    def begin(self, plan: StepPlan, micro_batches: Sequence[range]) -> None:
        """Announce the step to every shard it reads from. Raises TransportError for one that is gone."""
        self._rows = [len(batch) for batch in micro_batches]
        self._cuts = [[] for _ in micro_batches]
        self._places = {}
        for worker, step in plan.shard_steps(micro_batches).items():
            if worker not in self._peers:
                raise TransportError(f"no connection to attention worker {worker}")
            peer, record = self._peers[worker], self._records[worker]
            try:
                peer.begin(step)
            except TransportError:
                record.failures += 1
                raise
            for index, batch in enumerate(micro_batches):
                mine = step.micro_batches[index]
                if mine:
                    rows = _index([step.rows[row] - batch.start for row in mine])
                    self._cuts[index].append(_Cut(peer, record, rows, range(step.group0, step.group1)))

    def travels(self, micro_batch: int) -> bool:
        """Whether a micro-batch's q goes to another process, and so should go early."""
        return any(cut.peer.transport is not Transport.IN_PROCESS for cut in self._cuts[micro_batch])

    def send(self, layer: int, micro_batch: int, q: Tensor) -> Pending:
        """q ``[rows of the micro-batch, q_heads, k_dim]``; it must stay as it is until :meth:`wait`."""
        layer_class = self._model.layer_class[layer]
        sent = []
        sent_s = perf_counter()
        for cut in self._cuts[micro_batch]:
            try:
                part = q[cut.rows, self._heads(cut, layer_class)]
                sent.append(cut.peer.send(layer, micro_batch, part))
            except TransportError:
                cut.record.failures += 1
                raise
        return Pending(layer_class, micro_batch, q.dtype, sent_s, sent)

    def wait(self, pending: Pending) -> list[State]:
        """One state per shard over all rows of the micro-batch and all heads, in span order; the identity
        where a shard had nothing to read. In the same memory for every layer of a class in a step."""
        key = (pending.layer_class, pending.micro_batch)
        if key not in self._places:
            self._places[key] = [self._place(cut, pending) for cut in self._cuts[pending.micro_batch]]
        places = self._places[key]
        self._receive(self._cuts[pending.micro_batch], places, pending)
        for place in places:
            if place.scattered is not None:
                place.whole.o[place.scattered] = place.answer.o
                place.whole.lse[place.scattered] = place.answer.lse
        return [place.whole for place in places]

    def _receive(self, cuts: list[_Cut], places: list[_Place], pending: Pending) -> None:
        remote = []
        for index, cut in enumerate(cuts):
            if cut.peer.transport is Transport.IN_PROCESS:
                # Attended to now, while the others are busy.
                cut.peer.wait(pending.sent[index], out=places[index].answer)
            else:
                remote.append(index)
        # In turns, so that each shard's answer is often the first that is waited for: it alone is always seen
        # when it comes, whoever else is late.
        self._turn += 1
        start_s = perf_counter()
        for place in range(len(remote)):
            index = remote[(place + self._turn) % len(remote)]
            record = cuts[index].record
            try:
                cuts[index].peer.wait(pending.sent[index], out=places[index].answer)
            except TransportError:
                record.failures += 1
                raise
            end_s = perf_counter()
            record.frames += 1
            if place == 0 or end_s - start_s > BLOCKED_S:
                record.latency.add(end_s - pending.sent_s)
            self.waited_s += end_s - start_s
            start_s = end_s

    def _place(self, cut: _Cut, pending: Pending) -> _Place:
        spec = self._model.specs[pending.layer_class]
        rows = self._rows[pending.micro_batch]
        whole = State.identity(rows, spec.q_heads, spec.v_dim, dtype=pending.dtype)
        heads = self._heads(cut, pending.layer_class)
        # A copy where the rows are scattered, a view where they are a slice.
        answer = State(whole.o[cut.rows, heads], whole.lse[cut.rows, heads])
        return _Place(whole, answer, None if isinstance(cut.rows, slice) else (cut.rows, heads))

    def _heads(self, cut: _Cut, layer_class: int) -> slice:
        per_group = self._model.specs[layer_class].q_heads_per_group
        return slice(cut.groups.start * per_group, cut.groups.stop * per_group)


def _index(rows: list[int]) -> Index:
    """How to take ``rows``, ascending, out of others: without a copy where they follow each other."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)
