"""The course of a stream over gateways: which one is called next, and whether a failure ends the stream.

Used by the streams of both clients, which make the calls. Must not know what the messages mean, nor how a
call is made or awaited.

Before the first message each of several gateways is asked once, also after one that has no room; a single
one up to three times. After it, a loss is followed by rounds over all gateways, with pauses, for up to
``resume_s``: first the gateway that ran the request, whose log may go on with it, then the others, which
begin it anew.
"""

import math
import time
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import grpc

from farshore.client.sdk.gateways import Gateway, Gateways, retry_after_s, sent_by_gateway
from farshore.errors import (
    Cancelled,
    DeadlineExceeded,
    FarshoreError,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    TransportError,
)

_Value = TypeVar("_Value", covariant=True)

_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.1, 2.0

_TRIES = 3
"""How often a single gateway is asked before the first message."""

_FRUITLESS = 3
"""Losses in a row, without a new token between, after which a stream fails: its request may be the cause."""


class Feed(Protocol[_Value]):
    """The content of a stream, and how it goes on after a loss."""

    @property
    def repeatable(self) -> bool:
        """Whether any gateway can send the stream from its start."""

    @property
    def tokens(self) -> int:
        """Grows with what can't be taken back: the caller has it."""

    def call(self, gateway: Gateway, *, anew: bool, timeout_s: float | None) -> Any:
        """Starts the call. ``anew``: from the start, else from where the stream is."""

    def take(self, message: Any) -> _Value | None:
        """The value of a message; None if the caller has it. Raises TransportError if it does not fit."""


class _Step(NamedTuple):
    gateway: Gateway
    anew: bool


class Course(Generic[_Value]):
    """Repeat: ``pause_s``, ``start``, ``take`` for each message, and ``failed`` for the call's error, until
    that raises."""

    def __init__(
        self,
        gateways: Gateways,
        feed: Feed[_Value],
        *,
        deadline_s: float | None,
        resume_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``deadline_s``: of the whole stream. ``resume_s``: how long to look for a gateway that goes on;
        0: a stream that gave tokens is not resumed."""
        self._gateways = gateways
        self._feed = feed
        self._clock = clock
        self._until_s = None if deadline_s is None else clock() + deadline_s
        self._resume_s = resume_s
        self.pause_s = 0.0
        """How long to wait before the next ``start``."""
        self.losses = 0
        """How often a stream that had begun was lost."""
        self.running = False
        """Whether the gateway of the newest call may run the request."""
        self._steps = [_Step(gateway, False) for gateway in gateways.in_turn()]
        if len(self._steps) == 1:
            self._steps *= _TRIES
        self._at = self._steps.pop(0)
        self._begun = self._heard = False  # a message has come: from any gateway; from this call
        self._kept = 0  # tokens when the stream was lost
        self._fruitless = 0
        self._log: Gateway | None = None  # its log can go on with the stream
        self._give_up_s: float | None = None  # not None: the stream is lost, and no new token has come since
        self._round_pause_s = _FIRST_PAUSE_S
        self._failures: list[FarshoreError] = []

    @property
    def gateway(self) -> Gateway:
        """The gateway of the newest call."""
        return self._at.gateway

    def start(self) -> Any:
        """Starts the next call and returns it."""
        self._heard, self.running = False, True
        timeout_s = None if self._until_s is None else max(0.0, self._until_s - self._clock())
        return self._feed.call(self.gateway, anew=self._at.anew, timeout_s=timeout_s)

    def take(self, message: Any) -> _Value | None:
        """The message's value; None if there is nothing new in it."""
        if not self._heard:
            self._gateways.prefer(self.gateway)
            self._log = self.gateway
            self._begun = self._heard = True
        value = self._feed.take(message)
        if self._give_up_s is not None and self._feed.tokens > self._kept:
            self._give_up_s, self._fruitless = None, 0
            self._failures.clear()
        return value

    def failed(self, error: grpc.RpcError) -> None:
        """Chooses the next gateway. Raises the stream's error if there is none."""
        failed, reported = self.gateway.error(error), sent_by_gateway(error)
        if isinstance(failed, Cancelled) and not reported:
            failed = TransportError(f"gateway {self.gateway.address} cut the stream: it shuts down")
        # A call that ended for want of time leaves its request behind.
        self.running = isinstance(failed, DeadlineExceeded)
        if self._until_s is not None and self._clock() >= self._until_s:
            raise failed from error
        self._failures.append(failed)
        if not self._begun:
            found = self._passed_over(failed, retry_after_s(error))
        elif _is_loss(failed, reported):
            found = self._lost(failed, reported)
        elif isinstance(failed, Overloaded) and self._give_up_s is not None:
            # The request waits for room. If it was accepted first, it has failed in the gateway's log.
            self._log = None if self._heard else self._log
            found = self._next()
        elif self._feed.repeatable and self._is_forgotten(failed):
            self._log, self._at, self.pause_s = None, _Step(self.gateway, True), 0.0
            found = True
        else:
            raise failed from error
        if not found:
            # A gateway that is not reached explains more than any other failure.
            unreached = [failure for failure in self._failures if isinstance(failure, TransportError)]
            raise (unreached or self._failures)[-1] from error

    def _passed_over(self, failed: FarshoreError, after_s: float | None) -> bool:
        """Before the first message. A request that is read again is in the log of one gateway. ``after_s``:
        when the gateway wants to be asked again."""
        elsewhere = isinstance(failed, TransportError) or (
            isinstance(failed, NotFound) and not self._feed.repeatable
        )
        if self._steps and self._steps[0].gateway is not self.gateway:
            # Another gateway may have the room that this one has not.
            elsewhere = elsewhere or (isinstance(failed, Overloaded) and self._feed.repeatable)
        if elsewhere and self._steps:
            before, self._at = self.gateway, self._steps.pop(0)
            if self.gateway is before:
                self.pause_s = self._round_pause_s if after_s is None else after_s
                self._round_pause_s *= 2
            return self.pause_s < math.inf
        if not elsewhere:
            self._failures = [failed]
        return False

    def _is_forgotten(self, failed: FarshoreError) -> bool:
        """Whether the gateway's log can't go on with the stream: NotFound, or its request has fewer
        tokens."""
        return not self._heard and not self._at.anew and isinstance(failed, NotFound | InvalidRequest)

    def _lost(self, failed: FarshoreError, reported: bool) -> bool:
        if self._resume_s <= 0 and self._feed.tokens:
            return False
        if self._heard:
            self.losses += 1
            self._fruitless += 1
            if self._fruitless >= _FRUITLESS:
                return False
            if reported and isinstance(failed, TransportError):
                # The request has failed in the gateway's log, for every reader.
                self._log = None
            if self._give_up_s is None:
                self._kept = self._feed.tokens
                self._give_up_s = self._clock() + self._resume_s
            self._round_pause_s = _FIRST_PAUSE_S
            self._steps = self._round()
            return self._next(pause=False)
        return self._next()

    def _next(self, *, pause: bool = True) -> bool:
        """Takes the next step of the round or, after a pause, of the next round."""
        self.pause_s = 0.0
        if not self._steps and pause and self._give_up_s is not None:
            if self._clock() + self._round_pause_s >= self._give_up_s:
                return False
            self.pause_s = self._round_pause_s
            self._round_pause_s = min(2 * self._round_pause_s, _MOST_PAUSE_S)
            self._steps = self._round()
        if not self._steps:
            return False
        self._at = self._steps.pop(0)
        return True

    def _round(self) -> list[_Step]:
        """Every gateway that may go on, first the one whose log can."""
        steps = [_Step(gateway, gateway is not self._log) for gateway in self._gateways.in_turn()]
        steps.sort(key=lambda step: step.gateway is not self._log)
        return steps if self._feed.repeatable else [step for step in steps if not step.anew]


def _is_loss(failed: FarshoreError, reported: bool) -> bool:
    """An error that gRPC, or a proxy, made of a broken stream; or a gateway's report that the engine is
    lost, that it shuts down itself, or that nothing was read for too long."""
    if isinstance(failed, TransportError):
        return True
    return isinstance(failed, DeadlineExceeded) if reported else isinstance(failed, Internal)
