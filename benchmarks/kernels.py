"""The kernel benchmark: attention at the shapes and against the bars of issue 4.

Called through ``catalogue``. One implementation a run; what it is compared with runs in turns with it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

from farshore.benchmarks import decode, machine, overhead, prefill
from farshore.benchmarks.implementation import Implementation
from farshore.benchmarks.report import Bar, Report, Result
from farshore.benchmarks.shapes import LLAMA_8B, SMOLLM2, WIDE, Sizes
from farshore.kernels.formats import KVFormat

PERCENT_OF_READ = {LLAMA_8B: 85.0, SMOLLM2: 75.0, WIDE: 70.0}
TIMES_BFLOAT16 = {KVFormat.INT8: 1.6, KVFormat.INT4: 2.0}


def run(
    implementation: Implementation, facts: machine.Facts, sizes: Sizes, *, progress: Callable[[str], None]
) -> Report:
    rates = machine.measure(facts, sizes.machine, progress=progress)
    at = decode.Setting(implementation, facts, rates.reader, sizes)
    results: list[Result] = []
    bars: list[Bar] = []
    for what, measure in _cases(at):
        progress(what)
        measured, held = measure()
        results += measured
        bars += held
    kernels = {"implementation": implementation.name, "instruction_set": implementation.instruction_set}
    return Report({**kernels, **asdict(facts), **asdict(rates)}, tuple(results), tuple(bars))


def _cases(at: decode.Setting) -> Iterator[tuple[str, Callable[[], tuple[list[Result], list[Bar]]]]]:
    """What is about to be measured, and what measures it."""
    for shape, percent in PERCENT_OF_READ.items():
        yield (
            f"decode, {shape}",
            partial(decode.against_bandwidth, at, shape, bar_percent=percent, bar_sdpa=shape is LLAMA_8B),
        )
    for shape in (LLAMA_8B, SMOLLM2):
        for format, times in TIMES_BFLOAT16.items():
            yield (
                f"decode {format.value}, {shape}",
                partial(decode.against_bfloat16, at, shape, format, bar_times=times),
            )
        yield f"a shared segment, {shape}", partial(decode.shared_against_separate, at, shape)
    for shape in (SMOLLM2, LLAMA_8B):
        for past_tokens in at.sizes.past_tokens:
            yield (
                f"extend on {past_tokens} past, {shape}",
                partial(prefill.measure, at.implementation, shape, past_tokens, at.sizes),
            )
    yield "merge", partial(overhead.merge, at.implementation, at.sizes)
    yield "partial on single tokens", partial(overhead.tiny_partial, at.implementation, at.sizes)
