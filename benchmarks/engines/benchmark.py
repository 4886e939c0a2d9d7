"""The benchmark of several engines: what they share, and what a second one brings.

Called through ``catalogue``. Each part says what it starts: some need no model, some start engines and shards
as processes of their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict

from farshore.benchmarks import cases
from farshore.benchmarks.cases import Measured
from farshore.benchmarks.engines import drain, fairness, pairs, prefix
from farshore.benchmarks.engines.directory import redis_bars
from farshore.benchmarks.engines.routing import routing_bars
from farshore.benchmarks.engines.setting import Setting, Sizes
from farshore.benchmarks.machine import Facts
from farshore.benchmarks.report import Report

PARTS: Mapping[str, Callable[[Setting], Measured]] = {
    "redis": lambda _: redis_bars(),
    "routing": lambda _: routing_bars(),
    "pairs": pairs.measure,
    "prefix": prefix.measure,
    "fairness": fairness.measure,
    "drain": lambda setting: drain.drain_bars(drain.Sizes(), progress=setting.progress),
}
"""By name:

- redis: look-ups of prefixes in a directory of 100,000 blocks
- routing: how long a gateway takes to choose an engine
- pairs: tokens per second of two engines over those of one
- prefix: the first token where another engine prefilled the prompt, over the prefill
- fairness: an engine's frames while another one loads their shard; without a bar
- drain: tokens per second, gaps and failed requests while attention workers drain
"""


def run(facts: Facts, sizes: Sizes, *, only: str = "", progress: Callable[[str], None]) -> Report:
    """Runs the parts whose name contains ``only``. InvalidRequest if there are none."""
    chosen = cases.choose(PARTS, only, kind="part")
    results, bars = cases.measure(chosen, Setting(facts, sizes, progress), progress=progress)
    return Report(asdict(facts), tuple(results), tuple(bars))
