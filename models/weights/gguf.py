"""Reads tensors from a GGUF file, in Hugging Face's order of rows.

Called by ``load``. It must not know how tensors are used.
"""

from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from farshore.errors import ModelError
from farshore.models.config.model import ModelConfig
from farshore.models.files.gguf import GgufFile
from farshore.models.weights.names import expected_shapes, gguf_name
from farshore.models.weights.stored import Quantised, StoredTensor, Update

_UNQUANTISED = ("F32", "F16", "BF16")
_ROTARY = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
"""Tensors that the configuration is read from."""


class GgufReader:
    """A GGUF file. Tensors are dequantised; rows of Q and K are put into Hugging Face's order."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        """Raises ModelError for a file with tensors that the model does not use, as llama.cpp does: an
        adapter's, or scales, for example, would change the result."""
        self._file = file
        self._heads = {"q": config.q_heads, "k": config.kv_heads}
        used = {gguf_name(name) for name in expected_shapes(config)} | _ROTARY
        if unused := sorted(file.tensor_names - used):
            raise ModelError(
                f"{file.path}: tensor {unused[0]!r:.120} is of no Llama decoder with this configuration "
                f"({len(unused)} such tensors); use another file of the model"
            )

    def has(self, name: str) -> bool:
        return gguf_name(name) in self._file.tensor_names

    def find(self, name: str) -> StoredTensor:
        full = gguf_name(name)
        part, info = self._file.find(full)
        kind = gguf.GGMLQuantizationType(info.type_id).name
        return StoredTensor(part.path, full, kind, info.shape[::-1], info.offset, part.identity)

    def read(self, name: str, dtype: torch.dtype, update: Update) -> Tensor:
        result = torch.empty(self.find(name).shape, dtype=dtype, device="cpu")
        flat, done = result.view(-1), 0
        for stored, values in self._file.pieces(gguf_name(name)):
            update(stored)
            # The piece may be a view of the file, which PyTorch warns about: it takes no read-only memory.
            piece = torch.from_numpy(values if values.flags.writeable else values.copy())
            flat[done : done + len(piece)].copy_(piece)
            done += len(piece)
        heads = self._paired(name, len(result))
        return result if heads is None else _halves(result, heads).reshape(result.shape)

    def blocks(self, name: str) -> Quantised | None:
        kind, stored = self._file.blocks(gguf_name(name))
        if stored.ndim != 2 or kind in _UNQUANTISED:
            return None
        heads = self._paired(name, len(stored))
        rows = stored if heads is None else _halves(stored, heads).reshape(stored.shape)
        # A copy, because PyTorch warns about read-only memory.
        return Quantised(kind, torch.from_numpy(np.array(rows)), stored.reshape(-1))

    def release(self, name: str) -> None:
        self._file.release(gguf_name(name))

    def close(self) -> None:
        """The mappings end with the last view of them."""

    def _paired(self, name: str, rows: int) -> int | None:
        """The number of heads of Q or K, whose rows are stored in another order; None for other tensors."""
        heads = self._heads.get(name.rpartition(".")[2].removesuffix("_bias"))
        return heads if heads is not None and rows % (2 * heads) == 0 else None


def _halves(rows: Any, heads: int) -> Any:
    """Reorders the rows of Q or K, a tensor or an array, to [heads, 2, head_dim/2, ...]: ggml's llama rotates
    adjacent rows of a head as a pair, and we rotate rows i and i + head_dim/2."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2)
