"""Implements :class:`~farshore.attention_offload.base.Shards`: fans a step out to all shards of one engine.

Called by the engine's loop and its decode step. It must not know how a lost span is recovered.

The fan-out announces each shard's share of a step, sends each layer's queries to all shards over their
channels, and returns the states in span order. States are merged in that order, so the same plan always gives
the same bits.

A shard that fails is given up for the rest of the step. If all its reads have replicas, the fan-out sends its
outstanding frames, and those of the following layers, to the replicas over new channels. Otherwise the step
fails, with one error for all failed shards without replicas, and the engine decides what to run next. The
fan-out never connects: a shard without a connection is late.
"""

import logging
from collections.abc import Mapping, Sequence
from time import perf_counter

from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.fanout.channel import ShardChannel, channels_to
from farshore.attention_offload.fanout.latency import Link, LinkRecord, SlowShards, links
from farshore.attention_offload.fanout.shard_request import ShardRequest, combined_error
from farshore.attention_offload.plan.step_plan import ShardStep, StepPlan
from farshore.attention_offload.transport.frames import Transport
from farshore.errors import FarshoreError, Lost, NotFound, TransportError
from farshore.ids import WorkerId
from farshore.kernels.base import State

AVOID_S = 30.0
"""For how long replicas are read instead of a shard that was given up. A frozen shard that is asked again
costs the step a deadline."""
LOOK_EVERY_STEPS = 64
"""The number of steps between two checks for slow shards."""

_REPLACEABLE = (TransportError, NotFound)
"""The errors after which replicas are read: the shard is gone or late, or was restarted and has lost its
spans."""

_LOG = logging.getLogger(__name__)

Failed = dict[ShardRequest, FarshoreError]


class Fanout:
    """All shards of one engine. Not thread-safe, except for :meth:`links`: the engine's loop calls it."""

    def __init__(self, clients: Mapping[WorkerId, ShardClient], model: AttentionModel) -> None:
        """``clients`` holds a client for each worker; a read from any other worker raises Lost. The caller
        may change the mapping between steps."""
        self._clients = clients
        self._model = model
        self._plan: StepPlan | None = None
        """The plan of the last step, if a step with the same reads may use the same requests; else None."""
        self._micro_batches: tuple[range, ...] = ()
        self._requests: list[ShardRequest] = []
        """The requests of the current step, in span order."""
        self._channels: list[ShardChannel] = []
        self._under_way: dict[tuple[int, int], Tensor] = {}
        """The q of each frame under way, by layer and micro-batch."""
        self._states: dict[tuple[int, int], list[State]] = {}
        """The states that :meth:`wait` returns, by layer class and micro-batch. Valid while the requests stay
        the same."""
        self._records = {worker: LinkRecord() for worker in clients}
        self._given_up_at_s: dict[WorkerId, float] = {}
        """When each shard was given up, for AVOID_S."""
        self._reads_replicas = False
        """Whether the step reads replicas because a shard was given up before it began."""
        self._slow = SlowShards()
        self._steps = 0
        self._waited_s = 0.0

    def links(self) -> list[Link]:
        """The latencies and transports of all shards, for status. The frames of the last step may be missing.
        Thread-safe."""
        transports = {worker: _shown_transports(client) for worker, client in list(self._clients.items())}
        records = {worker: record for worker, record in list(self._records.items()) if worker in transports}
        return links(records, transports)

    @property
    def waited_s(self) -> float:
        """The seconds that this object has waited for other processes' answers, in all."""
        self._settle()
        return self._waited_s

    def begin(self, plan: StepPlan, micro_batches: Sequence[range]) -> None:
        """Announces the step to every shard that it reads from. ``micro_batches`` are ranges of the step's
        rows, in order and without a gap.

        For shards without replicas, raises Late if they have no connection, Lost if their connection has
        ended, or the error with which one refuses the step."""
        self._steps += 1
        if self._steps % LOOK_EVERY_STEPS == 0:
            self._slow.look(self.links())
        self._settle()
        now_s = perf_counter()
        self._given_up_at_s = {
            worker: at_s for worker, at_s in self._given_up_at_s.items() if now_s - at_s < AVOID_S
        }
        if self._has_same_reads(plan, micro_batches):
            for request in self._requests:
                request.repeat(plan)
        else:
            self._make_requests(plan, micro_batches)
        self._under_way.clear()
        # Requests to replicas are not reused: each step checks whether AVOID_S is over.
        self._plan = None if self._reads_replicas else plan
        self._announce_all()

    def overlaps(self, micro_batch: int) -> bool:
        """Whether a shard can compute this micro-batch while the engine computes, so that q should be sent
        early. A shard that shares the engine's cores would only slow the engine down."""
        return any(
            request.client.transport is not Transport.IN_PROCESS
            and not (request.native_connection is not None and request.native_connection.shares_cores)
            for request in self._requests
            if request.rows[micro_batch]
        )

    def send(self, layer: int, micro_batch: int, q: Tensor) -> None:
        """Sends q ``[rows of the micro-batch, q_heads, k_dim]`` to every shard. The caller must not change q
        before :meth:`wait` returns."""
        q = q.contiguous()
        failed: Failed = {}
        for channel in self._channels:
            failed |= _send(channel, layer, micro_batch, q)
        # After the sends: _replace sends all frames under way to the replicas.
        self._under_way[layer, micro_batch] = q
        if failed:
            self._replace(failed)

    def wait(self, layer: int, micro_batch: int) -> list[State]:
        """Blocks until all shards have answered. Returns one state per shard, in span order, over all rows of
        the micro-batch and all heads; it is the identity where a shard had nothing to read. All layers of a
        class use the same memory, so a state is valid until the next wait for the class and micro-batch."""
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
                request.buffers[key].state for request in self._requests if request.rows[micro_batch]
            ]
        return self._states[key]

    def forget(self, worker: WorkerId) -> None:
        """Forgets the requests and latencies of a worker that left. Call it between steps, before its client
        is closed."""
        self._settle()
        self._plan = None
        self._requests, self._channels = [], []
        self._states.clear()
        self._records.pop(worker, None)
        self._given_up_at_s.pop(worker, None)

    def _has_same_reads(self, plan: StepPlan, micro_batches: Sequence[range]) -> bool:
        """Whether the last step has ended and had the same reads, by the same rows, as ``plan``."""
        last = self._plan
        return (
            last is not None
            and not self._under_way
            and last.reads == plan.reads
            and len(last.positions) == len(plan.positions)
            and self._micro_batches == tuple(micro_batches)
        )

    def _make_requests(self, plan: StepPlan, micro_batches: Sequence[range]) -> None:
        """Makes new requests, for a plan with other reads than the last one."""
        self._micro_batches = tuple(micro_batches)
        self._requests, self._channels = [], []
        self._states.clear()
        self._reads_replicas = False
        for worker, step in plan.shard_steps(micro_batches).items():
            on_replicas = step.on_replicas(self._usable()) if worker in self._given_up_at_s else None
            self._reads_replicas |= on_replicas is not None
            for reader, reader_step in (on_replicas or {worker: step}).items():
                self._requests.append(self._request(reader, reader_step, plan.groups))

    def _request(self, worker: WorkerId, step: ShardStep, groups: int) -> ShardRequest:
        if worker not in self._clients:
            raise Lost(f"attention worker {worker} is unknown here", shards=[worker])
        client = self._clients[worker]
        used = {request.client for request in self._requests}
        while client in used:  # a shard that also reads a replica needs a connection for each request
            client = client.second_connection()
        rows = [
            tuple(step.rows[row] - batch.start for row in seen)
            for seen, batch in zip(step.micro_batches, self._micro_batches, strict=True)
        ]
        record = self._records.setdefault(worker, LinkRecord())
        return ShardRequest(worker, client, record, step, groups, rows, step.work / sum(map(bool, rows)))

    def _announce_all(self) -> None:
        """Announces the step for all requests, and makes new channels if a connection has changed."""
        before = [request.native_connection for request in self._requests]
        failed = self._announce(self._requests)
        if not self._channels or before != [request.native_connection for request in self._requests]:
            self._settle()
            self._channels = channels_to(
                [request for request in self._requests if request not in failed], self._model
            )
        if failed:
            self._replace(failed)

    def _announce(self, requests: Sequence[ShardRequest]) -> Failed:
        """Announces the step for ``requests``. Returns the errors of those that failed. The time spent on
        reading the outstanding answers of a dropped step is bounded by one deadline for all shards together.
        """
        failed: Failed = {}
        start_s = perf_counter()
        for request in requests:
            request.record.expect(request.work)
            request.deadline_s = request.record.deadline_s
            try:
                left_s = max(0.0, request.deadline_s - (perf_counter() - start_s))
                request.client.begin(request.step, deadline_s=request.deadline_s, drain_s=left_s)
            except FarshoreError as error:
                failed[request] = request.shard_error(error)
            else:
                request.announced = True
            request.native_connection = request.client.native_connection
        return failed

    def _replace(self, failed: Failed) -> list[ShardChannel]:
        """Replaces failed requests by requests to replicas. Returns the channels to the replicas; all frames
        under way have been sent on them. Raises the combined error of the requests without replicas."""
        self._settle()
        self._states.clear()
        self._plan = None
        tried: set[WorkerId] = set()
        replacements: list[ShardRequest] = []
        while failed:
            tried |= {request.worker for request in failed}
            steps = self._on_replicas(failed, tried)
            kept = (_without(failed, channel) for channel in self._channels)
            self._channels = [channel for channel in kept if channel is not None]
            requests = self._replace_requests(steps)
            replacements += requests
            failed = self._announce(requests)
            announced = [request for request in requests if request not in failed]
            for channel in channels_to(announced, self._model):
                self._channels.append(channel)
                for (layer, micro_batch), q in self._under_way.items():
                    failed |= _send(channel, layer, micro_batch, q)
        return [channel for channel in self._channels if channel.requests[0] in replacements]

    def _on_replicas(
        self, failed: Failed, tried: set[WorkerId]
    ) -> dict[ShardRequest, dict[WorkerId, ShardStep]]:
        """For each failed request, the steps that read its replicas at workers other than ``tried``. Raises
        the combined error of the requests without replicas."""
        now_s = perf_counter()
        for request in failed:
            request.record.failures += 1
            # A missing second connection does not mean that the shard has failed.
            if request.announced or request.client is self._clients[request.worker]:
                self._given_up_at_s[request.worker] = now_s
        usable = self._usable() - tried
        steps = {
            request: replica_steps
            for request, error in failed.items()
            if isinstance(error, _REPLACEABLE) and (replica_steps := request.step.on_replicas(usable))
        }
        unreplicated = {request: error for request, error in failed.items() if request not in steps}
        if unreplicated:
            self._requests, self._channels = [], []
            raise combined_error(unreplicated)
        for request, error in failed.items():
            _LOG.warning(
                "attention worker %s is given up for %g s: replicas at %s are read instead: %s",
                request.worker,
                AVOID_S,
                ", ".join(steps[request]),
                error,
            )
        return steps

    def _replace_requests(
        self, steps: Mapping[ShardRequest, Mapping[WorkerId, ShardStep]]
    ) -> list[ShardRequest]:
        """Replaces each request by requests for its ``steps``, at the same place in span order. Returns the
        new requests."""
        new = []
        for request, replica_steps in steps.items():
            index = self._requests.index(request)
            del self._requests[index]
            for worker, step in replica_steps.items():
                new.append(self._request(worker, step, request.groups))
                self._requests.insert(index, new[-1])
                index += 1
        return new

    def _usable(self) -> set[WorkerId]:
        return self._clients.keys() - self._given_up_at_s.keys()

    def _settle(self) -> None:
        """Adds what the channels have measured to the records and to the waited time."""
        for channel in self._channels:
            self._waited_s += channel.settle()


def _without(failed: Failed, channel: ShardChannel) -> ShardChannel | None:
    """The channel without the failed requests; None if none remain."""
    return channel if failed.keys().isdisjoint(channel.requests) else channel.without(failed)


def _shown_transports(client: ShardClient) -> str:
    """The client's transports as status shows them. Empty while there is no connection for hot frames."""
    hot, bulk = client.transport, client.bulk_transport
    if hot is None or bulk is None or bulk is hot:
        return hot or ""
    return f"{hot}, KV over {bulk}"


def _send(channel: ShardChannel, layer: int, micro_batch: int, q: Tensor) -> Failed:
    """Sends to all shards of a channel. Returns the requests that failed; raises an error of another kind."""
    try:
        channel.send(layer, micro_batch, q)
    except FarshoreError:
        if not channel.failed:
            raise
        return channel.failed
    return {}
