"""Records a streamed request as its client sees it: the tokens, their times, and how the request ended.

Called by the parts of the faults benchmark. Must not know why a request was sent.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc

from farshore.proto import inference_pb2 as api

Tokens = tuple[tuple[int, int], ...]
"""(choice, token id) in the order of arrival."""


@dataclass(slots=True)
class ClientStream:
    """The record of one request. Times are of ``time.perf_counter``.

    ``ended`` is None while the request runs, then "finished", "late" (its deadline expired), "broken off"
    (its stream ended early), or the name of a gRPC status."""

    name: str
    sent_s: float = 0.0
    accepted_s: float | None = None
    request_id: str = ""
    tokens: list[tuple[int, int]] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    ended: str | None = None
    ended_s: float = 0.0
    details: str = ""
    reasons: tuple[int, ...] = ()
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    first: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, event: api.GenerateEvent) -> None:
        """Records an event at the present time."""
        now_s = time.perf_counter()
        kind = event.WhichOneof("kind")
        if kind == "accepted":
            self.accepted_s, self.request_id = now_s, event.accepted.request_id
            self.accepted.set()
        elif kind == "token":
            self.tokens.append((event.token.choice, event.token.token_id))
            self.times_s.append(now_s)
            self.first.set()
        elif kind == "finished":
            self.reasons = tuple(choice.reason for choice in event.finished.choices)
            self.end("finished")

    def end(self, how: str, details: str = "") -> None:
        """Records the end, unless one is recorded already."""
        if self.ended is None:
            self.ended, self.details, self.ended_s = how, details, time.perf_counter()
        self.accepted.set()
        self.first.set()

    @property
    def is_complete(self) -> bool:
        """Whether all choices ended by length or by a stop."""
        complete = (api.FINISH_REASON_STOP, api.FINISH_REASON_LENGTH)
        return self.ended == "finished" and all(reason in complete for reason in self.reasons)


async def follow(
    stub: Any, request: api.GenerateRequest, stream: ClientStream, *, deadline_s: float
) -> ClientStream:
    """Sends the request and records its events in ``stream`` until it ends. Returns ``stream``.

    Raises CancelledError only: ``stream.ended`` holds the server's error."""
    stream.sent_s = time.perf_counter()
    try:
        async with asyncio.timeout(deadline_s):
            async for event in stub.Generate(request):
                stream.take(event)
        stream.end("broken off")
    except grpc.aio.AioRpcError as error:
        stream.end(error.code().name, error.details() or "")
    except TimeoutError:
        stream.end("late")
    return stream


def differs(tokens: Sequence[tuple[int, int]], undisturbed: Sequence[tuple[int, int]]) -> int | None:
    """The index of the first token that differs from the undisturbed stream, or None if they are equal."""
    for index, (got, wanted) in enumerate(zip(tokens, undisturbed, strict=False)):
        if got != wanted:
            return index
    return None if len(tokens) == len(undisturbed) else min(len(tokens), len(undisturbed))


def longest_gap_s(times_s: Sequence[float], *, first_s: float, last_s: float) -> float:
    """The longest time without a token among the gaps that overlap ``first_s .. last_s``, in seconds.

    Before the first token and after the last one only the time inside the range counts."""
    inside = [time_s for time_s in times_s if first_s < time_s < last_s]
    before = max((time_s for time_s in times_s if time_s <= first_s), default=first_s)
    after = min((time_s for time_s in times_s if time_s >= last_s), default=last_s)
    edges = [before, *inside, after]
    return max(b - a for a, b in pairwise(edges))


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The smallest value that ``percent`` percent of the values do not exceed; None if there are no
    values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -int(-len(ordered) * percent // 100) - 1))]
