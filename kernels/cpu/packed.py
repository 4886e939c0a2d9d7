"""Quantised weights of GGUF files, packed in the order in which the native dense kernels read them.

Called by ``models.native_llama`` and ``kernels.cpu.dense``. Must not know files.

A block of a GGUF file holds integers i of 32 or 256 weights and their scales. A weight is

- Q8_0: d i,
- Q4_1: d i + m, and Q4_0: d (i - 8), which is packed as Q4_1,
- Q4_K: d s i - m t, with s and t of each 32 weights, d and m of each 256,
- Q6_K: d s (i - 32), with s of each 16 weights, d of each 256.

Kernels expand packed weights to exactly the bfloat16 values that dequantising the file in float32 and
rounding once gives (for finite values up to 2^110), so packing changes no result. The bytes of bfloat16
that are read: 0.53 (Q8_0), 0.31 (Q4_1, Q4_0), 0.29 (Q4_K), 0.41 (Q6_K).

A packed matrix has its rows in eights; the last ones are padded with rows of zeros. Eight rows are a
sequence of chunks: of some blocks the integers of each of the eight rows, then the scales of each.

- Q4: the number of blocks in a row is first rounded up to an even number with blocks of zeros. A chunk has
  four blocks; 16 words of 32 bits hold their integers: nibbles 2k and 2k + 1 of word l are weights 2l and
  2l + 1 of block k. Two remaining blocks make a chunk of 16 half words. The scales are float16 pairs d, m.
- Q8: a chunk has four blocks, or one at the end; a block is 16 int8, its even weights, then 16 for its odd
  weights. The scales are float16 d.
- Q4_K: a chunk has one block; its 32 words are those of eight Q4 blocks. The scales are eight pairs s, t
  (u8), then float16 d and -m.
- Q6_K: a chunk has one block in 3 x 16 words. Bits 6k .. 6k + 5 of word l of the j-th 16 words, k < 5, are
  the integer of weight 16 (5j + k) + l; bits 30 and 31 of the three words are bits 0 and 1, 2 and 3, 4 and
  5 of the integer of weight 240 + l. The scales are 16 int8 s, then float16 d.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from farshore.kernels.cpu.native_module import native as _native
from farshore.kernels.host import HOST

UNPACKED_BYTES = 8 << 20
"""Of a matrix that PyTorch multiplies, so much is unpacked at a time: it stays in the CPU's caches."""


class Storage(IntEnum):
    """How packed weights are stored. The values are those of ``Storage`` in native/dense/dense.h."""

    Q4 = 1
    Q8 = 2
    Q4_K = 3
    Q6_K = 4

    @property
    def block(self) -> tuple[int, int]:
        """(weights, bytes) of a GGUF block."""
        return _BLOCKS[self]

    def packed_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a packed matrix [out, in]."""
        out, inner = shape
        blocks = inner // self.block[0]
        row_bytes = -(-blocks // 2) * 40 if self is Storage.Q4 else blocks * _PACKED_BLOCK_BYTES[self]
        return -(-out // ROWS_TOGETHER) * ROWS_TOGETHER * row_bytes


_BLOCKS = {Storage.Q4: (32, 20), Storage.Q8: (32, 34), Storage.Q4_K: (256, 144), Storage.Q6_K: (256, 210)}
_PACKED_BLOCK_BYTES = {Storage.Q8: 34, Storage.Q4_K: 148, Storage.Q6_K: 210}
ROWS_TOGETHER = 8


class Packed(NamedTuple):
    """A packed matrix, which stands for values in bfloat16 on the CPU. Immutable."""

    storage: Storage
    shape: tuple[int, int]
    """(out, in)"""
    rows: Tensor
    """u8[bytes]"""

    def check(self, shape: tuple[int, int]) -> None:
        """Raises ValueError unless this is a matrix of ``shape`` [out, in]."""
        size, rows = self.storage.packed_bytes(shape), self.rows
        if (
            rows.shape != (size,)
            or self.shape != tuple(shape)
            or shape[1] % self.storage.block[0]
            or rows.dtype != torch.uint8
            or not rows.is_cpu
            or not rows.is_contiguous()
        ):
            raise ValueError(
                f"packed rows {tuple(rows.shape)} {rows.dtype} of {self.storage.name} for {list(self.shape)}:"
                f" expected u8 [{size}] for {list(shape)}, contiguous"
            )

    def gather(self, ids: Tensor) -> Tensor:
        """The rows with numbers ``ids`` i64[R], contiguous: bf16[R, in]. Raises IndexError for an id that is
        not in 0 .. out."""
        values = torch.empty(len(ids), self.shape[1], dtype=torch.bfloat16, device=HOST)
        self._unpack(ids, values)
        return values

    def dense(self) -> Tensor:
        """The values, bf16[out, in]."""
        return self.gather(torch.arange(self.shape[0], device=HOST))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x bf16[R, in] → x W^T + bias, [R, out], by PyTorch."""
        out, inner = self.shape
        step = min(out, max(1, UNPACKED_BYTES // (2 * inner)))
        values = torch.empty(step, inner, dtype=torch.bfloat16, device=HOST)
        numbers = torch.arange(out, device=HOST)
        result = x.new_empty(len(x), out)
        for first in range(0, out, step):
            part = slice(first, min(out, first + step))
            weight = values[: part.stop - first]
            self._unpack(numbers[part], weight)
            result[:, part] = linear(x, weight, None if bias is None else bias[part])
        return result

    def _unpack(self, ids: Tensor, values: Tensor) -> None:
        _native.dense_gather_packed(
            self.storage, *self.shape, self.rows, ids, values, torch.get_num_threads()
        )


class Blocks(NamedTuple):
    """A matrix in blocks as in a GGUF file."""

    storage: Storage
    rows: Tensor
    """u8[out, blocks, bytes of a block]: GGUF's blocks of Q4_1, Q8_0, Q4_K or Q6_K; native/dense/gguf.h gives
    their layouts."""

    @classmethod
    def of(cls, kind: str, rows: Tensor) -> "Blocks | None":
        """From ``rows`` u8[out, bytes] of ggml's type ``kind``. Returns None for a type that cannot be
        packed."""
        if kind == "Q4_0":
            blocks = rows.view(len(rows), -1, 18)
            # d (i - 8) = d i + m with m = -8 d.
            d = blocks[..., :2].contiguous().view(torch.float16)
            m = -8 * d
            if not m.isfinite().all():
                return None
            scales = torch.cat((d, m), dim=-1).view(torch.uint8)
            return cls(Storage.Q4, torch.cat((scales, blocks[..., 2:]), dim=-1))
        storage = _KINDS.get(kind)
        if storage is None:
            return None
        return cls(storage, rows.view(len(rows), -1, storage.block[1]).contiguous())

    @property
    def inner(self) -> int:
        """Weights of a row."""
        return self.rows.shape[1] * self.storage.block[0]

    def dequantise(self, *, threads: int) -> Tensor:
        """The weights, f32[out, in]."""
        values = torch.empty(len(self.rows), self.inner, device=HOST)
        _native.dense_dequantise(self.storage, self.rows, values, threads)
        return values

    def pack(self, *, threads: int) -> Packed:
        """The same matrix in the order of the kernels."""
        shape = (len(self.rows), self.inner)
        rows = torch.empty(self.storage.packed_bytes(shape), dtype=torch.uint8, device=HOST)
        _native.dense_pack(self.storage, self.rows, rows, threads)
        return Packed(self.storage, shape, rows)


_KINDS = {"Q4_1": Storage.Q4, "Q8_0": Storage.Q8, "Q4_K": Storage.Q4_K, "Q6_K": Storage.Q6_K}
