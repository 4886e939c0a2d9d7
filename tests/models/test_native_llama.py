"""The native dense slices compared with PyTorch's, for every instruction set, with plain and packed
weights."""

from dataclasses import replace

import pytest
import torch

from farshore.models.config.model import ModelConfig
from farshore.models.config.rope import RopeConfig
from farshore.models.llama import LayerWeights, Llama, LlamaWeights
from farshore.models.weights.names import expected_shapes

cpu = pytest.importorskip("farshore.kernels.cpu.attention", reason="the native kernels are not built here")

from farshore.kernels.cpu import dense  # noqa: E402
from farshore.kernels.cpu.packed import Blocks  # noqa: E402
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
# Q4_K and Q6_K have blocks of 256.
WIDE = replace(CONFIG, hidden=256, q_heads=16, kv_heads=4, intermediate=768)


@pytest.fixture(scope="module", params=cpu.instruction_sets, autouse=True)
def instruction_set(request):
    cpu._native.use(request.param)
    yield request.param
    cpu._native.use(cpu.instruction_sets[0])


def packed(kind: str, shape: tuple[int, int], generator: torch.Generator):
    """A packed matrix of random blocks with weights of about 1 / sqrt(in)."""
    size, at = {"Q4_1": (20, 0), "Q8_0": (34, 0), "Q4_K": (144, 0), "Q6_K": (210, 208)}[kind]
    weights = 32 if size < 100 else 256
    blocks = torch.randint(256, (shape[0], shape[1] // weights, size), generator=generator, dtype=torch.uint8)
    # The integers of a block and its scales multiply to numbers of about this size.
    spread = {"Q4_1": 5.0, "Q8_0": 74.0, "Q4_K": 150.0, "Q6_K": 1400.0}[kind]
    d = torch.tensor([shape[1] ** -0.5 / spread], dtype=torch.float16)
    minimum = -7.5 * d if kind == "Q4_1" else 7.5 * d
    blocks[..., at : at + 2] = d.view(torch.uint8)
    if kind in ("Q4_1", "Q4_K"):
        blocks[..., 2:4] = minimum.view(torch.uint8)
    return Blocks.of(kind, blocks.flatten(1)).pack(threads=2)


def weights(dtype: torch.dtype, *, kind: str = "Q8_0", biased: bool = True, config: ModelConfig = CONFIG):
    """LlamaWeights with packed matrices if ``dtype`` is bfloat16."""
    generator = torch.Generator().manual_seed(1)

    def vector(n: int) -> torch.Tensor:
        return (1 + 0.1 * torch.randn(n, generator=generator)).to(dtype)

    def matrix(shape: tuple[int, int]):
        made = packed(kind, shape, generator)
        return made if dtype == torch.bfloat16 else made.dense().to(dtype)

    values = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 2:
            values[name] = matrix(shape)
            values[f"{name}_bias"] = vector(shape[0]) if biased else None
        else:
            values[name] = vector(shape[0])
    layer = LayerWeights(**{field: values.get(f"0.{field}") for field in LayerWeights._fields})
    return LlamaWeights(values["embed"], (layer,), values["norm"], values["head"])


def slices(model: Llama, rows: int, seed: int = 0):
    """The results of all slices for random inputs. Asserts that combined calls equal the single ones."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, model.config.hidden, generator=generator).to(model.dtype)
    o = torch.randn(rows, model.config.q_heads, 16, generator=generator).to(model.dtype)
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
    given = weights(dtype, biased=biased).dense()
    ours, theirs = NativeLlama(CONFIG, given, threads=2), Llama(CONFIG, given)
    for rows in ROWS:
        assert_close(slices(ours, rows), slices(theirs, rows), tolerance)


def assert_close(given, expected, tolerance: float) -> None:
    for name, value in given.items():
        torch.testing.assert_close(
            value, expected[name], atol=2 * tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_packed_weights_change_no_bit(kind):
    config = WIDE if kind.endswith("K") else CONFIG
    given = weights(torch.bfloat16, kind=kind, config=config)
    model, plain = (NativeLlama(config, w, threads=2) for w in (given, given.dense()))
    for rows in ROWS:
        expected = slices(plain, rows)
        for name, value in slices(model, rows).items():
            assert torch.equal(value, expected[name]), (rows, name)
    ids = torch.tensor([3, 1099, 3])
    assert torch.equal(model.embed(ids), plain.embed(ids))


def test_pytorch_computes_with_packed_weights():
    """As for many rows on a CPU with a matrix unit."""
    given = weights(torch.bfloat16, kind="Q4_K", config=WIDE)
    model, plain = Llama(WIDE, given), Llama(WIDE, given.dense())
    assert_close(slices(model, 40), slices(plain, 40), 2**-6)
    ids = torch.tensor([3, 1099, 3])
    assert torch.equal(model.embed(ids), plain.embed(ids))


def test_a_row_does_not_depend_on_the_others():
    """For up to FEW_ROWS rows."""
    model = NativeLlama(CONFIG, weights(torch.bfloat16, kind="Q4_1"), threads=2)
    h = torch.randn(dense.FEW_ROWS, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    together = model.logits(h)
    for rows in (1, 2, 3, 5, 8, 9, 12, 13, 31):
        assert torch.equal(model.logits(h[:rows]), together[:rows])
