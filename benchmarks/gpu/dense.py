"""The dense kernels of a decoder layer: their results against PyTorch's on the device, and their times.

Called by ``benchmark``. A step of an 8B model launches four of them a layer, so at few rows their time is
what counts, and at a chunk of prefill the bytes that they move. It must not know models.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import NamedTuple, cast

import torch
from torch import Tensor

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.gpu.setting import Setting
from farshore.benchmarks.report import Bar, Result
from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.dense import reference
from farshore.kernels.dense.base import DenseKernels, KVSlots, Rotation
from farshore.kernels.formats import KVFormat

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""A bit of the dtype, since a last bit of float32 may round the other way."""
EPS = 1e-5
REPEATED = 64
"""Launches in one graph: a single one is shorter than the clock's resolution."""


class Shape(NamedTuple):
    hidden: int
    inner: int
    q_heads: int
    kv_heads: int
    head_dim: int


ODD = Shape(576, 1000, 9, 3, 80)


class Rows:
    """Random input of all dense kernels for some rows, and their outputs."""

    def __init__(
        self, setting: Setting, shape: Shape, rows: int, dtype: torch.dtype, format: KVFormat
    ) -> None:
        generator = torch.Generator(device="cpu").manual_seed(rows)

        def random(*size: int) -> Tensor:
            made = torch.randn(*size, generator=generator, device="cpu")
            return made.to(setting.device, dtype)

        self.h, self.x = random(rows, shape.hidden), random(rows, shape.hidden)
        self.weight, self.normed = random(shape.hidden), torch.empty_like(self.h)
        self.gate_up = random(rows, 2 * shape.inner)
        self.inner = self.gate_up.new_empty(rows, shape.inner)
        heads, dim = shape.q_heads + 2 * shape.kv_heads, shape.head_dim
        self.qkv = random(rows, heads * dim)
        self.q = self.h.new_empty(rows, shape.q_heads, dim)
        angles = random(rows + 1, dim // 2)
        self.rotation = Rotation(angles.cos(), angles.sin())
        self.positions = torch.arange(rows, device=setting.device)
        spec = AttentionSpec(shape.q_heads, shape.kv_heads, shape.kv_heads, dim, dim, 1.0)
        layout = KVLayout.of(spec, layers=1, format=format)
        blocks = -(-rows // layout.block_tokens)
        self.memory = torch.zeros(blocks * layout.block_bytes, dtype=torch.uint8, device=setting.device)
        base = self.positions // layout.block_tokens * layout.block_bytes
        slot = self.positions % layout.block_tokens
        self.slots = KVSlots(self.memory, layout, 0, base, slot, self.positions)

    def calls(self, kernels: DenseKernels) -> Mapping[str, Callable[[], None]]:
        return {
            "add_norm": lambda: kernels.add_norm(self.h, self.x, self.weight, EPS, out=self.normed),
            "rotate": lambda: kernels.rotate(
                self.qkv, self.rotation, self.positions, q=self.q, kv=self.slots
            ),
            "silu_multiply": lambda: kernels.silu_multiply(self.gate_up, out=self.inner),
        }

    def results(self, kernels: DenseKernels) -> Mapping[str, tuple[Tensor, ...]]:
        for call in self.calls(kernels).values():
            call()
        stored = self.slots.layout.format.dtype
        kv = self.memory if self.slots.layout.format.quantised else self.memory.view(stored)
        return {
            "add_norm": (self.h, self.normed),
            "rotate": (self.q, kv),
            "silu_multiply": (self.inner,),
        }

    def moved_bytes(self) -> Mapping[str, int]:
        """What each call must read and write."""
        row_bytes = self.slots.layout.token_bytes
        return {
            "add_norm": 4 * self.h.nbytes,
            "rotate": self.qkv.nbytes + self.q.nbytes + len(self.h) * row_bytes,
            "silu_multiply": self.gate_up.nbytes + self.inner.nbytes,
        }


def ours() -> DenseKernels:
    return cast(DenseKernels, import_module("farshore.kernels.gpu.dense.ops"))


@torch.inference_mode()
def correctness(setting: Setting) -> Measured:
    """One bar for each kernel, dtype and format of KV: the greatest distance to PyTorch's results."""
    bars = []
    for dtype, format in _precisions():
        worst = dict.fromkeys(("add_norm", "rotate", "silu_multiply"), 0.0)
        for rows in (1, 3, 70)[:: setting.sizes.every_case]:
            made = [Rows(setting, ODD, rows, dtype, format) for _ in range(2)]
            found, expected = made[0].results(ours()), made[1].results(reference)
            for name in worst:
                errors = (_distance(*both) for both in zip(found[name], expected[name], strict=True))
                worst[name] = max(worst[name], *errors)
        bars += [
            Bar.at_most(
                f"{name}, {str(dtype).removeprefix('torch.')}, KV {format.value}",
                value / TOLERANCE[dtype],
                1.0,
                "of the tolerance",
                "worst relative distance to PyTorch",
            )
            for name, value in worst.items()
        ]
    return [], bars


def _precisions() -> Iterator[tuple[torch.dtype, KVFormat]]:
    for dtype in TOLERANCE:
        yield dtype, KVFormat.of(dtype)
    yield torch.bfloat16, KVFormat.INT8
    yield torch.bfloat16, KVFormat.INT4


def _distance(found: Tensor, expected: Tensor) -> float:
    """The greatest distance of two elements, over the larger of 1 and the greatest of all; infinite if one is
    no number. Bytes must be equal."""
    if found.dtype == torch.uint8:
        return 0.0 if torch.equal(found, expected) else float("inf")
    if found.isnan().any():
        return float("inf")
    distance = (found.double() - expected.double()).abs()
    return float((distance / expected.double().abs().clamp(min=1.0)).max())


@torch.inference_mode()
def speed(setting: Setting) -> Measured:
    """Beside PyTorch's calls for the same, in graphs: for a batch's rows and for a chunk of prefill."""
    results = []
    for rows in (*setting.sizes.batches, setting.sizes.dense_rows):
        made = Rows(setting, _model_shape(setting), rows, torch.bfloat16, KVFormat.BFLOAT16)
        pytorch = made.calls(reference)
        for name, call in made.calls(ours()).items():
            timed = setting.timed(
                {
                    "ours": setting.captured(_repeated(setting, call)),
                    "pytorch": setting.captured(_repeated(setting, pytorch[name])),
                }
            )
            seconds = timed["ours"].median_s / _times(setting)
            gbps = made.moved_bytes()[name] / seconds / 1e9
            figures = {
                "us": seconds * 1e6,
                "gbps": gbps,
                "percent_of_copy": 100 * gbps / setting.copy_gbps,
                "times_faster_than_pytorch": timed["pytorch"].over(timed["ours"]),
            }
            results.append(Result(f"{name} of {rows} rows of the random model", timed["ours"], figures))
    return results, []


def _model_shape(setting: Setting) -> Shape:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    hidden, inner, q_heads, kv_heads = (setting.sizes.model[name] for name in names)
    return Shape(hidden, inner, q_heads, kv_heads, hidden // q_heads)


def _times(setting: Setting) -> int:
    return REPEATED if setting.on_gpu else 1


def _repeated(setting: Setting, call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(_times(setting)):
            call()

    return run
