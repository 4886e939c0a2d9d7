"""The serve benchmark: speed of the engine and of `farshore serve`, compared with bars and the machine's
limits.

Called through ``catalogue``. Runs SmolLM2 in bfloat16 with KV in the engine's memory. Contexts longer than
the model's positions use a copy of its configuration with more positions, which changes no time. Each case
measures the machine's read bandwidth and GEMM rate before and after. A peer is another server on the same
machine.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

from farshore.benchmarks import cases
from farshore.benchmarks.cases import Measured
from farshore.benchmarks.machine import Facts
from farshore.benchmarks.report import Bar, Report, Result
from farshore.benchmarks.serve import load as serve_load
from farshore.benchmarks.serve import peer as serve_peer
from farshore.benchmarks.serve import start as serve_start
from farshore.benchmarks.serve.setting import Setting, Sizes

DECODE_MS = {128: 14.0, 8192: 25.0, 32768: 55.0}
PREFILL_TPS = {1024: 1100.0, 8192: 550.0, 32768: 190.0}
TOGETHER_TPS = 165.0
MOST_GAP_MS = 250.0
MOST_TIMES_ALONE = 1.3
START_S = {"cold": 25.0, "warm": 12.0}


def run(
    facts: Facts, sizes: Sizes, *, only: str = "", peer: str | None = None, progress: Callable[[str], None]
) -> Report:
    """Runs the cases whose name contains ``only``. ``peer``: measure this server instead of Farshore. Raises
    InvalidRequest before anything is measured if no case matches or the peer is unknown."""
    available = _cases(sizes) if peer is None else serve_peer.cases(peer, sizes)
    chosen = cases.choose(dict(available), only, kind="part")
    setting = Setting(facts, sizes, progress)
    results, bars = cases.measure(chosen, setting, progress=progress)
    machine = asdict(facts) if peer is None else {"peer": peer, **asdict(facts)}
    return Report(machine, tuple(results), tuple(bars))


def _cases(sizes: Sizes) -> Iterator[tuple[str, Callable[[Setting], Measured]]]:
    """(name, function that measures it) of each case."""
    for context in sizes.decode_contexts:
        yield f"decode at {context}", partial(_decode, context=context)
    for context in sizes.prefill_contexts:
        yield f"prefill of {context}", partial(_prefill, context=context)
    yield f"{sizes.sequences} sequences at {sizes.together_context}", _together
    yield f"decode beside a prefill of {sizes.beside_context}", _beside
    for kind in START_S:
        yield f"start-up, {kind}", partial(_start, kind=kind)


def _decode(setting: Setting, *, context: int) -> Measured:
    result = serve_load.decode(setting, context)
    return _with_bar(result, Bar.at_most, result.timing.median_s * 1e3, DECODE_MS.get(context), "ms/token")


def _prefill(setting: Setting, *, context: int) -> Measured:
    result = serve_load.prefill(setting, context)
    return _with_bar(
        result, Bar.at_least, context / result.timing.median_s, PREFILL_TPS.get(context), "tokens/s"
    )


def _together(setting: Setting) -> Measured:
    result = serve_load.together(setting)
    return _with_bar(result, Bar.at_least, result.figures["tokens_per_s"], TOGETHER_TPS, "tokens/s")


def _beside(setting: Setting) -> Measured:
    result = serve_load.beside(setting)
    figures = result.figures
    return [result], [
        Bar.at_most(
            f"{result.name}: p99 gap", figures["p99_gap_ms"], MOST_GAP_MS, "ms", _why(figures["p99_gap_ms"])
        ),
        Bar.at_most(
            f"{result.name}: its time",
            figures["times_alone_and_given_away"],
            MOST_TIMES_ALONE,
            "times",
            _why(figures["times_alone_and_given_away"]),
        ),
    ]


def _start(setting: Setting, *, kind: str) -> Measured:
    result = serve_start.measure(setting, cold=kind == "cold")
    return _with_bar(result, Bar.at_most, result.timing.median_s, START_S[kind], "s")


def _with_bar(
    result: Result,
    sense: Callable[[str, float | None, float, str, str], Bar],
    value: float | None,
    bound: float | None,
    unit: str,
) -> Measured:
    """The result with its bar; without one if ``bound`` is None."""
    return [result], [] if bound is None else [sense(result.name, value, bound, unit, _why(value))]


def _why(value: float | None) -> str:
    """The note of a bar."""
    return "a sequence had all its tokens before the measurement ended" if value is None else ""
