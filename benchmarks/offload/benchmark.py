"""Runs the offload benchmark: the cost of the wire, and the cost that remains in a decode step, with bars.

Called by ``catalogue``. The attention workers are real processes on this machine, and the benchmark reaches
them with the engine's own code. All cases of a run use the same hop measurement, so that a bar on a step
compares it with a hop of the same run.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from statistics import median

from farshore.attention_offload.transport.frames import REMOTE, Transport
from farshore.benchmarks import cases, machine
from farshore.benchmarks.cases import Measured
from farshore.benchmarks.offload import hop as offload_hop
from farshore.benchmarks.offload import step as offload_step
from farshore.benchmarks.offload.setting import LAYER_DENSE_S, LoadModel, Setting, Sizes
from farshore.benchmarks.report import Bar, Report, Result
from farshore.benchmarks.timing import Timing

MOST_HOP_US = {Transport.SHARED_MEMORY: 40.0, Transport.TCP: 80.0, Transport.GRPC: 300.0}
LEAST_OF_RAW_PERCENT = 70.0
"""The least rate of bulk KV over TCP, as a share of the rate of a raw socket."""
LEAST_GRPC_GBPS = 0.6
MOST_TIMES_IDLE = 3.0
"""The largest p99 of a hop during bulk KV, as a multiple of the p99 without it."""


def run(
    load: LoadModel, facts: machine.Facts, sizes: Sizes, *, only: str = "", progress: Callable[[str], None]
) -> Report:
    """Measures the cases whose names contain ``only``. Raises InvalidRequest before any measurement if there
    are none."""
    chosen = cases.choose(dict(_cases()), only, kind="part")
    rates = machine.measure(facts, sizes.machine, progress=progress)
    with Setting(load, facts, sizes) as setting:
        results, bars = cases.measure(chosen, setting, progress=progress)
    return Report({**asdict(facts), **asdict(rates)}, tuple(results), tuple(bars))


def _cases() -> Iterator[tuple[str, Callable[[Setting], Measured]]]:
    """The name of each case, and the function that measures it."""
    for transport in REMOTE:
        yield f"hop, {transport}", partial(_hop, transport=transport)
    for transport in (Transport.TCP, Transport.GRPC):
        yield f"bulk, {transport}", partial(_bulk, transport=transport)
    for transport in REMOTE:
        yield f"hop during bulk, {transport}", partial(_hop_during_bulk, transport=transport)
    yield "decode at 8K", offload_step.decode
    yield "16 sequences at 8K, 1 ms away", offload_step.staggered


def _hop(setting: Setting, *, transport: Transport) -> Measured:
    name, times_s = f"hop, {transport}", setting.hop_times_s(transport)
    p50_us = median(times_s) * 1e6
    figures = {
        "p50_us": p50_us,
        "rested_p50_us": median(setting.hop_times_s(transport, rested=True)) * 1e6,
        "p99_us": offload_hop.percentile(times_s, 99) * 1e6,
        "q_bytes": offload_hop.HOP.q_heads * offload_hop.HOP.k_dim * offload_hop.DTYPE.itemsize,
    }
    bar = Bar.at_most(name, p50_us, MOST_HOP_US[transport], "µs")
    return [Result(name, Timing(times_s), figures)], [bar]


def _bulk(setting: Setting, *, transport: Transport) -> Measured:
    name = f"bulk, {transport}"
    rates = offload_hop.bulk_rates(setting.address, transport, rounds=setting.sizes.bulk_rounds)
    layer_bytes = offload_hop.BULK_TOKENS * offload_hop.bulk_layout().layer_token_bytes
    results, bars = [], []
    for direction, rates_bps, raw_bps, over_raw in (
        ("write", rates.write, rates.raw_write, rates.write_over_raw),
        ("read", rates.read, rates.raw_read, rates.read_over_raw),
    ):
        gbps, percent = median(rates_bps) / 1e9, 100 * over_raw
        timing = Timing(tuple(layer_bytes / rate for rate in rates_bps))
        figures = {"gbps": gbps, "percent_of_raw": percent, "raw_tcp_gbps": median(raw_bps) / 1e9}
        results.append(Result(f"{name}, {direction}", timing, figures))
        if transport is Transport.TCP:
            bars.append(
                Bar.at_least(f"{name}, {direction}", percent, LEAST_OF_RAW_PERCENT, "% of a raw socket")
            )
        else:
            bars.append(Bar.at_least(f"{name}, {direction}", gbps, LEAST_GRPC_GBPS, "GB/s"))
    return results, bars


def _hop_during_bulk(setting: Setting, *, transport: Transport) -> Measured:
    name = f"hop during bulk, {transport}"
    calls = setting.sizes.hop_calls
    idle = offload_hop.hop_times_s(setting.address, transport, calls=calls, think_s=LAYER_DENSE_S)
    with offload_hop.bulk_load(setting.address, transport):
        busy = offload_hop.hop_times_s(setting.address, transport, calls=calls, think_s=LAYER_DENSE_S)
    idle_p99, busy_p99 = (offload_hop.percentile(times, 99) for times in (idle, busy))
    figures = {
        "p99_us": busy_p99 * 1e6,
        "idle_p99_us": idle_p99 * 1e6,
        "idle_p50_us": median(idle) * 1e6,
    }
    bar = Bar.at_most(name, busy_p99 / idle_p99, MOST_TIMES_IDLE, "x idle p99")
    return [Result(name, Timing(busy), figures)], [bar]
