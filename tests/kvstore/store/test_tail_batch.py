"""TailBatch: one call per layer stores and refuses the same as an append to each tail."""

import pytest
import torch

from farshore.errors import Full, InvalidRequest
from farshore.kernels.dense import reference as dense
from farshore.kernels.dense.base import KVSlots, Rotation
from farshore.kernels.formats import KVFormat
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.tail import Tail, TailBatch

pytestmark = pytest.mark.usefixtures("copies")

FORMATS = [format for format in KVFormat]


def rows_of(layout, rows, *, dtype=torch.float32, seed=0):
    """k [R, k_heads, k_dim], v [R, v_heads, v_dim]."""
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype if layout.format.quantised else layout.format.dtype
    k = torch.randn(rows, layout.k_heads, layout.k_dim, generator=generator)
    v = torch.randn(rows, layout.v_heads, layout.v_dim, generator=generator)
    return k.to(dtype), v.to(dtype)


def grown(arena, layout, *, start, tokens):
    """A tail with ``tokens`` random tokens from position ``start`` on."""
    tail = Tail(arena=arena, layout=layout, start=start)
    k, v = rows_of(layout, tokens, seed=start)
    for layer in range(layout.layers):
        tail.append(layer, start, k.transpose(0, 1), v.transpose(0, 1))
    tail.advance(start + tokens)
    return tail


def as_stored(tail):
    return tail.read_layers(tail.start, tail.end, dtype=torch.uint8)


def by_slots(arena, layout, batch):
    """How a device's engine writes a batch: the same as ``batch.append``. Two rows are not used."""
    bases, slots = torch.tensor(batch.slots()).T
    last = len(bases) - 1
    source = torch.tensor([*range(len(bases)), last, last])
    bases, slots = bases[source], slots[source]

    def append(layer, k, v):
        batch.mark(range(layer, layer + 1))
        k, v = (torch.cat([x, torch.full_like(x[:2], torch.nan)]) for x in (k, v))
        unmoved = torch.zeros(1, layout.k_dim // 2, dtype=k.dtype)
        dense.rotate(
            torch.cat([k.flatten(1), v.flatten(1)], dim=1),
            Rotation(unmoved + 1, unmoved),
            torch.zeros(len(k), dtype=torch.int64),
            kv=KVSlots(arena.memory, layout, layer, bases, slots, source),
        )

    return append


@pytest.mark.parametrize("appends", ["batch", "slots"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("format", FORMATS)
def test_a_batch_stores_what_single_appends_store(layout, format, dtype, appends):
    layout = layout._replace(format=format, block_tokens=6)
    if appends == "slots":  # A decoder's K and V have equal heads.
        layout = layout._replace(v_heads_per_group=layout.k_heads_per_group, v_dim=layout.k_dim)
    arena = Arena(1 << 20)
    # Five rows: the second tail gets three and the others one each. Blocks end inside and between rows.
    sizes, counts = [(0, 6), (3, 2), (7, 4)], [1, 3, 1]
    batched, single = ([grown(arena, layout, start=s, tokens=n) for s, n in sizes] for _ in range(2))
    tails = [tail for tail, count in zip(batched, counts, strict=True) for _ in range(count)]
    positions = [tail.end + i for tail, count in zip(batched, counts, strict=True) for i in range(count)]
    batch = TailBatch(tails, positions)
    append = batch.append if appends == "batch" else by_slots(arena, layout, batch)
    for layer in range(layout.layers):
        k, v = rows_of(layout, 5, dtype=dtype, seed=layer)
        append(layer, k.transpose(1, 2).contiguous().transpose(1, 2), v)  # any strides
        row = 0
        for tail, count in zip(single, counts, strict=True):
            rows = slice(row, row := row + count)
            tail.append(layer, tail.end, k[rows].transpose(0, 1), v[rows].transpose(0, 1))
    for tail, expected, count in zip(batched, single, counts, strict=True):
        tail.advance(tail.end + count)
        expected.advance(expected.end + count)
        assert all(torch.equal(a, b) for a, b in zip(as_stored(tail), as_stored(expected), strict=True))


def test_a_batch_reserves_for_all_or_for_none(layout):
    arena = Arena(3 * 4096)
    tails = [Tail(arena=arena, layout=layout, start=start) for start in (0, 5, 9)]
    with pytest.raises(Full):
        TailBatch(tails, [0, 5, 10])  # the last one needs two blocks
    assert [tail.bytes for tail in tails] == [0, 0, 0]
    batch = TailBatch(tails, [0, 5, 9])
    assert arena.free_bytes == 0
    TailBatch(tails, [0, 5, 9])  # as when a step runs again
    k, v = rows_of(layout, 3)
    batch.append(0, k, v)
    assert [tail.segments(tail.end + 1).count.tolist() for tail in tails] == [[1], [1], [1]]
    assert [tail.end for tail in tails] == [0, 5, 9]


def test_no_tail_advances_over_tokens_that_a_layer_lacks(arena, layout):
    tails = [grown(arena, layout, start=start, tokens=2) for start in (0, 4)]
    batch = TailBatch(tails, [2, 6])
    k, v = rows_of(layout, 2)
    for layer in (0, 2):
        batch.append(layer, k, v)
    with pytest.raises(InvalidRequest, match="written to 2"):
        tails[0].advance(3)
    batch.append(1, k, v)
    batch.append(1, k * 2, v)  # repeated
    for tail in tails:
        tail.advance(tail.end + 1)
    assert torch.equal(tails[1].read(1, 6, 7)[0].squeeze(1), k[1] * 2)


def test_a_refused_layer_writes_nothing_to_any_tail(arena, layout):
    first, second = (grown(arena, layout, start=start, tokens=2) for start in (0, 4))
    k, v = rows_of(layout, 2)
    batch = TailBatch([first, second], [2, 7])  # the second leaves a hole at 6
    before = arena.memory.clone()
    with pytest.raises(InvalidRequest, match="position 7"):
        batch.append(0, k, v)
    batch = TailBatch([first, second], [2, 6])
    second.advance(6)
    second.reserve(12)
    second.truncate(6)
    with pytest.raises(InvalidRequest, match="truncated"):
        batch.append(0, k, v)
    batch = TailBatch([first, second], [2, 6])
    for bad in [(3, k, v), (-1, k, v), (0, k[:1], v[:1]), (0, k.double(), v), (0, v, k), (0, k[:, :, 0], v)]:
        with pytest.raises(InvalidRequest):
            batch.append(*bad)
    assert torch.equal(arena.memory, before)
    for layer in range(layout.layers):
        batch.append(layer, k, v)
    second.advance(7)
    with pytest.raises(InvalidRequest, match="complete below"):
        batch.append(0, k, v)
    second.release_below(7)
    first.advance(3)


def test_rows_that_make_no_batch(arena, layout):
    first, second = (grown(arena, layout, start=start, tokens=2) for start in (0, 4))
    half = Tail(arena=arena, layout=layout.of_groups(1), start=0)
    elsewhere = Tail(arena=Arena(4096), layout=layout, start=0)
    for tails, positions in [
        ([], []),
        ([first], [2, 3]),
        ([first, second, first], [2, 6, 3]),
        ([first, first], [2, 4]),
        ([first, first], [2, 2]),
        ([first], [1]),
        ([first, half], [2, 0]),
        ([first, elsewhere], [2, 0]),
    ]:
        with pytest.raises(InvalidRequest):
            TailBatch(tails, positions)
    assert (first.bytes, second.bytes) == (4096, 8192)  # tokens 4 and 5 are in two blocks


def test_rejected_speculation_is_truncated_and_appended_again(arena, layout):
    tail = grown(arena, layout, start=3, tokens=1)
    k, v = rows_of(layout, 4)
    for layer in range(layout.layers):
        TailBatch([tail] * 4, range(4, 8)).append(layer, k, v)
    tail.advance(6)
    tail.truncate(6)
    assert tail.bytes == 2 * 4096
    batch = TailBatch([tail], [6])
    for layer in range(layout.layers):
        batch.append(layer, k[:1], v[:1])
    tail.advance(7)
    got, _ = tail.read(0, 4, 7)
    assert torch.equal(got.transpose(0, 1), torch.cat([k[:2], k[:1]]))


def test_layers_may_be_marked_together(arena, layout):
    """All that are named or none: not if one of them lacks tokens, nor after the tail lost blocks."""
    every = range(layout.layers)
    tails = [grown(arena, layout, start=0, tokens=5), grown(arena, layout, start=0, tokens=3)]
    batch = TailBatch([tails[0], tails[0], tails[1]], [5, 6, 3])
    batch.mark(every)
    for tail, end in zip(tails, (7, 4), strict=True):
        tail.advance(end)
    longer, shorter = (TailBatch([tails[0]] * rows, range(7, 7 + rows)) for rows in (3, 1))
    longer.mark(every)
    shorter.mark(every)  # The scratch behind it stays written.
    tails[0].advance(10)
    ahead = TailBatch([tails[1]], [4])
    ahead.mark(every[:1])
    with pytest.raises(InvalidRequest, match="layer 1 at position 5"):
        TailBatch([tails[1]], [5]).mark(every)
    with pytest.raises(InvalidRequest, match="is not one of"):
        ahead.mark(range(layout.layers + 1))
    with pytest.raises(InvalidRequest, match="written to 4"):
        tails[1].advance(5)
    tails[1].free()
    with pytest.raises(InvalidRequest, match="was truncated"):
        ahead.mark(every)
