"""Requests that decode at the same time, and what their clients see in a window of time.

Used by ``drain``. Must not know what is done to the cluster meanwhile.
"""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import quantiles
from typing import NamedTuple, Self

from farshore.client.events import Token
from farshore.client.sdk import Client
from farshore.errors import DeadlineExceeded, FarshoreError

READ_DEADLINE_S = 30.0
"""How long a reader may take to end after its connection was closed."""


class Window(NamedTuple):
    """The tokens of all streams in a window of time."""

    seconds: float
    tokens: int
    gaps_s: tuple[float, ...]
    """Between two tokens of a stream, of which at least one came in the window."""

    @property
    def tokens_per_s(self) -> float | None:
        """None if no token came: requests may have failed."""
        return self.tokens / self.seconds if self.tokens else None

    @property
    def p99_gap_s(self) -> float | None:
        """None if there are fewer than two gaps."""
        return quantiles(self.gaps_s, n=100, method="inclusive")[-1] if len(self.gaps_s) > 1 else None

    def and_also(self, other: "Window") -> "Window":
        """Both windows as one."""
        return Window(*(mine + others for mine, others in zip(self, other, strict=True)))


class Streams:
    """A context manager. Each request is read by a thread of its own; the end of the context ends them."""

    def __init__(self, address: str, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> None:
        self._client = Client(address)
        self._max_tokens = max_tokens
        self._changed = threading.Condition()
        self._times_s: list[list[float]] = [[] for _ in prompts]
        self._failures: list[str] = []
        self._ended: set[int] = set()
        """The numbers of the requests that failed or have all their tokens."""
        self._closed = False
        self._readers = [
            threading.Thread(target=self._read, args=each, name="reader", daemon=True)
            for each in enumerate(prompts)
        ]

    def __enter__(self) -> Self:
        for reader in self._readers:
            reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
        self._client.close()
        for reader in self._readers:
            reader.join(READ_DEADLINE_S)

    @property
    def failures(self) -> tuple[str, ...]:
        """The errors of the requests that failed."""
        with self._changed:
            return tuple(self._failures)

    @property
    def finished(self) -> int:
        """How many requests have all their tokens."""
        with self._changed:
            return len(self._ended) - len(self._failures)

    def await_tokens(self, count: int, *, deadline_s: float) -> None:
        """Blocks until each request that runs has ``count`` tokens. Raises DeadlineExceeded."""
        self._await_counts([count] * len(self._times_s), deadline_s=deadline_s)

    def during(self, action: Callable[[], object], *, deadline_s: float) -> Window:
        """The window in which ``action`` ran. It ends with the next token of each request that runs, so that
        the gaps at its end are whole, and one of an action that takes no time has tokens, too. Raises
        DeadlineExceeded if one does not come within ``deadline_s``."""
        begin_s = time.perf_counter()
        action()
        with self._changed:
            next_token = [len(each) + 1 for each in self._times_s]
        self._await_counts(next_token, deadline_s=deadline_s)
        end_s = time.perf_counter()
        with self._changed:
            times_s = [list(each) for each in self._times_s]
        return Window(
            end_s - begin_s,
            sum(begin_s < token_s <= end_s for each in times_s for token_s in each),
            tuple(
                after - before
                for each in times_s
                for before, after in pairwise(each)
                if after > begin_s and before < end_s
            ),
        )

    def _await_counts(self, counts: Sequence[int], *, deadline_s: float) -> None:
        def have_all() -> bool:
            return all(
                len(times_s) >= count or number in self._ended
                for number, (times_s, count) in enumerate(zip(self._times_s, counts, strict=True))
            )

        with self._changed:
            if not self._changed.wait_for(have_all, deadline_s):
                raise DeadlineExceeded(f"not every request had {max(counts)} tokens within {deadline_s:g} s")

    def _read(self, number: int, prompt: Sequence[int]) -> None:
        failure = []
        try:
            stream = self._client.generate(
                token_ids=prompt, max_tokens=self._max_tokens, temperature=0, ignore_eos=True
            )
            for event in stream:
                if isinstance(event, Token):
                    with self._changed:
                        self._times_s[number].append(time.perf_counter())
                        self._changed.notify_all()
        except FarshoreError as error:
            failure.append(str(error))
        with self._changed:
            if not self._closed:
                self._failures += failure
                self._ended.add(number)
                self._changed.notify_all()
