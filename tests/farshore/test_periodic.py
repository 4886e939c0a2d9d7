"""Threads and tasks that repeat: they outlive errors, and tell each once."""

import asyncio
import threading

import pytest

from farshore import periodic
from farshore.periodic import ErrorLog, PeriodicThread, repeat

OUTCOMES = [KeyError("a"), KeyError("b"), None, KeyError("c"), OSError("d"), OSError("e"), KeyError("f")]
TOLD = ["'a'", "'c'", "d", "'f'"]
"""An error is told again after a success, or after another type of error."""


@pytest.fixture
def told():
    return []


@pytest.fixture
def tell(told):
    return lambda error: told.append(str(error))


def test_an_error_is_told_once_until_the_next_success(told, tell):
    errors = ErrorLog(tell)
    for outcome in OUTCOMES:
        if outcome is None:
            errors.succeeded()
        else:
            errors.failed(outcome)
    assert told == TOLD


def test_a_thread_outlives_errors_and_ends_when_it_is_stopped(told, tell):
    left, done = iter(OUTCOMES), threading.Event()

    def call():
        outcome = next(left, done)
        if outcome is done:
            done.set()
        elif outcome is not None:
            raise outcome

    thread = PeriodicThread(call, name="repeats", period_s=0.001, tell=tell)
    thread.start()
    assert done.wait(60)
    for _ in range(2):
        thread.stop()
    assert told == TOLD
    assert not any(thread.name == "repeats" for thread in threading.enumerate())


def test_a_thread_that_is_stopped_does_not_finish_its_period(tell):
    called = threading.Event()
    thread = PeriodicThread(called.set, name="repeats", period_s=1e6, tell=tell)
    thread.start()
    assert called.wait(60)
    thread.stop()


def test_a_thread_that_never_started_stops(tell):
    PeriodicThread(lambda: None, name="repeats", period_s=1.0, tell=tell).stop()


def test_a_task_outlives_errors_until_it_is_cancelled(told, tell, monkeypatch):
    monkeypatch.setattr(periodic, "RETRY_S", 0.0)

    async def run():
        left, done = iter(OUTCOMES), asyncio.Event()

        async def step():
            outcome = next(left, done)
            if outcome is done:
                done.set()
                await asyncio.Event().wait()
            elif outcome is not None:
                raise outcome

        task = asyncio.create_task(repeat(step, tell=tell))
        await asyncio.wait_for(done.wait(), 60)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(run())
    assert told == TOLD
