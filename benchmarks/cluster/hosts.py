"""Hosts of their own on one machine: namespaces for network, processes, mounts and host name, on one bridge.

Used by the cluster benchmark and by tests. Hosts share no loopback device, no shared memory and no /tmp;
the file system beside these is the same. Needs root and iproute2. Must not know what runs on a host.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from farshore.errors import StartupError

COMMAND_S = 60.0

_INIT = """
set -e
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /mnt
if [[ $2 == /tmp/* ]]; then
    mkdir -p "/mnt/${2#/tmp/}"
    mount --bind "$2" "/mnt/${2#/tmp/}"
fi
mount --rbind /mnt /tmp
umount --lazy /mnt
hostname "$1"
echo up
read -r
"""
"""The first process of a host. It reaps orphans, and ends with its standard input; the kernel then kills all
others. Arguments: the host's name, and the folder of this Python installation, which a host keeps where it
lies in /tmp, as in CI."""


def why_not() -> str | None:
    """The reason why this machine can't have hosts; None if it can."""
    if os.geteuid() != 0:
        return "needs root: network namespaces"
    if missing := [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}: install iproute2 and util-linux"
    try:
        with hosts() as made:
            made.add()
    except (StartupError, OSError) as error:
        return f"no namespaces here: {error}"
    return None


@contextlib.contextmanager
def hosts() -> Iterator["Hosts"]:
    """Hosts, which end with all their processes and devices."""
    made = Hosts()
    try:
        yield made
    finally:
        made.close()


class Hosts:
    """Made by :func:`hosts`. This process reaches each host by its address, as hosts reach one another."""

    def __init__(self) -> None:
        number = os.getpid()
        self._prefix = f"fs{number}"
        self._net = f"10.{128 + number % 100}.{number // 100 % 250}"
        self.address = f"{self._net}.254"
        """This process's own, among the hosts."""
        self._made: list[Host] = []
        _ip("link", "add", f"{self._prefix}br", "type", "bridge")
        with self._closing_on_error():
            _ip("address", "add", f"{self.address}/24", "dev", f"{self._prefix}br")
            _ip("link", "set", f"{self._prefix}br", "up")

    def add(self) -> "Host":
        """A new host. Raises StartupError."""
        number = len(self._made) + 1
        host = Host(f"{self._prefix}h{number}", f"{self._net}.{number}")
        self._made.append(host)
        with self._closing_on_error():
            host.start(bridge=f"{self._prefix}br", gateway=self.address)
        return host

    def close(self) -> None:
        for host in self._made:
            host.kill()
        with contextlib.suppress(StartupError):
            _ip("link", "del", f"{self._prefix}br")

    @contextlib.contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


class Host:
    """One host; made by :meth:`Hosts.add`."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self._link = name
        self._init: subprocess.Popen[str] | None = None
        self._init_pid = 0

    def start(self, *, bridge: str, gateway: str) -> None:
        _ip("netns", "add", self.name)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self._link, "master", bridge, "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{self.address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("route", "add", "default", "via", gateway),
        ):
            _ip("-n", self.name, *command)
        unshare = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        self._init = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *unshare, "bash", "-c", _INIT, "init", self.name, sys.prefix],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._init.stdout is not None
        if self._init.stdout.readline() != "up\n":
            raise StartupError(f"the host {self.name} did not start")
        (self._init_pid,) = _children(self._init.pid)

    def popen(self, *command: str, env: Mapping[str, str], **options: Any) -> "subprocess.Popen[str]":
        """Starts a command on this host. Its exit code is the result's; a signal to the result does not reach
        it, one to :meth:`pid` does. ``env``: beside this process's own environment."""
        enter = ["nsenter", f"--target={self._init_pid}", "--mount", "--net", "--pid", "--uts", "--ipc"]
        return subprocess.Popen(
            [*enter, *command],
            env=os.environ | {"HOME": "/tmp", "XDG_STATE_HOME": "/tmp"} | dict(env),
            text=True,
            start_new_session=True,
            **options,
        )

    def pid(self, process: "subprocess.Popen[str]") -> int:
        """This machine's id of a command that :meth:`popen` started and that runs, once `nsenter` has forked
        it."""
        return child_of(process.pid)

    def cut(self) -> None:
        """Cuts this host off: packets are lost, and nothing is told."""
        _ip("link", "set", self._link, "down")

    def kill(self) -> None:
        """Ends the host with all its processes at once. Idempotent."""
        if self._init is not None:
            # The first process dies with `unshare`, and is gone only when all others of the host are.
            self._init.kill()
            self._init.wait(COMMAND_S)
            _await(lambda: not Path(f"/proc/{self._init_pid}").exists())
            for pipe in (self._init.stdin, self._init.stdout):
                assert pipe is not None
                pipe.close()
            self._init = None
        with contextlib.suppress(StartupError):
            _ip("netns", "del", self.name)
        with contextlib.suppress(StartupError):
            _ip("link", "del", self._link)


def child_of(pid: int) -> int:
    """The process that ``pid`` has forked, or is about to fork as its only one. Raises StartupError if it has
    ended instead."""
    with contextlib.suppress(OSError, ValueError):
        _await(lambda: bool(_children(pid)) or _is_zombie(pid))
        (child,) = _children(pid)
        return child
    raise StartupError(f"process {pid} has ended")


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _await(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + COMMAND_S
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _ip(*command: str) -> None:
    done = subprocess.run(["ip", *command], capture_output=True, text=True, timeout=COMMAND_S)
    if done.returncode:
        raise StartupError(f"ip {' '.join(command)}: {done.stderr.strip()}")
