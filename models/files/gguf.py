"""A GGUF model, in one file or split into several, which are checked when it is opened. Errors name the file
and the fix.

Called by ``config``, ``rope`` and ``tokenizer`` (metadata) and by ``weights`` (tensors, dequantised by PyPI's
``gguf``). It must not import torch or know what the metadata mean.
"""

import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from farshore.errors import ModelError
from farshore.models.files.gguf_header import DamagedError, GgufHeader, TensorInfo, read_header
from farshore.models.files.identity import FileIdentity

DEQUANTISED = tuple(
    name
    for name in (
        *(
            "F32",
            "F16",
            "BF16",
            "Q4_0",
            "Q4_1",
            "Q5_0",
            "Q5_1",
            "Q8_0",
            "Q2_K",
            "Q3_K",
            "Q4_K",
            "Q5_K",
            "Q6_K",
        ),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
    )
    if name in gguf.GGMLQuantizationType.__members__
)
"""ggml's names of the types that ``gguf`` dequantises; older versions know fewer."""
_PIECE_ELEMENTS = 1 << 20
"""Dequantised at a time: ``gguf`` needs several times a piece's size for it."""
_PART_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<parts>\d{5})(?P<extension>\.gguf)", re.IGNORECASE)


class Part(NamedTuple):
    """One file of a model."""

    path: Path
    data: mmap.mmap | bytes
    header: GgufHeader
    identity: FileIdentity | None = None
    """None for data that are in no file."""


class GgufFile:
    """Metadata and tensors of a model, memory-mapped and read-only. Tensors are dequantised on request.

    ``path``: the first file, which has the metadata.
    """

    def __init__(
        self,
        path: Path,
        data: mmap.mmap | bytes,
        header: GgufHeader,
        identity: FileIdentity | None = None,
        *others: Part,
    ) -> None:
        """The first four: those of a :class:`Part`. ``others``: the second and further parts of a split
        model. Raises ModelError if two parts have a tensor of the same name."""
        self.path = path
        self._metadata = header.metadata
        self._tensors: dict[str, tuple[Part, TensorInfo]] = {}
        for part in (Part(path, data, header, identity), *others):
            for name, info in part.header.tensors.items():
                if name in self._tensors:
                    raise ModelError(
                        f"{part.path}: has tensor {name!r}, and so has {self._tensors[name][0].path.name}; "
                        "download all parts again"
                    )
                self._tensors[name] = part, info
        self.tensor_names = frozenset(self._tensors)

    @classmethod
    def open(cls, path: str | Path) -> "GgufFile":
        """Opens a file and, if it is a part of a split model, all other parts beside it. Raises ModelError if
        one can't be read, isn't GGUF, is damaged or truncated, or is missing."""
        part = _opened(Path(path))
        count = part.header.metadata.get("split.count", 1)
        if count == 1:
            return cls(*part)
        first, *others = _parts(part, count)
        file = cls(*first, *others)
        expected = first.header.metadata.get("split.tensors.count", len(file.tensor_names))
        if expected != len(file.tensor_names):
            raise ModelError(
                f"{first.path}: the parts have {len(file.tensor_names)} tensors, not {expected!r}; "
                "download all parts again"
            )
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

    def find(self, name: str) -> tuple[Part, TensorInfo]:
        """The part that has the tensor, and where. Raises ModelError if it is missing or has a type that
        ``gguf`` can't dequantise."""
        if name not in self._tensors:
            raise ModelError(f"{self.path}: tensor {name!r} is missing; convert or download the model again")
        part, info = self._tensors[name]
        kind = gguf.GGMLQuantizationType(info.type_id).name
        if kind not in DEQUANTISED:
            raise ModelError(
                f"{part.path}: {name!r} is {kind}, which is unsupported; use a file of another quantisation; "
                f"supported: {', '.join(DEQUANTISED)}"
            )
        return part, info

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as a writable f32 array, dimensions outermost first ([out, in] for a matrix). Raises
        ModelError like :meth:`find`."""
        _, info = self.find(name)
        values = np.empty(math.prod(info.shape), np.float32)
        done = 0
        for _, piece in self.pieces(name):
            values[done : done + piece.size] = piece
            done += piece.size
        return values.reshape(info.shape[::-1])

    def pieces(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The tensor in consecutive pieces: (u8 as the file stores it, f32), both flat, of whole rows.
        The next one releases the pages of the last. Raises ModelError like :meth:`find`."""
        _, info = self.find(name)
        kind = gguf.GGMLQuantizationType(info.type_id)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw = self._raw(name).reshape(-1, block_bytes)
        row = info.shape[0] // block
        step = max(1, _PIECE_ELEMENTS // (row * block)) * row
        for first in range(0, len(raw), step):
            stored = raw[first : first + step]
            # In rows: ``gguf`` works on sixteen of them at a time.
            values = gguf.dequantize(stored.reshape(-1, row * block_bytes), kind)
            yield stored.reshape(-1), np.require(values, np.float32).reshape(-1)
            self._release(name, first * block_bytes, stored.size)

    def blocks(self, name: str) -> tuple[str, np.ndarray]:
        """The tensor as the file stores it: (ggml's name of the type, read-only u8 array [..., bytes of a
        row], a view of the file). All dimensions but the innermost are the tensor's own. Raises ModelError
        like :meth:`find`."""
        _, info = self.find(name)
        outer = info.shape[:0:-1]  # ggml lists the innermost dimension first
        return gguf.GGMLQuantizationType(info.type_id).name, self._raw(name).reshape(*outer, -1)

    def release(self, name: str) -> None:
        """Lets the system take back the memory of the tensor's pages; a later use reads the file again."""
        self._release(name, 0, stored_bytes(name, self._tensors[name][1]))

    def _release(self, name: str, first: int, length: int) -> None:
        """Releases the pages that lie within these bytes of the tensor."""
        part, info = self._tensors[name]
        begin = -(-(info.offset + first) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (info.offset + first + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if isinstance(part.data, mmap.mmap) and begin < end:
            part.data.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _raw(self, name: str) -> np.ndarray:
        part, info = self._tensors[name]
        return np.frombuffer(part.data, np.uint8, stored_bytes(name, info), info.offset)


def stored_bytes(name: str, info: TensorInfo) -> int:
    """Size of the tensor's data. DamagedError for an unknown type or an impossible shape."""
    try:
        kind = gguf.GGMLQuantizationType(info.type_id)
    except ValueError as error:
        raise DamagedError(
            f"tensor {name!r} has the unknown type {info.type_id}",
            fix=f"use a file of another quantisation; supported: {', '.join(DEQUANTISED)}",
        ) from error
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if not info.shape or not all(info.shape) or info.shape[0] % block:
        raise DamagedError(f"tensor {name!r} of type {kind.name} can't have shape {list(info.shape)}")
    return math.prod(info.shape) // block * block_bytes


def _opened(path: Path) -> Part:
    try:
        with path.open("rb") as stream:
            identity = FileIdentity.of(stream.fileno())
            empty = not stream.seek(0, 2)
            data = b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        header = read_header(data)
        for name, info in header.tensors.items():
            if info.offset + stored_bytes(name, info) > len(data):
                raise DamagedError(f"cut short before the end of tensor {name!r}")
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    except DamagedError as error:
        raise ModelError(f"{path}: {error}; {error.fix}") from error
    return Part(path, data, header, identity)


def _parts(given: Part, count: Any) -> list[Part]:
    """All parts of a split model, in order. ``given``: any of them."""
    name = _PART_NAME.fullmatch(given.path.name)
    if name is None or type(count) is not int or int(name["parts"]) != count:
        raise ModelError(
            f"{given.path}: is one of {count!r:.40} parts of a model, and its name must end like "
            "-00001-of-00002.gguf; rename the parts, or join them with llama-gguf-split --merge"
        )
    parts = []
    for number in range(count):
        path = given.path.with_name(f"{name['stem']}-{number + 1:05}-of-{name['parts']}{name['extension']}")
        if not path.exists():
            raise ModelError(f"{path}: is missing beside {given.path.name}; download all {count} parts")
        part = given if path == given.path else _opened(path)
        metadata = part.header.metadata
        if (metadata.get("split.no"), metadata.get("split.count")) != (number, count):
            raise ModelError(
                f"{path}: says that it is part {metadata.get('split.no')!r:.40} (from 0) of "
                f"{metadata.get('split.count')!r:.40}; download all {count} parts again"
            )
        parts.append(part)
    return parts
