"""The shards that new spans go to: what each has, and which of them answer.

A shard that does not answer takes no part in placing until it does: sequences go to the others. It is asked
again in the background, since asking one that is frozen takes a deadline. Called by ``cache``, from the
engine's thread and from its callers'. It must not know what is placed.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

from farshore.attention_offload.base import Peer, ShardIdentity
from farshore.errors import TransportError
from farshore.ids import WorkerId

ASK_AGAIN_S = 5.0


class Pool:
    """``targets``: those of ``peers`` that it is made of. ``helper`` asks in the background."""

    def __init__(
        self,
        peers: Mapping[WorkerId, Peer],
        targets: Sequence[WorkerId],
        *,
        helper: Executor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peers = peers
        self._targets = targets
        self._helper = helper
        self._clock = clock
        self._budgets: dict[WorkerId, int] = {}
        self._asked_s: dict[WorkerId, float] = {}
        """Of those that did not answer: when they were asked last."""

    def budgets(self) -> dict[WorkerId, int] | None:
        """Bytes of each, as it said last; None where one has never answered, and nobody knows how much there
        is."""
        for worker in self._targets:
            if worker not in self._budgets and (worker in self._asked_s or self._ask(worker) is None):
                return None
        return {worker: self._budgets[worker] for worker in self._targets}

    def free(self) -> dict[WorkerId, int]:
        """Free bytes of each that answers. If none did, all are asked now."""
        now_s = self._clock()
        for worker, asked_s in list(self._asked_s.items()):
            if now_s - asked_s >= ASK_AGAIN_S:
                self._asked_s[worker] = now_s
                self._helper.submit(self._ask, worker)
        identities = {worker: self._ask(worker) for worker in self.answering() or self._targets}
        return {worker: it.free_bytes for worker, it in identities.items() if it is not None}

    def answering(self) -> dict[WorkerId, Peer]:
        """All but those that did not answer when they were asked last."""
        return {worker: self._peers[worker] for worker in self._targets if worker not in self._asked_s}

    def silent(self) -> list[WorkerId]:
        return sorted(self._asked_s)

    @contextmanager
    def watching(self, worker: WorkerId) -> Iterator[None]:
        """A call to it: one that fails with TransportError makes it silent."""
        try:
            yield
        except TransportError:
            self._asked_s[worker] = self._clock()
            raise

    def _ask(self, worker: WorkerId) -> ShardIdentity | None:
        try:
            with self.watching(worker):
                identity = self._peers[worker].identify()
        except TransportError:
            return None
        self._asked_s.pop(worker, None)
        self._budgets[worker] = identity.budget_bytes
        return identity
