"""Host memory: its device, and the addresses in it that native code takes.

Called by every module that gives tensors to native code as plain numbers, and by those whose tensors are read
by the host wherever the model or the store lies: work lists, frames, counters. It must not know native code.
"""

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

HOST = torch.device("cpu")

Send = Callable[[Tensor], Tensor]
"""Returns a copy of a host tensor on a device, such as :meth:`farshore.kernels.runtime.base.Stream.send`."""


class PlanRoom(Protocol):
    """Memory on a device for one plan at a time, which stays where it is. So a graph that holds the launches
    of one plan does those of later ones too, if these have the same shape."""

    def take(self, tables: Tensor, *, scratch: int, shape: Hashable) -> tuple[Tensor, Tensor]:
        """Copies the plan's tables, u8 on the host, to the room, in place of the last plan's. Returns them
        there, and ``scratch`` float32 numbers; both lie where the last plan's did, if that had as many.
        ``shape``: everything that the launches depend on, beside what the tables hold. The host may change
        ``tables`` at once."""


def address(x: Tensor) -> int:
    """The address of the first element of ``x``, for native code.

    Raises ValueError unless ``x`` lies in host memory: an address on another device, read by native code,
    would be some other memory of this process.
    """
    if not x.is_cpu:
        raise ValueError(
            f"native code was given {x.dtype} {tuple(x.shape)} on {x.device}: copy it to the CPU first"
        )
    return x.data_ptr()
