"""What the parts of the offload benchmark share: the model, the machine, how much is measured, and hops.

Made by ``offload``. Must not know the bars.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch

from farshore.attention_offload.transport.frames import Transport
from farshore.benchmarks.machine import Facts, MachineSizes
from farshore.benchmarks.offload import hop as offload_hop
from farshore.benchmarks.timing import ROUNDS
from farshore.models.llama import Llama
from farshore.workers.engine.decode.micro_batch_tuner import TRIAL_STEPS

LAYER_DENSE_S = 500e-6
"""Of SmolLM2 on two cores, about."""

LoadModel = Callable[[int], Llama]
"""A model that ``threads`` threads serve."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; tests make it tiny."""

    machine: MachineSizes = field(default_factory=partial(MachineSizes, gemm=(512,)))
    context_tokens: int = 8192
    sequences: int = 16
    delay_s: float = 1e-3
    """One way."""
    rounds: int = ROUNDS
    staggered_rounds: int = 7
    """A step of 16 sequences takes half a second on two cores."""
    settling_steps: int = 6 * TRIAL_STEPS
    hop_calls: int = 2000
    bulk_rounds: int = 10


class Setting:
    """One run of the benchmark; a context, for the process that it may start."""

    def __init__(self, load: LoadModel, machine: Facts, sizes: Sizes) -> None:
        self.machine = machine
        self.sizes = sizes
        self._load = load
        self._models: dict[int, Llama] = {}
        self._processes = ExitStack()
        self._address: str | None = None
        self._hop_times_s: dict[tuple[Transport, bool], tuple[float, ...]] = {}

    def __enter__(self) -> "Setting":
        return self

    def __exit__(self, *raised: object) -> None:
        self._processes.close()

    def model(self, threads: int) -> Llama:
        """Also sets PyTorch's threads."""
        torch.set_num_threads(threads)
        if threads not in self._models:
            self._models[threads] = self._load(threads)
        return self._models[threads]

    @property
    def address(self) -> str:
        """Of an attention worker that hops and bulk KV are measured with."""
        if self._address is None:
            self._address = self._processes.enter_context(offload_hop.shard_process(threads=1))
        return self._address

    def hop_times_s(self, transport: Transport, *, rested: bool = False) -> tuple[float, ...]:
        """16 KiB each way, measured once a run: one right after the other; or ``rested``, with a layer's
        dense time between an answer and the next frame, as in a step. The shard has gone to sleep then."""
        key = (transport, rested)
        if key not in self._hop_times_s:
            self._hop_times_s[key] = offload_hop.hop_times_s(
                self.address,
                transport,
                calls=self.sizes.hop_calls,
                think_s=LAYER_DENSE_S if rested else 0.0,
            )
        return self._hop_times_s[key]
