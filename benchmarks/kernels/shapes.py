"""The attention shapes that the bars name, and the sizes they are measured at.

Used by the kernel benchmarks.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from farshore.benchmarks.machine import MachineSizes
from farshore.benchmarks.timing import ROUNDS
from farshore.kernels.base import AttentionSpec


class Shape(NamedTuple):
    kv_heads: int
    group: int
    """Query heads on each KV head."""
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
"""Llama 70B's: the arithmetic per byte is twice that of 8B."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: by default what the bars say; tests make it tiny."""

    context_tokens: int = 32 << 10
    shared_tokens: int = 8 << 10
    shared_rows: int = 16
    kv_bytes: int | None = None
    """Least KV that is cycled through in each comparison; None: enough that none of it is still cached."""
    new_tokens: int = 2048
    past_tokens: tuple[int, ...] = (0, 8 << 10, 32 << 10)
    sdpa_run_s: float = 1.0
    """PyTorch's SDPA is measured on so many of the new tokens that a run takes about this at most."""
    rounds: int = ROUNDS
    calls: int = 100
    """Per timed run, of what takes microseconds."""
    limit_s: float = 12.0
    """Per comparison; see ``timing.interleave``."""
    machine: MachineSizes = field(default_factory=MachineSizes)
