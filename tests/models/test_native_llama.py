"""The native dense slices compared with PyTorch's, for every instruction set, with plain and packed
weights."""

import gguf
import numpy as np
import pytest
import torch

from farshore.models.config.model import ModelConfig
from farshore.models.config.rope import RopeConfig
from farshore.models.llama import LayerWeights, Llama, LlamaWeights

cpu = pytest.importorskip("farshore.kernels.cpu.attention", reason="the native kernels are not built here")

from farshore.kernels.cpu import dense  # noqa: E402
from farshore.kernels.cpu.packed import Blocks, Packed, Storage  # noqa: E402
from farshore.models.native_llama import NativeLlama  # noqa: E402

ROWS = [1, 2, 3, 4, 7, 8, 9, 12, 13, 32, 33, 300]
"""Few rows and many, multiples of a kernel's block of rows and others."""
# 3 and 23 blocks of 32 elements: odd numbers, so that the last pair is padded, and more than one panel block.
CONFIG = ModelConfig(
    name="test",
    layers=1,
    hidden=96,
    q_heads=6,
    kv_heads=2,
    head_dim=16,
    intermediate=736,
    vocab=1100,
    max_positions=64,
    rms_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
)
SHAPES = {"q": (96, 96), "k": (32, 96), "v": (32, 96), "o": (96, 96)}
SHAPES |= {"gate": (736, 96), "up": (736, 96), "down": (96, 736)}


@pytest.fixture(scope="module", params=cpu.instruction_sets, autouse=True)
def instruction_set(request):
    cpu._native.use(request.param)
    yield request.param
    cpu._native.use(cpu.instruction_sets[0])


def quantised(kind: str, shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, Blocks]:
    """Random weights that ``kind`` can represent: (their values by gguf, their blocks)."""
    values = np.random.default_rng(seed).normal(0, shape[1] ** -0.5, shape).astype(np.float32)
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(values), Blocks.of(kind, torch.from_numpy(blocks))


def weights(dtype: torch.dtype, *, kind: str = "Q8_0", biased: bool = True):
    """(LlamaWeights, the blocks of its matrices by name)."""
    generator = torch.Generator().manual_seed(1)

    def vector(n: int) -> torch.Tensor:
        return (1 + 0.1 * torch.randn(n, generator=generator)).to(dtype)

    values, blocks = {}, {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        matrix, blocks[f"0.{name}"] = quantised(kind, shape, seed)
        values[name] = matrix.to(dtype)
        values[f"{name}_bias"] = vector(shape[0]) if biased else None
    embed, blocks["head"] = quantised("Q8_0", (CONFIG.vocab, CONFIG.hidden), 99)
    layer = LayerWeights(attention_norm=vector(96), mlp_norm=vector(96), **values)
    return LlamaWeights(embed.to(dtype), (layer,), vector(96), embed.to(dtype)), blocks


def slices(model: Llama, rows: int, seed: int = 0):
    """The results of all slices for random inputs. Asserts that combined calls equal the single ones."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, 96, generator=generator).to(model.dtype)
    o = torch.randn(rows, 6, 16, generator=generator).to(model.dtype)
    positions = torch.randint(64, (rows,), generator=generator)
    normed = model.attention_input(0, h)
    query, (k, v) = model.query(0, normed, positions), model.key_value(0, normed, positions)
    for combined, single in zip(model.project(0, h, positions), (query, k, v), strict=True):
        assert torch.equal(combined, single)
    out = torch.empty_like(query), torch.empty_like(k), torch.empty_like(v)
    model.project(0, h, positions, out=out)
    for combined, single in zip(out, (query, k, v), strict=True):
        assert torch.equal(combined, single)
    next_h = model.finish(0, h, o)
    in_place = h.clone()
    assert model.finish(0, in_place, o, out=in_place) is in_place and torch.equal(in_place, next_h)
    buffers = model.layer_buffers(rows)
    buffers.positions.copy_(positions)
    buffers.enter(h)
    buffers.project(0)
    assert all(torch.equal(*pair) for pair in zip((buffers.q, buffers.k, buffers.v), out, strict=True))
    for tensor in (buffers.q, buffers.k, buffers.v):
        tensor.zero_()
    buffers.query(0)
    buffers.key_value(0)
    assert all(torch.equal(*pair) for pair in zip((buffers.q, buffers.k, buffers.v), out, strict=True))
    buffers.o.copy_(o)
    buffers.finish(0)
    assert torch.equal(buffers.h, next_h)
    return {
        "normed": normed,
        "q": query,
        "k": k,
        "v": v,
        "h": next_h,
        "logits": model.logits(h),
    }


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)], ids=["float32", "bfloat16"]
)
def test_every_slice_equals_pytorch(dtype, tolerance, biased):
    """In bfloat16 up to one unit in the last place, since sums in another order may round differently."""
    given, _ = weights(dtype, biased=biased)
    ours, theirs = NativeLlama(CONFIG, given, blocks={}, threads=2), Llama(CONFIG, given)
    for rows in ROWS:
        expected = slices(theirs, rows)
        for name, value in slices(ours, rows).items():
            close = torch.testing.assert_close
            close(
                value, expected[name], atol=2 * tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_packed_weights_change_no_bit(kind):
    given, blocks = weights(torch.bfloat16, kind=kind)
    packed = NativeLlama(CONFIG, given, blocks=blocks, threads=2)
    plain = NativeLlama(CONFIG, given, blocks={}, threads=2)
    for rows in ROWS:
        expected = slices(plain, rows)
        for name, value in slices(packed, rows).items():
            assert torch.equal(value, expected[name]), (rows, name)


def test_a_row_does_not_depend_on_the_others():
    """For up to FEW_ROWS rows."""
    given, blocks = weights(torch.bfloat16, kind="Q4_1")
    model = NativeLlama(CONFIG, given, blocks=blocks, threads=2)
    h = torch.randn(dense.FEW_ROWS, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    together = model.logits(h)
    for rows in (1, 2, 3, 5, 8, 9, 12, 13, 31):
        assert torch.equal(model.logits(h[:rows]), together[:rows])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_dequantised_as_gguf_does(kind):
    values, blocks = quantised(kind, (70, 96), 5)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(blocks.unpack(dtype, threads=2), values.to(dtype))


def test_blocks_of_an_unsupported_kind_are_none():
    assert Blocks.of("Q6_K", torch.zeros(4, 210, dtype=torch.uint8)) is None


def test_packed_rows_of_another_matrix_are_refused():
    packed = Packed(Storage.EIGHT_BITS, torch.zeros(4, 3 * 34, dtype=torch.uint8))
    packed.check((4, 96))
    for shape in ((5, 96), (4, 128), (4, 90)):
        with pytest.raises(ValueError, match="packed rows"):
            packed.check(shape)
