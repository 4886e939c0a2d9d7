"""The engines that the gateway knows: one client and one health watch for each.

Written by ``discovery`` with what the directory lists, read by ``router``. The last known engines are kept
while the directory lists none. Must not know the requests.
"""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from itertools import islice

from farshore.cluster_token import ClusterToken
from farshore.gateway.engines.engine_client import EngineClient
from farshore.gateway.engines.health import EngineHealth
from farshore.gateway.limits import Limits
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Listing, WorkerRecord

MOST_PROBES = 32
"""Health probes at once: each probe of a frozen engine waits for its deadline."""
MOST_PROBLEMS = 3
"""Engines that a refusal names."""

_logger = logging.getLogger(__name__)


class KnownEngine:
    """One engine: a :class:`~farshore.gateway.engines.router.Candidate`."""

    def __init__(
        self,
        record: WorkerRecord,
        *,
        limits: Limits,
        token: ClusterToken | None,
        probing: asyncio.Semaphore,
        changed: Callable[[], None],
    ) -> None:
        self.worker = record.worker
        self.client = EngineClient(
            record.worker, record.address, limits=limits, token=token, broke=lambda: self.health.broke()
        )
        self.health = EngineHealth(self.client, limits=limits, probing=probing, changed=changed)
        self.seed = int.from_bytes(hashlib.blake2b(record.worker.encode(), digest_size=8).digest())
        self.is_open = True
        self.sent = 0
        self._running = self._others = 0
        self._watching = asyncio.create_task(self.health.watch())

    @property
    def load(self) -> int:
        return self._running + self._others

    @property
    def running(self) -> int:
        """The requests that this gateway runs there."""
        return self._running

    @property
    def is_useless(self) -> bool:
        """Whether it neither answers nor runs a request."""
        return self.health.problem is not None and not self._running

    @property
    def problem(self) -> str | None:
        """Why it gets nothing new; None if it does."""
        return self.health.problem if self.is_open else f"{self.client.name} is closed"

    @contextlib.contextmanager
    def count(self) -> Iterator[None]:
        """Counts a request that this gateway runs there."""
        self._running += 1
        self.sent += 1
        try:
            yield
        finally:
            self._running -= 1

    def note(self, record: WorkerRecord) -> None:
        """Takes the load from its newest record. The record counts this gateway's requests too, which the
        gateway itself knows better."""
        load = record.load
        total = load.running + load.waiting + load.parked if load else 0
        self._others = max(0, total - self._running)

    async def close(self) -> None:
        self._watching.cancel()
        await asyncio.wait([self._watching])
        await self.client.close()


class KnownEngines:
    """Use it on the event loop only."""

    def __init__(
        self,
        *,
        limits: Limits,
        token: ClusterToken | None,
        spec: str | None,
        changed: Callable[[], None],
    ) -> None:
        """``token``: the cluster's, proved to the engines. ``spec``: the model's options that an engine must
        announce; None: any. ``changed`` is called when an engine appears, and when one begins or ceases to
        take requests."""
        self._limits = limits
        self._token = token
        self._spec = spec
        self._changed = changed
        self._probing = asyncio.Semaphore(MOST_PROBES)
        self._engines: dict[WorkerId, KnownEngine] = {}
        self._closing: set[asyncio.Task[None]] = set()  # strong references: the event loop holds weak ones
        self._refused: frozenset[WorkerId] = frozenset()

    def available(self) -> list[KnownEngine]:
        """The engines that take new requests."""
        return [engine for engine in self._engines.values() if engine.problem is None]

    @property
    def problem(self) -> str | None:
        """Why no engine takes requests; None if one does."""
        problems = [engine.problem for engine in self._engines.values()]
        if None in problems:
            return None
        if not problems:
            return "no dense worker serves: the directory lists none, or does not answer"
        return "; ".join(problem for problem in islice(problems, MOST_PROBLEMS) if problem)

    def apply(self, listing: Listing) -> None:
        """Follows the directory. A list that lacks an engine proves nothing while it is not settled, or while
        no other engine is listed as serving: that engine is kept."""
        dense = {record.worker: record for record in listing.workers if record.kind == "dense"}
        serving = {
            worker: record
            for worker, record in dense.items()
            if record.state == "serving" and record.address and worker not in listing.closed
        }
        serving = self._of_this_model(serving)
        for worker, record in islice(serving.items(), self._limits.most_engines):
            engine = self._engines.get(worker)
            # A worker does not move: another address is a false one, or corrects one that was.
            if engine is None or (engine.client.address != record.address and engine.is_useless):
                engine = self._add(record)
            engine.is_open = True
            engine.note(record)
        for worker, engine in list(self._engines.items()):
            if worker in serving:
                continue
            if worker in dense or worker in listing.closed or (listing.settled and serving):
                engine.is_open = False
                if worker not in dense and not engine.running:
                    self._drop(worker)
        self._changed()

    async def probe(self) -> None:
        """Probes all engines once."""
        await asyncio.gather(*(engine.health.probe() for engine in self._engines.values()))

    async def close(self) -> None:
        for worker in list(self._engines):
            self._drop(worker)
        if self._closing:
            await asyncio.wait(self._closing)

    def _of_this_model(self, serving: dict[WorkerId, WorkerRecord]) -> dict[WorkerId, WorkerRecord]:
        if self._spec is None:
            return serving
        fitting = {worker: record for worker, record in serving.items() if record.spec == self._spec}
        refused = serving.keys() - fitting.keys()
        for worker in refused - self._refused:
            _logger.warning("%s serves another model: start this gateway again to serve that", worker)
        self._refused = frozenset(refused)
        return fitting

    def _add(self, record: WorkerRecord) -> KnownEngine:
        self._drop(record.worker)
        _logger.info("dense worker %s serves at %s", record.worker, record.address)
        engine = KnownEngine(
            record,
            limits=self._limits,
            token=self._token,
            probing=self._probing,
            changed=self._changed,
        )
        self._engines[record.worker] = engine
        return engine

    def _drop(self, worker: WorkerId) -> None:
        engine = self._engines.pop(worker, None)
        if engine is not None:
            closing = asyncio.create_task(engine.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
