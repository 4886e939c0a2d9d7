"""Waiting for what other threads and processes do. Used by tests of every room."""

import threading
import time

DEADLINE_S = 60.0


def until(condition, what="the condition does not hold", *, deadline_s=DEADLINE_S, pause_s=0.005):
    """Waits until ``condition()`` is true. ``what``: what is wrong if it does not become true in time."""
    end_s, pause = time.monotonic() + deadline_s, threading.Event()
    while not condition():
        assert time.monotonic() < end_s, what
        pause.wait(pause_s)
