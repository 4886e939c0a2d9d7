"""``farshore doctor``: says what is wrong with a release on Kubernetes, and what to do.

Called by ``main``. Must not know what is checked, nor Kubernetes: ``client.doctor`` does.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence

from farshore.client.cli.options.values import seconds
from farshore.client.cli.terminal import Progress, write
from farshore.client.doctor.finding import Finding, Release
from farshore.errors import InvalidRequest

INSTALLATION = 'pip install ".[kube]" in a checkout of farshore'


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "doctor",
        help="find what is wrong with an installation on Kubernetes, and how to fix it",
        description="Read a release of the chart helm/farshore from Kubernetes' API, and say what is wrong "
        "and what to do: the KubeRay operator and its CRD, nodes and room for the pods, the pods' last "
        "states, Secrets, volumes, your rights. Changes nothing. The exit code is 0 without findings, and 1 "
        "with some.",
        epilog="example: farshore doctor --kube --namespace llm --release demo",
    )
    parser.add_argument("--kube", action="store_true", required=True, help="examine Kubernetes (required)")
    parser.add_argument("--release", metavar="NAME", required=True, help="the release, by Helm's name of it")
    parser.add_argument("--namespace", "-n", metavar="NAME", help="its namespace (default: the context's)")
    parser.add_argument(
        "--kubeconfig",
        metavar="FILE",
        help="how to reach the cluster (default: $KUBECONFIG, else ~/.kube/config, else a pod's own account)",
    )
    parser.add_argument("--context", metavar="NAME", help="of the kubeconfig (default: its current one)")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=10.0,
        metavar="S",
        help="most time for each call of the API (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # Imported here: the client of Kubernetes is an extra, and takes a second to import.
    try:
        from farshore.client.doctor.examine import CHECKS, examine
        from farshore.client.doctor.kube_api import KubeApi
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "farshore":
            raise
        raise InvalidRequest(
            f"doctor --kube needs the package {error.name}: install it with {INSTALLATION}"
        ) from error

    api = KubeApi.connect(kubeconfig=args.kubeconfig, context=args.context, timeout_s=args.timeout)
    release = Release(args.release, args.namespace or api.namespace)
    progress = Progress()
    try:
        findings = examine(api, release, progress=lambda name: progress.update(f"checking {name}"))
    finally:
        progress.clear()
    if args.json:
        shown = {"release": release.name, "namespace": release.namespace, "checks": list(CHECKS)}
        write(f"{json.dumps(shown | {'findings': [dataclasses.asdict(each) for each in findings]})}\n")
    else:
        write(f"{render(findings, tuple(CHECKS))}\n")
    return 1 if findings else 0


def render(findings: Sequence[Finding], checks: Sequence[str]) -> str:
    """The findings as text for a terminal."""
    lines = []
    for each in findings:
        lines += [f"{each.check}: {each.subject}", f"  {each.problem}", f"  fix: {each.fix}", ""]
    count = f"{len(findings)} finding{'' if len(findings) == 1 else 's'}" if findings else "nothing is wrong"
    return "\n".join([*lines, f"{count}; checked: {', '.join(checks)}"])
