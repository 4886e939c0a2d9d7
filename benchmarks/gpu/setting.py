"""What the sections of the GPU benchmark share: the device, its rates and clock, the models and the sizes.

Made by ``benchmark``, and by ``dry`` on a CPU with tiny sizes, so that every section runs without a GPU too.
It must not know the sections or the bars.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from farshore.benchmarks.gpu.models import LLAMA_8B, of_transformers
from farshore.benchmarks.timing import Timing, interleave
from farshore.kernels.base import Kernels
from farshore.kernels.runtime.cuda import collection_paused
from farshore.models.llama import Llama


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. The defaults are those of the bars; ``dry`` uses tiny sizes."""

    copy_bytes: int = 4 << 30
    gemm: int = 8192
    """n of the n x n x n product."""
    decode_tokens: int = 32 << 10
    decode_layers: int = 16
    """Layers read in turn, so that none is still in the L2 cache: 2 GiB at 32K tokens."""
    extend_tokens: int = 8 << 10
    dense_rows: int = 2048
    """Rows of the dense kernels beside those of ``batches``: of a chunk of prefill."""
    rounds: int = 9
    model: Mapping[str, Any] = field(default_factory=lambda: LLAMA_8B)
    """The random model, as config.json has it."""
    batches: tuple[int, ...] = (1, 16)
    """Sequences that are decoded together."""
    context_tokens: int = 1024
    new_tokens: int = 64
    answers: int = 8
    """Prompts whose answers are compared with transformers', in one batch."""
    prompt_tokens: int = 48
    answer_tokens: int = 16
    every_case: int = 1
    """Of the kernels' cases, every n-th is computed."""
    check_processes: int = 12
    """Processes that compute these cases."""
    shard_bytes: int = 4 << 30
    shard_threads: int = 8


class Setting:
    """One run of the benchmark. Rates and models are made when they are first used."""

    def __init__(
        self, device: torch.device, sizes: Sizes, *, folder: Path | None, progress: Callable[[str], None]
    ) -> None:
        """``folder``: the demo model cut off, from ``truncated``; None: a small random model instead."""
        self.device, self.sizes, self.folder, self.progress = device, sizes, folder, progress
        self.kernels: Kernels[Any] = cast(Kernels[Any], importlib.import_module("farshore.kernels.gpu.ops"))
        """On a CPU, triton must have been told to interpret them."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def timed(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        """Times the candidates alternately, on the device's own clock: without the time that the host takes
        to launch, unless the device waits for it."""
        if not self.on_gpu:
            return interleave(candidates, rounds=self.sizes.rounds, warm_up=1)
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        for number in range(2 + self.sizes.rounds):
            for name, run in candidates.items():
                begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begun.record()
                run()
                ended.record()
                ended.synchronize()
                if number >= 2:
                    samples[name].append(begun.elapsed_time(ended) / 1e3)
        return {name: Timing(tuple(times)) for name, times in samples.items()}

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """``run`` as a CUDA graph, after two runs that compile what it launches; on a CPU ``run`` itself."""
        if not self.on_gpu:
            return run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with collection_paused(), torch.cuda.graph(graph):
            run()
        return graph.replay

    @cached_property
    def copy_gbps(self) -> float:
        """Bytes read and written per second, in GB/s, by the device's own copy."""
        self.progress("copy bandwidth")
        source = torch.ones(self.sizes.copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        timing = self.timed({"copy": lambda: target.copy_(source)})["copy"]
        return 2 * self.sizes.copy_bytes / timing.median_s / 1e9

    @cached_property
    def gemm_tflops(self) -> float:
        """PyTorch's bfloat16 product of square matrices."""
        self.progress("bfloat16 product")
        n = self.sizes.gemm
        a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        out = torch.empty_like(a)
        timing = self.timed({"gemm": lambda: torch.matmul(a, b, out=out)})["gemm"]
        return 2 * n**3 / timing.median_s / 1e12

    def rates(self) -> dict[str, float]:
        """The rates that a section has asked for."""
        names = ("copy_gbps", "gemm_tflops")
        return {name: self.__dict__[name] for name in names if name in self.__dict__}

    @cached_property
    def large(self) -> tuple[Any, Llama]:
        """The random model of the 8B shape in bfloat16: transformers', and ours with the same weights."""
        self.progress("making the random model")
        theirs = self._random(self.sizes.model, torch.bfloat16)
        return theirs, of_transformers(theirs)

    @cached_property
    def small(self) -> tuple[Any, Llama]:
        """The demo model cut off, or a small random one, in float32: transformers', and ours with the
        same weights."""
        if self.folder is None:
            changes = {
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "vocab_size": 512,
            }
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
            theirs = self._random({**LLAMA_8B, **changes, **heads}, torch.float32)
        else:
            auto = importlib.import_module("transformers").AutoModelForCausalLM
            theirs = auto.from_pretrained(self.folder, dtype=torch.float32).to(self.device).eval()
        return theirs, of_transformers(theirs)

    def _random(self, described: Mapping[str, Any], dtype: torch.dtype) -> Any:
        """A Llama of transformers with random weights on the device."""
        transformers = importlib.import_module("transformers")
        config = transformers.LlamaConfig(**{k: v for k, v in described.items() if k != "model_type"})
        default = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                return transformers.LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)


def prompts(count: int, tokens: int, *, vocab: int) -> list[list[int]]:
    """``count`` different prompts of random tokens, the same in each run."""
    generator = torch.Generator(device="cpu").manual_seed(count)
    return torch.randint(vocab, (count, tokens), generator=generator, device="cpu").tolist()
