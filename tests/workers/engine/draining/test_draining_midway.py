"""Drains that begin in the middle of a segment's write, of a hand-off, and of a copy.

The middle is held up until the engine has taken the change in, so that no test depends on the time.
"""

import threading

import pytest

from farshore.kvstore.store import transfer
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.membership import Draining, Opened
from farshore.workers.engine.sequence import Sampled

from ....waiting import until
from ...hold.endless import ENDLESS, end, end_greedy

PROMPT = [(7 * i) % 95 for i in range(1900)]
COPIED = PROMPT[:600]
LAYERS = 3
"""Layers of the tiny model: the writes of a segment that lies in one span."""
SEGMENT_TOKENS = 256
DEADLINE_S = 60.0


class HeldUp:
    """Blocks one call until :meth:`go_on`, and notes the worker at which it was made."""

    def __init__(self):
        self._lock = threading.Lock()
        self._begun, self._go_on = threading.Event(), threading.Event()
        self.worker = None

    def pass_through(self, worker):
        with self._lock:
            first = self.worker is None
            self.worker = self.worker or worker
        if first:
            self._begun.set()
            assert self._go_on.wait(DEADLINE_S)

    def await_begun(self):
        assert self._begun.wait(DEADLINE_S), "the call was not made"
        return self.worker

    def go_on(self):
        self._go_on.set()


@pytest.fixture
def hold_up_write(monkeypatch):
    """hold_up_write(rig, writes, ...) -> HeldUp: of the first write to any shard after so many others."""

    def hold_up(made, *, after=0):
        held, lock, left = HeldUp(), threading.Lock(), [after]

        def of(worker, write):
            def slow(*args, **options):
                with lock:
                    left[0] -= 1
                    due = left[0] < 0
                if due:
                    held.pass_through(worker)
                return write(*args, **options)

            return slow

        for worker in made.targets:
            monkeypatch.setattr(made.stores[worker], "write", of(worker, made.stores[worker].write))
        return held

    return hold_up


@pytest.fixture
def hold_up_copy(monkeypatch):
    """hold_up_copy(rig) -> HeldUp: of the first import by any shard, after its first piece."""

    def hold_up(made):
        held, verified = HeldUp(), transfer.verified_images
        targets = threading.local()

        def slow(chunks):
            for image in verified(chunks):
                yield image
                held.pass_through(targets.worker)

        def of(worker, store_copy):
            def noted(*args):
                targets.worker = worker
                return store_copy(*args)

            return noted

        monkeypatch.setattr(transfer, "verified_images", slow)
        for worker, shard in made.served.items():
            imports = shard.service.imports
            monkeypatch.setattr(imports, "_store_copy", of(worker, imports._store_copy))
        return held

    return hold_up


def announce(engine, change):
    """Announces a drain or its end, and waits until the engine has taken it in."""
    engine.announce(change)
    drains = isinstance(change, Draining)
    until(lambda: (change.worker in engine.drains()) == drains, "the engine does not take it in")


def await_empty(made, engine, worker):
    until(lambda: not engine.readers().get(worker), f"spans stay: {engine.drains()}")
    until(lambda: not any(i.holders for i in made.stores[worker].announce()), "a span is still held")


def await_token(collected):
    while not isinstance(event := collected.events.get(timeout=DEADLINE_S), Sampled):
        pass
    collected.choices[0].append(event.token_id)


@pytest.mark.parametrize("shard_by", ["range", "head"])
@pytest.mark.parametrize("segments", [0, 1])
def test_a_drain_while_a_segment_is_written(is_greedy, cluster, submit, hold_up_write, shard_by, segments):
    made = cluster(shard_by=shard_by)
    shares = 1 if shard_by == "range" else len(made.targets)
    held = hold_up_write(made, after=segments * LAYERS * shares + 1)
    engine = made.start(limits=EngineLimits(segment_tokens=SEGMENT_TOKENS))
    running = submit(engine, "a", PROMPT, ENDLESS)
    victim = held.await_begun()
    announce(engine, Draining(victim))
    held.go_on()
    await_token(running)
    written = (segments + 1) * SEGMENT_TOKENS
    (view,) = engine.views()
    assert all(span.last <= written for span in view.spans if span.worker == victim), view.spans
    await_empty(made, engine, victim)
    end_greedy(engine, "a", running, PROMPT, is_greedy)


def test_a_drain_while_a_block_is_handed_off_to_a_span_that_exists(is_greedy, cluster, submit, hold_up_write):
    prompt = PROMPT[:200]
    made = cluster(shards=2)
    engine = made.start()
    running = submit(engine, "a", prompt, ENDLESS)
    await_token(running)
    held = hold_up_write(made)
    victim = held.await_begun()
    assert engine.readers() == {victim: 1}
    announce(engine, Draining(victim))
    held.go_on()
    until(lambda: tail_first(engine) >= 256, "the block was not handed off")
    await_empty(made, engine, victim)
    end_greedy(engine, "a", running, prompt, is_greedy)


def tail_first(engine):
    return max((view.tail_first for view in engine.views()), default=0)


def run_until_copied(cluster, submit, hold_up_copy, names="a"):
    """Runs a sequence of each name, drains the shard that their prompt lies on, and holds up the copy of its
    span. Returns (cluster, engine, what the sequences give, the held call, the shard, the copy's shard)."""
    made = cluster()
    engine = made.start()
    running = [submit(engine, name, COPIED, ENDLESS) for name in names]
    for collected in running:
        await_token(collected)
    held = hold_up_copy(made)
    source = next(span.worker for span in engine.views()[0].spans if span.first == 0)
    announce(engine, Draining(source))
    return made, engine, running, held, source, held.await_begun()


def test_the_target_of_a_copy_drains_meanwhile(is_greedy, cluster, submit, hold_up_copy):
    made, engine, (running,), held, source, target = run_until_copied(cluster, submit, hold_up_copy)
    announce(engine, Draining(target))
    held.go_on()
    await_empty(made, engine, source)
    await_empty(made, engine, target)
    (third,) = set(made.targets) - {source, target}
    assert engine.readers() == {third: 1}
    end_greedy(engine, "a", running, COPIED, is_greedy)


def test_a_drain_that_is_undone_in_the_middle_of_a_copy(is_greedy, cluster, submit, hold_up_copy):
    made, engine, (running,), held, source, target = run_until_copied(cluster, submit, hold_up_copy)
    announce(engine, Opened(source))
    held.go_on()
    until(lambda: engine.readers().get(target), "the sequence does not read the copy")
    announce(engine, Draining(source))
    await_empty(made, engine, source)
    end_greedy(engine, "a", running, COPIED, is_greedy)


def test_one_of_two_sharers_ends_in_the_middle_of_a_copy(is_greedy, cluster, submit, hold_up_copy):
    made, engine, (first, second), held, source, _ = run_until_copied(cluster, submit, hold_up_copy, "ab")
    assert engine.readers()[source] == 2
    end(engine, "a", first)
    held.go_on()
    await_empty(made, engine, source)
    end_greedy(engine, "b", second, COPIED, is_greedy)
