"""Reads tensors from a Hugging Face folder's safetensors files.

Called by ``load``. Bytes go from the file straight into the tensor, without a mapping of the file, so that
loading takes the memory of the result and no more. It must not know a model's shapes.
"""

import os
import threading
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from farshore.errors import ModelError
from farshore.models.files.checkpoint import SUPPORTED, choose, refuse_foreign
from farshore.models.files.identity import FileIdentity
from farshore.models.files.safetensors_header import TensorPlace, read_header
from farshore.models.weights.names import hf_name
from farshore.models.weights.stored import StoredTensor, Update

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE_BYTES = 4 << 20
"""Read, hashed and converted at a time: a core's caches hold it."""
_BASE = "model."
"""Prefix of the decoder's tensors in a model with a head."""


class SafetensorsReader:
    """The files that transformers reads in a folder. Close it after reading."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files, self._weight_map = choose(folder)
        self._buffers = threading.local()
        self._tensors: dict[str, list[tuple[Path, TensorPlace]]] = {}
        self._files: dict[Path, BinaryIO] = {}
        try:
            for path in files:
                self._open(path)
        except ModelError:
            self.close()
            raise

    def has(self, name: str) -> bool:
        return any(spelling in self._tensors for spelling in _spellings(hf_name(name)))

    def find(self, name: str) -> StoredTensor:
        full = hf_name(name)
        found = [spelling for spelling in _spellings(full) if spelling in self._tensors]
        if not found:
            raise ModelError(f"{self._folder}: tensor {full!r} is missing; download the model again")
        copies = [(spelling, *copy) for spelling in found for copy in self._tensors[spelling]]
        if len(copies) > 1:
            where = " and ".join(f"{path.name} as {spelling!r}" for spelling, path, _ in copies)
            raise ModelError(f"{self._folder}: tensor {full!r} lies in {where}; download the model again")
        ((stored, path, place),) = copies
        # transformers reads such a tensor, other loaders follow the index: the files contradict each other.
        if self._weight_map is not None and self._weight_map.get(stored) != path.name:
            raise ModelError(
                f"{path}: holds {stored!r}, which the index places in "
                f"{self._weight_map.get(stored, 'no file')}; download the model again"
            )
        if place.dtype not in _DTYPES:
            raise ModelError(
                f"{path}: {stored!r} is {place.dtype}; use an unquantised model; supported: {SUPPORTED}"
            )
        identity = FileIdentity.of(self._files[path].fileno())
        return StoredTensor(path, stored, place.dtype, place.shape, place.offset, identity)

    def read(self, name: str, dtype: torch.dtype, update: Update) -> Tensor:
        stored = self.find(name)
        result = torch.empty(stored.shape, dtype=dtype, device="cpu")
        stored_dtype = _DTYPES[stored.dtype]
        flat, offset = result.view(-1), stored.offset
        # A tensor that needs no conversion is read in place.
        buffer = None if dtype == stored_dtype else self._buffer().view(stored_dtype)
        for target in flat.split(_PIECE_BYTES // stored_dtype.itemsize) if len(flat) else ():
            piece = target if buffer is None else buffer[: len(target)]
            data = memoryview(piece.view(torch.uint8).numpy())
            self._fill(stored, data, offset)
            update(data)
            if buffer is not None:
                target.copy_(piece)
            offset += len(data)
        return result

    def blocks(self, name: str) -> None:
        return None

    def release(self, name: str) -> None:
        """Nothing is mapped."""

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _open(self, path: Path) -> None:
        try:
            file = self._files[path] = path.open("rb")
            header = read_header(path, file)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            detail = "missing" if missing else f"can't be read: {error.strerror or error}"
            raise ModelError(f"{path}: {detail}; download it again") from error
        refuse_foreign(header, path)
        for name, place in header.items():
            self._tensors.setdefault(name, []).append((path, place))

    def _buffer(self) -> Tensor:
        """u8 [_PIECE_BYTES], one for each thread. Buffers that come and go would leave gaps in its heap."""
        if not hasattr(self._buffers, "buffer"):
            self._buffers.buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8, device="cpu")
        return self._buffers.buffer

    def _fill(self, stored: StoredTensor, data: memoryview, offset: int) -> None:
        while len(data):
            try:
                read_bytes = os.preadv(self._files[stored.path].fileno(), [data], offset)
            except OSError as error:
                raise ModelError(f"{stored} can't be read ({error.strerror}); download it again") from error
            if not read_bytes:
                raise ModelError(f"{stored} was cut short while it was read; download it again")
            data, offset = data[read_bytes:], offset + read_bytes


def _spellings(full: str) -> tuple[str, ...]:
    """The names that transformers takes for ``full``: it adds or strips the prefix of a decoder without a
    head."""
    bare = full.removeprefix(_BASE)
    return (full, _BASE + full) if bare == full else (full, bare, _BASE + full)
