"""What every transport of hot frames agrees on: names, the frame, its size, and the engine's end of a stream.

A frame past gRPC is a header ``step u32, layer u16, micro_batch u8, kind u8, bytes u32``, little-endian, and
its payload. A step goes ahead once, as its protobuf message, or as a header alone where it reads what the
last one read; a layer frame carries q, its answer lse, then o (so that both are aligned). With R rows and H
heads of a frame, s bytes an element of q and o, a layer costs exactly::

    to the shard    12 + R H k_dim s
    back            12 + R H (4 + v_dim s)

On TCP these are the bytes of the stream. In shared memory the same bytes lie in a slot, and 12 bytes on the
Unix socket wake an end that sleeps. Used by both ends; it must not know stores or kernels.
"""

from enum import StrEnum
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from farshore.attention_offload.plan import ShardStep
from farshore.kernels.base import AttentionSpec, State

HEADER_BYTES = 12


class Transport(StrEnum):
    """By the name that people see."""

    IN_PROCESS = "in-process"
    SHARED_MEMORY = "shared memory"
    TCP = "TCP"
    GRPC = "gRPC"


REMOTE = (Transport.SHARED_MEMORY, Transport.TCP, Transport.GRPC)
"""Between processes, the fastest first."""


class Sent(NamedTuple):
    """A layer frame under way, and the shape of its answer."""

    step: int
    layer: int
    micro_batch: int
    rows: int
    heads: int


class HotStream(Protocol):
    """One connection's hot frames, engine's end. Answers come in the order of the frames. Any error leaves it
    useless: TransportError if it broke or was late, else what the shard refused the step with."""

    @property
    def transport(self) -> Transport: ...

    @property
    def under_way(self) -> int:
        """Layer frames sent and not answered."""

    def begin(self, step: ShardStep) -> None: ...

    def again(self, step: int) -> None:
        """A step that reads what the one begun last does, in a model without windows."""

    def send(self, sent: Sent, q: Tensor) -> None:
        """q ``[rows, heads, k_dim]``; it may change as soon as this returns."""

    def wait(self, sent: Sent, out: State) -> None:
        """Fills out: o ``[rows, heads, v_dim]``, lse ``[rows, heads]``, the heads of a row contiguous."""

    def close(self) -> None: ...


class FrameBytes(NamedTuple):
    """Payload of one layer frame and of its answer."""

    q: int
    lse: int
    o: int


def frame_bytes(spec: AttentionSpec, *, rows: int, heads: int, dtype: torch.dtype) -> FrameBytes:
    size = dtype.itemsize
    return FrameBytes(rows * heads * spec.k_dim * size, rows * heads * 4, rows * heads * spec.v_dim * size)


@cache
def native() -> Any:
    """The native module, or None where it was not built: gRPC serves then."""
    try:
        return import_module("farshore.attention_offload._native")
    except ImportError:
        return None
