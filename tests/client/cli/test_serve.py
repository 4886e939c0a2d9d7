"""``farshore serve`` with a FakeCluster, and ``farshore status`` with a real gateway."""

import inspect
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from farshore.client.cli.terminal import Progress, stop_signals
from farshore.errors import ProcessEnded, StartupError
from farshore.proto import admin_pb2 as admin
from farshore.proto import admin_pb2_grpc


def test_serve_prints_the_addresses(run, cluster):
    options = [
        "--port",
        "0",
        "--kv-memory",
        "512MiB",
        "--shard-by",
        "both",
        "--placement",
        "local",
        "--attention-workers",
        "0",
    ]
    done = run("serve", *options, "--ray-address", "127.0.0.2:6379", "--dashboard")
    assert done.code == 0
    assert "smollm2 at 127.0.0.1:1" in done.out and "attention-0  127.0.0.1:7" in done.out
    config = cluster.config
    assert (config.port, config.kv_memory_bytes, config.shard_by) == (0, 512 << 20, "both")
    assert (config.placement, config.attention_workers) == ("local", 0)
    assert (config.ray_address, config.dashboard) == ("127.0.0.2:6379", True)
    assert cluster.stops == 1


def test_serve_as_json(run, cluster):
    done = run("serve", "--json")
    endpoints = {"gateway": "127.0.0.1:1", "attention-0": "127.0.0.1:7"}
    assert json.loads(done.out) == {"model": "smollm2", "address": "127.0.0.1:1", "endpoints": endpoints}


def test_a_controller_alone_needs_a_ray_to_join(run, cluster):
    cluster.address, cluster.endpoints = "", {"controller": "10.0.0.1:7"}
    done = run("serve", "--no-gateway", "--ray-address", "127.0.0.2:6379", "--controller-port", "50052")
    assert done.code == 0 and not cluster.has_gateway and cluster.config.controller_port == 50052
    assert "keeps the cluster default" in done.out and "Try:" not in done.out
    done = run("serve", "--no-gateway")
    assert done.code == 2 and "--no-gateway: give --ray-address" in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_everything(run, cluster, number):
    before = signal.getsignal(number)
    cluster.on_wait = lambda _: os.kill(os.getpid(), number)
    assert run("serve").code == 0
    assert cluster.stops == 1
    assert signal.getsignal(number) is before


def test_sigterm_works_after_ray_has_replaced_its_handler(run, cluster):
    def as_ray_does(number, _):
        raise SystemExit(number)

    cluster.on_start = lambda: signal.signal(signal.SIGTERM, as_ray_does)
    cluster.on_wait = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    assert run("serve").code == 0
    assert cluster.stops == 1


def test_sigterm_while_rays_handler_is_installed(run, cluster):
    def start():
        raise SystemExit(int(signal.SIGTERM))

    cluster.on_start = start
    assert run("serve").code == 0


def test_a_second_signal_does_not_interrupt_the_stop():
    cleaned = False
    with pytest.raises(KeyboardInterrupt), stop_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            cleaned = True
    assert cleaned


def test_a_second_signal_shortens_the_stop(run, cluster):
    def end(_):
        os.kill(os.getpid(), signal.SIGTERM)

    stop = type(cluster).__exit__

    def stop_slowly(fake, *arguments):
        assert not fake.shortened
        os.kill(os.getpid(), signal.SIGINT)
        assert fake.shortened
        stop(fake, *arguments)

    cluster.on_wait = end
    cluster.__class__ = type("Slow", (type(cluster),), {"__exit__": stop_slowly})
    assert run("serve").code == 0 and cluster.stops == 1


def test_the_fake_cluster_has_the_real_ones_signatures(cluster):
    """The real one is imported in another process, so that this process does not import Ray."""
    code = (
        "import inspect\n"
        "from farshore.controller.driver.cluster import Cluster\n"
        "for method in (Cluster.start, Cluster.wait, Cluster.reconfigure, Cluster.end_now):\n"
        "    print(*inspect.signature(method).parameters)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    # inspect does not list the first parameter of a class method.
    fake = type(cluster)
    methods = (cluster.start, fake.wait, fake.reconfigure, fake.end_now)
    parameters = [name for method in methods for name in inspect.signature(method).parameters]
    assert done.stdout.split() == parameters, done.stderr


def test_the_end_of_a_process_is_printed_before_the_others_are_ended(run, cluster, capsys):
    def end(warn):
        warn("attention-0 was killed")
        raise ProcessEnded("dense-0 was killed")

    printed = []
    stop = type(cluster).__exit__

    def read_and_stop(*arguments):
        printed.append(capsys.readouterr().err)
        stop(*arguments)

    cluster.on_wait = end
    cluster.__class__ = type("Watched", (type(cluster),), {"__exit__": read_and_stop})
    done = run("serve")
    assert done.code == 1 and done.err == ""
    assert printed[0].splitlines()[-2:] == [
        "farshore: warning: attention-0 was killed",
        "farshore: error: dense-0 was killed",
    ]
    assert cluster.stops == 1


@pytest.mark.parametrize("error", [StartupError("no room"), ProcessEnded("Ray's raylet was killed")])
def test_a_failed_start_prints_one_line(run, cluster, error):
    def fail():
        raise error

    cluster.on_start = fail
    done = run("serve")
    assert done.code == 1 and done.out == ""
    assert done.err.endswith(f"farshore: error: {error}\n") and done.err.count("error:") == 1
    assert cluster.stops == 0  # Cluster.start ends what it started.


class _Terminal:
    def __init__(self):
        self.written = ""

    def isatty(self):
        return True

    def write(self, text):
        self.written += text

    def flush(self):
        pass


def test_progress_leaves_nothing_on_a_terminal():
    terminal = _Terminal()
    progress = Progress(terminal)
    progress.step("one")
    progress.update("two")
    progress.clear()
    progress.clear()
    clear = "\r\x1b[2K"
    assert terminal.written == f"{clear}one{clear}two{clear}"


@pytest.fixture
def busy(farshore):
    """A Harness whose status shows two workers and one sequence."""
    workers = [
        admin.WorkerStatus(
            worker_id="attention-0",
            kind=admin.WORKER_KIND_ATTENTION,
            address="127.0.0.1:7",
            process_id=77,
            state=admin.WORKER_STATE_READY,
            budget_bytes=1 << 30,
            free_bytes=3 << 28,
        ),
        admin.WorkerStatus(
            worker_id="dense-0",
            kind=admin.WORKER_KIND_DENSE,
            links=[
                admin.ShardLink(
                    worker_id="attention-0",
                    transport="shared memory",
                    frames=90,
                    failures=1,
                    p50_ms=0.25,
                    p99_ms=3,
                    deadline_ms=120,
                    slow=True,
                )
            ],
        ),
    ]
    spans = [admin.SpanStatus(worker_id="attention-0", first=0, last=512, group0=0, group1=3, bytes=9 << 20)]
    sequence = admin.SequenceStatus(
        sequence_id="abc", owner="dense-0", epoch=1, tokens=600, tail_first=512, spans=spans
    )
    farshore.engine.status.MergeFrom(
        admin.ClusterStatusResponse(
            workers=workers, sequences=[sequence], pool_budget_bytes=1 << 30, pool_free_bytes=3 << 28
        )
    )
    return farshore


def test_status_shows_workers_connections_and_spans(run, busy):
    done = run("status", "--server", busy.address)
    assert done.code == 0
    assert "pool: 256.0 MiB of 1.0 GiB used" in done.out
    rows = [line.split() for line in done.out.splitlines()]
    assert ["attention-0", "attention", "ready", "127.0.0.1:7", "77", "256.0", "MiB", "1.0", "GiB"] in rows
    link = "dense-0 → attention-0 shared memory 90 0.25 ms 3 ms 120 ms 1 slow"
    assert link.split() in rows
    assert ["abc", "600", "attention-0", "0..512", "0..3", "9.0", "MiB"] in rows
    assert ["dense-0", "(tail)", "512..600", "all", "-"] in rows


def test_status_when_idle(run, farshore):
    out = run("status", "--server", farshore.address).out
    assert "no live sequences" in out
    assert "LINK" not in out


def test_status_shows_the_settings_in_force(run, farshore):
    farshore.engine.status.MergeFrom(
        admin.ClusterStatusResponse(kv_format="int8", max_decode_stall_ms=50, speculate_tokens=4)
    )
    out = run("status", "--server", farshore.address).out
    assert (
        "KV as int8" in out
        and "at most 50 ms from token to token beside other prompts; up to 4 tokens guessed ahead" in out
    )
    status = json.loads(run("status", "--server", farshore.address, "--json").out)
    assert (status["kv_format"], status["max_decode_stall_ms"], status["speculate_tokens"]) == ("int8", 50, 4)


def test_status_as_json(run, busy):
    status = json.loads(run("status", "--server", busy.address, "--json").out)
    assert status["workers"][0]["process_id"] == 77
    assert status["workers"][1]["links"][0]["transport"] == "shared memory"
    assert status["sequences"][0]["spans"][0]["last"] == 512


def test_status_without_a_gateway(run):
    done = run("status", "--server", "127.0.0.1:1")
    assert done.code == 3
    assert "no gateway answers at 127.0.0.1:1" in done.err


class Failed(admin_pb2_grpc.AdminServiceServicer):
    """A gateway whose engine has failed: it reports its status, and its health is NOT_SERVING."""

    def ClusterStatus(self, request, context):
        worker = admin.WorkerStatus(
            worker_id="dense-0", kind=admin.WORKER_KIND_DENSE, state=admin.WORKER_STATE_FAILED
        )
        return admin.ClusterStatusResponse(workers=[worker])


@pytest.fixture
def failed():
    """The address of a server with Failed."""
    checks = health.HealthServicer()
    checks.set("farshore.inference.v1.InferenceService", health_pb2.HealthCheckResponse.NOT_SERVING)
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Failed(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_status_of_a_gateway_that_does_not_serve(run, failed):
    """Status must be available when the engine has failed."""
    done = run("status", "--server", failed)
    assert done.code == 0, done.err
    assert ["dense-0", "dense", "failed"] in [line.split()[:3] for line in done.out.splitlines()]


def test_generate_at_a_gateway_that_does_not_serve(run, cluster, failed, monkeypatch):
    monkeypatch.setattr("farshore.client.cli.connect.ANSWER_DEADLINE_S", 0.0)
    monkeypatch.setattr("farshore.client.cli.connect.DEFAULT_SERVER", failed)
    done = run("generate", "Hi")
    assert done.code == 3 and "has failed" in done.err
    assert cluster.config is None
