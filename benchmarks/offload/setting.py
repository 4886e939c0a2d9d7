"""Holds what the cases of the offload benchmark share: the model, the machine, the sizes, and measured hops.

Made by ``benchmark``. It must not know the bars.
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
"""The approximate time of the dense computation of one layer of SmolLM2 on two cores."""

LoadModel = Callable[[int], Llama]
"""Loads a model that is computed by the given number of threads."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The amount of work of each case. Tests use tiny sizes."""

    machine: MachineSizes = field(default_factory=partial(MachineSizes, gemm=(512,)))
    context_tokens: int = 8192
    sequences: int = 16
    delay_s: float = 1e-3
    """The network delay in each direction."""
    rounds: int = ROUNDS
    staggered_rounds: int = 7
    """Few, because a step of 16 sequences takes half a second on two cores."""
    settling_steps: int = 6 * TRIAL_STEPS
    hop_calls: int = 2000
    bulk_rounds: int = 10


class Setting:
    """One run of the benchmark. As a context manager, it ends the process that it may have started."""

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
        """The model for ``threads`` threads. Also sets the number of PyTorch's threads."""
        torch.set_num_threads(threads)
        if threads not in self._models:
            self._models[threads] = self._load(threads)
        return self._models[threads]

    @property
    def address(self) -> str:
        """The address of the attention worker for hops and bulk KV. Starts it on first use."""
        if self._address is None:
            self._address = self._processes.enter_context(offload_hop.shard_process(threads=1))
        return self._address

    def hop_times_s(self, transport: Transport, *, rested: bool = False) -> tuple[float, ...]:
        """The times of hops with 16 KiB each way, in seconds, measured once per run.

        By default each frame follows the last answer at once. If ``rested``, a layer's dense time passes
        between an answer and the next frame, as in a step; the shard is then asleep when the frame arrives.
        """
        key = (transport, rested)
        if key not in self._hop_times_s:
            self._hop_times_s[key] = offload_hop.hop_times_s(
                self.address,
                transport,
                calls=self.sizes.hop_calls,
                think_s=LAYER_DENSE_S if rested else 0.0,
            )
        return self._hop_times_s[key]
