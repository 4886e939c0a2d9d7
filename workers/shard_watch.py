"""Tells an engine which attention workers the directory lists, from a thread of its own.

Called by ``dense``. A worker that is listed joins, once it has answered with its identity. One that is closed
or listed no longer gets nothing new, and one that drains, by the directory's mark or its own word, gives its
spans to others. A worker leaves only if it does not answer the engine either: a directory's silence never
costs KV (invariant 3, docs/architecture.md). It must not know what the engine stores.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from farshore.attention_offload.base import ShardIdentity
from farshore.attention_offload.client.base import ShardClient
from farshore.errors import FarshoreError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Directory, Listing, WorkerRecord
from farshore.periodic import PeriodicThread
from farshore.workers.engine.membership import Change, Draining, Joined, Left, Opened, Shut

PERIOD_S = 0.5
"""Time between two looks at the directory."""
MOST_CONNECTING = 8
"""Workers that are asked for their identity at a time. One that is frozen takes a deadline."""

_LOG = logging.getLogger(__name__)


class Members(Protocol):
    """The part of an engine that the watch calls."""

    def announce(self, change: Change) -> None: ...

    def shards(self) -> dict[WorkerId, bool]:
        """The shards that the engine knows, and whether each answers."""


class ShardWatch:
    """Watches from construction until :meth:`stop`.

    ``connect``: makes a client of the shard at an address, without asking it anything. ``local``: the worker
    of the engine's own store, which is not the directory's business. ``identified``: called with each new
    shard's identity before the shard joins.
    """

    def __init__(
        self,
        directory: Directory,
        engine: Members,
        *,
        connect: Callable[[str], ShardClient],
        local: WorkerId,
        identified: Callable[[WorkerId, ShardIdentity], None],
    ) -> None:
        self._engine = engine
        self._connect = connect
        self._local = local
        self._identified = identified
        self._connecting: set[WorkerId] = set()
        self._refusals: dict[WorkerId, str] = {}
        """Why a worker could not join, as it was logged."""
        self._announced: dict[WorkerId, type[Opened | Shut | Draining]] = {}
        """What the engine was told last of each worker that joined; Opened for those that are missing."""
        self._askers = ThreadPoolExecutor(MOST_CONNECTING, thread_name_prefix="identify")
        self._thread = PeriodicThread(
            lambda: self._compare(directory.listing()), name="shard-watch", period_s=PERIOD_S, tell=_tell
        )
        self._thread.start()

    def stop(self) -> None:
        """Ends the threads. Idempotent."""
        self._thread.stop()
        self._askers.shutdown(wait=False, cancel_futures=True)

    def _compare(self, listing: Listing) -> None:
        records = {record.worker: record for record in listing.workers if record.kind == "attention"}
        known = {
            worker: answers for worker, answers in self._engine.shards().items() if worker != self._local
        }
        self._connecting -= known.keys()
        for worker, record in records.items():
            is_new = worker not in known and worker not in self._connecting
            if is_new and worker not in listing.closed and record.state != "draining":
                self._connecting.add(worker)
                self._askers.submit(self._join, record)
        for worker, answers in known.items():
            record = records.get(worker)
            listed = record is not None or not listing.settled
            change: type[Opened | Shut | Draining] = Opened
            if worker in listing.draining or (record is not None and record.state == "draining"):
                change = Draining
            elif worker in listing.closed or not listed:
                change = Shut
            if self._announced.get(worker, Opened) is not change:
                self._announced[worker] = change
                self._engine.announce(change(worker))
            if not listed and not answers:
                self._engine.announce(Left(worker))
        for worker in set(self._refusals) - records.keys():
            self._refusals.pop(worker, None)
        self._announced = {worker: told for worker, told in self._announced.items() if worker in known}

    def _join(self, record: WorkerRecord) -> None:
        client: ShardClient | None = None
        try:
            client = self._connect(record.address)
            identity = client.identify()
            if identity.worker != record.worker:
                raise FarshoreError(f"{identity.worker} is at the address of {record.worker}")
            client.connect()  # Refused by a worker of another wire version.
            self._identified(record.worker, identity)
            self._engine.announce(Joined(record.worker, client))
        except Exception as error:
            why = str(error) if isinstance(error, FarshoreError) else f"{type(error).__name__}: {error}"
            if self._refusals.get(record.worker) != why:
                _LOG.warning("attention worker %s can't join: %s", record.worker, why)
            self._refusals[record.worker] = why
            self._connecting.discard(record.worker)
            if client is not None:
                client.close()


def _tell(error: Exception) -> None:
    if isinstance(error, FarshoreError):
        _LOG.debug("the directory does not answer: %s", error)
    else:
        _LOG.error("the attention workers can't be followed", exc_info=error)
