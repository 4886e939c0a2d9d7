"""How a row of stored K or V (one token, one head) looks in memory, plain or quantised.

A quantised row is a payload of whole bytes and one bfloat16 scale for each group of ``SCALE_ELEMENTS``
elements; element = q * scale, symmetric around 0. bfloat16 because widening it to float32 is a shift on every
machine and because it has float32's range: no scale overflows. Every kernel reads these bytes; the store and
the wire move them. This module must not know blocks, heads or sequences.

**int8**: q in -127..127, as signed bytes.
**int4**: q in -7..7, as nibbles q + 8. A group of w elements takes h = ceil(w / 2) bytes: byte i holds
element i in its low nibble and element h + i in its high nibble, so that SIMD code unpacks a whole group with
one AND and one shift, without a shuffle. An odd group's last high nibble has no element and is 8.

**The scale** is max|x| / 127 (or 7) rounded to the nearest bfloat16, and q is x divided by that rounded
scale. Nearest, not up: the scale is then off by less than 1 part in 256, so max|x| / scale lies in
126.5..127.5 and the largest |q| is always 127 itself. Nothing is ever clamped, no element is off by more than
half a scale, and quantising what was dequantised gives the same bytes. (Rounded up, the largest q is
sometimes 126, and the next pass would choose a smaller scale.) The scale is never below 2^-126, the smallest
normal: so zeros need no special case, and nothing depends on whether a machine flushes denormals.
"""

from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import pad

SCALE_ELEMENTS = 64
"""Elements of a quantised row that share a scale; a row's last group may be shorter."""

_MIN_SCALE = 2.0**-126


class KVFormat(Enum):
    """Format of stored K and V. FLOAT64 is for the reference and its tests only."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"
    INT8 = "int8"
    INT4 = "int4"

    @classmethod
    def of(cls, dtype: torch.dtype) -> "KVFormat":
        """The unquantised format of that element dtype; ValueError if there is none."""
        for format in cls:
            if not format.quantised and format.dtype == dtype:
                return format
        raise ValueError(f"no KV format stores {dtype}")

    @property
    def quantised(self) -> bool:
        return self in (KVFormat.INT8, KVFormat.INT4)

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements; of the payload (uint8) if quantised."""
        return torch.uint8 if self.quantised else getattr(torch, self.value)

    def row_bytes(self, dim: int) -> int:
        """Bytes of one row's payload."""
        return -(-dim // 2) if self is KVFormat.INT4 else dim * self.dtype.itemsize

    def scales(self, dim: int) -> int:
        """Scales of one row: 0 unless quantised."""
        return -(-dim // SCALE_ELEMENTS) if self.quantised else 0


def quantise(x: Tensor, format: KVFormat) -> tuple[Tensor, Tensor]:
    """Rows ``x [..., dim]`` of any float dtype as stored: payload ``u8[..., row_bytes]`` and scales
    ``bf16[..., scales]``.

    Quantised formats take x as float32. A group with a NaN or an infinity in it gets a NaN scale, so that all
    of it reads as NaN: raising would fail a whole batch for one sequence, and wait for a GPU. Unquantised
    formats are a cast: no scales, and the payload may share memory with x.
    """
    if not format.quantised:
        payload = x.to(format.dtype).contiguous().view(torch.uint8)
        return payload, x.new_empty((*x.shape[:-1], 0), dtype=torch.bfloat16)
    dim, largest = x.shape[-1], 127 if format is KVFormat.INT8 else 7
    groups = pad(x.float(), (0, -dim % SCALE_ELEMENTS)).unflatten(-1, (-1, SCALE_ELEMENTS))
    peaks = groups.abs().amax(dim=-1)
    scales = (peaks / largest).clamp(min=_MIN_SCALE).bfloat16()
    scales = torch.where(peaks.isfinite(), scales, torch.nan)
    # A NaN scale leaves q NaN, which has no integer: 0 by choice.
    q = (groups / scales.float()[..., None]).round().nan_to_num(nan=0.0).to(torch.int8)
    q = q.flatten(-2)[..., :dim]
    payload = q.contiguous().view(torch.uint8) if format is KVFormat.INT8 else _pack(q)
    return payload, scales


def dequantise(payload: Tensor, scales: Tensor, format: KVFormat, dim: int, *, dtype: torch.dtype) -> Tensor:
    """Elements ``dtype[..., dim]`` of rows as :func:`quantise` made them, or of stored views of any strides.

    Exact in float32 and float64 (q * scale has 15 bits), save that what lies beyond float32's or ``dtype``'s
    range becomes its largest finite value: rounding up the greatest float32 must not make an infinity of it.
    Unquantised formats are a cast, and no copy where ``dtype`` is theirs.
    """
    if not format.quantised:
        return payload.view(format.dtype).to(dtype)
    q = payload.view(torch.int8) if format is KVFormat.INT8 else _unpack(payload, dim)
    wide = scales.float().repeat_interleave(SCALE_ELEMENTS, dim=-1)[..., :dim]
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return (q * wide).clamp(-limit, limit).to(dtype)


def _runs(dim: int) -> list[tuple[int, int]]:
    """(elements, half a group) of the row's full groups and of its shorter last one, empty ones left out."""
    last = dim % SCALE_ELEMENTS
    return [(n, half) for n, half in ((dim - last, SCALE_ELEMENTS // 2), (last, -(-last // 2))) if n]


def _pack(q: Tensor) -> Tensor:
    """q ``i8[..., dim]`` in -7..7 -> ``u8[..., ceil(dim / 2)]``."""
    parts, at = [], 0
    for n, half in _runs(q.shape[-1]):
        nibbles = (pad(q[..., at : at + n], (0, n % 2)) + 8).view(torch.uint8).unflatten(-1, (-1, 2, half))
        parts.append((nibbles[..., 0, :] | nibbles[..., 1, :] << 4).flatten(-2))
        at += n
    return torch.cat(parts, dim=-1)


def _unpack(payload: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`_pack`."""
    parts, at = [], 0
    for n, half in _runs(dim):
        data = payload[..., at : at + (n + 1) // 2].unflatten(-1, (-1, half))
        nibbles = torch.stack((data & 15, data >> 4), dim=-2).view(torch.int8) - 8
        parts.append(nibbles.flatten(-3)[..., :n])
        at += (n + 1) // 2
    return torch.cat(parts, dim=-1)
