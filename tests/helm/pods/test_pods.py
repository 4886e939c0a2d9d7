"""The containers of the rendered pods, run as a kubelet runs them, form a cluster that answers.

The network policies are enforced while these tests run.
"""

import concurrent.futures
import contextlib
import threading
import time

import pytest

from farshore.client.events import Token
from farshore.client.sdk import Client
from farshore.errors import FarshoreError

pytestmark = pytest.mark.heavy

GRPC = 50051
METADATA = "169.254.169.254"
DEADLINE_S = 120.0
COUNTED = 150
PROMPT = ", ".join(map(str, range(1, COUNTED))) + ","
"""A long count goes on in one way only, however its numbers are rounded."""


@pytest.fixture(scope="module")
def cluster(install):
    return install()


def ask(cluster):
    assert "Paris" in cluster.helm_test()


def answering(client, *, prompt_tokens, tokens):
    """The events of an answer, of which the first token has come."""
    prompt = list(range(1000, 1000 + prompt_tokens))
    events = client.generate(token_ids=prompt, max_tokens=tokens, temperature=0, ignore_eos=True)
    next(events)
    return events


def test_a_prompt_is_answered_by_the_pods_of_the_default_values(cluster):
    probes = cluster.probes()
    assert all(passed for passed, _ in probes.values()), probes
    assert {kind for *_, kind in probes} == {"startupProbe", "readinessProbe", "livenessProbe"}
    ask(cluster)


def test_their_processes_have_no_rights_and_cannot_write(cluster):
    for pod in cluster.pods.values():
        for container in pod.object["spec"]["containers"]:
            status = pod.status(container["name"])
            assert status["Uid"].split() == ["1000"] * 4
            assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
            assert status["NoNewPrivs"] == "1"
            assert pod.execute(container, ["touch", "/tmp/here"], 60) == (0, "")
            code, said = pod.execute(container, ["touch", "/etc/here"], 60)
            assert code
            assert "Read-only file system" in said


def test_a_gateway_may_open_many_files_where_the_runtime_begins_with_few(cluster):
    now, most = cluster.of("gateway")[0].open_files("gateway")
    assert now == most > 1024


def test_they_stay_below_their_limits_of_memory(cluster):
    used = {pod: pod.memory() for pod in cluster.pods.values()}
    if not all(used.values()):
        pytest.skip("this machine lets us make no groups with a limit of memory")
    for pod, containers in used.items():
        assert {each["name"] for each in pod.object["spec"]["containers"]} <= containers.keys()
        assert all(most < limit for most, limit in containers.values()), (pod.name, containers)
        assert not pod.ended()


def test_they_need_no_port_that_the_network_policies_do_not_open(cluster):
    refused = {pod.name: pod.refused() for pod in cluster.pods.values()}
    # Ray asks a cloud's metadata service where it is, and can do without.
    calls = [(name, *call) for name, found in refused.items() for call in found if METADATA not in call]
    assert calls == []


def test_the_network_policies_close_every_other_port(cluster):
    pods = {name: cluster.of(name)[0] for name in ("head", "dense", "attention", "gateway")}
    with Client(f"{pods['gateway'].host.address}:{GRPC}") as client:
        shards = {worker.address for worker in client.status().workers if worker.kind == "attention"}
        assert {(w.node, w.zone) for w in client.status().workers} == {("node-1", "zone-1")}
    (shard,) = (int(at.rpartition(":")[2]) for at in shards if at.startswith(pods["attention"].host.address))
    gcs, dashboard, controller = 6379, 8265, 50052
    open_to = {
        # (called, port): the callers that the policies name, and so all that may.
        ("head", gcs): {"dense", "attention"},
        ("head", dashboard): set(),
        ("head", controller): {"dense", "attention", "gateway"},
        ("attention", shard): {"head", "dense"},
        ("gateway", GRPC): set(),
    }
    tries = [(*called, caller) for called in open_to for caller in pods if caller != called[0]]
    with concurrent.futures.ThreadPoolExecutor(len(tries)) as pool:
        answers = pool.map(lambda each: pods[each[2]].connects(pods[each[0]], each[1]), tries)
        found = {each for each, connects in zip(tries, answers, strict=True) if connects}
    assert found == {(*called, caller) for called, callers in open_to.items() for caller in callers}
    # Nothing but the policies is in the way: the node itself calls as it likes.
    for called, port in open_to:
        assert pods[called].listens(port)


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


def await_workers(client, pods):
    """Until the cluster has one worker on each of the pods, and no other."""
    wanted = sorted(pod.host.address for pod in pods)
    end_s = time.monotonic() + DEADLINE_S
    found = None
    while found != wanted:
        assert time.monotonic() < end_s, (found, wanted)
        with contextlib.suppress(FarshoreError):
            found = sorted(worker.address.rpartition(":")[0] for worker in client.status().workers)
        threading.Event().wait(0.1)


@pytest.mark.soak
@pytest.mark.parametrize(("group", "numbers"), [("attention", (3, 2)), ("dense", (2, 1))])
def test_an_upgrade_adds_workers_and_takes_some_away_and_no_request_fails(cluster, render, group, numbers):
    addresses = [f"{gateway.host.address}:{GRPC}" for gateway in cluster.of("gateway")]
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
                await_workers(client, cluster.of("dense") + cluster.of("attention"))
        finally:
            stop.set()
        assert all(each.result() > 1 for each in asking)
        kinds = {event.kind for event in client.watch_events(since=last)}
    assert {"scaled", "started", "draining", "retired"} <= kinds
    assert "lost" not in kinds
    ask(cluster)


@pytest.mark.soak
def test_an_attention_pod_that_ends_moves_what_it_holds(cluster):
    pod = cluster.of("attention")[0]
    with Client(f"{cluster.of('gateway')[0].host.address}:{GRPC}") as client:
        events = answering(client, prompt_tokens=2000, tokens=400)
        ((code, said, _),) = pod.end().values()
        assert (code, "draining" in said) == (0, True), said
        (choice,) = list(events)[-1].choices
    assert (choice.reason, choice.tokens) == ("length", 400)
    cluster.replace(pod)
    ask(cluster)


@pytest.mark.soak
def test_a_dense_pod_that_ends_finishes_its_requests(cluster):
    pod = cluster.of("dense")[0]
    with Client(f"{cluster.of('gateway')[0].host.address}:{GRPC}", resume_s=0) as client:
        events = answering(client, prompt_tokens=300, tokens=300)
        ((code, said, _),) = pod.end().values()
        assert (code, "draining" in said) == (0, True), said
        (choice,) = list(events)[-1].choices
    assert (choice.reason, choice.tokens) == ("length", 300)
    cluster.replace(pod)
    ask(cluster)


@pytest.mark.soak
def test_a_gateway_pod_that_ends_finishes_its_answers(cluster):
    gateway = cluster.of("gateway")[0]
    with Client(f"{gateway.host.address}:{GRPC}") as client:
        events = answering(client, prompt_tokens=100, tokens=300)
        assert gateway.end() == {"gateway": (0, "", 0)}
        (choice,) = list(events)[-1].choices
    assert (choice.reason, choice.tokens) == ("length", 300)
    cluster.replace(gateway)
    ask(cluster)


@pytest.mark.soak
@pytest.mark.parametrize("component", ["gateway", "attention", "dense"])
def test_a_pod_that_is_lost_comes_back(cluster, component):
    pod = cluster.of(component)[0]
    pod.kill()
    cluster.replace(pod)
    ask(cluster)
