"""The containers of the rendered pods, run as a kubelet runs them, form a cluster that answers."""

import pytest

from farshore.client.sdk import Client

pytestmark = pytest.mark.heavy


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


def test_they_stay_below_their_limits_of_memory(cluster):
    used = {pod: pod.memory() for pod in cluster.pods.values()}
    if not all(used.values()):
        pytest.skip("this machine lets us make no groups with a limit of memory")
    for pod, containers in used.items():
        assert {each["name"] for each in pod.object["spec"]["containers"]} <= containers.keys()
        assert all(most < limit for most, limit in containers.values()), (pod.name, containers)
        assert not pod.ended()


@pytest.mark.soak
def test_an_attention_pod_that_ends_moves_what_it_holds(cluster):
    pod = cluster.of("attention")[0]
    with Client(f"{cluster.of('gateway')[0].host.address}:50051") as client:
        events = answering(client, prompt_tokens=2000, tokens=400)
        ((code, said, _),) = pod.end().values()
        assert (code, "draining" in said) == (0, True), said
        (choice,) = list(events)[-1].choices
    assert (choice.reason, choice.tokens) == ("length", 400)
    cluster.replace(pod)
    ask(cluster)


@pytest.mark.soak
def test_a_gateway_pod_that_ends_finishes_its_answers(cluster):
    gateway = cluster.of("gateway")[0]
    with Client(f"{gateway.host.address}:50051") as client:
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
