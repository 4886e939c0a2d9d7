"""A frozen attention worker among three, real processes: late at the deadline in force, while the others stay
as they are; and one that is killed is lost."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from farshore.attention_offload.fanout.fanout import Fanout
from farshore.attention_offload.fanout.latency import DEADLINE_LEAST_FRAMES
from farshore.attention_offload.plan.step_plan import StepPlan
from farshore.attention_offload.transport.frames import native
from farshore.errors import Late, Lost, TransportError
from farshore.ids import SequenceId, WorkerId

pytestmark = pytest.mark.skipif(native() is None, reason="needs the native module")

NAMES = tuple(WorkerId(name) for name in "xyz")
SEQUENCE = SequenceId("a")
WHOLE = (range(1),)


@pytest.fixture(scope="module")
def processes(worker_process):
    started = {name: worker_process(worker=name) for name in NAMES}
    yield started
    for it in started.values():
        it.process.send_signal(signal.SIGCONT)
        it.kill()


class Engine:
    """What an engine does of a step, over three shards that each hold a third of one sequence."""

    def __init__(self, work, clients):
        self.work = work
        self.clients = clients
        self.fanout = Fanout(clients, work.model)
        self.reads = {}
        for at, (name, client) in enumerate(clients.items()):
            client.store.drop_sequence(SEQUENCE, epoch=work.owner)
            self.reads[name] = (work.sealed_span(client.store, SEQUENCE, 20 * at, 20 * at + 20),)
            client.connect()
        self.number = 0

    def step(self, *, of=NAMES, during=lambda layer: None):
        """Every layer's states."""
        self.number += 1
        reads = {name: self.reads[name] for name in of}
        epochs = {SEQUENCE: self.work.owner}
        self.fanout.begin(StepPlan(self.number, 3, (SEQUENCE,), (60,), epochs, (reads,)), WHOLE)
        states = []
        for layer in range(self.work.layers):
            during(layer)
            self.fanout.send(layer, 0, self.work.query(seed=layer))
            states += [torch.cat([it.flatten() for it in state]) for state in self.fanout.wait(layer, 0)]
        return states

    def settle(self):
        """Until deadlines follow from what was seen."""
        for _ in range(DEADLINE_LEAST_FRAMES // self.work.layers + 2):
            self.step()
        assert all(0.1 <= self.deadline_s(name) <= 0.4 for name in NAMES)

    def deadline_s(self, name):
        """In force."""
        (found,) = [link.deadline_ms for link in self.fanout.links() if link.worker_id == name]
        return found / 1e3

    def connections(self):
        return [self.clients[name]._connected for name in NAMES]


@pytest.fixture
def engine(work, reach, processes, transport):
    return Engine(work, {name: reach(it.address, transports=(transport,)) for name, it in processes.items()})


def freezing(*processes, at):
    def during(layer):
        if layer == at:
            for it in processes:
                it.freeze()

    return during


def thaw(*processes):
    for it in processes:
        it.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("at", [0, 1])
def test_a_frozen_shard_is_late_by_the_deadline_in_force_and_exact_again_when_it_wakes(engine, processes, at):
    expected = engine.step()
    engine.settle()
    before = engine.connections()
    frozen = processes[NAMES[1]]
    with pytest.raises(Late, match=frozen.address) as late:
        engine.step(during=freezing(frozen, at=at))
    assert late.value.shards == {NAMES[1]} and late.value.retryable
    assert f"no answer in time: {engine.deadline_s(NAMES[1]):.3g} s" in str(late.value)
    # The others: at once, on the connections that they had, whatever they owe.
    others = (NAMES[0], NAMES[2])
    for _ in range(3):
        found = engine.step(of=others)
        assert all(map(torch.equal, found, [it for i, it in enumerate(expected) if i % 3 != 1]))
    # With it: at once again, without another deadline.
    with pytest.raises(Late, match="no connection") as late:
        engine.step()
    assert late.value.shards == {NAMES[1]}
    with pytest.raises(TransportError, match=frozen.address):
        engine.clients[NAMES[1]].connect(deadline_s=0.2)
    thaw(frozen)
    assert not engine.clients[NAMES[1]].ready
    engine.clients[NAMES[1]].connect()
    assert all(map(torch.equal, engine.step(), expected))
    after = engine.connections()
    assert [a is b for a, b in zip(after, before, strict=True)] == [True, False, True]
    failures = {link.worker_id: link.failures for link in engine.fanout.links()}
    assert failures == {NAMES[0]: 0, NAMES[1]: 2, NAMES[2]: 0}


def test_all_that_are_late_are_named(engine, processes):
    expected = engine.step()
    frozen = [processes[name] for name in NAMES[:2]]
    with pytest.raises(Late) as late:
        engine.step(during=freezing(*frozen, at=1))
    assert late.value.shards == set(NAMES[:2])
    thaw(*frozen)
    for name in NAMES[:2]:
        engine.clients[name].connect()
    assert all(map(torch.equal, engine.step(), expected))


def test_connecting_beside_the_loop_disturbs_no_live_connection(engine):
    """Another thread connects, again and again, while steps run; and while one connection is broken off."""
    expected = engine.step()
    over = threading.Event()

    def connect():
        while not over.is_set():
            for client in engine.clients.values():
                client.connect()

    with ThreadPoolExecutor(1) as thread:
        connecting = thread.submit(connect)
        try:
            before = engine.connections()
            for _ in range(50):
                assert all(map(torch.equal, engine.step(), expected))
            assert all(a is b for a, b in zip(engine.connections(), before, strict=True))
            for _ in range(20):
                engine.clients[NAMES[1]].break_off()
                found = None
                while found is None:
                    with suppress(Late):
                        found = engine.step()
                assert all(map(torch.equal, found, expected))
        finally:
            over.set()
        connecting.result()
    before = engine.connections()
    assert [a is b for a, b in zip(engine.connections(), before, strict=True)] == [True, True, True]


def test_a_killed_shard_is_lost(work, reach, start_process, transport):
    processes = {name: start_process(worker=name) for name in NAMES}
    engine = Engine(
        work, {name: reach(it.address, transports=(transport,)) for name, it in processes.items()}
    )
    expected = engine.step()

    def kill(layer):
        if layer == 1:
            processes[NAMES[2]].kill()

    with pytest.raises(Lost, match=processes[NAMES[2]].address) as lost:
        engine.step(during=kill)
    assert lost.value.shards == {NAMES[2]} and lost.value.retryable
    found = engine.step(of=NAMES[:2])
    assert all(map(torch.equal, found, [it for i, it in enumerate(expected) if i % 3 != 2]))
    with pytest.raises(Late) as late:
        engine.step()
    assert late.value.shards == {NAMES[2]}
    with pytest.raises(TransportError, match=processes[NAMES[2]].address):
        engine.clients[NAMES[2]].connect(deadline_s=5.0)
