"""Clusters on a Ray that they joined: two share it by name, and each outlives the drivers that started it."""

import signal
from pathlib import Path

import pytest

from farshore.client.sdk import Client

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
    assert second.end(signal.SIGINT) == 0
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
