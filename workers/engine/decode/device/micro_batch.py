"""One micro-batch of a device's decode step.

It has a stream for its kernels and another for its queries' way to the host. The host waits for two things
only, and for neither on the device as a whole: for the event behind a layer's queries, and for the shards::

    kernels   finish, query ──● k, v, append, local attention ───────── ▶ merge ── finish, query ──●
    copies                    └─ q to the host ──●                      ▲
    host      submits all of that ───── waits ───┴ sends q, waits for the shards, uploads (o, lse)

Called by ``loop``. It must not know the other micro-batches, sequences or placement.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Shards
from farshore.attention_offload.plan.step_plan import Read
from farshore.kernels.base import Kernels, State
from farshore.kernels.runtime.base import DeviceRuntime, Event, PinnedBuffer, Stream
from farshore.kvstore.store.tail import Tail, TailBatch
from farshore.models.device_llama import DeviceLlama
from farshore.workers.engine.attention_model import merged_dtype
from farshore.workers.engine.decode.device.plan_room import DevicePlanRoom
from farshore.workers.engine.decode.device.slices import DeviceSlices
from farshore.workers.engine.decode.kernel_plans import KernelPlans, LocalKV


class DeviceMicroBatch:
    """Buffers for up to ``rows`` rows. Call ``begin``, and ``run`` if the step reads from no shard. Otherwise
    ``send(0)``, ``merge(0)``, then ``start(1)``, ``send(1)``, ``merge(1)`` and so on, then ``finish``; after
    an error ``drain``."""

    def __init__(
        self,
        rows: int,
        *,
        model: DeviceLlama,
        attention: AttentionModel,
        local: LocalKV,
        kernels: Kernels[Any],
        runtime: DeviceRuntime,
        stream: Stream,
        copies: Stream,
    ) -> None:
        """``stream``, for kernels, and ``copies``, for queries, may serve micro-batches of other sizes."""
        spec, device = attention.specs[0], model.device
        self.stream = stream
        self._copies = copies
        self._runtime = runtime
        self._kernels = kernels
        self._slices = DeviceSlices(model, rows, stream, memory=local.memory, layout=attention.layouts[0])
        self._room = DevicePlanRoom(runtime, stream)
        self._plans = KernelPlans(attention, local, partial(kernels.plan, send=stream.send, room=self._room))
        self._inputs = runtime.pinned(*self._slices.inputs.shape, dtype=torch.int64)
        self._q_on_host = runtime.pinned(rows, spec.q_heads, spec.k_dim, dtype=model.dtype)
        self._local = State.identity(
            rows, spec.q_heads, spec.v_dim, dtype=merged_dtype(model.dtype), device=device
        )
        self._out = State(self._slices.o, torch.empty_like(self._local.lse))
        self._answers: _Answers | None = None
        self._layers = model.config.layers
        self._rows = 0
        self._index = 0
        self._shards: Shards | None = None
        self._batch: TailBatch
        self._plan: Any = None

    @property
    def normed(self) -> Tensor:
        """The head's input ``[rows of the step, hidden]``, once the work of ``stream`` has run."""
        return self._slices.normed[: self._rows]

    def begin(
        self,
        index: int,
        tokens: Sequence[int],
        positions: Sequence[int],
        tails: Sequence[Tail],
        reads: Sequence[Read],
        shards: Shards | None,
    ) -> None:
        """Takes the micro-batch's rows of a new step, as ``step._MicroBatch.begin``, and submits all that
        precedes the first layer's attention at the shards. The work of the last step must have run."""
        self._index, self._shards, self._rows = index, shards, len(tokens)
        self._batch = TailBatch(tails, positions)
        bases, slots = zip(*self._batch.slots(), strict=True)
        inputs = self._inputs.write().numpy()
        fields = tokens, positions, bases, slots, range(self._rows)  # those of RowInputs
        inputs[:, : self._rows] = fields
        inputs[:, self._rows :] = inputs[:, self._rows - 1 : self._rows]
        on_host = torch.from_numpy(inputs[1].copy())
        self.stream.upload(self._inputs, self._slices.inputs)
        if shards is not None:
            self.start(0)  # The device computes meanwhile.
        self._plan = self._plans.plan(tails, positions, reads, on_host)

    def run(self) -> Event:
        """Submits all layers of a step that reads from no shard; returns the event behind them."""
        self._batch.mark(range(self._layers))
        self._slices.step(partial(self._attend, self._plan, out=self._out), self._room.shape)
        return self.stream.record()

    def start(self, layer: int) -> None:
        """Submits all of a layer that precedes its attention; the queries first, since shards wait for
        them."""
        self._slices.query(layer)
        self._copies.wait(self.stream.record())
        self._copies.download(self._slices.q[: self._rows], self._q_on_host.first(self._rows))
        self._slices.key_value(layer)

    def send(self, layer: int) -> None:
        """Submits the attention to local KV, then waits for the queries and sends them to the shards."""
        assert self._shards is not None
        self._batch.mark(range(layer, layer + 1))
        self.stream.run(partial(self._attend, self._plan, layer, out=self._local))
        self._copies.record().wait()
        self._shards.send(layer, self._index, self._q_on_host.first(self._rows).read())

    def merge(self, layer: int) -> None:
        """Waits for the shards' states, and submits their merge with the local one, in span order."""
        assert self._shards is not None
        states = self._shards.wait(layer, self._index)
        merged = [*self._on_device(states), _rows(self._local, self._rows)]
        self.stream.run(partial(self._kernels.merge, merged, out=_rows(self._out, self._rows)))

    def finish(self) -> Event:
        """Submits the rest of the last layer; returns the event behind it."""
        self._slices.finish()
        return self.stream.record()

    def _attend(self, plan: Any, layer: int, *, out: State) -> None:
        """Launches the attention of all rows to local KV; those that are not used have no work."""
        self._kernels.partial(plan, layer, self._slices.q, out=out)

    def drain(self) -> None:
        """Blocks until nothing that was submitted runs any more."""
        for stream in (self._copies, self.stream):
            stream.record().wait()

    def _on_device(self, states: Sequence[State]) -> Sequence[State]:
        """The shards' states as the stream's later work sees them."""
        if not states:  # Only the other micro-batch reads from shards.
            return ()
        if self._answers is None or self._answers.shape != _shape(states):
            self._answers = _Answers(states, self._runtime, self._slices.o.device)
        self._answers.upload(states, self.stream)
        return self._answers.states


class _Answers:
    """Memory for the states of all shards, on the host and on the device."""

    def __init__(self, states: Sequence[State], runtime: DeviceRuntime, device: torch.device) -> None:
        self.shape = _shape(states)
        count = len(states)
        self._on_host: list[PinnedBuffer] = [
            runtime.pinned(count, *field.shape, dtype=field.dtype) for field in states[0]
        ]
        self._on_device = [
            torch.empty(count, *field.shape, dtype=field.dtype, device=device) for field in states[0]
        ]
        self.states = [State(o, lse) for o, lse in zip(*self._on_device, strict=True)]

    def upload(self, states: Sequence[State], stream: Stream) -> None:
        """Copies the states. The device has done with the last ones: the queries depend on them."""
        for on_host, on_device, fields in zip(
            self._on_host, self._on_device, zip(*states, strict=True), strict=True
        ):
            torch.stack(fields, out=on_host.write())
            stream.upload(on_host, on_device)


def _shape(states: Sequence[State]) -> tuple[Any, ...]:
    return len(states), states[0].o.shape, states[0].o.dtype, states[0].lse.dtype


def _rows(state: State, count: int) -> State:
    return State(state.o[:count], state.lse[:count])
