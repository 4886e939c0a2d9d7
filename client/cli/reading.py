"""Reads a stream of a gateway in a thread of its own, so that a signal ends it at any time.

Used by the commands that stream. A signal that interrupts gRPC's own code may leave one of its locks held for
ever: then the next answer never comes, or its channel can't be closed. Here a signal interrupts no more than
the wait for the next value. Must not know what the values are.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from farshore.client.cli.terminal import held_signals
from farshore.client.sdk import Client

_Value = TypeVar("_Value")
_END = object()
END_S = 5.0
"""For the thread to notice that its connection is closed."""


@contextlib.contextmanager
def reading(
    client: Client, start: Callable[[Client], Iterator[_Value]], *, timeout_s: float = 10.0
) -> Iterator[Iterator[_Value]]:
    """Yields the values of the stream that ``start`` begins, whose errors they raise. The stream has a
    connection of its own to the gateways of ``client``, first the one that ``client`` uses. Leaving the
    context closes it, which ends the request. ``timeout_s``: as the client's."""
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    own: Client | None = None
    reader: threading.Thread | None = None
    try:
        with held_signals():
            own = Client(dict.fromkeys((client.address, *client.addresses)), timeout_s=timeout_s)
            reader = threading.Thread(target=_read, args=(own, start, found), daemon=True)
            reader.start()
        yield _values(found)
    finally:
        with held_signals():
            if own is not None:
                own.close()
            if reader is not None:
                reader.join(END_S)


def _read(own: Client, start: Callable[[Client], Iterator[Any]], found: "queue.SimpleQueue[Any]") -> None:
    try:
        for value in start(own):
            found.put((value, None))
        found.put((_END, None))
    except Exception as error:
        found.put((_END, error))


def _values(found: "queue.SimpleQueue[Any]") -> Iterator[Any]:
    while True:
        value, error = found.get()
        if error is not None:
            raise error
        if value is _END:
            return
        yield value
