"""What every implementation of the kernels is held against: the textbook in float64, and KV in blocks.

Fixtures that return functions, of the whole session, so that hypothesis can use them.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from farshore.kernels.base import KVLayout, State
from farshore.kernels.formats import dequantise, quantise


class Textbook(NamedTuple):
    o: Tensor
    """f64[R, q_heads, v_dim]"""
    lse: Tensor
    """f64[R, q_heads]"""
    largest_logit: float
    largest_v: float


class StoredTokens(NamedTuple):
    layout: KVLayout
    memory: Tensor
    """u8: NaN in every float format, and in every scale, wherever no token was written"""
    stride: int
    k: Tensor
    """f64[k_heads, tokens, k_dim]: the values that are stored, dequantised"""
    v: Tensor


@pytest.fixture(scope="session")
def textbook():
    """textbook(q, k, v, spec, *, q_positions, k_position=0) -> Textbook; one query and one head at a time."""

    def attend(q, k, v, spec, *, q_positions, k_position=0):
        q, k, v = q.double(), k.double(), v.double()
        o = torch.zeros(*q.shape[:2], spec.v_dim, dtype=torch.float64)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
        largest = 0.0
        for row in range(q.shape[0]):
            distance = int(q_positions[row]) - torch.arange(k_position, k_position + k.shape[1])
            seen = (distance >= 0) & (distance < (spec.window_tokens or math.inf))
            if not seen.any():
                continue
            keys, values = k[:, seen], v[:, seen]
            for head in range(q.shape[1]):
                logits = keys[head // (spec.q_heads // spec.k_heads)] @ q[row, head] * spec.scale
                largest = max(largest, float(logits.abs().max()))
                if spec.soft_cap:
                    logits = torch.tanh(logits / spec.soft_cap) * spec.soft_cap
                lse[row, head] = torch.logsumexp(logits, 0)
                o[row, head] = torch.softmax(logits, 0) @ values[head // (spec.q_heads // spec.v_heads)]
        return Textbook(o, lse, largest, float(v.abs().max()) if v.numel() else 0.0)

    return attend


@pytest.fixture(scope="session")
def assert_close():
    """assert_close(state, expected, tolerance): o within tolerance x max|V| x max(1, max|logit| / 64).

    lse within tolerance x max(1, max|logit|): float32's numbers around 1e4 already lie 1e-3 apart.
    """

    def check(state: State, expected: Textbook, tolerance: float) -> None:
        assert not state.o.isnan().any() and not state.lse.isnan().any()
        bound = tolerance * expected.largest_v * max(1.0, expected.largest_logit / 64)
        assert (state.o.double() - expected.o).abs().max() <= bound
        some = expected.lse.isfinite()
        assert torch.equal(state.lse.isfinite(), some) and not (state.lse == torch.inf).any()
        error = (state.lse.double() - expected.lse)[some].abs()
        assert not error.numel() or error.max() <= tolerance * max(1.0, expected.largest_logit)

    return check


@pytest.fixture(scope="session")
def store_tokens():
    """store_tokens(spec, format, tokens, *, seed=0, ...) -> StoredTokens, random, in layer 1 of 2.

    Token 0 lies at slot ``first`` of the first block, and ``gap_blocks`` blocks lie between one and the next.
    """

    def store(spec, format, tokens, *, seed=0, block_tokens=4, first=0, gap_blocks=0):
        random = torch.Generator().manual_seed(seed)
        layout = KVLayout.of(spec, layers=2, format=format)._replace(block_tokens=block_tokens)
        blocks = -(-(first + tokens) // block_tokens)
        stride = layout.block_bytes * (1 + gap_blocks)
        memory = torch.full((max(blocks, 1) * stride,), 0xFF, dtype=torch.uint8)
        k = torch.randn(spec.k_heads, tokens, spec.k_dim, generator=random, dtype=torch.float64)
        v = torch.randn(spec.v_heads, tokens, spec.v_dim, generator=random, dtype=torch.float64)
        rows = {"k": quantise(k, format), "v": quantise(k[..., : spec.v_dim] if spec.v_in_k else v, format)}
        for block in range(first // block_tokens, blocks):
            stored = layout.stored(memory[block * stride : block * stride + layout.block_bytes], 1)
            begin, end = max(block * block_tokens - first, 0), min((block + 1) * block_tokens - first, tokens)
            slots = slice(begin + first - block * block_tokens, end + first - block * block_tokens)
            for name, (payload, scales) in rows.items():
                getattr(stored, name)[:, slots] = payload[:, begin:end]
                getattr(stored, f"{name}_scales")[:, slots] = scales[:, begin:end]
        dims = {"k": spec.k_dim, "v": spec.v_dim}
        values = {n: dequantise(*rows[n], format, dims[n], dtype=torch.float64) for n in rows}
        return StoredTokens(layout, memory, stride, values["k"], values["v"])

    return store
