"""Beats over gRPC: they renew an engine's lease on its holds, and reconcile after a shard was frozen."""

import os
import signal
import time
from contextlib import suppress
from functools import partial

import grpc
import pytest

from farshore.attention_offload.shard.engine_holds import LEASE_S
from farshore.attention_offload.shard.service import AttentionService
from farshore.errors import Cancelled, FarshoreError, InvalidRequest, NotFound, TransportError
from farshore.ids import SequenceId
from farshore.proto import attention_pb2 as pb

DEADLINE_S = 60.0
RECOVERED_WITHIN_S = 0.8 * LEASE_S
"""The limit for the time between a thaw and the return of all memory. The end of a lease would return it."""

A, B = SequenceId("a"), SequenceId("b")


@pytest.fixture
def shard(start_shard, clock):
    return start_shard(service=partial(AttentionService, clock=clock))


def pass_s(shard, clock, seconds):
    for _ in range(int(seconds)):
        clock.now_s += 1
        shard.service.holds.tick()


def test_a_beat_reports_the_shards_identity_and_memory(shard, reach, work):
    client = reach(shard.address)
    work.sealed_span(client.store, "a", 0, 20)
    beat, identity = client.store.beat(None), client.identify()
    assert beat[:5] == (
        identity.worker,
        identity.incarnation,
        identity.budget_bytes,
        identity.free_bytes,
        identity.attended_bytes,
    )
    assert identity.incarnation == shard.store.incarnation and beat.must_reconcile
    assert identity.free_bytes < identity.budget_bytes


@pytest.mark.parametrize("sign", ["beat", "read", "write", "seal"])
def test_every_call_of_an_engine_keeps_its_holds(shard, reach, work, clock, sign):
    client, other = reach(shard.address), reach(shard.address)
    read = work.sealed_span(client.store, "a", 0, 20)
    work.sealed_span(other.store, "b", 0, 20)
    unsealed = client.store.create(work.key("a"), capacity_tokens=20, layout=work.layout, epoch=work.owner)
    pass_s(shard, clock, LEASE_S - 1)
    {
        "beat": lambda: client.store.beat(None),
        "read": lambda: client.store.read(read.span, 0, 0, 1, sequence=A),
        "write": lambda: client.store.write(unsealed, 0, 0, *work.tokens(1), sequence=A, epoch=work.owner),
        "seal": lambda: client.store.seal(read.span, 20, sequence=A, epoch=work.owner),
    }[sign]()
    pass_s(shard, clock, 1)
    assert shard.store.sequences() == {A}
    pass_s(shard, clock, LEASE_S)
    usage = shard.store.usage()
    assert not shard.store.sequences() and usage.free_bytes == usage.budget_bytes
    with pytest.raises(NotFound):
        client.store.read(read.span, 0, 0, 1, sequence=A)


def test_clients_of_one_engine_share_its_lease(shard, reach, work, clock):
    first, second = (reach(shard.address, engine="one") for _ in range(2))
    read = work.sealed_span(first.store, "a", 0, 20)
    pass_s(shard, clock, LEASE_S - 1)
    second.store.beat(None)
    pass_s(shard, clock, 1)
    assert first.store.read(read.span, 0, 0, 20, sequence=A)[0].shape[1] == 20


def test_a_complete_beat_names_the_holds_to_keep_and_the_others_are_dropped(shard, reach, work):
    store = reach(shard.address).store
    kept, gone = (work.sealed_span(store, "a", first, first + 20).span for first in (0, 20))
    ended = work.sealed_span(store, "b", 0, 20).span
    assert not store.beat({(A, work.owner): [kept]}).must_reconcile
    assert [info.span for info in shard.store.announce()] == [kept]
    assert store.read(kept, 0, 0, 20, sequence=A)[0].shape[1] == 20
    for span in (gone, ended):
        with pytest.raises(NotFound, match="held through this connection"):
            store.read(span, 0, 0, 20, sequence=A)
    assert not store.beat({}).must_reconcile
    assert shard.store.announce() == []


@pytest.mark.parametrize("engine", ["", "x" * 300])
def test_a_call_without_a_valid_engine_is_refused(shard, reach, work, engine):
    client = reach(shard.address)
    request = pb.HoldRequest(sequence_id="a", epoch=1, caller=pb.Caller(engine=engine))
    for method in (client._stub.Hold, client._stub.Drop):
        with pytest.raises(InvalidRequest, match="an engine's incarnation"):
            client.store._call(method, request)


def test_calls_sent_before_a_complete_list_are_refused_after_it(shard, reach, work):
    client = reach(shard.address, engine="one")
    sent_ns = time.monotonic_ns()
    client.store.beat({})
    hold = pb.HoldRequest(sequence_id="a", epoch=1, caller=pb.Caller(engine="one", sent_ns=sent_ns))
    with pytest.raises(TransportError, match="has listed what it wants") as caught:
        client.store._call(client._stub.Hold, hold)
    assert not isinstance(caught.value, Cancelled)
    work.sealed_span(client.store, "a", 0, 20)


# -- a frozen shard ----------------------------------------------------------------------------------------


def thaw(process):
    process.process.send_signal(signal.SIGCONT)
    os.waitpid(process.process.pid, os.WCONTINUED)


def eventually_s(condition, within_s):
    """Seconds until the condition holds."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() < start_s + within_s, f"not within {within_s} s"
    return time.monotonic() - start_s


@pytest.mark.heavy
@pytest.mark.parametrize("keeps", [False, True], ids=["nothing", "one span"])
def test_all_memory_is_free_again_after_a_thaw(start_process, reach, work, keeps):
    """The queues of a thawed shard hold creates, holds and drops that their callers have given up."""
    process = start_process()
    client, hasty = reach(process.address, engine="one"), reach(process.address, engine="one", deadline_s=0.2)
    read = work.sealed_span(client.store, "a", 0, 20)
    budget_bytes = client.identify().budget_bytes
    wanted = {(A, work.owner): [read.span]} if keeps else {}
    client.store.beat(wanted)
    if not keeps:
        read = work.sealed_span(client.store, "a", 0, 20)
    expected = work.run(client, work.step([read]))
    process.freeze()
    frozen_s = time.monotonic()
    given_up = 0
    while time.monotonic() < frozen_s + 4 or given_up < 10:
        for call in (
            lambda: hasty.store.create(
                work.key("a"), capacity_tokens=20, layout=work.layout, epoch=work.owner
            ),
            lambda: hasty.store.create(
                work.key("b"), capacity_tokens=20, layout=work.layout, epoch=work.owner
            ),
            lambda: hasty.store.hold([read.span], sequence=B, epoch=work.owner),
            lambda: hasty.store.beat(wanted),
            lambda: hasty._stub.Drop(
                pb.HoldRequest(span_ids=["shard/else/0"], sequence_id="b", caller=hasty.store._caller()),
                timeout=0.2,
            ),
        ):
            with pytest.raises((FarshoreError, grpc.RpcError)):
                call()
            given_up += 1
    thaw(process)
    start_s = time.monotonic()

    def asks_for_a_list():
        with suppress(TransportError):
            return client.store.beat(None).must_reconcile
        return False

    eventually_s(asks_for_a_list, RECOVERED_WITHIN_S)

    def is_reconciled():
        with suppress(TransportError):
            beat = client.store.beat(wanted)
            held = [info.span for info in client.store.announce() if info.holders]
            return not beat.must_reconcile and held == ([read.span] if keeps else [])
        return False

    eventually_s(is_reconciled, RECOVERED_WITHIN_S)
    assert time.monotonic() - start_s <= RECOVERED_WITHIN_S
    if keeps:
        assert work.run(client, work.step([read], number=2)) == expected
        client.store.beat({})
    assert client.identify().free_bytes == budget_bytes
    # The shard serves steps as before.
    assert work.run(client, work.step([work.sealed_span(client.store, "a", 0, 20)], number=3)) == expected
