"""The formats of stored KV: how one row (one token, one head, K or V) looks in memory, plain or quantised.

Every kernel reads these bytes; the store and the wire move them. This module must not know blocks, heads or
sequences.

A quantised row is a payload of whole bytes and one bfloat16 scale for each group of ``SCALE_ELEMENTS``
elements; element = q * scale, symmetric around 0. Scales are bfloat16 because widening it to float32 is a
shift on every machine, and because it has float32's range, so that no scale overflows.

**int8**: q in -127..127, as signed bytes.
**int4**: q in -7..7, as nibbles q + 8. A group of w elements takes h = ceil(w / 2) bytes: byte i holds
element i in its low nibble and element h + i in its high nibble, so that SIMD code unpacks a whole group with
one AND and one shift, without a shuffle. The last high nibble of an odd group holds no element and is 8.

**The scale** is max|x| / 127 (or 7) rounded to the nearest bfloat16, and q is x divided by that rounded
scale. Rounding to nearest leaves the scale off by less than 1 part in 256, so max|x| / scale lies in
126.5..127.5 and the largest |q| is always 127. No element is clamped or off by more than half a scale, and
quantising dequantised rows gives the same bytes. (With rounding up, the largest q is sometimes 126, and the
next pass would choose a smaller scale.) The scale is never below 2^-126, the smallest normal number: zeros
need no special case, and the result does not depend on whether a machine flushes denormals.
"""

from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import pad

SCALE_ELEMENTS = 64
"""Elements of a quantised row that share a scale. A row's last group may be shorter."""

MIN_SCALE = 2.0**-126


class KVFormat(Enum):
    """The format of stored K and V. Only the reference kernels and their tests use FLOAT64."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"
    INT8 = "int8"
    INT4 = "int4"

    @classmethod
    def of(cls, dtype: torch.dtype) -> "KVFormat":
        """The unquantised format whose elements are of ``dtype``. Raises ValueError if there is none."""
        for format in cls:
            if not format.quantised and format.dtype == dtype:
                return format
        raise ValueError(f"no KV format stores {dtype}")

    @property
    def quantised(self) -> bool:
        return self in (KVFormat.INT8, KVFormat.INT4)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the elements; uint8, the payload's, if quantised."""
        return torch.uint8 if self.quantised else getattr(torch, self.value)

    def row_bytes(self, dim: int) -> int:
        """Bytes of the payload of one row of ``dim`` elements."""
        return -(-dim // 2) if self is KVFormat.INT4 else dim * self.dtype.itemsize

    def scales(self, dim: int) -> int:
        """Scales of one row of ``dim`` elements; 0 unless quantised."""
        return -(-dim // SCALE_ELEMENTS) if self.quantised else 0


CODES = {
    KVFormat.FLOAT32: 0,
    KVFormat.BFLOAT16: 1,
    KVFormat.FLOAT16: 2,
    KVFormat.INT8: 3,
    KVFormat.INT4: 4,
    KVFormat.FLOAT64: 5,
}
"""The number of each format in calls of the native modules. The C++ enums of formats have the same numbers:
``kernels/cpu/native/attention/plan.h`` (without float64) and ``kvstore/native/rows.h``."""

DTYPE_CODES = {format.dtype: code for format, code in CODES.items() if not format.quantised}
"""The same numbers by element dtype, for tensors that are not quantised."""

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of q, of outputs and of unquantised KV that the native kernels support."""


def quantise(x: Tensor, format: KVFormat) -> tuple[Tensor, Tensor]:
    """Converts rows ``x [..., dim]`` of any float dtype into (payload ``u8[..., row_bytes]``, scales
    ``bf16[..., scales]``).

    A quantised format rounds x to float32 first. A group that contains a NaN or an infinity gets a NaN scale,
    so that all its elements read as NaN; an exception would fail a whole batch for one sequence, and would
    have to wait for a GPU. An unquantised format casts: there are no scales, and the payload may share
    memory with x.
    """
    if not format.quantised:
        payload = x.to(format.dtype).contiguous().view(torch.uint8)
        return payload, x.new_empty((*x.shape[:-1], 0), dtype=torch.bfloat16)
    dim, largest = x.shape[-1], 127 if format is KVFormat.INT8 else 7
    groups = pad(x.float(), (0, -dim % SCALE_ELEMENTS)).unflatten(-1, (-1, SCALE_ELEMENTS))
    magnitudes = groups.abs().amax(dim=-1)
    # By a tensor: on a GPU PyTorch multiplies by the reciprocal of a number, which rounds otherwise.
    scales = (magnitudes / magnitudes.new_full((), largest)).clamp(min=MIN_SCALE).bfloat16()
    # Not `where` by a number: it copies the number to a GPU and waits, which no graph may contain.
    scales = scales.masked_fill_(~magnitudes.isfinite(), torch.nan)
    # A NaN scale makes q NaN, which no integer represents: 0 is stored.
    q = (groups / scales.float()[..., None]).round().nan_to_num(nan=0.0).to(torch.int8)
    q = q.flatten(-2)[..., :dim]
    payload = q.contiguous().view(torch.uint8) if format is KVFormat.INT8 else _pack(q)
    return payload, scales


def dequantise(payload: Tensor, scales: Tensor, format: KVFormat, dim: int, *, dtype: torch.dtype) -> Tensor:
    """The elements ``dtype[..., dim]`` of rows that :func:`quantise` made; payload and scales may be strided.

    Exact in float32 and float64 (q * scale has 15 bits), except that a value beyond the range of float32 or
    ``dtype`` becomes the largest finite one: rounding must not turn the greatest float32 into an infinity.
    An unquantised format casts, without a copy if ``dtype`` is its own.
    """
    if not format.quantised:
        return payload.view(format.dtype).to(dtype)
    q = payload.view(torch.int8) if format is KVFormat.INT8 else _unpack(payload, dim)
    wide = scales.float().repeat_interleave(SCALE_ELEMENTS, dim=-1)[..., :dim]
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return (q * wide).clamp(-limit, limit).to(dtype)


def _group_runs(dim: int) -> list[tuple[int, int]]:
    """(elements, bytes of a group) of the row's full groups and of its shorter last group, if it has them."""
    last = dim % SCALE_ELEMENTS
    return [(n, half) for n, half in ((dim - last, SCALE_ELEMENTS // 2), (last, -(-last // 2))) if n]


def _pack(q: Tensor) -> Tensor:
    """Packs q ``i8[..., dim]`` in -7..7 into int4 payload ``u8[..., ceil(dim / 2)]``."""
    pieces, start = [], 0
    for n, half in _group_runs(q.shape[-1]):
        nibbles = pad(q[..., start : start + n], (0, n % 2)) + 8
        nibbles = nibbles.view(torch.uint8).unflatten(-1, (-1, 2, half))
        pieces.append((nibbles[..., 0, :] | nibbles[..., 1, :] << 4).flatten(-2))
        start += n
    return torch.cat(pieces, dim=-1)


def _unpack(payload: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`_pack`."""
    pieces, start = [], 0
    for n, half in _group_runs(dim):
        data = payload[..., start : start + (n + 1) // 2].unflatten(-1, (-1, half))
        nibbles = torch.stack((data & 15, data >> 4), dim=-2).view(torch.int8) - 8
        pieces.append(nibbles.flatten(-3)[..., :n])
        start += (n + 1) // 2
    return torch.cat(pieces, dim=-1)
