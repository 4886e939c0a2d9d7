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

from farshore.attention_offload.plan.step_plan import ShardStep
from farshore.kernels.base import AttentionSpec, State

HEADER_BYTES = 12

MOST_DEADLINE_S = 1.0
"""The longest that an engine waits for a layer's answer, and so for anything else on a hot connection."""


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
    """One connection's hot frames, engine's end. Answers come in the order of the frames.

    Any error leaves the connection useless: Late where a deadline ran out, another TransportError where it
    broke or brought garbage, else what the shard refused the step with. One thread uses it, save for
    ``is_open``.
    """

    @property
    def transport(self) -> Transport: ...

    @property
    def is_open(self) -> bool:
        """Whether neither end has closed it, as far as is known here. From any thread."""

    @property
    def under_way(self) -> int:
        """Layer frames sent and not answered."""

    def drain(self, deadline_s: float) -> None:
        """Reads the answers that are owed, of a step that was dropped, and forgets them."""

    def begin(self, step: ShardStep, deadline_s: float) -> None:
        """``deadline_s`` bounds each send from now on."""

    def repeat_step(self, step: int, deadline_s: float) -> None:
        """A step that reads what the one begun last does, in a model without windows."""

    def send(self, sent: Sent, q: Tensor) -> None:
        """q ``[rows, heads, k_dim]``; it may change as soon as this returns."""

    def wait(self, sent: Sent, out: State, deadline_s: float) -> None:
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
