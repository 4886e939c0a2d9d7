"""The log of a store's block names: any reader that applies its changes knows the names."""

from hypothesis import given
from hypothesis import strategies as st

from farshore.kvstore.prefix import NameLog


def test_it_tells_all_names_first_and_then_what_changed():
    log = NameLog()
    assert log.changes(0) == (0, 0, (), ())
    log.add(b"a")
    log.add(b"b")
    first = log.changes(0)
    assert (first.since, first.until, sorted(first.added)) == (0, 2, [b"a", b"b"])
    log.remove(b"a")
    log.add(b"c")
    log.add(b"d")
    log.remove(b"d")
    changes = log.changes(first.until)
    assert (changes.since, changes.until, changes.added) == (2, 6, (b"c",))
    assert sorted(changes.removed) == [b"a", b"d"]
    assert log.changes(changes.until) == (6, 6, (), ())


def test_a_reader_that_missed_too_much_gets_all_names():
    log = NameLog(most_changes=3)
    for name in (b"a", b"b", b"c", b"d"):
        log.add(name)
    assert log.changes(1).since == 1
    log.remove(b"a")
    everything = log.changes(1)
    assert (everything.since, sorted(everything.added)) == (0, [b"b", b"c", b"d"])
    assert log.changes(99).since == 0, "a number that this log has not reached"


@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), max_size=60),
    st.integers(1, 12),
)
def test_a_reader_at_any_times_knows_the_names(changes, most_changes):
    """``changes``: (name, whether it is added, whether the reader reads then)."""
    log = NameLog(most_changes=most_changes)
    names, known, seen = set(), set(), 0
    for number, added, reads in [*changes, (0, True, True)]:
        name = bytes([number])
        if added and name not in names:
            names.add(name)
            log.add(name)
        elif not added and name in names:
            names.discard(name)
            log.remove(name)
        if reads:
            news = log.changes(seen)
            known = set(news.added) if news.since == 0 else known - set(news.removed) | set(news.added)
            seen = news.until
            assert known == names == log.names()
