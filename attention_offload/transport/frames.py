"""Defines what all transports of hot frames share: transport names, frame sizes, and the engine's interface.

Called by the connections in this folder, by ``shard.frame_loop`` and ``shard.session``, and by the shard
clients. It must not know stores or kernels' implementations.

On a native transport (shared memory or TCP) a frame is a little-endian header ``step u32, layer u16,
micro_batch u8, kind u8, bytes u32`` followed by its payload. A step is announced once: by its protobuf
message ``Step``, or by a header alone if it repeats the reads of the previous step. A layer frame carries q;
its answer carries lse, then o, so that both are aligned. For R rows, H query heads and s bytes per element of
q and o, one layer costs exactly::

    engine to shard    12 + R H k_dim s
    shard to engine    12 + R H (4 + v_dim s)

On TCP these bytes are sent as they are. In shared memory they are written to a slot, and a 12-byte frame on
the Unix socket wakes the other end if it sleeps.
"""

from enum import StrEnum
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from farshore.attention_offload.plan.step_plan import ShardStep
from farshore.kernels.base import AttentionSpec, State

HEADER_BYTES = 12

MOST_DEADLINE_S = 1.0
"""The longest deadline of a layer's answer, and so of any other wait on a hot connection."""


class Transport(StrEnum):
    """The transports; each value is the name shown to users."""

    IN_PROCESS = "in-process"
    SHARED_MEMORY = "shared memory"
    TCP = "TCP"
    GRPC = "gRPC"


REMOTE = (Transport.SHARED_MEMORY, Transport.TCP, Transport.GRPC)
"""The transports between processes, fastest first."""


class Sent(NamedTuple):
    """A layer frame that was sent; it identifies the answer and gives the answer's shape."""

    step: int
    layer: int
    micro_batch: int
    rows: int
    heads: int


class HotConnection(Protocol):
    """The engine's end of a connection that carries hot frames. Answers arrive in the order of the frames.

    After any error the connection cannot be used again. A method raises Late when a deadline expires,
    another TransportError when the connection breaks or delivers malformed data, and otherwise the error with
    which the shard refused the step. Not thread-safe, except for ``is_open``.
    """

    @property
    def transport(self) -> Transport: ...

    @property
    def is_open(self) -> bool:
        """Whether, as far as this process knows, neither end has closed the connection. Thread-safe."""

    @property
    def under_way(self) -> int:
        """The number of layer frames that were sent and are not yet answered."""

    def drain(self, deadline_s: float) -> None:
        """Reads and discards all outstanding answers, which belong to a dropped step."""

    def begin(self, step: ShardStep, deadline_s: float) -> None:
        """Announces a step. From now on each send blocks for at most ``deadline_s``."""

    def repeat_step(self, step: int, deadline_s: float) -> None:
        """Announces step number ``step``, which has the same reads as the step begun last.

        Valid only for a model without windows: positions are not sent. ``deadline_s`` as in :meth:`begin`."""

    def send(self, sent: Sent, q: Tensor) -> None:
        """Sends q ``[rows, heads, k_dim]``. The caller may change q as soon as this returns."""

    def wait(self, sent: Sent, out: State, deadline_s: float) -> None:
        """Blocks until the frame ``sent`` is answered and copies the answer to ``out``.

        ``out`` is o ``[rows, heads, v_dim]`` and lse ``[rows, heads]``; the heads of a row are contiguous.
        Raises Late after ``deadline_s``."""

    def close(self) -> None: ...


class FrameBytes(NamedTuple):
    """The payload sizes, in bytes, of a layer frame (q) and of its answer (lse and o)."""

    q: int
    lse: int
    o: int


def frame_bytes(spec: AttentionSpec, *, rows: int, heads: int, dtype: torch.dtype) -> FrameBytes:
    """The payload sizes of a layer frame with ``heads`` query heads; q and o have ``dtype``, lse float32."""
    size = dtype.itemsize
    return FrameBytes(rows * heads * spec.k_dim * size, rows * heads * 4, rows * heads * spec.v_dim * size)


@cache
def native() -> Any:
    """The native module, or None if it was not built; gRPC is then the only remote transport."""
    try:
        return import_module("farshore.attention_offload._native")
    except ImportError:
        return None
