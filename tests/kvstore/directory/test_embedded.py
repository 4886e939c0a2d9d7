"""The embedded directory: leases, epochs, published spans and debts."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from farshore.errors import Fenced, InvalidRequest, NotFound
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kvstore.base import SpanInfo, SpanKey
from farshore.kvstore.directory.embedded import EmbeddedDirectory

ENGINE, OTHER, SHARD = WorkerId("engine"), WorkerId("other"), WorkerId("shard")
S, T = SequenceId("s"), SequenceId("t")


@pytest.fixture
def directory(clock) -> EmbeddedDirectory:
    return EmbeddedDirectory(clock=clock)


def register(directory, worker=SHARD, *, ttl_s=5.0, address="a:1"):
    return directory.register(
        worker, kind="shard", address=address, capabilities={"device": "cpu"}, ttl_s=ttl_s
    )


def info(span="x/0", *, bytes=4096, epoch=1) -> SpanInfo:
    key = SpanKey(sequence=S, layer_class=0, first=0, group0=0, group1=1)
    return SpanInfo(
        span=SpanId(span),
        key=key,
        sealed_tokens=3,
        capacity_tokens=9,
        bytes=bytes,
        epoch=Epoch(epoch),
        holders=1,
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


def test_every_claim_is_a_higher_epoch_also_after_forgetting(directory):
    first = directory.claim(S, ENGINE)
    second = directory.claim(S, OTHER)
    assert (directory.lookup(S).owner, directory.lookup(S).epoch) == (OTHER, second)
    directory.forget(S, second)
    third = directory.claim(S, ENGINE)
    assert first < second < third


def test_a_replaced_directory_can_start_higher():
    assert EmbeddedDirectory(first_epoch=1000).claim(S, ENGINE) == 1000


def test_concurrent_claims_have_one_winner(directory):
    with ThreadPoolExecutor(8) as pool:
        epochs = list(pool.map(lambda i: directory.claim(S, WorkerId(f"w{i}")), range(64)))
    assert len(set(epochs)) == 64
    assert directory.lookup(S).epoch == max(epochs)
    assert directory.lookup(S).owner == f"w{epochs.index(max(epochs))}"


def test_only_the_owner_publishes_and_forgets(directory):
    old = directory.claim(S, ENGINE)
    directory.publish(S, old, {SHARD: [info()]})
    new = directory.claim(S, OTHER)
    assert directory.lookup(S).spans == {SHARD: (info(),)}  # the new owner may take these over
    for call in (lambda: directory.publish(S, old, {}), lambda: directory.forget(S, old)):
        with pytest.raises(Fenced):
            call()
    directory.publish(S, new, {SHARD: [info("x/1"), info("x/2")]})
    assert directory.lookup(S).spans == {SHARD: (info("x/1"), info("x/2"))}
    with pytest.raises(InvalidRequest):
        directory.publish(S, Epoch(new + 1), {})


def test_unknown_and_forgotten_sequences_are_not_found(directory):
    with pytest.raises(NotFound):
        directory.lookup(S)
    with pytest.raises(NotFound):
        directory.publish(S, Epoch(1), {})
    epoch = directory.claim(S, ENGINE)
    for _ in range(2):
        directory.forget(S, epoch)
    with pytest.raises(NotFound):
        directory.lookup(S)
    with pytest.raises(NotFound):
        directory.publish(S, epoch, {})


def test_debts_are_the_bytes_that_others_lend(directory):
    epoch = directory.claim(S, ENGINE)
    directory.publish(S, epoch, {SHARD: [info(), info("x/1")], ENGINE: [info("e/0")], OTHER: []})
    directory.publish(T, directory.claim(T, ENGINE), {SHARD: [info("x/2", bytes=100)]})
    assert directory.debts() == {(SHARD, ENGINE): 8292}
    directory.claim(S, OTHER)
    assert directory.debts() == {(SHARD, OTHER): 8192, (ENGINE, OTHER): 4096, (SHARD, ENGINE): 100}
    directory.forget(T, directory.lookup(T).epoch)
    assert (SHARD, ENGINE) not in directory.debts()
