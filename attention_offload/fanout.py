"""All shards of one engine behind one :class:`~farshore.attention_offload.base.Shards`.

Cuts each shard's rows and heads out of q, sends to all at once, and hands back the states in span order:
the order in which they are merged, so that the same plan always gives the same bits.

A shard that breaks off or is late, in whatever layer, is given up for this step: where all it reads is
replicated, its frames under way go to the replicas again, and so do those of the layers that follow. Else the
step fails, and the engine runs it again.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter

from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Peer
from farshore.attention_offload.exchange import Lost
from farshore.attention_offload.frames import Transport
from farshore.attention_offload.lane import Group, Lane, Pending, Place
from farshore.attention_offload.latency import Link, LinkRecord, SlowShards, links
from farshore.attention_offload.plan import ShardStep, StepPlan
from farshore.errors import FarshoreError, NotFound, TransportError
from farshore.ids import WorkerId
from farshore.kernels.base import AttentionSpec, State

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


class Fanout:
    """Not thread-safe: one engine loop calls it."""

    def __init__(self, peers: Mapping[WorkerId, Peer], model: AttentionModel) -> None:
        self._peers = peers
        self._model = model
        self._plan: StepPlan | None = None
        """The last one, if another of the same reads may take the same lanes."""
        self._micro_batches: tuple[range, ...] = ()
        self._step = 0
        self._lanes: list[Lane] = []
        self._used: list[Peer] = []
        self._under_way: list[Pending] = []
        # By layer class and micro-batch, for as long as the lanes are the same:
        self._places: dict[tuple[int, int, Lane], Place] = {}
        self._groups: dict[tuple[int, int], Group | None] = {}
        self._states: dict[tuple[int, int], list[State]] = {}
        self._records = {worker: LinkRecord() for worker in peers}
        self._given_up_s: dict[WorkerId, float] = {}
        self._slow = SlowShards()
        self._turn = self._steps = 0
        self._waited_s = 0.0

    def links(self) -> list[Link]:
        """What frames to each shard have taken, those of the last step perhaps not yet. May be asked from
        another thread."""
        return links(self._records, {worker: _ways(peer) for worker, peer in self._peers.items()})

    @property
    def waited_s(self) -> float:
        """For other processes' answers, so far."""
        self._settle()
        return self._waited_s

    def begin(self, plan: StepPlan, micro_batches: Sequence[range]) -> None:
        """Announce the step to every shard it reads from. Raises TransportError for one that is gone, and
        NotFound for one without the spans, if there are no replicas."""
        self._steps += 1
        if self._steps % LOOK_EVERY_STEPS == 0:
            self._slow.look(self.links())
        self._settle()
        self._step = plan.step
        self._under_way.clear()
        now_s = perf_counter()
        self._given_up_s = {w: at_s for w, at_s in self._given_up_s.items() if now_s - at_s < AVOID_S}
        if self._is_alike(plan, micro_batches) and self._begun_again(plan):
            return
        self._plan, self._micro_batches = None, tuple(micro_batches)
        for memory in (self._places, self._groups, self._states, self._lanes, self._used):
            memory.clear()
        for worker, step in plan.shard_steps(micro_batches).items():
            avoided = step.on_replicas(self._usable()) if worker in self._given_up_s else None
            for at, part in (avoided or {worker: step}).items():
                self._lanes += self._begun(at, part, plan.groups)
        if not self._given_up_s:
            self._plan = plan

    def overlaps(self, micro_batch: int) -> bool:
        """Whether a shard works on the micro-batch beside the engine, so that q should go early. One that
        needs the engine's own cores would only be in its way."""
        return any(
            lane.peer.transport is not Transport.IN_PROCESS
            and not (lane.frames is not None and lane.frames.shares_cores)
            for lane in self._lanes
            if lane.rows[micro_batch]
        )

    def send(self, layer: int, micro_batch: int, q: Tensor) -> Pending:
        """q ``[rows of the micro-batch, q_heads, k_dim]``; it must stay as it is until :meth:`wait`."""
        pending = Pending(layer, micro_batch, q.contiguous(), perf_counter())
        self._under_way.append(pending)
        pending.together = self._group(pending)
        if pending.together is not None:
            try:
                pending.together.exchange.send(self._step, layer, micro_batch, pending.q)
            except Lost as lost:
                self._lose(pending.together, lost)
            if pending.together is not None and pending.together.complete:
                return pending
        for lane in list(self._lanes):  # a copy: who takes another's place catches up itself
            if lane.rows[micro_batch] and not pending.went_to(lane):
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
        key = self._key(pending)
        if key not in self._states:
            seeing = [lane for lane in self._lanes if lane.rows[pending.micro_batch]]
            self._states[key] = [self._place(lane, pending).whole for lane in seeing]
        return self._states[key]

    def _send(self, pending: Pending, lane: Lane) -> None:
        q = lane.query(pending.micro_batch, pending.q, self._spec(pending.layer))
        pending.sent[lane] = lane.peer.send(pending.layer, pending.micro_batch, q)

    def _receive(self, pending: Pending) -> None:
        here = [lane for lane in pending.sent if lane.peer.transport is Transport.IN_PROCESS]
        for lane in here:
            # Attended to now, while the others are busy.
            self._take(pending, lane)
        if pending.together is not None:
            try:
                pending.together.exchange.wait()
            except Lost as lost:
                self._lose(pending.together, lost)
        remote = [lane for lane in pending.sent if lane not in here]
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
                self._take(pending, lane)
            except _LOST as error:
                remote += self._give_up(lane, error)
                continue
            end_s = perf_counter()
            lane.record.frames += 1
            if first or end_s - start_s > BLOCKED_S:
                lane.record.answered(end_s - pending.sent_s)
            self._waited_s += end_s - start_s
            start_s, first = end_s, False

    def _take(self, pending: Pending, lane: Lane) -> None:
        place = self._place(lane, pending)
        lane.peer.wait(pending.sent[lane], out=place.answer)
        place.put()

    def _is_alike(self, plan: StepPlan, micro_batches: Sequence[range]) -> bool:
        """Whether all reads of a step, and who reads them, are those of the last one."""
        last = self._plan
        return (
            last is not None
            and last.reads == plan.reads
            and len(last.positions) == len(plan.positions)
            and self._micro_batches == tuple(micro_batches)
        )

    def _begun_again(self, plan: StepPlan) -> bool:
        """Announces a step on the lanes of the last one; False: one of them is not what it was."""
        for lane in self._lanes:
            positions = tuple(plan.positions[row] for row in lane.step.rows)
            lane.step = replace(lane.step, step=plan.step, positions=positions)
            try:
                lane.peer.begin(lane.step)
            except _LOST:
                return False
            if lane.peer.frames is not lane.frames:
                return False
            lane.record.expect(lane.work)
        return True

    def _begun(self, worker: WorkerId, step: ShardStep, groups: int) -> list[Lane]:
        """A lane to ``worker``, or to replicas of what it was to read; announced."""
        if worker not in self._peers:
            raise TransportError(f"no connection to attention worker {worker}")
        peer = self._peers[worker]
        while peer in self._used:  # for its own part of the step
            peer = peer.twin()
        self._used.append(peer)
        rows = [
            tuple(step.rows[row] - batch.start for row in mine)
            for mine, batch in zip(step.micro_batches, self._micro_batches, strict=True)
        ]
        lane = Lane(worker, peer, self._records[worker], step, groups, rows, step.work)
        try:
            peer.begin(step)
        except _LOST as error:
            return self._instead_of(lane, error)
        lane.frames = peer.frames
        lane.record.expect(lane.work)
        return [lane]

    def _lose(self, together: Group, lost: Lost) -> None:
        """One of those that are served by one call failed."""
        lane = together.lanes[lost.index]
        lane.peer.break_off()
        if not isinstance(lost.error, _LOST):
            raise lost.error
        self._give_up(lane, lost.error)

    def _give_up(self, lost: Lane, error: FarshoreError) -> list[Lane]:
        """Those that take the place of a lane that broke, with its frames under way."""
        self._settle()
        self._groups.clear()
        self._states.clear()
        self._plan = None
        for pending in self._under_way:
            pending.part()
            pending.sent.pop(lost, None)
        at = self._lanes.index(lost)
        self._lanes[at : at + 1] = instead = self._instead_of(lost, error)
        return [it for lane in instead for it in self._caught_up(lane)]

    def _caught_up(self, lane: Lane) -> list[Lane]:
        try:
            for pending in self._under_way:
                if lane.rows[pending.micro_batch]:
                    self._send(pending, lane)
        except _LOST as error:
            return self._give_up(lane, error)
        return [lane]

    def _instead_of(self, lost: Lane, error: FarshoreError) -> list[Lane]:
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
        return [lane for worker, step in steps.items() for lane in self._begun(worker, step, lost.groups)]

    def _usable(self) -> set[WorkerId]:
        return self._peers.keys() - self._given_up_s.keys()

    def _spec(self, layer: int) -> AttentionSpec:
        return self._model.specs[self._model.layer_class[layer]]

    def _key(self, pending: Pending) -> tuple[int, int]:
        return self._model.layer_class[pending.layer], pending.micro_batch

    def _place(self, lane: Lane, pending: Pending) -> Place:
        key = (*self._key(pending), lane)
        if key not in self._places:
            self._places[key] = Place.of(lane, pending.micro_batch, pending.q, self._spec(pending.layer))
        return self._places[key]

    def _group(self, pending: Pending) -> Group | None:
        key = self._key(pending)
        if key not in self._groups:
            seeing = [lane for lane in self._lanes if lane.rows[pending.micro_batch]]
            lanes = {lane: self._place(lane, pending) for lane in seeing if lane.frames is not None}
            spec = self._spec(pending.layer)
            self._groups[key] = (
                Group.of(lanes, pending, spec, complete=len(lanes) == len(seeing)) if lanes else None
            )
        return self._groups[key]

    def _settle(self) -> None:
        """Books what native calls have counted."""
        for group in self._groups.values():
            if group is not None:
                waited_s, parts = group.exchange.times()
                self._waited_s += waited_s
                for lane, (frames, times_s) in zip(group.lanes, parts, strict=True):
                    lane.record.frames += frames
                    lane.record.answered(*times_s)


def _ways(peer: Peer) -> str:
    """How a shard is reached, for people; empty while it is not."""
    frames, kv = peer.transport, peer.bulk_transport
    if frames is None or kv is None or kv is frames:
        return frames or ""
    return f"{frames}, KV over {kv}"
