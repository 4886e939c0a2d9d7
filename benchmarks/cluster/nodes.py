"""Nodes of Ray on hosts of their own, with a cluster on them.

Used by the cluster benchmark and by tests. Must not know what is asked of the cluster.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from farshore.benchmarks.cluster.hosts import Host, Hosts, hosts
from farshore.cluster_token import VARIABLE, ClusterToken
from farshore.errors import StartupError

START_DEADLINE_S = 300.0
PORT = 6379

_WATCH = """
import sys, time
from ray._raylet import GcsClient
client = GcsClient(sys.argv[1])
print("watching", flush=True)
dead = set()
while True:
    for node in client.get_all_node_info(timeout=5).values():
        if node.state and node.node_id not in dead:
            dead.add(node.node_id)
            print("dead", node.node_manager_address, time.time(), flush=True)
    time.sleep(0.05)
"""
"""Tells when the GCS declares a node dead."""


class Output:
    """The lines that a process writes, read by a thread."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def await_match(self, pattern: str) -> re.Match[str]:
        """Blocks until a line matches. Raises StartupError if the output ends, or after START_DEADLINE_S."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._find(pattern), START_DEADLINE_S)
            if found := self._find(pattern):
                return found
            raise StartupError(f"no {pattern!r} in: {self.last_words}")

    @property
    def last_words(self) -> str:
        """The newest lines."""
        return " ".join(" ".join(self._lines[-10:]).split())

    def _find(self, pattern: str) -> re.Match[str] | None:
        return next((found for line in self._lines if (found := re.search(pattern, line))), None)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        self._process.wait()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Nodes:
    """Made by :func:`nodes`. The first node is Ray's head."""

    def __init__(self, made: Hosts, token_file: Path) -> None:
        self._hosts = made
        self._environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            VARIABLE: str(token_file),
        }
        self.head: Host | None = None
        self._heads_output: Output | None = None

    @property
    def ray_address(self) -> str:
        assert self.head is not None
        return f"{self.head.address}:{PORT}"

    def add(self, *options: str) -> Host:
        """A host whose `farshore node` has started. Raises StartupError."""
        host = self._hosts.add()
        where = ["--head", f"--port={PORT}"] if self.head is None else ["--ray-address", self.ray_address]
        output = self.command(host, "node", *where, "--host", host.address, *options)
        self._heads_output = self._heads_output or output
        try:
            output.await_match("Ray runtime started")
        except StartupError as error:
            raise StartupError(f"{error}; the head says: {self._heads_output.last_words}") from error
        self.head = self.head or host
        return host

    def serve(self, *options: str) -> str:
        """Runs `farshore serve` on the head's host. Returns the gateway's address. Raises StartupError."""
        assert self.head is not None
        where = ["--ray-address", self.ray_address, "--host", self.head.address, "--port", "0"]
        return self.command(self.head, "serve", *where, *options).await_match(r"serves \S+ at (\S+)")[1]

    def command(self, host: Host, *arguments: str) -> Output:
        """Runs a `farshore` command on a host, in the background."""
        return self.python(host, "-m", "farshore.client.cli.main", *arguments)

    def verdicts(self) -> Output:
        """Lines "dead ADDRESS UNIX_TIME", one for each node that Ray declares dead from now on."""
        assert self.head is not None
        output = self.python(self.head, "-c", _WATCH, self.ray_address)
        output.await_match("watching")
        return output

    def python(self, host: Host, *arguments: str) -> Output:
        """Runs Python on a host, in the background."""
        process = host.popen(
            *(sys.executable, "-P", "-u", *arguments),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return Output(process)


@contextlib.contextmanager
def nodes() -> Iterator[Nodes]:
    """Nodes, which end with their hosts."""
    # Not in /tmp, which hosts do not share.
    with tempfile.TemporaryDirectory(prefix="farshore-", dir="/var/tmp") as folder, hosts() as made:
        token_file = Path(folder) / "token"
        ClusterToken.make(token_file)
        yield Nodes(made, token_file)
