"""Quantised weights of GGUF files, packed in the order in which the native dense kernels read them.

Called by ``models.native_llama``. Must not know files.

A GGUF block holds integers i of 32 weights and their scale; a weight is d i (Q8_0), d i + m (Q4_1) or
d (i - 8) (Q4_0). Kernels expand packed weights to exactly the bfloat16 values that dequantising the file
gives, so packing changes no result. It reads 0.31 (four bits) or 0.53 (eight bits) of the bytes of bfloat16.

A packed row of w = in / 32 blocks:

- Four bits: w is first rounded up to an even number with blocks of zeros. Every four blocks make 16 words of
  32 bits; nibbles 2k and 2k + 1 of word l are weights 2l and 2l + 1 of block k. Two remaining blocks make 16
  half words. The float16 pairs d, m of all blocks follow.
- Eight bits: every block makes 16 int8, its even weights, then 16 for its odd weights. The float16 d of all
  blocks follow.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from farshore.kernels.cpu.native_module import native as _native

BLOCK = 32
"""Weights that share a scale."""


class Storage(IntEnum):
    """How many bits a packed weight takes. The values are those of ``Storage`` in native/dense/dense.h."""

    FOUR_BITS = 1
    EIGHT_BITS = 2


_BLOCK_BYTES = {Storage.FOUR_BITS: 20, Storage.EIGHT_BITS: 34}


class Packed(NamedTuple):
    """A packed matrix."""

    storage: Storage
    rows: Tensor
    """u8[out, bytes of a packed row]"""

    def check(self, shape: tuple[int, int]) -> None:
        """Raises ValueError unless this is a matrix of ``shape`` [out, in]."""
        out, inner = shape
        row_bytes = _row_bytes(self.storage, inner // BLOCK)
        rows = self.rows
        if (
            rows.shape != (out, row_bytes)
            or inner % BLOCK
            or rows.dtype != torch.uint8
            or not rows.is_contiguous()
        ):
            raise ValueError(
                f"packed rows {tuple(rows.shape)} {rows.dtype} of {self.storage.name}:"
                f" expected u8 [{out}, {row_bytes}], contiguous"
            )


class Blocks(NamedTuple):
    """A matrix in blocks as in a GGUF file."""

    storage: Storage
    rows: Tensor
    """u8[out, blocks, bytes of a block]. Four bits: float16 d, m, then 16 bytes with the integers of weights
    0..15 in the low nibbles and of 16..31 in the high ones. Eight bits: float16 d, then 32 int8."""

    @classmethod
    def of(cls, kind: str, rows: Tensor) -> "Blocks | None":
        """From ``rows`` u8[out, bytes] of ggml's type ``kind``. Returns None for a type other than Q8_0, Q4_1
        and Q4_0."""
        if kind == "Q8_0":
            return cls(
                Storage.EIGHT_BITS, rows.view(len(rows), -1, _BLOCK_BYTES[Storage.EIGHT_BITS]).contiguous()
            )
        if kind == "Q4_1":
            return cls(
                Storage.FOUR_BITS, rows.view(len(rows), -1, _BLOCK_BYTES[Storage.FOUR_BITS]).contiguous()
            )
        if kind == "Q4_0":
            blocks = rows.view(len(rows), -1, 18)
            # d (i - 8) = d i + m with m = -8 d.
            d = blocks[..., :2].contiguous().view(torch.float16)
            scales = torch.cat((d, -8 * d), dim=-1).view(torch.uint8)
            return cls(Storage.FOUR_BITS, torch.cat((scales, blocks[..., 2:]), dim=-1))
        return None

    def unpack(self, dtype: torch.dtype, *, threads: int) -> Tensor:
        """The weights [out, in], dequantised and rounded once to ``dtype``, which is float32 or bfloat16."""
        out, blocks, _ = self.rows.shape
        values = torch.empty(out, blocks * BLOCK, dtype=dtype)
        _native.dense_unpack(self.storage, self.rows, values, threads)
        return values

    def pack(self, *, threads: int) -> Packed:
        """The same matrix in the order of the kernels."""
        out, blocks, _ = self.rows.shape
        rows = torch.empty(out, _row_bytes(self.storage, blocks), dtype=torch.uint8)
        _native.dense_pack(self.storage, self.rows, rows, threads)
        return Packed(self.storage, rows)


def _row_bytes(storage: Storage, blocks: int) -> int:
    return -(-blocks // 2) * 40 if storage is Storage.FOUR_BITS else blocks * 34
