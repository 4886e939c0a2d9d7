"""Fixed buffers in which a decode step's rows pass through all layers.

Created by ``Llama.layer_buffers``; called by the engine's decode step, layer by layer. The class here
computes in PyTorch. ``kernels.cpu.dense.LayerBuffers`` has the same methods on native kernels. It must not
know attention: the caller fills ``o``.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from farshore.models.llama import Llama


class LayerBuffers(Protocol):
    """Buffers of R rows, in the model's dtype. All tensors except ``h`` keep their addresses. The calls of a
    step, with layers in order::

        enter ─▶ project (or query, then key_value) ─▶ caller fills o ─▶ finish ─▶ project ...
    """

    positions: Tensor
    """i64[R]: position of each row. The caller fills it."""
    h: Tensor
    """[R, hidden]: input of the next layer."""
    q: Tensor
    """[R, q_heads, head_dim] of the layer that was projected last."""
    k: Tensor
    """[R, kv_heads, head_dim]; ``v`` too."""
    v: Tensor
    o: Tensor
    """[R, q_heads, head_dim]: output of attention. The caller fills it before :meth:`finish`."""

    def enter(self, h: Tensor) -> None:
        """Takes the embedded rows, [R, hidden]."""

    def query(self, layer: int) -> None:
        """Computes ``q`` from ``h``, so that it can be sent before ``k`` and ``v`` are computed."""

    def key_value(self, layer: int) -> None:
        """Computes ``k`` and ``v``, after :meth:`query` of the same layer."""

    def project(self, layer: int) -> None:
        """Computes ``q``, ``k`` and ``v``: :meth:`query` and :meth:`key_value` in one call."""

    def finish(self, layer: int) -> None:
        """Computes the layer's output from ``h`` and ``o``, and makes it ``h``."""


class SliceLayerBuffers:
    """A :class:`LayerBuffers` that calls the methods of a model."""

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
