"""A worker's lease: renewed from a thread of its own, whatever the directory does."""

import threading

import pytest

from farshore.errors import InvalidRequest, TransportError, Unauthenticated
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import WorkerRecord
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.workers import lease as lease_module
from farshore.workers.lease import Lease

DEADLINE_S = 60.0
RECORD = WorkerRecord(
    worker=WorkerId("attention-0-aa"),
    kind="attention",
    slot="attention-0",
    address="127.0.0.1:7",
    host="127.0.0.1",
    process_id=1,
    state="serving",
)


class Directory(EmbeddedDirectory):
    """Counts renewals, and can be away. On its clock no lease runs out."""

    def __init__(self):
        super().__init__(clock=lambda: 0.0)
        self.away = False
        self.refusal = None
        self.tried = threading.Semaphore(0)

    def renew(self, record):
        self.tried.release()
        if self.away:
            raise TransportError("the directory: UNAVAILABLE")
        if self.refusal is not None:
            raise self.refusal
        super().renew(record)

    def await_renewals(self, count):
        """Waits until so many calls that began after this one have been made, but for the end of the last."""
        while self.tried.acquire(blocking=False):
            pass
        for _ in range(count):
            assert self.tried.acquire(timeout=DEADLINE_S)


@pytest.fixture
def directory():
    return Directory()


def test_it_is_listed_until_it_ends(directory):
    lease = Lease(directory, lambda: RECORD, period_s=0.01)
    directory.await_renewals(3)
    assert directory.listing().workers == (RECORD,)
    for _ in range(2):
        lease.end()
    assert directory.listing().workers == ()


def test_a_directory_that_is_away_is_asked_again(directory):
    directory.away = True
    lease = Lease(directory, lambda: RECORD, period_s=0.01)
    directory.await_renewals(3)
    assert directory.listing().workers == ()
    directory.away = False
    directory.await_renewals(2)
    assert directory.listing().workers == (RECORD,)
    lease.end()


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (Unauthenticated("the call's time is 40 s behind"), "not listed any more: the call's time is 40"),
        (InvalidRequest("state 'dreaming'"), "not listed any more: state 'dreaming'"),
        (KeyError("dreaming"), "the lease can't be renewed"),
    ],
)
def test_what_an_operator_must_mend_is_logged_once_and_tried_again(directory, caplog, refusal, message):
    """Until then the worker is off the list: its thread must go on."""
    directory.refusal = refusal
    lease = Lease(directory, lambda: RECORD, period_s=0.01)
    directory.await_renewals(4)
    directory.refusal = None
    directory.await_renewals(2)
    assert directory.listing().workers == (RECORD,)
    lease.end()
    (record,) = (record for record in caplog.records if record.name == lease_module.__name__)
    assert message in record.message
