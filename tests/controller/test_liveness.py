"""Liveness against real health services. Ends that Ray reports are tested in test_process_ends.py."""

import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from farshore.controller.exits import actor_end_in_words, exit_in_words
from farshore.controller.liveness import ENGINE, EndedWorker, Liveness, ended_workers
from farshore.ids import WorkerId

DENSE = WorkerId("dense-0")


class Engine:
    """A gRPC server whose health the test sets."""

    def __init__(self):
        self._checks = health.HealthServicer()
        self._server = grpc.server(ThreadPoolExecutor(1))
        health_pb2_grpc.add_HealthServicer_to_server(self._checks, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        self.set("SERVING")

    def set(self, state):
        self._checks.set(ENGINE, health_pb2.HealthCheckResponse.ServingStatus.Value(state))

    def stop(self):
        self._server.stop(0).wait()


@pytest.fixture
def engine():
    made = Engine()
    yield made
    made.stop()


@pytest.fixture
def liveness():
    made = Liveness(pool_is_remote=True)
    yield made
    made.close()


def test_an_engine_that_has_ended_in_a_process_that_lives(liveness, engine):
    liveness.add_engine(DENSE, engine.address)
    assert liveness.ended() == []
    engine.set("NOT_SERVING")
    (ended,) = liveness.ended()
    assert (ended.worker, ended.kind, ended.fatal) == (DENSE, "dense", True)
    assert "NOT_SERVING" in ended.how
    # An engine that has ended is not asked again.
    engine.set("SERVING")
    assert liveness.ended() == [ended]


def test_an_engine_that_does_not_answer_has_not_ended(liveness):
    """It may be frozen and wake again; if its process has ended, Ray reports that."""
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as absent:
        absent.bind(("127.0.0.1", 0))
        for index, server in enumerate((silent, absent)):
            liveness.add_engine(WorkerId(f"dense-{index}"), f"127.0.0.1:{server.getsockname()[1]}")
        assert liveness.ended() == []


@pytest.mark.parametrize(
    ("gone", "fatal"),
    [(["attention-0"], False), (["attention-0", "attention-1"], True), (["dense-0"], True)],
)
def test_which_ends_are_fatal(gone, fatal):
    kinds = {"attention-0": "attention", "attention-1": "attention", "dense-0": "dense"}
    ended = ended_workers(dict.fromkeys(gone, "ended"), kinds, pool_is_remote=True)
    assert {worker.worker: worker.fatal for worker in ended} == dict.fromkeys(gone, fatal)


def test_a_local_pool_needs_no_attention_worker():
    ended = ended_workers({"attention-0": "ended"}, {"attention-0": "attention"}, pool_is_remote=False)
    assert ended == [EndedWorker(worker="attention-0", kind="attention", how="ended", fatal=False)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [(0, "ended with code 0"), (7, "ended with code 7"), (-9, "was killed by SIGKILL"), (-99, "signal 99")],
)
def test_exit_codes_in_words(code, expected):
    assert expected in exit_in_words(code)


def test_rays_message_about_a_dead_actor_becomes_a_sentence():
    message = (
        "The actor died unexpectedly before finishing this task.\n\t\tpid: 12393\n\tip: 127.0.0.1"
        "\nThe actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
        "detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes …"
    )
    assert (
        actor_end_in_words(Exception(message)) == "(process 12393) was killed, ran out of memory or crashed"
    )
    assert actor_end_in_words(Exception("Worker exit detail: Owner's node died. More.")) == (
        "ended: Owner's node died"
    )
    assert actor_end_in_words(Exception("")) == "ended"
