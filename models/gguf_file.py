"""A GGUF file, checked when opened, with errors a user can act on.

Called by ``config``, ``rope``, ``tokenizer`` (metadata) and ``weights`` (tensors, dequantised by PyPI's
``gguf``). NumPy only, no torch; must not know what the metadata mean.
"""

import math
import mmap
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from farshore.errors import ModelError
from farshore.models.gguf_header import DamagedError, Header, TensorPlace, read_header


class GgufFile:
    """Metadata and tensors of one file. Memory-mapped, read-only; tensors are dequantised on request."""

    def __init__(self, path: Path, data: mmap.mmap | bytes, header: Header) -> None:
        self.path = path
        self._data = data
        self._metadata = header.metadata
        self._tensors = header.tensors
        self.tensor_names = frozenset(header.tensors)

    @classmethod
    def open(cls, path: str | Path) -> "GgufFile":
        """Raises ModelError if the file can't be read, isn't GGUF, or is damaged or cut short."""
        path = Path(path)
        try:
            with path.open("rb") as stream:
                empty = not stream.seek(0, 2)
                data = b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            file = cls(path, data, read_header(data))
            for name, place in file._tensors.items():
                if place.offset + file._bytes(name, place) > len(data):
                    raise DamagedError(f"cut short before the end of tensor {name!r}")
        except OSError as error:
            raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
        except DamagedError as error:
            raise ModelError(f"{path}: {error}; download it again") from error
        return file

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as Python numbers, strings or lists; ``default`` where there is none."""
        return self._metadata.get(key, default)

    def need(self, key: str) -> Any:
        """As ``get``; raises ModelError where there is none."""
        if key not in self._metadata:
            raise ModelError(f"{self.path}: metadata {key!r} is missing; convert the model again")
        return self._metadata[key]

    def number(self, key: str, default: float | None = None) -> Any:
        """An int or float; ``default`` where there is none. Raises ModelError for neither."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            found = "is missing" if value is None else f"isn't a number: {value!r:.40}"
            raise ModelError(f"{self.path}: metadata {key!r} {found}; convert the model again")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings. Raises ModelError for anything else."""
        value = self.need(key)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ModelError(f"{self.path}: metadata {key!r} isn't a list of texts; convert the model again")
        return value

    def tensor(self, name: str) -> np.ndarray:
        """f32 array, writable, dimensions outermost first ([out, in] for a matrix).

        Raises ModelError if it is missing, or of a type ``gguf`` can't dequantise.
        """
        kind, raw = self.blocks(name)
        try:
            values = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
        except NotImplementedError as error:
            raise ModelError(f"{self.path}: {name!r} is {kind}, unsupported; use another file") from error
        return np.require(values, np.float32, ["C", "W"]).reshape(self._tensors[name].shape[::-1])

    def blocks(self, name: str) -> tuple[str, np.ndarray]:
        """(ggml's name of the type, u8 array [..., bytes] in the file itself, read-only); the dimensions but
        the innermost are the tensor's. Raises ModelError if it is missing."""
        if name not in self._tensors:
            raise ModelError(f"{self.path}: tensor {name!r} is missing; convert or download the model again")
        place = self._tensors[name]
        outer = place.shape[:0:-1]  # ggml counts from the innermost
        raw = np.frombuffer(self._data, np.uint8, self._bytes(name, place), place.offset)
        return gguf.GGMLQuantizationType(place.type_id).name, raw.reshape(*outer, -1)

    def _bytes(self, name: str, place: TensorPlace) -> int:
        try:
            kind = gguf.GGMLQuantizationType(place.type_id)
        except ValueError as error:
            raise DamagedError(f"tensor {name!r} has the unknown type {place.type_id}") from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not place.shape or not all(place.shape) or place.shape[0] % block:
            raise DamagedError(f"tensor {name!r} of type {kind.name} can't have shape {list(place.shape)}")
        return math.prod(place.shape) // block * block_bytes
