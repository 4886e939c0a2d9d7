"""One request and the events that were produced for it so far, which several readers can follow from any
token.

Written by ``log`` and by the engine client's ``pump``, read by ``api.service``. All readers see the same
events, also those that connect late or again. Events are kept as the bytes that readers get: they take a
tenth of the memory of protobuf objects, and are serialised once for all readers. Must not know where tokens
come from.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grpc

from farshore import rpc
from farshore.errors import FarshoreError, InvalidRequest
from farshore.gateway.limits import ERROR_MESSAGE_CHARS
from farshore.gateway.requests.resume import Received
from farshore.proto import inference_pb2 as api
from farshore.text import shortened

_EVENT_BYTES = 64  # of memory per event in addition to its content: a bytes object and a list entry

Trailing = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """The status with which a request failed; each reader's call ends with it."""

    code: grpc.StatusCode
    message: str
    trailing: Trailing = ()
    field: str | None = None
    """The path of the request's field that is wrong."""

    @classmethod
    def of(cls, error: FarshoreError) -> "Failure":
        """One of our errors, as a client is told of it."""
        code, message, trailing = rpc.status_of(error)
        field = error.field if isinstance(error, InvalidRequest) else None
        return cls(code, shortened(message, ERROR_MESSAGE_CHARS), trailing, field)


class RequestKey(NamedTuple):
    """The name of a request in the log. ``principal``: the caller; another caller's id is another request."""

    principal: str
    request_id: str


class RequestFailed(Exception):
    """Raised by ``follow`` for a failed request. Stays inside the gateway."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Request:
    """Grows by ``accept`` and ``add_*``, and ends once, by ``finish`` or ``fail``. Not thread-safe: use it on
    the event loop only.

    Tokens of all choices are kept in the order of arrival; ``resume_from`` counts the tokens of all choices.
    """

    def __init__(
        self,
        key: RequestKey,
        *,
        sequence_id: str,
        fingerprint: bytes,
        choices: int,
        values: int,
        outlives_readers: bool,
        arrived_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``key``: its ``request_id`` is never logged, nor shown in status and errors, since it permits
        reading and cancelling the request. ``sequence_id``: the cluster's name of it.
        ``fingerprint``: see ``received``. ``values``: upper bound of tokens and alternatives.
        ``outlives_readers``: the client chose the id, so it may reconnect. ``arrived_s``: when the call
        arrived, by ``clock``."""
        self.key = key
        self.sequence_id = sequence_id
        self.fingerprint = fingerprint
        self.choices = choices
        self.values = values
        self.outlives_readers = outlives_readers
        self.readers = 0
        self.cancelling = False
        self.prompt_end = ""
        self._accepted: bytes | None = None
        self._prompt_tokens = 0
        self._prefill: bytes | None = None
        self._prompt: list[bytes] = []
        self._tokens: list[bytes] = []
        self._tokens_of: Counter[int] = Counter()  # by choice
        self.size_bytes = 0
        self._finished: bytes | None = None
        self._failure: Failure | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self._clock = clock
        self._arrived_s = arrived_s
        self._first_s = self._last_s = arrived_s

    @property
    def tokens(self) -> int:
        """Tokens so far, of all choices."""
        return len(self._tokens)

    @property
    def failed(self) -> bool:
        return self._failure is not None

    @property
    def ended(self) -> bool:
        return self.failed or self._finished is not None

    def check_resume(self, resume_from: int) -> None:
        """Raises InvalidRequest if ``resume_from`` is greater than the number of tokens so far: the client
        has confused two requests."""
        if resume_from > len(self._tokens):
            raise InvalidRequest(
                f"resume_from {resume_from}: the request has {self.tokens} tokens so far; give the number of "
                "tokens received",
                field="resume_from",
            )

    async def follow(self, resume_from: int = 0, received: Received | None = None) -> AsyncIterator[bytes]:
        """Yields serialised events: Accepted, Prefill and PromptLogprobs if the reader has no token, tokens
        from ``resume_from`` on that the reader has not ``received``, Finished. Raises RequestFailed, and
        ResumeMismatch.

        The waits have no deadline: the request ends in bounded time (``stall_s`` of ``Limits``).
        """
        while self._accepted is None:
            if self._failure is not None:
                raise RequestFailed(self._failure)
            await self._change()
        yield self._accepted
        index, prefill = resume_from, None
        received = received or Received()
        # The prompt's log-probabilities precede the first token: a reader that has tokens has them.
        prompt, reads_prompt = 0, not resume_from and not received.left
        while True:
            while reads_prompt and prompt < len(self._prompt):
                yield self._prompt[prompt]
                prompt += 1
            while index < len(self._tokens):
                token = self._tokens[index]
                index += 1
                if not received.left or not received.has(api.GenerateEvent.FromString(token).token):
                    yield token
            if self._finished is not None:
                received.check_end()
                yield self._finished
                return
            if self._failure is not None:
                raise RequestFailed(self._failure)
            if self._prefill is not prefill:
                # Only the newest progress is sent; a slow reader skips the others.
                prefill = self._prefill
                if prefill is not None and not index and not received.left:
                    yield prefill
                continue
            await self._change()

    def accept(self, prompt_tokens: int, *, prompt_end: str = "", seed: int = 0) -> None:
        """Records that the prompt was tokenized. ``prompt_end``: its last few characters. ``seed``: of the
        draws."""
        self._prompt_tokens = prompt_tokens
        self.prompt_end = prompt_end
        accepted = api.Accepted(request_id=self.key.request_id, prompt_tokens=prompt_tokens, seed=seed)
        self._accepted = api.GenerateEvent(accepted=accepted).SerializeToString()
        self._notify()

    def add_prefill(self, progress: api.PrefillProgress) -> None:
        """Replaces the prefill progress."""
        self._prefill = api.GenerateEvent(prefill=progress).SerializeToString()
        self._notify()

    def add_prompt_logprobs(self, scored: api.PromptLogprobs) -> None:
        """Appends the log-probabilities of tokens of the prompt."""
        event = api.GenerateEvent(prompt_logprobs=scored).SerializeToString()
        self._prompt.append(event)
        self.size_bytes += _EVENT_BYTES + len(event)
        self._notify()

    def add_token(
        self,
        token_id: int,
        text: str,
        *,
        choice: int = 0,
        logprob: float | None = None,
        top: Sequence[api.Alternative] = (),
    ) -> None:
        """Appends a token of ``choice``. ``text``: the text that it made final."""
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
        self._notify()

    def finish(
        self,
        choices: Sequence[api.Completion],
        *,
        queued_ms: float = 0.0,
        cached_tokens: int = 0,
        shards: Iterable[api.ShardUse] = (),
    ) -> None:
        """Ends the request with one completion per choice. Does nothing if it has ended."""
        if self.ended:
            return
        if self._accepted is None:
            self.accept(0)  # It ended before its prompt was tokenized.
        count = len(self._tokens)
        after_first = max(self._tokens_of.values(), default=0) - 1
        tpot_ms = (self._last_s - self._first_s) * 1e3 / after_first if after_first > 0 else 0.0
        self._finished = api.GenerateEvent(
            finished=api.Finished(
                choices=choices,
                usage=api.Usage(
                    prompt_tokens=self._prompt_tokens, completion_tokens=count, cached_tokens=cached_tokens
                ),
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
        self._notify()

    def fail(self, failure: Failure) -> None:
        """Ends the request with a failure. Does nothing if it has ended."""
        if self.ended:
            return
        self._failure = failure
        self._notify()

    async def _change(self) -> None:
        """Blocks until something is added."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            raise

    def _notify(self) -> None:
        """Wakes all readers."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
