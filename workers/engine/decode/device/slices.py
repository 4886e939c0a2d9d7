"""The dense slices of one micro-batch on a device: fixed buffers, and graphs of what computes between two
attention points.

Between the attention of layer l and that of layer l + 1 lies one graph, or two if queries are sent early::

    ─ attention l ─▶ [finish l, project l + 1] ─▶ attention l + 1
    ─ attention l ─▶ [finish l, query l + 1] ─▶ q is sent ─▶ [key_value l + 1] ─▶ attention l + 1

Called by ``micro_batch``. It must not know KV or shards.
"""

from collections.abc import Callable, Hashable
from functools import partial

import torch

from farshore.kernels.runtime.base import Stream, Work
from farshore.models.llama import Llama

MOST_GRAPH_ROWS = 256
"""Larger micro-batches run without graphs: their kernels take longer than their launches."""
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def bucket(rows: int) -> int:
    """The number of rows that buffers for ``rows`` rows have: one of few, so that few graphs are captured."""
    return next((size for size in _BUCKETS if rows <= size), -(-rows // 128) * 128)


class DeviceSlices:
    """Buffers of R rows, in the model's dtype, which keep their addresses. Rows that a step does not use hold
    finite values of no meaning. ``stream`` must serve no other slices of as many rows."""

    def __init__(self, model: Llama, rows: int, stream: Stream) -> None:
        config, device = model.config, model.device
        self._model = model
        self._rows = rows
        self._replay = stream.replay if rows <= MOST_GRAPH_ROWS else _run_on(stream)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.h, self._normed = (
            torch.zeros(rows, config.hidden, dtype=model.dtype, device=device) for _ in range(2)
        )
        """h: input of the next layer, [R, hidden]."""
        self.q, self.k, self.v, self.o = (
            torch.zeros(rows, heads, config.head_dim, dtype=model.dtype, device=device)
            for heads in (config.q_heads, config.kv_heads, config.kv_heads, config.q_heads)
        )

    def project(self, layer: int) -> None:
        """Submits the rest of the previous layer, from ``o`` on, and ``q``, ``k`` and ``v`` of this one.
        Layer 0 begins with the embeddings of ``tokens``."""
        self._replay(("project", layer, self._rows), partial(self._project, layer))

    def query(self, layer: int) -> None:
        """Like :meth:`project`, without ``k`` and ``v``."""
        self._replay(("query", layer, self._rows), partial(self._query, layer))

    def key_value(self, layer: int) -> None:
        """Submits ``k`` and ``v``, after :meth:`query` of the same layer."""
        self._replay(("key_value", layer, self._rows), partial(self._key_value, layer))

    def finish(self) -> None:
        """Submits the rest of the last layer."""
        self._replay(("finish", self._rows), partial(self._finish, self._model.config.layers - 1))

    def _project(self, layer: int) -> None:
        self._enter(layer)
        self._model.project(layer, self.h, self.positions, out=(self.q, self.k, self.v))

    def _query(self, layer: int) -> None:
        self._enter(layer)
        self._normed.copy_(self._model.attention_input(layer, self.h))
        self.q.copy_(self._model.query(layer, self._normed, self.positions))

    def _key_value(self, layer: int) -> None:
        k, v = self._model.key_value(layer, self._normed, self.positions)
        self.k.copy_(k)
        self.v.copy_(v)

    def _enter(self, layer: int) -> None:
        if layer:
            self._finish(layer - 1)
        else:
            self.h.copy_(self._model.embed(self.tokens))

    def _finish(self, layer: int) -> None:
        self._model.finish(layer, self.h, self.o, out=self.h)


def _run_on(stream: Stream) -> Callable[[Hashable, Work], None]:
    return lambda key, work: stream.run(work)
