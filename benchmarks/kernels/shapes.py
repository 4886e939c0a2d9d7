"""The shapes and sizes of the kernel benchmarks. The store and offload benchmarks use the shapes too."""

from dataclasses import dataclass, field
from typing import NamedTuple

from farshore.benchmarks.machine import MachineSizes
from farshore.benchmarks.timing import ROUNDS
from farshore.kernels.base import AttentionSpec


class Shape(NamedTuple):
    """Attention with equal K and V heads."""

    kv_heads: int
    group: int
    """Query heads per KV head."""
    dim: int

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            self.q_heads, self.kv_heads, self.kv_heads, self.dim, self.dim, scale=self.dim**-0.5
        )

    def __str__(self) -> str:
        return f"{self.q_heads}/{self.kv_heads} heads d {self.dim}"


LLAMA_8B = Shape(kv_heads=8, group=4, dim=128)
SMOLLM2 = Shape(kv_heads=3, group=3, dim=64)
WIDE = Shape(kv_heads=8, group=8, dim=128)
"""Llama 70B's shape, with twice the arithmetic per byte of LLAMA_8B."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. The defaults are those of the bars; tests use tiny sizes."""

    context_tokens: int = 32 << 10
    shared_tokens: int = 8 << 10
    shared_rows: int = 16
    kv_bytes: int | None = None
    """The least KV that each comparison cycles through; None: so much that none of it remains cached."""
    new_tokens: int = 2048
    past_tokens: tuple[int, ...] = (0, 8 << 10, 32 << 10)
    sdpa_run_s: float = 1.0
    """The approximate length of a run of PyTorch's SDPA, which takes only some of the new tokens."""
    rounds: int = ROUNDS
    calls: int = 100
    """Calls per timed run, of functions that take microseconds."""
    limit_s: float = 12.0
    """The limit of one comparison; see ``timing.interleave``."""
    machine: MachineSizes = field(default_factory=MachineSizes)
