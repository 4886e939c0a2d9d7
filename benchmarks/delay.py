"""A network of a given delay and rate, where the kernel has no netem: a proxy for TCP connections.

``python -m farshore.benchmarks.delay`` listens on the same ports as its target, at another address, so that
whoever is told one of the target's ports finds it at the proxy, too. Bytes leave in order, each ``delay``
after it came and at most ``rate`` in a second: what a link does, without loss. It ends when its input does.

On Linux all of 127.0.0.0/8 is this host: the benchmark's proxy is 127.0.0.2 for a worker on 127.0.0.1.
"""

import argparse
import ctypes
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from farshore.errors import StartupError

CHUNK_BYTES = 256 << 10
CONNECT_DEADLINE_S = 5.0
HELD_CHUNKS = 4096
"""Of one direction; beyond, the sender has to wait."""

_PR_SET_TIMERSLACK = 29


@contextmanager
def proxy(*, listen: str, target: str, ports: list[int], delay_s: float) -> Iterator[None]:
    """A proxy in a process of its own, listening by the time the block begins, until it ends."""
    command = [sys.executable, "-P", "-m", "farshore.benchmarks.delay", "--listen", listen]
    command += ["--target", target, "--delay-s", str(delay_s), "--ports", *map(str, ports)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                raise StartupError(f"the delaying proxy at {listen} ended with {process.wait()}")
            yield
        finally:
            process.kill()


class _Direction:
    """Bytes from one socket to the other. Two threads: one waits for bytes, one for their time."""

    def __init__(self, source: socket.socket, to: socket.socket, delay_s: float, rate: float) -> None:
        self._source, self._to = source, to
        self._delay_s, self._rate = delay_s, rate
        self._held: queue.Queue[tuple[float, bytes]] = queue.Queue(HELD_CHUNKS)
        for run in (self._receive, self._send):
            threading.Thread(target=run, daemon=True).start()

    def _receive(self) -> None:
        free_s = 0.0  # when the link has sent what came before
        chunk = b"-"
        while chunk:
            try:
                chunk = self._source.recv(CHUNK_BYTES)
            except OSError:
                chunk = b""
            free_s = max(free_s, time.monotonic()) + len(chunk) / self._rate
            self._held.put((free_s + self._delay_s, chunk))

    def _send(self) -> None:
        while True:
            due_s, chunk = self._held.get()
            left_s = due_s - time.monotonic()
            if left_s > 0:
                time.sleep(left_s)
            try:
                if not chunk:
                    self._to.shutdown(socket.SHUT_WR)
                    return
                self._to.sendall(chunk)
            except OSError:
                with suppress(OSError):
                    self._source.shutdown(socket.SHUT_RD)
                return


def _accept(listener: socket.socket, target: tuple[str, int], delay_s: float, rate: float) -> None:
    while True:
        here, _ = listener.accept()
        try:
            there = socket.create_connection(target, timeout=CONNECT_DEADLINE_S)
        except OSError:
            here.close()
            continue
        there.settimeout(None)
        for it in (here, there):
            it.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _Direction(here, there, delay_s, rate)
        _Direction(there, here, delay_s, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description="Delay TCP connections.")
    parser.add_argument("--listen", required=True, metavar="HOST")
    parser.add_argument("--target", required=True, metavar="HOST")
    parser.add_argument("--ports", required=True, nargs="+", type=int, metavar="PORT")
    parser.add_argument("--delay-s", default=0.0, type=float, metavar="S", help="one way")
    parser.add_argument("--rate", default=float("inf"), type=float, metavar="BYTES/S", help="each way")
    args = parser.parse_args()
    # Sleeps otherwise last up to 50 µs longer than asked for.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1))
    for port in args.ports:
        listener = socket.create_server((args.listen, port))
        arguments = (listener, (args.target, port), args.delay_s, args.rate)
        threading.Thread(target=_accept, args=arguments, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
