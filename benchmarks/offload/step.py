"""Measures decode steps over attention workers on this machine: steps of one sequence against a local step,
and steps of many sequences over a delayed network against a model of their sides measured alone.

Called by ``benchmark``. All processes together use as many cores as the run has threads. An engine and one
worker that work in turn both use all cores. Two workers, or an engine and a worker that work at the same
time, are pinned to half of the cores each: otherwise the scheduler puts two threads that are woken by one
thread on the same core, and leaves them there for a millisecond.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from statistics import median

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.client.remote import RemoteClient
from farshore.attention_offload.fanout.fanout import Fanout
from farshore.attention_offload.transport.core_sharing import usable_cores
from farshore.attention_offload.transport.frames import REMOTE, Transport
from farshore.benchmarks.cases import Measured
from farshore.benchmarks.offload import hop as offload_hop
from farshore.benchmarks.offload.rig import StepRig, delayed
from farshore.benchmarks.offload.setting import Setting
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing, interleave
from farshore.ids import WorkerId
from farshore.kernels.base import BLOCK_TOKENS
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.models.llama import Llama
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.decode.micro_batch_tuner import TRIAL_STEPS, MicroBatchTuner

MOST_TIMES_LOCAL = 1.10
"""The largest time of a step over shared memory, as a multiple of the local step."""
MOST_TIMES_HOPS = 1.2
"""The largest time that TCP or gRPC adds to a step, as a multiple of layers x hop."""
MOST_TIMES_MODEL = 1.2
"""The largest time of a step of many sequences, as a multiple of the model in ``_held_against_model``."""
LEAST_GAIN = 1.2
"""The least factor by which two micro-batches are faster than one over a delayed network."""

STEPS_A_RUN = 10
"""The number of consecutive steps in a sample. In decoding nearly every step follows another, so that caches
and threads are warm. The first step after a pause takes 3 to 5% longer in every setting."""

_ENGINE = WorkerId("engine")


def decode(setting: Setting) -> Measured:
    """Measures one sequence over each transport to one and to two workers, each interleaved with the local
    step only.

    Interleaving all transports would favour a transport that follows another one to the same workers: it
    would find their KV in the cache.
    """
    threads, tokens = setting.machine.threads, setting.sizes.context_tokens
    model = setting.model(threads)
    attention = attention_model(model.config, model.dtype)
    arena = Arena(_kv_bytes(attention, 2, tokens))
    store = LocalStore(worker=_ENGINE, arena=arena)
    local = StepRig(
        model, attention, {_ENGINE: store}, sequences=1, context_tokens=tokens, arena=arena, local=_ENGINE
    )
    local_step = partial(local.step, Fanout({_ENGINE: InProcessClient(_ENGINE, store, attention)}, attention))
    results: list[Result] = []
    bars: list[Bar] = []
    for workers in (1, 2):
        with ExitStack() as stack:
            addresses = [
                stack.enter_context(_worker(attention, 1, tokens, cores=cores))
                for cores in _core_shares(threads, workers)
            ]
            clients = {
                transport: stack.enter_context(_clients(addresses, model, attention, transport))
                for transport in REMOTE
            }
            stores = {worker: client.store for worker, client in clients[Transport.GRPC].items()}
            rig = StepRig(model, attention, stores, sequences=1, context_tokens=tokens)
            for transport in REMOTE:
                step = partial(rig.step, Fanout(clients[transport], attention))
                timings = interleave(
                    {"local": local_step, "offloaded": step}, rounds=setting.sizes.rounds, calls=STEPS_A_RUN
                )
                result, bar = _held_against_local(setting, timings, transport, workers, model.config.layers)
                results.append(result)
                bars.append(bar)
    return results, bars


def _held_against_local(
    setting: Setting, timings: Mapping[str, Timing], transport: Transport, workers: int, layers: int
) -> tuple[Result, Bar]:
    name = f"decode at 8K, {transport}, {workers} attention worker{'s' if workers > 1 else ''}"
    local, timing = timings["local"], timings["offloaded"]
    added_s = median(a - b for a, b in zip(timing.samples_s, local.samples_s, strict=True))
    hop_s = median(setting.hop_times_s(transport))
    rested_hop_s = median(setting.hop_times_s(transport, rested=True))
    figures = {
        "local_median_s": local.median_s,
        "times_local": timing.over(local),
        "added_us_a_layer": added_s / layers * 1e6,
        "hop_us": hop_s * 1e6,
        "rested_hop_us": rested_hop_s * 1e6,
        "times_rested_hop": added_s / layers / rested_hop_s,
    }
    if transport is Transport.SHARED_MEMORY:
        bar = Bar.at_most(name, timing.over(local), MOST_TIMES_LOCAL, "x the local step")
    else:
        bar = Bar.at_most(name, added_s / (layers * hop_s), MOST_TIMES_HOPS, "x layers x hop, added")
    return Result(name, timing, figures), bar


def staggered(setting: Setting) -> Measured:
    """Measures many sequences on one worker over a delayed network, in one and in two micro-batches."""
    sizes = setting.sizes
    engine_cores, worker_cores = _core_shares(setting.machine.threads, 2)
    model = setting.model(len(engine_cores))
    attention = attention_model(model.config, model.dtype)
    with (
        _worker(attention, sizes.sequences, sizes.context_tokens, cores=worker_cores) as address,
        delayed(address, attention, model.dtype, sizes.delay_s) as far_address,
        _clients([address], model, attention, Transport.TCP) as near,
        _clients([far_address], model, attention, Transport.TCP) as far,
        _on(engine_cores),
    ):
        stores = {worker: client.store for worker, client in near.items()}
        rig, one_token = (
            StepRig(model, attention, stores, sequences=sizes.sequences, context_tokens=tokens)
            for tokens in (sizes.context_tokens, 1)
        )
        near_fanout, far_fanout = Fanout(near, attention), Fanout(far, attention)
        candidates: dict[str, Callable[[], object]] = {
            "hop": partial(one_token.attention, near_fanout, sizes.sequences),
            "delayed hop": partial(one_token.attention, far_fanout, sizes.sequences),
        }
        for n in (1, 2):
            rows = sizes.sequences // n
            candidates |= {
                f"dense {n}": partial(rig.dense, rows),
                f"attention {n}": partial(rig.attention, near_fanout, rows),
                f"step {n}": partial(rig.step, far_fanout, micro_batches=n),
            }
        timings = interleave(candidates, rounds=sizes.staggered_rounds, warm_up=1)
        chosen = _chosen(rig, far_fanout, sizes.sequences, steps=sizes.settling_steps)
    results, bars = _held_against_model(timings, layers=model.config.layers, delay_s=sizes.delay_s)
    return [replace(result, figures={**result.figures, "engine_chose": chosen}) for result in results], bars


def _chosen(rig: StepRig, shards: Fanout, rows: int, *, steps: int) -> int:
    """The number of micro-batches that the engine's tuner chooses. The tuner measures only its own steps."""
    tuner = MicroBatchTuner(lambda: shards.waited_s)
    ran = []
    for _ in range(steps):
        with tuner.step(rows) as n:
            rig.step(shards, micro_batches=n)
        ran.append(n)
    return max(set(ran[-TRIAL_STEPS * 2 :]), key=ran.count)


def _held_against_model(timings: Mapping[str, Timing], *, layers: int, delay_s: float) -> Measured:
    """Compares steps with the model ``layers x max(n d, n a, d + a + RTT)`` for n micro-batches, where d is
    the dense time and a the attention time of a micro-batch in a layer. ``attention`` was measured with a
    hop, whose time is subtracted."""
    layer_s = {name: timing.median_s / layers for name, timing in timings.items()}
    results, bars = [], []
    for n in (1, 2):
        name = f"16 sequences at 8K, 1 ms away, {n} micro-batches"
        dense_s, attention_s = layer_s[f"dense {n}"], layer_s[f"attention {n}"] - layer_s["hop"]
        model_s = max(n * dense_s, n * attention_s, dense_s + attention_s + 2 * delay_s)
        figures = {
            "dense_ms_a_layer": dense_s * 1e3,
            "attention_ms_a_layer": attention_s * 1e3,
            "model_ms_a_layer": model_s * 1e3,
            "step_ms_a_layer": layer_s[f"step {n}"] * 1e3,
            "hop_ms": layer_s["hop"] * 1e3,
            "delayed_hop_ms": layer_s["delayed hop"] * 1e3,
        }
        results.append(Result(name, timings[f"step {n}"], figures))
        times_model = layer_s[f"step {n}"] / model_s
        bars.append(Bar.at_most(name, times_model, MOST_TIMES_MODEL, "x layers x max(n d, n a, d + a + RTT)"))
    gain = timings["step 1"].over(timings["step 2"])
    bars.append(
        Bar.at_least("2 micro-batches, 16 sequences at 8K, 1 ms away", gain, LEAST_GAIN, "x faster than 1")
    )
    return results, bars


def _kv_bytes(attention: AttentionModel, sequences: int, tokens: int) -> int:
    """The KV bytes of ``sequences`` sequences of ``tokens`` tokens and as many short ones, with partly filled
    blocks."""
    return attention.layouts[0].token_bytes * sequences * (tokens + 3 * BLOCK_TOKENS)


def _core_shares(threads: int, shares: int) -> list[list[int]]:
    """Divides ``threads`` cores into ``shares`` equal shares. With fewer cores than shares, a share without a
    core of its own gets all of them."""
    cores = usable_cores()[:threads]
    return [cores[len(cores) * i // shares : len(cores) * (i + 1) // shares] or cores for i in range(shares)]


@contextmanager
def _on(cores: list[int]) -> Iterator[None]:
    """Pins this thread, and the threads and processes that it starts meanwhile, to ``cores``."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _worker(attention: AttentionModel, sequences: int, tokens: int, *, cores: list[int]) -> Iterator[str]:
    """Starts an attention worker pinned to ``cores``, with a thread for each, and yields its address."""
    memory_bytes = _kv_bytes(attention, sequences, tokens)
    with ExitStack() as stack:
        with _on(cores):
            process = offload_hop.shard_process(threads=len(cores), memory_bytes=memory_bytes)
            address = stack.enter_context(process)
        yield address


@contextmanager
def _clients(
    addresses: list[str], model: Llama, attention: AttentionModel, transport: Transport
) -> Iterator[dict[WorkerId, RemoteClient]]:
    clients = {
        WorkerId(f"shard-{i}"): RemoteClient(address, attention, model.dtype, transports=[transport])
        for i, address in enumerate(addresses)
    }
    try:
        for client in clients.values():
            client.connect()
        yield clients
    finally:
        for client in clients.values():
            client.close()
