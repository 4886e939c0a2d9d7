"""A dense worker that can't go on: its record says so and why, and its process ends to be replaced."""

import subprocess
import sys
import threading

import grpc
import pytest

from farshore import rpc
from farshore.errors import FarshoreError, ModelError
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.workers.dense import DenseWorker
from farshore.workers.ending import Ending

from ..waiting import until
from .in_process import dense_config

DEADLINE_S = 60.0


class Dense:
    """A dense worker in this process that has not loaded yet."""

    def __init__(self, folder):
        self.directory = EmbeddedDirectory(clock=lambda: 0.0)
        self.failed = threading.Semaphore(0)
        self.worker = DenseWorker(
            dense_config(folder), self.directory, host="127.0.0.1", on_failed=self.failed.release
        )

    def record(self):
        (record,) = self.directory.listing().workers
        return record

    def await_failed(self):
        """The record of the worker, which has failed and said so once."""
        assert self.failed.acquire(timeout=DEADLINE_S)
        until(lambda: self.record().state == "failed", "the directory does not say so")
        assert not self.failed.acquire(blocking=False)
        return self.record()


@pytest.fixture
def dense(tiny_folder):
    made = Dense(tiny_folder)
    yield made
    made.worker.stop()


@pytest.mark.parametrize("error", [RuntimeError("CUDA error:\nout of memory"), MemoryError(), KeyError("a")])
def test_any_error_of_a_load_is_told(dense, monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("farshore.workers.dense.load_model", broken)
    with pytest.raises(type(error)):
        dense.worker.run()
    record = dense.await_failed()
    words = " ".join(f"{type(error).__name__}: {error}".split())
    assert record.failure == f"the worker can't start: {words}"


def test_a_missing_model_is_told_in_its_own_words(tmp_path):
    dense = Dense(tmp_path / "nothing")
    with pytest.raises(FarshoreError) as error:
        dense.worker.run()
    assert dense.await_failed().failure == str(error.value)
    assert isinstance(error.value, ModelError)
    dense.worker.stop()


def test_gateways_leave_room_for_the_controllers_questions(dense, monkeypatch):
    """A worker that does not answer Status can't be drained."""
    monkeypatch.setattr("farshore.workers.dense.MAX_CALLS", 4)
    dense.worker.run()
    until(lambda: dense.record().state == "serving", "it is not listed")
    with rpc.channel(dense.record().address, None) as channel:
        stub = pb_grpc.EngineStub(channel)
        ended = threading.Event()

        def silent():
            ended.wait(DEADLINE_S)
            yield from ()

        gateways = [stub.Run(silent(), timeout=DEADLINE_S) for _ in range(4)]
        until(lambda: any(call.done() for call in gateways), "a gateway holds each of the worker's calls")
        (refused,) = [call for call in gateways if call.done()]
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.Status(pb.EngineStatusRequest(), timeout=DEADLINE_S).worker.running == 0
        ended.set()


def test_an_engine_that_fails_takes_its_worker_with_it(dense, monkeypatch):
    """Without that, its lease would list it as serving for ever."""
    dense.worker.run()
    until(lambda: dense.record().state == "serving", "it is not listed")

    def broken(*_):
        raise RuntimeError("the logits\nare not numbers")

    engine = dense.worker._engine
    monkeypatch.setattr(engine._scheduler, "round", broken)
    monkeypatch.setattr("farshore.workers.engine.engine.probe", broken)
    engine._requests.rouse()
    assert "RuntimeError: the logits are not numbers" in dense.await_failed().failure


ENDING = """
import sys
from farshore.workers.ending import Ending

class Worker:
    is_drained = True
    def begin_drain(self): ...
    def stop(self): ...

getattr(Ending(Worker()), sys.argv[1])(*map(float, sys.argv[2:]))
sys.stdin.read()
"""


@pytest.mark.parametrize(("call", "code"), [(("begin", "0"), 0), (("fail",), 1)])
def test_the_exit_code_tells_whether_a_worker_failed(monkeypatch, call, code):
    process = subprocess.Popen([sys.executable, "-P", "-c", ENDING, *call], stdin=subprocess.PIPE)
    with process:
        assert process.wait(DEADLINE_S) == code


def test_a_failed_worker_is_not_stopped_in_order(monkeypatch):
    """The engine may never answer. The directory lists it until the process ends, with its reason."""
    monkeypatch.setattr("farshore.workers.ending.TOLD_S", 0.0)
    codes, ended = [], threading.Event()

    class Worker:
        def stop(self):
            codes.append("stopped")

    def end(code):
        codes.append(code)
        ended.set()

    Ending(Worker(), then=end).fail()
    assert ended.wait(DEADLINE_S) and codes == [1]
