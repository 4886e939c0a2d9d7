"""Clusters on a Ray that they joined: two share it by name, and each outlives the drivers that started it."""

import json
import signal
import time
from pathlib import Path

import pytest

from farshore.client.sdk import Client
from farshore.controller import listen
from farshore.controller.driver.cluster import PRIVATE_DRAIN_S

from ..running import DEADLINE_S, Reading, begun, until

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
SMALL = ("--kv-memory", "192MiB")


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

    before = until(lambda: len(found := _workers(address)) == 3 and found, "no further worker")
    with Client(address, resume_s=0) as client, Reading(client, begun(client, "One")) as reading:
        second.process.send_signal(signal.SIGINT)
        until(lambda: not client.is_serving(), "the gateway takes requests")
        # The answer goes on for longer than a private cluster's may.
        over_s = time.monotonic() + 2 * PRIVATE_DRAIN_S
        until(lambda: time.monotonic() > over_s, "time stands still")
        assert not reading.is_over, reading.end()
    assert second.process.wait(DEADLINE_S) == 0
    second.err.await_match(f"farshore down --ray-address {ray_address} --name blue` ends it")
    assert all(Path(f"/proc/{pid}").exists() for pid in before.values())

    done = marked.run("down", "--ray-address", ray_address, "--name", "blue")
    assert done.returncode == 0, done.stderr
    marked.check_gone(before.values())
    again = marked.run("down", "--ray-address", ray_address, "--name", "blue")
    assert again.returncode == 1 and "no cluster blue runs" in again.stderr
    # Its driver sees the end of the other cluster, too.
    assert marked.run("down", "--ray-address", ray_address, "--name", "green").returncode == 0
    assert green.process.wait(DEADLINE_S) == 0
    marked.check_gone(other.values())


@pytest.mark.heavy
def test_a_launcher_keeps_the_controller_and_applies_its_file(marked, start_ray, tmp_path):
    """As in Kubernetes: gateways run elsewhere, and an upgrade changes the mounted file."""
    ray_address, token = start_ray()
    file, port = tmp_path / "cluster.yaml", listen.free_port("0.0.0.0")
    file.write_text("name: pods\nkv-memory: 64MiB\nattention-workers: 1\n")
    joined = ("--ray-address", ray_address, "--no-gateway", "--controller-port", str(port))
    joined += ("--state-dir", str(tmp_path / "kept"))
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
    (kept,) = (tmp_path / "kept").glob("pods@*/desired.json")
    assert json.loads(kept.read_text())["counts"] == {"dense": 1, "attention": 2}
    file.write_text("name: pods\nkv-memory: 65MiB\nattention-workers: 2\n")
    launcher.err.await_match("is not applied: .*other values of --kv-memory")
    events = marked.start("events", "--follow", "--server", address)
    events.out.await_match("joined +attention-1")
    assert before.items() < _workers(address).items()

    assert events.end(signal.SIGINT) == 0
    assert launcher.end(signal.SIGTERM) == 0 and gateway.end(signal.SIGTERM) == 0
    assert all(Path(f"/proc/{pid}").exists() for pid in before.values())
    assert marked.run("down", "--ray-address", ray_address, "--name", "pods").returncode == 0
