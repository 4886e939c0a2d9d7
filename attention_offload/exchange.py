"""One micro-batch's layer frames to all shards that are reached natively: one call to send, one to wait.

Made by ``fanout``. The answers go where their rows and heads belong in the states that are given, and nowhere
else. It must not know replicas, or what becomes of a lost shard.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.frame_stream import AWAKE_US, FrameStream
from farshore.attention_offload.frames import Sent, native
from farshore.errors import FarshoreError
from farshore.kernels.base import AttentionSpec, State


class Part(NamedTuple):
    """What one shard sees of the micro-batch, and where its answer goes: a state of all rows and heads."""

    stream: FrameStream
    rows: tuple[int, ...]
    heads: slice
    whole: State


class Lost(Exception):
    """The shard of ``parts[index]`` failed with ``error``. :meth:`Exchange.owed`: what the others owe."""

    def __init__(self, index: int, error: FarshoreError) -> None:
        super().__init__(error)
        self.index = index
        self.error = error


class Exchange:
    """Layer frames of one shape, one under way at a time. Not thread-safe."""

    def __init__(self, parts: Sequence[Part], spec: AttentionSpec, dtype: torch.dtype) -> None:
        """One part or more, no stream twice. ``dtype``: of q; InvalidRequest where a connection was opened
        for another."""
        for part in parts:
            part.stream.check_dtype(dtype)
        self._parts = tuple(parts)
        self._deadline_s = min(part.stream.deadline_s for part in parts)
        self._native = native()
        self._handle = self._native.exchange(tuple(_lane(part, spec, dtype) for part in parts), AWAKE_US)
        self._frame = (0, 0, 0)

    def send(self, step: int, layer: int, micro_batch: int, q: Tensor) -> None:
        """q ``[rows of the micro-batch, q_heads, k_dim]``, contiguous; it may change as soon as this returns.
        Raises :class:`Lost`."""
        self._frame = (step, layer, micro_batch)
        try:
            self._native.send_all(self._handle, *self._frame, q.data_ptr())
        except (OSError, ValueError) as error:
            raise self._lost(error) from error

    def wait(self) -> None:
        """For all answers to the frame sent last. Raises :class:`Lost`; the others may be waited for by
        themselves then."""
        try:
            failure = self._native.wait_all(self._handle, *self._frame, self._deadline_s)
        except (OSError, ValueError) as error:
            raise self._lost(error) from error
        if failure is not None:
            index, _ = self._native.progress(self._handle)
            raise Lost(index, self._parts[index].stream.refusal(failure))

    def owed(self) -> list[Sent | None]:
        """By part: what was sent and is not answered."""
        _, progress = self._native.progress(self._handle)
        return [
            Sent(*self._frame, len(part.rows), part.heads.stop - part.heads.start)
            if sent and not answered
            else None
            for part, (sent, answered) in zip(self._parts, progress, strict=True)
        ]

    def times(self) -> tuple[float, list[tuple[int, list[float]]]]:
        """Since it was asked last: seconds that :meth:`wait` took; and, by part, how many answers came, and
        the seconds from sending to those that were seen coming."""
        return self._native.times(self._handle)  # type: ignore[no-any-return]

    def _lost(self, error: Exception) -> Lost:
        index, _ = self._native.progress(self._handle)
        return Lost(index, self._parts[index].stream.mapped(error))


def _lane(part: Part, spec: AttentionSpec, dtype: torch.dtype) -> tuple[Any, ...]:
    """As ``native/binding.cpp`` takes it."""
    first, heads = part.heads.start, part.heads.stop - part.heads.start
    k_bytes, v_bytes = spec.k_dim * dtype.itemsize, spec.v_dim * dtype.itemsize
    o, lse = part.whole
    return (
        part.stream.wire,
        part.rows,
        first * k_bytes,
        heads * k_bytes,
        spec.q_heads * k_bytes,
        lse.data_ptr() + first * lse.itemsize,
        heads * lse.itemsize,
        lse.stride(0) * lse.itemsize,
        o.data_ptr() + first * v_bytes,
        heads * v_bytes,
        o.stride(0) * o.itemsize,
    )
