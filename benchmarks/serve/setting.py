"""The setting of the serve and dense benchmarks: the model, sizes, and the machine's limits.

Created by ``benchmark`` and by the catalogue, used by all cases. Must not know the bars.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from farshore.benchmarks import machine
from farshore.benchmarks.demo import load_demo
from farshore.benchmarks.memory import allocate
from farshore.benchmarks.timing import interleave
from farshore.kernels.base import KVLayout
from farshore.models.config.model import ModelConfig
from farshore.models.llama import Llama
from farshore.models.weights.names import expected_shapes
from farshore.workers.engine.attention_model import attention_model


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. The defaults are what the bars are set for; tests use tiny sizes."""

    decode_contexts: tuple[int, ...] = (128, 8192, 32768)
    decode_tokens: int = 64
    prefill_contexts: tuple[int, ...] = (1024, 8192, 32768)
    prefill_most_s: float = 40.0
    """A prompt is prefilled repeatedly, up to MOST_PREFILLS times, while the total time stays below this."""
    sequences: int = 8
    """Sequences that are decoded concurrently, each of ``together_context`` tokens."""
    together_context: int = 4096
    together_tokens: int = 48
    """Tokens of each while all of them run."""
    beside_context: int = 16384
    """Tokens of the prompt that is prefilled while other sequences are decoded."""
    beside_decodes: int = 4
    """Sequences that are decoded meanwhile."""
    running_tokens: int = 4096
    """``max_tokens`` of a sequence that runs until its measurement ends: more than are generated meanwhile,
    and few enough for the memory."""
    starts: int = 3
    """Warm starts of the server."""
    kv_bytes: int = 2 << 30
    """KV budget of the engine."""
    read_bytes: int = 1 << 29
    """Memory that is read to measure the read bandwidth."""
    gemms: tuple[str, ...] = ("bfloat16 2048", "float32 2048")
    """Products (dtype, matrix size). The faster one is the limit: without bfloat16 FMAs, a bfloat16 product
    may be slower than a float32 one."""
    rounds: int = 5
    """Interleaved rounds in which the limits are measured."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The machine's read bandwidth and GEMM rate."""

    read_gbps: float
    gemm_gflops: float


class Setting:
    """One run of a benchmark. The model is loaded when it is first used."""

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
        """Tokens -> seconds that prefilling the first so many tokens of a prompt took, while nothing else
        ran."""
        self.started = False
        """Whether the server has been started in this run, so that the next start is warm."""
        self._load = load or load_demo
        self._model: Llama | None = None
        self._memory: torch.Tensor | None = None
        self._products: dict[str, tuple[Callable[[], object], int]] = {}
        torch.set_num_threads(facts.threads)

    @property
    def model(self) -> Llama:
        """The model, loaded at the first use."""
        if self._model is None:
            self.progress("loading the model")
            self._model = self._load(self.facts.threads)
        return self._model

    def limits(self) -> Limits:
        """Measures the limits now: the fastest reader and the fastest product, interleaved."""
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
    """(elements of the layers' matrices, elements of the vocabulary's matrix): a decode step's weights."""
    shapes = {name: shape for name, shape in expected_shapes(config).items() if len(shape) == 2}
    vocabulary = config.vocab * config.hidden
    return sum(a * b for name, (a, b) in shapes.items() if name not in ("embed", "head")), vocabulary


def step_bytes(model: Llama, contexts: Sequence[int]) -> int:
    """Bytes that a decode step must read: the weights in the model's dtype, and the KV of sequences with
    these context lengths (tokens)."""
    layout: KVLayout = attention_model(model.config, model.dtype).layouts[0]
    return sum(weight_elements(model.config)) * model.dtype.itemsize + sum(contexts) * layout.token_bytes


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of the layers' products, and of q·k and weights·v for all attended pairs of ``tokens`` tokens."""
    pairs = tokens * (tokens + 1) // 2
    attention = 4 * config.layers * config.q_heads * config.head_dim * pairs
    return 2 * weight_elements(config)[0] * tokens + attention
