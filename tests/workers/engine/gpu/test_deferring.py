"""An engine's device path on a runtime that runs work late and in random order: greedy tokens in float32
equal those of transformers, so no event is missing.

Most tests run native kernels, so that many orders are tried; a launch of the GPU's kernels in triton's
interpreter takes 50 to 400 ms.
"""

import importlib
import threading

import pytest
import torch

from farshore.attention_offload.transport.frames import Transport
from farshore.kernels.formats import KVFormat
from farshore.kernels.runtime.deferring import DeferredEvent, DeferringRuntime, DeferringStream
from farshore.kernels.select import CPU_KERNELS
from farshore.models.device_llama import DeviceLlama
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.decode.device.loop import DeviceLayerLoop
from farshore.workers.engine.decode.micro_batch_tuner import MicroBatchTuner
from farshore.workers.engine.sequence import Failed, Finished

PLACEMENTS = {
    "local": {"local": True},
    "one shard": {"shards": 1},
    "by range": {"shards": 3},
    "by head": {"shards": 3, "shard_by": "head"},
}
LIMITS = EngineLimits(segment_tokens=100)
"""Several segments a prompt, so that past KV is pulled."""


def in_pytorch(model):
    """The model as on a device, in PyTorch. No graph could record native kernels."""
    return DeviceLlama(model.config, model.weights.dense())


@pytest.fixture
def answer(rig, submit, monkeypatch):
    """answer(model, prompts, count, seed=..., micro_batches=..., options of the rig) -> the tokens of each
    prompt's answer, from an engine that decodes all of them together."""

    def run(model, prompts, count, *, seed, micro_batches=2, limits=LIMITS, **options):
        monkeypatch.setattr(MicroBatchTuner, "_start_trial", lambda tuner, most: None)
        cluster = rig(model, memory_bytes=64 << 20, **options)
        engine = cluster.start(runtime=DeferringRuntime(seed=seed), limits=limits)
        loop = engine._scheduler._runner._layer_loop
        assert isinstance(loop, DeviceLayerLoop)
        engine._scheduler._runner._tuner._settled = micro_batches
        greedy = Sampling(max_tokens=count, temperature=0.0)
        running = [submit(engine, str(i), prompt, greedy) for i, prompt in enumerate(prompts)]
        for collected in running:
            result = collected.result()
            assert isinstance(result, Finished), result
        return [collected.tokens for collected in running]

    return run


PROMPTS = [list(range(3, 8)), list(range(90, 57, -1)), [i * 7 % 97 for i in range(330)]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tokens_equal_those_of_transformers(tiny_model, greedy, answer, placement, seed):
    found = answer(
        in_pytorch(tiny_model), PROMPTS, 8, seed=seed, micro_batches=1 + seed % 2, **PLACEMENTS[placement]
    )
    assert found == [greedy(prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("format", [KVFormat.INT8, KVFormat.INT4])
def test_quantised_kv_is_written_as_the_host_writes_it(tiny_model, rig, submit, answer, format):
    """Prefill and tails hold the same bytes, so the host's engine gives the same tokens."""
    model = in_pytorch(tiny_model)
    expected = []
    engine = rig(model, memory_bytes=64 << 20, shards=2, format=format).start(limits=LIMITS)
    for i, prompt in enumerate(PROMPTS):
        running = submit(engine, f"host {i}", prompt, Sampling(max_tokens=8, temperature=0.0))
        assert isinstance(running.result(), Finished)
        expected.append(running.tokens)
    assert answer(model, PROMPTS, 8, seed=1, shards=2, format=format) == expected


def test_guesses(tiny_model, greedy, answer):
    """Several rows of one tail in a step, some of which are dropped."""
    limits = EngineLimits(segment_tokens=100, speculate_tokens=8)
    prompts = [[5, 6, 7, 8] * 20, *PROMPTS]
    found = answer(in_pytorch(tiny_model), prompts, 24, seed=2, limits=limits, shards=2)
    assert found == [greedy(prompt, 24) for prompt in prompts]


def test_shards_over_native_transports(tiny_model, greedy, cluster, submit):
    """Frames and bulk KV leave from pinned memory, and answers arrive beside them. Two completions fork."""
    engine = cluster(shards=2).start(
        model=in_pytorch(tiny_model), runtime=DeferringRuntime(seed=4), limits=LIMITS
    )
    sampling = Sampling(max_tokens=12, temperature=0.0, n=2)
    running = [submit(engine, str(i), prompt, sampling) for i, prompt in enumerate(PROMPTS)]
    for collected, prompt in zip(running, PROMPTS, strict=True):
        collected.results(2)
        assert collected.choices == {0: greedy(prompt, 12), 1: greedy(prompt, 12)}
    transports = {link.transport for link in engine.links() if link.frames}
    assert transports and transports <= {Transport.SHARED_MEMORY, Transport.TCP}


@pytest.fixture
def triton(monkeypatch, tiny_model):
    """The kernels of the engine and of its model, which it returns, are those of the GPU, interpreted; those
    of the shards stay native."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ops = importlib.import_module("farshore.kernels.gpu.ops")
    monkeypatch.setattr("farshore.workers.engine.engine.implementation", lambda *devices, dtype: ops)
    with monkeypatch.context() as patch:
        patch.setenv(CPU_KERNELS, "triton")
        model = in_pytorch(tiny_model)
    assert model._dense is importlib.import_module("farshore.kernels.gpu.dense.ops")
    return model


@pytest.mark.heavy
@pytest.mark.skipif(torch.cuda.is_available(), reason="beside a GPU, triton compiles its kernels")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("placement", ["local", "by head"])
def test_the_kernels_of_a_gpu(triton, greedy, answer, placement):
    found = answer(triton, PROMPTS[:2], 4, seed=3, **PLACEMENTS[placement])
    assert found == [greedy(prompt, 4) for prompt in PROMPTS[:2]]


def test_a_device_that_cannot_compute_fails_before_a_request(tiny_model, rig, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no kernel image is available")

    model = in_pytorch(tiny_model)
    monkeypatch.setattr(model, "project", broken)
    failed = threading.Event()
    engine = rig(model, shards=1).start(runtime=DeferringRuntime(seed=0), on_failed=failed.set)
    assert failed.wait(60)
    assert "no kernel image is available" in engine.failure


def test_a_device_that_fails_for_good_ends_the_engine(tiny_model, rig, submit, monkeypatch):
    """After an illegal access a GPU refuses every call. Requests fail alone, and the worker is replaced."""

    def broken(*args, **options):
        raise RuntimeError("an illegal memory access was encountered")

    model = in_pytorch(tiny_model)
    failed = threading.Event()
    engine = rig(model, shards=1).start(runtime=DeferringRuntime(seed=0), on_failed=failed.set)
    greedy = Sampling(max_tokens=3, temperature=0.0)
    assert isinstance(submit(engine, "a", PROMPTS[0], greedy).result(), Finished)
    monkeypatch.setattr(model, "project", broken)
    assert isinstance(submit(engine, "b", PROMPTS[1], greedy).result(), Failed)
    assert failed.wait(60)
    assert "illegal memory access" in engine.failure


FAULTS = {
    "streams wait for no event": (DeferringStream, "wait", lambda stream, event: None),
    "the host waits for no event": (DeferredEvent, "wait", lambda event: None),
    "the host does not settle": (DeferringRuntime, "settle", lambda runtime: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_event_is_found(tiny_model, greedy, rig, submit, monkeypatch, fault):
    """By its error, or by other tokens."""
    monkeypatch.setattr(*FAULTS[fault])
    engine = rig(in_pytorch(tiny_model), memory_bytes=64 << 20, shards=2).start(
        runtime=DeferringRuntime(seed=0), limits=LIMITS
    )
    running = submit(engine, "a", PROMPTS[1], Sampling(max_tokens=8, temperature=0.0))
    end = running.result()
    assert isinstance(end, Failed) or running.tokens != greedy(PROMPTS[1], 8)
