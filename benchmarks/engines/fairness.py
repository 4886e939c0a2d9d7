"""The part of ``farshore bench engines`` that measures an engine's frames while another engine loads the
shard that both use. It has no bar.

Called by ``benchmark`` of this folder. Frames carry 16 KiB each way, with pauses as of an engine's dense
layers. The same load at another shard on the same core shows the part of the delay that the machine causes:
what is above it, the shard causes.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import NamedTuple

from farshore.attention_offload.transport.core_sharing import usable_cores
from farshore.attention_offload.transport.frames import REMOTE, Transport, native
from farshore.benchmarks.cases import Measured
from farshore.benchmarks.engines.asking import Engine, connected, prompt
from farshore.benchmarks.engines.cluster import Cluster
from farshore.benchmarks.engines.setting import Setting
from farshore.benchmarks.offload import hop
from farshore.benchmarks.report import Result
from farshore.benchmarks.timing import Timing

PAUSE_S = 1e-3
"""Between an answer and the next frame."""
QUESTION_TOKENS = 16
SHARED, OTHER = "the same shard", "another shard"


class _Pair(NamedTuple):
    engine: Engine
    shard: str
    """Its address."""


Load = Callable[[_Pair], AbstractContextManager[None]]


def measure(setting: Setting) -> Measured:
    """Frames to one shard: alone, and beside each kind of load, there and at another shard. The shards are on
    the last core, the engines that load them on the first one."""
    seeds = count()
    loads: dict[str, Load] = {
        "a prefill": partial(_prefilling, setting, seeds),
        "bulk KV": _moving_bulk,
        "long reads": partial(_reading, setting, seeds),
    }
    with ExitStack() as stack:
        setting.progress("two engines and two shards start")
        shared, other = stack.enter_context(_pairs(setting))
        alone = _frames(setting, shared)
        results = [_result("frames alone", alone, {})]
        for name, load in loads.items():
            timings = {}
            for place, pair in ((SHARED, shared), (OTHER, other)):
                setting.progress(f"frames beside {name} at {place}")
                with load(pair):
                    timings[place] = _frames(setting, shared)
            for place, timing in timings.items():
                figures = {"p99_over_alone": _p99_s(timing) / _p99_s(alone)}
                if place == SHARED:
                    figures["p99_over_another_shard"] = _p99_s(timing) / _p99_s(timings[OTHER])
                results.append(_result(f"frames beside {name} at {place}", timing, figures))
    return results, []


def _frames(setting: Setting, pair: _Pair) -> Timing:
    calls = setting.sizes.fairness_frames
    return Timing(hop.hop_times_s(pair.shard, _transport(), calls=calls, think_s=PAUSE_S))


def _transport() -> Transport:
    return Transport.GRPC if native() is None else REMOTE[0]


def _p99_s(timing: Timing) -> float:
    return hop.percentile(timing.samples_s, 99)


def _result(name: str, timing: Timing, figures: dict[str, float]) -> Result:
    quantiles = {"p50_us": timing.median_s * 1e6, "p99_us": _p99_s(timing) * 1e6}
    return Result(name, timing, quantiles | figures)


@contextmanager
def _pairs(setting: Setting) -> Iterator[list[_Pair]]:
    """Yields two engines, each with a shard of its own."""
    cores = usable_cores()
    with ExitStack() as stack:
        starting = []
        for number in range(2):
            cluster = stack.enter_context(Cluster(setting.sizes.spec))
            shard = cluster.shard(f"attention-{number}", cores=cores[-1:])
            starting.append((cluster, cluster.engine(f"dense-{number}", cores=cores[:1]), shard))
        pairs = []
        for cluster, engine, shard in starting:
            cluster.await_serving()
            client = stack.enter_context(connected(engine.address))
            pairs.append(_Pair(client, shard.address))
        yield pairs


def _prefilling(setting: Setting, seeds: Iterator[int], pair: _Pair) -> AbstractContextManager[None]:
    """The engine prefills new prompts during the context."""
    sizes = setting.sizes
    return _repeating(
        lambda: pair.engine.ask(
            prompt(sizes.prefix_tokens, seed=next(seeds), vocab=sizes.vocab), max_tokens=1
        )
    )


def _moving_bulk(pair: _Pair) -> AbstractContextManager[None]:
    """A third process writes and reads KV during the context, without a pause."""
    return hop.bulk_load(pair.shard, _transport())


def _reading(setting: Setting, seeds: Iterator[int], pair: _Pair) -> AbstractContextManager[None]:
    """The engine decodes after a prompt that the shard holds, during the context: its frames read all of
    it."""
    sizes = setting.sizes
    stored = prompt(sizes.prefix_tokens, seed=next(seeds), vocab=sizes.vocab)
    pair.engine.ask(stored, max_tokens=1)
    question = [*stored, *prompt(QUESTION_TOKENS, seed=next(seeds), vocab=sizes.vocab)]
    return _repeating(lambda: pair.engine.ask(question, max_tokens=sizes.fairness_tokens))


@contextmanager
def _repeating(ask: Callable[[], object]) -> Iterator[None]:
    """Asks again and again, in a thread, until the context ends. Waits for the last answer, and raises its
    error."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            ask()

    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(repeat)
        try:
            yield
        finally:
            ended.set()
        asking.result()
