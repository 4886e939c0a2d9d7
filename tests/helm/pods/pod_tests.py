"""Tests that hold in every root in which the pods' containers may run.

Each class has an installation of its own: ``conftest`` starts it with the class's VALUES, in the root that
the module's fixture ``image`` is. The network policies are enforced while these tests run.
"""

import concurrent.futures
import contextlib
import time
from typing import ClassVar

import pytest

from farshore.client.sdk import Client
from farshore.errors import FarshoreError

GRPC = 50051
METADATA = "169.254.169.254"
DEADLINE_S = 500.0


def ask(cluster):
    assert "Paris" in cluster.helm_test()


def assert_well(cluster):
    """Every container runs and passes its probes, and a prompt is answered."""
    assert not any(pod.ended() for pod in cluster.pods.values())
    probes = cluster.probes()
    assert all(passed for passed, _ in probes.values()), probes
    assert {kind for *_, kind in probes} == {"startupProbe", "readinessProbe", "livenessProbe"}
    ask(cluster)


def gateway(cluster):
    """The address of a gateway for clients."""
    return f"{cluster.of('gateway')[0].host.address}:{GRPC}"


def answering(client, *, prompt_tokens, tokens):
    """The events of an answer, of which the first token has come."""
    prompt = list(range(1000, 1000 + prompt_tokens))
    events = client.generate(token_ids=prompt, max_tokens=tokens, temperature=0, ignore_eos=True)
    next(events)
    return events


def workers(cluster):
    """The ids of all workers, once every container runs, and there is one worker on each of the pods and no
    other. A gateway looks a name up again only so often, and the hosts file has a new address for a new head;
    a Service would keep its own."""
    wanted = sorted(pod.host.address for name in ("dense", "attention") for pod in cluster.of(name))
    end_s = time.monotonic() + DEADLINE_S
    found = None
    with Client(gateway(cluster)) as client:
        while True:
            for pod in cluster.pods.values():
                pod.restart_ended()
            with contextlib.suppress(FarshoreError):
                found = {worker.worker_id: worker.address for worker in client.status().workers}
                hosts = sorted(address.rpartition(":")[0] for address in found.values())
                if hosts == wanted and not any(pod.ended() for pod in cluster.pods.values()):
                    return set(found)
            assert time.monotonic() < end_s, (found, wanted)
            time.sleep(0.1)


class DefaultPods:
    VALUES: ClassVar = {}

    def test_they_answer_and_pass_their_probes(self, cluster):
        assert_well(cluster)

    def test_their_processes_have_no_rights_and_cannot_write(self, cluster):
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

    def test_they_stay_below_their_limits_of_memory(self, cluster):
        used = {pod: pod.memory() for pod in cluster.pods.values()}
        if not all(used.values()):
            pytest.skip("this machine lets us make no groups with a limit of memory")
        for pod, containers in used.items():
            assert {each["name"] for each in pod.object["spec"]["containers"]} <= containers.keys()
            assert all(most < limit for most, limit in containers.values()), (pod.name, containers)

    def test_a_gateway_may_open_many_files_where_the_runtime_begins_with_few(self, cluster):
        now, most = cluster.of("gateway")[0].open_files("gateway")
        assert now == most > 1024

    def test_they_need_no_port_that_the_network_policies_do_not_open(self, cluster):
        refused = {pod.name: pod.refused() for pod in cluster.pods.values()}
        # Ray asks a cloud's metadata service where it is, and can do without.
        calls = [(name, *call) for name, found in refused.items() for call in found if METADATA not in call]
        assert calls == []

    def test_the_network_policies_close_every_other_port(self, cluster):
        pods = {name: cluster.of(name)[0] for name in ("head", "dense", "attention", "gateway")}
        with Client(f"{pods['gateway'].host.address}:{GRPC}") as client:
            shards = {worker.address for worker in client.status().workers if worker.kind == "attention"}
            assert {(w.node, w.zone) for w in client.status().workers} == {("node-1", "zone-1")}
        (shard,) = (
            int(at.rpartition(":")[2]) for at in shards if at.startswith(pods["attention"].host.address)
        )
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

    @pytest.mark.soak
    def test_an_attention_pod_that_ends_moves_what_it_holds(self, cluster):
        pod = cluster.of("attention")[0]
        with Client(gateway(cluster)) as client:
            events = answering(client, prompt_tokens=2000, tokens=400)
            ((code, said, _),) = pod.end().values()
            assert (code, "draining" in said) == (0, True), said
            (choice,) = list(events)[-1].choices
        assert (choice.reason, choice.tokens) == ("length", 400)
        cluster.replace(pod)
        ask(cluster)

    @pytest.mark.soak
    def test_a_dense_pod_that_ends_finishes_its_requests(self, cluster):
        pod = cluster.of("dense")[0]
        with Client(gateway(cluster), resume_s=0) as client:
            events = answering(client, prompt_tokens=300, tokens=300)
            ((code, said, _),) = pod.end().values()
            assert (code, "draining" in said) == (0, True), said
            (choice,) = list(events)[-1].choices
        assert (choice.reason, choice.tokens) == ("length", 300)
        cluster.replace(pod)
        ask(cluster)

    @pytest.mark.soak
    def test_a_gateway_pod_that_ends_finishes_its_answers(self, cluster):
        pod = cluster.of("gateway")[0]
        with Client(gateway(cluster)) as client:
            events = answering(client, prompt_tokens=100, tokens=300)
            assert pod.end() == {"gateway": (0, "", 0)}
            (choice,) = list(events)[-1].choices
        assert (choice.reason, choice.tokens) == ("length", 300)
        cluster.replace(pod)
        ask(cluster)

    @pytest.mark.soak
    @pytest.mark.parametrize("component", ["gateway", "attention", "dense"])
    def test_a_pod_that_is_lost_comes_back(self, cluster, component):
        pod = cluster.of(component)[0]
        pod.kill()
        cluster.replace(pod)
        workers(cluster)
        ask(cluster)

    @pytest.mark.soak
    @pytest.mark.parametrize("component", ["gateway", "attention", "dense"])
    def test_a_container_that_crashes_starts_again_in_its_pod(self, cluster, component):
        pod = cluster.of(component)[0]
        for container in pod.object["spec"]["containers"]:
            pod.crash(container["name"])
        cluster.await_ready(pod)
        workers(cluster)
        assert_well(cluster)

    @pytest.mark.soak
    def test_a_head_that_crashes_takes_the_cluster_with_it_and_all_of_it_starts_again(self, cluster):
        (head,) = cluster.of("head")
        before = workers(cluster)
        head.crash("ray")
        for pod in cluster.pods.values():
            cluster.await_ready(pod)
        assert not before & workers(cluster)
        assert_well(cluster)


class RedisPods:
    """With Redis, a lost head is no lost cluster: its pod comes back to the same nodes and workers."""

    VALUES: ClassVar = {"redis": {"mode": "bundled"}}

    def test_answers_go_on_while_the_head_is_gone_and_after_it_is_back(self, cluster):
        ask(cluster)
        (head,) = cluster.of("head")
        with self.same_nodes_and_workers(cluster):
            head.kill()
            ask(cluster)
            cluster.replace(head)

    @pytest.mark.parametrize("container", ["ray", "launcher"])
    def test_a_container_of_the_head_that_crashes_starts_again_in_its_pod(self, cluster, container):
        (head,) = cluster.of("head")
        with self.same_nodes_and_workers(cluster):
            head.crash(container)
            cluster.await_ready(head)

    def test_redis_keeps_what_it_knows_when_its_pod_is_lost(self, cluster):
        (redis,) = cluster.of("redis")
        with self.same_nodes_and_workers(cluster):
            redis.kill()
            ask(cluster)
            cluster.replace(redis)

    @contextlib.contextmanager
    def same_nodes_and_workers(self, cluster):
        """What is done within leaves nodes and workers as they are, and in the end all is well."""
        nodes = [pod for name in ("dense", "attention") for pod in cluster.of(name)]
        processes = {pod.name: pod.status("ray")["Pid"] for pod in nodes}
        before = workers(cluster)
        yield
        assert workers(cluster) == before
        assert {pod.name: pod.status("ray")["Pid"] for pod in nodes} == processes
        assert_well(cluster)
