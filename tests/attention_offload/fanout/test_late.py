"""Tests with three attention workers in real processes. A frozen worker is late at the current deadline and
the others are not disturbed; a killed worker is lost."""

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
ONE_BATCH = (range(1),)


@pytest.fixture(scope="module")
def processes(worker_process):
    started = {name: worker_process(worker=name) for name in NAMES}
    yield started
    for worker in started.values():
        worker.process.send_signal(signal.SIGCONT)
        worker.kill()


class Engine:
    """Runs steps as an engine does, over three shards that each hold a third of one sequence."""

    def __init__(self, work, clients):
        self.work = work
        self.clients = clients
        self.fanout = Fanout(clients, work.model)
        self.reads = {}
        for index, (name, client) in enumerate(clients.items()):
            client.store.drop_sequence(SEQUENCE, epoch=work.owner)
            self.reads[name] = (work.sealed_span(client.store, SEQUENCE, 20 * index, 20 * index + 20),)
            client.connect()
        self.number = 0

    def step(self, *, of=NAMES, during=lambda layer: None):
        """Runs a step that reads from the shards ``of``. Returns the flattened states of all layers."""
        self.number += 1
        reads = {name: self.reads[name] for name in of}
        epochs = {SEQUENCE: self.work.owner}
        self.fanout.begin(StepPlan(self.number, 3, (SEQUENCE,), (60,), epochs, (reads,)), ONE_BATCH)
        states = []
        for layer in range(self.work.layers):
            during(layer)
            self.fanout.send(layer, 0, self.work.query(seed=layer))
            states += [
                torch.cat([field.flatten() for field in state]) for state in self.fanout.wait(layer, 0)
            ]
        return states

    def settle(self):
        """Notes so many slow answers that the deadlines are derived from them: 100 ms + 4 × 100 ms, and not
        1 s. Those of a busy machine could be too short for the shards that are not frozen."""
        for name in NAMES:
            record = self.fanout._records[name]
            record.answered(*[0.1] * DEADLINE_LEAST_FRAMES)
            record.frames += DEADLINE_LEAST_FRAMES
        self.step()
        assert all(0.4 <= self.deadline_s(name) <= 0.7 for name in NAMES)

    def deadline_s(self, name):
        """The current deadline of frames to the shard."""
        (deadline_ms,) = [link.deadline_ms for link in self.fanout.links() if link.worker_id == name]
        return deadline_ms / 1e3

    def connections(self):
        return [self.clients[name]._newest for name in NAMES]


@pytest.fixture
def engine(work, reach, processes, transport):
    return engine_over(processes, work, reach, transport)


def engine_over(processes, work, reach, transport):
    clients = {name: reach(worker.address, transports=(transport,)) for name, worker in processes.items()}
    return Engine(work, clients)


def freezing(*processes, layer):
    """A function for ``Engine.step(during=)`` that freezes the processes before the layer's frames."""

    def during(current_layer):
        if current_layer == layer:
            for worker in processes:
                worker.freeze()

    return during


def thaw(*processes):
    for worker in processes:
        worker.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_frozen_shard_is_late_by_the_current_deadline_and_exact_again_when_it_wakes(
    engine, processes, layer
):
    expected = engine.step()
    engine.settle()
    before = engine.connections()
    frozen = processes[NAMES[1]]
    with pytest.raises(Late, match=frozen.address) as late:
        engine.step(during=freezing(frozen, layer=layer))
    assert late.value.shards == {NAMES[1]} and late.value.retryable
    assert f"no answer in time: {engine.deadline_s(NAMES[1]):.3g} s" in str(late.value)
    # The other shards serve steps at once, on their old connections, although they owe answers.
    others = (NAMES[0], NAMES[2])
    for _ in range(3):
        found = engine.step(of=others)
        assert all(map(torch.equal, found, [state for i, state in enumerate(expected) if i % 3 != 1]))
    # A step that reads from the frozen shard fails at once, without another deadline.
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


def test_all_late_shards_are_named(engine, processes):
    expected = engine.step()
    frozen = [processes[name] for name in NAMES[:2]]
    with pytest.raises(Late) as late:
        engine.step(during=freezing(*frozen, layer=1))
    assert late.value.shards == set(NAMES[:2])
    thaw(*frozen)
    for name in NAMES[:2]:
        engine.clients[name].connect()
    assert all(map(torch.equal, engine.step(), expected))


def test_connecting_in_another_thread_disturbs_no_live_connection(engine):
    """Another thread connects all clients repeatedly while steps run, and while the loop breaks one
    connection off."""
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
    engine = engine_over(processes, work, reach, transport)
    expected = engine.step()

    def kill(layer):
        if layer == 1:
            processes[NAMES[2]].kill()

    with pytest.raises(Lost, match=processes[NAMES[2]].address) as lost:
        engine.step(during=kill)
    assert lost.value.shards == {NAMES[2]} and lost.value.retryable
    found = engine.step(of=NAMES[:2])
    assert all(map(torch.equal, found, [state for i, state in enumerate(expected) if i % 3 != 2]))
    with pytest.raises(Late) as late:
        engine.step()
    assert late.value.shards == {NAMES[2]}
    with pytest.raises(TransportError, match=processes[NAMES[2]].address):
        engine.clients[NAMES[2]].connect(deadline_s=5.0)
