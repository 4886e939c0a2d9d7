"""Fixtures of the chart's tests: Helm, and objects that it renders."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from farshore.client.cli.main import main

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "farshore"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
IMAGE = {"image": {"repository": "registry.example.com/farshore"}}


class HelmFailed(Exception):
    pass


def _merged(*layers):
    """The layers of values as Helm merges them: later ones go first, lists are replaced."""
    result = {}
    for layer in layers:
        for key, value in copy.deepcopy(layer).items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = _merged(result[key], value) if both else value
    return result


@pytest.fixture(scope="session")
def call_helm():
    """call_helm(action, **arguments) -> what Helm returns. Raises HelmFailed."""
    if importlib.util.find_spec("helm_python") is None and not os.environ.get("CI"):
        pytest.skip("helm-python-sdk is not installed, or has no wheel for this platform")
    command = [sys.executable, "-P", str(Path(__file__).with_name("helm_process.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def call(action, **arguments):
            process.stdin.write(json.dumps([action, str(CHART), arguments]) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            if "error" in answer:
                raise HelmFailed(answer["error"])
            return answer["result"]

        yield call
        process.stdin.close()


@pytest.fixture(scope="session")
def render(call_helm):
    """render(values, name=) -> {(kind, name): object}, the image's repository given."""

    def rendered(values=None, *, name="demo"):
        texts = call_helm("render", values=_merged(IMAGE, values or {}), name=name, namespace="llm")
        texts.pop("farshore/templates/NOTES.txt", None)
        found = [each for text in texts.values() for each in yaml.safe_load_all(text) if each]
        objects = {(each["kind"], each["metadata"]["name"]): each for each in found}
        assert len(objects) == len(found)
        return objects

    return rendered


@pytest.fixture(scope="session")
def notes(call_helm):
    """notes(values) -> the text that Helm prints after an installation."""

    def rendered(values):
        texts = call_helm("render", values=_merged(IMAGE, values), name="demo", namespace="llm")
        return texts["farshore/templates/NOTES.txt"]

    return rendered


@pytest.fixture(scope="session")
def examples():
    """Name -> values, of the chart's examples."""
    return {path.stem: yaml.safe_load(path.read_text()) for path in EXAMPLES}


@pytest.fixture(scope="session")
def defaults():
    return yaml.safe_load((CHART / "values.yaml").read_text())


@pytest.fixture(scope="session")
def merged():
    """merged(values, …) -> values as Helm merges those of several files."""
    return _merged


@pytest.fixture(scope="session")
def helm_failed():
    """The error of :func:`call_helm`."""
    return HelmFailed


@pytest.fixture(scope="session")
def doctor_server():
    """The stand-ins' module, imported by its path."""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    import doctor_server

    sys.path.remove(folder)
    return doctor_server


@pytest.fixture(scope="session")
def bundled(render):
    values = {"redis": {"mode": "bundled"}, "image": {"pullSecrets": ["registry"]}}
    return render(values)


@pytest.fixture
def server(doctor_server, bundled):
    """A DoctorServer with the chart's objects, healthy."""
    running = doctor_server.DoctorServer(copy.deepcopy(bundled))
    pull = {"metadata": {"name": "registry", "namespace": "llm"}, "data": {".dockerconfigjson": "e30="}}
    running.add("secrets", pull)
    yield running
    running.released.set()
    running.shutdown()
    running.server_close()


@pytest.fixture
def doctor(server, tmp_path, capsys):
    """doctor(*options) -> (exit code, the JSON object or, with "--text", stdout; stderr)."""
    (tmp_path / "kubeconfig").write_text(server.kubeconfig)

    def run(*options):
        command = ["doctor", "--kube", "--release=demo", "--namespace=llm"]
        command += [f"--kubeconfig={tmp_path / 'kubeconfig'}", "--timeout=20", *options]
        code = main(command)
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in options and out else out, err

    return run
