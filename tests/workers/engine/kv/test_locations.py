"""Which shards are asked for a prefix: those that the directory names or that the engine knows itself."""

import threading

import pytest

from farshore.errors import TransportError
from farshore.ids import WorkerId
from farshore.workers.engine.kv import locations
from farshore.workers.engine.kv.locations import DIRECTORY_PAUSE_S, FEW_SHARDS, PrefixLocations

from ....waiting import until

DEADLINE_S = 60.0
FEW = [WorkerId(f"shard{i}") for i in range(FEW_SHARDS)]
MANY = [*FEW, WorkerId("shard-x")]
A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


class Asked:
    """A directory's find_prefix, which may fail or answer late."""

    def __init__(self, **announced):
        self.announced = {name.encode() * 32: frozenset(workers) for name, workers in announced.items()}
        self.error = None
        self.gate = threading.Event()
        self.gate.set()
        self.now_s = 0.0
        self.calls = 0

    def __call__(self, names):
        self.calls += 1
        assert self.gate.wait(DEADLINE_S)
        if self.error is not None:
            raise self.error
        return [self.announced.get(name, frozenset()) for name in names]


@pytest.fixture
def known_by(monkeypatch):
    """known_by(asked) -> PrefixLocations that wait long for an answer."""
    monkeypatch.setattr(locations, "DIRECTORY_DEADLINE_S", DEADLINE_S)
    made = []

    def build(asked):
        known = PrefixLocations(asked, clock=lambda: asked.now_s if asked else 0.0)
        made.append((asked, known))
        return known

    yield build
    for asked, known in made:
        if asked is not None:
            asked.gate.set()
        known.close()


def test_only_shards_that_announced_or_are_remembered_are_asked(known_by):
    asked = Asked(a=[FEW[3]], b=[FEW[5], WorkerId("gone")])
    known = known_by(asked)
    assert known.shards_to_ask([A, B], FEW) == [FEW[3], FEW[5]]
    assert known.shards_to_ask([C], FEW) == []
    known.add(FEW[1], [C])
    known.add(FEW[2], [C])
    assert known.shards_to_ask([A, C], FEW) == [FEW[1], FEW[2], FEW[3]]
    known.remove(FEW[1], [C, A])
    assert known.shards_to_ask([C], FEW) == [FEW[2]]
    known.remove(FEW[2], [C])
    assert known.shards_to_ask([C], FEW) == []


def test_nothing_is_asked_without_need(known_by):
    """A prompt of no full block, and a cluster of one shard."""
    asked = Asked()
    known = known_by(asked)
    assert known.shards_to_ask([], FEW) == [] and known.shards_to_ask([A], []) == []
    assert known.shards_to_ask([A], FEW[:1]) == FEW[:1]
    assert asked.calls == 0


@pytest.mark.parametrize("error", [TransportError("away"), ValueError("a fault of the client")])
def test_a_directory_that_fails_is_left_alone_for_a_while(known_by, error):
    asked = Asked(a=[FEW[3]])
    asked.error = error
    known = known_by(asked)
    known.add(MANY[8], [A])
    assert known.shards_to_ask([A], FEW) == FEW
    assert known.shards_to_ask([A], MANY) == [MANY[8]]
    assert asked.calls == 1
    asked.error = None
    asked.now_s = DIRECTORY_PAUSE_S
    assert known.shards_to_ask([A], MANY) == [FEW[3], MANY[8]]


def test_a_directory_that_hangs_delays_one_look_up(known_by, monkeypatch):
    """It is not asked again before its late answer, however long that takes."""
    asked = Asked(a=[FEW[3]])
    asked.gate.clear()
    known = known_by(asked)
    with monkeypatch.context() as patch:
        patch.setattr(locations, "DIRECTORY_DEADLINE_S", 0.01)
        assert known.shards_to_ask([A], FEW) == FEW
    until(lambda: asked.calls, "it was not asked")
    asked.now_s = 60.0
    assert known.shards_to_ask([A], FEW) == FEW
    assert asked.calls == 1
    asked.gate.set()
    until(lambda: known.shards_to_ask([A], FEW) == [FEW[3]], "it is not asked again")
    assert asked.calls == 2


def test_without_a_directory_few_shards_are_all_asked(known_by):
    known = known_by(None)
    assert known.shards_to_ask([A], FEW) == FEW
    assert known.shards_to_ask([A], MANY) == []


def test_the_memory_is_bounded_and_forgets_the_oldest_name(known_by, monkeypatch):
    monkeypatch.setattr(locations, "MOST_NAMES", 2)
    known = known_by(None)
    for name in (A, B, A, C):
        known.add(MANY[0], [name])
    assert [known.shards_to_ask([name], MANY) for name in (A, B, C)] == [[MANY[0]], [], [MANY[0]]]
