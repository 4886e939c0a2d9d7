"""The gateway as a process: what it tells its parent, and when it leaves."""

import json
import signal
import socket
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc


@pytest.fixture
def spawn():
    """Starts gateway processes; returns (process, the line it printed)."""
    processes = []

    def start(listen="127.0.0.1:0", model="smollm2", late=False):
        arguments = ["--model", model, "--listen", listen]
        arguments += ["--controller", "127.0.0.1:2"]
        # The engine's address may come later, on stdin.
        arguments += [] if late else ["--engine", "127.0.0.1:1"]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "farshore.gateway", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        if late:
            process.stdin.write("127.0.0.1:1\n")
            process.stdin.flush()
        return process, json.loads(process.stdout.readline())

    yield start
    for process in processes:
        process.kill()
        process.wait(30)
        process.stdin.close()
        process.stdout.close()


def _is_serving(address):
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        reply = health.Check(health_pb2.HealthCheckRequest(), timeout=30)
    return reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_leaves_on_a_signal(spawn, number):
    process, line = spawn()
    assert _is_serving(line["address"])
    process.send_signal(number)
    assert process.wait(30) == 0


@pytest.mark.parametrize("late", [False, True])
def test_leaves_with_its_parent(spawn, late):
    process, line = spawn(late=late)
    assert _is_serving(line["address"])
    process.stdin.close()
    assert process.wait(30) == 0


def test_taken_port(spawn):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process, line = spawn(f"127.0.0.1:{port}")
    assert process.wait(30) == 1
    assert line["kind"] == "PortInUse"
    assert str(port) in line["error"] and "--port" in line["error"]


def test_port_of_another_gateway(spawn):
    _, line = spawn()
    process, refused = spawn(line["address"])
    assert process.wait(30) == 1
    assert refused["kind"] == "PortInUse"


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1:99999", ":5"])
def test_bad_address(spawn, listen):
    process, line = spawn(listen)
    assert process.wait(30) == 1
    assert line["kind"] == "InvalidRequest"
    assert "HOST:PORT" in line["error"]


def test_host_of_another_machine(spawn):
    process, line = spawn("192.0.2.1:5000")
    assert process.wait(30) == 1
    assert line["kind"] == "InvalidRequest" and "192.0.2.1" in line["error"]


def test_unknown_model(spawn):
    process, line = spawn(model="no such model")
    assert process.wait(30) == 1
    assert line["kind"] == "ModelError"


def test_imports_nothing_heavy():
    code = (
        "import sys, farshore.gateway.__main__\n"
        "heavy = ('torch', 'ray', 'transformers', 'farshore.kernels', 'farshore.kvstore',\n"
        "         'farshore.attention_offload', 'farshore.workers', 'farshore.controller')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
