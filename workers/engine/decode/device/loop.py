"""The layer loop of one decode step on a device: the same contract as ``step.LayerLoop``, which the CPU runs.

Each of two micro-batches has a stream, so that one computes while the other waits for its shards. Called by
``retry``. It must not know sequences, placement or how tokens are drawn.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Shards
from farshore.attention_offload.plan.step_plan import StepPlan, cut_reads, split_rows
from farshore.kernels.base import Kernels
from farshore.kernels.runtime.base import DeviceRuntime, Event
from farshore.kvstore.store.tail import Tail
from farshore.models.device_llama import DeviceLlama
from farshore.workers.engine.decode.device.micro_batch import DeviceMicroBatch
from farshore.workers.engine.decode.device.slices import bucket
from farshore.workers.engine.decode.kernel_plans import LocalKV
from farshore.workers.engine.decode.step import begin

DEVICE_MICRO_BATCHES = 2
"""Most micro-batches of a step. More would read the weights more often, and hide no more: while the host
waits for one, the device computes the other."""
WARM_UP_STEPS = 2
"""Steps of a new size that take longer than later ones: one without graphs, one that captures them."""


class DeviceLayerLoop:
    """Runs the steps of one engine on the runtime's device. Not thread-safe: the thread that entered the
    runtime calls it. Buffers and graphs are kept for every number of rows that buffers come in."""

    def __init__(
        self,
        *,
        model: DeviceLlama,
        attention: AttentionModel,
        kernels: Kernels[Any],
        shards: Shards,
        local: LocalKV,
        runtime: DeviceRuntime,
    ) -> None:
        self._model = model
        self._attention = attention
        self._kernels = kernels
        self._shards = shards
        self._local = local
        self._runtime = runtime
        self._streams = [(runtime.stream(), runtime.stream()) for _ in range(DEVICE_MICRO_BATCHES)]
        """Of each micro-batch: for its kernels, and for its queries' way to the host."""
        self._batches: dict[tuple[int, int], DeviceMicroBatch] = {}
        """By number in the step and rows of the buffers."""
        self._ended: Event | None = None
        """Behind the last step, unless it failed."""

    def run(
        self, plan: StepPlan, tokens: Sequence[int], tails: Sequence[Tail], *, micro_batches: int
    ) -> Tensor:
        """As ``step.LayerLoop.run``. The logits lie on the device, ordered with ``runtime.main``."""
        cuts = split_rows(len(tokens), min(micro_batches, DEVICE_MICRO_BATCHES))
        shards, reads = begin(plan, cuts, shards=self._shards, local=self._local)
        if self._ended is not None:
            self._ended.wait()
        self._ended = None
        batches = [self._batch(index, len(cut)) for index, cut in enumerate(cuts)]
        try:
            before = self._runtime.main.record()
            for index, (batch, rows) in enumerate(zip(batches, cuts, strict=True)):
                cut = slice(rows.start, rows.stop)
                batch.stream.wait(before)
                batch.begin(
                    index, tokens[cut], plan.positions[cut], tails[cut], cut_reads(reads, rows), shards
                )
            if shards is None:
                ends = [batch.run() for batch in batches]
            else:
                self._run_layers(batches)
                ends = [batch.finish() for batch in batches]
            for end in ends:
                self._runtime.main.wait(end)
            logits = torch.empty(
                len(tokens), self._model.config.vocab, dtype=torch.float32, device=self._model.device
            )
            self._runtime.main.run(partial(self._compute_logits, [batch.normed for batch in batches], logits))
        except Exception:
            # No kernel may read or write the tails while they are truncated.
            for batch in batches:
                batch.drain()
            raise
        self._ended = self._runtime.main.record()
        self._runtime.settle()
        return logits

    def _run_layers(self, batches: Sequence[DeviceMicroBatch]) -> None:
        layers = self._model.config.layers
        for batch in batches:
            batch.send(0)
        for layer in range(layers):
            for batch in batches:
                batch.merge(layer)
                if layer + 1 < layers:
                    batch.start(layer + 1)
                    batch.send(layer + 1)

    def _batch(self, index: int, rows: int) -> DeviceMicroBatch:
        key = index, bucket(rows)
        if key not in self._batches:
            stream, copies = self._streams[index]
            self._batches[key] = DeviceMicroBatch(
                bucket(rows),
                model=self._model,
                attention=self._attention,
                local=self._local,
                kernels=self._kernels,
                runtime=self._runtime,
                stream=stream,
                copies=copies,
            )
        return self._batches[key]

    def _compute_logits(self, normed: Sequence[Tensor], logits: Tensor) -> None:
        logits.copy_(self._model.head(torch.cat(list(normed))))
