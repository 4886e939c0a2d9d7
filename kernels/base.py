"""What a kernel is given and what it returns: the vocabulary of floor 0.

Callers (shards, the engine) describe stored KV as *segments* and work as *rows*; kernels know nothing of
sequences, spans or networks. Symbols: R query rows of a step, G = gcd(K heads, V heads) head groups.

**Attention state.** Over any token set S, attention is (o, lse): o the softmax-weighted mean of V over S,
lse = ln sum exp(scale * q.k), natural log. States of disjoint sets merge exactly (see :func:`merge` of each
implementation); the identity is (0, -inf).
"""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_TOKENS = 256
"""Tokens in a block of stored KV. A (layer, group) run of 256 SmolLM2 rows is 32 KiB, whole OS pages."""


class AttentionSpec(NamedTuple):
    """Static shape of attention in one layer class."""

    q_heads: int
    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    scale: float
    soft_cap: float | None = None
    window_tokens: int | None = None

    @property
    def groups(self) -> int:
        """Head groups: the finest unit that heads can be sharded by."""
        return gcd(self.k_heads, self.v_heads)

    @property
    def q_heads_per_group(self) -> int:
        return self.q_heads // self.groups


class KVLayout(NamedTuple):
    """Shape of stored KV inside one block: ``[layer][K|V][group][head of group][token][dim]``.

    Head-major runs, all layers of a block together, so that export, spill and parity act on one range.
    A span that holds fewer groups has a smaller block (``of_groups``).
    """

    layers: int
    groups: int
    k_heads_per_group: int
    v_heads_per_group: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    block_tokens: int = BLOCK_TOKENS

    @classmethod
    def of(cls, spec: AttentionSpec, *, layers: int, dtype: torch.dtype) -> "KVLayout":
        g = spec.groups
        return cls(layers, g, spec.k_heads // g, spec.v_heads // g, spec.k_dim, spec.v_dim, dtype)

    def of_groups(self, groups: int) -> "KVLayout":
        return self._replace(groups=groups)

    @property
    def token_elements(self) -> int:
        """Elements of one token in one layer, K and V of every group."""
        return self.groups * (self.k_heads_per_group * self.k_dim + self.v_heads_per_group * self.v_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return self.layers * self.token_elements * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens

    def views(self, block: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """K ``[k_heads, block_tokens, k_dim]`` and V ``[v_heads, block_tokens, v_dim]`` of one layer,
        without a copy, from a block given as bytes ``u8[block_bytes]``."""
        t = self.block_tokens
        elements = block.view(self.dtype)
        layer_elements = self.token_elements * t
        start = layer * layer_elements
        k_heads, v_heads = self.groups * self.k_heads_per_group, self.groups * self.v_heads_per_group
        middle = start + k_heads * t * self.k_dim
        k = elements[start:middle].view(k_heads, t, self.k_dim)
        v = elements[middle : start + layer_elements].view(v_heads, t, self.v_dim)
        return k, v


class Segments(NamedTuple):
    """N stretches of stored KV. Inside one, token i lies in block ``(first + i) // block_tokens`` of a run
    of blocks at constant stride, at slot ``(first + i) % block_tokens``."""

    base: Tensor
    """i64[N]: byte offset of the run's first block in the memory."""
    stride: Tensor
    """i64[N]: bytes from one block of the run to the next."""
    first: Tensor
    """i32[N]: slot of the first token, counted from the run's first block."""
    count: Tensor
    """i32[N]: tokens."""
    position: Tensor
    """i32[N]: position of the first token in its sequence."""
    group0: Tensor
    """i16[N]: first head group the run holds ..."""
    group1: Tensor
    """i16[N]: ... and one past its last; block size follows from group1 - group0."""

    @classmethod
    def concat(cls, parts: "list[Segments]") -> "Segments":
        return cls(*(torch.cat(field) for field in zip(*parts, strict=True))) if parts else cls.of([])

    @classmethod
    def of(cls, runs: "list[tuple[int, int, int, int, int, int, int]]") -> "Segments":
        """From tuples (base, stride, first, count, position, group0, group1)."""
        dtypes = (torch.int64, torch.int64, torch.int32, torch.int32, torch.int32, torch.int16, torch.int16)
        columns = list(zip(*runs, strict=True)) if runs else [()] * len(dtypes)
        return cls(*(torch.tensor(c, dtype=d) for c, d in zip(columns, dtypes, strict=True)))

    @property
    def size(self) -> int:
        return self.base.numel()


class Rows(NamedTuple):
    """Work list of W items: rows ``row .. row + rows`` attend to ``segment`` in groups ``group0 .. group1``.

    One row on many segments is a paged or selected read; many rows on one segment a shared prefix.
    """

    row: Tensor
    """i32[W]"""
    rows: Tensor
    """i32[W]"""
    segment: Tensor
    """i32[W]"""
    group0: Tensor
    """i16[W]"""
    group1: Tensor
    """i16[W]"""

    @classmethod
    def of(cls, items: "list[tuple[int, int, int, int, int]]") -> "Rows":
        dtypes = (torch.int32, torch.int32, torch.int32, torch.int16, torch.int16)
        columns = list(zip(*items, strict=True)) if items else [()] * len(dtypes)
        return cls(*(torch.tensor(c, dtype=d) for c, d in zip(columns, dtypes, strict=True)))


class State(NamedTuple):
    """Attention state of R rows: ``o [R, q_heads, v_dim]``, ``lse f32 [R, q_heads]`` (f64 for f64 input)."""

    o: Tensor
    lse: Tensor

    @classmethod
    def identity(cls, rows: int, heads: int, v_dim: int, *, dtype: torch.dtype = torch.float32) -> "State":
        """The neutral element of merge: no token seen yet."""
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            torch.zeros(rows, heads, v_dim, dtype=dtype),
            torch.full((rows, heads), -torch.inf, dtype=lse_dtype),
        )
