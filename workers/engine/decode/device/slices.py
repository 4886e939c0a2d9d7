"""The dense slices of one micro-batch on a device: fixed buffers, and graphs of what computes between two
attention points.

Between the attention of layer l and that of layer l + 1 lies one graph, or two if queries are sent early::

    ─ attention l ─▶ [finish l, project l + 1, append] ─▶ attention l + 1
    ─ attention l ─▶ [finish l, query l + 1] ─▶ q is sent ─▶ [key_value l + 1, append] ─▶ attention l + 1

Attention itself is launched outside of graphs: its number of tiles changes from step to step. Called by
``micro_batch``. It must not know shards.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from farshore.kernels.runtime.base import Stream, Work
from farshore.kvstore.store.layout.blocks import SlotWriter
from farshore.models.llama import Llama

MOST_GRAPH_ROWS = 256
"""Larger micro-batches run without graphs: their kernels take longer than their launches."""
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
    """The row itself, or the last one that is used."""


class DeviceSlices:
    """Buffers of R rows, in the model's dtype, which keep their addresses. Rows that a step does not use hold
    finite values of no meaning. ``stream`` must serve no other slices of as many rows."""

    def __init__(self, model: Llama, rows: int, stream: Stream, writer: SlotWriter) -> None:
        """``writer`` writes R rows of keys and values to the tails."""
        config, device = model.config, model.device
        self._model = model
        self._rows = rows
        self._replay = stream.replay if rows <= MOST_GRAPH_ROWS else _run_on(stream)
        self._writer = writer
        self.inputs = torch.zeros(len(RowInputs._fields), rows, dtype=torch.int64, device=device)
        """i64[fields of RowInputs, R]"""
        self._inputs = RowInputs(*self.inputs)
        self.h, self._normed = (
            torch.zeros(rows, config.hidden, dtype=model.dtype, device=device) for _ in range(2)
        )
        """h: input of the next layer, [R, hidden]."""
        self.q, self.k, self.v, self.o = (
            torch.zeros(rows, heads, config.head_dim, dtype=model.dtype, device=device)
            for heads in (config.q_heads, config.kv_heads, config.kv_heads, config.q_heads)
        )

    def project(self, layer: int, *, full: bool) -> None:
        """Submits the rest of the previous layer, from ``o`` on, ``q``, ``k`` and ``v`` of this one, and that
        k and v are appended to the tails. Layer 0 begins with the embeddings of the rows' tokens.
        ``full``: the step uses all rows."""
        self._replay(("project", layer, self._rows, full), partial(self._project, layer, full))

    def query(self, layer: int) -> None:
        """Like :meth:`project`, without ``k`` and ``v``."""
        self._replay(("query", layer, self._rows), partial(self._query, layer))

    def key_value(self, layer: int, *, full: bool) -> None:
        """Submits ``k`` and ``v``, and that they are appended, after :meth:`query` of the same layer."""
        self._replay(("key_value", layer, self._rows, full), partial(self._key_value, layer, full))

    def finish(self) -> None:
        """Submits the rest of the last layer."""
        self._replay(("finish", self._rows), partial(self._finish, self._model.config.layers - 1))

    def _project(self, layer: int, full: bool) -> None:
        self._enter(layer)
        self._model.project(layer, self.h, self._inputs.position, out=(self.q, self.k, self.v))
        self._append(layer, full)

    def _query(self, layer: int) -> None:
        self._enter(layer)
        self._normed.copy_(self._model.attention_input(layer, self.h))
        self.q.copy_(self._model.query(layer, self._normed, self._inputs.position))

    def _key_value(self, layer: int, full: bool) -> None:
        k, v = self._model.key_value(layer, self._normed, self._inputs.position)
        self.k.copy_(k)
        self.v.copy_(v)
        self._append(layer, full)

    def _append(self, layer: int, full: bool) -> None:
        # A row that is not used writes the values of the last one to the same place.
        k, v = (x if full else x.index_select(0, self._inputs.source) for x in (self.k, self.v))
        self._writer.write(layer, k, v)

    def _enter(self, layer: int) -> None:
        if layer:
            self._finish(layer - 1)
        else:
            self.h.copy_(self._model.embed(self._inputs.token))
            self._writer.place(self._inputs.base, self._inputs.slot)

    def _finish(self, layer: int) -> None:
        self._model.finish(layer, self.h, self.o, out=self.h)


def _run_on(stream: Stream) -> Callable[[Hashable, Work], None]:
    return lambda key, work: stream.run(work)
