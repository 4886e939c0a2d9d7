"""``merge`` of every implementation that runs on the CPU: values, and the laws of its algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.kernels.base import State

BITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
shapes = st.sampled_from([(1, 1, 1), (2, 3, 4), (3, 5, 20), (2, 9, 64), (1, 2, 65), (16, 9, 64), (1, 2, 512)])


def random_state(shape, generator, *, dtype, empty_share):
    """o is a strided view, lse is transposed, and the o of empty states is NaN."""
    rows, heads, dim = shape
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    o = torch.randn(rows, heads + 1, dim + 2, generator=generator).to(dtype)[:, 1:, 1:-1]
    lse = (torch.randn(heads, rows, generator=generator) * 5).to(lse_dtype).T
    empty = torch.rand(rows, heads, generator=generator) < empty_share
    o[empty], lse[empty] = torch.nan, -torch.inf
    return State(o, lse)


def merged(kernels, states, *, dtype, **options):
    rows, heads, dim = states[0].o.shape
    surrounding = torch.full((rows, heads + 2, dim + 1), torch.nan, dtype=dtype)
    lse_dtype = torch.float64 if states[0].o.dtype == torch.float64 else torch.float32
    out = State(surrounding[:, 1:-1, 1:], torch.full((heads, rows), torch.nan, dtype=lse_dtype).T)
    kernels.merge(states, out=out, **options)
    assert surrounding.isnan().sum() == surrounding.numel() - out.o.numel()
    return out


@settings(deadline=None)
@given(data=st.data())
def test_merge_equals_the_textbook(kernels, textbook_merge, data):
    """Any number of states, in one or several dtypes, with or without a sink; some or all may be empty."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    shape, count = data.draw(shapes), data.draw(st.integers(1, 9) | st.sampled_from([63, 64, 65, 129, 300]))
    dtypes = [torch.float64] if torch.float64 in kernels.q_dtypes and data.draw(st.booleans()) else None
    dtypes = dtypes or [d for d in kernels.q_dtypes if d != torch.float64]
    share = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    states = [
        random_state(shape, generator, dtype=data.draw(st.sampled_from(dtypes)), empty_share=share)
        for _ in range(count)
    ]
    sink = None
    if data.draw(st.booleans()):
        sink = torch.randn(shape[1], generator=generator).to(states[0].lse.dtype)
    dtype = data.draw(st.sampled_from([*dtypes, torch.bfloat16]))
    out = merged(kernels, states, dtype=dtype, sink=sink)

    o, lse = textbook_merge(states, sink=sink)
    seen = lse > -torch.inf
    arithmetic = BITS[states[0].lse.dtype]
    assert torch.equal(out.lse > -torch.inf, seen)
    assert torch.allclose(out.lse[seen].double(), lse[seen], rtol=0.0, atol=arithmetic * 32)
    bound = 6 * (arithmetic * 4 + (BITS[dtype] if dtype != torch.float32 else 0))
    assert (out.o.double() - o).abs().max() <= bound
    assert (out.o[~seen] == 0).all()


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), shares=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3))
def test_merge_is_associative_commutative_and_has_an_identity(kernels, seed, shares):
    generator = torch.Generator().manual_seed(seed)
    dtype = kernels.q_dtypes[0]
    close = dict(rtol=0.0, atol=BITS[dtype] * 8)
    a, b, c = (random_state((2, 3, 20), generator, dtype=dtype, empty_share=share) for share in shares)

    def merge(*states):
        return merged(kernels, states, dtype=dtype)

    merged_once = merge(a, b, c)
    for other in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, a, b)):
        assert torch.allclose(merged_once.o, other.o, **close)
        assert torch.allclose(merged_once.lse, other.lse, **close)
    same = merge(a, State.identity(2, 3, 20, dtype=dtype, device="cpu"))
    seen = a.lse > -torch.inf
    assert torch.equal(same.lse, a.lse) and torch.equal(same.o[seen], a.o[seen])
    assert (same.o[~seen] == 0).all() and not merged_once.o.isnan().any()


def test_a_sink_joins_the_denominator_once(kernels):
    generator = torch.Generator().manual_seed(1)
    state = random_state((2, 3, 4), generator, dtype=kernels.q_dtypes[0], empty_share=0.0)
    sink = torch.tensor([0.5, -1.0, 2.0], dtype=state.lse.dtype)
    out = merged(kernels, [state], dtype=state.o.dtype, sink=sink)
    share = 1 + torch.exp(sink - state.lse)
    assert torch.allclose(out.o, state.o / share[..., None], atol=BITS[state.o.dtype] * 4)
    assert torch.allclose(out.lse, state.lse + share.log(), atol=BITS[state.o.dtype] * 8)


@pytest.mark.parametrize("lse", [1e4, -1e4, 80.0])
def test_lses_far_apart(kernels, lse):
    """The other states have weight 0, or two states have equal weights."""
    state = State(torch.ones(1, 1, 4), torch.full((1, 1), lse))
    other = State(torch.full((1, 1, 4), 3.0), torch.full((1, 1), lse - 200))
    out = merged(kernels, [other, state, other], dtype=torch.float32)
    assert (out.o == 1).all() and out.lse.item() == lse
    out = merged(kernels, [state, other._replace(lse=state.lse)], dtype=torch.float32)
    assert (out.o == 2).all() and out.lse.item() == pytest.approx(lse + 0.6931, rel=1e-6)
