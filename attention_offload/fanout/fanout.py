"""All shards of one engine behind one :class:`~farshore.attention_offload.base.Shards`.

Announces each shard's part of a step, sends each layer to all at once over their channels, and hands back the
states in span order: the order in which they are merged, so that the same plan always gives the same bits.

A shard that fails, in whatever layer, is given up for this step. Where all it reads is replicated, its frames
under way go to the replicas again, over channels of their own, and so do those of the layers that follow.
Else the step fails, with one error for all such shards, and the engine decides what to run next. Nothing here
connects: a shard without a connection is late.
"""

import logging
from collections.abc import Mapping, Sequence
from time import perf_counter

from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Peer
from farshore.attention_offload.channel import ShardChannel, channels_to
from farshore.attention_offload.frames import Transport
from farshore.attention_offload.lane import Lane, as_one
from farshore.attention_offload.latency import Link, LinkRecord, SlowShards, links
from farshore.attention_offload.plan import ShardStep, StepPlan
from farshore.errors import FarshoreError, Lost, NotFound, TransportError
from farshore.ids import WorkerId
from farshore.kernels.base import State

AVOID_S = 30.0
"""How long a shard that was given up is not asked again where there are replicas: a frozen shard would cost
every step a deadline."""
LOOK_EVERY_STEPS = 64
"""For slow shards."""

_REPLACEABLE = (TransportError, NotFound)
"""What a replica helps against: a shard that is gone or late, or a new one in its place, without the
spans."""

_LOG = logging.getLogger(__name__)

Failed = dict[Lane, FarshoreError]


class Fanout:
    """Not thread-safe: one engine loop calls it."""

    def __init__(self, peers: Mapping[WorkerId, Peer], model: AttentionModel) -> None:
        """``peers``: a worker that is not there is lost. It may change between steps."""
        self._peers = peers
        self._model = model
        self._plan: StepPlan | None = None
        """The last one, if another of the same reads may take the same lanes."""
        self._micro_batches: tuple[range, ...] = ()
        self._lanes: list[Lane] = []
        """In span order."""
        self._channels: list[ShardChannel] = []
        self._under_way: dict[tuple[int, int], Tensor] = {}
        """q by layer and micro-batch."""
        self._states: dict[tuple[int, int], list[State]] = {}
        """By layer class and micro-batch, for as long as the lanes are the same."""
        self._records = {worker: LinkRecord() for worker in peers}
        self._given_up_s: dict[WorkerId, float] = {}
        self._avoids = False
        """Some lanes are to replicas, since a shard was given up."""
        self._slow = SlowShards()
        self._steps = 0
        self._waited_s = 0.0

    def links(self) -> list[Link]:
        """What frames to each shard have taken, those of the last step perhaps not yet. May be asked from
        another thread."""
        ways = {worker: _ways(peer) for worker, peer in list(self._peers.items())}
        return links({w: it for w, it in list(self._records.items()) if w in ways}, ways)

    @property
    def waited_s(self) -> float:
        """For other processes' answers, so far."""
        self._settle()
        return self._waited_s

    def begin(self, plan: StepPlan, micro_batches: Sequence[range]) -> None:
        """Announce the step to every shard it reads from, where they have no replicas: raises Late for those
        that have no connection, Lost for those whose connection has ended, or what one refused."""
        self._steps += 1
        if self._steps % LOOK_EVERY_STEPS == 0:
            self._slow.look(self.links())
        self._settle()
        now_s = perf_counter()
        self._given_up_s = {w: at_s for w, at_s in self._given_up_s.items() if now_s - at_s < AVOID_S}
        if self._is_alike(plan, micro_batches):
            for lane in self._lanes:
                lane.repeat(plan)
        else:
            self._take(plan, micro_batches)
        self._under_way.clear()
        # Not while a shard is avoided, so that this ends when the time is over.
        self._plan = None if self._avoids else plan
        self._announce_all()

    def overlaps(self, micro_batch: int) -> bool:
        """Whether a shard works on the micro-batch beside the engine, so that q should go early. One that
        needs the engine's own cores would only be in its way."""
        return any(
            lane.peer.transport is not Transport.IN_PROCESS
            and not (lane.frames is not None and lane.frames.shares_cores)
            for lane in self._lanes
            if lane.rows[micro_batch]
        )

    def send(self, layer: int, micro_batch: int, q: Tensor) -> None:
        """q ``[rows of the micro-batch, q_heads, k_dim]``; it must stay as it is until :meth:`wait`."""
        q = q.contiguous()
        failed: Failed = {}
        for channel in self._channels:
            try:
                channel.send(layer, micro_batch, q)
            except FarshoreError:
                if not channel.failed:
                    raise
                failed |= channel.failed
        # Only now: what replaces a channel is sent all frames that are under way.
        self._under_way[layer, micro_batch] = q
        if failed:
            self._replace(failed)

    def wait(self, layer: int, micro_batch: int) -> list[State]:
        """One state per shard over all rows of the micro-batch and all heads, in span order; the identity
        where a shard had nothing to read. In the same memory for every layer of a class in a step."""
        channels = self._channels
        while channels:
            since_s = perf_counter()
            failed: Failed = {}
            for channel in channels:
                try:
                    channel.wait(layer, micro_batch, since_s=since_s)
                except FarshoreError:
                    if not channel.failed:
                        raise
                    failed |= channel.failed
            channels = self._replace(failed) if failed else []
        del self._under_way[layer, micro_batch]
        key = self._model.layer_class[layer], micro_batch
        if key not in self._states:
            self._states[key] = [lane.places[key].whole for lane in self._lanes if lane.rows[micro_batch]]
        return self._states[key]

    def _is_alike(self, plan: StepPlan, micro_batches: Sequence[range]) -> bool:
        """Whether all reads of a step, and who reads them, are those of the last one, which has ended."""
        last = self._plan
        return (
            last is not None
            and not self._under_way
            and last.reads == plan.reads
            and len(last.positions) == len(plan.positions)
            and self._micro_batches == tuple(micro_batches)
        )

    def _take(self, plan: StepPlan, micro_batches: Sequence[range]) -> None:
        """New lanes, for a plan unlike the last one."""
        self._micro_batches = tuple(micro_batches)
        self._lanes, self._channels = [], []
        self._states.clear()
        self._avoids = False
        for worker, step in plan.shard_steps(micro_batches).items():
            avoided = step.on_replicas(self._usable()) if worker in self._given_up_s else None
            self._avoids |= avoided is not None
            for at, part in (avoided or {worker: step}).items():
                self._lanes.append(self._lane(at, part, plan.groups))

    def _lane(self, worker: WorkerId, step: ShardStep, groups: int) -> Lane:
        if worker not in self._peers:
            raise Lost(f"attention worker {worker} is unknown here", shards=[worker])
        peer = self._peers[worker]
        used = {lane.peer for lane in self._lanes}
        while peer in used:  # for its own part of the step
            peer = peer.twin()
        rows = [
            tuple(step.rows[row] - batch.start for row in mine)
            for mine, batch in zip(step.micro_batches, self._micro_batches, strict=True)
        ]
        record = self._records.setdefault(worker, LinkRecord())
        return Lane(worker, peer, record, step, groups, rows, step.work / sum(map(bool, rows)))

    def _announce_all(self) -> None:
        before = [lane.frames for lane in self._lanes]
        failed = self._announce(self._lanes)
        if not self._channels or before != [lane.frames for lane in self._lanes]:
            self._settle()
            self._channels = channels_to([lane for lane in self._lanes if lane not in failed], self._model)
        if failed:
            self._replace(failed)

    def _announce(self, lanes: Sequence[Lane]) -> Failed:
        """The step, to each lane's peer. One deadline is paid for all that owe answers of a dropped step."""
        failed: Failed = {}
        start_s = perf_counter()
        for lane in lanes:
            lane.record.expect(lane.work)
            lane.deadline_s = lane.record.deadline_s
            try:
                left_s = max(0.0, lane.deadline_s - (perf_counter() - start_s))
                lane.peer.begin(lane.step, deadline_s=lane.deadline_s, drain_s=left_s)
            except FarshoreError as error:
                failed[lane] = lane.named(error)
            else:
                lane.announced = True
            lane.frames = lane.peer.frames
        return failed

    def _replace(self, failed: Failed) -> list[ShardChannel]:
        """Has replicas take the place of lanes that failed. Returns the channels to them, which have been
        sent all frames under way. Raises for lanes without replicas."""
        self._settle()
        self._states.clear()
        self._plan = None
        tried: set[WorkerId] = set()
        instead: list[Lane] = []
        while failed:
            tried |= {lane.worker for lane in failed}
            steps = self._on_replicas(failed, tried)
            self._channels = [it for channel in self._channels if (it := _without(failed, channel))]
            found = self._exchanged(steps)
            instead += found
            failed = self._announce(found)
            for channel in channels_to([lane for lane in found if lane not in failed], self._model):
                self._channels.append(channel)
                for (layer, micro_batch), q in self._under_way.items():
                    try:
                        channel.send(layer, micro_batch, q)
                    except FarshoreError:
                        if not channel.failed:
                            raise
                        failed |= channel.failed
        return [channel for channel in self._channels if channel.lanes[0] in instead]

    def _on_replicas(self, failed: Failed, tried: set[WorkerId]) -> dict[Lane, dict[WorkerId, ShardStep]]:
        """The steps of lanes that failed, as replicas read them elsewhere than at workers ``tried``. Raises
        for lanes without replicas."""
        now_s = perf_counter()
        for lane in failed:
            lane.record.failures += 1
            # A second connection that is missing says nothing of the shard.
            if lane.announced or lane.peer is self._peers[lane.worker]:
                self._given_up_s[lane.worker] = now_s
        usable = self._usable() - tried
        steps = {
            lane: found
            for lane, error in failed.items()
            if isinstance(error, _REPLACEABLE) and (found := lane.step.on_replicas(usable))
        }
        alone = {lane: error for lane, error in failed.items() if lane not in steps}
        if alone:
            self._lanes, self._channels = [], []
            raise as_one(alone)
        for lane, error in failed.items():
            _LOG.warning(
                "attention worker %s is given up for %g s: replicas at %s are read instead: %s",
                lane.worker,
                AVOID_S,
                ", ".join(steps[lane]),
                error,
            )
        return steps

    def _exchanged(self, steps: Mapping[Lane, Mapping[WorkerId, ShardStep]]) -> list[Lane]:
        """New lanes for the steps, each in the place of the one it comes from."""
        new = []
        for lane, parts in steps.items():
            at = self._lanes.index(lane)
            del self._lanes[at]
            for worker, step in parts.items():
                new.append(self._lane(worker, step, lane.groups))
                self._lanes.insert(at, new[-1])
                at += 1
        return new

    def _usable(self) -> set[WorkerId]:
        return self._peers.keys() - self._given_up_s.keys()

    def _settle(self) -> None:
        """Books what the channels have counted."""
        for channel in self._channels:
            self._waited_s += channel.settle()


def _without(failed: Failed, channel: ShardChannel) -> ShardChannel | None:
    return channel if failed.keys().isdisjoint(channel.lanes) else channel.without(failed)


def _ways(peer: Peer) -> str:
    """How a shard is reached, for people; empty while it is not."""
    frames, kv = peer.transport, peer.bulk_transport
    if frames is None or kv is None or kv is frames:
        return frames or ""
    return f"{frames}, KV over {kv}"
