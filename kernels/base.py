"""The contract of the attention kernels: their arguments, their results, and :class:`Kernels` itself.

Used by every implementation and every caller (shards, the engine, the store, benchmarks). Callers describe
stored KV as *segments* and what to compute as a *work list*. Kernels must not know sequences, spans or
networks. Symbols: R query rows, G = gcd(K heads, V heads) head groups.

**Attention state.** The attention of a query over a set of tokens is the pair (o, lse): o is the mean of V
weighted by softmax, and lse = ln sum exp(scale * q.k), in natural logarithm. States of disjoint sets merge
exactly (:meth:`Kernels.merge`). The state of no tokens, the identity, is (0, -inf).
"""

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from farshore.kernels.formats import SCALE_ELEMENTS, KVFormat
from farshore.kernels.host import HOST, PlanRoom, Send

BLOCK_TOKENS = 256
"""Tokens in a block of stored KV. One layer and group of SmolLM2 then takes 32 KiB, whole OS pages."""


class AttentionSpec(NamedTuple):
    """Shape of attention in one layer class.

    A row at position p sees the tokens at positions 0 to p, or only the last ``window_tokens`` of them.
    ``soft_cap`` c replaces a logit x by c * tanh(x / c).
    """

    q_heads: int
    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    scale: float
    soft_cap: float | None = None
    window_tokens: int | None = None
    v_in_k: bool = False
    """V is the first ``v_dim`` elements of K and is not stored separately (MLA's latent: K 576, V 512)."""

    @property
    def groups(self) -> int:
        """KV-head groups. Heads can be split between shards at the borders of groups only."""
        return gcd(self.k_heads, self.v_heads)

    @property
    def q_heads_per_group(self) -> int:
        return self.q_heads // self.groups


class StoredKV(NamedTuple):
    """One layer of a block as stored bytes, in any format; see :mod:`farshore.kernels.formats`."""

    k: Tensor
    """u8[k_heads, block_tokens, row bytes]"""
    k_scales: Tensor
    """bf16[k_heads, block_tokens, scales]; scales = 0 if the format is not quantised"""
    v: Tensor
    """u8[v_heads, block_tokens, row bytes]"""
    v_scales: Tensor
    """bf16[v_heads, block_tokens, scales]"""


class KVLayout(NamedTuple):
    """How one block of stored KV is laid out: ``[layer][K|V][group][head of the group]`` of runs.

    A run holds the block's tokens of one head: ``[token][payload of the row]``, then, if quantised,
    ``[token][scales]`` in bfloat16. All layers of a block are adjacent, so that export, spill and parity act
    on one byte range. A span that holds fewer groups has smaller blocks (:meth:`of_groups`).
    """

    layers: int
    groups: int
    k_heads_per_group: int
    v_heads_per_group: int
    k_dim: int
    v_dim: int
    format: KVFormat
    block_tokens: int = BLOCK_TOKENS
    """Must be even if rows have an odd number of payload bytes, so that scales lie at even addresses."""
    v_in_k: bool = False
    """V takes no bytes: it is the beginning of each row of K."""

    @classmethod
    def of(cls, spec: AttentionSpec, *, layers: int, format: KVFormat) -> "KVLayout":
        """The layout of a layer class whose blocks hold all groups.

        Raises ValueError if ``v_in_k`` is asked for and V cannot be read out of K: the numbers of K and V
        heads differ, V is wider than K, or a quantised V would end inside a group that shares a scale.
        """
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
        """The same layout for blocks that hold ``groups`` head groups."""
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
        """Payload bytes of one token of one V head; 0 if ``v_in_k``."""
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
        """Bytes of one V head of one layer in one block; 0 if ``v_in_k``."""
        return self.block_tokens * (self.v_row_bytes + 2 * self.v_scales)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer in one block."""
        return self.k_heads * self.k_run_bytes + self.v_heads * self.v_run_bytes

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one token in one layer: K, V and scales of every group."""
        return self.layer_bytes // self.block_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return self.layers * self.layer_token_bytes

    @property
    def block_bytes(self) -> int:
        return self.layers * self.layer_bytes

    def stored(self, block: Tensor, layer: int) -> StoredKV:
        """Views of one layer of a block, given as bytes ``u8[block_bytes]``. Works in every format.

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
        """Views of K ``[k_heads, block_tokens, k_dim]`` and V ``[v_heads, block_tokens, v_dim]`` of one layer
        of a block, given as bytes ``u8[block_bytes]``. Raises ValueError for a quantised format, whose
        elements have no addresses: use :meth:`stored`."""
        if self.format.quantised:
            raise ValueError(f"{self.format.value} elements cannot be viewed: dequantise what is stored")
        # Does not call `stored`: tails append to views in every layer, and this takes a fifth of the time.
        tokens = self.block_tokens
        elements = block.view(self.format.dtype)
        k_elements = self.k_heads * tokens * self.k_dim
        v_elements = 0 if self.v_in_k else self.v_heads * tokens * self.v_dim
        middle = layer * (k_elements + v_elements) + k_elements
        k = elements[middle - k_elements : middle].view(self.k_heads, tokens, self.k_dim)
        if self.v_in_k:
            return k, k[..., : self.v_dim]
        return k, elements[middle : middle + v_elements].view(self.v_heads, tokens, self.v_dim)

    def _runs(self, runs: Tensor, heads: int, row_bytes: int) -> tuple[Tensor, Tensor]:
        """Payload ``u8[heads, block_tokens, row_bytes]`` and scales ``bf16[heads, block_tokens, n]``."""
        by_head = runs.view(heads, -1)
        payload = self.block_tokens * row_bytes
        return (
            by_head[:, :payload].unflatten(1, (self.block_tokens, row_bytes)),
            by_head[:, payload:].view(torch.bfloat16).unflatten(1, (self.block_tokens, -1)),
        )


SEGMENT_DTYPES = (torch.int64,) * 2 + (torch.int32,) * 3 + (torch.int16,) * 2
"""The dtypes of the fields of :class:`Segments`."""
WORK_DTYPES = (torch.int32,) * 3 + (torch.int16,) * 2
"""The dtypes of the fields of :class:`WorkList`."""


class Segments(NamedTuple):
    """N segments of stored KV in one memory.

    A segment's blocks lie at a constant stride. Its token i is in block ``(first + i) // block_tokens``, at
    slot ``(first + i) % block_tokens``.
    """

    base: Tensor
    """i64[N]: byte offset of the segment's first block in the memory"""
    stride: Tensor
    """i64[N]: bytes from one block to the next"""
    first: Tensor
    """i32[N]: slot of the first token, counted from slot 0 of the first block"""
    count: Tensor
    """i32[N]: tokens"""
    position: Tensor
    """i32[N]: position of the first token in its sequence"""
    group0: Tensor
    """i16[N]: the first head group that the blocks hold"""
    group1: Tensor
    """i16[N]: the last one plus 1; ``group1 - group0`` gives the size of the blocks"""

    @classmethod
    def concat(cls, lists: "Sequence[Segments]") -> "Segments":
        return cls(*(torch.cat(field) for field in zip(*lists, strict=True))) if lists else cls.of([])

    @classmethod
    def of(cls, segments: "Sequence[tuple[int, int, int, int, int, int, int]]") -> "Segments":
        """From tuples (base, stride, first, count, position, group0, group1)."""
        return cls(*_columns(segments, SEGMENT_DTYPES))

    @property
    def size(self) -> int:
        return self.base.numel()


class WorkList(NamedTuple):
    """W items of work: rows ``row .. row + rows`` attend to ``segment`` in groups ``group0 .. group1``.

    One row on many segments is a paged or selected read; many rows on one segment share a prefix.
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
    def of(cls, items: "Sequence[tuple[int, int, int, int, int]]") -> "WorkList":
        """From tuples (row, rows, segment, group0, group1)."""
        return cls(*_columns(items, WORK_DTYPES))


def _columns(items: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    columns = list(zip(*items, strict=True)) if items else [()] * len(dtypes)
    return [
        torch.tensor(column, dtype=dtype, device=HOST) for column, dtype in zip(columns, dtypes, strict=True)
    ]


class State(NamedTuple):
    """Attention state of R rows: ``o [R, q_heads, v_dim]``, ``lse f32 [R, q_heads]`` (f64 for f64 input)."""

    o: Tensor
    lse: Tensor

    @classmethod
    def identity(
        cls,
        rows: int,
        heads: int,
        v_dim: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> "State":
        """A new state of no tokens, the neutral element of merge. ``dtype`` is that of o."""
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            torch.zeros(rows, heads, v_dim, dtype=dtype, device=device),
            torch.full((rows, heads), -torch.inf, dtype=lse_dtype, device=device),
        )


Plan = TypeVar("Plan")
"""What an implementation prepares in ``plan``; callers pass it to that implementation's ``partial``."""


class Kernels(Protocol[Plan]):
    """The functions of one implementation, which is a module; :mod:`farshore.kernels.select` chooses it.

    This is the contract of all of them. An implementation's docstrings say only what differs there.
    Functions write to ``out``, whose o may have any float dtype the implementation knows and gets the result
    rounded once. They raise ValueError for shapes, dtypes, devices or numbers that do not fit. ``threads``:
    native threads; PyTorch and GPUs ignore it. Thread-safe, except that a plan serves one call at a time.
    """

    @property
    def native(self) -> bool:
        """Whether these are the compiled CPU kernels. Native loops run their plans without Python."""

    def plan(
        self,
        work: WorkList,
        segments: Segments,
        memory: Tensor,
        layout: KVLayout,
        spec: AttentionSpec,
        *,
        positions: Tensor,
        group0: int = 0,
        group1: int | None = None,
        threads: int = 1,
        last: Plan | None = None,
        send: Send | None = None,
        room: PlanRoom | None = None,
    ) -> Plan:
        """Prepares the partial attention of one step, for every layer of one layer class.

        ``memory`` is ``u8[bytes]``, which the segments' bases refer to; the plan keeps it alive. ``layout``
        describes blocks that hold every group; a segment's own group range narrows it. ``positions`` is
        ``i64[R]``. q and the output hold the heads of groups ``group0 .. group1``, all by default.
        ``last``: the plan of a step with the same arguments, except that positions and counts moved, inside
        the same blocks. The new plan needs no slow checks and may be made of ``last``, which is not used
        again. ``send`` copies the plan to the device; None: by a plain copy. Kernels that graphs can hold put
        it into ``room`` instead. Raises ValueError for work outside the groups of the call or of a segment.
        """

    def partial(self, plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
        """Writes each row's attention state over the tokens that the work list names for it.

        q ``[R, heads, k_dim]``; out.o ``[R, heads, v_dim]``, out.lse ``[R, heads]``. A row sees no key above
        its position nor outside the window. A row without work, or that sees no key, gets the identity.
        """

    def partial_async(self, plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
        """Starts :meth:`partial`, which may end only when :meth:`wait` returns.

        The same thread must call :meth:`wait`. Until then q and the stored tokens that are read must not
        change, and the contents of ``out`` are undefined. A thread has at most one call under way: another
        call of the kernels may wait for it first.
        """

    def wait(self) -> None:
        """Blocks until this thread's ``partial_async`` is done, and raises its error. Returns at once if
        there is none."""

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        *,
        q_positions: Tensor,
        k_position: int,
        out: State,
        threads: int = 1,
    ) -> None:
        """Attention of n new tokens over m adjacent tokens: themselves or their past (prefill).

        q ``[n, heads, k_dim]``, k ``[k_heads, m, k_dim]``, v ``[v_heads, m, v_dim]``, k and v in one dtype;
        the heads may be those of some groups only. q_positions ``i64[n]``; ``k_position`` is the position of
        the first key. Causal by position. Writes o ``[n, heads, v_dim]`` and lse ``[n, heads]``.
        """

    def merge(self, states: Sequence[State], *, sink: Tensor | None = None, out: State) -> None:
        """Merges one or more states of disjoint token sets, in the order given.

        lse = ln sum exp(lse_i), o = sum o_i exp(lse_i - lse). A state whose lse is -inf has weight 0, and its
        o, which may be NaN, is ignored: merging empty states gives the identity. ``sink`` is a learned logit
        per head ``[heads]``, added once to the denominator. ``out`` must not share memory with a state.
        """
