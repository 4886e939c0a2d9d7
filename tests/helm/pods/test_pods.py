"""The containers of the rendered pods, run as a kubelet runs them, form a cluster that answers.

The network policies are enforced while these tests run.
"""

import concurrent.futures
import threading

import pytest

from farshore.client.events import Token
from farshore.client.sdk import Client

from .pod_tests import GRPC, DefaultPods, RedisPods, ask, workers

COUNTED = 150
PROMPT = ", ".join(map(str, range(1, COUNTED))) + ","
"""A long count goes on in one way only, however its numbers are rounded."""


def count(client, prompt):
    """The tokens by which an answer counts on."""
    events = list(client.generate(prompt, max_tokens=100, temperature=0, ignore_eos=True))
    return [event.token_id for event in events if isinstance(event, Token)]


def count_on(address, expected, stop):
    """Requests one after the other at one gateway, until ``stop`` is set. Returns how many there were."""
    number = 0
    with Client(address, resume_s=0) as client:
        while not stop.is_set():
            assert count(client, PROMPT) == expected
            number += 1
    return number


@pytest.mark.heavy
class TestDefaultPods(DefaultPods):
    @pytest.mark.soak
    @pytest.mark.parametrize(("group", "numbers"), [("attention", (3, 2)), ("dense", (2, 1))])
    def test_an_upgrade_adds_workers_and_takes_some_away_and_no_request_fails(
        self, cluster, render, group, numbers
    ):
        addresses = [f"{pod.host.address}:{GRPC}" for pod in cluster.of("gateway")]
        stop = threading.Event()
        with Client(addresses) as client, concurrent.futures.ThreadPoolExecutor() as pool:
            expected = count(client, PROMPT)
            assert f"{COUNTED}, {COUNTED + 1}, {COUNTED + 2}" in client.detokenize(expected)
            last = max(event.number for event in client.watch_events())
            asking = [pool.submit(count_on, address, expected, stop) for address in addresses]
            try:
                for number in numbers:
                    ended = cluster.upgrade(render({group: {"replicas": number}}))
                    for pod, said in ended.items():
                        ((code, words, _),) = said.values()
                        assert (code, "draining" in words) == (0, True), (pod.name, words)
                    workers(cluster)
            finally:
                stop.set()
            assert all(each.result() > 1 for each in asking)
            kinds = {event.kind for event in client.watch_events(since=last)}
        assert {"scaled", "started", "draining", "retired"} <= kinds
        assert "lost" not in kinds
        ask(cluster)


@pytest.mark.soak
class TestRedisPods(RedisPods):
    pass
