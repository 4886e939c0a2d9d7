"""``farshore node`` composes a ``ray start``; tests/controller runs it."""

import argparse
import json
import os
import sys

import pytest

from farshore.client.cli import node
from farshore.controller.launch.ray_settings import QUICK_VERDICT


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "FARSHORE_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def token(tmp_path):
    file = tmp_path / "token"
    file.write_text("ab" * 32)
    file.chmod(0o600)
    return str(file)


def composed(*options):
    parser = argparse.ArgumentParser()
    node.add_parser(parser.add_subparsers())
    start = node.ray_start(parser.parse_args(["node", *options]))
    return start.command[3:], start.environment


def resources(command):
    (given,) = [option for option in command if option.startswith("--resources=")]
    return json.loads(given.partition("=")[2])


def test_a_memory_node(token):
    options = ["--attention", "4", "--memory", "2GiB", "--cores", "8", "--host", "10.0.0.3"]
    command, environment = composed("--ray-address", "10.0.0.1:6379", "--token-file", token, *options)
    assert resources(command) == {"farshore": 1, "attention": 4}
    assert {
        "--address=10.0.0.1:6379",
        "--object-store-memory=83886080",
        "--memory=2147483648",
        "--num-cpus=8",
        "--node-ip-address=10.0.0.3",
        "--block",
        "--disable-usage-stats",
    } <= set(command)
    assert environment["RAY_memory_monitor_refresh_ms"] == environment["RAY_worker_niceness"] == "0"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == environment["FARSHORE_TOKEN_FILE"] == token
    assert not QUICK_VERDICT.keys() & environment.keys()


def test_a_head_that_takes_no_workers(token):
    command, environment = composed("--head", "--port", "7000", "--token-file", token)
    assert resources(command) == {"farshore": 1}
    assert {"--head", "--port=7000", "--include-dashboard=false"} <= set(command)
    assert QUICK_VERDICT.items() <= environment.items()
    assert not [option for option in command if option.startswith(("--memory", "--num-cpus", "--address"))]


def test_more_options_of_ray(token):
    command, _ = composed("--head", "--dense", "1", "--token-file", token, "--", "--metrics-export-port=9000")
    assert resources(command) == {"farshore": 1, "dense": 1}
    assert command[-1] == "--metrics-export-port=9000"


def test_a_node_needs_a_token(run, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    done = run("node", "--head")
    assert done.code == 1
    for part in ("--token-file", "openssl rand"):
        assert part in done.err
    done = run("node", "--head", "--token-file", str(tmp_path / "none"))
    assert done.code == 1 and "can't be read" in done.err


def test_it_becomes_ray_start(run, monkeypatch, token, tmp_path):
    """In the folder of the interpreter: a checkout must not be the current directory."""
    became = []
    monkeypatch.setattr(os, "execve", lambda *given: became.append((*given, os.getcwd())))
    monkeypatch.chdir(tmp_path)
    run("node", "--head", "--token-file", token)
    ((program, command, environment, folder),) = became
    assert program == command[0] == sys.executable and command[1:5] == [
        "-P",
        "-m",
        "ray.scripts.scripts",
        "start",
    ]
    assert environment["PATH"] == os.environ["PATH"] and environment["RAY_AUTH_TOKEN_PATH"] == token
    assert folder == os.path.dirname(sys.executable)


def test_a_node_is_a_head_or_joins_one(run):
    assert run("node").code == 2
    assert run("node", "--head", "--ray-address", "10.0.0.1:6379").code == 2


def test_leave_needs_a_ray(run, token, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = run("leave", "--token-file", token)
    assert done.code == 1 and "give --ray-address HOST:PORT, or set RAY_ADDRESS" in done.err
