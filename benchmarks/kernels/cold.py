"""KV stored as shards store it, too large to be cached, for the benchmarks of ``partial``.

Called by ``decode`` and ``overhead``. Blocks hold all layers, as a shard's do.
"""

from typing import Any

import torch
from torch import Tensor

from farshore.benchmarks.kernels.implementation import Implementation
from farshore.benchmarks.kernels.shapes import Shape
from farshore.benchmarks.memory import allocate
from farshore.kernels.base import KVLayout, Segments, State, WorkList
from farshore.kernels.formats import KVFormat, quantise
from farshore.kvstore.store.arena.arena import stride_bytes


class ColdKV:
    """Random KV of ``sequences`` sequences of ``tokens`` tokens in ``layers`` layers, one segment each."""

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
        """Bytes of the KV, without the rounding to blocks and pages."""
        return self.layers * self.layer_bytes

    def plan_separate(self, implementation: Implementation) -> Any:
        """A plan of one row per sequence, which reads that sequence."""
        items = [(row, 1, row, 0, self.layout.groups) for row in range(self.sequences)]
        return self._plan(implementation, items, self.sequences)

    def plan_shared(self, implementation: Implementation, rows: int) -> Any:
        """A plan of ``rows`` rows, which all read the first sequence."""
        return self._plan(implementation, [(0, rows, 0, 0, self.layout.groups)], rows)

    def _plan(
        self, implementation: Implementation, items: list[tuple[int, int, int, int, int]], rows: int
    ) -> Any:
        return implementation.plan(
            WorkList.of(items),
            self.segments,
            self.memory,
            self.layout,
            self.shape.spec,
            positions=torch.full((rows,), self.tokens),
        )

    def _fill(self, stride: int) -> None:
        """Copies one random layer of one block to all, because generating gigabytes would take minutes."""
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
    """Bytes that attention of ``sequences`` sequences reads in one layer."""
    return sequences * tokens * KVLayout.of(shape.spec, layers=1, format=format).token_bytes


def query(shape: Shape, rows: int) -> tuple[Tensor, State]:
    """A random q of ``rows`` rows in bf16, and memory for their state."""
    q = torch.randn(rows, shape.q_heads, shape.dim, generator=torch.Generator().manual_seed(1))
    return q.to(torch.bfloat16), State.identity(rows, shape.q_heads, shape.dim, device="cpu")
