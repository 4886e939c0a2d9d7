"""One streamed request as its client sees it: which tokens came, when, and how it ended.

Used by the parts of ``faults``. The arithmetic on times is pure. Must not know why a request was sent.
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
"""(choice, token id), as they came."""


@dataclass(slots=True)
class Stream:
    """``ended``: None while it runs, "finished", "late" (its deadline ran out), or a gRPC status's name."""

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
        if self.ended is None:
            self.ended, self.details, self.ended_s = how, details, time.perf_counter()
        self.accepted.set()
        self.first.set()

    @property
    def whole(self) -> bool:
        """Whether it came to its own end, by length or by a stop."""
        own = (api.FINISH_REASON_STOP, api.FINISH_REASON_LENGTH)
        return self.ended == "finished" and all(reason in own for reason in self.reasons)


async def follow(stub: Any, request: api.GenerateRequest, stream: Stream, *, deadline_s: float) -> Stream:
    """Reads it to its end. Raises nothing but CancelledError: the stream says how it ended."""
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
    """The first place where a finished stream is not what it was undisturbed; None: nowhere."""
    for place, (got, wanted) in enumerate(zip(tokens, undisturbed, strict=False)):
        if got != wanted:
            return place
    return None if len(tokens) == len(undisturbed) else min(len(tokens), len(undisturbed))


def longest_gap_s(times_s: Sequence[float], *, first_s: float, last_s: float) -> float:
    """The longest time without a token that overlaps ``first_s`` .. ``last_s``. The time before the first
    token and behind the last one counts as far as it lies inside."""
    inside = [time_s for time_s in times_s if first_s < time_s < last_s]
    before = max((time_s for time_s in times_s if time_s <= first_s), default=first_s)
    after = min((time_s for time_s in times_s if time_s >= last_s), default=last_s)
    edges = [before, *inside, after]
    return max(b - a for a, b in pairwise(edges))


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The smallest value that ``percent`` of them do not exceed; None of none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -int(-len(ordered) * percent // 100) - 1))]
