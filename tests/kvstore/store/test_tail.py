"""Tails: appending, truncating, releasing, and the memory that they take."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farshore.errors import Full, InvalidRequest
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.tail import Tail

PAGE = 4096


def append(tail, layout, k, v):
    """Appends the values times 2^layer to every layer, and advances."""
    position = tail.end
    for layer in range(layout.layers):
        tail.append(layer, position, k * 2**layer, v * 2**layer)
    tail.advance(position + k.shape[1])


@pytest.mark.parametrize("start", [0, 3, 5, 12])
def test_appended_tokens_are_where_the_segments_say(arena, layout, tokens, gather, start):
    tail = Tail(arena=arena, layout=layout, start=start)
    assert (tail.start, tail.end, tail.bytes, tail.segments().size) == (start, start, 0, 0)
    k, v = tokens(layout, 13)
    done = 0
    for n in (1, 1, 4, 7):
        append(tail, layout, k[:, done : done + n], v[:, done : done + n])
        arena.allocate(1, 1)  # so that not all blocks are adjacent
        done += n
    assert tail.end == start + 13
    assert tail.segments().size > 1
    for layer in range(layout.layers):
        got_k, got_v, positions = gather(arena.memory, layout, tail.segments(), layer)
        assert torch.equal(got_k, k * 2**layer) and torch.equal(got_v, v * 2**layer)
        assert positions.tolist() == list(range(start, start + 13))
        read_k, read_v = tail.read(layer, start + 2, start + 9)
        assert torch.equal(read_k, got_k[:, 2:9]) and torch.equal(read_v, got_v[:, 2:9])


def test_adjacent_blocks_are_one_segment(arena, layout, tokens):
    tail = Tail(arena=arena, layout=layout, start=3)
    append(tail, layout, *tokens(layout, 12))
    segments = tail.segments()
    assert segments.first.tolist() == [3] and segments.count.tolist() == [12]
    assert (segments.group0.tolist(), segments.group1.tolist()) == ([0], [layout.groups])
    assert tail.bytes == 3 * PAGE


def test_reserved_segments_are_valid_before_the_data_is_written(arena, layout, tokens, gather):
    tail = Tail(arena=arena, layout=layout, start=4)
    append(tail, layout, *tokens(layout, 1))
    with pytest.raises(InvalidRequest, match="reserve"):
        tail.segments(6)
    tail.reserve(6)
    tail.reserve(6)
    segments = tail.segments(6)
    k, v = tokens(layout, 1)
    tail.append(1, 5, k, v)
    seen_k, _, positions = gather(arena.memory, layout, segments, 1)
    assert torch.equal(seen_k[:, 1:], k) and positions.tolist() == [4, 5]
    assert tail.end == 5 and tail.bytes == 2 * PAGE


def test_scratch_may_be_overwritten_and_the_rest_not(arena, layout, tokens):
    tail = Tail(arena=arena, layout=layout, start=0)
    k, v = tokens(layout, 4)
    append(tail, layout, k, v)
    tail.append(0, 4, k, v)  # as in a step that fails half way
    append(tail, layout, k * 2, v * 2)  # and runs again
    assert torch.equal(tail.read(0, 4, 8)[0], k * 2)
    for position in (0, 7, 9):
        with pytest.raises(InvalidRequest):
            tail.append(0, position, k, v)


def test_the_end_advances_only_over_complete_tokens(arena, layout, tokens):
    tail = Tail(arena=arena, layout=layout, start=2)
    k, v = tokens(layout, 3)
    tail.append(0, 2, k, v)
    tail.append(2, 2, k, v)
    tail.append(1, 2, k[:, :2], v[:, :2])
    with pytest.raises(InvalidRequest):
        tail.advance(5)
    tail.advance(4)
    with pytest.raises(InvalidRequest):
        tail.advance(3)
    with pytest.raises(InvalidRequest):
        tail.read(0, 2, 5)


def test_truncating_forgets_scratch_and_frees_its_blocks(arena, layout, tokens, gather):
    tail = Tail(arena=arena, layout=layout, start=3)
    k, v = tokens(layout, 9)
    append(tail, layout, k, v)
    tail.reserve(30)
    tail.truncate(11)
    assert (tail.end, tail.bytes) == (11, 3 * PAGE)
    tail.truncate(9)
    assert (tail.end, tail.bytes) == (9, 2 * PAGE)
    with pytest.raises(InvalidRequest):
        tail.advance(10)
    for end in (2, 10):
        with pytest.raises(InvalidRequest):
            tail.truncate(end)
    append(tail, layout, k, v)
    seen_k, _, _ = gather(arena.memory, layout, tail.segments(), 0)
    assert torch.equal(seen_k, torch.cat([k[:, :6], k], 1))


def test_releasing_moves_the_start_and_frees_whole_blocks_below(arena, layout, tokens, gather):
    tail = Tail(arena=arena, layout=layout, start=3)
    k, v = tokens(layout, 12)
    append(tail, layout, k, v)
    for position, blocks in [(4, 3), (5, 2), (14, 1), (15, 0)]:
        tail.release_below(position)
        assert (tail.start, tail.bytes) == (position, blocks * PAGE)
        if position < tail.end:
            seen_k, _, positions = gather(arena.memory, layout, tail.segments(), 0)
            assert torch.equal(seen_k, k[:, position - 3 :]) and positions[0] == position
    for position in (14, 16):
        with pytest.raises(InvalidRequest):
            tail.release_below(position)
    append(tail, layout, k, v)
    assert torch.equal(tail.read(0, 15, 27)[0], k)
    tail.free()
    tail.free()
    assert arena.free_bytes == arena.budget_bytes


def test_a_full_arena_refuses_and_nothing_changes(layout, tokens):
    arena = Arena(2 * PAGE)
    tail = Tail(arena=arena, layout=layout, start=0)
    k, v = tokens(layout, 6)
    append(tail, layout, k, v)
    before = tail.segments()
    with pytest.raises(Full) as caught:
        tail.append(0, 6, k, v)
    assert caught.value.free_bytes == 0
    assert (tail.end, tail.bytes) == (6, 2 * PAGE)
    assert torch.equal(tail.segments().base, before.base)


def test_a_tail_starts_at_a_position(arena, layout):
    with pytest.raises(InvalidRequest):
        Tail(arena=arena, layout=layout, start=-1)


@given(
    start=st.integers(0, 600),
    tokens=st.integers(0, 900),
    format=st.sampled_from(list(KVFormat)),
    block_tokens=st.sampled_from([4, 16, 256]),
)
def test_bytes_for_equals_the_bytes_that_reserve_takes(start, tokens, format, block_tokens):
    layout = KVLayout(2, 1, 1, 1, 64, 64, format, block_tokens=block_tokens)
    arena = Arena(1 << 24)
    tail = Tail(arena=arena, layout=layout, start=start)
    tail.reserve(start + tokens)
    assert Tail.bytes_for(layout, start, start + tokens) == tail.bytes
    assert tail.bytes == arena.budget_bytes - arena.free_bytes


def test_the_bytes_of_smollm2_tails():
    """A tail takes whole blocks: 1 token and 256 take one, and 2 tokens across a block's end take two."""
    bfloat16 = KVLayout(30, 3, 1, 1, 64, 64, KVFormat.BFLOAT16)
    float32 = bfloat16._replace(format=KVFormat.FLOAT32)
    block = 256 * 23_040
    for layout, size in ((bfloat16, block), (float32, 2 * block)):
        assert Tail.bytes_for(layout, 37, 37) == 0
        assert Tail.bytes_for(layout, 37, 38) == Tail.bytes_for(layout, 0, 256) == size
        assert Tail.bytes_for(layout, 255, 257) == 2 * size
        assert Tail.bytes_for(layout, 37, 37 + 512) == 3 * size


commands = st.tuples(st.sampled_from(["append", "truncate", "release", "reserve"]), st.integers(0, 12))


@given(st.integers(0, 7), st.lists(commands, max_size=30))
def test_a_tail_behaves_like_a_window_on_a_list(start, steps):
    layout = KVLayout(1, 1, 1, 1, 1, 1, KVFormat.FLOAT32, block_tokens=4)
    arena = Arena(1 << 20)
    tail = Tail(arena=arena, layout=layout, start=start)
    window: list[float] = []
    value = 0.0
    for command, n in steps:
        if command == "append":
            new = [value + i for i in range(n)]
            value += n
            k = torch.tensor(new).view(1, n, 1)
            tail.append(0, tail.end, k, -k)
            tail.advance(tail.end + n)
            window += new
        elif command == "truncate":
            keep = max(0, len(window) - n)
            tail.truncate(tail.start + keep)
            window = window[:keep]
        elif command == "release":
            n = min(n, len(window))
            tail.release_below(tail.start + n)
            window = window[n:]
        else:
            tail.reserve(tail.end + n)
            assert tail.segments(tail.end + n).count.sum() == len(window) + n
        arena.check_integrity()
        assert tail.bytes == arena.budget_bytes - arena.free_bytes
        k, v = tail.read(0, tail.start, tail.end)
        assert k.flatten().tolist() == window and v.flatten().tolist() == [-x for x in window]
        assert tail.segments().count.sum() == len(window) == tail.end - tail.start
