"""The decoder's slices on native CPU kernels. The base class, in PyTorch, is the reference.

Created by ``weights`` if the native kernels are built and take the weights' dtype. Both classes share the
weights, so each call may run in either. It must not know how weights are read.
"""

import sys

import torch
from torch import Tensor

from farshore.kernels.cpu import dense
from farshore.kernels.cpu.packed import Blocks
from farshore.models.config.model import ModelConfig
from farshore.models.layer_buffers import LayerBuffers
from farshore.models.llama import Llama, LlamaWeights, Matrix


def matrix(kind: str, rows: Tensor, *, dtype: torch.dtype, threads: int) -> Matrix | None:
    """The weights of ``rows`` u8[out, bytes], blocks of ggml's type ``kind``: packed for bfloat16,
    dequantised for float32. None for a type that the kernels do not read."""
    blocks = Blocks.of(kind, rows)
    if blocks is None:
        return None
    if dtype == torch.float32:
        return blocks.dequantise(threads=threads)
    return blocks.pack(threads=threads)


class NativeLlama(Llama):
    """Like :class:`Llama`, with ``threads`` threads per call. If the CPU has a matrix unit, calls with more
    than ``dense.FEW_ROWS`` rows of bfloat16 run in PyTorch."""

    def __init__(self, config: ModelConfig, weights: LlamaWeights, *, threads: int) -> None:
        super().__init__(config, weights)
        many_rows_in_pytorch = self.dtype == torch.bfloat16 and dense.MATRIX_UNIT
        self._most_rows = dense.FEW_ROWS if many_rows_in_pytorch else sys.maxsize
        common = {"eps": config.rms_eps, "threads": threads}
        self._layers = [
            dense.layer(
                attention_norm=w.attention_norm,
                q=dense.Linear(w.q, w.q_bias),
                k=dense.Linear(w.k, w.k_bias),
                v=dense.Linear(w.v, w.v_bias),
                o=dense.Linear(w.o, w.o_bias),
                mlp_norm=w.mlp_norm,
                gate=dense.Linear(w.gate, w.gate_bias),
                up=dense.Linear(w.up, w.up_bias),
                down=dense.Linear(w.down, w.down_bias),
                rotation=(self._cos, self._sin),
                **common,
            )
            for w in weights.layers
        ]
        self._head = dense.lm_head(norm=weights.norm, vocabulary=dense.Linear(weights.head), **common)

    def expect_calls(self) -> None:
        dense.expect_calls()

    def embed(self, token_ids: Tensor) -> Tensor:
        return dense.gather(self.weights.embed, token_ids)

    def attention_input(self, layer: int, h: Tensor) -> Tensor:
        return dense.attention_input(self._layers[layer], h)

    def query(self, layer: int, normed: Tensor, positions: Tensor) -> Tensor:
        if len(normed) > self._most_rows:
            return super().query(layer, normed, positions)
        return dense.query(self._layers[layer], normed, positions)

    def key_value(self, layer: int, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if len(normed) > self._most_rows:
            return super().key_value(layer, normed, positions)
        return dense.key_value(self._layers[layer], normed, positions)

    def project(
        self,
        layer: int,
        h: Tensor,
        positions: Tensor,
        *,
        out: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if len(h) > self._most_rows:
            return super().project(layer, h, positions, out=out)
        return dense.project(self._layers[layer], h, positions, out=out)

    def finish(self, layer: int, h: Tensor, o: Tensor, *, out: Tensor | None = None) -> Tensor:
        if len(h) > self._most_rows:
            return super().finish(layer, h, o, out=out)
        return dense.finish(self._layers[layer], h, o, out=out)

    def layer_buffers(self, rows: int) -> LayerBuffers:
        if rows > self._most_rows:
            return super().layer_buffers(rows)
        return dense.LayerBuffers(self._layers, rows)

    def logits(self, h: Tensor) -> Tensor:
        if len(h) > self._most_rows:
            return super().logits(h)
        return dense.logits(self._head, h)
