"""Announcements of block names: whatever is lost on the way, the directory knows the store's names again."""

import contextlib
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.errors import TransportError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import WorkerRecord
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.prefix import NameLog
from farshore.workers import announcer
from farshore.workers.announcer import PROBE_S, Announcer

from ..waiting import until

DEADLINE_S = 60.0
WORKER = WorkerId("attention-0-aa")


def record_of(worker):
    return WorkerRecord(
        worker=worker,
        kind="attention",
        slot=worker[:11],
        address="127.0.0.1:7",
        host="127.0.0.1",
        process_id=1,
        state="serving",
    )


def name_of(number):
    return number.to_bytes(32, "big")[::-1]


class Directory:
    """A directory whose requests and replies can be lost, and that can be replaced by an empty one."""

    def __init__(self):
        self.now_s = 0.0
        self.lose = ""
        self.calls = 0
        self.restart()

    def restart(self):
        self._directory = EmbeddedDirectory(clock=lambda: 0.0)

    def lease(self):
        self._directory.renew(record_of(WORKER))

    def announce(self, worker, blocks):
        self.calls += 1
        if self.lose == "request":
            raise TransportError("the directory: UNAVAILABLE")
        known = self._directory.announce(worker, blocks)
        if self.lose == "reply":
            raise TransportError("the directory: DEADLINE_EXCEEDED")
        return known

    def knows(self, numbers):
        found = self._directory.find_prefix([name_of(number) for number in numbers])
        return {number for number, workers in zip(numbers, found, strict=True) if workers == {WORKER}}


@pytest.fixture
def directory():
    made = Directory()
    made.lease()
    return made


def announcer_of(directory, log):
    """An Announcer whose thread is not started, so that a test alone decides when it announces."""
    return Announcer(directory, WORKER, log, clock=lambda: directory.now_s)


def test_what_changed_is_announced_once(directory):
    log = NameLog()
    announces = announcer_of(directory, log)
    announces.announce()
    assert directory.calls == 0
    log.add(name_of(1))
    announces.announce()
    log.add(name_of(2))
    log.remove(name_of(1))
    announces.announce()
    announces.announce()
    assert directory.calls == 2 and directory.knows([1, 2]) == {2}
    directory.now_s += PROBE_S
    announces.announce()
    assert directory.calls == 3, "without a change it still looks whether the directory is the same"


def test_many_names_go_in_pieces(directory, monkeypatch):
    monkeypatch.setattr(announcer, "MOST_NAMES", 8)
    log = NameLog()
    for number in range(30):
        log.add(name_of(number))
    announces = announcer_of(directory, log)
    announces.announce()
    assert directory.calls == 8 and directory.knows(range(30)) == set(range(30))
    for number in range(20):
        log.remove(name_of(number))
    announces.announce()
    assert directory.calls == 13 and directory.knows(range(30)) == set(range(20, 30))


def test_a_worker_without_a_lease_announces_again(directory):
    directory.restart()
    log = NameLog()
    log.add(name_of(1))
    announces = announcer_of(directory, log)
    announces.announce()
    assert directory.knows([1]) == set()
    directory.lease()
    announces.announce()
    assert directory.knows([1]) == {1}


def test_its_thread_announces_and_ends(directory):
    log, called = NameLog(), threading.Event()
    announce = directory.announce

    def tell(worker, blocks):
        try:
            return announce(worker, blocks)
        finally:
            called.set()

    directory.announce = tell
    directory.lose = "request"
    announces = Announcer(directory, WORKER, log, period_s=0.01)
    announces.start()
    log.add(name_of(1))
    assert called.wait(DEADLINE_S)
    directory.lose = ""
    while not directory.knows([1]):
        called.clear()
        assert called.wait(DEADLINE_S) or directory.knows([1])
    for _ in range(2):
        announces.end()


STEPS = st.one_of(
    st.tuples(st.sampled_from(["add", "remove"]), st.integers(0, 9)),
    st.tuples(
        st.sampled_from(["announce", "lose request", "lose reply", "restart", "pass time"]), st.just(0)
    ),
)


@given(st.lists(STEPS, max_size=50), st.integers(1, 20), st.integers(2, 9))
def test_any_loss_heals(steps, most_changes, most_names):
    """Any history of changes, lost calls and directories that start empty; then two announcements that
    arrive, the first of which may learn that the directory missed something."""
    directory, log = Directory(), NameLog(most_changes=most_changes)
    directory.lease()
    names = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(announcer, "MOST_NAMES", most_names)
        announces = announcer_of(directory, log)
        for step, number in [*steps, ("pass time", 0), ("announce", 0), ("announce", 0)]:
            if step == "add" and number not in names:
                names.add(number)
                log.add(name_of(number))
            elif step == "remove" and number in names:
                names.discard(number)
                log.remove(name_of(number))
            elif step == "restart":
                directory.restart()
                directory.lease()
            elif step == "pass time":
                directory.now_s += PROBE_S
            elif step == "announce":
                directory.lose = ""
                announces.announce()
            elif step.startswith("lose"):
                directory.lose = step.removeprefix("lose ")
                with contextlib.suppress(TransportError):
                    announces.announce()
        assert directory.knows(range(10)) == names


def test_its_thread_survives_every_error_and_logs_it_once(directory, caplog):
    log, announce, failing = NameLog(), directory.announce, iter([KeyError("a"), KeyError("a")])

    def tell(worker, blocks):
        if (error := next(failing, None)) is not None:
            raise error
        return announce(worker, blocks)

    directory.announce = tell
    announces = Announcer(directory, WORKER, log, period_s=0.01)
    announces.start()
    log.add(name_of(1))
    until(lambda: directory.knows([1]), "nothing is announced any more")
    announces.end()
    said = [record.message for record in caplog.records if record.name == announcer.__name__]
    assert said == ["blocks can't be announced"]
