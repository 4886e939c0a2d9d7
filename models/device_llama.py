"""The decoder's slices in fewer and larger calls, for a device where each call costs a microsecond or two.

The projections of one input lie in one matrix. The results are those of the base class, up to the order in
which a product sums. Created by ``weights`` for a device other than the CPU. It must not know how weights are
read.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from farshore.models.config.model import ModelConfig
from farshore.models.llama import LayerWeights, Llama, LlamaWeights, as_tensor


def joined(layer: LayerWeights) -> LayerWeights:
    """The same weights, with q, k and v one after the other in memory, and gate and up too."""
    q, k, v = _parts(*map(as_tensor, (layer.q, layer.k, layer.v)))
    gate, up = _parts(*map(as_tensor, (layer.gate, layer.up)))
    return layer._replace(q=q, k=k, v=v, gate=gate, up=up)


class DeviceLlama(Llama):
    """Like :class:`Llama`. Weights that are not :func:`joined` are copied."""

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        layers = tuple(joined(layer) for layer in weights.layers)
        super().__init__(config, weights._replace(layers=layers))
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
        return self._norm(h, self.weights.layers[layer].attention_norm)

    def key_value(self, layer: int, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._heads(linear(normed, self._kv[layer], self._kv_bias[layer])).chunk(2, dim=1)
        return self._rotate(k, positions), v

    def project(
        self,
        layer: int,
        h: Tensor,
        positions: Tensor,
        *,
        out: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.attention_input(layer, h)
        heads = self._heads(linear(normed, self._qkv[layer], self._qkv_bias[layer]))
        q_heads, kv_heads = self.config.q_heads, self.config.kv_heads
        rotated, v = heads.split((q_heads + kv_heads, kv_heads), dim=1)
        q, k = self._rotate(rotated, positions).split((q_heads, kv_heads), dim=1)
        if out is None:
            return q, k, v
        for target, values in zip(out, (q, k, v), strict=True):
            target.copy_(values)
        return out

    def finish(self, layer: int, h: Tensor, o: Tensor, *, out: Tensor | None = None) -> Tensor:
        w = self.weights.layers[layer]
        h = torch.add(h, linear(o.flatten(1), as_tensor(w.o), w.o_bias), out=out)
        normed = self._norm(h, w.mlp_norm)
        gate, up = linear(normed, self._gate_up[layer], self._gate_up_bias[layer]).chunk(2, dim=1)
        return torch.add(h, linear(silu(gate) * up, as_tensor(w.down), w.down_bias), out=out)

    def logits(self, h: Tensor) -> Tensor:
        normed = self._norm(h, self.weights.norm)
        return linear(normed, as_tensor(self.weights.head)).float()

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.config.head_dim)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """PyTorch's kernel rounds before the weight is applied, as transformers does, if it gets none."""
        return weight * torch.nn.functional.rms_norm(x, x.shape[-1:], None, self.config.rms_eps)


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
