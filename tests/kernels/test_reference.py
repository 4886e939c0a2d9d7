"""The reference kernels against dense float64 attention written in the plainest way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.kernels import reference as kernels
from farshore.kernels.base import AttentionSpec, KVLayout, Rows, Segments, State
from farshore.kernels.formats import KVFormat

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 8e-3}


def dense(q, k, v, spec, q_positions, k_position):
    """The textbook, one query and one head at a time, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    o = torch.zeros(*q.shape[:2], spec.v_dim, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            kh = head // (spec.q_heads // spec.k_heads)
            vh = head // (spec.q_heads // spec.v_heads)
            logits, values = [], []
            for j in range(k.shape[1]):
                distance = int(q_positions[row]) - (k_position + j)
                if distance < 0 or (spec.window_tokens is not None and distance >= spec.window_tokens):
                    continue
                x = float(q[row, head] @ k[kh, j]) * spec.scale
                logits.append(math.tanh(x / spec.soft_cap) * spec.soft_cap if spec.soft_cap else x)
                values.append(v[vh, j])
            if logits:
                x = torch.tensor(logits, dtype=torch.float64)
                lse[row, head] = torch.logsumexp(x, 0)
                o[row, head] = torch.softmax(x, 0) @ torch.stack(values)
    return State(o, lse)


def assert_close(state, expected, v, dtype):
    bound = TOLERANCE[dtype] * max(1.0, float(v.double().abs().max()) if v.numel() else 1.0)
    peak = (
        max(1.0, float(expected.lse[expected.lse.isfinite()].abs().max()) / 64)
        if expected.lse.isfinite().any()
        else 1.0
    )
    assert not state.o.isnan().any()
    assert (state.o.double() - expected.o).abs().max() <= bound * peak
    finite = expected.lse.isfinite()
    assert torch.equal(state.lse.isfinite(), finite)
    if finite.any():
        error = (state.lse.double() - expected.lse)[finite].abs().max()
        assert error <= TOLERANCE[dtype] * peak * 64


specs = st.builds(
    lambda kv, group, vgroup, kd, vd, cap, window: AttentionSpec(
        q_heads=kv * group * vgroup,
        k_heads=kv,
        v_heads=kv * vgroup,
        k_dim=kd,
        v_dim=vd,
        scale=kd**-0.5,
        soft_cap=cap,
        window_tokens=window,
    ),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 2),
    st.sampled_from([8, 20]),
    st.sampled_from([8, 12]),
    st.none() | st.just(5.0),
    st.none() | st.integers(1, 9),
)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def stored(spec, dtype, tokens, seed, *, block_tokens=4, first=0, gap_blocks=0):
    """KV in a block memory whose every other byte is NaN, with its segment and its plain K and V."""
    generator = torch.Generator().manual_seed(seed)
    layout = KVLayout.of(spec, layers=2, format=KVFormat.of(dtype))._replace(block_tokens=block_tokens)
    blocks = (first + tokens + block_tokens - 1) // block_tokens
    stride = layout.block_bytes * (1 + gap_blocks)
    memory = torch.full((max(blocks, 1) * stride // dtype.itemsize,), torch.nan, dtype=dtype).view(
        torch.uint8
    )
    k = torch.randn(spec.k_heads, tokens, spec.k_dim, generator=generator).to(dtype)
    v = torch.randn(spec.v_heads, tokens, spec.v_dim, generator=generator).to(dtype)
    for i in range(tokens):
        block, slot = divmod(first + i, block_tokens)
        bk, bv = layout.views(memory[block * stride : block * stride + layout.block_bytes], 1)
        bk[:, slot], bv[:, slot] = k[:, i], v[:, i]
    return layout, memory, stride, k, v


@settings(deadline=None, max_examples=60)
@given(
    specs,
    dtypes,
    st.integers(0, 19),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(0, 1),
    st.integers(0, 99),
)
def test_partial_equals_dense_attention(spec, dtype, tokens, rows, first, gap, seed):
    layout, memory, stride, k, v = stored(spec, dtype, tokens, seed, first=first, gap_blocks=gap)
    q = torch.randn(rows, spec.q_heads, spec.k_dim, generator=torch.Generator().manual_seed(seed + 1)).to(
        dtype
    )
    positions = torch.arange(rows) + 10 + max(tokens - 2, 0)
    segments = Segments.of([(0, stride, first, tokens, 10, 0, spec.groups)])
    plan = kernels.plan(
        Rows.of([(0, rows, 0, 0, spec.groups)]), segments, memory, layout, spec, positions=positions
    )
    out = State.identity(
        rows, spec.q_heads, spec.v_dim, dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    kernels.partial(plan, 1, q, out=out)
    assert_close(out, dense(q, k, v, spec, positions, 10), v, dtype)


@settings(deadline=None, max_examples=60)
@given(
    specs, dtypes, st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 99)
)
def test_extend_in_parts_then_merge_equals_the_whole(spec, dtype, lengths, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    q = torch.randn(rows, spec.q_heads, spec.k_dim, generator=generator).to(dtype)
    k = torch.randn(spec.k_heads, tokens, spec.k_dim, generator=generator).to(dtype)
    v = torch.randn(spec.v_heads, tokens, spec.v_dim, generator=generator).to(dtype)
    positions = torch.arange(rows) + max(tokens - rows, 0)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    states, start = [], 0
    for length in lengths:
        part = State.identity(rows, spec.q_heads, spec.v_dim, dtype=compute)
        kernels.extend(
            q,
            k[:, start : start + length],
            v[:, start : start + length],
            spec,
            q_positions=positions,
            k_position=start,
            out=part,
        )
        states.append(part)
        start += length
    out = State.identity(rows, spec.q_heads, spec.v_dim, dtype=compute)
    kernels.merge(states, out=out)
    assert_close(out, dense(q, k, v, spec, positions, 0), v, dtype)


def test_rows_choose_their_heads_and_segments():
    """Two rows, three head groups held by different segments, one row over two segments."""
    spec = AttentionSpec(q_heads=6, k_heads=3, v_heads=3, k_dim=8, v_dim=8, scale=0.3)
    layout, memory, stride, k, v = stored(spec, torch.float64, 7, 5)
    q = torch.randn(2, 6, 8, dtype=torch.float64)
    segments = Segments.of([(0, stride, 0, 3, 0, 0, 3), (0, stride, 3, 4, 3, 0, 3)])
    work = Rows.of([(0, 1, 0, 0, 3), (0, 1, 1, 0, 3), (1, 1, 1, 1, 2)])
    plan = kernels.plan(work, segments, memory, layout, spec, positions=torch.tensor([9, 9]))
    out = State.identity(2, 6, 8, dtype=torch.float64)
    kernels.partial(plan, 1, q, out=out)
    whole = dense(q, k, v, spec, torch.tensor([9, 9]), 0)
    late = dense(q, k[:, 3:], v[:, 3:], spec, torch.tensor([9, 9]), 3)
    assert torch.allclose(out.o[0], whole.o[0], atol=1e-12)
    assert torch.allclose(out.o[1, 2:4], late.o[1, 2:4], atol=1e-12)
    assert (out.lse[1, :2] == -torch.inf).all() and (out.o[1, 4:] == 0).all()


def test_a_shard_of_some_heads_numbers_them_from_its_first():
    spec = AttentionSpec(q_heads=6, k_heads=3, v_heads=3, k_dim=8, v_dim=8, scale=0.3)
    one_group = AttentionSpec(q_heads=2, k_heads=1, v_heads=1, k_dim=8, v_dim=8, scale=0.3)
    _, memory, stride, k, v = stored(one_group, torch.float64, 6, 3)
    layout = KVLayout.of(spec, layers=2, format=KVFormat.FLOAT64)._replace(block_tokens=4)
    q = torch.randn(1, 2, 8, dtype=torch.float64)
    plan = kernels.plan(
        Rows.of([(0, 1, 0, 2, 3)]),
        Segments.of([(0, stride, 0, 6, 0, 2, 3)]),
        memory,
        layout,
        spec,
        positions=torch.tensor([6]),
        group0=2,
    )
    out = State.identity(1, 2, 8, dtype=torch.float64)
    kernels.partial(plan, 1, q, out=out)
    assert torch.allclose(out.o, dense(q, k, v, one_group, torch.tensor([6]), 0).o, atol=1e-12)


def test_work_outside_a_segments_groups_is_refused():
    spec = AttentionSpec(q_heads=3, k_heads=3, v_heads=3, k_dim=8, v_dim=8, scale=1.0)
    layout, memory, stride, _, _ = stored(spec, torch.float32, 3, 0)
    with pytest.raises(ValueError, match=r"groups 0\.\.3"):
        kernels.plan(
            Rows.of([(0, 1, 0, 0, 3)]),
            Segments.of([(0, stride, 0, 3, 0, 1, 3)]),
            memory,
            layout,
            spec,
            positions=torch.tensor([4]),
        )


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_stay_finite(size):
    spec = AttentionSpec(q_heads=1, k_heads=1, v_heads=1, k_dim=1, v_dim=1, scale=1.0)
    k = torch.full((1, 5, 1), size)
    v = torch.arange(5.0).view(1, 5, 1)
    out = State.identity(1, 1, 1)
    kernels.extend(torch.ones(1, 1, 1), k, v, spec, q_positions=torch.tensor([9]), k_position=0, out=out)
    assert out.o.item() == pytest.approx(2.0)
    assert out.lse.item() == pytest.approx(size + math.log(5), rel=1e-6)


states = st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


def random_state(generator, *, empty):
    lse = torch.randn(2, 3, generator=generator, dtype=torch.float64) * 5
    lse[empty] = -torch.inf
    return State(torch.randn(2, 3, 4, generator=generator, dtype=torch.float64), lse)


def merged(parts, **kwargs):
    out = State.identity(2, 3, 4, dtype=torch.float64)
    kernels.merge(parts, out=out, **kwargs)
    return out


@settings(deadline=None)
@given(states, st.lists(st.booleans(), min_size=3, max_size=3))
def test_merge_is_associative_commutative_and_has_an_identity(generator, empties):
    masks = [torch.full((2, 3), e) & (torch.rand(2, 3, generator=generator) < 0.7) for e in empties]
    a, b, c = (random_state(generator, empty=mask) for mask in masks)
    whole = merged([a, b, c])
    for other in (merged([merged([a, b]), c]), merged([a, merged([b, c])]), merged([c, a, b])):
        assert torch.allclose(whole.o, other.o, atol=1e-12)
        assert torch.allclose(whole.lse, other.lse, atol=1e-12)
    same = merged([a, State.identity(2, 3, 4, dtype=torch.float64)])
    assert torch.equal(same.lse, a.lse)
    assert torch.allclose(same.o[~masks[0]], a.o[~masks[0]], atol=1e-15)
    assert not whole.o.isnan().any()


def test_merging_empty_states_gives_the_empty_state_even_with_nan_inside():
    empty = State(
        torch.full((2, 3, 4), torch.nan, dtype=torch.float64),
        torch.full((2, 3), -torch.inf, dtype=torch.float64),
    )
    out = merged([empty, empty])
    assert torch.equal(out.o, torch.zeros(2, 3, 4, dtype=torch.float64))
    assert (out.lse == -torch.inf).all()


def test_a_sink_joins_the_denominator_once():
    state = random_state(torch.Generator().manual_seed(1), empty=torch.zeros(2, 3, dtype=torch.bool))
    sink = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    out = merged([state], sink=sink)
    assert torch.allclose(out.o, state.o / (1 + torch.exp(sink - state.lse))[..., None])
