"""Sends one micro-batch's layer frames to all native shards with one native call, and waits for their answers
with another.

Called by ``channel``. The native code writes each answer into its rows and heads of a state that covers the
whole micro-batch. It must not know replicas, or what happens after a shard is lost.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.transport.frames import native
from farshore.attention_offload.transport.native_connection import SPIN_US, NativeConnection
from farshore.errors import FarshoreError
from farshore.kernels.base import AttentionSpec, State
from farshore.kernels.host import address

Failures = dict[int, FarshoreError]
"""The errors of the shards that failed, by the index of their request."""


class NativeRequest(NamedTuple):
    """One shard's share of a micro-batch, and the state that its answers are written to."""

    connection: NativeConnection
    rows: tuple[int, ...]
    """The rows of the micro-batch that the shard sees, ascending."""
    heads: slice
    """The query heads that the shard sees."""
    state: State
    """A state over all rows and heads of the micro-batch. The native code writes to its memory, which the
    :class:`NativeFanout` keeps alive."""


class NativeFanout:
    """Exchanges layer frames of one shape with several shards; one frame at a time is under way. Not
    thread-safe.

    If one shard fails, the others are still sent their frames and waited for.
    """

    def __init__(self, requests: Sequence[NativeRequest], spec: AttentionSpec, dtype: torch.dtype) -> None:
        """``requests`` holds at least one request, each on another connection. ``dtype`` is the dtype of q
        and o. Raises InvalidRequest if a connection was opened for another dtype."""
        for request in requests:
            request.connection.check_dtype(dtype)
        self.requests = tuple(requests)
        self._native = native()
        self._handle = self._native.native_fanout(
            tuple(_native_arguments(request, spec, dtype) for request in requests), SPIN_US
        )

    def send(self, step: int, layer: int, micro_batch: int, q: Tensor) -> Failures:
        """Sends each shard its rows and heads of q ``[rows of the micro-batch, q_heads, k_dim]``, which must
        be contiguous. The caller may change q as soon as this returns. Returns the errors of the shards that
        were not sent theirs."""
        failed = self._native.send_all(self._handle, step, layer, micro_batch, address(q))
        return {} if failed is None else self._mapped(failed)

    def wait(
        self, step: int, layer: int, micro_batch: int, deadlines_s: tuple[float, ...], passed_s: float
    ) -> Failures:
        """Blocks until each shard has answered the frame or its deadline has expired. Returns the errors of
        the shards that did not answer.

        ``deadlines_s`` holds one deadline for each request, of which ``passed_s`` have passed already. The
        frame may have been sent by another :class:`NativeFanout` that had these connections among others."""
        failed = self._native.wait_all(self._handle, step, layer, micro_batch, deadlines_s, passed_s)
        return {} if failed is None else self._mapped(failed)

    def times(self) -> tuple[float, list[tuple[int, list[float]]]]:
        """Returns what was measured since the last call: the seconds spent in :meth:`wait`, and for each
        request the number of answers and the latencies, in seconds, of those answers whose arrival was
        observed."""
        return self._native.times(self._handle)  # type: ignore[no-any-return]

    def _mapped(self, failed: Sequence[tuple[int, type[Exception] | None, Any]]) -> Failures:
        """Converts the native failures to errors. A failure without an exception type carries the shard's
        Failure message."""
        errors = {}
        for index, kind, text in failed:
            connection = self.requests[index].connection
            errors[index] = connection.refusal(text) if kind is None else connection.mapped(kind(text))
        return errors


def _native_arguments(request: NativeRequest, spec: AttentionSpec, dtype: torch.dtype) -> tuple[Any, ...]:
    """The request in the form that ``native_fanout`` in ``native/binding.cpp`` takes: offsets, lengths and
    strides in bytes."""
    first_head, heads = request.heads.start, request.heads.stop - request.heads.start
    k_bytes, v_bytes = spec.k_dim * dtype.itemsize, spec.v_dim * dtype.itemsize
    o, lse = request.state
    return (
        request.connection.wire,
        request.rows,
        (first_head * k_bytes, heads * k_bytes, spec.q_heads * k_bytes),
        (address(lse) + first_head * lse.itemsize, heads * lse.itemsize, lse.stride(0) * lse.itemsize),
        (address(o) + first_head * v_bytes, heads * v_bytes, o.stride(0) * o.itemsize),
    )
