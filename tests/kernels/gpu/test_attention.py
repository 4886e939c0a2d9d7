"""The GPU kernels against the textbook, on a GPU if there is one, else in triton's interpreter."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.benchmarks.gpu.correctness import PRECISIONS, TOLERANCE
from farshore.kernels.base import AttentionSpec, KVLayout, Segments, State, WorkList
from farshore.kernels.formats import KVFormat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def interpreting():
    """Sets TRITON_INTERPRET for a while if there is no GPU; see tests/conftest.py."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


with interpreting():
    from farshore.kernels.gpu import ops


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Triton reads the variable again at the first launch, when it imports its remaining modules."""
    with interpreting():
        yield


precisions = st.sampled_from(PRECISIONS)


@st.composite
def specs(draw):
    """1 to 3 groups of (1, 1), (1, 2), (2, 1) or (2, 3) K and V heads; V inside K now and then."""
    groups, (ks, vs), share = draw(st.tuples(
        st.integers(1, 3), st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 3)]), st.integers(1, 3)
    ))  # fmt: skip
    k_dim, v_dim = draw(st.sampled_from([(8, 8), (20, 12), (80, 64), (64, 80), (16, 40)]))
    return AttentionSpec(
        q_heads=groups * ks * vs * share,
        k_heads=groups * ks,
        v_heads=groups * vs,
        k_dim=k_dim,
        v_dim=v_dim,
        scale=k_dim**-0.5,
        soft_cap=draw(st.none() | st.just(5.0)),
        window_tokens=draw(st.none() | st.integers(1, 20)),
        v_in_k=ks == vs and (k_dim, v_dim) == (80, 64) and draw(st.booleans()),
    )


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unwritten_state(*shape, dtype=torch.float32):
    """A state of NaN, so that an element that a kernel does not write is noticed."""
    return State(
        torch.full(shape, torch.nan, dtype=dtype, device=DEVICE),
        torch.full(shape[:2], torch.nan, device=DEVICE),
    )


def partial(spec, layout, memory, q, positions, *, runs, work, groups=None):
    group0, group1 = groups or (0, spec.groups)
    plan = ops.plan(
        WorkList.of(work),
        Segments.of(runs),
        memory.to(DEVICE),
        layout,
        spec,
        positions=positions,
        group0=group0,
        group1=group1,
    )
    out = unwritten_state(*q.shape[:2], spec.v_dim)
    ops.partial(plan, 1, q.to(DEVICE), out=out)
    return State(out.o.cpu(), out.lse.cpu())


def extend(q, k, v, spec, *, q_positions, k_position):
    out = unwritten_state(*q.shape[:2], spec.v_dim)
    q, k, v, q_positions = (x.to(DEVICE) for x in (q, k, v, q_positions))
    ops.extend(q, k, v, spec, q_positions=q_positions, k_position=k_position, out=out)
    return out


def merge(states, *, sink=None, dtype=torch.float32):
    out = unwritten_state(*states[0].o.shape, dtype=dtype)
    states = [State(state.o.to(DEVICE), state.lse.to(DEVICE)) for state in states]
    ops.merge(states, sink=None if sink is None else sink.to(DEVICE), out=out)
    return State(out.o.cpu(), out.lse.cpu())


def test_the_module_keeps_the_protocol(assert_protocol):
    assert_protocol(ops, native=False)


@settings(deadline=None, max_examples=40)
@given(
    spec=specs(),
    precision=precisions,
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    rows=st.integers(1, 6),
    first=st.integers(0, 11),
    gap=st.integers(0, 1),
    shift=st.sampled_from([0, 16, 4]),
    seed=st.integers(0, 99),
)
def test_partial_over_any_cut_equals_the_textbook(
    textbook, assert_close, store_tokens, spec, precision, lengths, rows, first, gap, shift, seed
):
    """All rows on every piece of the sequence; token 0 anywhere in a block, blocks anywhere in memory."""
    dtype, format = precision
    tokens = sum(lengths)
    kv = store_tokens(spec, format, tokens, seed=seed, block_tokens=8, first=first, gap_blocks=gap)
    memory = torch.cat([torch.full((shift,), 0xFF, dtype=torch.uint8), kv.memory])
    q = random(rows, spec.q_heads, spec.k_dim, seed=seed + 1, dtype=dtype)
    positions = torch.arange(rows) + 10 + max(tokens - 3, 0)
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    out = partial(
        spec,
        kv.layout,
        memory,
        q,
        positions,
        runs=[
            (shift, kv.stride, first + begin, length, 10 + begin, 0, spec.groups)
            for begin, length in zip(begins, lengths, strict=True)
        ],
        work=[(0, rows, i, 0, spec.groups) for i in range(len(lengths))],
    )
    assert_close(out, textbook(q, kv.k, kv.v, spec, q_positions=positions, k_position=10), TOLERANCE[dtype])


def test_rows_choose_their_segments_and_groups(textbook, assert_close, store_tokens):
    """Forty rows share a prefix. Some also read a second segment, in all or some groups; one has no work."""
    spec = AttentionSpec(q_heads=6, k_heads=3, v_heads=3, k_dim=16, v_dim=16, scale=0.25)
    kv = store_tokens(spec, KVFormat.FLOAT32, 60, block_tokens=8)
    rows = 41
    q = random(rows, 6, 16, seed=3)
    positions = torch.full((rows,), 59)
    runs = [(0, kv.stride, 0, 37, 0, 0, 3), (0, kv.stride, 37, 23, 37, 0, 3)]
    work = [(0, 40, 0, 0, 3), (1, 1, 1, 0, 3), (2, 1, 1, 1, 2), (5, 3, 1, 2, 3)]
    out = partial(spec, kv.layout, kv.memory, q, positions, runs=runs, work=work)

    all_tokens = textbook(q, kv.k, kv.v, spec, q_positions=positions)
    expected = textbook(q, kv.k[:, :37], kv.v[:, :37], spec, q_positions=positions)
    for seen in ((1, slice(None)), (2, slice(2, 4)), (slice(5, 8), slice(4, 6))):
        expected.o[seen], expected.lse[seen] = all_tokens.o[seen], all_tokens.lse[seen]
    expected.o[40], expected.lse[40] = 0.0, -torch.inf
    assert_close(out, expected, 2e-6)


def test_a_shard_of_some_heads_numbers_them_from_its_first(textbook, assert_close, store_tokens):
    """Blocks hold group 2 of 4 only, and q has the heads of groups 1 and 2."""
    spec = AttentionSpec(q_heads=16, k_heads=4, v_heads=8, k_dim=8, v_dim=8, scale=0.3)
    one_group = spec._replace(q_heads=4, k_heads=1, v_heads=2)
    kv = store_tokens(one_group, KVFormat.FLOAT32, 21)
    layout = KVLayout.of(spec, layers=2, format=KVFormat.FLOAT32)._replace(block_tokens=4)
    q, positions = random(2, 8, 8, seed=4), torch.tensor([15, 30])
    out = partial(
        spec,
        layout,
        kv.memory,
        q,
        positions,
        runs=[(0, kv.stride, 0, 21, 0, 2, 3)],
        work=[(0, 2, 0, 2, 3)],
        groups=(1, 3),
    )
    assert (out.o[:, :4] == 0).all() and (out.lse[:, :4] == -torch.inf).all()
    expected = textbook(q[:, 4:], kv.k, kv.v, one_group, q_positions=positions)
    assert_close(State(out.o[:, 4:], out.lse[:, 4:]), expected, 2e-6)


@pytest.mark.parametrize("precision", PRECISIONS[:2] + PRECISIONS[-1:])
@pytest.mark.parametrize("k_dim", [64, 80, 96, 112, 128, 192, 256])
def test_every_head_dim(textbook, assert_close, store_tokens, k_dim, precision):
    dtype, format = precision
    spec = AttentionSpec(
        q_heads=4, k_heads=1, v_heads=1, k_dim=k_dim, v_dim=min(k_dim, 128), scale=k_dim**-0.5
    )
    kv = store_tokens(spec, format, 33, block_tokens=32, first=7)
    q, positions = random(2, 4, k_dim, seed=1, dtype=dtype), torch.tensor([20, 32])
    runs, work = [(0, kv.stride, 7, 33, 0, 0, 1)], [(0, 2, 0, 0, 1)]
    out = partial(spec, kv.layout, kv.memory, q, positions, runs=runs, work=work)
    assert_close(out, textbook(q, kv.k, kv.v, spec, q_positions=positions), TOLERANCE[dtype])


@pytest.mark.parametrize("dims", [(576, 512), (192, 64)])
@pytest.mark.parametrize("precision", [PRECISIONS[0], PRECISIONS[1], PRECISIONS[-1]])
def test_latent_attention_reads_v_out_of_k(textbook, assert_close, store_tokens, precision, dims):
    """MLA: V is the first 512 of 576 dims of K, which are loaded with K; the first 64 of 192 are loaded anew.
    The group has 40 heads, more than a tile takes."""
    dtype, format = precision
    spec = AttentionSpec(40, 1, 1, *dims, scale=dims[0] ** -0.5, v_in_k=True)
    kv = store_tokens(spec, format, 19, block_tokens=16, first=5)
    q, positions = random(2, 40, dims[0], seed=1, dtype=dtype), torch.tensor([17, 18])
    runs, work = [(0, kv.stride, 5, 19, 0, 0, 1)], [(0, 2, 0, 0, 1)]
    out = partial(spec, kv.layout, kv.memory, q, positions, runs=runs, work=work)
    assert_close(out, textbook(q, kv.k, kv.v, spec, q_positions=positions), TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_lengths_around_the_blocks_of_storage_and_of_the_kernel(textbook, assert_close, store_tokens, tokens):
    spec = AttentionSpec(q_heads=2, k_heads=1, v_heads=1, k_dim=16, v_dim=16, scale=0.25)
    kv = store_tokens(spec, KVFormat.BFLOAT16, tokens, block_tokens=32)
    q, positions = random(1, 2, 16, seed=2, dtype=torch.bfloat16), torch.tensor([tokens])
    runs, work = [(0, kv.stride, 0, tokens, 0, 0, 1)], [(0, 1, 0, 0, 1)]
    out = partial(spec, kv.layout, kv.memory, q, positions, runs=runs, work=work)
    assert_close(out, textbook(q, kv.k, kv.v, spec, q_positions=positions), 8e-3)


def test_rows_before_the_segment_or_past_the_window_see_nothing(store_tokens):
    spec = AttentionSpec(q_heads=1, k_heads=1, v_heads=1, k_dim=16, v_dim=16, scale=0.25, window_tokens=4)
    kv = store_tokens(spec, KVFormat.FLOAT32, 20)
    q, positions = random(3, 1, 16, seed=2), torch.tensor([99, 105, 123])
    runs, work = [(0, kv.stride, 0, 20, 100, 0, 1)], [(0, 3, 0, 0, 1)]
    out = partial(spec, kv.layout, kv.memory, q, positions, runs=runs, work=work)
    assert out.lse[:, 0].isfinite().tolist() == [False, True, False]
    assert (out.o[[0, 2]] == 0).all() and (out.lse[[0, 2]] == -torch.inf).all()


@settings(deadline=None, max_examples=40)
@given(
    spec=specs(),
    dtype=st.sampled_from(list(TOLERANCE)),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    rows=st.integers(1, 20),
    late=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_extend_in_pieces_then_merge_equals_the_textbook(
    textbook, assert_close, spec, dtype, lengths, rows, late, seed
):
    """The last row is ``late`` positions after the last key; the first ones of many rows see no key."""
    tokens = sum(lengths)
    q = random(rows, spec.q_heads, spec.k_dim, seed=seed, dtype=dtype)
    k = random(spec.k_heads, tokens, spec.k_dim, seed=seed + 1, dtype=dtype)
    v = random(spec.v_heads, tokens, spec.v_dim, seed=seed + 2, dtype=dtype)
    positions = torch.arange(rows) + 50 + tokens - rows + late
    states, start = [], 0
    for length in lengths:
        piece = slice(start, start + length)
        states.append(extend(q, k[:, piece], v[:, piece], spec, q_positions=positions, k_position=50 + start))
        start += length
    expected = textbook(q, k, v, spec, q_positions=positions, k_position=50)
    assert_close(merge(states), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_stay_finite(size):
    spec = AttentionSpec(q_heads=1, k_heads=1, v_heads=1, k_dim=1, v_dim=1, scale=1.0)
    k, v = torch.full((1, 5, 1), size), torch.arange(5.0).view(1, 5, 1)
    out = extend(torch.ones(1, 1, 1), k, v, spec, q_positions=torch.tensor([9]), k_position=0)
    assert out.o.item() == pytest.approx(2.0)
    assert out.lse.item() == pytest.approx(size + math.log(5), rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    empties=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    shape=st.sampled_from([(1, 1, 1), (2, 3, 4), (3, 5, 20), (2, 9, 64)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    with_sink=st.booleans(),
    seed=st.integers(0, 99),
)
def test_merge_equals_the_textbook(textbook_merge, empties, shape, dtype, with_sink, seed):
    """The o of empty states is NaN; lse is transposed, o a slice of heads."""
    check_merge(textbook_merge, empties, shape, dtype=dtype, with_sink=with_sink, seed=seed)


@pytest.mark.parametrize("count", [16, 17, 31, 65, 130])
def test_merge_of_more_states_than_one_launch_takes(textbook_merge, count):
    empties = [(0.2, 0.9)[i % 2] for i in range(count)]
    check_merge(textbook_merge, empties, (1, 2, 4), dtype=torch.float32, with_sink=True, seed=count)


def check_merge(textbook_merge, empties, shape, *, dtype, with_sink, seed):
    """Merges one state for each share of empty (row, head) pairs."""
    rows, heads, _ = shape
    states = []
    for i, share in enumerate(empties):
        state = State(
            random(rows, heads + 1, shape[2], seed=seed + i, dtype=dtype)[:, 1:],
            random(heads, rows, seed=i).T * 5,
        )
        empty = random(rows, heads, seed=seed + i).sigmoid() < share
        state.o[empty], state.lse[empty] = torch.nan, -torch.inf
        states.append(state)
    sink = random(heads, seed=seed) if with_sink else None

    o, lse = textbook_merge(states, sink=sink)
    out = merge(states, sink=sink, dtype=dtype)
    assert torch.equal(out.lse == -torch.inf, lse == -torch.inf)
    seen = lse > -torch.inf
    assert torch.allclose(out.lse[seen].double(), lse[seen], rtol=1e-6, atol=2e-6)
    assert torch.allclose(out.o.double(), o, rtol=0.0, atol=TOLERANCE[dtype] * 5)


def test_wrong_arguments_are_refused(store_tokens):
    spec = AttentionSpec(q_heads=3, k_heads=3, v_heads=3, k_dim=16, v_dim=16, scale=1.0)
    kv = store_tokens(spec, KVFormat.FLOAT32, 3)
    run = (0, kv.stride, 0, 3, 0, 1, 3)
    one = [(0, 1, 0, 1, 3)]

    def plan(*, format=KVFormat.FLOAT32, run=run, work=one, rows=1):
        layout = kv.layout._replace(format=format)
        positions = torch.zeros(rows, dtype=torch.long)
        return ops.plan(
            WorkList.of(work), Segments.of([run]), kv.memory.to(DEVICE), layout, spec, positions=positions
        )

    with pytest.raises(ValueError, match="float64 KV has no GPU kernel"):
        plan(format=KVFormat.FLOAT64)
    with pytest.raises(ValueError, match=r"groups 0\.\.3 asked of a segment holding 1\.\.3"):
        plan(work=[(0, 1, 0, 0, 3)])
    with pytest.raises(ValueError, match="is not of 1 rows and 3 heads"):
        ops.partial(plan(), 0, torch.zeros(1, 2, 16, device=DEVICE), out=unwritten_state(1, 2, 16))
    with pytest.raises(ValueError, match="rows that are not among the step's 1"):
        plan(work=[(0, 2, 0, 1, 3)])
    with pytest.raises(ValueError, match="must lie at multiples of 4 bytes, not 2"):
        plan(run=(2, *run[1:]))
    with pytest.raises(ValueError, match="layer 2 of 2"):
        ops.partial(plan(), 2, torch.zeros(1, 3, 16, device=DEVICE), out=unwritten_state(1, 3, 16))
    with pytest.raises(ValueError, match="float64 on KV"):
        q = torch.zeros(1, 3, 16, dtype=torch.float64, device=DEVICE)
        ops.partial(plan(), 0, q, out=unwritten_state(1, 3, 16))
    with pytest.raises(ValueError, match="do not match"):
        extend(
            torch.zeros(1, 3, 16), *torch.zeros(2, 2, 5, 16), spec, q_positions=torch.zeros(1), k_position=0
        )
    with pytest.raises(ValueError, match="0 states"):
        ops.merge([], out=unwritten_state(1, 3, 16))


@pytest.mark.heavy
@settings(deadline=None, max_examples=6)
@given(
    precision=precisions,
    tokens=st.integers(250, 800),
    rows=st.integers(1, 40),
    group=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 99),
)
def test_long_shared_segments_in_blocks_of_256(
    textbook, assert_close, store_tokens, precision, tokens, rows, group, seed
):
    dtype, format = precision
    spec = AttentionSpec(q_heads=2 * group, k_heads=2, v_heads=2, k_dim=64, v_dim=64, scale=0.125)
    kv = store_tokens(spec, format, tokens, seed=seed, block_tokens=256, first=seed)
    q = random(rows, spec.q_heads, 64, seed=seed, dtype=dtype)
    positions = torch.arange(rows) + tokens - rows // 2
    runs, work = [(0, kv.stride, seed, tokens, 0, 0, 2)], [(0, rows, 0, 0, 2)]
    out = partial(spec, kv.layout, kv.memory, q, positions, runs=runs, work=work)
    assert_close(out, textbook(q, kv.k, kv.v, spec, q_positions=positions), TOLERANCE[dtype])
