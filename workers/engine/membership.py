"""Applies the joining and leaving of shards to a running engine, between two steps.

Called by ``engine``: other threads announce changes, and the engine's thread applies them. It must not know
where the changes come from.
"""

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import NamedTuple

from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.fanout.fanout import Fanout
from farshore.ids import WorkerId
from farshore.workers.engine.kv.pool import ShardPool


class Joined(NamedTuple):
    """A shard that new spans may be placed on."""

    worker: WorkerId
    client: ShardClient


class Shut(NamedTuple):
    """A shard that takes no new spans."""

    worker: WorkerId


class Draining(NamedTuple):
    """A shard that takes no new spans, and whose spans are to move to other shards."""

    worker: WorkerId


class Opened(NamedTuple):
    """A shard that was shut or drained and takes new spans again."""

    worker: WorkerId


class Left(NamedTuple):
    """A shard that is to be forgotten as soon as nothing reads from it."""

    worker: WorkerId


Change = Joined | Shut | Draining | Opened | Left


class Membership:
    """The shards of one engine. ``clients`` is the engine's mapping of workers to clients, which the fan-out
    uses too; only :meth:`apply` changes it.

    ``is_used``: whether a sequence or a call under way needs the worker.
    """

    def __init__(
        self,
        clients: dict[WorkerId, ShardClient],
        *,
        pool: ShardPool,
        fanout: Fanout,
        is_used: Callable[[WorkerId], bool],
    ) -> None:
        self._clients = clients
        self._pool = pool
        self._fanout = fanout
        self._is_used = is_used
        self._announced: SimpleQueue[Change] = SimpleQueue()
        self._leaving: set[WorkerId] = set()
        self._joined: dict[WorkerId, ShardClient] = {}

    def announce(self, change: Change) -> None:
        """Queues a change. Any thread may call it. A worker that is unknown, or joins twice, is ignored."""
        self._announced.put(change)

    @property
    def is_waiting(self) -> bool:
        """Whether a worker that is to leave is still used. The engine's thread asks."""
        return bool(self._leaving)

    def apply(self) -> None:
        """Applies the announced changes. Never blocks."""
        while True:
            try:
                self._apply(self._announced.get_nowait())
            except Empty:
                break
        for worker in [worker for worker in self._leaving if not self._is_used(worker)]:
            self._leaving.discard(worker)
            self._remove(worker)

    def _apply(self, change: Change) -> None:
        worker = change.worker
        if isinstance(change, Joined):
            if worker in self._clients:
                return
            self._clients[worker] = self._joined[worker] = change.client
            self._pool.add(worker, change.client)
            self._pool.open(worker)
        elif worker in self._clients:
            self._leaving.discard(worker)
            if isinstance(change, Opened):
                self._pool.open(worker)
            elif isinstance(change, Draining):
                self._pool.drain(worker)
            else:
                self._pool.shut(worker)
            if isinstance(change, Left):
                self._leaving.add(worker)

    def close(self) -> None:
        """Closes the clients of the shards that joined. Call it when the engine's thread has ended."""
        for client in self._joined.values():
            client.close()

    def _remove(self, worker: WorkerId) -> None:
        client = self._clients.pop(worker)
        self._joined.pop(worker, None)
        self._fanout.forget(worker)
        queue = self._pool.remove(worker)

        def close() -> None:
            queue.close()
            client.close()

        # A shard that does not answer delays both until the deadline of its call.
        threading.Thread(target=close, name=f"leave {worker}", daemon=True).start()
