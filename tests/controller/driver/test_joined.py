"""Clusters on a Ray that they joined: two share it by name, and each outlives the drivers that started it."""

import signal
from pathlib import Path

import pytest

from farshore.client.events import Finished, Token
from farshore.client.sdk import Client
from farshore.controller import listen

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
SMALL = ("--kv-memory", "64MiB")


def _workers(address):
    with Client(address) as client:
        return {worker.worker_id: worker.process_id for worker in client.status().workers}


@pytest.mark.heavy
def test_a_cluster_outlives_its_drivers_and_another_shares_its_ray(ray_address, marked):
    joined = ("serve", "--port", "0", "--ray-address", ray_address, *SMALL)
    first = marked.start(*joined, "--name", "blue", "--attention-workers", "1")
    address = first.out.await_match(r"serves \S+ at (\S+)")[1]
    workers = _workers(address)
    assert marked.run("scale", "--server", address, "attention=2").returncode == 0

    first.process.kill()
    first.process.wait()
    # Without numbers of its own, and at once: it starts nothing.
    second = marked.start(*joined, "--name", "blue")
    second.err.await_match("joining the cluster blue")
    address = second.out.await_match(r"serves \S+ at (\S+)")[1]
    assert workers.items() <= _workers(address).items()
    done = marked.run("generate", "--server", address, QUESTION)
    assert (done.returncode, done.stdout.strip()) == (0, ANSWER), done.stderr

    refused = marked.run(*joined[:-2], "--name", "blue", "--kv-memory", "128MiB")
    assert refused.returncode == 1 and "with other values of --kv-memory" in refused.stderr

    green = marked.start(*joined, "--name", "green", "--attention-workers", "1")
    other = _workers(green.out.await_match(r"serves \S+ at (\S+)")[1])
    assert len(other) == 2 and not other.keys() & _workers(address).keys()

    before = _workers(address)
    with Client(address, resume_s=0) as client:
        # The rest of the answer takes longer than a private cluster's requests may.
        stream = client.generate("One", max_tokens=700, temperature=0, ignore_eos=True)
        next(event for event in stream if isinstance(event, Token))
        second.process.send_signal(signal.SIGINT)
        assert isinstance(list(stream)[-1], Finished)
    assert second.process.wait(60) == 0
    second.err.await_match(f"farshore down --ray-address {ray_address} --name blue` ends it")
    assert all(Path(f"/proc/{pid}").exists() for pid in before.values())
    assert len(before) == 3

    done = marked.run("down", "--ray-address", ray_address, "--name", "blue")
    assert done.returncode == 0, done.stderr
    marked.check_gone(before.values())
    again = marked.run("down", "--ray-address", ray_address, "--name", "blue")
    assert again.returncode == 1 and "no cluster blue runs" in again.stderr
    # Its driver sees the end of the other cluster, too.
    assert marked.run("down", "--ray-address", ray_address, "--name", "green").returncode == 0
    assert green.process.wait(60) == 0
    marked.check_gone(other.values())


@pytest.mark.heavy
def test_a_launcher_keeps_the_controller_and_applies_its_file(marked, start_ray, tmp_path):
    """As in Kubernetes: gateways run elsewhere, and an upgrade changes the mounted file."""
    ray_address, token = start_ray()
    file, port = tmp_path / "cluster.yaml", listen.free_port("0.0.0.0")
    file.write_text("name: pods\nkv-memory: 64MiB\nattention-workers: 1\n")
    joined = ("--ray-address", ray_address, "--no-gateway", "--controller-port", str(port))
    launcher = marked.start("serve", *joined, "--config", str(file))
    controller = launcher.out.await_match(r"controller +(\S+)")[1]
    assert controller.endswith(f":{port}")
    options = ("--directory", f"grpc://{controller}", "--token-file", token)
    gateway = marked.start("gateway", "--listen", "127.0.0.1:0", *options)
    address = gateway.out.await_match(r"gateway of smollm2 at (\S+)")[1]
    gateway.out.await_match("an engine takes requests")
    done = marked.run("generate", "--server", address, QUESTION)
    assert (done.returncode, done.stdout.strip()) == (0, ANSWER), done.stderr

    before = _workers(address)
    file.write_text("name: pods\nkv-memory: 64MiB\nattention-workers: 2\n")
    launcher.err.await_match("changed, and is applied")
    file.write_text("name: pods\nkv-memory: 65MiB\nattention-workers: 2\n")
    launcher.err.await_match("is not applied: .*other values of --kv-memory")
    events = marked.start("events", "--follow", "--server", address)
    events.out.await_match("joined +attention-1")
    assert before.items() < _workers(address).items()

    assert events.end(signal.SIGINT) == 0
    assert launcher.end(signal.SIGTERM) == 0 and gateway.end(signal.SIGTERM) == 0
    assert all(Path(f"/proc/{pid}").exists() for pid in before.values())
    assert marked.run("down", "--ray-address", ray_address, "--name", "pods").returncode == 0
