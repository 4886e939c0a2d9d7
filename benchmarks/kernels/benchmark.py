"""The kernel benchmark: attention kernels against bars, which are shares of the machine's rates or ratios.

Called by ``catalogue``. A run measures one implementation, alternating with what it is compared with.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

from farshore.benchmarks import cases, machine
from farshore.benchmarks.kernels import decode, overhead, prefill
from farshore.benchmarks.kernels.implementation import Implementation, Setting
from farshore.benchmarks.kernels.shapes import LLAMA_8B, SMOLLM2, WIDE, Sizes
from farshore.benchmarks.report import Report
from farshore.kernels.formats import KVFormat

PERCENT_OF_READ = {LLAMA_8B: 85.0, SMOLLM2: 75.0, WIDE: 70.0}
"""Bars of decode in bfloat16: percent of the read bandwidth."""
TIMES_BFLOAT16 = {KVFormat.INT8: 1.6, KVFormat.INT4: 2.0}
"""Bars of decode in quantised formats: times the tokens/s of bfloat16."""


def run(
    implementation: Implementation,
    facts: machine.Facts,
    sizes: Sizes,
    *,
    only: str = "",
    progress: Callable[[str], None],
) -> Report:
    """Measures the cases whose name contains ``only``. Raises InvalidRequest at once if there are none."""
    chosen = cases.choose(dict(_cases(sizes)), only)
    rates = machine.measure(facts, sizes.machine, progress=progress)
    setting = Setting(implementation, facts, rates, sizes)
    results, bars = cases.measure(chosen, setting, progress=progress)
    kernels = {"implementation": implementation.name, "instruction_set": implementation.instruction_set}
    return Report({**kernels, **asdict(facts), **asdict(rates)}, tuple(results), tuple(bars))


def _cases(sizes: Sizes) -> Iterator[tuple[str, Callable[[Setting], cases.Measured]]]:
    """All cases: name and function."""
    for shape, percent in PERCENT_OF_READ.items():
        yield (
            f"decode, {shape}",
            partial(decode.against_bandwidth, shape=shape, bar_percent=percent, bar_sdpa=shape is LLAMA_8B),
        )
    for shape in (LLAMA_8B, SMOLLM2):
        for format, times in TIMES_BFLOAT16.items():
            yield (
                f"decode {format.value}, {shape}",
                partial(decode.against_bfloat16, shape=shape, format=format, bar_times=times),
            )
        yield f"a shared segment, {shape}", partial(decode.shared_against_separate, shape=shape)
    for shape in (SMOLLM2, LLAMA_8B):
        for past_tokens in sizes.past_tokens:
            yield (
                f"extend on {past_tokens} past, {shape}",
                partial(prefill.measure, shape=shape, past_tokens=past_tokens),
            )
    yield "merge", overhead.merge
    yield "partial on single tokens", overhead.tiny_partial
