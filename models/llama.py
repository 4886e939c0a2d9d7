"""The Llama decoder, cut where attention happens elsewhere.

A layer is: ``attention_input`` → ``query`` and ``key_value`` → (attention, somewhere else) → ``finish``.
``query`` stands apart so that it can travel before keys and values are computed; ``project`` is the three.
Called by the engine, one call per slice and layer; R rows may belong to any mix of sequences. It must not
know about shards, KV storage or masks. Pure: no method mutates its arguments or the model, so threads may
share one.

Rounding follows transformers' LlamaForCausalLM operation by operation: in bf16 the order is the result.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, silu

from farshore.models.config import ModelConfig
from farshore.models.layer_buffers import LayerBuffers, SliceLayerBuffers
from farshore.models.rope import inverse_frequencies


class LayerWeights(NamedTuple):
    """One decoder layer; matrices [out, in] in the model's dtype, absent biases None."""

    attention_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class LlamaWeights(NamedTuple):
    """``embed`` and ``head``: [vocab, hidden], one and the same tensor when tied. ``norm``: [hidden]."""

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor


class Llama:
    """Slices of a decoder. Tensors in and out are in the weights' dtype and on their device."""

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        """``weights`` must fit ``config``; ``farshore.models.weights`` checks that while loading."""
        self.config = config
        self.weights = weights
        self.dtype = weights.embed.dtype
        self.device = weights.embed.device
        self._cos, self._sin = rotation_table(config, dtype=self.dtype, device=self.device)

    def expect_calls(self) -> None:
        """Told before a step: its calls follow each other closely. Changes no result."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """i64 [R] → h [R, hidden]. IndexError for an id outside the vocabulary (on CPU)."""
        return embedding(token_ids, self.weights.embed)

    def attention_input(self, layer: int, h: Tensor) -> Tensor:
        """h [R, hidden] → normed [R, hidden], what ``query`` and ``key_value`` take."""
        return rms_norm(h, self.weights.layers[layer].attention_norm, self.config.rms_eps)

    def query(self, layer: int, normed: Tensor, positions: Tensor) -> Tensor:
        """normed [R, hidden], positions i64 [R] → q [R, q_heads, head_dim], rotated, not scaled.

        Positions run below ``config.max_positions``; IndexError beyond (on CPU).
        """
        w = self.weights.layers[layer]
        q = linear(normed, w.q, w.q_bias).view(-1, self.config.q_heads, self.config.head_dim)
        return self._rotate(q, positions)

    def key_value(self, layer: int, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As ``query`` → (k rotated, v), each [R, kv_heads, head_dim]."""
        w = self.weights.layers[layer]
        k = linear(normed, w.k, w.k_bias).view(-1, self.config.kv_heads, self.config.head_dim)
        v = linear(normed, w.v, w.v_bias).view(-1, self.config.kv_heads, self.config.head_dim)
        return self._rotate(k, positions), v

    def project(
        self,
        layer: int,
        h: Tensor,
        positions: Tensor,
        *,
        out: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [R, hidden] → (q, k, v) as ``query`` and ``key_value`` give them, where q has nowhere to go; in
        the contiguous memory of ``out`` if given."""
        normed = self.attention_input(layer, h)
        made = self.query(layer, normed, positions), *self.key_value(layer, normed, positions)
        if out is None:
            return made
        for to, values in zip(out, made, strict=True):
            to.copy_(values)
        return out

    def finish(self, layer: int, h: Tensor, o: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The layer's input h [R, hidden] and its attention output o [R, q_heads, head_dim] → next h; in the
        contiguous memory of ``out`` if given, which may be h's own."""
        w = self.weights.layers[layer]
        h = h + linear(o.flatten(1), w.o, w.o_bias)
        normed = rms_norm(h, w.mlp_norm, self.config.rms_eps)
        inner = silu(linear(normed, w.gate, w.gate_bias)) * linear(normed, w.up, w.up_bias)
        h = h + linear(inner, w.down, w.down_bias)
        return h if out is None else out.copy_(h)

    def layer_buffers(self, rows: int) -> LayerBuffers:
        """Memory for ``rows`` rows on their way through all of the layers, 1 or more."""
        return SliceLayerBuffers(self, rows)

    def logits(self, h: Tensor) -> Tensor:
        """The last layer's h [R, hidden] → f32 [R, vocab]. Pass only the rows that are sampled from."""
        normed = rms_norm(h, self.weights.norm, self.config.rms_eps)
        return linear(normed, self.weights.head).float()

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [R, heads, head_dim] → the same, its two halves turned as pairs by each row's angles."""
        cos = self._cos[positions].unsqueeze(1)
        sin = self._sin[positions].unsqueeze(1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [R, hidden] over its root mean square, in float32; cast back *before* the weight is applied."""
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def rotation_table(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [max_positions, head_dim/2] in ``dtype``; angles and their cosines in float32.

    A table, since every layer needs the same angles twice; 2 MB in bf16 for 8,192 positions of SmolLM2.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = inverse_frequencies(config.rope, exponents)
    positions = torch.arange(config.max_positions, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
