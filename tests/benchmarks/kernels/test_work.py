"""The timed work is the work that the kernel benchmark reports."""

import pytest
import torch
import torch.nn.functional as F

from farshore.benchmarks.kernels.cold import ColdKV, layer_bytes, query
from farshore.benchmarks.kernels.prefill import causal_mask, flops
from farshore.benchmarks.kernels.shapes import SMOLLM2, Shape
from farshore.kernels.base import State
from farshore.kernels.formats import KVFormat

STORED = [KVFormat.BFLOAT16, KVFormat.INT8, KVFormat.INT4]


@pytest.mark.parametrize("format", STORED)
def test_every_sequence_and_layer_is_filled(reference, format):
    """All blocks hold the same random numbers, so every sequence and layer gives the same result."""
    kv = ColdKV(SMOLLM2, format, sequences=3, tokens=300, layers=2)
    q, out = query(SMOLLM2, 1)
    separate, states = kv.plan_separate(reference), State.identity(3, *out.o.shape[1:], device="cpu")
    reference.partial(kv.plan_shared(reference, 1), 0, q, out=out)
    assert out.o.std() > 0.01 and out.lse.isfinite().all()
    for layer in range(2):
        reference.partial(separate, layer, q.expand(3, -1, -1), out=states)
        torch.testing.assert_close(states.o, out.o.expand(3, -1, -1))
        torch.testing.assert_close(states.lse, out.lse.expand(3, -1))


def test_shared_and_separate_rows_give_the_same_states(reference):
    kv = ColdKV(SMOLLM2, KVFormat.BFLOAT16, sequences=4, tokens=50, layers=1)
    q, shared = query(SMOLLM2, 4)
    _, separate = query(SMOLLM2, 4)
    reference.partial(kv.plan_shared(reference, 4), 0, q, out=shared)
    reference.partial(kv.plan_separate(reference), 0, q, out=separate)
    torch.testing.assert_close(shared.o, separate.o)


def test_all_tokens_are_attended(reference):
    """With q = 0 all tokens have equal weight, and lse is the logarithm of their number."""
    kv = ColdKV(SMOLLM2, KVFormat.BFLOAT16, sequences=1, tokens=777, layers=1)
    q, out = query(SMOLLM2, 1)
    reference.partial(kv.plan_separate(reference), 0, torch.zeros_like(q), out=out)
    torch.testing.assert_close(out.lse, torch.full_like(out.lse, 777.0).log())


@pytest.mark.parametrize(
    ("format", "token_bytes"),
    [(KVFormat.BFLOAT16, 2 * 64 * 2), (KVFormat.INT8, 2 * (64 + 2)), (KVFormat.INT4, 2 * (32 + 2))],
)
def test_bytes_read(format, token_bytes):
    """The bytes of K, V and their scales, and no others."""
    assert layer_bytes(SMOLLM2, format, sequences=2, tokens=100) == 2 * 100 * 3 * token_bytes
    kv = ColdKV(SMOLLM2, format, sequences=2, tokens=100, layers=5)
    assert kv.bytes == 5 * kv.layer_bytes <= kv.memory.numel()


@pytest.mark.parametrize("past_tokens", [0, 1, 9])
def test_the_mask_leaves_exactly_the_counted_pairs(past_tokens):
    shape = Shape(kv_heads=2, group=3, dim=16)
    pairs = int((causal_mask(5, past_tokens) == 0).sum())
    assert flops(shape, 5, past_tokens) == pairs * 6 * 16 * 2 * 2


@pytest.mark.parametrize("past_tokens", [0, 9])
def test_sdpa_is_given_the_work_of_extend(reference, past_tokens):
    shape = Shape(kv_heads=2, group=3, dim=16)
    q = torch.randn(5, 6, 16)
    k, v = torch.randn(2, 2, past_tokens + 5, 16)
    out = State.identity(5, 6, 16, device="cpu")
    reference.extend(
        q, k, v, shape.spec, q_positions=torch.arange(past_tokens, past_tokens + 5), k_position=0, out=out
    )
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k[None],
        v[None],
        attn_mask=causal_mask(5, past_tokens).float(),
        enable_gqa=True,
    )
    torch.testing.assert_close(out.o, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
