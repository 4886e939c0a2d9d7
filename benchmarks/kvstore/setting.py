"""Shared by the store's benchmarks: sizes, stores to measure, and the memcpy to compare with.

Called by ``benchmark`` and its cases.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from farshore.benchmarks.kernels.implementation import Implementation
from farshore.benchmarks.kernels.shapes import SMOLLM2
from farshore.benchmarks.machine import Facts, MachineSizes, Rates
from farshore.benchmarks.memory import allocate
from farshore.benchmarks.timing import ROUNDS
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import SpanKey
from farshore.kvstore.store.arena.arena import Arena, stride_bytes
from farshore.kvstore.store.store import LocalStore

LAYERS = 30
"""Layers of SmolLM2."""
LAYOUT = KVLayout.of(SMOLLM2.spec, layers=LAYERS, format=KVFormat.BFLOAT16)
EPOCH = Epoch(1)


@dataclass(frozen=True, slots=True)
class StoreSizes:
    """Sizes of the measurements. The defaults are those of the bars; tests use tiny ones."""

    span_tokens: int = 8 << 10
    members: int = 4
    """Spans of a parity group."""
    prefix_tokens: int = 32 << 10
    prefix_span_tokens: int = 512
    """Tokens in each span of the prefix, as prefill creates them if a shard gets a segment at a time."""
    batch: int = 64
    """Sequences that a step appends a token to."""
    spans: int = 10_000
    """Spans in the store that announces them."""
    decode_tokens: int = 32 << 10
    decode_kv_bytes: int = 1 << 30
    """KV that the calls cycle through; it exists twice, in one plain tensor and in the store."""
    rounds: int = ROUNDS
    calls: int = 20
    """Calls in one timed run, for cases that take microseconds."""
    limit_s: float = 8.0
    """Time limit of one comparison; see ``timing.interleave``."""
    machine: MachineSizes = field(default_factory=MachineSizes)


class Setting(NamedTuple):
    """The arguments of every case."""

    implementation: Implementation
    machine: Facts
    rates: Rates
    sizes: StoreSizes


def key(sequence: str, *, layout: KVLayout = LAYOUT, first: int = 0) -> SpanKey:
    return SpanKey(sequence=SequenceId(sequence), layer_class=0, first=first, group0=0, group1=layout.groups)


def store_for(tokens: int, *, spans: int, layout: KVLayout = LAYOUT, name: str = "bench") -> LocalStore:
    """An empty store with memory for ``spans`` spans of ``tokens`` tokens. Its arena keeps all freed memory
    committed."""
    blocks = spans * -(-tokens // layout.block_tokens)
    budget_bytes = blocks * stride_bytes(layout.block_bytes)
    return LocalStore(worker=WorkerId(name), arena=Arena(budget_bytes, spare_bytes=budget_bytes))


def random_bytes(size_bytes: int) -> Tensor:
    """``u8[size_bytes]`` in huge pages: 1 MiB of random bf16 values, repeated."""
    memory = allocate(size_bytes)
    values = torch.randn(1 << 19, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    for piece in memory.split(2 << 19):
        piece.copy_(values.view(torch.uint8)[: piece.numel()])
    return memory


def memcpy(source: Tensor) -> Callable[[], None]:
    """A function that copies ``source``, in one thread, to memory that was touched before."""
    target = allocate(source.numel())
    target.fill_(1)
    return lambda: np.copyto(target.numpy(), source.numpy())
