"""An engine's device path on a runtime that runs work late and in random order: greedy tokens in float32
equal those of transformers, so no event is missing.

Kernels and shards are native here, so that many orders are tried; ``test_interpreted`` runs the GPU's
kernels.
"""

import pytest

from farshore.kernels.runtime.deferring import DeferringRuntime
from farshore.models.llama import Llama
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.decode.device.loop import DeviceLayerLoop
from farshore.workers.engine.decode.micro_batch_tuner import MicroBatchTuner
from farshore.workers.engine.sequence import Finished

PLACEMENTS = {
    "local": {"local": True},
    "one shard": {"shards": 1},
    "by range": {"shards": 3},
    "by head": {"shards": 3, "shard_by": "head"},
}
LIMITS = EngineLimits(segment_tokens=100)
"""Several segments a prompt, so that past KV is pulled."""


def in_pytorch(model):
    """The model without native kernels, which no graph could record."""
    return Llama(model.config, model.weights.dense())


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
