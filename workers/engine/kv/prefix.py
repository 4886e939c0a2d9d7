"""Prompts whose beginning is stored already: what stands for a model's KV, and how hits are put together.

Every store answers for itself, with gaps; a prefix is of use only where all head groups of all its positions
lie somewhere. Called by ``cache`` and by whoever starts an engine. It must not talk to stores.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from farshore.attention_offload.base import AttentionModel
from farshore.ids import WorkerId
from farshore.kernels.base import BLOCK_TOKENS
from farshore.kvstore.base import SpanSlice
from farshore.models.config import ModelConfig
from farshore.workers.engine.sequence import PlacedSpan


def fingerprint(config: ModelConfig, attention: AttentionModel, *, revision: str, salt: str = "") -> bytes:
    """Stands for all that KV depends on beside tokens: the model's shape and constants, which weights
    (``revision``), how KV is stored, and whose it is (``salt``: tenants do not share)."""
    parts = (repr(config), repr(attention.specs), repr(attention.layouts), revision, salt)
    # Lengths first, so that no two lists of parts look alike.
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).digest()


def assemble(found: Mapping[WorkerId, Sequence[SpanSlice]], *, groups: int) -> list[PlacedSpan]:
    """The longest prefix that lies somewhere in all of its head groups, each position and group once, as
    sealed spans in span order."""
    by_block: dict[int, list[tuple[WorkerId, SpanSlice]]] = defaultdict(list)
    for worker, slices in found.items():
        for it in slices:
            for first in range(it.first, it.last, BLOCK_TOKENS):
                by_block[first].append((worker, it))
    placed: list[PlacedSpan] = []
    reached = 0
    going_on: dict[tuple[WorkerId, str], PlacedSpan] = {}
    while cover := _cover(by_block[reached], groups, going_on):
        before, going_on = going_on, {}
        for worker, it in cover:
            span = before.get((worker, it.span))
            if span is None:
                key = it.key
                span = PlacedSpan(
                    worker,
                    it.span,
                    reached,
                    reached,
                    key.group0,
                    key.group1,
                    sealed=reached,
                    origin=key.first,
                    capacity=reached,
                )
                placed.append(span)
            span.last = span.sealed = span.capacity = reached + BLOCK_TOKENS
            going_on[worker, it.span] = span
        reached += BLOCK_TOKENS
    return placed


def _cover(
    here: list[tuple[WorkerId, SpanSlice]], groups: int, before: Mapping[tuple[WorkerId, str], PlacedSpan]
) -> list[tuple[WorkerId, SpanSlice]]:
    """Of the slices that hold a block, some that hold each head group once; those of the block before first,
    then those that hold most. None: no such some."""
    cover: list[tuple[WorkerId, SpanSlice]] = []
    group = 0
    while group < groups:
        options = [option for option in here if option[1].key.group0 == group]
        if not options:
            return []
        worker, best = max(options, key=lambda it: ((it[0], it[1].span) in before, it[1].key.group1, it[0]))
        cover.append((worker, best))
        group = best.key.group1
    return cover
