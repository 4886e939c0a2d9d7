"""Calls that move whole spans: write, digest, export and import, parity and rebuild.

Called by ``benchmark``. Each is compared with memcpy in the same run. Both use one thread. Rates count each
byte of a span once, however often it passes through memory.
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
    Setting,
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


def write(setting: Setting) -> Measured:
    """Writes a span layer by layer, as prefill does. Two spans alternate, so that neither stays in the
    caches."""
    store = store_for(setting.sizes.span_tokens, spans=2)
    spans = [_create(setting, store, f"s{i}") for i in range(2)]
    sources = [random_bytes(_span_bytes(setting)) for _ in spans]
    alternating = cycle(zip(spans, sources, strict=True))
    copies = cycle([memcpy(source) for source in sources])
    timed = _timed(
        setting, {"write": lambda: _write(store, *next(alternating)), "memcpy": lambda: next(copies)()}
    )
    name = f"bulk write of {_name(setting)}"
    figures, percent = _rates(setting, timed, "write")
    return [Result(name, timed["write"], figures)], [
        Bar.at_least(name, percent, BAR_WRITE_PERCENT, "% of memcpy bandwidth")
    ]


def digest(setting: Setting) -> Measured:
    """Digests a sealed span: the memory traffic that sealing adds to writing."""
    store, spans = _sealed(setting, 2)
    alternating = cycle(spans)
    copy = memcpy(random_bytes(_span_bytes(setting)))
    timed = _timed(
        setting,
        {
            "digest": lambda: transfer.digest(
                store.chunk_images(next(alternating), 0, setting.sizes.span_tokens)
            ),
            "memcpy": copy,
        },
    )
    figures, _ = _rates(setting, timed, "digest")
    return [Result(f"digest of {_name(setting)}", timed["digest"], figures)], []


def move(setting: Setting) -> Measured:
    """Moves a span to another store of the process: checksum, verify, write and seal."""
    store, (span,) = _sealed(setting, 1)
    other = store_for(setting.sizes.span_tokens, spans=1, name="other")
    copy = memcpy(random_bytes(_span_bytes(setting)))

    def export_and_import() -> None:
        chunks = store.export(span, 0, setting.sizes.span_tokens)
        _drop(other, other.import_span(chunks, sequence=SequenceId("s"), epoch=EPOCH))

    timed = _timed(setting, {"move": export_and_import, "memcpy": copy})
    figures, _ = _rates(setting, timed, "move")
    return [Result(f"export and import of {_name(setting)}", timed["move"], figures)], []


def encode_and_rebuild(setting: Setting) -> Measured:
    """Computes the parity of several spans, and rebuilds one of them."""
    tokens, members = setting.sizes.span_tokens, setting.sizes.members
    store, spans = _sealed(setting, members)
    other = store_for(tokens, spans=3, name="other")
    copy = memcpy(random_bytes(_span_bytes(setting)))
    group = _encode(setting, store, spans, other)
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

    _check_equal(setting, store, lost, other, rebuild())
    timed = _timed(
        setting,
        {
            "encode": lambda: _drop(other, _encode(setting, store, spans, other)),
            "memcpy": copy,
            "rebuild": lambda: _drop(other, rebuild()),
        },
    )
    encoded, rebuilt = (
        f"parity of {members} x {_name(setting)}",
        f"rebuild of {_name(setting)} out of {members} others",
    )
    figures, percent = _rates(setting, timed, "encode", spans=members)
    return [
        Result(encoded, timed["encode"], figures),
        Result(rebuilt, timed["rebuild"], _rates(setting, timed, "rebuild")[0]),
    ], [
        Bar.at_least(encoded, percent, BAR_ENCODE_PERCENT, "% of memcpy bandwidth"),
        Bar.at_most(rebuilt, timed["rebuild"].median_s, BAR_REBUILD_S, "s"),
    ]


def _encode(setting: Setting, store: LocalStore, spans: list[SpanId], other: LocalStore) -> SpanId:
    tokens = setting.sizes.span_tokens
    members = {
        span: Member(store.chunk_images(span, 0, tokens), store.digest(span, tokens)) for span in spans
    }
    return parity.encode(other, members, sequence=GROUP, epoch=EPOCH)


def _check_equal(
    setting: Setting, store: LocalStore, span: SpanId, other: LocalStore, rebuilt: SpanId
) -> None:
    """Asserts that layer 0 was rebuilt bit for bit, and drops the rebuilt span."""
    tokens = setting.sizes.span_tokens
    pairs = zip(
        store.read(span, 0, 0, tokens, sequence=_holder(store, span)),
        other.read(rebuilt, 0, 0, tokens, sequence=_holder(other, rebuilt)),
        strict=True,
    )
    assert all(torch.equal(original, copy) for original, copy in pairs), "the rebuilt span differs"
    _drop(other, rebuilt)


def _drop(store: LocalStore, span: SpanId) -> None:
    store.drop([span], sequence=_holder(store, span), epoch=EPOCH)


def _holder(store: LocalStore, span: SpanId) -> SequenceId:
    """The sequence that the span was granted to."""
    (info,) = [info for info in store.announce() if info.span == span]
    return info.key.sequence


def _sealed(setting: Setting, count: int) -> tuple[LocalStore, list[SpanId]]:
    """A store with ``count`` sealed spans of different content."""
    store = store_for(setting.sizes.span_tokens, spans=count)
    source = random_bytes(_span_bytes(setting) + 2 * count)
    spans = []
    for i in range(count):
        spans.append(_create(setting, store, f"s{i}"))
        _write(store, spans[-1], source[2 * i : 2 * i + _span_bytes(setting)])
        store.seal(spans[-1], setting.sizes.span_tokens, sequence=SequenceId(f"s{i}"), epoch=EPOCH)
    return store, spans


def _create(setting: Setting, store: LocalStore, sequence: str) -> SpanId:
    return store.create(key(sequence), capacity_tokens=setting.sizes.span_tokens, layout=LAYOUT, epoch=EPOCH)


def _write(store: LocalStore, span: SpanId, source: Tensor) -> None:
    sequence = _holder(store, span)
    kv = source.view(torch.bfloat16).view(LAYERS, 2, LAYOUT.k_heads, -1, LAYOUT.k_dim)
    for layer, (k, v) in enumerate(kv):
        store.write(span, layer, 0, k, v, sequence=sequence, epoch=EPOCH)


def _span_bytes(setting: Setting) -> int:
    return setting.sizes.span_tokens * LAYOUT.token_bytes


def _name(setting: Setting) -> str:
    return f"{setting.sizes.span_tokens} tokens, {LAYERS} layers of SmolLM2"


def _timed(setting: Setting, candidates: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    return interleave(candidates, rounds=setting.sizes.rounds, limit_s=setting.sizes.limit_s)


def _rates(
    setting: Setting, timed: Mapping[str, Timing], case: str, *, spans: int = 1
) -> tuple[dict[str, float | int | str | None], float]:
    """(figures of a case that moves ``spans`` spans, its percentage of memcpy's bandwidth).
    ``timed["memcpy"]`` copied one span."""
    span_bytes = _span_bytes(setting)
    percent = 100 * spans * timed["memcpy"].over(timed[case])
    gbps = spans * span_bytes / timed[case].median_s / 1e9
    return {
        "bytes": spans * span_bytes,
        "gbps": gbps,
        "memcpy_gbps_in_turn": span_bytes / timed["memcpy"].median_s / 1e9,
        "percent_of_memcpy": percent,
        "percent_of_copy_in_all_threads": 100 * gbps / setting.rates.copy_gbps,
    }, percent
