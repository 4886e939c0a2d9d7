"""Rows on their way through all layers in memory of their own: what a decode step calls, layer by layer.

Made by ``Llama.passage``. This is PyTorch's; ``kernels.cpu.dense.LayerBuffers`` is the same without Python
between
two native calls. It must not know attention: whoever calls it fills ``o``.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from farshore.models.llama import Llama


class LayerBuffers(Protocol):
    """R rows. All tensors stay where they are but ``h``; layers are taken in order::

    enter ─▶ project (or query, then key_value) ─▶ (o, from elsewhere) ─▶ finish ─▶ project ...
    """

    positions: Tensor
    """i64[R], the caller's to fill."""
    h: Tensor
    """[R, hidden]: what the next layer takes in."""
    q: Tensor
    """[R, q_heads, head_dim], of the layer projected last; ``k`` and ``v`` [R, kv_heads, head_dim]."""
    k: Tensor
    v: Tensor
    o: Tensor
    """[R, q_heads, head_dim]: the attention's output, the caller's to fill before :meth:`finish`."""

    def enter(self, h: Tensor) -> None: ...

    def query(self, layer: int) -> None: ...

    def key_value(self, layer: int) -> None: ...

    def project(self, layer: int) -> None: ...

    def finish(self, layer: int) -> None: ...


class SliceLayerBuffers:
    """A :class:`LayerBuffers` over a model's slices."""

    def __init__(self, model: "Llama", rows: int) -> None:
        config = model.config
        heads = (config.q_heads, config.kv_heads, config.kv_heads, config.q_heads)
        self.q, self.k, self.v, self.o = (
            torch.empty(rows, n, config.head_dim, dtype=model.dtype, device=model.device) for n in heads
        )
        self.positions = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self.h = self._normed = torch.empty(rows, config.hidden, dtype=model.dtype, device=model.device)
        self._model = model

    def enter(self, h: Tensor) -> None:
        self.h = h

    def query(self, layer: int) -> None:
        self._normed = self._model.attention_input(layer, self.h)
        self.q.copy_(self._model.query(layer, self._normed, self.positions))

    def key_value(self, layer: int) -> None:
        k, v = self._model.key_value(layer, self._normed, self.positions)
        self.k.copy_(k)
        self.v.copy_(v)

    def project(self, layer: int) -> None:
        self._model.project(layer, self.h, self.positions, out=(self.q, self.k, self.v))

    def finish(self, layer: int) -> None:
        self.h = self._model.finish(layer, self.h, self.o)
