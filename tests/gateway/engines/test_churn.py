"""Requests through two gateways while engines refuse, break, freeze, close, leave and join at random."""

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from farshore.benchmarks.gateway.scripted import CallEnds
from farshore.errors import TransportError
from farshore.gateway.limits import Limits
from farshore.proto import inference_pb2 as api

from ...waiting import until

ANSWER = (10, 11, 12, 13)
REQUESTS = 120
DEADLINE_S = 60.0
RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
LIMITS = Limits(probe_s=0.2, missed_probes=50, lost_s=2.0, cancel_s=0.3, drain_s=0.1)
"""Engines that answer are not taken for frozen on a busy machine."""
REFUSALS = [
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full", "Overloaded"),
    (grpc.StatusCode.UNAVAILABLE, "draining", "TransportError"),
    CallEnds(grpc.StatusCode.UNAVAILABLE, "Socket closed"),
    None,
]


class Churn:
    """Changes engines and the directory's list at random until :meth:`settle`."""

    def __init__(self, draw, harness, loop_thread, stack):
        self._draw, self._harness = draw, harness
        self._loop = loop_thread.loop
        self._start = lambda: stack.enter_context(harness.engine(loop_thread))
        self._engines = {}
        self.directory = harness.ListedEngines()
        for _ in range(3):
            self._join()
        self._list()

    def step(self):
        name = self._draw.choice([*self._engines])
        engine = self._engines[name]
        match self._draw.randrange(8):
            case 0 | 1:
                engine.refuses = self._draw.choice(REFUSALS)
            case 2:
                self._call(engine.confirms.clear if self._draw.random() < 0.5 else engine.confirms.set)
            case 3:
                engine.auto = self._draw.choice([None, ANSWER])
            case 4 if len(self._engines) > 1:
                del self._engines[name]
                engine.stop()
                if self._draw.random() < 0.5:
                    self._list()
            case 5:
                self._join()
            case 6:
                self.directory.fail(TransportError("no answer"))
            case _:
                self._list(
                    closed=[name] if self._draw.random() < 0.3 else [], settled=self._draw.random() < 0.5
                )

    def settle(self):
        for engine in self._engines.values():
            engine.refuses, engine.auto = None, ANSWER
            self._call(engine.confirms.set)
            for sequence in list(engine.live.values()):
                sequence.close()
        self._list()

    def _join(self):
        engine = self._start()
        engine.auto = ANSWER
        self._engines[f"dense-{self._draw.getrandbits(32):x}"] = engine

    def _list(self, **options):
        records = [self._harness.dense(name, engine.address) for name, engine in self._engines.items()]
        self._draw.shuffle(records)
        self.directory.list(*records, **options)

    def _call(self, function):
        self._loop.call_soon_threadsafe(function)


@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends_in_its_answer_or_retryably(harness, loop_thread, served, monkeypatch, seed):
    monkeypatch.setattr("farshore.gateway.engines.discovery.PERIOD_S", 0.05)
    draw = random.Random(seed)
    with contextlib.ExitStack() as stack:
        churn = Churn(draw, harness, loop_thread, stack)
        gateways = [
            stack.enter_context(
                harness.gateway(loop_thread, served, directory=churn.directory, limits=LIMITS)
            )
            for _ in range(2)
        ]

        def ask(number):
            farshore = gateways[number % 2]
            ids = [number % 5] * 300 if number % 3 else [5] * 8
            asked = dict(text=None, tokens=api.TokenIds(ids=ids), request_id=f"{seed}-{number}")
            try:
                call = farshore.generate(**asked)
                if number % 7 == 0:
                    next(call)
                    farshore.stub.Cancel(
                        api.CancelRequest(request_id=asked["request_id"]), timeout=DEADLINE_S
                    )
                seen = list(call)
            except grpc.RpcError as error:
                assert error.code() in (*RETRYABLE, grpc.StatusCode.NOT_FOUND), error
                return "failed"
            assert seen[-1].HasField("finished")
            tokens = tuple(event.token.token_id for event in seen if event.HasField("token"))
            assert tokens == ANSWER[: len(tokens)]
            (end,) = seen[-1].finished.choices
            assert len(tokens) == len(ANSWER) or end.reason == api.FINISH_REASON_CANCELLED
            return "cancelled" if end.reason == api.FINISH_REASON_CANCELLED else "answered"

        for farshore in gateways:
            until(lambda known=farshore.gateway.engines: len(known.available()) == 3)
        ends = [ask(REQUESTS + 1)]  # Before the churn, in which a busy machine may answer none.
        with ThreadPoolExecutor(8) as clients:
            asking = [clients.submit(ask, number) for number in range(REQUESTS)]
            while sum(each.done() for each in asking) < REQUESTS * 0.9:
                churn.step()
                threading.Event().wait(0.01)
            churn.settle()
            ends += [each.result(DEADLINE_S) for each in asking]
        assert "answered" in ends
        for farshore in gateways:
            await_rest(farshore)
            assert len(list(farshore.generate())) == len(ANSWER) + 2


def await_rest(farshore):
    """Waits until the gateway has an engine and counts no request."""
    known = farshore.gateway.engines
    until(lambda: known.problem is None and not any(engine.running for engine in known.available()))
