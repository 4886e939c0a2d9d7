"""``extend`` of every implementation that runs on the CPU against dense float64 attention."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore.kernels.base import AttentionSpec, State
from farshore.kernels.formats import KVFormat

LENGTHS = st.integers(0, 70) | st.sampled_from([127, 128, 129, 255, 256, 257, 513])


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inside(*shape, dtype):
    """A strided view of ``shape`` inside a tensor of NaN, and that tensor."""
    surrounding = torch.full(tuple(size + 2 for size in shape), torch.nan, dtype=dtype)
    return surrounding[tuple(slice(1, -1) for _ in shape)], surrounding


def extend(kernels, q, k, v, spec, *, o_dtype=None, **options):
    """Writes to strided views and checks that nothing beside them changes."""
    if kernels.native:
        options = {"threads": 1, **options}
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    o, all_o = inside(*q.shape[:2], spec.v_dim, dtype=o_dtype or wide)
    lse, all_lse = inside(*q.shape[:2], dtype=wide)
    kernels.extend(q, k, v, spec, out=State(o, lse), **options)
    for view, surrounding in ((o, all_o), (lse, all_lse)):
        beside = surrounding.numel() - view.numel()
        assert surrounding.isnan().sum() - view.isnan().sum() == beside
    return State(o, lse)


def strided(x):
    view, _ = inside(*x.shape, dtype=x.dtype)
    return view.copy_(x)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_keys_in_pieces_equal_the_textbook(kernels, specs, textbook, assert_close, data):
    """Rows and keys at any positions, keys cut anywhere; K and V are strided, V may be part of K."""
    spec = data.draw(specs)
    q_dtype = data.draw(st.sampled_from(kernels.q_dtypes))
    kv_dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    lengths = data.draw(st.lists(LENGTHS, min_size=1, max_size=3))
    rows, seed, k_position = data.draw(
        st.tuples(st.integers(1, 40) | st.sampled_from([129, 300]), st.integers(0, 99), st.integers(0, 9))
    )
    tokens = sum(lengths)
    q = random(rows, spec.q_heads, spec.k_dim, seed=seed, dtype=q_dtype)
    k = strided(random(spec.k_heads, tokens, spec.k_dim, seed=seed + 1, dtype=kv_dtype))
    v = k[..., : spec.v_dim] if spec.v_in_k else random(spec.v_heads, tokens, spec.v_dim, seed=seed + 2)
    v = v.to(kv_dtype)
    if data.draw(st.booleans()):
        positions = torch.arange(rows) + k_position + max(tokens - rows, 0)
    else:
        positions = torch.randint(0, tokens + 20, (rows,), generator=torch.Generator().manual_seed(seed))
    options = {"threads": data.draw(st.sampled_from([1, 2, 3, 5]))} if kernels.native else {}
    if len(lengths) == 1:
        options["o_dtype"] = data.draw(st.sampled_from([None, torch.bfloat16, torch.float16]))
    states, begin = [], 0
    for length in lengths:
        piece = slice(begin, begin + length)
        states.append(
            extend(
                kernels,
                strided(q),
                k[:, piece],
                v[:, piece],
                spec,
                q_positions=positions,
                k_position=k_position + begin,
                **options,
            )
        )
        begin += length
    out = states[0]
    if len(states) > 1:
        out = State.identity(rows, spec.q_heads, spec.v_dim, dtype=out.o.dtype, device="cpu")
        kernels.merge(states, out=out)
    expected = textbook(q, k, v, spec, q_positions=positions, k_position=k_position)
    assert_close(out, expected, kernels.tolerance(q_dtype, KVFormat.of(kv_dtype)))


def test_keys_and_values_as_any_format_stores_them(kernels, textbook, assert_close, store_tokens):
    """Prefill attends to the values as stored, dequantised (invariant 5, docs/architecture.md)."""
    spec = AttentionSpec(6, 2, 2, 64, 80, scale=0.125)
    for format in set(kernels.formats) - {KVFormat.FLOAT64}:
        stored = store_tokens(spec, format, 33)
        q, positions = random(20, 6, 64, seed=1, dtype=torch.float32), torch.arange(20) + 14
        k, v = stored.k.float(), stored.v.float()
        out = extend(kernels, q, k, v, spec, q_positions=positions, k_position=0)
        assert_close(out, textbook(q, stored.k, stored.v, spec, q_positions=positions), 2e-6)


def test_some_of_the_groups(kernels, textbook, assert_close):
    """A span that holds one group of three: q, K and V have only its heads."""
    spec = AttentionSpec(q_heads=12, k_heads=3, v_heads=6, k_dim=16, v_dim=8, scale=0.25)
    one_group = spec._replace(q_heads=4, k_heads=1, v_heads=2)
    q, k, v = (random(*shape, seed=3, dtype=torch.float32) for shape in ((5, 4, 16), (1, 9, 16), (2, 9, 8)))
    positions = torch.arange(5) + 4
    out = extend(kernels, q, k, v, spec, q_positions=positions, k_position=0)
    assert_close(out, textbook(q, k, v, one_group, q_positions=positions), 2e-6)


@pytest.mark.parametrize("shape", [(2048, 0, 1), (700, 3000, 3)], ids=str)
def test_many_tokens(kernels, textbook, assert_close, shape):
    """New tokens over themselves, or over a long past; some rows are compared."""
    rows, past, threads = shape
    spec = AttentionSpec(3, 1, 1, 64, 64, scale=0.125)
    for dtype in (torch.float32, torch.bfloat16):
        q = random(rows, 3, 64, seed=1, dtype=dtype)
        k, v = random(2, 1, rows + past, 64, seed=2, dtype=dtype)
        positions = torch.arange(rows) + past
        options = {"threads": threads} if kernels.native else {}
        out = extend(kernels, q, k, v, spec, q_positions=positions, k_position=0, **options)
        some = torch.tensor([0, 1, 84, 85, 86, 255, 256, rows - 2, rows - 1])
        expected = textbook(q[some], k, v, spec, q_positions=positions[some])
        tolerance = kernels.tolerance(dtype, KVFormat.of(dtype))
        assert_close(State(out.o[some], out.lse[some]), expected, tolerance)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_stay_finite(kernels, size):
    spec = AttentionSpec(q_heads=1, k_heads=1, v_heads=1, k_dim=1, v_dim=1, scale=1.0)
    k, v = torch.full((1, 5, 1), size), torch.arange(5.0).view(1, 5, 1)
    out = State.identity(1, 1, 1, device="cpu")
    kernels.extend(torch.ones(1, 1, 1), k, v, spec, q_positions=torch.tensor([9]), k_position=0, out=out)
    assert out.o.item() == pytest.approx(2.0)
    assert out.lse.item() == pytest.approx(size + math.log(5), rel=1e-6)


def test_nothing_to_attend_to(kernels):
    spec = AttentionSpec(4, 2, 2, 16, 8, scale=0.25, window_tokens=3)
    for rows, tokens, positions in ((0, 3, []), (2, 0, [0, 1]), (3, 5, [0, 9, 99])):
        q, k, v = torch.randn(rows, 4, 16), torch.randn(2, tokens, 16), torch.randn(2, tokens, 8)
        out = extend(kernels, q, k, v, spec, q_positions=torch.tensor(positions).long(), k_position=2)
        assert (out.o == 0).all() and (out.lse == -torch.inf).all()


@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
@pytest.mark.parametrize("where", ["q", "k"])
def test_rows_that_see_a_nan_are_nan(kernels, where, tokens):
    """A NaN of a broken model must show in every row that sees it, and in no other."""
    spec = AttentionSpec(1, 1, 1, 16, 16, scale=0.25)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (random(*s, seed=1, dtype=dtype) for s in ((3, 1, 16), (1, tokens, 16), (1, tokens, 16)))
        (q if where == "q" else k)[0, 0, 5] = torch.nan
        # Row 1 lies before all keys.
        positions = torch.tensor([tokens, -1, tokens])
        out = extend(kernels, q, k, v, spec, q_positions=positions, k_position=0)
        for row, broken in enumerate((True, False, where == "k")):
            assert out.o[row].isnan().all() == out.lse[row].isnan().all() == broken
            assert out.o[row].isnan().any() == broken
        merged = State.identity(3, 1, 16, device="cpu")
        kernels.merge([State.identity(3, 1, 16, device="cpu"), out], out=merged)
        assert torch.equal(merged.lse.isnan(), out.lse.isnan())
        assert torch.equal(merged.o.isnan(), out.o.isnan())
