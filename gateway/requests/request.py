"""One request's log: what an engine has produced so far, readable by many, from any point, at any time.

Written by the one pump of ``requests``, read by ``service``. A reader that comes late or comes back sees
exactly what the others saw. Events are kept as the bytes that readers get: a tenth of their messages'
memory, and serialised once for all readers. Lives on the event loop: not thread-safe. Must not know where
tokens come from.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass

import grpc

from farshore.errors import InvalidRequest
from farshore.gateway.shown import shown
from farshore.proto import inference_pb2 as api

_EVENT_BYTES = 64  # of an event in the log, besides its own: a bytes object and a place in a list

Trailing = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """How a request broke: passed to every reader as it came from the engine."""

    code: grpc.StatusCode
    message: str
    trailing: Trailing = ()


class RequestFailed(Exception):
    """Carries a Failure out of ``follow``; never leaves the gateway."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Request:
    """Grows by ``accept`` and ``add_*``, and ends once, by ``finish`` or ``fail``. Bounded by ``values``.

    Tokens of several choices stand in the order in which they came; ``resume_from`` counts them all.
    """

    def __init__(
        self,
        request_id: str,
        *,
        sequence_id: str,
        fingerprint: bytes,
        choices: int,
        values: int,
        outlives_readers: bool,
        arrived_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``request_id``: what its client calls it. No log and no status shows it, since it is all that one
        needs to read or end the request. ``sequence_id``: what the cluster calls it. ``values``: the most
        tokens and alternatives that may come. ``outlives_readers``: the client chose the id, so it may come
        back."""
        self.request_id = request_id
        self.sequence_id = sequence_id
        self.fingerprint = fingerprint
        self.choices = choices
        self.values = values
        self.outlives_readers = outlives_readers
        self.readers = 0
        self.cancelling = False
        self._accepted: bytes | None = None
        self._prompt_tokens = 0
        self._prefill: bytes | None = None
        self._tokens: list[bytes] = []
        self._tokens_of: Counter[int] = Counter()  # by choice
        self.size_bytes = 0
        self._finished: bytes | None = None
        self._failure: Failure | None = None
        self._news = asyncio.Condition()
        self._clock = clock
        self._arrived_s = arrived_s
        self._first_s = self._last_s = arrived_s

    @property
    def tokens(self) -> int:
        return len(self._tokens)

    @property
    def failed(self) -> bool:
        return self._failure is not None

    @property
    def ended(self) -> bool:
        return self.failed or self._finished is not None

    def check_resume(self, resume_from: int) -> None:
        """A reader may not be ahead of the log: it must have mixed up two requests."""
        if resume_from > len(self._tokens):
            raise InvalidRequest(
                f"resume_from {resume_from}: request {shown(self.request_id)} has {len(self._tokens)} tokens "
                "so far; give the number of tokens received"
            )

    async def follow(self, resume_from: int) -> AsyncIterator[bytes]:
        """Accepted, then tokens from ``resume_from`` on, then Finished, serialised. Raises RequestFailed.

        Waits have no deadline of their own: whoever writes the log ends it in bounded time.
        """
        while self._accepted is None:
            if self._failure is not None:
                raise RequestFailed(self._failure)
            async with self._news:
                if self._accepted is None and not self.ended:
                    await self._news.wait()
        yield self._accepted
        index, prefill = resume_from, None
        while True:
            while index < len(self._tokens):
                yield self._tokens[index]
                index += 1
            if self._finished is not None:
                yield self._finished
                return
            if self._failure is not None:
                raise RequestFailed(self._failure)
            if self._prefill is not prefill:
                # Only the newest progress counts; a slow reader skips the rest.
                prefill = self._prefill
                if prefill is not None and not index:
                    yield prefill
                continue
            async with self._news:
                if index == len(self._tokens) and self._prefill is prefill and not self.ended:
                    await self._news.wait()

    async def accept(self, prompt_tokens: int) -> None:
        """Its prompt has been read."""
        self._prompt_tokens = prompt_tokens
        accepted = api.Accepted(request_id=self.request_id, prompt_tokens=prompt_tokens)
        self._accepted = api.GenerateEvent(accepted=accepted).SerializeToString()
        await self._tell()

    async def add_prefill(self, progress: api.PrefillProgress) -> None:
        self._prefill = api.GenerateEvent(prefill=progress).SerializeToString()
        await self._tell()

    async def add_token(
        self,
        token_id: int,
        text: str,
        *,
        choice: int = 0,
        logprob: float | None = None,
        top: Sequence[api.Alternative] = (),
    ) -> None:
        self._last_s = self._clock()
        if not self._tokens:
            self._first_s = self._last_s
        token = api.Token(
            index=self._tokens_of[choice],
            token_id=token_id,
            text=text,
            choice=choice,
            logprob=logprob,
            top=top,
        )
        event = api.GenerateEvent(token=token).SerializeToString()
        self._tokens.append(event)
        self._tokens_of[choice] += 1
        self.size_bytes += _EVENT_BYTES + len(event)
        await self._tell()

    async def finish(
        self,
        choices: Sequence[api.Completion],
        *,
        queued_ms: float = 0.0,
        shards: Iterable[api.ShardUse] = (),
    ) -> None:
        if self.ended:
            return
        if self._accepted is None:
            await self.accept(0)  # It ended before its prompt was read.
        count = len(self._tokens)
        after_first = max(self._tokens_of.values(), default=0) - 1
        tpot_ms = (self._last_s - self._first_s) * 1e3 / after_first if after_first > 0 else 0.0
        self._finished = api.GenerateEvent(
            finished=api.Finished(
                choices=choices,
                usage=api.Usage(prompt_tokens=self._prompt_tokens, completion_tokens=count),
                timings=api.Timings(
                    queued_ms=queued_ms,
                    ttft_ms=(self._first_s - self._arrived_s) * 1e3 if count else 0.0,
                    tpot_ms=tpot_ms,
                    total_ms=(self._clock() - self._arrived_s) * 1e3,
                ),
                shards=shards,
            )
        ).SerializeToString()
        self.size_bytes += _EVENT_BYTES + len(self._finished)
        await self._tell()

    async def fail(self, failure: Failure) -> None:
        if self.ended:
            return
        self._failure = failure
        await self._tell()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()
