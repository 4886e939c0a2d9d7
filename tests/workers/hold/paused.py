"""An engine that stands still at a token, so that a test looks, or acts, in the middle of a request."""

import threading

from farshore.workers.engine.sequence import Sampled

from ...waiting import until

DEADLINE_S = 60.0


class Paused:
    """Takes events in the engine's thread, and passes them to ``emit``. The engine stands still behind each
    event that is ``due`` until the test leaves the context of this object::

        with paused:  # Waits until the engine stands still.
            (view,) = engine.views()
    """

    def __init__(self, emit, due):
        self.emit, self._due = emit, due
        self._reached, self._left = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, event):
        self.emit(event)
        if self._due(event):
            self._reached.release()
            assert self._left.acquire(timeout=DEADLINE_S), "the test does not let the engine go on"

    def __enter__(self):
        assert self._reached.acquire(timeout=DEADLINE_S), "the engine has not come so far"

    def __exit__(self, *_):
        self._left.release()


def pause_next(engine, *numbers):
    """Returns a Paused of the engine's next request, at the tokens with these numbers. For a request that
    does not come from the test itself."""
    submit = engine.submit

    def noted(sequence, prompt, sampling, emit, **options):
        del engine.submit
        paused.emit = emit
        submit(sequence, prompt, sampling, paused, **options)

    paused, engine.submit = Paused(None, at_tokens(*numbers)), noted
    return paused


def unhurried(engine):
    """From now on no round of the engine begins before the other threads have done what earlier rounds left
    to them: placements and calls to shards. So no sequence runs far ahead of them."""
    scheduler, run = engine._scheduler, engine._scheduler.round

    def later():
        placing = scheduler._placing
        until(
            lambda: (placing is None or placing[2].done()) and engine._pool.is_idle(), "a call does not end"
        )
        return run()

    scheduler.round = later


def at_tokens(*numbers):
    """A ``due`` of Paused: true for the tokens with these numbers, counted from 1 over all choices."""
    drawn = 0

    def due(event):
        nonlocal drawn
        drawn += isinstance(event, Sampled)
        return isinstance(event, Sampled) and drawn in numbers

    return due
