"""Engines, shards and gateways as processes of their own: exact tokens, shared prefixes, a killed engine."""

import contextlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from farshore import rpc
from farshore.attention_offload.client.remote import RemoteClient
from farshore.benchmarks.engines.asking import connected
from farshore.benchmarks.engines.cluster import Cluster
from farshore.client.events import Finished, Token
from farshore.client.sdk import Client
from farshore.errors import TransportError
from farshore.kernels.base import BLOCK_TOKENS
from farshore.kvstore.prefix import chain
from farshore.model_spec import ModelSpec
from farshore.proto import cluster_pb2, cluster_pb2_grpc
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.kv.prefix import fingerprint

from ... import waiting

DEADLINE_S = 240.0
until = partial(waiting.until, deadline_s=DEADLINE_S, pause_s=0.05)
SHARDS, ENGINES, GATEWAYS = 2, 3, 2
KV_BYTES = 512 << 20


@pytest.fixture
def stack():
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def start_gateway(stack):
    """start_gateway(directory's URL) -> a function that waits for the gateway and returns a Client of it."""

    def start(url):
        command = [sys.executable, "-P", "-m", "farshore.client.cli.main", "gateway"]
        command += ["--directory", url, "--listen", "127.0.0.1:0"]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
        process = stack.enter_context(subprocess.Popen(command, **pipes))
        stack.callback(process.kill)

        def connect():
            line = process.stdout.readline()
            assert "gateway of smollm2 at " in line
            client = stack.enter_context(Client(line.split()[-1], timeout_s=DEADLINE_S))
            until(client.is_serving, "no engine takes requests")
            return client

        return connect

    return start


def ask(client, ids, count):
    """The tokens of a greedy answer through a gateway, and how many of the prompt were found stored."""
    stream = list(client.generate(token_ids=ids, max_tokens=count, temperature=0, ignore_eos=True))
    (end,) = (event for event in stream if isinstance(event, Finished))
    return [event.token_id for event in stream if isinstance(event, Token)], end.cached_tokens


def await_found(client, ids, stored):
    """Waits until a request finds so many tokens of its prompt stored. A shard that answers late, as on a
    machine that stands still for a second, costs a hit."""
    until(lambda: ask(client, ids, 1)[1] == stored, f"{stored} tokens are not found")


def frames_of(engine):
    """How many frames the shards have answered to an engine."""
    with rpc.channel(engine.address, None) as channel:
        status = cluster_pb2_grpc.EngineStub(channel).Status(cluster_pb2.EngineStatusRequest())
    return sum(link.frames for link in status.worker.links)


@pytest.mark.heavy
def test_three_engines_and_two_gateways_share_the_shards(
    stack, start_gateway, demo_model, prompts, greedy_float32
):
    cluster = stack.enter_context(Cluster(ModelSpec(), dtype="float32"))
    shards = [cluster.shard(f"attention-{number}", kv_bytes=KV_BYTES) for number in range(SHARDS)]
    *engines, victim = [
        cluster.engine(f"dense-{number}", kv_bytes=KV_BYTES // 2) for number in range(ENGINES + 1)
    ]
    gateways = [start_gateway(cluster.url) for _ in range(GATEWAYS)]
    model = demo_model(torch.float32)
    attention = attention_model(model.config, model.dtype)
    cluster.await_serving()
    clients = [connect() for connect in gateways]
    looks = [stack.enter_context(look_at(shard.address, attention, model.dtype)) for shard in shards]

    def spans():
        return [info for look in looks for info in look.store.announce()]

    # One of the engines is killed while one sequence decodes and another one's prompt is prefilled.
    with connected(victim.address) as doomed:
        decoding = doomed.begin(prompts["near a hand-off"][::-1], max_tokens=2000)
        until(lambda: any(span.sealed_tokens for span in spans()), "no span is sealed")
        before = {span.span for span in spans()}
        filling = doomed.begin(prompts["long"][::-1], max_tokens=2000)
        until(
            lambda: any(s.span not in before and not s.sealed_tokens for s in spans()), "no span is granted"
        )
        victim.kill()
        for asked in (decoding, filling):
            assert isinstance(asked.exception(DEADLINE_S), TransportError)
    dead = {span.span for span in spans()}
    assert any(span.holders for span in spans()), "holds outlive the engine until its lease ends"

    # Its holds' lease runs while the others answer.
    with ThreadPoolExecutor(len(prompts)) as threads:

        def ask_all(client):
            asked = {
                name: threads.submit(ask, client, ids, len(greedy_float32[name]))
                for name, ids in prompts.items()
            }
            return {name: future.result(DEADLINE_S) for name, future in asked.items()}

        for tokens, _ in (first := ask_all(clients[0])).values():
            assert tokens
        await_announced(cluster, prompts, fingerprint(attention, model_content=model.content))
        second = ask_all(clients[1])
    for name, ids in prompts.items():
        assert first[name][0] == second[name][0] == greedy_float32[name], name
        stored = (len(ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        if second[name][1] != stored:
            await_found(clients[1], ids, stored)
    assert all(frames_of(engine) for engine in engines), "each engine has had a part of the prompts"
    for engine in engines:
        with connected(engine.address) as asked:
            answer = asked.ask(prompts["two blocks"], max_tokens=len(greedy_float32["two blocks"]))
        assert answer.tokens == greedy_float32["two blocks"] and answer.cached_tokens == BLOCK_TOKENS

    # The KV that the killed engine held is cache now, if it was sealed, and free otherwise.
    until(lambda: not any(span.holders for span in spans()), "the dead engine's holds stay")
    assert all(span.sealed_tokens for span in spans() if span.span in dead)
    assert any(span.span in dead for span in spans())
    assert all(look.identify().free_bytes == KV_BYTES for look in looks)


@contextlib.contextmanager
def look_at(address, attention, dtype):
    """A client of a shard that holds nothing there."""
    client = RemoteClient(address, attention, dtype)
    try:
        yield client
    finally:
        client.close()


def await_announced(cluster, prompts, kv_fingerprint):
    """Waits until the directory knows a shard for each full block of the prompts."""
    names = [block.hash for ids in prompts.values() for block in chain(ids, fingerprint=kv_fingerprint)]
    until(lambda: all(cluster.directory.find_prefix(names)), "blocks are not announced")
