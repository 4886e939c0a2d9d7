"""The watch tells the engine which shards the directory lists; what it may conclude from silence."""

import threading
from dataclasses import replace

import pytest

from farshore.attention_offload.base import ShardIdentity
from farshore.errors import InvalidRequest, TransportError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Listing, WorkerRecord
from farshore.workers import shard_watch
from farshore.workers.engine.membership import Draining, Joined, Left, Opened, Shut
from farshore.workers.shard_watch import ShardWatch

from ..waiting import until

DEADLINE_S = 60.0
LOCAL, A, B, C = (WorkerId(f"{slot}-x") for slot in ("dense-0", "attention-0", "attention-1", "attention-2"))


def record(worker, address):
    return WorkerRecord(
        worker=worker,
        kind="attention",
        slot=worker.rpartition("-")[0],
        address=address,
        host="10.0.0.1",
        process_id=1,
        state="serving",
    )


class Directory:
    """Answers with the test's listing, and counts how often it was asked."""

    def __init__(self):
        self.answer = Listing(workers=(), closed=frozenset(), settled=True)
        self.error = None
        self._asked = threading.Semaphore(0)

    def listing(self):
        self._asked.release()
        if self.error is not None:
            raise self.error
        return self.answer

    def await_look(self):
        """Waits until a look that began after this call has been compared."""
        while self._asked.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self._asked.acquire(timeout=DEADLINE_S)

    def lists(self, *records, closed=(), draining=(), settled=True):
        self.answer = Listing(
            workers=records,
            closed=frozenset((*closed, *draining)),
            settled=settled,
            draining=frozenset(draining),
        )


class Engine:
    """Applies changes at once."""

    def __init__(self):
        self.known = {LOCAL: True}
        self.changes = []

    def announce(self, change):
        self.changes.append(change)
        if isinstance(change, Joined):
            self.known[change.worker] = True

    def shards(self):
        return dict(self.known)


class Client:
    """A shard that answers with an identity."""

    def __init__(self, worker):
        self.worker = worker
        self.closed = self.refuses = self.broken = False

    def identify(self):
        if self.worker is None:
            raise TransportError("refused")
        if self.broken:
            raise ValueError("9 layers")
        return ShardIdentity(self.worker, 7, "host", 1, 1, 0, "i", 0)

    def connect(self):
        if self.refuses:
            raise InvalidRequest("the engine's wire version is 2")

    def close(self):
        self.closed = True


@pytest.fixture
def watched(monkeypatch):
    """(directory, engine, address -> client, identities)"""
    monkeypatch.setattr("farshore.workers.shard_watch.PERIOD_S", 0.01)
    directory, engine = Directory(), Engine()
    clients, identities = {"a": Client(A), "b": Client(B)}, {}
    watch = ShardWatch(
        directory, engine, connect=clients.__getitem__, local=LOCAL, identified=identities.__setitem__
    )
    yield directory, engine, clients, identities
    watch.stop()


def test_listed_workers_join_once_with_their_identity(watched):
    directory, engine, _, identities = watched
    directory.lists(record(A, "a"), record(B, "b"), replace(record(LOCAL, ""), kind="dense"))
    until(lambda: {A, B} <= engine.known.keys())
    directory.await_look()
    assert sorted(change.worker for change in engine.changes) == [A, B]
    assert identities[A].process_id == 7


def test_another_worker_at_the_address_or_one_that_refuses_does_not_join(watched):
    directory, engine, clients, _ = watched
    clients |= {"a": Client(WorkerId("other")), "b": Client(None), "c": Client(C)}
    clients["c"].refuses = True
    directory.lists(record(A, "a"), record(B, "b"), record(C, "c"))
    until(lambda: all(client.closed for client in clients.values()))
    assert engine.changes == []


def test_a_closed_worker_is_shut_and_opened_again(watched):
    directory, engine, _, _ = watched
    directory.lists(record(A, "a"))
    until(lambda: A in engine.known)
    directory.lists(record(A, "a"), closed=[A])
    directory.await_look()
    directory.lists(record(A, "a"))
    directory.await_look()
    assert engine.changes[1:] == [Shut(A), Opened(A)]


def test_a_draining_worker_drains_until_the_mark_is_taken_back(watched):
    directory, engine, _, _ = watched
    directory.lists(record(A, "a"), record(B, "b"))
    until(lambda: {A, B} <= engine.known.keys())
    directory.lists(record(A, "a"), replace(record(B, "b"), state="draining"), draining=[A])
    directory.await_look()
    assert sorted(engine.changes[2:]) == [Draining(A), Draining(B)]
    directory.lists(record(A, "a"), replace(record(B, "b"), state="draining"), closed=[A])
    directory.await_look()
    directory.lists(record(A, "a"))
    directory.await_look()
    assert engine.changes[4:] == [Shut(A), Opened(A), Shut(B)]


def test_a_worker_that_drains_already_does_not_join(watched):
    directory, engine, _, _ = watched
    directory.lists(replace(record(A, "a"), state="draining"), record(B, "b"), draining=[B])
    directory.await_look()
    assert engine.changes == []


def test_silence_of_a_worker_shuts_it_and_only_its_own_silence_makes_it_leave(watched):
    directory, engine, _, _ = watched
    directory.lists(record(A, "a"))
    until(lambda: A in engine.known)
    directory.lists(settled=False)
    directory.await_look()
    assert len(engine.changes) == 1  # A directory that has just started proves nothing.
    directory.lists()
    directory.await_look()
    assert engine.changes[1:] == [Shut(A)]
    engine.known[A] = False
    directory.await_look()
    assert Left(A) in engine.changes


def test_a_directory_that_is_away_changes_nothing(watched):
    directory, engine, _, _ = watched
    directory.lists(record(A, "a"))
    until(lambda: A in engine.known)
    directory.error = TransportError("the directory: UNAVAILABLE")
    directory.await_look()
    assert len(engine.changes) == 1


def test_a_listing_that_makes_no_sense_is_logged_once_and_asked_for_again(watched, caplog):
    directory, engine, _, _ = watched
    directory.error = KeyError("dreaming")
    directory.await_look()
    directory.await_look()
    directory.error = None
    directory.lists(record(A, "a"))
    until(lambda: A in engine.known)
    assert said(caplog) == ["the attention workers can't be followed"]


@pytest.mark.parametrize(
    ("failing", "reason"), [("connect", "KeyError: 'a'"), ("identify", "ValueError: 9 layers")]
)
def test_a_worker_whose_join_fails_in_any_way_is_asked_again(watched, failing, reason, caplog):
    """An address that nothing can connect to, or an answer that makes no sense."""
    directory, engine, clients, _ = watched
    client = clients["a"]
    client.broken = True
    if failing == "connect":
        del clients["a"]
    directory.lists(record(A, "a"))
    for _ in range(3):
        directory.await_look()
    assert A not in engine.known
    client.broken, clients["a"] = False, client
    until(lambda: A in engine.known)
    assert said(caplog) == [f"attention worker {A} can't join: {reason}"]


def said(caplog):
    """What the watch has logged; other threads of the process log, too."""
    return [record.message for record in caplog.records if record.name == shard_watch.__name__]
