"""The Llama decoder without attention, in slices that the engine calls.

The slices of a layer are ``attention_input`` → ``query`` and ``key_value`` → (attention, elsewhere) →
``finish``. ``query`` is separate so that queries can be sent before keys and values are computed; ``project``
is the first three in one call. Called by the engine, once per slice and layer. R rows may belong to any mix
of sequences. It must not know about shards, KV storage or masks. No method changes the model, or an argument
other than ``out``, so threads may share a model.

Rounding follows transformers' LlamaForCausalLM operation by operation: in bf16 the order changes the result.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, silu

from farshore.models.config.model import ModelConfig
from farshore.models.config.rope import inverse_frequencies
from farshore.models.layer_buffers import LayerBuffers, SliceLayerBuffers

_TABLE_ROWS = 16_384
"""Positions whose angles are computed at once."""


class PackedMatrix(Protocol):
    """A matrix [out, in] in the model's dtype, stored in fewer bytes: ``kernels.cpu.packed.Packed``."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def gather(self, ids: Tensor) -> Tensor:
        """The rows with numbers ``ids`` i64[R]: [R, in]."""

    def dense(self) -> Tensor:
        """The values, [out, in]."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [R, in] → x W^T + bias, [R, out]."""


Matrix = Tensor | PackedMatrix


class LayerWeights(NamedTuple):
    """Weights of one decoder layer: matrices [out, in], in the model's dtype or packed; absent biases are
    None."""

    attention_norm: Tensor
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    mlp_norm: Tensor
    gate: Matrix
    up: Matrix
    down: Matrix
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class LlamaWeights(NamedTuple):
    """``embed`` and ``head``: [vocab, hidden], the same object if they are tied. ``norm``: [hidden]."""

    embed: Matrix
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Matrix

    def dense(self) -> "LlamaWeights":
        """The same weights with every packed matrix as a tensor."""
        embed = as_tensor(self.embed)
        head = embed if self.head is self.embed else as_tensor(self.head)
        layers = tuple(
            LayerWeights(*(None if matrix is None else as_tensor(matrix) for matrix in layer))
            for layer in self.layers
        )
        return LlamaWeights(embed, layers, self.norm, head)


def as_tensor(matrix: Matrix) -> Tensor:
    return matrix if isinstance(matrix, Tensor) else matrix.dense()


class Llama:
    """A decoder's slices. Arguments and results have the dtype and device of the weights."""

    content: str = ""
    """Digest of the configuration and the weights, set by ``weights.load``. Models of equal content compute
    equal KV."""

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        """``weights`` must have the shapes of ``config``; ``farshore.models.weights.load`` checks that on
        loading."""
        self.config = config
        self.weights = weights
        self.dtype = weights.norm.dtype
        self.device = weights.norm.device
        self._cos, self._sin = rotation_table(config, dtype=self.dtype, device=self.device)

    def expect_calls(self) -> None:
        """Announces that a step's calls follow at short intervals, so that native threads wait without
        sleeping. Changes no result."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids i64 [R] → h [R, hidden]. IndexError for an id outside the vocabulary (on CPU)."""
        table = self.weights.embed
        return embedding(token_ids, table) if isinstance(table, Tensor) else table.gather(token_ids)

    def attention_input(self, layer: int, h: Tensor) -> Tensor:
        """h [R, hidden] → normed [R, hidden], the input of ``query`` and ``key_value``."""
        return rms_norm(h, self.weights.layers[layer].attention_norm, self.config.rms_eps)

    def query(self, layer: int, normed: Tensor, positions: Tensor) -> Tensor:
        """normed [R, hidden], positions i64 [R] → q [R, q_heads, head_dim], rotated, not scaled.

        IndexError for a position of ``config.max_positions`` or above (on CPU).
        """
        w = self.weights.layers[layer]
        q = _linear(normed, w.q, w.q_bias).view(-1, self.config.q_heads, self.config.head_dim)
        return self._rotate(q, positions)

    def key_value(self, layer: int, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """normed [R, hidden], positions i64 [R] → (k rotated, v), each [R, kv_heads, head_dim]."""
        w = self.weights.layers[layer]
        k = _linear(normed, w.k, w.k_bias).view(-1, self.config.kv_heads, self.config.head_dim)
        v = _linear(normed, w.v, w.v_bias).view(-1, self.config.kv_heads, self.config.head_dim)
        return self._rotate(k, positions), v

    def project(
        self,
        layer: int,
        h: Tensor,
        positions: Tensor,
        *,
        out: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [R, hidden], positions i64 [R] → (q, k, v): ``query`` and ``key_value`` in one call, for rows
        whose query need not be sent first. The result is written to the contiguous tensors of ``out`` if
        given."""
        normed = self.attention_input(layer, h)
        qkv = self.query(layer, normed, positions), *self.key_value(layer, normed, positions)
        if out is None:
            return qkv
        for target, values in zip(out, qkv, strict=True):
            target.copy_(values)
        return out

    def finish(self, layer: int, h: Tensor, o: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The layer's input h [R, hidden], attention output o [R, q_heads, head_dim] → the next layer's h
        [R, hidden]. It is written to the contiguous tensor ``out`` if given, which may be h."""
        w = self.weights.layers[layer]
        h = h + _linear(o.flatten(1), w.o, w.o_bias)
        normed = rms_norm(h, w.mlp_norm, self.config.rms_eps)
        inner = silu(_linear(normed, w.gate, w.gate_bias)) * _linear(normed, w.up, w.up_bias)
        h = h + _linear(inner, w.down, w.down_bias)
        return h if out is None else out.copy_(h)

    def layer_buffers(self, rows: int) -> LayerBuffers:
        """Buffers for ``rows`` rows, 1 or more, and the calls that take them through all layers."""
        return SliceLayerBuffers(self, rows)

    def logits(self, h: Tensor) -> Tensor:
        """The last layer's h [R, hidden] → logits f32 [R, vocab]. Pass only the rows that are sampled
        from."""
        normed = rms_norm(h, self.weights.norm, self.config.rms_eps)
        return _linear(normed, self.weights.head).float()

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [R, heads, head_dim] → the same shape. Elements i and i + head_dim/2 are rotated as a pair by the
        angles of the row's position."""
        cos = self._cos[positions].unsqueeze(1)
        sin = self._sin[positions].unsqueeze(1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _linear(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    return linear(x, matrix, bias) if isinstance(matrix, Tensor) else matrix.linear(x, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [R, hidden] divided by its root mean square in float32, cast back, then multiplied by ``weight``. The
    cast comes before the weight, as in transformers."""
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def rotation_table(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [max_positions, head_dim/2] in ``dtype``, computed in float32.

    A table, because every layer uses the same angles twice. 2 MB in bf16 for 8,192 positions of SmolLM2.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = inverse_frequencies(config.rope, exponents, positions=config.max_positions)
    shape = (config.max_positions, len(frequencies))
    cos, sin = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    # In pieces, because float32 angles of a million positions take gigabytes.
    for first in range(0, config.max_positions, _TABLE_ROWS):
        last = min(first + _TABLE_ROWS, config.max_positions)
        angles = torch.arange(first, last, dtype=torch.float32, device=device)[:, None] * frequencies
        cos[first:last] = angles.cos() * config.rope.attention_factor
        sin[first:last] = angles.sin() * config.rope.attention_factor
    return cos, sin
