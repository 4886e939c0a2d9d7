"""Which engines a gateway uses when the directory lists others, lists none, lies, or does not answer."""

from dataclasses import replace

import pytest

from farshore.errors import TransportError
from farshore.gateway.limits import Limits
from farshore.kvstore.directory.base import Load
from farshore.kvstore.directory.connect import open_directory

from ...waiting import until

LIMITS = Limits(probe_s=0.1, missed_probes=1000, drain_s=0.1)
"""Engines that answer are not taken for frozen on a busy machine."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("farshore.gateway.engines.discovery.PERIOD_S", 0.05)


@pytest.fixture
def two(harness, loop_thread):
    """Two FakeEngines that answer at once."""
    with harness.engine(loop_thread) as first, harness.engine(loop_thread) as second:
        first.auto = second.auto = ()
        yield first, second


def used(farshore):
    """The engines that take new requests."""
    return {engine.worker for engine in farshore.gateway.engines.available()}


def await_looks(farshore):
    """Waits until the gateway has read the directory twice more, so that it has acted on the first list."""
    enough = farshore.directory.reads + 2
    until(lambda: farshore.directory.reads >= enough)


def test_a_real_directory_that_goes_away(start, harness, directory, two):
    first, second = two
    directory.embedded.renew(harness.dense("dense-0-a", first.address))
    opened = open_directory(directory.url)
    farshore = start(directory=opened, limits=LIMITS)
    until(lambda: used(farshore) == {"dense-0-a"})
    assert len(list(farshore.generate())) == 2
    directory.embedded.renew(harness.dense("dense-1-a", second.address, state="loading"))
    directory.embedded.renew(harness.dense("dense-1-b", second.address))
    until(lambda: used(farshore) == {"dense-0-a", "dense-1-b"})
    directory.stop()
    first.stop()
    until(lambda: used(farshore) == {"dense-1-b"})
    assert len(list(farshore.generate())) == 2
    opened.disconnect()


@pytest.mark.parametrize("error", [TransportError("no answer"), KeyError("a state of a newer version")])
def test_a_directory_that_is_away_changes_nothing(start, harness, two, error):
    first, second = two
    listed = harness.ListedEngines(harness.dense("dense-0-a", first.address))
    farshore = start(directory=listed, limits=LIMITS)
    until(lambda: used(farshore) == {"dense-0-a"})
    listed.fail(error)
    await_looks(farshore)
    assert len(list(farshore.generate())) == 2
    listed.list(harness.dense("dense-1-a", second.address))
    until(lambda: used(farshore) == {"dense-1-a"})


def test_a_record_that_makes_no_sense_ends_no_watch(start, harness, two):
    first, second = two
    listed = harness.ListedEngines(harness.dense("dense-0-a", first.address))
    farshore = start(directory=listed, limits=LIMITS)
    until(lambda: used(farshore) == {"dense-0-a"})
    listed.list(harness.dense("dense-0-a", first.address, load="much"))
    await_looks(farshore)
    assert len(list(farshore.generate())) == 2
    listed.list(harness.dense("dense-1-a", second.address))
    until(lambda: used(farshore) == {"dense-1-a"})


@pytest.mark.parametrize("settled", [False, True])
def test_an_empty_list_proves_nothing(start, harness, two, settled):
    """Neither from a directory that lost all, nor from one that has really heard of no engine: the engine
    answers the gateway itself."""
    listed = harness.ListedEngines(harness.dense("dense-0-a", two[0].address))
    farshore = start(directory=listed, limits=LIMITS)
    until(lambda: used(farshore) == {"dense-0-a"})
    listed.list(settled=settled)
    await_looks(farshore)
    assert used(farshore) == {"dense-0-a"}
    listed.list(harness.dense("dense-1-a", two[1].address), settled=False)
    until(lambda: used(farshore) == {"dense-0-a", "dense-1-a"})
    listed.list(harness.dense("dense-1-a", two[1].address))
    until(lambda: used(farshore) == {"dense-1-a"})


def test_an_address_where_something_else_listens(start, harness, two):
    """Nothing, a gateway, or the same engine under another name."""
    first, second = two
    other = start(directory=harness.ListedEngines(), limits=LIMITS)
    listed = harness.ListedEngines(
        harness.dense("dense-0-a", first.address),
        harness.dense("dense-0-b", "127.0.0.1:1"),
        harness.dense("dense-0-c", other.address),
        harness.dense("dense-0-d", first.address),
        harness.dense("dense-0-e", ""),
        harness.dense("attention-0-a", second.address, kind="attention"),
    )
    farshore = start(directory=listed, limits=LIMITS)
    until(lambda: used(farshore) == {"dense-0-a", "dense-0-d"})
    for _ in range(4):
        assert len(list(farshore.generate())) == 2
    assert second.idle


def test_a_false_address_is_corrected_and_does_not_end_what_runs(start, harness, two):
    first, second = two
    first.auto = None
    listed = harness.ListedEngines(harness.dense("dense-0-a", "127.0.0.1:1"))
    farshore = start(directory=listed, limits=LIMITS)
    assert not used(farshore)
    listed.list(harness.dense("dense-0-a", first.address))
    until(lambda: used(farshore) == {"dense-0-a"})
    call = farshore.generate()
    sequence = first.next_sequence()
    listed.list(harness.dense("dense-0-a", second.address))
    await_looks(farshore)
    sequence.tokens(10)
    sequence.finish()
    assert len(list(call)) == 3


def test_an_engine_of_another_model_is_not_used(start, harness, two):
    first, second = two
    listed = harness.ListedEngines(
        harness.dense("dense-0-a", first.address, spec='{"model": "a"}'),
        harness.dense("dense-1-a", second.address, spec='{"model": "b"}'),
    )
    farshore = start(directory=listed, limits=LIMITS, announced_spec='{"model": "b"}')
    until(lambda: used(farshore) == {"dense-1-a"})


def test_the_load_that_other_gateways_cause_counts(start, harness, two):
    first, second = two
    listed = harness.ListedEngines(
        harness.dense("dense-0-a", first.address, load=Load(running=3, waiting=1)),
        harness.dense("dense-1-a", second.address, load=Load()),
    )
    farshore = start(directory=listed, limits=LIMITS)
    until(lambda: used(farshore) == {"dense-0-a", "dense-1-a"})
    for _ in range(4):
        list(farshore.generate())
    assert first.idle and not second.idle


def test_a_list_of_too_many_is_cut(start, harness, two):
    records = [harness.dense(f"dense-{i}-a", two[0].address) for i in range(20)]
    farshore = start(directory=harness.ListedEngines(*records), limits=replace(LIMITS, most_engines=5))
    until(lambda: used(farshore) == {f"dense-{i}-a" for i in range(5)})
    await_looks(farshore)
    assert len(used(farshore)) == 5
