"""Reads tensors from a GGUF file, in Hugging Face's order of rows.

Called by ``load``. It must not know how tensors are used.
"""

import numpy as np
import torch
from torch import Tensor

from farshore.models.config.model import ModelConfig
from farshore.models.files.gguf import GgufFile
from farshore.models.weights.names import gguf_name

Quantised = tuple[str, str, Tensor]
"""(file and tensor name, for messages; ggml's name of the type; u8 [out, bytes of a row])."""


class GgufReader:
    """A GGUF file. Tensors are dequantised to float32; rows of Q and K are put into Hugging Face's order."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._heads = {"q": config.q_heads, "k": config.kv_heads}

    def read(self, name: str) -> tuple[str, Tensor]:
        full = gguf_name(name)
        return f"{self._file.path}: {full!r}", torch.from_numpy(self._in_order(name, self._file.tensor(full)))

    def blocks(self, name: str) -> Quantised | None:
        full = gguf_name(name)
        kind, rows = self._file.blocks(full)
        if rows.ndim != 2:
            return None
        # A copy, because PyTorch warns about read-only memory.
        return f"{self._file.path}: {full!r}", kind, torch.from_numpy(self._in_order(name, rows).copy())

    def _in_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        field = name.rpartition(".")[2].removesuffix("_bias")
        if field in self._heads and rows.shape[0] % (2 * self._heads[field]) == 0:
            return _halves(rows, self._heads[field])
        return rows


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of Q or K: ggml's llama rotates adjacent rows of a head as a pair, and we rotate rows
    i and i + head_dim/2."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
