"""What carries a step's frames to its shards. All kinds send, wait, fail, and keep times alike:

- :class:`NativeChannel`: all shards that are reached over shared memory or TCP, by one native call to send
  and one to wait;
- :class:`PeerChannel`: shards that are reached over gRPC, or that live in this process.

Made by ``fanout`` for one set of lanes. A channel does not change: when it loses a shard, ``without`` gives
the one that takes its place. It must not know replicas, or when a step is dropped.
"""

from collections.abc import Collection, Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.exchange import Exchange, Failures, Part
from farshore.attention_offload.frames import Transport
from farshore.attention_offload.lane import Key, Lane, as_one
from farshore.errors import FarshoreError

BLOCKED_S = 20e-6
"""An answer that was waited for so long came just now; one that was there may have come earlier."""


class ShardChannel(Protocol):
    """Not thread-safe: the engine's loop calls it."""

    lanes: tuple[Lane, ...]
    """Of the shards that it serves."""
    failed: Mapping[Lane, FarshoreError]
    """What lanes failed with in the last call. Where that raised, all other lanes were sent the frame, or
    have answered it."""

    def send(self, layer: int, micro_batch: int, q: Tensor) -> None:
        """To every shard that sees rows of the micro-batch. q ``[its rows, q_heads, k_dim]``, contiguous; it
        must stay as it is until :meth:`wait`. Raises Late or Lost, which name the shards, or what one
        refused."""

    def wait(self, layer: int, micro_batch: int, *, since_s: float) -> None:
        """Until the answers are in their places, for each shard up to its deadline, counted from ``since_s``
        by ``perf_counter``. Raises as :meth:`send`."""

    def without(self, lost: Collection[Lane]) -> "ShardChannel | None":
        """The channel that takes this one's place when it has lost lanes: for the others, which still owe
        what they owe here; None where there are none."""

    def settle(self) -> float:
        """Books the frames and times of this channel in its lanes' records. Returns for how many seconds it
        has waited for other processes since it was asked last."""


def channels_to(lanes: Sequence[Lane], model: AttentionModel) -> list[ShardChannel]:
    """In the order in which they should be waited for: what lives here computes while the others do."""
    here = [lane for lane in lanes if lane.peer.transport is Transport.IN_PROCESS]
    near = [lane for lane in lanes if lane.frames is not None]
    far = [lane for lane in lanes if lane not in here and lane not in near]
    channels: list[ShardChannel] = []
    if here:
        channels.append(PeerChannel(here, model))
    if near:
        channels.append(NativeChannel(near, model))
    if far:
        channels.append(PeerChannel(far, model))
    return channels


class _Channel:
    def __init__(self, lanes: Sequence[Lane], model: AttentionModel) -> None:
        self.lanes = tuple(lanes)
        self.failed: Mapping[Lane, FarshoreError] = {}
        self._model = model

    def _key(self, layer: int, micro_batch: int) -> Key:
        return self._model.layer_class[layer], micro_batch

    def _raise(self, failed: Mapping[Lane, FarshoreError]) -> None:
        self.failed = failed
        if failed:
            raise as_one(failed)


class NativeChannel(_Channel):
    """Shared memory and TCP, together."""

    def __init__(self, lanes: Sequence[Lane], model: AttentionModel) -> None:
        super().__init__(lanes, model)
        self._exchanges: dict[Key, tuple[list[Lane], Exchange] | None] = {}
        """The lanes that see rows of the micro-batch, where there are any."""

    def send(self, layer: int, micro_batch: int, q: Tensor) -> None:
        key = self._key(layer, micro_batch)
        if key not in self._exchanges:
            spec = self._model.specs[key[0]]
            seeing = [lane for lane in self.lanes if lane.rows[micro_batch]]
            for lane in seeing:
                lane.place(key, q, spec)
            self._exchanges[key] = self._exchange(key, seeing)
        if (found := self._exchanges[key]) is not None:
            lanes, exchange = found
            self._note(lanes, exchange.send(self._step, layer, micro_batch, q))

    def wait(self, layer: int, micro_batch: int, *, since_s: float) -> None:
        if (found := self._exchanges[self._key(layer, micro_batch)]) is not None:
            lanes, exchange = found
            deadlines_s = tuple([lane.deadline_s for lane in lanes])
            passed_s = perf_counter() - since_s
            failed = exchange.wait(self._step, layer, micro_batch, deadlines_s, passed_s)
            self._note(lanes, failed)

    def without(self, lost: Collection[Lane]) -> "NativeChannel | None":
        others = [lane for lane in self.lanes if lane not in lost]
        if not others:
            return None
        channel = NativeChannel(others, self._model)
        for key, found in self._exchanges.items():
            lanes = [lane for lane in found[0] if lane not in lost] if found is not None else []
            channel._exchanges[key] = self._exchange(key, lanes)
        return channel

    def settle(self) -> float:
        waited_s = 0.0
        for lanes, exchange in filter(None, self._exchanges.values()):
            more_s, parts = exchange.times()
            waited_s += more_s
            for lane, (frames, times_s) in zip(lanes, parts, strict=True):
                lane.record.frames += frames
                lane.record.answered(*times_s)
        return waited_s

    @property
    def _step(self) -> int:
        return self.lanes[0].step.step

    def _exchange(self, key: Key, lanes: list[Lane]) -> tuple[list[Lane], Exchange] | None:
        """Between ``lanes``, whose places are made already."""
        if not lanes:
            return None
        spec = self._model.specs[key[0]]
        parts = []
        for lane in lanes:
            assert lane.frames is not None, "a lane that has no native connection"
            parts.append(Part(lane.frames, lane.rows[key[1]], lane.heads(spec), lane.places[key].whole))
        return lanes, Exchange(parts, spec, parts[0].whole.o.dtype)

    def _note(self, lanes: Sequence[Lane], failed: Failures) -> None:
        for index in failed:
            lanes[index].peer.break_off()
        if failed:
            self._raise({lanes[index]: lanes[index].named(error) for index, error in failed.items()})


class PeerChannel(_Channel):
    """gRPC, or this process: one shard after the other."""

    def __init__(self, lanes: Sequence[Lane], model: AttentionModel) -> None:
        super().__init__(lanes, model)
        self._sent: dict[tuple[int, int], tuple[float, dict[Lane, Any]]] = {}
        """By layer and micro-batch: when, and what each lane's peer waits for."""
        self._waited_s = 0.0
        self._waits = 0

    def send(self, layer: int, micro_batch: int, q: Tensor) -> None:
        key = self._key(layer, micro_batch)
        spec = self._model.specs[key[0]]
        sent: dict[Lane, Any] = {}
        failed = {}
        self._sent[layer, micro_batch] = perf_counter(), sent
        for lane in self.lanes:
            if lane.rows[micro_batch]:
                lane.place(key, q, spec)
                try:
                    sent[lane] = lane.peer.send(layer, micro_batch, lane.query(micro_batch, q, spec))
                except FarshoreError as error:
                    failed[lane] = lane.named(error)
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
        for lane in due[turn:] + due[:turn]:
            place = lane.places[key]
            left_s = max(0.0, lane.deadline_s - (start_s - since_s))
            try:
                lane.peer.wait(sent[lane], out=place.answer, deadline_s=left_s)
            except FarshoreError as error:
                failed[lane] = lane.named(error)
            else:
                place.put()
            end_s = perf_counter()
            if lane not in failed:
                lane.record.frames += 1
                if first or end_s - start_s > BLOCKED_S:
                    lane.record.answered(end_s - sent_s)
            if lane.peer.transport is not Transport.IN_PROCESS:
                self._waited_s += end_s - start_s
            start_s, first = end_s, False
        self._raise(failed)

    def without(self, lost: Collection[Lane]) -> "PeerChannel | None":
        others = [lane for lane in self.lanes if lane not in lost]
        if not others:
            return None
        channel = PeerChannel(others, self._model)
        for frame, (sent_s, sent) in self._sent.items():
            channel._sent[frame] = sent_s, {lane: it for lane, it in sent.items() if lane not in lost}
        return channel

    def settle(self) -> float:
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s
