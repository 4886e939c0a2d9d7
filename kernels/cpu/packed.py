"""Quantised weights in the order that the native dense kernels read them: the values are the file's own.

A GGUF block is 32 weights and a scale: d i (Q8_0), d i + m (Q4_1) or d (i - 8) (Q4_0). Kernels expand them
to the very bfloat16 values that dequantising the file gives, so that reading 0.31 (four bits) or 0.53 (eight)
of the bytes changes no result. Called by ``models.native_llama``. Must not know files.

A packed row, w = in / 32 blocks, blocks paired and the last pair filled up with zeros in four bits:

- four bits: for each pair (A, B) 32 bytes, byte i holding A[i] in its low and B[i] in its high half; behind
  all of them for each pair float16 dA, mA, dB, mB.
- eight bits: w times 32 int8; behind them w times float16 d.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32
"""Weights that share a scale."""


class Storage(IntEnum):
    """As in ``native/dense.h``; the names are ggml's of what it is made from."""

    FOUR_BITS = 1
    EIGHT_BITS = 2


class Packed(NamedTuple):
    storage: Storage
    rows: Tensor
    """u8 [out, bytes]."""

    def check(self, shape: tuple[int, int]) -> None:
        """ValueError unless it is a matrix of ``shape`` [out, in]."""
        out, inner = shape
        row_bytes = (
            -(-inner // (2 * BLOCK)) * 40 if self.storage is Storage.FOUR_BITS else inner // BLOCK * 34
        )
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


def pack(kind: str, blocks: Tensor) -> Packed | None:
    """``blocks`` u8 [out, bytes]: a matrix as a GGUF file holds it in ``kind``, one of ggml's names.

    None where the kernels have no use for it in that form."""
    if kind == "Q8_0":
        parts = blocks.view(len(blocks), -1, 34)
        return Packed(
            Storage.EIGHT_BITS, torch.cat((parts[..., 2:].flatten(1), parts[..., :2].flatten(1)), dim=1)
        )
    if kind == "Q4_1":
        parts = blocks.view(len(blocks), -1, 20)
        return _four_bits(parts[..., :4], parts[..., 4:])
    if kind == "Q4_0":
        parts = blocks.view(len(blocks), -1, 18)
        d = parts[..., :2].contiguous().view(torch.float16)
        return _four_bits(torch.cat((d, -8 * d), dim=-1).view(torch.uint8), parts[..., 2:])
    return None


def _four_bits(scales: Tensor, halves: Tensor) -> Packed:
    """scales u8 [out, w, 4]: float16 d, m; halves u8 [out, w, 16]: i of weights 0..15 low, 16..31 high."""
    out, blocks, _ = scales.shape
    if blocks % 2:
        scales = torch.cat((scales, scales.new_zeros(out, 1, 4)), dim=1)
        halves = torch.cat((halves, halves.new_zeros(out, 1, 16)), dim=1)
    values = torch.cat((halves & 15, halves >> 4), dim=-1)
    pairs = values[:, 0::2] | values[:, 1::2] << 4
    return Packed(Storage.FOUR_BITS, torch.cat((pairs.flatten(1), scales.flatten(1)), dim=1))
