"""The tables of a plan: arrays on the host in one buffer, and the same as tensors on the device.

Called by ``ops.plan``. One buffer is copied in one transfer. It must not know what the tables say.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LOAD_BYTES = 16
"""Of a thread's widest load. Each table begins at a multiple, as tensors of their own would: triton compiles
other kernels for other pointers."""
_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.int16): torch.int16}


class Packed(NamedTuple):
    """Tables in one buffer on the host."""

    buffer: Tensor
    """u8"""
    tables: tuple[NDArray[Any], ...]
    """Views of the buffer."""
    starts: tuple[int, ...]
    """Where each table begins, in bytes."""

    @classmethod
    def of(cls, tables: Sequence[NDArray[Any]]) -> "Packed":
        """Copies of ``tables``, of 16, 32 or 64 bit integers."""
        sizes = (-(-table.nbytes // LOAD_BYTES) * LOAD_BYTES for table in tables)
        *starts, size = accumulate(sizes, initial=0)
        buffer = np.empty(size, dtype=np.uint8)
        views = []
        for table, start in zip(tables, starts, strict=True):
            view = buffer[start : start + table.nbytes].view(table.dtype).reshape(table.shape)
            view[...] = table
            views.append(view)
        return cls(torch.from_numpy(buffer), tuple(views), tuple(starts))

    def unpack(self, copy: Tensor) -> list[Tensor]:
        """The tables in a copy of the buffer, on any device."""
        by_dtype = {dtype: copy.view(dtype) for dtype in _DTYPES.values()}
        return [
            by_dtype[dtype := _DTYPES[table.dtype]]
            .narrow(0, start // dtype.itemsize, table.size)
            .view(table.shape)
            for table, start in zip(self.tables, self.starts, strict=True)
        ]
