"""The verbs that ``farshore doctor`` reviews, on the stand-in of ``doctor_server``."""

import json

import pytest

from farshore.client.cli.main import main
from farshore.client.doctor.access import OPTIONAL, VERBS


def reviewed(verbs):
    return {(verb, group, kind.split("/")[0]) for (group, kind), each in verbs.items() for verb in each}


def test_every_kind_of_the_chart_is_reviewed(doctor_server, doctor, server, bundled):
    plurals = {
        kind: plural for kinds in doctor_server.api_server.KINDS.values() for kind, plural in kinds.items()
    }
    assert {plurals[kind] for kind, _ in bundled} <= {resource for _, resource in VERBS}
    doctor("--json")
    assert set(server.reviews) == reviewed(VERBS)
    assert set(plurals.values()) <= {resource for _, resource in VERBS | OPTIONAL}


@pytest.mark.parametrize(
    ("values", "enabled"),
    [
        ({"ingress": {"http": {"enabled": True, "host": "h.example.com"}}}, {"ingresses"}),
        ({"gateway": {"autoscaling": {"enabled": True}}}, {"horizontalpodautoscalers"}),
    ],
    ids=["ingress", "autoscaler"],
)
def test_kinds_that_the_values_enable_are_reviewed_before_they_are_made(
    doctor_server, render, tmp_path, capsys, values, enabled
):
    server = doctor_server.DoctorServer(render(values))
    for key in [key for key in server.objects if key[0] in enabled]:
        del server.objects[key]
    server.denied = {("create", resource) for resource in enabled}
    (tmp_path / "file").write_text(server.kubeconfig)
    main(["doctor", "--kube", "--release=demo", "-n=llm", f"--kubeconfig={tmp_path / 'file'}", "--json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    server.shutdown()
    server.server_close()
    assert {each["subject"].partition(".")[0] for each in found} == enabled
    assert all("you may not create" in each["problem"] for each in found)
    optional = {key: verbs for key, verbs in OPTIONAL.items() if key[1] in enabled}
    assert set(server.reviews) == reviewed(VERBS | optional)


def test_helm_does_nothing_that_is_not_reviewed(doctor_server, call_helm):
    """Helm waits for what it makes, as docs/kubernetes.md has it; without a verb a release ends half made."""
    server = doctor_server.api_server.ApiServer()
    image = {"image": {"repository": "x"}}
    bundled = image | {"redis": {"mode": "bundled"}, "dense": {"replicas": 2}}
    enabled = {kind: {"enabled": True, "host": f"{kind}.example.com"} for kind in ("grpc", "http")}
    wait = {"wait": "watcher", "timeout": 120}

    def helm(action, **arguments):
        call_helm(action, kubeconfig=server.kubeconfig, **arguments)

    helm("install", values=bundled | {"ingress": enabled}, **wait)
    helm("upgrade", values=image | {"gateway": {"autoscaling": {"enabled": True}}}, **wait)
    helm("rollback", **wait)
    helm("test", timeout=120)
    helm("uninstall")
    server.shutdown()
    server.server_close()
    of_the_chart = {key for key, verbs in (VERBS | OPTIONAL).items() if "patch" in verbs}
    assert server.used <= reviewed(VERBS | OPTIONAL)
    for verb in ("list", "watch", "patch"):
        assert {(group, resource) for each, group, resource in server.used if each == verb} >= of_the_chart
