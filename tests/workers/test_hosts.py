"""Engine and shards on hosts of their own: network namespaces, joined by veth links that are slow, lose
packets or are cut.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from farshore.cluster_token import ClusterToken
from farshore.sampling import Sampling
from farshore.workers.engine.sequence import Finished

pytestmark = pytest.mark.heavy

PROMPT_TOKENS = 762
"""The prompt is on both shards, and its tail's first block is handed off during decoding."""
TOKENS = 24
COMMAND_S = 60.0
LISTENS = "0A"
"""State of a listening socket in /proc/net/tcp."""
MENDED_S = 60.0
"""Longest wait for a repaired link: gRPC tries to connect again every few seconds."""


def ip(*command):
    return subprocess.run(["ip", *command], capture_output=True, text=True, timeout=COMMAND_S)


def why_not():
    if os.geteuid() != 0:
        return "needs root: network namespaces"
    if shutil.which("ip") is None:
        return "needs iproute2"
    name = f"fs{os.getpid()}probe"
    made = ip("netns", "add", name)
    ip("netns", "del", name)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else None


@pytest.fixture(scope="module")
def may_have_hosts():
    if reason := why_not():
        pytest.skip(reason)


class Hosts:
    """One host for an engine and two for shards; each shard's host is linked to the engine's."""

    def __init__(self, stack):
        self.engine = self._host(stack, "e")
        self.shards = [self._host(stack, name) for name in "ab"]
        for index, shard in enumerate(self.shards):
            here, there = f"eth{index}", "eth0"
            self._must(
                "link",
                "add",
                here,
                "netns",
                self.engine,
                "type",
                "veth",
                "peer",
                "name",
                there,
                "netns",
                shard,
            )
            self._up(self.engine, here, f"10.77.{index}.1/29")
            self._up(shard, there, f"10.77.{index}.2/29")
            # The address of the proxy that replaces netem.
            self._must("-n", shard, "address", "add", f"10.77.{index}.3/29", "dev", there)

    def _host(self, stack, name):
        host = f"fs{os.getpid()}{name}"
        self._must("netns", "add", host)
        stack.callback(ip, "netns", "del", host)
        self._must("-n", host, "link", "set", "lo", "up")
        return host

    def _must(self, *command):
        done = ip(*command)
        assert not done.returncode, f"ip {' '.join(command)}: {done.stderr}"

    def _up(self, host, device, address):
        self._must("-n", host, "address", "add", address, "dev", device)
        self._must("-n", host, "link", "set", device, "up")

    def cut(self, index):
        self._must("-n", self.engine, "link", "set", f"eth{index}", "down")

    def mend(self, index):
        self._must("-n", self.engine, "link", "set", f"eth{index}", "up")

    def impair(self, stack, index, *netem):
        """Impairs both directions of a link until ``stack`` is closed. Returns False if the kernel cannot."""
        for host, device in ((self.engine, f"eth{index}"), (self.shards[index], "eth0")):
            on = ("tc", "-n", host, "qdisc")
            where = ("dev", device, "root", "netem")
            if subprocess.run(
                [*on, "add", *where, *netem], capture_output=True, timeout=COMMAND_S
            ).returncode:
                return False
            stack.callback(subprocess.run, [*on, "del", *where], timeout=COMMAND_S, check=True)
        return True


@pytest.fixture
def stack():
    with ExitStack() as made:
        yield made


@pytest.fixture(scope="module")
def hosts(may_have_hosts):
    with ExitStack() as made:
        yield Hosts(made)


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    """The token of the cluster. Shards on other hosts do not start without one."""
    return str(ClusterToken.make(tmp_path_factory.mktemp("cluster") / "token").path)


@pytest.fixture(scope="module")
def shards(hosts, worker_process, token_file):
    """Worker name -> an attention worker on each shard's host."""
    with ExitStack() as made:
        started = {}
        for index, host in enumerate(hosts.shards):
            name, prefix = f"shard{index}", ("ip", "netns", "exec", host)
            started[name] = worker_process(
                f"10.77.{index}.2:0", prefix=prefix, worker=name, token_file=token_file
            )
            made.callback(started[name].kill)
        yield started


class RemoteEngine:
    """The process of an engine on its host."""

    def __init__(self, stack, host, options, prompt):
        self._prompt = prompt
        script = Path(__file__).with_name("host_engine.py")
        command = ["ip", "netns", "exec", host, sys.executable, "-P", script, json.dumps(options)]
        pipe = subprocess.PIPE
        self._process = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        stack.callback(self._process.kill)

    def generate(self, *, pause_at=0, meanwhile=lambda: None):
        """Returns the tokens and the last message. The engine stands still at the token with the number
        ``pause_at`` while ``meanwhile()`` runs."""
        self._say({"prompt": self._prompt, "max_tokens": TOKENS, "pause_at": pause_at})
        tokens = []
        while "token" in (message := json.loads(self._process.stdout.readline())):
            tokens.append(message["token"])
            if len(tokens) == pause_at:
                meanwhile()
                self._say("go on")
        return tokens, message

    def _say(self, message):
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()


@pytest.fixture(scope="module")
def prompts():
    return ([(first + n) % 90 for n in range(PROMPT_TOKENS)] for first in itertools.count())


@pytest.fixture
def prompt(prompts):
    """A prompt that no other test uses, so that stored prefixes do not change where spans are placed."""
    return next(prompts)


@pytest.fixture
def start_engine(hosts, stack, tiny_folder, prompt, token_file):
    def start(addresses, transports):
        options = {"folder": str(tiny_folder), "shards": addresses, "transports": transports}
        options["token_file"] = token_file
        return RemoteEngine(stack, hosts.engine, options, prompt)

    return start


@pytest.fixture
def expected(tiny_model, rig, submit, prompt):
    """The tokens of an engine with all KV in its own memory."""
    engine = rig(tiny_model, local=True, memory_bytes=32 << 20).start()
    collected = submit(engine, "local", prompt, Sampling(max_tokens=TOKENS, temperature=0.0))
    assert isinstance(collected.result(), Finished)
    return collected.tokens


@pytest.mark.parametrize(
    ("transports", "used"),
    [(["shared memory", "TCP", "gRPC"], "TCP"), (["gRPC"], "gRPC")],
    ids=["first that connects", "gRPC"],
)
def test_shards_on_other_hosts(shards, start_engine, expected, transports, used):
    """Shared memory is tried first, and fails between hosts."""
    engine = start_engine({name: shard.address for name, shard in shards.items()}, transports)
    tokens, end = engine.generate()
    assert tokens == expected
    assert end == {"finished": "length", "links": {name: [used, 0] for name in shards}}


@pytest.mark.parametrize("transports", [["TCP"], ["gRPC"]], ids=["TCP", "gRPC"])
def test_a_link_that_is_cut(hosts, shards, start_engine, expected, transports):
    """A cut link gives no answer and no hang-up, so the frame's deadline ends the wait."""
    addresses = {name: shard.address for name, shard in shards.items()}
    engine = start_engine(addresses, transports)
    tokens, end = engine.generate(pause_at=5, meanwhile=lambda: hosts.cut(0))
    assert tokens == expected[: len(tokens)] and 5 <= len(tokens) < TOKENS
    assert end["failed"].startswith("Lost: ") and addresses["shard0"] in end["failed"]
    assert end["links"]["shard0"][1] and not end["links"]["shard1"][1]
    hosts.mend(0)
    until_s = time.monotonic() + MENDED_S
    while "failed" in end and time.monotonic() < until_s:
        tokens, end = engine.generate()
    assert tokens == expected


@pytest.mark.parametrize(
    ("netem", "instead"),
    [
        (("delay", "2ms"), ("--delay-s", "0.002")),
        (("rate", "20mbit"), ("--rate", "2500000")),
        (("loss", "2%", "delay", "1ms"), None),
    ],
    ids=["delay", "rate", "loss"],
)
def test_links_that_are_slow_or_lose_packets(hosts, shards, stack, start_engine, expected, netem, instead):
    addresses = {name: shard.address for name, shard in shards.items()}
    if not hosts.impair(stack, 0, *netem):
        if instead is None:
            pytest.skip("this kernel has no netem, and the proxy cannot lose packets")
        addresses["shard0"] = proxied(stack, hosts.shards[0], shards["shard0"], instead)
    tokens, end = start_engine(addresses, ["TCP"]).generate()
    assert tokens == expected
    assert end == {"finished": "length", "links": {name: ["TCP", 0] for name in shards}}


def proxied(stack, host, shard, options):
    """Starts a proxy on the shard's host that behaves as the slow link; returns the address behind it."""
    host_address, _, port = shard.address.rpartition(":")
    near = host_address.rpartition(".")[0] + ".3"
    net = Path(f"/proc/{shard.process.pid}/net")
    sockets = [line.split() for name in ("tcp", "tcp6") for line in (net / name).read_text().splitlines()[1:]]
    ports = {str(int(local.rpartition(":")[2], 16)) for _, local, _, state, *_ in sockets if state == LISTENS}
    assert port in ports
    command = ["ip", "netns", "exec", host, sys.executable, "-P", "-m", "farshore.benchmarks.delay"]
    command += ["--listen", near, "--target", host_address, "--ports", *ports, *options]
    process = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    stack.callback(process.kill)
    assert process.stdout.readline()
    return f"{near}:{port}"
