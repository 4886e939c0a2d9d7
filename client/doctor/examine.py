"""All checks of a release on Kubernetes, one after the other: a check that fails hides no other.

Called by ``farshore doctor``. Must not know what the checks look for.
"""

from collections.abc import Callable, Iterator

from farshore.client.doctor import access, kuberay, nodes, pods, references, volumes, workloads
from farshore.client.doctor.finding import Finding, Release
from farshore.client.doctor.kube_api import KubeApi
from farshore.errors import DeadlineExceeded, FarshoreError, TransportError

CHECKS: dict[str, Callable[[KubeApi, Release], Iterator[Finding]]] = {
    module.NAME: module.check for module in (kuberay, workloads, nodes, pods, references, volumes, access)
}


def examine(api: KubeApi, release: Release, *, progress: Callable[[str], None]) -> list[Finding]:
    """The findings in the order of the checks; ``progress`` gets each check's name before it begins. A check
    that can't be made, or not to its end, is a finding, too. Raises FarshoreError only where the API server
    can't be asked at all."""
    api.get("/version")
    found: list[Finding] = []
    for name, check in CHECKS.items():
        progress(name)
        try:
            found.extend(check(api, release))
        except FarshoreError as error:
            found.append(_not_made(name, error))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            problem = f"it could not be made: the server's answer is not as expected: {error!r}"
            found.append(Finding(name, "this check", problem, "report it, with the version of Kubernetes"))
    return found


def _not_made(name: str, error: FarshoreError) -> Finding:
    if isinstance(error, DeadlineExceeded):
        fix = "try again; --timeout S gives each call more time"
    elif isinstance(error, TransportError):
        fix = "see whether the API server runs (kubectl get --raw /readyz), then try again"
    else:
        fix = "run the doctor as a user that may read it, or ask for the right"
    return Finding(name, "this check", f"it could not be made to its end: {error}", fix)
