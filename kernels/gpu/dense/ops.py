"""The GPU's dense kernels: check the arguments, then launch one kernel on the current stream.

See :mod:`farshore.kernels.dense.base` for what the functions do. Tensors are float32, bfloat16 or float16;
KV may be stored as int8 or int4 too. Rows must be adjacent elements. Results equal those of PyTorch up to the
order of the sum of squares and the last bit of the root and the exponential. Launching allocates nothing, so
these calls may be part of a graph.
"""

import torch
import triton
from torch import Tensor

from farshore.kernels.dense import checks
from farshore.kernels.dense.base import KVRows, KVSlots, Rotation
from farshore.kernels.formats import KVFormat
from farshore.kernels.gpu import tuning
from farshore.kernels.gpu.dense.rotate import rotate_kernel
from farshore.kernels.gpu.dense.rows import add_norm_kernel, silu_multiply_kernel

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A fused multiply-add would round once where PyTorch rounds twice.
_UNFUSED = {"enable_fp_fusion": False}


def add_norm(h: Tensor, x: Tensor | None, weight: Tensor, eps: float, *, out: Tensor) -> None:
    """Raises ValueError for rows of more than 32,768 elements, too."""
    checks.add_norm(h, x, weight, out)
    _check(h, *(() if x is None else (x,)), weight, out)
    rows, size = h.shape
    if size > tuning.MOST_NORM_ELEMENTS:
        raise ValueError(f"rows of {size} elements: a program holds {tuning.MOST_NORM_ELEMENTS}")
    if rows and size:
        add_norm_kernel[(rows,)](
            h,
            h.stride(0),
            x,
            0 if x is None else x.stride(0),
            weight,
            out,
            out.stride(0),
            eps,
            SIZE=size,
            **tuning.norm_constants(size),
            **_UNFUSED,
        )


def silu_multiply(gate_up: Tensor, *, out: Tensor) -> None:
    checks.silu_multiply(gate_up, out)
    _check(gate_up, out)
    rows, size = out.shape
    if rows and size:
        constants = tuning.silu_constants(size)
        silu_multiply_kernel[(rows, triton.cdiv(size, constants["BLOCK"]))](
            gate_up, gate_up.stride(0), out, out.stride(0), SIZE=size, **constants, **_UNFUSED
        )


def rotate(
    x: Tensor,
    rotation: Rotation,
    positions: Tensor,
    *,
    q: Tensor | None = None,
    kv: KVRows | KVSlots | None = None,
) -> None:
    """Raises ValueError for tables that are not contiguous, too."""
    q_heads, kv_heads = checks.rotate(x, rotation, positions, q, kv)
    _check(x, *(() if q is None else (q,)), *(kv if isinstance(kv, KVRows) else ()))
    if not all(table.is_contiguous() for table in (*rotation, positions)):
        raise ValueError("the table and the positions must be contiguous")
    rows, heads = len(x), q_heads + 2 * kv_heads
    if not (rows and heads):
        return
    dim = 2 * rotation.cos.shape[1]
    q_at = (x, 0, 0) if q is None else (q, *q.stride()[:2])
    constants = tuning.rotate_constants(rows, dim)
    rotate_kernel[(triton.cdiv(rows, constants["ROWS"]), heads)](
        x,
        x.stride(0),
        positions,
        *rotation,
        *q_at,
        *_targets(x, kv),
        rows,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        **_stored_constants(kv),
        **constants,
        **_UNFUSED,
    )


def _targets(x: Tensor, kv: KVRows | KVSlots | None) -> tuple[Tensor | int | None, ...]:
    """Of K and V: (target, strides of a row and a head) each; then scales, places and the layer's offset."""
    if isinstance(kv, KVSlots):
        layout = kv.layout
        if not all(field.is_contiguous() for field in (kv.base, kv.slot, kv.source)):
            raise ValueError("the rows' places must be contiguous")
        item = torch.int8 if layout.format is KVFormat.INT8 else layout.format.dtype  # int4: uint8
        payload = kv.memory[: kv.memory.numel() // item.itemsize * item.itemsize].view(item)
        scales = kv.memory[: kv.memory.numel() // 2 * 2].view(torch.bfloat16) if layout.k_scales else x
        side = payload, 0, 0
        return *side, *side, scales, kv.base, kv.slot, kv.source, kv.layer * layout.layer_bytes
    k, v = (x, x) if kv is None else kv
    return k, *k.stride()[:2], v, *v.stride()[:2], x, None, None, None, 0


def _stored_constants(kv: KVRows | KVSlots | None) -> dict[str, int]:
    if not isinstance(kv, KVSlots):
        return {"SCALES": 0, "RUN_BYTES": 0, "BLOCK_TOKENS": 0, "TOKEN": 0}
    layout = kv.layout
    return {
        "SCALES": layout.k_scales,
        "RUN_BYTES": layout.k_run_bytes,
        "BLOCK_TOKENS": layout.block_tokens,
        "TOKEN": layout.k_row_bytes // layout.format.dtype.itemsize,
    }


def _check(*tensors: Tensor) -> None:
    """Raises ValueError unless the kernels know the dtype, and the elements of each row are adjacent."""
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{tensor.dtype}: not float32, bfloat16 or float16")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"rows must be contiguous, not {tensor.stride()} apart")
