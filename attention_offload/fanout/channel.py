"""Defines channels, which carry a step's frames to a group of shards. All kinds send, wait, fail and measure
times in the same way:

- :class:`NativeChannel`: the shards reached over shared memory or TCP, with one native call to send and one
  to wait for all of them;
- :class:`ClientChannel`: the shards reached over gRPC, or those in this process.

Made by ``fanout`` for one set of shard requests. A channel does not change: when it loses a shard,
``without`` returns the channel that replaces it. It must not know replicas, or when a step is dropped.
"""

from collections.abc import Collection, Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.fanout.native_fanout import Failures, NativeFanout, NativeRequest
from farshore.attention_offload.fanout.shard_request import ShapeKey, ShardRequest, combined_error
from farshore.attention_offload.transport.frames import Transport
from farshore.errors import FarshoreError

BLOCKED_S = 20e-6
"""A longer wait means that the reply arrived during it, so its latency is exact. After a shorter wait the
reply may have been there for a while."""


class ShardChannel(Protocol):
    """Carries the frames of one step to a group of shards. Not thread-safe: the engine's loop calls it."""

    requests: tuple[ShardRequest, ...]
    """The shards' requests."""
    failed: Mapping[ShardRequest, FarshoreError]
    """The errors of the requests that failed in the last call. After a call that raised, all other requests
    were sent the frame, or have answered it."""

    def send(self, layer: int, micro_batch: int, q: Tensor) -> None:
        """Sends a frame to every shard that sees rows of the micro-batch. q ``[rows of the micro-batch,
        q_heads, k_dim]`` must be contiguous; the caller must not change it before :meth:`wait` returns.
        Raises Late or Lost, which name the shards, or the error with which a shard refused the frame."""

    def wait(self, layer: int, micro_batch: int, *, since_s: float) -> None:
        """Blocks until the answers are in the requests' buffers. Each shard's deadline counts from
        ``since_s``, by ``perf_counter``. Raises as :meth:`send`."""

    def without(self, lost: Collection[ShardRequest]) -> "ShardChannel | None":
        """The channel that replaces this one after it has lost requests. It serves the other requests and
        waits for their outstanding answers. Returns None if no request remains."""

    def settle(self) -> float:
        """Adds the frames and latencies that this channel has measured to its requests' records. Returns the
        seconds that it has waited for other processes since the last call."""


def channels_to(requests: Sequence[ShardRequest], model: AttentionModel) -> list[ShardChannel]:
    """The channels for ``requests``, in the order in which to wait for them. In-process shards come first:
    they compute in ``wait``, while the other shards compute too."""
    in_process = [request for request in requests if request.client.transport is Transport.IN_PROCESS]
    native = [request for request in requests if request.native_connection is not None]
    grpc = [request for request in requests if request not in in_process and request not in native]
    channels: list[ShardChannel] = []
    if in_process:
        channels.append(ClientChannel(in_process, model))
    if native:
        channels.append(NativeChannel(native, model))
    if grpc:
        channels.append(ClientChannel(grpc, model))
    return channels


class _Channel:
    def __init__(self, requests: Sequence[ShardRequest], model: AttentionModel) -> None:
        self.requests = tuple(requests)
        self.failed: Mapping[ShardRequest, FarshoreError] = {}
        self._model = model

    def _key(self, layer: int, micro_batch: int) -> ShapeKey:
        return self._model.layer_class[layer], micro_batch

    def _raise(self, failed: Mapping[ShardRequest, FarshoreError]) -> None:
        """Records the errors in ``failed``, and raises their combination if there are any."""
        self.failed = failed
        if failed:
            raise combined_error(failed)


class NativeChannel(_Channel):
    """Serves all shards that are reached over shared memory or TCP together."""

    def __init__(self, requests: Sequence[ShardRequest], model: AttentionModel) -> None:
        super().__init__(requests, model)
        self._native_fanouts: dict[ShapeKey, tuple[list[ShardRequest], NativeFanout] | None] = {}
        """For each shape, the requests that see rows of the micro-batch, and their fan-out; None if no
        request does."""

    def send(self, layer: int, micro_batch: int, q: Tensor) -> None:
        key = self._key(layer, micro_batch)
        if key not in self._native_fanouts:
            spec = self._model.specs[key[0]]
            seeing = [request for request in self.requests if request.rows[micro_batch]]
            for request in seeing:
                request.buffer(key, q, spec)
            self._native_fanouts[key] = self._native_fanout(key, seeing)
        if (entry := self._native_fanouts[key]) is not None:
            requests, native_fanout = entry
            self._raise_failures(requests, native_fanout.send(self._step, layer, micro_batch, q))

    def wait(self, layer: int, micro_batch: int, *, since_s: float) -> None:
        if (entry := self._native_fanouts[self._key(layer, micro_batch)]) is not None:
            requests, native_fanout = entry
            deadlines_s = tuple([request.deadline_s for request in requests])
            passed_s = perf_counter() - since_s
            failed = native_fanout.wait(self._step, layer, micro_batch, deadlines_s, passed_s)
            self._raise_failures(requests, failed)

    def without(self, lost: Collection[ShardRequest]) -> "NativeChannel | None":
        others = [request for request in self.requests if request not in lost]
        if not others:
            return None
        channel = NativeChannel(others, self._model)
        for key, entry in self._native_fanouts.items():
            requests = [request for request in entry[0] if request not in lost] if entry is not None else []
            channel._native_fanouts[key] = self._native_fanout(key, requests)
        return channel

    def settle(self) -> float:
        waited_s = 0.0
        for requests, native_fanout in filter(None, self._native_fanouts.values()):
            fanout_waited_s, measured = native_fanout.times()
            waited_s += fanout_waited_s
            for request, (frames, times_s) in zip(requests, measured, strict=True):
                request.record.frames += frames
                request.record.answered(*times_s)
        return waited_s

    @property
    def _step(self) -> int:
        return self.requests[0].step.step

    def _native_fanout(
        self, key: ShapeKey, requests: list[ShardRequest]
    ) -> tuple[list[ShardRequest], NativeFanout] | None:
        """The fan-out to ``requests``, which have buffers of shape ``key``; None if there are no requests."""
        if not requests:
            return None
        spec = self._model.specs[key[0]]
        native_requests = []
        for request in requests:
            assert request.native_connection is not None, "the request has no native connection"
            native_requests.append(
                NativeRequest(
                    request.native_connection,
                    request.rows[key[1]],
                    request.heads(spec),
                    request.buffers[key].state,
                )
            )
        return requests, NativeFanout(native_requests, spec, native_requests[0].state.o.dtype)

    def _raise_failures(self, requests: Sequence[ShardRequest], failed: Failures) -> None:
        """Closes the connections of the failed requests and raises their combined error, if there is any."""
        for index in failed:
            requests[index].client.break_off()
        if failed:
            self._raise(
                {requests[index]: requests[index].shard_error(error) for index, error in failed.items()}
            )


class ClientChannel(_Channel):
    """Serves shards that are reached over gRPC, or shards in this process, one after the other."""

    def __init__(self, requests: Sequence[ShardRequest], model: AttentionModel) -> None:
        super().__init__(requests, model)
        self._sent: dict[tuple[int, int], tuple[float, dict[ShardRequest, Any]]] = {}
        """For each frame under way, by layer and micro-batch: the time of the send, and each request's token
        for ``ShardClient.wait``."""
        self._waited_s = 0.0
        self._waits = 0

    def send(self, layer: int, micro_batch: int, q: Tensor) -> None:
        key = self._key(layer, micro_batch)
        spec = self._model.specs[key[0]]
        sent: dict[ShardRequest, Any] = {}
        failed = {}
        self._sent[layer, micro_batch] = perf_counter(), sent
        for request in self.requests:
            if request.rows[micro_batch]:
                request.buffer(key, q, spec)
                try:
                    sent[request] = request.client.send(
                        layer, micro_batch, request.query(micro_batch, q, spec)
                    )
                except FarshoreError as error:
                    failed[request] = request.shard_error(error)
        self._raise(failed)

    def wait(self, layer: int, micro_batch: int, *, since_s: float) -> None:
        key = self._key(layer, micro_batch)
        sent_s, sent = self._sent.pop((layer, micro_batch))
        # Only the answer that is waited for first is always observed when it arrives. The order rotates, so
        # that each shard is often the first.
        self._waits += 1
        due = list(sent)
        offset = self._waits % len(due) if due else 0
        failed = {}
        start_s, first = perf_counter(), True
        for request in due[offset:] + due[:offset]:
            buffer = request.buffers[key]
            left_s = max(0.0, request.deadline_s - (start_s - since_s))
            try:
                request.client.wait(sent[request], out=buffer.answer, deadline_s=left_s)
            except FarshoreError as error:
                failed[request] = request.shard_error(error)
            else:
                buffer.store_answer()
            end_s = perf_counter()
            if request not in failed:
                request.record.frames += 1
                if first or end_s - start_s > BLOCKED_S:
                    request.record.answered(end_s - sent_s)
            if request.client.transport is not Transport.IN_PROCESS:
                self._waited_s += end_s - start_s
            start_s, first = end_s, False
        self._raise(failed)

    def without(self, lost: Collection[ShardRequest]) -> "ClientChannel | None":
        others = [request for request in self.requests if request not in lost]
        if not others:
            return None
        channel = ClientChannel(others, self._model)
        for frame, (sent_s, sent) in self._sent.items():
            kept = {request: token for request, token in sent.items() if request not in lost}
            channel._sent[frame] = sent_s, kept
        return channel

    def settle(self) -> float:
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s
