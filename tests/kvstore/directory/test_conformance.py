"""Every directory keeps the same contract: the embedded one, and the same through its gRPC service."""

from dataclasses import replace

import pytest

from farshore import rpc
from farshore.errors import TransportError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import LEASE_S, SETTLE_S, WorkerRecord
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.remote import DirectoryService, RemoteDirectory
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
)
OTHER = replace(
    RECORD,
    worker=WorkerId("dense-0-bb"),
    kind="dense",
    slot="dense-0",
    state="loading",
    progress="3 of 9 tensors",
)


def through_grpc(directory):
    server, address = rpc.serve(
        lambda server: pb_grpc.add_DirectoryServicer_to_server(DirectoryService(directory), server),
        service=pb.DESCRIPTOR.services_by_name["Directory"].full_name,
        listen="127.0.0.1:0",
        threads=2,
    )
    return server, RemoteDirectory(address)


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


def test_a_directory_that_does_not_answer_raises():
    server, remote = through_grpc(EmbeddedDirectory())
    server.stop(0).wait()
    for call in (remote.listing, lambda: remote.renew(RECORD)):
        with pytest.raises(TransportError, match="directory"):
            call()
    remote.disconnect()
