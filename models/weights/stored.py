"""Tensors as model files store them; what the readers of both formats tell ``load`` and ``content``."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from farshore.models.files.identity import FileIdentity

Update = Callable[[memoryview | np.ndarray], None]
"""Takes a tensor's bytes, as the file stores them, piece by piece and in order."""


class StoredTensor(NamedTuple):
    """One tensor of a file."""

    path: Path
    name: str
    """Its name in the file."""
    dtype: str
    """The format's name of its type."""
    shape: tuple[int, ...]
    """Outermost dimension first."""
    offset: int
    """Bytes from the beginning of the file."""
    identity: FileIdentity
    """Of the file that is read, whatever ``path`` means by now."""

    def __str__(self) -> str:
        return f"{self.path}: {self.name!r}"


class Quantised(NamedTuple):
    """A matrix in a GGUF file's quantised form."""

    kind: str
    """ggml's name of the type."""
    rows: Tensor
    """u8 [out, bytes of a row], in Hugging Face's order."""
    stored: np.ndarray
    """The same bytes in the file's order: a view of the file."""


class Reader(Protocol):
    """A model's tensors under our names: ``embed``, ``norm``, ``head``, and by layer ``3.q``,
    ``3.q_bias``. Several threads may read different tensors at a time."""

    def has(self, name: str) -> bool: ...

    def find(self, name: str) -> StoredTensor:
        """Where a tensor lies. Raises ModelError if it is missing or has a type that is not read."""

    def read(self, name: str, dtype: torch.dtype, update: Update) -> Tensor:
        """A new tensor on the CPU, converted to ``dtype``; its memory is all that stays in use."""

    def blocks(self, name: str) -> Quantised | None:
        """A matrix in the file's quantised form; None if it has none."""

    def release(self, name: str) -> None:
        """Lets go of memory that was used to read ``name``. Views of the file stay valid."""

    def close(self) -> None: ...
