"""The decoder's slices in fewer and larger calls, for a device where each call costs a microsecond or two.

The projections of one input lie in one matrix, and what lies between two products is one kernel. The results
are those of the base class, up to the order in which a product sums. Created by ``weights`` for a device
other than the CPU. It must not know how weights are read, nor what stored KV looks like: it passes the rows'
places on.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from farshore.kernels import select
from farshore.kernels.dense.base import KVRows, KVSlots, Rotation
from farshore.models.config.model import ModelConfig
from farshore.models.llama import LayerWeights, Llama, LlamaWeights, as_tensor


def joined(layer: LayerWeights) -> LayerWeights:
    """The same weights, with q, k and v one after the other in memory, and gate and up too."""
    q, k, v = _parts(*map(as_tensor, (layer.q, layer.k, layer.v)))
    gate, up = _parts(*map(as_tensor, (layer.gate, layer.up)))
    return layer._replace(q=q, k=k, v=v, gate=gate, up=up)


class DeviceLlama(Llama):
    """Like :class:`Llama`, with slices for the rows of a step, which write to given buffers. Weights that are
    not :func:`joined` are copied."""

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        layers = tuple(joined(layer) for layer in weights.layers)
        super().__init__(config, weights._replace(layers=layers))
        self._dense = select.dense(self.device, dtype=self.dtype)
        self._rotation = Rotation(self._cos, self._sin)
        self._qkv = [_whole(w.q, w.k, w.v) for w in layers]
        self._kv = [_whole(w.k, w.v) for w in layers]
        self._gate_up = [_whole(w.gate, w.up) for w in layers]
        sizes = config.q_heads, config.kv_heads, config.kv_heads
        heads = [size * config.head_dim for size in sizes]
        self._qkv_bias = [_biases((w.q_bias, w.k_bias, w.v_bias), heads, weights.norm) for w in layers]
        self._kv_bias = [_biases((w.k_bias, w.v_bias), heads[1:], weights.norm) for w in layers]
        inner = [config.intermediate] * 2
        self._gate_up_bias = [_biases((w.gate_bias, w.up_bias), inner, weights.norm) for w in layers]

    def attention_input(self, layer: int, h: Tensor) -> Tensor:
        return self._norm(h, self._input_norm(layer))

    def query(self, layer: int, normed: Tensor, positions: Tensor) -> Tensor:
        q = self._heads(normed, self.config.q_heads)
        self.project_rows(layer, normed, positions, q=q)
        return q

    def key_value(self, layer: int, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        kv = KVRows(*(self._heads(normed, self.config.kv_heads) for _ in range(2)))
        self.project_rows(layer, normed, positions, kv=kv)
        return kv.k, kv.v

    def project(
        self,
        layer: int,
        h: Tensor,
        positions: Tensor,
        *,
        out: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if out is None:
            q_heads, kv_heads = self.config.q_heads, self.config.kv_heads
            q, k, v = (self._heads(h, heads) for heads in (q_heads, kv_heads, kv_heads))
            out = q, k, v
        q, k, v = out
        self.project_rows(layer, self.attention_input(layer, h), positions, q=q, kv=KVRows(k, v))
        return out

    def finish(self, layer: int, h: Tensor, o: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = h.clone()
        elif out is not h:
            out.copy_(h)
        return out.add_(self._feed_forward(layer, o, out, torch.empty_like(out)))

    def logits(self, h: Tensor) -> Tensor:
        return self.head(self._norm(h, self.weights.norm))

    def enter(self, token_ids: Tensor, *, h: Tensor, normed: Tensor) -> None:
        """Writes the embeddings of the rows' tokens, and the input of layer 0's projections."""
        h.copy_(self.embed(token_ids))
        self._dense.add_norm(h, None, self._input_norm(0), self.config.rms_eps, out=normed)

    def project_rows(
        self,
        layer: int,
        normed: Tensor,
        positions: Tensor,
        *,
        q: Tensor | None = None,
        kv: KVRows | KVSlots | None = None,
    ) -> None:
        """Writes the rows' queries to q, and their keys and values to ``kv``: buffers, or the places at which
        they are stored. What is None is not computed."""
        w = self.weights.layers[layer]
        weight, bias = self._qkv[layer], self._qkv_bias[layer]
        if kv is None:
            weight, bias = as_tensor(w.q), w.q_bias
        elif q is None:
            weight, bias = self._kv[layer], self._kv_bias[layer]
        self._dense.rotate(linear(normed, weight, bias), self._rotation, positions, q=q, kv=kv)

    def leave(self, layer: int, o: Tensor, *, h: Tensor, normed: Tensor) -> None:
        """Makes h the layer's output, in place, from the attention output o; and ``normed`` the input of the
        next layer's projections, or behind the last layer that of :meth:`head`."""
        x = self._feed_forward(layer, o, h, normed)
        self._dense.add_norm(h, x, self._input_norm(layer + 1), self.config.rms_eps, out=normed)

    def head(self, normed: Tensor) -> Tensor:
        """The last layer's normalised output [R, hidden] → logits f32 [R, vocab]."""
        return linear(normed, as_tensor(self.weights.head)).float()

    def _feed_forward(self, layer: int, o: Tensor, h: Tensor, normed: Tensor) -> Tensor:
        """Adds the attention's part to h, in place; returns what remains to be added. ``normed`` is
        scratch."""
        w = self.weights.layers[layer]
        x = linear(o.flatten(1), as_tensor(w.o), w.o_bias)
        self._dense.add_norm(h, x, w.mlp_norm, self.config.rms_eps, out=normed)
        gate_up = linear(normed, self._gate_up[layer], self._gate_up_bias[layer])
        inner = gate_up.new_empty(len(gate_up), self.config.intermediate)
        self._dense.silu_multiply(gate_up, out=inner)
        return linear(inner, as_tensor(w.down), w.down_bias)

    def _input_norm(self, layer: int) -> Tensor:
        layers = self.weights.layers
        return layers[layer].attention_norm if layer < len(layers) else self.weights.norm

    def _norm(self, h: Tensor, weight: Tensor) -> Tensor:
        normed = torch.empty_like(h)
        self._dense.add_norm(h, None, weight, self.config.rms_eps, out=normed)
        return normed

    def _heads(self, rows: Tensor, heads: int) -> Tensor:
        return rows.new_empty(len(rows), heads, self.config.head_dim)


def _parts(*matrices: Tensor) -> tuple[Tensor, ...]:
    """Matrices [out, in] of one memory, one after the other: copies, unless they are that already."""
    ends = [matrix.storage_offset() + matrix.numel() for matrix in matrices]
    adjacent = all(
        matrix.untyped_storage()._cdata == matrices[0].untyped_storage()._cdata
        and matrix.storage_offset() == end
        and matrix.is_contiguous()
        for matrix, end in zip(matrices[1:], ends, strict=False)
    )
    if adjacent and matrices[0].is_contiguous():
        return matrices
    return torch.cat(matrices).split([len(matrix) for matrix in matrices])


def _whole(*matrices: object) -> Tensor:
    """The matrix [sum of out, in] that adjacent matrices are parts of."""
    parts = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
    first = parts[0]
    return first.as_strided((sum(map(len, parts)), first.shape[1]), (first.shape[1], 1))


def _biases(biases: tuple[Tensor | None, ...], sizes: list[int], like: Tensor) -> Tensor | None:
    """The biases one after the other, with zeros for those that are absent; None if all are."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [like.new_zeros(size) if bias is None else bias for bias, size in zip(biases, sizes, strict=True)]
    )
