"""Every directory keeps the same contract: embedded, behind gRPC, in Redis and in Valkey."""

import threading
from dataclasses import replace

import pytest

from farshore.errors import InvalidRequest, TransportError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import MOST_HASHES, Announcement, Load, WorkerRecord
from farshore.kvstore.directory.embedded import EmbeddedDirectory

from .conftest import through_grpc

RECORD = WorkerRecord(
    worker=WorkerId("attention-0-aa"),
    kind="attention",
    slot="attention-0",
    address="127.0.0.1:7",
    host="127.0.0.1",
    process_id=12,
    state="serving",
    load=Load(free_bytes=3 << 40, budget_bytes=4 << 40),
    zone="rack-3",
    device="cuda: NVIDIA H200, 139 GiB",
    node="machine-1",
)
OTHER = replace(
    RECORD,
    worker=WorkerId("dense-0-bb"),
    kind="dense",
    slot="dense-0",
    state="loading",
    progress="3 of 9 tensors",
    content="sha256:ab",
    load=None,
)


@pytest.fixture
def directory(place):
    return place().directory


def names(directory):
    return [record.worker for record in directory.listing().workers]


def test_a_worker_is_listed_with_its_record(directory):
    directory.renew(RECORD)
    directory.renew(OTHER)
    assert directory.listing().workers == (RECORD, OTHER)
    directory.renew(replace(OTHER, state="draining"))
    assert directory.listing().workers == (RECORD, replace(OTHER, state="draining"))
    assert directory.listing().settled


def test_a_worker_is_listed_while_its_lease_holds(place):
    here = place(expires=True)
    directory = here.directory
    for record in (RECORD, OTHER):
        directory.renew(record)
    serving = replace(OTHER, state="serving")

    def only_other_is_left():
        directory.renew(serving)
        return directory.listing().workers == (serving,)

    here.until(lambda: only_other_is_left() and directory.listing().settled)
    here.until(lambda: names(directory) == [])

    def is_back():
        directory.renew(RECORD)  # It was away, and is the same.
        return directory.listing().workers == (RECORD,)

    here.until(is_back)


def test_withdrawing_ends_the_listing_at_once(directory):
    directory.renew(RECORD)
    for _ in range(2):
        directory.withdraw(RECORD.worker)
    assert names(directory) == []


def test_closed_workers_are_those_named_last(directory):
    directory.renew(RECORD)
    directory.renew(OTHER)
    directory.close([RECORD.worker, WorkerId("unknown")])
    assert directory.listing().closed == {RECORD.worker}
    directory.close([OTHER.worker])
    assert directory.listing().closed == {OTHER.worker}


def test_draining_workers_are_closed(directory):
    directory.renew(RECORD)
    directory.renew(OTHER)
    directory.close([RECORD.worker], draining=[OTHER.worker, WorkerId("unknown")])
    listing = directory.listing()
    assert listing.closed == {RECORD.worker, OTHER.worker} and listing.draining == {OTHER.worker}
    directory.close([OTHER.worker])
    assert directory.listing().closed == {OTHER.worker} and not directory.listing().draining


def test_a_restarted_directory_settles_late(place):
    here = place(restarted=True, expires=True)
    assert not here.directory.listing().settled
    here.until(lambda: here.directory.listing().settled)


def test_a_paused_directory_reports_no_worker_lost(place):
    here = place(expires=True)
    here.directory.renew(RECORD)
    here.until(lambda: here.directory.listing().settled)
    here.pause()
    assert not here.directory.listing().settled

    def settled():
        listing = here.directory.listing()
        assert not (listing.settled and listing.workers)
        return listing.settled

    here.until(settled)


def block(number):
    return number.to_bytes(32)


def holders(directory, *numbers):
    return [set(workers) for workers in directory.find_prefix([block(number) for number in numbers])]


def announce(directory, record, since, until, *, added=(), removed=()):
    changes = (tuple(map(block, numbers)) for numbers in (added, removed))
    added, removed = changes
    return directory.announce(
        record.worker, Announcement(since=since, until=until, added=added, removed=removed)
    )


def test_a_prefix_is_found_at_the_workers_that_announced_it(directory):
    directory.renew(RECORD)
    directory.renew(OTHER)
    assert announce(directory, RECORD, 0, 1, added=[1 << 200, 2 << 200]) == 1
    assert announce(directory, OTHER, 0, 7, added=[2 << 200]) == 7
    both = {RECORD.worker, OTHER.worker}
    assert holders(directory, 2 << 200, 3 << 200, 1 << 200) == [both, set(), {RECORD.worker}]
    assert announce(directory, OTHER, 7, 8, added=[3 << 200], removed=[2 << 200, 9 << 200]) == 8
    assert holders(directory, 2 << 200, 3 << 200) == [{RECORD.worker}, {OTHER.worker}]
    assert directory.find_prefix([]) == []


def test_announcements_are_numbered(directory):
    directory.renew(RECORD)
    first, second, third = 1 << 200, 2 << 200, 3 << 200
    assert announce(directory, RECORD, 4, 5, added=[first]) == 0
    assert announce(directory, RECORD, 0, 5, added=[first]) == 5
    assert announce(directory, RECORD, 6, 7, added=[second]) == 5  # One was missed: nothing is added.
    for _ in range(2):
        assert announce(directory, RECORD, 5, 6, added=[second]) == 6
    assert announce(directory, RECORD, 6, 6) == 6
    assert holders(directory, first, second) == [{RECORD.worker}] * 2
    assert announce(directory, RECORD, 0, 9, added=[third]) == 9  # Replaces the rest.
    assert holders(directory, first, second, third) == [set(), set(), {RECORD.worker}]


def test_announcements_end_with_the_lease(place):
    here = place()
    directory, number = here.directory, 1 << 200
    assert announce(directory, RECORD, 0, 1, added=[number]) == 0
    for record in (RECORD, OTHER):
        directory.renew(record)
        assert announce(directory, record, 0, 1, added=[number]) == 1
    directory.withdraw(OTHER.worker)
    assert holders(directory, number) == [{RECORD.worker}]
    here.renew_briefly(RECORD)
    here.until(lambda: holders(directory, number) == [set()])
    directory.renew(RECORD)
    assert holders(directory, number) == [set()]
    assert announce(directory, RECORD, 1, 1) == 0


def test_a_worker_announces_many_blocks(directory):
    """More than one call to Redis takes."""
    directory.renew(RECORD)
    numbers = [number << 200 for number in range(1, 4_001)]
    assert announce(directory, RECORD, 0, 1, added=numbers) == 1
    assert announce(directory, RECORD, 1, 2, removed=numbers[:3_000], added=[5_000 << 200]) == 2
    assert holders(directory, *numbers) == [set()] * 3_000 + [{RECORD.worker}] * 1_000
    assert holders(directory, 5_000 << 200) == [{RECORD.worker}]


def test_blocks_beyond_the_limit_are_ignored(directory, monkeypatch):
    for module in ("locations", "redis.directory"):
        monkeypatch.setattr(f"farshore.kvstore.directory.{module}.MOST_BLOCKS", 3)
    directory.renew(RECORD)
    numbers = [number << 200 for number in range(1, 6)]
    assert announce(directory, RECORD, 0, 1, added=numbers) == 1
    assert holders(directory, *numbers) == [{RECORD.worker}] * 3 + [set()] * 2
    assert announce(directory, RECORD, 1, 2, removed=numbers[:1], added=numbers[3:]) == 2
    assert holders(directory, *numbers) == [set()] + [{RECORD.worker}] * 3 + [set()]


def test_look_ups_are_bounded(directory):
    for hashes in ([block(1)] * (MOST_HASHES + 1), [b"short"], [b""]):
        with pytest.raises(InvalidRequest, match="block"):
            directory.find_prefix(hashes)
    directory.renew(RECORD)
    with pytest.raises(InvalidRequest, match="bytes"):
        directory.announce(RECORD.worker, Announcement(since=0, until=1, added=(b"short",)))


class Hanging(EmbeddedDirectory):
    """A directory whose process is paused, until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.goes_on = threading.Event()

    def listing(self):
        self.goes_on.wait()
        return super().listing()


def test_a_directory_that_hangs_is_one_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("farshore.kvstore.directory.remote.DEADLINE_S", 0.1)
    hanging = Hanging()
    server, remote = through_grpc(hanging)
    with pytest.raises(TransportError, match=r"the directory does not answer within 0\.1 s"):
        remote.listing()
    hanging.goes_on.set()
    remote.disconnect()
    server.stop(0).wait()


def test_a_directory_that_does_not_answer_raises():
    server, remote = through_grpc(EmbeddedDirectory())
    server.stop(0).wait()
    for call in (remote.listing, lambda: remote.renew(RECORD)):
        with pytest.raises(TransportError, match="directory"):
            call()
    remote.disconnect()
