"""The requests of one gateway: one Run call of the ``Engine`` service, whose events share its messages.

Made by ``engine_service`` for each call. A thread reads what the gateway sends. Threads of a pool submit the
requests, since converting a prompt and compiling a grammar take milliseconds. The engine's thread puts
events, and the call's own thread sends all that has gathered since its last message. It must not know how a
sequence is submitted or runs.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from farshore.errors import FarshoreError, Internal, InvalidRequest, Overloaded
from farshore.ids import SequenceId
from farshore.proto import cluster_pb2 as pb
from farshore.text import shortened
from farshore.workers.engine.sequence import Event, Failed, Finished
from farshore.workers.sequence_events import Taken

MOST_EVENTS = 256
"""Events in one message. The largest, 256 prompt tokens with 20 alternatives each, takes 85 KB."""
MOST_UNSENT = 1 << 16
"""Events that wait for a gateway that does not read: 10 s of 6,000 tokens a second. gRPC's keepalive ends the
call of a gateway that is gone or frozen after 15 s."""

_log = logging.getLogger(__name__)


class Sequences(Protocol):
    """What runs the requests."""

    def submit(self, request: pb.SequenceRequest, emit: Callable[[Event], None]) -> None:
        """Begins a request. Blocks for milliseconds. ``emit`` must not block. Raises FarshoreError."""

    def cancel(self, sequence: SequenceId, *, choice: int | None = None) -> None:
        """Ends a request, or one of its completions. Never blocks. Unknown ids are ignored."""


@dataclass(slots=True)
class _Request:
    """``live``: choices that have not ended. ``sequence``: None until it is submitted; ``cancelled`` are the
    choices to cancel then. ``begun``: an event of it was sent."""

    live: int = 0
    begun: bool = False
    sequence: SequenceId | None = None
    cancelled: list[int | None] = field(default_factory=list)


class GatewayStream:
    """One call. ``message`` makes a message of an event. ``submitting`` bounds the requests that wait for
    ``pool``; further ones fail as Overloaded. ``break_off`` ends the call, from any thread and at once."""

    def __init__(
        self,
        sequences: Sequences,
        *,
        message: Callable[[int, Event | Taken], pb.SequenceEvent],
        pool: Executor,
        submitting: threading.Semaphore,
        break_off: Callable[[], None],
    ) -> None:
        self._sequences = sequences
        self._message = message
        self._pool = pool
        self._submitting = submitting
        self._break_off = break_off
        self._unsent: queue.SimpleQueue[tuple[int, Event | Taken] | None] = queue.SimpleQueue()
        """None: look whether the call is over."""
        self._lock = threading.Lock()
        self._requests: dict[int, _Request] = {}
        self._read_all = False
        self._ending = False
        self._closed = False

    def read(self, messages: Iterable[pb.GatewayMessage]) -> None:
        """Does what the gateway says, until it says no more. Call it once, from a thread of its own. Raises
        what ``messages`` raises, and InvalidRequest for a number that is in use."""
        for message in messages:
            if message.HasField("cancel"):
                choice = message.cancel.choice if message.cancel.HasField("choice") else None
                self._cancel(message.number, choice)
            else:
                self._begin(message.number, message.submit)
        self._read_all = True
        self._unsent.put(None)

    def messages(self) -> Iterator[pb.EngineMessage]:
        """Yields what is there whenever there is something, until all has been read and every request has
        ended, or until :meth:`end` or :meth:`close`."""
        while True:
            gathered = [self._unsent.get()]
            with suppress(queue.Empty):
                while len(gathered) < MOST_EVENTS:
                    gathered.append(self._unsent.get_nowait())
            events = [
                self._message(*item) for item in gathered if item is not None and self._is_wanted(*item)
            ]
            if events:
                yield pb.EngineMessage(events=events)
            if self._unsent.empty() and self._is_over():
                return

    def end(self) -> None:
        """Ends :meth:`messages` after all events that were put."""
        self._ending = True
        self._unsent.put(None)

    def close(self) -> None:
        """The call has ended: cancels all requests. Idempotent; never blocks."""
        with self._lock:
            self._closed = True
            running = [it.sequence for it in self._requests.values() if it.sequence is not None]
            self._requests.clear()
        for sequence in running:
            self._sequences.cancel(sequence)
        self.end()

    def _begin(self, number: int, raw: bytes) -> None:
        with self._lock:
            if self._closed:
                return
            if number in self._requests:
                raise InvalidRequest(f"the gateway uses the number {number} of a request twice")
            request = self._requests[number] = _Request()
        if not self._submitting.acquire(blocking=False):
            self._put(
                number, Failed(Overloaded("too many requests arrive at once: try again in a few seconds"))
            )
            return
        try:
            self._pool.submit(self._submit, number, request, raw)
        except RuntimeError:  # The pool was shut down: the engine stops, and so ends the call.
            self._submitting.release()

    def _submit(self, number: int, request: _Request, raw: bytes) -> None:
        try:
            if self._closed:
                return
            message = pb.SequenceRequest.FromString(raw)
            request.live = message.sampling.n or 1
            self._sequences.submit(message, lambda event: self._put(number, event))
        except FarshoreError as error:
            self._put(number, Failed(error))
            return
        except Exception as error:
            _log.exception("a request broke the engine's service")
            self._put(number, Failed(Internal(f"{type(error).__name__}: {shortened(str(error))}")))
            return
        finally:
            self._submitting.release()
        self._put(number, Taken())
        sequence = SequenceId(message.sequence_id)
        with self._lock:
            request.sequence = sequence
            cancelled = [None] if self._closed else request.cancelled
        for choice in cancelled:
            self._sequences.cancel(sequence, choice=choice)

    def _cancel(self, number: int, choice: int | None) -> None:
        with self._lock:
            request = self._requests.get(number)
            if request is None:
                return
            if request.sequence is None:
                request.cancelled.append(choice)
                return
        self._sequences.cancel(request.sequence, choice=choice)

    def _put(self, number: int, event: Event | Taken) -> None:
        if self._closed:
            return
        if self._unsent.qsize() >= MOST_UNSENT:
            _log.warning("a gateway does not read its %d events: its requests end", MOST_UNSENT)
            self.close()
            self._break_off()
            return
        self._unsent.put((number, event))

    def _is_wanted(self, number: int, event: Event | Taken) -> bool:
        """Notes an event that is to be sent, and forgets the request with its last one. Taken is not wanted
        if the engine's thread was faster."""
        request = self._requests.get(number)
        if isinstance(event, Taken):
            return request is not None and not request.begun
        if request is not None:
            request.begun = True
            request.live -= isinstance(event, Finished)
            if not request.live or isinstance(event, Failed):
                with self._lock:
                    self._requests.pop(number, None)
        return True

    def _is_over(self) -> bool:
        return self._ending or (self._read_all and not self._requests)
