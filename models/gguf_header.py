"""The front of a GGUF file: its metadata and where its tensors lie.

PyPI's ``gguf`` has a reader too, but it takes two seconds for a vocabulary of 50,000 and lets a damaged file
surface as whatever NumPy trips over. Ours takes a tenth of that, and trusts no length before it has checked
it against the file's end. Called by ``gguf_file`` alone. Must not know what metadata mean or how tensors are
encoded. Format: little-endian; magic, version, counts, key-value pairs, tensor descriptions, aligned data.
"""

import struct
from dataclasses import dataclass
from mmap import mmap
from typing import Any

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4


class DamagedError(ValueError):
    """The header contradicts itself or the file's size. The text says how, without the file's name."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """``shape``: innermost dimension first, as ggml counts. ``offset``: in bytes from the file's start."""

    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]


def read_header(data: mmap | bytes) -> Header:
    """Raises DamagedError. Reads only the front of ``data``; time and memory are bounded by its length."""
    if bytes(data[:4]) != b"GGUF":
        raise DamagedError("not a GGUF file (it doesn't begin with 'GGUF')")
    cursor = _Cursor(data, 4)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise DamagedError(f"GGUF version {version} is unsupported (supported: 2 and 3, little-endian)")
    tensor_count, pair_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    places: dict[str, TensorPlace] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = cursor.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise DamagedError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        type_id = cursor.number("I")
        places[name] = TensorPlace(shape, type_id, cursor.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise DamagedError(f"alignment {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    tensors = {
        name: TensorPlace(place.shape, place.type_id, start + place.offset) for name, place in places.items()
    }
    return Header(metadata, tensors)


class _Cursor:
    """Reads forward; every read first checks that it ends inside the data."""

    def __init__(self, data: mmap | bytes, offset: int) -> None:
        self._data = data
        self._size = len(data)
        self.offset = offset

    def number(self, code: str) -> Any:
        return self._unpack("<" + code)[0]

    def string(self) -> str:
        length = self.number("Q")
        end = self._claim(length)
        try:
            return self._data[end - length : end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedError(f"a text at byte {end - length} isn't UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise DamagedError(f"a value of unknown type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item == _STRING:
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            raise DamagedError(f"a list of unknown type {item}")
        width = struct.calcsize("<" + _SCALARS[item])
        if count * width > self._size - self.offset:
            raise DamagedError("cut short")
        return list(self._unpack(f"<{count}{_SCALARS[item]}"))

    def _unpack(self, form: str) -> tuple[Any, ...]:
        length = struct.calcsize(form)
        return struct.unpack_from(form, self._data, self._claim(length) - length)

    def _claim(self, length: int) -> int:
        """Moves past ``length`` bytes; returns where they end."""
        if length > self._size - self.offset:
            raise DamagedError("cut short")
        self.offset += length
        return self.offset
