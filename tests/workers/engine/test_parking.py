"""The choice of the sequences to park: the newest request, never the first choice of the oldest."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from farshore.workers.engine.requests import victims


def placed(*keys):
    return [SimpleNamespace(admitted=admitted, choice=choice) for admitted, choice in keys]


def keys(found):
    return [(sequence.admitted, sequence.choice) for sequence in found]


def test_all_choices_of_the_newest_request_are_parked():
    assert keys(victims(placed((7, 1), (3, 0), (7, 0), (5, 0)))) == [(7, 0), (7, 1)]


def test_the_only_request_parks_its_last_choice():
    assert keys(victims(placed((3, 2), (3, 0), (3, 5)))) == [(3, 5)]
    assert victims(placed((3, 0))) == []
    assert victims([]) == []


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_the_oldest_always_stays_and_parking_ends(live):
    """Repeated parking leaves only the first choice of the oldest request."""
    left = set(live)
    while found := keys(victims(placed(*left))):
        assert set(found) <= left
        assert min(live) not in found
        left -= set(found)
    assert left == ({min(live)} if live else set())
