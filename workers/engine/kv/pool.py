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
    """One :class:`ShardQueue` for each shard client of an engine. Thread-safe.

    ``targets`` are the workers among ``clients`` that new spans are placed on. ``changed`` and ``grace_s``
    are those of :class:`ShardQueue`.
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
        self.targets = tuple(targets)
        self._clock = clock
        self._queues = {
            worker: ShardQueue(worker, client, changed=changed, grace_s=grace_s, clock=clock)
            for worker, client in clients.items()
        }

    def __getitem__(self, worker: WorkerId) -> ShardQueue:
        return self._queues[worker]

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
        """Returns whether a target that does not answer now is not lost, and so may answer again."""
        return any(not self._queues[worker].lost_reason for worker in self.silent())

    def is_idle(self) -> bool:
        """Returns whether all cold calls have ended, so that no memory is about to be given back."""
        return all(queue.is_idle for queue in self._queues.values())

    def budgets(self) -> dict[WorkerId, int] | None:
        """Returns each target's budget in bytes; None if one has never answered."""
        beats = {worker: self._queues[worker].beat for worker in self.targets}
        if any(beat is None for beat in beats.values()):
            return None
        return {worker: beat.budget_bytes for worker, beat in beats.items() if beat is not None}

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
                elif not self._queues[worker].is_placeable or self._clock() > end_s:
                    failures[worker] = self._queues[worker].unanswered()
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
