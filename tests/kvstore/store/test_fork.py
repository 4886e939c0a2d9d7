"""Forks of a tail. Sealed spans are shared by holds; only the tail is copied."""

import pytest
import torch

from farshore.errors import Full
from farshore.kvstore.store.tail import Tail


def append(tail, layout, k, v):
    for layer in range(layout.layers):
        tail.append(layer, tail.end, k, v)
    tail.advance(tail.end + k.shape[1])


@pytest.mark.parametrize(("start", "count"), [(0, 0), (3, 0), (0, 10), (3, 9)])
def test_a_forked_tail_has_the_same_tokens_and_its_own_future(arena, layout, tokens, start, count):
    tail = Tail(arena=arena, layout=layout, start=start)
    k, v = tokens(layout, count)
    append(tail, layout, k, v)
    tail.reserve(tail.end + 20)
    free_bytes = arena.free_bytes
    fork = tail.fork()
    assert (fork.start, fork.end, fork.layout) == (start, start + count, layout)
    assert free_bytes - arena.free_bytes == fork.bytes == (-(-(start + count) // 5) * 4096 if count else 0)
    for other in (fork, tail):
        append(other, layout, *tokens(layout, 3))
    assert tail.segments().base.tolist() != fork.segments().base.tolist()
    for layer in range(layout.layers):
        got_k, got_v = fork.read(layer, start, start + count)
        assert torch.equal(got_k, k) and torch.equal(got_v, v)
        new, forked = (t.read(layer, start + count, start + count + 3)[0] for t in (tail, fork))
        assert not torch.equal(new, forked)
    tail.free()
    assert torch.equal(fork.read(2, start, start + count)[1], v)
    fork.free()
    assert arena.free_bytes == arena.budget_bytes


def test_a_fork_that_does_not_fit_takes_nothing(arena, layout, tokens):
    tail = Tail(arena=arena, layout=layout, start=0)
    append(tail, layout, *tokens(layout, 10))
    arena.allocate(61, 1)
    with pytest.raises(Full):
        tail.fork()
    assert arena.free_bytes == 4096
