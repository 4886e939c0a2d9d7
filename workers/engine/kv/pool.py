"""The shards of one engine: which of them answer, what they have free, which are lost.

Called by ``engine`` and ``cache``. It must not know what is placed.
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
"""For shards whose queues go on, but slowly."""


class Pool:
    """``targets``: those of ``peers`` that new spans go to. ``changed``: see :class:`ShardQueue`."""

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
        """Targets that answer."""
        return [worker for worker in self.targets if self._queues[worker].is_placeable]

    def silent(self) -> list[WorkerId]:
        """Targets that do not."""
        return [worker for worker in self.targets if not self._queues[worker].is_placeable]

    def unreadable(self) -> set[WorkerId]:
        """Shards that no frame may be sent to now."""
        return {worker for worker, queue in self._queues.items() if not queue.is_readable}

    def lost(self) -> dict[WorkerId, str]:
        """Shards whose spans are given up, and why."""
        return {worker: why for worker, queue in self._queues.items() if (why := queue.lost)}

    def may_answer(self) -> bool:
        """Whether there is a target that does not answer now and is not lost."""
        return any(not self._queues[worker].lost for worker in self.silent())

    def is_idle(self) -> bool:
        """Whether every cold call so far has ended: nothing is about to be given back."""
        return all(queue.is_idle for queue in self._queues.values())

    def budgets(self) -> dict[WorkerId, int] | None:
        """Bytes of each target; None where one has never answered, so that the pool's size is unknown."""
        beats = {worker: self._queues[worker].beat for worker in self.targets}
        if any(beat is None for beat in beats.values()):
            return None
        return {worker: beat.budget_bytes for worker, beat in beats.items() if beat is not None}

    def gather(
        self, calls: Mapping[WorkerId, Future[T]]
    ) -> tuple[dict[WorkerId, T], dict[WorkerId, FarshoreError]]:
        """What the calls returned, and what they failed with. A call to a shard that answers nothing counts
        as failed with Late after STALLED_S, and goes on. Never called by the token loop. Raises what is no
        FarshoreError."""
        until_s = self._clock() + GATHER_DEADLINE_S
        results: dict[WorkerId, T] = {}
        failures: dict[WorkerId, FarshoreError] = {}
        left = dict(calls)
        while left:
            wait(left.values(), timeout=STALLED_S / 4, return_when=FIRST_COMPLETED)
            for worker, future in list(left.items()):
                if future.done():
                    error = future.exception()
                    if error is None:
                        results[worker] = future.result()
                    elif isinstance(error, FarshoreError):
                        failures[worker] = error
                    else:
                        raise error
                elif not self._queues[worker].is_placeable or self._clock() > until_s:
                    failures[worker] = self._queues[worker].unanswered()
                else:
                    continue
                del left[worker]
        return results, failures

    def await_beats(self, deadline_s: float) -> None:
        """Waits until every shard has answered or failed to, for ``deadline_s`` at most."""
        until_s = self._clock() + deadline_s
        for queue in self._queues.values():
            queue.await_look(max(0.0, until_s - self._clock()))

    def close(self) -> None:
        for queue in self._queues.values():
            queue.close()


def first_error(futures: Iterable[Future[Any]]) -> BaseException | None:
    """Of futures that are done; one that was cancelled counts as a TransportError."""
    for future in futures:
        if future.cancelled():
            return TransportError("the call was cancelled")
        if (error := future.exception()) is not None:
            return error
    return None
