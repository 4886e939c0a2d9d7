"""The base installation in an environment of its own: SDK and command line; no torch, Ray or compiler."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_DEADLINE_S = 60
HEAVY = ("torch", "ray", "numpy", "tokenizers", "redis")

SDK = """
import asyncio, sys
from farshore import AsyncClient, Client

async def text(address):
    async with AsyncClient(address) as client:
        return await client.generate("Once upon", max_tokens=5).text()

with Client(sys.argv[1]) as client:
    events = list(client.generate("Once upon", max_tokens=5))
print(type(events[-1]).__name__, client.address, asyncio.run(text(client.address)))
"""

IMPORTED = """
import json, sys
before = set(sys.modules)
import farshore
root = set(sys.modules) - before
import grpc
before |= set(sys.modules)
from farshore import AsyncClient, Client
print(json.dumps([sorted(root), sorted(set(sys.modules) - before)]))
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


def test_what_an_import_brings():
    """Here everything of the server is installed, too. gRPC's own imports are not counted."""
    command = [sys.executable, "-P", "-c", IMPORTED]
    root, clients = json.loads(subprocess.check_output(command, text=True, timeout=RUN_DEADLINE_S))
    assert {name.partition(".")[0] for name in root} - sys.stdlib_module_names == {"farshore"}
    brought = {name.partition(".")[0] for name in clients} - sys.stdlib_module_names
    assert {name for name in brought if name[0] != "_"} <= {
        "farshore", "google", "grpc", "grpc_health", "grpc_reflection"
    }  # fmt: skip
    floors = {name.split(".")[1] for name in clients if name.startswith("farshore.")}
    assert {"client", "proto"} < floors
    assert not floors & {"gateway", "controller", "workers", "attention_offload", "models", "kvstore"}


@pytest.mark.heavy
def test_base_installation_has_no_server_packages(run_thin):
    find = f"from importlib.util import find_spec; print([name for name in {HEAVY} if find_spec(name)])"
    assert run_thin("-c", find).stdout == "[]\n"


@pytest.mark.heavy
def test_sdk_and_command_line_talk_to_a_gateway(run_thin, farshore, served):
    farshore.engine.auto = served.tokenizer.encode(" a time")
    done = run_thin("-c", SDK, farshore.address)
    assert (done.stdout, done.stderr) == (f"Finished {farshore.address}  a time\n", "")
    done = run_thin("-m", "farshore.client.cli.main", "generate", "Once upon", "--server", farshore.address)
    assert (done.returncode, done.stdout) == (0, " a time\n"), done.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("command", [("serve",), ("gateway", "--help"), ("bench", "machine")])
def test_commands_of_the_server_name_the_missing_installation(run_thin, command):
    done = run_thin("-m", "farshore.client.cli.main", *command)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert 'pip install ".[server]" in a checkout' in done.stderr
