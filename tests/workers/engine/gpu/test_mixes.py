"""Engines and shards on the host and on devices, in any mix: the tokens of an engine on the host.

Devices are runtimes that run work late and in random order. Both ends run native kernels, so that many orders
are tried.
"""

import pytest

from farshore.kernels.runtime.deferring import DeferringRuntime
from farshore.kernels.runtime.immediate import ImmediateRuntime
from farshore.kvstore.store.layout import blocks
from farshore.models.device_llama import DeviceLlama
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.sequence import Finished

PROMPTS = [list(range(3, 8)), list(range(90, 57, -1)), [i * 7 % 97 for i in range(330)], [5, 6, 7, 8] * 20]
LIMITS = EngineLimits(segment_tokens=100, speculate_tokens=8)
SAMPLING = [
    Sampling(max_tokens=12),
    Sampling(max_tokens=12, temperature=1.0, seed=5, n=2, logprobs=2),
    Sampling(max_tokens=12, temperature=0.8, seed=6, top_p=0.9, repetition_penalty=1.1, logit_bias={3: 2.0}),
    Sampling(max_tokens=12, temperature=1.2, seed=7, top_k=9, min_p=0.05, frequency_penalty=0.4, logprobs=0),
]


@pytest.fixture
def answers(rig, submit, tiny_model):
    """answers(runtime, ...) -> the tokens of every completion, from an engine on ``runtime``; the other
    options are the rig's."""
    model = DeviceLlama(tiny_model.config, tiny_model.weights.dense())

    def run(runtime, **options):
        cluster = rig(model, memory_bytes=64 << 20, **options)
        engine = cluster.start(runtime=runtime, limits=LIMITS)
        running = [
            submit(engine, str(i), prompt, sampling)
            for i, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLING, strict=True))
        ]
        found = []
        for collected, sampling in zip(running, SAMPLING, strict=True):
            ends = [collected.result() for _ in range(sampling.n)]
            assert all(isinstance(end, Finished) for end in ends), ends
            found.append(dict(collected.choices))
        return found

    return run


@pytest.fixture
def expected(answers):
    return answers(ImmediateRuntime(), shards=2)


@pytest.fixture
def pytorch_copies(monkeypatch):
    """Stores copy as in a device's memory."""
    monkeypatch.setattr(blocks, "native_for", lambda memory: None)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shard_by", ["range", "head"])
@pytest.mark.parametrize("engine", ["host", "device"])
def test_shards_on_devices(expected, answers, pytorch_copies, engine, shard_by, seed):
    runtimes = {}
    found = answers(
        ImmediateRuntime() if engine == "host" else DeferringRuntime(seed=seed),
        shards=3,
        shard_by=shard_by,
        stores_on=lambda worker: runtimes.setdefault(worker, DeferringRuntime(seed=seed + len(runtimes))),
    )
    assert found == expected


@pytest.mark.parametrize("seed", range(2))
def test_shards_on_the_host(expected, answers, seed):
    assert answers(DeferringRuntime(seed=seed), shards=2) == expected


@pytest.mark.parametrize("seed", range(2))
def test_everything_on_one_device(expected, answers, pytorch_copies, seed):
    """The engine and its store share the device, and run their work on streams of the same runtime."""
    runtime = DeferringRuntime(seed=seed)
    assert answers(runtime, local=True, stores_on=lambda worker: runtime) == expected
