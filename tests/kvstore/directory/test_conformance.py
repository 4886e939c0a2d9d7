"""Every directory keeps the same contract: the embedded one, and the same through its gRPC service."""

from dataclasses import replace

import pytest

from farshore import rpc
from farshore.errors import InvalidRequest, TransportError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import LEASE_S, MOST_HASHES, SETTLE_S, Announcement, Load, WorkerRecord
from farshore.kvstore.directory.connect import open_directory
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.remote import DirectoryService
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc

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


def through_grpc(directory):
    server, address = rpc.serve(
        lambda server: pb_grpc.add_DirectoryServicer_to_server(DirectoryService(directory), server),
        service=pb.DESCRIPTOR.services_by_name["Directory"].full_name,
        listen="127.0.0.1:0",
        threads=2,
        token=None,
    )
    return server, open_directory(f"grpc://{address}")


@pytest.fixture(params=["embedded", "remote"])
def make(request, clock):
    """make(restarted=…) -> a directory on the test's clock."""
    running = []

    def build(**options):
        directory = EmbeddedDirectory(clock=clock, **options)
        if request.param == "embedded":
            return directory
        server, remote = through_grpc(directory)
        running.append((server, remote))
        return remote

    yield build
    for server, remote in running:
        remote.disconnect()
        server.stop(0).wait()


@pytest.fixture
def directory(make):
    return make()


def names(directory):
    return [record.worker for record in directory.listing().workers]


def pass_time(clock, directory, seconds, step_s=0.5):
    """Lets time pass while the directory's owner lists the workers, as the controller does."""
    for _ in range(round(seconds / step_s)):
        clock.now_s += step_s
        directory.listing()


def test_a_worker_is_listed_with_its_record_while_its_lease_holds(directory, clock):
    directory.renew(RECORD)
    directory.renew(OTHER)
    assert directory.listing().workers == (RECORD, OTHER)
    pass_time(clock, directory, LEASE_S - 0.5)
    directory.renew(replace(OTHER, state="serving"))
    pass_time(clock, directory, 0.5)
    assert directory.listing().workers == (replace(OTHER, state="serving"),)
    assert directory.listing().settled


def test_a_worker_that_was_away_is_listed_again_as_the_same(directory, clock):
    directory.renew(RECORD)
    pass_time(clock, directory, 2 * LEASE_S)
    assert names(directory) == []
    directory.renew(RECORD)
    assert directory.listing().workers == (RECORD,)


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


def test_a_restarted_directory_settles_late(make, clock):
    directory = make(restarted=True)
    assert not directory.listing().settled
    pass_time(clock, directory, SETTLE_S)
    assert directory.listing().settled


def test_a_paused_directory_loses_nobody(directory, clock):
    directory.renew(RECORD)
    clock.now_s += 30
    listing = directory.listing()
    assert not listing.settled and [record.worker for record in listing.workers] == [RECORD.worker]
    pass_time(clock, directory, SETTLE_S - 0.5)
    assert names(directory) == [RECORD.worker]
    pass_time(clock, directory, 0.5)
    listing = directory.listing()
    assert listing.settled and not listing.workers


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


def test_announcements_end_with_the_lease(directory, clock):
    number = 1 << 200
    assert announce(directory, RECORD, 0, 1, added=[number]) == 0
    for record in (RECORD, OTHER):
        directory.renew(record)
        assert announce(directory, record, 0, 1, added=[number]) == 1
    directory.withdraw(OTHER.worker)
    assert holders(directory, number) == [{RECORD.worker}]
    pass_time(clock, directory, LEASE_S)
    assert holders(directory, number) == [set()]
    directory.renew(RECORD)
    assert holders(directory, number) == [set()]
    assert announce(directory, RECORD, 1, 1) == 0


def test_look_ups_are_bounded(directory):
    for hashes in ([block(1)] * (MOST_HASHES + 1), [b"short"], [b""]):
        with pytest.raises(InvalidRequest, match="block"):
            directory.find_prefix(hashes)
    directory.renew(RECORD)
    with pytest.raises(InvalidRequest, match="bytes"):
        directory.announce(RECORD.worker, Announcement(since=0, until=1, added=(b"short",)))


def test_a_directory_that_does_not_answer_raises():
    server, remote = through_grpc(EmbeddedDirectory())
    server.stop(0).wait()
    for call in (remote.listing, lambda: remote.renew(RECORD)):
        with pytest.raises(TransportError, match="directory"):
            call()
    remote.disconnect()
