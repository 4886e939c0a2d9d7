"""``partial`` of every implementation that runs on the CPU against dense float64 attention."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore.kernels import reference
from farshore.kernels.base import AttentionSpec, KVLayout, Segments, State, WorkList
from farshore.kernels.formats import KVFormat

LENGTHS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 513]
"""Around multiples of blocks and of the kernels' tiles."""
seeds = st.integers(0, 99)
DIMS = [(64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (192, 128), (256, 256), (8, 12), (20, 7)]
slow = settings(deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])


def queries(spec, rows, dtype, seed, *, size=1.0):
    random = torch.Generator().manual_seed(seed + 1)
    return (torch.randn(rows, spec.q_heads, spec.k_dim, generator=random) * size).to(dtype)


def unwritten(rows, heads, v_dim, dtype, o_dtype):
    """A state of NaN in strided views, which shows elements that are not written or written elsewhere."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    o = torch.full((rows, heads + 1, v_dim + 3), torch.nan, dtype=o_dtype or wide)[:, 1:, 1 : v_dim + 1]
    return State(o, torch.full((heads, rows + 1), torch.nan, dtype=wide)[:, :rows].T)


def run(kernels, q, memory, layout, spec, *, runs, work, positions, o_dtype=None, **options):
    """Runs one layer of one plan, with q in a strided view."""
    if kernels.native:
        options = {"threads": 1, **options}
    plan = kernels.plan(
        WorkList.of(work),
        Segments.of(runs),
        memory,
        layout,
        spec,
        positions=torch.tensor(positions),
        **options,
    )
    wide = torch.full((q.shape[0], q.shape[1] + 2, q.shape[2] + 1), torch.nan, dtype=q.dtype)
    view = wide[:, 1:-1, 1:]
    view.copy_(q)
    out = unwritten(*q.shape[:2], spec.v_dim, q.dtype, o_dtype)
    kernels.partial(plan, 1, view, out=out)
    for view in out:
        surrounding = view._base
        assert surrounding.isnan().sum() - view.isnan().sum() == surrounding.numel() - view.numel()
    return out


class Stored(NamedTuple):
    """A segment in its own memory, holding head groups [group0, group1)."""

    stored: tuple
    first: int
    position: int
    group0: int
    group1: int


@st.composite
def batches(draw, specs, kernels):
    """A step: segments that each hold some groups, and a work list of any rows on any segments."""
    spec, format = draw(specs), draw(st.sampled_from(kernels.formats))
    group0 = draw(st.integers(0, spec.groups - 1))
    group1 = draw(st.integers(group0 + 1, spec.groups))
    rows = draw(st.integers(1, 16))
    block_tokens = draw(st.sampled_from([4, 32, 100, 256]))
    segments = []
    for _ in range(draw(st.integers(1, 4))):
        stored0 = draw(st.integers(0, group0))
        stored1 = draw(st.integers(group1, spec.groups))
        tokens = draw(st.sampled_from(LENGTHS) | st.integers(1, 80))
        first, position = draw(st.integers(0, block_tokens + 3)), draw(st.sampled_from([0, 3, 64, 500]))
        segments.append((tokens, first, draw(st.integers(0, 1)), position, stored0, stored1))
    work = []
    for _ in range(draw(st.integers(0, 6))):
        row = draw(st.integers(0, rows - 1))
        g0 = draw(st.integers(group0, group1 - 1))
        count, g1 = draw(st.integers(1, rows - row)), draw(st.integers(g0 + 1, group1))
        work.append((row, count, draw(st.integers(0, len(segments) - 1)), g0, g1))
    return dict(
        spec=spec,
        format=format,
        dtype=draw(st.sampled_from(kernels.q_dtypes)),
        groups=(group0, group1),
        block_tokens=block_tokens,
        segments=segments,
        work=work,
        positions=draw(st.lists(st.integers(0, 700), min_size=rows, max_size=rows)),
        shift=draw(st.sampled_from([0, 8, 24])),
        threads=draw(st.sampled_from([1, 2, 3, 5])),
        o_dtype=draw(st.sampled_from([None, torch.bfloat16, torch.float16])),
        seed=draw(seeds),
    )


def of_groups(spec, groups):
    """The spec of a shard that holds ``groups`` of the groups."""
    return spec._replace(
        q_heads=groups * spec.q_heads_per_group,
        k_heads=spec.k_heads // spec.groups * groups,
        v_heads=spec.v_heads // spec.groups * groups,
    )


@pytest.fixture(scope="session")
def textbook_of_batch(textbook):
    """The textbook's states of all work items, merged."""

    def attend(q, spec, segments, work, positions):
        positions = torch.tensor(positions)
        no_tokens = (torch.zeros(heads, 0, dim) for heads, dim in zip(spec[1:3], spec[3:5], strict=True))
        total = textbook(q, *no_tokens, spec, q_positions=positions)
        states = [State(total.o, total.lse)]
        for row, count, segment, g0, g1 in work:
            kv, per_group = segments[segment], spec.q_heads_per_group
            ks, vs = spec.k_heads // spec.groups, spec.v_heads // spec.groups
            seen = slice(row, row + count), slice(g0 * per_group, g1 * per_group)
            state = textbook(
                q[seen],
                kv.stored.k[(g0 - kv.group0) * ks : (g1 - kv.group0) * ks],
                kv.stored.v[(g0 - kv.group0) * vs : (g1 - kv.group0) * vs],
                of_groups(spec, g1 - g0),
                q_positions=positions[row : row + count],
                k_position=kv.position,
            )
            states.append(State.identity(*q.shape[:2], spec.v_dim, dtype=torch.float64, device="cpu"))
            states[-1].o[seen], states[-1].lse[seen] = state.o, state.lse
            total = total._replace(
                largest_logit=max(total.largest_logit, state.largest_logit),
                largest_v=max(total.largest_v, state.largest_v),
            )
        merged = State.identity(*q.shape[:2], spec.v_dim, dtype=torch.float64, device="cpu")
        reference.merge(states, out=merged)
        return total._replace(o=merged.o, lse=merged.lse)

    return attend


@slow
@given(data=st.data())
def test_any_rows_on_any_segments(kernels, specs, textbook_of_batch, assert_close, store_tokens, data):
    batch = data.draw(batches(specs, kernels))
    spec, format, dtype, seed = batch["spec"], batch["format"], batch["dtype"], batch["seed"]
    shift = batch["shift"]
    memory, segments, runs = [torch.full((shift,), 0xFF, dtype=torch.uint8)], [], []
    base = shift
    for i, (tokens, first, gap, position, stored0, stored1) in enumerate(batch["segments"]):
        stored = store_tokens(
            of_groups(spec, stored1 - stored0),
            format,
            tokens,
            seed=seed + i,
            block_tokens=batch["block_tokens"],
            first=first,
            gap_blocks=gap,
        )
        segments.append(Stored(stored, first, position, stored0, stored1))
        runs.append((base, stored.stride, first, tokens, position, stored0, stored1))
        memory.append(stored.memory)
        base += stored.memory.numel()
    q = queries(spec, len(batch["positions"]), dtype, seed)
    group0, group1 = batch["groups"]
    heads = slice(group0 * spec.q_heads_per_group, group1 * spec.q_heads_per_group)
    options = {"threads": batch["threads"]} if kernels.native else {}
    out = run(
        kernels,
        q[:, heads],
        torch.cat(memory),
        KVLayout.of(spec, layers=2, format=format)._replace(block_tokens=batch["block_tokens"]),
        spec,
        runs=runs,
        work=batch["work"],
        positions=batch["positions"],
        o_dtype=batch["o_dtype"],
        group0=group0,
        group1=group1,
        **options,
    )
    expected = textbook_of_batch(q, spec, segments, batch["work"], batch["positions"])
    expected = expected._replace(o=expected.o[:, heads], lse=expected.lse[:, heads])
    assert_close(out, expected, kernels.tolerance(dtype, format))


def attend(kernels, q, stored, spec, ranges, *, first=0, positions, k_position=0, **options):
    """The state of one plan over ranges (begin, end) of the stored tokens, one segment each."""
    runs = [(0, stored.stride, first + a, b - a, k_position + a, 0, spec.groups) for a, b in ranges]
    work = [(0, q.shape[0], segment, 0, spec.groups) for segment in range(len(runs))]
    return run(
        kernels, q, stored.memory, stored.layout, spec, runs=runs, work=work, positions=positions, **options
    )


def bounds(lengths):
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


@slow
@given(data=st.data())
def test_tokens_in_pieces_equal_the_textbook(kernels, specs, textbook, assert_close, store_tokens, data):
    """The tokens are cut anywhere: into segments of one plan, or into plans whose states are merged."""
    spec, format = data.draw(specs), data.draw(st.sampled_from(kernels.formats))
    dtype = data.draw(st.sampled_from(kernels.q_dtypes))
    lengths = data.draw(st.lists(st.integers(0, 70) | st.sampled_from(LENGTHS), min_size=1, max_size=5))
    rows, first, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 40)), data.draw(seeds)
    tokens = sum(lengths)
    stored = store_tokens(spec, format, tokens, seed=seed, first=first, block_tokens=32)
    q = queries(spec, rows, dtype, seed)
    options = dict(first=first, positions=[max(tokens - 2, 0) + i for i in range(rows)])
    if data.draw(st.booleans()):
        out = attend(kernels, q, stored, spec, bounds(lengths), **options)
    else:
        states = [attend(kernels, q, stored, spec, [piece], **options) for piece in bounds(lengths)]
        out = unwritten(*q.shape[:2], spec.v_dim, dtype, None)
        kernels.merge(states, out=out)
    expected = textbook(q, stored.k, stored.v, spec, q_positions=torch.tensor(options["positions"]))
    assert_close(out, expected, kernels.tolerance(dtype, format))


@pytest.fixture(scope="session")
def ragged(textbook, store_tokens):
    """ragged(dims, format, dtype) -> (spec, stored tokens, q, the textbook's states of rows that see LENGTHS
    of the tokens). Computed once for all implementations."""

    @cache
    def make(dims, format, dtype):
        spec = AttentionSpec(6, 2, 2, *dims, scale=dims[0] ** -0.5)
        stored = store_tokens(spec, format, LENGTHS[-1], block_tokens=256, first=7)
        q = queries(spec, len(LENGTHS), dtype, 1)
        # The position of a row limits how many of the tokens it sees.
        expected = textbook(q, stored.k, stored.v, spec, q_positions=torch.tensor(LENGTHS) - 1)
        return spec, stored, q, expected

    return make


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_lengths_around_tiles_and_blocks(kernels, ragged, assert_close, dims):
    """A ragged batch: each row has its own segment, of its own length."""
    for format in set(kernels.formats) - {KVFormat.FLOAT64}:
        for dtype in (torch.float32, torch.bfloat16):
            spec, stored, q, expected = ragged(dims, format, dtype)
            runs = [(0, stored.stride, 7, tokens, 0, 0, 2) for tokens in LENGTHS]
            out = run(
                kernels,
                q,
                stored.memory,
                stored.layout,
                spec,
                runs=runs,
                work=[(row, 1, row, 0, 2) for row in range(len(LENGTHS))],
                positions=[600] * len(LENGTHS),
            )
            assert_close(out, expected, kernels.tolerance(dtype, format))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [f for f in KVFormat if f is not KVFormat.FLOAT64])
def test_a_latent_shared_by_all_heads(kernels, textbook, assert_close, store_tokens, format, dtype):
    """MLA: one K head of 576 dims, whose first 512 are V, and 128 query heads."""
    spec = AttentionSpec(128, 1, 1, 576, 512, scale=576**-0.5, v_in_k=True)
    stored = store_tokens(spec, format, 300, block_tokens=256, first=3)
    assert torch.equal(stored.v, stored.k[..., :512])
    q = queries(spec, 2, dtype, 0)
    out = attend(kernels, q, stored, spec, [(0, 300)], first=3, positions=[298, 299])
    expected = textbook(q, stored.k, stored.v, spec, q_positions=torch.tensor([298, 299]))
    assert_close(out, expected, kernels.tolerance(dtype, format))


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(kernels, textbook, assert_close, store_tokens, size, soft_cap, tokens):
    """q is a multiple of the first key, so that its logit is +-1e4."""
    spec = AttentionSpec(2, 1, 1, 64, 64, scale=64**-0.5, soft_cap=soft_cap)
    for format in kernels.formats:
        if format.quantised:
            continue
        stored = store_tokens(spec, format, tokens, block_tokens=32)
        for dtype in kernels.q_dtypes:
            direction = stored.k[0, 0] / stored.k[0, 0].square().sum()
            q = (direction * size / spec.scale).to(dtype).expand(1, 2, 64)
            out = attend(kernels, q, stored, spec, [(0, tokens)], positions=[tokens])
            expected = textbook(q, stored.k, stored.v, spec, q_positions=torch.tensor([tokens]))
            assert expected.largest_logit > 9000
            assert_close(out, expected, kernels.tolerance(dtype, format))


def test_rows_without_work_and_rows_that_see_nothing(kernels, store_tokens):
    """Row 0 has no work, row 1 an empty segment, row 2 is before the segment, row 3 past its window."""
    spec = AttentionSpec(2, 1, 1, 16, 20, scale=0.25, window_tokens=4)
    stored = store_tokens(spec, KVFormat.FLOAT32, 20)
    q = queries(spec, 5, torch.float32, 0)
    for work in (
        [(1, 1, 1, 0, 1), (2, 1, 0, 0, 1), (3, 2, 0, 0, 1)],
        [(1, 4, 0, 0, 1), (2, 1, 1, 0, 1)],
        [(1, 2, 1, 0, 1), (2, 3, 0, 0, 1), (2, 2, 0, 0, 1)],
    ):
        out = run(
            kernels,
            q,
            stored.memory,
            stored.layout,
            spec,
            runs=[(0, stored.stride, 0, 20, 100, 0, 1), (0, stored.stride, 3, 0, 0, 0, 1)],
            work=work,
            positions=[110, 99, 99, 123, 105],
        )
        assert out.lse[4].isfinite().all()
        assert (out.o[:4] == 0).all() and (out.lse[:4] == -torch.inf).all()


def test_no_work(kernels, store_tokens):
    spec = AttentionSpec(4, 2, 2, 16, 8, scale=0.25)
    stored = store_tokens(spec, KVFormat.BFLOAT16, 3)
    for rows in (0, 3):
        q = queries(spec, rows, torch.float32, 0)
        out = run(
            kernels, q, stored.memory, stored.layout, spec, runs=[], work=[], positions=list(range(rows))
        )
        assert (out.o == 0).all() and (out.lse == -torch.inf).all()


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_nan_in_k_makes_the_state_nan(kernels, store_tokens, tokens):
    """The NaN is in an element of K or, if quantised, in its scale, as after an overflow."""
    spec = AttentionSpec(2, 1, 1, 64, 64, scale=0.125)
    for format in kernels.formats:
        stored = store_tokens(spec, format, tokens, block_tokens=64)
        if format.quantised:
            stored.layout.stored(stored.memory, 1).k_scales[:, 0] = torch.nan
        else:
            stored.layout.views(stored.memory, 1)[0][:, 0] = torch.nan
        for dtype in kernels.q_dtypes:
            q = queries(spec, 1, dtype, 0)
            out = attend(kernels, q, stored, spec, [(0, tokens)], positions=[tokens])
            assert out.o.isnan().all() and out.lse.isnan().all()


@pytest.mark.parametrize("window", [None, 40])
def test_plans_of_successive_steps(kernels, textbook, assert_close, store_tokens, window):
    """Each is made out of the last: a tail grows inside its block, and shrinks when guesses were wrong."""
    spec = AttentionSpec(
        q_heads=4, k_heads=2, v_heads=2, k_dim=64, v_dim=64, scale=0.125, window_tokens=window
    )
    kv = store_tokens(spec, KVFormat.FLOAT32, 90, block_tokens=128)
    last = None
    for tokens in (60, 61, 62, 64, 61, 62, 80, 90):
        positions = torch.tensor([tokens - 2, tokens - 1])
        last = kernels.plan(
            WorkList.of([(0, 2, 0, 0, 2)]),
            Segments.of([(0, kv.stride, 0, tokens, 0, 0, 2)]),
            kv.memory,
            kv.layout,
            spec,
            positions=positions,
            last=last,
        )
        q = queries(spec, 2, torch.float32, tokens)
        out = unwritten(2, 4, 64, torch.float32, None)
        kernels.partial(last, 1, q, out=out)
        assert_close(out, textbook(q, kv.k, kv.v, spec, q_positions=positions), 2e-6)
