"""The offload benchmark at tiny sizes, over real processes: it reports every bar. Speed is not tested."""

import json
from collections import Counter

import pytest

from farshore.benchmarks.catalogue import BENCHMARKS, Options
from farshore.benchmarks.machine import MachineSizes
from farshore.benchmarks.offload import benchmark as offload
from farshore.benchmarks.offload.setting import Sizes
from farshore.errors import InvalidRequest
from farshore.models.config.model import ModelConfig
from farshore.models.config.rope import RopeConfig

SIZES = Sizes(
    machine=MachineSizes(buffer_bytes=8192, gemm=(8,), least_run_s=0, rounds=1),
    context_tokens=300,
    sequences=2,
    delay_s=1e-4,
    rounds=1,
    staggered_rounds=1,
    settling_steps=2,
    hop_calls=10,
    bulk_rounds=1,
)


@pytest.fixture
def load(random_llama):
    """Loads a Llama with two layers of random weights, whatever the number of threads."""
    config = ModelConfig(
        name="tiny",
        layers=2,
        hidden=32,
        intermediate=48,
        q_heads=2,
        kv_heads=1,
        head_dim=16,
        vocab=40,
        max_positions=1024,
        rms_eps=1e-5,
        rope=RopeConfig(theta=1e4),
        tied_embeddings=True,
    )
    model = random_llama(config)
    return lambda threads: model


@pytest.mark.heavy
def test_the_bars(load, machine):
    report = offload.run(load, machine, SIZES, progress=lambda _: None)
    bars = Counter((bar.sense, bar.bound, bar.unit) for bar in report.bars)
    assert bars == {
        ("<=", 40, "µs"): 1,
        ("<=", 80, "µs"): 1,
        ("<=", 300, "µs"): 1,
        (">=", 70, "% of a raw socket"): 2,
        (">=", 0.6, "GB/s"): 2,
        ("<=", 3, "x idle p99"): 3,
        ("<=", 1.1, "x the local step"): 2,
        ("<=", 1.2, "x layers x hop, added"): 4,
        ("<=", 1.2, "x layers x max(n d, n a, d + a + RTT)"): 2,
        (">=", 1.2, "x faster than 1"): 1,
    }
    assert len({(bar.name, bar.unit) for bar in report.bars}) == len(report.bars)
    told = json.loads(json.dumps(report.as_dict()))
    assert all(result["timing"]["runs"] for result in told["results"])
    assert all(bar.value == bar.value for bar in report.bars)


def test_an_unknown_part_is_refused_before_anything_is_measured(load, machine):
    with pytest.raises(InvalidRequest, match="no part 'rdma': choose a part of hop, shared memory; "):
        offload.run(load, machine, SIZES, only="rdma", progress=lambda _: pytest.fail("measured"))


def test_the_default_sizes_are_those_of_the_bars(machine, monkeypatch):
    """The command itself measures 8K of context, 16 sequences, and a delay of 1 ms each way."""
    asked = []
    monkeypatch.setattr(offload, "run", lambda load, facts, sizes, **options: asked.append(sizes))
    BENCHMARKS["offload"].run(Options(), lambda _: None)
    (sizes,) = asked
    assert (sizes.context_tokens, sizes.sequences, sizes.delay_s) == (8192, 16, 1e-3)
    assert (sizes.rounds, sizes.hop_calls, sizes.bulk_rounds) == (20, 2000, 10)
