"""Which workers have ended, from real health services; Ray's part in it: test_part_ends.py."""

import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from farshore.controller.exits import how_an_actor_ended, how_it_ended
from farshore.controller.parts import ENGINE, Ended, Parts, judged
from farshore.ids import WorkerId

DENSE = WorkerId("dense-0")


class Engine:
    """A server whose health is the test's to set."""

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
def parts():
    made = Parts(pool_is_remote=True)
    yield made
    made.close()


def test_an_engine_that_has_ended_in_a_process_that_lives(parts, engine):
    parts.add_engine(DENSE, engine.address)
    assert parts.ended() == []
    engine.set("NOT_SERVING")
    (ended,) = parts.ended()
    assert (ended.worker, ended.kind, ended.fatal) == (DENSE, "dense", True)
    assert "NOT_SERVING" in ended.how
    # It stays ended: nothing is asked of it again.
    engine.set("SERVING")
    assert parts.ended() == [ended]


def test_one_that_is_silent_or_gone_has_not_ended(parts):
    """A frozen worker wakes; of one whose process is gone Ray tells."""
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as absent:
        absent.bind(("127.0.0.1", 0))
        for index, it in enumerate((silent, absent)):
            parts.add_engine(WorkerId(f"dense-{index}"), f"127.0.0.1:{it.getsockname()[1]}")
        assert parts.ended() == []


@pytest.mark.parametrize(
    ("gone", "fatal"),
    [(["attention-0"], False), (["attention-0", "attention-1"], True), (["dense-0"], True)],
)
def test_what_a_cluster_can_do_without(gone, fatal):
    kinds = {"attention-0": "attention", "attention-1": "attention", "dense-0": "dense"}
    ended = judged(dict.fromkeys(gone, "ended"), kinds, pool_is_remote=True)
    assert {it.worker: it.fatal for it in ended} == dict.fromkeys(gone, fatal)


def test_a_local_pool_needs_no_attention_worker():
    ended = judged({"attention-0": "ended"}, {"attention-0": "attention"}, pool_is_remote=False)
    assert ended == [Ended(worker="attention-0", kind="attention", how="ended", fatal=False)]


@pytest.mark.parametrize(
    ("code", "told"),
    [(0, "ended with code 0"), (7, "ended with code 7"), (-9, "was killed by SIGKILL"), (-99, "signal 99")],
)
def test_exit_codes_in_words(code, told):
    assert told in how_it_ended(code)


def test_the_page_that_ray_writes_in_a_sentence():
    page = (
        "The actor died unexpectedly before finishing this task.\n\t\tpid: 12393\n\tip: 127.0.0.1"
        "\nThe actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
        "detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes …"
    )
    assert how_an_actor_ended(Exception(page)) == "(process 12393) was killed, ran out of memory or crashed"
    assert how_an_actor_ended(Exception("Worker exit detail: Owner's node died. More.")) == (
        "ended: Owner's node died"
    )
    assert how_an_actor_ended(Exception("")) == "ended"
