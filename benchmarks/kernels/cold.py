"""KV as shards store it, filled fast and too much to be cached: what the partial-attention benchmarks read.

Called by ``decode`` and ``overhead``. Blocks hold all layers, as a shard's do.
"""

from typing import Any

import torch
from torch import Tensor

from farshore.benchmarks.kernels.implementation import Implementation
from farshore.benchmarks.kernels.shapes import Shape
from farshore.benchmarks.memory import allocate
from farshore.kernels.base import KVLayout, Rows, Segments, State
from farshore.kernels.formats import KVFormat, quantise
from farshore.kvstore.store.arena import stride_bytes


class ColdKV:
    """``sequences`` sequences of ``tokens`` tokens in ``layers`` layers, one segment each."""

    def __init__(self, shape: Shape, format: KVFormat, *, sequences: int, tokens: int, layers: int) -> None:
        self.shape, self.sequences, self.tokens, self.layers = shape, sequences, tokens, layers
        self.layout = KVLayout.of(shape.spec, layers=layers, format=format)
        self.layer_bytes = layer_bytes(shape, format, sequences=sequences, tokens=tokens)
        stride = stride_bytes(self.layout.block_bytes)
        blocks = -(-tokens // self.layout.block_tokens)
        self.memory = allocate(sequences * blocks * stride)
        self._fill(stride)
        self.segments = Segments.of(
            [
                (sequence * blocks * stride, stride, 0, tokens, 0, 0, self.layout.groups)
                for sequence in range(sequences)
            ]
        )

    @property
    def bytes(self) -> int:
        """Of the KV itself, without what rounding to blocks and pages adds."""
        return self.layers * self.layer_bytes

    def plan_separate(self, implementation: Implementation) -> Any:
        """A row for each sequence, on its own KV."""
        items = [(row, 1, row, 0, self.layout.groups) for row in range(self.sequences)]
        return self._plan(implementation, items, self.sequences)

    def plan_shared(self, implementation: Implementation, rows: int) -> Any:
        """``rows`` rows, all on the first sequence's KV."""
        return self._plan(implementation, [(0, rows, 0, 0, self.layout.groups)], rows)

    def _plan(
        self, implementation: Implementation, items: list[tuple[int, int, int, int, int]], rows: int
    ) -> Any:
        return implementation.plan(
            Rows.of(items),
            self.segments,
            self.memory,
            self.layout,
            self.shape.spec,
            positions=torch.full((rows,), self.tokens),
        )

    def _fill(self, stride: int) -> None:
        """One layer of one block is random and copied to all: to generate gigabytes would take minutes."""
        generator = torch.Generator().manual_seed(0)
        block = torch.zeros(self.layout.block_bytes, dtype=torch.uint8)
        stored = self.layout.stored(block, 0)
        rows = (self.shape.kv_heads, self.layout.block_tokens, self.shape.dim)
        for payload, scales in ((stored.k, stored.k_scales), (stored.v, stored.v_scales)):
            quantised = quantise(torch.randn(rows, generator=generator), self.layout.format)
            payload.copy_(quantised[0])
            scales.copy_(quantised[1])
        layers = block.view(self.layers, -1)
        layers[1:] = layers[0]
        self.memory.view(-1, stride)[:, : block.numel()] = block


def layer_bytes(shape: Shape, format: KVFormat, *, sequences: int, tokens: int) -> int:
    """What the attention of that many sequences reads in one layer."""
    return sequences * tokens * KVLayout.of(shape.spec, layers=1, format=format).token_bytes


def query(shape: Shape, rows: int) -> tuple[Tensor, State]:
    """bf16 q of ``rows`` rows, and room for their state."""
    q = torch.randn(rows, shape.q_heads, shape.dim, generator=torch.Generator().manual_seed(1))
    return q.to(torch.bfloat16), State.identity(rows, shape.q_heads, shape.dim)
