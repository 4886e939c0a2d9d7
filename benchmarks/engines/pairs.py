"""The part of ``farshore bench engines`` that compares two engines with one: each is pinned to one core,
together with a shard of its own.

Called by ``benchmark`` of this folder. The pairs share nothing but the machine, so that this is the most that
a second engine can bring.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from statistics import median

from farshore.attention_offload.transport.core_sharing import usable_cores
from farshore.benchmarks.cases import Measured
from farshore.benchmarks.engines.asking import Engine, connected, prompt
from farshore.benchmarks.engines.cluster import Cluster
from farshore.benchmarks.engines.setting import Setting
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing

PAIRS = 2
LEAST_TIMES = 1.6
WARM_UP_TOKENS = 8


def measure(setting: Setting) -> Measured:
    """Rounds of: the first pair alone, both, the second pair alone. Tokens per second count from the first
    request to the end of the last answer, prompts included."""
    sizes, cores = setting.sizes, usable_cores()
    name = f"{PAIRS} engines over one"
    if len(cores) < PAIRS:
        why = f"this process may use {len(cores)} core: two engines on a core each need {PAIRS}"
        return [], [Bar.at_least(name, None, LEAST_TIMES, "times", why)]
    seeds = count()
    alone_s, together_s, times = [], [], []
    with ExitStack() as stack:
        setting.progress("two engines and two shards start")
        pairs = [stack.enter_context(_starting(setting, core)) for core in cores[:PAIRS]]
        engines = []
        for cluster, address in pairs:
            cluster.await_serving()
            engines.append(stack.enter_context(connected(address())))
        _run_s(setting, engines, seeds, tokens=WARM_UP_TOKENS)
        for number in range(sizes.rounds):
            setting.progress(f"round {number + 1} of {sizes.rounds}")
            first_s = _run_s(setting, engines[:1], seeds)
            both_s = _run_s(setting, engines, seeds)
            second_s = _run_s(setting, engines[1:], seeds)
            mean_s = (first_s + second_s) / 2
            alone_s.append(mean_s)
            together_s.append(both_s)
            times.append(PAIRS * mean_s / both_s)
    tokens = sizes.pair_sequences * sizes.pair_tokens
    results = [
        _result("one engine and its shard on a core", alone_s, tokens),
        _result(f"{PAIRS} engines, each with its shard on a core", together_s, PAIRS * tokens),
    ]
    note = f"{sizes.pair_sequences} sequences of {sizes.pair_tokens} tokens at each, cores {cores[:PAIRS]}"
    return results, [Bar.at_least(name, median(times), LEAST_TIMES, "times", note)]


def _result(name: str, samples_s: list[float], tokens: int) -> Result:
    timing = Timing(tuple(samples_s))
    return Result(name, timing, {"tokens": tokens, "tokens_per_s": tokens / timing.median_s})


@contextmanager
def _starting(setting: Setting, core: int) -> Iterator[tuple[Cluster, Callable[[], str]]]:
    """Begins to start an engine and a shard on one core. Yields their cluster, and what returns the engine's
    address once it serves."""
    with Cluster(setting.sizes.spec) as cluster:
        cluster.shard(f"attention-{core}", cores=[core])
        engine = cluster.engine(f"dense-{core}", cores=[core])
        yield cluster, engine.await_address


def _run_s(
    setting: Setting, engines: list[Engine], seeds: Iterator[int], *, tokens: int | None = None
) -> float:
    """Seconds until each engine has answered all its sequences, whose prompts no engine has seen."""
    sizes = setting.sizes
    wanted = tokens or sizes.pair_tokens
    prompts = [
        (engine, prompt(sizes.pair_prompt_tokens, seed=next(seeds), vocab=sizes.vocab))
        for engine in engines
        for _ in range(sizes.pair_sequences)
    ]
    begun_s = time.perf_counter()
    asked = [engine.begin(ids, max_tokens=wanted) for engine, ids in prompts]
    answers = [future.result() for future in asked]
    taken_s = time.perf_counter() - begun_s
    assert all(len(answer.tokens) == wanted for answer in answers), "an answer ended early"
    return taken_s
