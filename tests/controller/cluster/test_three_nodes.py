"""A cluster over nodes of Ray that share no loopback device, no memory and no /tmp: each runs what it
declares, a lost node's workers answer elsewhere, and Ray's tables and metrics tell where everything is.
"""

import contextlib
import json
import urllib.request
from functools import partial

import pytest
import torch

from farshore.benchmarks.cluster.hosts import why_not
from farshore.benchmarks.cluster.nodes import nodes
from farshore.client.events import Finished, Token
from farshore.client.sdk import Client

from .. import running

TOKENS = 8
PROMPT_TOKENS = 600
METRICS_PORT = 9100
METRICS = ("--", f"--metrics-export-port={METRICS_PORT}")

LIST_ACTORS = """
import asyncio, json, sys
from ray._raylet import GcsClient
async def main():
    client = GcsClient(sys.argv[1])
    infos = await client.async_get_all_actor_info(None, None, timeout=30)
    shown = {i.name: i.repr_name for i in infos.values() if not i.HasField("death_cause")}
    print(json.dumps(shown), flush=True)
asyncio.run(main())
"""
"""Prints what Ray's dashboard shows of actors."""


@pytest.fixture
def cluster():
    if reason := why_not():
        pytest.skip(reason)
    with nodes() as made:
        yield made


@pytest.fixture
def expected(hugging_face, prompts):
    prompt = prompts["long"][:PROMPT_TOKENS]
    with torch.no_grad():
        ids = hugging_face(torch.float32).generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False
        )
    return prompt, ids[0, PROMPT_TOKENS:].tolist()


def answer(client, prompt):
    """The tokens, and the ids of the attention workers that took part."""
    events = list(client.generate(token_ids=prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True))
    ends = [event for event in events if isinstance(event, Finished)]
    used = {shard.worker_id for end in ends for shard in end.shards if shard.attended_bytes}
    return [event.token_id for event in events if isinstance(event, Token)], used


def until(condition, what):
    """As that of ``running``, where a node's metrics may not answer."""

    def result():
        with contextlib.suppress(OSError):
            return condition()

    return running.until(result, what)


def attention(client, host):
    """The attention workers, if there are two and both are at ``host``."""
    found = {w.worker_id: w.address for w in client.status().workers if w.kind == "attention"}
    there = [address.startswith(f"{host.address}:") for address in found.values()]
    return found if len(there) == 2 and all(there) else {}


def shows_gauge(host, name, slot):
    """Whether the metrics of the host's node have a gauge of a worker."""
    with urllib.request.urlopen(f"http://{host.address}:{METRICS_PORT}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    return any(line.startswith(f"ray_farshore_{name}{{") and f'"{slot}"' in line for line in lines)


def shown_actors(cluster):
    """Actor name -> what Ray shows of it."""
    output = cluster.python(cluster.head, "-c", LIST_ACTORS, cluster.ray_address)
    return json.loads(output.await_match(r"^\{.*\}$")[0])


@pytest.mark.heavy
def test_each_node_runs_what_it_declares_and_lost_ones_are_replaced(cluster, expected):
    prompt, tokens = expected
    head = cluster.add()
    dense = cluster.add("--dense", "1", *METRICS)
    memory = cluster.add("--attention", "2", *METRICS)
    gateway = cluster.serve("--dtype", "float32", "--kv-memory", "128MiB")
    with Client(gateway) as client:
        before = attention(client, memory)
        assert answer(client, prompt) == (tokens, before.keys())
        (engine,) = [w for w in client.status().workers if w.kind == "dense"]
        assert engine.address.startswith(f"{dense.address}:") and gateway.startswith(f"{head.address}:")

        shown = shown_actors(cluster)
        assert shown["controller"].startswith(f"controller at {head.address}:")
        for worker, address in {**before, engine.worker_id: engine.address}.items():
            slot = worker.rpartition("-")[0]
            assert shown[slot] == f"{slot} on {address.partition(':')[0]} ({worker})"
        for host, gauge in ((memory, ("attended_bytes", "attention-1")), (dense, ("tokens", "dense-0"))):
            until(partial(shows_gauge, host, *gauge), f"no gauge {gauge} on {host.name}")

        # All processes of a node end at once, and no other node declares `attention`.
        memory.kill()
        until(
            lambda: sum(e.kind == "lost" and "with its node" in e.detail for e in client.watch_events()) == 2,
            "the loss of a node was not noticed",
        )
        second = cluster.add("--attention", "2")
        workers = until(lambda: attention(client, second), "no workers on the new node")
        assert not workers.keys() & before.keys()
        until(lambda: answer(client, prompt) == (tokens, workers.keys()), "no answer after a node was killed")

        # A node is cut off: nothing tells so.
        third = cluster.add("--attention", "2")
        second.cut()
        workers = until(lambda: attention(client, third), "no workers on the third node")
        until(
            lambda: answer(client, prompt) == (tokens, workers.keys()), "no answer after a node was cut off"
        )
        assert [w.worker_id for w in client.status().workers if w.kind == "dense"] == [engine.worker_id]
