"""The embedded directory: leases."""

import pytest

from farshore.errors import InvalidRequest, NotFound
from farshore.ids import WorkerId
from farshore.kvstore.directory.embedded import EmbeddedDirectory

OTHER, SHARD = WorkerId("other"), WorkerId("shard")


@pytest.fixture
def directory(clock) -> EmbeddedDirectory:
    return EmbeddedDirectory(clock=clock)


def register(directory, worker=SHARD, *, ttl_s=5.0, address="a:1"):
    return directory.register(
        worker, kind="shard", address=address, capabilities={"device": "cpu"}, ttl_s=ttl_s
    )


def test_a_worker_is_listed_while_its_lease_holds(directory, clock):
    lease = register(directory)
    register(directory, OTHER, ttl_s=20.0)
    (record, _) = directory.workers()
    assert (record.worker, record.kind, record.address) == (SHARD, "shard", "a:1")
    assert record.capabilities == {"device": "cpu"}
    clock.now_s += 4
    directory.renew(lease)
    clock.now_s += 4
    assert [record.worker for record in directory.workers()] == [SHARD, OTHER]
    clock.now_s += 1
    assert [record.worker for record in directory.workers()] == [OTHER]
    with pytest.raises(NotFound):
        directory.renew(lease)


def test_registering_again_voids_the_earlier_lease(directory):
    old = register(directory)
    new = register(directory, address="b:2")
    assert [record.address for record in directory.workers()] == ["b:2"]
    with pytest.raises(NotFound):
        directory.renew(old)
    directory.renew(new)


def test_a_lease_needs_a_positive_ttl(directory):
    with pytest.raises(InvalidRequest):
        register(directory, ttl_s=0)
