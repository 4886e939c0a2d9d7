"""Cases of ``partial`` in decode, where a query row reads all KV of a long sequence once and computes little.

Called by ``benchmark``. The candidates alternate and take one layer after another, so that each layer's KV
comes from memory: all other KV is read between two reads of a layer.
"""

from collections.abc import Callable, Mapping
from itertools import chain, cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from farshore.benchmarks.kernels.cold import ColdKV, layer_bytes, query
from farshore.benchmarks.kernels.implementation import Setting
from farshore.benchmarks.kernels.shapes import Shape
from farshore.benchmarks.machine import CACHES_PER_BUFFER, READERS, UNKNOWN_L3_BYTES, available_bytes
from farshore.benchmarks.memory import allocate
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing, interleave
from farshore.kernels.formats import KVFormat

MOST_KV_BYTES = 8 << 30
READ_BYTES = 64 << 20
"""Bytes that one call of the reader reads: enough to make its overhead negligible. The pieces of the memory,
which is many times a cache, are read in turn."""
BAR_TIMES_SDPA = 3.0
BAR_TIMES_SEPARATE = 4.0


def against_bandwidth(
    setting: Setting, *, shape: Shape, bar_percent: float, bar_sdpa: bool
) -> tuple[list[Result], list[Bar]]:
    """One sequence in bf16, compared with the machine's fastest reader and PyTorch's SDPA."""
    kv = _cold(setting, shape, KVFormat.BFLOAT16, sequences=1, tokens=setting.sizes.context_tokens)
    contiguous = _random(kv.bytes)
    read_bytes = min(READ_BYTES, kv.bytes)
    timed = _timed(
        setting,
        {
            "partial": _partial(setting, kv),
            "sdpa": _sdpa(kv, contiguous),
            "read": _read(contiguous, read_bytes, READERS[setting.rates.reader]),
        },
        bytes_a_round=2 * kv.layer_bytes + read_bytes,
        least_run_s=setting.sizes.machine.least_run_s,
    )
    figures = _figures(setting, kv, timed["partial"])
    # A reader that was disturbed here would make the percentage too high, so its better rate counts.
    percent = min(
        100 * timed["read"].over(timed["partial"]) * kv.layer_bytes / read_bytes,
        100 * kv.layer_bytes / timed["partial"].median_s / 1e9 / setting.rates.read_gbps,
    )
    times = timed["sdpa"].over(timed["partial"])
    figures |= {
        "read_gbps_in_turn": read_bytes / timed["read"].median_s / 1e9,
        "percent_of_read": percent,
        "sdpa_ms": timed["sdpa"].median_s * 1e3,
        "sdpa_gbps": kv.layer_bytes / timed["sdpa"].median_s / 1e9,
        "times_faster_than_sdpa": times,
    }
    name = _name(kv)
    bars = [Bar.at_least(name, percent, bar_percent, "% of read bandwidth")]
    if bar_sdpa:
        bars.append(Bar.at_least(name, times, BAR_TIMES_SDPA, "x PyTorch SDPA"))
    return [Result(name, timed["partial"], figures)], bars


def against_bfloat16(
    setting: Setting, *, shape: Shape, format: KVFormat, bar_times: float
) -> tuple[list[Result], list[Bar]]:
    """One sequence in a quantised format, compared with the same in bf16, in tokens per second."""
    tokens = setting.sizes.context_tokens
    plain = _cold(setting, shape, KVFormat.BFLOAT16, sequences=1, tokens=tokens)
    quantised = _cold(setting, shape, format, sequences=1, tokens=tokens)
    timed = _timed(
        setting,
        {"bfloat16": _partial(setting, plain), "quantised": _partial(setting, quantised)},
        bytes_a_round=plain.layer_bytes + quantised.layer_bytes,
        least_run_s=setting.sizes.machine.least_run_s,
    )
    times = timed["bfloat16"].over(timed["quantised"])
    figures = _figures(setting, quantised, timed["quantised"]) | {
        "bfloat16_ms_in_turn": timed["bfloat16"].median_s * 1e3,
        "times_faster_than_bfloat16": times,
    }
    name = _name(quantised)
    return [Result(name, timed["quantised"], figures)], [
        Bar.at_least(name, times, bar_times, "x bfloat16 tokens/s")
    ]


def shared_against_separate(setting: Setting, *, shape: Shape) -> tuple[list[Result], list[Bar]]:
    """Rows that share one segment, compared with as many rows on segments of their own."""
    rows, tokens = setting.sizes.shared_rows, setting.sizes.shared_tokens
    kv = _cold(setting, shape, KVFormat.BFLOAT16, sequences=rows, tokens=tokens)
    timed = _timed(
        setting,
        {
            "separate": _partial(setting, kv),
            # Separate rows read the shared sequence too, half of all layers earlier, so it is not cached.
            "shared": _partial(setting, kv, shared_rows=rows, first_layer=kv.layers // 2),
        },
        bytes_a_round=kv.layer_bytes,
        # In longer runs the shared segment's layers would be read again while they are still cached.
        least_run_s=setting.sizes.machine.least_run_s / 10,
    )
    separate = Result(_name(kv), timed["separate"], _figures(setting, kv, timed["separate"]))
    times = timed["separate"].over(timed["shared"])
    shared = Result(
        f"decode bfloat16, {rows} rows on one {tokens} tokens, {shape}",
        timed["shared"],
        {
            "tokens_per_s_in_a_layer": rows / timed["shared"].median_s,
            "times_faster_than_separate": times,
        },
    )
    return [separate, shared], [
        Bar.at_least(shared.name, times, BAR_TIMES_SEPARATE, f"x {rows} separate segments")
    ]


def _cold(setting: Setting, shape: Shape, format: KVFormat, *, sequences: int, tokens: int) -> ColdKV:
    """KV with so many layers that it does not fit in a cache, if there is enough memory."""
    l3_bytes = setting.machine.l3_bytes or UNKNOWN_L3_BYTES
    # Two of them are compared, and other processes may need memory.
    wanted = min(CACHES_PER_BUFFER * l3_bytes, MOST_KV_BYTES, available_bytes(setting.machine) // 4)
    one_layer = layer_bytes(shape, format, sequences=sequences, tokens=tokens)
    layers = (setting.sizes.kv_bytes or wanted) // one_layer + 1
    return ColdKV(shape, format, sequences=sequences, tokens=tokens, layers=layers)


def _timed(
    setting: Setting,
    candidates: Mapping[str, Callable[[], object]],
    *,
    bytes_a_round: int,
    least_run_s: float = 0.0,
) -> dict[str, Timing]:
    """Times the candidates alternately. The warm-up reads twice the size of the cache, so nothing remains
    cached from filling the memory. ``bytes_a_round``: the bytes that one call of each candidate reads."""
    l3_bytes = setting.machine.l3_bytes or UNKNOWN_L3_BYTES
    return interleave(
        candidates,
        rounds=setting.sizes.rounds,
        warm_up=2 + 2 * l3_bytes // bytes_a_round,
        least_run_s=least_run_s,
        limit_s=setting.sizes.limit_s,
    )


def _partial(
    setting: Setting, kv: ColdKV, *, shared_rows: int | None = None, first_layer: int = 0
) -> Callable[[], None]:
    """A function that calls ``partial`` for the next layer each time."""
    if shared_rows is None:
        plan = kv.plan_separate(setting.implementation)
    else:
        plan = kv.plan_shared(setting.implementation, shared_rows)
    q, out = query(kv.shape, shared_rows or kv.sequences)
    layers = cycle(chain(range(first_layer, kv.layers), range(first_layer)))
    return lambda: setting.implementation.partial(plan, next(layers), q, out=out)


def _sdpa(kv: ColdKV, memory: Tensor) -> Callable[[], Tensor]:
    """A function that does the same work by SDPA, in its best layout: contiguous K and V per layer."""
    shape = kv.shape
    layers = memory.view(torch.bfloat16).view(kv.layers, 2, 1, shape.kv_heads, kv.tokens, shape.dim)
    q = query(shape, 1)[0].view(1, shape.q_heads, 1, shape.dim)
    next_kv = cycle(layers.unbind())
    return lambda: F.scaled_dot_product_attention(q, *next(next_kv), enable_gqa=True)


def _read(memory: Tensor, read_bytes: int, reader: Callable[[Tensor], object]) -> Callable[[], object]:
    """A function that reads the next piece each time."""
    pieces = memory[: memory.numel() // read_bytes * read_bytes].split(read_bytes)
    middle = len(pieces) // 2
    piece = cycle(pieces[middle:] + pieces[:middle])
    return lambda: reader(next(piece))


def _random(size_bytes: int) -> Tensor:
    """Random bf16 values as bytes; 1 MiB of them is repeated."""
    memory = allocate(size_bytes)
    values = torch.randn(1 << 19, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    for piece in memory.view(torch.bfloat16).split(values.numel()):
        piece.copy_(values[: piece.numel()])
    return memory


def _name(kv: ColdKV) -> str:
    return f"decode {kv.layout.format.value}, {kv.sequences} x {kv.tokens} tokens, {kv.shape}"


def _figures(setting: Setting, kv: ColdKV, timing: Timing) -> dict[str, float | int | None]:
    l3_bytes = setting.machine.l3_bytes
    return {
        "tokens_per_s_in_a_layer": kv.sequences / timing.median_s,
        "gbps": kv.layer_bytes / timing.median_s / 1e9,
        "layers": kv.layers,
        "kv_bytes": kv.bytes,
        "kv_of_l3": kv.bytes / l3_bytes if l3_bytes else None,
    }
