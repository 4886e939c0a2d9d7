"""KV formats and layouts: the bytes of a row, the error of quantising, and where layouts put rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.formats import SCALE_ELEMENTS, KVFormat, dequantise, quantise

FLOAT32 = torch.finfo(torch.float32)
QUANTISED = [KVFormat.INT8, KVFormat.INT4]
LARGEST_Q = {KVFormat.INT8: 127, KVFormat.INT4: 7}

quantised = st.sampled_from(QUANTISED)
dims = st.sampled_from([1, 2, 31, 64, 65, 80, 96, 97, 127, 128, 192, 576]) | st.integers(1, 200)
shapes = st.sampled_from([(), (0,), (3,), (2, 0, 3), (2, 5)])
seeds = st.integers(0, 2**31)


def rows(shape, dim, seed):
    """float32 rows of all magnitudes, from denormal up; a row's elements spread over 8 binary orders."""
    random = torch.Generator().manual_seed(seed)
    exponents = 254 * torch.rand(*shape, 1, generator=random) - 126
    spread = -8 * torch.rand(*shape, dim, generator=random)
    return torch.randn(*shape, dim, generator=random).clamp(-1, 1) * torch.exp2(exponents + spread)


def scale_of_each(scales, dim):
    return scales.double().repeat_interleave(SCALE_ELEMENTS, dim=-1)[..., :dim]


def decoded(payload, scales, format, dim):
    """One row's elements, decoded byte by byte as the docstring of ``formats`` says."""
    payload, scales = payload.tolist(), scales.double().tolist()
    elements = []
    for i in range(dim):
        group, within = divmod(i, SCALE_ELEMENTS)
        half = math.ceil(min(SCALE_ELEMENTS, dim - group * SCALE_ELEMENTS) / 2)
        if format is KVFormat.INT8:
            q = payload[i] - 256 * (payload[i] > 127)
        else:
            byte = payload[group * SCALE_ELEMENTS // 2 + within % half]
            q = (byte & 15 if within < half else byte >> 4) - 8
        assert abs(q) <= LARGEST_Q[format]
        elements.append(q * scales[group])
    return elements


# -- rows --------------------------------------------------------------------------------------------------


def test_a_format_knows_its_elements():
    unquantised = [format for format in KVFormat if not format.quantised]
    assert [format for format in KVFormat if format.quantised] == QUANTISED
    assert [KVFormat.of(format.dtype) for format in unquantised] == unquantised
    assert all(format.dtype == torch.uint8 for format in QUANTISED)
    for dtype in (torch.uint8, torch.int8, torch.int64):
        with pytest.raises(ValueError, match=str(dtype)):
            KVFormat.of(dtype)


@pytest.mark.parametrize(
    "dim, float32, float16, int8, int4, scales",
    [(64, 256, 128, 64, 32, 1), (65, 260, 130, 65, 33, 2), (80, 320, 160, 80, 40, 2), (1, 4, 2, 1, 1, 1)],
)
def test_bytes_of_a_row(dim, float32, float16, int8, int4, scales):
    bytes_of = {format: format.row_bytes(dim) for format in KVFormat}
    assert (bytes_of[KVFormat.FLOAT32], bytes_of[KVFormat.FLOAT64]) == (float32, 2 * float32)
    assert bytes_of[KVFormat.FLOAT16] == bytes_of[KVFormat.BFLOAT16] == float16
    assert (bytes_of[KVFormat.INT8], bytes_of[KVFormat.INT4]) == (int8, int4)
    assert {format.scales(dim) for format in QUANTISED} == {scales}
    assert {format.scales(dim) for format in KVFormat if not format.quantised} == {0}


@settings(deadline=None)
@given(quantised, shapes, dims, seeds)
def test_no_element_is_off_by_more_than_half_a_step(format, shape, dim, seed):
    x = rows(shape, dim, seed)
    payload, scales = quantise(x, format)
    assert payload.shape == (*shape, format.row_bytes(dim)) and payload.dtype == torch.uint8
    assert scales.shape == (*shape, format.scales(dim)) and scales.dtype == torch.bfloat16
    back = dequantise(payload, scales, format, dim, dtype=torch.float64)
    # x / scale is rounded to float32 before it is rounded to an integer.
    half = scale_of_each(scales, dim) * (0.5 + 1e-5)
    assert back.shape == x.shape and ((back - x.double()).abs() <= half).all()


@settings(deadline=None)
@given(quantised, dims, seeds, st.sampled_from([torch.float32, torch.float64]))
def test_what_was_dequantised_quantises_to_the_same_bytes(format, dim, seed, dtype):
    once = quantise(rows((3,), dim, seed), format)
    twice = quantise(dequantise(*once, format, dim, dtype=dtype), format)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@settings(deadline=None)
@given(quantised, dims, seeds)
def test_bytes_and_nibbles_lie_where_kernels_look_for_them(format, dim, seed):
    payload, scales = quantise(rows((), dim, seed), format)
    elements = decoded(payload, scales, format, dim)
    back = dequantise(payload, scales, format, dim, dtype=torch.float64)
    assert torch.equal(back, torch.tensor(elements, dtype=torch.float64).clamp(FLOAT32.min, FLOAT32.max))


def test_an_int4_row_byte_by_byte():
    """Two groups: 64 elements of scale 1, then 3 of scale 1/2 whose last byte has one nibble to spare."""
    x = torch.zeros(67)
    x[0], x[1], x[32], x[63] = 7.0, -7.0, 3.0, -1.0
    x[64], x[65], x[66] = 3.5, -3.5, 1.0
    payload, scales = quantise(x, KVFormat.INT4)
    assert scales.tolist() == [1.0, 0.5]
    assert payload.tolist() == [0xBF, 0x81, *[0x88] * 29, 0x78, 0xAF, 0x81]


@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1.1e-38, 1e-36, 1.0, 3.38e38, FLOAT32.max])
def test_nothing_finite_becomes_an_infinity_or_nan(format, size):
    x = torch.tensor([size, -size, size / 3, 0.0])
    payload, scales = quantise(x, format)
    assert (scales >= 2.0**-126).all() and scales.isfinite().all()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        back = dequantise(payload, scales, format, 4, dtype=dtype)
        assert back.isfinite().all() and back.dtype == dtype and back[3] == 0
    wide = dequantise(payload, scales, format, 4, dtype=torch.float64)
    assert ((wide - x.double()).abs() <= scales.double() * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize("size", [1.0, 1.0039, 1.5, 1.99, FLOAT32.max])
def test_the_largest_element_uses_the_whole_range(format, size):
    payload, scales = quantise(torch.tensor([size, -size]), format)
    largest = LARGEST_Q[format] * scales.double().item()
    assert decoded(payload, scales, format, 2) == [largest, -largest]


@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_that_is_not_finite_reads_as_nan_and_its_neighbours_do_not(format, bad):
    x = torch.ones(2, 130)
    x[0, 70] = bad
    payload, scales = quantise(x, format)
    assert scales.isnan().tolist() == [[False, True, False], [False] * 3]
    back = dequantise(payload, scales, format, 130, dtype=torch.float32)
    assert back[0, 64:128].isnan().all()
    back[0, 64:128] = 1
    assert torch.allclose(back, torch.ones(2, 130), rtol=1e-2)
    zero = 0 if format is KVFormat.INT8 else 0x88
    assert set(payload[0, format.row_bytes(64) : format.row_bytes(128)].tolist()) == {zero}


@pytest.mark.parametrize("format", [format for format in KVFormat if not format.quantised])
def test_unquantised_formats_are_a_cast(format):
    x = torch.randn(2, 3, 5)
    payload, scales = quantise(x, format)
    assert payload.shape == (2, 3, format.row_bytes(5)) and scales.shape == (2, 3, 0)
    assert torch.equal(payload.view(format.dtype), x.to(format.dtype))
    back = dequantise(payload, scales, format, 5, dtype=torch.float64)
    assert torch.equal(back, x.to(format.dtype).double())


# -- layouts -----------------------------------------------------------------------------------------------


def layout_of(format, *, v_in_k=False, block_tokens=4):
    spec = AttentionSpec(4, 2, 2 if v_in_k else 4, 96, 64 if v_in_k else 65, scale=0.1, v_in_k=v_in_k)
    return KVLayout.of(spec, layers=3, format=format)._replace(block_tokens=block_tokens)


def offsets(view, block):
    """The byte offset in the block of each element of a view: [heads, tokens, elements]."""
    heads, tokens, elements = (torch.arange(n) for n in view.shape)
    index = (
        heads[:, None, None] * view.stride(0)
        + tokens[None, :, None] * view.stride(1)
        + elements * view.stride(2)
    )
    return (index + view.storage_offset()) * view.element_size() - block.storage_offset()


@pytest.mark.parametrize("format", KVFormat)
@pytest.mark.parametrize("v_in_k", [False, True])
def test_every_byte_of_a_block_has_one_place(format, v_in_k):
    layout = layout_of(format, v_in_k=v_in_k)
    block = torch.zeros(layout.block_bytes, dtype=torch.uint8)
    used = torch.zeros(layout.block_bytes, dtype=torch.int64)
    for layer in range(layout.layers):
        stored = layout.stored(block, layer)
        views = [stored.k, stored.k_scales] if v_in_k else list(stored)
        for view in views:
            for byte in range(view.element_size()):
                used.index_add_(0, offsets(view, block).flatten() + byte, torch.ones(view.numel()).long())
    assert (used == 1).all()


@pytest.mark.parametrize("format", KVFormat)
def test_a_run_is_its_rows_then_its_scales(format):
    layout, layer, head = layout_of(format), 2, 1
    block = torch.zeros(layout.block_bytes, dtype=torch.uint8)
    stored = layout.stored(block, layer)
    k_run = layer * layout.layer_bytes + head * layout.k_run_bytes
    assert offsets(stored.k, block)[head, 3, 0] == k_run + 3 * layout.k_row_bytes
    v_run = layer * layout.layer_bytes + layout.k_heads * layout.k_run_bytes + head * layout.v_run_bytes
    assert offsets(stored.v, block)[head, 3, 0] == v_run + 3 * layout.v_row_bytes
    assert stored.k.shape == (2, 4, format.row_bytes(96)) and stored.v.shape == (4, 4, format.row_bytes(65))
    assert stored.k_scales.shape == (2, 4, layout.k_scales) and stored.v_scales.shape[2] == layout.v_scales
    if format.quantised:
        k_scales_at = k_run + 4 * layout.k_row_bytes + 2 * (3 * layout.k_scales + 1)
        assert offsets(stored.k_scales, block)[head, 3, 1] == k_scales_at
        v_scales_at = v_run + 4 * layout.v_row_bytes + 2 * (3 * layout.v_scales + 1)
        assert offsets(stored.v_scales, block)[head, 3, 1] == v_scales_at


@pytest.mark.parametrize("format", KVFormat)
def test_sizes_add_up(format):
    layout = layout_of(format)
    per_token = 2 * (format.row_bytes(96) + 2 * format.scales(96))
    per_token += 4 * (format.row_bytes(65) + 2 * format.scales(65))
    assert (layout.k_heads, layout.v_heads) == (2, 4)
    assert layout.layer_token_bytes == per_token and layout.layer_bytes == 4 * per_token
    assert layout.token_bytes == 3 * per_token and layout.block_bytes == 12 * per_token
    assert layout.of_groups(1).block_bytes * 2 == layout.block_bytes


@pytest.mark.parametrize("v_in_k", [False, True])
@pytest.mark.parametrize("format", [format for format in KVFormat if not format.quantised])
def test_views_show_the_stored_bytes_as_elements(format, v_in_k):
    layout = layout_of(format, v_in_k=v_in_k)
    block = torch.randint(0, 256, (layout.block_bytes,), dtype=torch.uint8)
    for layer in range(layout.layers):
        stored, (k, v) = layout.stored(block, layer), layout.views(block, layer)
        assert k.shape == (layout.k_heads, 4, layout.k_dim) and v.shape == (layout.v_heads, 4, layout.v_dim)
        assert k.dtype == v.dtype == format.dtype
        assert torch.equal(k.contiguous().view(torch.uint8), stored.k)
        assert torch.equal(v.contiguous().view(torch.uint8), stored.v)
        v.zero_()
        assert (stored.v == 0).all(), "views share the block's memory"


@pytest.mark.parametrize("format", QUANTISED)
def test_quantised_elements_cannot_be_viewed(format):
    layout = layout_of(format)
    with pytest.raises(ValueError, match=format.value):
        layout.views(torch.zeros(layout.block_bytes, dtype=torch.uint8), 0)


@pytest.mark.parametrize("format", KVFormat)
def test_v_inside_k_takes_no_bytes_and_reads_as_the_beginning_of_k(format):
    layout = layout_of(format, v_in_k=True)
    assert (layout.v_row_bytes, layout.v_scales, layout.v_run_bytes) == (0, 0, 0)
    assert layout.layer_bytes == layout.k_heads * layout.k_run_bytes
    stored = layout.stored(torch.zeros(layout.block_bytes, dtype=torch.uint8), 1)
    for view, rows in zip((stored.k, stored.k_scales), quantise(torch.randn(2, 4, 96), format), strict=True):
        view.copy_(rows)
    k = dequantise(stored.k, stored.k_scales, format, 96, dtype=torch.float32)
    v = dequantise(stored.v, stored.v_scales, format, 64, dtype=torch.float32)
    assert torch.equal(v, k[..., :64])


@pytest.mark.parametrize(
    "heads, v_dim, format",
    [(4, 64, KVFormat.FLOAT32), (2, 97, KVFormat.FLOAT32), (2, 65, KVFormat.INT8), (2, 32, KVFormat.INT4)],
)
def test_v_that_cannot_lie_in_k_is_refused(heads, v_dim, format):
    spec = AttentionSpec(4, 2, heads, 96, v_dim, scale=0.1, v_in_k=True)
    with pytest.raises(ValueError, match="cannot lie in K"):
        KVLayout.of(spec, layers=1, format=format)


def test_v_may_be_all_of_k_or_end_anywhere_in_it_if_not_quantised():
    for v_dim, format in [(96, KVFormat.INT4), (65, KVFormat.BFLOAT16)]:
        spec = AttentionSpec(4, 2, 2, 96, v_dim, scale=0.1, v_in_k=True)
        assert KVLayout.of(spec, layers=1, format=format).v_in_k


@pytest.mark.parametrize("format", QUANTISED)
def test_nothing_is_divided_by_a_number(format):
    """On a GPU PyTorch would multiply by the number's reciprocal, and scales would differ from a CPU's."""
    divisors = []

    class Divisions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten.div:
                divisors.append(args[1])
            return function(*args, **(kwargs or {}))

    with Divisions():
        quantise(rows((4,), 96, 1), format)
    assert divisors and all(isinstance(divisor, torch.Tensor) for divisor in divisors)
