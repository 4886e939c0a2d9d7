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

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.fanout.channel import ShardChannel, channels_to
from farshore.attention_offload.fanout.latency import Link, LinkRecord, SlowShards, links
from farshore.attention_offload.fanout.shard_request import ShardRequest, as_one
from farshore.attention_offload.plan.step_plan import ShardStep, StepPlan
from farshore.attention_offload.transport.frames import Transport
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

Failed = dict[ShardRequest, FarshoreError]


class Fanout:
    """Not thread-safe: one engine loop calls it."""

    def __init__(self, clients: Mapping[WorkerId, ShardClient], model: AttentionModel) -> None:
        """``peers``: a worker that is not there is lost. It may change between steps."""
        self._clients = clients
        self._model = model
        self._plan: StepPlan | None = None
        """The last one, if another of the same reads may take the same lanes."""
        self._micro_batches: tuple[range, ...] = ()
        self._requests: list[ShardRequest] = []
        """In span order."""
        self._channels: list[ShardChannel] = []
        self._under_way: dict[tuple[int, int], Tensor] = {}
        """q by layer and micro-batch."""
        self._states: dict[tuple[int, int], list[State]] = {}
        """By layer class and micro-batch, for as long as the lanes are the same."""
        self._records = {worker: LinkRecord() for worker in clients}
        self._given_up_s: dict[WorkerId, float] = {}
        self._avoids = False
        """Some lanes are to replicas, since a shard was given up."""
        self._slow = SlowShards()
        self._steps = 0
        self._waited_s = 0.0

    def links(self) -> list[Link]:
        """What frames to each shard have taken, those of the last step perhaps not yet. May be asked from
        another thread."""
        ways = {worker: _ways(client) for worker, client in list(self._clients.items())}
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
            for request in self._requests:
                request.repeat(plan)
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
            request.client.transport is not Transport.IN_PROCESS
            and not (request.frames is not None and request.frames.shares_cores)
            for request in self._requests
            if request.rows[micro_batch]
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
            self._states[key] = [
                request.buffers[key].whole for request in self._requests if request.rows[micro_batch]
            ]
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
        self._requests, self._channels = [], []
        self._states.clear()
        self._avoids = False
        for worker, step in plan.shard_steps(micro_batches).items():
            avoided = step.on_replicas(self._usable()) if worker in self._given_up_s else None
            self._avoids |= avoided is not None
            for at, part in (avoided or {worker: step}).items():
                self._requests.append(self._request(at, part, plan.groups))

    def _request(self, worker: WorkerId, step: ShardStep, groups: int) -> ShardRequest:
        if worker not in self._clients:
            raise Lost(f"attention worker {worker} is unknown here", shards=[worker])
        client = self._clients[worker]
        used = {request.client for request in self._requests}
        while client in used:  # for its own part of the step
            client = client.second_connection()
        rows = [
            tuple(step.rows[row] - batch.start for row in mine)
            for mine, batch in zip(step.micro_batches, self._micro_batches, strict=True)
        ]
        record = self._records.setdefault(worker, LinkRecord())
        return ShardRequest(worker, client, record, step, groups, rows, step.work / sum(map(bool, rows)))

    def _announce_all(self) -> None:
        before = [request.frames for request in self._requests]
        failed = self._announce(self._requests)
        if not self._channels or before != [request.frames for request in self._requests]:
            self._settle()
            self._channels = channels_to(
                [request for request in self._requests if request not in failed], self._model
            )
        if failed:
            self._replace(failed)

    def _announce(self, requests: Sequence[ShardRequest]) -> Failed:
        """The step, to each lane's peer. One deadline is paid for all that owe answers of a dropped step."""
        failed: Failed = {}
        start_s = perf_counter()
        for request in requests:
            request.record.expect(request.work)
            request.deadline_s = request.record.deadline_s
            try:
                left_s = max(0.0, request.deadline_s - (perf_counter() - start_s))
                request.client.begin(request.step, deadline_s=request.deadline_s, drain_s=left_s)
            except FarshoreError as error:
                failed[request] = request.named(error)
            else:
                request.announced = True
            request.frames = request.client.frames
        return failed

    def _replace(self, failed: Failed) -> list[ShardChannel]:
        """Has replicas take the place of lanes that failed. Returns the channels to them, which have been
        sent all frames under way. Raises for lanes without replicas."""
        self._settle()
        self._states.clear()
        self._plan = None
        tried: set[WorkerId] = set()
        instead: list[ShardRequest] = []
        while failed:
            tried |= {request.worker for request in failed}
            steps = self._on_replicas(failed, tried)
            self._channels = [it for channel in self._channels if (it := _without(failed, channel))]
            found = self._exchanged(steps)
            instead += found
            failed = self._announce(found)
            for channel in channels_to([request for request in found if request not in failed], self._model):
                self._channels.append(channel)
                for (layer, micro_batch), q in self._under_way.items():
                    try:
                        channel.send(layer, micro_batch, q)
                    except FarshoreError:
                        if not channel.failed:
                            raise
                        failed |= channel.failed
        return [channel for channel in self._channels if channel.requests[0] in instead]

    def _on_replicas(
        self, failed: Failed, tried: set[WorkerId]
    ) -> dict[ShardRequest, dict[WorkerId, ShardStep]]:
        """The steps of lanes that failed, as replicas read them elsewhere than at workers ``tried``. Raises
        for lanes without replicas."""
        now_s = perf_counter()
        for request in failed:
            request.record.failures += 1
            # A second connection that is missing says nothing of the shard.
            if request.announced or request.client is self._clients[request.worker]:
                self._given_up_s[request.worker] = now_s
        usable = self._usable() - tried
        steps = {
            request: found
            for request, error in failed.items()
            if isinstance(error, _REPLACEABLE) and (found := request.step.on_replicas(usable))
        }
        alone = {request: error for request, error in failed.items() if request not in steps}
        if alone:
            self._requests, self._channels = [], []
            raise as_one(alone)
        for request, error in failed.items():
            _LOG.warning(
                "attention worker %s is given up for %g s: replicas at %s are read instead: %s",
                request.worker,
                AVOID_S,
                ", ".join(steps[request]),
                error,
            )
        return steps

    def _exchanged(self, steps: Mapping[ShardRequest, Mapping[WorkerId, ShardStep]]) -> list[ShardRequest]:
        """New lanes for the steps, each in the place of the one it comes from."""
        new = []
        for request, parts in steps.items():
            at = self._requests.index(request)
            del self._requests[at]
            for worker, step in parts.items():
                new.append(self._request(worker, step, request.groups))
                self._requests.insert(at, new[-1])
                at += 1
        return new

    def _usable(self) -> set[WorkerId]:
        return self._clients.keys() - self._given_up_s.keys()

    def _settle(self) -> None:
        """Books what the channels have counted."""
        for channel in self._channels:
            self._waited_s += channel.settle()


def _without(failed: Failed, channel: ShardChannel) -> ShardChannel | None:
    return channel if failed.keys().isdisjoint(channel.requests) else channel.without(failed)


def _ways(client: ShardClient) -> str:
    """How a shard is reached, for people; empty while it is not."""
    frames, kv = client.transport, client.bulk_transport
    if frames is None or kv is None or kv is frames:
        return frames or ""
    return f"{frames}, KV over {kv}"
