"""The network policies open what the cluster uses, from both ends, and nothing else."""

import pytest


def selects(selector, labels):
    return selector.get("matchLabels", {}).items() <= labels.items()


@pytest.fixture(scope="session")
def allowed(render):
    """allowed(values) -> {(calling component, called component): set of ports}, where both ends agree."""

    def flows(values=None):
        objects = render(values)
        policies = [each for (kind, _), each in objects.items() if kind == "NetworkPolicy"]
        pods = dict(components(objects))

        def open_ports(component, direction, other):
            """The ports that any policy of the component opens towards the other one."""
            ports = set()
            for policy in policies:
                if not selects(policy["spec"]["podSelector"], pods[component]):
                    continue
                for rule in policy["spec"].get(direction, ()):
                    peers = rule.get({"ingress": "from", "egress": "to"}[direction])
                    matched = peers is None or any(
                        "namespaceSelector" not in peer and selects(peer["podSelector"], pods[other])
                        for peer in peers
                        if "podSelector" in peer
                    )
                    for port in rule["ports"] if matched else ():
                        ports |= set(range(port["port"], port.get("endPort", port["port"]) + 1))
            return ports

        return {
            (a, b): ports
            for a in pods
            for b in pods
            if (ports := open_ports(a, "egress", b) & open_ports(b, "ingress", a))
        }

    return flows


def components(objects):
    """(component, labels) of each kind of pod."""
    for (kind, _), each in objects.items():
        if kind == "RayCluster":
            groups = (each["spec"]["headGroupSpec"], *each["spec"]["workerGroupSpecs"])
            templates = [group["template"] for group in groups]
        elif kind in ("Deployment", "StatefulSet"):
            templates = [each["spec"]["template"]]
        else:
            templates = [each] if kind == "Pod" else []
        for template in templates:
            labels = template["metadata"]["labels"]
            yield labels["app.kubernetes.io/component"], labels


RAY = {8076, 8077, 52365, 52366} | set(range(10002, 11000))
WORKERS = set(range(20000, 30000))
UP = RAY | {6379, 50052}
CALLS = {
    ("dense", "head"): UP,
    ("attention", "head"): UP,
    ("head", "dense"): RAY | WORKERS,
    ("head", "attention"): RAY | WORKERS,
    ("dense", "attention"): WORKERS,
    ("attention", "attention"): WORKERS,
    ("gateway", "head"): {50052},
    ("gateway", "dense"): WORKERS,
    ("test", "gateway"): {50051},
}
OF_REDIS = {(component, "redis"): {6379} for component in ("head", "dense", "attention", "gateway")}


def test_what_is_used_is_open_and_nothing_else(allowed):
    assert allowed() == CALLS
    assert allowed({"redis": {"mode": "bundled"}}) == CALLS | OF_REDIS


def test_every_pod_is_denied_what_no_policy_opens(render):
    for values in ({}, {"redis": {"mode": "bundled"}}):
        objects = render(values)
        deny = objects[("NetworkPolicy", "demo-farshore-default-deny")]["spec"]
        assert deny["policyTypes"] == ["Ingress", "Egress"] and "ingress" not in deny
        assert [port["port"] for rule in deny["egress"] for port in rule["ports"]] == [53, 53]
        for component, labels in components(objects):
            assert selects(deny["podSelector"], labels), component


def test_clients_reach_gateways_only(render):
    objects = render({"networkPolicy": {"metricsClients": [{"namespaceSelector": {}}]}})
    opened = {}
    for (kind, name), each in objects.items():
        if kind == "NetworkPolicy":
            for rule in each["spec"].get("ingress", ()):
                if not all(peer.get("podSelector", {}).get("matchLabels") for peer in rule["from"]):
                    opened.setdefault(name, set()).update(port["port"] for port in rule["ports"])
    assert opened == {
        "demo-farshore-gateway": {50051, 8000},
        **{f"demo-farshore-{each}": {8080} for each in ("head", "dense", "attention")},
    }


def test_the_pods_ports_are_those_that_the_policies_open(render):
    """Farshore's workers listen on free ports, which a sysctl makes those of the range."""
    cluster = render()[("RayCluster", "demo-farshore")]["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (sysctl,) = group["template"]["spec"]["securityContext"]["sysctls"]
        assert sysctl["name"] == "net.ipv4.ip_local_port_range"
        low, high = map(int, sysctl["value"].split())
        assert set(range(low, high + 1)) == WORKERS


def test_services_and_budgets_select_the_pods_that_they_mean(render):
    objects = render({"redis": {"mode": "bundled"}, "dense": {"replicas": 2}})
    pods = dict(components(objects))
    expected = {
        ("Service", "demo-farshore-grpc"): "gateway",
        ("Service", "demo-farshore-http"): "gateway",
        ("Service", "demo-farshore-controller"): "head",
        ("Service", "demo-farshore-dashboard"): "head",
        ("Service", "demo-farshore-redis"): "redis",
        ("PodDisruptionBudget", "demo-farshore-gateway"): "gateway",
        ("PodDisruptionBudget", "demo-farshore-dense"): "dense",
        ("PodDisruptionBudget", "demo-farshore-attention"): "attention",
    }
    found = {}
    for key, each in objects.items():
        if key[0] in ("Service", "PodDisruptionBudget"):
            selector = each["spec"]["selector"]
            selector = {k: v for k, v in selector.get("matchLabels", selector).items() if "ray.io" not in k}
            (found[key],) = (name for name, labels in pods.items() if selector.items() <= labels.items())
    assert found == expected
