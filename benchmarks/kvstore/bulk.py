"""What moves whole spans: written, digested, exported and imported, covered by parity and rebuilt.

Called by ``kvstore``. All is held against memcpy in the same run, in one thread, as the store's own work is;
rates are per byte of the spans, however often it passes through memory.
"""

from collections.abc import Callable, Mapping
from itertools import cycle

import torch
from torch import Tensor

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.kvstore.setting import (
    EPOCH,
    LAYERS,
    LAYOUT,
    At,
    key,
    memcpy,
    random_bytes,
    store_for,
)
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing, interleave
from farshore.ids import SequenceId, SpanId
from farshore.kvstore.store import parity, transfer
from farshore.kvstore.store.parity import Member
from farshore.kvstore.store.store import LocalStore

BAR_WRITE_PERCENT = 60.0
BAR_ENCODE_PERCENT = 40.0
BAR_REBUILD_S = 0.5
GROUP = SequenceId("parity")


def write(at: At) -> Measured:
    """A span layer by layer, as prefill does; two in turn, so that neither is still cached."""
    store = store_for(at.sizes.span_tokens, spans=2)
    spans = [_create(at, store, f"s{i}") for i in range(2)]
    sources = [random_bytes(_span_bytes(at)) for _ in spans]
    turn = cycle(zip(spans, sources, strict=True))
    copies = cycle([memcpy(source) for source in sources])
    timed = _timed(at, {"write": lambda: _write(store, *next(turn)), "memcpy": lambda: next(copies)()})
    name = f"bulk write of {_name(at)}"
    figures, percent = _rates(at, timed, "write")
    return [Result(name, timed["write"], figures)], [
        Bar.at_least(name, percent, BAR_WRITE_PERCENT, "% of memcpy bandwidth")
    ]


def digest(at: At) -> Measured:
    """What sealing adds to writing, in memory bandwidth."""
    store, spans = _sealed(at, 2)
    turn = cycle(spans)
    copy = memcpy(random_bytes(_span_bytes(at)))
    timed = _timed(
        at,
        {
            "digest": lambda: transfer.digest(store.chunk_images(next(turn), 0, at.sizes.span_tokens)),
            "memcpy": copy,
        },
    )
    figures, _ = _rates(at, timed, "digest")
    return [Result(f"digest of {_name(at)}", timed["digest"], figures)], []


def move(at: At) -> Measured:
    """From one store into another of the same process: checksummed, verified, written, sealed."""
    store, (span,) = _sealed(at, 1)
    other = store_for(at.sizes.span_tokens, spans=1, name="other")
    copy = memcpy(random_bytes(_span_bytes(at)))

    def export_and_import() -> None:
        chunks = store.export(span, 0, at.sizes.span_tokens)
        _given_back(other, other.import_span(chunks, sequence=SequenceId("s"), epoch=EPOCH))

    timed = _timed(at, {"move": export_and_import, "memcpy": copy})
    figures, _ = _rates(at, timed, "move")
    return [Result(f"export and import of {_name(at)}", timed["move"], figures)], []


def encode_and_rebuild(at: At) -> Measured:
    tokens, members = at.sizes.span_tokens, at.sizes.members
    store, spans = _sealed(at, members)
    other = store_for(tokens, spans=3, name="other")
    copy = memcpy(random_bytes(_span_bytes(at)))
    group = _encode(at, store, spans, other)
    (info,) = other.announce()
    lost, *survivors = spans

    def rebuild() -> SpanId:
        return parity.rebuild(
            other,
            lost,
            info.covers,
            parity=other.chunk_images(group, 0, tokens),
            survivors={span: store.chunk_images(span, 0, tokens) for span in survivors},
            sequence=SequenceId("rebuilt"),
            epoch=EPOCH,
        )

    _check_equal(at, store, lost, other, rebuild())
    timed = _timed(
        at,
        {
            "encode": lambda: _given_back(other, _encode(at, store, spans, other)),
            "memcpy": copy,
            "rebuild": lambda: _given_back(other, rebuild()),
        },
    )
    encoded, rebuilt = f"parity of {members} x {_name(at)}", f"rebuild of {_name(at)} out of {members} others"
    figures, percent = _rates(at, timed, "encode", spans=members)
    return [
        Result(encoded, timed["encode"], figures),
        Result(rebuilt, timed["rebuild"], _rates(at, timed, "rebuild")[0]),
    ], [
        Bar.at_least(encoded, percent, BAR_ENCODE_PERCENT, "% of memcpy bandwidth"),
        Bar.at_most(rebuilt, timed["rebuild"].median_s, BAR_REBUILD_S, "s"),
    ]


def _encode(at: At, store: LocalStore, spans: list[SpanId], other: LocalStore) -> SpanId:
    tokens = at.sizes.span_tokens
    members = {span: Member(store.chunk_images(span, 0, tokens), store.digest(span, tokens)) for span in spans}
    return parity.encode(other, members, sequence=GROUP, epoch=EPOCH)


def _check_equal(at: At, store: LocalStore, span: SpanId, other: LocalStore, rebuilt: SpanId) -> None:
    """And gives the rebuilt span back."""
    tokens = at.sizes.span_tokens
    pairs = zip(
        store.read(span, 0, 0, tokens, sequence=_holder(store, span)),
        other.read(rebuilt, 0, 0, tokens, sequence=_holder(other, rebuilt)),
        strict=True,
    )
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs), "rebuilt to something else"
    _given_back(other, rebuilt)


def _given_back(store: LocalStore, span: SpanId) -> None:
    store.drop([span], sequence=_holder(store, span), epoch=EPOCH)


def _holder(store: LocalStore, span: SpanId) -> SequenceId:
    """The sequence that it was granted to."""
    (info,) = [info for info in store.announce() if info.span == span]
    return info.key.sequence


def _sealed(at: At, count: int) -> tuple[LocalStore, list[SpanId]]:
    """A store with that many spans, all of their own content."""
    store = store_for(at.sizes.span_tokens, spans=count)
    source = random_bytes(_span_bytes(at) + 2 * count)
    spans = []
    for i in range(count):
        spans.append(_create(at, store, f"s{i}"))
        _write(store, spans[-1], source[2 * i : 2 * i + _span_bytes(at)])
        store.seal(spans[-1], at.sizes.span_tokens, sequence=SequenceId(f"s{i}"), epoch=EPOCH)
    return store, spans


def _create(at: At, store: LocalStore, sequence: str) -> SpanId:
    return store.create(key(sequence), capacity_tokens=at.sizes.span_tokens, layout=LAYOUT, epoch=EPOCH)


def _write(store: LocalStore, span: SpanId, source: Tensor) -> None:
    sequence = _holder(store, span)
    kv = source.view(torch.bfloat16).view(LAYERS, 2, LAYOUT.k_heads, -1, LAYOUT.k_dim)
    for layer, (k, v) in enumerate(kv):
        store.write(span, layer, 0, k, v, sequence=sequence, epoch=EPOCH)


def _span_bytes(at: At) -> int:
    return at.sizes.span_tokens * LAYOUT.token_bytes


def _name(at: At) -> str:
    return f"{at.sizes.span_tokens} tokens, {LAYERS} layers of SmolLM2"


def _timed(at: At, candidates: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    return interleave(candidates, rounds=at.sizes.rounds, limit_s=at.sizes.limit_s)


def _rates(
    at: At, timed: Mapping[str, Timing], of: str, *, spans: int = 1
) -> tuple[dict[str, float | int | str | None], float]:
    """What is said of a case, and its percent of memcpy's bandwidth, which copied one span."""
    span_bytes = _span_bytes(at)
    percent = 100 * spans * timed["memcpy"].over(timed[of])
    gbps = spans * span_bytes / timed[of].median_s / 1e9
    return {
        "bytes": spans * span_bytes,
        "gbps": gbps,
        "memcpy_gbps_in_turn": span_bytes / timed["memcpy"].median_s / 1e9,
        "percent_of_memcpy": percent,
        "percent_of_copy_in_all_threads": 100 * gbps / at.rates.copy_gbps,
    }, percent
