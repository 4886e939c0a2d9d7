"""The gateway as a process: its report to its parent, and when it ends."""

import json
import signal
import socket
import subprocess
import sys
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore import rpc
from farshore.client import events
from farshore.client.sdk import Client
from farshore.cluster_token import ClusterToken
from farshore.errors import Internal, TransportError
from farshore.proto import cluster_pb2, cluster_pb2_grpc
from farshore.proto import inference_pb2 as api
from farshore.proto.inference_pb2_grpc import InferenceServiceStub


@pytest.fixture
def spawn(directory, harness):
    """start(listen=…, …) -> (a child gateway, the JSON object that it printed). Killed after the test.
    ``engine``: the address of the one that the directory lists."""
    processes = []

    def start(
        listen="127.0.0.1:0",
        model="smollm2",
        engine=None,
        controller=None,
        token=None,
        child=True,
        drain_s=3,
    ):
        if engine:
            directory.embedded.renew(harness.dense("dense-0-a", engine))
        arguments = ["--directory", directory.url, "--listen", listen, "--drain-timeout", str(drain_s)]
        arguments += ["--child"] if child else []
        arguments += ["--controller", controller] if controller else []
        arguments += ["--token-file", str(token)] if token else []
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "farshore.gateway"),
                *(*arguments, "--spec", json.dumps({"model": model})),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        line = process.stdout.readline()
        return process, json.loads(line) if child else line.split()[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait(60)
        if process.stdin:
            process.stdin.close()
        process.stdout.close()


def _is_serving(address):
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        reply = health.Check(health_pb2.HealthCheckRequest(), timeout=60)
    return reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_on_a_signal(spawn, engines, number):
    process, line = spawn(engine=engines().address)
    assert _is_serving(line["address"])
    process.send_signal(number)
    assert process.wait(60) == 0


def test_a_child_ends_with_its_parent(spawn, engines):
    process, line = spawn(engine=engines().address)
    assert _is_serving(line["address"])
    process.stdin.close()
    assert process.wait(60) == 0


def test_a_child_ends_with_a_parent_that_ended_before_an_engine_served(directory):
    command = [sys.executable, "-P", "-m", "farshore.gateway", "--child", "--listen", "127.0.0.1:0"]
    command += ["--directory", directory.url, "--spec", '{"model": "smollm2"}']
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_in_the_middle_when_a_signal_comes(spawn, engines, number):
    """The request fails, also in an SDK that does not resume, and the process exits with code 0."""
    process, line = spawn(engine=engines().address)
    with Client(line["address"], resume_s=0) as client:
        stream = client.generate("Hello", seed=7)
        assert [type(next(stream)) for _ in range(2)] == [events.Accepted, events.Token]
        process.send_signal(number)
        with pytest.raises(TransportError, match=r"1 tokens of the answer had come: send the prompt again"):
            list(stream)
    assert process.wait(60) == 0


def test_a_request_that_ends_while_the_gateway_drains(spawn, engines):
    engine = engines()
    process, line = spawn(engine=engine.address, drain_s=60)
    with Client(line["address"]) as client, grpc.insecure_channel(line["address"]) as channel:
        stream = client.generate("Hello")
        assert [type(next(stream)) for _ in range(2)] == [events.Accepted, events.Token]
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        # Not by the client, which would try again until the drain is over.
        with pytest.raises(grpc.RpcError, match="shutting down"):
            list(InferenceServiceStub(channel).Generate(api.GenerateRequest(text="Another")))
        engine.tell("finish")
        assert [event.reason for event in stream] == ["stop"]
        watch.cancel()
    assert process.wait(60) == 0


HTTP_BREAKS = """
import sys
import uvicorn
from farshore.gateway.__main__ import main

async def on_tick(server, counter):
    raise RuntimeError("dreaming")

uvicorn.Server.on_tick = on_tick
sys.exit(main(sys.argv[1:]))
"""


def test_a_gateway_whose_http_fails_ends(directory):
    command = [sys.executable, "-P", "-c", HTTP_BREAKS, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    command += ["--directory", directory.url, "--spec", '{"model": "smollm2"}']
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        1,
        "farshore: error: the gateway's HTTP ended: RuntimeError('dreaming')\n",
    )


def test_taken_port(spawn):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process, line = spawn(f"127.0.0.1:{port}")
    assert process.wait(60) == 1
    assert line["kind"] == "PortInUse"
    assert str(port) in line["error"] and "--port" in line["error"]


def test_port_of_another_gateway(spawn, engines):
    _, line = spawn(engine=engines().address)
    process, refused = spawn(line["address"])
    assert process.wait(60) == 1
    assert refused["kind"] == "PortInUse"


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1:99999", ":5"])
def test_bad_address(spawn, listen):
    process, line = spawn(listen)
    assert process.wait(60) == 1
    assert line["kind"] == "InvalidRequest"
    assert "HOST:PORT" in line["error"]


def test_host_of_another_machine(spawn):
    process, line = spawn("192.0.2.1:5000")
    assert process.wait(60) == 1
    assert line["kind"] == "InvalidRequest" and "192.0.2.1" in line["error"]


def test_unknown_model(spawn):
    process, line = spawn(model="no such model")
    assert process.wait(60) == 1
    assert line["kind"] == "ModelError"


def test_a_chat_template_that_is_not_valid(spawn, served, tmp_path):
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # No tensors.
    (tmp_path / "tokenizer.json").write_text(served.tokenizer.backend.to_str())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}")
    process, line = spawn(model=str(tmp_path))
    assert process.wait(60) == 1
    assert line["kind"] == "ModelError"
    assert (
        "its chat template isn't valid Jinja (TemplateSyntaxError: Unexpected end of template"
        in line["error"]
    )


def test_imports_nothing_heavy():
    code = (
        "import sys, farshore.gateway.__main__\n"
        "heavy = ('torch', 'jinja2', 'ray', 'transformers', 'farshore.kernels', 'farshore.kvstore.store',\n"
        "         'farshore.attention_offload', 'farshore.workers', 'farshore.controller')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


class Engine(cluster_pb2_grpc.EngineServicer):
    """Ends each sequence at once."""

    def Run(self, messages, context):
        done = cluster_pb2.SequenceFinished(reason=api.FINISH_REASON_STOP)
        for message in messages:
            event = cluster_pb2.SequenceEvent(number=message.number, finished=done)
            yield cluster_pb2.EngineMessage(events=[event])


@pytest.fixture
def trusting(tmp_path):
    """(the file of a cluster's token, the address of a worker that asks for it)"""
    token = ClusterToken.make(tmp_path / "token")
    server, address = rpc.serve(
        lambda server: cluster_pb2_grpc.add_EngineServicer_to_server(Engine(), server),
        service=cluster_pb2.DESCRIPTOR.services_by_name["Engine"].full_name,
        listen="127.0.0.1:0",
        threads=4,
        token=token,
    )
    yield token.path, address
    server.stop(0).wait()


def test_a_gateway_with_the_clusters_token_serves(spawn, trusting):
    token, address = trusting
    _, line = spawn(engine=address, token=token)
    with Client(line["address"]) as client:
        assert [event.reason for event in client.generate("Hello") if hasattr(event, "reason")] == ["stop"]


@pytest.mark.parametrize(("given", "fix"), [(False, "--token-file"), (True, "copy one token file")])
def test_a_gateway_with_another_token_or_none_says_so(spawn, trusting, tmp_path, given, fix):
    """Clients learn why, and are not told that they are to authenticate."""
    _, address = trusting
    token = ClusterToken.make(tmp_path / "another").path if given else None
    _, listening = spawn(engine=address, controller=address, token=token, child=False)
    with Client(listening) as client:
        with pytest.raises((TransportError, Internal), match=f"dense worker.*{fix}"):
            await_answer(lambda: list(client.generate("Hello")))
        with pytest.raises(TransportError, match=f"controller at {address} refuses this gateway: .*{fix}"):
            client.status()


def await_answer(call):
    """Calls until the gateway has found the engine."""
    end_s = time.monotonic() + 30
    while True:
        try:
            return call()
        except TransportError as error:
            if "lists none" not in str(error) or time.monotonic() > end_s:
                raise


def test_a_token_file_that_others_may_read(spawn, trusting):
    token, _ = trusting
    token.chmod(0o644)
    process, line = spawn(token=token)
    assert process.wait(60) == 1
    assert line["kind"] == "InvalidRequest" and f"chmod 600 {token}" in line["error"]
