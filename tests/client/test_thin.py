"""The base installation in an environment of its own: SDK and command line; no torch, Ray or compiler."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_DEADLINE_S = 60
HEAVY = ("torch", "ray", "numpy", "tokenizers", "redis")

SDK = """
import sys
from farshore.client.sdk import Client

with Client(sys.argv[1]) as client:
    events = list(client.generate("Once upon", max_tokens=5))
print(type(events[-1]).__name__, client.address)
"""


@pytest.fixture(scope="module")
def thin(tmp_path_factory, new_environment):
    """The python of an environment with the base installation, made where no compiler works."""
    folder = tmp_path_factory.mktemp("thin")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "tests"))
    return new_environment(folder, source, CC="/bin/false", CXX="/bin/false")


@pytest.fixture
def run_thin(thin, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [thin, "-P", *arguments], capture_output=True, text=True, timeout=RUN_DEADLINE_S, cwd=tmp_path
        )

    return run


@pytest.mark.heavy
def test_base_installation_has_no_server_packages(run_thin):
    find = f"from importlib.util import find_spec; print([name for name in {HEAVY} if find_spec(name)])"
    assert run_thin("-c", find).stdout == "[]\n"


@pytest.mark.heavy
def test_sdk_and_command_line_talk_to_a_gateway(run_thin, farshore, served):
    farshore.engine.auto = served.tokenizer.encode(" a time")
    done = run_thin("-c", SDK, farshore.address)
    assert (done.stdout, done.stderr) == (f"Finished {farshore.address}\n", "")
    done = run_thin("-m", "farshore.client.cli.main", "generate", "Once upon", "--server", farshore.address)
    assert (done.returncode, done.stdout) == (0, " a time\n"), done.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("command", [("serve",), ("gateway", "--help"), ("bench", "machine")])
def test_commands_of_the_server_name_the_missing_installation(run_thin, command):
    done = run_thin("-m", "farshore.client.cli.main", *command)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert 'pip install "farshore[server]"' in done.stderr
