"""What the parts of the serve benchmark share: the model, sizes, and the machine's limits beside each part.

Made by ``serve``. Must not know the bars.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from farshore.benchmarks import machine
from farshore.benchmarks.demo import load_demo
from farshore.benchmarks.memory import allocate
from farshore.benchmarks.timing import interleave
from farshore.kernels.base import KVLayout
from farshore.models.config import ModelConfig
from farshore.models.llama import Llama
from farshore.models.weights import expected_shapes
from farshore.workers.engine.attention_model import attention_model


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: by default what the bars say; tests make it tiny."""

    decode_contexts: tuple[int, ...] = (128, 8192, 32768)
    decode_tokens: int = 64
    prefill_contexts: tuple[int, ...] = (1024, 8192, 32768)
    prefill_most_s: float = 40.0
    """A prompt is prefilled again, up to five times, while all runs together stay below this."""
    sequences: int = 8
    together_context: int = 4096
    together_tokens: int = 48
    beside_context: int = 16384
    beside_decodes: int = 4
    beside_tokens: int = 4096
    """Of each decode: more than come while the prompt is prefilled, and no more than there is memory for."""
    starts: int = 3
    kv_bytes: int = 2 << 30
    read_bytes: int = 1 << 29
    gemms: tuple[str, ...] = ("bfloat16 2048", "float32 2048")
    """The faster one is the limit: a bfloat16 dot may take longer than the float32 FMAs it replaces."""
    rounds: int = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """The machine's, measured just before and after a part."""

    read_gbps: float
    gemm_gflops: float


class Setting:
    """One run of the benchmark. The model is loaded when it is first asked for."""

    def __init__(
        self,
        facts: machine.Facts,
        sizes: Sizes,
        progress: Callable[[str], None],
        *,
        load: Callable[[int], Llama] | None = None,
    ) -> None:
        self.facts = facts
        self.sizes = sizes
        self.progress = progress
        self.prefilled_s: dict[int, float] = {}
        """What prompts' beginnings took alone, by their tokens, as far as measured in this run."""
        self.started = False
        """Whether the server has been started in this run, so that the next start is a warm one."""
        self._load = load or load_demo
        self._model: Llama | None = None
        self._memory: torch.Tensor | None = None
        self._products: dict[str, tuple[Callable[[], object], int]] = {}
        torch.set_num_threads(facts.threads)

    @property
    def model(self) -> Llama:
        if self._model is None:
            self.progress("loading the model")
            self._model = self._load(self.facts.threads)
        return self._model

    def limits(self) -> Limits:
        """The best of the readers and of the products, in turns."""
        if self._memory is None:
            self._memory = allocate(self.sizes.read_bytes)
            self._memory.fill_(1)
            self._products = {name: machine.gemm(name) for name in self.sizes.gemms}
        memory = self._memory
        readers = {name: (lambda read=read: read(memory)) for name, read in machine.READERS.items()}
        products = {name: product for name, (product, _) in self._products.items()}
        timed = interleave({**readers, **products}, rounds=self.sizes.rounds, warm_up=1)
        read_s = min(timed[name].median_s for name in readers)
        rate = max(flops / timed[name].median_s for name, (_, flops) in self._products.items())
        return Limits(memory.numel() / read_s / 1e9, rate / 1e9)


def weight_elements(config: ModelConfig) -> tuple[int, int]:
    """Of the layers, and of the vocabulary's matrix: what a decode step multiplies by."""
    shapes = {name: shape for name, shape in expected_shapes(config).items() if len(shape) == 2}
    vocabulary = config.vocab * config.hidden
    return sum(a * b for name, (a, b) in shapes.items() if name not in ("embed", "head")), vocabulary


def step_bytes(model: Llama, contexts: Sequence[int]) -> int:
    """What a decode step of sequences of these lengths reads at least, weights in the model's dtype."""
    layout: KVLayout = attention_model(model.config, model.dtype).layouts[0]
    return sum(weight_elements(model.config)) * model.dtype.itemsize + sum(contexts) * layout.token_bytes


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Of the layers' products, and of q.k and weights.v over every pair that is attended."""
    pairs = tokens * (tokens + 1) // 2
    attention = 4 * config.layers * config.q_heads * config.head_dim * pairs
    return 2 * weight_elements(config)[0] * tokens + attention
