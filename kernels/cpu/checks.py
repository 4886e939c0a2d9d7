"""Checks of the arguments that the native kernels trust, so that no call reads or writes other memory.

Called by ``attention``, once per plan; the calls of a plan check only their own arguments. Every function
raises ValueError, which names the wrong argument.
"""

import torch
from torch import Tensor

from farshore.kernels.base import (
    SEGMENT_DTYPES,
    WORK_DTYPES,
    AttentionSpec,
    KVLayout,
    Segments,
    WorkList,
)


def check_spec(spec: AttentionSpec) -> None:
    heads, groups = spec.q_heads, spec.groups
    if heads % spec.k_heads or heads % spec.v_heads or heads < groups or min(spec.k_dim, spec.v_dim) < 1:
        raise ValueError(f"query heads that do not divide evenly among K's and V's, or no dims: {spec}")
    if not spec.scale > 0 or (spec.soft_cap is not None and not spec.soft_cap > 0):
        raise ValueError(f"scale and soft cap must be above 0: {spec}")
    if spec.window_tokens is not None and spec.window_tokens < 1:
        raise ValueError(f"a window of {spec.window_tokens} tokens: give 1 or more, or None")


def check_layout(layout: KVLayout, spec: AttentionSpec, memory: Tensor) -> None:
    groups = spec.groups
    shape = (spec.k_heads // groups, spec.v_heads // groups, spec.k_dim, spec.v_dim, spec.v_in_k)
    if shape != (*layout[2:6], layout.v_in_k) or layout.block_tokens < 1:
        raise ValueError(f"{layout} does not hold the KV of {spec}")
    if memory.dtype != torch.uint8 or not memory.is_contiguous() or not memory.is_cpu:
        raise ValueError(f"memory must be contiguous bytes of the CPU, not {memory.dtype} on {memory.device}")


def check_work(
    work: WorkList,
    segments: Segments,
    layout: KVLayout,
    memory_bytes: int,
    *,
    n_rows: int,
    group0: int,
    group1: int,
) -> None:
    """Checks that the work list names existing rows, segments and groups, and that every segment lies inside
    the memory."""
    for fields, dtypes in ((work, WORK_DTYPES), (segments, SEGMENT_DTYPES)):
        for field, dtype in zip(fields, dtypes, strict=True):
            if (field.dtype, field.shape) != (dtype, fields[0].shape) or not field.is_contiguous():
                raise ValueError(f"{type(fields).__name__}: {field.dtype} {tuple(field.shape)}, not {dtype}")
    if segments.size:
        _check_inside(segments, layout, memory_bytes)
    if not work.row.numel():
        return
    if (work.segment < 0).any() or (work.segment >= segments.size).any():
        raise ValueError(f"work for segments that are not among the {segments.size}")
    stored0, stored1 = segments.group0[work.segment], segments.group1[work.segment]
    if (
        (work.group0 < torch.clamp(stored0, min=group0))
        | (work.group1 > torch.clamp(stored1, max=group1))
        | (work.group0 >= work.group1)
    ).any():
        raise ValueError(f"groups asked of a segment that does not hold them, or outside {group0}..{group1}")
    if (work.row < 0).any() or (work.rows < 1).any() or (work.rows > n_rows - work.row).any():
        raise ValueError(f"work for rows that are not among the step's {n_rows}")


def _check_inside(segments: Segments, layout: KVLayout, memory_bytes: int) -> None:
    block_bytes = layout.of_groups(1).block_bytes * (segments.group1 - segments.group0).long()
    begin = segments.first // layout.block_tokens * segments.stride
    last = (segments.first.long() + segments.count - 1) // layout.block_tokens * segments.stride
    low, high = torch.minimum(begin, last) + segments.base, torch.maximum(begin, last) + segments.base
    outside = (segments.first < 0) | (segments.count < 0) | (low < 0) | (high + block_bytes > memory_bytes)
    # An empty segment may lie anywhere, because it is not read.
    if (outside & (segments.count != 0)).any():
        raise ValueError(f"a segment outside of the {memory_bytes} bytes of memory")
