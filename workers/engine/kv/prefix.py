"""Stored prefixes: the fingerprint of what KV depends on, and the assembly of hits from all shards.

Each store reports the blocks that it holds, possibly with gaps. A prefix can be used only up to the first
position that is not stored for all head groups. Called by ``cache`` and ``engine``. It must not talk to
stores.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from farshore.attention_offload.base import AttentionModel
from farshore.ids import WorkerId
from farshore.kernels.base import BLOCK_TOKENS
from farshore.kvstore.base import SpanSlice
from farshore.workers.engine.sequence import PlacedSpan


def fingerprint(attention: AttentionModel, *, model_content: str, salt: str = "") -> bytes:
    """Returns the SHA-256 digest of everything that KV depends on except the tokens.

    These are the model's constants and weights (``model_content``, see models.weights.content), the layout
    and format of KV, and ``salt``: tenants with different salts share no KV (invariant 6,
    docs/architecture.md).
    """
    fields = (repr(attention.specs), repr(attention.layouts), model_content, salt)
    # Each field is prefixed with its length, so that different fields never concatenate to the same text.
    return hashlib.sha256("".join(f"{len(field)}:{field}" for field in fields).encode()).digest()


def assemble(found: Mapping[WorkerId, Sequence[SpanSlice]], *, groups: int) -> list[PlacedSpan]:
    """Returns the longest prefix that is stored for all head groups, as sealed spans in span order.

    Each position and group is covered once. ``found`` holds the slices that each worker reported.
    """
    by_block: dict[int, list[tuple[WorkerId, SpanSlice]]] = defaultdict(list)
    for worker, slices in found.items():
        for span_slice in slices:
            for first in range(span_slice.first, span_slice.last, BLOCK_TOKENS):
                by_block[first].append((worker, span_slice))
    placed: list[PlacedSpan] = []
    end = 0
    last_cover: dict[tuple[WorkerId, str], PlacedSpan] = {}
    while cover := _cover(by_block[end], groups, last_cover):
        before, last_cover = last_cover, {}
        for worker, span_slice in cover:
            span = before.get((worker, span_slice.span))
            if span is None:
                key = span_slice.key
                span = PlacedSpan(
                    worker,
                    span_slice.span,
                    end,
                    end,
                    key.group0,
                    key.group1,
                    sealed=end,
                    origin=key.first,
                    capacity=end,
                )
                placed.append(span)
            span.last = span.sealed = span.capacity = end + BLOCK_TOKENS
            last_cover[worker, span_slice.span] = span
        end += BLOCK_TOKENS
    return placed


def _cover(
    block_slices: list[tuple[WorkerId, SpanSlice]],
    groups: int,
    before: Mapping[tuple[WorkerId, str], PlacedSpan],
) -> list[tuple[WorkerId, SpanSlice]]:
    """Chooses slices of one block that cover each head group once; returns [] unless all groups are covered.

    Prefers spans that cover the previous block (``before``), then slices with more groups.
    """
    cover: list[tuple[WorkerId, SpanSlice]] = []
    group = 0
    while group < groups:
        options = [option for option in block_slices if option[1].key.group0 == group]
        if not options:
            return []
        worker, best = max(
            options,
            key=lambda option: (
                (option[0], option[1].span) in before,
                option[1].key.group1,
                option[0],
            ),
        )
        cover.append((worker, best))
        group = best.key.group1
    return cover
