"""The dense kernels: those in PyTorch against the model's own slices, the GPU's against those in PyTorch.

The GPU's run on a GPU if there is one, else in triton's interpreter.
"""

import importlib
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.dense import reference
from farshore.kernels.dense.base import KVRows, KVSlots, Rotation
from farshore.kernels.formats import KVFormat, quantise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2**-21, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""A bit of the dtype: where a sum or a root differs in float32's last bit, so may what it is rounded to."""


@contextmanager
def interpreting():
    """Sets TRITON_INTERPRET for a while if there is no GPU; see tests/conftest.py."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(scope="module")
def ops():
    """The GPU's kernels. Triton reads the variable again at the first launch."""
    with interpreting():
        yield importlib.import_module("farshore.kernels.gpu.dense.ops")


def random(*shape, seed, dtype=torch.float32, scale=1.0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(DEVICE, dtype)


def unwritten(*shape, dtype):
    """NaN, so that an element that a kernel does not write is noticed."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def assert_close(found, expected):
    """Equal up to ROUNDING; almost all elements are equal."""
    assert not found.isnan().any()
    tolerance = ROUNDING[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 1e-2)
    if found.dtype != torch.float32 and found.numel():
        assert (found != expected).double().mean() < 0.01


# -- add_norm ---------------------------------------------------------------------------------------------

SHAPES = [(0, 64), (1, 64), (3, 1), (5, 63), (2, 576), (3, 1000), (1, 4096), (2, 16384)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adds", [False, True])
def test_add_norm(ops, shape, dtype, adds):
    """Rows may be further apart than they are long."""
    rows, size = shape
    h = random(rows, size, seed=1, dtype=dtype, scale=3.0)
    x = random(rows, size + 5, seed=2, dtype=dtype)[:, :size] if adds else None
    weight = random(size, seed=3, dtype=dtype)
    expected_h, expected = h.clone(), torch.empty_like(h)
    reference.add_norm(expected_h, x, weight, 1e-5, out=expected)
    out = unwritten(rows, size + 3, dtype=dtype)[:, :size]
    ops.add_norm(h, x, weight, 1e-5, out=out)
    assert torch.equal(h, expected_h)
    assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm_of_zeros_is_zero(ops, dtype):
    h, out = torch.zeros(2, 96, dtype=dtype, device=DEVICE), unwritten(2, 96, dtype=dtype)
    ops.add_norm(h, h.clone(), torch.ones_like(h[0]), 1e-5, out=out)
    assert (out == 0).all()


# -- silu_multiply ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 96), (2, 511), (2, 513), (1, 1536)])
def test_silu_multiply(ops, shape, dtype):
    rows, size = shape
    gate_up = random(rows, 2 * size + 2, seed=4, dtype=dtype, scale=4.0)[:, : 2 * size]
    expected, out = torch.empty(*shape, dtype=dtype, device=DEVICE), unwritten(*shape, dtype=dtype)
    reference.silu_multiply(gate_up, out=expected)
    ops.silu_multiply(gate_up, out=out)
    assert_close(out, expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_great_numbers_is_finite(ops, dtype):
    gate_up = torch.tensor([[-200.0, 200.0, -20.0, 0.5, 0.5, 0.5]], dtype=dtype, device=DEVICE)
    out, expected = unwritten(1, 3, dtype=dtype), unwritten(1, 3, dtype=dtype)
    ops.silu_multiply(gate_up, out=out)
    reference.silu_multiply(gate_up, out=expected)
    assert_close(out, expected)


# -- rotate -----------------------------------------------------------------------------------------------


class Rows:
    """Random rows of x, of some heads, with a table of angles."""

    def __init__(self, rows, q_heads, kv_heads, dim, dtype, *, seed=0):
        self.rows, self.q_heads, self.kv_heads, self.dim, self.dtype = rows, q_heads, kv_heads, dim, dtype
        self.x = random(rows, (q_heads + 2 * kv_heads) * dim, seed=seed, dtype=dtype)
        angles = random(50, dim // 2, seed=seed + 1, scale=9.0)
        self.rotation = Rotation(angles.cos().to(dtype), angles.sin().to(dtype))
        self.positions = torch.randint(50, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)

    def buffers(self):
        """q, or None without query heads, and KVRows, or None without KV heads."""
        q = unwritten(self.rows, self.q_heads, self.dim, dtype=self.dtype)
        kv = KVRows(*(unwritten(self.rows, self.kv_heads, self.dim, dtype=self.dtype) for _ in range(2)))
        return q if self.q_heads else None, kv if self.kv_heads else None

    def rotated(self, kernels):
        q, kv = self.buffers()
        kernels.rotate(self.x, self.rotation, self.positions, q=q, kv=kv)
        return [*([] if q is None else [q]), *(kv or ())]

    def layout(self, format, block_tokens=6):
        spec = AttentionSpec(self.kv_heads, self.kv_heads, self.kv_heads, self.dim, self.dim, 1.0)
        return KVLayout.of(spec, layers=3, format=format)._replace(block_tokens=block_tokens)

    def stored(self, kernels, format, *, unused=0):
        """The whole memory after layer 1 of the rows was stored, the last ``unused`` ones not; and q."""
        layout = self.layout(format)
        last = self.rows - 1 - unused
        source = torch.arange(self.rows).clamp(max=last)
        # Blocks lie in any order, and each row has a slot of its own.
        base = (self.rows - source) * 2 // layout.block_tokens * layout.block_bytes
        slot = (self.rows - source) * 2 % layout.block_tokens
        blocks = 2 * self.rows // layout.block_tokens + 1
        memory = torch.full((blocks * layout.block_bytes,), 0x5A, dtype=torch.uint8, device=DEVICE)
        kv = KVSlots(memory, layout, 1, *(field.to(DEVICE) for field in (base, slot, source)))
        q = self.buffers()[0]
        kernels.rotate(self.x, self.rotation, self.positions, q=q, kv=kv)
        return memory, q, kv


FORMATS = {
    torch.float32: KVFormat.FLOAT32,
    torch.bfloat16: KVFormat.BFLOAT16,
    torch.float16: KVFormat.FLOAT16,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 9, 3, 64), (5, 4, 2, 128), (3, 2, 0, 80), (3, 0, 2, 20), (0, 2, 1, 16), (70, 1, 1, 2)]
)
def test_rotated_rows_are_those_of_pytorch(ops, shape, dtype):
    """Without query or KV heads too; many rows take another tile. Every bit is the same."""
    rows = Rows(*shape, dtype)
    for found, expected in zip(rows.rotated(ops), rows.rotated(reference), strict=True):
        assert torch.equal(found, expected)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 9),
    heads=st.tuples(st.integers(0, 3), st.integers(1, 3)),
    dim=st.sampled_from([2, 16, 20, 64, 66, 80, 128, 192, 256]),
    dtype=st.sampled_from(DTYPES),
    quantised=st.sampled_from([None, KVFormat.INT8, KVFormat.INT4]),
    unused=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_stored_rows_are_those_of_pytorch(ops, rows, heads, dim, dtype, quantised, unused, seed):
    """Every byte of the memory is the same: rows that are not used, and other layers, are not touched."""
    made = Rows(rows, *heads, dim, dtype, seed=seed)
    format = quantised or FORMATS[dtype]
    found, q, _ = made.stored(ops, format, unused=min(unused, rows - 1))
    expected, expected_q, _ = made.stored(reference, format, unused=min(unused, rows - 1))
    assert torch.equal(found, expected)
    if q is not None:
        assert torch.equal(q, expected_q)


@pytest.mark.parametrize("format", [KVFormat.INT8, KVFormat.INT4])
@pytest.mark.parametrize("kernels", ["reference", "ops"])
def test_stored_rows_lie_where_the_layout_says(request, kernels, format):
    """Quantised as ``formats`` does it."""
    kernels = reference if kernels == "reference" else request.getfixturevalue("ops")
    rows = Rows(4, 2, 3, 80, torch.float32)
    expected = [quantise(x, format) for x in rows.rotated(reference)[1:]]
    memory, _, kv = rows.stored(kernels, format)
    for row in range(4):
        block = memory[int(kv.base[row]) :][: kv.layout.block_bytes]
        stored = kv.layout.stored(block, 1)
        for side, (payload, scales) in zip((stored[:2], stored[2:]), expected, strict=True):
            assert torch.equal(side[0][:, kv.slot[row]], payload[row])
            assert torch.equal(side[1][:, kv.slot[row]], scales[row])


@pytest.mark.parametrize("format", [KVFormat.INT8, KVFormat.INT4])
@pytest.mark.parametrize("value", [0.0, 1e-42, float("inf"), float("nan"), 3e38])
def test_odd_values_are_quantised_as_pytorch_does(ops, value, format):
    """A group with an infinity or a NaN gets a NaN scale, and zeros."""
    rows = Rows(2, 0, 1, 128, torch.float32)
    rows.rotation = Rotation(torch.ones_like(rows.rotation.cos), torch.zeros_like(rows.rotation.sin))
    rows.x[0, 130] = value
    rows.x[1] = value if value < 1.0 else 1.0
    found, expected = (rows.stored(kernels, format)[0] for kernels in (ops, reference))
    assert torch.equal(found, expected)


def test_a_row_of_nan_that_is_not_used_changes_nothing(ops):
    rows = Rows(3, 0, 1, 64, torch.float32)
    rows.x[2] = torch.nan
    found, _, _ = rows.stored(ops, KVFormat.FLOAT32, unused=1)
    expected, _, _ = rows.stored(reference, KVFormat.FLOAT32, unused=1)
    assert torch.equal(found, expected) and not found.view(torch.float32).isnan().any()


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["reference", "ops"])
def test_wrong_arguments_are_refused(request, kernels):
    kernels = reference if kernels == "reference" else request.getfixturevalue("ops")
    h, weight = torch.zeros(2, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    with pytest.raises(ValueError, match=r"give \[R, hidden\]"):
        kernels.add_norm(h, h[:1], weight, 1e-5, out=h.clone())
    with pytest.raises(ValueError, match=r"give \[R, hidden\]"):
        kernels.add_norm(h, None, weight[:4], 1e-5, out=h.clone())
    with pytest.raises(ValueError, match=r"torch.float16 on \w+(:0)? beside torch.float32"):
        kernels.add_norm(h, None, weight, 1e-5, out=h.half())
    with pytest.raises(ValueError, match=r"give \[R, 2 n\] and \[R, n\]"):
        kernels.silu_multiply(h, out=h.clone())

    rows = Rows(2, 2, 1, 8, torch.float32)
    q, kv = rows.buffers()
    with pytest.raises(ValueError, match="not of 2 rows and heads of 8"):
        kernels.rotate(rows.x, rows.rotation, rows.positions, q=q)
    with pytest.raises(ValueError, match="not of 2 rows and heads of 8"):
        kernels.rotate(rows.x, rows.rotation, rows.positions[:1], q=q, kv=kv)
    with pytest.raises(ValueError, match="give equal heads"):
        kernels.rotate(rows.x, rows.rotation, rows.positions, q=q, kv=KVRows(q, kv.v))
    with pytest.raises(ValueError, match=r"rows of torch\.float32 for blocks in bfloat16"):
        rows.stored(kernels, KVFormat.BFLOAT16)
    _, q, slots = rows.stored(kernels, KVFormat.FLOAT32)
    for wrong, message in (
        (slots._replace(layer=3), "layer 3 of 3"),
        (slots._replace(base=slots.base[:1]), "for 2 rows"),
        (slots._replace(layout=slots.layout._replace(k_dim=16)), "equal heads of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.rotate(rows.x, rows.rotation, rows.positions, q=q, kv=wrong)


def test_the_gpu_refuses_what_it_has_no_kernel_for(ops):
    h = torch.zeros(2, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"torch\.float64: not float32"):
        ops.add_norm(h, None, h[0], 1e-5, out=h.clone())
    wide = torch.zeros(1, 40_000, device=DEVICE)
    with pytest.raises(ValueError, match="rows of 40000 elements"):
        ops.add_norm(wide, None, wide[0], 1e-5, out=wide.clone())
    with pytest.raises(ValueError, match="rows must be contiguous"):
        ops.silu_multiply(torch.zeros(4, 2, device=DEVICE).T, out=torch.zeros(2, 2, device=DEVICE))
