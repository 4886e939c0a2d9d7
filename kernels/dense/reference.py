"""The dense kernels in PyTorch: on the CPU, in every dtype, and what the GPU's are tested against.

See :mod:`farshore.kernels.dense.base` for what the functions do.
"""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from farshore.kernels.dense import checks
from farshore.kernels.dense.base import KVRows, KVSlots, Rotation
from farshore.kernels.formats import quantise


def add_norm(h: Tensor, x: Tensor | None, weight: Tensor, eps: float, *, out: Tensor) -> None:
    checks.add_norm(h, x, weight, out)
    if x is not None:
        h.add_(x)
    # PyTorch's kernel rounds before the weight is applied, as transformers does, if it gets none.
    torch.mul(weight, rms_norm(h, h.shape[-1:], None, eps), out=out)


def rotate(
    x: Tensor,
    rotation: Rotation,
    positions: Tensor,
    *,
    q: Tensor | None = None,
    kv: KVRows | KVSlots | None = None,
) -> None:
    q_heads, kv_heads = checks.rotate(x, rotation, positions, q, kv)
    heads = x.view(len(x), q_heads + 2 * kv_heads, 2 * rotation.cos.shape[1])
    cos, sin = (table[positions].unsqueeze(1) for table in rotation)
    first, second = heads[:, : q_heads + kv_heads].chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    if q is not None:
        q.copy_(rotated[:, :q_heads])
    k, v = rotated[:, q_heads:], heads[:, q_heads + kv_heads :]
    if isinstance(kv, KVRows):
        kv.k.copy_(k)
        kv.v.copy_(v)
    elif kv is not None:
        _store(kv, k, v)


def silu_multiply(gate_up: Tensor, *, out: Tensor) -> None:
    checks.silu_multiply(gate_up, out)
    gate, up = gate_up.chunk(2, dim=1)
    torch.mul(silu(gate), up, out=out)


def _store(slots: KVSlots, k: Tensor, v: Tensor) -> None:
    layout = slots.layout
    start = slots.layer * layout.layer_bytes
    sides = (
        (k, start, layout.k_run_bytes, layout.k_row_bytes),
        (v, start + layout.k_heads * layout.k_run_bytes, layout.v_run_bytes, layout.v_row_bytes),
    )
    for rows, side, run, row in sides:
        heads = side + run * torch.arange(rows.shape[1], device=rows.device)
        runs = slots.base[:, None] + heads
        # A row that is not stored writes the values of its source to the same place.
        payload, scales = quantise(rows.index_select(0, slots.source), layout.format)
        _scatter(slots.memory, runs + row * slots.slot[:, None], payload)
        scale_bytes = scales.view(torch.uint8)
        if scale_bytes.numel():
            place = layout.block_tokens * row + scale_bytes.shape[-1] * slots.slot
            _scatter(slots.memory, runs + place[:, None], scale_bytes)


def _scatter(memory: Tensor, at: Tensor, values: Tensor) -> None:
    """Writes u8 values [R, heads, n] to memory from the byte offsets ``at`` i64[R, heads] on."""
    places = at[..., None] + torch.arange(values.shape[-1], device=at.device)
    memory.index_copy_(0, places.view(-1), values.reshape(-1))
