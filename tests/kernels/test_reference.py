"""The reference kernels against dense float64 attention written in the plainest way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.kernels import reference as kernels
from farshore.kernels.base import AttentionSpec, Rows, Segments, State
from farshore.kernels.formats import KVFormat

# Of o in the dtype the reference computes in, whatever the format: the textbook reads the same stored values.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@st.composite
def specs(draw):
    kv, group, v_group = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    k_dim, v_dim, v_in_k = draw(
        st.sampled_from([(8, 12, False), (20, 8, False), (64, 65, False), (97, 80, False)])
        | st.sampled_from([(80, 64, True), (20, 20, True)])
    )
    return AttentionSpec(
        q_heads=kv * group * v_group,
        k_heads=kv,
        v_heads=kv if v_in_k else kv * v_group,
        k_dim=k_dim,
        v_dim=v_dim,
        scale=k_dim**-0.5,
        soft_cap=draw(st.none() | st.just(5.0)),
        window_tokens=draw(st.none() | st.integers(1, 9)),
        v_in_k=v_in_k,
    )


formats = st.sampled_from(KVFormat)
q_dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
parts = st.lists(st.integers(0, 7), min_size=1, max_size=4)
seeds = st.integers(0, 99)


def queries(spec, rows, dtype, seed, *, size=1.0):
    random = torch.Generator().manual_seed(seed + 1)
    return (torch.randn(rows, spec.q_heads, spec.k_dim, generator=random) * size).to(dtype)


def empty(q, spec):
    """A state to write to, in the dtype that q is computed in."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return State.identity(q.shape[0], spec.q_heads, spec.v_dim, dtype=dtype)


def attend(q, stored, spec, stretches, *, first, positions, k_position):
    """The state of one plan over stretches (begin, end) of the stored tokens, a segment each."""
    runs = [(0, stored.stride, first + a, b - a, k_position + a, 0, spec.groups) for a, b in stretches]
    work = Rows.of([(0, q.shape[0], segment, 0, spec.groups) for segment in range(len(runs))])
    plan = kernels.plan(work, Segments.of(runs), stored.memory, stored.layout, spec, positions=positions)
    out = empty(q, spec)
    kernels.partial(plan, 1, q, out=out)
    return out


def bounds(lengths):
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


@settings(deadline=None, max_examples=150)
@given(
    specs(),
    formats,
    q_dtypes,
    st.integers(0, 19),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(0, 1),
    st.sampled_from([1.0, 1e4]),
    seeds,
)
def test_partial_is_attention(
    textbook, assert_close, store_tokens, spec, format, dtype, tokens, rows, first, gap, size, seed
):
    stored = store_tokens(spec, format, tokens, seed=seed, first=first, gap_blocks=gap)
    q = queries(spec, rows, dtype, seed, size=size)
    positions = torch.arange(rows) + 10 + max(tokens - 2, 0)
    out = attend(q, stored, spec, [(0, tokens)], first=first, positions=positions, k_position=10)
    expected = textbook(q, stored.k, stored.v, spec, q_positions=positions, k_position=10)
    assert_close(out, expected, TOLERANCE[out.o.dtype])


@settings(deadline=None, max_examples=150)
@given(specs(), formats, q_dtypes, parts, st.integers(1, 3), st.integers(0, 5), st.booleans(), seeds)
def test_partial_in_parts_is_the_whole(
    textbook, assert_close, store_tokens, spec, format, dtype, lengths, rows, first, in_one_plan, seed
):
    """One row on many segments, or a plan for each and a merge: where the tokens are cut does not matter."""
    tokens = sum(lengths)
    stored = store_tokens(spec, format, tokens, seed=seed, first=first)
    q = queries(spec, rows, dtype, seed)
    place = dict(first=first, positions=torch.arange(rows) + max(tokens - 2, 0), k_position=0)
    if in_one_plan:
        out = attend(q, stored, spec, bounds(lengths), **place)
    else:
        out = empty(q, spec)
        kernels.merge([attend(q, stored, spec, [part], **place) for part in bounds(lengths)], out=out)
    expected = textbook(q, stored.k, stored.v, spec, q_positions=place["positions"])
    assert_close(out, expected, TOLERANCE[out.o.dtype])


@settings(deadline=None, max_examples=150)
@given(specs(), formats, q_dtypes, parts, st.integers(1, 6), seeds)
def test_extend_in_parts_is_the_whole(
    textbook, assert_close, store_tokens, spec, format, dtype, lengths, rows, seed
):
    """Keys and values as any format holds them: prefill attends to what is stored."""
    tokens = sum(lengths)
    stored = store_tokens(spec, format, tokens, seed=seed)
    q = queries(spec, rows, dtype, seed)
    positions = torch.arange(rows) + max(tokens - rows, 0)
    k, v = (x if q.dtype == torch.float64 else x.float() for x in (stored.k, stored.v))
    expected = textbook(q, k, v, spec, q_positions=positions)
    states = []
    for a, b in bounds(lengths):
        states.append(empty(q, spec))
        kernels.extend(q, k[:, a:b], v[:, a:b], spec, q_positions=positions, k_position=a, out=states[-1])
    out = empty(q, spec)
    kernels.merge(states, out=out)
    assert_close(out, expected, TOLERANCE[out.o.dtype])


@pytest.mark.parametrize("format", KVFormat)
def test_a_latent_shared_by_every_head(textbook, assert_close, store_tokens, format):
    """MLA: one K head of 576, whose first 512 are V, and 128 query heads."""
    spec = AttentionSpec(128, 1, 1, 576, 512, scale=576**-0.5, v_in_k=True)
    stored = store_tokens(spec, format, 300, block_tokens=256, first=3)
    assert torch.equal(stored.v, stored.k[..., :512])
    q = queries(spec, 2, torch.float32, 0)
    positions = torch.tensor([299, 300])
    out = attend(q, stored, spec, [(0, 300)], first=3, positions=positions, k_position=0)
    assert_close(out, textbook(q, stored.k, stored.v, spec, q_positions=positions), 2e-6)


@pytest.mark.parametrize("format", KVFormat)
def test_rows_choose_their_heads_and_segments(textbook, store_tokens, format):
    """Two rows, three head groups held by different segments, one row over two segments."""
    spec = AttentionSpec(q_heads=6, k_heads=3, v_heads=3, k_dim=8, v_dim=8, scale=0.3)
    layout, memory, stride, k, v = store_tokens(spec, format, 7)
    q = queries(spec, 2, torch.float64, 0)
    segments = Segments.of([(0, stride, 0, 3, 0, 0, 3), (0, stride, 3, 4, 3, 0, 3)])
    work = Rows.of([(0, 1, 0, 0, 3), (0, 1, 1, 0, 3), (1, 1, 1, 1, 2)])
    positions = torch.tensor([9, 9])
    plan = kernels.plan(work, segments, memory, layout, spec, positions=positions)
    out = empty(q, spec)
    kernels.partial(plan, 1, q, out=out)
    whole = textbook(q, k, v, spec, q_positions=positions)
    late = textbook(q, k[:, 3:], v[:, 3:], spec, q_positions=positions, k_position=3)
    assert torch.allclose(out.o[0], whole.o[0], atol=1e-12)
    assert torch.allclose(out.o[1, 2:4], late.o[1, 2:4], atol=1e-12)
    assert (out.lse[1, :2] == -torch.inf).all() and (out.o[1, 4:] == 0).all()


def test_a_shard_of_some_heads_numbers_them_from_its_first(textbook, store_tokens):
    spec = AttentionSpec(q_heads=6, k_heads=3, v_heads=3, k_dim=8, v_dim=8, scale=0.3)
    one_group = AttentionSpec(q_heads=2, k_heads=1, v_heads=1, k_dim=8, v_dim=8, scale=0.3)
    layout, memory, stride, k, v = store_tokens(one_group, KVFormat.FLOAT64, 6)
    q, positions = queries(one_group, 1, torch.float64, 0), torch.tensor([6])
    plan = kernels.plan(
        Rows.of([(0, 1, 0, 2, 3)]),
        Segments.of([(0, stride, 0, 6, 0, 2, 3)]),
        memory,
        layout.of_groups(3),
        spec,
        positions=positions,
        group0=2,
    )
    out = empty(q, one_group)
    kernels.partial(plan, 1, q, out=out)
    assert torch.allclose(out.o, textbook(q, k, v, one_group, q_positions=positions).o, atol=1e-12)


def test_work_outside_a_segments_groups_is_refused(store_tokens):
    spec = AttentionSpec(q_heads=3, k_heads=3, v_heads=3, k_dim=8, v_dim=8, scale=1.0)
    layout, memory, stride, _, _ = store_tokens(spec, KVFormat.FLOAT32, 3)
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
