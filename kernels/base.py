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

from farshore.kernels.formats import SCALE_ELEMENTS, KVFormat

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
    v_in_k: bool = False
    """V is the first ``v_dim`` elements of K and not stored again (MLA's latent: K 576, V 512)."""

    @property
    def groups(self) -> int:
        """Head groups: the finest unit that heads can be sharded by."""
        return gcd(self.k_heads, self.v_heads)

    @property
    def q_heads_per_group(self) -> int:
        return self.q_heads // self.groups


class StoredKV(NamedTuple):
    """One layer of a block as it is stored, whatever its format; see :mod:`farshore.kernels.formats`."""

    k: Tensor
    """u8[k_heads, block_tokens, row bytes]"""
    k_scales: Tensor
    """bf16[k_heads, block_tokens, scales]; no scales unless quantised"""
    v: Tensor
    """u8[v_heads, block_tokens, row bytes]"""
    v_scales: Tensor
    """bf16[v_heads, block_tokens, scales]"""


class KVLayout(NamedTuple):
    """Shape of stored KV inside one block: ``[layer][K|V][group][head of group]`` of runs.

    A run is one head's tokens: ``[token][payload of the row]``, then, if quantised, ``[token][scales]`` in
    bfloat16. Head-major runs, all layers of a block together, so that export, spill and parity act on one
    range. A span that holds fewer groups has a smaller block (``of_groups``).
    """

    layers: int
    groups: int
    k_heads_per_group: int
    v_heads_per_group: int
    k_dim: int
    v_dim: int
    format: KVFormat
    block_tokens: int = BLOCK_TOKENS
    """Even if rows have an odd number of payload bytes (odd dims), so that scales lie at even addresses."""
    v_in_k: bool = False
    """V takes no bytes of its own: it is the beginning of each row of K."""

    @classmethod
    def of(cls, spec: AttentionSpec, *, layers: int, format: KVFormat) -> "KVLayout":
        """Of a layer class. ValueError where V cannot be read out of K as ``v_in_k`` asks: the K heads are
        not the V heads, or a quantised V would end inside of a group that shares a scale."""
        if spec.v_in_k:
            ends_inside = spec.v_dim < spec.k_dim and spec.v_dim % SCALE_ELEMENTS
            if spec.k_heads != spec.v_heads or spec.v_dim > spec.k_dim or (format.quantised and ends_inside):
                raise ValueError(
                    f"V of {spec.v_heads} heads x {spec.v_dim} cannot lie in K of {spec.k_heads} heads x"
                    f" {spec.k_dim} as {format.value}: give equal heads and, if quantised, whole groups of"
                    f" {SCALE_ELEMENTS}"
                )
        g = spec.groups
        return cls(
            layers,
            g,
            spec.k_heads // g,
            spec.v_heads // g,
            spec.k_dim,
            spec.v_dim,
            format,
            v_in_k=spec.v_in_k,
        )

    def of_groups(self, groups: int) -> "KVLayout":
        return self._replace(groups=groups)

    @property
    def k_heads(self) -> int:
        return self.groups * self.k_heads_per_group

    @property
    def v_heads(self) -> int:
        return self.groups * self.v_heads_per_group

    @property
    def k_row_bytes(self) -> int:
        """Payload bytes of one token of one K head."""
        return self.format.row_bytes(self.k_dim)

    @property
    def v_row_bytes(self) -> int:
        """Payload bytes of one token of one V head: those that V takes itself, so 0 if ``v_in_k``."""
        return 0 if self.v_in_k else self.format.row_bytes(self.v_dim)

    @property
    def k_scales(self) -> int:
        """Scales of one token of one K head."""
        return self.format.scales(self.k_dim)

    @property
    def v_scales(self) -> int:
        """Scales of one token of one V head; 0 if ``v_in_k``."""
        return 0 if self.v_in_k else self.format.scales(self.v_dim)

    @property
    def k_run_bytes(self) -> int:
        """Bytes of one K head of one layer in one block."""
        return self.block_tokens * (self.k_row_bytes + 2 * self.k_scales)

    @property
    def v_run_bytes(self) -> int:
        return self.block_tokens * (self.v_row_bytes + 2 * self.v_scales)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer in one block."""
        return self.k_heads * self.k_run_bytes + self.v_heads * self.v_run_bytes

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one token in one layer, K and V of every group."""
        return self.layer_bytes // self.block_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return self.layers * self.layer_token_bytes

    @property
    def block_bytes(self) -> int:
        return self.layers * self.layer_bytes

    def stored(self, block: Tensor, layer: int) -> StoredKV:
        """One layer of a block given as bytes ``u8[block_bytes]``, without a copy, in any format.

        If ``v_in_k``, ``v`` and ``v_scales`` are views of the beginning of each row of ``k``.
        """
        start, middle = layer * self.layer_bytes, layer * self.layer_bytes + self.k_heads * self.k_run_bytes
        k, k_scales = self._runs(block[start:middle], self.k_heads, self.k_row_bytes)
        if self.v_in_k:
            v = k[..., : self.format.row_bytes(self.v_dim)]
            v_scales = k_scales[..., : self.format.scales(self.v_dim)]
        else:
            v, v_scales = self._runs(block[middle : start + self.layer_bytes], self.v_heads, self.v_row_bytes)
        return StoredKV(k, k_scales, v, v_scales)

    def views(self, block: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """K ``[k_heads, block_tokens, k_dim]`` and V ``[v_heads, block_tokens, v_dim]`` of one layer,
        without a copy, from a block given as bytes ``u8[block_bytes]``. ValueError for quantised formats,
        whose elements have no address: see :meth:`stored`."""
        if self.format.quantised:
            raise ValueError(f"{self.format.value} elements cannot be viewed: dequantise what is stored")
        # Not through `stored`: a tail appends to a view in every layer, and this takes a fifth of the time.
        t = self.block_tokens
        elements = block.view(self.format.dtype)
        k_elements = self.k_heads * t * self.k_dim
        v_elements = 0 if self.v_in_k else self.v_heads * t * self.v_dim
        middle = layer * (k_elements + v_elements) + k_elements
        k = elements[middle - k_elements : middle].view(self.k_heads, t, self.k_dim)
        if self.v_in_k:
            return k, k[..., : self.v_dim]
        return k, elements[middle : middle + v_elements].view(self.v_heads, t, self.v_dim)

    def _runs(self, runs: Tensor, heads: int, row_bytes: int) -> tuple[Tensor, Tensor]:
        """Payload ``u8[heads, block_tokens, row_bytes]`` and scales ``bf16[heads, block_tokens, n]``."""
        by_head = runs.view(heads, -1)
        payload = self.block_tokens * row_bytes
        return (
            by_head[:, :payload].unflatten(1, (self.block_tokens, row_bytes)),
            by_head[:, payload:].view(torch.bfloat16).unflatten(1, (self.block_tokens, -1)),
        )


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
