"""Requests run on two engines while shards join, drain, open again and leave at random; some are cancelled.

None fails, every token is the one that an undisturbed model gives, and no shard keeps anything. The long form
is run by command: ``pytest -m soak -s tests/workers/engine/draining``. Threads decide what happens when, so a
seed repeats what is done, not when.
"""

import random
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch

from farshore.ids import SequenceId, WorkerId
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.membership import Draining, Joined, Left, Opened
from farshore.workers.engine.sequence import Failed, Finished, Reason, Sampled

DEADLINE_S = 120.0
MEMORY_BYTES = 4 << 20
"""Memory of each shard. Tight: the live sequences need up to 12 MiB."""
LIVE = 24
"""Requests at a time, on both engines together."""
MOST_SHARDS, LEAST_OPEN = 6, 3
TIE = 1e-5
"""Logits of the tiny model that differ by less may swap places with the order in which partial attention is
merged: the likeliest two of a step differ by 0.03 on average."""


@dataclass(eq=False)
class Running:
    """A request and the tokens of its choices."""

    name: str
    engine: int
    prompt: list[int]
    sampling: Sampling
    tokens: list[list[int]] = field(default_factory=list)
    ends: list[Finished | Failed] = field(default_factory=list)


class Crowd:
    """The requests of a test. ``emit`` is called by the engines' threads."""

    def __init__(self, engines, draw):
        self._engines = engines
        self._draw = draw
        self._changed = threading.Condition()
        self._prefixes = [[draw.randrange(97) for _ in range(600)] for _ in range(6)]
        self._count = 0
        self.live = []
        self.ended = []

    def submit(self):
        draw, number = self._draw, self._count
        self._count += 1
        prompt = draw.choice(self._prefixes)[: draw.randrange(1, 600)]
        prompt = prompt + [draw.randrange(97) for _ in range(draw.choice([0, 5, 300]))]
        sampling = Sampling(
            max_tokens=draw.choice([1, 20, 80, 300]), n=draw.choice([1, 1, 1, 2]), temperature=0
        )
        running = Running(f"r{number}", draw.randrange(len(self._engines)), prompt, sampling)
        running.tokens = [[] for _ in range(sampling.n)]
        self.live.append(running)

        def emit(event):
            with self._changed:
                if isinstance(event, Sampled):
                    running.tokens[event.choice].append(event.token_id)
                elif isinstance(event, Finished | Failed):
                    running.ends.append(event)
                    self._changed.notify_all()

        self._engines[running.engine].submit(SequenceId(running.name), prompt, sampling, emit, epoch=1)

    def await_live(self, most):
        """Waits until at most so many requests run, and returns those that have ended meanwhile."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._reap() <= most, DEADLINE_S), "requests stand still"

    def cancel(self):
        if self.live:
            running = self._draw.choice(self.live)
            self._engines[running.engine].cancel(SequenceId(running.name))

    def _reap(self):
        done = [each for each in self.live if len(each.ends) == each.sampling.n or failed(each)]
        self.live = [each for each in self.live if each not in done]
        self.ended += done
        return len(self.live)


def failed(running):
    return [end.error for end in running.ends if isinstance(end, Failed)]


class Shards:
    """The shards of a test's cluster, and what happens to them."""

    def __init__(self, made, engines, serve_store, reach, draw):
        self._made, self._engines = made, engines
        self._serve_store, self._reach, self._draw = serve_store, reach, draw
        self._open, self._draining = list(made.targets), []
        self._count = len(self._open)
        self.done = Counter()

    def change(self):
        self._draw.choice([self._drain, self._drain, self._reopen, self._join, self._leave])()

    def _drain(self):
        if len(self._open) > LEAST_OPEN:
            worker = self._open.pop(self._draw.randrange(len(self._open)))
            self._draining.append(worker)
            self._announce(Draining(worker))

    def _reopen(self):
        if self._draining:
            worker = self._draining.pop(self._draw.randrange(len(self._draining)))
            self._open.append(worker)
            self._announce(Opened(worker))

    def _join(self):
        if len(self._open) + len(self._draining) == MOST_SHARDS:
            return
        made, worker = self._made, WorkerId(f"shard{self._count}")
        self._count += 1
        made.arenas[worker] = Arena(MEMORY_BYTES)
        made.stores[worker] = LocalStore(worker=worker, arena=made.arenas[worker])
        made.served[worker] = self._serve_store(made.stores[worker], worker)
        for number, engine in enumerate(self._engines):
            engine.announce(Joined(worker, self._reach(made, worker, f"engine-{number}")))
        self._open.append(worker)
        self.done["joined"] += 1

    def _leave(self):
        """A shard leaves when its drain is over, as the controller lets it."""
        if not self._draining:
            return
        worker = self._draining.pop(0)
        until(
            lambda: not any(engine.readers().get(worker) for engine in self._engines),
            lambda: f"spans stay on {worker}: {[engine.drains() for engine in self._engines]}",
        )
        self._announce(Left(worker))
        until(
            lambda: not any(worker in engine.shards() for engine in self._engines),
            lambda: f"{worker} does not leave",
        )

    def _announce(self, change):
        self.done[type(change).__name__] += 1
        for engine in self._engines:
            engine.announce(change)


def until(condition, what):
    end_s = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end_s, what()
        pause.wait(0.005)


@pytest.fixture(scope="module")
def gap(tiny):
    """gap(prompt, tokens) -> by how much a token's logit is below the likeliest one's, at most."""

    def of(prompt, tokens):
        with torch.inference_mode():
            logits = tiny(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        return float((logits.max(dim=-1).values - logits[range(len(tokens)), tokens]).max())

    return of


@pytest.mark.parametrize(
    "requests", [pytest.param(200, marks=pytest.mark.heavy), pytest.param(2000, marks=pytest.mark.soak)]
)
def test_no_request_fails_and_every_token_is_right(cluster, serve_store, reach, gap, requests):
    seed = secrets.randbelow(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    made = cluster(shards=4, memory_bytes=MEMORY_BYTES)
    limits = EngineLimits(segment_tokens=256, speculate_tokens=3)
    engines = [made.start(limits=limits)]
    made.clients = made.clients | {worker: reach(made, worker, "engine-1") for worker in made.targets}
    made.resize(MEMORY_BYTES)
    engines.append(made.start(limits=limits))
    crowd, shards = Crowd(engines, draw), Shards(made, engines, serve_store, reach, draw)
    for _ in range(requests):
        crowd.submit()
        if draw.random() < 0.1:
            crowd.cancel()
        if draw.random() < 0.2:
            shards.change()
        crowd.await_live(LIVE)
    crowd.await_live(0)
    assert len(crowd.ended) == requests
    assert [failed(running) for running in crowd.ended if failed(running)] == []
    print(shards.done, [engine.load() for engine in engines])
    assert set(shards.done) == {"Draining", "Opened", "joined", "Left"}, shards.done
    for running in crowd.ended:
        for end in running.ends:
            tokens, whole = running.tokens[end.choice], running.sampling.max_tokens
            assert len(tokens) == whole or end.reason is Reason.CANCELLED
            assert not tokens or gap(running.prompt, tokens) < TIE, (running.name, seed)
