"""The router: pure choices, checked for drawn engines, loads and prompts."""

import dataclasses
import hashlib
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.errors import TransportError
from farshore.gateway.engines.router import Router, load_limit

KEYS = st.integers(0, (1 << 64) - 1)
LOADS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@dataclasses.dataclass
class Engine:
    worker: str
    load: int = 0
    sent: int = 0

    @property
    def seed(self):
        return int.from_bytes(hashlib.blake2b(self.worker.encode(), digest_size=8).digest())


def choose(engines, key, excluding=()):
    return Router(lambda: engines, lambda: None).choose(SimpleNamespace(prefix_key=key), excluding)


def made(loads):
    return [Engine(f"dense-{index}", load) for index, load in enumerate(loads)]


@given(LOADS, st.none() | KEYS, st.data())
def test_the_choice_is_offered_and_within_the_bound(loads, key, data):
    engines = made(loads)
    names = [engine.worker for engine in engines]
    excluding = data.draw(st.sets(st.sampled_from(names), max_size=len(names) - 1))
    chosen = choose(engines, key, excluding)
    least = min(engine.load for engine in engines if engine.worker not in excluding)
    assert chosen in engines and chosen.worker not in excluding
    assert chosen.load <= (least if key is None else load_limit(least))
    assert choose(engines[::-1], key, excluding).load == chosen.load  # Another gateway's order.


@given(st.sets(KEYS, min_size=1, max_size=50), st.integers(2, 12))
def test_preferences_stay_when_engines_join_and_leave(keys, count):
    """Idle engines: a prompt changes its engine only to one that joined, or from one that left."""
    engines = made([0] * count)
    before = {key: choose(engines[:-1], key).worker for key in keys}
    after = {key: choose(engines[::-1], key).worker for key in keys}
    assert all(after[key] in (before[key], engines[-1].worker) for key in keys)


@given(KEYS, st.lists(st.booleans(), max_size=300), st.integers(1, 8))
def test_one_beginning_for_all_does_not_pile_up(key, arrivals, count):
    """Each arrival is a new request (True) or the end of one at the busiest engine."""
    engines = made([0] * count)
    for arrives in arrivals:
        if arrives:
            chosen = choose(engines, key)
            assert chosen.load <= load_limit(min(engine.load for engine in engines))
            chosen.load += 1
        elif (busiest := max(engines, key=lambda engine: engine.load)).load:
            busiest.load -= 1


def test_short_prompts_go_round():
    engines = made([0] * 4)
    for _ in range(40):
        choose(engines, None).sent += 1
    assert [engine.sent for engine in engines] == [10] * 4


def test_beginnings_spread():
    engines = made([0] * 8)
    keys = (
        int.from_bytes(hashlib.blake2b(bytes([i, j]), digest_size=8).digest())
        for i in range(64)
        for j in range(64)
    )
    counts = Counter(choose(engines, key).worker for key in keys)
    assert len(counts) == 8 and max(counts.values()) < 1.3 * 4096 / 8


def test_no_engine_left():
    with pytest.raises(TransportError, match="no other dense worker"):
        choose(made([0]), 1, {"dense-0"})
