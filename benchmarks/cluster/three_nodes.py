"""A cluster over three nodes that share nothing but a network: from nothing to its first token, and the loss
of a node.

Called by ``benchmark``. The nodes are hosts on this machine: see ``hosts``.
"""

import contextlib
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

from farshore.benchmarks.cluster.hosts import Host, why_not
from farshore.benchmarks.cluster.nodes import Nodes, nodes
from farshore.benchmarks.faults.cluster import serving
from farshore.benchmarks.report import Bar
from farshore.client.events import Finished, Token
from farshore.client.sdk import Client
from farshore.errors import FarshoreError, StartupError

DEADLINE_S = 180.0
POLL_S = 0.05
TOKENS = 16
OPTIONS = ("--dtype", "float32", "--kv-memory", "256MiB")
PROMPT = tuple(1000 + n * 7919 % 30_000 for n in range(600))
"""Enough blocks for two attention workers."""

NAMES = ("first_token", "tokens_equal", "node_killed_replaced", "node_cut_replaced")


async def run(progress: Callable[[str], None]) -> list[Bar]:
    """Bars named ``three_nodes_…``."""
    if reason := why_not():
        return [Bar.at_most(f"three_nodes_{name}", None, 0, "", reason) for name in NAMES]
    progress("the answer of a local run")
    local = ("--placement", "local", "--attention-workers", "0", *OPTIONS)
    async with serving(*local, progress=progress) as server:
        with Client(server.address) as client:
            expected = _answer(client, [])
    progress("three nodes, from nothing")
    began_s = time.perf_counter()
    with nodes() as made:
        made.add()
        made.add("--dense", "1")
        memory = made.add("--attention", "2")
        with Client(made.serve(*OPTIONS)) as client:
            first_s: list[float] = []
            tokens = _answer(client, first_s)
            equal = sum(ours == theirs for ours, theirs in zip(tokens, expected, strict=True)) / TOKENS
            started_s = first_s[0] - began_s
            progress("killing a node")
            killed, memory = _lost(made, client, memory, Host.kill)
            progress("cutting a node off")
            cut, _ = _lost(made, client, memory, Host.cut)
    return [
        Bar.at_most(
            "three_nodes_first_token", started_s, 40, "s", "from nothing: hosts, Ray, serve, prefill"
        ),
        Bar.at_least("three_nodes_tokens_equal", equal, 1, "of the local run's"),
        killed.bar("three_nodes_node_killed_replaced"),
        cut.bar("three_nodes_node_cut_replaced"),
    ]


class _Loss(NamedTuple):
    """The times of a node's loss, in seconds."""

    verdict_s: float
    """Until Ray declared it dead."""
    used_s: float
    """From then until a new sequence had read from a worker on another node."""

    def bar(self, name: str) -> Bar:
        note = f"after Ray's verdict, which took {self.verdict_s:.1f} s: workers elsewhere answer frames"
        return Bar.at_most(name, self.used_s, 8, "s", note)


def _lost(made: Nodes, client: Client, memory: Host, lose: Callable[[Host], None]) -> tuple[_Loss, Host]:
    """Loses the node with the attention workers. Returns the times, and the node that has them then."""
    spare = made.add("--attention", "2")
    before = {worker.worker_id for worker in client.status().workers}
    verdicts = made.verdicts()
    began_s = time.time()
    lose(memory)
    dead_s = float(verdicts.await_match(rf"dead {memory.address} (\S+)")[1])
    used_s = _used_s(client, before)
    return _Loss(dead_s - began_s, used_s - dead_s), spare


def _used_s(client: Client, before: Collection[str]) -> float:
    """The time at which a new sequence has read from an attention worker that is not in ``before``. Raises
    StartupError after DEADLINE_S."""
    end_s = time.time() + DEADLINE_S
    number = 0
    while time.time() < end_s:
        number += 1
        prompt = [1000 + (number * 7919 + token) % 30_000 for token in range(300)]
        with contextlib.suppress(FarshoreError):
            ends = [e for e in client.generate(token_ids=prompt, max_tokens=2) if isinstance(e, Finished)]
            used = {shard.worker_id for end in ends for shard in end.shards if shard.attended_bytes}
            if any(worker.startswith("attention") for worker in used - set(before)):
                return time.time()
        time.sleep(POLL_S)
    raise StartupError(f"no worker of another node was used within {DEADLINE_S:g} s")


def _answer(client: Client, first_s: list[float]) -> list[int]:
    """The greedy tokens. Appends the time of the first to ``first_s``."""
    tokens = []
    for event in client.generate(token_ids=PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True):
        if isinstance(event, Token):
            if not tokens:
                first_s.append(time.perf_counter())
            tokens.append(event.token_id)
    return tokens
