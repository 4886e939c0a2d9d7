"""What carries a step's frames to its shards. All kinds send, wait, fail, and keep times alike:

- :class:`NativeChannel`: all shards that are reached over shared memory or TCP, by one native call to send
  and one to wait;
- :class:`ClientChannel`: shards that are reached over gRPC, or that live in this process.

Made by ``fanout`` for one set of lanes. A channel does not change: when it loses a shard, ``without`` gives
the one that takes its place. It must not know replicas, or when a step is dropped.
"""

from collections.abc import Collection, Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.fanout.native_fanout import Failures, NativeFanout, Part
from farshore.attention_offload.fanout.shard_request import Key, ShardRequest, as_one
from farshore.attention_offload.transport.frames import Transport
from farshore.errors import FarshoreError

BLOCKED_S = 20e-6
"""An answer that was waited for so long came just now; one that was there may have come earlier."""


class ShardChannel(Protocol):
    """Not thread-safe: the engine's loop calls it."""

    requests: tuple[ShardRequest, ...]
    """Of the shards that it serves."""
    failed: Mapping[ShardRequest, FarshoreError]
    """What lanes failed with in the last call. Where that raised, all other lanes were sent the frame, or
    have answered it."""

    def send(self, layer: int, micro_batch: int, q: Tensor) -> None:
        """To every shard that sees rows of the micro-batch. q ``[its rows, q_heads, k_dim]``, contiguous; it
        must stay as it is until :meth:`wait`. Raises Late or Lost, which name the shards, or what one
        refused."""

    def wait(self, layer: int, micro_batch: int, *, since_s: float) -> None:
        """Until the answers are in their places, for each shard up to its deadline, counted from ``since_s``
        by ``perf_counter``. Raises as :meth:`send`."""

    def without(self, lost: Collection[ShardRequest]) -> "ShardChannel | None":
        """The channel that takes this one's place when it has lost lanes: for the others, which still owe
        what they owe here; None where there are none."""

    def settle(self) -> float:
        """Books the frames and times of this channel in its lanes' records. Returns for how many seconds it
        has waited for other processes since it was asked last."""


def channels_to(requests: Sequence[ShardRequest], model: AttentionModel) -> list[ShardChannel]:
    """In the order in which they should be waited for: what lives here computes while the others do."""
    here = [request for request in requests if request.client.transport is Transport.IN_PROCESS]
    near = [request for request in requests if request.frames is not None]
    far = [request for request in requests if request not in here and request not in near]
    channels: list[ShardChannel] = []
    if here:
        channels.append(ClientChannel(here, model))
    if near:
        channels.append(NativeChannel(near, model))
    if far:
        channels.append(ClientChannel(far, model))
    return channels


class _Channel:
    def __init__(self, requests: Sequence[ShardRequest], model: AttentionModel) -> None:
        self.requests = tuple(requests)
        self.failed: Mapping[ShardRequest, FarshoreError] = {}
        self._model = model

    def _key(self, layer: int, micro_batch: int) -> Key:
        return self._model.layer_class[layer], micro_batch

    def _raise(self, failed: Mapping[ShardRequest, FarshoreError]) -> None:
        self.failed = failed
        if failed:
            raise as_one(failed)


class NativeChannel(_Channel):
    """Shared memory and TCP, together."""

    def __init__(self, requests: Sequence[ShardRequest], model: AttentionModel) -> None:
        super().__init__(requests, model)
        self._native_fanouts: dict[Key, tuple[list[ShardRequest], NativeFanout] | None] = {}
        """The lanes that see rows of the micro-batch, where there are any."""

    def send(self, layer: int, micro_batch: int, q: Tensor) -> None:
        key = self._key(layer, micro_batch)
        if key not in self._native_fanouts:
            spec = self._model.specs[key[0]]
            seeing = [request for request in self.requests if request.rows[micro_batch]]
            for request in seeing:
                request.buffer(key, q, spec)
            self._native_fanouts[key] = self._native_fanout(key, seeing)
        if (found := self._native_fanouts[key]) is not None:
            requests, native_fanout = found
            self._note(requests, native_fanout.send(self._step, layer, micro_batch, q))

    def wait(self, layer: int, micro_batch: int, *, since_s: float) -> None:
        if (found := self._native_fanouts[self._key(layer, micro_batch)]) is not None:
            requests, native_fanout = found
            deadlines_s = tuple([request.deadline_s for request in requests])
            passed_s = perf_counter() - since_s
            failed = native_fanout.wait(self._step, layer, micro_batch, deadlines_s, passed_s)
            self._note(requests, failed)

    def without(self, lost: Collection[ShardRequest]) -> "NativeChannel | None":
        others = [request for request in self.requests if request not in lost]
        if not others:
            return None
        channel = NativeChannel(others, self._model)
        for key, found in self._native_fanouts.items():
            requests = [request for request in found[0] if request not in lost] if found is not None else []
            channel._native_fanouts[key] = self._native_fanout(key, requests)
        return channel

    def settle(self) -> float:
        waited_s = 0.0
        for requests, native_fanout in filter(None, self._native_fanouts.values()):
            more_s, parts = native_fanout.times()
            waited_s += more_s
            for request, (frames, times_s) in zip(requests, parts, strict=True):
                request.record.frames += frames
                request.record.answered(*times_s)
        return waited_s

    @property
    def _step(self) -> int:
        return self.requests[0].step.step

    def _native_fanout(
        self, key: Key, requests: list[ShardRequest]
    ) -> tuple[list[ShardRequest], NativeFanout] | None:
        """Between ``lanes``, whose places are made already."""
        if not requests:
            return None
        spec = self._model.specs[key[0]]
        parts = []
        for request in requests:
            assert request.frames is not None, "a lane that has no native connection"
            parts.append(
                Part(request.frames, request.rows[key[1]], request.heads(spec), request.buffers[key].whole)
            )
        return requests, NativeFanout(parts, spec, parts[0].whole.o.dtype)

    def _note(self, requests: Sequence[ShardRequest], failed: Failures) -> None:
        for index in failed:
            requests[index].client.break_off()
        if failed:
            self._raise({requests[index]: requests[index].named(error) for index, error in failed.items()})


class ClientChannel(_Channel):
    """gRPC, or this process: one shard after the other."""

    def __init__(self, requests: Sequence[ShardRequest], model: AttentionModel) -> None:
        super().__init__(requests, model)
        self._sent: dict[tuple[int, int], tuple[float, dict[ShardRequest, Any]]] = {}
        """By layer and micro-batch: when, and what each lane's peer waits for."""
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
                    failed[request] = request.named(error)
        self._raise(failed)

    def wait(self, layer: int, micro_batch: int, *, since_s: float) -> None:
        key = self._key(layer, micro_batch)
        sent_s, sent = self._sent.pop((layer, micro_batch))
        # In turns, so that each shard's answer is often the first that is waited for: that one alone is
        # always seen when it comes.
        self._waits += 1
        due = list(sent)
        turn = self._waits % len(due) if due else 0
        failed = {}
        start_s, first = perf_counter(), True
        for request in due[turn:] + due[:turn]:
            buffer = request.buffers[key]
            left_s = max(0.0, request.deadline_s - (start_s - since_s))
            try:
                request.client.wait(sent[request], out=buffer.answer, deadline_s=left_s)
            except FarshoreError as error:
                failed[request] = request.named(error)
            else:
                buffer.put()
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
            channel._sent[frame] = (
                sent_s,
                {request: it for request, it in sent.items() if request not in lost},
            )
        return channel

    def settle(self) -> float:
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s
