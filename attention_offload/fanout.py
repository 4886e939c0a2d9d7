"""All shards of one engine behind one :class:`~farshore.attention_offload.base.Shards`.

Cuts each shard's rows and heads out of q, sends to all at once, and hands back the states in span order:
the order in which they are merged, so that the same plan always gives the same bits.

A shard that breaks off or is late, in whatever layer, is given up for this step: where all it reads is
replicated, its frames under way go to the replicas again, and so do those of the layers that follow. Else the
step fails, and the engine runs it again.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Peer
from farshore.attention_offload.frames import Transport
from farshore.attention_offload.latency import Link, LinkRecord, SlowShards, links
from farshore.attention_offload.plan import ShardStep, StepPlan
from farshore.errors import FarshoreError, NotFound, TransportError
from farshore.ids import WorkerId
from farshore.kernels.base import State

Index = slice | Tensor

BLOCKED_S = 20e-6
"""An answer that was waited for so long came just now; one that was there may have come earlier."""
AVOID_S = 30.0
"""How long whoever was given up is not asked again where there are replicas: a frozen shard would cost every
step a deadline."""
LOOK_EVERY_STEPS = 64
"""For slow shards."""

_LOST = (TransportError, NotFound)
"""What a replica helps against: nobody there; or somebody new, without the spans."""

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Lane:
    """One shard's part of the step under way."""

    worker: WorkerId
    peer: Peer
    record: LinkRecord
    step: ShardStep
    rows: list[Index | None]
    """By micro-batch: which of its rows the shard sees; None: none."""
    sees_all: list[bool]
    """By micro-batch: every row and every head of it, so that nothing is cut out of q."""


@dataclass(slots=True, eq=False)
class Pending:
    """A layer frame under way to every shard that has rows of its micro-batch."""

    layer: int
    micro_batch: int
    q: Tensor
    sent_s: float
    sent: dict[_Lane, Any]


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
        self._micro_batches: Sequence[range] = ()
        self._groups = 0
        self._lanes: list[_Lane] = []
        self._used: list[Peer] = []
        self._under_way: list[Pending] = []
        self._places: dict[tuple[int, int, _Lane], _Place] = {}
        self._records = {worker: LinkRecord() for worker in peers}
        self._given_up_s: dict[WorkerId, float] = {}
        self._slow = SlowShards()
        self._turn = self._steps = 0
        self.waited_s = 0.0
        """For other processes' answers, so far."""

    def links(self) -> list[Link]:
        """What frames to each shard have taken. May be asked from another thread."""
        return links(self._records, {worker: _ways(peer) for worker, peer in self._peers.items()})

    def begin(self, plan: StepPlan, micro_batches: Sequence[range]) -> None:
        """Announce the step to every shard it reads from. Raises TransportError for one that is gone, and
        NotFound for one without the spans, if there are no replicas."""
        self._steps += 1
        if self._steps % LOOK_EVERY_STEPS == 0:
            self._slow.look(self.links())
        self._micro_batches = micro_batches
        self._groups = plan.groups
        self._under_way.clear()
        self._places.clear()
        self._lanes.clear()
        self._used.clear()
        now_s = perf_counter()
        self._given_up_s = {w: at_s for w, at_s in self._given_up_s.items() if now_s - at_s < AVOID_S}
        for worker, step in plan.shard_steps(micro_batches).items():
            avoided = step.on_replicas(self._usable()) if worker in self._given_up_s else None
            for at, part in (avoided or {worker: step}).items():
                self._lanes += self._begun(at, part)

    def travels(self, micro_batch: int) -> bool:
        """Whether a micro-batch's q goes to another process, and so should go early."""
        return any(
            lane.peer.transport is not Transport.IN_PROCESS
            for lane in self._lanes
            if lane.rows[micro_batch] is not None
        )

    def send(self, layer: int, micro_batch: int, q: Tensor) -> Pending:
        """q ``[rows of the micro-batch, q_heads, k_dim]``; it must stay as it is until :meth:`wait`."""
        pending = Pending(layer, micro_batch, q, perf_counter(), {})
        self._under_way.append(pending)
        # Whom sending takes longest comes last: a shard on this thread's own core runs as soon as it is
        # woken, and if the others wait for their frames meanwhile, a layer takes a second attention's time
        # (measured: two workers, two cores). Sorted is a copy: who takes another's place catches up itself.
        for lane in sorted(self._lanes, key=_send_s):
            if lane.rows[micro_batch] is not None:
                try:
                    self._send(pending, lane)
                except _LOST as error:
                    self._give_up(lane, error)
        return pending

    def wait(self, pending: Pending) -> list[State]:
        """One state per shard over all rows of the micro-batch and all heads, in span order; the identity
        where a shard had nothing to read. In the same memory for every layer of a class in a step."""
        self._receive(pending)
        self._under_way.remove(pending)
        states = []
        for lane in self._lanes:
            if lane in pending.sent:
                whole, answer, scattered = self._place(lane, pending)
                if scattered is not None:
                    whole.o[scattered] = answer.o
                    whole.lse[scattered] = answer.lse
                states.append(whole)
        return states

    def _send(self, pending: Pending, lane: _Lane) -> None:
        layer, micro_batch, part = pending.layer, pending.micro_batch, pending.q
        if not lane.sees_all[micro_batch]:
            part = part[lane.rows[micro_batch], self._heads(lane, layer)]
        start_s = perf_counter()
        pending.sent[lane] = lane.peer.send(layer, micro_batch, part)
        lane.record.send_s += (perf_counter() - start_s - lane.record.send_s) / 2

    def _receive(self, pending: Pending) -> None:
        remote = []
        for lane in pending.sent:
            if lane.peer.transport is Transport.IN_PROCESS:
                # Attended to now, while the others are busy.
                lane.peer.wait(pending.sent[lane], out=self._place(lane, pending).answer)
            else:
                remote.append(lane)
        if not remote:
            return
        # In turns, so that each shard's answer is often the first that is waited for: it alone is always seen
        # when it comes, whoever else is late.
        self._turn = (self._turn + 1) % len(remote)
        remote = remote[self._turn :] + remote[: self._turn]
        start_s, first = perf_counter(), True
        while remote:
            lane = remote.pop(0)
            try:
                lane.peer.wait(pending.sent[lane], out=self._place(lane, pending).answer)
            except _LOST as error:
                remote += self._give_up(lane, error)
                continue
            end_s = perf_counter()
            lane.record.frames += 1
            if first or end_s - start_s > BLOCKED_S:
                lane.record.answered(end_s - pending.sent_s)
            self.waited_s += end_s - start_s
            start_s, first = end_s, False

    def _begun(self, worker: WorkerId, step: ShardStep) -> list[_Lane]:
        """A lane to ``worker``, or to replicas of what it was to read; announced."""
        if worker not in self._peers:
            raise TransportError(f"no connection to attention worker {worker}")
        peer = self._peers[worker]
        while peer in self._used:  # for its own part of the step
            peer = peer.twin()
        self._used.append(peer)
        rows: list[Index | None] = []
        for mine, batch in zip(step.micro_batches, self._micro_batches, strict=True):
            rows.append(_index([step.rows[row] - batch.start for row in mine]) if mine else None)
        all_heads = step.group1 - step.group0 == self._groups
        sees_all = [
            all_heads and len(mine) == len(batch)
            for mine, batch in zip(step.micro_batches, self._micro_batches, strict=True)
        ]
        lane = _Lane(worker, peer, self._records[worker], step, rows, sees_all)
        try:
            peer.begin(step)
        except _LOST as error:
            return self._instead_of(lane, error)
        lane.record.expect(step.work)
        return [lane]

    def _give_up(self, lost: _Lane, error: FarshoreError) -> list[_Lane]:
        """Those that take the place of a lane that broke, with its frames under way."""
        at = self._lanes.index(lost)
        self._lanes[at : at + 1] = instead = self._instead_of(lost, error)
        for pending in self._under_way:
            pending.sent.pop(lost, None)
        return [it for lane in instead for it in self._caught_up(lane)]

    def _caught_up(self, lane: _Lane) -> list[_Lane]:
        try:
            for pending in self._under_way:
                if lane.rows[pending.micro_batch] is not None:
                    self._send(pending, lane)
        except _LOST as error:
            return self._give_up(lane, error)
        return [lane]

    def _instead_of(self, lost: _Lane, error: FarshoreError) -> list[_Lane]:
        """Lanes to replicas of all that a lane reads; raises ``error`` where there are none."""
        lost.record.failures += 1
        self._given_up_s[lost.worker] = perf_counter()
        steps = lost.step.on_replicas(self._usable())
        if steps is None:
            raise error
        _LOG.warning(
            "attention worker %s is given up for %g s: replicas at %s are read instead: %s",
            lost.worker,
            AVOID_S,
            ", ".join(steps),
            error,
        )
        return [lane for worker, step in steps.items() for lane in self._begun(worker, step)]

    def _usable(self) -> set[WorkerId]:
        return self._peers.keys() - self._given_up_s.keys()

    def _place(self, lane: _Lane, pending: Pending) -> _Place:
        layer_class = self._model.layer_class[pending.layer]
        key = (layer_class, pending.micro_batch, lane)
        if key not in self._places:
            spec = self._model.specs[layer_class]
            rows = lane.rows[pending.micro_batch]
            assert rows is not None, "a frame without rows was sent"
            whole = State.identity(len(pending.q), spec.q_heads, spec.v_dim, dtype=pending.q.dtype)
            heads = self._heads(lane, pending.layer)
            # A copy where the rows are scattered, a view where they are a slice.
            answer = State(whole.o[rows, heads], whole.lse[rows, heads])
            self._places[key] = _Place(whole, answer, None if isinstance(rows, slice) else (rows, heads))
        return self._places[key]

    def _heads(self, lane: _Lane, layer: int) -> slice:
        per_group = self._model.specs[self._model.layer_class[layer]].q_heads_per_group
        return slice(lane.step.group0 * per_group, lane.step.group1 * per_group)


def _ways(peer: Peer) -> str:
    """How a shard is reached, for people; empty while it is not."""
    frames, kv = peer.transport, peer.bulk_transport
    if frames is None or kv is None or kv is frames:
        return frames or ""
    return f"{frames}, KV over {kv}"


def _send_s(lane: _Lane) -> float:
    return lane.record.send_s


def _index(rows: list[int]) -> Index:
    """How to take ``rows``, ascending, out of others: without a copy where they follow each other."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)
