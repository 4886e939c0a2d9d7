"""A GGUF file, which is checked when it is opened. Errors name the file and the fix.

Called by ``config``, ``rope`` and ``tokenizer`` (metadata) and by ``weights`` (tensors, dequantised by PyPI's
``gguf``). It must not import torch or know what the metadata mean.
"""

import math
import mmap
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from farshore.errors import ModelError
from farshore.models.files.gguf_header import DamagedError, GgufHeader, TensorInfo, read_header


class GgufFile:
    """Metadata and tensors of one file, memory-mapped and read-only. Tensors are dequantised on request."""

    def __init__(self, path: Path, data: mmap.mmap | bytes, header: GgufHeader) -> None:
        self.path = path
        self._data = data
        self._metadata = header.metadata
        self._tensors = header.tensors
        self.tensor_names = frozenset(header.tensors)

    @classmethod
    def open(cls, path: str | Path) -> "GgufFile":
        """Opens a file. Raises ModelError if it can't be read, isn't GGUF, or is damaged or truncated."""
        path = Path(path)
        try:
            with path.open("rb") as stream:
                empty = not stream.seek(0, 2)
                data = b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            file = cls(path, data, read_header(data))
            for name, info in file._tensors.items():
                if info.offset + file._bytes(name, info) > len(data):
                    raise DamagedError(f"cut short before the end of tensor {name!r}")
        except OSError as error:
            raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
        except DamagedError as error:
            raise ModelError(f"{path}: {error}; download it again") from error
        return file

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as Python numbers, strings or lists; ``default`` if the key is absent."""
        return self._metadata.get(key, default)

    def need(self, key: str) -> Any:
        """Like ``get``, but raises ModelError if the key is absent."""
        if key not in self._metadata:
            raise ModelError(f"{self.path}: metadata {key!r} is missing; convert the model again")
        return self._metadata[key]

    def number(self, key: str, default: float | None = None) -> Any:
        """A metadata value that is an int or float; ``default`` if the key is absent. Raises ModelError for
        another type, and for an absent key without a default."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            found = "is missing" if value is None else f"isn't a number: {value!r:.40}"
            raise ModelError(f"{self.path}: metadata {key!r} {found}; convert the model again")
        return value

    def texts(self, key: str) -> list[str]:
        """A metadata value that is a list of strings. Raises ModelError for another type or an absent key."""
        value = self.need(key)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ModelError(f"{self.path}: metadata {key!r} isn't a list of texts; convert the model again")
        return value

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as a writable f32 array, dimensions outermost first ([out, in] for a matrix).

        Raises ModelError if it is missing or has a type that ``gguf`` can't dequantise.
        """
        kind, raw = self.blocks(name)
        try:
            values = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
        except NotImplementedError as error:
            raise ModelError(f"{self.path}: {name!r} is {kind}, unsupported; use another file") from error
        return np.require(values, np.float32, ["C", "W"]).reshape(self._tensors[name].shape[::-1])

    def blocks(self, name: str) -> tuple[str, np.ndarray]:
        """The tensor as the file stores it: (ggml's name of the type, read-only u8 array [..., bytes of a
        row], a view of the file). All dimensions but the innermost are the tensor's own. Raises ModelError if
        it is missing."""
        if name not in self._tensors:
            raise ModelError(f"{self.path}: tensor {name!r} is missing; convert or download the model again")
        info = self._tensors[name]
        outer = info.shape[:0:-1]  # ggml lists the innermost dimension first
        raw = np.frombuffer(self._data, np.uint8, self._bytes(name, info), info.offset)
        return gguf.GGMLQuantizationType(info.type_id).name, raw.reshape(*outer, -1)

    def _bytes(self, name: str, info: TensorInfo) -> int:
        """Size of the tensor's data. DamagedError for an unknown type or an impossible shape."""
        try:
            kind = gguf.GGMLQuantizationType(info.type_id)
        except ValueError as error:
            raise DamagedError(f"tensor {name!r} has the unknown type {info.type_id}") from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not info.shape or not all(info.shape) or info.shape[0] % block:
            raise DamagedError(f"tensor {name!r} of type {kind.name} can't have shape {list(info.shape)}")
        return math.prod(info.shape) // block * block_bytes
