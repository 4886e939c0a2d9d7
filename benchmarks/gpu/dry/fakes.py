"""Runs engines on CUDA tensors without a GPU: code that mixes devices raises. See ``fake_cuda``.

Each case is an engine of one model, placement and format, with all that it runs: models, prefill, steps,
samplers, hand-offs. Prints one JSON object per case: its name, and its error or null. Run by ``run`` and by
tests, in a process of its own. It must not know what is computed: there are no values.

    python -P -m farshore.benchmarks.gpu.dry.fakes
"""

import json
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from farshore.benchmarks.gpu.dry.fake_cuda import captured, fake_cuda
from farshore.benchmarks.gpu.engines import Placement, running
from farshore.benchmarks.gpu.models import random_llama, tiny_config
from farshore.errors import FarshoreError
from farshore.kernels.formats import KVFormat
from farshore.kernels.gpu import tuning
from farshore.kernels.gpu.tuning import Device
from farshore.kernels.runtime.base import Work
from farshore.kernels.runtime.immediate import ImmediateRuntime, ImmediateStream
from farshore.models.config.hf import from_hf
from farshore.models.config.model import ModelConfig
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits

CUDA = torch.device("cuda", 0)

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 1024,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
_LLAMA3 = _YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONGROPE = _YARN | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "rope linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "rope dynamic": {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "rope yarn": {"model_type": "llama", "rope_scaling": _YARN},
    "rope longrope": {"model_type": "llama", "rope_scaling": _LONGROPE},
    "rope llama3": {"model_type": "llama", "rope_scaling": _LLAMA3},
}
"""Every family of models that the package reads, as config.json has it."""
PLACEMENTS = {
    "local": Placement(),
    "local, int8": Placement(format=KVFormat.INT8),
    "local, int4": Placement(format=KVFormat.INT4),
    "CPU shards": Placement(shards=2),
    "CPU shards by head, int8": Placement(shards=2, shard_by="head", format=KVFormat.INT8),
    "CUDA shards": Placement(shards=2, shard_device=CUDA),
}

PROMPTS = [[7 * token % 97 for token in range(tokens)] for tokens in (300, 1)]
"""With segments of 256 tokens: prompts with and without a past range and a full chunk."""
LIMITS = EngineLimits(segment_tokens=256, speculate_tokens=4)
GREEDY = Sampling(max_tokens=3)
EVERYTHING = Sampling(
    max_tokens=5,
    n=2,
    temperature=0.7,
    top_k=20,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={3: 2.0},
    logprobs=3,
    prompt_logprobs=1,
    seed=5,
)


class GraphStream(ImmediateStream):
    """Runs the work of graphs as if it were captured."""

    def replay(self, key: Hashable, work: Work) -> None:
        with captured():
            work()


class GraphRuntime(ImmediateRuntime):
    def stream(self) -> ImmediateStream:
        return ImmediateStream(self.device) if self.is_host else GraphStream(self.device)


class Case(NamedTuple):
    name: str
    config: ModelConfig
    placement: Placement
    prompts: list[list[int]]
    samplings: tuple[Sampling, ...]

    def check(self) -> None:
        """Runs an engine in :func:`fake_cuda`. Raises the error of the request that met one."""
        model = random_llama(self.config, dtype=torch.bfloat16, device=CUDA)
        with running(model, self.placement, limits=LIMITS, make_runtime=GraphRuntime) as engine:
            for sampling in self.samplings:
                engine.answer(self.prompts, sampling)


def cases() -> Iterator[Case]:
    """Every family with KV in its own memory; one family with KV everywhere, and with everything that a
    request may ask of the sampler."""
    for family, described in FAMILIES.items():
        config = from_hf({**_SIZES, **described}, None, family, max_model_len=1024)
        yield Case(family, config, PLACEMENTS["local"], [[5, 6, 7]], (GREEDY,))
    for name, placement in PLACEMENTS.items():
        yield Case(name, tiny_config(head_dim=16), placement, PROMPTS, (GREEDY, EVERYTHING))


def pretend_h100() -> None:
    """Makes our launchers choose tiles for a GPU that isn't there."""
    tuning.device_of = lambda index: Device(90, 132)


def main() -> None:
    pretend_h100()
    with torch.no_grad(), fake_cuda():
        for case in cases():
            error = None
            try:
                case.check()
            except (FarshoreError, RuntimeError) as raised:
                error = f"{type(raised).__name__}: {raised}".splitlines()[0]
            print(json.dumps({"case": case.name, "error": error}), flush=True)


if __name__ == "__main__":
    main()
