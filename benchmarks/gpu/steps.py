"""Decode steps of the random model of the 8B shape: against their bytes, with graphs and without, and with KV
on attention workers of this host.

Called by ``benchmark``. A step must read every weight and all KV once, so its limit is these bytes over the
device's copy bandwidth. What the host does between two steps comes on top, as ``host_ms``. It must not know
transformers.
"""

import time
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from math import inf
from statistics import median
from typing import Any, cast

import torch

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.gpu.engines import Answer, MakeRuntime, Placement, running
from farshore.benchmarks.gpu.setting import Setting, prompts
from farshore.benchmarks.offload.hop import shard_process
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing
from farshore.kernels.base import BLOCK_TOKENS
from farshore.kernels.runtime.base import DeviceRuntime, Stream, Work
from farshore.kernels.runtime.cuda import CudaRuntime, CudaStream
from farshore.kernels.select import device_runtime
from farshore.models.llama import Llama
from farshore.models.weights.names import parameters
from farshore.sampling import Sampling
from farshore.workers.engine.attention_model import attention_model

MOST_OF_LIMIT = 1.25
"""Bar of a step, as a multiple of the time that its bytes take."""
SKIPPED_TOKENS = 8
"""The first steps compile kernels and capture graphs."""


def local(setting: Setting) -> Measured:
    """KV in the engine's own memory."""
    model = setting.large[1]
    results, bars = [], []
    for batch in setting.sizes.batches:
        launches: list[float] = []
        answers = _answers(
            setting, batch, Placement(kv_bytes=kv_bytes(setting, batch)), make_runtime=_noting(launches)
        )
        timing = _steps(answers)
        kv_tokens = batch * (setting.sizes.context_tokens + setting.sizes.new_tokens // 2)
        limit_s = step_bytes(model, kv_tokens) / (setting.copy_gbps * 1e9)
        name = f"step of the 8B shape, batch {batch}"
        times = timing.median_s / limit_s
        figures = {
            "limit_ms": limit_s * 1e3,
            "times_the_limit": times,
            "tokens_per_s": batch / timing.median_s,
        }
        if launches:
            figures["host_ms"] = host_s(answers, launches) * 1e3
        results.append(Result(name, timing, figures))
        bars.append(Bar.at_most(name, times, MOST_OF_LIMIT, "x its bytes limit"))
    return results, bars


def graphs(setting: Setting) -> Measured:
    """The same steps with each kernel launched by the host."""
    if not setting.on_gpu:
        return [], []
    results = []
    for batch in setting.sizes.batches:
        placement = Placement(kv_bytes=kv_bytes(setting, batch))
        captured = timed_steps(setting, batch, placement)
        launched = timed_steps(setting, batch, placement, make_runtime=_WithoutGraphs)
        figures = {
            "with_graphs_ms": captured.median_s * 1e3,
            "times_with_graphs": launched.median_s / captured.median_s,
        }
        results.append(Result(f"step without graphs, batch {batch}", launched, figures))
    return results, []


class _LaunchingStream(CudaStream):
    def replay(self, key: Hashable, work: Work) -> None:
        self.run(work)


class _WithoutGraphs(CudaRuntime):
    def stream(self) -> CudaStream:
        return _LaunchingStream(self.device)


def offloaded(setting: Setting) -> Measured:
    """KV on one attention worker, in its own process on this host's CPUs: what it adds to a layer."""
    results = []
    layers = setting.large[1].config.layers
    for batch in setting.sizes.batches:
        with ExitStack() as stack:
            address = stack.enter_context(
                shard_process(threads=setting.sizes.shard_threads, memory_bytes=setting.sizes.shard_bytes)
            )
            room = kv_bytes(setting, batch)
            own = timed_steps(setting, batch, Placement(kv_bytes=room))
            remote = timed_steps(setting, batch, Placement(addresses=(address,), kv_bytes=room))
        figures = {
            "own_memory_ms": own.median_s * 1e3,
            "added_us_a_layer": (remote.median_s - own.median_s) / layers * 1e6,
            "tokens_per_s": batch / remote.median_s,
        }
        results.append(Result(f"step with CPU shards, batch {batch}", remote, figures))
    return results, []


def timed_steps(
    setting: Setting, batch: int, placement: Placement, *, make_runtime: MakeRuntime = device_runtime
) -> Timing:
    """Seconds of the steps that decode ``batch`` sequences together."""
    return _steps(_answers(setting, batch, placement, make_runtime=make_runtime))


def _answers(
    setting: Setting, batch: int, placement: Placement, *, make_runtime: MakeRuntime
) -> list[Answer]:
    sizes, model = setting.sizes, setting.large[1]
    asked = prompts(batch, sizes.context_tokens, vocab=model.config.vocab)
    with running(model, placement, make_runtime=make_runtime) as engine:
        return engine.answer(asked, Sampling(max_tokens=sizes.new_tokens))


def _steps(answers: Sequence[Answer]) -> Timing:
    # While later prompts are prefilled, earlier sequences wait: what follows the last first token counts.
    all_run_s = max(answer.token_s[0] for answer in answers)
    steps = [answer.gaps_s(skip=sum(s < all_run_s for s in answer.token_s)) for answer in answers]
    count = min(map(len, steps))
    together = zip(*(gaps[len(gaps) - count :] for gaps in steps), strict=True)
    samples = tuple(median(gaps) for gaps in together)
    return Timing(samples[SKIPPED_TOKENS:] or samples)


def _noting(launches: list[float]) -> MakeRuntime:
    """Makes runtimes that append the time (``perf_counter``) behind each launch of a graph."""

    def make(device: torch.device) -> DeviceRuntime:
        runtime: Any = device_runtime(device)
        make_stream = runtime.stream

        def stream() -> Stream:
            made = make_stream()
            replay = made.replay

            def noted(key: Hashable, work: Work) -> None:
                replay(key, work)
                launches.append(time.perf_counter())

            made.replay = noted
            return cast(Stream, made)

        runtime.stream = stream
        return cast(DeviceRuntime, runtime)

    return make


def host_s(answers: Sequence[Answer], launches: Sequence[float]) -> float:
    """Median seconds from a step's last token to the launch behind it: meanwhile the device has no work.
    Later ``launches`` of the same step don't count."""
    ends = sorted(s for answer in answers for s in answer.token_s)
    next_token = [*ends[1:], inf]
    waits = []
    for end, following in zip(ends, next_token, strict=True):
        launch = bisect_right(launches, end)
        # Between two tokens of one step there is no launch.
        if launch < len(launches) and launches[launch] < following:
            waits.append(launches[launch] - end)
    return median(waits[SKIPPED_TOKENS:] or waits)


def step_bytes(model: Llama, kv_tokens: int) -> int:
    """Bytes that a step reads: all weights, of separate embeddings only the head, and the KV of its
    sequences."""
    config = model.config
    unread = 0 if config.tied_embeddings else config.vocab * config.hidden
    layout = attention_model(config, model.dtype).layouts[0]
    return (parameters(config) - unread) * model.dtype.itemsize + kv_tokens * layout.token_bytes


def kv_bytes(setting: Setting, batch: int) -> int:
    """Memory for the KV of all sequences, with whole blocks."""
    model = setting.large[1]
    tokens = setting.sizes.context_tokens + setting.sizes.new_tokens + 2 * BLOCK_TOKENS
    return batch * tokens * attention_model(model.config, model.dtype).layouts[0].token_bytes + (64 << 20)
