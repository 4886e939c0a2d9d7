"""Quantised weights in the order that the native dense kernels read them: the values are the file's own.

A GGUF block is 32 weights and a scale: d i (Q8_0), d i + m (Q4_1) or d (i - 8) (Q4_0). Kernels expand them
to the very bfloat16 values that dequantising the file gives, so that reading 0.31 (four bits) or 0.53 (eight)
of the bytes changes no result. Called by ``models.native_llama``. Must not know files.

A packed row, w = in / 32 blocks, in four bits filled up with zeros to an even number:

- four bits: of each four blocks 16 words; nibbles 2k and 2k + 1 of word l are weights 2l and 2l + 1 of block
  k. Two blocks that are left make 16 half words. Behind them for each block float16 d, m.
- eight bits: of each block 16 int8, the even weights, then the 16 odd ones; behind them w times float16 d.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from farshore.kernels.cpu import _native

BLOCK = 32
"""Weights that share a scale."""


class Storage(IntEnum):
    """As in ``native/dense.h``."""

    FOUR_BITS = 1
    EIGHT_BITS = 2


_BYTES = {Storage.FOUR_BITS: 20, Storage.EIGHT_BITS: 34}
"""Of a block."""


class Packed(NamedTuple):
    storage: Storage
    rows: Tensor
    """u8 [out, bytes]."""

    def check(self, shape: tuple[int, int]) -> None:
        """ValueError unless it is a matrix of ``shape`` [out, in]."""
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
    """A matrix as a GGUF file quantises it."""

    storage: Storage
    rows: Tensor
    """u8 [out, blocks, bytes]: float16 d, m and 16 bytes, i of weights 0..15 low and 16..31 high; or float16
    d and 32 int8."""

    @classmethod
    def of(cls, kind: str, rows: Tensor) -> "Blocks | None":
        """``rows`` u8 [out, bytes] of ``kind``, one of ggml's names; None for one that is not known here."""
        if kind == "Q8_0":
            return cls(Storage.EIGHT_BITS, rows.view(len(rows), -1, _BYTES[Storage.EIGHT_BITS]).contiguous())
        if kind == "Q4_1":
            return cls(Storage.FOUR_BITS, rows.view(len(rows), -1, _BYTES[Storage.FOUR_BITS]).contiguous())
        if kind == "Q4_0":
            parts = rows.view(len(rows), -1, 18)
            d = parts[..., :2].contiguous().view(torch.float16)
            scales = torch.cat((d, -8 * d), dim=-1).view(torch.uint8)
            return cls(Storage.FOUR_BITS, torch.cat((scales, parts[..., 2:]), dim=-1))
        return None

    def unpack(self, dtype: torch.dtype, *, threads: int) -> Tensor:
        """[out, in] in float32 or bfloat16, as dequantising the file gives it, rounded once."""
        out, blocks, _ = self.rows.shape
        values = torch.empty(out, blocks * BLOCK, dtype=dtype)
        _native.dense_unpack(self.storage, self.rows, values, threads)
        return values

    def pack(self, *, threads: int) -> Packed:
        out, blocks, _ = self.rows.shape
        rows = torch.empty(out, _row_bytes(self.storage, blocks), dtype=torch.uint8)
        _native.dense_pack(self.storage, self.rows, rows, threads)
        return Packed(self.storage, rows)


def _row_bytes(storage: Storage, blocks: int) -> int:
    return -(-blocks // 2) * 40 if storage is Storage.FOUR_BITS else blocks * 34
