"""Reads the header of a safetensors file: the type, shape and place of each tensor.

The ``safetensors`` package maps whole files, and mapped pages count as memory of the process that reads
them; with the places, tensors are read straight to where they belong. Called by ``weights.safetensors``. It
must not know what tensors mean or import torch.

Format: the header's length (u64, little-endian), the header (JSON), the tensors' bytes.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from farshore.errors import ModelError

_MOST_HEADER_BYTES = 100_000_000
"""As in the ``safetensors`` package."""
_LENGTH_BYTES = 8
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that are read → bytes of an element."""


class TensorPlace(NamedTuple):
    """One tensor of a file."""

    dtype: str
    """The format's name of the type, for example 'BF16'."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""


def read_header(path: Path, file: BinaryIO) -> dict[str, TensorPlace]:
    """The tensors of the file by name. ``file``: ``path`` opened, at its beginning. Raises ModelError if it
    is damaged or cut short, OSError if it can't be read."""
    size = os.stat(file.fileno()).st_size
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MOST_HEADER_BYTES):
        raise _damaged(path, "its header does not end within it")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    begin = _LENGTH_BYTES + length
    return {
        name: _place(path, name, entry, begin, size)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _place(path: Path, name: str, entry: Any, begin: int, size: int) -> TensorPlace:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [first, last]} if all(
            type(number) is int and number >= 0 for number in (*shape, first, last)
        ):
            # The sizes of other types are not known here: no such tensor is read.
            expected = math.prod(shape) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else last - first
            if begin + last > size:
                raise _damaged(path, f"it ends before tensor {name!r:.120}")
            if last - first == expected:
                return TensorPlace(dtype, tuple(shape), begin + first)
    raise _damaged(path, f"its header contradicts itself about tensor {name!r:.120}")


def _damaged(path: Path, detail: str) -> ModelError:
    return ModelError(f"{path}: damaged or cut short ({detail}); download it again")
