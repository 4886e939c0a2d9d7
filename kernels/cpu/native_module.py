"""The native module of the CPU kernels, ready to read PyTorch's tensors.

The other modules of this folder import it from here and never directly, since natives refuse tensors before
``use_tensors`` was called. ImportError where the module was not built.
"""

import torch
from torch import Tensor

from farshore.kernels.cpu import _native as native
from farshore.kernels.formats import DTYPE_CODES, NATIVE_DTYPES

_ELEMENTS = {dtype: DTYPE_CODES[dtype] for dtype in NATIVE_DTYPES}
_ELEMENTS |= {torch.uint8: 3, torch.int16: 4, torch.int32: 5, torch.int64: 6}
"""The numbers of ``Element`` in ``native/runtime/tensors.h``."""


def describe(x: Tensor) -> tuple[int, ...]:
    """(address, *shape, *strides, number of the Element or -1), for the native code where this torch version
    has no C table of functions that read tensors."""
    return (x.data_ptr(), *x.shape, *x.stride(), _ELEMENTS.get(x.dtype, -1) if x.is_cpu else -1)


native.use_tensors(Tensor, getattr(Tensor, "__dlpack_c_exchange_api__", None), describe)
