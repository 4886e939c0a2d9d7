"""Calls of the store that move few bytes or none. Their time adds to a step or to the control plane.

Called by ``benchmark``.
"""

import torch

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.kvstore.setting import EPOCH, LAYERS, LAYOUT, Setting, key, store_for
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import interleave
from farshore.ids import SequenceId, WorkerId
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.store.arena.arena import Arena, stride_bytes
from farshore.kvstore.store.store import LocalStore
from farshore.kvstore.store.tail import Tail, TailBatch

BAR_APPEND_MS = 1.0
BAR_FORK_MS = 1.0
BAR_ANNOUNCE_MS = 100.0
SMALL = KVLayout(1, 1, 1, 1, 4, 4, KVFormat.BFLOAT16)
"""One page a block, for cases whose time depends on the number of spans and not on their bytes."""


def append(setting: Setting) -> Measured:
    """Appends one token to each tail of a batch: the calls of one step, one per layer. The construction of
    the batch is timed apart."""
    arena = Arena(setting.sizes.batch * stride_bytes(LAYOUT.block_bytes))
    tails = [Tail(arena=arena, layout=LAYOUT, start=0) for _ in range(setting.sizes.batch)]
    k, v = torch.randn(2, setting.sizes.batch, LAYOUT.k_heads, LAYOUT.k_dim).to(torch.bfloat16)
    positions = [0] * setting.sizes.batch
    batch = TailBatch(tails, positions)

    def step() -> None:
        for layer in range(LAYERS):
            batch.append(layer, k, v)

    timed = interleave(
        {"append": step, "batch": lambda: TailBatch(tails, positions)},
        rounds=setting.sizes.rounds,
        calls=setting.sizes.calls,
        limit_s=setting.sizes.limit_s,
    )
    name = f"tail append, {setting.sizes.batch} sequences, {LAYERS} layers of SmolLM2"
    figures = {"making_the_batch_ms": timed["batch"].median_s * 1e3}
    return [Result(name, timed["append"], figures)], [
        Bar.at_most(name, timed["append"].median_s * 1e3, BAR_APPEND_MS, "ms")
    ]


def fork(setting: Setting) -> Measured:
    """Holds all spans of a sealed prompt for a second sequence, as a fork does, and drops them."""
    tokens, span_tokens = setting.sizes.prefix_tokens, setting.sizes.prefix_span_tokens
    store = store_for(span_tokens, spans=-(-tokens // span_tokens), layout=SMALL)
    spans = [
        store.create(
            key("s", layout=SMALL, first=first), capacity_tokens=span_tokens, layout=SMALL, epoch=EPOCH
        )
        for first in range(0, tokens, span_tokens)
    ]
    child = SequenceId("child")
    free_bytes = store.usage().free_bytes
    store.hold(spans, sequence=child, epoch=EPOCH)
    new_bytes = free_bytes - store.usage().free_bytes
    store.drop(spans, sequence=child, epoch=EPOCH)

    def fork_and_drop() -> None:
        store.hold(spans, sequence=child, epoch=EPOCH)
        store.drop(spans, sequence=child, epoch=EPOCH)

    timed = interleave(
        {"fork": fork_and_drop},
        rounds=setting.sizes.rounds,
        calls=setting.sizes.calls,
        limit_s=setting.sizes.limit_s,
    )
    name = f"fork of {tokens} tokens in {len(spans)} spans, and its drop"
    return [Result(name, timed["fork"])], [
        Bar.at_most(name, timed["fork"].median_s * 1e3, BAR_FORK_MS, "ms"),
        Bar.at_most(name, new_bytes / SMALL.block_bytes, 0.0, "new blocks"),
    ]


def announce(setting: Setting) -> Measured:
    """Lists all spans of a store."""
    store = LocalStore(
        worker=WorkerId("bench"), arena=Arena(setting.sizes.spans * stride_bytes(SMALL.block_bytes))
    )
    for i in range(setting.sizes.spans):
        store.create(key(f"s{i % 100}", layout=SMALL), capacity_tokens=1, layout=SMALL, epoch=EPOCH)
    timed = interleave(
        {"announce": store.announce}, rounds=setting.sizes.rounds, limit_s=setting.sizes.limit_s
    )
    name = f"announce of {setting.sizes.spans} spans"
    return [Result(name, timed["announce"])], [
        Bar.at_most(name, timed["announce"].median_s * 1e3, BAR_ANNOUNCE_MS, "ms")
    ]
