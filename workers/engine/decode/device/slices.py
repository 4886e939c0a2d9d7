"""The dense slices of one micro-batch on a device: fixed buffers, and graphs of what is computed in them.

A step that reads local KV only is one graph, attention included, if the kernels' plan lies in a room. If
queries are sent to shards, two graphs lie between the attention of layer l and that of layer l + 1::

    ─ attention l ─▶ [finish l, query l + 1] ─▶ q is sent ─▶ [key_value l + 1, append] ─▶ attention l + 1

Called by ``micro_batch``. It must not know shards.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from farshore.kernels.base import KVLayout
from farshore.kernels.dense.base import KVSlots
from farshore.kernels.runtime.base import Stream, Work
from farshore.models.device_llama import DeviceLlama

MOST_GRAPH_ROWS = 256
"""Larger micro-batches run without graphs: their kernels take longer than their launches."""
MOST_STEP_GRAPHS = 8
"""Graphs of whole steps that are kept for each number of rows, one for each shape of attention's plan: 208 at
most, with 13 numbers of rows and two micro-batches. A batch uses one at a time: its shape changes when its
context has doubled. The one that was used least recently is dropped."""
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def bucket(rows: int) -> int:
    """The number of rows that buffers for ``rows`` rows have: one of few, so that few graphs are captured."""
    return next((size for size in _BUCKETS if rows <= size), -(-rows // 128) * 128)


class RowInputs(NamedTuple):
    """What a step says of each of R rows, i64[R] each. A row that the step does not use repeats the last one
    that it uses."""

    token: Tensor
    position: Tensor
    base: Tensor
    """Byte offset of the block that the row is appended to ..."""
    slot: Tensor
    """... and the slot in it."""
    source: Tensor
    """The row itself, or the last one that is used: then nothing of the row is appended."""


class DeviceSlices:
    """Buffers of R rows, in the model's dtype, which keep their addresses. Rows that a step does not use hold
    finite values of no meaning. ``stream`` must serve no other slices of as many rows."""

    def __init__(
        self, model: DeviceLlama, rows: int, stream: Stream, *, memory: Tensor, layout: KVLayout
    ) -> None:
        """``memory``: where the tails lie, in blocks of ``layout``."""
        config, device = model.config, model.device
        self._model = model
        self._rows = rows
        self._stream = stream
        self._replay = stream.replay if rows <= MOST_GRAPH_ROWS else _run_on(stream)
        self._steps: dict[Hashable, None] = {}
        """Keys of the graphs of whole steps, the one that was used last at the end."""
        self.inputs = torch.zeros(len(RowInputs._fields), rows, dtype=torch.int64, device=device)
        """i64[fields of RowInputs, R]"""
        self._inputs = RowInputs(*self.inputs)
        self._slots = KVSlots(memory, layout, 0, *self._inputs[2:])
        self._h, self.normed = (
            torch.zeros(rows, config.hidden, dtype=model.dtype, device=device) for _ in range(2)
        )
        """normed: input of the next projections, or of the head, [R, hidden]."""
        self.q, self.o = (
            torch.zeros(rows, config.q_heads, config.head_dim, dtype=model.dtype, device=device)
            for _ in range(2)
        )

    def project(self, layer: int) -> None:
        """Submits the rest of the previous layer, from ``o`` on, ``q`` of this one, and that its keys and
        values are appended to the tails. Layer 0 begins with the embeddings of the rows' tokens."""
        self._replay(("project", layer, self._rows), partial(self._project, layer))

    def query(self, layer: int) -> None:
        """Like :meth:`project`, without keys and values."""
        self._replay(("query", layer, self._rows), partial(self._query, layer))

    def key_value(self, layer: int) -> None:
        """Submits that keys and values are appended, after :meth:`query` of the same layer."""
        self._replay(("key_value", layer, self._rows), partial(self._key_value, layer))

    def finish(self) -> None:
        """Submits the rest of the last layer."""
        self._replay(("finish", self._rows), partial(self._leave, self._model.config.layers - 1))

    def step(self, attend: Callable[[int], None], shape: Hashable | None) -> None:
        """Submits all layers of a step. ``attend(layer)`` launches the attention of a layer, from ``q`` to
        ``o``; ``shape``: all that its launches depend on, None if no graph can hold them."""
        layers = range(self._model.config.layers)
        if shape is None or self._rows > MOST_GRAPH_ROWS:
            for layer in layers:
                self.project(layer)
                self._stream.run(partial(attend, layer))
            self.finish()
            return
        key = "step", self._rows, shape
        self._steps.pop(key, None)
        self._steps[key] = None
        if len(self._steps) > MOST_STEP_GRAPHS:
            oldest = next(iter(self._steps))
            del self._steps[oldest]
            self._stream.forget(oldest)
        self._stream.replay(key, partial(self._step, attend))

    def _step(self, attend: Callable[[int], None]) -> None:
        for layer in range(self._model.config.layers):
            self._project(layer)
            attend(layer)
        self._leave(self._model.config.layers - 1)

    def _project(self, layer: int) -> None:
        self._enter(layer)
        self._model.project_rows(layer, self.normed, self._inputs.position, q=self.q, kv=self._places(layer))

    def _query(self, layer: int) -> None:
        self._enter(layer)
        self._model.project_rows(layer, self.normed, self._inputs.position, q=self.q)

    def _key_value(self, layer: int) -> None:
        self._model.project_rows(layer, self.normed, self._inputs.position, kv=self._places(layer))

    def _places(self, layer: int) -> KVSlots:
        return self._slots._replace(layer=layer)

    def _enter(self, layer: int) -> None:
        if layer:
            self._leave(layer - 1)
        else:
            self._model.enter(self._inputs.token, h=self._h, normed=self.normed)

    def _leave(self, layer: int) -> None:
        self._model.leave(layer, self.o, h=self._h, normed=self.normed)


def _run_on(stream: Stream) -> Callable[[Hashable, Work], None]:
    return lambda key, work: stream.run(work)
