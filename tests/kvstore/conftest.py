"""Stores and layouts with small, odd shapes: 5-token blocks, 3 K heads and 1 V head per group."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import KVLayout, Segments
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import SpanKey
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.layout import blocks
from farshore.kvstore.store.store import LocalStore

Tokens = Callable[[KVLayout, int], tuple[Tensor, Tensor]]
Gather = Callable[[Tensor, KVLayout, Segments, int], tuple[Tensor, Tensor, Tensor]]


@pytest.fixture
def layout() -> KVLayout:
    return KVLayout(
        layers=3,
        groups=2,
        k_heads_per_group=3,
        v_heads_per_group=1,
        k_dim=8,
        v_dim=6,
        format=KVFormat.BFLOAT16,
        block_tokens=5,
    )


@pytest.fixture(params=["native", "pytorch"])
def copies(request, monkeypatch) -> str:
    """Runs a test with the native copies and with PyTorch's, which are used if no compiler was present."""
    if request.param == "pytorch":
        monkeypatch.setattr(blocks, "native", None)
    elif blocks.native is None:
        pytest.skip("no native module was built")
    return request.param


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(64 * 4096)
    yield arena
    arena.check_integrity()


@pytest.fixture
def store(arena: Arena) -> Iterator[LocalStore]:
    store = LocalStore(worker=WorkerId("w1"), arena=arena)
    yield store
    store.check_integrity()


@pytest.fixture
def tokens() -> Tokens:
    """Makes random k [k_heads, n, k_dim] and v [v_heads, n, v_dim] of a layout."""
    generator = torch.Generator().manual_seed(0)

    def make(layout: KVLayout, n: int) -> tuple[Tensor, Tensor]:
        k = torch.randn(layout.k_heads, n, layout.k_dim, generator=generator)
        v = torch.randn(layout.v_heads, n, layout.v_dim, generator=generator)
        return k.to(layout.format.dtype), v.to(layout.format.dtype)

    return make


@pytest.fixture
def sealed(tokens):
    """sealed(store, n, layout, ...) -> a span with n random sealed tokens."""

    def make(store, n, layout, *, sequence="s", first=0, epoch=1, capacity_tokens=None) -> SpanId:
        epoch = Epoch(epoch)
        floats = layout._replace(format=KVFormat.FLOAT32) if layout.format.quantised else layout
        key = SpanKey(
            sequence=SequenceId(sequence), layer_class=0, first=first, group0=0, group1=layout.groups
        )
        span = store.create(key, capacity_tokens=capacity_tokens or n, layout=layout, epoch=epoch)
        for layer in range(layout.layers):
            store.write(span, layer, 0, *tokens(floats, n), sequence=key.sequence, epoch=epoch)
        store.seal(span, n, sequence=key.sequence, epoch=epoch)
        return span

    return make


@pytest.fixture
def content():
    """content(store, span, first, last, sequence=...) -> the tokens as stored: K and V of each layer."""

    def read(store, span, first, last, *, sequence="s") -> list[Tensor]:
        holder = SequenceId(sequence)
        return [
            tensor
            for layer in range(store.look_up(span, holder=holder).layout.layers)
            for tensor in store.read(span, layer, first, last, sequence=holder, dtype=torch.uint8)
        ]

    return read


@pytest.fixture(params=["odd bfloat16", "int8", "int4", "float32, V in K"])
def any_layout(request, layout) -> KVLayout:
    """Layouts of several formats. The scales of the quantised ones are at odd addresses if tokens are odd."""
    return {
        "odd bfloat16": layout,
        "int8": layout._replace(format=KVFormat.INT8, k_dim=65, v_dim=7, block_tokens=6),
        "int4": layout._replace(format=KVFormat.INT4, k_dim=70, v_dim=6, block_tokens=6),
        "float32, V in K": layout._replace(format=KVFormat.FLOAT32, v_heads_per_group=3, v_in_k=True),
    }[request.param]


@pytest.fixture
def gather() -> Gather:
    """gather(memory, layout, segments, layer) -> (k, v, positions), read token by token."""

    def read(
        memory: Tensor, layout: KVLayout, segments: Segments, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ks, vs, positions = [], [], []
        for base, stride, first, count, position, *_ in zip(
            *(field.tolist() for field in segments), strict=True
        ):
            for i in range(count):
                block, slot = divmod(first + i, layout.block_tokens)
                start = base + block * stride
                k, v = layout.views(memory[start : start + layout.block_bytes], layer)
                ks.append(k[:, slot])
                vs.append(v[:, slot])
                positions.append(position + i)
        return torch.stack(ks, 1), torch.stack(vs, 1), torch.tensor(positions)

    return read
