"""Packed weights: gguf's values to the bit, and products that equal those of the unpacked matrix, for every
instruction set."""

import gguf
import numpy as np
import pytest
import torch

cpu = pytest.importorskip("farshore.kernels.cpu.attention", reason="the native kernels are not built here")

from farshore.kernels.cpu import dense  # noqa: E402
from farshore.kernels.cpu.packed import Blocks, Packed, Storage  # noqa: E402

KINDS = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}
"""ggml's type -> where a block has its float16 scales."""


@pytest.fixture(scope="module", params=cpu.instruction_sets, autouse=True)
def instruction_set(request):
    cpu._native.use(request.param)
    yield request.param
    cpu._native.use(cpu.instruction_sets[0])


def block_weights(kind: str) -> int:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]


def random_rows(kind: str, shape: tuple[int, int], *, extreme: bool) -> np.ndarray:
    """u8[out, bytes] of random blocks. ``extreme``: every finite scale is equally likely, denormals and the
    greatest one too."""
    out, inner = shape
    random = np.random.default_rng([out, inner])
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (out, inner // weights, size), dtype=np.uint8)
    for at in KINDS[kind]:
        scales = random.normal(0, 1e-3, blocks.shape[:2]).astype(np.float16)
        if extreme:
            # Q4_0 stands for a minimum of -8 d, which must be finite.
            most = 0x7000 if kind == "Q4_0" else 0x7C00
            scales = random.integers(0, most, blocks.shape[:2]).astype(np.uint16)
            scales[0, 0] = most - 1
            scales = (scales | random.integers(0, 2, scales.shape).astype(np.uint16) << 15).view(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(out, -1)


def packed_and_values(
    kind: str, shape: tuple[int, int], *, extreme: bool = False
) -> tuple[Packed, torch.Tensor]:
    """(a packed matrix, its values by gguf in float32)."""
    rows = random_rows(kind, shape, extreme=extreme)
    values = torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[kind]))
    return Blocks.of(kind, torch.from_numpy(rows)).pack(threads=2), values


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 18])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_ggufs_bits(kind, blocks):
    shape = (67, blocks * block_weights(kind))
    rows = random_rows(kind, shape, extreme=True)
    packed, values = packed_and_values(kind, shape, extreme=True)
    assert torch.equal(Blocks.of(kind, torch.from_numpy(rows)).dequantise(threads=2), values)
    packed.check(shape)
    assert torch.equal(packed.dense(), values.bfloat16())
    ids = torch.tensor([66, 0, 5, 5])
    assert torch.equal(packed.gather(ids), values[ids].bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_values(kind):
    """To the bit, of few rows and many; so in PyTorch, up to the order of sums."""
    shape = (130, 3 * max(block_weights(kind), 64))
    packed, _ = packed_and_values(kind, shape)
    values = packed.dense()
    norm, bias = torch.ones(shape[1]).bfloat16(), torch.ones(shape[0]).bfloat16()
    heads = [
        dense.lm_head(norm=norm, vocabulary=dense.Linear(matrix, bias), eps=1e-5, threads=2)
        for matrix in (packed, values)
    ]
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 32, 33, 300):
        h = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
        ours, plain = (dense.logits(head, h) for head in heads)
        assert torch.equal(ours, plain), rows
        expected = torch.nn.functional.linear(h, values, bias)
        torch.testing.assert_close(packed.linear(h, bias), expected, atol=2**-6, rtol=2**-6)


def test_pytorch_multiplies_a_large_matrix_in_parts(monkeypatch):
    monkeypatch.setattr("farshore.kernels.cpu.packed.UNPACKED_BYTES", 2 * 256 * 30)
    packed, _ = packed_and_values("Q4_K", (67, 256))
    x = torch.randn(5, 256).bfloat16()
    expected = torch.nn.functional.linear(x, packed.dense())
    torch.testing.assert_close(packed.linear(x, None), expected, atol=2**-6, rtol=2**-6)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_adds_few_bytes(kind):
    rows = random_rows(kind, (64, 1024), extreme=False)
    packed = Blocks.of(kind, torch.from_numpy(rows)).pack(threads=1)
    # Q4_0 has no minima in the file.
    assert packed.rows.nbytes <= rows.nbytes * (1.12 if kind == "Q4_0" else 1.03)


def test_what_cannot_be_packed():
    assert Blocks.of("Q5_K", torch.zeros(4, 176, dtype=torch.uint8)) is None
    rows = random_rows("Q4_0", (1, 32), extreme=False)
    rows[0, :2] = np.array([10000], np.float16).view(np.uint8)  # -8 d is infinite
    assert Blocks.of("Q4_0", torch.from_numpy(rows)) is None


def test_packed_rows_of_another_matrix_are_refused():
    packed = Packed(Storage.Q8, (4, 96), torch.zeros(8 * 3 * 34, dtype=torch.uint8))
    packed.check((4, 96))
    for shape in ((5, 96), (4, 128), (4, 90)):
        with pytest.raises(ValueError, match="packed rows"):
            packed.check(shape)
    norm = torch.ones(96)
    with pytest.raises(ValueError, match="packed weights beside"):
        dense.lm_head(norm=norm, vocabulary=dense.Linear(packed), eps=1e-5, threads=1)
    for ids in ([4], [-1]):
        with pytest.raises(IndexError, match="of 4"):
            packed.gather(torch.tensor(ids))


def test_native_functions_check_sizes():
    native = cpu._native
    rows, ids = torch.zeros(8 * 3 * 34, dtype=torch.uint8), torch.tensor([0])
    values = torch.empty(1, 96, dtype=torch.bfloat16)
    native.dense_gather_packed(2, 4, 96, rows, ids, values, 1)
    for change in ({0: 0}, {0: 5}, {1: 9}, {2: 90}, {2: 128}, {3: rows[1:]}, {5: values[:, :95]}):
        arguments = [change.get(i, x) for i, x in enumerate((2, 4, 96, rows, ids, values, 1))]
        with pytest.raises(ValueError, match=r"dense_gather_packed|values"):
            native.dense_gather_packed(*arguments)
    blocks = torch.zeros(4, 3, 34, dtype=torch.uint8)
    with pytest.raises(ValueError, match="packed"):
        native.dense_pack(2, blocks, rows[1:], 1)
    with pytest.raises(ValueError, match="blocks"):
        native.dense_pack(1, blocks, rows, 1)
    with pytest.raises(ValueError, match="values"):
        native.dense_dequantise(2, blocks, torch.empty(4, 95), 1)
