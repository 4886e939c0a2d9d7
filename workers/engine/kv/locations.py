"""Chooses the shards to ask for a prompt's blocks, by the directory's answer and the engine's own memory.

Called by ``cache`` from the thread that places sequences, and by ``cache`` and ``handoff`` from the engine's
thread when blocks were sealed. All of it is a hint: a shard's store decides what is found. It must not call
shards.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from farshore.ids import WorkerId

DIRECTORY_DEADLINE_S = 0.1
"""Longest wait for the directory's answer. Placing waits for it, so it bounds the delay of a first token."""
DIRECTORY_PAUSE_S = 1.0
"""A directory that did not answer is not asked again for this long."""
FEW_SHARDS = 8
"""While the directory does not answer, up to this many shards are all asked: a look-up there is one small
call each."""
MOST_NAMES = 65_536
"""Block names that an engine remembers, those of 16.8 million tokens, in about 20 MB."""
MOST_HASHES = 4096
"""Names in one question to the directory, which refuses more. The shards are asked for all."""

Find = Callable[[Sequence[bytes]], Sequence[Collection[WorkerId]]]
"""Returns, for each block name, the workers that announced it. May raise."""

_LOG = logging.getLogger(__name__)


class PrefixLocations:
    """Where the blocks of prompts may lie. Thread-safe.

    ``find``: asks the directory; None: there is none, which counts as one that does not answer.
    """

    def __init__(self, find: Find | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._find = find
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, frozenset[WorkerId]] = OrderedDict()
        """Names that this engine sealed or found, the latest last."""
        self._asker = ThreadPoolExecutor(1, thread_name_prefix="find-prefix")
        self._asked: Future[Sequence[Collection[WorkerId]]] | None = None
        """The last question that was not answered in time."""
        self._failed_s: float | None = None

    def shards_to_ask(self, names: Sequence[bytes], shards: Sequence[WorkerId]) -> list[WorkerId]:
        """Returns those of ``shards`` that may hold blocks of these names.

        Blocks for DIRECTORY_DEADLINE_S at most, so the token loop must not call it.
        """
        if not names or len(shards) <= 1:
            return list(shards) if names else []
        announced = self._announced(names)
        if announced is None and len(shards) <= FEW_SHARDS:
            return list(shards)
        with self._lock:
            likely = {worker for name in names for worker in self._known.get(name, ())}
        likely.update(*(announced or ()))
        return [shard for shard in shards if shard in likely]

    def add(self, worker: WorkerId, names: Iterable[bytes]) -> None:
        """Remembers that the worker holds blocks of these names."""
        with self._lock:
            for name in names:
                self._known[name] = self._known.get(name, frozenset()) | {worker}
                self._known.move_to_end(name)
            while len(self._known) > MOST_NAMES:
                self._known.popitem(last=False)

    def remove(self, worker: WorkerId, names: Iterable[bytes]) -> None:
        """Forgets that the worker holds blocks of these names: it was asked, and does not."""
        with self._lock:
            for name in names:
                if left := self._known.pop(name, frozenset()) - {worker}:
                    self._known[name] = left

    def close(self) -> None:
        """Ends the thread that asks the directory, without waiting for an answer."""
        self._asker.shutdown(wait=False, cancel_futures=True)

    def _announced(self, names: Sequence[bytes]) -> Sequence[Collection[WorkerId]] | None:
        """The directory's answer; None if it does not answer in time, or failed lately."""
        if self._find is None or (self._asked is not None and not self._asked.done()):
            return None
        if self._failed_s is not None and self._clock() - self._failed_s < DIRECTORY_PAUSE_S:
            return None
        question = self._asker.submit(self._find, names[:MOST_HASHES])
        try:
            announced = question.result(timeout=DIRECTORY_DEADLINE_S)
        except Exception as error:  # A hint is not worth a request.
            _LOG.debug("the directory does not say where a prefix lies: %r", error)
            self._asked = question
            self._failed_s = self._clock()
            return None
        self._asked = self._failed_s = None
        return announced
