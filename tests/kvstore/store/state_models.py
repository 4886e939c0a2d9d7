"""Models of spans and tails as plain bytes, which the state machine compares stores with."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from farshore.ids import SequenceId, SpanId
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import CoveredSpan, SpanKey
from farshore.kvstore.store.layout import forms
from farshore.kvstore.store.store import LocalStore
from farshore.kvstore.store.tail import Tail

LAYOUTS = [
    KVLayout(2, 2, 3, 1, 8, 6, KVFormat.BFLOAT16, block_tokens=4),
    KVLayout(2, 1, 1, 1, 70, 3, KVFormat.INT4, block_tokens=4),
]
MOST_TOKENS = 11
SEQUENCES = [SequenceId(name) for name in "abc"]
GROUP = SequenceId("parity")

layouts = st.sampled_from(LAYOUTS)
sequences = st.sampled_from(SEQUENCES)
counts = st.integers(1, MOST_TOKENS)
seeds = st.integers(0, 2**31)


@dataclass(eq=False)
class SpanModel:
    """One span as it must be. ``rows[layer][token]``: the token's bytes in K and V of all heads."""

    store: LocalStore
    span: SpanId
    key: SpanKey
    layout: KVLayout
    capacity: int
    rows: list[dict[int, bytes]]
    holders: set[SequenceId]
    sealed: int = 0
    covers: tuple[CoveredSpan, ...] = ()


@dataclass(eq=False)
class TailModel:
    """One tail as it must be. ``rows[layer][position]``: the token's bytes in K and V of all heads."""

    tail: Tail
    start: int
    rows: list[dict[int, bytes]]
    end: int


class ParityGroup(NamedTuple):
    """A parity, the two spans that it covers, and the first one's content when the parity was computed."""

    parity: SpanModel
    lost: SpanModel
    other: SpanModel
    rows: list[dict[int, bytes]]
    tokens: int


def random_rows(layout: KVLayout, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random k and v as stored. Any bytes are valid."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(0, 256, (heads, tokens, size), dtype=torch.uint8, generator=generator)
        for heads, size in zip((layout.k_heads, layout.v_heads), forms.stored_bytes(layout), strict=True)
    )


def by_token(k: torch.Tensor, v: torch.Tensor) -> list[bytes]:
    """The bytes of each token: K's heads, then V's."""
    return [k[:, i].numpy().tobytes() + v[:, i].numpy().tobytes() for i in range(k.shape[1])]


def sealed_rows(model: SpanModel) -> list[dict[int, bytes]]:
    return [{token: rows[token] for token in range(model.sealed)} for rows in model.rows]


def xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))
