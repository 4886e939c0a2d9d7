"""One micro-batch's layer frames to all shards that are reached natively: one call to send, one to wait.

Made by ``channel``. The answers go where their rows and heads belong in the states that are given, and
nowhere else. It must not know replicas, or what becomes of a lost shard.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.transport.frames import native
from farshore.attention_offload.transport.native_connection import SPIN_US, NativeConnection
from farshore.errors import FarshoreError
from farshore.kernels.base import AttentionSpec, State

Failures = dict[int, FarshoreError]
"""What shards failed with, by the index of their part."""


class Part(NamedTuple):
    """What one shard sees of the micro-batch, and where its answer goes: a state of all rows and heads."""

    stream: NativeConnection
    rows: tuple[int, ...]
    heads: slice
    whole: State


class NativeFanout:
    """Layer frames of one shape, one under way at a time. Not thread-safe.

    A shard that fails keeps no other from being sent its frame, or from being waited for.
    """

    def __init__(self, parts: Sequence[Part], spec: AttentionSpec, dtype: torch.dtype) -> None:
        """One part or more, no stream twice. ``dtype``: of q; InvalidRequest where a connection was opened
        for another."""
        for part in parts:
            part.stream.check_dtype(dtype)
        self.parts = tuple(parts)
        self._native = native()
        self._handle = self._native.native_fanout(
            tuple(_request(part, spec, dtype) for part in parts), SPIN_US
        )

    def send(self, step: int, layer: int, micro_batch: int, q: Tensor) -> Failures:
        """q ``[rows of the micro-batch, q_heads, k_dim]``, contiguous; it may change as soon as this
        returns."""
        failed = self._native.send_all(self._handle, step, layer, micro_batch, q.data_ptr())
        return {} if failed is None else self._mapped(failed)

    def wait(
        self, step: int, layer: int, micro_batch: int, deadlines_s: tuple[float, ...], passed_s: float
    ) -> Failures:
        """For the answers to a frame that was sent, by this exchange or by one with more parts: for each
        until its own deadline, of which ``passed_s`` are over."""
        failed = self._native.wait_all(self._handle, step, layer, micro_batch, deadlines_s, passed_s)
        return {} if failed is None else self._mapped(failed)

    def times(self) -> tuple[float, list[tuple[int, list[float]]]]:
        """Since it was asked last: seconds that :meth:`wait` took; and, by part, how many answers came, and
        the seconds from sending to those that were seen coming."""
        return self._native.times(self._handle)  # type: ignore[no-any-return]

    def _mapped(self, failed: Sequence[tuple[int, type[Exception] | None, Any]]) -> Failures:
        found = {}
        for index, kind, text in failed:
            stream = self.parts[index].stream
            found[index] = stream.refusal(text) if kind is None else stream.mapped(kind(text))
        return found


def _request(part: Part, spec: AttentionSpec, dtype: torch.dtype) -> tuple[Any, ...]:
    """As ``native/binding.cpp`` takes it."""
    first, heads = part.heads.start, part.heads.stop - part.heads.start
    k_bytes, v_bytes = spec.k_dim * dtype.itemsize, spec.v_dim * dtype.itemsize
    o, lse = part.whole
    return (
        part.stream.wire,
        part.rows,
        (first * k_bytes, heads * k_bytes, spec.q_heads * k_bytes),
        (lse.data_ptr() + first * lse.itemsize, heads * lse.itemsize, lse.stride(0) * lse.itemsize),
        (o.data_ptr() + first * v_bytes, heads * v_bytes, o.stride(0) * o.itemsize),
    )
