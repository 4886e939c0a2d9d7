"""Plans of the GPU's kernels in a room: a graph that holds the launches of one serves later ones.

On a GPU if there is one, else in triton's interpreter.
"""

import importlib

import pytest
import torch

from farshore.kernels.base import AttentionSpec, Segments, State, WorkList
from farshore.kernels.formats import KVFormat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def ops():
    """Triton reads the variable again at the first launch, when it imports its remaining modules."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("farshore.kernels.gpu.ops")


class Room:
    """A PlanRoom on the kernels' device."""

    def __init__(self):
        self.tables = torch.zeros(1 << 16, dtype=torch.uint8, device=DEVICE)
        self.split = torch.full((1 << 20,), torch.nan, device=DEVICE)
        self.shapes = []

    def take(self, tables, *, scratch, shape):
        self.shapes.append(shape)
        place = self.tables[: tables.numel()]
        place.copy_(tables)
        return place, self.split[:scratch]


def test_launches_of_a_plan_in_a_room_serve_later_plans(ops, textbook, assert_close, store_tokens):
    """As a graph repeats them: each plan of a shape puts its tables where the first one had its own. Rows
    without work get the identity."""
    spec = AttentionSpec(q_heads=4, k_heads=2, v_heads=2, k_dim=16, v_dim=16, scale=0.25)
    room, first = Room(), None
    for tokens, rows in ((37, 1), (90, 2), (21, 7)):
        kv = store_tokens(spec, KVFormat.FLOAT32, tokens, block_tokens=8)
        memory = torch.zeros(1 << 16, dtype=torch.uint8, device=DEVICE) if first is None else first.kv
        memory = memory.view(torch.uint8)
        memory[: kv.memory.numel()] = kv.memory.to(DEVICE)
        q = torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(tokens))
        positions = torch.full((8,), tokens - 1)
        plan = ops.plan(
            WorkList.of([(0, rows, 0, 0, 2)]),
            Segments.of([(0, kv.stride, 0, tokens, 0, 0, 2)]),
            memory,
            kv.layout,
            spec,
            positions=positions,
            room=room,
        )
        first = first or plan
        nan = torch.full((8, 4, 16), torch.nan, device=DEVICE)
        out = State(nan, nan[..., 0].clone())
        ops.partial(first, 1, q.to(DEVICE), out=out)
        out = State(out.o.cpu(), out.lse.cpu())
        expected = textbook(q, kv.k, kv.v, spec, q_positions=positions)
        expected.o[rows:], expected.lse[rows:] = 0.0, -torch.inf
        assert_close(out, expected, 2e-6)
    assert len({*room.shapes}) == 1


@pytest.mark.parametrize("window", [None, 9])
def test_a_plan_advances_where_it_lies(ops, textbook, assert_close, store_tokens, window):
    """Tails grow by a token a step, and lose some again: one has two rows, the other one. The launches of the
    first plan of a shape serve all later ones."""
    spec = AttentionSpec(
        q_heads=4, k_heads=2, v_heads=2, k_dim=16, v_dim=16, scale=0.25, window_tokens=window
    )
    kv = store_tokens(spec, KVFormat.FLOAT32, 60, block_tokens=64)
    memory, room, last, firsts, advanced = kv.memory.to(DEVICE), Room(), None, {}, 0
    work = WorkList.of([(0, 3, 0, 0, 2), (0, 2, 1, 0, 2), (2, 1, 2, 0, 2)])
    lengths = [*range(3, 12), 9, 7, *range(8, 14)]
    for step, tokens in enumerate(lengths):
        counts = tokens, tokens + 20
        segments = Segments.of(
            [(0, kv.stride, 0, 17, 0, 0, 2), *((0, kv.stride, 17, n, 17, 0, 2) for n in counts)]
        )
        positions = torch.tensor([15 + tokens, 16 + tokens, 36 + tokens])
        plan = ops.plan(work, segments, memory, kv.layout, spec, positions=positions, last=last, room=room)
        advanced += plan is last
        last, first = plan, firsts.setdefault(room.shapes[-1], plan)
        q = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(step))
        nan = torch.full((3, 4, 16), torch.nan, device=DEVICE)
        out = State(nan, nan[..., 0].clone())
        ops.partial(first, 1, q.to(DEVICE), out=out)
        expected = textbook(q, kv.k, kv.v, spec, q_positions=positions)
        assert_close(State(out.o.cpu(), out.lse.cpu()), expected, 2e-6)
    assert len(lengths) / 2 < advanced < len(lengths) - 1


def test_plans_in_a_room_have_few_shapes(ops, store_tokens):
    """Each of more than 300 lengths would be a shape of its own; a wide tile is another shape."""
    spec = AttentionSpec(q_heads=4, k_heads=2, v_heads=2, k_dim=16, v_dim=16, scale=0.25)
    kv = store_tokens(spec, KVFormat.FLOAT32, 400, block_tokens=8)
    room = Room()

    def plan(tokens, rows):
        ops.plan(
            WorkList.of([(0, rows, 0, 0, 2)] if tokens else []),
            Segments.of([(0, kv.stride, 0, tokens, 0, 0, 2)] if tokens else []),
            kv.memory.to(DEVICE),
            kv.layout,
            spec,
            positions=torch.full((40,), 399),
            room=room,
        )

    for tokens in range(0, 400, 7):
        plan(tokens, 1)
    assert len({*room.shapes}) <= 3
    plan(399, 40)
    assert len({*room.shapes}) <= 4
