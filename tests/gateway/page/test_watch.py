"""One watch for all pages: when the controller is asked, what is kept, and which events are new."""

import asyncio

import grpc
import pytest

from farshore.gateway.page.view import MOST_EVENTS
from farshore.gateway.page.watch import FRESH_S, RATE_S, Watch
from farshore.gateway.requests.request import Failure, RequestFailed
from farshore.proto import admin_pb2 as admin


class Operators:
    """Answers with ``tokens`` of one engine and with ``kept`` events, or fails."""

    def __init__(self):
        self.tokens = 0
        self.kept = []
        self.fails = False
        self.asked = 0
        self.sent = 0

    async def status(self):
        self.asked += 1
        await asyncio.sleep(0)
        if self.fails:
            raise RequestFailed(Failure(grpc.StatusCode.UNAVAILABLE, "away"))
        worker = admin.WorkerStatus(
            worker_id="dense-0",
            kind=admin.WORKER_KIND_DENSE,
            state=admin.WORKER_STATE_READY,
            tokens=self.tokens,
        )
        return admin.ClusterStatusResponse(workers=[worker])

    async def events(self, since):
        new = [event for event in self.kept if event.number > since]
        self.sent += len(new)
        return new


@pytest.fixture
def run():
    """run(coroutine) -> its result; all on one event loop."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def operators():
    return Operators()


@pytest.fixture
def watch(operators, clock):
    return Watch(operators, clock=clock)


def events(*numbers, kind="joined"):
    return [admin.ClusterEvent(number=number, kind=kind) for number in numbers]


def numbers_of(answer):
    return [event["number"] for event in answer["events"]]


def test_pages_share_an_answer(run, watch, operators, clock):
    async def several():
        return await asyncio.gather(*(watch.read() for _ in range(20)))

    assert len({id(answer) for answer in run(several())}) == 1
    assert operators.asked == 1
    clock.now_s += FRESH_S
    run(several())
    assert operators.asked == 2


def test_pages_share_a_failure_too(run, watch, operators, clock):
    async def several():
        return await asyncio.gather(*(watch.read() for _ in range(20)), return_exceptions=True)

    operators.fails = True
    failures = run(several())
    assert {type(failure) for failure in failures} == {RequestFailed} and operators.asked == 1
    operators.fails = False
    clock.now_s += FRESH_S
    assert run(watch.read())["workers"]


def test_a_rate_is_the_mean_of_the_last_seconds(run, watch, operators, clock):
    rates = []
    for tokens in (0, 10, 30, 60, 60, 60, 60, 60):
        operators.tokens = tokens
        rates.append(run(watch.read())["tokens_per_s"])
        clock.now_s += 1
    assert rates == [None, 10, 15, 20, 15, 12, 10, 6]


def test_no_rate_after_a_time_without_pages(run, watch, operators, clock):
    run(watch.read())
    clock.now_s += RATE_S + 1
    assert run(watch.read())["tokens_per_s"] is None


def test_only_new_events_are_read(run, watch, operators, clock):
    operators.kept = events(*range(1, 101))
    assert numbers_of(run(watch.read())) == list(range(101 - MOST_EVENTS, 101))
    operators.kept += events(101)
    clock.now_s += FRESH_S
    assert numbers_of(run(watch.read())) == list(range(102 - MOST_EVENTS, 102))
    assert operators.sent == 100 + 2


@pytest.mark.parametrize("anew", [events(1), events(1, 2, 3, kind="lost"), []])
def test_a_controller_that_counts_its_events_anew(run, watch, operators, clock, anew):
    operators.kept = events(1, 2)
    run(watch.read())
    operators.kept = anew
    clock.now_s += FRESH_S
    answer = run(watch.read())
    assert [(event["number"], event["kind"]) for event in answer["events"]] == [
        (e.number, e.kind) for e in anew
    ]
