"""The shards of one engine: which of them answer, how much memory they have, and which are lost.

Called by ``engine``, ``scheduler``, ``prefill`` and the other modules of ``kv``. It must not know what is
placed.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

from farshore.attention_offload.client.base import ShardClient
from farshore.defaults import SHARD_GRACE_S
from farshore.errors import FarshoreError, TransportError
from farshore.ids import WorkerId
from farshore.workers.engine.kv.shard_queue import STALLED_S, ShardQueue

T = TypeVar("T")

GATHER_DEADLINE_S = 30.0
"""Longest wait of :meth:`ShardPool.gather` for calls whose queues make progress, but slowly."""


class ShardPool:
    """One :class:`ShardQueue` for each shard client of an engine. Any thread may read; only the engine's
    thread adds and removes, between steps.

    ``targets`` are the workers among ``clients`` that new spans are placed on. ``changed`` and ``grace_s``
    are those of :class:`ShardQueue`. For ``grace_s`` a pool without a target counts as one whose shards may
    answer again: a new one may join.
    """

    def __init__(
        self,
        clients: Mapping[WorkerId, ShardClient],
        targets: Sequence[WorkerId],
        *,
        changed: Callable[[], None] = lambda: None,
        grace_s: float = SHARD_GRACE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.targets: tuple[WorkerId, ...] = ()
        self.draining: frozenset[WorkerId] = frozenset()
        """Shards whose spans are to move to other shards. None of them is a target."""
        self._changed = changed
        self._grace_s = grace_s
        self._clock = clock
        self._had_target_s = clock()
        # Replaced and never changed, so that other threads may iterate.
        self._queues: Mapping[WorkerId, ShardQueue] = {}
        for worker, client in clients.items():
            self.add(worker, client)
        for worker in targets:
            self.open(worker)

    def __getitem__(self, worker: WorkerId) -> ShardQueue:
        return self._queues[worker]

    def __contains__(self, worker: WorkerId) -> bool:
        return worker in self._queues

    def add(self, worker: WorkerId, client: ShardClient) -> None:
        """Adds a shard that is not in the pool. It is no target yet."""
        queue = ShardQueue(worker, client, changed=self._changed, grace_s=self._grace_s, clock=self._clock)
        self._queues = {**self._queues, worker: queue}

    def open(self, worker: WorkerId) -> None:
        """Makes a shard of the pool a target. Idempotent."""
        self.draining -= {worker}
        self.targets = (*(target for target in self.targets if target != worker), worker)

    def shut(self, worker: WorkerId) -> None:
        """Places no new spans on a shard from now on; those that it has stay. Idempotent."""
        self.draining -= {worker}
        self._had_target_s = self._clock() if self.targets else self._had_target_s
        self.targets = tuple(target for target in self.targets if target != worker)

    def drain(self, worker: WorkerId) -> None:
        """Shuts a shard whose spans are to move to other shards. Idempotent."""
        self.shut(worker)
        self.draining |= {worker}

    def remove(self, worker: WorkerId) -> ShardQueue:
        """Takes a shard out of the pool. The caller closes the queue, which may block."""
        self.shut(worker)
        queue = self._queues[worker]
        self._queues = {other: queue for other, queue in self._queues.items() if other != worker}
        return queue

    def answering(self) -> dict[WorkerId, bool]:
        """Returns all shards, and whether each answers."""
        return {worker: queue.is_placeable for worker, queue in self._queues.items()}

    def placeable(self) -> list[WorkerId]:
        """Returns the targets that answer."""
        return [worker for worker in self.targets if self._queues[worker].is_placeable]

    def silent(self) -> list[WorkerId]:
        """Returns the targets that do not answer."""
        return [worker for worker in self.targets if not self._queues[worker].is_placeable]

    def unreadable(self) -> set[WorkerId]:
        """Returns the shards that no frame may be sent to now."""
        return {worker for worker, queue in self._queues.items() if not queue.is_readable}

    def lost(self) -> dict[WorkerId, str]:
        """Returns the lost shards, with the reason."""
        return {worker: reason for worker, queue in self._queues.items() if (reason := queue.lost_reason)}

    def may_answer(self) -> bool:
        """Returns whether a target that does not answer now is not lost, and so may answer again; or whether
        a first target may still join."""
        if not self.targets:
            return self._clock() - self._had_target_s < self._grace_s
        return any(not self._queues[worker].lost_reason for worker in self.silent())

    def is_idle(self) -> bool:
        """Returns whether all cold calls have ended, so that no memory is about to be given back."""
        return all(queue.is_idle for queue in self._queues.values())

    def budgets(self) -> dict[WorkerId, int] | None:
        """Returns each target's budget in bytes; None if there is none, or if one has never answered."""
        beats = {worker: self._queues[worker].beat for worker in self.targets}
        if not beats or any(beat is None for beat in beats.values()):
            return None
        return {worker: beat.budget_bytes for worker, beat in beats.items() if beat is not None}

    def free_bytes(self, workers: Iterable[WorkerId]) -> dict[WorkerId, int]:
        """Returns the bytes that each of these workers can grant, as far as this engine knows."""
        return {worker: self._queues[worker].free_bytes for worker in workers}

    def refresh(self, workers: Iterable[WorkerId]) -> dict[WorkerId, FarshoreError]:
        """Asks these workers for their free memory; returns the errors of those that do not answer. Blocks
        as :meth:`gather`."""
        return self.gather({worker: self._queues[worker].refresh() for worker in workers})[1]

    def gather(
        self, calls: Mapping[WorkerId, Future[T]]
    ) -> tuple[dict[WorkerId, T], dict[WorkerId, FarshoreError]]:
        """Waits for ``calls``; returns (results, errors) by worker.

        A call to a shard that stops answering counts as failed with Late or Lost, about STALLED_S after it
        started; the call itself continues. Blocks for GATHER_DEADLINE_S at most, so the token loop must not
        call it. Raises any error that is not a FarshoreError.
        """
        end_s = self._clock() + GATHER_DEADLINE_S
        results: dict[WorkerId, T] = {}
        failures: dict[WorkerId, FarshoreError] = {}
        pending = dict(calls)
        queues = self._queues
        while pending:
            wait(pending.values(), timeout=STALLED_S / 4, return_when=FIRST_COMPLETED)
            for worker, future in list(pending.items()):
                if future.done():
                    error = future.exception()
                    if error is None:
                        results[worker] = future.result()
                    elif isinstance(error, FarshoreError):
                        failures[worker] = error
                    else:
                        raise error
                elif not queues[worker].is_placeable or self._clock() > end_s:
                    failures[worker] = queues[worker].unanswered()
                else:
                    continue
                del pending[worker]
        return results, failures

    def await_beats(self, deadline_s: float) -> None:
        """Blocks until the first beat of each shard was answered or failed, for ``deadline_s`` at most."""
        end_s = self._clock() + deadline_s
        for queue in self._queues.values():
            queue.await_first_beat(max(0.0, end_s - self._clock()))

    def close(self) -> None:
        """Closes every queue, after the calls that wait in it."""
        for queue in self._queues.values():
            queue.close()


def first_error(futures: Iterable[Future[Any]]) -> BaseException | None:
    """Returns the first error of ``futures``, all done, or None.

    A cancelled one counts as a TransportError.
    """
    for future in futures:
        if future.cancelled():
            return TransportError("the call was cancelled")
        if (error := future.exception()) is not None:
            return error
    return None
